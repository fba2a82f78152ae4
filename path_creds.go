// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/fields"
)

func (b *backend) pathCreds() *framework.Path {
	mints := func(summary, suffix string) *framework.PathOperation {
		const response = "The access token, with a lease unless the role has lease=false"
		p := b.reads(b.pathCredsRead, summary, response, credsResponseFields())
		p.DisplayAttrs = &framework.DisplayAttributes{
			OperationPrefix: operationPrefix, OperationVerb: "generate", OperationSuffix: suffix,
		}
		// A standby that mints and then cannot register the lease would leave an undelivered token. A secondary
		// registers its own leases.
		p.ForwardPerformanceStandby = true
		return p
	}
	return &framework.Path{
		Pattern: "creds/" + framework.GenericNameRegex("name"),
		Fields:  credsParameters(),
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: mints("Mint an access token for a role.", "credentials"),
			logical.UpdateOperation: mints("Mint an access token for a role, with the parameters in a body.",
				"credentials-with-parameters"),
		},
		HelpSynopsis:    "Mint a short-lived access token for a role.",
		HelpDescription: credsHelp,
	}
}

// credsParameters describes the parameters of a token request.
func credsParameters() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"name": always(field(framework.TypeString, "The role's name.")),
		"organization_id": inQuery(field(framework.TypeString,
			"The organization that the token is for: the role's own or one of its organization_ids.")),
		"ttl": inQuery(field(framework.TypeDurationSecond, "A lifetime other than the role's, in seconds or as a "+
			"duration: 300s or more; capped at the role's and the mount's maximum.")),
		"scopes": inQuery(field(framework.TypeCommaStringSlice,
			"A subset of the role's scopes, separated by commas or as a JSON array.")),
	}
}

// credsResponseFields describes the data of an access token.
func credsResponseFields() map[string]*framework.FieldSchema {
	schema := map[string]*framework.FieldSchema{
		"token":             always(field(framework.TypeString, "The access token.")),
		"token_sha256":      always(field(framework.TypeString, "The SHA-256 of the token, in hexadecimal.")),
		"expiry":            always(field(framework.TypeInt64, "When the token expires, in Unix seconds.")),
		"expires_at":        always(field(framework.TypeString, "The same in RFC 3339, UTC.")),
		"organization_id":   always(field(framework.TypeString, "The organization that the token is for.")),
		"organization_name": always(field(framework.TypeString, "The organization's name at Cable.")),
		"scope":             always(field(framework.TypeString, "The scopes that Cable granted, separated by spaces.")),
		"scopes":            always(field(framework.TypeCommaStringSlice, "The same as a list.")),
		"ttl": field(framework.TypeInt64,
			"Without a lease: the seconds after which to read again, drawn for each read."),
		"rotation_period": field(framework.TypeInt64,
			"Without a lease: the same, by which Vault Agent and consul-template know that ttl is meant for them."),
	}
	schema["token"].DisplayAttrs = &framework.DisplayAttributes{Sensitive: true}
	return schema
}

// pathCredsRead handles GET and POST creds/<name>.
func (b *backend) pathCredsRead(ctx context.Context, r *request) (*logical.Response, error) {
	if err := r.in.RefuseBlanks(); err != nil {
		return nil, err // malformed, so it is not counted as a token request
	}
	token, err := b.mint(ctx, r)
	if err != nil {
		return nil, err
	}
	if token.NoLease {
		return unleased(token), nil
	}
	return b.leased(r.role, token), nil
}

// parseParams reads the caller's parameters, or refuses them or the role's name.
func parseParams(r *request) (p params, err error) {
	if err := fields.CheckRoleName(r.role); err != nil {
		return p, err
	}
	p.ttl, p.hasTTL = r.in.Duration("ttl")
	if p.organization, _ = r.in.Text("organization_id"); p.organization != "" {
		if err := fields.CheckOrganization(p.organization); err != nil {
			return p, err
		}
	}
	if v, ok := r.in["scopes"].([]string); ok {
		p.scopes, err = fields.ParseScopes(v)
	}
	return p, err
}

const credsHelp = `A read returns an access token with a lease. The lease cannot be renewed and
ends no later than the token. Read again for a new one.

Each read mints a token, unless the role has reuse_for: then reads without
parameters share one.

ttl requests another lifetime, scopes a subset of the role's scopes, and
organization_id one of the role's organizations. They can be in the query of a
read or in the body of a write.

If the role has lease=false, there is no lease. Read again after ttl seconds.

explain/<name> tells what a read would do, and mints nothing.

Revoking the lease does not end the token, which is valid until expires_at.`
