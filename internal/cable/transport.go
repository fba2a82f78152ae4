// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/url"
	"syscall"
	"time"
)

const (
	// maxConns bounds the connections to Cable, and the API calls under way. It
	// exceeds the concurrent token requests of a busy mount, and keeps readers of
	// a Cable that hangs from using up the plugin's file descriptors.
	maxConns = 64

	dialTimeout    = 10 * time.Second // for TCP, and again for TLS
	pingDelay      = 10 * time.Second // without a frame, before an HTTP/2 connection is pinged: calls would wait
	pingTimeout    = 5 * time.Second  // on a dead one for minutes
	idleConnExpiry = 30 * time.Second // below the 60 s after which common load balancers drop a connection
	maxHeader      = 64 << 10         // bytes of a response's headers
	headRoom       = 4 << 10          // bytes of a request's head apart from key, URL and user agent
)

// newTransport returns the connections to u. The head of a request, of which
// the parts that vary have head bytes, fits the write buffer of a connection.
//
// The calls under way are bounded by [Client] too: net/http counts a
// connection on which the server allows no more HTTP/2 streams as closed. Its
// own bound is needed as well: it dials on after the caller has left.
func newTransport(u *url.URL, caCert string, head int) (*http.Transport, error) {
	tlsConfig := &tls.Config{MinVersion: tls.VersionTLS12, ClientSessionCache: tls.NewLRUClientSessionCache(0)}
	if caCert != "" {
		var err error
		if tlsConfig.RootCAs, err = rootsWith(caCert); err != nil {
			return nil, err
		}
	}
	dialer, proxy := &net.Dialer{Timeout: dialTimeout}, http.ProxyFromEnvironment
	if u.Scheme == "http" {
		dialer.Control, proxy = onlyLoopback, nil // a proxy would read the key
	}
	return &http.Transport{
		Proxy:                  proxy,
		DialContext:            dialer.DialContext,
		TLSClientConfig:        tlsConfig,
		TLSHandshakeTimeout:    dialTimeout,
		ForceAttemptHTTP2:      true,
		HTTP2:                  &http.HTTP2Config{SendPingTimeout: pingDelay, PingTimeout: pingTimeout},
		MaxConnsPerHost:        maxConns,
		MaxIdleConnsPerHost:    maxConns, // Go's default of 2 makes most concurrent calls reconnect
		IdleConnTimeout:        idleConnExpiry,
		WriteBufferSize:        headRoom + head, // see permit
		MaxResponseHeaderBytes: maxHeader,
		DisableCompression:     true, // responses are small, and a bomb is never unpacked
		OnProxyConnectResponse: func(_ context.Context, _ *url.URL, _ *http.Request, resp *http.Response) error {
			if resp.StatusCode != http.StatusOK {
				return proxyRefusal(resp.StatusCode)
			}
			return nil
		},
	}, nil
}

// errNotLoopback is returned for a plain-http URL whose host, which must be
// loopback, resolved to another address.
var errNotLoopback = errors.New("plain http is for loopback addresses only, and the host resolves to another")

// onlyLoopback checks the address that a name resolved to, before it is dialled.
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
