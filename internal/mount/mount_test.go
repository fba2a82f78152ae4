// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package mount

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
)

// slowSetting is a lease setting that Vault takes some time to report.
type slowSetting struct {
	*LeaseSetting
	ttl, takes atomic.Int64 // nanoseconds; a ttl below 0 is a panic
	calls      atomic.Int64
}

func newSlowSetting() *slowSetting {
	s := new(slowSetting)
	s.LeaseSetting = NewLeaseSetting(func() time.Duration {
		s.calls.Add(1)
		ttl := time.Duration(s.ttl.Load())
		time.Sleep(time.Duration(s.takes.Load()))
		if ttl < 0 {
			panic("no value")
		}
		return ttl
	})
	return s
}

func (s *slowSetting) set(ttl, takes time.Duration) {
	s.ttl.Store(int64(ttl))
	s.takes.Store(int64(takes))
}

// get is Get with a budget of a minute. It returns -1 for a panic, and 0 if the budget
// ran out.
func (s *slowSetting) get(t *testing.T) (ttl time.Duration) {
	defer func() {
		if recover() != nil {
			ttl = -1
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ttl, err := s.Get(ctx)
	if err != nil && !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	return ttl
}

// TestLeaseSettingIsShared checks that requests share calls to Vault, and that none
// gets a value that was read before it came.
func TestLeaseSettingIsShared(t *testing.T) {
	t.Parallel()
	for _, then := range []time.Duration{5 * time.Minute, -1} {
		synctest.Test(t, func(t *testing.T) {
			s := newSlowSetting()
			var wg sync.WaitGroup
			start := func(want time.Duration) {
				wg.Go(func() {
					if got := s.get(t); got != want {
						t.Errorf("got %s, want %s", got, want)
					}
				})
				synctest.Wait()
			}
			s.set(10*time.Minute, 500*time.Millisecond)
			start(10 * time.Minute)
			s.set(then, 0)
			for range 10 {
				start(then)
			}
			wg.Wait()
			if n := s.calls.Load(); n != 2 {
				t.Errorf("%d calls, want 2", n)
			}
		})
	}
}

// TestLeaseSettingHangs checks that a lone request, whenever it comes, waits for a call
// that hangs no longer than that call is a second old.
func TestLeaseSettingHangs(t *testing.T) {
	t.Parallel()
	for _, after := range []time.Duration{0, time.Millisecond, 500 * time.Millisecond, patience, time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			s := newSlowSetting()
			s.set(time.Minute, 24*time.Hour)
			go s.get(t)
			synctest.Wait()
			time.Sleep(after)
			s.set(2*time.Minute, 0)
			start := time.Now()
			if got := s.get(t); got != 2*time.Minute || time.Since(start) > max(0, patience-after) {
				t.Errorf("a request %s after the call: %s, in %s", after, got, time.Since(start))
			}
			s.set(2*time.Minute, 24*time.Hour)
			if got := s.get(t); got != 0 {
				t.Errorf("of a call that hangs: %s, want the end of the budget", got)
			}
			time.Sleep(48 * time.Hour)
			synctest.Wait()
			if s.underWay != nil || s.next != nil {
				t.Error("a call is left although no request waits")
			}
		})
	}
}

type countingView struct {
	logical.StaticSystemView
	n     int
	state consts.ReplicationState
}

func (c *countingView) ReplicationState() consts.ReplicationState {
	c.n++
	return c.state
}

// TestReplicationState checks that the state is read at most once a second, and that
// "unknown" is not taken for a state.
func TestReplicationState(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		vault := new(countingView)
		v := View(vault)
		for i, step := range []struct {
			state, want consts.ReplicationState
			reads       int // of three
		}{
			{consts.ReplicationUnknown, consts.ReplicationUnknown, 3},
			{consts.ReplicationPerformanceStandby, consts.ReplicationPerformanceStandby, 1},
			{consts.ReplicationPerformanceDisabled, consts.ReplicationPerformanceStandby, 0},
		} {
			vault.state, vault.n = step.state, 0
			for range 3 {
				if got := v.ReplicationState(); got != step.want {
					t.Errorf("step %d: state %v, want %v", i, got, step.want)
				}
			}
			if vault.n != step.reads {
				t.Errorf("step %d: %d reads, want %d", i, vault.n, step.reads)
			}
		}
		time.Sleep(replicationStateMaxAge)
		if got := v.ReplicationState(); got != consts.ReplicationPerformanceDisabled {
			t.Errorf("state %v after a second", got)
		}
	})
}
