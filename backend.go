// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Package cablesecrets is a secrets engine for HashiCorp Vault that mints
// short-lived, scoped access tokens for Cable (cable.tech).
//
// An operator stores the long-lived refresh key under config. A role names an
// organization, a set of scopes and lifetimes. A read of creds/<role> requests
// an access token from Cable and returns it as a leased secret.
//
// Two facts shape everything. Cable cannot revoke: a token is valid until it
// expires, so each lifetime is decided before minting and no lease outlives its
// token. And a token request that fails half-way may leave a valid token that
// nobody received, so a call is retried only if Cable cannot have issued one.
package cablesecrets

import (
	"context"
	"fmt"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/version"
)

// operationPrefix begins the operation ids of the OpenAPI document.
const operationPrefix = "cable"

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
	b := &backend{requestToken: func(ctx context.Context, c *cable.Client, r cable.TokenRequest) (*cable.Token, error) {
		return c.RequestToken(ctx, r)
	}}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	b.maxLeaseTTL.read = func() time.Duration { return b.System().MaxLeaseTTL() }
	b.defaultLeaseTTL.read = func() time.Duration { return b.System().DefaultLeaseTTL() }
	m := newMetrics()
	b.cache = newCache(m.apiCallEnded, m.sharedTokenDropped)
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
		Clean:      b.clean,
	}
	b.telemetry = &telemetry{
		logger: b.Logger, metrics: m, tally: newTally(), longer: make(map[string]time.Time),
		events: newEventQueue(b.Backend, func(ctx context.Context) bool { return letsSubscribe(ctx, b.System()) }, m.eventEnded),
	}
	return b
}

// clean ends the mount on this node.
func (b *backend) clean(context.Context) {
	b.cancel()
	b.cache.invalidate(configStoragePath)
	b.telemetry.events.close()
}

// invalidate is called by Vault when another node changed a key of the mount's
// storage.
func (b *backend) invalidate(_ context.Context, key string) {
	b.cache.invalidate(key)
	if name, ok := roleOfKey(key); ok {
		b.telemetry.metrics.roleDropped(name) // it may have been deleted
	}
}

// HandleRequest parses the request's fields, and contains a panic: the other
// mounts of this process continue.
func (b *backend) HandleRequest(ctx context.Context, req *logical.Request) (resp *logical.Response, err error) {
	defer b.recoverPanic(req, &resp, &err)
	ctx = context.WithValue(ctx, receivedKey{}, time.Now())
	if len(req.Data) > 0 && req.Operation != logical.HelpOperation { // whose data is Vault's own
		data, err := parseRequest(b.Route(req.Path), req)
		if err != nil {
			return logical.ErrorResponse(err.Error()), nil
		}
		parsed := *req
		parsed.Data = data
		req = &parsed
	}
	return b.Backend.HandleRequest(ctx, req)
}

// HandleExistenceCheck ignores the request's fields: they are parsed once it is
// clear that the caller may write. An error here would reach the caller as a
// 500, and Vault's log with the value in it.
func (b *backend) HandleExistenceCheck(ctx context.Context, req *logical.Request) (checkFound, exists bool, err error) {
	defer b.recoverPanic(req, nil, &err)
	bare := *req
	bare.Data = nil
	return b.Backend.HandleExistenceCheck(ctx, &bare)
}

// recoverPanic turns a panic of a handler into a 500 for that one request. The
// value of the panic is not shown, because it may contain anything.
func (b *backend) recoverPanic(req *logical.Request, resp **logical.Response, err *error) {
	value := recover()
	if value == nil {
		return
	}
	stack := debug.Stack()
	if p, ok := value.(*panicked); ok {
		value, stack = p.value, p.stack
	}
	if resp != nil {
		*resp = nil
	}
	*err = b.panicked(req, value, stack)
}

// panicked reports a panic, and returns the error for its request.
func (b *backend) panicked(req *logical.Request, value any, stack []byte) error {
	b.telemetry.metrics.panics.Inc()
	b.telemetry.requestLog(req).Error("panic in a handler; the request failed and the engine continues",
		"operation", req.Operation, "path", req.Path,
		"panic_type", fmt.Sprintf("%T", value), "stack", string(stack))
	return logical.CodedError(http.StatusInternalServerError,
		fmt.Sprintf("internal error in the Cable secrets engine: search Vault's log for request_id %s", req.ID))
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
(cable.tech) from one long-lived refresh key that stays in Vault.

Write the refresh key to config, define an organization, scopes and lifetimes
in roles/<name>, and read creds/<name> for an access token.

Cable cannot revoke a token. Revoking its lease makes Vault forget it; the
token itself is valid until the expiry that came with it.
`
