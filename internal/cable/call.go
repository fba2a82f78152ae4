// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
)

// call makes one API call. If it returns an error, wait is the least time until
// the call may be retried, or noRetry.
func (r *request) call(ctx context.Context) (token *Token, wait time.Duration, err error) {
	c := r.client
	endTurn, err := c.turn(ctx)
	if err != nil {
		return nil, noRetry, r.failure(ctx, false, err)
	}
	defer endTurn()
	if err := r.Allow(); err != nil {
		return nil, noRetry, err
	}
	callCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	p := &permit{allow: r.Allow, cancel: cancel, body: r.body}
	r.calls++
	sentAt := time.Now()
	resp, err := c.transport.RoundTrip(r.httpRequest(callCtx, p))
	if err == nil {
		defer func() { _ = resp.Body.Close() }()
	}
	sent, refusal := p.end()
	if refusal != nil {
		return nil, noRetry, refusal
	}
	call := Call{Duration: elapsed(sentAt, time.Now()), Retry: r.calls > 1}
	wait = noRetry
	if err != nil {
		c.observe(call)
		if !sent && ctx.Err() == nil && !isCertificateError(err) && !errors.Is(err, errNotLoopback) {
			wait = 0
		}
		return nil, wait, r.failure(ctx, sent, err)
	}
	call.StatusCode = resp.StatusCode
	if resp.StatusCode == http.StatusTooManyRequests {
		r.rateLimited = true
		pause, ok := retryAfter(resp)
		if ok {
			wait = pause
		} else {
			pause = defaultPause
		}
		call.PauseBegan = c.pause.begin(pause)
	}
	c.observe(call)
	if resp.StatusCode != http.StatusOK {
		return nil, wait, r.failed(resp.StatusCode, sent, readErrorBody(resp, cancel))
	}

	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxBody+1))
	receivedAt := time.Now()
	if err != nil {
		return nil, noRetry, r.failure(ctx, sent, err)
	}
	token, err = c.decode(raw, r.TokenRequest)
	if err == nil {
		token.Date, err = cableClock(resp.Header, call.Duration)
	}
	if err == nil && !sent {
		err = errors.New("it arrived before the request was sent")
	}
	if err != nil {
		return nil, noRetry, &Error{Kind: InvalidResponse, StatusCode: resp.StatusCode, Detail: err.Error(), MaybeIssued: sent, Attempts: r.calls}
	}
	token.SentAt, token.ReceivedAt, token.Attempts = sentAt, receivedAt, r.calls
	return token, noRetry, nil
}

// turn waits until an API call may be made: after a pause, for its share of the
// spread; and while maxConns calls are under way, for one of them to end. The
// caller ends the turn.
func (c *Client) turn(ctx context.Context) (end func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := c.pause.check(); err != nil {
		return nil, err
	}
	if err := c.pause.spread(ctx); err != nil {
		return nil, err
	}
	select {
	case c.turns <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if err := c.pause.check(); err != nil { // another call may have begun a pause
		<-c.turns
		return nil, err
	}
	return func() { <-c.turns }, nil
}

// httpRequest is the request of one API call, whose body p guards.
func (r *request) httpRequest(ctx context.Context, p *permit) *http.Request {
	body, _ := p.newBody() // fails for a second body only
	req := &http.Request{
		Method: http.MethodPost,
		URL:    r.client.url,
		Host:   r.client.url.Host,
		Header: http.Header{
			"Authorization": {r.client.auth.Reveal()},
			"Content-Type":  {"application/json"},
			"Accept":        {"application/json"},
			"Cache-Control": {"no-store"},
			"User-Agent":    {r.client.userAgent},
		},
		Body:          body,
		GetBody:       p.newBody,
		ContentLength: int64(len(r.body)),
	}
	return req.WithContext(p.trace(ctx))
}

// readErrorBody reads the body of an error response as far as it arrives within
// errorBodyTimeout: the status is worth more than Cable's words. The call's
// context ends with cancel.
func readErrorBody(resp *http.Response, cancel context.CancelFunc) []byte {
	if resp.StatusCode < 400 {
		// NOTE: the body of a 101 is the bare connection, and a read of it would
		// not end with the context.
		return nil
	}
	defer time.AfterFunc(errorBodyTimeout, cancel).Stop()
	raw, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody+1))
	return raw
}

// failed returns the error for a response other than 200.
func (r *request) failed(status int, sent bool, raw []byte) *Error {
	refused := status >= 400 && status < 500 && status != http.StatusRequestTimeout
	e := &Error{Kind: Responded, StatusCode: status, MaybeIssued: sent && !refused, Attempts: r.calls}
	if status >= 400 {
		e.Detail = r.client.envelope(raw)
	} else {
		e.Kind = InvalidResponse
		e.Detail = fmt.Sprintf("its status is %d instead of 200", status)
		if status >= 300 {
			e.Detail += ", and redirects are not followed: check token_url"
		}
	}
	if status == http.StatusTooManyRequests {
		e.RetryAfter = r.client.pause.Remaining()
	}
	return e
}

// failure returns the error for a call without a response. ctx is the caller's
// with the budget.
func (r *request) failure(ctx context.Context, sent bool, err error) *Error {
	var paused *Error
	if errors.As(err, &paused) {
		paused.Attempts = r.calls
		return paused
	}
	e := &Error{Kind: Unreachable, Detail: describe(err), MaybeIssued: sent, Attempts: r.calls, Certificate: isCertificateError(err)}
	when := "before a request was sent"
	if sent {
		when = "after the request was sent"
	} else if r.rateLimited {
		when = "after cable responded 429"
	}
	switch {
	case errors.Is(r.caller.Err(), context.Canceled):
		e.Kind, e.Detail = Canceled, "the caller left "+when
	case r.caller.Err() != nil:
		e.Kind, e.Detail = TimedOut, "the caller's deadline passed "+when
	case ctx.Err() != nil:
		e.Kind, e.Detail = TimedOut, fmt.Sprintf("the budget of %s ran out %s", r.client.timeout, when)
	}
	return e
}

// elapsed returns the time between two local times, by the clock that advanced
// more: the monotonic one stops while the machine sleeps.
func elapsed(from, to time.Time) time.Duration {
	return max(to.Sub(from), to.Round(0).Sub(from.Round(0)))
}
