// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
)

// refusedEvent is what operators watch the log for.
const refusedEvent = "an answer of Cable was refused and its token dropped"

// mintRequest is a role with what the caller narrowed it to.
type mintRequest struct {
	name   string
	role   *roleEntry
	hasTTL bool     // the caller named a ttl
	ttl    int64    // in seconds
	scopes []string // nil where the caller named none
}

// mintedToken is an access token that was checked and may be handed on.
type mintedToken struct {
	*cable.Token
	scopes   []string // as granted, sorted
	lease    int64    // seconds
	life     int64    // seconds, as Cable granted it
	longer   bool     // by more than longerGrant than was asked for
	warnings []string
}

// expiresAt is the token's expiry in RFC 3339, UTC.
func (m *mintedToken) expiresAt() string { return rfc3339(m.Expiry) }

// rfc3339 formats a Unix time in seconds, in UTC.
func rfc3339(unix int64) string { return timestamp(time.Unix(unix, 0)) }

func (b *backend) pathCreds() *framework.Path {
	operation := func(summary, suffix string) *framework.PathOperation {
		return &framework.PathOperation{
			Callback:     b.pathCredsRead,
			Summary:      summary,
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationVerb: "generate", OperationSuffix: suffix},
			Responses: map[int][]framework.Response{
				http.StatusOK: {{Description: "The access token, as a leased secret", Fields: credsResponseFields()}},
			},
			// A standby that mints and then cannot register the lease would leave
			// a token that nobody holds. A secondary registers its own leases.
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
				Type:        framework.TypeDurationSecond,
				Description: "A life other than the role's, in seconds or as a duration: 300s or more; capped at the role's and the mount's maximum.",
				Query:       true,
			},
			"scopes": {
				Type:        framework.TypeCommaStringSlice,
				Description: "A part of the role's scopes, separated by commas or as a JSON array.",
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

// credsResponseFields describes the data of a minted token.
func credsResponseFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"token": {
			Type:         framework.TypeString,
			Description:  "The access token.",
			DisplayAttrs: &framework.DisplayAttributes{Sensitive: true},
			Required:     true,
		},
		"expiry":            {Type: framework.TypeInt64, Description: "When the token dies, in Unix seconds.", Required: true},
		"expires_at":        {Type: framework.TypeString, Description: "The same in RFC 3339, UTC.", Required: true},
		"organization_id":   {Type: framework.TypeString, Description: "The organization that the token is for.", Required: true},
		"organization_name": {Type: framework.TypeString, Description: "The organization's name at Cable.", Required: true},
		"scopes":            {Type: framework.TypeCommaStringSlice, Description: "The scopes that Cable granted.", Required: true},
	}
}

// pathCredsRead handles GET and POST creds/<name>: resolve the request against
// the role, mint, answer.
func (b *backend) pathCredsRead(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	r := newRecord(req, name)
	m, err := b.mintForCaller(ctx, r, d)
	b.record(r, m, err)
	if err != nil {
		return failed(err)
	}
	return b.leased(name, m), nil
}

// mintForCaller mints what the caller asks for, with the settings in use.
func (b *backend) mintForCaller(ctx context.Context, r *mintRecord, d *framework.FieldData) (*mintedToken, error) {
	if err := checkRoleName(r.role); err != nil {
		r.role = unknownRole // it may be anything, and of any length
		return nil, err
	}
	role, err := b.cachedRole(ctx, r.req.Storage, r.role)
	if err != nil {
		return nil, err
	}
	if role == nil {
		b.metrics.roleDeleted(r.role) // on another node, or while it was minted for
		return nil, noSuchRole(r.role)
	}
	r.roleExists = true
	active, err := b.getClient(ctx, r.req.Storage)
	if err != nil {
		return nil, err
	}
	if active == nil {
		return nil, refusal("the mount is not configured: write refresh_key to config")
	}
	want, err := credsRequest(r.role, role, d)
	if err != nil {
		return nil, err
	}
	return b.mint(ctx, r, active, want)
}

// credsRequest reads the caller's parameters, or refuses them.
func credsRequest(name string, role *roleEntry, d *framework.FieldData) (mintRequest, error) {
	want := mintRequest{name: name, role: role}
	if v, ok := d.GetOk("ttl"); ok {
		want.hasTTL, want.ttl = true, int64(v.(int))
	}
	if v, ok := d.GetOk("scopes"); ok {
		scopes, err := normalizeScopes(v.([]string))
		if err != nil {
			return want, err
		}
		want.scopes = scopes
	}
	return want, nil
}

// mint asks Cable for a token and checks what came. Its error is a refusal, a
// mintError, or of Vault's.
func (b *backend) mint(ctx context.Context, r *mintRecord, active *activeConfig, want mintRequest) (*mintedToken, error) {
	asked, warnings, err := resolveMint(active.configEntry, want,
		func() int64 { return int64(b.System().MaxLeaseTTL() / time.Second) },
		func() int64 { return int64(b.System().DefaultLeaseTTL() / time.Second) })
	r.asked = asked
	if err != nil {
		return nil, err
	}

	token, err := b.requestToken(ctx, active, asked)
	if err != nil {
		failure := &mintError{role: want.name, scheme: active.AuthScheme, cause: err}
		var ce *cable.Error
		if errors.As(err, &ce) && ce.MaybeIssued {
			failure.maybeUntil = time.Now().Add(asked.Lifetime).Unix()
		}
		return nil, failure
	}
	r.granted = token

	ask := int64(asked.Lifetime / time.Second)
	granted, missing, err := checkGrant(asked, token)
	var lease, life int64
	if err == nil {
		lease, life, err = decideLease(grantedLife{
			ask: ask, expiry: token.Expiry, date: token.Date,
			sentAt: token.SentAt, elapsed: token.ReceivedAt.Sub(token.SentAt),
		})
	}
	if err != nil {
		failure := &mintError{role: want.name, refused: err}
		clock := token.Date // Cable's, where it said so
		if clock.IsZero() {
			clock = token.ReceivedAt
		}
		if token.Expiry > clock.Unix() {
			failure.maybeUntil = token.Expiry
		}
		return nil, failure
	}
	if len(missing) > 0 {
		warnings = append(warnings, "Cable granted fewer scopes than were asked for; missing: "+nameAll(missing))
	}
	longer := life > ask+longerGrant
	if longer {
		warnings = append(warnings, fmt.Sprintf("Cable granted %ds instead of the %ds that were asked for: the lease ends first, the token lives until %s", life, ask, rfc3339(token.Expiry)))
	}
	return &mintedToken{Token: token, scopes: granted, lease: lease, life: life, longer: longer, warnings: warnings}, nil
}

// requestToken is RequestToken, counted while it lasts.
func (b *backend) requestToken(ctx context.Context, active *activeConfig, asked cable.TokenRequest) (*cable.Token, error) {
	b.metrics.mintsInFlight.Inc()
	defer b.metrics.mintsInFlight.Dec()
	return active.client.RequestToken(ctx, asked)
}

// resolveMint decides what to ask Cable for, and says which caps bit. The
// mount's lease settings, in seconds, are asked for only where they matter:
// each is a call to Vault.
func resolveMint(cfg *configEntry, want mintRequest, mountMax, mountDefault func() int64) (cable.TokenRequest, []string, error) {
	asked := cable.TokenRequest{OrganizationID: want.role.OrganizationID, Scopes: want.role.Scopes}
	if cfg.Disabled {
		return asked, nil, refusal("the mount is disabled: write disabled=false to config to mint again")
	}
	if want.role.Disabled {
		return asked, nil, refusal(fmt.Sprintf("role %q is disabled: write disabled=false to roles/%s to mint again", want.name, want.name))
	}
	if asked.OrganizationID == "" {
		asked.OrganizationID = cfg.OrganizationID
	}
	if asked.OrganizationID == "" {
		return asked, nil, refusal(fmt.Sprintf("no organization: write organization_id to roles/%s or to config", want.name))
	}
	if len(asked.Scopes) == 0 {
		return asked, nil, refusal(fmt.Sprintf("role %q names no scopes: write scopes to roles/%s", want.name, want.name))
	}
	if want.scopes != nil {
		if outside := without(want.scopes, want.role.Scopes); len(outside) > 0 {
			return asked, nil, refusal(fmt.Sprintf("scopes outside role %q: %s; it allows %s", want.name, nameAll(outside), nameAll(want.role.Scopes)))
		}
		asked.Scopes = want.scopes
	}
	life := lifeRequest{
		requested:  want.hasTTL,
		requestTTL: want.ttl,
		roleTTL:    want.role.TTL,
		roleMaxTTL: want.role.MaxTTL,
		mountMax:   mountMax(),
	}
	if !life.requested && life.roleTTL == 0 {
		life.mountDefault = mountDefault()
	}
	ask, warnings, err := decideAsk(life)
	asked.Lifetime = seconds(ask)
	return asked, warnings, err
}

// leased is the answer to a mint: the token as a secret with a lease.
func (b *backend) leased(name string, m *mintedToken) *logical.Response {
	resp := b.Secret(cableTokenType).Response(
		map[string]any{
			"token":             m.Value.Reveal(),
			"expiry":            m.Expiry,
			"expires_at":        m.expiresAt(),
			"organization_id":   m.OrganizationID,
			"organization_name": m.OrganizationName,
			"scopes":            m.scopes,
		},
		leaseData(name, m, time.Now().Add(time.Duration(m.lease)*time.Second)),
	)
	resp.Secret.TTL = time.Duration(m.lease) * time.Second
	resp.Secret.MaxTTL = resp.Secret.TTL
	resp.Secret.Renewable = false
	resp.Warnings = m.warnings
	return resp
}

const credsHelp = `
Each read mints a fresh token and returns it with a lease. The lease cannot be
renewed and ends no later than the token. Read again for a new one.

ttl asks for another life, scopes for a part of the role's scopes. Either can
stand in the query of a read or in the body of a write.

Revoking the lease does not end the token, which lives until expires_at.
`
