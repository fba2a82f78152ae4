// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package history

import (
	"cmp"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// Settings are the state of the model, namely the configuration and one role as they were written, and the mount's
// max_lease_ttl. Zero fields are not set.
type Settings struct {
	Config   Config
	Role     Role
	MaxLease int // seconds
}

// Config is the configuration of the model.
type Config struct {
	Exists, Disabled       bool
	Organization, Key, URL string
}

// Role is the role of the model. Scopes are sorted and, like Organizations, separated by commas, lifetimes in seconds.
type Role struct {
	Exists, Disabled, NoLease           bool
	Organization, Organizations, Scopes string

	TTL, MaxTTL, ReuseFor int
}

// event is an operation of the model. Its step returns the settings after it, and whether it can happen with those
// before.
type event interface {
	step(Settings) (Settings, bool)
}

// step implements event. A change of an entry that must exist, or must not, cannot happen otherwise. One that failed in
// storage happens all the same, because it was merged before.
func (c *Change) step(s Settings) (Settings, bool) {
	if c.Path == TunePath {
		s.MaxLease = c.Data["max_lease_ttl"].(int)
		return s, true
	}
	exists := &s.Role.Exists
	if c.Path == "config" {
		exists = &s.Config.Exists
	}
	isRole := strings.HasPrefix(c.Path, "roles/")
	ok := c.Op != logical.CreateOperation && c.Op != logical.UpdateOperation || !isRole ||
		*exists == (c.Op == logical.UpdateOperation)
	ok = ok && (c.Op != logical.PatchOperation || *exists)
	switch {
	case c.Op != logical.DeleteOperation:
		*exists = true
	case isRole:
		s.Role = Role{}
	default:
		s.Config = Config{}
	}
	text := func(v any) string { t, _ := v.(string); return t }
	for field, v := range c.Data {
		switch field {
		case "organization_id":
			if isRole {
				s.Role.Organization = text(v)
			} else {
				s.Config.Organization = text(v)
			}
		case "disabled":
			if isRole {
				s.Role.Disabled = v == true
			} else {
				s.Config.Disabled = v == true
			}
		case "organization_ids":
			s.Role.Organizations = text(v)
		case "lease":
			s.Role.NoLease = v == false
		case "scopes":
			s.Role.Scopes = text(v)
		case "ttl":
			s.Role.TTL = v.(int)
		case "max_ttl":
			s.Role.MaxTTL = v.(int)
		case "reuse_for":
			s.Role.ReuseFor = v.(int)
		case "refresh_key":
			s.Config.Key = text(v)
		case "token_url":
			s.Config.URL = text(v)
		}
	}
	return s, ok || c.Status >= 500
}

// refuses reports whether the settings are a reason for the refusal.
func (s Settings) refuses(why string, r *Read) bool {
	switch why {
	case noRole:
		return !s.Role.Exists
	case noConfig:
		return !s.Config.Exists
	case mountDisabled:
		return s.Config.Disabled
	case roleDisabled:
		return s.Role.Disabled
	case noOrganization:
		return !s.allows(r.Organization, r.Organization)
	}
	return !within(r.Scopes, s.Role.Scopes)
}

// The texts of refusals.
const (
	noRole        = "does not exist: write it"
	noConfig      = "the mount is not configured"
	mountDisabled = "the mount is disabled"
	roleDisabled  = "is disabled: write disabled=false to roles"
	noScope       = "scopes outside role"

	noOrganization = "is not one of the"
)

// refusalIn returns the refusal that an error is, or "".
func refusalIn(err string) string {
	for _, why := range []string{noRole, noConfig, mountDisabled, roleDisabled, noScope, noOrganization} {
		if strings.Contains(err, why) {
			return why
		}
	}
	return ""
}

// within reports whether all of some scopes are among others.
func within(some, others string) bool {
	for scope := range strings.SplitSeq(some, ",") {
		if !strings.Contains(","+others+",", ","+scope+",") {
			return false
		}
	}
	return true
}

// permits reports whether a call may be sent, or its token returned. It is narrower than the settings, or as wide.
func (s Settings) permits(c *Call) bool {
	named := ""
	if c.Read != nil {
		named = c.Read.Organization
	} else if c.Tries != nil && cmp.Or(s.Role.Organization, s.Config.Organization) == "" {
		named, _, _ = strings.Cut(s.Role.Organizations, ",") // a trial is for the first if there is no other
	}
	return s.isEnabled() && s.allows(named, c.Organization) && within(c.Scopes, s.Role.Scopes) &&
		(s.Role.MaxTTL == 0 || c.Lifetime <= s.Role.MaxTTL) && c.URL == s.Config.URL
}

func (s Settings) isEnabled() bool {
	return s.Config.Exists && !s.Config.Disabled && s.Role.Exists && !s.Role.Disabled
}

// allows reports whether a read that names an organization, or none, gets a token for an organization.
func (s Settings) allows(named, got string) bool {
	own := cmp.Or(s.Role.Organization, s.Config.Organization)
	return got == cmp.Or(named, own) && (got == own || within(got, s.Role.Organizations))
}

// lifetime is the lifetime that is requested from Cable.
func (s Settings) lifetime(ttl int) int {
	const standard, longest = 3600, 86400
	return min(cmp.Or(ttl, s.Role.TTL, standard), cmp.Or(s.Role.MaxTTL, longest), s.MaxLease)
}

// sent is an API call that passed its gate.
type sent struct{ *Call }

func (e sent) step(s Settings) (Settings, bool) {
	if e.Tries == nil {
		return s, s.permits(e.Call)
	}
	tried, _ := e.Tries.step(s) // a trial is made with settings that are not stored yet
	return s, tried.permits(e.Call) && tried.Config.Key == e.Key
}

// returned is a token that is returned.
type returned struct{ *Call }

func (e returned) step(s Settings) (Settings, bool) { return s, s.permits(e.Call) }

// minted is a read that gets a token.
type minted struct{ *Read }

func (e minted) step(s Settings) (Settings, bool) {
	c := e.Call
	ok := s.isEnabled() && s.allows(e.Organization, c.Organization) && c.Scopes == cmp.Or(e.Scopes, s.Role.Scopes) &&
		within(c.Scopes, s.Role.Scopes) && c.Key == s.Config.Key && c.URL == s.Config.URL && e.NoLease == s.Role.NoLease
	if !c.isShared() {
		return s, ok && c.Lifetime == s.lifetime(e.TTL)
	}
	ok = ok && e.TTL == 0 && e.Scopes == "" && e.Organization == "" && s.Role.ReuseFor > 0 &&
		c.Lifetime <= s.lifetime(0)
	if e.isReused() && !e.Fallback {
		ok = ok && e.Start-c.Started <= time.Duration(s.Role.ReuseFor)*time.Second
	}
	return s, ok
}

// refused is a read that is refused.
type refused struct {
	*Read
	why string
}

func (e refused) step(s Settings) (Settings, bool) { return s, s.refuses(e.why, e.Read) }
