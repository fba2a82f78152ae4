// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"cmp"
	"fmt"
	"maps"
	"regexp"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/hashicorp/vault/sdk/logical"
	"pgregory.net/rapid"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/state"
)

// present returns everything that a token request would change.
func (m *testMount) present() kv {
	m.Helper()
	status, stored := m.read("status"), kv{}
	maps.DeleteFunc(status, func(name string, _ any) bool { return strings.HasSuffix(name, "_seconds") }) // they pass
	keys, err := logical.CollectKeys(m.Context(), m.storage)
	must(m, err)
	for _, key := range keys {
		stored[key] = m.stored(key)
	}
	metrics := m.figures()
	maps.DeleteFunc(metrics, func(name string, _ float64) bool { return !strings.HasPrefix(name, "vault_cable_") })
	return kv{"status": status, "stored": stored, "metrics": metrics, "log": m.log.String()}
}

// waits matches the seconds that are left of a pause or a back-off.
var waits = regexp.MustCompile(`\d+s\b`)

// wantExplained compares the response of explain with the token request that follows, which made that call to Cable.
func (m *testMount) wantExplained(t rapid.TB, explained *logical.Response, creds *logical.Response, err error,
	call *cable.TokenRequest,
) {
	t.Helper()
	d := explained.Data
	_, failure := statusOf(creds, err)
	if d["allowed"] != (failure == nil) {
		t.Fatalf("explain: %v; creds: %v", d, failure)
	}
	if failure != nil {
		reason := waits.ReplaceAllString(d["reason"].(string), "")
		if reason != waits.ReplaceAllString(failure.Error(), "") {
			t.Fatalf("explain: %q; creds: %q", reason, failure)
		}
		counted := `outcome="` + d["outcome"].(string) + `"`
		for series, n := range m.figures() {
			if strings.Contains(series, counted) && n > 0 {
				return
			}
		}
		t.Fatalf("explain: %v, but no such outcome was counted", d["outcome"])
	}
	if d["reason"] != nil || d["outcome"] != nil || d["reuse"] != (call == nil) {
		t.Fatalf("explain: %v; a call was made: %v", d, call)
	}
	if diff := gocmp.Diff(explained.Warnings, creds.Warnings); diff != "" {
		t.Fatal(diff)
	}
	if d["organization_id"] != creds.Data["organization_id"] ||
		gocmp.Diff(d["scopes"], creds.Data["scopes"]) != "" {
		t.Fatalf("explain: %v; creds: %v %v", d, creds.Data["organization_id"], creds.Data["scopes"])
	}
	if call != nil && d["ttl"] != int64(call.Lifetime/time.Second) || d["ttl"].(int64) > d["max_ttl"].(int64) {
		t.Fatalf("explain: %v; requested %s", d, call.Lifetime)
	}
}

// TestExplain checks for any configuration, role, tuning, parameters and earlier requests that explain says what creds
// then does with a Cable that grants, and that explain changes nothing.
func TestExplain(t *testing.T) {
	t.Parallel()
	organizations := rapid.SampledFrom([]string{"", "org_a", "org_a", "org_b"})
	lists := rapid.SampledFrom([][]string{nil, {"org_a"}, {"org_b", "org_a"}})
	seconds := rapid.Map(rapid.SampledFrom([]int64{0, 0, 0, 0, 60, 300, 1200, 3600, 100_000}),
		func(n int64) time.Duration { return time.Duration(n) * time.Second })
	named := rapid.SampledFrom([]string{"", "", "", "", "org_a", "org_b", "org_c", "o'"})
	subsets := rapid.SampledFrom([]string{"", "", "", "", "a:b", "a:b,c:d", "x:y"})
	scopes := rapid.SampledFrom([][]string{{"a:b"}, {"a:b", "c:d"}, {"a:b"}, {"a:b", "c:d"}, nil})
	pause := Fault{Status: 429, Header: map[string]string{"Retry-After": "60"}}
	faults := []Fault{{}, {}, {}, {Status: 500}, pause, {Status: 401}, tooMuch}
	rapid.Check(t, func(rt *rapid.T) {
		m := newMount(t)
		if rapid.IntRange(0, 9).Draw(rt, "configured") > 0 {
			m.writeConfig()
			m.ok(opPatch, "config", kv{
				"organization_id": orNull(organizations.Draw(rt, "config's organization")),
				"disabled":        rapid.IntRange(0, 9).Draw(rt, "config disabled") == 0,
			})
		}
		role := &state.Role{
			OrganizationID:  organizations.Draw(rt, "organization"),
			OrganizationIDs: lists.Draw(rt, "organizations"),
			Scopes:          scopes.Draw(rt, "scopes"),
			TTL:             seconds.Draw(rt, "ttl"),
			MaxTTL:          seconds.Draw(rt, "max_ttl"),
			ReuseFor:        rapid.SampledFrom([]time.Duration{0, time.Minute, time.Minute}).Draw(rt, "reuse_for"),
			NoLease:         rapid.Bool().Draw(rt, "no lease"),
			Disabled:        rapid.IntRange(0, 9).Draw(rt, "disabled") == 0,
		}
		m.putRole("ci", role)
		m.sys.MaxLeaseTTLVal = cmp.Or(seconds.Draw(rt, "max_lease_ttl"), 768*time.Hour)
		m.sys.DefaultLeaseTTLVal = cmp.Or(seconds.Draw(rt, "default_lease_ttl"), 768*time.Hour)
		for range rapid.IntRange(0, 2).Draw(rt, "earlier requests") {
			m.sim.SetFault(rapid.SampledFrom(faults).Draw(rt, "fault"))
			_, _ = m.request(opRead, "creds/ci", nil)
		}
		m.sim.SetFault(Fault{})

		parameters := kv{}
		if id := named.Draw(rt, "requested organization"); id != "" {
			parameters["organization_id"] = id
		}
		if ttl := seconds.Draw(rt, "requested ttl"); ttl > 0 {
			parameters["ttl"] = int64(ttl / time.Second)
		}
		if scopes := subsets.Draw(rt, "requested scopes"); scopes != "" {
			parameters["scopes"] = scopes
		}
		name := rapid.SampledFrom([]string{"ci", "ci", "ci", "ci", "ci", "ci", "missing", "a..b"}).Draw(rt, "name")
		op := rapid.SampledFrom([]logical.Operation{opRead, opUpdate}).Draw(rt, "operation")

		before, calls := m.present(), m.sim.CallCount()
		explained := m.ok(op, "explain/"+name, parameters)
		if diff := gocmp.Diff(before, m.present()); diff != "" || m.sim.CallCount() != calls {
			rt.Fatalf("explain changed something, or called Cable: %s", diff)
		}
		creds, err := m.request(op, "creds/"+name, parameters)
		var call *cable.TokenRequest
		if n := m.sim.CallCount(); n > calls {
			call = &cable.TokenRequest{Lifetime: time.Duration(m.sim.Calls()[n-1].ExpirySeconds) * time.Second}
		}
		m.wantExplained(rt, explained, creds, err, call)
	})
}

// orNull returns null in place of an empty text.
func orNull(text string) any {
	if text == "" {
		return nil
	}
	return text
}

// TestExplainWhileCableIsDown checks that explain says what a reader of a shared token gets while Cable is down.
func TestExplainWhileCableIsDown(t *testing.T) {
	t.Parallel()
	for _, failure := range down {
		o := string(outcome.Classify(failure).Outcome)
		inBubble(t, o+fmt.Sprint(failure.StatusCode), func(t *testing.T, m *reuseMount) {
			for _, step := range []struct {
				wait    time.Duration
				failure *cable.Error
			}{
				{0, nil},
				{29 * time.Minute, nil},
				{2 * time.Minute, failure},
				{time.Second, failure},
				{10 * time.Minute, failure},
				{50 * time.Minute, failure},
				{time.Second, failure},
				{time.Minute, nil},
			} {
				time.Sleep(step.wait)
				m.cable.set(0, nil, 0)
				explained, err := m.send(t.Context(), m.storage, opRead, "explain/ci", nil)
				must(t, err)
				calls := m.cable.callCount()
				creds, err := m.send(t.Context(), m.storage, opRead, "creds/ci", nil)
				var call *cable.TokenRequest
				if m.cable.callCount() > calls {
					call = &cable.TokenRequest{Lifetime: time.Hour}
				}
				m.wantExplained(t, explained, creds, err, call)
				m.cable.set(0, step.failure, 0)
				_, _ = m.get() // a failure starts a back-off
			}
		})
	}
}

// TestExplainErrors checks that malformed requests and failing storage are errors, as they are of creds.
func TestExplainErrors(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.refused(400, opRead, "explain/ci", kv{"bogus": "x"}, "unknown field")
	m.refused(400, opRead, "explain/ci", kv{"ttl": "soon"}, "ttl is")
	m.refused(400, opRead, "explain/ci", kv{"scopes": ""}, "scopes must not be empty")
	m.put("roles/bad", []byte("{"), nil)
	m.refused(500, opRead, "explain/bad", nil, "cannot be read")
	m.sys.MaxLeaseTTLVal = 0
	m.refused(500, opRead, "explain/ci", nil, "Vault did not respond")
}
