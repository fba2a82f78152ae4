// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Command stack runs a command alongside a Vault dev server and a simulated
// Cable, on free loopback ports, and stops both when the command ends:
//
//	stack COMMAND [ARG...]
//
// The command runs in a temporary folder, which has refresh-key, vault.log and
// cable-sim.log. Its environment has VAULT_ADDR and VAULT_TOKEN, vault and
// cable-sim on PATH, CABLE_URL and CABLE_CONTROL of the simulator, and SHA256
// and VERSION of the plugin, which is in the server's plugin folder.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/vaulttest"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/version"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: stack COMMAND [ARG...]")
		os.Exit(2)
	}
	status, err := run(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "stack:", err)
	}
	os.Exit(status)
}

// run returns the exit status, the command's own if it was started. A signal
// ends the command, then the rest, and is no failure.
func run(command []string) (status int, err error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	dir, err := os.MkdirTemp("", "cable-stack-")
	if err != nil {
		return 1, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	bin := filepath.Join(dir, "bin")
	plugin, pluginErr := vaulttest.Build(ctx, bin, "cmd/vault-plugin-secrets-cable", version.String())
	sum, sumErr := plugin.Sum()
	simulator, simErr := vaulttest.Build(ctx, bin, "cmd/cable-sim", "")
	vault, err := vaulttest.Find(ctx)
	if err := errors.Join(pluginErr, sumErr, simErr, err, os.Symlink(vault, filepath.Join(bin, "vault"))); err != nil {
		return 1, err
	}

	sim, err := vaulttest.StartSimulator(context.Background(), simulator.File, dir, "-latency", "20ms")
	if err != nil {
		return 1, err
	}
	defer sim.Stop()
	config := vaulttest.Config{Binary: vault, Dir: dir, LogLevel: "debug", PluginDir: bin}
	server, err := vaulttest.Start(context.Background(), config)
	if err != nil {
		return 1, err
	}
	defer server.Stop()
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr = dir, os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(server.CLIEnv(), "PATH="+bin+string(os.PathListSeparator)+os.Getenv("PATH"),
		"CABLE_URL="+sim.URL, "CABLE_CONTROL="+sim.Control, "SHA256="+sum, "VERSION="+plugin.Version)
	err = cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil, ctx.Err() != nil:
		return 0, nil
	case errors.As(err, &exit):
		return max(exit.ExitCode(), 1), nil // the command has said why
	}
	return 1, err
}
