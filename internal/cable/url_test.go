// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"unicode"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// TestParseTokenURL pins which endpoints are accepted, and that errors repeat nothing but a host. See also
// FuzzTokenURL.
func TestParseTokenURL(t *testing.T) {
	t.Parallel()
	const (
		white    = "token_url must not contain white space, control characters or backslashes"
		noURL    = "token_url is not a URL"
		scheme   = "token_url must begin with https://"
		noHost   = "token_url names no host"
		user     = "token_url must not contain a user name or password"
		query    = "token_url must not contain a query or a fragment"
		port     = "token_url names a port that is not a number from 1 to 65535"
		zone     = "token_url must not contain an IPv6 zone"
		loopback = "token_url uses plain http for "
		host     = "token_url names a host with characters other than letters"
		long     = "token_url has 2049 bytes: at most 2048 are allowed"
	)
	fill := strings.Repeat("a", maxTokenURL-len(DefaultTokenURL))
	for raw, want := range flatten(map[string][]string{
		"": {
			DefaultTokenURL, "https://api.cable.tech", "https://api.cable.tech/", "https://api.cable.tech:8443/x",
			"HTTPS://API.CABLE.TECH/x", "https://10.0.0.1/x", "https://[2001:db8::1]:443/x", "http://localhost:1/x",
			"http://LocalHost/x", "http://127.0.0.1/x", "http://127.255.255.254:65535/x", "http://[::1]:8080/x",
			"http://[::ffff:127.0.0.1]/x", "https://xn--e1aybc.example/", "https://cable_api.internal/",
			"https://[fe80::1]/", "https://az-AZ_09.example/", DefaultTokenURL + fill,
		},
		scheme: {
			"", "api.cable.tech", "api.cable.tech/v2/auth/token", "//api.cable.tech/v2", "ftp://api.cable.tech/",
			"file:///etc/passwd", "unix:///var/run/docker.sock",
		},
		noHost: {"https:api.cable.tech", "https:///v2/auth/token", "https://:443/"},
		user: {
			"https://user@api.cable.tech/", "https://user:pass@api.cable.tech/", "https://@api.cable.tech/",
			"https://api.cable.tech@evil.example/", "http://localhost@evil.example/",
		},
		query: {
			"https://api.cable.tech/?a=b", "https://api.cable.tech/?", "https://api.cable.tech/#a",
			"https://api.cable.tech/#", "https://api.cable.tech?a",
		},
		port: {
			"https://api.cable.tech:0/", "https://api.cable.tech:/", "https://api.cable.tech:65536/",
			"https://api.cable.tech:99999999999/",
		},
		noURL: {"https://api.cable.tech:http/", "https://[::1/", "https://api.cable.tech/%zz"},
		white: {
			"https://api.cable.tech/a b", " https://api.cable.tech/", "https://api.cable.tech/\n",
			"https://api.cable.tech/\x00", "https://api.cable.tech/\x7f", "https://api.cable.tech\t/",
			`https://api.cable.tech\@evil.example/`,
		},
		zone: {"https://[fe80::1%25eth0]/", "http://[::1%25REFRESHKEYCANARY]/"},
		host: {
			"https://арi.cable.tech/", // Cyrillic
			"http://localhoſt/",       // folds to an s
			"https://api.cable.tech;evil.example/", "https://api.cable.tech,evil.example/", `https://api.cable.tech"/`,
			"https://api.cable.tech&evil.example/", "https://evil.example⁄api.cable.tech/",
			"https://api%E2%80%A4cable.tech/", "http://１２７.0.0.1/",
		},
		loopback: {
			"http://10.0.0.1/", "http://0.0.0.0/", "http://[::]/", "http://169.254.169.254/latest",
			"http://localhost.evil.example/", "http://localhost./", "http://127.0.0.1.nip.io/", "http://2130706433/",
			"http://0x7f.1/", "http://127.1/", "http://[::ffff:10.0.0.1]/", "http://evil.example/REFRESHKEYCANARY-etc",
		},
		loopback + "api.cable.tech: only a loopback host (localhost, ": {"http://api.cable.tech/"},
		loopback + "a host of 24 characters: only":                     {"http://REFRESHKEYCANARY.example/"},
		long: {DefaultTokenURL + fill + "a"},
	}) {
		u, err := ParseTokenURL(raw)
		if err == nil {
			if want != "" {
				t.Errorf("%.100q: accepted, want %q", raw, want)
			} else if u.String() != raw && !strings.EqualFold(u.String(), raw) {
				t.Errorf("%q became %q", raw, u)
			}
			continue
		}
		t.Logf("%.60q: %v", raw, err)
		if want == "" || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%.100q: got %q, want %q", raw, err, want)
		}
		if len(err.Error()) > 300 || strings.Contains(err.Error(), cabletest.RefreshKeyMarker) {
			t.Errorf("%.100q: the error repeats too much: %s", raw, err)
		}
	}
}

// flatten returns the result of each text in lists, which have the texts by their results.
func flatten(lists map[string][]string) map[string]string {
	all := map[string]string{}
	for result, texts := range lists {
		for _, text := range texts {
			all[text] = result
		}
	}
	return all
}

// TestHostForDisplay pins which hosts are shown, namely those with a shape that a secret does not have.
func TestHostForDisplay(t *testing.T) {
	t.Parallel()
	label := strings.Repeat("a", 40)
	const shown, hidden = "shown", "hidden"
	for host, how := range flatten(map[string][]string{
		shown: {
			"api.cable.tech", "api.cable.tech:8443", "a-1.b2.c", "xn--e1aybc.example", "localhost", "localhost:8080",
			"127.0.0.1:8080", "[::1]:8200", "[2001:db8::1]", label + "." + label,
			label + "." + label + "." + strings.Repeat("a", 18),
		},
		hidden: {
			label + "." + label + "." + strings.Repeat("a", 19), label + "a." + label, label + "." + label + "a",
			"sk_live_0123456789abcdef", "0123456789abcdef0123456789ab", "vault", "LOCALHOST", "API.cable.tech",
			"eyJhbGciOiJ9.e30.c2ln", "cable_api.internal", "secret.123", "a.b.", ".a.b", "[fe80::1%eth0]",
		},
	}) {
		u := &url.URL{Scheme: "https", Host: host}
		want := host
		if how == hidden {
			want = fmt.Sprintf("a host of %d characters", len(u.Hostname()))
		}
		if got := HostForDisplay(u); got != want {
			t.Errorf("%s: %q, want %q", host, got, want)
		}
	}
	if got := HostForDisplay(&url.URL{Host: "api.cable.tech:99999999"}); got != "api.cable.tech" {
		t.Errorf("an impossible port: %q", got)
	}
}

// FuzzTokenURL pins that an accepted token_url is https, or plain http to a loopback host, has nothing but scheme, host
// and path, and that a request made from it is sent to just that host and path.
func FuzzTokenURL(f *testing.F) {
	for _, s := range []string{
		DefaultTokenURL, "http://127.0.0.1:8080/x", "http://[::ffff:127.0.0.1]/", "https://user:pw@h/", "https://h/?q",
		"http://127.0.0.1@evil.example/", "https://h\\@evil.example/", "https:h", "http://2130706433/", "https://h:/",
		"HTTPS://H/", "https://h/%2e%2e/x", "https://[fe80::1%25eth0]/", "https://h/\u2028",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		u, err := ParseTokenURL(raw)
		if err != nil {
			if len(err.Error()) > 300 || strings.ContainsFunc(err.Error(), notPrinted) {
				t.Errorf("%q", err)
			}
			return
		}
		if u.Scheme != "https" && (u.Scheme != "http" || !isLoopback(u.Hostname())) {
			t.Errorf("%q goes without TLS to %q", raw, u.Host)
		}
		if u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Opaque != "" || u.ForceQuery ||
			u.Hostname() == "" {
			t.Errorf("%q is more than scheme, host and path: %+v", raw, u)
		}
		dialled, r := onTheWire(t, raw)
		if dialled == "" {
			return // no such host can be called
		}
		// By hand, without net/url, as a reader sees the host between "//" and the next slash.
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
			t.Errorf("%q requests %q, want %q: %v, %v", raw, r.RequestURI, path, err, wantErr)
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

// onTheWire makes a request to a token URL and returns the address that was dialled and the request as it was sent, or
// "" if nothing was dialled.
func onTheWire(t *testing.T, tokenURL string) (dialled string, sent *http.Request) {
	t.Helper()
	c, err := New(Config{RefreshKey: NewSecret(testKey), TokenURL: tokenURL})
	if err != nil {
		t.Fatalf("%q: ParseTokenURL accepts it, New does not: %v", tokenURL, err)
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
	_, err = c.RequestToken(t.Context(), testRequest())
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
