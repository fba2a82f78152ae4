// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"net/http"
	"strings"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/fields"
)

func (b *backend) pathCreds() *framework.Path {
	operation := func(summary, suffix string) *framework.PathOperation {
		return &framework.PathOperation{
			Callback: b.handle(b.pathCredsRead),
			Summary:  summary,
			DisplayAttrs: &framework.DisplayAttributes{
				OperationPrefix: operationPrefix, OperationVerb: "generate", OperationSuffix: suffix,
			},
			Responses: map[int][]framework.Response{
				http.StatusOK: {{Description: "The access token, as a leased secret", Fields: credsResponseFields()}},
			},
			// A standby that mints and then cannot register the lease would leave an undelivered token. A secondary
			// registers its own leases.
			ForwardPerformanceStandby: true,
		}
	}
	return &framework.Path{
		Pattern: "creds/" + framework.GenericNameRegex("name"),
		Fields: map[string]*framework.FieldSchema{
			"name": {
				Type:        framework.TypeString,
				Description: "The role's name.",
				Required:    true,
			},
			"ttl": {
				Type: framework.TypeDurationSecond,
				Description: "A lifetime other than the role's, in seconds or as a duration: 300s or more; " +
					"capped at the role's and the mount's maximum.",
				Query: true,
			},
			"scopes": {
				Type:        framework.TypeCommaStringSlice,
				Description: "A subset of the role's scopes, separated by commas or as a JSON array.",
				Query:       true,
			},
		},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation:   operation("Mint an access token for a role.", "credentials"),
			logical.UpdateOperation: operation("Mint an access token for a role, with the parameters in a body.", "credentials-with-parameters"),
		},
		HelpSynopsis:    "Mint a short-lived access token for a role.",
		HelpDescription: strings.TrimSpace(credsHelp),
	}
}

// credsResponseFields describes the data of an access token.
func credsResponseFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"token": {
			Type:         framework.TypeString,
			Description:  "The access token.",
			DisplayAttrs: &framework.DisplayAttributes{Sensitive: true},
			Required:     true,
		},
		"expiry":            {Type: framework.TypeInt64, Description: "When the token expires, in Unix seconds.", Required: true},
		"expires_at":        {Type: framework.TypeString, Description: "The same in RFC 3339, UTC.", Required: true},
		"organization_id":   {Type: framework.TypeString, Description: "The organization that the token is for.", Required: true},
		"organization_name": {Type: framework.TypeString, Description: "The organization's name at Cable.", Required: true},
		"scope":             {Type: framework.TypeString, Description: "The scopes that Cable granted, separated by spaces.", Required: true},
		"scopes":            {Type: framework.TypeCommaStringSlice, Description: "The same as a list.", Required: true},
	}
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
	return b.leased(r.role, token), nil
}

// parseParams reads the caller's parameters, or refuses them or the role's name.
func parseParams(r *request) (p params, err error) {
	if err := fields.CheckRoleName(r.role); err != nil {
		return p, err
	}
	p.ttl, p.hasTTL = r.in.Duration("ttl")
	if v, ok := r.in["scopes"].([]string); ok {
		p.scopes, err = fields.ParseScopes(v)
	}
	return p, err
}

const credsHelp = `
A read returns an access token with a lease. The lease cannot be renewed and
ends no later than the token. Read again for a new one.

Each read mints a token, unless the role has reuse_for: then reads without
parameters share one.

ttl requests another lifetime, scopes a subset of the role's scopes. Either can
be in the query of a read or in the body of a write.

Revoking the lease does not end the token, which is valid until expires_at.
`
