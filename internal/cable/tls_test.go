// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// authority signs certificates for this test's servers.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  string
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	a := &authority{}
	var der []byte
	a.key, der = sign(t, &x509.Certificate{
		Subject:               pkix.Name{CommonName: "authority of a test"},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}, nil)
	a.cert, _ = x509.ParseCertificate(der)
	a.pem = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	return a
}

// issue returns a server's certificate for 127.0.0.1, changed by change.
func (a *authority) issue(t testing.TB, change func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	leaf := &x509.Certificate{
		Subject:     pkix.Name{CommonName: "server of a test"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if change != nil {
		change(leaf)
	}
	key, der := sign(t, leaf, a)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func sign(t testing.TB, cert *x509.Certificate, by *authority) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert.SerialNumber = big.NewInt(time.Now().UnixNano())
	if cert.NotAfter.IsZero() {
		cert.NotBefore, cert.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	}
	parent, parentKey := cert, key
	if by != nil {
		parent, parentKey = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, parent, key.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	return key, der
}

// newTLSServer serves a simulator with a TLS configuration of the test's own.
func newTLSServer(t testing.TB, config *tls.Config) (sim *cabletest.Simulator, url string) {
	t.Helper()
	sim = cabletest.New(nil)
	srv := httptest.NewUnstartedServer(sim)
	srv.TLS = config
	srv.Config.ErrorLog = log.New(io.Discard, "", 0) // refused handshakes
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return sim, srv.URL + sim.Path()
}

// TestTLS pins which servers get the key: those whose certificate holds, over
// TLS 1.2 or later. No other server sees a request, and a certificate that is
// refused once is not tried again.
func TestTLS(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	good := ca.issue(t, nil)
	for _, tt := range []struct {
		name     string
		config   *tls.Config
		noCA     bool   // the client does not know the authority
		refused  string // the detail; "" where a token comes
		attempts int
	}{
		{name: "TLS 1.2", config: &tls.Config{Certificates: []tls.Certificate{good}, MaxVersion: tls.VersionTLS12}, attempts: 1},
		{name: "TLS 1.3", config: &tls.Config{Certificates: []tls.Certificate{good}, MinVersion: tls.VersionTLS13}, attempts: 1},
		{
			name: "TLS 1.1", config: &tls.Config{Certificates: []tls.Certificate{good}, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11},
			refused: "the TLS handshake failed: protocol version not supported", attempts: 3,
		},
		{
			name: "unknown authority", config: &tls.Config{Certificates: []tls.Certificate{good}}, noCA: true,
			refused: "its certificate is signed by an unknown authority: set ca_cert to the authority's certificate", attempts: 1,
		},
		{
			name: "another authority", config: &tls.Config{Certificates: []tls.Certificate{newAuthority(t).issue(t, nil)}},
			refused: "its certificate is signed by an unknown authority: set ca_cert to the authority's certificate", attempts: 1,
		},
		{
			name: "expired", config: &tls.Config{Certificates: []tls.Certificate{ca.issue(t, func(c *x509.Certificate) {
				c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
			})}},
			refused: "its certificate has expired or is not yet valid", attempts: 1,
		},
		{
			name: "not yet valid", config: &tls.Config{Certificates: []tls.Certificate{ca.issue(t, func(c *x509.Certificate) {
				c.NotBefore, c.NotAfter = time.Now().Add(time.Hour), time.Now().Add(2*time.Hour)
			})}},
			refused: "its certificate has expired or is not yet valid", attempts: 1,
		},
		{
			name: "another host", config: &tls.Config{Certificates: []tls.Certificate{ca.issue(t, func(c *x509.Certificate) {
				c.IPAddresses, c.DNSNames = nil, []string{"api.cable.tech"}
			})}},
			refused: `its certificate is not valid for the host "127.0.0.1"`, attempts: 1,
		},
		{
			name: "a client's certificate", config: &tls.Config{Certificates: []tls.Certificate{ca.issue(t, func(c *x509.Certificate) {
				c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
			})}},
			refused: "its certificate is not valid for this use", attempts: 1,
		},
		{
			name: "an extension that nobody knows", config: &tls.Config{Certificates: []tls.Certificate{ca.issue(t, func(c *x509.Certificate) {
				c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 3, 6, 1, 4, 1, 99999, 1}, Critical: true, Value: []byte{5, 0}}}
			})}},
			refused: "its certificate could not be verified", attempts: 1,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			sim, url := newTLSServer(t, tt.config)
			cfg := cable.Config{RefreshKey: cable.NewSecret(sim.RefreshKey()), TokenURL: url, CACert: ca.pem}
			if tt.noCA {
				cfg.CACert = ""
			}
			c := newClientAt(t, cfg)
			if tt.refused == "" {
				if got := mints(t, c); got.Attempts != tt.attempts {
					t.Errorf("%d attempts, want %d", got.Attempts, tt.attempts)
				}
				return
			}
			e := fails(t, t.Context(), c)
			want := &cable.Error{Kind: cable.Unreachable, Detail: tt.refused, Attempts: tt.attempts}
			if diff := cmp.Diff(want, e); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
			if n := sim.CallCount(); n != 0 {
				t.Errorf("the server saw %d requests", n)
			}
		})
	}
}

// TestClientCertificate pins what is said where the server wants a
// certificate of the client, which TLS 1.3 tells only after the request.
func TestClientCertificate(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	sim, url := newTLSServer(t, &tls.Config{Certificates: []tls.Certificate{ca.issue(t, nil)}, ClientAuth: tls.RequireAnyClientCert})
	c := newClientAt(t, cable.Config{TokenURL: url, CACert: ca.pem})
	e := fails(t, t.Context(), c)
	// The alert races with the write that the other side's closing breaks.
	if e.Kind != cable.Unreachable || !strings.Contains(e.Detail, "certificate required") && !strings.Contains(e.Detail, "connection was closed") {
		t.Errorf("got %s: %s", e.Kind, e)
	}
	if n := sim.CallCount(); n != 0 {
		t.Errorf("the server saw %d requests", n)
	}
}

// TestCACert pins that ca_cert adds an authority, and that the
// simulator's certificate, which is its own authority, does as one.
func TestCACert(t *testing.T) {
	t.Parallel()
	srv := cabletest.NewTLSServer(t, nil)
	if e := fails(t, t.Context(), newClient(t, srv, cable.Config{})); !strings.Contains(e.Detail, "set ca_cert") || e.Attempts != 1 {
		t.Errorf("without ca_cert: %s, %d attempts", e, e.Attempts)
	}
	sees(t, srv, 0, 0)
	other := newAuthority(t).pem
	for _, pem := range []string{srv.CA, other + srv.CA, srv.CA + other} {
		mints(t, newClient(t, srv, cable.Config{CACert: pem}))
	}
	sees(t, srv, 3, 3)
}

// TestSchemeMismatch pins the two mistakes in a token_url's scheme.
func TestSchemeMismatch(t *testing.T) {
	t.Parallel()
	t.Run("https to a plain port", func(t *testing.T) {
		t.Parallel()
		srv := cabletest.NewServer(t, nil)
		c := newClient(t, srv, cable.Config{TokenURL: strings.Replace(srv.URL, "http:", "https:", 1)})
		e := fails(t, t.Context(), c)
		if diff := cmp.Diff(&cable.Error{Kind: cable.Unreachable, Detail: "it does not speak TLS", Attempts: 3}, e); diff != "" {
			t.Errorf("error (-want +got):\n%s", diff)
		}
		sees(t, srv, 0, 0)
	})
	t.Run("https to something else", func(t *testing.T) {
		t.Parallel()
		url, _ := rawServer(t, func(c net.Conn) { _, _ = c.Write(bytes.Repeat([]byte("SSH-2.0 "), 10)) })
		e := fails(t, t.Context(), newClientAt(t, cable.Config{TokenURL: strings.Replace(url, "http:", "https:", 1)}))
		if diff := cmp.Diff(&cable.Error{Kind: cable.Unreachable, Detail: "it does not speak TLS", Attempts: 3}, e); diff != "" {
			t.Errorf("error (-want +got):\n%s", diff)
		}
	})
	t.Run("http to a TLS port", func(t *testing.T) {
		t.Parallel()
		sim, url := newTLSServer(t, nil)
		e := fails(t, t.Context(), newClientAt(t, cable.Config{TokenURL: strings.Replace(url, "https:", "http:", 1)}))
		if e.Kind != cable.Responded || e.StatusCode != http.StatusBadRequest || sim.CallCount() != 0 {
			t.Errorf("got %s", e)
		}
	})
}

// pemOf returns cert as PEM.
func pemOf(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}
