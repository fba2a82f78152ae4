// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// heldFor says how long enter refuses for, 0 where it lets pass.
func heldFor(t *testing.T, err error) time.Duration {
	t.Helper()
	if err == nil {
		return 0
	}
	var e *Error
	if !errors.As(err, &e) || e.Kind != Paused {
		t.Fatalf("got %v, want an error of kind Paused", err)
	}
	return e.RetryAfter
}

// TestHoldTimes pins when a pause begins, how long it lasts, and that it is
// bounded.
func TestHoldTimes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := new(Pause)
		if got := heldFor(t, h.enter(t.Context())); got != 0 {
			t.Errorf("a new hold refuses for %s", got)
		}
		h.begin(90 * time.Second)
		h.begin(10 * time.Second) // a shorter one changes nothing
		if got := heldFor(t, h.enter(t.Context())); got != 90*time.Second {
			t.Errorf("held for %s, want 90s", got)
		}
		time.Sleep(89 * time.Second)
		if got := heldFor(t, h.enter(t.Context())); got != time.Second {
			t.Errorf("held for %s, want 1s", got)
		}
		time.Sleep(time.Second)
		if got := heldFor(t, h.enter(t.Context())); got != 0 || h.Remaining() != 0 {
			t.Errorf("held for %s after the end", got)
		}
		h.begin(24 * time.Hour)
		if got := h.Remaining(); got != 5*time.Minute {
			t.Errorf("a pause of a day lasts %s, want 5m", got)
		}
	})
}

// TestHoldSpread pins that callers who come when a pause ends do not all
// arrive at once, that those who come later do not wait, and that a pause which
// begins meanwhile stops those who wait.
func TestHoldSpread(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := new(Pause)
		h.begin(time.Second)
		time.Sleep(time.Second)
		start := time.Now()
		var mu sync.Mutex
		arrivals := make(map[int]int) // by tenths of a second
		var wg sync.WaitGroup
		for range 200 {
			wg.Go(func() {
				if err := h.enter(t.Context()); err != nil {
					t.Error(err)
				}
				mu.Lock()
				arrivals[int(time.Since(start)/(100*time.Millisecond))]++
				mu.Unlock()
			})
		}
		wg.Wait()
		for tenth, n := range arrivals {
			if n > 40 || tenth >= 20 {
				t.Errorf("%d of 200 arrive in tenth %d of a second", n, tenth)
			}
		}
		time.Sleep(3 * time.Second)
		start = time.Now()
		if err := h.enter(t.Context()); err != nil || time.Since(start) != 0 {
			t.Errorf("a late caller waited %s: %v", time.Since(start), err)
		}

		h.begin(time.Second)
		time.Sleep(time.Second)
		var held int
		for range 50 {
			wg.Go(func() {
				if heldFor(t, h.enter(t.Context())) > 0 {
					mu.Lock()
					held++
					mu.Unlock()
				}
			})
		}
		synctest.Wait()
		h.begin(time.Minute)
		wg.Wait()
		if held < 45 {
			t.Errorf("%d of 50 were stopped by the next pause", held)
		}
	})
}

// TestHoldKeepsToTheBudget pins that waiting one's turn leaves time to call,
// and ends with the caller.
func TestHoldKeepsToTheBudget(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		for range 100 {
			h := new(Pause)
			h.begin(time.Second)
			time.Sleep(time.Second)
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			start := time.Now()
			if err := h.enter(ctx); err != nil || time.Since(start) > 500*time.Millisecond {
				t.Errorf("waited %s of a second: %v", time.Since(start), err)
			}
			cancel()
			if err := h.enter(ctx); !errors.Is(err, context.Canceled) {
				t.Errorf("a caller that is gone: %v", err)
			}
		}
	})
}
