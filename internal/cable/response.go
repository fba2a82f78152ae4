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
	maxBody      = 1 << 20      // bytes of a 200; a token and its scopes have a few KiB
	maxErrorBody = 64 << 10     // bytes of an error
	maxToken     = 16 << 10     // 16 KiB, because a token has to fit a header, and Vault stores it with each lease
	maxCoding    = 40           // bytes of a Content-Encoding that an error repeats
	maxNumber    = 400          // bytes of a number whose value is computed
	maxDigits    = 19           // bytes of a number that an error repeats, those of an int64
	minToken     = 16           // bytes of a token that must stand once; a shorter one could match by chance
	maxExpiry    = 253402300799 // the end of the year 9999, the last that RFC 3339 can express; milliseconds exceed it

	ageSlack         = 5 * time.Second        // by which Age may exceed the call, because each cache rounds it up
	errorBodyTimeout = 500 * time.Millisecond // bounds the wait for the body of an error

	notCables = "not in Cable's error format: a gateway, proxy or firewall may have responded"
)

var byteOrderMark = []byte("\xef\xbb\xbf") // begins the JSON of some servers, and is ignored

// scopesBody is the JSON of the scopes in request and response, by the request-token reference.
type scopesBody struct {
	OrganizationID string   `json:"organization_id"`
	Scopes         []string `json:"scopes"`
}

// checkNames refuses a response, a valid JSON object, in which a documented name stands twice, or in another case,
// because two readers of the response could read two tokens. Other members are not judged. It looks at each byte once,
// because every mint waits for it.
func checkNames(raw []byte) error {
	top := names{"token": 0, "expiry": 0, "organization_id": 0, "organization_name": 0, "scopes": 0}
	inScopes := names{"organization_id": 0, "scopes": 0}
	depth, isKey, isScopes := 0, false, false // isScopes: inside the object "scopes", or before its value
	for i := 0; i < len(raw); i++ {
		switch raw[i] {
		case '{', '[':
			depth++
			isKey = raw[i] == '{'
			isScopes = isScopes && (isKey || depth > 2)
		case '}', ']':
			depth--
		case ',', ':':
			isKey = raw[i] == ','
		case '"':
			begin := i
			for i++; raw[i] != '"'; i++ {
				if raw[i] == '\\' {
					i++
				}
			}
			var key string
			var err error
			if isKey && depth == 1 {
				key, err = top.add(raw[begin:i+1], "")
				isScopes = key == "scopes"
			} else if isKey && depth == 2 && isScopes {
				_, err = inScopes.add(raw[begin:i+1], "scopes.")
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// names counts the documented members of an object.
type names map[string]int

// add counts a member by its key, which it returns without quotes.
func (n names) add(quoted []byte, path string) (key string, err error) {
	key = string(quoted[1 : len(quoted)-1])
	if strings.Contains(key, `\`) {
		_ = json.Unmarshal(quoted, &key) // it is valid
	}
	for name, count := range n {
		if strings.EqualFold(key, name) && (key != name || count > 0) {
			return key, fmt.Errorf("its field %q stands twice, or in another case", path+name)
		} else if key == name {
			n[name]++
		}
	}
	return key, nil
}

// decode reads the body of a 200. Its errors contain nothing of the body but the message of an error envelope and the
// digits of an expiry.
func (c *Client) decode(raw []byte, tr TokenRequest) (*Token, error) {
	if len(raw) > maxBody {
		return nil, fmt.Errorf("it is larger than %d bytes", maxBody)
	}
	raw = bytes.TrimSpace(bytes.TrimPrefix(raw, byteOrderMark))
	if !json.Valid(raw) || raw[0] != '{' {
		return nil, errors.New("it is not a JSON object of the documented shape")
	}
	if err := checkNames(raw); err != nil {
		return nil, err
	}
	var body struct {
		Token            string          `json:"token"`
		Expiry           json.RawMessage `json:"expiry"`
		OrganizationID   string          `json:"organization_id"`
		OrganizationName string          `json:"organization_name"`
		Scopes           scopesBody      `json:"scopes"`
	}
	if err := json.Unmarshal(raw, &body); err != nil {
		var wrong *json.UnmarshalTypeError // the only one that valid JSON can cause
		_ = errors.As(err, &wrong)
		return nil, fmt.Errorf("its field %q is not of the documented type", wrong.Field)
	}
	if slices.Contains(body.Scopes.Scopes, "") { // or null, and neither is a grant of something else
		return nil, errors.New("its field \"scopes.scopes\" contains an empty scope")
	}
	token, name := body.Token, body.OrganizationName
	if token == "" {
		if message, _ := c.envelope(raw); message != "" {
			return nil, errors.New("it contains no token, but a message: " + message)
		}
		return nil, errors.New("it contains no token")
	}
	if len(token) > maxToken {
		return nil, fmt.Errorf("its token has %d bytes: at most %d are accepted", len(token), maxToken)
	}
	if strings.ContainsFunc(token, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return nil, errors.New("its token contains characters that a header cannot carry")
	}
	if body.Expiry == nil || string(body.Expiry) == "null" {
		return nil, errors.New("it contains no expiry")
	}
	expiry, err := c.parseExpiry(string(body.Expiry))
	if err != nil {
		return nil, err
	}
	t := &Token{
		Value:                NewSecret(token),
		Expiry:               expiry,
		OrganizationID:       body.OrganizationID,
		OrganizationName:     c.redactor.clean(name),
		ScopesOrganizationID: body.Scopes.OrganizationID,
		Scopes:               body.Scopes.Scopes,
	}
	if err := c.checkEcho(t, name, tr); err != nil {
		return nil, err
	}
	return t, nil
}

// parseExpiry returns a JSON value as a Unix time. It is a number whose value is whole, however it is written.
func (c *Client) parseExpiry(text string) (int64, error) {
	if n, err := strconv.ParseInt(text, 10, 64); err == nil && n >= 1 && n <= maxExpiry {
		return n, nil // how Cable writes it
	}
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

// errorDetail describes the body of an error response, made safe to show.
func (c *Client) errorDetail(raw []byte) string {
	message, cables := c.envelope(raw)
	if message != "" && !cables {
		message += " (" + notCables + ")"
	}
	return cmp.Or(message, notCables)
}

// envelope returns the message of Cable's error envelope, made safe to show, or "", and whether raw is an envelope, an
// object with a code and a message. A member of another type does not spoil the others.
func (c *Client) envelope(raw []byte) (message string, cables bool) {
	var body struct{ Code, Message, Errors json.RawMessage } // in the names of Go, because any case is read
	if len(raw) > maxErrorBody || json.Unmarshal(bytes.TrimPrefix(raw, byteOrderMark), &body) != nil {
		return "", false
	}
	var fields []struct{ Field, Message string }
	_ = json.Unmarshal(body.Message, &message)
	cables = message != "" && len(body.Code) > 0
	if json.Unmarshal(body.Errors, &fields) == nil && len(fields) > 0 {
		var texts []string
		for _, e := range fields {
			texts = append(texts, strings.TrimPrefix(e.Field+": "+e.Message, ": "))
		}
		message = strings.TrimPrefix(message+": "+strings.Join(texts, "; "), ": ")
	}
	return c.redactor.clean(message), cables
}

// checkCoding refuses a body that is not as it was written.
func checkCoding(r redactor, header http.Header) error {
	coding := strings.Join(header.Values("Content-Encoding"), ", ")
	if coding == "" || strings.EqualFold(coding, "identity") {
		return nil
	}
	return fmt.Errorf("its Content-Encoding is %s, but only identity was accepted", r.show(coding, maxCoding))
}

// cableClock returns Cable's clock when it sent the response to a call of the given duration: Date plus Age, or the
// zero time without a usable Date. An Age beyond the call means that a cache responded, from which a token cannot be
// taken, because it is older than its lease would be. An Age counts a second more than it says, because it is cut off
// at whole seconds (RFC 9111, 4.2.3).
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
	t, _ := http.ParseTime(header.Get("Date"))
	return t
}
