// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// An application that uses Cable's access tokens from Vault, at VAULT_ADDR with
// VAULT_TOKEN. Copy tokensource.go; this file shows its use.
package main

import (
	"context"
	"log"
	"os"
	"os/signal"
	"time"

	"github.com/hashicorp/vault/api"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := work(ctx)
	interrupted := ctx.Err() != nil
	stop()
	if err != nil && !interrupted {
		log.Fatal(err)
	}
}

// work stands for the work of the application, once a second.
func work(ctx context.Context) error {
	client, err := api.NewClient(nil) // reads VAULT_ADDR, VAULT_TOKEN, …
	if err != nil {
		return err
	}
	tokens := NewTokenSource(ctx, client, "cable/creds/reports")
	for ctx.Err() == nil {
		token, validUntil, err := tokens.Token(ctx)
		if err != nil {
			return err
		}
		_ = token // goes into the Authorization header of a request to Cable
		log.Printf("have a token that is valid until %s", validUntil.Format(time.RFC3339))
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
		}
	}
	return nil
}
