// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"encoding/json"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/vault/sdk/logical"
	"pgregory.net/rapid"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/state"
)

// TestWrittenBack checks that the response to a read of any stored entry can be written back, all of it or a part, by a
// write or a patch, with null or "" for fields that are not set, and that the entry then reads the same.
func TestWrittenBack(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	pem := cabletest.NewTLSServer(t, nil).CA
	seconds := rapid.Map(rapid.OneOf(rapid.Just(int64(0)), rapid.Int64Range(300, 86400), rapid.Int64Range(1, 1<<20)),
		func(n int64) time.Duration { return time.Duration(n) * time.Second })
	urls := []string{cable.DefaultTokenURL, "https://a.example/t", "gopher://of an earlier version"}
	lists := [][]string{{"a:b"}, {"a:b", "c:d"}, {"odd one", "x"}, {"c:d", "a:b"}, {}, nil}
	text := rapid.SampledFrom([]string{"", "org_1", " odd one\n", strings.Repeat("o", 200)})
	rapid.Check(t, func(rt *rapid.T) {
		m.putConfig(&state.Config{
			RefreshKey:          cable.NewSecret("k"),
			RefreshKeyVersion:   rapid.IntRange(0, 9).Draw(rt, "version"),
			RefreshKeyUpdatedAt: rapid.SampledFrom([]time.Time{{}, time.Unix(1_700_000_000, 0)}).Draw(rt, "updated"),
			TokenURL:            rapid.SampledFrom(urls).Draw(rt, "url"),
			AuthScheme:          rapid.SampledFrom([]string{"raw", "bearer", "basic"}).Draw(rt, "scheme"),
			OrganizationID:      text.Draw(rt, "config's organization"),
			RequestTimeout:      time.Second * time.Duration(rapid.IntRange(1, 3600).Draw(rt, "timeout")),
			CACert:              rapid.SampledFrom([]string{"", pem, pem + "\n\n", "nonsense"}).Draw(rt, "ca"),
			Disabled:            rapid.Bool().Draw(rt, "config's disabled"),
		})
		m.putRole("ci", &state.Role{
			OrganizationID:  text.Draw(rt, "organization"),
			OrganizationIDs: rapid.SampledFrom(lists).Draw(rt, "organizations"),
			Scopes:          rapid.SampledFrom(lists).Draw(rt, "scopes"),
			TTL:             seconds.Draw(rt, "ttl"),
			MaxTTL:          seconds.Draw(rt, "max_ttl"),
			NoLease:         rapid.Bool().Draw(rt, "no lease"),
			Disabled:        rapid.Bool().Draw(rt, "disabled"),
		})
		for _, path := range []string{"config", "roles/ci"} {
			m.b.InvalidateKey(t.Context(), path)
			before := m.read(path)
			back := maps.Clone(before)
			for _, name := range slices.Sorted(maps.Keys(back)) {
				value := back[name]
				list, isList := value.([]string)
				isUnset := value == nil || value == "" || value == int64(0) || value == 0 || isList && len(list) == 0
				switch rapid.IntRange(0, 3).Draw(rt, name) {
				case 0:
					delete(back, name)
				case 1:
					if isUnset {
						back[name] = nil
					}
				case 2:
					if isUnset {
						back[name] = ""
					}
				}
			}
			op := rapid.SampledFrom([]logical.Operation{opUpdate, opPatch}).Draw(rt, "operation")
			resp, err := m.request(op, path, back)
			if err != nil || resp.IsError() {
				rt.Fatalf("%s %s %v: %v %v", op, path, back, err, resp.Error())
			}
			if diff := cmp.Diff(before, m.read(path)); diff != "" {
				rt.Fatalf("%s %s %v: %s", op, path, back, diff)
			}
		}
	})
}

// TestRoleOrganizationIsRemoved checks that a patch with null removes a role's organization_id or organization_ids, and
// that a warning names the organization that is used instead of the role's own.
func TestRoleOrganizationIsRemoved(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	set := func() { m.write("roles/ci", kv{"organization_id": "org_2"}) }
	remove := func() []string {
		return m.ok(opPatch, "roles/ci", kv{"organization_id": nil}).Warnings
	}
	set()
	m.refused(400, opUpdate, "roles/ci", kv{"organization_id": nil}, "must not be null")
	m.refused(400, opPatch, "roles/ci", kv{"organization_id": ""}, "must not be empty")
	m.wantWarning(remove(), `token requests use config's, "`+cabletest.DefaultOrganizationID+`"`)
	if got := m.read("roles/ci")["organization_id"]; got != "" {
		t.Errorf("organization_id %q", got)
	}
	m.read("creds/ci")
	m.ok(opPatch, "config", kv{"organization_id": nil})
	set()
	m.wantWarning(remove(), "and config has none: token requests are refused")
	set()
	m.write("roles/ci", kv{"organization_ids": "org_4,org_3,org_4"})
	m.wantWarning(remove(), "and config has none: token requests must name one of organization_ids")
	if got := m.read("roles/ci")["organization_ids"]; !slices.Equal(got.([]string), []string{"org_4", "org_3"}) {
		t.Errorf("organization_ids %q, want them in order, without duplicates", got)
	}
	m.refused(400, opUpdate, "roles/ci", kv{"organization_ids": nil}, "must not be null")
	m.ok(opPatch, "roles/ci", kv{"organization_ids": nil})
	if got := m.read("roles/ci")["organization_ids"]; len(got.([]string)) != 0 {
		t.Errorf("organization_ids %q", got)
	}
}

// TestSecretsAreNotRepeated checks that a key of any form that is written into the wrong field, or stands in the wrong
// place, is in no error, warning, log line or metric.
func TestSecretsAreNotRepeated(t *testing.T) {
	t.Parallel()
	for name, secret := range map[string]string{
		"our own":       "rk_live_51Hc8vKQpW2zT9",
		"letters":       "AbCdEfGhIjKlMnOpQrStUv",
		"lower case":    "abcdefghijklmnopqrstuvwxyzab",
		"hexadecimal":   "9f8b7c6d5e4a3b2c1d0e9f8b7c6d5e4a",
		"digits":        "123456789012345",
		"UUID":          "3b241101-e2bb-4255-8caf-4136c566a962",
		"with a colon":  "cable:9f8b7c6d5e4a3b2c1d0e",
		"JWT":           "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
		"like a scope":  "Transactions:Read-9f8b7c6d",
		"like a number": "98765432109s",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newConfiguredMount(t)
			check := func(request string, resp *logical.Response, err error) {
				t.Helper()
				text := fmt.Sprint(err)
				if resp != nil {
					text += fmt.Sprint(resp.Warnings, resp.Error())
				}
				if strings.Contains(text, secret) {
					t.Errorf("%s repeats it: %s", request, text)
				}
			}
			values := []any{
				secret,
				[]any{secret},
				[]any{"a:b", secret},
				kv{secret: secret},
				"https://" + secret + "/",
				secret + "," + secret, json.Number("1" + strings.Repeat("7", 12)),
			}
			paths := []string{"config", "roles/ci", "roles/new", "creds/ci", "roles/" + secret, "creds/" + secret}
			for _, path := range paths {
				for _, op := range []logical.Operation{opUpdate, opPatch, opRead, opDelete} {
					route := m.b.Route(path)
					if route == nil || op == opDelete && !strings.Contains(path, secret) {
						continue
					}
					fields := append(slices.Collect(maps.Keys(route.Fields)), secret, "bogus")
					for _, field := range fields {
						if strings.Contains(path, secret) && field == "scopes" {
							continue // there would be such a role
						}
						for _, value := range values {
							if field == "refresh_key" && value == secret {
								continue
							}
							resp, err := m.request(op, path, kv{field: value})
							check(fmt.Sprintf("%s %s of %T", op, field, value), resp, err)
							more := kv{"refresh_key": "k", "token_url": m.sim.URL, "scopes": "a:b"}
							more[field] = value
							resp, err = m.request(op, path, more)
							check(fmt.Sprintf("%s %s of %T and more", op, field, value), resp, err)
						}
					}
				}
			}
			m.write("config", kv{
				"refresh_key": m.sim.RefreshKey(), "token_url": m.sim.URL, "organization_id": secret,
				"ca_cert": "", "auth_scheme": "raw", "disabled": false,
			})
			resp, err := m.request(opUpdate, "roles/odd", kv{"scopes": []string{secret, "a:b"}})
			check("a role with it as a scope", resp, err)
			for range 2 {
				for _, data := range []kv{nil, {"scopes": "c:d"}, {"scopes": secret}} {
					resp, err = m.request(opRead, "creds/odd", data)
					check("creds of that role", resp, err)
				}
				grant := Grant{Scopes: &[]string{"x:" + secret}, OrganizationID: ptr("org" + secret)}
				m.sim.SetFault(Fault{Grant: &grant})
			}
			m.b.Cleanup(t.Context())
			for where, text := range map[string]string{
				"the log": m.log.String(), "status": fmt.Sprint(m.read("status")), "a metric": fmt.Sprint(m.figures()),
			} {
				for line := range strings.Lines(text) {
					if strings.Contains(line, secret) {
						t.Errorf("%s contains it: %s", where, line)
					}
				}
			}
		})
	}
}

// TestInputIsBounded checks that a request is refused and costs the plugin no more than a few MiB, however large its
// fields are.
func TestInputIsBounded(t *testing.T) { // not in parallel, because it measures the whole process
	m := newConfiguredMount(t)
	m.read("creds/ci")
	const MiB = 1 << 20
	repeat := func(s string, n int) []any { return slices.Repeat([]any{s}, n) }
	fields := make(kv, 1_000_000)
	for i := range 1_000_000 {
		fields[fmt.Sprintf("field-%d", i)] = ""
	}
	withKey := func(field, value string) kv { return kv{"refresh_key": "k", "token_url": m.sim.URL, field: value} }
	var deep any = "x"
	for range 10_000 {
		deep = []any{deep}
	}
	for name, data := range map[string]kv{
		"24 strings of 1 MiB of separators": {"scopes": repeat(strings.Repeat("a,", MiB/2), 24)},
		"separators alone":                  {"scopes": repeat(strings.Repeat(",", MiB), 24)},
		"one string":                        {"scopes": strings.Repeat("a:b,", 8*MiB)},
		"repeats of one scope":              {"scopes": repeat("transactions:read", 1_300_000)},
		"empty elements":                    {"scopes": repeat("", 1_300_000)},
		"one long scope":                    {"scopes": strings.Repeat("a", 32*MiB)},
		"a million fields":                  fields,
		"a long name":                       {strings.Repeat("n", 32*MiB): "x"},
		"a deep list":                       {"scopes": deep},
		"ttl":                               {"ttl": strings.Repeat("1", 32*MiB)},
		"ttl as a number":                   {"ttl": json.Number(strings.Repeat("1", MiB))},
		"organization_id":                   {"organization_id": strings.Repeat("o", 32*MiB)},
		"organization_ids":                  {"organization_ids": strings.Repeat("o,", 16*MiB)},
		"refresh_key":                       {"refresh_key": strings.Repeat(" ", 32*MiB) + "k"},
		"ca_cert":                           withKey("ca_cert", strings.Repeat(m.pem(), 40_000)),
		"token_url":                         withKey("token_url", "https://"+strings.Repeat("a.", 16*MiB)),
		"verify_role":                       {"verify_role": strings.Repeat("r", 32*MiB)},
		"disabled":                          {"disabled": strings.Repeat("t", 32*MiB)},
		"auth_scheme":                       {"auth_scheme": strings.Repeat("t", 32*MiB)},
	} {
		for _, path := range []string{"config", "roles/ci", "roles/new", "creds/ci", "explain/ci"} {
			for _, op := range []logical.Operation{opCreate, opUpdate, opPatch, opRead} {
				if op == opCreate && path != "roles/new" {
					continue
				}
				var before, after runtime.MemStats
				start := time.Now()
				runtime.ReadMemStats(&before)
				req := &logical.Request{Operation: op, Path: path, Storage: m.storage, Data: data}
				resp, err := m.b.HandleRequest(t.Context(), req)
				runtime.ReadMemStats(&after)
				if status, _ := statusOf(resp, err); status < 400 {
					t.Errorf("%s: %s %s succeeded", name, op, path)
				}
				if got := after.TotalAlloc - before.TotalAlloc; got > 8*MiB {
					t.Errorf("%s: %s %s took %d KiB", name, op, path, got>>10)
				}
				if took := time.Since(start); took > 5*time.Second {
					t.Errorf("%s: %s %s took %s", name, op, path, took)
				}
			}
		}
	}
}
