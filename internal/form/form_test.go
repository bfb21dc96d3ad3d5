package form_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"countersign/admin/certs"
	"countersign/audit"
	"countersign/internal/form"
	"countersign/internal/keystore"
	"countersign/internal/keystore/keystoretest"
	"countersign/transcript"
)

// sample is an input that one key signs.
type sample struct {
	kind  string
	key   keystore.Info
	input []byte
	tag   int // the first bytes, of which each one counts
	// signers are the public keys that a document names.
	signers [][]byte
}

// samples returns inputs of every form, each with its key. The documents are the vectors of package
// transcript.
func samples(t testing.TB) (all []sample) {
	t.Helper()
	public, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	info := func(name string, alg keystore.Algorithm, public []byte) keystore.Info {
		return keystore.Info{Ref: keystore.Ref{Name: name, Version: 1}, Algorithm: alg, PublicKey: public}
	}
	b, err := os.ReadFile("../../transcript/testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []struct {
		Type      string          `json:"type"`
		Payload   json.RawMessage `json:"payload"`
		Nonce     string          `json:"nonce"`
		Timestamp int64           `json:"timestamp"`
		ExpiresAt int64           `json:"expires_at"`
	}
	if err := json.Unmarshal(b, &vectors); err != nil {
		t.Fatal(err)
	}
	for _, v := range vectors {
		nonce, err := base64.RawURLEncoding.DecodeString(v.Nonce)
		if err != nil {
			t.Fatal(err)
		}
		d, err := transcript.Parse(transcript.Request{
			Type: v.Type, Payload: v.Payload, Nonce: [32]byte(nonce), Timestamp: v.Timestamp, ExpiresAt: v.ExpiresAt,
		})
		if err != nil {
			t.Fatal(err)
		}
		signer, name := []byte(public), "payments"
		if len(d.Signers) > 0 {
			signer = d.Signers[0]
		}
		if v.Type == "raw" {
			name = "raw-certificates"
		}
		all = append(all, sample{v.Type, info(name, keystore.Ed25519, signer), d.Input(), tagOf(d), d.Signers})
	}
	key := info("payments", keystore.Ed25519, public)
	all = append(all, sample{form.Canary, key, form.NewCanary(), len("countersign-canary-v1") + 1, nil})
	key = info(keystore.LogName, keystore.Ed25519, public)
	log, err := audit.NewLog(public)
	if err != nil {
		t.Fatal(err)
	}
	text := log.Origin(7) + "\n12\n" + base64.StdEncoding.EncodeToString(make([]byte, 32)) + "\n"
	all = append(all, sample{form.Checkpoint, key, []byte(text), len(log.Name()) + 1, nil},
		sample{form.Webhook, key, []byte(`rotation_abc.1700000000.{"type":"key.rotated"}`), 0, nil})
	return append(all, ofTLS(t)...)
}

// tagOf is the length of the bytes of an input up to the payload: prefix, type, and the domain of
// the type, without the envelope in between.
func tagOf(d *transcript.Document) int { return len("countersign-document-v1") + 1 + 1 + len(d.Type) }

// recorder is a store that keeps what its keys sign.
type recorder struct {
	*keystoretest.Memory
	mu   sync.Mutex
	seen []sample
}

// ofTLS returns what package certs has signed for an authority, for a server, for a request of a
// certificate, and for handshakes.
func ofTLS(t testing.TB) (all []sample) {
	t.Helper()
	r := &recorder{Memory: keystoretest.NewMemory()}
	var keys [2]keystore.Key
	for i, name := range []string{keystore.CAName, keystore.AdminName} {
		k, err := r.Generate(t.Context(), keystore.Ref{Name: name, Version: 1}, keystore.P256, keystore.Tag{byte(i)})
		if err != nil {
			t.Fatal(err)
		}
		keys[i] = k
	}
	infos := map[string]keystore.Info{keystore.CAName: keys[0].Info(), keystore.AdminName: keys[1].Info()}
	r.BeforeSign = func(ref keystore.Ref, message []byte) error {
		r.mu.Lock()
		defer r.mu.Unlock()
		kind := form.Certificate
		if ref.Name == keystore.AdminName {
			if kind = form.Request; bytes.HasPrefix(message, []byte("  ")) {
				kind = form.Handshake
			}
		}
		r.seen = append(r.seen, sample{kind, infos[ref.Name], bytes.Clone(message), 0, nil})
		return nil
	}
	unrecorded := func(context.Context, string, keystore.Ref, [32]byte) error { return nil }
	m, err := certs.New(keys[0], keys[1], new(saved), unrecorded, []string{"box.example"},
		slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.CSR(t.Context()); err != nil {
		t.Fatal(err)
	}
	here, there := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- tls.Server(there, m.Config()).Handshake() }()
	tls.Client(here, &tls.Config{InsecureSkipVerify: true}).Handshake()
	here.Close()
	<-done
	for _, want := range []string{form.Certificate, form.Request, form.Handshake} {
		if !slices.ContainsFunc(r.seen, func(s sample) bool { return s.kind == want }) {
			t.Fatalf("package certs has signed no %s", want)
		}
	}
	for i, s := range r.seen {
		if s.kind == form.Handshake {
			r.seen[i].tag = 64 + len("TLS 1.3, server CertificateVerify") + 1
		}
	}
	return r.seen
}

type saved struct{ sync.Map }

func (s *saved) Load(name string) ([]byte, error) {
	v, _ := s.Map.Load(name)
	b, _ := v.([]byte)
	return b, nil
}

func (s *saved) Save(_ context.Context, name string, value []byte) error {
	s.Map.Store(name, value)
	return nil
}

// TestEachForm: the key of a form signs the form, and what is signed verifies as what it is.
func TestEachForm(t *testing.T) {
	seen := map[string]bool{}
	for _, s := range samples(t) {
		u, err := form.Recognise(s.key, s.input)
		if err != nil || u.Kind != s.kind {
			t.Errorf("%s: %q, %v", s.kind, u.Kind, err)
		}
		seen[s.kind] = true
		covered := s.input
		if s.kind == form.Webhook { // ID.TIMESTAMP.BODY
			covered = bytes.SplitN(s.input, []byte("."), 3)[2]
		}
		if !transcript.IsInput(s.input) && (!bytes.Equal(u.Message, s.input) || u.Digest != sha256.Sum256(covered)) {
			t.Errorf("%s: another message", s.kind)
		}
	}
	for _, known := range transcript.Types() {
		if !seen[known.Name] {
			t.Errorf("there is no sample of %s", known.Name)
		}
	}
}

// TestEachFlippedByteOfATag: an input with one changed byte in its tag is refused with the stable
// error, and the error has nothing of the input.
func TestEachFlippedByteOfATag(t *testing.T) {
	for _, s := range samples(t) {
		for i := range s.tag {
			for _, bit := range []byte{0x01, 0x20, 0x80} {
				input := bytes.Clone(s.input)
				input[i] ^= bit
				if u, err := form.Recognise(s.key, input); !errors.Is(err, keystore.ErrForm) {
					t.Errorf("%s: byte %d flipped: %q, %v", s.kind, i, u.Kind, err)
				} else if strings.Contains(err.Error(), string(input[:s.tag])) {
					t.Errorf("%s: %v", s.kind, err)
				}
			}
		}
	}
}

// TestEachFlippedByteOfADocument: a flipped byte of a document's canonical part gives another valid
// document of the same type (a hash, a text), or none. The message never is that of another type.
func TestEachFlippedByteOfADocument(t *testing.T) {
	for _, s := range samples(t) {
		if !transcript.IsInput(s.input) {
			continue
		}
		for i := range s.input {
			input := bytes.Clone(s.input)
			input[i] ^= 1
			u, err := form.Recognise(s.key, input)
			if err != nil && !errors.Is(err, keystore.ErrForm) || err == nil && u.Kind != s.kind {
				t.Errorf("%s: byte %d flipped: %q, %v", s.kind, i, u.Kind, err)
			}
		}
	}
}

// named are the types whose canonical bytes have the signer's public key in the clear.
var named = []string{"paykit-subscription-v2", "paykit-noise-key-authorization-v1"}

// signs reports that a key signs the input of a sample of another key.
func signs(key keystore.Info, s sample) bool {
	switch name := key.Ref.Name; {
	case s.kind == form.Canary:
		return true
	case transcript.IsInput(s.input):
		same := !slices.Contains(named, s.kind) ||
			slices.ContainsFunc(s.signers, func(signer []byte) bool { return bytes.Equal(key.PublicKey, signer) })
		return same && form.CheckDocument(name, s.kind) == nil
	case s.kind == form.Handshake:
		return name == s.key.Ref.Name
	}
	return key.Ref.Name == s.key.Ref.Name && bytes.Equal(key.PublicKey, s.key.PublicKey)
}

// TestOneKeyOneForm gives each input, its message and its digest to each key. A key signs its own
// forms, and canaries.
func TestOneKeyOneForm(t *testing.T) {
	all := samples(t)
	for _, s := range all {
		u, err := form.Recognise(s.key, s.input)
		if err != nil {
			t.Fatal(err)
		}
		for _, other := range all {
			inputs := [][]byte{u.Digest[:], append([]byte{0}, s.input...), append(bytes.Clone(u.Digest[:]), 0)}
			if !signs(other.key, s) {
				inputs = append(inputs, s.input, u.Message)
			}
			for _, input := range inputs {
				if u, err := form.Recognise(other.key, input); !errors.Is(err, keystore.ErrForm) {
					t.Errorf("key %v signs an input of %s as %q: %v", other.key.Ref, s.kind, u.Kind, err)
				}
			}
		}
	}
	for _, s := range all {
		if !transcript.IsInput(s.input) {
			continue
		}
		u, err := form.Recognise(s.key, s.input)
		if err != nil {
			t.Fatal(err)
		}
		for _, input := range [][]byte{u.Message, u.Digest[:], nil, {0}} {
			if _, err := form.Recognise(s.key, input); !errors.Is(err, keystore.ErrForm) {
				t.Errorf("key %v signs bytes that are no document: %v", s.key.Ref, err)
			}
		}
	}
}

// TestDocumentsAreRetyped: the canonical bytes of one type under the name of another type are
// refused, for the same key.
func TestDocumentsAreRetyped(t *testing.T) {
	const prefix = "countersign-document-v1\x00"
	for _, s := range samples(t) {
		if !transcript.IsInput(s.input) || s.kind == "raw" {
			continue
		}
		rest := s.input[len(prefix)+1+len(s.kind):]
		for _, other := range transcript.Types() {
			if other.Name == s.kind {
				continue
			}
			input := append([]byte(prefix), byte(len(other.Name)))
			input = append(append(input, other.Name...), rest...)
			if u, err := form.Recognise(s.key, input); !errors.Is(err, keystore.ErrForm) {
				t.Errorf("%s as %s: %q, %v", s.kind, other.Name, u.Kind, err)
			}
		}
	}
}

// TestForeignCertificates: the authority signs no second authority, no client's certificate, none
// of ten years, and none without a purpose.
func TestForeignCertificates(t *testing.T) {
	var ca, server sample
	for _, s := range ofTLS(t) {
		if s.kind == form.Certificate {
			ca.key = s.key
		} else {
			server.key = s.key
		}
	}
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*x509.Certificate){
		"good":              func(*x509.Certificate) {},
		"another authority": func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign },
		"a client":          func(c *x509.Certificate) { c.ExtKeyUsage[0] = x509.ExtKeyUsageClientAuth },
		"no purpose":        func(c *x509.Certificate) { c.ExtKeyUsage = nil },
		"any purpose": func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageAny}
		},
		"ten years":       func(c *x509.Certificate) { c.NotAfter = c.NotBefore.AddDate(10, 0, 0) },
		"signs more":      func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign },
		"no constraints":  func(c *x509.Certificate) { c.BasicConstraintsValid = false },
		"encrypts":        func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment },
		"a foreign usage": func(c *x509.Certificate) { c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{{1, 2, 3}} },
	} {
		now := time.Now()
		template := &x509.Certificate{
			NotBefore: now, NotAfter: now.Add(24 * time.Hour), BasicConstraintsValid: true,
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
			DNSNames: []string{"box.example"}, SignatureAlgorithm: x509.ECDSAWithSHA256,
		}
		change(template)
		der, err := x509.CreateCertificate(rand.Reader, template, template, &other.PublicKey, other)
		if err != nil {
			t.Fatal(err)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		_, err = form.Recognise(ca.key, c.RawTBSCertificate)
		if good := name == "good"; (err == nil) != good || !good && !errors.Is(err, keystore.ErrForm) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := form.Recognise(server.key, c.RawTBSCertificate); !errors.Is(err, keystore.ErrForm) {
			t.Errorf("%s: the server's key signs it: %v", name, err)
		}
	}
	// A request for a foreign key.
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, other)
	if err != nil {
		t.Fatal(err)
	}
	r, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := form.Recognise(server.key, r.RawTBSCertificateRequest); !errors.Is(err, keystore.ErrForm) {
		t.Errorf("a request for another key: %v", err)
	}
}

// TestAnotherLogsCheckpoint: the log's key signs no checkpoint under another log's name.
func TestAnotherLogsCheckpoint(t *testing.T) {
	for _, s := range samples(t) {
		if s.kind != form.Checkpoint {
			continue
		}
		for _, text := range []string{
			"countersign/0123456789abcdef/7\n12\n", "example.com/log\n12\n", "12\n",
		} {
			input := text + string(s.input[bytes.LastIndexByte(s.input[:len(s.input)-1], '\n')+1:])
			if _, err := form.Recognise(s.key, []byte(input)); !errors.Is(err, keystore.ErrForm) {
				t.Errorf("%q: %v", input, err)
			}
		}
	}
}

// TestGuard: a guarded store signs a batch of good and foreign inputs element by element, and no
// key of another store.
func TestGuard(t *testing.T) {
	inner := keystoretest.NewMemory()
	s := form.Guard(inner, nil)
	signed := 0
	inner.BeforeSign = func(keystore.Ref, []byte) error { signed++; return nil }
	k, err := s.Generate(t.Context(), keystore.Ref{Name: "payments", Version: 1}, keystore.Ed25519, keystore.Tag{1})
	if err != nil {
		t.Fatal(err)
	}
	good := form.NewCanary()
	batch := []*keystore.Signing{
		{Key: k, Message: good}, {Key: k, Message: []byte("m")}, {Key: s.Bind(k.Info()), Message: good},
		{Key: form.Guard(inner, nil).Bind(k.Info()), Message: good}, {Key: inner.Bind(k.Info()), Message: []byte("m")},
	}
	s.(keystore.BatchSigner).SignBatch(t.Context(), batch)
	for i, want := range []error{nil, keystore.ErrForm, nil, keystore.ErrRefused, keystore.ErrRefused} {
		if err := batch[i].Err; !errors.Is(err, want) || want == nil && !k.Info().Verify(good, batch[i].Signature) {
			t.Errorf("element %d: %v", i, err)
		}
	}
	if _, err := k.Sign(t.Context(), []byte("m"), nil); !errors.Is(err, keystore.ErrForm) {
		t.Error(err)
	}
	if signed != 2 {
		t.Errorf("the device has signed %d times", signed)
	}
	want := fmt.Sprintf("payments/1: %v: ", keystore.ErrForm)
	if _, err := k.Sign(t.Context(), []byte("m"), nil); err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("%v; want %q first", err, want)
	}
}
