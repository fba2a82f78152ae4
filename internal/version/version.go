// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Package version knows which build this is.
package version

import (
	"runtime/debug"
	"strings"
)

// release is the version that this source is, or will become.
const release = "v0.1.0"

// stamped and commit are set at build, with
// -ldflags "-X …/vault-plugin-secrets-cable/internal/version.stamped=v1.2.3 -X ….commit=…".
var stamped, commit string

// String is the engine's version: canonical semantic version with a leading
// v, as Vault wants it for a plugin's registration. It is what the build set,
// else the module version that `go install …@v1.2.3` records, else the coming
// release marked as a development build.
func String() string {
	if stamped != "" {
		return stamped
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Path == "github.com/cablesecrets/vault-plugin-secrets-cable" &&
		strings.HasPrefix(info.Main.Version, "v") && !strings.Contains(info.Main.Version, "-0.") && !strings.Contains(info.Main.Version, "+") {
		return info.Main.Version
	}
	return release + "-dev"
}

// Commit is the commit that the build set, or that the Go tool recorded, or
// "unknown".
func Commit() string {
	if commit != "" {
		return commit
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				return s.Value
			}
		}
	}
	return "unknown"
}
