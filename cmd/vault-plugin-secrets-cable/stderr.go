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

// claimStderr returns standard error for the logger alone, so that only the structured
// log reaches it. Vault logs all that it reads from a plugin's standard error, and Go's
// libraries print secrets there: net/http an unsolicited response on a connection, gRPC
// the frames of Vault's requests if GODEBUG=http2debug=2 is set.
//
// The runtime's crash report is the exception. The engine recovers the panics of its
// handlers and goroutines and logs no value, so only a panic in a library's own goroutine
// is reported there.
func claimStderr() *os.File {
	stderr := os.Stderr
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err == nil {
		stderr = moveStderr(null)
		os.Stderr = null
	}
	_ = debug.SetCrashOutput(stderr, debug.CrashOptions{})
	// These kept the old os.Stderr, which moveStderr cannot change on every system.
	log.SetOutput(io.Discard)
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	hclog.DefaultOutput = stderr
	return stderr
}
