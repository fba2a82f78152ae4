// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
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

// testMount is a mount of the engine over Vault's in-memory storage, with a simulated Cable. Requests reach it as Vault
// sends them.
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

// testView is Vault's system view. Its lease settings may change during requests.
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

// setUp returns an unconfigured mount.
func setUp(t testing.TB, sim *cabletest.Server) *testMount {
	t.Helper()
	m := &testMount{
		TB:      t,
		storage: new(logical.InmemStorage),
		sys:     &logical.StaticSystemView{DefaultLeaseTTLVal: 768 * time.Hour, MaxLeaseTTLVal: 768 * time.Hour},
		sim:     sim,
		log:     new(syncBuffer),
	}
	m.logger = hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, Output: m.log, JSONFormat: true})
	lb, err := Factory(t.Context(), &logical.BackendConfig{
		Logger:      m.logger,
		System:      testView{m.sys, m},
		StorageView: m.storage,
		BackendUUID: "test",
	})
	must(t, err)
	m.b = lb.(*backend)
	return m
}

// newMount returns an unconfigured mount. When the test ends, its log at trace level, its status and its metrics must
// contain neither the refresh key nor a token.
func newMount(t testing.TB) *testMount {
	t.Helper()
	m := setUp(t, cabletest.NewServer(t, &cabletest.Options{Organizations: map[string]string{
		cabletest.DefaultOrganizationID: cabletest.DefaultOrganizationName, "org_a": "A", "org_b": "B",
	}}))
	t.Cleanup(func() {
		for _, path := range []string{"status", "metrics"} {
			resp, err := m.send(context.Background(), m.storage, opRead, path, nil)
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
	m.configure()
	return m
}

// configure writes config, and the role "ci" of two scopes.
func (m *testMount) configure() {
	m.Helper()
	m.writeConfig()
	m.write("roles/ci", kv{"scopes": "transactions:read,person:read"})
}

// writeConfig writes config for the simulator, with an organization.
func (m *testMount) writeConfig() {
	m.Helper()
	m.write("config", kv{
		"refresh_key":     m.sim.RefreshKey(),
		"token_url":       m.sim.URL,
		"organization_id": cabletest.DefaultOrganizationID,
	})
}

// noSecrets fails the test if text contains a refresh key or an access token.
func (m *testMount) noSecrets(where, text string) {
	m.Helper()
	for _, marker := range []string{cabletest.RefreshKeyMarker, cabletest.TokenMarker} {
		if strings.Contains(text, marker) {
			m.Errorf("%s contains %s", where, marker)
		}
	}
}

// newRequest returns a request as it comes out of Vault's plugin protocol.
func (m *testMount) newRequest(s logical.Storage, op logical.Operation, path string, data kv) *logical.Request {
	m.Helper()
	return &logical.Request{
		ID:         "req-1",
		Operation:  op,
		Path:       path,
		Storage:    s,
		Data:       overJSON(m, data),
		MountPoint: "cable/",
	}
}

// send sends a request with a context and a storage of its own.
func (m *testMount) send(
	ctx context.Context, s logical.Storage, op logical.Operation, path string, data kv,
) (*logical.Response, error) {
	m.Helper()
	return m.b.HandleRequest(ctx, m.newRequest(s, op, path, data))
}

// on sends a request with a storage of its own, and returns the status and the error of the response.
func (m *testMount) on(s logical.Storage, op logical.Operation, path string, data kv) (int, error) {
	m.Helper()
	return statusOf(m.send(m.Context(), s, op, path, data))
}

// start is on without waiting for the response. Its error is sent to the channel.
func (m *testMount) start(s logical.Storage, op logical.Operation, path string, data kv) <-chan error {
	return m.startWith(m.Context(), s, op, path, data)
}

// startWith is start with a context.
func (m *testMount) startWith(
	ctx context.Context, s logical.Storage, op logical.Operation, path string, data kv,
) <-chan error {
	done := make(chan error, 1)
	go func() {
		_, err := statusOf(m.send(ctx, s, op, path, data))
		done <- err
	}()
	return done
}

// request sends a request, and checks that the response has the declared schema, and that it contains no refresh key,
// and a token in its place only.
func (m *testMount) request(op logical.Operation, path string, data kv) (*logical.Response, error) {
	m.Helper()
	req := m.newRequest(m.storage, op, path, data)
	if op == opUpdate {
		if found, exists, err := m.b.HandleExistenceCheck(m.Context(), req); err != nil {
			return nil, err
		} else if found && !exists {
			req.Operation = opCreate
		}
	}
	resp, err := m.b.HandleRequest(m.Context(), req)
	if err = pb.ProtoErrToErr(pb.ErrToProtoErr(err)); err != nil {
		m.noSecrets("an error", err.Error())
	}
	if resp == nil {
		return nil, err
	}
	shown := *resp
	if strings.HasPrefix(path, "creds/") && !resp.IsError() {
		shown.Data = maps.Clone(resp.Data)
		delete(shown.Data, "token")
	}
	m.noSecrets("a response", fmt.Sprintf("%+v %+v", shown, shown.Secret))
	if err == nil && !resp.IsError() && len(resp.Data) > 0 && op != opRevoke {
		t := tester(m.TB)
		schema.ValidateResponse(t, schema.GetResponseSchema(t, m.b.Route(path), req.Operation), resp, true)
	}
	return resp, err
}

// tester gives the SDK's helpers the type that they need.
func tester(tb testing.TB) *testing.T {
	if t, ok := tb.(*testing.T); ok {
		return t
	}
	return new(testing.T)
}

// overJSON returns data as it comes out of the plugin protocol.
func overJSON(t testing.TB, data kv) kv {
	t.Helper()
	if data == nil {
		return nil
	}
	raw, err := json.Marshal(data)
	var out kv
	if err == nil {
		err = json.Unmarshal(raw, &out)
	}
	must(t, err)
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

// writeKey writes the refresh key together with its destination.
func (m *testMount) writeKey(key string) []string {
	m.Helper()
	return m.write("config", kv{"refresh_key": key, "token_url": m.sim.URL})
}

// put stores bytes as another node does, without an invalidation.
func (m *testMount) put(key string, raw []byte, err error) {
	m.Helper()
	if err == nil {
		err = m.storage.Put(context.Background(), &logical.StorageEntry{Key: key, Value: raw})
	}
	if err != nil {
		m.Error(err)
	}
}

// putRole stores a role as another node does.
func (m *testMount) putRole(name string, role *state.Role) {
	m.Helper()
	raw, err := role.Encode()
	m.put(state.RoleKey(name), raw, err)
}

// putConfig stores the configuration as another node does.
func (m *testMount) putConfig(config *state.Config) {
	m.Helper()
	raw, err := config.Encode()
	m.put(state.ConfigKey, raw, err)
}

// stored returns the bytes of an entry.
func (m *testMount) stored(key string) string {
	m.Helper()
	raw, err := state.Read(m.Context(), m.storage, key)
	must(m, err)
	return string(raw)
}

// must fails the test if there is an error.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
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

// refused sends a request that must fail with a status and with each of the texts, and returns the response.
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
			m.Errorf("%s %s: %q does not contain %q", op, path, failure, text)
		}
	}
	return resp
}

// refusal is a request's data, and a text that its refusal contains.
type refusal struct {
	data kv
	says string
}

// refusedAll sends requests with each of the operations that must all fail with 400.
func (m *testMount) refusedAll(path string, ops []logical.Operation, refusals []refusal) {
	m.Helper()
	for _, r := range refusals {
		for _, op := range ops {
			m.refused(400, op, path, r.data, r.says)
		}
	}
}

// statusOf returns the HTTP status that Vault responds with, and the error if there is one.
func statusOf(resp *logical.Response, err error) (int, error) {
	status, failure := logical.RespondErrorCommon(&logical.Request{Operation: opUpdate}, resp, err)
	if failure != nil {
		logical.AdjustErrorStatusCode(&status, failure)
	}
	return status, failure
}

// wantWarning reports an error unless one of the warnings contains each of the parts.
func (m *testMount) wantWarning(warnings []string, parts ...string) {
	m.Helper()
	for _, w := range warnings {
		if !slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(w, p) }) {
			return
		}
	}
	m.Errorf("no warning contains %q: %q", parts, warnings)
}

// wantUndelivered checks how many tokens were counted as undelivered.
func (m *testMount) wantUndelivered(want float64) {
	m.Helper()
	if n := m.figures()["vault_cable_undelivered_tokens_total"]; n != want {
		m.Errorf("%v undelivered tokens, want %v", n, want)
	}
}

// waitUntil polls until done returns true.
func (m *testMount) waitUntil(done func() bool) {
	m.Helper()
	for end := time.Now().Add(10 * time.Second); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			m.Fatal("waited in vain")
		}
	}
}

// calls waits until Cable was called n times.
func (m *testMount) calls(n int) {
	m.Helper()
	m.waitUntil(func() bool { return m.sim.CallCount() >= n })
}

// TestFactory checks the type and the version of a mount, and that its factory needs nothing.
func TestFactory(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	if got := m.b.Type(); got != logical.TypeLogical {
		t.Errorf("type %v", got)
	}
	if got := m.b.PluginVersion().Version; got != version.String() || !strings.HasPrefix(got, "v") {
		t.Errorf("version %q", got)
	}
	// The factory uses neither storage nor network nor Vault.
	lb, err := Factory(t.Context(), &logical.BackendConfig{Logger: hclog.NewNullLogger()})
	must(t, err)
	if err := lb.Initialize(t.Context(), &logical.InitializationRequest{}); err != nil {
		t.Error(err)
	}
}

// TestSealWrap checks that the one stored key that contains a secret is seal-wrapped.
func TestSealWrap(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	keys, err := logical.CollectKeys(t.Context(), m.storage)
	must(m, err)
	secret := slices.DeleteFunc(keys, func(key string) bool {
		return !strings.Contains(m.stored(key), cabletest.RefreshKeyMarker)
	})
	if wrapped := m.b.SpecialPaths().SealWrapStorage; len(secret) != 1 || !slices.Equal(secret, wrapped) {
		t.Errorf("%q contain the refresh key, and %q are seal-wrapped", secret, wrapped)
	}
}

// TestForwarding checks which node serves a request. Writes of storage belong on the active node of the primary, token
// requests on the active node of each cluster, and so do the reports of them.
func TestForwarding(t *testing.T) {
	t.Parallel()
	for _, path := range newBackend().Paths {
		for op, handler := range path.Operations {
			props := handler.Properties()
			writes := op != opRead && op != opList
			mints := strings.HasPrefix(path.Pattern, "creds/") || strings.HasPrefix(path.Pattern, "explain/")
			reports := path.Pattern == "status" || path.Pattern == "metrics"
			if props.ForwardPerformanceStandby != (writes || mints || reports) {
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

// TestUnknownFieldsAreRefused checks that each operation refuses an unknown field with the known ones.
func TestUnknownFieldsAreRefused(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	const (
		configFields = "auth_scheme, ca_cert, disabled, organization_id, refresh_key, request_timeout, token_url, " +
			"verify_role"
		roleFields = "disabled, lease, max_ttl, organization_id, organization_ids, reuse_for, scopes, ttl"
		parameters = "organization_id, scopes, ttl"
		none       = "accepts no parameters"
	)
	for _, tt := range []struct {
		op          logical.Operation
		path, known string
	}{
		{opUpdate, "config", configFields},
		{opPatch, "config", configFields},
		{opRead, "config", none},
		{opDelete, "config", none},
		{opUpdate, "roles/ci", roleFields},
		{opUpdate, "roles/new", roleFields},
		{opPatch, "roles/ci", roleFields},
		{opRead, "roles/ci", none},
		{opDelete, "roles/ci", none},
		{opList, "roles/", "after, limit"},
		{opRead, "creds/ci", parameters},
		{opUpdate, "creds/ci", parameters},
		{opRead, "explain/ci", parameters},
		{opUpdate, "explain/ci", parameters},
	} {
		m.refused(400, tt.op, tt.path, kv{"bogus": "x"}, `unknown field "bogus"`, tt.known)
		m.refused(400, tt.op, tt.path, kv{m.sim.RefreshKey(): "x"}, "unknown field (not shown: length 43)")
	}
	m.refused(400, opUpdate, "roles/ci", kv{"name": "other"}, `unknown field "name"`)
	if m.sim.CallCount() != 0 || m.read("roles/new") != nil {
		t.Error("Cable was called, or a refused write created a role")
	}
}

// TestTypesOfFields checks that each field refuses a blank and a value of another type, on every path.
func TestTypesOfFields(t *testing.T) {
	t.Parallel()
	m := newConfiguredMount(t)
	m.write("roles/ci", kv{
		"ttl": 600, "max_ttl": 1200, "reuse_for": 300, "organization_id": "org", "organization_ids": "org_2",
	})
	const (
		text, boolean, duration = "a string", "true or false", "a duration in whole seconds"
		list                    = "a comma-separated list or an array of strings"
	)
	for path, types := range map[string]map[string]string{
		"config": {
			"refresh_key": text, "token_url": text, "auth_scheme": text, "organization_id": text, "verify_role": text,
			"request_timeout": duration, "disabled": boolean,
		},
		"roles/ci": {
			"organization_id": text, "organization_ids": list, "scopes": list, "ttl": duration, "max_ttl": duration,
			"reuse_for": duration, "lease": boolean, "disabled": boolean,
		},
		"creds/ci":   {"organization_id": text, "scopes": list, "ttl": duration},
		"explain/ci": {"organization_id": text, "scopes": list, "ttl": duration},
	} {
		for field, kind := range types {
			refusals := []refusal{
				{kv{field: nil}, field + " must not be null"},
				{kv{field: ""}, field + " must not be empty"},
				{kv{field: kv{m.sim.RefreshKey(): "x"}}, field + " must be " + kind + ", not an object"},
			}
			for other, value := range map[string]any{"number": 7, "boolean": true, "list": []any{"x"}} {
				if kind == duration && other == "number" || kind == boolean && other == "boolean" ||
					kind == list && other == "list" {
					continue
				}
				refusals = append(refusals, refusal{kv{field: value}, field + " must be " + kind + ", not a " + other})
			}
			m.refusedAll(path, []logical.Operation{opUpdate}, refusals)
		}
	}
}

// TestPanic checks that a panic costs one request. Its response is a 500, the log has the stack without the value, and
// another mount continues.
func TestPanic(t *testing.T) {
	t.Parallel()
	m, other := newConfiguredMount(t), newConfiguredMount(t)
	secret := m.sim.RefreshKey()
	read := m.b.Route("creds/ci").Operations[opRead].(*framework.PathOperation)
	read.Callback = func(context.Context, *logical.Request, *framework.FieldData) (*logical.Response, error) {
		panic(errors.New("value with " + secret))
	}
	exists := &m.b.Route("roles/ci").ExistenceCheck
	*exists = func(context.Context, *logical.Request, *framework.FieldData) (bool, error) { panic(secret) }

	m.refused(500, opRead, "creds/ci", nil, "req-1")
	m.refused(500, opUpdate, "roles/ci", kv{"ttl": 600}, "req-1")
	if log := m.log.String(); !strings.Contains(log, "TestPanic") || !strings.Contains(log, "*errors.errorString") {
		t.Errorf("the log contains no stack: %s", log)
	}
	m.read("config")
	other.read("creds/ci")
	if n := other.figures()["vault_cable_panics_total"]; n != 0 {
		t.Errorf("the other mount counts %v panics", n)
	}
}

// TestStandby checks that a performance standby and a secondary forward the requests of the active node or the primary
// before Cable is called.
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

// TestNoLeaks checks that a mount leaves no goroutine behind, however its token requests ended. It does not run
// alongside other tests, because it counts goroutines.
func TestNoLeaks(t *testing.T) {
	before := runtime.NumGoroutine()
	m := newConfiguredMount(t)
	m.write("config", kv{"request_timeout": 1})
	faults := []Fault{
		{}, {Status: 500}, {Reset: cabletest.ResetAfter}, {Stall: time.Minute}, {BodySize: 4 << 20}, {Body: "<html>"},
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
			_, _ = m.send(ctx, m.storage, opRead, "creds/ci", nil)
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
			stacks = stacks[:runtime.Stack(stacks, true)]
			t.Fatalf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, stacks)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
