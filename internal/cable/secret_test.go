// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"bytes"
	"encoding/base64"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"html"
	"log/slog"
	"net/url"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"

	"pgregory.net/rapid"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// shown contains the parts of a secret as formatting verbs print them.
//
// NOTE: the parts are windows, not the canary, because a map of windows shows the whole secret without the canary in
// one piece.
type shown struct{ texts, hexes []string }

func newShown(secret string) shown {
	var s shown
	for i, piece := range pieces(secret) {
		if i%4 != 0 {
			continue // a map of all windows contains these, too
		}
		raw := []byte(piece)
		decimal := strings.Trim(fmt.Sprintf("%d", raw), "[]")
		listed := strings.TrimSuffix(strings.TrimPrefix(fmt.Sprintf("%#v", raw), "[]byte{"), "}")
		s.texts = append(s.texts, piece, decimal, listed, base64.StdEncoding.EncodeToString(raw[:9]))
		s.hexes = append(s.hexes, hex.EncodeToString(raw))
	}
	return s
}

var unhex = strings.NewReplacer(" ", "", "0x", "", "0X", "", ",", "")

// in returns a form of the secret that text contains, or "".
func (s shown) in(text string) string {
	for _, form := range s.texts {
		if strings.Contains(text, form) {
			return form
		}
	}
	hexed := strings.ToLower(unhex.Replace(text))
	for _, form := range s.hexes {
		if strings.Contains(hexed, form) {
			return form
		}
	}
	return ""
}

// TestShown tests the helper of the next test.
func TestShown(t *testing.T) {
	t.Parallel()
	secret := cabletest.NewRefreshKey()
	find := newShown(secret)
	for _, format := range []string{"%v", "%s", "%q", "%x", "%X", "% x", "%#x", "% #X", "%d", "%#v"} {
		for _, v := range []any{[]byte(secret), &struct{ s []byte }{[]byte(secret)}, struct{ s string }{secret}} {
			text := fmt.Sprintf(format, v)
			if find.in(text) == "" && !strings.Contains(text, "%!d") || find.in("[redacted]") != "" {
				t.Errorf("%s of a %T is not found: %s", format, v, text)
			}
		}
	}
}

// TestPrintingShowsNoSecret prints each exported type, and types that contain one, in every way. No text shows the
// refresh key or the access token.
func TestPrintingShowsNoSecret(t *testing.T) {
	t.Parallel()
	srv := cabletest.NewServer(t, nil)
	cfg := Config{RefreshKey: NewSecret(srv.RefreshKey()), TokenURL: srv.URL, UserAgent: "test", Pause: new(Pause)}
	token := mustMint(t, newClientAt(t, cfg))
	c := newClientAt(t, cfg) // another one, because fmt reads all of it, and would race with connections in use
	bearer := cfg
	bearer.Bearer = true
	asBearer := newClientAt(t, bearer)
	failure := &Error{Kind: Responded, StatusCode: 401, Detail: "no", Attempts: 1}
	type deep struct{ deep struct{ deeper Client } }
	type hidden struct {
		s  Secret
		sp *Secret
		c  Config
		cp *Config
		k  Client
		kp *Client
		t  Token
		tp *Token
		r  TokenRequest
		e  *Error
		l  []Secret
		m  map[string]Token
		i  any
		d  deep
	}
	h := hidden{
		cfg.RefreshKey, &token.Value, cfg, &cfg, *c, c, *token, token, testRequest(), failure,
		[]Secret{cfg.RefreshKey, token.Value},
		map[string]Token{"a": *token},
		*asBearer,
		deep{struct{ deeper Client }{*c}},
	}
	values := []any{
		cfg.RefreshKey, &cfg.RefreshKey, token.Value, cfg, &cfg, *c, c, *asBearer, asBearer, *token, token,
		testRequest(), *failure, failure, c.Pause(), c.redactor, &c.redactor, h, &h,
		[]any{h},
		[]Client{*c},
		[]*Client{c},
		[1]Token{*token},
		map[string]any{"h": h, "c": *c},
		map[Secret]int{token.Value: 1},
		fmt.Errorf("wrapped: %w", failure), errors.Join(failure, fmt.Errorf("%v %v", c, token)),
		reflect.ValueOf(h), reflect.ValueOf(c),
	}
	verbs := "vsqxXdtTpcUobeEfFgGw"
	flags := []string{"", "+", "#", " ", "0", "-", "+#", "# ", "10", ".3", "10.20", "-0+# 5"}
	secrets := map[string]shown{
		"refresh key": newShown(cfg.RefreshKey.Reveal()), "access token": newShown(token.Value.Reveal()),
	}
	check := func(how string, v any, text string) {
		for name, secret := range secrets {
			if piece := secret.in(text); piece != "" {
				t.Errorf("%s of %T shows a part of the %s, %q", how, v, name, piece)
			}
		}
	}
	for _, v := range values {
		for _, verb := range verbs {
			for _, flag := range flags {
				format := "%" + flag + string(verb)
				check(format, v, fmt.Sprintf(format, v))
			}
		}
		check("Sprint", v, fmt.Sprint(v, v))
		check("Sprintln", v, fmt.Sprintln(v))
		var encoded bytes.Buffer
		inJSON, err := json.Marshal(v)
		inXML, err2 := xml.Marshal(v)
		err3 := gob.NewEncoder(&encoded).Encode(v)
		for _, handler := range []slog.Handler{
			slog.NewJSONHandler(&encoded, nil), slog.NewTextHandler(&encoded, nil),
		} {
			slog.New(handler).Error("m", "v", v, slog.Group("g", "v", v))
		}
		check("an encoding", v, fmt.Sprintf("%s %s %s %v %v %v", inJSON, inXML, &encoded, err, err2, err3))
	}
	for got, want := range map[string]string{
		fmt.Sprint(cfg.RefreshKey): "[redacted]", fmt.Sprintf("%+q", &token.Value): "[redacted]",
		fmt.Sprintf("%d", Secret{}): "[redacted]",
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// TestClean pins the form in which an error or a grant shows a text of Cable's.
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
		{"Ünïcode & Söhne 日本 🏦 ✓", "Ünïcode & Söhne 日本 🏦 ✓"},
		{"Société\u00a0Générale\u3000\u202f👨\u200d💻", "Société\u00a0Générale\u3000\u202f👨\u200d💻"},
		{"می\u200cخواهم", "می\u200cخواهم"},
		{"a\u2028b\u2029c\u2066d\ufeffe\u00adf", `a\u2028b\u2029c\u2066d\ufeffe\u00adf`},
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
	twelve := newRedactor(NewSecret("rk_123456789"))
	if !short.repeats("abc") || !twelve.repeats("x rk_123456789 y") ||
		!r.repeats(testKey[:12]) || r.repeats(testKey[:11]) {
		t.Error("a token that is the key, contains it or is a part of it is not found, or a shorter part is")
	}
	if got := newRedactor(NewSecret("k")).clean("xkx"); got != "x[redacted]x" {
		t.Errorf("a key of one character: %q", got)
	}
	for before := range 3 {
		text := base64.StdEncoding.EncodeToString([]byte("xx"[:before] + "abcd~~"))
		if !newRedactor(NewSecret("abcd")).contains(text) {
			t.Errorf("a short key is not found in %s", text)
		}
	}
	if none := newRedactor(Secret{}); none.contains("anything") || none.clean("anything at all") != "anything at all" {
		t.Error("no key redacts something")
	}
}

// TestRedactProperties pins that a part of the key of the length of a window is redacted, whatever surrounds it.
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
	lower := func(s string) string { return percents.ReplaceAllStringFunc(s, strings.ToLower) }
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
	type texts map[string]string
	for keyName, key := range echoKeys() {
		c := newClientAt(t, Config{RefreshKey: NewSecret(key)})
		for name, echo := range echoes(key) {
			for place, body := range map[string]map[string]any{
				"message":     {"message": echo},
				"field":       {"errors": []texts{{"field": echo, "message": "bad"}}},
				"its message": {"errors": []texts{{"field": "a", "message": "b"}, {"field": "c", "message": echo}}},
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
