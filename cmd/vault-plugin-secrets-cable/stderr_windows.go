// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"os"

	"golang.org/x/sys/windows"
)

// moveStderr makes null the handle that the runtime prints to. The old handle, which
// os.Stderr keeps, stays open for the logger.
func moveStderr(null *os.File) *os.File {
	_ = windows.SetStdHandle(windows.STD_ERROR_HANDLE, windows.Handle(null.Fd()))
	return os.Stderr
}
