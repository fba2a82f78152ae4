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
	"strings"
	"syscall"
	"time"
)

// Kind says how a request for a token failed: each is something that a caller
// does something else about.
type Kind int

const (
	// Responded means that Cable answered with a status other than 200, in StatusCode.
	Responded Kind = iota + 1
	// Paused means that Cable was not called, because an earlier 429 asked for silence.
	Paused
	// Unreachable means no connection, or one that broke before the answer was whole.
	Unreachable
	// InvalidResponse means that Cable answered 200 with something that is no token, or
	// with a redirect, or with more than it may.
	InvalidResponse
	// TimedOut means that the request's budget ran out.
	TimedOut
	// Canceled means that the caller went away.
	Canceled
)

// String returns a stable lower-case name, fit for a log field or a label.
func (k Kind) String() string {
	switch k {
	case Responded:
		return "answered"
	case Paused:
		return "held"
	case Unreachable:
		return "unreachable"
	case InvalidResponse:
		return "invalid_answer"
	case TimedOut:
		return "timed_out"
	case Canceled:
		return "canceled"
	default:
		return "unknown"
	}
}

// Error is why no token came. Its text is safe to show: it holds no secret, no
// header and no raw body; of Cable's answer only the envelope's message and
// errors, bounded, escaped, and with the refresh key redacted.
type Error struct {
	Kind Kind

	// StatusCode is Cable's HTTP status, or 0 where none came.
	StatusCode int

	// Detail is the cleaned text: what Cable wrote, or what went wrong.
	Detail string

	// RetryAfter is how long nobody is to call Cable: set when Kind is Paused, or
	// Responded with 429.
	RetryAfter time.Duration

	// MaybeIssued reports that the request had gone out and that no answer
	// shows that it was refused: a token may exist that nobody holds.
	MaybeIssued bool

	// Attempts counts the calls made to Cable.
	Attempts int
}

// Error implements error.
func (e *Error) Error() string {
	switch e.Kind {
	case Responded:
		msg := fmt.Sprintf("cable answered %d", e.StatusCode)
		if e.Detail != "" {
			msg += ": " + e.Detail
		}
		return msg
	case Paused:
		return fmt.Sprintf("cable asked for a pause (429): no request is sent for another %ds", (e.RetryAfter+time.Second-1)/time.Second)
	case Unreachable:
		return "cable could not be reached: " + e.Detail
	case InvalidResponse:
		return "cable's answer was refused: " + e.Detail
	case TimedOut:
		return "cable did not answer in time: " + e.Detail
	default:
		return "the request to cable was given up: " + e.Detail
	}
}

// Is lets errors.Is find the context errors behind TimedOut and Canceled.
func (e *Error) Is(target error) bool {
	return e.Kind == TimedOut && target == context.DeadlineExceeded ||
		e.Kind == Canceled && target == context.Canceled
}

// describe says what went wrong on the way, in words of our own.
//
// NOTE: the texts of net/http are not used. They can hold a proxy's password
// or the first line of what the other side sent.
func describe(err error) string {
	var (
		dns       *net.DNSError
		unknownCA x509.UnknownAuthorityError
		badCert   x509.CertificateInvalidError
		badHost   x509.HostnameError
		badVerify *tls.CertificateVerificationError
		notTLS    tls.RecordHeaderError
		proxy     proxyRefusal
		op        *net.OpError
	)
	isOp := errors.As(err, &op)
	prefix, text := "", ""
	if isOp && op.Op == "proxyconnect" {
		prefix = "connecting through the proxy of the environment: "
	}
	switch {
	case errors.As(err, &proxy):
		text = proxy.Error()
	case errors.As(err, &dns) && dns.IsNotFound:
		text = fmt.Sprintf("looking up the host %q: no such host", dns.Name)
	case errors.As(err, &dns):
		text = fmt.Sprintf("looking up the host %q: the name server did not answer", dns.Name)
	case errors.As(err, &unknownCA):
		text = "its certificate is signed by an unknown authority: set ca_cert to the authority's certificate"
	case errors.As(err, &badCert) && badCert.Reason == x509.Expired:
		text = "its certificate has expired or is not yet valid"
	case errors.As(err, &badCert):
		text = "its certificate is not valid for this use"
	case errors.As(err, &badHost):
		text = fmt.Sprintf("its certificate is not valid for the host %q", badHost.Host)
	case errors.As(err, &badVerify):
		text = "its certificate could not be verified"
	case errors.As(err, &notTLS), says(err, "server gave HTTP response to HTTPS client"):
		text = "it does not speak TLS"
	case isOp && (op.Op == "remote error" || op.Op == "local error"): // how crypto/tls wraps its alerts
		text = "the TLS handshake failed: " + strings.TrimPrefix(op.Err.Error(), "tls: ")
	case errors.Is(err, errNotLoopback):
		text = errNotLoopback.Error()
	case errors.Is(err, syscall.ECONNREFUSED):
		text = "connection refused"
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE),
		errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF),
		says(err, "server closed idle connection"), says(err, "stream error: "), says(err, "http2: server sent GOAWAY"), says(err, "http2: client connection lost"):
		text = "the connection was closed before the answer was whole"
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH):
		text = "no route to the host"
	case isTimeout(err):
		text = "connecting took too long"
	default:
		text = "the exchange broke off or was not HTTP"
	}
	return prefix + text
}

// says looks for the errors that net/http keeps to itself.
func says(err error, text string) bool { return strings.Contains(err.Error(), text) }

// proxyRefusal is the status with which a proxy refused a CONNECT.
type proxyRefusal int

// Error implements error.
func (s proxyRefusal) Error() string {
	return fmt.Sprintf("the proxy of the environment refused to connect, with status %d", int(s))
}

// isTimeout reports a time-out of the dialer or of the TLS handshake.
func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}

// isCertificateError reports that the peer's certificate was refused, which no
// repeat mends.
func isCertificateError(err error) bool {
	var verify *tls.CertificateVerificationError
	var unknownCA x509.UnknownAuthorityError
	return errors.As(err, &verify) || errors.As(err, &unknownCA)
}
