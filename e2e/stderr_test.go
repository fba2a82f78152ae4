// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"cmp"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// Vault logs all that a plugin writes to standard error, and Go's libraries write there.
// net/http prints unexpected bytes on a connection, and gRPC prints frames if the
// environment tells it to.

// register adds the plugin to the catalog under another name, with variables of its
// environment, for the duration of a test.
func (v *vaultServer) register(t *testing.T, name string, env ...string) {
	t.Helper()
	v.ok(t, "PUT", "sys/plugins/catalog/secret/"+name, map[string]any{
		"sha256": suite.sha256, "command": pluginName, "version": pluginVersion, "env": env,
	})
}

// flushLog returns when all that the plugin has written to standard error so far
// is in the server's log, because the pipe keeps the order and the last line is known.
func (m *mount) flushLog(t *testing.T) {
	t.Helper()
	m.ok(t, "POST", m.path+"/roles/flush", map[string]any{"scopes": "transactions:read"})
	waitFor(t, 10*time.Second, "the last line of the plugin", func() bool {
		return m.logHas("mount="+m.path+"/", "role=flush")
	})
}

// TestOnlyStructuredLog checks that Vault's log gets nothing but the lines of the
// engine's logger, whatever a server sends on its connections, and whatever the
// environment tells Go's libraries to print. TestStderr does so without a connection.
func TestOnlyStructuredLog(t *testing.T) {
	t.Parallel()
	v := ownServer(t)
	watch(t, v)
	for name, tt := range map[string]struct {
		length int           // of the body, as the response says; default: all of it
		pause  time.Duration // before the bytes that no request asked for
		status int           // of a read
	}{
		"more bytes":             {status: 200},
		"more bytes, later":      {status: 200, pause: 50 * time.Millisecond}, // on an idle connection
		"Content-Length of half": {status: 502, length: 5},
	} {
		t.Run(name, func(t *testing.T) {
			watch(t, v)
			sim := &cabletest.Server{Simulator: cabletest.New(nil)}
			closed := make(chan struct{}, 8)
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				request, _ := httputil.DumpRequest(r, true) // with the Authorization header
				recorder := httptest.NewRecorder()
				sim.ServeHTTP(recorder, r)
				body := recorder.Body.String()
				conn, _, err := w.(http.Hijacker).Hijack()
				if err != nil {
					t.Error(err)
					return
				}
				defer conn.Close()
				const header = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
				response := fmt.Sprintf(header, cmp.Or(tt.length, len(body))) + body
				if tt.pause > 0 {
					_, _ = io.WriteString(conn, response)
					time.Sleep(tt.pause)
					response = ""
				}
				_, _ = io.WriteString(conn, response+string(request)+body)
				_, _ = io.Copy(io.Discard, conn)
				closed <- struct{}{}
			}))
			t.Cleanup(server.Close)
			sim.URL = server.URL + sim.Path()
			m := v.enable(t, pluginName, sim)
			m.configure(t)
			if a := m.do(t, "GET", m.path+"/creds/app", nil); a.status != tt.status {
				t.Errorf("%s: want %d", a, tt.status)
			}
			select {
			case <-closed: // net/http has found the bytes, printed them, and closed the connection
			case <-time.After(10 * time.Second):
				t.Error("the connection was not closed")
			}
			m.flushLog(t)
		})
	}
	t.Run("gRPC", func(t *testing.T) {
		watch(t, v)
		const plugin = pluginName + "-grpc"
		v.register(t, plugin, "GRPC_GO_LOG_SEVERITY_LEVEL=info", "GRPC_GO_LOG_VERBOSITY_LEVEL=99")
		m := v.enable(t, plugin, cabletest.NewServer(t, nil))
		m.configure(t)
		m.read(t)
		m.flushLog(t)
		for _, part := range []string{"INFO: ", "[core]", "[transport]"} {
			if v.logHas("secrets."+plugin+".", part) {
				t.Errorf("the log has a line of %s with %q", plugin, part)
			}
		}
	})
}
