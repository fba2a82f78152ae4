// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/version"
)

// What is stored: one entry for the configuration and one for each role. Absent
// keys of a stored entry mean the defaults, unknown ones are ignored: an older
// or newer version of the engine may have written it.

const (
	// configStoragePath holds the refresh key, and is seal-wrapped.
	configStoragePath = "config"

	// rolesStoragePrefix is followed by the role's name.
	rolesStoragePrefix = "roles/"

	authSchemeRaw    = "raw"    // Authorization: <key>, as in Cable's v2 curl example
	authSchemeBearer = "bearer" // Authorization: Bearer <key>, as in its v1 pages

	minRequestTimeout = 1  // seconds
	maxRequestTimeout = 60 // seconds: below the 90 s after which Vault gives a request up
)

// configEntry is the stored configuration of a mount.
type configEntry struct {
	RefreshKey          cable.Secret `json:"-"` // see encode
	RefreshKeyVersion   int          `json:"refresh_key_version"`
	RefreshKeyUpdatedAt time.Time    `json:"refresh_key_updated_at"`
	TokenURL            string       `json:"token_url"`
	AuthScheme          string       `json:"auth_scheme"`
	OrganizationID      string       `json:"organization_id,omitempty"`
	RequestTimeout      int          `json:"request_timeout"` // seconds
	CACert              string       `json:"ca_cert,omitempty"`
	Disabled            bool         `json:"disabled,omitempty"`
}

// newConfigEntry returns the defaults.
func newConfigEntry() *configEntry {
	return &configEntry{
		TokenURL:       cable.DefaultTokenURL,
		AuthScheme:     authSchemeRaw,
		RequestTimeout: int(cable.DefaultTimeout / time.Second),
	}
}

// storedConfigKey is the one place where the refresh key stands beside the
// other fields in a form that can be printed: on its way into storage and out
// of it.
const storedConfigKey = "refresh_key"

// encode returns the entry as it is stored.
func (c *configEntry) encode() ([]byte, error) {
	raw, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	fields := make(map[string]any)
	if err := json.Unmarshal(raw, &fields); err != nil {
		return nil, err
	}
	fields[storedConfigKey] = c.RefreshKey.Reveal()
	return json.Marshal(fields)
}

// decodeConfig reads what encode wrote. Its errors hold none of it.
func decodeConfig(raw []byte) (*configEntry, error) {
	c := newConfigEntry()
	var key map[string]json.RawMessage
	var text string
	if json.Unmarshal(raw, &key) != nil || json.Unmarshal(raw, c) != nil ||
		json.Unmarshal(key[storedConfigKey], &text) != nil || text == "" {
		return nil, errors.New("the stored configuration cannot be read: delete config and write it again")
	}
	c.RefreshKey = cable.NewSecret(text)
	return c, nil
}

// timeout is the budget of one token request.
func (c *configEntry) timeout() time.Duration { return time.Duration(c.RequestTimeout) * time.Second }

// clientConfig is the entry in the client's words.
func (c *configEntry) clientConfig() cable.Config {
	return cable.Config{
		RefreshKey: c.RefreshKey,
		TokenURL:   c.TokenURL,
		Bearer:     c.AuthScheme == authSchemeBearer,
		CACert:     c.CACert,
		Timeout:    c.timeout(),
		UserAgent:  "vault-plugin-secrets-cable/" + version.String(),
	}
}

// narrowedBy reports whether next, written over the entry, takes something away
// from readers: a write that must not seem done if it was not.
func (c *configEntry) narrowedBy(next *configEntry) bool {
	return next.Disabled || c != nil && c.OrganizationID != next.OrganizationID
}

// roleEntry is a stored role. Lifetimes are in seconds, 0 if not set.
type roleEntry struct {
	OrganizationID string   `json:"organization_id,omitempty"`
	Scopes         []string `json:"scopes"` // sorted, without duplicates
	TTL            int64    `json:"ttl,omitempty"`
	MaxTTL         int64    `json:"max_ttl,omitempty"`
	ReuseFor       int64    `json:"reuse_for,omitempty"`
	Disabled       bool     `json:"disabled,omitempty"`

	// EarlierUntil is the Unix time until which tokens may be valid that were
	// minted under an earlier, higher max_ttl; 0 if there was none.
	EarlierUntil int64 `json:"earlier_until,omitempty"`
}

// maxLifetime is the longest lifetime that the role allows, in seconds.
func (r *roleEntry) maxLifetime() int64 {
	if r.MaxTTL > 0 {
		return r.MaxTTL
	}
	return maxLifetime
}

// narrowedBy reports whether next, written over the role, takes something away
// from its readers.
func (r *roleEntry) narrowedBy(next *roleEntry) bool {
	return next.Disabled || r != nil && (r.OrganizationID != next.OrganizationID ||
		next.maxLifetime() < r.maxLifetime() || len(without(r.Scopes, next.Scopes)) > 0)
}

// decodeRole reads a stored role.
func decodeRole(name string, raw []byte) (*roleEntry, error) {
	r := new(roleEntry)
	if err := json.Unmarshal(raw, r); err != nil {
		return nil, fmt.Errorf("the stored role %s cannot be read: delete it and write it again", show(nameShape, name))
	}
	return r, nil
}

// getConfig returns the stored configuration, or nil if there is none.
func getConfig(ctx context.Context, s logical.Storage) (*configEntry, error) {
	entry, err := getEntry(ctx, s, configStoragePath)
	if entry == nil || err != nil {
		return nil, err
	}
	return decodeConfig(entry.Value)
}

// getRole returns the stored role, or nil if there is none.
func getRole(ctx context.Context, s logical.Storage, name string) (*roleEntry, error) {
	entry, err := getEntry(ctx, s, rolesStoragePrefix+name)
	if entry == nil || err != nil {
		return nil, err
	}
	return decodeRole(name, entry.Value)
}

// getEntry reads an entry, nil if there is none. Errors of storage are returned
// as they are: Vault reads their text.
func getEntry(ctx context.Context, s logical.Storage, key string) (*logical.StorageEntry, error) {
	return within(ctx, func() (*logical.StorageEntry, error) { return s.Get(ctx, key) })
}

// listRoles returns the names of all roles, sorted.
func listRoles(ctx context.Context, s logical.Storage) ([]string, error) {
	names, err := within(ctx, func() ([]string, error) { return s.List(ctx, rolesStoragePrefix) })
	slices.Sort(names)
	return names, err
}

// roleOfKey returns the name of the role that is stored under key.
func roleOfKey(key string) (name string, ok bool) { return strings.CutPrefix(key, rolesStoragePrefix) }

// within calls f and waits for its result until ctx ends. Not all calls of the
// SDK to Vault can be cancelled: such a one is abandoned, and its result
// dropped. A panic of f becomes the caller's.
func within[T any](ctx context.Context, f func() (T, error)) (T, error) {
	type result struct {
		value T
		err   error
		panic *panicked
	}
	done := make(chan result, 1)
	go func() {
		var r result
		defer func() {
			if p := recover(); p != nil {
				r.panic = &panicked{value: p, stack: debug.Stack()}
			}
			done <- r
		}()
		r.value, r.err = f()
	}()
	select {
	case r := <-done:
		if r.panic != nil {
			panic(r.panic)
		}
		if r.err != nil && ctx.Err() != nil {
			r.err = context.Cause(ctx)
		}
		return r.value, r.err
	case <-ctx.Done():
		var none T
		return none, context.Cause(ctx)
	}
}

// panicked is a panic of another goroutine.
type panicked struct {
	value any
	stack []byte
}
