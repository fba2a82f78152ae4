// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// variable is what differs between two runs in a message.
var variable = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ`)

// message is the one error of an answer, without Vault's frame around it and
// with TIME in place of a time.
func message(a *answer) string {
	if len(a.Errors) != 1 {
		return a.String()
	}
	text := strings.TrimPrefix(a.Errors[0], "1 error occurred:\n\t* ")
	return variable.ReplaceAllString(strings.TrimSpace(text), "TIME")
}

// ptr returns a pointer to v.
func ptr[T any](v T) *T { return &v }

// TestCableFails pins what a caller sees of each way in which Cable fails:
// status, text, and how often Cable was called. When Cable is back, so is the
// engine.
func TestCableFails(t *testing.T) {
	t.Parallel()
	v := sharedServer(t)
	const (
		maybe = "; a token that nobody holds may live at Cable until TIME"
		hint  = "; check the organization and the scopes of roles/app with Cable"
	)
	grant := func(g cabletest.Grant) cabletest.Fault { return cabletest.Fault{Grant: &g} }
	tests := map[string]struct {
		fault      cabletest.Fault
		config     map[string]any
		status     int
		want       string
		calls      int
		retryAfter string
	}{
		"400": {
			fault:  cabletest.Fault{Status: 400, Message: "validation failed", Errors: []cabletest.FieldError{{Field: "scopes.scopes", Message: "may not be granted"}, {Field: "expiry_seconds", Message: "is odd"}}},
			status: 400, calls: 1,
			want: "cable answered 400: validation failed: scopes.scopes: may not be granted; expiry_seconds: is odd" + hint,
		},
		"401": {
			fault:  cabletest.Fault{Status: 401, Message: "unauthorized"},
			status: 400, calls: 1,
			want: "cable answered 401: unauthorized; the refresh key was sent with auth_scheme=raw: write a valid refresh_key to config, or try auth_scheme=bearer, as Cable's documents show both",
		},
		"401 to bearer": {
			config: map[string]any{"auth_scheme": "bearer"}, // the simulator wants it raw
			status: 400, calls: 1,
			want: "cable answered 401: unauthorized; the refresh key was sent with auth_scheme=bearer: write a valid refresh_key to config, or try auth_scheme=raw, as Cable's documents show both",
		},
		"403":      {fault: cabletest.Fault{Status: 403}, status: 400, calls: 1, want: "cable answered 403: Forbidden" + hint},
		"404":      {fault: cabletest.Fault{Status: 404}, status: 400, calls: 1, want: "cable answered 404: Not Found; check token_url in config"},
		"409":      {fault: cabletest.Fault{Status: 409}, status: 400, calls: 1, want: "cable answered 409: Conflict"},
		"429":      {fault: cabletest.Fault{Status: 429}, status: 429, calls: 1, retryAfter: "5", want: "cable answered 429: Too Many Requests; no request is sent for another 5s"},
		"429 long": {fault: cabletest.Fault{Status: 429, Header: map[string]string{"Retry-After": "70"}}, status: 429, calls: 1, retryAfter: "70", want: "cable answered 429: Too Many Requests; no request is sent for another 70s"},
		"500":      {fault: cabletest.Fault{Status: 500}, status: 502, calls: 1, want: "cable answered 500: Internal Server Error" + maybe},
		"502":      {fault: cabletest.Fault{Status: 502}, status: 502, calls: 1, want: "cable answered 502: Bad Gateway" + maybe},
		"503":      {fault: cabletest.Fault{Status: 503}, status: 502, calls: 1, want: "cable answered 503: Service Unavailable"},
		"503 repeated in vain": {
			fault:  cabletest.Fault{Status: 503, Header: map[string]string{"Retry-After": "0"}},
			status: 502, calls: 3, want: "cable answered 503: Service Unavailable",
		},
		"503 repeated": {
			fault:  cabletest.Fault{Times: 2, Status: 503, Header: map[string]string{"Retry-After": "0"}},
			status: 200, calls: 3,
		},
		"bounded and escaped": {
			fault:  cabletest.Fault{Status: 400, Message: "\x1b[31m" + strings.Repeat("x", 9000)},
			status: 400, calls: 1,
			want: `cable answered 400: \x1b[31m` + strings.Repeat("x", 512-8) + hint,
		},
		"not the envelope": {fault: cabletest.Fault{Status: 400, Body: "<html>no</html>"}, status: 400, calls: 1, want: "cable answered 400" + hint},
		"echo of the key": {
			fault:  cabletest.Fault{Status: 400, Message: "bad key {refresh_key}!", Errors: []cabletest.FieldError{{Field: "{refresh_key}", Message: "{refresh_key}"}}},
			status: 400, calls: 1,
			want: "cable answered 400: bad key [redacted]!: [redacted]: [redacted]" + hint,
		},
		"reset before": {fault: cabletest.Fault{Reset: cabletest.ResetBefore}, status: 502, calls: 1, want: "cable could not be reached: the connection was closed before the answer was whole" + maybe},
		"reset after":  {fault: cabletest.Fault{Reset: cabletest.ResetAfter}, status: 502, calls: 1, want: "cable could not be reached: the connection was closed before the answer was whole" + maybe},
		"half":         {fault: cabletest.Fault{Reset: cabletest.ResetHalf}, status: 502, calls: 1, want: "cable could not be reached: the connection was closed before the answer was whole" + maybe},
		"hang": {
			fault: cabletest.Fault{Delay: time.Minute}, config: map[string]any{"request_timeout": "1s"},
			status: 504, calls: 1, want: "cable did not answer in time: the budget of 1s ran out after the request was sent" + maybe,
		},
		"hang in the answer": {
			fault: cabletest.Fault{Stall: time.Minute}, config: map[string]any{"request_timeout": "1s"},
			status: 504, calls: 1, want: "cable did not answer in time: the budget of 1s ran out after the request was sent" + maybe,
		},
		"html":      {fault: cabletest.Fault{Body: "<html></html>"}, status: 502, calls: 1, want: "cable's answer was refused: it is not a JSON object of the documented shape" + maybe},
		"large":     {fault: cabletest.Fault{BodySize: 8 << 20}, status: 502, calls: 1, want: "cable's answer was refused: it is larger than 1048576 bytes" + maybe},
		"gzip bomb": {fault: cabletest.Fault{BodySize: 8 << 20, Gzip: true}, status: 502, calls: 1, want: "cable's answer was refused: it is not a JSON object of the documented shape" + maybe},
		"200 with an error": {
			fault:  cabletest.Fault{Body: `{"code":401,"message":"unauthorized {refresh_key}"}`},
			status: 502, calls: 1, want: "cable's answer was refused: it holds no token, but says: unauthorized [redacted]" + maybe,
		},
		"201":                {fault: cabletest.Fault{Status: 201}, status: 502, calls: 1, want: "cable's answer was refused: its status is 201 instead of 200" + maybe},
		"no token":           {fault: grant(cabletest.Grant{OmitToken: true}), status: 502, calls: 1, want: "cable's answer was refused: it holds no token" + maybe},
		"the key as token":   {fault: cabletest.Fault{Body: `{"token":"{refresh_key}","expiry":4102444800,"organization_id":"` + cabletest.DefaultOrganizationID + `"}`}, status: 502, calls: 1, want: "cable's answer was refused: it repeats the refresh key: check that token_url is Cable's" + maybe},
		"no expiry":          {fault: grant(cabletest.Grant{OmitExpiry: true}), status: 502, calls: 1, want: "cable's answer was refused: it holds no expiry" + maybe},
		"expiry of text":     {fault: grant(cabletest.Grant{Expiry: []byte(`"4102444800"`)}), status: 502, calls: 1, want: "cable's answer was refused: its expiry is not a whole number of seconds" + maybe},
		"expiry in ms":       {fault: grant(cabletest.Grant{Expiry: []byte(`4102444800000`)}), status: 502, calls: 1, want: "cable's answer was refused: its expiry 4102444800000 is not a Unix time in seconds" + maybe},
		"past expiry":        {fault: grant(cabletest.Grant{Lifetime: ptr(-time.Minute)}), status: 502, calls: 1, want: "cable's answer was refused: its expiry is not in the future: -60s by Cable's clock"},
		"other organization": {fault: grant(cabletest.Grant{OrganizationID: ptr("org_other")}), status: 502, calls: 1, want: `cable's answer was refused: the token is for organization "org_other" instead of "` + cabletest.DefaultOrganizationID + `"` + maybe},
		"scopes of another organization": {
			fault:  grant(cabletest.Grant{ScopesOrganizationID: ptr("org_other")}),
			status: 502, calls: 1, want: `cable's answer was refused: the token's scopes are for organization "org_other" instead of "` + cabletest.DefaultOrganizationID + `"` + maybe,
		},
		"more scopes": {
			fault:  grant(cabletest.Grant{Scopes: &[]string{"transactions:read", "transactions:write", "person:write"}}),
			status: 502, calls: 1, want: `cable's answer was refused: the token holds scopes that were not asked for: "person:write"` + maybe,
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMount(t, v, nil)
			m.configure(t, tt.config)
			m.ok(t, "POST", "sys/mounts/"+m.path+"/tune", map[string]any{"allowed_response_headers": []string{"Retry-After"}})
			m.sim.SetFault(tt.fault)
			start := time.Now()
			a := m.do(t, "GET", m.path+"/creds/app", nil)
			if d := time.Since(start); d > 5*time.Second {
				t.Errorf("it took %s", d)
			}
			if a.status != tt.status || m.sim.CallCount() != tt.calls {
				t.Errorf("status %d after %d calls, want %d after %d: %s", a.status, m.sim.CallCount(), tt.status, tt.calls, a)
			}
			if a.status != 200 {
				t.Log(a)
				if diff := cmp.Diff(tt.want, message(a)); diff != "" {
					t.Errorf("message (-want +got):\n%s", diff)
				}
			}
			if got := a.header.Get("Retry-After"); got != tt.retryAfter {
				t.Errorf("Retry-After %q, want %q", got, tt.retryAfter)
			}
			if secret := findSecret(a.text, a.status == 200); secret != "" {
				t.Errorf("the answer holds %s", secret)
			}

			m.sim.ClearFaults()
			calls := m.sim.CallCount()
			if tt.status == 429 { // Cable is left alone for as long as it asked for
				a := m.do(t, "GET", m.path+"/creds/app", nil)
				if a.status != 429 || a.header.Get("Retry-After") == "" || m.sim.CallCount() != calls ||
					!strings.Contains(message(a), "cable asked for a pause (429): no request is sent for another ") {
					t.Errorf("in the pause: %s, %d calls", a, m.sim.CallCount()-calls)
				}
				return
			}
			if tt.config["auth_scheme"] == nil {
				m.read(t)
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
	if want := "cable answered 429: Too Many Requests; no request is sent for another 2s"; a.status != 429 || message(a) != want || a.header.Get("Retry-After") != "" {
		t.Errorf("got %s, want %q and no header", a, want)
	}
	waitFor(t, 10*time.Second, "a token after the pause", func() bool {
		return m.do(t, "GET", m.path+"/creds/app", nil).status == 200
	})
	if n := m.sim.CallCount(); n != 2 {
		t.Errorf("%d calls, want 2: none in the pause", n)
	}
}

// TestPauseThatFits: a pause that fits the budget is waited for.
func TestPauseThatFits(t *testing.T) {
	t.Parallel()
	m := newMount(t, sharedServer(t), nil)
	m.configure(t)
	m.sim.SetFault(cabletest.Fault{Times: 1, Status: 429, Header: map[string]string{"Retry-After": "1"}})
	m.read(t)
	if n := m.sim.CallCount(); n != 2 {
		t.Errorf("%d calls, want 2", n)
	}
}

// TestCableCannotBeReached pins failures of the way to Cable.
func TestCableCannotBeReached(t *testing.T) {
	t.Parallel()
	v := sharedServer(t)
	tls := cabletest.NewTLSServer(t, nil)
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = closed.Close()
	for name, tt := range map[string]struct{ url, want string }{
		"refused":    {"http://" + closed.Addr().String() + "/token", "cable could not be reached: connection refused"},
		"no host":    {"https://cable.invalid/token", `cable could not be reached: looking up the host "cable.invalid": no such host`},
		"unknown CA": {tls.URL, "cable could not be reached: its certificate is signed by an unknown authority: set ca_cert to the authority's certificate"},
		"other host": {strings.Replace(tls.URL, "127.0.0.1", "localhost", 1), `cable could not be reached: its certificate is not valid for the host "localhost"`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMount(t, v, nil)
			m.configure(t, map[string]any{"token_url": tt.url})
			a := m.do(t, "GET", m.path+"/creds/app", nil)
			t.Log(a)
			if name == "no host" && strings.Contains(a.text, "the name server") {
				// Where no name server can be asked, that has to be said instead.
				tt.want = `cable could not be reached: looking up the host "cable.invalid": the name server did not answer`
			}
			if a.status != 502 || message(a) != tt.want {
				t.Errorf("got %s, want %q", a, tt.want)
			}
		})
	}
	t.Run("with ca_cert", func(t *testing.T) {
		t.Parallel()
		m := newMount(t, v, nil)
		m.configure(t, map[string]any{"token_url": tls.URL, "ca_cert": tls.CA, "refresh_key": tls.RefreshKey()})
		m.read(t)
	})
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
	if want := "cable could not be reached: connecting through the proxy of the environment: connection refused"; a.status != 502 || message(a) != want {
		t.Errorf("no proxy: %s, want %q", a, want)
	}
}

// TestRedirect: the refresh key goes to one host.
func TestRedirect(t *testing.T) {
	t.Parallel()
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		t.Error("the redirect was followed")
	}))
	t.Cleanup(other.Close)
	m := newMount(t, sharedServer(t), nil)
	m.configure(t)
	for _, status := range []int{301, 302, 303, 307, 308} {
		m.sim.SetFault(cabletest.Fault{Status: status, Header: map[string]string{"Location": other.URL}})
		a := m.do(t, "GET", m.path+"/creds/app", nil)
		if want := "instead of 200, and redirects are not followed: check token_url"; a.status != 502 || !strings.Contains(message(a), want) {
			t.Errorf("got %s, want %q", a, want)
		}
	}
}

// TestGrantsThatDiffer pins what is handed on although it is not what was
// asked for.
func TestGrantsThatDiffer(t *testing.T) {
	t.Parallel()
	v := sharedServer(t)
	for name, tt := range map[string]struct {
		grant    cabletest.Grant
		scopes   []any
		warnings []string
	}{
		"no scopes":    {grant: cabletest.Grant{OmitScopes: true}, scopes: []any{"transactions:read", "transactions:write"}},
		"other order":  {grant: cabletest.Grant{Scopes: &[]string{"transactions:write", "transactions:read", "transactions:write"}}, scopes: []any{"transactions:read", "transactions:write"}},
		"fewer scopes": {grant: cabletest.Grant{Scopes: &[]string{"transactions:write"}}, scopes: []any{"transactions:write"}, warnings: []string{`Cable granted fewer scopes than were asked for; missing: "transactions:read"`}},
		"longer life":  {grant: cabletest.Grant{Lifetime: ptr(2 * time.Hour)}, scopes: []any{"transactions:read", "transactions:write"}, warnings: []string{"Cable granted 7200s instead of the 3600s that were asked for: the lease ends first, the token lives until TIME"}},
		"shorter life": {grant: cabletest.Grant{Lifetime: ptr(10 * time.Minute)}, scopes: []any{"transactions:read", "transactions:write"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMount(t, v, nil)
			m.configure(t)
			m.sim.SetFault(cabletest.Fault{Grant: &tt.grant})
			a := m.read(t)
			if diff := cmp.Diff(tt.scopes, a.Data["scopes"]); diff != "" {
				t.Errorf("scopes (-want +got):\n%s", diff)
			}
			for i, w := range a.Warnings {
				a.Warnings[i] = variable.ReplaceAllString(w, "TIME")
			}
			if diff := cmp.Diff(tt.warnings, a.Warnings); diff != "" {
				t.Errorf("warnings (-want +got):\n%s", diff)
			}
		})
	}
}
