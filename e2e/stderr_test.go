// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// Vault logs all that a plugin writes to standard error, and Go's libraries write there.
// net/http prints unexpected bytes on a connection, and HTTP/2 and gRPC print frames if
// the environment tells them to. The tests below have servers and environments that
// cause it, with the refresh key and tokens among those bytes.

// register adds the plugin to the catalog under another name, with further
// fields of the registration, for the duration of a test.
func (v *vaultServer) register(t *testing.T, name string, fields map[string]any) {
	t.Helper()
	all := map[string]any{"sha256": suite.sha256, "command": pluginName, "version": pluginVersion}
	for k, f := range fields {
		all[k] = f
	}
	v.ok(t, "PUT", "sys/plugins/catalog/secret/"+name, all)
}

// enable is newMount for a plugin of another name and a simulator that exists.
func (v *vaultServer) enable(t *testing.T, plugin string, sim *cabletest.Server) *mount {
	t.Helper()
	m := &mount{vaultServer: v, path: fmt.Sprintf("cable-%d", mounts.Add(1)), sim: sim}
	v.ok(t, "POST", "sys/mounts/"+m.path, map[string]any{"type": plugin})
	t.Cleanup(func() { v.ok(t, "DELETE", "sys/mounts/"+m.path, nil) })
	return m
}

// flushLog returns when all that the plugin has written to standard error so far
// is in the server's log, because the pipe keeps the order and the last line is known.
func (m *mount) flushLog(t *testing.T) {
	t.Helper()
	role := fmt.Sprintf("flush-%d", flushes.Add(1))
	m.ok(t, "POST", m.path+"/roles/"+role, map[string]any{"scopes": "transactions:read"})
	waitFor(t, 10*time.Second, "the last line of the plugin", func() bool {
		return m.logHas("mount="+m.path+"/", "role="+role)
	})
}

// flushes counts, to name the roles.
var flushes atomic.Int64

// rawServer responds to requests as the simulator does, and then misbehaves. The function
// write gets the request, its Authorization header included, and the response, and
// writes to the connection, in one piece up to each Flush. The returned channel gets a
// value for each connection that the caller has closed.
func rawServer(
	t *testing.T, write func(w *bufio.Writer, r *http.Request, resp *http.Response),
) (sim *cabletest.Server, closed <-chan struct{}) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	sim = &cabletest.Server{Simulator: cabletest.New(nil)}
	sim.URL = "http://" + listener.Addr().String() + sim.Path()
	ended := make(chan struct{}, 100)
	serve := func(conn net.Conn) {
		defer func() { ended <- struct{}{} }()
		defer conn.Close()
		for buffer := bufio.NewReader(conn); ; {
			r, err := http.ReadRequest(buffer)
			if err != nil {
				return
			}
			body, err := io.ReadAll(r.Body)
			if err != nil {
				return
			}
			r.Body = io.NopCloser(bytes.NewReader(body))
			recorder := httptest.NewRecorder()
			sim.ServeHTTP(recorder, r)
			r.Body = io.NopCloser(bytes.NewReader(body))
			w := bufio.NewWriterSize(conn, 1<<20)
			write(w, r, recorder.Result())
			_ = w.Flush()
		}
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go serve(conn)
		}
	}()
	return sim, ended
}

// writeResponse writes a response with a Content-Length of the caller's choice.
func writeResponse(w io.Writer, resp *http.Response, body []byte, length int) {
	_, _ = fmt.Fprintf(w, "HTTP/1.1 %s\r\n", resp.Status)
	_ = resp.Header.WriteSubset(w, map[string]bool{"Content-Length": true})
	_, _ = fmt.Fprintf(w, "Content-Length: %d\r\n\r\n%s", length, body)
}

// TestOnlyStructuredLog checks that Vault's log gets nothing but the lines of the
// engine's logger, whatever a server sends on its connections, and whatever the
// environment tells Go's libraries to print. TestStderr does so without a connection.
func TestOnlyStructuredLog(t *testing.T) {
	t.Parallel()
	v := ownServer(t)
	watch(t, v)

	body := func(resp *http.Response) []byte {
		text, _ := io.ReadAll(resp.Body)
		return text
	}
	servers := map[string]struct {
		write  func(w *bufio.Writer, r *http.Request, resp *http.Response)
		status int // of a read
	}{
		"second response": {status: 200, write: func(w *bufio.Writer, r *http.Request, resp *http.Response) {
			text := body(resp)
			writeResponse(w, resp, text, len(text))
			resp.Header.Set("X-Request-Authorization", r.Header.Get("Authorization"))
			writeResponse(w, resp, text, len(text))
		}},
		"second response, later": {status: 200, write: func(w *bufio.Writer, r *http.Request, resp *http.Response) {
			text := body(resp)
			writeResponse(w, resp, text, len(text))
			_ = w.Flush()
			time.Sleep(50 * time.Millisecond) // the connection is idle by now
			resp.Header.Set("X-Request-Authorization", r.Header.Get("Authorization"))
			writeResponse(w, resp, text, len(text))
		}},
		"echo of the request": {status: 200, write: func(w *bufio.Writer, r *http.Request, resp *http.Response) {
			text := body(resp)
			writeResponse(w, resp, text, len(text))
			dump, _ := httputil.DumpRequest(r, true)
			_, _ = w.Write(dump)
		}},
		"Content-Length of half": {status: 502, write: func(w *bufio.Writer, _ *http.Request, resp *http.Response) {
			text := body(resp)
			writeResponse(w, resp, text, 5)
		}},
		"more than Content-Length": {status: 200, write: func(w *bufio.Writer, _ *http.Request, resp *http.Response) {
			text := body(resp)
			writeResponse(w, resp, append(append(text, '\n'), text...), len(text))
		}},
	}
	for name, tt := range servers {
		t.Run(name, func(t *testing.T) {
			watch(t, v)
			sim, closed := rawServer(t, tt.write)
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
	environments := map[string]struct {
		env    []string
		absent []string // parts of lines
	}{
		"HTTP/2": {[]string{"GODEBUG=http2debug=2"}, []string{"http2: Transport", "http2: Framer"}},
		"gRPC": {
			[]string{"GRPC_GO_LOG_SEVERITY_LEVEL=info", "GRPC_GO_LOG_VERBOSITY_LEVEL=99"},
			[]string{"INFO: ", "[core]", "[transport]"},
		},
	}
	for name, tt := range environments {
		t.Run(name, func(t *testing.T) {
			watch(t, v)
			plugin := pluginName + "-" + map[string]string{"HTTP/2": "http2", "gRPC": "grpc"}[name]
			v.register(t, plugin, map[string]any{"env": tt.env})
			m := v.enable(t, plugin, cabletest.NewTLSServer(t, nil))
			m.configure(t, map[string]any{"ca_cert": m.sim.CA})
			m.read(t)
			m.flushLog(t)
			for _, part := range tt.absent {
				if v.logHas("secrets."+plugin+".", part) {
					t.Errorf("the log has a line of %s with %q", plugin, part)
				}
			}
		})
	}
}
