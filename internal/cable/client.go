// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-retryablehttp"
)

// Bounds of Cable's token API and of this client.
const (
	// DefaultTokenURL is the current endpoint (v2.0 request-token reference).
	DefaultTokenURL = "https://api.cable.tech/v2/auth/token"

	// MinLifetime and MaxLifetime bound expiry_seconds, both included: 300 (5 minutes)
	// to 86400 (24 hours), by the request-token reference.
	MinLifetime = 5 * time.Minute
	MaxLifetime = 24 * time.Hour

	// DefaultTimeout is the budget of one RequestToken, repeats included.
	DefaultTimeout = 20 * time.Second

	maxAnswer      = 1 << 20  // bytes of a 200; a token and its scopes are some KiB
	maxErrorAnswer = 64 << 10 // bytes of any other answer
	maxHeader      = 64 << 10 // bytes of an answer's headers

	maxRepeats     = 2
	dialTimeout    = 10 * time.Second
	repeatDelay    = 100 * time.Millisecond // before the first repeat, doubled for the second; jitter doubles it at most
	idleConnsKept  = 256                    // per host: more than the concurrent mints of a busy mount
	pingDelay      = 10 * time.Second       // without a frame, before an HTTP/2 connection is asked for a sign of life:
	pingTimeout    = 5 * time.Second        // requests would be put on a dead one for minutes
	idleConnExpiry = 30 * time.Second       // below the 60 s after which common load balancers drop one
)

// Config says how to reach Cable. RefreshKey is required; every other zero
// field means its default.
type Config struct {
	// RefreshKey is the long-lived credential.
	RefreshKey Secret

	// TokenURL is the whole endpoint; default DefaultTokenURL. See CheckURL.
	TokenURL string

	// Bearer sends "Authorization: Bearer <key>" instead of the key alone.
	// Cable's documents show both.
	Bearer bool

	// CACert holds PEM certificates to be trusted besides the system's.
	CACert string

	// Timeout is the whole budget of one RequestToken; default DefaultTimeout.
	Timeout time.Duration

	// UserAgent is sent as it is; default none.
	UserAgent string

	// Pause carries on the pause of an earlier Client of the same key and URL;
	// default a new one.
	Pause *Pause

	// Observe is told of each call after it was made, before RequestToken
	// returns; default nobody is. It must be quick and safe for concurrent use.
	Observe func(Call)
}

// Call is one HTTP request to Cable; a RequestToken makes up to three.
type Call struct {
	// StatusCode is Cable's HTTP status, or 0 where no answer came.
	StatusCode int

	// Duration is the time until the answer's headers were there, or until the
	// call failed.
	Duration time.Duration

	// Repeat reports that it repeats an earlier call of the same RequestToken.
	Retry bool

	// PauseBegan reports that its answer, a 429, began a pause.
	PauseBegan bool
}

// Client requests access tokens. It is safe for concurrent use and keeps its
// connections; make one per configuration and use it until that changes.
type Client struct {
	url       *url.URL
	auth      Secret
	userAgent string
	timeout   time.Duration
	redactor  redactor
	hold      *Pause
	http      *retryablehttp.Client
	transport *http.Transport
	closed    *atomic.Bool
}

// TokenRequest is what to ask for.
type TokenRequest struct {
	// OrganizationID is the organization that the token is for.
	OrganizationID string

	// Scopes are of the form resource:action.
	Scopes []string

	// Lifetime is asked for in whole seconds, MinLifetime to MaxLifetime.
	Lifetime time.Duration
}

// Token is an answer: what Cable granted, not yet compared with the request.
type Token struct {
	// Value is the access token.
	Value Secret

	// Expiry is absolute, in Unix seconds by Cable's clock.
	Expiry int64

	// OrganizationID and OrganizationName are as Cable answered.
	OrganizationID, OrganizationName string

	// ScopesOrganizationID is the organization named inside "scopes", or "".
	ScopesOrganizationID string

	// Scopes are the granted ones, or nil where the answer names none: the
	// schema does not require them.
	Scopes []string

	// Date is Cable's clock when it answered, in whole seconds, cut off rather
	// than rounded; zero where the answer has no usable Date header.
	Date time.Time

	// SentAt and ReceivedAt are local, before the request that succeeded was
	// sent and after its answer was read, with monotonic readings.
	SentAt, ReceivedAt time.Time

	// Attempts counts the calls made to Cable.
	Attempts int
}

// New returns a Client, or says which field of cfg cannot be used. It connects
// to nothing.
func New(cfg Config) (*Client, error) {
	if cfg.RefreshKey.IsZero() {
		return nil, errors.New("the refresh key is missing")
	}
	if cfg.TokenURL == "" {
		cfg.TokenURL = DefaultTokenURL
	}
	u, err := CheckURL(cfg.TokenURL)
	if err != nil {
		return nil, err
	}
	tlsConfig := &tls.Config{MinVersion: tls.VersionTLS12, ClientSessionCache: tls.NewLRUClientSessionCache(0)}
	if cfg.CACert != "" {
		if tlsConfig.RootCAs, err = certPool(cfg.CACert); err != nil {
			return nil, err
		}
	}
	c := &Client{
		url:       u,
		auth:      cfg.RefreshKey,
		userAgent: cfg.UserAgent,
		timeout:   cfg.Timeout,
		redactor:  newRedactor(cfg.RefreshKey),
		hold:      cfg.Pause,
		closed:    new(atomic.Bool),
	}
	if cfg.Bearer {
		c.auth = NewSecret("Bearer " + cfg.RefreshKey.Reveal())
	}
	if c.timeout == 0 {
		c.timeout = DefaultTimeout
	}
	if c.hold == nil {
		c.hold = new(Pause)
	}
	if cfg.Observe == nil {
		cfg.Observe = func(Call) {}
	}
	dialer, proxy := &net.Dialer{Timeout: dialTimeout}, http.ProxyFromEnvironment
	if u.Scheme == "http" {
		dialer.Control, proxy = onlyLoopback, nil // a proxy would read the key
	}
	c.transport = &http.Transport{
		Proxy:                  proxy,
		DialContext:            dialer.DialContext,
		TLSClientConfig:        tlsConfig,
		TLSHandshakeTimeout:    dialTimeout,
		ForceAttemptHTTP2:      true,
		HTTP2:                  &http.HTTP2Config{SendPingTimeout: pingDelay, PingTimeout: pingTimeout},
		MaxIdleConnsPerHost:    idleConnsKept, // Go's default of 2 makes most concurrent calls reconnect
		IdleConnTimeout:        idleConnExpiry,
		MaxResponseHeaderBytes: maxHeader,
		DisableCompression:     true, // answers are small; and no bomb is ever unpacked
		OnProxyConnectResponse: func(_ context.Context, _ *url.URL, _ *http.Request, resp *http.Response) error {
			if resp.StatusCode != http.StatusOK {
				return proxyRefusal(resp.StatusCode)
			}
			return nil
		},
	}
	c.http = &retryablehttp.Client{
		HTTPClient: &http.Client{
			Transport:     roundTripper{c.transport, c.hold, cfg.Observe},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		RetryMax:     maxRepeats,
		CheckRetry:   checkRepeat,
		Backoff:      func(_, _ time.Duration, n int, resp *http.Response) time.Duration { return repeatWait(n, resp) },
		PrepareRetry: func(req *http.Request) error { return c.hold.enter(req.Context()) }, // a 429 may have come to others meanwhile
		ErrorHandler: retryablehttp.PassthroughErrorHandler,
	}
	return c, nil
}

// Pause returns the pause that c keeps, for the next client of the same key and
// URL.
func (c *Client) Pause() *Pause { return c.hold }

// Close lets go of the idle connections. Requests under way, and later ones,
// end as they would, and let go of theirs.
func (c *Client) Close() {
	c.closed.Store(true)
	c.transport.CloseIdleConnections()
}

// RequestToken asks Cable for an access token, and returns it or an *Error. It
// takes at most the client's Timeout, and ends when ctx does.
func (c *Client) RequestToken(ctx context.Context, tr TokenRequest) (*Token, error) {
	defer func() { // after the body is closed, which is when a connection becomes idle
		if c.closed.Load() {
			c.transport.CloseIdleConnections()
		}
	}()
	body, err := json.Marshal(requestBody{
		ExpirySeconds: int64(tr.Lifetime / time.Second),
		Scopes:        scopesBody{OrganizationID: tr.OrganizationID, Scopes: tr.Scopes},
	})
	if err != nil {
		return nil, fmt.Errorf("encoding the request: %w", err)
	}
	caller := ctx
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	ex := new(exchange)
	err = ctx.Err()
	if err == nil {
		err = c.hold.enter(ctx)
	}
	if err != nil {
		return nil, c.failure(caller, ctx, ex, err)
	}
	req, err := retryablehttp.FromRequest((&http.Request{
		Method: http.MethodPost,
		URL:    c.url,
		Host:   c.url.Host,
		Header: http.Header{
			"Authorization": {c.auth.Reveal()},
			"Content-Type":  {"application/json"},
			"Accept":        {"application/json"},
			"User-Agent":    {c.userAgent},
		},
	}).WithContext(ex.trace(ctx)))
	if err == nil {
		err = req.SetBody(body)
	}
	if err != nil {
		return nil, fmt.Errorf("building the request: %w", err)
	}
	resp, err := c.http.Do(req)
	if resp != nil {
		defer func() { _ = resp.Body.Close() }()
	}
	if err != nil {
		return nil, c.failure(caller, ctx, ex, err)
	}
	if resp.StatusCode == http.StatusSwitchingProtocols {
		// NOTE: its body is the bare connection, and ends with no context.
		return nil, c.answered(resp, nil, ex)
	}
	limit := int64(maxErrorAnswer)
	if resp.StatusCode == http.StatusOK {
		limit = maxAnswer
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil && resp.StatusCode == http.StatusOK {
		return nil, c.failure(caller, ctx, ex, err)
	}
	// NOTE: an error's body that breaks off does not hide the error's status.
	if resp.StatusCode != http.StatusOK {
		return nil, c.answered(resp, raw, ex)
	}
	token, err := c.decode(raw, tr)
	if err != nil {
		return nil, &Error{Kind: InvalidResponse, StatusCode: resp.StatusCode, Detail: err.Error(), MaybeIssued: true, Attempts: ex.attempts}
	}
	token.Date = date(resp)
	token.SentAt, token.ReceivedAt = ex.sentAt, time.Now()
	token.Attempts = ex.attempts
	return token, nil
}

// failure turns an error of the way into an *Error: caller is the context that
// RequestToken was given, ctx the one with its budget.
func (c *Client) failure(caller, ctx context.Context, ex *exchange, err error) *Error {
	var own *Error
	if errors.As(err, &own) {
		own.Attempts = ex.attempts
		return own
	}
	e := &Error{Kind: Unreachable, Detail: describe(err), MaybeIssued: ex.out.Load(), Attempts: ex.attempts}
	where := "before a request was sent"
	if e.MaybeIssued {
		where = "after the request was sent"
	} else if ex.refused != 0 {
		where = fmt.Sprintf("after cable answered %d", ex.refused)
	}
	switch {
	case errors.Is(caller.Err(), context.Canceled):
		e.Kind, e.Detail = Canceled, "the caller went away "+where
	case caller.Err() != nil:
		e.Kind, e.Detail = TimedOut, "the caller's deadline passed "+where
	case ctx.Err() != nil:
		e.Kind, e.Detail = TimedOut, fmt.Sprintf("the budget of %s ran out %s", c.timeout, where)
	}
	return e
}
