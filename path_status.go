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

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/version"
)

const (
	// maxStatusRoles bounds how many roles a read of status checks: each may be a
	// read from Vault's storage.
	maxStatusRoles = 1000

	// statusTimeout bounds how long status and metrics wait for storage, which may
	// be what is wrong.
	statusTimeout = 2 * time.Second
)

func (b *backend) pathStatus() *framework.Path {
	const synopsis = "Show this mount's health on this node."
	return &framework.Path{
		Pattern:      "status",
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "status"},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: &framework.PathOperation{
				Callback: b.pathStatusRead,
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

// statusResponseFields describes the response. Times are RFC 3339 in UTC; what
// never happened is "" or 0. Fields that need storage are omitted if it cannot
// be read.
func statusResponseFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"node":       {Type: framework.TypeString, Description: "The host name of the node that responded: the figures are its own.", Required: true},
		"since":      {Type: framework.TypeTime, Description: "When its counters started: when the mount was set up on this node.", Required: true},
		"version":    {Type: framework.TypeString, Description: "The engine's version.", Required: true},
		"commit":     {Type: framework.TypeString, Description: "The commit that it was built from.", Required: true},
		"go_version": {Type: framework.TypeString, Description: "The Go version that it was built with.", Required: true},

		"configured":              {Type: framework.TypeBool, Description: "Whether config is written."},
		"disabled":                {Type: framework.TypeBool, Description: "Whether the mount is disabled."},
		"disabled_roles":          {Type: framework.TypeStringSlice, Description: "The roles that are disabled."},
		"refresh_key_version":     {Type: framework.TypeInt, Description: "The version of the refresh key in use, counted from 1."},
		"refresh_key_updated_at":  {Type: framework.TypeString, Description: "When it was written."},
		"refresh_key_age_seconds": {Type: framework.TypeInt64, Description: "Its age."},
		"pause_seconds":           {Type: framework.TypeInt64, Description: "Seconds until requests resume after Cable's 429; 0 if not paused."},
		"paused_until":            {Type: framework.TypeString, Description: "When that pause ends."},

		"reuse_fallbacks": {Type: framework.TypeKVPairs, Description: "Roles whose last API call for a shared token found Cable down, with its outcome. Their readers get the previous token while it is usable.", Required: true},

		"last_mint_at":              {Type: framework.TypeString, Description: "When the last token was minted.", Required: true},
		"last_mint_role":            {Type: framework.TypeString, Description: "For which role.", Required: true},
		"last_failure_at":           {Type: framework.TypeString, Description: "When the last token request failed. Refused, paused and canceled requests do not count as failures.", Required: true},
		"last_failure_role":         {Type: framework.TypeString, Description: "For which role.", Required: true},
		"last_failure_outcome":      {Type: framework.TypeString, Description: "Its outcome, in one word; see the table of outcomes in docs/reference.md.", Required: true},
		"last_failure_cable_status": {Type: framework.TypeInt, Description: "The HTTP status of Cable's response; 0 without a response.", Required: true},
		"token_requests":            {Type: framework.TypeKVPairs, Description: "Token requests that ended, by outcome.", Required: true},
		"leases_ended":              {Type: framework.TypeInt64, Description: "Leases that were revoked or expired.", Required: true},
	}
}

// pathStatusRead handles GET status. It reports what is known even if Vault's
// storage cannot be read: that is when it is needed.
func (b *backend) pathStatusRead(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	resp := &logical.Response{Data: b.telemetry.tally.toResponseData()}
	resp.Data["version"], resp.Data["commit"], resp.Data["go_version"] = version.String(), version.Commit(), runtime.Version()
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	if live, err := b.cache.config(ctx, req.Storage); err != nil {
		resp.AddWarning("configuration fields omitted: the configuration could not be read: " + err.Error())
	} else {
		maps.Copy(resp.Data, configData(live, time.Now()))
	}
	resp.Data["reuse_fallbacks"] = b.cache.rolesDown()
	disabled, err := b.disabledRoles(ctx, req.Storage)
	if err != nil {
		resp.AddWarning("disabled_roles may be incomplete: " + err.Error())
	}
	if disabled != nil {
		resp.Data["disabled_roles"] = disabled
	}
	return resp, nil
}

// configData returns what status reports of the configuration in use, which is
// nil if none is stored.
func configData(live *liveConfig, now time.Time) map[string]any {
	var pause, age time.Duration
	var pausedUntil time.Time
	cfg := new(configEntry)
	if live != nil {
		cfg, pause = live.configEntry, live.client.Pause().Remaining()
	}
	if pause > 0 {
		pausedUntil = now.Add(pause)
	}
	if at := cfg.RefreshKeyUpdatedAt; !at.IsZero() {
		age = max(0, now.Sub(at))
	}
	return map[string]any{
		"configured":              live != nil,
		"disabled":                cfg.Disabled,
		"refresh_key_version":     cfg.RefreshKeyVersion,
		"refresh_key_updated_at":  timestamp(cfg.RefreshKeyUpdatedAt),
		"refresh_key_age_seconds": int64(age / time.Second),
		"pause_seconds":           int64((pause + time.Second - 1) / time.Second),
		"paused_until":            timestamp(pausedUntil),
	}
}

// disabledRoles returns the names of the disabled roles, sorted; with an error,
// those that were found, or nil if no role could be read. It reads the roles
// that are not in memory yet.
func (b *backend) disabledRoles(ctx context.Context, s logical.Storage) (disabled []string, err error) {
	names, err := listRoles(ctx, s)
	if err != nil {
		return nil, err
	}
	disabled = []string{} // a list, even if it is empty
	for _, name := range names[:min(len(names), maxStatusRoles)] {
		if ctx.Err() != nil {
			return disabled, ctx.Err()
		}
		role, readErr := b.cache.role(ctx, s, name)
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
