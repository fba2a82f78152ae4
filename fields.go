// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/hashicorp/go-secure-stdlib/parseutil"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// What a request may carry is decided here, before the framework sees it:
//
//   - A field that the path does not know is refused, with the known ones.
//   - A field is bounded before it is split, converted or sorted.
//   - A field has the type that it is documented with. The framework would
//     print a value that it cannot convert, also that of refresh_key.
//   - A field that is present has a value: neither empty nor null. In a write of
//     config or a role that is for the handler to judge, because what a read
//     returned may be written back; see input.changed.
//   - An error repeats a value only if it has the shape of the field's valid
//     values, and that shape cannot be a secret. Anything else is described by
//     its length or type.
//
// The values that pass are of one Go type per field type, so that handlers and
// the framework see the same thing in whichever form a caller wrote it.

const (
	maxFields       = 64       // of one request
	maxFieldBytes   = 1 << 10  // of a field without a bound of its own
	maxListBytes    = 64 << 10 // of a list, separators included
	maxListElements = 1024     // of a list, before duplicates are dropped

	maxScopes      = 64  // per role
	maxScopeLength = 128 // characters
	maxRoleName    = 128 // characters

	// maxOrganizationID is in characters; Cable's sample has 24.
	maxOrganizationID = 128

	// maxRefreshKey is in bytes: the key travels in a header, and common servers
	// take 8 KiB of those.
	maxRefreshKey = 8 << 10
)

// fieldBounds are the fields that may be longer than maxFieldBytes, in bytes,
// white space included.
var fieldBounds = map[string]int{
	"refresh_key": 2 * maxRefreshKey,
	"token_url":   2 << 10,
	"ca_cert":     64 << 10,
}

// readOnlyFields may be written back as they were read.
var readOnlyFields = []string{"refresh_key_version", "refresh_key_updated_at"}

// What may be repeated in an error, by its shape.
var (
	wordShape   = regexp.MustCompile(`^[a-z_]{1,20}$`)                                                     // field names, auth_scheme
	nameShape   = regexp.MustCompile(`^[a-z]{1,12}[0-9]{0,3}[a-z]{0,2}([_.-][a-z]{1,12}[0-9]{0,3}){0,3}$`) // role names
	scopeShape  = regexp.MustCompile(`^[a-z_]{1,40}:[a-z_]{1,20}$`)                                        // as in Cable's reference
	orgShape    = regexp.MustCompile(`^org_[0-9A-Za-z]{1,32}$`)                                            // as in Cable's sample
	numberShape = regexp.MustCompile(`^-?[0-9]{1,7}(\.[0-9]{1,3})?[a-z]{0,2}$`)                            // numbers and durations
)

// shown repeats s if it has that shape, and else describes it: for fields of a
// log line or an event.
func shown(shape *regexp.Regexp, s string) string {
	if s == "" || shape.MatchString(s) {
		return s
	}
	return fmt.Sprintf("(not shown: length %d)", utf8.RuneCountInString(s))
}

// show is shown for a sentence: what is repeated is quoted.
func show(shape *regexp.Regexp, s string) string {
	if text := shown(shape, s); text != s {
		return text
	}
	return strconv.Quote(s)
}

// shownScopes is shown for some scopes, at most ten of them.
func shownScopes(scopes []string) []string {
	const most = 10
	list := make([]string, 0, most+1)
	for i, s := range scopes {
		if i == most {
			list = append(list, fmt.Sprintf("and %d more", len(scopes)-most))
			break
		}
		list = append(list, shown(scopeShape, s))
	}
	return list
}

// showScopes is shownScopes for a sentence.
func showScopes(scopes []string) string {
	list := shownScopes(scopes)
	for i, s := range list {
		if scopeShape.MatchString(s) {
			list[i] = strconv.Quote(s)
		}
	}
	return strings.Join(list, ", ")
}

// without returns the elements of all that are not among taken.
func without(all, taken []string) []string {
	return slices.DeleteFunc(slices.Clone(all), func(s string) bool { return slices.Contains(taken, s) })
}

// parseRequest returns the request's data with each value in its one Go type,
// or an error for the caller. If there is no such path or operation, there is
// none, and the framework is left to say so.
func parseRequest(path *framework.Path, req *logical.Request) (map[string]any, error) {
	if path == nil || path.Operations[req.Operation] == nil {
		return nil, nil
	}
	known := knownFields(path, req.Operation)
	takes := fmt.Sprintf("%s of this path takes %s", req.Operation, strings.Join(without(known, readOnlyFields), ", "))
	if len(known) == 0 {
		takes = fmt.Sprintf("%s of this path takes no parameters", req.Operation)
	}
	if len(req.Data) > maxFields {
		return nil, fmt.Errorf("the request has %d fields: %s", len(req.Data), takes)
	}
	data := make(map[string]any, len(req.Data))
	for _, name := range slices.Sorted(maps.Keys(req.Data)) {
		if !slices.Contains(known, name) {
			return nil, fmt.Errorf("unknown field %s: %s", show(wordShape, name), takes)
		}
		value, err := parseValue(path.Fields[name], name, req.Data[name])
		isText := path.Fields[name].Query && path.Fields[name].Type == framework.TypeString && value != nil // such as after=
		if err == nil && isBlank(value) && !isText && !keepsBlank(path, req.Operation) {
			err = blankError(value)
		}
		if err != nil {
			return nil, fmt.Errorf("%s %w", name, err)
		}
		data[name] = value
	}
	return data, nil
}

// keepsBlank reports whether the handler judges blank fields itself.
func keepsBlank(path *framework.Path, op logical.Operation) bool {
	pattern := strings.Trim(path.Pattern, "^$") // the framework anchors it
	isEntry := pattern == configStoragePath || strings.HasPrefix(pattern, rolesStoragePrefix)
	return isEntry && (op == logical.CreateOperation || op == logical.UpdateOperation || op == logical.PatchOperation)
}

// knownFields lists what an operation on path takes, sorted: its query fields
// for those that have no body, all but the path's own name for the others.
func knownFields(path *framework.Path, op logical.Operation) []string {
	var known []string
	for name, schema := range path.Fields {
		switch op {
		case logical.CreateOperation, logical.UpdateOperation, logical.PatchOperation:
			if name != "name" {
				known = append(known, name)
			}
		default:
			if schema.Query {
				known = append(known, name)
			}
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

// parseValue converts value to its field's type: string, bool, int (whole
// seconds for a duration) or []string; nil if it is null, and "" if it is an
// empty text for any type.
func parseValue(schema *framework.FieldSchema, name string, value any) (any, error) {
	if value == nil {
		return nil, nil
	}
	if schema.Type == framework.TypeCommaStringSlice {
		return parseList(value)
	}
	text, isText := value.(string)
	if isText {
		bound := maxFieldBytes
		if n, ok := fieldBounds[name]; ok {
			bound = n
		}
		if len(text) > bound {
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
			return nil, fmt.Errorf("must be true or false, not %s", show(wordShape, text))
		}
		return b, nil
	case framework.TypeDurationSecond, framework.TypeInt:
		return parseNumber(schema.Type, value)
	default:
		return nil, fmt.Errorf("is of type %s, which this engine does not read", schema.Type)
	}
}

// parseNumber reads a duration ("90m", "1h30m", "1d", "600", 600) as whole
// seconds, or a count as an int.
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
	invalid := fmt.Errorf("is %s: write %s, %s", show(numberShape, text), what, example)
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
		return 0, fmt.Errorf("is %s, and a duration cannot be negative: write one %s", show(numberShape, text), example)
	}
	return int(min(d/time.Second, math.MaxInt32)), nil
}

// parseList reads a list of strings: comma-separated text, or a JSON array
// whose elements may be comma-separated too, as repeated query keys are.
func parseList(value any) ([]string, error) {
	var texts []string
	bytes, elements := 0, 0
	add := func(s string) error {
		if bytes += len(s) + 1; bytes > maxListBytes {
			return fmt.Errorf("is too long: at most %d bytes are allowed", maxListBytes)
		}
		if elements += strings.Count(s, ",") + 1; elements > maxListElements {
			return fmt.Errorf("has more than %d elements", maxListElements)
		}
		if !utf8.ValidString(s) {
			return errors.New("is not valid UTF-8")
		}
		texts = append(texts, s)
		return nil
	}
	switch v := value.(type) {
	case string:
		if err := add(v); err != nil {
			return nil, err
		}
	case []string:
		for _, s := range v {
			if err := add(s); err != nil {
				return nil, err
			}
		}
	case []any:
		for _, e := range v {
			s, ok := e.(string)
			if !ok {
				return nil, fmt.Errorf("must be a list of strings, but contains %s", jsonType(e))
			}
			if err := add(s); err != nil {
				return nil, err
			}
		}
	default:
		return nil, fmt.Errorf("must be a comma-separated list or an array of strings, not %s", jsonType(value))
	}
	list := make([]string, 0, elements)
	for _, text := range texts {
		for s := range strings.SplitSeq(text, ",") {
			if s = strings.TrimSpace(s); s != "" {
				list = append(list, s)
			}
		}
	}
	return list, nil
}

// parseScopes sorts scopes and drops duplicates. The refusal describes what
// cannot be a scope.
func parseScopes(list []string) ([]string, error) {
	scopes := slices.Clone(list)
	slices.Sort(scopes)
	scopes = slices.Compact(scopes)
	if len(scopes) > maxScopes {
		return nil, refusal(fmt.Sprintf("scopes names %d: at most %d are allowed", len(scopes), maxScopes))
	}
	for _, s := range scopes {
		if err := checkWord(s, maxScopeLength); err != nil {
			return nil, refusal(fmt.Sprintf(`a scope %s: write scopes as "resource:action", separated by commas`, err))
		}
	}
	return scopes, nil
}

// jsonType names the JSON type of value, in place of value.
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

// checkWord refuses what must be one plain word, such as an organization's id.
// maxLen counts characters.
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

// input is the fields of a write as parseRequest left them.
type input map[string]any

// changed returns the fields that change the stored entry, given as a read
// returns it. What repeats the stored value is dropped, blank if none is
// stored and the read-only fields included, so that what a read returned can be
// written back. Any other blank is refused, but for those that clears reports
// as removing a value, and so is any other value of a read-only field.
func (in input) changed(stored map[string]any, clears func(name string, value any) bool) (input, error) {
	out := make(input, len(in))
	for _, name := range slices.Sorted(maps.Keys(in)) {
		value := in[name]
		old, isStored := stored[name]
		switch {
		case name == "name": // of the path, not a field
		case isStored && sameValue(value, old):
		case slices.Contains(readOnlyFields, name):
			return nil, refusal(fmt.Sprintf("%s is read-only, and the stored value is another: leave it out", name))
		case isBlank(value) && !clears(name, value):
			return nil, refusal(fmt.Sprintf("%s %s", name, blankError(value)))
		default:
			out[name] = value
		}
	}
	return out, nil
}

// sameValue compares a parsed value with a stored one as a read returns it.
func sameValue(value, stored any) bool {
	if isBlank(value) {
		switch s := stored.(type) {
		case int:
			return s == 0
		case int64:
			return s == 0
		case bool:
			return false // disabled= of a script with an empty variable must not seem done
		default:
			return isBlank(s)
		}
	}
	switch v := value.(type) {
	case string:
		s, ok := stored.(string)
		return ok && strings.TrimSpace(v) == strings.TrimSpace(s)
	case int:
		switch s := stored.(type) {
		case int:
			return v == s
		case int64:
			return int64(v) == s
		}
	case bool:
		return v == stored
	case []string:
		s, ok := stored.([]string)
		v = slices.Sorted(slices.Values(v))
		return ok && slices.Equal(slices.Compact(v), s)
	}
	return false
}

// text returns a field's text without outer white space, "" if it is blank, and
// whether the field is present.
func (in input) text(name string) (string, bool) {
	v, ok := in[name]
	s, _ := v.(string)
	return strings.TrimSpace(s), ok
}

// has reports whether a field is present, blank or not.
func (in input) has(name string) bool {
	_, ok := in[name]
	return ok
}
