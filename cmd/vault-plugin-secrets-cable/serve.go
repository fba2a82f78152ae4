// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"os"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/plugin"

	cablesecrets "github.com/cablesecrets/vault-plugin-secrets-cable"
)

// serve serves the plugin until Vault ends it or is gone. It returns the exit
// status: 1 if the plugin cannot run, else 0.
//
// NOTE: standard output belongs to the handshake and standard error to the
// logger: nothing else may write to either.
func serve(args []string) int {
	// go-plugin replaces both. Without a reference they would be finalized and
	// their descriptors closed, and the next connections would get the numbers.
	stdout, stderr := os.Stdout, os.Stderr
	defer runtime.KeepAlive(stdout)
	defer runtime.KeepAlive(stderr)
	logFile := claimStderr()
	logger := hclog.New(&hclog.LoggerOptions{
		Level:      logLevel(os.Getenv("VAULT_LOG_LEVEL")),
		Output:     logFile,
		JSONFormat: true,
	})
	hclog.SetDefault(logger)
	if len(args) > 0 {
		// Other plugins take -ca-cert=…, so it is often given at registration. If
		// it were refused, the mount could not be enabled. The arguments are never
		// printed: they may contain anything.
		logger.Warn("arguments given at registration ignored: this plugin takes none", "count", len(args))
	}
	// The engine keeps a few MiB in memory, so Go would collect after every few
	// hundred mints; twice the room costs some MiB and saves a part of that.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(200)
	}

	go endWithParent()
	// NOTE: no TLS provider. It serves plugin protocols before version 5, which
	// Vault 1.16 and later do not speak with a plugin; version 5 uses AutoMTLS.
	if err := plugin.ServeMultiplex(&plugin.ServeOpts{BackendFactoryFunc: cablesecrets.Factory, Logger: logger}); err != nil {
		logger.Error("the plugin cannot be served", "error", err)
		return 1
	}
	return 0
}

// endWithParent ends the process soon after Vault, its parent, is gone. A Vault
// that was killed ends no plugin, and this one holds the refresh key in memory.
func endWithParent() {
	for parent := os.Getppid(); os.Getppid() == parent; {
		time.Sleep(time.Second)
	}
	os.Exit(1) // without a word: nobody reads it
}

// logLevel is the level of what is sent to Vault, which filters what arrives by
// its own level.
//
// NOTE: Vault does not tell a plugin its level. To write each mint's debug line,
// send it, and have Vault drop it would cost a tenth of the mint, so it is
// written only if the level is set in the environment: in that of the server,
// which plugins inherit, or by -env at registration.
func logLevel(level string) hclog.Level {
	if l := hclog.LevelFromString(level); l != hclog.NoLevel {
		return l
	}
	return hclog.Info
}
