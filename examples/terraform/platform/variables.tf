# Copyright (c) The vault-plugin-secrets-cable authors
# SPDX-License-Identifier: MPL-2.0

variable "plugin_versions" {
  description = "The versions to register: the file's SHA-256, and its name if it is not vault-plugin-secrets-cable-VERSION."
  type = map(object({
    sha256  = string
    command = optional(string)
  }))
}

variable "plugin_version" {
  description = "The version that the mount runs, one of plugin_versions."
  type        = string
}

variable "path" {
  description = "Where the engine is mounted."
  type        = string
  default     = "cable"
}

variable "default_lease_ttl" {
  description = "Lifetime of tokens whose role has no ttl, in seconds."
  type        = number
  default     = 3600
}

variable "max_lease_ttl" {
  description = "Ceiling of all lifetimes, in seconds. Cable issues tokens for at most a day."
  type        = number
  default     = 86400
}

variable "roles" {
  description = "The roles by name. Durations in seconds; 0 is the default of ttl and max_ttl, and switches reuse_for off."
  type = map(object({
    organization_id = optional(string)
    scopes          = set(string)
    ttl             = optional(number, 0)
    max_ttl         = optional(number, 0)
    reuse_for       = optional(number, 0)
    disabled        = optional(bool, false)
  }))
}

variable "token_url" {
  description = "Where Cable, or your gateway to it, is."
  type        = string
  default     = "https://api.cable.tech/v2/auth/token"
}

variable "ca_cert" {
  description = "PEM certificates to trust in addition to the system's."
  type        = string
  default     = ""
}

variable "auth_scheme" {
  description = "raw or bearer."
  type        = string
  default     = "raw"
}

variable "organization_id" {
  description = "The organization of roles that name none."
  type        = string
  default     = null
}

variable "request_timeout" {
  description = "Time for one token request, in seconds."
  type        = number
  default     = 20
}

variable "disabled" {
  description = "Refuse every token request of the mount."
  type        = bool
  default     = false
}

variable "refresh_key_version" {
  description = "Raise it to write another key."
  type        = number
  default     = 1
}

variable "write_refresh_key" {
  description = "Whether this run writes the key."
  type        = bool
  default     = false
}

variable "refresh_key" {
  description = "The key, for a run with write_refresh_key: from the environment, as TF_VAR_refresh_key."
  type        = string
  default     = ""
  ephemeral   = true
  sensitive   = true

  validation {
    condition     = (var.refresh_key != "") == var.write_refresh_key
    error_message = "write_refresh_key=true needs refresh_key, and refresh_key is of use with it alone."
  }
}

variable "verify_role" {
  description = "The role that the engine mints a token for before it stores a key."
  type        = string
}
