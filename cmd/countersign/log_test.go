package main

import (
	"encoding/base64"
	"encoding/hex"
	"strings"
	"testing"
)

// TestHexOf: a nonce or a digest has two forms on the command line, and one form in the log.
func TestHexOf(t *testing.T) {
	b := []byte(strings.Repeat("\xfe", 32))
	want := hex.EncodeToString(b)
	for _, text := range []string{want, strings.ToUpper(want), base64.RawURLEncoding.EncodeToString(b)} {
		if got, err := hexOf(text); got != want || err != nil {
			t.Errorf("%s: %s, %v", text, got, err)
		}
	}
	for _, text := range []string{"ab", want + "00", "payments", base64.StdEncoding.EncodeToString(b)} {
		if got, err := hexOf(text); err == nil {
			t.Errorf("%s: %s", text, got)
		}
	}
	if got, err := hexOf(""); got != "" || err != nil {
		t.Errorf("no value: %q, %v", got, err)
	}
}
