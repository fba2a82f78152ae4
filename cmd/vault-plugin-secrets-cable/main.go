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

	"github.com/hashicorp/vault/sdk/plugin"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/version"
)

func main() {
	args := os.Args[1:]
	if os.Getenv(plugin.HandshakeConfig.MagicCookieKey) == plugin.HandshakeConfig.MagicCookieValue {
		os.Exit(serve(args))
	}
	os.Exit(byHand(args, os.Stdout, os.Stderr))
}

// byHand responds to a person. It returns the exit status: 0, 1 if there are no
// arguments, 2 if there are unknown ones. The arguments are never printed: they
// may contain anything.
func byHand(args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		_, _ = fmt.Fprintf(stderr, usage, version.String())
		return 1
	}
	if len(args) == 1 {
		switch args[0] {
		case "-version", "--version", "version":
			_, _ = fmt.Fprintf(stdout, "vault-plugin-secrets-cable %s, commit %s, %s\n", version.String(), version.Commit(), runtime.Version())
			return 0
		case "-h", "-help", "--help":
			_, _ = fmt.Fprintf(stdout, usage, version.String())
			return 0
		}
	}
	_, _ = fmt.Fprintln(stderr, "vault-plugin-secrets-cable takes no arguments but -version and -help: register it in Vault without any")
	return 2
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
