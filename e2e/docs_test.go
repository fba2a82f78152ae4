// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// golden compares got with a file of testdata/golden, or with -update writes it.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", "golden", name)
	if *update {
		noError(t, os.WriteFile(path, []byte(got), 0o600))
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v: go test ./e2e -run %s -update writes it", err, t.Name())
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s\nIf this is meant: go test ./e2e -run %s -update", path, diff, t.Name())
	}
}

// TestPathHelp pins the output of `vault path-help` for a mount at cable, and for one of
// its paths. TestOpenAPI pins the texts of all fields and operations.
func TestPathHelp(t *testing.T) {
	t.Parallel()
	m := newMount(t, sharedServer(t), nil)
	for path, name := range map[string]string{"": "help.txt", "/creds/x": "help-creds.txt"} {
		golden(t, name, strings.ReplaceAll(m.cli(t, "path-help", m.path+path), m.path, "cable"))
	}
}

// openAPI is the part of an OpenAPI document that describes a mount.
type openAPI struct {
	Paths      map[string]map[string]any
	Components struct{ Schemas map[string]any }
}

// TestOpenAPI pins the mount's OpenAPI document, from which clients are generated, with
// one line for each operation and each schema.
//
// NOTE: Vault's own document, of all mounts, has the paths of external plugins
// without the references to their schemas. So only the paths are looked up there.
func TestOpenAPI(t *testing.T) {
	t.Parallel()
	m := newMount(t, sharedServer(t), nil)
	var help struct{ OpenAPI openAPI }
	noError(t, json.Unmarshal([]byte(m.ok(t, "GET", m.path+"/?help=1", nil).text), &help))
	var lines []string
	add := func(name string, v any) {
		text, err := json.Marshal(v)
		noError(t, err)
		lines = append(lines, name+" "+string(text))
	}
	for name, schema := range help.OpenAPI.Components.Schemas {
		add(name, schema)
	}
	operations := map[string]string{}
	for path, methods := range help.OpenAPI.Paths {
		for method, v := range methods {
			add(path+" "+method, v)
			operation, _ := v.(map[string]any)
			id, _ := operation["operationId"].(string)
			if id == "" {
				continue // not a method
			}
			if other := operations[id]; other != "" {
				t.Errorf("%s %s and %s have the same operationId %q", method, path, other, id)
			}
			operations[id] = method + " " + path
		}
	}
	slices.Sort(lines)
	golden(t, "openapi.txt", strings.ReplaceAll(strings.Join(lines, "\n"), m.path, "cable")+"\n")

	var all openAPI
	noError(t, json.Unmarshal([]byte(m.ok(t, "GET", "sys/internal/specs/openapi", nil).text), &all))
	want := []string{"config", "creds/{name}", "explain/{name}", "metrics", "roles/", "roles/{name}", "status"}
	var got []string
	for _, path := range slices.Sorted(maps.Keys(all.Paths)) {
		if name, ok := strings.CutPrefix(path, "/"+m.path+"/"); ok {
			got = append(got, name)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the mount's paths in Vault's document (-want +got):\n%s", diff)
	}
}
