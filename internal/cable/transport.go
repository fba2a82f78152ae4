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
	// maxConns bounds the connections to Cable, and the API calls under way. It exceeds the concurrent token requests
	// of a busy mount, and keeps readers of a Cable that hangs from using up the plugin's file descriptors.
	maxConns = 64

	dialTimeout    = 10 * time.Second // for TCP, and again for TLS
	idleConnExpiry = 30 * time.Second // below the 60 s after which common load balancers drop a connection
	maxHeader      = 64 << 10         // bytes of a response's headers
	headRoom       = 4 << 10          // bytes of a request apart from key, URL, user agent and body
)

// newTransport returns the transport to u, through proxy if that is not nil. The variable parts of a request's head
// have head bytes.
//
// Only HTTP/1.1 is spoken, because with HTTP/2 net/http does not say whether the server processed a call.
// MaxConnsPerHost bounds the connections. The bound on calls, in [Client], does not, because net/http continues to dial
// after the caller has left.
func newTransport(u, proxy *url.URL, caCert string, head int) (*http.Transport, error) {
	tlsConfig := &tls.Config{
		MinVersion:           tls.VersionTLS12,
		NextProtos:           []string{"http/1.1"},
		ClientSessionCache:   tls.NewLRUClientSessionCache(0),
		GetClientCertificate: noCertificate,
	}
	if caCert != "" {
		var err error
		if tlsConfig.RootCAs, err = rootsWith(caCert); err != nil {
			return nil, err
		}
	}
	dialer := &net.Dialer{Timeout: dialTimeout}
	if u.Scheme == "http" {
		dialer.Control = onlyLoopback
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	return &http.Transport{
		Proxy:                  http.ProxyURL(proxy), // proxies come from the environment, see environmentProxy
		DialContext:            counted(dialer.DialContext),
		TLSClientConfig:        tlsConfig,
		TLSHandshakeTimeout:    dialTimeout,
		Protocols:              protocols,
		MaxConnsPerHost:        maxConns,
		MaxIdleConnsPerHost:    maxConns, // Go's default of 2 makes most concurrent calls reconnect
		IdleConnTimeout:        idleConnExpiry,
		WriteBufferSize:        headRoom + head, // see exchange
		MaxResponseHeaderBytes: maxHeader,
		OnProxyConnectResponse: func(_ context.Context, _ *url.URL, _ *http.Request, resp *http.Response) error {
			if resp.StatusCode != http.StatusOK {
				return refusedByProxy(resp.StatusCode)
			}
			return nil
		},
	}, nil
}

type dialFunc = func(ctx context.Context, network, address string) (net.Conn, error)

// counted returns a dial whose connections count the bytes that are written to them.
func counted(dial dialFunc) dialFunc {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return &countingConn{Conn: conn}, nil
	}
}

// errNotLoopback is returned for a plain-http URL whose host, which must be loopback, resolved to another address.
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
