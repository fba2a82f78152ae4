// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Package http gets the endpoint sys/events/subscribe from this file, in a
// server that is built for the end-to-end tests and never shipped.
//
// Vault Community has the bus that plugins send events to, and the command
// `vault events subscribe`; what lies between is in Enterprise only since 1.16.
// `scripts/vault --events` builds the pinned Vault with this file in place of
// http/events_stubs_oss.go, and lets it say that it is VERSION+ent.events: by
// "ent" a plugin knows a server whose events can be heard. The underscore of
// this file's name keeps it out of every other build.
package http

import (
	"errors"
	"net/http"
	"slices"
	"strings"

	"github.com/coder/websocket"
	"github.com/hashicorp/eventlogger"
	"github.com/hashicorp/eventlogger/formatter_filters/cloudevents"
	"github.com/hashicorp/vault/helper/namespace"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/vault"
	"github.com/ryanuber/go-glob"
)

// entHandleEventsSubscribe sends each event that matches the end of the path,
// and the filter of the query, as one message of JSON. As Vault documents it, a
// token needs "read" on the path of the request, and for each event "list" and
// "subscribe" on the path that the event names; other events are left out.
//
// NOTE: the protobuf form, `namespaces` (Community has none) and standby nodes
// are not served.
func entHandleEventsSubscribe(core *vault.Core, req *logical.Request) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, _, err := core.CheckTokenWithLock(r.Context(), req); err != nil {
			respondError(w, http.StatusForbidden, err)
			return
		}
		_, pattern, _ := strings.Cut(r.URL.Path, "/sys/events/subscribe/")
		if pattern == "" || r.URL.Query().Get("json") != "true" {
			respondError(w, http.StatusBadRequest, errors.New("want sys/events/subscribe/TYPE?json=true"))
			return
		}
		events, cancel, err := core.Events().Subscribe(r.Context(), namespace.RootNamespace, pattern, r.URL.Query().Get("filter"))
		if err != nil {
			respondError(w, http.StatusBadRequest, err)
			return
		}
		defer cancel()
		conn, err := websocket.Accept(w, r, nil)
		if err != nil {
			return // it has answered
		}
		defer conn.CloseNow()
		for ctx := conn.CloseRead(r.Context()); ; {
			select {
			case <-ctx.Done():
				return
			case event := <-events:
				allowed, err := mayReceive(core, r, req.ClientToken, event)
				if err != nil { // such as a token that was revoked
					conn.Close(websocket.StatusPolicyViolation, "permission denied")
					return
				}
				text, ok := event.Format(string(cloudevents.FormatJSON))
				if allowed && ok && conn.Write(ctx, websocket.MessageText, text) != nil {
					return
				}
			}
		}
	})
}

// mayReceive reports whether the token's policies let it have the event.
func mayReceive(core *vault.Core, r *http.Request, token string, event *eventlogger.Event) (bool, error) {
	received := event.Payload.(*logical.EventReceived)
	path := received.GetEvent().GetMetadata().GetFields()[logical.EventMetadataPath].GetStringValue()
	if path == "" {
		path = "/" // an event without a path is for root alone
	}
	capabilities, types, err := core.CapabilitiesAndSubscribeEventTypes(r.Context(), token, path)
	listed := slices.Contains(capabilities, vault.ListCapability) && slices.Contains(capabilities, vault.SubscribeCapability)
	typed := slices.ContainsFunc(types, func(t string) bool { return glob.Glob(t, received.EventType) })
	return slices.Contains(capabilities, vault.RootCapability) || listed && typed, err
}
