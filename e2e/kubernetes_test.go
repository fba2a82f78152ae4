// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/vaulttest"
)

// authPlugin is Vault's auth method for Kubernetes, which the server of these
// tests does not have built in.
const authPlugin = "vault-plugin-auth-kubernetes"

// kubernetes is the API of a cluster, made of etcd and the API server, with a
// Vault that has the mount cable/ and the auth plugin, and a shell for the admin
// of both in a copy of examples/kubernetes. There are no nodes and no controllers,
// so a Deployment makes no pod.
type kubernetes struct {
	*shell
	m *mount
}

// newKubernetes starts all of it for one test. It does not log in anywhere.
func newKubernetes(t *testing.T) *kubernetes {
	t.Helper()
	bin := needTool(t, "kubernetes")
	needVault(t)
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }

	// etcd, and the API server with a self-signed certificate and one admin.
	client, peer, port := freePort(t), freePort(t), freePort(t)
	etcd := fmt.Sprintf("http://127.0.0.1:%d", client)
	runUntilEnd(t, t.TempDir(), os.Environ(), filepath.Join(bin, "server"),
		"--data-dir="+file("etcd"), "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls="+etcd, "--advertise-client-urls="+etcd,
		fmt.Sprintf("--listen-peer-urls=http://127.0.0.1:%d", peer))
	accounts, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	noError(t, err)
	write := func(name, text string) { writeFile(t, file(name), text) }
	write("accounts.key", privateKey(t, accounts))
	admin := rand.Text()
	write("tokens.csv", admin+`,admin,admin,"system:masters"`+"\n")
	runUntilEnd(t, t.TempDir(), os.Environ(), filepath.Join(bin, "kube-apiserver"),
		"--etcd-servers="+etcd, "--bind-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", port),
		"--cert-dir="+file("certificates"), "--token-auth-file="+file("tokens.csv"), "--authorization-mode=RBAC",
		"--service-cluster-ip-range=10.0.0.0/24", "--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file="+file("accounts.key"),
		"--service-account-signing-key-file="+file("accounts.key"))
	server := fmt.Sprintf("https://127.0.0.1:%d", port)
	var ca []byte
	waitFor(t, time.Minute, "the API server's certificate", func() bool {
		ca, err = os.ReadFile(file("certificates/apiserver.crt"))
		return err == nil && bytes.Count(ca, []byte("END CERTIFICATE")) == 2 // its own, and the root
	})
	write("kubeconfig", fmt.Sprintf(`
apiVersion: v1
kind: Config
current-context: test
contexts: [{name: test, context: {cluster: test, user: admin}}]
clusters: [{name: test, cluster: {server: %q, certificate-authority-data: %s}}]
users: [{name: admin, user: {token: %s}}]
`, server, base64.StdEncoding.EncodeToString(ca), admin))

	// Vault, with both plugins in its folder.
	v := ownServer(t)
	plugin := vaulttest.Plugin{Name: "kubernetes", File: filepath.Join(v.plugins, authPlugin)}
	must(t, "install", "-m", "0700", filepath.Join(bin, authPlugin), plugin.File)
	sum, err := plugin.Sum()
	noError(t, err)
	v.ok(t, "POST", "sys/plugins/catalog/auth/kubernetes", map[string]any{"sha256": sum, "command": authPlugin})
	m := newMountOf(t, v)

	k := &kubernetes{shell: newShell(t, v, map[string]string{"kubectl": filepath.Join(bin, "kubectl")}), m: m}
	k.env = append(k.env, "KUBECONFIG="+file("kubeconfig"), "NO_PROXY=127.0.0.1")
	noError(t, os.CopyFS(k.dir, os.DirFS("../examples/kubernetes")))
	k.run("address=http://vault.vault.svc:8200; sed -i \"s|$address|$VAULT_ADDR|\" $(grep -rl $address *)")
	waitFor(t, time.Minute, "the API server is ready", func() bool {
		_, err := k.try("kubectl get --raw /readyz")
		return err == nil
	})
	return k
}

// setUp follows the README of examples/kubernetes, which makes the cluster known to
// Vault.
func (k *kubernetes) setUp(t *testing.T) {
	t.Helper()
	k.runPage("examples/kubernetes/README.md", map[string]step{
		"Vault/1": {want: []string{"Success! Uploaded policy: reports"}},
		"Kubernetes auth/1": {want: []string{
			"namespace/reports created", "serviceaccount/reports created", "Success! Enabled kubernetes auth method",
		}},
		"Kubernetes auth/3": {want: []string{
			"clusterrolebinding.rbac.authorization.k8s.io/vault-reviewer created",
			"Success! Data written to: auth/kubernetes/config",
		}},
		"Kubernetes auth/4": {want: []string{"Success! Data written to: auth/kubernetes/role/reports"}},
		"Kubernetes auth/5": {want: []string{`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$`}},
	})
	if t.Failed() {
		t.FailNow()
	}
	k.share(t, "0")
}

// share sets the role's reuse_for. The tests count mints without it.
func (k *kubernetes) share(t *testing.T, reuse string) {
	t.Helper()
	k.m.ok(t, "POST", "cable/roles/reports", map[string]any{"reuse_for": reuse})
}

// wait runs kubectl until done accepts its output, and returns that.
func (k *kubernetes) wait(t *testing.T, what, command string, done func(out string) bool) (out string) {
	t.Helper()
	waitFor(t, 90*time.Second, what, func() bool {
		var err error
		out, err = k.try(command)
		return err == nil && done(out)
	})
	return out
}

// secret returns the data of a Secret, or nil if there is none.
func (k *kubernetes) secret(name string) map[string]string {
	out, err := k.try(`kubectl --namespace reports get secret ` + name +
		` --output 'go-template={{range $k, $v := .data}}{{$k}}={{base64decode $v}}{{"\n"}}{{end}}'`)
	if err != nil {
		return nil
	}
	data := map[string]string{}
	for line := range strings.Lines(out) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		data[key] = value
	}
	return data
}

// applyCRDs applies the CRDs that a module of the consumers has in a file or folder.
func (k *kubernetes) applyCRDs(t *testing.T, module, path string) {
	t.Helper()
	dir, err := run("go", "-C", "../examples/tools/consumers", "list", "-m", "-f", "{{.Dir}}", module)
	noError(t, err)
	// Some are too large for the annotation that a client-side apply adds.
	k.run("kubectl apply --server-side -f '" + filepath.Join(strings.TrimSpace(dir), path) + "'")
	k.run("kubectl wait --for=condition=Established crd --all")
}

// consumer runs a program of the cluster until the test ends or stop is called.
// It is admin of the cluster, and does not have the shell's Vault token, because
// Vault's client, and so External Secrets, would prefer that to logging in.
func (k *kubernetes) consumer(t *testing.T, name string, args ...string) (stop func()) {
	t.Helper()
	stop, _ = runUntilEnd(t, t.TempDir(), slices.Concat(k.env, []string{"VAULT_TOKEN=", "VAULT_ADDR="}), name, args...)
	return stop
}

// privateKey is a key as PEM.
func privateKey(t *testing.T, key *ecdsa.PrivateKey) string {
	t.Helper()
	der, err := x509.MarshalECPrivateKey(key)
	noError(t, err)
	return string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}))
}
