// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package fields

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// The other rules are tested on every path of the engine, in the root package's fields_test.go.

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
