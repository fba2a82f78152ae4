// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"strconv"
	"strings"
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

// TestReuseInOutage shows an outage of Cable that lasts longer than reuse_for and
// shorter than the token. No read fails, each response and the log say why readers get
// the previous token, and Cable is called once in 5 seconds. The other ways to be down,
// and the faults that are not hidden, are tested in the root package; status and metrics
// with the runbook.
func TestReuseInOutage(t *testing.T) {
	t.Parallel()
	m := newMount(t, sharedServer(t), nil)
	m.shareRole(t, 1)
	first := m.read(t)
	leaseEnd := m.expireTime(t, first.LeaseID)
	m.sim.SetFault(cabletest.Fault{Status: 500})
	began := time.Now()

	want := "Cable is down (cable_error), so the previous token is returned, valid until " +
		first.Data["expires_at"].(string) + ": "
	fallsBack := func() bool {
		t.Helper()
		a := m.read(t)
		if end := m.expireTime(t, a.LeaseID); a.token() != first.token() || end.After(leaseEnd) {
			t.Fatalf("another token than before the outage, or a lease that ends %s after the first", end.Sub(leaseEnd))
		}
		if len(a.Warnings) == 0 {
			return false
		}
		if !strings.HasPrefix(a.Warnings[0], want) {
			t.Fatalf("warning %q, want %q", a.Warnings[0], want)
		}
		return true
	}
	waitFor(t, 10*time.Second, "the outage is noticed", fallsBack)
	for range 10 {
		if !fallsBack() {
			t.Error("a read in the outage has no warning")
		}
	}
	if !m.logHas("token request failed", m.path, "[WARN]", "outcome=cable_error") {
		t.Error("the log does not say that a token request failed")
	}

	// The call that minted, the first that failed, and then at most one in 5 s.
	if n := m.sim.CallCount(); n < 2 || n > 2+int(time.Since(began)/(5*time.Second)) {
		t.Errorf("%d calls in %s of an outage", n, time.Since(began))
	}

	m.sim.ClearFaults()
	waitFor(t, 15*time.Second, "a new token", func() bool { return m.read(t).token() != first.token() })
}

// TestReuseReadersLeave shows that readers that leave do not end the call that another
// waits for.
func TestReuseReadersLeave(t *testing.T) {
	t.Parallel()
	m := newMount(t, sharedServer(t), nil)
	m.shareRole(t, 300)
	m.sim.SetFault(cabletest.Fault{Delay: 3 * time.Second})
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	const leaving = 3
	left := make(chan error, leaving)
	for range leaving {
		go func() {
			_, err := m.callContext(ctx, request{method: "GET", path: m.path + "/creds/app", token: m.root})
			left <- err
		}()
	}
	waitFor(t, 10*time.Second, "the call", func() bool { return m.sim.CallCount() > 0 })
	leave()
	for range leaving {
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Errorf("a reader that left: %v", err)
		}
	}
	// Vault ends the requests of callers that left. One may not have come to the engine
	// at all.
	waitFor(t, 10*time.Second, "the engine knows that readers left",
		func() bool { return m.requests(t, "canceled") > 0 })
	a := m.read(t)
	if minted := m.sim.Minted(); len(minted) != 1 || a.token() != minted[0].Token || m.sim.CallCount() != 1 {
		t.Errorf("%+v: want one call, and its token", m.sim.Stats())
	}
	if n := m.figure(t, "vault_cable_undelivered_tokens_total"); n != 0 {
		t.Errorf("undelivered_tokens_total is %d", n)
	}
}

// TestReuseManyReaders shows that many readers at once get one token, by one call, each
// with a lease of its own.
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
}
