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
)

// Call calls f and waits for its result until ctx ends. A panic in f is re-raised in the caller, as a *Panic.
//
// NOTE: the SDK's storage respects its context; its system view has methods that do not (v0.25.1: MaxLeaseTTL,
// DefaultLeaseTTL, ReplicationState).
func Call[T any](ctx context.Context, f func() (T, error)) (T, error) {
	type result struct {
		value T
		err   error
		panic *Panic
	}
	done := make(chan result, 1)
	go func() {
		var r result
		defer func() {
			if p := recover(); p != nil {
				r.panic = &Panic{Value: p, Stack: debug.Stack()}
			}
			done <- r
		}()
		r.value, r.err = f()
	}()
	select {
	case r := <-done:
		if r.panic != nil {
			panic(r.panic)
		}
		if r.err != nil && ctx.Err() != nil {
			r.err = context.Cause(ctx)
		}
		return r.value, r.err
	case <-ctx.Done():
		var none T
		return none, context.Cause(ctx)
	}
}

// Panic is a panic in another goroutine.
type Panic struct {
	Value any
	Stack []byte
}
