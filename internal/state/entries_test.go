// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package state

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// showEntry compares entries, and shows them without the refresh key.
var showEntry = cmp.Options{
	cmp.AllowUnexported(Config{}, Role{}),
	cmp.Comparer(func(a, b cable.Secret) bool { return a.Reveal() == b.Reveal() }),
}

// golden returns a file with what a version of the engine stored. A later version adds a folder, and changes none.
func golden(t *testing.T, file string) []byte {
	t.Helper()
	raw, err := os.ReadFile("testdata/" + file)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// TestStoredEntries checks that entries as each version of the engine stored them are read, and that writing one back
// changes nothing.
func TestStoredEntries(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 11, 1, 2, 3, 4, 0, time.UTC)
	whole := NewConfig()
	whole.RefreshKey, whole.RefreshKeyVersion, whole.RefreshKeyUpdatedAt = cable.NewSecret("k"), 3, at
	whole.TokenURL, whole.AuthScheme, whole.OrganizationID = "https://a.example/t", AuthSchemeBearer, "org_1"
	whole.RequestTimeout, whole.CACert, whole.Disabled = 5*time.Second, "pem", true
	least := NewConfig()
	least.RefreshKey, least.RefreshKeyVersion, least.RefreshKeyUpdatedAt = cable.NewSecret("k"), 1, at
	for file, want := range map[string]*Config{"v0.1.0/config.json": whole, "v0.1.0/config-least.json": least} {
		got, err := DecodeConfig(golden(t, file))
		if err != nil {
			t.Fatal(err)
		}
		want.unknown = unknown{}
		if diff := cmp.Diff(want, got, showEntry); diff != "" {
			t.Errorf("%s: %s", file, diff)
		}
		checkSameJSON(t, string(golden(t, file)), got)
	}
	for file, want := range map[string]*Role{
		"v0.1.0/role-least.json": {Scopes: []string{"a:b"}},
		"v0.1.0/role.json": {
			OrganizationID:  "org_1",
			OrganizationIDs: []string{"org_3", "org_2"},
			Scopes:          []string{"a:b", "c:d"},
			TTL:             10 * time.Minute,
			MaxTTL:          time.Hour,
			ReuseFor:        5 * time.Minute,
			NoLease:         true,
			Disabled:        true,
			EarlierUntil:    1800000000,
		},
	} {
		got, err := DecodeRole("r", golden(t, file))
		if err != nil {
			t.Fatal(err)
		}
		want.unknown = unknown{}
		if diff := cmp.Diff(want, got, showEntry); diff != "" {
			t.Errorf("%s: %s", file, diff)
		}
		checkSameJSON(t, string(golden(t, file)), got)
	}
	config, err := DecodeConfig([]byte(`{"refresh_key":"k"}`))
	if err != nil || config.TokenURL != cable.DefaultTokenURL || config.RequestTimeout != cable.DefaultTimeout ||
		config.AuthScheme != AuthSchemeRaw {
		t.Errorf("absent keys do not mean the defaults: %+v %v", config, err)
	}
}

// The entries as v0.1.0 reads them. These types do not change.
type (
	firstConfig struct {
		RefreshKey          string    `json:"refresh_key"`
		RefreshKeyVersion   int       `json:"refresh_key_version"`
		RefreshKeyUpdatedAt time.Time `json:"refresh_key_updated_at"`
		TokenURL            string    `json:"token_url"`
		AuthScheme          string    `json:"auth_scheme"`
		OrganizationID      string    `json:"organization_id"`
		RequestTimeout      int64     `json:"request_timeout"`
		CACert              string    `json:"ca_cert"`
		Disabled            bool      `json:"disabled"`
	}
	firstRole struct {
		OrganizationID  string   `json:"organization_id"`
		OrganizationIDs []string `json:"organization_ids"`
		Scopes          []string `json:"scopes"`
		TTL             int64    `json:"ttl"`
		MaxTTL          int64    `json:"max_ttl"`
		ReuseFor        int64    `json:"reuse_for"`
		Lease           *bool    `json:"lease"`
		Disabled        bool     `json:"disabled"`
		EarlierUntil    int64    `json:"earlier_until"`
	}
)

// TestFirstVersionReads checks that v0.1.0 reads each field of any entry that this version stores.
func TestFirstVersionReads(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		text, list := rapid.String(), rapid.SliceOf(rapid.String())
		seconds := func(name string) time.Duration {
			return time.Duration(rapid.Int64Range(0, 86400).Draw(rt, name)) * time.Second
		}
		config := &Config{
			RefreshKey:          cable.NewSecret("k" + text.Draw(rt, "key")),
			RefreshKeyVersion:   rapid.Int().Draw(rt, "version"),
			RefreshKeyUpdatedAt: time.Unix(rapid.Int64Range(0, 1<<36).Draw(rt, "updated"), 0).UTC(),
			TokenURL:            text.Draw(rt, "url"),
			AuthScheme:          text.Draw(rt, "scheme"),
			OrganizationID:      text.Draw(rt, "organization"),
			RequestTimeout:      seconds("timeout"),
			CACert:              text.Draw(rt, "ca_cert"),
			Disabled:            rapid.Bool().Draw(rt, "config disabled"),
		}
		var c firstConfig
		readAs(rt, config, &c)
		if want := (firstConfig{
			config.RefreshKey.Reveal(), config.RefreshKeyVersion, config.RefreshKeyUpdatedAt, config.TokenURL,
			config.AuthScheme, config.OrganizationID, int64(config.RequestTimeout / time.Second), config.CACert,
			config.Disabled,
		}); want != c {
			rt.Errorf("%+v is read as %+v", want, c)
		}
		role := &Role{
			OrganizationID:  text.Draw(rt, "role's organization"),
			OrganizationIDs: list.Draw(rt, "organizations"),
			Scopes:          list.Draw(rt, "scopes"),
			TTL:             seconds("ttl"),
			MaxTTL:          seconds("max_ttl"),
			ReuseFor:        seconds("reuse_for"),
			NoLease:         rapid.Bool().Draw(rt, "no lease"),
			Disabled:        rapid.Bool().Draw(rt, "disabled"),
			EarlierUntil:    rapid.Int64().Draw(rt, "earlier_until"),
		}
		var r firstRole
		readAs(rt, role, &r)
		want := firstRole{
			role.OrganizationID, role.OrganizationIDs, role.Scopes, int64(role.TTL / time.Second),
			int64(role.MaxTTL / time.Second), int64(role.ReuseFor / time.Second), nil, role.Disabled, role.EarlierUntil,
		}
		if role.NoLease {
			want.Lease = new(bool)
		}
		if diff := cmp.Diff(want, r, cmpopts.EquateEmpty()); diff != "" {
			rt.Error(diff)
		}
	})
}

// readAs stores an entry, and reads it as another version does, which ignores the fields that it does not know.
func readAs(t rapid.TB, e entry, as any) {
	t.Helper()
	raw, err := e.Encode()
	if err == nil {
		err = json.Unmarshal(raw, as)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// checkSameJSON checks that an entry is stored as the given JSON object.
func checkSameJSON(t *testing.T, want string, e entry) {
	t.Helper()
	raw, err := e.Encode()
	if err != nil {
		t.Fatal(err)
	}
	var a, b map[string]any
	if err := json.Unmarshal([]byte(want), &a); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(raw, &b); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(a, b); diff != "" {
		t.Error(diff)
	}
}

// TestUnknownFields checks that fields of a newer version are kept when an entry is
// rewritten, also when a known field is set or unset.
func TestUnknownFields(t *testing.T) {
	t.Parallel()
	const newer = `,"later":false,"more_ids":["org_1"],"n":12345678901234567890,"o":{"a":null},"null":null`
	check := func(stored string, decode func([]byte) (entry, error), edits map[string]func(entry)) {
		for name, edit := range edits {
			e, err := decode([]byte(stored))
			if err != nil {
				t.Fatal(err)
			}
			edit(e)
			raw, err := e.Encode()
			if err != nil {
				t.Fatal(err)
			}
			for field := range strings.SplitSeq(newer[1:], `,"`) {
				if !strings.Contains(string(raw), strings.TrimPrefix(field, `"`)) {
					t.Errorf("%s: %s is lost: %s", name, field, raw)
				}
			}
			again, err := decode(raw)
			if diff := cmp.Diff(e, again, showEntry); diff != "" || err != nil {
				t.Errorf("%s: %s %v", name, diff, err)
			}
		}
	}
	role := func(f func(*Role)) func(entry) { return func(e entry) { f(e.(*Role)) } }
	check(`{"scopes":["a:b"],"max_ttl":600,"disabled":true`+newer+`}`,
		func(raw []byte) (entry, error) { return DecodeRole("r", raw) },
		map[string]func(entry){
			"nothing":     func(entry) {},
			"set":         role(func(r *Role) { r.TTL, r.OrganizationID, r.NoLease = time.Hour, "org_2", true }),
			"unset":       role(func(r *Role) { r.MaxTTL, r.Disabled = 0, false }),
			"other names": role(func(r *Role) { r.Scopes = []string{"x:y", "z:z"} }),
		})
	config := func(f func(*Config)) func(entry) { return func(e entry) { f(e.(*Config)) } }
	check(`{"refresh_key":"k","disabled":true,"ca_cert":"pem"`+newer+`}`,
		func(raw []byte) (entry, error) { return DecodeConfig(raw) },
		map[string]func(entry){
			"nothing": func(entry) {},
			"set":     config(func(c *Config) { c.OrganizationID = "org_2" }),
			"unset":   config(func(c *Config) { c.CACert, c.Disabled = "", false }),
		})

	// A known field in another case is no unknown one, or it would come back.
	r, err := DecodeRole("r", []byte(`{"Disabled":true,"MAX_TTL":600,"ſcopes":["a:b"]}`))
	if err != nil || !r.Disabled || r.MaxTTL != 10*time.Minute || len(r.unknown) > 0 {
		t.Errorf("%+v %v", r, err)
	}
	// A copy is changed, and not the entry in memory.
	r, _ = DecodeRole("r", []byte(`{"scopes":["a:b"],"x":1}`))
	next := *r
	next.Disabled = true
	if _, err := next.Encode(); err != nil || r.Disabled || len(r.unknown) != 1 {
		t.Errorf("%+v %v", r, err)
	}
}

// TestUnreadableEntries checks that errors for entries that cannot be read say how to
// fix that and repeat none of them.
func TestUnreadableEntries(t *testing.T) {
	t.Parallel()
	for _, raw := range []string{
		"", "{", "[]", "7", `"REFRESHKEYCANARY"`, `{"scopes":7,"refresh_key":["REFRESHKEYCANARY"]}`,
		`{"scopes":[],"refresh_key":"REFRESHKEYCANARY","request_timeout":"REFRESHKEYCANARY","ttl":"REFRESHKEYCANARY"}`,
	} {
		_, configErr := DecodeConfig([]byte(raw))
		_, roleErr := DecodeRole("REFRESHKEYCANARY", []byte(raw))
		for _, err := range []error{configErr, roleErr} {
			if text := fmt.Sprint(err); strings.Contains(text, "CANARY") || !strings.Contains(text, "write it again") {
				t.Errorf("%q: %v", raw, err)
			}
		}
	}
	if c, err := DecodeConfig(nil); c != nil || err != nil {
		t.Error("a configuration of no bytes")
	}
	if r, err := DecodeRole("r", nil); r != nil || err != nil {
		t.Error("a role of no bytes")
	}
	if r, err := DecodeRole("r", []byte(`{"lease":true}`)); err != nil || r.NoLease {
		t.Errorf("a role with leases: %+v %v", r, err)
	}
	for n, want := range map[int64]time.Duration{
		math.MinInt64: -time.Second, -1: -time.Second, 0: 0, 300: 5 * time.Minute,
		math.MaxInt64: math.MaxInt32 * time.Second,
	} {
		if got := seconds(n); got != want {
			t.Errorf("%d seconds are %s, want %s", n, got, want)
		}
	}
}

// FuzzStoredConfig checks reading a configuration that another version stored. Nothing
// panics, an error repeats none of it, and an accepted one is stored and read again as
// it was, with the fields that this version does not know.
func FuzzStoredConfig(f *testing.F) {
	for _, raw := range []string{
		`{"refresh_key":"REFRESHKEYCANARY"}`,
		`{"refresh_key":"REFRESHKEYCANARY","token_url":"https://a.example/t","of_a_later_version":{"x":1}}`,
		`{"refresh_key":"REFRESHKEYCANARY","refresh_key_updated_at":"2024-01-01T00:00:00Z","disabled":true}`,
		`{"refresh_key":["REFRESHKEYCANARY"]}`,
		`{"refresh_key":"REFRESHKEYCANARY","request_timeout":"REFRESHKEYCANARY"}`,
		`{"refresh_key":"REFRESHKEYCANARY","Auth_sCheme":"","request_timeout":0,"DISABLED":true}`,
		`{"refresh_key":"REFRESHKEYCANARY","disabled":true,"disabled":false,"n":1,"n":2}`,
		`{"refresh_key":"-01T00:00:00Z"}`, // a key like a time
		`{"":"`,
		`"REFRESHKEYCANARY"`,
		`null`,
		"\"\x0e",
	} {
		f.Add([]byte(raw))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		c, err := DecodeConfig(raw)
		if err != nil {
			if strings.Contains(err.Error(), cabletest.RefreshKeyMarker) {
				t.Errorf("the error repeats the key: %v", err)
			}
			return
		}
		if c == nil || c.RefreshKey.IsZero() {
			t.Fatal("accepted without a key")
		}
		c.RefreshKey = cable.NewSecret(cabletest.RefreshKeyMarker)
		printed, _ := json.Marshal(c)
		if shown := fmt.Sprintf("%v %+v %#v %s", c, *c, c, printed); !strings.Contains(string(raw), "CANARY") &&
			strings.Contains(shown, cabletest.RefreshKeyMarker) {
			t.Errorf("the key is printed: %s", shown)
		}
		stored, err := c.Encode()
		if err != nil {
			return // a year that RFC 3339 cannot write
		}
		again, err := DecodeConfig(stored)
		if err != nil {
			t.Fatal(err)
		}
		checkAgain(t, stored, again, c.unknown, again.unknown)
		c.unknown, again.unknown = nil, nil
		if diff := cmp.Diff(c, again, showEntry); diff != "" {
			t.Error(diff)
		}
	})
}

// FuzzStoredRole is FuzzStoredConfig for roles.
func FuzzStoredRole(f *testing.F) {
	for _, raw := range []string{
		`{"scopes":["a:b"],"of_a_later_version":[1]}`,
		`{}`,
		`null`,
		`{"scopes":7}`,
		`{"ttl":1e99}`,
		`{"ttl":-9223372036854775808,"max_ttl":9223372036854775807,"earlier_until":-1}`,
		`{"Scopes":null,"Disabled":true,"max_Ttl":1}`,
		`{"":"","<":"&"}`,
	} {
		f.Add([]byte(raw))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		r, err := DecodeRole("r", raw)
		if err != nil {
			return
		}
		stored, err := r.Encode()
		if err != nil {
			t.Fatal(err)
		}
		again, err := DecodeRole("r", stored)
		if err != nil {
			t.Fatal(err)
		}
		if again.NarrowedBy(r) != r.Disabled || r.NarrowedBy(again) != r.Disabled {
			t.Error("writing a role back narrows it")
		}
		checkAgain(t, stored, again, r.unknown, again.unknown)
		r.unknown, again.unknown = nil, nil
		if diff := cmp.Diff(r, again, showEntry); diff != "" {
			t.Error(diff)
		}
	})
}

// checkAgain checks that an entry that was stored and read again is stored in the same
// bytes, with the same unknown fields.
func checkAgain(t *testing.T, stored []byte, again entry, before, after unknown) {
	t.Helper()
	if twice, err := again.Encode(); err != nil || !slices.Equal(twice, stored) {
		t.Errorf("stored as %s\nand then as %s, %v", stored, twice, err)
	}
	if diff := cmp.Diff(slices.Sorted(maps.Keys(before)), slices.Sorted(maps.Keys(after))); diff != "" {
		t.Error(diff)
	}
}
