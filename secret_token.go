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
)

// cableTokenType is the type of the leases that this engine gives out.
const cableTokenType = "cable_token"

// cableToken is the one secret type. It cannot be renewed, because Cable cannot
// lengthen a token; and its revocation ends the lease only.
func (b *backend) cableToken() *framework.Secret {
	return &framework.Secret{
		Type:   cableTokenType,
		Fields: credsResponseFields(),
		Revoke: b.revokeToken,
	}
}

// leaseData is what Vault keeps with the lease: who has which rights until
// when, and when the lease is to end, as strings, and never the token.
func leaseData(role string, m *mintedToken, end time.Time) map[string]any {
	return map[string]any{
		"role":            role,
		"organization_id": m.OrganizationID,
		"scopes":          strings.Join(m.scopes, ","),
		"expiry":          strconv.FormatInt(m.Expiry, 10),
		"lease_end":       strconv.FormatInt(end.Unix(), 10),
	}
}

// revokeToken handles the end of a lease, revoked or expired. It reads no
// storage and no configuration and calls nobody, as all of these may be gone;
// and it never fails, because Vault would then keep the lease as irrevocable
// and refuse to disable the mount.
func (b *backend) revokeToken(_ context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	var data map[string]any
	if req.Secret != nil {
		data = req.Secret.InternalData
	}
	text := func(key string) string { s, _ := data[key].(string); return s }
	role, organization := text("role"), text("organization_id")
	expiry, err := strconv.ParseInt(text("expiry"), 10, 64)
	left := time.Duration(-1) // not known
	if err == nil {
		left = max(0, time.Until(time.Unix(expiry, 0)))
	}
	end, err := strconv.ParseInt(text("lease_end"), 10, 64)
	bySelf := err == nil && time.Now().Unix() >= end
	log := b.log(req).With("role", role, "organization", organization)
	switch {
	case left < 0:
		log.Info("a lease ended; when its token dies is not known")
	case left > 0 && !bySelf:
		log.Info("a lease ended before its token, which cannot be revoked and lives on", "expires_at", rfc3339(expiry), "seconds_left", int64(left/time.Second))
	default:
		log.Debug("a lease ended by itself", "expires_at", rfc3339(expiry))
	}
	b.metrics.leaseEnded(left)
	b.recent.leaseEnded()
	b.sendRevokeEvent(role, organization, expiry, left)
	return nil, nil
}
