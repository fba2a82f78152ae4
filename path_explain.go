// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"errors"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
)

func (b *backend) pathExplain() *framework.Path {
	explains := func(summary, suffix string) *framework.PathOperation {
		p := b.reads(b.pathExplainRead, summary, "What a token request would do", explainResponseFields())
		p.DisplayAttrs = &framework.DisplayAttributes{
			OperationPrefix: operationPrefix, OperationVerb: "explain", OperationSuffix: suffix,
		}
		p.ForwardPerformanceStandby = true // to the node that has the pause and the shared tokens
		return p
	}
	return &framework.Path{
		Pattern: "explain/" + framework.GenericNameRegex("name"),
		Fields:  credsParameters(),
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: explains("Tell what a token request would do, without making one.", "credentials"),
			logical.UpdateOperation: explains("Tell what a token request would do, with the parameters in a body.",
				"credentials-with-parameters"),
		},
		HelpSynopsis:    "Tell what a token request for a role would do now.",
		HelpDescription: explainHelp,
	}
}

// explainResponseFields describes what a token request would do.
func explainResponseFields() map[string]*framework.FieldSchema {
	text := func(description string) *framework.FieldSchema { return field(framework.TypeString, description) }
	return map[string]*framework.FieldSchema{
		"allowed":         always(field(framework.TypeBool, "Whether a token would be returned if Cable grants it.")),
		"reason":          text("If not allowed: the error that the request would get."),
		"outcome":         text("If not allowed: the outcome of the request."),
		"organization_id": text("The organization that would be requested."),
		"scopes":          field(framework.TypeCommaStringSlice, "The scopes that would be requested."),
		"ttl":             field(framework.TypeInt64, "The lifetime that would be requested, in seconds."),
		"max_ttl":         field(framework.TypeInt64, "The longest lifetime that could be requested, in seconds."),
		"max_ttl_from":    text("The setting that max_ttl comes from."),
		"reuse": always(field(framework.TypeBool,
			"Whether the request would get the role's shared token, without an API call.")),
	}
}

// pathExplainRead handles GET and POST explain/<name>. It takes the steps of a token request up to the API call, and
// changes nothing. A refusal is a response, with the fields that were decided before it. A failure of storage is an
// error.
func (b *backend) pathExplainRead(ctx context.Context, r *request) (*logical.Response, error) {
	if err := r.in.RefuseBlanks(); err != nil {
		return nil, err // malformed, as in creds
	}
	a := attempt{role: r.role}
	err := b.explain(ctx, r, &a)
	if _, isRefusal := errors.AsType[outcome.Refusal](err); err != nil && !isRefusal {
		return nil, err
	}
	resp := &logical.Response{Data: map[string]any{"allowed": true, "reuse": false}, Warnings: a.warnings}
	if err == nil {
		resp.Data["reuse"], err = b.wouldReuse(&a, resp)
	}
	if f := outcome.Classify(err); f != nil {
		resp.Data["allowed"], resp.Data["reason"], resp.Data["outcome"] = false, f.Message, string(f.Outcome)
	}
	if id := a.requested.OrganizationID; id != "" {
		resp.Data["organization_id"] = id
	}
	if a.requested.Scopes != nil {
		resp.Data["scopes"] = a.requested.Scopes
	}
	if a.requested.Lifetime > 0 {
		resp.Data["ttl"] = int64(a.requested.Lifetime / time.Second)
	}
	if a.bounds.MountMax > 0 {
		ceiling, from := a.bounds.Ceiling()
		resp.Data["max_ttl"], resp.Data["max_ttl_from"] = int64(ceiling/time.Second), from
	}
	return resp, nil
}

// explain takes the steps of a token request that decide the request to Cable.
func (b *backend) explain(ctx context.Context, r *request, a *attempt) (err error) {
	if a.params, err = parseParams(r); err != nil {
		return err
	}
	if a.set, err = b.state.Settings(ctx, r.Storage, r.role, r.received); err != nil {
		return err
	}
	if err = checkSettings(r.role, a.set); err != nil {
		return err
	}
	return b.narrow(ctx, r, a)
}

// wouldReuse reports whether the request would get the shared token, whose warnings it adds. The error is the one that
// the request would get without an API call.
func (b *backend) wouldReuse(a *attempt, resp *logical.Response) (bool, error) {
	ready := a.set.Config.Client.Ready()
	if !a.mayShare() {
		return false, ready
	}
	isShared, warnings, err := b.shared.Peek(a.role, a.set, a.requested.Lifetime, outcome.Classify(ready))
	resp.Warnings = append(resp.Warnings, warnings...)
	return isShared, err
}

const explainHelp = `Takes the parameters of creds/<name>, and tells what a read of it would do now:
the organization, scopes and lifetime that would be requested, or the reason why
it would be refused. Use it to try a role, a policy or a pipeline, because a token
cannot be revoked.

No token is minted, and nothing is counted. Whether Cable would grant the request
is not known. The policy for creds/<name> is not judged.`
