// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"encoding/json"
	"fmt"
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
		if err := os.WriteFile(path, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
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

// TestPathHelp pins the output of `vault path-help`, as for a mount at cable.
func TestPathHelp(t *testing.T) {
	t.Parallel()
	m := newMount(t, sharedServer(t), nil)
	for path, name := range map[string]string{
		"":         "help.txt",
		"/config":  "help-config.txt",
		"/roles":   "help-roles.txt",
		"/roles/x": "help-role.txt",
		"/creds/x": "help-creds.txt",
		"/status":  "help-status.txt",
		"/metrics": "help-metrics.txt",
	} {
		golden(t, name, strings.ReplaceAll(m.cli(t, "path-help", m.path+path), m.path, "cable"))
	}
}

// openAPI is the part of an OpenAPI document that describes a mount.
type openAPI struct {
	Paths      map[string]map[string]any `json:"paths"`
	Components any                       `json:"components"`
}

// compact returns v as JSON, with each value that fits on one line there.
func compact(t *testing.T, v any, indent string) string {
	t.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &v); err != nil { // maps and lists alone
		t.Fatal(err)
	}
	var lines []string
	switch v := v.(type) {
	case map[string]any:
		if len(indent)+len(text) <= 110 {
			break
		}
		for _, key := range slices.Sorted(maps.Keys(v)) {
			lines = append(lines, fmt.Sprintf("%s  %q: %s", indent, key, compact(t, v[key], indent+"  ")))
		}
		return "{\n" + strings.Join(lines, ",\n") + "\n" + indent + "}"
	case []any:
		if len(indent)+len(text) <= 110 {
			break
		}
		for _, e := range v {
			lines = append(lines, indent+"  "+compact(t, e, indent+"  "))
		}
		return "[\n" + strings.Join(lines, ",\n") + "\n" + indent + "]"
	}
	return string(text)
}

// TestOpenAPI pins the mount's OpenAPI document, from which clients are
// generated.
//
// NOTE: Vault's own document, of all mounts, has the paths of external plugins
// without the references to their schemas. So only the paths are looked up there.
func TestOpenAPI(t *testing.T) {
	t.Parallel()
	m := newMount(t, sharedServer(t), nil)
	var help struct {
		OpenAPI openAPI `json:"openapi"`
	}
	if err := json.Unmarshal([]byte(m.ok(t, "GET", m.path+"/?help=1", nil).text), &help); err != nil {
		t.Fatal(err)
	}
	golden(t, "openapi.json", strings.ReplaceAll(compact(t, map[string]any{
		"paths": help.OpenAPI.Paths, "components": help.OpenAPI.Components,
	}, ""), m.path, "cable")+"\n")

	operations := map[string]string{}
	for path, methods := range help.OpenAPI.Paths {
		for method, v := range methods {
			operation, _ := v.(map[string]any)
			id, _ := operation["operationId"].(string)
			if id == "" {
				continue // not a method
			}
			if other := operations[id]; other != "" {
				t.Errorf("%s %s and %s share the operation id %q: an OpenAPI document must not", method, path, other,
					id)
			}
			operations[id] = method + " " + path
		}
	}
	if len(operations) == 0 {
		t.Error("no operation was found")
	}

	var all openAPI
	if err := json.Unmarshal([]byte(m.ok(t, "GET", "sys/internal/specs/openapi", nil).text), &all); err != nil {
		t.Fatal(err)
	}
	want := []string{"config", "creds/{name}", "metrics", "roles/", "roles/{name}", "status"}
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
