// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/lifetime"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/report"
)

// cableTokenType is the type of this engine's leases.
const cableTokenType = "cable_token"

// cableToken is the one secret type. It cannot be renewed, because Cable cannot lengthen a token, and revoking it ends
// only the lease.
func (b *backend) cableToken() *framework.Secret {
	return &framework.Secret{Type: cableTokenType, Fields: credsResponseFields(), Revoke: b.handle(b.revokeToken)}
}

// tokenData returns the data of a response with a token.
func tokenData(t *outcome.Token) map[string]any {
	return map[string]any{
		"token":             t.Value.Reveal(),
		"token_sha256":      t.SHA256,
		"expiry":            t.Expiry,
		"expires_at":        t.ExpiresAt(),
		"organization_id":   t.OrganizationID,
		"organization_name": t.OrganizationName,
		"scope":             strings.Join(t.Granted, " "),
		"scopes":            t.Granted,
	}
}

// unleased returns the response to a token request of a role without leases. Vault Agent and consul-template read again
// after ttl and a second, because data without a lease has both ttl and rotation_period.
func unleased(t *outcome.Token) *logical.Response {
	data := tokenData(t)
	data["ttl"] = int64(lifetime.ReadAgain(t.Lease, rand.N) / time.Second)
	data["rotation_period"] = data["ttl"]
	return &logical.Response{Data: data, Warnings: t.Warnings}
}

// leased returns the response to a token request, with the token as a leased secret. The lease's internal data has
// role, organization, scopes, expiry, lease end and the token's SHA-256 as strings, never the token.
func (b *backend) leased(role string, t *outcome.Token) *logical.Response {
	resp := b.Secret(cableTokenType).Response(tokenData(t), map[string]any{
		"role":            role,
		"organization_id": t.OrganizationID,
		"scopes":          strings.Join(t.Granted, ","),
		"expiry":          strconv.FormatInt(t.Expiry, 10),
		"lease_end":       strconv.FormatInt(time.Now().Add(t.Lease).Unix(), 10),
		"token_sha256":    t.SHA256,
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
	b.report.LeaseEnded(r.source(), report.Lease{
		Role:         text("role"),
		Organization: text("organization_id"),
		TokenSHA256:  text("token_sha256"), // "" in the leases of some earlier builds
		Expiry:       number("expiry"),
		HasExpired:   end != 0 && time.Now().Unix() >= end,
	})
	return nil, nil
}
