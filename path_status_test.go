// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"fmt"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/version"
)

// TestStatus follows a mount from unconfigured over a mint and a pause to
// frozen.
func TestStatus(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	want := func(fields map[string]any) map[string]any {
		t.Helper()
		got := m.read("status")
		for k, v := range fields {
			if fmt.Sprint(got[k]) != fmt.Sprint(v) {
				t.Errorf("%s: %v, want %v", k, got[k], v)
			}
		}
		return got
	}
	first := want(map[string]any{
		"configured": false, "disabled": false, "disabled_roles": "[]", "refresh_key_version": 0, "refresh_key_updated_at": "",
		"last_mint_at": "", "last_failure_at": "", "hold_seconds": 0, "hold_until": "", "requests": "map[]", "revocations": 0, "version": version.String(),
	})
	if since, err := time.Parse(time.RFC3339, first["since"].(string)); err != nil || time.Since(since) > time.Minute {
		t.Errorf("since: %v", first["since"])
	}
	if first["node"] == "" {
		t.Error("the node is not named")
	}

	m.write("config", map[string]any{"refresh_key": m.sim.RefreshKey(), "token_url": m.sim.URL, "organization_id": cabletest.DefaultOrganizationID})
	for _, name := range []string{"b", "a", "c"} {
		m.write("roles/"+name, map[string]any{"scopes": "person:read", "disabled": name != "c"})
	}
	m.read("creds/c")
	m.revokeLease("creds/c")
	got := want(map[string]any{
		"configured": true, "refresh_key_version": 1, "disabled_roles": "[a b]", "last_mint_role": "c", "last_failure_at": "",
		"requests": "map[minted:2]", "revocations": 1,
	})
	if age, ok := got["refresh_key_age_seconds"].(int64); !ok || age < 0 || age > 60 {
		t.Errorf("the key's age: %v", got["refresh_key_age_seconds"])
	}

	m.sim.SetFault(cabletest.Fault{Status: 429, Times: 1, Header: map[string]string{"Retry-After": "90"}})
	m.refused(http.StatusTooManyRequests, logical.ReadOperation, "creds/c", nil)
	m.refused(http.StatusTooManyRequests, logical.ReadOperation, "creds/c", nil)
	got = want(map[string]any{"last_failure_outcome": "rate_limited", "last_failure_cable_status": 429, "requests": "map[held:1 minted:2 rate_limited:1]"})
	if s, ok := got["hold_seconds"].(int64); !ok || s < 80 || s > 90 {
		t.Errorf("the pause: %v", got["hold_seconds"])
	}
	if until, err := time.Parse(time.RFC3339, got["hold_until"].(string)); err != nil || time.Until(until) < 80*time.Second {
		t.Errorf("its end: %v", got["hold_until"])
	}
	m.write("config", map[string]any{"disabled": true})
	want(map[string]any{"disabled": true})
	m.ok(logical.DeleteOperation, "config", nil)
	want(map[string]any{"configured": false, "disabled": false, "hold_seconds": 0})
}

// revokeLease mints once more and ends the lease.
func (m *testMount) revokeLease(path string) {
	m.Helper()
	secret := m.ok(logical.ReadOperation, path, nil).Secret
	if _, err := m.b.HandleRequest(m.Context(), &logical.Request{
		Operation: logical.RevokeOperation, Path: path, Secret: &logical.Secret{InternalData: secret.InternalData},
	}); err != nil {
		m.Fatal(err)
	}
}

// TestStatusWithoutStorage: status answers where storage fails or holds
// garbage, and says what it does not know.
func TestStatusWithoutStorage(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.read("creds/ci")
	put := func(key, value string) {
		t.Helper()
		if err := m.storage.Put(t.Context(), &logical.StorageEntry{Key: key, Value: []byte(value)}); err != nil {
			t.Fatal(err)
		}
	}
	put("roles/broken", "{")
	resp := m.ok(logical.ReadOperation, "status", nil)
	m.wantWarning(resp.Warnings, "disabled_roles may lack some", `"broken"`)
	if resp.Data["configured"] != true {
		t.Errorf("a broken role hides the configuration: %v", resp.Data)
	}
	m.b.InvalidateKey(t.Context(), configStoragePath)
	m.storage.Underlying().FailGet(true)
	m.storage.Underlying().FailList(true)
	resp = m.ok(logical.ReadOperation, "status", nil)
	m.wantWarning(resp.Warnings, "the configuration cannot be read")
	m.wantWarning(resp.Warnings, "disabled_roles may lack some")
	if resp.Data["last_mint_role"] != "ci" {
		t.Errorf("what is in memory is not told: %v", resp.Data)
	}
}

// TestStatusOfManyRoles: a read of status looks at a bounded number of roles.
func TestStatusOfManyRoles(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	for i := range maxStatusRoles + 5 {
		if err := setRole(t.Context(), m.storage, fmt.Sprintf("role-%06d", i), &roleEntry{Scopes: []string{"person:read"}, Disabled: true}); err != nil {
			t.Fatal(err)
		}
	}
	resp := m.ok(logical.ReadOperation, "status", nil)
	m.wantWarning(resp.Warnings, fmt.Sprintf("only the first %d of %d roles were looked at", maxStatusRoles, maxStatusRoles+5))
	if names := resp.Data["disabled_roles"].([]string); len(names) != maxStatusRoles || !slices.IsSorted(names) {
		t.Errorf("%d names", len(names))
	}
}
