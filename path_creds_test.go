// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/fields"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/lifetime"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/state"
)

// ptr returns a pointer to a value.
func ptr[T any](v T) *T { return &v }

// tooMuch is a grant of a scope that was not requested.
var tooMuch = Fault{Grant: &Grant{Scopes: &[]string{"everything:write"}}}

// TestCredsRead checks the response to a token request, its lease, and the call to Cable.
func TestCredsRead(t *testing.T) {
	t.Parallel()
	for _, op := range []logical.Operation{opRead, opUpdate} {
		m := newConfiguredMount(t)
		start := time.Now()
		resp := m.ok(op, "creds/ci", nil)
		minted := m.sim.Minted()
		if len(minted) != 1 {
			t.Fatalf("%d tokens were minted", len(minted))
		}
		want := kv{
			"token":             minted[0].Token,
			"token_sha256":      fmt.Sprintf("%x", sha256.Sum256([]byte(minted[0].Token))),
			"expiry":            minted[0].Expiry.Unix(),
			"expires_at":        minted[0].Expiry.UTC().Format(time.RFC3339),
			"organization_id":   cabletest.DefaultOrganizationID,
			"organization_name": cabletest.DefaultOrganizationName,
			"scope":             "person:read transactions:read",
			"scopes":            []string{"person:read", "transactions:read"},
		}
		if diff := cmp.Diff(want, resp.Data); diff != "" {
			t.Error(diff)
		}
		if resp.Secret.Renewable || resp.Secret.TTL > time.Hour || resp.Secret.TTL < time.Hour-10*time.Second ||
			time.Now().Add(resp.Secret.TTL).After(minted[0].Expiry) || resp.Secret.MaxTTL != resp.Secret.TTL {
			t.Errorf("lease: %+v", resp.Secret)
		}
		end, err := strconv.ParseInt(resp.Secret.InternalData["lease_end"].(string), 10, 64)
		if err != nil || end > minted[0].Expiry.Unix() || time.Until(time.Unix(end, 0)) < time.Hour-10*time.Second {
			t.Errorf("lease_end: %v", resp.Secret.InternalData["lease_end"])
		}
		delete(resp.Secret.InternalData, "lease_end")
		internal := kv{
			"secret_type": "cable_token", "role": "ci", "organization_id": cabletest.DefaultOrganizationID,
			"scopes": "person:read,transactions:read", "expiry": fmt.Sprint(minted[0].Expiry.Unix()),
			"token_sha256": want["token_sha256"],
		}
		if diff := cmp.Diff(internal, resp.Secret.InternalData); diff != "" {
			t.Error(diff)
		}
		if resp.Warnings != nil {
			t.Errorf("warnings: %q", resp.Warnings)
		}
		call := m.sim.Calls()[0]
		if call.ExpirySeconds != 3600 || call.Time.Before(start) ||
			!strings.HasPrefix(call.UserAgent, "vault-plugin-secrets-cable/v0.") {
			t.Errorf("the call: %+v", call)
		}
		if again := m.read("creds/ci"); again["token"] == resp.Data["token"] {
			t.Error("two reads returned one token")
		}
	}
}

// TestCredsNarrowing checks ttl and scopes in each form that Vault accepts.
func TestCredsNarrowing(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.write("roles/ci", kv{"scopes": "a:x,b:x,c:x", "ttl": 900, "max_ttl": 7200})
	for _, tt := range []struct {
		data   kv
		scopes []string
		ttl    int64
	}{
		{nil, []string{"a:x", "b:x", "c:x"}, 900},
		{kv{"scopes": "b:x"}, []string{"b:x"}, 900},
		{kv{"scopes": " c:x ,, a:x,c:x"}, []string{"a:x", "c:x"}, 900},
		{kv{"scopes": []string{"c:x", "a:x"}}, []string{"a:x", "c:x"}, 900},
		{kv{"scopes": []string{"c:x,b:x", "a:x"}}, []string{"a:x", "b:x", "c:x"}, 900},
		{kv{"ttl": "300"}, []string{"a:x", "b:x", "c:x"}, 300},
		{kv{"ttl": 300}, []string{"a:x", "b:x", "c:x"}, 300},
		{kv{"ttl": "2h", "scopes": "a:x"}, []string{"a:x"}, 7200},
	} {
		for _, op := range []logical.Operation{opRead, opUpdate} {
			resp := m.ok(op, "creds/ci", tt.data)
			calls := m.sim.Calls()
			last := calls[len(calls)-1]
			if !slices.Equal(last.Scopes, tt.scopes) || last.ExpirySeconds != tt.ttl || resp.Warnings != nil {
				t.Errorf("%s %v: requested %v for %ds, %q", op, tt.data, last.Scopes, last.ExpirySeconds, resp.Warnings)
			}
			if diff := cmp.Diff(tt.scopes, resp.Data["scopes"]); diff != "" {
				t.Error(diff)
			}
		}
	}
	resp := m.ok(opRead, "creds/ci", kv{"ttl": "3h"})
	m.wantWarning(resp.Warnings, "the requested ttl of 10800s is above the role's max_ttl of 7200s")

	for _, huge := range []any{int64(1 << 40), "99999999999", 1e18, "2000000h", "9223372036854775807"} {
		resp := m.ok(opRead, "creds/ci", kv{"ttl": huge})
		m.wantWarning(resp.Warnings, "is above the role's max_ttl of 7200s: capped at 7200s")
	}
	before := m.sim.CallCount()
	m.refusedAll("creds/ci", []logical.Operation{opRead, opUpdate}, []refusal{
		{kv{"scopes": "d:x"}, `scopes outside role "ci": "d:x"; it allows "a:x", "b:x", "c:x"`},
		{kv{"scopes": "a:x,d:x,e:x"}, `"d:x", "e:x"`},
		{kv{"scopes": "A:x"}, "(not shown: length 3)"},
		{kv{"scopes": "*"}, "(not shown: length 1)"},
		{kv{"scopes": ","}, "scopes must not be empty"},
		{kv{"scopes": []string{}}, "scopes must not be empty"},
		{kv{"scopes": []any{"a:x", kv{}}}, "contains an object"},
		{kv{"ttl": 299}, "ttl 299s is below Cable's minimum of 300s: request 300s to 7200s"},
		{kv{"ttl": 0}, "below Cable's minimum of 300s"},
		{kv{"ttl": "0"}, "below Cable's minimum of 300s"},
		{kv{"ttl": -600}, "cannot be negative"},
		{kv{"ttl": "1e3"}, "ttl is (not shown: length 3)"},
		{kv{"organization_id": "org_other"}, `organization_id "org_other" is not one of the 1 that role "ci" allows`},
	})
	if m.sim.CallCount() != before {
		t.Error("a refused request reached Cable")
	}
}

// FuzzNarrowing checks that, for any request, the scopes that reach Cable are a non-empty part of the role's, or
// nothing is sent.
func FuzzNarrowing(f *testing.F) {
	for _, s := range []string{
		`{}`, `{"scopes":"a:x"}`, `{"scopes":["a:x","b:x,c:x"]}`, `{"scopes":null}`, `{"scopes":""}`,
		`{"scopes":{"a:x":1}}`, `{"ttl":"5m","scopes":[["a:x"]]}`, `{"scopes":"d:x"}`, `{"ttl":-1}`,
		`{"ttl":1e300,"scopes":"a:x\u0000"}`,
	} {
		f.Add([]byte(s))
	}
	role := &state.Role{OrganizationID: "org", Scopes: []string{"a:x", "b:x", "c:x"}, MaxTTL: 2 * time.Hour}
	f.Fuzz(func(t *testing.T, body []byte) {
		var data kv
		if json.Unmarshal(body, &data) != nil {
			return
		}
		b := newBackend()
		path := b.pathCreds()
		if err := b.Setup(t.Context(), &logical.BackendConfig{System: &logical.StaticSystemView{
			MaxLeaseTTLVal: 24 * time.Hour, DefaultLeaseTTLVal: time.Hour,
		}}); err != nil {
			t.Fatal(err)
		}
		set := state.Settings{Config: &state.Live{Config: state.NewConfig()}, Role: role}
		narrow := func(op logical.Operation) {
			parsed, err := fields.Parse(path, &logical.Request{Operation: op, Data: data})
			if err != nil || fields.Input(parsed).RefuseBlanks() != nil {
				return
			}
			r := &request{role: "ci", in: parsed, received: time.Now()}
			p, err := parseParams(r)
			if err != nil {
				return
			}
			a := attempt{role: r.role, set: set, params: p}
			if b.narrow(t.Context(), r, &a) != nil {
				return
			}
			requested := a.requested
			if len(requested.Scopes) == 0 || len(fields.Without(requested.Scopes, role.Scopes)) > 0 ||
				!slices.IsSorted(requested.Scopes) {
				t.Errorf("%s: requests %q", body, requested.Scopes)
			}
			if d := requested.Lifetime; requested.OrganizationID != "org" || d < lifetime.Min || d > role.MaxTTL {
				t.Errorf("%s: requests %+v", body, requested)
			}
		}
		narrow(opRead)
		narrow(opUpdate)
	})
}

// TestOrganizations checks which organization a token is for, and that a refusal says how many are allowed and not
// which.
func TestOrganizations(t *testing.T) {
	t.Parallel()
	const needs = `role "ci" needs organization_id in the request: it allows 2`
	for name, tt := range map[string]struct {
		config, role string
		listed       []string
		named, want  string // want is an organization, or the text of the refusal
	}{
		"role's own":                 {"org_b", "org_a", nil, "", "org_a"},
		"config's":                   {"org_b", "", nil, "", "org_b"},
		"none":                       {"", "", nil, "", "no organization: write organization_id"},
		"none, named":                {"", "", nil, "org_a", "no organization: write organization_id"},
		"role's own, named":          {"org_b", "org_a", nil, "org_a", "org_a"},
		"config's, named":            {"org_b", "", nil, "org_b", "org_b"},
		"config's beside the role's": {"org_b", "org_a", nil, "org_b", "is not one of the 1 that"},
		"listed":                     {"", "org_a", []string{"org_b"}, "org_b", "org_b"},
		"listed, not named":          {"", "org_a", []string{"org_b"}, "", "org_a"},
		"own as well as listed":      {"org_a", "", []string{"org_b"}, "org_a", "org_a"},
		"needed":                     {"", "", []string{"org_a", "org_b"}, "", needs},
		"needed and named":           {"", "", []string{"org_a", "org_b"}, "org_b", "org_b"},
		"another": {
			"", "org_a",
			[]string{"org_a", "org_b"},
			"org_c",
			`organization_id "org_c" is not one of the 2 that role "ci" allows`,
		},
		"another of an odd form": {"org_b", "org_a", nil, "org-b", "organization_id (not shown: length 5) is not one"},
		"malformed":              {"", "org_a", nil, "org'a", "organization_id must not contain"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newConfiguredMount(t)
			m.ok(opPatch, "config", kv{"organization_id": orNull(tt.config)})
			m.putRole("ci", &state.Role{OrganizationID: tt.role, OrganizationIDs: tt.listed, Scopes: []string{"a:b"}})
			m.b.InvalidateKey(t.Context(), "roles/ci")
			parameters := kv{}
			if tt.named != "" {
				parameters["organization_id"] = tt.named
			}
			for _, op := range []logical.Operation{opRead, opUpdate} {
				if strings.HasPrefix(tt.want, "org_") {
					if got := m.ok(op, "creds/ci", parameters).Data["organization_id"]; got != tt.want {
						t.Errorf("the token is for %s, want %s", got, tt.want)
					}
					continue
				}
				resp := m.refused(400, op, "creds/ci", parameters, tt.want)
				for _, id := range []string{"org_a", "org_b"} {
					if id != tt.named && strings.Contains(resp.Error().Error(), id) {
						t.Errorf("the refusal names %s", id)
					}
				}
			}
		})
	}
	m := newConfiguredMount(t)
	m.ok(opPatch, "config", kv{"organization_id": nil})
	m.write("roles/ci", kv{"organization_ids": "org_b,org_a", "ttl": 3600, "reuse_for": 600})
	m.write("config", kv{"verify_role": "ci"})
	first := m.ok(opRead, "creds/ci", kv{"organization_id": "org_a"}).Data["token"]
	if second := m.ok(opRead, "creds/ci", kv{"organization_id": "org_a"}).Data["token"]; first == second {
		t.Error("a read with the parameter got a shared token")
	}
	if got := m.sim.Calls()[0].OrganizationID; got != "org_b" {
		t.Errorf("verify_role minted for %s, not for the first of the list", got)
	}
}

// TestWithoutLease checks the response to a token request of a role with lease=false, for a direct and a shared token.
func TestWithoutLease(t *testing.T) {
	t.Parallel()
	for _, role := range []kv{{"lease": false, "ttl": 600}, {"lease": false, "ttl": 600, "reuse_for": 300}} {
		m := newConfiguredMount(t)
		m.write("roles/ci", role)
		drawn := make(map[any]bool)
		for range 20 {
			resp := m.ok(opRead, "creds/ci", nil)
			ttl, _ := resp.Data["ttl"].(int64)
			if resp.Secret != nil || resp.Data["rotation_period"] != ttl || ttl < 290 || ttl > 450 {
				t.Fatalf("%v %v", resp.Data["ttl"], resp.Secret)
			}
			drawn[ttl] = true
		}
		if len(drawn) < 5 {
			t.Errorf("20 readers return after one of %d times", len(drawn))
		}
		if strings.Contains(m.log.String(), "lease_seconds") {
			t.Error("the log has a lease")
		}
		m.sim.SetFault(Fault{Grant: &Grant{Lifetime: ptr(6 * time.Second)}})
		m.write("roles/ci", kv{"disabled": false}) // drops the shared token
		m.refused(502, opRead, "creds/ci", nil, "Cable's response was refused", "lifetime",
			"Cable may have issued a token that was not delivered")
		m.wantUndelivered(1)
		m.write("roles/ci", kv{"lease": true})
		if m.ok(opRead, "creds/ci", nil).Secret == nil {
			t.Error("a role with leases returned none")
		}
	}
}

// TestTokenSHA256 checks that the log at debug level has the SHA-256 of each token that was returned, and that of each
// lease that ended.
func TestTokenSHA256(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.write("roles/ci", kv{"ttl": 3600, "reuse_for": 600})
	want := m.read("creds/ci")["token_sha256"]
	if m.logLine("token minted")["token_sha256"] != want {
		t.Errorf("want %s: %s", want, m.log)
	}
	reused := m.ok(opRead, "creds/ci", nil)
	if m.logLine("token reused")["token_sha256"] != want || reused.Data["token_sha256"] != want {
		t.Errorf("want %s: %s", want, m.log)
	}
	req := m.newRequest(m.storage, opRevoke, "", nil)
	req.Secret = reused.Secret
	_, err := m.b.HandleRequest(t.Context(), req)
	must(t, err)
	if m.logLine("lease ended before its token")["token_sha256"] != want {
		t.Errorf("want %s: %s", want, m.log)
	}
}

// TestCredsGrants checks that a token is refused, returned with a warning, or returned, according to the comparison of
// Cable's grant with the request (docs/design.md, section 6).
func TestCredsGrants(t *testing.T) {
	t.Parallel()
	granted := func(g Grant) Fault { return Fault{Grant: &g} }
	scopes := func(s ...string) Fault { return granted(Grant{Scopes: &s}) }
	lasting := func(d time.Duration) Fault { return granted(Grant{Lifetime: &d}) }
	date := func(s string) Fault { return Fault{Header: map[string]string{"Date": s}} }
	for _, tt := range []struct {
		name    string
		fault   Fault
		refused string   // a part of the 502, or "" if the token is returned
		scopes  []string // nil for the requested ones
		warning []string
		longest int64 // the lease at most, 0 for an hour
	}{
		{
			name: "another organization", fault: granted(Grant{OrganizationID: ptr("org_other")}),
			refused: `organization "org_other" instead of`,
		},
		{
			name: "no organization", fault: granted(Grant{OrganizationID: ptr("")}),
			refused: `organization "" instead of`,
		},
		{
			name: "another organization inside scopes", fault: granted(Grant{ScopesOrganizationID: ptr("org_other")}),
			refused: `the token's scopes are for organization "org_other"`,
		},
		{
			name: "a scope that was not requested", fault: scopes("person:read", "person:write", "transactions:read"),
			refused: `not requested: "person:write"`,
		},
		{name: "other case", fault: scopes("Person:read"), refused: "(not shown: length 11)"},
		{name: "another order, repeated", fault: scopes("transactions:read", "person:read", "transactions:read")},
		{
			name: "fewer", fault: scopes("person:read"), scopes: []string{"person:read"},
			warning: []string{"fewer scopes", `"transactions:read"`},
		},
		{
			name: "none of them", fault: granted(Grant{Scopes: &[]string{}}), scopes: []string{},
			warning: []string{"fewer scopes", `"person:read", "transactions:read"`},
		},
		{name: "null for the list", fault: scopes()},
		{name: "no scopes in the response", fault: granted(Grant{OmitScopes: true})},
		{
			name: "longer by more than a minute", fault: lasting(2 * time.Hour),
			warning: []string{"granted 7200s instead of the requested 3600s", "is valid until"},
		},
		{name: "longer by a minute", fault: lasting(time.Hour + time.Minute)},
		{name: "shorter", fault: lasting(10 * time.Second), longest: 10},
		{name: "expired", fault: lasting(-time.Second), refused: "its expiry is not in the future"},
		{name: "expired at once", fault: lasting(0), refused: "its expiry is not in the future"},
		{name: "clock ahead", fault: Fault{ClockSkew: 5 * time.Hour}},
		{name: "clock behind", fault: Fault{ClockSkew: -5 * time.Hour}},
		{name: "no date", fault: date("")},
		{name: "nonsense date", fault: date("yesterday")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			m := newConfiguredMount(t)
			m.sim.SetFault(tt.fault)
			if tt.refused != "" {
				m.refused(502, opRead, "creds/ci", nil, "Cable's response was refused", tt.refused)
				if m.sim.CallCount() != 1 {
					t.Errorf("Cable was called %d times", m.sim.CallCount())
				}
				return
			}
			resp := m.ok(opRead, "creds/ci", nil)
			want := tt.scopes
			if want == nil {
				want = []string{"person:read", "transactions:read"}
			}
			if diff := cmp.Diff(want, resp.Data["scopes"]); diff != "" {
				t.Error(diff)
			}
			if tt.warning == nil && resp.Warnings != nil {
				t.Errorf("warnings: %q", resp.Warnings)
			} else if tt.warning != nil {
				m.wantWarning(resp.Warnings, tt.warning...)
			}
			longest := tt.longest
			if longest == 0 {
				longest = 3600
			}
			if got := int64(resp.Secret.TTL / time.Second); got < 1 || got > longest || got < longest-10 {
				t.Errorf("lease %d, want about %d", got, longest)
			}
		})
	}
}

// until is the beginning of the RFC 3339 time after d, to the day.
func (m *testMount) until(d time.Duration) string {
	return time.Now().UTC().Add(d).Format("2006-01-02T")
}

// TestCredsRefusals checks the refusals before Cable is called, and that tuning the mount applies to the next read.
func TestCredsRefusals(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.refused(400, opRead, "creds/ci", nil, `role "ci" does not exist: write it to roles/ci`)
	m.write("roles/ci", kv{"scopes": "person:read"})
	m.refused(400, opRead, "creds/ci", nil, "the mount is not configured: write refresh_key to config")
	m.write("config", kv{"refresh_key": m.sim.RefreshKey(), "token_url": m.sim.URL})
	m.refused(400, opRead, "creds/ci", nil, "no organization: write organization_id to roles/ci or to config")
	m.write("roles/ci", kv{"organization_id": cabletest.DefaultOrganizationID, "disabled": true})
	m.refused(400, opRead, "creds/ci", nil, `role "ci" is disabled: write disabled=false to roles/ci`)
	m.write("roles/ci", kv{"disabled": false})
	m.sys.MaxLeaseTTLVal = 299 * time.Second
	m.refused(400, opRead, "creds/ci", nil, "the mount's max_lease_ttl of 299s is below Cable's minimum of 300s")
	m.sys.MaxLeaseTTLVal = 0
	m.refused(500, opRead, "creds/ci", nil, "reading the mount's lease settings")
	m.sys.MaxLeaseTTLVal = 10 * time.Minute
	m.sys.DefaultLeaseTTLVal = 0
	m.refused(500, opRead, "creds/ci", nil, "reading the mount's lease settings")
	if n := m.sim.CallCount(); n != 0 {
		t.Errorf("Cable was called %d times", n)
	}
	// Mount tuning takes effect at the next read.
	m.sys.DefaultLeaseTTLVal = time.Hour
	m.wantWarning(m.ok(opRead, "creds/ci", nil).Warnings,
		"the default ttl of 3600s is above the mount's max_lease_ttl of 600s: capped at 600s")
	m.sys.MaxLeaseTTLVal = 24 * time.Hour
	if w := m.ok(opRead, "creds/ci", nil).Warnings; w != nil {
		t.Errorf("warnings: %q", w)
	}
	// The role's organization comes before config's.
	m.write("config", kv{"organization_id": "org_unknown"})
	m.read("creds/ci")
}

// TestCredsErrors checks the remedies in errors. Package outcome has the status of each outcome, and package cable the
// responses of Cable.
func TestCredsErrors(t *testing.T) {
	t.Parallel()
	const notDelivered = "Cable may have issued a token that was not delivered, valid until"
	envelope := func(status int) Fault {
		return Fault{
			Status:  status,
			Message: "cable says why",
			Errors:  []cabletest.FieldError{{Field: "scopes.scopes", Message: "a field's fault"}},
		}
	}
	for _, tt := range []struct {
		name   string
		fault  Fault
		status int
		says   []string
	}{
		{
			"400", envelope(400), 400,
			[]string{"Cable responded 400: cable says why: scopes.scopes: a field's fault", "roles/ci"},
		},
		{
			"401", envelope(401), 400,
			[]string{"Cable responded 401", "auth_scheme=raw", "auth_scheme=bearer", "refresh_key"},
		},
		{"403", envelope(403), 400, []string{"Cable responded 403", "roles/ci"}},
		{"404", envelope(404), 400, []string{"Cable responded 404", "token_url"}},
		{"429", envelope(429), 429, []string{"Cable responded 429", "no API call for another 5s"}},
		{"500", envelope(500), 502, []string{"Cable responded 500: cable says why", notDelivered}},
		{"slow", Fault{Delay: time.Minute}, 504, []string{"did not respond in time", "budget of 1s", notDelivered}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			m := newConfiguredMount(t)
			m.write("config", kv{"request_timeout": 1})
			tt.fault.Times = 1
			m.sim.SetFault(tt.fault)
			m.refused(tt.status, opRead, "creds/ci", nil, tt.says...)
			if n := m.sim.CallCount(); n != 1 {
				t.Errorf("Cable was called %d times", n)
			}
			if tt.status != 429 {
				m.read("creds/ci") // the fault is over
			}
		})
	}
}

// TestPause checks that after a 429 the mount calls Cable no more until the time that Cable named, that responses have
// that time as Retry-After, and that another key starts without the pause.
func TestPause(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.write("config", kv{"request_timeout": 1})
	m.sim.SetFault(Fault{Status: 429, Times: 1, Header: map[string]string{"Retry-After": "90"}})
	for range 3 {
		resp := m.refused(429, opRead, "creds/ci", nil, "another 90s")
		if got := resp.Headers["Retry-After"]; !slices.Equal(got, []string{"90"}) {
			t.Errorf("Retry-After %q", got)
		}
	}
	var wg sync.WaitGroup
	for range 200 {
		wg.Go(func() {
			if status, _ := statusOf(m.request(opRead, "creds/ci", nil)); status != 429 {
				t.Errorf("status %d in a pause", status)
			}
		})
	}
	wg.Wait()
	m.b.InvalidateKey(t.Context(), "config")
	m.refused(429, opRead, "creds/ci", nil, "paused after Cable's 429")
	m.write("config", kv{"request_timeout": 2})
	m.refused(429, opRead, "creds/ci", nil, "paused after Cable's 429")
	m.writeKey(m.sim.RefreshKey())
	m.refused(429, opRead, "creds/ci", nil, "paused after Cable's 429")
	if n := m.sim.CallCount(); n != 1 {
		t.Errorf("Cable was called %d times in a pause, want once", n)
	}
	newKey := cabletest.NewRefreshKey()
	m.sim.SetRefreshKey(newKey)
	m.writeKey(newKey)
	m.read("creds/ci")
}

// TestRevoke checks that the end of a lease always succeeds, without storage, config, role or Cable, and whatever data
// an older version stored.
func TestRevoke(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	secret := m.ok(opRead, "creds/ci", nil).Secret
	m.ok(opDelete, "roles/ci", nil)
	m.ok(opDelete, "config", nil)
	m.sim.Close()
	m.storage.FailGet(true)
	end := func(op logical.Operation, data kv) error {
		req := m.newRequest(nil, op, "creds/ci", nil)
		req.Secret = &logical.Secret{InternalData: overJSON(t, data), LeaseOptions: secret.LeaseOptions}
		resp, err := m.b.HandleRequest(t.Context(), req)
		_, err = statusOf(resp, err)
		return err
	}
	for _, data := range []kv{
		secret.InternalData,
		{"secret_type": "cable_token"},
		{"secret_type": "cable_token", "role": 7, "expiry": "soon"},
	} {
		if err := end(opRevoke, data); err != nil {
			t.Errorf("%v: %v", data, err)
		}
	}
	if line := m.logLine("so it stays valid"); line["role"] != "ci" || line["@level"] != "info" ||
		line["remaining_seconds"].(float64) < 3500 {
		t.Errorf("the line of a lease that ends early: %v", line)
	}
	if n := strings.Count(m.log.String(), "lease ended; token expiry unknown"); n != 2 {
		t.Errorf("%d lines of leases without an expiry, want 2", n)
	}
	// A lease that has expired is at debug level, however long its token is still valid, because Cable granted more
	// than was requested, or responded late.
	expired := overJSON(t, secret.InternalData)
	expired["lease_end"] = strconv.FormatInt(time.Now().Unix(), 10)
	if err := end(opRevoke, expired); err != nil {
		t.Error(err)
	}
	if line := m.logLine(`"lease ended"`); line["@level"] != "debug" {
		t.Errorf("the line of a lease that has expired: %v", line)
	}
	m.storage.FailGet(false)
	figures := m.figures()
	if ended, known := figures["vault_cable_leases_ended_total"],
		figures["vault_cable_lease_ended_remaining_lifetime_seconds_count"]; ended != 4 || known != 2 {
		t.Errorf("%v leases ended, %v with a known lifetime", ended, known)
	}
	if end(opRenew, secret.InternalData) == nil {
		t.Error("a lease can be renewed")
	}
}

// BenchmarkCredsRead measures the handler over in-memory storage, with an API call over loopback.
func BenchmarkCredsRead(b *testing.B) { benchmarkCredsRead(b, newConfiguredMount(b)) }

// BenchmarkCredsReuse is BenchmarkCredsRead for a role with reuse_for.
func BenchmarkCredsReuse(b *testing.B) {
	m := newConfiguredMount(b)
	m.write("roles/ci", kv{"ttl": "1h", "reuse_for": "30m"})
	benchmarkCredsRead(b, m)
}

func benchmarkCredsRead(b *testing.B, m *testMount) {
	m.logger.SetLevel(hclog.Info)
	read := func() {
		resp, err := m.send(b.Context(), m.storage, opRead, "creds/ci", nil)
		if err != nil || resp.IsError() {
			b.Error(err, resp)
		}
	}
	read()
	b.Run("serial", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			read()
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.ReportAllocs()
		b.SetParallelism(16)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				read()
			}
		})
	})
}
