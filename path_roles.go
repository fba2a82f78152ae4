// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/fields"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/lifetime"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/state"
)

func (b *backend) pathRolesList() *framework.Path {
	return &framework.Path{
		Pattern:      "roles/?$",
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "roles"},
		Fields: map[string]*framework.FieldSchema{
			"after": inQuery(field(framework.TypeString, "List only names that sort after this one.")),
			"limit": inQuery(field(framework.TypeInt, "List at most this many names.")),
		},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ListOperation: b.reads(b.pathRolesListNames, "List the names of the roles, in order.", "The names",
				map[string]*framework.FieldSchema{"keys": field(framework.TypeStringSlice, "The names.")}),
		},
		HelpSynopsis:    "List the roles.",
		HelpDescription: rolesListHelp,
	}
}

func (b *backend) pathRoles() *framework.Path {
	schema := roleResponseFields()
	for _, name := range []string{"ttl", "max_ttl", "reuse_for"} {
		schema[name].Type = framework.TypeDurationSecond
	}
	schema["name"] = always(field(framework.TypeString, "The role's name."))
	return &framework.Path{
		Pattern:        "roles/" + framework.GenericNameRegex("name"),
		DisplayAttrs:   &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "role"},
		Fields:         schema,
		ExistenceCheck: b.pathRolesExists,
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation:   b.reads(b.pathRolesRead, "Read a role.", "The role", roleResponseFields()),
			logical.CreateOperation: b.writes(b.pathRolesWrite, "Create a role."),
			logical.UpdateOperation: b.writes(b.pathRolesWrite, "Change some fields of a role."),
			logical.PatchOperation: b.writes(b.pathRolesWrite,
				"Change some fields of an existing role; null removes organization_id or organization_ids."),
			logical.DeleteOperation: b.deletes(b.pathRolesDelete, "Delete a role."),
		},
		HelpSynopsis:    "Define which tokens a role may mint.",
		HelpDescription: rolesHelp,
	}
}

// roleResponseFields describes a role as it is read, without defaults.
func roleResponseFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"organization_id": field(framework.TypeString,
			"The organization that tokens are for; config's if not set."),
		"organization_ids": field(framework.TypeCommaStringSlice, "Organizations that a token request may name, "+
			"separated by commas or as a JSON array: at most 64."),
		"scopes": field(framework.TypeCommaStringSlice, "The scopes of tokens, of the form resource:action, separated "+
			"by commas or as a JSON array. Required in the first write."),
		"ttl": field(framework.TypeInt,
			"The lifetime of a token in seconds, if the request names none: 300s to 86400s; 0 for the default: the "+
				"mount's default_lease_ttl or one hour, whichever is less."),
		"max_ttl": field(framework.TypeInt, "The longest lifetime of a token in seconds: 300s to 86400s; 0 for 24 "+
			"hours. The mount's max_lease_ttl caps it."),
		"reuse_for": field(framework.TypeInt, "For how long, in seconds, reads without parameters share a token: at "+
			"most half of ttl, which must be set; 0 (the default): each read mints."),
		"lease": field(framework.TypeBool, "Whether tokens have a lease (the default). Without one, the response says "+
			"in ttl when to read again."),
		"disabled": field(framework.TypeBool, "Disable the role: every token request for it is refused."),
	}
}

// roleResponseData returns the role as it was written.
func roleResponseData(role *state.Role) map[string]any {
	return map[string]any{
		"organization_id":  role.OrganizationID,
		"organization_ids": append([]string{}, role.OrganizationIDs...), // not null
		"scopes":           role.Scopes,
		"ttl":              int64(role.TTL / time.Second),
		"max_ttl":          int64(role.MaxTTL / time.Second),
		"reuse_for":        int64(role.ReuseFor / time.Second),
		"lease":            !role.NoLease,
		"disabled":         role.Disabled,
	}
}

// pathRolesExists tells create from update, for policies. It does not decode the entry, because an error here would
// deny the write without a reason.
func (b *backend) pathRolesExists(ctx context.Context, req *logical.Request, d *framework.FieldData) (bool, error) {
	name := d.Get("name").(string)
	if fields.CheckRoleName(name) != nil {
		return false, nil // the write will say so
	}
	stored, err := state.Read(ctx, req.Storage, state.RoleKey(name))
	return stored != nil, err
}

// pathRolesRead handles GET roles/<name>.
func (b *backend) pathRolesRead(ctx context.Context, r *request) (*logical.Response, error) {
	if err := fields.CheckRoleName(r.role); err != nil {
		return nil, err
	}
	role, err := state.ReadRole(ctx, r.Storage, r.role)
	if role == nil || err != nil {
		return nil, err // Vault turns nil into a 404
	}
	return &logical.Response{Data: roleResponseData(role)}, nil
}

// pathRolesWrite handles POST and PATCH roles/<name>.
func (b *backend) pathRolesWrite(ctx context.Context, r *request) (*logical.Response, error) {
	if err := fields.CheckRoleName(r.role); err != nil {
		return nil, err
	}
	entry, err := b.state.Lock(ctx, r.Storage, state.RoleKey(r.role))
	if err != nil {
		return nil, err
	}
	defer entry.Unlock()
	stored, err := entry.Read(ctx)
	if err != nil {
		return nil, err
	}
	// NOTE: Vault read whether the role exists before the lock was held, and chose the create or the update capability
	// by the answer, which may be outdated. A policy with create alone can never change a role.
	switch op := r.Operation; {
	case stored == nil && op == logical.PatchOperation:
		return nil, noSuchRole(r.role)
	case stored == nil && op == logical.UpdateOperation, stored != nil && op == logical.CreateOperation:
		return nil, outcome.Refuse("role %s was changed meanwhile by another request, so nothing was stored: "+
			"write again", fields.RoleName.Quote(r.role))
	}
	before, next, err := mergeRole(stored, r)
	if err != nil {
		return nil, err
	}
	raw, err := next.Encode()
	if err != nil {
		return nil, fmt.Errorf("encoding the role: %w", err)
	}
	if err := entry.Write(ctx, raw, before.NarrowedBy(next)); err != nil {
		b.report.WriteFailed(r.source(), err, "")
		return nil, err
	}
	b.report.RoleWritten(r.source(), r.role, next)
	resp := new(logical.Response)
	if r.in.Has("scopes") {
		resp.Warnings = scopeWarnings(next.Scopes)
	}
	if before != nil && before.OrganizationID != "" && next.OrganizationID == "" {
		resp.AddWarning(fallbackOrganization(ctx, r.Storage, next))
	}
	if r.in["disabled"] == true {
		resp.AddWarning("the role is disabled: no token is minted for it until disabled=false is written; " +
			roleTokensValidUntil(next))
	}
	return orNoContent(resp), nil
}

// mergeRole decodes the stored role, nil if there is none, and lays a write over it. Like mergeConfig, it judges only
// the fields that the write changes.
func mergeRole(stored []byte, r *request) (before, next *state.Role, err error) {
	if before, err = state.DecodeRole(r.role, stored); err != nil {
		return nil, nil, err
	}
	next = new(state.Role)
	if before != nil {
		*next = *before
	}
	changes, err := r.in.Changes(roleResponseData(next), func(name string, value any) bool {
		// A patch with null removes organization_id or organization_ids.
		return (name == "organization_id" || name == "organization_ids") &&
			r.Operation == logical.PatchOperation && value == nil
	})
	if err != nil {
		return nil, nil, err
	}
	if v, ok := changes.Text("organization_id"); ok {
		if err := fields.CheckOrganization(v); err != nil {
			return nil, nil, err
		}
		next.OrganizationID = v // null removes organization_id
	}
	if changes.Has("organization_ids") {
		list, _ := changes["organization_ids"].([]string) // null removes all
		if next.OrganizationIDs, err = fields.ParseOrganizations(list); err != nil {
			return nil, nil, err
		}
	}
	if v, ok := changes["scopes"].([]string); ok {
		if next.Scopes, err = fields.ParseScopes(v); err != nil {
			return nil, nil, err
		}
	} else if before == nil {
		return nil, nil, outcome.Refuse(`scopes is missing: name at least one, such as "transactions:read"`)
	}
	if v, ok := changes["lease"].(bool); ok {
		next.NoLease = !v
	}
	if v, ok := changes["disabled"].(bool); ok {
		next.Disabled = v
	}
	if err := changeLifetimes(next, changes); err != nil {
		return nil, nil, err
	}
	if before != nil && next.MaxLifetime() < before.MaxLifetime() {
		next.EarlierUntil = max(before.EarlierUntil, time.Now().Add(before.MaxLifetime()).Unix())
	}
	return before, next, nil
}

// changeLifetimes lays the changes of lifetimes over a role, and judges them.
func changeLifetimes(role *state.Role, changes fields.Input) error {
	for _, bound := range []struct {
		name  string
		value *time.Duration
	}{{"ttl", &role.TTL}, {"max_ttl", &role.MaxTTL}} {
		v, ok := changes.Duration(bound.name)
		if !ok {
			continue
		}
		if v != 0 && (v < lifetime.Min || v > lifetime.Max) {
			return outcome.Refuse("%s is %s: Cable's tokens are valid for %s to %s; write one of those, or 0 for the "+
				"default", bound.name, lifetime.Format(v), lifetime.Format(lifetime.Min), lifetime.Format(lifetime.Max))
		}
		*bound.value = v
	}
	if (changes.Has("ttl") || changes.Has("max_ttl")) && role.TTL > role.MaxLifetime() {
		return outcome.Refuse("ttl of %s is above max_ttl of %s: lower ttl or raise max_ttl",
			lifetime.Format(role.TTL), lifetime.Format(role.MaxLifetime()))
	}
	if v, ok := changes.Duration("reuse_for"); ok {
		role.ReuseFor = v
	}
	if (changes.Has("reuse_for") || changes.Has("ttl")) && role.ReuseFor > role.TTL/2 {
		ttl := "is " + lifetime.Format(role.TTL)
		if role.TTL == 0 {
			ttl = "is not set"
		}
		return outcome.Refuse("reuse_for of %s needs a ttl of at least twice that, and ttl %s: lower reuse_for or set "+
			"ttl", lifetime.Format(role.ReuseFor), ttl)
	}
	return nil
}

// scopesOfReference are the scopes that Cable's reference names. The API has more resources, so another scope may be
// valid.
func scopesOfReference() []string {
	return []string{
		"customer_sar:read", "customer_sar:write", "person:read", "person:write",
		"transactions:delete", "transactions:read", "transactions:write",
	}
}

// scopeWarnings describes the scopes that look mistyped. They are stored all the same, because Cable's list is not
// closed.
func scopeWarnings(scopes []string) []string {
	var shape, unknown, warnings []string
	for _, s := range scopes {
		resource, action, ok := strings.Cut(s, ":")
		if !ok || resource == "" || action == "" || strings.Contains(action, ":") {
			shape = append(shape, s)
		} else if !slices.Contains(scopesOfReference(), s) {
			unknown = append(unknown, s)
		}
	}
	if len(shape) > 0 {
		warnings = append(warnings,
			"scopes that are not of the form resource:action were stored: "+fields.Scope.QuoteAll(shape))
	}
	if len(unknown) > 0 {
		warnings = append(warnings, "scopes that Cable's reference does not name were stored, and Cable may reject "+
			"them: "+fields.Scope.QuoteAll(unknown))
	}
	return warnings
}

// fallbackOrganization names the organization that a role uses once its own is removed.
func fallbackOrganization(ctx context.Context, s logical.Storage, role *state.Role) string {
	c, err := state.ReadConfig(ctx, s)
	switch {
	case err != nil:
		return "organization_id is removed: token requests use config's, which could not be read"
	case (c == nil || c.OrganizationID == "") && len(role.OrganizationIDs) > 0:
		return "organization_id is removed, and config has none: token requests must name one of organization_ids"
	case c == nil || c.OrganizationID == "":
		return "organization_id is removed, and config has none: token requests are refused until the role or config " +
			"names one"
	default:
		return "organization_id is removed: token requests use config's, " + fields.Organization.Quote(c.OrganizationID)
	}
}

// roleTokensValidUntil says until when the role's existing tokens may be valid.
func roleTokensValidUntil(role *state.Role) string {
	now := time.Now()
	return tokensValidUntil(now, max(role.MaxLifetime(), time.Unix(role.EarlierUntil, 0).Sub(now)))
}

// noSuchRole is the refusal for a role that does not exist.
func noSuchRole(name string) error {
	path := "roles/"
	if fields.RoleName.Redact(name) == name {
		path += name
	}
	return outcome.Refuse("role %s does not exist: write it to %s", fields.RoleName.Quote(name), path)
}

// pathRolesDelete handles DELETE roles/<name>.
func (b *backend) pathRolesDelete(ctx context.Context, r *request) (*logical.Response, error) {
	if err := fields.CheckRoleName(r.role); err != nil {
		return nil, err
	}
	entry, err := b.state.Lock(ctx, r.Storage, state.RoleKey(r.role))
	if err != nil {
		return nil, err
	}
	defer entry.Unlock()
	stored, err := entry.Read(ctx)
	if err != nil || stored == nil && entry.IsCertain() {
		return nil, err
	}
	role, err := state.DecodeRole(r.role, stored)
	if role == nil || err != nil {
		role = new(state.Role) // a role that cannot be read can be deleted
	}
	if err := entry.Write(ctx, nil, stored != nil); err != nil {
		b.report.WriteFailed(r.source(), err, "")
		return nil, err
	}
	b.report.RoleDeleted(r.source(), r.role)
	return &logical.Response{Warnings: []string{fmt.Sprintf(
		"role %q is deleted: no token is minted for it any more; %s", r.role, roleTokensValidUntil(role))}}, nil
}

// pathRolesListNames handles LIST roles.
func (b *backend) pathRolesListNames(ctx context.Context, r *request) (*logical.Response, error) {
	if value, ok := r.in["limit"]; ok {
		if err := (fields.Input{"limit": value}).RefuseBlanks(); err != nil {
			return nil, err
		}
	}
	names, err := state.RoleNames(ctx, r.Storage)
	if err != nil {
		return nil, err
	}
	if after, _ := r.in.Text("after"); after != "" {
		i, found := slices.BinarySearch(names, after)
		if found {
			i++
		}
		names = names[i:]
	}
	if limit, ok := r.in["limit"].(int); ok {
		if limit < 1 {
			return nil, outcome.Refuse("limit is %d: write 1 or more, or leave it out for all", limit)
		}
		names = names[:min(limit, len(names))]
	}
	return logical.ListResponse(names), nil
}

const rolesListHelp = `The names are sorted. "after" returns names that sort after the given one;
"limit" caps the count.`

const rolesHelp = `A role names an organization, the scopes of its tokens, and their lifetimes. A
read of creds/<name> returns a token for it, so permission to read that path is
permission to have the role's tokens.

A write keeps the fields that it does not name, and what a read returns can be
written back. ttl=0 or max_ttl=0 restores the default. A patch with null removes
organization_id or organization_ids. disabled=true disables the role.

With organization_ids, a token request may name the organization, namely one of
these or the role's own. A policy can bind a caller to one of them.

With lease=false, tokens have no lease. A lease ends no token; it only says when
to return, and ttl in the response then says that.

By default, each read mints. With reuse_for, reads without parameters share a
token for that long, so that a fleet does not use up Cable's rate limit; ttl must
be at least twice reuse_for. While Cable is down, such reads return the previous
token with a warning. Every write of the role or of config, even one that changes
nothing, drops the shared token.

Deleting or disabling a role stops minting. Tokens that were minted before stay
valid until their expiry: Cable cannot revoke them.`
