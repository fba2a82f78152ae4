// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
)

// cableTokenType is the type of this engine's leases.
const cableTokenType = "cable_token"

// cableToken is the one secret type. It cannot be renewed, because Cable cannot lengthen a token, and revoking it ends
// only the lease.
func (b *backend) cableToken() *framework.Secret {
	return &framework.Secret{Type: cableTokenType, Fields: credsResponseFields(), Revoke: b.handle(b.revokeToken)}
}

// leased returns the response to a token request, with the token as a leased secret. The lease's internal data has
// role, organization, scopes, expiry and lease end as strings, never the token.
func (b *backend) leased(role string, t *outcome.Token) *logical.Response {
	resp := b.Secret(cableTokenType).Response(map[string]any{
		"token":             t.Value.Reveal(),
		"expiry":            t.Expiry,
		"expires_at":        t.ExpiresAt(),
		"organization_id":   t.OrganizationID,
		"organization_name": t.OrganizationName,
		"scope":             strings.Join(t.Granted, " "),
		"scopes":            t.Granted,
	}, map[string]any{
		"role":            role,
		"organization_id": t.OrganizationID,
		"scopes":          strings.Join(t.Granted, ","),
		"expiry":          strconv.FormatInt(t.Expiry, 10),
		"lease_end":       strconv.FormatInt(time.Now().Add(t.Lease).Unix(), 10),
	})
	resp.Secret.TTL, resp.Secret.MaxTTL = t.Lease, t.Lease // the lease never outlives its token
	resp.Secret.Renewable = false
	resp.Warnings = t.Warnings
	return resp
}

// revokeToken handles the end of a lease, revoked or expired. Revoke always succeeds. It reads no storage and no
// configuration and makes no call, because all of these may be gone, and Vault keeps a lease whose revocation fails as
// irrevocable and refuses to disable its mount.
func (b *backend) revokeToken(_ context.Context, r *request) (*logical.Response, error) {
	var data map[string]any
	if r.Secret != nil {
		data = r.Secret.InternalData
	}
	text := func(key string) string { s, _ := data[key].(string); return s }
	number := func(key string) int64 { n, _ := strconv.ParseInt(text(key), 10, 64); return n }
	end := number("lease_end")
	b.report.LeaseEnded(r.source(), text("role"), text("organization_id"), number("expiry"),
		end != 0 && time.Now().Unix() >= end)
	return nil, nil
}
