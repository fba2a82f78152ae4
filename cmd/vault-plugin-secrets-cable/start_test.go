// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
)

// TestCannotStart checks that a reason why the plugin cannot start is one line at error
// level, with its remedy. The logger sends it at each VAULT_LOG_LEVEL but "off".
func TestCannotStart(t *testing.T) {
	t.Parallel()
	plugin := build(t)
	cert := "PLUGIN_CLIENT_CERT=" + certificate()
	long := filepath.Join(t.TempDir(), strings.Repeat("long", 30))
	check(t, os.Mkdir(long, 0o700))
	nobody := []string{"/bin/sh", "-c", `ulimit -l 64 && exec "$0"`, plugin}
	if os.Geteuid() == 0 { // root may lock as much memory as it likes
		nobody = append([]string{"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"}, nobody...)
	}
	const leaveEnvironment = "a wrapper script must leave the environment as it is"
	tests := map[string]struct {
		command       []string // of the plugin alone by default
		env           []string
		error, remedy string // regular expressions
	}{
		"memory cannot be locked": {
			nobody,
			[]string{cert, "VAULT_PLUGIN_MLOCK_ENABLED=true"},
			"locking memory: cannot allocate memory",
			`"setcap cap_ipc_lock=\+ep ` + plugin + `", again after each upgrade .* disable_mlock = true`,
		},
		"no folder for the socket": {
			nil,
			[]string{cert, "TMPDIR=/nonexistent/folder"},
			"open /nonexistent/folder/plugin.*: no such file or directory",
			"a socket in /nonexistent/folder: let Vault's user create files there, .* -env=TMPDIR=FOLDER",
		},
		"no such folder of a container's": {
			nil,
			[]string{cert, "PLUGIN_UNIX_SOCKET_DIR=/nonexistent/sockets"},
			"open /nonexistent/sockets/plugin",
			"a socket in /nonexistent/sockets:",
		},
		"folder with too long a path": {
			nil,
			[]string{cert, "TMPDIR=" + long},
			"invalid argument",
			"a socket in " + long + ":.* of at most 80 characters",
		},
		"no such group of the socket": {
			nil, []string{cert, "PLUGIN_UNIX_SOCKET_GROUP=no-such-group"}, "no-such-group", "report it with this line",
		},
		"no descriptors": {
			[]string{"/bin/sh", "-c", `ulimit -n 8 && exec "$0"`, plugin},
			[]string{cert},
			"too many open files", "limit of open files .*LimitNOFILE",
		},
		"no certificate": {nil, nil, "PLUGIN_CLIENT_CERT is not set", leaveEnvironment},
		"garbled certificate": {
			nil,
			[]string{"PLUGIN_CLIENT_CERT=-----BEGIN " + canary},
			"PLUGIN_CLIENT_CERT contains no certificate", leaveEnvironment,
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			switch {
			case runtime.GOOS == "windows" && len(tt.env) > 0 && name != "garbled certificate":
				t.Skip("Windows has no such limits, and a TCP port instead of the socket")
			case strings.HasPrefix(name, "memory") && runtime.GOOS != "linux":
				t.Skip("memory is locked, against a limit, on Linux")
			}
			if tt.command == nil {
				tt.command = []string{plugin}
			}
			needProgram(t, tt.command[0])
			cmd := exec.Command(tt.command[0], tt.command[1:]...)
			cmd.Env = underVault(append([]string{"VAULT_LOG_LEVEL=error"}, tt.env...)...)
			stdout, stderr, status := run(cmd)
			if status != 1 || stdout != "" {
				t.Errorf("exit status %d, standard output: %q", status, stdout)
			}
			t.Log(stderr)
			lines := logLines(t, stderr)
			if len(lines) != 1 || lines[0]["@level"] != "error" || lines[0]["@message"] != "plugin cannot run" {
				t.Fatalf("log: %q, want one line at error level", stderr)
			}
			for field, want := range map[string]string{"error": tt.error, "remedy": tt.remedy} {
				if got, _ := lines[0][field].(string); !regexp.MustCompile(want).MatchString(got) {
					t.Errorf("%s: %q, want %q", field, got, want)
				}
			}
			if strings.Contains(stderr, canary) {
				t.Error("the line repeats the certificate")
			}
		})
	}
}

// TestPanicAtStart checks that a panic of go-plugin is one line in the log. It panics if
// it cannot make a certificate, after it has logged the reason.
func TestPanicAtStart(t *testing.T) {
	t.Parallel()
	for _, reported := range []bool{true, false} {
		var out strings.Builder
		start := &startLogger{Logger: hclog.New(&hclog.LoggerOptions{Output: &out, JSONFormat: true})}
		if reported {
			start.Error("failed to generate server certificate", "error", errors.New("no entropy"))
		}
		status := 0
		func() {
			defer start.end(&status)
			panic(errors.New("no entropy"))
		}()
		lines := logLines(t, out.String())
		if status != 1 || len(lines) != 1 || lines[0]["@level"] != "error" || lines[0]["remedy"] == "" ||
			!strings.Contains(lines[0]["error"].(string), "no entropy") || lines[0]["stack"] == nil != reported {
			t.Errorf("reported before: %t, log: %q", reported, &out)
		}
	}
}
