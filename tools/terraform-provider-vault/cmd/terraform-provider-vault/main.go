// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Command terraform-provider-vault is what the end-to-end tests run in place of
// the Vault provider of Terraform, whose current version is in no module proxy.
//
// It is the provider of version 3.3.1, the newest that is, with its own
// connection, child token and vault_generic_endpoint. What came later and the
// modules in examples/terraform use is added here, after the documentation and
// source of version 5: attributes and requests, but only as far as they are
// used, and without namespaces.
//
//   - vault_plugin
//   - vault_mount: plugin_version, allowed_response_headers, and a read of one
//     mount
//   - ephemeral vault_generic_secret and vault_generic_endpoint (server.go)
package main

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/hashicorp/terraform-plugin-go/tfprotov5"
	"github.com/hashicorp/terraform-plugin-go/tfprotov5/tf5server"
	"github.com/hashicorp/terraform-plugin-sdk/v2/diag"
	"github.com/hashicorp/terraform-plugin-sdk/v2/helper/schema"
	upstream "github.com/hashicorp/terraform-provider-vault/schema"
	"github.com/hashicorp/terraform-provider-vault/vault"
	"github.com/hashicorp/vault/api"
)

func main() {
	p := upstream.NewProvider(vault.Provider()).SchemaProvider()
	p.ResourcesMap["vault_plugin"] = pluginResource()
	p.ResourcesMap["vault_mount"] = mountResource()
	client := func() *api.Client { return p.Meta().(*api.Client) }
	err := tf5server.Serve("registry.terraform.io/hashicorp/vault", func() tfprotov5.ProviderServer {
		return &server{ProviderServer: schema.NewGRPCProviderServer(p), client: client}
	})
	if err != nil {
		panic(err)
	}
}

// attribute is an argument of a resource.
func attribute(kind schema.ValueType, required, forceNew bool) *schema.Schema {
	s := &schema.Schema{Type: kind, Required: required, Optional: !required, ForceNew: forceNew}
	if kind == schema.TypeList {
		s.Elem = &schema.Schema{Type: schema.TypeString}
	}
	return s
}

// pluginResource is an entry in the catalog of plugins.
func pluginResource() *schema.Resource {
	path := func(d *schema.ResourceData) string {
		return fmt.Sprintf("sys/plugins/catalog/%s/%s", d.Get("type"), d.Get("name"))
	}
	read := func(_ context.Context, d *schema.ResourceData, meta any) diag.Diagnostics {
		s, err := meta.(*api.Client).Logical().ReadWithData(path(d), map[string][]string{"version": {d.Get("version").(string)}})
		if err != nil {
			return diag.FromErr(err)
		}
		if s == nil {
			d.SetId("")
			return nil
		}
		for _, name := range []string{"sha256", "command"} {
			if err := d.Set(name, s.Data[name]); err != nil {
				return diag.FromErr(err)
			}
		}
		return nil
	}
	write := func(ctx context.Context, d *schema.ResourceData, meta any) diag.Diagnostics {
		body := map[string]any{"type": d.Get("type"), "version": d.Get("version"), "sha256": d.Get("sha256"), "command": d.Get("command")}
		if env := d.Get("env").([]any); len(env) > 0 {
			body["env"] = env
		}
		if _, err := meta.(*api.Client).Logical().Write(path(d), body); err != nil {
			return diag.FromErr(err)
		}
		d.SetId(fmt.Sprintf("%s/version/%s/name/%s", d.Get("type"), d.Get("version"), d.Get("name")))
		return read(ctx, d, meta)
	}
	return &schema.Resource{
		CreateContext: write,
		UpdateContext: write,
		ReadContext:   read,
		DeleteContext: func(_ context.Context, d *schema.ResourceData, meta any) diag.Diagnostics {
			_, err := meta.(*api.Client).Logical().DeleteWithData(path(d), map[string][]string{"version": {d.Get("version").(string)}})
			return diag.FromErr(err)
		},
		Schema: map[string]*schema.Schema{
			"type":    attribute(schema.TypeString, true, true),
			"name":    attribute(schema.TypeString, true, true),
			"version": attribute(schema.TypeString, false, true),
			"sha256":  attribute(schema.TypeString, false, false),
			"command": attribute(schema.TypeString, false, false),
			"env":     attribute(schema.TypeList, false, false),
		},
	}
}

// mountResource is a mount. As in version 5, a read does not learn which version
// of the plugin runs.
func mountResource() *schema.Resource {
	lists := []string{"audit_non_hmac_request_keys", "audit_non_hmac_response_keys", "allowed_response_headers"}
	read := func(_ context.Context, d *schema.ResourceData, meta any) diag.Diagnostics {
		s, err := meta.(*api.Client).Logical().Read("sys/mounts/" + d.Id())
		if err != nil || s == nil {
			d.SetId("")
			return nil
		}
		config, _ := s.Data["config"].(map[string]any)
		seconds := func(name string) int64 {
			n, _ := config[name].(json.Number)
			i, _ := n.Int64()
			return i
		}
		values := map[string]any{
			"path": d.Id(), "type": s.Data["type"], "description": s.Data["description"], "accessor": s.Data["accessor"],
			"default_lease_ttl_seconds": seconds("default_lease_ttl"), "max_lease_ttl_seconds": seconds("max_lease_ttl"),
		}
		for _, name := range lists {
			values[name] = config[name]
		}
		for name, value := range values {
			if err := d.Set(name, value); err != nil {
				return diag.FromErr(err)
			}
		}
		return nil
	}
	tuning := func(d *schema.ResourceData, all bool) map[string]any {
		config := map[string]any{
			"default_lease_ttl": fmt.Sprintf("%ds", d.Get("default_lease_ttl_seconds")), "max_lease_ttl": fmt.Sprintf("%ds", d.Get("max_lease_ttl_seconds")),
		}
		for _, name := range append([]string{"plugin_version"}, lists...) {
			if v, ok := d.GetOk(name); all && ok || !all && d.HasChange(name) {
				config[name] = v
			}
		}
		return config
	}
	client := func(meta any) *api.Logical { return meta.(*api.Client).Logical() }
	return &schema.Resource{
		CreateContext: func(ctx context.Context, d *schema.ResourceData, meta any) diag.Diagnostics {
			path := d.Get("path").(string)
			body := map[string]any{"type": d.Get("type"), "description": d.Get("description"), "config": tuning(d, true)}
			if _, err := client(meta).Write("sys/mounts/"+path, body); err != nil {
				return diag.FromErr(err)
			}
			d.SetId(path)
			return read(ctx, d, meta)
		},
		UpdateContext: func(ctx context.Context, d *schema.ResourceData, meta any) diag.Diagnostics {
			body := tuning(d, false)
			if d.HasChange("description") {
				body["description"] = d.Get("description")
			}
			if _, err := client(meta).Write("sys/mounts/"+d.Id()+"/tune", body); err != nil {
				return diag.FromErr(err)
			}
			return read(ctx, d, meta)
		},
		ReadContext: read,
		DeleteContext: func(_ context.Context, d *schema.ResourceData, meta any) diag.Diagnostics {
			_, err := client(meta).Delete("sys/mounts/" + d.Id())
			return diag.FromErr(err)
		},
		Schema: map[string]*schema.Schema{
			"path":                         attribute(schema.TypeString, true, true), // version 5 moves the mount
			"type":                         attribute(schema.TypeString, true, true),
			"description":                  attribute(schema.TypeString, false, false),
			"default_lease_ttl_seconds":    {Type: schema.TypeInt, Optional: true, Computed: true},
			"max_lease_ttl_seconds":        {Type: schema.TypeInt, Optional: true, Computed: true},
			"audit_non_hmac_request_keys":  {Type: schema.TypeList, Optional: true, Computed: true, Elem: &schema.Schema{Type: schema.TypeString}},
			"audit_non_hmac_response_keys": {Type: schema.TypeList, Optional: true, Computed: true, Elem: &schema.Schema{Type: schema.TypeString}},
			"allowed_response_headers":     attribute(schema.TypeList, false, false),
			"plugin_version":               attribute(schema.TypeString, false, false),
			"accessor":                     {Type: schema.TypeString, Computed: true},
		},
	}
}
