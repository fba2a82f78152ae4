// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// The environment's proxies are read once in a process, so each of these tests
// starts one: this test binary, told by childConfig to make one request.
const childConfig = "CABLE_TEST_CHILD_CONFIG"

// proxyPassword stands in the proxy's URL, and must stand nowhere else.
const proxyPassword = "PROXYPASSWORDCANARY"

type childRequest struct {
	Key, URL, CA string
	Timeout      time.Duration
}

type childAnswer struct {
	Err     *cable.Error
	Text    string // of the error, in every way that it may be logged
	Token   bool
	Printed string // the client, printed
}

// TestProxyChild is not a test: it is what runs in the process of its own.
func TestProxyChild(t *testing.T) {
	raw := os.Getenv(childConfig)
	if raw == "" {
		t.Skip("runs in the processes that TestProxy starts")
	}
	var in childRequest
	if err := json.Unmarshal([]byte(raw), &in); err != nil {
		t.Fatal(err)
	}
	c, err := cable.New(cable.Config{RefreshKey: cable.NewSecret(in.Key), TokenURL: in.URL, CACert: in.CA, Timeout: in.Timeout})
	if err != nil {
		t.Fatal(err)
	}
	token, err := c.RequestToken(context.Background(), ask())
	out := childAnswer{Token: token != nil, Text: fmt.Sprintf("%v %+v %#v", err, err, err), Printed: fmt.Sprintf("%v %+v", c, c)}
	errors.As(err, &out.Err)
	encoded, _ := json.Marshal(out)
	fmt.Printf("\n%s%s\n", childConfig, encoded)
}

// inChild makes one request in a process with env.
func inChild(t *testing.T, in childRequest, env ...string) childAnswer {
	t.Helper()
	if in.Key == "" {
		in.Key = cabletest.NewRefreshKey()
	}
	raw, _ := json.Marshal(in)
	cmd := exec.Command(os.Args[0], "-test.run=^TestProxyChild$", "-test.v")
	cmd.Env = slices.Concat(env, []string{childConfig + "=" + string(raw), "HOME=" + t.TempDir(), "SSL_CERT_FILE=/dev/null", "GORACE=atexit_sleep_ms=0"})
	output, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("the process: %v\n%s", err, output)
	}
	_, line, _ := strings.Cut(string(output), "\n"+childConfig)
	line, _, _ = strings.Cut(line, "\n")
	var out childAnswer
	if err := json.Unmarshal([]byte(line), &out); err != nil {
		t.Fatalf("%v in %s", err, output)
	}
	t.Log(out.Text)
	for _, secret := range []string{proxyPassword, cabletest.RefreshKeyMarker, base64.StdEncoding.EncodeToString([]byte("user:" + proxyPassword))} {
		if bytes.Contains(output, []byte(secret)) {
			t.Errorf("the process wrote %q: %s", secret, output)
		}
	}
	return out
}

// proxy is an HTTP proxy that takes every CONNECT to one address.
type proxy struct {
	url      string // with a user and a password
	to       string
	mu       sync.Mutex
	connects []string // "host:port authorization"
	others   []string // requests that are no CONNECT
	refuse   atomic.Int32
}

func newProxy(t *testing.T, to string) *proxy {
	t.Helper()
	p := &proxy{to: to}
	raw, _ := rawServer(t, p.serve)
	p.url = "http://user:" + proxyPassword + "@" + strings.TrimSuffix(strings.TrimPrefix(raw, "http://"), "/v2/auth/token")
	return p
}

func (p *proxy) serve(conn net.Conn) {
	br := bufio.NewReader(conn)
	r, err := http.ReadRequest(br)
	if err != nil {
		return
	}
	p.mu.Lock()
	if r.Method == http.MethodConnect {
		p.connects = append(p.connects, r.Host+" "+r.Header.Get("Proxy-Authorization")+r.Header.Get("Authorization"))
	} else {
		p.others = append(p.others, r.Method+" "+r.RequestURI)
	}
	p.mu.Unlock()
	if status := p.refuse.Load(); status > 0 {
		_, _ = fmt.Fprintf(conn, "HTTP/1.1 %d Said by %s of user:%s\r\nProxy-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n", status, r.Host, proxyPassword)
		return
	} else if status < 0 {
		hang(conn)
		return
	}
	upstream, err := net.Dial("tcp", p.to)
	if err != nil {
		return
	}
	defer func() { _ = upstream.Close() }()
	_, _ = io.WriteString(conn, "HTTP/1.1 200 Connection established\r\n\r\n")
	go func() {
		_, _ = io.Copy(upstream, br)
		_ = upstream.Close()
	}()
	_, _ = io.Copy(conn, upstream)
}

// TestProxy pins that HTTPS goes through the environment's proxy, in a tunnel
// that hides the key from it; that loopback never does; and that no error holds
// the proxy's password.
func TestProxy(t *testing.T) {
	t.Parallel()
	const host = "example.com" // which the certificate of the simulator names
	newTarget := func(t *testing.T) (*cabletest.Server, *proxy, childRequest) {
		srv := cabletest.NewTLSServer(t, nil)
		address, path, _ := strings.Cut(strings.TrimPrefix(srv.URL, "https://"), "/")
		return srv, newProxy(t, address), childRequest{Key: srv.RefreshKey(), URL: "https://" + host + "/" + path, CA: srv.CA}
	}
	unreachable := func(detail string, attempts int) *cable.Error {
		return &cable.Error{Kind: cable.Unreachable, Detail: detail, Attempts: attempts}
	}
	t.Run("used", func(t *testing.T) {
		t.Parallel()
		for _, variable := range []string{"HTTPS_PROXY", "https_proxy"} {
			srv, p, in := newTarget(t)
			if got := inChild(t, in, variable+"="+p.url); !got.Token {
				t.Errorf("no token through %s: %s", variable, got.Text)
			}
			want := []string{host + ":443 Basic " + base64.StdEncoding.EncodeToString([]byte("user:"+proxyPassword))}
			if diff := cmp.Diff(want, p.connects); diff != "" {
				t.Errorf("what the proxy saw (-want +got):\n%s", diff)
			}
			sees(t, srv, 1, 1)
		}
	})
	t.Run("refuses", func(t *testing.T) {
		t.Parallel()
		for _, status := range []int32{302, 403, 407, 502, 503} {
			srv, p, in := newTarget(t)
			p.refuse.Store(status)
			got := inChild(t, in, "HTTPS_PROXY="+p.url)
			want := unreachable(fmt.Sprintf("the proxy of the environment refused to connect, with status %d", status), 3)
			if diff := cmp.Diff(want, got.Err); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
			sees(t, srv, 0, 0)
		}
	})
	t.Run("hangs", func(t *testing.T) {
		t.Parallel()
		_, p, in := newTarget(t)
		p.refuse.Store(-1)
		in.Timeout = budget
		start := time.Now()
		got := inChild(t, in, "HTTPS_PROXY="+p.url)
		if diff := cmp.Diff(&cable.Error{Kind: cable.TimedOut, Detail: "the budget of 1s ran out before a request was sent", Attempts: 1}, got.Err); diff != "" {
			t.Errorf("error (-want +got):\n%s", diff)
		}
		if took := time.Since(start); took > budget+10*time.Second { // the process's start included
			t.Errorf("took %s", took)
		}
	})
	t.Run("refuses connections", func(t *testing.T) {
		t.Parallel()
		srv := cabletest.NewServer(t, nil)
		srv.Close()
		address := strings.TrimSuffix(strings.TrimPrefix(srv.URL, "http://"), srv.Path())
		got := inChild(t, childRequest{URL: "https://" + host + "/"}, "HTTPS_PROXY=http://user:"+proxyPassword+"@"+address)
		if diff := cmp.Diff(unreachable("connecting through the proxy of the environment: connection refused", 3), got.Err); diff != "" {
			t.Errorf("error (-want +got):\n%s", diff)
		}
	})
	t.Run("is no URL", func(t *testing.T) {
		t.Parallel()
		// Go makes of these what it can; what it says must not hold the password.
		for _, url := range []string{
			"http://user:" + proxyPassword + "@[::1", "http://user:" + proxyPassword + "/x@h/", "http://user:" + proxyPassword + "#x@h/",
			"user:" + proxyPassword + "@127.0.0.1:1", "ftp://user:" + proxyPassword + "@127.0.0.1:1/", "http://user:" + proxyPassword + "%zz@h/",
		} {
			if got := inChild(t, childRequest{URL: "https://nowhere.invalid/"}, "HTTPS_PROXY="+url); got.Err == nil || got.Err.MaybeIssued {
				t.Errorf("%s", got.Text)
			}
		}
	})
	t.Run("speaks TLS with a certificate that nobody knows", func(t *testing.T) {
		t.Parallel()
		sim, url := newTLSServer(t, nil)
		got := inChild(t, childRequest{URL: "https://" + host + "/"}, "HTTPS_PROXY="+strings.Replace(strings.TrimSuffix(url, sim.Path()), "://", "://user:"+proxyPassword+"@", 1))
		if got.Err == nil || got.Err.Attempts != 1 || !strings.Contains(got.Err.Detail, "unknown authority") {
			t.Errorf("%s", got.Text)
		}
	})
	t.Run("not for loopback", func(t *testing.T) {
		t.Parallel()
		srv := cabletest.NewServer(t, nil)
		address := strings.TrimSuffix(strings.TrimPrefix(srv.URL, "http://"), srv.Path())
		for _, url := range []string{srv.URL, strings.Replace(srv.URL, "127.0.0.1", "localhost", 1), strings.Replace(srv.URL, "127.0.0.1", "LOCALHOST", 1)} {
			p := newProxy(t, address)
			got := inChild(t, childRequest{Key: srv.RefreshKey(), URL: url}, "HTTP_PROXY="+p.url, "HTTPS_PROXY="+p.url, "http_proxy="+p.url, "ALL_PROXY="+p.url)
			if !got.Token || len(p.connects)+len(p.others) > 0 {
				t.Errorf("%s: token %t, the proxy saw %q %q: %s", url, got.Token, p.connects, p.others, got.Text)
			}
		}
	})
	t.Run("NO_PROXY", func(t *testing.T) {
		t.Parallel()
		_, p, in := newTarget(t)
		in.URL = "https://nowhere.invalid/"
		got := inChild(t, in, "HTTPS_PROXY="+p.url, "NO_PROXY=.invalid")
		if got.Token || len(p.connects) > 0 {
			t.Errorf("the proxy saw %q", p.connects)
		}
	})
}
