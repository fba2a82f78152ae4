// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"pgregory.net/rapid"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// TestDecode pins which bodies of a 200 are refused, and that the error contains nothing of them but an envelope's
// message and the digits of an expiry.
func TestDecode(t *testing.T) {
	t.Parallel()
	const (
		shape = "it is not a JSON object of the documented shape"
		whole = "its expiry is not a whole number of seconds"
	)
	twice := func(name string) string { return fmt.Sprintf("its field %q stands twice, or in another case", name) }
	wrongType := func(name string) string { return fmt.Sprintf("its field %q is not of the documented type", name) }
	notUnix := func(text string) string { return "its expiry" + text + " is not a Unix time in seconds" }
	expiry := func(text string) string { return `{"token":"a","expiry":` + text + `}` }
	c := newClientAt(t, Config{})
	with := func(members string) string { return `{"token":"a","expiry":1,` + members + `}` }
	token := func(text string) string { return `{"token":` + text + `,"expiry":1711929600}` }
	const (
		noToken  = "it contains no token"
		noHeader = "its token contains characters that a header cannot carry"
		jwt      = "eyJhbGciOiJIUzI1NiJ9.e30.signature"
		inTwo    = "it contains its token in more than one field"
		bom      = "\xef\xbb\xbf"
	)
	more := func(members string) string { return `{"token":"` + jwt + `","expiry":1,` + members + `}` }
	zeros := strings.Repeat("0", 300)
	for body, want := range flatten(map[string][]string{
		"": {
			expiry("1711929600"), expiry("1"), expiry("1.7e9"), expiry("1795822807.0"), expiry("17958228070e-1"),
			expiry("1795822807." + zeros), expiry("253402300799"), bom + expiry("1"), " " + expiry("1") + "\n",
			token(`"` + strings.Repeat("a", maxToken) + `"`), token(`"!a~"`),
			with(`"more":1,"more":{"token":1,"token":2},"More":[]`), expiry("1.0"), expiry("253402300799.0"),
			expiry("1795822807." + strings.Repeat("0", maxNumber-11)), with(`"organization_name":"a bank"`),
		},
		shape: {
			``, ` `, `[]`, `null`, `{"token":"a","expiry":1}{"token":"b","expiry":1}`, strings.Repeat("[", 1<<20),
			bom + bom + expiry("1"),
		},
		noToken: {`{}`, token("null"), token(`""`)},
		noToken + ", but a message: no: f: m; n": {
			`{"message":"no","errors":[{"field":"f","message":"m"},{"message":"n"}]}`,
		},
		noHeader: {token(`"a\u001b[2Jb"`), token(`"a\r\nX-Evil: b"`), token(`"a b"`), token(`"ä"`)},
		"its token has 16385 bytes: at most 16384 are accepted": {token(`"` + strings.Repeat("a", maxToken+1) + `"`)},

		wrongType("token"):           {token(`["a"]`)},
		wrongType("organization_id"): {with(`"organization_id":7`)},
		wrongType("scopes"):          {with(`"scopes":["x","Scopes","scopes"]`), with(`"scopes":"a:b"`)},
		wrongType("scopes.scopes"):   {with(`"scopes":{"scopes":[7]}`)},

		`its field "scopes.scopes" contains an empty scope`: {
			with(`"scopes":{"scopes":[null]}`), with(`"scopes":{"scopes":[""]}`),
		},

		"it contains no expiry": {`{"token":"a"}`, expiry("null")},
		whole: {
			expiry(`"1711929600"`), expiry("1711929600.5"), expiry("17958228071e-1"), expiry("true"), expiry("[1]"),
			expiry("1795822807." + zeros + "1"),
		},
		notUnix(""): {
			expiry("1795822807." + strings.Repeat("0", 1<<19)), expiry("92233720368547758080"),
			expiry("1795822807." + strings.Repeat("0", maxNumber-10)),
		},

		notUnix(" 1e999999999"):         {expiry("1e999999999")},
		notUnix(" 1e-999999999"):        {expiry("1e-999999999")},
		notUnix(" 0.5"):                 {expiry("0.5")},
		notUnix(" 9223372036854775807"): {expiry("9223372036854775807")},
		notUnix(" 1711929600000"):       {expiry("1711929600000")},
		notUnix(" 0"):                   {expiry("0")},
		notUnix(" -1711929600"):         {expiry("-1711929600")},
		notUnix(" 253402300800"):        {expiry("253402300800")},

		twice("token"): {
			with(`"token":"a"`), with(`"tok\u0065n":"b"`), with(`"Token":"b"`), `{"TOKEN":"a","expiry":1}`,
			with(`"Token":1`),
		},
		twice("expiry"):                 {with(`"EXPIRY":2`)},
		twice("organization_id"):        {with(`"organization_id":null,"organization_id":"o"`)},
		twice("organization_name"):      {with(`"organization_name":"a","ORGANIZATION_NAME":"b"`)},
		twice("scopes"):                 {with(`"scopes":null,"scopes":{}`), with(`"\u017fcopes":{}`)},
		twice("scopes.organization_id"): {with(`"scopes":{"Organization_ID":""}`)},
		twice("scopes.scopes"): {
			with(`"scopes":{"scopes":[],"scopes":["a:b"]}`),
			with(`"sc\u006fpes":{"x":{"y":[{}]},"scopes":[],"SCOPES":1}`),
			with(`"x":[{"scopes":1},"scopes"],"scopes" : { "scopes":[ "scopes", "a:b" ], "Scopes":[] }`),
		},

		// The grant is shown in errors and in the log, so that the token must not be part of it.
		inTwo: {
			more(`"organization_id":"` + jwt + `"`), more(`"organization_name":"it is ` + jwt + `."`),
			more(`"scopes":{"scopes":["person:read","` + jwt + `"]}`), more(`"scopes":{"scopes":["x ` + jwt + ` x"]}`),
			more(`"scopes":{"organization_id":"` + jwt + `","scopes":[]}`),
			`{"token":"fedcba9876543210","expiry":1,"organization_name":"fedcba9876543210"}`,
		},
	}) {
		token, err := c.decode([]byte(body), testRequest())
		if err == nil && want != "" || err != nil && err.Error() != want || (token == nil) != (err != nil) {
			t.Errorf("%.100s: %v, %v; want %q", body, token, err, want)
		}
	}
	for _, coding := range []string{"", "identity", "Identity"} {
		if err := checkCoding(c.redactor, http.Header{"Content-Encoding": {coding}}); err != nil {
			t.Errorf("%q: %v", coding, err)
		}
	}
}

// TestCableClock pins that Cable's clock is Date plus Age and the second that Age is cut off by, that an unusable Date
// counts as none, and which Age is refused.
func TestCableClock(t *testing.T) {
	t.Parallel()
	const (
		date       = "Sun, 31 Mar 2024 23:00:00 GMT"
		unreadable = "its Age header is not one whole number of seconds"
		cached     = "its Age header exceeds the duration of the call: it comes from a cache"
	)
	at := time.Date(2024, 3, 31, 23, 0, 0, 0, time.UTC)
	const none = time.Duration(-1) // no clock
	for _, tt := range []struct {
		date     string
		age      []string
		duration time.Duration // of the call
		want     time.Duration // after at, or none
		err      string
	}{
		{date, nil, 0, 0, ""},
		{"Sunday, 31-Mar-24 23:00:00 GMT", nil, 0, 0, ""},
		{"Sun Mar 31 23:00:00 2024", nil, 0, 0, ""},
		{"", nil, 0, none, ""},
		{"yesterday", nil, 0, none, ""},
		{"1711929600", nil, 0, none, ""},
		{"Sun, 99 Mar 2024 23:00:00 GMT", nil, 0, none, ""},
		{"", []string{"5"}, 0, none, ""},
		{date, []string{"0"}, 0, time.Second, ""},
		{date, []string{"5"}, 0, 6 * time.Second, ""},
		{date, []string{"6"}, 0, none, cached},
		{date, []string{"6"}, time.Second - 1, none, cached},
		{date, []string{"6"}, time.Second, 7 * time.Second, ""},
		{date, []string{"3000"}, 20 * time.Second, none, cached},
		{"", []string{"3000"}, 20 * time.Second, none, cached},
		{date, []string{"2147483647"}, time.Minute, none, cached},
		{date, []string{"2147483648"}, time.Minute, none, unreadable},
		{date, []string{"99999999999999999999"}, 0, none, unreadable},
		{date, []string{""}, 0, none, unreadable},
		{date, []string{"-1"}, 0, none, unreadable},
		{date, []string{"+1"}, 0, none, unreadable},
		{date, []string{"1.5"}, 0, none, unreadable},
		{date, []string{"1s"}, 0, none, unreadable},
		{date, []string{"0x1"}, 0, none, unreadable},
		{date, []string{"1, 1"}, 0, none, unreadable},
		{date, []string{"1", "1"}, 0, none, unreadable},
	} {
		var want time.Time
		if tt.want != none {
			want = at.Add(tt.want)
		}
		header := http.Header{"Date": {tt.date}}
		if tt.age != nil {
			header["Age"] = tt.age
		}
		got, err := cableClock(header, tt.duration)
		if !got.Equal(want) || err != nil && err.Error() != tt.err || err == nil && tt.err != "" {
			t.Errorf("Date %q, Age %q, call of %s: %s, %v", tt.date, tt.age, tt.duration, got, err)
		}
	}
}

// TestEchoInAResponse pins that a response with the key in one of its fields is refused, and that no part of the key
// remains in a name.
func TestEchoInAResponse(t *testing.T) {
	t.Parallel()
	const refusal = "it repeats the refresh key: check that token_url is Cable's"
	base64url := base64.RawURLEncoding.EncodeToString
	for keyName, key := range echoKeys() {
		c := newClientAt(t, Config{RefreshKey: NewSecret(key)})
		response := func(token, id, name, scope, scopesID string) []byte {
			raw, _ := json.Marshal(map[string]any{
				"token": token, "expiry": 1711929600, "organization_id": id, "organization_name": name,
				"scopes": map[string]any{"organization_id": scopesID, "scopes": []string{"a:b", scope}},
			})
			return raw
		}
		for place, raw := range map[string][]byte{
			"token":                  response(key, "o", "n", "s", "o"),
			"token, with more":       response("v1."+key+".x", "o", "n", "s", "o"),
			"token, base64":          response(base64.StdEncoding.EncodeToString([]byte(key)), "o", "n", "s", "o"),
			"token, base64 and more": response(base64url([]byte("Bearer "+key+" ")), "o", "n", "s", "o"),
			"token, cut off":         response(key[:len(key)-1], "o", "n", "s", "o"),
			"token, its end":         response(key[1:], "o", "n", "s", "o"),
			"organization":           response("t", key, "n", "s", "o"),
			"organization, cut off":  response("t", key[:20], "n", "s", "o"),
			"name":                   response("t", "o", key, "s", "o"),
			"name, among words":      response("t", "o", "the key is "+key+".", "s", "o"),
			"scope":                  response("t", "o", "n", key, "o"),
			"scope, cut off":         response("t", "o", "n", key[:20], "o"),
			"scopes' organization":   response("t", "o", "n", "s", key),
		} {
			if strings.HasPrefix(place, "token") && strings.ContainsAny(key, "\"'") &&
				!strings.Contains(place, "base64") {
				continue // a token with such characters is refused anyway
			}
			token, err := c.decode(raw, testRequest())
			if err == nil || err.Error() != refusal {
				t.Errorf("%s key as %s: %v; want a refusal", keyName, place, err)
			}
			if token != nil {
				t.Errorf("%s key as %s: a token is returned with the error", keyName, place)
			}
		}
		// A part of the key in a name, which is only shown, is redacted.
		token, err := c.decode(response("t", "o", "n "+key[4:4+redactWindow+5]+" n", "s", "o"), testRequest())
		if err != nil || token.OrganizationName != "n [redacted] n" {
			t.Errorf("%s key, in part, as name: %+v, %v", keyName, token, err)
		}
	}
	// Digits of the key as an expiry.
	c := newClientAt(t, Config{RefreshKey: NewSecret("1234567890123456789")})
	if _, err := c.decode([]byte(`{"token":"t","expiry":1234567890123456789}`), testRequest()); err == nil ||
		strings.Contains(err.Error(), "123456789012") {
		t.Errorf("the key as an expiry: %v", err)
	}
}

// TestLookalikes pins that a response which only resembles the key is accepted, because key and token may be JWTs of
// one issuer, and a key may contain the name of its organization.
func TestLookalikes(t *testing.T) {
	t.Parallel()
	const issuer = `{"iss":"https://auth.cable.tech/","sub":"org_9f8b7c6d5e4a3b2c1d0e",`
	a, b := strings.Repeat("A", 43), strings.Repeat("B", 43)
	for name, tt := range map[string]struct{ key, token string }{
		"JWTs":                        {jwtLike(issuer+`"typ":"refresh"}`, a), jwtLike(issuer+`"exp":1711929600}`, b)},
		"the organization in the key": {"cable_live_" + org + "_0123456789abcdef", "t"},
		"a scope in the key":          {"transactions:write/0123456789abcdef", "t"},
		"a short key":                 {"e", "eyJ0.eyJ1.e2"},
		"another short key":           {"Cable", "Cable-token"},
		"opaque with one prefix":      {"cable_sandbox_0123456789abcdef", "cable_sandbox_fedcba9876543210"},
	} {
		c := newClientAt(t, Config{RefreshKey: NewSecret(tt.key)})
		body := `{"token":"` + tt.token + `","expiry":1,"organization_id":"` + org + `","organization_name":"` +
			cabletest.DefaultOrganizationName + `","scopes":{"scopes":["transactions:write"]}}`
		got, err := c.decode([]byte(body), testRequest())
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		// A key that is shorter than a window is no secret, because many texts contain it.
		if got.Value.Reveal() != tt.token ||
			len(tt.key) >= redactWindow && got.OrganizationName != cabletest.DefaultOrganizationName {
			t.Errorf("%s: changed to %q, %q", name, got.Value.Reveal(), got.OrganizationName)
		}
	}
}

// TestErrorBodies pins that an error contains only the message of an envelope of at most 64 KiB, even if the rest has
// another type, and says so if it is not Cable's envelope, with a code and a message.
func TestErrorBodies(t *testing.T) {
	t.Parallel()
	c := newClientAt(t, Config{})
	long := strings.Repeat("é", 300)
	for body, want := range flatten(map[string][]string{
		"": {
			``, `{"error":"no"}`, `<html>no</html>`, `{}`, `null`, `"text"`, `[{"message":"no"}]`,
			`{"message":7}`, `{"message":"no"`, `{"message":"no"} trailing`,
			strings.Repeat(`{"errors":[`, 3) + strings.Repeat(`]}`, 3),
			`{"message":"` + strings.Repeat("x", maxErrorBody-12) + `"}`,
		},
		"no": {
			`{"message":"no"}`, `{"message":"no","errors":null}`, `{"message":"no","errors":[]}`,
			`{"message":"no","secret":"s3cr"}`,
		},
		"no: ": {`{"message":"no","errors":[{}]}`},
		"only": {`{"errors":[{"message":"only"}]}`, `{"code":400,"message":7,"errors":[{"message":"only"}]}`},
		"f: ":  {`{"errors":[{"field":"f"}]}`},

		"no: f: m; x":             {`{"message":"no","errors":[{"field":"f","message":"m"},{"message":"x"}]}`},
		"\ufffd":                  {"{\"message\":\"\xff\"}"},
		strings.Repeat("é", 256):  {`{"message":"` + long + `"}`},
		strings.Repeat("x", 512):  {`{"message":"` + strings.Repeat("x", maxErrorBody-14) + `"}`},
		strings.Repeat("; ", 256): {`{"errors":[` + strings.Repeat(`{},`, 20_000) + `{}]}`},

		`a\x1b[31mb\nc\x00d\u202ee\u2028f`: {`{"message":"a\u001b[31mb\nc\u0000d\u202ee\u2028f"}`},
		"x" + strings.Repeat("é", 255):     {`{"message":"x` + long + `"}`},
		"xx" + strings.Repeat("日", 170):    {`{"message":"xx` + strings.Repeat("日", 300) + `"}`},
		strings.Repeat(`\x01`, 128):        {`{"message":"` + strings.Repeat(`\u0001`, 1000) + `"}`},
	}) {
		detail := want + " (" + notCables + ")"
		if want == "" {
			detail = notCables
		}
		if got := c.errorDetail([]byte(body)); got != detail { // none has a code
			t.Errorf("%.80q: %q, want %q", body, got, detail)
		}
	}
	for _, body := range []string{
		`{"code":400,"message":"no"}`, "\xef\xbb\xbf" + `{"code":400,"message":"no"}`,
		`{"code":"400","message":"no","errors":{}}`, `{"code":400,"message":"no","errors":["scopes: unknown"]}`,
	} {
		if got := c.errorDetail([]byte(body)); got != "no" {
			t.Errorf("%s: %q, want Cable's message alone", body, got)
		}
	}
}

// responseErrors matches the errors of decode, which repeat nothing of a response but the digits of an expiry and an
// envelope's message.
var responseErrors = regexp.MustCompile(`^(` + strings.Join([]string{
	`it is larger than 1048576 bytes`,
	`it is not a JSON object of the documented shape`,
	`its field "(token|expiry|organization_id|organization_name|scopes(\.organization_id|\.scopes)?)" ` +
		`(is not of the documented type|stands twice, or in another case)`,
	`it contains no token(, but a message: .*)?`,
	`its token contains characters that a header cannot carry`,
	`it contains no expiry`,
	`its expiry is not a whole number of seconds`,
	`its expiry( [-+.eE0-9]{1,19})? is not a Unix time in seconds`,
	`its token has [0-9]+ bytes: at most 16384 are accepted`,
	`it repeats the refresh key: check that token_url is Cable's`,
	`it contains its token in more than one field`,
}, "|") + `)$`)

// TestCheckNames compares the scan of names with a decoder's, for objects whose members are documented or nearly so.
func TestCheckNames(t *testing.T) {
	t.Parallel()
	var ambiguous func(d *json.Decoder, path string) bool
	ambiguous = func(d *json.Decoder, path string) bool {
		if open, _ := d.Token(); open != json.Delim('{') {
			return false
		}
		seen := map[string]bool{}
		for d.More() {
			key, _ := d.Token()
			var value json.RawMessage
			_ = d.Decode(&value)
			documented := []string{"token", "expiry", "organization_id", "organization_name", "scopes"}
			if path != "" {
				documented = []string{"organization_id", "scopes"}
			}
			for _, name := range documented {
				if strings.EqualFold(key.(string), name) && (key != name || seen[name]) {
					return true
				}
			}
			seen[key.(string)] = true
			if path+key.(string) == "scopes" && ambiguous(json.NewDecoder(bytes.NewReader(value)), "scopes.") {
				return true
			}
		}
		return false
	}
	keys := rapid.SampledFrom([]string{
		`"token"`, `"Token"`, `"scopes"`, `"sc\u006fpes"`, `"SCOPES"`, `"organization_id"`, `"scopes.scopes"`, `"x\""`,
	})
	rapid.Check(t, func(rt *rapid.T) {
		var value func(depth int) string
		value = func(depth int) string {
			scalar := rapid.SampledFrom([]string{
				`1`, `null`, `"scopes"`, `"a\\"`, `"]}"`, `[]`, `{}`, `["x" , "Scopes","scopes"]`,
			})
			kind := rapid.IntRange(0, 3).Draw(rt, "kind")
			if depth > 0 && (depth == 4 || kind == 0) {
				return scalar.Draw(rt, "scalar")
			}
			var parts []string
			isArray := depth > 0 && kind == 1
			for range rapid.IntRange(0, 3).Draw(rt, "members") {
				part := value(depth + 1)
				if !isArray {
					part = keys.Draw(rt, "key") + " :" + part
				}
				parts = append(parts, part)
			}
			if isArray {
				return "[" + strings.Join(parts, ",") + "]"
			}
			return "{" + strings.Join(parts, " , ") + "}"
		}
		raw := value(0)
		want := ambiguous(json.NewDecoder(strings.NewReader(raw)), "")
		if err := checkNames([]byte(raw)); (err != nil) != want {
			rt.Fatalf("%s: %v, want ambiguous %t", raw, err, want)
		}
	})
}

// FuzzResponse pins that for any body of a 200, decoding does not panic; that an accepted token can be sent, has a
// possible expiry and contains no part of the refresh key; and that an error contains no part of the key, and nothing
// of the body that responseErrors does not match.
func FuzzResponse(f *testing.F) {
	for _, s := range []string{
		`{"token":"t","expiry":1711929600,"organization_id":"o","scopes":{"organization_id":"o","scopes":["a:b"]}}`,
		`{"token":"` + testKey + `","expiry":1711929600}`, `{"token":"t","expiry":1.5e9}`, `{"token":"t","expiry":-1}`,
		`{"code":401,"message":"m ` + testKey + `","errors":[{"field":"f","message":"x"}]}`, `{"token":{},"expiry":[]}`,
		`{"token":"a\nb","expiry":1711929600}`, `null`, ``, `<html>`, `{"token":"\ud800","expiry":1}`,
	} {
		f.Add([]byte(s))
	}
	c := newClientAt(f, Config{})
	f.Fuzz(func(t *testing.T, raw []byte) {
		token, err := c.decode(raw, testRequest())
		if err != nil {
			if token != nil || !responseErrors.MatchString(err.Error()) {
				t.Errorf("%v, %q", token, err)
			}
			if text := err.Error(); c.redactor.contains(text) || len(text) > maxText+100 ||
				strings.ContainsFunc(text, notPrinted) {
				t.Errorf("%q", text)
			}
			return
		}
		value := token.Value.Reveal()
		if value == "" || strings.ContainsFunc(value, func(c rune) bool { return c <= ' ' || c > '~' }) {
			t.Errorf("accepted the token %q", value)
		}
		if year := time.Unix(token.Expiry, 0).UTC().Year(); token.Expiry <= 0 || year > 9999 {
			t.Errorf("accepted the expiry %d", token.Expiry)
		}
		if len(token.OrganizationName) > maxText || strings.ContainsFunc(token.OrganizationName, notPrinted) {
			t.Errorf("accepted the name %q", token.OrganizationName)
		}
		if c.redactor.repeats(value) || strings.Contains(value, testKey) {
			t.Error("the token is the refresh key")
		}
		names := []string{token.OrganizationID, token.OrganizationName, token.ScopesOrganizationID}
		for _, s := range append(names, token.Scopes...) {
			if c.redactor.contains(s) {
				t.Errorf("%q contains a part of the refresh key", s)
			}
		}
	})
}

// notPrinted reports characters that an error must not contain.
func notPrinted(c rune) bool { return !unicode.IsGraphic(c) && c != '\u200c' && c != '\u200d' }

// FuzzErrorResponse pins that for any error response, the error is bounded, printable, and without the key.
func FuzzErrorResponse(f *testing.F) {
	f.Add(401, []byte(`{"code":401,"message":"unauthorized"}`))
	f.Add(400, []byte(`{"message":"`+testKey+`","errors":[{"field":"`+testKey[:15]+`","message":"\u001b[0m"}]}`))
	f.Add(503, []byte(strings.Repeat(`{"message":`, 1000)))
	f.Add(500, []byte("<html>"+testKey))
	f.Add(302, []byte("{}"))
	c := newClientAt(f, Config{})
	f.Fuzz(func(t *testing.T, status int, raw []byte) {
		resp := &http.Response{StatusCode: status, Body: io.NopCloser(bytes.NewReader(raw))}
		e := (&request{client: c}).failed(resp, true, func() {})
		if len(e.Detail) > maxText+len(notCables)+3 || !utf8.ValidString(e.Error()) ||
			strings.ContainsFunc(e.Error(), notPrinted) || c.redactor.contains(e.Error()) {
			t.Errorf("%q", e)
		}
	})
}
