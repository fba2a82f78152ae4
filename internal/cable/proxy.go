// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"fmt"
	"net/url"
	"os"
	"slices"
	"strings"

	"golang.org/x/net/http/httpproxy"
)

// environmentProxy returns the proxy for u from the environment, nil for none, or a badProxy. Proxies come from the
// environment alone: HTTPS_PROXY before https_proxy, unless NO_PROXY (before no_proxy) exempts the host. A plain-http
// URL, which is loopback, has none, because a proxy would read the key. ALL_PROXY is not read.
//
// NOTE: http.ProxyFromEnvironment is not used, because it ignores a variable that it cannot parse, and the key would go
// direct.
func environmentProxy(u *url.URL) (*url.URL, error) {
	name, value := getenv("HTTPS_PROXY", "https_proxy")
	if value == "" || u.Scheme != "https" {
		return nil, nil
	}
	// The host is exempt or not, whatever the variable is.
	_, exempt := getenv("NO_PROXY", "no_proxy")
	exemptions := httpproxy.Config{HTTPSProxy: "any", NoProxy: exempt}
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
		return nil, badProxy(name)
	}
	return proxy, nil
}

// getenv returns the first of these environment variables that is not empty.
//
// NOTE: httpproxy.FromEnvironment prefers the lower case in some versions.
func getenv(names ...string) (name, value string) {
	for _, name = range names {
		if value = os.Getenv(name); value != "" {
			break
		}
	}
	return name, value
}

// badProxy is the name of an environment variable that does not name a proxy.
type badProxy string

// Error implements error. It does not repeat the variable's value, which may contain a password.
func (name badProxy) Error() string {
	return fmt.Sprintf("the environment variable %s does not name a proxy: "+
		"write [scheme://][user:password@]host[:port] with the scheme http, https, socks5 or socks5h, "+
		"and %%-encode special characters in the password", string(name))
}

// refusedByProxy is the status with which a proxy refused a CONNECT.
type refusedByProxy int

// Error implements error.
func (status refusedByProxy) Error() string {
	return fmt.Sprintf("the environment's proxy refused to connect, with status %d", int(status))
}
