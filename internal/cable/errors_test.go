// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
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
	for _, tt := range []struct {
		err               Error
		kind, text        string
		canceled, timeout bool
	}{
		{Error{Kind: Responded, StatusCode: 401}, "responded", "Cable responded 401", false, false},
		{
			Error{Kind: Responded, StatusCode: 401, Detail: "unauthorized"},
			"responded",
			"Cable responded 401: unauthorized",
			false,
			false,
		},
		{
			Error{Kind: Paused, RetryAfter: 4001 * time.Millisecond},
			"paused",
			"paused after Cable's 429: no API call for another 5s",
			false,
			false,
		},
		{Error{Kind: Unreachable, Detail: "d"}, "unreachable", "Cable could not be reached: d", false, false},
		{
			Error{Kind: InvalidResponse, StatusCode: 200, Detail: "d"},
			"invalid_response",
			"Cable's response was refused: d",
			false,
			false,
		},
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
	for _, tt := range []struct {
		err  error
		want string
	}{
		{errno("dial", syscall.ECONNREFUSED), "connection refused"},
		{errno("dial", 10061), "connection refused"},
		{errno("proxyconnect", 10061), "connecting through the environment's proxy: connection refused"},
		{errno("dial", syscall.ENETUNREACH), "no route to the host"},
		{errno("dial", 10051), "no route to the host"},
		{errno("dial", syscall.EHOSTUNREACH), "no route to the host"},
		{errno("dial", 10065), "no route to the host"},
		{errno("dial", syscall.ETIMEDOUT), "the connection timed out"},
		{errno("dial", 10060), "the connection timed out"},
		{errno("read", syscall.ECONNRESET), connectionClosed},
		{errno("read", 10054), connectionClosed},
		{errno("read", syscall.ECONNABORTED), connectionClosed},
		{errno("write", 10053), connectionClosed},
		{errno("write", syscall.EPIPE), connectionClosed},
		{errors.New("anything else"), notHTTP},
		{&net.DNSError{Name: "api.example.com", IsNotFound: true}, "looking up api.example.com: no such host"},
		{&net.DNSError{Name: secretHost, IsNotFound: true}, "looking up a host of 24 characters: no such host"},
		{
			&net.DNSError{Name: secretHost, IsTimeout: true},
			"looking up a host of 24 characters: the name server did not respond",
		},
		{
			verification(x509.HostnameError{Host: secretHost, Certificate: &x509.Certificate{DNSNames: []string{"a"}}}),
			"its certificate is not valid for a host of 24 characters",
		},
	} {
		p := progress{stage: atConnect}
		if strings.Contains(tt.want, "certificate") {
			p.stage = atTLS
		}
		if got, _ := describe(fmt.Errorf("wrapped: %w", tt.err), p); got != tt.want {
			t.Errorf("%v: %q, want %q", tt.err, got, tt.want)
		}
	}
	if text, _ := describe(errors.New(secretHost), progress{stage: atResponse}); strings.Contains(text, secretHost) {
		t.Errorf("%q repeats a text of net/http", text)
	}
}

// verification wraps err as crypto/tls does.
func verification(err error) error { return &tls.CertificateVerificationError{Err: err} }
