// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"net/url"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// TestRecipes follows docs/recipes.md.
func TestRecipes(t *testing.T) {
	t.Parallel()
	r := newRunbook(t)
	r.installs()
	promtool := filepath.Join(needPrometheus(t), "promtool")
	calls := 0
	r.runPage("docs/recipes.md", map[string]step{
		"team": {
			before: r.knowsAna,
			after: func(string) {
				ana := r.v.ok(r.t, "PUT", "auth/userpass/login/ana", map[string]any{"password": "p"}).Auth.ClientToken
				r.allows(ana, "GET", "cable/creds/reports", nil, true)
				r.allows(ana, "GET", "cable/explain/reports", nil, true)
				for _, metadata := range []map[string]any{{"team": "other"}, {"floor": "2"}} {
					r.ok("POST", "identity/entity/name/ana", map[string]any{"metadata": metadata})
					r.allows(ana, "GET", "cable/creds/reports", nil, false)
				}
			},
		},
		"organization": {
			want: []string{`(?m)` + cabletest.DefaultOrganizationID + `$`},
			after: func(string) {
				sponsor := strings.TrimSpace(r.run("echo $sponsor"))
				const path = "cable/creds/sponsor"
				for _, id := range []string{cabletest.DefaultOrganizationID, "org_5d1c2b3a4e5f6a7b8c9d"} {
					allowed := id == cabletest.DefaultOrganizationID
					r.allows(sponsor, "GET", path+"?organization_id="+id, nil, allowed)
					r.allows(sponsor, "GET", path+"?ttl=10m&organization_id="+id, nil, allowed)
					body := map[string]any{"organization_id": id, "scopes": "transactions:read"}
					r.allows(sponsor, "PUT", path, body, allowed)
				}
				r.allows(sponsor, "GET", path, nil, false)
				r.allows(sponsor, "PUT", path, map[string]any{"ttl": "10m"}, false)
				// Vault compares a template as it stands.
				const template = "{{identity.entity.metadata.organization}}"
				r.v.writePolicy(r.t, "template", `path "cable/creds/sponsor" {
					capabilities       = ["read"]
					allowed_parameters = { "organization_id" = ["`+template+`"] }
				}`)
				r.ok("POST", "identity/entity/name/ana", map[string]any{
					"metadata": map[string]any{"organization": cabletest.DefaultOrganizationID}, "policies": "template",
				})
				ana := r.v.ok(r.t, "PUT", "auth/userpass/login/ana", map[string]any{"password": "p"}).Auth.ClientToken
				r.allows(ana, "GET", path+"?organization_id="+cabletest.DefaultOrganizationID, nil, false)
				a := r.v.as(r.t, ana, "GET", path+"?organization_id="+url.QueryEscape(template), nil)
				if a.status != 400 {
					r.t.Errorf("the template's own text: %s, want the engine's 400", a)
				}
			},
		},
		"try": {
			before: func() { calls = r.cable.CallCount() },
			want:   []string{`(?m)^true$`},
			after: func(string) {
				r.allows(r.v.tokenWith(r.t, "cable-try", nil), "GET", "cable/creds/reports", nil, false)
				if n := r.cable.CallCount(); n != calls {
					r.t.Errorf("%d calls to Cable", n-calls)
				}
			},
		},
		"second-mount": {
			before: func() { r.write("eu-refresh-key.txt", r.cable.RefreshKey()+"\n") },
			want:   []string{verified},
			after: func(string) {
				r.set("config", map[string]any{"disabled": true})
				if a := r.v.do(r.t, "GET", "cable-eu/creds/reports", nil); a.status != 200 {
					r.t.Errorf("the second mount, while the first is disabled: %s", a)
				}
				r.set("config", map[string]any{"disabled": false})
			},
		},
		"due-date": {want: []string{`(?m)^cable/ .*due on 2027-02-01: payments team`}},
		"explorer": {
			want: []string{`(?m)^/cable/config\n/cable/creds/\{name\}\n/cable/explain/\{name\}\n`},
			after: func(string) {
				const document = "sys/internal/specs/openapi"
				a := r.v.as(r.t, r.v.tokenWith(r.t, "default", nil), "GET", document, nil)
				if a.status != 200 || strings.Contains(a.text, `"/cable/`) {
					r.t.Errorf("status %d; an operator without a path of the mount sees it", a.status)
				}
				shown := r.run(`vault read -format=raw ` + document + ` | jq -r '.paths["/cable/explain/{name}"]
					| (.parameters + .get.parameters)[] | "\(.name): \(.description)"'`)
				for _, name := range []string{"name", "organization_id", "scopes", "ttl"} {
					if !regexp.MustCompile(`(?m)^` + name + `: \w`).MatchString(shown) {
						r.t.Errorf("the explorer describes no parameter %q:\n%s", name, shown)
					}
				}
			},
		},
	})

	// The alert begins two weeks before the date, for key 1 alone. The clock of promtool begins at 0, so the key is due
	// on day 20.
	page := readFile(t, "../docs/recipes.md")
	rule := regexp.MustCompile("(?s)```yaml name=due-alert\n(.*?)```").FindStringSubmatch(page)
	due := strconv.FormatInt(time.Date(2027, time.February, 1, 0, 0, 0, 0, time.UTC).Unix(), 10)
	if rule == nil || !strings.Contains(rule[1], due) {
		t.Fatalf("no alert with the date: %q", rule)
	}
	r.write("rules.yml", strings.ReplaceAll(rule[1], due, "20 * 86400"))
	r.write("test.yml", `
rule_files: [rules.yml]
evaluation_interval: 1h
tests:
  - interval: 1d
    input_series:
      - {series: 'vault_cable_refresh_key_version{mount="cable"}', values: '1x8 2x4'}
      - {series: 'vault_cable_refresh_key_version{mount="cable-eu"}', values: '1x12'}
    promql_expr_test:
      - {expr: 'count by (mount) (ALERTS{alertname="CableKeyDue"})', eval_time: 5d}
      - {expr: 'count by (mount) (ALERTS{alertname="CableKeyDue"})', eval_time: 7d,
         exp_samples: [{labels: '{mount="cable"}', value: 1}]}
      - {expr: 'count by (mount) (ALERTS{alertname="CableKeyDue"})', eval_time: 10d}
`)
	if out, err := exec.Command(promtool, "test", "rules", r.place("test.yml")).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// knowsAna makes an entity "ana" that logs in with a password.
func (r *runbook) knowsAna() {
	r.t.Helper()
	r.ok("POST", "sys/auth/userpass", map[string]any{"type": "userpass"})
	r.ok("POST", "auth/userpass/users/ana", map[string]any{"password": "p"})
	id := r.ok("POST", "identity/entity", map[string]any{"name": "ana"}).Data["id"]
	accessor := r.ok("GET", "sys/auth/userpass", nil).Data["accessor"]
	r.ok("POST", "identity/entity-alias", map[string]any{"name": "ana", "canonical_id": id, "mount_accessor": accessor})
}

// allows checks whether Vault's policy allows a request with this token.
func (r *runbook) allows(token, method, path string, body map[string]any, want bool) {
	r.t.Helper()
	a := r.v.as(r.t, token, method, path, body)
	if allowed := a.status == 200; allowed != want || !allowed && a.status != 403 {
		r.t.Errorf("%s %s %v: %s, want it allowed: %t", method, path, body, a, want)
	}
}
