# Copyright (c) The vault-plugin-secrets-cable authors
# SPDX-License-Identifier: MPL-2.0

# How an Agent logs in that runs until it is ended: file.hcl, supervisor.hcl.
auto_auth {
  method "approle" {
    config = {
      role_id_file_path   = "role-id"
      secret_id_file_path = "secret-id"

      remove_secret_id_file_after_reading = false # Agent may be started again
    }
  }
}
