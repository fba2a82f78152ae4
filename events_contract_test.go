// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets_test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/vault/sdk/logical"

	cablesecrets "github.com/cablesecrets/vault-plugin-secrets-cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// TestEventsContract sends requests as Vault would, and reads the events as
// Vault's event system would receive them: one for each change, token, failure
// and ended lease, in their order; none for what changes nothing; and no secret
// in any.
func TestEventsContract(t *testing.T) {
	t.Parallel()
	sim, sender, storage := cabletest.NewServer(t, nil), logical.NewMockEventSender(), new(logical.InmemStorage)
	b, err := cablesecrets.Factory(t.Context(), &logical.BackendConfig{
		System:      &logical.StaticSystemView{DefaultLeaseTTLVal: time.Hour, MaxLeaseTTLVal: 24 * time.Hour},
		StorageView: storage, EventsSender: sender,
	})
	if err != nil {
		t.Fatal(err)
	}
	send := func(id string, op logical.Operation, path string, data map[string]any, secret *logical.Secret) *logical.Response {
		resp, err := b.HandleRequest(t.Context(), &logical.Request{ID: id, Operation: op, Path: path, Data: data, Secret: secret, Storage: storage, MountPoint: "cable/"})
		if err != nil || resp.IsError() {
			return nil
		}
		return resp
	}
	read := func(id string) *logical.Response { return send(id, logical.ReadOperation, "creds/app", nil, nil) }

	// Changes, and requests that change nothing.
	send("", logical.UpdateOperation, "config", map[string]any{"refresh_key": sim.RefreshKey(), "token_url": sim.URL, "organization_id": cabletest.DefaultOrganizationID}, nil)
	send("", logical.CreateOperation, "roles/app", map[string]any{"scopes": "transactions:read,transactions:write"}, nil)
	send("", logical.UpdateOperation, "config", map[string]any{"auth_scheme": "none"}, nil)                                          // refused
	send("", logical.UpdateOperation, "config", map[string]any{"refresh_key": cabletest.NewRefreshKey(), "verify_role": "app"}, nil) // refused by Cable
	send("", logical.CreateOperation, "roles/other", map[string]any{"scopes": "transactions:read", "ttl": 1}, nil)                   // refused
	send("", logical.ReadOperation, "creds/none", nil, nil)                                                                          // refused
	send("", logical.UpdateOperation, "creds/app", map[string]any{"scopes": "person:read"}, nil)                                     // refused
	for _, path := range []string{"config", "roles/app", "status", "metrics"} {
		send("", logical.ReadOperation, path, nil, nil)
	}
	// Failures.
	for _, f := range []cabletest.Fault{{Status: 401, Message: "{refresh_key}"}, {Status: 500}, {Body: "{refresh_key}"}} {
		sim.SetFault(f)
		read("failure")
	}
	sim.SetFault(cabletest.Fault{Grant: &cabletest.Grant{Scopes: &[]string{"everything:write"}}})
	read("grant")
	sim.ClearFaults()
	// Tokens, many at once, and the end of a lease.
	tokens := map[string]*logical.Response{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			id := fmt.Sprintf("token-%d", i)
			resp := read(id)
			mu.Lock()
			defer mu.Unlock()
			tokens[id] = resp
		})
	}
	wg.Wait()
	if tokens["token-0"] == nil {
		t.Fatal("no token was minted")
	}
	send("", logical.RevokeOperation, "creds/app", nil, &logical.Secret{InternalData: tokens["token-0"].Secret.InternalData})
	b.Cleanup(t.Context()) // sends the events that wait

	var types []string
	sender.Lock()
	defer sender.Unlock()
	for _, e := range sender.Events {
		kind := string(e.Type)
		if strings.HasPrefix(kind, "cable/grant-") {
			kind = "cable/grant"
		}
		types = append(types, kind)
		metadata := map[string]string{}
		for k, v := range e.Event.GetMetadata().GetFields() {
			metadata[k] = v.GetStringValue()
		}
		text := fmt.Sprint(e.Type, e.Event)
		if strings.Contains(text, cabletest.RefreshKeyMarker) || strings.Contains(text, cabletest.TokenMarker) {
			t.Errorf("an event contains a secret: %s", text)
		}
		want := []string{"data_path", "modified", "operation", "path"}
		if strings.HasPrefix(kind, "cable/creds-") || kind == "cable/grant" {
			want = append(want, "role", "organization_id", "request_id")
		}
		switch id := metadata["request_id"]; {
		case id == "grant", id == "failure":
			want = append(want, "outcome", "cable_status")
		case kind == "cable/creds-create":
			resp := tokens[id]
			if resp == nil {
				t.Fatalf("an event for no token, or a second one: %v", metadata)
			}
			delete(tokens, id)
			for key, value := range map[string]any{"expiry": resp.Data["expiry"], "expires_at": resp.Data["expires_at"], "scopes": "transactions:read,transactions:write"} {
				if metadata[key] != fmt.Sprint(value) {
					t.Errorf("%s is %q in the event and %v in the response", key, metadata[key], value)
				}
			}
		}
		for _, key := range want {
			if value, ok := metadata[key]; !ok || value == "" {
				t.Errorf("%s: no %s in %v", e.Type, key, slices.Sorted(maps.Keys(metadata)))
			}
		}
	}
	if len(tokens) > 0 {
		t.Errorf("no event for %d tokens", len(tokens))
	}
	want := slices.Concat(
		[]string{"cable/config-write", "cable/role-write"},
		slices.Repeat([]string{"cable/creds-create-fail"}, 3), []string{"cable/grant"},
		slices.Repeat([]string{"cable/creds-create"}, 20), []string{"cable/lease-revoke"},
	)
	if diff := cmp.Diff(want, types); diff != "" {
		t.Errorf("types of the events (-want +got):\n%s", diff)
	}
}
