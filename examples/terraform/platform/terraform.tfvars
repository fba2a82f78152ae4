# Copyright (c) The vault-plugin-secrets-cable authors
# SPDX-License-Identifier: MPL-2.0

plugin_version = "v0.1.0"
plugin_versions = {
  "v0.1.0" = { sha256 = "0000000000000000000000000000000000000000000000000000000000000000" } # put the sum there
}

organization_id = "org_9f8b7c6d5e4a3b2c1d0e"
verify_role     = "reports"

roles = {
  reports = {
    scopes    = ["transactions:read", "person:read"]
    ttl       = 3600
    reuse_for = 300
  }
  ci = {
    scopes = ["transactions:read"]
    ttl    = 600
  }
}
