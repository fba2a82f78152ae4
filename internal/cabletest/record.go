// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cabletest

import (
	"maps"
	"net"
	"net/http"
	"slices"
	"time"
)

// Call is one API call as the simulator saw it, and how it responded. It never contains the Authorization header, and a
// value that contains the refresh key or an access token is recorded as "[redacted]".
type Call struct {
	Time            time.Time `json:"time"` // of arrival, by Options.Now
	Method          string    `json:"method"`
	Path            string    `json:"path"`
	AuthorizationOK bool      `json:"authorization_ok"`
	ExpirySeconds   int64     `json:"expiry_seconds"` // as requested; 0 if it could not be read
	OrganizationID  string    `json:"organization_id"`
	Scopes          []string  `json:"scopes"`
	Status          int       `json:"status"` // of the response; 0 until it is sent, and for good if there is none
	UserAgent       string    `json:"user_agent"`
	RemoteAddr      string    `json:"remote_addr"`
	Minted          bool      `json:"minted"` // a token exists, delivered or not
}

// Minted is an access token that exists. Its times are whole seconds of Cable's clock, Fault.ClockSkew included.
type Minted struct {
	Token          string
	OrganizationID string   // as requested
	Scopes         []string // as requested
	IssuedAt       time.Time
	Expiry         time.Time // the true one, whatever Grant.Expiry says
}

// Stats counts since New or Reset.
type Stats struct {
	Calls       int         `json:"calls"`
	Minted      int         `json:"minted"`
	Connections int         `json:"connections"`
	ByStatus    map[int]int `json:"by_status"` // calls without a response are under 0
}

// record has the calls and tokens since New or Reset. A call writes to the record that it began in.
type record struct {
	calls    ring[*Call]
	minted   ring[Minted]
	byStatus map[int]int
}

// begin records that a call arrived. It returns the fault that applies to the call, and the function that records how
// it ended. It is called before the response is sent, so that a caller that has it finds the call recorded.
func (s *Simulator) begin(arrived Call) (f *Fault, finish func(Call, *Minted)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	seen := s.seen
	seen.calls.add(&arrived)
	f = &Fault{}
	if arrived.Path == s.path {
		f = s.nextFault()
	}
	return f, func(call Call, token *Minted) {
		s.mu.Lock()
		arrived = call
		seen.byStatus[call.Status]++
		if token != nil {
			seen.minted.add(*token)
		}
		s.mu.Unlock()
		if s.opts.Log != nil {
			s.opts.Log(call)
		}
	}
}

// Calls returns the latest calls to any path, at most Recorded, in the order of arrival. A call is there from its
// arrival on, before the response.
func (s *Simulator) Calls() []Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]Call, 0, len(s.seen.calls.items))
	for _, call := range s.seen.calls.list() {
		list = append(list, *call)
	}
	return list
}

// CallCount returns the number of calls that arrived, to any path, since New or Reset.
func (s *Simulator) CallCount() int { return s.Stats().Calls }

// Minted returns the latest tokens, at most Recorded, oldest first.
func (s *Simulator) Minted() []Minted {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen.minted.list()
}

// Connections returns the number of TCP connections that were opened since New or Reset.
func (s *Simulator) Connections() int { return int(s.connections.Load()) }

// Stats returns the counters.
func (s *Simulator) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Stats{s.seen.calls.n, s.seen.minted.n, s.Connections(), maps.Clone(s.seen.byStatus)}
}

// Reset deletes every call, token and count. The refresh key and the faults stay; connections that are open stay open
// and are not counted again.
func (s *Simulator) Reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen = &record{byStatus: map[int]int{}}
	s.connections.Store(0)
}

// ring keeps the latest Recorded items and counts all.
type ring[T any] struct {
	items []T
	n     int
}

func (r *ring[T]) add(item T) {
	if len(r.items) < Recorded {
		r.items = append(r.items, item)
	} else {
		r.items[r.n%Recorded] = item
	}
	r.n++
}

func (r *ring[T]) list() []T {
	if r.n <= Recorded {
		return slices.Clone(r.items)
	}
	start := r.n % Recorded
	return slices.Concat(r.items[start:], r.items[:start])
}

// ConnState counts connections. It is meant for http.Server.ConnState; without it Connections stays 0.
func (s *Simulator) ConnState(_ net.Conn, state http.ConnState) {
	if state == http.StateNew {
		s.connections.Add(1)
	}
}
