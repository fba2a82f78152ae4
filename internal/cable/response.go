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

const (
	maxBody      = 1 << 20  // bytes of a 200; a token and its scopes have a few KiB
	maxErrorBody = 64 << 10 // bytes of an error

	// errorBodyTimeout bounds the wait for the body of an error.
	errorBodyTimeout = 500 * time.Millisecond

	// maxExpiry is the end of the year 9999, the last time that RFC 3339 can
	// express. A later expiry is not in seconds; today's milliseconds are later.
	maxExpiry = 253402300799

	// ageSlack is by how much Age may exceed the duration of the call: it is
	// rounded up by each cache on the way (RFC 9111, 4.2.3).
	ageSlack = 5 * time.Second

	// minToken is the length from which the rest of a response is searched for
	// its token: a shorter one could match by chance, and is no secret.
	minToken = 16
)

// The JSON of request and response, by the request-token reference.
type (
	scopesBody struct {
		OrganizationID string   `json:"organization_id"`
		Scopes         []string `json:"scopes"`
	}
	requestBody struct {
		ExpirySeconds int64      `json:"expiry_seconds"`
		Scopes        scopesBody `json:"scopes"`
	}
	tokenBody struct {
		Token            secretText      `json:"token"`
		Expiry           json.RawMessage `json:"expiry"`
		OrganizationID   string          `json:"organization_id"`
		OrganizationName string          `json:"organization_name"`
		Scopes           *scopesBody     `json:"scopes"`
	}
	errorBody struct {
		Message string       `json:"message"`
		Errors  []fieldError `json:"errors"`
	}
	fieldError struct {
		Field   string `json:"field"`
		Message string `json:"message"`
	}
)

// secretText decodes straight into a Secret, so that tokenBody contains no
// token as plain text.
type secretText struct{ Secret }

// UnmarshalJSON implements [json.Unmarshaler].
func (t *secretText) UnmarshalJSON(raw []byte) error {
	var s string
	if err := json.Unmarshal(raw, &s); err != nil {
		return err
	}
	t.Secret = NewSecret(s)
	return nil
}

// decode reads the body of a 200. Its errors contain nothing of the body but
// the message of an error envelope.
func (c *Client) decode(raw []byte, tr TokenRequest) (*Token, error) {
	if len(raw) > maxBody {
		return nil, fmt.Errorf("it is larger than %d bytes", maxBody)
	}
	var body tokenBody
	if err := json.Unmarshal(raw, &body); err != nil {
		var typeErr *json.UnmarshalTypeError
		if errors.As(err, &typeErr) && typeErr.Field != "" {
			return nil, fmt.Errorf("its field %q is not of the documented type", typeErr.Field)
		}
		return nil, errors.New("it is not a JSON object of the documented shape")
	}
	if body.Token.IsZero() {
		if message := c.envelope(raw); message != "" {
			return nil, errors.New("it contains no token, but a message: " + message)
		}
		return nil, errors.New("it contains no token")
	}
	for _, c := range []byte(body.Token.Reveal()) {
		if c <= ' ' || c >= 0x7f {
			return nil, errors.New("its token contains characters that a header cannot carry")
		}
	}
	if len(body.Expiry) == 0 {
		return nil, errors.New("it contains no expiry")
	}
	expiry, err := strconv.ParseInt(string(body.Expiry), 10, 64)
	if err != nil {
		return nil, errors.New("its expiry is not a whole number of seconds")
	}
	if expiry <= 0 || expiry > maxExpiry {
		return nil, fmt.Errorf("its expiry %s is not a Unix time in seconds", c.redactor.clean(string(body.Expiry)))
	}
	t := &Token{
		Value:            body.Token.Secret,
		Expiry:           expiry,
		OrganizationID:   body.OrganizationID,
		OrganizationName: c.redactor.clean(body.OrganizationName),
	}
	if body.Scopes != nil {
		t.ScopesOrganizationID = body.Scopes.OrganizationID
		t.Scopes = body.Scopes.Scopes
	}
	if err := c.checkEcho(t, body.OrganizationName, tr); err != nil {
		return nil, err
	}
	return t, nil
}

// checkEcho refuses a response that contains a secret where none belongs. A
// server that echoes its request would have the refresh key returned as a token
// or shown as an organization; and what was granted is shown, so that the token
// must not be part of it. Values that were requested are not searched for the
// key: some keys contain the name of their organization.
func (c *Client) checkEcho(t *Token, organizationName string, tr TokenRequest) error {
	token := t.Value.Reveal()
	containsToken := func(s string) bool { return len(token) >= minToken && strings.Contains(s, token) }
	key := c.redactor.repeats(token) || c.redactor.repeats(organizationName)
	twice := containsToken(organizationName)
	for _, s := range append([]string{t.OrganizationID, t.ScopesOrganizationID}, t.Scopes...) {
		if s != tr.OrganizationID && !slices.Contains(tr.Scopes, s) {
			key = key || c.redactor.contains(s)
			twice = twice || containsToken(s)
		}
	}
	switch {
	case key:
		return errors.New("it repeats the refresh key: check that token_url is Cable's")
	case twice:
		return errors.New("it contains its token in more than one field")
	}
	return nil
}

// envelope returns the message of Cable's error envelope, made safe to show, or
// "".
func (c *Client) envelope(raw []byte) string {
	var body errorBody
	if len(raw) > maxErrorBody || json.Unmarshal(raw, &body) != nil {
		return ""
	}
	text := body.Message
	for i, e := range body.Errors {
		separator := "; "
		if i == 0 {
			separator = ": "
		}
		text += separator + strings.TrimPrefix(e.Field+": "+e.Message, ": ")
		if len(text) > 4*maxText {
			break // the rest would be cut off
		}
	}
	return c.redactor.clean(strings.TrimPrefix(text, ": "))
}

// cableClock returns Cable's clock when it sent the response to a call of the
// given duration: Date plus Age, or the zero time without a usable Date. An Age
// beyond the call means that a cache responded, from which a token cannot be
// taken: it is older than its lease would be. An Age counts a second more than it
// says, because it is cut off at whole seconds.
func cableClock(header http.Header, duration time.Duration) (time.Time, error) {
	var age time.Duration
	if values := header.Values("Age"); len(values) > 0 {
		seconds, err := strconv.ParseUint(values[0], 10, 31)
		if err != nil || len(values) > 1 {
			return time.Time{}, errors.New("its Age header is not one whole number of seconds")
		}
		if age = time.Duration(seconds) * time.Second; age > duration+ageSlack {
			return time.Time{}, errors.New("its Age header exceeds the duration of the call: it comes from a cache")
		}
		age += time.Second
	}
	now := date(header)
	if !now.IsZero() {
		now = now.Add(age)
	}
	return now, nil
}

// date reads the Date header, or returns the zero time.
func date(header http.Header) time.Time {
	t, err := http.ParseTime(header.Get("Date"))
	if err != nil {
		return time.Time{}
	}
	return t
}
