// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	enginePlugin = "vault-plugin-secrets-cable"
	floorPlugin  = "floor"
	organization = "org_9f8b7c6d5e4a3b2c1d0e"
)

// stack is a Vault server with both engines, and a simulated Cable.
type stack struct {
	dir               string
	children          []*exec.Cmd
	vaultURL, simURL  string
	control           string
	token, root       string
	key               string
	enginePID, floor  int
	client, simClient *http.Client
}

// startStack starts everything on free loopback ports in a temporary folder.
func startStack(ctx context.Context, o options, storage, tokenType string) (s *stack, err error) {
	s = &stack{root: "bench-root"}
	if s.dir, err = os.MkdirTemp("", "cable-bench"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.stop()
		}
	}()
	transport := func() *http.Client {
		return &http.Client{Timeout: time.Minute, Transport: &http.Transport{MaxIdleConnsPerHost: 512, DisableCompression: true}}
	}
	s.client, s.simClient = transport(), transport()
	if err := s.startSim(ctx, o.bin); err != nil {
		return nil, err
	}
	if err := s.startVault(ctx, o, storage); err != nil {
		return nil, err
	}
	if err := s.configure(ctx, o.bin, tokenType); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *stack) startSim(ctx context.Context, bin string) error {
	file := func(name string) string { return filepath.Join(s.dir, name) }
	if err := s.start(ctx, "sim.log", nil, filepath.Join(bin, "cable-sim"), "-url-file", file("url"), "-control", "127.0.0.1:0",
		"-control-url-file", file("control"), "-refresh-key-out", file("key")); err != nil {
		return err
	}
	if err := poll(ctx, func() error { _, err := os.Stat(file("url")); return err }); err != nil {
		return err
	}
	for name, to := range map[string]*string{"url": &s.simURL, "control": &s.control, "key": &s.key} {
		raw, err := os.ReadFile(file(name))
		if err != nil {
			return err
		}
		*to = strings.TrimSpace(string(raw))
	}
	s.control = strings.TrimSuffix(s.control, "/")
	return nil
}

func (s *stack) startVault(ctx context.Context, o options, storage string) error {
	port, err := freePort()
	if err != nil {
		return err
	}
	s.vaultURL = "http://127.0.0.1:" + port
	plugins := filepath.Join(s.dir, "plugins")
	if err := os.Mkdir(plugins, 0o700); err != nil {
		return err
	}
	for _, p := range []string{enginePlugin, floorPlugin} {
		raw, err := os.ReadFile(filepath.Join(o.bin, p))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(plugins, p), raw, 0o700); err != nil { //nolint:gosec // G306: it has to be executable
			return err
		}
	}
	config := fmt.Sprintf("plugin_directory = %q\n", plugins)
	args := []string{"server", "-log-level=info", "-config=" + filepath.Join(s.dir, "vault.hcl")}
	if storage == "raft" {
		data := filepath.Join(s.dir, "raft")
		cluster, err := freePort()
		if err != nil {
			return err
		}
		if err := os.Mkdir(data, 0o700); err != nil {
			return err
		}
		config += fmt.Sprintf("disable_mlock = true\nstorage \"raft\" {\n path = %q\n node_id = \"n1\"\n}\nlistener \"tcp\" {\n address = \"127.0.0.1:%s\"\n tls_disable = true\n}\napi_addr = %q\ncluster_addr = \"http://127.0.0.1:%s\"\n",
			data, port, s.vaultURL, cluster)
	} else {
		args = append(args, "-dev", "-dev-no-store-token", "-dev-root-token-id="+s.root, "-dev-listen-address=127.0.0.1:"+port)
	}
	if err := os.WriteFile(filepath.Join(s.dir, "vault.hcl"), []byte(config), 0o600); err != nil {
		return err
	}
	if err := s.start(ctx, "vault.log", nil, o.vault, args...); err != nil {
		return err
	}
	if storage == "raft" {
		var init struct {
			Keys []string `json:"keys"`
			Root string   `json:"root_token"`
		}
		if err := poll(ctx, func() error {
			return s.call(ctx, "PUT", "sys/init", map[string]any{"secret_shares": 1, "secret_threshold": 1}, &init)
		}); err != nil {
			return err
		}
		s.root = init.Root
		if err := s.call(ctx, "PUT", "sys/unseal", map[string]any{"key": init.Keys[0]}, nil); err != nil {
			return err
		}
	}
	return poll(ctx, func() error { return s.call(ctx, "GET", "sys/health", nil, nil) })
}

func (s *stack) configure(ctx context.Context, bin, tokenType string) error {
	for _, p := range []string{enginePlugin, floorPlugin} {
		raw, err := os.ReadFile(filepath.Join(bin, p))
		if err != nil {
			return err
		}
		sum := sha256.Sum256(raw)
		if err := poll(ctx, func() error {
			return s.call(ctx, "PUT", "sys/plugins/catalog/secret/"+p, map[string]any{"sha256": hex.EncodeToString(sum[:]), "command": p}, nil)
		}); err != nil {
			return err
		}
		if err := s.call(ctx, "POST", "sys/mounts/"+p, map[string]any{"type": p}, nil); err != nil {
			return err
		}
	}
	policy := `path "+/creds/*" { capabilities = ["read"] }`
	for _, c := range []struct {
		path string
		data map[string]any
	}{
		{"sys/policies/acl/bench", map[string]any{"policy": policy}},
		{enginePlugin + "/config", map[string]any{"refresh_key": s.key, "token_url": s.simURL, "organization_id": organization}},
		{enginePlugin + "/roles/bench", map[string]any{"scopes": "person:read,transactions:read", "ttl": 3600}},
	} {
		if err := s.call(ctx, "PUT", c.path, c.data, nil); err != nil {
			return err
		}
	}
	var created struct {
		Auth struct {
			Token string `json:"client_token"`
		} `json:"auth"`
	}
	if err := s.call(ctx, "POST", "auth/token/create", map[string]any{"policies": []string{"bench"}, "type": tokenType, "ttl": "24h"}, &created); err != nil {
		return err
	}
	s.token = created.Auth.Token
	vault := s.children[1].Process.Pid
	var err error
	if s.enginePID, err = childOf(vault, enginePlugin); err != nil {
		return err
	}
	s.floor, err = childOf(vault, floorPlugin)
	return err
}

// targets are the direct POST, the floor and the engine, in this order.
func (s *stack) targets() []*target {
	body := fmt.Sprintf(`{"expiry_seconds":3600,"scopes":{"organization_id":%q,"scopes":["person:read","transactions:read"]}}`, organization)
	read := func(mount, role string) func(context.Context) (*http.Request, error) {
		return func(ctx context.Context) (*http.Request, error) {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.vaultURL+"/v1/"+mount+"/creds/"+role, nil)
			if err == nil {
				req.Header.Set("X-Vault-Token", s.token)
			}
			return req, err
		}
	}
	none := func() (int, error) { return 0, nil }
	return []*target{
		{name: "direct", client: s.simClient, stats: s.connections, request: func(ctx context.Context) (*http.Request, error) {
			req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.simURL, strings.NewReader(body))
			if err == nil {
				req.Header.Set("Authorization", s.key)
				req.Header.Set("Content-Type", "application/json")
			}
			return req, err
		}},
		{name: "floor", client: s.client, stats: none, request: read(floorPlugin, "bench"), pid: s.floor},
		{name: "engine", client: s.client, stats: s.connections, request: read(enginePlugin, "bench"), pid: s.enginePID},
	}
}

// connections asks the simulator how many it has seen.
func (s *stack) connections() (int, error) {
	resp, err := s.simClient.Get(s.control + "/stats") //nolint:noctx // the client has a time-out, and the server is ours
	if err != nil {
		return 0, err
	}
	defer func() { _ = resp.Body.Close() }()
	var stats struct {
		Connections int `json:"connections"`
	}
	return stats.Connections, json.NewDecoder(resp.Body).Decode(&stats)
}

// setLatency has the simulator answer after d.
func (s *stack) setLatency(d time.Duration) error {
	if d == 0 {
		return s.setFault("{}")
	}
	return s.setFault(fmt.Sprintf(`{"delay":%q}`, d))
}

// setFault has the simulator misbehave as a cabletest.Fault in JSON says.
func (s *stack) setFault(body string) error {
	resp, err := s.simClient.Post(s.control+"/fault", "application/json", strings.NewReader(body)) //nolint:noctx // the client has a time-out, and the server is ours
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusNoContent {
		text, _ := io.ReadAll(resp.Body)
		return fmt.Errorf("setting the fault: %d %s", resp.StatusCode, text)
	}
	return nil
}

// call makes a request to Vault's API as root.
func (s *stack) call(ctx context.Context, method, path string, data map[string]any, out any) error {
	raw, err := json.Marshal(data)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, method, s.vaultURL+"/v1/"+path, bytes.NewReader(raw))
	if err != nil {
		return err
	}
	req.Header.Set("X-Vault-Token", s.root)
	resp, err := s.client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode >= 300 {
		return fmt.Errorf("%s %s: %d %s", method, path, resp.StatusCode, body)
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(body, out)
}

// start runs a program of the stack; its output goes to a log in the folder.
func (s *stack) start(ctx context.Context, logName string, env []string, program string, args ...string) error {
	out, err := os.Create(filepath.Join(s.dir, logName))
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, program, args...) //nolint:gosec // G204: it runs the programs that its flags name
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Env = append(os.Environ(), env...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Start(); err != nil {
		return err
	}
	s.children = append(s.children, cmd)
	return nil
}

// stop ends the stack's own children and removes its folder.
func (s *stack) stop() {
	for i := len(s.children) - 1; i >= 0; i-- {
		_ = s.children[i].Process.Signal(syscall.SIGTERM)
		_ = s.children[i].Wait()
	}
	_ = os.RemoveAll(s.dir)
}

// poll calls f until it succeeds, for at most half a minute.
func poll(ctx context.Context, f func() error) error {
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := f()
		if err == nil || time.Now().After(deadline) || ctx.Err() != nil {
			return err
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// freePort finds a loopback port that nothing listens on.
func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // to listen waits for nobody
	if err != nil {
		return "", err
	}
	defer func() { _ = l.Close() }()
	_, port, err := net.SplitHostPort(l.Addr().String())
	return port, err
}
