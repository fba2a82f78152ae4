// Command cable-sim is a simulator of Cable's token API, for demos and end-to-end tests and for people without a Cable
// account. It listens on loopback only, and prints one line per call to stderr: never the refresh key or a token. The
// faults that it can simulate are those of package cabletest; control.go says how to ask for them.
package main

import (
	"cmp"
	"context"
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
	"strings"
	"syscall"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Getenv, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "cable-sim:", err)
		os.Exit(1)
	}
}

// headerTimeout bounds what a caller that sends nothing costs.
const headerTimeout = 10 * time.Second

// config is what the flags say.
type config struct {
	listen, control         string // loopback addresses; control "": no control listener
	urlFile, controlURLFile string
	keyFile, keyOut         string // where the refresh key is read from; where one that is made up is written to
	tls                     bool
	caOut                   string
	latency, life           time.Duration
	scheme                  string
	organizations           map[string]string // id to name
}

// parseFlags returns flag.ErrHelp after it printed the help that was asked for.
func parseFlags(args []string, stderr io.Writer) (*config, error) {
	c := &config{organizations: map[string]string{}}
	fs := flag.NewFlagSet("cable-sim", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&c.listen, "listen", "127.0.0.1:0", "loopback `address` of the API; port 0 picks a free one")
	fs.StringVar(&c.urlFile, "url-file", "", "write the token endpoint's URL to this `file` once listening")
	fs.StringVar(&c.control, "control", "", "loopback `address` of the control listener; default: none")
	fs.StringVar(&c.controlURLFile, "control-url-file", "", "write the control listener's URL to this `file`")
	fs.StringVar(&c.keyFile, "refresh-key-file", "", "`file` that holds the refresh key; default: $CABLE_SIM_REFRESH_KEY")
	fs.StringVar(&c.keyOut, "refresh-key-out", "", "write a refresh key that is made up here to this `file` (mode 0600)")
	fs.StringVar(&c.scheme, "scheme", cabletest.SchemeRaw, "form of the Authorization header: raw, bearer or any")
	fs.BoolVar(&c.tls, "tls", false, "serve TLS with a certificate of its own")
	fs.StringVar(&c.caOut, "ca-out", "", "write the certificate to trust with -tls to this `file` (PEM)")
	fs.DurationVar(&c.latency, "latency", 0, "`duration` to wait before each answer")
	fs.DurationVar(&c.life, "life", 0, "a fault: grant this life (a `duration`), whatever was asked")
	fs.Func("org", "`id=name` of an organization, repeatable; default: Cable's sample organization", func(v string) error {
		id, name, ok := strings.Cut(v, "=")
		if !ok || id == "" {
			return errors.New("want id=name")
		}
		c.organizations[id] = name
		return nil
	})
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
		return nil, errors.New("arguments without a flag: run cable-sim -h for the flags") // unnamed: one may be a key
	case c.scheme != cabletest.SchemeRaw && c.scheme != cabletest.SchemeBearer && c.scheme != cabletest.SchemeAny:
		return nil, fmt.Errorf("-scheme %q: want raw, bearer or any", c.scheme)
	case c.latency < 0:
		return nil, fmt.Errorf("-latency %s is negative", c.latency)
	case c.tls != (c.caOut != ""):
		return nil, errors.New("-tls and -ca-out go together: clients must learn which certificate to trust")
	case c.control == "" && c.controlURLFile != "":
		return nil, errors.New("-control-url-file needs -control")
	}
	return c, nil
}

// run serves until ctx ends. It prints to stderr alone.
func run(ctx context.Context, args []string, getenv func(string) string, stderr io.Writer) error {
	c, err := parseFlags(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	key, err := refreshKey(c, getenv)
	if err != nil {
		return err
	}
	logger := log.New(stderr, "", 0)
	opts := &cabletest.Options{
		RefreshKey:    key,
		Scheme:        c.scheme,
		Organizations: c.organizations,
		Default:       cabletest.Fault{Delay: c.latency},
		Log: func(call cabletest.Call) {
			logger.Printf("%s %s %d organization=%q scopes=%q expiry_seconds=%d", call.Time.UTC().Format(time.RFC3339Nano),
				call.Method, call.Status, call.OrganizationID, call.Scopes, call.ExpirySeconds)
		},
	}
	if c.life != 0 {
		opts.Default.Grant = &cabletest.Grant{Lifetime: &c.life}
		logger.Printf("cable-sim: -life is a fault: every token lives for %s, whatever was asked", c.life)
	}
	sim := cabletest.New(opts)
	failed := make(chan error, 2)
	if c.control != "" {
		srv := &http.Server{Handler: control(sim, c.keyOut), ReadHeaderTimeout: headerTimeout, ErrorLog: logger}
		defer func() { _ = srv.Close() }()
		url, err := serve(srv, c.control, "", c.controlURLFile, failed)
		if err != nil {
			return err
		}
		logger.Printf("cable-sim: control listener on %s", url)
	}
	srv := &http.Server{Handler: sim, ConnState: sim.ConnState, ReadHeaderTimeout: headerTimeout, ErrorLog: logger}
	defer func() { _ = srv.Close() }()
	if c.tls {
		var ca []byte
		if srv.TLSConfig, ca, err = selfSigned(); err != nil {
			return err
		}
		if err := writeFile(c.caOut, ca, 0o644); err != nil {
			return err
		}
	}
	url, err := serve(srv, c.listen, sim.Path(), c.urlFile, failed) // last: who finds its file finds all others
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
	_ = srv.Shutdown(grace) // calls that take longer are cut off: that is no failure
	return nil
}

// serve starts srv, with TLS if it is configured, and writes the URL of path to the file urlFile.
func serve(srv *http.Server, address, path, urlFile string, failed chan<- error) (url string, err error) {
	listener, err := listenLoopback(address)
	if err != nil {
		return "", err
	}
	url = "http://" + listener.Addr().String() + path
	run := func() error { return srv.Serve(listener) }
	if srv.TLSConfig != nil {
		url = "https" + strings.TrimPrefix(url, "http")
		run = func() error { return srv.ServeTLS(listener, "", "") }
	}
	go func() { failed <- run() }()
	return url, writeFile(urlFile, []byte(url+"\n"), 0o644)
}

// refreshKey returns the key that the operator gave or, written to -refresh-key-out, a new one.
func refreshKey(c *config, getenv func(string) string) (string, error) {
	if c.keyFile != "" {
		data, err := os.ReadFile(c.keyFile)
		if err != nil {
			return "", fmt.Errorf("reading the refresh key: %w", err)
		}
		if key := strings.TrimSpace(string(data)); key != "" {
			return key, nil
		}
		return "", fmt.Errorf("refresh key file %q is empty", c.keyFile)
	}
	if key := strings.TrimSpace(getenv("CABLE_SIM_REFRESH_KEY")); key != "" {
		return key, nil
	}
	return newRefreshKey(c.keyOut)
}

// newRefreshKey makes up a refresh key and writes it to the file out, the only way to learn it.
func newRefreshKey(out string) (string, error) {
	if out == "" {
		return "", errors.New("no refresh key: give one (-refresh-key-file, CABLE_SIM_REFRESH_KEY), " +
			"or a file to write a new one to (-refresh-key-out)")
	}
	key := cabletest.NewRefreshKey()
	return key, writeFile(out, []byte(key+"\n"), 0o600)
}

// listenLoopback refuses any other address: the control listener asks nobody who they are, and what a simulator is sent
// by mistake may be a real key.
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

// writeFile writes a file so that it is there whole or not at all. No path means no file.
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
