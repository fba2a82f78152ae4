// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

//go:build unix

package main

import (
	"os"

	"golang.org/x/sys/unix"
)

// moveStderr gives standard error a descriptor of its own, and points descriptor 2 at
// null, also for code that kept a reference to it. If the system has no descriptor
// left, everything stays as it is.
//
// NOTE: Go ends a process that writes to a broken pipe if, and only if, the descriptor
// is 1 or 2 (package os/signal, SIGPIPE). Through another descriptor, a reader of the
// log that went away does not end the plugin.
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
