// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
)

// One token request from start to end: read the settings, narrow and resolve,
// call Cable, check the grant, lease.

// tokenParams is how the caller narrows the role.
type tokenParams struct {
	hasTTL bool     // the caller named a ttl
	ttl    int64    // in seconds
	scopes []string // nil if the caller named none
}

// isDefault reports whether the caller named nothing.
func (p tokenParams) isDefault() bool { return !p.hasTTL && p.scopes == nil }

// settings are what a token request is resolved with.
type settings struct {
	config *liveConfig
	role   *roleEntry
}

// receivedKey is of the time of receipt in a request's context.
type receivedKey struct{}

// receivedAt returns when the request was received: its budget begins then.
func receivedAt(ctx context.Context) time.Time {
	if t, ok := ctx.Value(receivedKey{}).(time.Time); ok {
		return t
	}
	return time.Now()
}

// recheckTimeout bounds how long storage is waited for once a token has arrived.
const recheckTimeout = time.Second

// errChanged stops a token request whose settings have changed, before an API
// call is made with them.
var errChanged = errors.New("the settings have changed")

// mint handles a token request for a caller, and reports it. The error is a
// *failure.
func (b *backend) mint(ctx context.Context, r *tokenReport, params tokenParams) (*mintedToken, error) {
	err := errChanged
	for errors.Is(err, errChanged) {
		r.minted, err = b.mintOnce(ctx, r, params)
	}
	return b.ended(r, err)
}

// ended reports a token request that ended with a token in r, or with err.
func (b *backend) ended(r *tokenReport, err error) (*mintedToken, error) {
	r.failure = classify(err)
	b.telemetry.tokenRequestEnded(r, b.cache.isCurrent)
	if r.failure != nil {
		return nil, r.failure
	}
	return r.minted, nil
}

// mintOnce is mint with the settings as they are now. It returns errChanged,
// and has called nobody, if they change before the API call.
func (b *backend) mintOnce(ctx context.Context, r *tokenReport, params tokenParams) (*mintedToken, error) {
	set, err := b.settings(ctx, r)
	if err != nil {
		return nil, err
	}
	if set.role.ReuseFor > 0 && params.isDefault() {
		if s := b.cache.sharedRole(r.role, set, r.generation); s != nil {
			return b.mintShared(ctx, r, s)
		}
	}
	generation := r.generation
	return b.mintWith(ctx, r, set, params, func() error {
		if !b.cache.isCurrent(generation) {
			return errChanged
		}
		return nil
	})
}

// mintShared returns a token that the role's readers share.
func (b *backend) mintShared(ctx context.Context, r *tokenReport, s *sharedRole) (*mintedToken, error) {
	requested, warnings, err := b.resolve(ctx, r, s.settings, tokenParams{})
	if err != nil {
		return nil, err
	}
	r.sharing = true
	m, err := b.reuse(ctx, r, s, requested)
	if m != nil {
		m.warnings = append(warnings, m.warnings...)
	}
	return m, err
}

// settings returns the configuration and the role, from memory or storage, and
// refuses if there is none. It takes until the request's budget ends at most.
func (b *backend) settings(ctx context.Context, r *tokenReport) (settings, error) {
	if set, generation, ok := b.cache.settings(r.role); ok {
		r.roleExists, r.generation = true, generation
		return set, nil
	}
	generation, timeout := b.cache.now()
	configCtx, cancel := r.withBudget(ctx, timeout)
	defer cancel()
	config, err := b.cache.config(configCtx, r.req.Storage)
	if err != nil {
		return settings{}, err
	}
	if config != nil {
		timeout = config.timeout()
	}
	roleCtx, cancel := r.withBudget(ctx, timeout)
	defer cancel()
	role, err := b.cache.role(roleCtx, r.req.Storage, r.role)
	if err != nil {
		return settings{}, err
	}
	r.roleExists, r.generation = role != nil, generation
	if role == nil {
		b.telemetry.metrics.roleDropped(r.role) // it may have been deleted on another node
		return settings{}, noSuchRole(r.role)
	}
	if config == nil {
		return settings{}, refusal("the mount is not configured: write refresh_key to config")
	}
	return settings{config, role}, nil
}

// withBudget bounds ctx by the request's budget, which begins at its receipt.
func (r *tokenReport) withBudget(ctx context.Context, timeout time.Duration) (context.Context, context.CancelFunc) {
	return context.WithDeadlineCause(ctx, r.received.Add(timeout), errBudget)
}

// mintWith requests a token with these settings. allow is asked before each API
// call, and again before its first byte is sent.
func (b *backend) mintWith(ctx context.Context, r *tokenReport, set settings, params tokenParams, allow func() error) (*mintedToken, error) {
	requested, warnings, err := b.resolve(ctx, r, set, params)
	if err != nil {
		return nil, err
	}
	requested.Start, requested.Allow = r.received, allow
	m, err := b.call(ctx, r, set.config, requested)
	if err != nil {
		return nil, err
	}
	m.warnings = append(warnings, m.warnings...)
	return m, nil
}

// call requests a token from Cable, checks the grant, and decides the lease.
func (b *backend) call(ctx context.Context, r *tokenReport, config *liveConfig, requested cable.TokenRequest) (*mintedToken, error) {
	token, err := b.callCable(ctx, config.client, requested)
	if err != nil {
		return nil, callFailure(err, r, config)
	}
	r.granted = token

	granted, missing, err := checkGrant(requested, token)
	if err == nil {
		err = b.checkStillEnabled(ctx, r)
	}
	if err != nil {
		return nil, refuseToken(err, token)
	}
	lifetime := int64(requested.Lifetime / time.Second)
	now := time.Now()
	m := &mintedToken{Token: token, scopes: granted}
	m.lease, m.lifetime, err = decideLease(grantedLifetime{
		requested: lifetime, expiry: token.Expiry, date: token.Date, sentAt: token.SentAt, elapsed: cable.Elapsed(token.SentAt, now),
	})
	if err != nil {
		return nil, refuseToken(&mismatch{err.Error()}, token)
	}
	if len(missing) > 0 {
		m.warnings = append(m.warnings, "Cable granted fewer scopes than requested; missing: "+showScopes(missing))
	}
	if m.longer = m.lifetime > lifetime+longerGrant; m.longer {
		m.warnings = append(m.warnings, fmt.Sprintf("Cable granted %ds instead of the requested %ds: the lease ends first, the token is valid until %s", m.lifetime, lifetime, m.expiresAt()))
	}
	return m, nil
}

// callCable is requestToken, counted while it lasts.
func (b *backend) callCable(ctx context.Context, client *cable.Client, requested cable.TokenRequest) (*cable.Token, error) {
	b.telemetry.metrics.tokenRequestsInFlight.Inc()
	defer b.telemetry.metrics.tokenRequestsInFlight.Dec() // if it panics, too
	return b.requestToken(ctx, client, requested)
}

// resolve narrows the role by the caller's parameters and decides what to
// request from Cable, with a warning for each bound that changed it.
func (b *backend) resolve(ctx context.Context, r *tokenReport, set settings, params tokenParams) (requested cable.TokenRequest, warnings []string, err error) {
	defer func() { r.requested = requested }()
	config, role := set.config, set.role
	requested = cable.TokenRequest{OrganizationID: role.OrganizationID, Scopes: role.Scopes}
	if err := checkEnabled(r.role, set); err != nil {
		return requested, nil, err
	}
	if requested.OrganizationID == "" {
		requested.OrganizationID = config.OrganizationID
	}
	if requested.OrganizationID == "" {
		return requested, nil, refusal(fmt.Sprintf("no organization: write organization_id to roles/%s or to config", r.role))
	}
	if len(requested.Scopes) == 0 {
		return requested, nil, refusal(fmt.Sprintf("role %q names no scopes: write scopes to roles/%s", r.role, r.role))
	}
	if params.scopes != nil {
		if outside := without(params.scopes, role.Scopes); len(outside) > 0 {
			return requested, nil, refusal(fmt.Sprintf("scopes outside role %q: %s; it allows %s", r.role, showScopes(outside), showScopes(role.Scopes)))
		}
		requested.Scopes = params.scopes
	}
	in := lifetimeInput{hasTTL: params.hasTTL, requestTTL: params.ttl, roleTTL: role.TTL, roleMaxTTL: role.MaxTTL}
	// Each of the mount's lease settings is read from Vault, only if it matters.
	ctx, cancel := r.withBudget(ctx, config.timeout())
	defer cancel()
	in.mountMax, err = b.maxLeaseTTL.get(ctx)
	if err == nil && !in.hasTTL && in.roleTTL == 0 {
		in.mountDefault, err = b.defaultLeaseTTL.get(ctx)
	}
	if err != nil {
		return requested, nil, err
	}
	lifetime, warnings, err := decideLifetime(in)
	requested.Lifetime = seconds(lifetime)
	return requested, warnings, err
}

// checkEnabled refuses if the mount or the role is disabled.
func checkEnabled(name string, set settings) error {
	if set.config.Disabled {
		return refusal("the mount is disabled: write disabled=false to config to mint again")
	}
	if set.role.Disabled {
		return refusal(fmt.Sprintf("role %q is disabled: write disabled=false to roles/%s to mint again", name, name))
	}
	return nil
}

// checkStillEnabled refuses a token that arrived after the mount or the role was
// disabled or deleted, or if that cannot be known.
func (b *backend) checkStillEnabled(ctx context.Context, r *tokenReport) error {
	if r.verify || r.shared || b.cache.isCurrent(r.generation) {
		return nil
	}
	// What is asked of storage now may take a moment beyond the request's budget:
	// the token is here.
	ctx, cancel := context.WithTimeoutCause(ctx, recheckTimeout, errBudget)
	defer cancel()
	set, err := b.settings(ctx, &tokenReport{req: r.req, role: r.role, received: time.Now()})
	if err == nil {
		err = checkEnabled(r.role, set)
	}
	return err
}

// mismatch is a grant that is not what was requested.
type mismatch struct{ text string }

// Error implements error.
func (m *mismatch) Error() string { return m.text }

// checkGrant compares a response with its request. It returns the granted
// scopes, sorted and without duplicates; those that were requested and not
// granted; or a mismatch that names what Cable granted and was not requested.
//
// A response without scopes takes the requested ones: Cable's schema does not
// require them in the response.
func checkGrant(requested cable.TokenRequest, got *cable.Token) (granted, missing []string, err error) {
	for _, org := range []struct{ what, id string }{{"the token is", got.OrganizationID}, {"the token's scopes are", got.ScopesOrganizationID}} {
		if org.id != requested.OrganizationID && (org.id != "" || org.what == "the token is") {
			return nil, nil, &mismatch{fmt.Sprintf("%s for organization %s instead of %s", org.what, show(orgShape, org.id), show(orgShape, requested.OrganizationID))}
		}
	}
	if got.Scopes == nil {
		return requested.Scopes, nil, nil
	}
	granted = append([]string{}, got.Scopes...) // not nil: an empty list is a response, too
	slices.Sort(granted)
	granted = slices.Compact(granted)
	if extra := without(granted, requested.Scopes); len(extra) > 0 {
		return nil, nil, &mismatch{"the token has scopes that were not requested: " + showScopes(extra)}
	}
	return granted, without(requested.Scopes, granted), nil
}

// callFailure adds to a failed API call what the caller can do about it.
func callFailure(err error, r *tokenReport, config *liveConfig) error {
	var ce *cable.Error
	if !errors.As(err, &ce) {
		return err // of allow
	}
	f := classify(err)
	switch f.outcome {
	case outcomeKeyRejected:
		other := authSchemeBearer
		if config.AuthScheme == authSchemeBearer {
			other = authSchemeRaw
		}
		f.message += fmt.Sprintf("; the refresh key was sent with auth_scheme=%s%s: write a valid refresh_key to config, or try auth_scheme=%s, because Cable's documents show both",
			config.AuthScheme, sentTo(config.configEntry), other)
	case outcomeRateLimited:
		f.message += fmt.Sprintf("; no API call for another %ds", wholeSeconds(ce.RetryAfter))
	case outcomeRejectedByCable:
		switch ce.StatusCode {
		case http.StatusForbidden, http.StatusBadRequest:
			f.message += fmt.Sprintf("; check the organization and the scopes of roles/%s with Cable", r.role)
		case http.StatusNotFound:
			f.message += "; check token_url in config"
		}
	}
	if ce.MaybeIssued {
		f.undelivered(time.Now().Add(r.requested.Lifetime).Unix())
	}
	return f
}

// refuseToken makes a failure of a token that Cable granted and the engine does
// not return: a mismatch, or another reason.
func refuseToken(err error, token *cable.Token) error {
	var m *mismatch
	f := classify(err)
	if errors.As(err, &m) {
		f = &failure{outcome: outcomeGrantMismatch, message: "cable's response was refused: " + m.text, detail: m.text, cause: err}
	}
	f.cableStatus, f.attempts = http.StatusOK, token.Attempts
	if until := validUntil(token.Expiry, token.Date, time.Now()); until > 0 {
		f.undelivered(until)
	}
	return f
}

// sentTo names the host that the refresh key is sent to, if it is not Cable's.
func sentTo(config *configEntry) string {
	u, err := cable.ParseTokenURL(config.TokenURL)
	if config.TokenURL == cable.DefaultTokenURL || err != nil {
		return ""
	}
	return " to " + cable.HostForDisplay(u)
}

// noSuchRole is the refusal for a role that does not exist.
func noSuchRole(name string) error {
	where := "roles/"
	if nameShape.MatchString(name) {
		where += name
	}
	return refusal(fmt.Sprintf("role %s does not exist: write it to %s", show(nameShape, name), where))
}

// leased is the response to a token request: the token as a secret with a lease.
func (b *backend) leased(role string, m *mintedToken) *logical.Response {
	lease := time.Duration(m.lease) * time.Second
	resp := b.Secret(cableTokenType).Response(
		map[string]any{
			"token":             m.Value.Reveal(),
			"expiry":            m.Expiry,
			"expires_at":        m.expiresAt(),
			"organization_id":   m.OrganizationID,
			"organization_name": m.OrganizationName,
			"scope":             strings.Join(m.scopes, " "),
			"scopes":            m.scopes,
		},
		leaseData(role, m, time.Now().Add(lease)),
	)
	resp.Secret.TTL, resp.Secret.MaxTTL = lease, lease
	resp.Secret.Renewable = false
	resp.Warnings = m.warnings
	return resp
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
