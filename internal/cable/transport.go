// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/net/http/httpproxy"
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

// newTransport returns the transport to u, and whether it leads through a proxy. The variable parts of a request's head
// have head bytes.
//
// Only HTTP/1.1 is spoken, because with HTTP/2 net/http does not say whether the server processed a call.
// MaxConnsPerHost bounds the connections. The bound on calls, in [Client], does not, because net/http continues to dial
// after the caller has left.
func newTransport(u *url.URL, caCert string, head int) (t *http.Transport, proxied bool, err error) {
	var roots *x509.CertPool // the system's
	if caCert != "" {
		if roots, err = rootsWith(caCert); err != nil {
			return nil, false, err
		}
	}
	dialer := &net.Dialer{Timeout: dialTimeout}
	if u.Scheme == "http" {
		dialer.Control = onlyLoopback
	}
	// A proxy that cannot be used fails each call, not New, so that the configuration can be written.
	proxy, badProxy := environmentProxy(u)
	t = &http.Transport{
		Proxy:       func(*http.Request) (*url.URL, error) { return proxy, badProxy },
		DialContext: counted(dialer.DialContext),
		TLSClientConfig: &tls.Config{
			RootCAs:              roots,
			MinVersion:           tls.VersionTLS12,
			NextProtos:           []string{"http/1.1"},
			ClientSessionCache:   tls.NewLRUClientSessionCache(0),
			GetClientCertificate: noCertificate,
		},
		TLSHandshakeTimeout:    dialTimeout,
		Protocols:              new(http.Protocols),
		MaxConnsPerHost:        maxConns,
		MaxIdleConnsPerHost:    maxConns, // Go's default of 2 makes most concurrent calls reconnect
		IdleConnTimeout:        idleConnExpiry,
		WriteBufferSize:        headRoom + head, // see exchange
		MaxResponseHeaderBytes: maxHeader,
		OnProxyConnectResponse: func(_ context.Context, _ *url.URL, _ *http.Request, resp *http.Response) error {
			if resp.StatusCode != http.StatusOK {
				return &knownError{text: fmt.Sprintf(
					"the environment's proxy refused to connect, with status %d", resp.StatusCode)}
			}
			return nil
		},
	}
	t.Protocols.SetHTTP1(true)
	return t, proxy != nil, nil
}

// environmentProxy returns the proxy for u, nil for none. Proxies come from the environment alone: HTTPS_PROXY before
// https_proxy, unless NO_PROXY (before no_proxy) exempts the host. A plain-http URL, which is loopback, has none,
// because a proxy would read the key. ALL_PROXY is not read.
//
// NOTE: http.ProxyFromEnvironment is not used, because it ignores a variable that it cannot parse, and the key would go
// direct; nor httpproxy.FromEnvironment, because it prefers the lower case in some versions.
func environmentProxy(u *url.URL) (*url.URL, error) {
	name := "HTTPS_PROXY"
	if os.Getenv(name) == "" {
		name = "https_proxy"
	}
	value := os.Getenv(name)
	if value == "" || u.Scheme != "https" {
		return nil, nil
	}
	// The host is exempt or not, whatever the variable is.
	noProxy := cmp.Or(os.Getenv("NO_PROXY"), os.Getenv("no_proxy"))
	exemptions := httpproxy.Config{HTTPSProxy: "any", NoProxy: noProxy}
	if applies, err := exemptions.ProxyFunc()(u); applies == nil {
		return nil, err
	}
	if !strings.Contains(value, "://") {
		value = "http://" + value
	}
	proxy, err := url.Parse(value)
	if err != nil || !slices.Contains([]string{"http", "https", "socks5", "socks5h"}, proxy.Scheme) ||
		proxy.Hostname() == "" || !validHost(proxy.Hostname()) || !validPort(proxy) ||
		strings.TrimPrefix(proxy.Path, "/") != "" || strings.ContainsAny(value, "?#") {
		return nil, &knownError{fmt.Sprintf(notAProxy, name), true}
	}
	return proxy, nil
}

// notAProxy is the error for a variable of this name. It does not repeat the value, which may contain a password.
const notAProxy = "the environment variable %s does not name a proxy: " +
	"write [scheme://][user:password@]host[:port] with the scheme http, https, socks5 or socks5h, " +
	"and %%-encode special characters in the password"

type dialFunc = func(ctx context.Context, network, address string) (net.Conn, error)

// counted returns a dial that tells the call how far it has come, and whose connections count the bytes written to
// them.
func counted(dial dialFunc) dialFunc {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		if x, ok := ctx.Value(exchangeKey{}).(*exchange); ok {
			ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
				DNSStart:     func(httptrace.DNSStartInfo) { x.reached(atLookup) },
				ConnectStart: func(string, string) { x.reached(atConnect) },
			})
		}
		conn, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return &countingConn{Conn: conn}, nil
	}
}

// onlyLoopback checks the address that the host of a plain-http URL, which must be loopback, resolved to, before it is
// dialled.
func onlyLoopback(_, address string, _ syscall.RawConn) error {
	if addr, _ := netip.ParseAddrPort(address); !addr.Addr().Unmap().IsLoopback() {
		return &knownError{"plain http is for loopback addresses only, and the host resolves to another", true}
	}
	return nil
}
