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
//   - A field that is present has a value: neither empty nor null. Only a patch
//     may set a field to null that is marked as clearable, to remove it.
//   - A field has the type that it is documented with. The framework would
//     print a value that it cannot convert, also that of refresh_key.
//
// The values that pass are of one Go type per field type, so that handlers and
// the framework see the same thing in whichever form a caller wrote it.

// echoable matches field names and values that may be repeated in an error:
// short words without digits. A refresh key put in the wrong place is none.
var echoable = regexp.MustCompile(`^[A-Za-z][A-Za-z_.-]{0,23}$`)

// echoableNumber matches what was meant for a number or a duration.
var echoableNumber = regexp.MustCompile(`^-?[0-9]{1,10}[.e]?[0-9]{0,3}[a-z]{0,2}$`)

// echo names s in an error if it cannot be a secret.
func echo(s string) string {
	if echoable.MatchString(s) {
		return strconv.Quote(s)
	}
	return "(not shown)"
}

// checkRequest is checkFields for a request's own path. Where there is no such
// path or operation, the framework is left to say so.
func (b *backend) checkRequest(req *logical.Request) (map[string]any, error) {
	path := b.Route(req.Path)
	if path == nil || path.Operations[req.Operation] == nil {
		return req.Data, nil
	}
	return checkFields(path, clearableFields(path), req)
}

// checkFields returns the request's data with each value in its one Go type,
// or an error for the caller, which holds no value of a sensitive field.
func checkFields(path *framework.Path, clearable []string, req *logical.Request) (map[string]any, error) {
	known := knownFields(path, req.Operation)
	data := make(map[string]any, len(req.Data))
	for _, name := range slices.Sorted(maps.Keys(req.Data)) {
		schema := path.Fields[name]
		if !slices.Contains(known, name) {
			if len(known) == 0 {
				return nil, fmt.Errorf("unknown field %s: %s of this path takes no parameters", echo(name), req.Operation)
			}
			return nil, fmt.Errorf("unknown field %s: %s of this path takes %s", echo(name), req.Operation, strings.Join(known, ", "))
		}
		value := req.Data[name]
		if value == nil && req.Operation == logical.PatchOperation && slices.Contains(clearable, name) {
			data[name] = nil
			continue
		}
		value, err := checkValue(schema, value)
		if err != nil {
			return nil, fmt.Errorf("%s %w", name, err)
		}
		data[name] = value
	}
	return data, nil
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

// checkValue converts value to its field's type: string, bool, int (whole
// seconds for a duration) or []string.
func checkValue(schema *framework.FieldSchema, value any) (any, error) {
	if value == nil {
		return nil, errors.New("must not be null: give it a value or leave it out")
	}
	text, isText := value.(string)
	if isText && !utf8.ValidString(text) {
		return nil, errors.New("is not valid UTF-8")
	}
	switch schema.Type {
	case framework.TypeString:
		if !isText {
			return nil, fmt.Errorf("must be a string, not %s", jsonType(value))
		}
		if strings.TrimSpace(text) == "" && !schema.Query {
			return nil, errors.New("must not be empty: give it a value or leave it out")
		}
		return text, nil
	case framework.TypeBool:
		if b, ok := value.(bool); ok {
			return b, nil
		}
		if !isText {
			return nil, fmt.Errorf("must be true or false, not %s", jsonType(value))
		}
		if strings.TrimSpace(text) == "" {
			return nil, errors.New("must not be empty: write true or false")
		}
		b, err := strconv.ParseBool(strings.TrimSpace(text))
		if err != nil {
			return nil, fmt.Errorf("must be true or false, not %s", echo(text))
		}
		return b, nil
	case framework.TypeDurationSecond, framework.TypeInt:
		return checkSeconds(schema, value)
	case framework.TypeCommaStringSlice:
		return checkList(value)
	default:
		return nil, fmt.Errorf("is of type %s, which this engine does not read", schema.Type)
	}
}

// checkSeconds reads a duration ("90m", "1h30m", "1d", "600", 600) as whole
// seconds, or a count as an int.
func checkSeconds(schema *framework.FieldSchema, value any) (int, error) {
	kind, example := "a duration", `such as 600, "10m" or "1h"`
	if schema.Type == framework.TypeInt {
		kind, example = "a whole number", "such as 100"
	}
	var shown string
	switch v := value.(type) {
	case string:
		if strings.TrimSpace(v) == "" {
			return 0, fmt.Errorf("must not be empty: write %s, %s", kind, example)
		}
		shown = echoNumber(v)
		value = strings.TrimSpace(v)
	case json.Number:
		shown = echoNumber(v.String())
	case float64:
		shown = strconv.FormatFloat(v, 'f', -1, 64)
		if v != math.Trunc(v) {
			return 0, fmt.Errorf("is %.40s: write %s in whole seconds, %s", shown, kind, example)
		}
		value = int64(min(max(v, -math.MaxInt32), math.MaxInt32))
	case int:
		shown = strconv.Itoa(v)
	case int64:
		shown = strconv.FormatInt(v, 10)
	default:
		return 0, fmt.Errorf("must be %s, not %s", kind, jsonType(value))
	}
	if schema.Type == framework.TypeInt {
		n, err := parseutil.ParseInt(value)
		if err != nil || n < math.MinInt32 || n > math.MaxInt32 {
			return 0, fmt.Errorf("is %s: write %s, %s", shown, kind, example)
		}
		return int(n), nil
	}
	d, err := parseutil.ParseDurationSecond(value)
	if errors.Is(err, parseutil.ErrDurationMultiplicationOverflow) {
		d, err = math.MaxInt32*time.Second, nil // longer than anything allowed, which the bounds will say
	}
	if err != nil || d != d.Truncate(time.Second) {
		return 0, fmt.Errorf("is %s: write %s in whole seconds, %s", shown, kind, example)
	}
	if d < 0 {
		return 0, fmt.Errorf("is %s, and a duration cannot be negative: write one %s", shown, example)
	}
	return int(min(d/time.Second, math.MaxInt32)), nil
}

// echoNumber quotes what was written for a number, if it can be nothing else.
func echoNumber(s string) string {
	if echoableNumber.MatchString(s) {
		return strconv.Quote(s)
	}
	return echo(s)
}

// checkList reads a list of strings: comma-separated text, or a JSON array
// whose elements may be comma-separated too, as repeated query keys are.
func checkList(value any) ([]string, error) {
	var parts []string
	switch v := value.(type) {
	case string:
		parts = strings.Split(v, ",")
	case []string:
		parts = strings.Split(strings.Join(v, ","), ",")
	case []any:
		for _, e := range v {
			s, ok := e.(string)
			if !ok {
				return nil, fmt.Errorf("must be a list of strings, but holds %s", jsonType(e))
			}
			parts = append(parts, strings.Split(s, ",")...)
		}
	default:
		return nil, fmt.Errorf("must be a comma-separated list or an array of strings, not %s", jsonType(value))
	}
	list := make([]string, 0, len(parts))
	for _, p := range parts {
		if p = strings.TrimSpace(p); p != "" {
			list = append(list, p)
		}
	}
	if len(list) == 0 {
		return nil, errors.New("must not be empty: name at least one, or leave the field out")
	}
	return list, nil
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

// checkName refuses what must be one plain word, such as an organization's id.
// maxLen counts characters.
func checkName(s string, maxLen int) error {
	if n := utf8.RuneCountInString(s); n > maxLen {
		return fmt.Errorf("is %d characters long: at most %d are allowed", n, maxLen)
	}
	for _, c := range s {
		if unicode.IsSpace(c) || !unicode.IsPrint(c) || strings.ContainsRune("\"'`", c) || c == utf8.RuneError {
			return errors.New("must not hold white space, quotes or control characters")
		}
	}
	return nil
}
