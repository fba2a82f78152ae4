// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// TestVaultWithoutLease compares a role that has lease=false with one that has leases: Vault lists no lease, the end of
// the reader's Vault token ends nothing, and a read on the command line or through a wrapping token shows ttl and
// rotation_period.
func TestVaultWithoutLease(t *testing.T) {
	t.Parallel()
	m := newMount(t, sharedServer(t), nil)
	m.configure(t)
	creds := m.path + "/creds/"
	m.ok(t, "POST", m.path+"/roles/leased", map[string]any{"scopes": "person:read"})
	m.ok(t, "POST", m.path+"/roles/app", map[string]any{"ttl": "10m", "reuse_for": "5m", "lease": false})
	m.writePolicy(t, m.path, fmt.Sprintf("path %q { capabilities = [\"read\"] }", creds+"*"))
	token := m.tokenWith(t, m.path, nil)
	leased, unleased := m.as(t, token, "GET", creds+"leased", nil), m.as(t, token, "GET", creds+"app", nil)
	isUnleased := func(a *response) bool {
		ttl := a.number("ttl")
		return a.status == 200 && a.LeaseID == "" && a.LeaseDuration == 0 && ttl >= 280 && ttl <= 450 &&
			a.number("rotation_period") == ttl
	}
	if !isUnleased(unleased) || isUnleased(leased) || leased.LeaseID == "" {
		t.Errorf("with lease=false: %s\nwith leases: %s", unleased, leased)
	}
	if none, one := m.leaseCount(creds+"app"), m.leaseCount(creds+"leased"); none != 0 || one != 1 {
		t.Errorf("Vault lists %d leases with lease=false, and %d of the role with leases", none, one)
	}

	m.ok(t, "POST", "auth/token/revoke", map[string]any{"token": token})
	ended := func() int { return m.figure(t, "vault_cable_leases_ended_total") }
	waitFor(t, 30*time.Second, "Vault ends the token's leases", func() bool { return ended() > 0 })
	if again := m.read(t); ended() != 1 || again.token() != unleased.token() {
		t.Errorf("%d leases ended with the reader's token, want that of the role with leases", ended())
	}

	wrapped, err := m.call(request{
		method: "GET",
		path:   creds + "app",
		token:  m.root,
		header: map[string]string{"X-Vault-Wrap-TTL": "60s"},
	})
	if err != nil || wrapped.WrapInfo == nil {
		t.Fatalf("a wrapped read: %s, %v", wrapped, err)
	}
	a := m.as(t, wrapped.WrapInfo.Token, "POST", "sys/wrapping/unwrap", nil)
	if !isUnleased(a) || a.token() != unleased.token() {
		t.Errorf("unwrapped: %s", a)
	}
	out := m.cli(t, "read", creds+"app")
	shown := regexp.MustCompile(`(?ms)^rotation_period +([4-7]m\S*)$.*^ttl +(\S+)$`).FindStringSubmatch(out)
	if shown == nil || shown[1] != shown[2] || strings.Contains(out, "lease") {
		t.Errorf("vault read shows %q, or a lease", shown)
	}
}

// testUnleasedOnStandbys shows that standbys forward reads of a role with lease=false: only the active node has its
// shared token, and each node returns it.
func testUnleasedOnStandbys(t *testing.T, c *cluster) {
	m := &mount{vaultServer: c.node(c.leader(t)), sim: c.sim, path: c.path}
	m.configure(t)
	role := map[string]any{"scopes": "person:read", "ttl": "10m", "reuse_for": "5m", "lease": false}
	m.ok(t, "POST", c.path+"/roles/unleased", role)
	calls := c.sim.CallCount()
	for i := range c.nodes {
		a := c.node(i).ok(t, "GET", c.path+"/creds/unleased", nil)
		if a.LeaseID != "" || a.number("ttl") == 0 || c.sim.CallCount() != calls+1 {
			t.Errorf("node %d, after %d API calls: %s", i, c.sim.CallCount()-calls, a)
		}
	}
}

// readOf is a read of creds/NAME in Vault's audit log, which shows numbers as they are.
type readOf struct {
	at  time.Time // of the response
	ttl time.Duration
}

// reads returns the reads of each role of cable/ that Vault's audit log has.
func (v *vaultServer) reads(t *testing.T) map[string][]readOf {
	t.Helper()
	found := map[string][]readOf{}
	for line := range strings.Lines(readFile(t, v.audit)) {
		var entry struct {
			Type     string
			Time     time.Time
			Request  struct{ Path string }
			Response struct {
				Data struct{ TTL int64 }
			}
		}
		role, isRead := "", false
		if json.Unmarshal([]byte(line), &entry) == nil && entry.Type == "response" {
			role, isRead = strings.CutPrefix(entry.Request.Path, "cable/creds/")
		}
		if isRead {
			ttl := time.Duration(entry.Response.Data.TTL) * time.Second
			found[role] = append(found[role], readOf{entry.Time, ttl})
		}
	}
	return found
}

// TestReturnWithoutLease runs 50 templates of one Agent, and of one consul-template, each for a role of its own with
// lease=false. Each is read again when its ttl and a second have passed, and not all of them in the same second.
func TestReturnWithoutLease(t *testing.T) {
	t.Parallel()
	const readers = 50
	s, m := newApplication(t)
	lifetime := 24 * time.Second // so leases would last about 22 s, and ttl is 11 to 16
	m.sim.SetFault(cabletest.Fault{Grant: &cabletest.Grant{Lifetime: &lifetime}})
	m.writePolicy(t, "readers", `path "cable/creds/*" { capabilities = ["read"] }`)
	s.write("token", m.tokenWith(t, "readers", map[string]any{"no_default_policy": false}))
	for name, program := range map[string][]string{
		"agent":           {"vault", "agent", "-config=agent.hcl"},
		"consul-template": {"consul-template", "-config=consul-template.hcl"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config := fmt.Sprintf("vault {\n  address = %q\n}\n", m.addr)
			if name == "agent" {
				config += `auto_auth {
  method "token_file" {
    config = { token_file_path = "token" }
  }
}
`
			} else {
				tool := filepath.Join(needTool(t, "consumers/consul-template"), name)
				noError(t, os.Symlink(tool, s.place(".bin/"+name)))
			}
			role := map[string]any{"scopes": "person:read", "ttl": "5m", "lease": false}
			for i := range readers {
				reader := fmt.Sprintf("%s-%d", name, i)
				m.ok(t, "POST", "cable/roles/"+reader, role)
				config += fmt.Sprintf("template {\n  destination = %q\n  contents    = %q\n}\n", reader,
					`{{ with secret "cable/creds/`+reader+`" }}{{ .Data.token }}{{ end }}`)
			}
			s.write(name+".hcl", config)
			stop := s.start(t, program[0], program[1:]...)
			defer stop()
			var reads map[string][]readOf
			waitFor(t, time.Minute, "each reader returns", func() bool {
				returned := 0
				reads = m.reads(t)
				for role, all := range reads {
					if strings.HasPrefix(role, name) && len(all) > 1 {
						returned++
					}
				}
				return returned == readers
			})
			perSecond := map[int64]int{}
			for role, all := range reads {
				if !strings.HasPrefix(role, name) {
					continue
				}
				first, second := all[0], all[1]
				// The machine may be slow, so the bound above is a wide one.
				gap, want := second.at.Sub(first.at), first.ttl+time.Second
				if first.ttl < 8*time.Second || first.ttl > 16*time.Second || gap < want || gap > want+15*time.Second {
					t.Errorf("%s was read again after %s, with a ttl of %s", role, gap, first.ttl)
				}
				perSecond[second.at.Unix()]++
			}
			for _, n := range perSecond {
				if n > readers/2 {
					t.Errorf("%d of %d readers returned in one second: %v", n, readers, perSecond)
				}
			}
		})
	}
}
