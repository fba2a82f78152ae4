// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cabletest

import (
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"testing"
)

// Server is a Simulator that listens on loopback for the duration of a test.
type Server struct {
	*Simulator
	URL string // the whole token endpoint, such as "http://127.0.0.1:34567/base/v2/auth/token"
	CA  string // PEM of the certificate to trust; "" without TLS

	http *httptest.Server
}

// NewServer starts a simulator over plain HTTP and closes it when the test ends. A nil opts means the zero Options. A
// request outside the endpoint's path fails the test, so that a client that builds a wrong URL is found. Nothing else
// does.
func NewServer(t testing.TB, opts *Options) *Server {
	s := newServer(t, opts)
	s.http.Start()
	s.URL = s.http.URL + s.Path()
	return s
}

// NewTLSServer is NewServer over TLS.
func NewTLSServer(t testing.TB, opts *Options) *Server {
	s := newServer(t, opts)
	s.http.StartTLS()
	s.URL = s.http.URL + s.Path()
	s.CA = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.http.Certificate().Raw}))
	return s
}

func newServer(t testing.TB, opts *Options) *Server {
	s := &Server{Simulator: New(opts)}
	s.http = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != s.Path() {
			t.Errorf("simulator: %s %q is outside the token endpoint %q", r.Method, s.redact(r.URL.Path), s.Path())
		}
		s.ServeHTTP(w, r)
	}))
	s.http.Config.ConnState = s.ConnState
	t.Cleanup(s.Close)
	return s
}

// Close ends delays and stalls, and then the server, whose port refuses connections from then on. It may be called
// twice.
func (s *Server) Close() {
	s.Simulator.Close()
	s.http.Close()
}
