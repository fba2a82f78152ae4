// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Package outcome names how a token request ended, and decides the consequences.
//
// Each request ends with one [Outcome], a word that is the same in the log, the metrics and status. One table gives
// each word its HTTP status, its log level, and whether it counts as a failure. [Classify] is the one place that tells
// errors apart, and [Failure.Respond] the one that gives them a status.
//
// Vault's own clients repeat a request that got 429 or 5xx, so an error that lasts until an operator fixes its cause
// must be a 400. A 403 would read as a denial by policy.
package outcome

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
)

// Outcome is the word for how a token request ended.
type Outcome string

// The outcomes are a closed list.
const (
	Minted          Outcome = "minted"
	Reused          Outcome = "reused"            // the role's shared token was returned
	InvalidRequest  Outcome = "invalid_request"   // the engine refused the request before an API call
	KeyRejected     Outcome = "key_rejected"      // Cable responded 401
	RejectedByCable Outcome = "rejected_by_cable" // Cable responded with another 4xx
	RateLimited     Outcome = "rate_limited"      // Cable responded 429
	Paused          Outcome = "paused"            // no API call in the pause after a 429
	CableError      Outcome = "cable_error"       // Cable responded 5xx or 408
	Unreachable     Outcome = "unreachable"       // no connection to Cable, or it broke
	TimedOut        Outcome = "timed_out"         // the budget ran out
	Canceled        Outcome = "canceled"          // the caller left
	InvalidResponse Outcome = "invalid_response"  // the response contained no token that can be used
	GrantMismatch   Outcome = "grant_mismatch"    // Cable granted something other than requested
	VaultError      Outcome = "vault_error"       // Vault's storage or settings could not be read
)

// handling is the consequence of an outcome.
type handling struct {
	status  int         // HTTP status of the response
	level   hclog.Level // of the log line
	failure bool        // an operator may have to fix it, so status shows the last one
}

// handlings has the handling of each outcome. Outcomes that a healthy, busy node produces are logged at debug level.
//
// Another organization, or a scope that was not requested, is a GrantMismatch, and so a 502.
var handlings = map[Outcome]handling{
	Minted:          {http.StatusOK, hclog.Debug, false},
	Reused:          {http.StatusOK, hclog.Debug, false},
	InvalidRequest:  {http.StatusBadRequest, hclog.Debug, false},
	KeyRejected:     {http.StatusBadRequest, hclog.Warn, true},
	RejectedByCable: {http.StatusBadRequest, hclog.Warn, true},
	RateLimited:     {http.StatusTooManyRequests, hclog.Warn, true},
	Paused:          {http.StatusTooManyRequests, hclog.Debug, false},
	CableError:      {http.StatusBadGateway, hclog.Warn, true},
	Unreachable:     {http.StatusBadGateway, hclog.Warn, true},
	TimedOut:        {http.StatusGatewayTimeout, hclog.Warn, true},
	Canceled:        {http.StatusBadGateway, hclog.Debug, false},
	InvalidResponse: {http.StatusBadGateway, hclog.Error, true},
	GrantMismatch:   {http.StatusBadGateway, hclog.Error, true},
	VaultError:      {http.StatusInternalServerError, hclog.Error, true},
}

// Status returns the HTTP status of a response with this outcome.
func (o Outcome) Status() int { return handlings[o].status }

// Level returns the level of the outcome's log line.
func (o Outcome) Level() hclog.Level { return handlings[o].level }

// IsFailure reports whether an operator may have to fix the cause.
func (o Outcome) IsFailure() bool { return handlings[o].failure }

// All returns every outcome, in no order.
func All() []Outcome { return slices.Collect(maps.Keys(handlings)) }

// Token is an access token that was checked and may be returned.
type Token struct {
	*cable.Token
	SHA256   string        // of Value, in hexadecimal
	Granted  []string      // scopes, sorted
	Lease    time.Duration // whole seconds
	NoLease  bool          // the reader gets none, and reads again before it would have ended
	Lifetime time.Duration // as Cable granted it, in whole seconds
	IsLonger bool          // Cable granted over a minute more than requested
	Warnings []string
}

// ExpiresAt is the token's expiry in RFC 3339, UTC.
func (t *Token) ExpiresAt() string { return UnixTime(t.Expiry) }

// Refusal is an error that the caller or the operator has to fix. It becomes a 400 with this text.
type Refusal string

// Error implements error.
func (e Refusal) Error() string { return string(e) }

// Refuse returns a Refusal with a formatted text.
func Refuse(format string, args ...any) error { return Refusal(fmt.Sprintf(format, args...)) }

// Mismatch is the failure for a grant of something other than requested.
func Mismatch(text string) *Failure {
	return &Failure{Outcome: GrantMismatch, Message: text, Detail: text}
}

// Timeout is the error for a wait that ended without a result. It becomes a 504.
type Timeout string

// Error implements error.
func (e Timeout) Error() string { return string(e) }

// Is lets errors.Is treat a Timeout as any other deadline.
func (e Timeout) Is(target error) bool { return target == context.DeadlineExceeded }

// ErrBudget is the cause of a context that ends with request_timeout.
const ErrBudget = Timeout("request_timeout ran out while Vault's storage or settings were read")

// ErrChanged stops a token request whose settings have changed, before an API call is made with them. The request
// starts over.
var ErrChanged = errors.New("the settings have changed")

// Failure is a token request that ended without a token. It is classified once, and has everything that the response,
// the log and the metrics say of it. As an error its text is safe to show.
type Failure struct {
	Outcome Outcome
	Message string // for the caller
	Detail  string // for the log, without the advice for the caller
	Cause   error  // the original error

	CableStatus int           // HTTP status of Cable's response, 0 without one
	Attempts    int           // API calls made
	RetryAfter  time.Duration // of RateLimited and Paused
	Certificate bool          // Cable's certificate was refused
	Granted     *cable.Token  // the token that was refused, or nil

	// UndeliveredUntil is the Unix time until which an undelivered token may be valid, or 0 if there is none.
	UndeliveredUntil int64
}

// Error implements error.
func (f *Failure) Error() string { return f.Message }

// Unwrap lets errors.Is and errors.As find the cause.
func (f *Failure) Unwrap() error { return f.Cause }

// Classify makes a Failure of err, and returns nil for nil.
func Classify(err error) *Failure {
	if err == nil {
		return nil
	}
	if f, ok := errors.AsType[*Failure](err); ok {
		return f
	}
	if ce, ok := errors.AsType[*cable.Error](err); ok {
		return &Failure{
			Outcome:     ofCall(ce),
			Message:     ce.Error(),
			Detail:      ce.Detail,
			Cause:       err,
			CableStatus: ce.StatusCode,
			Attempts:    ce.Attempts,
			RetryAfter:  ce.RetryAfter,
			Certificate: ce.Certificate,
		}
	}
	f := &Failure{Outcome: VaultError, Message: err.Error(), Detail: err.Error(), Cause: err}
	_, isRefusal := errors.AsType[Refusal](err)
	switch {
	case isRefusal:
		f.Outcome = InvalidRequest
	case errors.Is(err, context.Canceled), status.Code(err) == codes.Canceled:
		f.Outcome = Canceled
	case errors.Is(err, context.DeadlineExceeded), status.Code(err) == codes.DeadlineExceeded:
		f.Outcome = TimedOut
	}
	return f
}

// ofCall names how an API call ended.
func ofCall(e *cable.Error) Outcome {
	switch e.Kind {
	case cable.Paused:
		return Paused
	case cable.Unreachable:
		return Unreachable
	case cable.TimedOut:
		return TimedOut
	case cable.Canceled:
		return Canceled
	case cable.InvalidResponse:
		return InvalidResponse
	}
	switch code := e.StatusCode; {
	case code == http.StatusUnauthorized:
		return KeyRejected
	case code == http.StatusTooManyRequests:
		return RateLimited
	case code == http.StatusRequestTimeout || code >= 500:
		return CableError
	default:
		return RejectedByCable
	}
}

// MeansDown reports whether the failure says that Cable, or the network, is down. A fault of the configuration does
// not, because it must not be hidden.
func (f *Failure) MeansDown() bool {
	switch f.Outcome {
	case CableError, RateLimited, Paused:
		return true
	case Unreachable:
		return !f.Certificate
	case TimedOut:
		return f.Attempts > 0
	default:
		return false
	}
}

// Undelivered notes that Cable may have issued a token that was not delivered, valid until the given Unix time.
func (f *Failure) Undelivered(until int64) {
	f.UndeliveredUntil = until
	f.Message += "; Cable may have issued a token that was not delivered, valid until " + UnixTime(until)
}

// Drop returns the failure for a token that Cable granted and the engine does not return because of err. The token
// counts as undelivered if the local clock or Cable's says that it is still valid.
func Drop(err error, token *cable.Token) *Failure {
	f := *Classify(err)
	if f.Outcome == GrantMismatch || f.Outcome == InvalidResponse {
		f.Message = "Cable's response was refused: " + f.Detail
	}
	f.CableStatus, f.Attempts, f.Granted = http.StatusOK, token.Attempts, token
	if token.Expiry > time.Now().Unix() || !token.Date.IsZero() && token.Expiry > token.Date.Unix() {
		f.Undelivered(token.Expiry)
	}
	return &f
}

// Respond gives the failure its HTTP status.
//
// NOTE: a status other than 400 and 500 survives the plugin boundary only in an unwrapped coded error. Vault inspects
// the text of storage errors, so those are returned unchanged.
func (f *Failure) Respond() (*logical.Response, error) {
	switch code := f.Outcome.Status(); code {
	case http.StatusBadRequest:
		return logical.ErrorResponse(f.Message), nil
	case http.StatusInternalServerError:
		return nil, f.Cause
	case http.StatusTooManyRequests:
		resp := &logical.Response{Headers: map[string][]string{
			"Retry-After": {strconv.FormatInt(WholeSeconds(f.RetryAfter), 10)},
		}}
		return resp, logical.CodedError(code, f.Message)
	default:
		return nil, logical.CodedError(code, f.Message)
	}
}

// WholeSeconds rounds a wait up, to at least one second.
func WholeSeconds(d time.Duration) int64 { return max(1, int64((d+time.Second-1)/time.Second)) }

// UnixTime formats a Unix time in seconds in RFC 3339, UTC.
func UnixTime(unix int64) string { return Time(time.Unix(unix, 0)) }

// Time formats a time in RFC 3339, UTC, and the zero time as "".
func Time(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}
