// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/fields"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/lifetime"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/report"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/state"
)

func (b *backend) pathConfig() *framework.Path {
	schema := configResponseFields()
	schema["request_timeout"].Type = framework.TypeDurationSecond
	schema["refresh_key"] = field(framework.TypeString,
		"Cable's long-lived refresh key. Required in the first write; never returned. Outer white space is dropped. "+
			"A write that carries it must also name token_url and ca_cert if their stored values are not the default.")
	schema["refresh_key"].DisplayAttrs = &framework.DisplayAttributes{Name: "Refresh key", Sensitive: true}
	schema["verify_role"] = field(framework.TypeString,
		"A role to mint one token for with the new settings, before they are stored. If that fails, nothing is "+
			"stored. For this request only.")
	return &framework.Path{
		Pattern:      state.ConfigKey,
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "configuration"},
		Fields:       schema,
		// NOTE: there is no existence check, so every write is an update, and a policy with create alone cannot replace
		// the key.
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: b.reads(b.pathConfigRead, "Read the configuration, without the refresh key.",
				"The configuration", configResponseFields()),
			logical.UpdateOperation: b.writes(b.pathConfigWrite, "Write the configuration, or some fields of it."),
			logical.PatchOperation: b.writes(b.pathConfigWrite,
				"Change some fields of the configuration; null removes organization_id, and with refresh_key ca_cert."),
			logical.DeleteOperation: b.deletes(b.pathConfigDelete,
				"Delete the configuration, and with it the refresh key."),
		},
		HelpSynopsis:    "Store the refresh key and how to reach Cable.",
		HelpDescription: configHelp,
	}
}

// configResponseFields describes the response to a read of config. There are no defaults, because a client that applied
// them to a write would reset the stored values.
func configResponseFields() map[string]*framework.FieldSchema {
	schema := map[string]*framework.FieldSchema{
		"token_url": field(framework.TypeString,
			"The whole endpoint of Cable's token API: https, or http to a loopback host. Default "+
				cable.DefaultTokenURL+". Changing it needs refresh_key in the same request."),
		"auth_scheme": field(framework.TypeString, "How the refresh key is written into the Authorization header: "+
			`"raw" (the key alone, the default) or "bearer".`),
		"organization_id": field(framework.TypeString, "The organization for roles that name none."),
		"request_timeout": field(framework.TypeInt, "The budget of one token request in seconds, from its receipt, "+
			"retries and storage included: 1s to 60s, default 20s."),
		"ca_cert": field(framework.TypeString,
			"PEM certificates to trust in addition to the system's, for an egress proxy that inspects TLS: "+
				"certificates only, at most 64 KiB. Changing it needs refresh_key in the same request."),
		"disabled": field(framework.TypeBool, "Disable the mount: every token request is refused. Default false."),
		"refresh_key_version": field(framework.TypeInt,
			"Counts the refresh keys that were stored, from 1. Read-only."),
		"refresh_key_updated_at": field(framework.TypeString,
			"When the refresh key was last replaced by another (RFC 3339). Read-only."),
	}
	schema["auth_scheme"].AllowedValues = []any{state.AuthSchemeRaw, state.AuthSchemeBearer}
	schema["ca_cert"].DisplayAttrs = &framework.DisplayAttributes{Name: "CA certificates", EditType: "textarea"}
	return schema
}

// configResponseData returns every field but the refresh key.
func configResponseData(c *state.Config) map[string]any {
	return map[string]any{
		"token_url":              c.TokenURL,
		"auth_scheme":            c.AuthScheme,
		"organization_id":        c.OrganizationID,
		"request_timeout":        int(c.RequestTimeout / time.Second),
		"ca_cert":                c.CACert,
		"disabled":               c.Disabled,
		"refresh_key_version":    c.RefreshKeyVersion,
		"refresh_key_updated_at": outcome.Time(c.RefreshKeyUpdatedAt),
	}
}

// pathConfigRead handles GET config.
func (b *backend) pathConfigRead(ctx context.Context, r *request) (*logical.Response, error) {
	c, err := state.ReadConfig(ctx, r.Storage)
	if c == nil || err != nil {
		return nil, err // Vault turns nil into a 404
	}
	return &logical.Response{Data: configResponseData(c)}, nil
}

// pathConfigWrite handles POST and PATCH config. The merged entry is verified if that is requested, stored, and only
// then used.
func (b *backend) pathConfigWrite(ctx context.Context, r *request) (*logical.Response, error) {
	resp := new(logical.Response)
	var trial string
	var verified []byte
	if r.in.Has("verify_role") {
		// NOTE: no lock is held during a call to Cable. A write in the meantime wins.
		var err error
		if trial, verified, err = b.verify(ctx, r); err != nil {
			return nil, err
		}
		resp.AddWarning(trial)
	}
	entry, err := b.state.Lock(ctx, r.Storage, state.ConfigKey)
	if err != nil {
		return nil, err
	}
	defer entry.Unlock()
	stored, err := entry.Read(ctx)
	if err != nil {
		return nil, err
	}
	before, next, err := mergeConfig(stored, r)
	if err != nil {
		return nil, err
	}
	if trial != "" && !bytes.Equal(stored, verified) {
		return nil, outcome.Refuse("config was changed meanwhile: another request wrote it while verify_role was "+
			"minting, so nothing was stored; read config, then write again; %s", trial)
	}
	raw, err := next.Encode()
	if err != nil {
		return nil, errors.New("encoding the configuration failed")
	}
	if err := entry.Write(ctx, raw, before.NarrowedBy(next)); err != nil {
		b.report.WriteFailed(r.source(), err, trial)
		return nil, err
	}
	b.report.ConfigWritten(r.source(), next)
	if r.in["disabled"] == true {
		resp.AddWarning("the mount is disabled: no token is minted until disabled=false is written; " +
			tokensValidUntil(time.Now(), lifetime.Max))
	}
	if to := sentTo(next); to != "" {
		resp.AddWarning("token_url is not Cable's default: the refresh key is sent" + to)
	}
	if u, err := cable.ParseTokenURL(next.TokenURL); err == nil && strings.Trim(u.Path, "/") == "" {
		resp.AddWarning("token_url has no path: it is used as it is, but Cable's endpoint has one, as in " +
			cable.DefaultTokenURL)
	}
	return orNoContent(resp), nil
}

// orNoContent returns a response with warnings, or else none, which is a 204.
func orNoContent(resp *logical.Response) *logical.Response {
	if len(resp.Warnings) == 0 {
		return nil
	}
	return resp
}

// mergeConfig decodes the stored entry, nil if there is none, and lays a write over it. It judges the fields that the
// write changes, and no others, because another version of the engine may have stored them.
func mergeConfig(stored []byte, r *request) (before, next *state.Config, err error) {
	if before, err = state.DecodeConfig(stored); err != nil {
		return nil, nil, err
	}
	isPatch := r.Operation == logical.PatchOperation
	next = state.NewConfig()
	switch {
	case before != nil:
		*next = *before
	case isPatch:
		return nil, nil, outcome.Refuse("config is not written yet: write refresh_key to config first")
	}
	key, hasKey := r.in.Text("refresh_key")
	changes, err := r.in.Changes(configResponseData(next), func(name string, value any) bool {
		// A patch with null removes organization_id; with a key, a blank removes ca_cert.
		return name == "organization_id" && isPatch && value == nil || name == "ca_cert"
	})
	switch {
	case err != nil:
		return nil, nil, err
	case hasKey:
		if err := checkRefreshKey(key); err != nil {
			return nil, nil, err
		}
		if err := checkDestination(next, r.in); err != nil {
			return nil, nil, err
		}
		if next.RefreshKey.Reveal() != key {
			next.RefreshKey = cable.NewSecret(key)
			next.RefreshKeyVersion++
			next.RefreshKeyUpdatedAt = time.Now().UTC().Truncate(time.Second)
		}
	case before == nil:
		return nil, nil, outcome.Refuse("refresh_key is missing: the first write of config needs it")
	case changes.Has("token_url"), changes.Has("ca_cert"):
		// Key and destination belong together, so changing token_url or ca_cert needs the key.
		return nil, nil, outcome.Refuse("changing token_url or ca_cert needs refresh_key in the same request: " +
			"permission to edit the configuration is not permission to send the key to another host")
	}
	return before, next, changeConfig(next, changes)
}

// checkDestination refuses a refresh key that is written without naming its destination, unless that is the default.
// Another person may have changed the destination, with a made-up key, to receive this one.
func checkDestination(c *state.Config, in fields.Input) error {
	const needs = "writing refresh_key needs %s in the same request, because the stored value is not the default%s: " +
		"read config, then name the value that you trust, or %s"
	if c.TokenURL != cable.DefaultTokenURL && !in.Has("token_url") {
		return outcome.Refuse(needs, "token_url", fmt.Sprintf(" (the key would go%s)", sentTo(c)),
			"token_url="+cable.DefaultTokenURL)
	}
	if c.CACert != "" && !in.Has("ca_cert") {
		return outcome.Refuse(needs, "ca_cert", "", `ca_cert="" for none`)
	}
	return nil
}

// changeConfig lays the changes over the entry, and judges each.
func changeConfig(c *state.Config, changes fields.Input) error {
	if v, ok := changes.Text("token_url"); ok {
		if _, err := cable.ParseTokenURL(v); err != nil {
			return outcome.Refusal(err.Error())
		}
		c.TokenURL = v
	}
	if v, ok := changes.Text("ca_cert"); ok {
		c.CACert = ""
		if v != "" {
			if err := cable.CheckCACert(v); err != nil {
				return outcome.Refusal(err.Error())
			}
			c.CACert, _ = changes["ca_cert"].(string) // as it was written
		}
	}
	if v, ok := changes.Text("auth_scheme"); ok {
		if v != state.AuthSchemeRaw && v != state.AuthSchemeBearer {
			return outcome.Refuse("auth_scheme is %s: write %q or %q",
				fields.Word.Quote(v), state.AuthSchemeRaw, state.AuthSchemeBearer)
		}
		c.AuthScheme = v
	}
	if v, ok := changes.Text("organization_id"); ok {
		if err := fields.CheckOrganization(v); err != nil {
			return err
		}
		c.OrganizationID = v // null removes organization_id
	}
	if v, ok := changes.Duration("request_timeout"); ok {
		if v < state.MinRequestTimeout || v > state.MaxRequestTimeout {
			return outcome.Refuse("request_timeout is %s: write %s to %s", lifetime.Format(v),
				lifetime.Format(state.MinRequestTimeout), lifetime.Format(state.MaxRequestTimeout))
		}
		c.RequestTimeout = v
	}
	if v, ok := changes["disabled"].(bool); ok {
		c.Disabled = v
	}
	return nil
}

// checkRefreshKey refuses a key that an HTTP header cannot carry. Its errors never quote the key.
func checkRefreshKey(key string) error {
	isQuoted := len(key) > 1 && key[0] == key[len(key)-1] && strings.ContainsAny(key[:1], "\"'`")
	switch {
	case strings.HasPrefix(key, "\ufeff"), strings.HasPrefix(key, "\ufffd"), strings.Contains(key, "\x00"):
		return outcome.Refuse("refresh_key begins with a byte order mark, or is UTF-16: save the file as plain UTF-8")
	case isQuoted:
		return outcome.Refuse("refresh_key is in quotes: write the key alone")
	case strings.HasPrefix(key, "Bearer "):
		return outcome.Refuse(`refresh_key must be the key alone, without "Bearer ": write auth_scheme=bearer instead`)
	case len(key) > fields.MaxRefreshKey:
		return outcome.Refuse("refresh_key is %d bytes long: at most %d are allowed", len(key), fields.MaxRefreshKey)
	}
	for _, c := range []byte(key) {
		if c <= ' ' || c >= 0x7f {
			return outcome.Refuse(
				"refresh_key must not contain white space, control characters or non-ASCII characters")
		}
	}
	return nil
}

// verify mints a token of the shortest lifetime with settings that are not stored yet, and drops it. If it fails, the
// write stores nothing. Otherwise it returns a warning about the token, and the bytes that were stored before.
func (b *backend) verify(ctx context.Context, r *request) (warning string, stored []byte, err error) {
	since, err := b.state.ConfigVersion() // before config is read, so that a later write stops the API call
	if err == nil {
		stored, err = state.Read(ctx, r.Storage, state.ConfigKey)
	}
	if err != nil {
		return "", nil, err
	}
	_, next, err := mergeConfig(stored, r)
	if err != nil {
		return "", nil, err
	}
	trial := *r
	trial.role, _ = r.in.Text("verify_role")
	if err := fields.CheckRoleName(trial.role); err != nil {
		return "", nil, outcome.Refuse("verify_role: %s", err)
	}
	readCtx, cancel := state.WithBudget(ctx, r.received, next.RequestTimeout)
	defer cancel()
	a := attempt{kind: report.Trial, role: trial.role}
	if a.set, err = b.state.RoleSettings(readCtx, r.Storage, a.role, since); err != nil {
		return "", nil, err
	}
	if a.set.Role == nil {
		return "", nil, outcome.Refuse("verify_role %s does not exist: nothing was stored, "+
			"write the role first or leave verify_role out", fields.RoleName.Quote(a.role))
	}
	// NOTE: a submitted key never inherits the stored key's pause, because that would reveal whether the two are equal.
	var pause *cable.Pause
	if !r.in.Has("refresh_key") {
		pause = b.state.InheritedPause(next)
	}
	live, err := state.NewLive(next, pause, nil)
	if err != nil {
		return "", nil, outcome.Refusal(err.Error())
	}
	defer live.Client.Close()
	a.set.Config = live
	if err = checkSettings(a.role, a.set); err == nil {
		a.params = params{hasTTL: true, ttl: lifetime.Min}
		if listed := a.set.Role.OrganizationIDs; ownOrganization(a.set) == "" && len(listed) > 0 {
			a.params.organization = listed[0]
		}
		err = b.narrow(ctx, &trial, &a)
	}
	if err == nil {
		a.token, err = b.mintOne(ctx, &a, r.received, func() error { return nil })
	}
	if errors.Is(err, outcome.ErrChanged) {
		err = outcome.Refuse("config or the role was changed meanwhile by another request: write again")
	}
	if err := b.ended(r.source(), r.received, a, err); err != nil {
		f := outcome.Classify(err)
		where := ""
		if to := sentTo(next); to != "" {
			where = "; the refresh key goes" + to
		}
		f.Message = fmt.Sprintf("verify_role %q failed and nothing was stored%s: %s", a.role, where, f.Message)
		return "", nil, f
	}
	return fmt.Sprintf("verify_role %q: Cable minted a token with these settings; "+
		"it was dropped, cannot be revoked, and is valid until %s", a.role, a.token.ExpiresAt()), stored, nil
}

// pathConfigDelete handles DELETE config.
func (b *backend) pathConfigDelete(ctx context.Context, r *request) (*logical.Response, error) {
	entry, err := b.state.Lock(ctx, r.Storage, state.ConfigKey)
	if err != nil {
		return nil, err
	}
	defer entry.Unlock()
	stored, err := entry.Read(ctx)
	if err != nil || stored == nil && entry.IsCertain() {
		return nil, err
	}
	if err := entry.Write(ctx, nil, stored != nil); err != nil {
		b.report.WriteFailed(r.source(), err, "")
		return nil, err
	}
	b.report.ConfigDeleted(r.source())
	return &logical.Response{Warnings: []string{"the configuration is deleted: no token is minted until config is " +
		"written again; " + tokensValidUntil(time.Now(), lifetime.Max)}}, nil
}

const configHelp = `The refresh key is stored once and never returned. A write keeps the fields
that it does not name; the merged result is stored, and only then used. What a
read returns can be written back.

Key and destination belong together. Changing token_url or ca_cert needs
refresh_key in the same request. A write of refresh_key must also name token_url
and ca_cert if their stored values are not the default; ca_cert="" removes it.

With verify_role, one token of five minutes is minted for that role with the
new settings before they are stored; if that fails, nothing is stored.

disabled=true disables the mount: every token request is refused. Tokens that
were minted before stay valid until their expiry: Cable cannot revoke them.`
