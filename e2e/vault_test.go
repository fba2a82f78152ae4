// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// vaultServer is a Vault server process. Its log at trace level, with that of
// the plugin, and its audit log are files.
type vaultServer struct {
	addr  string // such as "http://127.0.0.1:34567"
	root  string // a token that may do everything
	log   string // file
	audit string // file

	env     []string // for the server, and so for the plugin
	mlock   bool     // lock memory
	level   string   // of the log; default trace
	plugins string   // the plugin folder; default that of all tests
	binary  string   // default that of all tests

	cmd    *exec.Cmd
	exited chan struct{}
}

// running holds the servers that were started and not stopped; after ending,
// none is started any more.
var (
	running sync.Map // of *vaultServer
	ending  atomic.Bool
)

// killServers ends what is running.
func killServers() {
	ending.Store(true)
	running.Range(func(v, _ any) bool {
		v.(*vaultServer).stop()
		return true
	})
}

// startDevServer starts a server in dev mode that keeps everything in memory,
// with the plugin registered and the audit log on.
func startDevServer(dir string, env ...string) (*vaultServer, error) {
	v := &vaultServer{env: env}
	return v, v.startDev(dir)
}

// startDev is startDevServer for a server with settings of its own.
func (v *vaultServer) startDev(dir string) error {
	v.root = rand.Text()
	err := v.start(dir, "", func(addr string) []string {
		return []string{"-dev", "-dev-no-store-token", "-dev-root-token-id=" + v.root, "-dev-listen-address=" + addr}
	})
	if err == nil {
		err = v.setUp()
	}
	return err
}

// start runs `vault server` in dir on a free port and waits until it answers.
// config is added to the configuration, with ADDR replaced by the address.
func (v *vaultServer) start(dir, config string, args func(addr string) []string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	v.log = filepath.Join(dir, "vault.log")
	if v.audit == "" {
		v.audit = filepath.Join(dir, "audit.log")
	}
	if v.plugins == "" {
		v.plugins = suite.plugins
	}
	if v.binary == "" {
		v.binary = suite.vault
	}
	if v.level == "" {
		v.level = "trace"
	}
	for range 5 { // another process may take the port meanwhile
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		addr := listener.Addr().String()
		_ = listener.Close()
		v.addr = "http://" + addr
		file := filepath.Join(dir, "vault.hcl")
		text := fmt.Sprintf("plugin_directory = %q\ndisable_mlock = %t\napi_addr = %q\n", v.plugins, !v.mlock, v.addr) +
			strings.ReplaceAll(config, "ADDR", addr)
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil { // for a server of another user
			return err
		}
		log, err := os.OpenFile(v.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		v.cmd = exec.Command(v.binary, append([]string{"server", "-log-level=" + v.level, "-config=" + file}, args(addr)...)...)
		v.cmd.Stdout, v.cmd.Stderr = log, log
		// The simulator is on loopback: no proxy of this machine is to be asked.
		v.cmd.Env = append(append(os.Environ(), "HTTP_PROXY=", "HTTPS_PROXY=", "http_proxy=", "https_proxy=", "HOME="+dir, "VAULT_LOG_LEVEL="+v.level), v.env...)
		err = v.cmd.Start()
		_ = log.Close()
		if err != nil {
			return err
		}
		v.exited = make(chan struct{})
		running.Store(v, nil)
		if ending.Load() {
			_ = v.cmd.Process.Kill()
		}
		go func(cmd *exec.Cmd, exited chan struct{}) {
			_ = cmd.Wait()
			close(exited)
		}(v.cmd, v.exited)
		if v.answers() {
			return nil
		}
		v.stop()
	}
	text, _ := os.ReadFile(v.log)
	return fmt.Errorf("vault does not start:\n%s", text)
}

// raftConfig is the configuration of a server alone on integrated storage, in
// the folder data.
func raftConfig(data string) string {
	return fmt.Sprintf(`
storage "raft" {
  path    = %q
  node_id = "one"

  performance_multiplier = 1 # elects itself sooner
}
listener "tcp" {
  address         = "ADDR"
  cluster_address = "127.0.0.1:0"
  tls_disable     = true
}
cluster_addr = "https://127.0.0.1:1"
`, data)
}

// unseal unseals the server and waits until it is active.
func (v *vaultServer) unseal(t *testing.T, key string) {
	t.Helper()
	v.ok(t, "PUT", "sys/unseal", map[string]any{"key": key})
	waitFor(t, 30*time.Second, "the server is active", func() bool { return v.do(t, "GET", "sys/health", nil).status == 200 })
}

// answers waits until the server answers, or ends.
func (v *vaultServer) answers() bool {
	for range 600 {
		select {
		case <-v.exited:
			return false
		case <-time.After(pollInterval):
		}
		// 200: active; 501: not initialized; 503: sealed.
		a, err := v.call(request{method: "GET", path: "sys/health"})
		if err == nil && (a.status == 200 || a.status == 501 || a.status == 503) {
			return true
		}
	}
	return false
}

// setUp registers the plugin and turns the audit log on.
func (v *vaultServer) setUp() error {
	for _, r := range []request{
		{"PUT", "sys/plugins/catalog/secret/" + pluginName, map[string]any{"sha256": suite.sha256, "command": pluginName, "version": pluginVersion}, v.root, nil},
		{"PUT", "sys/audit/file", map[string]any{"type": "file", "options": map[string]any{"file_path": v.audit}}, v.root, nil},
	} {
		if a, err := v.call(r); err != nil || a.status != 204 {
			return fmt.Errorf("%s %s: %v, %w", r.method, r.path, a, err)
		}
	}
	return nil
}

// stop ends the server, and with it its plugin processes.
func (v *vaultServer) stop() {
	running.Delete(v)
	_ = v.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-v.exited:
	case <-time.After(20 * time.Second):
		_ = v.cmd.Process.Kill()
		<-v.exited
	}
}

// request is a call of Vault's HTTP API.
type request struct {
	method, path string // below /v1/, with the query
	body         any    // JSON; a string as it is; nil for none
	token        string
	header       map[string]string
}

// answer is what Vault answered.
type answer struct {
	status int
	header http.Header
	text   string

	LeaseID       string         `json:"lease_id"`
	LeaseDuration int64          `json:"lease_duration"`
	Renewable     bool           `json:"renewable"`
	Data          map[string]any `json:"data"`
	WrapInfo      *struct {
		Token string `json:"token"`
	} `json:"wrap_info"`
	Auth *struct {
		ClientToken string `json:"client_token"`
	} `json:"auth"`
	Warnings []string `json:"warnings"`
	Errors   []string `json:"errors"`
}

// String is the answer as test failures show it.
func (a *answer) String() string {
	if a == nil {
		return "no answer"
	}
	return fmt.Sprintf("HTTP %d %s", a.status, strings.TrimSpace(a.text))
}

// number returns a number of the data.
func (a *answer) number(key string) int64 {
	n, _ := a.Data[key].(json.Number)
	i, _ := n.Int64()
	return i
}

// token returns the access token.
func (a *answer) token() string {
	s, _ := a.Data["token"].(string)
	return s
}

// transport keeps the connections of many readers.
var transport = func() *http.Transport {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.MaxIdleConns, t.MaxIdleConnsPerHost = 0, 128
	return t
}()

// call sends r. The error is one of the way only.
func (v *vaultServer) call(r request) (*answer, error) {
	return v.callContext(context.Background(), r)
}

// callContext is call for a caller that may leave.
func (v *vaultServer) callContext(ctx context.Context, r request) (*answer, error) {
	var body []byte
	switch b := r.body.(type) {
	case nil:
	case string:
		body = []byte(b)
	default:
		var err error
		if body, err = json.Marshal(b); err != nil {
			return nil, err
		}
	}
	req, err := http.NewRequestWithContext(ctx, r.method, v.addr+"/v1/"+r.path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("X-Vault-Request", "true")
	if r.token != "" {
		req.Header.Set("X-Vault-Token", r.token)
	}
	for k, s := range r.header {
		req.Header.Set(k, s)
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	a := &answer{status: resp.StatusCode, header: resp.Header, text: string(text)}
	if !strings.HasPrefix(resp.Header.Get("Content-Type"), "application/json") {
		return a, nil // such as the metrics
	}
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber()
	if err := decoder.Decode(a); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("HTTP %d: %w: %.200s", a.status, err, text)
	}
	return a, nil
}

// do is call with the root token, for requests that must get an answer.
func (v *vaultServer) do(t testing.TB, method, path string, body any) *answer {
	t.Helper()
	a, err := v.call(request{method: method, path: path, body: body, token: v.root})
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	return a
}

// ok is do for requests that must succeed.
func (v *vaultServer) ok(t testing.TB, method, path string, body any) *answer {
	t.Helper()
	a := v.do(t, method, path, body)
	if a.status >= 300 {
		t.Fatalf("%s %s: %s", method, path, a)
	}
	return a
}

// cli runs Vault's CLI, which must succeed, and returns what it printed.
func (v *vaultServer) cli(t testing.TB, args ...string) string {
	t.Helper()
	cmd := exec.Command(suite.vault, args...)
	cmd.Env = append(os.Environ(), "VAULT_ADDR="+v.addr, "VAULT_TOKEN="+v.root)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("vault %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// mount is a mount of the engine with a Cable of its own.
type mount struct {
	*vaultServer
	sim  *cabletest.Server
	path string
}

// mounts counts, to name them.
var mounts atomic.Int64

// newMount enables the engine for the duration of a test. At its end it must
// be possible to disable the mount, whatever leases there are, and no secret
// may have leaked.
func newMount(t testing.TB, v *vaultServer, opts *cabletest.Options) *mount {
	t.Helper()
	m := &mount{vaultServer: v, path: fmt.Sprintf("cable-%d", mounts.Add(1)), sim: cabletest.NewServer(t, opts)}
	watch(t, v)
	v.ok(t, "POST", "sys/mounts/"+m.path, map[string]any{"type": pluginName})
	t.Cleanup(func() { v.ok(t, "DELETE", "sys/mounts/"+m.path, nil) })
	return m
}

// configure writes config, with extra fields, and the role app.
func (m *mount) configure(t testing.TB, extra ...map[string]any) {
	t.Helper()
	fields := map[string]any{
		"refresh_key": m.sim.RefreshKey(), "token_url": m.sim.URL, "organization_id": cabletest.DefaultOrganizationID,
	}
	for _, e := range extra {
		for k, v := range e {
			fields[k] = v
		}
	}
	m.ok(t, "POST", m.path+"/config", fields)
	m.ok(t, "POST", m.path+"/roles/app", map[string]any{"scopes": "transactions:read,transactions:write"})
}

// read mints a token.
func (m *mount) read(t testing.TB) *answer {
	t.Helper()
	return m.ok(t, "GET", m.path+"/creds/app", nil)
}

// fileSum is a file's SHA-256, in hexadecimal.
func fileSum(path string) (string, error) {
	data, err := os.ReadFile(path)
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:]), err
}

// logHas reports whether one line of the server's log holds all parts.
func (v *vaultServer) logHas(parts ...string) bool {
	data, _ := os.ReadFile(v.log)
	for line := range bytes.Lines(data) {
		if !slices.ContainsFunc(parts, func(p string) bool { return !bytes.Contains(line, []byte(p)) }) {
			return true
		}
	}
	return false
}

// initKeys returns the one key and the root token of a new server.
func initKeys(t testing.TB, a *answer) (key, root string) {
	t.Helper()
	var v struct {
		Keys      []string `json:"keys"`
		RootToken string   `json:"root_token"`
	}
	if err := json.Unmarshal([]byte(a.text), &v); err != nil || len(v.Keys) != 1 {
		t.Fatalf("sys/init: %v", err)
	}
	return v.Keys[0], v.RootToken
}
