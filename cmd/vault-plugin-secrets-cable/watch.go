// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"os"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/stats"
)

// The plugin ends with its server, and never while its server runs. A server that
// was killed ends no plugin, and the plugin has the refresh key in memory.
//
// The server connects as soon as the plugin has started, and stays connected until
// it ends the plugin. If the server is killed, the system closes the connection. So:
//
//   - While a connection is open the plugin runs, and SIGINT, SIGTERM and SIGHUP are ignored. A terminal, a
//     container's init and systemd send them to the process group, and the server needs the plugin for its requests.
//   - While none is open, such a signal ends the plugin at once. A container runtime stops it that way.
//   - While none is open, the plugin ends if its parent is gone too, as newParent sees it. Either sign alone can
//     deceive, because under a wrapper script the parent may end, or the pipes be closed, while the server runs.
//   - If another process keeps the pipes open (a script with a pipeline, a container runtime), that sign never comes,
//     and the plugin ends after a minute.

const (
	lookEvery     = time.Second            // between two looks at the connections and the parent
	connectWithin = 4 * time.Second        // without a parent, if no server has connected and sent a secret
	countWithin   = 200 * time.Millisecond // until a connection is counted; a signal must not end the plugin before
	alone         = time.Minute            // without a connection; go-plugin's client waits as long for the first one
	stopWithin    = time.Second            // for the gRPC server
)

// watch knows whether the server is connected. It is a stats.Handler of the gRPC server.
type watch struct {
	gone      func() bool    // reports whether the parent is gone, by the system's account
	signals   chan os.Signal // receives the signals that end the plugin if no connection is open
	open      atomic.Int64   // number of open connections
	connected atomic.Bool    // whether the server has ever connected
}

// HandleConn counts the open connections. gRPC reports a connection only after its
// TLS handshake, so only the server that started the plugin is counted.
func (w *watch) HandleConn(_ context.Context, event stats.ConnStats) {
	switch event.(type) {
	case *stats.ConnBegin:
		w.open.Add(1)
		w.connected.Store(true)
	case *stats.ConnEnd:
		w.open.Add(-1)
	}
}

// TagConn, TagRPC and HandleRPC complete the interface, and do nothing.
func (w *watch) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (w *watch) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (w *watch) HandleRPC(context.Context, stats.RPCStats)                         {}

// wait returns when the plugin has to end.
func (w *watch) wait() {
	seen := time.Now() // the last sign of the server
	for {
		signaled := false
		select {
		case <-w.signals:
			signaled = true
			time.Sleep(countWithin)
		case <-time.After(lookEvery):
		}
		connected, gone := w.connected.Load(), w.gone()
		switch {
		case w.open.Load() > 0: // signals are ignored
			seen = time.Now()
		case signaled, connected && (gone || time.Since(seen) >= alone):
			return
		case !connected && !gone:
			seen = time.Now()
		case !connected && time.Since(seen) >= connectWithin:
			return
		}
	}
}

// stopWhenGone ends the process when wait returns, without a log line, because no server is there to read it. Stopping
// the gRPC server removes its socket from the disk.
func (w *watch) stopWhenGone(server *grpc.Server) {
	w.wait()
	time.AfterFunc(stopWithin, func() { os.Exit(1) })
	server.Stop()
}
