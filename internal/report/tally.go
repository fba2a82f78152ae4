// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package report

import (
	"os"
	"sync"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
)

// tally has what status reports of the past: the last mint, the last failure, and counts, for this node since the mount
// was set up.
type tally struct {
	since time.Time
	node  string

	mu          sync.Mutex
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

// newTally begins to count.
func newTally() *tally {
	node, err := os.Hostname()
	if err != nil {
		node = "unknown"
	}
	return &tally{since: time.Now(), node: node, counts: make(map[outcome.Outcome]int64)}
}

// count counts a token request.
func (c *tally) count(o outcome.Outcome) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counts[o]++
}

// keepLast keeps a token request as the last mint or the last failure, if it is one. A shared call is kept even if its
// readers have left.
func (c *tally) keepLast(r *TokenRequest, o outcome.Outcome) {
	last := ended{at: time.Now(), role: r.roleName(), outcome: o}
	c.mu.Lock()
	defer c.mu.Unlock()
	if o == outcome.Minted {
		c.lastMint = last
	} else if r.Failure != nil && o.IsFailure() {
		last.cableStatus = r.Failure.CableStatus
		c.lastFailure = last
	}
}

// leaseEnded counts a lease that was revoked or expired.
func (c *tally) leaseEnded() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leasesEnded++
}

// Status returns what status says of the past.
func (p *Reporter) Status() map[string]any {
	c := p.tally
	c.mu.Lock()
	defer c.mu.Unlock()
	requests := make(map[string]any, len(c.counts))
	for o, n := range c.counts {
		requests[string(o)] = n
	}
	return map[string]any{
		"node":                      c.node,
		"since":                     outcome.Time(c.since),
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

// milliseconds formats a time in RFC 3339 with millisecond precision, so that times can be ordered.
func milliseconds(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02T15:04:05.000Z07:00")
}
