// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/state"
)

// delayToken delays the first token that Cable returns until proceed is closed. arrived is closed when it is there.
func (m *testMount) delayToken() (arrived, proceed chan struct{}) {
	arrived, proceed = make(chan struct{}), make(chan struct{})
	var first sync.Once
	m.b.requestToken = func(ctx context.Context, c *cable.Client, r cable.TokenRequest) (*cable.Token, error) {
		token, err := c.RequestToken(ctx, r)
		first.Do(func() {
			close(arrived)
			<-proceed
		})
		return token, err
	}
	return arrived, proceed
}

// wantRefusedToken checks the report of the one token that arrived and was refused, with its real expiry.
func (m *testMount) wantRefusedToken(outcome string) {
	m.Helper()
	m.wantUndelivered(1)
	expiry := m.sim.Minted()[0].Expiry.UTC().Format(time.RFC3339)
	if line := m.logLine(undelivered); line["@level"] != "warn" || line["outcome"] != outcome ||
		line["undelivered_until"] != expiry {
		m.Errorf("the line in the log: %v, want %s", line, expiry)
	}
}

// TestDisabledMeanwhile checks token requests that are under way while their role or the mount is disabled, deleted or
// narrowed. Once that write has returned, no API call is sent with a right that it took away, and no token is returned.
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
	narrowings := map[string]func(m *testMount){
		"a scope taken away":      func(m *testMount) { m.write("roles/ci", kv{"scopes": "person:read"}) },
		"a shorter lifetime":      func(m *testMount) { m.write("roles/ci", kv{"max_ttl": 600}) },
		"another organization":    func(m *testMount) { m.write("roles/ci", kv{"organization_id": "org_2"}) },
		"config's organization":   func(m *testMount) { m.write("config", kv{"organization_id": "org_2"}) },
		"an organization removed": func(m *testMount) { m.write("roles/named", kv{"organization_ids": "org_b"}) },
		"another destination": func(m *testMount) {
			m.write("config", kv{"refresh_key": m.sim.RefreshKey(), "token_url": cable.DefaultTokenURL})
		},
		"a role created instead": func(m *testMount) {
			m.ok(opDelete, "roles/ci", nil)
			m.write("roles/ci", kv{"scopes": "a:b"})
		},
	}
	for name, change := range changes {
		for _, key := range []string{"config", "roles/ci"} {
			t.Run(name+", while "+key+" is read", func(t *testing.T) {
				t.Parallel()
				m := newConfiguredMount(t)
				gate := newGate(m.storage, key, false)
				done := m.start(gate, opRead, "creds/ci", nil)
				<-gate.reached
				change(m)
				close(gate.proceed)
				if err := <-done; err == nil || m.sim.CallCount() != 0 {
					t.Errorf("%v, Cable was called %d times", err, m.sim.CallCount())
				}
			})
		}
		t.Run(name+", before a retry", func(t *testing.T) {
			t.Parallel()
			m := newConfiguredMount(t)
			m.sim.SetFault(Fault{Status: 429, Times: 1, Header: map[string]string{"Retry-After": "1"}})
			done := m.start(m.storage, opRead, "creds/ci", nil)
			m.calls(1)
			change(m)
			if err := <-done; err == nil || m.sim.CallCount() != 1 {
				t.Errorf("%v, Cable was called %d times", err, m.sim.CallCount())
			}
		})
		narrowings[name] = change
	}
	for name, change := range narrowings {
		t.Run(name+", while Cable responds", func(t *testing.T) {
			t.Parallel()
			m := newConfiguredMount(t)
			m.write("roles/named", kv{"scopes": "person:read", "organization_ids": "org_a,org_b"})
			m.sim.SetFault(Fault{Grant: &Grant{Lifetime: ptr(2 * time.Hour)}})
			arrived, proceed := m.delayToken()
			path, parameters := "creds/ci", kv(nil)
			if name == "an organization removed" {
				path, parameters = "creds/named", kv{"organization_id": "org_a"}
			}
			done := m.start(m.storage, opRead, path, parameters)
			<-arrived
			change(m)
			close(proceed)
			if err := <-done; err == nil || !strings.Contains(err.Error(),
				"Cable may have issued a token that was not delivered, valid until "+m.until(2*time.Hour)) {
				t.Errorf("the token was returned, or not reported: %v", err)
			}
			m.wantRefusedToken("invalid_request")
		})
	}
	t.Run("verify_role, after it has read config", func(t *testing.T) {
		t.Parallel()
		m := newConfiguredMount(t)
		gate := newGate(m.storage, "config", false)
		done := m.start(gate, opUpdate, "config", kv{"verify_role": "ci", "request_timeout": 10})
		<-gate.reached
		m.write("config", kv{"disabled": true})
		close(gate.proceed)
		if err := <-done; err == nil || m.sim.CallCount() != 0 {
			t.Errorf("%v, Cable was called %d times", err, m.sim.CallCount())
		}
	})
	t.Run("narrowed, before the call", func(t *testing.T) {
		t.Parallel()
		m := newConfiguredMount(t)
		gate := newGate(m.storage, "config", false)
		done := m.start(gate, opRead, "creds/ci", nil)
		<-gate.reached
		m.write("roles/ci", kv{"scopes": "person:read"})
		close(gate.proceed)
		must(t, <-done)
		if calls := m.sim.Calls(); len(calls) != 1 || len(calls[0].Scopes) != 1 {
			t.Errorf("the role as it was before the write was used: %+v", calls)
		}
	})
	t.Run("narrowed, before a retry", func(t *testing.T) {
		t.Parallel()
		m := newConfiguredMount(t)
		m.sim.SetFault(Fault{Status: 429, Times: 1, Header: map[string]string{"Retry-After": "1"}})
		done := m.start(m.storage, opRead, "creds/ci", nil)
		m.calls(1)
		m.write("roles/ci", kv{"scopes": "person:read"})
		must(t, <-done)
		if calls := m.sim.Calls(); len(calls) != 2 || len(calls[1].Scopes) != 1 {
			t.Errorf("the retry was sent for the role as it was before the write: %+v", calls)
		}
	})
	t.Run("the caller leaves, while Cable responds", func(t *testing.T) {
		t.Parallel()
		m := newConfiguredMount(t)
		arrived, proceed := m.delayToken()
		ctx, leave := context.WithCancel(t.Context())
		done := m.startWith(ctx, m.storage, opRead, "creds/ci", nil)
		<-arrived
		leave()
		close(proceed)
		if err := <-done; err == nil {
			t.Error("the token was returned")
		}
		m.wantRefusedToken("canceled")
	})
}

// TestBudgetFromReceipt checks that request_timeout begins when the request is received, and that a call to Vault that
// hangs is abandoned at its end.
func TestBudgetFromReceipt(t *testing.T) {
	t.Parallel()
	for name, hang := range map[string]func(m *testMount) (s logical.Storage, release func()){
		"the role's storage": func(m *testMount) (logical.Storage, func()) {
			gate := newGate(m.storage, "roles/ci", false)
			return gate, func() { close(gate.proceed) }
		},
		"the configuration's storage, once its limit is known": func(m *testMount) (logical.Storage, func()) {
			m.live()
			m.b.InvalidateKey(m.Context(), "config")
			gate := newGate(m.storage, "config", false)
			return gate, func() { close(gate.proceed) }
		},
		"the mount's lease settings": func(m *testMount) (logical.Storage, func()) {
			hang := make(chan struct{})
			m.hangTTL.Store(&hang)
			return m.storage, func() { close(hang) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newConfiguredMount(t)
			m.write("config", kv{"request_timeout": 1})
			s, release := hang(m)
			defer release()
			start := time.Now()
			status, err := m.on(s, opRead, "creds/ci", nil)
			if took := time.Since(start); status != 504 || took < 900*time.Millisecond || took > 5*time.Second ||
				m.sim.CallCount() != 0 {
				t.Errorf("%d %v after %s, Cable was called %d times", status, err, took, m.sim.CallCount())
			}
			m.wantUndelivered(0)
		})
	}
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
