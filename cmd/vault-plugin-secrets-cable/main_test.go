// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bytes"
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
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/plugin"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/version"
)

// canary stands where a secret could be put by mistake.
const canary = "REFRESHKEYCANARY-0123456789"

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
		out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput()
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
// protocol version 5. What the plugin writes to standard error goes to stderr.
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
	return append(append(os.Environ(), plugin.HandshakeConfig.MagicCookieKey+"="+plugin.HandshakeConfig.MagicCookieValue, "PLUGIN_PROTOCOL_VERSIONS=5"), more...)
}

// certificate is one that a server would send: it is never used to connect.
var certificate = sync.OnceValue(func() string {
	server := httptest.NewTLSServer(nil)
	defer server.Close()
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
})

// skipUnlessRequired skips a test whose prerequisite is missing, or fails it
// where the prerequisites are required: in CI, which runs on Linux as root.
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

// TestServe starts the plugin as Vault does and calls it with Vault's own
// client. What it responds is tested in e2e.
func TestServe(t *testing.T) {
	t.Parallel()
	tests := map[string][]string{
		"no arguments": nil,
		// Given at registration by habit: they must not keep the plugin from starting.
		"-ca-cert": {"-ca-cert=/" + canary},
		"several":  {"-ca-cert", "/" + canary, canary},
		"-version": {"-version"},
		"-help":    {"-help"},
	}
	for name, args := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var stderr bytes.Buffer
			client := client(&stderr, exec.Command(build(t), args...))
			t.Cleanup(client.Kill)
			protocol, err := client.Client()
			if err != nil {
				t.Fatal(err)
			}
			if got := client.NegotiatedVersion(); got != 5 {
				t.Errorf("protocol version %d, want 5", got)
			}
			if err := protocol.Ping(); err != nil {
				t.Errorf("ping: %v", err)
			}
			raw, err := protocol.Dispense("backend")
			if err != nil {
				t.Fatal(err)
			}
			if _, ok := raw.(logical.Backend); !ok {
				t.Errorf("the plugin is a %T, want a logical.Backend", raw)
			}
			client.Kill()
			if !client.Exited() {
				t.Error("the process has not ended")
			}
			lines := logLines(t, stderr.String())
			if args == nil && len(lines) != 0 {
				t.Errorf("log: %q, want none", &stderr)
			}
			if args != nil && (len(lines) != 1 || lines[0]["@level"] != "warn" || lines[0]["count"] != float64(len(args)) ||
				lines[0]["@message"] != "arguments given at registration ignored: this plugin takes none") {
				t.Errorf("log: %q, want one warning with the number of arguments", &stderr)
			}
			if strings.Contains(stderr.String(), canary) {
				t.Errorf("the log repeats an argument: %q", &stderr)
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

// TestStdout: under Vault the handshake is all that is written to standard
// output: one line, by which the protocol is agreed on.
func TestStdout(t *testing.T) {
	t.Parallel()
	cmd := exec.Command(build(t))
	cmd.Env = underVault("PLUGIN_CLIENT_CERT="+certificate(), "TMPDIR="+t.TempDir())
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timeout := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() })
	defer timeout.Stop()
	var got []byte
	for chunk := make([]byte, 4096); !bytes.ContainsRune(got, '\n'); {
		n, err := stdout.Read(chunk)
		got = append(got, chunk[:n]...)
		if err != nil {
			t.Fatalf("standard output ended with %v: %q", err, got)
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	rest, _ := io.ReadAll(stdout)
	_ = cmd.Wait()
	got = append(got, rest...)
	if line := string(got); !strings.HasPrefix(line, "1|5|") || strings.Count(line, "\n") != 1 || !strings.HasSuffix(line, "\n") || !strings.Contains(line, "|grpc|") {
		t.Errorf("standard output: %q, want one line: the handshake", line)
	}
}

// TestByHand pins what a person sees who runs the plugin in a shell. Arguments
// are never repeated: they may hold anything.
func TestByHand(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		args           []string
		status         int
		stdout, stderr string // what it begins with; "" for nothing at all
	}{
		"no arguments":     {status: 1, stderr: "vault-plugin-secrets-cable " + version.String() + " is a secrets engine for HashiCorp Vault.\n"},
		"unknown argument": {args: []string{canary}, status: 2, stderr: "vault-plugin-secrets-cable takes no arguments but -version and -help"},
		"unknown flag":     {args: []string{"-refresh-key=" + canary}, status: 2, stderr: "vault-plugin-secrets-cable takes no arguments but"},
		"one too many":     {args: []string{"-version", canary}, status: 2, stderr: "vault-plugin-secrets-cable takes no arguments but"},
		"version":          {args: []string{"-version"}, stdout: "vault-plugin-secrets-cable " + version.String() + ", commit "},
		"long version":     {args: []string{"--version"}, stdout: "vault-plugin-secrets-cable " + version.String() + ", commit "},
		"help":             {args: []string{"-help"}, stdout: "vault-plugin-secrets-cable " + version.String() + " is a secrets engine for HashiCorp Vault.\n"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var stdout, stderr strings.Builder
			cmd := exec.Command(build(t), tt.args...)
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			_ = cmd.Run()
			if got := cmd.ProcessState.ExitCode(); got != tt.status {
				t.Errorf("exit status %d, want %d", got, tt.status)
			}
			for _, s := range []struct{ name, got, want string }{{"standard output", stdout.String(), tt.stdout}, {"standard error", stderr.String(), tt.stderr}} {
				if !strings.HasPrefix(s.got, s.want) || s.want == "" && s.got != "" {
					t.Errorf("%s: %q, want %q", s.name, s.got, s.want)
				}
				if strings.Contains(s.got, canary) {
					t.Errorf("%s repeats an argument: %q", s.name, s.got)
				}
			}
			if tt.args != nil && tt.args[0] == "-version" && tt.status == 0 && !strings.HasSuffix(stdout.String(), ", "+runtime.Version()+"\n") {
				t.Errorf("version: %q", &stdout)
			}
			if strings.Contains(stdout.String()+stderr.String(), "is a secrets engine") && !strings.Contains(stdout.String()+stderr.String(), "vault plugin register -sha256=") {
				t.Error("the usage does not say how to register")
			}
		})
	}
}
