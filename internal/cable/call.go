// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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
	body, _ := json.Marshal(map[string]any{ // numbers and strings always marshal
		"expiry_seconds": int64(tr.Lifetime / time.Second),
		"scopes":         scopesBody{OrganizationID: tr.OrganizationID, Scopes: tr.Scopes},
	})
	if tr.Allow == nil {
		tr.Allow = func() error { return nil }
	}
	if now := time.Now(); tr.Start.IsZero() || tr.Start.After(now) {
		tr.Start = now
	}
	r := &request{TokenRequest: tr, client: c, caller: ctx, body: body}
	ctx, cancel := context.WithDeadline(ctx, tr.Start.Add(c.timeout))
	defer cancel()
	return r.run(ctx)
}

// run makes API calls until one brings a token or must not be retried. ctx is the caller's with the budget.
func (r *request) run(ctx context.Context) (*Token, error) {
	end, _ := ctx.Deadline() // the caller's, if that is earlier
	for {
		token, wait, err := r.call(ctx)
		if wait == noRetry || r.calls > maxRetries {
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
			return nil, r.failure(ctx, progress{stage: atTurn}, err)
		}
	}
}

// call makes one API call. If it returns an error, wait is the least time until the call may be retried, or noRetry.
func (r *request) call(ctx context.Context) (token *Token, wait time.Duration, err error) {
	c := r.client
	if err = c.turn(ctx); err != nil {
		return nil, noRetry, r.failure(ctx, progress{stage: atTurn}, err)
	}
	defer func() { <-c.turns }()
	if err = r.Allow(); err != nil {
		return nil, noRetry, err
	}
	callCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	x := &exchange{request: r, progress: progress{stage: atTurn}}
	r.calls++
	sentAt := time.Now()
	// Redirects are not followed, because RoundTrip follows none. So the refresh key is sent to one host.
	resp, err := c.transport.RoundTrip(x.httpRequest(callCtx))
	if err == nil {
		defer func() { _ = resp.Body.Close() }()
	}
	p, refusal := x.end(err != nil)
	if refusal != nil {
		return nil, noRetry, refusal
	}
	call := Call{Duration: Elapsed(sentAt, time.Now()), Retry: r.calls > 1}
	if err != nil {
		c.observe(call)
		e := r.failure(ctx, p, err)
		var known *knownError
		isPermanent := e.Certificate || errors.As(err, &known) && known.permanent
		if e.MaybeIssued || ctx.Err() != nil || isPermanent {
			return nil, noRetry, e
		}
		return nil, 0, e
	}
	call.StatusCode, p.stage, wait = resp.StatusCode, atResponse, noRetry // the head of the response is complete
	if resp.StatusCode == http.StatusTooManyRequests {
		r.rateLimited = true
		pause, ok := retryAfter(resp.Header)
		if ok {
			wait = pause
		} else {
			pause = defaultPause
		}
		call.PauseBegan = c.pause.begin(pause)
	}
	c.observe(call)
	if resp.StatusCode != http.StatusOK {
		return nil, wait, r.failed(resp, p.sent, cancel)
	}
	var raw []byte
	if err = checkCoding(c.redactor, resp.Header); err == nil {
		if raw, err = io.ReadAll(io.LimitReader(resp.Body, maxBody+1)); err != nil {
			return nil, noRetry, r.failure(ctx, p, err)
		}
	}
	receivedAt := time.Now()
	if err == nil {
		token, err = c.decode(raw, r.TokenRequest)
	}
	if err == nil {
		token.Date, err = cableClock(resp.Header, call.Duration)
	}
	if err == nil && !p.sent {
		err = errors.New("it arrived before the request was sent")
	}
	if err != nil {
		return nil, noRetry, r.invalid(resp.StatusCode, p.sent, err.Error())
	}
	token.SentAt, token.ReceivedAt, token.Attempts = sentAt, receivedAt, r.calls
	return token, noRetry, nil
}

// turn waits until an API call may be made. After a pause it waits for its share of the spread, and while maxConns
// calls are under way, for one of them to end. The caller ends the turn by a receive from c.turns.
func (c *Client) turn(ctx context.Context) error {
	mayCall := func() error { return cmp.Or(ctx.Err(), c.pause.check()) }
	err := mayCall()
	if err == nil {
		err = c.pause.spread(ctx)
	}
	if err != nil {
		return err
	}
	select {
	case c.turns <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	if err = mayCall(); err != nil { // another call may have begun a pause
		<-c.turns
	}
	return err
}

// failed returns the error for a response other than 200, whose body it reads if that arrives whole within
// errorBodyTimeout, because the status is worth more than Cable's words. The call's context ends with cancel.
func (r *request) failed(resp *http.Response, sent bool, cancel context.CancelFunc) *Error {
	status := resp.StatusCode
	if status < 400 {
		// NOTE: the body of a 101 is the bare connection, and a read of it would not end with the context.
		detail := fmt.Sprintf("its status is %d instead of 200", status)
		if status >= 300 {
			detail += ", and redirects are not followed: check token_url"
		}
		return r.invalid(status, sent, detail)
	}
	refused := status < 500 && status != http.StatusRequestTimeout
	e := &Error{Kind: Responded, StatusCode: status, MaybeIssued: sent && !refused, Attempts: r.calls}
	defer time.AfterFunc(errorBodyTimeout, cancel).Stop()
	if raw, err := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody+1)); err == nil {
		e.Detail = r.client.errorDetail(raw)
	}
	if status == http.StatusTooManyRequests {
		e.RetryAfter = r.client.pause.Remaining()
	}
	return e
}

// invalid returns the error for a response that is refused.
func (r *request) invalid(status int, sent bool, detail string) *Error {
	return &Error{Kind: InvalidResponse, StatusCode: status, Detail: detail, MaybeIssued: sent, Attempts: r.calls}
}

// failure returns the error for a call without a response, which came as far as p.
func (r *request) failure(ctx context.Context, p progress, err error) *Error {
	var paused *Error
	if errors.As(err, &paused) {
		paused.Attempts = r.calls
		return paused
	}
	if p.early && isCertificateAlert(err, p.asked) {
		p.sent, p.stage = false, atTLS // with TLS 1.3 a server refuses a client after the client's first bytes
	}
	e := &Error{Kind: Unreachable, MaybeIssued: p.sent, Attempts: r.calls}
	e.Detail, e.Certificate = describe(err, p)
	when := "before a request was sent"
	if p.sent {
		when = "after the request was sent"
	} else if r.rateLimited {
		when = "after Cable responded 429"
	}
	switch {
	case errors.Is(r.caller.Err(), context.Canceled):
		e.Kind, e.Detail = Canceled, "the caller left "+when
	case r.caller.Err() != nil:
		e.Kind, e.Detail = TimedOut, fmt.Sprintf("the caller's deadline passed %s, %s", when, p.stage)
	case ctx.Err() != nil:
		e.Kind, e.Detail = TimedOut, fmt.Sprintf("the budget of %s ran out %s, %s", r.client.timeout, when, p.stage)
	}
	return e
}

// retryAfter reads the header in both of its forms (RFC 9110, 10.2.3), seconds or a date by the clock of the response.
// It returns at most MaxLifetime.
func retryAfter(header http.Header) (time.Duration, bool) {
	text := strings.TrimSpace(header.Get("Retry-After"))
	if seconds, err := strconv.ParseUint(text, 10, 63); err == nil {
		return time.Duration(min(seconds, uint64(MaxLifetime/time.Second))) * time.Second, true
	}
	at, err := http.ParseTime(text)
	if err != nil {
		return 0, false
	}
	now := date(header)
	if now.IsZero() {
		now = time.Now()
	}
	return min(max(0, at.Sub(now)), MaxLifetime), true
}

// Elapsed returns the time between two local times, by the clock that advanced more, because the monotonic one stops
// while the machine sleeps.
func Elapsed(from, to time.Time) time.Duration {
	return max(to.Sub(from), to.Round(0).Sub(from.Round(0)))
}
