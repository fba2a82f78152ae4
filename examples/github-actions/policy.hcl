# Copyright (c) The vault-plugin-secrets-cable authors
# SPDX-License-Identifier: MPL-2.0

# One lifetime, and the role's scopes.
path "cable/creds/ci" {
  capabilities       = ["read"]
  allowed_parameters = {
    "ttl" = ["10m"]
  }
}

path "auth/token/revoke-self" {
  capabilities = ["update"]
}
