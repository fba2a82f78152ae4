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

// Kind is the way in which a token request failed, each of which a caller treats differently.
type Kind int

const (
	// Responded means that Cable responded with an error status, in StatusCode.
	Responded Kind = iota + 1
	// Paused means that no API call was made, because of an earlier 429.
	Paused
	// Unreachable means that there was no connection, or that it ended before the response was complete.
	Unreachable
	// InvalidResponse means that the response was refused, a 200 without a usable token, or a status that is neither
	// 200 nor an error.
	InvalidResponse
	// TimedOut means that the budget ran out, or that the caller's deadline passed.
	TimedOut
	// Canceled means that the caller left.
	Canceled
)

// String returns a stable lower-case name, for a log field or a label.
func (k Kind) String() string {
	name, ok := map[Kind]string{
		Responded: "responded", Paused: "paused", Unreachable: "unreachable", InvalidResponse: "invalid_response",
		TimedOut: "timed_out", Canceled: "canceled",
	}[k]
	if !ok {
		return "unknown"
	}
	return name
}

// Error says why a token request failed. Its text is safe to show, because it contains no secret and no raw body. Of
// Cable's response it contains only the envelope's message and errors, and the name of a coding, bounded, escaped, and
// with the refresh key redacted.
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
	case Unreachable:
		return "Cable could not be reached: " + e.Detail
	case InvalidResponse:
		return "Cable's response was refused: " + e.Detail
	case TimedOut:
		return "Cable did not respond in time: " + e.Detail
	default:
		return "canceled: " + e.Detail
	}
}

// Is lets errors.Is find the context errors behind TimedOut and Canceled.
func (e *Error) Is(target error) bool {
	return e.Kind == TimedOut && target == context.DeadlineExceeded ||
		e.Kind == Canceled && target == context.Canceled
}

// describe says in words of this package why a call failed at a stage.
//
// NOTE: the texts of net/http are not used, because they can contain a proxy's password or the first line of the
// response.
func describe(err error, stage string) string {
	var op *net.OpError
	isOp := errors.As(err, &op)
	prefix := ""
	if stage == atProxy || isOp && op.Op == "proxyconnect" {
		prefix = "connecting through the environment's proxy: "
	}
	var (
		dns     *net.DNSError
		notTLS  tls.RecordHeaderError
		refused refusedByProxy
		name    badProxy
		text    string
	)
	switch {
	case errors.As(err, &refused):
		return refused.Error()
	case errors.As(err, &name):
		return name.Error()
	case errors.As(err, &dns) && dns.IsNotFound:
		text = fmt.Sprintf("looking up %s: no such host", displayHost(dns.Name))
	case errors.As(err, &dns):
		text = fmt.Sprintf("looking up %s: the name server did not respond", displayHost(dns.Name))
	case stage != atResponse && isCertificateError(err):
		text = describeCertificate(err)
	case isAlert(err, 120), says(err, "unadvertised ALPN protocol"), says(err, `malformed HTTP response "\x00\x00`):
		text = "it does not speak HTTP/1.1, and HTTP/2 is not supported"
	case errors.As(err, &notTLS), says(err, "server gave HTTP response to HTTPS client"):
		text = "it does not speak TLS"
	case isOp && (op.Op == "remote error" || op.Op == "local error"): // how crypto/tls wraps its alerts
		text = "the TLS handshake failed: "
		if stage == atResponse {
			text = "the TLS connection failed: "
		}
		text += strings.TrimPrefix(op.Err.Error(), "tls: ")
	case says(err, "server response headers exceeded"):
		text = fmt.Sprintf("the head of its response is larger than %d bytes", maxHeader)
	case errors.Is(err, errNotLoopback):
		text = errNotLoopback.Error()
	case isAny(err, syscall.ECONNREFUSED, wsaECONNREFUSED):
		text = "connection refused"
	case isAny(err, syscall.ENETUNREACH, syscall.EHOSTUNREACH, wsaENETUNREACH, wsaEHOSTUNREACH):
		text = "no route to the host"
	case (isAny(err, wsaETIMEDOUT) || isTimeout(err)) && stage == atTLS:
		text = "the TLS handshake timed out"
	case isAny(err, wsaETIMEDOUT) || isTimeout(err):
		text = "the connection timed out"
	case isAny(err, syscall.ECONNRESET, syscall.ECONNABORTED, syscall.EPIPE, wsaECONNRESET, wsaECONNABORTED),
		errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed), says(err, errIdle):
		text = "the connection was closed before the response was complete"
		if stage == atTLS {
			text = "the connection was closed in the TLS handshake"
		}
	case stage == atTLS:
		text = "the TLS handshake failed"
	case isOp && op.Op == "socks connect":
		text = "it could not connect"
	default:
		text = "the connection broke off, or the response was not HTTP"
	}
	return prefix + text
}

// errIdle is the text of net/http's error for a connection that the server closed before a call was written to it.
const errIdle = "server closed idle connection"

// describeCertificate says why there is no connection because of a certificate.
func describeCertificate(err error) string {
	var (
		unknownCA x509.UnknownAuthorityError
		invalid   x509.CertificateInvalidError
		host      x509.HostnameError
		verify    *tls.CertificateVerificationError
		alert     *net.OpError
	)
	switch {
	case isCertificateAlert(err) && errors.As(err, &alert):
		return fmt.Sprintf("it refused the TLS handshake (%s): client certificates are not supported",
			strings.TrimPrefix(alert.Err.Error(), "tls: "))
	case errors.As(err, &unknownCA):
		return "its certificate is signed by an unknown authority: set ca_cert to the authority's certificate"
	case errors.As(err, &invalid):
		text := "its certificate"
		if errors.As(err, &verify) && !verify.UnverifiedCertificates[0].Equal(invalid.Cert) {
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
	case says(err, unparsed):
		return "its certificate cannot be parsed"
	default:
		return "its certificate could not be verified"
	}
}

// Winsock's error numbers. On Windows the network returns these, not the constants of package syscall, which are Go's
// own there. No other system uses them.
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

// says reports whether err contains the text of an error that net/http does not export.
func says(err error, text string) bool { return strings.Contains(err.Error(), text) }

// isTimeout reports that dialling, the TLS handshake or the network timed out.
func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}

// isAlert reports whether err is one of these alerts of TLS, sent by the server.
//
// NOTE: crypto/tls does not export the type of an alert, only its text.
func isAlert(err error, alerts ...tls.AlertError) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error" &&
		slices.ContainsFunc(alerts, func(a tls.AlertError) bool { return a.Error() == op.Err.Error() })
}

// errNoCertificate is joined to the error of a handshake that failed after the server requested a certificate.
var errNoCertificate = errors.New("the server requested a client certificate")

// isCertificateAlert reports that the server refused the certificate of the client, which has none (bad, unsupported,
// revoked, expired or unknown certificate, unknown authority, certificate required; RFC 8446, 6). With TLS 1.2 some
// servers send a mere handshake failure.
func isCertificateAlert(err error) bool {
	return isAlert(err, 42, 43, 44, 45, 46, 48, 116) || isAlert(err, 40) && errors.Is(err, errNoCertificate)
}

// unparsed begins the text of crypto/tls's error for a server's certificate that cannot be parsed.
const unparsed = "tls: failed to parse certificate from server"

// isCertificateError reports that a certificate was refused, or the lack of one, which a retry would not change. It is
// true of errors of the handshake only.
func isCertificateError(err error) bool {
	var verify *tls.CertificateVerificationError
	return errors.As(err, &verify) || says(err, unparsed) || isCertificateAlert(err)
}

// isPermanent reports a fault of the configuration, which a retry would not change.
func isPermanent(e *Error, err error) bool {
	var name badProxy
	return e.Certificate || errors.Is(err, errNotLoopback) || errors.As(err, &name)
}
