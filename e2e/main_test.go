// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Package e2e tests the engine as it runs in the field. A real Vault server starts
// the real plugin process, which talks to the simulator of Cable's API over HTTP.
//
// The transcripts in testdata/script show the commands that a person types; the Go
// tests count and time. Most share one Vault server in dev mode, where each has a
// mount and a simulator of its own. At the end of each, canary_test.go searches
// the logs for secrets.
//
// A Vault server is found or built by scripts/vault. If that fails, or with
// -short, the tests are skipped. So are tests that need a tool that is neither
// installed nor built yet. With E2E=require in the environment, as in make check,
// all of them fail instead.
package e2e

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/vaulttest"
)

// pluginName is the name of the binary, and of the plugin in Vault's catalog.
const pluginName = "vault-plugin-secrets-cable"

// pluginVersion is stamped into the plugin that these tests build.
const pluginVersion = "v0.0.1-e2e"

var update = flag.Bool("update", false, "rewrite the golden files")

// suite is shared by the tests. It is a folder with the programs made in it.
var suite struct {
	ctx   context.Context // its end kills all servers
	dir   string          // removed at the end
	bin   string          // a folder with vault, to stand first in PATH
	vault string          // the server's binary

	product vaulttest.Product // of that binary
	version string

	plugins string           // the folder with the plugin
	plugin  vaulttest.Plugin // as these tests build it
	sha256  string           // the plugin's sum

	shared func() (*vaultServer, error) // starts the one server on first use
}

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(runTests(m))
}

// runTests is TestMain in a function whose deferred calls run before os.Exit.
func runTests(m *testing.M) (status int) {
	dir, err := os.MkdirTemp("", "cable-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	defer os.RemoveAll(dir)
	suite.dir = dir
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	suite.ctx = ctx
	if !required() { // make test builds no tool that it finds missing
		_ = os.Setenv("NO_BUILD", "1")
	}
	var server *vaultServer
	suite.shared = sync.OnceValues(func() (*vaultServer, error) {
		v := new(vaultServer)
		err := v.startDev(filepath.Join(dir, "shared"))
		if err == nil {
			server = v
		}
		return v, err
	})
	// A test binary that runs into its -timeout ends without clean-up, so the
	// servers are ended shortly before that.
	if d := flag.Lookup("test.timeout").Value.(flag.Getter).Get().(time.Duration); d > 0 {
		defer time.AfterFunc(d-3*time.Second, func() {
			cancel()
			_ = os.RemoveAll(dir)
		}).Stop()
	}
	status = m.Run()
	if server != nil {
		metrics := request{method: "GET", path: "sys/metrics?format=prometheus", token: server.root}
		switch a, err := server.call(metrics); {
		case err != nil || a.status != 200:
			fmt.Fprintln(os.Stderr, "e2e: reading Vault's metrics:", a, err)
			status = 1
		case findSecret(a.text, false) != "":
			fmt.Fprintln(os.Stderr, "e2e: Vault's metrics contain", findSecret(a.text, false))
			status = 1
		}
		server.stop()
		// The last lines of all, which no test waited for.
		for _, leak := range server.leaks(position{}) {
			fmt.Fprintln(os.Stderr, "e2e: after all tests:", leak)
			status = 1
		}
	}
	return status
}

// required reports whether missing prerequisites are a failure.
func required() bool { return os.Getenv("E2E") == "require" }

// findVault finds the server or builds it, once.
var findVault = sync.OnceValue(func() (err error) {
	if suite.vault, err = vaulttest.Find(suite.ctx); err == nil {
		suite.product, suite.version, err = vaulttest.Identify(suite.ctx, suite.vault)
	}
	return err
})

// prepare builds the plugin, and makes the folders for it and for PATH, once.
var prepare = sync.OnceValue(func() (err error) {
	suite.bin = filepath.Join(suite.dir, "bin")
	suite.plugins = filepath.Join(suite.dir, "plugins")
	if err := os.Mkdir(suite.bin, 0o700); err != nil {
		return err
	}
	if err := os.Symlink(suite.vault, filepath.Join(suite.bin, "vault")); err != nil {
		return err
	}
	if suite.plugin, err = vaulttest.Build(suite.ctx, suite.plugins, "cmd/"+pluginName, pluginVersion); err != nil {
		return err
	}
	suite.sha256, err = suite.plugin.Sum()
	return err
})

// run returns the standard output of a program.
func run(name string, args ...string) (string, error) {
	var stderr strings.Builder
	cmd := exec.Command(name, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, &stderr)
	}
	return string(out), nil
}

// findTool returns the folder with the programs that tools/NAME pins, which
// scripts/tool builds once.
func findTool(name string) (dir string, err error) {
	out, err := run("../scripts/tool", name)
	return strings.TrimSpace(out), err
}

// needTool is findTool for a test that cannot do without.
func needTool(t testing.TB, name string) (dir string) {
	t.Helper()
	dir, err := findTool(name)
	if err != nil {
		skipUnlessRequired(t, err)
	}
	return dir
}

// needExamples skips a test of an example whose consumer takes minutes to build
// or has to be installed. `make examples` runs them all.
func needExamples(t testing.TB) {
	t.Helper()
	if os.Getenv("EXAMPLES") != "all" {
		t.Skip("`make examples` runs it, because its consumer takes minutes to build or has to be installed")
	}
}

// skipUnlessRequired skips a test whose prerequisite is missing, for the reason
// in err, or fails it if prerequisites are required.
func skipUnlessRequired(t testing.TB, err error) {
	t.Helper()
	if required() {
		t.Fatalf("E2E=require: %v", err)
	}
	t.Skip(err)
}

// needVault skips the test if there is no Vault, or fails it if one is required.
func needVault(t testing.TB) {
	t.Helper()
	if testing.Short() && !required() {
		t.Skip("-short: no Vault server is started")
	}
	if err := findVault(); err != nil {
		skipUnlessRequired(t, err)
	}
	noError(t, prepare())
}

// lacks returns why the tests of a feature do not apply to the server, or "".
func lacks(f vaulttest.Feature) string { return suite.product.Lacks(suite.version, f) }

// needFeature skips a test, or part of one, that does not apply to the server.
func needFeature(t testing.TB, f vaulttest.Feature) {
	t.Helper()
	needVault(t)
	if reason := lacks(f); reason != "" {
		t.Skip(reason)
	}
}

// sharedServer returns the server that most tests share.
func sharedServer(t testing.TB) *vaultServer {
	t.Helper()
	needVault(t)
	v, err := suite.shared()
	noError(t, err)
	return v
}

// noError ends the test if there is an error.
func noError(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func readFile(t testing.TB, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	noError(t, err)
	return string(data)
}

func writeFile(t testing.TB, path, text string) {
	t.Helper()
	noError(t, os.WriteFile(path, []byte(text), 0o600))
}

// waitFor polls until done returns true.
func waitFor(t testing.TB, limit time.Duration, event string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !done(); time.Sleep(pollInterval) {
		if time.Now().After(end) {
			t.Fatalf("waited %s in vain: %s", limit, event)
		}
	}
}

// pollInterval is the time between two looks at something that is to happen.
const pollInterval = 50 * time.Millisecond
