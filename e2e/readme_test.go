// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/vaulttest"
)

// TestReadme runs the README's commands, which install a mount that works, and its
// transcript, whose output is as the README shows it, but for the values that differ.
func TestReadme(t *testing.T) {
	t.Parallel()
	r := newRunbook(t)
	r.runPage("README.md", map[string]step{
		"Install/2": {before: func() { r.hasBinary(suite.plugin) }},
		"Install/3": {want: []string{"Success! Registered plugin", "Success! Enabled", "Success! Tuned"}},
		"Install/4": {
			before: func() { r.write("refresh-key.txt", r.cable.RefreshKey()+"\n") },
			want:   []string{"Cable minted a token with these settings"},
			after: func(string) {
				r.mints("as the README installs it")
				tune := r.v.ok(t, "GET", "sys/mounts/cable/tune", nil)
				if diff := cmp.Diff([]any{"Retry-After"}, tune.Data["allowed_response_headers"]); diff != "" {
					t.Errorf("allowed_response_headers (-want +got):\n%s", diff)
				}
			},
		},
	})

	// The values that differ each time, and so the width of the columns.
	differs := regexp.MustCompile(`(?m)^(lease_id|lease_duration|expires_at|expiry|token|token_sha256) .*$`)
	shape := func(text string) string {
		text = differs.ReplaceAllString(text, "$1")
		return strings.TrimSpace(regexp.MustCompile(` {2,}`).ReplaceAllString(text, "  "))
	}
	transcripts := 0
	for _, b := range blocksOf(t, "README.md") {
		if b.language != "console" {
			continue
		}
		for _, command := range strings.Split("\n"+b.text, "\n$ ")[1:] {
			transcripts++
			command, want, _ := strings.Cut(command, "\n")
			if diff := cmp.Diff(shape(want), shape(r.run(command))); diff != "" {
				t.Errorf("$ %s (-README +here):\n%s", command, diff)
			}
		}
	}
	if transcripts < 3 {
		t.Errorf("the README has a transcript of %d commands", transcripts)
	}
}

// stackBuild is held while a script builds the program that starts its servers:
// two at once would write one file.
var stackBuild sync.Mutex

// TestDemo runs make demo, which ends by itself. Its output fits two screens,
// shows the effect of each feature, and nothing of the tests' own.
func TestDemo(t *testing.T) {
	t.Parallel()
	needVault(t)
	stackBuild.Lock()
	defer stackBuild.Unlock()
	cmd := exec.CommandContext(t.Context(), "../scripts/demo")
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{
		`^lease_duration +14m5\ds$`, // a token with a lease
		`scopes=person:read ttl=5m\n\[person:read\]$`,
		`scopes=person:write\nCode: 400.*\n.*scopes outside role "reports"`,
		`permission denied`,
		`refresh_key=mistyped .*\nCode: 400.*\n.* failed and nothing was stored`,
		`refresh_key_version cable/config\n2$`, // rotated
		`cable/creds/fleet \| cksum\n(\d+ \d+)$`,
		`vault read cable/creds/reports\nCode: 502`,                    // an outage
		`Cable is down \(cable_error\), so the previous token is ret`,  // and reuse
		`disabled=true\n(?s:.*)may\s+be\s+valid\s+until\s+20\d\d-`,     // a role
		`vault read cable/creds/reports\nCode: 400.*\n.* is disabled`,  // that mints no more
		`^map\[cable_error:1 invalid_request:2 minted:\d reused:\d\]$`, // each read in status
		`^Success! Disabled the secrets engine .* cable/$`,
	} {
		if !regexp.MustCompile("(?m)" + want).Match(out) {
			t.Errorf("nothing matches %q in the demo's output:\n%s", want, out)
		}
	}
	shared := regexp.MustCompile(`(?m)cksum\n(.*)$`).FindAllSubmatch(out, -1)
	if len(shared) != 2 || !bytes.Equal(shared[0][1], shared[1][1]) {
		t.Errorf("two readers of the role with reuse_for have other tokens: %q", shared)
	}
	if n := bytes.Count(out, []byte("\n")); n > 110 {
		t.Errorf("the demo prints %d lines: more than two screens", n)
	}
	if ours := regexp.MustCompile(`CANARY|/base/`).Find(out); ours != nil {
		t.Errorf("the demo shows %q, which only tests need", ours)
	}
}

// TestBuild checks that make build leaves a folder that a dev server takes as its plugin
// folder, in which Vault tries to run each file as a plugin, and that Vault reads the
// version that Go gave to the build.
func TestBuild(t *testing.T) {
	t.Parallel()
	needVault(t)
	if out, err := exec.CommandContext(t.Context(), "make", "-s", "-C", "..", "build").CombinedOutput(); err != nil {
		t.Fatalf("make build: %v\n%s", err, out)
	}
	bin, err := filepath.Abs("../bin")
	noError(t, err)
	if bin, err = filepath.EvalSymlinks(bin); err != nil {
		t.Fatal(err)
	}
	v := serverByHand(t, "-dev-plugin-dir="+bin)
	v.cli(t, "secrets", "enable", "-path=cable", pluginName)
	text, err := run(filepath.Join(bin, pluginName), "-version")
	noError(t, err)
	version := v.ok(t, "GET", "cable/status", nil).Data["version"]
	running := v.ok(t, "GET", "sys/mounts/cable", nil).Data["running_plugin_version"]
	if want := fmt.Sprintf("%s %s, ", pluginName, version); running != version || !strings.HasPrefix(text, want) {
		t.Errorf("version %v in status, %v in Vault, and %s", version, running, text)
	}
}

// TestPluginDirectoryBehindALink checks that Vault refuses to register a plugin if
// plugin_directory is a symbolic link or lies behind one, as the runbook says.
func TestPluginDirectoryBehindALink(t *testing.T) {
	t.Parallel()
	needVault(t)
	links := t.TempDir()
	for name, target := range map[string]string{"link": suite.plugins, "behind": filepath.Dir(suite.plugins)} {
		noError(t, os.Symlink(target, filepath.Join(links, name)))
	}
	for _, dir := range []string{"link", "behind/" + filepath.Base(suite.plugins)} {
		config := filepath.Join(t.TempDir(), "vault.hcl")
		writeFile(t, config, fmt.Sprintf("plugin_directory = %q\n", filepath.Join(links, dir)))
		v := serverByHand(t, "-config="+config)
		a := v.do(t, "PUT", "sys/plugins/catalog/secret/"+pluginName,
			map[string]any{"sha256": suite.sha256, "command": pluginName, "version": pluginVersion})
		if a.status < 400 || !strings.Contains(a.text, "cannot execute files outside of configured plugin directory") {
			t.Errorf("plugin_directory = %s: %s", dir, a)
		}
	}
}

// serverByHand starts a dev server as a person does, with the root token "root".
func serverByHand(t *testing.T, args ...string) *vaultServer {
	t.Helper()
	addr := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	v := &vaultServer{addr: "http://" + addr, root: "root"}
	v.Server = &vaulttest.Server{Addr: v.addr, Root: v.root}
	args = append([]string{
		"server", "-dev", "-dev-root-token-id=root", "-dev-no-store-token", "-dev-listen-address=" + addr,
	}, args...)
	_, v.log = runUntilEnd(t, t.TempDir(), os.Environ(), suite.vault, args...)
	waitFor(t, 30*time.Second, "the server responds", func() bool {
		a, err := v.call(request{method: "GET", path: "sys/health"})
		return err == nil && a.status == 200
	})
	return v
}
