// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Package vaulttest starts a real Vault or OpenBao server with the plugin, on
// loopback, for the end-to-end tests, the benchmark and the demos:
//
//	plugin, err := vaulttest.Build(ctx, dir, "cmd/vault-plugin-secrets-cable", "v0.0.1")
//	…
//	server, err := vaulttest.Start(ctx, vaulttest.Config{Dir: dir, Plugins: []vaulttest.Plugin{plugin}})
//	if err != nil {
//		return err // nothing is left running
//	}
//	defer server.Stop()
//	err = server.Call(ctx, "POST", "sys/mounts/cable", map[string]any{"type": plugin.Name}, nil)
//
// The differences between servers are in product.go.
package vaulttest

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Config says which server to start, and how far to set it up.
type Config struct {
	Binary   string   // the server; default: the one that Find returns
	Dir      string   // for the server's own files; Start creates it
	LogLevel string   // of the server and of the plugin; default "trace"
	Env      []string // more of the server's environment, and so of the plugin's

	LockMemory bool // as in production; default: disable_mlock

	Extra string // more of the configuration file

	// PluginDir is the plugin folder; default: the one that holds the first of
	// Plugins, which are those to register.
	PluginDir string
	Plugins   []Plugin

	Audit string // file for an audit device; default: none
	Raft  *Raft  // default: dev mode, with everything in memory
}

// Raft has a server keep its data on disk, in integrated storage.
type Raft struct {
	Dir string // for the data

	// Node and Port make the server a node of a cluster: its name, and its port
	// for the other nodes. Start leaves such a node sealed, and without plugins
	// and audit device. Default: a server on its own.
	Node string
	Port int

	Advertised int // the port that the other nodes are told; default: Port

	// Key is the unseal key of a server that was started before with the same
	// data, Root its root token. Default: Start initializes the server.
	Key, Root string
}

// Server is a server that runs.
type Server struct {
	*process

	Addr string // such as "http://127.0.0.1:34567"
	Root string // a token that may do everything
	Key  string // the unseal key of a server with Raft
	Log  string // file; with the log of the plugin

	Product Product // who made it
	Version string  // such as "1.21.1"
}

// Start starts a server on a free port of loopback, waits until it responds,
// and sets it up as c says. If that fails, no process is left. The end of ctx
// kills the server.
func Start(ctx context.Context, c Config) (s *Server, err error) {
	if c.Binary == "" {
		if c.Binary, err = Find(ctx); err != nil {
			return nil, err
		}
	}
	s = &Server{Root: rand.Text(), Log: filepath.Join(c.Dir, "vault.log")}
	if s.Product, s.Version, err = Identify(ctx, c.Binary); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, err
	}
	for try := 1; ; try++ { // another process may take the port meanwhile
		err := s.run(ctx, c)
		if err == nil {
			break
		}
		if s.process != nil {
			s.Stop()
		}
		if try == 5 || ctx.Err() != nil {
			return nil, err
		}
	}
	if err := s.setUp(ctx, c); err != nil {
		s.Stop()
		return nil, fmt.Errorf("setting up %s: %w", s.Product, err)
	}
	return s, nil
}

// run starts the process and waits until it responds.
func (s *Server) run(ctx context.Context, c Config) error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	addr := listener.Addr().String()
	_ = listener.Close()
	s.Addr = "http://" + addr

	text, err := s.configuration(c, addr)
	if err != nil {
		return err
	}
	file := filepath.Join(c.Dir, "vault.hcl")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		return err
	}
	level := cmp.Or(c.LogLevel, "trace")
	args := []string{"server", "-log-level=" + level, "-config=" + file}
	if c.Raft == nil {
		args = append(args, "-dev", "-dev-no-store-token", "-dev-root-token-id="+s.Root, "-dev-listen-address="+addr)
	}
	// The server must not use this machine's proxy, because the simulator is on loopback.
	env := append(cleanEnv(), "HTTP_PROXY=", "HTTPS_PROXY=", "http_proxy=", "https_proxy=",
		"HOME="+c.Dir, "VAULT_LOG_LEVEL="+level)
	if s.process, err = start(ctx, s.Log, append(env, c.Env...), c.Binary, args...); err != nil {
		return err
	}
	states := []int{200} // a dev server is active in the end
	if c.Raft != nil {
		states = []int{200, 429, 501, 503} // active, standby, not initialized, sealed
	}
	if err := s.waitForState(ctx, states...); err != nil {
		log, _ := os.ReadFile(s.Log)
		return fmt.Errorf("starting %s: %w\n%s", c.Binary, err, log)
	}
	return nil
}

// configuration is the text of the server's configuration file.
func (s *Server) configuration(c Config, addr string) (string, error) {
	folder := c.PluginDir
	if folder == "" && len(c.Plugins) > 0 {
		folder = filepath.Dir(c.Plugins[0].File)
	}
	if folder != "" { // Vault refuses a relative one, and one that is a link
		var err error
		if folder, err = filepath.Abs(folder); err != nil {
			return "", err
		}
		if folder, err = filepath.EvalSymlinks(folder); err != nil {
			return "", err
		}
	}
	text := fmt.Sprintf("plugin_directory = %q\ndisable_mlock = %t\napi_addr = %q\n", folder, !c.LockMemory, s.Addr) +
		s.Product.configuration() + c.Extra + "\n"
	if c.Raft == nil {
		return text, nil
	}
	if err := os.MkdirAll(c.Raft.Dir, 0o700); err != nil {
		return "", err
	}
	// A multiplier of 1 is for production, on a machine of its own; a server on
	// its own elects itself sooner with it.
	multiplier := 1
	if c.Raft.Node != "" {
		multiplier = 2
	}
	return text + fmt.Sprintf(`
storage "raft" {
  path    = %q
  node_id = %q

  performance_multiplier       = %d
  autopilot_reconcile_interval = "500ms"
  autopilot_update_interval    = "250ms"
}
listener "tcp" {
  address         = %q
  cluster_address = "127.0.0.1:%d"
  tls_disable     = true
}
cluster_addr = "https://127.0.0.1:%d"
`, c.Raft.Dir, cmp.Or(c.Raft.Node, "one"), multiplier, addr, c.Raft.Port,
		cmp.Or(c.Raft.Advertised, c.Raft.Port, 1)), nil
}

// setUp unseals the server, registers the plugins and turns the audit log on.
func (s *Server) setUp(ctx context.Context, c Config) error {
	if c.Raft != nil {
		s.Key, s.Root = c.Raft.Key, c.Raft.Root
		if c.Raft.Node != "" {
			return nil
		}
		if s.Key != "" {
			return s.Unseal(ctx)
		}
		if err := s.Init(ctx); err != nil {
			return err
		}
	}
	for _, p := range c.Plugins {
		if err := s.Register(ctx, p); err != nil {
			return err
		}
	}
	if c.Audit == "" {
		return nil
	}
	return s.EnableAudit(ctx, c.Audit)
}

// Init initializes a server, with one unseal key, and unseals it.
func (s *Server) Init(ctx context.Context) error {
	var keys struct {
		Keys      []string `json:"keys"`
		RootToken string   `json:"root_token"`
	}
	shares := map[string]any{"secret_shares": 1, "secret_threshold": 1}
	if err := s.Call(ctx, "PUT", "sys/init", shares, &keys); err != nil {
		return err
	}
	s.Key, s.Root = keys.Keys[0], keys.RootToken
	return s.Unseal(ctx)
}

// Unseal unseals a server and waits until it is active.
func (s *Server) Unseal(ctx context.Context) error {
	if err := s.Call(ctx, "PUT", "sys/unseal", map[string]any{"key": s.Key}, nil); err != nil {
		return err
	}
	return s.waitForState(ctx, 200)
}

// Register enters a plugin into the server's catalog.
func (s *Server) Register(ctx context.Context, p Plugin) error {
	sum, err := p.Sum()
	if err != nil {
		return err
	}
	entry := map[string]any{"sha256": sum, "command": filepath.Base(p.File), "version": p.Version}
	return s.Call(ctx, "PUT", "sys/plugins/catalog/secret/"+p.Name, entry, nil)
}

// EnableAudit has the server write its audit log to a file.
func (s *Server) EnableAudit(ctx context.Context, file string) error {
	device := map[string]any{"type": "file", "options": map[string]any{"file_path": file}}
	return s.Call(ctx, "PUT", "sys/audit/file", device, nil)
}

// waitForState waits until sys/health responds with one of some statuses.
func (s *Server) waitForState(ctx context.Context, statuses ...int) error {
	limit := time.After(time.Minute)
	for {
		resp, err := s.Do(ctx, Request{Method: "GET", Path: "sys/health"})
		if err == nil {
			if slices.Contains(statuses, resp.Status) {
				return nil
			}
			err = fmt.Errorf("sys/health responds with %d", resp.Status)
		}
		select {
		case <-s.Exited:
			return errors.New("the server has ended")
		case <-limit:
			return err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// CLIEnv is an environment in which Vault's CLI is root on this server.
func (s *Server) CLIEnv() []string {
	return append(cleanEnv(), "VAULT_ADDR="+s.Addr, "VAULT_TOKEN="+s.Root)
}

// cleanEnv is this process's environment without settings of a Vault CLI.
func cleanEnv() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "VAULT_") || strings.HasPrefix(v, "BAO_")
	})
}
