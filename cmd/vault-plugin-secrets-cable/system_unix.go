// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

//go:build unix

package main

import (
	"os"

	"golang.org/x/sys/unix"
)

// moveStderr gives standard error a descriptor of its own, and points descriptor 2 at null, also for code that kept a
// reference to it. If the system has no descriptor left, everything stays as it is.
//
// NOTE: Go ends a process that writes to a broken pipe only if the descriptor is 1 or 2 (package os/signal, SIGPIPE).
// Through another descriptor, a reader of the log that went away does not end the plugin.
func moveStderr(null *os.File) *os.File {
	fd, err := unix.FcntlInt(2, unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return os.Stderr
	}
	if err := unix.Dup2(int(null.Fd()), 2); err != nil {
		_ = unix.Close(fd)
		return os.Stderr
	}
	return os.NewFile(uintptr(fd), "stderr")
}

// newParent returns a function that reports whether the parent is gone, which is so if all pipes to it are broken, or
// if one is and the process id of the parent has changed. The files must stay open.
//
// Vault reads standard output and error from pipes as long as the plugin runs, and no other process has the reading
// ends. When the last reader of a pipe is gone, poll(2) reports it on the write end, as POLLERR on Linux and as POLLHUP
// on FreeBSD and macOS. That holds in a PID namespace, where the parent's id is 0 before and after, and under a wrapper
// script, which passes the pipes on. A file or terminal that a script redirects to is no sign.
func newParent(files ...*os.File) (gone func() bool) {
	var pipes []unix.PollFd
	for _, f := range files {
		if info, err := f.Stat(); err == nil && info.Mode()&(os.ModeNamedPipe|os.ModeSocket) != 0 {
			pipes = append(pipes, unix.PollFd{Fd: int32(f.Fd())}) //nolint:gosec // a descriptor is a small number
		}
	}
	parent := os.Getppid()
	return func() bool {
		if _, err := unix.Poll(pipes, 0); err != nil {
			return false // a pipe may have a reader
		}
		broken := 0
		for _, p := range pipes {
			if p.Revents&(unix.POLLERR|unix.POLLHUP) != 0 {
				broken++
			}
		}
		return broken > 0 && (broken == len(pipes) || os.Getppid() != parent)
	}
}
