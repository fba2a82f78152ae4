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
//	ceiling = min(role.max_ttl or 24h, mount max_lease_ttl, 24h)
//	ask     = min(first set of: request ttl, role.ttl, min(1h, mount default_lease_ttl); ceiling)
//	refuse    when ceiling < 300s, or when the request's own ttl is < 300s
//	raise     a default below 300s to 300s
//	lease   = floor(min(ask, life granted) - time since the request was sent)
//
// Everything is in whole seconds, because Cable's expiry_seconds and Vault's
// lease durations are.
const (
	minLife     = int64(cable.MinLifetime / time.Second) // 300
	maxLife     = int64(cable.MaxLifetime / time.Second) // 86400
	defaultLife = int64(time.Hour / time.Second)         // 3600, where neither request nor role says

	// longerGrant is by how much a granted life may exceed the asked one
	// without a warning, in seconds: clocks and rounding account for that much.
	longerGrant = 60
)

// lifeRequest is what the life to ask for is decided from, in seconds. Zero
// means "not set" for roleTTL and roleMaxTTL, and "Vault could not be asked"
// for the mount's; requestTTL counts where requested is true.
type lifeRequest struct {
	requested    bool
	requestTTL   int64
	roleTTL      int64
	roleMaxTTL   int64
	mountDefault int64
	mountMax     int64
}

// errNoMountTTL means that Vault did not answer for the mount's lease settings;
// the SDK reports that as zero.
var errNoMountTTL = errors.New("asking Vault for the mount's lease settings: no answer")

// decideAsk returns the life to ask Cable for, in seconds from minLife to
// maxLife, and a warning for each cap that changed it. The error is a
// refusal or errNoMountTTL.
func decideAsk(r lifeRequest) (ask int64, warnings []string, err error) {
	if r.mountMax <= 0 {
		return 0, nil, errNoMountTTL
	}
	ceiling, from := maxLife, "Cable's maximum"
	if r.roleMaxTTL > 0 && r.roleMaxTTL < ceiling {
		ceiling, from = r.roleMaxTTL, "the role's max_ttl"
	}
	if r.mountMax < ceiling {
		ceiling, from = r.mountMax, "the mount's max_lease_ttl"
	}
	if ceiling < minLife {
		return 0, nil, refusal(fmt.Sprintf("%s of %ds is below Cable's minimum of %ds: no token can be that short, raise it", from, ceiling, minLife))
	}

	var what string
	switch {
	case r.requested:
		ask, what = r.requestTTL, "the requested ttl"
		if ask < minLife {
			return 0, nil, refusal(fmt.Sprintf("ttl %ds is below Cable's minimum of %ds: ask for %ds to %ds", ask, minLife, minLife, ceiling))
		}
	case r.roleTTL > 0:
		ask, what = r.roleTTL, "the role's ttl"
	default:
		if r.mountDefault <= 0 {
			return 0, nil, errNoMountTTL
		}
		ask, what = defaultLife, "the default ttl"
		if r.mountDefault < ask {
			ask, what = r.mountDefault, "the mount's default_lease_ttl"
		}
	}
	if ask < minLife {
		warnings = append(warnings, fmt.Sprintf("%s of %ds is below Cable's minimum: raised to %ds", what, ask, minLife))
		ask = minLife
	}
	if ask > ceiling {
		warnings = append(warnings, fmt.Sprintf("%s of %ds is above %s of %ds: capped at %ds", what, ask, from, ceiling, ceiling))
		ask = ceiling
	}
	return ask, warnings, nil
}

// grantedLife is what decideLease works from. Times carry no monotonic reading
// that matters: elapsed holds what the monotonic clock measured.
type grantedLife struct {
	ask     int64         // seconds, as decideAsk returned them
	expiry  int64         // Cable's absolute expiry, Unix seconds
	date    time.Time     // Cable's clock, whole seconds cut off; zero where unknown
	sentAt  time.Time     // the local clock when the request was sent
	elapsed time.Duration // from then until the answer was read
}

// decideLease returns the lease in seconds, at least 1 and at most ask, and the
// life that Cable granted, in seconds. The lease ends no later than the token,
// whatever the local clock says, and however long the answer took. An error
// means that nothing is left to lease.
//
// NOTE: a Date header is up to a second behind Cable's clock, because it is cut
// off at whole seconds. That second is taken off, as is all the time since the
// request was sent, although Cable's clock was read some time after that. Vault
// starts to count when it stores the lease, a little later than this.
func decideLease(g grantedLife) (lease, granted int64, err error) {
	elapsed := min(max(0, g.elapsed), seconds(maxLife+1)) // nobody waits longer; keeps the sums from overflowing
	var life time.Duration                                // surely left when the request was sent, if more than ask: ask
	if !g.date.IsZero() {
		granted = g.expiry - g.date.Unix()
		life = seconds(min(g.ask, granted-1))
	} else {
		granted = g.expiry - g.sentAt.Unix()
		life = min(seconds(g.ask), seconds(min(g.ask+1, granted))-time.Duration(g.sentAt.Nanosecond()))
	}
	if granted <= 0 {
		return 0, granted, fmt.Errorf("its expiry is not in the future: %ds by Cable's clock", granted)
	}
	left := life - elapsed
	if left < time.Second {
		return 0, granted, fmt.Errorf("it granted %ds, of which no whole second is left after the %s that the answer took", granted, elapsed.Round(time.Millisecond))
	}
	return int64(left / time.Second), granted, nil
}

// seconds converts without overflow: a negative life is no life, and no caller
// has use for more than the greatest life and a second.
func seconds(n int64) time.Duration {
	return time.Duration(min(max(n, -1), maxLife+1)) * time.Second
}
