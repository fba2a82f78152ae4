// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// errWithdrawn is what Allow returns in these tests.
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
	if token != nil || !errors.Is(err, errWithdrawn) || err.Error() != "withdrawn: the role was disabled" || errors.As(err, &e) {
		t.Errorf("got %v, %v; want the error of Allow as it is", token, err)
	}
}

// TestAllow pins that nothing is sent once Allow refuses: before a call, before
// its retry, when the connection is there, and between head and body.
func TestAllow(t *testing.T) {
	t.Parallel()
	for name, newServer := range map[string]func(testing.TB, *cabletest.Options) *cabletest.Server{
		"HTTP/1.1": cabletest.NewServer, "HTTP/2.0": cabletest.NewTLSServer,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			observed := 0
			observe := func(Call) { observed++ }
			for _, kept := range []bool{false, true} { // the connection of an earlier call, or a new one
				for times := range 3 {
					srv := newServer(t, nil)
					c := newClient(t, srv, Config{Observe: observe})
					if kept {
						mustMint(t, c)
					}
					srv.Reset()
					observed = 0
					checkWithdrawn(t, c, allowTimes(times))
					if s := srv.Stats(); s.Minted > 0 || s.Calls > 0 && (name == "HTTP/1.1" || times < 2) || observed > 0 {
						t.Errorf("allowed %d times: %+v, observed %d calls", times, s, observed)
					}
				}
			}
			srv := newServer(t, nil)
			c := newClient(t, srv, Config{})
			srv.SetFault(rateLimit(1, "0"))
			checkWithdrawn(t, c, allowTimes(3)) // the retry
			checkCounts(t, srv, 1, 0)
			srv.SetFault(rateLimit(1, "0"))
			tr := testRequest()
			tr.Allow = allowTimes(6)
			if _, err := c.RequestToken(t.Context(), tr); err != nil {
				t.Errorf("allowed: %v", err)
			}
			if got := srv.Calls()[0].Proto; got != name {
				t.Errorf("spoke %s", got)
			}
		})
	}
}

// TestAllowAfterADial pins that no byte of a call is sent if Allow refuses while
// the connection is being made, however large the head is.
func TestAllowAfterADial(t *testing.T) {
	t.Parallel()
	key := NewSecret(strings.Repeat("k", 100_000))
	count := func(conn net.Conn) int64 {
		n, _ := io.Copy(io.Discard, conn)
		return n
	}
	for name, tt := range map[string]struct {
		scheme string
		protos []string
		count  func(net.Conn) int64 // bytes or frames of requests
	}{
		"HTTP/1.1":          {"http", nil, count},
		"HTTP/1.1 over TLS": {"https", nil, count},
		"HTTP/2": {"https", []string{"h2"}, func(conn net.Conn) (frames int64) {
			serveHTTP2(conn, func(_ net.Conn, _, _ byte, stream uint32) { frames += int64(min(stream, 1)) })
			return frames
		}},
	} {
		for times := 1; times < 3; times++ {
			t.Run(fmt.Sprint(name, " ", times), func(t *testing.T) {
				t.Parallel()
				if name == "HTTP/2" && times == 2 {
					t.Skip("the head of a request is sent before its body")
				}
				ca := newAuthority(t)
				listener, err := net.Listen("tcp", "127.0.0.1:0")
				if err != nil {
					t.Fatal(err)
				}
				cfg := Config{RefreshKey: key, TokenURL: tt.scheme + "://" + listener.Addr().String() + "/", CACert: ca.pem, Timeout: time.Minute}
				if tt.scheme == "https" {
					listener = tls.NewListener(listener, &tls.Config{Certificates: []tls.Certificate{ca.issue(t, nil)}, NextProtos: tt.protos})
				}
				sent := make(chan int64, 1)
				serveRaw(t, listener, func(conn net.Conn) { sent <- tt.count(conn) })
				c := newClientAt(t, cfg)
				dialling, proceed := make(chan struct{}), make(chan struct{})
				dialled := make(chan net.Conn, 1)
				dial := c.transport.DialContext
				c.transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
					close(dialling)
					<-proceed
					conn, err := dial(ctx, network, address)
					dialled <- conn
					return conn, err
				}
				allow := allowTimes(times)
				if times == 1 {
					var disabled atomic.Bool
					go func() {
						<-dialling
						disabled.Store(true)
						close(proceed)
					}()
					allow = func() error {
						if disabled.Load() {
							return fmt.Errorf("withdrawn: %w", errWithdrawn)
						}
						return nil
					}
				} else {
					close(proceed)
				}
				checkWithdrawn(t, c, allow)
				_ = (<-dialled).Close()
				if n := <-sent; n > 0 {
					t.Errorf("%d bytes or frames were sent", n)
				}
			})
		}
	}
}

// TestAllowPanics pins that a panic of Allow, which net/http may have called on
// a goroutine of its own, is one of the caller's goroutine.
func TestAllowPanics(t *testing.T) {
	t.Parallel()
	for _, newServer := range []func(testing.TB, *cabletest.Options) *cabletest.Server{cabletest.NewServer, cabletest.NewTLSServer} {
		srv := newServer(t, nil)
		c := newClient(t, srv, Config{})
		for times := range 3 {
			allow := allowTimes(times)
			tr := testRequest()
			tr.Allow = func() error {
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
}

// newHTTP2Client returns a client of a server that speaks as much of HTTP/2 as
// these tests need.
func newHTTP2Client(t *testing.T, handle func(conn net.Conn, kind, flags byte, stream uint32)) (c *Client, connections *atomic.Int32) {
	t.Helper()
	ca := newAuthority(t)
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{ca.issue(t, nil)}, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	connections = serveRaw(t, listener, func(conn net.Conn) { serveHTTP2(conn, handle) })
	return newClientAt(t, Config{TokenURL: "https://" + listener.Addr().String() + "/", CACert: ca.pem, Timeout: time.Minute}), connections
}

const ( // RFC 9113, 6
	frameData     = 0
	frameReset    = 3
	frameSettings = 4
	frameGoAway   = 7
	flagEndStream = 1
	flagAck       = 1
)

// serveHTTP2 allows one stream on conn, and passes each frame to handle.
func serveHTTP2(conn net.Conn, handle func(conn net.Conn, kind, flags byte, stream uint32)) {
	const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	_, _ = io.ReadFull(conn, make([]byte, len(preface)))
	_, _ = io.WriteString(conn, "\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x01") // SETTINGS_MAX_CONCURRENT_STREAMS = 1
	for {
		head := make([]byte, 9)
		if _, err := io.ReadFull(conn, head); err != nil {
			return
		}
		length := int64(head[0])<<16 | int64(head[1])<<8 | int64(head[2])
		_, _ = io.CopyN(io.Discard, conn, length)
		kind, flags := head[3], head[4]
		if kind == frameSettings && flags == 0 {
			writeFrame(conn, frameSettings, flagAck, 0)
		}
		handle(conn, kind, flags, binary.BigEndian.Uint32(head[5:]))
	}
}

func writeFrame(conn net.Conn, kind, flags byte, stream uint32, payload ...uint32) {
	frame := []byte{0, 0, byte(4 * len(payload)), kind, flags}
	for _, n := range append([]uint32{stream}, payload...) {
		frame = binary.BigEndian.AppendUint32(frame, n)
	}
	_, _ = conn.Write(frame)
}

// TestNoReplay pins that net/http does not repeat a call that the server ended,
// in whatever way: after some codes, and after GOAWAY, it would.
func TestNoReplay(t *testing.T) {
	t.Parallel()
	reset := func(code uint32) func(net.Conn, uint32) {
		return func(conn net.Conn, stream uint32) { writeFrame(conn, frameReset, 0, stream, code) }
	}
	for name, end := range map[string]func(conn net.Conn, stream uint32){
		"NO_ERROR":           reset(0),
		"PROTOCOL_ERROR":     reset(1),
		"INTERNAL_ERROR":     reset(2),
		"REFUSED_STREAM":     reset(7),
		"CANCEL":             reset(8),
		"ENHANCE_YOUR_CALM":  reset(11),
		"GOAWAY":             func(conn net.Conn, _ uint32) { writeFrame(conn, frameGoAway, 0, 0, 0, 0) },
		"GOAWAY, with error": func(conn net.Conn, _ uint32) { writeFrame(conn, frameGoAway, 0, 0, 0, 1) },
		"connection closed":  func(conn net.Conn, _ uint32) { _ = conn.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var requests atomic.Int32
			c, _ := newHTTP2Client(t, func(conn net.Conn, kind, flags byte, stream uint32) {
				if kind == frameData && flags == flagEndStream {
					requests.Add(1)
					end(conn, stream)
				}
			})
			diffError(t, Error{Kind: Unreachable, Detail: connectionClosed, MaybeIssued: true, Attempts: 1}, mustFail(t, t.Context(), c))
			if n := requests.Load(); n != 1 {
				t.Errorf("%d requests, want 1", n)
			}
		})
	}
}

// TestEarlyResponse pins that a 200 that arrives before the request was sent,
// such as a second response to an earlier call, is refused, and that the request
// is not sent afterwards.
func TestEarlyResponse(t *testing.T) {
	t.Parallel()
	c := newClientAt(t, Config{TokenURL: "http://localhost/"})
	requests := make(chan *http.Request, 1)
	c.transport.RegisterProtocol("http", roundTripFunc(func(r *http.Request) (*http.Response, error) {
		requests <- r
		return &http.Response{StatusCode: 200, Body: io.NopCloser(strings.NewReader(`{"token":"t","expiry":1711929600}`))}, nil
	}))
	diffError(t, Error{Kind: InvalidResponse, StatusCode: 200, Detail: "it arrived before the request was sent", Attempts: 1}, mustFail(t, t.Context(), c))
	r := <-requests
	httptrace.ContextClientTrace(r.Context()).WroteHeaders()
	if body, err := io.ReadAll(r.Body); len(body) > 0 || err != nil {
		t.Errorf("the request was sent afterwards: %q, %v", body, err)
	}
}
