// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package outcome

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
)

// TestClassify checks for each kind of error its outcome, its HTTP status, and whether
// it means that Cable is down.
func TestClassify(t *testing.T) {
	t.Parallel()
	responded := func(code int) error { return &cable.Error{Kind: cable.Responded, StatusCode: code, Attempts: 1} }
	kind := func(k cable.Kind, attempts int) error { return &cable.Error{Kind: k, Attempts: attempts} }
	seen := make(map[Outcome]bool)
	for _, tt := range []struct {
		err     error
		outcome Outcome
		status  int
		isDown  bool
	}{
		{responded(400), RejectedByCable, 400, false},
		{responded(401), KeyRejected, 400, false},
		{responded(403), RejectedByCable, 400, false},
		{responded(404), RejectedByCable, 400, false},
		{responded(408), CableError, 502, true},
		{responded(429), RateLimited, 429, true},
		{responded(499), RejectedByCable, 400, false},
		{responded(500), CableError, 502, true},
		{responded(599), CableError, 502, true},
		{&cable.Error{Kind: cable.Paused, RetryAfter: 11 * time.Second}, Paused, 429, true},
		{kind(cable.Unreachable, 1), Unreachable, 502, true},
		{&cable.Error{Kind: cable.Unreachable, Certificate: true}, Unreachable, 502, false},
		{kind(cable.TimedOut, 1), TimedOut, 504, true},
		{kind(cable.TimedOut, 0), TimedOut, 504, false},
		{kind(cable.Canceled, 1), Canceled, 502, false},
		{kind(cable.InvalidResponse, 1), InvalidResponse, 502, false},
		{Refuse("no role %q", "ci"), InvalidRequest, 400, false},
		{Mismatch("another organization"), GrantMismatch, 502, false},
		{ErrBudget, TimedOut, 504, false},
		{context.DeadlineExceeded, TimedOut, 504, false},
		{status.Error(codes.DeadlineExceeded, ""), TimedOut, 504, false},
		{context.Canceled, Canceled, 502, false},
		{status.Error(codes.Canceled, ""), Canceled, 502, false},
		{errors.New("context canceled"), VaultError, 500, false}, // bare text, from Vault's storage
		{logical.ErrReadOnly, VaultError, 500, false},
	} {
		for _, err := range []error{tt.err, fmt.Errorf("reading config: %w", tt.err)} {
			f := Classify(err)
			if f.Outcome != tt.outcome || f.Outcome.Status() != tt.status || f.MeansDown() != tt.isDown ||
				!errors.Is(f, tt.err) {
				t.Errorf("%#v: %s, %d, down %t", err, f.Outcome, f.Outcome.Status(), f.MeansDown())
			}
			if Classify(fmt.Errorf("again: %w", f)) != f {
				t.Errorf("%v is classified twice", err)
			}
			resp, respErr := f.Respond()
			var coded logical.HTTPCodedError
			switch isCoded := errors.As(respErr, &coded); {
			case tt.status == 400 && (!resp.IsError() || respErr != nil),
				tt.status == 500 && (resp != nil || fmt.Sprint(respErr) != fmt.Sprint(err)),
				tt.status > 400 && tt.status != 500 && (!isCoded || coded.Code() != tt.status),
				tt.status == 429 && resp.Headers["Retry-After"][0] != fmt.Sprint(max(1, int(f.RetryAfter.Seconds()))):
				t.Errorf("%v becomes %+v, %v", err, resp, respErr)
			}
			seen[f.Outcome] = true
		}
	}
	for _, o := range All() {
		if !seen[o] && o != Minted && o != Reused || o.Status() == 0 {
			t.Errorf("no case has the outcome %s", o)
		}
		if o.IsFailure() != (o.Status() >= 400 && o.Level() > hclog.Debug) {
			t.Errorf("%s: level %s, failure %t", o, o.Level(), o.IsFailure())
		}
	}
	if Classify(nil) != nil {
		t.Error("a failure of nil")
	}
}

// TestDrop checks that a token which is dropped counts as undelivered while the local
// clock or Cable's says that it is valid, and that the failure it is dropped for is not
// changed.
func TestDrop(t *testing.T) {
	t.Parallel()
	synctest.Test(t, testDrop) // where the time stands still
}

func testDrop(t *testing.T) {
	now := time.Now()
	for name, tt := range map[string]struct {
		token cable.Token
		want  bool
	}{
		"valid":                   {cable.Token{Expiry: now.Unix() + 60}, true},
		"valid by Cable's clock":  {cable.Token{Expiry: now.Unix() - 60, Date: now.Add(-time.Hour)}, true},
		"expired":                 {cable.Token{Expiry: now.Unix() - 60}, false},
		"expires now":             {cable.Token{Expiry: now.Unix(), Date: now}, false},
		"expired by both clocks":  {cable.Token{Expiry: now.Unix() - 60, Date: now}, false},
		"expired by Cable's only": {cable.Token{Expiry: now.Unix() + 60, Date: now.Add(time.Hour)}, true},
	} {
		before := Classify(Mismatch("another organization"))
		tt.token.Attempts = 2
		f := Drop(before, &tt.token)
		if f.Granted != &tt.token || f.CableStatus != 200 || f.Attempts != 2 ||
			!strings.HasPrefix(f.Message, "Cable's response was refused: another organization") ||
			(f.UndeliveredUntil == tt.token.Expiry) != tt.want ||
			strings.Contains(f.Message, UnixTime(tt.token.Expiry)) != tt.want {
			t.Errorf("%s: %+v", name, f)
		}
		if before.Granted != nil || before.UndeliveredUntil != 0 || before.Message != "another organization" {
			t.Errorf("%s: the failure was changed: %+v", name, before)
		}
	}
	for text, err := range map[string]error{
		"Cable's response was refused: no token": &Failure{Outcome: InvalidResponse, Detail: "no token"},
		string(ErrBudget):                        ErrBudget,
	} {
		if f := Drop(err, new(cable.Token)); f.Message != text {
			t.Errorf("dropped for %v: %q", err, f.Message)
		}
	}
	for d, want := range map[time.Duration]int64{-time.Hour: 1, 0: 1, 1: 1, time.Second: 1, time.Second + 1: 2} {
		if got := WholeSeconds(d); got != want {
			t.Errorf("%s is %d s, want %d", d, got, want)
		}
	}
	if Time(time.Time{}) != "" || UnixTime(0) != "1970-01-01T00:00:00Z" {
		t.Error("times are formatted as", Time(time.Time{}), UnixTime(0))
	}
}
