// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
)

const (
	maxCACert  = 64 << 10 // bytes
	maxCACerts = 100
	pemBegin   = "-----BEGIN CERTIFICATE-----"
	pemEnd     = "-----END CERTIFICATE-----"
)

// CheckCACert returns an error unless text is a valid ca_cert, namely 1 to 100 certificates in PEM, in at most 64 KiB,
// with nothing but white space before, between and after them. It is returned to everyone who may read the
// configuration, so that a private key pasted along would be shown to them. The error repeats nothing of text.
func CheckCACert(text string) error {
	_, err := parseCACert(text)
	return err
}

// rootsWith returns the system's root certificates and those of text.
func rootsWith(text string) (*x509.CertPool, error) {
	certs, err := parseCACert(text)
	if err != nil {
		return nil, err
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		return nil, fmt.Errorf("reading the system's certificates: %w", err)
	}
	for _, cert := range certs {
		pool.AddCert(cert)
	}
	return pool, nil
}

// parseCACert returns the certificates in text.
//
// NOTE: pem.Decode is not used, because it skips text before, between and inside blocks.
func parseCACert(text string) ([]*x509.Certificate, error) {
	if len(text) > maxCACert {
		return nil, fmt.Errorf("ca_cert has %d bytes: at most %d are allowed", len(text), maxCACert)
	}
	if strings.Contains(text, "PRIVATE KEY") {
		return nil, errors.New("ca_cert contains a private key: write certificates only")
	}
	var certs []*x509.Certificate
	for rest := strings.TrimSpace(text); rest != "" || len(certs) == 0; rest = strings.TrimSpace(rest) {
		n := len(certs) + 1
		if n > maxCACerts {
			return nil, fmt.Errorf("ca_cert contains more than %d certificates", maxCACerts)
		}
		block, found := strings.CutPrefix(rest, pemBegin)
		if found {
			block, rest, found = strings.Cut(block, pemEnd)
		}
		if !found {
			return nil, fmt.Errorf("ca_cert is not PEM at block %d: "+
				"write CERTIFICATE blocks only, without other text around them", n)
		}
		der, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(block), ""))
		if err != nil {
			return nil, fmt.Errorf("ca_cert has a block %d that is not base64: "+
				"write CERTIFICATE blocks only, without headers", n)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("ca_cert has a block %d that cannot be read as a certificate", n)
		}
		certs = append(certs, cert)
	}
	return certs, nil
}
