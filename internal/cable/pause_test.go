// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// checkSpread checks that calls are spread over the time within, so that each tenth of it has at most three times its
// share.
func checkSpread(t *testing.T, calls []cabletest.Call, from time.Time, within time.Duration) {
	t.Helper()
	parts := make([]int, 10)
	for _, call := range calls {
		after := call.Time.Sub(from)
		if after < 0 || after >= within {
			t.Errorf("a call after %s, want it within %s", after, within)
			continue
		}
		parts[after*10/within]++
	}
	t.Logf("%d calls in ten parts of %s: %v", len(calls), within, parts)
	if most := slices.Max(parts); most > 3*len(calls)/10 {
		t.Errorf("%d of %d calls are in one tenth of %s", most, len(calls), within)
	}
}

// TestPause pins the pause after a 429. Token requests fail at once with the remaining time, without a call, and are
// spread when it ends.
func TestPause(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		sim, c := newMemory(t, Config{})
		sim.SetFault(rateLimit(1, "90"))
		start := time.Now()
		if e := mustFail(t, t.Context(), c); e.Kind != Responded || e.RetryAfter != 90*time.Second || e.Attempts != 1 {
			t.Errorf("got %+v, want 429 and 90s", e)
		}
		for _, err := range mintAll(t, c, 200) {
			var e *Error
			if !errors.As(err, &e) || e.Kind != Paused || e.RetryAfter != 90*time.Second || e.Attempts != 0 ||
				e.MaybeIssued || e.StatusCode != 0 {
				t.Errorf("in the pause: %+v", err)
			}
		}
		if took := time.Since(start); took != 0 {
			t.Errorf("failing took %s", took)
		}
		time.Sleep(90*time.Second - time.Millisecond)
		e := mustFail(t, t.Context(), c)
		if e.Kind != Paused || e.RetryAfter != time.Millisecond {
			t.Errorf("just before the end: %+v", e)
		}
		if want := "paused after Cable's 429: no API call for another 1s"; e.Error() != want {
			t.Errorf("got %q, want %q", e, want)
		}
		if n := sim.CallCount(); n != 1 {
			t.Errorf("%d calls in the pause, want 1", n)
		}
		time.Sleep(time.Millisecond)
		end := time.Now()
		if err := errors.Join(mintAll(t, c, 200)...); err != nil {
			t.Errorf("after the pause: %v", err)
		}
		checkSpread(t, sim.Calls()[1:], end, pauseSpread)
		time.Sleep(pauseSpread)
		before := time.Now()
		if err := errors.Join(mintAll(t, c, 200)...); err != nil {
			t.Errorf("later: %v", err)
		}
		if took := time.Since(before); took != 0 {
			t.Errorf("later, requests still wait: %s", took)
		}
	})
}

// TestPauseLength pins how long a pause is. See also TestRetryAfter.
func TestPauseLength(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		for retryAfter, want := range map[string]time.Duration{
			"": defaultPause, "soon": defaultPause, "1": time.Second, "300": maxPause, "301": maxPause,
			"9223372036854775807": maxPause,
		} {
			sim, c := newMemory(t, Config{Timeout: 500 * time.Millisecond})
			sim.SetFault(rateLimit(1, retryAfter))
			if e := mustFail(t, t.Context(), c); e.StatusCode != 429 || e.RetryAfter != want {
				t.Errorf("%q: status %d, retry after %s, want %s", retryAfter, e.StatusCode, e.RetryAfter, want)
			}
			time.Sleep(want - 1)
			if e := mustFail(t, t.Context(), c); e.Kind != Paused || e.RetryAfter != 1 {
				t.Errorf("%q: just before the end: %+v", retryAfter, e)
			}
			time.Sleep(time.Nanosecond)
			mustMint(t, c)
		}
	})
}

// TestPauseNeverShrinks pins that a pause is extended by a later 429, but never shortened, because calls that were
// under way when it began may return either.
func TestPauseNeverShrinks(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		sim, c := newMemory(t, Config{Timeout: 30 * time.Second})
		for i, retryAfter := range []string{"60", "40", "soon", "90"} {
			f := rateLimit(1, retryAfter)
			f.Delay = time.Duration(i+1) * time.Second // all are under way when the first response arrives
			sim.AddFault(f)
		}
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() { mustFail(t, t.Context(), c) })
			synctest.Wait() // the faults are taken in this order
		}
		for i, want := range []time.Duration{60 * time.Second, 59 * time.Second, 58 * time.Second, 90 * time.Second} {
			time.Sleep(time.Second)
			synctest.Wait()
			if got := c.Pause().Remaining(); got != want {
				t.Errorf("after response %d: %s left, want %s", i+1, got, want)
			}
		}
		wg.Wait()
	})
}

// TestPauseIsPassedOn pins that a new client starts without a pause, or shares the one that it is given.
func TestPauseIsPassedOn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		sim, first := newMemory(t, Config{})
		sim.SetFault(rateLimit(1, "60"))
		mustFail(t, t.Context(), first)
		free := newMemoryClient(t, sim, Config{})
		if free.Pause().Remaining() != 0 {
			t.Error("a new client starts with a pause")
		}
		if _, err := free.RequestToken(t.Context(), testRequest()); err != nil {
			t.Errorf("a new client: %v", err)
		}
		next := newMemoryClient(t, sim, Config{Pause: first.Pause()})
		if e := mustFail(t, t.Context(), next); e.Kind != Paused || e.RetryAfter != time.Minute {
			t.Errorf("the next client: %+v", e)
		}
		if n := sim.CallCount(); n != 2 {
			t.Errorf("%d calls, want 2", n)
		}
		time.Sleep(time.Minute + pauseSpread)
		sim.SetFault(rateLimit(1, "30"))
		mustFail(t, t.Context(), next)
		if e := mustFail(t, t.Context(), first); e.Kind != Paused || e.RetryAfter != 30*time.Second {
			t.Errorf("the first client: %+v", e)
		}
	})
}

// TestPauseStopsWaiters pins that a 429 stops the token requests that wait, be it for a retry, for their share of the
// spread after a pause, and for a call to end.
func TestPauseStopsWaiters(t *testing.T) {
	t.Parallel()
	for name, wait := range map[string]func(sim *cabletest.Simulator, c *Client){
		"for a retry": func(sim *cabletest.Simulator, _ *Client) { sim.SetFault(rateLimit(1, "5")) },
		"for the spread": func(_ *cabletest.Simulator, c *Client) {
			c.pause.begin(time.Second)
			time.Sleep(time.Second)
		},
		"for a call to end": func(_ *cabletest.Simulator, c *Client) {
			for range maxConns {
				c.turns <- struct{}{}
			}
			time.AfterFunc(time.Second, func() { <-c.turns })
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				sim, c := newMemory(t, Config{})
				wait(sim, c)
				attempts := 0
				if name == "for a retry" {
					attempts = 1
				}
				var wg sync.WaitGroup
				wg.Go(func() {
					diffError(t, Error{Kind: Paused, Attempts: attempts}, mustFail(t, t.Context(), c))
				})
				synctest.Wait()
				c.pause.begin(time.Minute) // as another call would
				wg.Wait()
				if n := sim.CallCount(); n != attempts || len(c.turns) == maxConns {
					t.Errorf("%d calls, want %d; %d turns", n, attempts, len(c.turns))
				}
			})
		})
	}
}

// TestSpreadKeepsToTheBudget pins that the wait after a pause takes at most half of the budget.
func TestSpreadKeepsToTheBudget(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		for range 100 {
			sim, c := newMemory(t, Config{Timeout: time.Second})
			c.pause.begin(time.Second)
			time.Sleep(time.Second)
			start := time.Now()
			mustMint(t, c)
			if waited := sim.Calls()[0].Time.Sub(start); waited > 500*time.Millisecond {
				t.Errorf("waited %s of a second", waited)
			}
		}
	})
}
