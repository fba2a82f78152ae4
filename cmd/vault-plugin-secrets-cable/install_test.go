// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// installed is the name of the file that -install makes.
var installed = "vault-plugin-secrets-cable-" + testVersion + map[bool]string{true: ".exe"}[runtime.GOOS == "windows"]

// content returns the content of a file.
func content(t *testing.T, path string) []byte {
	t.Helper()
	return must(os.ReadFile(path))(t)
}

// onlyInstalled checks that a folder has a complete copy of the plugin, with its mode, and nothing else.
func onlyInstalled(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != installed {
		t.Fatalf("the folder has %v (%v), want %s", entries, err, installed)
	}
	info, err := entries[0].Info()
	if err != nil || runtime.GOOS != "windows" && info.Mode() != 0o755 {
		t.Errorf("mode %v (%v), want 0755", info.Mode(), err)
	}
	if path := filepath.Join(dir, installed); !bytes.Equal(content(t, path), content(t, build(t))) {
		t.Errorf("%s is another file", path)
	}
}

// TestInstall checks that -install leaves a complete file that all users can run, or nothing,
// and never replaces a file.
func TestInstall(t *testing.T) {
	t.Parallel()
	plugin := build(t)
	program := content(t, plugin)
	write := func(content []byte, mode os.FileMode) func(string) error {
		return func(path string) error { return errors.Join(os.WriteFile(path, content, mode), os.Chmod(path, mode)) }
	}
	link := func(to string) func(string) error {
		return func(path string) error { return os.Symlink(to, path) }
	}
	const notRegular, otherContent = "is not a regular file", "other content, and is never replaced: its SHA-256 is "
	const full = `trap "" XFSZ && ulimit -f 100 && exec "$0" "$@"`
	tests := map[string]struct {
		before func(path string) error // prepares the path of the new file
		script string                  // runs the plugin, $0, by a shell
		error  string                  // a part of it, or "" for success
	}{
		"nothing there":                   {},
		"umask 077":                       {script: `umask 077 && exec "$0" "$@"`},
		"the same file":                   {before: write(program, 0o755)},
		"the same file, umask":            {before: write(program, 0o600)},
		"the same file, for all to write": {before: write(program, 0o777)},
		"the same file, setuid":           {before: write(program, 0o755|os.ModeSetuid)},
		"another file":                    {before: write([]byte("another"), 0o755), error: otherContent},
		"the start of the file":           {before: write(program[:1000], 0o755), error: otherContent},
		"a folder": {
			before: func(path string) error { return os.Mkdir(path, 0o755) },
			error:  notRegular,
		},
		"a link to the file": {before: link(plugin), error: notRegular},
		"a link to nothing":  {before: link("nothing"), error: notRegular},
		"no folder": {
			before: func(path string) error { return os.Remove(filepath.Dir(path)) },
			error:  "no such file or directory",
		},
		"the disk is full":                {script: full, error: "file too large"},
		"the same file, the disk is full": {before: write(program, 0o755), script: full},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if runtime.GOOS == "windows" && (tt.script != "" || strings.Contains(name, "link")) {
				t.Skip("Windows has no shell, and links need a right there")
			}
			dir := filepath.Join(t.TempDir(), "plugins")
			path := filepath.Join(dir, installed)
			check(t, os.Mkdir(dir, 0o755))
			if tt.before != nil {
				check(t, tt.before(path))
			}
			before, _ := os.ReadDir(dir)
			cmd := exec.Command(plugin, "-install", dir)
			if tt.script != "" {
				cmd = exec.Command("/bin/sh", "-c", tt.script, plugin, "--install="+dir)
			}
			stdout, stderr, status := run(cmd)
			t.Log(stderr)
			if tt.error == "" {
				want := fmt.Sprintf("%x  %s\n", sha256.Sum256(program), path)
				if status != 0 || stdout != want {
					t.Fatalf("exit status %d, standard output %q, want %q", status, stdout, want)
				}
				remedy := "run: setcap cap_ipc_lock=+ep " + path + "\n"
				if runtime.GOOS == "linux" && !strings.HasSuffix(stderr, remedy) {
					t.Errorf("standard error: %q", stderr)
				}
				onlyInstalled(t, dir)
				return
			}
			if status != 1 || stdout != "" {
				t.Errorf("exit status %d, standard output %q", status, stdout)
			}
			if !strings.HasPrefix(stderr, "vault-plugin-secrets-cable was not installed: ") ||
				runtime.GOOS != "windows" && !strings.Contains(stderr, tt.error) {
				t.Errorf("standard error: %q, want %q", stderr, tt.error)
			}
			if after, _ := os.ReadDir(dir); fmt.Sprint(after) != fmt.Sprint(before) {
				t.Errorf("the folder has %v, before %v", after, before)
			}
			if name == "another file" && string(content(t, path)) != "another" {
				t.Error("the file was replaced")
			}
		})
	}
}

// TestInstallAtOnce has several processes install at once, of which each succeeds, and
// ends others meanwhile, which leave a complete file or nothing.
func TestInstallAtOnce(t *testing.T) {
	t.Parallel()
	plugin, dir := build(t), t.TempDir()
	var wg sync.WaitGroup
	for range 5 {
		wg.Go(func() {
			if out, err := exec.Command(plugin, "-install", dir).CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	wg.Wait()
	onlyInstalled(t, dir)
	if runtime.GOOS == "windows" {
		return // it has no signals that one process sends to another
	}
	for try := range 20 {
		dir := t.TempDir()
		cmd := exec.Command(plugin, "-install", dir)
		check(t, cmd.Start())
		time.Sleep(time.Duration(try) * 5 * time.Millisecond)
		_ = cmd.Process.Signal(os.Interrupt)
		ended := cmd.Wait()
		if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
			onlyInstalled(t, dir)
		}
		t.Logf("interrupted after %d ms: %v", 5*try, ended)
	}
}

// TestInstallAlone installs from a root folder that contains nothing but the plugin, as
// the image does, and as a user other than root.
func TestInstallAlone(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" || os.Geteuid() != 0 {
		skipUnlessRequired(t, "to change the root folder takes root, on Linux")
	}
	needProgram(t, "chroot")
	root := must(os.MkdirTemp("", "cable-root-"))(t) // t.TempDir is behind folders of root alone
	t.Cleanup(func() { _ = os.RemoveAll(root) })
	program, plugins := content(t, build(t)), filepath.Join(root, "plugins")
	check(t, os.WriteFile(filepath.Join(root, "plugin"), program, 0o755))
	check(t, errors.Join(os.Chmod(root, 0o755), os.Mkdir(plugins, 0o755), os.Chown(plugins, 100, 1000)))
	out, err := exec.Command("chroot", "--userspec=100:1000", root, "/plugin", "-install", "/plugins").Output()
	if want := fmt.Sprintf("%x  /plugins/%s\n", sha256.Sum256(program), installed); err != nil || string(out) != want {
		t.Fatalf("%v, %q, want %q", err, out, want)
	}
	onlyInstalled(t, plugins)
}
