package scantest

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
)

// Log returns a logger whose lines, of all levels, are noted.
func Log() *slog.Logger {
	if !process.noting() {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(Tee("the log", io.Discard), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// Tee returns a writer that notes each text that is written to another one.
func Tee(of string, to io.Writer) io.Writer { return tee{of, to} }

type tee struct {
	of string
	to io.Writer
}

func (t tee) Write(b []byte) (int, error) {
	Saw(t.of, string(b))
	return t.to.Write(b)
}

// Buffer is what a process or a daemon writes. A test may read it meanwhile.
type Buffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *Buffer) Write(text []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(text)
}

func (b *Buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// Reset forgets the text.
func (b *Buffer) Reset() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.text.Reset()
}

// salts are the salt of a receipt in JSON and as the tool prints it, and the salt of a decision.
var salts = regexp.MustCompile(`"salt": ?"([A-Za-z0-9_-]{22})"|\bsalt ([0-9a-f]{32})\b`)
var decisionSalt = regexp.MustCompile(`"salt":"([0-9a-f]{32})"`)

// SawPeer notes what a peer alone gets, as the program's answer or as the tool's output. A salt of
// a receipt in it is a secret for all other outputs.
func SawPeer(of, text string) {
	for _, found := range salts.FindAllStringSubmatch(text, -1) {
		salt, err := base64.RawURLEncoding.DecodeString(found[1])
		if found[2] != "" {
			salt, err = hex.DecodeString(found[2])
		}
		if err == nil {
			Secret(ReceiptSalt, salt)
		}
	}
	Saw(of, text, ReceiptSalt)
}

// SawLedger notes the file of a ledger, with everything that the ledger has ever written there, and
// the salts of decisions in it as secrets for all other outputs.
func SawLedger(path string) {
	if !process.noting() {
		return
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return // a test may have removed the file
	}
	for _, found := range decisionSalt.FindAllSubmatch(b, -1) {
		if salt, err := hex.DecodeString(string(found[1])); err == nil {
			Secret(DecisionSalt, salt)
		}
	}
	Saw("the ledger", string(b), DecisionSalt)
}

// Answers notes each answer of an HTTP server of the admin API. The tokens and cookies of sign-ins
// are secrets for all other answers.
func Answers(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a := &answer{ResponseWriter: w}
		defer func() {
			var header strings.Builder
			w.Header().Write(&header)
			text := header.String() + "\n" + a.body.String()
			of := "the answer to " + r.Method + " " + r.URL.Path
			switch {
			case r.Method == http.MethodPost && r.URL.Path == "/v1/sessions":
				for _, found := range token.FindAllStringSubmatch(text, -1) {
					Secret(SessionToken, []byte(found[1]))
				}
				Saw(of, text, SessionToken)
			case strings.HasPrefix(r.URL.Path, "/v1/decisions"):
				Saw(of, text, DecisionSalt)
			default:
				Saw(of, text)
			}
		}()
		next.ServeHTTP(a, r)
	})
}

// token finds the token of a session in the body of a sign-in's answer, and a browser's half of it
// in the body and in the cookie.
var token = regexp.MustCompile(`(?:"(?:token|page)": ?"|Set-Cookie: [A-Za-z_-]+=)([A-Za-z0-9_-]{43})`)

type answer struct {
	http.ResponseWriter
	body bytes.Buffer
}

func (a *answer) Write(b []byte) (int, error) {
	a.body.Write(b)
	return a.ResponseWriter.Write(b)
}

// Unwrap lets an http.ResponseController flush a stream.
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// Secrets in files.
var (
	// ofSession matches the files in a person's XDG_RUNTIME_DIR, such as ann.run. The folder .run
	// is of make run, and has everything.
	ofSession  = regexp.MustCompile(`[^/]\.run/`)
	secretLine = regexp.MustCompile(`(?m)^([0-9a-f]{64})$`)
	bearer     = regexp.MustCompile(`[A-Za-z0-9_-]{43}`)
	address    = regexp.MustCompile(`(?m)(?:url|endpoint) *= *"([^"]+)"`)
)

// SecretFiles notes the secrets in the files of a folder: PINs, passwords, seeds, identities of
// peers, tokens of sessions and of a collector, and the secrets in URLs of a configuration.
func SecretFiles(dir string) error {
	return filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return nil // a test may remove files at the same time
		}
		name := e.Name()
		learn := secretsOf(name)
		if ofSession.MatchString(path) {
			learn = sessions
		}
		if learn == nil {
			return nil
		}
		if b, err := os.ReadFile(path); err == nil {
			learn(path, b)
		}
		return nil
	})
}

// secretsOf returns the function that notes the secrets in a file of a name, or nil.
func secretsOf(name string) func(path string, b []byte) {
	line := func(what string) func(string, []byte) {
		return func(path string, b []byte) { Secret(what+path, bytes.TrimSpace(b)) }
	}
	switch {
	case strings.HasSuffix(name, "pin"):
		return line("the PIN ")
	case strings.HasSuffix(name, "password"):
		return line("the password ")
	case strings.HasSuffix(name, ".key"):
		return identities
	case name == "seed":
		return seeds
	case name == "headers":
		return headers
	case strings.HasSuffix(name, ".toml"):
		return addresses
	}
	return nil
}

func sessions(path string, b []byte) {
	for _, token := range bearer.FindAll(b, -1) {
		Secret("a session of "+path, token)
	}
}

func identities(path string, b []byte) {
	for _, found := range secretLine.FindAllSubmatch(b, -1) {
		if private, err := hex.DecodeString(string(found[1])); err == nil {
			Secret("the identity "+path, private)
		}
	}
}

// seeds notes a seed of 32 bytes, which may be in hex.
func seeds(path string, b []byte) {
	if len(b) != 32 {
		b, _ = hex.DecodeString(string(bytes.TrimSpace(b)))
	}
	Secret("the seed "+path, b)
}

func headers(path string, b []byte) {
	for line := range strings.Lines(string(b)) {
		_, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(strings.TrimSpace(value), "Bearer ")
		Secret("a header of "+path, []byte(value))
	}
}

// addresses notes the values of the parameters of URLs, since receivers put their secrets there.
func addresses(path string, b []byte) {
	for _, found := range address.FindAllSubmatch(b, -1) {
		u, err := url.Parse(string(found[1]))
		if err != nil {
			continue
		}
		for _, values := range u.Query() {
			for _, value := range values {
				Secret("the secret in a URL of "+path, []byte(value))
			}
		}
	}
}
