// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"io/fs"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestSecurityPage: each test that docs/security.md names as a proof exists, and
// its commands do what they say.
func TestSecurityPage(t *testing.T) {
	t.Parallel()
	tests := map[string]bool{}
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && strings.HasPrefix(d.Name(), ".") && d.Name() != ".." {
			return filepath.SkipDir
		}
		if strings.HasSuffix(path, "_test.go") {
			for _, m := range regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`).FindAllStringSubmatch(readFile(t, path), -1) {
				tests[m[1]] = true
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(readFile(t, "../docs/security.md"), "\n## Threats, controls, proof\n")
	table, _, _ = strings.Cut(table, "\n## ")
	rows := 0
	for line := range strings.Lines(table) {
		cells := strings.Split(line, "|")
		if len(cells) < 5 || strings.Contains(line, "---") || strings.Contains(line, "| threat |") {
			continue
		}
		rows++
		named := regexp.MustCompile("`((?:Test|Fuzz)\\w+)`").FindAllStringSubmatch(cells[3], -1)
		if len(named) == 0 {
			t.Errorf("no test proves: %s", cells[1])
		}
		for _, m := range named {
			if !tests[m[1]] {
				t.Errorf("the page names the test %s, which does not exist", m[1])
			}
		}
	}
	if rows < 10 {
		t.Errorf("the table has %d rows", rows)
	}

	s, m := newApplication(t)
	s.runPage("docs/security.md", map[string]step{
		"Hardening/1": {
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
