// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package vaulttest

import (
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"time"
)

// Product is who made a server, by what the server says of itself. Whatever
// depends on it is a method here.
//
// NOTE: one difference needs no method, as waiting is right for both: standbys
// of OpenBao serve reads themselves, and learn of a new mount, configuration or
// role some tenths of a second after the active node.
type Product string

// The products that the plugin runs on.
const (
	Vault   Product = "Vault"
	OpenBao Product = "OpenBao"
)

// versionLine is what `vault version` prints.
var versionLine = regexp.MustCompile(`^(Vault|OpenBao) v(\S+)`)

// identify asks a binary which server it is.
func identify(ctx context.Context, binary string) (product Product, version string, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, binary, "version").Output()
	if err != nil {
		return "", "", fmt.Errorf("%s version: %w", binary, err)
	}
	m := versionLine.FindStringSubmatch(string(out))
	if m == nil {
		return "", "", fmt.Errorf("%s is neither Vault nor OpenBao: its version is %q", binary, out)
	}
	return Product(m[1]), m[2], nil
}

// configuration is what the server needs in its configuration file beyond what
// all servers need. OpenBao 2.3.2 and later enable no audit device over the API
// without it; earlier ones warn that they do not know it.
func (p Product) configuration() string {
	if p == OpenBao {
		return "unsafe_allow_api_audit_creation = true\n"
	}
	return ""
}

// TokenPrefix is what service tokens begin with, wrapping tokens included.
func (p Product) TokenPrefix() string {
	if p == OpenBao {
		return "s."
	}
	return "hvs."
}
