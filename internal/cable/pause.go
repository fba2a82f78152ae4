// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"
)

const (
	// maxHold bounds a pause that Cable asks for: a nonsense Retry-After must
	// not silence a mount for a day.
	maxHold = 5 * time.Minute

	// defaultHold is the pause after a 429 that names no time. Cable publishes
	// no limits, so this only has to be long enough to stop the knocking.
	defaultHold = 5 * time.Second

	// holdSpread is the time after a pause over which waiting callers are
	// spread, so that they do not bring the next 429 by arriving at once.
	holdSpread = 2 * time.Second
)

// Pause is the pause after a 429: until it ends, every request fails at once
// instead of knocking again, and for a short time after it requests start
// spread out. One Pause serves one refresh key at one URL; it may be handed from
// a [Client] to its successor by [Config].Pause.
type Pause struct {
	mu    sync.Mutex
	until time.Time // monotonic
}

// Remaining is how long the pause still lasts, or 0.
func (h *Pause) Remaining() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	return max(0, time.Until(h.until))
}

// begin starts or lengthens the pause, and reports whether it started; a
// shorter one than is under way changes nothing.
func (h *Pause) begin(d time.Duration) (started bool) {
	now := time.Now()
	until := now.Add(min(d, maxHold))
	h.mu.Lock()
	defer h.mu.Unlock()
	started = !h.until.After(now) && until.After(now)
	if until.After(h.until) {
		h.until = until
	}
	return started
}

// enter lets a request pass, at once or after its share of the spread, or says
// why not.
func (h *Pause) enter(ctx context.Context) error {
	h.mu.Lock()
	since := time.Since(h.until)
	h.mu.Unlock()
	if since >= holdSpread {
		return nil
	}
	if since >= 0 {
		left := holdSpread - since
		if deadline, ok := ctx.Deadline(); ok {
			left = min(left, time.Until(deadline)/2)
		}
		if left > 0 {
			timer := time.NewTimer(jitter(left))
			defer timer.Stop()
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-timer.C:
			}
		}
	}
	if left := h.Remaining(); left > 0 {
		return &Error{Kind: Paused, RetryAfter: left}
	}
	return nil
}

// jitter is a random part of d, so that callers who start together part.
func jitter(d time.Duration) time.Duration {
	return rand.N(d) //nolint:gosec // G404: it spreads load, and guards nothing
}
