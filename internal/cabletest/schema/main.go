// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Command schema compares the token endpoint in Cable's OpenAPI document with what the
// engine assumes, which is in testdata/assumed.txt:
//
//	schema [URL or FILE]
//
// It prints a sentence for each difference, and exits with 1 if there is one. Without an
// argument, it reads the document that Cable publishes.
package main

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"
)

const (
	published = "https://docs.cable.tech/openapi.json" // the address in Cable's llms.txt
	endpoint  = "/v2/auth/token"

	maxDepth = 10 // of schemas in schemas, because a schema may refer to itself
)

// assumed has a line for each field, "NAME: TYPE", as facts returns them.
//
//go:embed testdata/assumed.txt
var assumed string

func main() {
	differences, err := run(context.Background(), append(os.Args, published)[1])
	for _, d := range differences {
		fmt.Println(d)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "schema:", err)
	}
	if err != nil || len(differences) > 0 {
		os.Exit(1)
	}
}

func run(ctx context.Context, source string) ([]string, error) {
	text, err := read(ctx, source)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", source, err)
	}
	var document map[string]any
	if err := json.Unmarshal(text, &document); err != nil {
		return nil, fmt.Errorf("%s is not JSON: %w", source, err)
	}
	now, err := facts(document)
	if err != nil {
		return nil, err
	}
	return compare(assumed, now), nil
}

// read reads a URL or a file.
func read(ctx context.Context, source string) ([]byte, error) {
	if !strings.Contains(source, "://") {
		return os.ReadFile(source) //nolint:gosec // the file that the user names
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, source, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return nil, errors.New(resp.Status)
	}
	return io.ReadAll(io.LimitReader(resp.Body, 64<<20))
}

// A reader collects the facts of a document: field name -> type.
type reader struct {
	document map[string]any
	facts    map[string]string
}

// facts returns the endpoint's servers, header, request and responses.
func facts(document map[string]any) (map[string]string, error) {
	r := reader{document, map[string]string{}}
	post := object(r.at(document, "paths", endpoint, "post"))
	if post == nil {
		return nil, fmt.Errorf("the document has no POST %s", endpoint)
	}
	for _, server := range list(document["servers"]) {
		r.facts["server "+fmt.Sprint(object(server)["url"])] = "listed"
	}
	for _, parameter := range list(post["parameters"]) {
		p := object(r.at(parameter))
		r.schema(fmt.Sprintf("%v %v", p["in"], p["name"]), p["schema"], p["required"] == true, 0)
	}
	r.content("request", post["requestBody"])
	for status, response := range object(post["responses"]) {
		r.content(status, response)
	}
	return r.facts, nil
}

// content adds the body of the request or of a response.
func (r *reader) content(name string, body any) {
	content := object(object(r.at(body))["content"])
	if len(content) == 0 {
		r.facts[name] = "no content"
	}
	for kind, media := range content {
		r.facts[name+" "+kind] = "accepted"
		r.schema(name, object(media)["schema"], false, 0)
	}
}

// described finds lifetimes and scopes, which Cable's document names in descriptions.
var described = regexp.MustCompile(`\b\d{3,}\b|\b[a-z_]+:[a-z_]+\b`)

// schema adds a schema, and the fields in it.
func (r *reader) schema(name string, schema any, required bool, depth int) {
	s := object(r.at(schema))
	if s == nil || depth > maxDepth {
		r.facts[name] = "any"
		return
	}
	words := []string{fmt.Sprint(s["type"])}
	if required {
		words = append(words, "required")
	}
	for _, key := range []string{
		"format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength", "minItems",
		"maxItems", "pattern", "enum", "const", "nullable", "allOf", "anyOf", "oneOf", "additionalProperties",
	} {
		if s[key] != nil {
			words = append(words, fmt.Sprintf("%s %v", key, s[key]))
		}
	}
	if d, _ := s["description"].(string); s["properties"] == nil {
		words = append(words, described.FindAllString(d, -1)...)
	}
	r.facts[name] = strings.Join(words, ", ")
	for field, value := range object(s["properties"]) {
		r.schema(name+"."+field, value, slices.Contains(list(s["required"]), any(field)), depth+1)
	}
	if s["items"] != nil {
		r.schema(name+"[]", s["items"], false, depth+1)
	}
}

// at returns the part of a value below the keys, after references.
func (r *reader) at(value any, keys ...string) any {
	for range maxDepth {
		ref, ok := object(value)["$ref"].(string)
		if !ok {
			break
		}
		value = r.document
		for key := range strings.SplitSeq(strings.TrimPrefix(ref, "#/"), "/") {
			value = object(value)[strings.NewReplacer("~1", "/", "~0", "~").Replace(key)]
		}
	}
	if len(keys) == 0 {
		return value
	}
	return r.at(object(value)[keys[0]], keys[1:]...)
}

func object(v any) map[string]any { m, _ := v.(map[string]any); return m }

func list(v any) []any { l, _ := v.([]any); return l }

// compare returns a sentence for each difference, in the order of the names.
func compare(assumed string, now map[string]string) (differences []string) {
	before := map[string]string{}
	for line := range strings.Lines(assumed) {
		if name, fact, ok := strings.Cut(strings.TrimSpace(line), ": "); ok && !strings.HasPrefix(name, "#") {
			before[name] = fact
		}
	}
	all := maps.Clone(before)
	maps.Copy(all, now)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		was, assumed := before[name]
		is, found := now[name]
		switch {
		case !found:
			differences = append(differences, fmt.Sprintf("Cable's document has no %q; the engine assumes %q.", name, was))
		case !assumed:
			differences = append(differences, fmt.Sprintf("Cable's document has %q, which is new to the engine: %q.", name, is))
		case was != is:
			differences = append(differences, fmt.Sprintf("%q is %q; the engine assumes %q.", name, is, was))
		}
	}
	return differences
}
