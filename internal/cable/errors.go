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
	"slices"
	"strings"
	"syscall"
	"time"
)

// Kind is the way in which a token request failed: a caller treats each
// differently.
type Kind int

const (
	// Responded means that Cable responded with an error status, in StatusCode.
	Responded Kind = iota + 1
	// Paused means that no API call was made, because of an earlier 429.
	Paused
	// Unreachable means that there was no connection, or that it ended before the
	// response was complete.
	Unreachable
	// InvalidResponse means that the response was refused: a 200 without a usable
	// token, or a status that is neither 200 nor an error.
	InvalidResponse
	// TimedOut means that the budget ran out, or that the caller's deadline passed.
	TimedOut
	// Canceled means that the caller left.
	Canceled
)

// String returns a stable lower-case name, for a log field or a label.
func (k Kind) String() string {
	switch k {
	case Responded:
		return "responded"
	case Paused:
		return "paused"
	case Unreachable:
		return "unreachable"
	case InvalidResponse:
		return "invalid_response"
	case TimedOut:
		return "timed_out"
	case Canceled:
		return "canceled"
	default:
		return "unknown"
	}
}

// Error says why a token request failed. Its text is safe to show: it contains
// no secret, no header and no raw body. Of Cable's response it contains only the
// envelope's message and errors, bounded, escaped, and with the refresh key
// redacted.
type Error struct {
	Kind Kind

	// StatusCode is the HTTP status of the response, or 0 if none arrived.
	StatusCode int

	// Detail is Cable's message, made safe to show, or what went wrong.
	Detail string

	// RetryAfter is the time until the pause ends, set if Kind is Paused, or
	// Responded with 429.
	RetryAfter time.Duration

	// MaybeIssued reports that Cable may have issued a token that was not
	// delivered: the request was sent, and no response shows that it was refused.
	MaybeIssued bool

	// Attempts counts the API calls.
	Attempts int

	// Certificate reports that Kind is Unreachable because the server's
	// certificate was refused: a fault of the configuration, not of the network.
	Certificate bool
}

// Error implements error.
func (e *Error) Error() string {
	switch e.Kind {
	case Responded:
		text := fmt.Sprintf("cable responded %d", e.StatusCode)
		if e.Detail != "" {
			text += ": " + e.Detail
		}
		return text
	case Paused:
		return fmt.Sprintf("paused after Cable's 429: no API call for another %ds", (e.RetryAfter+time.Second-1)/time.Second)
	case Unreachable:
		return "cable could not be reached: " + e.Detail
	case InvalidResponse:
		return "cable's response was refused: " + e.Detail
	case TimedOut:
		return "cable did not respond in time: " + e.Detail
	default:
		return "canceled: " + e.Detail
	}
}

// Is lets errors.Is find the context errors behind TimedOut and Canceled.
func (e *Error) Is(target error) bool {
	return e.Kind == TimedOut && target == context.DeadlineExceeded ||
		e.Kind == Canceled && target == context.Canceled
}

// describe says in words of this package why a call failed.
//
// NOTE: the texts of net/http are not used. They can contain a proxy's password
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
		prefix = "connecting through the environment's proxy: "
	}
	switch {
	case errors.As(err, &proxy):
		text = proxy.Error()
	case errors.As(err, &dns) && dns.IsNotFound:
		text = fmt.Sprintf("looking up %s: no such host", displayHost(dns.Name))
	case errors.As(err, &dns):
		text = fmt.Sprintf("looking up %s: the name server did not respond", displayHost(dns.Name))
	case errors.As(err, &unknownCA):
		text = "its certificate is signed by an unknown authority: set ca_cert to the authority's certificate"
	case errors.As(err, &badCert) && badCert.Reason == x509.Expired:
		text = "its certificate has expired or is not yet valid"
	case errors.As(err, &badCert):
		text = "its certificate is not valid for this use"
	case errors.As(err, &badHost):
		text = "its certificate is not valid for " + displayHost(badHost.Host)
	case errors.As(err, &badVerify):
		text = "its certificate could not be verified"
	case errors.As(err, &notTLS), says(err, "server gave HTTP response to HTTPS client"):
		text = "it does not speak TLS"
	case isOp && (op.Op == "remote error" || op.Op == "local error"): // how crypto/tls wraps its alerts
		text = "the TLS handshake failed: " + strings.TrimPrefix(op.Err.Error(), "tls: ")
	case errors.Is(err, errNotLoopback):
		text = errNotLoopback.Error()
	case isAny(err, syscall.ECONNREFUSED, wsaECONNREFUSED):
		text = "connection refused"
	case isAny(err, syscall.ENETUNREACH, syscall.EHOSTUNREACH, wsaENETUNREACH, wsaEHOSTUNREACH):
		text = "no route to the host"
	case isAny(err, wsaETIMEDOUT), isTimeout(err):
		text = "the connection timed out"
	case isAny(err, syscall.ECONNRESET, syscall.ECONNABORTED, syscall.EPIPE, wsaECONNRESET, wsaECONNABORTED),
		errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, errNoReplay),
		says(err, "server closed idle connection"), says(err, "stream error: "), says(err, "GOAWAY"), says(err, "http2: client connection lost"):
		text = "the connection was closed before the response was complete"
	default:
		text = "the connection broke off, or the response was not HTTP"
	}
	return prefix + text
}

// Windows reports these numbers of Winsock instead of the constants of package
// syscall, which there are Go's own. No other system uses them.
const (
	wsaENETUNREACH  = syscall.Errno(10051)
	wsaECONNABORTED = syscall.Errno(10053)
	wsaECONNRESET   = syscall.Errno(10054)
	wsaETIMEDOUT    = syscall.Errno(10060)
	wsaECONNREFUSED = syscall.Errno(10061)
	wsaEHOSTUNREACH = syscall.Errno(10065)
)

// isAny reports whether err is one of the system's error numbers.
func isAny(err error, numbers ...syscall.Errno) bool {
	var errno syscall.Errno
	return errors.As(err, &errno) && slices.Contains(numbers, errno)
}

// says reports whether err contains the text of an error that net/http does not
// export.
func says(err error, text string) bool { return strings.Contains(err.Error(), text) }

// proxyRefusal is the status with which a proxy refused a CONNECT.
type proxyRefusal int

// Error implements error.
func (s proxyRefusal) Error() string {
	return fmt.Sprintf("the environment's proxy refused to connect, with status %d", int(s))
}

// isTimeout reports that dialling, the TLS handshake or the network timed out.
func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}

// isCertificateError reports that the server's certificate was refused, which a
// retry would not change.
func isCertificateError(err error) bool {
	var verify *tls.CertificateVerificationError
	var unknownCA x509.UnknownAuthorityError
	return errors.As(err, &verify) || errors.As(err, &unknownCA)
}
