// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Package version knows which build this is.
package version

import (
	"regexp"
	"runtime/debug"
)

// module is this module's path.
const module = "github.com/cablesecrets/vault-plugin-secrets-cable"

// development is the version of a build that is no release. A release's version
// is its tag, and no file repeats it.
const development = "v0.0.0-dev"

// stamped and commit are set at build, with
// -ldflags "-X …/vault-plugin-secrets-cable/internal/version.stamped=v1.2.3 -X ….commit=…".
var stamped, commit string

// String is the engine's version: canonical semantic version with a leading
// v, as Vault wants it for a plugin's registration. It is what the build set,
// else the module version that `go install …@v1.2.3` records, else that of a
// development build.
func String() string {
	info, _ := debug.ReadBuildInfo()
	return version(stamped, info)
}

// pseudo matches the versions that the Go tool makes up for a commit without a
// tag (v0.1.1-0.20261125031400-54458d99f6f7), and for a changed work tree.
var pseudo = regexp.MustCompile(`[-.]\d{14}-[0-9a-f]{12}|\+dirty$`)

func version(stamped string, info *debug.BuildInfo) string {
	switch {
	case stamped != "":
		return stamped
	case info != nil && info.Main.Path == module && len(info.Main.Version) > 1 && info.Main.Version[0] == 'v' && !pseudo.MatchString(info.Main.Version):
		return info.Main.Version
	default:
		return development
	}
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
