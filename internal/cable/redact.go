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
	whole   []string            // each spelling, for secrets shorter than a window
	windows map[string]struct{} // each run of redactWindow bytes of each spelling
}

// newRedactor knows the secret as it is and as servers like to echo it: in
// URL encoding and in base64.
func newRedactor(secret Secret) redactor {
	key := secret.Reveal()
	if key == "" {
		return redactor{}
	}
	r := redactor{windows: make(map[string]struct{})}
	for _, s := range []string{
		key, url.QueryEscape(key), url.PathEscape(key),
		base64.RawStdEncoding.EncodeToString([]byte(key)),
		base64.RawURLEncoding.EncodeToString([]byte(key)),
	} {
		r.whole = append(r.whole, s)
		for i := 0; i+redactWindow <= len(s); i++ {
			r.windows[s[i:i+redactWindow]] = struct{}{}
		}
	}
	return r
}

// contains reports whether s holds the secret, or a part of it.
func (r redactor) contains(s string) bool { return r.redact(s) != s }

// redact replaces each part of s that is a part of the secret.
func (r redactor) redact(s string) string {
	for _, w := range r.whole {
		s = strings.ReplaceAll(s, w, redacted)
	}
	if len(r.windows) == 0 {
		return s
	}
	var out strings.Builder
	kept := 0 // s[:kept] is written or redacted
	for i := 0; i+redactWindow <= len(s); {
		if _, hit := r.windows[s[i:i+redactWindow]]; !hit {
			i++
			continue
		}
		end := i + redactWindow
		for next := i + 1; next+redactWindow <= len(s); next++ {
			if _, hit := r.windows[s[next:next+redactWindow]]; !hit {
				break
			}
			end = next + redactWindow
		}
		out.WriteString(s[kept:i])
		out.WriteString(redacted)
		kept, i = end, end
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
