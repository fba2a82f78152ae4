// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// TestExampleClients builds the application of examples/clients/go as its page
// says, and runs it against the real Vault. It runs under make test.
func TestExampleClients(t *testing.T) {
	t.Parallel()
	s, m := newApplication(t)
	if err := os.CopyFS(s.dir, os.DirFS("../examples/clients")); err != nil {
		t.Fatal(err)
	}
	cache := strings.TrimSpace(must(t, "go", "env", "GOCACHE"))
	modules := strings.TrimSpace(must(t, "go", "env", "GOMODCACHE"))
	s.env = append(s.env, "GOCACHE="+cache, "GOMODCACHE="+modules, "GOFLAGS=-mod=readonly", "GOPROXY="+strings.TrimSpace(must(t, "go", "env", "GOPROXY")))
	s.runPage("examples/clients/README.md", map[string]step{"Top/1": {}, "Go/1": {}})

	// The policy gives its path and nothing else.
	token := m.ok(t, "POST", "auth/token/create", map[string]any{"policies": []string{"reports"}, "no_default_policy": true}).Auth.ClientToken
	for path, status := range map[string]int{"cable/creds/reports": 200, "cable/creds/app": 403, "cable/roles/reports": 403, "cable/config": 403} {
		if a, err := m.call(request{method: "GET", path: path, token: token}); err != nil || a.status != status {
			t.Errorf("GET %s under the policy: %v %v, want %d", path, a, err, status)
		}
	}
	m.ok(t, "PUT", "sys/policies/acl/reports", map[string]any{"policy": strings.Replace(readFile(t, s.place("policy.hcl")), `"read"`, `"list"`, 1)})
	if out, err := s.try("VAULT_TOKEN=" + token + " ./application"); err == nil || !strings.Contains(out, "403") {
		t.Errorf("without read, the application ends with %v:\n%s", err, out)
	}
	m.ok(t, "PUT", "sys/policies/acl/reports", map[string]any{"policy": readFile(t, s.place("policy.hcl"))})

	// A 429 at first, with a longer wait than the engine's own for a request; then
	// a token of 30 seconds, so that the lease is short.
	m.ok(t, "POST", "cable/config", map[string]any{"request_timeout": "5s"})
	before := m.sim.CallCount()
	lifetime := 30 * time.Second
	m.sim.SetFault(cabletest.Fault{Status: 429, Header: map[string]string{"Retry-After": "8"}, Times: 1})
	m.sim.AddFault(cabletest.Fault{Grant: &cabletest.Grant{Lifetime: &lifetime}, Times: 1})
	m.sim.AddFault(cabletest.Fault{Status: 500})
	s.write("run", "#!/bin/sh\nexec env VAULT_TOKEN="+token+" ./application > out 2>&1\n")
	stop := s.start(t, "sh", "run")
	defer stop()
	calls := func() int { return m.sim.CallCount() - before }
	waitFor(t, 30*time.Second, "the application mints after the pause", func() bool { return calls() == 2 })
	all := m.sim.Calls()
	if pause := all[before+1].Time.Sub(all[before].Time); pause < 8*time.Second || pause > 10*time.Second {
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
