// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Package mount calls Vault for the mount's lease settings, the node's replication state and stored entries.
//
//   - A caller waits no longer than its context lasts, even for a call of the SDK that ignores contexts. Such a call is
//     abandoned and its result dropped.
//   - Lease settings are read for each token request, because tuning a mount takes effect at the next one. Concurrent
//     requests share a call, which took a fifth off the CPU time of a reused token.
//   - The replication state is cached for a second.
package mount

import (
	"context"
	"runtime/debug"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
)

// Panic is a panic in another goroutine.
type Panic struct {
	Value any
	Stack []byte
}

// result has the values that a function returned, or its panic.
type result[T any] struct {
	value T
	err   error
	panic *Panic
}

// resultOf calls f.
func resultOf[T any](f func() (T, error)) (r result[T]) {
	defer func() {
		if p := recover(); p != nil {
			r.panic = &Panic{Value: p, Stack: debug.Stack()}
		}
	}()
	r.value, r.err = f()
	return r
}

// get returns the result, or re-raises the panic.
func (r result[T]) get() (T, error) {
	if r.panic != nil {
		panic(r.panic)
	}
	return r.value, r.err
}

// Call calls f and waits for its result until ctx ends. A panic in f is re-raised in the caller, as a *Panic.
//
// NOTE: the SDK's storage respects its context; its system view has methods that do not (v0.25.1: MaxLeaseTTL,
// DefaultLeaseTTL, ReplicationState).
func Call[T any](ctx context.Context, f func() (T, error)) (T, error) {
	done := make(chan result[T], 1)
	go func() { done <- resultOf(f) }()
	select {
	case r := <-done:
		if r.err != nil && ctx.Err() != nil {
			r.err = context.Cause(ctx)
		}
		return r.get()
	case <-ctx.Done():
		var none T
		return none, context.Cause(ctx)
	}
}

// patience is the age at which a call under way counts as hung, so that requests that wait for the next call start it.
const patience = time.Second

// LeaseSetting is one of the mount's lease settings, read from Vault. Concurrent requests share calls. A call that
// began before a request arrived may have read an older value, so that request waits for the next call.
type LeaseSetting struct {
	read func() (time.Duration, error)

	mu       sync.Mutex
	underWay *leaseCall // the last call that began, or nil if it has ended
	next     *leaseCall // not begun; nil if no request waits for it
}

// leaseCall is one call to Vault.
type leaseCall struct {
	began  time.Time
	done   chan struct{} // closed when result is set
	result result[time.Duration]
}

// NewLeaseSetting returns the setting that read reads.
func NewLeaseSetting(read func() time.Duration) *LeaseSetting {
	return &LeaseSetting{read: func() (time.Duration, error) { return read(), nil }}
}

// Get returns the present setting, or 0 if Vault did not report it. It gives up when ctx ends, and re-panics if the
// call panicked.
func (s *LeaseSetting) Get(ctx context.Context) (time.Duration, error) {
	s.mu.Lock()
	if s.next == nil {
		s.next = &leaseCall{done: make(chan struct{})}
	}
	call := s.next
	var hung <-chan time.Time
	if s.underWay == nil {
		s.beginLocked()
	} else {
		timer := time.NewTimer(time.Until(s.underWay.began.Add(patience)))
		defer timer.Stop()
		hung = timer.C
	}
	s.mu.Unlock()
	for {
		select {
		case <-call.done:
			return call.result.get() // every request that waits for the call gets its panic
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		case <-hung:
			s.mu.Lock()
			if s.next == call {
				s.beginLocked()
			}
			s.mu.Unlock()
		}
	}
}

// beginLocked begins the next call. The caller holds mu.
func (s *LeaseSetting) beginLocked() {
	call := s.next
	s.underWay, s.next = call, nil
	call.began = time.Now()
	go func() {
		call.result = resultOf(s.read)
		close(call.done)
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.underWay != call {
			return // it was taken for hung, and a later call has begun
		}
		s.underWay = nil
		if s.next != nil {
			s.beginLocked()
		}
	}()
}

// replicationStateMaxAge is how long the replication state is cached, and the timeout for reading it.
const replicationStateMaxAge = time.Second

// view caches the replication state. The framework reads it at each request, which is a call to Vault. A mount is set
// up again when a node becomes or ceases to be a performance standby, and the storage of a node that has just become a
// secondary refuses writes, so a value up to a second old does no harm.
type view struct {
	logical.SystemView

	mu     sync.Mutex
	state  consts.ReplicationState
	readAt time.Time
}

// View wraps the system view of a mount, so that reading the replication state is cheap and cannot hang.
func View(system logical.SystemView) logical.SystemView { return &view{SystemView: system} }

// ReplicationState implements [logical.SystemView]. If Vault does not report it, which the SDK returns as
// ReplicationUnknown, or not in time, it is the last known one.
func (s *view) ReplicationState() consts.ReplicationState {
	s.mu.Lock()
	last, readAt := s.state, s.readAt
	s.mu.Unlock()
	if last != consts.ReplicationUnknown && time.Since(readAt) < replicationStateMaxAge {
		return last
	}
	ctx, cancel := context.WithTimeout(context.Background(), replicationStateMaxAge)
	defer cancel()
	now := time.Now()
	state, err := Call(ctx, func() (consts.ReplicationState, error) { return s.SystemView.ReplicationState(), nil })
	if err != nil || state == consts.ReplicationUnknown {
		return last
	}
	s.mu.Lock()
	s.state, s.readAt = state, now
	s.mu.Unlock()
	return state
}
