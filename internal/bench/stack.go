// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/vaulttest"
)

const (
	enginePlugin = "vault-plugin-secrets-cable"
	floorPlugin  = "floor"
	organization = cabletest.DefaultOrganizationID
)

// binaries are the programs of a stack.
type binaries struct {
	dir           string
	vault, sim    string
	engine, floor vaulttest.Plugin
}

// build finds the server and builds the rest, in a temporary folder.
func build(ctx context.Context) (b *binaries, err error) {
	b = new(binaries)
	if b.vault, err = vaulttest.Find(ctx); err != nil {
		return nil, err
	}
	if b.dir, err = os.MkdirTemp("", "cable-bench-bin"); err != nil {
		return nil, err
	}
	var sim vaulttest.Plugin
	for program, to := range map[string]*vaulttest.Plugin{
		"cmd/" + enginePlugin: &b.engine, "internal/bench/floor": &b.floor, "cmd/cable-sim": &sim,
	} {
		if *to, err = vaulttest.Build(ctx, b.dir, program, ""); err != nil {
			_ = os.RemoveAll(b.dir)
			return nil, err
		}
	}
	b.sim = sim.File
	return b, nil
}

// stack is a Vault server with both engines, and a simulated Cable.
type stack struct {
	dir               string
	sim               *vaulttest.Simulator
	vault             *vaulttest.Server
	key               string         // refresh key
	token             string         // of the readers, for Vault
	pids              map[string]int // of the plugin processes, by name
	client, simClient *http.Client
}

// startStack starts everything on free loopback ports in a temporary folder.
func startStack(ctx context.Context, b *binaries, storage, tokenType string) (s *stack, err error) {
	s = new(stack)
	if s.dir, err = os.MkdirTemp("", "cable-bench"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.stop()
		}
	}()
	for _, client := range []**http.Client{&s.client, &s.simClient} {
		transport := &http.Transport{MaxIdleConnsPerHost: 512, DisableCompression: true}
		*client = &http.Client{Timeout: time.Minute, Transport: transport}
	}
	if s.sim, err = vaulttest.StartSimulator(ctx, b.sim, s.dir); err != nil {
		return nil, err
	}
	plugins := []vaulttest.Plugin{b.engine, b.floor}
	config := vaulttest.Config{Binary: b.vault, Dir: s.dir, LogLevel: "info", Plugins: plugins}
	if storage == "raft" {
		config.Raft = &vaulttest.Raft{Dir: filepath.Join(s.dir, "raft")}
	}
	if s.vault, err = vaulttest.Start(ctx, config); err != nil {
		return nil, err
	}
	return s, s.configure(ctx, plugins, tokenType)
}

func (s *stack) configure(ctx context.Context, plugins []vaulttest.Plugin, tokenType string) error {
	raw, err := os.ReadFile(s.sim.KeyFile)
	if err != nil {
		return err
	}
	s.key = strings.TrimSpace(string(raw))
	role := map[string]any{"scopes": "person:read,transactions:read", "ttl": 3600}
	shared := maps.Clone(role)
	shared["reuse_for"] = 1800
	unleased := maps.Clone(shared)
	unleased["lease"] = false
	s.pids = make(map[string]int)
	for _, p := range plugins {
		if err := s.vault.Call(ctx, "POST", "sys/mounts/"+p.Name, map[string]any{"type": p.Name}, nil); err != nil {
			return err
		}
		if s.pids[p.Name], err = childOf(s.vault.Process.Pid, filepath.Base(p.File)); err != nil {
			return err
		}
		if p.Name == floorPlugin {
			continue
		}
		config := map[string]any{"refresh_key": s.key, "token_url": s.sim.URL, "organization_id": organization}
		for i, path := range []string{"/config", "/roles/bench", "/roles/shared", "/roles/unleased"} {
			data := []map[string]any{config, role, shared, unleased}[i]
			if err := s.vault.Call(ctx, "POST", p.Name+path, data, nil); err != nil {
				return err
			}
		}
	}
	policy := map[string]any{"policy": `path "+/creds/*" { capabilities = ["read"] }`}
	if err := s.vault.Call(ctx, "POST", "sys/policies/acl/bench", policy, nil); err != nil {
		return err
	}
	var created struct {
		Auth struct {
			Token string `json:"client_token"`
		} `json:"auth"`
	}
	login := map[string]any{"policies": []string{"bench"}, "type": tokenType, "ttl": "24h"}
	if err := s.vault.Call(ctx, "POST", "auth/token/create", login, &created); err != nil {
		return err
	}
	s.token = created.Auth.Token
	return nil
}

// targets returns the targets with these names, in this order.
func (s *stack) targets(names []string) (targets []*target, err error) {
	const body = `{"expiry_seconds":3600,"scopes":{"organization_id":"` + organization +
		`","scopes":["person:read","transactions:read"]}}`
	read := func(mount, role string) func(context.Context) (*http.Request, error) {
		return func(ctx context.Context) (*http.Request, error) {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.vault.Addr+"/v1/"+mount+"/creds/"+role, nil)
			if err == nil {
				req.Header.Set("X-Vault-Token", s.token)
			}
			return req, err
		}
	}
	direct := func(ctx context.Context) (*http.Request, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.sim.URL, strings.NewReader(body))
		if err == nil {
			req.Header.Set("Authorization", s.key)
			req.Header.Set("Content-Type", "application/json")
		}
		return req, err
	}
	engine := func(name, mount, role string) *target {
		return &target{name: name, client: s.client, stats: s.simStats, request: read(mount, role), pid: s.pids[mount]}
	}
	all := []*target{
		{name: "direct", client: s.simClient, stats: s.simStats, request: direct},
		engine("floor", floorPlugin, "bench"),
		engine("engine", enginePlugin, "bench"),
		engine("reuse", enginePlugin, "shared"),
		engine("constant", floorPlugin, "unleased"),
		engine("unleased", enginePlugin, "unleased"),
	}
	for _, name := range names {
		i := slices.IndexFunc(all, func(t *target) bool { return t.name == name })
		if i < 0 {
			return nil, fmt.Errorf("there is no target %q", name)
		}
		targets = append(targets, all[i])
	}
	return targets, nil
}

// stats are counters of the simulator.
type stats struct {
	Calls       int `json:"calls"`
	Connections int `json:"connections"`
}

// simStats reads the simulator's counters.
func (s *stack) simStats() (counted stats, err error) {
	text, err := s.control(http.MethodGet, "/stats", "")
	if err == nil {
		err = json.Unmarshal(text, &counted)
	}
	return counted, err
}

// setFault has the simulator misbehave as a cabletest.Fault in JSON says.
func (s *stack) setFault(body string) error {
	_, err := s.control(http.MethodPost, "/fault", body)
	return err
}

// control sends a request to the simulator's control listener.
func (s *stack) control(method, path, body string) ([]byte, error) {
	//nolint:noctx // the client has a time-out, and the server is ours
	req, err := http.NewRequest(method, s.sim.Control+path, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	resp, err := s.simClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if resp.StatusCode >= http.StatusMultipleChoices {
		err = fmt.Errorf("%s %s: %d %s", method, path, resp.StatusCode, text)
	}
	return text, err
}

// stop ends the servers and removes their folder.
func (s *stack) stop() {
	if s.vault != nil {
		s.vault.Stop()
	}
	if s.sim != nil {
		s.sim.Stop()
	}
	_ = os.RemoveAll(s.dir)
}
