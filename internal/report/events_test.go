// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package report

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// senderFunc is an event sender made of a function.
type senderFunc func() error

// SendEvent implements [logical.EventSender].
func (f senderFunc) SendEvent(context.Context, logical.EventType, *logical.EventData) error {
	return f()
}

// TestEventQueue checks that a server without events is called once, and that a slow or
// failing one costs its events and no request.
func TestEventQueue(t *testing.T) {
	t.Parallel()
	heard := func(context.Context) bool { return true }
	for name, refusal := range map[string]error{
		"no event system": framework.ErrNoEvents,
		"older server":    status.Error(codes.Unimplemented, "unknown method SendEvent"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var asked, results atomic.Int64
			q := newEvents(senderFunc(func() error { asked.Add(1); return refusal }), heard, func(string) { results.Add(1) })
			defer q.close()
			q.send("cable/test", logical.UpdateOperation, "config")
			for end := time.Now().Add(10 * time.Second); !q.off.Load(); time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatal("the queue goes on")
				}
			}
			for range 2 * maxQueuedEvents {
				q.send("cable/test", logical.UpdateOperation, "config")
			}
			if asked.Load() != 1 || results.Load() != 0 {
				t.Errorf("asked %d times, %d results", asked.Load(), results.Load())
			}
		})
	}
	t.Run("failing", func(t *testing.T) {
		t.Parallel()
		results := make(chan string, 2)
		q := newEvents(senderFunc(func() error { return errors.New("sealed") }), heard, func(r string) { results <- r })
		defer q.close()
		q.send("cable/test", logical.UpdateOperation, "config")
		q.send("cable/test", logical.UpdateOperation, "config")
		if a, b := <-results, <-results; a != eventFailed || b != eventFailed {
			t.Errorf("%s, %s", a, b)
		}
	})
	t.Run("closed", func(t *testing.T) {
		t.Parallel()
		// What waits when a mount is disabled is sent, and what comes later is not.
		var sent atomic.Int64
		q := newEvents(senderFunc(func() error { sent.Add(1); return nil }), heard, func(string) {})
		for range 100 {
			q.send("cable/test", logical.UpdateOperation, "config")
		}
		q.close()
		q.send("cable/test", logical.UpdateOperation, "config")
		q.close()
		if n := sent.Load(); n != 100 {
			t.Errorf("%d events were sent, want 100", n)
		}
		newEvents(nil, heard, nil).close() // one that never had an event
	})
	t.Run("stuck", func(t *testing.T) {
		t.Parallel()
		release := make(chan struct{})
		var dropped atomic.Int64
		q := newEvents(senderFunc(func() error { <-release; return nil }), heard, func(r string) {
			if r == eventDropped {
				dropped.Add(1)
			}
		})
		defer q.close()
		defer close(release)
		for range maxQueuedEvents + 11 { // one or none is with Vault
			q.send("cable/test", logical.UpdateOperation, "config")
		}
		if n := dropped.Load(); n != 10 && n != 11 {
			t.Errorf("%d events were dropped", n)
		}
	})
}

// TestCloseDoesNotWait checks the end of a mount, during which the SDK holds a lock of all
// mounts.
func TestCloseDoesNotWait(t *testing.T) {
	t.Parallel()
	hang := make(chan struct{})
	defer close(hang)
	q := newEvents(senderFunc(func() error { <-hang; return nil }), func(context.Context) bool { return true }, func(string) {})
	q.send("cable/config-write", logical.UpdateOperation, "config")
	q.send("cable/config-write", logical.UpdateOperation, "config")
	start := time.Now()
	q.close()
	if took := time.Since(start); took > time.Second {
		t.Errorf("took %s", took)
	}
	select {
	case <-q.ended:
	case <-time.After(flushTimeout + 5*time.Second):
		t.Error("it is still sending")
	}
}
