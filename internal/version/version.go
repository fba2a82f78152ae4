// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Package version knows the version of this build.
package version

import (
	"runtime/debug"
	"strings"
)

// release is the version that this source is, or will become.
const release = "v0.1.0"

// stamped is set at build, with -ldflags "-X …/vault-plugin-secrets-cable/internal/version.stamped=v1.2.3".
var stamped string

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
