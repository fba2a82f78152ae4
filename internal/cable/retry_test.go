// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// TestRetryOverNetwork pins that a retry succeeds once Cable does, on the same connection. The other tests of retries
// need no network.
func TestRetryOverNetwork(t *testing.T) {
	t.Parallel()
	const date = "Sun, 31 Mar 2024 23:00:00 GMT"
	for _, fault := range []cabletest.Fault{
		rateLimit(1, "0"),
		{Status: 429, Times: 1, Header: map[string]string{"Retry-After": date, "Date": date}},
		{Status: 429, Times: 1, Header: map[string]string{"Retry-After": "0"}, Stall: time.Hour},
	} {
		srv := cabletest.NewServer(t, nil)
		srv.SetFault(fault)
		if got := mustMint(t, newClient(t, srv, Config{})); got.Attempts != 2 {
			t.Errorf("%d attempts, want 2", got.Attempts)
		}
		checkCounts(t, srv, 2, 1)
		if n := srv.Connections(); fault.Stall == 0 && n != 1 {
			t.Errorf("%d connections, want 1", n)
		}
	}
}

// TestRetries pins which Retry-After of a 429 fits the budget, how often and after which time the call is then retried,
// and that it can succeed.
func TestRetries(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name       string
		retryAfter string
		timeout    time.Duration
		attempts   int
		wait       time.Duration // at least, before each retry
	}{
		{"now", "0", 20 * time.Second, 3, retryDelay},
		{"soon", "3", 20 * time.Second, 3, 3 * time.Second},
		{"once only", "12", 20 * time.Second, 2, 12 * time.Second},
		{"just in time", "19", 20 * time.Second, 2, 19 * time.Second},
		{"at the end", "20", 20 * time.Second, 1, 0},
		{"beyond", "60", 20 * time.Second, 1, 0},
		{"unreadable", "soon", 20 * time.Second, 1, 0},
		{"none", "", 20 * time.Second, 1, 0},
		{"no time for a third call", "0", 500 * time.Millisecond, 2, retryDelay},
		{"no time for a second call", "0", 200 * time.Millisecond, 1, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				sim, c := newMemory(t, Config{Timeout: tt.timeout})
				sim.SetFault(rateLimit(0, tt.retryAfter))
				want := responded(429, "Too Many Requests")
				want.Attempts = tt.attempts
				diffError(t, want, mustFail(t, t.Context(), c))
				calls := sim.Calls()
				if len(calls) != tt.attempts {
					t.Fatalf("%d calls, want %d", len(calls), tt.attempts)
				}
				for i := range calls[1:] {
					if wait := calls[i+1].Time.Sub(calls[i].Time); wait < tt.wait ||
						wait > tt.wait+2*retryDelay<<i+pauseSpread {
						t.Errorf("retry %d after %s, want %s and some jitter", i+1, wait, tt.wait)
					}
				}
				if tt.attempts == 1 {
					return
				}
				time.Sleep(time.Hour)
				sim.Reset()
				sim.SetFault(rateLimit(tt.attempts-1, tt.retryAfter))
				if token := mustMint(t, c); token.Attempts != tt.attempts || len(sim.Minted()) != 1 {
					t.Errorf("%d attempts after %d calls", token.Attempts, sim.CallCount())
				}
			})
		})
	}
}

// TestRetryAfter pins how the header is read, as seconds, or a date by the clock of the response, which may be years
// off.
func TestRetryAfter(t *testing.T) {
	t.Parallel()
	const date = "Sun, 31 Mar 2024 23:00:00 GMT"
	const later, far = "Sun, 31 Mar 2024 23:01:00 GMT", "Fri, 31 Dec 9999 23:59:59 GMT"
	for _, tt := range []struct {
		text, date string
		want       time.Duration // negative if it cannot be read
	}{
		{"0", "", 0},
		{"1", "", time.Second},
		{" 299 ", "", 299 * time.Second},
		{"86401", "", MaxLifetime},
		{"9223372036854775807", "", MaxLifetime},
		{"9223372036854775808", "", -1},
		{"99999999999999999999", "", -1},
		{"", "", -1},
		{"soon", "", -1},
		{"-1", "", -1},
		{"+1", "", -1},
		{"1.5", "", -1},
		{"1, 2", "", -1},
		{date, date, 0},
		{later, date, time.Minute},
		{"Sunday, 31-Mar-24 23:01:00 GMT", date, time.Minute},
		{"Thu, 28 Mar 2024 23:00:00 GMT", date, 0},
		{far, date, MaxLifetime},
		{far, "Mon, 01 Jan 0001 00:00:00 GMT", MaxLifetime}, // more than a Duration has
		{far, "", MaxLifetime},
		{date, "", 0}, // by the local clock
	} {
		got, ok := retryAfter(http.Header{"Retry-After": {tt.text}, "Date": {tt.date}})
		if ok != (tt.want >= 0) || got != max(0, tt.want) {
			t.Errorf("%q at %q: %s, %t; want %s", tt.text, tt.date, got, ok, tt.want)
		}
	}
}

// TestRetriesAreSpread pins that callers that got a 429 together do not retry together.
func TestRetriesAreSpread(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const callers = maxConns
		sim, c := newMemory(t, Config{})
		f := rateLimit(callers, "3")
		f.Delay = time.Second // so that all calls are under way
		sim.SetFault(f)
		end := time.Now().Add(f.Delay + 3*time.Second)
		if err := errors.Join(mintAll(t, c, callers)...); err != nil {
			t.Fatal(err)
		}
		if n := sim.CallCount(); n != 2*callers {
			t.Fatalf("%d calls, want %d", n, 2*callers)
		}
		checkSpread(t, sim.Calls()[callers:], end, pauseSpread+2*retryDelay)
	})
}

// TestBudget pins, however long Cable takes for each 429, that nothing takes longer than the budget, and that no wait
// lasts to its end, which would hide how Cable responded.
func TestBudget(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const budget = 2 * time.Second
		for delay := time.Duration(0); delay < 2*budget; delay += 9 * time.Millisecond {
			sim, c := newMemory(t, Config{Timeout: budget})
			f := rateLimit(0, fmt.Sprint(int(delay/budget)))
			f.Delay = delay % budget
			sim.SetFault(f)
			start := time.Now()
			e := mustFail(t, t.Context(), c)
			if took := time.Since(start); took > budget || e.Attempts != sim.CallCount() || e.Attempts < 1 ||
				e.Attempts > 3 || e.Kind != Responded && (e.Kind != TimedOut || !e.MaybeIssued) {
				t.Errorf("%+v: %+v after %s and %d calls; want Cable's 429", f, e, took, sim.CallCount())
			}
		}
	})
}

// TestCallerLeavesInAWait pins that neither the wait for a retry nor the spread after a pause lasts longer than the
// caller.
func TestCallerLeavesInAWait(t *testing.T) {
	t.Parallel()
	for pause, want := range map[time.Duration]string{
		0:           "the caller left after Cable responded 429", // in the wait for a retry
		time.Second: "the caller left before a request was sent", // in the spread
	} {
		synctest.Test(t, func(t *testing.T) {
			sim, c := newMemory(t, Config{Timeout: time.Hour})
			sim.SetFault(rateLimit(0, "600"))
			if pause > 0 {
				c.pause.begin(pause)
				time.Sleep(pause)
			}
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			wg.Go(func() {
				if e := mustFail(t, ctx, c); e.Kind != Canceled || e.Detail != want || e.MaybeIssued {
					t.Errorf("got %+v, want canceled: %s", e, want)
				}
			})
			synctest.Wait()
			start := time.Now()
			cancel()
			wg.Wait()
			if took := time.Since(start); took != 0 {
				t.Errorf("it continued for %s", took)
			}
		})
	}
}

// A step is the fate of one call, and whether Cable may have issued a token then, written down here independently of
// the code.
type step struct {
	name   string
	issued bool
	sent   bool
	status int
	header string // Retry-After
	body   string
	err    error // instead of a response
}

// steps are the steps of TestOneTokenAtMost.
func steps() []step {
	refused := &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	list := []step{
		{name: "connection refused", err: refused},
		{name: "reset", sent: true, issued: true, err: io.ErrUnexpectedEOF},
		{name: "token", sent: true, issued: true, status: 200, body: `{"token":"t","expiry":1711929600}`},
		{name: "no token", sent: true, issued: true, status: 200, body: `{}`},
		{name: "429, no time", sent: true, status: 429},
		{name: "429, too late", sent: true, status: 429, header: "60"},
	}
	for _, status := range []int{400, 401, 404, 409, 425, 429, 499} {
		list = append(list, step{name: fmt.Sprint(status), sent: true, status: status, header: "0"})
	}
	for _, status := range []int{0, 101, 201, 202, 204, 301, 302, 303, 307, 308, 408, 500, 502, 503, 504, 599, 999} {
		list = append(list, step{name: fmt.Sprint(status), sent: true, issued: true, status: status, header: "0"})
	}
	return list
}

// TestOneTokenAtMost pins that, whatever the responses to its calls, a token request makes at most three, and no call
// after one that may have issued a token. If such a call brings no token, the error says so; and no other error does.
func TestOneTokenAtMost(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		rapid.Check(struct{ testing.TB }{t}, func(rt *rapid.T) { // without Deadline, which a bubble does not allow
			script := rapid.SliceOfN(rapid.SampledFrom(steps()), 4, 4).Draw(rt, "responses")
			c, err := New(Config{RefreshKey: NewSecret(testKey), TokenURL: "http://localhost/"})
			if err != nil {
				rt.Fatal(err)
			}
			calls, maybe := 0, 0
			c.transport.RegisterProtocol("http", roundTripFunc(func(r *http.Request) (*http.Response, error) {
				s := script[calls]
				calls++
				if s.issued {
					maybe++
				}
				if s.sent {
					httptrace.ContextClientTrace(r.Context()).WroteHeaders()
				}
				if body, err := io.ReadAll(r.Body); s.sent != (len(body) > 50) || err != nil {
					rt.Fatalf("call %d: sent %q, %v", calls, body, err)
				}
				if s.err != nil {
					return nil, s.err
				}
				header, body := http.Header{"Retry-After": {s.header}}, io.NopCloser(strings.NewReader(s.body))
				return &http.Response{StatusCode: s.status, Header: header, Body: body}, nil
			}))
			token, err := c.RequestToken(t.Context(), testRequest())
			var e *Error
			if !errors.As(err, &e) && token == nil {
				rt.Fatalf("neither a token nor an *Error: %v", err)
			}
			if calls > 3 || maybe > 1 || calls > 0 && maybe == 1 && !script[calls-1].issued {
				rt.Errorf("%d calls, of which %d may have issued a token", calls, maybe)
			}
			if undelivered := maybe > 0 && token == nil; undelivered != (e != nil && e.MaybeIssued) {
				rt.Errorf("%d calls may have issued a token: %v, %+v", maybe, token, e)
			}
		})
	})
}

type roundTripFunc func(*http.Request) (*http.Response, error)

func (f roundTripFunc) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// checkSpread checks that calls are spread over the time within, so that each tenth of it has at most three times its
// share.
func checkSpread(t *testing.T, calls []cabletest.Call, from time.Time, within time.Duration) {
	t.Helper()
	parts := make([]int, 10)
	for _, call := range calls {
		after := call.Time.Sub(from)
		if after < 0 || after >= within {
			t.Errorf("a call after %s, want it within %s", after, within)
			continue
		}
		parts[after*10/within]++
	}
	t.Logf("%d calls in ten parts of %s: %v", len(calls), within, parts)
	if most := slices.Max(parts); most > 3*len(calls)/10 {
		t.Errorf("%d of %d calls are in one tenth of %s", most, len(calls), within)
	}
}

// TestPause pins the pause after a 429. Token requests fail at once with the remaining time, without a call, and are
// spread when it ends.
func TestPause(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		sim, c := newMemory(t, Config{})
		sim.SetFault(rateLimit(1, "90"))
		start := time.Now()
		if e := mustFail(t, t.Context(), c); e.Kind != Responded || e.RetryAfter != 90*time.Second || e.Attempts != 1 {
			t.Errorf("got %+v, want 429 and 90s", e)
		}
		for _, err := range mintAll(t, c, 200) {
			var e *Error
			if !errors.As(err, &e) || e.Kind != Paused || e.RetryAfter != 90*time.Second || e.Attempts != 0 ||
				e.MaybeIssued || e.StatusCode != 0 {
				t.Errorf("in the pause: %+v", err)
			}
		}
		if took := time.Since(start); took != 0 {
			t.Errorf("failing took %s", took)
		}
		time.Sleep(90*time.Second - time.Millisecond)
		e := mustFail(t, t.Context(), c)
		if e.Kind != Paused || e.RetryAfter != time.Millisecond {
			t.Errorf("just before the end: %+v", e)
		}
		if want := "paused after Cable's 429: no API call for another 1s"; e.Error() != want {
			t.Errorf("got %q, want %q", e, want)
		}
		if n := sim.CallCount(); n != 1 {
			t.Errorf("%d calls in the pause, want 1", n)
		}
		time.Sleep(time.Millisecond)
		end := time.Now()
		if err := errors.Join(mintAll(t, c, 200)...); err != nil {
			t.Errorf("after the pause: %v", err)
		}
		checkSpread(t, sim.Calls()[1:], end, pauseSpread)
		time.Sleep(pauseSpread)
		before := time.Now()
		if err := errors.Join(mintAll(t, c, 200)...); err != nil {
			t.Errorf("later: %v", err)
		}
		if took := time.Since(before); took != 0 {
			t.Errorf("later, requests still wait: %s", took)
		}
	})
}

// TestPauseLength pins how long a pause is. See also TestRetryAfter.
func TestPauseLength(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		for retryAfter, want := range map[string]time.Duration{
			"": defaultPause, "soon": defaultPause, "1": time.Second, "300": maxPause, "301": maxPause,
			"9223372036854775807": maxPause,
		} {
			sim, c := newMemory(t, Config{Timeout: 500 * time.Millisecond})
			sim.SetFault(rateLimit(1, retryAfter))
			if e := mustFail(t, t.Context(), c); e.StatusCode != 429 || e.RetryAfter != want {
				t.Errorf("%q: status %d, retry after %s, want %s", retryAfter, e.StatusCode, e.RetryAfter, want)
			}
			time.Sleep(want - 1)
			if e := mustFail(t, t.Context(), c); e.Kind != Paused || e.RetryAfter != 1 {
				t.Errorf("%q: just before the end: %+v", retryAfter, e)
			}
			time.Sleep(time.Nanosecond)
			mustMint(t, c)
		}
	})
}

// TestPauseNeverShrinks pins that a pause is extended by a later 429, but never shortened, because calls that were
// under way when it began may return either.
func TestPauseNeverShrinks(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var began atomic.Int32
		sim, c := newMemory(t, Config{Timeout: 30 * time.Second, Observe: func(c Call) {
			if c.PauseBegan {
				began.Add(1)
			}
		}})
		for i, retryAfter := range []string{"60", "40", "soon", "90"} {
			f := rateLimit(1, retryAfter)
			f.Delay = time.Duration(i+1) * time.Second // all are under way when the first response arrives
			sim.AddFault(f)
		}
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() { mustFail(t, t.Context(), c) })
			synctest.Wait() // the faults are taken in this order
		}
		for i, want := range []time.Duration{60 * time.Second, 59 * time.Second, 58 * time.Second, 90 * time.Second} {
			time.Sleep(time.Second)
			synctest.Wait()
			if got := c.Pause().Remaining(); got != want {
				t.Errorf("after response %d: %s left, want %s", i+1, got, want)
			}
		}
		wg.Wait()
		if n := began.Load(); n != 1 {
			t.Errorf("%d pauses began, want 1", n)
		}
	})
}

// TestPauseIsPassedOn pins that a new client starts without a pause, or shares the one that it is given.
func TestPauseIsPassedOn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		sim, first := newMemory(t, Config{})
		sim.SetFault(rateLimit(1, "60"))
		mustFail(t, t.Context(), first)
		free := newMemoryClient(t, sim, Config{})
		if free.Pause().Remaining() != 0 {
			t.Error("a new client starts with a pause")
		}
		if _, err := free.RequestToken(t.Context(), testRequest()); err != nil {
			t.Errorf("a new client: %v", err)
		}
		next := newMemoryClient(t, sim, Config{Pause: first.Pause()})
		if e := mustFail(t, t.Context(), next); e.Kind != Paused || e.RetryAfter != time.Minute {
			t.Errorf("the next client: %+v", e)
		}
		if n := sim.CallCount(); n != 2 {
			t.Errorf("%d calls, want 2", n)
		}
		time.Sleep(time.Minute + pauseSpread)
		sim.SetFault(rateLimit(1, "30"))
		mustFail(t, t.Context(), next)
		if e := mustFail(t, t.Context(), first); e.Kind != Paused || e.RetryAfter != 30*time.Second {
			t.Errorf("the first client: %+v", e)
		}
	})
}

// TestPauseStopsWaiters pins that a 429 stops the token requests that wait, be it for a retry, for their share of the
// spread after a pause, and for a call to end.
func TestPauseStopsWaiters(t *testing.T) {
	t.Parallel()
	for name, wait := range map[string]func(sim *cabletest.Simulator, c *Client){
		"for a retry": func(sim *cabletest.Simulator, _ *Client) { sim.SetFault(rateLimit(1, "5")) },
		"for the spread": func(_ *cabletest.Simulator, c *Client) {
			c.pause.begin(time.Second)
			time.Sleep(time.Second)
		},
		"for a call to end": func(_ *cabletest.Simulator, c *Client) {
			for range maxConns {
				c.turns <- struct{}{}
			}
			time.AfterFunc(time.Second, func() { <-c.turns })
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				sim, c := newMemory(t, Config{})
				wait(sim, c)
				attempts := 0
				if name == "for a retry" {
					attempts = 1
				}
				var wg sync.WaitGroup
				wg.Go(func() {
					diffError(t, Error{Kind: Paused, Attempts: attempts}, mustFail(t, t.Context(), c))
				})
				synctest.Wait()
				c.pause.begin(time.Minute) // as another call would
				wg.Wait()
				if n := sim.CallCount(); n != attempts || len(c.turns) == maxConns {
					t.Errorf("%d calls, want %d; %d turns", n, attempts, len(c.turns))
				}
			})
		})
	}
}

// TestSpreadKeepsToTheBudget pins that the wait after a pause takes at most half of the budget.
func TestSpreadKeepsToTheBudget(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		for range 100 {
			sim, c := newMemory(t, Config{Timeout: time.Second})
			c.pause.begin(time.Second)
			time.Sleep(time.Second)
			start := time.Now()
			mustMint(t, c)
			if waited := sim.Calls()[0].Time.Sub(start); waited > 500*time.Millisecond {
				t.Errorf("waited %s of a second", waited)
			}
		}
	})
}
