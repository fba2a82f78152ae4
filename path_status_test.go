// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/state"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/version"
)

// TestStatus checks status from an unconfigured mount to a disabled one, with a mint, the end of a lease and a pause.
func TestStatus(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	want := func(fields kv) kv {
		t.Helper()
		got := m.read("status")
		for k, v := range fields {
			if fmt.Sprint(got[k]) != fmt.Sprint(v) {
				t.Errorf("%s: %v, want %v", k, got[k], v)
			}
		}
		return got
	}
	first := want(kv{
		"configured": false, "disabled": false, "disabled_roles": "[]", "refresh_key_version": 0,
		"refresh_key_updated_at": "", "last_mint_at": "", "last_failure_at": "", "pause_seconds": 0, "paused_until": "",
		"token_requests": "map[]", "leases_ended": 0, "uncertain_entries": "[]", "version": version.String(),
	})
	if since, err := time.Parse(time.RFC3339, first["since"].(string)); err != nil || time.Since(since) > time.Minute {
		t.Errorf("since: %v", first["since"])
	}
	if first["node"] == "" {
		t.Error("the node is not named")
	}

	m.writeConfig()
	for _, name := range []string{"b", "a", "c"} {
		m.write("roles/"+name, kv{"scopes": "person:read", "disabled": name != "c"})
	}
	m.read("creds/c")
	m.revoke("c")
	got := want(kv{
		"configured": true, "refresh_key_version": 1, "disabled_roles": "[a b]", "last_mint_role": "c",
		"last_failure_at": "", "token_requests": "map[minted:2]", "leases_ended": 1,
	})
	if age, ok := got["refresh_key_age_seconds"].(int64); !ok || age < 0 || age > 60 {
		t.Errorf("the key's age: %v", got["refresh_key_age_seconds"])
	}

	m.sim.SetFault(Fault{Status: 429, Times: 1, Header: map[string]string{"Retry-After": "90"}})
	m.refused(429, opRead, "creds/c", nil)
	m.refused(429, opRead, "creds/c", nil)
	got = want(kv{
		"last_failure_outcome": "rate_limited", "last_failure_cable_status": 429,
		"token_requests": "map[minted:2 paused:1 rate_limited:1]",
	})
	if s, ok := got["pause_seconds"].(int64); !ok || s < 80 || s > 90 {
		t.Errorf("the pause: %v", got["pause_seconds"])
	}
	until, err := time.Parse(time.RFC3339, got["paused_until"].(string))
	if err != nil || time.Until(until) < 80*time.Second {
		t.Errorf("its end: %v", got["paused_until"])
	}
	m.write("config", kv{"disabled": true})
	want(kv{"disabled": true})
	m.ok(opDelete, "config", nil)
	want(kv{"configured": false, "disabled": false, "pause_seconds": 0})
}

// TestWithoutStorage checks that status and metrics respond within two seconds if storage fails, hangs or contains
// garbage, with the figures in memory and without the unknown ones.
func TestWithoutStorage(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		breaks   func(m *testMount) logical.Storage
		warnings []string
		omitted  string // fields of status
	}{
		"garbage": {
			func(m *testMount) logical.Storage { m.put("roles/broken", []byte("{"), nil); return m.storage },
			[]string{"disabled_roles may be incomplete", `"broken"`},
			"",
		},
		"fails": {
			func(m *testMount) logical.Storage {
				m.storage.FailGet(true)
				m.storage.FailList(true)
				return m.storage
			},
			[]string{"the configuration could not be read", "disabled_roles may be incomplete"},
			"configured disabled disabled_roles refresh_key_version refresh_key_updated_at refresh_key_age_seconds " +
				"pause_seconds paused_until",
		},
		"hangs": {
			func(m *testMount) logical.Storage {
				gate := newGate(m.storage, "config", false)
				m.Cleanup(func() { close(gate.proceed) })
				return gate
			},
			[]string{"the configuration could not be read"},
			"configured",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newConfiguredMount(t)
			m.read("creds/ci")
			m.b.InvalidateKey(t.Context(), state.ConfigKey)
			storage := tt.breaks(m)
			start := time.Now()
			resp, err := m.send(t.Context(), storage, opRead, "status", nil)
			must(m, err)
			for _, w := range tt.warnings {
				m.wantWarning(resp.Warnings, w)
			}
			if resp.Data["last_mint_role"] != "ci" {
				t.Errorf("the last mint is missing: %v", resp.Data)
			}
			for _, key := range strings.Fields(tt.omitted) {
				if v, ok := resp.Data[key]; ok {
					t.Errorf("%s is %v, and cannot be known", key, v)
				}
			}
			if tt.omitted == "" && resp.Data["configured"] != true {
				t.Errorf("a broken role hides the configuration: %v", resp.Data)
			}
			resp, err = m.send(t.Context(), storage, opRead, "metrics", nil)
			must(m, err)
			text := resp.Data[logical.HTTPRawBody].(string)
			if strings.Contains(text, "\nvault_cable_configured") != (tt.omitted == "") ||
				!strings.Contains(text, `vault_cable_token_requests_total{outcome="minted",role="ci"} 1`) {
				t.Errorf("metrics: %s", text)
			}
			if took := time.Since(start); took > 3*statusTimeout {
				t.Errorf("both took %s", took)
			}
		})
	}
}

// TestVerifyIsNoMint checks that verify_role changes neither metrics nor status, and that only the log reports it.
func TestVerifyIsNoMint(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.read("creds/ci")
	before := m.figures()
	verified := kv{"refresh_key": cabletest.NewRefreshKey(), "token_url": m.sim.URL, "verify_role": "ci"}
	m.refused(400, opUpdate, "config", verified)
	verified["refresh_key"] = m.sim.RefreshKey()
	m.ok(opUpdate, "config", verified)
	after := m.figures()
	for series, value := range before {
		if strings.HasPrefix(series, "vault_cable") && !strings.Contains(series, "refresh_key_updated") &&
			after[series] != value {
			t.Errorf("%s: %v, and %v before", series, after[series], value)
		}
	}
	if status := m.read("status"); status["last_failure_at"] != "" ||
		fmt.Sprint(status["token_requests"]) != "map[minted:1]" {
		t.Errorf("status: %v", status)
	}
	if line := m.logLine("token request failed"); line["verify_role"] != true || line["outcome"] != "key_rejected" ||
		line["@level"] != "warn" {
		t.Errorf("the line of a trial that failed: %v", line)
	}
}

// TestStatusOfManyRoles checks that a read of status reads a bounded number of roles.
func TestStatusOfManyRoles(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	for i := range maxStatusRoles + 5 {
		m.putRole(fmt.Sprintf("role-%06d", i), &state.Role{Scopes: []string{"person:read"}, Disabled: true})
	}
	resp := m.ok(opRead, "status", nil)
	m.wantWarning(resp.Warnings, fmt.Sprintf("only the first %d of %d roles", maxStatusRoles, maxStatusRoles+5))
	if names := resp.Data["disabled_roles"].([]string); len(names) != maxStatusRoles || !slices.IsSorted(names) {
		t.Errorf("%d names", len(names))
	}
}
