// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
)

// undelivered is the phrase that operators search the log for.
const undelivered = "token request failed after it was sent; Cable may have issued a token that was not delivered"

// TestOutcomes ends a token request in each possible way, and checks that log, metrics and status report the same word.
func TestOutcomes(t *testing.T) {
	t.Parallel()
	const (
		warn, fail, debug = "warn", "error", "debug"

		failed  = "token request failed"
		refused = "Cable's response was refused and its token dropped"
	)
	for _, tt := range []struct {
		outcome     outcome.Outcome
		fault       Fault
		before      func(m *testMount)
		level, log  string
		cableStatus int
		notCalled   bool
	}{
		{outcome: outcome.Minted, level: debug, log: "token minted"},
		{
			outcome: outcome.InvalidRequest, notCalled: true, level: debug, log: "token request refused",
			before: func(m *testMount) { m.write("roles/ci", kv{"disabled": true}) },
		},
		{outcome: outcome.KeyRejected, fault: Fault{Status: 401}, level: warn, log: failed, cableStatus: 401},
		{outcome: outcome.RejectedByCable, fault: Fault{Status: 403}, level: warn, log: failed, cableStatus: 403},
		{outcome: outcome.RateLimited, fault: Fault{Status: 429}, level: warn, log: failed, cableStatus: 429},
		{
			outcome: outcome.Paused, notCalled: true, fault: Fault{Status: 429}, level: debug, log: failed,
			before: func(m *testMount) { m.refused(429, opRead, "creds/ci", nil) },
		},
		{outcome: outcome.CableError, fault: Fault{Status: 503}, level: warn, log: undelivered, cableStatus: 503},
		{outcome: outcome.CableError, fault: Fault{Status: 500}, level: warn, log: undelivered, cableStatus: 500},
		{outcome: outcome.CableError, fault: Fault{Status: 408}, level: warn, log: undelivered, cableStatus: 408},
		{outcome: outcome.Unreachable, before: func(m *testMount) { m.sim.Close() }, level: warn, log: failed},
		{outcome: outcome.Unreachable, fault: Fault{Reset: cabletest.ResetAfter}, level: warn, log: undelivered},
		{outcome: outcome.TimedOut, fault: Fault{Delay: time.Minute}, level: warn, log: undelivered},
		{outcome: outcome.InvalidResponse, fault: Fault{Body: "<html>"}, level: fail, log: refused, cableStatus: 200},
		{outcome: outcome.GrantMismatch, fault: tooMuch, level: fail, log: refused, cableStatus: 200},
		{
			outcome: outcome.VaultError, notCalled: true, level: fail, log: failed,
			before: func(m *testMount) { m.sys.MaxLeaseTTLVal = 0 },
		},
	} {
		t.Run(string(tt.outcome), func(t *testing.T) {
			t.Parallel()
			m := newConfiguredMount(t)
			isUndelivered := tt.log == undelivered || tt.log == refused
			m.write("config", kv{"request_timeout": 1})
			m.sim.SetFault(tt.fault)
			if tt.before != nil {
				tt.before(m)
			}
			before := m.figures()
			_, _ = m.request(opRead, "creds/ci", nil)

			line := m.logLine(tt.log)
			want := kv{
				"outcome": string(tt.outcome), "@level": tt.level,
				"role": "ci", "request_id": "req-1", "mount": "cable/",
			}
			if tt.cableStatus != 0 {
				want["cable_status"] = float64(tt.cableStatus)
			}
			if tt.outcome == outcome.GrantMismatch {
				want["granted_scopes"] = []any{"everything:write"}
				want["granted_organization"] = cabletest.DefaultOrganizationID
			}
			for name, value := range want {
				if diff := cmp.Diff(value, line[name]); diff != "" {
					t.Errorf("%s in the log: %s", name, diff)
				}
			}
			if _, err := time.ParseDuration(line["duration"].(string)); err != nil {
				t.Errorf("duration: %v", err)
			}
			if _, got := line["undelivered_until"]; got != isUndelivered {
				t.Errorf("undelivered_until in the log: %v", line)
			}

			after := m.figures()
			moved := func(series string) float64 { return after["vault_cable_"+series] - before["vault_cable_"+series] }
			if n := moved(`token_requests_total{outcome="` + string(tt.outcome) + `",role="ci"}`); n != 1 {
				t.Errorf("token_requests_total moved by %v", n)
			}
			if n := moved("undelivered_tokens_total"); (n == 1) != isUndelivered || n > 1 {
				t.Errorf("undelivered_tokens_total moved by %v", n)
			}
			if n := moved("token_request_duration_seconds_count"); (n == 1) == tt.notCalled {
				t.Errorf("token_request_duration_seconds moved by %v", n)
			}

			status := m.read("status")
			wantStatus := kv{
				"last_failure_outcome": string(tt.outcome), "last_failure_cable_status": tt.cableStatus,
				"last_failure_role": "ci", "last_mint_role": "",
			}
			switch tt.outcome {
			case outcome.Paused: // the 429 before it was the failure
				wantStatus["last_failure_outcome"], wantStatus["last_failure_cable_status"] = "rate_limited", 429
			case outcome.Minted:
				wantStatus = kv{"last_failure_at": "", "last_mint_role": "ci"}
			case outcome.InvalidRequest:
				wantStatus = kv{"last_failure_at": "", "last_mint_at": ""}
			}
			for name, value := range wantStatus {
				if diff := cmp.Diff(value, status[name]); diff != "" {
					t.Errorf("%s in status: %s", name, diff)
				}
			}
			if n := status["token_requests"].(kv)[string(tt.outcome)]; n != int64(1) {
				t.Errorf("status counts %v: %v", n, status["token_requests"])
			}
		})
	}
	t.Run("canceled", func(t *testing.T) {
		t.Parallel()
		m := newConfiguredMount(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, _ = m.send(ctx, m.storage, opRead, "creds/ci", nil)
		if line := m.logLine("token request failed"); line["outcome"] != "canceled" || line["@level"] != "debug" {
			t.Errorf("the line in the log: %v", line)
		}
		if status := m.read("status"); status["last_failure_at"] != "" {
			t.Errorf("a caller that leaves is no failure: %v", status)
		}
	})
	t.Run("canceled after sending", func(t *testing.T) {
		t.Parallel()
		m := newConfiguredMount(t)
		m.sim.SetFault(Fault{Delay: time.Minute})
		ctx, cancel := context.WithCancel(t.Context())
		done := m.startWith(ctx, m.storage, opRead, "creds/ci", nil)
		m.calls(1)
		cancel()
		<-done
		line := m.logLine(undelivered)
		if line["outcome"] != "canceled" || line["@level"] != "warn" || line["undelivered_until"] == nil ||
			line["requested_scopes"] == nil {
			t.Errorf("the line in the log: %v", line)
		}
		m.wantUndelivered(1)
	})
	t.Run("a failure, then a mint", func(t *testing.T) {
		t.Parallel()
		m := newConfiguredMount(t)
		m.sim.SetFault(Fault{Status: 401, Times: 1})
		_, _ = m.request(opRead, "creds/ci", nil)
		m.read("creds/ci")
		if status := m.read("status"); status["last_failure_outcome"] != "key_rejected" ||
			status["last_mint_role"] != "ci" {
			t.Errorf("status: %v", status)
		}
	})
}

// logLine returns the fields of the last line in the log that contains text.
func (m *testMount) logLine(text string) (fields kv) {
	m.Helper()
	for line := range strings.Lines(m.log.String()) {
		if strings.Contains(line, text) {
			fields = nil
			must(m, json.Unmarshal([]byte(line), &fields))
		}
	}
	if fields == nil {
		m.Fatalf("no line contains %q:\n%s", text, m.log)
	}
	return fields
}

// TestLogIsLivable checks that lines which callers alone can cause a hundred times a second, or which repeat one
// response of Cable, are below the level that operators run with.
func TestLogIsLivable(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	logged := len(m.log.String())
	m.sim.SetFault(Fault{Status: 429, Times: 1, Header: map[string]string{"Retry-After": "90"}})
	long := strings.Repeat("n", 1<<16)
	for range 50 {
		m.refused(400, opRead, "creds/a..b", nil, `must not contain ".."`)
		m.refused(400, opRead, "creds/"+long, nil, "at most 128 are allowed")
		m.refused(429, opRead, "creds/ci", nil)
		m.refused(400, opRead, "creds/none", nil)
		m.refused(400, opRead, "creds/ci", kv{"ttl": "1s"})
	}
	loud := 0
	for line := range strings.Lines(m.log.String()[logged:]) {
		if !strings.Contains(line, `"@level":"debug"`) && !strings.Contains(line, `"@level":"trace"`) {
			loud++
		}
	}
	if loud != 1 || strings.Contains(m.log.String(), long) {
		t.Errorf("%d lines above debug in the log, want one of the 429:\n%.10000s", loud, m.log)
	}
	if status := fmt.Sprint(m.read("status")); strings.Contains(status, long) || strings.Contains(status, "a..b") {
		t.Errorf("status contains the name of no role: %.1000s", status)
	}
}

// TestLogIsDocumented checks that each line of the engine is in the table of docs/reference.md, by which operators
// search their logs.
func TestLogIsDocumented(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("docs/reference.md")
	must(t, err)
	lines := map[string]bool{"Cable's response was refused and its token dropped": true}
	call := regexp.MustCompile(`(?:\.(?:Debug|Info|Warn|Error)\(|[pP]hrase = |level, |hclog\.\w+, )"([^"]+)"`)
	for _, m := range call.FindAllStringSubmatch(engineSource(t), -1) {
		if !strings.HasPrefix(m[1], "-") { // not a usage text
			lines[m[1]] = true
		}
	}
	if len(lines) < 14 {
		t.Errorf("only %d lines were found: %v", len(lines), lines)
	}
	for line := range lines {
		if line, _, _ = strings.Cut(line, "; the request failed"); !strings.Contains(string(page), "`"+line) {
			t.Errorf("docs/reference.md lacks the line %q", line)
		}
	}
}

// TestLongerGrantIsLoggedOnce checks that a Cable that ignores the requested lifetime causes one line per role and
// minute, and a warning in each response.
func TestLongerGrantIsLoggedOnce(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.write("roles/other", kv{"scopes": "person:read"})
	m.sim.SetFault(Fault{Grant: &Grant{Lifetime: ptr(20 * time.Hour)}})
	for range 3 {
		for _, role := range []string{"ci", "other"} {
			m.wantWarning(m.ok(opRead, "creds/"+role, nil).Warnings, "instead of the requested 3600s")
		}
	}
	if n := strings.Count(m.log.String(), "longer lifetime than requested"); n != 2 {
		t.Errorf("%d lines, want one for each role", n)
	}
	if line := m.logLine("longer lifetime than requested"); line["@level"] != "warn" || line["outcome"] != "minted" ||
		line["requested_seconds"] != 3600. || line["expires_at"] == nil {
		t.Errorf("the line in the log: %v", line)
	}
}
