package scrub

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"unicode/utf8"
)

// TestKnown writes PINs in each usual way, and finds no part of a PIN afterwards.
func TestKnown(t *testing.T) {
	for _, pin := range []string{
		"1234", "00000000", "pin.*[x](y)?+%41\\", "Grün & <blau>\t\"7\"", "p@ss/word+=;:#", "raw \xff\xfe byte",
	} {
		k := NewKnown([]byte("another"), []byte(pin), nil)
		escaped := ""
		for _, c := range []byte(pin) {
			escaped += fmt.Sprintf("%%%02x", c)
		}
		inJSON, err := json.Marshal(pin)
		if err != nil {
			t.Fatal(err)
		}
		ways := []string{
			pin, strings.ToUpper(pin), url.QueryEscape(pin), url.PathEscape(pin), escaped, strings.ToUpper(escaped),
			"pkcs11:token=x?pin-value=" + escaped,
			fmt.Sprintf("%x", pin), fmt.Sprintf("%X", pin), fmt.Sprintf("% x", pin),
			fmt.Sprintf("%# x", pin), strings.ReplaceAll(fmt.Sprintf("% X", pin), " ", ":"), fmt.Sprint([]byte(pin)),
			strings.ReplaceAll(fmt.Sprint([]byte(pin)), " ", ", "), fmt.Sprintf("%03d", []byte(pin)),
		}
		if !strings.ContainsAny(pin, "\"\\\t") && utf8.ValidString(pin) { // a quoted text is the PIN itself then
			ways = append(ways, string(inJSON), fmt.Sprintf("%+q", pin))
		}
		for before := range 3 {
			text := strings.Repeat("u", before) + pin + "v"
			ways = append(ways, base64.StdEncoding.EncodeToString([]byte(text)),
				base64.URLEncoding.EncodeToString([]byte(text)))
		}
		for _, way := range ways {
			got := k.Text("before " + way + " after")
			if got == "before "+way+" after" || !strings.Contains(got, "[PIN]") || strings.Contains(got, pin) {
				t.Errorf("%q: %q stays %q", pin, way, got)
			}
		}
		if text := "C_Login: CKR_FUNCTION_FAILED, slot 7, 2026-11-29"; k.Text(text) != text {
			t.Errorf("%q: %q", pin, k.Text(text))
		}
	}
	if text := "no secret is known"; NewKnown(nil).Text(text) != text || (Known{}).Text(text) != text {
		t.Error("a text changes")
	}
}
