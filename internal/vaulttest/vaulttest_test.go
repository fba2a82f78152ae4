// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package vaulttest

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// TestMain runs a stand-in for a server if FAKE_SERVER has its name and the path that
// it refuses.
func TestMain(m *testing.M) {
	if fake := os.Getenv("FAKE_SERVER"); fake != "" {
		fakeServer(strings.Fields(fake))
		return
	}
	os.Exit(m.Run())
}

// fakeServer prints its version, or responds as a server in dev mode does. Like
// OpenBao, it enables no audit device unless its configuration allows that.
func fakeServer(fake []string) {
	if os.Args[1] == "version" {
		fmt.Printf("%s v2.5.0, built 2026-01-01T00:00:00Z\n", fake[0])
		return
	}
	config, addr := "", ""
	for _, arg := range os.Args {
		if file, ok := strings.CutPrefix(arg, "-config="); ok {
			text, _ := os.ReadFile(file)
			config = string(text)
		}
		if a, ok := strings.CutPrefix(arg, "-dev-listen-address="); ok {
			addr = a
		}
	}
	_ = os.WriteFile(filepath.Join(os.Getenv("HOME"), "pid"), []byte(strconv.Itoa(os.Getpid())), 0o600)
	fmt.Fprintln(os.Stderr, http.ListenAndServe(addr, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		audit := strings.HasPrefix(r.URL.Path, "/v1/sys/audit/")
		switch {
		case len(fake) > 1 && strings.HasPrefix(r.URL.Path, fake[1]):
			http.Error(w, `{"errors":["refused"]}`, http.StatusBadRequest)
		case audit && fake[0] == "OpenBao" != strings.Contains(config, "\nunsafe_allow_api_audit_creation = true\n"):
			http.Error(w, `{"errors":["cannot enable audit device via API"]}`, http.StatusBadRequest)
		}
	})))
}

// TestStart starts stand-ins for the servers that cannot be had here.
func TestStart(t *testing.T) {
	for _, tt := range []struct {
		fake, prefix string
		want         string // of the error
	}{
		{fake: "OpenBao", prefix: "s."},
		{fake: "Vault", prefix: "hvs."},
		{fake: "Consul", want: "is neither Vault nor OpenBao: its version is \"Consul v2.5.0"},
		{
			fake: "Vault /v1/sys/plugins/",
			want: `setting up Vault: PUT sys/plugins/catalog/secret/p: HTTP 400 {"errors":["refused"]}`,
		},
		{fake: "OpenBao /v1/sys/audit/", want: "setting up OpenBao: PUT sys/audit/file: HTTP 400"},
	} {
		t.Run(tt.fake, func(t *testing.T) {
			t.Setenv("FAKE_SERVER", tt.fake)
			dir := t.TempDir()
			s, err := Start(t.Context(), Config{
				Binary: os.Args[0], Dir: dir, Audit: filepath.Join(dir, "audit.log"),
				Plugins: []Plugin{{Name: "p", File: os.Args[0]}},
			})
			t.Log(err)
			if err == nil {
				got := []string{string(s.Product), s.Version, s.Product.TokenPrefix()}
				if tt.want != "" || !slices.Equal(got, []string{tt.fake, "2.5.0", tt.prefix}) {
					t.Errorf("started %s %s, want %q", s.Product, s.Version, tt.want)
				}
				s.Stop()
			} else if tt.want == "" || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
			if text, err := os.ReadFile(filepath.Join(dir, "pid")); err == nil {
				pid, _ := strconv.Atoi(string(text))
				if p, err := os.FindProcess(pid); err == nil && p.Signal(syscall.Signal(0)) == nil {
					t.Errorf("process %d is left", pid)
				}
			}
		})
	}
}

// TestProduct checks that a feature that a server lacks has a reason, and that a 404 is
// accepted only if it comes from a standby that does not yet know the mount.
func TestProduct(t *testing.T) {
	lacking := map[string][]Feature{
		"Vault 1.16.3":  {DeclaredPlugins, Namespaces, RenewalThreshold},
		"Vault 1.21.1":  {DeclaredPlugins, Namespaces},
		"OpenBao 2.4.4": {DeclaredPlugins, MemoryLock, PinnedVersions, RenewalThreshold},
		"OpenBao 2.6.2": {MemoryLock, PinnedVersions, RenewalThreshold},
	}
	for server, features := range lacking {
		product, version, _ := strings.Cut(server, " ")
		for f := MemoryLock; f <= Namespaces; f++ {
			if got := Product(product).Lacks(version, f); (got != "") != slices.Contains(features, f) {
				t.Errorf("%s lacks feature %d: %q", server, f, got)
			}
		}
	}
	if OpenBao.ReloadsOneNode("2.4.4") || !OpenBao.ReloadsOneNode("2.10.0") || Vault.ReloadsOneNode("2.0.0") {
		t.Error("OpenBao 2.5 and later reload one node, and no other server")
	}
	const unknown = `{"errors":["no handler for route \"cable/config\". route entry not found."]}`
	if !OpenBao.Unaware(404, unknown) || Vault.Unaware(404, unknown) ||
		OpenBao.Unaware(404, `{"errors":[]}`) || OpenBao.Unaware(500, unknown) {
		t.Error("only a 404 of OpenBao for an unknown mount is that of a standby")
	}
}
