// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// The tests of this file see a whole client wait: in a hold, for a repeat, for
// its turn. They run in bubbles, where time is exact and costs none. There the
// simulator is called in memory: a bubble cannot wait for a network.

// memory is a RoundTripper that calls the simulator without a network.
type memory struct{ *cabletest.Simulator }

// RoundTrip implements [http.RoundTripper].
func (m memory) RoundTrip(req *http.Request) (resp *http.Response, err error) {
	if trace := httptrace.ContextClientTrace(req.Context()); trace != nil {
		trace.GotConn(httptrace.GotConnInfo{})
	}
	defer func() {
		if p := recover(); p != nil { // the simulator's way to hang up
			resp, err = nil, errors.Join(req.Context().Err(), fmt.Errorf("hung up: %v", p))
		}
	}()
	w := httptest.NewRecorder()
	m.ServeHTTP(w, req)
	return w.Result(), nil
}

// newMemory returns a simulator in memory and a client of it.
func newMemory(t *testing.T, cfg Config) (*cabletest.Simulator, *Client) {
	t.Helper()
	sim := cabletest.New(nil)
	return sim, newMemoryClient(t, sim, cfg)
}

func newMemoryClient(t *testing.T, sim *cabletest.Simulator, cfg Config) *Client {
	t.Helper()
	cfg.RefreshKey, cfg.TokenURL = NewSecret(sim.RefreshKey()), "http://localhost"+sim.Path()
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	c.transport.RegisterProtocol("http", memory{sim})
	return c
}

func ask() TokenRequest {
	return TokenRequest{OrganizationID: cabletest.DefaultOrganizationID, Scopes: []string{"transactions:write"}, Lifetime: time.Hour}
}

// refused requests a token, which must not come.
func refused(t *testing.T, ctx context.Context, c *Client) *Error {
	t.Helper()
	_, err := c.RequestToken(ctx, ask())
	var e *Error
	if !errors.As(err, &e) {
		t.Fatalf("got %v, want an *Error", err)
	}
	t.Logf("%s: %s (attempts %d, retry after %s)", e.Kind, e, e.Attempts, e.RetryAfter)
	return e
}

// at429 is a refusal for a time.
func at429(times int, retryAfter string) cabletest.Fault {
	return cabletest.Fault{Status: 429, Times: times, Header: map[string]string{"Retry-After": retryAfter}}
}

// all runs n requests at once and returns their errors, nil ones included.
func all(t *testing.T, c *Client, n int) []error {
	t.Helper()
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { _, errs[i] = c.RequestToken(t.Context(), ask()) })
	}
	wg.Wait()
	return errs
}

// wantSpread checks that calls are spread over within: none of ten parts of it
// got more than three times its share.
func wantSpread(t *testing.T, calls []cabletest.Call, from time.Time, within time.Duration) {
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
		t.Errorf("%d of %d calls came in one of ten parts of %s", most, len(calls), within)
	}
}

// TestPause pins the pause after a 429: who arrives in it calls nobody and is
// told at once how long it lasts; who arrives when it ends is spread.
func TestPause(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		sim, c := newMemory(t, Config{})
		sim.SetFault(at429(1, "90"))
		start := time.Now()
		if e := refused(t, t.Context(), c); e.Kind != Responded || e.RetryAfter != 90*time.Second || e.Attempts != 1 {
			t.Errorf("got %+v, want 429 and 90s", e)
		}
		for _, err := range all(t, c, 200) {
			var e *Error
			if !errors.As(err, &e) || e.Kind != Paused || e.RetryAfter != 90*time.Second || e.Attempts != 0 || e.MaybeIssued || e.StatusCode != 0 {
				t.Errorf("in the pause: %+v", err)
			}
		}
		if took := time.Since(start); took != 0 {
			t.Errorf("being refused took %s", took)
		}
		time.Sleep(90*time.Second - time.Millisecond)
		e := refused(t, t.Context(), c)
		if e.Kind != Paused || e.RetryAfter != time.Millisecond {
			t.Errorf("just before the end: %+v", e)
		}
		if want := "cable asked for a pause (429): no request is sent for another 1s"; e.Error() != want {
			t.Errorf("got %q, want %q", e, want)
		}
		if n := sim.CallCount(); n != 1 {
			t.Errorf("%d calls in the pause, want 1", n)
		}
		time.Sleep(time.Millisecond)
		end := time.Now()
		if err := errors.Join(all(t, c, 200)...); err != nil {
			t.Errorf("after the pause: %v", err)
		}
		wantSpread(t, sim.Calls()[1:], end, holdSpread)
		time.Sleep(holdSpread)
		before := time.Now()
		if err := errors.Join(all(t, c, 200)...); err != nil {
			t.Errorf("later: %v", err)
		}
		if took := time.Since(before); took != 0 {
			t.Errorf("later, requests still wait: %s", took)
		}
	})
}

// TestRepeatsAreSpread pins the same for those that were under way when the
// 429 came, and wait for its end to repeat their requests.
func TestRepeatsAreSpread(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		sim, c := newMemory(t, Config{})
		f := at429(100, "3")
		f.Delay = time.Second // so that all are under way
		sim.SetFault(f)
		end := time.Now().Add(f.Delay + 3*time.Second)
		if err := errors.Join(all(t, c, 100)...); err != nil {
			t.Fatal(err)
		}
		if n := sim.CallCount(); n != 200 {
			t.Fatalf("%d calls, want 200", n)
		}
		wantSpread(t, sim.Calls()[100:], end, holdSpread+2*repeatDelay)
	})
}

// TestPauseLength pins how long a pause is by what Cable says.
func TestPauseLength(t *testing.T) {
	t.Parallel()
	const dated = "dated by seconds"
	for _, tt := range []struct {
		retryAfter string
		seconds    int64 // of a date, from the simulator's own
		want       time.Duration
	}{
		{"", 0, defaultHold},
		{"soon", 0, defaultHold},
		{"-1", 0, defaultHold},
		{"+1", 0, defaultHold},
		{"1.5", 0, defaultHold},
		{"1, 2", 0, defaultHold},
		{"9223372036854775808", 0, defaultHold},
		{"99999999999999999999", 0, defaultHold},
		{"1", 0, time.Second},
		{" 299 ", 0, 299 * time.Second},
		{"300", 0, maxHold},
		{"301", 0, maxHold},
		{"86401", 0, maxHold},
		{"9223372036854775807", 0, maxHold},
		{dated, 60, time.Minute},
		{dated, 100_000, maxHold},
		{dated, maxExpiry - 946_684_800, maxHold}, // a bubble begins in the year 2000
		{dated, 0, 0},
		{dated, -1000, 0},
	} {
		t.Run(fmt.Sprint(tt.retryAfter, tt.seconds), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				sim, c := newMemory(t, Config{Timeout: 500 * time.Millisecond})
				retryAfter := tt.retryAfter
				if retryAfter == dated {
					retryAfter = time.Unix(time.Now().Unix()+tt.seconds, 0).UTC().Format(http.TimeFormat)
				}
				sim.SetFault(at429(1, retryAfter))
				if tt.want == 0 {
					if _, err := c.RequestToken(t.Context(), ask()); err != nil {
						t.Error(err)
					}
					return
				}
				if e := refused(t, t.Context(), c); e.StatusCode != 429 || e.RetryAfter != tt.want {
					t.Errorf("status %d, retry after %s, want %s", e.StatusCode, e.RetryAfter, tt.want)
				}
				time.Sleep(tt.want - 1)
				if e := refused(t, t.Context(), c); e.Kind != Paused || e.RetryAfter != 1 {
					t.Errorf("just before the end: %+v", e)
				}
				time.Sleep(time.Nanosecond)
				if _, err := c.RequestToken(t.Context(), ask()); err != nil {
					t.Errorf("at the end: %v", err)
				}
			})
		})
	}
}

// TestPauseNeverShrinks pins that a later, shorter 429 changes nothing and a
// longer one does: calls that were under way when it began may bring either.
func TestPauseNeverShrinks(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		sim, c := newMemory(t, Config{Timeout: 30 * time.Second})
		for i, retryAfter := range []string{"60", "40", "soon", "90"} {
			f := at429(1, retryAfter)
			f.Delay = time.Duration(i+1) * time.Second // all are under way when the first answer comes
			sim.AddFault(f)
		}
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() { refused(t, t.Context(), c) })
			synctest.Wait() // the faults are taken in this order
		}
		for i, want := range []time.Duration{60 * time.Second, 59 * time.Second, 58 * time.Second, 90 * time.Second} {
			time.Sleep(time.Second)
			synctest.Wait()
			if got := c.Pause().Remaining(); got != want {
				t.Errorf("after answer %d: %s left, want %s", i+1, got, want)
			}
		}
		wg.Wait()
	})
}

// TestPauseIsHandedOn pins that a new client starts free, unless it is given
// the pause of an earlier one; then both keep the same.
func TestPauseIsHandedOn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		sim, first := newMemory(t, Config{})
		sim.SetFault(at429(1, "60"))
		refused(t, t.Context(), first)
		free := newMemoryClient(t, sim, Config{})
		if free.Pause().Remaining() != 0 {
			t.Error("a new client starts with a pause")
		}
		if _, err := free.RequestToken(t.Context(), ask()); err != nil {
			t.Errorf("a new client: %v", err)
		}
		next := newMemoryClient(t, sim, Config{Pause: first.Pause()})
		if e := refused(t, t.Context(), next); e.Kind != Paused || e.RetryAfter != time.Minute {
			t.Errorf("the next client: %+v", e)
		}
		if n := sim.CallCount(); n != 2 {
			t.Errorf("%d calls, want 2", n)
		}
		time.Sleep(time.Minute + holdSpread)
		sim.SetFault(at429(1, "30"))
		refused(t, t.Context(), next)
		if e := refused(t, t.Context(), first); e.Kind != Paused || e.RetryAfter != 30*time.Second {
			t.Errorf("the first client: %+v", e)
		}
	})
}

// TestPauseStopsRepeats pins that a 429 that one caller got stops the repeat
// that another waits for.
func TestPauseStopsRepeats(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		sim, c := newMemory(t, Config{})
		sim.SetFault(cabletest.Fault{Status: 503, Times: 1, Header: map[string]string{"Retry-After": "5"}})
		sim.AddFault(at429(1, "60"))
		var wg sync.WaitGroup
		wg.Go(func() {
			start := time.Now()
			if e := refused(t, t.Context(), c); e.Kind != Paused || e.Attempts != 1 || e.MaybeIssued {
				t.Errorf("the waiting one: %+v", e)
			}
			if took := time.Since(start); took < 5*time.Second || took > 6*time.Second {
				t.Errorf("the waiting one took %s", took)
			}
		})
		synctest.Wait()
		refused(t, t.Context(), c)
		wg.Wait()
		if n := sim.CallCount(); n != 2 {
			t.Errorf("%d calls, want 2", n)
		}
	})
}

// TestCallerGoesAwayInAWait pins that neither the wait for a repeat nor the
// spread after a pause outlives the caller.
func TestCallerGoesAwayInAWait(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		hold time.Duration
		want string
	}{
		{"repeat", 0, "the caller went away after cable answered 503"},
		{"spread", time.Second, "the caller went away before a request was sent"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				sim, c := newMemory(t, Config{Timeout: time.Hour})
				sim.SetFault(cabletest.Fault{Status: 503, Header: map[string]string{"Retry-After": "600"}})
				if tt.hold > 0 {
					c.hold.begin(tt.hold)
					time.Sleep(tt.hold)
				}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				var wg sync.WaitGroup
				wg.Go(func() {
					if e := refused(t, ctx, c); e.Kind != Canceled || e.Detail != tt.want || e.MaybeIssued {
						t.Errorf("got %+v, want canceled: %s", e, tt.want)
					}
				})
				synctest.Wait()
				start := time.Now()
				cancel()
				wg.Wait()
				if took := time.Since(start); took != 0 {
					t.Errorf("it went on for %s", took)
				}
			})
		})
	}
}

// TestBudget pins, however long Cable takes for each of its refusals, that
// nothing takes longer than the budget, and that no wait for a repeat runs into
// its end: that would hide what Cable had answered.
func TestBudget(t *testing.T) {
	t.Parallel()
	for _, status := range []int{429, 503} {
		for _, retryAfter := range []string{"0", "1"} {
			t.Run(fmt.Sprintf("%d, %s", status, retryAfter), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					const budget = 2 * time.Second
					for delay := time.Duration(0); delay < budget; delay += 9 * time.Millisecond {
						sim, c := newMemory(t, Config{Timeout: budget})
						sim.SetFault(cabletest.Fault{Status: status, Delay: delay, Header: map[string]string{"Retry-After": retryAfter}})
						start := time.Now()
						_, err := c.RequestToken(t.Context(), ask())
						if took := time.Since(start); took > budget {
							t.Errorf("delay %s: took %s", delay, took)
						}
						var e *Error
						if !errors.As(err, &e) || e.Attempts != sim.CallCount() || e.Attempts < 1 || e.Attempts > 3 {
							t.Fatalf("delay %s: %+v after %d calls", delay, err, sim.CallCount())
						}
						if e.Kind != Responded && (e.Kind != TimedOut || !e.MaybeIssued) {
							t.Errorf("delay %s: %s: %s, want cable's answer", delay, e.Kind, e)
						}
					}
				})
			})
		}
	}
}

// TestRepeats pins what is repeated after a refusal for now, how often, and
// after which time; and that it leaves one token where Cable comes to its
// senses.
func TestRepeats(t *testing.T) {
	t.Parallel()
	const day = 24 * time.Hour
	for _, tt := range []struct {
		name     string
		header   func(now time.Time) map[string]string
		timeout  time.Duration
		attempts int
		wait     time.Duration // at least, before each repeat
	}{
		{"now", seconds("0"), 20 * time.Second, 3, repeatDelay},
		{"soon", seconds("3"), 20 * time.Second, 3, 3 * time.Second},
		{"once only", seconds("12"), 20 * time.Second, 2, 12 * time.Second},
		{"just in time", seconds("19"), 20 * time.Second, 2, 19 * time.Second},
		{"at the end", seconds("20"), 20 * time.Second, 1, 0},
		{"beyond", seconds("60"), 20 * time.Second, 1, 0},
		{"a day", seconds("86400"), 20 * time.Second, 1, 0},
		{"nonsense", seconds("soon"), 20 * time.Second, 1, 0},
		{"negative", seconds("-3"), 20 * time.Second, 1, 0},
		{"none", seconds(""), 20 * time.Second, 1, 0},
		{"no time for a third", seconds("0"), 500 * time.Millisecond, 2, repeatDelay},
		{"no time for a second", seconds("0"), 200 * time.Millisecond, 1, 0},
		{"dated now", dated(0), 20 * time.Second, 3, repeatDelay},
		{"dated past", dated(-3 * day), 20 * time.Second, 3, repeatDelay},
		{"dated soon", dated(3 * time.Second), 20 * time.Second, 3, 3 * time.Second},
		{"dated beyond", dated(60 * time.Second), 20 * time.Second, 1, 0},
		{"dated in a century", dated(36_525 * day), 20 * time.Second, 1, 0},
		{"dated in the year 9999", func(time.Time) map[string]string {
			return map[string]string{"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}
		}, 20 * time.Second, 1, 0},
		{"dated, no clock", func(now time.Time) map[string]string {
			return map[string]string{"Retry-After": now.Add(3 * time.Second).UTC().Format(http.TimeFormat), "Date": ""}
		}, 20 * time.Second, 3, 3 * time.Second}, // the second time it lies in the past
	} {
		for _, status := range []int{429, 503} {
			t.Run(fmt.Sprintf("%d, %s", status, tt.name), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					attempts := tt.attempts
					sim, c := newMemory(t, Config{Timeout: tt.timeout})
					sim.SetFault(cabletest.Fault{Status: status, Header: tt.header(time.Now())})
					e := refused(t, t.Context(), c)
					if e.Kind != Responded || e.StatusCode != status || e.Attempts != attempts || e.MaybeIssued || sim.CallCount() != attempts {
						t.Errorf("got %+v after %d calls, want %d", e, sim.CallCount(), attempts)
					}
					calls := sim.Calls()
					for i := range calls[1:] {
						wait := calls[i+1].Time.Sub(calls[i].Time)
						least := tt.wait
						if tt.name == "dated, no clock" && i > 0 {
							least = repeatDelay
						}
						if wait < least || wait > tt.wait+2*repeatDelay<<i+holdSpread || status == 503 && wait > max(tt.wait, repeatDelay<<i)+repeatDelay<<i+time.Second {
							t.Errorf("repeat %d after %s, want %s and some jitter", i+1, wait, tt.wait)
						}
					}
					// The same with Cable coming to its senses at the last moment.
					if attempts == 1 {
						return
					}
					time.Sleep(time.Hour)
					sim.Reset()
					sim.SetFault(cabletest.Fault{Status: status, Times: attempts - 1, Header: tt.header(time.Now())})
					token, err := c.RequestToken(t.Context(), ask())
					if err != nil || token.Attempts != attempts || len(sim.Minted()) != 1 {
						t.Errorf("got %+v, %v after %d calls", token, err, sim.CallCount())
					}
				})
			})
		}
	}
}

func seconds(text string) func(time.Time) map[string]string {
	return func(time.Time) map[string]string { return map[string]string{"Retry-After": text} }
}

// dated names the time d after the answer's own, which is years off.
func dated(d time.Duration) func(time.Time) map[string]string {
	return func(now time.Time) map[string]string {
		theirs := now.AddDate(-5, 0, 0).UTC()
		return map[string]string{"Retry-After": theirs.Add(d).Format(http.TimeFormat), "Date": theirs.Format(http.TimeFormat)}
	}
}

// TestPauseOverNetwork pins the same as TestPause where it counts, over a real
// network and with the race detector: 200 readers in a pause cause no call.
func TestPauseOverNetwork(t *testing.T) {
	t.Parallel()
	srv := cabletest.NewServer(t, nil)
	srv.SetFault(at429(1, "60"))
	c, err := New(Config{RefreshKey: NewSecret(srv.RefreshKey()), TokenURL: srv.URL})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	refused(t, t.Context(), c)
	for _, err := range all(t, c, 200) {
		var e *Error
		if !errors.As(err, &e) || e.Kind != Paused || e.RetryAfter <= 50*time.Second || e.RetryAfter > time.Minute {
			t.Errorf("in the pause: %+v", err)
		}
	}
	if n := srv.CallCount(); n != 1 {
		t.Errorf("%d calls, want 1", n)
	}
}
