// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/fields"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/lifetime"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/report"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/share"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/state"
)

// A token request reads the settings, narrows them by the caller's parameters, calls Cable or shares a call, checks the
// grant and the settings, decides the lease, and is reported.

// recheckTimeout bounds the wait for storage after a token has arrived.
const recheckTimeout = time.Second

// params narrow a role for one token request.
type params struct {
	hasTTL bool
	ttl    time.Duration
	scopes []string // nil if the caller named none
}

// attempt is one pass through the steps. Its fields are set as far as it got.
type attempt struct {
	kind      report.Kind
	role      string
	set       state.Settings
	requested cable.TokenRequest
	token     *outcome.Token
	shared    share.Result
}

// mint handles a caller's token request. If the settings change before an attempt's API call, another attempt decides
// everything again.
func (b *backend) mint(ctx context.Context, r *request) (*outcome.Token, error) {
	a := attempt{role: r.role}
	p, err := parseParams(r)
	for again := err == nil; again; again = errors.Is(err, outcome.ErrChanged) {
		a, err = b.try(ctx, r, p)
	}
	return a.token, b.ended(r.source(), r.received, a, err)
}

// ended reports the last attempt of a token request, and returns its error as a failure.
func (b *backend) ended(source report.Source, began time.Time, a attempt, err error) error {
	r := a.report(source, began, outcome.Classify(err))
	r.RoleIsCurrent = b.state.IsCurrent(a.set)
	b.report.TokenRequestEnded(r)
	if r.RoleIsCurrent && !b.state.IsCurrent(a.set) {
		b.report.RoleGone(a.role) // it may have been deleted just before its series was made
	}
	if r.Failure == nil {
		return nil
	}
	return r.Failure
}

// report assembles the report of an attempt that began at that time.
func (a *attempt) report(source report.Source, began time.Time, f *outcome.Failure) report.TokenRequest {
	return report.TokenRequest{
		Source:     source,
		Kind:       a.kind,
		Took:       time.Since(began),
		Role:       a.role,
		RoleExists: a.set.Role != nil,
		Requested:  a.requested,
		Token:      a.token,
		Failure:    f,
		Shared:     a.shared,
	}
}

// try makes one attempt. If the settings change before its API call, it makes none and returns outcome.ErrChanged.
func (b *backend) try(ctx context.Context, r *request, p params) (a attempt, err error) {
	a = attempt{kind: report.Direct, role: r.role}
	if a.set, err = b.settings(ctx, r); err != nil {
		return a, err
	}
	var warnings []string
	if a.requested, warnings, err = b.narrow(ctx, r, a.set, p); err != nil {
		return a, err
	}
	isShared := false
	if a.set.Role.ReuseFor > 0 && !p.hasTTL && p.scopes == nil { // reads without parameters share
		isShared, err = b.share(ctx, r, &a)
	}
	if !isShared {
		a.token, err = b.mintOne(ctx, &a, r.received, func() error { return b.recheck(ctx, r, &a) })
	}
	if a.token != nil {
		a.token.Warnings = append(warnings, a.token.Warnings...)
	}
	return a, err
}

// mintOne mints a token whose budget began at that time. check is called between the API call and the decision on the
// lease.
func (b *backend) mintOne(
	ctx context.Context, a *attempt, began time.Time, check func() error,
) (*outcome.Token, error) {
	a.requested.Start, a.requested.Allow = began, b.allow(a.set)
	granted, err := b.call(ctx, a.role, a.set.Config, a.requested)
	if err != nil {
		return nil, err
	}
	token, err := checkGrant(a.requested, granted)
	if err == nil {
		err = check()
	}
	if err == nil {
		err = decideLease(token, a.requested.Lifetime)
	}
	if err != nil {
		return nil, outcome.Drop(err, granted)
	}
	return token, nil
}

// share returns the token that the role's readers share. ok is false if the request must mint alone, because too many
// roles share.
func (b *backend) share(ctx context.Context, r *request, a *attempt) (ok bool, err error) {
	source, call := r.source(), *a
	call.kind = report.SharedCall
	a.shared, ok, err = b.shared.Read(ctx, share.Reader{
		Role:     a.role,
		Settings: a.set,
		Lifetime: a.requested.Lifetime,
		Deadline: r.received.Add(a.set.Config.RequestTimeout),
		Check:    func() error { return b.recheck(ctx, r, a) },
		Call: func(started time.Time) (*outcome.Token, error) {
			return b.sharedCall(source, started, call)
		},
		Undelivered: func(token *outcome.Token) {
			const why = outcome.Refusal("no reader received the shared token before it was dropped")
			if f := outcome.Drop(why, token.Token); f.UndeliveredUntil > 0 {
				b.report.TokenRequestEnded(call.report(source, token.SentAt, f))
			}
		},
	})
	if ok {
		a.kind, a.token = report.Reader, a.shared.Token
	}
	return ok, err
}

// sharedCall mints a token for all readers of a role that wait, and reports that. It touches neither storage nor system
// view, and contains its own panics.
func (b *backend) sharedCall(source report.Source, started time.Time, a attempt) (token *outcome.Token, err error) {
	defer func() {
		if value := recover(); value != nil {
			token, err = nil, b.panicked(source, value)
		}
		if a.token = token; !errors.Is(err, outcome.ErrChanged) {
			err = b.ended(source, started, a, err)
		}
	}()
	return b.mintOne(b.ctx, &a, started, func() error { return nil })
}

// settings returns the configuration and the role, or a refusal if either is missing.
func (b *backend) settings(ctx context.Context, r *request) (state.Settings, error) {
	set, err := b.state.Settings(ctx, r.Storage, r.role, r.received)
	if err == nil && set.Role == nil {
		b.report.RoleGone(r.role) // it may have been deleted on another node
	}
	if err == nil {
		err = checkSettings(r.role, set)
	}
	return set, err
}

// checkSettings refuses a token request if an entry is missing or disabled. A disabled role, or mount, mints no token.
func checkSettings(role string, set state.Settings) error {
	switch {
	case set.Role == nil:
		return noSuchRole(role)
	case set.Config == nil:
		return outcome.Refuse("the mount is not configured: write refresh_key to config")
	case set.Config.Disabled:
		return outcome.Refuse("the mount is disabled: write disabled=false to config to mint again")
	case set.Role.Disabled:
		return outcome.Refuse("role %q is disabled: write disabled=false to roles/%[1]s to mint again", role)
	}
	return nil
}

// narrow narrows the role by the caller's parameters and decides the request to Cable, with a warning for each bound
// that changed it.
func (b *backend) narrow(
	ctx context.Context, r *request, set state.Settings, p params,
) (requested cable.TokenRequest, warnings []string, err error) {
	requested = cable.TokenRequest{OrganizationID: organization(set), Scopes: set.Role.Scopes}
	if requested.OrganizationID == "" {
		return requested, nil, outcome.Refuse("no organization: write organization_id to roles/%s or to config", r.role)
	}
	if len(requested.Scopes) == 0 {
		return requested, nil, outcome.Refuse("role %q names no scopes: write scopes to roles/%[1]s", r.role)
	}
	if p.scopes != nil {
		if outside := fields.Without(p.scopes, set.Role.Scopes); len(outside) > 0 {
			return requested, nil, outcome.Refuse("scopes outside role %q: %s; it allows %s",
				r.role, fields.Scope.QuoteAll(outside), fields.Scope.QuoteAll(set.Role.Scopes))
		}
		requested.Scopes = p.scopes
	}
	bounds := lifetime.Bounds{HasRequest: p.hasTTL, Request: p.ttl, Role: set.Role.TTL, RoleMax: set.Role.MaxTTL}
	// Each of the mount's lease settings is read from Vault, and only if it matters.
	ctx, cancel := state.WithBudget(ctx, r.received, set.Config.RequestTimeout)
	defer cancel()
	bounds.MountMax, err = b.maxLeaseTTL.Get(ctx)
	if err == nil && !p.hasTTL && bounds.Role == 0 {
		bounds.MountDefault, err = b.defaultLeaseTTL.Get(ctx)
	}
	if err != nil {
		return requested, nil, err
	}
	requested.Lifetime, warnings, err = bounds.Decide()
	return requested, warnings, err
}

// organization is the role's, or else the configuration's.
func organization(set state.Settings) string {
	return cmp.Or(set.Role.OrganizationID, set.Config.OrganizationID)
}

// allow returns the gate of an API call. Once a write that disables, deletes or narrows has returned, no API call is
// sent with the settings from before.
func (b *backend) allow(set state.Settings) func() error {
	return func() error {
		if !b.state.IsCurrent(set) {
			return outcome.ErrChanged
		}
		return nil
	}
}

// call requests a token from Cable. Its failure has advice for the caller.
func (b *backend) call(
	ctx context.Context, role string, config *state.Live, requested cable.TokenRequest,
) (*cable.Token, error) {
	defer b.report.CallBegan()()
	token, err := b.requestToken(ctx, config.Client, requested)
	var ce *cable.Error
	if !errors.As(err, &ce) {
		return token, err // nil, or returned by allow
	}
	f := outcome.Classify(err)
	scheme, other := config.AuthScheme, state.AuthSchemeBearer
	if scheme == other {
		other = state.AuthSchemeRaw
	}
	switch {
	case f.Outcome == outcome.KeyRejected:
		f.Message += fmt.Sprintf("; the refresh key was sent with auth_scheme=%s%s: write a valid refresh_key to "+
			"config, or try auth_scheme=%s, because Cable's documents show both", scheme, sentTo(config.Config), other)
	case f.Outcome == outcome.RateLimited:
		f.Message += fmt.Sprintf("; no API call for another %ds", outcome.WholeSeconds(ce.RetryAfter))
	case ce.StatusCode == http.StatusForbidden:
		f.Message += fmt.Sprintf("; check the organization and the scopes of roles/%s with Cable, or try auth_scheme="+
			"%s instead of %s, because some gateways respond 403 to a key in another form", role, other, scheme)
	case ce.StatusCode == http.StatusBadRequest:
		f.Message += fmt.Sprintf("; check the organization and the scopes of roles/%s with Cable", role)
	case ce.StatusCode == http.StatusNotFound:
		f.Message += "; check token_url in config"
	}
	if ce.MaybeIssued {
		f.Undelivered(time.Now().Add(requested.Lifetime).Unix())
	}
	return nil, f
}

// checkGrant compares a response with its request. A token for another organization, or with a scope that was not
// requested, is a mismatch, and so a 502. A response without scopes takes the requested ones, because Cable's schema
// does not require them in the response.
func checkGrant(requested cable.TokenRequest, got *cable.Token) (*outcome.Token, error) {
	want := requested.OrganizationID
	isFor, id := "token is", got.OrganizationID
	if id == want {
		isFor, id = "token's scopes are", cmp.Or(got.ScopesOrganizationID, want)
	}
	if id != want { // another organization
		return nil, outcome.Mismatch(fmt.Sprintf("the %s for organization %s instead of %s",
			isFor, fields.Organization.Quote(id), fields.Organization.Quote(want)))
	}
	token := &outcome.Token{Token: got, Granted: requested.Scopes}
	if got.Scopes == nil {
		return token, nil
	}
	token.Granted = append([]string{}, got.Scopes...) // not nil, because an empty list is a response, too
	slices.Sort(token.Granted)
	token.Granted = slices.Compact(token.Granted)
	if extra := fields.Without(token.Granted, requested.Scopes); len(extra) > 0 {
		return nil, outcome.Mismatch("the token has scopes that were not requested: " + fields.Scope.QuoteAll(extra))
	}
	if missing := fields.Without(requested.Scopes, token.Granted); len(missing) > 0 {
		token.Warnings = append(token.Warnings,
			"Cable granted fewer scopes than requested; missing: "+fields.Scope.QuoteAll(missing))
	}
	return token, nil
}

// recheck refuses a token that the present settings do not allow, such as a disabled role's, or if they cannot be
// read. If they have changed, it reads them until they are still current at the end of the reading. So no token is
// returned whose last check did not begin after a write that disables, deletes or narrows had returned.
//
// Reading storage may exceed the request's budget by recheckTimeout, because giving up now would waste a token.
func (b *backend) recheck(ctx context.Context, r *request, a *attempt) error {
	if b.state.IsCertain(a.set) {
		return context.Cause(ctx) // set if the caller left, because Vault would drop the token
	}
	ctx, cancel := context.WithTimeoutCause(ctx, recheckTimeout, outcome.ErrBudget)
	defer cancel()
	for began := time.Now(); ; {
		now, err := b.state.Settings(ctx, r.Storage, a.role, began)
		if err == nil {
			err = checkSettings(a.role, now)
		}
		if err == nil && (!now.Config.SameDestination(a.set.Config.Config) ||
			organization(now) != a.requested.OrganizationID || now.Role.MaxLifetime() < a.requested.Lifetime ||
			len(fields.Without(a.requested.Scopes, now.Role.Scopes)) > 0) {
			err = outcome.Refuse("role %q or the configuration was changed while Cable was called, "+
				"and does not allow this token any more: read again", a.role)
		}
		if err == nil && ctx.Err() != nil {
			err = context.Cause(ctx) // the caller left, or the second is over
		}
		if err != nil || b.state.IsCurrent(now) {
			return err
		}
	}
}

// decideLease gives a token its lease, and warns of a longer lifetime than requested.
func decideLease(token *outcome.Token, requested time.Duration) (err error) {
	token.Lease, token.Lifetime, err = lifetime.Lease(token.Token, requested, time.Now())
	if err != nil {
		return &cable.Error{Kind: cable.InvalidResponse, Detail: err.Error()}
	}
	if token.IsLonger = lifetime.IsLonger(token.Lifetime, requested); token.IsLonger {
		token.Warnings = append(token.Warnings, fmt.Sprintf(
			"Cable granted %s instead of the requested %s: the lease ends first, the token is valid until %s",
			lifetime.Format(token.Lifetime), lifetime.Format(requested), token.ExpiresAt()))
	}
	return nil
}

// sentTo names the host that the refresh key is sent to, if it is not Cable's.
func sentTo(config *state.Config) string {
	u, err := cable.ParseTokenURL(config.TokenURL)
	if config.TokenURL == cable.DefaultTokenURL || err != nil {
		return ""
	}
	return " to " + cable.HostForDisplay(u)
}
