// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"bytes"
	"cmp"
	"crypto/ecdsa"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"gopkg.in/yaml.v3"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// manifest is what the tests read of a manifest of examples/kubernetes.
type manifest struct {
	Kind     string
	Metadata struct{ Name, Namespace string }
	Spec     struct {
		// VaultDynamicSecret of the operator, and of External Secrets.
		Mount, Path, Method string
		Params              map[string]string
		Parameters          yaml.Node
		GetParameters       url.Values `yaml:"getParameters"`
		// Deployment
		Template struct {
			Metadata struct{ Annotations map[string]string }
		}
	}
}

// csiObject is what the CSI provider knows of an object of a
// SecretProviderClass.
type csiObject struct {
	ObjectName     string         `yaml:"objectName"`
	SecretPath     string         `yaml:"secretPath"`
	SecretKey      string         `yaml:"secretKey"`
	Method         string         `yaml:"method"`
	SecretArgs     map[string]any `yaml:"secretArgs"`
	FilePermission os.FileMode    `yaml:"filePermission"`
	Encoding       string         `yaml:"encoding"`
}

// manifests returns the manifests of a file of examples/kubernetes.
func manifests(t *testing.T, file string) (found []manifest) {
	t.Helper()
	for d := yaml.NewDecoder(strings.NewReader(readFile(t, "../examples/kubernetes/"+file))); ; {
		var m manifest
		err := d.Decode(&m)
		if errors.Is(err, io.EOF) {
			return found
		}
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		found = append(found, m)
	}
}

// callsOf returns the requests that a consumer makes for the manifests of a
// file: how each of them turns its fields into requests is stated here.
func callsOf(t *testing.T, file string) (calls []request) {
	t.Helper()
	for _, m := range manifests(t, file) {
		switch {
		case m.Spec.Params != nil: // the operator writes, whatever the method
			calls = append(calls, request{method: "PUT", path: m.Spec.Mount + "/" + m.Spec.Path, body: m.Spec.Params})
		case m.Spec.Mount != "":
			calls = append(calls, request{method: "GET", path: m.Spec.Mount + "/" + m.Spec.Path})
		case m.Spec.Method == "GET":
			path := strings.TrimPrefix(m.Spec.Path, "/")
			if m.Spec.GetParameters != nil {
				path += "?" + m.Spec.GetParameters.Encode()
			}
			calls = append(calls, request{method: "GET", path: path})
		case m.Spec.Method != "":
			var body map[string]any
			if err := m.Spec.Parameters.Decode(&body); err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			calls = append(calls, request{method: "PUT", path: strings.TrimPrefix(m.Spec.Path, "/"), body: body})
		case m.Kind == "SecretProviderClass":
			calls = append(calls, csiCalls(t, file)...)
		}
		for _, text := range m.Spec.Template.Metadata.Annotations {
			for _, found := range regexp.MustCompile(`secret "([^"]+)" ?}}`).FindAllStringSubmatch(text, -1) {
				calls = append(calls, request{method: "GET", path: found[1]})
			}
		}
	}
	return calls
}

// csiObjects returns the objects of a SecretProviderClass, decoded strictly.
func csiObjects(t *testing.T, file string) (objects []csiObject) {
	t.Helper()
	var class struct {
		Spec struct {
			Provider   string
			Parameters map[string]string
		}
	}
	if err := yaml.Unmarshal([]byte(readFile(t, "../examples/kubernetes/"+file)), &class); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	for name := range class.Spec.Parameters {
		if !slices.Contains([]string{"vaultAddress", "roleName", "audience", "objects"}, name) {
			t.Errorf("%s: the provider does not know %s", file, name)
		}
	}
	d := yaml.NewDecoder(strings.NewReader(class.Spec.Parameters["objects"]))
	d.KnownFields(true)
	if err := d.Decode(&objects); err != nil || class.Spec.Provider != "vault" || class.Spec.Parameters["roleName"] != "reports" {
		t.Fatalf("%s: %v: %+v", file, err, class.Spec)
	}
	return objects
}

// csiCalls returns the provider's requests: one for each path and method, with
// the arguments as a body.
func csiCalls(t *testing.T, file string) (calls []request) {
	t.Helper()
	seen := map[string]bool{}
	for _, o := range csiObjects(t, file) {
		method := o.Method
		if method == "" {
			method = "GET"
		}
		if seen[o.SecretPath+method] {
			continue
		}
		seen[o.SecretPath+method] = true
		call := request{method: method, path: o.SecretPath}
		if o.SecretArgs != nil {
			call.body = o.SecretArgs
		}
		calls = append(calls, call)
	}
	return calls
}

// TestExampleKubernetesCalls: the requests that the manifests lead to work with
// the policy that their page names, and with nothing less; and the policies give
// nothing else.
func TestExampleKubernetesCalls(t *testing.T) {
	t.Parallel()
	_, m := newApplication(t)
	m.ok(t, "POST", "cable/roles/other", map[string]any{"scopes": "person:read"})
	tokens := map[string]string{}
	for _, name := range []string{"policy", "policy-parameters"} {
		m.ok(t, "PUT", "sys/policies/acl/"+name, map[string]any{"policy": readFile(t, "../examples/kubernetes/"+name+".hcl")})
		tokens[name] = m.ok(t, "POST", "auth/token/create", map[string]any{"policies": []string{name}}).Auth.ClientToken
	}
	if text := readFile(t, "../examples/kubernetes/README.md"); !strings.Contains(text, withoutComments(readFile(t, "../examples/kubernetes/policy-parameters.hcl"))) {
		t.Error("the README shows another policy-parameters.hcl")
	}
	status := func(policy string, r request) int {
		t.Helper()
		r.token = tokens[policy]
		a, err := m.call(r)
		if err != nil {
			t.Fatal(err)
		}
		return a.status
	}
	for file, calls := range map[string]int{
		"vault-secrets-operator/secret.yaml": 1, "vault-secrets-operator/parameters/secret.yaml": 1,
		"external-secrets/secret.yaml": 1, "external-secrets/parameters/read.yaml": 1, "external-secrets/parameters/write.yaml": 1,
		"csi/secret.yaml": 1, "csi/parameters/secret.yaml": 1,
		"injector/deployment.yaml": 1,
	} {
		found := callsOf(t, file)
		if len(found) != calls {
			t.Errorf("%s leads to %d requests, want %d: %+v", file, len(found), calls, found)
		}
		for _, r := range found {
			needs, refuses := "policy", "policy-parameters"
			if r.method != "GET" {
				needs, refuses = refuses, needs
			}
			if got := status(needs, r); got != 200 {
				t.Errorf("%s: %+v with %s: %d", file, r, needs, got)
			}
			want := int64(900) // the ttl of the role
			if strings.Contains(file, "parameters/") {
				want = 600
			}
			if last := m.sim.Calls(); last[len(last)-1].ExpirySeconds != want {
				t.Errorf("%s: %ds were requested, want %d", file, last[len(last)-1].ExpirySeconds, want)
			}
			if got := status(refuses, r); got != 403 {
				t.Errorf("%s: %+v with %s: %d", file, r, refuses, got)
			}
		}
	}
	for _, tt := range []struct {
		policy string
		request
	}{
		{"policy", request{method: "GET", path: "cable/creds/other"}},
		{"policy", request{method: "GET", path: "cable/roles/reports"}},
		{"policy", request{method: "GET", path: "cable/config"}},
		{"policy-parameters", request{method: "PUT", path: "cable/creds/reports", body: map[string]any{"scopes": "person:read"}}},
		{"policy-parameters", request{method: "PUT", path: "cable/creds/other", body: map[string]any{"ttl": "10m"}}},
	} {
		if got := status(tt.policy, tt.request); got != 403 {
			t.Errorf("%s %s with %s: %d", tt.method, tt.path, tt.policy, got)
		}
	}
	// What csi/README.md says of arguments.
	before := m.sim.CallCount()
	if got := status("policy", request{method: "GET", path: "cable/creds/reports?ttl=10m"}); got != 200 || m.sim.Calls()[before].ExpirySeconds != 600 {
		t.Errorf("a ttl in the path: %d, %+v", got, m.sim.Calls()[before])
	}
	if got := status("policy", request{method: "GET", path: "cable/creds/reports", body: map[string]any{"ttl": "10m"}}); got != 200 || m.sim.Calls()[before+1].ExpirySeconds == 600 {
		t.Errorf("a ttl in the body of a GET: %d, %+v", got, m.sim.Calls()[before+1])
	}
}

// withoutComments is the text of an HCL file without its comments.
func withoutComments(text string) string {
	return strings.TrimSpace(regexp.MustCompile(`(?m)^#.*\n`).ReplaceAllString(text, ""))
}

// TestExampleKubernetes runs examples/kubernetes: its README, and then each
// folder with its consumer.
func TestExampleKubernetes(t *testing.T) {
	needExamples(t)
	t.Parallel()
	for _, tool := range []string{"kubernetes", "operators", "external-secrets"} {
		needTool(t, tool) // at first: each takes minutes
	}
	k := newKubernetes(t)
	k.setUp(t)
	for _, tt := range []struct {
		folder string
		test   func(*testing.T, *kubernetes)
	}{
		{"", testKubernetesAuth},
		{"vault-secrets-operator", testOperator},
		{"external-secrets", testExternalSecrets},
		{"csi", testCSI},
		{"injector", testInjector},
	} {
		t.Run(cmp.Or(tt.folder, "auth"), func(t *testing.T) {
			k := k.in(t)
			tt.test(t, k)
			if tt.folder != "" {
				k.run("kubectl delete --ignore-not-found --wait=false -f " + tt.folder + " && vault policy write reports policy.hcl")
				k.share(t, "0")
			}
		})
	}
}

// in returns k for a subtest.
func (k *kubernetes) in(t *testing.T) *kubernetes {
	s := *k.shell
	s.t = t
	return &kubernetes{shell: &s, m: k.m}
}

// minted waits until n more tokens than before were minted.
func (k *kubernetes) minted(t *testing.T, before, n int, what string) {
	t.Helper()
	waitFor(t, 90*time.Second, fmt.Sprintf("%s: %d tokens", what, n), func() bool { return k.m.sim.Stats().Minted >= before+n })
}

// testKubernetesAuth: the Vault role of README.md is for one service account and
// one audience; and what it says of batch tokens.
func testKubernetesAuth(t *testing.T, k *kubernetes) {
	k.run("kubectl --namespace reports create serviceaccount other")
	const login = "vault write -field=token auth/kubernetes/login role=reports jwt=$(kubectl --namespace %s create token %s %s)"
	for _, tt := range []struct{ namespace, account, audience, want string }{
		{"reports", "other", "--audience vault", "service account name not authorized"},
		{"vault", "vault-reviewer", "--audience vault", "not authorized"},
		{"reports", "reports", "", "audience|permission denied"},
	} {
		if out, err := k.try(fmt.Sprintf(login, tt.namespace, tt.account, tt.audience)); err == nil || !regexp.MustCompile(tt.want).MatchString(out) {
			t.Errorf("a login as %s of %s %s: %v\n%s", tt.account, tt.namespace, tt.audience, err, out)
		} else {
			t.Logf("a login as %s of %s %s: %s", tt.account, tt.namespace, tt.audience, out)
		}
	}
	k.run("vault write auth/kubernetes/role/batch bound_service_account_names=reports bound_service_account_namespaces=reports audience=vault token_policies=reports token_type=batch token_ttl=5m")
	out := k.run("VAULT_TOKEN=$(" + fmt.Sprintf(strings.Replace(login, "role=reports", "role=batch", 1), "reports", "reports", "--audience vault") +
		") vault read -format=json cable/creds/reports | sed -n 's/.*lease_duration\": \\([0-9]*\\).*/\\1/p'")
	if n := strings.TrimSpace(out); !regexp.MustCompile(`^(299|300|29\d)$`).MatchString(n) {
		t.Errorf("for a batch token of 5 minutes the lease lasts %ss", n)
	}
}

// testOperator runs examples/kubernetes/vault-secrets-operator.
func testOperator(t *testing.T, k *kubernetes) {
	k.applyCRDs(t, "operators", "github.com/hashicorp/vault-secrets-operator", "chart/crds")
	binary := filepath.Join(needTool(t, "operators"), "vault-secrets-operator")
	start := func() (stop func()) {
		return k.consumer(t, binary, "--leader-elect=false", "--metrics-bind-address=0", "--health-probe-bind-address=0")
	}
	const restartedAt = `kubectl --namespace reports get deployment reports --output 'jsonpath={.spec.template.metadata.annotations.vso\.secrets\.hashicorp\.com/restartedAt}'`
	stop := start()
	before := k.m.sim.Stats().Minted
	var first map[string]string
	k.runPage("examples/kubernetes/vault-secrets-operator/README.md", map[string]step{
		"Run it/1": {want: []string{"vaultdynamicsecret.secrets.hashicorp.com/cable created", "deployment.apps/reports created", `\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$`}, after: func(string) {
			first = k.secret("cable-token")
			if got := slices.Sorted(maps.Keys(first)); !slices.Equal(got, []string{"CABLE_EXPIRES_AT", "CABLE_SCOPES", "CABLE_TOKEN"}) {
				t.Errorf("the Secret has the keys %q", got)
			}
			if first["CABLE_SCOPES"] != "person:read transactions:read" || !strings.HasPrefix(first["CABLE_TOKEN"], "eyJ") {
				t.Errorf("the Secret has the scopes %q and a token of %d bytes", first["CABLE_SCOPES"], len(first["CABLE_TOKEN"]))
			}
			if n := k.m.sim.Stats().Minted - before; n != 1 {
				t.Errorf("%d tokens were minted", n)
			}
			k.wait(t, "the first restart", restartedAt, func(out string) bool { return out != "" })
		}},
		"Run it/2": {want: []string{"cable-short created"}, after: func(string) {
			waitFor(t, time.Minute, "a Secret with a token of 10 minutes", func() bool { return k.secret("cable-token-short") != nil })
			if last := k.m.sim.Calls(); last[len(last)-1].ExpirySeconds != 600 {
				t.Errorf("%ds were requested", last[len(last)-1].ExpirySeconds)
			}
			k.run("kubectl delete -f vault-secrets-operator/parameters/ && vault policy write reports policy.hcl")
		}},
	})

	// A refresh: at 1% of five minutes and up to 10% at random, instead of 67%.
	k.m.ok(t, "POST", "cable/roles/reports", map[string]any{"ttl": "5m"})
	patch := func(field string) {
		t.Helper()
		k.run(`kubectl --namespace reports patch vaultdynamicsecret cable --type merge --patch '{"spec":{` + field + `}}'`)
	}
	before = k.m.sim.Stats().Minted
	list := regexp.MustCompile("`({{ get .Secrets \"scopes\"[^`]+)`").FindStringSubmatch(readFile(t, "../examples/kubernetes/vault-secrets-operator/README.md"))
	if list == nil {
		t.Fatal("the page has no template for a list")
	}
	patch(`"renewalPercent":1,"destination":{"transformation":{"templates":{"LIST":{"text":` + strconv.Quote(list[1]) + `}}}}`)
	k.minted(t, before, 1, "a changed manifest")
	changed, restarted := time.Now(), k.run(restartedAt)
	k.minted(t, before, 2, "a refresh")
	t.Logf("the operator refreshed after %s of a lease of 300s", milliseconds(time.Since(changed)))
	k.wait(t, "a restart with the new token", restartedAt, func(out string) bool { return out != restarted })
	if now := k.secret("cable-token"); now["CABLE_TOKEN"] == first["CABLE_TOKEN"] || now["LIST"] != now["CABLE_SCOPES"] {
		t.Errorf("the Secret has the first token still, or the list as %q", now["LIST"])
	}
	k.m.ok(t, "POST", "cable/roles/reports", map[string]any{"ttl": "1h"})
	before = k.m.sim.Stats().Minted
	patch(`"renewalPercent":67`)
	k.minted(t, before, 1, "a lease of an hour")

	// The operator starts again, long before the refresh is due.
	k.wait(t, "the status", `kubectl --namespace reports get vaultdynamicsecret cable --output 'jsonpath={.metadata.generation} {.status.lastGeneration}'`,
		func(out string) bool { generation, last, _ := strings.Cut(out, " "); return generation == last })
	stop()
	before = k.m.sim.Stats().Minted
	stop = start()
	k.minted(t, before, 1, "the operator restarted")

	// Cable is down when the manifest changes.
	last := k.secret("cable-token")
	// Each attempt is three API calls, unless the retries of Vault's client are off.
	attempts := func() (n int) {
		t.Helper()
		for _, count := range strings.Fields(k.run(`kubectl --namespace reports get events --field-selector reason=SecretSyncError --output 'jsonpath={.items[*].count}'`)) {
			i, err := strconv.Atoi(count)
			if err != nil {
				t.Fatal(err)
			}
			n += i
		}
		return n
	}
	k.m.sim.SetFault(cabletest.Fault{Status: 500})
	for _, tt := range []struct {
		env   string
		calls int
	}{{"", 3}, {"VAULT_MAX_RETRIES=0", 1}} {
		calls, failed, since := k.m.sim.CallCount(), attempts(), time.Now()
		if tt.env == "" {
			patch(`"renewalPercent":66`)
		} else {
			stop()
			calls, failed, since = k.m.sim.CallCount(), attempts(), time.Now()
			k.env = append(k.env, tt.env)
			stop = start()
		}
		waitFor(t, time.Minute, "two failed attempts", func() bool { return attempts() >= failed+2 })
		t.Logf("while Cable is down, with %q: %d attempts and %d API calls in %s", tt.env, attempts()-failed, k.m.sim.CallCount()-calls, milliseconds(time.Since(since)))
		if got := k.m.sim.CallCount() - calls; got/tt.calls != attempts()-failed { // another one may be under way
			t.Errorf("with %q: %d API calls for %d attempts", tt.env, got, attempts()-failed)
		}
	}
	if now := k.secret("cable-token"); now["CABLE_TOKEN"] != last["CABLE_TOKEN"] {
		t.Error("the Secret has lost its token")
	}
	before = k.m.sim.Stats().Minted
	k.m.sim.ClearFaults()
	k.minted(t, before, 1, "Cable is back")
	k.run("kubectl delete -f vault-secrets-operator")
	stop()
}

// testExternalSecrets runs examples/kubernetes/external-secrets.
func testExternalSecrets(t *testing.T, k *kubernetes) {
	k.applyCRDs(t, "external-secrets", "github.com/external-secrets/external-secrets", "deploy/crds/bundle.yaml")
	stop := k.consumer(t, filepath.Join(needTool(t, "external-secrets"), "external-secrets"), "--metrics-addr=0")
	defer stop()
	before := k.m.sim.Stats().Minted
	patch := func(kind, name, spec string) {
		t.Helper()
		k.run(`kubectl --namespace reports patch ` + kind + ` ` + name + ` --type merge --patch '{"spec":` + spec + `}'`)
	}
	k.runPage("examples/kubernetes/external-secrets/README.md", map[string]step{
		"Run it/1": {want: []string{"externalsecret.external-secrets.io/cable condition met", `\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$`}, after: func(string) {
			data := k.secret("cable-token")
			if got := slices.Sorted(maps.Keys(data)); !slices.Equal(got, []string{"expires_at", "scope", "token"}) {
				t.Errorf("the Secret has the keys %q", got)
			}
			if data["scope"] != "person:read transactions:read" || !strings.HasPrefix(data["token"], "eyJ") {
				t.Errorf("the Secret has the scopes %q and a token of %d bytes", data["scope"], len(data["token"]))
			}
			if n := k.m.sim.Stats().Minted - before; n < 1 || n > 2 {
				t.Errorf("%d tokens were minted", n)
			} else {
				t.Logf("%d tokens were minted at first", n)
			}
			// It refreshes by the interval, whatever the lease.
			before = k.m.sim.Stats().Minted
			patch("externalsecret", "cable", `{"refreshInterval":"5s"}`)
			since := time.Now()
			k.minted(t, before, 3, "refreshes every 5 seconds")
			t.Logf("with refreshInterval: 5s, 3 tokens of an hour in %s", milliseconds(time.Since(since)))
			// Cable is down.
			k.m.sim.SetFault(cabletest.Fault{Status: 500})
			calls, since := k.m.sim.CallCount(), time.Now()
			k.wait(t, "a refresh that fails", `kubectl --namespace reports get externalsecret cable --output 'jsonpath={.status.conditions[0].status}'`,
				func(out string) bool { return out == "False" })
			last := k.secret("cable-token")
			waitFor(t, time.Minute, "more attempts", func() bool { return k.m.sim.CallCount() >= calls+4 })
			t.Logf("while Cable is down: %d API calls in %s", k.m.sim.CallCount()-calls, milliseconds(time.Since(since)))
			if now := k.secret("cable-token"); now["token"] == "" || now["token"] != last["token"] {
				t.Error("the Secret has lost its token")
			}
			before = k.m.sim.Stats().Minted
			k.m.sim.ClearFaults()
			k.minted(t, before, 1, "Cable is back")
			patch("externalsecret", "cable", `{"refreshInterval":"30m"}`)
		}},
		"Run it/2": {want: []string{"cable-short created"}, after: func(string) {
			patch("externalsecret", "cable", `{"dataFrom":[{"sourceRef":{"generatorRef":{"apiVersion":"generators.external-secrets.io/v1alpha1","kind":"VaultDynamicSecret","name":"cable-short"}}}]}`)
			waitFor(t, time.Minute, "a token of 10 minutes", func() bool { calls := k.m.sim.Calls(); return calls[len(calls)-1].ExpirySeconds == 600 })
			k.run("kubectl --namespace reports delete externalsecret cable && vault policy write reports policy.hcl")
		}},
	})
	if out, err := k.try("kubectl apply -f external-secrets/parameters/read.yaml"); err == nil || !strings.Contains(out, "getParameters") {
		t.Errorf("this version of External Secrets knows getParameters: run read.yaml with it. %v\n%s", err, out)
	}

	// A store reads once for each property.
	k.write("store.yaml", fmt.Sprintf(`
apiVersion: external-secrets.io/v1
kind: SecretStore
metadata: {name: cable, namespace: reports}
spec:
  provider:
    vault:
      server: %s
      path: cable
      version: v1
      auth: {kubernetes: {mountPath: kubernetes, role: reports, serviceAccountRef: {name: reports, audiences: [vault]}}}
---
apiVersion: external-secrets.io/v1
kind: ExternalSecret
metadata: {name: store, namespace: reports}
spec:
  refreshInterval: 30m
  secretStoreRef: {kind: SecretStore, name: cable}
  target: {name: store}
  data:
    - {secretKey: token, remoteRef: {key: creds/reports, property: token}}
    - {secretKey: scope, remoteRef: {key: creds/reports, property: scope}}
    - {secretKey: expires_at, remoteRef: {key: creds/reports, property: expires_at}}
`, k.m.addr))
	before = k.m.sim.Stats().Minted
	k.run("kubectl apply -f store.yaml && kubectl --namespace reports wait --for=condition=Ready --timeout=60s externalsecret/store")
	if n := k.m.sim.Stats().Minted - before; n != 3 {
		t.Errorf("a store minted %d tokens for 3 properties", n)
	}
	k.run("kubectl delete -f store.yaml")
}

// testCSI applies examples/kubernetes/csi, and replays what the provider does
// for a pod.
func testCSI(t *testing.T, k *kubernetes) {
	// The driver's CRD cannot be had; this one knows the fields that are used.
	k.write("crd.yaml", `
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: secretproviderclasses.secrets-store.csi.x-k8s.io}
spec:
  group: secrets-store.csi.x-k8s.io
  scope: Namespaced
  names: {kind: SecretProviderClass, plural: secretproviderclasses, singular: secretproviderclass}
  versions:
    - name: v1
      served: true
      storage: true
      schema:
        openAPIV3Schema:
          type: object
          properties:
            spec:
              type: object
              properties:
                provider: {type: string}
                parameters: {type: object, additionalProperties: {type: string}}
`)
	k.run("kubectl apply -f crd.yaml && kubectl wait --for=condition=Established crd --all")
	replay := func(file string) (data map[string]any) {
		t.Helper()
		out := k.run("vault write -field=token auth/kubernetes/login role=reports jwt=$(kubectl --namespace reports create token reports --audience vault)")
		for _, r := range csiCalls(t, file) {
			r.token = strings.TrimSpace(out)
			a, err := k.m.call(r)
			if err != nil || a.status != 200 {
				t.Fatalf("%s: %+v: %v %v", file, r, a, err)
			}
			data = a.Data
		}
		return data
	}
	before := k.m.sim.Stats().Minted
	k.runPage("examples/kubernetes/csi/README.md", map[string]step{
		"Run it/1": {want: []string{"secretproviderclass.secrets-store.csi.x-k8s.io/cable created", "deployment.apps/reports created"}, after: func(string) {
			data := replay("csi/secret.yaml")
			for _, o := range csiObjects(t, "csi/secret.yaml") {
				if text, ok := data[o.SecretKey].(string); !ok || text == "" || o.FilePermission != 0o444 {
					t.Errorf("%s has the mode %v, and a %T", o.ObjectName, o.FilePermission, data[o.SecretKey])
				}
			}
			if n := k.m.sim.Stats().Minted - before; n != 1 {
				t.Errorf("%d tokens were minted for one pod", n)
			}
		}},
		"Run it/2": {want: []string{"cable-short created"}, after: func(string) {
			replay("csi/parameters/secret.yaml")
			if last := k.m.sim.Calls(); last[len(last)-1].ExpirySeconds != 600 {
				t.Errorf("%ds were requested", last[len(last)-1].ExpirySeconds)
			}
		}},
	})
}

// testInjector runs examples/kubernetes/injector: the API server has the
// injector change the Deployment's pod, and the pod's Agents run here.
func testInjector(t *testing.T, k *kubernetes) {
	cert, root := issue(t, "127.0.0.1")
	k.write("webhook.crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]})))
	k.write("webhook.key", privateKey(t, cert.PrivateKey.(*ecdsa.PrivateKey)))
	listen := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	k.consumer(t, filepath.Join(needTool(t, "operators"), "injector"), "-listen="+listen, "-vault-address="+k.m.addr,
		"-cert="+k.place("webhook.crt"), "-key="+k.place("webhook.key"))
	k.write("webhook.yaml", fmt.Sprintf(`
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingWebhookConfiguration
metadata: {name: injector}
webhooks:
  - name: vault.hashicorp.com
    admissionReviewVersions: [v1]
    sideEffects: None
    failurePolicy: Fail
    clientConfig: {url: "https://%s/mutate", caBundle: %s}
    rules: [{operations: [CREATE], apiGroups: [""], apiVersions: [v1], resources: [pods]}]
`, listen, base64.StdEncoding.EncodeToString(root)))
	k.run("kubectl apply -f webhook.yaml")
	k.runPage("examples/kubernetes/injector/README.md", map[string]step{
		"Run it/1": {want: []string{"deployment.apps/reports created"}},
	})

	// The pod, as the Deployment's controller would create it.
	var deployment struct {
		Spec struct {
			Template map[string]any `json:"template"`
		} `json:"spec"`
	}
	if err := json.Unmarshal([]byte(k.run("kubectl --namespace reports get deployment reports --output json")), &deployment); err != nil {
		t.Fatal(err)
	}
	pod := deployment.Spec.Template
	pod["apiVersion"], pod["kind"] = "v1", "Pod"
	pod["metadata"].(map[string]any)["name"] = "reports"
	text, err := json.Marshal(pod)
	if err != nil {
		t.Fatal(err)
	}
	k.write("pod.json", string(text))
	type container struct {
		Name string
		Env  []struct{ Name, Value string }
	}
	var created struct {
		Spec struct{ InitContainers, Containers []container }
	}
	waitFor(t, time.Minute, "the webhook is called", func() bool {
		out, err := k.try("kubectl --namespace reports create -f pod.json --output json")
		if err != nil {
			if strings.Contains(out, "already exists") {
				k.run("kubectl --namespace reports delete pod reports --now")
			}
			return false
		}
		if err := json.Unmarshal([]byte(out), &created); err != nil {
			t.Fatal(err)
		}
		if len(created.Spec.InitContainers) == 0 { // the webhook is not yet in force
			k.run("kubectl --namespace reports delete pod reports --now")
		}
		return len(created.Spec.InitContainers) > 0
	})
	defer k.run("kubectl --namespace reports delete pod reports --now && kubectl delete -f webhook.yaml")

	// Both Agents, with the paths of their container in the test's folder.
	for _, folder := range []string{"home", "secrets", "account"} {
		if err := os.MkdirAll(k.place(folder), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	edit := strings.NewReplacer("/home/vault", k.place("home"), "/vault/secrets", k.place("secrets"),
		"/var/run/secrets/vault.hashicorp.com/serviceaccount", k.place("account"))
	k.run("kubectl --namespace reports create token reports --audience vault > account/token")
	configuration := func(containers []container, name string) string {
		t.Helper()
		for _, c := range containers {
			for _, e := range c.Env {
				if c.Name == name && e.Name == "VAULT_CONFIG" {
					text, err := base64.StdEncoding.DecodeString(e.Value)
					if err != nil {
						t.Fatal(err)
					}
					return edit.Replace(string(text))
				}
			}
		}
		t.Fatalf("the pod has no container %s with a configuration: %+v", name, created)
		return ""
	}
	k.write("init.json", configuration(created.Spec.InitContainers, "vault-agent-init"))
	k.write("sidecar.json", configuration(created.Spec.Containers, "vault-agent"))
	var indented bytes.Buffer
	_ = json.Indent(&indented, []byte(readFile(t, k.place("sidecar.json"))), "", "  ")
	t.Logf("the sidecar's configuration: %s", &indented)
	for name, wants := range map[string][]string{
		"init.json":    {`"exit_after_auth":true`, `"exit_on_retry_failure":true`, `"perms":"0440"`, `"error_on_missing_key":true`},
		"sidecar.json": {`"exit_after_auth":false`, `"exit_on_retry_failure":true`, `"perms":"0440"`, `"error_on_missing_key":true`},
	} {
		for _, want := range wants {
			if !strings.Contains(readFile(t, k.place(name)), want) {
				t.Errorf("%s has no %s", name, want)
			}
		}
	}
	agents := func(n int) {
		t.Helper()
		before := k.m.sim.Stats().Minted
		k.run("VAULT_TOKEN= vault agent -config=init.json")
		token := readFile(t, k.place("secrets/token"))
		if info, err := os.Stat(k.place("secrets/token")); err != nil || info.Mode() != 0o440 || !regexp.MustCompile(`^eyJ\S+$`).MatchString(token) {
			t.Errorf("the init container wrote %d bytes with the mode %v, %v", len(token), info.Mode(), err)
		}
		stop := k.start(t, "vault", "agent", "-config=sidecar.json")
		k.minted(t, before, n, "the pod's Agents")
		waitFor(t, time.Minute, "the sidecar has rendered", func() bool {
			return n == 1 || readFile(t, k.place("secrets/token")) != token
		})
		stop()
		if got := k.m.sim.Stats().Minted - before; got != n {
			t.Errorf("a pod's start minted %d tokens, want %d", got, n)
		}
	}
	agents(2)
	k.share(t, "5m")
	agents(1)
}
