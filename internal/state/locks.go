// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package state

import (
	"context"
	"sync"
)

// keyedMutex is a mutex per key. A caller waits no longer than its context lasts.
type keyedMutex struct {
	mu   sync.Mutex
	held map[string]*heldKey
}

// heldKey is a mutex that is held or waited for.
type heldKey struct {
	token chan struct{} // full while the mutex is held
	users int           // callers that hold it or wait for it
}

// lock waits for the mutex of key. The error is the cause of ctx.
func (m *keyedMutex) lock(ctx context.Context, key string) (unlock func(), err error) {
	m.mu.Lock()
	if m.held == nil {
		m.held = make(map[string]*heldKey)
	}
	h := m.held[key]
	if h == nil {
		h = &heldKey{token: make(chan struct{}, 1)}
		m.held[key] = h
	}
	h.users++
	m.mu.Unlock()
	leave := func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if h.users--; h.users == 0 {
			delete(m.held, key)
		}
	}
	select {
	case h.token <- struct{}{}:
		return func() { <-h.token; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, context.Cause(ctx)
	}
}
