// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"os"
	"sync/atomic"

	"golang.org/x/sys/windows"
)

// moveStderr makes null the handle that the runtime prints to. The old handle, which
// os.Stderr keeps, stays open for the logger.
func moveStderr(null *os.File) *os.File {
	_ = windows.SetStdHandle(windows.STD_ERROR_HANDLE, windows.Handle(null.Fd()))
	return os.Stderr
}

// newParent returns a function that reports whether the parent process has ended. An error means that it may run. On
// Windows the stored id of the parent never changes, and another process may have it already, which is why the function
// counts only while no connection is open.
//
// NOTE: under a wrapper script the parent is the script's interpreter, which may wait
// for the plugin. Then the plugin ends after a minute without a connection.
func newParent(...*os.File) (gone func() bool) {
	var ended atomic.Bool
	if parent, err := os.FindProcess(os.Getppid()); err == nil {
		go func() {
			_, err := parent.Wait()
			ended.Store(err == nil)
		}()
	}
	return ended.Load
}
