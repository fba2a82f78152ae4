// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// A server that gets the key may send it back. These tests are that server.

// jwtLike returns a token in the shape of Cable's sample, whose first part is
// the same for every one that the same issuer signs.
func jwtLike(claims, signature string) string {
	return "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9." + base64.RawURLEncoding.EncodeToString([]byte(claims)) + "." + signature
}

// echoKeys are refresh keys of the shapes that a key may have.
func echoKeys() map[string]string {
	return map[string]string{
		"opaque":           cabletest.NewRefreshKey(),
		"with punctuation": `REFRESHKEYCANARY+/=%&<>"'\;:?#[]@!$()*,~` + "`{|}^" + `+/=0123456789abcdef`,
		"JWT":              jwtLike(`{"iss":"cable","sub":"org_9f8b7c6d5e4a3b2c1d0e","typ":"refresh"}`, "REFRESHKEYCANARY-and-some-more-of-a-signature"),
		"long":             cabletest.RefreshKeyMarker + strings.Repeat("0123456789abcdefghijklmnopqrstuvwxyz", 8),
	}
}

// pieces returns every part of key that is long enough to be looked for.
func pieces(key string) []string {
	var list []string
	for i := 0; i+redactWindow <= len(key); i++ {
		list = append(list, key[i:i+redactWindow])
	}
	return list
}

// echoes are the ways in which a key may come back.
func echoes(key string) map[string]string {
	std, raw := base64.StdEncoding.EncodeToString, base64.RawURLEncoding.EncodeToString
	lower := func(s string) string {
		for _, c := range "ABCDEF0123456789" {
			for _, d := range "ABCDEF" {
				s = strings.ReplaceAll(s, fmt.Sprintf("%%%c%c", c, d), strings.ToLower(fmt.Sprintf("%%%c%c", c, d)))
				s = strings.ReplaceAll(s, fmt.Sprintf("%%%c%c", d, c), strings.ToLower(fmt.Sprintf("%%%c%c", d, c)))
			}
		}
		return s
	}
	inJSON, _ := json.Marshal(map[string]string{"authorization": key})
	return map[string]string{
		"whole":                     key,
		"with its scheme":           "Bearer " + key,
		"beginning":                 key[:len(key)/2] + "...",
		"end":                       "..." + key[len(key)/2:],
		"middle":                    "..." + key[5:len(key)-5] + "...",
		"one window":                "<" + key[3:3+redactWindow] + ">",
		"twice":                     key + key,
		"among words":               "the key " + key + " is not valid",
		"in a URL":                  "https://h/?key=" + url.QueryEscape(key),
		"in a path":                 "https://h/" + url.PathEscape(key),
		"in a URL, lower case":      "https://h/?key=" + lower(url.QueryEscape(key)),
		"base64":                    std([]byte(key)),
		"base64, URL":               raw([]byte(key)),
		"base64 of two bytes more":  std([]byte("k=" + key + "!!")),
		"base64 with its scheme":    std([]byte("Bearer " + key)),
		"base64 of a header":        std([]byte("Authorization: " + key + "\r\n")),
		"base64 as a user":          "Basic " + std([]byte(key+":")),
		"base64 as a password":      "Basic " + std([]byte("user:"+key)),
		"base64 of JSON":            std(inJSON),
		"base64, URL, of a header":  raw([]byte("Authorization: Bearer " + key)),
		"hexadecimal":               hex.EncodeToString([]byte(key)),
		"hexadecimal, upper case":   strings.ToUpper(hex.EncodeToString([]byte(key))),
		"in HTML":                   "<b>" + html.EscapeString(key) + "</b>",
		"quoted":                    fmt.Sprintf("%q", key),
		"JSON in the text":          string(inJSON),
		"among what does not print": "\x1b[31m" + key + "\x00\u202e",
		"deep in 60000 bytes":       strings.Repeat("x", 30_000) + key + strings.Repeat("y", 20_000),
		"across the bound":          strings.Repeat("x", 500) + key,
		"one byte before the bound": strings.Repeat("x", maxText-1) + key,
	}
}

// decoded undoes what an echo can have been encoded with, so that a key is
// found in whatever form is left of it.
func decoded(text string) []string {
	list := []string{text, html.UnescapeString(text), strings.ReplaceAll(text, `\`, "")}
	if s, err := url.QueryUnescape(text); err == nil {
		list = append(list, s)
	}
	isWord := func(c rune) bool {
		return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || strings.ContainsRune("+/-_", c)
	}
	for _, word := range strings.FieldsFunc(strings.ReplaceAll(text, redacted, " "), func(c rune) bool { return !isWord(c) }) {
		for from := range min(4, len(word)) {
			for _, enc := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
				for cut := range 4 {
					if raw, err := enc.DecodeString(word[from:max(from, len(word)-cut)]); err == nil {
						list = append(list, string(raw))
					}
				}
			}
			for cut := range 2 {
				if raw, err := hex.DecodeString(word[from:max(from, len(word)-cut)]); err == nil {
					list = append(list, string(raw))
				}
			}
		}
	}
	return list
}

// TestEchoInAnError pins that no form of the key is left in an error, wherever
// in the envelope Cable wrote it.
func TestEchoInAnError(t *testing.T) {
	t.Parallel()
	for keyName, key := range echoKeys() {
		parts := pieces(key)
		sim := cabletest.New(&cabletest.Options{RefreshKey: key})
		srv := httptest.NewServer(sim)
		t.Cleanup(srv.Close)
		c, err := New(Config{RefreshKey: NewSecret(key), TokenURL: srv.URL + sim.Path()})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		for name, echo := range echoes(key) {
			for place, f := range map[string]cabletest.Fault{
				"message":      {Status: 401, Message: echo},
				"field":        {Status: 401, Errors: []cabletest.FieldError{{Field: echo, Message: "bad"}}},
				"its message":  {Status: 401, Errors: []cabletest.FieldError{{Field: "a", Message: "b"}, {Field: "c", Message: echo}}},
				"an early 200": {Status: 200, Message: echo},
			} {
				sim.SetFault(f)
				_, err := c.RequestToken(t.Context(), ask())
				var e *Error
				if !errors.As(err, &e) {
					t.Fatalf("got %v", err)
				}
				if len(e.Error()) > maxText+100 || !utf8.ValidString(e.Error()) {
					t.Errorf("%s key, %s in %s: an error of %d bytes", keyName, name, place, len(e.Error()))
				}
				left := strings.Join(decoded(e.Error()), "\n")
				for _, piece := range parts {
					if strings.Contains(left, piece) {
						t.Fatalf("%s key, %s in %s: %q holds %q", keyName, name, place, e, piece)
					}
				}
			}
		}
		t.Logf("%s key: %s", keyName, func() error { _, err := c.RequestToken(t.Context(), ask()); return err }())
	}
}

// TestEchoInAToken pins that an answer which hands the key out as something
// else is refused, and that no part of the key gets through in a name.
func TestEchoInAToken(t *testing.T) {
	t.Parallel()
	const refusal = "it repeats the refresh key: check that token_url is Cable's"
	for keyName, key := range echoKeys() {
		c, err := New(Config{RefreshKey: NewSecret(key)})
		if err != nil {
			t.Fatal(err)
		}
		answer := func(token, id, name, scope, scopesID string) []byte {
			raw, _ := json.Marshal(map[string]any{
				"token": token, "expiry": 1711929600, "organization_id": id, "organization_name": name,
				"scopes": map[string]any{"organization_id": scopesID, "scopes": []string{"a:b", scope}},
			})
			return raw
		}
		for place, raw := range map[string][]byte{
			"token":                  answer(key, "o", "n", "s", "o"),
			"token, with more":       answer("v1."+key+".x", "o", "n", "s", "o"),
			"token, base64":          answer(base64.StdEncoding.EncodeToString([]byte(key)), "o", "n", "s", "o"),
			"token, base64 and more": answer(base64.RawURLEncoding.EncodeToString([]byte("Bearer "+key+" ")), "o", "n", "s", "o"),
			"token, cut off":         answer(key[:len(key)-1], "o", "n", "s", "o"),
			"token, its end":         answer(key[1:], "o", "n", "s", "o"),
			"organization":           answer("t", key, "n", "s", "o"),
			"organization, cut off":  answer("t", key[:20], "n", "s", "o"),
			"name":                   answer("t", "o", key, "s", "o"),
			"name, among words":      answer("t", "o", "the key is "+key+".", "s", "o"),
			"scope":                  answer("t", "o", "n", key, "o"),
			"scope, cut off":         answer("t", "o", "n", key[:20], "o"),
			"scopes' organization":   answer("t", "o", "n", "s", key),
		} {
			if strings.HasPrefix(place, "token") && strings.ContainsAny(key, "\"'") && !strings.Contains(place, "base64") {
				continue // the simulator of a key that no token can be
			}
			token, err := c.decode(raw, ask())
			if err == nil || err.Error() != refusal {
				t.Errorf("%s key as %s: %v; want a refusal", keyName, place, err)
			}
			if token != nil {
				t.Errorf("%s key as %s: a token comes with the error", keyName, place)
			}
		}
		// A part of the key in a name, which is for people, is redacted.
		token, err := c.decode(answer("t", "o", "n "+key[4:4+redactWindow+5]+" n", "s", "o"), ask())
		if err != nil || token.OrganizationName != "n [redacted] n" {
			t.Errorf("%s key, in part, as name: %+v, %v", keyName, token, err)
		}
	}
	// Digits of the key as an expiry.
	c, err := New(Config{RefreshKey: NewSecret("1234567890123456789")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err = c.decode([]byte(`{"token":"t","expiry":1234567890123456789}`), ask()); err == nil || strings.Contains(err.Error(), "123456789012") {
		t.Errorf("the key as an expiry: %v", err)
	}
}

// TestLikeness pins that a good answer which only looks like the key is taken:
// key and token may be JWTs of one issuer, and a key may name its organization.
func TestLikeness(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct{ key, token string }{
		"JWTs": {
			jwtLike(`{"iss":"https://auth.cable.tech/","sub":"org_9f8b7c6d5e4a3b2c1d0e","typ":"refresh"}`, "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"),
			jwtLike(`{"iss":"https://auth.cable.tech/","sub":"org_9f8b7c6d5e4a3b2c1d0e","exp":1711929600}`, "BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB"),
		},
		"the organization in the key": {"cable_live_" + cabletest.DefaultOrganizationID + "_0123456789abcdef", "t"},
		"a scope in the key":          {"transactions:write/0123456789abcdef", "t"},
		"a short key":                 {"e", "eyJ0.eyJ1.e2"},
		"another short key":           {"Cable", "Cable-token"},
		"opaque with one prefix":      {"cable_sandbox_0123456789abcdef", "cable_sandbox_fedcba9876543210"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sim := cabletest.New(&cabletest.Options{RefreshKey: tt.key})
			sim.SetFault(cabletest.Fault{Grant: &cabletest.Grant{Token: &tt.token}})
			srv := httptest.NewServer(sim)
			t.Cleanup(srv.Close)
			c, err := New(Config{RefreshKey: NewSecret(tt.key), TokenURL: srv.URL + sim.Path()})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(c.Close)
			got, err := c.RequestToken(t.Context(), ask())
			if err != nil {
				t.Fatalf("a good answer is refused: %v", err)
			}
			// A key that is shorter than a window is no secret: it stands in many texts.
			if got.Value.Reveal() != tt.token || len(tt.key) >= redactWindow && got.OrganizationName != cabletest.DefaultOrganizationName {
				t.Errorf("the answer is changed: %q, %q", got.Value.Reveal(), got.OrganizationName)
			}
		})
	}
}

// TestName pins that the one text of a good answer that nothing is compared
// with is fit to be shown and stored: bounded, and without what does not print.
func TestName(t *testing.T) {
	t.Parallel()
	c, err := New(Config{RefreshKey: NewSecret(testKey)})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"Cable Financial Services":     "Cable Financial Services",
		"Ünïcode & Söhne 日本 🏦":         "Ünïcode & Söhne 日本 🏦",
		"":                             "",
		"\x1b[2Jgone\u202egnp.exe\r\n": `\x1b[2Jgone\u202egnp.exe\r\n`,
		strings.Repeat("é", 1000):      strings.Repeat("é", maxText/2),
	} {
		raw, _ := json.Marshal(map[string]any{"token": "t", "expiry": 1, "organization_name": name})
		if got, err := c.decode(raw, ask()); err != nil || got.OrganizationName != want {
			t.Errorf("%.40q: %+v, %v; want %.40q", name, got, err, want)
		}
	}
}

// TestErrorBodies pins what is taken of an error's body: only the words of an
// envelope, and of none that is larger than 64 KiB.
func TestErrorBodies(t *testing.T) {
	t.Parallel()
	c, err := New(Config{RefreshKey: NewSecret(testKey)})
	if err != nil {
		t.Fatal(err)
	}
	for body, want := range map[string]string{
		``:                                 "",
		`<html>no</html>`:                  "",
		`{}`:                               "",
		`null`:                             "",
		`"text"`:                           "",
		`[{"message":"no"}]`:               "",
		`{"message":7}`:                    "",
		`{"message":"no"} trailing`:        "",
		`{"message":"no"`:                  "",
		`{"message":"no"}`:                 "no",
		`{"message":"no","errors":null}`:   "no",
		`{"message":"no","errors":[]}`:     "no",
		`{"message":"no","errors":[{}]}`:   "no: ",
		`{"errors":[{"message":"only"}]}`:  "only",
		`{"errors":[{"field":"f"}]}`:       "f: ",
		`{"message":"no","secret":"s3cr"}`: "no",
		`{"message":"no","errors":[{"field":"f","message":"m"},{"field":"g","message":"n"},{"message":"x"}]}`: "no: f: m; g: n; x",
		`{"message":"a\u001b[31mb\nc\u0000d\u202ee\u2028f\ufeffg\u00adh"}`:                                    `a\x1b[31mb\nc\x00d\u202ee\u2028f\ufeffg\u00adh`,
		"{\"message\":\"\xff\"}":                                   "\ufffd",
		`{"message":"` + strings.Repeat("é", 300) + `"}`:           strings.Repeat("é", 256),
		`{"message":"x` + strings.Repeat("é", 300) + `"}`:          "x" + strings.Repeat("é", 255),
		`{"message":"xx` + strings.Repeat("日", 300) + `"}`:         "xx" + strings.Repeat("日", 170),
		`{"message":"` + strings.Repeat("x", maxErrorAnswer):       "",
		`{"message":"` + strings.Repeat("x", maxErrorAnswer-14):    "",
		`{"errors":[` + strings.Repeat(`{},`, 20_000) + `{}]}`:     strings.Repeat("; ", 256)[2:] + "; ",
		`{"message":"` + strings.Repeat(`\u0001`, 1000) + `"}`:     strings.Repeat(`\x01`, 128),
		strings.Repeat(`{"errors":[`, 3) + strings.Repeat(`]}`, 3): "",
	} {
		e := c.answered(&http.Response{StatusCode: 400, Header: http.Header{}}, []byte(body), new(exchange))
		if e.Detail != want {
			t.Errorf("%.80q: %q, want %q", body, e.Detail, want)
		}
	}
}

// TestTokenTwice: an answer that names its token as something else is refused:
// what was granted is shown, in errors and in the log.
func TestTokenTwice(t *testing.T) {
	t.Parallel()
	c := fuzzClient(t)
	const token = "eyJhbGciOiJIUzI1NiJ9.e30.signature"
	for place, body := range map[string]string{
		"organization":         `"organization_id":"TOKEN"`,
		"name":                 `"organization_name":"it is TOKEN."`,
		"scope":                `"scopes":{"scopes":["person:read","TOKEN"]}`,
		"scope, with more":     `"scopes":{"scopes":["x TOKEN x"]}`,
		"scopes' organization": `"scopes":{"organization_id":"TOKEN","scopes":[]}`,
	} {
		raw := `{"token":"` + token + `","expiry":1711929600,` + strings.ReplaceAll(body, "TOKEN", token) + `}`
		got, err := c.decode([]byte(raw), ask())
		if got != nil || err == nil || err.Error() != "it holds its token in more than one field" {
			t.Errorf("%s: %v", place, err)
		}
	}
}
