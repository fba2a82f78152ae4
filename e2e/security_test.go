// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"io/fs"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// declared counts the functions of the repository by name, with methods as
// "Type.Name", too. It counts the product's functions, or those of the tests.
func declared(t *testing.T, ofTests bool) map[string]int {
	t.Helper()
	found := map[string]int{}
	function := regexp.MustCompile(`(?m)^func (?:\(\w+ \*?(\w+)(?:\[.*\])?\) )?(\w+)`)
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
		for _, m := range function.FindAllStringSubmatch(readFile(t, path), -1) {
			found[m[2]]++
			if m[1] != "" {
				found[m[1]+"."+m[2]]++
			}
		}
		return nil
	})
	noError(t, err)
	return found
}

// TestKeptBy checks the tables of the documents that say where each promise is kept
// and shown: each function exists, and is the only one of that name; each test exists.
func TestKeptBy(t *testing.T) {
	t.Parallel()
	functions, tests := declared(t, false), declared(t, true)
	for page, want := range map[string]int{"docs/security.md": 15, "docs/design.md": 15} {
		_, table, _ := strings.Cut(readFile(t, "../"+page), " | kept by | shown by |\n")
		table, _, _ = strings.Cut(table, "\n\n")
		rows := strings.Split(table, "\n")[1:]
		if len(rows) < want {
			t.Errorf("%s: the table has %d rows", page, len(rows))
		}
		for _, row := range rows {
			cells := strings.Split(row, " | ")
			for i, of := range []map[string]int{functions, tests} {
				names := regexp.MustCompile("`([\\w.]+)`").FindAllStringSubmatch(cells[len(cells)-2+i], -1)
				if len(names) == 0 {
					t.Errorf("%s: no function, or no test: %s", page, row)
				}
				for _, m := range names {
					if n := of[m[1]]; n == 0 || i == 0 && n > 1 {
						t.Errorf("%s: %s is declared %d times: %s", page, m[1], n, cells[0])
					}
				}
			}
		}
	}
}

// TestSecurityPage runs the commands of docs/security.md.
func TestSecurityPage(t *testing.T) {
	t.Parallel()
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

// TestLogSearches checks that the searches of Vault's log on the pages find their
// lines in either log format.
func TestLogSearches(t *testing.T) {
	t.Parallel()
	search := named(t, "docs/security.md")["search-log"] + named(t, "docs/runbook.md")["refused"]
	for _, format := range []string{"standard", "json"} {
		v := ownServer(t, "VAULT_LOG_FORMAT="+format, "BAO_LOG_FORMAT="+format)
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
