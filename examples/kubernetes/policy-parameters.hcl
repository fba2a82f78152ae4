# Copyright (c) The vault-plugin-secrets-cable authors
# SPDX-License-Identifier: MPL-2.0

# For consumers that send parameters in a body: they may choose the lifetime, not
# the scopes.
path "cable/creds/reports" {
  capabilities       = ["update"]
  allowed_parameters = {
    "ttl" = []
  }
}
