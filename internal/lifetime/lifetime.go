// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Package lifetime is the arithmetic of lifetimes, in pure functions over plain values, so that they can be read
// against the rules and tested for all inputs.
//
//	ceiling   = min(role's max_ttl or 24h, mount's max_lease_ttl, 24h)
//	requested = min(first set of: request's ttl, role's ttl, min(1h, mount's default_lease_ttl); ceiling)
//	refuse      if ceiling < 300s, or if the request's own ttl < 300s
//	raise       a default below 300s to 300s
//	lease     = floor(min(requested, granted lifetime) - time since the call was sent)
//	without a lease, read again after a random part of it, 1/2 to 3/4
//
// Lifetimes and leases are whole seconds, because Cable's expiry_seconds and Vault's lease durations are.
package lifetime

import (
	"errors"
	"fmt"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
)

// The bounds of a lifetime are those of Cable.
const (
	Min = cable.MinLifetime // 300s
	Max = cable.MaxLifetime // 86400s

	standard    = time.Hour   // if neither the request nor the role sets a lifetime
	longerGrant = time.Minute // excess that is no reason to warn, because clocks and rounding account for it

	minReadAgain = 5 * time.Second // a shorter ttl would be a poll
)

// Bounds are the settings that decide a lifetime. Zero means "not set" for Role and RoleMax, and "Vault could not be
// asked" for those of the mount. Request counts only if HasRequest is true.
type Bounds struct {
	HasRequest   bool
	Request      time.Duration // the request's ttl
	Role         time.Duration // the role's ttl
	RoleMax      time.Duration // the role's max_ttl
	MountDefault time.Duration // the mount's default_lease_ttl
	MountMax     time.Duration // the mount's max_lease_ttl
}

// errNoMountTTL fails a request if Vault did not respond, which the SDK reports as a mount maximum of 0.
var errNoMountTTL = errors.New("reading the mount's lease settings: Vault did not respond")

// Ceiling returns the longest lifetime that may be requested now, and the name of the setting that it comes from.
func (b Bounds) Ceiling() (ceiling time.Duration, from string) {
	ceiling, from = Max, "Cable's maximum"
	if b.RoleMax > 0 && b.RoleMax < ceiling {
		ceiling, from = b.RoleMax, "the role's max_ttl"
	}
	if b.MountMax < ceiling {
		ceiling, from = b.MountMax, "the mount's max_lease_ttl"
	}
	return ceiling, from
}

// Decide returns the lifetime to request from Cable, Min to Max, and a warning for each bound that changed it. The
// error is a refusal, or says that Vault did not report the mount's settings.
func (b Bounds) Decide() (requested time.Duration, warnings []string, err error) {
	if b.MountMax <= 0 {
		return 0, nil, errNoMountTTL
	}
	ceiling, from := b.Ceiling()
	if ceiling < Min {
		return 0, nil, outcome.Refuse("%s of %s is below Cable's minimum of %s: raise it",
			from, Format(ceiling), Format(Min))
	}
	var name string
	switch {
	case b.HasRequest:
		requested, name = b.Request, "the requested ttl"
		if requested < Min {
			return 0, nil, outcome.Refuse("ttl %s is below Cable's minimum of %s: request %[2]s to %[3]s",
				Format(requested), Format(Min), Format(ceiling))
		}
	case b.Role > 0:
		requested, name = b.Role, "the role's ttl"
	case b.MountDefault <= 0:
		return 0, nil, errNoMountTTL
	case b.MountDefault < standard:
		requested, name = b.MountDefault, "the mount's default_lease_ttl"
	default:
		requested, name = standard, "the default ttl"
	}
	if requested < Min {
		warnings = append(warnings, fmt.Sprintf("%s of %s is below Cable's minimum: raised to %s",
			name, Format(requested), Format(Min)))
		requested = Min
	}
	if requested > ceiling {
		warnings = append(warnings, fmt.Sprintf("%s of %s is above %s of %s: capped at %[4]s",
			name, Format(requested), from, Format(ceiling)))
		requested = ceiling
	}
	return requested, warnings, nil
}

// Lease returns the lease of a token for which the lifetime requested was requested, and the lifetime that Cable
// granted. The lease never outlives its token, whatever the local clock says and however long the response took. It is
// at least a second and at most requested. An error means that no lifetime is left to lease.
//
// NOTE: a Date header is up to a second behind Cable's clock, because it is in whole seconds. That second is
// subtracted, as is all the time since the call was sent, although Cable's clock was read some time after that. Vault
// starts to count when it stores the lease, a little later than now.
func Lease(t *cable.Token, requested time.Duration, now time.Time) (lease, granted time.Duration, err error) {
	elapsed := min(max(0, cable.Elapsed(t.SentAt, now)), Max+time.Second) // no request takes longer
	var certain time.Duration                                             // least lifetime when the call was sent
	if !t.Date.IsZero() {
		granted = seconds(t.Expiry - t.Date.Unix())
		certain = granted - time.Second
	} else {
		granted = seconds(t.Expiry - t.SentAt.Unix())
		certain = granted - time.Duration(t.SentAt.Nanosecond())
	}
	if granted <= 0 {
		return 0, granted, errors.New("its expiry is not in the future")
	}
	left := min(requested, certain) - elapsed // the lease never outlives its token
	if left < time.Second {
		return 0, granted, fmt.Errorf("the %s lifetime was used up by the %s that the response took",
			Format(granted), elapsed.Round(time.Millisecond))
	}
	return left.Truncate(time.Second), granted, nil
}

// LeastLease returns the least lease of a token that may be returned. If the role has no leases, three quarters of it,
// in whole seconds, are minReadAgain.
func LeastLease(noLease bool) time.Duration {
	if noLease {
		return 7 * time.Second
	}
	return time.Second
}

// ReadAgain returns the time after which a reader without a lease should read again, in whole seconds. It is between
// half and three quarters of the lease that the reader would have had, which is at least LeastLease. It is drawn for
// each reader by below, which returns a random duration from 0 up to its argument, because the clients add no spread
// of their own, and a fleet would return in the same second.
func ReadAgain(lease time.Duration, below func(time.Duration) time.Duration) time.Duration {
	half := (lease + time.Second) / 2
	least, most := max(minReadAgain, half.Truncate(time.Second)), (lease * 3 / 4).Truncate(time.Second)
	return (least + below(most-least+time.Second)).Truncate(time.Second)
}

// IsLonger reports whether Cable granted so much more than requested that the caller is told.
func IsLonger(granted, requested time.Duration) bool { return granted > requested+longerGrant }

// seconds converts Cable's seconds without overflow. It keeps up to 100 years, because a warning shows a longer grant.
func seconds(n int64) time.Duration {
	const most = 100 * 366 * 24 * 60 * 60
	return time.Duration(min(max(n, -most), most)) * time.Second
}

// Format formats a duration in whole seconds, such as "300s". A number beyond any allowed duration is not repeated,
// because it may be a secret in the wrong field.
func Format(d time.Duration) string {
	const most = 9_999_999
	if n := int64(d / time.Second); n <= most && n >= -most {
		return fmt.Sprintf("%ds", n)
	}
	return fmt.Sprintf("more than %ds", most)
}
