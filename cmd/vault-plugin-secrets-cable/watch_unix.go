// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

//go:build unix

package main

import (
	"os"

	"golang.org/x/sys/unix"
)

// newParent returns a function that reports whether the parent is gone, which is so if
// all pipes to it are broken, or if one is and the process id of the parent has changed.
// Call it before anything replaces the process's standard output.
//
// Vault reads standard output and error from pipes as long as the plugin runs, and no
// other process has the reading ends. When the last reader of a pipe is gone, poll(2)
// reports it on the write end, as POLLERR on Linux and as POLLHUP on FreeBSD and macOS.
// That holds in a PID namespace, where the parent's id is 0 before and after, and under
// a wrapper script, which passes the pipes on. A file or terminal that a script
// redirects to is no sign.
func newParent(files ...*os.File) (gone func() bool) {
	var pipes []*os.File
	for _, f := range files {
		if info, err := f.Stat(); err == nil && info.Mode()&(os.ModeNamedPipe|os.ModeSocket) != 0 {
			pipes = append(pipes, f)
		}
	}
	parent := os.Getppid()
	return func() bool {
		n := 0
		for _, f := range pipes {
			if broken(f) {
				n++
			}
		}
		return n > 0 && (n == len(pipes) || os.Getppid() != parent)
	}
}

// broken reports whether a pipe has lost its last reader. An error means that it may
// have one.
func broken(f *os.File) (broken bool) {
	conn, err := f.SyscallConn()
	if err != nil {
		return false
	}
	err = conn.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd)}} //nolint:gosec // a descriptor is a small number
		n, err := unix.Poll(fds, 0)
		broken = err == nil && n == 1 && fds[0].Revents&(unix.POLLERR|unix.POLLHUP) != 0
	})
	return broken && err == nil
}
