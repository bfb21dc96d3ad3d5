package main

import (
	"encoding/base32"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"countersign/internal/cli"
)

// zBase32 is z-base-32, the form of keys in Pubky's links.
var zBase32 = base32.NewEncoding("ybndrfg8ejkmcpqxot1uwisza345h769").WithPadding(base32.NoPadding)

// parse32 reads 32 bytes, such as a public key, a nonce or a SHA-256. The program writes hex, and
// reads each form in which the bytes are written somewhere: hex, base64, base64url and z-base-32.
// The lengths tell the forms apart, and each value has one text in each form.
func parse32(s string) (b [32]byte, err error) {
	var got []byte
	again := ""
	switch len(s) {
	case 64:
		got, _ = hex.DecodeString(s)
		again = s // hex has digits of either case
	case 44:
		got, _ = base64.StdEncoding.DecodeString(s)
		again = base64.StdEncoding.EncodeToString(got)
	case 43:
		form := base64.RawURLEncoding
		if strings.ContainsAny(s, "+/") {
			form = base64.RawStdEncoding
		}
		got, _ = form.DecodeString(s)
		again = form.EncodeToString(got)
	case 52:
		got, _ = zBase32.DecodeString(s)
		again = zBase32.EncodeToString(got)
	}
	if len(got) != len(b) || again != s {
		return b, fmt.Errorf("%q is not 32 bytes in hex (64 digits), base64, base64url or z-base-32", s)
	}
	return [32]byte(got), nil
}

// hexOf returns 32 bytes in hex. The text has any form of parse32, or is "".
func hexOf(text string) (string, error) {
	if text == "" {
		return "", nil
	}
	b, err := parse32(text)
	return hex.EncodeToString(b[:]), err
}

// publicKeyText returns a public key in hex. The appliance judges a text that is no key.
func publicKeyText(text string) string {
	if key, err := hexOf(text); err == nil {
		return key
	}
	return text
}

// duration is a flag with a duration in the form of cli.ParseDuration.
type duration struct{ to *time.Duration }

func (d duration) Set(s string) (err error) {
	*d.to, err = cli.ParseDuration(s)
	return err
}

func (d duration) String() string {
	if d.to == nil {
		return ""
	}
	return cli.FormatDuration(*d.to)
}

func (duration) Type() string { return "duration" }
