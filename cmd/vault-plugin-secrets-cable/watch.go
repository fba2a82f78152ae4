// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"math"
	"os"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
)

// The plugin ends with its server, and never while its server runs. A server that
// was killed ends no plugin, and this one has the refresh key in memory.
//
// The server opens streams to the plugin as soon as it has started (go-plugin's
// client: standard output and error, and the broker) and leaves them open until
// it ends the plugin; if it is killed, the system closes their connection. So:
//
//   - While a stream is open the plugin runs, whatever else it sees. It waits for
//     the end of the last one: nothing is polled.
//   - When none is open it ends as soon as the parent is gone too: see newParent.
//     Either sign alone can deceive: under a wrapper script the parent may end, or
//     the pipes be closed, while the server runs.
//   - If that sign never comes, as another process keeps the pipes open (a script
//     with a pipeline, a container runtime), it ends after a minute without a
//     stream and without a call. Nobody has seen a running server lose its streams;
//     it would start another process at its next call.

const (
	// lookEvery is the time between two looks when no stream is open.
	lookEvery = time.Second
	// connectWithin is how long a server may take to open its first stream: it
	// takes some milliseconds. There are no secrets in memory until then.
	connectWithin = 4 * time.Second
	// alone is how long the plugin runs without a stream, a call, or the sign that
	// its parent is gone. go-plugin's client waits as long for a plugin to start.
	alone = time.Minute
	// stopWithin is how long the gRPC server may take to stop.
	stopWithin = time.Second
)

// watch knows whether the server is there.
type watch struct {
	gone    func() bool   // whether the parent is, by what the system says
	streams atomic.Int64  // that are open
	calls   atomic.Uint64 // so far
	ended   chan struct{} // receives a value when the last stream has ended
}

func newWatch(gone func() bool) *watch {
	return &watch{gone: gone, ended: make(chan struct{}, 1)}
}

// options are those that make a gRPC server report its streams and calls.
func (w *watch) options() []grpc.ServerOption {
	return []grpc.ServerOption{
		// By default a gRPC server gives up a connection whose other end has been
		// silent for two hours and does not respond: a Vault that was stopped, by a
		// debugger or a snapshot, still runs.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: math.MaxInt64}),
		grpc.StreamInterceptor(w.stream),
		grpc.UnaryInterceptor(w.unary),
	}
}

// stream counts a stream of the server while it is open.
func (w *watch) stream(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	w.streams.Add(1)
	defer func() {
		if w.streams.Add(-1) == 0 {
			select {
			case w.ended <- struct{}{}:
			default: // wait has not yet received the last one
			}
		}
	}()
	return handler(srv, stream)
}

// unary counts a call of the server.
func (w *watch) unary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	w.calls.Add(1)
	return handler(ctx, req)
}

// wait returns when the server is gone.
func (w *watch) wait() {
	var connected bool  // it was, once
	var calls uint64    // that were seen
	there := time.Now() // when there last was a sign of it
	for ; ; time.Sleep(lookEvery) {
		for w.streams.Load() > 0 || len(w.ended) > 0 {
			<-w.ended
			connected, there = true, time.Now()
		}
		if n := w.calls.Load(); n != calls {
			calls, there = n, time.Now()
		}
		gone := w.gone()
		switch absent := time.Since(there); {
		case connected && (gone || absent >= alone):
			return
		case !connected && !gone:
			there = time.Now()
		case !connected && absent >= connectWithin:
			return
		}
	}
}

// stopWhenGone ends the process when the server is gone, without a word: nobody
// reads it. Stopping the gRPC server removes its socket from the disk.
func (w *watch) stopWhenGone(server *grpc.Server) {
	w.wait()
	time.AfterFunc(stopWithin, func() { os.Exit(1) })
	server.Stop()
}
