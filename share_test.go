// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"pgregory.net/rapid"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
)

// fakeCable stands in for the client in a synctest bubble, which has no network. It grants tokens, late or not at all,
// and remembers them.
type fakeCable struct {
	mu       sync.Mutex
	delay    time.Duration
	failure  *cable.Error  // nil if it grants
	lifetime time.Duration // of grants, 0 for the requested one
	tokens   map[string]*fakeToken
	calls    int
	version  int         // of the settings
	underWay map[int]int // calls by version
	overlap  bool        // two calls of one version were under way at once
}

// fakeToken is a token that was granted.
type fakeToken struct {
	sent       time.Time
	expiry     time.Time
	requested  time.Duration
	generation string    // the scopes
	leaseEnd   time.Time // of the first reader
}

func (f *fakeCable) requestToken(ctx context.Context, _ *cable.Client, r cable.TokenRequest) (*cable.Token, error) {
	f.mu.Lock()
	if err := r.Allow(); err != nil {
		f.mu.Unlock()
		return nil, err
	}
	f.calls++
	generation, version := strings.Join(r.Scopes, ","), f.version
	f.underWay[version]++
	f.overlap = f.overlap || f.underWay[version] > 1
	delay, failure, granted := f.delay, f.failure, f.lifetime
	f.mu.Unlock()
	sent := time.Now()
	budget := time.Until(r.Start.Add(cable.DefaultTimeout))
	var cause *cable.Error
	select {
	case <-time.After(min(delay, budget)):
		if delay >= budget {
			cause = &cable.Error{Kind: cable.TimedOut, Detail: "the budget ran out", MaybeIssued: true, Attempts: 1}
		}
	case <-ctx.Done():
		cause = &cable.Error{Kind: cable.Canceled, Detail: "the caller left", MaybeIssued: true, Attempts: 1}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.underWay[version]--
	if cause == nil && failure != nil {
		copied := *failure
		cause = &copied
	}
	if cause != nil {
		return nil, cause
	}
	if granted == 0 {
		granted = r.Lifetime
	}
	name := fmt.Sprintf("token-%d", len(f.tokens))
	now := time.Now()
	f.tokens[name] = &fakeToken{
		sent: sent, expiry: now.Truncate(time.Second).Add(granted), requested: r.Lifetime, generation: generation,
	}
	return &cable.Token{
		Value: cable.NewSecret(name), Expiry: f.tokens[name].expiry.Unix(), OrganizationID: r.OrganizationID,
		Date: now.Truncate(time.Second), SentAt: sent, ReceivedAt: now, Attempts: 1,
	}, nil
}

// set changes how Cable behaves.
func (f *fakeCable) set(delay time.Duration, failure *cable.Error, lifetime time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.delay, f.failure, f.lifetime = delay, failure, lifetime
}

// changed notes that the settings were changed.
func (f *fakeCable) changed() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.version++
}

// overlapped reports whether two calls of one version were under way at once since the last time.
func (f *fakeCable) overlapped() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	overlap := f.overlap
	f.overlap = false
	return overlap
}

// granted returns a token by its value.
func (f *fakeCable) granted(name string) *fakeToken {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.tokens[name]
}

func (f *fakeCable) callCount() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls
}

// The times of docs/design.md, "Reuse".
const (
	fallbackLifetime = time.Minute
	patience         = time.Second
	maxBackoff       = time.Minute
)

// reuseMount is a mount in a bubble of virtual time, with a role "ci" that reuses.
type reuseMount struct {
	*testMount
	cable *fakeCable
}

func newReuseMount(t testing.TB, role kv) *reuseMount {
	t.Helper()
	m := &reuseMount{
		testMount: setUp(t, nil),
		cable:     &fakeCable{tokens: make(map[string]*fakeToken), underWay: make(map[int]int)},
	}
	m.b.requestToken = m.cable.requestToken
	t.Cleanup(func() { m.b.Cleanup(context.Background()) })
	m.write("config", kv{"refresh_key": "k", "organization_id": cabletest.DefaultOrganizationID})
	m.write("roles/ci", role)
	return m
}

var reusing = kv{"scopes": "a:b", "ttl": "1h", "reuse_for": "30m"}

// get reads creds/ci.
func (m *reuseMount) get() (*logical.Response, error) {
	resp, err := m.send(context.Background(), m.storage, opRead, "creds/ci", nil)
	_, failure := statusOf(resp, err)
	return resp, failure
}

// token reads creds/ci with success.
func (m *reuseMount) token() string {
	m.Helper()
	resp, err := m.get()
	must(m, err)
	return resp.Data["token"].(string)
}

// refusal reads creds/ci, and reports an error unless it fails with the text.
func (m *reuseMount) refusal(text string) {
	m.Helper()
	if resp, err := m.get(); err == nil || !strings.Contains(err.Error(), text) {
		m.Errorf("%v %v, want %q", resp, err, text)
	}
}

// down has the failures that mean that Cable is down, misconfigured others.
var (
	down = []*cable.Error{
		{Kind: cable.Unreachable, Detail: "connection refused", Attempts: 1},
		{Kind: cable.TimedOut, Detail: "the budget ran out", MaybeIssued: true, Attempts: 1},
		{Kind: cable.Responded, StatusCode: 500, MaybeIssued: true, Attempts: 1},
		{Kind: cable.Responded, StatusCode: 503, MaybeIssued: true, Attempts: 1},
		{Kind: cable.Responded, StatusCode: 429, RetryAfter: 5 * time.Second, Attempts: 1},
		{Kind: cable.Paused, RetryAfter: 5 * time.Second},
	}
	misconfigured = []*cable.Error{
		{Kind: cable.Unreachable, Detail: "its certificate has expired", Attempts: 1, Certificate: true},
		{Kind: cable.Responded, StatusCode: 401, Attempts: 1},
		{Kind: cable.Responded, StatusCode: 403, Attempts: 1},
		{Kind: cable.InvalidResponse, StatusCode: 200, MaybeIssued: true, Attempts: 1},
	}
)

// reuseStep is one step of a sequence, with a number to choose by.
type reuseStep struct{ kind, n int }

// TestReuseProperties checks section 8 of the design, for any sequence of reads, writes, invalidations, tuning, grants
// and outages.
func TestReuseProperties(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		steps := rapid.SliceOfN(rapid.Custom(func(rt *rapid.T) reuseStep {
			return reuseStep{rapid.IntRange(0, 12).Draw(rt, "kind"), rapid.IntRange(0, 1<<20).Draw(rt, "n")}
		}), 20, 80).Draw(rt, "steps")
		var violation string // rapid's own goroutine has to report it
		synctest.Test(t, func(t *testing.T) { violation = runReuse(t, steps) })
		if violation != "" {
			rt.Fatal(violation)
		}
	})
}

// choose returns one of the options.
func choose[T any](n int, options ...T) T { return options[n%len(options)] }

// runReuse runs the steps and returns the first promise that was broken.
func runReuse(t *testing.T, steps []reuseStep) string {
	m := newReuseMount(t, reusing)
	defer synctest.Wait()
	defer m.b.Cleanup(t.Context())
	var (
		disabled   bool
		reuseFor   = 30 * time.Minute
		ceiling    = 24 * time.Hour
		generation = "a:b"
		isDown     bool
		downUntil  time.Time // the end of the last outage
		versions   int
	)
	read := func() string {
		start, before := time.Now(), m.cable.callCount()
		resp, err := m.get()
		now := time.Now()
		switch {
		case disabled && (err == nil || m.cable.callCount() != before):
			return fmt.Sprintf("a disabled role: %v %v", resp, err)
		case disabled:
			return ""
		case err != nil && !isDown && now.Sub(downUntil) > maxBackoff:
			return fmt.Sprintf("Cable works: %v", err)
		case err != nil:
			return ""
		}
		token := m.cable.granted(resp.Data["token"].(string))
		isNew := !token.sent.Before(start)
		isFallback := strings.Contains(strings.Join(resp.Warnings, " "), "Cable is down")
		usable := min(token.requested, token.expiry.Sub(token.sent))
		remaining := token.sent.Add(usable).Sub(now)
		const rounding = 2 * time.Second
		switch {
		case isNew:
		case reuseFor == 0:
			return "a role without reuse_for reuses"
		case isFallback && remaining < fallbackLifetime-rounding:
			return fmt.Sprintf("a previous token with %s left", remaining)
		case isFallback && !isDown && now.Sub(downUntil) > maxBackoff:
			return "a previous token while Cable works"
		case !isFallback && start.Sub(token.sent) > reuseFor:
			return fmt.Sprintf("a token %s old, reuse_for is %s", start.Sub(token.sent), reuseFor)
		case !isFallback && remaining < usable/2-rounding:
			return fmt.Sprintf("a token with %s left of %s", remaining, usable)
		}
		end := now.Add(resp.Secret.TTL)
		if token.leaseEnd.IsZero() {
			token.leaseEnd = end
		}
		switch {
		case token.generation != generation:
			return fmt.Sprintf("a token of %q, the role has %q", token.generation, generation)
		case token.requested > ceiling:
			return fmt.Sprintf("a token for %s, the ceiling is %s", token.requested, ceiling)
		case end.After(token.expiry), end.After(now.Add(ceiling)), end.After(token.leaseEnd),
			resp.Secret.TTL < time.Second:
			return fmt.Sprintf("a lease until %s: the token expires %s, the first reader's lease %s, the ceiling is %s",
				end, token.expiry, token.leaseEnd, ceiling)
		}
		return ""
	}
	for i, step := range steps {
		violation := ""
		if slices.Contains([]int{8, 9, 10, 12}, step.kind) {
			m.cable.changed()
		}
		switch n := step.n; step.kind {
		case 0, 1, 2, 3:
			violation = read()
		case 4:
			time.Sleep(time.Duration(n%7200) * time.Second)
		case 5: // many at once
			var wg sync.WaitGroup
			for range 5 {
				wg.Go(func() { _, _ = m.get() })
			}
			wg.Wait()
		case 6:
			if isDown {
				downUntil = time.Now()
			}
			failure := choose(n, append(slices.Clone(down), nil, nil, nil, nil, nil, nil)...)
			delay := choose(n>>8, 0, 20*time.Millisecond, 400*time.Millisecond, 900*time.Millisecond, 30*time.Second)
			isDown = failure != nil || delay > patience
			m.cable.set(delay, failure, m.cable.lifetime)
		case 7:
			granted := choose(n, 0, 0, 40*time.Second, 90*time.Second, 1000*time.Second, 80_000*time.Second)
			m.cable.set(m.cable.delay, m.cable.failure, granted)
		case 8:
			versions++
			generation = fmt.Sprintf("a:b%c", 'a'+versions%26)
			m.write("roles/ci", kv{"scopes": generation})
		case 9:
			m.write("config", kv{"disabled": false})
			m.b.InvalidateKey(t.Context(), choose(n, "config", "roles/ci", "roles/other"))
		case 10:
			disabled = !disabled
			m.write("roles/ci", kv{"disabled": disabled})
		case 11:
			ceiling = choose(n, 300*time.Second, 1200*time.Second, time.Hour, 24*time.Hour)
			m.maxTTL.Store(int64(ceiling))
		case 12:
			reuseFor = choose(n, 0, time.Minute, 10*time.Minute, 30*time.Minute)
			m.write("roles/ci", kv{"reuse_for": int(reuseFor / time.Second)})
		}
		if overlap := m.cable.overlapped(); violation == "" && overlap && reuseFor > 0 {
			violation = "two calls of one version at once"
		}
		if violation != "" {
			return fmt.Sprintf("step %d: %s", i, violation)
		}
	}
	return ""
}

// inBubble runs a test of a mount in a bubble of its own.
func inBubble(t *testing.T, name string, f func(t *testing.T, m *reuseMount)) {
	t.Helper()
	t.Run(name, func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			m := newReuseMount(t, reusing)
			f(t, m)
			m.b.Cleanup(t.Context())
			synctest.Wait()
		})
	})
}

// TestReuse checks the rules of reuse that need the whole engine; package share has the others.
func TestReuse(t *testing.T) {
	t.Parallel()
	inBubble(t, "log and metrics", func(t *testing.T, m *reuseMount) {
		first := m.token()
		time.Sleep(30*time.Minute - time.Second)
		if m.token() != first {
			t.Error("another token before reuse_for has passed")
		}
		time.Sleep(2 * time.Second)
		if m.token() == first {
			t.Error("the same token after reuse_for has passed")
		}
		if line := m.logLine("token reused"); line["@level"] != "debug" || line["outcome"] != "reused" {
			t.Errorf("the line in the log: %v", line)
		}
		figures := m.figures()
		for series, want := range map[string]float64{
			`token_requests_total{outcome="minted",role="ci"}`: 2,
			`token_requests_total{outcome="reused",role="ci"}`: 1,
			"granted_lifetime_seconds_count":                   2,
			"token_request_duration_seconds_count":             2,
			"reused_token_age_seconds_count":                   1,
			"reused_token_readers_count":                       1,
			"reused_token_readers_sum":                         2,
		} {
			if got := figures["vault_cable_"+series]; got != want {
				t.Errorf("%s is %v, want %v", series, got, want)
			}
		}
	})
	inBubble(t, "parameters mint", func(t *testing.T, m *reuseMount) {
		first := m.token()
		for _, data := range []kv{{"ttl": 600}, {"scopes": "a:b"}, {"ttl": "1h", "scopes": "a:b"}} {
			resp, err := m.send(t.Context(), m.storage, opRead, "creds/ci", data)
			if err != nil || resp.Data["token"] == first {
				t.Errorf("%v: %v %v", data, resp, err)
			}
		}
		if m.token() != first {
			t.Error("the shared token was replaced")
		}
	})
	inBubble(t, "every write drops it", func(t *testing.T, m *reuseMount) {
		for name, drop := range map[string]func(){
			"a write that changes nothing":   func() { m.write("roles/ci", kv{"disabled": false}) },
			"a patch":                        func() { m.ok(opPatch, "roles/ci", kv{"ttl": "1h"}) },
			"config, nothing changed":        func() { m.write("config", kv{"disabled": false}) },
			"an invalidation":                func() { m.b.InvalidateKey(t.Context(), "roles/ci") },
			"an invalidation of config":      func() { m.b.InvalidateKey(t.Context(), "config") },
			"a deletion, and the role again": func() { m.ok(opDelete, "roles/ci", nil); m.write("roles/ci", reusing) },
		} {
			before := m.token()
			drop()
			if m.token() == before {
				t.Errorf("%s: the token is still returned", name)
			}
		}
		before := m.token()
		m.write("roles/other", kv{"scopes": "a:b"})
		if m.token() != before {
			t.Error("another role's write dropped the token")
		}
	})
	inBubble(t, "one call for all who wait", func(t *testing.T, m *reuseMount) {
		m.cable.set(time.Second, nil, 0)
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() { m.token() })
		}
		wg.Wait()
		if n := m.cable.callCount(); n != 1 {
			t.Errorf("%d calls", n)
		}
		if n := m.figures()[`vault_cable_token_requests_total{outcome="reused",role="ci"}`]; n != 49 {
			t.Errorf("%v reused", n)
		}
	})
	inBubble(t, "the only reader leaves", func(t *testing.T, m *reuseMount) {
		m.cable.set(10*time.Second, nil, 0)
		leave := func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if _, err := m.send(ctx, m.storage, opRead, "creds/ci", nil); err == nil {
				t.Error("a token after a second")
			}
			time.Sleep(20 * time.Second) // the call ends, and no reader waits for it
		}
		leave()
		if m.token() == "" || m.cable.callCount() != 1 {
			t.Errorf("%d calls: the token was not kept", m.cable.callCount())
		}
		m.write("config", kv{"disabled": false})
		m.wantUndelivered(0)
		leave()
		m.wantUndelivered(0)
		for range 2 {
			m.write("config", kv{"disabled": false})
			m.wantUndelivered(1)
		}
		if line := m.logLine(undelivered); line["@level"] != "warn" ||
			line["undelivered_until"] != m.cable.granted("token-1").expiry.UTC().Format(time.RFC3339) {
			t.Errorf("the line in the log: %v", line)
		}
	})
	inBubble(t, "a write during a call", func(t *testing.T, m *reuseMount) {
		m.cable.set(10*time.Second, nil, 0)
		var wg sync.WaitGroup
		var wide, earlier, later string
		wg.Go(func() { earlier = m.token() })
		time.Sleep(time.Second)
		m.write("roles/ci", kv{"scopes": "a:b,c:d"})
		wg.Go(func() { wide = m.token() })
		wg.Wait()
		if m.cable.granted(earlier).generation != "a:b" || m.cable.granted(wide).generation != "a:b,c:d" ||
			m.token() != wide {
			t.Errorf("%q and %q", earlier, wide)
		}
		time.Sleep(time.Hour)
		wg.Go(func() { m.refusal("does not allow this token any more") })
		time.Sleep(time.Second)
		m.write("roles/ci", kv{"scopes": "c:d"})
		wg.Go(func() { later = m.token() })
		wg.Wait()
		if m.cable.granted(later).generation != "c:d" || m.token() != later {
			t.Errorf("%q", later)
		}
		m.wantUndelivered(1)
	})
	inBubble(t, "disabled during a call", func(t *testing.T, m *reuseMount) {
		m.cable.set(10*time.Second, nil, 0)
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() { m.refusal("disabled") })
		}
		time.Sleep(time.Second)
		m.write("roles/ci", kv{"disabled": true})
		wg.Wait()
		m.wantUndelivered(1)
		if n := strings.Count(m.log.String(), undelivered); n != 1 {
			t.Errorf("%d lines of an undelivered token", n)
		}
	})
	inBubble(t, "reuse ends before the call is sent", func(t *testing.T, m *reuseMount) {
		connected := make(chan struct{})
		first := true
		m.b.requestToken = func(ctx context.Context, c *cable.Client, r cable.TokenRequest) (*cable.Token, error) {
			if first {
				first = false
				<-connected
			}
			return m.cable.requestToken(ctx, c, r)
		}
		m.cable.set(0, down[2], 0)
		failed := make(chan struct{})
		go func() { m.refusal("Cable responded 500"); close(failed) }()
		synctest.Wait()
		m.write("roles/ci", kv{"reuse_for": 0})
		close(connected)
		<-failed
		m.wantUndelivered(1)
		if line := m.logLine(undelivered); line["@level"] != "warn" || line["outcome"] != "cable_error" {
			t.Errorf("the request was not reported as a mint of its own: %v", line)
		}
	})
	inBubble(t, "a panic", func(t *testing.T, m *reuseMount) {
		m.b.requestToken = func(context.Context, *cable.Client, cable.TokenRequest) (*cable.Token, error) {
			panic("boom")
		}
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() { m.refusal("internal error") })
		}
		wg.Wait()
		m.b.requestToken = m.cable.requestToken
		m.token()
		figures := m.figures()
		if figures["vault_cable_panics_total"] < 1 || figures["vault_cable_token_requests_in_flight"] != 0 {
			t.Errorf("%v", figures)
		}
	})
	inBubble(t, "the mount ends", func(t *testing.T, m *reuseMount) {
		m.cable.set(15*time.Second, nil, 0)
		done := make(chan error)
		go func() { _, err := m.get(); done <- err }()
		time.Sleep(time.Second)
		start := time.Now()
		m.b.Cleanup(t.Context())
		if took := time.Since(start); took > 100*time.Millisecond {
			t.Errorf("Cleanup took %s", took)
		}
		if err := <-done; err == nil || time.Since(start) > time.Second {
			t.Errorf("after %s: %v", time.Since(start), err)
		}
	})
	inBubble(t, "a longer grant", func(t *testing.T, m *reuseMount) {
		m.cable.set(0, nil, 20*time.Hour)
		resp, err := m.get()
		if err != nil || resp.Secret.TTL > time.Hour {
			t.Fatal(resp, err)
		}
		time.Sleep(29 * time.Minute)
		if resp, err = m.get(); err != nil || resp.Secret.TTL > 31*time.Minute || m.cable.callCount() != 1 {
			t.Errorf("lease %s, %v", resp.Secret.TTL, err)
		}
		m.wantWarning(resp.Warnings, "instead of the requested 3600s")
	})
}

// TestReuseWhileCableIsDown checks which failures lead to the previous token, how status, metrics and warnings report
// it, and which writes end it. Package share has the times between calls.
func TestReuseWhileCableIsDown(t *testing.T) {
	t.Parallel()
	for _, failure := range down {
		o := string(outcome.Classify(failure).Outcome)
		inBubble(t, o+fmt.Sprint(failure.StatusCode), func(t *testing.T, m *reuseMount) {
			fallbacks := func(want string) {
				t.Helper()
				if got := fmt.Sprint(m.read("status")["reuse_fallbacks"]); got != want {
					t.Fatalf("status: %v, want %s", got, want)
				}
			}
			first := m.token()
			m.cable.set(0, failure, 0)
			// With steps of 50 s, some seconds are left at the end.
			for time.Sleep(31 * time.Minute); ; time.Sleep(50 * time.Second) {
				left := time.Until(m.cable.granted(first).sent.Add(time.Hour))
				resp, err := m.get()
				if left < fallbackLifetime {
					if err == nil {
						t.Errorf("a token with %s left", left)
					}
					break
				}
				if err != nil || resp.Data["token"] != first {
					t.Fatalf("%s left: %v %v", left, resp, err)
				}
				m.wantWarning(resp.Warnings, "Cable is down ("+o+")", "previous token")
				fallbacks("map[ci:" + o + "]")
			}
			fallbacks("map[]")
			if got := m.read("status"); o != "paused" && got["last_failure_outcome"] != o {
				t.Errorf("the last failure in status: %v", got)
			}
			if n := m.figures()[`vault_cable_reuse_fallbacks_total{cause="`+o+`"}`]; n < 25 {
				t.Errorf("%v fallbacks", n)
			}
			m.cable.set(0, nil, 0)
			time.Sleep(maxBackoff)
			if m.token() == first {
				t.Error("the previous token while Cable works")
			}
			fallbacks("map[]")
		})
	}
	for _, failure := range misconfigured {
		inBubble(t, "not hidden: "+failure.Error(), func(t *testing.T, m *reuseMount) {
			m.token()
			m.cable.set(0, failure, 0)
			time.Sleep(31 * time.Minute)
			before := m.cable.callCount()
			for range 3 {
				m.refusal("")
			}
			if n := m.cable.callCount() - before; n != 3 {
				t.Errorf("%d calls: there is no back-off for a fault that an operator has to fix", n)
			}
		})
	}
	for name, change := range map[string]func(m *reuseMount){
		"a write ends the fallback": func(m *reuseMount) { m.write("config", kv{"request_timeout": 10}) },
		"the role may be disabled": func(m *reuseMount) {
			_, _ = m.on(&lateStorage{Storage: m.storage}, opUpdate, "roles/ci", kv{"disabled": true})
		},
	} {
		inBubble(t, name, func(_ *testing.T, m *reuseMount) {
			m.token()
			m.cable.set(0, down[0], 0)
			time.Sleep(31 * time.Minute)
			m.token()
			change(m)
			m.refusal("")
		})
	}
}

// TestReuseRace runs many readers of a role that reuses and of one that does not, writers and invalidations at once.
// Each token was minted for the role as it was at some time during the read, no token is minted for two readers, and
// connections are reused.
func TestReuseRace(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.write("roles/shared", kv{"scopes": "v:0", "ttl": "1h", "reuse_for": "30m"})
	m.sim.SetFault(Fault{Delay: time.Millisecond})
	var replacedAt, seen sync.Map // scopes and tokens
	var wg sync.WaitGroup
	ctx, stop := context.WithCancel(t.Context())
	wg.Go(func() {
		defer stop()
		last := ""
		for i := range 60 {
			scope := fmt.Sprintf("v:%d", i)
			m.write("roles/shared", kv{"scopes": scope})
			m.write("roles/ci", kv{"scopes": scope})
			replacedAt.Store(last, time.Now())
			last = scope
			if i%7 == 0 {
				m.write("config", kv{"request_timeout": 10 + i%10})
				m.b.InvalidateKey(t.Context(), "config")
				m.b.InvalidateKey(t.Context(), "roles/ci")
			}
			time.Sleep(2 * time.Millisecond)
		}
	})
	for i := range 32 {
		role := []string{"ci", "shared"}[i%2]
		wg.Go(func() {
			for ctx.Err() == nil {
				start := time.Now()
				resp, err := m.request(opRead, "creds/"+role, nil)
				_, err = statusOf(resp, err)
				if err != nil && strings.Contains(err.Error(), "does not allow this token any more") {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				scope := resp.Data["scopes"].([]string)[0]
				if replaced, ok := replacedAt.Load(scope); ok && replaced.(time.Time).Before(start) {
					t.Errorf("%s was replaced %s before the read", scope, start.Sub(replaced.(time.Time)))
				}
				if _, twice := seen.LoadOrStore(resp.Data["token"], true); twice && role == "ci" {
					t.Error("a token was returned twice")
				}
			}
		})
	}
	wg.Wait()
	before := m.sim.Connections()
	for range 2 {
		for range 64 {
			wg.Go(func() { m.read("creds/ci") })
		}
		wg.Wait()
	}
	// A pool of two connections would make about 126 for these 128 calls.
	if made := m.sim.Connections() - before; made > 70 {
		t.Errorf("%d connections for two rounds of 64 calls", made)
	}
}
