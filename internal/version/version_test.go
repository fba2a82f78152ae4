// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package version

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"strings"
	"testing"
)

// TestVersion pins the version of a build by the one that Go recorded in it.
func TestVersion(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ stamped, path, recorded, want string }{
		{"v1.2.3", module, "(devel)", "v1.2.3"},                // make release
		{"", module, "v1.2.3", "v1.2.3"},                       // a tag
		{"", module, "v1.2.3-rc.1", "v1.2.3-rc.1"},             // a tag
		{"", module, "(devel)", development},                   // no version control
		{"", module, "", development},                          // go test
		{"", "example.com/other", "v1.2.3", development},       // linked into another program
		{"", module, "v1.2.3+dirty", "v1.2.3-dirty"},           // a changed tag
		{"", module, "v1.2.3-rc.1+dirty", "v1.2.3-rc.1.dirty"}, // a changed tag
		{"", module, "v1.2.4-0.20261125031400-54458d99f6f7", "v1.2.4-0.20261125031400-54458d99f6f7"},
		{"", module, "v0.0.0-20261125031400-54458d99f6f7+dirty", "v0.0.0-20261125031400-54458d99f6f7.dirty"},
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

// TestMakeBuild runs make build on a small program with this module's path, in clones
// of all kinds, and checks that the program's version names the commit.
func TestMakeBuild(t *testing.T) {
	t.Parallel()
	for _, program := range []string{"bash", "git", "make"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(err)
		}
	}
	dir := filepath.Join(t.TempDir(), "clone")
	run := func(dir, command string) string {
		t.Helper()
		cmd := exec.Command("bash", "-euc", command)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GOFLAGS=-buildvcs=false", "TZ=Asia/Tokyo", "GIT_CONFIG_GLOBAL=/dev/null",
			"GIT_AUTHOR_NAME=t", "GIT_AUTHOR_EMAIL=t@example.com",
			"GIT_COMMITTER_NAME=t", "GIT_COMMITTER_EMAIL=t@example.com")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", command, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	for _, file := range []string{"Makefile", "go.mod", "internal/version/version.go"} {
		text, err := os.ReadFile(filepath.Join("../..", file))
		if err != nil {
			t.Fatal(err)
		}
		if file == "go.mod" {
			text = regexp.MustCompile(`(?s)\n(require|tool|replace) .*`).ReplaceAll(text, nil)
		}
		write(t, filepath.Join(dir, file), string(text))
	}
	write(t, filepath.Join(dir, "cmd/vault-plugin-secrets-cable/main.go"), "package main\n\nimport \""+module+
		"/internal/version\"\n\nfunc main() { println(version.String(), version.Commit()) }\n")
	write(t, filepath.Join(dir, ".gitignore"), "/bin/\n/dist/\n")

	const commit = "git add -A && git commit -qm change --allow-empty"
	for _, step := range []struct{ name, commands, dir, want string }{
		{"no version control", "", "", `v0\.0\.0-dev unknown`},
		{"a commit", "git init -q && " + commit, "", `v0\.0\.0-TIME-COMMIT COMMIT`},
		{"a changed file", "echo >> Makefile", "", `v0\.0\.0-TIME-COMMIT\.dirty COMMIT`},
		{"a tag", commit + " && git tag v1.2.3", "", `v1\.2\.3 COMMIT`},
		{"a new file in a tag", "touch new", "", `v1\.2\.3-dirty COMMIT`},
		{"after a tag", commit, "", `v1\.2\.4-0\.TIME-COMMIT COMMIT`},
		{"a linked work tree", "git worktree add -q ../linked", "../linked", `v0\.0\.0-TIME-COMMIT COMMIT`},
		{"a changed file there", "touch ../linked/newer", "../linked", `v0\.0\.0-TIME-COMMIT\.dirty COMMIT`},
	} {
		run(dir, step.commands)
		got := run(filepath.Join(dir, step.dir), "make -s build && bin/vault-plugin-secrets-cable")
		want := step.want
		if strings.Contains(want, "COMMIT") {
			commit := run(dir, "git rev-parse --short=12 HEAD")
			time := run(dir, "TZ=UTC git show -s --format=%cd --date=format-local:%Y%m%d%H%M%S")
			want = strings.NewReplacer("COMMIT", commit, "TIME", time).Replace(want)
		}
		if !regexp.MustCompile("^" + want + "$").MatchString(got) {
			t.Errorf("%s: %q, want %s", step.name, got, want)
		}
		t.Log(step.name, got)
	}

	// A commit gives the same bytes in every folder, with Go's FIPS 140-3 module, too.
	run(dir, "git clone -q . ../second")
	for target, setting := range map[string]string{"build": "CGO_ENABLED=0", "fips": "GOFIPS140=v1.0.0"} {
		build := "make -s " + target + " && sha256sum bin/* && go version -m bin/* | grep -o " + setting
		first, second := run(dir, build), run(filepath.Join(dir, "../second"), build)
		if first != second {
			t.Errorf("make %s: %s and %s", target, first, second)
		}
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
