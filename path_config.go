// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"bytes"
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

// toResponseData returns every field but the refresh key.
func (c *configEntry) toResponseData() map[string]any {
	return map[string]any{
		"token_url":              c.TokenURL,
		"auth_scheme":            c.AuthScheme,
		"organization_id":        c.OrganizationID,
		"request_timeout":        c.RequestTimeout,
		"ca_cert":                c.CACert,
		"disabled":               c.Disabled,
		"refresh_key_version":    c.RefreshKeyVersion,
		"refresh_key_updated_at": timestamp(c.RefreshKeyUpdatedAt),
	}
}

// merge returns the entry with a write laid over it, or a refusal. The entry
// itself stays as it is; a nil entry is one that was never written. Only what
// changes is judged: the rest may come from another version of the engine.
func (c *configEntry) merge(in input, isPatch bool, now time.Time) (*configEntry, error) {
	next := newConfigEntry()
	if c != nil {
		*next = *c
	}
	key, hasKey := in.text("refresh_key")
	changes, err := in.changed(next.toResponseData(), func(name string, value any) bool {
		return name == "organization_id" && isPatch && value == nil || name == "ca_cert"
	})
	switch {
	case err != nil:
		return nil, err
	case hasKey:
		if err := checkRefreshKey(key); err != nil {
			return nil, err
		}
		if err := next.checkDestination(in); err != nil {
			return nil, err
		}
		if next.RefreshKey.Reveal() != key {
			next.RefreshKey = cable.NewSecret(key)
			next.RefreshKeyVersion++
			next.RefreshKeyUpdatedAt = now.UTC().Truncate(time.Second)
		}
	case c == nil:
		return nil, refusal("refresh_key is missing: the first write of config needs it")
	case changes.has("token_url"), changes.has("ca_cert"):
		return nil, refusal("changing token_url or ca_cert needs refresh_key in the same request: permission to edit the configuration is not permission to send the key to another host")
	}
	return next, next.apply(changes)
}

// checkDestination refuses a refresh key that is written without naming where
// it goes, unless that is the default: somebody else may have changed it, with a
// key of their own, to receive this one.
func (c *configEntry) checkDestination(in input) error {
	const needs = "writing refresh_key needs %s in the same request, because the stored value is not the default%s: read config, then name the value that you trust, or %s"
	if c.TokenURL != cable.DefaultTokenURL && !in.has("token_url") {
		return refusal(fmt.Sprintf(needs, "token_url", " (the key would go"+sentTo(c)+")", "token_url="+cable.DefaultTokenURL))
	}
	if c.CACert != "" && !in.has("ca_cert") {
		return refusal(fmt.Sprintf(needs, "ca_cert", "", `ca_cert="" for none`))
	}
	return nil
}

// apply lays the changes over the entry, and judges each.
func (c *configEntry) apply(changes input) error {
	if v, ok := changes.text("token_url"); ok {
		if _, err := cable.ParseTokenURL(v); err != nil {
			return refusal(err.Error())
		}
		c.TokenURL = v
	}
	if v, ok := changes.text("ca_cert"); ok {
		c.CACert = ""
		if v != "" {
			if err := cable.CheckCACert(v); err != nil {
				return refusal(err.Error())
			}
			c.CACert, _ = changes["ca_cert"].(string) // as it was written
		}
	}
	if v, ok := changes.text("auth_scheme"); ok {
		if v != authSchemeRaw && v != authSchemeBearer {
			return refusal(fmt.Sprintf("auth_scheme is %s: write %q or %q", show(wordShape, v), authSchemeRaw, authSchemeBearer))
		}
		c.AuthScheme = v
	}
	if v, ok := changes.text("organization_id"); ok {
		if err := checkWord(v, maxOrganizationID); err != nil {
			return refusal("organization_id " + err.Error())
		}
		c.OrganizationID = v
	}
	if v, ok := changes["request_timeout"].(int); ok {
		if v < minRequestTimeout || v > maxRequestTimeout {
			return refusal(fmt.Sprintf("request_timeout is %s: write %ds to %ds", showSeconds(int64(v)), minRequestTimeout, maxRequestTimeout))
		}
		c.RequestTimeout = v
	}
	if v, ok := changes["disabled"].(bool); ok {
		c.Disabled = v
	}
	return nil
}

// checkRefreshKey accepts what can stand in a header. Its error repeats nothing.
func checkRefreshKey(key string) error {
	if strings.HasPrefix(key, "Bearer ") {
		return refusal(`refresh_key must be the key alone, without "Bearer ": set auth_scheme=bearer to have it sent so`)
	}
	if len(key) > maxRefreshKey {
		return refusal(fmt.Sprintf("refresh_key is %d bytes long: at most %d are allowed", len(key), maxRefreshKey))
	}
	for _, c := range []byte(key) {
		if c <= ' ' || c >= 0x7f {
			return refusal("refresh_key must not contain white space, control characters or anything but printable ASCII inside")
		}
	}
	return nil
}

func (b *backend) pathConfig() *framework.Path {
	write := func(summary string) *framework.PathOperation {
		return forwarded(&framework.PathOperation{
			Callback: b.pathConfigWrite,
			Summary:  summary,
			Responses: map[int][]framework.Response{
				http.StatusOK:        {{Description: "Stored, with warnings"}},
				http.StatusNoContent: {{Description: "Stored"}},
			},
		})
	}
	fields := configResponseFields()
	fields["request_timeout"].Type = framework.TypeDurationSecond
	fields["refresh_key"] = &framework.FieldSchema{
		Type:         framework.TypeString,
		Description:  "Cable's long-lived refresh key. Required at first; never returned. Outer white space is dropped. A write that carries it names token_url and ca_cert too if their stored values are not the default.",
		DisplayAttrs: &framework.DisplayAttributes{Name: "Refresh key", Sensitive: true},
	}
	fields["verify_role"] = &framework.FieldSchema{
		Type:        framework.TypeString,
		Description: "A role to mint one token for with the new settings, before they are stored. If that fails, nothing is stored. For this request only.",
	}
	return &framework.Path{
		Pattern:      configStoragePath,
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "configuration"},
		Fields:       fields,
		// NOTE: no existence check, so that every write is an update: a policy
		// that permits create cannot let anybody replace the key.
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: &framework.PathOperation{
				Callback: b.pathConfigRead,
				Summary:  "Read the configuration, without the refresh key.",
				Responses: map[int][]framework.Response{
					http.StatusOK: {{Description: "The configuration", Fields: configResponseFields()}},
				},
			},
			logical.UpdateOperation: write("Write the configuration, or some fields of it."),
			logical.PatchOperation:  write("Change some fields of the configuration; null removes organization_id, or with refresh_key ca_cert."),
			logical.DeleteOperation: forwarded(&framework.PathOperation{
				Callback: b.pathConfigDelete,
				Summary:  "Delete the configuration, and with it the refresh key.",
				Responses: map[int][]framework.Response{
					http.StatusOK:        {{Description: "Deleted, with a warning"}},
					http.StatusNoContent: {{Description: "There was none"}},
				},
			}),
		},
		HelpSynopsis:    "Store the refresh key and how to reach Cable.",
		HelpDescription: strings.TrimSpace(configHelp),
	}
}

// configResponseFields describes what a read of config returns. There are no
// defaults: a client that applied them to a write would reset what is stored.
func configResponseFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"token_url": {
			Type:        framework.TypeString,
			Description: "The whole endpoint of Cable's token API: https, or http to a loopback host. Default " + cable.DefaultTokenURL + ". Changing it needs refresh_key in the same request.",
		},
		"auth_scheme": {
			Type:          framework.TypeString,
			Description:   `How the refresh key is written into the Authorization header: "raw" (the key alone, the default) or "bearer".`,
			AllowedValues: []any{authSchemeRaw, authSchemeBearer},
		},
		"organization_id": {
			Type:        framework.TypeString,
			Description: "The organization for roles that name none.",
		},
		"request_timeout": {
			Type:        framework.TypeInt,
			Description: "The budget of one token request in seconds, from its receipt, retries and storage included: 1s to 60s, default 20s.",
		},
		"ca_cert": {
			Type:         framework.TypeString,
			Description:  "PEM certificates to trust in addition to the system's, for an egress proxy that inspects TLS: certificates only, at most 64 KiB. Changing it needs refresh_key in the same request.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "CA certificates", EditType: "textarea"},
		},
		"disabled": {
			Type:        framework.TypeBool,
			Description: "Disable the mount: every token request is refused. Default false.",
		},
		"refresh_key_version": {
			Type:        framework.TypeInt,
			Description: "Counts the refresh keys that were stored, from 1. Read-only.",
		},
		"refresh_key_updated_at": {
			Type:        framework.TypeString, // RFC 3339
			Description: "When the refresh key was last replaced by another (RFC 3339). Read-only.",
		},
	}
}

// pathConfigRead handles GET config.
func (b *backend) pathConfigRead(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	cfg, err := getConfig(ctx, req.Storage)
	if cfg == nil || err != nil {
		return nil, err // Vault answers nil with 404
	}
	return &logical.Response{Data: cfg.toResponseData()}, nil
}

// pathConfigWrite handles POST and PATCH config. The merged result is
// judged, verified if that is requested, stored, and only then used.
func (b *backend) pathConfigWrite(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	resp, err := b.writeConfig(ctx, req, d.Raw)
	if err != nil {
		return classify(err).respond()
	}
	return resp, nil
}

// writeConfig is pathConfigWrite before its errors are given a status.
func (b *backend) writeConfig(ctx context.Context, req *logical.Request, in input) (*logical.Response, error) {
	resp := new(logical.Response)
	var verified []byte
	if in.has("verify_role") {
		// NOTE: no lock is held over a call to Cable. A write in the meantime wins.
		warning, stored, err := b.verifyConfig(ctx, req, in)
		if err != nil {
			return nil, err
		}
		resp.AddWarning(warning)
		verified = stored
	}

	unlock, err := b.cache.writes.lock(ctx, configStoragePath)
	if err != nil {
		return nil, err
	}
	defer unlock()
	before, next, stored, err := mergeConfig(ctx, req, in)
	if err != nil {
		return nil, err
	}
	if in.has("verify_role") && !bytes.Equal(stored, verified) {
		return nil, refusal("config was changed meanwhile, by another request while verify_role was minting: nothing was stored by this one, read config and write again; " + resp.Warnings[0])
	}
	raw, err := next.encode()
	if err != nil {
		return nil, errors.New("encoding the configuration failed")
	}
	err = b.cache.write(ctx, configStoragePath, before.narrowedBy(next), func() error {
		return req.Storage.Put(ctx, &logical.StorageEntry{Key: configStoragePath, Value: raw})
	})
	if err != nil {
		if in.has("verify_role") {
			b.telemetry.requestLog(req).Warn("config not stored, but verify_role had already minted a token", "detail", resp.Warnings[0])
		}
		return nil, err
	}
	b.telemetry.requestLog(req).Info("config written", "refresh_key_version", next.RefreshKeyVersion, "disabled", next.Disabled)
	b.telemetry.events.sendConfig(req, eventConfigWrite, next.RefreshKeyVersion)
	if in["disabled"] == true {
		resp.AddWarning("the mount is disabled: no token is minted until disabled=false is written. " + tokensValidUntil(time.Now(), maxLifetime))
	}
	if to := sentTo(next); to != "" {
		resp.AddWarning("token_url is not Cable's default: the refresh key is sent" + to)
	}
	if u, err := cable.ParseTokenURL(next.TokenURL); err == nil && strings.Trim(u.Path, "/") == "" {
		resp.AddWarning("token_url has no path: it is used as it is, and Cable's endpoint has one, as in " + cable.DefaultTokenURL)
	}
	if len(resp.Warnings) == 0 {
		return nil, nil
	}
	return resp, nil
}

// mergeConfig reads the stored entry and lays the write over it. It also
// returns the stored bytes, to tell whether they have changed since.
func mergeConfig(ctx context.Context, req *logical.Request, in input) (before, next *configEntry, stored []byte, err error) {
	isPatch := req.Operation == logical.PatchOperation
	entry, err := getEntry(ctx, req.Storage, configStoragePath)
	switch {
	case err != nil:
		return nil, nil, nil, err
	case entry != nil:
		stored = entry.Value
		if before, err = decodeConfig(stored); err != nil {
			return nil, nil, nil, err
		}
	case isPatch:
		return nil, nil, nil, refusal("config is not written yet: write refresh_key to config first")
	}
	next, err = before.merge(in, isPatch, time.Now())
	return before, next, stored, err
}

// verifyConfig mints one token of the shortest lifetime with settings that are
// not stored yet, and drops it. It returns the warning that says so, and what
// was stored before.
func (b *backend) verifyConfig(ctx context.Context, req *logical.Request, in input) (warning string, stored []byte, err error) {
	r := &tokenReport{req: req, received: receivedAt(ctx), verify: true}
	r.generation, _ = b.cache.now()
	_, next, stored, err := mergeConfig(ctx, req, in)
	if err != nil {
		return "", nil, err
	}
	r.role, _ = in.text("verify_role")
	if err := checkRoleName(r.role); err != nil {
		return "", nil, refusal("verify_role: " + err.Error())
	}
	readCtx, cancel := r.withBudget(ctx, next.timeout())
	defer cancel()
	role, err := getRole(readCtx, req.Storage, r.role)
	if err != nil {
		return "", nil, err
	}
	if role == nil {
		return "", nil, refusal(fmt.Sprintf("verify_role %s does not exist: nothing was stored, write the role first or leave verify_role out", show(nameShape, r.role)))
	}
	r.roleExists = true
	// A key that is written is not compared with the stored one, not even by its
	// pause: that would let somebody test guesses of it.
	var pause *cable.Pause
	if !in.has("refresh_key") {
		pause = b.cache.inheritedPause(next)
	}
	trial, err := b.cache.newLive(next, pause, nil)
	if err != nil {
		return "", nil, refusal(err.Error())
	}
	defer trial.client.Close()
	r.minted, err = b.mintWith(ctx, r, settings{trial, role}, tokenParams{hasTTL: true, ttl: minLifetime}, func() error {
		if !b.cache.isCurrent(r.generation) {
			return refusal("config or a role was changed meanwhile: write again")
		}
		return nil
	})
	m, err := b.ended(r, err)
	if err != nil {
		f := classify(err)
		where := ""
		if to := sentTo(next); to != "" {
			where = "; the refresh key goes" + to
		}
		f.message = fmt.Sprintf("verify_role %q failed and nothing was stored%s: %s", r.role, where, f.message)
		return "", nil, f
	}
	return fmt.Sprintf("verify_role %q: Cable minted a token with these settings. It was dropped; it cannot be revoked and is valid until %s.",
		r.role, m.expiresAt()), stored, nil
}

// pathConfigDelete handles DELETE config.
func (b *backend) pathConfigDelete(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	unlock, err := b.cache.writes.lock(ctx, configStoragePath)
	if err != nil {
		return nil, err
	}
	defer unlock()
	entry, err := getEntry(ctx, req.Storage, configStoragePath)
	if err != nil {
		return nil, err
	}
	if entry == nil && b.cache.isCertain(configStoragePath) {
		return nil, nil
	}
	err = b.cache.write(ctx, configStoragePath, true, func() error { return req.Storage.Delete(ctx, configStoragePath) })
	if err != nil {
		return nil, err
	}
	b.telemetry.requestLog(req).Info("config deleted")
	b.telemetry.events.sendConfig(req, eventConfigDelete, 0)
	resp := new(logical.Response)
	resp.AddWarning("the configuration is deleted: no token is minted until config is written again. " + tokensValidUntil(time.Now(), maxLifetime))
	return resp, nil
}

const configHelp = `
The refresh key is stored once and never returned. A write keeps the fields
that it does not name; the merged result is stored, and only then used. What a
read returns can be written back.

Key and destination belong together. Changing token_url or ca_cert needs
refresh_key in the same request. A write of refresh_key names each of token_url
and ca_cert whose stored value is not the default; ca_cert="" removes it.

With verify_role, one token of five minutes is minted for that role with the
new settings before they are stored; if that fails, nothing is stored.

disabled=true disables the mount: every token request is refused. Tokens that
were minted before stay valid until their expiry: Cable cannot revoke them.
`
