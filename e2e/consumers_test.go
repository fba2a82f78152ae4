// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// newApplication returns a server with the engine at cable/ and the role reports,
// and a shell for its applications.
func newApplication(t *testing.T) (*shell, *mount) {
	t.Helper()
	v := ownServer(t)
	m := newMountOf(t, v)
	v.ok(t, "POST", "cable/roles/reports", map[string]any{"scopes": "transactions:read,person:read", "ttl": "15m"})
	return newShell(t, v, nil), m
}

// TestConsumers shows that the policies in docs/consumers.md work as they stand,
// that its role shares tokens, and that it leads to each example.
func TestConsumers(t *testing.T) {
	t.Parallel()
	s, m := newApplication(t)
	m.ok(t, "POST", "cable/roles/ci", map[string]any{"scopes": "transactions:read"})
	blocks := blocksOf(t, "docs/consumers.md")
	if len(blocks) != 2 || blocks[0].language != "hcl" || blocks[1].language != "sh" {
		t.Fatalf("the page has %d blocks: %v", len(blocks), blocks)
	}

	m.writePolicy(t, "page", blocks[0].text)
	token := m.tokenWith(t, "page", nil)
	for _, tt := range []struct {
		method, path string
		body         any
		status       int
	}{
		{"GET", "cable/creds/reports", nil, 200},
		{"GET", "cable/creds/ci", nil, 403},
		{"PUT", "cable/creds/ci", map[string]any{"ttl": "5m"}, 200},
		{"PUT", "cable/creds/ci", map[string]any{"scopes": "transactions:read"}, 403},
		{"LIST", "cable/roles", nil, 200},
		{"PUT", "cable/roles/new", map[string]any{"scopes": "person:read"}, 204},
		{"PUT", "cable/roles/new", map[string]any{"scopes": "person:write"}, 403},
		{"GET", "cable/config", nil, 200},
		{"PUT", "cable/config", map[string]any{"request_timeout": "10s"}, 204},
		{"DELETE", "cable/config", nil, 403},
		{"GET", "cable/status", nil, 200},
		{"GET", "cable/metrics", nil, 200},
	} {
		a := m.as(t, token, tt.method, tt.path, tt.body)
		if a.status != tt.status && a.status/100+tt.status/100 != 4 { // 200 has warnings, 204 has none
			t.Errorf("%s %s %v under the page's policy: %v, want %d", tt.method, tt.path, tt.body, a, tt.status)
		}
	}

	// The readers of a role that share a token, and a reader with parameters.
	s.run(blocks[1].text)
	calls := m.sim.CallCount()
	first, second := m.ok(t, "GET", "cable/creds/reports", nil), m.ok(t, "GET", "cable/creds/reports", nil)
	if first.token() != second.token() || first.LeaseID == second.LeaseID || first.LeaseDuration < 3500 ||
		m.sim.CallCount() != calls+1 {
		t.Errorf("two readers: %d API calls, leases of %ds and %ds",
			m.sim.CallCount()-calls, first.LeaseDuration, second.LeaseDuration)
	}
	if a := m.ok(t, "GET", "cable/creds/reports?ttl=1h", nil); a.token() == first.token() {
		t.Error("a read with parameters shares the token")
	}
	m.ok(t, "POST", "cable/roles/reports", map[string]any{"reuse_for": 0, "ttl": "15m"})

	// The page leads to each example.
	page := readFile(t, "../docs/consumers.md") + readFile(t, "../examples/kubernetes/README.md")
	for _, example := range pages(t) {
		if strings.HasPrefix(example, "examples/") && example != "examples/kubernetes/README.md" &&
			!strings.Contains(page, strings.TrimPrefix(example, "examples/kubernetes/")) {
			t.Errorf("docs/consumers.md does not link to %s", example)
		}
	}
}

// start starts a program in the shell's folder, which ends with the test or
// when stop is called.
func (s *shell) start(t *testing.T, name string, args ...string) (stop func()) {
	t.Helper()
	env := s.env
	switch {
	case name == "vault": // Agent and Proxy, which log in by themselves
		name, env = suite.vault, slices.Concat(s.env, []string{"VAULT_TOKEN="})
	case s.exists(".bin/" + name):
		name = s.place(".bin/" + name)
	}
	stop, _ = runUntilEnd(t, s.dir, env, name, args...)
	return stop
}

// TestClientsThatRetry counts how often each client sends a request to which the
// engine responds with 502, as docs/consumers.md says, and shows that Proxy caches
// no token.
func TestClientsThatRetry(t *testing.T) {
	t.Parallel()
	s, m := newApplication(t)
	s.write("token", m.root)
	proxy := func(settings string, env ...string) (addr string, stop func()) {
		t.Helper()
		addr = fmt.Sprintf("127.0.0.1:%d", freePort(t))
		s.write("proxy.hcl", `
vault {
  address = "`+m.addr+`"
  `+settings+`
}
auto_auth {
  method "token_file" {
    config = { token_file_path = "token" }
  }
}
api_proxy {
  use_auto_auth_token = "force"
}
cache {}
listener "tcp" {
  address     = "`+addr+`"
  tls_disable = true
}
`)
		kept := s.env
		s.env = slices.Concat(s.env, env)
		stop = s.start(t, "vault", "proxy", "-config=proxy.hcl")
		s.env = kept
		waitFor(t, 30*time.Second, "Proxy forwards", func() bool {
			_, err := s.try("VAULT_ADDR=http://" + addr + " vault read cable/status")
			return err == nil
		})
		return addr, stop
	}
	// fails has a client read while Cable responds with a status.
	fails := func(calls, status int, client, command string) {
		t.Helper()
		m.sim.SetFault(cabletest.Fault{Status: status})
		defer m.sim.ClearFaults()
		m.costs(t, calls, client, func() { _, _ = s.try(command) })
	}
	fails(1, 500, "vault read", "vault read cable/creds/reports")
	addr, stop := proxy("")
	read := "VAULT_ADDR=http://" + addr + " VAULT_CLIENT_TIMEOUT=5s vault read cable/creds/reports"
	m.costs(t, 2, "two reads through Proxy", func() { s.run(read + "; " + read) })
	fails(1, 401, "a read through Proxy that gets 400", read)
	// Proxy repeats the request, and continues when its client has left.
	m.sim.SetFault(cabletest.Fault{Status: 500})
	before := m.sim.CallCount()
	_, _ = s.try(read)
	if n := m.sim.CallCount() - before; n < 2 {
		t.Errorf("a read through Proxy that fails: %d API calls", n)
	}
	stop()
	page := readFile(t, "../docs/consumers.md")
	for _, tt := range []struct{ settings, env, page string }{
		{"", "VAULT_MAX_RETRIES=0", "VAULT_MAX_RETRIES=0"},
		{"retry {\n num_retries = -1\n }", "A=b", "retry { num_retries = -1 }"},
	} {
		addr, stop := proxy(tt.settings, tt.env)
		fails(1, 500, "Proxy with "+tt.page, "VAULT_ADDR=http://"+addr+" vault read cable/creds/reports")
		stop()
		if !strings.Contains(page, tt.page) {
			t.Errorf("the page does not name %s", tt.page)
		}
	}
}

// TestReadersTokens shows how the Vault tokens of applications bound the lease, as
// docs/consumers.md says.
func TestReadersTokens(t *testing.T) {
	t.Parallel()
	s, m := newApplication(t)
	m.writePolicy(t, "reader", `path "cable/creds/*" { capabilities = ["read"] }`)
	for _, tt := range []struct {
		name   string
		token  map[string]any
		status int
		lease  int64 // at most, and nearly
		ttl    int64 // without a lease, at least
	}{
		{"a batch token of 60s", map[string]any{"type": "batch", "ttl": "60s"}, 200, 60, 0},
		{"a batch token of the role's ttl", map[string]any{"type": "batch", "ttl": "15m"}, 200, 900, 0},
		{"the last use of a token", map[string]any{"num_uses": 1}, 400, 0, 0},
		{"two uses", map[string]any{"num_uses": 2}, 200, 900, 0},
		{"a batch token of 60s and no lease", map[string]any{"type": "batch", "ttl": "60s"}, 200, 0, 400},
		{"the last use of a token and no lease", map[string]any{"num_uses": 1}, 200, 0, 400},
	} {
		m.ok(t, "POST", "cable/roles/reports", map[string]any{"lease": tt.ttl == 0})
		minted := m.sim.Stats().Minted
		a := m.as(t, m.tokenWith(t, "reader", tt.token), "GET", "cable/creds/reports", nil)
		if a.status != tt.status || a.LeaseDuration > tt.lease || a.LeaseDuration < tt.lease-10 ||
			a.number("ttl") < tt.ttl || m.sim.Stats().Minted != minted+1 {
			t.Errorf("with %s: a lease of %ds: %s", tt.name, a.LeaseDuration, a)
		}
		if left := time.Until(time.Unix(a.number("expiry"), 0)); a.status == 200 && left < 10*time.Minute {
			t.Errorf("with %s: a token of %s", tt.name, left)
		}
	}
	wrapped := s.run("vault unwrap $(vault read -wrap-ttl=60s -field=wrapping_token cable/creds/reports)")
	if !strings.Contains(wrapped, "expires_at") {
		t.Errorf("the wrapped token:\n%s", wrapped)
	}
}

// TestReferencePage runs the command in the text of docs/reference.md: the response to a
// read can be written back.
func TestReferencePage(t *testing.T) {
	t.Parallel()
	s, m := newApplication(t)
	noError(t, os.Symlink(needJQ(t), s.place(".bin/jq")))
	page := readFile(t, "../docs/reference.md")
	command := regexp.MustCompile("`(vault read -format=json cable/roles/reports [^`]+)`").FindStringSubmatch(page)
	if command == nil {
		t.Fatal("the page has no command that writes back what a read returned")
	}
	data := func(path string) string { return fmt.Sprint(m.ok(t, "GET", "cable/"+path, nil).Data) }
	for command, path := range map[string]string{
		command[1]: "roles/reports",
		strings.ReplaceAll(command[1], "roles/reports", "config"):                             "config",
		strings.Replace(command[1], "write cable/roles/reports", "write cable/roles/copy", 1): "roles/copy",
	} {
		from := strings.Replace(path, "copy", "reports", 1)
		before := data(from)
		s.run(command)
		if after := data(path); after != before {
			t.Errorf("%s: %s, want %s", command, after, before)
		}
	}
}
