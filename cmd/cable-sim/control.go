// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// recent bounds the list of GET /calls, which has the latest calls and the latest tokens.
const recent = 100

// token is a minted token without the token.
type token struct {
	SHA256         string    `json:"sha256"` // hex, of the token's text
	OrganizationID string    `json:"organization_id"`
	Scopes         []string  `json:"scopes"`
	IssuedAt       time.Time `json:"issued_at"`
	Expiry         time.Time `json:"expiry"`
}

// controlHelp is the part of -help about the control listener.
const controlHelp = `
The control listener responds with 204 to a change, and with 400 to a wrong one:
  GET    /stats        counts: calls, minted, connections, by_status
  GET    /calls        the counts, recent_calls and recent_tokens (as SHA-256), oldest first
  POST   /fault        a fault as JSON; replaces all faults
  POST   /faults       the same, after the faults that are set
  DELETE /fault        no faults, but for -latency
  POST   /refresh-key  the new refresh key; empty: one is made up and written to -refresh-key-out
  POST   /reset        forget calls, tokens and counts

Faults, for example (internal/cabletest/fault.go lists all fields):
  {"status": 401}                                                    until cleared
  {"status": 429, "times": 1, "header": {"Retry-After": "30"}}       for one call
  {"delay": "3s"}  {"every": 20, "reset": "after"}  {"grant": {"scopes": ["everything:write"]}}
`

// control returns the control listener's handler; see controlHelp. newRefreshKey makes up a key and writes it to its
// file.
func control(sim *cabletest.Simulator, newRefreshKey func() (string, error)) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /stats", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, sim.Stats()) })
	mux.HandleFunc("GET /calls", func(w http.ResponseWriter, _ *http.Request) {
		tokens := []token{}
		for _, m := range last(sim.Minted()) {
			sum := sha256.Sum256([]byte(m.Token))
			tokens = append(tokens, token{hex.EncodeToString(sum[:]), m.OrganizationID, m.Scopes, m.IssuedAt, m.Expiry})
		}
		writeJSON(w, struct {
			cabletest.Stats
			Calls  []cabletest.Call `json:"recent_calls"`
			Tokens []token          `json:"recent_tokens"`
		}{sim.Stats(), last(sim.Calls()), tokens})
	})
	change := func(pattern string, f func(body []byte) error) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
			if err == nil {
				err = f(body)
			}
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			w.WriteHeader(http.StatusNoContent)
		})
	}
	fault := func(use func(cabletest.Fault)) func([]byte) error {
		return func(body []byte) error {
			var f cabletest.Fault
			if err := json.Unmarshal(body, &f); err != nil {
				return err
			}
			use(f)
			return nil
		}
	}
	change("POST /fault", fault(sim.SetFault))
	change("POST /faults", fault(sim.AddFault))
	change("DELETE /fault", func([]byte) error { sim.ClearFaults(); return nil })
	change("POST /reset", func([]byte) error { sim.Reset(); return nil })
	change("POST /refresh-key", func(body []byte) (err error) {
		key := strings.TrimSpace(string(body))
		if key == "" {
			if key, err = newRefreshKey(); err != nil {
				return err
			}
		}
		sim.SetRefreshKey(key)
		return nil
	})
	return mux
}

func last[T any](items []T) []T { return items[max(0, len(items)-recent):] }

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	_ = e.Encode(v) // the caller is gone
}
