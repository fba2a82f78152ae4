// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptrace"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// exchange follows one RequestToken over its attempts. It travels in the
// request's context, because that is all that a round trip and a repeat share.
type exchange struct {
	attempts int
	refused  int // the status of the last attempt that was refused for now
	sentAt   time.Time
	out      atomic.Bool // bytes may have gone out, and no answer says that they were refused
}

type exchangeKey struct{}

// trace returns ctx with ex in it, told by net/http when there is a connection.
func (ex *exchange) trace(ctx context.Context) context.Context {
	ctx = context.WithValue(ctx, exchangeKey{}, ex)
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		// net/http looks for another connection only if nothing went out on one.
		GetConn: func(string) { ex.out.Store(false) },
		GotConn: func(httptrace.GotConnInfo) { ex.out.Store(true) },
	})
}

// roundTripper notes when each attempt was sent, and begins the hold.
//
// NOTE: it does not embed the transport. retryablehttp closes the idle
// connections of a client after each failure, and would find the method to do
// so; under load that would make every other request reconnect.
type roundTripper struct {
	base    *http.Transport
	hold    *Pause
	observe func(Call)
}

// RoundTrip implements [http.RoundTripper].
func (t roundTripper) RoundTrip(req *http.Request) (*http.Response, error) {
	ex, ok := req.Context().Value(exchangeKey{}).(*exchange)
	if !ok {
		return nil, errors.New("a request that is not RequestToken's")
	}
	ex.attempts++
	ex.out.Store(false)
	ex.sentAt = time.Now()
	resp, err := t.base.RoundTrip(req)
	call := Call{Duration: time.Since(ex.sentAt), Retry: ex.attempts > 1}
	defer func() { t.observe(call) }()
	if err != nil {
		return nil, err
	}
	call.StatusCode = resp.StatusCode
	switch status := resp.StatusCode; {
	case status >= 300 && status < 400:
		// Nobody follows it, but http.Client would fail on one it cannot read.
		resp.Header.Del("Location")
		ex.out.Store(false)
	case status >= 400 && status < 500 && status != http.StatusRequestTimeout || status == http.StatusServiceUnavailable:
		// NOTE: a 408 or another 5xx does not say that nothing was minted: it may
		// be the word of a gateway that lost the answer.
		ex.out.Store(false)
		ex.refused = status
	}
	if resp.StatusCode == http.StatusTooManyRequests {
		wait, ok := retryAfter(resp)
		if !ok {
			wait = defaultHold
		}
		call.PauseBegan = t.hold.begin(wait)
	}
	return resp, nil
}

// checkRepeat says whether the request may be sent again: only where nothing
// can have been minted, and where the wait fits the budget.
func checkRepeat(ctx context.Context, resp *http.Response, err error) (bool, error) {
	if err == nil && resp.StatusCode != http.StatusTooManyRequests && resp.StatusCode != http.StatusServiceUnavailable {
		return false, nil
	}
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	ex, ok := ctx.Value(exchangeKey{}).(*exchange)
	var wait time.Duration
	if err != nil {
		ok = ok && !ex.out.Load() && !isCertificateError(err) && !errors.Is(err, errNotLoopback)
	} else if ok {
		wait, ok = retryAfter(resp)
	}
	if !ok {
		return false, nil
	}
	// What repeatWait says can be longer by this: a wait that ran into the end of
	// the budget would hide what Cable had answered.
	deadline, bounded := ctx.Deadline()
	return !bounded || wait+repeatDelay<<ex.attempts < time.Until(deadline), nil
}

// repeatWait is the time before repeat n (0, 1): what Cable named, else a short
// growing one; with jitter, so that callers that failed together part.
func repeatWait(n int, resp *http.Response) time.Duration {
	wait := repeatDelay << n
	if resp != nil {
		if named, ok := retryAfter(resp); ok {
			wait = max(wait, named)
		}
	}
	return wait + jitter(repeatDelay<<n)
}

// retryAfter reads the header in both of its forms (RFC 9110, 10.2.3): seconds,
// or a date, which is taken against the Date of the same answer.
func retryAfter(resp *http.Response) (time.Duration, bool) {
	text := strings.TrimSpace(resp.Header.Get("Retry-After"))
	if seconds, err := strconv.ParseUint(text, 10, 63); err == nil {
		return time.Duration(min(seconds, uint64(MaxLifetime/time.Second))) * time.Second, true
	}
	at, err := http.ParseTime(text)
	if err != nil {
		return 0, false
	}
	now := date(resp)
	if now.IsZero() {
		now = time.Now()
	}
	return min(max(0, at.Sub(now)), MaxLifetime), true
}
