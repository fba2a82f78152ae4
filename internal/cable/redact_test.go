// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"html"
	"net/url"
	"strings"
	"testing"
	"unicode/utf8"

	"pgregory.net/rapid"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// TestClean pins the form in which an error shows a text of Cable's.
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
		{strings.Repeat("x", 505) + testKey, strings.Repeat("x", 505) + "[redact"}, // a cut leaves no part of the key
	} {
		if got := r.clean(tt.in); got != tt.want {
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

// TestRedactProperties pins that, whatever surrounds a part of the key of the length of a window, it is redacted, and a
// text without one is unchanged.
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
				rt.Fatalf("%q contains a part of the key %q", got, key)
			}
		}
		if !r.contains(text) {
			rt.Fatal("contains does not find what redact redacts")
		}
		if other := rapid.StringMatching(`[a-f ]{0,60}`).Draw(rt, "other"); !r.contains(other) &&
			r.redact(other) != other {
			rt.Fatalf("%q was changed", other)
		}
	})
}

// jwtLike returns a token in the shape of Cable's sample. The first part is the same for all tokens of one issuer.
func jwtLike(claims, signature string) string {
	const header = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9."
	return header + base64.RawURLEncoding.EncodeToString([]byte(claims)) + "." + signature
}

// echoKeys returns refresh keys of the shapes that a key may have.
func echoKeys() map[string]string {
	return map[string]string{
		"opaque":           cabletest.NewRefreshKey(),
		"with punctuation": `REFRESHKEYCANARY+/=%&<>"'\;:?#[]@!$()*,~` + "`{|}^" + `+/=0123456789abcdef`,
		"JWT": jwtLike(
			`{"iss":"cable","sub":"org_9f8b7c6d5e4a3b2c1d0e","typ":"refresh"}`,
			"REFRESHKEYCANARY-and-some-more-of-a-signature",
		),
		"long": cabletest.RefreshKeyMarker + strings.Repeat("0123456789abcdefghijklmnopqrstuvwxyz", 8),
	}
}

// pieces returns every part of key that has the length of a window.
func pieces(key string) []string {
	var list []string
	for i := 0; i+redactWindow <= len(key); i++ {
		list = append(list, key[i:i+redactWindow])
	}
	return list
}

// echoes returns the texts in which a server may return the key.
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

// decoded returns text and its possible decodings, so that a key is found in any form.
func decoded(text string) []string {
	list := []string{text, html.UnescapeString(text), strings.ReplaceAll(text, `\`, "")}
	if s, err := url.QueryUnescape(text); err == nil {
		list = append(list, s)
	}
	isWord := func(c rune) bool {
		return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || strings.ContainsRune("+/-_", c)
	}
	words := strings.FieldsFunc(strings.ReplaceAll(text, redacted, " "), func(c rune) bool { return !isWord(c) })
	for _, word := range words {
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

// TestEchoInAnError pins that an error contains no form of the key, wherever it was in the envelope.
func TestEchoInAnError(t *testing.T) {
	t.Parallel()
	for keyName, key := range echoKeys() {
		c := newClientAt(t, Config{RefreshKey: NewSecret(key)})
		for name, echo := range echoes(key) {
			for place, body := range map[string]map[string]any{
				"message":     {"message": echo},
				"field":       {"errors": []fieldError{{Field: echo, Message: "bad"}}},
				"its message": {"errors": []fieldError{{Field: "a", Message: "b"}, {Field: "c", Message: echo}}},
			} {
				raw, _ := json.Marshal(body)
				text, _ := c.envelope(raw)
				if _, err := c.decode(raw, testRequest()); err == nil ||
					err.Error() != "it contains no token, but a message: "+text {
					t.Errorf("%s key, %s in %s of a 200: %v", keyName, name, place, err)
				}
				if text == "" || len(text) > maxText || !utf8.ValidString(text) {
					t.Errorf("%s key, %s in %s: %d bytes", keyName, name, place, len(text))
				}
				left := strings.Join(decoded(text), "\n")
				for _, piece := range pieces(key) {
					if strings.Contains(left, piece) {
						t.Fatalf("%s key, %s in %s: %q contains %q", keyName, name, place, text, piece)
					}
				}
			}
		}
	}
}
