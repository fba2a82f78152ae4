// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"context"
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

// findJQ is where jq is: on PATH, else built once from the version that
// tools/jq pins.
var findJQ = sync.OnceValues(func() (string, error) {
	if path, err := exec.LookPath("jq"); err == nil {
		return path, nil
	}
	path := filepath.Join(suite.dir, "jq")
	_, err := run("go", "build", "-C", "../tools/jq", "-o", path, "github.com/itchyny/gojq/cmd/gojq")
	return path, err
})

// section is a part of a page, with its commands.
type section struct{ heading, commands string }

// sections returns the parts of a page that have commands, in their order.
func sections(t *testing.T, page string) (found []section) {
	t.Helper()
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile("(?ms)^```sh\n(.*?)^```")
	for _, part := range strings.Split(string(text), "\n## ")[1:] {
		heading, body, _ := strings.Cut(part, "\n")
		s := section{heading: heading}
		for _, m := range block.FindAllStringSubmatch(body, -1) {
			s.commands += m[1]
		}
		if s.commands != "" {
			found = append(found, s)
		}
	}
	return found
}

// TestOperations runs each command of docs/operations.md, in the order of the
// page, each part in the situation that it is for.
func TestOperations(t *testing.T) {
	t.Parallel()
	needVault(t)
	jq, err := findJQ()
	if err != nil {
		t.Fatal(err)
	}
	next, err := nextPlugin()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	place := func(parts ...string) string { return filepath.Join(append([]string{dir}, parts...)...) }
	for _, d := range []string{"plugins", "bin"} {
		if err := os.Mkdir(place(d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{"jq": jq, "vault": suite.vault} {
		if err := os.Symlink(target, place("bin", name)); err != nil {
			t.Fatal(err)
		}
	}
	v := &vaultServer{plugins: place("plugins")}
	if err := v.start(dir, &vaulttest.Raft{Dir: place("raft")}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.stop)
	watch(t, v)

	sim := cabletest.NewServer(t, nil)
	m := &mount{vaultServer: v, sim: sim, path: "cable"}
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(place(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	newKey := func() {
		t.Helper()
		sim.SetRefreshKey(cabletest.NewRefreshKey())
		write("new-refresh-key.txt", sim.RefreshKey()+"\n")
	}
	binary := func(from string) {
		t.Helper()
		_ = os.Remove(place(pluginName))
		if err := os.Link(from, place(pluginName)); err != nil {
			t.Fatal(err)
		}
	}
	read := func() *answer { return v.do(t, "GET", "cable/creds/reports", nil) }
	status := func(key string) string { return fmt.Sprint(v.ok(t, "GET", "cable/status", nil).Data[key]) }
	var lease string

	// NOTE: vault -field prints no newline where it does not write to a terminal.
	steps := map[string]struct {
		before func()
		want   []string // expressions that the output must match
		after  func()
	}{
		"Install": {
			before: func() {
				binary(suite.plugin.File)
				write("refresh-key.txt", sim.RefreshKey()+"\n")
			},
			want: []string{"Success! Registered plugin", "Success! Enabled", "Cable minted a token with these settings"},
			after: func() {
				if _, err := os.Stat(place("refresh-key.txt")); err == nil {
					t.Error("the key's file is still there")
				}
			},
		},
		"Verify": {want: []string{regexp.QuoteMeta(pluginVersion), `configured +true`, `lease_duration +14m5`}},
		"Upgrade": {
			before: func() { binary(next.File); lease = read().LeaseID },
			want:   []string{`(?m)^` + regexp.QuoteMeta(nextVersion) + `$`},
		},
		"Roll back": {
			want:  []string{`(?m)^` + regexp.QuoteMeta(pluginVersion) + `$`},
			after: func() { v.ok(t, "PUT", "sys/leases/revoke", map[string]any{"lease_id": lease, "sync": true}) },
		},
		"Rotate the refresh key": {before: newKey, want: []string{"Cable minted a token with these settings", `(?m)^220\d\d-\d\d-`}},
		"Is it Vault, the engine, the key, or Cable?": {
			before: func() { read() },
			want:   []string{`Sealed +false`, `hold_seconds +0`, `last_mint_role +reports`},
		},
		"Which tokens are alive?": {
			before: func() {
				v.ok(t, "POST", "cable/roles/reports", map[string]any{"ttl": "20m"})
				read()
			},
			want: []string{`(?m)^expire_time .*$`},
			after: func() {
				// Only now does the audit log tell: mint, revoke, and ask again.
				a := read()
				v.ok(t, "PUT", "sys/leases/revoke", map[string]any{"lease_id": a.LeaseID, "sync": true})
			},
		},
		"The refresh key leaked": {before: newKey, want: []string{"the mount is disabled", `may\s+live\s+until\s+20`, "Cable minted a token with these settings", `(?m)^token `}},
		"A token leaked": {
			before: func() {
				a := read()
				lease = a.LeaseID
				write("leaked-token.txt", a.token()+"\n")
			},
			want: []string{"cable/creds/reports", "the role is disabled", `may\s+live\s+until\s+20`, "LEASE"},
		},
		"Cable answers 401": {
			before: func() {
				newKey()
				read()
				if got := status("last_failure_outcome"); got != "key_refused" {
					t.Errorf("last_failure_outcome %q", got)
				}
			},
			want: []string{`auth_scheme +raw`, "Cable minted a token with these settings"},
		},
		"Cable answers 429": {
			before: func() {
				sim.SetFault(cabletest.Fault{Status: 429, Times: 1, Header: map[string]string{"Retry-After": "25"}})
				read()
			},
			want: []string{`(?m)^2\d`, `outcome="rate_limited",role="reports"} 1`, `vault_cable_holds_total 1`, "Success! Data written to: sys/quotas/rate-limit/cable-reports"},
			after: func() {
				newKey() // starts without the pause
				v.ok(t, "POST", "cable/config", map[string]any{"refresh_key": sim.RefreshKey()})
			},
		},
		"Cable answers 5xx or cannot be reached": {
			before: func() {
				sim.SetFault(cabletest.Fault{Status: 500, Times: 1})
				read()
			},
			want: []string{"(?m)^cable_failed401$", "(?m)^vault_cable_suspected_orphans_total 1$", "maybe_alive_until=20"},
		},
		"An answer of Cable was refused": {
			before: func() {
				sim.SetFault(cabletest.Fault{Times: 1, Grant: &cabletest.Grant{Scopes: &[]string{"everything:write"}}})
				read()
			},
			want: []string{"everything:write", `asked_scopes=\[?"?transactions:read`, "the role is disabled"},
		},
		"Vault was sealed for an hour": {
			before: func() {
				life := 7 * time.Second
				sim.SetFault(cabletest.Fault{Times: 1, Grant: &cabletest.Grant{Lifetime: &life}})
				a := read()
				lease = a.LeaseID
				v.ok(t, "PUT", "sys/seal", nil)
				write("unseal-key.txt", v.Key+"\n")
				expiry := time.Unix(a.number("expiry"), 0)
				waitFor(t, 20*time.Second, "the token runs out", func() bool { return time.Now().After(expiry) })
			},
			want: []string{`Sealed +false`, `(?m)^true`, `(?m)^token `, `(?m)^0$`},
			after: func() {
				waitFor(t, 20*time.Second, "the lease ends", func() bool {
					return v.do(t, "PUT", "sys/leases/lookup", map[string]any{"lease_id": lease}).status == 400
				})
			},
		},
		"Metrics": {want: []string{"(?m)^# TYPE vault_cable_mints_total counter$", `(?m)^vault_cable_build_info\{.*version="` + pluginVersion + `"\} 1$`, "Success! Uploaded policy"}},
	}

	edit := strings.NewReplacer(
		"/etc/vault/plugins", v.plugins,
		"/var/log/vault/audit.log", v.audit,
		"/var/log/vault/vault.log", v.log,
		" refresh_key=@refresh-key.txt ", " refresh_key=@refresh-key.txt token_url="+sim.URL+" ", // the one thing that is not Cable's
	)
	shell := func(commands string) string {
		t.Helper()
		// A part goes on with the variables of those before it.
		const vars = `touch vars; . ./vars; trap 'declare -p version previous > vars 2>/dev/null || true' EXIT; `
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", vars+edit.Replace(commands))
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "PATH="+place("bin")+":"+os.Getenv("PATH"), "VAULT_ADDR="+v.addr, "VAULT_TOKEN="+v.root)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", commands, err, out)
		}
		return string(out)
	}
	done := make(map[string]bool)
	for _, s := range sections(t, "../docs/operations.md") {
		step, ok := steps[s.heading]
		if !ok {
			t.Errorf("no step for the commands of %q", s.heading)
			continue
		}
		done[s.heading] = true
		if step.before != nil {
			step.before()
		}
		out := shell(s.commands)
		for _, want := range step.want {
			if want == "LEASE" {
				want = regexp.QuoteMeta(lease)
			}
			if !regexp.MustCompile(want).MatchString(out) {
				t.Errorf("%s: nothing matches %q in what its commands printed:\n%s", s.heading, want, out)
			}
		}
		if step.after != nil {
			step.after()
		}
		if s.heading == "Which tokens are alive?" {
			testAliveFromAudit(t, m, shell, s.commands)
		}
	}
	for heading := range steps {
		if !done[heading] {
			t.Errorf("the page has no commands under %q", heading)
		}
	}
}

// testAliveFromAudit runs the page's look into the audit log for different
// times, and compares with what is known of each token: those that lived then,
// revoked or not, and no other.
func testAliveFromAudit(t *testing.T, m *mount, shell func(string) string, commands string) {
	t.Helper()
	_, command, found := strings.Cut(commands, "jq -r --arg path")
	if !found {
		t.Fatalf("no look into the audit log:\n%s", commands)
	}
	command = "jq -r --arg path" + command
	alive := func(at time.Time) string {
		return shell(strings.Replace(command, `"$(date -u +%FT%TZ)"`, at.UTC().Format(time.RFC3339), 1))
	}
	m.ok(t, "POST", m.path+"/roles/other", map[string]any{"scopes": "person:read", "organization_id": cabletest.DefaultOrganizationID})
	m.ok(t, "GET", m.path+"/creds/other", nil)
	a := m.ok(t, "GET", m.path+"/creds/reports?ttl=10m", nil)
	m.ok(t, "PUT", "sys/leases/revoke", map[string]any{"lease_id": a.LeaseID, "sync": true})
	expiresAt := a.Data["expires_at"].(string)
	expiry := time.Unix(a.number("expiry"), 0)

	line := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(expiresAt+"\t"+cabletest.DefaultOrganizationID+"\ttransactions:read\troot\t\t{}\t127.0.0.1\t"+a.LeaseID) + `$`)
	for _, tt := range []struct {
		at   time.Time
		want bool
	}{{time.Now().Add(time.Second), true}, {expiry.Add(-time.Second), true}, {expiry.Add(time.Second), false}, {time.Now().Add(-time.Hour), false}} {
		out := alive(tt.at)
		if got := line.MatchString(out); got != tt.want {
			t.Errorf("the token that lives until %s, at %s: listed %t, want %t\n%s", expiresAt, tt.at.UTC().Format(time.RFC3339), got, tt.want, out)
		}
		if strings.Contains(out, "creds/other") {
			t.Errorf("tokens of another role are listed:\n%s", out)
		}
	}
	if secret := findSecret(alive(time.Now()), false); secret != "" {
		t.Errorf("the list holds %s", secret)
	}
}
