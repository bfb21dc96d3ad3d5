package softhsmtests

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
)

// secrets knows every secret that the tests have made, and finds each of them in a text, in all
// usual ways to write bytes. The scanner shares nothing with the daemon's scrubber, which knows
// forms and no secrets. A secret of one test must not be in the outputs of another test either.
type secrets struct {
	mu  sync.Mutex
	all map[string]string // a way to write a secret: the secret's name
}

var made = secrets{all: map[string]string{}}

// add adds a secret: its bytes, and its text where the bytes are text.
func (s *secrets) add(name string, b []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := strings.Trim(fmt.Sprint(b), "[]")
	for _, way := range []string{
		hex.EncodeToString(b), strings.ToUpper(hex.EncodeToString(b)), base64.RawStdEncoding.EncodeToString(b),
		base64.RawURLEncoding.EncodeToString(b), list, strings.ReplaceAll(list, " ", ", "), string(b),
	} {
		if len(way) >= 8 { // a shorter text is in some text by chance
			s.all[way] = name
		}
	}
}

var secretLine = regexp.MustCompile(`(?m)^([0-9a-f]{64})$`)

// addFiles adds the secrets in the files of a folder: PINs, seeds, identities of peers, and tokens
// of sessions.
func (s *secrets) addFiles(dir string) error {
	return filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return nil // a test may remove files at the same time
		}
		name := e.Name()
		session := strings.HasSuffix(filepath.Dir(path), ".run") || strings.Contains(path, ".run/")
		if !strings.HasSuffix(name, "pin") && !strings.HasSuffix(name, ".key") && name != "seed" && !session {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return nil
		}
		switch {
		case session:
			for _, token := range regexp.MustCompile(`[A-Za-z0-9_-]{43}`).FindAll(b, -1) {
				s.add("a session of "+path, token)
			}
		case strings.HasSuffix(name, ".key"):
			for _, found := range secretLine.FindAllSubmatch(b, -1) {
				private, err := hex.DecodeString(string(found[1]))
				if err != nil {
					return err
				}
				s.add("the identity "+path, private)
			}
		case name == "seed" && len(b) == 32:
			s.add("the seed "+path, b)
		default:
			s.add("the PIN "+path, bytes.TrimSpace(b))
		}
		return nil
	})
}

// check fails the test for each secret in a text. of names the text.
func (s *secrets) check(t testing.TB, of, text string) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for way, name := range s.all {
		if strings.Contains(text, way) {
			t.Errorf("%s has %s", of, name)
		}
	}
}

// checkOutput fails the test if an output of the daemon or of the tool has a secret.
func (s *system) checkOutput(of, output string) {
	s.t.Helper()
	if err := made.addFiles(s.dir); err != nil {
		s.t.Error(err)
	}
	made.check(s.t, of, output)
}

// TestScannerFindsSecrets writes secrets of each kind in each way, and has each found.
func TestScannerFindsSecrets(t *testing.T) {
	dir := t.TempDir()
	private := bytes.Repeat([]byte{1, 0xfa}, 16)
	token := strings.Repeat("tokeN", 8) + "abc"
	if err := os.Mkdir(filepath.Join(dir, "ann.run"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"pin": "a-pin-of-the-scanner\n", "shop.key": fmt.Sprintf("# public key: %x\n%x\n", make([]byte, 32), private),
		"seed": strings.Repeat("s", 32), "ann.run/session": `{"token":"` + token + `"}`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s := secrets{all: map[string]string{}}
	if err := s.addFiles(dir); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{
		"a-pin-of-the-scanner", fmt.Sprintf("%x", private), fmt.Sprintf("%X", private), fmt.Sprint(private),
		base64.StdEncoding.EncodeToString(private), base64.RawURLEncoding.EncodeToString(private),
		strings.Repeat("s", 32), token,
	} {
		found := new(recorder)
		s.check(found, "a text", "before"+text+"after")
		if found.errors == 0 {
			t.Errorf("%s was not found", text)
		}
	}
	found := new(recorder)
	if s.check(found, "a text", fmt.Sprintf("the public key %x", make([]byte, 32))); found.errors > 0 {
		t.Error("the public key of an identity is a secret")
	}
}

// TestModuleSaysSecrets has a module print secrets of each form on its stderr. The daemon's log has
// the lines in each format, with the form in place of the secret.
func TestModuleSaysSecrets(t *testing.T) {
	loud := compile(t, "loud.c", "-shared", "-fPIC")
	secret := func(name string, length int) []byte {
		b := make([]byte, length)
		rand.Read(b)
		made.add(name+" that a module says", b)
		return b
	}
	der := secret("the PEM block", 200)
	block := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	for _, line := range strings.Split(block, "\n")[1:4] {
		made.add("a line of PEM", []byte(line))
	}
	says := fmt.Sprintf("hex %x.\nbase64 seed=%s\n%sbytes %v\nSHA-512 %s\nthe last line\n", secret("the hex", 32),
		base64.StdEncoding.EncodeToString(secret("the base64", 32)), block, secret("the list", 32),
		base64.RawURLEncoding.EncodeToString(secret("the long base64", 64)))
	for _, format := range []string{"text", "json"} {
		t.Run(format, func(t *testing.T) {
			s := newSystem(t)
			s.edit("countersign.toml", softHSM, loud)
			s.edit("countersign.toml", "environment = { ", fmt.Sprintf("environment = { LOUD_SAYS = %q, ", says))
			s.edit("countersign.toml", "log_level =", fmt.Sprintf("log_format = %q\nlog_level =", format))
			p := s.serve()
			p.stop()
			log := p.stderr.String()
			for _, want := range []string{
				"hex [64 hex digits].", "base64 seed=[32 bytes]", "[PEM]", "bytes [[32 bytes]]", "SHA-512 [64 bytes]",
				"the last line",
			} {
				if !strings.Contains(log, want) {
					t.Errorf("the log does not have %q", want)
				}
			}
			if json.Valid([]byte(strings.SplitN(log, "\n", 2)[0])) != (format == "json") {
				t.Errorf("the first line is not %s: %.200s", format, log)
			}
		})
	}
}

// recorder counts the errors of a test.
type recorder struct {
	testing.TB
	errors int
}

func (r *recorder) Helper()               {}
func (r *recorder) Errorf(string, ...any) { r.errors++ }
