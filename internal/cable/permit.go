// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net/http/httptrace"
	"sync"
)

// permit decides whether one API call may be sent, and records whether it was.
// net/http opens the connection, which can take seconds, writes the head, and
// then reads the body. The body is empty until [TokenRequest].Allow has been
// asked again, between head and body; if Allow refuses, it stays empty:
//
//   - HTTP/1.1: the head is still in the connection's write buffer, which it
//     fits, and net/http fails on the missing body. No byte is sent.
//   - HTTP/2: the head has been sent, and Cable can issue nothing without a body.
//     So Allow is asked as soon as there is a connection, too: if it refuses
//     then, the context of the call ends, and no byte is sent.
//
// net/http repeats a call by itself if the connection was found closed
// (HTTP/1.1: before a byte was written) or if the server reset the stream
// (HTTP/2: also with PROTOCOL_ERROR, which does not exclude that a token was
// issued, and thousands of times in a row). It needs another body for that,
// which it gets in the first case only.
type permit struct {
	allow  func() error
	cancel context.CancelFunc // ends the call
	body   []byte

	mu       sync.Mutex
	reader   *bytes.Reader // what net/http reads; a type that it knows, or it would send the head at once
	refusal  error         // of allow
	panicked any           // by allow, on a goroutine of net/http's, where it would end the process
	http2    bool          // what the connection speaks
	sent     bool          // reader has the body
	ended    bool          // reader does not get the body any more
}

var (
	errPanicked = errors.New("allow panicked")
	errNoReplay = errors.New("the stream was reset")
)

// ask calls allow, unless it has refused before. p.mu is held.
func (p *permit) ask() error {
	if p.refusal != nil {
		return p.refusal
	}
	func() {
		defer func() {
			if p.panicked = recover(); p.panicked != nil {
				p.refusal = errPanicked
			}
		}()
		p.refusal = p.allow()
	}()
	if p.refusal != nil {
		p.cancel()
	}
	return p.refusal
}

// end returns whether the call was sent, which does not change any more, and
// the error of allow if it refused.
func (p *permit) end() (sent bool, refusal error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.panicked != nil {
		panic(p.panicked)
	}
	p.ended = true
	return p.sent, p.refusal
}

// trace returns ctx with the hooks of the call.
func (p *permit) trace(ctx context.Context) context.Context {
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(info httptrace.GotConnInfo) {
			p.mu.Lock()
			defer p.mu.Unlock()
			conn, ok := info.Conn.(*tls.Conn)
			p.http2 = ok && conn.ConnectionState().NegotiatedProtocol == "h2"
			_ = p.ask() // a refusal ends the call
		},
		WroteHeaders: func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			if !p.ended && p.ask() == nil {
				p.reader.Reset(p.body)
				p.sent = true
			}
		},
	})
}

// newBody is the request's GetBody.
func (p *permit) newBody() (io.ReadCloser, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sent && p.http2 {
		return nil, errNoReplay
	}
	p.sent = false
	p.reader = bytes.NewReader(nil)
	return io.NopCloser(p.reader), nil
}
