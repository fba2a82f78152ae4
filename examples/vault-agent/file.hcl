# Copyright (c) The vault-plugin-secrets-cable authors
# SPDX-License-Identifier: MPL-2.0

# Writes each new token to app.env, for as long as it runs.

template_config {
  exit_on_retry_failure   = true
  lease_renewal_threshold = 0.75
}

template {
  destination          = "app.env"
  perms                = "0600"
  error_on_missing_key = true
  contents             = <<TPL
{{ with secret "cable/creds/reports" -}}
CABLE_TOKEN={{ .Data.token }}
CABLE_TOKEN_EXPIRES_AT={{ .Data.expires_at }}
CABLE_SCOPE="{{ .Data.scope }}"
{{ end -}}
TPL
}
