// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/go-retryablehttp"
)

// Bounds of Cable's token API and of this client.
const (
	// DefaultTokenURL is the current endpoint (v2.0 request-token reference).
	DefaultTokenURL = "https://api.cable.tech/v2/auth/token"

	// MinLife and MaxLife bound expiry_seconds, both included: 300 (5 minutes)
	// to 86400 (24 hours), by the request-token reference.
	MinLife = 5 * time.Minute
	MaxLife = 24 * time.Hour

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

// maxExpiry is the end of the year 9999, the last moment that RFC 3339 can
// name. An expiry beyond it is not in seconds; milliseconds of today lie there.
const maxExpiry = 253402300799

// errNotLoopback is why a plain-http URL, whose host must be loopback, was not
// dialled: its name resolved to some other address.
var errNotLoopback = errors.New("plain http is for loopback addresses only, and the host resolves to another")

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

	// Hold carries on the pause of an earlier Client of the same key and URL;
	// default a new one.
	Hold *Hold
}

// Client requests access tokens. It is safe for concurrent use and keeps its
// connections; make one per configuration and use it until that changes.
type Client struct {
	url       *url.URL
	auth      Secret
	userAgent string
	timeout   time.Duration
	redactor  redactor
	hold      *Hold
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

	// Life is asked for in whole seconds, MinLife to MaxLife.
	Life time.Duration
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
		hold:      cfg.Hold,
		closed:    new(atomic.Bool),
	}
	if cfg.Bearer {
		c.auth = NewSecret("Bearer " + cfg.RefreshKey.Reveal())
	}
	if c.timeout == 0 {
		c.timeout = DefaultTimeout
	}
	if c.hold == nil {
		c.hold = new(Hold)
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
			Transport:     roundTripper{c.transport, c.hold},
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

// CheckURL parses a token endpoint and says what is wrong with it. It must be
// https, or http to a loopback host, and hold no user info, query or fragment.
// The error repeats nothing of raw but the scheme and the host.
func CheckURL(raw string) (*url.URL, error) {
	for _, c := range raw {
		if c <= ' ' || c == 0x7f || c == '\\' {
			return nil, errors.New("token_url must not hold white space, control characters or backslashes")
		}
	}
	u, err := url.Parse(raw)
	switch {
	case err != nil:
		return nil, errors.New("token_url is not a URL: write the whole endpoint, such as " + DefaultTokenURL)
	case u.Scheme != "https" && u.Scheme != "http":
		return nil, errors.New("token_url must begin with https:// (http:// for a loopback host only): write the whole endpoint, such as " + DefaultTokenURL)
	case u.Hostname() == "" || u.Opaque != "":
		return nil, errors.New("token_url names no host: write the whole endpoint, such as " + DefaultTokenURL)
	case u.User != nil:
		return nil, errors.New("token_url must not hold a user name or password: the refresh key goes into refresh_key")
	case strings.ContainsAny(raw, "?#"):
		return nil, errors.New("token_url must not hold a query or a fragment: write scheme, host and path only")
	case !validPort(u):
		return nil, errors.New("token_url names a port that is not a number from 1 to 65535")
	case !validHost(u.Hostname()):
		return nil, errors.New("token_url names a host that holds something other than letters, digits, dots, hyphens and underscores: write an international name in its xn-- form")
	case u.Scheme == "http" && !isLoopback(u.Hostname()):
		return nil, fmt.Errorf("token_url uses plain http for the host %.100q: only a loopback host (localhost, 127.0.0.0/8, [::1]) may go without https", u.Hostname())
	}
	return u, nil
}

// validHost reports whether host is an address or a name as it is looked up:
// one that is read as it is called, by whoever checks the configuration.
func validHost(host string) bool {
	if _, err := netip.ParseAddr(host); err == nil {
		return true
	}
	return !strings.ContainsFunc(host, func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && !strings.ContainsRune("-._", c)
	})
}

// validPort reports whether u names no port, or one that can be dialled.
func validPort(u *url.URL) bool {
	if u.Port() == "" {
		return !strings.HasSuffix(u.Host, ":")
	}
	n, err := strconv.ParseUint(u.Port(), 10, 16)
	return err == nil && n > 0
}

// isLoopback reports whether host names this machine without a look-up:
// localhost is reserved for that by RFC 6761.
func isLoopback(host string) bool {
	if strings.EqualFold(host, "localhost") {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.Unmap().IsLoopback()
}

// onlyLoopback is a dialer's last look at the address that a name resolved to.
func onlyLoopback(_, address string, _ syscall.RawConn) error {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	if !isLoopback(host) {
		return errNotLoopback
	}
	return nil
}

// Hold returns the pause that c keeps, for the next client of the same key and
// URL.
func (c *Client) Hold() *Hold { return c.hold }

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
		ExpirySeconds: int64(tr.Life / time.Second),
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
		return nil, &Error{Kind: InvalidAnswer, StatusCode: resp.StatusCode, Detail: err.Error(), MaybeMinted: true, Attempts: ex.attempts}
	}
	token.Date = date(resp)
	token.SentAt, token.ReceivedAt = ex.sentAt, time.Now()
	token.Attempts = ex.attempts
	return token, nil
}

// The request's and the answer's JSON, by the request-token reference.
type (
	scopesBody struct {
		OrganizationID string   `json:"organization_id"`
		Scopes         []string `json:"scopes"`
	}
	requestBody struct {
		ExpirySeconds int64      `json:"expiry_seconds"`
		Scopes        scopesBody `json:"scopes"`
	}
	answerBody struct {
		Token            answerToken     `json:"token"`
		Expiry           json.RawMessage `json:"expiry"`
		OrganizationID   string          `json:"organization_id"`
		OrganizationName string          `json:"organization_name"`
		Scopes           *scopesBody     `json:"scopes"`
	}
	errorBody struct {
		Message string `json:"message"`
		Errors  []struct {
			Field   string `json:"field"`
			Message string `json:"message"`
		} `json:"errors"`
	}
)

// answerToken decodes straight into a Secret, so that answerBody holds none.
type answerToken struct{ Secret }

// UnmarshalJSON implements [json.Unmarshaler].
func (t *answerToken) UnmarshalJSON(raw []byte) error {
	var s string
	if err := json.Unmarshal(raw, &s); err != nil {
		return err
	}
	t.Secret = NewSecret(s)
	return nil
}

// decode reads the body of a 200. Its errors hold none of the body but the
// words of an error envelope.
func (c *Client) decode(raw []byte, asked TokenRequest) (*Token, error) {
	if len(raw) > maxAnswer {
		return nil, fmt.Errorf("it is larger than %d bytes", maxAnswer)
	}
	var a answerBody
	if err := json.Unmarshal(raw, &a); err != nil {
		var typeErr *json.UnmarshalTypeError
		if errors.As(err, &typeErr) && typeErr.Field != "" {
			return nil, fmt.Errorf("its field %q is not of the documented type", typeErr.Field)
		}
		return nil, errors.New("it is not a JSON object of the documented shape")
	}
	if a.Token.IsZero() {
		if said := c.envelope(raw); said != "" {
			return nil, errors.New("it holds no token, but says: " + said)
		}
		return nil, errors.New("it holds no token")
	}
	for _, c := range []byte(a.Token.Reveal()) {
		if c <= ' ' || c >= 0x7f {
			return nil, errors.New("its token holds characters that no header can carry")
		}
	}
	if len(a.Expiry) == 0 {
		return nil, errors.New("it holds no expiry")
	}
	expiry, err := strconv.ParseInt(string(a.Expiry), 10, 64)
	if err != nil {
		return nil, errors.New("its expiry is not a whole number of seconds")
	}
	if expiry <= 0 || expiry > maxExpiry {
		return nil, fmt.Errorf("its expiry %s is not a Unix time in seconds", c.redactor.clean(string(a.Expiry)))
	}
	t := &Token{
		Value:            a.Token.Secret,
		Expiry:           expiry,
		OrganizationID:   a.OrganizationID,
		OrganizationName: c.redactor.clean(a.OrganizationName),
	}
	if a.Scopes != nil {
		t.ScopesOrganizationID = a.Scopes.OrganizationID
		t.Scopes = a.Scopes.Scopes
	}
	// NOTE: a server that echoes its request would have the key handed out as
	// a token, or as an organization's name. What was asked for may stand in
	// the key: some keys name their organization.
	echo := c.redactor.repeats(t.Value.Reveal()) || c.redactor.repeats(a.OrganizationName)
	for _, s := range append([]string{t.OrganizationID, t.ScopesOrganizationID}, t.Scopes...) {
		echo = echo || s != asked.OrganizationID && !slices.Contains(asked.Scopes, s) && c.redactor.contains(s)
	}
	if echo {
		return nil, errors.New("it repeats the refresh key: check that token_url is Cable's")
	}
	return t, nil
}

// answered turns an answer other than 200 into an *Error.
func (c *Client) answered(resp *http.Response, raw []byte, ex *exchange) *Error {
	e := &Error{Kind: Answered, StatusCode: resp.StatusCode, MaybeMinted: ex.out.Load(), Attempts: ex.attempts}
	switch {
	case resp.StatusCode == http.StatusTooManyRequests:
		e.RetryAfter = c.hold.Remaining()
	case resp.StatusCode < 400:
		e.Kind = InvalidAnswer
		e.Detail = fmt.Sprintf("its status is %d instead of 200", resp.StatusCode)
		if resp.StatusCode >= 300 {
			e.Detail += ", and redirects are not followed: check token_url"
		}
		return e
	}
	e.Detail = c.envelope(raw)
	return e
}

// envelope returns the cleaned words of Cable's error envelope, or "".
func (c *Client) envelope(raw []byte) string {
	var env errorBody
	if len(raw) > maxErrorAnswer || json.Unmarshal(raw, &env) != nil {
		return ""
	}
	said := env.Message
	for i, e := range env.Errors {
		sep := "; "
		if i == 0 {
			sep = ": "
		}
		said += sep + strings.TrimPrefix(e.Field+": "+e.Message, ": ")
		if len(said) > 4*maxText {
			break // the rest would be cut off
		}
	}
	return c.redactor.clean(strings.TrimPrefix(said, ": "))
}

// failure turns an error of the way into an *Error: caller is the context that
// RequestToken was given, ctx the one with its budget.
func (c *Client) failure(caller, ctx context.Context, ex *exchange, err error) *Error {
	var own *Error
	if errors.As(err, &own) {
		own.Attempts = ex.attempts
		return own
	}
	e := &Error{Kind: Unreachable, Detail: describe(err), MaybeMinted: ex.out.Load(), Attempts: ex.attempts}
	where := "before a request was sent"
	if e.MaybeMinted {
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

// certPool returns the system's roots and those of text, whose PEM blocks must
// be certificates: a private key pasted along would be shown to everyone who
// may read the configuration.
func certPool(text string) (*x509.CertPool, error) {
	pool, err := x509.SystemCertPool()
	if err != nil {
		return nil, fmt.Errorf("reading the system's certificates: %w", err)
	}
	if strings.Contains(text, "PRIVATE KEY") {
		return nil, errors.New("ca_cert holds a private key: write certificates only")
	}
	rest := []byte(strings.TrimSpace(text))
	for n := 1; len(rest) > 0 || n == 1; n++ {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return nil, fmt.Errorf("ca_cert is not PEM at block %d: write one or more CERTIFICATE blocks", n)
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("ca_cert holds something other than a CERTIFICATE in block %d: write certificates only", n)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("ca_cert holds a certificate that cannot be read in block %d", n)
		}
		pool.AddCert(cert)
	}
	return pool, nil
}

// exchange follows one RequestToken over its attempts. It travels in the
// request's context, because that is all that a round trip and a repeat share.
type exchange struct {
	attempts int
	refused  int // the status of the last attempt that was refused for now
	sentAt   time.Time
	out      atomic.Bool // bytes may have gone out, and no answer says that they were refused
}

type exchangeKey struct{}

// trace returns ctx with ex in it, told by net/http when there is a connection.
func (ex *exchange) trace(ctx context.Context) context.Context {
	ctx = context.WithValue(ctx, exchangeKey{}, ex)
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		// net/http looks for another connection only if nothing went out on one.
		GetConn: func(string) { ex.out.Store(false) },
		GotConn: func(httptrace.GotConnInfo) { ex.out.Store(true) },
	})
}

// roundTripper notes when each attempt was sent, and begins the hold.
//
// NOTE: it does not embed the transport. retryablehttp closes the idle
// connections of a client after each failure, and would find the method to do
// so; under load that would make every other request reconnect.
type roundTripper struct {
	base *http.Transport
	hold *Hold
}

// RoundTrip implements [http.RoundTripper].
func (t roundTripper) RoundTrip(req *http.Request) (*http.Response, error) {
	ex, ok := req.Context().Value(exchangeKey{}).(*exchange)
	if !ok {
		return nil, errors.New("a request that is not RequestToken's")
	}
	ex.attempts++
	ex.out.Store(false)
	ex.sentAt = time.Now()
	resp, err := t.base.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	switch status := resp.StatusCode; {
	case status >= 300 && status < 400:
		// Nobody follows it, but http.Client would fail on one it cannot read.
		resp.Header.Del("Location")
		ex.out.Store(false)
	case status >= 400 && status < 500 && status != http.StatusRequestTimeout || status == http.StatusServiceUnavailable:
		// NOTE: a 408 or another 5xx does not say that nothing was minted: it may
		// be the word of a gateway that lost the answer.
		ex.out.Store(false)
		ex.refused = status
	}
	if resp.StatusCode == http.StatusTooManyRequests {
		wait, ok := retryAfter(resp)
		if !ok {
			wait = defaultHold
		}
		t.hold.begin(wait)
	}
	return resp, nil
}

// checkRepeat says whether the request may be sent again: only where nothing
// can have been minted, and where the wait fits the budget.
func checkRepeat(ctx context.Context, resp *http.Response, err error) (bool, error) {
	if err == nil && resp.StatusCode != http.StatusTooManyRequests && resp.StatusCode != http.StatusServiceUnavailable {
		return false, nil
	}
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	ex, ok := ctx.Value(exchangeKey{}).(*exchange)
	var wait time.Duration
	if err != nil {
		ok = ok && !ex.out.Load() && !isCertificateError(err) && !errors.Is(err, errNotLoopback)
	} else if ok {
		wait, ok = retryAfter(resp)
	}
	if !ok {
		return false, nil
	}
	// What repeatWait says can be longer by this: a wait that ran into the end of
	// the budget would hide what Cable had answered.
	deadline, bounded := ctx.Deadline()
	return !bounded || wait+repeatDelay<<ex.attempts < time.Until(deadline), nil
}

// repeatWait is the time before repeat n (0, 1): what Cable named, else a short
// growing one; with jitter, so that callers that failed together part.
func repeatWait(n int, resp *http.Response) time.Duration {
	wait := repeatDelay << n
	if resp != nil {
		if named, ok := retryAfter(resp); ok {
			wait = max(wait, named)
		}
	}
	return wait + jitter(repeatDelay<<n)
}

// retryAfter reads the header in both of its forms (RFC 9110, 10.2.3): seconds,
// or a date, which is taken against the Date of the same answer.
func retryAfter(resp *http.Response) (time.Duration, bool) {
	text := strings.TrimSpace(resp.Header.Get("Retry-After"))
	if seconds, err := strconv.ParseUint(text, 10, 63); err == nil {
		return time.Duration(min(seconds, uint64(MaxLife/time.Second))) * time.Second, true
	}
	at, err := http.ParseTime(text)
	if err != nil {
		return 0, false
	}
	now := date(resp)
	if now.IsZero() {
		now = time.Now()
	}
	return min(max(0, at.Sub(now)), MaxLife), true
}

// date reads the Date header, or returns the zero time.
func date(resp *http.Response) time.Time {
	t, err := http.ParseTime(resp.Header.Get("Date"))
	if err != nil {
		return time.Time{}
	}
	return t
}
