// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Package cable is a client of Cable's token API, POST /v2/auth/token, which issues short-lived access tokens to the
// holder of a long-lived refresh key. It speaks HTTP/1.1 and JSON and knows nothing of Vault.
//
// Its promise is that a token request makes Cable issue one token at most, and that its error says so if that token may
// exist without having been delivered; see [Error].MaybeIssued. Cable has no idempotency key and cannot revoke, so a
// call is retried, at most twice, only if Cable cannot have processed it, because no byte of it was sent, or if Cable
// responded 429 with a Retry-After that fits the budget. Only a 4xx other than 408 shows that no token was issued.
//
// A response is used only after it was read whole, within a bound, and decoded by the documented types. No error, no
// formatted value and no JSON of a type of this package contains the refresh key or an access token. The caller
// compares the grant with the request.
//
// NOTE: net/http writes the bytes that follow a complete response to Go's standard logger. They may contain a token or
// an echo of the refresh key, so the program must discard that logger.
package cable

import (
	"cmp"
	"errors"
	"net/http"
	"net/url"
	"sync/atomic"
	"time"
)

// Bounds and defaults of Cable's token API and of this client.
const (
	DefaultTokenURL = "https://api.cable.tech/v2/auth/token" // the current endpoint (v2.0 request-token reference)

	MinLifetime    = 5 * time.Minute  // the least expiry_seconds, 300 (request-token reference)
	MaxLifetime    = 24 * time.Hour   // the greatest expiry_seconds, 86400 (request-token reference)
	DefaultTimeout = 20 * time.Second // the budget of one RequestToken, retries included
)

// Config configures a Client. RefreshKey is required; every other field has a default, which its zero value selects.
type Config struct {
	RefreshKey Secret        // the long-lived credential
	TokenURL   string        // the whole endpoint, see ParseTokenURL; default DefaultTokenURL
	Bearer     bool          // send "Authorization: Bearer <key>", not the key alone; Cable's documents show both
	CACert     string        // certificates to trust in addition to the system's, see CheckCACert; default none
	Timeout    time.Duration // the whole budget of one RequestToken; default DefaultTimeout
	UserAgent  string        // sent as it is; default none
	Pause      *Pause        // an earlier Client's, for the same key and URL; default a new one

	// Observe is called after each API call, before RequestToken returns; default none. It must be quick and safe for
	// concurrent use.
	Observe func(Call)
}

// Call is one API call, an HTTP request to Cable. One RequestToken makes up to three.
type Call struct {
	StatusCode int           // of the response, or 0 if none arrived
	Duration   time.Duration // until the response's head arrived or the call failed, see Elapsed
	Retry      bool          // an earlier call of the same RequestToken failed
	PauseBegan bool          // the response, a 429, began a pause
}

// Client requests access tokens. It is safe for concurrent use and reuses its connections, so make one per
// configuration and use it until that changes.
type Client struct {
	url       *url.URL
	auth      Secret // the value of the Authorization header
	userAgent string
	timeout   time.Duration
	redactor  redactor
	pause     *Pause
	observe   func(Call)
	transport *http.Transport
	proxied   bool
	turns     chan struct{} // has one element for each call under way
	closed    *atomic.Bool
}

// TokenRequest describes the access token to request.
type TokenRequest struct {
	OrganizationID string        // that the token is for
	Scopes         []string      // of the form resource:action
	Lifetime       time.Duration // in whole seconds, MinLifetime to MaxLifetime

	// Start is when the budget, Config.Timeout, began. Zero or a time in the future means when RequestToken is called.
	Start time.Time

	// Allow is called before each API call, and again when the connection is there and the call's first byte is about
	// to be sent; nil allows every call. If it returns an error, nothing is sent or retried, and RequestToken returns
	// that error as it is. It must be quick and safe for concurrent use.
	Allow func() error
}

// Token is the access token that Cable issued, not yet compared with the request.
type Token struct {
	Value                Secret
	Expiry               int64    // absolute, in Unix seconds by Cable's clock
	OrganizationID       string   // of the response
	OrganizationName     string   // of the response, made safe to show
	ScopesOrganizationID string   // the one inside "scopes", or ""
	Scopes               []string // nil if the response names none, because the schema does not require them

	// Date is Cable's clock when it responded, namely the response's Date plus its Age, in whole seconds, rounded down.
	// It is zero if Date is missing or unreadable.
	Date time.Time

	// SentAt and ReceivedAt are local times, before the successful call was sent and after its response was read, with
	// monotonic readings.
	SentAt, ReceivedAt time.Time

	Attempts int // API calls
}

// New returns a Client, or an error that names the field of cfg that cannot be used. It connects to nothing.
func New(cfg Config) (*Client, error) {
	if cfg.RefreshKey.IsZero() {
		return nil, errors.New("the refresh key is missing")
	}
	u, err := ParseTokenURL(cmp.Or(cfg.TokenURL, DefaultTokenURL))
	if err != nil {
		return nil, err
	}
	c := &Client{
		url:       u,
		auth:      cfg.RefreshKey,
		userAgent: cfg.UserAgent,
		timeout:   cmp.Or(cfg.Timeout, DefaultTimeout),
		redactor:  newRedactor(cfg.RefreshKey),
		pause:     cmp.Or(cfg.Pause, new(Pause)),
		observe:   cfg.Observe,
		turns:     make(chan struct{}, maxConns),
		closed:    new(atomic.Bool),
	}
	if cfg.Bearer {
		c.auth = NewSecret("Bearer " + cfg.RefreshKey.Reveal())
	}
	if c.observe == nil {
		c.observe = func(Call) {}
	}
	head := len(c.auth.Reveal()) + len(c.userAgent) + len(u.String())
	if c.transport, c.proxied, err = newTransport(u, cfg.CACert, head); err != nil {
		return nil, err
	}
	return c, nil
}

// Pause returns the pause that c keeps, for the next client of the same key and URL.
func (c *Client) Pause() *Pause { return c.pause }

// Ready returns the *Error with which RequestToken would fail now without an API call, in a pause or because of a proxy
// variable that is malformed, or nil.
func (c *Client) Ready() error {
	if err := c.pause.check(); err != nil {
		return err
	}
	if _, err := c.transport.Proxy(nil); err != nil {
		return &Error{Kind: Unreachable, Detail: err.Error()}
	}
	return nil
}

// Close closes the idle connections. Calls under way and later ones are not affected; their connections are closed when
// they have ended.
func (c *Client) Close() {
	c.closed.Store(true)
	c.transport.CloseIdleConnections()
}
