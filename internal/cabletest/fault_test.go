// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cabletest_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// post sends a request over the network and returns the response and its whole body.
func post(t *testing.T, client *http.Client, r *http.Request) (*http.Response, []byte) {
	t.Helper()
	resp, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("reading the body after %d bytes: %v", len(body), err)
	}
	return resp, body
}

func TestFaultStatus(t *testing.T) {
	t.Parallel()
	sim := cabletest.New(nil)
	sim.SetFault(cabletest.Fault{
		Status:  429,
		Message: "slow down, {refresh_key}",
		Errors:  []cabletest.FieldError{{Field: "a.b", Message: "no {refresh_key}"}},
		Header:  map[string]string{"retry-after": "7", "Location": "/?k={refresh_key}"},
	})
	resp, got := serve(t, sim, newRequest(t, sim, sim.Path(), validBody))
	key := sim.RefreshKey()
	want := response{
		Code: 429, Message: "slow down, " + key, Errors: []cabletest.FieldError{{Field: "a.b", Message: "no " + key}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("response (-want +got):\n%s", diff)
	}
	if resp.StatusCode != 429 || resp.Header.Get("Retry-After") != "7" || resp.Header.Get("Location") != "/?k="+key {
		t.Errorf("status %d, header %v", resp.StatusCode, resp.Header)
	}
	if c := sim.Calls()[0]; c.Minted || c.Status != 429 || len(sim.Minted()) != 0 {
		t.Errorf("call = %+v", c)
	}
	if text := fmt.Sprintf("%+v", sim.Calls()); strings.Contains(text, cabletest.RefreshKeyMarker) {
		t.Errorf("a call contains the key: %s", text)
	}

	// The placeholder stands for the call's key, not for the simulator's.
	r := newRequest(t, sim, sim.Path(), validBody)
	r.Header.Set("Authorization", "Bearer other")
	if _, got := serve(t, sim, r); got.Message != "slow down, Bearer other" {
		t.Errorf("message = %q", got.Message)
	}
	sim.SetFault(cabletest.Fault{Status: 503})
	if _, got := serve(t, sim, newRequest(t, sim, sim.Path(), validBody)); got.Message != "Service Unavailable" {
		t.Errorf("default message = %q", got.Message)
	}
}

func TestFaultOrder(t *testing.T) {
	t.Parallel()
	status := func(n int) cabletest.Fault { return cabletest.Fault{Status: n} }
	times := func(f cabletest.Fault, n int) cabletest.Fault { f.Times = n; return f }
	every := func(f cabletest.Fault, n int) cabletest.Fault { f.Every = n; return f }
	tests := map[string]struct {
		opts   cabletest.Options
		faults []cabletest.Fault
		want   []int
	}{
		"none":          {want: []int{200, 200}},
		"until cleared": {faults: []cabletest.Fault{status(500)}, want: []int{500, 500, 500}},
		"times":         {faults: []cabletest.Fault{times(status(500), 2)}, want: []int{500, 500, 200, 200}},
		"in order": {
			faults: []cabletest.Fault{times(status(500), 1), times(status(503), 2)}, want: []int{500, 503, 503, 200},
		},
		"every": {faults: []cabletest.Fault{every(status(500), 3)}, want: []int{200, 200, 500, 200, 200, 500}},
		"every and times": {
			faults: []cabletest.Fault{times(every(status(500), 2), 1), status(503)}, want: []int{200, 500, 503},
		},
		"behave once": {faults: []cabletest.Fault{{Times: 1}, status(503)}, want: []int{200, 503}},
		"default": {
			opts:   cabletest.Options{Default: status(418)},
			faults: []cabletest.Fault{times(every(status(500), 2), 1)}, want: []int{418, 500, 418},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sim := cabletest.New(&tt.opts)
			for i, f := range tt.faults {
				if i == 0 {
					sim.AddFault(status(599)) // replaced at once
					sim.SetFault(f)
				} else {
					sim.AddFault(f)
				}
			}
			var got []int
			for range tt.want {
				outside := newRequest(t, sim, "/elsewhere", validBody) // takes no fault
				if resp, _ := serve(t, sim, outside); resp.StatusCode != 404 {
					t.Errorf("outside: status = %d", resp.StatusCode)
				}
				resp, _ := serve(t, sim, newRequest(t, sim, sim.Path(), validBody))
				got = append(got, resp.StatusCode)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("statuses (-want +got):\n%s", diff)
			}
			sim.ClearFaults()
			want := max(200, tt.opts.Default.Status)
			if resp, _ := serve(t, sim, newRequest(t, sim, sim.Path(), validBody)); resp.StatusCode != want {
				t.Errorf("after ClearFaults: status = %d, want %d", resp.StatusCode, want)
			}
		})
	}
}

func TestFaultGrant(t *testing.T) {
	t.Parallel()
	lifetime := func(d time.Duration) *time.Duration { return &d }
	tests := map[string]struct {
		fault    cabletest.Fault
		replace  [2]string     // in the response without faults, to get the expected one
		lifetime time.Duration // of the token; 0 is as requested
	}{
		"lifetime": {
			fault:   cabletest.Fault{Grant: &cabletest.Grant{Lifetime: lifetime(10 * time.Second)}},
			replace: [2]string{`1711929600`, `1711926010`}, lifetime: 10 * time.Second,
		},
		"lifetime in the past": {
			fault:   cabletest.Fault{Grant: &cabletest.Grant{Lifetime: lifetime(-time.Minute)}},
			replace: [2]string{`1711929600`, `1711925940`}, lifetime: -time.Minute,
		},
		"organization": {
			fault:   cabletest.Fault{Grant: &cabletest.Grant{OrganizationID: ptr("org_other")}},
			replace: [2]string{`1711929600,"organization_id":"` + org, `1711929600,"organization_id":"org_other`},
		},
		"organization of the scopes": {
			fault:   cabletest.Fault{Grant: &cabletest.Grant{ScopesOrganizationID: ptr("org_other")}},
			replace: [2]string{`{"organization_id":"` + org, `{"organization_id":"org_other`},
		},
		"scopes": {
			fault:   cabletest.Fault{Grant: &cabletest.Grant{Scopes: &[]string{"a:b", "c:d"}}},
			replace: [2]string{`["transactions:write"]`, `["a:b","c:d"]`},
		},
		"no scope granted": {
			fault:   cabletest.Fault{Grant: &cabletest.Grant{Scopes: &[]string{}}},
			replace: [2]string{`["transactions:write"]`, `[]`},
		},
		"scopes left out": {
			fault:   cabletest.Fault{Grant: &cabletest.Grant{OmitScopes: true}},
			replace: [2]string{`,"scopes":{"organization_id":"` + org + `","scopes":["transactions:write"]}`, ``},
		},
		"token left out": {
			fault:   cabletest.Fault{Grant: &cabletest.Grant{OmitToken: true}},
			replace: [2]string{`"token":"TOKEN",`, ``},
		},
		"token": {fault: cabletest.Fault{Grant: &cabletest.Grant{Token: ptr("")}}, replace: [2]string{`TOKEN`, ``}},
		"expiry left out": {
			fault:   cabletest.Fault{Grant: &cabletest.Grant{OmitExpiry: true}},
			replace: [2]string{`"expiry":1711929600,`, ``},
		},
		"expiry verbatim": {
			fault:   cabletest.Fault{Grant: &cabletest.Grant{Expiry: json.RawMessage(`1.7119296e9`)}},
			replace: [2]string{`1711929600`, `1.7119296e9`},
		},
		"clock ahead": {
			fault:   cabletest.Fault{ClockSkew: 90 * time.Second},
			replace: [2]string{`1711929600`, `1711929690`},
		},
		"clock behind": {
			fault:   cabletest.Fault{ClockSkew: -time.Hour},
			replace: [2]string{`1711929600`, `1711926000`},
		},
	}
	const behaved = `{"token":"TOKEN","expiry":1711929600,"organization_id":"` + org +
		`","organization_name":"Cable Financial Services","scopes":{"organization_id":"` + org +
		`","scopes":["transactions:write"]}}`
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := cabletest.NewServer(t, &cabletest.Options{Now: clock})
			srv.SetFault(tt.fault)
			resp, body := post(t, http.DefaultClient, newRequest(t, srv.Simulator, srv.URL, validBody))
			minted := srv.Minted()
			if len(minted) != 1 || resp.StatusCode != 200 {
				t.Fatalf("status %d, %d minted", resp.StatusCode, len(minted))
			}
			got := string(body)
			if minted[0].Token != "" {
				got = strings.Replace(got, minted[0].Token, "TOKEN", 1)
			}
			want := strings.Replace(behaved, tt.replace[0], tt.replace[1], 1)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("response (-want +got):\n%s", diff)
			}
			requested := tt.lifetime
			if requested == 0 {
				requested = time.Hour
			}
			issued := clock().Add(tt.fault.ClockSkew).Truncate(time.Second)
			if !minted[0].IssuedAt.Equal(issued) || !minted[0].Expiry.Equal(issued.Add(requested)) {
				t.Errorf(
					"minted %s to %s, want %s to %s", minted[0].IssuedAt, minted[0].Expiry, issued,
					issued.Add(requested),
				)
			}
			if got, want := resp.Header.Get("Date"), issued.Format(http.TimeFormat); got != want {
				t.Errorf("Date = %q, want %q", got, want)
			}
		})
	}
}

func TestFaultBodyAndHeader(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		fault  cabletest.Fault
		body   string
		status int
		header map[string]string // "" must be absent
	}{
		"body":         {fault: cabletest.Fault{Body: "<html> {refresh_key}"}, body: "<html> KEY", status: 200},
		"status, body": {fault: cabletest.Fault{Status: 502, Body: "bad gateway"}, body: "bad gateway", status: 502},
		"filler": {
			fault: cabletest.Fault{BodySize: 5}, body: "xxxxx", status: 200,
			header: map[string]string{"Content-Length": "5"},
		},
		"body and filler": {
			fault: cabletest.Fault{Body: `{"token":"`, BodySize: 3}, body: `{"token":"xxx`, status: 200,
			header: map[string]string{"Content-Length": "13"},
		},
		"empty body": {fault: cabletest.Fault{Header: map[string]string{"Content-Length": "0"}}, status: 200},
		"headers": {
			fault: cabletest.Fault{Body: "b", Header: map[string]string{
				"Date": "yesterday", "content-type": "text/html", "Retry-After": "Sun, 31 Mar 2024 23:00:07 GMT",
			}},
			body: "b", status: 200,
			header: map[string]string{
				"Date": "yesterday", "Content-Type": "text/html", "Retry-After": "Sun, 31 Mar 2024 23:00:07 GMT",
			},
		},
		"headers removed": {
			fault: cabletest.Fault{Body: "b", Header: map[string]string{"date": "", "Content-Type": ""}},
			body:  "b", status: 200,
			header: map[string]string{"Date": "", "Content-Type": ""},
		},
		"redirect": {
			fault: cabletest.Fault{Status: 307, Body: "b", Header: map[string]string{"Location": "/elsewhere"}},
			body:  "b", status: 307, header: map[string]string{"Location": "/elsewhere"},
		},
		"no content": {fault: cabletest.Fault{Status: 204}, status: 204},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := cabletest.NewServer(t, nil)
			srv.SetFault(tt.fault)
			client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error {
				return http.ErrUseLastResponse
			}}
			resp, body := post(t, client, newRequest(t, srv.Simulator, srv.URL, validBody))
			got := strings.ReplaceAll(string(body), srv.RefreshKey(), "KEY")
			if got != tt.body || resp.StatusCode != tt.status {
				t.Errorf("status %d, body %q; want %d, %q", resp.StatusCode, got, tt.status, tt.body)
			}
			for name, want := range tt.header {
				if _, there := resp.Header[name]; resp.Header.Get(name) != want || there != (want != "") {
					t.Errorf("%s = %q, want %q", name, resp.Header[name], want)
				}
			}
			if minted := srv.Stats().Minted; minted != btoi(tt.fault.Status == 0) {
				t.Errorf("%d minted", minted)
			}
		})
	}
}

func ptr[T any](v T) *T { return &v }

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

func TestFaultGzip(t *testing.T) {
	t.Parallel()
	const size = 8 << 20
	srv := cabletest.NewServer(t, nil)
	srv.SetFault(cabletest.Fault{Gzip: true, BodySize: size})
	client := &http.Client{Transport: &http.Transport{DisableCompression: true}}
	defer client.CloseIdleConnections()
	resp, body := post(t, client, newRequest(t, srv.Simulator, srv.URL, validBody))
	if resp.Header.Get("Content-Encoding") != "gzip" || len(body) > size/100 {
		t.Errorf("Content-Encoding %q, %d bytes", resp.Header.Get("Content-Encoding"), len(body))
	}
	z, err := gzip.NewReader(bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, z); n != size || err != nil {
		t.Errorf("%d bytes, %v; want %d", n, err, size)
	}

	srv.SetFault(cabletest.Fault{Gzip: true}) // a good response, which Go's client unpacks by itself
	_, body = post(t, http.DefaultClient, newRequest(t, srv.Simulator, srv.URL, validBody))
	if !bytes.Contains(body, []byte(cabletest.TokenMarker)) {
		t.Errorf("body %q", body)
	}
}

func TestFaultReset(t *testing.T) {
	t.Parallel()
	servers := map[string]func(testing.TB, *cabletest.Options) *cabletest.Server{
		"http": cabletest.NewServer, "https": cabletest.NewTLSServer,
	}
	tests := map[string]struct {
		status, minted int
	}{
		cabletest.ResetBefore: {0, 0},
		cabletest.ResetAfter:  {0, 1},
		cabletest.ResetHalf:   {200, 1},
	}
	for kind, newServer := range servers {
		for reset, tt := range tests {
			t.Run(kind+"/"+reset, func(t *testing.T) {
				t.Parallel()
				srv := newServer(t, nil)
				srv.SetFault(cabletest.Fault{Reset: reset})
				client := newClient(t, srv)
				resp, err := client.Do(newRequest(t, srv.Simulator, srv.URL, validBody))
				if err == nil {
					var body []byte
					body, err = io.ReadAll(resp.Body)
					resp.Body.Close()
					if reset != cabletest.ResetHalf {
						t.Errorf("response: %d %q", resp.StatusCode, body)
					}
					// Elsewhere than on Linux, a reset may overtake the bytes before it.
					if want := resp.ContentLength / 2; runtime.GOOS == "linux" && int64(len(body)) != want {
						t.Errorf("%d bytes arrived, want %d", len(body), want)
					}
				}
				t.Log(err)
				if err == nil || runtime.GOOS == "linux" && !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("error = %v, want a reset", err)
				}
				calls := srv.Calls()
				if len(calls) == 0 || calls[0].Status != tt.status || len(srv.Minted()) != tt.minted*len(calls) {
					t.Errorf("%d minted, calls %+v", len(srv.Minted()), calls)
				}
			})
		}
	}
}

// TestFaultDelay ends a delay in each way it can end, but for its time.
func TestFaultDelay(t *testing.T) {
	t.Parallel()
	ended := make(chan cabletest.Call, 1)
	opts := &cabletest.Options{Log: func(c cabletest.Call) { ended <- c }}
	srv := cabletest.NewServer(t, opts)
	srv.SetFault(cabletest.Fault{Delay: time.Hour})

	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := http.DefaultClient.Do(newRequest(t, srv.Simulator, srv.URL, validBody).WithContext(ctx))
		done <- err
	}()
	for srv.CallCount() == 0 { // a call is counted on arrival
		runtime.Gosched()
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("error = %v", err)
	}
	if c := <-ended; c.Status != 0 || c.Minted {
		t.Errorf("the caller went away: %+v", c)
	}

	go func() {
		_, err := http.DefaultClient.Do(newRequest(t, srv.Simulator, srv.URL, validBody))
		done <- err
	}()
	for srv.CallCount() == 1 {
		runtime.Gosched()
	}
	srv.Close()
	if err := <-done; err == nil {
		t.Error("a response after Close")
	}
	if c := <-ended; c.Status != 0 || c.Minted {
		t.Errorf("the simulator was closed: %+v", c)
	}
}

// TestFaultShortDelayAndStall waits for both. The response is good, and not early.
func TestFaultShortDelayAndStall(t *testing.T) {
	t.Parallel()
	srv := cabletest.NewServer(t, nil)
	const each = 20 * time.Millisecond
	srv.SetFault(cabletest.Fault{Delay: each, Stall: each})
	start := time.Now()
	_, body := post(t, http.DefaultClient, newRequest(t, srv.Simulator, srv.URL, validBody))
	if took := time.Since(start); took < 2*each || !json.Valid(body) {
		t.Errorf("after %s: %q", took, body)
	}
}

func TestFaultStall(t *testing.T) {
	t.Parallel()
	srv := cabletest.NewServer(t, nil)
	srv.SetFault(cabletest.Fault{Stall: time.Hour, Body: "0123456789"})
	resp, err := http.DefaultClient.Do(newRequest(t, srv.Simulator, srv.URL, validBody))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	half := make([]byte, 5)
	if _, err := io.ReadFull(resp.Body, half); err != nil || string(half) != "01234" {
		t.Errorf("first half: %q, %v", half, err)
	}
	srv.Close()
	if rest, err := io.ReadAll(resp.Body); err == nil {
		t.Errorf("rest %q without an error", rest)
	}
}

func TestFaultJSON(t *testing.T) {
	t.Parallel()
	got := cabletest.Fault{Times: 99}
	err := json.Unmarshal([]byte(`{
		"times": 2, "every": 3, "delay": "5s", "stall": "1m", "status": 429, "message": "m",
		"errors": [{"field": "f", "message": "g"}], "header": {"Retry-After": "7"}, "body": "b", "body_size": 4,
		"gzip": true, "reset": "half", "clock_skew": "-90s",
		"grant": {"lifetime": "10s", "organization_id": "o", "scopes_organization_id": "p", "scopes": ["a:b"],
			"omit_scopes": true, "omit_token": true, "omit_expiry": true, "expiry": "1.50", "token": "t"}
	}`), &got)
	if err != nil {
		t.Fatal(err)
	}
	want := cabletest.Fault{
		Times: 2, Every: 3, Delay: 5 * time.Second, Stall: time.Minute, Status: 429, Message: "m",
		Errors: []cabletest.FieldError{{Field: "f", Message: "g"}}, Header: map[string]string{"Retry-After": "7"},
		Body: "b", BodySize: 4, Gzip: true, Reset: "half", ClockSkew: -90 * time.Second,
		Grant: &cabletest.Grant{
			Lifetime: ptr(10 * time.Second), OrganizationID: ptr("o"), ScopesOrganizationID: ptr("p"),
			Scopes: &[]string{"a:b"}, OmitScopes: true, OmitToken: true, OmitExpiry: true,
			Expiry: json.RawMessage(`"1.50"`), Token: ptr("t"),
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("fault (-want +got):\n%s", diff)
	}

	for _, text := range []string{
		`{"stauts": 429}`, `{"grant": {"lief": "1s"}}`, `{"delay": 5}`, `{"delay": "5"}`, `{"grant": {"lifetime": 5}}`,
		`{"reset": "sometimes"}`, `{"status": 100}`, `{"status": 600}`, `{"times": -1}`, `{"stall": "-1s"}`, `[]`,
	} {
		err := json.Unmarshal([]byte(text), new(cabletest.Fault))
		if err == nil {
			t.Errorf("%s: no error", text)
		}
		t.Log(text, err)
	}
}

func TestSenselessFaultPanics(t *testing.T) {
	t.Parallel()
	for _, f := range []cabletest.Fault{
		{Reset: "sometimes"}, {Status: 99}, {BodySize: -1}, {Grant: &cabletest.Grant{Expiry: json.RawMessage("NaN")}},
	} {
		sim := cabletest.New(nil)
		if got := panicOf(func() { sim.AddFault(f) }); got == nil {
			t.Errorf("%+v: no panic", f)
		} else {
			t.Log(got)
		}
	}
}
