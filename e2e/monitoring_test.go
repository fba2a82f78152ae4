// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// The files of monitoring/ are tried with a real Prometheus, which
// scripts/prometheus finds or builds.

// findPrometheus returns the folder that prometheus and promtool are in.
var findPrometheus = sync.OnceValues(func() (string, error) {
	out, err := run("../scripts/prometheus", "--path")
	if err != nil {
		return "", fmt.Errorf("finding or building Prometheus: %w", err)
	}
	return strings.TrimSpace(out), nil
})

// needPrometheus is needVault for Prometheus.
func needPrometheus(t *testing.T) (dir string) {
	t.Helper()
	if testing.Short() && !required() {
		t.Skip("-short: no Prometheus is looked for")
	}
	dir, err := findPrometheus()
	if err != nil {
		skipUnlessRequired(t, err)
	}
	return dir
}

// TestAlertRules runs the unit tests of the alert rules, and follows the link of
// each into the documents.
func TestAlertRules(t *testing.T) {
	t.Parallel()
	promtool := filepath.Join(needPrometheus(t), "promtool")
	for _, args := range [][]string{
		{"check", "rules", "../monitoring/alerts.yml"},
		{"test", "rules", "../monitoring/alerts_test.yml"},
		{"check", "config", "--syntax-only", "../monitoring/prometheus.yml"}, // its files are an operator's
	} {
		if out, err := exec.Command(promtool, args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}

	rules, tests := readFile(t, "../monitoring/alerts.yml"), readFile(t, "../monitoring/alerts_test.yml")
	for _, m := range regexp.MustCompile(`- alert: (\w+)`).FindAllStringSubmatch(rules, -1) {
		if !strings.Contains(tests, "- alertname: "+m[1]) {
			t.Errorf("alert %s has no test", m[1])
		}
	}
	links := regexp.MustCompile(`runbook: (\S+)#(\S+)`).FindAllStringSubmatch(rules, -1)
	if alerts := strings.Count(rules, "- alert: "); len(links) != alerts {
		t.Errorf("%d alerts have %d links to a runbook", alerts, len(links))
	}
	for _, m := range links {
		if !slices.Contains(anchors(readFile(t, filepath.Join("..", m[1]))), m[2]) {
			t.Errorf("%s has no heading for #%s", m[1], m[2])
		}
	}
}

// anchors returns GitHub's names of the headings of a page.
func anchors(page string) (found []string) {
	for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(page, -1) {
		name := regexp.MustCompile(`[^\w\- ]`).ReplaceAllString(strings.ToLower(m[1]), "")
		found = append(found, strings.ReplaceAll(name, " ", "-"))
	}
	return found
}

// promServer is a running Prometheus.
type promServer struct{ url string }

// startPrometheus scrapes m each second as monitoring/prometheus.yml says, with
// a token that may do nothing else, and ends with the test.
func startPrometheus(t *testing.T, m *mount) *promServer {
	t.Helper()
	bin, dir := needPrometheus(t), t.TempDir()
	m.writePolicy(t, m.path, fmt.Sprintf(`path "%s/metrics" { capabilities = ["read"] }`, m.path))
	token := m.tokenWith(t, m.path, nil)
	tokenFile := filepath.Join(dir, "token")
	writeFile(t, tokenFile, token+"\n")
	rules, err := filepath.Abs("../monitoring/alerts.yml")
	noError(t, err)
	config := readFile(t, "../monitoring/prometheus.yml")
	for _, change := range [][2]string{
		{"scrape_interval: 15s", "scrape_interval: 1s"},
		{"evaluation_interval: 15s", "evaluation_interval: 1s"},
		{"- alerts.yml", "- " + rules},
		{"metrics_path: /v1/cable/metrics", "metrics_path: /v1/" + m.path + "/metrics"},
		{"scheme: https", "scheme: http"},
		{"    tls_config:\n", ""},
		{"      ca_file: /etc/prometheus/vault-ca.pem", ""},
		{"credentials_file: /etc/prometheus/vault-token", "credentials_file: " + tokenFile},
		{
			"[vault.example.com:8200]\n        labels:\n          mount: cable\n",
			"['" + strings.TrimPrefix(m.addr, "http://") + "']\n        labels:\n          mount: " + m.path + "\n",
		},
	} {
		if strings.Count(config, change[0]) != 1 {
			t.Fatalf("monitoring/prometheus.yml does not have %q once", change[0])
		}
		config = strings.Replace(config, change[0], change[1], 1)
	}
	file := filepath.Join(dir, "prometheus.yml")
	writeFile(t, file, config)
	if out, err := exec.Command(filepath.Join(bin, "promtool"), "check", "config", file).CombinedOutput(); err != nil {
		t.Fatalf("promtool check config: %v\n%s", err, out)
	}

	_, log := runUntilEnd(t, dir, os.Environ(), filepath.Join(bin, "prometheus"), "--config.file="+file,
		"--storage.tsdb.path=data", "--web.listen-address=127.0.0.1:0")
	p := new(promServer)
	waitFor(t, 30*time.Second, "Prometheus is ready", func() bool {
		m := regexp.MustCompile(`"Listening on".* address=(127\.0\.0\.1:\d+)`).FindStringSubmatch(readFile(t, log))
		if m == nil {
			return false
		}
		p.url = "http://" + m[1]
		resp, err := http.Get(p.url + "/-/ready") // it listens before it can answer
		if err != nil {
			return false
		}
		_ = resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	return p
}

// get reads the data of an answer of Prometheus' API, which must succeed.
func (p *promServer) get(t *testing.T, path string, query url.Values, data any) {
	t.Helper()
	resp, err := http.Get(p.url + "/api/v1/" + path + "?" + query.Encode())
	noError(t, err)
	defer resp.Body.Close()
	answer := struct {
		Status, Error string
		Data          any
	}{Data: data}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || answer.Status != "success" {
		t.Fatalf("Prometheus responds to %s with %d: %s, %v", query, resp.StatusCode, answer.Error, err)
	}
}

// query returns the values of an expression by the labels that it has.
func (p *promServer) query(t *testing.T, expr string) map[string]string {
	t.Helper()
	var data struct {
		Result []struct {
			Metric map[string]string
			Value  [2]any // time, and value as text
		}
	}
	p.get(t, "query", url.Values{"query": {expr}}, &data)
	found := map[string]string{}
	for _, r := range data.Result {
		var labels []string
		for _, name := range slices.Sorted(maps.Keys(r.Metric)) {
			labels = append(labels, r.Metric[name])
		}
		found[strings.Join(labels, " ")] = fmt.Sprint(r.Value[1])
	}
	return found
}

// everyOutcome has reads end in every way but vault_error, for which Vault's
// storage would have to break, and returns how often each was.
func everyOutcome(t *testing.T, m *mount) map[string]string {
	t.Helper()
	want := map[string]string{
		"minted app": "3", "canceled app": "1", "paused app": "1",
		"invalid_request app": "1", "invalid_request (unknown)": "1",
	}
	lease := m.read(t).LeaseID
	m.read(t)
	m.read(t)
	m.ok(t, "PUT", "sys/leases/revoke", map[string]any{"lease_id": lease})
	m.do(t, "GET", m.path+"/creds/app?ttl=1s", nil)
	m.do(t, "GET", m.path+"/creds/none", nil)

	// A caller that leaves.
	m.sim.SetFault(cabletest.Fault{Delay: 10 * time.Second})
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, _ = m.callContext(ctx, request{method: "GET", path: m.path + "/creds/app", token: m.root})
	waitFor(t, 10*time.Second, "the token request of the caller that left has ended", func() bool {
		return strings.Contains(m.ok(t, "GET", m.path+"/metrics", nil).text, `outcome="canceled"`)
	})
	m.sim.ClearFaults()

	// Readers that share a token, and get the previous one while Cable is down.
	role := map[string]any{"scopes": "transactions:read", "ttl": "5m", "reuse_for": "1s"}
	m.ok(t, "POST", m.path+"/roles/shared", role)
	m.ok(t, "GET", m.path+"/creds/shared", nil)
	m.sim.SetFault(cabletest.Fault{Status: 500})
	reused := 0
	waitFor(t, 10*time.Second, "readers get the previous token", func() bool {
		reused++
		return strings.Contains(m.ok(t, "GET", m.path+"/creds/shared", nil).text, "Cable is down (cable_error)")
	})
	want["minted shared"], want["reused shared"] = "1", fmt.Sprint(reused)
	m.sim.ClearFaults()

	for _, f := range failures {
		m.fail(t, f)
		want[f.outcome+" app"] = "1"
	}
	m.do(t, "GET", m.path+"/creds/app", nil) // in the pause of the last
	return want
}

// selector finds a series in the metrics, and a selector in an expression.
var selector = regexp.MustCompile(`\b((?:vault_cable|go|process)_\w+)(?:\{([^{}]*)\})?`)

// labelList finds labels that an expression groups by, or a text names.
var labelList = regexp.MustCompile(
	`\b(?:by|without|ignoring|on) ?\(([\w, ]*)\)|\{\{(\w+)\}\}|\$labels\.(\w+)|\.Labels\.(\w+)`)

// matcher finds a label with its value in either.
var matcher = regexp.MustCompile(`(\w+)(?:=~|!~|!=|=)"([^"]*)"`)

// TestMonitoring scrapes a mount by a real Prometheus while reads end in every
// way, and compares the dashboard and the alerts with the series that it then has.
func TestMonitoring(t *testing.T) {
	t.Parallel()
	needPrometheus(t)
	m := newMount(t, sharedServer(t), nil)
	m.configure(t)
	p := startPrometheus(t, m)
	waitFor(t, 30*time.Second, "a scrape succeeds", func() bool { return p.query(t, "sum(up)")[""] == "1" })
	want := everyOutcome(t, m)

	var got map[string]string
	for end := time.Now().Add(30 * time.Second); !cmp.Equal(want, got); time.Sleep(pollInterval) {
		if time.Now().After(end) {
			t.Fatalf("token requests (-want +in Prometheus):\n%s", cmp.Diff(want, got))
		}
		got = p.query(t, "sum by (outcome, role) (vault_cable_token_requests_total)")
	}
	for expr, value := range map[string]string{
		`sum(vault_cable_granted_lifetime_seconds_count)`:                   "4",
		`sum(vault_cable_api_calls_total{code="401"})`:                      "1",
		`sum(vault_cable_api_calls_total{code=~"401|403|500|429"})`:         "5",
		`sum(vault_cable_reuse_fallbacks_total{cause="cable_error"})`:       "1",
		`sum(vault_cable_api_calls_total{code=~"502|503|504|400|404|408"})`: "0",
		`sum(vault_cable_grant_mismatches_total)`:                           "1",
		`sum(vault_cable_pauses_total)`:                                     "1",
		`sum(vault_cable_paused)`:                                           "1",
		`sum(vault_cable_leases_ended_total)`:                               "1",
		`sum(vault_cable_panics_total)`:                                     "0",
	} {
		if got := p.query(t, expr)[""]; got != value {
			t.Errorf("%s: %s, want %s", expr, got, value)
		}
	}

	dashboard, alerts := readFile(t, "../monitoring/dashboard.json"), readFile(t, "../monitoring/alerts.yml")
	t.Run("names", func(t *testing.T) { checkNames(t, m, dashboard, alerts) })
	t.Run("dashboard", func(t *testing.T) { checkDashboard(t, p, m, dashboard) })
	t.Run("alerts", func(t *testing.T) { checkAlerts(t, p, m) })
}

// checkNames makes sure that the dashboard and the alerts speak of metrics,
// labels and values that are served, and that the dashboard has all metrics of
// the engine's own.
func checkNames(t *testing.T, m *mount, dashboard, alerts string) {
	served := map[string]map[string][]string{} // metric, label, values
	for line := range strings.Lines(m.ok(t, "GET", m.path+"/metrics", nil).text) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		s := selector.FindStringSubmatch(line)
		if s == nil {
			t.Fatalf("a line of the metrics is none: %q", line)
		}
		if served[s[1]] == nil {
			served[s[1]] = map[string][]string{"mount": nil, "job": nil, "instance": nil} // of each target
		}
		for _, l := range matcher.FindAllStringSubmatch(s[2], -1) {
			served[s[1]][l[1]] = append(served[s[1]][l[1]], l[2])
		}
	}
	labels := map[string]bool{}
	for _, of := range served {
		for name := range of {
			labels[name] = true
		}
	}
	requests := served["vault_cable_token_requests_total"]
	requests["outcome"] = append(requests["outcome"], "vault_error") // see everyOutcome

	used := map[string]bool{}
	for name, text := range map[string]string{"dashboard.json": dashboard, "alerts.yml": alerts} {
		text = strings.ReplaceAll(text, `\"`, `"`)
		for _, s := range selector.FindAllStringSubmatch(text, -1) {
			of := served[s[1]]
			if of == nil {
				t.Errorf("%s names %s, which is not served", name, s[1])
				continue
			}
			if name == "dashboard.json" {
				used[family(s[1])] = true
			}
			for _, l := range matcher.FindAllStringSubmatch(s[2], -1) {
				values, ok := of[l[1]]
				if !ok {
					t.Errorf("%s: %s has no label %q", name, s[0], l[1])
				}
				for v := range strings.SplitSeq(l[2], "|") {
					if l[1] != "mount" && !slices.Contains(values, v) {
						t.Errorf("%s: %s=%q of %s is not served, but %q", name, l[1], v, s[1], values)
					}
				}
			}
		}
		for _, l := range labelList.FindAllStringSubmatch(text, -1) {
			for label := range strings.SplitSeq(l[1]+l[2]+l[3]+l[4], ", ") {
				if !labels[label] {
					t.Errorf("%s: %s is about a label that is not served", name, l[0])
				}
			}
		}
	}
	for metric := range served {
		if strings.HasPrefix(metric, "vault_cable_") && !used[family(metric)] {
			t.Errorf("no panel of the dashboard shows %s", metric)
		}
	}
}

// family is a metric's name without the suffix of a histogram's series.
func family(metric string) string {
	for _, suffix := range []string{"_bucket", "_sum", "_count"} {
		metric = strings.TrimSuffix(metric, suffix)
	}
	return metric
}

// checkDashboard makes sure that each query of the dashboard finds something.
func checkDashboard(t *testing.T, p *promServer, m *mount, text string) {
	var d struct {
		Templating struct {
			List []struct{ Definition string }
		}
		Panels []struct {
			Type    string
			Title   string
			Targets []struct{ Expr string }
		}
	}
	noError(t, json.Unmarshal([]byte(text), &d))
	if got := d.Templating.List[1].Definition; got != "label_values(vault_cable_configured, mount)" {
		t.Errorf("the variable mount is %q", got)
	}
	var mounts []string
	p.get(t, "label/mount/values", url.Values{"match[]": {"vault_cable_configured"}}, &mounts)
	if !slices.Contains(mounts, m.path) {
		t.Errorf("the mounts to choose from are %q", mounts)
	}
	variables := strings.NewReplacer("$mount", m.path, "$__rate_interval", "1m", "$__range", "10m")
	for _, panel := range d.Panels {
		if len(panel.Targets) == 0 && panel.Type != "row" {
			t.Errorf("panel %q asks for nothing", panel.Title)
		}
		for _, target := range panel.Targets {
			if expr := variables.Replace(target.Expr); len(p.query(t, expr)) == 0 {
				t.Errorf("panel %q: %s finds nothing", panel.Title, expr)
			}
		}
	}
}

// checkAlerts makes sure that all rules can be evaluated, and that the alerts that
// fire at once have fired.
func checkAlerts(t *testing.T, p *promServer, m *mount) {
	var rules struct {
		Groups []struct {
			Rules []struct{ Name, Health, LastError string }
		}
	}
	names := 0
	p.get(t, "rules", nil, &rules)
	for _, g := range rules.Groups {
		for _, r := range g.Rules {
			names++
			if r.Health != "ok" {
				t.Errorf("rule %s is %s: %s", r.Name, r.Health, r.LastError)
			}
		}
	}
	if want := strings.Count(readFile(t, "../monitoring/alerts.yml"), "- alert: "); names != want {
		t.Errorf("Prometheus evaluates %d rules of %d", names, want)
	}
	var alerts struct {
		Alerts []struct {
			State               string
			Labels, Annotations map[string]string
		}
	}
	for _, name := range []string{"CableGrantMismatch", "CableUndeliveredTokens"} {
		waitFor(t, 30*time.Second, name+" fires", func() bool {
			p.get(t, "alerts", nil, &alerts)
			for _, a := range alerts.Alerts {
				text := a.Annotations["description"]
				if a.Labels["alertname"] == name && a.State == "firing" && strings.Contains(text, m.path) {
					t.Logf("%s: %s", a.Annotations["summary"], text)
					return true
				}
			}
			return false
		})
	}
}
