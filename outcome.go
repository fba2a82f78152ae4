// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
)

// outcome says in one stable word how a token request ended: the same word in
// the log, metrics, status and events.
type outcome string

const (
	outcomeMinted          outcome = "minted"
	outcomeReused          outcome = "reused"            // the role's shared token was returned
	outcomeInvalidRequest  outcome = "invalid_request"   // refused by the engine, before Cable was called
	outcomeKeyRejected     outcome = "key_rejected"      // Cable responded 401
	outcomeRejectedByCable outcome = "rejected_by_cable" // another 4xx
	outcomeRateLimited     outcome = "rate_limited"      // 429
	outcomePaused          outcome = "paused"            // not sent, in the pause after a 429
	outcomeCableError      outcome = "cable_error"       // 5xx, or 408
	outcomeUnreachable     outcome = "unreachable"
	outcomeTimedOut        outcome = "timed_out"
	outcomeCanceled        outcome = "canceled"         // the caller left
	outcomeInvalidResponse outcome = "invalid_response" // not what Cable documents
	outcomeGrantMismatch   outcome = "grant_mismatch"   // not what was requested
	outcomeVaultError      outcome = "vault_error"      // Vault's storage or settings could not be read
)

// handling is what follows from an outcome.
type handling struct {
	status  int         // the HTTP status of the response
	level   hclog.Level // of the log line
	failure bool        // something that an operator may have to fix: status keeps the last one
}

// outcomes has the handling of each outcome.
//
// Vault's own clients repeat 429 and 5xx, so what stays wrong until someone
// fixes it must be a 400; and a 403 would read as a denial by policy. A busy
// node can see the outcomes at debug level a hundred times a second without
// anything being wrong with it.
var outcomes = map[outcome]handling{
	outcomeMinted:          {http.StatusOK, hclog.Debug, false},
	outcomeReused:          {http.StatusOK, hclog.Debug, false},
	outcomeInvalidRequest:  {http.StatusBadRequest, hclog.Debug, false},
	outcomeKeyRejected:     {http.StatusBadRequest, hclog.Warn, true},
	outcomeRejectedByCable: {http.StatusBadRequest, hclog.Warn, true},
	outcomeRateLimited:     {http.StatusTooManyRequests, hclog.Warn, true},
	outcomePaused:          {http.StatusTooManyRequests, hclog.Debug, false},
	outcomeCableError:      {http.StatusBadGateway, hclog.Warn, true},
	outcomeUnreachable:     {http.StatusBadGateway, hclog.Warn, true},
	outcomeTimedOut:        {http.StatusGatewayTimeout, hclog.Warn, true},
	outcomeCanceled:        {http.StatusBadGateway, hclog.Debug, false},
	outcomeInvalidResponse: {http.StatusBadGateway, hclog.Error, true},
	outcomeGrantMismatch:   {http.StatusBadGateway, hclog.Error, true},
	outcomeVaultError:      {http.StatusInternalServerError, hclog.Error, true},
}

// refusal is what the caller or the operator has to fix: a 400 with this text.
type refusal string

// Error implements error.
func (e refusal) Error() string { return string(e) }

// errBudget ends the context of a token request whose request_timeout ran out.
var errBudget = errors.New("request_timeout ran out while Vault's storage or settings were read")

// failure is a token request that ended without a token, classified once, with
// all that the response, the log, the metrics and the events say of it. As an
// error its text is safe to show.
type failure struct {
	outcome outcome
	message string // for the caller
	detail  string // for the log: what went wrong, without the hints for the caller
	cause   error  // as it was met

	cableStatus int           // the HTTP status of Cable's response, 0 without one
	attempts    int           // API calls made
	retryAfter  time.Duration // of rate_limited and paused
	certificate bool          // Cable's certificate was refused

	// undeliveredUntil is the Unix time until which a token may be valid that
	// Cable issued and nobody received; 0 if there can be none.
	undeliveredUntil int64
}

// Error implements error.
func (f *failure) Error() string { return f.message }

// Unwrap lets errors.Is and errors.As find the cause.
func (f *failure) Unwrap() error { return f.cause }

// classify makes a failure of an error: the one place that tells errors apart.
// It returns nil for nil.
func classify(err error) *failure {
	if err == nil {
		return nil // the common case, before what errors.As needs is allocated
	}
	var (
		f       *failure
		ce      *cable.Error
		refused refusal
	)
	switch {
	case errors.As(err, &f):
		return f
	case errors.As(err, &refused):
		return &failure{outcome: outcomeInvalidRequest, message: err.Error(), detail: err.Error(), cause: err}
	case errors.As(err, &ce):
		return &failure{
			outcome: outcomeOf(ce), message: ce.Error(), detail: ce.Detail, cause: err,
			cableStatus: ce.StatusCode, attempts: ce.Attempts, retryAfter: ce.RetryAfter, certificate: ce.Certificate,
		}
	}
	f = &failure{outcome: outcomeVaultError, message: err.Error(), detail: err.Error(), cause: err}
	switch {
	case errors.Is(err, context.Canceled), status.Code(err) == codes.Canceled:
		f.outcome = outcomeCanceled
	case errors.Is(err, errBudget), errors.Is(err, context.DeadlineExceeded), status.Code(err) == codes.DeadlineExceeded:
		f.outcome = outcomeTimedOut
	}
	return f
}

// outcomeOf names how an API call ended.
func outcomeOf(e *cable.Error) outcome {
	switch e.Kind {
	case cable.Paused:
		return outcomePaused
	case cable.Unreachable:
		return outcomeUnreachable
	case cable.TimedOut:
		return outcomeTimedOut
	case cable.Canceled:
		return outcomeCanceled
	case cable.InvalidResponse:
		return outcomeInvalidResponse
	}
	switch code := e.StatusCode; {
	case code == http.StatusUnauthorized:
		return outcomeKeyRejected
	case code == http.StatusTooManyRequests:
		return outcomeRateLimited
	case code == http.StatusRequestTimeout || code >= 500:
		return outcomeCableError
	default:
		return outcomeRejectedByCable
	}
}

// undelivered notes that Cable may have issued a token that nobody received,
// valid until then.
func (f *failure) undelivered(until int64) {
	f.undeliveredUntil = until
	f.message += "; Cable may have issued a token that was not delivered, valid until " + rfc3339(until)
}

// respond gives the failure its HTTP status.
//
// NOTE: a status other than 400 and 500 crosses the plugin boundary only as a
// coded error that nothing is wrapped around. Vault reads the text of storage
// errors, so these leave as they came.
func (f *failure) respond() (*logical.Response, error) {
	switch code := outcomes[f.outcome].status; code {
	case http.StatusBadRequest:
		return logical.ErrorResponse(f.message), nil
	case http.StatusInternalServerError:
		return nil, f.cause
	case http.StatusTooManyRequests:
		resp := &logical.Response{Headers: map[string][]string{
			"Retry-After": {strconv.FormatInt(wholeSeconds(f.retryAfter), 10)},
		}}
		return resp, logical.CodedError(code, f.message)
	default:
		return nil, logical.CodedError(code, f.message)
	}
}

// wholeSeconds rounds a wait up, to at least one second.
func wholeSeconds(d time.Duration) int64 {
	return max(1, int64((d+time.Second-1)/time.Second))
}

// rfc3339 formats a Unix time in seconds, in UTC.
func rfc3339(unix int64) string { return timestamp(time.Unix(unix, 0)) }

// timestamp formats a time in RFC 3339, UTC, and none as "".
func timestamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

// showSeconds formats a number of seconds that a caller wrote. A longer one than
// anything allowed is not repeated: it may be something else.
func showSeconds(n int64) string {
	const most = 9_999_999
	if n > most || n < -most {
		return fmt.Sprintf("more than %ds", most)
	}
	return fmt.Sprintf("%ds", n)
}
