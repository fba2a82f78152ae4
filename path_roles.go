// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

const (
	// rolesStoragePrefix is followed by the role's name.
	rolesStoragePrefix = "roles/"

	maxRoleName    = 128 // characters
	maxScopes      = 64  // per role
	maxScopeLength = 128 // characters
)

// roleEntry is a stored role. Lifetimes are in seconds, 0 where not set.
type roleEntry struct {
	OrganizationID string   `json:"organization_id,omitempty"`
	Scopes         []string `json:"scopes"` // sorted, without repeats
	TTL            int64    `json:"ttl,omitempty"`
	MaxTTL         int64    `json:"max_ttl,omitempty"`
	Disabled       bool     `json:"disabled,omitempty"`

	// EarlierUntil is the Unix time until which tokens may live that were
	// minted under an earlier, higher max_ttl; 0 where there was none.
	EarlierUntil int64 `json:"earlier_until,omitempty"`
}

// toResponseData returns the role as it was written.
func (r *roleEntry) toResponseData() map[string]any {
	return map[string]any{
		"organization_id": r.OrganizationID,
		"scopes":          r.Scopes,
		"ttl":             r.TTL,
		"max_ttl":         r.MaxTTL,
		"disabled":        r.Disabled,
	}
}

// lifeCap is the longest life that the role allows, in seconds.
func (r *roleEntry) lifeCap() int64 {
	if r.MaxTTL > 0 {
		return r.MaxTTL
	}
	return maxLife
}

// aliveUntil says how long tokens of the role may live that exist by now.
func (r *roleEntry) aliveUntil(now time.Time) string {
	return aliveUntil(now, max(r.lifeCap(), r.EarlierUntil-now.Unix()))
}

// merge returns the role with the fields of d laid over it, or a refusal. The
// role itself stays as it is. A nil role is one that was never written.
func (r *roleEntry) merge(d *framework.FieldData, now time.Time) (*roleEntry, error) {
	next := new(roleEntry)
	if r != nil {
		*next = *r
	}
	if v, ok := d.GetOk("organization_id"); ok {
		next.OrganizationID = strings.TrimSpace(v.(string))
	}
	if v, ok := d.GetOk("scopes"); ok {
		scopes, err := normalizeScopes(v.([]string))
		if err != nil {
			return nil, err
		}
		next.Scopes = scopes
	}
	if v, ok := d.GetOk("ttl"); ok {
		next.TTL = int64(v.(int))
	}
	if v, ok := d.GetOk("max_ttl"); ok {
		next.MaxTTL = int64(v.(int))
	}
	if v, ok := d.GetOk("disabled"); ok {
		next.Disabled = v.(bool)
	}
	if r != nil && next.lifeCap() < r.lifeCap() {
		next.EarlierUntil = max(r.EarlierUntil, now.Unix()+r.lifeCap())
	}
	return next, next.validate()
}

// validate checks the role as a whole.
func (r *roleEntry) validate() error {
	if err := checkName(r.OrganizationID, maxOrganizationID); err != nil {
		return refusal("organization_id " + err.Error())
	}
	if len(r.Scopes) == 0 {
		return refusal(`scopes is missing: name at least one, such as "transactions:read"`)
	}
	for _, f := range []struct {
		name string
		ttl  int64
	}{{"ttl", r.TTL}, {"max_ttl", r.MaxTTL}} {
		if f.ttl != 0 && (f.ttl < minLife || f.ttl > maxLife) {
			return refusal(fmt.Sprintf("%s is %ds: Cable's tokens live %ds to %ds; write one of those, or 0 for the default", f.name, f.ttl, minLife, maxLife))
		}
	}
	if r.TTL > r.lifeCap() {
		return refusal(fmt.Sprintf("ttl of %ds is above max_ttl of %ds: lower ttl or raise max_ttl", r.TTL, r.lifeCap()))
	}
	return nil
}

// scopesOfReference are the scopes that Cable's reference names. The API has
// more resources, so another scope may be valid.
func scopesOfReference() []string {
	return []string{
		"customer_sar:read", "customer_sar:write", "person:read", "person:write",
		"transactions:delete", "transactions:read", "transactions:write",
	}
}

// normalizeScopes trims, drops empty elements and repeats, and sorts. The
// refusal names the scope that cannot be one.
func normalizeScopes(list []string) ([]string, error) {
	scopes := make([]string, 0, len(list))
	for _, s := range list {
		if s = strings.TrimSpace(s); s == "" {
			continue
		}
		if err := checkName(s, maxScopeLength); err != nil {
			return nil, refusal(fmt.Sprintf(`scope %.32q %s: write scopes as "resource:action", separated by commas`, s, err))
		}
		scopes = append(scopes, s)
	}
	slices.Sort(scopes)
	scopes = slices.Compact(scopes)
	if len(scopes) == 0 {
		return nil, refusal("scopes must not be empty: name at least one")
	}
	if len(scopes) > maxScopes {
		return nil, refusal(fmt.Sprintf("scopes names %d: at most %d are allowed", len(scopes), maxScopes))
	}
	return scopes, nil
}

// scopeWarnings names the scopes that look mistyped. They are stored all the
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
		warnings = append(warnings, fmt.Sprintf("scopes that are not of the form resource:action were stored: %s", nameSome(shape)))
	}
	if len(unknown) > 0 {
		warnings = append(warnings, fmt.Sprintf("scopes that Cable's reference does not name were stored, Cable may refuse them: %s", nameSome(unknown)))
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
				Description: "List only the names that come after this one.",
				Query:       true,
			},
			"limit": {
				Type:        framework.TypeInt,
				Description: "List at most so many names.",
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
			logical.PatchOperation:  write("Change some fields of a role that exists."),
			logical.DeleteOperation: forwarded(&framework.PathOperation{
				Callback: b.pathRolesDelete,
				Summary:  "Delete a role.",
				Responses: map[int][]framework.Response{
					http.StatusOK:        {{Description: "Deleted, with a warning"}},
					http.StatusNoContent: {{Description: "There was none"}},
				},
			}),
		},
		HelpSynopsis:    "Describe which tokens a role may mint.",
		HelpDescription: strings.TrimSpace(rolesHelp),
	}
}

// roleResponseFields describes a role, as it is read and written.
func roleResponseFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"organization_id": {
			Type:        framework.TypeString,
			Description: "The organization that tokens are for; default that of config.",
		},
		"scopes": {
			Type:        framework.TypeCommaStringSlice,
			Description: "The scopes that tokens get, of the form resource:action, separated by commas or as a JSON array. Required at first.",
		},
		"ttl": {
			Type:        framework.TypeDurationSecond,
			Description: "The life of a token where the request names none: 300s to 86400s; 0 for the default of the mount's default_lease_ttl or one hour, whichever is less.",
		},
		"max_ttl": {
			Type:        framework.TypeDurationSecond,
			Description: "The longest life of a token: 300s to 86400s; 0 for 24 hours. The mount's max_lease_ttl caps it.",
		},
		"disabled": {
			Type:        framework.TypeBool,
			Description: "Freeze the role: every mint for it is refused.",
		},
	}
}

// pathRolesExists tells create from update, for policies. It does not decode
// the entry: an error here would deny the write without saying why.
func (b *backend) pathRolesExists(ctx context.Context, req *logical.Request, d *framework.FieldData) (bool, error) {
	if checkRoleName(d.Get("name").(string)) != nil {
		return false, nil // the write will say it
	}
	entry, err := req.Storage.Get(ctx, rolesStoragePrefix+d.Get("name").(string))
	return entry != nil, err
}

// pathRolesRead handles GET roles/<name>.
func (b *backend) pathRolesRead(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	if err := checkRoleName(name); err != nil {
		return failed(err)
	}
	role, err := getRole(ctx, req.Storage, name)
	if role == nil || err != nil {
		return nil, err // Vault answers nil with 404
	}
	return &logical.Response{Data: role.toResponseData()}, nil
}

// pathRolesWrite handles POST and PATCH roles/<name>.
func (b *backend) pathRolesWrite(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	if err := checkRoleName(name); err != nil {
		return failed(err)
	}
	b.rolesMu.Lock()
	defer b.rolesMu.Unlock()
	role, err := getRole(ctx, req.Storage, name)
	if err != nil {
		return nil, err
	}
	if role == nil && req.Operation == logical.PatchOperation {
		return failed(noSuchRole(name))
	}
	next, err := role.merge(d, time.Now())
	if err != nil {
		return failed(err)
	}
	err = setRole(ctx, req.Storage, name, next)
	b.forgetRole(name) // also on failure: whether it was stored is unknown
	if err != nil {
		return nil, err
	}
	b.log(req).Info("a role was written", "role", name, "organization", next.OrganizationID, "disabled", next.Disabled)
	b.sendRoleEvent(req, eventRoleWrite, name, next)
	resp := new(logical.Response)
	if _, ok := d.GetOk("scopes"); ok {
		resp.Warnings = scopeWarnings(next.Scopes)
	}
	if v, ok := d.GetOk("disabled"); ok && v.(bool) {
		resp.AddWarning("the role is disabled: no token is minted for it until disabled=false is written. " + next.aliveUntil(time.Now()))
	}
	if len(resp.Warnings) == 0 {
		return nil, nil
	}
	return resp, nil
}

// pathRolesDelete handles DELETE roles/<name>.
func (b *backend) pathRolesDelete(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	if err := checkRoleName(name); err != nil {
		return failed(err)
	}
	b.rolesMu.Lock()
	defer b.rolesMu.Unlock()
	entry, err := req.Storage.Get(ctx, rolesStoragePrefix+name)
	if entry == nil || err != nil {
		return nil, err
	}
	role, err := decodeRole(name, entry.Value)
	if err != nil {
		role = new(roleEntry) // it cannot be read, but it can be deleted
	}
	err = req.Storage.Delete(ctx, rolesStoragePrefix+name)
	b.forgetRole(name)
	if err != nil {
		return nil, err
	}
	b.log(req).Info("a role was deleted", "role", name)
	b.metrics.roleDeleted(name)
	b.sendRoleEvent(req, eventRoleDelete, name, nil)
	resp := new(logical.Response)
	resp.AddWarning(fmt.Sprintf("role %q is deleted: no token is minted for it any more. %s", name, role.aliveUntil(time.Now())))
	return resp, nil
}

// pathRolesListNames handles LIST roles.
func (b *backend) pathRolesListNames(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	names, err := req.Storage.List(ctx, rolesStoragePrefix)
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
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
			return failed(refusal(fmt.Sprintf("limit is %d: write 1 or more, or leave it out for all", limit)))
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
		return refusal(fmt.Sprintf(`the role's name %s must not hold "..": use single dots`, echo(name)))
	}
	return nil
}

// noSuchRole is the refusal for a role that does not exist.
func noSuchRole(name string) error {
	return refusal(fmt.Sprintf("role %q does not exist: write it to roles/%s", name, name))
}

// getRole returns the stored role, or nil where there is none.
func getRole(ctx context.Context, s logical.Storage, name string) (*roleEntry, error) {
	entry, err := s.Get(ctx, rolesStoragePrefix+name)
	if entry == nil || err != nil {
		return nil, err // as it is: Vault reads the text of storage errors
	}
	return decodeRole(name, entry.Value)
}

// decodeRole reads what setRole wrote, or an older or newer version did.
func decodeRole(name string, raw []byte) (*roleEntry, error) {
	r := new(roleEntry)
	if err := json.Unmarshal(raw, r); err != nil {
		return nil, fmt.Errorf("the stored role %q cannot be read: delete it and write it anew", name)
	}
	return r, nil
}

// setRole stores the role.
func setRole(ctx context.Context, s logical.Storage, name string, r *roleEntry) error {
	entry, err := logical.StorageEntryJSON(rolesStoragePrefix+name, r)
	if err != nil {
		return fmt.Errorf("encoding the role: %w", err)
	}
	return s.Put(ctx, entry)
}

const rolesListHelp = `
The names come in order. With after, only those behind a name are listed; with
limit, at most so many.
`

const rolesHelp = `
A role names an organization, the scopes of its tokens, and how long they may
live. A read of creds/<name> mints a token for it, so who may read that path is
who may have the role's tokens.

A write that names some fields keeps the others. ttl=0 or max_ttl=0 goes back
to the default. disabled=true freezes the role.

Deleting or disabling a role stops minting; it ends no token that was minted
before, as Cable cannot revoke them.
`
