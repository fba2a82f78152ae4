// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package report

import (
	"runtime"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/state"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/version"
)

// Metric labels are bounded. Role names are only those of roles that exist, and at most maxMeteredRoles of them; code,
// outcome and cause are closed lists.

const (
	metricsNamespace = "vault_cable"
	maxMeteredRoles  = 1000 // each has a series per outcome that it has seen

	// Role labels that are no role's name.
	unknownRole = "(unknown)" // for a role that does not exist or could not be read
	otherRoles  = "(other)"   // for roles beyond maxMeteredRoles
)

// meteredCodes are the HTTP statuses with their own series, created at zero so that increase() sees the first one; 0
// stands for a call that Cable did not respond to.
var meteredCodes = []int{0, 200, 400, 401, 403, 404, 408, 429, 500, 502, 503, 504}

// metrics are the figures of a mount in its own registry.
type metrics struct {
	registry *prometheus.Registry

	tokenRequests         *prometheus.CounterVec // role, outcome
	tokenRequestsInFlight prometheus.Gauge
	tokenRequestDuration  prometheus.Histogram
	apiCalls              *prometheus.CounterVec // code
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
	panics                prometheus.Counter

	rolesMu sync.Mutex
	roles   map[string]bool // those with series
}

// newMetrics returns the metrics of a new mount.
func newMetrics() *metrics {
	m := &metrics{registry: prometheus.NewRegistry(), roles: make(map[string]bool)}
	auto := promauto.With(m.registry)
	counter := func(name, help string) prometheus.Counter {
		return auto.NewCounter(prometheus.CounterOpts{Namespace: metricsNamespace, Name: name, Help: help})
	}
	counters := func(name, help string, labels ...string) *prometheus.CounterVec {
		return auto.NewCounterVec(prometheus.CounterOpts{Namespace: metricsNamespace, Name: name, Help: help}, labels)
	}
	gauge := func(name, help string, labels prometheus.Labels) prometheus.Gauge {
		return auto.NewGauge(
			prometheus.GaugeOpts{Namespace: metricsNamespace, Name: name, Help: help, ConstLabels: labels})
	}
	histogram := func(name, help string, buckets ...float64) prometheus.Histogram {
		return auto.NewHistogram(
			prometheus.HistogramOpts{Namespace: metricsNamespace, Name: name, Help: help, Buckets: buckets})
	}
	// Up to the longest request_timeout; a healthy Cable responds in tens of milliseconds.
	durations := []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 20, 30, 60}
	lifetimes := []float64{300, 600, 900, 1800, 3600, 7200, 14400, 28800, 43200, 86400}

	m.tokenRequests = counters("token_requests_total",
		"Token requests that ended, by role and outcome.", "role", "outcome")
	m.tokenRequestsInFlight = gauge("token_requests_in_flight", "Token requests that are waiting for Cable.", nil)
	m.tokenRequestDuration = histogram("token_request_duration_seconds",
		"Time of a token request in the engine, retries included, if Cable was called.", durations...)
	m.apiCalls = counters("api_calls_total",
		"API calls to Cable, by HTTP status; none if Cable did not respond.", "code")
	m.apiCallDuration = histogram("api_call_duration_seconds",
		"Time from sending an API call to the headers of Cable's response, if there was one.", durations...)
	m.apiRetries = counter("api_retries_total", "API calls to Cable that retry an earlier one.")
	m.pauses = counter("pauses_total", "Pauses that began with Cable's 429.")
	m.grantMismatches = counter("grant_mismatches_total",
		"Tokens that were dropped because Cable granted something other than requested.")
	m.undeliveredTokens = counter("undelivered_tokens_total",
		"Tokens that Cable may have issued and that no reader received.")
	m.grantedLifetime = histogram("granted_lifetime_seconds",
		"Lifetime of minted tokens, as Cable granted it.", lifetimes...)
	m.leasesEnded = counter("leases_ended_total",
		"Leases that were revoked or expired, those with an unknown token expiry included.")
	m.leaseEndedRemaining = histogram("lease_ended_remaining_lifetime_seconds",
		"Remaining token lifetime when the lease ended; a few seconds if it expired normally.",
		slices.Concat([]float64{5, 60}, lifetimes)...)
	m.reuseFallbacks = counters("reuse_fallbacks_total",
		"Reads that returned the previous shared token because Cable is down, by the outcome of the shared call.",
		"cause")
	m.reusedTokenAge = histogram("reused_token_age_seconds",
		"Age of a shared token when it was returned to another reader.",
		1, 10, 60, 300, 600, 1800, 3600, 7200, 14400, 28800, 43200)
	m.reusedTokenReaders = histogram("reused_token_readers",
		"Reads that a shared token was returned to, observed when it is dropped.",
		1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10000)
	m.panics = counter("panics_total", "Requests that failed because of an internal error in the engine.")
	gauge("build_info", "The build of the engine, as labels; always 1.", prometheus.Labels{
		"version": version.String(), "commit": version.Commit(), "goversion": runtime.Version(),
	}).Set(1)
	m.registry.MustRegister(
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))

	for _, code := range meteredCodes {
		m.apiCalls.WithLabelValues(codeLabel(code))
	}
	for _, o := range outcome.All() {
		if (&outcome.Failure{Outcome: o, Attempts: 1}).MeansDown() {
			m.reuseFallbacks.WithLabelValues(string(o))
		}
	}
	return m
}

// CallBegan counts a token request that waits for Cable, until ended is called.
func (p *Reporter) CallBegan() (ended func()) {
	p.metrics.tokenRequestsInFlight.Inc()
	return p.metrics.tokenRequestsInFlight.Dec
}

// SharedTokenDropped counts the readers of a shared token that is dropped.
func (p *Reporter) SharedTokenDropped(readers int) {
	p.metrics.reusedTokenReaders.Observe(float64(readers))
}

// APICallEnded counts an API call to Cable.
func (p *Reporter) APICallEnded(c cable.Call) {
	m := p.metrics
	m.apiCalls.WithLabelValues(codeLabel(c.StatusCode)).Inc()
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

// codeLabel is the label for the status of an API call. A status without its own series is counted by its class.
func codeLabel(status int) string {
	switch {
	case status == 0:
		return "none"
	case slices.Contains(meteredCodes, status):
		return strconv.Itoa(status)
	case status < 100 || status > 599:
		return "other"
	default:
		return strconv.Itoa(status/100) + "xx"
	}
}

// tokenRequestEnded counts a token request of a caller.
func (m *metrics) tokenRequestEnded(r *TokenRequest, o outcome.Outcome) {
	m.tokenRequests.WithLabelValues(m.roleLabel(r), string(o)).Inc()
	if r.Shared.Reused {
		m.reusedTokenAge.Observe(r.Shared.Age.Seconds())
		if r.Shared.Fallback != "" {
			m.reuseFallbacks.WithLabelValues(string(r.Shared.Fallback)).Inc()
		}
	} else if r.attempts() > 0 && (r.Kind == Direct || r.Shared.Waited) {
		m.tokenRequestDuration.Observe(r.Took.Seconds())
	}
}

// callEnded counts the result of the API calls of a token request or of a shared call.
func (m *metrics) callEnded(r *TokenRequest, o outcome.Outcome) {
	if r.Token != nil {
		m.grantedLifetime.Observe(r.Token.Lifetime.Seconds())
	}
	if o == outcome.GrantMismatch {
		m.grantMismatches.Inc()
	}
	if r.Failure != nil && r.Failure.UndeliveredUntil > 0 {
		m.undeliveredTokens.Inc()
	}
}

// roleLabel is the label for the role of a token request. A role gets a series only if its settings are still current,
// because a request that ends after its role was deleted must not take up the place again.
func (m *metrics) roleLabel(r *TokenRequest) string {
	if !r.RoleExists {
		return unknownRole
	}
	m.rolesMu.Lock()
	defer m.rolesMu.Unlock()
	if !m.roles[r.Role] {
		if len(m.roles) >= maxMeteredRoles || !r.RoleIsCurrent { // labels are bounded
			return otherRoles
		}
		m.roles[r.Role] = true
	}
	return r.Role
}

// RoleGone drops the series of a role that was deleted, or may have been.
func (p *Reporter) RoleGone(name string) {
	m := p.metrics
	m.rolesMu.Lock()
	defer m.rolesMu.Unlock()
	if m.roles[name] {
		delete(m.roles, name)
		m.tokenRequests.DeletePartialMatch(prometheus.Labels{"role": name})
	}
}

// Metrics returns the metrics of the mount.
func (p *Reporter) Metrics() prometheus.Gatherer { return p.metrics.registry }

// ConfigMetrics returns the gauges of the configuration in use, which is nil if none is stored. They are made for each
// scrape.
func ConfigMetrics(c *state.Config, pausedUntil time.Time) prometheus.Gatherer {
	registry := prometheus.NewRegistry()
	send := func(name, help string, value float64) {
		gauge := prometheus.NewGauge(prometheus.GaugeOpts{Namespace: metricsNamespace, Name: name, Help: help})
		gauge.Set(value)
		registry.MustRegister(gauge)
	}
	truth := map[bool]float64{true: 1}
	send("configured", "Whether config is written.", truth[c != nil])
	if c == nil {
		return registry
	}
	send("disabled", "Whether the mount is disabled.", truth[c.Disabled])
	send("paused", "Whether token requests are paused after Cable's 429.", truth[time.Now().Before(pausedUntil)])
	send("refresh_key_version", "The version of the refresh key in use, counted from 1.", float64(c.RefreshKeyVersion))
	if at := c.RefreshKeyUpdatedAt; !at.IsZero() {
		send("refresh_key_updated_timestamp_seconds", "When the refresh key was written, in Unix seconds.",
			float64(at.Unix()))
	}
	return registry
}
