// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"html"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

const (
	redacted = "[redacted]" // is printed in place of a secret
	maxText  = 512          // bytes of Cable's message that an error repeats

	// redactWindow is the length of the shortest part of a secret that is recognised in a text, long enough that words
	// do not match by chance, short enough that a shorter part of the key is of no use.
	redactWindow = 12
)

// Secret is a refresh key or an access token that no formatting verb and no encoder prints; only [Secret.Reveal]
// returns it. The zero value is the empty secret.
//
// NOTE: the text is behind a pointer on purpose. fmt does not call the methods of unexported struct fields, and would
// print a plain string there; of a pointer inside a struct it prints the address.
type Secret struct{ text *string }

// NewSecret wraps s.
func NewSecret(s string) Secret {
	if s == "" {
		return Secret{}
	}
	return Secret{text: &s}
}

// Reveal returns the text itself, for the one header, response or storage entry that must contain it.
func (s Secret) Reveal() string {
	if s.text == nil {
		return ""
	}
	return *s.text
}

// IsZero reports whether the secret is empty.
func (s Secret) IsZero() bool { return s.text == nil }

// Format implements [fmt.Formatter] for every verb and flag.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(redacted)) }

// MarshalJSON implements [json.Marshaler].
func (s Secret) MarshalJSON() ([]byte, error) { return json.Marshal(redacted) }

// MarshalText implements [encoding.TextMarshaler], which encoders other than JSON's use.
func (s Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// redactor finds a secret, or a part of one, in text that another party wrote.
//
// NOTE: the secret is behind a func on purpose, because fmt prints the address of a func for every verb, but follows a
// pointer to a struct for some.
type redactor struct{ known func() *spellings }

// spellings are a secret as it is and in the encodings in which servers echo it.
type spellings struct {
	whole   []string
	windows map[string]struct{} // each run of redactWindow bytes of them
}

// newRedactor returns a redactor that finds the secret as it is, in URL, HTML and hexadecimal encoding, quoted, and in
// the base64 of a text that contains it.
func newRedactor(secret Secret) redactor {
	key := secret.Reveal()
	k := &spellings{windows: make(map[string]struct{})}
	inHex := hex.EncodeToString([]byte(key))
	quoted := strconv.Quote(key)
	inJSON, _ := json.Marshal(key) // a string always marshals
	all := append(base64Runs(key), key, html.EscapeString(key), inHex, strings.ToUpper(inHex),
		quoted[1:len(quoted)-1], string(inJSON[1:len(inJSON)-1]))
	for _, s := range []string{url.QueryEscape(key), url.PathEscape(key)} {
		all = append(all, s, percents.ReplaceAllStringFunc(s, strings.ToLower))
	}
	slices.Sort(all)
	for _, s := range slices.Compact(all) {
		if len(s) < len(key) {
			continue // a run of a short key's base64
		}
		k.whole = append(k.whole, s)
		for i := 0; i+redactWindow <= len(s); i++ {
			k.windows[s[i:i+redactWindow]] = struct{}{}
		}
	}
	return redactor{func() *spellings { return k }}
}

var percents = regexp.MustCompile(`%[0-9A-F]{2}`) // bytes in URL encoding, which some servers write in lower case

// base64Runs returns the part of a text's base64 that depends on the key alone, for each offset at which the key can
// begin, because three bytes make four characters.
func base64Runs(key string) []string {
	var runs []string
	for _, enc := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
		for before := range 3 {
			s := enc.EncodeToString([]byte(strings.Repeat("\x00", before) + key))
			s = s[min(len(s), (before*8+5)/6):]
			runs = append(runs, s)
			if (before+len(key))%3 != 0 && s != "" {
				runs = append(runs, s[:len(s)-1]) // the last one depends on the next byte, too
			}
		}
	}
	return runs
}

// at returns the end of the part of the secret that begins in s at i, or i if none does.
func (k *spellings) at(s string, i int) int {
	if i+redactWindow <= len(s) {
		if _, hit := k.windows[s[i:i+redactWindow]]; hit {
			return i + redactWindow
		}
	}
	for _, w := range k.whole {
		if len(w) < redactWindow && strings.HasPrefix(s[i:], w) {
			return i + len(w)
		}
	}
	return i
}

// contains reports whether s contains the secret or a part of it.
func (r redactor) contains(s string) bool { return r.redact(s) != s }

// repeats reports whether s, a token, is the secret in another form, so that it contains the whole of it, or is a part
// of it.
//
// NOTE: a part that both contain proves nothing. Both may be JWTs of one issuer, which begin alike.
func (r redactor) repeats(s string) bool {
	return slices.ContainsFunc(r.known().whole, func(w string) bool {
		return s == w || len(w) >= redactWindow && strings.Contains(s, w) ||
			len(s) >= redactWindow && strings.Contains(w, s)
	})
}

// redact replaces each part of the secret in s.
func (r redactor) redact(s string) string {
	k := r.known()
	var out strings.Builder
	kept := 0 // s[:kept] is written or redacted
	for i := 0; i < len(s); i++ {
		end := i
		for next := i; k.at(s, next) > next; next++ {
			end = k.at(s, next)
		}
		if end == i {
			continue
		}
		out.WriteString(s[kept:i])
		out.WriteString(redacted)
		kept, i = end, end-1
	}
	out.WriteString(s[kept:])
	return out.String()
}

// clean makes text that Cable wrote safe to show. It redacts the key, escapes misleading characters, and cuts the whole
// at maxText bytes.
func (r redactor) clean(s string) string { return r.show(s, maxText) }

// show is clean with another bound. Letters, marks, numbers, punctuation, symbols, spaces and the two joiners, which
// scripts and emoji need, remain as they are; controls, line separators and direction controls are escaped. Redaction
// comes first, because a cut could leave a part of the key.
func (r redactor) show(s string, limit int) string {
	s = r.redact(s)
	var out strings.Builder
	for i, c := range s {
		part := string(c)
		switch {
		case !strings.HasPrefix(s[i:], part):
			part = `\x` + strconv.FormatUint(uint64(s[i]), 16) // not UTF-8
		case !unicode.IsGraphic(c) && c != '\u200c' && c != '\u200d':
			part = strings.Trim(strconv.QuoteRune(c), "'")
		}
		if out.Len()+len(part) > limit {
			break
		}
		out.WriteString(part)
	}
	return out.String()
}
