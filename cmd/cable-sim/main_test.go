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
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

const (
	otherKey  = cabletest.RefreshKeyMarker + "-of-this-test"
	validBody = `{"expiry_seconds":3600,"scopes":{"organization_id":"org_9f8b7c6d5e4a3b2c1d0e","scopes":["a:b","c:d"]}}`
)

// TestMain runs the program instead of the tests when TestProcess asks for it.
func TestMain(m *testing.M) {
	if os.Getenv("CABLE_SIM_TEST_MAIN") != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// output is the program's stderr. It says when the program listens.
type output struct {
	mu        sync.Mutex
	buf       bytes.Buffer
	listening chan struct{}
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	before := o.buf.Len()
	o.buf.Write(p)
	const ready = "cable-sim: listening on "
	if !bytes.Contains(o.buf.Bytes()[:before], []byte(ready)) && bytes.Contains(o.buf.Bytes(), []byte(ready)) {
		close(o.listening)
	}
	return len(p), nil
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// program is a running cable-sim.
type program struct {
	dir          string
	url, control string
	key          string // refresh key
	stderr       *output
	client       *http.Client
	stop         func() error // stops it and returns the result of run; may be called twice
}

// start runs the program with all of its files in the test's own directory.
func start(t *testing.T, args ...string) *program {
	t.Helper()
	p := &program{dir: t.TempDir(), stderr: &output{listening: make(chan struct{})}, client: &http.Client{}}
	args = append([]string{
		"-control", "127.0.0.1:0", "-control-url-file", p.dir + "/control", "-url-file", p.dir + "/url",
		"-refresh-key-out", p.dir + "/key", "-markers",
	}, args...)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx, args, p.stderr) }()
	p.stop = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	t.Cleanup(func() {
		if err := p.stop(); err != nil {
			t.Errorf("run: %v", err)
		}
		for _, marker := range []string{cabletest.RefreshKeyMarker, cabletest.TokenMarker} {
			if strings.Contains(p.stderr.String(), marker) {
				t.Errorf("stderr holds a secret:\n%s", p.stderr)
			}
		}
	})
	select {
	case <-p.stderr.listening:
	case err := <-done:
		done <- err
		t.Fatalf("run ended: %v\n%s", err, p.stderr)
	}
	p.url = strings.TrimSpace(p.read(t, "url"))
	p.control = strings.TrimSpace(p.read(t, "control"))
	p.key = strings.TrimSpace(p.read(t, "key"))
	return p
}

func (p *program) read(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(p.dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// send sends a request and returns its status and body.
func (p *program) send(t *testing.T, method, url, authorization, body string) (int, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Authorization", authorization)
	resp, err := p.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(data)
}

// minted is a successful answer.
type minted struct {
	Token            string `json:"token"`
	Expiry           int64  `json:"expiry"`
	OrganizationName string `json:"organization_name"`
}

func (p *program) mint(t *testing.T, authorization string) minted {
	t.Helper()
	status, body := p.send(t, "POST", p.url, authorization, validBody)
	var m minted
	err := json.Unmarshal([]byte(body), &m)
	if err != nil || status != 200 || !strings.Contains(m.Token, cabletest.TokenMarker) {
		t.Fatalf("minting: status %d, %s, %v", status, body, err)
	}
	return m
}

// TestPlain pins that without -markers nothing in sight is a test's, neither the URL nor the key nor a token.
func TestPlain(t *testing.T) {
	t.Parallel()
	p := start(t, "-markers=false")
	status, body := p.send(t, "POST", p.url, p.key, validBody)
	if !strings.HasSuffix(p.url, "/v2/auth/token") || strings.Contains(p.url, "base") || status != 200 ||
		strings.Contains(body+p.key, "CANARY") {
		t.Errorf("%s: %d %s", p.url, status, body)
	}
	var m minted
	_ = json.Unmarshal([]byte(body), &m)
	p.send(t, "POST", p.url, p.key, strings.Replace(validBody, `"a:b"`, `"`+m.Token+`"`, 1))
	if strings.Contains(p.stderr.String(), m.Token) {
		t.Errorf("stderr holds a token:\n%s", p.stderr)
	}
}

func TestRun(t *testing.T) {
	t.Parallel()
	p := start(t)
	if !strings.HasPrefix(p.url, "http://127.0.0.1:") || !strings.HasSuffix(p.url, "/base/v2/auth/token") {
		t.Errorf("URL = %q", p.url)
	}
	m := p.mint(t, p.key)
	if m.OrganizationName != "Cable Financial Services" {
		t.Errorf("organization_name = %q", m.OrganizationName)
	}
	// A secret that a confused caller sends in the wrong place is not printed either, nor can it begin a line.
	confused := strings.Replace(validBody, `"a:b"`, `"`+m.Token+`","line\nbreak"`, 1)
	p.send(t, "POST", p.url, "wrong", confused)
	p.send(t, "POST", p.url+"/"+p.key, p.key, strings.Replace(validBody, "org_", p.key, 1))
	p.send(t, "GET", p.url, p.key, "")
	if err := p.stop(); err != nil {
		t.Errorf("run: %v", err)
	}
	at := regexp.MustCompile(`(?m)^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[.\d]*Z `)
	got := at.ReplaceAllString(p.stderr.String(), "TIME ")
	want := `cable-sim: control listener on ` + p.control + `
cable-sim: listening on ` + p.url + `
TIME POST 200 organization="org_9f8b7c6d5e4a3b2c1d0e" scopes=["a:b" "c:d"] expiry_seconds=3600
TIME POST 401 organization="org_9f8b7c6d5e4a3b2c1d0e" scopes=["[redacted]" "line\nbreak" "c:d"] expiry_seconds=3600
TIME POST 404 organization="[redacted]" scopes=["a:b" "c:d"] expiry_seconds=3600
TIME GET 405 organization="" scopes=[] expiry_seconds=0
cable-sim: stopping
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("stderr (-want +got):\n%s", diff)
	}
}

func TestLatency(t *testing.T) {
	t.Parallel()
	p := start(t, "-latency", "20ms")
	before := time.Now()
	p.mint(t, p.key)
	if took := time.Since(before); took < 20*time.Millisecond {
		t.Errorf("the response came after %s", took)
	}
	if info, err := os.Stat(filepath.Join(p.dir, "key")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("key file: %v, %v", info, err)
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	with := func(args ...string) []string { return append([]string{"-refresh-key-out", dir + "/key"}, args...) }
	tests := map[string]struct {
		args []string
		want string
	}{
		"no key file":          {nil, "-refresh-key-out is required: it is the only way to learn the refresh key"},
		"key file's directory": {[]string{"-refresh-key-out", "/nonexistent/key"}, "no such file or directory"},
		"control on all": {
			with("-control", "0.0.0.0:0"), `address "0.0.0.0:0" is not on loopback: use 127.0.0.1:PORT or [::1]:PORT`,
		},
		"control on no host":   {with("-control", ":0"), `address ":0" is not on loopback`},
		"control on all IPv6":  {with("-control", "[::]:0"), `address "[::]:0" is not on loopback`},
		"control elsewhere":    {with("-control", "192.0.2.1:0"), `address "192.0.2.1:0" is not on loopback`},
		"control without port": {with("-control", "127.0.0.1"), "missing port in address"},
		"URL file's directory": {with("-url-file", "/nonexistent/url"), "no such file or directory"},
		"URL file a directory": {with("-url-file", dir), "file exists"},
		"unknown flag": {
			with("-refresh-key", otherKey),
			"flag provided but not defined: -refresh-key: run cable-sim -h for the flags",
		},
		"argument":              {with(otherKey), "arguments without a flag: run cable-sim -h for the flags"},
		"latency":               {with("-latency", "-1s"), "-latency -1s is negative"},
		"control file, no port": {with("-control-url-file", "control"), "-control-url-file needs -control"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var stderr bytes.Buffer
			ctx, cancel := context.WithCancel(t.Context())
			cancel() // a run that is not refused ends at once
			err := run(ctx, tt.args, &stderr)
			t.Log(err)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error = %v, want %q", err, tt.want)
			}
			if strings.Contains(fmt.Sprint(err, stderr.String()), cabletest.RefreshKeyMarker) {
				t.Error("the error holds the key")
			}
		})
	}
}

func TestHelp(t *testing.T) {
	t.Parallel()
	var stderr bytes.Buffer
	if err := run(t.Context(), []string{"-h"}, &stderr); err != nil {
		t.Errorf("error = %v", err)
	}
	if got := stderr.String(); !strings.Contains(got, "-refresh-key-out file") || strings.Count(got, "Usage") != 1 {
		t.Errorf("help:\n%s", got)
	}
}

func TestControl(t *testing.T) {
	t.Parallel()
	p := start(t)
	change := func(method, path, body string, want int) {
		t.Helper()
		status, text := p.send(t, method, p.control+path, "", body)
		t.Logf("%s %s: %d %s", method, path, status, text)
		if status != want {
			t.Errorf("%s %s: status %d, want %d", method, path, status, want)
		}
	}
	call := func(key string, want int) {
		t.Helper()
		if status, body := p.send(t, "POST", p.url, key, validBody); status != want {
			t.Errorf("status %d, want %d: %s", status, want, body)
		}
	}
	stats := func() (s cabletest.Stats) {
		t.Helper()
		_, body := p.send(t, "GET", p.control+"/stats", "", "")
		if err := json.Unmarshal([]byte(body), &s); err != nil {
			t.Fatal(err)
		}
		return s
	}

	change("POST", "/fault", `{"status": 500}`, 204)
	change("POST", "/fault", `{"status": 429, "times": 1, "message": "no, {refresh_key}"}`, 204)
	change("POST", "/faults", `{"status": 503}`, 204)
	call(p.key, 429)
	call(p.key, 503)
	call(p.key, 503)
	change("DELETE", "/fault", "", 204)
	m := p.mint(t, p.key)

	want := cabletest.Stats{Calls: 4, Minted: 1, Connections: 1, ByStatus: map[int]int{200: 1, 429: 1, 503: 2}}
	if diff := cmp.Diff(want, stats()); diff != "" {
		t.Errorf("stats (-want +got):\n%s", diff)
	}
	status, body := p.send(t, "GET", p.control+"/calls", "", "")
	var calls struct {
		cabletest.Stats
		Calls  []cabletest.Call `json:"recent_calls"`
		Tokens []token          `json:"recent_tokens"`
	}
	if err := json.Unmarshal([]byte(body), &calls); err != nil || status != 200 {
		t.Fatalf("status %d, %v: %s", status, err, body)
	}
	sum := sha256.Sum256([]byte(m.Token))
	wantToken := token{
		SHA256: hex.EncodeToString(sum[:]), OrganizationID: "org_9f8b7c6d5e4a3b2c1d0e", Scopes: []string{"a:b", "c:d"},
		IssuedAt: time.Unix(m.Expiry-3600, 0).UTC(), Expiry: time.Unix(m.Expiry, 0).UTC(),
	}
	if diff := cmp.Diff([]token{wantToken}, calls.Tokens); diff != "" {
		t.Errorf("tokens (-want +got):\n%s", diff)
	}
	if len(calls.Calls) != 4 || !calls.Calls[3].Minted || calls.ByStatus[503] != 2 {
		t.Errorf("calls = %+v", calls)
	}
	if strings.Contains(body, cabletest.TokenMarker) || strings.Contains(body, cabletest.RefreshKeyMarker) {
		t.Errorf("GET /calls holds a secret: %s", body)
	}

	change("POST", "/reset", "", 204)
	if got := stats(); !cmp.Equal(got, cabletest.Stats{}, cmpopts.EquateEmpty()) {
		t.Errorf("after reset: %+v", got)
	}
	_, body = p.send(t, "GET", p.control+"/calls", "", "")
	if !strings.Contains(body, `"recent_calls": []`) || !strings.Contains(body, `"recent_tokens": []`) {
		t.Errorf("after reset: %s", body)
	}

	change("POST", "/refresh-key", " "+otherKey+"\n", 204)
	call(p.key, 401)
	call(otherKey, 200)
	change("POST", "/refresh-key", "", 204)
	call(otherKey, 401)
	call(strings.TrimSpace(p.read(t, "key")), 200)

	change("POST", "/fault", `{"stauts": 500}`, 400)
	change("POST", "/fault", `{"delay": 5}`, 400)
	change("POST", "/faults", `not JSON`, 400)
	change("POST", "/fault", strings.Repeat(" ", 1<<20+1), 400)
	change("GET", "/fault", "", 405)
	change("GET", "/elsewhere", "", 404)
	call(strings.TrimSpace(p.read(t, "key")), 200) // a refused fault changes nothing
}

func TestControlListsTheLatest(t *testing.T) {
	t.Parallel()
	p := start(t)
	for range recent + 1 {
		p.mint(t, p.key)
	}
	_, body := p.send(t, "GET", p.control+"/calls", "", "")
	if got := strings.Count(body, `"sha256"`); got != recent || strings.Count(body, `"minted": true`) != recent {
		t.Errorf("%d tokens listed", got)
	}
}

// TestStopDuringCall shows that a delayed call does not hold up the stop.
func TestStopDuringCall(t *testing.T) {
	t.Parallel()
	p := start(t, "-latency", "1h")
	done := make(chan error, 1)
	go func() {
		r, _ := http.NewRequest("POST", p.url, strings.NewReader(validBody))
		_, err := p.client.Do(r)
		done <- err
	}()
	for {
		_, body := p.send(t, "GET", p.control+"/stats", "", "")
		if strings.Contains(body, `"calls": 1`) {
			break
		}
	}
	if err := p.stop(); err != nil {
		t.Errorf("run: %v", err)
	}
	if err := <-done; err == nil {
		t.Error("the call was answered")
	}
}

// TestProcess runs the program as a process, for signals, exit codes and stdout.
func TestProcess(t *testing.T) {
	t.Parallel()
	command := func(args ...string) (*exec.Cmd, *output, *bytes.Buffer) {
		cmd := exec.CommandContext(
			t.Context(), os.Args[0], append(args, "-refresh-key-out", filepath.Join(t.TempDir(), "key"))...,
		)
		cmd.Env = append(os.Environ(), "CABLE_SIM_TEST_MAIN=1")
		stderr, stdout := &output{listening: make(chan struct{})}, &bytes.Buffer{}
		cmd.Stderr, cmd.Stdout = stderr, stdout
		return cmd, stderr, stdout
	}
	for _, sig := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
		cmd, stderr, stdout := command()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		<-stderr.listening
		if err := cmd.Process.Signal(sig); err != nil {
			t.Error(err)
		}
		err := cmd.Wait()
		if err != nil || stdout.Len() > 0 || !strings.HasSuffix(stderr.String(), "cable-sim: stopping\n") {
			t.Errorf("%v: %v, stdout %q, stderr:\n%s", sig, err, stdout, stderr)
		}
	}
	cmd, stderr, _ := command("-control", ":0")
	if err := cmd.Run(); cmd.ProcessState.ExitCode() != 1 || !strings.HasPrefix(stderr.String(), "cable-sim: address") {
		t.Errorf("%v, stderr:\n%s", err, stderr)
	}
}
