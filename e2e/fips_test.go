// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"crypto/tls"
	"debug/buildinfo"
	"encoding/pem"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/vaulttest"
)

// TestFIPS runs the plugin as `make fips` builds it, with GODEBUG=fips140=only, in a real
// server. It mints over TLS, but not from a server whose only ciphers are not in FIPS
// mode, from which the ordinary plugin does.
func TestFIPS(t *testing.T) {
	t.Parallel()
	v := ownServer(t)
	const plugin = pluginName + "-fips"
	file := filepath.Join(v.plugins, plugin)
	build := exec.Command("go", "build", "-trimpath", "-o", file, "../cmd/"+pluginName)
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFIPS140=v1.0.0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	info, err := buildinfo.ReadFile(file)
	noError(t, err)
	contains(t, info.String(), "GOFIPS140=v1.0.0")
	sum, err := vaulttest.Plugin{File: file}.Sum()
	noError(t, err)
	v.ok(t, "PUT", "sys/plugins/catalog/secret/"+plugin, map[string]any{ // OpenBao's command line takes no environment
		"sha256": sum, "command": plugin, "env": []string{"GODEBUG=fips140=only"},
	})

	sim := cabletest.NewTLSServer(t, nil)
	other := httptest.NewUnstartedServer(sim.Simulator)
	other.TLS = &tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{
		tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
	}}
	other.StartTLS()
	t.Cleanup(other.Close)
	ca := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: other.Certificate().Raw}))
	unapproved := map[string]any{"token_url": other.URL + sim.Path(), "ca_cert": ca}
	approved := map[string]any{"ca_cert": sim.CA}

	plain := v.mountAt(t, "plain", pluginName, sim)
	plain.configure(t, unapproved)
	plain.read(t)
	fips := v.mountAt(t, "fips", plugin, sim)
	fips.configure(t, unapproved)
	a := fips.do(t, "GET", "fips/creds/app", nil)
	if a.status != 502 || !strings.Contains(a.text, "handshake failure") {
		t.Errorf("from a server without a cipher of FIPS mode: %s", a)
	}
	fips.configure(t, approved)
	fips.read(t)
}
