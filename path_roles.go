// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// toResponseData returns the role as it was written.
func (r *roleEntry) toResponseData() map[string]any {
	return map[string]any{
		"organization_id": r.OrganizationID,
		"scopes":          r.Scopes,
		"ttl":             r.TTL,
		"max_ttl":         r.MaxTTL,
		"reuse_for":       r.ReuseFor,
		"disabled":        r.Disabled,
	}
}

// validUntil says until when tokens of the role may be valid that exist by now.
func (r *roleEntry) validUntil(now time.Time) string {
	return tokensValidUntil(now, max(r.maxLifetime(), r.EarlierUntil-now.Unix()))
}

// merge returns the role with a write laid over it, or a refusal. The role
// itself stays as it is; a nil role is one that was never written. Only what
// changes is judged: the rest may come from another version of the engine.
func (r *roleEntry) merge(in input, isPatch bool, now time.Time) (*roleEntry, error) {
	next := new(roleEntry)
	if r != nil {
		*next = *r
	}
	changes, err := in.changed(next.toResponseData(), func(name string, value any) bool {
		return name == "organization_id" && isPatch && value == nil
	})
	if err != nil {
		return nil, err
	}
	if v, ok := changes.text("organization_id"); ok {
		if err := checkWord(v, maxOrganizationID); err != nil {
			return nil, refusal("organization_id " + err.Error())
		}
		next.OrganizationID = v
	}
	if v, ok := changes["scopes"].([]string); ok {
		if next.Scopes, err = parseScopes(v); err != nil {
			return nil, err
		}
	} else if r == nil {
		return nil, refusal(`scopes is missing: name at least one, such as "transactions:read"`)
	}
	for _, field := range []struct {
		name string
		ttl  *int64
	}{{"ttl", &next.TTL}, {"max_ttl", &next.MaxTTL}} {
		if v, ok := changes[field.name].(int); ok {
			*field.ttl = int64(v)
			if v != 0 && (*field.ttl < minLifetime || *field.ttl > maxLifetime) {
				return nil, refusal(fmt.Sprintf("%s is %s: Cable's tokens are valid for %ds to %ds; write one of those, or 0 for the default", field.name, showSeconds(*field.ttl), minLifetime, maxLifetime))
			}
		}
	}
	if (changes.has("ttl") || changes.has("max_ttl")) && next.TTL > next.maxLifetime() {
		return nil, refusal(fmt.Sprintf("ttl of %ds is above max_ttl of %ds: lower ttl or raise max_ttl", next.TTL, next.maxLifetime()))
	}
	if v, ok := changes["reuse_for"].(int); ok {
		next.ReuseFor = int64(v)
	}
	if (changes.has("reuse_for") || changes.has("ttl")) && next.ReuseFor > next.TTL/2 {
		return nil, refusal(fmt.Sprintf("reuse_for of %s needs a ttl of at least twice that, and ttl is %ds (0: not set): lower reuse_for or set ttl", showSeconds(next.ReuseFor), next.TTL))
	}
	if v, ok := changes["disabled"].(bool); ok {
		next.Disabled = v
	}
	if r != nil && next.maxLifetime() < r.maxLifetime() {
		next.EarlierUntil = max(r.EarlierUntil, now.Unix()+r.maxLifetime())
	}
	return next, nil
}

// scopesOfReference are the scopes that Cable's reference names. The API has
// more resources, so another scope may be valid.
func scopesOfReference() []string {
	return []string{
		"customer_sar:read", "customer_sar:write", "person:read", "person:write",
		"transactions:delete", "transactions:read", "transactions:write",
	}
}

// scopeWarnings describes the scopes that look mistyped. They are stored all the
// same: Cable's list is not closed.
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
		warnings = append(warnings, "scopes that are not of the form resource:action were stored: "+showScopes(shape))
	}
	if len(unknown) > 0 {
		warnings = append(warnings, "scopes that Cable's reference does not name were stored, and Cable may reject them: "+showScopes(unknown))
	}
	return warnings
}

func (b *backend) pathRolesList() *framework.Path {
	return &framework.Path{
		Pattern:      "roles/?$",
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "roles"},
		Fields: map[string]*framework.FieldSchema{
			"after": {
				Type:        framework.TypeString,
				Description: "List only names that sort after this one.",
				Query:       true,
			},
			"limit": {
				Type:        framework.TypeInt,
				Description: "List at most this many names.",
				Query:       true,
			},
		},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ListOperation: &framework.PathOperation{
				Callback: b.pathRolesListNames,
				Summary:  "List the names of the roles, in order.",
				Responses: map[int][]framework.Response{
					http.StatusOK: {{Description: "The names", Fields: map[string]*framework.FieldSchema{
						"keys": {Type: framework.TypeStringSlice, Description: "The names."},
					}}},
				},
			},
		},
		HelpSynopsis:    "List the roles.",
		HelpDescription: strings.TrimSpace(rolesListHelp),
	}
}

func (b *backend) pathRoles() *framework.Path {
	write := func(summary string) *framework.PathOperation {
		return forwarded(&framework.PathOperation{
			Callback: b.pathRolesWrite,
			Summary:  summary,
			Responses: map[int][]framework.Response{
				http.StatusOK:        {{Description: "Stored, with warnings"}},
				http.StatusNoContent: {{Description: "Stored"}},
			},
		})
	}
	fields := roleResponseFields()
	for _, name := range []string{"ttl", "max_ttl", "reuse_for"} {
		fields[name].Type = framework.TypeDurationSecond
	}
	fields["name"] = &framework.FieldSchema{
		Type:        framework.TypeString,
		Description: "The role's name.",
		Required:    true,
	}
	return &framework.Path{
		Pattern:        "roles/" + framework.GenericNameRegex("name"),
		DisplayAttrs:   &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "role"},
		Fields:         fields,
		ExistenceCheck: b.pathRolesExists,
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: &framework.PathOperation{
				Callback: b.pathRolesRead,
				Summary:  "Read a role.",
				Responses: map[int][]framework.Response{
					http.StatusOK: {{Description: "The role", Fields: roleResponseFields()}},
				},
			},
			logical.CreateOperation: write("Create a role."),
			logical.UpdateOperation: write("Change some fields of a role."),
			logical.PatchOperation:  write("Change some fields of an existing role; null removes organization_id."),
			logical.DeleteOperation: forwarded(&framework.PathOperation{
				Callback: b.pathRolesDelete,
				Summary:  "Delete a role.",
				Responses: map[int][]framework.Response{
					http.StatusOK:        {{Description: "Deleted, with a warning"}},
					http.StatusNoContent: {{Description: "There was none"}},
				},
			}),
		},
		HelpSynopsis:    "Define which tokens a role may mint.",
		HelpDescription: strings.TrimSpace(rolesHelp),
	}
}

// roleResponseFields describes a role as it is read, without defaults.
func roleResponseFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"organization_id": {
			Type:        framework.TypeString,
			Description: "The organization that tokens are for; config's if not set.",
		},
		"scopes": {
			Type:        framework.TypeCommaStringSlice,
			Description: "The scopes of tokens, of the form resource:action, separated by commas or as a JSON array. Required at first.",
		},
		"ttl": {
			Type:        framework.TypeInt,
			Description: "The lifetime of a token in seconds, if the request names none: 300s to 86400s; 0 for the default: the mount's default_lease_ttl or one hour, whichever is less.",
		},
		"max_ttl": {
			Type:        framework.TypeInt,
			Description: "The longest lifetime of a token in seconds: 300s to 86400s; 0 for 24 hours. The mount's max_lease_ttl caps it.",
		},
		"reuse_for": {
			Type:        framework.TypeInt,
			Description: "For how long, in seconds, reads without parameters share a token: at most half of ttl, which must be set; 0 (the default): each read mints.",
		},
		"disabled": {
			Type:        framework.TypeBool,
			Description: "Disable the role: every token request for it is refused.",
		},
	}
}

// pathRolesExists tells create from update, for policies. It does not decode
// the entry: an error here would deny the write without a reason.
func (b *backend) pathRolesExists(ctx context.Context, req *logical.Request, d *framework.FieldData) (bool, error) {
	if checkRoleName(d.Get("name").(string)) != nil {
		return false, nil // the write will say so
	}
	entry, err := getEntry(ctx, req.Storage, rolesStoragePrefix+d.Get("name").(string))
	return entry != nil, err
}

// pathRolesRead handles GET roles/<name>.
func (b *backend) pathRolesRead(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	if err := checkRoleName(name); err != nil {
		return classify(err).respond()
	}
	role, err := getRole(ctx, req.Storage, name)
	if role == nil || err != nil {
		return nil, err // Vault answers nil with 404
	}
	return &logical.Response{Data: role.toResponseData()}, nil
}

// pathRolesWrite handles POST and PATCH roles/<name>.
func (b *backend) pathRolesWrite(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	resp, err := b.writeRole(ctx, req, d.Get("name").(string), d.Raw)
	if err != nil {
		return classify(err).respond()
	}
	return resp, nil
}

// writeRole is pathRolesWrite before its errors are given a status.
func (b *backend) writeRole(ctx context.Context, req *logical.Request, name string, in input) (*logical.Response, error) {
	if err := checkRoleName(name); err != nil {
		return nil, err
	}
	unlock, err := b.cache.writes.lock(ctx, rolesStoragePrefix+name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	role, err := getRole(ctx, req.Storage, name)
	if err != nil {
		return nil, err
	}
	// NOTE: Vault asked whether the role exists before the lock was held, and
	// checked the caller's policy for the one or the other.
	switch {
	case role == nil && req.Operation == logical.PatchOperation:
		return nil, noSuchRole(name)
	case role == nil && req.Operation == logical.UpdateOperation, role != nil && req.Operation == logical.CreateOperation:
		return nil, refusal(fmt.Sprintf("role %s was changed meanwhile by another request, and nothing was stored by this one: write again", show(nameShape, name)))
	}
	next, err := role.merge(in, req.Operation == logical.PatchOperation, time.Now())
	if err != nil {
		return nil, err
	}
	entry, err := logical.StorageEntryJSON(rolesStoragePrefix+name, next)
	if err != nil {
		return nil, fmt.Errorf("encoding the role: %w", err)
	}
	err = b.cache.write(ctx, entry.Key, role.narrowedBy(next), func() error { return req.Storage.Put(ctx, entry) })
	if err != nil {
		return nil, err
	}
	b.telemetry.requestLog(req).Info("role written", "role", name, "organization", shown(orgShape, next.OrganizationID), "disabled", next.Disabled)
	b.telemetry.events.sendRole(req, eventRoleWrite, name, next)
	resp := new(logical.Response)
	if in.has("scopes") {
		resp.Warnings = scopeWarnings(next.Scopes)
	}
	if role != nil && role.OrganizationID != "" && next.OrganizationID == "" {
		resp.AddWarning("organization_id is removed: token requests use " + b.fallbackOrganization(ctx, req.Storage))
	}
	if in["disabled"] == true {
		resp.AddWarning("the role is disabled: no token is minted for it until disabled=false is written. " + next.validUntil(time.Now()))
	}
	if len(resp.Warnings) == 0 {
		return nil, nil
	}
	return resp, nil
}

// fallbackOrganization says which organization roles without one use.
func (b *backend) fallbackOrganization(ctx context.Context, s logical.Storage) string {
	config, err := getConfig(ctx, s)
	switch {
	case err != nil:
		return "config's, which could not be read"
	case config == nil || config.OrganizationID == "":
		return "config's, which names none: they are refused until one of the two does"
	default:
		return "config's, " + show(orgShape, config.OrganizationID)
	}
}

// pathRolesDelete handles DELETE roles/<name>.
func (b *backend) pathRolesDelete(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	if err := checkRoleName(name); err != nil {
		return classify(err).respond()
	}
	key := rolesStoragePrefix + name
	unlock, err := b.cache.writes.lock(ctx, key)
	if err != nil {
		return classify(err).respond()
	}
	defer unlock()
	entry, err := getEntry(ctx, req.Storage, key)
	if err != nil {
		return nil, err
	}
	role := new(roleEntry)
	if entry != nil {
		if role, err = decodeRole(name, entry.Value); err != nil {
			role = new(roleEntry) // it cannot be read, but it can be deleted
		}
	} else if b.cache.isCertain(key) {
		return nil, nil
	}
	err = b.cache.write(ctx, key, true, func() error { return req.Storage.Delete(ctx, key) })
	if err != nil {
		return nil, err
	}
	b.telemetry.requestLog(req).Info("role deleted", "role", name)
	b.telemetry.metrics.roleDropped(name)
	b.telemetry.events.sendRole(req, eventRoleDelete, name, nil)
	resp := new(logical.Response)
	resp.AddWarning(fmt.Sprintf("role %q is deleted: no token is minted for it any more. %s", name, role.validUntil(time.Now())))
	return resp, nil
}

// pathRolesListNames handles LIST roles.
func (b *backend) pathRolesListNames(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	names, err := listRoles(ctx, req.Storage)
	if err != nil {
		return nil, err
	}
	if after := d.Get("after").(string); after != "" {
		i, found := slices.BinarySearch(names, after)
		if found {
			i++
		}
		names = names[i:]
	}
	if v, ok := d.GetOk("limit"); ok {
		limit := v.(int)
		if limit < 1 {
			return classify(refusal(fmt.Sprintf("limit is %d: write 1 or more, or leave it out for all", limit))).respond()
		}
		names = names[:min(limit, len(names))]
	}
	return logical.ListResponse(names), nil
}

// checkRoleName refuses names that no role can have: Vault's pattern for names
// sets no length, and lets through what Vault's storage then refuses.
func checkRoleName(name string) error {
	if len(name) > maxRoleName {
		return refusal(fmt.Sprintf("the role's name is %d characters long: at most %d are allowed", len(name), maxRoleName))
	}
	if strings.Contains(name, "..") {
		return refusal(fmt.Sprintf(`the role's name %s must not contain "..": use single dots`, show(nameShape, name)))
	}
	return nil
}

const rolesListHelp = `
The names are sorted. "after" returns names that sort after the given one;
"limit" caps the count.
`

const rolesHelp = `
A role names an organization, the scopes of its tokens, and their lifetimes. A
read of creds/<name> returns a token for it, so permission to read that path is
permission to have the role's tokens.

A write keeps the fields that it does not name, and what a read returns can be
written back. ttl=0 or max_ttl=0 restores the default. A patch with null removes
organization_id. disabled=true disables the role.

By default, each read mints. With reuse_for, reads without parameters share a
token for that long, so that a fleet does not use up Cable's rate limit; ttl must
be at least twice reuse_for. While Cable is down, such reads return the previous
token with a warning. Every write of the role or of config, even one that changes
nothing, drops the shared token.

Deleting or disabling a role stops minting. Tokens that were minted before stay
valid until their expiry: Cable cannot revoke them.
`
