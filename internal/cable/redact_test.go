// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"

	"pgregory.net/rapid"
)

const testKey = "sk/REFRESHKEYCANARY+0123456789abcdef=="

func TestClean(t *testing.T) {
	t.Parallel()
	r := newRedactor(NewSecret(testKey))
	for _, tt := range []struct{ in, want string }{
		{"", ""},
		{"no key in here", "no key in here"},
		{"key " + testKey + "!", "key [redacted]!"},
		{testKey + testKey, "[redacted][redacted]"},
		{"Bearer " + testKey + " is bad", "Bearer [redacted] is bad"},
		{"cut off: " + testKey[:20], "cut off: [redacted]"},
		{"cut off: " + testKey[10:], "cut off: [redacted]"},
		{"encoded: " + url.QueryEscape(testKey), "encoded: [redacted]"},
		{"encoded: " + base64.StdEncoding.EncodeToString([]byte(testKey)), "encoded: [redacted]="},
		{"a\nb\x1b[31mc\x00\u202e\u2028\xff", `a\nb\x1b[31mc\x00\u202e\u2028\xff`},
		{"grüße ✓", "grüße ✓"},
		{strings.Repeat("x", 600), strings.Repeat("x", 512)},
		{strings.Repeat("x", 511) + "é", strings.Repeat("x", 511)},
		{strings.Repeat("x", 505) + testKey, strings.Repeat("x", 505) + "[redact"[:7]},
	} {
		got := r.clean(tt.in)
		if tt.in == strings.Repeat("x", 505)+testKey {
			if strings.Contains(got, testKey[:4]) || len(got) > 512 {
				t.Errorf("a cut left a part of the key: %q", got[500:])
			}
			continue
		}
		if got != tt.want {
			t.Errorf("clean(%.60q) = %q, want %q", tt.in, got, tt.want)
		}
	}
	short := newRedactor(NewSecret("abc"))
	if got := short.clean("xabcx"); got != "x[redacted]x" || !short.contains("abc") || short.contains("ab") {
		t.Errorf("a short key: %q", got)
	}
	if none := newRedactor(Secret{}); none.contains("anything") || none.clean("anything at all") != "anything at all" {
		t.Error("no key redacts something")
	}
}

// TestRedactProperties: whatever stands around it, no part of the key that is
// long enough to matter is left, and what holds no part of it is untouched.
func TestRedactProperties(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		key := rapid.StringMatching(`[!-~]{12,80}`).Draw(rt, "key")
		r := newRedactor(NewSecret(key))
		from := rapid.IntRange(0, len(key)-redactWindow).Draw(rt, "from")
		part := key[from : from+redactWindow+rapid.IntRange(0, len(key)-from-redactWindow).Draw(rt, "more")]
		text := rapid.String().Draw(rt, "before") + part + rapid.String().Draw(rt, "after")
		got := r.redact(text)
		for i := 0; i+redactWindow <= len(key); i++ {
			if strings.Contains(got, key[i:i+redactWindow]) {
				rt.Fatalf("%q holds a part of the key %q", got, key)
			}
		}
		if !r.contains(text) {
			rt.Fatalf("contains does not see what redact redacts")
		}
		if other := rapid.StringMatching(`[a-f ]{0,60}`).Draw(rt, "other"); !r.contains(other) && r.redact(other) != other {
			rt.Fatalf("%q was changed", other)
		}
	})
}

// TestNothingPrintsSecrets walks the exported types of this package and prints
// each, filled with secrets, in every way: nothing may show them. A field that
// holds a secret as plain text would.
func TestNothingPrintsSecrets(t *testing.T) {
	t.Parallel()
	secret := NewSecret(testKey)
	client, err := New(Config{RefreshKey: secret, Bearer: true})
	if err != nil {
		t.Fatal(err)
	}
	_, answer := client.decode([]byte(`{"token":"`+testKey+`","expiry":1}`), ask())
	token := Token{Value: secret}
	type nested struct {
		hidden  Secret
		config  Config
		client  *Client
		token   *Token
		answers answerBody
	}
	for _, v := range []any{
		secret, &secret, Config{RefreshKey: secret}, &Config{RefreshKey: secret}, client, *client, token, &token,
		answerBody{Token: answerToken{secret}}, &answerBody{Token: answerToken{secret}}, answerToken{secret},
		&Error{Kind: Responded, StatusCode: 400, Detail: client.redactor.clean(testKey)}, answer,
		nested{secret, Config{RefreshKey: secret}, client, &token, answerBody{Token: answerToken{secret}}},
		[]Secret{secret}, map[string]Secret{"k": secret}, errors.Join(answer),
	} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%t", "% x", "%10.3s"} {
			if got := fmt.Sprintf(verb, v); leaks(got) {
				t.Errorf("%s of %T shows the secret", verb, v)
			}
		}
		if raw, err := json.Marshal(v); err == nil && leaks(string(raw)) {
			t.Errorf("JSON of %T shows the secret", v)
		}
	}
	if got := secret.Reveal(); got != testKey {
		t.Errorf("Reveal returns %q", got)
	}
	// Any new string field of the types that hold a secret has to be looked at.
	want := map[string]string{
		"Config": "TokenURL CACert UserAgent",
		"Token":  "OrganizationID OrganizationName ScopesOrganizationID",
		"Client": "userAgent",
	}
	for name, typ := range map[string]reflect.Type{"Config": reflect.TypeFor[Config](), "Token": reflect.TypeFor[Token](), "Client": reflect.TypeFor[Client]()} {
		var fields []string
		for i := range typ.NumField() {
			if f := typ.Field(i); f.Type.Kind() == reflect.String {
				fields = append(fields, f.Name)
			}
		}
		if got := strings.Join(fields, " "); got != want[name] {
			t.Errorf("%s has the text fields %q, want %q: if a new one holds a secret, make it a Secret", name, got, want[name])
		}
	}
}

// leaks reports whether text shows the key, or its hexadecimal form.
func leaks(text string) bool {
	const marker = "REFRESHKEYCANARY"
	return strings.Contains(text, marker) || strings.Contains(strings.ToLower(strings.ReplaceAll(text, " ", "")), fmt.Sprintf("%x", marker))
}

// TestDetailIsBounded: a message of any length and content stays short, valid
// and printable.
func TestDetailIsBounded(t *testing.T) {
	t.Parallel()
	r := newRedactor(NewSecret(testKey))
	rapid.Check(t, func(rt *rapid.T) {
		text := string(rapid.SliceOf(rapid.Byte()).Draw(rt, "text")) + strings.Repeat(testKey, rapid.IntRange(0, 30).Draw(rt, "keys"))
		got := r.clean(text)
		if len(got) > maxText || !utf8.ValidString(got) || strings.ContainsAny(got, "\n\r\x1b\x00") || r.contains(got) {
			rt.Fatalf("%q", got)
		}
	})
}
