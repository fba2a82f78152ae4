// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"fmt"
	"maps"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/vault/sdk/logical"
	"pgregory.net/rapid"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/fields"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/state"
)

// TestConfigDefaults checks the defaults of config, and that the key is stored without the white space around it.
func TestConfigDefaults(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	if got := m.read("config"); got != nil {
		t.Errorf("an unwritten config reads as %v, want 404", got)
	}
	if w := m.write("config", kv{"refresh_key": " \t" + m.sim.RefreshKey() + "\r\n"}); w != nil {
		t.Errorf("warnings: %q", w)
	}
	got := m.read("config")
	at, err := time.Parse(time.RFC3339, got["refresh_key_updated_at"].(string))
	if err != nil || time.Since(at) > time.Minute {
		t.Errorf("refresh_key_updated_at: %v %v", at, err)
	}
	delete(got, "refresh_key_updated_at")
	want := kv{
		"token_url": "https://api.cable.tech/v2/auth/token", "auth_scheme": "raw", "organization_id": "",
		"request_timeout": 20, "ca_cert": "", "disabled": false, "refresh_key_version": 1,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if m.live().RefreshKey.Reveal() != m.sim.RefreshKey() {
		t.Error("the key was not stored, or not trimmed")
	}
}

// TestConfigPartialWrite checks that a write keeps the fields that it does not name.
func TestConfigPartialWrite(t *testing.T) {
	t.Parallel()
	for _, op := range []logical.Operation{opUpdate, opPatch} {
		m := newConfiguredMount(t)
		want := m.read("config")
		for _, step := range []struct {
			field string
			value any
			want  any
		}{
			{"auth_scheme", "bearer", "bearer"},
			{"auth_scheme", "raw", "raw"},
			{"organization_id", " org_other ", "org_other"},
			{"request_timeout", "1m", 60},
			{"request_timeout", 1, 1},
			{"request_timeout", "30", 30},
			{"disabled", "true", true},
			{"disabled", false, false},
			{"token_url", m.sim.URL, m.sim.URL}, // unchanged, so without the key
			{"refresh_key_version", 1, nil},
		} {
			m.ok(op, "config", kv{step.field: step.value})
			if step.want != nil {
				want[step.field] = step.want
			}
			if diff := cmp.Diff(want, m.read("config")); diff != "" {
				t.Errorf("%s after %s=%v: %s", op, step.field, step.value, diff)
			}
		}
		m.ok(op, "config", kv{"refresh_key": "another-key", "token_url": m.sim.URL})
		if got := m.read("config")["refresh_key_version"]; got != 2 {
			t.Errorf("refresh_key_version %v, want 2", got)
		}
		if m.live().RefreshKey.Reveal() != "another-key" {
			t.Error("the new key was not stored")
		}
	}
}

// live returns the configuration in use.
func (m *testMount) live() *state.Live {
	m.Helper()
	live, err := m.b.state.Config(m.Context(), m.storage)
	must(m, err)
	return live
}

// TestConfigRefusals checks that a refusal is a 400, contains the allowed values, and changes nothing in storage or in
// memory.
func TestConfigRefusals(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	key := m.sim.RefreshKey()
	m.read("creds/ci")
	before, current := m.read("config"), m.live()
	moved := func(field string, value any) kv { return kv{"refresh_key": key, field: value} }
	rooted := func(pem string) kv { return kv{"refresh_key": key, "token_url": m.sim.URL, "ca_cert": pem} }
	m.refusedAll("config", []logical.Operation{opUpdate, opPatch}, []refusal{
		{kv{"refresh_key": " \n"}, "refresh_key must not be empty"},
		{kv{"refresh_key": key + " " + key}, "must not contain white space"},
		{kv{"refresh_key": key + "\n" + key}, "must not contain white space"},
		{kv{"refresh_key": key + "\x00"}, "UTF-16"},
		{kv{"refresh_key": "\ufeff" + key}, "byte order mark"},
		{kv{"refresh_key": "\ufffd\ufffdr\x00k\x00"}, "UTF-16"}, // as Vault's CLI sends such a file
		{kv{"refresh_key": `"` + key + `"`}, "in quotes"},
		{kv{"refresh_key": "'" + key + "'"}, "in quotes"},
		{kv{"refresh_key": key + "\x7f"}, "must not contain white space, control"},
		{kv{"refresh_key": key + "\u00e9"}, "non-ASCII"},
		{kv{"refresh_key": "Bearer " + key}, "auth_scheme=bearer"},
		{kv{"refresh_key": strings.Repeat(key, 300)}, "at most 8192"},
		{kv{"token_url": "https://elsewhere.example/v2/auth/token"}, "needs refresh_key in the same request"},
		{kv{"ca_cert": m.pem()}, "needs refresh_key in the same request"},
		{moved("token_url", "http://api.cable.tech/v2/auth/token"), "plain http for api.cable.tech"},
		{moved("token_url", "https://user:"+key+"@api.cable.tech/"), "must not contain a user name"},
		{moved("token_url", "https://api.cable.tech/?key="+key), "must not contain a query"},
		{moved("token_url", "https://api.cable.tech/#"), "fragment"},
		{moved("token_url", "ftp://api.cable.tech/"), "must begin with https://"},
		{moved("token_url", key), "must begin with https://"},
		{moved("token_url", "https:///v2"), "names no host"},
		{moved("token_url", "https://api.cable.tech:0/"), "port"},
		{rooted("nonsense"), "ca_cert is not PEM"},
		{rooted(strings.ReplaceAll(m.pem(), "CERTIFICATE", "PRIVATE KEY")), "ca_cert contains a private key"},
		{rooted(strings.ReplaceAll(m.pem(), "CERTIFICATE", "SOMETHING")), "CERTIFICATE blocks only"},
		{kv{"refresh_key": key}, "writing refresh_key needs token_url in the same request"},
		{kv{"refresh_key_version": 2}, "refresh_key_version is read-only"},
		{kv{"auth_scheme": "basic"}, `auth_scheme is "basic": write "raw" or "bearer"`},
		{kv{"auth_scheme": key}, "auth_scheme is (not shown: length 43)"},
		{kv{"organization_id": "org one"}, "organization_id must not contain white space"},
		{kv{"organization_id": strings.Repeat("o", 129)}, "at most 128"},
		{kv{"request_timeout": 0}, "request_timeout is 0s: write 1s to 60s"},
		{kv{"request_timeout": 61}, "request_timeout is 61s"},
		{kv{"request_timeout": -1}, "cannot be negative"},
		{kv{"request_timeout": "soon"}, "request_timeout is (not shown: length 4)"},
		{kv{"request_timeout": 1.5}, "whole seconds"},
		{kv{"request_timeout": 1e300}, "whole seconds"},
		{kv{"request_timeout": key}, "request_timeout is (not shown: length 43)"},
		{kv{"verify_role": key}, "verify_role (not shown: length 43)"},
		{kv{"disabled": "rk_canary_0123456789"}, "not (not shown: length 20)"},
		{kv{"disabled": "yes"}, `disabled must be true or false, not "yes"`},
		{kv{"verify_role": "absent"}, `verify_role "absent" does not exist`},
	})
	if diff := cmp.Diff(before, m.read("config")); diff != "" {
		t.Error(diff)
	}
	if m.live() != current {
		t.Error("the configuration in use was replaced")
	}
	if n := m.sim.CallCount(); n != 1 {
		t.Errorf("Cable was called %d times, want once", n)
	}
	fresh := newMount(t)
	fresh.refused(400, opUpdate, "config", kv{"organization_id": "org"}, "refresh_key is missing")
	fresh.refused(400, opPatch, "config", kv{"refresh_key": key}, "not written yet")
	if fresh.read("config") != nil {
		t.Error("a refused first write was stored")
	}
}

// pem returns a certificate.
func (m *testMount) pem() string { return cabletest.NewTLSServer(m, nil).CA }

// TestConfigPatchNull checks which fields a patch with null removes.
func TestConfigPatchNull(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.write("config", kv{"refresh_key": m.sim.RefreshKey(), "token_url": m.sim.URL, "ca_cert": m.pem()})
	m.refused(400, opPatch, "config", kv{"ca_cert": nil}, "needs refresh_key")
	m.refused(400, opUpdate, "config", kv{"organization_id": nil}, "must not be null")
	null := kv{"ca_cert": nil, "refresh_key": m.sim.RefreshKey(), "token_url": m.sim.URL, "organization_id": nil}
	m.ok(opPatch, "config", null)
	got := m.read("config")
	if got["ca_cert"] != "" || got["organization_id"] != "" {
		t.Errorf("not removed: %v", got)
	}
	m.refused(400, opRead, "creds/ci", nil, "no organization", "roles/ci")
}

// TestConfigDisabled checks that a disabled mount makes no API call, not even for verify_role.
func TestConfigDisabled(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.wantWarning(m.write("config", kv{"disabled": true}),
		"the mount is disabled", "may be valid until "+m.until(24*time.Hour))
	m.refused(400, opRead, "creds/ci", nil, "the mount is disabled", "disabled=false")
	m.refused(400, opUpdate, "config", kv{"verify_role": "ci"}, "the mount is disabled")
	if n := m.sim.CallCount(); n != 0 {
		t.Errorf("a disabled mount made %d calls", n)
	}
	if w := m.write("config", kv{"disabled": false, "verify_role": "ci"}); len(w) != 2 {
		t.Errorf("warnings: %q, want one of the verification and one of the host", w)
	}
	m.read("creds/ci")
}

// TestConfigDelete checks the warning of a deletion, and its effect.
func TestConfigDelete(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.read("creds/ci")
	resp := m.ok(opDelete, "config", nil)
	m.wantWarning(resp.Warnings, "deleted", "cannot be revoked", "may be valid until")
	if resp := m.ok(opDelete, "config", nil); resp != nil {
		t.Errorf("the response to deleting nothing: %v", resp)
	}
	if m.read("config") != nil {
		t.Error("config is still there")
	}
	m.refused(400, opRead, "creds/ci", nil, "not configured", "refresh_key")
}

// TestVerifyRole checks that new settings are tried before they are stored, and that nothing is stored if they fail.
func TestVerifyRole(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	newKey := cabletest.NewRefreshKey()
	verified := kv{"refresh_key": newKey, "token_url": m.sim.URL, "verify_role": "ci"}
	before := m.read("config")

	m.refused(400, opUpdate, "config", verified,
		`verify_role "ci" failed and nothing was stored`, "Cable responded 401", "auth_scheme=bearer")
	m.sim.SetFault(Fault{Status: 503, Times: 1})
	m.refused(502, opUpdate, "config", verified, "nothing was stored", "503")
	m.sim.SetFault(tooMuch)
	m.refused(502, opUpdate, "config", kv{"verify_role": "ci"}, "nothing was stored", `"everything:write"`,
		"Cable may have issued a token that was not delivered, valid until")
	m.sim.ClearFaults()
	if diff := cmp.Diff(before, m.read("config")); diff != "" {
		t.Error(diff)
	}
	m.read("creds/ci") // with the old key

	m.sim.SetRefreshKey(newKey)
	warnings := m.write("config", verified)
	m.wantWarning(warnings, `verify_role "ci"`, "dropped", "is valid until")
	calls := m.sim.Calls()
	if last := calls[len(calls)-1]; last.ExpirySeconds != 300 || !last.Minted {
		t.Errorf("the verifying call: %+v", last)
	}
	if got := m.read("config")["refresh_key_version"]; got != 2 {
		t.Errorf("refresh_key_version %v, want 2", got)
	}
	m.read("creds/ci")
}

// TestVerifyRoleMeanwhile checks verify_role while entries are written during its API call. A write of config wins, a
// write of another role disturbs nothing.
func TestVerifyRoleMeanwhile(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	arrived, proceed := m.delayToken()
	done := m.start(m.storage, opUpdate, "config", kv{"auth_scheme": "raw", "verify_role": "ci"})
	<-arrived
	m.write("config", kv{"request_timeout": 33})
	close(proceed)
	if err := <-done; err == nil || !strings.Contains(err.Error(), "config was changed meanwhile") ||
		!strings.Contains(err.Error(), "is valid until") {
		t.Errorf("the response to the verified write: %v", err)
	}
	if got := m.read("config")["request_timeout"]; got != 33 {
		t.Errorf("request_timeout %v", got)
	}
	for i := range 10 {
		arrived, proceed := m.delayToken()
		gate := newGate(m.storage, "roles/ci", false)
		m.b.InvalidateKey(t.Context(), "roles/ci")
		done := m.start(gate, opUpdate, "config", kv{"request_timeout": 40 + i, "verify_role": "ci"})
		<-gate.reached
		m.write("roles/other", kv{"scopes": "person:read"})
		close(gate.proceed)
		<-arrived
		m.write("roles/other", kv{"ttl": 300 + i})
		close(proceed)
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// TestConfigTakesEffect checks that the next token request uses a stored change.
func TestConfigTakesEffect(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.read("creds/ci")
	second := cabletest.NewServer(t, &cabletest.Options{Scheme: cabletest.SchemeBearer})
	m.write("config", kv{"refresh_key": second.RefreshKey(), "token_url": second.URL, "auth_scheme": "bearer"})
	m.read("creds/ci")
	if m.sim.CallCount() != 1 || second.CallCount() != 1 {
		t.Errorf("calls: %d and %d, want 1 and 1", m.sim.CallCount(), second.CallCount())
	}
	tls := cabletest.NewTLSServer(t, nil)
	m.write("config", kv{"refresh_key": tls.RefreshKey(), "token_url": tls.URL, "auth_scheme": "raw"})
	m.refused(502, opRead, "creds/ci", nil, "unknown authority", "ca_cert")
	m.write("config", kv{"refresh_key": tls.RefreshKey(), "token_url": tls.URL, "ca_cert": tls.CA})
	m.read("creds/ci")
	if got := m.read("config")["ca_cert"]; got != tls.CA {
		t.Errorf("ca_cert reads as %q", got)
	}
}

// TestRefreshKeyRoundTrip checks that an accepted key is stored as it was written, without the white space around it.
func TestRefreshKeyRoundTrip(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	rapid.Check(t, func(rt *rapid.T) {
		key := "k" + rapid.StringMatching(`[!-~]{0,200}`).Draw(rt, "key")
		around := rapid.SampledFrom([]string{"", "\n", " ", "\r\n\t"}).Draw(rt, "around")
		m.write("config", kv{"refresh_key": around + key + around})
		if m.live().RefreshKey.Reveal() != key {
			rt.Fatal("not stored as written")
		}
	})
}

// TestKeyAndDestination checks the destination of the key after any sequence of writes by two people. One knows the
// refresh key; the other has permission to write, and a host and certificates of their own. No key of the first is ever
// sent, even by verify_role, to a host or under certificates that the first did not name together with a key, except
// the defaults.
func TestKeyAndDestination(t *testing.T) {
	t.Parallel()
	pem, otherPEM := cabletest.NewTLSServer(t, nil).CA, strings.Repeat(cabletest.NewTLSServer(t, nil).CA, 2)
	rapid.Check(t, func(rt *rapid.T) {
		var stored []byte
		named := map[string]map[string]bool{"token_url": {cable.DefaultTokenURL: true}, "ca_cert": {"": true}}
		for range rapid.IntRange(1, 12).Draw(rt, "writes") {
			knows := rapid.Bool().Draw(rt, "knows the key")
			if rapid.IntRange(0, 9).Draw(rt, "delete") == 0 {
				stored = nil
				continue
			}
			in := fields.Input{}
			if knows || rapid.Bool().Draw(rt, "with a key") {
				key := "made-up-" + rapid.StringMatching(`[a-z]{3}`).Draw(rt, "made up")
				if knows {
					key = fmt.Sprintf("real-%d", rapid.IntRange(1, 2).Draw(rt, "real"))
				}
				in["refresh_key"] = key
			}
			switch rapid.IntRange(0, 3).Draw(rt, "url") {
			case 0:
				in["token_url"] = cable.DefaultTokenURL
			case 1:
				owner := map[bool]string{true: "operator", false: "attacker"}[knows]
				host := rapid.IntRange(1, 3).Draw(rt, "host")
				in["token_url"] = fmt.Sprintf("https://%s-%d.example/token", owner, host)
			}
			switch rapid.IntRange(0, 3).Draw(rt, "ca") {
			case 0:
				in["ca_cert"] = ""
			case 1:
				if in["ca_cert"] = pem; !knows {
					in["ca_cert"] = otherPEM
				}
			}
			if rapid.Bool().Draw(rt, "another field") {
				in["disabled"] = rapid.Bool().Draw(rt, "disabled")
			}
			if knows {
				for name, values := range named {
					if v, ok := in[name].(string); ok {
						values[strings.TrimSpace(v)] = true
					}
				}
			}
			op := rapid.SampledFrom([]logical.Operation{opUpdate, opPatch}).Draw(rt, "op")
			_, next, err := mergeConfig(stored, &request{Request: &logical.Request{Operation: op}, in: in})
			if err != nil {
				continue // nothing is sent, nothing stored
			}
			// verify_role tries next, and it is stored.
			if strings.HasPrefix(next.RefreshKey.Reveal(), "real-") &&
				(!named["token_url"][next.TokenURL] || !named["ca_cert"][strings.TrimSpace(next.CACert)]) {
				rt.Fatalf("the key goes to %s under %d bytes of roots: %v", next.TokenURL, len(next.CACert), in)
			}
			if rapid.Bool().Draw(rt, "not only tried") {
				if stored, err = next.Encode(); err != nil {
					rt.Fatal(err)
				}
			}
		}
	})
}

// TestKeyIsNotGuessed checks that the response to a request that carries a key does not depend on whether that is the
// stored key, unless the request is stored.
func TestKeyIsNotGuessed(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.sim.SetFault(Fault{Status: 429, Times: 1, Header: map[string]string{"Retry-After": "90"}})
	m.refused(429, opRead, "creds/ci", nil) // the stored key is paused
	m.sim.SetFault(Fault{Status: 500})
	times := regexp.MustCompile(`\d+:\d+:\d+Z`)
	for _, rest := range []kv{
		{"verify_role": "ci"},
		{"token_url": m.sim.URL, "verify_role": "ci"},
		{"token_url": m.sim.URL, "verify_role": "absent"},
		{"token_url": m.sim.URL, "request_timeout": 0},
		{"token_url": "https://"},
		{},
	} {
		said := map[bool]string{}
		for _, guess := range []bool{true, false} {
			data := kv{"refresh_key": cabletest.NewRefreshKey()}
			if guess {
				data["refresh_key"] = m.sim.RefreshKey()
			}
			maps.Copy(data, rest)
			status, failure := statusOf(m.request(opUpdate, "config", data))
			if failure == nil {
				t.Fatalf("%v was stored", rest)
			}
			said[guess] = fmt.Sprint(status, times.ReplaceAllString(failure.Error(), "TIME"))
		}
		if said[true] != said[false] {
			t.Errorf("%v: %q for the stored key, %q for another", rest, said[true], said[false])
		}
	}
	if got := m.read("config")["refresh_key_version"]; got != 1 {
		t.Errorf("refresh_key_version %v", got)
	}
}

// TestWriteNamesTheHost checks that responses name the host that the key is sent to, if it is not Cable's.
func TestWriteNamesTheHost(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	host, _, _ := strings.Cut(strings.TrimPrefix(m.sim.URL, "http://"), "/")
	m.wantWarning(m.writeKey(m.sim.RefreshKey()), "the refresh key is sent to "+host)
	m.sim.SetFault(Fault{Status: 401})
	m.refused(400, opRead, "creds/ci", nil, "auth_scheme=raw to "+host)
	m.refused(400, opUpdate, "config", kv{"verify_role": "ci"}, "the refresh key goes to "+host)
	if w := m.write("config", kv{"refresh_key": "k", "token_url": cable.DefaultTokenURL}); w != nil {
		t.Errorf("warnings for the default: %q", w)
	}
}

// TestDisableAlone checks that stored values which an earlier version accepted do not prevent disabling an entry.
func TestDisableAlone(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.putConfig(&state.Config{
		RefreshKey: cable.NewSecret("a key"), TokenURL: "gopher://x y", AuthScheme: "basic", RequestTimeout: time.Hour,
		CACert: "nonsense", OrganizationID: strings.Repeat("o o", 100),
	})
	m.putRole("ci", &state.Role{
		Scopes: []string{"a b", strings.Repeat("c", 200)}, OrganizationID: "o o",
		TTL: 7 * time.Second, MaxTTL: 5 * time.Second,
	})
	m.b.InvalidateKey(t.Context(), "config")
	m.b.InvalidateKey(t.Context(), "roles/ci")
	for _, op := range []logical.Operation{opUpdate, opPatch} {
		for _, path := range []string{"config", "roles/ci"} {
			m.ok(op, path, kv{"disabled": true})
			if m.read(path)["disabled"] != true {
				t.Errorf("%s %s: not stored", op, path)
			}
		}
	}
}
