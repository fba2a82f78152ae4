# Copyright (c) The vault-plugin-secrets-cable authors
# SPDX-License-Identifier: MPL-2.0

path "cable/creds/reports" {
  capabilities = ["read"]
}
