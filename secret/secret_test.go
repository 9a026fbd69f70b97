package secret_test

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
	"net/url"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"testing"
	"text/template"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/secret"
)

const clear = "tiger\x00 lilien/ß"

// holder has secrets in every position in which printers treat values differently.
type holder struct {
	Public  secret.Secret
	private secret.Secret
	Pointer *secret.Secret
	Any     any
	List    []secret.Secret
	Map     map[string]secret.Secret
	inner   struct{ deep secret.Secret }
}

func newHolder() *holder {
	s := secret.New(clear)
	h := &holder{Public: s, private: s, Pointer: &s, Any: s, List: []secret.Secret{s}, Map: map[string]secret.Secret{"k": s}}
	h.inner.deep = s
	return h
}

// leaks looks for the clear text in any form that an encoder might give it.
func leaks(s string) bool {
	for _, form := range []string{
		clear, "tiger", hex.EncodeToString([]byte("tiger")), strings.ToUpper(hex.EncodeToString([]byte("tiger"))),
		base64.StdEncoding.EncodeToString([]byte("tige"))[:5], fmt.Sprint([]byte("tiger"))[1:18], "%!",
	} {
		if strings.Contains(s, form) {
			return true
		}
	}
	return false
}

func TestNothingPrintsASecret(t *testing.T) {
	h := newHolder()
	for _, v := range []any{h, *h, h.Public, h.Pointer, h.List, h.Map, []any{h.Public}, fmt.Errorf("open: %v", h.Public)} {
		for _, verb := range strings.Split("v +v #v s q x X d t b o c U e g p T 10s -5q", " ") {
			if (verb == "p" || verb == "T") && leaks(strings.ReplaceAll(fmt.Sprintf("%"+verb, v), "%!", "")) {
				t.Errorf("%%%s of %T leaks", verb, v)
			}
			if verb == "p" || verb == "T" {
				continue
			}
			out := strings.ReplaceAll(fmt.Sprintf("%"+verb, v), "%!", "")
			require.False(t, leaks(out), "%%%s of %T: %s", verb, v, out)
		}
		require.False(t, leaks(dump(reflect.ValueOf(v))), "a dump by reflection")
	}
	require.Equal(t, "[secret]", fmt.Sprint(h.Public))
	require.Equal(t, "[secret]", h.Public.String())
	require.Equal(t, "[secret]", h.Public.GoString())
}

func TestNothingEncodesASecret(t *testing.T) {
	h := newHolder()
	var out bytes.Buffer
	require.NoError(t, json.NewEncoder(&out).Encode(h))
	require.NoError(t, xml.NewEncoder(&out).Encode(h.List))
	for _, v := range []any{h.Public, struct{ P secret.Secret }{h.Public}, struct{ P *secret.Secret }{h.Pointer}, h.List, h.Map} {
		require.ErrorIs(t, gob.NewEncoder(&out).Encode(v), secret.ErrEncode, "%T", v)
	}
	logger := slog.New(slog.NewJSONHandler(&out, nil))
	logger.Info("x", "secret", h.Public, "holder", h, "group", slog.GroupValue(slog.Any("s", h.Public)))
	slog.New(slog.NewTextHandler(&out, nil)).Error("x", "secret", h.Public, "holder", h, slog.Any("p", h.Pointer))
	require.NoError(t, template.Must(template.New("").Parse("{{.Public}} {{.}} {{printf \"%x\" .Public}}")).Execute(&out, h))
	require.False(t, leaks(out.String()), out.String())
	require.Contains(t, out.String(), "[secret]")
}

func TestSecretsAreNotRead(t *testing.T) {
	var h struct{ P secret.Secret }
	require.ErrorIs(t, json.Unmarshal([]byte(`{"P":"[secret]"}`), &h), secret.ErrDecode)
	require.ErrorIs(t, json.Unmarshal([]byte(`"x"`), &h.P), secret.ErrDecode)
	require.Error(t, xml.Unmarshal([]byte(`<x><P>y</P></x>`), &h))
	var encoded bytes.Buffer
	require.NoError(t, gob.NewEncoder(&encoded).Encode(&struct{ P *url.URL }{&url.URL{Path: "x"}})) // encodes itself, too
	require.ErrorIs(t, gob.NewDecoder(&encoded).Decode(&h), secret.ErrDecode)
	require.True(t, h.P.Empty())
}

// TestPanicsAndErrors: what a panic prints of a secret, and of what holds one, and
// what an error that was made from one says, is not the secret.
func TestPanicsAndErrors(t *testing.T) {
	if os.Getenv("HOLDFAST_TEST_PANIC") != "" {
		h := newHolder()
		switch os.Getenv("HOLDFAST_TEST_PANIC") {
		case "secret":
			panic(h.Public)
		case "holder":
			panic(h)
		case "error":
			panic(fmt.Errorf("%w: %v %+v", errors.ErrUnsupported, h.Public, h))
		case "plain":
			panic(h.Public.Reveal())
		}
	}
	exe, err := os.Executable()
	require.NoError(t, err)
	for _, what := range []string{"secret", "holder", "error", "plain"} {
		cmd := exec.Command(exe, "-test.run=^TestPanicsAndErrors$")
		cmd.Env = append(os.Environ(), "HOLDFAST_TEST_PANIC="+what, "GOTRACEBACK=all")
		out, err := cmd.CombinedOutput()
		require.Error(t, err, "it panics")
		require.Contains(t, string(out), "panic: ")
		require.Equal(t, what == "plain", leaks(strings.ReplaceAll(string(out), "%!", "")), "%s: %s", what, out)
	}
}

func TestReveal(t *testing.T) {
	s := secret.New(clear)
	require.Equal(t, clear, s.Reveal())
	require.False(t, s.Empty())
	require.True(t, s.Equal(secret.New(clear)))
	require.False(t, s.Equal(secret.New(clear+"x")))
	require.False(t, s.Equal(secret.Secret{}))
	var zero secret.Secret
	require.True(t, zero.Empty() && zero.IsZero() && zero.Equal(secret.New("")))
	require.Empty(t, zero.Reveal())
	b, err := json.Marshal(struct {
		P secret.Secret `json:"p,omitzero"`
	}{})
	require.NoError(t, err)
	require.JSONEq(t, `{}`, string(b))
}

// TestTheCheckBites shows that what it looks for is found in types that are not
// Secret: a string, one with a String method alone, and one behind a pointer.
func TestTheCheckBites(t *testing.T) {
	type inner struct{ hidden named }
	p := named("tiger")
	for _, v := range []any{"tiger", struct{ s string }{"tiger"}, inner{"tiger"}, errors.New("tiger")} {
		require.True(t, leaks(fmt.Sprintf("%+v", v)), "%T", v)
	}
	require.True(t, leaks(dump(reflect.ValueOf(struct{ p *named }{&p}))))
	require.False(t, leaks(fmt.Sprint(p)), "its String method works, and is not enough")
}

type named string

func (named) String() string { return "[secret]" }

// dump writes all that reflection can reach: through pointers and into fields that
// are not exported, without calling methods.
func dump(v reflect.Value) string {
	switch v.Kind() {
	case reflect.Pointer, reflect.Interface:
		if !v.IsNil() {
			return dump(v.Elem())
		}
	case reflect.Struct:
		var out string
		for i := range v.NumField() {
			out += dump(v.Field(i)) + " "
		}
		return out
	case reflect.Slice, reflect.Array:
		var out string
		for i := range v.Len() {
			out += dump(v.Index(i)) + " "
		}
		return out
	case reflect.Map:
		var out string
		for _, k := range v.MapKeys() {
			out += dump(k) + dump(v.MapIndex(k)) + " "
		}
		return out
	case reflect.String:
		return v.String()
	}
	return ""
}
