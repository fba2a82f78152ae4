// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Command floor is a secrets engine that only returns a constant, as a leased
// secret or at creds/unleased without a lease, so a read of it costs no more than
// Vault and the plugin protocol do. The benchmark compares the real engine with it.
package main

import (
	"context"
	"os"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/plugin"
)

func main() {
	logger := hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, Output: os.Stderr, JSONFormat: true})
	if err := plugin.ServeMultiplex(&plugin.ServeOpts{BackendFactoryFunc: factory, Logger: logger}); err != nil {
		logger.Error("the plugin cannot be served", "error", err)
		os.Exit(1)
	}
}

func factory(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
	secret := &framework.Secret{
		Type: "constant",
		Revoke: func(context.Context, *logical.Request, *framework.FieldData) (*logical.Response, error) {
			return nil, nil
		},
	}
	read := func(_ context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
		data := map[string]any{
			"token": "constant", "expiry": 1999999999, "expires_at": "2033-05-18T03:33:19Z", "organization_id": "org",
			"organization_name": "Organization", "scopes": []string{"person:read", "transactions:read"},
		}
		if d.Get("name") == "unleased" {
			return &logical.Response{Data: data}, nil
		}
		resp := secret.Response(data, map[string]any{"role": "constant"})
		resp.Secret.TTL = time.Hour
		return resp, nil
	}
	b := &framework.Backend{
		BackendType:    logical.TypeLogical,
		RunningVersion: "v0.0.1",
		Secrets:        []*framework.Secret{secret},
		Paths: []*framework.Path{{
			Pattern: "creds/" + framework.GenericNameRegex("name"),
			Fields:  map[string]*framework.FieldSchema{"name": {Type: framework.TypeString}},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: &framework.PathOperation{Callback: read},
			},
		}},
	}
	return b, b.Setup(ctx, conf)
}
