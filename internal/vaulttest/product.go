// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package vaulttest

import (
	"context"
	"fmt"
	"net/http"
	"os/exec"
	"regexp"
	"strings"
	"time"
)

// Product is the maker of a server, as the server names it. All that depends on it is
// a method here.
//
// NOTE: two differences need no method, because one test is right for all servers.
// OpenBao's standbys learn of a new configuration or role some tenths of a second after
// the active node, so tests wait for each node; and a path that a server does not have
// is, on its command line, "No value found".
type Product string

// The products that the plugin runs on.
const (
	Vault   Product = "Vault"
	OpenBao Product = "OpenBao"
)

// versionLine matches the output of `vault version`, as "Vault v1.21.2, built …".
var versionLine = regexp.MustCompile(`^(Vault|OpenBao) v([^\s,]+)`)

// Identify asks a binary which server it is.
func Identify(ctx context.Context, binary string) (product Product, version string, err error) {
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

// configuration is the part of the configuration file that only this product needs.
// OpenBao 2.3.2 and later enable no audit device over the API without it; earlier ones
// warn that they do not know it.
func (p Product) configuration() string {
	if p == OpenBao {
		return "unsafe_allow_api_audit_creation = true\n"
	}
	return ""
}

// TokenPrefix is the beginning of service tokens, wrapping tokens included.
func (p Product) TokenPrefix() string {
	if p == OpenBao {
		return "s."
	}
	return "hvs."
}

// Feature is something that not all servers have.
type Feature int

// The features that tests ask for.
const (
	MemoryLock       Feature = iota // the server locks its memory, and plugins theirs
	PinnedVersions                  // sys/plugins/pins
	RenewalThreshold                // lease_renewal_threshold of its Agent
	DeclaredPlugins                 // plugin and initialize blocks in its configuration
	Namespaces                      // sys/namespaces
)

// Lacks returns why the tests of a feature do not apply to a version of the
// server, or "".
func (p Product) Lacks(version string, f Feature) string {
	switch {
	case p == Vault && f == RenewalThreshold && strings.HasPrefix(version, "1.16."):
		return "Agent of Vault 1.16 ignores lease_renewal_threshold"
	case p == Vault && f == DeclaredPlugins:
		return "Vault's configuration declares no plugins"
	case p == Vault && f == Namespaces:
		return "Vault Community has no namespaces"
	case f == DeclaredPlugins && !p.ReloadsOneNode(version):
		return "OpenBao declares plugins from 2.5 on"
	case p != OpenBao:
		return ""
	case f == RenewalThreshold:
		return "OpenBao's Agent ignores lease_renewal_threshold"
	case f == MemoryLock:
		return "OpenBao locks no memory, and refuses disable_mlock = false"
	case f == PinnedVersions:
		return "OpenBao does not pin plugin versions"
	}
	return ""
}

// ReloadsOneNode reports whether a reload concerns only the node that receives it,
// because standbys serve reads and run the plugin themselves: they have to be restarted.
func (p Product) ReloadsOneNode(version string) bool {
	return p == OpenBao && !regexp.MustCompile(`^2\.[0-4]\.`).MatchString(version)
}

// DropsRequests reports whether a server that is told to end closes the connections
// of the requests under way, for which Vault waits.
func (p Product) DropsRequests() bool { return p == OpenBao }

// Unaware reports whether a response comes from a standby that serves requests
// itself and is about to learn of a new or changed mount. Standbys of OpenBao
// 2.5 and later do so.
func (p Product) Unaware(status int, text string) bool {
	return p == OpenBao && status == http.StatusNotFound && strings.Contains(text, "no handler for route")
}

// ReloadUnlocks reports whether a mount whose plugin did not start may take writes
// after a reload, before a step-down, as on newer versions of OpenBao.
func (p Product) ReloadUnlocks() bool { return p == OpenBao }
