// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Package mount asks Vault: for the mount's lease settings, for the node's replication state, and for stored entries.
//
//   - A caller waits no longer than its context lasts, even for a call of the SDK that ignores contexts. Such a call is
//     abandoned and its result dropped.
//   - Lease settings are read for each token request, because tuning a mount takes effect at the next one. Concurrent
//     requests share a call.
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

// result is what a function returned, or its panic.
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
