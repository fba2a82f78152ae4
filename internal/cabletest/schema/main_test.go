// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// TestSchema compares a document that fits, and documents that differ in one place each,
// from a file and over HTTP.
func TestSchema(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("testdata/openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	const none, added = `Cable's document has no `, `Cable's document has `
	for _, tt := range []struct {
		old, changed string
		want         []string // the beginning of each sentence
	}{
		{"", "", nil},
		{
			"300 to 86400",
			"60 to 86400",
			[]string{`"request.expiry_seconds" is "integer, required, format int64, 86400"; ` +
				`the engine assumes "integer, required, format int64, 300, 86400".`},
		},
		{
			"from 300",
			`", "minimum": 600, "title": "`,
			[]string{`"request.expiry_seconds" is "integer, required, format int64, minimum 600"`},
		},
		{
			`_name": {"type": "string"`,
			`_name": {"type": ["string", "null"]`,
			[]string{`"200.organization_name" is "[string null], required"`},
		},
		{
			`"token": {`,
			`"id": {"type": "string"}, "token": {`,
			[]string{added + `"200.id", which is new to the engine: "string".`},
		},
		{
			`"message": {"type": "string"},`,
			"",
			[]string{none + `"401.message"; the engine assumes "string, required".`, none + `"429.`, none + `"500.`},
		},
		{`_name"]`, `_name", "scopes"]`, []string{`"200.scopes" is "object, required"`}},
		{
			"transactions:",
			"payments:",
			[]string{`"200.scopes.scopes" is "array, required, payments:write"`, `"request.scopes.scopes" is`},
		},
		{`"200": {`, `"202": {}, "200": {`, []string{added + `"202", which is new to the engine: "no content".`}},
		{
			"api.cable",
			"eu.cable",
			[]string{none + `"server https://api.cable.tech"`, added + `"server https://eu.cable.tech"`},
		},
		{`"Authorization"`, `"X-Key"`, []string{none + `"header Authorization"`, added + `"header X-Key"`}},
		{"/v2/auth", "/v3/auth", []string{"the document has no POST /v2/auth/token"}},
		{"{", "<", []string{"openapi.json is not JSON"}},
	} {
		t.Run(tt.changed, func(t *testing.T) {
			t.Parallel()
			changed := string(text)
			if tt.old != "" {
				changed = strings.ReplaceAll(changed, tt.old, tt.changed)
			}
			file := filepath.Join(t.TempDir(), "openapi.json")
			if err := os.WriteFile(file, []byte(changed), 0o600); err != nil {
				t.Fatal(err)
			}
			server := httptest.NewServer(http.FileServer(http.Dir(filepath.Dir(file))))
			t.Cleanup(server.Close)
			for _, source := range []string{file, server.URL + "/openapi.json"} {
				got, err := run(t.Context(), source)
				if err != nil {
					got = append(got, strings.TrimPrefix(err.Error(), strings.TrimSuffix(source, "openapi.json")))
				}
				for i, want := range tt.want {
					if i >= len(got) || !strings.HasPrefix(got[i], want) {
						t.Errorf("%s: sentence %d of %q, want %q", source, i, got, want)
					}
				}
				if len(got) != len(tt.want) {
					t.Errorf("%s: %d sentences, want %d: %q", source, len(got), len(tt.want), got)
				}
			}
			if _, err := run(t.Context(), server.URL+"/none"); err == nil {
				t.Error("a 404 is no error")
			}
		})
	}
	limits := fmt.Sprintf(" %d, %d\n", cabletest.MinExpirySeconds, cabletest.MaxExpirySeconds)
	if !strings.Contains(assumed, "request.expiry_seconds: integer, required, format int64,"+limits) {
		t.Errorf("testdata/assumed.txt has not the limits%s", limits)
	}
}
