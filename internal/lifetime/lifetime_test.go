// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package lifetime

import (
	"errors"
	"math"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
)

func TestDecide(t *testing.T) {
	t.Parallel()
	const day, month = 86400, 768 * 3600
	for _, tt := range []struct {
		name      string
		in        Bounds // in seconds
		requested time.Duration
		warning   string // a part of the one warning, or ""
		refusal   string // a part of the refusal, or ""
	}{
		{"nothing set", Bounds{MountDefault: month, MountMax: month}, 3600, "", ""},
		{"mount default below an hour", Bounds{MountDefault: 1800, MountMax: month}, 1800, "", ""},
		{"mount default of an hour", Bounds{MountDefault: 3600, MountMax: month}, 3600, "", ""},
		{
			"mount default too short",
			Bounds{MountDefault: 60, MountMax: month},
			300,
			"the mount's default_lease_ttl of 60s is below Cable's minimum: raised to 300s", "",
		},
		{"mount default one short", Bounds{MountDefault: 299, MountMax: month}, 300, "raised to 300s", ""},
		{"mount default at the bound", Bounds{MountDefault: 300, MountMax: month}, 300, "", ""},
		{"role", Bounds{Role: 900, MountDefault: month, MountMax: month}, 900, "", ""},
		{"role needs no mount default", Bounds{Role: 900, MountMax: month}, 900, "", ""},
		{"role above the default hour", Bounds{Role: 7200, MountDefault: 1800, MountMax: month}, 7200, "", ""},
		{"request before role", Bounds{Request: 600, Role: 900, MountMax: month}, 600, "", ""},
		{"request above role", Bounds{Request: 1200, Role: 900, MountMax: month}, 1200, "", ""},
		{"request at role's max", Bounds{Request: 1200, RoleMax: 1200, MountMax: month}, 1200, "", ""},
		{
			"request above role's max",
			Bounds{Request: 1201, RoleMax: 1200, MountMax: month},
			1200,
			"the requested ttl of 1201s is above the role's max_ttl of 1200s: capped at 1200s", "",
		},
		{
			"request above mount's max",
			Bounds{Request: 7200, MountMax: 3600},
			3600,
			"the requested ttl of 7200s is above the mount's max_lease_ttl of 3600s", "",
		},
		{
			"request above Cable's max",
			Bounds{Request: day + 1, MountMax: month},
			day,
			"is above Cable's maximum of 86400s", "",
		},
		{"request at Cable's max", Bounds{Request: day, MountMax: month}, day, "", ""},
		{
			"role's max above Cable's",
			Bounds{Request: day + 1, RoleMax: day + 1, MountMax: month},
			day,
			"is above Cable's maximum of 86400s", "",
		},
		{
			"role above mount's max",
			Bounds{Role: 7200, RoleMax: day, MountMax: 3600},
			3600,
			"the role's ttl of 7200s is above the mount's max_lease_ttl of 3600s", "",
		},
		{
			"default above role's max",
			Bounds{RoleMax: 600, MountDefault: month, MountMax: month},
			600,
			"the default ttl of 3600s is above the role's max_ttl of 600s", "",
		},
		{"request at the bound", Bounds{Request: 300, MountMax: 300}, 300, "", ""},
		{
			"request one short",
			Bounds{Request: 299, MountMax: month},
			0,
			"", "ttl 299s is below Cable's minimum of 300s: request 300s to 86400s",
		},
		{"request below zero", Bounds{Request: -1, MountMax: month}, 0, "", "ttl -1s is below"},
		{
			"mount's max one short",
			Bounds{Role: 900, MountMax: 299},
			0,
			"", "the mount's max_lease_ttl of 299s is below Cable's minimum",
		},
		{
			"role's max one short",
			Bounds{RoleMax: 299, MountMax: month},
			0,
			"", "the role's max_ttl of 299s is below Cable's minimum",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			requested, warnings, err := inSeconds(tt.in, tt.in.Request != 0).Decide()
			if tt.refusal != "" {
				var r outcome.Refusal
				if !errors.As(err, &r) || !strings.Contains(err.Error(), tt.refusal) {
					t.Fatalf("got %s, %v; want the refusal %q", requested, err, tt.refusal)
				}
				return
			}
			if err != nil || requested != tt.requested*time.Second {
				t.Errorf("requested %s, %v; want %ds", requested, err, tt.requested)
			}
			text := strings.Join(warnings, "\n")
			if len(warnings) > 1 || (text == "") != (tt.warning == "") || !strings.Contains(text, tt.warning) {
				t.Errorf("warnings %q, want %q", warnings, tt.warning)
			}
		})
	}
	for _, in := range []Bounds{{Role: 900}, {Role: 900, MountMax: -1}, {MountMax: month}} {
		if _, _, err := inSeconds(in, false).Decide(); !errors.Is(err, errNoMountTTL) {
			t.Errorf("%+v: %v, want errNoMountTTL", in, err)
		}
	}
}

// inSeconds converts bounds that are written as numbers of seconds.
func inSeconds(b Bounds, hasRequest bool) Bounds {
	b.HasRequest = hasRequest
	for _, d := range []*time.Duration{&b.Request, &b.Role, &b.RoleMax, &b.MountDefault, &b.MountMax} {
		*d *= time.Second
	}
	return b
}

// anyLifetime draws lifetimes with the absurd ones and those around the bounds.
func anyLifetime(rt *rapid.T, name string) time.Duration {
	bounds := []time.Duration{0, -1, 1, 299, 300, 301, 3599, 3600, 3601, 86399, 86400, 86401, 1 << 33, -1 << 33}
	return time.Second * rapid.OneOf(
		rapid.SampledFrom(bounds), rapid.Map(rapid.Int64Range(-10, 100000), func(n int64) time.Duration {
			return time.Duration(n)
		})).Draw(rt, name)
}

// TestDecideProperties compares Decide with the formula in docs/reference.md for all
// inputs.
func TestDecideProperties(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		in := Bounds{
			HasRequest:   rapid.Bool().Draw(rt, "requested"),
			Request:      anyLifetime(rt, "request"),
			Role:         max(0, anyLifetime(rt, "role")),
			RoleMax:      max(0, anyLifetime(rt, "roleMax")),
			MountDefault: anyLifetime(rt, "mountDefault"),
			MountMax:     anyLifetime(rt, "mountMax"),
		}
		requested, warnings, err := in.Decide()

		// The rules, spelled out again in another way.
		const least, day = 300 * time.Second, 24 * time.Hour
		ceiling := min(in.MountMax, day)
		if in.RoleMax > 0 {
			ceiling = min(ceiling, in.RoleMax)
		}
		first := in.Request
		if !in.HasRequest {
			first = in.Role
		}
		isDefault := !in.HasRequest && first == 0
		if isDefault {
			first = min(time.Hour, in.MountDefault)
		}
		var r outcome.Refusal
		switch {
		// A lease must not be capped at Vault's own default because Vault could not be asked.
		case in.MountMax <= 0:
			if !errors.Is(err, errNoMountTTL) {
				rt.Fatalf("no max from Vault: %s %v", requested, err)
			}
			return
		case ceiling < least, in.HasRequest && in.Request < least:
			if !errors.As(err, &r) {
				rt.Fatalf("want a refusal, got %s %v", requested, err)
			}
			return
		case isDefault && in.MountDefault <= 0:
			if !errors.Is(err, errNoMountTTL) {
				rt.Fatalf("no default from Vault: %s %v", requested, err)
			}
			return
		case err != nil:
			rt.Fatalf("refused without need: %v", err)
		}
		// Cable responds 400 outside of its bounds, and no cap may be exceeded.
		if requested < least || requested > ceiling {
			rt.Fatalf("%s is outside of %s to %s", requested, least, ceiling)
		}
		if want := min(max(first, least), ceiling); requested != want {
			rt.Fatalf("requested %s, want %s", requested, want)
		}
		// Each change has a warning, and nothing else has.
		if changed := requested != first; changed != (len(warnings) > 0) {
			rt.Fatalf("requested %s instead of %s with warnings %q", requested, first, warnings)
		}
	})
}

// TestLeaseProperties checks the invariant for all clocks and latencies: the lease is
// positive, at most what was requested, and never outlives its token.
func TestLeaseProperties(t *testing.T) {
	t.Parallel()
	base := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	rapid.Check(t, func(rt *rapid.T) {
		nanoseconds := func(name string, most time.Duration) time.Duration {
			return time.Duration(rapid.Int64Range(0, int64(most)).Draw(rt, name))
		}
		requested := rapid.Int64Range(300, 86400).Draw(rt, "requested")
		limit := time.Duration(requested) * time.Second
		// Cable reads its clock once, some time between the sending and the reading; the
		// local clock is off by any amount.
		clock := base.Add(nanoseconds("fraction", time.Second-1))
		granted := rapid.OneOf(
			rapid.Just(requested), rapid.Int64Range(-100, 100000), rapid.Just(int64(1<<37))).Draw(rt, "granted")
		before, after := nanoseconds("before", 400*time.Second), nanoseconds("after", 400*time.Second)
		const decade = 10 * 365 * 24 * time.Hour
		skew := rapid.SampledFrom([]time.Duration{
			0, time.Second, -time.Second, time.Hour, -time.Hour, decade, -decade,
		}).Draw(rt, "skew")
		hasDate := rapid.Bool().Draw(rt, "hasDate")

		token := &cable.Token{Expiry: clock.Unix() + granted, SentAt: clock.Add(skew - before)}
		if hasDate {
			token.Date = clock.Truncate(time.Second) // as net/http writes it
		}
		lease, _, err := Lease(token, limit, clock.Add(skew+after))
		left := time.Unix(token.Expiry, 0).Sub(clock) - after // the token's, when the response was read
		certain := min(left-before, limit-before-after)
		if err != nil {
			// With Cable's clock known, a skewed local clock refuses no token that has two
			// seconds left.
			if hasDate && certain >= 2*time.Second {
				rt.Fatalf("refused a token with %v left: %v", left, err)
			}
			return
		}
		// Vault turns a lease of 0 into 32 days.
		if lease < time.Second || lease > limit-before-after {
			rt.Fatalf("lease %s with %s requested, after %v", lease, limit, before+after)
		}
		// Without a Date the local clock is all there is, and is believed.
		if (hasDate || skew == 0) && lease > left {
			rt.Fatalf("lease %s outlives its token, which has %v left", lease, left)
		}
		if hasDate && lease < certain-2*time.Second {
			rt.Fatalf("lease %s gives away more than two seconds of %v", lease, certain)
		}
	})
}

// TestLeaseAbsurd draws numbers that no clock shows. They neither panic nor overflow
// into a long lease.
func TestLeaseAbsurd(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		anyTime := func(name string) time.Time {
			seconds := rapid.Int64Range(-1<<40, 1<<40).Draw(rt, name)
			return time.Unix(seconds, rapid.Int64Range(0, 1e9-1).Draw(rt, "nanos"))
		}
		token := &cable.Token{Expiry: rapid.Int64().Draw(rt, "expiry"), SentAt: anyTime("sent")}
		if rapid.Bool().Draw(rt, "hasDate") {
			token.Date = anyTime("date").Truncate(time.Second)
		}
		requested := anyLifetime(rt, "requested")
		lease, _, err := Lease(token, requested, anyTime("now"))
		if err == nil && (lease < time.Second || lease > requested) {
			rt.Fatalf("lease %s for %+v", lease, token)
		}
	})
}

func TestLease(t *testing.T) {
	t.Parallel()
	sent := time.Unix(1_700_000_000, 400e6)
	const never = -1 << 40
	for name, tt := range map[string]struct {
		requested int64 // seconds
		granted   int64 // seconds from sent, whole seconds
		date      int64 // Cable's clock, seconds after sent, or never
		elapsed   time.Duration
		lease     int64 // seconds, 0 for an error
	}{
		"as requested":                     {3600, 3600, 0, 0, 3599},
		"as requested, 20 ms":              {3600, 3600, 0, 20 * time.Millisecond, 3598},
		"longer":                           {3600, 7200, 0, 20 * time.Millisecond, 3599},
		"shorter":                          {3600, 10, 0, 20 * time.Millisecond, 8},
		"slow response":                    {3600, 3600, 0, 10 * time.Second, 3589},
		"slower than the lifetime":         {300, 300, 0, 300 * time.Second, 0},
		"Cable's clock three hours ahead":  {3600, 3600 + 10800, 10800, 0, 3599},
		"Cable's clock three hours behind": {3600, 3600 - 10800, -10800, 0, 3599},
		"no date":                          {3600, 3600, never, 0, 3599},
		"no date, short":                   {3600, 5, never, 0, 4},
		"past":                             {3600, -1, 0, 0, 0},
		"now":                              {3600, 0, 0, 0, 0},
		"a second":                         {3600, 1, 0, 0, 0},
		"two seconds":                      {3600, 2, 0, 0, 1},
		"a response after two days":        {86400, 200000, 0, 48 * time.Hour, 0},
		"a clock that went back":           {3600, 3600, 0, -time.Hour, 3599},
	} {
		token := &cable.Token{Expiry: sent.Unix() + tt.granted, SentAt: sent}
		if tt.date != never {
			token.Date = time.Unix(sent.Unix()+tt.date, 0)
		}
		lease, _, err := Lease(token, time.Duration(tt.requested)*time.Second, sent.Add(tt.elapsed))
		if lease != time.Duration(tt.lease)*time.Second || (err != nil) != (tt.lease == 0) {
			t.Errorf("%s: lease %s, %v; want %ds", name, lease, err, tt.lease)
		}
		if err != nil && strings.Contains(err.Error(), "its expiry is not in the future") != (tt.granted <= 0) {
			t.Errorf("%s: %v", name, err)
		}
	}
	token := &cable.Token{Expiry: math.MaxInt64, SentAt: sent, Date: sent}
	if _, granted, _ := Lease(token, time.Hour, sent); granted != 100*366*24*time.Hour {
		t.Errorf("granted %s, and 100 years are the most that is kept", granted)
	}
}

// TestShown checks the least lease of a role with leases, when a longer grant leads to a warning, and which lifetimes a
// text repeats.
func TestShown(t *testing.T) {
	t.Parallel()
	if least := LeastLease(false); least != time.Second {
		t.Errorf("the least lease is %s", least)
	}
	for excess, want := range map[time.Duration]bool{-time.Hour: false, time.Minute: false, time.Minute + 1: true} {
		if got := IsLonger(time.Hour+excess, time.Hour); got != want {
			t.Errorf("%s more than requested: %t", excess, got)
		}
	}
	for n, want := range map[time.Duration]string{
		0: "0s", -299: "-299s", 9_999_999: "9999999s", -9_999_999: "-9999999s",
		10_000_000: "more than 9999999s", -10_000_000: "more than 9999999s",
	} {
		if got := Format(n * time.Second); got != want {
			t.Errorf("%d s are shown as %s", n, got)
		}
	}
}

// TestReadAgain checks for any lease that the time to read again is drawn between half and three quarters of it, that
// both ends are drawn, and that the least lease has a time of at least 5 s.
func TestReadAgain(t *testing.T) {
	t.Parallel()
	seconds := rapid.OneOf(rapid.Int64Range(7, 60), rapid.Int64Range(7, 86400))
	rapid.Check(t, func(rt *rapid.T) {
		lease := time.Duration(seconds.Draw(rt, "lease")) * time.Second
		for range 20 {
			again := ReadAgain(lease, rand.N)
			if again != again.Truncate(time.Second) || again < 5*time.Second || again > lease*3/4 ||
				again < lease/2 && again > 5*time.Second {
				rt.Fatalf("read again after %s of %s", again, lease)
			}
		}
	})
	drawn := make(map[time.Duration]bool)
	for range 1000 {
		drawn[ReadAgain(20*time.Second, rand.N)] = true
	}
	if len(drawn) != 6 || !drawn[10*time.Second] || !drawn[15*time.Second] {
		t.Errorf("of 20 s were drawn %v", drawn)
	}
	least := LeastLease(true)
	if again := ReadAgain(least, rand.N); again != 5*time.Second || (least-time.Second)*3/4 >= 5*time.Second {
		t.Errorf("the least lease is %s, with a ttl of %s", least, again)
	}
}
