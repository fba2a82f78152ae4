// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// Hosts of a standInCable.
const (
	cableHost   = "api.cable.tech"            // Cable's own, of the default token_url
	gatewayHost = "cable-gateway.example.com" // an operator's own, with a root of its own
	thiefHost   = "tokens.example.net"        // a third party's
)

// standInCable lets the commands of the documents be run as they are, with Cable's default token_url. A proxy leads
// each of the hosts above to the simulator, over TLS.
type standInCable struct {
	*cabletest.Simulator
	gatewayCA string   // PEM, for ca_cert
	env       []string // of the Vault server, and so of the plugin
	proxyURL  string
	bundle    string // file with the root of cableHost, and of thiefHost

	mu    sync.Mutex
	stole []string // Authorization headers that came to thiefHost
}

// newStandInCable starts it for the duration of a test.
func newStandInCable(t *testing.T) *standInCable {
	t.Helper()
	c := &standInCable{Simulator: cabletest.New(&cabletest.Options{BasePath: "/v2"})}
	t.Cleanup(c.Close)
	thief := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		c.stole = append(c.stole, r.Header.Get("Authorization"))
		c.mu.Unlock()
		w.WriteHeader(http.StatusUnauthorized)
	})
	var roots []byte
	addrs := map[string]string{}
	for host, handler := range map[string]http.Handler{
		cableHost: c.Simulator, gatewayHost: c.Simulator, thiefHost: thief,
	} {
		certificate, root := issue(t, host)
		if host == gatewayHost {
			c.gatewayCA = string(root)
		} else {
			roots = append(roots, root...)
		}
		srv := httptest.NewUnstartedServer(handler)
		srv.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
		srv.StartTLS()
		t.Cleanup(srv.Close)
		addrs[host+":443"] = srv.Listener.Addr().String()
	}
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		addr := addrs[r.Host]
		if r.Method != http.MethodConnect || addr == "" {
			t.Errorf("the proxy was asked %s %s", r.Method, r.Host)
			w.WriteHeader(http.StatusForbidden)
			return
		}
		tunnel(w, addr)
	}))
	t.Cleanup(proxy.Close)
	c.proxyURL, c.bundle = proxy.URL, filepath.Join(t.TempDir(), "roots.pem")
	writeFile(t, c.bundle, string(roots))
	c.env = []string{"HTTPS_PROXY=" + c.proxyURL, "SSL_CERT_FILE=" + c.bundle, "SSL_CERT_DIR=/nonexistent"}
	return c
}

// curl writes a curl to a folder that reaches Cable as the plugin does, and returns its path. An operator's own has the
// proxy in the environment.
func (c *standInCable) curl(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "curl")
	writeScript(t, file, "PATH=${PATH#*:} HTTPS_PROXY="+c.proxyURL+" CURL_CA_BUNDLE="+c.bundle+` exec curl "$@"`)
	return file
}

// stolen reports whether a key came to the thief's host.
func (c *standInCable) stolen(key string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Contains(c.stole, key)
}

// tunnel connects a CONNECT request to addr.
func tunnel(w http.ResponseWriter, addr string) {
	to, err := net.Dial("tcp", addr)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	defer to.Close()
	from, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer from.Close()
	_, _ = io.WriteString(from, "HTTP/1.1 200 Connection established\r\n\r\n")
	done := make(chan struct{}, 2)
	for _, pair := range [][2]net.Conn{{from, to}, {to, from}} {
		go func() {
			_, _ = io.Copy(pair[0], pair[1])
			done <- struct{}{}
		}()
	}
	<-done
}

// issue returns a certificate for host, a name or an address, which is a root to trust, too (PEM).
func issue(t *testing.T, host string) (certificate tls.Certificate, root []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	noError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: host},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	if ip := net.ParseIP(host); ip != nil {
		template.IPAddresses = []net.IP{ip}
	} else {
		template.DNSNames = []string{host}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	noError(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key},
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
