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
	url, ca := srv.URL+sim.Path(), pemOf(srv.Certificate().Raw)
	c := newClientAt(t, Config{RefreshKey: NewSecret(sim.RefreshKey()), TokenURL: url, CACert: ca})
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
		ctx, want := ctx, unsent(Canceled, "the caller left before a request was sent", 0)
		if i == 0 {
			ctx, want = late, unsent(TimedOut, passed, 0)
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
	want := unsent(Unreachable, "plain http is for loopback addresses only, and the host resolves to another", 1)
	for _, host := range []string{"192.0.2.1:80", "[2001:db8::1]:80", "0.0.0.0:80", "[::]:80", "169.254.169.254:80"} {
		diffError(t, want, mustFail(t, t.Context(), clientOfHost(t, host)))
	}
	https := newClientAt(t, Config{TokenURL: "https://192.0.2.1/", Timeout: budget})
	if e := mustFail(t, t.Context(), https); e.Detail == want.Detail {
		t.Error("https is for loopback addresses only")
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
			head := []byte{buf[0], buf[1], 0x81, 0x80 | code, 0, 1, 0, 0, 0, 0, 0, 0}
			reply := slices.Concat(head, question[:min(end, n-12)])
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
	for code, want := range map[byte]string{
		3:    "looking up nowhere.example: no such host",
		0x40: "looking up nowhere.example: no such host", // code 0, with a bit that adds no address
		2:    "looking up nowhere.example: the name server did not respond",
	} {
		c := newClientAt(t, Config{TokenURL: "https://nowhere.example/v2/auth/token", Timeout: 5 * time.Second})
		c.transport.Proxy = nil
		c.transport.DialContext = (&net.Dialer{Resolver: nameServer(t, code, netip.Addr{})}).DialContext
		diffError(t, unsent(Unreachable, want, 3), mustFail(t, t.Context(), c))
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
	a.key, der = sign(t, authorityCert(), nil)
	a.cert, _ = x509.ParseCertificate(der)
	a.pem = pemOf(der)
	return a
}

func authorityCert() *x509.Certificate {
	return &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
}

// issue returns a server's certificate for 127.0.0.1, changed by change.
func (a *authority) issue(t testing.TB, change func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	leaf := &x509.Certificate{
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
	expired := authorityCert()
	expired.NotBefore, expired.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
	key, der := sign(t, expired, a)
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
	type leaf = *x509.Certificate
	ca, now, later := newAuthority(t), time.Now(), time.Now().Add(2*time.Hour)
	with := func(cert tls.Certificate) *tls.Config { return &tls.Config{Certificates: []tls.Certificate{cert}} }
	issued := func(change func(leaf)) *tls.Config { return with(ca.issue(t, change)) }
	good := func(least, most uint16, protocols ...string) *tls.Config {
		config := issued(nil)
		config.MinVersion, config.MaxVersion, config.NextProtos = least, most, protocols
		return config
	}
	client, critical := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, []pkix.Extension{
		{Id: []int{1, 3, 6, 1, 4, 1, 99999, 1}, Critical: true, Value: []byte{5, 0}},
	}
	const (
		unknown = "its certificate is signed by an unknown authority: set ca_cert to the authority's certificate"
		expired = "its certificate has expired or is not yet valid"
		noName  = "its certificate has no subject alternative name for a host: a common name alone is not accepted"
		version = "the TLS handshake failed: protocol version not supported"
		chain   = "the certificate of an authority in its chain has expired or is not yet valid"
		noHTTP1 = "it does not speak HTTP/1.1, and HTTP/2 is not supported"
	)
	for _, tt := range []struct {
		name     string
		config   *tls.Config
		refused  string // the detail; "" if a token is issued
		attempts int
	}{
		{"TLS 1.2", good(0, tls.VersionTLS12), "", 1},
		{"TLS 1.3", good(tls.VersionTLS13, 0), "", 1},
		{"TLS 1.1", good(tls.VersionTLS10, tls.VersionTLS11), version, 3},
		{"unknown authority", good(0, 0), unknown, 1}, // no ca_cert
		{"another authority", with(newAuthority(t).issue(t, nil)), unknown, 1},
		{"expired", issued(func(c leaf) { c.NotBefore, c.NotAfter = now.Add(-2*time.Hour), now.Add(-1) }), expired, 1},
		{"too early", issued(func(c leaf) { c.NotBefore, c.NotAfter = now.Add(time.Hour), later }), expired, 1},
		{
			"another host", issued(func(c leaf) { c.IPAddresses, c.DNSNames = nil, []string{"api.cable.tech"} }),
			"its certificate is not valid for 127.0.0.1", 1,
		},
		{
			"a client's certificate", issued(func(c leaf) { c.ExtKeyUsage = client }),
			"its certificate is not valid for this use", 1,
		},
		{
			"an unknown critical extension", issued(func(c leaf) { c.ExtraExtensions = critical }),
			"its certificate could not be verified", 1,
		},
		{"a common name alone", issued(func(c leaf) { c.IPAddresses = nil }), noName, 1},
		{"an expired intermediate", with(ca.intermediate(t).issue(t, nil)), chain, 1},
		{"a negative serial number", with(negative(ca.issue(t, nil))), "its certificate cannot be parsed", 1},
		{"HTTP/2 and HTTP/1.1", good(0, 0, "h2", "http/1.1"), "", 1},
		{"HTTP/2 alone", good(0, 0, "h2-alone"), noHTTP1, 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			sim, url := newTLSServer(t, tt.config)
			cfg := Config{RefreshKey: NewSecret(sim.RefreshKey()), TokenURL: url, CACert: ca.pem}
			if tt.name == "unknown authority" {
				cfg.CACert = ""
			}
			c := newClientAt(t, cfg)
			if tt.refused == "" {
				if got := mustMint(t, c); got.Attempts != tt.attempts {
					t.Errorf("%d attempts, want %d", got.Attempts, tt.attempts)
				}
				return
			}
			want := unsent(Unreachable, tt.refused, tt.attempts)
			want.Certificate = strings.Contains(tt.refused, "certificate")
			diffError(t, want, mustFail(t, t.Context(), c))
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
		config := &tls.Config{Certificates: []tls.Certificate{ca.issue(t, nil)}, MaxVersion: version}
		config.ClientAuth = tls.RequireAnyClientCert
		sim, url := newTLSServer(t, config)
		detail := fmt.Sprintf("it refused the TLS handshake (%s): client certificates are not supported", alert)
		want := Error{Kind: Unreachable, Detail: detail, Certificate: true, Attempts: 1}
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
	alerts := map[error]bool{ // is a certificate's
		alert(40): false, alert(42): true, alert(43): true, alert(44): true, alert(45): true, alert(46): true,
		alert(48): true, alert(80): false, alert(116): true, errors.New(tls.AlertError(116).Error()): false,
		errors.New(`malformed HTTP response "tls: failed to parse certificate from server"`): false,
	}
	for err, isCertificate := range alerts {
		for _, early := range []bool{true, false} {
			want := early && isCertificate
			r := &request{client: newClientAt(t, Config{}), caller: t.Context()}
			e := r.failure(t.Context(), progress{stage: atResponse, sent: true, early: early}, err)
			if e.Certificate != want || e.MaybeIssued == want {
				t.Errorf("%v, early %t: %+v", err, early, e)
			}
		}
	}
}

// TestStages pins that an error says how far the call had come when the budget ran out, or the connection broke.
func TestStages(t *testing.T) {
	t.Parallel()
	silent, _ := rawServer(t, hang)
	http2, _ := rawServer(t, func(c net.Conn) {
		// Before the request has come, net/http would take these bytes for unsolicited ones, and the call be retried.
		_, _ = io.ReadFull(c, make([]byte, 1))
		_, _ = io.WriteString(c, "\x00\x00\x00\x04\x00\x00\x00\x00\x00") // settings
		hang(c)
	})
	gone, _ := rawServer(t, func(c net.Conn) { _, _ = io.ReadFull(c, make([]byte, 5)) })
	blocked := func(ctx context.Context) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() }
	overTLS := func(url string) string { return strings.Replace(url, "http:", "https:", 1) }
	resolver := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return blocked(ctx)
	}}
	connect := &net.Dialer{
		ControlContext: func(ctx context.Context, _, _ string, _ syscall.RawConn) error {
			_, err := blocked(ctx)
			return err
		},
	}
	for name, tt := range map[string]struct {
		url  string
		dial dialFunc
		want Error
	}{
		"in the TLS handshake":     {overTLS(silent), nil, unsent(TimedOut, "", 1)},
		"waiting for the response": {silent, nil, sent(TimedOut, "")},
		"waiting for the rest of the response, which never comes if the server speaks only HTTP/2": {
			http2, nil, sent(TimedOut, ""),
		},
		"looking up the host": {
			"https://cable.example/", (&net.Dialer{Resolver: resolver}).DialContext, unsent(TimedOut, "", 1),
		},
		"connecting": {"https://127.0.0.1/", connect.DialContext, unsent(TimedOut, "", 1)},

		"the connection was closed in the TLS handshake": {overTLS(gone), nil, unsent(Unreachable, "", 3)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := Config{TokenURL: tt.url, Timeout: timeoutFor(tt.want)}
			tt.want.Detail = name
			if tt.want.MaybeIssued {
				tt.want.Detail = "the budget of 1s ran out after the request was sent, " + name
			} else if tt.want.Kind == TimedOut {
				tt.want.Detail = "the budget of 1s ran out before a request was sent, " + name
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
	srv := cabletest.NewServer(t, nil)
	ssh, _ := rawServer(t, func(c net.Conn) { _, _ = c.Write(bytes.Repeat([]byte("SSH-2.0 "), 10)) })
	for _, url := range []string{srv.URL, ssh} {
		c := newClientAt(t, Config{TokenURL: strings.Replace(url, "http:", "https:", 1)})
		diffError(t, unsent(Unreachable, "it does not speak TLS", 3), mustFail(t, t.Context(), c))
	}
	checkCounts(t, srv, 0, 0)

	sim, url := newTLSServer(t, nil)
	e := mustFail(t, t.Context(), newClientAt(t, Config{TokenURL: strings.Replace(url, "https:", "http:", 1)}))
	if e.Kind != Responded || e.StatusCode != http.StatusBadRequest || sim.CallCount() != 0 {
		t.Errorf("http to a TLS port: %+v", e)
	}
}

// pemOf returns a certificate as PEM.
func pemOf(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// proxyPassword is part of the proxy's URL, and must be nowhere else.
const proxyPassword = "PROXYPASSWORDCANARY"

// proxyVariables are the variables that a client may read, and the ones that it must not.
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
	return throughProxy(t, newClientAt(t, cfg))
}

// throughProxy requests a token, and checks that no error shows a proxy's password.
func throughProxy(t *testing.T, c *Client) (*Token, *Error) {
	t.Helper()
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
	p.url = strings.Replace(strings.TrimSuffix(raw, "/v2/auth/token"), "//", "//user:"+proxyPassword+"@", 1)
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
		_, _ = fmt.Fprintf(conn, "HTTP/1.1 %d Said by %s of user:%s\r\nProxy-Authenticate: Basic\r\n"+
			"Content-Length: 0\r\n\r\n", status, r.Host, proxyPassword)
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
		diffError(t, unsent(Unreachable, detail, attempts), got)
	}
	nowhere := Config{TokenURL: "https://nowhere.invalid/"}
	t.Run("used", func(t *testing.T) {
		for _, form := range []string{
			"HTTPS_PROXY=%s", "https_proxy=%s", "https_proxy=http://%%zz,HTTPS_PROXY=%s/", "bare",
		} {
			srv, p, cfg := newTarget(t)
			variables := strings.Split(fmt.Sprintf(form, p.url), ",")
			if form == "bare" {
				variables = []string{"HTTPS_PROXY=" + strings.TrimPrefix(p.url, "http://")}
			}
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
		var requests sync.WaitGroup // because each is retried
		for _, status := range []int32{302, 403, 407, 502, 503} {
			srv, p, cfg := newTarget(t)
			p.refuse.Store(status)
			setProxies(t, "HTTPS_PROXY="+p.url)
			c := newClientAt(t, cfg)
			requests.Go(func() {
				_, got := throughProxy(t, c)
				want := fmt.Sprintf("the environment's proxy refused to connect, with status %d", status)
				unreachable(t, want, 3, got)
				checkCounts(t, srv, 0, 0)
			})
		}
		requests.Wait()
	})
	t.Run("hangs", func(t *testing.T) {
		_, p, cfg := newTarget(t)
		p.refuse.Store(-1)
		cfg.Timeout = budget
		_, got := throughEnvironment(t, cfg, "HTTPS_PROXY="+p.url)
		diffError(t, unsent(TimedOut, "the budget of 1s ran out before a request was sent, at the proxy", 1), got)
	})
	t.Run("is not one", func(t *testing.T) {
		ssh, _ := rawServer(t, func(c net.Conn) {
			readRequest(c)
			_, _ = io.WriteString(c, "SSH-2.0-OpenSSH_9.6\r\n\r\n")
		})
		gone, _ := rawServer(t, func(net.Conn) {})
		const none = "http://127.0.0.1:1"
		var requests sync.WaitGroup
		for url, want := range map[string]string{ssh: notHTTP, gone: connectionClosed, none: "connection refused"} {
			setProxies(t, "HTTPS_PROXY="+strings.TrimSuffix(url, "/v2/auth/token"))
			c := newClientAt(t, nowhere)
			requests.Go(func() {
				_, got := throughProxy(t, c)
				unreachable(t, "connecting through the environment's proxy: "+want, 3, got)
			})
		}
		requests.Wait()
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
			"http://" + user + "?x@h/", "http://user:1/x@h:3128", "http://user:1#x@h:3128",
			"http://" + user + "%zz@h/", "http://" + user + "%@h/",
			"ftp://" + user + "@127.0.0.1:1/", "http:/proxy:3128", "http:proxy:3128", "http//proxy:3128", "http://",
			"http://proxy:99999", "http://proxy:", "://proxy", " http://proxy:3128", "http://proxy:3128/path", "p q",
			"http://pröxy:3128",
		} {
			for _, name := range []string{"HTTPS_PROXY", "https_proxy"} {
				_, got := throughEnvironment(t, nowhere, name+"="+value)
				unreachable(t, fmt.Sprintf(notAProxy, name), 1, got)
				var ready *Error
				if err := newClientAt(t, nowhere).Ready(); !errors.As(err, &ready) || ready.Detail != got.Detail {
					t.Errorf("before a call: %v, want %v", err, got)
				}
			}
			setProxies(t, "HTTPS_PROXY="+value, "NO_PROXY=10.0.0.0/8,.exempt")
			direct("https://127.0.0.1/")
			direct("https://localhost:1/")
			direct("https://10.1.2.3/")
			direct("https://api.exempt/")
		}
		setProxies(t)
		c := newClientAt(t, nowhere)
		if err := c.Ready(); err != nil {
			t.Error(err)
		}
		c.Pause().begin(time.Minute)
		var paused *Error
		if err := c.Ready(); !errors.As(err, &paused) || paused.Kind != Paused {
			t.Errorf("in a pause: %v", err)
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
		for _, host := range []string{"127.0.0.1", "localhost", "LOCALHOST"} {
			url, p := strings.Replace(srv.URL, "127.0.0.1", host, 1), newProxy(t, address)
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
