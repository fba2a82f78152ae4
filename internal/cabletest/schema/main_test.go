// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"fmt"
	"strings"
	"testing"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// TestSchema compares the assumed document with one that says the same with a reference in
// another place, and with documents that differ in one place each.
func TestSchema(t *testing.T) {
	t.Parallel()
	const lifetime = "requestBody.content.application/json.schema.properties.expiry_seconds"
	const ok = "responses.200.content.application/json.schema"
	for _, tt := range []struct{ old, changed, want string }{ // want has the beginning of each sentence
		{`{"$ref": "#/components/responses/Failed"}`, `{"description": "No.", "content": {"application/json": {"schema":
			{"$ref": "#/components/responses/Failed/content/application~1json/schema"}}}}`, ""},
		{`"organization_id", "scopes"]`, `"scopes", "organization_id"]`, ""},
		{"300 to", "60 to", lifetime + `.description is "86400": the engine assumes "300, 86400".`},
		{`"int64", "d`, `"int64", "minimum": 9, "d`, "Cable's document has " + lifetime + `.minimum, which is new`},
		{`"token": {"type": "string"`, `"token": {"type": "null"`, ok + `.properties.token.type is "null": the engine`},
		{`_name"]`, `_name", "scopes"]`, ok + `.required is "expiry, organization_id, organization_name, sc`},
		{`, "message": {"type": "string"},`, ",", strings.Repeat("Cable's document has no responses.\n", 6)},
		{"transactions:", "a:", "requestBody.content.application/json.schema.properties.scopes.\n" + ok},
		{`"200": {`, `"202": {}, "200": {`, `Cable's document has responses.202, which is new to the engine: "`},
		{"//api", "//eu", `servers[0].url is "https://eu.cable.tech": the engine assumes "https://api.cable.tech".`},
		{`"Authorization"`, `"X-Key"`, `parameters[0].name is "X-Key": the engine assumes "Authorization".`},
		{"/v2/auth", "/v3/auth", "the document has no POST /v2/auth/token"},
		{"{", "<", "the document is not JSON"},
	} {
		changed := strings.ReplaceAll(assumed, tt.old, tt.changed)
		got, err := compare(strings.NewReader(changed))
		if err != nil {
			got = append(got, err.Error())
		}
		want := strings.Fields(strings.ReplaceAll(tt.want, " ", "\x00"))
		fits := len(got) == len(want) && changed != assumed
		for i := 0; fits && i < len(want); i++ {
			fits = strings.HasPrefix(got[i], strings.ReplaceAll(want[i], "\x00", " "))
		}
		if !fits {
			t.Errorf("with %s for %s:\n%s\nwant\n%s", tt.changed, tt.old, strings.Join(got, "\n"), tt.want)
		}
	}
	limits := fmt.Sprintf("from %d to %d", cabletest.MinExpirySeconds, cabletest.MaxExpirySeconds)
	if !strings.Contains(assumed, limits) {
		t.Errorf("assumed.json has not %q", limits)
	}
}
