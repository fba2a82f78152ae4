// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
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

// TestStatus follows a mount from unconfigured over a mint and a pause to
// frozen.
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
		"configured": false, "disabled": false, "disabled_roles": "[]", "refresh_key_version": 0, "refresh_key_updated_at": "",
		"last_mint_at": "", "last_failure_at": "", "pause_seconds": 0, "paused_until": "", "token_requests": "map[]", "leases_ended": 0, "version": version.String(),
	})
	if since, err := time.Parse(time.RFC3339, first["since"].(string)); err != nil || time.Since(since) > time.Minute {
		t.Errorf("since: %v", first["since"])
	}
	if first["node"] == "" {
		t.Error("the node is not named")
	}

	m.write(
		"config",
		kv{
			"refresh_key":     m.sim.RefreshKey(),
			"token_url":       m.sim.URL,
			"organization_id": cabletest.DefaultOrganizationID,
		},
	)
	for _, name := range []string{"b", "a", "c"} {
		m.write("roles/"+name, kv{"scopes": "person:read", "disabled": name != "c"})
	}
	m.read("creds/c")
	m.revoke("c")
	got := want(kv{
		"configured": true, "refresh_key_version": 1, "disabled_roles": "[a b]", "last_mint_role": "c", "last_failure_at": "",
		"token_requests": "map[minted:2]", "leases_ended": 1,
	})
	if age, ok := got["refresh_key_age_seconds"].(int64); !ok || age < 0 || age > 60 {
		t.Errorf("the key's age: %v", got["refresh_key_age_seconds"])
	}

	m.sim.SetFault(Fault{Status: 429, Times: 1, Header: map[string]string{"Retry-After": "90"}})
	m.refused(429, opRead, "creds/c", nil)
	m.refused(429, opRead, "creds/c", nil)
	got = want(
		kv{
			"last_failure_outcome":      "rate_limited",
			"last_failure_cable_status": 429,
			"token_requests":            "map[minted:2 paused:1 rate_limited:1]",
		},
	)
	if s, ok := got["pause_seconds"].(int64); !ok || s < 80 || s > 90 {
		t.Errorf("the pause: %v", got["pause_seconds"])
	}
	if until, err := time.Parse(time.RFC3339, got["paused_until"].(string)); err != nil ||
		time.Until(until) < 80*time.Second {
		t.Errorf("its end: %v", got["paused_until"])
	}
	m.write("config", kv{"disabled": true})
	want(kv{"disabled": true})
	m.ok(opDelete, "config", nil)
	want(kv{"configured": false, "disabled": false, "pause_seconds": 0})
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
	resp := m.ok(opRead, "status", nil)
	m.wantWarning(resp.Warnings, "disabled_roles may be incomplete", `"broken"`)
	if resp.Data["configured"] != true {
		t.Errorf("a broken role hides the configuration: %v", resp.Data)
	}
	m.b.InvalidateKey(t.Context(), state.ConfigKey)
	m.storage.Underlying().FailGet(true)
	m.storage.Underlying().FailList(true)
	resp = m.ok(opRead, "status", nil)
	m.wantWarning(resp.Warnings, "the configuration could not be read")
	m.wantWarning(resp.Warnings, "disabled_roles may be incomplete")
	if resp.Data["last_mint_role"] != "ci" {
		t.Errorf("what is in memory is not told: %v", resp.Data)
	}
	for _, key := range []string{"configured", "disabled", "disabled_roles", "refresh_key_version", "refresh_key_updated_at", "refresh_key_age_seconds", "pause_seconds", "paused_until"} {
		if v, ok := resp.Data[key]; ok {
			t.Errorf("%s is said to be %v, and cannot be known", key, v)
		}
	}
}

// TestStatusWithSlowStorage: storage that hangs does not hang status.
func TestStatusWithSlowStorage(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	start := time.Now()
	resp, err := m.b.HandleRequest(
		t.Context(),
		&logical.Request{Operation: opRead, Path: "status", Storage: hangingStorage{m.storage}},
	)
	if err != nil || resp.IsError() || len(resp.Warnings) == 0 {
		t.Errorf("%v %v", resp, err)
	}
	if took := time.Since(start); took > 3*statusTimeout {
		t.Errorf("it took %s", took)
	}
}

// hangingStorage answers a read when the reader has given up.
type hangingStorage struct{ logical.Storage }

// Get implements [logical.Storage].
func (hangingStorage) Get(ctx context.Context, _ string) (*logical.StorageEntry, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// TestVerifyIsNoMint: a trial of new settings says nothing of those in use, and
// is told in the log alone.
func TestVerifyIsNoMint(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.read("creds/ci")
	before := m.figures()
	m.refused(
		400,
		opUpdate,
		"config",
		kv{"refresh_key": cabletest.NewRefreshKey(), "token_url": m.sim.URL, "verify_role": "ci"},
	)
	m.ok(opUpdate, "config", kv{"refresh_key": m.sim.RefreshKey(), "token_url": m.sim.URL, "verify_role": "ci"})
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
	if line := m.logLine(m.log.String(), "token request failed"); line["verify_role"] != true ||
		line["outcome"] != "key_rejected" ||
		line["@level"] != "warn" {
		t.Errorf("the line of a trial that failed: %v", line)
	}
}

// TestStatusOfManyRoles: a read of status looks at a bounded number of roles.
func TestStatusOfManyRoles(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	for i := range maxStatusRoles + 5 {
		m.putRole(fmt.Sprintf("role-%06d", i), &state.Role{Scopes: []string{"person:read"}, Disabled: true})
	}
	resp := m.ok(opRead, "status", nil)
	m.wantWarning(
		resp.Warnings,
		fmt.Sprintf("only the first %d of %d roles were checked", maxStatusRoles, maxStatusRoles+5),
	)
	if names := resp.Data["disabled_roles"].([]string); len(names) != maxStatusRoles || !slices.IsSorted(names) {
		t.Errorf("%d names", len(names))
	}
}
