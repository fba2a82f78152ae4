// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/version"
)

// maxStatusRoles bounds how many roles a read of status looks at: each may be a
// read from Vault's storage.
const maxStatusRoles = 1000

func (b *backend) pathStatus() *framework.Path {
	return &framework.Path{
		Pattern:      "status",
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "status"},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: &framework.PathOperation{
				Callback: b.pathStatusRead,
				Summary:  "Read how this mount fares on this node.",
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
// never happened, or is not known, is "" or 0.
func statusResponseFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"node":       {Type: framework.TypeString, Description: "The host name of the node that answers: the figures are its own.", Required: true},
		"since":      {Type: framework.TypeTime, Description: "Since when it counts: the start of the plugin process.", Required: true},
		"version":    {Type: framework.TypeString, Description: "The engine's version.", Required: true},
		"commit":     {Type: framework.TypeString, Description: "The commit that it was built from.", Required: true},
		"go_version": {Type: framework.TypeString, Description: "The Go version that it was built with.", Required: true},

		"configured":              {Type: framework.TypeBool, Description: "Whether config is written.", Required: true},
		"disabled":                {Type: framework.TypeBool, Description: "Whether the mount is disabled.", Required: true},
		"disabled_roles":          {Type: framework.TypeStringSlice, Description: "The roles that are disabled.", Required: true},
		"refresh_key_version":     {Type: framework.TypeInt, Description: "Which refresh key is in use, counted from 1.", Required: true},
		"refresh_key_updated_at":  {Type: framework.TypeString, Description: "When it was written.", Required: true},
		"refresh_key_age_seconds": {Type: framework.TypeInt64, Description: "How long ago that was.", Required: true},
		"hold_seconds":            {Type: framework.TypeInt64, Description: "How long no request is sent yet, after a 429 of Cable.", Required: true},
		"hold_until":              {Type: framework.TypeString, Description: "When that pause ends.", Required: true},

		"last_mint_at":              {Type: framework.TypeString, Description: "When a token was minted last.", Required: true},
		"last_mint_role":            {Type: framework.TypeString, Description: "For which role.", Required: true},
		"last_failure_at":           {Type: framework.TypeString, Description: "When a mint failed last. Requests that were refused at once or given up by the caller are not counted as failures.", Required: true},
		"last_failure_role":         {Type: framework.TypeString, Description: "For which role.", Required: true},
		"last_failure_outcome":      {Type: framework.TypeString, Description: "How it failed, in one word; see the table of outcomes in docs/operations.md.", Required: true},
		"last_failure_cable_status": {Type: framework.TypeInt, Description: "What HTTP status Cable answered with; 0 where it did not answer.", Required: true},
		"requests":                  {Type: framework.TypeKVPairs, Description: "How many requests for a token ended in which way.", Required: true},
		"revocations":               {Type: framework.TypeInt64, Description: "How many leases ended.", Required: true},
	}
}

// pathStatusRead handles GET status. It answers with what it knows, also where
// Vault's storage cannot be read: that is when it is asked.
func (b *backend) pathStatusRead(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	now := time.Now()
	resp := &logical.Response{Data: b.recent.toResponseData()}
	for k, v := range map[string]any{
		"version":    version.String(),
		"commit":     version.Commit(),
		"go_version": runtime.Version(),
	} {
		resp.Data[k] = v
	}
	active, err := b.getClient(ctx, req.Storage)
	if err != nil {
		resp.AddWarning("the configuration cannot be read, so configured, disabled, hold_* and refresh_key_* are not known: " + err.Error())
	}
	disabled, err := b.disabledRoles(ctx, req.Storage)
	if err != nil {
		resp.AddWarning("disabled_roles may lack some: " + err.Error())
	}
	var hold time.Duration
	cfg := new(configEntry)
	if active != nil {
		cfg, hold = active.configEntry, active.client.Hold().Remaining()
	}
	resp.Data["configured"] = active != nil
	resp.Data["disabled"] = cfg.Disabled
	resp.Data["disabled_roles"] = disabled
	resp.Data["refresh_key_version"] = cfg.RefreshKeyVersion
	resp.Data["refresh_key_updated_at"] = timestamp(cfg.RefreshKeyUpdatedAt)
	resp.Data["refresh_key_age_seconds"] = int64(0)
	if at := cfg.RefreshKeyUpdatedAt; !at.IsZero() {
		resp.Data["refresh_key_age_seconds"] = int64(max(0, now.Sub(at)) / time.Second)
	}
	resp.Data["hold_seconds"], resp.Data["hold_until"] = int64(0), ""
	if hold > 0 {
		resp.Data["hold_seconds"], resp.Data["hold_until"] = retrySeconds(hold), timestamp(now.Add(hold))
	}
	return resp, nil
}

// disabledRoles returns the names of the disabled roles, in order; with an
// error, those that could be found. It reads the roles that are not in memory
// yet.
func (b *backend) disabledRoles(ctx context.Context, s logical.Storage) (disabled []string, err error) {
	disabled = []string{} // a list, also where it is empty
	names, err := s.List(ctx, rolesStoragePrefix)
	if err != nil {
		return disabled, err
	}
	slices.Sort(names)
	for _, name := range names[:min(len(names), maxStatusRoles)] {
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
		"last_mint_at":              timestamp(c.lastMint.at),
		"last_mint_role":            c.lastMint.role,
		"last_failure_at":           timestamp(c.lastFailure.at),
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

const statusHelp = `
Says whether the mount is configured, which refresh key is in use and since
when, what is disabled, when a token was minted last, how the last failure
looked, whether the mount pauses after a 429 of Cable, how requests ended, and
which build of the engine answers.

What happened is kept in memory by the node that answers, from the start of its
plugin process: after a restart, or on another node, it is another story.
No secret is in it. It can be read before config is written.
`
