// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Command mutants shows whether the tests of the packages that keep the engine's promises notice a fault. It makes one
// small fault at a time, a mutant, and runs the tests of its package, which must fail.
//
//   - A condition, or an operand of && or ||, is true or false. A bound is off by one, and so is a whole number.
//   - An operator of arithmetic is the opposite one, and true is false.
//   - A statement is missing, namely a call, a defer, an assignment, ++ or --, or a jump. Locks remain, because a
//     program without them hangs, which shows nothing of its tests.
//
// A mutant that does not compile is not counted. One whose tests exceed the time limit counts as killed. The command
// fails if less than 95 % are killed, or if a survivor is not in survivors.txt, where each has its reason.
package main

import (
	"bytes"
	"cmp"
	_ "embed"
	"encoding/json"
	"flag"
	"fmt"
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
	packages    = "lifetime outcome share state fields cable" // they can be tested without Vault
	pathTests   = "^Test(Config|Role|Creds|Written|Input)"    // of the root package
	leastKilled = 95                                          // percent
)

// survivors has two lines for each mutant that may survive, its name and, indented, the reason.
//
//go:embed survivors.txt
var survivors string

var (
	since   = flag.String("since", "", "mutate only the lines that differ from this commit")
	only    = flag.String("only", "", "mutate only if the mutant's name contains this text")
	workers = flag.Int("j", 4, "mutants that are tested at a time; they mostly wait")
)

// The results of a mutant.
const (
	killed    = "killed"
	timedOut  = "killed by the time limit"
	survived  = "survived"
	listed    = "survived as listed"
	notViable = "not compiled"
)

func main() {
	flag.Parse()
	temp := must(os.MkdirTemp("", "mutants"))
	count, names := make(map[string]int), make(map[string]bool)
	for _, name := range strings.Fields(cmp.Or(strings.Join(flag.Args(), " "), packages)) {
		dir := filepath.Join("internal", name)
		if mutants := mutantsOf(dir, names); len(mutants) > 0 {
			begin := time.Now()
			testAll(mutants, dir, temp, count)
			fmt.Printf("%s: %d mutants in %s\n", name, len(mutants), time.Since(begin).Round(time.Second))
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
	fmt.Printf("%d of %d mutants were killed, %.1f %%, %d of them by the time limit\n", dead, all, rate, count[timedOut])
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

// mutantsOf returns the mutants of a package that are to be tested, and adds the names of all to names.
func mutantsOf(dir string, names map[string]bool) (mutants []mutant) {
	for _, file := range must(filepath.Glob(filepath.Join(dir, "*.go"))) {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		var diff []byte
		if *since != "" {
			diff = must(exec.Command("git", "diff", "--unified=0", *since, "--", file).Output())
		}
		for _, m := range must(mutate(file, must(os.ReadFile(file)))) {
			names[m.name] = true
			if strings.Contains(m.name, *only) && (*since == "" || isChanged(diff, m.line)) {
				mutants = append(mutants, m)
			}
		}
	}
	return mutants
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

// testAll tests the mutants of a package, and counts the results.
func testAll(mutants []mutant, dir, temp string, count map[string]int) {
	begin := time.Now()
	if out, err := exec.Command("go", "test", "-count=1", "./"+dir).CombinedOutput(); err != nil {
		check(fmt.Errorf("the tests fail without a mutant: %s", out))
	}
	limit := time.Minute + 4*time.Since(begin)
	var mu sync.Mutex
	var wg sync.WaitGroup
	next := make(chan mutant)
	for range *workers {
		wg.Go(func() {
			for m := range next {
				result := m.test(dir, temp, limit)
				mu.Lock()
				count[result]++
				if result != killed && result != notViable {
					fmt.Printf("%s: %s\n\tline %d: %s\n", result, m.name, m.line, m.text)
				}
				mu.Unlock()
			}
		})
	}
	for _, m := range mutants {
		next <- m
	}
	close(next)
	wg.Wait()
}

// test runs the tests of the package, in which the compiler reads the mutant in place of its file.
func (m mutant) test(dir, temp string, limit time.Duration) (result string) {
	temp = must(os.MkdirTemp(temp, ""))
	mutated, overlay := filepath.Join(temp, "mutant.go"), filepath.Join(temp, "overlay.json")
	replace := map[string]string{must(filepath.Abs(m.file)): mutated}
	check(os.WriteFile(mutated, m.source, 0o600))
	check(os.WriteFile(overlay, must(json.Marshal(map[string]any{"Replace": replace})), 0o600))
	args := []string{
		"test", "-overlay=" + overlay, "-vet=off", "-failfast", "-count=1", "-parallel=64", "-timeout=" + limit.String(),
	}
	out, err := exec.Command("go", append(args, "./"+dir)...).CombinedOutput()
	if err == nil && dir == "internal/fields" { // whose rules are tested on each path of the engine
		out, err = exec.Command("go", append(args, "-short", "-run="+pathTests, ".")...).CombinedOutput()
	}
	switch {
	case err == nil && strings.Contains("\n"+survivors, "\n"+m.name+"\n"):
		return listed
	case err == nil:
		return survived
	case bytes.Contains(out, []byte("[build failed]")):
		return notViable
	case bytes.Contains(out, []byte("panic: test timed out")):
		return timedOut
	case !bytes.Contains(out, []byte("\nFAIL")):
		check(fmt.Errorf("testing %s: %w: %s", m.name, err, out))
	}
	return killed
}
