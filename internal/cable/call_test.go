// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
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
	for _, tt := range []struct {
		name  string
		fault cabletest.Fault
		want  Token // except for Value, Expiry and the times
	}{
		{"as requested", cabletest.Fault{}, requested},
		{"no scopes", cabletest.Fault{Grant: &cabletest.Grant{OmitScopes: true}}, Token{}},
		{
			"empty list of scopes",
			cabletest.Fault{Grant: &cabletest.Grant{Scopes: &[]string{}}},
			Token{ScopesOrganizationID: org, Scopes: []string{}},
		},
		{
			"other scopes of another organization",
			cabletest.Fault{Grant: &cabletest.Grant{Scopes: &[]string{"b:c", "a:b"}, ScopesOrganizationID: &other}},
			Token{ScopesOrganizationID: other, Scopes: []string{"b:c", "a:b"}},
		},
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

// TestFaults pins the error for each way in which Cable can fail, how often Cable was called, and how many tokens were
// issued. See also TestDecode and TestRetries.
func TestFaults(t *testing.T) {
	t.Parallel()
	now := map[string]string{"Retry-After": "0"}
	html := map[string]string{"Content-Type": "text/html"}
	unreachable := Error{Kind: Unreachable, Detail: connectionClosed, MaybeIssued: true, Attempts: 1}
	timedOut := Error{Kind: TimedOut, Detail: budgetRanOut, MaybeIssued: true, Attempts: 1}
	invalid := func(detail string) Error {
		return Error{Kind: InvalidResponse, StatusCode: 200, Detail: detail, MaybeIssued: true, Attempts: 1}
	}
	other := func(status int, detail string) Error {
		return Error{
			Kind:        InvalidResponse,
			StatusCode:  status,
			Detail:      fmt.Sprintf("its status is %d instead of 200%s", status, detail),
			MaybeIssued: true,
			Attempts:    1,
		}
	}
	encoded := func(coding string) cabletest.Fault {
		return cabletest.Fault{Header: map[string]string{"Content-Encoding": coding}}
	}
	const noJSON = "it is not a JSON object of the documented shape"
	type faultTest struct {
		name   string
		fault  cabletest.Fault
		want   Error
		minted int // calls are want.Attempts
	}
	tests := []faultTest{
		{"reset before", cabletest.Fault{Reset: cabletest.ResetBefore}, unreachable, 0},
		{"reset after", cabletest.Fault{Reset: cabletest.ResetAfter}, unreachable, 1},
		{"half a response", cabletest.Fault{Reset: cabletest.ResetHalf}, unreachable, 1},
		{"half an error", cabletest.Fault{Status: 401, Reset: cabletest.ResetHalf}, responded(401, ""), 0},
		{"hangs before the response", cabletest.Fault{Delay: time.Hour}, timedOut, 0},
		{"hangs in the response", cabletest.Fault{Stall: time.Hour}, timedOut, 1},
		{
			"hangs in a redirect",
			cabletest.Fault{Status: 302, Stall: time.Hour},
			other(302, ", and redirects are not followed: check token_url"),
			0,
		},
		{"8 MiB", cabletest.Fault{BodySize: 8 << 20}, invalid("it is larger than 1048576 bytes"), 1},
		{"8 MiB of an error", cabletest.Fault{Status: 400, BodySize: 8 << 20}, responded(400, notCables), 0},
		{
			"8 MiB of JSON",
			cabletest.Fault{Body: `{"token":"`, BodySize: 8 << 20},
			invalid("it is larger than 1048576 bytes"),
			1,
		},
		{
			"gzip bomb",
			cabletest.Fault{BodySize: 2 << 20, Gzip: true},
			invalid("its Content-Encoding is gzip, but only identity was accepted"),
			1,
		},
		{
			"gzip bomb of an error",
			cabletest.Fault{Status: 400, BodySize: 2 << 20, Gzip: true},
			responded(400, notCables),
			0,
		},
		{"HTML", cabletest.Fault{Body: "<html>sign in</html>", Header: html}, invalid(noJSON), 1},
		{
			"HTML of an error",
			cabletest.Fault{Status: 403, Body: "<html>blocked</html>", Header: html},
			responded(403, notCables),
			0,
		},
		{"empty", cabletest.Fault{Status: 200, Body: " "}, invalid(noJSON), 0},
		{
			"from a cache",
			cabletest.Fault{Header: map[string]string{"Age": "3000"}},
			invalid("its Age header exceeds the duration of the call: it comes from a cache"),
			1,
		},
		{
			"unreadable Age",
			cabletest.Fault{Header: map[string]string{"Age": "-1"}},
			invalid("its Age header is not one whole number of seconds"),
			1,
		},
		{
			"another coding", encoded("br, é\u202e" + strings.Repeat("x", 100)),
			invalid(`its Content-Encoding is br, é\u202e` + strings.Repeat("x", 28) + ", but only " +
				"identity was accepted"),
			1,
		},
		{
			"another coding of an error",
			cabletest.Fault{Status: 401, Header: encoded("br").Header},
			responded(401, "Unauthorized"),
			0,
		},

		{"201", cabletest.Fault{Status: 201}, other(201, ""), 0},
		{"202", cabletest.Fault{Status: 202, Header: now}, other(202, ""), 0},
		{"204", cabletest.Fault{Status: 204}, other(204, ""), 0},
	}
	for _, status := range []int{400, 401, 403, 404, 408, 425, 429, 500, 502, 503, 504} {
		// A gateway that responds with 408 or a 5xx may have forwarded the call.
		want := Error{
			Kind:        Responded,
			StatusCode:  status,
			Detail:      http.StatusText(status),
			MaybeIssued: status == 408 || status >= 500,
			Attempts:    1,
		}
		fault := cabletest.Fault{Status: status, Header: now}
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
				cfg := Config{Timeout: time.Minute}
				if tt.want.Kind == TimedOut {
					cfg.Timeout = budget
				}
				c := newClient(t, srv, cfg)
				diffError(t, tt.want, mustFailInTime(t, c)) // an error that hangs does not wait for the budget
				checkCounts(t, srv, tt.want.Attempts, tt.minted)
				if tt.want.StatusCode != 429 {
					srv.ClearFaults()
					mustMint(t, c)
				}
				if t.Failed() {
					t.Logf("with %s", protocol)
					return
				}
			}
		})
	}
}

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

// writeUntilGone writes text again and again, until the other side has closed the connection.
func writeUntilGone(conn net.Conn, text string, pause time.Duration) {
	for {
		if _, err := io.WriteString(conn, text); err != nil {
			return
		}
		time.Sleep(pause) // of the simulated server
	}
}

// TestHostileServer pins that nothing that a server writes takes longer than the budget, is retried, panics, or becomes
// part of an error.
func TestHostileServer(t *testing.T) {
	t.Parallel()
	unreachable := func(detail string) Error {
		return Error{Kind: Unreachable, Detail: detail, MaybeIssued: true, Attempts: 1}
	}
	timedOut := Error{Kind: TimedOut, Detail: budgetRanOut, MaybeIssued: true, Attempts: 1}
	const longHead = "the head of its response is larger than 65536 bytes"
	for _, tt := range []struct {
		name    string
		respond func(conn net.Conn, sent string)
		want    Error
	}{
		{"silence, then gone", func(net.Conn, string) {}, unreachable(connectionClosed)},
		{"silence", func(c net.Conn, _ string) { hang(c) }, timedOut},
		{
			"no HTTP",
			func(c net.Conn, _ string) { _, _ = io.WriteString(c, "SSH-2.0-OpenSSH_9.6\r\n\r\n") },
			unreachable(notHTTP),
		},
		{
			"endless garbage",
			func(c net.Conn, _ string) { writeUntilGone(c, strings.Repeat("x", 4096), 0) },
			unreachable(longHead),
		},
		{"the request itself", func(c net.Conn, sent string) { _, _ = io.WriteString(c, sent) }, unreachable(notHTTP)},
		{"the request in the status line", func(c net.Conn, sent string) {
			_, _ = fmt.Fprintf(c, "HTTP/1.1 400 %s\r\nContent-Length: 0\r\n\r\n", strings.ReplaceAll(sent, "\r\n", " "))
		}, responded(400, notCables)},
		{"the request as a header's name", func(c net.Conn, sent string) {
			_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\n%s\r\n\r\n", strings.ReplaceAll(sent, "\r\n", " "))
		}, unreachable(notHTTP)},
		{"the request as a length", func(c net.Conn, sent string) {
			_, _ = fmt.Fprintf(
				c, "HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\n", strings.ReplaceAll(sent, "\r\n", " "),
			)
		}, unreachable(notHTTP)},
		{"the request as a chunk's length", func(c net.Conn, sent string) {
			_, _ = fmt.Fprintf(
				c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%s\r\n", strings.ReplaceAll(sent, "\r\n", " "),
			)
		}, unreachable(notHTTP)},
		{"status 999", func(c net.Conn, _ string) {
			_, _ = io.WriteString(c, "HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n")
		}, Error{Kind: Responded, StatusCode: 999, Detail: notCables, MaybeIssued: true, Attempts: 1}},
		{"status 0", func(c net.Conn, _ string) {
			_, _ = io.WriteString(c, "HTTP/1.1 000 Odd\r\nContent-Length: 0\r\n\r\n")
		}, Error{Kind: InvalidResponse, Detail: "its status is 0 instead of 200", MaybeIssued: true, Attempts: 1}},
		{"endless header", func(c net.Conn, _ string) {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n")
			writeUntilGone(c, "X-Y: "+strings.Repeat("z", 1000)+"\r\n", 0)
		}, unreachable(longHead)},
		{"dripping header", func(c net.Conn, _ string) {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n")
			writeUntilGone(c, "X: y\r\n", 10*time.Millisecond)
		}, timedOut},
		{
			"storm of 1xx",
			func(c net.Conn, _ string) { writeUntilGone(c, "HTTP/1.1 103 Early Hints\r\nX: y\r\n\r\n", 0) },
			unreachable(longHead),
		},
		{"dripping 1xx", func(c net.Conn, _ string) {
			writeUntilGone(c, "HTTP/1.1 102 Processing\r\n\r\n", 10*time.Millisecond)
		}, timedOut},
		{"some 1xx before a refusal", func(c net.Conn, _ string) {
			_, _ = io.WriteString(
				c, strings.Repeat("HTTP/1.1 100 Continue\r\n\r\n", 50)+"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n",
			)
		}, responded(401, notCables)},
		// The body of a 101 is the bare connection, so no context ends a read of it.
		{"another protocol", func(c net.Conn, _ string) {
			_, _ = io.WriteString(
				c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
			)
			hang(c)
		}, Error{
			Kind:        InvalidResponse,
			StatusCode:  101,
			Detail:      "its status is 101 instead of 200",
			MaybeIssued: true,
			Attempts:    1,
		}},
		{"endless chunks", func(c net.Conn, _ string) {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
			writeUntilGone(c, "1000\r\n"+strings.Repeat(" ", 4096)+"\r\n", 0)
		}, Error{
			Kind:        InvalidResponse,
			StatusCode:  200,
			Detail:      "it is larger than 1048576 bytes",
			MaybeIssued: true,
			Attempts:    1,
		}},
		{"endless without a length", func(c net.Conn, _ string) {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
			writeUntilGone(c, strings.Repeat(" ", 4096), 0)
		}, Error{
			Kind:        InvalidResponse,
			StatusCode:  200,
			Detail:      "it is larger than 1048576 bytes",
			MaybeIssued: true,
			Attempts:    1,
		}},
		{"dripping body", func(c net.Conn, _ string) {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
			writeUntilGone(c, " ", 10*time.Millisecond)
		}, timedOut},
		{"dripping error", func(c net.Conn, _ string) {
			_, _ = io.WriteString(c, "HTTP/1.1 500 No\r\nContent-Length: 1000000\r\n\r\n")
			writeUntilGone(c, " ", 10*time.Millisecond)
		}, Error{Kind: Responded, StatusCode: 500, MaybeIssued: true, Attempts: 1}},
		{"short body", func(c net.Conn, _ string) {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"+`{"token":"t","expiry":1}`)
		}, unreachable(connectionClosed)},
		{"two lengths", func(c net.Conn, _ string) {
			_, _ = io.WriteString(
				c, "HTTP/1.1 200 OK\r\nContent-Length: 24\r\nContent-Length: 25\r\n\r\n"+`{"token":"t","expiry":1}`,
			)
		}, unreachable(notHTTP)},
		{"storm of trailers", func(c net.Conn, _ string) {
			_, _ = io.WriteString(
				c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n1\r\n \r\n0\r\n",
			)
			writeUntilGone(c, "X: y\r\n", 0)
		}, unreachable(notHTTP)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			url, connections := rawServer(t, func(conn net.Conn) { tt.respond(conn, readRequest(conn)) })
			cfg := Config{TokenURL: url, Timeout: time.Minute} // the budget is not waited for without need
			if tt.want.Kind == TimedOut {
				cfg.Timeout = budget
			}
			diffError(t, tt.want, mustFailInTime(t, newClientAt(t, cfg)))
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
				srv.SetFault(
					cabletest.Fault{
						Status: status, Header: map[string]string{"Location": to, "Refresh": "0; url=" + other.URL},
					},
				)
				e := mustFail(t, t.Context(), newClient(t, srv, Config{}))
				diffError(t, Error{
					Kind: InvalidResponse, StatusCode: status, MaybeIssued: true, Attempts: 1,
					Detail: fmt.Sprintf(
						"its status is %d instead of 200, and redirects are not followed: check token_url", status,
					),
				}, e)
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
			diffError(
				t,
				Error{
					Kind:        Canceled,
					Detail:      "the caller left after the request was sent",
					MaybeIssued: true,
					Attempts:    1,
				},
				mustFail(t, ctx, c),
			)
			<-gone // the connection is not left open
		})
	}
	t.Run("at its deadline", func(t *testing.T) {
		t.Parallel()
		url, _ := rawServer(t, func(conn net.Conn) { readRequest(conn); hang(conn) })
		ctx, cancel := context.WithTimeout(t.Context(), budget)
		defer cancel()
		c := newClientAt(t, Config{TokenURL: url, Timeout: time.Minute})
		diffError(
			t,
			Error{
				Kind:        TimedOut,
				Detail:      "the caller's deadline passed after the request was sent, waiting for the response",
				MaybeIssued: true,
				Attempts:    1,
			},
			mustFail(t, ctx, c),
		)
	})
}

// TestStart pins when the budget begins, and that nothing is sent once it has run out, or once the caller has left.
func TestStart(t *testing.T) {
	t.Parallel()
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	late, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancel()
	const hour = time.Hour
	for _, tt := range []struct {
		name  string
		ctx   context.Context
		since time.Duration // of Start
		want  Error         // zero for none
	}{
		{"not set", t.Context(), 0, Error{}},
		{"in the future", t.Context(), -hour, Error{}},
		{"in time", t.Context(), hour / 2, Error{}},
		{
			"ran out",
			t.Context(),
			hour,
			Error{
				Kind:   TimedOut,
				Detail: "the budget of 1h0m0s ran out before a request was sent, waiting for a turn or a connection",
			},
		},
		{
			"ran out long ago",
			t.Context(),
			1000 * hour,
			Error{
				Kind:   TimedOut,
				Detail: "the budget of 1h0m0s ran out before a request was sent, waiting for a turn or a connection",
			},
		},
		{"caller has left", canceled, 0, Error{Kind: Canceled, Detail: "the caller left before a request was sent"}},
		{
			"caller's deadline has passed",
			late,
			0,
			Error{
				Kind:   TimedOut,
				Detail: "the caller's deadline passed before a request was sent, waiting for a turn or a connection",
			},
		},
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
	// The rest of the budget bounds the call.
	srv := cabletest.NewServer(t, nil)
	srv.SetFault(cabletest.Fault{Delay: time.Hour})
	tr := testRequest()
	tr.Start = time.Now().Add(-hour + budget)
	token, err := newClient(t, srv, Config{Timeout: hour}).RequestToken(t.Context(), tr)
	diffError(
		t,
		Error{
			Kind:        TimedOut,
			Detail:      "the budget of 1h0m0s ran out after the request was sent, waiting for the response",
			MaybeIssued: true,
			Attempts:    1,
		},
		checkError(t, token, err),
	)
}

// TestCallersAreIndependent pins that a caller that leaves does not end the calls of others on the same connection.
func TestCallersAreIndependent(t *testing.T) {
	t.Parallel()
	arrived, release := make(chan struct{}, 20), make(chan struct{})
	srv := cabletest.NewTLSServer(t, &cabletest.Options{Log: func(cabletest.Call) {
		arrived <- struct{}{}
		<-release
	}})
	c := newClient(t, srv, Config{})
	ctx, leave := context.WithCancel(t.Context())
	var left, stayed sync.WaitGroup
	for range 10 {
		left.Go(func() {
			diffError(
				t,
				Error{
					Kind:        Canceled,
					Detail:      "the caller left after the request was sent",
					MaybeIssued: true,
					Attempts:    1,
				},
				mustFail(t, ctx, c),
			)
		})
		stayed.Go(func() {
			if _, err := c.RequestToken(t.Context(), testRequest()); err != nil {
				t.Error(err)
			}
		})
	}
	for range 20 {
		<-arrived
	}
	leave()
	left.Wait()
	close(release)
	stayed.Wait()
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
