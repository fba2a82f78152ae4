// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"
)

// Package state tests entries in memory and failed writes; these are the tests of their effects on requests.

// lateStorage fails each write and keeps it, to be committed later, as Vault's storage may.
type lateStorage struct {
	logical.Storage
	commits []func() error
}

func (s *lateStorage) later(commit func() error) error {
	s.commits = append(s.commits, commit)
	return errors.New("context canceled") // bare text, as it crosses the plugin boundary
}

func (s *lateStorage) Put(_ context.Context, e *logical.StorageEntry) error {
	return s.later(func() error { return s.Storage.Put(context.Background(), e) })
}

func (s *lateStorage) Delete(_ context.Context, key string) error {
	return s.later(func() error { return s.Storage.Delete(context.Background(), key) })
}

// gateStorage delays reads or writes of a key until they may proceed. It ignores their contexts, as an SDK call that
// cannot be cancelled.
type gateStorage struct {
	logical.Storage
	key      string
	puts     bool // delays writes, not reads
	reached  chan struct{}
	proceed  chan struct{}
	reachOne sync.Once
}

func newGate(s logical.Storage, key string, puts bool) *gateStorage {
	return &gateStorage{Storage: s, key: key, puts: puts, reached: make(chan struct{}), proceed: make(chan struct{})}
}

func (s *gateStorage) wait(key string) {
	if key == s.key {
		s.reachOne.Do(func() { close(s.reached) })
		<-s.proceed
	}
}

func (s *gateStorage) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	entry, err := s.Storage.Get(ctx, key)
	if !s.puts {
		s.wait(key)
	}
	return entry, err
}

func (s *gateStorage) Put(ctx context.Context, e *logical.StorageEntry) error {
	if s.puts {
		s.wait(e.Key)
	}
	return s.Storage.Put(context.WithoutCancel(ctx), e)
}

// wantUncertain checks which entries status lists as uncertain.
func (m *testMount) wantUncertain(want ...string) {
	m.Helper()
	if got := m.read("status")["uncertain_entries"]; fmt.Sprint(got) != fmt.Sprint(want) {
		m.Errorf("uncertain_entries %v, want %v", got, want)
	}
}

// wantShared checks that reads share a token, and that reads which mint share the connections of one client.
func (m *testMount) wantShared() {
	m.Helper()
	m.write("roles/direct", kv{"scopes": "person:read"})
	tokens, connections := map[any]bool{}, m.sim.Connections()
	for range 20 {
		tokens[m.read("creds/ci")["token"]] = true
		m.read("creds/direct")
	}
	if made := m.sim.Connections() - connections; len(tokens) != 1 || made > 1 {
		m.Errorf("%d tokens and %d new connections for 20 reads", len(tokens), made)
	}
}

// TestUncertainWrites checks token requests after a write that fails and is committed afterwards. If it narrows, no
// token is minted, not even for verify_role, until the entry is written again or another node changes it.
func TestUncertainWrites(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		op     logical.Operation
		path   string
		data   kv
		blocks bool
		after  string // the error of a token request once the write was committed and invalidated, or ""
	}{
		"disable the role":       {opUpdate, "roles/ci", kv{"disabled": true}, true, `role "ci" is disabled`},
		"disable it by a patch":  {opPatch, "roles/ci", kv{"disabled": true}, true, `role "ci" is disabled`},
		"delete the role":        {opDelete, "roles/ci", nil, true, `role "ci" does not exist`},
		"take a scope away":      {opUpdate, "roles/ci", kv{"scopes": "person:read"}, true, ""},
		"shorten lifetimes":      {opUpdate, "roles/ci", kv{"max_ttl": 600}, true, ""},
		"another organization":   {opUpdate, "roles/ci", kv{"organization_id": "org_2"}, true, "organization"},
		"remove an organization": {opUpdate, "roles/ci", kv{"organization_ids": "org_3"}, true, ""},
		"add an organization":    {opUpdate, "roles/ci", kv{"organization_ids": "org_2,org_3"}, false, ""},
		"no leases":              {opUpdate, "roles/ci", kv{"lease": false}, false, ""},
		"add a scope":            {opUpdate, "roles/ci", kv{"scopes": "person:read,transactions:read,a:b"}, false, ""},
		"disable the mount":      {opUpdate, "config", kv{"disabled": true}, true, "the mount is disabled"},
		"delete the config":      {opDelete, "config", nil, true, "not configured"},
		"config, organization":   {opUpdate, "config", kv{"organization_id": "org_2"}, true, "organization"},
		"config, a longer limit": {opUpdate, "config", kv{"request_timeout": 30}, false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newConfiguredMount(t)
			m.write("roles/ci", kv{"organization_ids": "org_2"})
			m.read("creds/ci") // both are in memory
			late := &lateStorage{Storage: m.storage}
			if status, err := m.on(late, tt.op, tt.path, tt.data); status != 500 {
				t.Fatalf("the write: %d %v", status, err)
			}
			m.wantUncertain(tt.path)
			creds := func() {
				t.Helper()
				if !tt.blocks {
					m.read("creds/ci")
					return
				}
				m.refused(500, opRead, "creds/ci", nil, "write it again")
				if m.sim.CallCount() != 1 {
					t.Error("Cable was called")
				}
			}
			creds()
			if tt.blocks {
				m.refused(500, opUpdate, "config", kv{"verify_role": "ci"}, "write it again")
			}
			for _, commit := range late.commits {
				must(m, commit())
			}
			creds()
			m.b.InvalidateKey(t.Context(), tt.path)
			m.wantUncertain()
			status, err := m.on(m.storage, opRead, "creds/ci", nil)
			if (err != nil) != (tt.after != "") || err != nil && !strings.Contains(err.Error(), tt.after) {
				t.Errorf("after an invalidation: %d %v, want %q", status, err, tt.after)
			}
		})
	}
}

// TestUncertainIsShared checks that readers share the client and the token of entries that are uncertain, and that
// thousands of failed creates do not change that.
func TestUncertainIsShared(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.write("roles/ci", kv{"ttl": "1h", "reuse_for": "30m"})
	m.wantShared()
	late := &lateStorage{Storage: m.storage}
	_, _ = m.on(late, opUpdate, "config", kv{"request_timeout": 30})
	_, _ = m.on(late, opUpdate, "roles/ci", kv{"scopes": "transactions:read,person:read,a:b"})
	m.wantUncertain("config", "roles/ci")
	m.wantShared()
	m.write("config", kv{"disabled": false})
	m.write("roles/ci", kv{"disabled": false})
	m.wantUncertain()
	m.logger.SetLevel(hclog.Error)
	for i := range 5000 {
		_, _ = m.on(late, opCreate, fmt.Sprintf("roles/new-%d", i), kv{"scopes": "a:b"})
	}
	m.wantShared()
}

// TestHangingWrite checks that a write which has begun to store does not depend on its caller, and that it fails after
// 10 s, as does a request that waits for its lock.
func TestHangingWrite(t *testing.T) {
	t.Parallel()
	for path, tt := range map[string]struct {
		data kv
		line string
	}{"config": {kv{"request_timeout": 33}, "config written"}, "roles/ci": {kv{"ttl": 7200}, "role written"}} {
		t.Run(path+", its caller leaves", func(t *testing.T) {
			t.Parallel()
			m := newConfiguredMount(t)
			m.write("roles/ci", kv{"ttl": "1h", "reuse_for": "30m"})
			m.read("creds/ci")
			gate := newGate(m.storage, path, true)
			ctx, leave := context.WithCancel(t.Context())
			logged := strings.Count(m.log.String(), tt.line)
			done := m.startWith(ctx, gate, opUpdate, path, tt.data)
			<-gate.reached
			leave()
			close(gate.proceed)
			if err := <-done; err != nil {
				t.Error(err)
			}
			if n := strings.Count(m.log.String(), tt.line) - logged; n != 1 {
				t.Errorf("%d lines of the write", n)
			}
			m.wantUncertain()
			m.wantShared()
			set, err := m.b.state.Settings(t.Context(), m.storage, "ci", time.Now())
			if err != nil || path == "config" && set.Config.RequestTimeout != 33*time.Second ||
				path != "config" && set.Role.TTL != 2*time.Hour {
				t.Errorf("the settings in memory: %+v, %+v, %v", set.Config, set.Role, err)
			}
		})
		inBubble(t, path+", storage hangs", func(t *testing.T, m *reuseMount) {
			gate := newGate(m.storage, path, true)
			start := time.Now()
			written := m.start(gate, opUpdate, path, kv{"disabled": false})
			<-gate.reached
			status, err := m.on(m.storage, opDelete, path, nil)
			if took := time.Since(start); status != 504 || took != 10*time.Second ||
				!strings.Contains(err.Error(), "waiting for another write of") {
				t.Errorf("the deletion: %d %v after %s", status, err, took)
			}
			if err = <-written; err == nil || !strings.Contains(err.Error(), "did not respond to the write within") {
				t.Errorf("the write: %v", err)
			}
			m.wantUncertain(path)
			close(gate.proceed)
			synctest.Wait()
			m.wantUncertain() // a late success settles it
			m.token()
		})
	}
}

// TestDisablingDoesNotWait checks that a write of one role that hangs in storage delays neither another role nor the
// configuration, and that a second write of the same role does not outwait its caller.
func TestDisablingDoesNotWait(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.write("roles/other", kv{"scopes": "person:read"})
	gate := newGate(m.storage, "roles/ci", true)
	done := m.start(gate, opUpdate, "roles/ci", kv{"ttl": 600})
	<-gate.reached
	m.write("roles/other", kv{"disabled": true})
	m.write("config", kv{"disabled": true})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, err := statusOf(m.send(ctx, m.storage, opUpdate, "roles/ci", kv{"disabled": true}))
	if err == nil || !strings.Contains(err.Error(), "waiting for another write") || time.Since(start) > 5*time.Second {
		t.Errorf("after %s: %v", time.Since(start), err)
	}
	close(gate.proceed)
	if err := <-done; err != nil {
		t.Error(err)
	}
	m.write("roles/ci", kv{"disabled": true})
}

// TestFirstVersion checks that the engine works with what v0.1.0 stored, and that it ends a lease of v0.1.0.
func TestFirstVersion(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	golden := func(name string) []byte {
		raw, err := os.ReadFile("internal/state/testdata/v0.1.0/" + name + ".json")
		must(t, err)
		return raw
	}
	m.put("roles/whole", golden("role"), nil)
	m.put("roles/least", golden("role-least"), nil)
	m.put("config", golden("config"), nil)
	m.write("config", kv{"refresh_key": m.sim.RefreshKey(), "token_url": m.sim.URL, "ca_cert": "", "disabled": false})
	m.ok(opPatch, "config", kv{"organization_id": "org_a", "auth_scheme": "raw"})
	if m.ok(opRead, "creds/least", nil).Secret == nil {
		t.Error("no lease")
	}
	m.refused(400, opRead, "creds/whole", nil, "is disabled")
	m.ok(opPatch, "roles/whole", kv{"disabled": false, "organization_id": nil, "organization_ids": "org_b"})
	if m.ok(opRead, "creds/whole", kv{"organization_id": "org_b"}).Secret != nil {
		t.Error("a lease")
	}
	for _, kept := range []string{`"lease":false`, `"earlier_until":1800000000`, `"reuse_for":300`} {
		if got := m.stored("roles/whole"); !strings.Contains(got, kept) {
			t.Errorf("%s lacks %s", got, kept)
		}
	}
	revoke := m.newRequest(m.storage, opRevoke, "", nil)
	revoke.Secret = new(logical.Secret)
	must(t, json.Unmarshal(golden("lease"), &revoke.Secret.InternalData))
	_, err := m.b.HandleRequest(t.Context(), revoke)
	must(t, err)
	line := m.logLine("lease ended before its token")
	if line["role"] != "reports" || line["expires_at"] != "2100-01-01T00:00:00Z" || line["token_sha256"] == "" {
		t.Errorf("%v", line)
	}
}

// TestUnknownFieldsAreKept checks that a write keeps the stored fields of a newer version, and that no response and no
// log contains them.
func TestUnknownFieldsAreKept(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	const newer = `{"later":false,"newer":{"of":["a newer version"]},`
	for path, change := range map[string]kv{"config": {"organization_id": nil}, "roles/ci": {"organization_id": nil}} {
		m.put(path, []byte(newer+m.stored(path)[1:]), nil)
		m.b.InvalidateKey(t.Context(), path)
		m.ok(opPatch, path, change)
		m.write(path, kv{"disabled": false})
		for _, kept := range []string{`"later":false`, `"newer":{"of":["a newer version"]}`} {
			if got := m.stored(path); strings.Count(got, kept) != 1 {
				t.Errorf("%s lacks %s", path, kept)
			}
		}
		if got := fmt.Sprint(m.read(path)); strings.Contains(got, "later") || strings.Contains(got, "newer") {
			t.Errorf("%s reads as %s", path, got)
		}
	}
	if strings.Contains(m.log.String(), "newer") {
		t.Errorf("the log: %s", m.log)
	}
}

// TestConcurrentWrites checks that concurrent partial updates lose nothing.
func TestConcurrentWrites(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	for path, updates := range map[string][]kv{
		"config":   {{"organization_id": "org_x"}, {"request_timeout": 7}, {"auth_scheme": "bearer"}},
		"roles/ci": {{"organization_id": "org_x"}, {"ttl": int64(600)}, {"disabled": true}},
	} {
		want := m.read(path)
		var wg sync.WaitGroup
		for _, data := range updates {
			maps.Copy(want, data)
			wg.Go(func() { m.write(path, data) })
		}
		wg.Wait()
		if diff := cmp.Diff(want, m.read(path)); diff != "" {
			t.Error(diff)
		}
	}
}

// TestStorageFaults checks that a storage error is a 500 with the storage's own error, and that nothing is lost by it.
func TestStorageFaults(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.read("creds/ci")
	before, role := m.read("config"), m.read("roles/ci")

	m.storage.FailGet(true)
	m.read("creds/ci") // from memory
	m.b.InvalidateKey(t.Context(), "roles/ci")
	for _, path := range []string{"config", "roles/ci", "creds/ci"} {
		m.refused(500, opRead, path, nil, "get operations disabled")
	}
	fail := func(op logical.Operation, config, role kv) {
		t.Helper()
		m.refused(500, op, "config", config)
		m.refused(500, op, "roles/ci", role)
	}
	otherKey := kv{"refresh_key": "other", "token_url": m.sim.URL}
	fail(opDelete, nil, nil)
	fail(opUpdate, otherKey, kv{"ttl": 600})
	m.storage.FailGet(false)

	m.storage.FailPut(true)
	fail(opUpdate, otherKey, kv{"ttl": 600})
	m.storage.FailPut(false)

	m.storage.FailDelete(true)
	fail(opDelete, nil, nil)
	m.storage.FailDelete(false)

	m.storage.FailList(true)
	m.refused(500, opList, "roles/", nil)
	m.storage.FailList(false)

	if diff := cmp.Diff(before, m.read("config")) + cmp.Diff(role, m.read("roles/ci")); diff != "" {
		t.Error(diff)
	}
	// Whether config and the role were deleted is not known until they are written.
	m.refused(500, opRead, "creds/ci", nil, "the last write of config failed")
	m.write("config", kv{"disabled": false})
	m.refused(500, opRead, "creds/ci", nil, `the last write of role "ci" failed`)
	m.write("roles/ci", kv{"disabled": false})
	m.read("creds/ci")
}

// TestGarbageInStorage checks that an entry that cannot be read is a 500 with the remedy, and can be deleted.
func TestGarbageInStorage(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	for _, garbage := range []string{
		"", "{", "[]", `"REFRESHKEYCANARY"`, `{"refresh_key":7}`,
		`{"scopes":7,"refresh_key":"REFRESHKEYCANARY","request_timeout":"x"}`,
	} {
		for _, key := range []string{"config", "roles/ci"} {
			m.put(key, []byte(garbage), nil)
			m.b.InvalidateKey(t.Context(), key)
		}
		m.refused(500, opRead, "config", nil, "delete config and write it again")
		m.refused(500, opUpdate, "config", kv{"disabled": true}, "delete config")
		if garbage != `{"refresh_key":7}` {
			m.refused(500, opRead, "creds/ci", nil, "write it again")
		}
		m.ok(opDelete, "config", nil)
		m.ok(opDelete, "roles/ci", nil)
		m.configure()
		m.read("creds/ci")
	}
}
