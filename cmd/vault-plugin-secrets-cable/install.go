// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/version"
)

// install copies this program to dir/vault-plugin-secrets-cable-VERSION, for images
// that contain nothing else to copy it with, and prints the SHA-256 and path of that
// file as sha256sum does. The file appears complete or not at all, and never replaces
// another one. If it is there already, that is success. install returns the exit
// status.
func install(dir string, stdout, stderr io.Writer) int {
	path := filepath.Join(dir, "vault-plugin-secrets-cable-"+version.String())
	if runtime.GOOS == "windows" {
		path += ".exe"
	}
	sum, err := installAs(path)
	if err != nil {
		_, _ = fmt.Fprintln(stderr, "vault-plugin-secrets-cable was not installed:", err)
		return 1
	}
	if runtime.GOOS == "linux" {
		_, _ = fmt.Fprintln(stderr, "File capabilities are not copied. If Vault locks its memory, run:", setcap, path)
	}
	_, _ = fmt.Fprintf(stdout, "%s  %s\n", sum, path)
	return 0
}

// installAs is install for the path of the new file. It returns the SHA-256.
func installAs(path string) (sum string, err error) {
	self, err := os.Executable()
	if err != nil { // there is no /proc, as in a chroot
		self, err = exec.LookPath(os.Args[0])
	}
	if err != nil {
		return "", fmt.Errorf("finding this program's own file: %w", err)
	}
	if sum, err = sha256Of(self); err != nil {
		return "", err
	}
	err = isInstalled(path, sum)
	if errors.Is(err, fs.ErrNotExist) {
		if err = place(self, path); err == nil || errors.Is(err, fs.ErrExist) { // by another process
			err = isInstalled(path, sum)
		}
	}
	return sum, err
}

// isInstalled returns nil if path is a file with that sum. It corrects the file's mode,
// because Vault's user cannot read a copy that was made under umask 077.
func isInstalled(path, sum string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is there, and is not a regular file", path)
	}
	got, err := sha256Of(path)
	if err != nil {
		return err
	}
	if got != sum {
		return fmt.Errorf("%s is there with other content, and is never replaced: "+
			"its SHA-256 is %s, this program's is %s", path, got, sum)
	}
	if info.Mode()|0o200 == 0o755 { // 0555 is as good; a setuid bit is not
		return nil
	}
	return os.Chmod(path, 0o755) //nolint:gosec // Vault's user has to run it
}

// place copies a file to path under another name first. Then it links the copy there,
// because a link never replaces a file. A signal before that leaves nothing.
func place(self, path string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	from, err := os.Open(self) //nolint:gosec // this program's own file
	if err != nil {
		return err
	}
	defer func() { _ = from.Close() }()
	to, err := os.CreateTemp(dir.Name(), ".vault-plugin-secrets-cable-*")
	if err != nil {
		return err
	}
	_, err = io.Copy(to, from)
	err = errors.Join(err, to.Chmod(0o755), to.Sync(), to.Close(), context.Cause(ctx))
	if err == nil {
		err = os.Link(to.Name(), path)
	}
	err = errors.Join(err, os.Remove(to.Name()))
	if err == nil && runtime.GOOS != "windows" { // which cannot sync a folder
		err = dir.Sync()
	}
	return err
}

func sha256Of(path string) (string, error) {
	file, err := os.Open(path) //nolint:gosec // a path of the operator's
	if err != nil {
		return "", err
	}
	defer func() { _ = file.Close() }()
	hash := sha256.New()
	_, err = io.Copy(hash, file)
	return fmt.Sprintf("%x", hash.Sum(nil)), err
}
