// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/vaulttest"
)

// findJQ is where jq is: on PATH, else the one that tools/jq pins.
var findJQ = sync.OnceValues(func() (string, error) {
	if path, err := exec.LookPath("jq"); err == nil {
		return path, nil
	}
	dir, err := findTool("jq")
	return filepath.Join(dir, "gojq"), err
})

// runbook is a server with a stand-in for Cable, and somebody who follows the
// runbook.
type runbook struct {
	*shell
	v     *vaultServer
	cable *standInCable
}

// newRunbook starts a server on integrated storage with an empty plugin folder,
// and without the plugin.
func newRunbook(t *testing.T) *runbook {
	t.Helper()
	needVault(t)
	jq, err := findJQ()
	if err != nil {
		skipUnlessRequired(t, err)
	}
	r := &runbook{cable: newStandInCable(t)}
	dir := t.TempDir()
	r.v = &vaultServer{plugins: filepath.Join(dir, "plugins"), env: r.cable.env}
	if err := os.Mkdir(r.v.plugins, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := r.v.start(dir, &vaulttest.Raft{Dir: filepath.Join(dir, "raft")}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.v.stop)
	watch(t, r.v)
	r.shell = newShell(t, r.v, map[string]string{"jq": jq, "curl": r.cable.curl(t)})
	r.edit = strings.NewReplacer("/etc/vault/plugins", r.v.plugins,
		"/var/log/vault/audit.log", r.v.audit, "/var/log/vault/vault.log", r.v.log)
	return r
}

// hasBinary puts a plugin into the folder of whoever installs it.
func (r *runbook) hasBinary(from vaulttest.Plugin) {
	r.t.Helper()
	_ = os.Remove(r.place(pluginName))
	if err := os.Link(from.File, r.place(pluginName)); err != nil {
		r.t.Fatal(err)
	}
}

// hasNewKey has Cable replace the refresh key by another, in new-refresh-key.txt.
func (r *runbook) hasNewKey() {
	r.t.Helper()
	r.cable.SetRefreshKey(cabletest.NewRefreshKey())
	r.write("new-refresh-key.txt", r.cable.RefreshKey()+"\n")
}

// read requests a token, which may fail.
func (r *runbook) read() *answer {
	r.t.Helper()
	return r.v.do(r.t, "GET", "cable/creds/reports", nil)
}

// mints reports whether a token can be requested.
func (r *runbook) mints(when string) {
	r.t.Helper()
	if a := r.read(); a.status != 200 {
		r.t.Errorf("%s: %s", when, a)
	}
}

// field is a field of a path below cable/.
func (r *runbook) field(path, key string) string {
	r.t.Helper()
	return fmt.Sprint(r.v.ok(r.t, "GET", "cable/"+path, nil).Data[key])
}

// installed is the plugin's file in the server's plugin folder.
func (r *runbook) installed(version string) string {
	return filepath.Join(r.v.plugins, pluginName+"-"+version)
}

// sealAndUnseal sets up all mounts again, as a restart or a failover does.
func (r *runbook) sealAndUnseal() {
	r.t.Helper()
	r.v.ok(r.t, "PUT", "sys/seal", nil)
	if err := r.v.Unseal(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
	r.untilActive()
}

// untilActive waits until the server is active, and serves requests: a standby
// of OpenBao serves reads, too.
func (r *runbook) untilActive() {
	r.t.Helper()
	waitFor(r.t, 30*time.Second, "the server is active", func() bool {
		for _, path := range []string{"sys/health", "auth/token/lookup-self"} {
			if a, err := r.v.call(request{method: "GET", path: path, token: r.v.root}); err != nil || a.status != 200 {
				return false
			}
		}
		return true
	})
}

// cannotWrite checks that a write fails because the plugin did not start when the
// server was unsealed: until a step-down, also after a reload.
func (r *runbook) cannotWrite(command string) {
	r.t.Helper()
	out, err := r.try(command)
	if err == nil && suite.product.ReloadUnlocks() {
		return
	}
	if err == nil || !strings.Contains(out, "cannot write to storage during setup") {
		r.t.Errorf("a write before the step-down: %v\n%s", err, out)
	}
}

// TestRunbook runs each command of docs/runbook.md, in the order of the page,
// each in the situation that it is for, and checks what it has changed.
func TestRunbook(t *testing.T) {
	t.Parallel()
	r := newRunbook(t)
	next, err := nextPlugin()
	if err != nil {
		t.Fatal(err)
	}
	v := r.v
	tokenURL := "https://" + cableHost + "/v2/auth/token"
	minted := "Cable minted a token with these settings"
	validUntil := `may\s+be\s+valid\s+until\s+20`
	var lease, keyVersion string

	// isTuned and runs say which version the mount is set to, and which it runs.
	isTuned := func(version string) {
		t.Helper()
		if got := v.ok(t, "GET", "sys/mounts/cable", nil).Data["plugin_version"]; got != version {
			t.Errorf("the mount is set to %v, want %s", got, version)
		}
	}
	runs := func(version string) {
		t.Helper()
		if got := r.field("status", "version"); got != version {
			t.Errorf("the mount runs %s, want %s", got, version)
		}
		r.mints("with " + version)
	}
	// rotated checks that a rotation has stored the key that Cable now accepts.
	rotated := func(destination string) {
		t.Helper()
		if got := r.field("config", "refresh_key_version"); got == keyVersion {
			t.Errorf("refresh_key_version is still %s", got)
		}
		if got := r.field("config", "token_url"); got != destination {
			t.Errorf("token_url is %s, want %s", got, destination)
		}
		r.mints("after a rotation")
	}
	withdrawn := func() { // the key in use is refused from now on
		r.hasNewKey()
		keyVersion = r.field("config", "refresh_key_version")
	}
	failed := func(outcome string) {
		t.Helper()
		r.read()
		if got := r.field("status", "last_failure_outcome"); got != outcome {
			t.Errorf("last_failure_outcome is %s, want %s", got, outcome)
		}
	}
	// shares switches reuse on, and returns the token that the role's readers
	// then share.
	shares := func(reuseFor string) string {
		t.Helper()
		v.ok(t, "POST", "cable/roles/reports", map[string]any{"reuse_for": reuseFor})
		return r.read().token()
	}
	// fallsBack waits until readers get the previous token because of a fault.
	fallsBack := func(previous, outcome string) {
		t.Helper()
		waitFor(t, 10*time.Second, "readers get the previous token", func() bool {
			a := r.read()
			return a.token() == previous && strings.Contains(a.text, "Cable is down ("+outcome+")")
		})
	}
	mintsEach := func() { v.ok(t, "POST", "cable/roles/reports", map[string]any{"reuse_for": 0}) }
	var shared string
	disabled := func(path, want string) {
		t.Helper()
		if got := r.field(path, "disabled"); got != want {
			t.Errorf("disabled of %s is %s, want %s", path, got, want)
		}
		if a := r.read(); (a.status == 200) != (want == "false") {
			t.Errorf("with disabled=%s: %s", want, a)
		}
	}

	// NOTE: vault -field prints no newline if it does not write to a terminal.
	r.runPage("docs/runbook.md", map[string]step{
		"Install/1": {before: func() { r.hasBinary(suite.plugin) }},
		"Install/3": {
			want: []string{"Success! Registered plugin", "Success! Enabled", "Success! Tuned"},
			after: func(string) {
				if got := v.ok(t, "GET", "sys/mounts/cable", nil).Data["running_plugin_version"]; got != pluginVersion {
					t.Errorf("the mount runs %v", got)
				}
			},
		},
		"Configure/1": {
			before: func() { r.write("refresh-key.txt", r.cable.RefreshKey()+"\n") },
			want:   []string{minted},
			after: func(string) {
				if got := r.field("config", "token_url"); got != tokenURL {
					t.Errorf("token_url is %s", got)
				}
				r.mints("as configured")
			},
		},
		"Configure/2": {after: func(string) {
			if r.exists("refresh-key.txt") {
				t.Error("the key's file is still there")
			}
		}},
		"Verify/1": {want: []string{regexp.QuoteMeta(pluginVersion), `configured +true`, `lease_duration +14m5`, `last_mint_role +reports`}},

		"Upgrade/1": {fails: true, want: []string{"No value found at sys/plugins/pins/secret/" + pluginName}},
		"Upgrade/2": {before: func() { r.hasBinary(next); lease = r.read().LeaseID }},
		"Upgrade/3": {
			want:  []string{"Success! Registered plugin"},
			after: func(string) { runs(pluginVersion) },
		},
		"Upgrade/4": {
			want:  []string{`(?m)` + regexp.QuoteMeta(nextVersion) + `$`},
			after: func(string) { isTuned(nextVersion); runs(nextVersion) },
		},
		"Roll back/1": {
			before: func() {
				if out := r.run("vault plugin list secret"); !strings.Contains(out, pluginVersion) || !strings.Contains(out, nextVersion) {
					t.Errorf("the list of plugins has not both versions:\n%s", out)
				}
			},
			want: []string{`(?m)` + regexp.QuoteMeta(pluginVersion) + `$`},
			after: func(string) {
				isTuned(pluginVersion)
				runs(pluginVersion)
				v.ok(t, "PUT", "sys/leases/revoke", map[string]any{"lease_id": lease, "sync": true})
			},
		},
		"Pinned versions/1": {
			skip: lacks(vaulttest.PinnedVersions),
			before: func() {
				r.run(`vault write sys/plugins/pins/secret/` + pluginName + ` version="$previous"`)
				if out := r.run("vault read sys/plugins/pins/secret/" + pluginName); !strings.Contains(out, pluginVersion) {
					t.Errorf("the pin is not shown:\n%s", out)
				}
				if out, err := r.try(`vault secrets tune -plugin-version="$version" cable`); err == nil || !strings.Contains(out, "pinned version") {
					t.Errorf("with a pin, tune says %v:\n%s", err, out)
				}
			},
			want:  []string{`(?m)` + regexp.QuoteMeta(nextVersion) + `$`},
			after: func(string) { runs(nextVersion) },
		},
		"Pinned versions/2": {
			skip: lacks(vaulttest.PinnedVersions),
			want: []string{`(?m)` + regexp.QuoteMeta(pluginVersion) + `$`},
			after: func(string) {
				runs(pluginVersion)
				r.sealAndUnseal()
				runs(pluginVersion)
				v.ok(t, "DELETE", "sys/plugins/pins/secret/"+pluginName, nil)
			},
		},

		"Rotate the refresh key/1": {want: []string{`token_url +` + regexp.QuoteMeta(tokenURL), `(?m)^ca_cert +n/a$`}},
		"Rotate the refresh key/2": {
			before: func() {
				shared = shares("5m")
				if r.read().token() != shared {
					t.Error("the role's readers do not share a token")
				}
				withdrawn()
			},
			want: []string{minted},
			after: func(string) {
				rotated(tokenURL)
				if r.read().token() == shared {
					t.Error("a rotation did not drop the shared token")
				}
				mintsEach()
			},
		},
		"Rotate the refresh key/3": {
			before: func() { // the gateway has a root of its own
				v.ok(t, "POST", "cable/config", map[string]any{
					"refresh_key": r.cable.RefreshKey(), "token_url": "https://" + gatewayHost + "/v2/auth/token", "ca_cert": r.cable.gatewayCA,
				})
				r.write("gateway-ca.pem", r.cable.gatewayCA)
				withdrawn()
				if out, err := r.try("vault write cable/config refresh_key=@new-refresh-key.txt verify_role=reports"); err == nil || !strings.Contains(out, "token_url") {
					t.Errorf("a key without its destination: %v\n%s", err, out)
				}
			},
			want:  []string{minted, gatewayHost},
			after: func(string) { rotated("https://" + gatewayHost + "/v2/auth/token") },
		},
		"Rotate the refresh key/4": {
			want: []string{`^[1-9]\d*$`},
			after: func(out string) {
				if out != r.field("config", "refresh_key_version") || r.exists("new-refresh-key.txt") {
					t.Errorf("it printed %q, and the file is still there: %t", out, r.exists("new-refresh-key.txt"))
				}
				v.ok(t, "POST", "cable/config", map[string]any{"refresh_key": r.cable.RefreshKey(), "token_url": tokenURL, "ca_cert": ""})
			},
		},

		"Find the fault/1": {
			before: func() { r.read() },
			want:   []string{`Sealed +false`, `pause_seconds +0`, `last_mint_role +reports`, `token_requests +map\[`},
		},
		"Find the fault/2": {want: []string{`outcome="minted",role="reports"`, `max_lease_ttl +768h`}},

		"Which tokens are still valid/1": {
			before: func() {
				v.ok(t, "POST", "cable/roles/reports", map[string]any{"ttl": "20m"})
				r.read()
			},
			want: []string{`(?m)^expire_time .*$`},
		},
		"Which tokens are still valid/2": {after: func(string) {
			// Only from now on does the audit log show it.
			a := r.read()
			v.ok(t, "PUT", "sys/leases/revoke", map[string]any{"lease_id": a.LeaseID, "sync": true})
		}},
		"Which tokens are still valid/3": {
			want:  []string{cabletest.DefaultOrganizationID + `\ttransactions:read\t`},
			after: func(string) { testValidFromAudit(t, r) },
		},

		"The plugin does not start/1": {
			before: func() {
				if err := os.Rename(r.installed(pluginVersion), r.place("saved")); err != nil {
					t.Fatal(err)
				}
				r.run(`printf '#!/bin/sh\nexit 3\n' > ` + r.installed(pluginVersion) + ` && chmod +x ` + r.installed(pluginVersion))
				r.sealAndUnseal()
				if out, err := r.try("vault read cable/status"); err == nil || !strings.Contains(out, "No value found at cable/status") {
					t.Errorf("a plugin that did not start: %v\n%s", err, out)
				}
				if a := r.read(); a.status != 404 {
					t.Errorf("a plugin that did not start: %s", a)
				}
			},
			want: []string{`(?m)^cable/ `, "failed to create mount entry", "checksums did not match"},
		},
		"The plugin does not start/2": {
			before: func() {
				if err := os.Rename(r.place("saved"), r.installed(pluginVersion)); err != nil {
					t.Fatal(err)
				}
				if a := r.read(); a.status != 404 {
					t.Errorf("before the reload: %s", a)
				}
			},
			want: []string{`configured +true`},
			after: func(string) {
				r.mints("after the reload")
				r.cannotWrite("vault write cable/roles/reports ttl=15m")
			},
		},
		"The plugin does not start/3": {want: []string{"Success! Stepped down"}, after: func(string) { r.untilActive() }},
		"The plugin does not start/4": {want: []string{"Success! Data written"}, after: func(string) { r.mints("after the step-down") }},

		"The refresh key leaked/1": {want: []string{"the mount is disabled", validUntil}, after: func(string) { disabled("config", "true") }},
		"The refresh key leaked/2": {before: withdrawn, want: []string{`token_url +` + regexp.QuoteMeta(tokenURL)}},
		"The refresh key leaked/3": {
			want:  []string{minted, `(?m)^token `},
			after: func(string) { rotated(tokenURL); disabled("config", "false") },
		},

		"The destination is not Cable's/1": {
			before: func() {
				// Somebody who may update config, and does not know the key.
				v.ok(t, "PUT", "sys/policies/acl/editor", map[string]any{"policy": `path "cable/config" { capabilities = ["update"] }`})
				editor := v.ok(t, "POST", "auth/token/create", map[string]any{"policies": []string{"editor"}, "display_name": "mallory"}).Auth.ClientToken
				a, err := v.call(request{method: "POST", path: "cable/config", token: editor, body: map[string]any{
					"refresh_key": "made-up", "token_url": "https://" + thiefHost + "/v2/auth/token",
				}})
				if err != nil || a.status >= 300 {
					t.Fatalf("%s, %v", a, err)
				}
				failed("key_rejected")
				withdrawn()
				// What an operator may write who has not read config.
				for _, fields := range []string{"verify_role=reports", ""} {
					if out, err := r.try("vault write cable/config refresh_key=@new-refresh-key.txt " + fields); err == nil {
						t.Errorf("a key to a destination that was not named:\n%s", out)
					}
				}
			},
			want: []string{`update\trefresh_key,token_url\ttoken-mallory`},
		},
		"The destination is not Cable's/2": {
			want: []string{minted},
			after: func(string) {
				rotated(tokenURL)
				if r.cable.stolen(r.cable.RefreshKey()) {
					t.Error("the key came to the host of somebody else")
				}
			},
		},

		"A token leaked/1": {
			before: func() {
				shared = shares("2m")
				lease = r.read().LeaseID
				r.write("leaked-token.txt", shared+"\n")
			},
			want: []string{"cable/creds/reports"},
			after: func(out string) {
				contains(t, out, lease)
				if n := strings.Count(out, "\n"); n != 2 {
					t.Errorf("%d readers had the token, want 2:\n%s", n, out)
				}
				v.ok(t, "PUT", "sys/leases/revoke-prefix/cable/creds/reports", map[string]any{"sync": true})
				if r.read().token() != shared {
					t.Error("the end of the leases dropped the shared token")
				}
			},
		},
		"A token leaked/2": {after: func(string) {
			if a := r.read(); a.status != 200 || a.token() == shared {
				t.Errorf("status %d; the leaked token is still returned: %t", a.status, a.token() == shared)
			}
		}},
		"A token leaked/3": {want: []string{"the role is disabled", validUntil}, after: func(string) { disabled("roles/reports", "true") }},
		"A token leaked/4": {after: func(string) {
			disabled("roles/reports", "false")
			if got := r.read().LeaseDuration; got > 300 {
				t.Errorf("the lease is for %ds", got)
			}
			mintsEach()
		}},

		"Cable responds 401/1": {
			before: func() { withdrawn(); failed("key_rejected") },
			want:   []string{`auth_scheme +raw`, `token_url +` + regexp.QuoteMeta(tokenURL)},
		},
		"Cable responds 401/2": {want: []string{minted}, after: func(string) { rotated(tokenURL) }},

		"Cable responds 429/1": {
			before: func() {
				r.cable.SetFault(cabletest.Fault{Status: 429, Times: 1, Header: map[string]string{"Retry-After": "25"}})
				failed("rate_limited")
			},
			want: []string{`(?m)^2\d`, `outcome="rate_limited",role="reports"} 1`, `vault_cable_pauses_total 1`},
		},
		"Cable responds 429/2": {after: func(string) {
			withdrawn() // starts without the pause
			v.ok(t, "POST", "cable/config", map[string]any{"refresh_key": r.cable.RefreshKey()})
			if got := r.read().LeaseDuration; got < 3500 {
				t.Errorf("the lease is for %ds", got)
			}
		}},
		"Cable responds 429/3": {after: func(string) {
			calls := r.cable.CallCount()
			first, second := r.read().token(), r.read().token()
			if first != second || r.cable.CallCount() != calls+1 {
				t.Errorf("two readers, %d API calls", r.cable.CallCount()-calls)
			}
			shared = shares("1s")
			r.cable.SetFault(cabletest.Fault{Status: 429, Times: 1, Header: map[string]string{"Retry-After": "25"}})
			fallsBack(shared, "rate_limited")
			withdrawn() // starts without the pause
			v.ok(t, "POST", "cable/config", map[string]any{"refresh_key": r.cable.RefreshKey()})
		}},

		"Cable responds 5xx or cannot be reached/1": {
			before: func() {
				shared = shares("1s")
				r.cable.SetFault(cabletest.Fault{Status: 500})
				fallsBack(shared, "cable_error")
			},
			want: []string{`map\[reports:cable_error\]`, `vault_cable_reuse_fallbacks_total\{cause="cable_error"\} [1-9]`},
			after: func(string) {
				if a := v.do(t, "POST", "cable/config", map[string]any{"request_timeout": 11, "verify_role": "reports"}); a.status != 502 {
					t.Errorf("a write with verify_role while Cable is down: %s", a)
				}
				fallsBack(shared, "cable_error")
				v.ok(t, "POST", "cable/config", map[string]any{"request_timeout": 20})
				if a := r.read(); a.status != 502 {
					t.Errorf("after a write without it: status %d", a.status)
				}
				r.cable.ClearFaults()
				mintsEach()
			},
		},
		"Cable responds 5xx or cannot be reached/2": {want: []string{"(?m)^cable_error401$"}},
		"Cable responds 5xx or cannot be reached/3": {want: []string{"(?m)^vault_cable_undelivered_tokens_total [1-9]", "undelivered_until=20"}},

		"Cable's response was refused/1": {
			before: func() {
				r.cable.SetFault(cabletest.Fault{Times: 1, Grant: &cabletest.Grant{Scopes: &[]string{"everything:write"}}})
				failed("grant_mismatch")
			},
			want: []string{"everything:write", `requested_scopes=\[?"?transactions:read`},
		},
		"Cable's response was refused/2": {want: []string{"the role is disabled"}, after: func(string) { disabled("roles/reports", "true") }},
		"Cable's response was refused/3": {after: func(string) { disabled("roles/reports", "false") }},

		"Vault was sealed/1": {
			before: func() {
				lifetime := 7 * time.Second
				r.cable.SetFault(cabletest.Fault{Times: 1, Grant: &cabletest.Grant{Lifetime: &lifetime}})
				a := r.read()
				lease = a.LeaseID
				v.ok(t, "PUT", "sys/seal", nil)
				r.write("unseal-key.txt", v.Key+"\n")
				expiry := time.Unix(a.number("expiry"), 0)
				waitFor(t, 20*time.Second, "the token expires", func() bool { return time.Now().After(expiry) })
			},
			want:  []string{`Sealed +false`},
			after: func(string) { r.untilActive() },
		},
		"Vault was sealed/2": {
			want: []string{`(?m)^true`, `(?m)^token `, `(?m)^0$`},
			after: func(string) {
				waitFor(t, 20*time.Second, "the lease ends", func() bool {
					return v.do(t, "PUT", "sys/leases/lookup", map[string]any{"lease_id": lease}).status == 400
				})
			},
		},

		// Nobody has found one: the log has no such line.
		"Internal error/1": {fails: true, want: []string{"(?m)^vault_cable_panics_total 0$"}},

		"Limit the readers/1": {after: func(string) { testQuotas(t, r) }},

		"Scrape the metrics/1": {
			want: []string{"Success! Uploaded policy", `(?m)^vault_cable_build_info\{.*version="` + pluginVersion + `"\} 1$`},
			after: func(string) {
				token := strings.TrimSpace(readFile(t, r.place("metrics-token")))
				if a, err := v.call(request{method: "GET", path: "cable/status", token: token}); err != nil || a.status != 403 {
					t.Errorf("the token for the metrics reads status: %s, %v", a, err)
				}
			},
		},
		"Scrape the metrics/2": {
			before: func() {
				if out, err := r.try("vault read cable/metrics"); err == nil || !strings.Contains(out, "invalid character '#'") {
					t.Errorf("without -format=raw: %v\n%s", err, out)
				}
			},
			want: []string{"(?m)^# TYPE vault_cable_token_requests_total counter$"},
		},
	})
}

// contains fails the test if text does not have part.
func contains(t *testing.T, text, part string) {
	t.Helper()
	if !strings.Contains(text, part) {
		t.Errorf("there is no %q in:\n%s", part, text)
	}
}

// testQuotas checks what the runbook says of rate-limit quotas, after its two
// were written: which paths limit which reads.
func testQuotas(t *testing.T, r *runbook) {
	t.Helper()
	limited := func(path string) bool {
		t.Helper()
		n := 0
		for range 3 {
			if a := r.v.do(t, "GET", path, nil); a.status == 429 {
				n++
			}
		}
		return n > 0
	}
	r.v.ok(t, "POST", "cable/roles/other", map[string]any{"scopes": "person:read", "organization_id": cabletest.DefaultOrganizationID})
	for _, q := range []string{"cable-reports", "cable"} {
		if a := r.v.ok(t, "GET", "sys/quotas/rate-limit/"+q, nil); a.Data["path"] != map[string]string{"cable-reports": "cable/creds/reports", "cable": "cable/creds/*"}[q] {
			t.Errorf("the quota %s is %s", q, a)
		}
		r.v.ok(t, "DELETE", "sys/quotas/rate-limit/"+q, nil)
	}
	for _, tt := range []struct {
		path                   string
		reports, other, status bool
	}{
		{"cable/creds", false, false, false},
		{"cable/creds/", false, false, false},
		{"cable/creds/reports", true, false, false},
		{"cable/creds/*", true, true, false},
		{"cable/", true, true, true},
	} {
		r.v.ok(t, "POST", "sys/quotas/rate-limit/tried", map[string]any{"path": tt.path, "rate": 1, "interval": "1m"})
		// The counters of a quota are by client, for all its paths: each read starts with a new one.
		got := [3]bool{}
		for i, path := range []string{"cable/creds/reports", "cable/creds/other", "cable/status"} {
			got[i] = limited(path)
			r.v.ok(t, "DELETE", "sys/quotas/rate-limit/tried", nil)
			r.v.ok(t, "POST", "sys/quotas/rate-limit/tried", map[string]any{"path": tt.path, "rate": 1, "interval": "1m"})
		}
		r.v.ok(t, "DELETE", "sys/quotas/rate-limit/tried", nil)
		if want := [3]bool{tt.reports, tt.other, tt.status}; got != want {
			t.Errorf("path=%s limits reports, other, status: %v, want %v", tt.path, got, want)
		}
	}
	// The most specific quota counts, and no other.
	r.v.ok(t, "POST", "sys/quotas/rate-limit/wide", map[string]any{"path": "cable/creds/*", "rate": 1, "interval": "1m"})
	r.v.ok(t, "POST", "sys/quotas/rate-limit/narrow", map[string]any{"path": "cable/creds/reports", "rate": 100, "interval": "1m"})
	if limited("cable/creds/reports") || !limited("cable/creds/other") {
		t.Error("the most specific quota is not the one that counts")
	}
	for _, q := range []string{"wide", "narrow"} {
		r.v.ok(t, "DELETE", "sys/quotas/rate-limit/"+q, nil)
	}
}

// TestFailedReload: an upgrade whose file is missing leaves the old version at
// work, and loses the mount at the next restart, unless it is rolled back as the
// runbook says. The same with a pin.
func TestFailedReload(t *testing.T) {
	t.Parallel()
	r := newRunbook(t)
	next, err := nextPlugin()
	if err != nil {
		t.Fatal(err)
	}
	blocks := map[string]string{}
	for _, b := range blocksOf(t, "docs/runbook.md") {
		blocks[strings.TrimPrefix(b.id, "docs/runbook.md#")] = b.text
	}
	reload, _, _ := strings.Cut(blocks["Upgrade/4"], "vault read")
	serves := func(status int) {
		t.Helper()
		if a := r.v.do(t, "GET", "cable/status", nil); a.status != status || status == 200 && a.Data["version"] != pluginVersion {
			t.Errorf("%s, want %d", a, status)
		}
	}

	r.hasBinary(suite.plugin)
	r.run(blocks["Install/1"] + blocks["Install/3"])
	r.hasBinary(next)
	r.run(blocks["Upgrade/2"] + blocks["Upgrade/3"])
	if err := os.Remove(r.installed(nextVersion)); err != nil {
		t.Fatal(err)
	}
	if out, err := r.try(reload); err == nil || !strings.Contains(out, "no such file or directory") {
		t.Errorf("the reload: %v\n%s", err, out)
	}
	serves(200)
	r.run(blocks["Roll back/1"])
	r.sealAndUnseal()
	serves(200)

	// What happens without it; rolling back later takes a step-down, too.
	if out, err := r.try(reload); err == nil {
		t.Errorf("the reload succeeds:\n%s", out)
	}
	r.sealAndUnseal()
	serves(404)
	r.run(blocks["Roll back/1"])
	serves(200)
	r.cannotWrite("vault write cable/roles/reports scopes=person:read")
	r.run(blocks["The plugin does not start/3"])
	r.untilActive()
	r.run("vault write cable/roles/reports scopes=person:read")

	if reason := lacks(vaulttest.PinnedVersions); reason != "" {
		t.Run("with a pin", func(t *testing.T) { t.Skip(reason) })
		return
	}
	r.run("vault write sys/plugins/pins/secret/" + pluginName + ` version="$version"`)
	if out, err := r.try("vault plugin reload -plugin=" + pluginName + " -scope=global"); err == nil {
		t.Errorf("the reload succeeds:\n%s", out)
	}
	r.run(blocks["Pinned versions/2"])
	r.sealAndUnseal()
	serves(200)
}

// testValidFromAudit runs the page's search of the audit log for different
// times, and compares with what is known of each token: those that were valid
// then, their leases revoked or not, and no other.
func testValidFromAudit(t *testing.T, r *runbook) {
	t.Helper()
	var command string
	for _, b := range blocksOf(t, "docs/runbook.md") {
		if strings.HasPrefix(b.text, "jq -r --arg path") {
			command = b.text
		}
	}
	valid := func(at time.Time) string {
		t.Helper()
		return r.run(strings.Replace(command, `"$(date -u +%FT%TZ)"`, at.UTC().Format(time.RFC3339), 1))
	}
	r.v.ok(t, "POST", "cable/roles/other", map[string]any{"scopes": "person:read", "organization_id": cabletest.DefaultOrganizationID})
	r.v.ok(t, "GET", "cable/creds/other", nil)
	a := r.v.ok(t, "GET", "cable/creds/reports?ttl=10m", nil)
	r.v.ok(t, "PUT", "sys/leases/revoke", map[string]any{"lease_id": a.LeaseID, "sync": true})
	expiresAt := a.Data["expires_at"].(string)
	expiry := time.Unix(a.number("expiry"), 0)

	line := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(expiresAt+"\t"+cabletest.DefaultOrganizationID+"\ttransactions:read\troot\t\t{}\t127.0.0.1\t"+a.LeaseID) + `$`)
	for _, tt := range []struct {
		at   time.Time
		want bool
	}{{time.Now().Add(time.Second), true}, {expiry.Add(-time.Second), true}, {expiry.Add(time.Second), false}, {time.Now().Add(-time.Hour), false}} {
		out := valid(tt.at)
		if got := line.MatchString(out); got != tt.want {
			t.Errorf("the token that is valid until %s, at %s: listed %t, want %t\n%s", expiresAt, tt.at.UTC().Format(time.RFC3339), got, tt.want, out)
		}
		if strings.Contains(out, "creds/other") {
			t.Errorf("tokens of another role are listed:\n%s", out)
		}
	}
	if secret := findSecret(valid(time.Now()), false); secret != "" {
		t.Errorf("the list holds %s", secret)
	}
}
