package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
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
	testKey   = cabletest.RefreshKeyMarker + "-of-this-test"
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
	stderr       *output
	client       *http.Client
	stop         func() error // stops it and returns what run returned; may be called twice
}

func noEnv(string) string { return "" }

// start runs the program with a control listener and the files that args name in the test's own directory, as DIR/name.
func start(t *testing.T, getenv func(string) string, args ...string) *program {
	t.Helper()
	p := &program{dir: t.TempDir(), stderr: &output{listening: make(chan struct{})}, client: &http.Client{}}
	args = append([]string{
		"-control", "127.0.0.1:0", "-control-url-file", "DIR/control", "-url-file", "DIR/url",
	}, args...)
	for i := range args {
		args[i] = strings.Replace(args[i], "DIR", p.dir, 1)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx, args, getenv, p.stderr) }()
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

func writeKey(t *testing.T, key string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(path, []byte(key), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestRun(t *testing.T) {
	t.Parallel()
	p := start(t, noEnv, "-refresh-key-file", writeKey(t, "\n "+testKey+"\n"))
	if !strings.HasPrefix(p.url, "http://127.0.0.1:") || !strings.HasSuffix(p.url, "/base/v2/auth/token") {
		t.Errorf("URL = %q", p.url)
	}
	m := p.mint(t, testKey)
	if m.OrganizationName != "Cable Financial Services" {
		t.Errorf("organization_name = %q", m.OrganizationName)
	}
	// What a confused caller sends in the wrong place is not printed either, nor can it begin a line of its own.
	confused := strings.Replace(validBody, `"a:b"`, `"`+m.Token+`","line\nbreak"`, 1)
	p.send(t, "POST", p.url, "wrong", confused)
	p.send(t, "POST", p.url+"/"+testKey, testKey, strings.Replace(validBody, "org_", testKey, 1))
	p.send(t, "GET", p.url, testKey, "")
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

func TestKeyAndScheme(t *testing.T) {
	t.Parallel()
	env := func(name string) string {
		return map[string]string{"CABLE_SIM_REFRESH_KEY": "key-of-the-environment\n"}[name]
	}
	file := writeKey(t, testKey)
	tests := map[string]struct {
		getenv func(string) string
		args   []string
		want   string // accepted as Authorization
	}{
		"environment":        {env, nil, "key-of-the-environment"},
		"file first":         {env, []string{"-refresh-key-file", file}, testKey},
		"bearer":             {noEnv, []string{"-refresh-key-file", file, "-scheme", "bearer"}, "Bearer " + testKey},
		"any":                {noEnv, []string{"-refresh-key-file", file, "-scheme", "any"}, "Bearer " + testKey},
		"made up":            {noEnv, []string{"-refresh-key-out", "DIR/key"}, ""},
		"given, not made up": {env, []string{"-refresh-key-out", "DIR/key"}, "key-of-the-environment"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := start(t, tt.getenv, tt.args...)
			path := filepath.Join(p.dir, "key")
			info, err := os.Stat(path)
			if tt.want == "" {
				if err != nil || info.Mode().Perm() != 0o600 {
					t.Fatalf("key file: %v, %v", info, err)
				}
				tt.want = strings.TrimSpace(p.read(t, "key"))
			} else if !errors.Is(err, os.ErrNotExist) {
				t.Errorf("a key that was given is written to a file: %v", err)
			}
			p.mint(t, tt.want)
			if status, body := p.send(t, "POST", p.url, "wrong", validBody); status != 401 {
				t.Errorf("wrong key: status %d, %s", status, body)
			}
		})
	}
}

func TestOrganizationsLatencyLife(t *testing.T) {
	t.Parallel()
	p := start(t, noEnv, "-refresh-key-file", writeKey(t, testKey), "-latency", "20ms", "-life", "10s",
		"-org", "org_a=A", "-org", "org_9f8b7c6d5e4a3b2c1d0e=B=C")
	before := time.Now()
	m := p.mint(t, testKey)
	if took := time.Since(before); took < 20*time.Millisecond {
		t.Errorf("answered after %s", took)
	}
	if m.OrganizationName != "B=C" || m.Expiry < before.Unix()+10 || m.Expiry > time.Now().Unix()+10 {
		t.Errorf("answer %q, expiry %d at %s", m.OrganizationName, m.Expiry, before)
	}
	if !strings.Contains(p.stderr.String(), "-life is a fault: every token lives for 10s, whatever was asked\n") {
		t.Errorf("stderr:\n%s", p.stderr)
	}
	// A fault takes the place of both, for its time.
	p.send(t, "POST", p.control+"/fault", "", `{"status":429,"times":1}`)
	if status, _ := p.send(t, "POST", p.url, testKey, validBody); status != 429 {
		t.Errorf("status = %d", status)
	}
	if m := p.mint(t, testKey); m.Expiry > time.Now().Unix()+10 {
		t.Errorf("after the fault: expiry %d", m.Expiry)
	}
}

func TestTLS(t *testing.T) {
	t.Parallel()
	p := start(t, noEnv, "-refresh-key-file", writeKey(t, testKey), "-tls", "-ca-out", "DIR/ca.pem")
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(p.read(t, "ca.pem"))) {
		t.Fatal("no certificate")
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	p.client = &http.Client{Transport: transport}
	p.mint(t, testKey)
	p.url = strings.Replace(p.url, "127.0.0.1", "localhost", 1)
	p.mint(t, testKey)
	if _, err := http.Get(p.url); err == nil {
		t.Error("trusted without the certificate")
	}
	_, body := p.send(t, "GET", p.control+"/calls", "", "")
	if !strings.HasPrefix(p.url, "https://") || strings.Count(body, `"HTTP/2.0"`) != 2 {
		t.Errorf("URL %q, calls %s", p.url, body)
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	key := writeKey(t, testKey)
	with := func(args ...string) []string { return append([]string{"-refresh-key-file", key}, args...) }
	tests := map[string]struct {
		args []string
		want string
	}{
		"no key": {
			nil,
			"no refresh key: give one (-refresh-key-file, CABLE_SIM_REFRESH_KEY), " +
				"or a file to write a new one to (-refresh-key-out)",
		},
		"no key file": {
			[]string{"-refresh-key-file", "/nonexistent/key"},
			"reading the refresh key: open /nonexistent/key: no such file or directory",
		},
		"empty key file": {
			[]string{"-refresh-key-file", writeKey(t, " \n")},
			`is empty`,
		},
		"all addresses": {
			with("-listen", ":0"),
			`address ":0" is not on loopback: use 127.0.0.1:PORT or [::1]:PORT`,
		},
		"all IPv4": {
			with("-listen", "0.0.0.0:0"),
			`address "0.0.0.0:0" is not on loopback`,
		},
		"all IPv6": {
			with("-listen", "[::]:0"),
			`address "[::]:0" is not on loopback`,
		},
		"another host": {
			with("-listen", "192.0.2.1:0"),
			`address "192.0.2.1:0" is not on loopback`,
		},
		"control on all": {
			with("-control", "0.0.0.0:0"),
			`address "0.0.0.0:0" is not on loopback`,
		},
		"no port": {
			with("-listen", "127.0.0.1"),
			"missing port in address",
		},
		"URL file's directory": {
			with("-url-file", "/nonexistent/url"),
			"no such file or directory",
		},
		"URL file a directory": {
			with("-url-file", t.TempDir()),
			"file exists",
		},
		"key file's directory": {
			[]string{"-refresh-key-out", "/nonexistent/key"},
			"no such file or directory",
		},
		"CA file's directory": {
			with("-tls", "-ca-out", "/nonexistent/ca"),
			"no such file or directory",
		},
		"unknown flag": {
			[]string{"-refresh-key", testKey},
			"flag provided but not defined: -refresh-key: run cable-sim -h for the flags",
		},
		"argument": {
			[]string{testKey},
			"arguments without a flag: run cable-sim -h for the flags",
		},
		"scheme": {
			[]string{"-scheme", "basic"},
			`-scheme "basic": want raw, bearer or any`,
		},
		"organization": {
			[]string{"-org", "org_a"},
			"want id=name",
		},
		"organization, no id": {
			[]string{"-org", "=A"},
			"want id=name",
		},
		"latency": {
			[]string{"-latency", "-1s"},
			"-latency -1s is negative",
		},
		"TLS without CA": {
			[]string{"-tls"},
			"-tls and -ca-out go together: clients must learn which certificate to trust",
		},
		"CA without TLS": {
			[]string{"-ca-out", "ca.pem"},
			"-tls and -ca-out go together",
		},
		"control file, no port": {
			[]string{"-control-url-file", "control"},
			"-control-url-file needs -control",
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var stderr bytes.Buffer
			ctx, cancel := context.WithCancel(t.Context())
			cancel() // what is not refused ends at once
			err := run(ctx, tt.args, noEnv, &stderr)
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
	if err := run(t.Context(), []string{"-h"}, noEnv, &stderr); err != nil {
		t.Errorf("error = %v", err)
	}
	if got := stderr.String(); !strings.Contains(got, "-refresh-key-out file") || strings.Count(got, "Usage") != 1 {
		t.Errorf("help:\n%s", got)
	}
}

func TestControl(t *testing.T) {
	t.Parallel()
	p := start(t, noEnv, "-refresh-key-file", writeKey(t, testKey), "-refresh-key-out", "DIR/new-key")
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
	call(testKey, 429)
	call(testKey, 503)
	call(testKey, 503)
	change("DELETE", "/fault", "", 204)
	m := p.mint(t, testKey)

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

	change("POST", "/refresh-key", " "+testKey+"-2\n", 204)
	call(testKey, 401)
	call(testKey+"-2", 200)
	change("POST", "/refresh-key", "", 204)
	call(testKey+"-2", 401)
	call(strings.TrimSpace(p.read(t, "new-key")), 200)

	change("POST", "/fault", `{"stauts": 500}`, 400)
	change("POST", "/fault", `{"delay": 5}`, 400)
	change("POST", "/faults", `not JSON`, 400)
	change("POST", "/fault", strings.Repeat(" ", 1<<20+1), 400)
	change("GET", "/fault", "", 405)
	change("GET", "/elsewhere", "", 404)
	call(strings.TrimSpace(p.read(t, "new-key")), 200) // a refused fault changes nothing
}

func TestControlListsTheLatest(t *testing.T) {
	t.Parallel()
	p := start(t, noEnv, "-refresh-key-file", writeKey(t, testKey))
	for range recent + 1 {
		p.mint(t, testKey)
	}
	_, body := p.send(t, "GET", p.control+"/calls", "", "")
	if got := strings.Count(body, `"sha256"`); got != recent || strings.Count(body, `"minted": true`) != recent {
		t.Errorf("%d tokens listed", got)
	}
	// No file was named for a new key: there would be no way to learn it.
	if status, text := p.send(t, "POST", p.control+"/refresh-key", "", ""); status != 400 {
		t.Errorf("status %d: %s", status, text)
	}
	p.mint(t, testKey)
}

// TestStopDuringCall shows that a delayed call does not hold up the stop.
func TestStopDuringCall(t *testing.T) {
	t.Parallel()
	p := start(t, noEnv, "-refresh-key-file", writeKey(t, testKey), "-latency", "1h")
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

// TestProcess runs the program as a process: signals, exit codes and stdout.
func TestProcess(t *testing.T) {
	t.Parallel()
	command := func(args ...string) (*exec.Cmd, *output, *bytes.Buffer) {
		cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
		cmd.Env = append(os.Environ(), "CABLE_SIM_TEST_MAIN=1", "CABLE_SIM_REFRESH_KEY="+testKey)
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
	cmd, stderr, _ := command("-listen", ":0")
	if err := cmd.Run(); cmd.ProcessState.ExitCode() != 1 || !strings.HasPrefix(stderr.String(), "cable-sim: address") {
		t.Errorf("%v, stderr:\n%s", err, stderr)
	}
}
