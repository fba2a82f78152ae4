// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// The commands of a page are run by a test that checks their effect. Each page has a
// test of its own, with a step for each block of commands; blocks that cannot be run
// are in notRun. TestPagesAreCovered makes sure that no block is in neither.

// pageTests says which test runs the blocks of a page.
// The test of docs/verify.md is in tools/release, with a release to verify.
var pageTests = map[string]string{
	"README.md":                          "TestReadme",
	"docs/consumers.md":                  "TestConsumers",
	"examples/consul-template/README.md": "TestExampleConsulTemplate",
	"examples/vault-agent/README.md":     "TestExampleVaultAgent",
	"examples/vault-proxy/README.md":     "TestExampleVaultProxy",
	"docs/kubernetes.md":                 "TestKubernetesValues",
	"docs/openbao.md":                    "TestOpenBaoPage",
	"docs/recipes.md":                    "TestRecipes",
	"docs/runbook.md":                    "TestRunbook",
	"docs/security.md":                   "TestSecurityPage",
	"docs/tutorial.md":                   "TestTutorial",
	"docs/verify.md":                     "TestVerify",

	"examples/clients/README.md":            "TestExampleClients",
	"examples/github-actions/README.md":     "TestExampleGitHubActions",
	"examples/terraform/app/README.md":      "TestExampleTerraformApp",
	"examples/terraform/platform/README.md": "TestExampleTerraformPlatform",
	"examples/gitlab/README.md":             "TestExampleGitLab",

	"examples/kubernetes/README.md":                        "TestExampleKubernetes",
	"examples/kubernetes/external-secrets/README.md":       "TestExampleKubernetes",
	"examples/kubernetes/injector/README.md":               "TestExampleKubernetes",
	"examples/kubernetes/vault-secrets-operator/README.md": "TestExampleKubernetes",
}

// notRun are the blocks that no page's test runs, with the reason.
var notRun = map[string]string{
	"examples/clients/README.md#Python/1":            "needs a package: TestExampleClientsInstalled runs it",
	"examples/clients/README.md#Node/1":              "needs Node: TestExampleClientsInstalled runs it",
	"examples/clients/README.md#Ansible/1":           "needs a package: TestExampleClientsInstalled runs it",
	"examples/consul-template/README.md#Run/2":       "runs until it is ended: TestExampleConsulTemplate starts it",
	"examples/vault-agent/README.md#Run/2":           "runs until it is ended: TestExampleVaultAgent starts it",
	"examples/vault-agent/README.md#Run/3":           "runs until ended: TestExampleVaultAgentSupervisor starts it",
	"examples/vault-proxy/README.md#Run/1":           "runs until it is ended: TestExampleVaultProxy starts it",
	"README.md#Install/1":                            "needs the files of a release: TestInstall runs it",
	"README.md#Try it/1":                             "TestDemo runs make demo; make test runs all tests",
	"docs/kubernetes.md#log":                         "needs pods, which no test has",
	"docs/kubernetes.md#restart":                     "needs pods, which no test has",
	"docs/openbao.md#active-node":                    "needs a cluster: TestHA runs it",
	"docs/openbao.md#node-version":                   "needs a cluster: TestHA runs it",
	"docs/runbook.md#setcap":                         "needs root: TestLockedMemory runs it",
	"docs/runbook.md#remove-capability":              "the same: TestLockedMemory runs it",
	"docs/performance.md#How it was measured/1":      "the benchmark takes minutes and the whole machine",
	"docs/releasing.md#Cut a release/1":              "makes a tag and pushes it",
	"docs/security.md#search-log":                    "needs a log in either format: TestLogSearches runs it",
	"docs/tutorial.md#forget":                        "needs the alias of a terminal: TestTutorial runs it with one",
	"docs/tutorial.md#On a dev server of your own/1": "runs until Ctrl-C: TestBuild runs it",
	"docs/tutorial.md#On a dev server of your own/2": "needs that server: TestBuild runs it",
	"docs/cable-api.md#Top/1":                        "reads Cable's own document, over a network",
	"docs/compatibility.md#compat-openbao":           "runs all end-to-end tests, on an OpenBao server",
	"docs/compatibility.md#compat-download":          "needs a network: TestServerDownload runs the script on loopback",
	"docs/compatibility.md#Repeat the tests/1":       "runs all end-to-end tests, on each server",
	"docs/compatibility.md#Repeat the tests/3":       "runs all tests",
	"docs/tutorial.md#Start/1":                       "runs until Ctrl-C: TestTutorial starts scripts/dev",

	"examples/kubernetes/README.md#Kubernetes auth/2": "for a Vault in the cluster, which no test has",

	"examples/kubernetes/csi/README.md#Run it/1": "needs the driver: TestExampleKubernetesCalls replays the requests",
	"examples/kubernetes/csi/README.md#Run it/2": "needs the driver: TestExampleKubernetesCalls replays the requests",
}

// block is a fenced block of a page with commands, a transcript, HCL or YAML.
type block struct {
	// id is the page with the block's name, such as "docs/runbook.md#rotate" for
	// "```sh name=rotate"; without a name, with heading and number, such as
	// "README.md#Install/2".
	id             string
	language, text string
}

// fence finds a block with its language and name, and the indent of a list around it.
var fence = regexp.MustCompile("(?ms)^( *)```(sh|console|hcl|yaml)(?: name=([\\w-]+)| \\w+)?\n(.*?)^ *```")

// blocksOf returns the blocks of a page that a reader may type or copy.
func blocksOf(t *testing.T, page string) (found []block) {
	t.Helper()
	for _, part := range regexp.MustCompile(`(?m)^##+ `).Split("Top\n"+readFile(t, filepath.Join("..", page)), -1) {
		heading, body, _ := strings.Cut(part, "\n")
		for i, m := range fence.FindAllStringSubmatch(body, -1) {
			found = append(found, block{
				id:       page + "#" + cmp.Or(m[3], fmt.Sprintf("%s/%d", heading, i+1)),
				language: m[2],
				text:     regexp.MustCompile(`(?m)^`+m[1]).ReplaceAllString(m[4], ""),
			})
		}
	}
	return found
}

// named returns the blocks of a page by the part of their id after the page.
func named(t *testing.T, page string) map[string]string {
	t.Helper()
	texts := map[string]string{}
	for _, b := range blocksOf(t, page) {
		texts[strings.TrimPrefix(b.id, page+"#")] = b.text
	}
	return texts
}

// pages returns the Markdown files of the repository.
func pages(t *testing.T) (names []string) {
	t.Helper()
	for _, pattern := range strings.Fields(
		"*.md docs/*.md .github/*.md .github/*/*.md examples/*.md examples/*/*.md examples/*/*/*.md") {
		found, err := filepath.Glob(filepath.Join("..", pattern))
		noError(t, err)
		for _, f := range found {
			names = append(names, strings.TrimPrefix(filepath.ToSlash(f), "../"))
		}
	}
	return names
}

// TestPagesAreCovered checks that each block of each page is run by the page's test,
// which fails for a block without a step, or is in notRun.
func TestPagesAreCovered(t *testing.T) {
	t.Parallel()
	known := map[string]bool{}
	var sources strings.Builder
	for _, pattern := range []string{"*_test.go", "../tools/release/*_test.go"} {
		files, err := filepath.Glob(pattern)
		noError(t, err)
		for _, f := range files {
			sources.WriteString(readFile(t, f))
		}
	}
	for _, page := range pages(t) {
		for _, b := range blocksOf(t, page) {
			known[b.id] = true
			if notRun[b.id] == "" && pageTests[page] == "" {
				t.Errorf("no test runs %q: give the page a test in pageTests, or the block a reason in notRun", b.id)
			}
		}
	}
	for id, reason := range notRun {
		if !known[id] {
			t.Errorf("notRun names %q, which is no block", id)
		}
		for _, m := range regexp.MustCompile(`Test\w+`).FindAllString(reason, -1) {
			if !strings.Contains(sources.String(), "func "+m+"(") {
				t.Errorf("notRun names the test %s, which is none", m)
			}
		}
	}
	for page, test := range pageTests {
		if !strings.Contains(sources.String(), "func "+test+"(") {
			t.Errorf("the test %s of %s does not exist", test, page)
		}
	}
}

// step is the part of a test that runs one block of commands.
type step struct {
	before func()
	skip   string   // why the block does not apply to the server
	fails  bool     // the last command fails, as the page says
	want   []string // expressions that the output must match
	after  func(out string)
}

// shell runs the commands of a page as a person would, one block after the
// other in one folder.
type shell struct {
	t    *testing.T
	dir  string
	env  []string
	edit *strings.Replacer // paths of the page to those of the test
}

// newShell returns a shell of a person who is root on v. The binaries by name
// come first in PATH. NOTE: it has nothing of the server's environment, such as
// its proxy.
func newShell(t *testing.T, v *vaultServer, binaries map[string]string) *shell {
	t.Helper()
	s := &shell{t: t, dir: t.TempDir(), edit: strings.NewReplacer()}
	bin := filepath.Join(s.dir, ".bin")
	noError(t, os.Mkdir(bin, 0o700))
	for name, target := range binaries {
		noError(t, os.Symlink(target, filepath.Join(bin, name)))
	}
	s.env = append(v.CLIEnv(), "PATH="+bin+":"+suite.bin+":"+os.Getenv("PATH"),
		"HTTP_PROXY=", "HTTPS_PROXY=", "http_proxy=", "https_proxy=", "HOME="+s.dir)
	return s
}

// place is a file in the shell's folder.
func (s *shell) place(name string) string { return filepath.Join(s.dir, name) }

// write writes such a file.
func (s *shell) write(name, text string) {
	s.t.Helper()
	writeFile(s.t, s.place(name), text)
}

// exists reports whether there is such a file.
func (s *shell) exists(name string) bool {
	_, err := os.Stat(s.place(name))
	return err == nil
}

// try runs commands with the variables that earlier ones set, up to the first that
// fails, and returns their output.
func (s *shell) try(commands string) (string, error) {
	const vars = `touch .vars; . ./.vars
		trap 'for v in version previous sha256 lease mine sponsor
			do declare -p $v || true; done > .vars 2>/dev/null' EXIT
	`
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", vars+s.edit.Replace(commands))
	cmd.Dir, cmd.Env, cmd.WaitDelay = s.dir, s.env, time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// run is try for commands that must succeed.
func (s *shell) run(commands string) string {
	s.t.Helper()
	out, err := s.try(commands)
	if err != nil {
		s.t.Fatalf("%s: %v\n%s", commands, err, out)
	}
	return out
}

// runPage runs all blocks of commands of a page, in order.
func (s *shell) runPage(page string, steps map[string]step) {
	s.t.Helper()
	checkSteps(s.t, page, steps)
	s.runSteps(page, steps)
}

// checkSteps makes sure that each block of commands of a page has a step, unless
// it is in notRun, and each step a block.
func checkSteps(t *testing.T, page string, steps map[string]step) {
	t.Helper()
	known := map[string]string{}
	for _, b := range blocksOf(t, page) {
		name := strings.TrimPrefix(b.id, page+"#")
		if text, ok := known[name]; ok && text != b.text {
			t.Errorf("two blocks are named %q:\n%s\n%s", name, text, b.text)
		}
		known[name] = b.text
		if _, ok := steps[name]; !ok && b.language == "sh" && notRun[b.id] == "" {
			t.Errorf("no step for %q:\n%s", name, b.text)
		}
	}
	for name := range steps {
		if known[name] == "" {
			t.Errorf("%s has no block %q", page, name)
		}
	}
}

// runSteps runs those blocks of a page that have a step, in the page's order. A block
// that the page repeats is run once.
func (s *shell) runSteps(page string, steps map[string]step) {
	s.t.Helper()
	done := map[string]bool{}
	for _, b := range blocksOf(s.t, page) {
		name := strings.TrimPrefix(b.id, page+"#")
		step, ok := steps[name]
		if !ok || done[name] {
			continue
		}
		done[name] = true
		if step.skip != "" {
			s.t.Run(name, func(t *testing.T) { t.Skip(step.skip) })
			continue
		}
		if step.before != nil {
			step.before()
		}
		out, err := s.try(b.text)
		if (err != nil) != step.fails {
			s.t.Fatalf("%s: %v, want a failure: %t\n%s\n%s", name, err, step.fails, b.text, out)
		}
		for _, want := range step.want {
			if !regexp.MustCompile(want).MatchString(out) {
				s.t.Errorf("%s: nothing matches %q in what its commands printed:\n%s", name, want, out)
			}
		}
		if step.after != nil {
			step.after(out)
		}
	}
}

// TestLinks checks that each link from a page to a file or a heading leads somewhere.
func TestLinks(t *testing.T) {
	t.Parallel()
	headings := map[string][]string{}
	for _, page := range pages(t) {
		headings[page] = anchors(withoutBlocks(readFile(t, filepath.Join("..", page))))
	}
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	for _, page := range pages(t) {
		for _, m := range link.FindAllStringSubmatch(withoutBlocks(readFile(t, filepath.Join("..", page))), -1) {
			target, anchor, _ := strings.Cut(m[1], "#")
			if strings.Contains(target, "://") {
				continue
			}
			file := page
			if target != "" {
				file = filepath.ToSlash(filepath.Join(filepath.Dir(page), target))
				if _, err := os.Stat(filepath.Join("..", file)); err != nil {
					t.Errorf("%s links to %s: %v", page, m[1], err)
				}
			}
			if anchor != "" && !slices.Contains(headings[file], anchor) {
				t.Errorf("%s links to %s, and that page has no such heading", page, m[1])
			}
		}
	}
}

// withoutBlocks is a page without its fenced blocks.
func withoutBlocks(page string) string {
	return regexp.MustCompile("(?ms)^ *```.*?^ *```").ReplaceAllString(page, "")
}

// TestPageForm: lines of prose have at most 120 characters, and the README has
// at most 120 lines with the first command by line 20. The README and the
// runbook have one install procedure.
func TestPageForm(t *testing.T) {
	t.Parallel()
	for _, page := range pages(t) {
		for i, line := range strings.Split(withoutBlocks(readFile(t, filepath.Join("..", page))), "\n") {
			if n := utf8.RuneCountInString(line); n > 120 && !strings.HasPrefix(line, "|") {
				t.Errorf("%s: a line of %d characters: %.60s (line %d without blocks)", page, n, line, i+1)
			}
		}
	}
	readme := strings.Split(readFile(t, "../README.md"), "\n")
	first := slices.IndexFunc(readme, func(l string) bool { return strings.HasPrefix(l, "$ vault") })
	if len(readme) > 121 || first > 19 {
		t.Errorf("the README has %d lines, and its first command in line %d", len(readme)-1, first+1)
	}
	install := func(page string, names ...string) (texts []string) {
		for _, b := range blocksOf(t, page) {
			if slices.Contains(names, strings.TrimPrefix(b.id, page+"#")) {
				texts = append(texts, b.text)
			}
		}
		return texts
	}
	short := install("README.md", "Install/2", "Install/3", "Install/4")
	long := install("docs/runbook.md", "install", "register", "configure")
	if len(short) != 3 || !slices.Equal(short, long) {
		t.Errorf("the README and the runbook install in two ways:\n%q\n%q", short, long)
	}
}
