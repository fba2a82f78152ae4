// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

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

// failures has one failure for each outcome. The causes of each outcome, with
// their errors, are tested in internal/cable and in the root package.
var failures = []failure{
	{
		outcome: "key_rejected",
		fault:   cabletest.Fault{Status: 401, Message: "no, {refresh_key}"},
		status:  400,
		text:    "no, [redacted]; the refresh key was sent with auth_scheme=raw",
	},
	{
		outcome: "rejected_by_cable",
		fault:   cabletest.Fault{Status: 403},
		status:  400,
		text:    "403: Forbidden; check the organization and the scopes of roles/app",
	},
	{outcome: "cable_error", fault: cabletest.Fault{Status: 500}, status: 502, text: "500: Internal Server Error"},
	{
		outcome: "unreachable",
		fault:   cabletest.Fault{Reset: cabletest.ResetAfter},
		status:  502,
		text:    "Cable could not be reached",
	},
	{
		outcome: "timed_out",
		fault:   cabletest.Fault{Delay: time.Minute},
		timeout: "1s",
		status:  504,
		text:    "the budget of 1s ran out",
	},
	{
		outcome: "invalid_response",
		fault:   cabletest.Fault{Body: "<html></html>"},
		status:  502,
		text:    "it is not a JSON object",
	},
	{
		outcome: "grant_mismatch",
		fault: cabletest.Fault{
			Grant: &cabletest.Grant{OrganizationID: ptr("org_other"), ScopesOrganizationID: ptr("org_other")},
		},
		status: 502,
		text:   `"org_other"`,
	},
	{
		outcome: "rate_limited",
		fault:   cabletest.Fault{Status: 429, Header: map[string]string{"Retry-After": "70"}},
		status:  429,
		text:    "70s",
	},
}

// fail has Cable fail one read.
func (m *mount) fail(t *testing.T, f failure) *response {
	t.Helper()
	if f.timeout != "" {
		m.ok(t, "POST", m.path+"/config", map[string]any{"request_timeout": f.timeout})
		defer m.ok(t, "POST", m.path+"/config", map[string]any{"request_timeout": "20s"})
	}
	m.sim.SetFault(f.fault)
	defer m.sim.ClearFaults()
	return m.do(t, "GET", m.path+"/creds/app", nil)
}

// TestCableFails pins each failure's status and error as a caller gets them from
// Vault, and that Cable is called once. When Cable is back, so is the engine.
// Certificates, proxies and the length of a pause are tested in internal/cable;
// the pages' tests reach Cable through a proxy and a root of its own.
func TestCableFails(t *testing.T) {
	t.Parallel()
	v := sharedServer(t)
	for _, f := range failures {
		t.Run(f.outcome, func(t *testing.T) {
			t.Parallel()
			m := newMount(t, v, nil)
			m.configure(t)
			a := m.fail(t, f)
			t.Log(a)
			calls, errors := m.sim.CallCount(), fmt.Sprint(a.Errors)
			if a.status != f.status || calls != 1 || !strings.Contains(errors, f.text) {
				t.Errorf("%s after %d calls; want status %d, %q, 1 call", a, calls, f.status, f.text)
			}
			if secret := findSecret(a.text, false); secret != "" {
				t.Errorf("the response contains %s", secret)
			}
			// Vault drops the header unless the mount is tuned for it.
			if a.header.Get("Retry-After") != "" {
				t.Errorf("Retry-After %q", a.header.Get("Retry-After"))
			}
			if f.status != 429 {
				m.read(t)
				return
			}
			// Cable is not called until the time that it named.
			m.ok(t, "POST", "sys/mounts/"+m.path+"/tune",
				map[string]any{"allowed_response_headers": []string{"Retry-After"}})
			for _, paused := range m.readAll(t, 16) {
				if n := m.sim.CallCount(); paused.status != 429 || paused.header.Get("Retry-After") == "" || n != 1 {
					t.Errorf("in the pause, after %d calls: %s, with Retry-After %q", n, paused,
						paused.header.Get("Retry-After"))
				}
			}
		})
	}
}
