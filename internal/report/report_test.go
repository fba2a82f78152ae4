// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package report

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/share"
)

// testReporter is a Reporter whose log is kept.
type testReporter struct {
	*Reporter
	log *bytes.Buffer
}

func newTestReporter(level hclog.Level) *testReporter {
	p := &testReporter{log: new(bytes.Buffer)}
	logger := hclog.New(&hclog.LoggerOptions{Output: p.log, Level: level})
	p.Reporter = New(func() hclog.Logger { return logger })
	return p
}

// count adds up a counter, or the observations of a histogram, over its labels.
func (p *testReporter) count(t *testing.T, name string) (n int) {
	t.Helper()
	families, err := p.Metrics().Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != metricsNamespace+"_"+name {
			continue
		}
		for _, m := range f.GetMetric() {
			n += int(m.GetCounter().GetValue()) + int(m.GetHistogram().GetSampleCount())
		}
	}
	return n
}

// TestTokenRequestEnded checks for each part that a request can have, and each end, how
// often it is counted and logged, and that nothing shows the token.
func TestTokenRequestEnded(t *testing.T) {
	t.Parallel()
	token := &outcome.Token{Token: &cable.Token{
		Value: cable.NewSecret("TOKENCANARY"), Expiry: time.Now().Unix() + 300, Attempts: 1, OrganizationName: "Name",
	}}
	lost := outcome.Classify(&cable.Error{Kind: cable.TimedOut, Attempts: 1, MaybeIssued: true})
	lost.Undelivered(token.Expiry)
	ends := map[string]TokenRequest{
		"minted":    {Token: token},
		"reused":    {Token: token, Shared: share.Result{Reused: true, Age: time.Minute}},
		"fallback":  {Token: token, Shared: share.Result{Reused: true, Fallback: outcome.CableError}},
		"refused":   {Failure: outcome.Classify(outcome.Refuse("no"))},
		"lost":      {Failure: lost, Shared: share.Result{CallFailed: true, Waited: true}},
		"dropped":   {Failure: outcome.Drop(outcome.Refuse("the role was disabled"), token.Token)},
		"mismatch":  {Failure: outcome.Drop(outcome.Mismatch("another organization"), token.Token)},
		"no budget": {Failure: outcome.Classify(outcome.ErrBudget)},
		"storage":   {Failure: outcome.Classify(context.Canceled)},
	}
	type counts struct{ requests, lifetimes, undelivered, mismatches, ages, fallbacks, durations, lines int }
	for _, tt := range []struct {
		kind Kind
		end  string
		want counts
	}{
		{Direct, "minted", counts{requests: 1, lifetimes: 1, durations: 1, lines: 1}},
		{Direct, "refused", counts{requests: 1, lines: 1}},
		{Direct, "lost", counts{requests: 1, undelivered: 1, durations: 1, lines: 1}},
		{Direct, "dropped", counts{requests: 1, undelivered: 1, durations: 1, lines: 1}},
		{Direct, "mismatch", counts{requests: 1, undelivered: 1, mismatches: 1, durations: 1, lines: 1}},
		{Direct, "no budget", counts{requests: 1, lines: 1}},
		{Direct, "storage", counts{requests: 1, lines: 1}},
		{Trial, "minted", counts{lines: 1}},
		{Trial, "lost", counts{lines: 1}},
		{Trial, "mismatch", counts{lines: 1}},
		{SharedCall, "minted", counts{lifetimes: 1, lines: 1}},
		{SharedCall, "lost", counts{undelivered: 1, lines: 1}},
		{SharedCall, "dropped", counts{undelivered: 1, lines: 1}},
		{SharedCall, "mismatch", counts{undelivered: 1, mismatches: 1, lines: 1}},
		{Reader, "minted", counts{requests: 1}},
		{Reader, "reused", counts{requests: 1, ages: 1, lines: 1}},
		{Reader, "fallback", counts{requests: 1, ages: 1, fallbacks: 1, lines: 1}},
		{Reader, "refused", counts{requests: 1, lines: 1}},
		{Reader, "lost", counts{requests: 1, durations: 1, lines: 1}},
	} {
		p := newTestReporter(hclog.Trace)
		r := ends[tt.end]
		r.Kind, r.Role, r.RoleExists, r.RoleIsCurrent, r.Path = tt.kind, "ci", true, true, "creds/ci"
		p.TokenRequestEnded(r)
		got := counts{
			requests:    p.count(t, "token_requests_total"),
			lifetimes:   p.count(t, "granted_lifetime_seconds"),
			undelivered: p.count(t, "undelivered_tokens_total"),
			mismatches:  p.count(t, "grant_mismatches_total"),
			ages:        p.count(t, "reused_token_age_seconds"),
			fallbacks:   p.count(t, "reuse_fallbacks_total"),
			durations:   p.count(t, "token_request_duration_seconds"),
			lines:       strings.Count(p.log.String(), "\n"),
		}
		if got != tt.want {
			t.Errorf("%s, kind %d:\n got %+v\nwant %+v\n%s", tt.end, tt.kind, got, tt.want, p.log)
		}
		if shown := p.log.String() + fmt.Sprint(p.Status()); strings.Contains(shown, "CANARY") {
			t.Errorf("%s, kind %d: the token is shown: %s", tt.end, tt.kind, shown)
		}
	}
}

// TestLabelsAreBounded checks that roles which do not exist, or were deleted, take no
// series, that a thousand roles have one, and that a deleted role's is given up.
func TestLabelsAreBounded(t *testing.T) {
	t.Parallel()
	p := newTestReporter(hclog.Off)
	end := func(role string, exists, isCurrent bool) string {
		r := TokenRequest{
			Role: role, RoleExists: exists, RoleIsCurrent: isCurrent, Failure: outcome.Classify(outcome.Refuse("no")),
		}
		p.TokenRequestEnded(r)
		return p.metrics.roleLabel(&r)
	}
	for i := range 2 * maxMeteredRoles {
		end(fmt.Sprintf("%s%d", cabletest.RefreshKeyMarker, i), false, false)
		end(fmt.Sprintf("deleted%d", i), true, false)
	}
	for i := range maxMeteredRoles {
		if name := fmt.Sprintf("r%d", i); end(name, true, true) != name {
			t.Fatalf("role %d has no series", i)
		}
	}
	if end("late", true, true) != otherRoles || end("r0", true, false) != "r0" {
		t.Error("a role beyond the bound has a series, or one within it has none")
	}
	families, err := p.Metrics().Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if n := len(f.GetMetric()); n > maxMeteredRoles+2 {
			t.Errorf("%s has %d series", f.GetName(), n)
		}
	}
	p.RoleGone("r0")
	if end("late", true, true) != "late" {
		t.Error("a deleted role keeps its place")
	}
}
