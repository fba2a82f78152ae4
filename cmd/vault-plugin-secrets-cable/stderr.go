// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"io"
	"log"
	"os"
	"runtime/debug"

	"github.com/hashicorp/go-hclog"
	"google.golang.org/grpc/grpclog"
)

// claimStderr returns standard error for the logger alone: whatever else is
// written there from now on goes nowhere. Vault logs all that it reads from a
// plugin's standard error, and Go's libraries write there what they find on a
// connection (a response that nobody asked for: net/http's Transport) or what the
// environment asks for (GODEBUG=http2debug=2, GRPC_GO_LOG_SEVERITY_LEVEL): the
// refresh key and tokens.
//
// The exception is the runtime's report of a crash: without it nobody could tell
// why the plugin ended, and no panic value holds a secret.
func claimStderr() *os.File {
	stderr := os.Stderr
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err == nil {
		stderr = moveStderr(null)
		os.Stderr = null
	}
	_ = debug.SetCrashOutput(stderr, debug.CrashOptions{})
	// These have kept the os.Stderr of before, which moveStderr cannot change on
	// every system.
	log.SetOutput(io.Discard)
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	hclog.DefaultOutput = stderr
	return stderr
}
