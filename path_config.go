// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/version"
)

const (
	// configStoragePath holds the refresh key, and is seal-wrapped.
	configStoragePath = "config"

	authSchemeRaw    = "raw"    // Authorization: <key>, as in Cable's v2 curl example
	authSchemeBearer = "bearer" // Authorization: Bearer <key>, as in its v1 pages

	minRequestTimeout = 1  // seconds
	maxRequestTimeout = 60 // seconds: below the 90 s after which Vault gives a request up

	// maxRefreshKey is in bytes: the key travels in a header, and common servers
	// take 8 KiB of those.
	maxRefreshKey = 8 << 10

	// maxOrganizationID is in characters; Cable's example has 24.
	maxOrganizationID = 128
)

// configEntry is the stored configuration of a mount. Absent keys of a stored
// entry mean the defaults, unknown ones are ignored: an older or newer version
// of the engine may have written it.
type configEntry struct {
	RefreshKey          cable.Secret `json:"-"` // see encode
	RefreshKeyVersion   int          `json:"refresh_key_version"`
	RefreshKeyUpdatedAt time.Time    `json:"refresh_key_updated_at"`
	TokenURL            string       `json:"token_url"`
	AuthScheme          string       `json:"auth_scheme"`
	OrganizationID      string       `json:"organization_id,omitempty"`
	RequestTimeout      int          `json:"request_timeout"` // seconds
	CACert              string       `json:"ca_cert,omitempty"`
	Disabled            bool         `json:"disabled,omitempty"`
}

// newConfigEntry returns the defaults.
func newConfigEntry() *configEntry {
	return &configEntry{
		TokenURL:       cable.DefaultTokenURL,
		AuthScheme:     authSchemeRaw,
		RequestTimeout: int(cable.DefaultTimeout / time.Second),
	}
}

// storedConfigKey is the one place where the refresh key stands beside the
// other fields in a form that can be printed: on its way into storage and out
// of it.
const storedConfigKey = "refresh_key"

// encode returns the entry as it is stored.
func (c *configEntry) encode() ([]byte, error) {
	raw, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	fields := make(map[string]any)
	if err := json.Unmarshal(raw, &fields); err != nil {
		return nil, err
	}
	fields[storedConfigKey] = c.RefreshKey.Reveal()
	return json.Marshal(fields)
}

// decodeConfig reads what encode wrote. Its errors hold none of it.
func decodeConfig(raw []byte) (*configEntry, error) {
	c := newConfigEntry()
	var key map[string]json.RawMessage
	var text string
	if json.Unmarshal(raw, &key) != nil || json.Unmarshal(raw, c) != nil ||
		json.Unmarshal(key[storedConfigKey], &text) != nil || text == "" {
		return nil, errors.New("the stored configuration cannot be read: delete config and write it anew")
	}
	c.RefreshKey = cable.NewSecret(text)
	return c, nil
}

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
		"refresh_key_updated_at": c.RefreshKeyUpdatedAt.UTC().Format(time.RFC3339),
	}
}

// clientConfig is the entry in the client's words.
func (c *configEntry) clientConfig() cable.Config {
	return cable.Config{
		RefreshKey: c.RefreshKey,
		TokenURL:   c.TokenURL,
		Bearer:     c.AuthScheme == authSchemeBearer,
		CACert:     c.CACert,
		Timeout:    time.Duration(c.RequestTimeout) * time.Second,
		UserAgent:  "vault-plugin-secrets-cable/" + version.String(),
	}
}

// merge returns the entry with the fields of d laid over it, or a refusal. The
// entry itself stays as it is. A nil entry is one that was never written.
func (c *configEntry) merge(d *framework.FieldData, now time.Time) (*configEntry, error) {
	next := newConfigEntry()
	if c != nil {
		*next = *c
	}
	key, newKey := d.GetOk("refresh_key")
	if newKey {
		if err := checkRefreshKey(strings.TrimSpace(key.(string))); err != nil {
			return nil, err
		}
		if text := strings.TrimSpace(key.(string)); next.RefreshKey.Reveal() != text {
			next.RefreshKey = cable.NewSecret(text)
			next.RefreshKeyVersion++
			next.RefreshKeyUpdatedAt = now.UTC().Truncate(time.Second)
		}
	} else if c == nil {
		return nil, refusal("refresh_key is missing: the first write of config needs it")
	}
	for name, field := range map[string]*string{"token_url": &next.TokenURL, "auth_scheme": &next.AuthScheme, "organization_id": &next.OrganizationID} {
		if v, ok := d.GetOk(name); ok {
			*field = strings.TrimSpace(v.(string))
		}
	}
	if v, ok := d.GetOk("ca_cert"); ok && strings.TrimSpace(v.(string)) != strings.TrimSpace(next.CACert) {
		next.CACert = v.(string)
	}
	if v, ok := d.GetOk("request_timeout"); ok {
		next.RequestTimeout = v.(int)
	}
	if v, ok := d.GetOk("disabled"); ok {
		next.Disabled = v.(bool)
	}
	if c != nil && !newKey && (next.TokenURL != c.TokenURL || next.CACert != c.CACert) {
		return nil, refusal("changing token_url or ca_cert needs refresh_key in the same request: a right to edit the configuration is not a right to send the key to another host")
	}
	return next, next.validate()
}

// validate checks the entry as a whole.
func (c *configEntry) validate() error {
	if _, err := cable.New(c.clientConfig()); err != nil {
		return refusal(err.Error())
	}
	if c.AuthScheme != authSchemeRaw && c.AuthScheme != authSchemeBearer {
		return refusal(fmt.Sprintf("auth_scheme is %s: write %q or %q", echo(c.AuthScheme), authSchemeRaw, authSchemeBearer))
	}
	if c.RequestTimeout < minRequestTimeout || c.RequestTimeout > maxRequestTimeout {
		return refusal(fmt.Sprintf("request_timeout is %ds: write %ds to %ds", c.RequestTimeout, minRequestTimeout, maxRequestTimeout))
	}
	if err := checkName(c.OrganizationID, maxOrganizationID); err != nil {
		return refusal("organization_id " + err.Error())
	}
	return nil
}

// checkRefreshKey takes what can stand in a header. Its error repeats nothing.
func checkRefreshKey(key string) error {
	if strings.HasPrefix(key, "Bearer ") {
		return refusal(`refresh_key must be the key alone, without "Bearer ": set auth_scheme=bearer to have it sent so`)
	}
	if len(key) > maxRefreshKey {
		return refusal(fmt.Sprintf("refresh_key is %d bytes long: at most %d are allowed", len(key), maxRefreshKey))
	}
	for _, c := range []byte(key) {
		if c <= ' ' || c >= 0x7f {
			return refusal("refresh_key must not hold white space, control characters or anything but printable ASCII inside")
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
	delete(fields, "refresh_key_version")
	delete(fields, "refresh_key_updated_at")
	fields["refresh_key"] = &framework.FieldSchema{
		Type:         framework.TypeString,
		Description:  "Cable's long-lived refresh key. Required at first; never returned. White space around it is dropped.",
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
		// that lets somebody create cannot let them have the key replaced.
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: &framework.PathOperation{
				Callback: b.pathConfigRead,
				Summary:  "Read the configuration, without the refresh key.",
				Responses: map[int][]framework.Response{
					http.StatusOK: {{Description: "The configuration", Fields: configResponseFields()}},
				},
			},
			logical.UpdateOperation: write("Write the configuration, or some fields of it."),
			logical.PatchOperation:  write("Change some fields of the configuration; null removes organization_id or ca_cert."),
			logical.DeleteOperation: forwarded(&framework.PathOperation{
				Callback: b.pathConfigDelete,
				Summary:  "Delete the configuration, and with it the refresh key.",
				Responses: map[int][]framework.Response{
					http.StatusOK:        {{Description: "Deleted, with a warning"}},
					http.StatusNoContent: {{Description: "There was none"}},
				},
			}),
		},
		HelpSynopsis:    "Store the refresh key and how Cable is reached.",
		HelpDescription: strings.TrimSpace(configHelp),
	}
}

// clearableFields are the fields of path that a patch may remove with null:
// those whose absence mints nothing more than their presence.
func clearableFields(path *framework.Path) []string {
	if strings.Trim(path.Pattern, "^$") == configStoragePath { // the framework anchors it
		return []string{"organization_id", "ca_cert"}
	}
	return nil
}

// configResponseFields describes what a read of config returns.
func configResponseFields() map[string]*framework.FieldSchema {
	defaults := newConfigEntry()
	return map[string]*framework.FieldSchema{
		"token_url": {
			Type:        framework.TypeString,
			Description: "The whole endpoint of Cable's token API: https, or http to a loopback host. Changing it needs refresh_key in the same request.",
			Default:     defaults.TokenURL,
		},
		"auth_scheme": {
			Type:          framework.TypeString,
			Description:   `How the refresh key is written into the Authorization header: "raw" (the key alone) or "bearer".`,
			Default:       defaults.AuthScheme,
			AllowedValues: []any{authSchemeRaw, authSchemeBearer},
		},
		"organization_id": {
			Type:        framework.TypeString,
			Description: "The organization of roles that name none.",
		},
		"request_timeout": {
			Type:        framework.TypeDurationSecond,
			Description: "The whole time that one mint may take, repeats included: 1s to 60s.",
			Default:     defaults.RequestTimeout,
		},
		"ca_cert": {
			Type:         framework.TypeString,
			Description:  "PEM certificates to trust besides the system's, for an egress proxy that inspects TLS. Changing it needs refresh_key in the same request.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "CA certificates", EditType: "textarea"},
		},
		"disabled": {
			Type:        framework.TypeBool,
			Description: "Freeze the mount: every mint is refused.",
		},
		"refresh_key_version": {
			Type:        framework.TypeInt,
			Description: "Counts the refresh keys that were stored, from 1.",
		},
		"refresh_key_updated_at": {
			Type:        framework.TypeString, // RFC 3339
			Description: "When the refresh key was last replaced by another (RFC 3339).",
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
// validated, verified where that is asked for, stored, and only then used.
func (b *backend) pathConfigWrite(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	resp, err := b.writeConfig(ctx, req, d)
	if err != nil {
		return failed(err)
	}
	return resp, nil
}

// writeConfig is pathConfigWrite before its errors are given a status.
func (b *backend) writeConfig(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	resp := new(logical.Response)
	var verified []byte
	role, verify := d.GetOk("verify_role")
	if verify {
		// NOTE: no lock is held over a call to Cable. Who writes meanwhile wins.
		next, before, err := b.mergeStoredConfig(ctx, req, d)
		if err != nil {
			return nil, err
		}
		warning, err := b.verifyConfig(ctx, req, next, strings.TrimSpace(role.(string)))
		if err != nil {
			return nil, err
		}
		resp.AddWarning(warning)
		verified = before
	}

	b.configMu.Lock()
	defer b.configMu.Unlock()
	next, before, err := b.mergeStoredConfig(ctx, req, d)
	if err != nil {
		return nil, err
	}
	if verify && !bytes.Equal(before, verified) {
		return nil, refusal("another request wrote config while verify_role was minting: nothing was stored by this one, read config and write again; " + resp.Warnings[0])
	}
	active, err := b.activate(next, b.metrics.called)
	if err != nil {
		return nil, refusal(err.Error())
	}
	if err := setConfig(ctx, req.Storage, next); err != nil {
		b.reset() // whether it was stored is unknown: the next mint reads what is there
		for _, w := range resp.Warnings {
			b.log(req).Warn("config was not stored, but its verification minted", "detail", w)
		}
		return nil, err
	}
	b.replace(active)
	b.log(req).Info("config was written", "refresh_key_version", next.RefreshKeyVersion, "disabled", next.Disabled)
	b.sendConfigEvent(req, eventConfigWrite, next.RefreshKeyVersion)
	if v, ok := d.GetOk("disabled"); ok && v.(bool) {
		resp.AddWarning("the mount is disabled: no token is minted until disabled=false is written. " + aliveUntil(time.Now(), maxLife))
	}
	if u, err := cable.ParseTokenURL(next.TokenURL); err == nil && strings.Trim(u.Path, "/") == "" {
		resp.AddWarning("token_url has no path: it is used as it is, and Cable's endpoint has one, as in " + cable.DefaultTokenURL)
	}
	if len(resp.Warnings) == 0 {
		return nil, nil
	}
	return resp, nil
}

// mergeStoredConfig reads the stored entry and lays the request over it. It
// also returns the entry's stored bytes, to tell whether it has changed since.
func (b *backend) mergeStoredConfig(ctx context.Context, req *logical.Request, d *framework.FieldData) (*configEntry, []byte, error) {
	entry, err := req.Storage.Get(ctx, configStoragePath)
	if err != nil {
		return nil, nil, err
	}
	var cfg *configEntry
	var raw []byte
	if entry != nil {
		raw = entry.Value
		if cfg, err = decodeConfig(raw); err != nil {
			return nil, nil, err
		}
	} else if req.Operation == logical.PatchOperation {
		return nil, nil, refusal("config is not written yet: write refresh_key to config first")
	}
	next, err := cfg.merge(d, time.Now())
	return next, raw, err
}

// verifyConfig mints one token of the shortest life with settings that are not
// stored yet, drops it, and returns the warning that says so.
func (b *backend) verifyConfig(ctx context.Context, req *logical.Request, cfg *configEntry, name string) (string, error) {
	if err := checkRoleName(name); err != nil {
		return "", refusal("verify_role: " + err.Error())
	}
	role, err := getRole(ctx, req.Storage, name)
	if err != nil {
		return "", err
	}
	if role == nil {
		return "", refusal(fmt.Sprintf("verify_role %s does not exist: nothing was stored, write the role first or leave verify_role out", echo(name)))
	}
	active, err := b.activate(cfg, nil)
	if err != nil {
		return "", refusal(err.Error())
	}
	defer active.client.Close()
	r := newRecord(req, name)
	r.roleExists, r.verify = true, true
	m, err := b.mint(ctx, r, active, mintRequest{name: name, role: role, hasTTL: true, ttl: minLife})
	b.record(r, m, err)
	if err != nil {
		return "", &verifyError{cause: err, role: name}
	}
	return fmt.Sprintf("verify_role %q: Cable minted a token with these settings. It was dropped; as it cannot be revoked, it lives until %s.",
		name, m.expiresAt()), nil
}

// pathConfigDelete handles DELETE config.
func (b *backend) pathConfigDelete(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	b.configMu.Lock()
	defer b.configMu.Unlock()
	entry, err := req.Storage.Get(ctx, configStoragePath)
	if entry == nil || err != nil {
		return nil, err
	}
	err = req.Storage.Delete(ctx, configStoragePath)
	b.reset()
	if err != nil {
		return nil, err
	}
	b.log(req).Info("config was deleted")
	b.sendConfigEvent(req, eventConfigDelete, 0)
	resp := new(logical.Response)
	resp.AddWarning("the configuration is deleted: no token is minted until config is written again. " + aliveUntil(time.Now(), maxLife))
	return resp, nil
}

// aliveUntil says how long tokens may live that were minted by now, or by a
// request that is under way, if each was minted for at most life seconds.
func aliveUntil(now time.Time, life int64) string {
	return fmt.Sprintf("Tokens minted before cannot be revoked: the last of them may live until %s.",
		timestamp(now.Add(time.Duration(life+maxRequestTimeout)*time.Second)))
}

// getConfig returns the stored configuration, or nil where there is none.
func getConfig(ctx context.Context, s logical.Storage) (*configEntry, error) {
	entry, err := s.Get(ctx, configStoragePath)
	if entry == nil || err != nil {
		return nil, err // as it is: Vault reads the text of storage errors
	}
	return decodeConfig(entry.Value)
}

// setConfig stores the configuration.
func setConfig(ctx context.Context, s logical.Storage, c *configEntry) error {
	raw, err := c.encode()
	if err != nil {
		return errors.New("encoding the configuration failed")
	}
	return s.Put(ctx, &logical.StorageEntry{Key: configStoragePath, Value: raw})
}

const configHelp = `
The refresh key is stored once and never returned. A write that names some
fields keeps the others; the merged result is checked as a whole, stored, and
only then used. Changing token_url or ca_cert needs refresh_key in the same
request.

With verify_role, one token of five minutes is minted for that role with the
new settings before they are stored; if that fails, nothing is stored.

disabled=true freezes the mount: every mint is refused. Tokens that were minted
before live until their expiry, as Cable cannot revoke them.
`
