// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cabletest_test

import (
	"bytes"
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

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

const org = cabletest.DefaultOrganizationID

// validBody is Cable's own sample request (v1.0 reference).
const validBody = `{"expiry_seconds":3600,"scopes":{"organization_id":"` + org + `","scopes":["transactions:write"]}}`

// response is any response of the simulator, a success or an error.
type response struct {
	Token            string          `json:"token"`
	Expiry           json.RawMessage `json:"expiry"`
	OrganizationID   string          `json:"organization_id"`
	OrganizationName string          `json:"organization_name"`
	Scopes           *struct {
		OrganizationID string   `json:"organization_id"`
		Scopes         []string `json:"scopes"`
	} `json:"scopes"`

	Code    int                    `json:"code"`
	Message string                 `json:"message"`
	Errors  []cabletest.FieldError `json:"errors"`
}

// clock is a clock that stands between two seconds.
func clock() time.Time { return time.Date(2024, 3, 31, 23, 0, 0, 987654321, time.UTC) }

// newRequest returns a valid request for sim with the given body.
func newRequest(t *testing.T, sim *cabletest.Simulator, url, body string) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", sim.RefreshKey())
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("User-Agent", "test/1.0")
	return r
}

// serve calls sim without a network and returns the response.
func serve(t *testing.T, sim *cabletest.Simulator, r *http.Request) (*http.Response, response) {
	t.Helper()
	w := httptest.NewRecorder()
	sim.ServeHTTP(w, r)
	resp := w.Result()
	var a response
	if err := json.Unmarshal(w.Body.Bytes(), &a); err != nil {
		t.Fatalf("response %q: %v", w.Body, err)
	}
	if got := resp.Header.Get("Content-Type"); got != "application/json" {
		t.Errorf("Content-Type = %q", got)
	}
	return resp, a
}

func TestMint(t *testing.T) {
	t.Parallel()
	sim := cabletest.New(&cabletest.Options{Now: clock})
	resp, got := serve(t, sim, newRequest(t, sim, sim.Path(), validBody))
	token := got.Token

	var want response
	err := json.Unmarshal([]byte(`{
		"expiry": 1711929600,
		"organization_id": "org_9f8b7c6d5e4a3b2c1d0e",
		"organization_name": "Cable Financial Services",
		"scopes": {"organization_id": "org_9f8b7c6d5e4a3b2c1d0e", "scopes": ["transactions:write"]}
	}`), &want)
	if err != nil {
		t.Fatal(err)
	}
	want.Token = token
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("response (-want +got):\n%s", diff)
	}
	if resp.StatusCode != http.StatusOK {
		t.Errorf("status = %d", resp.StatusCode)
	}
	if got, want := resp.Header.Get("Date"), "Sun, 31 Mar 2024 23:00:00 GMT"; got != want {
		t.Errorf("Date = %q, want %q", got, want)
	}

	issued := time.Date(2024, 3, 31, 23, 0, 0, 0, time.UTC)
	wantMinted := []cabletest.Minted{{
		Token:          token,
		OrganizationID: org,
		Scopes:         []string{"transactions:write"},
		IssuedAt:       issued,
		Expiry:         issued.Add(time.Hour),
	}}
	if diff := cmp.Diff(wantMinted, sim.Minted()); diff != "" {
		t.Errorf("minted (-want +got):\n%s", diff)
	}
	wantCalls := []cabletest.Call{{
		Time: clock(), Method: "POST", Path: "/base/v2/auth/token", AuthorizationOK: true,
		ExpirySeconds: 3600, OrganizationID: org, Scopes: []string{"transactions:write"}, Status: 200,
		UserAgent: "test/1.0", Minted: true,
	}}
	if diff := cmp.Diff(wantCalls, sim.Calls()); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
}

func TestTokenShape(t *testing.T) {
	t.Parallel()
	sim := cabletest.New(&cabletest.Options{Now: clock})
	seen := map[string]bool{}
	for range 50 {
		_, a := serve(t, sim, newRequest(t, sim, sim.Path(), validBody))
		segments := strings.Split(a.Token, ".")
		if len(segments) != 3 || !strings.Contains(segments[2], cabletest.TokenMarker) || seen[a.Token] {
			t.Fatalf("token %q: want 3 segments, the marker, and no repetition", a.Token)
		}
		seen[a.Token] = true
		var got []string
		for _, segment := range segments {
			raw, err := base64.RawURLEncoding.DecodeString(segment)
			if err != nil {
				t.Fatalf("segment %q: %v", segment, err)
			}
			got = append(got, string(raw))
		}
		want := []string{
			`{"alg":"HS256","typ":"JWT"}`,
			`{"iss":"cabletest","sub":"org_9f8b7c6d5e4a3b2c1d0e","iat":1711926000,"exp":1711929600}`,
		}
		if diff := cmp.Diff(want, got[:2]); diff != "" || len(got[2]) != 32 {
			t.Fatalf("signature of %d bytes, header and claims (-want +got):\n%s", len(got[2]), diff)
		}
	}
}

func TestRequestRules(t *testing.T) {
	t.Parallel()
	body := func(expiry, scopes string) string { return `{"expiry_seconds":` + expiry + `,"scopes":` + scopes + `}` }
	good := `{"organization_id":"` + org + `","scopes":["person:read"]}`
	const quoted = `"` + org + `"`
	inner := func(organization, scopes string) string {
		return body("300", `{"organization_id":`+organization+`,"scopes":`+scopes+`}`)
	}
	tests := map[string]struct {
		body   string
		fields []string // named by the 400's errors; nil if the request is good
		opaque bool     // a 400 that names no field
	}{
		"shortest": {body: body("300", good)},
		"longest":  {body: body("86400", good)},

		"too short":           {body: body("299", good), fields: []string{"expiry_seconds"}},
		"too long":            {body: body("86401", good), fields: []string{"expiry_seconds"}},
		"zero":                {body: body("0", good), fields: []string{"expiry_seconds"}},
		"negative":            {body: body("-300", good), fields: []string{"expiry_seconds"}},
		"expiry string":       {body: body(`"300"`, good), fields: []string{"expiry_seconds"}},
		"expiry fraction":     {body: body("300.5", good), fields: []string{"expiry_seconds"}},
		"expiry beyond int64": {body: body("99999999999999999999", good), fields: []string{"expiry_seconds"}},
		"expiry null":         {body: body("null", good), fields: []string{"expiry_seconds"}},
		"expiry absent":       {body: `{"scopes":` + good + `}`, fields: []string{"expiry_seconds"}},

		"scopes absent": {body: `{"expiry_seconds":300}`, fields: []string{"scopes"}},
		"scopes null":   {body: body("300", "null"), fields: []string{"scopes"}},
		"scopes a list": {body: body("300", `["person:read"]`), fields: []string{"scopes"}},
		"scopes empty":  {body: body("300", `{}`), fields: []string{"scopes.organization_id", "scopes.scopes"}},
		"all absent":    {body: `{}`, fields: []string{"expiry_seconds", "scopes"}},
		"two wrong": {
			body:   body("1", `{"organization_id":"org_other","scopes":["a:b"]}`),
			fields: []string{"expiry_seconds", "scopes.organization_id"},
		},

		"organization absent":  {body: body("300", `{"scopes":["a:b"]}`), fields: []string{"scopes.organization_id"}},
		"organization unknown": {body: inner(`"org_other"`, `["a:b"]`), fields: []string{"scopes.organization_id"}},
		"organization empty":   {body: inner(`""`, `["a:b"]`), fields: []string{"scopes.organization_id"}},
		"organization number":  {body: inner(`7`, `["a:b"]`), fields: []string{"scopes.organization_id"}},

		"inner scopes absent": {
			body: body("300", `{"organization_id":"`+org+`"}`), fields: []string{"scopes.scopes"},
		},
		"inner scopes null":       {body: inner(quoted, `null`), fields: []string{"scopes.scopes"}},
		"inner scopes string":     {body: inner(quoted, `"a:b"`), fields: []string{"scopes.scopes"}},
		"inner scopes of numbers": {body: inner(quoted, `["a:b",1]`), fields: []string{"scopes.scopes"}},
		"inner scopes of null":    {body: inner(quoted, `["a:b",null]`), fields: []string{"scopes.scopes"}},

		"scope that is not named":          {body: inner(quoted, `["screening:read"]`)},
		"documents are silent: no scope":   {body: inner(quoted, `[]`)},
		"documents are silent: more field": {body: `{"more":1,` + validBody[1:]},

		"empty":      {opaque: true},
		"not JSON":   {body: "expiry_seconds=300", opaque: true},
		"cut off":    {body: validBody[:len(validBody)-1], opaque: true},
		"two values": {body: validBody + validBody, opaque: true},
		"a list":     {body: `[` + validBody + `]`, opaque: true},
		"over 1 MiB": {body: strings.Repeat(" ", 1<<20) + validBody, opaque: true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sim := cabletest.New(nil)
			resp, got := serve(t, sim, newRequest(t, sim, sim.Path(), tt.body))
			var fields []string
			for _, e := range got.Errors {
				t.Logf("%s %s", e.Field, e.Message)
				fields = append(fields, e.Field)
			}
			want := http.StatusOK
			if tt.fields != nil || tt.opaque {
				want = http.StatusBadRequest
				if got.Code != want || got.Message == "" {
					t.Errorf("envelope: code %d, message %q", got.Code, got.Message)
				}
			}
			if diff := cmp.Diff(tt.fields, fields); diff != "" || resp.StatusCode != want {
				t.Errorf("status %d, want %d; fields (-want +got):\n%s", resp.StatusCode, want, diff)
			}
			if minted := len(sim.Minted()) == 1; minted != (want == http.StatusOK) || sim.Calls()[0].Minted != minted {
				t.Errorf("minted = %v", minted)
			}
		})
	}
}

func TestHTTPRules(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		method, path, contentType string
		status                    int
		field                     string
	}{
		"good":    {status: 200},
		"charset": {contentType: "application/json; charset=utf-8", status: 200},
		"form": {
			contentType: "application/x-www-form-urlencoded", status: 400, field: "Content-Type",
		},
		"no content type":         {contentType: "-", status: 400, field: "Content-Type"},
		"GET":                     {method: "GET", status: 405},
		"PUT":                     {method: "PUT", status: 405},
		"outside the base path":   {path: "/v2/auth/token", status: 404},
		"below the endpoint":      {path: "/base/v2/auth/token/", status: 404},
		"base path written twice": {path: "/base/v2/base/v2/auth/token", status: 404},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sim := cabletest.New(nil)
			r := newRequest(t, sim, sim.Path(), validBody)
			if tt.method != "" {
				r.Method = tt.method
			}
			if tt.path != "" {
				r.URL.Path = tt.path
			}
			if tt.contentType != "" {
				r.Header.Set("Content-Type", tt.contentType)
			}
			resp, got := serve(t, sim, r)
			var field string
			if len(got.Errors) > 0 {
				field = got.Errors[0].Field
			}
			if resp.StatusCode != tt.status || field != tt.field {
				t.Errorf("status %d, field %q; want %d, %q", resp.StatusCode, field, tt.status, tt.field)
			}
			if tt.status != 200 && got.Code != tt.status {
				t.Errorf("envelope's code = %d", got.Code)
			}
			if allow := resp.Header.Get("Allow"); (allow == "POST") != (tt.status == 405) {
				t.Errorf("Allow = %q", allow)
			}
			if c := sim.Calls()[0]; c.Status != tt.status || c.Path != r.URL.Path || c.Method != r.Method {
				t.Errorf("call = %+v", c)
			}
		})
	}
}

func TestAuthorization(t *testing.T) {
	t.Parallel()
	const key = "key-of-this-test"
	tests := []struct {
		scheme, header string
		ok             bool
	}{
		{"", key, true},
		{"", "Bearer " + key, false},
		{"raw", key, true},
		{"raw", "Bearer " + key, false},
		{"bearer", "Bearer " + key, true},
		{"bearer", key, false},
		{"any", key, true},
		{"any", "Bearer " + key, true},
		{"any", "", false},
		{"any", "Bearer ", false},
		{"any", "Basic " + key, false},
		{"any", key + "x", false},
		{"any", key[1:], false},
	}
	for _, tt := range tests {
		t.Run(tt.scheme+"/"+tt.header, func(t *testing.T) {
			t.Parallel()
			sim := cabletest.New(&cabletest.Options{RefreshKey: key, Scheme: tt.scheme})
			r := newRequest(t, sim, sim.Path(), validBody)
			r.Header.Set("Authorization", tt.header)
			resp, got := serve(t, sim, r)
			want := http.StatusOK
			if !tt.ok {
				want = http.StatusUnauthorized
			}
			if resp.StatusCode != want || sim.Calls()[0].AuthorizationOK != tt.ok {
				t.Errorf("status = %d, want %d; call %+v", resp.StatusCode, want, sim.Calls()[0])
			}
			if !tt.ok && got.Code != want {
				t.Errorf("envelope's code = %d", got.Code)
			}
		})
	}
}

func TestAccessTokenIsNoKey(t *testing.T) {
	t.Parallel()
	sim := cabletest.New(&cabletest.Options{Scheme: "any"})
	_, a := serve(t, sim, newRequest(t, sim, sim.Path(), validBody))
	for _, header := range []string{a.Token, "Bearer " + a.Token} {
		r := newRequest(t, sim, sim.Path(), validBody)
		r.Header.Set("Authorization", header)
		if resp, _ := serve(t, sim, r); resp.StatusCode != http.StatusUnauthorized {
			t.Errorf("status = %d", resp.StatusCode)
		}
	}
}

func TestRefreshKey(t *testing.T) {
	t.Parallel()
	sim := cabletest.New(nil)
	old := sim.RefreshKey()
	if !strings.Contains(old, cabletest.RefreshKeyMarker) || old == cabletest.New(nil).RefreshKey() {
		t.Errorf("key %q: want the marker, and another for each simulator", old)
	}
	stale := newRequest(t, sim, sim.Path(), validBody)
	sim.SetRefreshKey("rotated-key")
	if resp, _ := serve(t, sim, stale); resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("old key: status = %d", resp.StatusCode)
	}
	if resp, _ := serve(t, sim, newRequest(t, sim, sim.Path(), validBody)); resp.StatusCode != http.StatusOK {
		t.Errorf("new key: status = %d", resp.StatusCode)
	}
	sim.SetRefreshKey("")
	if resp, _ := serve(t, sim, newRequest(t, sim, sim.Path(), validBody)); resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("no key at all: status = %d", resp.StatusCode)
	}
}

func TestOptions(t *testing.T) {
	t.Parallel()
	names := map[string]string{"org_a": "A", "org_b": "B"}
	sim := cabletest.New(&cabletest.Options{Organizations: names, BasePath: "/v2/"})
	delete(names, "org_b") // the simulator has its own copy
	if got, want := sim.Path(), "/v2/auth/token"; got != want {
		t.Errorf("path = %q, want %q", got, want)
	}
	for id, want := range map[string]int{"org_a": 200, "org_b": 200, org: 400} {
		resp, a := serve(t, sim, newRequest(t, sim, sim.Path(), strings.Replace(validBody, org, id, 1)))
		if resp.StatusCode != want || want == 200 && a.OrganizationName != strings.ToUpper(id[4:]) {
			t.Errorf("%s: status %d, name %q", id, resp.StatusCode, a.OrganizationName)
		}
	}
	for name, opts := range map[string]*cabletest.Options{
		"scheme":  {Scheme: "basic"},
		"default": {Default: cabletest.Fault{Reset: "sometimes"}},
	} {
		if got := panicOf(func() { cabletest.New(opts) }); got == nil {
			t.Errorf("%s: no panic", name)
		} else {
			t.Log(got)
		}
	}
}

func panicOf(f func()) (value any) {
	defer func() { value = recover() }()
	f()
	return nil
}

// TestRecordsHoldNoSecret sends the key and a token in every place where a confused caller could put them.
func TestRecordsHoldNoSecret(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	var logged []cabletest.Call
	sim := cabletest.New(&cabletest.Options{Log: func(c cabletest.Call) {
		mu.Lock()
		defer mu.Unlock()
		logged = append(logged, c)
	}})
	_, a := serve(t, sim, newRequest(t, sim, sim.Path(), validBody))
	for _, secret := range []string{sim.RefreshKey(), a.Token} {
		r := newRequest(t, sim, sim.Path()+"/"+secret, fmt.Sprintf(
			`{"expiry_seconds":300,"scopes":{"organization_id":%q,"scopes":["a:b",%q]}}`, "org "+secret, secret))
		r.Header.Set("User-Agent", "curl "+secret)
		serve(t, sim, r)
	}
	for _, calls := range [][]cabletest.Call{sim.Calls(), logged} {
		if len(calls) != 3 {
			t.Errorf("%d calls, want 3", len(calls))
		}
		text := fmt.Sprintf("%+v", calls)
		if strings.Contains(text, cabletest.TokenMarker) || strings.Contains(text, cabletest.RefreshKeyMarker) {
			t.Errorf("a call contains a secret: %s", text)
		}
		if got := strings.Count(text, "[redacted]"); got != 8 {
			t.Errorf("%d values redacted, want 8: %s", got, text)
		}
	}
}

func TestRecordsAreBounded(t *testing.T) {
	t.Parallel()
	const extra = 7
	sim := cabletest.New(nil)
	for i := range cabletest.Recorded + extra {
		r := newRequest(t, sim, sim.Path(), strings.Replace(validBody, "3600", fmt.Sprint(300+i), 1))
		sim.ServeHTTP(httptest.NewRecorder(), r)
	}
	calls, minted := sim.Calls(), sim.Minted()
	if len(calls) != cabletest.Recorded || len(minted) != cabletest.Recorded {
		t.Fatalf("%d calls and %d tokens recorded", len(calls), len(minted))
	}
	for i, c := range calls {
		if want := int64(300 + extra + i); c.ExpirySeconds != want || c.Status != 200 {
			t.Fatalf("call %d: expiry_seconds %d, status %d; want %d, 200", i, c.ExpirySeconds, c.Status, want)
		}
	}
	want := cabletest.Stats{Calls: 10_007, Minted: 10_007, ByStatus: map[int]int{200: 10_007}}
	if diff := cmp.Diff(want, sim.Stats()); diff != "" {
		t.Errorf("stats (-want +got):\n%s", diff)
	}
}

func TestReset(t *testing.T) {
	t.Parallel()
	srv := cabletest.NewServer(t, nil)
	srv.SetFault(cabletest.Fault{Status: 500})
	key := srv.RefreshKey()
	post(t, http.DefaultClient, newRequest(t, srv.Simulator, srv.URL, validBody))
	srv.Reset()
	if got := srv.Stats(); !cmp.Equal(got, cabletest.Stats{}, cmpopts.EquateEmpty()) || len(srv.Calls()) != 0 {
		t.Errorf("after Reset: %+v", got)
	}
	resp, _ := post(t, http.DefaultClient, newRequest(t, srv.Simulator, srv.URL, validBody))
	if resp.StatusCode != 500 || srv.RefreshKey() != key || srv.CallCount() != 1 {
		t.Errorf("status %d, %d calls: want the fault and the key to stay", resp.StatusCode, srv.CallCount())
	}
}

// TestResetDuringCall shows that a call belongs to the record that it began in.
func TestResetDuringCall(t *testing.T) {
	t.Parallel()
	sim := cabletest.New(nil)
	body := &hook{Reader: strings.NewReader(validBody), once: func() {
		if c := sim.Calls(); len(c) != 1 || c[0].Status != 0 {
			t.Errorf("before the response: %+v", c)
		}
		sim.Reset()
	}}
	r := newRequest(t, sim, sim.Path(), "")
	r.Body = io.NopCloser(body)
	if resp, _ := serve(t, sim, r); resp.StatusCode != 200 {
		t.Errorf("status = %d", resp.StatusCode)
	}
	if got := sim.Stats(); !cmp.Equal(got, cabletest.Stats{}, cmpopts.EquateEmpty()) || len(sim.Minted()) != 0 {
		t.Errorf("after Reset: %+v", got)
	}
}

// hook calls once before the first Read.
type hook struct {
	io.Reader
	once func()
}

func (h *hook) Read(p []byte) (int, error) {
	if h.once != nil {
		h.once()
		h.once = nil
	}
	return h.Reader.Read(p)
}

func TestConcurrentUse(t *testing.T) {
	t.Parallel()
	srv := cabletest.NewServer(t, nil)
	key := srv.RefreshKey()
	// NOTE: without MaxConnsPerHost, net/http sometimes dials one more than there are callers.
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 8, MaxConnsPerHost: 8}}
	defer client.CloseIdleConnections()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				r := newRequest(t, srv.Simulator, srv.URL, validBody)
				r.Header.Set("Authorization", key)
				resp, err := client.Do(r)
				if err != nil {
					t.Error(err)
					return
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
		})
	}
	for range 50 {
		srv.SetFault(cabletest.Fault{Times: 1, Grant: &cabletest.Grant{OmitScopes: true}})
		srv.AddFault(cabletest.Fault{Every: 2, ClockSkew: time.Minute})
		srv.SetRefreshKey(key)
		_, _, _ = srv.Calls(), srv.Minted(), srv.Stats()
		srv.ClearFaults()
	}
	wg.Wait()
	stats := srv.Stats()
	if stats.Calls != 400 || stats.Minted != 400 || stats.ByStatus[200] != 400 {
		t.Errorf("stats = %+v", stats)
	}
	if n := srv.Connections(); n < 1 || n > 8 {
		t.Errorf("%d connections for 8 workers", n)
	}
	seen := map[string]bool{}
	for _, m := range srv.Minted() {
		seen[m.Token] = true
	}
	if len(seen) != 400 {
		t.Errorf("%d distinct tokens", len(seen))
	}
}

// BenchmarkServeHTTP measures the handler without a network.
func BenchmarkServeHTTP(b *testing.B) {
	sim := cabletest.New(nil)
	header := http.Header{"Authorization": {sim.RefreshKey()}, "Content-Type": {"application/json"}}
	b.ReportAllocs()
	for b.Loop() {
		r := httptest.NewRequest(http.MethodPost, sim.Path(), bytes.NewReader([]byte(validBody)))
		r.Header = header
		sim.ServeHTTP(httptest.NewRecorder(), r)
	}
}
