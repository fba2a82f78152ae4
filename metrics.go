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
	// can be named so.
	unknownRole = "(unknown)"
	otherRoles  = "(other)"

	// noAnswer stands in the code label for a call that Cable did not answer.
	noAnswer = "none"
)

// meteredCodes are the statuses of Cable's that have a series of their own,
// from the start, so that the first 401 is an increase. Others are counted by
// their class, such as "4xx", and what is no status (HTTP/2 carries any number)
// as "other".
func meteredCodes() []int {
	return []int{200, 400, 401, 403, 404, 408, 429, 500, 502, 503, 504}
}

// metrics are the figures of a mount in its own registry.
type metrics struct {
	registry *prometheus.Registry

	mints            *prometheus.CounterVec // role, outcome
	mintsInFlight    prometheus.Gauge
	mintDuration     prometheus.Histogram
	requests         *prometheus.CounterVec // code
	answers          map[int]prometheus.Counter
	requestDuration  prometheus.Histogram
	repeats          prometheus.Counter
	holds            prometheus.Counter
	grantsRefused    prometheus.Counter
	suspectedOrphans prometheus.Counter
	grantedLife      prometheus.Histogram
	revocations      prometheus.Counter
	revokedLife      prometheus.Histogram
	events           *prometheus.CounterVec // result
	panics           prometheus.Counter

	rolesMu sync.Mutex
	roles   map[string]bool // those with series
}

// newMetrics returns the metrics of a new mount.
func newMetrics() *metrics {
	// Up to the longest request_timeout; Cable answers in tens of milliseconds
	// when it is well.
	durations := []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 20, 30, 60}
	lives := []float64{300, 600, 900, 1800, 3600, 7200, 14400, 28800, 43200, 86400}
	m := &metrics{
		registry: prometheus.NewRegistry(),
		answers:  make(map[int]prometheus.Counter),
		roles:    make(map[string]bool),

		mints: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: metricsNamespace, Name: "mints_total",
			Help: "Requests for a token that ended, by role and by how they ended.",
		}, []string{"role", "outcome"}),
		mintsInFlight: prometheus.NewGauge(prometheus.GaugeOpts{
			Namespace: metricsNamespace, Name: "mints_in_flight",
			Help: "Requests for a token that wait for Cable.",
		}),
		mintDuration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: metricsNamespace, Name: "mint_duration_seconds", Buckets: durations,
			Help: "Time of a request for a token in the engine, repeats included, where Cable was asked.",
		}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: metricsNamespace, Subsystem: "api", Name: "requests_total",
			Help: "HTTP requests to Cable, by the status that it answered with; none where it did not answer.",
		}, []string{"code"}),
		requestDuration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: metricsNamespace, Subsystem: "api", Name: "request_duration_seconds", Buckets: durations,
			Help: "Time from sending an HTTP request to Cable to the headers of its answer, where one came.",
		}),
		repeats: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: metricsNamespace, Subsystem: "api", Name: "repeats_total",
			Help: "HTTP requests to Cable that repeat an earlier one.",
		}),
		holds: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: metricsNamespace, Name: "holds_total",
			Help: "Pauses that a 429 of Cable began.",
		}),
		grantsRefused: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: metricsNamespace, Name: "grants_refused_total",
			Help: "Tokens of Cable that were dropped, because they are not what was asked for.",
		}),
		suspectedOrphans: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: metricsNamespace, Name: "suspected_orphans_total",
			Help: "Requests for a token that handed none on, although one may live at Cable.",
		}),
		grantedLife: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: metricsNamespace, Name: "granted_life_seconds", Buckets: lives,
			Help: "Life of the tokens that were handed on, as Cable granted it.",
		}),
		revocations: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: metricsNamespace, Name: "revocations_total",
			Help: "Leases that ended, revoked or expired.",
		}),
		revokedLife: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: metricsNamespace, Name: "revoked_life_seconds", Buckets: slices.Concat([]float64{5, 60}, lives),
			Help: "Life that tokens still had, and keep, when their lease ended; some seconds where it ended by itself.",
		}),
		events: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: metricsNamespace, Name: "events_total",
			Help: "Events for Vault's event system, by whether they were sent, failed, or dropped because Vault took them too slowly.",
		}, []string{"result"}),
		panics: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: metricsNamespace, Name: "panics_total",
			Help: "Requests that failed by a defect of the engine.",
		}),
	}
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Namespace: metricsNamespace, Name: "build_info",
		Help:        "The build of the engine, as labels; always 1.",
		ConstLabels: prometheus.Labels{"version": version.String(), "commit": version.Commit(), "goversion": runtime.Version()},
	})
	build.Set(1)
	m.registry.MustRegister(m.mints, m.mintsInFlight, m.mintDuration, m.requests, m.requestDuration, m.repeats, m.holds,
		m.grantsRefused, m.suspectedOrphans, m.grantedLife, m.revocations, m.revokedLife, m.events, m.panics, build,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	for _, code := range meteredCodes() {
		m.answers[code] = m.requests.WithLabelValues(strconv.Itoa(code))
	}
	m.requests.WithLabelValues(noAnswer)
	for _, r := range []eventResult{eventSent, eventFailed, eventDropped} {
		m.events.WithLabelValues(string(r))
	}
	return m
}

// called counts an HTTP request to Cable.
func (m *metrics) called(c cable.Call) {
	counter, ok := m.answers[c.StatusCode]
	switch {
	case ok:
	case c.StatusCode == 0:
		counter = m.requests.WithLabelValues(noAnswer)
	case c.StatusCode < 100 || c.StatusCode > 599:
		counter = m.requests.WithLabelValues("other")
	default:
		counter = m.requests.WithLabelValues(strconv.Itoa(c.StatusCode/100) + "xx")
	}
	counter.Inc()
	if c.StatusCode != 0 {
		m.requestDuration.Observe(c.Duration.Seconds())
	}
	if c.Retry {
		m.repeats.Inc()
	}
	if c.PauseBegan {
		m.holds.Inc()
	}
}

// mintEnded counts a request for a token.
func (m *metrics) mintEnded(r *mintRecord, o outcome, got *mintedToken, maybeUntil int64) {
	m.mints.WithLabelValues(m.roleLabel(r), string(o)).Inc()
	if o == outcomeGrantRefused {
		m.grantsRefused.Inc()
	}
	if maybeUntil > 0 {
		m.suspectedOrphans.Inc()
	}
	if got != nil {
		m.grantedLife.Observe(float64(got.life))
	}
}

// leaseEnded counts a lease that was revoked or expired; left is what its
// token's life still was, negative where that is not known.
func (m *metrics) leaseEnded(left time.Duration) {
	m.revocations.Inc()
	if left >= 0 {
		m.revokedLife.Observe(left.Seconds())
	}
}

// eventEnded counts an event.
func (m *metrics) eventEnded(r eventResult) { m.events.WithLabelValues(string(r)).Inc() }

// roleLabel is what stands for a record's role.
func (m *metrics) roleLabel(r *mintRecord) string {
	if !r.roleExists {
		return unknownRole
	}
	m.rolesMu.Lock()
	defer m.rolesMu.Unlock()
	if !m.roles[r.role] {
		if len(m.roles) >= maxMeteredRoles {
			return otherRoles
		}
		m.roles[r.role] = true
	}
	return r.role
}

// roleDeleted drops the series of a role.
func (m *metrics) roleDeleted(name string) {
	m.rolesMu.Lock()
	defer m.rolesMu.Unlock()
	if m.roles[name] {
		delete(m.roles, name)
		m.mints.DeletePartialMatch(prometheus.Labels{"role": name})
	}
}

// stateMetrics are the figures of the configuration in use. They are made for
// each scrape: what is not known then is not in it.
type stateMetrics struct {
	active *activeConfig // nil where there is none
}

// Describe implements [prometheus.Collector].
func (s stateMetrics) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(s, ch) }

// Collect implements [prometheus.Collector].
func (s stateMetrics) Collect(ch chan<- prometheus.Metric) {
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
	send("configured", "Whether config is written.", truth(s.active != nil))
	if s.active == nil {
		return
	}
	send("disabled", "Whether the mount is disabled.", truth(s.active.Disabled))
	send("hold_active", "Whether requests are not sent, in the pause after a 429 of Cable.", truth(s.active.client.Pause().Remaining() > 0))
	send("refresh_key_version", "Which refresh key is in use, counted from 1.", float64(s.active.RefreshKeyVersion))
	if at := s.active.RefreshKeyUpdatedAt; !at.IsZero() {
		send("refresh_key_updated_timestamp_seconds", "When the refresh key was written, in Unix seconds.", float64(at.Unix()))
	}
}
