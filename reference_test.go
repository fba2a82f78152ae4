// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/state"
)

// The tables of docs/reference.md are compared with the code, both ways.

// referenceTable returns the rows of the nth table (from 0) below a heading of docs/reference.md, each as its cells.
func referenceTable(t *testing.T, heading string, nth int) (rows [][]string) {
	t.Helper()
	page, err := os.ReadFile("docs/reference.md")
	must(t, err)
	_, text, found := strings.Cut(string(page), "\n## "+heading+"\n")
	if !found {
		t.Fatalf("docs/reference.md has no heading %q", heading)
	}
	text, _, _ = strings.Cut(text, "\n## ")
	tables := regexp.MustCompile(`(?m)(?:^\|.*\n)+`).FindAllString(text, -1)
	if len(tables) <= nth {
		t.Fatalf("%q has %d tables", heading, len(tables))
	}
	for line := range strings.Lines(tables[nth]) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), " | ")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		rows = append(rows, cells)
	}
	return rows[2:] // without the head
}

// code returns the words in a cell that are set as code.
func code(cell string) (words []string) {
	for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cell, -1) {
		words = append(words, m[1])
	}
	return words
}

// firstCodes returns the words of the first cells, sorted.
func firstCodes(rows [][]string) (words []string) {
	for _, r := range rows {
		words = append(words, code(r[0])...)
	}
	slices.Sort(words)
	return words
}

// engineSource returns the text of the engine's own files.
func engineSource(t *testing.T) string {
	t.Helper()
	var source strings.Builder
	for _, pattern := range []string{"*.go", "internal/*/*.go", "cmd/vault-plugin-secrets-cable/*.go"} {
		files, err := filepath.Glob(pattern)
		must(t, err)
		for _, f := range files {
			if strings.HasSuffix(f, "_test.go") {
				continue
			}
			text, err := os.ReadFile(f)
			must(t, err)
			source.Write(text)
		}
	}
	return regexp.MustCompile(`" \+\n\s*"`).ReplaceAllString(source.String(), "") // texts over several lines
}

// TestReferenceFields checks that the tables of fields have the fields of each path, and the defaults of config.
func TestReferenceFields(t *testing.T) {
	t.Parallel()
	paths := map[string]*framework.Path{}
	for _, p := range newBackend().Paths {
		name, _, _ := strings.Cut(strings.Trim(p.Pattern, "^$"), "(")
		paths[name] = p
	}
	fields := func(name string, ops ...logical.Operation) []string {
		all := map[string]bool{}
		for field := range paths[name].Fields {
			all[field] = true
		}
		for _, op := range ops {
			for field := range paths[name].Operations[op].Properties().Responses[200][0].Fields {
				all[field] = true
			}
		}
		delete(all, "name")
		return slices.Sorted(maps.Keys(all))
	}
	responseFields := func(name string) []string {
		return slices.Sorted(maps.Keys(paths[name].Operations[opRead].Properties().Responses[200][0].Fields))
	}
	for _, tt := range []struct {
		heading string
		table   int
		want    []string
	}{
		{"config", 0, fields("config", opRead)},
		{"roles", 0, fields("roles/")},
		{"creds", 0, fields("creds/")},
		{"creds", 1, responseFields("creds/")},
		{"explain", 0, responseFields("explain/")},
		{"status", 0, responseFields("status")},
	} {
		if diff := cmp.Diff(tt.want, firstCodes(referenceTable(t, tt.heading, tt.table))); diff != "" {
			t.Errorf("%s, table %d (-code +reference):\n%s", tt.heading, tt.table, diff)
		}
	}
	defaults := state.NewConfig()
	want := map[string]string{
		"token_url":       cable.DefaultTokenURL,
		"auth_scheme":     defaults.AuthScheme,
		"request_timeout": defaults.RequestTimeout.String(),
		"disabled":        strconv.FormatBool(defaults.Disabled),
	}
	for _, row := range referenceTable(t, "config", 0) {
		if d, ok := want[code(row[0])[0]]; ok && !slices.Equal(code(row[2]), []string{d}) {
			t.Errorf("the default of %s is %s, and not %s", row[0], d, row[2])
		}
	}
}

// TestReferenceOutcomes checks that the table has each outcome with its HTTP status.
func TestReferenceOutcomes(t *testing.T) {
	t.Parallel()
	want := map[string]string{}
	for _, o := range outcome.All() {
		want[string(o)] = strconv.Itoa(o.Status())
	}
	got := map[string]string{}
	for _, row := range referenceTable(t, "Outcomes", 0) {
		got[code(row[0])[0]] = row[1]
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("outcomes and statuses (-code +reference):\n%s", diff)
	}
}

// TestReferenceMetrics checks that the table has each metric of the engine's own, with its labels and its type.
func TestReferenceMetrics(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.read("creds/ci")
	want := map[string]string{}
	for name, family := range m.families() {
		name, ok := strings.CutPrefix(name, "vault_cable_")
		if !ok {
			continue
		}
		labels := map[string]bool{}
		for _, l := range family.GetMetric()[0].GetLabel() {
			labels[l.GetName()] = true
		}
		want[name+strings.Join(slices.Sorted(maps.Keys(labels)), ",")] = strings.ToLower(family.GetType().String())
	}
	got := map[string]string{}
	for _, row := range referenceTable(t, "Metrics", 0) {
		name, labels, _ := strings.Cut(strings.TrimSuffix(code(row[0])[0], "}"), "{")
		sorted := strings.Split(labels, ",")
		slices.Sort(sorted)
		got[name+strings.Join(sorted, ",")] = row[1]
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("metrics with labels, and types (-code +reference):\n%s", diff)
	}
}

// TestReferenceWords checks that the source has each phrase and field of the log that the reference names. That the
// reference has each phrase is TestLogIsDocumented.
func TestReferenceWords(t *testing.T) {
	t.Parallel()
	source := engineSource(t)
	var words []string
	for _, row := range referenceTable(t, "Logs", 0) {
		words = append(words, code(row[1])...)
	}
	words = append(words, firstCodes(referenceTable(t, "Logs", 1))...)
	for _, w := range words {
		if !strings.Contains(source, strconv.Quote(w)) {
			t.Errorf("the engine has no %q", w)
		}
	}
}

// TestReferenceErrors checks that the source has each text of the table of errors.
func TestReferenceErrors(t *testing.T) {
	t.Parallel()
	source := engineSource(t)
	for _, row := range referenceTable(t, "Errors", 0) {
		for _, text := range code(row[1]) {
			// The source has a verb in place of the status.
			fixed := regexp.MustCompile(`responded [0-9]{3}$`).ReplaceAllString(text, "responded %d")
			fixed = strings.Replace(fixed, "must not be empty", "must not be %s", 1)
			if !strings.Contains(strings.ReplaceAll(source, `\"`, `"`), fixed) {
				t.Errorf("the engine has no error with %q", text)
			}
		}
	}
}
