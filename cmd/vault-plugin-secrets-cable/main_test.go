// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/plugin"
)

// canary stands where a secret could be put by mistake.
const canary = "REFRESHKEYCANARY-0123456789"

// testVersion is the version of the plugin that these tests build.
const testVersion = "v0.0.1-test"

// build builds the plugin, once for all tests.
func build(t *testing.T) string {
	t.Helper()
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

var (
	buildDir string
	binary   = sync.OnceValues(func() (string, error) {
		path := filepath.Join(buildDir, "vault-plugin-secrets-cable")
		const stamped = "github.com/cablesecrets/vault-plugin-secrets-cable/internal/version.stamped"
		cmd := exec.Command("go", "build", "-ldflags", "-X "+stamped+"="+testVersion, "-o", path, ".")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0") // as in a release
		out, err := cmd.CombinedOutput()
		if err != nil {
			err = errors.New(string(out))
		}
		return path, err
	})
)

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == hostArg {
		host(os.Args[2:]...)
	}
	// More tests at once than there are processors, unless the number is given:
	// most of them wait to see that nothing happens.
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f.Value.String() == fmt.Sprint(runtime.GOMAXPROCS(0)) {
		_ = f.Value.Set("12")
	}
	os.Exit(runTests(m))
}

// runTests is TestMain with deferred calls that run.
func runTests(m *testing.M) int {
	var err error
	if buildDir, err = os.MkdirTemp("", "cable-plugin-"); err != nil {
		panic(err)
	}
	defer os.RemoveAll(buildDir)
	if err := os.Chmod(buildDir, 0o755); err != nil { // for the test that has another user
		panic(err)
	}
	return m.Run()
}

// client is Vault's own client of the plugin that cmd starts: AutoMTLS and
// protocol version 5. The plugin's standard error goes to stderr.
func client(stderr io.Writer, cmd *exec.Cmd) *goplugin.Client {
	return goplugin.NewClient(&goplugin.ClientConfig{
		HandshakeConfig:  plugin.HandshakeConfig,
		VersionedPlugins: plugin.PluginSet,
		AllowedProtocols: []goplugin.Protocol{goplugin.ProtocolGRPC},
		AutoMTLS:         true,
		Cmd:              cmd,
		Stderr:           stderr,
		Logger:           hclog.NewNullLogger(),
	})
}

// underVault is the environment that Vault's go-plugin gives to a plugin, but for
// the certificate.
func underVault(more ...string) []string {
	cookie := plugin.HandshakeConfig.MagicCookieKey + "=" + plugin.HandshakeConfig.MagicCookieValue
	return append(append(os.Environ(), cookie, "PLUGIN_PROTOCOL_VERSIONS=5"), more...)
}

// certificate is one that a server would send. It is never used to connect.
var certificate = sync.OnceValue(func() string {
	server := httptest.NewTLSServer(nil)
	defer server.Close()
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
})

// skipUnlessRequired skips a test whose prerequisite is missing, or fails it if the
// prerequisites are required, as in CI, which runs on Linux as root.
func skipUnlessRequired(t *testing.T, reason string) {
	t.Helper()
	if os.Getenv("E2E") == "require" && runtime.GOOS == "linux" {
		t.Fatalf("E2E=require: %s", reason)
	}
	t.Skip(reason)
}

// needProgram skips a test that needs a program that is not there.
func needProgram(t *testing.T, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		skipUnlessRequired(t, err.Error())
	}
}

// TestServe starts the plugin as Vault does and calls it with Vault's own client.
// Arguments are given at registration by habit, and must not keep it from starting.
func TestServe(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, args := range [][]string{
		nil, {"-ca-cert=/" + canary}, {"-ca-cert", "/" + canary, canary}, {"-version"}, {"-help"}, {"-install", dir},
	} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			t.Parallel()
			var stderr bytes.Buffer
			client := client(&stderr, exec.Command(build(t), args...))
			t.Cleanup(client.Kill)
			protocol, err := client.Client()
			if err != nil {
				t.Fatal(err)
			}
			if got, err := client.NegotiatedVersion(), protocol.Ping(); got != 5 || err != nil {
				t.Errorf("protocol version %d, want 5; ping: %v", got, err)
			}
			if raw, err := protocol.Dispense("backend"); err != nil {
				t.Error(err)
			} else if _, ok := raw.(logical.Backend); !ok {
				t.Errorf("the plugin is a %T, want a logical.Backend", raw)
			}
			client.Kill()
			if !client.Exited() {
				t.Error("the process has not ended")
			}
			var want []map[string]any
			if args != nil {
				want = []map[string]any{{
					"@level":   "warn",
					"@message": "arguments given at registration ignored: this plugin takes none",
					"count":    float64(len(args)),
				}}
			}
			lines := logLines(t, stderr.String())
			for _, line := range lines {
				delete(line, "@timestamp")
			}
			if diff := cmp.Diff(want, lines); diff != "" || strings.Contains(stderr.String(), canary) {
				t.Errorf("log (-want +got):\n%s", diff)
			}
			if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
				t.Errorf("installed under a server: %v, %v", entries, err)
			}
		})
	}
}

// logLines decodes the lines of the structured logger, and fails if there is any
// other text.
func logLines(t *testing.T, text string) (lines []map[string]any) {
	t.Helper()
	for line := range strings.Lines(text) {
		fields := map[string]any{}
		if err := json.Unmarshal([]byte(line), &fields); err != nil || fields["@message"] == nil {
			t.Errorf("standard error has a line of something else than the logger: %q", line)
		}
		lines = append(lines, fields)
	}
	return lines
}

// TestStdout checks that under Vault the plugin writes one line to standard output, the
// handshake.
func TestStdout(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, build(t))
	cmd.Env = underVault("PLUGIN_CLIENT_CERT="+certificate(), "TMPDIR="+t.TempDir())
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	reader := bufio.NewReader(stdout)
	got, err := reader.ReadString('\n')
	cancel()
	more, _ := io.ReadAll(reader)
	_ = cmd.Wait()
	if got += string(more); err != nil || !regexp.MustCompile(`^1\|5\|.*\|grpc\|.*\n$`).MatchString(got) {
		t.Errorf("standard output: %q (%v), want the handshake, in one line", got, err)
	}
}

// TestByHand pins the output in a shell. Wrong arguments are never repeated, because
// they may contain anything.
func TestByHand(t *testing.T) {
	t.Parallel()
	const (
		isEngine = "vault-plugin-secrets-cable " + testVersion + " is a secrets engine for HashiCorp Vault.\n"
		isBuild  = "vault-plugin-secrets-cable " + testVersion + ", commit "
		wrong    = "vault-plugin-secrets-cable takes no arguments but -version, -help and -install DIR: "
	)
	tests := []struct {
		args           []string
		status         int
		stdout, stderr string // the beginning of the output; "" for none at all
	}{
		{status: 1, stderr: isEngine},
		{args: []string{"-help"}, stdout: isEngine},
		{args: []string{"-h"}, stdout: isEngine},
		{args: []string{"-version"}, stdout: isBuild},
		{args: []string{"--version"}, stdout: isBuild},
		{args: []string{canary}, status: 2, stderr: wrong},
		{args: []string{"-refresh-key=" + canary}, status: 2, stderr: wrong},
		{args: []string{"-version", canary}, status: 2, stderr: wrong},
		{args: []string{"-version=" + canary}, status: 2, stderr: wrong},
		{args: []string{"-help", canary}, status: 2, stderr: wrong},
		{args: []string{"-install"}, status: 2, stderr: wrong},
		{args: []string{"-install", ""}, status: 2, stderr: wrong}, // of a variable that is not set
		{args: []string{"-install="}, status: 2, stderr: wrong},
		{args: []string{"-install", "/nonexistent", canary}, status: 2, stderr: wrong},
		{args: []string{"-install", "/nonexistent", "-version"}, status: 2, stderr: wrong},
	}
	for _, tt := range tests {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			t.Parallel()
			var stdout, stderr strings.Builder
			cmd := exec.Command(build(t), tt.args...)
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			_ = cmd.Run()
			if got := cmd.ProcessState.ExitCode(); got != tt.status {
				t.Errorf("exit status %d, want %d", got, tt.status)
			}
			for got, want := range map[*strings.Builder]string{&stdout: tt.stdout, &stderr: tt.stderr} {
				text := got.String()
				if !strings.HasPrefix(text, want) || want == "" && text != "" || strings.Contains(text, canary) {
					t.Errorf("%q, want %q", text, want)
				}
				if want == isEngine && !strings.Contains(text, "vault plugin register -sha256=") {
					t.Error("the usage does not say how to register")
				}
				if want == isBuild && !strings.HasSuffix(text, ", "+runtime.Version()+"\n") {
					t.Errorf("version: %q", text)
				}
			}
		})
	}
}
