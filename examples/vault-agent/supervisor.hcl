# Copyright (c) The vault-plugin-secrets-cable authors
# SPDX-License-Identifier: MPL-2.0

# Starts ./app with the token in its environment, and again for each new token.

# No exit_on_retry_failure: Agent would exit, and leave the application behind.
template_config {
  lease_renewal_threshold = 0.75
}

env_template "CABLE_TOKEN" {
  error_on_missing_key = true
  contents             = "{{ with secret \"cable/creds/reports\" }}{{ .Data.token }}{{ end }}"
}

env_template "CABLE_TOKEN_EXPIRES_AT" {
  error_on_missing_key = true
  contents             = "{{ with secret \"cable/creds/reports\" }}{{ .Data.expires_at }}{{ end }}"
}

exec {
  command                   = ["./app"]
  restart_on_secret_changes = "always"
  restart_stop_signal       = "SIGTERM"
}
