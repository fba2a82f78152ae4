// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Package fields decides which fields a request may contain, before the framework sees them, and which values an error
// may repeat.
//
//   - A field that the path does not know is refused, and the error lists the known ones.
//   - Input is bounded before the engine splits, converts or sorts it.
//   - A field has the type that it is documented with. The framework's own conversion errors print the value, even that
//     of refresh_key.
//   - A field that is present has a value, neither empty nor null. A write of config or a role accepts a blank that
//     equals the stored value, so that a read can be written back; see [Input.Changes].
//   - An error repeats a value only if it has the shape of the field's valid values, and that shape cannot be a secret.
//     Anything else is described by its length or type.
//
// The values that pass have one Go type per field type, so that handlers and the framework see the same value in
// whichever form a caller wrote it.
package fields

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/hashicorp/go-secure-stdlib/parseutil"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
)

const (
	maxFields       = 64       // per request
	maxFieldBytes   = 1 << 10  // per field without a bound of its own
	maxListBytes    = 64 << 10 // per list, separators included
	maxListElements = 1024     // per list, before duplicates are dropped

	maxScopes         = 64  // per role
	maxOrganizations  = 64  // per role
	maxScopeLength    = 128 // characters
	maxRoleName       = 128 // characters
	maxOrganizationID = 128 // characters; Cable's sample has 24

	// MaxRefreshKey is in bytes. The key travels in a header, and common servers accept 8 KiB of headers.
	MaxRefreshKey = 8 << 10
)

// fieldBounds are the fields that may be longer than maxFieldBytes, in bytes, white space included.
var fieldBounds = map[string]int{
	"refresh_key": 2 * MaxRefreshKey,
	"token_url":   2 << 10,
	"ca_cert":     64 << 10,
}

// readOnlyFields may be written back as they were read.
var readOnlyFields = []string{"refresh_key_version", "refresh_key_updated_at"}

// Input has the fields of a request as Parse returned them.
type Input map[string]any

// Without returns the elements of all that are not among taken.
func Without(all, taken []string) []string {
	return slices.DeleteFunc(slices.Clone(all), func(s string) bool { return slices.Contains(taken, s) })
}

// Parse returns the request's fields, each with the one Go type of its field type, or a refusal. For an unknown path or
// operation it returns nil, and the framework reports that.
func Parse(path *framework.Path, req *logical.Request) (map[string]any, error) {
	if path == nil || path.Operations[req.Operation] == nil {
		return nil, nil
	}
	known := knownFields(path, req.Operation)
	accepts := fmt.Sprintf("%s accepts: %s", req.Operation, strings.Join(Without(known, readOnlyFields), ", "))
	if len(known) == 0 {
		accepts = fmt.Sprintf("%s of this path accepts no parameters", req.Operation)
	}
	if len(req.Data) > maxFields {
		return nil, outcome.Refuse("the request has %d fields: %s", len(req.Data), accepts)
	}
	data := make(map[string]any, len(req.Data))
	for _, name := range slices.Sorted(maps.Keys(req.Data)) {
		if !slices.Contains(known, name) {
			return nil, outcome.Refuse("unknown field %s: %s", Word.Quote(name), accepts)
		}
		value, err := parseValue(path.Fields[name], name, req.Data[name])
		if err != nil {
			return nil, outcome.Refuse("%s %s", name, err)
		}
		data[name] = value
	}
	return data, nil
}

// knownFields lists the fields that an operation on path accepts, sorted. An operation without a body accepts the query
// fields, any other operation all fields but name.
func knownFields(path *framework.Path, op logical.Operation) []string {
	hasBody := op == logical.CreateOperation || op == logical.UpdateOperation || op == logical.PatchOperation
	var known []string
	for name, schema := range path.Fields {
		if schema.Query || hasBody && name != "name" {
			known = append(known, name)
		}
	}
	slices.Sort(known)
	return known
}

// isBlank reports whether a parsed value is null, or empty.
func isBlank(value any) bool {
	switch v := value.(type) {
	case nil:
		return true
	case string:
		return strings.TrimSpace(v) == ""
	case []string:
		return len(v) == 0
	default:
		return false
	}
}

// blankError says that a field needs a value.
func blankError(value any) error {
	what := "empty"
	if value == nil {
		what = "null"
	}
	return fmt.Errorf("must not be %s: give it a value or leave it out", what)
}

// parseValue converts value to its field's type, which is string, bool, int (whole seconds for a duration) or []string.
// It returns nil for null, and "" for an empty text, whatever the type.
func parseValue(schema *framework.FieldSchema, name string, value any) (any, error) {
	if value == nil {
		return nil, nil
	}
	if schema.Type == framework.TypeCommaStringSlice {
		return parseList(value)
	}
	text, isText := value.(string)
	if isText {
		if bound := cmp.Or(fieldBounds[name], maxFieldBytes); len(text) > bound {
			return nil, fmt.Errorf("is %d bytes long: at most %d are allowed", len(text), bound)
		}
		if !utf8.ValidString(text) {
			return nil, errors.New("is not valid UTF-8")
		}
		if strings.TrimSpace(text) == "" {
			return "", nil
		}
	}
	switch schema.Type {
	case framework.TypeString:
		if !isText {
			return nil, fmt.Errorf("must be a string, not %s", jsonType(value))
		}
		return text, nil
	case framework.TypeBool:
		if b, ok := value.(bool); ok {
			return b, nil
		}
		if !isText {
			return nil, fmt.Errorf("must be true or false, not %s", jsonType(value))
		}
		b, err := strconv.ParseBool(strings.TrimSpace(text))
		if err != nil {
			return nil, fmt.Errorf("must be true or false, not %s", Word.Quote(text))
		}
		return b, nil
	case framework.TypeDurationSecond, framework.TypeInt:
		return parseNumber(schema.Type, value)
	default:
		return nil, fmt.Errorf("is of type %s, which this engine does not read", schema.Type)
	}
}

// parseNumber reads a duration ("90m", "1h30m", "1d", "600", 600) as whole seconds, or a count as an int.
func parseNumber(kind framework.FieldType, value any) (int, error) {
	what, example := "a duration in whole seconds", `such as 600, "10m" or "1h"`
	if kind == framework.TypeInt {
		what, example = "a whole number", "such as 100"
	}
	var text string
	switch v := value.(type) {
	case string:
		text = strings.TrimSpace(v)
	case json.Number:
		text = v.String()
	case float64:
		text = strconv.FormatFloat(v, 'f', -1, 64)
	case int, int64:
		text = fmt.Sprint(v)
	default:
		return 0, fmt.Errorf("must be %s, not %s", what, jsonType(value))
	}
	invalid := fmt.Errorf("is %s: write %s, %s", number.Quote(text), what, example)
	if len(text) > 64 {
		return 0, invalid
	}
	if kind == framework.TypeInt {
		n, err := strconv.ParseInt(text, 10, 32)
		if err != nil {
			return 0, invalid
		}
		return int(n), nil
	}
	d, err := parseutil.ParseDurationSecond(text)
	if errors.Is(err, parseutil.ErrDurationMultiplicationOverflow) {
		d, err = math.MaxInt32*time.Second, nil // longer than anything allowed, which the bounds will say
	}
	if err != nil || d != d.Truncate(time.Second) {
		return 0, invalid
	}
	if d < 0 {
		return 0, fmt.Errorf("is %s, and a duration cannot be negative: write one %s", number.Quote(text), example)
	}
	return int(min(d/time.Second, math.MaxInt32)), nil
}

// parseList reads a list of strings, a comma-separated text or a JSON array. An element may be comma-separated too, as
// repeated query keys are. The list is bounded before it is split, to 64 KiB and 1024 elements.
func parseList(value any) ([]string, error) {
	var texts []any
	switch v := value.(type) {
	case string:
		texts = []any{v}
	case []string:
		for _, s := range v {
			texts = append(texts, s)
		}
	case []any:
		texts = v
	default:
		return nil, fmt.Errorf("must be a comma-separated list or an array of strings, not %s", jsonType(value))
	}
	bytes, elements := 0, 0
	for _, text := range texts {
		s, ok := text.(string)
		if !ok {
			return nil, fmt.Errorf("must be a list of strings, but contains %s", jsonType(text))
		}
		if bytes += len(s) + 1; bytes > maxListBytes {
			return nil, fmt.Errorf("is too long: at most %d bytes are allowed", maxListBytes)
		}
		if elements += strings.Count(s, ",") + 1; elements > maxListElements {
			return nil, fmt.Errorf("has more than %d elements", maxListElements)
		}
		if !utf8.ValidString(s) {
			return nil, errors.New("is not valid UTF-8")
		}
	}
	list := make([]string, 0, elements)
	for _, text := range texts {
		for s := range strings.SplitSeq(text.(string), ",") {
			if s = strings.TrimSpace(s); s != "" {
				list = append(list, s)
			}
		}
	}
	return list, nil
}

// ParseScopes sorts scopes, drops duplicates, and refuses more than 64. Its refusal does not quote a text that cannot
// be a scope.
//
// NOTE: parseList has bounded the list before it was split. 64 is the limit without duplicates.
func ParseScopes(list []string) ([]string, error) {
	scopes := slices.Clone(list)
	slices.Sort(scopes)
	scopes = slices.Compact(scopes)
	if len(scopes) > maxScopes { // at most 64 scopes
		return nil, outcome.Refuse("scopes names %d: at most %d are allowed", len(scopes), maxScopes)
	}
	for _, s := range scopes {
		if err := checkWord(s, maxScopeLength); err != nil {
			return nil, outcome.Refuse(`a scope %s: write scopes as "resource:action", separated by commas`, err)
		}
	}
	return scopes, nil
}

// ParseOrganizations drops duplicates of organization_ids, keeps their order, and refuses more than 64.
func ParseOrganizations(list []string) ([]string, error) {
	var ids []string
	for _, id := range list {
		if err := checkWord(id, maxOrganizationID); err != nil {
			return nil, outcome.Refuse("an organization of organization_ids %s", err)
		}
		if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	if len(ids) > maxOrganizations {
		return nil, outcome.Refuse("organization_ids names %d: at most %d are allowed", len(ids), maxOrganizations)
	}
	return ids, nil
}

// jsonType names the JSON type of value, for errors that must not show value.
func jsonType(value any) string {
	switch value.(type) {
	case nil:
		return "null"
	case bool:
		return "a boolean"
	case string:
		return "a string"
	case float64, int, int64, json.Number:
		return "a number"
	case []any, []string:
		return "a list"
	case map[string]any:
		return "an object"
	default:
		return "something else"
	}
}

// checkWord refuses a text that is not one plain word of at most maxLen characters.
func checkWord(s string, maxLen int) error {
	if n := utf8.RuneCountInString(s); n > maxLen {
		return fmt.Errorf("is %d characters long: at most %d are allowed", n, maxLen)
	}
	for _, c := range s {
		if unicode.IsSpace(c) || !unicode.IsPrint(c) || strings.ContainsRune("\"'`", c) || c == utf8.RuneError {
			return errors.New("must not contain white space, quotes or control characters")
		}
	}
	return nil
}

// CheckOrganization refuses a text that cannot be an organization's id.
func CheckOrganization(id string) error {
	if err := checkWord(id, maxOrganizationID); err != nil {
		return outcome.Refuse("organization_id %s", err)
	}
	return nil
}

// CheckRoleName refuses a name that no role can have. Vault's pattern for names has no length limit and accepts names
// that storage rejects.
func CheckRoleName(name string) error {
	if len(name) > maxRoleName {
		return outcome.Refuse("the role's name is %d characters long: at most %d are allowed", len(name), maxRoleName)
	}
	if strings.Contains(name, "..") {
		return outcome.Refuse(`the role's name %s must not contain "..": use single dots`, RoleName.Quote(name))
	}
	return nil
}

// RefuseBlanks refuses a field that is present without a value.
func (in Input) RefuseBlanks() error {
	var blanks []string
	for name, value := range in {
		if isBlank(value) {
			blanks = append(blanks, name)
		}
	}
	if len(blanks) == 0 {
		return nil
	}
	first := slices.Min(blanks)
	return outcome.Refuse("%s %s", first, blankError(in[first]))
}

// Changes returns the fields that change the stored entry, which is given as a read returns it. Fields equal to the
// stored value are dropped, read-only fields included, and a blank equals a value that is not set. So a read can be
// written back. Another blank is refused unless clears says that it removes the value. A changed read-only field is
// refused.
func (in Input) Changes(stored map[string]any, clears func(name string, value any) bool) (Input, error) {
	out := make(Input, len(in))
	for _, name := range slices.Sorted(maps.Keys(in)) {
		value := in[name]
		old, isStored := stored[name]
		switch {
		case name == "name": // part of the path, not a field
		case isStored && sameValue(value, old):
		case slices.Contains(readOnlyFields, name):
			return nil, outcome.Refuse("%s is read-only, and the stored value is another: leave it out", name)
		case isBlank(value) && !clears(name, value):
			return nil, outcome.Refuse("%s %s", name, blankError(value))
		default:
			out[name] = value
		}
	}
	return out, nil
}

// sameValue compares a parsed value with a stored one as a read returns it.
func sameValue(value, stored any) bool {
	if n, ok := stored.(int64); ok {
		stored = int(n)
	}
	if isBlank(value) {
		switch s := stored.(type) {
		case int:
			return s == 0
		case bool:
			return false // a script's disabled=$EMPTY must not seem to have worked
		default:
			return isBlank(s)
		}
	}
	switch v := value.(type) {
	case string:
		s, ok := stored.(string)
		return ok && strings.TrimSpace(v) == strings.TrimSpace(s)
	case []string:
		s, ok := stored.([]string)
		return ok && slices.Equal(v, s)
	default: // an int or a bool
		return v == stored
	}
}

// Text returns a field's text without outer white space, "" if it is blank, and whether the field is present.
func (in Input) Text(name string) (string, bool) {
	v, ok := in[name]
	s, _ := v.(string)
	return strings.TrimSpace(s), ok
}

// Duration returns a field's duration, and whether it is present with a value.
func (in Input) Duration(name string) (time.Duration, bool) {
	v, ok := in[name].(int)
	return time.Duration(v) * time.Second, ok
}

// Has reports whether a field is present, blank or not.
func (in Input) Has(name string) bool {
	_, ok := in[name]
	return ok
}
