package client_test

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"countersign/client"
	"countersign/client/clienttest"
	"countersign/noise"
	"countersign/wire"
)

func start(t *testing.T) *testAppliance {
	t.Helper()
	a, err := startAppliance()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.close)
	return a
}

func dial(t *testing.T, c client.Config) *client.Client {
	t.Helper()
	cl, err := client.Dial(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cl.Close() })
	return cl
}

func message(text string) client.Document {
	return client.Document{Type: "message-v1", Payload: fmt.Appendf(nil, `{"context":"test","message":%q}`, text)}
}

func TestManyCallersShareAConnection(t *testing.T) {
	a := start(t)
	c := dial(t, a.config())
	var wg sync.WaitGroup
	var mu sync.Mutex
	seen := map[string]bool{}
	for i := range 64 {
		wg.Go(func() {
			s, err := c.Sign(t.Context(), "payments", message(fmt.Sprintf("AA%02d", i)))
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := c.Verify(t.Context(), "", s); err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			if seen[string(s.Signature)] {
				t.Error("one signature for two documents")
			}
			seen[string(s.Signature)] = true
		})
	}
	wg.Wait()
	if at, err := c.Ping(t.Context()); err != nil || time.Since(at).Abs() > time.Minute {
		t.Errorf("ping: %v, %v", at, err)
	}
}

func TestRepeatedSign(t *testing.T) {
	a := start(t)
	c := dial(t, a.config())
	d := message("AAAA")
	d.Nonce, d.Timestamp, d.ExpiresAt = [32]byte{1}, time.Now().Unix(), time.Now().Unix()+60
	first, err := c.Sign(t.Context(), "payments", d)
	if err != nil {
		t.Fatal(err)
	}
	again, err := c.Sign(t.Context(), "payments", d)
	if err != nil || !again.Repeated || string(again.Signature) != string(first.Signature) || first.Repeated {
		t.Errorf("%+v, %v", again, err)
	}
}

func TestReconnects(t *testing.T) {
	a := start(t)
	config := a.config()
	config.RetryFor = 20 * time.Second
	c := dial(t, config)
	if _, err := c.Sign(t.Context(), "payments", message("AAAA")); err != nil {
		t.Fatal(err)
	}
	if err := a.stop(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		_, err := c.Sign(t.Context(), "payments", message("BBBB"))
		done <- err
	}()
	if err := a.serve(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Errorf("across a restart: %v", err)
	}
	// Without RetryFor, a call fails while the appliance is down, and the next call connects again.
	c = dial(t, a.config())
	if err := a.stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Ping(t.Context()); !errors.Is(err, client.ErrUnreachable) {
		t.Errorf("nobody listens: %v", err)
	}
	if err := a.serve(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Ping(t.Context()); err != nil {
		t.Errorf("somebody listens again: %v", err)
	}
}

func TestRemovedPeerIsCutOff(t *testing.T) {
	a := start(t)
	c := dial(t, a.config())
	if err := a.app.Peers.Remove(t.Context(), operator, "shop"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Ping(t.Context()); !errors.Is(err, client.ErrHandshake) {
		t.Errorf("%v, want %v", err, client.ErrHandshake)
	}
}

func TestStranger(t *testing.T) {
	a := start(t)
	config := a.config()
	var err error
	if config.Identity, err = newIdentity(); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Dial(t.Context(), config); !errors.Is(err, client.ErrHandshake) {
		t.Errorf("%v, want %v", err, client.ErrHandshake)
	}
	config = a.config()
	config.ServerKey[0] ^= 1
	if _, err := client.Dial(t.Context(), config); !errors.Is(err, client.ErrHandshake) {
		t.Errorf("another server: %v, want %v", err, client.ErrHandshake)
	}
}

// fake is an appliance whose answers come from the test. A nil answer closes the connection.
func fake(t *testing.T, answer func(id string, request any) []byte) client.Config {
	t.Helper()
	server, err := newIdentity()
	if err != nil {
		t.Fatal(err)
	}
	peer, err := newIdentity()
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			raw, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer raw.Close()
				anyPeer := func([32]byte) bool { return true }
				statics := []noise.Static{server}
				conn, err := noise.Accept(context.Background(), raw, statics, noise.CountersignV1, nil, anyPeer)
				if err != nil {
					return
				}
				for {
					m, err := conn.ReadMessage()
					if err != nil {
						return
					}
					id, request, err := wire.Parse(m, 100)
					if err != nil {
						t.Error(err)
						return
					}
					var b []byte
					if id == "0" { // the first message, which proves possession of the peer's key
						b = wire.EncodeAnswer(id, "", wire.Pong{Service: "fake"}, nil)
					} else {
						b = answer(id, request)
					}
					if b == nil || conn.WriteMessage(b) != nil {
						return
					}
				}
			}()
		}
	}()
	return client.Config{Address: l.Addr().String(), ServerKey: server.Public(), Identity: peer}
}

func TestAnswersThatCannotBeRight(t *testing.T) {
	a := start(t)
	real := dial(t, a.config())
	good, err := real.Sign(t.Context(), "payments", message("AAAA"))
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*wire.Signed){
		"another signature":      func(s *wire.Signed) { s.Signature[3] ^= 1 },
		"no signature":           func(s *wire.Signed) { s.Signature = nil },
		"another public key":     func(s *wire.Signed) { s.PublicKey[0] ^= 1 },
		"another key's name":     func(s *wire.Signed) { s.Key = "other" },
		"another nonce":          func(s *wire.Signed) { s.Nonce[0] ^= 1 },
		"another time":           func(s *wire.Signed) { s.ExpiresAt++ },
		"a signature of another": func(s *wire.Signed) { s.Signature = make([]byte, 64) },
	} {
		c := dial(t, fake(t, func(id string, r any) []byte {
			s := wire.Signed{
				Signature: append([]byte(nil), good.Signature...), PublicKey: good.PublicKey,
				Key: "payments", Version: 1,
				Nonce: good.Nonce, Timestamp: good.Timestamp, ExpiresAt: good.ExpiresAt,
			}
			change(&s)
			return wire.EncodeAnswer(id, "", s, nil)
		}))
		if _, err := c.Sign(t.Context(), "payments", good.Document); !errors.Is(err, client.ErrWrongAnswer) {
			t.Errorf("%s: %v, want %v", name, err, client.ErrWrongAnswer)
		}
	}
	c := dial(t, fake(t, func(id string, r any) []byte { return []byte(`{"id":"` + id + `"}`) }))
	if _, err := c.Ping(t.Context()); err == nil {
		t.Error("an answer without a result is accepted")
	}
}

// TestBatch checks that the outcomes of a batch stand in the order of its items, each with the
// result of its own call. Two items that spend one nonce have no order (docs/SPEC.md, batch): one
// of them spends the nonce, and the other one is a replay.
func TestBatch(t *testing.T) {
	a := start(t)
	c := dial(t, a.config())
	signed, err := c.Sign(t.Context(), "payments", message("AAAA"))
	if err != nil {
		t.Fatal(err)
	}
	other := *signed
	other.Signature = make([]byte, 64)
	const either = "valid or replay" // items 1 and 4 spend one nonce
	want := []string{"valid", either, "unknown_key", "invalid_signature", either, "valid"}
	got, err := c.Batch(t.Context(), []client.Item{
		{Key: "payments", Document: message("AAAB")},
		{Verify: signed},
		{Key: "nothing", Document: message("AAAC")},
		{Key: "payments", Verify: &other},
		{Verify: signed},
		{Key: "payments", Document: signed.Document},
	})
	if err != nil || len(got) != len(want) {
		t.Fatal(len(got), err)
	}
	spent := map[string]int{} // results of items 1 and 4
	for i, o := range got {
		result := "valid"
		if refusal, is := errors.AsType[*client.Error](o.Err); is {
			result = refusal.Code
		} else if o.Err != nil {
			result = o.Err.Error()
		}
		switch {
		case want[i] == either:
			spent[result]++
		case result != want[i]:
			t.Errorf("item %d: %v, want %q", i, o.Err, want[i])
		}
		if (result == "valid") != (o.Event != 0) {
			t.Errorf("item %d: %v, event %d", i, o.Err, o.Event)
		}
	}
	if spent["valid"] != 1 || spent["replay"] != 1 {
		t.Errorf("one nonce, spent by items 1 and 4: %v and %v, want one replay", got[1].Err, got[4].Err)
	}
	if s := got[0].Signed; s == nil || s.Repeated || s.Event == 0 {
		t.Errorf("%+v", s)
	}
	if s := got[5].Signed; s == nil || !s.Repeated || s.Event != signed.Event {
		t.Errorf("%+v", s)
	}
	if _, err := c.Batch(t.Context(), make([]client.Item, 101)); err == nil {
		t.Error("101 items are taken")
	}
}

// TestBusy checks that a call to a busy appliance is retried within RetryFor, and not without it.
func TestBusy(t *testing.T) {
	for retryFor, want := range map[time.Duration]int{0: 1, 5 * time.Second: 2} {
		var asked atomic.Int32
		config := fake(t, func(id string, _ any) []byte {
			if asked.Add(1) == 1 {
				return wire.EncodeAnswer(id, "", nil, &wire.Error{Code: wire.CodeBusy, Message: "later", RetryAfter: 1})
			}
			return wire.EncodeAnswer(id, "", wire.Pong{Service: "fake"}, nil)
		})
		config.RetryFor = retryFor
		_, err := dial(t, config).Ping(t.Context())
		if (err == nil) != (want == 2) || int(asked.Load()) != want {
			t.Errorf("RetryFor %v: asked %d times, %v", retryFor, asked.Load(), err)
		}
	}
}

// TestLostAnswers checks that the client repeats a sign request after a lost answer, and never a
// verify request.
func TestLostAnswers(t *testing.T) {
	a := start(t)
	real := dial(t, a.config())
	good, err := real.Sign(t.Context(), "payments", message("AAAA"))
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	asked := map[string]int{}
	c := dial(t, fake(t, func(id string, r any) []byte {
		mu.Lock()
		defer mu.Unlock()
		asked[fmt.Sprintf("%T", r)]++
		if asked[fmt.Sprintf("%T", r)] == 1 {
			return nil
		}
		return wire.EncodeAnswer(id, "", wire.Signed{
			Signature: good.Signature, PublicKey: good.PublicKey, Key: "payments", Version: 1, Repeated: true,
			Nonce: good.Nonce, Timestamp: good.Timestamp, ExpiresAt: good.ExpiresAt,
		}, nil)
	}))
	if s, err := c.Sign(t.Context(), "payments", good.Document); err != nil || !s.Repeated {
		t.Errorf("sign: %v", err)
	}
	if _, err := c.Verify(t.Context(), "", good); !errors.Is(err, client.ErrUnknownOutcome) {
		t.Errorf("verify: %v, want %v", err, client.ErrUnknownOutcome)
	}
	mu.Lock()
	defer mu.Unlock()
	if asked["*wire.Sign"] != 2 || asked["*wire.Verify"] != 1 {
		t.Errorf("asked %v", asked)
	}
}

// TestRequestsThatCannotBeAnswered checks that the client refuses a malformed request before
// sending. The appliance could not even read the id of such a request.
func TestRequestsThatCannotBeAnswered(t *testing.T) {
	a := start(t)
	c := dial(t, a.config())
	deep := strings.Repeat("[", 16) + strings.Repeat("]", 16)
	for name, d := range map[string]client.Document{
		"a noncharacter": message("\ufffe"),
		"too deep":       {Type: "message-v1", Payload: []byte(`{"context":` + deep + `}`)},
		"not JSON":       {Type: "message-v1", Payload: []byte(`{"context":`)},
		"nothing":        {Type: "message-v1"},
	} {
		var refusal *client.Error
		_, err := c.Sign(t.Context(), "payments", d)
		if err == nil || errors.As(err, &refusal) && refusal.Code != "malformed" {
			t.Errorf("sign %s: %v", name, err)
		}
		_, err = c.Verify(t.Context(), "", &client.Signed{Document: d})
		if err == nil || errors.Is(err, client.ErrUnknownOutcome) {
			t.Errorf("verify %s: %v", name, err)
		}
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := c.Verify(gone, "", &client.Signed{Document: message("AAAA")})
	if !errors.Is(err, context.Canceled) || errors.Is(err, client.ErrUnknownOutcome) {
		t.Errorf("with an ended context: %v", err)
	}
}

func TestContextEndsAWait(t *testing.T) {
	hang := make(chan struct{})
	defer close(hang)
	c := dial(t, fake(t, func(string, any) []byte { <-hang; return nil }))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := c.Ping(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	c.Close()
	if _, err := c.Ping(t.Context()); !errors.Is(err, client.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// TestSigner has crypto/x509 sign a certificate request with a key of the appliance.
func TestSigner(t *testing.T) {
	a := start(t)
	c := dial(t, a.config())
	s, err := c.Signer(t.Context(), "raw-certificates")
	if err != nil {
		t.Fatal(err)
	}
	request := &x509.CertificateRequest{Subject: pkix.Name{CommonName: "shop.example"}}
	der, err := x509.CreateCertificateRequest(rand.Reader, request, s)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil || csr.CheckSignature() != nil {
		t.Errorf("%v, %v", err, csr.CheckSignature())
	}
	if _, err := s.Sign(nil, make([]byte, 32), crypto.SHA256); err == nil {
		t.Error("a hash is signed as if it were the message")
	}
	if _, err := s.Sign(nil, []byte("m"), &ed25519.Options{Context: "x"}); err == nil {
		t.Error("a context is left out silently")
	}
	if _, err := s.Sign(nil, []byte("m"), nil); err == nil {
		t.Error("no options at all")
	}
	denied, err := c.Signer(t.Context(), "payments")
	if err != nil {
		t.Fatal(err)
	}
	var refusal *client.Error
	if _, err := denied.Sign(nil, []byte("m"), crypto.Hash(0)); !errors.As(err, &refusal) || refusal.Code != "denied" {
		t.Errorf("raw with a key that policy does not name: %v", err)
	}
	if _, err := c.Signer(t.Context(), "nothing"); err == nil {
		t.Error("a signer for a key that does not exist")
	}
}

func TestSignedSurvivesJSON(t *testing.T) {
	a := start(t)
	c := dial(t, a.config())
	s, err := c.Sign(t.Context(), "payments", message("AAAA"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.Encode()
	if err != nil || !json.Valid(b) {
		t.Fatal(err)
	}
	back, err := client.DecodeSigned(b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Verify(t.Context(), "payments", back); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{
		``, `[]`, `{}`, string(b) + "x",
		strings.Replace(string(b), `"nonce"`, `"nonse"`, 1), strings.Replace(string(b), `"nonce"`, `"x":1,"nonce"`, 1),
	} {
		if _, err := client.DecodeSigned([]byte(bad)); err == nil {
			t.Errorf("accepted: %.60s", bad)
		}
	}
}

func TestIdentityFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "peer.key")
	id, err := client.WriteIdentity(path)
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	b, _ := os.ReadFile(path)
	lines := strings.Split(string(b), "\n")
	header := fmt.Sprintf("# public key: %x", id.Public())
	if len(lines) != 3 || lines[0] != header || len(lines[1]) != 64 || lines[2] != "" {
		t.Errorf("the file is %q", strings.ReplaceAll(string(b), lines[1], "(64 digits)"))
	}
	back, err := client.ReadIdentity(path)
	if err != nil || back.Public() != id.Public() {
		t.Errorf("%v", err)
	}
	if _, err := client.WriteIdentity(path); err == nil {
		t.Error("an identity is overwritten")
	}
	secret := lines[1]
	for name, content := range map[string]string{
		"empty": "", "comments only": "# x\n", "short": secret[:62] + "\n", "no hex": strings.Repeat("g", 64),
		"two keys": secret + "\n" + secret + "\n", "trailing word": secret + " x\n",
	} {
		p := filepath.Join(t.TempDir(), "bad.key")
		os.WriteFile(p, []byte(content), 0o600)
		if _, err := client.ReadIdentity(p); err == nil || strings.Contains(err.Error(), secret[:16]) {
			t.Errorf("%s: %v", name, err)
		}
	}
	os.Chmod(path, 0o644)
	if _, err := client.ReadIdentity(path); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("readable by others: %v", err)
	}
}

// TestPinnedKeysAreKeys configures keys of the listener, of the log and of a line that are no keys.
func TestPinnedKeysAreKeys(t *testing.T) {
	good, err := newIdentity()
	if err != nil {
		t.Fatal(err)
	}
	second := good.Public()
	second[31] |= 0x80
	small := [32]byte{1}
	name, key := fmt.Sprintf("countersign/%x/0", small[:8]), append([]byte{1}, small[:]...)
	hash := sha256.Sum256(fmt.Appendf(nil, "%s\n%s", name, key)) // C2SP signed-note
	vkey := fmt.Sprintf("%s+%x+%s", name, hash[:4], base64.StdEncoding.EncodeToString(key))
	for what, change := range map[string]func(*client.Config){
		"ServerKey, encoded twice":       func(c *client.Config) { c.ServerKey = second },
		"ServerKey of low order":         func(c *client.Config) { c.ServerKey = small },
		"FormerServerKey, encoded twice": func(c *client.Config) { c.FormerServerKey = second },
		"FormerServerKey of low order":   func(c *client.Config) { c.FormerServerKey = small },
		"ServerIdentity of small order":  func(c *client.Config) { c.ServerIdentity = small },
		"LogKey of small order":          func(c *client.Config) { c.LogKey = vkey },
		"line of small order": func(c *client.Config) {
			c.Lines = []client.KeyLine{{Key: "payments", Version: 1, PublicKey: small}}
		},
	} {
		config := client.Config{Address: "127.0.0.1:1", ServerKey: good.Public(), Identity: good}
		if _, err := client.New(config); err != nil {
			t.Fatal(err)
		}
		change(&config)
		if _, err := client.New(config); err == nil {
			t.Errorf("%s: a client", what)
		}
	}
	for _, key := range [][32]byte{second, small, {}} {
		if _, err := client.ParseKey(hex.EncodeToString(key[:])); err == nil {
			t.Errorf("%x is a key", key)
		}
	}
}

// TestKeptFiles: a file that the application keeps is whole and private, keeps the mode that an
// operator gave it, and says its name when its content is wrong.
func TestKeptFiles(t *testing.T) {
	dir := t.TempDir()
	id, err := newIdentity()
	if err != nil {
		t.Fatal(err)
	}
	line := lineAt(clienttest.NewKeyLine("payments", 2), 1)
	for name, c := range map[string]struct {
		write func(path string) error
		same  func(path string) (bool, error)
	}{
		"noise.pub": {
			func(path string) error { return client.WriteKey(path, id.Public()) },
			func(path string) (bool, error) {
				key, err := client.ReadKey(path)
				return key == id.Public(), err
			},
		},
		"payments.line": {
			func(path string) error { return client.WriteKeyLine(path, line) },
			func(path string) (bool, error) {
				l, err := client.ReadKeyLine(path)
				return l == line, err
			},
		},
	} {
		path := filepath.Join(dir, name)
		for _, mode := range []os.FileMode{0o600, 0o644} { // of a new file, and of one that an operator has changed
			if err := c.write(path); err != nil {
				t.Fatal(err)
			}
			if same, err := c.same(path); !same || err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if st, err := os.Stat(path); err != nil || st.Mode().Perm() != mode {
				t.Errorf("%s: %v, %v, want %v", name, st.Mode(), err, mode)
			}
			if err := os.Chmod(path, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(path, []byte("torn"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := c.same(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", name, err)
		}
		if err := c.write(filepath.Join(dir, "none", name)); err == nil {
			t.Errorf("%s: written into a folder that does not exist", name)
		}
	}
	if _, err := client.ParseKey(fmt.Sprintf("%x\n\n", id.Public())); err == nil {
		t.Error("a key with two line feeds")
	}
}
