// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Command cross checks that a module compiles for other systems, tests included.
//
// It type-checks the module and the declarations of all that it imports from
// source, which takes some seconds for each system. `go vet`, which finds the same
// in the module's own files, compiles each dependency first: about a minute for
// each.
//
// Usage: cross FOLDER GOOS/GOARCH...
package main

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/tools/go/packages"
)

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: cross FOLDER GOOS/GOARCH...")
		os.Exit(2)
	}
	failed := false
	for _, target := range os.Args[2:] {
		n, err := check(os.Args[1], target)
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", target, err)
		}
		failed = failed || n > 0 || err != nil
	}
	if failed {
		os.Exit(1)
	}
}

// check prints what does not compile for a target, and returns how much it is.
func check(dir, target string) (n int, err error) {
	system, arch, ok := strings.Cut(target, "/")
	if !ok {
		return 0, fmt.Errorf("want GOOS/GOARCH")
	}
	roots, err := packages.Load(&packages.Config{
		Mode:  packages.LoadAllSyntax,
		Dir:   dir,
		Tests: true,
		Env:   append(os.Environ(), "GOOS="+system, "GOARCH="+arch, "CGO_ENABLED=0"),
	}, "./...")
	if err != nil {
		return 0, err
	}
	seen := map[string]bool{} // a file is in its package and in its tests' package
	packages.Visit(roots, nil, func(p *packages.Package) {
		for _, e := range p.Errors {
			if text := e.Error(); !seen[text] {
				seen[text] = true
				fmt.Fprintf(os.Stderr, "%s: %s\n", target, text)
			}
		}
	})
	return len(seen), nil
}
