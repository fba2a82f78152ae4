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
	maxPause     = 5 * time.Minute // however long Cable asks for; a wrong Retry-After must not stop a mount for a day
	defaultPause = 5 * time.Second // after a 429 that names no time; Cable publishes no limits
	pauseSpread  = 2 * time.Second // over which waiting calls are spread then; together they would cause the next 429
)

// Pause is the pause after a 429. Until it ends, every token request fails at once; after it, calls start spread out.
// One Pause belongs to one refresh key at one URL; [Config].Pause passes it on. The zero value is no pause.
type Pause struct {
	mu    sync.Mutex
	until time.Time // monotonic
}

// Remaining returns how long the pause still lasts, or 0.
func (p *Pause) Remaining() time.Duration { return max(0, -p.sinceEnd()) }

// sinceEnd returns the time since the pause ended, negative until then.
func (p *Pause) sinceEnd() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Since(p.until)
}

// begin starts or extends the pause, and reports whether it started. It never shortens one.
func (p *Pause) begin(d time.Duration) (started bool) {
	now := time.Now()
	until := now.Add(min(d, maxPause))
	p.mu.Lock()
	defer p.mu.Unlock()
	started = !p.until.After(now) && until.After(now)
	if until.After(p.until) {
		p.until = until
	}
	return started
}

// check returns an *Error of kind Paused until the pause ends.
func (p *Pause) check() error {
	if left := p.Remaining(); left > 0 {
		return &Error{Kind: Paused, RetryAfter: left}
	}
	return nil
}

// spread waits for a random part of the time over which calls are spread after a pause, and of half of the time until
// ctx's deadline.
func (p *Pause) spread(ctx context.Context) error {
	deadline, _ := ctx.Deadline() // a budget always has one
	left := min(pauseSpread-p.sinceEnd(), time.Until(deadline)/2)
	if left <= 0 {
		return nil
	}
	return sleep(ctx, jitter(left))
}

// sleep waits for d, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// jitter returns a random part of d.
func jitter(d time.Duration) time.Duration {
	return rand.N(d) //nolint:gosec // G404, but it spreads load, and guards nothing
}
