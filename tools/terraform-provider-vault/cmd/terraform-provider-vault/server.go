// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"github.com/hashicorp/terraform-plugin-go/tfprotov5"
	"github.com/hashicorp/terraform-plugin-go/tftypes"
	"github.com/hashicorp/vault/api"
)

// server adds ephemeral resources to the provider.
type server struct {
	tfprotov5.ProviderServer
	client func() *api.Client
}

// field is an attribute of an ephemeral resource.
type field struct {
	kind                          tftypes.Type
	required, computed, sensitive bool
}

var (
	text  = field{kind: tftypes.String}
	texts = tftypes.Map{ElementType: tftypes.String}
)

// ephemerals are the ephemeral resources, by their attributes.
var ephemerals = map[string]map[string]field{
	"vault_generic_secret": {
		"mount_id": text, "namespace": text, "path": {kind: tftypes.String, required: true},
		"version": {kind: tftypes.Number}, "with_lease_start_time": {kind: tftypes.Bool},
		"data": {kind: texts, computed: true, sensitive: true}, "data_json": {kind: tftypes.String, computed: true, sensitive: true},
		"lease_id": {kind: tftypes.String, computed: true}, "lease_duration": {kind: tftypes.Number, computed: true},
		"lease_start_time": {kind: tftypes.String, computed: true}, "lease_renewable": {kind: tftypes.Bool, computed: true},
	},
	"vault_generic_endpoint": {
		"mount_id": text, "namespace": text, "path": {kind: tftypes.String, required: true}, "path_wrap_ttl": text,
		"data_json": {kind: tftypes.String, required: true, sensitive: true}, "write_fields": {kind: tftypes.List{ElementType: tftypes.String}},
		"write_data": {kind: texts, computed: true, sensitive: true}, "write_data_json": {kind: tftypes.String, computed: true, sensitive: true},
	},
}

// objectType is the type of an ephemeral resource's value.
func objectType(name string) tftypes.Object {
	types := map[string]tftypes.Type{}
	for attribute, f := range ephemerals[name] {
		types[attribute] = f.kind
	}
	return tftypes.Object{AttributeTypes: types}
}

// GetProviderSchema adds the ephemeral resources.
func (s *server) GetProviderSchema(ctx context.Context, r *tfprotov5.GetProviderSchemaRequest) (*tfprotov5.GetProviderSchemaResponse, error) {
	resp, err := s.ProviderServer.GetProviderSchema(ctx, r)
	if err != nil {
		return nil, err
	}
	resp.EphemeralResourceSchemas = map[string]*tfprotov5.Schema{}
	for name, fields := range ephemerals {
		block := &tfprotov5.SchemaBlock{}
		for _, attribute := range slices.Sorted(maps.Keys(fields)) {
			f := fields[attribute]
			block.Attributes = append(block.Attributes, &tfprotov5.SchemaAttribute{
				Name: attribute, Type: f.kind, Required: f.required, Optional: !f.required && !f.computed, Computed: f.computed, Sensitive: f.sensitive,
			})
		}
		resp.EphemeralResourceSchemas[name] = &tfprotov5.Schema{Block: block}
	}
	return resp, nil
}

// GetMetadata adds the ephemeral resources.
func (s *server) GetMetadata(ctx context.Context, r *tfprotov5.GetMetadataRequest) (*tfprotov5.GetMetadataResponse, error) {
	resp, err := s.ProviderServer.GetMetadata(ctx, r)
	if err != nil {
		return nil, err
	}
	for name := range ephemerals {
		resp.EphemeralResources = append(resp.EphemeralResources, tfprotov5.EphemeralResourceMetadata{TypeName: name})
	}
	return resp, nil
}

// ValidateEphemeralResourceConfig accepts what fits the schema.
func (s *server) ValidateEphemeralResourceConfig(context.Context, *tfprotov5.ValidateEphemeralResourceConfigRequest) (*tfprotov5.ValidateEphemeralResourceConfigResponse, error) {
	return &tfprotov5.ValidateEphemeralResourceConfigResponse{}, nil
}

// OpenEphemeralResource makes the request to Vault.
func (s *server) OpenEphemeralResource(_ context.Context, r *tfprotov5.OpenEphemeralResourceRequest) (*tfprotov5.OpenEphemeralResourceResponse, error) {
	result, err := s.open(r)
	if err != nil {
		return &tfprotov5.OpenEphemeralResourceResponse{Diagnostics: []*tfprotov5.Diagnostic{
			{Severity: tfprotov5.DiagnosticSeverityError, Summary: "Request to Vault failed", Detail: err.Error()},
		}}, nil
	}
	return &tfprotov5.OpenEphemeralResourceResponse{Result: result}, nil
}

// open returns the value of an ephemeral resource.
func (s *server) open(r *tfprotov5.OpenEphemeralResourceRequest) (*tfprotov5.DynamicValue, error) {
	kind := objectType(r.TypeName)
	config, err := r.Config.Unmarshal(kind)
	if err != nil {
		return nil, err
	}
	values := map[string]tftypes.Value{}
	if err := config.As(&values); err != nil {
		return nil, err
	}
	argument := func(name string) (s string) {
		if v := values[name]; !v.IsNull() {
			err = v.As(&s)
		}
		return s
	}
	var secret *api.Secret
	path := argument("path")
	if r.TypeName == "vault_generic_secret" {
		if secret, err = s.client().Logical().Read(path); err == nil && secret == nil {
			err = fmt.Errorf("%s has no value", path)
		}
	} else {
		var body map[string]any
		if err := json.Unmarshal([]byte(argument("data_json")), &body); err != nil {
			return nil, err
		}
		secret, err = s.client().Logical().Write(path, body)
	}
	if err != nil {
		return nil, err
	}
	if secret == nil {
		secret = &api.Secret{}
	}
	var wanted []tftypes.Value
	if v := values["write_fields"]; v.IsKnown() && !v.IsNull() {
		if err := v.As(&wanted); err != nil {
			return nil, err
		}
	}
	all := map[string]tftypes.Value{}
	for name, v := range secret.Data {
		value, ok := v.(string)
		if !ok {
			data, err := json.Marshal(v)
			if err != nil {
				return nil, err
			}
			value = string(data)
		}
		all[name] = tftypes.NewValue(tftypes.String, value)
	}
	data, err := json.Marshal(secret.Data)
	if err != nil {
		return nil, err
	}
	if r.TypeName == "vault_generic_secret" {
		values["data"] = tftypes.NewValue(texts, all)
		values["data_json"] = tftypes.NewValue(tftypes.String, string(data))
		values["lease_id"] = tftypes.NewValue(tftypes.String, secret.LeaseID)
		values["lease_duration"] = tftypes.NewValue(tftypes.Number, secret.LeaseDuration)
		values["lease_renewable"] = tftypes.NewValue(tftypes.Bool, secret.Renewable)
	} else {
		picked := map[string]tftypes.Value{}
		for _, v := range wanted {
			var name string
			if err := v.As(&name); err != nil {
				return nil, err
			}
			if value, ok := all[name]; ok {
				picked[name] = value
			}
		}
		values["write_data"] = tftypes.NewValue(texts, picked)
		values["write_data_json"] = tftypes.NewValue(tftypes.String, "null")
	}
	result, err := tfprotov5.NewDynamicValue(kind, tftypes.NewValue(kind, values))
	return &result, err
}

// RenewEphemeralResource does nothing.
func (s *server) RenewEphemeralResource(context.Context, *tfprotov5.RenewEphemeralResourceRequest) (*tfprotov5.RenewEphemeralResourceResponse, error) {
	return &tfprotov5.RenewEphemeralResourceResponse{}, nil
}

// CloseEphemeralResource does nothing: version 5 does not revoke leases.
func (s *server) CloseEphemeralResource(context.Context, *tfprotov5.CloseEphemeralResourceRequest) (*tfprotov5.CloseEphemeralResourceResponse, error) {
	return &tfprotov5.CloseEphemeralResourceResponse{}, nil
}
