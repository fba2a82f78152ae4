// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cabletest

import (
	"bytes"
	"compress/gzip"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// Values of Fault.Reset, the point of a call at which its TCP connection is reset.
const (
	ResetBefore = "before" // before the request's body is read, so that nothing is minted
	ResetAfter  = "after"  // instead of the response, when a valid request has minted a token that is not delivered
	ResetHalf   = "half"   // after half of the response's body
)

// Fault describes how calls fail. The zero value is a call that does not. As JSON, names are as tagged and durations
// are Go's strings, "5s".
//
// In Message, Errors, Header and Body the placeholder {refresh_key} is replaced by the call's Authorization header, to
// simulate a server that echoes the key.
type Fault struct {
	Times int `json:"times"` // calls that it applies to; 0 is until cleared
	Every int `json:"every"` // applies to every Nth call only; 0 is each

	// Delay is the wait before the response, and before anything is minted. It ends when the caller leaves or the
	// simulator is closed, and nothing is minted then. Stall is the wait after half of the response's body.
	Delay time.Duration `json:"delay"`
	Stall time.Duration `json:"stall"`

	Status  int          `json:"status"`  // respond with this (200 to 599) and the error envelope, minting nothing
	Message string       `json:"message"` // of the envelope; by default the status's text
	Errors  []FieldError `json:"errors"`  // of the envelope

	// Header is set on the response. An empty value removes a header, Date included.
	Header   map[string]string `json:"header"`
	Body     string            `json:"body"`      // instead of the JSON; a valid request still mints if Status is 0
	BodySize int64             `json:"body_size"` // bytes of filler after Body, instead of the JSON
	Gzip     bool              `json:"gzip"`      // compress the body, whatever the caller accepts

	Reset     string        `json:"reset"`      // ResetBefore, ResetAfter, ResetHalf, or "" for no reset
	ClockSkew time.Duration `json:"clock_skew"` // Cable's clock (Date, expiry) is ahead by this, or behind if negative
	Grant     *Grant        `json:"grant"`      // changes a successful response
}

// Grant is the content of a successful response, as far as it differs from the request. Zero fields are as requested.
type Grant struct {
	Lifetime             *time.Duration  `json:"lifetime"` // the token's true one, in whole seconds; may be negative
	OrganizationID       *string         `json:"organization_id"`
	ScopesOrganizationID *string         `json:"scopes_organization_id"`
	Scopes               *[]string       `json:"scopes"`
	OmitScopes           bool            `json:"omit_scopes"`
	OmitToken            bool            `json:"omit_token"`
	OmitExpiry           bool            `json:"omit_expiry"`
	Expiry               json.RawMessage `json:"expiry"` // any JSON value, verbatim, such as a string or a float
	Token                *string         `json:"token"`
}

// pendingFault is a fault in the queue.
type pendingFault struct {
	Fault
	seen, used int
}

// SetFault replaces all faults with f. It panics if f is not valid (an unknown Reset, a negative duration).
func (s *Simulator) SetFault(f Fault) { s.putFault(f, true) }

// AddFault appends f to the faults. They are used in order, each for its Times.
func (s *Simulator) AddFault(f Fault) { s.putFault(f, false) }

// ClearFaults removes all faults but Options.Default.
func (s *Simulator) ClearFaults() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = nil
}

func (s *Simulator) putFault(f Fault, replace bool) {
	if err := f.check(); err != nil {
		panic(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if replace {
		s.faults = nil
	}
	s.faults = append(s.faults, pendingFault{Fault: f})
}

// nextFault returns the fault that applies to the call that just arrived. The caller has locked s.mu.
func (s *Simulator) nextFault() *Fault {
	if len(s.faults) == 0 {
		return &s.opts.Default
	}
	p := &s.faults[0]
	p.seen++
	if p.Every > 1 && p.seen%p.Every != 0 {
		return &s.opts.Default
	}
	p.used++
	f := p.Fault
	if f.Times > 0 && p.used == f.Times {
		s.faults = s.faults[1:]
	}
	return &f
}

func (f *Fault) check() error {
	switch {
	case f.Reset != "" && f.Reset != ResetBefore && f.Reset != ResetAfter && f.Reset != ResetHalf:
		return fmt.Errorf("fault: reset %q: want before, after or half", f.Reset)
	case f.Status != 0 && (f.Status < 200 || f.Status > 599):
		return fmt.Errorf("fault: status %d: want 200 to 599", f.Status)
	case f.Times < 0 || f.Every < 0 || f.Delay < 0 || f.Stall < 0 || f.BodySize < 0:
		return fmt.Errorf("fault: times, every, delay, stall and body_size cannot be negative")
	case f.Grant != nil && f.Grant.Expiry != nil && !json.Valid(f.Grant.Expiry):
		return fmt.Errorf("fault: expiry %q is not JSON", f.Grant.Expiry)
	}
	return nil
}

// UnmarshalJSON refuses unknown fields and faults that are not valid.
func (f *Fault) UnmarshalJSON(data []byte) error {
	type plain Fault // without this method
	v := struct {
		*plain
		Delay     duration `json:"delay"`
		Stall     duration `json:"stall"`
		ClockSkew duration `json:"clock_skew"`
	}{plain: (*plain)(f)}
	if err := unmarshalStrict(data, &v); err != nil {
		return err
	}
	f.Delay, f.Stall, f.ClockSkew = time.Duration(v.Delay), time.Duration(v.Stall), time.Duration(v.ClockSkew)
	return f.check()
}

// UnmarshalJSON refuses unknown fields.
func (g *Grant) UnmarshalJSON(data []byte) error {
	type plain Grant // without this method
	v := struct {
		*plain
		Lifetime *duration `json:"lifetime"`
	}{plain: (*plain)(g)}
	err := unmarshalStrict(data, &v)
	g.Lifetime = (*time.Duration)(v.Lifetime)
	return err
}

func unmarshalStrict(data []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	return d.Decode(v)
}

// duration is a time.Duration that is a string such as "5s" in JSON.
type duration time.Duration

func (d *duration) UnmarshalJSON(data []byte) error {
	var text string
	if err := json.Unmarshal(data, &text); err != nil {
		return fmt.Errorf(`duration %s: want a string such as "5s"`, data)
	}
	v, err := time.ParseDuration(text)
	*d = duration(v)
	return err
}

// echo replaces the placeholder with the call's Authorization header.
func (f *Fault) echo(r *http.Request, text string) string {
	return strings.ReplaceAll(text, "{refresh_key}", r.Header.Get("Authorization"))
}

// envelope returns the error that Status, Message and Errors describe.
func (f *Fault) envelope(r *http.Request) *envelope {
	e := &envelope{Code: f.Status, Message: f.echo(r, f.Message)}
	if f.Message == "" {
		e.Message = http.StatusText(f.Status)
	}
	for _, fe := range f.Errors {
		e.Errors = append(e.Errors, FieldError{f.echo(r, fe.Field), f.echo(r, fe.Message)})
	}
	return e
}

func (f *Fault) setHeader(r *http.Request, h http.Header) {
	for name, value := range f.Header {
		if h.Set(name, f.echo(r, value)); value == "" {
			h[http.CanonicalHeaderKey(name)] = nil // nil, not absent, or net/http would add a Date of its own
		}
	}
}

// apply changes the response as g says, and m to the token that the caller therefore gets.
func (g *Grant) apply(a *response, m *Minted) {
	set(&a.OrganizationID, g.OrganizationID)
	set(&a.Scopes.OrganizationID, g.ScopesOrganizationID)
	set(&a.Scopes.Scopes, g.Scopes)
	set(&m.Token, g.Token)
	if g.Expiry != nil {
		a.Expiry = g.Expiry
	}
	if g.OmitScopes {
		a.Scopes = nil
	}
	if g.OmitToken {
		a.Token = nil
	}
	if g.OmitExpiry {
		a.Expiry = nil
	}
}

func set[T any](to, from *T) {
	if from != nil {
		*to = *from
	}
}

// write sends a response's body, start and the filler, compressed or not, with a wait or a reset after half of it.
// Errors of writing are dropped, because the caller has left, or a Content-Length in Header forbids a body.
func (f *Fault) write(w http.ResponseWriter, start []byte, wait func() bool) {
	if f.BodySize == 0 && f.Stall == 0 && f.Reset == "" && !f.Gzip {
		_, _ = w.Write(start) // the hot path
		return
	}
	size := int64(len(start)) + f.BodySize
	body := io.LimitReader(io.MultiReader(bytes.NewReader(start), filler{}), size)
	out, flush := io.Writer(w), func() error { return nil }
	if f.Gzip {
		z := gzip.NewWriter(w)
		defer func() { _ = z.Close() }()
		out, flush = z, z.Flush
	}
	if f.Stall > 0 || f.Reset == ResetHalf {
		_, _ = io.CopyN(out, body, size/2)
		_ = flush()
		_ = http.NewResponseController(w).Flush()
		if !wait() {
			panic(http.ErrAbortHandler)
		}
		if f.Reset == ResetHalf {
			hangUp(w)
			return
		}
	}
	_, _ = io.Copy(out, body)
}

// filler reads as an endless run of x.
type filler struct{}

func (filler) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 'x'
	}
	return len(p), nil
}

// hangUp resets the TCP connection of a call.
func hangUp(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil { // there is none, in memory
		panic(http.ErrAbortHandler)
	}
	if c, ok := conn.(*tls.Conn); ok {
		conn = c.NetConn()
	}
	if c, ok := conn.(*net.TCPConn); ok {
		_ = c.SetLinger(0) // closing sends RST instead of FIN
	}
	_ = conn.Close()
}
