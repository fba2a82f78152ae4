// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"strconv"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// cableTokenType is the type of this engine's leases.
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

// revokeToken handles the end of a lease, revoked or expired. It reads no
// storage and no configuration and calls nobody, because all of these may be
// gone; and it never fails, because Vault would then keep the lease as
// irrevocable and refuse to disable the mount.
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
	expired := err == nil && time.Now().Unix() >= end
	log := b.telemetry.requestLog(req).With("role", role, "organization", shown(orgShape, organization))
	switch {
	case left < 0:
		log.Info("lease ended; token expiry unknown")
	case left > 0 && !expired:
		log.Info("lease ended before its token; Cable cannot revoke tokens, so it stays valid", "expires_at", rfc3339(expiry), "remaining_seconds", int64(left/time.Second))
	default:
		log.Debug("lease ended", "expires_at", rfc3339(expiry))
	}
	b.telemetry.leaseEnded(role, organization, expiry, left)
	return nil, nil
}
