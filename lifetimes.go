// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"errors"
	"fmt"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
)

// The arithmetic of lifetimes, and nothing else: pure functions over plain
// values, so that they can be read against the rules and tested for all inputs.
//
//	ceiling   = min(role.max_ttl or 24h, mount max_lease_ttl, 24h)
//	requested = min(first set of: request ttl, role.ttl, min(1h, mount default_lease_ttl); ceiling)
//	refuse      when ceiling < 300s, or when the request's own ttl is < 300s
//	raise       a default below 300s to 300s
//	lease     = floor(min(requested, granted lifetime) - time since the call was sent)
//
// Everything is in whole seconds, because Cable's expiry_seconds and Vault's
// lease durations are.
const (
	minLifetime     = int64(cable.MinLifetime / time.Second) // 300
	maxLifetime     = int64(cable.MaxLifetime / time.Second) // 86400
	defaultLifetime = int64(time.Hour / time.Second)         // 3600, if neither the request nor the role sets one

	// longerGrant is by how many seconds a granted lifetime may exceed the
	// requested one without a warning: clocks and rounding account for that much.
	longerGrant = 60
)

// lifetimeInput is what the requested lifetime depends on, in seconds. Zero
// means "not set" for roleTTL and roleMaxTTL, and "Vault could not be asked"
// for the mount's; requestTTL counts only if hasTTL is true.
type lifetimeInput struct {
	hasTTL       bool
	requestTTL   int64
	roleTTL      int64
	roleMaxTTL   int64
	mountDefault int64
	mountMax     int64
}

// errNoMountTTL means that Vault did not report the mount's lease settings; the
// SDK returns zero then.
var errNoMountTTL = errors.New("reading the mount's lease settings: Vault did not respond")

// lifetimeCeiling returns the longest lifetime that may be requested now, in
// seconds, and the name of the setting that it comes from.
func lifetimeCeiling(roleMaxTTL, mountMax int64) (ceiling int64, from string) {
	ceiling, from = maxLifetime, "Cable's maximum"
	if roleMaxTTL > 0 && roleMaxTTL < ceiling {
		ceiling, from = roleMaxTTL, "the role's max_ttl"
	}
	if mountMax < ceiling {
		ceiling, from = mountMax, "the mount's max_lease_ttl"
	}
	return ceiling, from
}

// decideLifetime returns the lifetime to request from Cable, in seconds from
// minLifetime to maxLifetime, and a warning for each bound that changed it. The
// error is a refusal or errNoMountTTL.
func decideLifetime(in lifetimeInput) (requested int64, warnings []string, err error) {
	if in.mountMax <= 0 {
		return 0, nil, errNoMountTTL
	}
	ceiling, from := lifetimeCeiling(in.roleMaxTTL, in.mountMax)
	if ceiling < minLifetime {
		return 0, nil, refusal(fmt.Sprintf("%s of %ds is below Cable's minimum of %ds: raise it", from, ceiling, minLifetime))
	}

	var what string
	switch {
	case in.hasTTL:
		requested, what = in.requestTTL, "the requested ttl"
		if requested < minLifetime {
			return 0, nil, refusal(fmt.Sprintf("ttl %s is below Cable's minimum of %ds: request %ds to %ds", showSeconds(requested), minLifetime, minLifetime, ceiling))
		}
	case in.roleTTL > 0:
		requested, what = in.roleTTL, "the role's ttl"
	default:
		if in.mountDefault <= 0 {
			return 0, nil, errNoMountTTL
		}
		requested, what = defaultLifetime, "the default ttl"
		if in.mountDefault < requested {
			requested, what = in.mountDefault, "the mount's default_lease_ttl"
		}
	}
	if requested < minLifetime {
		warnings = append(warnings, fmt.Sprintf("%s of %s is below Cable's minimum: raised to %ds", what, showSeconds(requested), minLifetime))
		requested = minLifetime
	}
	if requested > ceiling {
		warnings = append(warnings, fmt.Sprintf("%s of %s is above %s of %ds: capped at %ds", what, showSeconds(requested), from, ceiling, ceiling))
		requested = ceiling
	}
	return requested, warnings, nil
}

// grantedLifetime is what the lease depends on. The times' monotonic readings
// do not matter: elapsed is measured with both clocks.
type grantedLifetime struct {
	requested int64         // seconds, as decideLifetime returned them
	expiry    int64         // Cable's absolute expiry, Unix seconds
	date      time.Time     // Cable's clock, whole seconds cut off; zero if unknown
	sentAt    time.Time     // the local clock when the call was sent
	elapsed   time.Duration // since then
}

// decideLease returns the lease in seconds, at least 1 and at most requested,
// and the lifetime that Cable granted, in seconds. The lease ends no later than
// the token, whatever the local clock says, and however long the response took.
// An error means that no lifetime is left to lease.
//
// NOTE: a Date header is up to a second behind Cable's clock, because it is cut
// off at whole seconds. That second is subtracted, as is all the time since the
// call was sent, although Cable's clock was read some time after that. Vault
// starts to count when it stores the lease, a little later than this.
func decideLease(g grantedLifetime) (lease, granted int64, err error) {
	elapsed := min(max(0, g.elapsed), seconds(maxLifetime+1)) // no request takes longer; keeps the sums from overflowing
	var lifetime time.Duration                                // certainly left when the call was sent, at most requested
	if !g.date.IsZero() {
		granted = g.expiry - g.date.Unix()
		lifetime = seconds(min(g.requested, granted-1))
	} else {
		granted = g.expiry - g.sentAt.Unix()
		lifetime = min(seconds(g.requested), seconds(min(g.requested+1, granted))-time.Duration(g.sentAt.Nanosecond()))
	}
	if granted <= 0 {
		return 0, granted, fmt.Errorf("its expiry is not in the future: %ds by Cable's clock", granted)
	}
	left := lifetime - elapsed
	if left < time.Second {
		return 0, granted, fmt.Errorf("the %ds lifetime was used up by the %s that the response took", granted, elapsed.Round(time.Millisecond))
	}
	return int64(left / time.Second), granted, nil
}

// elapsed returns the time from one reading of the local clock to another: the
// greater of the wall clock's and the monotonic clock's, because the latter
// stops while the machine sleeps.
func elapsed(from, to time.Time) time.Duration {
	return max(to.Sub(from), to.Round(0).Sub(from.Round(0)))
}

// validUntil returns the expiry of a granted token if Cable's clock, at the time
// of the response, or the local one says that it is still valid, else 0.
func validUntil(expiry int64, date, now time.Time) int64 {
	if expiry > now.Unix() || !date.IsZero() && expiry > date.Unix() {
		return expiry
	}
	return 0
}

// seconds converts without overflow: a negative lifetime is none, and no caller
// has use for more than the greatest lifetime and a second.
func seconds(n int64) time.Duration {
	return time.Duration(min(max(n, -1), maxLifetime+1)) * time.Second
}

// tokensValidUntil says until when tokens may be valid that were minted by now,
// or by a request that is under way, each for at most lifetime seconds.
func tokensValidUntil(now time.Time, lifetime int64) string {
	return fmt.Sprintf("Tokens minted before cannot be revoked: the last of them may be valid until %s.",
		timestamp(now.Add(time.Duration(lifetime+maxRequestTimeout)*time.Second)))
}
