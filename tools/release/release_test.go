// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// The tests release this tree as a version that will never be.
const (
	testTag     = "v9.9.9"
	testVersion = "9.9.9"
	testCommit  = "2020-02-02T02:02:02Z"
)

// everything has the tests build all platforms, each compiled twice from nothing, instead
// of this machine's alone.
var everything = os.Getenv("RELEASE_TEST") == "all"

func TestMain(m *testing.M) { os.Exit(runTests(m)) }

func runTests(m *testing.M) int {
	for _, tool := range []string{"goreleaser", "cyclonedx-gomod", "cosign", "crane", "govulncheck"} {
		if _, err := exec.LookPath(tool); err != nil {
			fmt.Fprintln(os.Stderr, tool, "is not on PATH: run `make release-test`")
			return 1
		}
	}
	var err error
	if testDir, err = os.MkdirTemp("", "release-"); err != nil {
		panic(err)
	}
	defer os.RemoveAll(testDir)
	if root, err = filepath.Abs("../.."); err != nil {
		panic(err)
	}
	return m.Run()
}

var testDir, root string

// gitEnv makes commits that are the same each time.
var gitEnv = []string{
	"GIT_AUTHOR_DATE=" + testCommit, "GIT_COMMITTER_DATE=" + testCommit, "GIT_CONFIG_GLOBAL=/dev/null",
	"GIT_AUTHOR_NAME=t", "GIT_AUTHOR_EMAIL=t@example.com", "GIT_COMMITTER_NAME=t", "GIT_COMMITTER_EMAIL=t@example.com",
}

// built is a clone of this tree, as it is and not as it was committed, in which
// the release is built.
var built = sync.OnceValues(func() (string, error) {
	dir := filepath.Join(testDir, "first")
	files, err := output(root, nil, "git", "ls-files", "-co", "--exclude-standard")
	if err != nil {
		return "", err
	}
	for file := range strings.Lines(files) {
		file = strings.TrimSpace(file)
		info, err := os.Stat(filepath.Join(root, file))
		if err != nil || info.IsDir() {
			continue // deleted, or a link to a folder
		}
		data, err := os.ReadFile(filepath.Join(root, file))
		if file == "CHANGELOG.md" {
			data = append(data, "\n## ["+testVersion+"] - 2020-02-02\n\nA test.\n"...)
		}
		to := filepath.Join(dir, file)
		err = errors.Join(err, os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, data, info.Mode()))
		if err != nil {
			return "", err
		}
	}
	const commit = "git init -q && git add -A && git commit -qm test && git tag " + testTag
	if _, err := output(dir, gitEnv, "bash", "-euc", commit); err != nil {
		return "", err
	}
	program := filepath.Join(testDir, "release")
	if _, err := output(filepath.Join(root, "tools/release"), nil, "go", "build", "-o", program, "."); err != nil {
		return "", err
	}
	_, err = output(dir, nil, program, buildArgs()...)
	return dir, err
})

func buildArgs() []string {
	if everything {
		return []string{"build"}
	}
	return []string{"build", "-platforms", runtime.GOOS + "/" + runtime.GOARCH}
}

// dist returns the folder of the release, and a path in it.
func dist(t *testing.T, suffix string) string {
	t.Helper()
	dir := must(built())(t)
	return filepath.Join(dir, "dist", project+"_"+testVersion+"_"+suffix)
}

func output(dir string, env []string, name string, args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &stdout, &stderr
	cmd.Env = append(os.Environ(), env...)
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s %q: %w\n%s%s", name, args, err, &stdout, &stderr)
	}
	return stdout.String(), nil
}

// sums reads a file of sums, and checks that each is the file's.
func sums(t *testing.T, path string) map[string]string {
	t.Helper()
	m := map[string]string{}
	for line := range strings.Lines(read(t, path)) {
		sum, file, ok := strings.Cut(strings.TrimSpace(line), "  ")
		if !ok || len(sum) != 64 {
			t.Fatalf("%s: line %q", path, line)
		}
		m[file] = sum
	}
	return m
}

func read(t *testing.T, path string) string {
	t.Helper()
	return string(must(os.ReadFile(path))(t))
}

func write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	check(t, os.MkdirAll(filepath.Dir(path), 0o755))
	check(t, os.WriteFile(path, []byte(text), mode))
}

// must returns the value of a call that has no error: must(call())(t).
func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		check(t, err)
		return v
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// checkSum checks the SHA-256 of a file.
func checkSum(t *testing.T, path, want string) {
	t.Helper()
	if got, err := sha256File(path); err != nil || got != want {
		t.Errorf("%s has sum %s (%v), want %s", path, got, err, want)
	}
}

// TestReproducible builds the same tag a second time, in a folder of another
// name, from files of another age, for a user with another home, mask, language,
// time zone and flags.
func TestReproducible(t *testing.T) {
	t.Parallel()
	sumsFile := dist(t, "SHA256SUMS")
	first, _ := built()
	second := filepath.Join(testDir, "a second folder", "of another name")
	must(output(testDir, nil, "git", "clone", "-q", first, second))(t)
	old := time.Now().Add(-20 * 365 * 24 * time.Hour)
	check(t, filepath.WalkDir(second, func(path string, _ os.DirEntry, err error) error {
		return errors.Join(err, os.Chtimes(path, old, old))
	}))
	caches := must(output(root, nil, "go", "env", "GOMODCACHE", "GOCACHE"))(t)
	mod, cache, _ := strings.Cut(strings.TrimSpace(caches), "\n")
	if everything {
		cache = filepath.Join(testDir, "cache")
	}
	goenv := filepath.Join(t.TempDir(), "env")
	write(t, goenv, "GOEXPERIMENT=arenas\nGOARM64=v9.0\n", 0o600)
	env := []string{
		"HOME=" + t.TempDir(), "TMPDIR=" + t.TempDir(), "USER=somebody", "LC_ALL=de_DE.UTF-8", "TZ=Asia/Tokyo",
		"GOENV=" + goenv, "GOMODCACHE=" + mod, "GOCACHE=" + cache, "GODEBUG=asyncpreemptoff=1",
		"CGO_ENABLED=1", "GOAMD64=v3", "GOARM=7", "GOOS=plan9",
		"GOFLAGS=-tags=other -buildvcs=true -ldflags=-X=main.a=b", "GORELEASER_CURRENT_TAG=v1.1.1",
	}
	args := append([]string{"-c", `umask 077 && exec "$0" "$@"`, filepath.Join(testDir, "release")}, buildArgs()...)
	must(output(second, env, "bash", args...))(t)
	files := sums(t, sumsFile)
	if again := filepath.Join(second, "dist", filepath.Base(sumsFile)); read(t, again) != read(t, sumsFile) {
		t.Errorf("the sums differ:\n%s\n%s", read(t, sumsFile), read(t, again))
	}
	for file, sum := range files {
		for _, dir := range []string{first, second} {
			checkSum(t, filepath.Join(dir, "dist", file), sum)
		}
	}
	t.Logf("%d files are the same", len(files))
	// So are the builds of a clone, with Go's FIPS 140-3 module, too.
	builds := map[string]bool{}
	for _, target := range []string{"build", "fips"} {
		var sums [2]string
		for i, dir := range []string{first, second} {
			must(output(dir, []string{"GOCACHE=" + cache}, "make", "-s", target))(t)
			sums[i] = must(sha256File(filepath.Join(dir, "bin", project)))(t)
			builds[sums[i]] = true
		}
		t.Log("make", target, sums)
	}
	if len(builds) != 2 {
		t.Errorf("two builds, and two with FIPS, are %d different ones", len(builds))
	}
}

// TestFiles reads the files that a release has for download, each archive, its binary, its
// SBOM, the sums, and the version in all of them.
func TestFiles(t *testing.T) {
	t.Parallel()
	all := sums(t, dist(t, "SHA256SUMS"))
	plugins := sums(t, dist(t, "PLUGIN_SHA256SUMS"))
	want := []string{project + "_" + testVersion + "_PLUGIN_SHA256SUMS", project + "_" + testVersion + "_oci.tar"}
	for path, sum := range plugins {
		stem, binary := filepath.Split(path)
		stem = strings.TrimSuffix(stem, "/")
		want = append(want, stem+".zip", stem+".cdx.json")
		platform := strings.TrimPrefix(stem, project+"_"+testVersion+"_")
		if binary != project+strings.Repeat(".exe", strings.Count(platform, "windows_")) {
			t.Errorf("binary %s in %s", binary, stem)
		}
		archive := must(zip.OpenReader(dist(t, platform+".zip")))(t)
		defer archive.Close()
		modes := map[string]string{}
		for _, f := range archive.File {
			modes[f.Name] = f.Mode().String()
			if got := f.Modified.UTC().Format(time.RFC3339); got != testCommit {
				t.Errorf("%s: %s has time %s, want that of the commit, %s", stem, f.Name, got, testCommit)
			}
		}
		const text = "-rw-r--r--"
		want := map[string]string{binary: "-rwxr-xr-x", "LICENSE": text, "README.md": text, licensesFile: text}
		if !maps.Equal(modes, want) {
			t.Errorf("%s contains %s, want %s", stem, modes, want)
		}
		extracted := filepath.Join(t.TempDir(), binary)
		write(t, extracted, string(must(io.ReadAll(must(archive.Open(binary))(t)))(t)), 0o755)
		checkSum(t, extracted, sum)
		checkBinary(t, extracted, platform)
		checkSBOM(t, dist(t, platform+".cdx.json"), extracted, sum)
	}
	slices.Sort(want)
	if got := slices.Sorted(maps.Keys(all)); !slices.Equal(got, want) {
		t.Errorf("SHA256SUMS lists %q, want %q", got, want)
	}
	t.Logf("%d platforms", len(plugins))
	// And nothing else, which would differ each time.
	want = append(want, project+"_"+testVersion+"_SHA256SUMS", project+"_"+testVersion+"_oci")
	inDist := must(os.ReadDir(filepath.Dir(dist(t, ""))))(t)
	for _, file := range inDist {
		if !slices.Contains(want, file.Name()) {
			t.Errorf("dist/ contains %s", file.Name())
		}
	}
}

func checkBinary(t *testing.T, path, platform string) {
	t.Helper()
	info := must(buildinfo.ReadFile(path))(t)
	settings := map[string]string{}
	for _, s := range info.Settings {
		settings[s.Key] = s.Value
		if strings.HasPrefix(s.Key, "vcs") {
			t.Errorf("%s: build setting %s=%s", platform, s.Key, s.Value)
		}
	}
	if settings["GOOS"]+"_"+settings["GOARCH"] != platform || settings["CGO_ENABLED"] != "0" ||
		settings["-trimpath"] != "true" || settings["-tags"] != "" {
		t.Errorf("%s: build settings %v", platform, settings)
	}
	if strings.Contains(read(t, path), testDir) || strings.Contains(read(t, path), root) {
		t.Errorf("%s: the binary contains a path of this machine", platform)
	}
	if platform != runtime.GOOS+"_"+runtime.GOARCH {
		return
	}
	first, _ := built()
	commit := must(output(first, nil, "git", "rev-parse", "HEAD"))(t)
	// RunningVersion and the User-Agent are this version, as e2e tests.
	got, err := output("", nil, path, "-version")
	want := fmt.Sprintf("%s %s, commit %s, %s\n", project, testTag, commit[:12], info.GoVersion)
	if err != nil || got != want {
		t.Errorf("-version: %q (%v), want %q", got, err, want)
	}
}

// checkSBOM compares an SBOM with the binary, which has the same modules, each with its
// version and an allowed license, and nothing that differs from build to build.
func checkSBOM(t *testing.T, path, binary, sum string) {
	t.Helper()
	var bom cdx.BOM
	check(t, cdx.NewBOMDecoder(strings.NewReader(read(t, path)), cdx.BOMFileFormatJSON).Decode(&bom))
	main := bom.Metadata.Component
	if main.Name != module || main.Version != testTag ||
		(*main.Hashes)[0].Value != sum || (*main.Licenses)[0].License.ID != "MPL-2.0" {
		t.Errorf("%s: main component %+v", path, main)
	}
	if bom.SerialNumber != "" || bom.Metadata.Timestamp != "" {
		t.Errorf("%s: serial number %q, timestamp %q", path, bom.SerialNumber, bom.Metadata.Timestamp)
	}
	info := must(buildinfo.ReadFile(binary))(t)
	want := []string{"std@" + info.GoVersion}
	for _, dep := range info.Deps {
		want = append(want, dep.Path+"@"+dep.Version)
	}
	var got []string
	for _, c := range *bom.Components {
		got = append(got, c.Name+"@"+c.Version)
		if c.Licenses == nil {
			t.Errorf("%s: %s has no license", path, c.Name)
			continue
		}
		for _, l := range *c.Licenses {
			if !slices.Contains(allowed, l.License.ID) {
				t.Errorf("%s: %s is under %s", path, c.Name, l.License.ID)
			}
		}
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("%s: components %q, want %q", path, got, want)
	}
}

// TestLicenses checks that each text is in the file, and that a license that is not
// allowed stops the release.
func TestLicenses(t *testing.T) {
	dir := must(built())(t)
	text := read(t, filepath.Join(dir, ".cache/release", licensesFile))
	for _, want := range []string{
		"Go standard library go1.", "github.com/hashicorp/vault/sdk v", ": MPL-2.0",
		"github.com/hashicorp/go-hclog v", ": MIT",
		"Mozilla Public License", "Apache License", "The Prometheus Authors", // the last is from a NOTICE
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%s does not contain %q", licensesFile, want)
		}
	}
	before := allowed
	t.Cleanup(func() { allowed = before; os.Unsetenv("GOOS") })
	allowed = slices.DeleteFunc(slices.Clone(allowed), func(id string) bool { return id == "ISC" })
	t.Chdir(dir)
	_, err := collectLicenses(t.Context(), []string{"linux"})
	if err == nil || !strings.Contains(err.Error(), "is under ISC, which tools/release/licenses.go does not allow") {
		t.Errorf("without ISC in the list: %v", err)
	}
	t.Log(err)
}

// TestImage builds the image from binaries of a few bytes, serves it from a
// registry on loopback, and takes the binaries out again as OpenBao does, which reads the
// file of the plugin's name in the root of the image for a platform.
func TestImage(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	licenses := ".cache/release/" + licensesFile
	for _, file := range []string{"LICENSE", licenses, "dist/amd64", "dist/arm", "dist/windows"} {
		write(t, file, "content of "+file, 0o640)
	}
	r := &release{commit: strings.Repeat("c0ffee", 7)[:40], version: testVersion, date: time.Unix(1600000000, 0).UTC()}
	for _, b := range []binary{
		{"linux", "amd64", "dist/amd64", ""},
		{"linux", "arm", "dist/arm", ""},
		{"windows", "amd64", "dist/windows", ""},
	} {
		b.sha256 = must(sha256File(b.path))(t)
		r.binaries = append(r.binaries, b)
	}
	check(t, r.writeImage())
	ref := push(t, "dist/"+project+"_"+testVersion+"_oci")
	manifest := must(must(remote.Index(ref))(t).IndexManifest())(t)
	if len(manifest.Manifests) != 2 {
		t.Fatalf("index: %+v", manifest)
	}
	for _, b := range r.binaries[:2] {
		image := must(remote.Image(ref, remote.WithPlatform(v1.Platform{OS: "linux", Architecture: b.goarch})))(t)
		files := extract(t, image)
		if got, want := files[project], read(t, b.path); got != want || len(files) != 3 ||
			files["LICENSE"] == "" || files[licensesFile] == "" {
			t.Errorf("%s: files %q", b.goarch, files)
		}
		config := must(image.ConfigFile())(t)
		m := must(image.Manifest())(t)
		if config.Config.User != "65532:65532" || !slices.Equal(config.Config.Entrypoint, []string{"/" + project}) ||
			!config.Created.Equal(r.date) || config.Architecture != b.goarch {
			t.Errorf("%s: config %+v", b.goarch, config)
		}
		digest := must(image.Digest())(t)
		stated := []string{config.Config.Labels[sumLabel], m.Annotations[sumLabel]}
		for _, d := range manifest.Manifests {
			if d.Digest == digest {
				stated = append(stated, d.Annotations[sumLabel])
			}
		}
		if !slices.Equal(stated, []string{b.sha256, b.sha256, b.sha256}) {
			t.Errorf("%s: sums %q in config, manifest and index, want %s", b.goarch, stated, b.sha256)
		}
	}
	// The file contains the folder, so that a registry can be compared with either.
	files := untar(t, must(os.Open("dist/"+project+"_"+testVersion+"_oci.tar"))(t))
	want := read(t, "dist/"+project+"_"+testVersion+"_oci/index.json")
	if got := files["index.json"]; got != want || files["oci-layout"] == "" || len(files) != 2+1+2*3 {
		t.Errorf("the tar has %d files, index %q, want %q", len(files), got, want)
	}
}

// TestReleasedImage takes the binary of this release out of its image.
func TestReleasedImage(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("the image is for Linux")
	}
	platform := v1.Platform{OS: "linux", Architecture: runtime.GOARCH}
	image := must(remote.Image(push(t, dist(t, "oci")), remote.WithPlatform(platform)))(t)
	path := filepath.Join(t.TempDir(), project)
	write(t, path, extract(t, image)[project], 0o755)
	binary := fmt.Sprintf("%s_%s_linux_%s/%[1]s", project, testVersion, runtime.GOARCH)
	checkSum(t, path, sums(t, dist(t, "PLUGIN_SHA256SUMS"))[binary])
}

// image returns the name of an image in a registry of its own on loopback.
func image(t *testing.T) string {
	t.Helper()
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://") + "/" + project
}

// push pushes a layout to a registry of its own, as `crane push DIR REF` does.
func push(t *testing.T, dir string) name.Reference {
	t.Helper()
	ref := must(name.ParseReference(image(t) + ":" + testTag))(t)
	must(output("", nil, "crane", "push", dir, ref.String()))(t)
	m := must(must(layout.ImageIndexFromPath(dir))(t).IndexManifest())(t)
	if d, err := remote.Head(ref); err != nil || d.Digest != m.Manifests[0].Digest {
		t.Fatalf("the registry serves %+v (%v), want the digest of index.json, %s", d, err, m.Manifests[0].Digest)
	}
	return ref
}

func extract(t *testing.T, image v1.Image) map[string]string {
	t.Helper()
	return untar(t, mutate.Extract(image))
}

func untar(t *testing.T, from io.ReadCloser) map[string]string {
	t.Helper()
	defer from.Close()
	files := map[string]string{}
	for r := tar.NewReader(from); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		check(t, err)
		files[h.Name] = string(must(io.ReadAll(r))(t))
	}
}

// TestReleaseStarts starts this release in a real server. Neither an archive nor an image
// that contains another binary than the published sum's is started.
func TestReleaseStarts(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("the image is for Linux")
	}
	const changeImage = `mkdir layout layer && tar -xf *_oci.tar -C layout
for blob in layout/blobs/sha256/*; do
  if tar -xzf $blob -C layer 2>/dev/null; then echo >>layer/` + project + `; tar -czf $blob -C layer .; fi
done
tar -cf *_oci.tar -C layout .`
	for _, tt := range []struct{ change, started string }{
		{"", "Both binaries of " + testTag + " mint."},
		{"sed -i 's/^......../00000000/' *_PLUGIN_SHA256SUMS", "== from-archive"},
		{changeImage, "== " + project + "-" + testTag},
	} {
		dir := t.TempDir()
		copyFiles(t, filepath.Dir(dist(t, "")), dir)
		must(output(dir, nil, "bash", "-euc", tt.change))(t)
		out, err := output(dir, nil, filepath.Join(root, "scripts/release-start"), dir)
		last := out[strings.LastIndex("\n"+out, "\n== "):]
		if tt.change == "" {
			check(t, err)
		} else if err == nil || !strings.Contains(err.Error(), "checksum") {
			t.Errorf("after %s: %v", tt.change, err)
		}
		if !strings.Contains(last, tt.started) {
			t.Errorf("after %s: the last binary was %s, want %s", tt.change, last, tt.started)
		}
	}
}

// TestVEX writes the OpenVEX document of this release with a database of two made-up
// vulnerabilities that no code of the plugin reaches.
func TestVEX(t *testing.T) {
	t.Parallel()
	dir, database := filepath.Join(t.TempDir(), "clone"), t.TempDir()
	must(output("", nil, "git", "clone", "-q", must(built())(t), dir))(t)
	copyFiles(t, filepath.Dir(dist(t, "")), filepath.Join(dir, "dist"))
	document := filepath.Join(dir, "dist", project+"_"+testVersion+".openvex.json")
	const hclog = "github.com/hashicorp/go-hclog"
	add := func(id, module, pkg, symbol string) string {
		write(t, filepath.Join(database, "ID", id+".json"), fmt.Sprintf(`{"id": %q, "modified": %q, "affected": [{
			"package": {"name": %q, "ecosystem": "Go"},
			"ranges": [{"type": "SEMVER", "events": [{"introduced": "0"}]}],
			"ecosystem_specific": {"imports": [{"path": %q, "symbols": [%q]}]}}]}`,
			id, testCommit, module, pkg, symbol), 0o600)
		return fmt.Sprintf(`{"path": %q, "vulns": [{"id": %q, "modified": %q}]}`, module, id, testCommit)
	}
	modules := add("GO-2026-9001", hclog, hclog+"/none", "New") + "," +
		add("GO-2026-9002", "stdlib", "net/http", "ServeFileFS")
	write(t, filepath.Join(database, "index/db.json"), fmt.Sprintf(`{"modified": %q}`, testCommit), 0o600)
	write(t, filepath.Join(database, "index/modules.json"), "["+modules+"]", 0o600)
	must(output(dir, nil, filepath.Join(testDir, "release"), "vex", "file://"+database))(t)
	text := read(t, document)
	product := "pkg:golang/" + module
	for part, count := range map[string]int{
		`"status": "not_affected"`:                                      2,
		`"justification": "vulnerable_code_not_present"`:                1,
		`"justification": "vulnerable_code_not_in_execute_path"`:        1,
		`"@id": "` + product + `"`:                                      2,
		`"@id": "` + product + "@" + testTag + `"`:                      2,
		`"@id": "pkg:golang/` + hclog + "@v":                            2,
		`"@id": "pkg:golang/std@go1.`:                                   2,
		`/releases/download/` + testTag + "/" + filepath.Base(document): 1,
		"Unknown": 0,
	} {
		if got := strings.Count(text, part); got != count {
			t.Errorf("the document has %d times %s, want %d:\n%s", got, part, count, text)
		}
	}
	reached := strings.Replace(text, "not_affected", "affected", 1)
	if _, err := completeVEX([]byte(reached), testTag, ""); err == nil {
		t.Error("a vulnerability that code reaches is accepted")
	}
}

// TestSnapshotVersion checks that snapshots of different commits differ in their versions.
func TestSnapshotVersion(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	for _, step := range []struct{ commands, want string }{
		{"git init -q && git commit -qm one --allow-empty", "v0.0.0-20200202020202-COMMIT"},
		{"git tag v1.2.3 && git commit -qm two --allow-empty", "v1.2.4-0.20200202020202-COMMIT"},
		{"touch new", "v1.2.4-0.20200202020202-COMMIT.dirty"},
		{"git add new && git commit -qm three && git tag v1.3.0-rc.1", "v1.3.0-rc.1.0.20200202020202-COMMIT"},
	} {
		must(output(dir, gitEnv, "bash", "-euc", step.commands))(t)
		r := must(headCommit(t.Context()))(t)
		want := strings.ReplaceAll(step.want, "COMMIT", r.commit[:12])
		if got, err := snapshotVersion(t.Context(), r); err != nil || got != want {
			t.Errorf("after %s: %s (%v), want %s", step.commands, got, err, want)
		}
	}
}

// TestNotes checks that a version without a section in CHANGELOG.md is not released.
func TestNotes(t *testing.T) {
	dir := must(built())(t)
	t.Chdir(dir)
	if got, err := notes(testTag); err != nil || got != "A test.\n" {
		t.Errorf("notes of %s: %q, %v", testTag, got, err)
	}
	if got, err := notes("v9.9"); err == nil {
		t.Errorf("notes of v9.9: %q", got)
	}
}
