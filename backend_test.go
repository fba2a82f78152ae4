// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/helper/testhelpers/schema"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/plugin/pb"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/state"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/version"
)

// kv are the fields of a request or a response.
type kv = map[string]any

// Fault and Grant say how the simulated Cable misbehaves.
type (
	Fault = cabletest.Fault
	Grant = cabletest.Grant
)

const (
	opRead   = logical.ReadOperation
	opUpdate = logical.UpdateOperation
	opPatch  = logical.PatchOperation
	opDelete = logical.DeleteOperation
	opCreate = logical.CreateOperation
	opList   = logical.ListOperation
	opHelp   = logical.HelpOperation
	opRevoke = logical.RevokeOperation
	opRenew  = logical.RenewOperation
)

// testMount is a mount of the engine over Vault's in-memory storage, with a
// simulated Cable, spoken to as Vault would.
type testMount struct {
	testing.TB
	b       *backend
	storage *logical.InmemStorage
	sys     *logical.StaticSystemView
	sim     *cabletest.Server
	log     *syncBuffer
	logger  hclog.Logger
	hangTTL atomic.Pointer[chan struct{}] // lease settings are not reported until it is closed
	maxTTL  atomic.Int64                  // max_lease_ttl if not 0, for tuning during requests
}

// testView is what a mount asks Vault, from more than one goroutine: its
// settings may change while the environment is asked for.
type testView struct {
	*logical.StaticSystemView
	m *testMount
}

// MaxLeaseTTL implements [logical.SystemView].
func (v testView) MaxLeaseTTL() time.Duration {
	if hang := v.m.hangTTL.Load(); hang != nil {
		<-*hang
	}
	if d := v.m.maxTTL.Load(); d != 0 {
		return time.Duration(d)
	}
	return v.StaticSystemView.MaxLeaseTTL()
}

// PluginEnv implements [logical.SystemView].
func (v testView) PluginEnv(context.Context) (*logical.PluginEnvironment, error) {
	return &logical.PluginEnvironment{VaultVersion: "1.21.1"}, nil
}

// syncBuffer collects a log that several goroutines write.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.String()
}

// newMount returns an unconfigured mount. When the test ends, its log at trace
// level, its status and its metrics must hold neither the refresh
// key nor a token.
func newMount(t testing.TB) *testMount {
	t.Helper()
	m := &testMount{
		TB:      t,
		storage: new(logical.InmemStorage),
		sys:     &logical.StaticSystemView{DefaultLeaseTTLVal: 768 * time.Hour, MaxLeaseTTLVal: 768 * time.Hour},
		sim:     cabletest.NewServer(t, nil),
		log:     new(syncBuffer),
	}
	m.logger = hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, Output: m.log, JSONFormat: true})
	lb, err := Factory(t.Context(), &logical.BackendConfig{
		Logger:      m.logger,
		System:      testView{m.sys, m},
		StorageView: m.storage,
		BackendUUID: "test",
	})
	if err != nil {
		t.Fatal(err)
	}
	m.b = lb.(*backend)
	t.Cleanup(func() {
		for _, path := range []string{"status", "metrics"} {
			resp, err := m.b.HandleRequest(
				context.Background(),
				&logical.Request{Operation: opRead, Path: path, Storage: m.storage},
			)
			m.noSecrets(path, fmt.Sprint(resp, err))
		}
		m.b.Cleanup(context.Background())
		m.noSecrets("the log", m.log.String())
	})
	return m
}

// newConfiguredMount returns a mount with config and a role "ci" of two scopes.
func newConfiguredMount(t testing.TB) *testMount {
	t.Helper()
	m := newMount(t)
	m.write(
		"config",
		kv{
			"refresh_key":     m.sim.RefreshKey(),
			"token_url":       m.sim.URL,
			"organization_id": cabletest.DefaultOrganizationID,
		},
	)
	m.write("roles/ci", kv{"scopes": "transactions:read,person:read"})
	return m
}

// noSecrets fails the test if text holds a refresh key or an access token.
func (m *testMount) noSecrets(where, text string) {
	m.Helper()
	for _, marker := range []string{cabletest.RefreshKeyMarker, cabletest.TokenMarker} {
		if strings.Contains(text, marker) {
			m.Errorf("%s holds %s", where, marker)
		}
	}
}

// request sends a request as it comes out of Vault's plugin protocol, and
// checks what must hold of every answer: the declared schema, no refresh key,
// and no token but where it belongs.
func (m *testMount) request(op logical.Operation, path string, data kv) (*logical.Response, error) {
	m.Helper()
	req := &logical.Request{
		ID:         "req-1",
		Operation:  op,
		Path:       path,
		Storage:    m.storage,
		Data:       overJSON(m, data),
		MountPoint: "cable/",
	}
	if op == opUpdate {
		if found, exists, err := m.b.HandleExistenceCheck(m.Context(), req); err != nil {
			return nil, err
		} else if found && !exists {
			req.Operation = opCreate
		}
	}
	resp, err := m.b.HandleRequest(m.Context(), req)
	err = pb.ProtoErrToErr(pb.ErrToProtoErr(err))
	if err != nil {
		m.noSecrets("an error", err.Error())
	}
	if resp != nil {
		shown := *resp
		if strings.HasPrefix(path, "creds/") && !resp.IsError() {
			shown.Data = nil
			if resp.Data != nil {
				rest := make(kv)
				for k, v := range resp.Data {
					if k != "token" {
						rest[k] = v
					}
				}
				shown.Data = rest
			}
		}
		m.noSecrets("an answer", fmt.Sprintf("%+v %+v", shown, shown.Secret))
		if err == nil && !resp.IsError() && len(resp.Data) > 0 && op != opRevoke {
			schema.ValidateResponse(
				tester(m.TB),
				schema.GetResponseSchema(tester(m.TB), m.b.Route(path), req.Operation),
				resp,
				true,
			)
		}
	}
	return resp, err
}

// tester gives the SDK's helpers the type that they want.
func tester(tb testing.TB) *testing.T {
	if t, ok := tb.(*testing.T); ok {
		return t
	}
	return new(testing.T)
}

// overJSON returns data as the plugin protocol brings it.
func overJSON(t testing.TB, data kv) kv {
	t.Helper()
	if data == nil {
		return nil
	}
	raw, err := json.Marshal(data)
	if err != nil {
		t.Fatal(err)
	}
	var out kv
	if err := json.Unmarshal(raw, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

// ok sends a request that must succeed.
func (m *testMount) ok(op logical.Operation, path string, data kv) *logical.Response {
	m.Helper()
	resp, err := m.request(op, path, data)
	if err != nil || resp.IsError() {
		m.Fatalf("%s %s: %v %v", op, path, err, resp.Error())
	}
	return resp
}

// write writes with success and returns the warnings.
func (m *testMount) write(path string, data kv) []string {
	m.Helper()
	if resp := m.ok(opUpdate, path, data); resp != nil {
		return resp.Warnings
	}
	return nil
}

// writeKey writes the refresh key together with where it goes.
func (m *testMount) writeKey(key string) []string {
	m.Helper()
	return m.write("config", kv{"refresh_key": key, "token_url": m.sim.URL})
}

// putRole stores a role behind the engine's back, as another node does.
func (m *testMount) putRole(name string, role *state.Role) {
	m.Helper()
	raw, err := role.Encode()
	if err == nil {
		err = m.storage.Put(m.Context(), &logical.StorageEntry{Key: state.RoleKey(name), Value: raw})
	}
	if err != nil {
		m.Error(err)
	}
}

// putConfig is putRole for the configuration.
func (m *testMount) putConfig(config *state.Config) {
	m.Helper()
	raw, err := config.Encode()
	if err == nil {
		err = m.storage.Put(m.Context(), &logical.StorageEntry{Key: state.ConfigKey, Value: raw})
	}
	if err != nil {
		m.Error(err)
	}
}

// read reads with success and returns the data, nil for a 404.
func (m *testMount) read(path string) kv {
	m.Helper()
	if resp := m.ok(opRead, path, nil); resp != nil {
		return resp.Data
	}
	return nil
}

// refused sends a request that must fail with a status and with each of the
// texts, and returns the answer.
func (m *testMount) refused(status int, op logical.Operation, path string, data kv, texts ...string) *logical.Response {
	m.Helper()
	resp, err := m.request(op, path, data)
	got, failure := statusOf(resp, err)
	if failure == nil {
		m.Fatalf("%s %s %v: want status %d, got success: %v", op, path, data, status, resp)
	}
	m.Logf("%d %s", got, failure)
	if got != status {
		m.Errorf("%s %s %v: status %d, want %d", op, path, data, got, status)
	}
	for _, text := range texts {
		if !strings.Contains(failure.Error(), text) {
			m.Errorf("%s %s: %q does not say %q", op, path, failure, text)
		}
	}
	return resp
}

// statusOf is the HTTP status that Vault makes of an answer.
func statusOf(resp *logical.Response, err error) (int, error) {
	status, failure := logical.RespondErrorCommon(&logical.Request{Operation: opUpdate}, resp, err)
	if failure != nil {
		logical.AdjustErrorStatusCode(&status, failure)
	}
	return status, failure
}

// wantText fails unless one of texts holds each of the parts.
func (m *testMount) wantWarning(warnings []string, parts ...string) {
	m.Helper()
	for _, w := range warnings {
		all := true
		for _, p := range parts {
			all = all && strings.Contains(w, p)
		}
		if all {
			return
		}
	}
	m.Errorf("no warning says %q: %q", parts, warnings)
}

func TestFactory(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	if got := m.b.Type(); got != logical.TypeLogical {
		t.Errorf("type %v", got)
	}
	if got := m.b.PluginVersion().Version; got != version.String() || !strings.HasPrefix(got, "v") {
		t.Errorf("version %q", got)
	}
	// Neither storage nor network nor Vault is asked.
	lb, err := Factory(
		t.Context(),
		&logical.BackendConfig{Logger: hclog.NewNullLogger(), System: nil, StorageView: nil},
	)
	if err != nil {
		t.Fatal(err)
	}
	if err := lb.Initialize(t.Context(), &logical.InitializationRequest{}); err != nil {
		t.Error(err)
	}
}

// TestSealWrap guards that each stored key that holds a secret is
// seal-wrapped, by the SDK's rule: an exact path, or a prefix ending in a slash.
func TestSealWrap(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	keys, err := logical.CollectKeys(t.Context(), m.storage)
	if err != nil {
		t.Fatal(err)
	}
	secret := 0
	for _, key := range keys {
		entry, err := m.storage.Get(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(entry.Value, []byte(cabletest.RefreshKeyMarker)) {
			continue
		}
		secret++
		wrapped := false
		for _, p := range m.b.SpecialPaths().SealWrapStorage {
			wrapped = wrapped || p == key || strings.HasSuffix(p, "/") && strings.HasPrefix(key, p)
		}
		if !wrapped {
			t.Errorf("%q holds the refresh key and is not seal-wrapped", key)
		}
	}
	if secret != 1 {
		t.Errorf("%d keys hold the refresh key, want 1", secret)
	}
}

// TestForwarding guards which node serves what: writes of storage the active
// node of the primary, mints the active node of each cluster.
func TestForwarding(t *testing.T) {
	t.Parallel()
	for _, path := range newBackend().Paths {
		for op, handler := range path.Operations {
			props := handler.Properties()
			writes := op != opRead && op != opList
			mints := strings.HasPrefix(path.Pattern, "creds/")
			tells := path.Pattern == "status" || path.Pattern == "metrics" // of mints
			if props.ForwardPerformanceStandby != (writes || mints || tells) {
				t.Errorf("%s %s: forwarded from standbys: %v", op, path.Pattern, props.ForwardPerformanceStandby)
			}
			if props.ForwardPerformanceSecondary != (writes && !mints) {
				t.Errorf("%s %s: forwarded from secondaries: %v", op, path.Pattern, props.ForwardPerformanceSecondary)
			}
			if props.Summary == "" || len(props.Responses) == 0 {
				t.Errorf("%s %s: no summary or no response schema", op, path.Pattern)
			}
		}
		if path.HelpSynopsis == "" || path.HelpDescription == "" {
			t.Errorf("%s: no help", path.Pattern)
		}
		for name, field := range path.Fields {
			if field.Description == "" {
				t.Errorf("%s: field %s has no description", path.Pattern, name)
			}
		}
	}
}

func TestUnknownFieldsAreRefused(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	for _, tt := range []struct {
		op    logical.Operation
		path  string
		known string
	}{
		{opUpdate, "config", "auth_scheme, ca_cert, disabled, organization_id, refresh_key, request_timeout, token_url, verify_role"},
		{opPatch, "config", "auth_scheme, ca_cert"},
		{opRead, "config", "accepts no parameters"},
		{opDelete, "config", "accepts no parameters"},
		{opUpdate, "roles/ci", "disabled, max_ttl, organization_id, reuse_for, scopes, ttl"},
		{opUpdate, "roles/new", "disabled, max_ttl, organization_id, reuse_for, scopes, ttl"},
		{opPatch, "roles/ci", "disabled, max_ttl"},
		{opRead, "roles/ci", "accepts no parameters"},
		{opDelete, "roles/ci", "accepts no parameters"},
		{opList, "roles/", "after, limit"},
		{opRead, "creds/ci", "scopes, ttl"},
		{opUpdate, "creds/ci", "scopes, ttl"},
	} {
		m.refused(400, tt.op, tt.path, kv{"bogus": "x"}, `unknown field "bogus"`, tt.known)
		resp := m.refused(400, tt.op, tt.path, kv{m.sim.RefreshKey(): "x"}, "unknown field (not shown: length 43)")
		if resp == nil {
			t.Errorf("%s %s: not an error response", tt.op, tt.path)
		}
	}
	m.refused(400, opUpdate, "roles/ci", kv{"name": "other"}, `unknown field "name"`)
	if m.sim.CallCount() != 0 {
		t.Error("Cable was called")
	}
	if m.read("roles/new") != nil {
		t.Error("a refused write created a role")
	}
}

// TestPanic proves that a panic costs one request: it is answered 500, logged
// with its stack and without its value, and another mount goes on.
func TestPanic(t *testing.T) {
	t.Parallel()
	m, other := newConfiguredMount(t), newConfiguredMount(t)
	secret := m.sim.RefreshKey()
	boom := func(context.Context, *logical.Request, *framework.FieldData) (*logical.Response, error) {
		panic(errors.New("value with " + secret))
	}
	m.b.Route("creds/ci").Operations[opRead].(*framework.PathOperation).Callback = boom
	m.b.Route("roles/ci").ExistenceCheck = func(context.Context, *logical.Request, *framework.FieldData) (bool, error) { panic(secret) }

	m.refused(500, opRead, "creds/ci", nil, "req-1")
	m.refused(500, opUpdate, "roles/ci", kv{"ttl": 600}, "req-1")
	if log := m.log.String(); !strings.Contains(log, "TestPanic") || !strings.Contains(log, "*errors.errorString") {
		t.Errorf("the log holds no stack: %s", log)
	}
	m.read("config")
	other.read("creds/ci")
}

// TestInvalidateWinsOverRebuild holds a rebuild between its reading of storage
// and its end, changes the configuration meanwhile, and wants the next mint to
// use the new one.
func TestInvalidateWinsOverRebuild(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	for _, change := range []struct {
		name string
		do   func(newKey string)
	}{
		{"invalidate", func(newKey string) {
			cfg, err := state.ReadConfig(t.Context(), m.storage)
			if err != nil {
				t.Error(err)
			}
			next := *cfg
			next.RefreshKey = cable.NewSecret(newKey)
			m.putConfig(&next)
			m.b.InvalidateKey(t.Context(), "config")
		}},
		{"write", func(newKey string) { m.writeKey(newKey) }},
	} {
		m.b.state.Invalidate(state.ConfigKey)
		slow := &slowStorage{Storage: m.storage, read: make(chan struct{}), proceed: make(chan struct{})}
		done := make(chan error)
		go func() {
			_, err := m.b.state.Config(t.Context(), slow)
			done <- err
		}()
		<-slow.read
		newKey := cabletest.NewRefreshKey()
		change.do(newKey)
		close(slow.proceed)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		m.sim.SetRefreshKey(newKey)
		if m.read("creds/ci") == nil {
			t.Errorf("%s: no token", change.name)
		}
	}
}

// slowStorage stops after it has read, until it may proceed.
type slowStorage struct {
	logical.Storage
	read, proceed chan struct{}
}

func (s *slowStorage) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	entry, err := s.Storage.Get(ctx, key)
	close(s.read)
	<-s.proceed
	return entry, err
}

// TestRolesAreCached pins that a role is read from storage once, that a write
// or an invalidation is seen by the next mint, also by one that was reading
// meanwhile, and that memory is bounded.
func TestRolesAreCached(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.read("creds/ci")
	put := func(ttl time.Duration) {
		m.putRole("ci", &state.Role{Scopes: []string{"person:read"}, TTL: ttl * time.Second})
	}
	asked := func() int64 {
		m.read("creds/ci")
		calls := m.sim.Calls()
		return calls[len(calls)-1].ExpirySeconds
	}
	put(400)
	if got := asked(); got != 3600 {
		t.Errorf("asked for %ds: the role was read from storage", got)
	}
	m.b.InvalidateKey(t.Context(), "roles/ci")
	if got := asked(); got != 400 {
		t.Errorf("asked for %ds after an invalidation, want 400s", got)
	}
	m.write("roles/ci", kv{"ttl": 500})
	if got := asked(); got != 500 {
		t.Errorf("asked for %ds after a write, want 500s", got)
	}

	m.b.InvalidateKey(t.Context(), "roles/ci")
	slow := &slowStorage{Storage: m.storage, read: make(chan struct{}), proceed: make(chan struct{})}
	done := make(chan error)
	go func() {
		_, err := m.b.state.Role(t.Context(), slow, "ci")
		done <- err
	}()
	<-slow.read
	put(600)
	m.b.InvalidateKey(t.Context(), "roles/ci")
	close(slow.proceed)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got := asked(); got != 600 {
		t.Errorf("asked for %ds after an invalidation during a read, want 600s", got)
	}

	m.ok(opDelete, "roles/ci", nil)
	m.refused(400, opRead, "creds/ci", nil, "does not exist")

}

// TestStandby pins that a performance standby and a secondary hand on what they
// must, before Cable is called.
func TestStandby(t *testing.T) {
	t.Parallel()
	for state, want := range map[consts.ReplicationState]map[string]bool{
		consts.ReplicationPerformanceStandby:   {"creds/ci": true, "config": true, "roles/ci": true},
		consts.ReplicationPerformanceSecondary: {"creds/ci": false, "config": true, "roles/ci": true},
		consts.ReplicationPerformancePrimary:   {"creds/ci": false, "config": false, "roles/ci": false},
	} {
		m := newConfiguredMount(t)
		m.sys.ReplicationStateVal = state
		for path, forward := range want {
			op, data := logical.Operation(opUpdate), kv{"organization_id": cabletest.DefaultOrganizationID}
			if path == "creds/ci" {
				op, data = opRead, nil
			}
			before := m.sim.CallCount()
			_, err := m.request(op, path, data)
			if forwarded := err != nil && err.Error() == logical.ErrReadOnly.Error(); forwarded != forward {
				t.Errorf("state %d: %s: %v", state, path, err)
			}
			if forward && m.sim.CallCount() != before {
				t.Errorf("state %d: %s called Cable", state, path)
			}
		}
	}
}

// TestStorageFaults pins that a storage that fails gives a 500 with the
// storage's own error, unwrapped, and that nothing is lost by it.
func TestStorageFaults(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.read("creds/ci")
	before, role := m.read("config"), m.read("roles/ci")

	m.storage.FailGet(true)
	if m.read("creds/ci") == nil { // from memory
		t.Error("no token while storage does not read")
	}
	m.b.InvalidateKey(t.Context(), "roles/ci")
	for _, path := range []string{"config", "roles/ci", "creds/ci"} {
		m.refused(500, opRead, path, nil, "get operations disabled")
		if path != "creds/ci" {
			m.refused(500, opDelete, path, nil)
		}
	}
	m.refused(500, opUpdate, "config", kv{"refresh_key": "other", "token_url": m.sim.URL})
	m.refused(500, opUpdate, "roles/ci", kv{"ttl": 600})
	m.storage.FailGet(false)

	m.storage.FailPut(true)
	m.refused(500, opUpdate, "config", kv{"refresh_key": "other", "token_url": m.sim.URL})
	m.refused(500, opUpdate, "roles/ci", kv{"ttl": 600})
	m.storage.FailPut(false)

	m.storage.FailDelete(true)
	m.refused(500, opDelete, "config", nil)
	m.refused(500, opDelete, "roles/ci", nil)
	m.storage.FailDelete(false)

	m.storage.FailList(true)
	m.refused(500, opList, "roles/", nil)
	m.storage.FailList(false)

	if diff := diffJSON(before, m.read("config")); diff != "" {
		t.Errorf("config changed: %s", diff)
	}
	if diff := diffJSON(role, m.read("roles/ci")); diff != "" {
		t.Errorf("the role changed: %s", diff)
	}
	// Whether config and the role were deleted is not known until they are written.
	m.refused(500, opRead, "creds/ci", nil, "the last write of config failed")
	m.write("config", kv{"disabled": false})
	m.refused(500, opRead, "creds/ci", nil, `the last write of role "ci" failed`)
	m.write("roles/ci", kv{"disabled": false})
	if m.read("creds/ci") == nil {
		t.Error("no token after the faults")
	}
}

// TestGarbageInStorage pins that what cannot be read is a 500 that says how to
// mend it, and can be deleted.
func TestGarbageInStorage(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	for _, garbage := range []string{"", "{", "[]", `"REFRESHKEYCANARY"`, `{"refresh_key":7}`, `{"scopes":7,"refresh_key":"REFRESHKEYCANARY","request_timeout":"x"}`} {
		for _, key := range []string{"config", "roles/ci"} {
			if err := m.storage.Put(t.Context(), &logical.StorageEntry{Key: key, Value: []byte(garbage)}); err != nil {
				t.Fatal(err)
			}
			m.b.InvalidateKey(t.Context(), key)
		}
		m.refused(500, opRead, "config", nil, "delete config and write it again")
		m.refused(500, opUpdate, "config", kv{"disabled": true}, "delete config")
		if garbage != `{"refresh_key":7}` {
			m.refused(500, opRead, "creds/ci", nil, "write it again")
		}
		m.ok(opDelete, "config", nil)
		m.ok(opDelete, "roles/ci", nil)
		m.write(
			"config",
			kv{
				"refresh_key":     m.sim.RefreshKey(),
				"token_url":       m.sim.URL,
				"organization_id": cabletest.DefaultOrganizationID,
			},
		)
		m.write("roles/ci", kv{"scopes": "transactions:read,person:read"})
		if m.read("creds/ci") == nil {
			t.Error("no token after writing again")
		}
	}
}

// diffJSON compares two values by their JSON.
func diffJSON(a, b any) string {
	x, _ := json.Marshal(a)
	y, _ := json.Marshal(b)
	if bytes.Equal(x, y) {
		return ""
	}
	return fmt.Sprintf("%s\n%s", x, y)
}

// TestNoLeaks pins that a mount leaves no goroutine behind, whatever happened
// to its mints. It does not run beside others, because it counts.
func TestNoLeaks(t *testing.T) {
	before := runtime.NumGoroutine()
	m := newConfiguredMount(t)
	m.write("config", kv{"request_timeout": 1})
	faults := []Fault{
		{},
		{Status: 500},
		{Reset: cabletest.ResetAfter},
		{Stall: time.Minute},
		{BodySize: 4 << 20},
		{Body: "<html>"},
	}
	var wg sync.WaitGroup
	for i := range 60 {
		fault := faults[i%len(faults)]
		fault.Times = 1
		m.sim.AddFault(fault)
		ctx, cancel := context.WithCancel(t.Context())
		if i%10 == 9 {
			cancel()
		}
		wg.Go(func() {
			defer cancel()
			_, _ = m.b.HandleRequest(ctx, &logical.Request{Operation: opRead, Path: "creds/ci", Storage: m.storage})
		})
		if i%20 == 19 {
			m.write("config", kv{"request_timeout": 1})
		}
	}
	wg.Wait()
	m.b.Cleanup(t.Context())
	m.sim.Close()
	deadline := time.Now().Add(10 * time.Second)
	for runtime.NumGoroutine() > before {
		if time.Now().After(deadline) {
			stacks := make([]byte, 1<<20)
			t.Fatalf(
				"%d goroutines, %d before:\n%s",
				runtime.NumGoroutine(),
				before,
				stacks[:runtime.Stack(stacks, true)],
			)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
