// Package scantest searches what the project says in its tests for the secrets that the tests have
// made: lines of the log, answers, errors, events, messages to receivers, files for others. Package
// scrub knows the forms of secrets, and this package knows the secrets and no forms. Begin reading
// at Run.
//
// Invariant: a secret that a test has told by Secret is in no output that a test has told by Saw,
// in none of the usual ways to write bytes, whichever of the two came first. The names in except
// are the one exception: they are of secrets that the reader of this output may have.
package scantest

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"unicode/utf8"
)

// The names of secrets that some outputs may have.
const (
	// ReceiptSalt opens the commitment to an amount. Only the answer to the peer has the salt.
	ReceiptSalt = "the salt of a receipt"
	// DecisionSalt protects the amounts in the digest of a decision. The record of the decision has
	// the salt, beside the log, and is shown to operators that may read decisions.
	DecisionSalt = "the salt of a decision"
	// SessionToken is the token of an operator's session, or a half of it for a browser. The answer
	// to a sign-in has it.
	SessionToken = "the token of a session"
)

// leastWay is the length of the shortest way that is searched for: a shorter text is in some text
// by chance.
const leastWay = 8

// enough is the size in bytes from which outputs are searched before the end, by what is known.
const enough = 8 << 20

// scanner has the secrets of a test process, and its outputs since the last search.
type scanner struct {
	mu sync.Mutex
	on bool
	// secrets has the ways to write each secret, with the secret's name, by their first bytes. A
	// text is then searched once, however many secrets there are.
	secrets map[[leastWay]byte]map[string]string
	outputs []output
	size    int               // of the outputs
	found   map[string]string // by searches before the end: what was found where, and behind which text
}

type output struct {
	of, text string
	except   []string
}

var process scanner

// Run runs the tests of a package, and then searches what is left of the outputs. A secret that is
// found makes the status 1. Without Run, and beside benchmarks, nothing is noted and nothing is
// searched.
func Run(m *testing.M) (status int) {
	flag.Parse()
	process.mu.Lock()
	process.on = flag.Lookup("test.bench").Value.String() == ""
	process.mu.Unlock()
	status = m.Run()
	for _, found := range Found() {
		fmt.Fprintln(os.Stderr, "scantest:", found)
		status = 1
	}
	return status
}

// Secret notes a secret: its bytes, which are also its text where the secret is a text. A run of
// equal bytes is an example's key and no secret.
func Secret(name string, b []byte) { process.secret(name, b) }

// Saw notes an output of the project. of names the output. except has the names of the secrets
// that this output may have.
func Saw(of, text string, except ...string) { process.saw(of, text, except...) }

// Search fails the test for each secret in the outputs since the last search.
func Search(t testing.TB) {
	t.Helper()
	for _, found := range Found() {
		t.Error(found)
	}
}

// Found returns a text for each secret in the outputs since the last search, and forgets both.
func Found() []string { return process.search() }

func (s *scanner) noting() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.on
}

func (s *scanner) secret(name string, b []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.on || len(b) == 0 || bytes.Count(b, b[:1]) == len(b) {
		return
	}
	for _, way := range ways(b) {
		if len(way) < leastWay {
			continue
		}
		begin := [leastWay]byte([]byte(way[:leastWay]))
		if s.secrets == nil {
			s.secrets = map[[leastWay]byte]map[string]string{}
		}
		if s.secrets[begin] == nil {
			s.secrets[begin] = map[string]string{}
		}
		s.secrets[begin][way] = name
	}
}

// ways returns the usual ways to write bytes.
func ways(b []byte) []string {
	list := strings.Trim(fmt.Sprint(b), "[]")
	all := []string{
		string(b), hex.EncodeToString(b), strings.ToUpper(hex.EncodeToString(b)), fmt.Sprintf("% x", b),
		list, strings.ReplaceAll(list, " ", ", "), strings.ReplaceAll(list, " ", ","),
		strings.Trim(fmt.Sprintf("%#v", b)[len("[]byte"):], "{}"), url.QueryEscape(string(b)), percent(b),
		strings.ToUpper(percent(b)),
	}
	if quoted, err := json.Marshal(string(b)); err == nil && utf8.Valid(b) {
		all = append(all, strings.Trim(string(quoted), `"`))
	}
	// In the base64 of a longer text, the secret begins at one of three places of a group.
	for before := range 3 {
		for _, encoding := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
			text := encoding.EncodeToString(append(make([]byte, before), b...))
			text = text[(before*8+5)/6:]
			if (before+len(b))%3 != 0 && before != 0 && text != "" {
				text = text[:len(text)-1]
			}
			all = append(all, text)
		}
	}
	return all
}

// percent escapes each byte, as the pin-value of a PKCS#11 URI may have it.
func percent(b []byte) (text string) {
	for _, c := range b {
		text += fmt.Sprintf("%%%02x", c)
	}
	return text
}

func (s *scanner) saw(of, text string, except ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.on || len(text) < leastWay {
		return
	}
	s.outputs = append(s.outputs, output{of, text, except})
	if s.size += len(text); s.size >= enough {
		s.take()
	}
}

// search returns a text for each secret in the outputs since the last search.
func (s *scanner) search() (found []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.take()
	for what, behind := range s.found {
		found = append(found, fmt.Sprintf("%s behind %q", what, behind))
	}
	slices.Sort(found)
	s.found = nil
	return found
}

// take searches the outputs and forgets them. The caller holds mu.
func (s *scanner) take() {
	for _, o := range s.outputs {
		for i := 0; i+leastWay <= len(o.text); i++ {
			for way, name := range s.secrets[[leastWay]byte([]byte(o.text[i:i+leastWay]))] {
				if !strings.HasPrefix(o.text[i:], way) || slices.Contains(o.except, name) {
					continue
				}
				if s.found == nil {
					s.found = map[string]string{}
				}
				s.found[o.of+" has "+name] = o.text[max(0, i-80):i]
			}
		}
	}
	s.outputs, s.size = nil, 0
}
