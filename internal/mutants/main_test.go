// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestMutate pins the faults that are made, on a source with one of each kind.
func TestMutate(t *testing.T) {
	t.Parallel()
	const source = `package p

const c = 1 + 2

func f(a, b int, s string) (ok bool) {
	if !ok && (a < c || len(s+"x") > 0) {
		defer mu.Unlock()
		b++; ok = true
	}
	return a*b == 1
}
`
	const want = `package p

const c = 1 + 2

func f(a, b int, s string) (ok bool) {
	if (mutantIs(1) || ((!mutantIs(2) && ((mutantIs(3) || (!ok)) && (mutantIs(4) || ((` +
		`(!mutantIs(5) && (mutantBound(7, "<", a , c))) || ` +
		`(!mutantIs(6) && (mutantBound(8, ">", len(s+"x") , 0)))))))))) {
		defer mu.Unlock()
		if !mutantIs(9) { b++ }; if !mutantIs(10) { ok = (mutantIs(11) != true) }
	}
	return (mutantIs(12) || ((!mutantIs(13) && (mutantMath(14, "*", a,b) == 1))))
}
`
	set := token.NewFileSet()
	tree, err := parser.ParseFile(set, "p.go", source, 0)
	if err != nil {
		t.Fatal(err)
	}
	info := &types.Info{Types: make(map[ast.Expr]types.TypeAndValue)}
	config := types.Config{Error: func(error) {}} // there is no mu
	_, _ = config.Check("p", set, []*ast.File{tree}, info)
	mutants, got := mutate("p.go", []byte(source), set, tree, info, 0)
	if diff := cmp.Diff(want, string(got)); diff != "" || len(mutants) != 14 {
		t.Errorf("%d mutants (-want +got):\n%s", len(mutants), diff)
	}
	if m := (mutant{9, 8, "p.go f, missing: b++; ok = true"}); mutants[8] != m {
		t.Errorf("got %+v, want %+v", mutants[8], m)
	}
}

// TestIsChanged checks which lines count as changed in a diff without context.
func TestIsChanged(t *testing.T) {
	t.Parallel()
	const diff = "@@ -1,2 +3 @@ func f() {\n-a\n-b\n+c\n@@ -9,0 +10,2 @@\n+d\n+e\n@@ -20 +20,0 @@\n-f\n"
	for line, want := range map[int]bool{2: false, 3: true, 4: false, 9: false, 10: true, 11: true, 12: false} {
		if got := isChanged([]byte(diff), line); got != want {
			t.Errorf("line %d: %t", line, got)
		}
	}
}

// TestJudge checks that a survivor without a reason, too low a rate and a reason without a mutant fail.
func TestJudge(t *testing.T) {
	t.Parallel()
	names := make(map[string]bool)
	for line := range strings.Lines(survivors) {
		names[strings.TrimSpace(line)] = true
	}
	for _, tt := range []struct {
		killed, survived, listed int
		names                    map[string]bool
		isGood                   bool
	}{
		{94, 0, 6, names, false},
		{95, 0, 5, names, true},
		{99, 1, 0, names, false},
		{100, 0, 0, nil, false},
	} {
		count := map[string]int{killed: tt.killed, survived: tt.survived, listed: tt.listed}
		if err := judge(count, tt.names); (err == nil) != tt.isGood {
			t.Errorf("%v: %v", count, err)
		}
	}
}
