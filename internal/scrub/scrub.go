// Package scrub replaces secrets in texts, before the texts leave the process in a line of the log.
// A secret is recognized by its form, since a text of a module or of a library can quote anything.
// Begin reading at Text and forms; Handler is the scrubber in front of a slog.Handler.
package scrub

import (
	"encoding/base64"
	"encoding/hex"
	"regexp"
	"strings"
	"sync"
)

// Scrubber replaces secrets in texts. The zero Scrubber knows no public keys. A Scrubber is safe
// for concurrent use.
type Scrubber struct {
	public sync.Map // [32]byte: the keys that stay readable
}

// least is the length of the shortest secret that has a form: 32 bytes in base64 without padding.
const least = 43

// form is a way to write a secret. find returns the text with each secret of the form replaced.
type form struct {
	name string
	find func(s *Scrubber, text string) string
}

// forms are the forms of secrets, in the order of the search: a PEM block has lines of base64.
var forms = []form{
	{"pem", pattern(`(?s)-----BEGIN [A-Z0-9 ]+-----.*?(?:-----END [A-Z0-9 ]+-----|$)`, "[PEM]")},
	{"age", pattern(`(?i)AGE-(?:SECRET-KEY|PLUGIN-[A-Z0-9+._-]+)-1[A-Z0-9]+`, "[age key]")},
	// The body of an OpenSSH private key begins with openssh-key-v1.
	{"ssh", pattern(`b3BlbnNzaC1rZXktdjE[A-Za-z0-9+/=\s]*`, "[SSH key]")},
	{"bytes", pattern(`(?:(?:0x[0-9a-fA-F]{1,2}|[0-9]{1,3})[ ,]+){31,}(?:0x[0-9a-fA-F]{1,2}|[0-9]{1,3})`,
		"[32 bytes]")},
	{"separated hex", pattern(`(?:[0-9a-fA-F]{2}[ :]){31,}[0-9a-fA-F]{2}`, "[64 hex digits]")},
	{"hex", replaceHex},
	{"base64", replaceBase64},
}

// pattern replaces each match of an expression.
func pattern(expression, by string) func(*Scrubber, string) string {
	e := regexp.MustCompile(expression)
	return func(_ *Scrubber, text string) string { return e.ReplaceAllLiteralString(text, by) }
}

// Text returns a text without secrets. A secret becomes its form in brackets, for example
// [64 hex digits], and an enrolled public key becomes its fingerprint: see Short.
func (s *Scrubber) Text(text string) string {
	if len(text) < least {
		return text
	}
	for _, f := range forms {
		text = f.find(s, text)
	}
	return text
}

// Publish has a public key stay readable by its fingerprint.
func (s *Scrubber) Publish(key [32]byte) { s.public.Store(key, true) }

var publicKey = regexp.MustCompile(`"public_key":"([0-9a-f]{64})"`)

// Take publishes the public keys in a record of the ledger's tables of peers and keys. Take is a
// function for ledger.Followed.
func (s *Scrubber) Take(_ string, record []byte) error {
	for _, found := range publicKey.FindAllSubmatch(record, -1) {
		if key, err := hex.DecodeString(string(found[1])); err == nil {
			s.Publish([32]byte(key))
		}
	}
	return nil
}

// Short returns the fingerprint of a public key: the first 16 of its hex digits. Listings of keys
// begin with the same digits.
func Short(key []byte) string { return hex.EncodeToString(key[:min(len(key), 8)]) + "…" }

// shorten returns the fingerprint of an enrolled public key, or otherwise a text in place of the
// bytes.
func (s *Scrubber) shorten(b []byte, otherwise string) string {
	if len(b) == 32 {
		if _, public := s.public.Load([32]byte(b)); public {
			return Short(b)
		}
	}
	return otherwise
}

var hexRun = regexp.MustCompile(`[0-9a-fA-F]{64,}`)

func replaceHex(s *Scrubber, text string) string {
	return hexRun.ReplaceAllStringFunc(text, func(run string) string {
		b, _ := hex.DecodeString(run) // a run of odd length is no public key
		return s.shorten(b, "[64 hex digits]")
	})
}

var base64Run = regexp.MustCompile(`[A-Za-z0-9+/_-]{43,}={0,2}`)

// replaceBase64 replaces 32 and 64 bytes of base64, in both alphabets, with and without padding.
// The characters of the alphabets separate words too, as in a path. Each part of a run that begins
// and ends at such a character or at an end of the run may therefore be the secret.
func replaceBase64(s *Scrubber, text string) string {
	var out strings.Builder
	end := 0 // of what has been copied
	for _, at := range base64Run.FindAllStringIndex(text, -1) {
		if strings.HasSuffix(text[:at[0]], "SHA256:") { // the fingerprint of an SSH public key
			continue
		}
		run := strings.TrimRight(text[at[0]:at[1]], "=")
		for from := 0; from+least <= len(run); from++ {
			if from > 0 && !strings.ContainsRune("+/_-", rune(run[from-1])) {
				continue
			}
			for _, length := range []int{86, 43} {
				to := from + length
				if to > len(run) || to < len(run) && !strings.ContainsRune("+/_-", rune(run[to])) ||
					!random(run[from:to]) {
					continue
				}
				b, _ := base64.RawURLEncoding.DecodeString(urlAlphabet.Replace(run[from:to]))
				out.WriteString(text[end : at[0]+from])
				out.WriteString(s.shorten(b, map[int]string{86: "[64 bytes]", 43: "[32 bytes]"}[length]))
				end = at[0] + to
				if to == len(run) {
					end = at[1] // with the padding
				}
				from = to - 1
				break
			}
		}
	}
	out.WriteString(text[end:])
	return out.String()
}

var urlAlphabet = strings.NewReplacer("+", "-", "/", "_")

// random reports whether a text can be base64 of random bytes: neither a path nor words with
// hyphens. Of 43 random characters, fewer than 8 times one and the next are of different classes in
// one of more than a million texts.
func random(text string) bool {
	class := func(c byte) int {
		switch {
		case c >= 'a' && c <= 'z':
			return 1
		case c >= 'A' && c <= 'Z':
			return 2
		case c >= '0' && c <= '9':
			return 3
		}
		return 0
	}
	changes := 0
	for i := 1; i < len(text); i++ {
		if is, was := class(text[i]), class(text[i-1]); is != was && is != 0 && was != 0 {
			changes++
		}
	}
	return changes >= 8 && strings.ContainsFunc(text, func(r rune) bool { return r >= 'A' && r <= 'Z' })
}
