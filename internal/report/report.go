// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Package report reports the work of a mount in Vault's log, in the metrics and in status. It receives values and asks
// nothing, so that it can neither delay nor change a request.
//
//   - Each token request has one [TokenRequest], assembled at its end, from which all three are derived, in the same
//     words.
//   - A line is a fixed phrase, then fields. No line or label contains a token, a key, a header or a raw body, at any
//     level.
//   - Metric labels are bounded; see metrics.
package report

import (
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/fields"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/share"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/state"
)

// Reporter reports for one mount on one node, from when it was set up there.
type Reporter struct {
	logger  func() hclog.Logger
	metrics *metrics
	node    string
	since   time.Time

	mu          sync.Mutex
	longer      map[string]time.Time // when a longer grant was last logged, by role
	counts      map[outcome.Outcome]int64
	lastMint    ended
	lastFailure ended
	leasesEnded int64
}

// ended is a token request as status shows it.
type ended struct {
	at          time.Time // zero if there was none
	role        string
	outcome     outcome.Outcome
	cableStatus int // 0 without a response
}

// New returns the reporter of a new mount.
func New(logger func() hclog.Logger) *Reporter {
	node, err := os.Hostname()
	if err != nil {
		node = "unknown"
	}
	return &Reporter{
		logger:  logger,
		metrics: newMetrics(),
		node:    node,
		since:   time.Now(),
		longer:  make(map[string]time.Time),
		counts:  make(map[outcome.Outcome]int64),
	}
}

// Source names the request that a report is about.
type Source struct {
	ID, Mount, Path string
	Operation       logical.Operation
}

// SourceOf returns the names of a request. It keeps nothing else of it, because a report may outlive the request, whose
// storage must not be kept.
func SourceOf(req *logical.Request) Source {
	return Source{ID: req.ID, Mount: req.MountPoint, Path: req.Path, Operation: req.Operation}
}

// log is for lines about a request.
//
// NOTE: one process serves all mounts of the engine, and Vault's log has its lines under the name of the first of them.
func (p *Reporter) log(s Source) hclog.Logger {
	log := p.logger().With("mount", s.Mount)
	if s.ID != "" { // leases end without a request
		log = log.With("request_id", s.ID)
	}
	return log
}

// Kind is the part that a token request has in minting its token.
type Kind int

// The kinds of token requests.
const (
	Direct     Kind = iota // it mints for its caller
	Trial                  // it mints for verify_role, and no caller gets the token
	SharedCall             // the call on behalf of all readers that wait
	Reader                 // it may get the token of a shared call
)

// TokenRequest is a token request that has ended.
type TokenRequest struct {
	Source
	Kind Kind
	Took time.Duration

	// Role is the name, even of a role that does not exist. RoleExists says that the role was read, RoleIsCurrent that
	// it has not changed since.
	Role                      string
	RoleExists, RoleIsCurrent bool

	Requested cable.TokenRequest // as far as it was decided
	Token     *outcome.Token     // nil if it failed
	Failure   *outcome.Failure   // nil if it did not
	Shared    share.Result       // of a Reader
}

// attempts counts the API calls.
func (r *TokenRequest) attempts() int {
	if r.Failure != nil {
		return r.Failure.Attempts
	}
	return r.Token.Attempts
}

// TokenRequestEnded reports how a token request ended. A shared call is reported once; each of its readers has its
// outcome counted and a line at debug level.
func (p *Reporter) TokenRequestEnded(r TokenRequest) {
	o := outcome.Minted
	if r.Failure != nil {
		o = r.Failure.Outcome
	} else if r.Shared.Reused {
		o = outcome.Reused
	}
	if r.Kind == Reader && (r.Failure == nil || r.Shared.CallFailed) {
		p.logReader(&r, o)
	} else {
		p.logTokenRequest(&r, o)
	}
	if r.Kind == Trial {
		return // a trial says nothing about the settings in use
	}
	if r.Kind != SharedCall {
		p.metrics.tokenRequestEnded(&r, o)
	}
	if r.Kind != Reader {
		p.metrics.callEnded(&r, o)
	}
	p.keep(&r, o)
}

// keep counts a token request for status, and keeps it as the last mint or the last failure, if it is one. A shared
// call is kept even if its readers have left.
func (p *Reporter) keep(r *TokenRequest, o outcome.Outcome) {
	last := ended{at: time.Now(), role: r.Role, outcome: o}
	if !r.RoleExists {
		last.role = unknownRole
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if r.Kind != SharedCall {
		p.counts[o]++
	}
	if o == outcome.Minted {
		p.lastMint = last
	} else if r.Failure != nil && o.IsFailure() {
		last.cableStatus = r.Failure.CableStatus
		p.lastFailure = last
	}
}

// logReader writes the line of a reader of a shared token.
func (p *Reporter) logReader(r *TokenRequest, o outcome.Outcome) {
	if !p.logger().IsDebug() || o == outcome.Minted { // the call has its line
		return
	}
	phrase, sum := "token request failed", ""
	if r.Failure == nil {
		phrase, sum = "token reused", r.Token.SHA256
	}
	p.log(r.Source).Debug(phrase, "role", r.Role, "outcome", string(o), "duration", microseconds(r.Took),
		"age", r.Shared.Age.Round(time.Millisecond).String(), "fallback", string(r.Shared.Fallback),
		"token_sha256", sum)
}

// logTokenRequest writes the one line of a token request.
func (p *Reporter) logTokenRequest(r *TokenRequest, o outcome.Outcome) {
	level, phrase := o.Level(), "token request failed"
	switch {
	case o == outcome.Minted && r.Token.IsLonger && p.isNewLongerGrant(r.Role):
		level, phrase = hclog.Warn, "token minted with a longer lifetime than requested"
	case o == outcome.Minted:
		phrase = "token minted"
	case o == outcome.GrantMismatch, o == outcome.InvalidResponse:
		phrase = "Cable's response was refused and its token dropped"
	case r.Failure.UndeliveredUntil > 0:
		level = max(level, hclog.Warn)
		phrase = "token request failed after it was sent; Cable may have issued a token that was not delivered"
	case o == outcome.InvalidRequest:
		phrase = "token request refused"
	}
	if level == hclog.Debug && !p.logger().IsDebug() {
		return
	}
	role := r.Role
	if !r.RoleExists {
		role = fields.RoleName.Redact(role)
	}
	line := []any{
		"role", role, "organization", fields.Organization.Redact(r.Requested.OrganizationID),
		"outcome", string(o), "duration", microseconds(r.Took),
	}
	add := func(more ...any) { line = append(line, more...) }
	if r.Kind == Trial {
		add("verify_role", true)
	}
	if n := r.attempts(); n > 0 {
		add("attempts", n)
	}
	if level != hclog.Debug && r.Requested.Lifetime > 0 {
		add("requested_scopes", fields.Scope.RedactAll(r.Requested.Scopes),
			"requested_seconds", seconds(r.Requested.Lifetime))
	}
	if t := r.Token; t != nil {
		if !t.NoLease {
			add("lease_seconds", seconds(t.Lease))
		}
		add("expires_at", t.ExpiresAt(), "token_sha256", t.SHA256)
	}
	if f := r.Failure; f != nil {
		if f.CableStatus != 0 {
			add("cable_status", f.CableStatus)
		}
		add("detail", f.Detail)
		if g := f.Granted; g != nil && o == outcome.GrantMismatch {
			add("granted_organization", fields.Organization.Redact(g.OrganizationID),
				"granted_scopes", fields.Scope.RedactAll(g.Scopes), "expires_at", outcome.UnixTime(g.Expiry))
		}
		if f.UndeliveredUntil > 0 {
			add("undelivered_until", outcome.UnixTime(f.UndeliveredUntil))
		}
	}
	p.log(r.Source).Log(level, phrase, line...)
}

// isNewLongerGrant reports whether a longer grant to this role is logged. Once a minute is enough, because a Cable that
// ignores the requested lifetime does so each time.
func (p *Reporter) isNewLongerGrant(role string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if last, ok := p.longer[role]; ok && now.Sub(last) < time.Minute {
		return false
	}
	if len(p.longer) >= maxMeteredRoles {
		clear(p.longer)
	}
	p.longer[role] = now
	return true
}

// ConfigWritten reports a write of config.
func (p *Reporter) ConfigWritten(s Source, c *state.Config) {
	p.log(s).Info("config written", "refresh_key_version", c.RefreshKeyVersion, "disabled", c.Disabled)
}

// ConfigDeleted reports the deletion of config.
func (p *Reporter) ConfigDeleted(s Source) { p.log(s).Info("config deleted") }

// RoleWritten reports a write of a role.
func (p *Reporter) RoleWritten(s Source, name string, r *state.Role) {
	p.log(s).Info("role written",
		"role", name, "organization", fields.Organization.Redact(r.OrganizationID), "disabled", r.Disabled)
}

// RoleDeleted reports the deletion of a role.
func (p *Reporter) RoleDeleted(s Source, name string) {
	p.log(s).Info("role deleted", "role", name)
	p.RoleGone(name)
}

// WriteFailed reports a write that failed in Vault's storage. trial is the token that verify_role minted in vain, "" if
// there is none.
func (p *Reporter) WriteFailed(s Source, err error, trial string) {
	p.log(s).Warn("write failed in Vault's storage; whether it was stored is not known", "detail", err.Error())
	if trial != "" {
		p.log(s).Warn("config not stored, but verify_role had already minted a token", "detail", trial)
	}
}

// NoConfigGauges reports that metrics are served without the configuration's.
func (p *Reporter) NoConfigGauges(s Source, err error) {
	p.log(s).Warn("serving metrics without configuration gauges: configuration could not be read",
		"detail", err.Error())
}

// Panicked reports an internal error. The value of the panic is not shown, because it may contain anything.
func (p *Reporter) Panicked(s Source, value any, stack []byte) {
	p.metrics.panics.Inc()
	p.log(s).Error("panic in a handler; the request failed and the engine continues",
		"operation", s.Operation, "path", s.Path, "panic_type", fmt.Sprintf("%T", value), "stack", string(stack))
}

// Lease is a lease that has ended. Its fields are empty if its record cannot be read.
type Lease struct {
	Role, Organization, TokenSHA256 string

	Expiry     int64 // of the token, in Unix seconds
	HasExpired bool  // the lease was not revoked
}

// LeaseEnded reports the end of a lease, revoked or expired.
func (p *Reporter) LeaseEnded(s Source, l Lease) {
	log := p.log(s).With("role", l.Role, "organization", fields.Organization.Redact(l.Organization),
		"token_sha256", l.TokenSHA256)
	p.metrics.leasesEnded.Inc()
	p.mu.Lock()
	p.leasesEnded++
	p.mu.Unlock()
	if l.Expiry == 0 {
		log.Info("lease ended; token expiry unknown")
		return
	}
	left := max(0, time.Until(time.Unix(l.Expiry, 0)))
	p.metrics.leaseEndedRemaining.Observe(left.Seconds())
	if left > 0 && !l.HasExpired {
		log.Info("lease ended before its token; Cable cannot revoke tokens, so it stays valid",
			"expires_at", outcome.UnixTime(l.Expiry), "remaining_seconds", seconds(left))
	} else {
		log.Debug("lease ended", "expires_at", outcome.UnixTime(l.Expiry))
	}
}

// Status returns the fields of status about the past, for this node since the mount was set up there.
func (p *Reporter) Status() map[string]any {
	p.mu.Lock()
	defer p.mu.Unlock()
	requests := make(map[string]any, len(p.counts))
	for o, n := range p.counts {
		requests[string(o)] = n
	}
	return map[string]any{
		"node":                      p.node,
		"since":                     outcome.Time(p.since),
		"last_mint_at":              milliseconds(p.lastMint.at),
		"last_mint_role":            p.lastMint.role,
		"last_failure_at":           milliseconds(p.lastFailure.at),
		"last_failure_role":         p.lastFailure.role,
		"last_failure_outcome":      string(p.lastFailure.outcome),
		"last_failure_cable_status": p.lastFailure.cableStatus,
		"token_requests":            requests,
		"leases_ended":              p.leasesEnded,
	}
}

// milliseconds formats a time in RFC 3339 with millisecond precision, so that times can be ordered.
func milliseconds(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02T15:04:05.000Z07:00")
}

func seconds(d time.Duration) int64 { return int64(d / time.Second) }

func microseconds(d time.Duration) string { return d.Round(time.Microsecond).String() }
