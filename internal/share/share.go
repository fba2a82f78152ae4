// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Package share lets the readers of a role share a token, so that a fleet does not use up Cable's rate limit, and fewer
// tokens exist that cannot be revoked.
//
//   - A read without parameters returns the role's current token if its call was sent at most reuse_for ago and at
//     least half of its lifetime remains. Otherwise it mints, once for all readers that wait.
//   - Each reader gets a lease of its own, which ends no later than the lease of the read that minted. A token is
//     reused only if the lifetime requested for it is at most the present ceiling.
//   - A role has one shared call at a time, per [state.Version]. The call does not end when its readers leave.
//   - If Cable is down, readers get the previous token while it is valid for another minute, with a warning. After such
//     a failure the role makes no shared call for 5 s, doubling up to 60 s.
//   - Every change of the role or of the configuration drops the token. A token that is dropped while it is valid, and
//     that no reader had received, counts as undelivered, once.
//
// Nothing is stored.
package share

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/lifetime"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/state"
)

const (
	maxRoles         = 4096        // roles of a mount that share at a time
	fallbackLifetime = time.Minute // least remaining lifetime of a token that is returned while Cable is down
	minBackoff       = 5 * time.Second
	maxBackoff       = time.Minute

	// patience is how long a shared call may run before readers with a usable previous token stop waiting for it,
	// except the first after a success.
	patience = time.Second

	// leaseMargin is how much sooner the lease of a reused token ends than the lease of the read that minted. The first
	// lease may have lost a second by rounding, and Vault starts to count when it stores a lease, a little later than
	// the engine.
	leaseMargin = 2 * time.Second
)

// Roles are the roles of a mount that share tokens.
type Roles struct {
	dropped func(readers int)

	mu      sync.Mutex
	roles   map[string]*role
	checked time.Time // when idle roles were last looked for
}

// NewRoles returns no roles. dropped is called with the number of its readers when a shared token is dropped.
func NewRoles(dropped func(readers int)) *Roles {
	return &Roles{dropped: dropped, roles: make(map[string]*role)}
}

// role is the shared state of a role's readers who hold the same settings.
type role struct {
	version  state.Version
	reuseFor time.Duration
	least    time.Duration // lease of a token that is returned
	dropped  func(readers int)

	mu       sync.Mutex
	retired  bool             // the role or the configuration was changed
	last     *token           // the last one that was kept, or nil
	call     *token           // the one whose call is under way, or nil
	failure  *outcome.Failure // of the last call, or nil if it minted
	failedAt time.Time
	failures int // in a row, each of which means that Cable is down
}

// token is a shared call and the token that it mints.
type token struct {
	started     time.Time
	requested   time.Duration // lifetime
	undelivered func(*outcome.Token)

	done     chan struct{}  // closed when the fields below are set
	minted   *outcome.Token // nil if the call failed
	err      error
	leasedAt time.Time // when the lease of the read that mints was decided

	holders int  // readers that wait for the call or are about to receive the token
	readers int  // readers that received the token
	isGone  bool // dropped, or never kept; it gets no holder after that
}

// Reader is a request that shares.
type Reader struct {
	Role     string
	Settings state.Settings

	// Lifetime is the lifetime that the reader would request now.
	Lifetime time.Duration

	// Deadline ends the reader's wait; none if zero.
	Deadline time.Time

	// Check returns an error if the reader may not get a token any more.
	Check func() error

	// Call mints the token for all readers that wait. It starts its budget when it is called, does not end with the
	// reader, and contains its own panics. An error that is [outcome.ErrChanged] says that it made no API call.
	Call func(started time.Time) (*outcome.Token, error)

	// Undelivered is called for a token of Call that no reader received.
	Undelivered func(*outcome.Token)
}

// Result says how a reader got its token, or how it failed.
type Result struct {
	Token      *outcome.Token  // nil if the read failed
	Reused     bool            // another request minted the token
	Age        time.Duration   // of the token, since its call was sent
	Fallback   outcome.Outcome // why the previous token was returned, or ""
	Waited     bool            // for a shared call
	CallFailed bool            // the shared call failed; it has its own report
}

// Read returns the role's shared token to a reader, minting one if needed. ctx ends with the reader.
// The error is outcome.ErrChanged if the reader's settings are outdated. ok is false if too many roles share.
func (rs *Roles) Read(ctx context.Context, r Reader) (result Result, ok bool, err error) {
	s, err := rs.get(r.Role, r.Settings)
	if s == nil {
		return Result{}, err != nil, err
	}
	result, err = s.read(ctx, r)
	return result, true, err
}

// get returns the shared state for readers that hold these settings, or nil if too many roles share.
func (rs *Roles) get(name string, set state.Settings) (*role, error) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	s := rs.roles[name]
	switch {
	case s != nil && s.version == set.Version:
		return s, nil
	case s != nil && set.Version.IsBefore(s.version):
		return nil, outcome.ErrChanged
	case s != nil:
		s.retire()
	case len(rs.roles) >= maxRoles && !rs.makeRoomLocked():
		return nil, nil
	}
	s = &role{
		version:  set.Version,
		reuseFor: set.Role.ReuseFor,
		least:    lifetime.LeastLease(set.Role.NoLease),
		dropped:  rs.dropped,
	}
	rs.roles[name] = s
	return s, nil
}

// makeRoomLocked removes the roles whose token has expired, with no call under way and no back-off, and reports whether
// there is room. It looks once a second, because every reader of a role that does not share would look.
func (rs *Roles) makeRoomLocked() bool {
	now := time.Now()
	if now.Sub(rs.checked) >= time.Second {
		rs.checked = now
		maps.DeleteFunc(rs.roles, func(_ string, s *role) bool { return s.retireIfIdle(now) })
	}
	return len(rs.roles) < maxRoles
}

// Retire drops the token of a role that was changed, or of all roles if name is "".
func (rs *Roles) Retire(name string) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if s := rs.roles[name]; s != nil {
		s.retire()
		delete(rs.roles, name)
	}
	if name == "" {
		for _, s := range rs.roles {
			s.retire()
		}
		clear(rs.roles)
	}
}

// Down returns the roles whose readers get the previous token because Cable is down, with the outcome of their last
// call.
func (rs *Roles) Down() map[string]any {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	down := make(map[string]any)
	for name, s := range rs.roles {
		s.mu.Lock()
		if s.failures > 0 && s.last.isFallback(time.Now(), lifetime.Max) {
			down[name] = string(s.failure.Outcome)
		}
		s.mu.Unlock()
	}
	return down
}

// read is Roles.Read for the readers of one role.
func (s *role) read(ctx context.Context, r Reader) (Result, error) {
	waited := false
	for {
		s.mu.Lock()
		now := time.Now()
		if s.retired {
			s.mu.Unlock()
			return Result{}, outcome.ErrChanged
		}
		if t := s.last; s.isFresh(t, now, r.Lifetime) {
			t.holders++
			s.mu.Unlock()
			return s.deliver(t, r, Result{Reused: true, Waited: waited})
		}
		if f := s.backingOff(now); f != nil {
			s.mu.Unlock()
			return s.fallBack(f, r, waited)
		}
		t := s.call
		isFirst := t == nil
		if isFirst {
			t = &token{started: now, requested: r.Lifetime, undelivered: r.Undelivered, done: make(chan struct{})}
			s.call = t
			go s.run(t, r.Call)
		}
		t.holders++
		var outOfPatience <-chan time.Time
		if s.last.isFallback(now, r.Lifetime) && (!isFirst || s.failures > 0) {
			outOfPatience = time.After(t.started.Add(patience).Sub(now))
		}
		s.mu.Unlock()

		waited = true
		result, err, again := s.wait(ctx, t, r, outOfPatience)
		if !again {
			return result, err
		}
	}
}

// wait waits for a shared call on behalf of one reader. again says that the reader must start over.
func (s *role) wait(
	ctx context.Context, t *token, r Reader, outOfPatience <-chan time.Time,
) (result Result, err error, again bool) {
	var f *outcome.Failure
	if !r.Deadline.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadlineCause(ctx, r.Deadline, outcome.ErrBudget)
		defer cancel()
	}
	select {
	case <-t.done:
		f = outcome.Classify(t.err)
	case <-outOfPatience:
		f = notInTime("the API call is still under way")
	case <-ctx.Done():
		if cause := context.Cause(ctx); !errors.Is(cause, outcome.ErrBudget) {
			s.release(t)
			return Result{Waited: true}, cause, false
		}
		f = notInTime("request_timeout ran out")
	}
	if f == nil && t.requested <= r.Lifetime {
		result, err = s.deliver(t, r, Result{Waited: true})
		return result, err, false
	}
	s.release(t)
	if f == nil { // the ceiling was lowered meanwhile
		return Result{}, nil, true
	}
	result, err = s.fallBack(f, r, true)
	return result, err, false
}

// notInTime is the failure of a reader that stops waiting.
func notInTime(why string) *outcome.Failure {
	text := "Cable did not respond in time: " + why
	return &outcome.Failure{Outcome: outcome.TimedOut, Message: text, Detail: text, Attempts: 1}
}

// deliver returns a token that the reader holds, with a lease of the reader's own.
func (s *role) deliver(t *token, r Reader, result Result) (Result, error) {
	defer s.release(t) // even if the check panics
	if err := r.Check(); err != nil {
		return result, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	result.Reused = result.Reused || t.readers > 0
	lease := t.lease(now, result.Reused)
	if lease < s.least {
		return result, &cable.Error{
			Kind:       cable.InvalidResponse,
			StatusCode: 200,
			Detail:     "too little of the token's lifetime was left when it could be returned",
			Attempts:   t.minted.Attempts,
		}
	}
	t.readers++
	minted := *t.minted
	minted.Lease, minted.Warnings = lease, slices.Clone(minted.Warnings)
	result.Token, result.Age = &minted, cable.Elapsed(minted.SentAt, now)
	return result, nil
}

// fallBack returns the previous token if f means that Cable is down, and f otherwise.
func (s *role) fallBack(f *outcome.Failure, r Reader, waited bool) (Result, error) {
	failed := Result{Waited: waited, CallFailed: true}
	s.mu.Lock()
	t := s.last
	if !f.MeansDown() || !t.isFallback(time.Now(), r.Lifetime) {
		s.mu.Unlock()
		return failed, f
	}
	t.holders++
	s.mu.Unlock()
	result, err := s.deliver(t, r, Result{Reused: true, Waited: waited, Fallback: f.Outcome})
	if err != nil {
		return failed, err
	}
	result.Token.Warnings = append(result.Token.Warnings, fallbackWarning(result.Token, f))
	return result, nil
}

// fallbackWarning is the warning of a reader that gets the previous token because of f.
func fallbackWarning(t *outcome.Token, f *outcome.Failure) string {
	return fmt.Sprintf("Cable is down (%s), so the previous token is returned, valid until %s: %s",
		f.Outcome, t.ExpiresAt(), f.Message)
}

// Peek tells how Read would end now, without waiting, for a reader with these settings and that lifetime. ready is the
// failure with which an API call would end before it is sent, or nil. If the reader would get the shared token,
// isShared is true, with the warnings of the token. Otherwise err is the failure that the reader would get, or nil if
// Read would make a call or wait for one. Peek changes nothing.
func (rs *Roles) Peek(
	name string, set state.Settings, most time.Duration, ready *outcome.Failure,
) (isShared bool, warnings []string, err error) {
	f := ready
	rs.mu.Lock()
	s := rs.roles[name]
	rs.mu.Unlock()
	if s != nil && s.version == set.Version {
		s.mu.Lock()
		defer s.mu.Unlock()
		now := time.Now()
		if s.isFresh(s.last, now, most) {
			return true, s.last.minted.Warnings, nil
		}
		f = cmp.Or(s.backingOff(now), ready)
		if t := s.last; f != nil && f.MeansDown() && t.isFallback(now, most) {
			return true, append(slices.Clone(t.minted.Warnings), fallbackWarning(t.minted, f)), nil
		}
	}
	if f == nil {
		return false, nil, nil // not a nil *Failure
	}
	return false, nil, f
}

// backingOff returns the failure for readers while the role makes no call after a failure, else nil. s.mu is held.
func (s *role) backingOff(now time.Time) *outcome.Failure {
	wait := s.backoffEnds().Sub(now)
	if s.failures == 0 || wait <= 0 {
		return nil
	}
	later := *s.failure
	later.RetryAfter = max(wait, s.failure.RetryAfter-now.Sub(s.failedAt))
	later.Message += fmt.Sprintf("; this role makes no API call for another %ds",
		outcome.WholeSeconds(later.RetryAfter))
	return &later
}

// backoffEnds returns when the next call may follow the last failed one.
func (s *role) backoffEnds() time.Time {
	return s.failedAt.Add(min(minBackoff<<min(max(s.failures-1, 0), 8), maxBackoff))
}

// run makes a shared call and records its end.
func (s *role) run(t *token, call func(started time.Time) (*outcome.Token, error)) {
	minted, err := call(t.started)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.call = nil
	t.minted, t.err, t.leasedAt = minted, err, time.Now()
	close(t.done)
	if !s.retired {
		s.recordLocked(t, outcome.Classify(err), t.leasedAt)
	}
	if s.last != t {
		t.isGone = true
		s.settleLocked(t)
	}
}

// recordLocked records the result of a call, and keeps a token that another reader could still get. The caller holds
// mu.
func (s *role) recordLocked(t *token, f *outcome.Failure, now time.Time) {
	s.failure, s.failedAt = f, now
	switch {
	case f != nil && f.MeansDown():
		s.failures++
		return
	case f == nil && t.minted.Lease >= leaseMargin+s.least:
		s.dropLocked()
		s.last = t
	}
	s.failures = 0 // Cable responded
}

// dropLocked drops the token. The caller holds mu.
func (s *role) dropLocked() {
	if t := s.last; t != nil {
		s.last = nil
		s.dropped(t.readers)
		t.isGone = true
		s.settleLocked(t)
	}
}

// retire drops the token and keeps no other, because the role or the configuration was changed. No later reader gets a
// token of an older call.
func (s *role) retire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.retired = true
	s.dropLocked()
}

// retireIfIdle retires a role that has nothing to share, and reports whether it did.
func (s *role) retireIfIdle(now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.call != nil || s.failures > 0 && now.Before(s.backoffEnds()) || s.last != nil && s.last.remaining(now) > 0 {
		return false
	}
	s.retired = true
	s.dropLocked()
	return true
}

// release ends a reader's hold on a token.
func (s *role) release(t *token) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t.holders--
	s.settleLocked(t)
}

// settleLocked counts a token as undelivered, once, if it is gone and no reader received it or can still receive it.
// The caller holds mu.
func (s *role) settleLocked(t *token) {
	if t.isGone && t.minted != nil && t.readers == 0 && t.holders == 0 {
		t.undelivered(t.minted)
	}
}

// isFresh reports whether a token may be returned, namely if its call was sent at most reuseFor ago, at least half of
// its lifetime remains, no more than most was requested for it, and there is time for a lease.
func (s *role) isFresh(t *token, now time.Time, most time.Duration) bool {
	return t != nil && t.requested <= most && cable.Elapsed(t.minted.SentAt, now) <= s.reuseFor &&
		t.remaining(now) >= t.usable()/2 && // at least half of its lifetime remains
		t.lease(now, true) >= s.least
}

// isFallback reports whether the token may be returned while Cable is down.
func (t *token) isFallback(now time.Time, most time.Duration) bool {
	return t != nil && t.requested <= most && t.remaining(now) >= fallbackLifetime
}

// lease returns the lease of a reader, in whole seconds. It ends no later than the lease of the read that minted.
func (t *token) lease(now time.Time, isReused bool) time.Duration {
	left := t.minted.Lease - cable.Elapsed(t.leasedAt, now)
	if isReused {
		left -= leaseMargin
	}
	return left.Truncate(time.Second)
}

// usable is the lifetime that leases may use, the lesser of requested and granted.
func (t *token) usable() time.Duration { return min(t.requested, t.minted.Lifetime) }

// remaining is the part of the usable lifetime that is left.
func (t *token) remaining(now time.Time) time.Duration {
	return t.usable() - cable.Elapsed(t.minted.SentAt, now)
}
