// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"fmt"
	"maps"
	"runtime"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/state"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/version"
)

const (
	maxStatusRoles = 1000            // roles that a read of status checks, because each may be a read from storage
	statusTimeout  = 2 * time.Second // status and metrics respond within 2 s, even if storage hangs
)

func (b *backend) pathStatus() *framework.Path {
	const synopsis = "Show this mount's health on this node."
	read := b.reads(b.pathStatusRead, synopsis, "The state of the mount", statusResponseFields())
	read.ForwardPerformanceStandby = true // a standby mints nothing, so it has nothing to report
	return &framework.Path{
		Pattern:         "status",
		DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "status"},
		Operations:      map[logical.Operation]framework.OperationHandler{logical.ReadOperation: read},
		HelpSynopsis:    synopsis,
		HelpDescription: statusHelp,
	}
}

// statusResponseFields describes the response. Times are RFC 3339 in UTC; "" or 0 stands for something that never
// happened. Fields that need storage are omitted if it cannot be read.
func statusResponseFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"node": always(field(framework.TypeString,
			"The host name of the node that responded: the figures are its own.")),
		"since": always(field(framework.TypeTime,
			"When its counters started: when the mount was set up on this node.")),
		"version":                 always(field(framework.TypeString, "The engine's version.")),
		"commit":                  always(field(framework.TypeString, "The commit that it was built from.")),
		"go_version":              always(field(framework.TypeString, "The Go version that it was built with.")),
		"configured":              field(framework.TypeBool, "Whether config is written."),
		"disabled":                field(framework.TypeBool, "Whether the mount is disabled."),
		"disabled_roles":          field(framework.TypeStringSlice, "The roles that are disabled."),
		"refresh_key_version":     field(framework.TypeInt, "The version of the refresh key in use, counted from 1."),
		"refresh_key_updated_at":  field(framework.TypeString, "When it was written."),
		"refresh_key_age_seconds": field(framework.TypeInt64, "Its age."),
		"pause_seconds": field(framework.TypeInt64,
			"Seconds until requests resume after Cable's 429; 0 if not paused."),
		"paused_until": field(framework.TypeString, "When that pause ends."),
		"reuse_fallbacks": always(field(framework.TypeKVPairs,
			"Roles whose last API call for a shared token found Cable down, with its outcome. Their readers get "+
				"the previous token while it is usable.")),
		"last_mint_at":   always(field(framework.TypeString, "When the last token was minted.")),
		"last_mint_role": always(field(framework.TypeString, "For which role.")),
		"last_failure_at": always(field(framework.TypeString,
			"When the last token request failed. Refused, paused and canceled requests do not count as failures.")),
		"last_failure_role": always(field(framework.TypeString, "For which role.")),
		"last_failure_outcome": always(field(framework.TypeString,
			"Its outcome, in one word; see the table of outcomes in docs/reference.md.")),
		"last_failure_cable_status": always(field(framework.TypeInt,
			"The HTTP status of Cable's response; 0 without a response.")),
		"token_requests": always(field(framework.TypeKVPairs, "Token requests that ended, by outcome.")),
		"leases_ended":   always(field(framework.TypeInt64, "Leases that were revoked or expired.")),
		"uncertain_entries": always(field(framework.TypeStringSlice,
			"Entries whose last write failed in Vault's storage, so that they are read from storage for each "+
				"request.")),
	}
}

// pathStatusRead handles GET status. It reports the figures in memory even if Vault's storage cannot be read, because
// it is needed most then.
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

// configStatus returns the fields of status about the configuration in use, which is nil if none is stored.
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

// disabledRoles returns the names of the disabled roles, sorted. With an error it returns the ones that it found, or
// nil if no role could be read. It reads the roles that are not in memory yet.
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

const statusHelp = `Shows whether the mount is configured, the version and age of the refresh key,
what is disabled, the last minted token, the last failure, whether token
requests are paused after Cable's 429, for which roles Cable is down, token
requests by outcome, and the build of the engine.

Counters are kept in memory on this node and reset on restart, reload or
failover. The response contains no secrets. If storage is unavailable, a warning
says what was omitted.`
