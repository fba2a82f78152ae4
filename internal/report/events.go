// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package report

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/fields"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
)

// Types of the events for Vault's event system.
const (
	eventConfigWrite     = "cable/config-write"
	eventConfigDelete    = "cable/config-delete"
	eventRoleWrite       = "cable/role-write"
	eventRoleDelete      = "cable/role-delete"
	eventCredsCreate     = "cable/creds-create"
	eventCredsCreateFail = "cable/creds-create-fail"
	eventGrantMismatch   = "cable/grant-mismatch"
	eventLeaseRevoke     = "cable/lease-revoke"
)

const (
	// maxQueuedEvents bounds the events that wait for Vault: some seconds of a busy
	// mount.
	maxQueuedEvents = 1024

	eventTimeout = 10 * time.Second       // for Vault to accept one event
	flushTimeout = 2 * time.Second        // for all that are queued when the mount ends
	closeTimeout = 100 * time.Millisecond // for which close waits; the SDK holds a lock of all mounts meanwhile
)

// Results of an event, for its metric.
const (
	eventSent    = "sent"
	eventFailed  = "failed"
	eventDropped = "dropped" // the queue was full
)

// event is an event to be sent.
type event struct {
	kind     string
	metadata []string // keys and values in turn
}

// events sends events in order, alongside the requests that they are about. No
// request waits for Vault to accept an event, or fails with one.
//
// Only Vault Enterprise lets clients subscribe. Community accepts events too, at
// the price of a call for each mint, so none are sent to it.
type events struct {
	sender       logical.EventSender
	isEnterprise func(context.Context) bool
	result       func(string)

	off         atomic.Bool // no client can subscribe
	start, stop sync.Once
	queue       chan event

	ctx    context.Context // ends soon after close
	cancel context.CancelFunc
	closed chan struct{}
	ended  chan struct{} // closed when run has ended
}

// newEvents returns a queue that calls neither Vault nor the system before its
// first event.
func newEvents(sender logical.EventSender, isEnterprise func(context.Context) bool, result func(string)) *events {
	e := &events{
		sender:       sender,
		isEnterprise: isEnterprise,
		result:       result,
		queue:        make(chan event, maxQueuedEvents),
		closed:       make(chan struct{}),
		ended:        make(chan struct{}),
	}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	return e
}

// send queues an event about a path, or drops it if the queue is full. Vault puts
// the mount's path before path and data_path.
func (e *events) send(kind string, op logical.Operation, path string, metadata ...string) {
	if e.off.Load() {
		return
	}
	e.start.Do(func() { go e.run() })
	dataPath, isCreds := path, false
	if name, ok := strings.CutPrefix(path, "creds/"); ok {
		dataPath, isCreds = "roles/"+name, true
	}
	select {
	case e.queue <- event{kind, append([]string{
		logical.EventMetadataPath, path,
		logical.EventMetadataDataPath, dataPath,
		logical.EventMetadataOperation, string(op),
		logical.EventMetadataModified, strconv.FormatBool(!isCreds),
	}, metadata...)}:
	default:
		e.result(eventDropped)
	}
}

// close flushes the queue, because disabling a mount ends its leases just before.
func (e *events) close() {
	e.stop.Do(func() {
		close(e.closed)
		time.AfterFunc(flushTimeout, e.cancel)
	})
	e.start.Do(func() { close(e.ended) }) // if no event was ever sent
	select {
	case <-e.ended:
		e.cancel()
	case <-time.After(closeTimeout):
	}
}

// run sends until the queue is closed, or no client can subscribe.
func (e *events) run() {
	defer close(e.ended)
	ctx, cancel := context.WithTimeout(e.ctx, eventTimeout)
	e.off.Store(!e.isEnterprise(ctx))
	cancel()
	for !e.off.Load() && e.ctx.Err() == nil {
		select {
		case next := <-e.queue:
			e.sendOne(next)
		case <-e.closed:
			if len(e.queue) == 0 {
				return
			}
			e.sendOne(<-e.queue)
		}
	}
}

// sendOne sends an event to Vault.
func (e *events) sendOne(next event) {
	ctx, cancel := context.WithTimeout(e.ctx, eventTimeout)
	defer cancel()
	err := logical.SendEvent(ctx, e.sender, next.kind, next.metadata...)
	switch {
	case errors.Is(err, framework.ErrNoEvents), status.Code(err) == codes.Unimplemented:
		e.off.Store(true)
	case err != nil:
		e.result(eventFailed)
	default:
		e.result(eventSent)
	}
}

// tokenRequestEnded sends how a token request ended, unless it was refused before
// an API call: Vault's audit log has those.
func (e *events) tokenRequestEnded(r *TokenRequest, o outcome.Outcome) {
	if e.off.Load() || o == outcome.InvalidRequest && r.Failure.Granted == nil {
		return
	}
	kind, metadata := eventCredsCreate, []string{
		"role", r.Role, "organization_id", fields.Organization.Redact(r.Requested.OrganizationID), "request_id", r.ID,
	}
	if t := r.Token; t != nil {
		metadata = append(metadata,
			"scopes", join(t.Granted), "expiry", fmt.Sprint(t.Expiry), "expires_at", t.ExpiresAt())
	} else {
		kind, metadata = eventCredsCreateFail, append(metadata, "outcome", string(o))
		if o == outcome.GrantMismatch {
			kind = eventGrantMismatch
		}
		if code := r.Failure.CableStatus; code != 0 {
			metadata = append(metadata, "cable_status", strconv.Itoa(code))
		}
		if until := r.Failure.UndeliveredUntil; until > 0 {
			metadata = append(metadata, "undelivered_until", outcome.UnixTime(until))
		}
	}
	e.send(kind, r.Operation, r.Path, metadata...)
}
