# Copyright (c) The vault-plugin-secrets-cable authors
# SPDX-License-Identifier: MPL-2.0

terraform {
  required_version = ">= 1.11"

  required_providers {
    vault = {
      source  = "hashicorp/vault"
      version = ">= 5.10"
    }
  }
}

provider "vault" {} # VAULT_ADDR, VAULT_TOKEN, VAULT_MAX_RETRIES=0

variable "revision" {
  description = "Raise it to run the report again."
  type        = number
  default     = 1
}

# In no state and no plan file. Read in each plan and in each apply.
ephemeral "vault_generic_secret" "cable" {
  path = "cable/creds/reports"
}

resource "terraform_data" "report" {
  triggers_replace = var.revision

  provisioner "local-exec" {
    command = "sh ./report.sh"
    environment = {
      CABLE_TOKEN = ephemeral.vault_generic_secret.cable.data["token"]
    }
  }
}
