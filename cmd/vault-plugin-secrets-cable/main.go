// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Command vault-plugin-secrets-cable serves the Cable secrets engine to Vault.
// Vault starts it; run by hand it says what it is and how to register it.
package main

import (
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/plugin"

	cablesecrets "github.com/cablesecrets/vault-plugin-secrets-cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/version"
)

func main() {
	os.Exit(run(os.Args[1:], os.Getenv, os.Stdout, os.Stderr))
}

// run serves the plugin until Vault ends it, or answers a person. It returns
// the exit status: 0, 1 if the plugin cannot be served or was run by hand
// without arguments, 2 for arguments that it does not know.
//
// NOTE: under Vault standard output belongs to the handshake: nothing else may
// write to it. The arguments are never printed; they may hold anything.
func run(args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	if len(args) == 1 && (args[0] == "-version" || args[0] == "--version" || args[0] == "version") {
		_, _ = fmt.Fprintf(stdout, "vault-plugin-secrets-cable %s, commit %s, %s\n", version.String(), version.Commit(), runtime.Version())
		return 0
	}
	underVault := getenv(plugin.HandshakeConfig.MagicCookieKey) == plugin.HandshakeConfig.MagicCookieValue
	if len(args) == 1 && (args[0] == "-h" || args[0] == "-help" || args[0] == "--help") {
		_, _ = fmt.Fprintf(stdout, usage, version.String())
		return 0
	}
	if len(args) > 0 {
		_, _ = fmt.Fprintln(stderr, "vault-plugin-secrets-cable takes no arguments but -version and -help: register it in Vault without any")
		return 2
	}
	if !underVault {
		_, _ = fmt.Fprintf(stderr, usage, version.String())
		return 1
	}
	logger := hclog.New(&hclog.LoggerOptions{
		Level:      logLevel(getenv("VAULT_LOG_LEVEL")),
		Output:     stderr,
		JSONFormat: true,
	})
	// The engine keeps a few MiB alive, so Go would collect after every few
	// hundred mints; twice the room costs some MiB and saves a part of that.
	if getenv("GOGC") == "" {
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

// logLevel is the level of what is sent to Vault, which filters by its own level
// what arrives.
//
// NOTE: Vault does not tell a plugin its level. To write each mint's debug line,
// send it, and have Vault drop it would cost a tenth of the mint, so it is
// written only where the level is set in the environment: in that of the
// server, which plugins inherit, or by -env at registration.
func logLevel(level string) hclog.Level {
	if l := hclog.LevelFromString(level); l != hclog.NoLevel {
		return l
	}
	return hclog.Info
}

const usage = `vault-plugin-secrets-cable %[1]s is a secrets engine for HashiCorp Vault.
Vault runs it; it is not for running by hand. To use it, put this file into
the server's plugin_directory, then register it and enable a mount:

  vault plugin register -sha256=$(sha256sum vault-plugin-secrets-cable | cut -d' ' -f1) \
    -version=%[1]s secret vault-plugin-secrets-cable
  vault secrets enable -path=cable vault-plugin-secrets-cable
  vault write cable/config refresh_key=@refresh-key.txt
  vault write cable/roles/my-role organization_id=org_... scopes=transactions:read
  vault read cable/creds/my-role

Options:
  -version   print version, commit and Go version
  -help      print this text
`
