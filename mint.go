// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
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
	organization string // "" if the caller named none
	hasTTL       bool
	ttl          time.Duration
	scopes       []string // nil if the caller named none
}

// areNone reports whether the caller named no parameters. Only such reads share.
func (p params) areNone() bool { return p.organization == "" && !p.hasTTL && p.scopes == nil }

// attempt is one pass through the steps. Its fields are set as far as it got.
type attempt struct {
	kind      report.Kind
	role      string
	params    params
	set       state.Settings
	requested cable.TokenRequest
	bounds    lifetime.Bounds
	warnings  []string // of the bounds
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
	a = attempt{kind: report.Direct, role: r.role, params: p}
	if a.set, err = b.settings(ctx, r); err != nil {
		return a, err
	}
	if err = b.narrow(ctx, r, &a); err != nil {
		return a, err
	}
	isShared := false
	if a.mayShare() {
		isShared, err = b.share(ctx, r, &a)
	}
	if !isShared {
		a.token, err = b.mintOne(ctx, &a, r.received, func() error { return b.recheck(ctx, r, &a) })
	}
	if a.token != nil {
		a.token.Warnings = append(a.warnings, a.token.Warnings...)
	}
	return a, err
}

// mayShare reports whether the request may get the token that the role's readers share.
func (a *attempt) mayShare() bool { return a.set.Role.ReuseFor > 0 && a.params.areNone() }

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
		err = decideLease(token, a.requested.Lifetime, a.set.Role)
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
func (b *backend) narrow(ctx context.Context, r *request, a *attempt) (err error) {
	role, p := a.set.Role, a.params
	if a.requested.OrganizationID, err = organization(a.role, a.set, p); err != nil {
		return err
	}
	if len(role.Scopes) == 0 {
		return outcome.Refuse("role %q names no scopes: write scopes to roles/%[1]s", a.role)
	}
	if outside := fields.Without(p.scopes, role.Scopes); len(outside) > 0 {
		return outcome.Refuse("scopes outside role %q: %s; it allows %s",
			a.role, fields.Scope.QuoteAll(outside), fields.Scope.QuoteAll(role.Scopes))
	}
	if a.requested.Scopes = p.scopes; p.scopes == nil {
		a.requested.Scopes = role.Scopes
	}
	a.bounds = lifetime.Bounds{HasRequest: p.hasTTL, Request: p.ttl, Role: role.TTL, RoleMax: role.MaxTTL}
	// Each of the mount's lease settings is read from Vault, and only if it matters.
	ctx, cancel := state.WithBudget(ctx, r.received, a.set.Config.RequestTimeout)
	defer cancel()
	a.bounds.MountMax, err = b.maxLeaseTTL.Get(ctx)
	if err == nil && !p.hasTTL && role.TTL == 0 {
		a.bounds.MountDefault, err = b.defaultLeaseTTL.Get(ctx)
	}
	if err != nil {
		return err
	}
	a.requested.Lifetime, a.warnings, err = a.bounds.Decide()
	return err
}

// ownOrganization is the organization of a request that names none, the role's or else the configuration's, or "".
func ownOrganization(set state.Settings) string {
	return cmp.Or(set.Role.OrganizationID, set.Config.OrganizationID)
}

// organization returns the organization of a token request. The caller may name the role's own, or one of its list. A
// refusal does not say which these are.
func organization(role string, set state.Settings, p params) (string, error) {
	own, named := ownOrganization(set), p.organization
	allowed := set.Role.OrganizationIDs
	if own != "" && !slices.Contains(allowed, own) {
		allowed = append(slices.Clip(allowed), own)
	}
	switch {
	case len(allowed) == 0:
		return "", outcome.Refuse("no organization: write organization_id to roles/%s or to config", role)
	case named == "" && own == "":
		return "", outcome.Refuse("role %q needs organization_id in the request: it allows %d", role, len(allowed))
	case named != "" && !slices.Contains(allowed, named):
		return "", outcome.Refuse("organization_id %s is not one of the %d that role %q allows",
			fields.Organization.Quote(named), len(allowed), role)
	}
	return cmp.Or(named, own), nil
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
	sum := sha256.Sum256([]byte(got.Value.Reveal()))
	token := &outcome.Token{Token: got, SHA256: hex.EncodeToString(sum[:]), Granted: requested.Scopes}
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
		if err == nil && !a.isAllowedBy(now) {
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

// isAllowedBy reports whether the present settings allow the token that was requested.
func (a *attempt) isAllowedBy(now state.Settings) bool {
	id, err := organization(a.role, now, a.params)
	return err == nil && id == a.requested.OrganizationID &&
		now.Config.SameDestination(a.set.Config.Config) &&
		now.Role.MaxLifetime() >= a.requested.Lifetime &&
		len(fields.Without(a.requested.Scopes, now.Role.Scopes)) == 0
}

// decideLease gives a token its lease, and warns of a longer lifetime than requested. If the role has no leases, the
// lease is the one that the reader would have had.
func decideLease(token *outcome.Token, requested time.Duration, role *state.Role) (err error) {
	token.NoLease = role.NoLease
	token.Lease, token.Lifetime, err = lifetime.Lease(token.Token, requested, time.Now())
	if err == nil && token.Lease < lifetime.LeastLease(role.NoLease) {
		err = fmt.Errorf("the %s that are left of its lifetime are too short for a ttl", lifetime.Format(token.Lease))
	}
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
