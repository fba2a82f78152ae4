// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// A block is a block of commands in a page.
type block struct{ kind, text string }

func blocks(t *testing.T, page string) []block {
	t.Helper()
	var all []block
	fence := regexp.MustCompile("(?ms)^```(\\S+ ?\\S*)\n(.*?)^```$")
	for _, m := range fence.FindAllStringSubmatch(read(t, filepath.Join(root, page)), -1) {
		all = append(all, block{m[1], strings.ReplaceAll(m[2], "0.1.0", testVersion)})
	}
	return all
}

// TestVerify runs the commands of docs/verify.md on this release, with a throw-away key
// and a registry on loopback, except the commands that need a network. Then each must refuse
// each of the files that it reads with one byte changed. It does so in bash, and in
// Alpine's shell with Alpine's tools.
func TestVerify(t *testing.T) {
	t.Parallel()
	if runtime.GOOS+"/"+runtime.GOARCH != "linux/amd64" {
		t.Skip("the page is on linux_amd64")
	}
	for _, tool := range []string{"jq", "unzip", "openssl", "sha256sum"} {
		if _, err := exec.LookPath(tool); err != nil && os.Getenv("E2E") != "require" {
			t.Skip(tool, "is not installed")
		}
	}
	t.Run("bash", func(t *testing.T) {
		t.Parallel()
		verify(t, []string{"bash"}, os.Getenv("PATH"))
	})
	t.Run("Alpine", func(t *testing.T) {
		t.Parallel()
		busybox, err := exec.LookPath("busybox")
		if err != nil {
			t.Skip(err)
		}
		bin := t.TempDir()
		for _, applet := range strings.Fields("base64 cp cut grep mkdir sed sh sha256sum tar unzip") {
			check(t, os.Symlink(busybox, filepath.Join(bin, applet)))
		}
		verify(t, []string{busybox, "sh"}, bin+":"+os.Getenv("PATH"))
	})
}

// verify is TestVerify in one shell.
func verify(t *testing.T, shell []string, path string) {
	t.Helper()
	env := []string{
		"PATH=" + path, "HOME=" + t.TempDir(),
		"COSIGN_PASSWORD=", "version=" + testVersion, "name=" + project + "_" + testVersion,
	}
	pristine := t.TempDir()
	copyFiles(t, filepath.Dir(dist(t, "")), pristine)
	run := func(dir, image, text string) error {
		args := append(slices.Clone(shell[1:]), "-euo", "pipefail", "-c", text)
		_, err := output(dir, append(slices.Clone(env), "IMAGE="+image), shell[0], args...)
		return err
	}
	const sumsFile, plugins, archive = "${name}_SHA256SUMS", "${name}_PLUGIN_SHA256SUMS", "${name}_linux_amd64.zip"
	const own = "${name}_SHA256SUMS.own.sigstore.json"
	// The files that a block must refuse, by a part of it.
	refused := map[string][]string{
		"while read":                          {archive, "${name}_linux_amd64.cdx.json", "${name}_oci.tar", plugins},
		"unzip -qo":                           {archive, plugins},
		"cosign verify-blob --key cosign.pub": {sumsFile, own, "cosign.pub"},
		"openssl dgst":                        {sumsFile, own, "cosign.pub"},
		"crane push":                          {"${name}_oci.tar"},
	}
	ran, loopback := 0, image(t)
	for _, b := range blocks(t, "docs/verify.md") {
		if b.kind != "sh" {
			continue
		}
		ran++
		if err := run(pristine, loopback, b.text); err != nil {
			t.Fatalf("%s\n%v", b.text, err)
		}
		for contains, files := range refused {
			if !strings.Contains(b.text, contains) {
				continue
			}
			for _, file := range files {
				file = strings.ReplaceAll(file, "${name}", project+"_"+testVersion)
				changed := t.TempDir()
				copyFiles(t, pristine, changed)
				changeByte(t, filepath.Join(changed, file))
				if err := run(changed, image(t), b.text); err == nil {
					t.Errorf("with a byte changed in %s, this says nothing:\n%s", file, b.text)
				}
			}
		}
	}
	if ran < 9 {
		t.Errorf("%d blocks were run", ran)
	}
	// The digest was signed, so another image at the same place is refused.
	const other = `cp -r layout other
sed -i 's/"schemaVersion": 2/"schemaVersion":  2/' other/index.json
crane push --index other "$IMAGE:other"
! cosign verify --key cosign.pub --insecure-ignore-tlog "$IMAGE@$(crane digest "$IMAGE:other")"`
	check(t, run(pristine, loopback, other))
	// And one key is not another.
	const otherKey = `mkdir k && cd k && cosign generate-key-pair
! cosign verify-blob --key cosign.pub --insecure-ignore-tlog \
  --bundle "../${name}_SHA256SUMS.own.sigstore.json" "../${name}_SHA256SUMS"`
	check(t, run(pristine, loopback, otherKey))
}

// TestInstall runs the first block of the README's section on installing with the files of
// a release. It leaves a binary that installs itself, and fails if a byte was changed.
func TestInstall(t *testing.T) {
	t.Parallel()
	if runtime.GOOS+"/"+runtime.GOARCH != "linux/amd64" {
		t.Skip("the README is on linux_amd64")
	}
	at := slices.IndexFunc(blocks(t, "README.md"), func(b block) bool { return strings.Contains(b.text, "unzip") })
	if at < 0 {
		t.Fatal("the README unpacks nothing")
	}
	text := blocks(t, "README.md")[at].text + `"./$name/` + project + `" -install .`
	files := []string{dist(t, "linux_amd64.zip"), dist(t, "SHA256SUMS"), dist(t, "PLUGIN_SHA256SUMS")}
	for i, changed := range append([]string{""}, files[0], files[2]) {
		dir := t.TempDir()
		for _, file := range files {
			write(t, filepath.Join(dir, filepath.Base(file)), read(t, file), 0o600)
			if file == changed {
				changeByte(t, filepath.Join(dir, filepath.Base(file)))
			}
		}
		out, err := output(dir, nil, "bash", "-euo", "pipefail", "-c", text)
		installed := strings.HasSuffix(out, "  "+project+"-v"+testVersion+"\n")
		if installed != (i == 0) || (err == nil) != installed {
			t.Errorf("with a byte changed in %q: %v\n%s", filepath.Base(changed), err, out)
		}
	}
}

// TestVerifyFlags checks that cosign has each flag of the commands that need a network and
// cannot be run here.
func TestVerifyFlags(t *testing.T) {
	t.Parallel()
	checked := 0
	texts := []string{read(t, filepath.Join(root, ".github/workflows/release.yml"))}
	for _, b := range blocks(t, "docs/verify.md") {
		texts = append(texts, b.text)
	}
	for _, text := range texts {
		text = strings.ReplaceAll(text, "\\\n", " ")
		command := regexp.MustCompile(`(?m)\b(cosign|crane) ((?:trusted-root |auth )?[a-z-]+) (.*)$`)
		for _, m := range command.FindAllStringSubmatch(text, -1) {
			help, err := exec.Command(m[1], append(strings.Fields(m[2]), "--help")...).CombinedOutput()
			if err != nil {
				t.Errorf("%s: %v", m[0], err)
			}
			arguments, _, _ := strings.Cut(m[3], "$(")
			for _, flag := range regexp.MustCompile(` (--[a-z-]+)`).FindAllStringSubmatch(" "+arguments, -1) {
				checked++
				if !regexp.MustCompile(regexp.QuoteMeta(flag[1]) + `\b`).Match(help) {
					t.Errorf("%s %s has no flag %s", m[1], m[2], flag[1])
				}
			}
		}
	}
	if checked < 30 {
		t.Errorf("%d flags were checked", checked)
	}
}

// copyFiles copies the files of a folder, and leaves out its folders.
func copyFiles(t *testing.T, from, to string) {
	t.Helper()
	for _, e := range must(os.ReadDir(from))(t) {
		if !e.IsDir() {
			write(t, filepath.Join(to, e.Name()), read(t, filepath.Join(from, e.Name())), 0o600)
		}
	}
}

// changeByte flips a bit in the middle of a file.
func changeByte(t *testing.T, path string) {
	t.Helper()
	data := []byte(read(t, path))
	data[len(data)/2] ^= 1
	write(t, path, string(data), 0o600)
}
