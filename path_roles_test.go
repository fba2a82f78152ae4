// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"fmt"
	"math"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/fields"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/lifetime"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/state"
)

// TestRoleWrite checks the fields of a role before config is written, in each form that Vault accepts.
func TestRoleWrite(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	if w := m.write("roles/ci", kv{"scopes": " person:read, ,transactions:read,person:read"}); w != nil {
		t.Errorf("warnings: %q", w)
	}
	want := kv{
		"organization_id": "", "scopes": []string{"person:read", "transactions:read"}, "disabled": false,
		"ttl": int64(0), "max_ttl": int64(0), "reuse_for": int64(0), "lease": true, "organization_ids": []string{},
	}
	if diff := cmp.Diff(want, m.read("roles/ci")); diff != "" {
		t.Error(diff)
	}
	for _, step := range []struct {
		op    logical.Operation
		field string
		value any
		want  any
	}{
		{opUpdate, "ttl", "10m", int64(600)},
		{opPatch, "ttl", 300, int64(300)},
		{opUpdate, "max_ttl", "1d", int64(86400)},
		{opUpdate, "max_ttl", "300", int64(300)},
		{opUpdate, "max_ttl", 0, int64(0)},
		{opPatch, "ttl", "0", int64(0)},
		{opUpdate, "organization_id", "org_a", "org_a"},
		{opUpdate, "scopes", []string{"transactions:write"}, []string{"transactions:write"}},
		{opPatch, "scopes", []string{"b:x,a:x", "a:x"}, []string{"a:x", "b:x"}},
		{opUpdate, "disabled", "true", true},
		{opUpdate, "disabled", false, false},
		{opUpdate, "lease", false, false},
		{opPatch, "organization_ids", "org_b,org_a", []string{"org_b", "org_a"}},
		{opUpdate, "organization_ids", []string{"org_a", "org_b"}, []string{"org_a", "org_b"}},
	} {
		m.ok(step.op, "roles/ci", kv{step.field: step.value})
		want[step.field] = step.want
		if diff := cmp.Diff(want, m.read("roles/ci")); diff != "" {
			t.Errorf("after %s %s=%v: %s", step.op, step.field, step.value, diff)
		}
	}
	m.write("roles/copy", m.read("roles/ci")) // the response to a read can be written to another role
	if diff := cmp.Diff(want, m.read("roles/copy")); diff != "" {
		t.Error(diff)
	}
}

// TestRoleRefusals checks that a refusal is a 400, contains the allowed values, and changes nothing.
func TestRoleRefusals(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.write("roles/ci", kv{"scopes": "person:read", "ttl": 600, "max_ttl": 1200, "organization_id": "org"})
	before := m.read("roles/ci")
	many := make([]string, 65)
	for i := range many {
		many[i] = fmt.Sprintf("r%d:read", i)
	}
	m.refusedAll("roles/ci", []logical.Operation{opUpdate, opPatch}, []refusal{
		{kv{"scopes": " , ,"}, "scopes must not be empty"},
		{kv{"scopes": []string{}}, "scopes must not be empty"},
		{kv{"scopes": []string{"", " "}}, "scopes must not be empty"},
		{kv{"scopes": []any{"a:b", 7}}, "must be a list of strings, but contains a number"},
		{kv{"scopes": []any{"a:b", nil}}, "contains null"},
		{kv{"scopes": []any{[]any{"a:b"}}}, "contains a list"},
		{kv{"scopes": `["a:b","c:d"]`}, `a scope must not contain white space, quotes`},
		{kv{"scopes": "a b"}, `a scope must not contain white space`},
		{kv{"scopes": "a:\u200bb"}, "control characters"},
		{kv{"scopes": "a:b\x00c"}, "control characters"},
		{kv{"scopes": strings.Repeat("s", 129)}, "is 129 characters long: at most 128"},
		{kv{"scopes": many}, "scopes names 65: at most 64"},
		{kv{"ttl": 299}, "ttl is 299s: Cable's tokens are valid for 300s to 86400s"},
		{kv{"ttl": 86401}, "ttl is 86401s"},
		{kv{"ttl": -1}, "cannot be negative"},
		{kv{"ttl": 300.5}, "whole seconds"},
		{kv{"ttl": "1h0.5s"}, "whole seconds"},
		{kv{"ttl": int64(9223372036854775807)}, "ttl is (not shown: length 19)"},
		{kv{"ttl": "9999999999999h"}, "ttl is"},
		{kv{"ttl": 1201}, "ttl of 1201s is above max_ttl of 1200s"},
		{kv{"max_ttl": 599}, "ttl of 600s is above max_ttl of 599s"},
		{kv{"max_ttl": 86401}, "max_ttl is 86401s"},
		{kv{"organization_id": `o"`}, "must not contain white space, quotes"},
		{kv{"organization_ids": many}, "organization_ids names 65: at most 64 are allowed"},
		{kv{"organization_ids": `a,o"`}, "an organization of organization_ids must not contain white space, quotes"},
		{kv{"organization_ids": strings.Repeat("o", 129)}, "is 129 characters long: at most 128"},
		{kv{"reuse_for": 301}, "reuse_for"},
		{kv{"reuse_for": -1}, "reuse_for"},
		{kv{"reuse_for": "x"}, "reuse_for"},
		{kv{"reuse_for": int64(1 << 40)}, "reuse_for"},
	})
	if diff := cmp.Diff(before, m.read("roles/ci")); diff != "" {
		t.Error(diff)
	}
	m.refused(400, opUpdate, "roles/new", kv{"ttl": 600}, "scopes is missing")
	m.refused(400, opPatch, "roles/new", kv{"scopes": "person:read"},
		`role "new" does not exist: write it to roles/new`)
	m.refused(400, opUpdate, "roles/"+strings.Repeat("n", 129), kv{"scopes": "person:read"},
		"129 characters long: at most 128")
	m.refused(400, opUpdate, "roles/new", kv{"scopes": "a:b", "reuse_for": "5m"}, "reuse_for of 300s needs a ttl")
	m.write("roles/ci", kv{"reuse_for": 300})
	m.refused(400, opUpdate, "roles/ci", kv{"ttl": 599}, "reuse_for")
	m.refused(400, opUpdate, "roles/ci", kv{"ttl": 0}, "reuse_for")
	m.write("roles/ci", kv{"ttl": 0, "reuse_for": 0})
	m.write("roles/"+strings.Repeat("n", 128), kv{"scopes": "person:read"})
	if m.read("roles/new") != nil {
		t.Error("a refused write created a role")
	}
}

// TestRoleWarnings checks the warnings of scopes that Cable may not know.
func TestRoleWarnings(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	w := m.write("roles/odd", kv{"scopes": "transactions:read,alerts:read,everything,a:b:c,:x"})
	m.wantWarning(w, "not of the form resource:action",
		"(not shown: length 2), (not shown: length 5), (not shown: length 10)")
	m.wantWarning(w, "Cable's reference does not name", `"alerts:read"`)
	if len(w) != 2 {
		t.Errorf("warnings: %q", w)
	}
	if w := m.write("roles/odd", kv{"ttl": 600}); w != nil {
		t.Errorf("a write without scopes warns of them: %q", w)
	}
	for _, s := range scopesOfReference() {
		if w := scopeWarnings([]string{s}); w != nil {
			t.Errorf("%s: %q", s, w)
		}
	}
}

// TestRoleTokensValidUntil checks the time until which tokens may be valid, even after a role's max_ttl was lowered.
func TestRoleTokensValidUntil(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	until := func(warnings []string, lifetime time.Duration) {
		t.Helper()
		_, text, _ := strings.Cut(strings.Join(warnings, ""), "may be valid until ")
		got, err := time.Parse(time.RFC3339, strings.TrimSuffix(text, "."))
		must(m, err)
		want := time.Now().Add(lifetime + time.Minute) // a token request under way may take a minute
		if d := want.Sub(got); d < -time.Second || d > 10*time.Second {
			t.Errorf("valid until %s, want %s", got, want)
		}
	}
	m.write("roles/a", kv{"scopes": "person:read", "max_ttl": 600})
	until(m.write("roles/a", kv{"disabled": true}), 600*time.Second)
	m.write("roles/a", kv{"max_ttl": 7200})
	m.write("roles/a", kv{"max_ttl": 300})
	until(m.write("roles/a", kv{"disabled": true}), 7200*time.Second)
	until(m.ok(opDelete, "roles/a", nil).Warnings, 7200*time.Second)
	if resp := m.ok(opDelete, "roles/a", nil); resp != nil {
		t.Errorf("the response to deleting nothing: %v", resp)
	}
	m.write("roles/b", kv{"scopes": "person:read"})
	until(m.ok(opDelete, "roles/b", nil).Warnings, 24*time.Hour)
}

// TestRoleList checks the pages of a list.
func TestRoleList(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	names := []string{"Team-B", "a", "b", "b.1", "c_3", "team-a"}
	for _, n := range names {
		m.write("roles/"+n, kv{"scopes": "person:read"})
	}
	for _, tt := range []struct {
		data kv
		want []string
	}{
		{nil, names},
		{kv{"limit": 2}, names[:2]},
		{kv{"limit": "2", "after": "a"}, names[2:4]},
		{kv{"after": "a0"}, names[2:]},
		{kv{"after": ""}, names},
		{kv{"after": "team-a"}, nil},
		{kv{"limit": 100}, names},
	} {
		resp := m.ok(opList, "roles/", tt.data)
		got, _ := resp.Data["keys"].([]string)
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%v: %s", tt.data, diff)
		}
	}
	// A loop over pages sees each role once.
	var all []string
	for after := ""; ; {
		page, _ := m.ok(opList, "roles/", kv{"after": after, "limit": 1}).Data["keys"].([]string)
		if len(page) == 0 {
			break
		}
		all = append(all, page...)
		after = page[0]
	}
	if diff := cmp.Diff(names, all); diff != "" {
		t.Error(diff)
	}
	m.refused(400, opList, "roles/", kv{"limit": 0}, "limit is 0: write 1 or more")
	m.refused(400, opList, "roles/", kv{"limit": -3}, "limit is -3")
	m.refused(400, opList, "roles/", kv{"limit": ""}, "limit must not be empty")
	m.refused(400, opList, "roles/", kv{"limit": "many"}, "whole number")
	m.refused(400, opList, "roles/", kv{"after": []string{"a", "b"}}, "after must be a string")
}

// TestRoleExistence checks that the existence check, by which policies tell create from update, depends on the name
// alone, and that config has none.
func TestRoleExistence(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.write("roles/ci", kv{"scopes": "person:read"})
	for path, want := range map[string]bool{"roles/ci": true, "roles/CI": false, "roles/new": false, "config": false} {
		data := kv{"ttl": []any{"x"}, "scopes": 7, "refresh_key": 7}
		found, exists, err := m.b.HandleExistenceCheck(t.Context(), m.newRequest(m.storage, opCreate, path, data))
		if found != (path != "config") || exists != want || err != nil {
			t.Errorf("%s: %v %v %v", path, found, exists, err)
		}
	}
}

// FuzzRoleEntry checks roles on their way through storage. An accepted write is read as it was written, and an entry of
// another version is read without a panic.
func FuzzRoleEntry(f *testing.F) {
	f.Add("transactions:read,person:read", "org_1", 600, 1200, false, []byte(`{"scopes":["a:b"],"newer":[1]}`))
	f.Add("a", "", 0, 0, true, []byte(`{}`))
	f.Add(" , ", "o o", 299, 86401, false, []byte(`{"scopes":7}`))
	f.Add("a:b", "org", -1, math.MaxInt, false, []byte(`{"ttl":1e99}`))
	f.Fuzz(func(t *testing.T, scopes, org string, ttl, maxTTL int, disabled bool, stored []byte) {
		if role, err := state.DecodeRole("r", stored); err == nil {
			_ = roleResponseData(role)
			_ = roleTokensValidUntil(role)
		}
		path := newBackend().pathRoles()
		raw := kv{"scopes": scopes, "ttl": ttl, "max_ttl": maxTTL, "disabled": disabled}
		if org != "" {
			raw["organization_id"] = org
		}
		data, err := fields.Parse(path, &logical.Request{Operation: opUpdate, Data: raw})
		if err != nil {
			return
		}
		_, role, err := mergeRole(nil, &request{Request: &logical.Request{Operation: opUpdate}, role: "r", in: data})
		if err != nil {
			return
		}
		if len(role.Scopes) == 0 || role.TTL > role.MaxLifetime() || role.MaxLifetime() > lifetime.Max ||
			role.TTL != 0 && role.TTL < lifetime.Min || role.MaxTTL != 0 && role.MaxTTL < lifetime.Min {
			t.Errorf("accepted %+v", role)
		}
		entry, err := role.Encode()
		must(t, err)
		again, err := state.DecodeRole("r", entry)
		if diff := cmp.Diff(role, again, cmpopts.IgnoreUnexported(state.Role{})); diff != "" || err != nil {
			t.Errorf("%s %v", diff, err)
		}
	})
}

// TestCreateNeverChanges checks that one of several concurrent creates creates the role and the others change nothing,
// and that an update does not bring back a role that was deleted in the meantime.
func TestCreateNeverChanges(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	write := func(op logical.Operation, data kv) (int, error) { return m.on(m.storage, op, "roles/new", data) }
	for range 50 {
		var wg sync.WaitGroup
		created := make([]bool, 6)
		for i := range created {
			wg.Go(func() {
				status, err := write(opCreate, kv{"scopes": fmt.Sprintf("s:%c", 'a'+i)})
				created[i] = err == nil
				if err != nil && (status != 400 || !strings.Contains(err.Error(), "changed meanwhile")) {
					t.Errorf("%d %v", status, err)
				}
			})
		}
		wg.Wait()
		got := m.read("roles/new")["scopes"].([]string)
		for i, ok := range created {
			if isStored := got[0] == fmt.Sprintf("s:%c", 'a'+i); ok != isStored {
				t.Fatalf("created: %v, stored: %q", created, got)
			}
		}
		var updated, deleted error
		wg.Go(func() { _, updated = write(opUpdate, kv{"ttl": 600}) })
		wg.Go(func() { _, deleted = write(opDelete, nil) })
		wg.Wait()
		if deleted != nil || m.read("roles/new") != nil {
			t.Fatalf("the role is back after its deletion: %v, %v", updated, deleted)
		}
	}
}
