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
	return must(binary())(t)
}

// must returns the value of a call that has no error: must(call())(t).
func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		check(t, err)
		return v
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
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
	var err error
	if buildDir, err = os.MkdirTemp("", "cable-plugin-"); err == nil {
		err = os.Chmod(buildDir, 0o755) // for the test that has another user
	}
	if err != nil {
		panic(err)
	}
	status := m.Run()
	_ = os.RemoveAll(buildDir)
	os.Exit(status)
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

// connect connects client to its plugin, which ends with the test.
func connect(t *testing.T, stderr io.Writer, cmd *exec.Cmd) (*goplugin.Client, goplugin.ClientProtocol) {
	t.Helper()
	c := client(stderr, cmd)
	t.Cleanup(c.Kill)
	return c, must(c.Client())(t)
}

// run runs a program, for at most 20 seconds, and returns its output and exit status.
func run(cmd *exec.Cmd) (stdout, stderr string, status int) {
	var out, errOut strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Start(); err != nil {
		return "", err.Error(), -1
	}
	timeout := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() })
	defer timeout.Stop()
	_ = cmd.Wait()
	return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
}

// underVault is the environment that Vault's go-plugin gives to a plugin, but for the certificate.
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

// needProgram skips a test that needs a program that is not there, or fails with args.
func needProgram(t *testing.T, name string, args ...string) {
	t.Helper()
	_, err := exec.LookPath(name)
	if err == nil && args != nil {
		err = exec.Command(name, args...).Run()
	}
	if err != nil {
		skipUnlessRequired(t, fmt.Sprintf("%s: %v", name, err))
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
			client, protocol := connect(t, &stderr, exec.Command(build(t), args...))
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
			want := ""
			if args != nil {
				want = fmt.Sprintf(`{"@level":"warn","@message":"arguments given at registration ignored: `+
					`this plugin takes none","count":%d}`+"\n", len(args))
			}
			timestamp := regexp.MustCompile(`,"@timestamp":"[^"]+"`)
			if got := timestamp.ReplaceAllString(stderr.String(), ""); got != want {
				t.Errorf("log: %q, want %q", got, want)
			}
			if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
				t.Errorf("installed under a server: %v, %v", entries, err)
			}
		})
	}
}

// logLines decodes the lines of the structured logger, and fails if there is any other text.
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

// TestStdout checks that under Vault the plugin writes one line to standard output, the handshake.
func TestStdout(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, build(t))
	cmd.Env = underVault("PLUGIN_CLIENT_CERT="+certificate(), "TMPDIR="+t.TempDir())
	reader := bufio.NewReader(must(cmd.StdoutPipe())(t))
	check(t, cmd.Start())
	got, err := reader.ReadString('\n')
	cancel()
	more, _ := io.ReadAll(reader)
	_ = cmd.Wait()
	if got += string(more); err != nil || !regexp.MustCompile(`^1\|5\|.*\|grpc\|.*\n$`).MatchString(got) {
		t.Errorf("standard output: %q (%v), want the handshake, in one line", got, err)
	}
}

// TestByHand pins the output in a shell. Wrong arguments are never repeated, because they may contain anything.
func TestByHand(t *testing.T) {
	t.Parallel()
	const (
		isEngine = "vault-plugin-secrets-cable " + testVersion + " is a secrets engine for HashiCorp Vault.\n"
		isBuild  = "vault-plugin-secrets-cable " + testVersion + ", commit "
		wrong    = "vault-plugin-secrets-cable takes no arguments but -version, -help and -install DIR: "
	)
	type byHandTest struct {
		args           []string
		status         int
		stdout, stderr string // the beginning of the output; "" for none at all
	}
	tests := []byHandTest{
		{nil, 1, "", isEngine},
		{[]string{"-help"}, 0, isEngine, ""},
		{[]string{"-h"}, 0, isEngine, ""},
		{[]string{"-version"}, 0, isBuild, ""},
		{[]string{"--version"}, 0, isBuild, ""},
	}
	for _, args := range [][]string{
		{canary},
		{"-refresh-key=" + canary},
		{"-version", canary},
		{"-version=" + canary},
		{"-help", canary},
		{"-install"},
		{"-install="},
		{"-install", ""}, // of a variable that is not set
		{"-install", "/nonexistent", canary},
		{"-install", "/nonexistent", "-version"},
	} {
		tests = append(tests, byHandTest{args, 2, "", wrong})
	}
	for _, tt := range tests {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			t.Parallel()
			stdout, stderr, status := run(exec.Command(build(t), tt.args...))
			if status != tt.status {
				t.Errorf("exit status %d, want %d", status, tt.status)
			}
			for _, output := range [][2]string{{stdout, tt.stdout}, {stderr, tt.stderr}} {
				text, want := output[0], output[1]
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
