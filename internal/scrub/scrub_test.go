package scrub

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
)

// written are ways to write new secrets, by the name of the form that recognizes the secret. The
// scrubber's own expressions are not used: each way has the text that must not be found afterwards.
var written = map[string][]func(t *testing.T) (text, secret string){
	"pem": {func(t *testing.T) (string, string) {
		der, err := x509.MarshalPKCS8PrivateKey(newKey(t))
		if err != nil {
			t.Fatal(err)
		}
		b := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
		return b, strings.Split(b, "\n")[1]
	}, func(t *testing.T) (string, string) { // quoted, without its end
		b := string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: random32()}))
		return fmt.Sprintf("%q", b)[:80], strings.Split(b, "\n")[1][:40]
	}},
	"age": {func(*testing.T) (string, string) {
		secret := "AGE-SECRET-KEY-1QQPZRY9X8GF2TVDW0S3JN54KHCE6MUA7LQQPZRY9X8GF2TVDW0S3JN54KHC"
		return secret, secret[20:]
	}, func(*testing.T) (string, string) {
		secret := "AGE-PLUGIN-YUBIKEY-1QQPZRY9X8GF2TVDW0S3"
		return "identity " + secret, secret[19:]
	}},
	"ssh": {func(t *testing.T) (string, string) {
		block, err := ssh.MarshalPrivateKey(newKey(t), "")
		if err != nil {
			t.Fatal(err)
		}
		b := base64.StdEncoding.EncodeToString(block.Bytes)
		return b, b[len(b)/2 : len(b)/2+40]
	}},
	"bytes": {func(*testing.T) (string, string) {
		text := fmt.Sprint(random32())
		return text, text[5 : len(text)-5]
	}, func(*testing.T) (string, string) {
		text := fmt.Sprintf("%#v", random32())
		return text, text[20:60]
	}},
	"separated hex": {func(*testing.T) (string, string) {
		text := fmt.Sprintf("% x", random32())
		return text, text[10:60]
	}},
	"hex": {func(*testing.T) (string, string) {
		text := hex.EncodeToString(random32())
		return text, text[10:40]
	}, func(*testing.T) (string, string) {
		text := fmt.Sprintf("%X", append(random32(), random32()...))
		return "key=" + text + ".", text[10:40]
	}},
	"base64": {
		in64(base64.StdEncoding, 32, ""), in64(base64.RawStdEncoding, 32, "keypair-seed:"),
		in64(base64.URLEncoding, 32, "seed="), in64(base64.RawURLEncoding, 32, "/run/countersign/"),
		in64(base64.StdEncoding, 64, "key "), in64(base64.RawURLEncoding, 64, "key_"),
	},
}

func in64(e *base64.Encoding, length int, before string) func(*testing.T) (string, string) {
	return func(*testing.T) (string, string) {
		b := random32()
		if length == 64 {
			b = append(b, random32()...)
		}
		text := e.EncodeToString(b)
		return before + text, text[8:36]
	}
}

func random32() []byte {
	b := make([]byte, 32)
	rand.Read(b)
	return b
}

func newKey(t *testing.T) ed25519.PrivateKey {
	_, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return private
}

// late is a value that has its text only when a handler asks.
type late string

func (l late) LogValue() slog.Value { return slog.GroupValue(slog.String("late", string(l))) }

// places are all places of a line where a text can stand.
var places = map[string]func(log *slog.Logger, text string){
	"message":      func(log *slog.Logger, text string) { log.Info(text) },
	"value":        func(log *slog.Logger, text string) { log.Info("m", "v", text) },
	"name":         func(log *slog.Logger, text string) { log.Info("m", text, 1) },
	"error":        func(log *slog.Logger, text string) { log.Info("m", "err", errors.New(text)) },
	"nested error": func(log *slog.Logger, text string) { log.Info("m", "err", nested(text)) },
	"joined errors": func(log *slog.Logger, text string) {
		log.Info("m", "err", errors.Join(nested(text), nested(text)))
	},
	"group":     func(log *slog.Logger, text string) { log.Info("m", slog.Group("g", slog.Group("h", "v", text))) },
	"LogValuer": func(log *slog.Logger, text string) { log.Info("m", "v", late(text)) },
	"With":      func(log *slog.Logger, text string) { log.With("v", text).Info("m") },
	"WithGroup": func(log *slog.Logger, text string) { log.WithGroup(text).Info("m", "n", 1) },
	"struct":    func(log *slog.Logger, text string) { log.Info("m", "v", struct{ Text string }{text}) },
	"slice":     func(log *slog.Logger, text string) { log.Info("m", "v", []string{text, "b"}) },
	"map":       func(log *slog.Logger, text string) { log.Info("m", "v", map[string]any{"k": text}) },
}

func nested(text string) error {
	return fmt.Errorf("a: %w", fmt.Errorf("b %s c: %w", text, errors.ErrUnsupported))
}

// TestEachFormInEachPlace writes each form of a new secret into each place of a line, in each
// format, and finds nothing of the secret.
func TestEachFormInEachPlace(t *testing.T) {
	for name, ways := range written {
		for at, put := range places {
			for i, way := range ways {
				if line, secret := lineOf(t, way, put); strings.Contains(line, secret) {
					t.Errorf("form %s, way %d, as %s: %s is in the line\n%s", name, i, at, secret, line)
				}
			}
		}
	}
}

func lineOf(
	t *testing.T, way func(*testing.T) (text, secret string), put func(*slog.Logger, string),
) (line, secret string) {
	var out bytes.Buffer
	text, secret := way(t)
	s := new(Scrubber)
	for _, to := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
		put(slog.New(s.Handler(to)), "before "+text+" after")
	}
	return out.String(), secret
}

// TestNoFormIsSpare takes out one form after the other, and sees that secrets of this form then
// stand in the line: so TestEachFormInEachPlace fails without the form. Another form can fit a
// secret by chance, so each way has a hundred secrets.
func TestNoFormIsSpare(t *testing.T) {
	all := forms
	defer func() { forms = all }()
	for i, f := range all {
		if len(written[f.name]) == 0 {
			t.Errorf("form %s: no secret is written in this form", f.name)
		}
		forms = slices.Delete(slices.Clone(all), i, i+1)
		if !slices.ContainsFunc(written[f.name], func(way func(*testing.T) (string, string)) bool {
			for range 100 {
				if line, secret := lineOf(t, way, places["value"]); strings.Contains(line, secret) {
					return true
				}
			}
			return false
		}) {
			t.Errorf("form %s: without it, its secrets are replaced too", f.name)
		}
	}
}

// TestReadable sees that what operators need stays as it is.
func TestReadable(t *testing.T) {
	s := new(Scrubber)
	for _, text := range []string{
		"/var/lib/countersign/keys/tpm/StateOfTheMachine/2026-11-29/sealed",
		"SHA256:n4bQgYhMfWWaL+qgxVrQFaO/TxsrC4Is0V1sFbDwCgg",
		"the-signature-of-a-version-that-was-compromised-is-not-believed",
		"k4wq2vz5n3xa7bcd.2", "2026-11-29T15:04:05.000Z", "[2001:db8:0:1:2:3:4:5]:7700",
		"SignatureRejectedSignatureRejectedSignatureRejected", strings.Repeat("x", 200), strings.Repeat("1", 63),
	} {
		if got := s.Text(text); got != text {
			t.Errorf("%s became %s", text, got)
		}
	}
}

// TestEnrolledKeysStayReadable sees the fingerprint of a public key of the ledger, in hex and in
// base64, and no other key.
func TestEnrolledKeysStayReadable(t *testing.T) {
	s, key, other := new(Scrubber), random32(), random32()
	record := fmt.Sprintf(`{"keys":[{"public_key":"%x","added":1}],"next":"%x"}`, key, other)
	if err := s.Take("shop", []byte(record)); err != nil {
		t.Fatal(err)
	}
	if err := s.Take("shop", nil); err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("%x %s %x", key, base64.RawURLEncoding.EncodeToString(key), other)
	want := fmt.Sprintf("%.16x… %.16x… [64 hex digits]", key[:8], key[:8])
	if got := s.Text(text); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// TestCutSecret has a secret at each end of the bounds of a value: no part of the secret stays.
func TestCutSecret(t *testing.T) {
	s, secret := new(Scrubber), hex.EncodeToString(random32())
	for _, bound := range []int{maxText, maxSearched} {
		for before := bound - 70; before < bound+5; before++ {
			text := s.Bounded(strings.Repeat("word ", before/5) + secret + " and more " + strings.Repeat("y ", bound))
			for i := range len(secret) - 16 {
				if strings.Contains(text, secret[i:i+16]) {
					t.Fatalf("%d bytes before: %s", before, text[max(0, len(text)-100):])
				}
			}
		}
	}
	// PEM becomes shorter, so that the text after the bound of the search would come into the line.
	long := "-----BEGIN X-----" + strings.Repeat("A", maxSearched-40) + "-----END X-----"
	if text := s.Bounded(long + secret + " " + secret); strings.Contains(text, secret[:8]) {
		t.Error(text)
	}
}

// panicking is an error that has no text as a nil pointer.
type panicking struct{ text string }

func (p *panicking) Error() string { return p.text }

// TestValuesWithoutText writes a value whose method panics.
func TestValuesWithoutText(t *testing.T) {
	var out bytes.Buffer
	slog.New(new(Scrubber).Handler(slog.NewJSONHandler(&out, nil))).Info("m", "err", (*panicking)(nil), "b", random32(),
		"nil", nil)
	if text := out.String(); !strings.Contains(text, "which has no text") || !strings.Contains(text, `"b":"32 bytes"`) {
		t.Error(text)
	}
}
