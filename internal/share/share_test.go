// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package share

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/lifetime"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/state"
)

const (
	testLifetime = time.Hour
	testReuseFor = 30 * time.Minute
	testBudget   = 20 * time.Second
)

// testRole is a role "ci" in a bubble of virtual time, whose readers share, with a
// Cable that is slow, fails, and grants short lifetimes.
type testRole struct {
	testing.TB
	storage logical.InmemStorage
	store   *state.Store
	roles   *Roles
	budget  time.Duration

	mu       sync.Mutex
	takes    time.Duration
	failure  error
	granted  time.Duration // 0 if as requested
	calls    []time.Time   // when each began
	underWay map[state.Version]int
	tokens   []*minted
	byToken  map[*cable.Token]*minted
}

// minted is a token that Cable granted, and its fate.
type minted struct {
	requested   time.Duration
	readers     int
	undelivered int
	ends        time.Time // the lease that the call decided
	first       bool      // a reader received it as minted, not as reused
}

func newTestRole(t testing.TB) *testRole {
	w := &testRole{
		TB:       t,
		budget:   testBudget,
		underWay: make(map[state.Version]int),
		byToken:  make(map[*cable.Token]*minted),
	}
	w.roles = NewRoles(func(int) {})
	w.store = state.New(func(cable.Call) {}, w.roles.Retire)
	t.Cleanup(w.store.Close)
	config := state.NewConfig()
	config.RefreshKey = cable.NewSecret("k")
	w.put(state.ConfigKey, config)
	w.putRole("ci")
	return w
}

func (w *testRole) put(key string, e interface{ Encode() ([]byte, error) }) {
	w.Helper()
	raw, err := e.Encode()
	if err == nil {
		err = w.storage.Put(context.Background(), &logical.StorageEntry{Key: key, Value: raw})
	}
	if err != nil {
		w.Fatal(err)
	}
}

// putRole changes a role, as another node does.
func (w *testRole) putRole(name string) {
	w.put(state.RoleKey(name), &state.Role{Scopes: []string{"a:b"}, TTL: testLifetime, ReuseFor: testReuseFor})
	w.store.Invalidate(state.RoleKey(name))
}

// set changes how Cable behaves.
func (w *testRole) set(takes time.Duration, failure error, granted time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.takes, w.failure, w.granted = takes, failure, granted
}

// call is Reader.Call for a reader with these settings.
func (w *testRole) call(set state.Settings, requested time.Duration, started time.Time) (*outcome.Token, error) {
	if !w.store.IsCurrent(set) {
		return nil, outcome.ErrChanged
	}
	sent := time.Now()
	if !sent.Equal(started) {
		w.Errorf("the budget began %s before the call", sent.Sub(started))
	}
	w.mu.Lock()
	takes, failure, granted := w.takes, w.failure, w.granted
	w.calls = append(w.calls, sent)
	if w.underWay[set.Version]++; w.underWay[set.Version] > 1 {
		w.Error("two shared calls of one version are under way")
	}
	w.mu.Unlock()
	time.Sleep(min(takes, testBudget))
	w.mu.Lock()
	defer w.mu.Unlock()
	w.underWay[set.Version]--
	if takes >= testBudget {
		return nil, outcome.Classify(&cable.Error{Kind: cable.TimedOut, MaybeIssued: true, Attempts: 1})
	}
	if failure != nil {
		return nil, failure
	}
	if granted == 0 {
		granted = requested
	}
	now := time.Now()
	token := &outcome.Token{Token: &cable.Token{
		Expiry: now.Add(granted).Unix(), Date: now.Truncate(time.Second), SentAt: sent, ReceivedAt: now, Attempts: 1,
	}}
	var err error
	if token.Lease, token.Lifetime, err = lifetime.Lease(token.Token, requested, now); err != nil {
		return nil, outcome.Drop(outcome.Mismatch(err.Error()), token.Token)
	}
	m := &minted{requested: requested, ends: now.Add(token.Lease)}
	w.tokens, w.byToken[token.Token] = append(w.tokens, m), m
	return token, nil
}

// settings returns the settings of the role "ci".
func (w *testRole) settings() state.Settings {
	set, err := w.store.Settings(context.Background(), &w.storage, "ci", time.Now())
	if err != nil {
		w.Fatal(err)
	}
	return set
}

// read is a token request, which starts over when its settings have changed. check
// takes the place of Reader.Check.
func (w *testRole) read(ctx context.Context, name string, most time.Duration, check func() error) (Result, error) {
	var deadline time.Time
	if w.budget > 0 {
		deadline = time.Now().Add(w.budget)
	}
	for {
		set, err := w.store.Settings(ctx, &w.storage, name, time.Now())
		if err != nil || set.Role == nil {
			w.Errorf("settings %+v, %v", set, err)
			return Result{}, err
		}
		result, ok, err := w.roles.Read(ctx, Reader{
			Role:     name,
			Settings: set,
			Lifetime: most,
			Deadline: deadline,
			Check:    check,
			Call: func(started time.Time) (*outcome.Token, error) {
				return w.call(set, most, started)
			},
			Undelivered: func(token *outcome.Token) {
				w.mu.Lock()
				defer w.mu.Unlock()
				w.byToken[token.Token].undelivered++
			},
		})
		if !ok {
			return result, errTooMany
		}
		if !errors.Is(err, outcome.ErrChanged) {
			w.received(result, most, err)
			return result, err
		}
		if w.store.IsCurrent(set) {
			w.Error("a reader of current settings starts over")
		}
	}
}

var (
	errTooMany = errors.New("too many roles share")
	errCheck   = outcome.Refusal("the role was disabled meanwhile")
	errDown    = outcome.Classify(&cable.Error{Kind: cable.Responded, StatusCode: 503, MaybeIssued: true, Attempts: 3})
)

// received notes a token that a reader received, and checks it against the rules.
func (w *testRole) received(r Result, most time.Duration, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if (r.Token == nil) == (err == nil) {
		w.Errorf("a token and an error, or neither: %+v %v", r, err)
	}
	if r.Token == nil {
		return
	}
	now := time.Now()
	m := w.byToken[r.Token.Token]
	ends := now.Add(r.Token.Lease)
	left := min(m.requested, r.Token.Lifetime) - r.Age
	const check = time.Second // the longest check, which follows the decision
	isFresh := r.Age <= testReuseFor+check && left >= min(m.requested, r.Token.Lifetime)/2-check
	switch {
	case r.Token.Lease < time.Second || ends.After(time.Unix(r.Token.Expiry, 0)):
		w.Errorf("a lease of %s for a token with %s left", r.Token.Lease, time.Until(time.Unix(r.Token.Expiry, 0)))
	case m.requested > most:
		w.Errorf("a token for which %s was requested, and the ceiling is %s", m.requested, most)
	case ends.After(m.ends) || r.Reused && ends.After(m.ends.Add(-leaseMargin)):
		w.Errorf("a lease ends %s after that of the read that minted, reused: %t", ends.Sub(m.ends), r.Reused)
	case r.Reused && !r.Waited && r.Fallback == "" && !isFresh:
		w.Errorf("a token of age %s with %s left was reused", r.Age, left)
	case r.Fallback != "" && (left < fallbackLifetime-check || len(r.Token.Warnings) == 0):
		w.Errorf("a fallback with %s left, warnings %q", left, r.Token.Warnings)
	case r.Fallback == outcome.KeyRejected || r.Fallback == outcome.GrantMismatch:
		w.Errorf("the previous token is returned, although Cable is not down: %s", r.Fallback)
	case m.undelivered > 0:
		w.Error("a token that counted as undelivered is returned")
	case !r.Reused && m.first:
		w.Error("a token is minted for two readers")
	}
	m.first = m.first || !r.Reused
	m.readers++
}

// settled checks, once every token is dropped, that each was received or counted once.
func (w *testRole) settled() {
	w.Helper()
	w.roles.Retire("")
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, m := range w.tokens {
		if (m.readers == 0) != (m.undelivered == 1) || m.undelivered > 1 {
			w.Errorf("token %d was returned %d times and counted %d times", i, m.readers, m.undelivered)
		}
	}
}

func ok() error { return nil }

// TestRandomSchedules runs readers that come, wait and leave, while checks fail, the
// ceiling changes, the role and the configuration are changed, and Cable is slow, fails
// and grants short lifetimes. The rules are checked at each read and at the end.
func TestRandomSchedules(t *testing.T) {
	t.Parallel()
	failures := []error{
		errDown,
		outcome.Classify(&cable.Error{Kind: cable.Unreachable, Attempts: 3}),
		outcome.Classify(&cable.Error{Kind: cable.Unreachable, Certificate: true, Attempts: 1}),
		outcome.Classify(&cable.Error{Kind: cable.Responded, StatusCode: 429, RetryAfter: time.Minute, Attempts: 1}),
		outcome.Classify(&cable.Error{Kind: cable.Paused, RetryAfter: 10 * time.Second}),
		outcome.Classify(&cable.Error{Kind: cable.Responded, StatusCode: 401, Attempts: 1}),
		outcome.Classify(outcome.Mismatch("another organization")),
		outcome.ErrChanged,
	}
	for seed := range uint64(200) {
		synctest.Test(t, func(t *testing.T) {
			w := newTestRole(t)
			random := rand.New(rand.NewPCG(seed, 0))
			upTo := func(d time.Duration) time.Duration { return time.Duration(random.Int64N(int64(d) + 1)) }
			most := testLifetime
			var readers sync.WaitGroup
			for range 150 {
				switch random.IntN(12) {
				case 0:
					w.putRole("ci")
				case 1:
					w.store.Invalidate(state.ConfigKey)
				case 2:
					most = []time.Duration{testLifetime, testLifetime / 2, lifetime.Max}[random.IntN(3)]
				case 3:
					w.set(upTo(25*time.Second), nil, 0)
				case 4:
					w.set(upTo(2*time.Second), nil, time.Second+upTo(6*time.Second))
				case 5:
					w.set(upTo(5*time.Second), failures[random.IntN(len(failures)-1)], 0)
				case 6:
					w.set(0, nil, 0)
				case 7:
					time.Sleep(upTo(40 * time.Minute))
				}
				for range random.IntN(5) {
					most, leaves, checks, fails := most, upTo(10*time.Second), upTo(time.Second), random.IntN(5) == 0
					ctx, cancel := t.Context(), context.CancelFunc(func() {})
					if random.IntN(3) == 0 {
						ctx, cancel = context.WithCancel(ctx)
						time.AfterFunc(leaves, cancel)
					}
					readers.Go(func() {
						defer cancel()
						start := time.Now()
						_, err := w.read(ctx, "ci", most, func() error {
							time.Sleep(checks)
							if fails {
								return errCheck
							}
							return context.Cause(ctx)
						})
						if took := time.Since(start); took > testBudget+2*time.Second {
							t.Errorf("a read took %s: %v", took, err)
						}
					})
				}
				time.Sleep(upTo(3 * time.Second))
			}
			readers.Wait()
			time.Sleep(testBudget)
			synctest.Wait()
			w.settled()
			if t.Failed() {
				t.Fatalf("seed %d", seed)
			}
		})
		if t.Failed() {
			return
		}
	}
}

// TestShortTokens checks that readers who wait for a token of a few seconds get it, or
// a 502.
func TestShortTokens(t *testing.T) {
	t.Parallel()
	for granted := time.Second; granted < 8*time.Second; granted += time.Second {
		synctest.Test(t, func(t *testing.T) {
			w := newTestRole(t)
			w.set(time.Second, nil, granted)
			var readers sync.WaitGroup
			var got, refused int
			for range 5 {
				readers.Go(func() {
					_, err := w.read(t.Context(), "ci", testLifetime, ok)
					w.mu.Lock()
					defer w.mu.Unlock()
					if got++; err != nil {
						refused++
						if f := outcome.Classify(err); f.Outcome.Status() != http.StatusBadGateway {
							t.Errorf("%s: %v", f.Outcome, err)
						}
					}
				})
			}
			readers.Wait()
			if got != 5 || granted < 3*time.Second && refused < 4 || granted > 6*time.Second && refused > 0 {
				t.Errorf("of a token of %s: %d of %d refused", granted, refused, got)
			}
			// Later readers, whenever they come, mint if no lease is left.
			w.set(0, nil, granted)
			for range 10 {
				time.Sleep(400 * time.Millisecond)
				if _, err := w.read(t.Context(), "ci", testLifetime, ok); err != nil && granted > 3*time.Second {
					t.Errorf("a reader of a role with a token of %s: %v", granted, err)
				}
			}
			// A second is the shortest lease.
			for granted, age := range map[time.Duration]time.Duration{8: 4, 4: 0} { // seconds
				granted, age = granted*time.Second, age*time.Second
				w.set(0, nil, granted)
				w.roles.Retire("")
				_, _ = w.read(t.Context(), "ci", testLifetime, ok)
				time.Sleep(age)
				result, err := w.read(t.Context(), "ci", testLifetime, ok)
				if err != nil || !result.Reused || result.Token.Lease != time.Second {
					t.Errorf("%s after a call for a token of %s: %+v %v", age, granted, result, err)
				}
			}
			w.settled()
		})
	}
}

// TestUndelivered checks the ways in which a shared token is received by no reader. It
// counts once, when it is dropped, and not while a reader may still receive it.
func TestUndelivered(t *testing.T) {
	t.Parallel()
	leave := func(w *testRole, after time.Duration) {
		ctx, cancel := context.WithTimeout(w.Context(), after)
		defer cancel()
		result, err := w.read(ctx, "ci", testLifetime, ok)
		if !errors.Is(err, context.DeadlineExceeded) || !result.Waited {
			w.Errorf("a reader that left: %+v %v", result, err)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
	}
	for name, tt := range map[string]struct {
		read          func(w *testRole)
		before, after int // counted before and after all tokens are dropped
	}{
		"the only reader leaves": {func(w *testRole) { leave(w, time.Second) }, 0, 1},
		"and a later one receives it": {func(w *testRole) {
			leave(w, time.Second)
			if result, err := w.read(w.Context(), "ci", testLifetime, ok); !result.Reused {
				w.Errorf("another request minted it: %+v %v", result, err)
			}
		}, 0, 0},
		"and a later one receives it while Cable is down": {func(w *testRole) {
			leave(w, time.Second)
			time.Sleep(testReuseFor)
			w.set(0, errDown, 0)
			if result, err := w.read(w.Context(), "ci", testLifetime, ok); !result.Reused {
				w.Errorf("another request minted it: %+v %v", result, err)
			}
		}, 0, 0},
		"the role is changed, it left": {func(w *testRole) {
			time.AfterFunc(2*time.Second, func() { w.putRole("ci") })
			leave(w, time.Second)
		}, 1, 1},
		"the token is too short to be kept": {func(w *testRole) {
			w.set(5*time.Second, nil, 8*time.Second)
			leave(w, time.Second)
		}, 1, 1},
		"the only reader is refused": {func(w *testRole) {
			_, _ = w.read(w.Context(), "ci", testLifetime, func() error { return errCheck })
		}, 0, 1},
		"the only reader's check panics": {func(w *testRole) {
			defer func() { _ = recover() }()
			_, _ = w.read(w.Context(), "ci", testLifetime, func() error { panic("storage") })
		}, 0, 1},
		"the ceiling was lowered": {func(w *testRole) {
			time.AfterFunc(2*time.Second, func() { _, _ = w.read(w.Context(), "ci", testLifetime/2, ok) })
			leave(w, time.Second)
		}, 1, 1},
		"dropped while a reader checks, and refused": {func(w *testRole) {
			_, _ = w.read(w.Context(), "ci", testLifetime, func() error { w.putRole("ci"); return errCheck })
		}, 1, 1},
		"dropped while a reader checks": {func(w *testRole) {
			_, _ = w.read(w.Context(), "ci", testLifetime, func() error { w.roles.Retire("ci"); return nil })
		}, 0, 0},
		"dropped while one of two checks": {func(w *testRole) {
			time.AfterFunc(time.Second, func() {
				_, _ = w.read(w.Context(), "ci", testLifetime, func() error { w.roles.Retire("ci"); return errCheck })
			})
			_, _ = w.read(w.Context(), "ci", testLifetime, func() error { time.Sleep(time.Hour); return errCheck })
		}, 1, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newTestRole(t)
				w.set(5*time.Second, nil, 0)
				tt.read(w)
				sum := func() (n int) {
					w.mu.Lock()
					defer w.mu.Unlock()
					for _, m := range w.tokens {
						n += m.undelivered
					}
					return n
				}
				if n := sum(); n != tt.before {
					t.Errorf("%d counted before the drop, want %d", n, tt.before)
				}
				w.settled()
				if n := sum(); n != tt.after {
					t.Errorf("%d counted, want %d", n, tt.after)
				}
			})
		})
	}
}

// TestBackoff checks the time between the calls of a role while Cable is down, with and
// without a previous token, and that a reader's patience costs a hanging Cable one call
// at a time.
func TestBackoff(t *testing.T) {
	t.Parallel()
	for _, hasToken := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newTestRole(t)
			if hasToken {
				_, _ = w.read(t.Context(), "ci", testLifetime, ok)
				time.Sleep(testReuseFor) // which is half of the lifetime, too
				if result, err := w.read(t.Context(), "ci", testLifetime, ok); !result.Reused {
					t.Errorf("at the end of reuse_for: %+v %v", result, err)
				}
				time.Sleep(time.Second)
			}
			w.set(0, errDown, 0)
			w.calls = nil
			start := time.Now()
			for time.Since(start) < 5*time.Minute {
				calls := len(w.calls)
				isShared, warnings, peekErr := w.roles.Peek("ci", w.settings(), testLifetime, nil)
				result, err := w.read(t.Context(), "ci", testLifetime, ok)
				if isCall := len(w.calls) > calls; isShared != (hasToken && !isCall) ||
					isShared && !slices.Equal(warnings, result.Token.Warnings) ||
					!isShared && !isCall && fmt.Sprint(peekErr) != fmt.Sprint(err) || isCall && peekErr != nil {
					t.Errorf("peeked %t %q %v, and read %+v %v", isShared, warnings, peekErr, result, err)
				}
				if result.Waited != (len(w.calls) > calls) || result.CallFailed == hasToken {
					t.Errorf("after %d calls instead of %d: %+v", len(w.calls), calls, result)
				}
				if hasToken != (err == nil) || hasToken && result.Fallback != outcome.CableError {
					t.Fatalf("%+v %v", result, err)
				}
				if f := outcome.Classify(err); f != nil && len(w.calls) == 1 && time.Since(start) > 0 &&
					(f.RetryAfter != minBackoff-time.Since(start) || !strings.Contains(f.Message, "for another ")) {
					t.Errorf("after %s: retry after %s: %s", time.Since(start), f.RetryAfter, f.Message)
				}
				down := w.roles.Down()
				if (len(down) == 1) != hasToken || hasToken && down["ci"] != string(outcome.CableError) {
					t.Errorf("down: %v", down)
				}
				time.Sleep(500 * time.Millisecond)
			}
			var at []int
			for _, c := range w.calls {
				at = append(at, int(c.Sub(start)/time.Second))
			}
			if want := []int{0, 5, 15, 35, 75, 135, 195, 255}; !slices.Equal(at, want) {
				t.Errorf("calls at %v s, want %v", at, want)
			}
			w.set(0, nil, 0)
			time.Sleep(maxBackoff)
			if _, err := w.read(t.Context(), "ci", testLifetime, ok); err != nil || len(w.roles.Down()) > 0 {
				t.Errorf("after the outage: %v, down: %v", err, w.roles.Down())
			}
			// A failure of another kind has no back-off.
			time.Sleep(testReuseFor + time.Second)
			w.set(0, outcome.Classify(&cable.Error{Kind: cable.Responded, StatusCode: 401, Attempts: 1}), 0)
			w.calls = nil
			for range 2 {
				_, _ = w.read(t.Context(), "ci", testLifetime, ok)
			}
			if len(w.calls) != 2 {
				t.Errorf("%d calls of two reads with a key that is rejected", len(w.calls))
			}
			// The call would fail before it is sent.
			badProxy := outcome.Classify(&cable.Error{Kind: cable.Unreachable, Certificate: true})
			for ready, want := range map[*outcome.Failure]bool{errDown: true, badProxy: false} {
				isShared, warnings, err := w.roles.Peek("ci", w.settings(), testLifetime, ready)
				if isShared != want || len(warnings) > 0 != want || err == nil != want ||
					!want && !errors.Is(err, ready) {
					t.Errorf("peeked %t %q %v", isShared, warnings, err)
				}
			}
			if isShared, _, err := w.roles.Peek("ci", w.settings(), testLifetime, nil); isShared || err != nil {
				t.Errorf("peeked %t %v, and a read would make a call", isShared, err)
			}
			w.settled()
		})
	}
}

// TestPatience checks how long readers with a usable previous token wait for a call
// that hangs, and that the call goes on.
func TestPatience(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newTestRole(t)
		_, _ = w.read(t.Context(), "ci", testLifetime, ok)
		time.Sleep(testReuseFor + time.Second)
		w.set(10*time.Second, nil, 0)
		for i, want := range []time.Duration{10 * time.Second, patience, 0} {
			time.AfterFunc(time.Duration(i)*800*time.Millisecond, func() {
				start := time.Now()
				result, err := w.read(t.Context(), "ci", testLifetime, ok)
				want = max(0, want-time.Duration(i%2)*800*time.Millisecond)
				if time.Since(start) != want || err != nil || !result.Waited {
					t.Errorf("reader %d: %+v %v after %s, want %s", i, result, err, time.Since(start), want)
				}
				if isFallback := result.Fallback == outcome.TimedOut; isFallback != (i > 0) {
					t.Errorf("reader %d: fallback %q", i, result.Fallback)
				}
			})
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if len(w.calls) != 2 {
			t.Errorf("%d calls", len(w.calls))
		}
		// After a success the first reader waits until its budget ends, and after a failure no longer than the others.
		for _, want := range []time.Duration{w.budget / 4, patience} {
			time.Sleep(testReuseFor)
			if want == patience {
				w.set(0, errDown, 0)
				_, _ = w.read(t.Context(), "ci", testLifetime, ok)
				time.Sleep(minBackoff)
			}
			w.set(10*time.Second, nil, 0)
			w.budget = testBudget / 4
			start := time.Now()
			result, err := w.read(t.Context(), "ci", testLifetime, ok)
			if time.Since(start) != want || result.Fallback != outcome.TimedOut {
				t.Errorf("%+v %v after %s, want %s", result, err, time.Since(start), want)
			}
			time.Sleep(time.Minute)
		}
		// A minute before the previous token expires is the last time that it is returned.
		w.roles.Retire("")
		w.set(0, nil, 0)
		_, _ = w.read(t.Context(), "ci", testLifetime, ok)
		time.Sleep(testLifetime - time.Minute)
		w.set(0, errDown, 0)
		for _, want := range []outcome.Outcome{outcome.CableError, ""} {
			if result, err := w.read(t.Context(), "ci", testLifetime, ok); result.Fallback != want {
				t.Errorf("%+v %v, want the fallback %q", result, err, want)
			}
			time.Sleep(time.Nanosecond)
		}
		w.settled()
	})
}

// TestRoom checks that a role gives up its place once its token has expired and its
// back-off has ended, and not before.
func TestRoom(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newTestRole(t)
		drops := 0
		w.roles.dropped = func(int) { drops++ }
		read := func(name string, want error) {
			t.Helper()
			if _, err := w.read(t.Context(), name, testLifetime, ok); !errors.Is(err, want) {
				t.Errorf("%s: %v, want %v", name, err, want)
			}
		}
		for i := range 4096 {
			w.putRole(fmt.Sprintf("r%d", i))
			read(fmt.Sprintf("r%d", i), nil)
		}
		w.putRole("late")
		read("ci", errTooMany)
		time.Sleep(testLifetime - time.Second/2)
		read("ci", errTooMany)
		w.roles.roles["r0"].last = nil // as after a failure
		w.roles.roles["r0"].failures, w.roles.roles["r0"].failedAt = 5, time.Now()
		w.roles.roles["r3"].last, w.roles.roles["r3"].failedAt = nil, time.Now() // as after a key that was rejected
		w.roles.roles["r4"].last, w.roles.roles["r4"].failures = nil, 1          // as after an outage that has ended
		idle := w.roles.roles["r2"]
		time.Sleep(time.Second / 2) // every token has expired
		read("ci", errTooMany)      // because a reader looked for room half a second ago
		time.Sleep(time.Second / 2)
		w.set(10*time.Second, errDown, 0)
		for _, name := range []string{"r1", "ci"} {
			go read(name, errDown)
			synctest.Wait()
		}
		if len(w.roles.roles) != 3 || w.roles.roles["r0"] == nil || w.roles.roles["r1"] == nil || drops != 4092 {
			t.Errorf("%d roles share, %d tokens were dropped", len(w.roles.roles), drops)
		}
		if _, err := idle.read(t.Context(), Reader{}); !errors.Is(err, outcome.ErrChanged) {
			t.Errorf("a reader that came just before the role gave up its place: %v", err)
		}
		time.Sleep(time.Minute)
		if w.roles.Retire("r1"); len(w.roles.roles) != 2 {
			t.Errorf("%d roles share after one was deleted", len(w.roles.roles))
		}
		w.roles.Retire("")
		if len(w.roles.roles) > 0 {
			t.Errorf("%d roles share after a change of the configuration", len(w.roles.roles))
		}
	})
}

// TestVersions checks that readers of newer settings replace the token of older ones,
// and that a reader of older settings starts over and changes nothing.
func TestVersions(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newTestRole(t)
		var dropped []int
		w.store = state.New(func(cable.Call) {}, func(string) {}) // as before the change is known
		w.roles = NewRoles(func(readers int) { dropped = append(dropped, readers) })
		old, err := w.store.Settings(t.Context(), &w.storage, "ci", time.Now())
		if err != nil {
			t.Fatal(err)
		}
		for i, want := range []time.Duration{testLifetime - time.Second, testLifetime - 3*time.Second} {
			result, err := w.read(t.Context(), "ci", testLifetime, ok)
			if result.Reused != (i > 0) || err != nil || result.Token.Lease != want {
				t.Errorf("reader %d: %+v %v, want a lease of %s", i, result, err, want)
			}
		}
		outdated := w.roles.roles["ci"]
		w.putRole("ci")
		_, _ = w.read(t.Context(), "ci", testLifetime, ok)
		if len(w.calls) != 2 || !slices.Equal(dropped, []int{2}) {
			t.Errorf("%d calls, dropped %v", len(w.calls), dropped)
		}
		reader := Reader{Role: "ci", Settings: old, Lifetime: testLifetime, Check: ok}
		if _, isShared, err := w.roles.Read(t.Context(), reader); !isShared || !errors.Is(err, outcome.ErrChanged) {
			t.Errorf("a reader of older settings: %t %v", isShared, err)
		}
		if _, err := outdated.read(t.Context(), reader); !errors.Is(err, outcome.ErrChanged) {
			t.Errorf("a reader that came just before the change: %v", err)
		}
		for i, set := range []state.Settings{w.settings(), old} {
			isShared, warnings, err := w.roles.Peek("ci", set, testLifetime, nil)
			if isShared != (i == 0) || len(warnings) > 0 || err != nil {
				t.Errorf("settings %d: peeked %t %q %v", i, isShared, warnings, err)
			}
		}
		if result, err := w.read(t.Context(), "ci", testLifetime, ok); !result.Reused || len(w.calls) != 2 {
			t.Errorf("the token was dropped: %+v %v", result, err)
		}
		time.Sleep(testReuseFor + time.Second)
		w.set(10*time.Second, errDown, 0)
		w.budget = 0 // so that the reader waits as long as the call takes
		time.AfterFunc(time.Second, func() { w.roles.Retire("ci") })
		if result, err := w.read(t.Context(), "ci", testLifetime, ok); result.Token != nil {
			t.Errorf("a dropped token is returned: %+v %v", result, err)
		}
	})
}
