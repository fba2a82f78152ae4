// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/hcl/hcl/ast"
	"github.com/hashicorp/hcl/hcl/parser"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/vaulttest"
)

// openBaoFields are the fields that OpenBao's documents name, of a configuration
// ("") and of the blocks in it, as far as the pages use them. The data of a request
// is free, but for the objects that are evaluated ("eval").
var openBaoFields = map[string]string{
	"": "plugin_directory plugin_auto_download plugin_auto_register plugin_download_behavior plugin initialize " +
		"disable_standby_reads default_max_request_duration unsafe_allow_api_audit_creation seal storage listener",
	"plugin":     "image command version binary_name sha256sum args env",
	"initialize": "request",
	"request":    "operation path token data allow_failure",
	"eval":       "eval_type eval_source env_var require_present path",
}

// TestOpenBaoConfigurations checks that each OpenBao configuration of the pages can be
// parsed, and has no field that OpenBao's documents do not name.
func TestOpenBaoConfigurations(t *testing.T) {
	t.Parallel()
	found := 0
	for _, page := range pages(t) {
		for _, b := range blocksOf(t, page) {
			if b.language != "hcl" || !regexp.MustCompile(`(?m)^(plugin|initialize)\b`).MatchString(b.text) {
				continue
			}
			found++
			checkConfiguration(t, b.id, b.text)
		}
	}
	if found < 4 {
		t.Errorf("the pages have %d configurations of OpenBao", found)
	}
}

// checkConfiguration checks one configuration, and returns its fields.
func checkConfiguration(t *testing.T, id, text string) *ast.ObjectList {
	t.Helper()
	file, err := parser.Parse([]byte(text))
	if err != nil {
		t.Fatalf("%s: %v", id, err)
	}
	checkFields(t, id, "", file.Node)
	return file.Node.(*ast.ObjectList)
}

// checkFields checks the fields of a block of the kind.
func checkFields(t *testing.T, id, kind string, node ast.Node) {
	t.Helper()
	list, ok := node.(*ast.ObjectList)
	if object, isObject := node.(*ast.ObjectType); isObject {
		list, ok = object.List, true
	}
	if !ok {
		return
	}
	for _, item := range list.Items {
		name := item.Keys[0].Token.Value().(string)
		known, checked := openBaoFields[kind]
		if checked && !strings.Contains(" "+known+" ", " "+name+" ") {
			t.Errorf("%s: OpenBao's documents name no field %q of %q", id, name, kind)
		}
		inner := name
		if object, ok := item.Val.(*ast.ObjectType); ok && len(object.List.Filter("eval_type").Items) > 0 {
			inner = "eval"
		}
		checkFields(t, id, inner, item.Val)
	}
}

// registry serves images of the plugin, by version, as an OCI registry does.
func registry(t *testing.T, plugins ...vaulttest.Plugin) (host string) {
	t.Helper()
	served := map[string][]byte{}
	descriptor := func(kind string, data []byte) map[string]any {
		digest := fmt.Sprintf("sha256:%x", sha256.Sum256(data))
		served["/blobs/"+digest] = data
		return map[string]any{"mediaType": "application/vnd.oci.image." + kind, "digest": digest, "size": len(data)}
	}
	encode := func(v any) []byte {
		data, err := json.Marshal(v)
		noError(t, err)
		return data
	}
	for _, p := range plugins {
		var layer bytes.Buffer
		w, binary := tar.NewWriter(&layer), readFile(t, p.File)
		noError(t, w.WriteHeader(&tar.Header{Name: pluginName, Mode: 0o755, Size: int64(len(binary))}))
		if _, err := w.Write([]byte(binary)); err != nil {
			t.Fatal(err)
		}
		noError(t, w.Close())
		tarred := descriptor("layer.v1.tar", layer.Bytes())
		config := encode(map[string]any{
			"os": "linux", "architecture": runtime.GOARCH,
			"rootfs": map[string]any{"type": "layers", "diff_ids": []any{tarred["digest"]}},
		})
		served["/manifests/"+p.Version] = encode(map[string]any{
			"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
			"config": descriptor("config.v1+json", config), "layers": []any{tarred},
		})
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		data, ok := served[strings.TrimPrefix(r.URL.Path, "/v2/"+pluginName)]
		if !ok && r.URL.Path != "/v2/" {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		if strings.Contains(r.URL.Path, "/manifests/") {
			w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
		}
		_, _ = w.Write(data)
	}))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

// openBao is a server that unseals itself, and is configured by docs/openbao.md.
type openBao struct {
	*runbook
	folder   string // with the data and the configuration
	registry string
	port     int
}

// newOpenBao returns a server that start starts.
func newOpenBao(t *testing.T) *openBao {
	t.Helper()
	needFeature(t, vaulttest.DeclaredPlugins)
	b := &openBao{folder: t.TempDir(), port: freePort(t), registry: registry(t, suite.plugin, mustNext(t))}
	b.runbook = &runbook{cable: newStandInCable(t)}
	b.v = &vaultServer{plugins: filepath.Join(b.folder, "plugins")}
	for _, dir := range []string{b.v.plugins, filepath.Join(b.folder, "raft")} {
		noError(t, os.Mkdir(dir, 0o700))
	}
	writeFile(t, filepath.Join(b.folder, "seal.key"), string(bytes.Repeat([]byte{7}, 32)))
	b.shell = &shell{t: t}
	t.Cleanup(b.stop)
	return b
}

// stop stops the server, if it runs.
func (b *openBao) stop() {
	if b.v.Server != nil {
		b.v.stop()
	}
}

// blocks returns the configuration of some blocks of the page, for this server.
func (b *openBao) blocks(names ...string) (config string) {
	b.t.Helper()
	texts := named(b.t, "docs/openbao.md")
	texts["kubernetes"] = chartValues(b.t, "openbao").Server.HA.Raft.Config
	for _, name := range names {
		plugin := suite.plugin
		if name == "declare-next" {
			plugin = mustNext(b.t)
		}
		sum, err := plugin.Sum()
		noError(b.t, err)
		// The harness sets the plugin folder.
		text := regexp.MustCompile(`(?m)^plugin_directory .*\n`).ReplaceAllString(texts[name], "")
		config += strings.NewReplacer("registry.example.com", b.registry, "…\"", sum+"\"",
			"v0.1.0", pluginVersion, "v0.2.0", nextVersion).Replace(text)
	}
	return config
}

// start starts the server, on the data that it has, with a configuration.
func (b *openBao) start(key, config string) {
	b.t.Helper()
	// The page says that the operator's own access is set up first.
	b.v.config = fmt.Sprintf(`
seal "static" {
  current_key_id = "1"
  current_key    = "file://%s/seal.key"
}
initialize "access" {
  request "token" {
    operation = "update"
    path      = "auth/token/create-orphan"
    data      = { id = "operator", policies = ["root"] }
  }
  request "audit" {
    operation = "update"
    path      = "sys/audit/file"
    data      = { type = "file", options = { file_path = "%[1]s/audit.log" } }
  }
}
`, b.folder) + config
	b.v.env = slices.Concat(b.cable.env, []string{"CABLE_REFRESH_KEY=" + key})
	b.v.audit = filepath.Join(b.folder, "audit.log")
	raft := &vaulttest.Raft{Dir: filepath.Join(b.folder, "raft"), Node: "one", Port: b.port, Root: "operator"}
	noError(b.t, b.v.start(b.folder, raft))
	b.v.Root, b.v.root = "operator", "operator"
	b.shell = newShell(b.t, b.v, map[string]string{"bao": suite.vault})
	b.edit = strings.NewReplacer("v0.1.0", pluginVersion, "v0.2.0", nextVersion)
}

// configure changes the configuration of the running server, by SIGHUP.
func (b *openBao) configure(change func(string) string) {
	b.t.Helper()
	file := filepath.Join(b.folder, "vault.hcl")
	writeFile(b.t, file, change(readFile(b.t, file)))
	noError(b.t, b.v.Process.Signal(syscall.SIGHUP))
}

// lists waits until the catalog has a version of the plugin, or has it no longer.
func (b *openBao) lists(version string, want bool) {
	b.t.Helper()
	waitFor(b.t, 30*time.Second, fmt.Sprintf("the catalog has %s: %t", version, want), func() bool {
		out, _ := b.try("bao plugin list -detailed secret")
		return strings.Contains(out, version) == want
	})
}

// TestOpenBaoPage follows docs/openbao.md on an OpenBao server.
func TestOpenBaoPage(t *testing.T) {
	t.Parallel()
	needFeature(t, vaulttest.DeclaredPlugins)
	page := named(t, "docs/openbao.md")
	checkSteps(t, "docs/openbao.md", map[string]step{"enable": {}, "move": {}, "deregister": {}})
	t.Run("first start and upgrade", func(t *testing.T) {
		t.Parallel()
		b := newOpenBao(t)
		b.start(b.cable.RefreshKey(), b.blocks("declare", "initialize"))
		b.untilActive()
		b.runs(pluginVersion)
		if secret := findSecret(readFile(t, b.v.log), false); secret != "" {
			t.Errorf("the server's log has %s", secret)
		}
		b.configure(func(config string) string { return config + b.blocks("declare-next") })
		b.lists(nextVersion, true)
		b.run(page["move"])
		b.isTuned(nextVersion)
		b.run(strings.ReplaceAll(page["move"], "v0.2.0", "v0.1.0")) // the way back
		b.isTuned(pluginVersion)

		// A stanza that was edited in place, and the way out.
		first, _, _ := strings.Cut(b.blocks("declare"), "plugin \"secret\"")
		b.configure(func(config string) string { return strings.Replace(config, b.blocks("declare"), first, 1) })
		b.lists(pluginVersion, false)
		b.refuses("bao plugin reload -mounts=cable/", "Code: 400")
		b.refuses("bao read cable/creds/reports", "Code: 500")
		b.stop()
		b.start("", first+b.blocks("declare-next"))
		b.untilActive()
		b.refuses("bao read cable/status", "No value found")
		b.run(page["move"])
		b.isTuned(nextVersion)
	})
	t.Run("a key that does not work, and an upgrade by a restart", func(t *testing.T) {
		t.Parallel()
		b := newOpenBao(t)
		b.start("wrong", b.blocks("kubernetes", "initialize"))
		b.untilActive()
		b.is("status", "configured", "false")
		b.set("config", map[string]any{"refresh_key": b.cable.RefreshKey(), "verify_role": "reports"})
		b.runs(pluginVersion)

		// The way of docs/kubernetes.md, where a server gets no SIGHUP.
		b.stop()
		b.start("", b.blocks("kubernetes", "declare-next", "initialize"))
		b.untilActive()
		b.is("status", "version", pluginVersion)
		b.run(page["move"])
		b.isTuned(nextVersion)
	})
	t.Run("a version that was registered over the API", func(t *testing.T) {
		t.Parallel()
		b := newOpenBao(t)
		noError(t, os.Link(suite.plugin.File, b.installed(pluginVersion)))
		b.start("", "initialize \"none\" {\n}\n")
		b.untilActive()
		file := suite.plugin
		file.File = b.installed(pluginVersion)
		noError(t, b.v.Register(t.Context(), file))
		b.stop()
		declared := "plugin_auto_register = true\n" + b.blocks("declare-file")
		b.start("", declared)
		waitFor(t, 30*time.Second, "the conflict", func() bool {
			return b.v.logHas("conflicts with existing non-declarative plugin")
		})
		b.stop()
		b.start("", "")
		b.untilActive()
		b.run(page["deregister"])
		b.stop()
		b.start("", declared)
		b.untilActive()
		b.run(page["enable"])
		b.is("status", "version", pluginVersion)
	})
}

// TestNamespaces checks that the runbook's commands work in a namespace, with the
// exceptions that it lists.
func TestNamespaces(t *testing.T) {
	t.Parallel()
	needFeature(t, vaulttest.Namespaces)
	r := newRunbook(t)
	r.installs()
	r.run("vault secrets disable cable") // the mounts of one node share a process, which a reload ends
	r.ok("POST", "sys/namespaces/team-a", nil)
	root := r.env
	r.env = slices.Concat(root, []string{"VAULT_NAMESPACE=team-a", "BAO_NAMESPACE=team-a"})
	r.run(`vault secrets enable -path=cable -plugin-version="$version" vault-plugin-secrets-cable`)
	r.write("refresh-key.txt", r.cable.RefreshKey())
	r.block("configure")
	if !r.v.logHas("config written", "mount=team-a/cable/") {
		t.Error("no line of the log names the mount with its namespace")
	}

	// A policy and a quota of the root namespace name it.
	r.v.writePolicy(t, "reader", `path "team-a/cable/creds/reports" { capabilities = ["read"] }`)
	token := r.v.tokenWith(t, "reader", nil)
	read := func() int { return r.v.as(t, token, "GET", "team-a/cable/creds/reports", nil).status }
	if got := read(); got != 200 {
		t.Errorf("a read by a policy of the root namespace: status %d", got)
	}
	quota := map[string]any{"path": "team-a/cable/creds/reports", "rate": 1, "interval": "1m"}
	r.ok("POST", "sys/quotas/rate-limit/team-a", quota)
	if first, second := read(), read(); first != 200 || second != 429 {
		t.Errorf("reads under a quota of the root namespace: %d, %d", first, second)
	}
	r.ok("DELETE", "sys/quotas/rate-limit/team-a", nil)

	// A reload from the root namespace skips the mount.
	started := func() string {
		return fmt.Sprint(r.ok("GET", "team-a/cable/status", nil).Data["since"])
	}
	before := started()
	r.env = root
	r.run("vault plugin reload -plugin=" + pluginName)
	if started() != before {
		t.Error("a reload from the root namespace reloads a mount of another one")
	}
	r.env = slices.Concat(root, []string{"VAULT_NAMESPACE=team-a", "BAO_NAMESPACE=team-a"})
	time.Sleep(time.Second) // since is in seconds
	r.run("vault plugin reload -mounts=cable/")
	if started() == before {
		t.Error("a reload in the namespace does not reload its mount")
	}
	audit := r.run(`jq -r 'select(.request.path == "cable/creds/reports" and .request.namespace.path == "team-a/")
		| .request.namespace.path' ` + r.v.audit)
	contains(t, audit, "team-a/")
	contains(t, r.ok("GET", "team-a/cable/metrics", nil).text, "vault_cable_build_info")
}
