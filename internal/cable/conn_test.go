// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// TestOnlyLoopback pins that plain http goes nowhere but to this machine,
// whatever its host's name resolves to: New's own dialer looks at the address.
func TestOnlyLoopback(t *testing.T) {
	t.Parallel()
	c, err := New(Config{RefreshKey: NewSecret(testKey), TokenURL: "http://localhost:1/", Timeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	// Behind CheckURL's back, as a name that resolves so would be.
	for _, host := range []string{"192.0.2.1:80", "[2001:db8::1]:80", "0.0.0.0:80", "[::]:80", "169.254.169.254:80"} {
		u := *c.url
		u.Host = host
		c.url = &u
		e := refused(t, t.Context(), c)
		want := &Error{Kind: Unreachable, Detail: "plain http is for loopback addresses only, and the host resolves to another", Attempts: 1}
		if diff := cmp.Diff(want, e); diff != "" {
			t.Errorf("%s (-want +got):\n%s", host, diff)
		}
	}
	for address, ok := range map[string]bool{
		"127.0.0.1:80": true, "127.255.0.1:80": true, "[::1]:80": true, "[::ffff:127.0.0.1]:80": true,
		"10.0.0.1:80": false, "[::ffff:10.0.0.1]:80": false, "0.0.0.0:80": false, "[fe80::1%lo]:80": false, "": false, "nonsense": false,
	} {
		if err := onlyLoopback("tcp", address, nil); (err == nil) != ok {
			t.Errorf("%s: %v", address, err)
		}
	}
	// A URL with https may go anywhere.
	if c, err = New(Config{RefreshKey: NewSecret(testKey)}); err != nil || c.transport.Proxy == nil {
		t.Errorf("the proxy of the environment is not asked: %v", err)
	}
}

// nameServer is a DNS server that gives every question the same code and, for
// the code 0, one address.
func nameServer(t *testing.T, code byte, answer netip.Addr) *net.Resolver {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	go func() {
		buf := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			question := buf[12:]
			end := strings.IndexByte(string(question), 0) + 5
			reply := append([]byte{buf[0], buf[1], 0x81, 0x80 | code, 0, 1, 0, 0, 0, 0, 0, 0}, question[:min(end, n-12)]...)
			if isA := binary.BigEndian.Uint16(question[end-4:]) == 1; code == 0 && isA {
				reply[7] = 1
				reply = append(reply, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4)
				reply = append(reply, answer.AsSlice()...)
			}
			_, _ = conn.WriteTo(reply, from)
		}
	}()
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "udp", conn.LocalAddr().String())
	}}
}

// TestNames pins what is said where a name leads nowhere. No request is made,
// and the look-up is repeated.
func TestNames(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		code byte
		want string
	}{
		{"no such name", 3, `looking up the host "nowhere.example": no such host`},
		{"no address", 0, `looking up the host "nowhere.example": no such host`},
		{"a failing name server", 2, `looking up the host "nowhere.example": the name server did not answer`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c, err := New(Config{RefreshKey: NewSecret(testKey), TokenURL: "https://nowhere.example/v2/auth/token", Timeout: 5 * time.Second})
			if err != nil {
				t.Fatal(err)
			}
			c.transport.Proxy = nil
			resolver := nameServer(t, tt.code, netip.Addr{})
			if tt.name == "no address" {
				resolver = nameServer(t, tt.code|0x40, netip.Addr{}) // not code 0: no address is appended
			}
			c.transport.DialContext = (&net.Dialer{Resolver: resolver}).DialContext
			want := &Error{Kind: Unreachable, Detail: tt.want, Attempts: 3}
			if diff := cmp.Diff(want, refused(t, t.Context(), c)); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
		})
	}
}

// TestResolvesElsewhere pins with a real name server that a name of plain http
// which leads off this machine is not called.
func TestResolvesElsewhere(t *testing.T) {
	t.Parallel()
	c, err := New(Config{RefreshKey: NewSecret(testKey), TokenURL: "http://localhost/", Timeout: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	u := *c.url
	u.Host = "rebound.example"
	c.url = &u
	c.transport.DialContext = (&net.Dialer{Resolver: nameServer(t, 0, netip.MustParseAddr("192.0.2.1")), Control: onlyLoopback}).DialContext
	if e := refused(t, t.Context(), c); e.Detail != errNotLoopback.Error() || e.Attempts != 1 || e.MaybeIssued {
		t.Errorf("got %+v", e)
	}
}

// deadConn fails each write once dead is set.
type deadConn struct {
	net.Conn
	dead *atomic.Bool
}

func (c deadConn) Write(p []byte) (int, error) {
	if c.dead.Load() {
		return 0, &net.OpError{Op: "write", Err: syscall.EPIPE}
	}
	return c.Conn.Write(p)
}

// TestNothingWritten pins that a kept connection which turns out to be dead
// before anything was written counts as none: no token can have been minted,
// and the connection that is made instead may fail and be repeated.
func TestNothingWritten(t *testing.T) {
	t.Parallel()
	srv := cabletest.NewServer(t, nil)
	c, err := New(Config{RefreshKey: NewSecret(srv.RefreshKey()), TokenURL: srv.URL, Timeout: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	var dead atomic.Bool
	dial := c.transport.DialContext
	c.transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		if dead.Load() {
			return nil, &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
		}
		conn, err := dial(ctx, network, address)
		return deadConn{conn, &dead}, err
	}
	if _, err := c.RequestToken(t.Context(), ask()); err != nil {
		t.Fatal(err)
	}
	dead.Store(true)
	want := &Error{Kind: Unreachable, Detail: "connection refused", Attempts: 3}
	if diff := cmp.Diff(want, refused(t, t.Context(), c)); diff != "" {
		t.Errorf("error (-want +got):\n%s", diff)
	}
	if n := srv.CallCount(); n != 1 {
		t.Errorf("%d calls, want 1", n)
	}
}

// relay passes TCP on until it is told to swallow: then connections stay open
// and nothing comes through, as behind a firewall that forgot them.
type relay struct {
	address string
	mu      sync.Mutex
	swallow []*atomic.Bool // one of each connection
}

func newRelay(t *testing.T, to string) *relay {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	r := &relay{address: listener.Addr().String()}
	go func() {
		for {
			in, err := listener.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", to)
			if err != nil {
				_ = in.Close()
				continue
			}
			swallow := new(atomic.Bool)
			r.mu.Lock()
			r.swallow = append(r.swallow, swallow)
			r.mu.Unlock()
			pass := func(to, from net.Conn) {
				buf := make([]byte, 32<<10)
				for {
					n, err := from.Read(buf)
					if swallow.Load() && err == nil {
						continue
					}
					if _, werr := to.Write(buf[:n]); err != nil || werr != nil {
						_ = to.Close()
						return
					}
				}
			}
			go pass(in, out)
			go pass(out, in)
		}
	}()
	return r
}

// forget makes every connection of now swallow what it gets.
func (r *relay) forget() (connections int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.swallow {
		s.Store(true)
	}
	return len(r.swallow)
}

// TestForgottenConnection pins that a connection which the network forgot
// costs the requests that are on it, not all that come for minutes: HTTP/2 puts
// each new request on it again, until a ping finds that nobody is there.
func TestForgottenConnection(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		new  func(testing.TB, *cabletest.Options) *cabletest.Server
	}{
		{"HTTP/1.1", cabletest.NewServer},
		{"HTTP/2.0", cabletest.NewTLSServer},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			srv := tt.new(t, nil)
			_, hostPath, _ := strings.Cut(srv.URL, "://")
			address, _, _ := strings.Cut(hostPath, "/")
			r := newRelay(t, address)
			c, err := New(Config{
				RefreshKey: NewSecret(srv.RefreshKey()), TokenURL: strings.Replace(srv.URL, address, r.address, 1),
				CACert: srv.CA, Timeout: 3 * time.Second,
			})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(c.Close)
			if h2 := c.transport.HTTP2; h2 == nil || h2.SendPingTimeout <= 0 || h2.SendPingTimeout+h2.PingTimeout > DefaultTimeout {
				t.Fatalf("a dead HTTP/2 connection is not found within the budget: %+v", h2)
			}
			// The same, faster, and still with room for a busy machine.
			c.transport.HTTP2 = &http.HTTP2Config{SendPingTimeout: 500 * time.Millisecond, PingTimeout: time.Second}
			if _, err := c.RequestToken(t.Context(), ask()); err != nil {
				t.Fatal(err)
			}
			if got := srv.Calls()[0].Proto; got != tt.name {
				t.Fatalf("spoke %s", got)
			}
			if n := r.forget(); n != 1 {
				t.Fatalf("%d connections", n)
			}
			if e := refused(t, t.Context(), c); !e.MaybeIssued || e.Attempts != 1 || tt.name == "HTTP/2.0" && e.Detail != "the connection was closed before the answer was whole" {
				t.Errorf("on the forgotten connection: %+v", e)
			}
			if _, err := c.RequestToken(t.Context(), ask()); err != nil {
				t.Errorf("the next request: %v", err)
			}
		})
	}
}

// TestBodyIsWhole pins that a repeat sends the body again, whole.
func TestBodyIsWhole(t *testing.T) {
	t.Parallel()
	sim, c := newMemory(t, Config{})
	bodies := make(chan string, 3)
	c.transport = &http.Transport{}
	c.transport.RegisterProtocol("http", roundTripFunc(func(r *http.Request) (*http.Response, error) {
		raw, _ := io.ReadAll(r.Body)
		bodies <- string(raw)
		if len(bodies) < 3 {
			return nil, errors.New("not connected")
		}
		r.Body = io.NopCloser(strings.NewReader(string(raw)))
		return memory{sim}.RoundTrip(r)
	}))
	c.http.HTTPClient.Transport = roundTripper{c.transport, c.hold, func(Call) {}}
	if _, err := c.RequestToken(t.Context(), ask()); err != nil {
		t.Fatal(err)
	}
	first := <-bodies
	for range 2 {
		if got := <-bodies; got != first || len(got) < 50 {
			t.Errorf("sent %q, then %q", first, got)
		}
	}
}

type roundTripFunc func(*http.Request) (*http.Response, error)

func (f roundTripFunc) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
