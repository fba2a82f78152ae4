// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/vaulttest"
)

// vaultServer is a server process. Its log at trace level, with the plugin's
// lines, and its audit log are files.
type vaultServer struct {
	*vaulttest.Server // as it runs now

	addr  string // such as "http://127.0.0.1:34567"
	root  string // token
	log   string // file
	audit string // file

	env     []string // for the server, and so for the plugin
	mlock   bool     // lock memory
	level   string   // of the log; default trace
	plugins string   // the plugin folder; default: one for all tests
	config  string   // more of the configuration file
	binary  string   // default: one for all tests
}

// startDev starts the server in dev mode, so that it keeps everything in memory, with the
// plugin registered and the audit log on.
func (v *vaultServer) startDev(dir string) error { return v.start(dir, nil, suite.plugin) }

// start starts the server, with its files in dir. If that fails, no process is
// left.
func (v *vaultServer) start(dir string, raft *vaulttest.Raft, plugins ...vaulttest.Plugin) error {
	v.audit = cmp.Or(v.audit, filepath.Join(dir, "audit.log"))
	s, err := vaulttest.Start(suite.ctx, vaulttest.Config{
		Binary: cmp.Or(v.binary, suite.vault), Dir: dir, Env: v.env, LogLevel: v.level, LockMemory: v.mlock,
		PluginDir: cmp.Or(v.plugins, suite.plugins), Plugins: plugins, Audit: v.audit, Raft: raft, Extra: v.config,
	})
	if err != nil {
		return err
	}
	v.Server, v.addr, v.root, v.log = s, s.Addr, s.Root, s.Log
	return nil
}

// stop ends the server, and with it its plugin processes.
func (v *vaultServer) stop() { v.Stop() }

// kill ends the server as a crash would.
func (v *vaultServer) kill(t testing.TB) {
	t.Helper()
	noError(t, v.Process.Kill())
	<-v.Exited
}

// request is a call of Vault's HTTP API.
type request struct {
	method, path string // below /v1/, with the query
	body         any    // JSON; a string as it is; nil for none
	token        string
	header       map[string]string
}

// response is Vault's response to a request.
type response struct {
	status int
	header http.Header
	text   string

	LeaseID       string         `json:"lease_id"`
	LeaseDuration int64          `json:"lease_duration"`
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

// String is the response as test failures show it.
func (a *response) String() string {
	if a == nil {
		return "no response"
	}
	return fmt.Sprintf("HTTP %d %s", a.status, strings.TrimSpace(a.text))
}

// number returns a number of the data.
func (a *response) number(key string) int64 {
	n, _ := a.Data[key].(json.Number)
	i, _ := n.Int64()
	return i
}

// token returns the access token.
func (a *response) token() string {
	s, _ := a.Data["token"].(string)
	return s
}

// call sends r. It returns an error only if there is no response.
func (v *vaultServer) call(r request) (*response, error) {
	return v.callContext(context.Background(), r)
}

// callContext is call for a caller that may leave.
func (v *vaultServer) callContext(ctx context.Context, r request) (*response, error) {
	resp, err := v.Do(ctx,
		vaulttest.Request{Method: r.method, Path: r.path, Body: r.body, Token: r.token, Header: r.header})
	if err != nil {
		return nil, err
	}
	a := &response{status: resp.Status, header: resp.Header, text: string(resp.Body)}
	if !strings.HasPrefix(resp.Header.Get("Content-Type"), "application/json") {
		return a, nil // such as the metrics
	}
	decoder := json.NewDecoder(bytes.NewReader(resp.Body))
	decoder.UseNumber()
	if err := decoder.Decode(a); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("HTTP %d: %w: %.200s", a.status, err, a.text)
	}
	return a, nil
}

// do is call with the root token, for requests that must get a response.
func (v *vaultServer) do(t testing.TB, method, path string, body any) *response {
	t.Helper()
	return v.as(t, v.root, method, path, body)
}

// as is do with another token.
func (v *vaultServer) as(t testing.TB, token, method, path string, body any) *response {
	t.Helper()
	a, err := v.call(request{method: method, path: path, body: body, token: token})
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	return a
}

// ok is do for requests that must succeed.
func (v *vaultServer) ok(t testing.TB, method, path string, body any) *response {
	t.Helper()
	a := v.do(t, method, path, body)
	if a.status >= 300 {
		t.Fatalf("%s %s: %s", method, path, a)
	}
	return a
}

// writePolicy writes a policy of Vault's.
func (v *vaultServer) writePolicy(t testing.TB, name, text string) {
	t.Helper()
	v.ok(t, "PUT", "sys/policies/acl/"+name, map[string]any{"policy": text})
}

// tokenWith returns a new token with a policy, and with more fields of its request.
func (v *vaultServer) tokenWith(t testing.TB, policy string, more map[string]any) string {
	t.Helper()
	fields := map[string]any{"policies": []string{policy}, "no_default_policy": true}
	maps.Copy(fields, more)
	return v.ok(t, "POST", "auth/token/create", fields).Auth.ClientToken
}

// cli runs Vault's CLI, which must succeed, and returns its output.
func (v *vaultServer) cli(t testing.TB, args ...string) string {
	t.Helper()
	cmd := exec.Command(suite.vault, args...)
	cmd.Env = v.CLIEnv()
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
	watch(t, v)
	return v.enable(t, pluginName, cabletest.NewServer(t, opts))
}

// enable is newMount for a plugin of any name and a simulator that exists.
func (v *vaultServer) enable(t testing.TB, plugin string, sim *cabletest.Server) *mount {
	t.Helper()
	m := v.mountAt(t, fmt.Sprintf("cable-%d", mounts.Add(1)), plugin, sim)
	t.Cleanup(func() { v.ok(t, "DELETE", "sys/mounts/"+m.path, nil) })
	return m
}

// mountAt enables a plugin on a server that the test ends, so that the mount is not
// disabled at the test's end.
func (v *vaultServer) mountAt(t testing.TB, path, plugin string, sim *cabletest.Server) *mount {
	t.Helper()
	v.ok(t, "POST", "sys/mounts/"+path, map[string]any{"type": plugin})
	return &mount{vaultServer: v, path: path, sim: sim}
}

// newMountOf is mountAt for the engine at cable/, which is configured.
func newMountOf(t testing.TB, v *vaultServer) *mount {
	t.Helper()
	watch(t, v)
	m := v.mountAt(t, "cable", pluginName, cabletest.NewServer(t, nil))
	m.configure(t)
	return m
}

// configure writes config, with extra fields, and the role app.
func (m *mount) configure(t testing.TB, extra ...map[string]any) {
	t.Helper()
	fields := map[string]any{
		"refresh_key": m.sim.RefreshKey(), "token_url": m.sim.URL, "organization_id": cabletest.DefaultOrganizationID,
	}
	for _, e := range extra {
		maps.Copy(fields, e)
	}
	m.ok(t, "POST", m.path+"/config", fields)
	m.ok(t, "POST", m.path+"/roles/app", map[string]any{"scopes": "transactions:read,transactions:write"})
}

// read mints a token.
func (m *mount) read(t testing.TB) *response {
	t.Helper()
	return m.ok(t, "GET", m.path+"/creds/app", nil)
}

// readAll reads n tokens at once.
func (m *mount) readAll(t *testing.T, n int) []*response {
	t.Helper()
	responses := make([]*response, n)
	var wg sync.WaitGroup
	for i := range responses {
		wg.Go(func() {
			a, err := m.call(request{method: "GET", path: m.path + "/creds/app", token: m.root})
			if err != nil {
				t.Error(err)
				a = new(response)
			}
			responses[i] = a
		})
	}
	wg.Wait()
	return responses
}

// logHas reports whether one line of the server's log contains all parts.
func (v *vaultServer) logHas(parts ...string) bool {
	data, _ := os.ReadFile(v.log)
	for line := range bytes.Lines(data) {
		if !slices.ContainsFunc(parts, func(p string) bool { return !bytes.Contains(line, []byte(p)) }) {
			return true
		}
	}
	return false
}
