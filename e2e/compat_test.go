// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestCompatibilityPage checks that the table of docs/compatibility.md, which make
// compat writes, has the Vault servers that make compat builds, and so has the workflow.
func TestCompatibilityPage(t *testing.T) {
	t.Parallel()
	list := func(file, expr string) (servers []string) {
		t.Helper()
		for _, m := range regexp.MustCompile(`(?m)`+expr).FindAllStringSubmatch(readFile(t, file), -1) {
			servers = append(servers, m[1])
		}
		return servers
	}
	want := list("../scripts/compat", `^  ([\d.]+)=[\d.]+$`)
	if len(want) < 5 {
		t.Fatalf("scripts/compat has the servers %q", want)
	}
	if diff := cmp.Diff(want, list("../docs/compatibility.md", `^\| Vault (\S+) \|`)); diff != "" {
		t.Errorf("servers (-scripts/compat +docs/compatibility.md):\n%s", diff)
	}
	matrix := list("../.github/workflows/scheduled.yml", `^ +server: \[(.*)\]$`)
	if diff := cmp.Diff(want, strings.Split(strings.Join(matrix, ""), ", ")); diff != "" {
		t.Errorf("servers (-scripts/compat +scheduled.yml):\n%s", diff)
	}
	pinned := list("../tools/vault/go.mod", `^require github.com/hashicorp/vault v(.*)$`)
	contains(t, readFile(t, "../docs/compatibility.md"), "Vault "+strings.Join(pinned, "")+".")
}
