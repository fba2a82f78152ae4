// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Command compat runs the end-to-end tests against a server, and writes the result
// into the server's row of the table in docs/compatibility.md, and to .cache/compat-row.md:
//
//	compat BINARY
//
// The row names COMPAT_BY, or the workflow's run, or the user of git's configuration.
// It prints the output of tests that failed, and exits with 1 if there were any, or if
// no test was run. Tests that find no server fail.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/vaulttest"
)

const (
	page    = "docs/compatibility.md" // has the table
	rowFile = ".cache/compat-row.md"  // has the last row that was written
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: compat BINARY")
		os.Exit(2)
	}
	ok, err := run(context.Background(), os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, "compat:", err)
	}
	if err != nil || !ok {
		os.Exit(1)
	}
}

// run runs the tests against a server and writes its row.
func run(ctx context.Context, binary string) (ok bool, err error) {
	product, version, err := vaulttest.Identify(ctx, binary)
	if err != nil {
		return false, err
	}
	server := fmt.Sprintf("%s %s", product, version)
	fmt.Printf("running the end-to-end tests on %s\n", server)
	cmd := exec.CommandContext(ctx, "go", "test", "-json", "-count=1", "-timeout=40m", "./e2e")
	cmd.Env, cmd.Stderr = append(os.Environ(), "VAULT_BIN="+binary, "E2E=require"), os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return false, err
	}
	if err := cmd.Start(); err != nil {
		return false, err
	}
	r, err := read(out, os.Stdout)
	waitErr := cmd.Wait()
	switch {
	case err != nil:
		return false, err
	case r.passed == 0 || waitErr != nil && len(r.failed) == 0: // such as tests that do not compile
		return false, fmt.Errorf("no test passed: %w", waitErr)
	}
	row := r.row(server, time.Now(), runBy(ctx, os.Getenv))
	fmt.Println(row)
	if err := os.WriteFile(filepath.FromSlash(rowFile), []byte(row+"\n"), 0o644); err != nil {
		return false, err
	}
	text, err := os.ReadFile(filepath.FromSlash(page))
	if err != nil {
		return false, err
	}
	return len(r.failed) == 0, os.WriteFile(filepath.FromSlash(page), []byte(setRow(string(text), row)), 0o644)
}

// runBy returns who runs the tests: the name in COMPAT_BY, the run of a workflow with
// its address, or the user of git's configuration.
func runBy(ctx context.Context, env func(string) string) string {
	workflow := ""
	if run := env("GITHUB_RUN_ID"); run != "" {
		workflow = fmt.Sprintf("[workflow %s](%s/%s/actions/runs/%s)",
			env("GITHUB_WORKFLOW"), env("GITHUB_SERVER_URL"), env("GITHUB_REPOSITORY"), run)
	}
	user, _ := exec.CommandContext(ctx, "git", "config", "user.name").Output() // none if git has no name
	return cmp.Or(env("COMPAT_BY"), workflow, strings.TrimSpace(string(user)), "unknown")
}

// result has the ends of the tests that have no subtests, and of the tests that failed.
type result struct {
	passed  int
	failed  []string            // names
	skipped map[string][]string // names by reason
}

// reason is the line of a test's output that says why it was skipped.
var reason = regexp.MustCompile(`^\s+\S+\.go:\d+: (.*)\n$`)

// read reads the output of go test -json. The output of tests that failed goes to w.
func read(in io.Reader, w io.Writer) (*result, error) {
	r := &result{skipped: map[string][]string{}}
	ended, output, parents := map[string]string{}, map[string][]string{}, map[string]bool{}
	for events := json.NewDecoder(in); events.More(); {
		var event struct{ Action, Test, Output string }
		if err := events.Decode(&event); err != nil {
			return nil, err
		}
		switch event.Action {
		case "output":
			output[event.Test] = append(output[event.Test], event.Output)
		case "run":
			for i, c := range event.Test {
				if c == '/' {
					parents[event.Test[:i]] = true
				}
			}
		case "pass", "fail", "skip":
			ended[event.Test] = event.Action
			if event.Action == "fail" {
				_, _ = io.WriteString(w, strings.Join(output[event.Test], ""))
			}
			if event.Action != "skip" {
				delete(output, event.Test)
			}
		}
	}
	for test, action := range ended {
		switch {
		case action == "fail":
			r.failed = append(r.failed, test)
		case parents[test] || test == "":
		case action == "pass":
			r.passed++
		default:
			why := "no reason is given"
			for _, line := range output[test] {
				if m := reason.FindStringSubmatch(line); m != nil {
					why = m[1]
				}
			}
			r.skipped[why] = append(r.skipped[why], test)
		}
	}
	// A test fails with its subtest, and the package with each, so only the last is named.
	slices.Sort(r.failed)
	all := slices.Clone(r.failed)
	r.failed = slices.DeleteFunc(r.failed, func(test string) bool {
		return slices.ContainsFunc(all, func(other string) bool {
			return other != test && (test == "" || strings.HasPrefix(other, test+"/"))
		})
	})
	if len(r.failed) == 1 && r.failed[0] == "" {
		r.failed[0] = "TestMain" // its checks after all tests
	}
	return r, nil
}

// row is the table's row with the server, the day, who ran the tests, and the numbers of
// tests that were run, passed, failed, and were skipped, with the reasons.
func (r *result) row(server string, day time.Time, by string) string {
	skipped, reasons := 0, []string{}
	for why, tests := range r.skipped {
		skipped += len(tests)
		slices.Sort(tests)
		reasons = append(reasons, fmt.Sprintf("`%s`: %s", strings.Join(tests, "`, `"), why))
	}
	slices.Sort(reasons)
	failed := "0"
	if len(r.failed) > 0 {
		failed = fmt.Sprintf("**%d**: `%s`", len(r.failed), strings.Join(r.failed, "`, `"))
	}
	notes := strings.ReplaceAll(strings.Join(reasons, "; "), "|", `\|`)
	ended := r.passed + len(r.failed)
	cells := []any{server, day.UTC().Format(time.DateOnly), by, ended, r.passed, failed, skipped, notes}
	return strings.Join(strings.Fields(fmt.Sprintf("| %v | %v | %v | %v | %v | %v | %v | %v |", cells...)), " ")
}

// setRow puts the row of a server into the table of a page, in place of its last one
// or below the others.
func setRow(text, row string) string {
	lines := strings.Split(text, "\n")
	first := slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, "| ---") })
	key := row[:strings.Index(row[1:], "|")+2]
	for i := first + 1; i < len(lines); i++ {
		if strings.HasPrefix(lines[i], key) {
			lines[i] = row
			break
		}
		if !strings.HasPrefix(lines[i], "|") {
			lines = slices.Insert(lines, i, row)
			break
		}
	}
	return strings.Join(lines, "\n")
}
