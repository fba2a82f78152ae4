// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"crypto/rand"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/report"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/version"
)

// families reads the metrics as a scraper does.
func (m *testMount) families() map[string]*dto.MetricFamily {
	m.Helper()
	data := m.read("metrics")
	if data[logical.HTTPStatusCode] != 200 ||
		!strings.HasPrefix(data[logical.HTTPContentType].(string), "text/plain; version=0.0.4") {
		m.Fatalf("the response of metrics: %v %v", data[logical.HTTPStatusCode], data[logical.HTTPContentType])
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(data[logical.HTTPRawBody].(string)))
	must(m, err)
	return families
}

// figures returns the values of the metrics by series, of a histogram its count and its sum.
func (m *testMount) figures() map[string]float64 {
	m.Helper()
	figures := make(map[string]float64)
	for name, family := range m.families() {
		for _, metric := range family.GetMetric() {
			labels := make([]string, 0, len(metric.GetLabel()))
			for _, l := range metric.GetLabel() {
				labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
			}
			series := ""
			if len(labels) > 0 {
				slices.Sort(labels)
				series = "{" + strings.Join(labels, ",") + "}"
			}
			if h := metric.GetHistogram(); h != nil {
				figures[name+"_count"+series] = float64(h.GetSampleCount())
				figures[name+"_sum"+series] = h.GetSampleSum()
				continue
			}
			figures[name+series] = metric.GetGauge().GetValue() + metric.GetCounter().GetValue()
		}
	}
	return figures
}

// TestMetricsLint checks names, units and help against the conventions of Prometheus.
func TestMetricsLint(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.read("creds/ci")
	problems, err := promlint.NewWithMetricFamilies(slices.Collect(maps.Values(m.families()))).Lint()
	must(t, err)
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "vault_cable") {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
}

// TestMetricsMove checks that each metric moves when the event that it counts happens. A metric without a case fails
// the test.
func TestMetricsMove(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	fault := func(f Fault) { m.sim.SetFault(f) }
	mint := func() { _, _ = m.request(opRead, "creds/ci", nil) }
	good := func() { m.sim.ClearFaults(); m.read("creds/ci") }
	up := func(after, before float64) bool { return after == before+1 }
	down := func(after, before float64) bool { return before == 1 && after == 0 }
	moved := func(after, before float64) bool { return after != before }

	steps := []struct {
		series string
		do     func()
		want   func(after, before float64) bool
	}{
		{
			fmt.Sprintf("build_info{commit=%q,goversion=%q,version=%q}",
				version.Commit(), runtime.Version(), version.String()),
			func() {},
			func(after, _ float64) bool { return after == 1 },
		},
		{"configured", m.writeConfig, up},
		{"refresh_key_version", m.writeConfig, func(after, _ float64) bool { return after == 1 }},
		{"refresh_key_updated_timestamp_seconds", func() {}, func(after, _ float64) bool {
			return time.Since(time.Unix(int64(after), 0)) < time.Minute
		}},
		{"disabled", func() { m.write("config", kv{"disabled": true}) }, up},
		{"disabled", func() { m.write("config", kv{"disabled": false}) }, down},
		{`token_requests_total{outcome="invalid_request",role="(unknown)"}`, mint, up},
		{`token_requests_total{outcome="minted",role="ci"}`, func() {
			m.write("roles/ci", kv{"scopes": "transactions:read", "ttl": "10m"})
			good()
		}, up},
		{"token_request_duration_seconds_count", good, up},
		{"token_request_duration_seconds_sum", good, moved},
		{`api_calls_total{code="200"}`, good, up},
		{`api_calls_total{code="401"}`, func() { fault(Fault{Status: 401}); mint() }, up},
		{`api_calls_total{code="4xx"}`, func() { fault(Fault{Status: 418}); mint() }, up},
		{`api_calls_total{code="5xx"}`, func() { fault(Fault{Status: 599}); mint() }, up},
		{`api_calls_total{code="other"}`, func() { m.b.report.APICallEnded(cable.Call{StatusCode: 999}) }, up},
		{`api_calls_total{code="none"}`, func() { fault(Fault{Reset: cabletest.ResetAfter}); mint() }, up},
		{"api_call_duration_seconds_count", good, up},
		{"api_call_duration_seconds_sum", good, moved},
		{"api_retries_total", func() {
			fault(Fault{Status: 429, Times: 1, Header: map[string]string{"Retry-After": "0"}})
			mint()
		}, up},
		{"undelivered_tokens_total", func() { fault(Fault{Status: 500}); mint() }, up},
		{"grant_mismatches_total", func() { fault(tooMuch); mint() }, up},
		{"granted_lifetime_seconds_count", good, up},
		{"granted_lifetime_seconds_sum", good, func(after, before float64) bool {
			return after-before >= 599 && after-before <= 601
		}},
		{"leases_ended_total", func() { m.revoke("ci") }, up},
		{"lease_ended_remaining_lifetime_seconds_count", func() { m.revoke("ci") }, up},
		{"lease_ended_remaining_lifetime_seconds_sum", func() { m.revoke("ci") }, func(after, before float64) bool {
			return after-before > 500 && after-before <= 600
		}},
		{"token_requests_in_flight", func() {
			fault(Fault{Delay: time.Minute})
			calls := m.sim.CallCount()
			go mint() // it ends with its request_timeout
			m.calls(calls + 1)
		}, up},
		{"token_requests_in_flight", func() {
			m.waitUntil(func() bool { return m.figures()["vault_cable_token_requests_in_flight"] == 0 })
		}, down},
		{"panics_total", func() {
			op := m.b.Route("creds/ci").Operations[opUpdate].(*framework.PathOperation)
			handler := op.Callback
			defer func() { op.Callback = handler }()
			op.Callback = func(context.Context, *logical.Request, *framework.FieldData) (*logical.Response, error) {
				panic("a defect")
			}
			m.refused(500, opUpdate, "creds/ci", nil)
		}, up},
		{"reused_token_age_seconds_count", func() {
			m.sim.ClearFaults()
			m.write("roles/ci", kv{"ttl": 600, "reuse_for": 1})
			m.read("creds/ci")
			m.read("creds/ci")
		}, up},
		{`reuse_fallbacks_total{cause="cable_error"}`, func() {
			fault(Fault{Status: 500})
			// until reuse_for has passed
			m.waitUntil(func() bool { return len(m.ok(opRead, "creds/ci", nil).Warnings) > 0 })
		}, up},
		{"reused_token_readers_count", func() { m.write("roles/ci", kv{"reuse_for": 0}) }, up},
		{"pauses_total", func() {
			fault(Fault{Status: 429, Header: map[string]string{"Retry-After": "90"}})
			mint()
			mint()
		}, up},
		{"paused", m.writeConfig, func(after, _ float64) bool { return after == 1 }},
	}
	m.sim.ClearFaults()
	covered := make(map[string]bool)
	for i, s := range steps {
		if s.series == "token_requests_in_flight" && i > 0 && steps[i-1].series != s.series {
			m.write("config", kv{"request_timeout": 1})
		}
		before := m.figures()
		s.do()
		after := m.figures()
		series := "vault_cable_" + s.series
		if !s.want(after[series], before[series]) {
			t.Errorf("%s: %v, and %v before", series, after[series], before[series])
		}
		covered[strings.TrimSuffix(strings.TrimSuffix(strings.SplitN(series, "{", 2)[0], "_count"), "_sum")] = true
	}
	for name := range m.families() {
		if strings.HasPrefix(name, "vault_cable") && !covered[name] {
			t.Errorf("no case makes %s move", name)
		}
	}
	for _, name := range []string{"go_goroutines", "process_resident_memory_bytes"} {
		if m.families()[name] == nil {
			t.Errorf("no %s", name)
		}
	}
}

// revoke mints a token for a role and ends its lease.
func (m *testMount) revoke(role string) {
	m.Helper()
	m.sim.ClearFaults()
	secret := m.ok(opRead, "creds/"+role, nil).Secret
	req := m.newRequest(nil, opRevoke, "creds/"+role, nil)
	req.Secret = &logical.Secret{InternalData: secret.InternalData}
	_, err := m.b.HandleRequest(m.Context(), req)
	must(m, err)
}

// maxMeteredRoles is the number of roles that have series, as docs/reference.md says.
const maxMeteredRoles = 1000

// BenchmarkMetricsRead measures a scrape of a few roles, and of as many as have series.
func BenchmarkMetricsRead(b *testing.B) {
	for _, roles := range []int{3, maxMeteredRoles} {
		b.Run(fmt.Sprintf("%d roles", roles), func(b *testing.B) {
			m := newConfiguredMount(b)
			for i := range roles {
				for _, o := range []outcome.Outcome{outcome.KeyRejected, outcome.InvalidRequest, outcome.CableError} {
					m.b.report.TokenRequestEnded(report.TokenRequest{
						Role: fmt.Sprint("role-", i), RoleExists: true, RoleIsCurrent: true,
						Failure: &outcome.Failure{Outcome: o},
					})
				}
			}
			b.ReportAllocs()
			for b.Loop() {
				_, err := m.send(b.Context(), m.storage, opRead, "metrics", nil)
				must(b, err)
			}
		})
	}
}

// TestMetricSlotsOfDeletedRoles checks that a deleted role takes no place, however requests and deletions of many
// short-lived roles overlap.
func TestMetricSlotsOfDeletedRoles(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.sim.SetFault(Fault{Delay: 5 * time.Millisecond})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range (maxMeteredRoles + 100) / 8 {
				name := "r" + strings.ToLower(rand.Text())
				m.write("roles/"+name, kv{"scopes": "person:read"})
				done := make(chan struct{})
				go func() {
					defer close(done)
					_, _ = m.request(opRead, "creds/"+name, nil)
				}()
				m.ok(opDelete, "roles/"+name, nil)
				<-done
			}
		})
	}
	wg.Wait()
	m.write("roles/gone", kv{"scopes": "person:read"})
	m.read("creds/gone")
	must(m, m.storage.Delete(t.Context(), "roles/gone")) // on another node
	m.b.InvalidateKey(t.Context(), "roles/gone")
	for series := range m.figures() {
		if strings.HasPrefix(series, "vault_cable_token_requests_total") && !strings.Contains(series, "(") {
			t.Errorf("a role that was deleted has a series: %s", series)
		}
	}
	m.read("creds/ci")
	if n := m.figures()[`vault_cable_token_requests_total{outcome="minted",role="ci"}`]; n != 1 {
		t.Errorf("the real role has %v", n)
	}
}
