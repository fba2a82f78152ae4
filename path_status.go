// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"runtime"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/state"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/version"
)

const (
	// maxStatusRoles bounds how many roles a read of status checks: each may be a read from Vault's storage.
	maxStatusRoles = 1000

	// statusTimeout bounds how long status and metrics wait for storage, which may be what is wrong.
	statusTimeout = 2 * time.Second
)

func (b *backend) pathStatus() *framework.Path {
	const synopsis = "Show this mount's health on this node."
	return &framework.Path{
		Pattern:      "status",
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "status"},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: &framework.PathOperation{
				Callback: b.handle(b.pathStatusRead),
				// A standby mints nothing, so it has nothing to report.
				ForwardPerformanceStandby: true,
				Summary:                   synopsis,
				Responses: map[int][]framework.Response{
					http.StatusOK: {{Description: "The state of the mount", Fields: statusResponseFields()}},
				},
			},
		},
		HelpSynopsis:    synopsis,
		HelpDescription: strings.TrimSpace(statusHelp),
	}
}

// statusResponseFields describes the response. Times are RFC 3339 in UTC; "" or 0 stands for something that never
// happened. Fields that need storage are omitted if it cannot be read.
func statusResponseFields() map[string]*framework.FieldSchema {
	schema := make(map[string]*framework.FieldSchema)
	add := func(name string, kind framework.FieldType, isRequired bool, description string) {
		schema[name] = &framework.FieldSchema{Type: kind, Required: isRequired, Description: description}
	}
	add("node", framework.TypeString, true, "The host name of the node that responded: the figures are its own.")
	add("since", framework.TypeTime, true, "When its counters started: when the mount was set up on this node.")
	add("version", framework.TypeString, true, "The engine's version.")
	add("commit", framework.TypeString, true, "The commit that it was built from.")
	add("go_version", framework.TypeString, true, "The Go version that it was built with.")
	add("configured", framework.TypeBool, false, "Whether config is written.")
	add("disabled", framework.TypeBool, false, "Whether the mount is disabled.")
	add("disabled_roles", framework.TypeStringSlice, false, "The roles that are disabled.")
	add("refresh_key_version", framework.TypeInt, false, "The version of the refresh key in use, counted from 1.")
	add("refresh_key_updated_at", framework.TypeString, false, "When it was written.")
	add("refresh_key_age_seconds", framework.TypeInt64, false, "Its age.")
	add("pause_seconds", framework.TypeInt64, false,
		"Seconds until requests resume after Cable's 429; 0 if not paused.")
	add("paused_until", framework.TypeString, false, "When that pause ends.")
	add("reuse_fallbacks", framework.TypeKVPairs, true,
		"Roles whose last API call for a shared token found Cable down, with its outcome. Their readers get "+
			"the previous token while it is usable.")
	add("last_mint_at", framework.TypeString, true, "When the last token was minted.")
	add("last_mint_role", framework.TypeString, true, "For which role.")
	add("last_failure_at", framework.TypeString, true,
		"When the last token request failed. Refused, paused and canceled requests do not count as failures.")
	add("last_failure_role", framework.TypeString, true, "For which role.")
	add("last_failure_outcome", framework.TypeString, true,
		"Its outcome, in one word; see the table of outcomes in docs/reference.md.")
	add("last_failure_cable_status", framework.TypeInt, true,
		"The HTTP status of Cable's response; 0 without a response.")
	add("token_requests", framework.TypeKVPairs, true, "Token requests that ended, by outcome.")
	add("leases_ended", framework.TypeInt64, true, "Leases that were revoked or expired.")
	add("uncertain_entries", framework.TypeStringSlice, true,
		"Entries whose last write failed in Vault's storage, so that they are read from storage for each request.")
	return schema
}

// pathStatusRead handles GET status. It reports what is in memory even if Vault's storage cannot be read, because that
// is when it is needed.
func (b *backend) pathStatusRead(ctx context.Context, r *request) (*logical.Response, error) {
	resp := &logical.Response{Data: b.report.Status()}
	resp.Data["version"], resp.Data["commit"] = version.String(), version.Commit()
	resp.Data["go_version"] = runtime.Version()
	resp.Data["reuse_fallbacks"] = b.shared.Down()
	resp.Data["uncertain_entries"] = b.state.Uncertain()
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	if live, err := b.state.Config(ctx, r.Storage); err != nil {
		resp.AddWarning("configuration fields omitted: the configuration could not be read: " + err.Error())
	} else {
		maps.Copy(resp.Data, configStatus(live, time.Now()))
	}
	disabled, err := b.disabledRoles(ctx, r.Storage)
	if err != nil {
		resp.AddWarning("disabled_roles may be incomplete: " + err.Error())
	}
	if disabled != nil {
		resp.Data["disabled_roles"] = disabled
	}
	return resp, nil
}

// configStatus returns what status reports of the configuration in use, which is nil if none is stored.
func configStatus(live *state.Live, now time.Time) map[string]any {
	var pause, age time.Duration
	var pausedUntil time.Time
	c := new(state.Config)
	if live != nil {
		c, pause = live.Config, live.Client.Pause().Remaining()
	}
	if pause > 0 {
		pausedUntil = now.Add(pause)
	}
	if at := c.RefreshKeyUpdatedAt; !at.IsZero() {
		age = max(0, now.Sub(at))
	}
	return map[string]any{
		"configured":              live != nil,
		"disabled":                c.Disabled,
		"refresh_key_version":     c.RefreshKeyVersion,
		"refresh_key_updated_at":  outcome.Time(c.RefreshKeyUpdatedAt),
		"refresh_key_age_seconds": int64(age / time.Second),
		"pause_seconds":           int64((pause + time.Second - 1) / time.Second),
		"paused_until":            outcome.Time(pausedUntil),
	}
}

// disabledRoles returns the names of the disabled roles, sorted; with an error, those that were found, or nil if no
// role could be read. It reads the roles that are not in memory yet.
func (b *backend) disabledRoles(ctx context.Context, s logical.Storage) (disabled []string, err error) {
	names, err := state.RoleNames(ctx, s)
	if err != nil {
		return nil, err
	}
	disabled = []string{} // a list, even if it is empty
	for _, name := range names[:min(len(names), maxStatusRoles)] {
		if ctx.Err() != nil {
			return disabled, ctx.Err()
		}
		role, readErr := b.state.Role(ctx, s, name)
		if readErr != nil {
			err = readErr
		} else if role != nil && role.Disabled {
			disabled = append(disabled, name)
		}
	}
	if err == nil && len(names) > maxStatusRoles {
		err = fmt.Errorf("only the first %d of %d roles were checked", maxStatusRoles, len(names))
	}
	return disabled, err
}

const statusHelp = `
Shows whether the mount is configured, the version and age of the refresh key,
what is disabled, the last minted token, the last failure, whether token
requests are paused after Cable's 429, for which roles Cable is down, token
requests by outcome, and the build of the engine.

Counters are kept in memory on this node and reset on restart, reload or
failover. The response contains no secrets. If storage is unavailable, a warning
says what was omitted.
`
