// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"errors"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// fuzzClient is a client whose key the fuzz targets look for.
func fuzzClient(t testing.TB) *Client {
	c, err := New(Config{RefreshKey: NewSecret(testKey)})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// FuzzAnswer protects what is handed on: whatever a 200 holds, decoding does
// not panic; a token that is accepted is one, with an expiry that can be, and
// without the refresh key; an error shows no key, and nothing of the body but
// the documented words.
func FuzzAnswer(f *testing.F) {
	for _, s := range []string{
		`{"token":"t","expiry":1711929600,"organization_id":"o","organization_name":"n","scopes":{"organization_id":"o","scopes":["a:b"]}}`,
		`{"token":"` + testKey + `","expiry":1711929600}`, `{"token":"t","expiry":"1711929600"}`, `{"token":"t","expiry":1.5e9}`,
		`{"token":"t","expiry":1711929600000}`, `{"token":"t","expiry":-1}`, `{"code":401,"message":"m ` + testKey + `","errors":[{"field":"f","message":"x"}]}`,
		`{"token":"a\nb","expiry":1711929600}`, `{"token":{},"expiry":[]}`, `[]`, `null`, ``, `{"scopes":{"scopes":[1]}}`, `<html>`, `{"token":"\ud800","expiry":1}`,
	} {
		f.Add([]byte(s))
	}
	c := fuzzClient(f)
	f.Fuzz(func(t *testing.T, raw []byte) {
		token, err := c.decode(raw)
		if err != nil {
			if c.redactor.contains(err.Error()) || len(err.Error()) > maxText+200 || strings.ContainsAny(err.Error(), "\n\x1b") {
				t.Errorf("%q", err)
			}
			return
		}
		value := token.Value.Reveal()
		if value == "" || strings.ContainsFunc(value, func(c rune) bool { return c <= ' ' || c > '~' }) || token.Expiry <= 0 || token.Expiry > maxExpiry {
			t.Errorf("accepted %+v", token)
		}
		for _, s := range append([]string{value, token.OrganizationID, token.OrganizationName, token.ScopesOrganizationID}, token.Scopes...) {
			if c.redactor.contains(s) {
				t.Error("an accepted answer holds the refresh key")
			}
		}
		if time.Unix(token.Expiry, 0).UTC().Year() > 9999 {
			t.Errorf("expiry %d", token.Expiry)
		}
	})
}

// FuzzErrorAnswer protects error texts: whatever Cable sends with an error
// status, what is shown is bounded, printable, and without the key.
func FuzzErrorAnswer(f *testing.F) {
	f.Add(401, []byte(`{"code":401,"message":"unauthorized"}`))
	f.Add(400, []byte(`{"message":"`+testKey+`","errors":[{"field":"`+testKey[:15]+`","message":"\u001b[0m"},{"message":"only"}]}`))
	f.Add(503, []byte(strings.Repeat(`{"message":`, 1000)))
	f.Add(500, []byte("<html>"+testKey))
	f.Add(302, []byte("{}"))
	c := fuzzClient(f)
	f.Fuzz(func(t *testing.T, status int, raw []byte) {
		e := c.answered(&http.Response{StatusCode: status, Header: http.Header{}}, raw, new(exchange))
		if len(e.Detail) > maxText || !utf8.ValidString(e.Error()) || strings.ContainsAny(e.Error(), "\n\r\x1b\x00") || c.redactor.contains(e.Error()) {
			t.Errorf("%q", e)
		}
	})
}

// FuzzTokenURL protects the key's way: what is accepted is https, or plain http
// to a loopback host, holds nothing but scheme, host and path, and a request
// made from it goes to just that host and path.
func FuzzTokenURL(f *testing.F) {
	for _, s := range []string{
		DefaultTokenURL, "http://127.0.0.1:8080/x", "http://localhost/x", "http://[::1]:1/x", "http://[::ffff:127.0.0.1]/", "https://user:pw@h/", "https://h/?q", "https://h/#", "http://127.0.0.1.example.com/",
		"http://127.0.0.1@evil.example/", "https://h\\@evil.example/", "https:h", "//h/x", "http://2130706433/", "http://0x7f.1/", "https://h:99999/", "https://h:/", "HTTPS://H/", "https://h/%2e%2e/x", "https://[fe80::1%25eth0]/", "https://h/\u2028",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		u, err := CheckURL(raw)
		if err != nil {
			if strings.Contains(err.Error(), "canary") {
				t.Errorf("%q", err)
			}
			return
		}
		if u.Scheme != "https" && (u.Scheme != "http" || !isLoopback(u.Hostname())) {
			t.Errorf("%q goes without TLS to %q", raw, u.Host)
		}
		if u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Opaque != "" || u.ForceQuery || u.Hostname() == "" {
			t.Errorf("%q is more than scheme, host and path: %+v", raw, u)
		}
		again, err := url.Parse(u.String())
		if err != nil || again.Host != u.Host || again.EscapedPath() != u.EscapedPath() || again.Scheme != u.Scheme {
			t.Errorf("%q is requested as %q: %v", raw, u, err)
		}
	})
}

// FuzzRetryAfter protects the pause: no header makes it negative, or longer
// than a day.
func FuzzRetryAfter(f *testing.F) {
	for _, s := range [][2]string{{"1", ""}, {"-1", ""}, {"99999999999999999999", ""}, {"9223372036854775807", ""}, {"Fri, 31 Dec 9999 23:59:59 GMT", ""}, {"Sun, 06 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:36 GMT"}, {"Fri, 31 Dec 9999 23:59:59 GMT", "Mon, 01 Jan 0001 00:00:00 GMT"}, {"1.5", ""}, {"", "x"}} {
		f.Add(s[0], s[1])
	}
	f.Fuzz(func(t *testing.T, after, date string) {
		wait, ok := retryAfter(&http.Response{Header: http.Header{"Retry-After": {after}, "Date": {date}}})
		if wait < 0 || wait > MaxLife || !ok && wait != 0 {
			t.Errorf("%q at %q: %s %v", after, date, wait, ok)
		}
	})
}

// TestErrorIs pins which context errors stand behind which kinds.
func TestErrorIs(t *testing.T) {
	t.Parallel()
	for k := Answered; k <= Canceled; k++ {
		if k.String() == "unknown" || (&Error{Kind: k}).Error() == "" {
			t.Errorf("kind %d has no words", k)
		}
	}
	if errors.Is(&Error{Kind: Answered}, http.ErrServerClosed) {
		t.Error("an error is one that it is not")
	}
}
