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
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// TestConnectionsAreReused pins that concurrent calls reuse connections: Go's default of two idle ones would make 62 of
// 64 reconnect in each round.
func TestConnectionsAreReused(t *testing.T) {
	t.Parallel()
	// Each response is delayed, so that all calls are under way at once.
	srv := cabletest.NewTLSServer(t, &cabletest.Options{Default: cabletest.Fault{Delay: 10 * time.Millisecond}})
	c := newClient(t, srv, Config{})
	for range 11 {
		if err := errors.Join(mintAll(t, c, maxConns)...); err != nil {
			t.Fatal(err)
		}
	}
	if n := srv.Connections(); n > maxConns {
		t.Errorf("%d connections for %d calls", n, srv.CallCount())
	}
	tokens := map[string]bool{}
	for _, m := range srv.Minted() {
		tokens[m.Token] = true
	}
	if len(tokens) != 11*maxConns {
		t.Errorf("%d tokens, want %d", len(tokens), 11*maxConns)
	}
}

// TestConnectionsAreBounded pins that 300 calls to a server that hangs open at most 64 connections; that the wait for
// one counts as time before a request was sent; and that a caller that leaves while it waits takes no place.
func TestConnectionsAreBounded(t *testing.T) {
	t.Parallel()
	sim := cabletest.New(nil)
	arrived, release := make(chan struct{}, 300), make(chan struct{})
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		arrived <- struct{}{}
		<-release
		sim.ServeHTTP(w, r)
	}))
	srv.Config.ConnState = sim.ConnState
	srv.StartTLS()
	t.Cleanup(srv.Close)
	c := newClientAt(t, Config{
		RefreshKey: NewSecret(sim.RefreshKey()), TokenURL: srv.URL + sim.Path(), CACert: string(
			pemOf(srv.Certificate()),
		),
	})
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
	const passed = "the caller's deadline passed before a request was sent, waiting for a turn or a connection"
	var left sync.WaitGroup
	for i := range 300 - maxConns {
		left.Add(1)
		want := Error{Kind: Canceled, Detail: "the caller left before a request was sent"}
		ctx := ctx
		if i == 0 {
			ctx, want = late, Error{Kind: TimedOut, Detail: passed}
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
}

// TestDialsAreBounded pins the same for connections that are never made, because net/http continues to dial after the
// caller has left.
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

// TestErrorsKeepConnections pins that an error response, which is read to its end, costs no connection.
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

// clientOfHost returns a client whose URL has a host that ParseTokenURL would refuse, as the stand-in for a name that
// resolves to something else.
func clientOfHost(t *testing.T, host string) *Client {
	t.Helper()
	c := newClientAt(t, Config{TokenURL: "http://localhost:1/", Timeout: 5 * time.Second})
	u := *c.url
	u.Host = host
	c.url = &u
	return c
}

// TestOnlyLoopback pins that plain http goes nowhere but to this machine, whatever its host's name resolves to.
func TestOnlyLoopback(t *testing.T) {
	t.Parallel()
	want := Error{
		Kind:     Unreachable,
		Detail:   "plain http is for loopback addresses only, and the host resolves to another",
		Attempts: 1,
	}
	for _, host := range []string{"192.0.2.1:80", "[2001:db8::1]:80", "0.0.0.0:80", "[::]:80", "169.254.169.254:80"} {
		diffError(t, want, mustFail(t, t.Context(), clientOfHost(t, host)))
	}
	c := clientOfHost(t, "rebound.example")
	rebound := nameServer(t, 0, netip.MustParseAddr("192.0.2.1"))
	c.transport.DialContext = (&net.Dialer{Resolver: rebound, Control: onlyLoopback}).DialContext
	diffError(t, want, mustFail(t, t.Context(), c))
	for address, ok := range map[string]bool{
		"127.0.0.1:80": true, "127.255.0.1:80": true, "[::1]:80": true, "[::ffff:127.0.0.1]:80": true,
		"10.0.0.1:80": false, "[::ffff:10.0.0.1]:80": false, "0.0.0.0:80": false, "[fe80::1%lo]:80": false, "": false,
		"nonsense": false,
	} {
		if err := onlyLoopback("tcp", address, nil); (err == nil) != ok {
			t.Errorf("%s: %v", address, err)
		}
	}
}

// nameServer starts a DNS server that responds to every query with the same code and, for the code 0, one address.
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
			reply := append(
				[]byte{buf[0], buf[1], 0x81, 0x80 | code, 0, 1, 0, 0, 0, 0, 0, 0}, question[:min(end, n-12)]...,
			)
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

// TestNames pins the errors for a name without an address. No request is sent, and the look-up is retried.
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

// authority signs certificates for the servers of a test.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  string

	isIntermediate bool // whose certificate a server sends with its own
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
	chain := [][]byte{der}
	if a.isIntermediate {
		chain = append(chain, a.cert.Raw)
	}
	return tls.Certificate{Certificate: chain, PrivateKey: key}
}

// intermediate returns an authority below a that has expired.
func (a *authority) intermediate(t testing.TB) *authority {
	t.Helper()
	key, der := sign(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "expired authority"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(
			-time.Hour,
		),
	}, a)
	cert, _ := x509.ParseCertificate(der)
	return &authority{cert: cert, key: key, isIntermediate: true}
}

// negative returns cert with a negative serial number, which cannot be parsed. Its signature is not valid any more.
func negative(cert tls.Certificate) tls.Certificate {
	parsed, _ := x509.ParseCertificate(cert.Certificate[0])
	serial := parsed.SerialNumber.Bytes()
	der := bytes.Clone(parsed.Raw)
	der[bytes.Index(der, serial)] |= 0x80
	cert.Certificate = [][]byte{der}
	return cert
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

// newTLSServer serves a simulator with a TLS configuration of the test's own, or with a certificate of no known
// authority.
func newTLSServer(t testing.TB, config *tls.Config) (sim *cabletest.Simulator, url string) {
	t.Helper()
	if config == nil {
		config = &tls.Config{Certificates: []tls.Certificate{newAuthority(t).issue(t, nil)}}
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	sim = cabletest.New(nil)
	srv := &http.Server{Handler: sim, ErrorLog: log.New(io.Discard, "", 0)} // refused handshakes
	go func() { _ = srv.Serve(tls.NewListener(listener, config)) }()
	t.Cleanup(func() { _ = srv.Close() })
	return sim, "https://" + listener.Addr().String() + sim.Path()
}

// TestTLS pins which servers get the key, namely those with a valid certificate, over TLS 1.2 or later. No other server
// sees a request, and a refused certificate is not retried.
func TestTLS(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	good := ca.issue(t, nil)
	both := []string{"h2", "http/1.1"}
	issued := func(change func(*x509.Certificate)) *tls.Config {
		return &tls.Config{Certificates: []tls.Certificate{ca.issue(t, change)}}
	}
	const unknownAuthority = "its certificate is signed by an unknown authority: " +
		"set ca_cert to the authority's certificate"
	for _, tt := range []struct {
		name     string
		config   *tls.Config
		noCA     bool   // the client does not trust the authority
		refused  string // the detail; "" if a token is issued
		attempts int
	}{
		{
			name:     "TLS 1.2",
			config:   &tls.Config{Certificates: []tls.Certificate{good}, MaxVersion: tls.VersionTLS12},
			attempts: 1,
		},
		{
			name:     "TLS 1.3",
			config:   &tls.Config{Certificates: []tls.Certificate{good}, MinVersion: tls.VersionTLS13},
			attempts: 1,
		},
		{
			name: "TLS 1.1", config: &tls.Config{
				Certificates: []tls.Certificate{good}, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11,
			},
			refused: "the TLS handshake failed: protocol version not supported", attempts: 3,
		},
		{
			name: "unknown authority", config: &tls.Config{Certificates: []tls.Certificate{good}}, noCA: true,
			refused: unknownAuthority, attempts: 1,
		},
		{
			name: "another authority", config: &tls.Config{
				Certificates: []tls.Certificate{newAuthority(t).issue(t, nil)},
			},
			refused: unknownAuthority, attempts: 1,
		},
		{
			name: "expired", config: issued(func(c *x509.Certificate) {
				c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
			}),
			refused: "its certificate has expired or is not yet valid", attempts: 1,
		},
		{
			name: "not yet valid", config: issued(func(c *x509.Certificate) {
				c.NotBefore, c.NotAfter = time.Now().Add(time.Hour), time.Now().Add(2*time.Hour)
			}),
			refused: "its certificate has expired or is not yet valid", attempts: 1,
		},
		{
			name: "another host", config: issued(func(c *x509.Certificate) {
				c.IPAddresses, c.DNSNames = nil, []string{"api.cable.tech"}
			}),
			refused: "its certificate is not valid for 127.0.0.1", attempts: 1,
		},
		{
			name: "a client's certificate", config: issued(func(c *x509.Certificate) {
				c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
			}),
			refused: "its certificate is not valid for this use", attempts: 1,
		},
		{
			name: "an unknown critical extension", config: issued(func(c *x509.Certificate) {
				c.ExtraExtensions = []pkix.Extension{
					{Id: []int{1, 3, 6, 1, 4, 1, 99999, 1}, Critical: true, Value: []byte{5, 0}},
				}
			}),
			refused: "its certificate could not be verified", attempts: 1,
		},
		{
			name: "a common name alone", config: issued(func(c *x509.Certificate) {
				c.IPAddresses = nil
			}),
			refused:  "its certificate has no subject alternative name for a host: a common name alone is not accepted",
			attempts: 1,
		},
		{
			name: "an expired intermediate", config: &tls.Config{
				Certificates: []tls.Certificate{ca.intermediate(t).issue(t, nil)},
			},
			refused: "the certificate of an authority in its chain has expired or is not yet valid", attempts: 1,
		},
		{
			name: "a negative serial number", config: &tls.Config{
				Certificates: []tls.Certificate{negative(ca.issue(t, nil))},
			},
			refused: "its certificate cannot be parsed", attempts: 1,
		},
		{
			name:     "HTTP/2 and HTTP/1.1",
			config:   &tls.Config{Certificates: []tls.Certificate{good}, NextProtos: both},
			attempts: 1,
		},
		{
			name: "HTTP/2 alone", config: &tls.Config{
				Certificates: []tls.Certificate{good}, NextProtos: []string{"h2-alone"},
			},
			refused: "it does not speak HTTP/1.1, and HTTP/2 is not supported", attempts: 3,
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
			diffError(
				t,
				Error{
					Kind:        Unreachable,
					Detail:      tt.refused,
					Attempts:    tt.attempts,
					Certificate: strings.Contains(tt.refused, "certificate"),
				},
				mustFail(t, t.Context(), c),
			)
			if n := sim.CallCount(); n != 0 {
				t.Errorf("the server saw %d requests", n)
			}
		})
	}
}

// TestClientCertificate pins the error if the server requires a certificate of the client, which with TLS 1.3 it
// reports only after the request. It is not retried, and no token was issued. If its alert is lost, because the write
// fails first, it is a connection that was closed.
func TestClientCertificate(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	for version, alert := range map[uint16]string{
		tls.VersionTLS12: "handshake failure", tls.VersionTLS13: "certificate required",
	} {
		config := &tls.Config{
			Certificates: []tls.Certificate{ca.issue(t, nil)},
			ClientAuth:   tls.RequireAnyClientCert,
			MaxVersion:   version,
		}
		sim, url := newTLSServer(t, config)
		want := Error{Kind: Unreachable, Certificate: true, Attempts: 1}
		want.Detail = fmt.Sprintf("it refused the TLS handshake (%s): client certificates are not supported", alert)
		got := mustFail(t, t.Context(), newClientAt(t, Config{TokenURL: url, CACert: ca.pem}))
		if lost := got.MaybeIssued && got.Detail == connectionClosed; version == tls.VersionTLS12 || !lost {
			diffError(t, want, got)
		}
		if n := sim.CallCount(); n != 0 {
			t.Errorf("the server saw %d requests", n)
		}
	}
}

// TestAlerts pins that an alert about certificates means the handshake on a new connection alone. On a kept one, or
// after the first byte of a response, Cable may have processed the call.
func TestAlerts(t *testing.T) {
	t.Parallel()
	alert := func(number tls.AlertError) error {
		return &net.OpError{Op: "remote error", Err: errors.New(number.Error())}
	}
	for _, tt := range []struct {
		err             error
		fresh, answered bool
		certificate     bool
	}{
		{alert(42), true, false, true},
		{alert(43), true, false, true},
		{alert(44), true, false, true},
		{alert(45), true, false, true},
		{alert(46), true, false, true},
		{alert(48), true, false, true},
		{alert(116), true, false, true},
		{alert(116), false, false, false},
		{alert(116), true, true, false},
		{alert(40), true, false, false},
		{alert(80), true, false, false},
		{errors.New(tls.AlertError(116).Error()), true, false, false},
		{errors.New(`malformed HTTP response "tls: failed to parse certificate from server"`), true, false, false},
	} {
		r := &request{client: newClientAt(t, Config{}), caller: t.Context()}
		e := r.failure(t.Context(), progress{stage: atResponse, sent: true, early: tt.fresh && !tt.answered}, tt.err)
		if e.Certificate != tt.certificate || e.MaybeIssued == tt.certificate {
			t.Errorf("%v, new %t, answered %t: %+v", tt.err, tt.fresh, tt.answered, e)
		}
	}
}

// TestStages pins that an error says how far the call had come when the budget ran out, or the connection broke.
func TestStages(t *testing.T) {
	t.Parallel()
	silent, _ := rawServer(t, hang)
	gone, _ := rawServer(t, func(c net.Conn) { _, _ = io.ReadFull(c, make([]byte, 5)) })
	blocked := func(ctx context.Context) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() }
	for name, tt := range map[string]struct {
		url  string
		dial dialFunc
		want Error
	}{
		"in the TLS handshake": {
			strings.Replace(silent, "http:", "https:", 1), nil, Error{Kind: TimedOut, Attempts: 1},
		},
		"waiting for the response": {silent, nil, Error{Kind: TimedOut, MaybeIssued: true, Attempts: 1}},
		"looking up the host": {"https://cable.example/", (&net.Dialer{Resolver: &net.Resolver{
			PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) { return blocked(ctx) },
		}}).DialContext, Error{Kind: TimedOut, Attempts: 1}},
		"connecting": {"https://cable.example/", (&net.Dialer{
			Resolver: nameServer(t, 0, netip.MustParseAddr("127.0.0.1")),
			ControlContext: func(ctx context.Context, _, _ string, _ syscall.RawConn) error {
				_, err := blocked(ctx)
				return err
			},
		}).DialContext, Error{Kind: TimedOut, Attempts: 1}},
		"the connection was closed in the TLS handshake": {
			strings.Replace(gone, "http:", "https:", 1), nil, Error{Kind: Unreachable, Attempts: 3},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := Config{TokenURL: tt.url, Timeout: budget}
			tt.want.Detail = name
			if tt.want.Kind == Unreachable {
				cfg.Timeout = time.Minute
			} else {
				when := "before a request was sent"
				if tt.want.MaybeIssued {
					when = "after the request was sent"
				}
				tt.want.Detail = fmt.Sprintf("the budget of 1s ran out %s, %s", when, name)
			}
			c := newClientAt(t, cfg)
			c.transport.Proxy = nil
			if tt.dial != nil {
				c.transport.DialContext = counted(tt.dial)
			}
			diffError(t, tt.want, mustFailInTime(t, c))
		})
	}
}

// TestHTTP2Alone pins the error for a server that speaks HTTP/2 although it was not offered.
func TestHTTP2Alone(t *testing.T) {
	t.Parallel()
	url, _ := rawServer(t, func(conn net.Conn) {
		_, _ = conn.Write(
			[]byte("\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x80\x0d\x0a"),
		) // SETTINGS (RFC 9113, 6.5)
		hang(conn)
	})
	want := Error{
		Kind:        Unreachable,
		Detail:      "it does not speak HTTP/1.1, and HTTP/2 is not supported",
		MaybeIssued: true,
		Attempts:    1,
	}
	e := mustFail(t, t.Context(), newClientAt(t, Config{TokenURL: url}))
	want.MaybeIssued, want.Attempts = e.MaybeIssued, e.Attempts // its frame may be read before the request is written
	diffError(t, want, e)
}

// TestCACert pins that ca_cert adds an authority, and that a server's own certificate can be one.
func TestCACert(t *testing.T) {
	t.Parallel()
	srv := cabletest.NewTLSServer(t, nil)
	e := mustFail(t, t.Context(), newClientAt(t, Config{TokenURL: srv.URL}))
	if !strings.Contains(e.Detail, "set ca_cert") || e.Attempts != 1 {
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
	diffError(
		t, notTLS,
		mustFail(t, t.Context(), newClientAt(t, Config{TokenURL: strings.Replace(srv.URL, "http:", "https:", 1)})),
	)
	checkCounts(t, srv, 0, 0)

	ssh, _ := rawServer(t, func(c net.Conn) { _, _ = c.Write(bytes.Repeat([]byte("SSH-2.0 "), 10)) })
	diffError(
		t, notTLS,
		mustFail(t, t.Context(), newClientAt(t, Config{TokenURL: strings.Replace(ssh, "http:", "https:", 1)})),
	)

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

// proxyPassword is part of the proxy's URL, and must be nowhere else.
const proxyPassword = "PROXYPASSWORDCANARY"

// proxyVariables are those that a client may read, or must not.
var proxyVariables = []string{
	"HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy",
}

// setProxies sets these variables of the environment, and empties the others of theirs.
func setProxies(t *testing.T, variables ...string) {
	t.Helper()
	for _, name := range proxyVariables {
		t.Setenv(name, "")
	}
	for _, variable := range variables {
		name, value, _ := strings.Cut(variable, "=")
		t.Setenv(name, value)
	}
}

// throughEnvironment requests a token with a client that was made with these variables.
func throughEnvironment(t *testing.T, cfg Config, variables ...string) (*Token, *Error) {
	t.Helper()
	setProxies(t, variables...)
	c := newClientAt(t, cfg)
	token, err := c.RequestToken(t.Context(), testRequest())
	if err == nil {
		return token, nil
	}
	e := checkError(t, token, err)
	text := fmt.Sprintf("%v %+v %#v %v %+v", err, err, err, c, c)
	for _, secret := range []string{proxyPassword, base64.StdEncoding.EncodeToString([]byte("user:" + proxyPassword))} {
		if strings.Contains(text, secret) {
			t.Errorf("%q in %s", secret, text)
		}
	}
	return nil, e
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
	p.url = "http://user:" + proxyPassword + "@" + strings.TrimSuffix(
		strings.TrimPrefix(raw, "http://"), "/v2/auth/token",
	)
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
		_, _ = fmt.Fprintf(
			conn, "HTTP/1.1 %d Said by %s of user:%s\r\nProxy-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n", status,
			r.Host, proxyPassword,
		)
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

// TestProxy pins that proxies come from the environment. https uses one, in a tunnel that hides the key from it;
// loopback never does; and no error contains the proxy's password.
func TestProxy(t *testing.T) { // not parallel, because of the environment
	const host = "example.com" // the simulator's certificate is valid for it
	newTarget := func(t *testing.T) (*cabletest.Server, *proxy, Config) {
		srv := cabletest.NewTLSServer(t, nil)
		address, path, _ := strings.Cut(strings.TrimPrefix(srv.URL, "https://"), "/")
		cfg := Config{RefreshKey: NewSecret(srv.RefreshKey()), TokenURL: "https://" + host + "/" + path, CACert: srv.CA}
		return srv, newProxy(t, address), cfg
	}
	unreachable := func(t *testing.T, detail string, attempts int, got *Error) {
		t.Helper()
		if diff := cmp.Diff(&Error{Kind: Unreachable, Detail: detail, Attempts: attempts}, got); diff != "" {
			t.Errorf("error (-want +got):\n%s", diff)
		}
	}
	nowhere := Config{TokenURL: "https://nowhere.invalid/"}
	t.Run("used", func(t *testing.T) {
		for _, form := range []string{"HTTPS_PROXY=%s", "https_proxy=%s", "https_proxy=http://%%zz,HTTPS_PROXY=%s/"} {
			srv, p, cfg := newTarget(t)
			variables := strings.Split(fmt.Sprintf(form, p.url), ",")
			if token, err := throughEnvironment(t, cfg, variables...); token == nil {
				t.Errorf("no token through %s: %v", form, err)
			}
			want := []string{host + ":443 Basic " + base64.StdEncoding.EncodeToString([]byte("user:"+proxyPassword))}
			if diff := cmp.Diff(want, p.connects); diff != "" {
				t.Errorf("what the proxy saw (-want +got):\n%s", diff)
			}
			checkCounts(t, srv, 1, 1)
		}
	})
	t.Run("refuses", func(t *testing.T) {
		for _, status := range []int32{302, 403, 407, 502, 503} {
			srv, p, cfg := newTarget(t)
			p.refuse.Store(status)
			_, got := throughEnvironment(t, cfg, "HTTPS_PROXY="+p.url)
			unreachable(t, fmt.Sprintf("the environment's proxy refused to connect, with status %d", status), 3, got)
			checkCounts(t, srv, 0, 0)
		}
	})
	t.Run("hangs", func(t *testing.T) {
		_, p, cfg := newTarget(t)
		p.refuse.Store(-1)
		cfg.Timeout = budget
		_, got := throughEnvironment(t, cfg, "HTTPS_PROXY="+p.url)
		want := Error{
			Kind: TimedOut, Detail: "the budget of 1s ran out before a request was sent, at the proxy", Attempts: 1,
		}
		diffError(t, want, got)
	})
	t.Run("is not one", func(t *testing.T) {
		ssh, _ := rawServer(t, func(c net.Conn) {
			readRequest(c)
			_, _ = io.WriteString(c, "SSH-2.0-OpenSSH_9.6\r\n\r\n")
		})
		gone, _ := rawServer(t, func(net.Conn) {})
		closed, _ := rawServer(t, func(net.Conn) {})
		for url, want := range map[string]string{ssh: notHTTP, gone: connectionClosed, closed: "connection refused"} {
			url = strings.TrimSuffix(url, "/v2/auth/token")
			if want == "connection refused" {
				url = "http://127.0.0.1:1"
			}
			_, got := throughEnvironment(t, nowhere, "HTTPS_PROXY="+url)
			unreachable(t, "connecting through the environment's proxy: "+want, 3, got)
		}
	})
	t.Run("is not named", func(t *testing.T) {
		const user = "user:" + proxyPassword
		direct := func(url string) {
			t.Helper()
			if u, err := ParseTokenURL(url); err != nil {
				t.Fatal(err)
			} else if proxy, err := environmentProxy(u); proxy != nil || err != nil {
				t.Errorf("%s: %v, %v; want no proxy", url, proxy, err)
			}
		}
		for _, value := range []string{
			"http://" + user + "@[::1", "http://" + user + "/x@h/", "http://" + user + "#x@h/",
			"http://" + user + "?x@h/",
			"http://user:1/x@h:3128", "http://user:1#x@h:3128", "http://" + user + "%zz@h/", "http://" + user + "%@h/",
			"ftp://" + user + "@127.0.0.1:1/", "http:/proxy:3128", "http:proxy:3128", "http//proxy:3128", "http://",
			"http://proxy:99999", "http://proxy:", "://proxy", " http://proxy:3128", "http://proxy:3128/path", "p q",
		} {
			for _, name := range []string{"HTTPS_PROXY", "https_proxy"} {
				_, got := throughEnvironment(t, nowhere, name+"="+value)
				unreachable(t, fmt.Sprintf(notAProxy, name), 1, got)
			}
			setProxies(t, "HTTPS_PROXY="+value, "NO_PROXY=10.0.0.0/8,.exempt")
			direct("https://127.0.0.1/")
			direct("https://localhost:1/")
			direct("https://10.1.2.3/")
			direct("https://api.exempt/")
		}
	})
	t.Run("with an unknown certificate", func(t *testing.T) {
		sim, url := newTLSServer(t, nil)
		url = strings.Replace(strings.TrimSuffix(url, sim.Path()), "://", "://user:"+proxyPassword+"@", 1)
		_, got := throughEnvironment(t, nowhere, "HTTPS_PROXY="+url)
		if got == nil || got.Attempts != 1 || !got.Certificate || !strings.Contains(got.Detail, "unknown authority") {
			t.Errorf("%+v", got)
		}
	})
	t.Run("SOCKS", func(t *testing.T) {
		for _, scheme := range []string{"socks5", "socks5h"} {
			url, _ := rawServer(t, func(c net.Conn) {
				_, _ = io.ReadFull(c, make([]byte, 3))
				_, _ = c.Write([]byte{5, 0})
				_, _ = io.ReadFull(c, make([]byte, 10))
				_, _ = c.Write([]byte{5, 4, 0, 1, 0, 0, 0, 0, 0, 0}) // host unreachable (RFC 1928, 6)
				hang(c)
			})
			url = scheme + strings.TrimPrefix(strings.TrimSuffix(url, "/v2/auth/token"), "http")
			_, got := throughEnvironment(t, nowhere, "HTTPS_PROXY="+url)
			unreachable(t, "connecting through the environment's proxy: it could not connect", 3, got)
		}
	})
	t.Run("not for loopback, nor an exempt host", func(t *testing.T) {
		srv := cabletest.NewServer(t, nil)
		address := strings.TrimSuffix(strings.TrimPrefix(srv.URL, "http://"), srv.Path())
		for _, url := range []string{
			srv.URL, strings.Replace(srv.URL, "127.0.0.1", "localhost", 1), strings.Replace(
				srv.URL, "127.0.0.1", "LOCALHOST", 1,
			),
		} {
			p := newProxy(t, address)
			token, err := throughEnvironment(t, Config{RefreshKey: NewSecret(srv.RefreshKey()), TokenURL: url},
				"HTTP_PROXY="+p.url, "HTTPS_PROXY="+p.url, "http_proxy="+p.url, "ALL_PROXY="+p.url)
			if token == nil || len(p.connects)+len(p.others) > 0 {
				t.Errorf("%s: the proxy saw %q %q: %v", url, p.connects, p.others, err)
			}
		}
		for _, variables := range [][]string{
			{"HTTPS_PROXY=%s", "NO_PROXY=.invalid"}, {"https_proxy=%s", "no_proxy=*"}, {"ALL_PROXY=%s"},
		} {
			p := newProxy(t, address)
			variables[0] = fmt.Sprintf(variables[0], p.url)
			if token, _ := throughEnvironment(t, nowhere, variables...); token != nil || len(p.connects) > 0 {
				t.Errorf("%q: the proxy saw %q", variables, p.connects)
			}
		}
	})
}
