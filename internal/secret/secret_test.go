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
	"reflect"
	"strings"
	"testing"

	"countersign/internal/secret"

	json2 "github.com/go-json-experiment/json"
	"github.com/pelletier/go-toml/v2"
)

type nested struct {
	Name    string
	Exposed secret.Bytes
	hidden  secret.Bytes
	Pointer *secret.Bytes
	Any     any
	List    []secret.Bytes
	Map     map[string]secret.Bytes
}

// TestSecretsAreNotPrinted prints a secret by each verb of fmt, as text, JSON, TOML, XML, gob, in
// lines of the log and in errors: by itself, in structs with exported and unexported fields, behind
// pointers and interfaces, in lists and maps. None of its encodings is found.
func TestSecretsAreNotPrinted(t *testing.T) {
	const content = "correct-horse-battery"
	one := secret.New([]byte(content))
	n := nested{"n", one, one, &one, one, []secret.Bytes{one}, map[string]secret.Bytes{"k": one}}
	forms := []string{
		content, hex.EncodeToString([]byte(content)), strings.ToUpper(hex.EncodeToString([]byte(content))),
		base64.StdEncoding.EncodeToString([]byte(content)), strings.Trim(fmt.Sprint([]byte(content)), "[]"),
		strings.Trim(fmt.Sprintf("%#v", []byte(content))[7:], "{}"), fmt.Sprintf("% x", content),
	}
	check := func(how, out string) {
		t.Helper()
		for _, form := range forms {
			if strings.Contains(out, form) {
				t.Errorf("%s shows the secret: %s", how, out)
			}
		}
	}
	failed := errors.Join(fmt.Errorf("failed: %v", one), fmt.Errorf("%+v", n))
	for _, value := range []any{one, &one, n, &n, []any{n}, failed} {
		for verb := byte('A'); verb <= 'z'; verb++ {
			for _, flag := range []string{"", "+", "#", "-", " ", "0", "#+ 30", ".3"} {
				check("%"+flag+string(verb), fmt.Sprintf("%"+flag+string(verb), value))
			}
		}
		check("Sprintln", fmt.Sprintln(value))
		b, err := json.Marshal(value)
		check("JSON", fmt.Sprint(string(b), err))
		b, err = json2.Marshal(value)
		check("JSON v2", fmt.Sprint(string(b), err))
		b, err = toml.Marshal(value)
		check("TOML", fmt.Sprint(string(b), err))
		b, err = xml.Marshal(value)
		check("XML", fmt.Sprint(string(b), err))
		var out bytes.Buffer
		err = gob.NewEncoder(&out).Encode(value)
		check("gob", fmt.Sprint(out.String(), err))
		for _, h := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
			slog.New(h).With("with", value).Error("m", "value", value, slog.Group("g", "v", value))
		}
		check("slog", out.String())
	}
	if got := fmt.Sprintf("%v %s %d %x %q", one, one, one, one, one); got != strings.Join([]string{secret.Text,
		secret.Text, secret.Text, secret.Text, secret.Text}, " ") {
		t.Error(got)
	}
	if b, err := json.Marshal(n); err != nil || !strings.Contains(string(b), `"Exposed":"[secret]"`) {
		t.Error(string(b), err)
	}
}

// TestSecretsAreNotCompared: == between secrets does not compile, and Equal compares the content.
func TestSecretsAreNotCompared(t *testing.T) {
	if reflect.TypeFor[secret.Bytes]().Comparable() {
		t.Error("secrets are comparable")
	}
	a, b, c := secret.New([]byte("a")), secret.New([]byte("a")), secret.New([]byte("ab"))
	if !a.Equal(b) || a.Equal(c) || a.Equal(secret.Bytes{}) || !(secret.Bytes{}).Equal(secret.Bytes{}) {
		t.Error("Equal")
	}
}

// TestWipe clears the content for each copy.
func TestWipe(t *testing.T) {
	b := []byte("1234")
	s := secret.New(b)
	copied := s
	s.Wipe()
	if !bytes.Equal(b, make([]byte, 4)) || !bytes.Equal(copied.Expose(), b) {
		t.Error(b, copied.Expose())
	}
	(secret.Bytes{}).Wipe()
}
