// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"io"
	"log"
	"math"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"github.com/hashicorp/vault/sdk/plugin"
	"google.golang.org/grpc"
	"google.golang.org/grpc/grpclog"
	"google.golang.org/grpc/keepalive"

	cablesecrets "github.com/cablesecrets/vault-plugin-secrets-cable"
)

const protocolVersion = 5 // of go-plugin, which Vault and this plugin speak multiplexed and with AutoMTLS

// serve serves the plugin until Vault ends it or is gone. It returns the exit status: 1 if it cannot run, else 0.
//
// NOTE: standard output belongs to the handshake and standard error to the logger. Nothing else may write to either.
func serve(args []string) (status int) {
	// go-plugin replaces both. Without a reference they would be finalized, their
	// descriptors closed, and the numbers given to the next connections.
	stdout, stderr := os.Stdout, os.Stderr
	defer runtime.KeepAlive(stdout)
	defer runtime.KeepAlive(stderr)
	logFile := claimStderr()
	// NOTE: Vault filters the lines by its own level, which it does not tell a plugin. To write each token request's
	// debug line, send it, and have Vault drop it would cost a tenth of the request. So the level is info unless the
	// environment names another one, either the server's, which plugins inherit, or one set with -env at registration.
	level := hclog.LevelFromString(os.Getenv("VAULT_LOG_LEVEL"))
	logger := hclog.New(&hclog.LoggerOptions{Level: level, Output: logFile, JSONFormat: true})
	hclog.SetDefault(logger)
	start := &startLogger{Logger: logger}
	defer start.end(&status)
	if len(args) > 0 {
		// Other plugins take -ca-cert=…, so it is often given at registration. If it were refused, the mount could not
		// be enabled. The arguments are never printed, because they may contain anything.
		logger.Warn("arguments given at registration ignored: this plugin takes none", "count", len(args))
	}
	if remedy, err := checkStart(); err != nil {
		start.fail(remedy, err)
		return 1
	}
	// The engine keeps a few MiB in memory, so Go would collect after every few
	// hundred mints; twice the room costs some MiB and saves a part of that.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(200)
	}
	watch := &watch{gone: newParent(stdout, logFile), signals: make(chan os.Signal, 1)}
	signal.Notify(watch.signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	// This does the same as plugin.ServeMultiplex in Vault's SDK, which takes no options for the gRPC server, and
	// offers older plugin protocols, which Vault 1.16 and later do not speak with a plugin.
	backend := &plugin.GRPCBackendPlugin{Factory: cablesecrets.Factory, MultiplexingSupport: true, Logger: logger}
	goplugin.Serve(&goplugin.ServeConfig{
		HandshakeConfig:  plugin.HandshakeConfig,
		VersionedPlugins: map[int]goplugin.PluginSet{protocolVersion: {plugin.BackendPluginName: backend}},
		Logger:           start,
		GRPCServer: func(opts []grpc.ServerOption) *grpc.Server {
			server := goplugin.DefaultGRPCServer(append(opts,
				grpc.MaxRecvMsgSize(math.MaxInt32), grpc.MaxSendMsgSize(math.MaxInt32), grpc.StatsHandler(watch),
				// By default a connection whose other end has been silent for two hours and does not respond is given
				// up. A Vault that was stopped, by a debugger or a snapshot, still runs.
				grpc.KeepaliveParams(keepalive.ServerParameters{Time: math.MaxInt64})))
			go watch.stopWhenGone(server)
			return server
		},
	})
	return status
}

// claimStderr returns standard error for the logger alone, so that only the structured log reaches it. Vault logs all
// that it reads from a plugin's standard error, and Go's libraries print secrets there: net/http an unsolicited
// response on a connection, gRPC the frames of Vault's requests if GODEBUG=http2debug=2 is set.
//
// The runtime's crash report is the exception. The engine recovers the panics of its handlers and goroutines and logs
// no value, so only a panic in a library's own goroutine is reported there.
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
