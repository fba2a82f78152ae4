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
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

const (
	otherKey  = cabletest.RefreshKeyMarker + "-of-this-test"
	validBody = `{"expiry_seconds":3600,"scopes":{"organization_id":"org_9f8b7c6d5e4a3b2c1d0e","scopes":["a:b","c:d"]}}`
)

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
				t.Errorf("stderr contains a secret:\n%s", p.stderr)
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

// mint requests a token and returns it with its expiry.
func (p *program) mint(t *testing.T, key string) (token string, expiry int64) {
	t.Helper()
	status, body := p.send(t, "POST", p.url, key, validBody)
	var m struct {
		Token  string
		Expiry int64
	}
	if err := json.Unmarshal([]byte(body), &m); err != nil || status != 200 || m.Token == "" {
		t.Fatalf("minting: status %d, %s, %v", status, body, err)
	}
	return m.Token, m.Expiry
}

// TestRun pins the lines that the program prints, in which a secret that a confused caller sends in the wrong place is
// redacted, and cannot begin a line; that -latency delays; and that without -markers nothing in sight is a test's.
func TestRun(t *testing.T) {
	t.Parallel()
	plain := start(t, "-markers=false", "-latency", "20ms")
	before := time.Now()
	token, _ := plain.mint(t, plain.key)
	if took := time.Since(before); took < 20*time.Millisecond || strings.Contains(token+plain.key, "CANARY") ||
		strings.Contains(plain.url, "base") {
		t.Errorf("%s: a token after %s", plain.url, took)
	}
	plain.send(t, "POST", plain.url, plain.key, strings.Replace(validBody, `"a:b"`, `"`+token+`"`, 1))
	if strings.Contains(plain.stderr.String(), token) {
		t.Errorf("stderr contains a token:\n%s", plain.stderr)
	}

	p := start(t)
	if info, err := os.Stat(filepath.Join(p.dir, "key")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("key file: %v, %v", info, err)
	}
	token, _ = p.mint(t, p.key)
	p.send(t, "POST", p.url, "wrong", strings.Replace(validBody, `"a:b"`, `"`+token+`","line\nbreak"`, 1))
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

// TestRefusals pins which arguments are refused, and that the error repeats no key.
func TestRefusals(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	key := "-refresh-key-out " + dir + "/key "
	const help = ": run cable-sim -h for the flags"
	for args, want := range map[string]string{
		"":                                      "-refresh-key-out is required",
		"-refresh-key-out /nonexistent/key":     "no such file or directory",
		key + "-control 0.0.0.0:0":              `"0.0.0.0:0" is not on loopback: use 127.0.0.1:PORT or [::1]:PORT`,
		key + "-control :0":                     `address ":0" is not on loopback`,
		key + "-control [::]:0":                 `address "[::]:0" is not on loopback`,
		key + "-control 192.0.2.1:0":            `address "192.0.2.1:0" is not on loopback`,
		key + "-control 127.0.0.1":              "missing port in address",
		key + "-url-file /nonexistent/url":      "no such file or directory",
		key + "-url-file " + dir:                "file exists",
		key + "-refresh-key " + otherKey:        "flag provided but not defined: -refresh-key" + help,
		key + otherKey:                          "arguments without a flag" + help,
		key + "-latency -1s":                    "-latency -1s is negative",
		key + "-control-url-file " + dir + "/c": "-control-url-file needs -control",
	} {
		var stderr bytes.Buffer
		ctx, cancel := context.WithCancel(t.Context())
		cancel() // a run that is not refused ends at once
		err := run(ctx, strings.Fields(args), &stderr)
		if err == nil || !strings.Contains(err.Error(), want) ||
			strings.Contains(fmt.Sprint(err, stderr.String()), cabletest.RefreshKeyMarker) {
			t.Errorf("%s: %v, want %q", args, err, want)
		}
	}
	var stderr bytes.Buffer
	if err := run(t.Context(), []string{"-h"}, &stderr); err != nil || strings.Count(stderr.String(), "Usage") != 1 ||
		!strings.Contains(stderr.String(), "-refresh-key-out file") {
		t.Errorf("help: %v\n%s", err, &stderr)
	}
}

// TestControl pins the effect of each request to the control listener.
func TestControl(t *testing.T) {
	t.Parallel()
	p := start(t)
	change := func(request, body string, want int) {
		t.Helper()
		method, path, _ := strings.Cut(request, " ")
		if status, text := p.send(t, method, p.control+path, "", body); status != want {
			t.Errorf("%s %.50s: status %d, want %d: %s", request, body, status, want, text)
		}
	}
	call := func(key string, want int) {
		t.Helper()
		if status, body := p.send(t, "POST", p.url, key, validBody); status != want {
			t.Errorf("status %d, want %d: %s", status, want, body)
		}
	}
	type lists struct {
		cabletest.Stats
		Calls  []cabletest.Call `json:"recent_calls"`
		Tokens []token          `json:"recent_tokens"`
	}
	get := func(path string) (l lists) {
		t.Helper()
		_, body := p.send(t, "GET", p.control+path, "", "")
		if err := json.Unmarshal([]byte(body), &l); err != nil || strings.Contains(body, cabletest.TokenMarker) ||
			strings.Contains(body, cabletest.RefreshKeyMarker) {
			t.Fatalf("%v: %s", err, body)
		}
		return l
	}
	change("POST /fault", `{"status": 500}`, 204)
	change("POST /fault", `{"status": 429, "times": 1, "message": "no, {refresh_key}"}`, 204)
	change("POST /faults", `{"status": 503}`, 204)
	for _, refused := range []string{`{"stauts": 500}`, `{"delay": 5}`, `not JSON`, strings.Repeat(" ", 1<<20+1)} {
		change("POST /fault", refused, 400) // and changes nothing
	}
	change("GET /fault", "", 405)
	change("GET /elsewhere", "", 404)
	call(p.key, 429)
	call(p.key, 503)
	call(p.key, 503)
	change("DELETE /fault", "", 204)
	text, expiry := p.mint(t, p.key)
	want := cabletest.Stats{Calls: 4, Minted: 1, Connections: 1, ByStatus: map[int]int{200: 1, 429: 1, 503: 2}}
	l := get("/calls")
	if diff := cmp.Diff([]cabletest.Stats{want, want}, []cabletest.Stats{get("/stats").Stats, l.Stats}); diff != "" {
		t.Errorf("stats (-want +got):\n%s", diff)
	}
	sum := sha256.Sum256([]byte(text))
	issued, expires := time.Unix(expiry-3600, 0).UTC(), time.Unix(expiry, 0).UTC()
	wantToken := token{hex.EncodeToString(sum[:]), "org_9f8b7c6d5e4a3b2c1d0e", []string{"a:b", "c:d"}, issued, expires}
	if diff := cmp.Diff([]token{wantToken}, l.Tokens); diff != "" || len(l.Calls) != 4 || !l.Calls[3].Minted {
		t.Errorf("calls %+v, tokens (-want +got):\n%s", l.Calls, diff)
	}
	for range recent {
		p.mint(t, p.key)
	}
	if l := get("/calls"); len(l.Calls) != recent || len(l.Tokens) != recent || l.Tokens[0].SHA256 == wantToken.SHA256 {
		t.Errorf("%d calls and %d tokens listed; want the latest %d", len(l.Calls), len(l.Tokens), recent)
	}

	change("POST /reset", "", 204)
	if l := get("/calls"); l.Stats.Calls > 0 || l.Calls == nil || len(l.Calls) > 0 || l.Tokens == nil {
		t.Errorf("after reset: %+v", l)
	}
	change("POST /refresh-key", " "+otherKey+"\n", 204)
	call(p.key, 401)
	call(otherKey, 200)
	change("POST /refresh-key", "", 204)
	call(otherKey, 401)
	call(strings.TrimSpace(p.read(t, "key")), 200)
}

// TestStop pins that the program ends without waiting for the call that is under way.
func TestStop(t *testing.T) {
	t.Parallel()
	p := start(t, "-latency", "1h")
	done := make(chan error, 1)
	go func() {
		_, err := http.Post(p.url, "application/json", strings.NewReader(validBody))
		done <- err
	}()
	for body := ""; !strings.Contains(body, `"calls": 1`); {
		_, body = p.send(t, "GET", p.control+"/stats", "", "")
	}
	if err := p.stop(); err != nil {
		t.Errorf("run: %v", err)
	}
	if err := <-done; err == nil {
		t.Error("the call had a response")
	}
}
