// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"crypto/ecdsa"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestNginx reads through a stock nginx, which ends each connection after 1000 requests and offers HTTP/2. No read
// fails, and no token counts as undelivered. It is skipped without nginx, unless E2E_NGINX is "require".
func TestNginx(t *testing.T) {
	t.Parallel()
	const readers, reads = 32, 4000
	nginx, err := exec.LookPath("nginx")
	if err != nil {
		nginx, err = exec.LookPath("/usr/sbin/nginx") // where Debian has it, which is on few users' path
	}
	switch {
	case err != nil && os.Getenv("E2E_NGINX") == "require":
		t.Fatal("nginx is not installed: apt-get install nginx-light")
	case err != nil:
		t.Skip("nginx is not installed: apt-get install nginx-light")
	}
	m := newMount(t, sharedServer(t), nil)
	url, ca := startNginx(t, nginx, strings.TrimSuffix(m.sim.URL, m.sim.Path()))
	m.configure(t, map[string]any{"token_url": url + m.sim.Path(), "ca_cert": ca})

	for range reads / readers {
		for _, a := range m.readAll(t, readers) {
			if a.status != 200 {
				t.Error(a)
			}
		}
	}
	if s := m.sim.Stats(); s.Calls != reads || s.Minted != reads {
		t.Errorf("Cable saw %d calls and issued %d tokens, want %d", s.Calls, s.Minted, reads)
	}
	if n := m.figure(t, "vault_cable_undelivered_tokens_total"); n != 0 {
		t.Errorf("%d tokens count as undelivered", n)
	}
}

// startNginx starts an nginx in front of upstream for the duration of a test, with nothing set that is not needed to
// run it here. It returns its URL and the certificate to trust.
func startNginx(t *testing.T, nginx, upstream string) (url, ca string) {
	t.Helper()
	certificate, root := issue(t, "127.0.0.1")
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "tls.pem"), string(root))
	writeFile(t, filepath.Join(dir, "tls.key"), privateKey(t, certificate.PrivateKey.(*ecdsa.PrivateKey)))
	address := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	writeFile(t, filepath.Join(dir, "nginx.conf"), fmt.Sprintf(`
daemon off; master_process off; pid nginx.pid; error_log stderr warn;
events { worker_connections 512; }
http {
  access_log off;
  client_body_temp_path a; proxy_temp_path b; fastcgi_temp_path c; uwsgi_temp_path d; scgi_temp_path e;
  server {
    listen %s ssl http2;
    ssl_certificate tls.pem; ssl_certificate_key tls.key;
    location / { proxy_pass %s; }
  }
}
`, address, upstream))
	runUntilEnd(t, dir, os.Environ(), nginx, "-p", dir, "-c", "nginx.conf")
	waitFor(t, 10*time.Second, "nginx", func() bool {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			_ = conn.Close()
		}
		return err == nil
	})
	return "https://" + address, string(root)
}
