// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"errors"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
)

// Each request for a token leaves one record. What the engine tells of it, in
// its log, its metrics, its status and Vault's events, is told here and from
// that record, in the same words.

// outcome says in one stable word how a request for a token ended.
type outcome string

const (
	outcomeMinted         outcome = "minted"
	outcomeRequestRefused outcome = "request_refused" // by the engine, before Cable was asked
	outcomeKeyRefused     outcome = "key_refused"     // Cable answered 401
	outcomeCableRefused   outcome = "cable_refused"   // another 4xx
	outcomeRateLimited    outcome = "rate_limited"    // 429
	outcomeHeld           outcome = "held"            // not sent, in the pause after a 429
	outcomeCableFailed    outcome = "cable_failed"    // 5xx, or 408
	outcomeUnreachable    outcome = "unreachable"
	outcomeTimedOut       outcome = "timed_out"
	outcomeCanceled       outcome = "canceled"       // the caller went away
	outcomeAnswerRefused  outcome = "answer_refused" // not what Cable documents
	outcomeGrantRefused   outcome = "grant_refused"  // not what was asked for
	outcomeVaultFailed    outcome = "vault_failed"   // Vault's storage or settings could not be read
)

// outcomeOf names how a mint with this error ended: the one place that
// classifies errors.
func outcomeOf(err error) outcome {
	var (
		mint    *mintError
		ce      *cable.Error
		refused refusal
	)
	switch {
	case err == nil:
		return outcomeMinted
	case errors.As(err, &mint) && mint.refused != nil:
		return outcomeGrantRefused
	case errors.As(err, &ce):
	case errors.As(err, &refused):
		return outcomeRequestRefused
	case errors.Is(err, context.Canceled), status.Code(err) == codes.Canceled:
		return outcomeCanceled // while Vault's storage was read
	default:
		return outcomeVaultFailed
	}
	switch ce.Kind {
	case cable.Paused:
		return outcomeHeld
	case cable.Unreachable:
		return outcomeUnreachable
	case cable.TimedOut:
		return outcomeTimedOut
	case cable.Canceled:
		return outcomeCanceled
	case cable.InvalidResponse:
		return outcomeAnswerRefused
	}
	switch code := ce.StatusCode; {
	case code == http.StatusUnauthorized:
		return outcomeKeyRefused
	case code == http.StatusTooManyRequests:
		return outcomeRateLimited
	case code == http.StatusRequestTimeout || code >= 500:
		return outcomeCableFailed
	default:
		return outcomeCableRefused
	}
}

// isFailure reports whether something is wrong that an operator may want to
// mend: not with the request, not because a caller left, and not as a
// consequence of an earlier failure.
func (o outcome) isFailure() bool {
	return o != outcomeMinted && o != outcomeRequestRefused && o != outcomeHeld && o != outcomeCanceled
}

// mintRecord is what is known of one request for a token.
type mintRecord struct {
	req   *logical.Request
	start time.Time
	role  string // the name, also of one that does not exist

	roleExists bool
	verify     bool               // for verify_role: no caller gets the token
	asked      cable.TokenRequest // as far as it was decided
	granted    *cable.Token       // as Cable answered, checked or not; nil where no token came
}

// newRecord begins the record of a request for a token.
func newRecord(req *logical.Request, role string) *mintRecord {
	return &mintRecord{req: req, start: time.Now(), role: role}
}

// roleName is the role's, where it is one.
func (r *mintRecord) roleName() string {
	if !r.roleExists {
		return unknownRole
	}
	return r.role
}

// askedCable reports whether Cable was called; err is how the request ended.
func (r *mintRecord) askedCable(err error) bool {
	var ce *cable.Error
	return r.granted != nil || errors.As(err, &ce) && ce.Attempts > 0
}

// record tells how a request for a token ended: m is nil where err is not.
func (b *backend) record(r *mintRecord, m *mintedToken, err error) {
	o, now := outcomeOf(err), time.Now()
	var maybeUntil int64
	var mint *mintError
	if errors.As(err, &mint) {
		maybeUntil = mint.maybeUntil
	}
	b.logMint(r, o, now.Sub(r.start), m, err, maybeUntil)
	if r.verify {
		return // it says nothing of the settings in use
	}
	b.metrics.mintEnded(r, o, m, maybeUntil)
	if r.askedCable(err) {
		b.metrics.mintDuration.Observe(now.Sub(r.start).Seconds())
	}
	b.recent.mintEnded(r, o, now, statusCode(err))
	b.sendMintEvent(r, o, m, err, maybeUntil)
}

// statusCode is the HTTP status of the answer of Cable's that err is about, or
// 0 where there was none.
func statusCode(err error) int {
	var ce *cable.Error
	var mint *mintError
	switch {
	case errors.As(err, &ce):
		return ce.StatusCode
	case errors.As(err, &mint) && mint.refused != nil:
		return http.StatusOK
	default:
		return 0
	}
}

// logMint writes the one line of a mint. What one node can see a hundred times
// a second without anything being wrong with it, or as the echo of a line that
// was written, is at debug level.
func (b *backend) logMint(r *mintRecord, o outcome, took time.Duration, m *mintedToken, err error, maybeUntil int64) {
	level, event := hclog.Warn, "no token was minted"
	switch {
	case o == outcomeMinted && m.longer:
		event = "a token was minted, and lives longer than was asked for"
	case o == outcomeMinted:
		level, event = hclog.Debug, "a token was minted"
	case o == outcomeRequestRefused:
		level, event = hclog.Debug, "a request for a token was refused"
	case o == outcomeGrantRefused, o == outcomeAnswerRefused:
		level, event = hclog.Error, refusedEvent
	case maybeUntil > 0:
		event = "no token came, and one that nobody holds may live at Cable"
	case o == outcomeVaultFailed:
		level = hclog.Error
	case o == outcomeHeld, o == outcomeCanceled:
		level = hclog.Debug
	}
	if level == hclog.Debug && !b.Logger().IsDebug() {
		return
	}
	fields := []any{
		"role", r.role, "organization", r.asked.OrganizationID, "outcome", string(o),
		"duration", took.Round(time.Microsecond).String(),
	}
	add := func(more ...any) { fields = append(fields, more...) }
	if r.verify {
		add("verify_role", true)
	}
	if m != nil {
		add("lease_seconds", m.lease, "expires_at", m.expiresAt(), "attempts", m.Attempts)
	}
	if level != hclog.Debug && r.asked.Lifetime > 0 {
		add("asked_scopes", r.asked.Scopes, "asked_seconds", int64(r.asked.Lifetime/time.Second))
	}
	var mint *mintError
	var ce *cable.Error
	if code := statusCode(err); code != 0 {
		add("cable_status", code)
	}
	switch {
	case err == nil:
	case errors.As(err, &ce):
		add("attempts", ce.Attempts, "detail", ce.Detail)
	case errors.As(err, &mint) && mint.refused != nil:
		add("attempts", r.granted.Attempts, "detail", mint.refused.Error())
	default:
		add("detail", err.Error())
	}
	if o == outcomeGrantRefused {
		add("granted_organization", nameSome([]string{r.granted.OrganizationID}), "granted_scopes", nameSome(r.granted.Scopes),
			"expires_at", rfc3339(r.granted.Expiry))
	}
	if maybeUntil > 0 {
		add("maybe_alive_until", rfc3339(maybeUntil))
	}
	b.log(r.req).Log(level, event, fields...)
}

// recent is what a mount remembers for status: the last of each kind, and how
// many. It begins when the mount is set up on this node, and is the node's alone.
type recent struct {
	since time.Time
	node  string

	mu          sync.Mutex
	counts      map[outcome]int64
	lastMint    mintNote
	lastFailure mintNote
	revocations int64
}

// mintNote is a mint as status shows it.
type mintNote struct {
	at          time.Time // zero where there was none
	role        string
	outcome     outcome
	cableStatus int // 0 where none came
}

// newRecent begins to count.
func newRecent() *recent {
	node, err := os.Hostname()
	if err != nil {
		node = "unknown"
	}
	return &recent{since: time.Now(), node: node, counts: make(map[outcome]int64)}
}

// mintEnded takes note of a mint.
func (c *recent) mintEnded(r *mintRecord, o outcome, at time.Time, cableStatus int) {
	note := mintNote{at: at, role: r.roleName(), outcome: o, cableStatus: cableStatus}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counts[o]++
	if o == outcomeMinted {
		c.lastMint = note
	} else if o.isFailure() {
		c.lastFailure = note
	}
}

// leaseEnded counts a lease that was revoked or expired.
func (c *recent) leaseEnded() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.revocations++
}
