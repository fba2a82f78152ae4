// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable

import (
	"bytes"
	"encoding/base64"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// shown contains the parts of a secret as formatting verbs print them.
//
// NOTE: the parts are windows, not the canary, because a map of windows shows the whole secret without the canary in
// one piece.
type shown struct{ texts, hexes []string }

func newShown(secret string) shown {
	var s shown
	for i, piece := range pieces(secret) {
		if i%4 != 0 {
			continue // a map of all windows contains these, too
		}
		raw := []byte(piece)
		decimal := strings.Trim(fmt.Sprint(raw), "[]")
		listed := strings.TrimSuffix(strings.TrimPrefix(fmt.Sprintf("%#v", raw), "[]byte{"), "}")
		s.texts = append(s.texts, piece, decimal, listed, base64.StdEncoding.EncodeToString(raw[:9]))
		s.hexes = append(s.hexes, hex.EncodeToString(raw))
	}
	return s
}

var unhex = strings.NewReplacer(" ", "", "0x", "", "0X", "", ",", "")

// in returns a form of the secret that text contains, or "".
func (s shown) in(text string) string {
	for _, form := range s.texts {
		if strings.Contains(text, form) {
			return form
		}
	}
	hexed := strings.ToLower(unhex.Replace(text))
	for _, form := range s.hexes {
		if strings.Contains(hexed, form) {
			return form
		}
	}
	return ""
}

// TestShown tests the helper of the next test.
func TestShown(t *testing.T) {
	t.Parallel()
	secret := cabletest.NewRefreshKey()
	find := newShown(secret)
	for _, format := range []string{"%v", "%s", "%q", "%x", "%X", "% x", "%#x", "% #X", "%d", "%#v"} {
		for _, v := range []any{[]byte(secret), &struct{ s []byte }{[]byte(secret)}, struct{ s string }{secret}} {
			text := fmt.Sprintf(format, v)
			if find.in(text) == "" && !strings.Contains(text, "%!d") || find.in("[redacted]") != "" {
				t.Errorf("%s of a %T is not found: %s", format, v, text)
			}
		}
	}
}

// TestPrintingShowsNoSecret prints each exported type, and types that contain one, in every way. No text shows the
// refresh key or the access token.
func TestPrintingShowsNoSecret(t *testing.T) {
	t.Parallel()
	srv := cabletest.NewServer(t, nil)
	cfg := Config{RefreshKey: NewSecret(srv.RefreshKey()), TokenURL: srv.URL, UserAgent: "test", Pause: new(Pause)}
	token := mustMint(t, newClientAt(t, cfg))
	c := newClientAt(t, cfg) // another one, because fmt reads all of it, and would race with connections in use
	bearer := cfg
	bearer.Bearer = true
	asBearer := newClientAt(t, bearer)
	failure := &Error{Kind: Responded, StatusCode: 401, Detail: "no", Attempts: 1}
	type deep struct{ deep struct{ deeper Client } }
	type hidden struct {
		s  Secret
		sp *Secret
		c  Config
		cp *Config
		k  Client
		kp *Client
		t  Token
		tp *Token
		r  TokenRequest
		e  *Error
		l  []Secret
		m  map[string]Token
		i  any
		d  deep
	}
	h := hidden{
		cfg.RefreshKey, &token.Value, cfg, &cfg, *c, c, *token, token, testRequest(), failure,
		[]Secret{cfg.RefreshKey, token.Value}, map[string]Token{"a": *token}, *asBearer,
		deep{struct{ deeper Client }{*c}},
	}
	values := []any{
		cfg.RefreshKey, &cfg.RefreshKey, token.Value, cfg, &cfg, *c, c, *asBearer, asBearer, *token, token,
		testRequest(), *failure, failure, c.Pause(), c.redactor, &c.redactor, h, &h, []any{h}, []Client{*c},
		[]*Client{c}, [1]Token{*token}, map[string]any{"h": h, "c": *c}, map[Secret]int{token.Value: 1},
		fmt.Errorf("wrapped: %w", failure), errors.Join(failure, fmt.Errorf("%v %v", c, token)),
		reflect.ValueOf(h), reflect.ValueOf(c),
	}
	verbs := "vsqxXdtTpcUobeEfFgGw"
	flags := []string{"", "+", "#", " ", "0", "-", "+#", "# ", "10", ".3", "10.20", "-0+# 5"}
	secrets := map[string]shown{
		"refresh key": newShown(cfg.RefreshKey.Reveal()), "access token": newShown(token.Value.Reveal()),
	}
	check := func(how string, v any, text string) {
		for name, secret := range secrets {
			if piece := secret.in(text); piece != "" {
				t.Errorf("%s of %T shows a part of the %s, %q", how, v, name, piece)
			}
		}
	}
	for _, v := range values {
		for _, verb := range verbs {
			for _, flag := range flags {
				format := "%" + flag + string(verb)
				check(format, v, fmt.Sprintf(format, v))
			}
		}
		check("Sprint", v, fmt.Sprint(v, v))
		check("Sprintln", v, fmt.Sprintln(v))
		var encoded bytes.Buffer
		inJSON, err := json.Marshal(v)
		inXML, err2 := xml.Marshal(v)
		err3 := gob.NewEncoder(&encoded).Encode(v)
		for _, handler := range []slog.Handler{
			slog.NewJSONHandler(&encoded, nil), slog.NewTextHandler(&encoded, nil),
		} {
			slog.New(handler).Error("m", "v", v, slog.Group("g", "v", v))
		}
		check("an encoding", v, fmt.Sprintf("%s %s %s %v %v %v", inJSON, inXML, &encoded, err, err2, err3))
	}
	for got, want := range map[string]string{
		fmt.Sprint(cfg.RefreshKey): "[redacted]", fmt.Sprintf("%+q", &token.Value): "[redacted]",
		fmt.Sprintf("%d", Secret{}): "[redacted]",
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// TestTextFields lists each text in an exported type that is not a Secret. It fails for a new one. If that can contain
// a secret, make it a Secret, else list it here.
func TestTextFields(t *testing.T) {
	t.Parallel()
	known := []string{
		"Client.userAgent",
		"Config.CACert", "Config.TokenURL", "Config.UserAgent",
		"Error.Detail",
		"Token.OrganizationID", "Token.OrganizationName", "Token.ScopesOrganizationID", "Token.Scopes[]",
		"TokenRequest.OrganizationID", "TokenRequest.Scopes[]",
	}
	var got []string
	var walk func(path string, typ reflect.Type)
	walk = func(path string, typ reflect.Type) {
		switch typ.Kind() {
		case reflect.String, reflect.Interface:
			got = append(got, path)
		case reflect.Slice, reflect.Array:
			if typ.Elem().Kind() == reflect.Uint8 {
				got = append(got, path)
				return
			}
			walk(path+"[]", typ.Elem())
		case reflect.Map:
			walk(path+"{key}", typ.Key())
			walk(path+"{}", typ.Elem())
		case reflect.Pointer:
			// fmt does not follow these in a struct, but encoders may. Types of this package are walked by themselves,
			// except for the text of a Secret.
			if e := typ.Elem(); e.PkgPath() != reflect.TypeFor[Secret]().PkgPath() && e.Kind() != reflect.Struct {
				walk(path+"*", e)
			}
		case reflect.Struct:
			if typ == reflect.TypeFor[Secret]() || typ.PkgPath() != reflect.TypeFor[Secret]().PkgPath() {
				return
			}
			for f := range typ.NumField() {
				walk(path+"."+typ.Field(f).Name, typ.Field(f).Type)
			}
		}
	}
	for _, typ := range []reflect.Type{
		reflect.TypeFor[Client](), reflect.TypeFor[Config](), reflect.TypeFor[Error](), reflect.TypeFor[Pause](),
		reflect.TypeFor[Secret](), reflect.TypeFor[Token](), reflect.TypeFor[TokenRequest](),
	} {
		walk(typ.Name(), typ)
	}
	slices.Sort(got)
	if !slices.Equal(got, known) {
		t.Errorf("texts %q,\nwant %q", got, known)
	}
	if n := reflect.TypeFor[Secret]().NumField(); n != 1 ||
		reflect.TypeFor[Secret]().Field(0).Type.Kind() != reflect.Pointer {
		t.Error("a Secret is more than a pointer: fmt prints the rest of it in an unexported field")
	}
}
