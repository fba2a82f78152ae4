// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// TestMain runs more tests at once than there are processors, unless a number is given, because most of them wait for a
// budget to run out.
func TestMain(m *testing.M) {
	flag.Parse()
	fuzzing := flag.Lookup("test.fuzz").Value.String() != ""
	if f := flag.Lookup("test.parallel"); !fuzzing && f.Value.String() == fmt.Sprint(runtime.GOMAXPROCS(0)) {
		_ = f.Value.Set("6")
	}
	os.Exit(m.Run())
}

const (
	testKey = "sk/REFRESHKEYCANARY+0123456789abcdef=="
	org     = cabletest.DefaultOrganizationID

	// budget is for tests in which a call must run into its end; slack is the time that a busy machine may add.
	// Other tests have a minute.
	budget = time.Second
	slack  = 15 * time.Second

	// Details that many errors have.
	connectionClosed = "the connection was closed before the response was complete"
	budgetRanOut     = "the budget of 1s ran out after the request was sent, waiting for the response"
	notHTTP          = "the connection broke off, or the response was not HTTP"
)

// testRequest is a valid request.
func testRequest() TokenRequest {
	return TokenRequest{OrganizationID: org, Scopes: []string{"transactions:write"}, Lifetime: time.Hour}
}

// newClient returns a client of srv, with cfg's other fields.
func newClient(t testing.TB, srv *cabletest.Server, cfg Config) *Client {
	t.Helper()
	cfg.RefreshKey = NewSecret(srv.RefreshKey())
	if cfg.TokenURL == "" {
		cfg.TokenURL = srv.URL
	}
	if cfg.CACert == "" {
		cfg.CACert = srv.CA
	}
	return newClientAt(t, cfg)
}

// newClientAt returns a client of cfg, whose key is testKey unless it is set.
func newClientAt(t testing.TB, cfg Config) *Client {
	t.Helper()
	if cfg.RefreshKey.IsZero() {
		cfg.RefreshKey = NewSecret(testKey)
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// mustMint requests a token and fails the test without one.
func mustMint(t testing.TB, c *Client) *Token {
	t.Helper()
	token, err := c.RequestToken(t.Context(), testRequest())
	if err != nil {
		t.Fatalf("no token: %v", err)
	}
	if !strings.Contains(token.Value.Reveal(), cabletest.TokenMarker) {
		t.Fatal("the token is not the simulator's")
	}
	return token
}

// mustFail requests a token and fails the test if it gets one. It logs the error, and checks that it is an *Error,
// bounded, and without a secret.
func mustFail(t testing.TB, ctx context.Context, c *Client) *Error {
	t.Helper()
	token, err := c.RequestToken(ctx, testRequest())
	return checkError(t, token, err)
}

func checkError(t testing.TB, token *Token, err error) *Error {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) || token != nil {
		t.Fatalf("got %v, %v; want an *Error alone", token, err)
	}
	t.Logf("%s: %s (attempts %d, maybe issued: %t)", e.Kind, e, e.Attempts, e.MaybeIssued)
	encoded, _ := json.Marshal(e)
	text := fmt.Sprintf("%v %+v %#v %s", err, err, err, encoded)
	for _, marker := range []string{cabletest.RefreshKeyMarker, cabletest.TokenMarker} {
		if strings.Contains(text, marker) {
			t.Errorf("the error contains a secret: %s", text)
		}
	}
	if len(e.Error()) > 700 {
		t.Errorf("the error's text has %d bytes", len(e.Error()))
	}
	return e
}

// mustFailInTime is mustFail within the budget.
func mustFailInTime(t testing.TB, c *Client) *Error {
	t.Helper()
	start := time.Now()
	e := mustFail(t, t.Context(), c)
	if took := time.Since(start); took > budget+slack {
		t.Errorf("took %s of a budget of %s", took, budget)
	}
	return e
}

// diffError compares errors except for RetryAfter, which depends on the clock.
func diffError(t testing.TB, want Error, got *Error) {
	t.Helper()
	if diff := cmp.Diff(&want, got, cmpopts.IgnoreFields(Error{}, "RetryAfter")); diff != "" {
		t.Errorf("error (-want +got):\n%s", diff)
	}
}

// checkCounts compares a simulator's counters.
func checkCounts(t testing.TB, srv *cabletest.Server, calls, minted int) {
	t.Helper()
	if s := srv.Stats(); s.Calls != calls || s.Minted != minted {
		t.Errorf("the simulator saw %d calls and minted %d tokens; want %d and %d", s.Calls, s.Minted, calls, minted)
	}
}

// rawServer listens on loopback and passes each connection to serve, whose return closes it.
func rawServer(t testing.TB, serve func(net.Conn)) (url string, connections *atomic.Int32) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	connections = serveRaw(t, listener, serve)
	return "http://" + listener.Addr().String() + "/v2/auth/token", connections
}

// serveRaw does so with a listener, which it closes.
func serveRaw(t testing.TB, listener net.Listener, serve func(net.Conn)) (connections *atomic.Int32) {
	t.Helper()
	connections = new(atomic.Int32)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var open []net.Conn
	wg.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			connections.Add(1)
			mu.Lock()
			open = append(open, conn)
			mu.Unlock()
			wg.Go(func() {
				defer func() { _ = conn.Close() }()
				serve(conn)
			})
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		mu.Lock()
		for _, conn := range open {
			_ = conn.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return connections
}

// readRequest reads a request whole and returns it as it was sent, or "".
func readRequest(conn net.Conn) string {
	var sent strings.Builder
	r, err := http.ReadRequest(bufio.NewReader(io.TeeReader(conn, &sent)))
	if err != nil {
		return ""
	}
	_, _ = io.Copy(io.Discard, r.Body)
	return sent.String()
}

// hang returns when the other side has closed the connection.
func hang(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) }

// memory is a RoundTripper that calls the simulator without a network, for tests in bubbles, where time is exact and
// costs nothing, because a bubble cannot wait for a network.
type memory struct{ *cabletest.Simulator }

// RoundTrip implements [http.RoundTripper].
func (m memory) RoundTrip(req *http.Request) (resp *http.Response, err error) {
	trace := httptrace.ContextClientTrace(req.Context())
	trace.GotConn(httptrace.GotConnInfo{})
	trace.WroteHeaders()
	defer func() {
		if p := recover(); p != nil { // the simulator's way to hang up
			resp, err = nil, errors.Join(req.Context().Err(), fmt.Errorf("hung up: %v", p))
		}
	}()
	w := httptest.NewRecorder()
	m.ServeHTTP(w, req)
	return w.Result(), nil
}

// newMemory returns a simulator in memory and a client of it.
func newMemory(t testing.TB, cfg Config) (*cabletest.Simulator, *Client) {
	t.Helper()
	sim := cabletest.New(nil)
	return sim, newMemoryClient(t, sim, cfg)
}

func newMemoryClient(t testing.TB, sim *cabletest.Simulator, cfg Config) *Client {
	t.Helper()
	cfg.RefreshKey, cfg.TokenURL = NewSecret(sim.RefreshKey()), "http://localhost"+sim.Path()
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	c.transport.RegisterProtocol("http", memory{sim})
	return c
}

// rateLimit is a 429.
func rateLimit(times int, retryAfter string) cabletest.Fault {
	return cabletest.Fault{Status: 429, Times: times, Header: map[string]string{"Retry-After": retryAfter}}
}

// mintAll runs n token requests at once and returns their errors, nil ones included.
func mintAll(t testing.TB, c *Client, n int) []error {
	t.Helper()
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { _, errs[i] = c.RequestToken(t.Context(), testRequest()) })
	}
	wg.Wait()
	return errs
}
