// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package version

import (
	"runtime/debug"
	"testing"
)

// TestVersion: only a tag makes a release's version, however it was built.
func TestVersion(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ stamped, path, recorded, want string }{
		{"v1.2.3", module, "(devel)", "v1.2.3"},                                // make build, make release
		{"", module, "v1.2.3", "v1.2.3"},                                       // go install …@v1.2.3
		{"", module, "v1.2.3-rc.1", "v1.2.3-rc.1"},                             // go install …@v1.2.3-rc.1
		{"", module, "(devel)", development},                                   // go build without version control
		{"", module, "", development},                                          // go test
		{"", "example.com/other", "v1.2.3", development},                       // linked into another program
		{"", module, "v1.2.3+dirty", development},                              // go build of a changed tag
		{"", module, "v0.0.0-20261125031400-54458d99f6f7", development},        // before the first tag
		{"", module, "v1.2.4-0.20261125031400-54458d99f6f7", development},      // after v1.2.3
		{"", module, "v1.2.3-rc.1.0.20261125031400-54458d99f6f7", development}, // after v1.2.3-rc.1
		{"", module, "v1.2.4-0.20261125031400-54458d99f6f7+dirty", development},
	} {
		info := &debug.BuildInfo{Main: debug.Module{Path: tt.path, Version: tt.recorded}}
		if got := version(tt.stamped, info); got != tt.want {
			t.Errorf("stamped %q, recorded %q: %s, want %s", tt.stamped, tt.recorded, got, tt.want)
		}
	}
	if got := version("", nil); got != development {
		t.Errorf("without build information: %s", got)
	}
}
