// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"encoding/json"
	"fmt"
)

// redacted is printed in place of a secret.
const redacted = "[redacted]"

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
