// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
)

// Reuse. With reuse_for on a role, readers share a token, so that a fleet does
// not use up Cable's rate limit and fewer tokens exist that nobody can revoke.
//
//   - A read without parameters returns the role's current token if its call was
//     sent at most reuse_for ago and at least half of its lifetime remains. Else
//     it mints, once for all readers that are waiting.
//   - Each reader gets a lease of its own, which ends no later than that of the
//     read that minted. A token is reused only if the lifetime requested for it
//     is at most the present ceiling.
//   - There is one shared call at a time, per role and generation of role and
//     configuration. It runs for request_timeout from its own start, whoever
//     leaves, and touches neither storage nor system view.
//   - If Cable is down, readers get the previous token while it is valid for
//     another minute, with a warning. After such a failure the role makes no
//     shared call for 5 s, doubling up to 60 s.
//   - Nothing is stored. Every write, deletion or invalidation of the role or of
//     config drops the token; see cache.
const (
	// fallbackLifetime is the least remaining lifetime of a previous token that is
	// returned while Cable is down.
	fallbackLifetime = time.Minute

	// patience is how long a shared call may run before readers with a previous
	// token stop waiting for it: all but the first one after a success.
	patience = time.Second

	// leaseMargin is how much sooner a reused token's lease ends than the one of
	// the read that minted: that may have lost a second by rounding, and Vault
	// starts to count when it stores a lease, a little later than the engine.
	leaseMargin = 2 * time.Second

	minBackoff = 5 * time.Second
	maxBackoff = time.Minute
)

// sharedRole is what the readers of a role share, for one generation of the
// role and the configuration.
type sharedRole struct {
	settings
	dropped func(readers int) // called for each token that is dropped

	mu       sync.Mutex
	isOld    bool         // the role or the configuration was written since
	token    *sharedToken // the last one, nil before the first
	call     *sharedCall  // under way, or nil
	failure  *failure     // of the last call, nil if it minted
	failedAt time.Time
	failures int // in a row, that mean that Cable is down
}

// sharedToken is a token with what its readers' leases depend on.
type sharedToken struct {
	*mintedToken
	requested int64     // seconds
	leasedAt  time.Time // when its lease was decided: the first reader's
	readers   int       // that it was returned to
}

// sharedCall is a token request on behalf of all who wait for it.
type sharedCall struct {
	started   time.Time
	requested int64         // lifetime, seconds
	done      chan struct{} // closed when what follows is set
	token     *sharedToken
	err       error // a *failure, or errChanged

	report    *tokenReport
	waiting   int  // readers
	delivered bool // to one of them
}

// reuse returns the role's shared token to a reader, minting one if needed.
// requested is what the reader would mint with now.
func (b *backend) reuse(ctx context.Context, r *tokenReport, s *sharedRole, requested cable.TokenRequest) (*mintedToken, error) {
	lifetime := int64(requested.Lifetime / time.Second)
	for {
		s.mu.Lock()
		now := time.Now()
		if m, err := s.atOnce(r, now, lifetime); m != nil || err != nil {
			s.mu.Unlock()
			return m, err
		}
		first := s.call == nil
		if first {
			s.call = &sharedCall{started: now, requested: lifetime, done: make(chan struct{}), report: r.forCall(now)}
			go b.runShared(s, s.call, requested)
		}
		call := s.call
		call.waiting++
		var patienceEnds <-chan time.Time
		if s.token.isFallback(now, lifetime) && (!first || s.failures > 0) {
			timer := time.NewTimer(call.started.Add(patience).Sub(now))
			defer timer.Stop()
			patienceEnds = timer.C
		}
		s.mu.Unlock()

		m, err := b.await(ctx, r, s, call, lifetime, patienceEnds)
		s.mu.Lock()
		call.waiting--
		b.reportUndelivered(s, call)
		s.mu.Unlock()
		if m != nil || err != nil {
			return m, err
		}
	}
}

// atOnce returns what a reader gets without a call: the current token or, for a
// while after a failure, the previous one or that failure. It returns neither a
// token nor an error if a call is needed. s.mu is held.
func (s *sharedRole) atOnce(r *tokenReport, now time.Time, lifetime int64) (*mintedToken, error) {
	if s.isOld {
		return nil, errChanged
	}
	if s.token.isFresh(now, s.role.ReuseFor, lifetime) {
		if m := s.token.lease(r, now, true); m != nil {
			return m, nil
		}
	}
	if wait := s.failedAt.Add(s.backoff()).Sub(now); s.call == nil && s.failures > 0 && wait > 0 {
		later := *s.failure
		later.retryAfter = max(wait, s.failure.retryAfter-now.Sub(s.failedAt))
		later.message += fmt.Sprintf("; this role makes no API call for another %ds", wholeSeconds(later.retryAfter))
		return s.fallBack(r, now, lifetime, &later)
	}
	return nil, nil
}

// await returns what a shared call comes to for one of its readers; neither a
// token nor an error if the reader has to look again.
func (b *backend) await(ctx context.Context, r *tokenReport, s *sharedRole, call *sharedCall, lifetime int64, patienceEnds <-chan time.Time) (*mintedToken, error) {
	r.waited = true
	ctx, cancel := r.withBudget(ctx, s.config.timeout())
	defer cancel()
	select {
	case <-ctx.Done():
		if cause := context.Cause(ctx); !errors.Is(cause, errBudget) {
			return nil, cause
		}
		return s.fallBackNow(r, lifetime, notInTime(fmt.Sprintf("the budget of %s ran out", s.config.timeout())))
	case <-patienceEnds:
		return s.fallBackNow(r, lifetime, notInTime("the API call is still under way"))
	case <-call.done:
	}
	if call.err != nil {
		if errors.Is(call.err, errChanged) {
			return nil, errChanged
		}
		return s.fallBackNow(r, lifetime, classify(call.err))
	}
	if call.requested > lifetime {
		return nil, nil // the ceiling was lowered meanwhile
	}
	if err := b.checkStillEnabled(ctx, r); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if m := call.token.lease(r, time.Now(), call.delivered); m != nil {
		call.delivered = true
		return m, nil
	}
	return nil, refuseToken(&mismatch{"its lifetime was used up before it could be returned"}, call.token.Token)
}

// notInTime is the failure of a reader that waits no longer.
func notInTime(why string) *failure {
	return &failure{outcome: outcomeTimedOut, message: "cable did not respond in time: " + why, attempts: 1}
}

// fallBackNow is fallBack for those who do not hold s.mu.
func (s *sharedRole) fallBackNow(r *tokenReport, lifetime int64, f *failure) (*mintedToken, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fallBack(r, time.Now(), lifetime, f)
}

// fallBack returns the previous token because of a failure, if that means that
// Cable is down, else the failure. s.mu is held.
func (s *sharedRole) fallBack(r *tokenReport, now time.Time, lifetime int64, f *failure) (*mintedToken, error) {
	r.callFailed = true
	if s.isOld || !f.meansDown() || !s.token.isFallback(now, lifetime) {
		return nil, f
	}
	m := s.token.lease(r, now, true)
	if m == nil {
		return nil, f
	}
	r.fallback = f.outcome
	m.warnings = append(m.warnings, fmt.Sprintf("Cable is down (%s), so the previous token is returned, valid until %s: %s", f.outcome, m.expiresAt(), f.message))
	return m, nil
}

// meansDown reports whether a failure says that Cable, or the network, is down:
// not a fault of the configuration, which must not be hidden.
func (f *failure) meansDown() bool {
	switch f.outcome {
	case outcomeCableError, outcomeRateLimited, outcomePaused:
		return true
	case outcomeUnreachable:
		return !f.certificate
	case outcomeTimedOut:
		return f.attempts > 0
	default:
		return false
	}
}

// backoff is the time between the last failed call and the next one.
func (s *sharedRole) backoff() time.Duration {
	return min(minBackoff<<min(max(s.failures-1, 0), 8), maxBackoff)
}

// runShared makes a shared call and keeps its token.
func (b *backend) runShared(s *sharedRole, call *sharedCall, requested cable.TokenRequest) {
	token, err := b.callShared(s, call, requested)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.call = nil
	call.token, call.err = token, err
	if !s.isOld {
		s.keep(token, classify(err), time.Now())
	}
	call.report.failure = classify(err)
	if !errors.Is(err, errChanged) { // else nobody was called
		b.telemetry.sharedCallEnded(call.report)
	}
	close(call.done)
	b.reportUndelivered(s, call)
}

// callShared is the call itself. A panic of it fails the call, not the process.
func (b *backend) callShared(s *sharedRole, call *sharedCall, requested cable.TokenRequest) (token *sharedToken, err error) {
	defer func() {
		if value := recover(); value != nil {
			err = b.panicked(call.report.req, value, debug.Stack())
		}
	}()
	requested.Start = call.started
	requested.Allow = func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.isOld {
			return errChanged
		}
		return nil
	}
	m, err := b.call(b.ctx, call.report, s.config, requested)
	if err != nil {
		return nil, err
	}
	call.report.minted = m
	return &sharedToken{mintedToken: m, requested: call.requested, leasedAt: time.Now()}, nil
}

// keep keeps the result of a call. s.mu is held.
func (s *sharedRole) keep(token *sharedToken, f *failure, now time.Time) {
	s.failure, s.failedAt = f, now
	if f != nil && f.meansDown() {
		s.failures++
		return
	}
	s.failures = 0 // Cable responded
	if f == nil {
		s.drop()
		s.token = token
	}
}

// drop drops the token. s.mu is held.
func (s *sharedRole) drop() {
	if s.token != nil {
		s.dropped(s.token.readers)
	}
	s.token = nil
}

// retire ends the generation: nothing of it is returned to a later reader.
func (s *sharedRole) retire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.isOld = true
	s.drop()
}

// isDown returns the outcome of the last call if readers get the previous token
// because of it, or "".
func (s *sharedRole) isDown() outcome {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failures == 0 || !s.token.isFallback(time.Now(), maxLifetime) {
		return ""
	}
	return s.failure.outcome
}

// reportUndelivered reports the token of a call that has ended, if it was not
// kept and its last reader left without it. s.mu is held.
func (b *backend) reportUndelivered(s *sharedRole, call *sharedCall) {
	if call.token == nil || !s.isOld || call.waiting > 0 || call.delivered {
		return
	}
	call.delivered = true // reported once
	r := *call.report
	f := classify(refuseToken(refusal("the role or the configuration was changed while Cable was called"), call.token.Token))
	r.minted, r.failure = nil, f
	b.telemetry.sharedCallEnded(&r)
}

// isFresh reports whether the token may be returned: its call was sent at most
// reuseFor seconds ago, half of its lifetime remains, and no more than lifetime
// seconds were requested.
func (t *sharedToken) isFresh(now time.Time, reuseFor, lifetime int64) bool {
	return t != nil && t.requested <= lifetime && elapsed(t.SentAt, now) <= seconds(reuseFor) && t.remaining(now) >= t.usable()/2
}

// isFallback reports whether the token may be returned while Cable is down.
func (t *sharedToken) isFallback(now time.Time, lifetime int64) bool {
	return t != nil && t.requested <= lifetime && t.remaining(now) >= fallbackLifetime
}

// usable is the token's lifetime as far as leases go: at most what was requested.
func (t *sharedToken) usable() time.Duration { return seconds(min(t.requested, t.lifetime)) }

// remaining is what is left of that.
func (t *sharedToken) remaining(now time.Time) time.Duration {
	return t.usable() - elapsed(t.SentAt, now)
}

// lease returns the token with a lease of the reader's own, which ends no later
// than that of the read that minted; nil if no second is left of it. The role's
// mu is held.
func (t *sharedToken) lease(r *tokenReport, now time.Time, reused bool) *mintedToken {
	left := seconds(t.mintedToken.lease) - elapsed(t.leasedAt, now)
	if reused {
		left -= leaseMargin
	}
	if left < time.Second {
		return nil
	}
	m := *t.mintedToken
	m.lease, m.warnings = int64(left/time.Second), slices.Clone(m.warnings)
	t.readers++
	r.granted, r.reused, r.age = t.Token, reused, elapsed(t.SentAt, now)
	return &m
}

// forCall is the report of a call that the request makes for all readers.
func (r *tokenReport) forCall(now time.Time) *tokenReport {
	return &tokenReport{
		// Nothing of the request but its names: its storage ends with the mount.
		req:      &logical.Request{ID: r.req.ID, MountPoint: r.req.MountPoint, Operation: r.req.Operation, Path: r.req.Path},
		received: now, role: r.role, roleExists: true, generation: r.generation, requested: r.requested, shared: true,
	}
}
