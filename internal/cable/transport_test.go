// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// TestConnectionsAreReused pins that concurrent calls reuse connections: Go's
// default of two idle ones would make 62 of 64 reconnect in each round.
func TestConnectionsAreReused(t *testing.T) {
	t.Parallel()
	for name, newServer := range map[string]func(testing.TB, *cabletest.Options) *cabletest.Server{
		"HTTP/1.1": cabletest.NewServer, "HTTP/2.0": cabletest.NewTLSServer,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			// Each response is delayed, so that all calls are under way at once.
			srv := newServer(t, &cabletest.Options{Default: cabletest.Fault{Delay: 10 * time.Millisecond}})
			c := newClient(t, srv, Config{})
			for range 11 {
				if err := errors.Join(mintAll(t, c, maxConns)...); err != nil {
					t.Fatal(err)
				}
			}
			if n := srv.Connections(); n > maxConns {
				t.Errorf("%d connections for %d calls", n, srv.CallCount())
			}
			if got := srv.Calls()[0].Proto; got != name {
				t.Errorf("spoke %s, want %s", got, name)
			}
			tokens := map[string]bool{}
			for _, m := range srv.Minted() {
				tokens[m.Token] = true
			}
			if len(tokens) != 11*maxConns {
				t.Errorf("%d tokens, want %d", len(tokens), 11*maxConns)
			}
		})
	}
}

// TestConnectionsAreBounded pins that 300 calls to a server that hangs open at
// most 64 connections; that the wait for one counts as time before a request
// was sent; and that a caller that leaves while it waits takes no place.
func TestConnectionsAreBounded(t *testing.T) {
	t.Parallel()
	for _, http2 := range []bool{false, true} {
		t.Run(fmt.Sprint("HTTP/2 ", http2), func(t *testing.T) {
			t.Parallel()
			sim := cabletest.New(nil)
			arrived, release := make(chan struct{}, 300), make(chan struct{})
			srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				arrived <- struct{}{}
				<-release
				sim.ServeHTTP(w, r)
			}))
			srv.Config.ConnState = sim.ConnState
			srv.EnableHTTP2 = http2
			srv.StartTLS()
			t.Cleanup(srv.Close)
			c := newClientAt(t, Config{RefreshKey: NewSecret(sim.RefreshKey()), TokenURL: srv.URL + sim.Path(), CACert: string(pemOf(srv.Certificate()))})
			var calls sync.WaitGroup
			call := func(ctx context.Context, check func(*Token, error)) {
				calls.Go(func() { check(c.RequestToken(ctx, testRequest())) })
			}
			succeed := func(_ *Token, err error) {
				if err != nil {
					t.Error(err)
				}
			}
			for range maxConns {
				call(t.Context(), succeed)
			}
			for range maxConns {
				<-arrived
			}
			ctx, leave := context.WithCancel(t.Context())
			late, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			defer cancel()
			var left sync.WaitGroup
			for i := range 300 - maxConns {
				left.Add(1)
				want := Error{Kind: Canceled, Detail: "the caller left before a request was sent"}
				ctx := ctx
				if i == 0 {
					ctx, want = late, Error{Kind: TimedOut, Detail: "the caller's deadline passed before a request was sent"}
				}
				call(ctx, func(token *Token, err error) {
					defer left.Done()
					diffError(t, want, checkError(t, token, err))
				})
			}
			call(t.Context(), succeed) // in line among them
			<-late.Done()
			leave()
			left.Wait()
			if n := sim.Connections(); n > maxConns {
				t.Errorf("%d connections", n)
			}
			if len(arrived) > 0 {
				t.Errorf("more than %d calls arrived", maxConns)
			}
			close(release)
			calls.Wait()
		})
	}
}

// TestStreamsAreBounded pins the same for an HTTP/2 server that allows one
// stream per connection: net/http does not count such connections.
func TestStreamsAreBounded(t *testing.T) {
	t.Parallel()
	arrived := make(chan struct{}, 100)
	c, connections := newHTTP2Client(t, func(_ net.Conn, kind, flags byte, _ uint32) {
		if kind == frameSettings && flags == flagAck {
			arrived <- struct{}{} // the client knows the limit
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var calls sync.WaitGroup
	for i := range maxConns + 20 {
		calls.Go(func() { mustFail(t, ctx, c) })
		if i < maxConns {
			<-arrived
		}
	}
	cancel()
	calls.Wait()
	if n := connections.Load(); n != maxConns {
		t.Errorf("%d connections, want %d", n, maxConns)
	}
}

// TestDialsAreBounded pins the same for connections that are never made:
// net/http continues to dial after the caller has left.
func TestDialsAreBounded(t *testing.T) {
	t.Parallel()
	url, connections := rawServer(t, hang) // no TLS handshake
	c := newClientAt(t, Config{TokenURL: strings.Replace(url, "http:", "https:", 1), Timeout: 20 * time.Millisecond})
	for range 5 {
		for _, err := range mintAll(t, c, maxConns) {
			if e := checkError(t, nil, err); e.Kind != TimedOut || e.MaybeIssued {
				t.Errorf("%+v", e)
			}
		}
	}
	if n := connections.Load(); n == 0 || n > maxConns {
		t.Errorf("%d connections", n)
	}
}

// TestErrorsKeepConnections pins that an error response, which is read to its
// end, costs no connection.
func TestErrorsKeepConnections(t *testing.T) {
	t.Parallel()
	srv := cabletest.NewServer(t, nil)
	c := newClient(t, srv, Config{})
	for _, status := range []int{400, 401, 404, 500, 502, 503} {
		srv.SetFault(cabletest.Fault{Status: status, Times: 1, Message: strings.Repeat("long ", 1000)})
		if e := mustFail(t, t.Context(), c); e.StatusCode != status {
			t.Errorf("status %d, want %d", e.StatusCode, status)
		}
		mustMint(t, c)
	}
	if n := srv.Connections(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
}

// clientOfHost returns a client whose URL has a host that ParseTokenURL would
// refuse: the stand-in for a name that resolves to something else.
func clientOfHost(t *testing.T, host string) *Client {
	t.Helper()
	c := newClientAt(t, Config{TokenURL: "http://localhost:1/", Timeout: 5 * time.Second})
	u := *c.url
	u.Host = host
	c.url = &u
	return c
}

// TestOnlyLoopback pins that plain http goes nowhere but to this machine,
// whatever its host's name resolves to.
func TestOnlyLoopback(t *testing.T) {
	t.Parallel()
	want := Error{Kind: Unreachable, Detail: "plain http is for loopback addresses only, and the host resolves to another", Attempts: 1}
	for _, host := range []string{"192.0.2.1:80", "[2001:db8::1]:80", "0.0.0.0:80", "[::]:80", "169.254.169.254:80"} {
		diffError(t, want, mustFail(t, t.Context(), clientOfHost(t, host)))
	}
	c := clientOfHost(t, "rebound.example")
	c.transport.DialContext = (&net.Dialer{Resolver: nameServer(t, 0, netip.MustParseAddr("192.0.2.1")), Control: onlyLoopback}).DialContext
	diffError(t, want, mustFail(t, t.Context(), c))
	for address, ok := range map[string]bool{
		"127.0.0.1:80": true, "127.255.0.1:80": true, "[::1]:80": true, "[::ffff:127.0.0.1]:80": true,
		"10.0.0.1:80": false, "[::ffff:10.0.0.1]:80": false, "0.0.0.0:80": false, "[fe80::1%lo]:80": false, "": false, "nonsense": false,
	} {
		if err := onlyLoopback("tcp", address, nil); (err == nil) != ok {
			t.Errorf("%s: %v", address, err)
		}
	}
}

// nameServer starts a DNS server that responds to every query with the same
// code and, for the code 0, one address.
func nameServer(t *testing.T, code byte, addr netip.Addr) *net.Resolver {
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
				reply = append(reply, addr.AsSlice()...)
			}
			_, _ = conn.WriteTo(reply, from)
		}
	}()
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "udp", conn.LocalAddr().String())
	}}
}

// TestNames pins the errors for a name without an address. No request is sent,
// and the look-up is retried.
func TestNames(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		code byte
		want string
	}{
		{"no such name", 3, "looking up nowhere.example: no such host"},
		{"no address", 0x40, "looking up nowhere.example: no such host"}, // code 0, with a bit that adds no address
		{"a failing name server", 2, "looking up nowhere.example: the name server did not respond"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := newClientAt(t, Config{TokenURL: "https://nowhere.example/v2/auth/token", Timeout: 5 * time.Second})
			c.transport.Proxy = nil
			c.transport.DialContext = (&net.Dialer{Resolver: nameServer(t, tt.code, netip.Addr{})}).DialContext
			diffError(t, Error{Kind: Unreachable, Detail: tt.want, Attempts: 3}, mustFail(t, t.Context(), c))
		})
	}
}

// faultyConn is a connection whose writes fail with err, or are lost if that is
// nil, once faulty is set.
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

// TestNothingWritten pins that a kept connection which turns out to be dead
// before anything was written counts as none: no token can have been issued, and
// the connection that replaces it may fail and be retried.
func TestNothingWritten(t *testing.T) {
	t.Parallel()
	srv := cabletest.NewServer(t, nil)
	c := newClient(t, srv, Config{Timeout: 5 * time.Second})
	var dead atomic.Bool
	dial := c.transport.DialContext
	c.transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		if dead.Load() {
			return nil, &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
		}
		conn, err := dial(ctx, network, address)
		return faultyConn{conn, &dead, syscall.EPIPE}, err
	}
	mustMint(t, c)
	dead.Store(true)
	diffError(t, Error{Kind: Unreachable, Detail: "connection refused", Attempts: 3}, mustFail(t, t.Context(), c))
	checkCounts(t, srv, 1, 1)
}

// TestForgottenConnection pins that a connection that the network has forgotten
// fails the calls on it, not all calls for minutes: HTTP/2 puts each new call on
// it too, until a ping is not returned.
func TestForgottenConnection(t *testing.T) {
	t.Parallel()
	for name, newServer := range map[string]func(testing.TB, *cabletest.Options) *cabletest.Server{
		"HTTP/1.1": cabletest.NewServer, "HTTP/2.0": cabletest.NewTLSServer,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := newServer(t, nil)
			c := newClient(t, srv, Config{Timeout: 3 * time.Second})
			if h2 := c.transport.HTTP2; h2 == nil || h2.SendPingTimeout <= 0 || h2.SendPingTimeout+h2.PingTimeout > DefaultTimeout {
				t.Fatalf("a dead HTTP/2 connection is not found within the budget: %+v", h2)
			}
			// The same, faster, and still with room for a busy machine.
			c.transport.HTTP2 = &http.HTTP2Config{SendPingTimeout: 500 * time.Millisecond, PingTimeout: time.Second}
			var forgotten *atomic.Bool
			dial := c.transport.DialContext
			c.transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
				conn, err := dial(ctx, network, address)
				forgotten = new(atomic.Bool)
				return faultyConn{conn, forgotten, nil}, err
			}
			mustMint(t, c)
			forgotten.Store(true)
			if e := mustFail(t, t.Context(), c); !e.MaybeIssued || e.Attempts != 1 || name == "HTTP/2.0" && e.Detail != connectionClosed {
				t.Errorf("on the forgotten connection: %+v", e)
			}
			mustMint(t, c)
			if got := srv.Calls()[0].Proto; got != name || srv.Connections() != 2 {
				t.Errorf("%d connections of %s", srv.Connections(), got)
			}
		})
	}
}

// authority signs certificates for the servers of a test.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  string
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	a := &authority{}
	var der []byte
	a.key, der = sign(t, &x509.Certificate{
		Subject:               pkix.Name{CommonName: "authority of a test"},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}, nil)
	a.cert, _ = x509.ParseCertificate(der)
	a.pem = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	return a
}

// issue returns a server's certificate for 127.0.0.1, changed by change.
func (a *authority) issue(t testing.TB, change func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	leaf := &x509.Certificate{
		Subject:     pkix.Name{CommonName: "server of a test"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if change != nil {
		change(leaf)
	}
	key, der := sign(t, leaf, a)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func sign(t testing.TB, cert *x509.Certificate, by *authority) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert.SerialNumber = big.NewInt(time.Now().UnixNano())
	if cert.NotAfter.IsZero() {
		cert.NotBefore, cert.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	}
	parent, parentKey := cert, key
	if by != nil {
		parent, parentKey = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, parent, key.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	return key, der
}

// newTLSServer serves a simulator with a TLS configuration of the test's own.
func newTLSServer(t testing.TB, config *tls.Config) (sim *cabletest.Simulator, url string) {
	t.Helper()
	sim = cabletest.New(nil)
	srv := httptest.NewUnstartedServer(sim)
	srv.TLS = config
	srv.Config.ErrorLog = log.New(io.Discard, "", 0) // refused handshakes
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return sim, srv.URL + sim.Path()
}

// TestTLS pins which servers get the key: those with a valid certificate, over
// TLS 1.2 or later. No other server sees a request, and a refused certificate is
// not retried.
func TestTLS(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	good := ca.issue(t, nil)
	for _, tt := range []struct {
		name     string
		config   *tls.Config
		noCA     bool   // the client does not trust the authority
		refused  string // the detail; "" if a token is issued
		attempts int
	}{
		{name: "TLS 1.2", config: &tls.Config{Certificates: []tls.Certificate{good}, MaxVersion: tls.VersionTLS12}, attempts: 1},
		{name: "TLS 1.3", config: &tls.Config{Certificates: []tls.Certificate{good}, MinVersion: tls.VersionTLS13}, attempts: 1},
		{
			name: "TLS 1.1", config: &tls.Config{Certificates: []tls.Certificate{good}, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11},
			refused: "the TLS handshake failed: protocol version not supported", attempts: 3,
		},
		{
			name: "unknown authority", config: &tls.Config{Certificates: []tls.Certificate{good}}, noCA: true,
			refused: "its certificate is signed by an unknown authority: set ca_cert to the authority's certificate", attempts: 1,
		},
		{
			name: "another authority", config: &tls.Config{Certificates: []tls.Certificate{newAuthority(t).issue(t, nil)}},
			refused: "its certificate is signed by an unknown authority: set ca_cert to the authority's certificate", attempts: 1,
		},
		{
			name: "expired", config: &tls.Config{Certificates: []tls.Certificate{ca.issue(t, func(c *x509.Certificate) {
				c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
			})}},
			refused: "its certificate has expired or is not yet valid", attempts: 1,
		},
		{
			name: "not yet valid", config: &tls.Config{Certificates: []tls.Certificate{ca.issue(t, func(c *x509.Certificate) {
				c.NotBefore, c.NotAfter = time.Now().Add(time.Hour), time.Now().Add(2*time.Hour)
			})}},
			refused: "its certificate has expired or is not yet valid", attempts: 1,
		},
		{
			name: "another host", config: &tls.Config{Certificates: []tls.Certificate{ca.issue(t, func(c *x509.Certificate) {
				c.IPAddresses, c.DNSNames = nil, []string{"api.cable.tech"}
			})}},
			refused: "its certificate is not valid for 127.0.0.1", attempts: 1,
		},
		{
			name: "a client's certificate", config: &tls.Config{Certificates: []tls.Certificate{ca.issue(t, func(c *x509.Certificate) {
				c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
			})}},
			refused: "its certificate is not valid for this use", attempts: 1,
		},
		{
			name: "an unknown critical extension", config: &tls.Config{Certificates: []tls.Certificate{ca.issue(t, func(c *x509.Certificate) {
				c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 3, 6, 1, 4, 1, 99999, 1}, Critical: true, Value: []byte{5, 0}}}
			})}},
			refused: "its certificate could not be verified", attempts: 1,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			sim, url := newTLSServer(t, tt.config)
			cfg := Config{RefreshKey: NewSecret(sim.RefreshKey()), TokenURL: url, CACert: ca.pem}
			if tt.noCA {
				cfg.CACert = ""
			}
			c := newClientAt(t, cfg)
			if tt.refused == "" {
				if got := mustMint(t, c); got.Attempts != tt.attempts {
					t.Errorf("%d attempts, want %d", got.Attempts, tt.attempts)
				}
				return
			}
			diffError(t, Error{Kind: Unreachable, Detail: tt.refused, Attempts: tt.attempts, Certificate: strings.Contains(tt.refused, "certificate")}, mustFail(t, t.Context(), c))
			if n := sim.CallCount(); n != 0 {
				t.Errorf("the server saw %d requests", n)
			}
		})
	}
}

// TestClientCertificate pins the error if the server requires a certificate of
// the client, which with TLS 1.3 it reports only after the request.
func TestClientCertificate(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	sim, url := newTLSServer(t, &tls.Config{Certificates: []tls.Certificate{ca.issue(t, nil)}, ClientAuth: tls.RequireAnyClientCert})
	c := newClientAt(t, Config{TokenURL: url, CACert: ca.pem})
	e := mustFail(t, t.Context(), c)
	// The alert races with the write, which fails when the server closes.
	if e.Kind != Unreachable || !strings.Contains(e.Detail, "certificate required") && !strings.Contains(e.Detail, "connection was closed") {
		t.Errorf("got %s: %s", e.Kind, e)
	}
	if n := sim.CallCount(); n != 0 {
		t.Errorf("the server saw %d requests", n)
	}
}

// TestCACert pins that ca_cert adds an authority, and that a server's own
// certificate can be one.
func TestCACert(t *testing.T) {
	t.Parallel()
	srv := cabletest.NewTLSServer(t, nil)
	if e := mustFail(t, t.Context(), newClientAt(t, Config{TokenURL: srv.URL})); !strings.Contains(e.Detail, "set ca_cert") || e.Attempts != 1 {
		t.Errorf("without ca_cert: %+v", e)
	}
	checkCounts(t, srv, 0, 0)
	other := newAuthority(t).pem
	for _, pem := range []string{srv.CA, other + srv.CA, srv.CA + other} {
		mustMint(t, newClient(t, srv, Config{CACert: pem}))
	}
	checkCounts(t, srv, 3, 3)
}

// TestSchemeMismatch pins the errors for the wrong scheme in token_url.
func TestSchemeMismatch(t *testing.T) {
	t.Parallel()
	notTLS := Error{Kind: Unreachable, Detail: "it does not speak TLS", Attempts: 3}
	srv := cabletest.NewServer(t, nil)
	diffError(t, notTLS, mustFail(t, t.Context(), newClientAt(t, Config{TokenURL: strings.Replace(srv.URL, "http:", "https:", 1)})))
	checkCounts(t, srv, 0, 0)

	ssh, _ := rawServer(t, func(c net.Conn) { _, _ = c.Write(bytes.Repeat([]byte("SSH-2.0 "), 10)) })
	diffError(t, notTLS, mustFail(t, t.Context(), newClientAt(t, Config{TokenURL: strings.Replace(ssh, "http:", "https:", 1)})))

	sim, url := newTLSServer(t, nil)
	e := mustFail(t, t.Context(), newClientAt(t, Config{TokenURL: strings.Replace(url, "https:", "http:", 1)}))
	if e.Kind != Responded || e.StatusCode != http.StatusBadRequest || sim.CallCount() != 0 {
		t.Errorf("http to a TLS port: %+v", e)
	}
}

// pemOf returns cert as PEM.
func pemOf(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}

// The environment's proxies are read once in a process, so each test of them
// starts one: this test binary, with childConfig, which makes one token request.
const childConfig = "CABLE_TEST_CHILD_CONFIG"

// proxyPassword is part of the proxy's URL, and must be nowhere else.
const proxyPassword = "PROXYPASSWORDCANARY"

type childRequest struct {
	Key, URL, CA string
	Timeout      time.Duration
}

type childResult struct {
	Err     *Error
	Text    string // of the error, as it may be logged
	Token   bool
	Printed string // the client, printed
}

// TestProxyChild is not a test: it is what the processes run.
func TestProxyChild(t *testing.T) {
	raw := os.Getenv(childConfig)
	if raw == "" {
		t.Skip("runs in the processes that TestProxy starts")
	}
	var in childRequest
	if err := json.Unmarshal([]byte(raw), &in); err != nil {
		t.Fatal(err)
	}
	c, err := New(Config{RefreshKey: NewSecret(in.Key), TokenURL: in.URL, CACert: in.CA, Timeout: in.Timeout})
	if err != nil {
		t.Fatal(err)
	}
	token, err := c.RequestToken(context.Background(), testRequest())
	out := childResult{Token: token != nil, Text: fmt.Sprintf("%v %+v %#v", err, err, err), Printed: fmt.Sprintf("%v %+v", c, c)}
	errors.As(err, &out.Err)
	encoded, _ := json.Marshal(out)
	fmt.Printf("\n%s%s\n", childConfig, encoded)
}

// inChild makes one token request in a process with env.
func inChild(t *testing.T, in childRequest, env ...string) childResult {
	t.Helper()
	if in.Key == "" {
		in.Key = cabletest.NewRefreshKey()
	}
	raw, _ := json.Marshal(in)
	cmd := exec.Command(os.Args[0], "-test.run=^TestProxyChild$", "-test.v")
	cmd.Env = slices.Concat(env, []string{childConfig + "=" + string(raw), "HOME=" + t.TempDir(), "SSL_CERT_FILE=/dev/null", "GORACE=atexit_sleep_ms=0"})
	output, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("the process: %v\n%s", err, output)
	}
	_, line, _ := strings.Cut(string(output), "\n"+childConfig)
	line, _, _ = strings.Cut(line, "\n")
	var out childResult
	if err := json.Unmarshal([]byte(line), &out); err != nil {
		t.Fatalf("%v in %s", err, output)
	}
	t.Log(out.Text)
	for _, secret := range []string{proxyPassword, cabletest.RefreshKeyMarker, base64.StdEncoding.EncodeToString([]byte("user:" + proxyPassword))} {
		if bytes.Contains(output, []byte(secret)) {
			t.Errorf("the process wrote %q: %s", secret, output)
		}
	}
	return out
}

// proxy is an HTTP proxy that connects every CONNECT to one address.
type proxy struct {
	url      string // with a user and a password
	to       string
	mu       sync.Mutex
	connects []string // "host:port authorization"
	others   []string // other requests
	refuse   atomic.Int32
}

func newProxy(t *testing.T, to string) *proxy {
	t.Helper()
	p := &proxy{to: to}
	raw, _ := rawServer(t, p.serve)
	p.url = "http://user:" + proxyPassword + "@" + strings.TrimSuffix(strings.TrimPrefix(raw, "http://"), "/v2/auth/token")
	return p
}

func (p *proxy) serve(conn net.Conn) {
	br := bufio.NewReader(conn)
	r, err := http.ReadRequest(br)
	if err != nil {
		return
	}
	p.mu.Lock()
	if r.Method == http.MethodConnect {
		p.connects = append(p.connects, r.Host+" "+r.Header.Get("Proxy-Authorization")+r.Header.Get("Authorization"))
	} else {
		p.others = append(p.others, r.Method+" "+r.RequestURI)
	}
	p.mu.Unlock()
	if status := p.refuse.Load(); status > 0 {
		_, _ = fmt.Fprintf(conn, "HTTP/1.1 %d Said by %s of user:%s\r\nProxy-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n", status, r.Host, proxyPassword)
		return
	} else if status < 0 {
		hang(conn)
		return
	}
	upstream, err := net.Dial("tcp", p.to)
	if err != nil {
		return
	}
	defer func() { _ = upstream.Close() }()
	_, _ = io.WriteString(conn, "HTTP/1.1 200 Connection established\r\n\r\n")
	go func() {
		_, _ = io.Copy(upstream, br)
		_ = upstream.Close()
	}()
	_, _ = io.Copy(conn, upstream)
}

// TestProxy pins that https uses the environment's proxy, in a tunnel that hides
// the key from it; that loopback never does; and that no error contains the
// proxy's password.
func TestProxy(t *testing.T) {
	t.Parallel()
	const host = "example.com" // the simulator's certificate is valid for it
	newTarget := func(t *testing.T) (*cabletest.Server, *proxy, childRequest) {
		srv := cabletest.NewTLSServer(t, nil)
		address, path, _ := strings.Cut(strings.TrimPrefix(srv.URL, "https://"), "/")
		return srv, newProxy(t, address), childRequest{Key: srv.RefreshKey(), URL: "https://" + host + "/" + path, CA: srv.CA}
	}
	unreachable := func(detail string, attempts int) *Error {
		return &Error{Kind: Unreachable, Detail: detail, Attempts: attempts}
	}
	t.Run("used", func(t *testing.T) {
		t.Parallel()
		for _, variable := range []string{"HTTPS_PROXY", "https_proxy"} {
			srv, p, in := newTarget(t)
			if got := inChild(t, in, variable+"="+p.url); !got.Token {
				t.Errorf("no token through %s: %s", variable, got.Text)
			}
			want := []string{host + ":443 Basic " + base64.StdEncoding.EncodeToString([]byte("user:"+proxyPassword))}
			if diff := cmp.Diff(want, p.connects); diff != "" {
				t.Errorf("what the proxy saw (-want +got):\n%s", diff)
			}
			checkCounts(t, srv, 1, 1)
		}
	})
	t.Run("refuses", func(t *testing.T) {
		t.Parallel()
		for _, status := range []int32{302, 403, 407, 502, 503} {
			srv, p, in := newTarget(t)
			p.refuse.Store(status)
			got := inChild(t, in, "HTTPS_PROXY="+p.url)
			want := unreachable(fmt.Sprintf("the environment's proxy refused to connect, with status %d", status), 3)
			if diff := cmp.Diff(want, got.Err); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
			checkCounts(t, srv, 0, 0)
		}
	})
	t.Run("hangs", func(t *testing.T) {
		t.Parallel()
		_, p, in := newTarget(t)
		p.refuse.Store(-1)
		in.Timeout = budget
		start := time.Now()
		got := inChild(t, in, "HTTPS_PROXY="+p.url)
		if diff := cmp.Diff(&Error{Kind: TimedOut, Detail: "the budget of 1s ran out before a request was sent", Attempts: 1}, got.Err); diff != "" {
			t.Errorf("error (-want +got):\n%s", diff)
		}
		if took := time.Since(start); took > budget+10*time.Second { // the process's start included
			t.Errorf("took %s", took)
		}
	})
	t.Run("refuses connections", func(t *testing.T) {
		t.Parallel()
		srv := cabletest.NewServer(t, nil)
		srv.Close()
		address := strings.TrimSuffix(strings.TrimPrefix(srv.URL, "http://"), srv.Path())
		got := inChild(t, childRequest{URL: "https://" + host + "/"}, "HTTPS_PROXY=http://user:"+proxyPassword+"@"+address)
		if diff := cmp.Diff(unreachable("connecting through the environment's proxy: connection refused", 3), got.Err); diff != "" {
			t.Errorf("error (-want +got):\n%s", diff)
		}
	})
	t.Run("not a URL", func(t *testing.T) {
		t.Parallel()
		// Go parses these in surprising ways; no error may contain the password.
		for _, url := range []string{
			"http://user:" + proxyPassword + "@[::1", "http://user:" + proxyPassword + "/x@h/", "http://user:" + proxyPassword + "#x@h/",
			"user:" + proxyPassword + "@127.0.0.1:1", "ftp://user:" + proxyPassword + "@127.0.0.1:1/", "http://user:" + proxyPassword + "%zz@h/",
		} {
			if got := inChild(t, childRequest{URL: "https://nowhere.invalid/"}, "HTTPS_PROXY="+url); got.Err == nil || got.Err.MaybeIssued {
				t.Errorf("%s", got.Text)
			}
		}
	})
	t.Run("with an unknown certificate", func(t *testing.T) {
		t.Parallel()
		sim, url := newTLSServer(t, nil)
		got := inChild(t, childRequest{URL: "https://" + host + "/"}, "HTTPS_PROXY="+strings.Replace(strings.TrimSuffix(url, sim.Path()), "://", "://user:"+proxyPassword+"@", 1))
		if got.Err == nil || got.Err.Attempts != 1 || !strings.Contains(got.Err.Detail, "unknown authority") {
			t.Errorf("%s", got.Text)
		}
	})
	t.Run("not for loopback", func(t *testing.T) {
		t.Parallel()
		srv := cabletest.NewServer(t, nil)
		address := strings.TrimSuffix(strings.TrimPrefix(srv.URL, "http://"), srv.Path())
		for _, url := range []string{srv.URL, strings.Replace(srv.URL, "127.0.0.1", "localhost", 1), strings.Replace(srv.URL, "127.0.0.1", "LOCALHOST", 1)} {
			p := newProxy(t, address)
			got := inChild(t, childRequest{Key: srv.RefreshKey(), URL: url}, "HTTP_PROXY="+p.url, "HTTPS_PROXY="+p.url, "http_proxy="+p.url, "ALL_PROXY="+p.url)
			if !got.Token || len(p.connects)+len(p.others) > 0 {
				t.Errorf("%s: token %t, the proxy saw %q %q: %s", url, got.Token, p.connects, p.others, got.Text)
			}
		}
	})
	t.Run("NO_PROXY", func(t *testing.T) {
		t.Parallel()
		_, p, in := newTarget(t)
		in.URL = "https://nowhere.invalid/"
		got := inChild(t, in, "HTTPS_PROXY="+p.url, "NO_PROXY=.invalid")
		if got.Token || len(p.connects) > 0 {
			t.Errorf("the proxy saw %q", p.connects)
		}
	})
}
