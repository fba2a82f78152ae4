// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// message is the one error of an answer, without Vault's frame around it.
func message(a *answer) string {
	if len(a.Errors) != 1 {
		return a.String()
	}
	return strings.TrimSpace(strings.TrimPrefix(a.Errors[0], "1 error occurred:\n\t* "))
}

// ptr returns a pointer to v.
func ptr[T any](v T) *T { return &v }

// failure is a way in which Cable fails a token request.
type failure struct {
	outcome string
	fault   cabletest.Fault
	timeout string // request_timeout; default: 20s
	status  int    // HTTP, of Vault's response
	text    string // part of the error
}

// failures has one failure for each outcome. What leads to which outcome, with
// which error, is tested in internal/cable and in the root package.
var failures = []failure{
	{outcome: "key_rejected", fault: cabletest.Fault{Status: 401, Message: "no, {refresh_key}"}, status: 400, text: "no, [redacted]; the refresh key was sent with auth_scheme=raw"},
	{outcome: "rejected_by_cable", fault: cabletest.Fault{Status: 403}, status: 400, text: "403: Forbidden; check the organization and the scopes of roles/app"},
	{outcome: "cable_error", fault: cabletest.Fault{Status: 500}, status: 502, text: "500: Internal Server Error"},
	{outcome: "unreachable", fault: cabletest.Fault{Reset: cabletest.ResetAfter}, status: 502, text: "cable could not be reached"},
	{outcome: "timed_out", fault: cabletest.Fault{Delay: time.Minute}, timeout: "1s", status: 504, text: "the budget of 1s ran out"},
	{outcome: "invalid_response", fault: cabletest.Fault{Body: "<html></html>"}, status: 502, text: "it is not a JSON object"},
	{outcome: "grant_mismatch", fault: cabletest.Fault{Grant: &cabletest.Grant{OrganizationID: ptr("org_other"), ScopesOrganizationID: ptr("org_other")}}, status: 502, text: `"org_other"`},
	{outcome: "rate_limited", fault: cabletest.Fault{Status: 429, Header: map[string]string{"Retry-After": "70"}}, status: 429, text: "70s"},
}

// fail has Cable fail one read.
func (m *mount) fail(t *testing.T, f failure) *answer {
	t.Helper()
	if f.timeout != "" {
		m.ok(t, "POST", m.path+"/config", map[string]any{"request_timeout": f.timeout})
		defer m.ok(t, "POST", m.path+"/config", map[string]any{"request_timeout": "20s"})
	}
	m.sim.SetFault(f.fault)
	defer m.sim.ClearFaults()
	return m.do(t, "GET", m.path+"/creds/app", nil)
}

// TestCableFails: what a caller sees of each failure, and that Cable is called
// once. When Cable is back, so is the engine.
func TestCableFails(t *testing.T) {
	t.Parallel()
	v := sharedServer(t)
	for _, f := range failures {
		t.Run(f.outcome, func(t *testing.T) {
			t.Parallel()
			m := newMount(t, v, nil)
			m.configure(t)
			m.ok(t, "POST", "sys/mounts/"+m.path+"/tune", map[string]any{"allowed_response_headers": []string{"Retry-After"}})
			a := m.fail(t, f)
			t.Log(a)
			if calls := m.sim.CallCount(); a.status != f.status || calls != 1 || !strings.Contains(message(a), f.text) {
				t.Errorf("%s after %d calls; want status %d, %q, 1 call", a, calls, f.status, f.text)
			}
			if secret := findSecret(a.text, false); secret != "" {
				t.Errorf("the response contains %s", secret)
			}
			if f.status != 429 {
				if a.header.Get("Retry-After") != "" {
					t.Errorf("Retry-After %q", a.header.Get("Retry-After"))
				}
				m.read(t)
				return
			}
			// No call until the time that Cable named.
			paused := m.do(t, "GET", m.path+"/creds/app", nil)
			if a.header.Get("Retry-After") != "70" || paused.status != 429 || paused.header.Get("Retry-After") == "" || m.sim.CallCount() != 1 {
				t.Errorf("Retry-After %q, then %s with %q and %d calls", a.header.Get("Retry-After"), paused, paused.header.Get("Retry-After"), m.sim.CallCount())
			}
		})
	}
}

// TestPauseWithoutTuning: without tuning Vault drops the header; the message
// names the seconds. When the pause is over, Cable is called again.
func TestPauseWithoutTuning(t *testing.T) {
	t.Parallel()
	m := newMount(t, sharedServer(t), nil)
	m.configure(t)
	m.sim.SetFault(cabletest.Fault{Times: 1, Status: 429, Header: map[string]string{"Retry-After": "2"}})
	m.ok(t, "POST", m.path+"/config", map[string]any{"request_timeout": "2s"}) // or the engine waits, and repeats
	a := m.do(t, "GET", m.path+"/creds/app", nil)
	if want := "cable responded 429: Too Many Requests; no API call for another 2s"; a.status != 429 || message(a) != want || a.header.Get("Retry-After") != "" {
		t.Errorf("got %s, want %q and no header", a, want)
	}
	waitFor(t, 10*time.Second, "a token after the pause", func() bool {
		return m.do(t, "GET", m.path+"/creds/app", nil).status == 200
	})
	if n := m.sim.CallCount(); n != 2 {
		t.Errorf("%d calls, want 2: none in the pause", n)
	}
}

// TestCACert: Cable's certificate is checked, against ca_cert too.
func TestCACert(t *testing.T) {
	t.Parallel()
	sim := cabletest.NewTLSServer(t, nil)
	m := newMount(t, sharedServer(t), nil)
	m.configure(t, map[string]any{"token_url": sim.URL, "refresh_key": sim.RefreshKey()})
	if a := m.do(t, "GET", m.path+"/creds/app", nil); a.status != 502 || !strings.Contains(message(a), "unknown authority: set ca_cert") {
		t.Errorf("without ca_cert: %s", a)
	}
	m.configure(t, map[string]any{"token_url": sim.URL, "refresh_key": sim.RefreshKey(), "ca_cert": sim.CA})
	m.read(t)
}

// TestProxy: what the environment names as a proxy is used, and its password is
// not shown.
func TestProxy(t *testing.T) {
	t.Parallel()
	const password = "PROXYPASSWORD"
	var status atomic.Int64
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect || r.Host != "cable.invalid:443" || r.Header.Get("Proxy-Authorization") == "" || r.Header.Get("Authorization") != "" {
			t.Errorf("the proxy was asked %s %s with the headers %v", r.Method, r.Host, slices.Sorted(maps.Keys(r.Header)))
		}
		w.WriteHeader(int(status.Load()))
		_, _ = io.WriteString(w, password)
	}))
	t.Cleanup(proxy.Close)
	v := ownServer(t, "HTTPS_PROXY="+strings.Replace(proxy.URL, "//", "//user:"+password+"@", 1))
	m := newMount(t, v, nil)
	m.configure(t, map[string]any{"token_url": "https://cable.invalid/v2/auth/token"})
	for _, n := range []int64{403, 407, 502} {
		status.Store(n)
		a := m.do(t, "GET", m.path+"/creds/app", nil)
		t.Log(a)
		if a.status != 502 || !strings.HasPrefix(message(a), "cable could not be reached: ") || strings.Contains(a.text, password) {
			t.Errorf("the proxy answers %d: %s", n, a)
		}
	}
	proxy.Close()
	a := m.do(t, "GET", m.path+"/creds/app", nil)
	if want := "cable could not be reached: connecting through the environment's proxy: connection refused"; a.status != 502 || message(a) != want {
		t.Errorf("no proxy: %s, want %q", a, want)
	}
}
