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

locals {
  plugin = "vault-plugin-secrets-cable"

  # Without the key, and without fields that are not set.
  config = { for field, value in {
    token_url       = var.token_url
    ca_cert         = var.ca_cert
    auth_scheme     = var.auth_scheme
    organization_id = var.organization_id
    request_timeout = var.request_timeout
    disabled        = var.disabled
  } : field => value if value != null }
}

# One entry for each version. The previous one stays, to roll back to.
resource "vault_plugin" "cable" {
  for_each = var.plugin_versions

  type    = "secret"
  name    = local.plugin
  version = each.key
  sha256  = each.value.sha256
  command = coalesce(each.value.command, "${local.plugin}-${each.key}")
}

resource "vault_mount" "cable" {
  path           = var.path
  type           = local.plugin
  plugin_version = vault_plugin.cable[var.plugin_version].version

  default_lease_ttl_seconds    = var.default_lease_ttl
  max_lease_ttl_seconds        = var.max_lease_ttl
  allowed_response_headers     = ["Retry-After"]
  audit_non_hmac_response_keys = ["expires_at", "organization_id", "scopes"]
}

# The mount runs another version only after a reload.
resource "vault_generic_endpoint" "reload" {
  path           = "sys/plugins/reload/backend"
  disable_read   = true
  disable_delete = true
  data_json      = jsonencode({ plugin = local.plugin, scope = "global" })

  lifecycle {
    replace_triggered_by = [vault_mount.cable.plugin_version]
  }
}

# Lists sorted and durations in seconds, as a read returns them.
resource "vault_generic_endpoint" "role" {
  for_each   = var.roles
  depends_on = [vault_generic_endpoint.reload]

  path                 = "${vault_mount.cable.path}/roles/${each.key}"
  ignore_absent_fields = true
  data_json = jsonencode({ for field, value in {
    organization_id = each.value.organization_id
    scopes          = sort(each.value.scopes)
    ttl             = each.value.ttl
    max_ttl         = each.value.max_ttl
    reuse_for       = each.value.reuse_for
    disabled        = each.value.disabled
  } : field => value if value != null })
}

# Replaced when the version is raised: then its id is unknown until the apply, so
# the write below waits for it, and a plan sends no key.
resource "terraform_data" "refresh_key" {
  triggers_replace = var.refresh_key_version
}

# An ephemeral resource is in no state and no plan file, and has no memory:
# without count it would write the key in each plan and each apply.
ephemeral "vault_generic_endpoint" "refresh_key" {
  count      = var.write_refresh_key ? 1 : 0
  depends_on = [vault_generic_endpoint.role]

  mount_id = terraform_data.refresh_key.id
  path     = "${vault_mount.cable.path}/config"
  data_json = jsonencode(merge(local.config, {
    refresh_key = var.refresh_key
    verify_role = var.verify_role
  }))
}

# OpenTofu opens an ephemeral resource in an apply only if something depends on it
# that the apply changes.
resource "terraform_data" "refresh_key_written" {
  depends_on       = [ephemeral.vault_generic_endpoint.refresh_key]
  triggers_replace = var.refresh_key_version
}

resource "vault_generic_endpoint" "config" {
  depends_on = [terraform_data.refresh_key_written]

  path                 = "${vault_mount.cable.path}/config"
  ignore_absent_fields = true
  disable_delete       = true # the key goes with the mount
  data_json            = jsonencode(local.config)
}
