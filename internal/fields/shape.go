// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package fields

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Shape matches the values of a field that an error or a log line may repeat. No secret has a shape that matches.
type Shape struct{ pattern *regexp.Regexp }

// The shapes of the fields whose values are repeated.
var (
	Word         = shape(`^[a-z_]{1,20}$`) // field names, auth_scheme
	RoleName     = shape(`^[a-z]{1,12}[0-9]{0,3}[a-z]{0,2}([_.-][a-z]{1,12}[0-9]{0,3}){0,3}$`)
	Scope        = shape(`^[a-z_]{1,40}:[a-z_]{1,20}$`)             // as in Cable's reference
	Organization = shape(`^org_[0-9A-Za-z]{1,32}$`)                 // as in Cable's sample
	number       = shape(`^-?[0-9]{1,7}(\.[0-9]{1,3})?[a-z]{0,2}$`) // numbers and durations
)

func shape(pattern string) Shape { return Shape{regexp.MustCompile(pattern)} }

// Redact returns text if it has the shape, and its length otherwise. It is for fields of a log line.
func (s Shape) Redact(text string) string {
	if text == "" || s.pattern.MatchString(text) {
		return text
	}
	return fmt.Sprintf("(not shown: length %d)", utf8.RuneCountInString(text))
}

// Quote returns text in quotes if it has the shape, and its length otherwise. It is for sentences.
func (s Shape) Quote(text string) string {
	if redacted := s.Redact(text); redacted != text {
		return redacted
	}
	return strconv.Quote(text)
}

// RedactAll redacts each of the texts, at most ten of them.
func (s Shape) RedactAll(texts []string) []string { return s.all(texts, s.Redact) }

// QuoteAll quotes each of the texts, at most ten of them, for a sentence.
func (s Shape) QuoteAll(texts []string) string { return strings.Join(s.all(texts, s.Quote), ", ") }

func (s Shape) all(texts []string, show func(string) string) []string {
	const most = 10
	list := make([]string, 0, most+1)
	for _, text := range texts[:min(len(texts), most)] {
		list = append(list, show(text))
	}
	if len(texts) > most {
		list = append(list, fmt.Sprintf("and %d more", len(texts)-most))
	}
	return list
}
