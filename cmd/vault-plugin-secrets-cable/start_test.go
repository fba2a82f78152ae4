// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
)

// TestCannotStart checks that a reason why the plugin cannot start is one line at error
// level, with its remedy. The logger sends it at each VAULT_LOG_LEVEL but "off".
func TestCannotStart(t *testing.T) {
	t.Parallel()
	plugin := build(t)
	cert := "PLUGIN_CLIENT_CERT=" + certificate()
	long := filepath.Join(t.TempDir(), strings.Repeat("long", 30))
	if err := os.Mkdir(long, 0o700); err != nil {
		t.Fatal(err)
	}
	nobody := []string{"/bin/sh", "-c", `ulimit -l 64 && exec "$0"`, plugin}
	if os.Geteuid() == 0 { // root may lock as much memory as it likes
		nobody = append([]string{"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"}, nobody...)
	}
	tests := map[string]struct {
		linux         bool
		command       []string // of the plugin alone by default
		env           []string
		error, remedy []string // parts of these fields
	}{
		"memory cannot be locked": {
			linux: true, command: nobody, env: []string{cert, "VAULT_PLUGIN_MLOCK_ENABLED=true"},
			error: []string{"locking memory: cannot allocate memory"},
			remedy: []string{
				`"setcap cap_ipc_lock=+ep ` + plugin + `"`, "again after each upgrade", "disable_mlock = true",
			},
		},
		"no folder for the socket": {
			env:   []string{cert, "TMPDIR=/nonexistent/folder"},
			error: []string{"open /nonexistent/folder/plugin", "no such file or directory"},
			remedy: []string{
				"a socket in /nonexistent/folder:", "let Vault's user create files there", "-env=TMPDIR=FOLDER",
			},
		},
		"no such folder of a container's": {
			env:    []string{cert, "PLUGIN_UNIX_SOCKET_DIR=/nonexistent/sockets"},
			error:  []string{"open /nonexistent/sockets/plugin"},
			remedy: []string{"a socket in /nonexistent/sockets:"},
		},
		"folder with too long a path": {
			env:    []string{cert, "TMPDIR=" + long},
			error:  []string{"invalid argument"},
			remedy: []string{"a socket in " + long + ":", "of at most 80 characters"},
		},
		"no such group of the socket": {
			env:    []string{cert, "PLUGIN_UNIX_SOCKET_GROUP=no-such-group"},
			error:  []string{"no-such-group"},
			remedy: []string{"report it with this line"},
		},
		"no descriptors": {
			command: []string{"/bin/sh", "-c", `ulimit -n 8 && exec "$0"`, plugin}, env: []string{cert},
			error:  []string{"too many open files"},
			remedy: []string{"limit of open files", "LimitNOFILE"},
		},
		"no certificate": {
			error:  []string{"PLUGIN_CLIENT_CERT is not set"},
			remedy: []string{"a wrapper script must leave the environment as it is"},
		},
		"garbled certificate": {
			env:    []string{"PLUGIN_CLIENT_CERT=-----BEGIN " + canary},
			error:  []string{"PLUGIN_CLIENT_CERT contains no certificate"},
			remedy: []string{"a wrapper script must leave the environment as it is"},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			switch {
			case runtime.GOOS == "windows" && len(tt.env) > 0 && name != "garbled certificate":
				t.Skip("Windows has no such limits, and a TCP port instead of the socket")
			case tt.linux && runtime.GOOS != "linux":
				t.Skip("memory is locked, against a limit, on Linux")
			}
			if tt.command == nil {
				tt.command = []string{plugin}
			}
			needProgram(t, tt.command[0])
			var stdout, stderr strings.Builder
			cmd := exec.Command(tt.command[0], tt.command[1:]...)
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			cmd.Env = underVault(append([]string{"VAULT_LOG_LEVEL=error"}, tt.env...)...)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			timeout := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() })
			defer timeout.Stop()
			_ = cmd.Wait()
			if status := cmd.ProcessState.ExitCode(); status != 1 {
				t.Errorf("exit status %d, want 1", status)
			}
			if stdout.Len() > 0 {
				t.Errorf("standard output: %q", &stdout)
			}
			t.Log(stderr.String())
			lines := logLines(t, stderr.String())
			if len(lines) != 1 || lines[0]["@level"] != "error" || lines[0]["@message"] != "plugin cannot run" {
				t.Fatalf("log: %q, want one line at error level", &stderr)
			}
			for field, parts := range map[string][]string{"error": tt.error, "remedy": tt.remedy} {
				for _, part := range parts {
					if got, _ := lines[0][field].(string); !strings.Contains(got, part) {
						t.Errorf("%s: %q, want it to contain %q", field, got, part)
					}
				}
			}
			if strings.Contains(stderr.String(), canary) {
				t.Error("the line repeats the certificate")
			}
		})
	}
}

// TestPanicAtStart checks that a panic of go-plugin is one line in the log. It panics if
// it cannot make a certificate, after it has logged the reason.
func TestPanicAtStart(t *testing.T) {
	t.Parallel()
	for name, reported := range map[string]bool{"with an error": true, "without": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var out strings.Builder
			start := &startLogger{Logger: hclog.New(&hclog.LoggerOptions{Output: &out, JSONFormat: true})}
			if reported {
				start.Error("failed to generate server certificate", "error", errors.New("no entropy"))
			}
			start.panicked(errors.New("no entropy"), []byte("stack"))
			lines := logLines(t, out.String())
			if len(lines) != 1 || lines[0]["@level"] != "error" || lines[0]["remedy"] == "" ||
				!strings.Contains(lines[0]["error"].(string), "no entropy") {
				t.Errorf("log: %q", &out)
			}
			if lines[0]["stack"] == nil != reported {
				t.Errorf("stack: %q", lines[0]["stack"])
			}
		})
	}
}
