// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"cmp"
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

// Kind is the way in which a token request failed, each of which a caller treats differently.
type Kind int

// Kinds of failure.
const (
	Responded       Kind = iota + 1 // Cable responded with an error status, in StatusCode
	Paused                          // no API call was made, because of an earlier 429
	Unreachable                     // there was no connection, or it ended before the response was complete
	InvalidResponse                 // a 200 without a usable token, or a status that is neither 200 nor an error
	TimedOut                        // the budget ran out, or the caller's deadline passed
	Canceled                        // the caller left
)

// kinds has the name of each Kind, and the beginning of its errors' text.
var kinds = map[Kind][2]string{
	Responded:       {"responded", ""},
	Paused:          {"paused", ""},
	Unreachable:     {"unreachable", "Cable could not be reached: "},
	InvalidResponse: {"invalid_response", "Cable's response was refused: "},
	TimedOut:        {"timed_out", "Cable did not respond in time: "},
	Canceled:        {"canceled", "canceled: "},
}

// String returns a stable lower-case name, for a log field or a label.
func (k Kind) String() string { return cmp.Or(kinds[k][0], "unknown") }

// Error says why a token request failed. Its text is safe to show. Of Cable's response it contains only the envelope's
// message and errors, and the name of a coding, bounded, escaped, and with the refresh key redacted.
type Error struct {
	Kind       Kind
	StatusCode int           // of the response, or 0 if none arrived
	Detail     string        // Cable's message, made safe to show, or the fault
	RetryAfter time.Duration // until the pause ends, set if Kind is Paused, or Responded with 429
	Attempts   int           // API calls

	// MaybeIssued reports that Cable may have issued a token that was not delivered, because the request was sent, and
	// no response shows that it was refused.
	MaybeIssued bool

	// Certificate reports that Kind is Unreachable because the server's certificate was refused, or because the server
	// refused a client without one. It is a fault of the configuration, not of the network.
	Certificate bool
}

// Error implements error.
func (e *Error) Error() string {
	switch e.Kind {
	case Responded:
		return strings.TrimSuffix(fmt.Sprintf("Cable responded %d: %s", e.StatusCode, e.Detail), ": ")
	case Paused:
		seconds := (e.RetryAfter + time.Second - 1) / time.Second
		return fmt.Sprintf("paused after Cable's 429: no API call for another %ds", seconds)
	default:
		return kinds[e.Kind][1] + e.Detail
	}
}

// Is lets errors.Is find the context errors behind TimedOut and Canceled.
func (e *Error) Is(target error) bool {
	return e.Kind == TimedOut && target == context.DeadlineExceeded ||
		e.Kind == Canceled && target == context.Canceled
}

// knownError is an error of this package inside net/http's. Its text is safe to show. A permanent one is a fault of the
// configuration, which a retry would not change.
type knownError struct {
	text      string
	permanent bool
}

// Error implements error.
func (e *knownError) Error() string { return e.text }

// describe says in words of this package why a call failed that came as far as p, and whether because of a certificate.
//
// NOTE: the texts of net/http are not used, because they can contain a proxy's password or the first line of the
// response.
func describe(err error, p progress) (text string, certificate bool) {
	var (
		op     *net.OpError
		dns    *net.DNSError
		notTLS tls.RecordHeaderError
		errno  syscall.Errno
		known  *knownError
		slow   interface{ Timeout() bool }
	)
	if errors.As(err, &known) {
		return known.text, false
	}
	isOp := errors.As(err, &op)
	text = describeCertificate(err, p.asked)
	certificate = p.stage == atTLS && text != ""
	switch {
	case certificate:
	case errors.As(err, &dns) && dns.IsNotFound:
		text = fmt.Sprintf("looking up %s: no such host", displayHost(dns.Name))
	case errors.As(err, &dns):
		text = fmt.Sprintf("looking up %s: the name server did not respond", displayHost(dns.Name))
	case isAlert(err, 120), says(err, "unadvertised ALPN protocol"), says(err, `malformed HTTP response "\x00\x00`):
		text = "it does not speak HTTP/1.1, and HTTP/2 is not supported"
	case errors.As(err, &notTLS), says(err, "server gave HTTP response to HTTPS client"):
		text = "it does not speak TLS"
	case isOp && (op.Op == "remote error" || op.Op == "local error"): // how crypto/tls wraps its alerts
		text = "the TLS handshake failed: "
		if p.stage == atResponse || p.stage == atHead {
			text = "the TLS connection failed: "
		}
		text += strings.TrimPrefix(op.Err.Error(), "tls: ")
	case says(err, "server response headers exceeded"):
		text = fmt.Sprintf("the head of its response is larger than %d bytes", maxHeader)
	case errors.As(err, &errno) && networkErrors[errno] != "":
		text = networkErrors[errno]
	case errors.As(err, &slow) && slow.Timeout():
		text = timedOut
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed),
		says(err, "server closed idle connection"): // before a call was written to it
		text = closed
	case p.stage == atTLS:
		text = "the TLS handshake failed"
	case isOp && op.Op == "socks connect":
		text = "it could not connect"
	default:
		text = "the connection broke off, or the response was not HTTP"
	}
	if p.stage == atTLS && text == timedOut {
		text = "the TLS handshake timed out"
	} else if p.stage == atTLS && text == closed {
		text = "the connection was closed in the TLS handshake"
	}
	if p.stage == atProxy || isOp && op.Op == "proxyconnect" {
		text = "connecting through the environment's proxy: " + text
	}
	return text, certificate
}

const (
	refused  = "connection refused"
	noRoute  = "no route to the host"
	timedOut = "the connection timed out"
	closed   = "the connection was closed before the response was complete"
)

// networkErrors describes the errors of a network by their numbers. Those above 10000 are Winsock's, which Windows
// returns in place of the constants of package syscall, and no other system uses.
var networkErrors = map[syscall.Errno]string{
	syscall.ECONNREFUSED: refused, 10061: refused,
	syscall.ENETUNREACH: noRoute, 10051: noRoute, syscall.EHOSTUNREACH: noRoute, 10065: noRoute,
	syscall.ETIMEDOUT: timedOut, 10060: timedOut,
	syscall.ECONNRESET: closed, 10054: closed, syscall.ECONNABORTED: closed, 10053: closed, syscall.EPIPE: closed,
}

// describeCertificate says why a handshake failed because of a certificate, or the lack of one, which a retry would not
// change. It returns "" for any other reason.
func describeCertificate(err error, asked bool) string {
	var (
		verify    *tls.CertificateVerificationError
		unknownCA x509.UnknownAuthorityError
		invalid   x509.CertificateInvalidError
		host      x509.HostnameError
		alert     *net.OpError
	)
	switch {
	case isCertificateAlert(err, asked) && errors.As(err, &alert):
		return fmt.Sprintf("it refused the TLS handshake (%s): client certificates are not supported",
			strings.TrimPrefix(alert.Err.Error(), "tls: "))
	case says(err, "tls: failed to parse certificate from server"):
		return "its certificate cannot be parsed"
	case !errors.As(err, &verify):
		return ""
	case errors.As(err, &unknownCA):
		return "its certificate is signed by an unknown authority: set ca_cert to the authority's certificate"
	case errors.As(err, &invalid):
		text := "its certificate"
		if !verify.UnverifiedCertificates[0].Equal(invalid.Cert) {
			text = "the certificate of an authority in its chain"
		}
		if invalid.Reason == x509.Expired {
			return text + " has expired or is not yet valid"
		}
		return text + " is not valid for this use"
	case errors.As(err, &host) && len(host.Certificate.DNSNames)+len(host.Certificate.IPAddresses) == 0:
		return "its certificate has no subject alternative name for a host: a common name alone is not accepted"
	case errors.As(err, &host):
		return "its certificate is not valid for " + displayHost(host.Host)
	default:
		return "its certificate could not be verified"
	}
}

// says reports whether err contains the text of an error that net/http or crypto/tls does not export.
func says(err error, text string) bool { return strings.Contains(err.Error(), text) }

// isAlert reports whether err is one of these alerts of TLS, sent by the server.
//
// NOTE: crypto/tls does not export the type of an alert, only its text.
func isAlert(err error, alerts ...tls.AlertError) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error" &&
		slices.ContainsFunc(alerts, func(a tls.AlertError) bool { return a.Error() == op.Err.Error() })
}

// isCertificateAlert reports that the server refused the certificate of the client, which has none (bad, unsupported,
// revoked, expired or unknown certificate, unknown authority, certificate required; RFC 8446, 6). With TLS 1.2 some
// servers send a mere handshake failure after they asked for one.
func isCertificateAlert(err error, asked bool) bool {
	return isAlert(err, 42, 43, 44, 45, 46, 48, 116) || asked && isAlert(err, 40)
}
