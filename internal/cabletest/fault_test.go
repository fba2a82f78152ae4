// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cabletest_test

import (
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// TestFaults pins the response to a call with each fault, and that one with a Status mints nothing.
func TestFaults(t *testing.T) {
	t.Parallel()
	other, none, list := "org_other", "", []string{"a:b", "c:d"}
	soon, past := 10*time.Second, -time.Minute
	echoed := []cabletest.FieldError{{Field: "a", Message: "{refresh_key}"}}
	grant := func(g cabletest.Grant) cabletest.Fault { return cabletest.Fault{Grant: &g} }
	// sampled is the response of a call without a fault, of which one part is replaced.
	sampled := func(part, by string) string { return strings.Replace(sample, part, by, 1) }
	const id = `"organization_id":"`
	const inner = `,"scopes":{"organization_id":"` + org + `","scopes":["transactions:write"]}`
	for _, tt := range []struct {
		fault    cabletest.Fault
		body     string        // with KEY for the refresh key
		lifetime time.Duration // of the token; 0 is as requested
	}{
		{cabletest.Fault{}, sample, 0},
		{grant(cabletest.Grant{Lifetime: &soon}), sampled("1711929600", "1711926010"), soon},
		{grant(cabletest.Grant{Lifetime: &past}), sampled("1711929600", "1711925940"), past},
		{grant(cabletest.Grant{OrganizationID: &other}), sampled(`0,`+id+org, `0,`+id+other), 0},
		{grant(cabletest.Grant{ScopesOrganizationID: &other}), sampled(`{`+id+org, `{`+id+other), 0},
		{grant(cabletest.Grant{Scopes: &list}), sampled(`["transactions:write"]`, `["a:b","c:d"]`), 0},
		{grant(cabletest.Grant{Scopes: &[]string{}}), sampled(`["transactions:write"]`, `[]`), 0},
		{grant(cabletest.Grant{OmitScopes: true}), sampled(inner, ""), 0},
		{grant(cabletest.Grant{OmitToken: true}), sampled(`"token":"TOKEN",`, ""), 0},
		{grant(cabletest.Grant{Token: &none}), sampled("TOKEN", ""), 0},
		{grant(cabletest.Grant{OmitExpiry: true}), sampled(`"expiry":1711929600,`, ""), 0},
		{grant(cabletest.Grant{Expiry: json.RawMessage("1.7119296e9")}), sampled("1711929600", "1.7119296e9"), 0},
		{cabletest.Fault{ClockSkew: 90 * time.Second}, sampled("1711929600", "1711929690"), 0},
		{cabletest.Fault{ClockSkew: -time.Hour}, sampled("1711929600", "1711926000"), 0},
		{cabletest.Fault{Body: "<html> {refresh_key}"}, "<html> KEY", 0},
		{cabletest.Fault{Body: `{"token":"`, BodySize: 3}, `{"token":"xxx`, 0},
		{cabletest.Fault{Status: 502, Body: "bad gateway"}, "bad gateway", 0},
		{cabletest.Fault{Status: 503}, `{"code":503,"message":"Service Unavailable"}`, 0},
		{
			cabletest.Fault{Status: 429, Message: "no {refresh_key}", Errors: echoed},
			`{"code":429,"message":"no KEY","errors":[{"field":"a","message":"KEY"}]}`, 0,
		},
	} {
		tt.fault.Header = map[string]string{"location": "/?{refresh_key}", "Content-Type": ""}
		sim := cabletest.New(&cabletest.Options{Now: clock})
		sim.SetFault(tt.fault)
		w := httptest.NewRecorder()
		sim.ServeHTTP(w, newRequest(t, sim, sim.Path(), validBody))
		body := strings.ReplaceAll(w.Body.String(), sim.RefreshKey(), "KEY")
		minted := sim.Minted()
		if tt.fault.Status == 0 {
			issued := clock().Add(tt.fault.ClockSkew).Truncate(time.Second)
			if tt.lifetime == 0 {
				tt.lifetime = time.Hour
			}
			if len(minted) != 1 || !minted[0].IssuedAt.Equal(issued) ||
				!minted[0].Expiry.Equal(issued.Add(tt.lifetime)) ||
				w.Header().Get("Date") != issued.Format(http.TimeFormat) {
				t.Fatalf("%+v: Date %s, minted %+v; want %s", tt.fault, w.Header().Get("Date"), minted, issued)
			}
			if minted[0].Token != "" {
				body = strings.Replace(body, minted[0].Token, "TOKEN", 1)
			}
			tt.fault.Status = 200
		} else if len(minted) > 0 {
			t.Errorf("%+v: minted", tt.fault)
		}
		if body != tt.body || w.Code != tt.fault.Status || sim.Calls()[0].Status != tt.fault.Status ||
			w.Header().Get("Location") != "/?"+sim.RefreshKey() || w.Header().Get("Content-Type") != "" ||
			strings.Contains(fmt.Sprint(sim.Calls()), cabletest.RefreshKeyMarker) {
			t.Errorf("%+v: %d %q %v; want %d %q", tt.fault, w.Code, body, w.Header(), tt.fault.Status, tt.body)
		}
	}
}

// TestFaultOrder pins which calls each of several faults applies to.
func TestFaultOrder(t *testing.T) {
	t.Parallel()
	f := func(status, times, every int) cabletest.Fault {
		return cabletest.Fault{Status: status, Times: times, Every: every}
	}
	for _, tt := range []struct {
		byDefault int
		faults    []cabletest.Fault
		want      string
	}{
		{0, nil, "200 200"},
		{0, []cabletest.Fault{f(500, 0, 0)}, "500 500 500"},
		{0, []cabletest.Fault{f(500, 2, 0)}, "500 500 200 200"},
		{0, []cabletest.Fault{f(500, 1, 0), f(503, 2, 0)}, "500 503 503 200"},
		{0, []cabletest.Fault{f(500, 0, 3)}, "200 200 500 200 200 500"},
		{0, []cabletest.Fault{f(500, 1, 2), f(503, 0, 0)}, "200 500 503"},
		{0, []cabletest.Fault{f(0, 1, 0), f(503, 0, 0)}, "200 503"},
		{418, []cabletest.Fault{f(500, 1, 2)}, "418 500 418"},
	} {
		sim := cabletest.New(&cabletest.Options{Default: f(tt.byDefault, 0, 0)})
		for i, fault := range tt.faults {
			if i == 0 {
				sim.AddFault(f(599, 0, 0)) // replaced at once
				sim.SetFault(fault)
			} else {
				sim.AddFault(fault)
			}
		}
		var got []string
		for range strings.Fields(tt.want) {
			sim.ServeHTTP(httptest.NewRecorder(), newRequest(t, sim, "/elsewhere", validBody)) // takes no fault
			status, _ := call(t, sim)
			got = append(got, fmt.Sprint(status))
		}
		checkEqual(t, fmt.Sprintf("statuses of %+v", tt.faults), tt.want, strings.Join(got, " "))
		sim.ClearFaults()
		if status, _ := call(t, sim); status != max(200, tt.byDefault) {
			t.Errorf("after ClearFaults: %d", status)
		}
	}
}

// TestConnectionFaults pins the faults that only a network shows, with TLS and without.
func TestConnectionFaults(t *testing.T) {
	t.Parallel()
	for kind, newServer := range map[string]func(testing.TB, *cabletest.Options) *cabletest.Server{
		"http": cabletest.NewServer, "https": cabletest.NewTLSServer,
	} {
		for name, tt := range map[string]struct {
			fault  cabletest.Fault
			status int
			minted int
			half   bool // of the response arrives
		}{
			"reset before": {cabletest.Fault{Reset: cabletest.ResetBefore}, 0, 0, false},
			"reset after":  {cabletest.Fault{Reset: cabletest.ResetAfter}, 0, 1, false},
			"reset half":   {cabletest.Fault{Reset: cabletest.ResetHalf}, 200, 1, true},
			"delay":        {cabletest.Fault{Delay: time.Hour}, 0, 0, false},
			"stall":        {cabletest.Fault{Stall: time.Hour}, 200, 1, true},
			"caller left":  {cabletest.Fault{Delay: time.Hour}, 0, 0, false},
		} {
			t.Run(kind+"/"+name, func(t *testing.T) {
				t.Parallel()
				ended := make(chan cabletest.Call, 9)
				srv := newServer(t, &cabletest.Options{Log: func(c cabletest.Call) { ended <- c }})
				srv.SetFault(tt.fault)
				roots := x509.NewCertPool()
				roots.AppendCertsFromPEM([]byte(srv.CA))
				transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
				defer transport.CloseIdleConnections()
				ctx, leave := context.WithCancel(t.Context())
				defer leave()
				go func() {
					for srv.CallCount() == 0 { // a call is counted on arrival
						runtime.Gosched()
					}
					switch name {
					case "delay":
						srv.Close()
					case "caller left":
						leave()
					}
				}()
				resp, err := transport.RoundTrip(newRequest(t, srv.Simulator, srv.URL, validBody).WithContext(ctx))
				if err == nil {
					want := resp.ContentLength / 2
					n, _ := io.CopyN(io.Discard, resp.Body, want)
					if name == "stall" {
						srv.Close()
					}
					// Elsewhere than on Linux, a reset may overtake the bytes before it.
					if !tt.half || runtime.GOOS == "linux" && n != want {
						t.Errorf("%d bytes arrived, want %d: %t", n, want, tt.half)
					}
					_, err = io.ReadAll(resp.Body)
					_ = resp.Body.Close()
				}
				reset := errors.Is(err, syscall.ECONNRESET)
				if err == nil || runtime.GOOS == "linux" && reset != (tt.fault.Reset != "") {
					t.Errorf("error = %v", err)
				}
				if c := <-ended; c.Status != tt.status || c.Minted != (tt.minted > 0) ||
					len(srv.Minted()) != tt.minted*srv.CallCount() {
					t.Errorf("call %+v, %d minted", c, len(srv.Minted()))
				}
			})
		}
	}
	srv := cabletest.NewServer(t, nil)
	const each, size = 20 * time.Millisecond, 8 << 20
	srv.SetFault(cabletest.Fault{Delay: each, Stall: each, Gzip: true, BodySize: size})
	start := time.Now()
	transport := &http.Transport{DisableCompression: true}
	defer transport.CloseIdleConnections()
	resp, err := transport.RoundTrip(newRequest(t, srv.Simulator, srv.URL, validBody))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	z, err := gzip.NewReader(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	n, err := io.Copy(io.Discard, z)
	if took := time.Since(start); n != size || err != nil || took < 2*each ||
		resp.Header.Get("Content-Encoding") != "gzip" {
		t.Errorf("%d bytes after %s, %v, %v", n, took, err, resp.Header)
	}
}

// TestFaultJSON pins the names of a fault in JSON, and which faults are refused.
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
	lifetime, o, p, token := 10*time.Second, "o", "p", "t"
	checkEqual(t, "fault", cabletest.Fault{
		Times: 2, Every: 3, Delay: 5 * time.Second, Stall: time.Minute, Status: 429, Message: "m",
		Errors: []cabletest.FieldError{{Field: "f", Message: "g"}}, Header: map[string]string{"Retry-After": "7"},
		Body: "b", BodySize: 4, Gzip: true, Reset: "half", ClockSkew: -90 * time.Second,
		Grant: &cabletest.Grant{
			Lifetime: &lifetime, OrganizationID: &o, ScopesOrganizationID: &p, Scopes: &[]string{"a:b"}, Token: &token,
			OmitScopes: true, OmitToken: true, OmitExpiry: true, Expiry: json.RawMessage(`"1.50"`),
		},
	}, got)
	for _, text := range []string{
		`{"stauts": 429}`, `{"grant": {"lief": "1s"}}`, `{"delay": 5}`, `{"delay": "5"}`, `{"grant": {"lifetime": 5}}`,
		`{"reset": "sometimes"}`, `{"status": 100}`, `{"status": 600}`, `{"times": -1}`, `{"stall": "-1s"}`, `[]`,
	} {
		if err := json.Unmarshal([]byte(text), new(cabletest.Fault)); err == nil {
			t.Errorf("%s: no error", text)
		}
	}
	defer func() { t.Log(recover()) }()
	cabletest.New(nil).AddFault(cabletest.Fault{Grant: &cabletest.Grant{Expiry: json.RawMessage("NaN")}})
	t.Error("a fault that is not valid: no panic")
}
