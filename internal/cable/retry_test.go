// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

const (
	budget = time.Second

	// slack is what a busy machine may add to the budget.
	slack = 2 * time.Second
)

// failsInTime is fails, with a bound on the time that it takes.
func failsInTime(t testing.TB, c *cable.Client) *cable.Error {
	t.Helper()
	start := time.Now()
	e := fails(t, t.Context(), c)
	if took := time.Since(start); took > budget+slack {
		t.Errorf("took %s of a budget of %s", took, budget)
	}
	return e
}

// diffError compares an error but for RetryAfter, which depends on the clock.
func diffError(t testing.TB, want cable.Error, got *cable.Error) {
	t.Helper()
	if diff := cmp.Diff(&want, got, cmpopts.IgnoreFields(cable.Error{}, "RetryAfter")); diff != "" {
		t.Errorf("error (-want +got):\n%s", diff)
	}
}

// TestFaults pins, for each way in which Cable can misbehave, the error, how
// often Cable was called and how many tokens that left: only what cannot have
// minted is repeated. See also TestRepeats.
func TestFaults(t *testing.T) {
	t.Parallel()
	after := func(value string) map[string]string { return map[string]string{"Retry-After": value} }
	dated := func(value string) map[string]string {
		return map[string]string{"Retry-After": value, "Date": "Sun, 31 Mar 2024 23:00:00 GMT"}
	}
	const closed = "the connection was closed before the answer was whole"
	const late = "the budget of 1s ran out after the request was sent"
	answered := func(status, attempts int) cable.Error {
		return cable.Error{Kind: cable.Responded, StatusCode: status, Detail: http.StatusText(status), Attempts: attempts}
	}
	maybe := func(e cable.Error) cable.Error {
		e.MaybeIssued = true
		return e
	}
	invalid := func(detail string) cable.Error {
		return cable.Error{Kind: cable.InvalidResponse, StatusCode: 200, Detail: detail, MaybeIssued: true, Attempts: 1}
	}
	for _, tt := range []struct {
		name   string
		fault  cabletest.Fault
		want   cable.Error
		minted int // calls are want.Attempts
	}{
		{"reset before", cabletest.Fault{Reset: cabletest.ResetBefore}, cable.Error{Kind: cable.Unreachable, Detail: closed, MaybeIssued: true, Attempts: 1}, 0},
		{"reset after", cabletest.Fault{Reset: cabletest.ResetAfter}, cable.Error{Kind: cable.Unreachable, Detail: closed, MaybeIssued: true, Attempts: 1}, 1},
		{"half an answer", cabletest.Fault{Reset: cabletest.ResetHalf}, cable.Error{Kind: cable.Unreachable, Detail: closed, MaybeIssued: true, Attempts: 1}, 1},
		{"half an error", cabletest.Fault{Status: 401, Reset: cabletest.ResetHalf}, cable.Error{Kind: cable.Responded, StatusCode: 401, Attempts: 1}, 0},
		{"hang before the answer", cabletest.Fault{Delay: time.Hour}, cable.Error{Kind: cable.TimedOut, Detail: late, MaybeIssued: true, Attempts: 1}, 0},
		{"hang in the answer", cabletest.Fault{Stall: time.Hour}, cable.Error{Kind: cable.TimedOut, Detail: late, MaybeIssued: true, Attempts: 1}, 1},
		{"hang in an error", cabletest.Fault{Status: 401, Stall: time.Hour}, cable.Error{Kind: cable.Responded, StatusCode: 401, Attempts: 1}, 0},
		{"hang in a redirect", cabletest.Fault{Status: 302, Stall: time.Hour}, cable.Error{Kind: cable.InvalidResponse, StatusCode: 302, Detail: "its status is 302 instead of 200, and redirects are not followed: check token_url", Attempts: 1}, 0},
		{"8 MiB", cabletest.Fault{BodySize: 8 << 20}, invalid("it is larger than 1048576 bytes"), 1},
		{"8 MiB of an error", cabletest.Fault{Status: 400, BodySize: 8 << 20}, cable.Error{Kind: cable.Responded, StatusCode: 400, Attempts: 1}, 0},
		{"8 MiB of JSON", cabletest.Fault{Body: `{"token":"`, BodySize: 8 << 20}, invalid("it is larger than 1048576 bytes"), 1},
		{"gzip bomb", cabletest.Fault{BodySize: 2 << 20, Gzip: true}, invalid("it is not a JSON object of the documented shape"), 1},
		{"gzip bomb of an error", cabletest.Fault{Status: 400, BodySize: 2 << 20, Gzip: true}, cable.Error{Kind: cable.Responded, StatusCode: 400, Attempts: 1}, 0},
		{"HTML", cabletest.Fault{Body: "<html>sign in</html>", Header: map[string]string{"Content-Type": "text/html"}}, invalid("it is not a JSON object of the documented shape"), 1},
		{"HTML of an error", cabletest.Fault{Status: 403, Body: "<html>blocked</html>", Header: map[string]string{"Content-Type": "text/html"}}, cable.Error{Kind: cable.Responded, StatusCode: 403, Attempts: 1}, 0},
		{"empty", cabletest.Fault{Status: 200, Body: " "}, invalid("it is not a JSON object of the documented shape"), 0},
		{"null", cabletest.Fault{Body: "null"}, invalid("it holds no token"), 1},
		{"list", cabletest.Fault{Body: "[]"}, invalid("it is not a JSON object of the documented shape"), 1},
		{"two answers", cabletest.Fault{Body: `{"token":"a","expiry":1}{"token":"b","expiry":1}`}, invalid("it is not a JSON object of the documented shape"), 1},
		{"nested deep", cabletest.Fault{Body: strings.Repeat("[", 1<<20)}, invalid("it is not a JSON object of the documented shape"), 1},
		{
			"200 with an error envelope", cabletest.Fault{Status: 200, Message: "no such key", Errors: []cabletest.FieldError{{Field: "scopes.scopes", Message: "unknown"}, {Message: "and more"}}},
			invalid("it holds no token, but says: no such key: scopes.scopes: unknown; and more"), 0,
		},
		{"no token", cabletest.Fault{Grant: &cabletest.Grant{OmitToken: true}}, invalid("it holds no token"), 1},
		{"token null", cabletest.Fault{Body: `{"token":null,"expiry":1711929600}`}, invalid("it holds no token"), 1},
		{"token empty", cabletest.Fault{Body: `{"token":"","expiry":1711929600}`}, invalid("it holds no token"), 1},
		{"token of another type", cabletest.Fault{Body: `{"token":["a"],"expiry":1711929600}`}, invalid(`its field "token" is not of the documented type`), 1},
		{"token that no header can carry", cabletest.Fault{Body: `{"token":"a\u001b[2Jb","expiry":1711929600}`}, invalid("its token holds characters that no header can carry"), 1},
		{"token of two lines", cabletest.Fault{Body: `{"token":"a\r\nX-Evil: b","expiry":1711929600}`}, invalid("its token holds characters that no header can carry"), 1},
		{"no expiry", cabletest.Fault{Grant: &cabletest.Grant{OmitExpiry: true}}, invalid("it holds no expiry"), 1},
		{"expiry null", cabletest.Fault{Grant: &cabletest.Grant{Expiry: []byte(`null`)}}, invalid("its expiry is not a whole number of seconds"), 1},
		{"expiry a string", cabletest.Fault{Grant: &cabletest.Grant{Expiry: []byte(`"1711929600"`)}}, invalid("its expiry is not a whole number of seconds"), 1},
		{"expiry a float", cabletest.Fault{Grant: &cabletest.Grant{Expiry: []byte(`1711929600.5`)}}, invalid("its expiry is not a whole number of seconds"), 1},
		{"expiry with an exponent", cabletest.Fault{Grant: &cabletest.Grant{Expiry: []byte(`1.7e9`)}}, invalid("its expiry is not a whole number of seconds"), 1},
		{"expiry in milliseconds", cabletest.Fault{Grant: &cabletest.Grant{Expiry: []byte(`1711929600000`)}}, invalid("its expiry 1711929600000 is not a Unix time in seconds"), 1},
		{"expiry zero", cabletest.Fault{Grant: &cabletest.Grant{Expiry: []byte(`0`)}}, invalid("its expiry 0 is not a Unix time in seconds"), 1},
		{"expiry negative", cabletest.Fault{Grant: &cabletest.Grant{Expiry: []byte(`-1711929600`)}}, invalid("its expiry -1711929600 is not a Unix time in seconds"), 1},
		{"expiry of the year 10000", cabletest.Fault{Grant: &cabletest.Grant{Expiry: []byte(`253402300800`)}}, invalid("its expiry 253402300800 is not a Unix time in seconds"), 1},
		{"expiry beyond int64", cabletest.Fault{Grant: &cabletest.Grant{Expiry: []byte(`9223372036854775808`)}}, invalid("its expiry is not a whole number of seconds"), 1},
		{"scopes of another type", cabletest.Fault{Body: `{"token":"a","expiry":1,"scopes":["a:b"]}`}, invalid(`its field "scopes" is not of the documented type`), 1},
		{"organization of another type", cabletest.Fault{Body: `{"token":"a","expiry":1,"organization_id":7}`}, invalid(`its field "organization_id" is not of the documented type`), 1},

		{"201", cabletest.Fault{Status: 201}, cable.Error{Kind: cable.InvalidResponse, StatusCode: 201, Detail: "its status is 201 instead of 200", MaybeIssued: true, Attempts: 1}, 0},
		{"204", cabletest.Fault{Status: 204}, cable.Error{Kind: cable.InvalidResponse, StatusCode: 204, Detail: "its status is 204 instead of 200", MaybeIssued: true, Attempts: 1}, 0},
		{"400", cabletest.Fault{Status: 400}, answered(400, 1), 0},
		{"401", cabletest.Fault{Status: 401}, answered(401, 1), 0},
		{"403", cabletest.Fault{Status: 403}, answered(403, 1), 0},
		{"404", cabletest.Fault{Status: 404}, answered(404, 1), 0},
		{"408", cabletest.Fault{Status: 408, Header: after("0")}, maybe(answered(408, 1)), 0},
		{"425", cabletest.Fault{Status: 425, Header: after("0")}, answered(425, 1), 0},
		// Whoever answers these need not know what became of the request.
		{"500", cabletest.Fault{Status: 500, Header: after("0")}, maybe(answered(500, 1)), 0},
		{"502", cabletest.Fault{Status: 502, Header: after("0")}, maybe(answered(502, 1)), 0},
		{"504", cabletest.Fault{Status: 504, Header: after("0")}, maybe(answered(504, 1)), 0},

		{"429", cabletest.Fault{Status: 429}, answered(429, 1), 0},
		{"429, now and hanging", cabletest.Fault{Status: 429, Header: after("0"), Stall: time.Hour}, cable.Error{Kind: cable.TimedOut, Detail: "the budget of 1s ran out after cable answered 429", Attempts: 1}, 0},
		{"429, in a minute", cabletest.Fault{Status: 429, Header: after("60")}, answered(429, 1), 0},
		{"429, at the budget's end", cabletest.Fault{Status: 429, Header: after("1")}, answered(429, 1), 0},
		{"429, nonsense", cabletest.Fault{Status: 429, Header: after("soon")}, answered(429, 1), 0},
		{"429, negative", cabletest.Fault{Status: 429, Header: after("-1")}, answered(429, 1), 0},
		{"429, a fraction", cabletest.Fault{Status: 429, Header: after("0.5")}, answered(429, 1), 0},
		{"429, beyond int64", cabletest.Fault{Status: 429, Header: after("99999999999999999999")}, answered(429, 1), 0},
		{"429, int64", cabletest.Fault{Status: 429, Header: after("9223372036854775807")}, answered(429, 1), 0},
		{"429, dated in a minute", cabletest.Fault{Status: 429, Header: dated("Sun, 31 Mar 2024 23:01:00 GMT")}, answered(429, 1), 0},
		{"429, dated in the year 9999", cabletest.Fault{Status: 429, Header: dated("Fri, 31 Dec 9999 23:59:59 GMT")}, answered(429, 1), 0},
		{"503", cabletest.Fault{Status: 503}, answered(503, 1), 0},
		{"503, now", cabletest.Fault{Status: 503, Header: after("0")}, answered(503, 3), 0},
		{"503, now and hanging", cabletest.Fault{Status: 503, Header: after("0"), Stall: time.Hour}, cable.Error{Kind: cable.TimedOut, Detail: "the budget of 1s ran out after cable answered 503", Attempts: 1}, 0},
		{"503, in a minute", cabletest.Fault{Status: 503, Header: after("60")}, answered(503, 1), 0},
		{"503, nonsense", cabletest.Fault{Status: 503, Header: after("in a bit")}, answered(503, 1), 0},
		{"503, dated now", cabletest.Fault{Status: 503, Header: dated("Sun, 31 Mar 2024 23:00:00 GMT")}, answered(503, 3), 0},
		{"503, dated in the year 9999", cabletest.Fault{Status: 503, Header: dated("Fri, 31 Dec 9999 23:59:59 GMT")}, answered(503, 1), 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for _, protocol := range []string{"HTTP/1.1", "HTTP/2"} {
				var srv *cabletest.Server
				if protocol == "HTTP/1.1" {
					srv = cabletest.NewServer(t, nil)
				} else {
					srv = cabletest.NewTLSServer(t, nil)
				}
				srv.SetFault(tt.fault)
				cfg := cable.Config{CACert: srv.CA} // what does not wait may take long on a busy machine
				if tt.fault.Delay+tt.fault.Stall > 0 || tt.fault.Header["Retry-After"] == "1" {
					cfg.Timeout = budget
				}
				c := newClient(t, srv, cfg)
				start := time.Now()
				diffError(t, tt.want, fails(t, t.Context(), c))
				if took := time.Since(start); cfg.Timeout > 0 && took > budget+slack {
					t.Errorf("took %s of a budget of %s", took, budget)
				}
				sees(t, srv, tt.want.Attempts, tt.minted)
				if tt.want.StatusCode != 429 && !strings.Contains(tt.name, "429") {
					srv.ClearFaults()
					mints(t, c) // the next good one works
				}
				if t.Failed() {
					t.Logf("over %s", protocol)
					return
				}
			}
		})
	}
}

// TestRepeatOverNetwork pins that what is repeated ends well where Cable comes
// to its senses. The rest of it needs no network: see TestRepeats.
func TestRepeatOverNetwork(t *testing.T) {
	t.Parallel()
	for _, status := range []int{429, 503} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			t.Parallel()
			srv := cabletest.NewServer(t, nil)
			srv.SetFault(cabletest.Fault{Status: status, Times: 1, Header: map[string]string{"Retry-After": "0"}})
			if got := mints(t, newClient(t, srv, cable.Config{})); got.Attempts != 2 {
				t.Errorf("%d attempts, want 2", got.Attempts)
			}
			sees(t, srv, 2, 1)
			if n := srv.Connections(); n != 1 {
				t.Errorf("%d connections, want 1", n)
			}
		})
	}
}

// TestRefusedConnection pins the one failure without an answer that is
// repeated, and that it ends well when somebody listens in time.
func TestRefusedConnection(t *testing.T) {
	t.Parallel()
	srv := cabletest.NewServer(t, nil)
	c := newClient(t, srv, cable.Config{})
	srv.Close()
	diffError(t, cable.Error{Kind: cable.Unreachable, Detail: "connection refused", Attempts: 3}, fails(t, t.Context(), c))
	sees(t, srv, 0, 0)

	// Also where a connection was kept before. (One that is dead, and that
	// net/http has not yet found dead, counts as "the request was sent".)
	srv = cabletest.NewServer(t, nil)
	c = newClient(t, srv, cable.Config{})
	mints(t, c)
	c.Close()
	srv.Close()
	diffError(t, cable.Error{Kind: cable.Unreachable, Detail: "connection refused", Attempts: 3}, fails(t, t.Context(), c))
}

// TestRedirect pins that no host but the configured one is ever called, and
// that a Location which is no URL makes no difference.
func TestRedirect(t *testing.T) {
	t.Parallel()
	for _, status := range []int{300, 301, 302, 303, 304, 307, 308} {
		for _, location := range []string{"other", "self", "/elsewhere", "", "%zz", "ftp://h/", "https://u:p@h/{refresh_key}", "?{refresh_key}", ":"} {
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
				srv.SetFault(cabletest.Fault{Status: status, Header: map[string]string{"Location": to, "Refresh": "0; url=" + other.URL}})
				e := fails(t, t.Context(), newClient(t, srv, cable.Config{}))
				diffError(t, cable.Error{
					Kind: cable.InvalidResponse, StatusCode: status, Attempts: 1,
					Detail: fmt.Sprintf("its status is %d instead of 200, and redirects are not followed: check token_url", status),
				}, e)
				sees(t, srv, 1, 0)
				if n := other.CallCount() + other.Connections(); n != 0 {
					t.Errorf("the other host saw %d calls and connections", n)
				}
			})
		}
	}
}

// rawServer listens on loopback and hands each connection to serve, whose
// return closes it.
func rawServer(t testing.TB, serve func(net.Conn)) (url string, connections *atomic.Int32) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	connections = new(atomic.Int32)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var open []net.Conn
	wg.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			connections.Add(1)
			mu.Lock()
			open = append(open, conn)
			mu.Unlock()
			wg.Go(func() {
				defer func() { _ = conn.Close() }()
				serve(conn)
			})
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		mu.Lock()
		for _, conn := range open {
			_ = conn.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return "http://" + listener.Addr().String() + "/v2/auth/token", connections
}

// request reads a request whole and returns it as it was sent.
func request(conn net.Conn) string {
	var sent strings.Builder
	r, err := http.ReadRequest(bufio.NewReader(io.TeeReader(conn, &sent)))
	if err != nil {
		return ""
	}
	_, _ = io.Copy(io.Discard, r.Body)
	return sent.String()
}

// hang returns when the other side is gone.
func hang(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) }

// repeatUntilGone writes text again and again, until the other side is gone.
func repeatUntilGone(conn net.Conn, text string, pause time.Duration) {
	for {
		if _, err := io.WriteString(conn, text); err != nil {
			return
		}
		time.Sleep(pause) // of the simulated server's own
	}
}

// TestHostileServer pins that nothing that a server writes takes longer than
// the budget, is repeated, panics or gets into an error.
func TestHostileServer(t *testing.T) {
	t.Parallel()
	const (
		closed = "the connection was closed before the answer was whole"
		broken = "the exchange broke off or was not HTTP"
		late   = "the budget of 1s ran out after the request was sent"
	)
	unreachable := func(detail string) cable.Error {
		return cable.Error{Kind: cable.Unreachable, Detail: detail, MaybeIssued: true, Attempts: 1}
	}
	timedOut := cable.Error{Kind: cable.TimedOut, Detail: late, MaybeIssued: true, Attempts: 1}
	for _, tt := range []struct {
		name   string
		answer func(conn net.Conn, sent string)
		want   cable.Error
	}{
		{"silence, then gone", func(net.Conn, string) {}, unreachable(closed)},
		{"silence", func(c net.Conn, _ string) { hang(c) }, timedOut},
		{"no HTTP", func(c net.Conn, _ string) { _, _ = io.WriteString(c, "SSH-2.0-OpenSSH_9.6\r\n\r\n") }, unreachable(broken)},
		{"endless garbage", func(c net.Conn, _ string) { repeatUntilGone(c, strings.Repeat("x", 4096), 0) }, unreachable(broken)},
		{"the request itself", func(c net.Conn, sent string) { _, _ = io.WriteString(c, sent) }, unreachable(broken)},
		{"the request in the status line", func(c net.Conn, sent string) {
			_, _ = fmt.Fprintf(c, "HTTP/1.1 400 %s\r\nContent-Length: 0\r\n\r\n", strings.ReplaceAll(sent, "\r\n", " "))
		}, cable.Error{Kind: cable.Responded, StatusCode: 400, Attempts: 1}},
		{"the request as a header's name", func(c net.Conn, sent string) {
			_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\n%s\r\n\r\n", strings.ReplaceAll(sent, "\r\n", " "))
		}, unreachable(broken)},
		{"the request as a length", func(c net.Conn, sent string) {
			_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\n", strings.ReplaceAll(sent, "\r\n", " "))
		}, unreachable(broken)},
		{"the request as a chunk's length", func(c net.Conn, sent string) {
			_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%s\r\n", strings.ReplaceAll(sent, "\r\n", " "))
		}, unreachable(broken)},
		{"status 999", func(c net.Conn, _ string) {
			_, _ = io.WriteString(c, "HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n")
		}, cable.Error{Kind: cable.Responded, StatusCode: 999, MaybeIssued: true, Attempts: 1}},
		{"status 0", func(c net.Conn, _ string) {
			_, _ = io.WriteString(c, "HTTP/1.1 000 Odd\r\nContent-Length: 0\r\n\r\n")
		}, cable.Error{Kind: cable.InvalidResponse, Detail: "its status is 0 instead of 200", MaybeIssued: true, Attempts: 1}},
		{"endless header", func(c net.Conn, _ string) {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n")
			repeatUntilGone(c, "X-Y: "+strings.Repeat("z", 1000)+"\r\n", 0)
		}, unreachable(broken)},
		{"dripping header", func(c net.Conn, _ string) {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n")
			repeatUntilGone(c, "X: y\r\n", 10*time.Millisecond)
		}, timedOut},
		{"storm of 1xx", func(c net.Conn, _ string) { repeatUntilGone(c, "HTTP/1.1 103 Early Hints\r\nX: y\r\n\r\n", 0) }, unreachable(broken)},
		{"dripping 1xx", func(c net.Conn, _ string) {
			repeatUntilGone(c, "HTTP/1.1 102 Processing\r\n\r\n", 10*time.Millisecond)
		}, timedOut},
		{"some 1xx before a refusal", func(c net.Conn, _ string) {
			_, _ = io.WriteString(c, strings.Repeat("HTTP/1.1 100 Continue\r\n\r\n", 50)+"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n")
		}, cable.Error{Kind: cable.Responded, StatusCode: 401, Attempts: 1}},
		// net/http hands a switched connection over: no context ends a read of it.
		{"another protocol", func(c net.Conn, _ string) {
			_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
			hang(c)
		}, cable.Error{Kind: cable.InvalidResponse, StatusCode: 101, Detail: "its status is 101 instead of 200", MaybeIssued: true, Attempts: 1}},
		{"endless chunks", func(c net.Conn, _ string) {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
			repeatUntilGone(c, "1000\r\n"+strings.Repeat(" ", 4096)+"\r\n", 0)
		}, cable.Error{Kind: cable.InvalidResponse, StatusCode: 200, Detail: "it is larger than 1048576 bytes", MaybeIssued: true, Attempts: 1}},
		{"endless without a length", func(c net.Conn, _ string) {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
			repeatUntilGone(c, strings.Repeat(" ", 4096), 0)
		}, cable.Error{Kind: cable.InvalidResponse, StatusCode: 200, Detail: "it is larger than 1048576 bytes", MaybeIssued: true, Attempts: 1}},
		{"dripping body", func(c net.Conn, _ string) {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
			repeatUntilGone(c, " ", 10*time.Millisecond)
		}, timedOut},
		{"dripping error", func(c net.Conn, _ string) {
			_, _ = io.WriteString(c, "HTTP/1.1 500 No\r\nContent-Length: 1000000\r\n\r\n")
			repeatUntilGone(c, " ", 10*time.Millisecond)
		}, cable.Error{Kind: cable.Responded, StatusCode: 500, MaybeIssued: true, Attempts: 1}},
		{"dripping refusal that is to be repeated", func(c net.Conn, _ string) {
			_, _ = io.WriteString(c, "HTTP/1.1 503 No\r\nRetry-After: 0\r\nContent-Length: 1000000\r\n\r\n")
			repeatUntilGone(c, " ", 10*time.Millisecond)
		}, cable.Error{Kind: cable.TimedOut, Detail: "the budget of 1s ran out after cable answered 503", Attempts: 1}},
		{"short body", func(c net.Conn, _ string) {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"+`{"token":"t","expiry":1}`)
		}, unreachable(closed)},
		{"two lengths", func(c net.Conn, _ string) {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 24\r\nContent-Length: 25\r\n\r\n"+`{"token":"t","expiry":1}`)
		}, unreachable(broken)},
		{"storm of trailers", func(c net.Conn, _ string) {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n1\r\n \r\n0\r\n")
			repeatUntilGone(c, "X: y\r\n", 0)
		}, unreachable(broken)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			url, connections := rawServer(t, func(conn net.Conn) { tt.answer(conn, request(conn)) })
			cfg := cable.Config{TokenURL: url} // what need not wait does not
			if tt.want.Kind == cable.TimedOut || strings.Contains(tt.name, "dripping") {
				cfg.Timeout = budget
			}
			diffError(t, tt.want, failsInTime(t, newClientAt(t, cfg)))
			if n := connections.Load(); n != 1 {
				t.Errorf("%d connections, want 1", n)
			}
		})
	}
}

// TestCallerGoesAway pins that the caller's end is the call's, whenever it
// comes, and that the error says so. See also TestCallerGoesAwayInAWait.
func TestCallerGoesAway(t *testing.T) {
	t.Parallel()
	t.Run("before", func(t *testing.T) {
		t.Parallel()
		srv := cabletest.NewServer(t, nil)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		e := fails(t, ctx, newClient(t, srv, cable.Config{}))
		diffError(t, cable.Error{Kind: cable.Canceled, Detail: "the caller went away before a request was sent"}, e)
		if !errors.Is(e, context.Canceled) || errors.Is(e, context.DeadlineExceeded) {
			t.Error("errors.Is does not find context.Canceled, or finds another")
		}
		sees(t, srv, 0, 0)
	})
	t.Run("its deadline before", func(t *testing.T) {
		t.Parallel()
		srv := cabletest.NewServer(t, nil)
		ctx, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
		defer cancel()
		e := fails(t, ctx, newClient(t, srv, cable.Config{}))
		diffError(t, cable.Error{Kind: cable.TimedOut, Detail: "the caller's deadline passed before a request was sent"}, e)
		if errors.Is(e, context.Canceled) || !errors.Is(e, context.DeadlineExceeded) {
			t.Error("errors.Is does not find context.DeadlineExceeded, or finds another")
		}
		sees(t, srv, 0, 0)
	})
	for _, tt := range []struct {
		name   string
		answer string // what the server writes before it tells that the call is there
	}{
		{"before the answer", ""},
		{"in the header", "HTTP/1.1 200 OK\r\nContent-"},
		{"in the answer", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			gone := make(chan struct{})
			url, _ := rawServer(t, func(conn net.Conn) {
				request(conn)
				_, _ = io.WriteString(conn, tt.answer)
				cancel()
				hang(conn)
				close(gone)
			})
			c := newClientAt(t, cable.Config{TokenURL: url, Timeout: time.Minute})
			diffError(t, cable.Error{Kind: cable.Canceled, Detail: "the caller went away after the request was sent", MaybeIssued: true, Attempts: 1}, fails(t, ctx, c))
			<-gone // the connection is not left open
		})
	}
	t.Run("its deadline before the budget's", func(t *testing.T) {
		t.Parallel()
		url, _ := rawServer(t, func(conn net.Conn) { request(conn); hang(conn) })
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		c := newClientAt(t, cable.Config{TokenURL: url, Timeout: time.Minute})
		diffError(t, cable.Error{Kind: cable.TimedOut, Detail: "the caller's deadline passed after the request was sent", MaybeIssued: true, Attempts: 1}, fails(t, ctx, c))
	})
}

// TestCallersAreApart pins that one caller's end leaves the others' calls on
// the same connection alone.
func TestCallersAreApart(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	arrived := make(chan struct{}, 20)
	sim := cabletest.New(nil)
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		arrived <- struct{}{}
		<-release
		sim.ServeHTTP(w, r)
	}))
	srv.EnableHTTP2 = true
	srv.StartTLS()
	t.Cleanup(srv.Close)
	ca := string(pemOf(srv.Certificate()))
	c := newClientAt(t, cable.Config{RefreshKey: cable.NewSecret(sim.RefreshKey()), TokenURL: srv.URL + sim.Path(), CACert: ca})
	ctx, cancel := context.WithCancel(t.Context())
	stay, leave := make(chan error, 10), make(chan error, 10)
	for range 10 {
		go func() {
			_, err := c.RequestToken(t.Context(), ask())
			stay <- err
		}()
		go func() {
			_, err := c.RequestToken(ctx, ask())
			leave <- err
		}()
	}
	for range 20 {
		<-arrived
	}
	cancel()
	for range 10 {
		if err := <-leave; !errors.Is(err, context.Canceled) {
			t.Errorf("one that left: %v", err)
		}
	}
	close(release)
	for range 10 {
		if err := <-stay; err != nil {
			t.Errorf("one that stayed: %v", err)
		}
	}
}

// TestObserve: each call is told once, with its status, whether it repeats
// another, and whether it began a pause.
func TestObserve(t *testing.T) {
	t.Parallel()
	srv := cabletest.NewServer(t, nil)
	var mu sync.Mutex
	var got []cable.Call
	c, err := cable.New(cable.Config{RefreshKey: cable.NewSecret(srv.RefreshKey()), TokenURL: srv.URL, Observe: func(call cable.Call) {
		mu.Lock()
		defer mu.Unlock()
		if call.Duration <= 0 {
			t.Errorf("a call that took %s", call.Duration)
		}
		call.Duration = 0
		got = append(got, call)
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ask := func() {
		_, _ = c.RequestToken(t.Context(), cable.TokenRequest{OrganizationID: cabletest.DefaultOrganizationID, Scopes: []string{"person:read"}, Lifetime: cable.MinLifetime})
	}
	srv.SetFault(cabletest.Fault{Status: 503, Times: 1, Header: map[string]string{"Retry-After": "0"}})
	ask()
	srv.SetFault(cabletest.Fault{Reset: cabletest.ResetAfter, Times: 1})
	ask()
	srv.SetFault(cabletest.Fault{Status: 429, Header: map[string]string{"Retry-After": "90"}})
	ask()
	ask() // held: no call
	want := []cable.Call{{StatusCode: 503}, {StatusCode: 200, Retry: true}, {}, {StatusCode: 429, PauseBegan: true}}
	if !slices.Equal(got, want) {
		t.Errorf("calls %+v, want %+v", got, want)
	}
}
