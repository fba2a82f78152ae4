// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"os"

	"golang.org/x/sys/windows"
)

// newParent returns a function that reports whether the parent process has
// ended, by a handle on it: its id, unlike on Unix, never changes, and may be that
// of another process later. An error of any call means that it may run. If the
// parent has ended before the handle is taken and its id is that of another
// process, the function reports on that one: which is why it counts only if the
// server's streams have ended as well.
//
// NOTE: under a wrapper script the parent is the script's interpreter, which may
// wait for the plugin. Then the plugin ends for want of a stream and a call.
func newParent(...*os.File) (gone func() bool) {
	parent := os.Getppid()
	if parent <= 0 {
		return func() bool { return false }
	}
	handle, err := windows.OpenProcess(windows.SYNCHRONIZE, false, uint32(parent)) //nolint:gosec // checked above
	if err != nil {
		return func() bool { return false }
	}
	return func() bool {
		event, err := windows.WaitForSingleObject(handle, 0)
		return err == nil && event == windows.WAIT_OBJECT_0
	}
}
