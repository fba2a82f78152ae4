// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/vaulttest"
)

// TestArguments checks that arguments given at registration, which other plugins take, do
// not keep the plugin from starting. One warning in the log has their number.
func TestArguments(t *testing.T) {
	t.Parallel()
	v := ownServer(t)
	const plugin = pluginName + "-arguments"
	v.cli(t, "plugin", "register", "-sha256="+suite.sha256, "-command="+pluginName, "-version="+pluginVersion,
		"-args=-version", "-args=-ca-cert=/"+cabletest.RefreshKeyMarker, "-args="+cabletest.TokenMarker,
		"secret", plugin)
	m := v.mountAt(t, "cable", plugin, cabletest.NewServer(t, nil))
	m.configure(t)
	m.read(t)
	const warning = "arguments given at registration ignored: this plugin takes none"
	if !v.logHas("[WARN]", "secrets."+plugin+".", warning, "count=3") {
		t.Error("no warning")
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
	lines := regexp.MustCompile(`.*plugin cannot run.*`).FindAllString(readFile(t, v.log), -1)
	for _, line := range lines {
		for _, part := range []string{"[ERROR] secrets.", reason, remedy} {
			contains(t, line, part)
		}
	}
	// Vault starts the plugin a second time, with an older protocol.
	if n := len(lines); n < 1 || n > 2 {
		t.Errorf("%d lines in the log, want one for each process", n)
	}
}

// TestLockedMemory has a Vault that runs as a user other than root and locks memory. The
// plugin cannot, and at Vault's default log level it names the runbook's command, which
// helps. TestCannotStart has other reasons.
func TestLockedMemory(t *testing.T) {
	t.Parallel()
	needFeature(t, vaulttest.MemoryLock)
	if runtime.GOOS != "linux" || os.Geteuid() != 0 {
		skipUnlessRequired(t, errors.New("to start Vault as another user takes root, on Linux"))
	}
	for _, program := range []string{"setpriv", "setcap"} {
		if _, err := exec.LookPath(program); err != nil {
			skipUnlessRequired(t, err)
		}
	}
	dir, err := os.MkdirTemp("", "cable-mlock-") // the other user cannot look into t.TempDir
	noError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	const nobody = 65534
	plugins, data, vault := filepath.Join(dir, "plugins"), filepath.Join(dir, "data"), filepath.Join(dir, "vault")
	plugin := filepath.Join(plugins, pluginName+"-"+pluginVersion)
	setcap := func(path string) string { return "setcap cap_ipc_lock=+ep " + path }
	for _, command := range []string{
		fmt.Sprintf("install -d -m 0700 -o %d -g %[1]d %s %s %s", nobody, dir, plugins, data),
		"install -m 0755 " + suite.vault + " " + vault,
		suite.plugin.File + " -install " + plugins,
		setcap(vault),
	} {
		args := strings.Fields(command)
		if _, err := run(args[0], args[1:]...); err != nil {
			skipUnlessRequired(t, err) // such as in a container without the right to give capabilities
		}
	}
	script := filepath.Join(dir, "vault-as-nobody")
	asNobody := fmt.Sprintf("setpriv --reuid=%d --regid=%[1]d --clear-groups", nobody)
	writeScript(t, script, fmt.Sprintf(`ulimit -l 64; exec %s %s "$@"`, asNobody, vault))
	v := &vaultServer{binary: script, plugins: plugins, mlock: true, level: "info"}
	v.audit = filepath.Join(data, "audit.log")
	registered := vaulttest.Plugin{Name: pluginName, Version: pluginVersion, File: plugin}
	noError(t, v.start(dir, &vaulttest.Raft{Dir: data}, registered))
	t.Cleanup(v.stop)
	enable := func() *response { return v.do(t, "POST", "sys/mounts/cable", map[string]any{"type": pluginName}) }
	if a := enable(); a.status != 400 {
		t.Fatalf("%s: want 400, because the plugin cannot lock memory", a)
	}
	v.cannotRun(t, "cannot allocate memory", fmt.Sprintf(`run \"%s\", again after each upgrade of this file, `+
		`or set disable_mlock = true in Vault's configuration`, setcap(plugin)))

	s := newShell(t, v, nil)
	s.edit = strings.NewReplacer("/etc/vault/plugins", plugins)
	blocks := named(t, "docs/runbook.md")
	s.run("version=" + pluginVersion + "\n" + blocks["setcap"])
	if a := enable(); a.status != 204 {
		t.Fatalf("%s: want 204, because the plugin may lock memory now", a)
	}
	m := &mount{vaultServer: v, path: "cable", sim: cabletest.NewServer(t, nil)}
	m.configure(t)
	m.read(t)
	pids := processes(t, plugin)
	if len(pids) != 1 {
		t.Fatalf("plugin processes %v, want one", pids)
	}
	status := readFile(t, fmt.Sprintf("/proc/%d/status", pids[0]))
	if !strings.Contains(status, "Uid:\t65534\t") || strings.Contains(status, "VmLck:\t       0 kB") {
		t.Errorf("the plugin is not the other user's, or has not locked its memory:\n%s", status)
	}

	// Where the capability is not in the bounding set, as in a container, the file
	// cannot be executed until the runbook's command removes the capability.
	container := "setpriv --bounding-set=-ipc_lock " + plugin + " -version"
	if out, err := s.try(container); err == nil || !strings.Contains(out, "Operation not permitted") {
		t.Errorf("in a container, with the capability: %v\n%s", err, out)
	}
	s.run(blocks["remove-capability"])
	s.run(container)
}
