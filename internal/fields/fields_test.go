// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package fields

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"pgregory.net/rapid"
)

// TestParseScopes checks the form of scopes in which a role and a request are compared.
func TestParseScopes(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		in := rapid.SliceOf(rapid.OneOf(rapid.StringMatching(`[a-z]{1,4}:[a-z]{1,4}`), rapid.String())).Draw(rt, "in")
		got, err := ParseScopes(in)
		if err != nil {
			return
		}
		if !slices.IsSorted(got) || len(slices.Compact(slices.Clone(got))) != len(got) || len(got) > 64 {
			rt.Fatalf("not normal: %q", got)
		}
		for _, s := range got {
			isElement := func(x string) bool { return strings.TrimSpace(x) == s }
			if s != strings.TrimSpace(s) || !slices.ContainsFunc(in, isElement) {
				rt.Fatalf("%q is not of %q", s, in)
			}
		}
		again, err := ParseScopes(got)
		if diff := cmp.Diff(got, again); diff != "" || err != nil {
			rt.Fatalf("not stable: %s %v", diff, err)
		}
	})
}

// TestParse checks each type of field with its bounds, and that an error repeats no value that could be a secret.
func TestParse(t *testing.T) {
	t.Parallel()
	schema := func(kind framework.FieldType) *framework.FieldSchema { return &framework.FieldSchema{Type: kind} }
	path := &framework.Path{
		Fields: map[string]*framework.FieldSchema{
			"name": schema(framework.TypeString), "text": schema(framework.TypeString),
			"odd": schema(framework.TypeMap), "token_url": schema(framework.TypeString),
			"flag": schema(framework.TypeBool),
			"ttl":  schema(framework.TypeDurationSecond), "n": schema(framework.TypeInt),
			"list":                {Type: framework.TypeCommaStringSlice, Query: true},
			"refresh_key_version": schema(framework.TypeInt),
		},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.UpdateOperation: &framework.PathOperation{}, logical.CreateOperation: &framework.PathOperation{},
			logical.PatchOperation: &framework.PathOperation{}, logical.ReadOperation: &framework.PathOperation{},
		},
	}
	const (
		notText     = "text must be a string, not "
		notFlag     = "flag must be true or false, not "
		notList     = "list must be a comma-separated list or an array of strings, not "
		notTTL      = `: write a duration in whole seconds, such as 600, "10m" or "1h"`
		notNumber   = ": write a whole number, such as 100"
		notUTF8     = " is not valid UTF-8"
		tooLong     = "list is too long: at most 65536 bytes are allowed"
		tooMany     = "list has more than 1024 elements"
		unknown     = "update accepts: flag, list, n, odd, text, token_url, ttl"
		notNegative = `ttl is "-1s", and a duration cannot be negative: write one such as 600, "10m" or "1h"`
	)
	long := strings.Repeat("a", 1024)
	digits := strings.Repeat("1", 63)
	for _, tt := range []struct {
		name  string
		value any
		want  any
		err   string
	}{
		{"text", nil, nil, ""},
		{"text", " \n", "", ""},
		{"flag", " ", "", ""},
		{"ttl", "", "", ""},
		{"list", nil, nil, ""},
		{"text", " x ", " x ", ""},
		{"text", long, long, ""},
		{"text", long + "a", nil, "text is 1025 bytes long: at most 1024 are allowed"},
		{"token_url", long + long, long + long, ""},
		{"text", "\xff", nil, "text" + notUTF8},
		{"text", true, nil, notText + "a boolean"},
		{"text", 7, nil, notText + "a number"},
		{"text", json.Number("7"), nil, notText + "a number"},
		{"text", []any{"x"}, nil, notText + "a list"},
		{"text", map[string]any{}, nil, notText + "an object"},
		{"text", struct{}{}, nil, notText + "something else"},
		{"flag", true, true, ""},
		{"flag", " TRUE ", true, ""},
		{"flag", "0", false, ""},
		{"flag", "yes", nil, notFlag + `"yes"`},
		{"flag", "SECRET", nil, notFlag + "(not shown: length 6)"},
		{"flag", 1, nil, notFlag + "a number"},
		{"ttl", " 10m ", 600, ""},
		{"ttl", 600, 600, ""},
		{"ttl", int64(600), 600, ""},
		{"ttl", 600.0, 600, ""},
		{"ttl", json.Number("600"), 600, ""},
		{"ttl", "0", 0, ""},
		{"ttl", "1d", 86400, ""},
		{"ttl", "4000000000", math.MaxInt32, ""},
		{"ttl", "9999999999999", math.MaxInt32, ""},
		{"ttl", strings.Repeat("0", 61) + "600", 600, ""},
		{"ttl", strings.Repeat("0", 62) + "600", nil, "ttl is (not shown: length 65)" + notTTL},
		{"ttl", "1.5s", nil, `ttl is "1.5s"` + notTTL},
		{"ttl", "-1s", nil, notNegative},
		{"ttl", "x" + digits, nil, "ttl is (not shown: length 64)" + notTTL},
		{"ttl", true, nil, "ttl must be a duration in whole seconds, not a boolean"},
		{"n", json.Number("100"), 100, ""},
		{"n", "2147483647", math.MaxInt32, ""},
		{"n", "2147483648", nil, "n is (not shown: length 10)" + notNumber},
		{"n", "1.5", nil, `n is "1.5"` + notNumber},
		{"n", nil, nil, ""},
		{"n", []any{}, nil, "n must be a whole number, not a list"},
		{"list", "a, b,,c", []string{"a", "b", "c"}, ""},
		{"list", []any{"a", "b,c "}, []string{"a", "b", "c"}, ""},
		{"list", []string{"a", "b"}, []string{"a", "b"}, ""},
		{"list", "", []string{}, ""},
		{"list", 7, nil, notList + "a number"},
		{"list", []any{"a", nil}, nil, "list must be a list of strings, but contains null"},
		{"list", []any{"a", []any{}}, nil, "list must be a list of strings, but contains a list"},
		{"list", "a\xff", nil, "list" + notUTF8},
		{"list", strings.Repeat("a", 65535), []string{strings.Repeat("a", 65535)}, ""},
		{"list", strings.Repeat("a", 65536), nil, tooLong},
		{"list", []any{strings.Repeat("a", 32767), strings.Repeat("a", 32768)}, nil, tooLong},
		{"list", strings.Repeat(",", 1023), []string{}, ""},
		{"list", strings.Repeat(",", 1024), nil, tooMany},
		{"list", []any{strings.Repeat(",", 1023), ""}, nil, tooMany},
		{"odd", "x", nil, "odd is of type map, which this engine does not read"},
		{"bogus", "x", nil, `unknown field "bogus": ` + unknown},
		{"SECRET1", "x", nil, "unknown field (not shown: length 7): " + unknown},
	} {
		for op := range path.Operations {
			if op == logical.ReadOperation && tt.name != "list" {
				continue // it has no body
			}
			got, err := Parse(path, &logical.Request{Operation: op, Data: map[string]any{tt.name: tt.value}})
			text := ""
			if err != nil {
				text = strings.Replace(err.Error(), string(op)+" accepts", "update accepts", 1)
			}
			var want map[string]any
			if tt.err == "" {
				want = map[string]any{tt.name: tt.want}
			}
			if diff := cmp.Diff(want, got); diff != "" || text != tt.err {
				t.Errorf("%s of %s %.80v: %v, want %q %s", op, tt.name, tt.value, err, tt.err, diff)
			}
		}
	}
	many := make(map[string]any)
	for i := range 64 {
		many[fmt.Sprint("field", i)] = ""
	}
	const read, list, remove = logical.ReadOperation, logical.ListOperation, logical.DeleteOperation
	none := &framework.Path{Operations: map[logical.Operation]framework.OperationHandler{remove: nil}}
	none.Operations[remove] = &framework.PathOperation{}
	for _, tt := range []struct {
		path *framework.Path
		op   logical.Operation
		data map[string]any
		err  string
	}{
		{path, read, many, "unknown field (not shown: length 6): read accepts: list"},
		{path, read, maps.Collect(maps.All(map[string]any{"ttl": "1m"})), `unknown field "ttl": read accepts: list`},
		{none, remove, map[string]any{"x": 1}, `unknown field "x": delete of this path accepts no parameters`},
		{path, list, map[string]any{"x": 1}, ""},
		{nil, read, map[string]any{"x": 1}, ""},
	} {
		got, err := Parse(tt.path, &logical.Request{Operation: tt.op, Data: tt.data})
		if got != nil || (err == nil) != (tt.err == "") || err != nil && err.Error() != tt.err {
			t.Errorf("%s: %v %v, want %q", tt.op, got, err, tt.err)
		}
	}
	many["field64"] = ""
	_, err := Parse(path, &logical.Request{Operation: read, Data: many})
	if err == nil || err.Error() != "the request has 65 fields: read accepts: list" {
		t.Error(err)
	}
}

// TestChanges checks which fields of a write change the stored entry.
func TestChanges(t *testing.T) {
	t.Parallel()
	stored := map[string]any{
		"text": "a\n", "unset": "", "ttl": int64(600), "zero": 0, "flag": true, "off": false,
		"list": []string{"a"}, "none": []string{}, "refresh_key_version": 7,
	}
	for _, tt := range []struct {
		name    string
		value   any
		changes bool
		err     string
	}{
		{"name", "x", false, ""},
		{"text", "a", false, ""},
		{"text", "b", true, ""},
		{"text", "", true, ""}, // clears it
		{"other", "b", true, ""},
		{"other", " ", false, "other must not be empty: give it a value or leave it out"},
		{"unset", nil, false, ""},
		{"zero", "", false, ""},
		{"none", []string{}, false, ""},
		{"none", nil, false, ""},
		{"ttl", 600, false, ""},
		{"ttl", 601, true, ""},
		{"ttl", nil, false, "ttl must not be null: give it a value or leave it out"},
		{"ttl", " ", false, "ttl must not be empty: give it a value or leave it out"},
		{"flag", true, false, ""},
		{"flag", false, true, ""},
		{"off", "", false, "off must not be empty: give it a value or leave it out"},
		{"list", []string{"a"}, false, ""},
		{"list", []string{"a", "b"}, true, ""},
		{"list", []string{}, false, "list must not be empty: give it a value or leave it out"},
		{"list", "a", true, ""},
		{"zero", "0", true, ""},
		{"refresh_key_version", 7, false, ""},
		{
			"refresh_key_version", 8, false,
			"refresh_key_version is read-only, and the stored value is another: leave it out",
		},
	} {
		clears := func(name string, value any) bool { return name == "text" && value == "" }
		got, err := Input{tt.name: tt.value}.Changes(stored, clears)
		if (len(got) == 1) != tt.changes || (err == nil) != (tt.err == "") || err != nil && err.Error() != tt.err {
			t.Errorf("%s %#v: %v %v", tt.name, tt.value, got, err)
		}
	}
	err := Input{"b": nil, "a": " ", "c": 0, "d": false}.RefuseBlanks()
	if err == nil || err.Error() != "a must not be empty: give it a value or leave it out" {
		t.Error(err)
	}
	in := Input{"text": " x ", "ttl": 600, "blank": nil}
	if err := in.RefuseBlanks(); err == nil || (Input{"c": 0, "d": false, "e": "x"}).RefuseBlanks() != nil {
		t.Error(err)
	}
	text, hasText := in.Text("text")
	ttl, hasTTL := in.Duration("ttl")
	_, hasBlank := in.Duration("blank")
	if text != "x" || !hasText || ttl != 10*time.Minute || !hasTTL || hasBlank || !in.Has("blank") || in.Has("other") {
		t.Error(text, hasText, ttl, hasTTL, hasBlank)
	}
}

// TestNames checks the bounds of names, and that an error or a log line repeats ten values at most, of those that have
// the shape.
func TestNames(t *testing.T) {
	t.Parallel()
	check := func(err error, want string) {
		t.Helper()
		if text := fmt.Sprint(err); text != want {
			t.Errorf("got %q, want %q", text, want)
		}
	}
	const odd = "organization_id must not contain white space, quotes or control characters"
	check(CheckOrganization(strings.Repeat("ö", 128)), "<nil>")
	const long = "organization_id is 129 characters long: at most 128 are allowed"
	check(CheckOrganization(strings.Repeat("ö", 129)), long)
	for _, c := range []string{" ", "\u3000", "\x00", "\u202e", `"`, "'", "`", "\xff"} {
		check(CheckOrganization("a"+c+"b"), odd)
	}
	check(CheckRoleName(strings.Repeat("r", 128)), "<nil>")
	check(CheckRoleName(strings.Repeat("r", 129)), "the role's name is 129 characters long: at most 128 are allowed")
	check(CheckRoleName("a..b"), `the role's name (not shown: length 4) must not contain "..": use single dots`)
	scopes := make([]string, 65)
	for i := range scopes {
		scopes[i] = fmt.Sprintf("a:%d", i)
	}
	_, err := ParseScopes(append(scopes[:64:64], scopes[0]))
	check(err, "<nil>")
	_, err = ParseScopes(scopes)
	check(err, "scopes names 65: at most 64 are allowed")
	ids, err := ParseOrganizations(append(scopes[:64:64], scopes[0]))
	check(err, "<nil>")
	if diff := cmp.Diff(scopes[:64], ids); diff != "" {
		t.Error(diff)
	}
	_, err = ParseOrganizations(scopes)
	check(err, "organization_ids names 65: at most 64 are allowed")
	_, err = ParseOrganizations([]string{"a b"})
	check(err, "an organization of organization_ids must not contain white space, quotes or control characters")
	_, err = ParseScopes([]string{"a b"})
	check(err, "a scope must not contain white space, quotes or control characters: "+
		`write scopes as "resource:action", separated by commas`)
	check(errors.New(Word.QuoteAll([]string{"a", "B", ""})), `"a", (not shown: length 1), ""`)
	ten := strings.Split("a b c d e f g h i j", " ")
	if diff := cmp.Diff(ten, Word.RedactAll(ten)); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(append(ten[:10:10], "and 2 more"), Word.RedactAll(append(ten, "k", "l"))); diff != "" {
		t.Error(diff)
	}
}
