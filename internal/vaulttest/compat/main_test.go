// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestRow checks that the output of go test -json becomes a row, in place of the
// server's last one or as a new one.
func TestRow(t *testing.T) {
	t.Parallel()
	good := [][3]string{
		{"start", "", ""},
		{"run", "TestA", ""},
		{"run", "TestA/one", ""},
		{"output", "TestA/one", "    a_test.go:12: not | here\n"},
		{"output", "TestA/one", "--- SKIP: TestA/one (0.00s)\n"},
		{"skip", "TestA/one", ""},
		{"run", "TestA/HTTP/2", ""},
		{"pass", "TestA/HTTP/2", ""},
		{"pass", "TestA", ""},
		{"run", "TestB", ""},
		{"output", "TestB", "    b_test.go:1: fine\n"},
		{"pass", "TestB", ""},
	}
	bad := slices.Concat(good, [][3]string{
		{"run", "TestC", ""},
		{"run", "TestC/deep", ""},
		{"output", "TestC/deep", "    c_test.go:1: wrong\n"},
		{"fail", "TestC/deep", ""},
		{"fail", "TestC", ""},
		{"fail", "", ""},
	})
	day := time.Date(2026, 11, 25, 23, 0, 0, 0, time.UTC)
	const page = "# Page\n\n| a |\n| --- |\n| Vault 1.0 | old |\n| Vault 1.0.1 | old |\n\nEnd\n"
	for name, tt := range map[string]struct {
		events               [][3]string // Action, Test, Output
		server, want, output string
	}{
		"passes": {
			good, "Vault 1.0", strings.Replace(page, "| Vault 1.0 | old |",
				"| Vault 1.0 | 2026-11-25 | Ada | 2 | 2 | 0 | 1 | `TestA/one`: not \\| here |", 1),
			"",
		},
		"fails": {
			bad, "OpenBao 2.6.2", strings.Replace(page, "\n\nEnd",
				"\n| OpenBao 2.6.2 | 2026-11-25 | Ada | 3 | 2 | **1**: `TestC/deep` | 1 |"+
					" `TestA/one`: not \\| here |\n\nEnd", 1),
			"    c_test.go:1: wrong\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var printed, output strings.Builder
			for _, e := range tt.events {
				fmt.Fprintf(&printed, `{"Action": %q, "Test": %q, "Output": %q}`+"\n", e[0], e[1], e[2])
			}
			r, err := read(strings.NewReader(printed.String()), &output)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, setRow(page, r.row(tt.server, day, "Ada"))); diff != "" {
				t.Errorf("the page (-want +got):\n%s", diff)
			}
			if output.String() != tt.output {
				t.Errorf("printed %q, want %q", &output, tt.output)
			}
		})
	}
}

// TestRunBy checks that the name that was given comes first, and a workflow's run next.
func TestRunBy(t *testing.T) {
	t.Parallel()
	env := map[string]string{}
	get := func(name string) string { return env[name] }
	if got := runBy(t.Context(), get); got == "" || strings.Contains(got, "workflow") {
		t.Errorf("by hand: %q", got)
	}
	env["GITHUB_RUN_ID"], env["GITHUB_WORKFLOW"] = "42", "compat"
	env["GITHUB_SERVER_URL"], env["GITHUB_REPOSITORY"] = "https://forge.example.com", "a/b"
	const want = "[workflow compat](https://forge.example.com/a/b/actions/runs/42)"
	if got := runBy(t.Context(), get); got != want {
		t.Errorf("in a workflow: %q, want %q", got, want)
	}
	if env["COMPAT_BY"] = "Ada"; runBy(t.Context(), get) != "Ada" {
		t.Errorf("with COMPAT_BY: %q", runBy(t.Context(), get))
	}
}
