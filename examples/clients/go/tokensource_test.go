// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"net/http"
	"testing"
	"time"
	"unsafe"
)

// TestSuspended shows that a token is not returned if its lease ended while the
// machine was suspended, though it is valid by the monotonic clock.
func TestSuspended(t *testing.T) {
	validUntil := time.Now().Add(time.Hour)
	s := &TokenSource{token: "the token", validUntil: validUntil, changed: make(chan struct{})}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if token, _, err := s.Token(ctx); token == "" || err != nil {
		t.Fatalf("before: %q, %v", token, err)
	}
	// A Time with both clocks has the wall clock's seconds above its nanoseconds.
	*(*uint64)(unsafe.Pointer(&s.validUntil)) -= 7200 << 30
	if !s.validUntil.Equal(validUntil) || s.validUntil.Round(0).Sub(validUntil.Round(0)) != -2*time.Hour {
		t.Fatalf("%v is not %v with another wall clock", s.validUntil, validUntil)
	}
	if token, _, err := s.Token(ctx); token != "" || err == nil {
		t.Errorf("after a suspension of two hours: %q, %v", token, err)
	}
}

// TestEnded shows that callers do not wait for a source whose context has ended.
func TestEnded(t *testing.T) {
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	s := &TokenSource{done: ended.Done(), changed: make(chan struct{})}
	if _, _, err := s.Token(t.Context()); err == nil {
		t.Error("a token of a source that has ended")
	}
}

// TestRetryAfter shows which wait each form of the header leads to.
func TestRetryAfter(t *testing.T) {
	in := func(d time.Duration) string { return time.Now().Add(d).UTC().Format(http.TimeFormat) }
	for header, want := range map[string]time.Duration{
		"":                     retryWait,
		"8":                    8 * time.Second,
		"8, 8":                 8 * time.Second,
		"0":                    retryWait,
		"-3":                   retryWait,
		"-99999999999":         retryWait,
		"soon":                 retryWait,
		"99999":                longestWait,
		"9223372036854775807":  longestWait,
		"99999999999999999999": retryWait,
		in(time.Minute):        time.Minute,
		in(-time.Minute):       retryWait,
		in(24 * time.Hour):     longestWait,

		in(time.Minute) + ", " + in(time.Minute): time.Minute,
	} {
		if got := retryAfter(header, retryWait); got > want || got < want-2*time.Second {
			t.Errorf("%q: %s, want %s", header, got, want)
		}
	}
}
