// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Command schema reads Cable's OpenAPI document from standard input, and compares its
// token endpoint with the one that the engine assumes, in assumed.json. It prints a
// sentence for each difference, and exits with 1 if there is one.
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
	maxDepth = 20 // of a value, because a schema may refer to itself
)

//go:embed assumed.json
var assumed string

func main() {
	differences, err := compare(os.Stdin)
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

// compare returns the differences of a document, in the order of the names.
func compare(in io.Reader) (differences []string, err error) {
	now, err := read(in)
	if err != nil {
		return nil, err
	}
	before, err := read(strings.NewReader(assumed))
	if err != nil {
		return nil, fmt.Errorf("assumed.json: %w", err)
	}
	say := func(format string, a ...any) { differences = append(differences, fmt.Sprintf(format, a...)) }
	all := maps.Clone(before)
	maps.Copy(all, now)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		was, known := before[name]
		is, found := now[name]
		switch {
		case !found:
			say("Cable's document has no %s any more: the engine assumes %q.", name, was)
		case !known:
			say("Cable's document has %s, which is new to the engine: %q.", name, is)
		case was != is:
			say("%s is %q: the engine assumes %q.", name, is, was)
		}
	}
	return differences, nil
}

// read returns the servers of a document, and all that it says of the endpoint, by name.
func read(in io.Reader) (map[string]string, error) {
	var document map[string]any
	if err := json.NewDecoder(in).Decode(&document); err != nil {
		return nil, fmt.Errorf("the document is not JSON: %w", err)
	}
	paths, _ := document["paths"].(map[string]any)
	path, _ := paths[endpoint].(map[string]any)
	post, ok := path["post"].(map[string]any)
	if !ok {
		return nil, fmt.Errorf("the document has no POST %s", endpoint)
	}
	f := facts{document, map[string]string{}}
	f.add("servers", document["servers"], 0)
	for _, part := range []string{"parameters", "requestBody", "responses"} {
		f.add(part, post[part], 0)
	}
	return f.found, nil
}

// facts are the values of a document by name, such as "responses.200.content".
type facts struct {
	document any
	found    map[string]string
}

// described finds the lifetimes and scopes in a description, whose other text is ignored.
var described = regexp.MustCompile(`\b\d{3,}\b|\b[a-z_]+:[a-z_]+\b`)

// add adds a value, with those in it, after references.
func (f facts) add(name string, value any, depth int) {
	object, _ := value.(map[string]any)
	if ref, ok := object["$ref"].(string); ok {
		value = f.document
		for key := range strings.SplitSeq(strings.TrimPrefix(ref, "#/"), "/") {
			object, _ = value.(map[string]any)
			value = object[strings.ReplaceAll(key, "~1", "/")]
		}
		object, _ = value.(map[string]any)
	}
	list, _ := value.([]any)
	switch {
	case depth == maxDepth:
	case object != nil:
		f.found[name] = "an object"
		for key, v := range object {
			switch key {
			case "title", "summary", "example", "examples": // for people
			case "description":
				if words := described.FindAllString(fmt.Sprint(v), -1); len(words) > 0 {
					f.found[name+".description"] = strings.Join(words, ", ")
				}
			default:
				f.add(name+"."+key, v, depth+1)
			}
		}
	case slices.ContainsFunc(list, func(v any) bool { _, ok := v.(map[string]any); return ok }):
		for i, v := range list {
			f.add(fmt.Sprint(name, "[", i, "]"), v, depth+1)
		}
	case list != nil: // such as the required fields, in any order
		words := strings.Fields(strings.Trim(fmt.Sprint(list), "[]"))
		slices.Sort(words)
		f.found[name] = strings.Join(words, ", ")
	default:
		f.found[name] = fmt.Sprint(value)
	}
}
