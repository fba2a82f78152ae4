// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// TestScript runs the transcripts of testdata/script. Each has a mount of its
// own on the shared server, at $cable, and a Cable of its own; its file
// refresh-key.txt holds the refresh key.
//
// The environment has VAULT_ADDR and VAULT_TOKEN as for any use of Vault's CLI;
// cable, the mount's path; CABLE_URL; ORG; and SHA256 and VERSION of the plugin.
//
// Commands besides those of testscript, each of which can be negated:
//
//	vault ARG...                          Vault's CLI
//	http [-token T] [-wrap TTL] METHOD PATH [BODY]
//	                                      Vault's HTTP API: status line, and indented JSON with
//	                                      sorted keys; fails for a status from 400 on
//	get VAR KEY.KEY                       set a variable from the last command's JSON
//	sim add JSON                          misbehave after the faults added before; see cabletest.Fault
//	sim close                             stop responding
//	sim calls N                           Cable was called N times so far
//	sim requested                         print the last call's request
//	sim valid FILE                        FILE contains an access token that is valid
//	noleases PREFIX                       poll until no lease is left below PREFIX
func TestScript(t *testing.T) {
	t.Parallel()
	v := sharedServer(t)
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			m := newMount(env.T().(testing.TB), v, nil)
			env.Values[mountKey{}] = m
			for name, value := range map[string]string{
				"PATH":              suite.bin + string(os.PathListSeparator) + os.Getenv("PATH"),
				"HOME":              env.WorkDir,
				"VAULT_ADDR":        v.addr,
				"VAULT_TOKEN":       v.root,
				"VAULT_MAX_RETRIES": "0", // so that a failure is shown at once
				"cable":             m.path,
				"CABLE_URL":         m.sim.URL,
				"ORG":               cabletest.DefaultOrganizationID,
				"SHA256":            suite.sha256,
				"VERSION":           pluginVersion,
			} {
				env.Setenv(name, value)
			}
			return os.WriteFile(filepath.Join(env.WorkDir, "refresh-key.txt"), []byte(m.sim.RefreshKey()+"\n"), 0o600)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"vault":    cmdVault,
			"http":     cmdHTTP,
			"get":      cmdGet,
			"sim":      cmdSim,
			"noleases": cmdNoLeases,
		},
	})
}

// mountKey finds a script's mount.
type mountKey struct{}

// mountOf returns the script's mount.
func mountOf(ts *testscript.TestScript) *mount { return ts.Value(mountKey{}).(*mount) }

// cmdVault runs Vault's CLI. Its output may contain a token only if the command
// minted or unwrapped one.
func cmdVault(ts *testscript.TestScript, neg bool, args []string) {
	err := ts.Exec(suite.vault, args...)
	mint := err == nil && len(args) > 0 && (args[0] == "unwrap" ||
		(args[0] == "read" || args[0] == "write") && strings.Contains(strings.Join(args, " "), "/creds/"))
	checkOutput(ts, ts.ReadFile("stdout")+ts.ReadFile("stderr"), mint)
	checkResult(ts, neg, err == nil, fmt.Sprintf("vault: %v", err))
}

// checkOutput fails the script if text contains a secret.
func checkOutput(ts *testscript.TestScript, text string, mint bool) {
	if secret := findSecret(text, mint); secret != "" {
		ts.Fatalf("the output contains %s", secret)
	}
}

// checkResult fails the script if a command ended in another way than expected.
func checkResult(ts *testscript.TestScript, neg, ok bool, failure string) {
	switch {
	case neg && ok:
		ts.Fatalf("unexpected success")
	case !neg && !ok:
		ts.Fatalf("%s", failure)
	}
}

// cmdHTTP calls Vault's HTTP API.
func cmdHTTP(ts *testscript.TestScript, neg bool, args []string) {
	r := request{token: ts.Getenv("VAULT_TOKEN"), header: map[string]string{}}
	for len(args) > 1 && strings.HasPrefix(args[0], "-") {
		switch args[0] {
		case "-token":
			r.token = args[1]
		case "-wrap":
			r.header["X-Vault-Wrap-TTL"] = args[1]
		default:
			ts.Fatalf("http: unknown option %s", args[0])
		}
		args = args[2:]
	}
	if len(args) != 2 && len(args) != 3 {
		ts.Fatalf("usage: http [-token T] [-wrap TTL] METHOD PATH [BODY]")
	}
	r.method, r.path = args[0], args[1]
	if len(args) == 3 {
		r.body = args[2]
	}
	if r.method == "PATCH" {
		r.header["Content-Type"] = "application/merge-patch+json"
	}
	a, err := mountOf(ts).call(r)
	ts.Check(err)
	checkOutput(ts, fmt.Sprint(a.text, a.header), a.status == 200 &&
		strings.HasPrefix(r.path, mountOf(ts).path+"/creds/"))
	fmt.Fprintf(ts.Stdout(), "HTTP %d\n", a.status)
	var body any
	if json.Unmarshal([]byte(a.text), &body) == nil {
		e := json.NewEncoder(ts.Stdout())
		e.SetEscapeHTML(false)
		e.SetIndent("", "  ")
		ts.Check(e.Encode(body))
	}
	checkResult(ts, neg, a.status < 400, fmt.Sprintf("HTTP %d", a.status))
}

// cmdGet sets a variable from the JSON of the last command.
func cmdGet(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: get VAR KEY.KEY")
	}
	text := ts.ReadFile("stdout")
	d := json.NewDecoder(strings.NewReader(text[max(0, strings.Index(text, "{")):]))
	d.UseNumber()
	var value any
	ts.Check(d.Decode(&value))
	for key := range strings.SplitSeq(args[1], ".") {
		m, _ := value.(map[string]any)
		if value = m[key]; value == nil {
			ts.Fatalf("there is no %s in %s", args[1], text)
		}
	}
	ts.Setenv(args[0], fmt.Sprint(value))
}

// cmdSim controls the script's Cable, or shows the calls that it received.
func cmdSim(ts *testscript.TestScript, neg bool, args []string) {
	sim := mountOf(ts).sim
	switch {
	case len(args) == 2 && args[0] == "add":
		var f cabletest.Fault
		ts.Check(json.Unmarshal([]byte(args[1]), &f))
		sim.AddFault(f)
	case slices.Equal(args, []string{"close"}):
		sim.Close()
	case len(args) == 2 && args[0] == "calls":
		n, err := strconv.Atoi(args[1])
		ts.Check(err)
		checkResult(ts, neg, sim.CallCount() == n, fmt.Sprintf("Cable was called %d times", sim.CallCount()))
	case slices.Equal(args, []string{"requested"}):
		calls := sim.Calls()
		if len(calls) == 0 {
			ts.Fatalf("Cable was never called")
		}
		last := calls[len(calls)-1]
		fmt.Fprintf(ts.Stdout(), "expiry_seconds=%d organization_id=%s scopes=%s\n",
			last.ExpirySeconds, last.OrganizationID, strings.Join(last.Scopes, ","))
	case len(args) == 2 && args[0] == "valid":
		text := ts.ReadFile(args[1])
		valid := slices.ContainsFunc(sim.Minted(), func(token cabletest.Minted) bool {
			return strings.Contains(text, token.Token) && time.Now().Before(token.Expiry)
		})
		checkResult(ts, neg, valid, "no valid token in "+args[1])
	default:
		ts.Fatalf("sim: unknown arguments %q", args)
	}
}

// cmdNoLeases waits until Vault has ended the leases below a prefix.
func cmdNoLeases(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: noleases PREFIX")
	}
	for end := time.Now().Add(20 * time.Second); mountOf(ts).leaseCount(args[0]) != 0; time.Sleep(pollInterval) {
		if time.Now().After(end) {
			ts.Fatalf("there are still leases below %s", args[0])
		}
	}
}

// leaseCount counts the leases below a prefix; -1 if Vault cannot say.
func (v *vaultServer) leaseCount(prefix string) int {
	a, err := v.call(request{method: "LIST", path: "sys/leases/lookup/" + prefix, token: v.root})
	if err != nil || a.status != 200 && a.status != 404 {
		return -1
	}
	keys, _ := a.Data["keys"].([]any)
	return len(keys)
}
