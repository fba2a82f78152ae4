// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package mount

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
)

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

// errNoState stands for a state that Vault did not report.
var errNoState = errors.New("no replication state")

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
	state, err := Call(ctx, func() (consts.ReplicationState, error) {
		if state := s.SystemView.ReplicationState(); state != consts.ReplicationUnknown {
			return state, nil
		}
		return consts.ReplicationUnknown, errNoState
	})
	if err != nil {
		return last
	}
	s.mu.Lock()
	s.state, s.readAt = state, now
	s.mu.Unlock()
	return state
}
