// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"sync"
	"sync/atomic"
)

// exchange is one API call inside net/http. Its gate is the request's body, which net/http reads last, after the
// connection was made, which can take seconds, and after the head was written to the connection's buffer, which it
// fits. The body is empty until [TokenRequest].Allow has been asked again. If Allow refuses, the body stays empty,
// net/http fails on its length, and no byte is sent.
//
// net/http does not repeat a call, because a POST whose body it cannot get a second time is never repeated.
//
// NOTE: the body is a bytes.Reader, which open fills, and no reader of this package's own, because net/http sends the
// head, and so the refresh key, before it reads a body of a type that it does not know.
type exchange struct {
	*request
	mu sync.Mutex // guards the next fields
	progress
	gate     bytes.Reader
	refusal  error // of allow
	panicked any   // by allow, on a goroutine of net/http's, where it would end the process
	opened   bool  // gate has the body
	ended    bool  // gate does not get the body any more
	conn     *countingConn
	before   int64 // bytes that conn had written when the call began
}

// progress is how far a call has come.
type progress struct {
	stage string
	sent  bool // the request was sent, so that Cable may have processed it
	early bool // the connection is new and has returned nothing, because only then can an error be the handshake's
	asked bool // the server requested a client certificate
}

// Stages of a call, in the words of an error.
const (
	atTurn     = "waiting for a turn or a connection"
	atLookup   = "looking up the host"
	atConnect  = "connecting"
	atProxy    = "at the proxy"
	atTLS      = "in the TLS handshake"
	atResponse = "waiting for the response"
	atHead     = "waiting for the rest of the response, which never comes if the server speaks only HTTP/2"
)

// open opens the gate, if Allow does not refuse. net/http calls it between head and body.
func (x *exchange) open() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.ended {
		return
	}
	defer func() { x.panicked = recover() }()
	if x.refusal = x.Allow(); x.refusal == nil {
		x.gate.Reset(x.body)
		x.opened = true
	}
}

// maxAlert exceeds the bytes of the alert with which crypto/tls ends a connection, and is less than any call has.
const maxAlert = 128

// end returns how far the call has come, and the error of Allow if it refused. Whether the call was sent does not
// change any more. A call that failed was sent if more than an alert was, because net/http does not return an error
// before it has stopped writing. A response may arrive before that.
func (x *exchange) end(failed bool) (progress, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.panicked != nil {
		panic(x.panicked)
	}
	x.ended = true
	x.sent = x.opened && (!failed || x.conn == nil || x.conn.written.Load()-x.before > maxAlert)
	return x.progress, x.refusal
}

// reached records how far the call has come. Once the call has a connection, another one that is being made for it, and
// that it does not need any more, changes nothing.
func (x *exchange) reached(stage string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.client.proxied && stage != atTLS {
		stage = atProxy
	}
	if x.stage != atResponse && x.stage != atHead {
		x.stage = stage
	}
}

// connected records the connection of the call.
func (x *exchange) connected(info httptrace.GotConnInfo) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.stage, x.early = atResponse, !info.Reused
	if x.conn = innermost(info.Conn); x.conn != nil {
		x.before = x.conn.written.Load()
	}
}

// responded records the first byte of a response.
func (x *exchange) responded() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.stage, x.early = atHead, false
}

// set sets one of the fields that x.mu guards.
func (x *exchange) set(field *bool, to bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	*field = to
}

// httpRequest returns the request of the call. The hooks in its context serve the words of an error alone, but for
// WroteHeaders and GotConn.
func (x *exchange) httpRequest(ctx context.Context) *http.Request {
	req := &http.Request{
		Method: http.MethodPost,
		URL:    x.client.url,
		Host:   x.client.url.Host,
		Header: http.Header{
			"Authorization":   {x.client.auth.Reveal()},
			"Content-Type":    {"application/json"},
			"Accept":          {"application/json"},
			"Accept-Encoding": {"identity"}, // responses are small, and a bomb is never unpacked
			"Cache-Control":   {"no-store"},
			"User-Agent":      {x.client.userAgent},
		},
		Body:          io.NopCloser(&x.gate),
		ContentLength: int64(len(x.body)),
	}
	hooks := &httptrace.ClientTrace{
		WroteHeaders:      x.open,
		TLSHandshakeStart: func() { x.reached(atTLS) },
		TLSHandshakeDone: func(_ tls.ConnectionState, err error) {
			if x.client.proxied && err == nil {
				x.reached(atProxy) // which may have been the other side of that handshake
			}
		},
		GotConn:              x.connected,
		GotFirstResponseByte: x.responded,
	}
	ctx = context.WithValue(ctx, exchangeKey{}, x)
	return req.WithContext(httptrace.WithClientTrace(ctx, hooks))
}

type exchangeKey struct{} // of an exchange in the context of its call

// noCertificate responds to a server that requests a client certificate.
func noCertificate(info *tls.CertificateRequestInfo) (*tls.Certificate, error) {
	if x, ok := info.Context().Value(exchangeKey{}).(*exchange); ok {
		x.set(&x.asked, true)
	}
	return new(tls.Certificate), nil
}

// countingConn is a connection that counts the bytes that were written to it, or may have been.
type countingConn struct {
	net.Conn
	written atomic.Int64
}

// Write implements [io.Writer].
func (c *countingConn) Write(p []byte) (int, error) {
	c.written.Add(int64(len(p))) // from now on they may be under way
	n, err := c.Conn.Write(p)
	c.written.Add(int64(n - len(p)))
	return n, err
}

// innermost returns the connection below all layers of TLS, or nil.
func innermost(conn net.Conn) *countingConn {
	if layer, ok := conn.(interface{ NetConn() net.Conn }); ok {
		return innermost(layer.NetConn())
	}
	c, _ := conn.(*countingConn)
	return c
}
