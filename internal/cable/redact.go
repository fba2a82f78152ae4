// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"encoding/base64"
	"net/url"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	// maxText bounds what an error repeats of Cable's words, in bytes.
	maxText = 512

	// redactWindow is the length of the shortest part of a secret that is
	// recognised in a text: long enough that words do not match by chance, short
	// enough that a cut-off echo of the key gives nothing away.
	redactWindow = 12
)

// redactor finds a secret, or a part of one, in text that another party wrote.
type redactor struct {
	short   []string            // spellings that are shorter than a window
	windows map[string]struct{} // each run of redactWindow bytes of the others
	begins  *[1 << 16]bool      // the first two bytes of each window: most text is passed over by these
}

// newRedactor knows the secret as it is and as servers like to echo it: in
// URL encoding and in base64.
func newRedactor(secret Secret) redactor {
	key := secret.Reveal()
	if key == "" {
		return redactor{}
	}
	r := redactor{windows: make(map[string]struct{}), begins: new([1 << 16]bool)}
	for _, s := range []string{
		key, url.QueryEscape(key), url.PathEscape(key),
		base64.RawStdEncoding.EncodeToString([]byte(key)),
		base64.RawURLEncoding.EncodeToString([]byte(key)),
	} {
		if len(s) < redactWindow {
			r.short = append(r.short, s)
		}
		for i := 0; i+redactWindow <= len(s); i++ {
			r.windows[s[i:i+redactWindow]] = struct{}{}
			r.begins[pair(s, i)] = true
		}
	}
	return r
}

// pair is the two bytes of s at i, as an index.
func pair(s string, i int) uint16 { return uint16(s[i])<<8 | uint16(s[i+1]) }

// at reports whether a part of the secret, a window long, stands in s at i.
func (r redactor) at(s string, i int) bool {
	if r.begins == nil || i+redactWindow > len(s) || !r.begins[pair(s, i)] {
		return false
	}
	_, hit := r.windows[s[i:i+redactWindow]]
	return hit
}

// contains reports whether s holds the secret, or a part of it.
func (r redactor) contains(s string) bool {
	for _, short := range r.short {
		if strings.Contains(s, short) {
			return true
		}
	}
	for i := range len(s) {
		if r.at(s, i) {
			return true
		}
	}
	return false
}

// redact replaces each part of s that is a part of the secret.
func (r redactor) redact(s string) string {
	for _, short := range r.short {
		s = strings.ReplaceAll(s, short, redacted)
	}
	var out strings.Builder
	kept := 0 // s[:kept] is written or redacted
	for i := 0; i < len(s); i++ {
		if !r.at(s, i) {
			continue
		}
		end := i + redactWindow
		for next := i + 1; r.at(s, next); next++ {
			end = next + redactWindow
		}
		out.WriteString(s[kept:i])
		out.WriteString(redacted)
		kept, i = end, end-1
	}
	out.WriteString(s[kept:])
	return out.String()
}

// clean makes text that Cable wrote fit to stand in an error: the key is
// redacted, what does not print is escaped, and the whole is cut at maxText
// bytes. Redaction comes first: a cut could leave a part of the key.
func (r redactor) clean(s string) string {
	s = r.redact(s)
	var out strings.Builder
	for i, c := range s {
		part := string(c)
		switch {
		case c == utf8.RuneError && !strings.HasPrefix(s[i:], part):
			part = `\x` + strconv.FormatUint(uint64(s[i]), 16) // not UTF-8
		case !unicode.IsPrint(c):
			part = strings.Trim(strconv.QuoteRune(c), "'")
		}
		if out.Len()+len(part) > maxText {
			break
		}
		out.WriteString(part)
	}
	return out.String()
}
