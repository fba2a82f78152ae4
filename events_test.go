// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"maps"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/vault/sdk/logical"
)

// sentEvents returns the metadata of the events that Vault got, each with its
// type as "type".
func (m *testMount) sentEvents() (events []map[string]string) {
	m.events.Lock()
	defer m.events.Unlock()
	for _, e := range m.events.Events {
		metadata := map[string]string{"type": string(e.Type)}
		for k, v := range e.Event.GetMetadata().GetFields() {
			metadata[k] = v.GetStringValue()
		}
		events = append(events, metadata)
	}
	return events
}

// waitForEvent waits for an event of a type that is as wanted.
func (m *testMount) waitForEvent(kind string, wanted func(map[string]string) bool) (found map[string]string) {
	m.Helper()
	m.waitUntil(func() bool {
		for _, e := range m.sentEvents() {
			if e["type"] == kind && wanted(e) {
				found = e
			}
		}
		return found != nil
	})
	return found
}

// TestEvents pins the events of changes and of leases; TestOutcomes has those
// of mints, and e2e what arrives at a subscriber.
func TestEvents(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.ok(logical.PatchOperation, "config", map[string]any{"request_timeout": 5})
	m.ok(logical.PatchOperation, "roles/ci", map[string]any{"ttl": 600})
	m.revoke("ci")
	m.ok(logical.DeleteOperation, "roles/ci", nil)
	m.ok(logical.DeleteOperation, "config", nil)
	m.ok(logical.DeleteOperation, "config", nil) // there is none: no event
	changes := func(operation, path string, more map[string]string) map[string]string {
		all := map[string]string{"operation": operation, "path": path, "data_path": path, "modified": "true"}
		maps.Copy(all, more)
		return all
	}
	want := []map[string]string{
		changes("update", "config", map[string]string{"type": "cable/config-write", "refresh_key_version": "1"}),
		changes("create", "roles/ci", map[string]string{"type": "cable/role-write", "role": "ci", "organization_id": ""}),
		changes("patch", "config", map[string]string{"type": "cable/config-write", "refresh_key_version": "1"}),
		changes("patch", "roles/ci", map[string]string{"type": "cable/role-write", "role": "ci", "organization_id": ""}),
		{
			"type": "cable/creds-create", "operation": "read", "path": "creds/ci", "data_path": "roles/ci", "modified": "false",
			"role": "ci", "organization_id": m.sim.Calls()[0].OrganizationID, "request_id": "req-1", "scopes": "person:read,transactions:read",
		},
		{
			"type": "cable/lease-revoke", "operation": "revoke", "path": "creds/ci", "data_path": "roles/ci", "modified": "false",
			"role": "ci", "organization_id": m.sim.Calls()[0].OrganizationID,
		},
		changes("delete", "roles/ci", map[string]string{"type": "cable/role-delete", "role": "ci"}),
		changes("delete", "config", map[string]string{"type": "cable/config-delete"}),
	}
	m.waitUntil(func() bool { return len(m.sentEvents()) >= len(want) })
	got := m.sentEvents()
	for _, e := range got {
		if at, ok := e["expires_at"]; ok {
			expiry, err := time.Parse(time.RFC3339, at)
			if err != nil || time.Until(expiry) < 500*time.Second || time.Until(expiry) > 600*time.Second || e["expiry"] == "" {
				t.Errorf("expiry of %v", e)
			}
		}
		delete(e, "expires_at")
		delete(e, "expiry")
		delete(e, "remaining_seconds")
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
}

// TestEventsOnEnterprise checks that events are sent only if the server's version
// metadata says that it is Enterprise, the one server that lets clients subscribe.
func TestEventsOnEnterprise(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		version, metadata string
		want              bool
	}{
		{"", "", false}, // the environment is not known
		{"1.21.1", "", false},
		{"1.16.0", "fips", false},
		{"2.4.0", "", false}, // Community, or OpenBao
		{"1.21.1", "ent", true},
		{"2.1.0", "ent.hsm.fips1403", true},
	} {
		m := newMount(t)
		m.env = &logical.PluginEnvironment{VaultVersion: tt.version, VaultVersionMetadata: tt.metadata}
		if tt.version == "" {
			m.env = nil
		}
		m.write("roles/ci", map[string]any{"scopes": "person:read"})
		m.b.Cleanup(t.Context()) // sends the events that wait
		if got := len(m.sentEvents()) > 0; got != tt.want {
			t.Errorf("%s %s: an event was sent: %t", tt.version, tt.metadata, got)
		}
	}
}
