// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/version"
)

const (
	// maxStatusRoles bounds how many roles a read of status looks at: each may be
	// a read from Vault's storage.
	maxStatusRoles = 1000

	// statusTimeout bounds how long it waits for storage, which may be what is
	// wrong.
	statusTimeout = 2 * time.Second
)

func (b *backend) pathStatus() *framework.Path {
	return &framework.Path{
		Pattern:      "status",
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "status"},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: &framework.PathOperation{
				Callback: b.pathStatusRead,
				// A standby mints nothing, so it has nothing to tell.
				ForwardPerformanceStandby: true,
				Summary:                   "Read how this mount fares on this node.",
				Responses: map[int][]framework.Response{
					http.StatusOK: {{Description: "The state of the mount", Fields: statusResponseFields()}},
				},
			},
		},
		HelpSynopsis:    "Read how this mount fares on this node.",
		HelpDescription: strings.TrimSpace(statusHelp),
	}
}

// statusResponseFields describes the answer. Times are RFC 3339 in UTC; what
// never happened is "" or 0. What comes from storage is left out where that
// cannot be read.
func statusResponseFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"node":       {Type: framework.TypeString, Description: "The host name of the node that answers: the figures are its own.", Required: true},
		"since":      {Type: framework.TypeTime, Description: "Since when it counts: when the mount was set up on this node.", Required: true},
		"version":    {Type: framework.TypeString, Description: "The engine's version.", Required: true},
		"commit":     {Type: framework.TypeString, Description: "The commit that it was built from.", Required: true},
		"go_version": {Type: framework.TypeString, Description: "The Go version that it was built with.", Required: true},

		"configured":              {Type: framework.TypeBool, Description: "Whether config is written."},
		"disabled":                {Type: framework.TypeBool, Description: "Whether the mount is disabled."},
		"disabled_roles":          {Type: framework.TypeStringSlice, Description: "The roles that are disabled."},
		"refresh_key_version":     {Type: framework.TypeInt, Description: "Which refresh key is in use, counted from 1."},
		"refresh_key_updated_at":  {Type: framework.TypeString, Description: "When it was written."},
		"refresh_key_age_seconds": {Type: framework.TypeInt64, Description: "How long ago that was."},
		"hold_seconds":            {Type: framework.TypeInt64, Description: "How long no request is sent yet, after a 429 of Cable."},
		"hold_until":              {Type: framework.TypeString, Description: "When that pause ends."},

		"last_mint_at":              {Type: framework.TypeString, Description: "When a token was minted last.", Required: true},
		"last_mint_role":            {Type: framework.TypeString, Description: "For which role.", Required: true},
		"last_failure_at":           {Type: framework.TypeString, Description: "When a mint failed last. Requests that were refused at once or given up by the caller are not counted as failures.", Required: true},
		"last_failure_role":         {Type: framework.TypeString, Description: "For which role.", Required: true},
		"last_failure_outcome":      {Type: framework.TypeString, Description: "How it failed, in one word; see the table of outcomes in docs/operations.md.", Required: true},
		"last_failure_cable_status": {Type: framework.TypeInt, Description: "What HTTP status Cable answered with; 0 where no answer came.", Required: true},
		"requests":                  {Type: framework.TypeKVPairs, Description: "How many requests for a token ended in which way.", Required: true},
		"revocations":               {Type: framework.TypeInt64, Description: "How many leases ended.", Required: true},
	}
}

// pathStatusRead handles GET status. It answers with what it knows, also where
// Vault's storage cannot be read: that is when it is asked.
func (b *backend) pathStatusRead(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	resp := &logical.Response{Data: b.recent.toResponseData()}
	resp.Data["version"], resp.Data["commit"], resp.Data["go_version"] = version.String(), version.Commit(), runtime.Version()
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	if active, err := b.getClient(ctx, req.Storage); err != nil {
		resp.AddWarning("the configuration cannot be read, so that nothing is said of it: " + err.Error())
	} else {
		maps.Copy(resp.Data, settingsData(active, time.Now()))
	}
	disabled, err := b.disabledRoles(ctx, req.Storage)
	if err != nil {
		resp.AddWarning("disabled_roles may lack some: " + err.Error())
	}
	if disabled != nil {
		resp.Data["disabled_roles"] = disabled
	}
	return resp, nil
}

// settingsData returns what status tells of the configuration in use, which is
// nil where none is stored.
func settingsData(active *activeConfig, now time.Time) map[string]any {
	var hold, age time.Duration
	var holdEnd time.Time
	cfg := new(configEntry)
	if active != nil {
		cfg, hold = active.configEntry, active.client.Pause().Remaining()
	}
	if hold > 0 {
		holdEnd = now.Add(hold)
	}
	if at := cfg.RefreshKeyUpdatedAt; !at.IsZero() {
		age = max(0, now.Sub(at))
	}
	return map[string]any{
		"configured":              active != nil,
		"disabled":                cfg.Disabled,
		"refresh_key_version":     cfg.RefreshKeyVersion,
		"refresh_key_updated_at":  timestamp(cfg.RefreshKeyUpdatedAt),
		"refresh_key_age_seconds": int64(age / time.Second),
		"hold_seconds":            int64((hold + time.Second - 1) / time.Second),
		"hold_until":              timestamp(holdEnd),
	}
}

// disabledRoles returns the names of the disabled roles, in order; with an
// error, those that could be found, or nil where no role could be. It reads the
// roles that are not in memory yet.
func (b *backend) disabledRoles(ctx context.Context, s logical.Storage) (disabled []string, err error) {
	names, err := s.List(ctx, rolesStoragePrefix)
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	disabled = []string{} // a list, also where it is empty
	for _, name := range names[:min(len(names), maxStatusRoles)] {
		if ctx.Err() != nil {
			return disabled, ctx.Err()
		}
		role, readErr := b.cachedRole(ctx, s, name)
		if readErr != nil {
			err = readErr
		} else if role != nil && role.Disabled {
			disabled = append(disabled, name)
		}
	}
	if err == nil && len(names) > maxStatusRoles {
		err = fmt.Errorf("only the first %d of %d roles were looked at", maxStatusRoles, len(names))
	}
	return disabled, err
}

// toResponseData returns what status tells of the past.
func (c *recent) toResponseData() map[string]any {
	c.mu.Lock()
	defer c.mu.Unlock()
	requests := make(map[string]any, len(c.counts))
	for o, n := range c.counts {
		requests[string(o)] = n
	}
	return map[string]any{
		"node":                      c.node,
		"since":                     timestamp(c.since),
		"last_mint_at":              moment(c.lastMint.at),
		"last_mint_role":            c.lastMint.role,
		"last_failure_at":           moment(c.lastFailure.at),
		"last_failure_role":         c.lastFailure.role,
		"last_failure_outcome":      string(c.lastFailure.outcome),
		"last_failure_cable_status": c.lastFailure.cableStatus,
		"requests":                  requests,
		"revocations":               c.revocations,
	}
}

// timestamp formats a time in RFC 3339, UTC, and none as "".
func timestamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

// moment is timestamp to the millisecond, to tell what came first.
func moment(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02T15:04:05.000Z07:00")
}

const statusHelp = `
Says whether the mount is configured, which refresh key is in use and since
when, what is disabled, when a token was minted last, how the last failure
looked, whether the mount pauses after a 429 of Cable, how requests ended, and
which build of the engine answers.

What happened is kept in memory by the node that answers, from when the mount
was set up there: after a restart, a reload, or on another node, it is another
story. No secret is in it. It can be read before config is written, and without
storage, of which a warning tells.
`
