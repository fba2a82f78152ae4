// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Command profiled serves the engine as the plugin does, and writes a CPU
// profile of its whole run to the file that BENCH_PROFILE names. It stands in
// for the plugin if bench is run with -profile; it is never shipped. Log level
// and garbage collection are set as the plugin sets them.
package main

import (
	"context"
	"os"
	"runtime/debug"
	"runtime/pprof"
	"sync"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/plugin"

	cablesecrets "github.com/cablesecrets/vault-plugin-secrets-cable"
)

func main() {
	logger := hclog.New(&hclog.LoggerOptions{Level: hclog.Info, Output: os.Stderr, JSONFormat: true})
	debug.SetGCPercent(200)
	var once sync.Once
	start := func() {
		out, err := os.Create(os.Getenv("BENCH_PROFILE"))
		if err == nil {
			err = pprof.StartCPUProfile(out)
		}
		if err != nil {
			logger.Error("no profile is written", "error", err)
		}
	}
	factory := func(ctx context.Context, c *logical.BackendConfig) (logical.Backend, error) {
		once.Do(start)
		return cablesecrets.Factory(ctx, c)
	}
	err := plugin.ServeMultiplex(&plugin.ServeOpts{Logger: logger, BackendFactoryFunc: factory})
	pprof.StopCPUProfile()
	if err != nil {
		logger.Error("the plugin cannot be served", "error", err)
		os.Exit(1)
	}
}
