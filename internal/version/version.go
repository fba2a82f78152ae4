// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Package version knows which build this is. Builds from different commits have
// different versions, because Go itself gives a version to each build.
package version

import (
	"runtime/debug"
	"strings"
)

const (
	module      = "github.com/cablesecrets/vault-plugin-secrets-cable"
	development = "v0.0.0-dev" // of a build outside version control
)

// stamped and commit are set by builds to which Go gives no version, with
// -ldflags "-X …/vault-plugin-secrets-cable/internal/version.stamped=v1.2.3 -X ….commit=…".
var stamped, commit string

// String returns the engine's version, a canonical semantic version with a leading v, as Vault requires it for a
// plugin's registration. It is a tag, or a pseudo-version with the commit (v0.1.1-0.20261125031400-54458d99f6f7), or
// either with "dirty" for a changed work tree.
func String() string {
	info, _ := debug.ReadBuildInfo()
	return version(stamped, info)
}

func version(stamped string, info *debug.BuildInfo) string {
	switch {
	case stamped != "":
		return stamped
	case info == nil || info.Main.Path != module || !strings.HasPrefix(info.Main.Version, "v"):
		return development
	}
	// Go writes "+dirty". A version with "+" does not sort, and Vault compares it as text.
	dirty := "-dirty"
	if strings.Contains(info.Main.Version, "-") {
		dirty = ".dirty"
	}
	return strings.Replace(info.Main.Version, "+dirty", dirty, 1)
}

// Commit returns the first 12 digits of the commit, or "unknown".
func Commit() string {
	if commit != "" {
		return commit
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				return s.Value[:min(12, len(s.Value))]
			}
		}
	}
	return "unknown"
}
