# Copyright (c) The vault-plugin-secrets-cable authors
# SPDX-License-Identifier: MPL-2.0

# Writes one token to app.env and exits: for an init container, or before a job.
exit_after_auth = true

auto_auth {
  method "approle" {
    config = {
      role_id_file_path   = "role-id"
      secret_id_file_path = "secret-id"
    }
  }
}

template_config {
  exit_on_retry_failure = true
}

template {
  destination          = "app.env"
  perms                = "0600"
  error_on_missing_key = true
  contents             = "CABLE_TOKEN={{ with secret \"cable/creds/reports\" }}{{ .Data.token }}{{ end }}\n"
}
