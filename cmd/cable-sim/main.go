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
	defer stop()
	if err := run(ctx, os.Args[1:], os.Getenv, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "cable-sim:", err)
		os.Exit(1)
	}
}

// config is what the flags say.
type config struct {
	listen, control  string // loopback addresses; control "" means no control listener
	urlFile, ctlFile string // where to write the URLs once both listen
	keyFile, keyOut  string // where the refresh key is read from, or written to when it is made up here
	tls              bool
	caOut            string
	latency, life    time.Duration
	scheme           string
	organizations    map[string]string
}

func parseFlags(args []string, stderr io.Writer) (*config, error) {
	c := &config{organizations: map[string]string{}}
	fs := flag.NewFlagSet("cable-sim", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&c.listen, "listen", "127.0.0.1:0", "loopback `address` of the API; port 0 picks a free one")
	fs.StringVar(&c.urlFile, "url-file", "", "write the token endpoint's URL to this `file` once listening")
	fs.StringVar(&c.control, "control", "", "loopback `address` of the control listener; default: none")
	fs.StringVar(&c.ctlFile, "control-url-file", "", "write the control listener's URL to this `file`")
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
		return nil, err
	case err != nil:
		return nil, fmt.Errorf("%w: run cable-sim -h for the flags", err)
	case fs.NArg() > 0:
		return nil, fmt.Errorf("unexpected argument %q: run cable-sim -h for the flags", fs.Arg(0))
	case c.scheme != cabletest.SchemeRaw && c.scheme != cabletest.SchemeBearer && c.scheme != cabletest.SchemeAny:
		return nil, fmt.Errorf("-scheme %q: want raw, bearer or any", c.scheme)
	case c.latency < 0:
		return nil, fmt.Errorf("-latency %s is negative", c.latency)
	case c.tls != (c.caOut != ""):
		return nil, errors.New("-tls and -ca-out FILE go together: a client must trust the certificate")
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
		opts.Default.Grant = &cabletest.Grant{Life: &c.life}
		logger.Printf("cable-sim: -life is a fault: every token lives for %s, whatever was asked", c.life)
	}
	sim := cabletest.New(opts)
	defer sim.Close()

	api := &http.Server{Handler: sim, ConnState: sim.ConnState, ReadHeaderTimeout: 10 * time.Second, ErrorLog: logger}
	apiListener, err := listenLoopback(c.listen)
	if err != nil {
		return err
	}
	defer apiListener.Close()
	apiURL, serve := "http://"+apiListener.Addr().String()+sim.Path(), api.Serve
	if c.tls {
		cert, ca, err := selfSigned()
		if err != nil {
			return err
		}
		if err := writeFile(c.caOut, ca, 0o644); err != nil {
			return err
		}
		api.TLSConfig = cert
		apiURL = "https" + strings.TrimPrefix(apiURL, "http")
		serve = func(l net.Listener) error { return api.ServeTLS(l, "", "") }
	}
	failed := make(chan error, 2)
	ctl := &http.Server{Handler: control(sim, c.keyOut), ReadHeaderTimeout: 10 * time.Second, ErrorLog: logger}
	if c.control != "" {
		ctlListener, err := listenLoopback(c.control)
		if err != nil {
			return err
		}
		ctlURL := "http://" + ctlListener.Addr().String()
		go func() { failed <- ctl.Serve(ctlListener) }()
		defer ctl.Close()
		if err := writeFile(c.ctlFile, []byte(ctlURL+"\n"), 0o644); err != nil {
			return err
		}
		logger.Printf("cable-sim: control listener on %s", ctlURL)
	}
	go func() { failed <- serve(apiListener) }()
	defer api.Close()
	logger.Printf("cable-sim: listening on %s", apiURL)
	// Last: who polls for this file finds all the others.
	if err := writeFile(c.urlFile, []byte(apiURL+"\n"), 0o644); err != nil {
		return err
	}

	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	logger.Print("cable-sim: stopping")
	sim.Close() // a delayed call does not hold up the stop
	stopping, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return api.Shutdown(stopping)
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

// listenLoopback refuses any other address: the simulator hands out tokens, fake as they are, and takes keys in clear.
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
		return err
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
