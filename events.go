// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Types of the events for Vault's event system. Their metadata contains Vault's
// own keys (path, data_path, operation, modified) and those that the
// functions below add, never a secret. Vault puts the mount's path before path
// and data_path.
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
	// maxQueuedEvents bounds what waits for Vault: some seconds of a busy mount.
	maxQueuedEvents = 1024

	// eventTimeout bounds how long Vault may take for one event, flushTimeout for
	// all that are queued when the mount ends, and closeTimeout how long the mount
	// waits for these.
	eventTimeout = 10 * time.Second
	flushTimeout = 2 * time.Second
	closeTimeout = 100 * time.Millisecond
)

// eventResult says what became of an event.
type eventResult string

const (
	eventSent    eventResult = "sent"
	eventFailed  eventResult = "failed"
	eventDropped eventResult = "dropped" // as maxQueuedEvents waited
)

// event is one to be sent.
type event struct {
	kind     string
	metadata []string // keys and values in turn
}

// eventQueue sends events in order, alongside the requests that they are about:
// none of these waits for Vault, nor fails with an event.
type eventQueue struct {
	sender logical.EventSender
	heard  func(context.Context) bool // whether anybody can subscribe
	result func(eventResult)

	off   atomic.Bool // nobody can
	start sync.Once
	stop  sync.Once
	queue chan event

	ctx    context.Context // ends soon after close
	cancel context.CancelFunc
	done   chan struct{} // closed by close
	ended  chan struct{} // closed when nothing is sent any more
}

// newEventQueue returns a queue that takes nothing from Vault or the system
// before its first event.
func newEventQueue(sender logical.EventSender, heard func(context.Context) bool, result func(eventResult)) *eventQueue {
	q := &eventQueue{
		sender: sender, heard: heard, result: result,
		queue: make(chan event, maxQueuedEvents), done: make(chan struct{}), ended: make(chan struct{}),
	}
	q.ctx, q.cancel = context.WithCancel(context.Background())
	return q
}

// send puts an event into the queue, or drops it if that is full.
func (q *eventQueue) send(kind string, metadata ...string) {
	if q.off.Load() {
		return
	}
	q.start.Do(func() { go q.run() })
	select {
	case q.queue <- event{kind, metadata}:
	default:
		q.result(eventDropped)
	}
}

// close has what is queued sent, as a mount that is disabled ends its leases
// just before. It waits for that no longer than closeTimeout: the SDK holds the
// lock of all mounts meanwhile. What is sent later finds the mount closed.
func (q *eventQueue) close() {
	q.stop.Do(func() {
		close(q.done)
		time.AfterFunc(flushTimeout, q.cancel)
	})
	q.start.Do(func() { close(q.ended) }) // if nothing was ever sent
	select {
	case <-q.ended:
		q.cancel()
	case <-time.After(closeTimeout):
	}
}

// run sends until the queue is closed, or nobody can subscribe.
func (q *eventQueue) run() {
	defer close(q.ended)
	ctx, cancel := context.WithTimeout(q.ctx, eventTimeout)
	heard, err := within(ctx, func() (bool, error) { return q.heard(ctx), nil })
	q.off.Store(err == nil && !heard)
	cancel()
	for !q.off.Load() && q.ctx.Err() == nil {
		select {
		case e := <-q.queue:
			q.sendOne(e)
		case <-q.done:
			if len(q.queue) == 0 {
				return
			}
			q.sendOne(<-q.queue)
		}
	}
}

// sendOne sends an event to Vault.
func (q *eventQueue) sendOne(e event) {
	ctx, cancel := context.WithTimeout(q.ctx, eventTimeout)
	defer cancel()
	_, err := within(ctx, func() (any, error) { return nil, logical.SendEvent(ctx, q.sender, e.kind, e.metadata...) })
	switch {
	case errors.Is(err, framework.ErrNoEvents), status.Code(err) == codes.Unimplemented:
		q.off.Store(true)
	case err != nil:
		q.result(eventFailed)
	default:
		q.result(eventSent)
	}
}

// letsSubscribe reports whether the server lets anybody subscribe to events.
// Vault Community 1.16 and later does not (sys/events/subscribe is part of
// Enterprise), although it accepts them, at the price of a call for each mint.
func letsSubscribe(ctx context.Context, system logical.SystemView) bool {
	env, err := system.PluginEnv(ctx)
	if err != nil || env == nil {
		return true // an older or other server: it will say itself if it accepts none
	}
	return !strings.HasPrefix(env.GetVaultVersion(), "1.") || strings.Contains(env.GetVaultVersionMetadata(), "ent")
}

// sendConfig sends that config was written or deleted; version is that of the
// refresh key, 0 if there is none any more.
func (q *eventQueue) sendConfig(req *logical.Request, kind string, version int) {
	metadata := eventMetadata(req.Operation, configStoragePath, configStoragePath, true)
	if version > 0 {
		metadata = append(metadata, "refresh_key_version", strconv.Itoa(version))
	}
	q.send(kind, metadata...)
}

// sendRole sends that a role was written, or deleted if it is nil.
func (q *eventQueue) sendRole(req *logical.Request, kind, name string, role *roleEntry) {
	metadata := append(eventMetadata(req.Operation, "roles/"+name, "roles/"+name, true), "role", name)
	if role != nil {
		metadata = append(metadata, "organization_id", shown(orgShape, role.OrganizationID))
	}
	q.send(kind, metadata...)
}

// sendTokenRequest sends how a token request ended. Requests that were refused
// before Cable was called are no event: Vault's audit log has them.
func (q *eventQueue) sendTokenRequest(r *tokenReport) {
	o := r.outcome()
	if o == outcomeInvalidRequest && r.granted == nil || q.off.Load() {
		return
	}
	metadata := append(eventMetadata(r.req.Operation, r.req.Path, "roles/"+r.role, false),
		"role", r.role, "organization_id", shown(orgShape, r.requested.OrganizationID), "request_id", r.req.ID)
	if m := r.minted; m != nil {
		q.send(eventCredsCreate, append(metadata, "scopes", strings.Join(shownScopes(m.scopes), ","),
			"expiry", strconv.FormatInt(m.Expiry, 10), "expires_at", m.expiresAt())...)
		return
	}
	metadata = append(metadata, "outcome", string(o))
	if code := r.failure.cableStatus; code != 0 {
		metadata = append(metadata, "cable_status", strconv.Itoa(code))
	}
	if until := r.failure.undeliveredUntil; until > 0 {
		metadata = append(metadata, "undelivered_until", rfc3339(until))
	}
	kind := eventCredsCreateFail
	if o == outcomeGrantMismatch {
		kind = eventGrantMismatch
	}
	q.send(kind, metadata...)
}

// sendLease sends that a lease ended; left is negative if the token's expiry is
// not known.
func (q *eventQueue) sendLease(role, organization string, expiry int64, left time.Duration) {
	metadata := append(eventMetadata(logical.RevokeOperation, "creds/"+role, "roles/"+role, false),
		"role", role, "organization_id", shown(orgShape, organization))
	if left >= 0 {
		metadata = append(metadata, "expiry", strconv.FormatInt(expiry, 10), "expires_at", rfc3339(expiry),
			"remaining_seconds", strconv.FormatInt(int64(left/time.Second), 10))
	}
	q.send(eventLeaseRevoke, metadata...)
}

// eventMetadata is what Vault's event system knows of each event.
func eventMetadata(op logical.Operation, path, dataPath string, modified bool) []string {
	return []string{
		logical.EventMetadataPath, path,
		logical.EventMetadataDataPath, dataPath,
		logical.EventMetadataOperation, string(op),
		logical.EventMetadataModified, strconv.FormatBool(modified),
	}
}
