// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// Reuse, on a real Vault: its rules are tested in the root package, its effects on
// readers, operators and Cable here.

// shareRole configures the mount, and makes app a role whose readers share a
// token for reuseFor seconds.
func (m *mount) shareRole(t testing.TB, reuseFor int, config ...map[string]any) {
	t.Helper()
	m.configure(t, config...)
	m.ok(t, "POST", m.path+"/roles/app", map[string]any{"ttl": "10m", "reuse_for": reuseFor})
}

// figure reads one series of the mount's metrics.
func (m *mount) figure(t testing.TB, series string) int {
	t.Helper()
	for line := range strings.Lines(m.ok(t, "GET", m.path+"/metrics", nil).text) {
		if value, ok := strings.CutPrefix(line, series+" "); ok {
			n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				t.Fatalf("%s: %v", series, err)
			}
			return int(n)
		}
	}
	return 0
}

// requests returns how many token requests ended with an outcome, as status
// shows it.
func (m *mount) requests(t testing.TB, outcome string) int64 {
	t.Helper()
	counts, _ := m.ok(t, "GET", m.path+"/status", nil).Data["token_requests"].(map[string]any)
	text, _ := counts[outcome].(json.Number)
	n, _ := text.Int64()
	return n
}

// outage is a way in which Cable is down.
type outage struct {
	outcome string
	fault   cabletest.Fault
	timeout string // request_timeout
	status  int64  // of Cable's, in status
	orphan  int    // tokens that Cable may have issued
}

// TestReuseInOutage shows that Cable is down for longer than reuse_for and shorter than
// the token's lifetime. No read fails, each response says why it has the
// previous token, operators see it, and Cable is called once in 5 seconds.
func TestReuseInOutage(t *testing.T) {
	t.Parallel()
	v := sharedServer(t)
	for _, o := range []outage{
		{outcome: "cable_error", fault: cabletest.Fault{Status: 500}, timeout: "20s", status: 500, orphan: 1},
		{outcome: "unreachable", fault: cabletest.Fault{Reset: cabletest.ResetBefore}, timeout: "20s", orphan: 1},
		{outcome: "timed_out", fault: cabletest.Fault{Delay: time.Minute}, timeout: "1s", orphan: 1},
		{
			outcome: "rate_limited",
			fault:   cabletest.Fault{Status: 429, Header: map[string]string{"Retry-After": "120"}},
			timeout: "20s",
			status:  429,
		},
	} {
		t.Run(o.outcome, func(t *testing.T) {
			t.Parallel()
			m := newMount(t, v, nil)
			m.shareRole(t, 1, map[string]any{"request_timeout": o.timeout})
			first := m.read(t)
			leaseEnd := m.expireTime(t, first.LeaseID)
			m.sim.SetFault(o.fault)

			var warned int // reads that returned the previous token because Cable is down
			read := func() (warning string) {
				t.Helper()
				a := m.read(t)
				if a.token() != first.token() {
					t.Fatalf("another token than before the outage, with warnings %q", a.Warnings)
				}
				if end := m.expireTime(t, a.LeaseID); end.After(leaseEnd) {
					t.Errorf("a lease ends at %s, the first one at %s", end, leaseEnd)
				}
				if len(a.Warnings) == 0 && warned > 0 {
					t.Error("a response in the outage has no warning")
				}
				if len(a.Warnings) > 0 {
					warned++
					return a.Warnings[0]
				}
				return ""
			}
			fallsBackFor := func(outcome string) func() bool {
				text := "Cable is down (" + outcome + "), so the previous token is returned, valid until " +
					first.Data["expires_at"].(string) + ": "
				return func() bool {
					warning := read()
					if warning != "" && !strings.HasPrefix(warning, text) {
						t.Fatalf("warning %q, want %q", warning, text)
					}
					return warning != ""
				}
			}
			waitFor(t, 10*time.Second, "the outage is noticed", fallsBackFor(o.outcome))
			began := time.Now()
			t.Logf("%s", read())

			// Operators see it in status, metrics and the log.
			status := m.ok(t, "GET", m.path+"/status", nil)
			if down, _ := status.Data["reuse_fallbacks"].(map[string]any); down["app"] != o.outcome {
				t.Errorf("status: reuse_fallbacks %v, want app: %s", status.Data["reuse_fallbacks"], o.outcome)
			}
			if status.Data["last_failure_outcome"] != o.outcome || status.Data["last_failure_role"] != "app" ||
				status.number("last_failure_cable_status") != o.status || status.Data["last_failure_at"] == "" {
				t.Errorf("status of the last failure: %s", status)
			}
			if n := m.figure(t, "vault_cable_undelivered_tokens_total"); n != o.orphan {
				t.Errorf("undelivered_tokens_total is %d, want %d", n, o.orphan)
			}
			if !m.logHas("token request failed", m.path, "[WARN]", "outcome="+o.outcome) {
				t.Error("the log does not say that a token request failed")
			}

			if o.outcome == "rate_limited" {
				// The next call is not sent: it falls into the pause.
				waitFor(t, 15*time.Second, "a paused call", func() bool {
					warning := read()
					return strings.HasPrefix(warning, "Cable is down (paused), so the previous token is returned")
				})
				if n := m.sim.CallCount(); n != 2 {
					t.Errorf("%d calls, want 2: the one that minted, and the 429", n)
				}
				if n := m.figure(t, `vault_cable_reuse_fallbacks_total{cause="paused"}`); n == 0 {
					t.Error("no fallback is counted for the pause")
				}
				// A write of the configuration gives the fallback up.
				m.ok(t, "POST", m.path+"/config", map[string]any{"request_timeout": o.timeout})
				if a := m.do(t, "GET", m.path+"/creds/app", nil); a.status != 429 || a.token() != "" {
					t.Errorf("after a write of config: status %d, want 429", a.status)
				}
				return
			}
			for time.Since(began) < 3*time.Second { // longer than reuse_for
				if read() == "" {
					t.Error("a read in the outage has no warning")
				}
				time.Sleep(pollInterval)
			}
			if n := m.sim.CallCount(); n != 2 {
				t.Errorf("%d calls, want 2: the one that minted, and one in the first 5 s of the outage", n)
			}
			if n := m.figure(t, fmt.Sprintf("vault_cable_reuse_fallbacks_total{cause=%q}", o.outcome)); n != warned {
				t.Errorf("reuse_fallbacks_total is %d, want %d", n, warned)
			}

			// Cable is back.
			m.sim.ClearFaults()
			var a *response
			waitFor(t, 15*time.Second, "a new token", func() bool { a = m.read(t); return a.token() != first.token() })
			if len(a.Warnings) > 0 {
				t.Errorf("when Cable is back: warnings %q", a.Warnings)
			}
			status = m.ok(t, "GET", m.path+"/status", nil)
			if down, ok := status.Data["reuse_fallbacks"].(map[string]any); !ok || len(down) > 0 {
				t.Errorf("status when Cable is back: reuse_fallbacks %v", status.Data["reuse_fallbacks"])
			}
		})
	}
}

// TestReuseHidesNoFault shows that a fault that only an operator can fix fails
// reads, although the previous token is still valid.
func TestReuseHidesNoFault(t *testing.T) {
	t.Parallel()
	v := sharedServer(t)
	fails := func(t *testing.T, m *mount, status int, outcome, text string) {
		t.Helper()
		var a *response
		waitFor(t, 10*time.Second, "a read that fails", func() bool {
			a = m.do(t, "GET", m.path+"/creds/app", nil)
			if len(a.Warnings) > 0 {
				t.Fatalf("a fallback: %q", a.Warnings)
			}
			return a.status != 200
		})
		t.Log(a)
		if a.status != status || !strings.Contains(message(a), text) {
			t.Errorf("%s, want %d with %q", a, status, text)
		}
		s := m.ok(t, "GET", m.path+"/status", nil)
		if s.Data["last_failure_outcome"] != outcome || m.requests(t, outcome) == 0 {
			t.Errorf("status: %s", s)
		}
		if down, ok := s.Data["reuse_fallbacks"].(map[string]any); !ok || len(down) > 0 {
			t.Errorf("reuse_fallbacks: %v", s.Data["reuse_fallbacks"])
		}
	}
	t.Run("401", func(t *testing.T) {
		t.Parallel()
		m := newMount(t, v, nil)
		m.shareRole(t, 1)
		m.read(t)
		m.sim.SetRefreshKey(cabletest.NewRefreshKey()) // rotated at Cable, not here
		fails(t, m, 400, "key_rejected", "write a valid refresh_key to config")
	})
	t.Run("certificate", func(t *testing.T) {
		t.Parallel()
		m := newMount(t, v, nil)
		good, root := issue(t, "localhost")
		bad, _ := issue(t, "localhost")
		var shown atomic.Pointer[tls.Certificate]
		shown.Store(&good)
		srv := httptest.NewUnstartedServer(m.sim.Simulator)
		srv.TLS = &tls.Config{
			GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return shown.Load(), nil },
			SessionTicketsDisabled: true, // another host would not resume the session either
		}
		srv.Config.ErrorLog = log.New(io.Discard, "", 0) // it reports the refused handshakes
		srv.StartTLS()
		t.Cleanup(srv.Close)
		_, port, _ := strings.Cut(strings.TrimPrefix(srv.URL, "https://"), ":")
		m.shareRole(t, 1, map[string]any{
			"token_url": "https://localhost:" + port + m.sim.Path(),
			"ca_cert":   string(root),
		})
		m.read(t)
		shown.Store(&bad)
		srv.CloseClientConnections()
		fails(t, m, 502, "unreachable", "certificate")
	})
}

// gate is a Cable that lets no call through until it is opened.
type gate struct {
	*httptest.Server
	arrived atomic.Int32
	opened  chan struct{}
}

// newGate puts a closed gate in front of the mount's Cable.
func newGate(t *testing.T, m *mount) *gate {
	g := &gate{opened: make(chan struct{})}
	g.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g.arrived.Add(1)
		select {
		case <-g.opened:
			m.sim.ServeHTTP(w, r)
		case <-r.Context().Done(): // the engine hung up
		}
	}))
	t.Cleanup(g.CloseClientConnections)
	t.Cleanup(g.Close)
	return g
}

// TestReuseReadersLeave shows that a reader that leaves does not end the call that others
// wait for. If all leave, its token is kept for the next reader.
func TestReuseReadersLeave(t *testing.T) {
	t.Parallel()
	v := sharedServer(t)
	for name, stays := range map[string]bool{"one stays": true, "all leave": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMount(t, v, nil)
			g := newGate(t, m)
			m.shareRole(t, 300, map[string]any{"token_url": g.URL + m.sim.Path()})
			read := request{method: "GET", path: m.path + "/creds/app", token: m.root}

			ctx, leave := context.WithCancel(t.Context())
			defer leave()
			const leaving = 3
			left := make(chan error, leaving)
			for range leaving {
				go func() {
					_, err := m.callContext(ctx, read)
					left <- err
				}()
			}
			waitFor(t, 10*time.Second, "the call", func() bool { return g.arrived.Load() > 0 })
			stayed := make(chan *response, 1)
			if stays {
				go func() {
					a, err := m.call(read)
					if err != nil {
						t.Error(err)
					}
					stayed <- a
				}()
			}
			leave()
			for range leaving {
				if err := <-left; !errors.Is(err, context.Canceled) {
					t.Errorf("a reader that left: %v", err)
				}
			}
			// Vault ends the requests of callers that left; one may not have come to
			// the engine at all.
			waitFor(t, 10*time.Second, "the engine knows that readers left",
				func() bool { return m.requests(t, "canceled") > 0 })
			close(g.opened)

			var got *response
			if stays {
				got = <-stayed
			} else {
				waitFor(t, 10*time.Second, "the end of the call", func() bool { return len(m.sim.Minted()) == 1 })
				got = m.read(t)
			}
			if n := g.arrived.Load(); got == nil || got.status != 200 || n != 1 || m.sim.Stats().Minted != 1 ||
				got.token() != m.sim.Minted()[0].Token {
				t.Errorf("%d calls, %+v: want one call, and its token", n, m.sim.Stats())
			}
			if n := m.figure(t, "vault_cable_undelivered_tokens_total"); n != 0 {
				t.Errorf("undelivered_tokens_total is %d", n)
			}
		})
	}
}

// TestReuseManyReaders shows that many readers at once get one token, by one call, each
// with a lease of its own that ends no later than the one of the read that
// minted.
func TestReuseManyReaders(t *testing.T) {
	t.Parallel()
	const readers = 64
	m := newMount(t, sharedServer(t), nil)
	m.shareRole(t, 300)
	m.sim.SetFault(cabletest.Fault{Delay: 200 * time.Millisecond})
	leases := map[string]bool{}
	for round := range 2 {
		for _, a := range m.readAll(t, readers) {
			if a.status != 200 || a.token() != m.sim.Minted()[round].Token || a.LeaseID == "" || leases[a.LeaseID] {
				t.Errorf("status %d, another token, or the lease %q again", a.status, a.LeaseID)
			}
			leases[a.LeaseID] = true
		}
		if stats := m.sim.Stats(); stats.Calls != round+1 || stats.Minted != round+1 {
			t.Errorf("%d reads: %+v", readers, stats)
		}
		m.ok(t, "POST", m.path+"/roles/app", map[string]any{"ttl": "10m"}) // drops the token
	}
	if n := m.leaseCount(m.path + "/creds/app"); n != 2*readers {
		t.Errorf("%d leases, want %d", n, 2*readers)
	}
	if minted, reused := m.requests(t, "minted"), m.requests(t, "reused"); minted != 2 || reused != 2*(readers-1) {
		t.Errorf("status counts %d minted, %d reused", minted, reused)
	}

	m.sim.ClearFaults()
	first := m.read(t)
	firstEnd := m.expireTime(t, first.LeaseID)
	// Leases are in whole seconds, so look at every part of one.
	for start := time.Now(); time.Since(start) < 1500*time.Millisecond; time.Sleep(pollInterval) {
		a := m.read(t)
		end := m.expireTime(t, a.LeaseID)
		if a.token() != first.token() || end.After(firstEnd) || firstEnd.Sub(end) > 5*time.Second {
			t.Errorf("a lease ends %s after the first one, with the same token: %t", end.Sub(firstEnd),
				a.token() == first.token())
		}
	}
}

// TestReuseWrapped shows that a reused read can be wrapped.
func TestReuseWrapped(t *testing.T) {
	t.Parallel()
	m := newMount(t, sharedServer(t), nil)
	m.shareRole(t, 300)
	token := m.read(t).token()
	a, err := m.call(request{
		method: "GET", path: m.path + "/creds/app", token: m.root,
		header: map[string]string{"X-Vault-Wrap-TTL": "60"},
	})
	if err != nil || a.status != 200 || a.WrapInfo == nil {
		t.Fatalf("wrapping: %s, %v", a, err)
	}
	if secret := findSecret(a.text, false); secret != "" {
		t.Errorf("the wrapping response contains %s", secret)
	}
	a, err = m.call(request{method: "PUT", path: "sys/wrapping/unwrap", token: a.WrapInfo.Token})
	if err != nil || a.status != 200 || a.token() != token || a.LeaseID == "" || a.LeaseDuration < 500 {
		t.Errorf("unwrapping: status %d, lease %q of %ds, %v", a.status, a.LeaseID, a.LeaseDuration, err)
	}
	if n := m.sim.CallCount(); n != 1 {
		t.Errorf("%d calls, want 1", n)
	}
}
