// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Package cablesecrets is a secrets engine for HashiCorp Vault that mints short-lived, scoped access tokens for Cable
// (cable.tech).
//
// An operator stores the long-lived refresh key under config. A role names an organization, a set of scopes and
// lifetimes. A read of creds/<role> requests an access token from Cable and returns it as a leased secret.
//
// Two facts shape everything. Cable cannot revoke a token, so each lifetime is decided before minting, and no lease
// outlives its token. And a token request that fails half-way may leave a valid token that was not delivered, so a call
// is retried only if Cable cannot have issued one.
package cablesecrets

import (
	"context"
	"fmt"
	"net/http"
	"runtime/debug"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/fields"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/mount"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/report"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/share"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/state"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/version"
)

// operationPrefix begins the operation ids of the OpenAPI document.
const operationPrefix = "cable"

// backend is one mount. One process serves several mounts, so all state of a mount is in here.
type backend struct {
	*framework.Backend
	state  *state.Store
	shared *share.Roles
	report *report.Reporter

	maxLeaseTTL, defaultLeaseTTL *mount.LeaseSetting

	ctx    context.Context // ends with the mount
	cancel context.CancelFunc

	requestToken func(context.Context, *cable.Client, cable.TokenRequest) (*cable.Token, error) // replaced in tests
}

// Factory returns a mount of the engine. It touches neither storage, system view nor network, so it cannot fail for a
// passing reason.
func Factory(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
	b := newBackend()
	if conf.System != nil {
		c := *conf
		c.System = mount.View(conf.System)
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
	b.Backend = &framework.Backend{
		BackendType:    logical.TypeLogical,
		Help:           backendHelp,
		RunningVersion: version.String(),
		PathsSpecial:   &logical.Paths{SealWrapStorage: []string{state.ConfigKey}},
		Paths: []*framework.Path{
			b.pathConfig(),
			b.pathRolesList(),
			b.pathRoles(),
			b.pathCreds(),
			b.pathExplain(),
			b.pathStatus(),
			b.pathMetrics(),
		},
		Secrets:    []*framework.Secret{b.cableToken()},
		Invalidate: func(_ context.Context, key string) { b.invalidate(key) },
		Clean:      func(context.Context) { b.clean() },
	}
	b.maxLeaseTTL = mount.NewLeaseSetting(func() time.Duration { return b.System().MaxLeaseTTL() })
	b.defaultLeaseTTL = mount.NewLeaseSetting(func() time.Duration { return b.System().DefaultLeaseTTL() })
	b.report = report.New(b.Logger)
	b.shared = share.NewRoles(b.report.SharedTokenDropped)
	b.state = state.New(b.report.APICallEnded, b.shared.Retire)
	return b
}

// clean ends the mount on this node. It waits for no write and no call, because the SDK holds a lock of all the
// process's mounts meanwhile.
func (b *backend) clean() {
	b.cancel()
	b.state.Close()
}

// invalidate is called by Vault when another node has changed a key of the mount's storage.
func (b *backend) invalidate(key string) {
	b.state.Invalidate(key)
	if name, ok := state.RoleName(key); ok {
		b.report.RoleGone(name) // it may have been deleted
	}
}

// request is a parsed request, as handlers get it.
type request struct {
	*logical.Request
	role     string // the name in the path, if it has one
	in       fields.Input
	received time.Time
}

// source names the request in a report.
func (r *request) source() report.Source { return report.SourceOf(r.Request) }

// handler handles one operation of a path.
type handler func(context.Context, *request) (*logical.Response, error)

// receivedKey is the context key of the time of receipt.
type receivedKey struct{}

// handle lets the framework call a handler. It is the one place where an error becomes a response.
func (b *backend) handle(h handler) framework.OperationFunc {
	return func(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
		r := &request{Request: req, in: d.Raw}
		r.received, _ = ctx.Value(receivedKey{}).(time.Time)
		r.role, _ = d.Raw["name"].(string)
		resp, err := h(ctx, r)
		if err != nil {
			return outcome.Classify(err).Respond()
		}
		return resp, nil
	}
}

// HandleRequest parses the request's fields, and contains a panic, so that the other mounts of this process continue.
func (b *backend) HandleRequest(ctx context.Context, req *logical.Request) (resp *logical.Response, err error) {
	defer b.recoverPanic(req, &resp, &err)
	ctx = context.WithValue(ctx, receivedKey{}, time.Now())
	if len(req.Data) > 0 && req.Operation != logical.HelpOperation { // whose data is Vault's own
		data, err := fields.Parse(b.Route(req.Path), req)
		if err != nil {
			return logical.ErrorResponse(err.Error()), nil
		}
		parsed := *req
		parsed.Data = data
		req = &parsed
	}
	return b.Backend.HandleRequest(ctx, req)
}

// HandleExistenceCheck ignores the request's fields, which are parsed once it is clear that the caller may write. An
// error here would reach the caller as a 500, and Vault's log with the value in it.
func (b *backend) HandleExistenceCheck(ctx context.Context, req *logical.Request) (checkFound, exists bool, err error) {
	defer b.recoverPanic(req, nil, &err)
	bare := *req
	bare.Data = nil
	return b.Backend.HandleExistenceCheck(ctx, &bare)
}

// recoverPanic turns a panic in a handler into a 500 for that one request.
func (b *backend) recoverPanic(req *logical.Request, resp **logical.Response, err *error) {
	value := recover()
	if value == nil {
		return
	}
	if resp != nil {
		*resp = nil
	}
	*err = b.panicked(report.SourceOf(req), value)
}

// panicked reports a panic, and returns the error for its request.
func (b *backend) panicked(source report.Source, value any) error {
	stack := debug.Stack()
	if p, ok := value.(*mount.Panic); ok {
		value, stack = p.Value, p.Stack
	}
	b.report.Panicked(source, value, stack)
	return logical.CodedError(http.StatusInternalServerError,
		"internal error in the Cable secrets engine: search Vault's log for request_id "+source.ID)
}

// field describes a field of a request or a response.
func field(kind framework.FieldType, description string) *framework.FieldSchema {
	return &framework.FieldSchema{Type: kind, Description: description}
}

// always marks a field that a path, or each response, contains.
func always(f *framework.FieldSchema) *framework.FieldSchema {
	f.Required = true
	return f
}

// inQuery marks a parameter of an operation that has no body.
func inQuery(f *framework.FieldSchema) *framework.FieldSchema {
	f.Query = true
	return f
}

// reads declares an operation, with the description and the data of its response.
func (b *backend) reads(
	h handler, summary, description string, data map[string]*framework.FieldSchema,
) *framework.PathOperation {
	return &framework.PathOperation{
		Callback:  b.handle(h),
		Summary:   summary,
		Responses: map[int][]framework.Response{http.StatusOK: {{Description: description, Fields: data}}},
	}
}

// writes declares an operation that stores an entry.
func (b *backend) writes(h handler, summary string) *framework.PathOperation {
	return b.changes(h, summary, "Stored", "Stored, with warnings")
}

// deletes declares an operation that deletes an entry.
func (b *backend) deletes(h handler, summary string) *framework.PathOperation {
	return b.changes(h, summary, "There was none", "Deleted, with a warning")
}

// changes declares an operation that writes storage, and describes its responses without and with warnings. It belongs
// on the active node of the primary cluster.
func (b *backend) changes(h handler, summary, empty, warned string) *framework.PathOperation {
	p := b.reads(h, summary, warned, nil)
	p.Responses[http.StatusNoContent] = []framework.Response{{Description: empty}}
	p.ForwardPerformanceStandby, p.ForwardPerformanceSecondary = true, true
	return p
}

// tokensValidUntil says until when tokens minted so far, or by requests in flight, may be valid if each is valid for at
// most that long.
func tokensValidUntil(now time.Time, most time.Duration) string {
	return "tokens minted before now cannot be revoked, and the last may be valid until " +
		outcome.Time(now.Add(most+state.MaxRequestTimeout))
}

const backendHelp = `The Cable secrets engine mints short-lived access tokens for Cable
(cable.tech) from one long-lived refresh key that stays in Vault.

Write the refresh key to config, define an organization, scopes and lifetimes
in roles/<name>, and read creds/<name> for an access token. explain/<name> tells
what such a read would do.

Cable cannot revoke a token. Revoking its lease makes Vault forget it; the
token itself is valid until the expiry that came with it.`
