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

// call makes one API call. If it returns an error, wait is the least time until the call may be retried, or noRetry.
func (r *request) call(ctx context.Context) (token *Token, wait time.Duration, err error) {
	c := r.client
	endTurn, err := c.turn(ctx)
	if err != nil {
		return nil, noRetry, r.failure(ctx, nil, false, err)
	}
	defer endTurn()
	if err := r.Allow(); err != nil {
		return nil, noRetry, err
	}
	callCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	x := newExchange(r.Allow, r.body, c.proxied)
	r.calls++
	sentAt := time.Now()
	// Redirects are not followed, because RoundTrip follows none. So the refresh key is sent to one host.
	resp, err := c.transport.RoundTrip(r.httpRequest(callCtx, x))
	if err == nil {
		defer func() { _ = resp.Body.Close() }()
	}
	sent, refusal := x.end(err != nil)
	if refusal != nil {
		return nil, noRetry, refusal
	}
	call := Call{Duration: Elapsed(sentAt, time.Now()), Retry: r.calls > 1}
	wait = noRetry
	if err != nil {
		c.observe(call)
		e := r.failure(ctx, x, sent, err)
		if !e.MaybeIssued && ctx.Err() == nil && !isPermanent(e, err) {
			wait = 0
		}
		return nil, wait, e
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
		raw, whole := readErrorBody(resp, cancel)
		return nil, wait, r.failed(resp.StatusCode, sent, raw, whole)
	}

	if coding := contentCoding(resp.Header); coding != "" {
		detail := "its Content-Encoding is " + c.redactor.show(coding, maxCoding) + ", but only identity was accepted"
		return nil, noRetry, r.invalid(resp.StatusCode, sent, detail)
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxBody+1))
	receivedAt := time.Now()
	if err != nil {
		return nil, noRetry, r.failure(ctx, x, sent, err)
	}
	token, err = c.decode(raw, r.TokenRequest)
	if err == nil {
		token.Date, err = cableClock(resp.Header, call.Duration)
	}
	if err == nil && !sent {
		err = errors.New("it arrived before the request was sent")
	}
	if err != nil {
		return nil, noRetry, r.invalid(resp.StatusCode, sent, err.Error())
	}
	token.SentAt, token.ReceivedAt, token.Attempts = sentAt, receivedAt, r.calls
	return token, noRetry, nil
}

// turn waits until an API call may be made. After a pause it waits for its share of the spread, and while maxConns
// calls are under way, for one of them to end. The caller ends the turn.
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
	end = func() { <-c.turns }
	if err = ctx.Err(); err == nil {
		err = c.pause.check() // another call may have begun one
	}
	if err != nil {
		end()
		return nil, err
	}
	return end, nil
}

// httpRequest is the request of one API call, whose body x guards.
func (r *request) httpRequest(ctx context.Context, x *exchange) *http.Request {
	req := &http.Request{
		Method: http.MethodPost,
		URL:    r.client.url,
		Host:   r.client.url.Host,
		Header: http.Header{
			"Authorization":   {r.client.auth.Reveal()},
			"Content-Type":    {"application/json"},
			"Accept":          {"application/json"},
			"Accept-Encoding": {"identity"}, // responses are small, and a bomb is never unpacked
			"Cache-Control":   {"no-store"},
			"User-Agent":      {r.client.userAgent},
		},
		Body:          io.NopCloser(x.body),
		ContentLength: int64(len(r.body)),
	}
	return req.WithContext(x.trace(ctx))
}

// readErrorBody reads the body of an error response as far as it arrives within errorBodyTimeout, because the status is
// worth more than Cable's words, and returns whether it arrived whole. The call's context ends with cancel.
func readErrorBody(resp *http.Response, cancel context.CancelFunc) (raw []byte, whole bool) {
	if resp.StatusCode < 400 {
		// NOTE: the body of a 101 is the bare connection, and a read of it would not end with the context.
		return nil, false
	}
	defer time.AfterFunc(errorBodyTimeout, cancel).Stop()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody+1))
	return raw, err == nil
}

// failed returns the error for a response other than 200.
func (r *request) failed(status int, sent bool, raw []byte, whole bool) *Error {
	if status < 400 {
		detail := fmt.Sprintf("its status is %d instead of 200", status)
		if status >= 300 {
			detail += ", and redirects are not followed: check token_url"
		}
		return r.invalid(status, sent, detail)
	}
	refused := status < 500 && status != http.StatusRequestTimeout
	e := &Error{Kind: Responded, StatusCode: status, MaybeIssued: sent && !refused, Attempts: r.calls}
	if whole {
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

// failure returns the error for a call without a response. ctx is the caller's with the budget; x is nil if the call
// has not begun.
func (r *request) failure(ctx context.Context, x *exchange, sent bool, err error) *Error {
	var paused *Error
	if errors.As(err, &paused) {
		paused.Attempts = r.calls
		return paused
	}
	stage, early := atTurn, false
	if x != nil {
		stage, early, err = x.state(err)
	}
	if early && isCertificateAlert(err) {
		sent, stage = false, atTLS // with TLS 1.3 a server refuses a client after the client's first bytes
	}
	e := &Error{Kind: Unreachable, Detail: describe(err, stage), MaybeIssued: sent, Attempts: r.calls}
	e.Certificate = !sent && isCertificateError(err)
	when := "before a request was sent"
	if sent {
		when = "after the request was sent"
	} else if r.rateLimited {
		when = "after Cable responded 429"
	}
	switch {
	case errors.Is(r.caller.Err(), context.Canceled):
		e.Kind, e.Detail = Canceled, "the caller left "+when
	case r.caller.Err() != nil:
		e.Kind, e.Detail = TimedOut, fmt.Sprintf("the caller's deadline passed %s, %s", when, stage)
	case ctx.Err() != nil:
		e.Kind, e.Detail = TimedOut, fmt.Sprintf("the budget of %s ran out %s, %s", r.client.timeout, when, stage)
	}
	return e
}

// Elapsed returns the time between two local times, by the clock that advanced more, because the monotonic one stops
// while the machine sleeps.
func Elapsed(from, to time.Time) time.Duration {
	return max(to.Sub(from), to.Round(0).Sub(from.Round(0)))
}
