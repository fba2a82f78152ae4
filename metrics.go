// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"runtime"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/version"
)

// The metrics of one mount on one node, from when it was set up there. Labels
// are bounded: role names only roles that exist, and at most maxMeteredRoles of
// them; code and outcome are closed lists.

const (
	// metricsNamespace begins the name of each metric of the engine's own.
	metricsNamespace = "vault_cable"

	// maxMeteredRoles bounds the series: each role has one per outcome that it
	// has seen.
	maxMeteredRoles = 1000

	// unknownRole and otherRoles stand in the role label for a name that is no
	// role's or could not be read, and for roles beyond maxMeteredRoles. No role
	// can have such a name.
	unknownRole = "(unknown)"
	otherRoles  = "(other)"

	// noResponse stands in the code label for a call that Cable did not respond to.
	noResponse = "none"
)

// meteredCodes are the statuses of Cable's that have a series of their own,
// from the start, so that the first 401 is an increase. Others are counted by
// their class, such as "4xx", and what is no status (HTTP/2 carries any number)
// as "other".
var meteredCodes = []int{200, 400, 401, 403, 404, 408, 429, 500, 502, 503, 504}

// metrics are the figures of a mount in its own registry.
type metrics struct {
	registry *prometheus.Registry

	tokenRequests         *prometheus.CounterVec // role, outcome
	tokenRequestsInFlight prometheus.Gauge
	tokenRequestDuration  prometheus.Histogram
	apiCalls              *prometheus.CounterVec // code
	apiCallsByCode        map[int]prometheus.Counter
	apiCallDuration       prometheus.Histogram
	apiRetries            prometheus.Counter
	pauses                prometheus.Counter
	grantMismatches       prometheus.Counter
	undeliveredTokens     prometheus.Counter
	grantedLifetime       prometheus.Histogram
	leasesEnded           prometheus.Counter
	leaseEndedRemaining   prometheus.Histogram
	reuseFallbacks        *prometheus.CounterVec // cause
	reusedTokenAge        prometheus.Histogram
	reusedTokenReaders    prometheus.Histogram
	events                *prometheus.CounterVec // result
	panics                prometheus.Counter

	rolesMu sync.Mutex
	roles   map[string]bool // those with series
}

// newMetrics returns the metrics of a new mount.
func newMetrics() *metrics {
	m := &metrics{
		registry:       prometheus.NewRegistry(),
		apiCallsByCode: make(map[int]prometheus.Counter),
		roles:          make(map[string]bool),
	}
	register := func(c prometheus.Collector) { m.registry.MustRegister(c) }
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Namespace: metricsNamespace, Name: name, Help: help})
		register(c)
		return c
	}
	counters := func(name, help string, labels ...string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: metricsNamespace, Name: name, Help: help}, labels)
		register(c)
		return c
	}
	gauge := func(name, help string, labels prometheus.Labels) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Namespace: metricsNamespace, Name: name, Help: help, ConstLabels: labels})
		register(g)
		return g
	}
	histogram := func(name, help string, buckets []float64) prometheus.Histogram {
		h := prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: metricsNamespace, Name: name, Help: help, Buckets: buckets})
		register(h)
		return h
	}
	// Up to the longest request_timeout; a healthy Cable responds in tens of
	// milliseconds.
	durations := []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 20, 30, 60}
	lifetimes := []float64{300, 600, 900, 1800, 3600, 7200, 14400, 28800, 43200, 86400}

	m.tokenRequests = counters("token_requests_total",
		"Token requests that ended, by role and outcome.", "role", "outcome")
	m.tokenRequestsInFlight = gauge("token_requests_in_flight",
		"Token requests that are waiting for Cable.", nil)
	m.tokenRequestDuration = histogram("token_request_duration_seconds",
		"Time of a token request in the engine, retries included, if Cable was called.", durations)
	m.apiCalls = counters("api_calls_total",
		"API calls to Cable, by HTTP status; none if Cable did not respond.", "code")
	m.apiCallDuration = histogram("api_call_duration_seconds",
		"Time from sending an API call to the headers of Cable's response, if there was one.", durations)
	m.apiRetries = counter("api_retries_total",
		"API calls to Cable that retry an earlier one.")
	m.pauses = counter("pauses_total",
		"Pauses that began with Cable's 429.")
	m.grantMismatches = counter("grant_mismatches_total",
		"Tokens that were dropped because Cable granted something other than requested.")
	m.undeliveredTokens = counter("undelivered_tokens_total",
		"Token requests that failed after they were sent, so that an undelivered token may exist.")
	m.grantedLifetime = histogram("granted_lifetime_seconds",
		"Lifetime of minted tokens, as Cable granted it.", lifetimes)
	m.leasesEnded = counter("leases_ended_total",
		"Leases that were revoked or expired, those with an unknown token expiry included.")
	m.leaseEndedRemaining = histogram("lease_ended_remaining_lifetime_seconds",
		"Remaining token lifetime when the lease ended; a few seconds if it expired normally.", slices.Concat([]float64{5, 60}, lifetimes))
	m.reuseFallbacks = counters("reuse_fallbacks_total",
		"Reads that returned the previous shared token because Cable is down, by the outcome of the shared call.", "cause")
	m.reusedTokenAge = histogram("reused_token_age_seconds",
		"Age of a shared token when it was returned to another reader.", []float64{1, 10, 60, 300, 600, 1800, 3600, 7200, 14400, 28800, 43200})
	m.reusedTokenReaders = histogram("reused_token_readers",
		"Reads that a shared token was returned to, observed when it is dropped.", []float64{1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10000})
	m.events = counters("events_total",
		"Events for Vault's event system: sent, failed, or dropped because Vault accepted them too slowly.", "result")
	m.panics = counter("panics_total",
		"Requests that failed because of an internal error in the engine.")
	gauge("build_info", "The build of the engine, as labels; always 1.",
		prometheus.Labels{"version": version.String(), "commit": version.Commit(), "goversion": runtime.Version()}).Set(1)
	register(collectors.NewGoCollector())
	register(collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))

	for _, code := range meteredCodes {
		m.apiCallsByCode[code] = m.apiCalls.WithLabelValues(strconv.Itoa(code))
	}
	m.apiCalls.WithLabelValues(noResponse)
	for _, o := range []outcome{outcomeCableError, outcomeRateLimited, outcomePaused, outcomeUnreachable, outcomeTimedOut} {
		m.reuseFallbacks.WithLabelValues(string(o))
	}
	for _, r := range []eventResult{eventSent, eventFailed, eventDropped} {
		m.events.WithLabelValues(string(r))
	}
	return m
}

// apiCallEnded counts an API call to Cable.
func (m *metrics) apiCallEnded(c cable.Call) {
	counter, ok := m.apiCallsByCode[c.StatusCode]
	switch {
	case ok:
	case c.StatusCode == 0:
		counter = m.apiCalls.WithLabelValues(noResponse)
	case c.StatusCode < 100 || c.StatusCode > 599:
		counter = m.apiCalls.WithLabelValues("other")
	default:
		counter = m.apiCalls.WithLabelValues(strconv.Itoa(c.StatusCode/100) + "xx")
	}
	counter.Inc()
	if c.StatusCode != 0 {
		m.apiCallDuration.Observe(c.Duration.Seconds())
	}
	if c.Retry {
		m.apiRetries.Inc()
	}
	if c.PauseBegan {
		m.pauses.Inc()
	}
}

// tokenRequestEnded counts a token request.
func (m *metrics) tokenRequestEnded(r *tokenReport, took time.Duration, isCurrent func(generation uint64) bool) {
	o := r.outcome()
	m.tokenRequests.WithLabelValues(m.roleLabel(r, isCurrent), string(o)).Inc()
	if r.reused {
		m.reusedTokenAge.Observe(r.age.Seconds())
		if r.fallback != "" {
			m.reuseFallbacks.WithLabelValues(string(r.fallback)).Inc()
		}
	} else if r.attempts() > 0 && (r.waited || !r.sharing) {
		m.tokenRequestDuration.Observe(took.Seconds())
	}
}

// callEnded counts what a token request, or a shared call, comes to at Cable.
func (m *metrics) callEnded(r *tokenReport) {
	if r.minted != nil {
		m.grantedLifetime.Observe(float64(r.minted.lifetime))
	}
	if r.outcome() == outcomeGrantMismatch {
		m.grantMismatches.Inc()
	}
	if r.failure != nil && r.failure.undeliveredUntil > 0 {
		m.undeliveredTokens.Inc()
	}
}

// sharedTokenDropped counts the readers of a shared token.
func (m *metrics) sharedTokenDropped(readers int) { m.reusedTokenReaders.Observe(float64(readers)) }

// leaseEnded counts a lease that was revoked or expired; left is the remaining
// lifetime of its token, negative if that is not known.
func (m *metrics) leaseEnded(left time.Duration) {
	m.leasesEnded.Inc()
	if left >= 0 {
		m.leaseEndedRemaining.Observe(left.Seconds())
	}
}

// eventEnded counts an event.
func (m *metrics) eventEnded(r eventResult) { m.events.WithLabelValues(string(r)).Inc() }

// roleLabel is the label for the role of a report.
//
// A role gets a series only if its settings are still those in use: a request
// that ends after its role was deleted must not take up the place again.
// roleDropped comes after the generation has changed, and waits for rolesMu.
func (m *metrics) roleLabel(r *tokenReport, isCurrent func(generation uint64) bool) string {
	if !r.roleExists {
		return unknownRole
	}
	m.rolesMu.Lock()
	defer m.rolesMu.Unlock()
	if !m.roles[r.role] {
		if len(m.roles) >= maxMeteredRoles || !isCurrent(r.generation) {
			return otherRoles
		}
		m.roles[r.role] = true
	}
	return r.role
}

// roleDropped drops the series of a role that was deleted, or may have been.
func (m *metrics) roleDropped(name string) {
	m.rolesMu.Lock()
	defer m.rolesMu.Unlock()
	if m.roles[name] {
		delete(m.roles, name)
		m.tokenRequests.DeletePartialMatch(prometheus.Labels{"role": name})
	}
}

// configMetrics are the figures of the configuration in use. They are made for
// each scrape: what is not known then is not in it.
type configMetrics struct {
	config      *configEntry // nil if there is none
	pausedUntil time.Time
}

// Describe implements [prometheus.Collector].
func (c configMetrics) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(c, ch) }

// Collect implements [prometheus.Collector].
func (c configMetrics) Collect(ch chan<- prometheus.Metric) {
	send := func(name, help string, value float64) {
		desc := prometheus.NewDesc(metricsNamespace+"_"+name, help, nil, nil)
		ch <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value)
	}
	truth := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	send("configured", "Whether config is written.", truth(c.config != nil))
	if c.config == nil {
		return
	}
	send("disabled", "Whether the mount is disabled.", truth(c.config.Disabled))
	send("paused", "Whether token requests are paused after Cable's 429.", truth(time.Now().Before(c.pausedUntil)))
	send("refresh_key_version", "The version of the refresh key in use, counted from 1.", float64(c.config.RefreshKeyVersion))
	if at := c.config.RefreshKeyUpdatedAt; !at.IsZero() {
		send("refresh_key_updated_timestamp_seconds", "When the refresh key was written, in Unix seconds.", float64(at.Unix()))
	}
}
