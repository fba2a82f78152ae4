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

// printed returns a token, the configuration of the client that got it, and another client of the same, because fmt
// reads all of it, and would race with the connections of one in use.
func printed(t *testing.T) (Config, *Client, *Token) {
	t.Helper()
	srv := cabletest.NewServer(t, nil)
	cfg := Config{
		RefreshKey: NewSecret(srv.RefreshKey()), TokenURL: srv.URL, Bearer: false, UserAgent: "test", Pause: new(Pause),
	}
	token := mustMint(t, newClientAt(t, cfg))
	return cfg, newClientAt(t, cfg), token
}

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
		var decimal, listed []string
		for _, c := range []byte(piece) {
			decimal = append(decimal, fmt.Sprint(c))
			listed = append(listed, fmt.Sprintf("0x%x", c))
		}
		s.texts = append(
			s.texts, piece, strings.Join(decimal, " "), strings.Join(listed, ", "),
			base64.StdEncoding.EncodeToString([]byte(piece[:9])),
		)
		s.hexes = append(s.hexes, hex.EncodeToString([]byte(piece)))
	}
	return s
}

var unhex = strings.NewReplacer(" ", "", "0x", "", "0X", "", ",", "")

// in returns a form of the secret that text contains, or "".
func (s shown) in(text string) string {
	hexed := strings.ToLower(unhex.Replace(text))
	for _, form := range s.texts {
		if strings.Contains(text, form) {
			return form
		}
	}
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
		for _, v := range []any{
			secret, []byte(secret), struct{ s string }{secret}, &struct{ s []byte }{[]byte(secret)},
		} {
			text := fmt.Sprintf(format, v)
			if s, isText := v.(string); isText && format == "%d" {
				text = fmt.Sprintf("%d", []byte(s))
			}
			if find.in(text) == "" && !strings.Contains(text, "%!d") {
				t.Errorf("%s of a %T is not found: %s", format, v, text)
			}
		}
	}
	if got := find.in("[redacted]"); got != "" {
		t.Errorf("found %q in nothing", got)
	}
}

// TestPrintingShowsNoSecret prints each exported type, and types that contain one, in every way. No text shows the
// refresh key or the access token.
func TestPrintingShowsNoSecret(t *testing.T) {
	t.Parallel()
	cfg, c, token := printed(t)
	bearer := cfg
	bearer.Bearer = true
	asBearer := newClientAt(t, bearer)
	failure := &Error{Kind: Responded, StatusCode: 401, Detail: "no", Attempts: 1}
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
		d  struct{ deep struct{ deeper Client } }
	}
	h := hidden{
		cfg.RefreshKey,
		&token.Value,
		cfg,
		&cfg,
		*c,
		c,
		*token,
		token,
		testRequest(),
		failure,
		[]Secret{cfg.RefreshKey, token.Value},
		map[string]Token{"a": *token},
		*asBearer,
		struct{ deep struct{ deeper Client } }{struct{ deeper Client }{*c}},
	}
	values := []any{
		cfg.RefreshKey, &cfg.RefreshKey, token.Value, cfg, &cfg, *c, c, *asBearer, asBearer, *token, token,
		testRequest(), *failure, failure, c.Pause(),
		c.redactor, &c.redactor,
		h, &h,
		[]any{h},
		[]Client{*c},
		[]*Client{c},
		[1]Token{*token},
		map[string]any{"h": h, "c": *c},
		map[Secret]int{token.Value: 1},
		fmt.Errorf("wrapped: %w", failure),
		errors.Join(failure, fmt.Errorf("%v %v", c, token)),
		reflect.ValueOf(h),
		reflect.ValueOf(c),
	}
	verbs := "vsqxXdtTpcUobeEfFgGw"
	flags := []string{"", "+", "#", " ", "0", "-", "+#", "# ", "10", ".3", "10.20", "-0+# 5"}
	count := 0
	secrets := map[string]shown{
		"refresh key": newShown(cfg.RefreshKey.Reveal()), "access token": newShown(token.Value.Reveal()),
	}
	check := func(how string, v any, text string) {
		count++
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
		for name, encode := range map[string]func() ([]byte, error){
			"JSON": func() ([]byte, error) { return json.Marshal(v) },
			"XML":  func() ([]byte, error) { return xml.Marshal(v) },
			"gob": func() ([]byte, error) {
				var b bytes.Buffer
				err := gob.NewEncoder(&b).Encode(v)
				return b.Bytes(), err
			},
			"slog's JSON": func() ([]byte, error) {
				var b bytes.Buffer
				slog.New(slog.NewJSONHandler(&b, nil)).Error("m", "v", v, slog.Group("g", "v", v))
				return b.Bytes(), nil
			},
			"slog's text": func() ([]byte, error) {
				var b bytes.Buffer
				slog.New(slog.NewTextHandler(&b, nil)).Error("m", "v", v, slog.Group("g", "v", v))
				return b.Bytes(), nil
			},
		} {
			raw, err := encode()
			check(name, v, string(raw)+fmt.Sprint(err))
		}
	}
	t.Logf("%d texts", count)
	for _, tt := range []struct{ got, want string }{
		{fmt.Sprint(cfg.RefreshKey), "[redacted]"},
		{fmt.Sprintf("%+q", &token.Value), "[redacted]"},
		{fmt.Sprintf("%d", Secret{}), "[redacted]"},
	} {
		if tt.got != tt.want {
			t.Errorf("got %q, want %q", tt.got, tt.want)
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
