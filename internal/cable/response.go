// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// maxExpiry is the end of the year 9999, the last moment that RFC 3339 can
// name. An expiry beyond it is not in seconds; milliseconds of today lie there.
const maxExpiry = 253402300799

// minToken is the length from which a token is looked for in the rest of its
// answer: a shorter one could be there by chance, and is no secret.
const minToken = 16

// The request's and the answer's JSON, by the request-token reference.
type (
	scopesBody struct {
		OrganizationID string   `json:"organization_id"`
		Scopes         []string `json:"scopes"`
	}
	requestBody struct {
		ExpirySeconds int64      `json:"expiry_seconds"`
		Scopes        scopesBody `json:"scopes"`
	}
	answerBody struct {
		Token            answerToken     `json:"token"`
		Expiry           json.RawMessage `json:"expiry"`
		OrganizationID   string          `json:"organization_id"`
		OrganizationName string          `json:"organization_name"`
		Scopes           *scopesBody     `json:"scopes"`
	}
	errorBody struct {
		Message string `json:"message"`
		Errors  []struct {
			Field   string `json:"field"`
			Message string `json:"message"`
		} `json:"errors"`
	}
)

// answerToken decodes straight into a Secret, so that answerBody holds none.
type answerToken struct{ Secret }

// UnmarshalJSON implements [json.Unmarshaler].
func (t *answerToken) UnmarshalJSON(raw []byte) error {
	var s string
	if err := json.Unmarshal(raw, &s); err != nil {
		return err
	}
	t.Secret = NewSecret(s)
	return nil
}

// decode reads the body of a 200. Its errors hold none of the body but the
// words of an error envelope.
func (c *Client) decode(raw []byte, asked TokenRequest) (*Token, error) {
	if len(raw) > maxAnswer {
		return nil, fmt.Errorf("it is larger than %d bytes", maxAnswer)
	}
	var a answerBody
	if err := json.Unmarshal(raw, &a); err != nil {
		var typeErr *json.UnmarshalTypeError
		if errors.As(err, &typeErr) && typeErr.Field != "" {
			return nil, fmt.Errorf("its field %q is not of the documented type", typeErr.Field)
		}
		return nil, errors.New("it is not a JSON object of the documented shape")
	}
	if a.Token.IsZero() {
		if said := c.envelope(raw); said != "" {
			return nil, errors.New("it holds no token, but says: " + said)
		}
		return nil, errors.New("it holds no token")
	}
	for _, c := range []byte(a.Token.Reveal()) {
		if c <= ' ' || c >= 0x7f {
			return nil, errors.New("its token holds characters that no header can carry")
		}
	}
	if len(a.Expiry) == 0 {
		return nil, errors.New("it holds no expiry")
	}
	expiry, err := strconv.ParseInt(string(a.Expiry), 10, 64)
	if err != nil {
		return nil, errors.New("its expiry is not a whole number of seconds")
	}
	if expiry <= 0 || expiry > maxExpiry {
		return nil, fmt.Errorf("its expiry %s is not a Unix time in seconds", c.redactor.clean(string(a.Expiry)))
	}
	t := &Token{
		Value:            a.Token.Secret,
		Expiry:           expiry,
		OrganizationID:   a.OrganizationID,
		OrganizationName: c.redactor.clean(a.OrganizationName),
	}
	if a.Scopes != nil {
		t.ScopesOrganizationID = a.Scopes.OrganizationID
		t.Scopes = a.Scopes.Scopes
	}
	token := t.Value.Reveal()
	// NOTE: a server that echoes its request would have the key handed out as
	// a token, or as an organization's name. What was asked for may stand in
	// the key: some keys name their organization.
	echo := c.redactor.repeats(token) || c.redactor.repeats(a.OrganizationName)
	within := func(s string) bool { return len(token) >= minToken && strings.Contains(s, token) }
	twice := within(a.OrganizationName)
	for _, s := range append([]string{t.OrganizationID, t.ScopesOrganizationID}, t.Scopes...) {
		if s != asked.OrganizationID && !slices.Contains(asked.Scopes, s) {
			echo = echo || c.redactor.contains(s)
			twice = twice || within(s)
		}
	}
	if echo {
		return nil, errors.New("it repeats the refresh key: check that token_url is Cable's")
	}
	if twice { // it would be shown, as what was granted
		return nil, errors.New("it holds its token in more than one field")
	}
	return t, nil
}

// answered turns an answer other than 200 into an *Error.
func (c *Client) answered(resp *http.Response, raw []byte, ex *exchange) *Error {
	e := &Error{Kind: Responded, StatusCode: resp.StatusCode, MaybeIssued: ex.out.Load(), Attempts: ex.attempts}
	switch {
	case resp.StatusCode == http.StatusTooManyRequests:
		e.RetryAfter = c.hold.Remaining()
	case resp.StatusCode < 400:
		e.Kind = InvalidResponse
		e.Detail = fmt.Sprintf("its status is %d instead of 200", resp.StatusCode)
		if resp.StatusCode >= 300 {
			e.Detail += ", and redirects are not followed: check token_url"
		}
		return e
	}
	e.Detail = c.envelope(raw)
	return e
}

// envelope returns the cleaned words of Cable's error envelope, or "".
func (c *Client) envelope(raw []byte) string {
	var env errorBody
	if len(raw) > maxErrorAnswer || json.Unmarshal(raw, &env) != nil {
		return ""
	}
	said := env.Message
	for i, e := range env.Errors {
		sep := "; "
		if i == 0 {
			sep = ": "
		}
		said += sep + strings.TrimPrefix(e.Field+": "+e.Message, ": ")
		if len(said) > 4*maxText {
			break // the rest would be cut off
		}
	}
	return c.redactor.clean(strings.TrimPrefix(said, ": "))
}

// date reads the Date header, or returns the zero time.
func date(resp *http.Response) time.Time {
	t, err := http.ParseTime(resp.Header.Get("Date"))
	if err != nil {
		return time.Time{}
	}
	return t
}
