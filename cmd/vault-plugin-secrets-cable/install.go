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

// install copies this program to dir/vault-plugin-secrets-cable-VERSION, for images that contain nothing else to copy
// it with, and prints the SHA-256 and path of that file as sha256sum does. The file appears complete or not at all, and
// never replaces another one. If it is there already, that is success. install returns the exit status.
func install(dir string, stdout, stderr io.Writer) int {
	path := filepath.Join(dir, "vault-plugin-secrets-cable-"+version.String())
	if runtime.GOOS == "windows" {
		path += ".exe"
	}
	program, err := ownProgram()
	if err == nil {
		err = place(path, program)
	}
	if errors.Is(err, fs.ErrExist) {
		err = isInstalled(path, program)
	}
	if err != nil {
		_, _ = fmt.Fprintln(stderr, "vault-plugin-secrets-cable was not installed:", err)
		return 1
	}
	if runtime.GOOS == "linux" {
		_, _ = fmt.Fprintln(stderr, "File capabilities are not copied. If Vault locks its memory, run:", setcap, path)
	}
	_, _ = fmt.Fprintf(stdout, "%x  %s\n", sha256.Sum256(program), path)
	return 0
}

// ownProgram returns the content of this program's file.
func ownProgram() ([]byte, error) {
	path, err := os.Executable()
	if err != nil { // there is no /proc, as in a chroot
		path, err = exec.LookPath(os.Args[0])
	}
	if err != nil {
		return nil, fmt.Errorf("finding this program's own file: %w", err)
	}
	return os.ReadFile(path) //nolint:gosec // this program's own file
}

// place writes the program to a file of another name first. Then it links that file to
// path, because a link never replaces a file. A signal before that leaves nothing.
func place(path string, program []byte) error {
	if _, err := os.Lstat(path); err == nil {
		return fs.ErrExist // even if the disk is full, or read-only, by now
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	file, err := os.CreateTemp(filepath.Dir(path), ".vault-plugin-secrets-cable-*")
	if err != nil {
		return err
	}
	_, err = file.Write(program)
	err = errors.Join(err, file.Chmod(0o755), file.Sync(), file.Close(), context.Cause(ctx))
	if err == nil {
		err = os.Link(file.Name(), path)
	}
	return errors.Join(err, os.Remove(file.Name()))
}

// isInstalled returns nil if path is a file with the program. It corrects the file's
// mode, because Vault's user cannot read a copy that was made under umask 077.
func isInstalled(path string, program []byte) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is there, and is not a regular file", path)
	}
	content, err := os.ReadFile(path) //nolint:gosec // a path of the operator's
	if err != nil {
		return err
	}
	if got, want := sha256.Sum256(content), sha256.Sum256(program); got != want {
		return fmt.Errorf("%s is there with other content, and is never replaced: "+
			"its SHA-256 is %x, this program's is %x", path, got, want)
	}
	if info.Mode()|0o200 == 0o755 { // 0555 is as good; a setuid bit is not
		return nil
	}
	return os.Chmod(path, 0o755) //nolint:gosec // Vault's user has to run it
}
