// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// The simulator's refresh keys and tokens contain markers. A marker outside the
// response to a read of creds is a leaked secret; the refresh key is one in any
// response.

// position is the size of a server's logs before a test.
type position struct{ log, audit int64 }

// watch makes t fail if, from now until its end, a secret is written to the
// server's log (with the plugin's, at trace level) or to the audit log.
func watch(t testing.TB, v *vaultServer) {
	before := v.position()
	t.Cleanup(func() {
		for _, leak := range v.leaks(before) {
			t.Errorf("%s", leak)
		}
		if now := v.position(); now.audit == before.audit || now.log == before.log {
			t.Errorf("the audit log or the server's log is empty: %+v, then %+v", before, now)
		}
	})
}

// position returns the sizes of the logs.
func (v *vaultServer) position() position {
	size := func(path string) int64 {
		info, err := os.Stat(path)
		if err != nil {
			return 0
		}
		return info.Size()
	}
	return position{size(v.log), size(v.audit)}
}

// leaks returns a line for each line of the logs from a position on that contains
// a secret. Other tests write to the same logs, so the line shows which it was.
func (v *vaultServer) leaks(from position) (leaks []string) {
	for path, offset := range map[string]int64{v.log: from.log, v.audit: from.audit} {
		data, err := os.ReadFile(path)
		if err != nil {
			leaks = append(leaks, err.Error())
		}
		for line := range bytes.Lines(data[min(offset, int64(len(data))):]) {
			if secret := findSecret(string(line), false); secret != "" {
				leaks = append(leaks,
					fmt.Sprintf("%s contains %s: %s", filepath.Base(path), secret, bytes.TrimSpace(line)))
			}
		}
	}
	return leaks
}

// findSecret names the secret that text contains, or returns "". In the response
// to a mint a token is none.
func findSecret(text string, mint bool) string {
	if strings.Contains(text, cabletest.RefreshKeyMarker) {
		return "the refresh key"
	}
	if !mint && strings.Contains(text, cabletest.TokenMarker) {
		return "an access token"
	}
	return ""
}

// TestCanaryIsFound shows that the check above can fail.
func TestCanaryIsFound(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	v := &vaultServer{log: filepath.Join(dir, "vault.log"), audit: filepath.Join(dir, "audit.log")}
	key := cabletest.NewRefreshKey()
	audited := "{}\n"
	writeFile(t, v.log, "[TRACE] started\n[TRACE] "+key+"\n")
	writeFile(t, v.audit, audited)
	before := v.position()
	check := func(from position, want ...string) {
		t.Helper()
		got := v.leaks(from)
		if len(got) != len(want) || len(want) > 0 && !strings.Contains(got[0], want[0]) {
			t.Errorf("the search finds %q, want %q", got, want)
		}
	}
	check(position{}, "vault.log contains the refresh key: [TRACE] "+key)
	check(before) // nothing was written since
	writeFile(t, v.audit, audited+`{"data":{"token":"`+cabletest.TokenMarker+`123"}}`)
	check(before, "audit.log contains an access token")
	noError(t, os.Remove(v.audit))
	check(before, "no such file")
	if findSecret(key, true) == "" || findSecret(cabletest.TokenMarker, true) != "" {
		t.Error("the response to a mint contains the token, and never the key")
	}
}
