// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"cmp"
	"crypto/ecdsa"
	"encoding/base64"
	"encoding/json"
	"fmt"
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

// csiRequest returns the request of the CSI provider for a SecretProviderClass, whose
// objects are decoded strictly. The provider sends one for each path and method, with the
// arguments as a body.
func csiRequest(t *testing.T, file string) (r request) {
	t.Helper()
	var class struct {
		Spec struct {
			Provider   string
			Parameters struct {
				RoleName string `yaml:"roleName"`
				Objects  string
			}
		}
	}
	noError(t, yaml.Unmarshal([]byte(readFile(t, "../examples/kubernetes/"+file)), &class))
	var objects []struct { // all fields that the provider knows
		ObjectName     string         `yaml:"objectName"`
		SecretPath     string         `yaml:"secretPath"`
		SecretKey      string         `yaml:"secretKey"`
		Method         string         `yaml:"method"`
		SecretArgs     map[string]any `yaml:"secretArgs"`
		FilePermission os.FileMode    `yaml:"filePermission"`
		Encoding       string         `yaml:"encoding"`
	}
	d := yaml.NewDecoder(strings.NewReader(class.Spec.Parameters.Objects))
	d.KnownFields(true)
	if err := d.Decode(&objects); err != nil || class.Spec.Provider != "vault" ||
		class.Spec.Parameters.RoleName != "reports" {
		t.Fatalf("%s: %+v, %v", file, class.Spec, err)
	}
	for i, o := range objects {
		method := cmp.Or(o.Method, "GET")
		if i > 0 && (o.SecretPath != r.path || method != r.method) {
			t.Errorf("%s: the objects take more than one request", file)
		}
		r = request{method: method, path: o.SecretPath}
		if o.SecretArgs != nil {
			r.body = o.SecretArgs
		}
	}
	return r
}

// TestExampleKubernetesCalls replays requests of the consumers. Each policy of
// examples/kubernetes permits the requests that its page names, and no other.
func TestExampleKubernetesCalls(t *testing.T) {
	t.Parallel()
	_, m := newApplication(t)
	const parameters = "../examples/kubernetes/policy-parameters.hcl"
	m.oneRead(t, "kubernetes")
	withTTL := map[string]any{"ttl": "10m"}
	m.smallest(t, parameters, map[string]request{
		"cable/creds/reports": {method: "PUT", path: "cable/creds/reports", body: withTTL},
	}, []request{
		{method: "GET", path: "cable/creds/reports"},
		{method: "PUT", path: "cable/creds/reports", body: map[string]any{"scopes": "person:read"}},
		{method: "PUT", path: "cable/creds/other", body: withTTL},
	})
	withoutComments := regexp.MustCompile(`(?m)^#.*\n`).ReplaceAllString(readFile(t, parameters), "")
	if !strings.Contains(readFile(t, "../examples/kubernetes/README.md"), strings.TrimSpace(withoutComments)) {
		t.Error("the README shows another policy-parameters.hcl")
	}

	// The parameters of a GET count in its query, and not in a body.
	var generator struct {
		Spec struct {
			Path          string
			GetParameters url.Values `yaml:"getParameters"`
		}
	}
	text := readFile(t, "../examples/kubernetes/external-secrets/parameters/read.yaml")
	noError(t, yaml.Unmarshal([]byte(text), &generator))
	read := strings.TrimPrefix(generator.Spec.Path, "/")
	for _, tt := range []struct {
		request
		want int64
	}{
		{request{method: "GET", path: read + "?" + generator.Spec.GetParameters.Encode()}, 600},
		{request{method: "GET", path: read, body: withTTL}, 900},
		{csiRequest(t, "csi/secret.yaml"), 900},
		{csiRequest(t, "csi/parameters/secret.yaml"), 600},
	} {
		m.ok(t, tt.method, tt.path, tt.body)
		m.requested(t, tt.want)
	}
}

// TestExampleKubernetes follows the page of examples/kubernetes, and then the page
// of each folder with its consumer.
func TestExampleKubernetes(t *testing.T) {
	needExamples(t)
	t.Parallel()
	for _, tool := range []string{"kubernetes", "consumers"} {
		needTool(t, tool) // first, because each takes minutes
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
		{"injector", testInjector},
	} {
		t.Run(cmp.Or(tt.folder, "auth"), func(t *testing.T) {
			k := k.in(t)
			tt.test(t, k)
			if tt.folder != "" {
				k.run("kubectl delete --ignore-not-found --wait=false -f " + tt.folder)
				k.run("vault policy write reports policy.hcl")
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

// mints waits until do has had n tokens minted.
func (k *kubernetes) mints(t *testing.T, n int, what string, do func()) {
	t.Helper()
	before := k.m.sim.Stats().Minted
	do()
	k.minted(t, before, n, what)
}

// minted waits until n more tokens than before were minted.
func (k *kubernetes) minted(t *testing.T, before, n int, what string) {
	t.Helper()
	waitFor(t, 90*time.Second, fmt.Sprintf("%s: %d tokens", what, n), func() bool {
		return k.m.sim.Stats().Minted >= before+n
	})
}

// reports runs kubectl in the namespace reports.
func (k *kubernetes) reports(command string) string {
	k.t.Helper()
	return k.run("kubectl --namespace reports " + command)
}

// patch changes fields of a resource's spec.
func (k *kubernetes) patch(resource, fields string) {
	k.t.Helper()
	k.reports("patch " + resource + ` --type merge --patch '{"spec":{` + fields + `}}'`)
}

// holds fails the test unless a Secret has these keys, the scopes of the role, and a token.
func (k *kubernetes) holds(data map[string]string, token, scopes string, more ...string) {
	k.t.Helper()
	want := slices.Sorted(slices.Values(append(more, token, scopes)))
	if got := slices.Sorted(maps.Keys(data)); !slices.Equal(got, want) {
		k.t.Errorf("the Secret has the keys %q, want %q", got, want)
	}
	if data[scopes] != "person:read transactions:read" || !strings.HasPrefix(data[token], "eyJ") {
		k.t.Errorf("the Secret has the scopes %q and a token of %d bytes", data[scopes], len(data[token]))
	}
}

// loginAs logs in to Vault as a service account, and prints the Vault token.
func loginAs(role, namespace, account, audience string) string {
	return "vault write -field=token auth/kubernetes/login role=" + role +
		" jwt=$(kubectl --namespace " + namespace + " create token " + account + " " + audience + ")"
}

// testKubernetesAuth shows that the Vault role of README.md is for one service
// account and one audience, and that a batch token bounds the lease.
func testKubernetesAuth(t *testing.T, k *kubernetes) {
	k.reports("create serviceaccount other")
	for _, tt := range []struct{ namespace, account, audience, want string }{
		{"reports", "other", "--audience vault", "service account name not authorized"},
		{"vault", "vault-reviewer", "--audience vault", "not authorized"},
		{"reports", "reports", "", "audience|permission denied"},
	} {
		out, err := k.try(loginAs("reports", tt.namespace, tt.account, tt.audience))
		if err == nil || !regexp.MustCompile(tt.want).MatchString(out) {
			t.Errorf("a login as %s of %s %s: %v\n%s", tt.account, tt.namespace, tt.audience, err, out)
		}
	}
	k.run("vault write auth/kubernetes/role/batch bound_service_account_names=reports" +
		" bound_service_account_namespaces=reports audience=vault token_policies=reports token_type=batch token_ttl=5m")
	out := k.run("VAULT_TOKEN=$(" + loginAs("batch", "reports", "reports", "--audience vault") + ")" +
		` vault read -format=json cable/creds/reports | sed -n 's/.*lease_duration": \([0-9]*\).*/\1/p'`)
	if n := strings.TrimSpace(out); !regexp.MustCompile(`^(300|29\d)$`).MatchString(n) {
		t.Errorf("for a batch token of 5 minutes the lease lasts %ss", n)
	}
}

// testOperator runs examples/kubernetes/vault-secrets-operator.
func testOperator(t *testing.T, k *kubernetes) {
	k.applyCRDs(t, "github.com/hashicorp/vault-secrets-operator", "chart/crds")
	binary := filepath.Join(needTool(t, "consumers"), "vault-secrets-operator")
	start := func() (stop func()) {
		return k.consumer(t, binary,
			"--leader-elect=false", "--metrics-bind-address=0", "--health-probe-bind-address=0")
	}
	const resource = "vaultdynamicsecret cable"
	const restartedAt = "kubectl --namespace reports get deployment reports --output " +
		`'jsonpath={.spec.template.metadata.annotations.vso\.secrets\.hashicorp\.com/restartedAt}'`
	stop := start()
	before := k.m.sim.Stats().Minted
	var first map[string]string
	k.runPage("examples/kubernetes/vault-secrets-operator/README.md", map[string]step{
		"Run it/1": {
			want: []string{
				"vaultdynamicsecret.secrets.hashicorp.com/cable created",
				"deployment.apps/reports created",
				`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$`,
			},
			after: func(string) {
				first = k.secret("cable-token")
				k.holds(first, "CABLE_TOKEN", "CABLE_SCOPES", "CABLE_EXPIRES_AT")
				if n := k.m.sim.Stats().Minted - before; n != 1 {
					t.Errorf("%d tokens were minted", n)
				}
				k.wait(t, "the first restart", restartedAt, func(out string) bool { return out != "" })
			},
		},
		"Run it/2": {
			want: []string{"cable-short created"},
			after: func(string) {
				waitFor(t, time.Minute, "a Secret with a token of 10 minutes", func() bool {
					return k.secret("cable-token-short") != nil
				})
				k.m.requested(t, 600)
				k.run("kubectl delete -f vault-secrets-operator/parameters/ && vault policy write reports policy.hcl")
			},
		},
	})

	// A refresh comes at 1% of five minutes and up to 10% at random, instead of 67%.
	k.m.ok(t, "POST", "cable/roles/reports", map[string]any{"ttl": "5m"})
	before = k.m.sim.Stats().Minted
	page := readFile(t, "../examples/kubernetes/vault-secrets-operator/README.md")
	list := regexp.MustCompile("`({{ get .Secrets \"scopes\"[^`]+)`").FindStringSubmatch(page)
	if list == nil {
		t.Fatal("the page has no template for a list")
	}
	k.patch(resource, `"renewalPercent":1,"destination":{"transformation":{"templates":{"LIST":{"text":`+
		strconv.Quote(list[1])+`}}}}`)
	k.minted(t, before, 1, "a changed manifest")
	restarted := k.run(restartedAt)
	k.minted(t, before, 2, "a refresh")
	k.wait(t, "a restart with the new token", restartedAt, func(out string) bool { return out != restarted })
	now := k.secret("cable-token")
	if now["CABLE_TOKEN"] == first["CABLE_TOKEN"] || now["LIST"] != now["CABLE_SCOPES"] {
		t.Errorf("the Secret has the first token still, or the list as %q", now["LIST"])
	}
	k.m.ok(t, "POST", "cable/roles/reports", map[string]any{"ttl": "1h"})
	k.mints(t, 1, "a lease of an hour", func() { k.patch(resource, `"renewalPercent":67`) })

	// The operator starts again, long before the refresh is due.
	k.wait(t, "the status", "kubectl --namespace reports get "+resource+
		" --output 'jsonpath={.metadata.generation} {.status.lastGeneration}'", func(out string) bool {
		generation, last, _ := strings.Cut(out, " ")
		return generation == last
	})
	stop()
	k.mints(t, 1, "the operator restarted", func() { stop = start() })

	// Cable is down when the manifest changes. Each attempt is three API calls,
	// because Vault's client repeats it twice.
	last := k.secret("cable-token")
	attempts := func() (n int) {
		t.Helper()
		for count := range strings.FieldsSeq(k.reports("get events --field-selector reason=SecretSyncError" +
			" --output 'jsonpath={.items[*].count}'")) {
			i, err := strconv.Atoi(count)
			noError(t, err)
			n += i
		}
		return n
	}
	k.m.sim.SetFault(cabletest.Fault{Status: 500})
	calls, failed := k.m.sim.CallCount(), attempts()
	k.patch(resource, `"renewalPercent":66`)
	waitFor(t, time.Minute, "two failed attempts", func() bool { return attempts() >= failed+2 })
	if n := k.m.sim.CallCount() - calls; n/3 != attempts()-failed { // another one may be under way
		t.Errorf("%d API calls for %d attempts", n, attempts()-failed)
	}
	if now := k.secret("cable-token"); now["CABLE_TOKEN"] != last["CABLE_TOKEN"] {
		t.Error("the Secret has lost its token")
	}
	k.mints(t, 1, "Cable is back", k.m.sim.ClearFaults)

	// Without a lease, it plans no refresh, unless refreshAfter is set. The first two tokens are for changed manifests.
	k.m.ok(t, "POST", "cable/roles/reports", map[string]any{"lease": false})
	k.mints(t, 1, "a token without a lease", func() { k.patch(resource, `"renewalPercent":65`) })
	k.wait(t, "no refresh is planned", "kubectl --namespace reports get events --output 'jsonpath={.items[*].message}'",
		func(out string) bool { return strings.Contains(out, `lease_id="", horizon=0s`) })
	k.mints(t, 4, "refreshAfter", func() { k.patch(resource, `"refreshAfter":"5s"`) })
	k.m.ok(t, "POST", "cable/roles/reports", map[string]any{"lease": true})
	k.run("kubectl delete -f vault-secrets-operator")
	stop()
}

// testExternalSecrets runs examples/kubernetes/external-secrets.
func testExternalSecrets(t *testing.T, k *kubernetes) {
	k.applyCRDs(t, "github.com/external-secrets/external-secrets", "deploy/crds/bundle.yaml")
	stop := k.consumer(t, filepath.Join(needTool(t, "consumers"), "external-secrets"), "--metrics-addr=0")
	defer stop()
	const resource = "externalsecret cable"
	before := k.m.sim.Stats().Minted
	// short has the ExternalSecret take the generator cable-short, of which each file
	// has one.
	short := func() {
		t.Helper()
		before := k.m.sim.CallCount()
		k.patch(resource, `"dataFrom":[{"sourceRef":{"generatorRef":{"apiVersion":`+
			`"generators.external-secrets.io/v1alpha1","kind":"VaultDynamicSecret","name":"cable-short"}}}]`)
		waitFor(t, time.Minute, "a token of 10 minutes", func() bool {
			calls := k.m.sim.Calls()
			return len(calls) > before && calls[len(calls)-1].ExpirySeconds == 600
		})
		k.reports("delete " + resource)
	}
	k.runPage("examples/kubernetes/external-secrets/README.md", map[string]step{
		"Run it/1": {
			want: []string{
				"externalsecret.external-secrets.io/cable condition met",
				`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$`,
			},
			after: func(string) {
				k.holds(k.secret("cable-token"), "token", "scope", "expires_at")
				if n := k.m.sim.Stats().Minted - before; n < 1 || n > 2 {
					t.Errorf("%d tokens were minted at first", n)
				}
				// It refreshes by the interval, whatever the lease.
				k.mints(t, 3, "refreshes every 5 seconds", func() { k.patch(resource, `"refreshInterval":"5s"`) })
				// Cable is down.
				k.m.sim.SetFault(cabletest.Fault{Status: 500})
				calls := k.m.sim.CallCount()
				k.wait(t, "a refresh that fails", "kubectl --namespace reports get "+resource+
					" --output 'jsonpath={.status.conditions[0].status}'",
					func(out string) bool { return out == "False" })
				last := k.secret("cable-token")
				waitFor(t, time.Minute, "more attempts", func() bool { return k.m.sim.CallCount() >= calls+4 })
				if now := k.secret("cable-token"); now["token"] == "" || now["token"] != last["token"] {
					t.Error("the Secret has lost its token")
				}
				k.mints(t, 1, "Cable is back", k.m.sim.ClearFaults)
				// Without a lease it goes by the interval, too. Without a template, ttl is a key of the Secret.
				k.m.ok(t, "POST", "cable/roles/reports", map[string]any{"lease": false})
				k.mints(t, 3, "refreshes without a lease", func() { k.patch(resource, `"target":{"template":null}`) })
				waitFor(t, time.Minute, "a Secret with ttl and rotation_period", func() bool {
					data := k.secret("cable-token")
					return data["ttl"] != "" && data["ttl"] == data["rotation_period"]
				})
				k.m.ok(t, "POST", "cable/roles/reports", map[string]any{"lease": true})
				k.patch(resource, `"refreshInterval":"30m"`)
			},
		},
		"Run it/2": {
			want: []string{"cable-short created"},
			after: func(string) {
				short()
				k.run("vault policy write reports policy.hcl")
			},
		},
	})
	// Under the policy that permits only reads; an older version refuses the field.
	switch out, err := k.try("kubectl apply -f external-secrets/parameters/read.yaml"); {
	case err == nil:
		k.run("kubectl apply -f external-secrets/secret.yaml")
		short()
	case !strings.Contains(out, "getParameters"):
		t.Errorf("read.yaml: %v\n%s", err, out)
	}
}

// testInjector runs examples/kubernetes/injector. The API server has the injector
// change the Deployment's pod, and the pod's Agents run here.
func testInjector(t *testing.T, k *kubernetes) {
	cert, root := issue(t, "127.0.0.1")
	k.write("webhook.crt", string(root))
	k.write("webhook.key", privateKey(t, cert.PrivateKey.(*ecdsa.PrivateKey)))
	listen := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	k.consumer(t, filepath.Join(needTool(t, "consumers"), "injector"), "-listen="+listen, "-vault-address="+k.m.addr,
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
	noError(t, json.Unmarshal([]byte(k.reports("get deployment reports --output json")), &deployment))
	pod := deployment.Spec.Template
	pod["apiVersion"], pod["kind"] = "v1", "Pod"
	pod["metadata"].(map[string]any)["name"] = "reports"
	text, err := json.Marshal(pod)
	noError(t, err)
	k.write("pod.json", string(text))
	type container struct {
		Name string
		Env  []struct{ Name, Value string }
	}
	var created struct {
		Spec struct{ InitContainers, Containers []container }
	}
	waitFor(t, time.Minute, "the webhook is in force", func() bool {
		k.reports("delete --ignore-not-found --now pod reports")
		out, err := k.try("kubectl --namespace reports create -f pod.json --output json")
		if err != nil { // the API server does not reach the webhook yet
			return false
		}
		noError(t, json.Unmarshal([]byte(out), &created))
		return len(created.Spec.InitContainers) > 0
	})
	defer k.run("kubectl --namespace reports delete pod reports --now && kubectl delete -f webhook.yaml")

	// Both Agents, with the paths of their container in the test's folder.
	for _, folder := range []string{"home", "secrets", "account"} {
		noError(t, os.MkdirAll(k.place(folder), 0o700))
	}
	edit := strings.NewReplacer("/home/vault", k.place("home"), "/vault/secrets", k.place("secrets"),
		"/var/run/secrets/vault.hashicorp.com/serviceaccount", k.place("account"))
	k.run("kubectl --namespace reports create token reports --audience vault > account/token")
	for file, wants := range map[string][]string{
		"init.json":    {"vault-agent-init", `"exit_after_auth":true`},
		"sidecar.json": {"vault-agent", `"exit_after_auth":false`},
	} {
		for _, c := range append(created.Spec.InitContainers, created.Spec.Containers...) {
			for _, e := range c.Env {
				if c.Name == wants[0] && e.Name == "VAULT_CONFIG" {
					text, err := base64.StdEncoding.DecodeString(e.Value)
					noError(t, err)
					k.write(file, edit.Replace(string(text)))
				}
			}
		}
		wants = append(wants[1:], `"exit_on_retry_failure":true`, `"perms":"0440"`, `"error_on_missing_key":true`)
		for _, want := range wants {
			if !strings.Contains(readFile(t, k.place(file)), want) {
				t.Errorf("%s has no %s", file, want)
			}
		}
	}
	agents := func(n int) {
		t.Helper()
		before := k.m.sim.Stats().Minted
		k.run("VAULT_TOKEN= vault agent -config=init.json")
		token := readFile(t, k.place("secrets/token"))
		info, err := os.Stat(k.place("secrets/token"))
		if err != nil || info.Mode() != 0o440 || !regexp.MustCompile(`^eyJ\S+$`).MatchString(token) {
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
