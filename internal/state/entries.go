// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package state

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/fields"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/lifetime"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/mount"
)

// Storage keys, and the values and bounds of stored fields.
const (
	// ConfigKey is the storage key of the configuration. The entry contains the refresh key, and is seal-wrapped.
	ConfigKey = "config"

	rolesPrefix = "roles/" // of a role's storage key, before its name

	AuthSchemeRaw    = "raw"    // Authorization: <key>, as in Cable's v2 curl example
	AuthSchemeBearer = "bearer" // Authorization: Bearer <key>, as in its v1 pages

	MinRequestTimeout = time.Second
	MaxRequestTimeout = time.Minute // below the 90 s after which Vault gives up a request
)

// RoleKey returns the storage key of a role.
func RoleKey(name string) string { return rolesPrefix + name }

// RoleName returns the name of the role whose storage key is key, or "".
func RoleName(key string) (name string, ok bool) {
	if name, ok = strings.CutPrefix(key, rolesPrefix); !ok {
		return "", false
	}
	return name, true
}

// Config is the configuration of a mount. Fields that storedConfig has, too, are stored from there.
type Config struct {
	RefreshKey          cable.Secret  `json:"refresh_key"`
	RefreshKeyVersion   int           `json:"refresh_key_version"`
	RefreshKeyUpdatedAt time.Time     `json:"refresh_key_updated_at"`
	TokenURL            string        `json:"token_url"`
	AuthScheme          string        `json:"auth_scheme"`
	OrganizationID      string        `json:"organization_id,omitempty"`
	RequestTimeout      time.Duration `json:"request_timeout"` // budget of one token request
	CACert              string        `json:"ca_cert,omitempty"`
	Disabled            bool          `json:"disabled,omitempty"`

	unknown unknown
}

// storedConfig is a Config as it is stored. Only Encode and DecodeConfig handle the refresh key in printable form.
type storedConfig struct {
	*Config
	RefreshKey     string `json:"refresh_key"`
	RequestTimeout int64  `json:"request_timeout"` // seconds
}

// NewConfig returns the defaults.
func NewConfig() *Config {
	return &Config{TokenURL: cable.DefaultTokenURL, AuthScheme: AuthSchemeRaw, RequestTimeout: cable.DefaultTimeout}
}

// Encode returns the entry as it is stored.
func (c *Config) Encode() ([]byte, error) {
	return encode(storedConfig{c, c.RefreshKey.Reveal(), int64(c.RequestTimeout / time.Second)}, c.unknown)
}

// DecodeConfig reads a stored configuration, and returns nil for nil. Its errors quote nothing.
func DecodeConfig(raw []byte) (*Config, error) {
	if raw == nil {
		return nil, nil
	}
	c := NewConfig()
	stored := storedConfig{Config: c, RequestTimeout: int64(c.RequestTimeout / time.Second)}
	var err error
	if c.unknown, err = decode(raw, &stored); err != nil || stored.RefreshKey == "" {
		return nil, errors.New("the stored configuration cannot be read: delete config and write it again")
	}
	c.RefreshKey, c.RequestTimeout = cable.NewSecret(stored.RefreshKey), seconds(stored.RequestTimeout)
	return c, nil
}

// NarrowedBy reports whether next, written in place of the configuration, takes something away from readers. It does if
// it disables the mount, or changes the organization or the destination.
func (c *Config) NarrowedBy(next *Config) bool {
	return c != nil && (next.Disabled || c.OrganizationID != next.OrganizationID || !c.SameDestination(next))
}

// SameDestination reports whether both send the refresh key to the same host, under the same certificates.
func (c *Config) SameDestination(other *Config) bool {
	return c.TokenURL == other.TokenURL && c.CACert == other.CACert
}

// Role is a role. Lifetimes are 0 if not set.
type Role struct {
	OrganizationID  string        `json:"organization_id,omitempty"`
	OrganizationIDs []string      `json:"organization_ids,omitempty"` // that a request may name; no duplicates
	Scopes          []string      `json:"scopes"`                     // sorted, without duplicates
	TTL             time.Duration `json:"ttl,omitempty"`
	MaxTTL          time.Duration `json:"max_ttl,omitempty"`
	ReuseFor        time.Duration `json:"reuse_for,omitempty"`
	NoLease         bool          `json:"-"` // stored as lease=false
	Disabled        bool          `json:"disabled,omitempty"`

	// EarlierUntil is the Unix time until which tokens of an earlier, higher max_ttl may be valid, or 0 if there was
	// none.
	EarlierUntil int64 `json:"earlier_until,omitempty"`

	unknown unknown
}

// storedRole is a Role as it is stored, with its lifetimes in seconds.
type storedRole struct {
	*Role
	TTL      int64 `json:"ttl,omitempty"`
	MaxTTL   int64 `json:"max_ttl,omitempty"`
	ReuseFor int64 `json:"reuse_for,omitempty"`
	Lease    *bool `json:"lease,omitempty"` // false, or absent
}

// Encode returns the entry as it is stored.
func (r *Role) Encode() ([]byte, error) {
	stored := storedRole{
		Role:     r,
		TTL:      int64(r.TTL / time.Second),
		MaxTTL:   int64(r.MaxTTL / time.Second),
		ReuseFor: int64(r.ReuseFor / time.Second),
	}
	if r.NoLease {
		stored.Lease = new(bool)
	}
	return encode(stored, r.unknown)
}

// DecodeRole reads a stored role, and returns nil for nil.
func DecodeRole(name string, raw []byte) (*Role, error) {
	if raw == nil {
		return nil, nil
	}
	r := new(Role)
	stored := storedRole{Role: r}
	var err error
	if r.unknown, err = decode(raw, &stored); err != nil {
		return nil, fmt.Errorf("the stored role %s cannot be read: delete it and write it again",
			fields.RoleName.Quote(name))
	}
	r.TTL, r.MaxTTL, r.ReuseFor = seconds(stored.TTL), seconds(stored.MaxTTL), seconds(stored.ReuseFor)
	r.NoLease = stored.Lease != nil && !*stored.Lease
	return r, nil
}

// MaxLifetime is the longest lifetime that the role allows.
func (r *Role) MaxLifetime() time.Duration {
	if r.MaxTTL > 0 {
		return r.MaxTTL
	}
	return lifetime.Max
}

// NarrowedBy reports whether next, written in place of the role, takes something away from its readers.
func (r *Role) NarrowedBy(next *Role) bool {
	return r != nil && (next.Disabled || r.OrganizationID != next.OrganizationID ||
		len(fields.Without(r.OrganizationIDs, next.OrganizationIDs)) > 0 ||
		next.MaxLifetime() < r.MaxLifetime() || len(fields.Without(r.Scopes, next.Scopes)) > 0)
}

// unknown has the keys of a stored entry that this version does not know. Unknown stored fields are kept when an entry
// is rewritten, because an older version must not drop the fields of a newer one.
type unknown map[string]json.RawMessage

// encode marshals a stored type together with the unknown keys.
func encode(stored any, extra unknown) ([]byte, error) {
	raw, err := json.Marshal(stored)
	if err != nil || len(extra) == 0 {
		return raw, err
	}
	all := maps.Clone(extra)
	if err := json.Unmarshal(raw, &all); err != nil {
		return nil, err
	}
	return json.Marshal(all)
}

// decode unmarshals a stored type, and returns the unknown keys. Absent keys mean the defaults, because another version
// of the engine may have written the entry.
func decode(raw []byte, stored any) (unknown, error) {
	if err := json.Unmarshal(raw, stored); err != nil {
		return nil, err
	}
	rest := make(unknown)
	if err := json.Unmarshal(raw, &rest); err != nil {
		return nil, err
	}
	for _, field := range reflect.VisibleFields(reflect.TypeOf(stored).Elem()) {
		if tag, ok := field.Tag.Lookup("json"); ok {
			key, _, _ := strings.Cut(tag, ",")
			// A known key in another case is known, as it is to encoding/json.
			maps.DeleteFunc(rest, func(k string, _ json.RawMessage) bool { return strings.EqualFold(k, key) })
		}
	}
	return rest, nil
}

// seconds converts stored seconds, whatever wrote them, without overflow.
func seconds(n int64) time.Duration {
	return time.Duration(min(max(n, -1), math.MaxInt32)) * time.Second
}

// ReadConfig returns the stored configuration, or nil if there is none.
func ReadConfig(ctx context.Context, s logical.Storage) (*Config, error) {
	raw, err := Read(ctx, s, ConfigKey)
	if err != nil {
		return nil, err
	}
	return DecodeConfig(raw)
}

// ReadRole returns the stored role, or nil if there is none.
func ReadRole(ctx context.Context, s logical.Storage, name string) (*Role, error) {
	raw, err := Read(ctx, s, RoleKey(name))
	if err != nil {
		return nil, err
	}
	return DecodeRole(name, raw)
}

// RoleNames returns the names of all roles, sorted.
func RoleNames(ctx context.Context, s logical.Storage) ([]string, error) {
	names, err := mount.Call(ctx, func() ([]string, error) { return s.List(ctx, rolesPrefix) })
	slices.Sort(names)
	return names, err
}

// Read returns the bytes of an entry, nil if there is none. Errors of storage are returned unchanged, because Vault
// inspects their text.
func Read(ctx context.Context, s logical.Storage, key string) ([]byte, error) {
	entry, err := mount.Call(ctx, func() (*logical.StorageEntry, error) { return s.Get(ctx, key) })
	if entry == nil || err != nil {
		return nil, err
	}
	if entry.Value == nil {
		return []byte{}, nil
	}
	return entry.Value, nil
}
