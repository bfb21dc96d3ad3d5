package softhsmtests

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"countersign/client"
	"countersign/internal/scantest"
)

// Outputs that may have a salt: package scantest says who may see it.
var (
	ofPeer     = regexp.MustCompile(`\bcountersign sign\b`)
	ofDecision = regexp.MustCompile(`\bcountersign (admin )?policy (explain|export|diff)\b`)
)

// checkOutput notes an output of the daemon or of the tool, and the secrets that are in files at
// this moment. The outputs are searched at the end of the test. of names the output, and has the
// command where there is one.
func (s *system) checkOutput(of, output string) {
	s.t.Helper()
	if err := scantest.SecretFiles(s.dir); err != nil {
		s.t.Error(err)
	}
	of = s.t.Name() + ": " + of
	switch {
	case ofPeer.MatchString(of):
		scantest.SawPeer(of, output)
	case ofDecision.MatchString(of):
		scantest.Saw(of, output, scantest.DecisionSalt)
	default:
		scantest.Saw(of, output)
	}
}

// checkFiles notes what the daemon and the tool have written for others: sinks, reports and
// exports, journals of key workers, and histories.
func (s *system) checkFiles() {
	s.t.Helper()
	filepath.WalkDir(s.dir, func(path string, e fs.DirEntry, err error) error {
		others := slices.Contains([]string{".csv", ".jsonl", ".md", ".journal", ".history"}, filepath.Ext(path))
		if err != nil || !e.Type().IsRegular() || !others {
			return nil
		}
		if b, err := os.ReadFile(path); err == nil {
			scantest.Saw(path, string(b))
		}
		return nil
	})
}

// searchOutputs searches all outputs since the last search, at the end of a test. The ledgers of
// the test have the salts of its decisions.
func (s *system) searchOutputs() {
	s.t.Helper()
	filepath.WalkDir(s.dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() && filepath.Ext(path) == ".db" {
			scantest.SawLedger(path)
		}
		return nil
	})
	scantest.Search(s.t)
}

// noteReceipt notes the salt of a receipt, which only the peer gets.
func noteReceipt(signed *client.Signed) {
	if signed.Receipt != nil {
		scantest.Secret(scantest.ReceiptSalt, signed.Receipt.Salt)
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
		scantest.Secret(name+" that a module says", b)
		return b
	}
	der := secret("the PEM block", 200)
	block := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	for _, line := range strings.Split(block, "\n")[1:4] {
		scantest.Secret("a line of PEM", []byte(line))
	}
	return fmt.Sprintf("hex %x.\nbase64 seed=%s\n%sbytes %v\nSHA-512 %s\nthe last line\n", secret("the hex", 32),
		base64.StdEncoding.EncodeToString(secret("the base64", 32)), block, secret("the list", 32),
		base64.RawURLEncoding.EncodeToString(secret("the long base64", 64)))
}

// TestScannerWithoutScrubbers builds daemons in which one scrubber replaces nothing, and has a
// module say secrets. The scanner then finds the secrets in the daemon's log: so the tests of this
// package fail without either scrubber. Package scrub takes its forms out one by one.
func TestScannerWithoutScrubbers(t *testing.T) {
	loud := compile(t, "loud.c", "-shared", "-fPIC")
	for file, out := range map[string]struct {
		from, to string
		finds    []string
	}{
		"scrub.go": {"if len(text) < least {", "if true {",
			[]string{"the hex ", "the base64 ", "the list ", "the long base64 "}},
		"known.go": {"if k.any == nil {", "if true {", []string{"the PIN "}},
	} {
		t.Run(file, func(t *testing.T) {
			daemonWithout(t, file, out.from, out.to)
			s := newSystem(t)
			s.edit("countersign.toml", softHSM, loud)
			s.edit("countersign.toml", "environment = { ",
				fmt.Sprintf("environment = { LOUD_PIN = \"1\", LOUD_SAYS = %q, ", makeSecrets(t)))
			p := s.serve()
			p.stop()
			s.checkOutput("the daemon's log", p.stderr.String())
			p.stderr.Reset() // the end of the test searches the log once more
			found := strings.Join(scantest.Found(), "\n")
			for _, name := range out.finds {
				if !strings.Contains(found, "the daemon's log has "+name) {
					t.Errorf("the scanner does not find %s in: %s", name, found)
				}
			}
		})
	}
}

// daemonWithout builds a daemon with one line of package scrub replaced, for the rest of the test.
func daemonWithout(t *testing.T, file, from, to string) {
	t.Helper()
	dir, with := t.TempDir(), bin
	path := must(filepath.Abs("../internal/scrub/" + file))(t)
	code := string(must(os.ReadFile(path))(t))
	if strings.Count(code, from) != 1 {
		t.Fatalf("%s does not have %q once", file, from)
	}
	replaced := filepath.Join(dir, file)
	overlay := must(json.Marshal(map[string]any{"Replace": map[string]string{path: replaced}}))(t)
	for name, content := range map[string]string{
		replaced: strings.Replace(code, from, to, 1), filepath.Join(dir, "overlay"): string(overlay),
	} {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
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
	t.Cleanup(func() { bin = with })
}
