// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestErrorText pins the text of each kind, and which context error it is.
func TestErrorText(t *testing.T) {
	t.Parallel()
	const paused = "paused after Cable's 429: no API call for another 5s"
	for _, tt := range []struct {
		err               Error
		kind, text        string
		canceled, timeout bool
	}{
		{responded(401, ""), "responded", "Cable responded 401", false, false},
		{responded(401, "unauthorized"), "responded", "Cable responded 401: unauthorized", false, false},
		{Error{Kind: Paused, RetryAfter: 4001 * time.Millisecond}, "paused", paused, false, false},
		{Error{Kind: Paused, RetryAfter: 5 * time.Second}, "paused", paused, false, false},
		{Error{Kind: Unreachable, Detail: "d"}, "unreachable", "Cable could not be reached: d", false, false},
		{invalid(200, "d"), "invalid_response", "Cable's response was refused: d", false, false},
		{Error{Kind: TimedOut, Detail: "d"}, "timed_out", "Cable did not respond in time: d", false, true},
		{Error{Kind: Canceled, Detail: "d"}, "canceled", "canceled: d", true, false},
	} {
		err := fmt.Errorf("wrapped: %w", &tt.err)
		if got := tt.err.Kind.String(); got != tt.kind {
			t.Errorf("kind %q, want %q", got, tt.kind)
		}
		if got := err.Error(); got != "wrapped: "+tt.text {
			t.Errorf("got %q, want %q", got, tt.text)
		}
		if errors.Is(err, context.Canceled) != tt.canceled || errors.Is(err, context.DeadlineExceeded) != tt.timeout ||
			errors.Is(err, http.ErrServerClosed) {
			t.Errorf("%s: errors.Is finds the wrong error", tt.kind)
		}
	}
}

// TestDescribe pins the words for the errors of a network, those of Windows included, and that a host with the shape of
// a secret is not repeated.
func TestDescribe(t *testing.T) {
	t.Parallel()
	const secretHost = "sk-live-0123456789abcdef"
	errno := func(op string, number syscall.Errno) error {
		return &net.OpError{Op: op, Net: "tcp", Err: os.NewSyscallError("syscall", number)}
	}
	op := func(op string) error { return &net.OpError{Op: op, Err: errors.New("tls: bad record")} }
	const hidden = "looking up a host of 24 characters: "
	dial := func(number syscall.Errno) error { return errno("dial", number) }
	otherHost := x509.HostnameError{Host: secretHost, Certificate: &x509.Certificate{
		DNSNames: []string{"a"}, IPAddresses: []net.IP{net.IPv4zero},
	}}
	for _, tt := range []struct {
		want string
		errs []error
	}{
		{refused, []error{dial(syscall.ECONNREFUSED), dial(10061)}},
		{"connecting through the environment's proxy: " + refused, []error{errno("proxyconnect", 10061)}},
		{noRoute, []error{dial(syscall.ENETUNREACH), dial(10051), dial(syscall.EHOSTUNREACH), dial(10065)}},
		{timedOut, []error{dial(syscall.ETIMEDOUT), dial(10060)}},
		{closed, []error{
			errno("read", syscall.ECONNRESET), errno("read", 10054), errno("read", syscall.ECONNABORTED),
			errno("write", 10053), errno("write", syscall.EPIPE), io.EOF, io.ErrUnexpectedEOF, net.ErrClosed,
			errors.New("http: server closed idle connection"),
		}},
		{timedOut, []error{os.ErrDeadlineExceeded}},
		{notHTTP, []error{errors.New("anything else"), dial(9999), op("read")}},
		{"it could not connect", []error{op("socks connect")}},
		{"it does not speak TLS", []error{errors.New("http: server gave HTTP response to HTTPS client")}},
		{
			"it does not speak HTTP/1.1, and HTTP/2 is not supported",
			[]error{errors.New("tls: server selected unadvertised ALPN protocol")},
		},
		{"the TLS handshake failed", []error{errors.New("anything else")}},
		{"the TLS handshake failed: bad record", []error{op("local error"), op("remote error")}},
		{
			"the TLS handshake failed: bad certificate",
			[]error{&net.OpError{Op: "local error", Err: tls.AlertError(42)}},
		},
		{"the TLS handshake timed out", []error{os.ErrDeadlineExceeded}},
		{"the connection was closed in the TLS handshake", []error{io.EOF}},
		{"looking up api.example.com: no such host", []error{&net.DNSError{Name: "api.example.com", IsNotFound: true}}},
		{hidden + "no such host", []error{&net.DNSError{Name: secretHost, IsNotFound: true}}},
		{hidden + "the name server did not respond", []error{&net.DNSError{Name: secretHost, IsTimeout: true}}},
		{
			"its certificate is not valid for a host of 24 characters",
			[]error{&tls.CertificateVerificationError{Err: otherHost}},
		},
	} {
		for _, err := range tt.errs {
			p := progress{stage: atConnect}
			if strings.Contains(tt.want, "certificate") || strings.Contains(tt.want, "TLS handshake") {
				p.stage = atTLS
			}
			if got, _ := describe(fmt.Errorf("wrapped: %w", err), p); got != tt.want {
				t.Errorf("%v: %q, want %q", err, got, tt.want)
			}
		}
	}
	alert := func(a tls.AlertError) error { return &net.OpError{Op: "remote error", Err: a} }
	if isCertificateAlert(alert(40), false) || !isCertificateAlert(alert(40), true) ||
		isCertificateAlert(alert(70), true) {
		t.Error("a handshake failure, and no other alert, is a refused certificate if one was requested")
	}
	for _, stage := range []string{atResponse, atHead} {
		text, _ := describe(op("remote error"), progress{stage: stage})
		if text != "the TLS connection failed: bad record" {
			t.Errorf("%s: %q", stage, text)
		}
	}
	if text, _ := describe(errors.New(secretHost), progress{stage: atResponse}); strings.Contains(text, secretHost) {
		t.Errorf("%q repeats a text of net/http", text)
	}
}
