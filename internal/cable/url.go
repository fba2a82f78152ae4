// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"strconv"
	"strings"
)

const (
	maxTokenURL = 2048 // bytes
	maxHostname = 100  // bytes of a host name that an error repeats
	exampleURL  = "write the whole endpoint, such as " + DefaultTokenURL
)

// ParseTokenURL parses a token endpoint. It must be https, or http to a loopback host, in at most 2048 bytes, with
// scheme, host, port and path, without user info, query, fragment or IPv6 zone. The error repeats nothing of raw but a
// host that [HostForDisplay] shows.
func ParseTokenURL(raw string) (*url.URL, error) {
	if len(raw) > maxTokenURL {
		return nil, fmt.Errorf("token_url has %d bytes: at most %d are allowed", len(raw), maxTokenURL)
	}
	u, err := url.Parse(raw)
	switch {
	case strings.ContainsFunc(raw, func(c rune) bool { return c <= ' ' || c == 0x7f || c == '\\' }):
		return nil, errors.New("token_url must not contain white space, control characters or backslashes")
	case err != nil:
		return nil, errors.New("token_url is not a URL: " + exampleURL)
	case u.Scheme != "https" && u.Scheme != "http":
		return nil, errors.New("token_url must begin with https:// (http:// for a loopback host only): " + exampleURL)
	case u.Hostname() == "":
		return nil, errors.New("token_url names no host: " + exampleURL)
	case u.User != nil:
		return nil, errors.New("token_url must not contain a user name or password: " +
			"the refresh key goes into refresh_key")
	case strings.ContainsAny(raw, "?#"):
		return nil, errors.New("token_url must not contain a query or a fragment: write scheme, host and path only")
	case strings.Contains(u.Hostname(), "%"):
		return nil, errors.New("token_url must not contain an IPv6 zone")
	case !validPort(u):
		return nil, errors.New("token_url names a port that is not a number from 1 to 65535")
	case !validHost(u.Hostname()):
		return nil, errors.New("token_url names a host with characters other than letters, digits, dots, hyphens and " +
			"underscores: write an international name in its xn-- form")
	case u.Scheme == "http" && !isLoopback(u.Hostname()):
		return nil, fmt.Errorf("token_url uses plain http for %s: "+
			"only a loopback host (localhost, 127.0.0.0/8, [::1]) may go without https", displayHost(u.Hostname()))
	}
	return u, nil
}

// validHost reports whether host is an address or a name as it is looked up, so that a reader of the configuration
// reads the name that is called.
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

// isLoopback reports whether host means this machine without a look-up. RFC 6761 reserves localhost for that.
func isLoopback(host string) bool {
	if strings.EqualFold(host, "localhost") {
		return true
	}
	addr, _ := netip.ParseAddr(host)
	return addr.Unmap().IsLoopback()
}

// HostForDisplay returns the host of u with its port, such as "api.cable.tech:8443" or "[::1]:8200", for an error, a
// warning or a log. A host that has the shape of a secret, which the operator may have written into the wrong field, is
// described by its length, as "a host of 40 characters".
func HostForDisplay(u *url.URL) string {
	if host := displayHost(u.Hostname()); host != u.Hostname() || !validPort(u) {
		return host
	}
	return u.Host
}

var hostname = regexp.MustCompile(`^([a-z0-9-]{1,40}\.)+[a-z]{1,40}$`) // names that cannot be a secret

// displayHost returns host if no secret has such a shape, because it is a name in lower case with a dot,
// localhost, or an address without a zone. Otherwise it describes host by its length.
func displayHost(host string) string {
	addr, err := netip.ParseAddr(host)
	if host == "localhost" || err == nil && addr.Zone() == "" ||
		len(host) <= maxHostname && hostname.MatchString(host) {
		return host
	}
	return fmt.Sprintf("a host of %d characters", len(host))
}
