// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package vaulttest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
)

// Request is a request to the server's HTTP API.
type Request struct {
	Method, Path string // below /v1/, with the query
	Body         any    // sent as JSON; a string as it is; nil for none
	Token        string
	Header       map[string]string
}

// Response is the server's response, of any status.
type Response struct {
	Status int
	Header http.Header
	Body   []byte
}

// client keeps the connections of many readers, and uses no proxy.
var client = func() *http.Client {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.MaxIdleConns, t.MaxIdleConnsPerHost, t.Proxy = 0, 512, nil
	return &http.Client{
		Transport:     t,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }, // of a standby
	}
}()

// Do sends a request. An error means that no response came.
func (s *Server) Do(ctx context.Context, r Request) (*Response, error) {
	var body []byte
	switch b := r.Body.(type) {
	case nil:
	case string:
		body = []byte(b)
	default:
		var err error
		if body, err = json.Marshal(b); err != nil {
			return nil, err
		}
	}
	req, err := http.NewRequestWithContext(ctx, r.Method, s.Addr+"/v1/"+r.Path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("X-Vault-Request", "true")
	if r.Token != "" {
		req.Header.Set("X-Vault-Token", r.Token)
	}
	for k, v := range r.Header {
		req.Header.Set(k, v)
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	return &Response{resp.StatusCode, resp.Header, text}, err
}

// Call sends a request as root, which must succeed. The JSON of the response
// goes to out, if that is not nil.
func (s *Server) Call(ctx context.Context, method, path string, body, out any) error {
	resp, err := s.Do(ctx, Request{Method: method, Path: path, Body: body, Token: s.Root})
	switch {
	case err != nil:
		return err
	case resp.Status >= 300:
		return fmt.Errorf("%s %s: HTTP %d %s", method, path, resp.Status, bytes.TrimSpace(resp.Body))
	case out == nil:
		return nil
	}
	return json.Unmarshal(resp.Body, out)
}
