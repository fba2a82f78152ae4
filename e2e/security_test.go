// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/vaulttest"
)

// declared counts the functions of the repository by name, with methods as
// "Type.Name", too: those of the product, or those of the tests.
func declared(t *testing.T, ofTests bool) map[string]int {
	t.Helper()
	found := map[string]int{}
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		skipped := regexp.MustCompile(`^(\..+|examples|testdata)$|^(tools|bench|\w+test)$`).FindStringSubmatch(d.Name())
		if d.IsDir() && skipped != nil && d.Name() != ".." && (skipped[1] != "" || !ofTests) {
			return filepath.SkipDir
		}
		isTest := strings.HasSuffix(path, "_test.go")
		if filepath.Ext(path) != ".go" || isTest != ofTests || strings.HasSuffix(path, "_windows.go") {
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		for _, d := range file.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			found[f.Name.Name]++
			if f.Recv != nil {
				receiver := strings.TrimLeft(types.ExprString(f.Recv.List[0].Type), "*")
				found[receiver+"."+f.Name.Name]++
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// TestSecurityPage: each function that docs/security.md names as the one that keeps
// a promise exists, and is the only one of that name; each test that shows it exists;
// and the page's commands do what they say.
func TestSecurityPage(t *testing.T) {
	t.Parallel()
	functions, tests := declared(t, false), declared(t, true)
	_, table, _ := strings.Cut(readFile(t, "../docs/security.md"), "\n## Threats, controls, proof\n")
	table, _, _ = strings.Cut(table, "\n## ")
	rows := 0
	for line := range strings.Lines(table) {
		cells := strings.Split(line, "|")
		if len(cells) < 6 || strings.Contains(line, "---") || strings.Contains(line, "| threat |") {
			continue
		}
		rows++
		for column, of := range map[int]map[string]int{3: functions, 4: tests} {
			names := regexp.MustCompile("`([\\w.]+)`").FindAllStringSubmatch(cells[column], -1)
			if len(names) == 0 {
				t.Errorf("column %d is empty: %s", column, cells[1])
			}
			for _, m := range names {
				if n := of[m[1]]; n == 0 || column == 3 && n > 1 {
					t.Errorf("%s is declared %d times: %s", m[1], n, cells[1])
				}
			}
		}
	}
	if rows < 15 {
		t.Errorf("the table has %d rows", rows)
	}

	s, m := newApplication(t)
	s.runPage("docs/security.md", map[string]step{
		"max-lease-ttl": {
			want: []string{"Success! Tuned"},
			after: func(string) {
				m.ok(t, "POST", "cable/roles/long", map[string]any{"scopes": "person:read", "ttl": "8h"})
				if a := m.ok(t, "GET", "cable/creds/long", nil); a.LeaseDuration > 4*3600 || len(a.Warnings) == 0 {
					t.Errorf("with max_lease_ttl of 4h: %s", a)
				}
			},
		},
	})
}

// TestLogSearches: the searches of Vault's log that the pages show find their lines
// in either log format.
func TestLogSearches(t *testing.T) {
	t.Parallel()
	needVault(t)
	search := named(t, "docs/security.md")["search-log"] + named(t, "docs/runbook.md")["refused"]
	for _, format := range []string{"standard", "json"} {
		v, err := startDevServer(t.TempDir(), "VAULT_LOG_FORMAT="+format, "BAO_LOG_FORMAT="+format)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(v.stop)
		m := newMount(t, v, nil)
		m.configure(t)
		for _, outcome := range []string{"key_rejected", "grant_mismatch"} {
			i := slices.IndexFunc(failures, func(f failure) bool { return f.outcome == outcome })
			m.fail(t, failures[i])
		}
		s := newShell(t, v, nil)
		s.edit = strings.NewReplacer("/var/log/vault/vault.log", v.log)
		out := s.run(search)
		if got := strings.Count(out, "grant_mismatch"); got != 2 || strings.Count(out, "key_rejected") != 1 {
			t.Errorf("%s: the searches find\n%s", format, out)
		}
	}
}

// TestMlock: under a Vault that locks its memory and is not root, the plugin
// starts only with the capability that the runbook gives to its file.
func TestMlock(t *testing.T) {
	t.Parallel()
	needFeature(t, vaulttest.MemoryLock)
	if os.Geteuid() != 0 {
		skipUnlessRequired(t, errors.New("to give a capability to a file and to start a server as another user takes root"))
	}
	for _, program := range []string{"setcap", "setpriv"} {
		if _, err := exec.LookPath(program); err != nil {
			skipUnlessRequired(t, err)
		}
	}
	const nobody = 65534
	dir, err := os.MkdirTemp("", "cable-mlock-") // t.TempDir is behind folders of root alone
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	plugins, data := filepath.Join(dir, "plugins"), filepath.Join(dir, "raft")
	for _, d := range []string{plugins, data} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	plugin, binary := filepath.Join(plugins, pluginName+"-"+pluginVersion), filepath.Join(dir, "vault")
	for from, to := range map[string]string{suite.plugin.File: plugin, suite.vault: binary} {
		if out, err := exec.Command("install", "-m", "0755", from, to).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	config := filepath.Join(dir, "vault.hcl")
	text := fmt.Sprintf(`
plugin_directory = %q
disable_mlock    = false
api_addr         = "http://127.0.0.1:1"
cluster_addr     = "https://127.0.0.1:1"
storage "raft" {
  path    = %q
  node_id = "one"

  performance_multiplier = 1
}
`, plugins, data)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, command := range [][]string{
		{"chmod", "0755", dir},
		{"chown", "-R", fmt.Sprint(nobody), dir},
		{"setcap", "cap_ipc_lock=+ep", binary},
	} {
		if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			skipUnlessRequired(t, fmt.Errorf("%v: %w\n%s", command, err, out)) // such as in a container without that right
		}
	}
	// The listener comes with the address; ulimit, as root's children may lock anything.
	cmd := exec.Command("bash", "-c", `ulimit -l 64
printf 'listener "tcp" {\n  address = "%s"\n  cluster_address = "127.0.0.1:0"\n  tls_disable = true\n}\n' "$1" >> "$2"
exec setpriv --reuid="$3" --regid="$3" --clear-groups "$0" server -log-level=info -config="$2"`, binary, "ADDR", config, fmt.Sprint(nobody))
	cmd.Dir = dir
	v := startByHand(t, cmd)
	var keys struct {
		Keys      []string `json:"keys"`
		RootToken string   `json:"root_token"`
	}
	if err := json.Unmarshal([]byte(v.ok(t, "PUT", "sys/init", map[string]any{"secret_shares": 1, "secret_threshold": 1}).text), &keys); err != nil {
		t.Fatal(err)
	}
	v.root, v.Root = keys.RootToken, keys.RootToken
	v.ok(t, "PUT", "sys/unseal", map[string]any{"key": keys.Keys[0]})
	waitFor(t, 30*time.Second, "the server is active", func() bool { return v.do(t, "GET", "sys/health", nil).status == 200 })
	if err := v.Register(t.Context(), vaulttest.Plugin{Name: pluginName, Version: pluginVersion, File: plugin}); err != nil {
		t.Fatal(err)
	}
	enable := func() *answer {
		return v.do(t, "POST", "sys/mounts/cable", map[string]any{"type": pluginName, "options": map[string]any{}, "config": map[string]any{"plugin_version": pluginVersion}})
	}
	if a := enable(); a.status != 400 || !v.logHas("[ERROR]", "cannot allocate memory") {
		t.Errorf("without the capability: %s", a)
	}

	s := newShell(t, v, nil)
	s.edit = strings.NewReplacer("/etc/vault/plugins", plugins)
	s.run("version=" + pluginVersion)
	for _, b := range blocksOf(t, "docs/runbook.md") {
		if b.id == "docs/runbook.md#Install/2" {
			s.run(b.text)
		}
	}
	if a := enable(); a.status >= 300 {
		t.Errorf("with the capability: %s", a)
	}
	waitFor(t, 10*time.Second, "the plugin responds", func() bool { return v.do(t, "GET", "cable/status", nil).status == 200 })
}
