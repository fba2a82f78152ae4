// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"strings"
	"testing"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// TestCheckCACert pins that ca_cert is certificates and nothing else.
func TestCheckCACert(t *testing.T) {
	t.Parallel()
	cert := newAuthority(t).pem
	lines := strings.SplitAfter(cert, "\n")
	key := "-----BEGIN PRIVATE KEY-----\n" + cabletest.RefreshKeyMarker + "\n-----END PRIVATE KEY-----\n"
	inside := func(text string) string { return lines[0] + text + strings.Join(lines[1:], "") }
	const (
		notPEM     = "ca_cert is not PEM at block 1: write CERTIFICATE blocks only, without other text around them"
		notPEM2    = "ca_cert is not PEM at block 2: write CERTIFICATE blocks only, without other text around them"
		notBase64  = "ca_cert has a block 1 that is not base64: write CERTIFICATE blocks only, without headers"
		notCert    = "ca_cert has a block 1 that cannot be read as a certificate"
		privateKey = "ca_cert contains a private key: write certificates only"
	)
	for _, tt := range []struct{ name, text, want string }{
		{"one", cert, ""},
		{"two", cert + cert, ""},
		{"no line break at the end", strings.TrimSpace(cert), ""},
		{"white space around and between", "\n \n" + cert + "\n\t\n" + cert + "\n ", ""},
		{"lines of Windows", strings.ReplaceAll(cert, "\n", "\r\n"), ""},
		{"indented", "  " + strings.ReplaceAll(cert, "\n", "\n  "), ""},
		{"as many as are allowed", strings.Repeat(cert, maxCACerts), ""},
		{"as large as is allowed", cert + strings.Repeat(" ", maxCACert-len(cert)), ""},

		{"empty", "", notPEM},
		{"blank", " \n", notPEM},
		{"no PEM", "hello", notPEM},
		{"text before", "My CA\n" + cert, notPEM},
		{"text between", cert + "and another\n" + cert, notPEM2},
		{"text after", cert + "hello", notPEM2},
		{"text on the last line", strings.TrimSpace(cert) + "hello", notPEM2},
		{"no end", strings.Join(lines[:len(lines)-2], ""), notPEM},
		{"headers", inside("Proc-Type: 4,ENCRYPTED\n\n"), notBase64},
		{"text inside", inside("hello, world\n"), notBase64},
		{"a block inside a block", inside("hello\n" + lines[0]), notBase64},
		{"more base64 inside", inside("aGVsbG8=\n"), notBase64},
		{"more base64 in a group of its own", inside("aGVs\n"), notCert},
		{"nothing inside", lines[0] + lines[len(lines)-2], notCert},
		{"no certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", notCert},
		{"another block", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", notPEM},
		{"private key before", key + cert, privateKey},
		{"private key after", cert + key, privateKey},
		{"part of a private key", "  " + key[:40] + cert, privateKey},
		{"too many", strings.Repeat(cert, maxCACerts+1), "ca_cert contains more than 100 certificates"},
		{"too large", strings.Repeat(" ", maxCACert+1), "ca_cert has 65537 bytes: at most 65536 are allowed"},
	} {
		err := CheckCACert(tt.text)
		if err == nil && tt.want != "" || err != nil && err.Error() != tt.want {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}
