package scrub

import (
	"encoding/base64"
	"fmt"
	"regexp"
	"strings"
	"unicode/utf8"
)

// Known replaces known secrets, such as PINs, which have no form of their own. A text is found as
// it is, with any of its bytes escaped by percent signs (RFC 3986, as in the pin-value of a PKCS#11
// URI), in hex with or without separators, as a list of numbers, and inside base64 at any offset.
// Letters are found in both cases.
type Known struct {
	any   *regexp.Regexp // nil: no secret is known
	exact *strings.Replacer
}

// NewKnown returns a scrubber for secrets. An empty one is ignored. Each occurrence of a short
// secret is replaced too, so a PIN of one digit costs each such digit of a text.
func NewKnown(secrets ...[]byte) Known {
	var ways, parts []string
	for _, s := range secrets {
		if len(s) == 0 {
			continue
		}
		var text, digits, list strings.Builder
		for rest := s; len(rest) > 0; {
			r, size := utf8.DecodeRune(rest) // an expression matches an invalid byte as U+FFFD
			fmt.Fprintf(&text, `(?:\x{%x}|\\u%04x|%s|%s`, r, r, eachByte(`%%%02x`, rest[:size]),
				eachByte(`\\x%02x`, rest[:size]))
			if r == ' ' {
				text.WriteString(`|\+`) // application/x-www-form-urlencoded
			}
			text.WriteByte(')')
			rest = rest[size:]
		}
		for i, c := range s {
			if i > 0 {
				digits.WriteString(`[ :,-]*(?:0x)?`)
				list.WriteString(`[ ,;]+0*`)
			}
			fmt.Fprintf(&digits, `%02x`, c)
			fmt.Fprintf(&list, `%d`, c)
		}
		ways = append(ways, text.String(), digits.String(), `\b0*`+list.String()+`\b`)
		parts = append(parts, inBase64(s)...)
	}
	if len(ways) == 0 {
		return Known{}
	}
	return Known{
		any:   regexp.MustCompile(`(?i)(?:` + strings.Join(ways, "|") + `)`),
		exact: strings.NewReplacer(parts...),
	}
}

// eachByte formats each byte.
func eachByte(format string, all []byte) (text string) {
	for _, c := range all {
		text += fmt.Sprintf(format, c)
	}
	return text
}

// inBase64 returns pairs for a Replacer: the characters of base64, in both alphabets, that depend
// on a secret alone, for each of the three offsets of its first byte.
func inBase64(s []byte) (pairs []string) {
	for offset := range 3 {
		b := append(make([]byte, offset), s...)
		first, last := (offset*8+5)/6, len(b)*8/6 // characters with bits of other bytes are left out
		for _, e := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
			if part := e.EncodeToString(b)[first:last]; len(part) >= 4 { // a shorter part is in many words
				pairs = append(pairs, part, "[PIN]")
			}
		}
	}
	return pairs
}

// Text returns a text without the secrets: each is replaced by [PIN].
func (k Known) Text(text string) string {
	if k.any == nil {
		return text
	}
	return k.exact.Replace(k.any.ReplaceAllLiteralString(text, "[PIN]"))
}
