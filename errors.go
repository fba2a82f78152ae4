// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
)

// refusal is what the caller or the operator has to mend: a 400 with this text.
type refusal string

// Error implements error.
func (e refusal) Error() string { return string(e) }

// mintError is why a mint that was asked of Cable gave no token.
type mintError struct {
	role    string
	scheme  string // how the refresh key was sent
	cause   error  // an *cable.Error, or
	refused error  // what was wrong with the grant

	// maybeUntil is the Unix time until which a token may live at Cable that
	// nobody holds; 0 where none can have been minted.
	maybeUntil int64
}

// Error implements error. The text is safe to show.
func (e *mintError) Error() string {
	msg := ""
	if e.refused != nil {
		msg = "cable's answer was refused: " + e.refused.Error()
	} else {
		msg = e.cause.Error()
	}
	var ce *cable.Error
	if errors.As(e.cause, &ce) && ce.Kind == cable.Responded {
		switch ce.StatusCode {
		case http.StatusUnauthorized:
			other := authSchemeBearer
			if e.scheme == authSchemeBearer {
				other = authSchemeRaw
			}
			msg += fmt.Sprintf("; the refresh key was sent with auth_scheme=%s: write a valid refresh_key to config, or try auth_scheme=%s, as Cable's documents show both", e.scheme, other)
		case http.StatusForbidden, http.StatusBadRequest:
			msg += fmt.Sprintf("; check the organization and the scopes of roles/%s with Cable", e.role)
		case http.StatusNotFound:
			msg += "; check token_url in config"
		case http.StatusTooManyRequests:
			msg += fmt.Sprintf("; no request is sent for another %ds", retrySeconds(ce.RetryAfter))
		}
	}
	if e.maybeUntil > 0 {
		msg += fmt.Sprintf("; a token that nobody holds may live at Cable until %s", rfc3339(e.maybeUntil))
	}
	return msg
}

// Unwrap lets errors.As find the *cable.Error.
func (e *mintError) Unwrap() error { return e.cause }

// verifyError is a mint that failed for verify_role.
type verifyError struct {
	role  string
	cause error
}

// Error implements error.
func (e *verifyError) Error() string {
	return fmt.Sprintf("verify_role %q failed and nothing was stored: %s", e.role, e.cause)
}

// Unwrap lets errors.As find the cause.
func (e *verifyError) Unwrap() error { return e.cause }

// failed gives an error its status: the one place that does.
//
// NOTE: a status other than 400 and 500 crosses the plugin boundary only as a
// coded error that nothing is wrapped around. Vault's own clients repeat 429
// and 5xx twice, so what stays wrong until someone mends it must be a 400; and
// a 403 would read as a denial by policy.
func failed(err error) (*logical.Response, error) {
	var ce *cable.Error
	isCables := errors.As(err, &ce)
	switch o := outcomeOf(err); {
	case o == outcomeVaultFailed, o == outcomeCanceled && !isCables:
		return nil, err
	case o == outcomeRequestRefused, o == outcomeKeyRefused, o == outcomeCableRefused:
		return logical.ErrorResponse(err.Error()), nil
	case o == outcomeRateLimited, o == outcomeHeld:
		resp := &logical.Response{Headers: map[string][]string{
			"Retry-After": {strconv.FormatInt(retrySeconds(ce.RetryAfter), 10)},
		}}
		return resp, logical.CodedError(http.StatusTooManyRequests, err.Error())
	case o == outcomeTimedOut:
		return nil, logical.CodedError(http.StatusGatewayTimeout, err.Error())
	default:
		return nil, logical.CodedError(http.StatusBadGateway, err.Error())
	}
}

// retrySeconds rounds up, to at least one second.
func retrySeconds(d time.Duration) int64 {
	return max(1, int64((d+time.Second-1)/time.Second))
}
