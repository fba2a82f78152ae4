// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Package cabletest simulates Cable's token API, POST <base>/auth/token, for tests and demos.
//
// Its rules:
//
//   - It refuses a request that Cable's documents call invalid, and no other. If they disagree (the form of the
//     Authorization header), Options decides; if they are silent (an empty list of scopes, a scope or a field that they
//     do not name), it accepts.
//   - It fails only by a Fault.
//   - Its record of a call never contains the refresh key or an access token. Both contain marker strings,
//     unless Options.Plain, so that a test can look for them where they must not be.
//
// Source of each rule: Cable's request-token reference (v2.0) and its OpenAPI documents.
package cabletest

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// TokenMarker is part of every access token, unless Options.Plain.
	TokenMarker = "CABLETOKENCANARY"
	// RefreshKeyMarker is part of every refresh key made by NewRefreshKey.
	RefreshKeyMarker = "REFRESHKEYCANARY"

	// MinExpirySeconds is the lowest expiry_seconds that is accepted (request-token reference).
	MinExpirySeconds = 300
	// MaxExpirySeconds is the highest one.
	MaxExpirySeconds = 86400

	// DefaultOrganizationID is the id in Cable's own sample (v1.0 reference).
	DefaultOrganizationID = "org_9f8b7c6d5e4a3b2c1d0e"
	// DefaultOrganizationName is the same organization's name.
	DefaultOrganizationName = "Cable Financial Services"

	// Recorded is the number of calls, and of minted tokens, that a Simulator keeps, the latest ones. Its counters
	// count all.
	Recorded = 10_000

	// maxRequestBytes protects the simulator's own memory; Cable publishes no limit.
	maxRequestBytes = 1 << 20
)

// Values of Options.Scheme, which says how the refresh key must be written into the Authorization header. Cable's
// documents show both forms.
const (
	SchemeRaw    = "raw"    // the key alone (v2.0 reference)
	SchemeBearer = "bearer" // "Bearer <key>" (v1.0 reference)
	SchemeAny    = "any"    // either
)

// Options of a Simulator. The zero value is a Cable without faults and with one organization.
type Options struct {
	RefreshKey    string            // default: NewRefreshKey()
	Scheme        string            // default: SchemeRaw
	Organizations map[string]string // id to name; default: DefaultOrganizationID
	BasePath      string            // default "/base/v2", or "/v2" if Plain; the endpoint is BasePath + "/auth/token"
	Plain         bool              // tokens without TokenMarker, for a reader's eyes
	Now           func() time.Time  // Cable's clock; default time.Now
	Default       Fault             // for each call that no other fault applies to; its Times and Every are ignored
	Log           func(Call)        // called once for each call, before the response; must be safe for concurrent use
}

// FieldError is one element of errors[] in Cable's error envelope.
type FieldError struct {
	Field   string `json:"field"` // such as "scopes.organization_id"
	Message string `json:"message"`
}

// envelope is the JSON of every error response.
type envelope struct {
	Code    int          `json:"code"` // mirrors the HTTP status
	Message string       `json:"message"`
	Errors  []FieldError `json:"errors,omitempty"`
}

// response is the JSON of a success. All but scopes are in the schema's list of required fields; the ones that
// are optional here are for Grant.
type response struct {
	Token            *string         `json:"token,omitempty"`
	Expiry           json.RawMessage `json:"expiry,omitempty"` // Unix seconds
	OrganizationID   string          `json:"organization_id"`
	OrganizationName string          `json:"organization_name"`
	Scopes           *grantedScopes  `json:"scopes,omitempty"`
}

type grantedScopes struct {
	OrganizationID string   `json:"organization_id"`
	Scopes         []string `json:"scopes"`
}

// Simulator is Cable's token API as an http.Handler, safe for concurrent use.
type Simulator struct {
	opts        Options
	path        string
	key         atomic.Pointer[string]
	connections atomic.Int64
	closed      chan struct{}
	closeOnce   sync.Once

	mu     sync.Mutex // guards the next fields; never locked while a call waits or is written
	seen   *record
	faults []pendingFault
}

// New returns a simulator. A nil opts means the zero Options. An unknown Scheme panics.
func New(opts *Options) *Simulator {
	s := &Simulator{closed: make(chan struct{}), seen: &record{byStatus: map[int]int{}}}
	if opts != nil {
		s.opts = *opts
	}
	o := &s.opts
	switch o.Scheme {
	case "":
		o.Scheme = SchemeRaw
	case SchemeRaw, SchemeBearer, SchemeAny:
	default:
		panic(fmt.Sprintf("cabletest: scheme %q: want raw, bearer or any", o.Scheme))
	}
	if err := o.Default.check(); err != nil {
		panic(err)
	}
	if o.RefreshKey == "" {
		o.RefreshKey = NewRefreshKey()
	}
	if o.BasePath == "" && o.Plain {
		o.BasePath = "/v2"
	} else if o.BasePath == "" {
		o.BasePath = "/base/v2"
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	o.Organizations = maps.Clone(o.Organizations)
	if len(o.Organizations) == 0 {
		o.Organizations = map[string]string{DefaultOrganizationID: DefaultOrganizationName}
	}
	s.path = strings.TrimSuffix(o.BasePath, "/") + "/auth/token"
	s.SetRefreshKey(o.RefreshKey)
	return s
}

// NewRefreshKey returns a random refresh key that contains RefreshKeyMarker.
func NewRefreshKey() string { return RefreshKeyMarker + "-" + rand.Text() }

// Path returns the path of the token endpoint, such as "/base/v2/auth/token".
func (s *Simulator) Path() string { return s.path }

// RefreshKey returns the one refresh key that is accepted.
func (s *Simulator) RefreshKey() string { return *s.key.Load() }

// SetRefreshKey replaces the refresh key. The old one is refused from now on.
func (s *Simulator) SetRefreshKey(key string) { s.key.Store(&key) }

// Close ends every Delay and Stall, now and later. Those calls get no further response.
func (s *Simulator) Close() { s.closeOnce.Do(func() { close(s.closed) }) }

// ServeHTTP responds to one call. A call to any other path than the endpoint's gets a 404 and takes no fault.
func (s *Simulator) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	call := Call{
		Time:            s.opts.Now(),
		Method:          r.Method,
		Path:            s.redact(r.URL.Path),
		AuthorizationOK: s.authorized(r.Header.Get("Authorization")),
		UserAgent:       s.redact(r.UserAgent()),
		RemoteAddr:      r.RemoteAddr,
	}
	f, finish := s.begin(call)
	if f.Reset == ResetBefore {
		s.wait(r, f.Delay)
		finish(call, nil)
		hangUp(w)
		return
	}
	refused := s.read(r, &call)
	if !s.wait(r, f.Delay) {
		finish(call, nil)
		panic(http.ErrAbortHandler)
	}

	// One reading of the clock for both Date and expiry, so that the two are consistent.
	now := time.Unix(s.opts.Now().Add(f.ClockSkew).Unix(), 0).UTC()
	var token *Minted
	var result any
	switch {
	case f.Status != 0:
		call.Status, result = f.Status, f.envelope(r)
	case refused != nil:
		call.Status, result = refused.Code, refused
	default:
		call.Status, call.Minted = http.StatusOK, true
		token, result = s.mint(&call, now, f.Grant)
	}
	body, _ := json.Marshal(result) // cannot fail, because check saw to it that Grant.Expiry is JSON
	if f.Body != "" || f.BodySize > 0 {
		body = []byte(f.echo(r, f.Body))
	}
	if f.Reset == ResetAfter {
		call.Status = 0
	}
	finish(call, token)
	if f.Reset == ResetAfter {
		hangUp(w)
		return
	}

	h := w.Header()
	h.Set("Date", now.Format(http.TimeFormat))
	h.Set("Content-Type", "application/json")
	if f.Gzip {
		h.Set("Content-Encoding", "gzip")
	} else {
		h.Set("Content-Length", strconv.FormatInt(int64(len(body))+f.BodySize, 10))
	}
	if call.Status == http.StatusMethodNotAllowed {
		h.Set("Allow", http.MethodPost)
	}
	f.setHeader(r, h)
	w.WriteHeader(call.Status)
	f.write(w, body, func() bool { return s.wait(r, f.Stall) })
}

// authorized reports whether the value of an Authorization header is the refresh key in an accepted form.
func (s *Simulator) authorized(header string) bool {
	key, scheme := s.RefreshKey(), s.opts.Scheme
	return key != "" && (scheme != SchemeBearer && header == key || scheme != SchemeRaw && header == "Bearer "+key)
}

// redact keeps a secret that was sent in the wrong place (a key as organization_id) out of the record. A key of less
// than 8 bytes is a test's own and no secret, because too many texts contain it.
func (s *Simulator) redact(text string) string {
	key := s.RefreshKey()
	if len(key) >= 8 && strings.Contains(text, key) || strings.Contains(text, TokenMarker) ||
		strings.Contains(text, tokenHeader) {
		return "[redacted]"
	}
	return text
}

// read reads the request into call and returns the error that Cable responds with, or nil. If there are two, it is the
// simulator's choice: Cable's documents do not say.
func (s *Simulator) read(r *http.Request, call *Call) *envelope {
	problems, malformed := s.readBody(r.Body, call)
	mediaType, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
	switch {
	case r.URL.Path != s.path:
		return &envelope{Code: http.StatusNotFound, Message: "not found"}
	case r.Method != http.MethodPost:
		return &envelope{Code: http.StatusMethodNotAllowed, Message: "method not allowed"}
	case !call.AuthorizationOK:
		return &envelope{Code: http.StatusUnauthorized, Message: "unauthorized"}
	case mediaType != "application/json":
		problems = []FieldError{{"Content-Type", "must be application/json"}}
	case malformed:
		return &envelope{Code: http.StatusBadRequest, Message: "request body is not a JSON object"}
	}
	if len(problems) > 0 {
		return &envelope{http.StatusBadRequest, "validation failed", problems}
	}
	return nil
}

// readBody reads a request's JSON into call and lists its errors. Pointers are nil for members that are absent or null.
func (s *Simulator) readBody(body io.Reader, call *Call) (problems []FieldError, malformed bool) {
	var req struct {
		ExpirySeconds *int64 `json:"expiry_seconds"`
		Scopes        *struct {
			OrganizationID *string   `json:"organization_id"`
			Scopes         []*string `json:"scopes"`
		} `json:"scopes"`
	}
	data, err := io.ReadAll(io.LimitReader(body, maxRequestBytes))
	if err == nil {
		err = json.Unmarshal(data, &req)
	}
	problem := func(wrong bool, field, message string) {
		if wrong {
			problems = append(problems, FieldError{field, message})
		}
	}
	var wrongType *json.UnmarshalTypeError
	if errors.As(err, &wrongType) && wrongType.Field != "" {
		problem(true, wrongType.Field, "must not be a JSON "+wrongType.Value)
		return problems, false
	} else if err != nil {
		return nil, true
	}
	if n := req.ExpirySeconds; n != nil {
		call.ExpirySeconds = *n
		problem(*n < MinExpirySeconds || *n > MaxExpirySeconds, "expiry_seconds", "must be between 300 and 86400")
	}
	problem(req.ExpirySeconds == nil, "expiry_seconds", "is required")
	if req.Scopes == nil {
		problem(true, "scopes", "is required")
		return problems, false
	}
	if id := req.Scopes.OrganizationID; id != nil {
		_, known := s.opts.Organizations[*id]
		problem(!known, "scopes.organization_id", "is not a known organization")
		call.OrganizationID = s.redact(*id)
	}
	problem(req.Scopes.OrganizationID == nil, "scopes.organization_id", "is required")
	problem(req.Scopes.Scopes == nil, "scopes.scopes", "is required")
	problem(slices.Contains(req.Scopes.Scopes, nil), "scopes.scopes", "must not contain null")
	call.Scopes = make([]string, len(req.Scopes.Scopes))
	for i, scope := range req.Scopes.Scopes {
		if scope != nil {
			call.Scopes[i] = s.redact(*scope)
		}
	}
	return problems, false
}

// mint makes the token that call requested, and the response with it, changed by grant if that is not nil.
func (s *Simulator) mint(call *Call, now time.Time, grant *Grant) (*Minted, *response) {
	g := grant
	if g == nil {
		g = &Grant{}
	}
	lifetime := call.ExpirySeconds
	if g.Lifetime != nil {
		lifetime = int64(*g.Lifetime / time.Second)
	}
	m := &Minted{
		Token:          s.newToken(call.OrganizationID, now.Unix(), now.Unix()+lifetime),
		OrganizationID: call.OrganizationID,
		Scopes:         call.Scopes,
		IssuedAt:       now,
		Expiry:         now.Add(time.Duration(lifetime) * time.Second),
	}
	a := &response{
		Token:            &m.Token,
		Expiry:           strconv.AppendInt(nil, m.Expiry.Unix(), 10),
		OrganizationID:   call.OrganizationID,
		OrganizationName: s.opts.Organizations[call.OrganizationID],
		Scopes:           &grantedScopes{call.OrganizationID, call.Scopes},
	}
	if grant != nil {
		grant.apply(a, m)
	}
	return m, a
}

// tokenHeader begins every access token: {"alg":"HS256","typ":"JWT"}.
const tokenHeader = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9."

// newToken returns a unique access token in the shape of a JWT (Cable's sample is one). Header and claims are real. The
// signature has the 32 bytes of HS256, of which the first 12 are TokenMarker, decoded.
func (s *Simulator) newToken(organizationID string, issuedAt, expiry int64) string {
	id, _ := json.Marshal(organizationID) // a string always marshals
	claims := fmt.Appendf(nil, `{"iss":"cabletest","sub":%s,"iat":%d,"exp":%d}`, id, issuedAt, expiry)
	enc := base64.RawURLEncoding
	signature := make([]byte, 32)
	rand.Read(signature) // never fails, because it crashes the program instead
	if !s.opts.Plain {
		_, _ = enc.Decode(signature, []byte(TokenMarker))
	}
	return tokenHeader + enc.EncodeToString(claims) + "." + enc.EncodeToString(signature)
}

// wait waits for d. It reports false as soon as the caller leaves or the simulator is closed.
func (s *Simulator) wait(r *http.Request, d time.Duration) bool {
	if d <= 0 {
		return true
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-r.Context().Done():
		return false
	case <-s.closed:
		return false
	}
}
