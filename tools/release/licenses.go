// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"go/build"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/go-licenses/v2/licenses"
	"k8s.io/klog/v2"
)

const licensesFile = "THIRD_PARTY_LICENSES.txt"

// allowed lists the licenses, by SPDX, under which code may be linked into a
// binary under MPL-2.0. If a license is not listed, the release stops. Read it,
// then extend the list or drop the module.
var allowed = []string{"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT", "MPL-2.0"}

// A linked is one license file that covers linked code. Most modules have one.
type linked struct {
	path, version string // the module's path, or the path of the folder with the file
	ids           []string
	text          string // the file, and the NOTICE beside it
}

type collection []linked

// collectLicenses finds the license of each package that is linked on one of
// the operating systems, and refuses one that is not allowed, or that cannot be
// told. It does not look at architectures, because completeSBOMs finds a module that one
// of them alone links.
func collectLicenses(ctx context.Context, systems []string) (collection, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOROOT", "GOVERSION").Output()
	if err != nil {
		return nil, fmt.Errorf("go env: %w", err)
	}
	goroot, goversion, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	// NOTE: go-licenses skips the packages in GOROOT, and all packages if none is set.
	build.Default.GOROOT = goroot
	klog.LogToStderr(false)
	klog.SetOutput(io.Discard) // a warning for each file in assembly
	classifier, err := licenses.NewClassifier()
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(filepath.Join(goroot, "LICENSE"))
	if err != nil {
		return nil, err
	}
	all := collection{{"Go standard library", goversion, []string{"BSD-3-Clause"}, string(text)}}
	seen := map[string]bool{}
	for _, goos := range systems {
		if err := os.Setenv("GOOS", goos); err != nil {
			return nil, err
		}
		found, err := licenses.Libraries(ctx, classifier, false, []string{module}, command)
		if err != nil {
			return nil, fmt.Errorf("looking for the licenses of what is linked on %s: %w", goos, err)
		}
		for _, lib := range found {
			if seen[lib.LicenseFile] && lib.LicenseFile != "" {
				continue
			}
			seen[lib.LicenseFile] = true
			l := linked{path: lib.Name(), version: lib.Version()}
			for _, license := range lib.Licenses {
				if l.ids = append(l.ids, license.Name); !slices.Contains(allowed, license.Name) {
					return nil, fmt.Errorf("%s %s is under %s, which tools/release/licenses.go does not allow",
						l.path, l.version, license.Name)
				}
			}
			if len(l.ids) == 0 {
				return nil, fmt.Errorf("%s %s: no license that is known", l.path, l.version)
			}
			for _, name := range []string{filepath.Base(lib.LicenseFile), "NOTICE", "NOTICE.txt", "NOTICE.md"} {
				text, err := os.ReadFile(filepath.Join(filepath.Dir(lib.LicenseFile), name))
				if os.IsNotExist(err) {
					continue
				} else if err != nil {
					return nil, err
				}
				l.text += strings.TrimSpace(strings.ReplaceAll(string(text), "\r\n", "\n")) + "\n"
			}
			all = append(all, l)
		}
	}
	if err := os.Unsetenv("GOOS"); err != nil {
		return nil, err
	}
	slices.SortFunc(all[1:], func(a, b linked) int {
		return cmp.Or(cmp.Compare(a.path, b.path), cmp.Compare(a.version, b.version))
	})
	return all, nil
}

// of returns the licenses of a module, those of its folders included.
func (c collection) of(path, version string) (ids []string) {
	version = strings.TrimSuffix(version, "+incompatible") // go-licenses drops it
	for _, l := range c {
		if (l.path == path || strings.HasPrefix(l.path, path+"/")) && l.version == version {
			ids = append(ids, l.ids...)
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// write writes one file with all texts.
func (c collection) write(path string) error {
	var b strings.Builder
	b.WriteString(project + ` is licensed under the Mozilla Public License 2.0. On one platform or
another its binary contains the following modules. The source of each is at
its path and version, as the Go module proxy and its repository serve it.
`)
	for _, l := range c {
		fmt.Fprintf(&b, "\n%s\n%s %s: %s\n%[1]s\n\n%[5]s",
			strings.Repeat("-", 78), l.path, l.version, strings.Join(l.ids, ", "), l.text)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(b.String()), 0o644)
}
