// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cabletest_test

import (
	"cmp"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

const org = cabletest.DefaultOrganizationID

// validBody is Cable's own sample request, and sample the response to it at the time of clock (v1.0 reference).
const (
	validBody = `{"expiry_seconds":3600,"scopes":{"organization_id":"` + org + `","scopes":["transactions:write"]}}`
	sample    = `{"token":"TOKEN","expiry":1711929600,"organization_id":"` + org +
		`","organization_name":"Cable Financial Services","scopes":{"organization_id":"` + org +
		`","scopes":["transactions:write"]}}`
)

// clock is a clock that stands between two seconds.
func clock() time.Time { return time.Date(2024, 3, 31, 23, 0, 0, 987654321, time.UTC) }

// newRequest returns a valid request for sim with the given body.
func newRequest(t *testing.T, sim *cabletest.Simulator, url, body string) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header = http.Header{"Authorization": {sim.RefreshKey()}, "Content-Type": {"application/json"}}
	r.Header.Set("User-Agent", "test/1.0")
	return r
}

// call makes a valid call without a network and returns the status and the body, with TOKEN for the token.
func call(t *testing.T, sim *cabletest.Simulator) (status int, body string) {
	t.Helper()
	w := httptest.NewRecorder()
	sim.ServeHTTP(w, newRequest(t, sim, sim.Path(), validBody))
	body = w.Body.String()
	if minted := sim.Minted(); len(minted) > 0 && minted[len(minted)-1].Token != "" {
		body = strings.ReplaceAll(body, minted[len(minted)-1].Token, "TOKEN")
	}
	return w.Code, body
}

func checkEqual(t *testing.T, name string, want, got any) {
	t.Helper()
	if diff := gocmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}

// TestMint pins a response, the records of its call and its token, and the shape of the token.
func TestMint(t *testing.T) {
	t.Parallel()
	sim := cabletest.New(&cabletest.Options{Now: clock})
	status, body := call(t, sim)
	checkEqual(t, "response", "200 "+sample, fmt.Sprint(status, " ", body))
	issued, scopes := clock().Truncate(time.Second), []string{"transactions:write"}
	token := sim.Minted()[0].Token
	checkEqual(t, "minted", []cabletest.Minted{{token, org, scopes, issued, issued.Add(time.Hour)}}, sim.Minted())
	checkEqual(t, "calls", []cabletest.Call{{
		Time: clock(), Method: "POST", Path: "/base/v2/auth/token", AuthorizationOK: true, ExpirySeconds: 3600,
		OrganizationID: org, Scopes: scopes, Status: 200, UserAgent: "test/1.0", Minted: true,
	}}, sim.Calls())

	var parts []string
	for _, part := range strings.Split(token, ".") {
		raw, err := base64.RawURLEncoding.DecodeString(part)
		if err != nil {
			t.Fatal(err)
		}
		parts = append(parts, string(raw))
	}
	claims := `{"iss":"cabletest","sub":"` + org + `","iat":1711926000,"exp":1711929600}`
	checkEqual(t, "header and claims", []string{`{"alg":"HS256","typ":"JWT"}`, claims}, parts[:2])
	if call(t, sim); len(parts) != 3 || len(parts[2]) != 32 || !strings.Contains(token, cabletest.TokenMarker) ||
		sim.Minted()[1].Token == token {
		t.Errorf("token %q: want three parts, the marker, and another one for the next call", token)
	}
}

// TestBodies pins which bodies the simulator refuses, namely those that Cable's documents call invalid, and no other.
func TestBodies(t *testing.T) {
	t.Parallel()
	const (
		seconds, scopes, id, list = "expiry_seconds", "scopes", "scopes.organization_id", "scopes.scopes"

		good      = `{"organization_id":"` + org + `","scopes":["person:read"]}`
		malformed = "request body is not a JSON object"
	)
	expiry := func(value string) string { return `{"expiry_seconds":` + value + `,"scopes":` + good + `}` }
	scoped := func(value string) string { return `{"expiry_seconds":300,"scopes":` + value + `}` }
	inner := func(id, list string) string { return scoped(`{"organization_id":` + id + `,"scopes":` + list + `}`) }
	const quoted = `"` + org + `"`
	for body, want := range map[string]string{ // the fields of the 400's errors, or its message; "" for a token
		expiry("300"): "", expiry("86400"): "", expiry("299"): seconds, expiry("86401"): seconds, expiry("0"): seconds,
		expiry("-300"): seconds, expiry(`"300"`): seconds, expiry("300.5"): seconds, expiry("null"): seconds,
		expiry("99999999999999999999"): seconds, `{"scopes":` + good + `}`: seconds,

		`{"expiry_seconds":300}`: scopes, scoped("null"): scopes, scoped(`["person:read"]`): scopes,
		scoped(`{}`): id + " " + list, `{}`: seconds + " " + scopes,
		`{"expiry_seconds":1,"scopes":{"organization_id":"org_other","scopes":[]}}`: seconds + " " + id,

		scoped(`{"scopes":["a:b"]}`): id, inner(`"org_other"`, `[]`): id, inner(`""`, `[]`): id, inner(`7`, `[]`): id,
		scoped(`{"organization_id":` + quoted + `}`): list, inner(quoted, `null`): list, inner(quoted, `"a:b"`): list,
		inner(quoted, `["a:b",1]`): list, inner(quoted, `["a:b",null]`): list,

		// The documents are silent about these.
		inner(quoted, `["screening:read"]`): "", inner(quoted, `[]`): "", `{"more":1,` + validBody[1:]: "",

		"": malformed, "expiry_seconds=300": malformed, validBody[1:]: malformed, validBody + validBody: malformed,
		`[` + validBody + `]`: malformed, strings.Repeat(" ", 1<<20) + validBody: malformed,
	} {
		sim := cabletest.New(nil)
		w := httptest.NewRecorder()
		sim.ServeHTTP(w, newRequest(t, sim, sim.Path(), body))
		var e struct {
			Code    int
			Message string
			Errors  []cabletest.FieldError
		}
		if err := json.Unmarshal(w.Body.Bytes(), &e); err != nil {
			t.Fatal(err)
		}
		var fields []string
		for _, fe := range e.Errors {
			fields = append(fields, fe.Field)
		}
		got := strings.Join(fields, " ")
		if e.Errors == nil {
			got = e.Message
		}
		status, code, minted := 400, 400, 0
		if want == "" {
			status, code, minted = 200, 0, 1
		}
		if got != want || w.Code != status || e.Code != code || len(sim.Minted()) != minted {
			t.Errorf("%.90s: status %d, %q; want %d, %q", body, w.Code, got, status, want)
		}
	}
}

// TestHTTPRules pins which other parts of a request the simulator refuses.
func TestHTTPRules(t *testing.T) {
	t.Parallel()
	const key = "key-of-this-test"
	for _, tt := range []struct {
		scheme, authorization, method, path, contentType string // "" for the valid one
		status                                           int
	}{
		{"", key, "", "", "application/json; charset=utf-8", 200},
		{"", key, "", "", "application/x-www-form-urlencoded", 400},
		{"", key, "", "", "-", 400},
		{"", key, "GET", "", "", 405},
		{"", key, "PUT", "", "", 405},
		{"", key, "", "/v2/auth/token", "", 404},
		{"", key, "", "/base/v2/auth/token/", "", 404},
		{"", key, "", "/base/v2/base/v2/auth/token", "", 404},
		{"", key, "", "", "", 200},
		{"", "Bearer " + key, "", "", "", 401},
		{"raw", key, "", "", "", 200},
		{"raw", "Bearer " + key, "", "", "", 401},
		{"bearer", "Bearer " + key, "", "", "", 200},
		{"bearer", key, "", "", "", 401},
		{"any", key, "", "", "", 200},
		{"any", "Bearer " + key, "", "", "", 200},
		{"any", "", "", "", "", 401},
		{"any", "Bearer ", "", "", "", 401},
		{"any", "Basic " + key, "", "", "", 401},
		{"any", key + "x", "", "", "", 401},
		{"any", key[1:], "", "", "", 401},
		{"any", "an access token", "", "", "", 401},
	} {
		sim := cabletest.New(&cabletest.Options{RefreshKey: key, Scheme: tt.scheme})
		r := newRequest(t, sim, cmp.Or(tt.path, sim.Path()), validBody)
		r.Method = cmp.Or(tt.method, "POST")
		r.Header.Set("Content-Type", cmp.Or(tt.contentType, "application/json"))
		r.Header.Set("Authorization", tt.authorization)
		if tt.authorization == "an access token" {
			call(t, sim)
			r.Header.Set("Authorization", "Bearer "+sim.Minted()[0].Token)
			sim.Reset()
		}
		w := httptest.NewRecorder()
		sim.ServeHTTP(w, r)
		c := sim.Calls()[0]
		code := fmt.Sprintf(`{"code":%d,`, tt.status)
		if w.Code != tt.status || c.Status != tt.status || c.Path != r.URL.Path || c.Method != r.Method ||
			c.AuthorizationOK != (tt.status != 401) || c.Minted != (tt.status == 200) || len(sim.Minted()) > 1 ||
			(w.Header().Get("Allow") == "POST") != (tt.status == 405) ||
			tt.status != 200 && !strings.HasPrefix(w.Body.String(), code) {
			t.Errorf("%+v: status %d %s, call %+v", tt, w.Code, w.Body, c)
		}
	}
}

// TestOptions pins the refresh key, the organizations and the path.
func TestOptions(t *testing.T) {
	t.Parallel()
	names := map[string]string{"org_a": "A", org: "B"}
	sim := cabletest.New(&cabletest.Options{Organizations: names, BasePath: "/v2/"})
	delete(names, org) // the simulator has its own copy
	if status, body := call(t, sim); status != 200 || !strings.Contains(body, `"B"`) || sim.Path() != "/v2/auth/token" {
		t.Errorf("%s: %d %s", sim.Path(), status, body)
	}
	old := newRequest(t, sim, sim.Path(), validBody)
	if key := sim.RefreshKey(); !strings.Contains(key, cabletest.RefreshKeyMarker) ||
		key == cabletest.New(nil).RefreshKey() {
		t.Errorf("key %q: want the marker, and another for each simulator", key)
	}
	sim.SetRefreshKey("rotated-key")
	if status, _ := call(t, sim); status != 200 {
		t.Errorf("new key: %d", status)
	}
	w := httptest.NewRecorder()
	if sim.ServeHTTP(w, old); w.Code != 401 {
		t.Errorf("old key: %d", w.Code)
	}
	sim.SetRefreshKey("")
	if status, _ := call(t, sim); status != 401 {
		t.Errorf("no key at all: %d", status)
	}
	plain := cabletest.New(&cabletest.Options{Plain: true})
	if call(t, plain); plain.Path() != "/v2/auth/token" ||
		strings.Contains(plain.Minted()[0].Token, cabletest.TokenMarker) {
		t.Errorf("plain: %s, %+v", plain.Path(), plain.Minted())
	}
	defer func() { t.Log(recover()) }()
	cabletest.New(&cabletest.Options{Scheme: "basic"})
	t.Error("an unknown scheme: no panic")
}

// TestRecordsHoldNoSecret sends the key and a token in every place where a confused caller could put them.
func TestRecordsHoldNoSecret(t *testing.T) {
	t.Parallel()
	var logged []cabletest.Call
	sim := cabletest.New(&cabletest.Options{Log: func(c cabletest.Call) { logged = append(logged, c) }})
	call(t, sim)
	for _, secret := range []string{sim.RefreshKey(), sim.Minted()[0].Token} {
		r := newRequest(t, sim, sim.Path()+"/"+secret, fmt.Sprintf(
			`{"expiry_seconds":300,"scopes":{"organization_id":%q,"scopes":["a:b",%q]}}`, "org "+secret, secret))
		r.Header.Set("User-Agent", "curl "+secret)
		sim.ServeHTTP(httptest.NewRecorder(), r)
	}
	for _, calls := range [][]cabletest.Call{sim.Calls(), logged} {
		text := fmt.Sprintf("%+v", calls)
		if len(calls) != 3 || strings.Count(text, "[redacted]") != 8 ||
			strings.Contains(text, cabletest.TokenMarker) || strings.Contains(text, cabletest.RefreshKeyMarker) {
			t.Errorf("want 3 calls with 8 redacted values and no secret: %s", text)
		}
	}
}

// TestRecords pins that the latest calls and tokens are kept and all are counted; that Reset keeps faults and key; and
// that a call belongs to the record that it began in.
func TestRecords(t *testing.T) {
	t.Parallel()
	const extra = 7
	sim := cabletest.New(nil)
	for i := range cabletest.Recorded + extra {
		body := strings.Replace(validBody, "3600", fmt.Sprint(300+i), 1)
		sim.ServeHTTP(httptest.NewRecorder(), newRequest(t, sim, sim.Path(), body))
	}
	calls, n := sim.Calls(), cabletest.Recorded+extra
	if len(calls) != cabletest.Recorded || len(sim.Minted()) != cabletest.Recorded {
		t.Fatalf("%d calls and %d tokens recorded", len(calls), len(sim.Minted()))
	}
	for i, c := range calls {
		if want := int64(300 + extra + i); c.ExpirySeconds != want {
			t.Fatalf("call %d: expiry_seconds %d, want %d", i, c.ExpirySeconds, want)
		}
	}
	checkEqual(t, "stats", cabletest.Stats{Calls: n, Minted: n, ByStatus: map[int]int{200: n}}, sim.Stats())

	key := sim.RefreshKey()
	sim.SetFault(cabletest.Fault{Status: 500})
	r := newRequest(t, sim, sim.Path(), "")
	r.Body = io.NopCloser(readerFunc(func([]byte) (int, error) { // the call is under way
		if c := sim.Calls(); c[len(c)-1].Status != 0 {
			t.Errorf("before the response: %+v", c[len(c)-1])
		}
		sim.Reset()
		return 0, io.EOF
	}))
	sim.ServeHTTP(httptest.NewRecorder(), r)
	checkEqual(t, "stats", cabletest.Stats{ByStatus: map[int]int{}}, sim.Stats())
	if status, _ := call(t, sim); status != 500 || sim.RefreshKey() != key || len(sim.Calls()) != 1 {
		t.Errorf("after Reset: status %d, %d calls; want the fault and the key to stay", status, len(sim.Calls()))
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// TestServer pins that a request outside the endpoint fails the test and no other does, that connections are counted,
// and that the server ends with the test.
func TestServer(t *testing.T) {
	t.Parallel()
	tb := &fakeTB{TB: t}
	srv := cabletest.NewServer(tb, nil)
	// NOTE: without MaxConnsPerHost, net/http sometimes dials one more than there are callers.
	transport := &http.Transport{MaxConnsPerHost: 2}
	defer transport.CloseIdleConnections()
	send := func(url string, want int) {
		resp, err := transport.RoundTrip(newRequest(t, srv.Simulator, url, validBody))
		if err != nil {
			t.Error(err)
			return
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		if resp.Body.Close(); resp.StatusCode != want {
			t.Errorf("%s: status %d, want %d", url, resp.StatusCode, want)
		}
	}
	srv.SetFault(cabletest.Fault{Status: 404, Times: 1})
	send(srv.URL, 404)
	send(srv.URL+"?query=1", 200)
	var callers sync.WaitGroup
	for range 8 {
		callers.Go(func() {
			for range 20 {
				send(srv.URL, 200)
				srv.AddFault(cabletest.Fault{Times: 1, ClockSkew: time.Minute})
				_, _ = srv.Calls(), srv.Minted()
			}
		})
	}
	callers.Wait()
	s := srv.Stats()
	if len(tb.errors) > 0 || s.Calls != 162 || s.Minted != 161 || s.Connections < 1 || s.Connections > 2 {
		t.Errorf("failed the test: %q, stats %+v", tb.errors, s)
	}
	send(strings.TrimSuffix(srv.URL, srv.Path())+"/v2/auth/token", 404)
	want := []string{`simulator: POST "/v2/auth/token" is outside the token endpoint "/base/v2/auth/token"`}
	checkEqual(t, "errors", want, tb.errors)
	for _, cleanup := range tb.cleanups {
		cleanup()
	}
	if resp, err := http.Get(srv.URL); err == nil {
		t.Errorf("after cleanup: status %d", resp.StatusCode)
	}
	srv.Close() // twice is fine
}

// fakeTB stands in for the test that a server belongs to.
type fakeTB struct {
	testing.TB
	errors   []string
	cleanups []func()
}

func (f *fakeTB) Errorf(format string, args ...any) {
	f.errors = append(f.errors, fmt.Sprintf(format, args...))
}

func (f *fakeTB) Cleanup(cleanup func()) { f.cleanups = append(f.cleanups, cleanup) }
