// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/hashicorp/vault/sdk/logical"
)

// oasDocument is the part of an OpenAPI document that a client generator reads.
type oasDocument struct {
	Paths      map[string]map[string]json.RawMessage `json:"paths"`
	Components struct {
		Schemas map[string]oasSchema `json:"schemas"`
	} `json:"components"`
}

type oasOperation struct {
	RequestBody struct {
		Content map[string]struct {
			Schema oasSchema `json:"schema"`
		} `json:"content"`
	} `json:"requestBody"`
	Responses map[string]struct {
		Content map[string]struct {
			Schema oasSchema `json:"schema"`
		} `json:"content"`
	} `json:"responses"`
}

type oasSchema struct {
	Ref        string               `json:"$ref"`
	Type       string               `json:"type"`
	Items      *oasSchema           `json:"items"`
	Properties map[string]oasSchema `json:"properties"`
	Required   []string             `json:"required"`
	Default    any                  `json:"default"`
}

// document returns the OpenAPI document of a mount, made by the SDK.
func document(t testing.TB) *oasDocument {
	t.Helper()
	m := newMount(t)
	resp, err := m.b.HandleRequest(m.Context(), &logical.Request{Operation: opHelp, Storage: m.storage})
	must(m, err)
	raw, err := json.Marshal(resp.Data["openapi"])
	doc := new(oasDocument)
	if err == nil {
		err = json.Unmarshal(raw, doc)
	}
	must(m, err)
	return doc
}

// operation returns an operation of the document.
func (d *oasDocument) operation(t testing.TB, path, method string) *oasOperation {
	t.Helper()
	op := new(oasOperation)
	if err := json.Unmarshal(d.Paths[path][method], op); err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	return op
}

// resolve follows a reference.
func (d *oasDocument) resolve(s oasSchema) oasSchema {
	if name, ok := strings.CutPrefix(s.Ref, "#/components/schemas/"); ok {
		return d.Components.Schemas[name]
	}
	return s
}

// kindOf returns the JSON type of a decoded value.
func kindOf(value any) string {
	switch v := value.(type) {
	case bool:
		return "boolean"
	case json.Number:
		if _, err := v.Int64(); err == nil {
			return "integer"
		}
		return "number"
	case []any:
		return "array"
	case kv:
		return "object"
	}
	return "string"
}

// TestResponsesDecode checks that a client that is generated from the document decodes each response.
func TestResponsesDecode(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	doc := document(t)
	checked := map[string]bool{}
	check := func(path, method string, op logical.Operation, at string, data kv) {
		t.Helper()
		resp := m.ok(op, at, data)
		if resp == nil || len(resp.Data) == 0 {
			return
		}
		raw, err := json.Marshal(resp.Data)
		must(t, err)
		var value kv
		decoder := json.NewDecoder(strings.NewReader(string(raw)))
		decoder.UseNumber()
		must(t, decoder.Decode(&value))
		schema := doc.resolve(doc.operation(t, path, method).Responses["200"].Content["application/json"].Schema)
		for name, v := range value {
			want := schema.Properties[name]
			kind := kindOf(v)
			if list, ok := v.([]any); ok && len(list) > 0 {
				kind, want = "array of "+kindOf(list[0]), oasSchema{Type: "array of " + want.Items.Type}
			}
			if kind != want.Type {
				t.Errorf("%s %s: %s is sent as %s and documented as %q", method, path, name, kind, want.Type)
			}
		}
		for _, name := range schema.Required {
			if _, ok := value[name]; !ok {
				t.Errorf("%s %s lacks %s", method, path, name)
			}
		}
		checked[method+" "+path] = true
	}
	for range 2 {
		check("/config", "get", opRead, "config", nil)
		check("/roles/", "get", opList, "roles/", nil)
		check("/roles/{name}", "get", opRead, "roles/ci", nil)
		check("/status", "get", opRead, "status", nil)
		check("/creds/{name}", "get", opRead, "creds/ci", nil)
		check("/creds/{name}", "post", opUpdate, "creds/ci", kv{"ttl": 600})
		m.write("roles/ci", kv{"ttl": 600, "max_ttl": "1h", "organization_id": "org_9f8b7c6d5e4a3b2c1d0e"})
		m.write("roles/off", kv{"scopes": "a:b", "disabled": true})
		_, _ = m.request(opRead, "creds/off", nil)
	}
	if len(checked) != 6 {
		t.Errorf("checked: %v", checked)
	}
}

// TestDocumentHasNoDefaults checks that no field of a request has a default, so that a client that applies the
// document's defaults to a partial write resets nothing.
func TestDocumentHasNoDefaults(t *testing.T) {
	t.Parallel()
	doc := document(t)
	for _, at := range []string{
		"post /config", "patch /config", "post /roles/{name}", "patch /roles/{name}", "post /creds/{name}",
	} {
		method, path, _ := strings.Cut(at, " ")
		fields := 0
		for _, content := range doc.operation(t, path, method).RequestBody.Content {
			for name, property := range doc.resolve(content.Schema).Properties {
				if fields++; property.Default != nil {
					t.Errorf("%s: %s has the default %v", at, name, property.Default)
				}
			}
		}
		if fields == 0 {
			t.Errorf("%s: the document has no fields", at)
		}
	}
}
