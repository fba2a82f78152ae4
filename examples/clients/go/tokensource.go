// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/api"
)

// After a failed read, the wait is as long as the response's Retry-After, up to
// longestWait; else retryWait, or refusedWait if a retry cannot help, such as after
// a 403.
const (
	retryWait   = 5 * time.Second
	refusedWait = time.Minute
	longestWait = 10 * time.Minute
)

var errNoToken = errors.New("the response has no token with a lease or a ttl")

// TokenSource keeps a valid access token of Cable for all goroutines of a
// program. One goroutine reads from Vault, one request at a time. It reads the next
// token when two thirds of the lease have passed, or without a lease after ttl. If
// that fails, the current token is used until its lease ends.
type TokenSource struct {
	client *api.Client
	path   string
	done   <-chan struct{} // closed when reading ends

	mu         sync.Mutex
	token      string
	validUntil time.Time
	err        error         // of the last read
	changed    chan struct{} // closed at the end of each read
}

// NewTokenSource reads tokens from a path such as "cable/creds/reports" until
// ctx ends. It switches off the client's retries, because each may mint, so give
// it a client of its own.
func NewTokenSource(ctx context.Context, client *api.Client, path string) *TokenSource {
	client.SetMaxRetries(0)
	s := &TokenSource{client: client, path: path, done: ctx.Done(), changed: make(chan struct{})}
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
		if !passed(validUntil) {
			return token, validUntil, nil
		}
		if err != nil && !temporary(err) {
			return "", time.Time{}, err
		}
		select {
		case <-changed:
		case <-s.done:
			return "", time.Time{}, errors.Join(errors.New("reading tokens has ended"), err)
		case <-ctx.Done():
			return "", time.Time{}, errors.Join(ctx.Err(), err)
		}
	}
}

// run reads until ctx ends. It waits in short steps, because timers stand still
// while the machine is suspended.
func (s *TokenSource) run(ctx context.Context) {
	for ctx.Err() == nil {
		for next := s.read(ctx); !passed(next); {
			select {
			case <-time.After(min(time.Until(next), time.Second)):
			case <-ctx.Done():
				return
			}
		}
	}
}

// read sends one request, notes its result, and returns the time of the next one.
func (s *TokenSource) read(ctx context.Context) (next time.Time) {
	start := time.Now()
	token, lease, wait, err := s.request(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err = err; err == nil {
		s.token, s.validUntil = token, start.Add(lease)
	} else if ctx.Err() == nil {
		slog.Warn("no Cable token", "error", err, "next_try", wait.Round(time.Second))
	}
	close(s.changed)
	s.changed = make(chan struct{})
	return time.Now().Add(wait)
}

// request returns a token, its lease, and the wait before the next request. All
// waits get up to a tenth more or less, so that a fleet does not read at once.
func (s *TokenSource) request(ctx context.Context) (token string, lease, wait time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, s.client.ClientTimeout())
	defer cancel()
	var body []byte
	resp, err := s.client.Logical().ReadRawWithContext(ctx, s.path)
	if resp != nil {
		defer resp.Body.Close() //nolint:errcheck // read to its end, or given up
	}
	if err == nil {
		body, err = io.ReadAll(resp.Body)
	}
	if err == nil {
		token, lease, wait, err = parse(body)
	}
	if err == nil {
		return token, lease, wait, nil
	}
	wait = retryWait
	if !temporary(err) {
		wait = refusedWait
	}
	if resp != nil {
		wait = retryAfter(resp.Header.Get("Retry-After"), wait)
	}
	return "", 0, wait + tenth(wait), fmt.Errorf("reading %s: %w", s.path, err)
}

// parse returns the token in a response, its lease, and the wait before the next
// request. Without a lease (the role's lease=false), that is the ttl in the response.
// The token may be used for another third of it, because ttl is at most three
// quarters of the lease that there would be.
func parse(body []byte) (token string, lease, wait time.Duration, err error) {
	secret, err := api.ParseSecret(bytes.NewReader(body))
	if err != nil || secret == nil {
		return "", 0, 0, errNoToken // err could show a part of the body
	}
	token, _ = secret.Data["token"].(string)
	lease = time.Duration(secret.LeaseDuration) * time.Second
	wait = lease*2/3 - tenth(lease)
	if ttl, ok := secret.Data["ttl"].(json.Number); ok && lease == 0 {
		seconds, _ := ttl.Int64()
		wait = time.Duration(seconds) * time.Second
		lease = wait * 4 / 3
	}
	if token == "" || lease <= 0 {
		return "", 0, 0, errNoToken
	}
	return token, lease, wait, nil
}

// tenth returns up to a tenth of d at random.
func tenth(d time.Duration) time.Duration {
	return time.Duration(rand.Float64() * float64(d) / 10) //nolint:gosec // no secret
}

// passed reports whether t has passed by one of two clocks, because the monotonic
// clock stands still while the machine is suspended, and the wall clock can be set
// back.
func passed(t time.Time) bool {
	now := time.Now()
	return !now.Before(t) || !now.Round(0).Before(t.Round(0))
}

// retryAfter returns the wait that a Retry-After header asks for, in seconds or as a
// date of 29 bytes, else wait. A proxy may have joined two of them with a comma.
func retryAfter(header string, wait time.Duration) time.Duration {
	var asked time.Duration
	first, _, _ := strings.Cut(header, ",")
	if seconds, err := strconv.Atoi(first); err == nil {
		asked = time.Duration(max(0, min(seconds, int(longestWait/time.Second)))) * time.Second
	} else if date, err := http.ParseTime(header[:min(len(header), 29)]); err == nil {
		asked = min(time.Until(date), longestWait)
	}
	if asked <= 0 {
		return wait
	}
	return asked
}

// temporary reports whether the same request may succeed later: Vault responded
// with 429 or 5xx, or could not be reached, but not because of a certificate or
// another error of TLS.
func temporary(err error) bool {
	var response *api.ResponseError
	var certificate *tls.CertificateVerificationError
	var alert *net.OpError
	switch {
	case errors.As(err, &response):
		return response.StatusCode == http.StatusTooManyRequests || response.StatusCode >= 500
	case errors.As(err, &certificate), errors.Is(err, http.ErrSchemeMismatch), errors.Is(err, errNoToken):
		return false
	case errors.As(err, &alert):
		return alert.Op != "remote error" && alert.Op != "local error"
	}
	return true
}
