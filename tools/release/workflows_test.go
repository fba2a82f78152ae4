// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"gopkg.in/yaml.v3"
)

// makeTarget and pathOfTree are the names of this tree that a step of a workflow uses.
var (
	makeTarget = regexp.MustCompile(`(?m)\bmake (?:-\S+ (?:[a-z]+ )?)*([a-z][a-z-]*)`)
	pathOfTree = regexp.MustCompile(`\b(?:scripts|tools|docs|internal|cmd)/[\w./-]+`)
)

// TestWorkflows checks that the make targets and paths in .github/workflows exist, that
// actions are pinned by digest with their version beside it, and that a job has a time
// limit and no more rights than it states. actionlint checks the rest.
func TestWorkflows(t *testing.T) {
	t.Parallel()
	files := must(filepath.Glob(filepath.Join(root, ".github/workflows/*")))(t)
	makefile := read(t, filepath.Join(root, "Makefile"))
	targets, pins := 0, map[string]string{}
	for _, path := range files {
		text, file := read(t, path), filepath.Base(path)
		var workflow struct {
			Permissions map[string]string
			Concurrency any
			Jobs        map[string]struct {
				Timeout int `yaml:"timeout-minutes"`
				Steps   []struct {
					Uses, Run string
					With      map[string]string
					Dir       string `yaml:"working-directory"`
				}
			}
		}
		if err := yaml.Unmarshal([]byte(text), &workflow); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		if fmt.Sprint(workflow.Permissions) != "map[contents:read]" || workflow.Concurrency == nil ||
			strings.Contains(text, "pull_request_target") {
			t.Errorf("%s: permissions %v, concurrency %v", file, workflow.Permissions, workflow.Concurrency)
		}
		for name, job := range workflow.Jobs {
			if job.Timeout == 0 {
				t.Errorf("%s: %s has no time limit", file, name)
			}
			for _, step := range job.Steps {
				if action, digest, ok := strings.Cut(step.Uses, "@"); ok {
					pinned := regexp.MustCompile(regexp.QuoteMeta(step.Uses) + ` # (v\d+\.\d+\.\d+)\n`)
					m := pinned.FindStringSubmatch(text)
					if m == nil || !regexp.MustCompile(`^[0-9a-f]{40}$`).MatchString(digest) {
						t.Errorf("%s: %s is not pinned by a digest, with the version as a comment", file, step.Uses)
					} else if pin := digest + m[1]; pins[action] != "" && pins[action] != pin {
						t.Errorf("%s: %s is pinned to two versions", file, action)
					} else {
						pins[action] = pin
					}
					if action == "actions/checkout" && step.With["persist-credentials"] != "false" {
						t.Errorf("%s: %s leaves credentials in the clone", file, name)
					}
				}
				for _, m := range makeTarget.FindAllStringSubmatch(step.Run, -1) {
					targets++
					if !strings.Contains(makefile, "\n"+m[1]+":") {
						t.Errorf("%s: the Makefile has no target %s", file, m[1])
					}
				}
				paths := pathOfTree.FindAllString(step.Run, -1)
				for _, p := range append(paths, step.Dir, step.With["go-version-file"]) {
					p = strings.TrimPrefix(p, "elsewhere/") // where release.yml has a second clone
					if p == "" || p == "dist" {
						continue // made by the workflow
					}
					if _, err := os.Stat(filepath.Join(root, p)); err != nil {
						t.Errorf("%s: %v", file, err)
					}
				}
			}
		}
	}
	if targets < 10 || len(pins) < 5 {
		t.Errorf("%d targets, %d actions", targets, len(pins))
	}
}

// TestChangelog checks that the newest section is of the version to come, or of HEAD's tag.
func TestChangelog(t *testing.T) {
	t.Parallel()
	heading := regexp.MustCompile(`(?m)^## (.*)$`).FindStringSubmatch(read(t, filepath.Join(root, "CHANGELOG.md")))
	want := regexp.MustCompile(`^\[?(Unreleased|v?\d+\.\d+\.\d+(-[0-9a-z.]+)?)\]?( .*)?$`)
	if heading == nil || !want.MatchString(heading[1]) {
		t.Fatalf("CHANGELOG.md: newest section %q", heading)
	}
	tag, err := output(root, nil, "git", "describe", "--tags", "--exact-match", "--match", "v*")
	name, _, _ := strings.Cut(heading[1], " ")
	tag = strings.TrimSpace(tag)
	if err == nil && "v"+strings.TrimPrefix(strings.Trim(name, "[]"), "v") != tag {
		t.Errorf("HEAD is %s, the newest section of CHANGELOG.md is %q", tag, heading[1])
	}
}
