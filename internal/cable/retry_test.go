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
	"strings"
	"sync"
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

// TestRefusedConnection pins that a connection that could not be made is retried, whether or not there was one before.
func TestRefusedConnection(t *testing.T) {
	t.Parallel()
	srv := cabletest.NewServer(t, nil)
	c := newClient(t, srv, Config{})
	mustMint(t, c)
	c.Close()
	srv.Close()
	diffError(t, unsent(Unreachable, "connection refused", 3), mustFail(t, t.Context(), c))
	checkCounts(t, srv, 1, 1)
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
		{"0", "", 0}, {"1", "", time.Second}, {" 299 ", "", 299 * time.Second}, {"86401", "", MaxLifetime},
		{"9223372036854775807", "", MaxLifetime}, {"9223372036854775808", "", -1}, {"99999999999999999999", "", -1},
		{"", "", -1}, {"soon", "", -1}, {"-1", "", -1}, {"+1", "", -1}, {"1.5", "", -1}, {"1, 2", "", -1},
		{date, date, 0}, {later, date, time.Minute}, {"Sunday, 31-Mar-24 23:01:00 GMT", date, time.Minute},
		{"Thu, 28 Mar 2024 23:00:00 GMT", date, 0}, {far, date, MaxLifetime},
		{far, "", MaxLifetime}, {date, "", 0}, // by the local clock
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
	for _, retryAfter := range []string{"0", "1"} {
		t.Run(retryAfter, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				const budget = 2 * time.Second
				for delay := time.Duration(0); delay < budget; delay += 9 * time.Millisecond {
					sim, c := newMemory(t, Config{Timeout: budget})
					f := rateLimit(0, retryAfter)
					f.Delay = delay
					sim.SetFault(f)
					start := time.Now()
					_, err := c.RequestToken(t.Context(), testRequest())
					if took := time.Since(start); took > budget {
						t.Errorf("delay %s: took %s", delay, took)
					}
					var e *Error
					if !errors.As(err, &e) || e.Attempts != sim.CallCount() || e.Attempts < 1 || e.Attempts > 3 {
						t.Fatalf("delay %s: %+v after %d calls", delay, err, sim.CallCount())
					}
					if e.Kind != Responded && (e.Kind != TimedOut || !e.MaybeIssued) {
						t.Errorf("delay %s: %s: %s, want Cable's 429", delay, e.Kind, e)
					}
				}
			})
		})
	}
}

// TestCallerLeavesInAWait pins that neither the wait for a retry nor the spread after a pause lasts longer than the
// caller.
func TestCallerLeavesInAWait(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		pause time.Duration
		want  string
	}{
		{"retry", 0, "the caller left after Cable responded 429"},
		{"spread", time.Second, "the caller left before a request was sent"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				sim, c := newMemory(t, Config{Timeout: time.Hour})
				sim.SetFault(rateLimit(0, "600"))
				if tt.pause > 0 {
					c.pause.begin(tt.pause)
					time.Sleep(tt.pause)
				}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				var wg sync.WaitGroup
				wg.Go(func() {
					if e := mustFail(t, ctx, c); e.Kind != Canceled || e.Detail != tt.want || e.MaybeIssued {
						t.Errorf("got %+v, want canceled: %s", e, tt.want)
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

// FuzzRetryAfter pins that no header makes the wait negative, or longer than a day.
func FuzzRetryAfter(f *testing.F) {
	for _, s := range [][2]string{
		{"1", ""}, {"-1", ""}, {"99999999999999999999", ""}, {"9223372036854775807", ""}, {"1.5", ""}, {"", "x"},
		{"Sun, 06 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:36 GMT"},
		{"Fri, 31 Dec 9999 23:59:59 GMT", "Mon, 01 Jan 0001 00:00:00 GMT"},
	} {
		f.Add(s[0], s[1])
	}
	f.Fuzz(func(t *testing.T, after, date string) {
		wait, ok := retryAfter(http.Header{"Retry-After": {after}, "Date": {date}})
		if wait < 0 || wait > MaxLifetime || !ok && wait != 0 {
			t.Errorf("%q at %q: %s %v", after, date, wait, ok)
		}
	})
}
