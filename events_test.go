// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"errors"
	"maps"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
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

// senderFunc is an event sender made of a function.
type senderFunc func() error

// SendEvent implements [logical.EventSender].
func (f senderFunc) SendEvent(context.Context, logical.EventType, *logical.EventData) error {
	return f()
}

// TestEventQueue: a server without events is asked once and never again; a
// slow or failing one costs its events and no request.
func TestEventQueue(t *testing.T) {
	t.Parallel()
	heard := func(context.Context) bool { return true }
	for name, refusal := range map[string]error{
		"no event system": framework.ErrNoEvents,
		"older server":    status.Error(codes.Unimplemented, "unknown method SendEvent"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var asked, results atomic.Int64
			q := newEventQueue(senderFunc(func() error { asked.Add(1); return refusal }), heard, func(eventResult) { results.Add(1) })
			defer q.close()
			q.send("cable/test")
			for end := time.Now().Add(10 * time.Second); !q.off.Load(); time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatal("the queue goes on")
				}
			}
			for range 2 * maxQueuedEvents {
				q.send("cable/test")
			}
			if asked.Load() != 1 || results.Load() != 0 {
				t.Errorf("asked %d times, %d results", asked.Load(), results.Load())
			}
		})
	}
	t.Run("failing", func(t *testing.T) {
		t.Parallel()
		results := make(chan eventResult, 2)
		q := newEventQueue(senderFunc(func() error { return errors.New("sealed") }), heard, func(r eventResult) { results <- r })
		defer q.close()
		q.send("cable/test")
		q.send("cable/test")
		if a, b := <-results, <-results; a != eventFailed || b != eventFailed {
			t.Errorf("%s, %s", a, b)
		}
	})
	t.Run("closed", func(t *testing.T) {
		t.Parallel()
		// What waits when a mount is disabled is sent, and what comes later is not.
		var sent atomic.Int64
		q := newEventQueue(senderFunc(func() error { sent.Add(1); return nil }), heard, func(eventResult) {})
		for range 100 {
			q.send("cable/test")
		}
		q.close()
		q.send("cable/test")
		q.close()
		if n := sent.Load(); n != 100 {
			t.Errorf("%d events were sent, want 100", n)
		}
		newEventQueue(nil, heard, nil).close() // one that never had an event
	})
	t.Run("stuck", func(t *testing.T) {
		t.Parallel()
		release := make(chan struct{})
		var dropped atomic.Int64
		q := newEventQueue(senderFunc(func() error { <-release; return nil }), heard, func(r eventResult) {
			if r == eventDropped {
				dropped.Add(1)
			}
		})
		defer q.close()
		defer close(release)
		for range maxQueuedEvents + 11 { // one or none is with Vault
			q.send("cable/test")
		}
		if n := dropped.Load(); n != 10 && n != 11 {
			t.Errorf("%d events were dropped", n)
		}
	})
}

// TestEventsAreHeard: no events are made where the server lets nobody
// subscribe, and all are where that is not certain.
func TestEventsAreHeard(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		env  *logical.PluginEnvironment
		want bool
	}{
		{nil, true},
		{&logical.PluginEnvironment{VaultVersion: "1.21.1"}, false},
		{&logical.PluginEnvironment{VaultVersion: "1.16.0", VaultVersionMetadata: "fips"}, false},
		{&logical.PluginEnvironment{VaultVersion: "1.21.1", VaultVersionMetadata: "ent"}, true},
		{&logical.PluginEnvironment{VaultVersion: "1.21.1", VaultVersionMetadata: "ent.hsm.fips1403"}, true},
		{&logical.PluginEnvironment{VaultVersion: "2.4.0"}, true},
	} {
		m := newMount(t)
		m.env = tt.env
		m.write("roles/ci", map[string]any{"scopes": "person:read"})
		m.waitUntil(func() bool { return m.b.telemetry.events.off.Load() || len(m.sentEvents()) > 0 })
		if got := len(m.sentEvents()) > 0; got != tt.want {
			t.Errorf("%v: an event was sent: %t", tt.env, got)
		}
	}
}

// TestCleanDoesNotWait: the SDK holds the lock of all mounts while one ends.
func TestCleanDoesNotWait(t *testing.T) {
	t.Parallel()
	hang := make(chan struct{})
	defer close(hang)
	q := newEventQueue(senderFunc(func() error { <-hang; return nil }), func(context.Context) bool { return true }, func(eventResult) {})
	q.send("cable/config-write")
	q.send("cable/config-write")
	start := time.Now()
	q.close()
	if took := time.Since(start); took > time.Second {
		t.Errorf("took %s", took)
	}
	select {
	case <-q.ended:
	case <-time.After(flushTimeout + 5*time.Second):
		t.Error("it is still sending")
	}
}
