// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/vaulttest"
)

// TestArguments: arguments given at registration, which other plugins take, do
// not keep the plugin from starting; one warning in the log has their number.
func TestArguments(t *testing.T) {
	t.Parallel()
	v := ownServer(t)
	for name, args := range map[string][]string{
		"ca-cert": {"-ca-cert=/" + cabletest.RefreshKeyMarker},
		"version": {"-version"},
		"several": {"-log-level=debug", "-help", cabletest.TokenMarker},
	} {
		plugin := pluginName + "-" + name
		command := []string{"plugin", "register", "-sha256=" + suite.sha256, "-command=" + pluginName, "-version=" + pluginVersion}
		for _, arg := range args {
			command = append(command, "-args="+arg)
		}
		t.Log(v.cli(t, append(command, "secret", plugin)...))
		m := &mount{vaultServer: v, path: name, sim: cabletest.NewServer(t, nil)}
		t.Log(v.cli(t, "secrets", "enable", "-path="+m.path, plugin))
		m.configure(t)
		m.read(t)
		if !v.logHas("[WARN]", "secrets."+plugin+".", "arguments given at registration ignored: this plugin takes none", fmt.Sprintf("count=%d", len(args))) {
			t.Errorf("%s: no warning", name)
		}
	}
	// Vault itself logs the command that it runs.
	for line := range strings.Lines(readFile(t, v.log)) {
		if findSecret(line, false) != "" && !strings.Contains(line, ": starting plugin: ") {
			t.Errorf("the log repeats an argument: %s", line)
		}
	}
}

// cannotRun checks that the log has the reason why the plugin did not start, with
// its remedy, in one line at error level for each process.
func (v *vaultServer) cannotRun(t *testing.T, reason, remedy string) {
	t.Helper()
	lines := 0
	for line := range strings.Lines(readFile(t, v.log)) {
		if !strings.Contains(line, "plugin cannot run") {
			continue
		}
		if lines++; lines == 1 {
			t.Log(line)
		}
		if !strings.Contains(line, "[ERROR] secrets.") || !strings.Contains(line, reason) || !strings.Contains(line, remedy) {
			t.Errorf("log: %s: want %q and %q, at error level", line, reason, remedy)
		}
	}
	// Vault starts the plugin a second time, with an older protocol.
	if lines < 1 || lines > 2 {
		t.Errorf("%d lines in the log, want one for each process", lines)
	}
}

// TestCannotStart: at Vault's default log level an operator sees why the plugin
// does not start, and what to do.
func TestCannotStart(t *testing.T) {
	t.Parallel()
	needVault(t)
	v := &vaultServer{level: "info"}
	if err := v.startDev(t.TempDir()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.stop)
	v.register(t, "no-folder", map[string]any{"env": []string{"TMPDIR=/nonexistent"}})
	a := v.do(t, "POST", "sys/mounts/cable", map[string]any{"type": "no-folder"})
	if a.status != 400 {
		t.Errorf("%s: want 400", a)
	}
	t.Log(a)
	v.cannotRun(t, "open /nonexistent/plugin", "the plugin needs a socket in /nonexistent: let Vault's user create files there")
	// The remedy.
	v.register(t, "no-folder", map[string]any{"env": []string{"TMPDIR=" + suite.dir}})
	v.ok(t, "POST", "sys/mounts/cable", map[string]any{"type": "no-folder"})
}

// TestLockedMemory: Vault runs as a user other than root and locks memory. The
// plugin cannot, says what helps, and that helps.
func TestLockedMemory(t *testing.T) {
	t.Parallel()
	needFeature(t, vaulttest.MemoryLock)
	if runtime.GOOS != "linux" || os.Geteuid() != 0 {
		skipUnlessRequired(t, errors.New("to start Vault as another user and to give a file a capability takes root, on Linux"))
	}
	for _, program := range []string{"setpriv", "setcap"} {
		if _, err := exec.LookPath(program); err != nil {
			skipUnlessRequired(t, err)
		}
	}
	// A folder that this user, who cannot look into those of the tests, may read.
	const nobody = 65534
	dir, err := os.MkdirTemp("", "cable-mlock-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	place := func(name, from string) string {
		path := filepath.Join(dir, name)
		in, err := os.Open(from)
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		out, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o755)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(out, in); err != nil {
			t.Fatal(err)
		}
		if err := out.Close(); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, folder := range []string{dir, filepath.Join(dir, "plugins"), filepath.Join(dir, "data")} {
		if err := os.MkdirAll(folder, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(folder, nobody, nobody); err != nil {
			t.Fatal(err)
		}
	}
	vault := place("vault", suite.vault)
	plugin := place(filepath.Join("plugins", pluginName), filepath.Join(suite.plugins, pluginName))
	setcap := func(path string) {
		if out, err := exec.Command("setcap", "cap_ipc_lock=+ep", path).CombinedOutput(); err != nil {
			skipUnlessRequired(t, fmt.Errorf("setcap: %w: %s", err, bytes.TrimSpace(out)))
		}
	}
	setcap(vault)
	script := filepath.Join(dir, "vault-as-nobody")
	writeScript(t, script, fmt.Sprintf(`ulimit -l 64; exec setpriv --reuid=%d --regid=%[1]d --clear-groups %s "$@"`, nobody, vault))

	v := &vaultServer{binary: script, plugins: filepath.Join(dir, "plugins"), mlock: true, level: "info", audit: filepath.Join(dir, "data", "audit.log")}
	if err := v.start(dir, &vaulttest.Raft{Dir: filepath.Join(dir, "data")}, suite.plugin); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.stop)
	m := &mount{vaultServer: v, path: "cable", sim: cabletest.NewServer(t, nil)}
	enable := func() *answer { return v.do(t, "POST", "sys/mounts/"+m.path, map[string]any{"type": pluginName}) }
	if a := enable(); a.status != 400 {
		t.Fatalf("%s: want 400, as the plugin cannot lock memory", a)
	}
	v.cannotRun(t, "cannot allocate memory", fmt.Sprintf(`run \"setcap cap_ipc_lock=+ep %s\", again after each upgrade of this file, or set disable_mlock = true in Vault's configuration`, plugin))

	setcap(plugin)
	if a := enable(); a.status != 204 {
		t.Fatalf("%s: want 204, as the plugin may lock memory now", a)
	}
	m.configure(t)
	m.read(t)
	pids := processes(t, plugin)
	if len(pids) != 1 {
		t.Fatalf("plugin processes %v, want one", pids)
	}
	if status := readFile(t, fmt.Sprintf("/proc/%d/status", pids[0])); !strings.Contains(status, "Uid:\t65534\t") || strings.Contains(status, "VmLck:\t       0 kB") {
		t.Errorf("the plugin is not the other user's, or has not locked its memory:\n%s", status)
	}
	kill(t, v.Process.Pid)
	waitFor(t, 10*time.Second, "the plugin ends", func() bool { return !runs(pids[0]) })
}
