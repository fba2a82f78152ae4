// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Command mutants shows whether the tests of the packages that keep the engine's promises notice a fault. It makes one
// small fault at a time, a mutant, and runs the tests of its package, which must fail.
//
//   - A condition, or an operand of && or ||, is true or false. A bound is exclusive instead of inclusive, or the other
//     way round. An operator of arithmetic is the opposite one, and true is false.
//   - A statement is missing, namely a call, a defer, an assignment, ++ or --, or a jump. Locks remain, because a
//     program without them hangs, which shows nothing of its tests.
//
// All mutants of a package are compiled into one test program, in which an environment variable switches one on. A
// mutant whose tests exceed the time limit counts as killed. The command fails if less than 95 % are killed, or if a
// survivor is not in survivors.txt, where each has its reason.
package main

import (
	"cmp"
	"context"
	_ "embed"
	"encoding/json"
	"flag"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	packages    = "lifetime outcome share state fields cable"
	leastKilled = 95 // percent
)

// survivors has two lines for each mutant that may survive, its name and, indented, the reason.
//
//go:embed survivors.txt
var survivors string

var (
	since   = flag.String("since", "", "mutate only the lines that differ from this commit")
	only    = flag.String("only", "", "mutate only if the mutant's name contains this text")
	workers = flag.Int("j", 4, "mutants that are tested at a time; their tests mostly wait")
)

// The results of a mutant.
const (
	killed   = "killed"
	timedOut = "killed by the time limit"
	survived = "survived"
	listed   = "survived as listed"
)

func main() {
	flag.Parse()
	temp := must(os.MkdirTemp("", "mutants"))
	count, names := make(map[string]int), make(map[string]bool)
	for _, name := range strings.Fields(cmp.Or(strings.Join(flag.Args(), " "), packages)) {
		begin := time.Now()
		if p := load(name, temp, names); len(p.mutants) > 0 {
			p.testAll(count)
			fmt.Printf("%s: %d mutants in %s\n", name, len(p.mutants), time.Since(begin).Round(time.Second))
		}
	}
	check(os.RemoveAll(temp))
	check(judge(count, names))
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

func must[T any](value T, err error) T {
	check(err)
	return value
}

// judge fails if too few were killed, for a survivor without a reason, and for a reason without a mutant.
func judge(count map[string]int, names map[string]bool) error {
	dead := count[killed] + count[timedOut]
	all := dead + count[survived] + count[listed]
	rate := 100 * float64(dead) / float64(max(all, 1))
	fmt.Printf("%d of %d mutants were killed, %.1f %%, %d by the time limit\n", dead, all, rate, count[timedOut])
	switch isPart := *since+*only != "" || flag.NArg() > 0; {
	case count[survived] > 0:
		return fmt.Errorf("%d survivors are not in survivors.txt", count[survived])
	case isPart:
		return nil
	case rate < leastKilled:
		return fmt.Errorf("less than %d %% were killed", leastKilled)
	}
	for line := range strings.Lines(survivors) {
		if name := strings.TrimSpace(line); strings.HasPrefix(line, "internal/") && !names[name] {
			return fmt.Errorf("survivors.txt has a mutant that there is not: %s", name)
		}
	}
	return nil
}

// pkg is a package with its mutants, which its compiled tests contain.
type pkg struct {
	dir     string
	mutants []mutant // that are tested
	program string
	limit   time.Duration
}

// load compiles the tests of a package with its mutants, and adds the names of all to names.
func load(name, temp string, names map[string]bool) *pkg {
	p := &pkg{dir: filepath.Join("internal", name)}
	exports := make(map[string]string) // by the path of an imported package
	const format = "{{if .Export}}{{.ImportPath}} {{.Export}}{{end}}"
	for line := range strings.Lines(string(command("go", "list", "-export", "-deps", "-f", format, "./"+p.dir))) {
		path, file, _ := strings.Cut(strings.TrimSpace(line), " ")
		exports[path] = file
	}
	set := token.NewFileSet()
	var trees []*ast.File
	var paths []string
	for _, path := range must(filepath.Glob(filepath.Join(p.dir, "*.go"))) {
		if !strings.HasSuffix(path, "_test.go") {
			paths, trees = append(paths, path), append(trees, must(parser.ParseFile(set, path, nil, 0)))
		}
	}
	info := &types.Info{Types: make(map[ast.Expr]types.TypeAndValue)}
	config := types.Config{Importer: importer.ForCompiler(set, "gc", func(path string) (io.ReadCloser, error) {
		return os.Open(exports[path])
	})}
	must(config.Check(p.dir, set, trees, info))

	replace := make(map[string]string)
	add := func(path string, source []byte) {
		file := filepath.Join(temp, fmt.Sprintf("%s%d.go", name, len(replace)))
		check(os.WriteFile(file, source, 0o600))
		replace[must(filepath.Abs(path))] = file
	}
	number := 0
	for i, path := range paths {
		mutants, source := mutate(path, must(os.ReadFile(path)), set, trees[i], info, number)
		add(path, source)
		number += len(mutants)
		var diff []byte
		if *since != "" {
			diff = command("git", "diff", "--unified=0", *since, "--", path)
		}
		for _, m := range mutants {
			names[m.name] = true
			if strings.Contains(m.name, *only) && (*since == "" || isChanged(diff, m.line)) {
				p.mutants = append(p.mutants, m)
			}
		}
	}
	add(filepath.Join(p.dir, "mutants.go"), fmt.Appendf(nil, helpers, name))
	overlay := filepath.Join(temp, name+".json")
	check(os.WriteFile(overlay, must(json.Marshal(map[string]any{"Replace": replace})), 0o600))
	if p.program = filepath.Join(temp, name+".test"); len(p.mutants) == 0 {
		return p
	}
	command("go", "test", "-c", "-overlay="+overlay, "-vet=off", "-o", p.program, "./"+p.dir)
	return p
}

func command(name string, args ...string) []byte {
	out, err := exec.CommandContext(context.Background(), name, args...).CombinedOutput()
	if err != nil {
		check(fmt.Errorf("%s %s: %w: %s", name, args, err, out))
	}
	return out
}

var hunk = regexp.MustCompile(`(?m)^@@ -[0-9,]+ \+([0-9]+)(?:,([0-9]+))? @@`)

// isChanged reports whether a diff without context adds or changes the line.
func isChanged(diff []byte, line int) bool {
	return slices.ContainsFunc(hunk.FindAllSubmatch(diff, -1), func(lines [][]byte) bool {
		first, _ := strconv.Atoi(string(lines[1]))
		n, _ := strconv.Atoi(cmp.Or(string(lines[2]), "1"))
		return first <= line && line < first+n
	})
}

// testAll tests the mutants, and counts the results.
func (p *pkg) testAll(count map[string]int) {
	begin := time.Now()
	p.limit = time.Hour
	p.control()
	p.limit = 20*time.Second + 3*time.Since(begin)
	var mu sync.Mutex
	var wg sync.WaitGroup
	next := make(chan mutant)
	for range *workers {
		wg.Go(func() {
			for m := range next {
				result, _ := p.test(m)
				mu.Lock()
				count[result]++
				if result != killed {
					fmt.Printf("%s: %s (line %d)\n", result, m.name, m.line)
				}
				mu.Unlock()
			}
		})
	}
	for i, m := range p.mutants {
		if next <- m; i%50 == 49 {
			p.control()
		}
	}
	close(next)
	wg.Wait()
	p.control()
}

// control fails if the tests fail without a mutant, as they do on a machine that is too busy for them, because a kill
// then shows nothing.
func (p *pkg) control() {
	if result, out := p.test(mutant{}); result == killed || result == timedOut {
		check(fmt.Errorf("the tests of %s fail without a mutant: %s", p.dir, out))
	}
}

var testFunc = regexp.MustCompile(`(?m)^func (Test\w+)`)

// test runs the tests with the mutant, first those beside its file, which kill most and take less time.
func (p *pkg) test(m mutant) (result string, out []byte) {
	runs := []string{"."}
	path, _, _ := strings.Cut(m.name, ".go ")
	if source, err := os.ReadFile(path + "_test.go"); err == nil {
		var names []string
		for _, match := range testFunc.FindAllSubmatch(source, -1) {
			names = append(names, string(match[1]))
		}
		runs = []string{"^(" + strings.Join(names, "|") + ")$", "."}
	}
	for _, run := range runs {
		ctx, cancel := context.WithTimeout(context.Background(), p.limit)
		defer cancel()
		test := exec.CommandContext(ctx, p.program, "-test.run="+run, "-test.failfast", "-test.timeout=0")
		test.Dir, test.Env = p.dir, append(os.Environ(), fmt.Sprint("MUTANT=", m.number))
		switch out, err := test.CombinedOutput(); {
		case ctx.Err() != nil:
			return timedOut, out
		case err != nil:
			return killed, out
		}
	}
	if strings.Contains("\n"+survivors, "\n"+m.name+"\n") {
		return listed, nil
	}
	return survived, nil
}
