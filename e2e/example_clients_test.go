// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// newClients follows the top of the clients' page, and returns a Vault token with
// the page's policy.
func newClients(t *testing.T) (s *shell, m *mount, token string) {
	t.Helper()
	s, m = newExample(t, "clients")
	s.run(blocksOf(t, "examples/clients/README.md")[0].text)
	return s, m, m.ok(t, "POST", "auth/token/create", map[string]any{"policies": []string{"reports"}, "no_default_policy": true}).Auth.ClientToken
}

// TestExampleClients builds the application of examples/clients/go as its page
// says, and runs it against the real Vault. It runs under make test.
func TestExampleClients(t *testing.T) {
	t.Parallel()
	s, m, token := newClients(t)
	for _, name := range []string{"GOCACHE", "GOMODCACHE", "GOPROXY"} {
		s.env = append(s.env, name+"="+strings.TrimSpace(must(t, "go", "env", name)))
	}
	s.env = append(s.env, "GOFLAGS=-mod=readonly")
	s.runPage("examples/clients/README.md", map[string]step{"Top/1": {}, "Go/1": {}})
	m.oneRead(t, "clients")
	s.readsInTime(m, token, "./application", 8*time.Second)
}

// TestExampleClientsInstalled runs the clients that need something installed, and
// the playbook. It runs under make examples.
func TestExampleClientsInstalled(t *testing.T) {
	t.Parallel()
	needExamples(t)
	blocks := map[string]string{}
	for _, b := range blocksOf(t, "examples/clients/README.md") {
		blocks[strings.TrimPrefix(b.id, "examples/clients/README.md#")] = b.text
	}
	t.Run("Python", func(t *testing.T) {
		t.Parallel()
		s, m, token := newClients(t)
		s.readsInTime(m, token, blocks["Python/1"], 8*time.Second)
	})
	t.Run("Node", func(t *testing.T) {
		t.Parallel()
		s, m, token := newClients(t)
		s.run(blocks["Node/1"])
		s.readsInTime(m, token, blocks["Node/2"], 30*time.Second)
	})
	t.Run("Ansible", func(t *testing.T) {
		t.Parallel()
		s, m, token := newClients(t)
		s.env = append(s.env, "VAULT_TOKEN="+token)
		calls := m.sim.CallCount()
		out := s.run(blocks["Ansible/1"])
		if log := readFile(t, s.place("ansible/report.log")); !regexp.MustCompile(`^(a token of [1-9]\d+ characters\n){2}$`).MatchString(log) {
			t.Errorf("the hosts' log: %q", log)
		}
		if n := m.sim.CallCount() - calls; n != 1 || findSecret(out, false) != "" {
			t.Errorf("two hosts cost %d API calls, and the playbook prints %q", n, findSecret(out, false))
		}
		m.sim.SetFault(cabletest.Fault{Status: 500})
		if _, err := s.try(blocks["Ansible/1"]); err == nil || m.sim.CallCount() != calls+2 {
			t.Errorf("while Cable is down: %v, %d API calls", err, m.sim.CallCount()-calls-1)
		}
	})
}

// readsInTime runs an application that uses a token once a second. After a 429
// with Retry-After: 8 it waits at least so long; it uses a token of 30 seconds
// during an outage, and reads again after it; and it ends if its policy is gone.
func (s *shell) readsInTime(m *mount, token, command string, wait time.Duration) {
	t := s.t
	t.Helper()
	m.ok(t, "PUT", "sys/policies/acl/reports", map[string]any{"policy": strings.Replace(readFile(t, s.place("policy.hcl")), `"read"`, `"list"`, 1)})
	if out, err := s.try("export VAULT_TOKEN=" + token + "; " + command); err == nil || !strings.Contains(out, "403") && !strings.Contains(out, "permission denied") {
		t.Errorf("without read, the application ends with %v:\n%s", err, out)
	}
	m.ok(t, "PUT", "sys/policies/acl/reports", map[string]any{"policy": readFile(t, s.place("policy.hcl"))})
	m.ok(t, "DELETE", "sys/mounts/cable", nil) // then there is nothing at the path: 404
	if out, err := s.try("export VAULT_TOKEN=" + m.root + "; " + command); err == nil {
		t.Errorf("without the engine, the application ends with %v:\n%s", err, out)
	}
	m.ok(t, "POST", "sys/mounts/cable", map[string]any{"type": pluginName})
	m.configure(t)
	m.ok(t, "POST", "cable/roles/reports", map[string]any{"scopes": "transactions:read,person:read", "ttl": "1h"})
	s.run("vault secrets tune -allowed-response-headers=Retry-After cable")

	// With a longer wait than the engine's own for a request.
	m.ok(t, "POST", "cable/config", map[string]any{"request_timeout": "5s"})
	before := m.sim.CallCount()
	lifetime := 30 * time.Second
	m.sim.SetFault(cabletest.Fault{Status: 429, Header: map[string]string{"Retry-After": "8"}, Times: 1})
	m.sim.AddFault(cabletest.Fault{Grant: &cabletest.Grant{Lifetime: &lifetime}, Times: 1})
	m.sim.AddFault(cabletest.Fault{Status: 500})
	s.write("run", "export VAULT_TOKEN="+token+"\nexec > out 2>&1\nexec "+command)
	stop := s.start(t, "sh", "run")
	defer stop()
	calls := func() int { return m.sim.CallCount() - before }
	waitFor(t, wait+20*time.Second, "the application mints after the pause", func() bool { return calls() == 2 })
	all := m.sim.Calls()
	if pause := all[before+1].Time.Sub(all[before].Time); pause < wait || pause > wait*5/4 {
		t.Errorf("the second API call came %s after the 429", pause)
	}
	if requests, _ := m.ok(t, "GET", "cable/status", nil).Data["token_requests"].(map[string]any); fmt.Sprint(requests["rate_limited"]) != "1" ||
		requests["paused"] != nil && fmt.Sprint(requests["paused"]) != "0" {
		t.Errorf("the application did not wait for the pause to end: %v", requests)
	}
	// The outage: the next read fails once, and the current token is used.
	waitFor(t, 40*time.Second, "the application reads the next token", func() bool { return calls() == 3 })
	failed := time.Now()
	lines := strings.Count(readFile(t, s.place("out")), "have a token")
	waitFor(t, 5*time.Second, "the application works during the outage", func() bool {
		return strings.Count(readFile(t, s.place("out")), "have a token") > lines+1
	})
	m.sim.ClearFaults()
	waitFor(t, 20*time.Second, "the application recovers", func() bool { return calls() == 4 })
	if wait := time.Since(failed); wait < 4*time.Second {
		t.Errorf("the read after the failure came %s later", wait)
	}
	if out := readFile(t, s.place("out")); strings.Contains(out, cabletest.TokenMarker) {
		t.Error("the application printed the token")
	}
}

// must is run for a program that must succeed.
func must(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := run(name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}
