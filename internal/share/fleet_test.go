// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package share

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/http"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/lifetime"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
)

// A fleet of Vault Agents that read one role, with a virtual clock. The engine's
// own rules, in this package and in lifetime, decide the result of each read. This
// file adds Agents, Cable, and a Vault that responds at once.
//
//	go test -run 'TestFleet$' -v -timeout 20m ./internal/share -fleet

var fleetTable = flag.Bool("fleet", false,
	"simulate a day of up to 1,000,000 Agents and print the table of docs/performance.md")

// tick is the clock's step, and Cable's latency.
const tick = 50 * time.Millisecond

// fleet is a simulation.
type fleet struct {
	name          string
	agents        int
	ttl, reuseFor time.Duration // of the role; each read mints if reuseFor is 0
	threshold     float64       // lease_renewal_threshold, the part of the lease after which Agents read again
	noLease       bool          // of the role; Agents read again when the ttl of the response and a second have passed
	start         time.Duration // over which the first reads are spread
	length        time.Duration // of the simulation
	outage        time.Duration // when Cable begins to respond 503
	outageLength  time.Duration
	leaderLost    time.Duration // when a node takes over that has nothing in memory
}

// fleetResult has the counts of a simulation.
type fleetResult struct {
	calls, failedCalls   int // to Cable; calls that Cable did not grant
	reads, failedReads   int // of creds/NAME
	peakCalls, peakReads int // in a second
	tokens, readers      int // minted; reads that returned a shared one
	expired              int // times that a lease ended before its Agent had another
	leases, peakLeases   int // that Vault holds; the most
	writes               int // to Vault's storage: two for a lease, and two more when it ends
}

// agent is a Vault Agent with one template that reads the role.
type agent struct {
	next     int32 // in the list of Agents that read at the same tick
	leaseEnd int32 // tick, also of a lease that there would be; 0 before the first one
	failures int32 // in a row
}

// retryWait is how long a Vault Agent 1.21 with default settings waits after so
// many failed reads in a row. Its HTTP client reads three times, 1 s to 1.5 s
// and 2 s to 3 s apart (vault/api: DefaultConfig). After that its template waits
// for 250 ms, doubling up to 1 minute, 12 times (config/retry.go of consul-template).
// After that Agent starts its templates again, 1 s later, doubling up to 5 minutes
// (command/agent/template of Vault).
func retryWait(failures int32, random *rand.Rand) time.Duration {
	n, request := (failures-1)/3, (failures-1)%3
	switch restart, retry := n/13, n%13; {
	case request < 2:
		return time.Duration(request+1) * (time.Second + time.Duration(random.Int64N(int64(time.Second/2))))
	case retry < 12:
		return min(250*time.Millisecond<<retry, time.Minute)
	default:
		return min(time.Second<<min(restart, 9), 5*time.Minute)
	}
}

// run simulates the fleet.
func (f fleet) run() (d fleetResult) {
	const perSecond = int32(time.Second / tick)
	var (
		random      = rand.New(rand.NewPCG(1, 2))
		epoch       = time.Unix(1_800_000_000, 0)
		at          = func(t int32) time.Time { return epoch.Add(time.Duration(t) * tick) }
		agents      = make([]agent, f.agents+1)    // from 1: 0 ends a list
		due         = make([]int32, f.length/tick) // the first Agent that reads at each tick
		ends        = make([]int32, len(due))      // the number of leases that end at each tick
		unavailable = outcome.Classify(&cable.Error{
			Kind: cable.Responded, StatusCode: http.StatusServiceUnavailable, MaybeIssued: true, Attempts: 1,
		})
		waiting []int32 // Agents, for the shared call
		s       *role
	)
	elect := func() {
		s = &role{
			reuseFor: f.reuseFor,
			least:    lifetime.LeastLease(f.noLease),
			dropped:  func(readers int) { d.readers += readers },
		}
	}
	readLater := func(i, t int32, wait time.Duration) {
		if t += int32(wait / tick); int(t) < len(due) {
			agents[i].next, due[t] = due[t], i
		}
	}
	// respond gives a reader a token, or a failure if t is nil.
	respond := func(i, now int32, t *token, isReused bool) {
		a := &agents[i]
		if t == nil {
			d.failedReads++
			a.failures++
			readLater(i, now, retryWait(a.failures, random))
			return
		}
		t.readers++
		lease := t.lease(at(now), isReused)
		if a.leaseEnd > 0 && a.leaseEnd < now {
			d.expired++
		}
		a.failures, a.leaseEnd = 0, now+int32(lease/tick)
		if f.noLease { // as leaseCheckWait of consul-template
			readLater(i, now, lifetime.ReadAgain(lease, func(n time.Duration) time.Duration {
				return time.Duration(random.Int64N(int64(n)))
			})+time.Second)
			return
		}
		d.writes += 2
		d.leases++
		if int(a.leaseEnd) < len(ends) {
			ends[a.leaseEnd]++
		}
		// The threshold, give or take a twentieth, as in leaseCheckWait of consul-template.
		readLater(i, now, time.Duration((f.threshold-0.05+random.Float64()*0.1)*float64(lease)))
	}
	// call is Cable's response to a call sent at the tick before t.
	call := func(t int32) (*token, *outcome.Failure) {
		sent, now := at(t-1), at(t)
		if since := sent.Sub(epoch) - f.outage; since >= 0 && since < f.outageLength {
			d.failedCalls++
			return nil, unavailable
		}
		d.tokens++
		granted := &cable.Token{
			Expiry: now.Add(f.ttl).Unix(), Date: now.Truncate(time.Second), SentAt: sent, ReceivedAt: now,
		}
		m := &outcome.Token{Token: granted}
		m.Lease, m.Lifetime, _ = lifetime.Lease(granted, f.ttl, now)
		return &token{requested: f.ttl, minted: m, leasedAt: now, undelivered: func(*outcome.Token) {}}, nil
	}

	elect()
	for i := range int32(f.agents) {
		readLater(i+1, 0, time.Duration(random.Int64N(int64(f.start))))
	}
	var reads, calls int // before this second
	for t := range int32(len(due)) {
		if t%perSecond == 0 {
			d.peakReads, d.peakCalls = max(d.peakReads, d.reads-reads), max(d.peakCalls, d.calls-calls)
			reads, calls = d.reads, d.calls
			d.peakLeases = max(d.peakLeases, d.leases)
		}
		d.leases -= int(ends[t])
		d.writes += 2 * int(ends[t])
		if s.call != nil { // ends, as run and wait do it
			minted, failed := call(t)
			s.call = nil
			s.recordLocked(minted, failed, at(t))
			previous := failed != nil && s.last.isFallback(at(t), f.ttl)
			for n, i := range waiting {
				if previous {
					respond(i, t, s.last, true)
				} else {
					respond(i, t, minted, n > 0)
				}
			}
			waiting = waiting[:0]
		}
		if time.Duration(t)*tick == f.leaderLost {
			s.retire()
			elect()
		}
		for i := due[t]; i > 0; {
			reader := i
			i = agents[i].next
			d.reads++
			if f.reuseFor == 0 {
				d.calls++
				token, _ := call(t + 1)
				respond(reader, t+1, token, false)
				continue
			}
			// As read does it.
			switch now := at(t); {
			case s.isFresh(s.last, now, f.ttl):
				respond(reader, t, s.last, true)
				continue
			case s.backingOff(now) == nil:
			case s.last.isFallback(now, f.ttl):
				respond(reader, t, s.last, true)
				continue
			default:
				respond(reader, t, nil, false)
				continue
			}
			if s.call == nil {
				d.calls++
				s.call = new(token)
			}
			waiting = append(waiting, reader)
		}
	}
	s.retire()
	for _, a := range agents {
		if a.leaseEnd > 0 && int(a.leaseEnd) < len(due) {
			d.expired++
		}
	}
	return d
}

// outageCovered is the longest outage of Cable in which no read of any fleet
// fails. A token is minted at most reuse_for before a reader gets it; that
// reader is back when the threshold of its lease has passed. The previous token
// is returned until a minute before it expires, and the first call after the
// outage may be a minute late. Rounding takes the rest.
func (f fleet) outageCovered() time.Duration {
	if f.reuseFor == 0 {
		return 0
	}
	latest := f.threshold + 0.05 // the greatest part of the lease after which an Agent reads again
	if f.noLease {
		latest = 0.75
	}
	left := time.Duration((1 - latest) * float64(f.ttl-f.reuseFor))
	return max(0, left-fallbackLifetime-maxBackoff-5*time.Second)
}

// fleets are compared in the table.
var fleets = []fleet{
	{name: "`ttl=1h` without reuse", ttl: time.Hour, threshold: 0.9},
	{name: "`ttl=1h reuse_for=30m`", ttl: time.Hour, reuseFor: 30 * time.Minute, threshold: 0.9},
	{name: "`ttl=1h reuse_for=5m`", ttl: time.Hour, reuseFor: 5 * time.Minute, threshold: 0.9},
	{name: "`ttl=1h reuse_for=5m lease=false`", ttl: time.Hour, reuseFor: 5 * time.Minute, noLease: true},
	{name: "`ttl=24h reuse_for=12h`", ttl: 24 * time.Hour, reuseFor: 12 * time.Hour, threshold: 0.9},
	{name: "`ttl=1h reuse_for=5m`, threshold 0.5", ttl: time.Hour, reuseFor: 5 * time.Minute, threshold: 0.5},
}

// TestFleet protects the bounds that docs/performance.md states, whenever an
// outage begins.
func TestFleet(t *testing.T) {
	if *fleetTable {
		printFleet()
		return
	}
	t.Parallel()
	for i := range 5 * 3 * 2 * 5 {
		f := []fleet{fleets[0], fleets[1], fleets[2], fleets[3], fleets[5]}[i%5]
		f.agents, f.start = choose(i/5, 1, 10, 1000), choose(i/15, time.Hour, time.Second)
		f.length, f.leaderLost = 6*time.Hour, 5*time.Hour
		f.outage, f.outageLength = 2*time.Hour+time.Duration(i/30)*f.ttl/5, f.outageCovered()
		d := f.run()
		calls := d.reads
		if f.reuseFor > 0 {
			calls = int(f.length/f.reuseFor) + 2 // the first one, and the new leader's
		}
		switch {
		case d.failedReads > 0 || d.expired > 0:
			t.Errorf("%+v: a read failed or a lease ended first: %+v", f, d)
		case d.tokens > calls || d.calls != d.tokens+d.failedCalls:
			t.Errorf("%+v: at most %d calls expected: %+v", f, calls, d)
		case d.failedCalls > 5+int(f.outageLength/maxBackoff): // after 0, 5, 15, 35 and 75 s, then each minute
			t.Errorf("%+v: too many calls in an outage: %+v", f, d)
		case f.reuseFor > 0 && (d.peakCalls != 1 || d.readers != d.reads):
			t.Errorf("%+v: more than one call in a second, or a read without a shared token: %+v", f, d)
		case f.noLease && d.writes+d.peakLeases > 0 || !f.noLease && (d.writes < 2*d.reads || d.peakLeases < f.agents):
			t.Errorf("%+v: storage writes and leases: %+v", f, d)
		}
	}
}

// day simulates a day with an outage of 20 minutes.
func (f fleet) day(outage, leaderLost time.Duration) fleetResult {
	f.length, f.outage, f.outageLength, f.leaderLost = 24*time.Hour, outage, 20*time.Minute, leaderLost
	return f.run()
}

// outages returns how many of 24 outages leave Agents without a token, and how
// many Agents that is on average. The leader is lost some time after they begin.
func (f fleet) outages(leaderLost time.Duration) string {
	f.agents = min(f.agents, 300)
	var some, expired int
	for i := range time.Duration(24) {
		outage := 8*time.Hour + i*38*time.Minute
		d := f.day(outage, outage+leaderLost)
		some += min(d.expired, 1)
		expired += d.expired
	}
	if some == 0 {
		return "0"
	}
	return fmt.Sprintf("%d (%d %%)", some, (expired*100+12*f.agents)/(24*f.agents))
}

// printFleet prints the table of docs/performance.md.
func printFleet() {
	var days []fleet
	for _, n := range []int{10, 1000, 100_000, 1_000_000} {
		for i, f := range fleets {
			f.agents = n
			for _, f.start = range []time.Duration{time.Hour, time.Second} {
				if n == 1_000_000 || i < 4 && f.start == time.Hour {
					days = append(days, f)
				}
			}
		}
	}
	rows := make([]string, len(days))
	free := make(chan struct{}, runtime.GOMAXPROCS(0))
	var wg sync.WaitGroup
	for i, f := range days {
		free <- struct{}{}
		wg.Go(func() {
			defer func() { <-free }()
			d := f.day(8*time.Hour, 16*time.Hour)
			start := map[time.Duration]string{time.Hour: "over an hour", time.Second: "at once"}[f.start]
			row := []string{thousands(f.agents), f.name, start}
			for _, n := range []int{
				d.calls, d.peakCalls, d.reads, d.peakReads, d.failedReads, (d.reads - d.failedReads) / d.tokens,
				d.writes, d.peakLeases,
			} {
				row = append(row, thousands(n))
			}
			row = append(row, f.outages(24*time.Hour), f.outages(10*time.Minute))
			rows[i] = "| " + strings.Join(row, " | ") + " |"
		})
	}
	wg.Wait()
	fmt.Println("| Agents | role | first reads | calls to Cable | most in 1 s | reads | most in 1 s | failed reads " +
		"| readers per token | storage writes | most leases | outages that leave Agents without a token " +
		"| with the leader lost |\n|" +
		strings.Repeat(" --- |", 13) + "\n" + strings.Join(rows, "\n"))
}

// thousands formats a number as 1,000,000.
func thousands(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// choose returns the option for a case of a table.
func choose[T any](n int, options ...T) T { return options[n%len(options)] }
