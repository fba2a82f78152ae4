#!/bin/sh
# Copyright (c) The vault-plugin-secrets-cable authors
# SPDX-License-Identifier: MPL-2.0
#
# What needs a token: Terraform passes it in CABLE_TOKEN.
set -eu

echo "a Cable token of ${#CABLE_TOKEN} characters" > report.txt
