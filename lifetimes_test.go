// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestDecideLifetime(t *testing.T) {
	t.Parallel()
	const day, month = 86400, 768 * 3600
	for _, tt := range []struct {
		name    string
		in      lifetimeInput
		ask     int64
		warning string // a part of the one warning, or ""
		refusal string // a part of the refusal, or ""
	}{
		{name: "nothing set", in: lifetimeInput{mountDefault: month, mountMax: month}, ask: 3600},
		{name: "mount default below an hour", in: lifetimeInput{mountDefault: 1800, mountMax: month}, ask: 1800},
		{name: "mount default of an hour", in: lifetimeInput{mountDefault: 3600, mountMax: month}, ask: 3600},
		{name: "mount default too short", in: lifetimeInput{mountDefault: 60, mountMax: month}, ask: 300, warning: "the mount's default_lease_ttl of 60s is below Cable's minimum: raised to 300s"},
		{name: "mount default one short", in: lifetimeInput{mountDefault: 299, mountMax: month}, ask: 300, warning: "raised to 300s"},
		{name: "mount default at the bound", in: lifetimeInput{mountDefault: 300, mountMax: month}, ask: 300},
		{name: "role", in: lifetimeInput{roleTTL: 900, mountDefault: month, mountMax: month}, ask: 900},
		{name: "role needs no mount default", in: lifetimeInput{roleTTL: 900, mountMax: month}, ask: 900},
		{name: "role above the default hour", in: lifetimeInput{roleTTL: 7200, mountDefault: 1800, mountMax: month}, ask: 7200},
		{name: "request before role", in: lifetimeInput{requestTTL: 600, roleTTL: 900, mountMax: month}, ask: 600},
		{name: "request above role", in: lifetimeInput{requestTTL: 1200, roleTTL: 900, mountMax: month}, ask: 1200},
		{name: "request at role's max", in: lifetimeInput{requestTTL: 1200, roleMaxTTL: 1200, mountMax: month}, ask: 1200},
		{name: "request above role's max", in: lifetimeInput{requestTTL: 1201, roleMaxTTL: 1200, mountMax: month}, ask: 1200, warning: "the requested ttl of 1201s is above the role's max_ttl of 1200s: capped at 1200s"},
		{name: "request above mount's max", in: lifetimeInput{requestTTL: 7200, mountMax: 3600}, ask: 3600, warning: "the requested ttl of 7200s is above the mount's max_lease_ttl of 3600s"},
		{name: "request above Cable's max", in: lifetimeInput{requestTTL: day + 1, mountMax: month}, ask: day, warning: "is above Cable's maximum of 86400s"},
		{name: "request at Cable's max", in: lifetimeInput{requestTTL: day, mountMax: month}, ask: day},
		{name: "role above mount's max", in: lifetimeInput{roleTTL: 7200, roleMaxTTL: day, mountMax: 3600}, ask: 3600, warning: "the role's ttl of 7200s is above the mount's max_lease_ttl of 3600s"},
		{name: "default above role's max", in: lifetimeInput{roleMaxTTL: 600, mountDefault: month, mountMax: month}, ask: 600, warning: "the default ttl of 3600s is above the role's max_ttl of 600s"},
		{name: "request at the bound", in: lifetimeInput{requestTTL: 300, mountMax: 300}, ask: 300},
		{name: "request one short", in: lifetimeInput{requestTTL: 299, mountMax: month}, refusal: "ttl 299s is below Cable's minimum of 300s: request 300s to 86400s"},
		{name: "request below zero", in: lifetimeInput{requestTTL: -1, mountMax: month}, refusal: "ttl -1s is below"},
		{name: "mount's max one short", in: lifetimeInput{roleTTL: 900, mountMax: 299}, refusal: "the mount's max_lease_ttl of 299s is below Cable's minimum"},
		{name: "role's max one short", in: lifetimeInput{roleMaxTTL: 299, mountMax: month}, refusal: "the role's max_ttl of 299s is below Cable's minimum"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			tt.in.hasTTL = tt.in.requestTTL != 0
			ask, warnings, err := decideLifetime(tt.in)
			if tt.refusal != "" {
				var r refusal
				if !errors.As(err, &r) || !strings.Contains(err.Error(), tt.refusal) {
					t.Fatalf("got %d, %v; want the refusal %q", ask, err, tt.refusal)
				}
				return
			}
			if err != nil || ask != tt.ask {
				t.Errorf("ask %d, %v; want %d", ask, err, tt.ask)
			}
			if tt.warning == "" && len(warnings) > 0 || tt.warning != "" && (len(warnings) != 1 || !strings.Contains(warnings[0], tt.warning)) {
				t.Errorf("warnings %q, want %q", warnings, tt.warning)
			}
		})
	}
	for _, in := range []lifetimeInput{{roleTTL: 900}, {roleTTL: 900, mountMax: -1}, {mountMax: month}} {
		if _, _, err := decideLifetime(in); !errors.Is(err, errNoMountTTL) {
			t.Errorf("%+v: %v, want errNoMountTTL", in, err)
		}
	}
}

// anySeconds draws lifetimes with the absurd ones and those around the bounds.
func anySeconds(rt *rapid.T, name string) int64 {
	return rapid.OneOf(
		rapid.SampledFrom([]int64{0, -1, 1, 299, 300, 301, 3599, 3600, 3601, 86399, 86400, 86401, 1 << 62, math.MaxInt64, math.MinInt64}),
		rapid.Int64Range(-10, 100000),
		rapid.Int64(),
	).Draw(rt, name)
}

// TestAskProperties holds decideAsk against design section 4 for all inputs.
func TestAskProperties(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		in := lifetimeInput{
			hasTTL:       rapid.Bool().Draw(rt, "requested"),
			requestTTL:   anySeconds(rt, "request"),
			roleTTL:      max(0, anySeconds(rt, "role")),
			roleMaxTTL:   max(0, anySeconds(rt, "roleMax")),
			mountDefault: anySeconds(rt, "mountDefault"),
			mountMax:     anySeconds(rt, "mountMax"),
		}
		ask, warnings, err := decideLifetime(in)

		// The rules, spelled out once more and in another way.
		ceiling := min(in.mountMax, 86400)
		if in.roleMaxTTL > 0 {
			ceiling = min(ceiling, in.roleMaxTTL)
		}
		first := in.requestTTL
		if !in.hasTTL {
			first = in.roleTTL
		}
		isDefault := !in.hasTTL && first == 0
		if isDefault {
			first = min(3600, in.mountDefault)
		}
		var r refusal
		switch {
		// Protects against a mint whose lease Vault would cap at its own default
		// because it could not be asked.
		case in.mountMax <= 0:
			if !errors.Is(err, errNoMountTTL) {
				rt.Fatalf("no max from Vault: %d %v", ask, err)
			}
			return
		// Protects the promise that a refusal comes exactly where the page says.
		case ceiling < 300, in.hasTTL && in.requestTTL < 300:
			if !errors.As(err, &r) {
				rt.Fatalf("want a refusal, got %d %v", ask, err)
			}
			return
		case isDefault && in.mountDefault <= 0:
			if !errors.Is(err, errNoMountTTL) {
				rt.Fatalf("no default from Vault: %d %v", ask, err)
			}
			return
		case err != nil:
			rt.Fatalf("refused without need: %v", err)
		}
		// Protects Cable's bounds: outside of them it answers 400.
		if ask < 300 || ask > 86400 {
			rt.Fatalf("ask %d is outside Cable's bounds", ask)
		}
		// Protects every cap: role, mount, Cable.
		if ask > ceiling {
			rt.Fatalf("ask %d exceeds the ceiling %d", ask, ceiling)
		}
		// Protects the caller's wish: nobody gets more than was set, but for the
		// raise of a too short default.
		if want := min(max(first, 300), ceiling); ask != want {
			rt.Fatalf("ask %d, want %d", ask, want)
		}
		// Protects the operator's eyes: each change says so, and only changes do.
		if changed := ask != first; changed != (len(warnings) > 0) {
			rt.Fatalf("asked %d instead of %d with warnings %q", ask, first, warnings)
		}
	})
}

// TestLeaseProperties protects the invariant for all clocks and latencies: the
// lease is positive, at most what was asked, and ends no later than the token.
func TestLeaseProperties(t *testing.T) {
	t.Parallel()
	base := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	rapid.Check(t, func(rt *rapid.T) {
		ask := rapid.Int64Range(300, 86400).Draw(rt, "ask")
		// The world as it is: Cable reads its clock once, some time between the
		// sending and the reading; the local clock is off by any amount.
		cable := base.Add(time.Duration(rapid.Int64Range(0, 1e9-1).Draw(rt, "fraction")))
		granted := rapid.OneOf(rapid.Just(ask), rapid.Int64Range(-100, 100000), rapid.Just(int64(1<<40))).Draw(rt, "granted")
		expiry := cable.Unix() + granted
		before := time.Duration(rapid.Int64Range(0, int64(400*time.Second)).Draw(rt, "before"))
		after := time.Duration(rapid.Int64Range(0, int64(400*time.Second)).Draw(rt, "after"))
		skew := time.Duration(rapid.SampledFrom([]int64{0, 1, -1, 3600, -3600, 10 * 365 * 86400, -10 * 365 * 86400}).Draw(rt, "skew")) * time.Second
		hasDate := rapid.Bool().Draw(rt, "hasDate")

		g := grantedLifetime{requested: ask, expiry: expiry, sentAt: cable.Add(skew - before), elapsed: before + after}
		if hasDate {
			g.date = cable.Truncate(time.Second) // as net/http writes it
		}
		lease, _, err := decideLease(g)
		// Protects good tokens: with Cable's clock known, a skewed local clock
		// refuses none that has two seconds left.
		left := time.Unix(expiry, 0).Sub(cable) - before - after // surely left when the answer was read
		if err != nil {
			if hasDate && min(left, time.Duration(ask)*time.Second-before-after) >= 2*time.Second {
				rt.Fatalf("refused a token with %v left: %v", left, err)
			}
			return
		}
		// Protects against a lease of 0, which Vault turns into 32 days.
		if lease < 1 {
			rt.Fatalf("lease %d", lease)
		}
		// Protects the caps: whatever Cable grants, the lease keeps to the ask.
		if lease > ask || time.Duration(lease)*time.Second > time.Duration(ask)*time.Second-g.elapsed {
			rt.Fatalf("lease %d exceeds the ask %d less the %v that passed", lease, ask, g.elapsed)
		}
		// Protects against a lease that outlives its token. Without a Date the
		// local clock is all there is, and is believed.
		if hasDate || skew == 0 {
			if truly := time.Unix(expiry, 0).Sub(cable) - after; time.Duration(lease)*time.Second > truly {
				rt.Fatalf("lease %ds, but the token has %v left", lease, truly)
			}
		}
		// Protects against giving away more than two seconds.
		if hasDate && time.Duration(lease)*time.Second < min(left, time.Duration(ask)*time.Second-g.elapsed)-2*time.Second {
			rt.Fatalf("lease %ds, but the token has %v left", lease, left)
		}
	})
}

// TestDecideLeaseAbsurd: numbers that no clock shows neither panic nor overflow
// into a long lease.
func TestDecideLeaseAbsurd(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		g := grantedLifetime{
			requested: anySeconds(rt, "ask"),
			expiry:    anySeconds(rt, "expiry"),
			elapsed:   time.Duration(anySeconds(rt, "elapsed")),
			sentAt:    time.Unix(rapid.Int64Range(-1<<40, 1<<40).Draw(rt, "sent"), rapid.Int64Range(0, 1e9-1).Draw(rt, "nanos")),
		}
		if rapid.Bool().Draw(rt, "hasDate") {
			g.date = time.Unix(rapid.Int64Range(-1<<40, 1<<40).Draw(rt, "date"), 0)
		}
		lease, _, err := decideLease(g)
		if err == nil && (lease < 1 || lease > g.requested || lease > maxLifetime+1) {
			rt.Fatalf("lease %d for %+v", lease, g)
		}
	})
}

func TestDecideLease(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_700_000_000, 400e6)
	date := now.Truncate(time.Second)
	for _, tt := range []struct {
		name  string
		in    grantedLifetime
		lease int64 // 0: an error
	}{
		{"as asked", grantedLifetime{requested: 3600, expiry: date.Unix() + 3600, date: date, sentAt: now}, 3599},
		{"as asked, 20 ms", grantedLifetime{requested: 3600, expiry: date.Unix() + 3600, date: date, sentAt: now, elapsed: 20 * time.Millisecond}, 3598},
		{"longer", grantedLifetime{requested: 3600, expiry: date.Unix() + 7200, date: date, sentAt: now, elapsed: 20 * time.Millisecond}, 3599},
		{"shorter", grantedLifetime{requested: 3600, expiry: date.Unix() + 10, date: date, sentAt: now, elapsed: 20 * time.Millisecond}, 8},
		{"slow answer", grantedLifetime{requested: 3600, expiry: date.Unix() + 3600, date: date, sentAt: now, elapsed: 10 * time.Second}, 3589},
		{"slower than the token's life", grantedLifetime{requested: 300, expiry: date.Unix() + 300, date: date, sentAt: now, elapsed: 300 * time.Second}, 0},
		{"Cable's clock three hours ahead", grantedLifetime{requested: 3600, expiry: date.Unix() + 3600 + 10800, date: date.Add(3 * time.Hour), sentAt: now}, 3599},
		{"Cable's clock three hours behind", grantedLifetime{requested: 3600, expiry: date.Unix() + 3600 - 10800, date: date.Add(-3 * time.Hour), sentAt: now}, 3599},
		{"no date", grantedLifetime{requested: 3600, expiry: date.Unix() + 3600, sentAt: now}, 3599},
		{"no date, short", grantedLifetime{requested: 3600, expiry: date.Unix() + 5, sentAt: now}, 4},
		{"past", grantedLifetime{requested: 3600, expiry: date.Unix() - 1, date: date, sentAt: now}, 0},
		{"now", grantedLifetime{requested: 3600, expiry: date.Unix(), date: date, sentAt: now}, 0},
		{"a second", grantedLifetime{requested: 3600, expiry: date.Unix() + 1, date: date, sentAt: now}, 0},
		{"a clock that went back", grantedLifetime{requested: 3600, expiry: date.Unix() + 3600, date: date, sentAt: now, elapsed: -time.Hour}, 3599},
	} {
		lease, _, err := decideLease(tt.in)
		if lease != tt.lease || (err != nil) != (tt.lease == 0) {
			t.Errorf("%s: lease %d, %v; want %d", tt.name, lease, err, tt.lease)
		}
	}
}
