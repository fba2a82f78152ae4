// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"
)

const (
	maxRetries = 2                      // an API call is retried at most twice
	retryDelay = 100 * time.Millisecond // before the first retry, doubled for the second; jitter doubles it at most
	noRetry    = time.Duration(-1)
)

// request is one RequestToken over its API calls.
type request struct {
	TokenRequest
	client      *Client
	caller      context.Context // without the budget
	body        []byte
	calls       int
	rateLimited bool // Cable responded 429
}

// RequestToken requests an access token from Cable. It returns the token, an *Error, or the error of tr.Allow as it is.
// It takes at most the client's Timeout, less the time since tr.Start, and ends when ctx does.
func (c *Client) RequestToken(ctx context.Context, tr TokenRequest) (*Token, error) {
	defer func() { // after the response's body is closed, which is when a connection becomes idle
		if c.closed.Load() {
			c.transport.CloseIdleConnections()
		}
	}()
	body, err := json.Marshal(requestBody{
		ExpirySeconds: int64(tr.Lifetime / time.Second),
		Scopes:        scopesBody{OrganizationID: tr.OrganizationID, Scopes: tr.Scopes},
	})
	if err != nil {
		return nil, fmt.Errorf("encoding the request: %w", err)
	}
	if tr.Allow == nil {
		tr.Allow = func() error { return nil }
	}
	if now := time.Now(); tr.Start.IsZero() || tr.Start.After(now) {
		tr.Start = now
	}
	r := &request{TokenRequest: tr, client: c, caller: ctx, body: body}
	ctx, cancel := context.WithDeadline(ctx, tr.Start.Add(c.timeout))
	defer cancel()
	end, _ := ctx.Deadline() // the caller's, if that is earlier
	for {
		token, wait, err := r.call(ctx)
		if err == nil || wait == noRetry || r.calls > maxRetries {
			return token, err
		}
		// The jitter parts callers that failed together. A wait that could last to the end of the budget would hide how
		// Cable responded.
		jitterMax := retryDelay << (r.calls - 1)
		wait = max(wait, jitterMax)
		if wait+jitterMax >= time.Until(end) {
			return nil, err
		}
		if err := sleep(ctx, wait+jitter(jitterMax)); err != nil {
			return nil, r.failure(ctx, nil, false, err)
		}
	}
}

// retryAfter reads the header in both of its forms (RFC 9110, 10.2.3), seconds or a date, which is compared with the
// Date of the same response. It returns at most MaxLifetime.
func retryAfter(resp *http.Response) (time.Duration, bool) {
	text := strings.TrimSpace(resp.Header.Get("Retry-After"))
	if seconds, err := strconv.ParseUint(text, 10, 63); err == nil {
		return time.Duration(min(seconds, uint64(MaxLifetime/time.Second))) * time.Second, true
	}
	at, err := http.ParseTime(text)
	if err != nil {
		return 0, false
	}
	now := date(resp.Header)
	if now.IsZero() {
		now = time.Now()
	}
	return min(max(0, at.Sub(now)), MaxLifetime), true
}
