// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/hashicorp/vault/api"
)

// The wait after a failed read, unless the response has Retry-After: retryWait, or
// refusedWait if it is not an error that passes, such as 403.
const (
	retryWait   = 5 * time.Second
	refusedWait = time.Minute
)

// TokenSource keeps a valid access token of Cable for all goroutines of a
// program. One goroutine reads from Vault, one request at a time: the next token
// when two thirds of the lease have passed. If that fails, the current token is
// used until its lease ends.
type TokenSource struct {
	client *api.Client
	path   string

	mu         sync.Mutex
	token      string
	validUntil time.Time
	err        error         // of the last read
	changed    chan struct{} // closed at the end of each read
}

// NewTokenSource reads tokens from a path such as "cable/creds/reports" until
// ctx ends. It switches off the client's retries, because each may mint: give it
// a client of its own.
func NewTokenSource(ctx context.Context, client *api.Client, path string) *TokenSource {
	client.SetMaxRetries(0)
	s := &TokenSource{client: client, path: path, changed: make(chan struct{})}
	go s.run(ctx)
	return s
}

// Token returns the current token and when to stop using it. Without a valid
// one, it waits for the next read that succeeds, or returns the error if a retry
// cannot help, such as 403.
func (s *TokenSource) Token(ctx context.Context) (string, time.Time, error) {
	for {
		s.mu.Lock()
		token, validUntil, err, changed := s.token, s.validUntil, s.err, s.changed
		s.mu.Unlock()
		if time.Now().Before(validUntil) {
			return token, validUntil, nil
		}
		if err != nil && !temporary(err) {
			return "", time.Time{}, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return "", time.Time{}, errors.Join(ctx.Err(), err)
		}
	}
}

// run reads until ctx ends.
func (s *TokenSource) run(ctx context.Context) {
	for {
		wait := s.read(ctx)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
}

// read sends one request, and returns the wait before the next.
func (s *TokenSource) read(ctx context.Context) (wait time.Duration) {
	start := time.Now()
	token, lease, wait, err := s.request(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err = err; err == nil {
		s.token, s.validUntil = token, start.Add(lease)
	}
	close(s.changed)
	s.changed = make(chan struct{})
	return wait
}

// request returns a token, its lease, and the wait before the next request. All
// waits get up to a tenth more or less, so that a fleet does not read at once.
func (s *TokenSource) request(ctx context.Context) (token string, lease, wait time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, s.client.ClientTimeout())
	defer cancel()
	tenth := func(d time.Duration) time.Duration { return time.Duration(rand.Float64() * float64(d) / 10) } //nolint:gosec // no secret
	resp, err := s.client.Logical().ReadRawWithContext(ctx, s.path)
	if resp != nil {
		defer resp.Body.Close() //nolint:errcheck // read to its end, or given up
	}
	if err != nil {
		wait = retryWait + tenth(retryWait)
		if !temporary(err) {
			wait = refusedWait
		}
		if resp != nil {
			if seconds, _ := strconv.Atoi(resp.Header.Get("Retry-After")); seconds > 0 {
				wait = time.Duration(seconds) * time.Second
				wait += tenth(wait) // later, never earlier
			}
		}
		return "", 0, wait, fmt.Errorf("reading %s: %w", s.path, err)
	}
	secret, err := api.ParseSecret(resp.Body)
	if err != nil {
		return "", 0, retryWait, fmt.Errorf("reading %s: %w", s.path, err)
	}
	token, _ = secret.Data["token"].(string)
	if token == "" || secret.LeaseDuration <= 0 {
		return "", 0, retryWait, fmt.Errorf("reading %s: the response has no token with a lease", s.path)
	}
	lease = time.Duration(secret.LeaseDuration) * time.Second
	return token, lease, lease*2/3 - tenth(lease), nil
}

// temporary reports whether the same request may succeed later.
func temporary(err error) bool {
	var response *api.ResponseError
	if !errors.As(err, &response) {
		return true // Vault cannot be reached
	}
	return response.StatusCode == http.StatusTooManyRequests || response.StatusCode >= 500
}
