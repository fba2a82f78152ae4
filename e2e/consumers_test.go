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

// newApplication returns a server with the engine at cable/ and the role
// reports, and a shell for somebody who runs applications there.
func newApplication(t *testing.T) (*shell, *mount) {
	t.Helper()
	v := ownServer(t)
	watch(t, v)
	m := &mount{vaultServer: v, path: "cable", sim: cabletest.NewServer(t, nil)}
	v.ok(t, "POST", "sys/mounts/cable", map[string]any{"type": pluginName})
	m.configure(t)
	v.ok(t, "POST", "cable/roles/reports", map[string]any{"scopes": "transactions:read,person:read", "ttl": "15m"})
	return newShell(t, v, nil), m
}

// TestConsumers: the policies in docs/consumers.md work as they stand, its role
// shares tokens, and it leads to each example.
func TestConsumers(t *testing.T) {
	t.Parallel()
	s, m := newApplication(t)
	m.ok(t, "POST", "cable/roles/ci", map[string]any{"scopes": "transactions:read"})
	blocks := blocksOf(t, "docs/consumers.md")
	if len(blocks) != 2 || blocks[0].language != "hcl" || blocks[1].language != "sh" {
		t.Fatalf("the page has %d blocks: %v", len(blocks), blocks)
	}

	m.ok(t, "PUT", "sys/policies/acl/page", map[string]any{"policy": blocks[0].text})
	token := m.ok(t, "POST", "auth/token/create", map[string]any{"policies": []string{"page"}}).Auth.ClientToken
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
		a, err := m.call(request{method: tt.method, path: tt.path, body: tt.body, token: token})
		if err != nil || a.status != tt.status && a.status/100+tt.status/100 != 4 { // 200 has warnings, 204 has none
			t.Errorf("%s %s %v under the page's policy: %v %v, want %d", tt.method, tt.path, tt.body, a, err, tt.status)
		}
	}

	// The readers of a role that share a token, and a reader with parameters.
	s.run(blocks[1].text)
	calls := m.sim.CallCount()
	first, second := m.ok(t, "GET", "cable/creds/reports", nil), m.ok(t, "GET", "cable/creds/reports", nil)
	if first.token() != second.token() || first.LeaseID == second.LeaseID || first.LeaseDuration < 3500 || m.sim.CallCount() != calls+1 {
		t.Errorf("two readers: %d API calls, leases of %ds and %ds", m.sim.CallCount()-calls, first.LeaseDuration, second.LeaseDuration)
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

// TestAgentWithADisabledRole: one disabled role has Agent mint again for its
// other roles, each time that it gives up; unless each role has an Agent.
func TestAgentWithADisabledRole(t *testing.T) {
	t.Parallel()
	s, m := newApplication(t)
	m.ok(t, "POST", "cable/roles/off", map[string]any{"scopes": "person:read", "disabled": true})
	s.write("token", m.root)
	s.write("agent.hcl", `
vault {
  retry {
    num_retries = 1 # instead of 12, which take five minutes
  }
}
auto_auth {
  method "token_file" {
    config = { token_file_path = "token" }
  }
}
template {
  destination = "on"
  contents    = "{{ with secret \"cable/creds/reports\" }}{{ .Data.token }}{{ end }}"
}
template {
  destination = "off"
  contents    = "{{ with secret \"cable/creds/off\" }}{{ .Data.token }}{{ end }}"
}
`)
	cmd := s.start(t, "vault", "agent", "-config=agent.hcl")
	waitFor(t, 50*time.Second, "Agent mints the good role's third token", func() bool { return m.sim.Stats().Minted >= 3 })
	if s.exists("off") {
		t.Error("Agent rendered a token of the disabled role")
	}
	cmd()
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
	return runUntilEnd(t, s.dir, env, name, args...)
}

// TestClientsThatRetry: how often each client sends a request to which the
// engine responds with 502, as docs/consumers.md says; and that Proxy caches
// no token.
func TestClientsThatRetry(t *testing.T) {
	t.Parallel()
	s, m := newApplication(t)
	calls := func(do func()) int {
		t.Helper()
		before := m.sim.CallCount()
		do()
		return m.sim.CallCount() - before
	}
	failing := func(do func()) func() {
		return func() {
			m.sim.SetFault(cabletest.Fault{Status: 500})
			defer m.sim.ClearFaults()
			do()
		}
	}
	if n := calls(failing(func() { _, _ = s.try("vault read cable/creds/reports") })); n != 1 {
		t.Errorf("vault read: %d API calls", n)
	}
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

	addr, stop := proxy("")
	read := "VAULT_ADDR=http://" + addr + " VAULT_CLIENT_TIMEOUT=5s vault read cable/creds/reports"
	if n := calls(func() { s.run(read); s.run(read) }); n != 2 {
		t.Errorf("two reads through Proxy: %d API calls", n)
	}
	m.sim.SetFault(cabletest.Fault{Status: 401})
	if n := calls(func() { _, _ = s.try(read) }); n != 1 {
		t.Errorf("a read through Proxy that gets 400: %d API calls", n)
	}
	m.sim.ClearFaults()
	// Proxy continues when its client has left.
	if n := calls(failing(func() { _, _ = s.try(read) })); n < 2 {
		t.Errorf("a read through Proxy that fails: %d API calls", n)
	}
	stop()
	for _, tt := range []struct{ settings, env string }{{"", "VAULT_MAX_RETRIES=0"}, {"retry {\n num_retries = -1\n }", "A=b"}} {
		addr, stop := proxy(tt.settings, tt.env)
		if n := calls(failing(func() { _, _ = s.try("VAULT_ADDR=http://" + addr + " vault read cable/creds/reports") })); n != 1 {
			t.Errorf("a read through Proxy with %s %s: %d API calls", tt.settings, tt.env, n)
		}
		stop()
	}
	if text := readFile(t, "../docs/consumers.md"); !strings.Contains(text, "VAULT_MAX_RETRIES=0") || !strings.Contains(text, "retry { num_retries = -1 }") {
		t.Error("the page has other remedies")
	}
}

// TestReadersTokens: what docs/consumers.md says of the Vault tokens of
// applications: batch tokens bound the lease, a last use discards the token.
func TestReadersTokens(t *testing.T) {
	t.Parallel()
	s, m := newApplication(t)
	m.ok(t, "PUT", "sys/policies/acl/reader", map[string]any{"policy": `path "cable/creds/*" { capabilities = ["read"] }`})
	read := func(token map[string]any) *answer {
		t.Helper()
		token["policies"] = []string{"reader"}
		a, err := m.call(request{method: "GET", path: "cable/creds/reports", token: m.ok(t, "POST", "auth/token/create", token).Auth.ClientToken})
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	a := read(map[string]any{"type": "batch", "ttl": "60s"})
	if left := time.Until(time.Unix(a.number("expiry"), 0)); a.status != 200 || a.LeaseDuration > 60 || left < 10*time.Minute {
		t.Errorf("for a batch token of 60s: a lease of %ds, a token of %s", a.LeaseDuration, left)
	}
	if a := read(map[string]any{"type": "batch", "ttl": "15m"}); a.LeaseDuration < 890 {
		t.Errorf("for a batch token of the role's ttl: a lease of %ds", a.LeaseDuration)
	}
	minted := m.sim.Stats().Minted
	if a := read(map[string]any{"num_uses": 1}); a.status != 400 || m.sim.Stats().Minted != minted+1 {
		t.Errorf("with the last use of a token: %s, and %d tokens minted", a, m.sim.Stats().Minted-minted)
	}
	if a := read(map[string]any{"num_uses": 2}); a.status != 200 {
		t.Errorf("with two uses: %s", a)
	}
	if out := s.run("vault unwrap $(vault read -wrap-ttl=60s -field=wrapping_token cable/creds/reports)"); !strings.Contains(out, "expires_at") {
		t.Errorf("the wrapped token:\n%s", out)
	}
}

// TestReferencePage runs the commands that docs/reference.md has in its text:
// what a read returns can be written back, and lists go page by page.
func TestReferencePage(t *testing.T) {
	t.Parallel()
	s, m := newApplication(t)
	jq, err := findJQ()
	if err != nil {
		skipUnlessRequired(t, err)
	}
	if err := os.Symlink(jq, s.place(".bin/jq")); err != nil {
		t.Fatal(err)
	}
	command := regexp.MustCompile("`(vault read -format=json cable/roles/reports [^`]+)`").FindStringSubmatch(readFile(t, "../docs/reference.md"))
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
	a := m.ok(t, "GET", "cable/roles?list=true&after=app&limit=1", nil)
	if got := fmt.Sprint(a.Data["keys"]); got != "[copy]" {
		t.Errorf("the roles after app, one of them: %s", got)
	}
}
