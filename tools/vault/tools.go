// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

//go:build tools

// Package tools pins the Vault server that the end-to-end tests and the demo
// run; see go.mod for the version and scripts/vault for how it is built.
package tools

import _ "github.com/hashicorp/vault"
