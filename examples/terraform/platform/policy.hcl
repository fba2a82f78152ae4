# Copyright (c) The vault-plugin-secrets-cable authors
# SPDX-License-Identifier: MPL-2.0

# The provider works with a child token.
path "auth/token/create" {
  capabilities = ["update"]
}

path "sys/plugins/catalog/secret/vault-plugin-secrets-cable" {
  capabilities = ["read", "update", "delete", "sudo"]
}
path "sys/plugins/reload/backend" {
  capabilities = ["update"]
}
path "sys/mounts/cable" {
  capabilities = ["read", "update", "delete"]
}
path "sys/mounts/cable/tune" {
  capabilities = ["update"]
}

path "cable/roles/*" {
  capabilities = ["create", "read", "update", "delete"]
}
path "cable/config" {
  capabilities = ["read", "update"]
}
