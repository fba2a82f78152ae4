// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// errWithdrawn is the error of Allow in these tests.
var errWithdrawn = errors.New("the role was disabled")

// allowTimes returns an Allow that allows n times.
func allowTimes(n int) func() error {
	var asked atomic.Int32
	return func() error {
		if int(asked.Add(1)) > n {
			return fmt.Errorf("withdrawn: %w", errWithdrawn)
		}
		return nil
	}
}

// checkWithdrawn requests a token with allow, which must refuse.
func checkWithdrawn(t *testing.T, c *Client, allow func() error) {
	t.Helper()
	tr := testRequest()
	tr.Allow = allow
	token, err := c.RequestToken(t.Context(), tr)
	var e *Error
	if token != nil || !errors.Is(err, errWithdrawn) || err.Error() != "withdrawn: the role was disabled" ||
		errors.As(err, &e) {
		t.Errorf("got %v, %v; want the error of Allow as it is", token, err)
	}
}

// TestAllow pins that nothing is sent once Allow refuses, whether before a call, between its head and its body, and
// before and in its retry.
func TestAllow(t *testing.T) {
	t.Parallel()
	observed := 0
	observe := func(Call) { observed++ }
	for bits := range 4 {
		kept, times := bits&2 > 0, bits&1 // the connection is an earlier call's, or a new one
		srv := cabletest.NewTLSServer(t, nil)
		c := newClient(t, srv, Config{Observe: observe})
		if kept {
			mustMint(t, c)
		}
		srv.Reset()
		observed = 0
		checkWithdrawn(t, c, allowTimes(times))
		if s := srv.Stats(); s.Calls > 0 || observed > 0 || times == 0 && !kept && srv.Connections() > 0 {
			t.Errorf("allowed %d times: %+v, observed %d calls", times, s, observed)
		}
		mustMint(t, c)
	}
	srv := cabletest.NewServer(t, nil)
	c := newClient(t, srv, Config{})
	for times := 2; times < 4; times++ {
		srv.SetFault(rateLimit(1, "0"))
		checkWithdrawn(t, c, allowTimes(times)) // the retry
	}
	checkCounts(t, srv, 2, 0)
	srv.SetFault(rateLimit(1, "0"))
	tr := testRequest()
	tr.Allow = allowTimes(4)
	if _, err := c.RequestToken(t.Context(), tr); err != nil {
		t.Errorf("allowed: %v", err)
	}
}

// TestAllowAfterADial pins that no byte of a call is sent if Allow refuses while the connection is being made, however
// large the head is.
func TestAllowAfterADial(t *testing.T) {
	t.Parallel()
	for _, overTLS := range []bool{false, true} {
		listener, cfg := listen(t, overTLS)
		cfg.RefreshKey = NewSecret(strings.Repeat("k", 100_000))
		sent := make(chan int64, 1)
		serveRaw(t, listener, func(conn net.Conn) {
			n, _ := io.Copy(io.Discard, conn)
			sent <- n
		})
		c := newClientAt(t, cfg)
		var dialled atomic.Bool
		dial := c.transport.DialContext
		c.transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
			dialled.Store(true)
			return dial(ctx, network, address)
		}
		checkWithdrawn(t, c, func() error {
			if dialled.Load() {
				return allowTimes(0)()
			}
			return nil
		})
		if n := <-sent; n > 0 {
			t.Errorf("TLS %t: %d bytes were sent", overTLS, n)
		}
	}
}

// listen returns a listener, with TLS or without, and the configuration of a client of it.
func listen(t *testing.T, overTLS bool) (net.Listener, Config) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	if !overTLS {
		return listener, Config{TokenURL: "http://" + address, Timeout: time.Minute}
	}
	ca := newAuthority(t)
	listener = tls.NewListener(listener, &tls.Config{Certificates: []tls.Certificate{ca.issue(t, nil)}})
	return listener, Config{TokenURL: "https://" + address, CACert: ca.pem, Timeout: time.Minute}
}

// TestAllowPanics pins that a panic of Allow, which net/http may have called on a goroutine of its own, is one of the
// caller's goroutine.
func TestAllowPanics(t *testing.T) {
	t.Parallel()
	c := newClient(t, cabletest.NewTLSServer(t, nil), Config{})
	for times := range 2 {
		allow := allowTimes(times)
		tr := testRequest()
		var asked atomic.Int32
		tr.Allow = func() error {
			asked.Add(1)
			if allow() != nil {
				panic(errWithdrawn)
			}
			return nil
		}
		func() {
			defer func() {
				if p, _ := recover().(error); !errors.Is(p, errWithdrawn) {
					t.Errorf("%d: recovered %v", times, p)
				}
				if n := int(asked.Load()); n != times+1 {
					t.Errorf("%d: asked %d times, as if the panic were a fault of the network", times, n)
				}
			}()
			_, err := c.RequestToken(t.Context(), tr)
			t.Errorf("%d: no panic: %v", times, err)
		}()
	}
	mustMint(t, c)
	if n := len(c.turns); n > 0 {
		t.Errorf("%d calls under way", n)
	}
}

// TestEarlyResponse pins that a 200 that arrives before the request was sent, such as a second response to an earlier
// call, is refused, and that the request is not sent afterwards.
func TestEarlyResponse(t *testing.T) {
	t.Parallel()
	c := newClientAt(t, Config{TokenURL: "http://localhost/"})
	requests := make(chan *http.Request, 1)
	c.transport.RegisterProtocol("http", roundTripFunc(func(r *http.Request) (*http.Response, error) {
		requests <- r
		body := io.NopCloser(strings.NewReader(`{"token":"t","expiry":1711929600}`))
		return &http.Response{StatusCode: 200, Body: body}, nil
	}))
	want := Error{Kind: InvalidResponse, StatusCode: 200, Detail: "it arrived before the request was sent", Attempts: 1}
	diffError(t, want, mustFail(t, t.Context(), c))
	r := <-requests
	httptrace.ContextClientTrace(r.Context()).WroteHeaders()
	if body, err := io.ReadAll(r.Body); len(body) > 0 || err != nil {
		t.Errorf("the request was sent afterwards: %q, %v", body, err)
	}
}

// TestEnd pins that a response which overtakes the request does not make it one that was not sent.
func TestEnd(t *testing.T) {
	t.Parallel()
	for _, failed := range []bool{false, true} {
		tr := TokenRequest{Allow: func() error { return nil }}
		x := &exchange{request: &request{TokenRequest: tr, body: []byte("{}")}}
		x.conn = new(countingConn) // to which nothing was written yet
		if p, _ := x.end(failed); p.sent {
			t.Errorf("failed %t: sent before the gate opened", failed)
		}
		x.ended = false
		x.open()
		if p, _ := x.end(failed); p.sent == failed {
			t.Errorf("failed %t: sent %t", failed, p.sent)
		}
		resp := &http.Response{StatusCode: http.StatusBadGateway, Body: http.NoBody}
		r := &request{client: newClientAt(t, Config{})}
		r.client.Pause().begin(time.Minute) // by another call
		if e := r.failed(resp, !failed, func() {}); e.MaybeIssued == failed || e.RetryAfter > 0 {
			t.Errorf("a 502, sent %t: %+v", !failed, e)
		}
	}
	for _, stage := range []string{atResponse, atHead} {
		x := &exchange{request: &request{client: newClientAt(t, Config{})}, progress: progress{stage: stage}}
		if x.reached(atLookup); x.stage != stage {
			t.Errorf("another connection takes a call back from %s to %s", stage, x.stage)
		}
		for _, reused := range []bool{false, true} {
			if x.connected(httptrace.GotConnInfo{Reused: reused}); x.early == reused {
				t.Errorf("reused %t: an error can be the handshake's: %t", reused, x.early)
			}
			if x.responded(); x.early {
				t.Error("an error after a response can be the handshake's")
			}
		}
	}
}

// faultyConn is a connection whose writes fail with err, or are lost if that is nil, once faulty is set.
type faultyConn struct {
	net.Conn
	faulty *atomic.Bool
	err    error
}

func (c faultyConn) Write(p []byte) (int, error) {
	if !c.faulty.Load() {
		return c.Conn.Write(p)
	}
	if c.err != nil {
		return 0, c.err
	}
	return len(p), nil
}

// TestNothingWritten pins that a connection, kept or new, that turns out to be dead before anything was written counts
// as none. No token can have been issued, and the call is retried.
func TestNothingWritten(t *testing.T) {
	t.Parallel()
	for _, kept := range []bool{false, true} {
		srv := cabletest.NewServer(t, nil)
		c := newClient(t, srv, Config{Timeout: time.Minute})
		var dead atomic.Bool
		dials := 0
		c.transport.DialContext = counted(func(ctx context.Context, network, address string) (net.Conn, error) {
			if dials++; kept == (dials > 1) {
				return nil, &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
			}
			conn, err := new(net.Dialer).DialContext(ctx, network, address)
			return faultyConn{conn, &dead, syscall.EPIPE}, err
		})
		want, calls := Error{Kind: Unreachable, Detail: "connection refused", Attempts: 3}, 1
		if kept {
			mustMint(t, c)
		} else {
			dials, want.Detail, calls = 1, connectionClosed, 0
		}
		dead.Store(true)
		diffError(t, want, mustFail(t, t.Context(), c))
		checkCounts(t, srv, calls, calls)
	}
}

// TestClosedAtTheGate pins that nothing was sent if the server closes the connection, kept or new, before the call's
// first byte. The alert with which crypto/tls closes its side is not a part of the call, which is retried.
func TestClosedAtTheGate(t *testing.T) {
	t.Parallel()
	for n := range 4 {
		overTLS, kept := n&1 > 0, n&2 > 0
		listener, cfg := listen(t, overTLS)
		var connections, requests atomic.Int32
		atGate, noticed := make(chan struct{}), make(chan struct{})
		serveRaw(t, listener, func(conn net.Conn) {
			if c, ok := conn.(*tls.Conn); ok {
				_ = c.Handshake()
			}
			isFirst := connections.Add(1) == 1
			for !isFirst || kept && requests.Load() == 0 {
				if readRequest(conn) == "" {
					return
				}
				requests.Add(1)
				body := fmt.Sprintf(`{"token":"t","expiry":%d}`, time.Now().Add(time.Hour).Unix())
				_, _ = fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
			}
			<-atGate
		})
		c, want := newClientAt(t, cfg), int32(1)
		notice := sync.OnceFunc(func() { close(noticed) })
		c.transport.DialContext = counted(func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, network, address)
			return noticedConn{conn, notice}, err
		})
		if kept {
			want = 2
			if _, err := c.RequestToken(t.Context(), testRequest()); err != nil {
				t.Fatal(err)
			}
		}
		tr, asked := testRequest(), 0
		tr.Allow = func() error {
			if asked++; asked == 2 {
				close(atGate)
				<-noticed // by net/http
			}
			return nil
		}
		if _, err := c.RequestToken(t.Context(), tr); err != nil || requests.Load() != want {
			t.Errorf("TLS %t, kept %t: %v, %d requests", overTLS, kept, err, requests.Load())
		}
	}
}

// noticedConn is a connection that calls closed before it is closed.
type noticedConn struct {
	net.Conn
	closed func()
}

func (c noticedConn) Close() error {
	c.closed()
	return c.Conn.Close()
}

// cut is the point at which a server closes a connection.
type cut struct {
	kept     bool // in the connection's second exchange instead of its first
	response bool // in the response, which means that the call was processed
	at       int  // after so many bytes
	reset    bool // with RST instead of FIN
}

// serveCut serves a simulator on connections of which the first is cut.
func serveCut(t *testing.T, sim *cabletest.Simulator, p cut) (url string, idle <-chan struct{}) {
	var once sync.Once
	closed := make(chan struct{})
	url, _ = rawServer(t, func(conn net.Conn) {
		first := false
		once.Do(func() { first = true })
		br := bufio.NewReader(conn)
		for n := 0; ; n++ {
			here := first && (n == 1) == p.kept
			if here && !p.response {
				_, _ = io.CopyN(io.Discard, br, int64(p.at))
				break
			}
			r, err := http.ReadRequest(br)
			if err != nil {
				return
			}
			raw := respond(sim, r)
			if here {
				_, _ = conn.Write(raw[:p.at])
				break
			}
			_, _ = conn.Write(raw)
		}
		if p.reset {
			_ = conn.(*net.TCPConn).SetLinger(0)
		} else if p.kept && !p.response && p.at == 0 {
			_ = conn.(*net.TCPConn).CloseWrite()
			hang(conn) // until the client has noticed
		}
		_ = conn.Close()
		close(closed)
	})
	return url, closed
}

// respond returns a simulator's response as it is sent.
func respond(sim *cabletest.Simulator, r *http.Request) []byte {
	r.URL.Path = sim.Path()
	w := httptest.NewRecorder()
	sim.ServeHTTP(w, r)
	var raw bytes.Buffer
	_ = w.Result().Write(&raw)
	return raw.Bytes()
}

// TestCuts closes the connection at every point of an exchange, and compares with the knowledge of the server. A call
// that Cable processed is not repeated, and the error says that Cable may have issued a token; and a call that Cable
// cannot have processed, as on an idle connection that was closed, is repeated on another connection.
func TestCuts(t *testing.T) {
	t.Parallel()
	sim := cabletest.New(nil)
	lengths := make(chan [2]int, 1)
	url, _ := rawServer(t, func(conn net.Conn) {
		sent := readRequest(conn)
		r, _ := http.ReadRequest(bufio.NewReader(strings.NewReader(sent)))
		raw := respond(sim, r)
		_, _ = conn.Write(raw)
		lengths <- [2]int{len(sent), len(raw)}
	})
	mustMint(t, newClientAt(t, Config{RefreshKey: NewSecret(sim.RefreshKey()), TokenURL: url}))
	length := <-lengths
	for bits := range 8 {
		p := cut{kept: bits&1 > 0, response: bits&2 > 0, reset: bits&4 > 0}
		end := length[0] - 1
		if p.response {
			end = length[1]
		}
		t.Run(fmt.Sprintf("%+v", p), func(t *testing.T) {
			t.Parallel()
			for p.at = range end + 1 {
				if p.at > 2 && p.at < end-2 && p.at%19 != 0 {
					continue
				}
				checkCut(t, p, p.response && p.at == end)
			}
		})
	}
}

// checkCut makes the calls of one cut; whole says that the response is complete.
func checkCut(t *testing.T, p cut, whole bool) {
	t.Helper()
	sim := cabletest.New(nil)
	url, closed := serveCut(t, sim, p)
	c := newClientAt(t, Config{RefreshKey: NewSecret(sim.RefreshKey()), TokenURL: url, Timeout: time.Minute})
	before := 0
	if p.kept {
		mustMint(t, c)
		before = 1
	}
	idle := p.kept && !p.response && p.at == 0
	if idle {
		<-closed
	}
	_, err := c.RequestToken(t.Context(), testRequest())
	minted := len(sim.Minted()) - before
	var e *Error
	failed := errors.As(err, &e)
	switch {
	case minted > 1 || !failed && minted != 1:
		t.Errorf("%+v: %d tokens, %v", p, minted, err)
	case failed && (whole && !p.reset || idle && !p.reset):
		t.Errorf("%+v: %+v; want a token", p, e)
	case failed && (!e.MaybeIssued || e.Attempts != 1):
		t.Errorf("%+v: %+v", p, e)
	case !failed && p.response && !whole:
		t.Errorf("%+v: a token from a part of a response", p)
	}
}
