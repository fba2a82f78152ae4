// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/vaulttest"
)

// findJQ finds jq on PATH, or else the one that tools/jq pins.
var findJQ = sync.OnceValues(func() (string, error) {
	if path, err := exec.LookPath("jq"); err == nil {
		return path, nil
	}
	dir, err := findTool("jq")
	return filepath.Join(dir, "gojq"), err
})

// needJQ is findJQ for a test that cannot do without.
func needJQ(t *testing.T) (path string) {
	t.Helper()
	path, err := findJQ()
	if err != nil {
		skipUnlessRequired(t, err)
	}
	return path
}

// runbook is a server with a stand-in for Cable, and an operator who follows the
// runbook.
type runbook struct {
	*shell
	v     *vaultServer
	cable *standInCable

	lease, shared, keyVersion string // from one step to the next
}

// newRunbook starts a server on integrated storage with an empty plugin folder,
// and without the plugin. config is added to the server's configuration.
func newRunbook(t *testing.T, config ...string) *runbook {
	t.Helper()
	needVault(t)
	jq := needJQ(t)
	r := &runbook{cable: newStandInCable(t)}
	dir := t.TempDir()
	r.v = &vaultServer{plugins: filepath.Join(dir, "plugins"), env: r.cable.env, config: strings.Join(config, "\n")}
	noError(t, os.Mkdir(r.v.plugins, 0o700))
	noError(t, r.v.start(dir, &vaulttest.Raft{Dir: filepath.Join(dir, "raft")}))
	t.Cleanup(r.v.stop)
	watch(t, r.v)
	r.shell = newShell(t, r.v, map[string]string{"jq": jq, "curl": r.cable.curl(t)})
	r.edit = strings.NewReplacer("/etc/vault/plugins", r.v.plugins,
		"/var/log/vault/audit.log", r.v.audit, "/var/log/vault/vault.log", r.v.log)
	return r
}

// hasBinary puts a plugin into the folder of the operator who installs it.
func (r *runbook) hasBinary(from vaulttest.Plugin) {
	r.t.Helper()
	_ = os.Remove(r.place(pluginName))
	noError(r.t, os.Link(from.File, r.place(pluginName)))
}

// installs runs the named blocks up to a mount that is configured.
func (r *runbook) installs() {
	r.t.Helper()
	r.hasBinary(suite.plugin)
	r.write("refresh-key.txt", r.cable.RefreshKey()+"\n")
	r.block("install", "register", "configure")
}

// block runs blocks of the runbook, which must succeed.
func (r *runbook) block(names ...string) (out string) {
	r.t.Helper()
	texts := named(r.t, "docs/runbook.md")
	for _, name := range names {
		out += r.run(texts[name])
	}
	return out
}

// ok sends a request that must succeed.
func (r *runbook) ok(method, path string, body map[string]any) *response {
	r.t.Helper()
	return r.v.ok(r.t, method, path, body)
}

// set writes fields of cable/config or of a role.
func (r *runbook) set(path string, fields map[string]any) {
	r.t.Helper()
	r.ok("POST", "cable/"+path, fields)
}

// read requests a token, which may fail.
func (r *runbook) read() *response {
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
	return fmt.Sprint(r.ok("GET", "cable/"+path, nil).Data[key])
}

// is checks a field of a path below cable/.
func (r *runbook) is(path, key, want string) {
	r.t.Helper()
	if got := r.field(path, key); got != want {
		r.t.Errorf("%s of cable/%s is %s, want %s", key, path, got, want)
	}
}

// refuses checks that a command fails with a text.
func (r *runbook) refuses(command, text string) {
	r.t.Helper()
	if out, err := r.try(command); err == nil || !strings.Contains(out, text) {
		r.t.Errorf("%s: %v, want a failure with %q:\n%s", command, err, text, out)
	}
}

// installed is the plugin's file in the server's plugin folder.
func (r *runbook) installed(version string) string {
	return filepath.Join(r.v.plugins, pluginName+"-"+version)
}

// runs checks which version the mount runs.
func (r *runbook) runs(version string) {
	r.t.Helper()
	r.is("status", "version", version)
	r.mints("with " + version)
}

// isTuned checks which version the mount is set to, and that it runs that.
func (r *runbook) isTuned(version string) {
	r.t.Helper()
	if got := r.ok("GET", "sys/mounts/cable", nil).Data["plugin_version"]; got != version {
		r.t.Errorf("the mount is set to %v, want %s", got, version)
	}
	r.runs(version)
}

// withdrawn has Cable refuse the key in use from now on, for the one in
// new-refresh-key.txt.
func (r *runbook) withdrawn() {
	r.t.Helper()
	r.cable.SetRefreshKey(cabletest.NewRefreshKey())
	r.write("new-refresh-key.txt", r.cable.RefreshKey()+"\n")
	r.keyVersion = r.field("config", "refresh_key_version")
}

// rotated checks that a rotation has stored the key that Cable now accepts.
func (r *runbook) rotated(host string) {
	r.t.Helper()
	if got := r.field("config", "refresh_key_version"); got == r.keyVersion {
		r.t.Errorf("refresh_key_version is still %s", got)
	}
	r.is("config", "token_url", tokenURL(host))
	r.mints("after a rotation")
}

// failed checks with which outcome a token request fails.
func (r *runbook) failed(outcome string) {
	r.t.Helper()
	r.read()
	r.is("status", "last_failure_outcome", outcome)
}

// shares switches reuse on and notes the token that the role's readers share.
func (r *runbook) shares(reuseFor string) {
	r.t.Helper()
	r.set("roles/reports", map[string]any{"reuse_for": reuseFor})
	r.shared = r.read().token()
}

// mintsEach switches reuse off.
func (r *runbook) mintsEach() { r.set("roles/reports", map[string]any{"reuse_for": 0}) }

// fallsBack waits until readers get the previous token because of a fault.
func (r *runbook) fallsBack(outcome string) {
	r.t.Helper()
	waitFor(r.t, 10*time.Second, "readers get the previous token", func() bool {
		a := r.read()
		return a.token() == r.shared && strings.Contains(a.text, "Cable is down ("+outcome+")")
	})
}

// disabled checks whether config or a role is disabled, and that this holds.
func (r *runbook) disabled(path string, want bool) {
	r.t.Helper()
	r.is(path, "disabled", fmt.Sprint(want))
	if a := r.read(); (a.status == 200) == want {
		r.t.Errorf("with disabled=%t: %s", want, a)
	}
}

// breakPlugin replaces the installed file by another until mend is called, and
// has the server set up its mounts with it.
func (r *runbook) breakPlugin() (mend func()) {
	r.t.Helper()
	file, saved := r.installed(pluginVersion), r.place("saved")
	noError(r.t, os.Rename(file, saved))
	writeScript(r.t, file, "exit 3")
	r.sealAndUnseal()
	return func() {
		r.t.Helper()
		noError(r.t, os.Rename(saved, file))
	}
}

// sealAndUnseal sets up all mounts again, as a restart or a failover does.
func (r *runbook) sealAndUnseal() {
	r.t.Helper()
	r.ok("PUT", "sys/seal", nil)
	noError(r.t, r.v.Unseal(r.t.Context()))
	r.untilActive()
}

// untilActive waits until the server is active and serves requests. OpenBao serves
// reads before it is active.
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
// server was unsealed, even after a reload.
func (r *runbook) cannotWrite(command string) {
	r.t.Helper()
	if suite.product.ReloadUnlocks() {
		return
	}
	r.refuses(command, "cannot write to storage during setup")
}

// expires reads a token of 7 seconds, and returns a function that waits until it
// has expired.
func (r *runbook) expires() (wait func()) {
	r.t.Helper()
	r.cable.SetFault(cabletest.Fault{Times: 1, Grant: &cabletest.Grant{Lifetime: ptr(7 * time.Second)}})
	a := r.read()
	r.lease = a.LeaseID
	return func() {
		r.t.Helper()
		expiry := time.Unix(a.number("expiry"), 0)
		waitFor(r.t, 20*time.Second, "the token expires", func() bool { return time.Now().After(expiry) })
	}
}

// tokenURL is the token endpoint of a host.
func tokenURL(host string) string { return "https://" + host + "/v2/auth/token" }

// Texts that several commands print.
const (
	verified   = "Cable minted a token with these settings"
	validUntil = `may\s+be\s+valid\s+until\s+20`
)

// runbookParts are the steps of docs/runbook.md, in parts that can be run alone, each
// on a server of its own with the plugin installed and configured.
//
// NOTE: vault -field prints no newline if it does not write to a terminal.
var runbookParts = map[string]func(*runbook) map[string]step{
	"install": (*runbook).installSteps,
	"upgrade": (*runbook).upgradeSteps,
	"key":     (*runbook).keySteps,
	"tokens":  (*runbook).tokenSteps,
	"cable":   (*runbook).cableSteps,
	"vault":   (*runbook).vaultSteps,
	"monitor": (*runbook).monitorSteps,
}

// TestRunbook runs each command of docs/runbook.md in the situation that it is
// for, and checks its effect.
func TestRunbook(t *testing.T) {
	t.Parallel()
	needVault(t)
	all := map[string]step{}
	for name, steps := range runbookParts {
		maps.Copy(all, steps(new(runbook)))
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRunbook(t, map[string]string{"cable": "default_max_request_duration = \"7s\""}[name])
			if name != "install" {
				r.installs()
			}
			r.runSteps("docs/runbook.md", steps(r))
		})
	}
	checkSteps(t, "docs/runbook.md", all)
}

func (r *runbook) installSteps() map[string]step {
	calls := 0
	return map[string]step{
		"install": {
			before: func() { r.hasBinary(suite.plugin) },
			after: func(string) {
				info, err := os.Stat(r.installed(pluginVersion))
				if err != nil || info.Mode().Perm() != 0o755 {
					r.t.Errorf("the installed file: %v, %v", info, err)
				}
			},
		},
		"register": {
			want: []string{"Success! Registered plugin", "Success! Enabled", "Success! Tuned"},
			after: func(string) {
				if got := r.ok("GET", "sys/mounts/cable", nil).Data["running_plugin_version"]; got != pluginVersion {
					r.t.Errorf("the mount runs %v", got)
				}
			},
		},
		"configure": {
			before: func() { r.write("refresh-key.txt", r.cable.RefreshKey()+"\n") },
			want:   []string{verified},
			after: func(string) {
				r.is("config", "token_url", tokenURL(cableHost))
				r.mints("as configured")
			},
		},
		"delete-key-file": {after: func(string) {
			if r.exists("refresh-key.txt") {
				r.t.Error("the key's file is still there")
			}
		}},
		"verify": {before: func() { calls = r.cable.CallCount() }, want: []string{
			regexp.QuoteMeta(pluginVersion), `configured +true`, `allowed +true`, `max_ttl_from +`,
		}, after: func(string) {
			if n := r.cable.CallCount(); n != calls {
				r.t.Errorf("%d calls to Cable", n-calls)
			}
		}},
	}
}

func (r *runbook) upgradeSteps() map[string]step {
	prints := func(version string) []string { return []string{`(?m)` + regexp.QuoteMeta(version) + `$`} }
	return map[string]step{
		"pinned": {fails: true, want: []string{"No value found at sys/plugins/pins/secret/" + pluginName}},
		"install-next": {before: func() {
			r.lease = r.read().LeaseID
			r.testStopsBeforeItOverwrites()
			r.hasBinary(mustNext(r.t))
		}},
		"register-next": {
			want:  []string{"Success! Registered plugin"},
			after: func(string) { r.runs(pluginVersion) },
		},
		"upgrade": {
			before: r.testFailedReload,
			want:   prints(nextVersion),
			after:  func(string) { r.isTuned(nextVersion) },
		},
		"roll-back": {
			before: func() {
				list := r.run("vault plugin list secret")
				contains(r.t, list, pluginVersion)
				contains(r.t, list, nextVersion)
			},
			want: prints(pluginVersion),
			after: func(string) {
				r.isTuned(pluginVersion)
				r.ok("PUT", "sys/leases/revoke", map[string]any{"lease_id": r.lease, "sync": true})
			},
		},
		"pin": {
			skip: lacks(vaulttest.PinnedVersions),
			before: func() {
				r.run(`vault write sys/plugins/pins/secret/` + pluginName + ` version="$previous"`)
				contains(r.t, r.run("vault read sys/plugins/pins/secret/"+pluginName), pluginVersion)
				r.refuses(`vault secrets tune -plugin-version="$version" cable`, "pinned version")
			},
			want:  prints(nextVersion),
			after: func(string) { r.runs(nextVersion) },
		},
		"unpin": {
			skip: lacks(vaulttest.PinnedVersions),
			before: func() {
				r.run("rm " + r.installed(nextVersion))
				r.refuses("vault plugin reload -plugin="+pluginName+" -scope=global", "no such file or directory")
			},
			want: prints(pluginVersion),
			after: func(string) {
				r.runs(pluginVersion)
				r.sealAndUnseal()
				r.runs(pluginVersion)
			},
		},
	}
}

// testStopsBeforeItOverwrites installs another build of the running version.
func (r *runbook) testStopsBeforeItOverwrites() {
	r.t.Helper()
	before := readFile(r.t, r.installed(pluginVersion))
	r.run("rm -f " + pluginName + " && cp " + suite.plugin.File + " . && echo another build >> " + pluginName)
	r.refuses(named(r.t, "docs/runbook.md")["install-next"], pluginVersion)
	if readFile(r.t, r.installed(pluginVersion)) != before {
		r.t.Error("the running version's file was overwritten")
	}
}

// testFailedReload shows that an upgrade whose file is missing leaves the old version
// running, and loses the mount at the next restart, unless it is rolled back as the
// runbook says; later, that takes a step-down, too.
func (r *runbook) testFailedReload() {
	r.t.Helper()
	file := r.installed(nextVersion)
	r.run("mv " + file + " saved")
	reload, _, _ := strings.Cut(named(r.t, "docs/runbook.md")["upgrade"], "vault read")
	r.refuses(reload, "no such file or directory")
	r.runs(pluginVersion)
	r.block("roll-back")
	r.sealAndUnseal()
	r.runs(pluginVersion)

	r.refuses(reload, "no such file or directory")
	r.sealAndUnseal()
	if a := r.v.do(r.t, "GET", "cable/status", nil); a.status != 404 {
		r.t.Errorf("an upgrade that was not rolled back, after a restart: %s", a)
	}
	r.block("roll-back")
	r.runs(pluginVersion)
	r.cannotWrite("vault write cable/roles/reports ttl=15m")
	r.block("step-down")
	r.untilActive()
	r.block("write-again")
	r.run("mv saved " + file)
}

func (r *runbook) keySteps() map[string]step {
	return map[string]step{
		"destination": {want: []string{
			`token_url +` + regexp.QuoteMeta(tokenURL(cableHost)), `(?m)^ca_cert +n/a$`, `auth_scheme +raw`,
		}},
		"rotate": {
			before: func() {
				if r.shares("5m"); r.read().token() != r.shared {
					r.t.Error("the role's readers do not share a token")
				}
				r.withdrawn()
			},
			want: []string{verified},
			after: func(string) {
				r.rotated(cableHost)
				if r.read().token() == r.shared {
					r.t.Error("a rotation did not drop the shared token")
				}
				r.mintsEach()
			},
		},
		"rotate-gateway": {
			before: func() { // the gateway has a root of its own
				r.set("config", map[string]any{
					"refresh_key": r.cable.RefreshKey(),
					"token_url":   tokenURL(gatewayHost),
					"ca_cert":     r.cable.gatewayCA,
				})
				r.write("gateway-ca.pem", r.cable.gatewayCA)
				r.withdrawn()
				r.refuses("vault write cable/config refresh_key=@new-refresh-key.txt verify_role=reports", "token_url")
			},
			want:  []string{verified, gatewayHost},
			after: func(string) { r.rotated(gatewayHost) },
		},
		"rotated": {
			want: []string{`^[1-9]\d*$`},
			after: func(out string) {
				if r.is("config", "refresh_key_version", out); r.exists("new-refresh-key.txt") {
					r.t.Error("the key's file is still there")
				}
				r.set("config", map[string]any{
					"refresh_key": r.cable.RefreshKey(), "token_url": tokenURL(cableHost), "ca_cert": "",
				})
			},
		},
		"stop-all": {
			want:  []string{"the mount is disabled", validUntil},
			after: func(string) { r.disabled("config", true) },
		},
		"allow-all": {after: func(string) { r.disabled("config", false) }},
		"key-replaced": {
			before: func() { r.set("config", map[string]any{"disabled": true}); r.withdrawn() },
			want:   []string{verified, `allowed +true`},
			after:  func(string) { r.rotated(cableHost); r.disabled("config", false) },
		},
		"who-wrote-config": {
			before: func() {
				// An editor who may update config, and does not know the key.
				r.v.writePolicy(r.t, "editor", `path "cable/config" { capabilities = ["update"] }`)
				editor := r.v.tokenWith(r.t, "editor", map[string]any{"display_name": "mallory"})
				a := r.v.as(r.t, editor, "POST", "cable/config", map[string]any{
					"refresh_key": "made-up", "token_url": tokenURL(thiefHost),
				})
				if a.status >= 300 {
					r.t.Fatal(a)
				}
				r.failed("key_rejected")
				r.withdrawn()
				// An operator who has not read config may write these.
				for _, fields := range []string{"verify_role=reports", ""} {
					r.refuses("vault write cable/config refresh_key=@new-refresh-key.txt "+fields, "token_url")
				}
			},
			want: []string{`update\trefresh_key,token_url\ttoken-mallory`},
		},
		"write-destination": {
			want: []string{verified},
			after: func(string) {
				r.rotated(cableHost)
				if r.cable.stolen(r.cable.RefreshKey()) {
					r.t.Error("the key was sent to the thief's host")
				}
			},
		},
	}
}

func (r *runbook) tokenSteps() map[string]step {
	return map[string]step{
		"leases": {
			before: func() { r.set("roles/reports", map[string]any{"ttl": "20m"}); r.read() },
			want:   []string{`(?m)^expire_time .*$`},
		},
		"audit-show": {after: func(string) {
			// Only from now on does the audit log show it.
			r.ok("PUT", "sys/leases/revoke", map[string]any{"lease_id": r.read().LeaseID, "sync": true})
		}},
		"valid-tokens": {
			want:  []string{cabletest.DefaultOrganizationID + `\ttransactions:read\t`},
			after: func(string) { testValidFromAudit(r) },
		},
		"dropped-tokens": {before: r.dropsTokens, want: []string{"cable/creds/reports"}, after: r.testDropped},
		"who-read-token": {
			before: func() {
				r.shares("2m")
				ana := r.ok("POST", "auth/token/create", map[string]any{"display_name": "ana"}).Auth.ClientToken
				r.lease = r.v.as(r.t, ana, "GET", "cable/creds/reports", nil).LeaseID
				r.write("leaked-token.txt", r.shared+"\n")
			},
			want: []string{
				`cable/creds/reports\troot\t.*\t127\.0\.0\.1\tcable/creds/reports/`,
				`cable/creds/reports\ttoken-ana\t.*\t127\.0\.0\.1\tcable/creds/reports/`,
			},
			after: func(out string) {
				contains(r.t, out, r.lease)
				if n := strings.Count(out, "\n"); n != 2 {
					r.t.Errorf("%d readers had the token, want 2:\n%s", n, out)
				}
				r.ok("PUT", "sys/leases/revoke-prefix/cable/creds/reports", map[string]any{"sync": true})
				if r.read().token() != r.shared {
					r.t.Error("the end of the leases dropped the shared token")
				}
			},
		},
		"token-in-log": {
			before: func() {
				sum := sha256.Sum256([]byte(r.shared))
				ended := regexp.MustCompile(fmt.Sprintf("lease ended before its token.*%x", sum))
				waitFor(r.t, 10*time.Second, "the log has the lease's end", func() bool {
					return ended.MatchString(readFile(r.t, r.v.log))
				})
			},
			want: []string{`token minted`, `token reused`, `lease ended before its token`},
		},
		"who-read-token-hashed": {want: []string{"cable/creds/reports"}, after: func(out string) {
			if n := strings.Count(out, "\n"); n != 3 {
				r.t.Errorf("%d readers had the token, want 3:\n%s", n, out)
			}
		}},
		"drop-shared": {after: func(string) {
			if a := r.read(); a.status != 200 || a.token() == r.shared {
				r.t.Errorf("status %d; the leaked token is still returned: %t", a.status, a.token() == r.shared)
			}
		}},
		"disable-role": {
			want:  []string{"the role is disabled", validUntil},
			after: func(string) { r.disabled("roles/reports", true) },
		},
		"enable-role": {after: func(string) {
			r.disabled("roles/reports", false)
			if got := r.read().LeaseDuration; got > 300 {
				r.t.Errorf("the lease is for %ds", got)
			}
		}},
	}
}

func (r *runbook) cableSteps() map[string]step {
	// pauses has Cable respond 429 once. newKey ends the pause.
	pause := cabletest.Fault{Status: 429, Times: 1, Header: map[string]string{"Retry-After": "25"}}
	newKey := func() {
		r.withdrawn()
		r.set("config", map[string]any{"refresh_key": r.cable.RefreshKey()})
	}
	return map[string]step{
		"paused": {
			before: func() { r.cable.SetFault(pause); r.failed("rate_limited") },
			want:   []string{`(?m)^2\d`, `outcome="rate_limited",role="reports"} 1`, `vault_cable_pauses_total 1`},
		},
		"longer-ttl": {after: func(string) {
			newKey()
			if got := r.read().LeaseDuration; got < 3500 {
				r.t.Errorf("the lease is for %ds", got)
			}
		}},
		"share-tokens": {after: func(string) {
			calls := r.cable.CallCount()
			first, second := r.read().token(), r.read().token()
			if first != second || r.cable.CallCount() != calls+1 {
				r.t.Errorf("two readers, %d API calls", r.cable.CallCount()-calls)
			}
			r.shares("1s")
			r.cable.SetFault(pause)
			r.fallsBack("rate_limited")
			newKey()
		}},
		"fallbacks": {
			before: func() {
				r.shares("1s")
				r.cable.SetFault(cabletest.Fault{Status: 500})
				r.fallsBack("cable_error")
			},
			want: []string{`map\[reports:cable_error\]`, `reuse_fallbacks_total\{cause="cable_error"\} [1-9]`},
			after: func(string) {
				trial := map[string]any{"request_timeout": 11, "verify_role": "reports"}
				if a := r.v.do(r.t, "POST", "cable/config", trial); a.status != 502 {
					r.t.Errorf("a write with verify_role while Cable is down: %s", a)
				}
				r.fallsBack("cable_error")
				r.set("config", map[string]any{"request_timeout": 20})
				if a := r.read(); a.status != 502 {
					r.t.Errorf("after a write without it: status %d", a.status)
				}
				r.cable.ClearFaults()
				r.mintsEach()
			},
		},
		"network":     {want: []string{"(?m)^cable_error401$"}},
		"undelivered": {want: []string{"(?m)^vault_cable_undelivered_tokens_total [1-9]", "undelivered_until=20"}},
		"timeouts": {
			before: func() {
				r.cable.SetFault(cabletest.Fault{Delay: time.Minute})
				if a := r.read(); a.status != 500 || !strings.Contains(a.text, "context canceled") {
					r.t.Errorf("with a max_request_duration below request_timeout: %s", a)
				}
			},
			want: []string{"^20\n7\n", `\{outcome="canceled",role="reports"\} 1`},
		},
		"shorter-timeout": {after: func(string) {
			r.failed("timed_out")
			r.cable.ClearFaults()
		}},
		"refused": {
			before: func() {
				grant := &cabletest.Grant{Scopes: &[]string{"everything:write"}}
				r.cable.SetFault(cabletest.Fault{Times: 1, Grant: grant})
				r.failed("grant_mismatch")
			},
			want: []string{"everything:write", `requested_scopes=\[?"?transactions:read`},
		},
		// The log has no such line, because none has happened.
		"panics": {fails: true, want: []string{"(?m)^vault_cable_panics_total 0$"}},
	}
}

func (r *runbook) vaultSteps() map[string]step {
	var mend, expired func()
	return map[string]step{
		"not-started": {
			before: func() {
				mend = r.breakPlugin()
				r.refuses("vault read cable/status", "No value found at cable/status")
				if a := r.read(); a.status != 404 {
					r.t.Errorf("a plugin that did not start: %s", a)
				}
			},
			want: []string{`(?m)^cable/ `, "failed to create mount entry", "checksums did not match"},
		},
		"reload": {
			before: func() { mend() },
			want:   []string{`configured +true`},
			after: func(string) {
				r.mints("after the reload")
				r.cannotWrite("vault write cable/roles/reports ttl=15m")
			},
		},
		"step-down":   {want: []string{"Success! Stepped down"}, after: func(string) { r.untilActive() }},
		"write-again": {want: []string{"Success! Data written"}},
		"unseal": {
			before: func() {
				expired = r.expires()
				r.ok("PUT", "sys/seal", nil)
				r.write("unseal-key.txt", r.v.Key+"\n")
				expired()
			},
			want:  []string{`Sealed +false`},
			after: func(string) { r.untilActive() },
		},
		"unsealed": {
			want: []string{`(?m)^truetrue0$`},
			after: func(string) {
				waitFor(r.t, 20*time.Second, "the lease ends", func() bool {
					return r.v.do(r.t, "PUT", "sys/leases/lookup", map[string]any{"lease_id": r.lease}).status == 400
				})
			},
		},
		"irrevocable": {
			before: func() {
				expired = r.expires()
				mend = r.breakPlugin()
				expired()
				waitFor(r.t, 30*time.Second, "the lease is irrevocable", func() bool { return r.irrevocable() == 1 })
				mend()
				r.block("reload")
			},
			want: []string{"^1$"},
		},
		"revoke-irrevocable": {after: func(string) {
			if n := r.irrevocable(); n != 0 {
				r.t.Errorf("%d leases are irrevocable", n)
			}
		}},
	}
}

// irrevocable counts the leases that Vault could not end.
func (r *runbook) irrevocable() int64 {
	r.t.Helper()
	return r.ok("GET", "sys/leases/count?type=irrevocable", nil).number("lease_count")
}

func (r *runbook) monitorSteps() map[string]step {
	return map[string]step{
		"fault": {
			before: func() { r.read() },
			want:   []string{`Sealed +false`, `pause_seconds +0`, `last_mint_role +reports`, `token_requests +map\[`},
		},
		"fault-metrics": {want: []string{`outcome="minted",role="reports"`, `max_lease_ttl +768h`}},
		"quotas":        {after: func(string) { testQuotas(r) }},
		"metrics-token": {
			want: []string{"Success! Uploaded policy", `build_info\{.*version="` + pluginVersion + `"\} 1\n`},
			after: func(string) {
				token := strings.TrimSpace(readFile(r.t, r.place("metrics-token")))
				if a := r.v.as(r.t, token, "GET", "cable/status", nil); a.status != 403 {
					r.t.Errorf("the token for the metrics reads status: %s", a)
				}
			},
		},
		"metrics": {
			before: func() { r.refuses("vault read cable/metrics", "invalid character '#'") },
			want:   []string{"(?m)^# TYPE vault_cable_token_requests_total counter$"},
		},
	}
}

// contains fails the test if text does not have part.
func contains(t *testing.T, text, part string) {
	t.Helper()
	if !strings.Contains(text, part) {
		t.Errorf("there is no %q in:\n%s", part, text)
	}
}

// mustNext returns the plugin's next version.
func mustNext(t *testing.T) vaulttest.Plugin {
	t.Helper()
	next, err := nextPlugin()
	noError(t, err)
	return next
}

// testQuotas checks which paths limit which reads, as the runbook says of
// rate-limit quotas, after its two were written.
func testQuotas(r *runbook) {
	t := r.t
	t.Helper()
	const quotas = "sys/quotas/rate-limit/"
	limit := func(name, path string, rate int) {
		t.Helper()
		r.ok("POST", quotas+name, map[string]any{"path": path, "rate": rate, "interval": "1m"})
	}
	limited := func(path string) bool {
		t.Helper()
		first, second := r.v.do(t, "GET", path, nil), r.v.do(t, "GET", path, nil)
		return first.status == 429 || second.status == 429
	}
	r.set("roles/other", map[string]any{"scopes": "person:read", "organization_id": cabletest.DefaultOrganizationID})
	r.ok("DELETE", quotas+"cable-reports", nil) // those of the page
	r.ok("DELETE", quotas+"cable", nil)
	for path, want := range map[string][3]bool{
		"cable/creds":         {false, false, false},
		"cable/creds/":        {false, false, false},
		"cable/creds/reports": {true, false, false},
		"cable/creds/*":       {true, true, false},
		"cable/":              {true, true, true},
	} {
		// Each read gets a new quota, because a quota counts all paths of a client.
		for i, read := range []string{"cable/creds/reports", "cable/creds/other", "cable/status"} {
			limit("tried", path, 1)
			if got := limited(read); got != want[i] {
				t.Errorf("path=%s limits %s: %t, want %t", path, read, got, want[i])
			}
			r.ok("DELETE", quotas+"tried", nil)
		}
	}
	// The most specific quota counts, and no other.
	limit("wide", "cable/creds/*", 1)
	limit("narrow", "cable/creds/reports", 100)
	if limited("cable/creds/reports") || !limited("cable/creds/other") {
		t.Error("the most specific quota is not the one that counts")
	}
	r.ok("DELETE", quotas+"wide", nil)
	r.ok("DELETE", quotas+"narrow", nil)
}

// testValidFromAudit runs the page's search of the audit log for different times. It
// lists the tokens that were valid then, their leases revoked or not, and no other.
func testValidFromAudit(r *runbook) {
	t := r.t
	t.Helper()
	command := named(t, "docs/runbook.md")["valid-tokens"]
	valid := func(at time.Time) string {
		t.Helper()
		return r.run(strings.Replace(command, `"$(date -u +%FT%TZ)"`, at.UTC().Format(time.RFC3339), 1))
	}
	r.set("roles/other", map[string]any{"scopes": "person:read", "organization_id": cabletest.DefaultOrganizationID})
	r.ok("GET", "cable/creds/other", nil)
	a := r.ok("GET", "cable/creds/reports?ttl=10m", nil)
	r.ok("PUT", "sys/leases/revoke", map[string]any{"lease_id": a.LeaseID, "sync": true})
	expiresAt := a.Data["expires_at"].(string)
	expiry := time.Unix(a.number("expiry"), 0)

	line := strings.Join([]string{
		expiresAt, cabletest.DefaultOrganizationID, "transactions:read", "root", "", "{}", "127.0.0.1", a.LeaseID,
	}, "\t")
	for at, want := range map[time.Time]bool{
		time.Now().Add(time.Second): true,
		expiry.Add(-time.Second):    true,
		expiry.Add(time.Second):     false,
		time.Now().Add(-time.Hour):  false,
	} {
		out := valid(at)
		if got := slices.Contains(strings.Split(out, "\n"), line); got != want {
			t.Errorf("the token that is valid until %s, at %s: listed %t, want %t\n%s", expiresAt, at, got, want, out)
		}
		if strings.Contains(out, "creds/other") || findSecret(out, false) != "" {
			t.Errorf("tokens of another role, or a secret, are listed:\n%s", out)
		}
	}
}

// dropsTokens has clients leave, some of them just when their token arrives, until
// Vault has dropped one.
func (r *runbook) dropsTokens() {
	r.t.Helper()
	const delay = 40 * time.Millisecond
	r.cable.SetFault(cabletest.Fault{Delay: delay})
	defer r.cable.ClearFaults()
	i := 0
	waitFor(r.t, 30*time.Second, "Vault drops a token", func() bool {
		ctx, leave := context.WithTimeout(r.t.Context(), delay+time.Duration(i%20)*time.Millisecond)
		defer leave()
		i++
		_, _ = r.v.callContext(ctx, request{method: "GET", path: "cable/creds/reports", token: r.v.root})
		return strings.Contains(readFile(r.t, r.v.audit), "* internal error")
	})
}

// testDropped checks that the requests that are listed are those whose token was
// minted and dropped.
func (r *runbook) testDropped(out string) {
	r.t.Helper()
	for line := range strings.Lines(out) {
		if !r.v.logHas("token minted", "request_id="+strings.Split(line, "\t")[1]) {
			r.t.Errorf("a request without a token is listed: %s", line)
		}
	}
	waitFor(r.t, 10*time.Second, "each dropped token is listed", func() bool {
		dropped := strings.Count(readFile(r.t, r.v.log), "failed to register lease")
		return strings.Count(r.block("dropped-tokens"), "\n") == dropped
	})
}
