// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
)

// replicationStateLife is how long an answer about the node's role is used.
const replicationStateLife = time.Second

// systemView remembers the replication state for a second. The framework asks
// for it on each request, which is a call to Vault; a mount is set up anew
// where a node becomes or ceases to be a performance standby, and a write on a
// node that has just become a secondary is refused by its storage.
//
// NOTE: lease settings are not remembered: tuning a mount takes effect at the
// next read.
type systemView struct {
	logical.SystemView

	mu    sync.Mutex
	state consts.ReplicationState
	asked time.Time
}

// ReplicationState implements [logical.SystemView]. No answer, which the SDK
// reports as ReplicationUnknown, is not remembered.
func (s *systemView) ReplicationState() consts.ReplicationState {
	s.mu.Lock()
	state, asked := s.state, s.asked
	s.mu.Unlock()
	if state != consts.ReplicationUnknown && time.Since(asked) < replicationStateLife {
		return state
	}
	asked = time.Now()
	state = s.SystemView.ReplicationState()
	s.mu.Lock()
	s.state, s.asked = state, asked
	s.mu.Unlock()
	return state
}
