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

// Types of the events that go to Vault's event system. Their metadata holds
// Vault's own keys (path, data_path, operation, modified) and those that the
// functions below add, never a secret. Vault puts the mount's path before path
// and data_path.
const (
	eventConfigWrite     = "cable/config-write"
	eventConfigDelete    = "cable/config-delete"
	eventRoleWrite       = "cable/role-write"
	eventRoleDelete      = "cable/role-delete"
	eventCredsCreate     = "cable/creds-create"
	eventCredsCreateFail = "cable/creds-create-fail"
	eventGrantRefuse     = "cable/grant-refuse"
	eventLeaseRevoke     = "cable/lease-revoke"
)

const (
	// maxQueuedEvents bounds what waits for Vault: some seconds of a busy mount.
	maxQueuedEvents = 1024

	// eventTimeout bounds how long Vault may take for one event, flushTimeout for
	// all that wait when the mount ends.
	eventTimeout = 10 * time.Second
	flushTimeout = 2 * time.Second
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

// eventQueue sends events in their order, beside the requests that they tell
// of: none of these waits for Vault, nor fails with an event.
type eventQueue struct {
	sender logical.EventSender
	heard  func(context.Context) bool // whether anybody can listen
	result func(eventResult)

	off   atomic.Bool // nobody listens
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

// send puts an event into the queue, or drops it where that is full.
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

// close sends what waits, in a bounded time, and ends the sending. A mount
// that is disabled ends its leases just before.
func (q *eventQueue) close() {
	q.stop.Do(func() {
		close(q.done)
		time.AfterFunc(flushTimeout, q.cancel)
	})
	q.start.Do(func() { close(q.ended) }) // where nothing was ever sent
	<-q.ended
	q.cancel()
}

// run sends until the queue is closed, or nobody can listen.
func (q *eventQueue) run() {
	defer close(q.ended)
	ctx, cancel := context.WithTimeout(q.ctx, eventTimeout)
	q.off.Store(!q.heard(ctx))
	cancel()
	for !q.off.Load() {
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

// sendOne hands an event to Vault.
func (q *eventQueue) sendOne(e event) {
	ctx, cancel := context.WithTimeout(q.ctx, eventTimeout)
	defer cancel()
	err := logical.SendEvent(ctx, q.sender, e.kind, e.metadata...)
	switch {
	case errors.Is(err, framework.ErrNoEvents), status.Code(err) == codes.Unimplemented:
		q.off.Store(true)
	case err != nil:
		q.result(eventFailed)
	default:
		q.result(eventSent)
	}
}

// eventsAreHeard reports whether the server lets anybody subscribe to events.
// Vault Community 1.16 and later does not (sys/events/subscribe is part of
// Enterprise), though it takes them: at the price of a call for each mint.
func (b *backend) eventsAreHeard(ctx context.Context) bool {
	env, err := b.System().PluginEnv(ctx)
	if err != nil || env == nil {
		return true // an older or other server: it will say itself if it takes none
	}
	return !strings.HasPrefix(env.GetVaultVersion(), "1.") || strings.Contains(env.GetVaultVersionMetadata(), "ent")
}

// sendConfigEvent tells that config was written or deleted; version is that of
// the refresh key, 0 where there is none any more.
func (b *backend) sendConfigEvent(req *logical.Request, kind string, version int) {
	metadata := eventMetadata(req.Operation, configStoragePath, configStoragePath, true)
	if version > 0 {
		metadata = append(metadata, "refresh_key_version", strconv.Itoa(version))
	}
	b.events.send(kind, metadata...)
}

// sendRoleEvent tells that a role was written, or deleted where it is nil now.
func (b *backend) sendRoleEvent(req *logical.Request, kind, name string, role *roleEntry) {
	metadata := append(eventMetadata(req.Operation, "roles/"+name, "roles/"+name, true), "role", name)
	if role != nil {
		metadata = append(metadata, "organization_id", role.OrganizationID)
	}
	b.events.send(kind, metadata...)
}

// sendMintEvent tells how a request for a token ended. Requests that were
// refused before Cable was asked are no event: Vault's audit log has them.
func (b *backend) sendMintEvent(r *mintRecord, o outcome, m *mintedToken, err error, maybeUntil int64) {
	if o == outcomeRequestRefused || b.events.off.Load() {
		return
	}
	metadata := append(eventMetadata(r.req.Operation, r.req.Path, "roles/"+r.role, false),
		"role", r.role, "organization_id", r.asked.OrganizationID, "request_id", r.req.ID)
	if m != nil {
		b.events.send(eventCredsCreate, append(metadata, "scopes", strings.Join(m.scopes, ","),
			"expiry", strconv.FormatInt(m.Expiry, 10), "expires_at", m.expiresAt())...)
		return
	}
	metadata = append(metadata, "outcome", string(o))
	if code := statusCode(err); code != 0 {
		metadata = append(metadata, "cable_status", strconv.Itoa(code))
	}
	if maybeUntil > 0 {
		metadata = append(metadata, "maybe_alive_until", rfc3339(maybeUntil))
	}
	kind := eventCredsCreateFail
	if o == outcomeGrantRefused {
		kind = eventGrantRefuse
	}
	b.events.send(kind, metadata...)
}

// sendRevokeEvent tells that a lease ended.
func (b *backend) sendRevokeEvent(role, organization string, expiry int64, left time.Duration) {
	metadata := append(eventMetadata(logical.RevokeOperation, "creds/"+role, "roles/"+role, false),
		"role", role, "organization_id", organization)
	if left >= 0 {
		metadata = append(metadata, "expiry", strconv.FormatInt(expiry, 10), "expires_at", rfc3339(expiry),
			"seconds_left", strconv.FormatInt(int64(left/time.Second), 10))
	}
	b.events.send(eventLeaseRevoke, metadata...)
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
