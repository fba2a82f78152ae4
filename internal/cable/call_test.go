// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// TestToken pins how a response becomes a Token, and that SentAt and ReceivedAt are the times around the successful
// call.
func TestToken(t *testing.T) {
	t.Parallel()
	other := "org_x"
	requested := Token{ScopesOrganizationID: org, Scopes: []string{"transactions:write"}}
	another := cabletest.Grant{Scopes: &[]string{"b:c", "a:b"}, ScopesOrganizationID: &other}
	grant := func(g cabletest.Grant) cabletest.Fault { return cabletest.Fault{Grant: &g} }
	for _, tt := range []struct {
		name  string
		fault cabletest.Fault
		want  Token // except for Value, Expiry and the times
	}{
		{"as requested", cabletest.Fault{}, requested},
		{"no scopes", grant(cabletest.Grant{OmitScopes: true}), Token{}},
		{"no scope", grant(cabletest.Grant{Scopes: &[]string{}}), Token{ScopesOrganizationID: org, Scopes: []string{}}},
		{"another grant", grant(another), Token{ScopesOrganizationID: other, Scopes: []string{"b:c", "a:b"}}},
		{"a clock that is years off", cabletest.Fault{ClockSkew: -100_000 * time.Hour}, requested},
		{"slow, after a 429", cabletest.Fault{Delay: 50 * time.Millisecond}, requested},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			srv := cabletest.NewServer(t, nil)
			var wait time.Duration
			attempts := 1
			if tt.fault.Delay > 0 {
				srv.SetFault(rateLimit(1, "0"))
				wait, attempts = retryDelay, 2
			}
			srv.AddFault(tt.fault)
			before := time.Now()
			got := mustMint(t, newClient(t, srv, Config{}))
			after := time.Now()
			minted := srv.Minted()[0]
			want := tt.want
			want.OrganizationID, want.OrganizationName = org, cabletest.DefaultOrganizationName
			want.Expiry = minted.Expiry.Unix()
			want.Date = minted.IssuedAt
			want.Attempts = attempts
			ignored := cmpopts.IgnoreFields(Token{}, "Value", "SentAt", "ReceivedAt")
			if diff := cmp.Diff(want, *got, ignored); diff != "" {
				t.Errorf("token (-want +got):\n%s", diff)
			}
			if got.Value.Reveal() != minted.Token {
				t.Error("the value is not the minted one")
			}
			if got.SentAt.Sub(before) < wait || got.ReceivedAt.Sub(got.SentAt) < tt.fault.Delay ||
				after.Before(got.ReceivedAt) {
				t.Errorf("sent %s, received %s; want both from %s to %s", got.SentAt, got.ReceivedAt, before, after)
			}
			checkCounts(t, srv, attempts, 1)
		})
	}
}

// responded returns the error for a status that shows that no token was issued.
func responded(status int, detail string) Error {
	return Error{Kind: Responded, StatusCode: status, Detail: detail, Attempts: 1}
}

// invalid returns the error for a response that is refused.
func invalid(status int, detail string) Error {
	return Error{Kind: InvalidResponse, StatusCode: status, Detail: detail, MaybeIssued: true, Attempts: 1}
}

// sent returns the error for a call that was sent and had no response.
func sent(kind Kind, detail string) Error {
	return Error{Kind: kind, Detail: detail, MaybeIssued: true, Attempts: 1}
}

// unsent returns the error for calls that were not sent.
func unsent(kind Kind, detail string, attempts int) Error {
	return Error{Kind: kind, Detail: detail, Attempts: attempts}
}

// TestFaults pins the error for each way in which Cable can fail, how often Cable was called, and how many tokens were
// issued. See also TestDecode and TestRetries.
func TestFaults(t *testing.T) {
	t.Parallel()
	type fault = cabletest.Fault
	with := func(name, value string, status int) fault {
		return fault{Header: map[string]string{name: value}, Status: status}
	}
	status := func(n int, more string) Error {
		return invalid(n, fmt.Sprintf("its status is %d instead of 200%s", n, more))
	}
	tooLarge := invalid(200, "it is larger than 1048576 bytes")
	noJSON := invalid(200, "it is not a JSON object of the documented shape")
	coding := func(name string) Error {
		return invalid(200, "its Content-Encoding is "+name+", but only identity was accepted")
	}
	odd, x := "br, é\u202e", strings.Repeat("x", 100)
	cached := invalid(200, "its Age header exceeds the duration of the call: it comes from a cache")
	type faultTest struct {
		name   string
		fault  fault
		want   Error
		minted int // calls are want.Attempts
	}
	tests := []faultTest{
		{"reset before", fault{Reset: cabletest.ResetBefore}, sent(Unreachable, connectionClosed), 0},
		{"reset after", fault{Reset: cabletest.ResetAfter}, sent(Unreachable, connectionClosed), 1},
		{"half a response", fault{Reset: cabletest.ResetHalf}, sent(Unreachable, connectionClosed), 1},
		{"half an error", fault{Status: 401, Reset: cabletest.ResetHalf}, responded(401, ""), 0},
		{"hangs before the response", fault{Delay: time.Hour}, sent(TimedOut, budgetRanOut), 0},
		{"hangs in the response", fault{Stall: time.Hour}, sent(TimedOut, budgetRanOut), 1},
		{"hangs in a redirect", fault{Status: 302, Stall: time.Hour}, status(302, noRedirects), 0},
		{"8 MiB", fault{BodySize: 8 << 20}, tooLarge, 1},
		{"8 MiB of an error", fault{Status: 400, BodySize: 8 << 20}, responded(400, notCables), 0},
		{"8 MiB of JSON", fault{Body: `{"token":"`, BodySize: 8 << 20}, tooLarge, 1},
		{"gzip bomb", fault{BodySize: 2 << 20, Gzip: true}, coding("gzip"), 1},
		{"gzip bomb of an error", fault{Status: 400, BodySize: 2 << 20, Gzip: true}, responded(400, notCables), 0},
		{"HTML", fault{Body: "<html>sign in</html>"}, noJSON, 1},
		{"HTML of an error", fault{Status: 403, Body: "<html>blocked</html>"}, responded(403, notCables), 0},
		{"empty", fault{Status: 200, Body: " "}, noJSON, 0},
		{"from a cache", with("Age", "3000", 0), cached, 1},
		{"unreadable Age", with("Age", "-1", 0), invalid(200, "its Age header is not one whole number of seconds"), 1},
		{"another coding", with("Content-Encoding", odd+x, 0), coding(`br, é\u202e` + x[:28]), 1},
		{"another coding of an error", with("Content-Encoding", "br", 401), responded(401, "Unauthorized"), 0},
		{"201", fault{Status: 201}, status(201, ""), 0},
		{"202", with("Retry-After", "0", 202), status(202, ""), 0},
		{"204", fault{Status: 204}, status(204, ""), 0},
	}
	for _, status := range []int{400, 401, 403, 404, 408, 425, 429, 500, 502, 503, 504} {
		want := responded(status, http.StatusText(status))
		want.MaybeIssued = status == 408 || status >= 500 // from a gateway, which may have forwarded the call
		fault := with("Retry-After", "0", status)
		if status == 429 {
			fault.Header = nil
		}
		tests = append(tests, faultTest{fmt.Sprint(status), fault, want, 0})
		want.Detail = ""
		fault.Stall = time.Hour
		tests = append(tests, faultTest{fmt.Sprint(status, ", and hangs"), fault, want, 0})
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for protocol, newServer := range map[string]func(testing.TB, *cabletest.Options) *cabletest.Server{
				"http": cabletest.NewServer, "https": cabletest.NewTLSServer,
			} {
				srv := newServer(t, nil)
				srv.SetFault(tt.fault)
				c := newClient(t, srv, Config{Timeout: timeoutFor(tt.want)})
				diffError(t, tt.want, mustFailInTime(t, c)) // an error that hangs does not wait for the budget
				checkCounts(t, srv, tt.want.Attempts, tt.minted)
				if tt.want.StatusCode != 429 {
					srv.ClearFaults()
					mustMint(t, c)
				}
				if t.Failed() {
					t.Fatalf("with %s", protocol)
				}
			}
		})
	}
}

// timeoutFor returns a short budget if the call must run into its end, so that no other test depends on the clock.
func timeoutFor(want Error) time.Duration {
	if want.Kind == TimedOut {
		return budget
	}
	return time.Minute
}

const noRedirects = ", and redirects are not followed: check token_url"

// stalledBody is a body whose end does not arrive before the call's context ends.
type stalledBody struct{ ctx context.Context }

func (b stalledBody) Read([]byte) (int, error) {
	<-b.ctx.Done()
	return 0, b.ctx.Err()
}

func (stalledBody) Close() error { return nil }

// TestStalledBody pins for how long a body that stalls delays an error, and that a 200 runs into the end of the budget.
func TestStalledBody(t *testing.T) {
	t.Parallel()
	for status, want := range map[int]time.Duration{
		200: budget, 202: 0, 302: 0, 400: errorBodyTimeout, 401: errorBodyTimeout, 429: errorBodyTimeout,
		500: errorBodyTimeout, 503: errorBodyTimeout,
	} {
		synctest.Test(t, func(t *testing.T) {
			c := newClientAt(t, Config{TokenURL: "http://localhost/", Timeout: budget})
			c.transport.RegisterProtocol("http", roundTripFunc(func(r *http.Request) (*http.Response, error) {
				httptrace.ContextClientTrace(r.Context()).WroteHeaders()
				header := http.Header{"Retry-After": {"60"}}
				return &http.Response{StatusCode: status, Header: header, Body: stalledBody{r.Context()}}, nil
			}))
			start := time.Now()
			e := mustFail(t, t.Context(), c)
			if took := time.Since(start); took != want || e.StatusCode != status && status != 200 {
				t.Errorf("%d after %s, want %d after %s", e.StatusCode, took, status, want)
			}
			if paused := c.Pause().Remaining() > 0; paused != (status == 429) {
				t.Errorf("%d: paused %t", status, paused)
			}
		})
	}
}

// TestHostileServer pins that nothing that a server writes takes longer than the budget, is retried, panics, or becomes
// part of an error.
func TestHostileServer(t *testing.T) {
	t.Parallel()
	const (
		ok, end   = "HTTP/1.1 200 OK\r\n", "\r\nContent-Length: 0\r\n\r\n"
		chunked   = ok + "Transfer-Encoding: chunked\r\n"
		body      = `{"token":"t","expiry":1}`
		longHead  = "the head of its response is larger than 65536 bytes"
		noHTTP1   = "it does not speak HTTP/1.1, and HTTP/2 is not supported"
		settings  = "\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x80\x0d\x0a"
		drip      = 10 * time.Millisecond
		hangs     = time.Duration(-1)
		switching = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
	)
	tooLarge := invalid(200, "it is larger than 1048576 bytes")
	unreachable := func(detail string) Error { return sent(Unreachable, detail) }
	timedOut := sent(TimedOut, budgetRanOut)
	headNeverEnds := sent(TimedOut, "the budget of 1s ran out after the request was sent, "+atHead)
	odd, dripped := responded(999, notCables), responded(500, "")
	odd.MaybeIssued, dripped.MaybeIssued = true, true
	spaces, x := strings.Repeat(" ", 4096), strings.Repeat("x", 4096)
	for _, tt := range []struct {
		name  string
		text  string        // SENT is the request in one line, and REQUEST as it is
		rest  string        // again and again, until the client has closed the connection
		pause time.Duration // between, or hangs
		want  Error
	}{
		{"SETTINGS of HTTP/2 (RFC 9113, 6.5)", settings, "", hangs, unreachable(noHTTP1)},
		{"silence, then gone", "", "", 0, unreachable(connectionClosed)},
		{"silence", "", "", hangs, timedOut},
		{"no HTTP", "SSH-2.0-OpenSSH_9.6\r\n\r\n", "", 0, unreachable(notHTTP)},
		{"endless garbage", "", x, 0, unreachable(longHead)},
		{"the request itself", "REQUEST", "", 0, unreachable(notHTTP)},
		{"the request in the status line", "HTTP/1.1 400 SENT" + end, "", 0, responded(400, notCables)},
		{"the request as a header's name", ok + "SENT\r\n\r\n", "", 0, unreachable(notHTTP)},
		{"the request as a length", ok + "Content-Length: SENT\r\n\r\n", "", 0, unreachable(notHTTP)},
		{"the request as a chunk's length", chunked + "\r\nSENT\r\n", "", 0, unreachable(notHTTP)},
		{"status 999", "HTTP/1.1 999 Odd" + end, "", 0, odd},
		{"status 0", "HTTP/1.1 000 Odd" + end, "", 0, invalid(0, "its status is 0 instead of 200")},
		{"endless header", ok, "X-Y: " + x + "\r\n", 0, unreachable(longHead)},
		{"dripping header", ok, "X: y\r\n", drip, headNeverEnds},
		{"storm of 1xx", "", "HTTP/1.1 103 Early Hints\r\nX: y\r\n\r\n", 0, unreachable(longHead)},
		{"dripping 1xx", "", "HTTP/1.1 102 Processing\r\n\r\n", drip, headNeverEnds},
		{
			"some 1xx before a refusal", strings.Repeat("HTTP/1.1 100 Continue\r\n\r\n", 50) + "HTTP/1.1 401 No" + end,
			"", 0, responded(401, notCables),
		},
		// The body of a 101 is the bare connection, so no context ends a read of it.
		{"another protocol", switching, "", hangs, invalid(101, "its status is 101 instead of 200")},
		{"endless chunks", chunked + "\r\n", "1000\r\n" + spaces + "\r\n", 0, tooLarge},
		{"endless without a length", ok + "\r\n", spaces, 0, tooLarge},
		{"dripping body", ok + "Content-Length: 1000000\r\n\r\n", " ", drip, timedOut},
		{"dripping error", "HTTP/1.1 500 No\r\nContent-Length: 1000000\r\n\r\n", " ", drip, dripped},
		{"short body", ok + "Content-Length: 100\r\n\r\n" + body, "", 0, unreachable(connectionClosed)},
		{"two lengths", ok + "Content-Length: 24\r\nContent-Length: 25\r\n\r\n" + body, "", 0, unreachable(notHTTP)},
		{"storm of trailers", chunked + "Trailer: X\r\n\r\n1\r\n \r\n0\r\n", "X: y\r\n", 0, unreachable(notHTTP)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			url, connections := rawServer(t, func(conn net.Conn) {
				request := readRequest(conn)
				text := strings.ReplaceAll(tt.text, "SENT", strings.ReplaceAll(request, "\r\n", " "))
				_, err := io.WriteString(conn, strings.ReplaceAll(text, "REQUEST", request))
				if tt.pause == hangs {
					hang(conn)
				}
				for tt.rest != "" && err == nil {
					_, err = io.WriteString(conn, tt.rest)
					time.Sleep(tt.pause) // of the simulated server
				}
			})
			c := newClientAt(t, Config{TokenURL: url, Timeout: timeoutFor(tt.want)})
			diffError(t, tt.want, mustFailInTime(t, c))
			if n := connections.Load(); n != 1 {
				t.Errorf("%d connections, want 1", n)
			}
		})
	}
}

// TestRedirect pins that no host but the configured one is ever called, whatever Location is.
func TestRedirect(t *testing.T) {
	t.Parallel()
	for _, status := range []int{300, 301, 302, 303, 304, 307, 308} {
		for _, location := range []string{
			"other", "self", "/elsewhere", "", "%zz", "ftp://h/", "https://u:p@h/{refresh_key}", "?{refresh_key}", ":",
		} {
			t.Run(fmt.Sprintf("%d to %s", status, location), func(t *testing.T) {
				t.Parallel()
				srv, other := cabletest.NewServer(t, nil), cabletest.NewServer(t, nil)
				to := location
				switch location {
				case "other":
					to = other.URL
				case "self":
					to = srv.URL
				}
				header := map[string]string{"Location": to, "Refresh": "0; url=" + other.URL}
				srv.SetFault(cabletest.Fault{Status: status, Header: header})
				e := mustFail(t, t.Context(), newClient(t, srv, Config{}))
				diffError(t, invalid(status, fmt.Sprintf("its status is %d instead of 200%s", status, noRedirects)), e)
				checkCounts(t, srv, 1, 0)
				if n := other.CallCount() + other.Connections(); n != 0 {
					t.Errorf("the other host saw %d calls and connections", n)
				}
			})
		}
	}
}

// TestCallerLeaves pins that a call ends when its caller leaves, and that the error says whether the request had been
// sent. See also TestCallerLeavesInAWait.
func TestCallerLeaves(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name     string
		response string // the part that the server has sent by then
	}{
		{"before the response", ""},
		{"in the head", "HTTP/1.1 200 OK\r\nContent-"},
		{"in the body", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			gone := make(chan struct{})
			url, _ := rawServer(t, func(conn net.Conn) {
				readRequest(conn)
				_, _ = io.WriteString(conn, tt.response)
				cancel()
				hang(conn)
				close(gone)
			})
			c := newClientAt(t, Config{TokenURL: url, Timeout: time.Minute})
			diffError(t, sent(Canceled, "the caller left after the request was sent"), mustFail(t, ctx, c))
			<-gone // the connection is not left open
		})
	}
	t.Run("at its deadline", func(t *testing.T) {
		t.Parallel()
		url, _ := rawServer(t, func(conn net.Conn) { readRequest(conn); hang(conn) })
		ctx, cancel := context.WithTimeout(t.Context(), budget)
		defer cancel()
		c := newClientAt(t, Config{TokenURL: url, Timeout: time.Minute})
		const detail = "the caller's deadline passed after the request was sent, waiting for the response"
		diffError(t, sent(TimedOut, detail), mustFail(t, ctx, c))
	})
}

// TestStart pins when the budget begins, and that nothing is sent once it has run out, or once the caller has left.
func TestStart(t *testing.T) {
	t.Parallel()
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	late, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancel()
	const (
		hour   = time.Hour
		before = " before a request was sent, waiting for a turn or a connection"
	)
	ranOut := unsent(TimedOut, "the budget of 1h0m0s ran out"+before, 0)
	for _, tt := range []struct {
		name  string
		ctx   context.Context
		since time.Duration // of Start
		want  Error         // zero for none
	}{
		{"not set", t.Context(), 0, Error{}},
		{"in the future", t.Context(), -hour, Error{}},
		{"in time", t.Context(), hour / 2, Error{}},
		{"ran out", t.Context(), hour, ranOut},
		{"ran out long ago", t.Context(), 1000 * hour, ranOut},
		{"caller has left", canceled, 0, unsent(Canceled, "the caller left before a request was sent", 0)},
		{"caller's deadline has passed", late, 0, unsent(TimedOut, "the caller's deadline passed"+before, 0)},
	} {
		sim, c := newMemory(t, Config{Timeout: hour})
		tr := testRequest()
		if tt.since != 0 {
			tr.Start = time.Now().Add(-tt.since)
		}
		tr.Allow = func() error {
			if tt.want != (Error{}) {
				t.Errorf("%s: Allow was asked", tt.name)
			}
			return nil
		}
		token, err := c.RequestToken(tt.ctx, tr)
		if tt.want == (Error{}) {
			if err != nil {
				t.Errorf("%s: %v", tt.name, err)
			}
			continue
		}
		diffError(t, tt.want, checkError(t, token, err))
		if n := sim.CallCount(); n != 0 {
			t.Errorf("%s: %d calls", tt.name, n)
		}
	}
	// The rest of the budget bounds the call, and a start in the future does not extend it.
	srv := cabletest.NewServer(t, nil)
	srv.SetFault(cabletest.Fault{Delay: time.Hour})
	for start, timeout := range map[time.Duration]time.Duration{budget - hour: hour, hour: budget} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		tr := testRequest()
		tr.Start = time.Now().Add(start)
		token, err := newClient(t, srv, Config{Timeout: timeout}).RequestToken(ctx, tr)
		detail := fmt.Sprintf("the budget of %s ran out after the request was sent, waiting for the response", timeout)
		diffError(t, sent(TimedOut, detail), checkError(t, token, err))
	}
}

// TestObserve pins that each call is observed once.
func TestObserve(t *testing.T) {
	t.Parallel()
	srv := cabletest.NewServer(t, nil)
	var got []Call
	c := newClient(t, srv, Config{Observe: func(call Call) {
		if call.Duration <= 0 {
			t.Errorf("a call that took %s", call.Duration)
		}
		call.Duration = 0
		got = append(got, call)
	}})
	request := func() { _, _ = c.RequestToken(t.Context(), testRequest()) }
	srv.SetFault(rateLimit(1, "0"))
	request()
	srv.SetFault(cabletest.Fault{Reset: cabletest.ResetAfter, Times: 1})
	request()
	srv.SetFault(rateLimit(1, "90"))
	request()
	request() // paused, so no call
	want := []Call{{StatusCode: 429}, {StatusCode: 200, Retry: true}, {}, {StatusCode: 429, PauseBegan: true}}
	if !slices.Equal(got, want) {
		t.Errorf("calls %+v, want %+v", got, want)
	}
}

// TestElapsed pins that the clock that advanced more counts.
func TestElapsed(t *testing.T) {
	t.Parallel()
	from := time.Now()
	to := from.Add(5 * time.Second)
	slept := from.Add(5 * time.Second)
	// The layout of a time.Time with a monotonic reading, which here is 3 s less.
	(*struct {
		wall uint64
		ext  int64
	})(unsafe.Pointer(&slept)).ext -= int64(3 * time.Second)
	if slept.Sub(from) != 2*time.Second {
		t.Fatal("time.Time has another layout")
	}
	for _, tt := range []struct {
		from, to time.Time
		want     time.Duration
	}{
		{from, to, 5 * time.Second},
		{from, slept, 5 * time.Second},                      // the monotonic clock stopped
		{slept, from.Add(4 * time.Second), 2 * time.Second}, // the wall clock was set back
		{from.Round(0), to, 5 * time.Second},
	} {
		if got := Elapsed(tt.from, tt.to); got != tt.want {
			t.Errorf("from %s to %s: %s, want %s", tt.from, tt.to, got, tt.want)
		}
	}
}

// TestRequest pins the request, byte by byte where it matters, and that a second one is the same, because a client
// keeps nothing of a response, no cookie and no other address.
func TestRequest(t *testing.T) {
	t.Parallel()
	const key = "the-key-of-this-test"
	for _, tt := range []struct {
		name          string
		cfg           Config
		path          string // of token_url
		uri           string // sent
		authorization string
	}{
		{"raw", Config{}, "/v2/auth/token", "/v2/auth/token", key},
		{"bearer", Config{Bearer: true}, "/v2/auth/token", "/v2/auth/token", "Bearer " + key},
		{"user agent", Config{UserAgent: "engine/1.2"}, "/v2/auth/token", "/v2/auth/token", key},
		{"no path", Config{}, "", "/", key},
		{"escaped path", Config{}, "/a%2Fb//../c", "/a%2Fb//../c", key},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			type sent struct {
				Method, URI, Host, Proto, Body string
				Length                         int64
				Header                         http.Header
			}
			requests := make(chan sent, 10)
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				requests <- sent{r.Method, r.RequestURI, r.Host, r.Proto, string(body), r.ContentLength, r.Header}
				w.Header().Set("Set-Cookie", "session=1; Path=/")
				w.Header().Set("Alt-Svc", `h2="elsewhere.example:443"; ma=86400`)
				w.Header().Set("Strict-Transport-Security", "max-age=9999")
				fmt.Fprint(w, `{"token":"t","expiry":4102444800}`)
			}))
			t.Cleanup(srv.Close)
			cfg := tt.cfg
			cfg.RefreshKey, cfg.TokenURL = NewSecret(key), srv.URL+tt.path
			c := newClientAt(t, cfg)
			for range 2 {
				if _, err := c.RequestToken(t.Context(), TokenRequest{
					OrganizationID: `org_"<é`,
					Scopes:         []string{"transactions:write", "person:read"},
					Lifetime:       time.Hour + 999*time.Millisecond,
				}); err != nil {
					t.Fatal(err)
				}
			}
			body := `{"expiry_seconds":3600,"scopes":{"organization_id":"org_\"\u003cé",` +
				`"scopes":["transactions:write","person:read"]}}`
			want := sent{
				Method: "POST", URI: tt.uri, Host: strings.TrimPrefix(srv.URL, "http://"), Proto: "HTTP/1.1",
				Body: body, Length: int64(len(body)),
				Header: http.Header{
					"Authorization":   {tt.authorization},
					"Content-Type":    {"application/json"},
					"Accept":          {"application/json"},
					"Accept-Encoding": {"identity"},
					"Cache-Control":   {"no-store"},
					"Content-Length":  {fmt.Sprint(len(body))},
				},
			}
			if tt.cfg.UserAgent != "" {
				want.Header["User-Agent"] = []string{tt.cfg.UserAgent}
			}
			if diff := cmp.Diff([]sent{want, want}, []sent{<-requests, <-requests}); diff != "" {
				t.Errorf("requests (-want +got):\n%s", diff)
			}
			if len(requests) != 0 {
				t.Errorf("%d more requests", len(requests))
			}
		})
	}
}

// TestClose pins that a call under way when its client is closed ends as it would, and that its connection is closed
// then.
func TestClose(t *testing.T) {
	t.Parallel()
	arrived, closed := make(chan struct{}), make(chan struct{})
	var once sync.Once
	srv := cabletest.NewTLSServer(t, &cabletest.Options{Log: func(cabletest.Call) {
		once.Do(func() {
			close(arrived)
			<-closed
		})
	}})
	c := newClient(t, srv, Config{})
	done := make(chan error)
	go func() {
		_, err := c.RequestToken(t.Context(), testRequest())
		done <- err
	}()
	<-arrived
	c.Close()
	close(closed)
	if err := <-done; err != nil {
		t.Errorf("the call under way: %v", err)
	}
	mustMint(t, c)
	mustMint(t, c) // a later call's connection is closed, too
	if n := srv.Connections(); n != 3 {
		t.Errorf("%d connections, want 3", n)
	}
	idle := cabletest.NewServer(t, nil)
	c = newClient(t, idle, Config{})
	mustMint(t, c)
	c.Close()
	mustMint(t, c)
	if n := idle.Connections(); n != 2 {
		t.Errorf("%d connections, want 2, because Close closes an idle one", n)
	}
}

// TestNew pins which configurations are refused. See also TestParseTokenURL and TestCheckCACert.
func TestNew(t *testing.T) {
	t.Parallel()
	key := NewSecret(testKey)
	const (
		noKey  = "the refresh key is missing"
		scheme = "token_url must begin with https:// (http:// for a loopback host only): " + exampleURL
		notPEM = "ca_cert is not PEM at block 1: write CERTIFICATE blocks only, without other text around them"
	)
	for _, tt := range []struct {
		name string
		cfg  Config
		want string // the whole error; "" for none
	}{
		{"default", Config{RefreshKey: key}, ""},
		{"no key", Config{}, noKey},
		{"empty key", Config{RefreshKey: NewSecret("")}, noKey},
		{"bad URL", Config{RefreshKey: key, TokenURL: "ftp://h/"}, scheme},
		{"certificate", Config{RefreshKey: key, CACert: newAuthority(t).pem}, ""},
		{"bad certificate", Config{RefreshKey: key, CACert: "hello"}, notPEM},
	} {
		c, err := New(tt.cfg)
		if got := fmt.Sprint(err); err != nil && got != tt.want || err == nil && tt.want != "" ||
			(c == nil) != (err != nil) {
			t.Errorf("%s: got %v, %q; want %q", tt.name, c, got, tt.want)
		}
	}
}
