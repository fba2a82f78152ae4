// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Command schema reads Cable's OpenAPI document from standard input, and compares its
// token endpoint with what the engine assumes, which is in testdata/assumed.txt. It
// prints a sentence for each difference, and exits with 1 if there is one.
package main

import (
	_ "embed"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
)

const (
	endpoint = "/v2/auth/token"
	maxDepth = 10 // of schemas in schemas, because a schema may refer to itself
)

// assumed has a line for each fact, "NAME: FACT".
//
//go:embed testdata/assumed.txt
var assumed string

func main() {
	differences, err := run(os.Stdin)
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

// run returns the differences, in the order of the names.
func run(in io.Reader) (differences []string, err error) {
	r := reader{facts: map[string]string{}}
	if err := json.NewDecoder(in).Decode(&r.document); err != nil {
		return nil, fmt.Errorf("the document is not JSON: %w", err)
	}
	if err := r.read(); err != nil {
		return nil, err
	}
	before := map[string]string{}
	for line := range strings.Lines(assumed) {
		if name, fact, ok := strings.Cut(strings.TrimSpace(line), ": "); ok && !strings.HasPrefix(name, "#") {
			before[name] = fact
		}
	}
	all := maps.Clone(before)
	maps.Copy(all, r.facts)
	say := func(format string, a ...any) { differences = append(differences, fmt.Sprintf(format, a...)) }
	for _, name := range slices.Sorted(maps.Keys(all)) {
		was, known := before[name]
		is, found := r.facts[name]
		switch {
		case !found:
			say("Cable's document has no %q; the engine assumes %q.", name, was)
		case !known:
			say("Cable's document has a new %q: %q.", name, is)
		case was != is:
			say("%q is %q; the engine assumes %q.", name, is, was)
		}
	}
	return differences, nil
}

// A reader collects the facts of a document by name.
type reader struct {
	document any
	facts    map[string]string
}

// read collects the servers, and the endpoint's header, request and responses.
func (r *reader) read() error {
	post := object(r.at(r.document, "paths", endpoint, "post"))
	if post == nil {
		return fmt.Errorf("the document has no POST %s", endpoint)
	}
	for _, server := range list(object(r.document)["servers"]) {
		r.facts[fmt.Sprint("server ", object(server)["url"])] = "listed"
	}
	for _, parameter := range list(post["parameters"]) {
		p := object(r.at(parameter))
		r.schema(fmt.Sprint(p["in"], " ", p["name"]), p["schema"], p["required"] == true, 0)
	}
	r.content("request", post["requestBody"])
	for status, response := range object(post["responses"]) {
		r.content(status, response)
	}
	return nil
}

// content collects the body of the request or of a response.
func (r *reader) content(name string, body any) {
	content := object(r.at(body, "content"))
	r.facts[name+" content"] = strings.Join(slices.Sorted(maps.Keys(content)), ", ")
	for _, media := range content {
		r.schema(name, object(media)["schema"], false, 0)
	}
}

var (
	// described finds lifetimes and scopes, which Cable's document names in descriptions.
	described = regexp.MustCompile(`\b\d{3,}\b|\b[a-z_]+:[a-z_]+\b`)
	// structure has the members of a schema that are no constraint on its value.
	structure = strings.Fields("type title description example examples default required properties items")
)

// schema collects the type of a field, its constraints, and the fields in it.
func (r *reader) schema(name string, schema any, required bool, depth int) {
	s := object(r.at(schema))
	words := []string{fmt.Sprint(s["type"])}
	if required {
		words = append(words, "required")
	}
	for _, key := range slices.Sorted(maps.Keys(s)) {
		if !slices.Contains(structure, key) {
			words = append(words, fmt.Sprint(key, " ", s[key]))
		}
	}
	if d, _ := s["description"].(string); s["properties"] == nil {
		words = append(words, described.FindAllString(d, -1)...)
	}
	r.facts[name] = strings.Join(words, ", ")
	if depth == maxDepth {
		return
	}
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
			value = object(value)[key]
		}
	}
	if len(keys) == 0 {
		return value
	}
	return r.at(object(value)[keys[0]], keys[1:]...)
}

func object(v any) map[string]any { m, _ := v.(map[string]any); return m }

func list(v any) []any { l, _ := v.([]any); return l }
