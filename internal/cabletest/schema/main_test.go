// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// TestSchema compares a document that fits, and documents that differ in one place each.
func TestSchema(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("testdata/openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	const none, added = `Cable's document has no `, `Cable's document has a new `
	const lifetime = `"request.expiry_seconds" is "integer, required, format int64, `
	for _, tt := range []struct{ old, changed, want string }{ // want has the beginning of each sentence
		{"openapi", "openapi", ""},
		{"300 to", "60 to", lifetime + `86400"; the engine assumes "`},
		{`"int64", "d`, `"int64", "minimum": 9, "d`, lifetime + `minimum 9, 300, 86400"; `},
		{`_name": {"type": "string"`, `_name": {"type": "null"`, `"200.organization_name" is "null, required"`},
		{`"token": {`, `"id": {"type": "string"}, "token": {`, added + `"200.id": "string".`},
		{`, "message": {"type": "string"},`, ",", none + `"401.message"; the engine assumes "string, required".` +
			"\n" + none + `"429.message"` + "\n" + none + `"500.message"`},
		{`_name"]`, `_name", "scopes"]`, `"200.scopes" is "object, required"; the engine assumes "object".`},
		{"transactions:", "a:", `"200.scopes.scopes" is "array, required, a:w` + "\n" + `"request.scopes.scopes" is "`},
		{`"200": {`, `"202": {}, "200": {`, added + `"202 content": "".`},
		{"//api", "//eu", none + `"server https://api.cable.tech"` + "\n" + added + `"server https://eu.cable.tech"`},
		{`"Authorization"`, `"X-Key"`, none + `"header Authorization"` + "\n" + added + `"header X-Key"`},
		{"/v2/auth", "/v3/auth", "the document has no POST /v2/auth/token"},
		{"{", "<", "the document is not JSON"},
	} {
		got, err := run(strings.NewReader(strings.ReplaceAll(string(text), tt.old, tt.changed)))
		if err != nil {
			got = append(got, err.Error())
		}
		want := strings.FieldsFunc(tt.want, func(r rune) bool { return r == '\n' })
		fits := len(got) == len(want)
		for i := 0; fits && i < len(want); i++ {
			fits = strings.HasPrefix(got[i], want[i])
		}
		if !fits {
			t.Errorf("with %s for %s:\n%s\nwant\n%s", tt.changed, tt.old, strings.Join(got, "\n"), tt.want)
		}
	}
	limits := fmt.Sprintf("format int64, %d, %d\n", cabletest.MinExpirySeconds, cabletest.MaxExpirySeconds)
	if !strings.Contains(assumed, limits) {
		t.Errorf("testdata/assumed.txt has not %q", limits)
	}
}
