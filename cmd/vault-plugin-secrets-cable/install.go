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
		_, _ = fmt.Fprintf(stderr, "File capabilities are not copied. If Vault locks its memory, run: %s %s\n", setcap, path)
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
	from, err := os.Open(self)
	if err != nil {
		return "", err
	}
	defer from.Close()
	if sum, err = sha256Of(from); err != nil {
		return "", err
	}
	err = isInstalled(path, sum)
	if errors.Is(err, fs.ErrNotExist) {
		err = place(from, path)
	}
	if errors.Is(err, fs.ErrExist) { // another process was faster
		err = isInstalled(path, sum)
	}
	return sum, err
}

// isInstalled returns nil if path is a file with that sum. It gives the file its mode
// again, because a copy under umask 077 is one that Vault's user cannot read.
func isInstalled(path, sum string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is there, and is not a regular file", path)
	}
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	if got, err := sha256Of(file); err != nil {
		return err
	} else if got != sum {
		return fmt.Errorf("%s is there with other content, and is never replaced: "+
			"its SHA-256 is %s, this program's is %s", path, got, sum)
	}
	if info.Mode().Perm() == 0o755 {
		return nil
	}
	return os.Chmod(path, 0o755)
}

// place copies a file to path under another name first. Then it links the copy there,
// because a link never replaces a file. A signal before that leaves nothing.
func place(from *os.File, path string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	to, err := os.CreateTemp(filepath.Dir(path), ".vault-plugin-secrets-cable-*")
	if err != nil {
		return err
	}
	_, err = from.Seek(0, io.SeekStart)
	if err == nil {
		_, err = io.Copy(to, from)
	}
	err = errors.Join(err, to.Chmod(0o755), to.Sync(), to.Close(), context.Cause(ctx))
	if err == nil {
		err = os.Link(to.Name(), path)
	}
	err = errors.Join(err, os.Remove(to.Name()))
	if err != nil || runtime.GOOS == "windows" { // Windows cannot sync a directory
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

func sha256Of(file *os.File) (string, error) {
	hash := sha256.New()
	_, err := io.Copy(hash, file)
	return fmt.Sprintf("%x", hash.Sum(nil)), err
}
