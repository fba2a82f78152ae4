// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestCompatibilityPage checks that the table of docs/compatibility.md, which make
// compat writes, has the Vault servers that make compat builds, and that the workflow
// compat has those whose sums are pinned, and the newest of both products.
func TestCompatibilityPage(t *testing.T) {
	t.Parallel()
	list := func(file, expr string) (servers []string) {
		t.Helper()
		for _, m := range regexp.MustCompile(`(?m)`+expr).FindAllStringSubmatch(readFile(t, file), -1) {
			servers = append(servers, strings.Join(m[1:], ""))
		}
		return servers
	}
	built := list("../scripts/compat", `^  ([\d.]+)=[\d.]+$`)
	page := list("../docs/compatibility.md", `^\| Vault (\S+) \|`)
	for _, version := range built {
		if !slices.Contains(page, version) {
			t.Errorf("docs/compatibility.md has no row of Vault %s", version)
		}
	}
	var pinned []string
	const archive = `^[0-9a-f]{64}  (?:open)?(bao_|vault_)([\d.]+)_`
	for _, name := range list("../internal/vaulttest/servers.sha256", archive) {
		pinned = append(pinned, strings.NewReplacer("bao_", "openbao-", "vault_", "vault-").Replace(name))
	}
	pinned = append(pinned, "vault-newest", "openbao-newest")
	matrix := list("../.github/workflows/compat.yml", `^ +- ((?:vault|openbao)-\S+)$`)
	if diff := cmp.Diff(pinned, matrix); diff != "" || len(built) < 5 || len(pinned) < 8 {
		t.Errorf("%d built, servers (-internal/vaulttest/servers.sha256 +compat.yml):\n%s", len(built), diff)
	}
	checked := list("../tools/vault/go.mod", `^require github.com/hashicorp/vault v(.*)$`)
	contains(t, readFile(t, "../docs/compatibility.md"), "Vault "+strings.Join(checked, "")+".")
}

// TestServerDownload runs scripts/server against a vendor on loopback, with a key and
// repositories of its own.
func TestServerDownload(t *testing.T) {
	t.Parallel()
	for _, tool := range []string{"curl", "gpg", "tar"} {
		if _, err := exec.LookPath(tool); err != nil {
			skipUnlessRequired(t, err)
		}
	}
	dir := t.TempDir()
	const build = `
as() { gpg --batch --quiet --yes --homedir "$PWD/$1" "${@:2}"; }
key() { as "$1" --passphrase '' --quick-generate-key "$1@example.com" ed25519 sign never; }
sign() { as "$1" --detach-sign -o files/checksums.txt.gpgsig files/checksums.txt; }
mkdir -m 0700 vendor other
mkdir -p files openbao/openbao
key vendor && key other
as vendor --armor --export >files/openbao-gpg-pub-20240618.asc
printf '#!/bin/sh\necho a server\n' >bao && chmod +x bao
for version in 2.9.9 2.10.0 2.11.0; do tar -czf "files/openbao_${version}_linux_amd64.tar.gz" bao; done
(cd files && sha256sum openbao_2.9.9_* openbao_2.10.0_*) >files/checksums.txt
cp files/checksums.txt pins && sed -i /2.10.0/d pins
sign vendor
cd openbao/openbao && git init -q && git commit -qm one --allow-empty
for tag in v2.9.9 v2.10.0 v3.0.0-rc1 sdk/v9.9.9; do git tag "$tag"; done
gpg --homedir ../../vendor --with-colons --list-keys | awk -F: '$1 == "fpr" {print $10; exit}' >../../fingerprint
`
	bash := func(env []string, text string) (string, error) {
		cmd := exec.Command("bash", "-euo", "pipefail", "-c", text)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), env...)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	git := []string{
		"GIT_CONFIG_GLOBAL=/dev/null", "GIT_AUTHOR_NAME=t", "GIT_AUTHOR_EMAIL=t@example.com",
		"GIT_COMMITTER_NAME=t", "GIT_COMMITTER_EMAIL=t@example.com",
	}
	if out, err := bash(git, build); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	vendor := httptest.NewServer(http.FileServer(http.Dir(filepath.Join(dir, "files"))))
	t.Cleanup(vendor.Close)
	script, err := filepath.Abs("../scripts/server")
	noError(t, err)
	pins := readFile(t, filepath.Join(dir, "pins"))
	env := []string{
		"SERVER_MIRROR=" + vendor.URL, "SERVER_REPOSITORIES=" + dir, "SERVER_SUMS=" + filepath.Join(dir, "pins"),
		"SERVER_FINGERPRINT=" + strings.TrimSpace(readFile(t, filepath.Join(dir, "fingerprint"))), "SCRIPT=" + script,
	}
	const run = `out=$("$SCRIPT" $ARGS) && "$out"`
	// In this order: each changes the vendor's files for the following ones.
	for _, tt := range []struct{ change, args, want, pinned string }{
		{"", "openbao-2.9.9", "a server", ""},
		{"", "openbao-2.10.0", "openbao_2.10.0_linux_amd64.tar.gz is not in", ""},
		{"", "openbao-newest", "a server", ""},
		{"", "--pin openbao-2.11.0", "checksums.txt has no sum of openbao_2.11.0", ""},
		{"", "--pin openbao-2.10.0", "a server", "openbao_2.10.0_linux_amd64.tar.gz"},
		{"echo >>files/openbao_2.9.9_linux_amd64.tar.gz", "openbao-2.9.9", "has not the sum", ""},
		{"echo >>files/checksums.txt", "--pin openbao-2.10.0", "has no good signature", ""},
		{"sign other", "openbao-newest", "has no good signature", ""},
		{"sed -i s/^./x/ files/checksums.txt && sign vendor", "openbao-newest", "has no sum of", ""},
		{"rm files/*", "openbao-newest", "404", ""},
	} {
		if tt.pinned == "" {
			writeFile(t, filepath.Join(dir, "pins"), pins)
		}
		cache := t.TempDir()
		sign := build[strings.Index(build, "as()"):strings.Index(build, "mkdir")]
		out, err := bash(append(env, "SERVER_CACHE="+cache, "ARGS="+tt.args), sign+tt.change+"\n"+run)
		t.Logf("%s: %s", tt.args, strings.TrimSpace(out))
		if good := tt.want == "a server"; !strings.Contains(out, tt.want) || (err == nil) != good {
			t.Errorf("after %q, %s printed %q (%v), want %q", tt.change, tt.args, out, err, tt.want)
		}
		left, _ := filepath.Glob(filepath.Join(cache, "servers/*/*"))
		if len(left) != strings.Count(tt.want, "a server") {
			t.Errorf("after %q, %s left %q", tt.change, tt.args, left)
		}
		if got := readFile(t, filepath.Join(dir, "pins")); strings.Contains(got, "2.10.0") != (tt.pinned != "") {
			t.Errorf("after %q, %s left the pins %q", tt.change, tt.args, got)
		}
	}
}
