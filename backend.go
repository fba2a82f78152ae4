// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Package cablesecrets is a secrets engine for HashiCorp Vault that mints
// short-lived, scoped access tokens for Cable (cable.tech).
//
// An operator stores the long-lived refresh key under config. A role names an
// organization, a set of scopes and lifetimes. A read of creds/<role> asks
// Cable for a fresh access token and returns it as a leased secret.
//
// Two facts shape everything. Cable cannot revoke: a token lives until its
// expiry, so each lifetime is decided before minting and no lease outlives its
// token. And a mint that goes wrong half-way may leave a live token that nobody
// holds, so a request is repeated only where nothing can have been minted.
package cablesecrets

import (
	"context"
	"fmt"
	"net/http"
	"runtime/debug"
	"strings"
	"sync"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/version"
)

// maxCachedRoles bounds the memory that roles take: some MiB where a role names
// a handful of scopes.
const maxCachedRoles = 4096

// operationPrefix begins the operation ids of the OpenAPI document.
const operationPrefix = "cable"

// backend is one mount. Several live in one process, so nothing of a mount is
// kept outside of it.
type backend struct {
	*framework.Backend

	// configMu and rolesMu make read, merge and store of an entry one step, so
	// that concurrent partial updates lose no field. They are held over calls
	// to Vault's storage, never over one to Cable.
	configMu sync.Mutex
	rolesMu  sync.Mutex

	// mu guards the fields below. It is never held over a call to Vault or to
	// Cable.
	mu sync.Mutex

	// current is the configuration in use, or nil until it is needed.
	current *activeConfig

	// roles are those that were minted for, up to maxCachedRoles. Entries are
	// never changed, only replaced.
	roles map[string]*roleEntry

	// generation counts the changes of what is stored. What was read before a
	// change finds another number after it, and is not kept.
	generation uint64

	// hold is the pause of the last client, with what it applies to: a
	// rebuild for the same key and URL does not forget it.
	hold    *cable.Pause
	holdFor holdKey

	// What the mount tells of itself; see record.go.
	metrics *metrics
	recent  *recent
	events  *eventQueue
}

// activeConfig is a stored configuration with the client made from it. It is
// never changed, only replaced.
type activeConfig struct {
	*configEntry
	client *cable.Client
}

// holdKey is what a pause that Cable asked for applies to.
type holdKey struct {
	url string
	key cable.Secret
}

// Factory returns a mount of the engine. It touches neither storage nor
// network, so it cannot fail for a passing reason.
func Factory(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
	b := newBackend()
	if conf.System != nil {
		c := *conf
		c.System = &systemView{SystemView: conf.System}
		conf = &c
	}
	if err := b.Setup(ctx, conf); err != nil {
		return nil, fmt.Errorf("setting up the backend: %w", err)
	}
	return b, nil
}

// newBackend returns a backend that is yet to be set up.
func newBackend() *backend {
	b := &backend{roles: make(map[string]*roleEntry), metrics: newMetrics(), recent: newRecent()}
	b.events = newEventQueue(b, b.eventsAreHeard, b.metrics.eventEnded)
	b.Backend = &framework.Backend{
		BackendType:    logical.TypeLogical,
		Help:           strings.TrimSpace(backendHelp),
		RunningVersion: version.String(),
		PathsSpecial: &logical.Paths{
			SealWrapStorage: []string{configStoragePath},
		},
		Paths: []*framework.Path{
			b.pathConfig(),
			b.pathRolesList(),
			b.pathRoles(),
			b.pathCreds(),
			b.pathStatus(),
			b.pathMetrics(),
		},
		Secrets:    []*framework.Secret{b.cableToken()},
		Invalidate: b.invalidate,
		Clean: func(context.Context) {
			b.reset()
			b.events.close()
		},
	}
	return b
}

// HandleRequest checks the request's fields, and keeps a panic from taking the
// other mounts of this process with it.
func (b *backend) HandleRequest(ctx context.Context, req *logical.Request) (resp *logical.Response, err error) {
	defer b.recoverPanic(req, &resp, &err)
	if len(req.Data) > 0 {
		data, err := b.checkRequest(req)
		if err != nil {
			return logical.ErrorResponse(err.Error()), nil
		}
		checked := *req
		checked.Data = data
		req = &checked
	}
	return b.Backend.HandleRequest(ctx, req)
}

// HandleExistenceCheck answers without looking at the request's fields: they
// are checked once it is clear that the caller may write. An error here would
// reach the caller as a 500, and Vault's log with the value in it.
func (b *backend) HandleExistenceCheck(ctx context.Context, req *logical.Request) (checkFound, exists bool, err error) {
	defer b.recoverPanic(req, nil, &err)
	bare := *req
	bare.Data = nil
	return b.Backend.HandleExistenceCheck(ctx, &bare)
}

// log is for what is said of a request.
//
// NOTE: one process serves all mounts of the engine, and Vault's log has what
// it says under the name of the first of them.
func (b *backend) log(req *logical.Request) hclog.Logger {
	return b.Logger().With("mount", req.MountPoint, "request_id", req.ID)
}

// recoverPanic turns a panic of a handler into a 500 for that one request. The
// value of the panic is not shown, because it may hold anything.
func (b *backend) recoverPanic(req *logical.Request, resp **logical.Response, err *error) {
	value := recover()
	if value == nil {
		return
	}
	b.metrics.panics.Inc()
	b.log(req).Error("a handler panicked; the request failed and the engine goes on",
		"operation", req.Operation, "path", req.Path,
		"panic_type", fmt.Sprintf("%T", value), "stack", string(debug.Stack()))
	if resp != nil {
		*resp = nil
	}
	*err = logical.CodedError(http.StatusInternalServerError,
		fmt.Sprintf("the engine failed on this request by a defect of its own: see the log of Vault for request %s", req.ID))
}

// getClient returns the configuration in use, building it on first use and
// after a change; nil where none is stored.
func (b *backend) getClient(ctx context.Context, s logical.Storage) (*activeConfig, error) {
	b.mu.Lock()
	current, generation := b.current, b.generation
	b.mu.Unlock()
	if current != nil {
		return current, nil
	}
	cfg, err := getConfig(ctx, s)
	if cfg == nil || err != nil {
		return nil, err
	}
	built, err := b.activate(cfg, b.metrics.called)
	if err != nil {
		return nil, fmt.Errorf("using the stored configuration: %w", err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.generation != generation {
		built.client.Close() // for this one request: the configuration was changed meanwhile
		return built, nil
	}
	if b.current != nil {
		built.client.Close() // another request built it meanwhile
		return b.current, nil
	}
	b.setCurrentLocked(built)
	return built, nil
}

// activate makes a client for cfg, without using it yet. A pause that applies
// to the same key and URL goes on. observe is told of each call to Cable.
func (b *backend) activate(cfg *configEntry, observe func(cable.Call)) (*activeConfig, error) {
	clientConfig := cfg.clientConfig()
	clientConfig.Observe = observe
	b.mu.Lock()
	if b.hold != nil && b.holdFor.url == cfg.TokenURL && b.holdFor.key.Reveal() == cfg.RefreshKey.Reveal() {
		clientConfig.Pause = b.hold
	}
	b.mu.Unlock()
	client, err := cable.New(clientConfig)
	if err != nil {
		return nil, err
	}
	return &activeConfig{configEntry: cfg, client: client}, nil
}

// setCurrentLocked puts a configuration into use. The caller holds mu.
func (b *backend) setCurrentLocked(next *activeConfig) {
	b.dropLocked()
	b.current = next
	b.hold = next.client.Pause()
	b.holdFor = holdKey{url: next.TokenURL, key: next.RefreshKey}
}

// dropLocked lets go of the configuration in use. The caller holds mu.
func (b *backend) dropLocked() {
	if b.current != nil {
		b.current.client.Close()
	}
	b.current = nil
}

// cachedRole is getRole with a memory: a read from storage is a call to Vault.
func (b *backend) cachedRole(ctx context.Context, s logical.Storage, name string) (*roleEntry, error) {
	b.mu.Lock()
	role, generation := b.roles[name], b.generation
	b.mu.Unlock()
	if role != nil {
		return role, nil
	}
	role, err := getRole(ctx, s, name)
	if role == nil || err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.generation == generation {
		if len(b.roles) >= maxCachedRoles {
			clear(b.roles)
		}
		b.roles[name] = role
	}
	return role, nil
}

// forgetRole drops a role that was changed, or may have been.
func (b *backend) forgetRole(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.generation++
	delete(b.roles, name)
}

// replace puts a configuration into use that has just been stored.
func (b *backend) replace(next *activeConfig) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.generation++
	b.setCurrentLocked(next)
}

// reset drops what was built from the stored configuration; the next request
// reads it anew.
func (b *backend) reset() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.generation++
	b.dropLocked()
}

// invalidate is told by Vault that a key of the mount's storage was changed by
// another node.
func (b *backend) invalidate(_ context.Context, key string) {
	if key == configStoragePath {
		b.reset()
	}
	if name, ok := strings.CutPrefix(key, rolesStoragePrefix); ok {
		b.forgetRole(name)
	}
}

// forwarded declares an operation that writes storage: it belongs on the
// active node of the primary cluster.
func forwarded(p *framework.PathOperation) *framework.PathOperation {
	p.ForwardPerformanceStandby = true
	p.ForwardPerformanceSecondary = true
	return p
}

const backendHelp = `
The Cable secrets engine mints short-lived access tokens for Cable
(cable.tech) from one long-lived refresh key that only Vault holds.

Write the refresh key to config, describe an organization, scopes and
lifetimes in roles/<name>, and read creds/<name> for a fresh token.

A token cannot be revoked at Cable. Revoking its lease makes Vault forget it;
the token itself lives until the expiry that came with it.
`
