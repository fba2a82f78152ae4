// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/state"
)

// lateStorage reports an error for each write and keeps it, to be committed
// later: as Vault's storage does if the caller leaves while it is slow.
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

// on sends a request with a storage of its own.
func (m *testMount) on(s logical.Storage, op logical.Operation, path string, data kv) (int, error) {
	m.Helper()
	resp, err := m.b.HandleRequest(
		m.Context(),
		&logical.Request{
			ID:         "req-1",
			Operation:  op,
			Path:       path,
			Storage:    s,
			Data:       overJSON(m, data),
			MountPoint: "cable/",
		},
	)
	return statusOf(resp, err)
}

// TestUncertainWrites: a write that reports an error and is committed
// afterwards. If it takes something away, no token is minted from then on, until
// it is written again; and nothing read in between is kept.
func TestUncertainWrites(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		op     logical.Operation
		path   string
		data   kv
		blocks bool
		after  string // what a token request says once it was committed and invalidated; "" for a token
	}{
		"disable the role":       {opUpdate, "roles/ci", kv{"disabled": true}, true, `role "ci" is disabled`},
		"disable it by a patch":  {opPatch, "roles/ci", kv{"disabled": true}, true, `role "ci" is disabled`},
		"delete the role":        {opDelete, "roles/ci", nil, true, `role "ci" does not exist`},
		"take a scope away":      {opUpdate, "roles/ci", kv{"scopes": "person:read"}, true, ""},
		"shorten lifetimes":      {opUpdate, "roles/ci", kv{"max_ttl": 600}, true, ""},
		"another organization":   {opUpdate, "roles/ci", kv{"organization_id": "org_2"}, true, "organization"},
		"add a scope":            {opUpdate, "roles/ci", kv{"scopes": "person:read,transactions:read,a:b"}, false, ""},
		"disable the mount":      {opUpdate, "config", kv{"disabled": true}, true, "the mount is disabled"},
		"delete the config":      {opDelete, "config", nil, true, "not configured"},
		"config, organization":   {opUpdate, "config", kv{"organization_id": "org_2"}, true, "organization"},
		"config, a longer limit": {opUpdate, "config", kv{"request_timeout": 30}, false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newConfiguredMount(t)
			m.read("creds/ci") // both are in memory
			late := &lateStorage{Storage: m.storage}
			if status, err := m.on(late, tt.op, tt.path, tt.data); status != 500 {
				t.Fatalf("the write: %d %v", status, err)
			}
			creds := func(when string) {
				t.Helper()
				calls := m.sim.CallCount()
				status, err := m.on(m.storage, opRead, "creds/ci", nil)
				if blocked := status == 500 && strings.Contains(err.Error(), "write it again"); blocked != tt.blocks ||
					!blocked && err != nil {
					t.Errorf("%s: %d %v", when, status, err)
				}
				if tt.blocks && m.sim.CallCount() != calls {
					t.Errorf("%s: Cable was called", when)
				}
			}
			creds("before it is committed")
			for _, commit := range late.commits {
				if err := commit(); err != nil {
					t.Fatal(err)
				}
			}
			creds("after it was committed")
			// Another node's word, or the mount's next set-up, ends the uncertainty.
			m.b.InvalidateKey(t.Context(), tt.path)
			switch status, err := m.on(m.storage, opRead, "creds/ci", nil); {
			case tt.after == "" && err != nil,
				tt.after != "" && (err == nil || !strings.Contains(err.Error(), tt.after)):
				t.Errorf("after an invalidation: %d %v, want %q", status, err, tt.after)
			}
		})
	}
}

// TestUncertainIsNotKept: what is read while a write is uncertain is used once.
func TestUncertainIsNotKept(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.write("roles/ci", kv{"disabled": true})
	late := &lateStorage{Storage: m.storage}
	_, _ = m.on(late, opUpdate, "roles/ci", kv{"disabled": false})
	m.refused(400, opRead, "creds/ci", nil, "is disabled")
	if err := late.commits[0](); err != nil {
		t.Fatal(err)
	}
	m.read("creds/ci") // the old entry was not kept
	// Written again, it is kept.
	m.write("roles/ci", kv{"ttl": 600})
	m.read("creds/ci")
	m.storage.FailGet(true)
	m.read("creds/ci")
}

// gateStorage holds calls of one kind for a key until they may proceed; it does
// not look at their contexts, as an SDK call that cannot be cancelled.
type gateStorage struct {
	logical.Storage
	key      string
	puts     bool // hold writes, not reads
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
	return s.Storage.Put(ctx, e)
}

// TestRoleReadTwice: requests that read a role at the same time use one entry:
// the readers of two entries would not share a token.
func TestRoleReadTwice(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.write("roles/app", kv{"scopes": "person:read"})
	gate := newGate(m.storage, "roles/app", false)
	slow := make(chan *state.Role)
	go func() {
		role, err := m.b.state.Role(m.Context(), gate, "app")
		if err != nil {
			t.Error(err)
		}
		slow <- role
	}()
	<-gate.reached
	role, err := m.b.state.Role(m.Context(), m.storage, "app")
	close(gate.proceed)
	if other := <-slow; err != nil || role == nil || role != other {
		t.Errorf("two entries, %p and %p, %v", role, other, err)
	}
}

// TestDisablingDoesNotWait: a write of one role that hangs in storage holds up
// neither another role nor the configuration; and a second write of the same
// role waits no longer than its caller.
func TestDisablingDoesNotWait(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.write("roles/other", kv{"scopes": "person:read"})
	gate := newGate(m.storage, "roles/ci", true)
	done := make(chan error, 1)
	go func() {
		_, err := m.on(gate, opUpdate, "roles/ci", kv{"ttl": 600})
		done <- err
	}()
	<-gate.reached
	m.write("roles/other", kv{"disabled": true})
	m.write("config", kv{"disabled": true})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, err := m.b.HandleRequest(
		ctx,
		&logical.Request{Operation: opUpdate, Path: "roles/ci", Storage: m.storage, Data: kv{"disabled": true}},
	)
	if err == nil || !strings.Contains(err.Error(), "waiting for another write") || time.Since(start) > 5*time.Second {
		t.Errorf("after %s: %v", time.Since(start), err)
	}
	close(gate.proceed)
	if err := <-done; err != nil {
		t.Error(err)
	}
	m.write("roles/ci", kv{"disabled": true})
}

// TestHangingWriteIsAbandoned: a storage write that hangs ends with its caller,
// and its entry is uncertain.
func TestHangingWriteIsAbandoned(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.read("creds/ci")
	gate := newGate(m.storage, "roles/ci", true)
	defer close(gate.proceed)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err := m.b.HandleRequest(
		ctx,
		&logical.Request{Operation: opUpdate, Path: "roles/ci", Storage: gate, Data: kv{"disabled": true}},
	)
	if err == nil {
		t.Error("the write succeeded")
	}
	m.refused(500, opRead, "creds/ci", nil, "write it again")
}

// TestDisabledMeanwhile: a token request is under way while its role or the
// mount is disabled or deleted. Once that write has returned, no API call
// starts, and no token is returned.
func TestDisabledMeanwhile(t *testing.T) {
	t.Parallel()
	changes := map[string]func(m *testMount){
		"role disabled":  func(m *testMount) { m.write("roles/ci", kv{"disabled": true}) },
		"role deleted":   func(m *testMount) { m.ok(opDelete, "roles/ci", nil) },
		"mount disabled": func(m *testMount) { m.write("config", kv{"disabled": true}) },
		"config deleted": func(m *testMount) { m.ok(opDelete, "config", nil) },
		"on another node": func(m *testMount) {
			m.putRole("ci", &state.Role{Scopes: []string{"person:read"}, Disabled: true})
			m.b.InvalidateKey(m.Context(), "roles/ci")
		},
	}
	for name, change := range changes {
		for _, key := range []string{"config", "roles/ci"} {
			t.Run(name+", while "+key+" is read", func(t *testing.T) {
				t.Parallel()
				m := newConfiguredMount(t)
				gate := newGate(m.storage, key, false)
				done := make(chan error, 1)
				go func() {
					_, err := m.on(gate, opRead, "creds/ci", nil)
					done <- err
				}()
				<-gate.reached
				change(m)
				close(gate.proceed)
				if err := <-done; err == nil || m.sim.CallCount() != 0 {
					t.Errorf("%v, Cable was called %d times", err, m.sim.CallCount())
				} else {
					t.Log(err)
				}
			})
		}
		t.Run(name+", while a retry is waited for", func(t *testing.T) {
			t.Parallel()
			m := newConfiguredMount(t)
			m.sim.SetFault(Fault{Status: 429, Times: 1, Header: map[string]string{"Retry-After": "1"}})
			done := make(chan error, 1)
			go func() {
				_, err := m.on(m.storage, opRead, "creds/ci", nil)
				done <- err
			}()
			m.waitUntil(func() bool { return m.sim.CallCount() == 1 })
			change(m)
			if err := <-done; err == nil || m.sim.CallCount() != 1 {
				t.Errorf("%v, Cable was called %d times", err, m.sim.CallCount())
			}
		})
		t.Run(name+", while Cable responds", func(t *testing.T) {
			t.Parallel()
			m := newConfiguredMount(t)
			m.sim.SetFault(Fault{Delay: 200 * time.Millisecond})
			done := make(chan error, 1)
			go func() {
				_, err := m.on(m.storage, opRead, "creds/ci", nil)
				done <- err
			}()
			m.waitUntil(func() bool { return m.sim.CallCount() == 1 })
			change(m)
			if err := <-done; err == nil ||
				!strings.Contains(
					err.Error(),
					"Cable may have issued a token that was not delivered, valid until "+m.until(time.Hour),
				) {
				t.Errorf("the token was returned, or not reported: %v", err)
			}
			if n := m.figures()["vault_cable_undelivered_tokens_total"]; n != 1 {
				t.Errorf("undelivered_tokens_total %v", n)
			}
			if line := m.logLine(m.log.String(), undelivered); line["@level"] != "warn" ||
				line["undelivered_until"] == nil {
				t.Errorf("the line in the log: %v", line)
			}
		})
	}
	t.Run("verify_role", func(t *testing.T) { // whose trial has read config before that was disabled
		t.Parallel()
		m := newConfiguredMount(t)
		gate := newGate(m.storage, "config", false)
		done := make(chan error, 1)
		go func() {
			_, err := m.on(gate, opUpdate, "config", kv{"verify_role": "ci", "request_timeout": 10})
			done <- err
		}()
		<-gate.reached
		m.write("config", kv{"disabled": true})
		close(gate.proceed)
		if err := <-done; err == nil || m.sim.CallCount() > 0 {
			t.Errorf("%v, Cable was called %d times", err, m.sim.CallCount())
		}
	})
	t.Run("changed, not disabled", func(t *testing.T) {
		t.Parallel()
		m := newConfiguredMount(t)
		gate := newGate(m.storage, "config", false)
		done := make(chan error, 1)
		go func() {
			_, err := m.on(gate, opRead, "creds/ci", nil)
			done <- err
		}()
		<-gate.reached
		m.write("roles/ci", kv{"scopes": "person:read"})
		close(gate.proceed)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if calls := m.sim.Calls(); len(calls) != 1 || len(calls[0].Scopes) != 1 {
			t.Errorf("the role as it was before the write was used: %+v", calls)
		}
	})
}

// TestBudgetFromReceipt: request_timeout begins when the request is received,
// and what hangs in Vault is abandoned at its end.
func TestBudgetFromReceipt(t *testing.T) {
	t.Parallel()
	check := func(t *testing.T, m *testMount, s logical.Storage) {
		t.Helper()
		start := time.Now()
		status, err := m.on(s, opRead, "creds/ci", nil)
		if took := time.Since(start); status != 504 || took < 900*time.Millisecond || took > 5*time.Second ||
			m.sim.CallCount() != 0 {
			t.Errorf("%d %v after %s, Cable was called %d times", status, err, took, m.sim.CallCount())
		}
		if n := m.figures()["vault_cable_undelivered_tokens_total"]; n != 0 {
			t.Errorf("undelivered_tokens_total %v", n)
		}
	}
	t.Run("the role's storage", func(t *testing.T) {
		t.Parallel()
		m := newConfiguredMount(t)
		m.write("config", kv{"request_timeout": 1})
		gate := newGate(m.storage, "roles/ci", false)
		defer close(gate.proceed)
		check(t, m, gate)
	})
	t.Run("the configuration's storage, once its limit is known", func(t *testing.T) {
		t.Parallel()
		m := newConfiguredMount(t)
		m.write("config", kv{"request_timeout": 1})
		if _, err := m.b.state.Config(t.Context(), m.storage); err != nil {
			t.Fatal(err)
		}
		m.b.InvalidateKey(t.Context(), "config")
		gate := newGate(m.storage, "config", false)
		defer close(gate.proceed)
		check(t, m, gate)
	})
	t.Run("the mount's lease settings", func(t *testing.T) {
		t.Parallel()
		m := newConfiguredMount(t)
		m.write("config", kv{"request_timeout": 1})
		hang := make(chan struct{})
		defer close(hang)
		m.hangTTL.Store(&hang)
		check(t, m, m.storage)
	})
	t.Run("slow storage and a slow Cable", func(t *testing.T) {
		t.Parallel()
		m := newConfiguredMount(t)
		m.write("config", kv{"request_timeout": 2})
		m.sim.SetFault(Fault{Delay: time.Minute})
		gate := newGate(m.storage, "roles/ci", false)
		time.AfterFunc(1500*time.Millisecond, func() { close(gate.proceed) })
		start := time.Now()
		status, err := m.on(gate, opRead, "creds/ci", nil)
		if took := time.Since(start); status != 504 || took > 3*time.Second {
			t.Errorf("%d %v after %s, want one budget for both", status, err, took)
		}
	})
}
