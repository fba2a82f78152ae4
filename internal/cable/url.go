// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"syscall"
)

// errNotLoopback is why a plain-http URL, whose host must be loopback, was not
// dialled: its name resolved to some other address.
var errNotLoopback = errors.New("plain http is for loopback addresses only, and the host resolves to another")

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
