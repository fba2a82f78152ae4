// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// TestRequest pins the request, byte by byte where it matters.
func TestRequest(t *testing.T) {
	t.Parallel()
	const key = "the-key-of-this-test"
	for _, tt := range []struct {
		name          string
		cfg           Config
		path          string // of token_url
		uri           string // sent
		authorization string
	}{
		{"raw", Config{}, "/v2/auth/token", "/v2/auth/token", key},
		{"bearer", Config{Bearer: true}, "/v2/auth/token", "/v2/auth/token", "Bearer " + key},
		{"user agent", Config{UserAgent: "engine/1.2"}, "/v2/auth/token", "/v2/auth/token", key},
		{"no path", Config{}, "", "/", key},
		{"escaped path", Config{}, "/a%2Fb//../c", "/a%2Fb//../c", key},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			type sent struct {
				Method, URI, Host, Proto, Body string
				Length                         int64
				Header                         http.Header
			}
			requests := make(chan sent, 10)
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				requests <- sent{r.Method, r.RequestURI, r.Host, r.Proto, string(body), r.ContentLength, r.Header}
				fmt.Fprint(w, `{"token":"t","expiry":4102444800}`)
			}))
			t.Cleanup(srv.Close)
			cfg := tt.cfg
			cfg.RefreshKey, cfg.TokenURL = NewSecret(key), srv.URL+tt.path
			_, err := newClientAt(t, cfg).RequestToken(t.Context(), TokenRequest{
				OrganizationID: `org_"<é`,
				Scopes:         []string{"transactions:write", "person:read"},
				Lifetime:       time.Hour + 999*time.Millisecond,
			})
			if err != nil {
				t.Fatal(err)
			}
			body := `{"expiry_seconds":3600,"scopes":{"organization_id":"org_\"\u003cé",` +
				`"scopes":["transactions:write","person:read"]}}`
			want := sent{
				Method: "POST", URI: tt.uri, Host: strings.TrimPrefix(srv.URL, "http://"), Proto: "HTTP/1.1",
				Body: body, Length: int64(len(body)),
				Header: http.Header{
					"Authorization":   {tt.authorization},
					"Content-Type":    {"application/json"},
					"Accept":          {"application/json"},
					"Accept-Encoding": {"identity"},
					"Cache-Control":   {"no-store"},
					"Content-Length":  {fmt.Sprint(len(body))},
				},
			}
			if tt.cfg.UserAgent != "" {
				want.Header["User-Agent"] = []string{tt.cfg.UserAgent}
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

// TestClose pins that a call under way when its client is closed ends as it would, and that its connection is closed
// then.
func TestClose(t *testing.T) {
	t.Parallel()
	arrived, closed := make(chan struct{}), make(chan struct{})
	var once sync.Once
	srv := cabletest.NewTLSServer(t, &cabletest.Options{Log: func(cabletest.Call) {
		once.Do(func() {
			close(arrived)
			<-closed
		})
	}})
	c := newClient(t, srv, Config{})
	done := make(chan error)
	go func() {
		_, err := c.RequestToken(t.Context(), testRequest())
		done <- err
	}()
	<-arrived
	c.Close()
	close(closed)
	if err := <-done; err != nil {
		t.Errorf("the call under way: %v", err)
	}
	mustMint(t, c)
	if n := srv.Connections(); n != 2 {
		t.Errorf("%d connections, want 2", n)
	}
}

// TestCallsAreIndependent pins that a client keeps nothing of a response, no cookie and no other address.
func TestCallsAreIndependent(t *testing.T) {
	t.Parallel()
	headers := make(chan http.Header, 2)
	sim := cabletest.New(&cabletest.Options{Default: cabletest.Fault{Header: map[string]string{
		"Set-Cookie": "session=1; Path=/", "Alt-Svc": `h2="elsewhere.example:443"; ma=86400`,
		"Strict-Transport-Security": "max-age=9999",
	}}})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		headers <- r.Header.Clone()
		sim.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	c := newClientAt(t, Config{RefreshKey: NewSecret(sim.RefreshKey()), TokenURL: srv.URL + sim.Path()})
	mustMint(t, c)
	mustMint(t, c)
	if diff := cmp.Diff(<-headers, <-headers); diff != "" {
		t.Errorf("the second request's headers differ:\n%s", diff)
	}
}

// TestNew pins which configurations are refused. See also TestParseTokenURL and TestCheckCACert.
func TestNew(t *testing.T) {
	t.Parallel()
	key := NewSecret(testKey)
	const (
		noKey  = "the refresh key is missing"
		scheme = "token_url must begin with https:// (http:// for a loopback host only): " + exampleURL
		notPEM = "ca_cert is not PEM at block 1: write CERTIFICATE blocks only, without other text around them"
	)
	for _, tt := range []struct {
		name string
		cfg  Config
		want string // the whole error; "" for none
	}{
		{"default", Config{RefreshKey: key}, ""},
		{"no key", Config{}, noKey},
		{"empty key", Config{RefreshKey: NewSecret("")}, noKey},
		{"bad URL", Config{RefreshKey: key, TokenURL: "ftp://h/"}, scheme},
		{"certificate", Config{RefreshKey: key, CACert: newAuthority(t).pem}, ""},
		{"bad certificate", Config{RefreshKey: key, CACert: "hello"}, notPEM},
	} {
		c, err := New(tt.cfg)
		if got := fmt.Sprint(err); err != nil && got != tt.want || err == nil && tt.want != "" ||
			(c == nil) != (err != nil) {
			t.Errorf("%s: got %v, %q; want %q", tt.name, c, got, tt.want)
		}
	}
}
