// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode"
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

// answerErrors matches what decode says of an answer in words of its own: it
// repeats nothing of it but the digits of an expiry and an envelope's words.
var answerErrors = regexp.MustCompile(`^(` + strings.Join([]string{
	`it is larger than 1048576 bytes`,
	`it is not a JSON object of the documented shape`,
	`its field "(token|expiry|organization_id|organization_name|scopes(\.organization_id|\.scopes)?)" is not of the documented type`,
	`it holds no token(, but says: .*)?`,
	`its token holds characters that no header can carry`,
	`it holds no expiry`,
	`its expiry is not a whole number of seconds`,
	`its expiry -?[0-9]{1,19} is not a Unix time in seconds`,
	`it repeats the refresh key: check that token_url is Cable's`,
	`it holds its token in more than one field`,
}, "|") + `)$`)

// FuzzAnswer protects what is handed on: whatever a 200 holds, decoding does
// not panic; a token that is accepted is one, with an expiry that can be, and
// nothing in it hands the refresh key on; an error shows no part of the key,
// and nothing of the body but the documented words.
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
		token, err := c.decode(raw, ask())
		if err != nil {
			if token != nil || !answerErrors.MatchString(err.Error()) {
				t.Errorf("%v, %q", token, err)
			}
			if said := err.Error(); c.redactor.contains(said) || len(said) > maxText+100 || strings.ContainsFunc(said, notPrinted) {
				t.Errorf("%q", said)
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
		for _, s := range append([]string{token.OrganizationID, token.OrganizationName, token.ScopesOrganizationID}, token.Scopes...) {
			if c.redactor.contains(s) {
				t.Errorf("%q holds a part of the refresh key", s)
			}
		}
	})
}

// notPrinted reports what may not stand in an error.
func notPrinted(c rune) bool { return !unicode.IsPrint(c) }

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
		if len(e.Detail) > maxText || !utf8.ValidString(e.Error()) || strings.ContainsFunc(e.Error(), notPrinted) || c.redactor.contains(e.Error()) {
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
			if len(err.Error()) > 300 || strings.ContainsFunc(err.Error(), notPrinted) {
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
		dialled, r := onTheWire(t, raw)
		if dialled == "" {
			return // no such host can be called
		}
		// By hand, beside net/url: what stands between "//" and the next slash is
		// the host that a reader sees.
		_, rest, _ := strings.Cut(raw, "://")
		host, path, slash := strings.Cut(rest, "/")
		if slash {
			path = "/" + path
		} else {
			path = "/"
		}
		if port := map[string]string{"https": ":443", "http": ":80"}[u.Scheme]; u.Port() == "" {
			host += port
		}
		if want, err := url.PathUnescape(host); err != nil || isASCII(want) && dialled != want {
			t.Errorf("%q calls %q, want %q: %v", raw, dialled, host, err)
		}
		sent, err := url.PathUnescape(r.RequestURI)
		if want, wantErr := url.PathUnescape(path); err != nil || wantErr != nil || sent != want {
			t.Errorf("%q asks for %q, want %q: %v, %v", raw, r.RequestURI, path, err, wantErr)
		}
		if isASCII(u.Host) && !strings.Contains(u.Host, "%") && r.Host != u.Host {
			t.Errorf("%q names the host %q, want %q", raw, r.Host, u.Host)
		}
		if r.Method != http.MethodPost || r.Header.Get("Authorization") != testKey {
			t.Errorf("%q is sent as %s without the key", raw, r.Method)
		}
	})
}

func isASCII(s string) bool {
	return !strings.ContainsFunc(s, func(c rune) bool { return c > unicode.MaxASCII })
}

// onTheWire makes a request to a token URL and returns the address that was
// dialled and the request as it was sent, or "" if nothing was dialled.
func onTheWire(t *testing.T, tokenURL string) (dialled string, sent *http.Request) {
	t.Helper()
	c, err := New(Config{RefreshKey: NewSecret(testKey), TokenURL: tokenURL})
	if err != nil {
		t.Fatalf("%q: CheckURL accepts it, New does not: %v", tokenURL, err)
	}
	defer c.Close()
	requests := make(chan *http.Request, 1)
	dial := func(_ context.Context, _, address string) (net.Conn, error) {
		dialled = address
		here, there := net.Pipe()
		go func() {
			defer func() { _ = there.Close() }()
			r, err := http.ReadRequest(bufio.NewReader(there))
			if err == nil {
				_, err = io.Copy(io.Discard, r.Body)
			}
			if err != nil {
				r = &http.Request{Method: err.Error()}
			}
			requests <- r
			_, _ = io.WriteString(there, "HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n")
		}()
		return here, nil
	}
	c.transport.Proxy, c.transport.DialContext, c.transport.DialTLSContext = nil, dial, dial
	_, err = c.RequestToken(t.Context(), ask())
	var e *Error
	if !errors.As(err, &e) {
		t.Fatalf("%q: %v", tokenURL, err)
	}
	if e.StatusCode != http.StatusUnauthorized {
		if e.MaybeIssued {
			t.Fatalf("%q: %+v", tokenURL, e)
		}
		return "", nil
	}
	return dialled, <-requests
}

// FuzzRetryAfter protects the pause: no header makes it negative, or longer
// than a day.
func FuzzRetryAfter(f *testing.F) {
	for _, s := range [][2]string{{"1", ""}, {"-1", ""}, {"99999999999999999999", ""}, {"9223372036854775807", ""}, {"Fri, 31 Dec 9999 23:59:59 GMT", ""}, {"Sun, 06 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:36 GMT"}, {"Fri, 31 Dec 9999 23:59:59 GMT", "Mon, 01 Jan 0001 00:00:00 GMT"}, {"1.5", ""}, {"", "x"}} {
		f.Add(s[0], s[1])
	}
	f.Fuzz(func(t *testing.T, after, date string) {
		wait, ok := retryAfter(&http.Response{Header: http.Header{"Retry-After": {after}, "Date": {date}}})
		if wait < 0 || wait > MaxLifetime || !ok && wait != 0 {
			t.Errorf("%q at %q: %s %v", after, date, wait, ok)
		}
	})
}

// TestErrorIs pins which context errors stand behind which kinds.
func TestErrorIs(t *testing.T) {
	t.Parallel()
	for k := Responded; k <= Canceled; k++ {
		if k.String() == "unknown" || (&Error{Kind: k}).Error() == "" {
			t.Errorf("kind %d has no words", k)
		}
	}
	if errors.Is(&Error{Kind: Responded}, http.ErrServerClosed) {
		t.Error("an error is one that it is not")
	}
}
