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

// claimStderr returns standard error for the logger alone, so that nothing but the
// structured log reaches it. Vault logs all that it reads from a plugin's standard
// error, and Go's libraries print secrets there: net/http an unsolicited response on a
// connection, and others whole frames if GODEBUG=http2debug=2 or
// GRPC_GO_LOG_SEVERITY_LEVEL is set.
//
// The exception is the runtime's report of a crash, without which the reason for the
// plugin's end would be lost. A panic's value may contain anything, and the report
// prints it. The engine recovers the panics of its handlers and goroutines, and logs
// no value, so only a panic in a library's own goroutine is reported here.
func claimStderr() *os.File {
	stderr := os.Stderr
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err == nil {
		stderr = moveStderr(null)
		os.Stderr = null
	}
	_ = debug.SetCrashOutput(stderr, debug.CrashOptions{})
	// These have kept the old os.Stderr, which moveStderr cannot change on every
	// system.
	log.SetOutput(io.Discard)
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	hclog.DefaultOutput = stderr
	return stderr
}
