// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Command cable-sim is a simulator of Cable's token API, for demos and end-to-end tests and for people without a Cable
// account. It listens on loopback only, and prints one line per call to stderr, but never the refresh key or a token.
// The faults that it can simulate are those of package cabletest; control.go says how to ask for them.
package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "cable-sim:", err)
		os.Exit(1)
	}
}

// headerTimeout bounds the cost of a caller that sends nothing.
const headerTimeout = 10 * time.Second

// config has the values of the flags.
type config struct {
	urlFile, keyOut         string // where the token endpoint's URL and the refresh key are written to
	control, controlURLFile string // loopback address, "" for no control listener; where its URL is written to
	latency                 time.Duration
	markers                 bool
}

// parseFlags returns flag.ErrHelp after it printed the help that was requested.
func parseFlags(args []string, stderr io.Writer) (*config, error) {
	c := new(config)
	fs := flag.NewFlagSet("cable-sim", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(
		&c.keyOut, "refresh-key-out", "", "required: write the refresh key, a new one, to this `file` (mode 0600)",
	)
	fs.StringVar(&c.urlFile, "url-file", "", "write the token endpoint's URL to this `file` once listening")
	fs.StringVar(
		&c.control, "control", "", "loopback `address` of the control listener, port 0 for a free one; default: none",
	)
	fs.StringVar(&c.controlURLFile, "control-url-file", "", "write the control listener's URL to this `file`")
	fs.DurationVar(&c.latency, "latency", 0, "`duration` to wait before each response")
	fs.BoolVar(
		&c.markers, "markers", false, "for tests: markers in the key and in tokens, and a path that is not Cable's",
	)
	err := fs.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fs.SetOutput(stderr)
		fs.Usage()
		_, _ = fmt.Fprint(stderr, controlHelp)
		return nil, err
	case err != nil:
		return nil, fmt.Errorf("%w: run cable-sim -h for the flags", err)
	case fs.NArg() > 0:
		// They are not named, because one may be a key.
		return nil, errors.New("arguments without a flag: run cable-sim -h for the flags")
	case c.keyOut == "":
		return nil, errors.New("-refresh-key-out is required: it is the only way to learn the refresh key")
	case c.latency < 0:
		return nil, fmt.Errorf("-latency %s is negative", c.latency)
	case c.control == "" && c.controlURLFile != "":
		return nil, errors.New("-control-url-file needs -control")
	}
	return c, nil
}

// run serves until ctx ends. It prints to stderr alone.
func run(ctx context.Context, args []string, stderr io.Writer) error {
	c, err := parseFlags(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	key, err := c.newRefreshKey()
	if err != nil {
		return err
	}
	logger := log.New(stderr, "", 0)
	opts := &cabletest.Options{
		RefreshKey: key,
		Plain:      !c.markers,
		Default:    cabletest.Fault{Delay: c.latency},
		Log: func(call cabletest.Call) {
			logger.Printf("%s %s %d organization=%q scopes=%q expiry_seconds=%d",
				call.Time.UTC().Format(time.RFC3339Nano),
				call.Method, call.Status, call.OrganizationID, call.Scopes, call.ExpirySeconds)
		},
	}
	sim := cabletest.New(opts)
	failed := make(chan error, 2)
	if c.control != "" {
		srv := &http.Server{Handler: control(sim, c.newRefreshKey), ReadHeaderTimeout: headerTimeout, ErrorLog: logger}
		defer func() { _ = srv.Close() }()
		url, err := serve(srv, c.control, "", c.controlURLFile, failed)
		if err != nil {
			return err
		}
		logger.Printf("cable-sim: control listener on %s", url)
	}
	srv := &http.Server{Handler: sim, ConnState: sim.ConnState, ReadHeaderTimeout: headerTimeout, ErrorLog: logger}
	defer func() { _ = srv.Close() }()
	// This one comes last, because its file says that the others are there.
	url, err := serve(srv, "127.0.0.1:0", sim.Path(), c.urlFile, failed)
	if err != nil {
		return err
	}
	logger.Printf("cable-sim: listening on %s", url)

	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	logger.Print("cable-sim: stopping")
	sim.Close() // a delayed call does not hold up the stop
	grace, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	_ = srv.Shutdown(grace) // calls that take longer are cut off, which is no failure
	return nil
}

// serve starts srv and writes the URL of path to the file urlFile.
func serve(srv *http.Server, address, path, urlFile string, failed chan<- error) (url string, err error) {
	listener, err := listenLoopback(address)
	if err != nil {
		return "", err
	}
	url = "http://" + listener.Addr().String() + path
	go func() { failed <- srv.Serve(listener) }()
	return url, writeFile(urlFile, []byte(url+"\n"), 0o644)
}

// newRefreshKey makes up a refresh key and writes it to its file.
func (c *config) newRefreshKey() (string, error) {
	key := rand.Text()
	if c.markers {
		key = cabletest.NewRefreshKey()
	}
	return key, writeFile(c.keyOut, []byte(key+"\n"), 0o600)
}

// listenLoopback refuses any other address, because the control listener has no authentication, and a simulator may be
// sent a real key by mistake.
func listenLoopback(address string) (net.Listener, error) {
	addr, err := net.ResolveTCPAddr("tcp", address)
	if err != nil {
		return nil, err
	}
	if !addr.IP.IsLoopback() {
		return nil, fmt.Errorf("address %q is not on loopback: use 127.0.0.1:PORT or [::1]:PORT", address)
	}
	return net.ListenTCP("tcp", addr)
}

// writeFile writes a whole file or none. No path means no file.
func writeFile(path string, data []byte, mode os.FileMode) error {
	if path == "" {
		return nil
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".cable-sim-*") // mode 0600
	if err != nil {
		return fmt.Errorf("writing %q: %w", path, err)
	}
	_, err = f.Write(data)
	err = cmp.Or(err, f.Chmod(mode), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return fmt.Errorf("writing %q: %w", path, err)
	}
	return nil
}
