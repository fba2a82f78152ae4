// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package vaulttest

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// process is a child process.
type process struct {
	Process *os.Process
	Exited  <-chan struct{} // closed when it has ended
}

// start starts a program, whose output is appended to the file log. The end of
// ctx kills it.
func start(ctx context.Context, log string, env []string, name string, args ...string) (*process, error) {
	out, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { _ = out.Close() }()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = env, out, out
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	return &process{cmd.Process, exited}, nil
}

// Stop ends the process, and a server's plugins with it.
func (p *process) Stop() {
	_ = p.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.Exited:
	case <-time.After(20 * time.Second):
		_ = p.Process.Kill()
		<-p.Exited
	}
}

// Simulator is a cable-sim that runs.
type Simulator struct {
	*process
	URL     string // of the token endpoint
	Control string // of the control listener
	KeyFile string // holds the refresh key
}

// StartSimulator starts the simulator binary, with its files in the folder dir.
// If that fails, no process is left. The end of ctx kills the simulator.
func StartSimulator(ctx context.Context, binary, dir string, args ...string) (*Simulator, error) {
	file := func(name string) string { return filepath.Join(dir, name) }
	s := &Simulator{KeyFile: file("refresh-key")}
	args = append(args, "-url-file", file("cable-url"), "-control", "127.0.0.1:0",
		"-control-url-file", file("cable-control"), "-refresh-key-out", s.KeyFile)
	var err error
	if s.process, err = start(ctx, file("cable-sim.log"), os.Environ(), binary, args...); err != nil {
		return nil, err
	}
	for limit := time.After(time.Minute); s.URL == ""; {
		url, _ := os.ReadFile(file("cable-url")) // the last file that it writes
		control, _ := os.ReadFile(file("cable-control"))
		s.URL, s.Control = strings.TrimSpace(string(url)), strings.TrimSpace(string(control))
		select {
		case <-s.Exited:
			log, _ := os.ReadFile(file("cable-sim.log"))
			return nil, errors.New(string(log))
		case <-limit:
			s.Stop()
			return nil, errors.New("cable-sim does not start")
		case <-time.After(10 * time.Millisecond):
		}
	}
	return s, nil
}
