// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Command vault-plugin-secrets-cable serves the Cable secrets engine to Vault, which starts it. In a shell it prints
// its version and how to register it, and installs itself.
package main

import (
	"errors"
	"flag"
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

// byHand responds to a person. It returns the exit status: 0, or 1 if there are no arguments or nothing was installed,
// or 2 if the arguments are wrong. Wrong arguments are never printed, because they may contain anything.
func byHand(args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // where it would print wrong arguments
	showVersion, dir := flags.Bool("version", false, ""), flags.String("install", "", "")
	err := flags.Parse(args)
	switch {
	case len(args) == 0:
		_, _ = fmt.Fprintf(stderr, usage, version.String())
		return 1
	case errors.Is(err, flag.ErrHelp) && len(args) == 1:
		_, _ = fmt.Fprintf(stdout, usage, version.String())
		return 0
	case err == nil && *showVersion && len(args) == 1:
		_, _ = fmt.Fprintf(stdout, "vault-plugin-secrets-cable %s, commit %s, %s\n",
			version.String(), version.Commit(), runtime.Version())
		return 0
	case err == nil && *dir != "" && !*showVersion && flags.NArg() == 0:
		return install(*dir, stdout, stderr)
	}
	_, _ = fmt.Fprintln(stderr, "vault-plugin-secrets-cable takes no arguments but -version, -help and -install DIR: "+
		"register it in Vault without any")
	return 2
}

const usage = `vault-plugin-secrets-cable %[1]s is a secrets engine for HashiCorp Vault.
Vault runs it; it is not for running by hand. To use it, install it into the
server's plugin_directory, then register it and enable a mount:

  sha256=$(./vault-plugin-secrets-cable -install /etc/vault/plugins | cut -d' ' -f1)
  vault plugin register -sha256="$sha256" -version=%[1]s \
    -command=vault-plugin-secrets-cable-%[1]s secret vault-plugin-secrets-cable
  vault secrets enable -path=cable vault-plugin-secrets-cable
  vault write cable/config refresh_key=@refresh-key.txt
  vault write cable/roles/my-role organization_id=org_... scopes=transactions:read
  vault read cable/creds/my-role

Options:
  -install DIR   copy this file to DIR/vault-plugin-secrets-cable-%[1]s
                 with mode 0755, and print its SHA-256 and path. A file that is
                 there is never replaced
  -version       print version, commit and Go version
  -help          print this text
`
