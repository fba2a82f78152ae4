// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// TestStderr checks that standard error has the lines of the logger alone if the environment tells Go's runtime and
// libraries to print more. The prints that need a connection to Cable are in e2e, in TestOnlyStructuredLog.
func TestStderr(t *testing.T) {
	t.Parallel()
	cmd := exec.Command(build(t))
	cmd.Env = []string{
		"GODEBUG=http2debug=2,gctrace=1,schedtrace=100,netdns=9", "GOGC=1", // collects at once
		"GRPC_GO_LOG_SEVERITY_LEVEL=info", "GRPC_GO_LOG_VERBOSITY_LEVEL=99",
		"VAULT_LOG_LEVEL=trace", // of the logger, so that there are lines
	}
	var stderr bytes.Buffer
	client, protocol := connect(t, &stderr, cmd)
	for range 10 {
		if err := protocol.Ping(); err != nil {
			t.Error(err)
		}
	}
	client.Kill()
	// The runtime may print before main begins, when there are no secrets.
	_, text, _ := strings.Cut(stderr.String(), "{")
	if len(logLines(t, "{"+text)) == 0 {
		t.Error("the log is empty")
	}
}

// TestCrash checks that the runtime's report of a crash reaches standard error, which Vault logs.
func TestCrash(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("Windows has no signal that makes a process crash")
	}
	pidFile := filepath.Join(t.TempDir(), "pid")
	var stderr bytes.Buffer
	const script = `echo $$ >"$1"; TMPDIR=${1%/*} exec "$0"`
	client, _ := connect(t, &stderr, exec.Command("/bin/sh", "-c", script, build(t), pidFile))
	check(t, readProcess(t, pidFile).Signal(syscall.SIGQUIT))
	waitFor(t, "the process to end", client.Exited)
	if text := stderr.String(); !strings.HasPrefix(text, "SIGQUIT: quit\n") || !strings.Contains(text, "\ngoroutine ") {
		t.Errorf("standard error: %.1000q, want the runtime's report", text)
	}
}

// readProcess returns the process whose id a script has written to a file.
func readProcess(t *testing.T, file string) *os.Process {
	t.Helper()
	pid := must(strconv.Atoi(strings.TrimSpace(string(content(t, file)))))(t)
	return must(os.FindProcess(pid))(t)
}
