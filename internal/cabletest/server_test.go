// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cabletest_test

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// newClient returns a client of its own connections that trusts srv.
func newClient(t *testing.T, srv *cabletest.Server) *http.Client {
	t.Helper()
	transport := new(http.Transport)
	if srv.CA != "" {
		roots := x509.NewCertPool()
		if !roots.AppendCertsFromPEM([]byte(srv.CA)) {
			t.Fatalf("CA %q", srv.CA)
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: roots}
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// fakeTB stands in for the test that a server belongs to.
type fakeTB struct {
	testing.TB
	mu       sync.Mutex
	errors   []string
	cleanups []func()
}

func (f *fakeTB) Errorf(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.errors = append(f.errors, fmt.Sprintf(format, args...))
}

func (f *fakeTB) Cleanup(cleanup func()) { f.cleanups = append(f.cleanups, cleanup) }

func TestServerFailsTheTestOutsideItsPath(t *testing.T) {
	t.Parallel()
	tb := &fakeTB{TB: t}
	srv := cabletest.NewServer(tb, nil)
	client := newClient(t, srv)
	send := func(method, url string) int {
		r := newRequest(t, srv.Simulator, url, validBody)
		r.Method = method
		resp, _ := post(t, client, r)
		return resp.StatusCode
	}
	// An error inside the path is the caller's business, and so are faults.
	send("POST", srv.URL)
	send("GET", srv.URL)
	send("POST", srv.URL+"?query=1")
	srv.SetFault(cabletest.Fault{Status: 404, Times: 1})
	send("POST", srv.URL)
	if len(tb.errors) != 0 {
		t.Errorf("failed the test: %q", tb.errors)
	}

	base := strings.TrimSuffix(srv.URL, srv.Path())
	for _, path := range []string{"/", "/v2/auth/token", "/base/v2/auth/token/", "/base/v2/auth/Token"} {
		if status := send("POST", base+path); status != 404 {
			t.Errorf("%s: status = %d", path, status)
		}
	}
	want := []string{
		`simulator: POST "/" is outside the token endpoint "/base/v2/auth/token"`,
		`simulator: POST "/v2/auth/token" is outside the token endpoint "/base/v2/auth/token"`,
		`simulator: POST "/base/v2/auth/token/" is outside the token endpoint "/base/v2/auth/token"`,
		`simulator: POST "/base/v2/auth/Token" is outside the token endpoint "/base/v2/auth/token"`,
	}
	if diff := cmp.Diff(want, tb.errors); diff != "" {
		t.Errorf("errors (-want +got):\n%s", diff)
	}

	for _, cleanup := range tb.cleanups {
		cleanup()
	}
	if resp, err := client.Do(newRequest(t, srv.Simulator, srv.URL, validBody)); err == nil {
		t.Errorf("after cleanup: status %d", resp.StatusCode)
	}
	srv.Close() // twice is fine
}

func TestTLSServer(t *testing.T) {
	t.Parallel()
	srv := cabletest.NewTLSServer(t, nil)
	if !strings.HasPrefix(srv.URL, "https://127.0.0.1:") || !strings.HasSuffix(srv.URL, "/base/v2/auth/token") {
		t.Errorf("URL = %q", srv.URL)
	}
	client := newClient(t, srv)
	for range 3 {
		if resp, _ := post(t, client, newRequest(t, srv.Simulator, srv.URL, validBody)); resp.StatusCode != 200 {
			t.Errorf("status = %d", resp.StatusCode)
		}
	}
	if n := srv.Connections(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
}

func TestConnections(t *testing.T) {
	t.Parallel()
	srv := cabletest.NewServer(t, nil)
	for range 3 {
		client := newClient(t, srv)
		for range 2 {
			post(t, client, newRequest(t, srv.Simulator, srv.URL, validBody))
		}
	}
	if srv.Connections() != 3 || srv.CallCount() != 6 {
		t.Errorf("%d connections, %d calls; want 3, 6", srv.Connections(), srv.CallCount())
	}
	addresses := map[string]bool{}
	for _, c := range srv.Calls() {
		addresses[c.RemoteAddr] = true
	}
	if len(addresses) != 3 {
		t.Errorf("remote addresses: %v", addresses)
	}
}
