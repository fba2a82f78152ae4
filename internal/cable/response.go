// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
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

	// maxExpiry is the end of the year 9999, the last time that RFC 3339 can express. A later expiry is not in seconds;
	// today's milliseconds are later.
	maxExpiry = 253402300799

	// ageSlack is by how much Age may exceed the duration of the call, because each cache on the way rounds it up (RFC
	// 9111, 4.2.3).
	ageSlack = 5 * time.Second

	maxToken  = 16 << 10 // bytes of a token, because it has to fit a header, and Vault stores it with each lease
	maxCoding = 40       // bytes of a Content-Encoding that an error repeats
	maxNumber = 400      // bytes of a number whose value is computed
	maxDigits = 19       // bytes of a number that an error repeats, those of an int64

	// minToken is the length from which the rest of a response is searched for its token. A shorter one could match by
	// chance, and is no secret.
	minToken = 16
)

// byteOrderMark begins the JSON of some servers, and is ignored.
var byteOrderMark = []byte("\xef\xbb\xbf")

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
	fieldError struct {
		Field   string `json:"field"`
		Message string `json:"message"`
	}
)

// errShape is the error for a 200 that is not a JSON object.
var errShape = errors.New("it is not a JSON object of the documented shape")

// object has the documented members of a JSON object, by their paths.
type object map[string]json.RawMessage

// parse returns the members of raw, an object at path. A documented name counts as it is written, and once, because
// another case or a second one would let two readers of a response read two tokens. Other members are not judged.
func parse(raw []byte, path string, names ...string) (object, error) {
	d := json.NewDecoder(bytes.NewReader(raw))
	if t, err := d.Token(); err != nil || t != json.Delim('{') || !json.Valid(raw) {
		return nil, errShape
	}
	o := object{}
	for d.More() {
		t, _ := d.Token() // raw is valid, so none of these fails
		key, _ := t.(string)
		var value json.RawMessage
		_ = d.Decode(&value)
		for _, name := range names {
			if _, again := o[path+name]; again && key == name || key != name && strings.EqualFold(key, name) {
				return nil, fmt.Errorf("its field %q stands twice, or in another case", path+name)
			} else if key == name {
				o[path+name] = value
			}
		}
	}
	return o, nil
}

// read decodes a member, if it is there, into to.
func (o object) read(name string, to any) error {
	if raw, ok := o[name]; ok && json.Unmarshal(raw, to) != nil {
		return fmt.Errorf("its field %q is not of the documented type", name)
	}
	return nil
}

// has reports whether a member is there and not null.
func (o object) has(name string) bool { return o[name] != nil && string(o[name]) != "null" }

// decode reads the body of a 200. Its errors contain nothing of the body but the message of an error envelope and the
// digits of an expiry.
func (c *Client) decode(raw []byte, tr TokenRequest) (*Token, error) {
	if len(raw) > maxBody {
		return nil, fmt.Errorf("it is larger than %d bytes", maxBody)
	}
	raw = bytes.TrimPrefix(raw, byteOrderMark)
	body, err := parse(raw, "", "token", "expiry", "organization_id", "organization_name", "scopes")
	if err != nil {
		return nil, err
	}
	var token, name string
	t := new(Token)
	err = cmp.Or(body.read("token", &token), body.read("organization_id", &t.OrganizationID),
		body.read("organization_name", &name))
	if err == nil && body.has("scopes") {
		var scopes object
		if scopes, err = parse(body["scopes"], "scopes.", "organization_id", "scopes"); errors.Is(err, errShape) {
			err = body.read("scopes", new(scopesBody))
		}
		err = cmp.Or(err, scopes.read("scopes.organization_id", &t.ScopesOrganizationID),
			scopes.read("scopes.scopes", &t.Scopes))
	}
	if err != nil {
		return nil, err
	}
	if token == "" {
		if message, _ := c.envelope(raw); message != "" {
			return nil, errors.New("it contains no token, but a message: " + message)
		}
		return nil, errors.New("it contains no token")
	}
	if len(token) > maxToken {
		return nil, fmt.Errorf("its token has %d bytes: at most %d are accepted", len(token), maxToken)
	}
	for _, c := range []byte(token) {
		if c <= ' ' || c >= 0x7f {
			return nil, errors.New("its token contains characters that a header cannot carry")
		}
	}
	if !body.has("expiry") {
		return nil, errors.New("it contains no expiry")
	}
	if t.Expiry, err = c.parseExpiry(string(body["expiry"])); err != nil {
		return nil, err
	}
	t.Value, t.OrganizationName = NewSecret(token), c.redactor.clean(name)
	if err := c.checkEcho(t, name, tr); err != nil {
		return nil, err
	}
	return t, nil
}

// parseExpiry returns a JSON value as a Unix time. It is a number whose value is whole, however it is written.
func (c *Client) parseExpiry(text string) (int64, error) {
	rough, err := strconv.ParseFloat(text, 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) {
		return 0, errors.New("its expiry is not a whole number of seconds")
	}
	if rough < 1 || rough > maxExpiry || len(text) > maxNumber {
		digits := ""
		if len(text) <= maxDigits {
			digits = " " + c.redactor.clean(text)
		}
		return 0, fmt.Errorf("its expiry%s is not a Unix time in seconds", digits)
	}
	exact, _ := new(big.Rat).SetString(text) // small, because text and value are
	if exact == nil || !exact.IsInt() {
		return 0, errors.New("its expiry is not a whole number of seconds")
	}
	return exact.Num().Int64(), nil
}

// checkEcho refuses a response that contains a secret where none belongs. A server that echoes its request would have
// the refresh key returned as a token or shown as an organization; and the grant is shown, so that the token must not
// be part of it. Values that were requested are not searched for the key, because some keys contain the name of their
// organization.
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

// notCables is the description of an error response that is not in Cable's format.
const notCables = "not in Cable's error format: a gateway, proxy or firewall may have responded"

// errorDetail describes the body of an error response, made safe to show.
func (c *Client) errorDetail(raw []byte) string {
	message, cables := c.envelope(raw)
	switch {
	case cables:
		return message
	case message == "":
		return notCables
	default:
		return message + " (" + notCables + ")"
	}
}

// envelope returns the message of Cable's error envelope, made safe to show, or "", and whether raw is an envelope, an
// object with a code and a message. A member of another type does not spoil the others.
func (c *Client) envelope(raw []byte) (message string, cables bool) {
	var body struct{ Code, Message, Errors json.RawMessage }
	if len(raw) > maxErrorBody || json.Unmarshal(bytes.TrimPrefix(raw, byteOrderMark), &body) != nil {
		return "", false
	}
	var text string
	var fields []fieldError
	_ = json.Unmarshal(body.Message, &text)
	cables = text != "" && len(body.Code) > 0
	if json.Unmarshal(body.Errors, &fields) != nil {
		fields = nil
	}
	for i, e := range fields {
		separator := "; "
		if i == 0 {
			separator = ": "
		}
		text += separator + strings.TrimPrefix(e.Field+": "+e.Message, ": ")
		if len(text) > 4*maxText {
			break // the rest would be cut off
		}
	}
	return c.redactor.clean(strings.TrimPrefix(text, ": ")), cables
}

// contentCoding returns the coding of a response, or "" for none.
func contentCoding(header http.Header) string {
	coding := strings.Join(header.Values("Content-Encoding"), ", ")
	if strings.EqualFold(coding, "identity") {
		return ""
	}
	return coding
}

// cableClock returns Cable's clock when it sent the response to a call of the given duration: Date plus Age, or the
// zero time without a usable Date. An Age beyond the call means that a cache responded, from which a token cannot be
// taken, because it is older than its lease would be. An Age counts a second more than it says, because it is cut off
// at whole seconds.
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
