// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"os"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
)

// Each token request leaves one report. What the engine says of the request, in
// its log, its metrics, its status and Vault's events, is said here and from
// that report, in the same words.

// undeliveredPhrase is what operators search the log for.
const undeliveredPhrase = "token request failed after it was sent; Cable may have issued a token that was not delivered"

// tokenReport is one token request: what is known of it from its receipt to its
// end. mint fills it in.
type tokenReport struct {
	req      *logical.Request
	received time.Time
	role     string // the name, also of a role that does not exist
	verify   bool   // for verify_role: no caller gets the token
	shared   bool   // a call on behalf of all who wait for it
	sharing  bool   // may return such a call's token

	roleExists bool
	generation uint64             // of the settings that the request was resolved with
	requested  cable.TokenRequest // as far as it was decided
	granted    *cable.Token       // as Cable responded, checked or not; nil without a token

	minted  *mintedToken // nil if it failed
	failure *failure     // nil if it did not

	waited     bool // for a shared call
	callFailed bool // and that failed: its own report says so

	reused   bool          // the token was returned to another reader before
	age      time.Duration // of the shared token, since its call was sent
	fallback outcome       // why the previous token was returned, or ""
}

// mintedToken is an access token that was checked and may be returned.
type mintedToken struct {
	*cable.Token
	scopes   []string // as granted, sorted
	lease    int64    // seconds
	lifetime int64    // seconds, as Cable granted it
	longer   bool     // by more than longerGrant than was requested
	warnings []string
}

// expiresAt is the token's expiry in RFC 3339, UTC.
func (m *mintedToken) expiresAt() string { return rfc3339(m.Expiry) }

// outcome names how the request ended.
func (r *tokenReport) outcome() outcome {
	switch {
	case r.failure != nil:
		return r.failure.outcome
	case r.reused:
		return outcomeReused
	default:
		return outcomeMinted
	}
}

// attempts counts the API calls.
func (r *tokenReport) attempts() int {
	switch {
	case r.granted != nil:
		return r.granted.Attempts
	case r.failure != nil:
		return r.failure.attempts
	default:
		return 0
	}
}

// roleName is the role's, if there is such a role.
func (r *tokenReport) roleName() string {
	if !r.roleExists {
		return unknownRole
	}
	return r.role
}

// telemetry is what a mount says of itself. It is told, and asks nothing.
type telemetry struct {
	logger  func() hclog.Logger
	metrics *metrics
	tally   *tally
	events  *eventQueue

	mu     sync.Mutex
	longer map[string]time.Time // when a longer grant was last logged, by role
}

// requestLog is for lines about a request.
//
// NOTE: one process serves all mounts of the engine, and Vault's log has its
// lines under the name of the first of them.
func (t *telemetry) requestLog(req *logical.Request) hclog.Logger {
	log := t.logger().With("mount", req.MountPoint)
	if req.ID != "" { // leases end without a request
		log = log.With("request_id", req.ID)
	}
	return log
}

// tokenRequestEnded reports how a token request ended; isCurrent says whether the
// settings that it was resolved with are still those in use.
func (t *telemetry) tokenRequestEnded(r *tokenReport, isCurrent func(generation uint64) bool) {
	took := time.Since(r.received)
	if r.sharing { // what there is to say of the call, sharedCallEnded says
		if r.failure != nil && !r.callFailed {
			t.logTokenRequest(r, took)
		} else {
			t.logReader(r, took)
		}
		t.metrics.tokenRequestEnded(r, took, isCurrent)
		t.tally.tokenRequestEnded(r)
		return
	}
	t.logTokenRequest(r, took)
	if r.verify {
		return // a trial says nothing about the settings in use
	}
	t.metrics.tokenRequestEnded(r, took, isCurrent)
	t.metrics.callEnded(r)
	t.tally.tokenRequestEnded(r)
	t.events.sendTokenRequest(r)
}

// sharedCallEnded reports how a call ended that was made for all readers who
// waited for it, once.
func (t *telemetry) sharedCallEnded(r *tokenReport) {
	t.logTokenRequest(r, time.Since(r.received))
	t.metrics.callEnded(r)
	t.tally.sharedCallEnded(r)
	t.events.sendTokenRequest(r)
}

// logReader writes the line of a reader of a shared token.
func (t *telemetry) logReader(r *tokenReport, took time.Duration) {
	if !t.logger().IsDebug() || r.outcome() == outcomeMinted { // the call has its line
		return
	}
	phrase := "token reused"
	if r.failure != nil {
		phrase = "token request failed"
	}
	t.requestLog(r.req).Debug(phrase, "role", r.role, "outcome", string(r.outcome()), "duration", took.Round(time.Microsecond).String(),
		"age", r.age.Round(time.Millisecond).String(), "fallback", string(r.fallback))
}

// logTokenRequest writes the one line of a token request.
func (t *telemetry) logTokenRequest(r *tokenReport, took time.Duration) {
	log := t.logger()
	o := r.outcome()
	level, phrase := outcomes[o].level, "token request failed"
	switch {
	case o == outcomeMinted && r.minted.longer && t.isNewLongerGrant(r.role):
		level, phrase = hclog.Warn, "token minted with a longer lifetime than requested"
	case o == outcomeMinted:
		phrase = "token minted"
	case o == outcomeGrantMismatch, o == outcomeInvalidResponse:
		phrase = "Cable's response was refused and its token dropped"
	case r.failure.undeliveredUntil > 0:
		level, phrase = max(level, hclog.Warn), undeliveredPhrase
	case o == outcomeInvalidRequest:
		phrase = "token request refused"
	}
	if level == hclog.Debug && !log.IsDebug() {
		return
	}
	role := r.role
	if !r.roleExists {
		role = shown(nameShape, role)
	}
	fields := []any{
		"role", role, "organization", shown(orgShape, r.requested.OrganizationID), "outcome", string(o),
		"duration", took.Round(time.Microsecond).String(),
	}
	add := func(more ...any) { fields = append(fields, more...) }
	if r.verify {
		add("verify_role", true)
	}
	if n := r.attempts(); n > 0 {
		add("attempts", n)
	}
	if level != hclog.Debug && r.requested.Lifetime > 0 {
		add("requested_scopes", shownScopes(r.requested.Scopes), "requested_seconds", int64(r.requested.Lifetime/time.Second))
	}
	if m := r.minted; m != nil {
		add("lease_seconds", m.lease, "expires_at", m.expiresAt())
	}
	if f := r.failure; f != nil {
		if f.cableStatus != 0 {
			add("cable_status", f.cableStatus)
		}
		add("detail", f.detail)
		if o == outcomeGrantMismatch {
			add("granted_organization", shown(orgShape, r.granted.OrganizationID), "granted_scopes", shownScopes(r.granted.Scopes),
				"expires_at", rfc3339(r.granted.Expiry))
		}
		if f.undeliveredUntil > 0 {
			add("undelivered_until", rfc3339(f.undeliveredUntil))
		}
	}
	t.requestLog(r.req).Log(level, phrase, fields...)
}

// isNewLongerGrant reports whether a longer grant to this role is to be logged:
// once a minute, because a Cable that ignores the requested lifetime does so
// each time.
func (t *telemetry) isNewLongerGrant(role string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if last, ok := t.longer[role]; ok && now.Sub(last) < time.Minute {
		return false
	}
	if len(t.longer) >= maxMeteredRoles {
		clear(t.longer)
	}
	t.longer[role] = now
	return true
}

// leaseEnded reports the end of a lease; left is the remaining lifetime of its
// token, negative if that is not known.
func (t *telemetry) leaseEnded(role, organization string, expiry int64, left time.Duration) {
	t.metrics.leaseEnded(left)
	t.tally.leaseEnded()
	t.events.sendLease(role, organization, expiry, left)
}

// tally is what a mount remembers for status: the last of each kind, and how
// many. It begins when the mount is set up on this node, and is the node's alone.
type tally struct {
	since time.Time
	node  string

	mu          sync.Mutex
	counts      map[outcome]int64
	lastMint    tallied
	lastFailure tallied
	leasesEnded int64
}

// tallied is a token request as status shows it.
type tallied struct {
	at          time.Time // zero if there was none
	role        string
	outcome     outcome
	cableStatus int // 0 without a response
}

// newTally begins to count.
func newTally() *tally {
	node, err := os.Hostname()
	if err != nil {
		node = "unknown"
	}
	return &tally{since: time.Now(), node: node, counts: make(map[outcome]int64)}
}

// tokenRequestEnded counts a token request.
func (c *tally) tokenRequestEnded(r *tokenReport) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counts[r.outcome()]++
	c.keepLastLocked(r)
}

// sharedCallEnded keeps the end of a call that its readers may not see.
func (c *tally) sharedCallEnded(r *tokenReport) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.keepLastLocked(r)
}

// keepLastLocked keeps a token request as the last mint or the last failure, if
// it is one. The caller holds mu.
func (c *tally) keepLastLocked(r *tokenReport) {
	last := tallied{at: time.Now(), role: r.roleName(), outcome: r.outcome()}
	if last.outcome == outcomeMinted {
		c.lastMint = last
	} else if r.failure != nil && outcomes[last.outcome].failure {
		last.cableStatus = r.failure.cableStatus
		c.lastFailure = last
	}
}

// leaseEnded counts a lease that was revoked or expired.
func (c *tally) leaseEnded() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leasesEnded++
}

// toResponseData returns what status says of the past.
func (c *tally) toResponseData() map[string]any {
	c.mu.Lock()
	defer c.mu.Unlock()
	requests := make(map[string]any, len(c.counts))
	for o, n := range c.counts {
		requests[string(o)] = n
	}
	return map[string]any{
		"node":                      c.node,
		"since":                     timestamp(c.since),
		"last_mint_at":              milliseconds(c.lastMint.at),
		"last_mint_role":            c.lastMint.role,
		"last_failure_at":           milliseconds(c.lastFailure.at),
		"last_failure_role":         c.lastFailure.role,
		"last_failure_outcome":      string(c.lastFailure.outcome),
		"last_failure_cable_status": c.lastFailure.cableStatus,
		"token_requests":            requests,
		"leases_ended":              c.leasesEnded,
	}
}

// milliseconds is timestamp to the millisecond, to tell what came first.
func milliseconds(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02T15:04:05.000Z07:00")
}
