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
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
)

// secrets knows every secret that the tests have made, and finds each of them in a text, in all
// usual ways to write bytes. The scanner shares nothing with the daemon's scrubber, which knows
// forms and no secrets. A secret of one test must not be in the outputs of another test either.
type secrets struct {
	mu sync.Mutex
	// all has the ways to write each secret, with the secret's name, by their first bytes. A text
	// is then searched once, however many secrets there are.
	all map[[leastWay]byte]map[string]string
}

// leastWay is the length of the shortest way that is searched for: a shorter text is in some text
// by chance.
const leastWay = 8

var made = secrets{all: map[[leastWay]byte]map[string]string{}}

// add adds a secret: its bytes, and its text where the bytes are text.
func (s *secrets) add(name string, b []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := strings.Trim(fmt.Sprint(b), "[]")
	for _, way := range []string{
		hex.EncodeToString(b), strings.ToUpper(hex.EncodeToString(b)), base64.RawStdEncoding.EncodeToString(b),
		base64.RawURLEncoding.EncodeToString(b), list, strings.ReplaceAll(list, " ", ", "), string(b),
		url.QueryEscape(string(b)), percent(b), strings.ToUpper(percent(b)), fmt.Sprintf("% x", b),
	} {
		if len(way) < leastWay {
			continue
		}
		begin := [leastWay]byte([]byte(way[:leastWay]))
		if s.all[begin] == nil {
			s.all[begin] = map[string]string{}
		}
		s.all[begin][way] = name
	}
}

// percent escapes each byte, as the pin-value of a PKCS#11 URI may have it.
func percent(b []byte) (text string) {
	for _, c := range b {
		text += fmt.Sprintf("%%%02x", c)
	}
	return text
}

// ofSession matches the files in a person's XDG_RUNTIME_DIR, such as ann.run. The folder .run is of
// make run, and has everything.
var ofSession = regexp.MustCompile(`[^/]\.run/`)

var secretLine = regexp.MustCompile(`(?m)^([0-9a-f]{64})$`)

// addFiles adds the secrets in the files of a folder: PINs, seeds, identities of peers, and tokens
// of sessions.
func (s *secrets) addFiles(dir string) error {
	return filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return nil // a test may remove files at the same time
		}
		name := e.Name()
		session := ofSession.MatchString(path)
		if !strings.HasSuffix(name, "pin") && !strings.HasSuffix(name, ".key") && name != "seed" && name != "headers" &&
			!session {
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
		case name == "headers":
			_, value, _ := bytes.Cut(bytes.TrimSpace(b), []byte("Bearer "))
			s.add("the token for a collector", value)
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
	found := map[string]bool{}
	for i := 0; i+leastWay <= len(text); i++ {
		for way, name := range s.all[[leastWay]byte([]byte(text[i:i+leastWay]))] {
			if !found[name] && strings.HasPrefix(text[i:], way) {
				found[name] = true
				t.Errorf("%s has %s", of, name)
			}
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

// checkFiles searches what the daemon and the tool have written for others: sinks, reports and
// exports.
func (s *system) checkFiles() {
	s.t.Helper()
	filepath.WalkDir(s.dir, func(path string, e fs.DirEntry, err error) error {
		others := slices.Contains([]string{".csv", ".jsonl", ".md"}, filepath.Ext(path))
		if err != nil || !e.Type().IsRegular() || !others {
			return nil
		}
		if b, err := os.ReadFile(path); err == nil {
			made.check(s.t, path, string(b))
		}
		return nil
	})
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
	s := secrets{all: map[[leastWay]byte]map[string]string{}}
	if err := s.addFiles(dir); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{
		"a-pin-of-the-scanner", fmt.Sprintf("%x", private), fmt.Sprintf("%X", private), fmt.Sprint(private),
		base64.StdEncoding.EncodeToString(private), base64.RawURLEncoding.EncodeToString(private),
		strings.Repeat("s", 32), token, fmt.Sprintf("% x", private), percent([]byte("a-pin-of-the-scanner")),
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

// TestModuleSaysItsPIN has a module print its PIN on stderr at each login, in each form, and split
// over two writes. The daemon's log has the lines without the PIN.
func TestModuleSaysItsPIN(t *testing.T) {
	s := newSystem(t)
	s.edit("countersign.toml", softHSM, compile(t, "loud.c", "-shared", "-fPIC"))
	s.edit("countersign.toml", "environment = { ", `environment = { LOUD_PIN = "1", `)
	p := s.serve()
	p.stop()
	for _, want := range []string{
		"C_Login pin=[PIN]", "hex [PIN]", "percent [PIN]", "base64 [PIN]", "the last line of a login",
		"the module prints on stdout",
	} {
		if !strings.Contains(p.stderr.String(), want) {
			t.Errorf("the log does not have %q", want)
		}
	}
}

// TestModuleSaysSecrets has a module print secrets of each form on its stderr. The daemon's log has
// the lines in each format, with the form in place of the secret.
func TestModuleSaysSecrets(t *testing.T) {
	loud, says := compile(t, "loud.c", "-shared", "-fPIC"), makeSecrets(t)
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

// makeSecrets returns lines with new secrets, one of each form.
func makeSecrets(t *testing.T) (says string) {
	t.Helper()
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
	return fmt.Sprintf("hex %x.\nbase64 seed=%s\n%sbytes %v\nSHA-512 %s\nthe last line\n", secret("the hex", 32),
		base64.StdEncoding.EncodeToString(secret("the base64", 32)), block, secret("the list", 32),
		base64.RawURLEncoding.EncodeToString(secret("the long base64", 64)))
}

// TestScannerWithoutScrubbers builds a daemon whose scrubbers replace nothing, and has a module say
// secrets. The scanner then finds each secret in the daemon's log: so the tests of this package
// fail without a scrubber. Package scrub takes its forms out one by one.
func TestScannerWithoutScrubbers(t *testing.T) {
	dir, with := t.TempDir(), bin
	replaced := map[string]string{}
	for name, edit := range map[string][2]string{
		"scrub.go": {"if len(text) < least {", "if true {"}, "known.go": {"if k.any == nil {", "if true {"},
	} {
		path := must(filepath.Abs("../internal/scrub/" + name))(t)
		code := string(must(os.ReadFile(path))(t))
		if strings.Count(code, edit[0]) != 1 {
			t.Fatalf("%s does not have %q once", name, edit[0])
		}
		replaced[path] = filepath.Join(dir, name)
		if err := os.WriteFile(replaced[path], []byte(strings.Replace(code, edit[0], edit[1], 1)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	overlay := must(json.Marshal(map[string]any{"Replace": replaced}))(t)
	if err := os.WriteFile(filepath.Join(dir, "overlay"), overlay, 0o600); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-overlay", filepath.Join(dir, "overlay"),
		"-o", filepath.Join(dir, "countersignd"), "../cmd/countersignd")
	build.Env = append(os.Environ(), "CGO_ENABLED=1", "GOEXPERIMENT=runtimesecret")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := os.Symlink(filepath.Join(with, "countersign"), filepath.Join(dir, "countersign")); err != nil {
		t.Fatal(err)
	}
	bin = dir
	defer func() { bin = with }()
	found := &recorder{TB: t}
	s := newSystem(found)
	s.edit("countersign.toml", softHSM, compile(t, "loud.c", "-shared", "-fPIC"))
	s.edit("countersign.toml", "environment = { ",
		fmt.Sprintf("environment = { LOUD_PIN = \"1\", LOUD_SAYS = %q, ", makeSecrets(t)))
	p := s.serve()
	p.stop()
	s.checkOutput("the daemon's log", p.stderr.String())
	for _, name := range []string{"the hex ", "the base64 ", "the list ", "the long base64 ", "the PIN "} {
		if !strings.Contains(found.texts.String(), "the daemon's log has "+name) {
			t.Errorf("the scanner does not find %s", name)
		}
	}
}

// recorder counts the errors of a test.
type recorder struct {
	testing.TB
	errors int
	texts  strings.Builder
}

func (r *recorder) Helper() {}
func (r *recorder) Errorf(format string, args ...any) {
	r.errors++
	fmt.Fprintf(&r.texts, format+"\n", args...)
}
