// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
)

// checkGrant compares an answer with its request. It returns the granted
// scopes, sorted and without repeats; those that were asked for and not
// granted; or an error that names what Cable granted and was not asked for.
//
// An answer without scopes takes the asked ones: Cable's schema does not
// require them in the answer.
func checkGrant(asked cable.TokenRequest, got *cable.Token) (granted, missing []string, err error) {
	if got.OrganizationID != asked.OrganizationID {
		return nil, nil, fmt.Errorf("the token is for organization %.100q instead of %q", got.OrganizationID, asked.OrganizationID)
	}
	if inner := got.ScopesOrganizationID; inner != "" && inner != asked.OrganizationID {
		return nil, nil, fmt.Errorf("the token's scopes are for organization %.100q instead of %q", inner, asked.OrganizationID)
	}
	if got.Scopes == nil {
		return asked.Scopes, nil, nil
	}
	granted = append([]string{}, got.Scopes...) // not nil: an empty list is an answer, too
	slices.Sort(granted)
	granted = slices.Compact(granted)
	if extra := without(granted, asked.Scopes); len(extra) > 0 {
		return nil, nil, fmt.Errorf("the token holds scopes that were not asked for: %s", nameSome(extra))
	}
	return granted, without(asked.Scopes, granted), nil
}

// without returns the elements of all that are not among taken.
func without(all, taken []string) []string {
	return slices.DeleteFunc(slices.Clone(all), func(s string) bool { return slices.Contains(taken, s) })
}

// nameAll quotes names for a message: those of a role, so at most maxScopes.
func nameAll(names []string) string {
	quoted := make([]string, len(names))
	for i, n := range names {
		quoted[i] = strconv.Quote(n)
	}
	return strings.Join(quoted, ", ")
}

// nameSome is nameAll with an end, for names that Cable sent.
func nameSome(names []string) string {
	const most = 10
	quoted := make([]string, 0, most+1)
	for i, n := range names {
		if i == most {
			quoted = append(quoted, fmt.Sprintf("and %d more", len(names)-most))
			break
		}
		quoted = append(quoted, fmt.Sprintf("%.128q", n))
	}
	return strings.Join(quoted, ", ")
}
