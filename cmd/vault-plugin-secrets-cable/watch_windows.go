// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"os"

	"golang.org/x/sys/windows"
)

// newParent returns a function that reports whether the parent process has ended, by a
// handle on it. (On Windows the stored id of the parent never changes, and may be reused
// by another process.) An error of any call means that the parent may run. If another
// process has the id already when the handle is taken, the function reports on that
// process, which is why it counts only while no connection is open.
//
// NOTE: under a wrapper script the parent is the script's interpreter, which may wait
// for the plugin. Then the plugin ends after a minute without a connection.
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
