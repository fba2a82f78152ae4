# Copyright (c) The vault-plugin-secrets-cable authors
# SPDX-License-Identifier: MPL-2.0

# Writes each new token to app.env, for as long as it runs. The Vault token is
# in the variable VAULT_TOKEN.
vault {
  renew_token             = true
  lease_renewal_threshold = 0.75

  retry {
    attempts    = 12
    backoff     = "250ms"
    max_backoff = "1m"
  }
}

template {
  destination          = "app.env"
  perms                = 0600
  error_on_missing_key = true
  contents             = <<TPL
{{ with secret "cable/creds/reports" -}}
CABLE_TOKEN={{ .Data.token }}
CABLE_SCOPE="{{ .Data.scope }}"
{{ end -}}
TPL
}
