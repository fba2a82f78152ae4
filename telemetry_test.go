// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/state"
)

// undelivered is the phrase that operators search the log for.
const undelivered = "token request failed after it was sent; Cable may have issued a token that was not delivered"

// TestOutcomes ends a request for a token in each way that there is, and wants
// the same word in the log, in metrics and in status.
func TestOutcomes(t *testing.T) {
	t.Parallel()
	const warn, fail, debug = "warn", "error", "debug"
	for _, tt := range []struct {
		outcome     outcome.Outcome
		fault       Fault
		before      func(m *testMount) // besides the fault
		level, log  string
		cable       int // its status
		undelivered bool

		notCalled bool // Cable
		noFailure bool
	}{
		{outcome: outcome.Minted, noFailure: true, level: debug, log: "token minted"},
		{
			outcome: outcome.InvalidRequest, notCalled: true, noFailure: true, level: debug, log: "token request refused",
			before: func(m *testMount) { m.write("roles/ci", kv{"disabled": true}) },
		},
		{outcome: outcome.KeyRejected, fault: Fault{Status: 401}, level: warn, log: "token request failed", cable: 401},
		{outcome: outcome.RejectedByCable, fault: Fault{Status: 403}, level: warn, log: "token request failed", cable: 403},
		{outcome: outcome.RateLimited, fault: Fault{Status: 429}, level: warn, log: "token request failed", cable: 429},
		{
			outcome: outcome.Paused, notCalled: true, fault: Fault{Status: 429}, level: debug, log: "token request failed",
			before: func(m *testMount) { m.refused(429, opRead, "creds/ci", nil) },
		},
		{outcome: outcome.CableError, fault: Fault{Status: 503}, level: warn, log: undelivered, cable: 503, undelivered: true},
		{outcome: outcome.CableError, fault: Fault{Status: 500}, level: warn, log: undelivered, cable: 500, undelivered: true},
		{outcome: outcome.CableError, fault: Fault{Status: 408}, level: warn, log: undelivered, cable: 408, undelivered: true},
		{outcome: outcome.Unreachable, before: func(m *testMount) { m.sim.Close() }, level: warn, log: "token request failed"},
		{outcome: outcome.Unreachable, fault: Fault{Reset: cabletest.ResetAfter}, level: warn, log: undelivered, undelivered: true},
		{outcome: outcome.TimedOut, fault: Fault{Delay: time.Minute}, level: warn, log: undelivered, undelivered: true},
		{outcome: outcome.InvalidResponse, fault: Fault{Body: "<html>"}, level: fail, log: "Cable's response was refused and its token dropped", cable: 200, undelivered: true},
		{
			outcome: outcome.GrantMismatch, fault: Fault{Grant: &Grant{Scopes: &[]string{"everything:write"}}},
			level: fail, log: "Cable's response was refused and its token dropped", cable: 200, undelivered: true,
		},
		{
			outcome: outcome.VaultError, notCalled: true, before: func(m *testMount) { m.sys.MaxLeaseTTLVal = 0 },
			level: fail, log: "token request failed",
		},
	} {
		t.Run(string(tt.outcome), func(t *testing.T) {
			t.Parallel()
			m := newConfiguredMount(t)
			m.write("config", kv{"request_timeout": 1})
			m.sim.SetFault(tt.fault)
			if tt.before != nil {
				tt.before(m)
			}
			before, logged := m.figures(), len(m.log.String())
			_, _ = m.request(opRead, "creds/ci", nil)

			line := m.logLine(m.log.String()[logged:], tt.log)
			if line["outcome"] != string(tt.outcome) || line["@level"] != tt.level || line["role"] != "ci" ||
				line["request_id"] != "req-1" ||
				line["mount"] != "cable/" {
				t.Errorf("the line in the log: %v", line)
			}
			if _, err := time.ParseDuration(line["duration"].(string)); err != nil {
				t.Errorf("duration: %v", err)
			}
			if got, _ := line["cable_status"].(float64); tt.outcome != outcome.Minted && int(got) != tt.cable {
				t.Errorf("cable_status in the log: %v, want %d", line["cable_status"], tt.cable)
			}
			if _, got := line["undelivered_until"]; got != tt.undelivered {
				t.Errorf("undelivered_until in the log: %v", line)
			}

			after := m.figures()
			moved := func(series string) float64 { return after[series] - before[series] }
			if n := moved(`vault_cable_token_requests_total{outcome="` + string(tt.outcome) + `",role="ci"}`); n != 1 {
				t.Errorf("token_requests_total moved by %v", n)
			}
			if n := moved("vault_cable_undelivered_tokens_total"); (n == 1) != tt.undelivered || n > 1 {
				t.Errorf("undelivered_tokens_total moved by %v", n)
			}
			if n := moved("vault_cable_token_request_duration_seconds_count"); (n == 1) == tt.notCalled {
				t.Errorf("token_request_duration_seconds moved by %v", n)
			}

			status := m.read("status")
			if n := status["token_requests"].(kv)[string(tt.outcome)]; n != int64(1) {
				t.Errorf("status counts %v: %v", n, status["token_requests"])
			}
			// What is held is the echo of the 429 before it.
			if want := tt.outcome; tt.noFailure {
				if status["last_failure_at"] != "" {
					t.Errorf("a failure in status: %v", status)
				}
			} else if want == outcome.Paused {
				if status["last_failure_outcome"] != string(outcome.RateLimited) {
					t.Errorf("the last failure in status: %v", status)
				}
			} else if status["last_failure_outcome"] != string(tt.outcome) || status["last_failure_cable_status"] != tt.cable ||
				status["last_failure_role"] != "ci" || status["last_failure_at"] == "" {
				t.Errorf("the last failure in status: %v", status)
			}
			if minted := tt.outcome == outcome.Minted; minted != (status["last_mint_at"] != "") ||
				minted != (status["last_mint_role"] == "ci") {
				t.Errorf("the last mint in status: %v", status)
			}

			if tt.outcome == outcome.GrantMismatch &&
				(fmt.Sprint(line["granted_scopes"]) != "[everything:write]" || line["granted_organization"] != cabletest.DefaultOrganizationID || line["expires_at"] == nil) {
				t.Errorf("what was granted, in the log: %v", line)
			}
		})
	}
	t.Run("canceled", func(t *testing.T) {
		t.Parallel()
		m := newConfiguredMount(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, _ = m.b.HandleRequest(
			ctx,
			&logical.Request{Operation: opRead, Path: "creds/ci", Storage: m.storage, ID: "req-1"},
		)
		if line := m.logLine(m.log.String(), "token request failed"); line["outcome"] != "canceled" ||
			line["@level"] != "debug" {
			t.Errorf("the line in the log: %v", line)
		}
		if status := m.read("status"); status["last_failure_at"] != "" {
			t.Errorf("who leaves is no failure: %v", status)
		}
	})
	t.Run("canceled after sending", func(t *testing.T) {
		t.Parallel()
		m := newConfiguredMount(t)
		m.sim.SetFault(Fault{Delay: time.Minute})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = m.b.HandleRequest(
				ctx,
				&logical.Request{Operation: opRead, Path: "creds/ci", Storage: m.storage, ID: "req-1"},
			)
		}()
		m.waitUntil(func() bool { return m.sim.CallCount() > 0 })
		cancel()
		<-done
		line := m.logLine(m.log.String(), undelivered)
		if line["outcome"] != "canceled" || line["@level"] != "warn" || line["undelivered_until"] == nil ||
			line["requested_scopes"] == nil {
			t.Errorf("the line in the log: %v", line)
		}
		if n := m.figures()["vault_cable_undelivered_tokens_total"]; n != 1 {
			t.Errorf("undelivered_tokens_total %v", n)
		}
	})
	t.Run("a longer life than was asked for", func(t *testing.T) {
		t.Parallel()
		m := newConfiguredMount(t)
		life := 200 * time.Hour
		m.sim.SetFault(Fault{Grant: &Grant{Lifetime: &life}})
		m.read("creds/ci")
		line := m.logLine(m.log.String(), "longer lifetime than requested")
		expiry, err := time.Parse(time.RFC3339, fmt.Sprint(line["expires_at"]))
		if line["@level"] != "warn" || line["outcome"] != "minted" || line["requested_seconds"] != 3600. ||
			err != nil ||
			time.Until(expiry) < 199*time.Hour {
			t.Errorf("the line in the log: %v", line)
		}
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

// logLine returns the fields of the last line that says text.
func (m *testMount) logLine(log, text string) (fields kv) {
	m.Helper()
	for line := range strings.Lines(log) {
		if strings.Contains(line, text) {
			fields = nil
			if err := json.Unmarshal([]byte(line), &fields); err != nil {
				m.Fatal(err)
			}
		}
	}
	if fields == nil {
		m.Fatalf("no line says %q:\n%s", text, log)
	}
	return fields
}

// TestClassify: an error has one outcome and one status, however it is wrapped.
func TestClassify(t *testing.T) {
	t.Parallel()
	token := &cable.Token{Expiry: time.Now().Add(time.Hour).Unix()}
	call := func(e *cable.Error) error {
		m := newMount(t)
		m.b.requestToken = func(context.Context, *cable.Client, cable.TokenRequest) (*cable.Token, error) { return nil, e }
		_, err := m.b.call(t.Context(), "ci", &state.Live{Config: state.NewConfig()}, cable.TokenRequest{})
		return err
	}
	for _, tt := range []struct {
		err    error
		want   outcome.Outcome
		status int
	}{
		{outcome.Refusal("no"), outcome.InvalidRequest, 400},
		{fmt.Errorf("verifying: %w", outcome.Refusal("no")), outcome.InvalidRequest, 400},
		{errors.New("storage"), outcome.VaultError, 500},
		{fmt.Errorf("reading: %w", context.Canceled), outcome.Canceled, 502},
		{status.Error(codes.Canceled, "context canceled"), outcome.Canceled, 502},
		{fmt.Errorf("reading: %w", context.DeadlineExceeded), outcome.TimedOut, 504},
		{outcome.ErrBudget, outcome.TimedOut, 504},
		{outcome.Drop(outcome.Mismatch("no"), token), outcome.GrantMismatch, 502},
		{outcome.Drop(outcome.Refusal("disabled"), token), outcome.InvalidRequest, 400},
		{outcome.Drop(errors.New("storage"), token), outcome.VaultError, 500},
		{call(&cable.Error{Kind: cable.Canceled}), outcome.Canceled, 502},
		{call(&cable.Error{Kind: cable.Paused}), outcome.Paused, 429},
		{call(&cable.Error{Kind: cable.Unreachable}), outcome.Unreachable, 502},
		{call(&cable.Error{Kind: cable.TimedOut}), outcome.TimedOut, 504},
		{call(&cable.Error{Kind: cable.Responded, StatusCode: 401}), outcome.KeyRejected, 400},
		{call(&cable.Error{Kind: cable.Responded, StatusCode: 429}), outcome.RateLimited, 429},
		{call(&cable.Error{Kind: cable.Responded, StatusCode: 418}), outcome.RejectedByCable, 400},
		{call(&cable.Error{Kind: cable.Responded, StatusCode: 408}), outcome.CableError, 502},
		{call(&cable.Error{Kind: cable.Responded, StatusCode: 599}), outcome.CableError, 502},
		{call(&cable.Error{Kind: cable.InvalidResponse, StatusCode: 302}), outcome.InvalidResponse, 502},
	} {
		f := outcome.Classify(tt.err)
		if f.Outcome != tt.want {
			t.Errorf("%v: outcome %s, want %s", tt.err, f.Outcome, tt.want)
		}
		if code, _ := statusOf(f.Respond()); code != tt.status {
			t.Errorf("%v: status %d, want %d", tt.err, code, tt.status)
		}
	}
	if outcome.Classify(nil) != nil {
		t.Error("a failure without an error")
	}
}

// TestLogIsLivable: what can come a hundred times a second from callers alone,
// or as the echo of one answer, is below the level that operators run with.
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
		t.Errorf("status holds what is no role's name: %.1000s", status)
	}
}

// TestLogIsDocumented: each line that the engine writes is in the table of
// docs/reference.md, which operators search their logs by.
func TestLogIsDocumented(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("docs/reference.md")
	if err != nil {
		t.Fatal(err)
	}
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
			t.Errorf("docs/reference.md does not know the line %q", line)
		}
	}
}

// TestLongerGrantIsLoggedOnce: a Cable that ignores the requested lifetime does
// so each time; the log says so once per role and minute, each response says it.
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
}

// TestRefusedTokenByEitherClock: a token that is refused counts as undelivered
// if Cable's clock or the local one says that it is still valid.
func TestRefusedTokenByEitherClock(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		skew, lifetime time.Duration // of Cable's clock; from Cable's clock
		undelivered    bool
	}{
		"expired by both":                    {0, -time.Hour, false},
		"Cable is ahead, valid by ours":      {5 * time.Hour, -time.Hour, true},
		"Cable is behind, valid by its own":  {-5 * time.Hour, time.Hour, true},
		"Cable is behind, expired by both":   {-5 * time.Hour, -time.Hour, false},
		"both agree that it is valid":        {0, time.Hour, true},
		"Cable is far ahead, expired by all": {time.Hour, -2 * time.Hour, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newConfiguredMount(t)
			m.sim.SetFault(
				Fault{ClockSkew: tt.skew, Grant: &Grant{Lifetime: &tt.lifetime, Scopes: &[]string{"everything:write"}}},
			)
			resp, err := m.request(opRead, "creds/ci", nil)
			_, failure := statusOf(resp, err)
			if failure == nil {
				t.Fatal("a token was returned")
			}
			if got := strings.Contains(failure.Error(), "was not delivered, valid until"); got != tt.undelivered {
				t.Errorf("%v", failure)
			}
			if n := m.figures()["vault_cable_undelivered_tokens_total"]; (n == 1) != tt.undelivered {
				t.Errorf("undelivered_tokens_total %v", n)
			}
		})
	}
}
