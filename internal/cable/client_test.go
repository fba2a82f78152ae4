// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

const org = cabletest.DefaultOrganizationID

// ask is a valid request.
func ask() cable.TokenRequest {
	return cable.TokenRequest{OrganizationID: org, Scopes: []string{"transactions:write"}, Lifetime: time.Hour}
}

// newClient returns a client of srv, with cfg laid over what it needs.
func newClient(t testing.TB, srv *cabletest.Server, cfg cable.Config) *cable.Client {
	t.Helper()
	cfg.RefreshKey = cable.NewSecret(srv.RefreshKey())
	if cfg.TokenURL == "" {
		cfg.TokenURL = srv.URL
	}
	return newClientAt(t, cfg)
}

// newClientAt returns a client of cfg, whose key is made up unless it is set.
func newClientAt(t testing.TB, cfg cable.Config) *cable.Client {
	t.Helper()
	if cfg.RefreshKey.IsZero() {
		cfg.RefreshKey = cable.NewSecret(cabletest.NewRefreshKey())
	}
	c, err := cable.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// mints requests a token, which must come.
func mints(t testing.TB, c *cable.Client) *cable.Token {
	t.Helper()
	token, err := c.RequestToken(t.Context(), ask())
	if err != nil {
		t.Fatalf("no token: %v", err)
	}
	if !strings.Contains(token.Value.Reveal(), cabletest.TokenMarker) {
		t.Fatal("the token is not the simulator's")
	}
	return token
}

// fails requests a token, which must not come, logs why, and checks that the
// error is of the one type, prints no secret and is bounded.
func fails(t testing.TB, ctx context.Context, c *cable.Client) *cable.Error {
	t.Helper()
	token, err := c.RequestToken(ctx, ask())
	var e *cable.Error
	if !errors.As(err, &e) || token != nil {
		t.Fatalf("got %v, %v; want an *Error alone", token, err)
	}
	t.Logf("%s: %s (attempts %d, maybe minted: %t)", e.Kind, e, e.Attempts, e.MaybeIssued)
	encoded, _ := json.Marshal(e)
	text := fmt.Sprintf("%v %+v %#v %s", err, err, err, encoded)
	for _, marker := range []string{cabletest.RefreshKeyMarker, cabletest.TokenMarker} {
		if strings.Contains(text, marker) {
			t.Errorf("the error holds a secret: %s", text)
		}
	}
	if len(e.Error()) > 700 {
		t.Errorf("the error's text is %d bytes long", len(e.Error()))
	}
	return e
}

// sees checks a simulator's counters.
func sees(t testing.TB, srv *cabletest.Server, calls, minted int) {
	t.Helper()
	if s := srv.Stats(); s.Calls != calls || s.Minted != minted {
		t.Errorf("the simulator saw %d calls and minted %d tokens; want %d and %d", s.Calls, s.Minted, calls, minted)
	}
}

// TestRequest pins what goes over the wire, byte by byte where it matters.
func TestRequest(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name          string
		cfg           cable.Config
		path          string
		authorization string
		header        http.Header // beside Authorization and those of every request
	}{
		{name: "raw", authorization: "the-key-of-this-test", header: http.Header{}},
		{name: "bearer", cfg: cable.Config{Bearer: true}, authorization: "Bearer the-key-of-this-test", header: http.Header{}},
		{name: "user agent", cfg: cable.Config{UserAgent: "engine/1.2"}, authorization: "the-key-of-this-test", header: http.Header{"User-Agent": {"engine/1.2"}}},
		{name: "no path", path: "/", authorization: "the-key-of-this-test", header: http.Header{}},
		{name: "escaped path", path: "/a%2Fb//../c", authorization: "the-key-of-this-test", header: http.Header{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			type request struct {
				Method, URI, Host, Proto, Body string
				Length                         int64
				Header                         http.Header
			}
			requests := make(chan request, 10)
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				requests <- request{r.Method, r.RequestURI, r.Host, r.Proto, string(body), r.ContentLength, r.Header}
				fmt.Fprint(w, `{"token":"t","expiry":1711929600}`)
			}))
			t.Cleanup(srv.Close)
			cfg, path := tt.cfg, tt.path
			switch path {
			case "":
				path = "/v2/auth/token"
				cfg.TokenURL = srv.URL + path
			case "/":
				cfg.TokenURL = srv.URL
			default:
				cfg.TokenURL = srv.URL + path
			}
			cfg.RefreshKey = cable.NewSecret("the-key-of-this-test")
			c := newClientAt(t, cfg)
			_, err := c.RequestToken(t.Context(), cable.TokenRequest{
				OrganizationID: `org_"<é`,
				Scopes:         []string{"transactions:write", "person:read"},
				Lifetime:       time.Hour + 999*time.Millisecond,
			})
			if err != nil {
				t.Fatal(err)
			}
			body := `{"expiry_seconds":3600,"scopes":{"organization_id":"org_\"\u003cé","scopes":["transactions:write","person:read"]}}`
			want := request{
				Method: "POST", URI: path, Host: strings.TrimPrefix(srv.URL, "http://"), Proto: "HTTP/1.1",
				Body: body, Length: int64(len(body)),
				Header: http.Header{
					"Authorization":  {tt.authorization},
					"Content-Type":   {"application/json"},
					"Accept":         {"application/json"},
					"Content-Length": {fmt.Sprint(len(body))},
				},
			}
			for name, values := range tt.header {
				want.Header[name] = values
			}
			if diff := cmp.Diff(want, <-requests); diff != "" {
				t.Errorf("request (-want +got):\n%s", diff)
			}
			if len(requests) != 0 {
				t.Errorf("%d more requests", len(requests))
			}
		})
	}
}

// TestToken pins how an answer is decoded.
func TestToken(t *testing.T) {
	t.Parallel()
	text := func(s string) *string { return &s }
	for _, tt := range []struct {
		name  string
		fault cabletest.Fault
		want  cable.Token // beside Value, Expiry and the times
	}{
		{name: "whole", want: cable.Token{ScopesOrganizationID: org, Scopes: []string{"transactions:write"}}},
		{name: "no scopes", fault: cabletest.Fault{Grant: &cabletest.Grant{OmitScopes: true}}},
		{
			name:  "empty list of scopes",
			fault: cabletest.Fault{Grant: &cabletest.Grant{Scopes: &[]string{}}},
			want:  cable.Token{ScopesOrganizationID: org, Scopes: []string{}},
		},
		{
			name:  "other scopes of another organization",
			fault: cabletest.Fault{Grant: &cabletest.Grant{Scopes: &[]string{"b:c", "a:b"}, ScopesOrganizationID: text("org_x")}},
			want:  cable.Token{ScopesOrganizationID: "org_x", Scopes: []string{"b:c", "a:b"}},
		},
		{
			name:  "a clock that is years off",
			fault: cabletest.Fault{ClockSkew: -100_000 * time.Hour},
			want:  cable.Token{ScopesOrganizationID: org, Scopes: []string{"transactions:write"}},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			srv := cabletest.NewServer(t, nil)
			srv.SetFault(tt.fault)
			before := time.Now()
			got := mints(t, newClient(t, srv, cable.Config{}))
			after := time.Now()
			minted := srv.Minted()[0]
			want := tt.want
			want.OrganizationID, want.OrganizationName = org, cabletest.DefaultOrganizationName
			want.Expiry = minted.Expiry.Unix()
			want.Date = minted.IssuedAt
			want.Attempts = 1
			if diff := cmp.Diff(want, *got, cmpopts.IgnoreFields(cable.Token{}, "Value", "SentAt", "ReceivedAt")); diff != "" {
				t.Errorf("token (-want +got):\n%s", diff)
			}
			if got.Value.Reveal() != minted.Token {
				t.Error("the value is not the minted one")
			}
			if got.SentAt.Before(before) || got.ReceivedAt.Before(got.SentAt) || after.Before(got.ReceivedAt) {
				t.Errorf("sent at %s, received at %s; want both in order, from %s to %s", got.SentAt, got.ReceivedAt, before, after)
			}
			sees(t, srv, 1, 1)
		})
	}
}

// TestDate pins that a Date header which cannot be read is as if there were
// none, and refuses no token.
func TestDate(t *testing.T) {
	t.Parallel()
	for header, want := range map[string]time.Time{
		"":                               {},
		"yesterday":                      {},
		"1711929600":                     {},
		"Sun, 31 Mar 2024 23:00:00 GMT":  time.Date(2024, 3, 31, 23, 0, 0, 0, time.UTC),
		"Sunday, 31-Mar-24 23:00:00 GMT": time.Date(2024, 3, 31, 23, 0, 0, 0, time.UTC),
		"Sun Mar 31 23:00:00 2024":       time.Date(2024, 3, 31, 23, 0, 0, 0, time.UTC),
		"Sun, 99 Mar 2024 23:00:00 GMT":  {},
	} {
		t.Run(header, func(t *testing.T) {
			t.Parallel()
			srv := cabletest.NewServer(t, nil)
			srv.SetFault(cabletest.Fault{Header: map[string]string{"Date": header}})
			if got := mints(t, newClient(t, srv, cable.Config{})).Date; !got.Equal(want) || got.IsZero() != want.IsZero() {
				t.Errorf("Date %q is read as %s, want %s", header, got, want)
			}
		})
	}
}

// TestSlowAnswer pins that SentAt lies before what the answer took, and that
// of a repeated request it is that of the last attempt.
func TestSlowAnswer(t *testing.T) {
	t.Parallel()
	srv := cabletest.NewServer(t, nil)
	srv.AddFault(cabletest.Fault{Times: 1, Status: 503, Header: map[string]string{"Retry-After": "0"}})
	srv.AddFault(cabletest.Fault{Delay: 50 * time.Millisecond})
	before := time.Now()
	got := mints(t, newClient(t, srv, cable.Config{}))
	if took := got.ReceivedAt.Sub(got.SentAt); took < 50*time.Millisecond {
		t.Errorf("the answer took %s by the token, want 50ms or more", took)
	}
	if got.SentAt.Sub(before) < 100*time.Millisecond {
		t.Errorf("sent %s after the call, want the last attempt's time", got.SentAt.Sub(before))
	}
	if got.Attempts != 2 {
		t.Errorf("%d attempts, want 2", got.Attempts)
	}
}

// TestConnections pins that concurrent mints reuse connections: Go's default
// of two idle ones would make 62 of 64 reconnect in each round.
func TestConnections(t *testing.T) {
	t.Parallel()
	const concurrent = 64
	for name, newServer := range map[string]func(testing.TB, *cabletest.Options) *cabletest.Server{
		"HTTP/1.1": cabletest.NewServer, "HTTP/2.0": cabletest.NewTLSServer,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			// Each answer waits, so that all 64 calls are under way at once.
			srv := newServer(t, &cabletest.Options{Default: cabletest.Fault{Delay: 10 * time.Millisecond}})
			c := newClient(t, srv, cable.Config{CACert: srv.CA})
			round := func() {
				var wg sync.WaitGroup
				for range concurrent {
					wg.Go(func() {
						if _, err := c.RequestToken(t.Context(), ask()); err != nil {
							t.Error(err)
						}
					})
				}
				wg.Wait()
			}
			round()
			warm := srv.Connections()
			for range 10 {
				round()
			}
			total := srv.Connections()
			t.Logf("%d calls: %d connections after the first round, %d in the end", srv.CallCount(), warm, total)
			if total > 2*concurrent || total-warm > concurrent/4 {
				t.Errorf("%d connections, %d of them after the first round of %d calls", total, total-warm, concurrent)
			}
			if got := srv.Calls()[0].Proto; got != name {
				t.Errorf("spoke %s, want %s", got, name)
			}
			tokens := map[string]bool{}
			for _, m := range srv.Minted() {
				tokens[m.Token] = true
			}
			if len(tokens) != 11*concurrent {
				t.Errorf("%d tokens, want %d", len(tokens), 11*concurrent)
			}
		})
	}
}

// TestErrorsKeepConnections pins that a refusal, which is read to its end,
// costs no connection.
func TestErrorsKeepConnections(t *testing.T) {
	t.Parallel()
	srv := cabletest.NewServer(t, nil)
	c := newClient(t, srv, cable.Config{})
	for _, status := range []int{400, 401, 404, 500, 502, 503} {
		srv.SetFault(cabletest.Fault{Status: status, Times: 1, Message: strings.Repeat("long ", 1000)})
		if e := fails(t, t.Context(), c); e.StatusCode != status {
			t.Errorf("status %d, want %d", e.StatusCode, status)
		}
		mints(t, c)
	}
	if n := srv.Connections(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
}

// TestClose pins that a closed client lets its connections go and that a call
// under way ends as it would.
func TestClose(t *testing.T) {
	t.Parallel()
	arrived := make(chan struct{}, 1)
	sim := cabletest.New(nil)
	closed := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		arrived <- struct{}{}
		<-closed
		sim.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	c := newClientAt(t, cable.Config{RefreshKey: cable.NewSecret(sim.RefreshKey()), TokenURL: srv.URL + sim.Path()})
	done := make(chan error)
	go func() {
		_, err := c.RequestToken(t.Context(), ask())
		done <- err
	}()
	<-arrived
	c.Close()
	close(closed)
	if err := <-done; err != nil {
		t.Errorf("the call under way: %v", err)
	}
}

// TestNothingIsTakenAlong pins that a client neither keeps nor sends cookies
// and takes nothing of an earlier answer along.
func TestNothingIsTakenAlong(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	var headers []http.Header
	sim := cabletest.New(&cabletest.Options{Default: cabletest.Fault{Header: map[string]string{
		"Set-Cookie": "session=1; Path=/", "Alt-Svc": `h2="elsewhere.example:443"; ma=86400`, "Strict-Transport-Security": "max-age=9999",
	}}})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		headers = append(headers, r.Header.Clone())
		mu.Unlock()
		sim.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	c := newClientAt(t, cable.Config{RefreshKey: cable.NewSecret(sim.RefreshKey()), TokenURL: srv.URL + sim.Path()})
	mints(t, c)
	mints(t, c)
	mu.Lock()
	defer mu.Unlock()
	if diff := cmp.Diff(headers[0], headers[1]); diff != "" {
		t.Errorf("the second request's headers differ:\n%s", diff)
	}
}

// TestNew pins which configurations are refused, and that no refusal repeats
// the key.
func TestNew(t *testing.T) {
	t.Parallel()
	key := cable.NewSecret(cabletest.NewRefreshKey())
	cert := newAuthority(t).pem
	privateKey := "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIA==\n-----END PRIVATE KEY-----\n"
	for _, tt := range []struct {
		name string
		cfg  cable.Config
		want string // the whole error; "" for none
	}{
		{"default", cable.Config{RefreshKey: key}, ""},
		{"no key", cable.Config{}, "the refresh key is missing"},
		{"empty key", cable.Config{RefreshKey: cable.NewSecret("")}, "the refresh key is missing"},
		{"bad URL", cable.Config{RefreshKey: key, TokenURL: "ftp://h/"}, "token_url must begin with https:// (http:// for a loopback host only): write the whole endpoint, such as https://api.cable.tech/v2/auth/token"},
		{"certificate", cable.Config{RefreshKey: key, CACert: cert}, ""},
		{"certificate with space around", cable.Config{RefreshKey: key, CACert: "\n \n" + cert + "\n\n "}, ""},
		{"certificates with words between", cable.Config{RefreshKey: key, CACert: "My CA\n=====\n" + cert + "\nand another\n" + cert}, ""},
		{"no PEM", cable.Config{RefreshKey: key, CACert: "hello"}, "ca_cert is not PEM at block 1: write one or more CERTIFICATE blocks"},
		{"blank", cable.Config{RefreshKey: key, CACert: " \n"}, "ca_cert is not PEM at block 1: write one or more CERTIFICATE blocks"},
		{"PEM and something", cable.Config{RefreshKey: key, CACert: cert + "hello"}, "ca_cert is not PEM at block 2: write one or more CERTIFICATE blocks"},
		{"private key", cable.Config{RefreshKey: key, CACert: privateKey + cert}, "ca_cert holds a private key: write certificates only"},
		{"private key after", cable.Config{RefreshKey: key, CACert: cert + privateKey}, "ca_cert holds a private key: write certificates only"},
		// pem.Decode takes a block that it cannot read for words between blocks.
		{"spoilt private key", cable.Config{RefreshKey: key, CACert: strings.Replace(privateKey, "MC4C", "  M!C4C", 1) + cert}, "ca_cert holds a private key: write certificates only"},
		{"unended private key", cable.Config{RefreshKey: key, CACert: strings.Replace(privateKey, "-----END PRIVATE KEY-----", "", 1) + cert}, "ca_cert holds a private key: write certificates only"},
		{"indented private key", cable.Config{RefreshKey: key, CACert: "  " + strings.ReplaceAll(privateKey, "\n", "\n  ") + cert}, "ca_cert holds a private key: write certificates only"},
		{"not DER", cable.Config{RefreshKey: key, CACert: "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"}, "ca_cert holds a certificate that cannot be read in block 1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c, err := cable.New(tt.cfg)
			if err == nil {
				t.Cleanup(c.Close)
				if tt.want != "" {
					t.Errorf("accepted, want %q", tt.want)
				}
				return
			}
			t.Log(err)
			if err.Error() != tt.want || c != nil {
				t.Errorf("got %v, %q; want %q", c, err, tt.want)
			}
		})
	}
}

// TestCheckURL pins which endpoints are accepted. What it accepts is attacked
// in FuzzTokenURL.
func TestCheckURL(t *testing.T) {
	t.Parallel()
	const (
		white    = "token_url must not hold white space, control characters or backslashes"
		noURL    = "token_url is not a URL"
		scheme   = "token_url must begin with https://"
		noHost   = "token_url names no host"
		user     = "token_url must not hold a user name or password"
		query    = "token_url must not hold a query or a fragment"
		port     = "token_url names a port that is not a number from 1 to 65535"
		loopback = "token_url uses plain http for the host"
		host     = "token_url names a host that holds something other than letters"
	)
	for raw, want := range map[string]string{
		cable.DefaultTokenURL:                      "",
		"https://api.cable.tech":                   "",
		"https://api.cable.tech/":                  "",
		"https://api.cable.tech:8443/x":            "",
		"HTTPS://API.CABLE.TECH/x":                 "",
		"https://10.0.0.1/x":                       "",
		"https://[2001:db8::1]:443/x":              "",
		"http://localhost:1/x":                     "",
		"http://LocalHost/x":                       "",
		"http://127.0.0.1/x":                       "",
		"http://127.255.255.254:65535/x":           "",
		"http://[::1]:8080/x":                      "",
		"http://[::ffff:127.0.0.1]/x":              "",
		"":                                         scheme,
		"api.cable.tech":                           scheme,
		"api.cable.tech/v2/auth/token":             scheme,
		"//api.cable.tech/v2":                      scheme,
		"ftp://api.cable.tech/":                    scheme,
		"file:///etc/passwd":                       scheme,
		"unix:///var/run/docker.sock":              scheme,
		"https:api.cable.tech":                     noHost,
		"https:///v2/auth/token":                   noHost,
		"https://:443/":                            noHost,
		"https://user@api.cable.tech/":             user,
		"https://user:pass@api.cable.tech/":        user,
		"https://@api.cable.tech/":                 user,
		"https://api.cable.tech@evil.example/":     user,
		"http://localhost@evil.example/":           user,
		"https://api.cable.tech/?a=b":              query,
		"https://api.cable.tech/?":                 query,
		"https://api.cable.tech/#a":                query,
		"https://api.cable.tech/#":                 query,
		"https://api.cable.tech?a":                 query,
		"https://api.cable.tech:0/":                port,
		"https://api.cable.tech:/":                 port,
		"https://api.cable.tech:65536/":            port,
		"https://api.cable.tech:99999999999/":      port,
		"https://api.cable.tech:http/":             noURL,
		"https://[::1/":                            noURL,
		"https://api.cable.tech/%zz":               noURL,
		"https://api.cable.tech/a b":               white,
		" https://api.cable.tech/":                 white,
		"https://api.cable.tech/\n":                white,
		"https://api.cable.tech/\x00":              white,
		"https://api.cable.tech\t/":                white,
		`https://api.cable.tech\@evil.example/`:    white,
		"https://xn--e1aybc.example/":              "",
		"https://cable_api.internal/":              "",
		"https://[fe80::1%25eth0]/":                "",
		"https://арi.cable.tech/":                  host, // Cyrillic
		"https://api.cable.tech;evil.example/":     host,
		"https://api.cable.tech,evil.example/":     host,
		"https://api.cable.tech\"/":                host,
		"https://api.cable.tech&evil.example/":     host,
		"https://evil.example⁄api.cable.tech/":     host,
		"https://api%E2%80%A4cable.tech/":          host,
		"http://localhoſt/":                        host, // folds to an s
		"http://api.cable.tech/":                   loopback,
		"http://10.0.0.1/":                         loopback,
		"http://0.0.0.0/":                          loopback,
		"http://[::]/":                             loopback,
		"http://169.254.169.254/latest":            loopback,
		"http://localhost.evil.example/":           loopback,
		"http://localhost./":                       loopback,
		"http://127.0.0.1.nip.io/":                 loopback,
		"http://2130706433/":                       loopback,
		"http://0x7f.1/":                           loopback,
		"http://127.1/":                            loopback,
		"http://[::ffff:10.0.0.1]/":                loopback,
		"http://１２７.0.0.1/":                        host,
		"http://" + strings.Repeat("a", 10_000):    loopback,
		"http://evil.example/REFRESHKEYCANARY-etc": loopback,
	} {
		u, err := cable.CheckURL(raw)
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
