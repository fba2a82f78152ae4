// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Command release builds a release into dist/. GoReleaser compiles, archives
// and has the SBOMs written; this program collects the licenses before that,
// and adds the OCI image and the sums after it.
//
// The same tag gives the same bytes in every folder, for every user, at every time,
// because nothing here reads a clock, a user or a host. docs/releasing.md has the other
// conditions.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	gomodule "golang.org/x/mod/module"
	"golang.org/x/mod/semver"
	"gopkg.in/yaml.v3"
)

const (
	project = "vault-plugin-secrets-cable"
	module  = "github.com/cablesecrets/" + project
	command = "./cmd/" + project
)

const usage = `usage: release build [-platforms linux/amd64,...]
       release vex [DATABASE]
       release notes VERSION

build  builds the tag of HEAD into dist/, or a snapshot if HEAD has no tag
vex    writes the OpenVEX document of the release in dist/; DATABASE is the URL of
       another database of vulnerabilities than Go's
notes  prints what CHANGELOG.md says of VERSION`

func main() {
	if err := run(context.Background(), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "release:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	out, err := exec.CommandContext(ctx, "git", "rev-parse", "--show-toplevel").Output()
	if err != nil {
		return fmt.Errorf("looking for the top of the work tree: %w", err)
	}
	if err := os.Chdir(strings.TrimSpace(string(out))); err != nil {
		return err
	}
	switch {
	case len(args) > 0 && args[0] == "build":
		flags := flag.NewFlagSet("build", flag.ExitOnError)
		platforms := flags.String("platforms", "", "build for these alone, such as linux/amd64,darwin/arm64")
		if err := flags.Parse(args[1:]); err != nil {
			return err
		}
		return buildRelease(ctx, *platforms)
	case len(args) > 0 && len(args) < 3 && args[0] == "vex":
		return writeVEX(ctx, append(args, "https://vuln.go.dev")[1])
	case len(args) == 2 && args[0] == "notes":
		text, err := notes(args[1])
		if err == nil {
			_, err = os.Stdout.WriteString(text)
		}
		return err
	default:
		return errors.New(usage)
	}
}

// notes returns the section of CHANGELOG.md on a version. The workflow releases
// nothing without one, because operators read it before they upgrade.
func notes(version string) (string, error) {
	data, err := os.ReadFile("CHANGELOG.md")
	if err != nil {
		return "", err
	}
	for section := range strings.SplitSeq("\n"+string(data), "\n## ") {
		heading, text, _ := strings.Cut(section, "\n")
		// A heading is `## [1.2.3] - date` or `## v1.2.3`.
		if name, _, _ := strings.Cut(heading, " "); "v"+strings.TrimPrefix(strings.Trim(name, "[]"), "v") == version {
			return strings.TrimSpace(text) + "\n", nil
		}
	}
	return "", fmt.Errorf("CHANGELOG.md has no section `## [%s]`", strings.TrimPrefix(version, "v"))
}

// buildRelease builds everything into dist/.
func buildRelease(ctx context.Context, platforms string) error {
	tag, err := exec.CommandContext(ctx, "git", "describe", "--tags", "--exact-match", "--match", "v*").Output()
	snapshot := err != nil
	args := []string{"release", "--clean", "--skip=publish,announce"}
	if snapshot {
		args = append(args, "--snapshot")
	} else if _, err := notes(strings.TrimSpace(string(tag))); err != nil {
		fmt.Fprintf(os.Stderr, "release: %v: the workflow will refuse this tag\n", err)
	}
	r, err := headCommit(ctx)
	if err != nil {
		return err
	}
	if r.snapshot, err = snapshotVersion(ctx, r); err != nil {
		return err
	}
	if err := cleanEnvironment(ctx, r); err != nil {
		return err
	}
	config, systems, err := goreleaserConfig(platforms)
	if err != nil {
		return err
	}
	licenses, err := collectLicenses(ctx, systems)
	if err != nil {
		return err
	}
	if err := licenses.write(filepath.Join(".cache/release", licensesFile)); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "goreleaser", append(args, "--config", config)...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("goreleaser: %w", err)
	}
	if err := r.readDist(); err != nil {
		return err
	}
	if err := r.completeSBOMs(licenses); err != nil {
		return err
	}
	if err := r.writeImage(); err != nil {
		return err
	}
	if err := r.writeSums(); err != nil {
		return err
	}
	return r.removeOthers()
}

// headCommit returns a release of the commit that is checked out.
func headCommit(ctx context.Context) (*release, error) {
	out, err := exec.CommandContext(ctx, "git", "show", "-s", "--format=%H %ct", "HEAD").Output()
	if err != nil {
		return nil, fmt.Errorf("git show: %w", err)
	}
	commit, seconds, _ := strings.Cut(strings.TrimSpace(string(out)), " ")
	unix, err := strconv.ParseInt(seconds, 10, 64)
	if err != nil {
		return nil, fmt.Errorf("git show: %w", err)
	}
	return &release{commit: commit, date: time.Unix(unix, 0).UTC()}, nil
}

// snapshotVersion returns the version that Go gives to a build of the checked out
// commit, as if it had no tag.
func snapshotVersion(ctx context.Context, r *release) (string, error) {
	tag, _ := exec.CommandContext(ctx, "git", "describe", "--tags", "--abbrev=0", "--match", "v*").Output()
	older := semver.Canonical(strings.TrimSpace(string(tag))) // "" if there is none
	version := gomodule.PseudoVersion(semver.Major(older), older, r.date, r.commit[:12])
	changed, err := exec.CommandContext(ctx, "git", "status", "--porcelain").Output()
	if err != nil {
		return "", fmt.Errorf("git status: %w", err)
	}
	if len(changed) > 0 {
		version += ".dirty"
	}
	return version, nil
}

// cleanEnvironment removes a user's own settings for the compiler, in variables and in
// the file of `go env -w`, and their language and time zone, because each could change
// a byte of the result. It sets the variables that .goreleaser.yaml reads.
func cleanEnvironment(ctx context.Context, r *release) error {
	// The user's settings of module proxies and caches stay, because go.sum pins the modules.
	out, err := exec.CommandContext(ctx, "go", "env", "-json", "GOAUTH", "GOCACHE", "GOINSECURE", "GOMODCACHE",
		"GONOPROXY", "GONOSUMDB", "GOPRIVATE", "GOPROXY", "GOSUMDB", "GOTOOLCHAIN").Output()
	if err != nil {
		return fmt.Errorf("go env: %w", err)
	}
	env := map[string]string{}
	if err := json.Unmarshal(out, &env); err != nil {
		return err
	}
	for _, v := range os.Environ() {
		name, _, _ := strings.Cut(v, "=")
		if strings.HasPrefix(name, "GO") && name != "GOROOT" && name != "GOPATH" || strings.HasPrefix(name, "CGO_") {
			if err := os.Unsetenv(name); err != nil {
				return err
			}
		}
	}
	maps.Copy(env, map[string]string{
		"CGO_ENABLED": "0", "GOENV": "off", "GOFLAGS": "-mod=readonly", "GOWORK": "off", "TZ": "UTC", "LC_ALL": "C",
		// GoReleaser wants a remote, though nothing is pushed.
		"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "remote.origin.url", "GIT_CONFIG_VALUE_0": "https://" + module,
		"RELEASE_COMMIT":    r.commit[:12],
		"RELEASE_DATE":      r.date.Format(time.RFC3339),
		"RELEASE_TIMESTAMP": strconv.FormatInt(r.date.Unix(), 10),
		"RELEASE_SNAPSHOT":  strings.TrimPrefix(r.snapshot, "v"),
	})
	for name, value := range env {
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	return nil
}

// goreleaserConfig writes .goreleaser.yaml, with its targets cut down to the
// platforms if any are given, and returns the path of the copy, and the
// operating systems of all targets.
func goreleaserConfig(platforms string) (path string, systems []string, err error) {
	data, err := os.ReadFile(".goreleaser.yaml")
	if err != nil {
		return "", nil, err
	}
	var config map[string]any
	if err := yaml.Unmarshal(data, &config); err != nil {
		return "", nil, fmt.Errorf(".goreleaser.yaml: %w", err)
	}
	plugin := config["builds"].([]any)[0].(map[string]any)
	var targets []string
	for _, target := range plugin["targets"].([]any) {
		goos, rest, _ := strings.Cut(target.(string), "_")
		goarch, _, _ := strings.Cut(rest, "_")
		if !slices.Contains(systems, goos) {
			systems = append(systems, goos)
		}
		if platforms == "" || slices.Contains(strings.Split(platforms, ","), goos+"/"+goarch) {
			targets = append(targets, target.(string))
		}
	}
	if len(targets) == 0 {
		return "", nil, fmt.Errorf(".goreleaser.yaml has none of the platforms %s", platforms)
	}
	plugin["targets"] = targets
	if data, err = yaml.Marshal(config); err != nil {
		return "", nil, err
	}
	path = ".cache/release/goreleaser.yaml"
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", nil, err
	}
	return path, systems, os.WriteFile(path, data, 0o644)
}
