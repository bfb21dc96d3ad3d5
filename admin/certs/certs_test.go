package certs

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"countersign/hsm"
	"countersign/internal/keystore"
	"countersign/internal/keystore/keystoretest"
)

// memoryStore is a Store in memory.
type memoryStore struct {
	mu     sync.Mutex
	values map[string][]byte
	err    error // returned by Save, with nothing saved
}

func (s *memoryStore) Load(name string) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.values[name], nil
}

func (s *memoryStore) Save(_ context.Context, name string, value []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.values[name] = value
	}
	return s.err
}

func generate(t *testing.T, s keystore.Store, name string, version uint32) keystore.Key {
	t.Helper()
	ref, tag := keystore.Ref{Name: name, Version: version}, keystore.Tag{byte(version), name[0]}
	k, err := s.Generate(t.Context(), ref, keystore.P256, tag)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// fixture is a Manager with keys and a store in memory.
type fixture struct {
	*Manager
	t              *testing.T
	keys           *keystoretest.Memory
	authority, key keystore.Key
	store          *memoryStore
	signed         int   // number of signatures asked of the keystore
	signErr        error // returned by the keystore instead of a signature

	recorded  []string // kinds and digests, in order
	recordErr error    // returned instead of a record
}

func (b *fixture) record(_ context.Context, kind string, key keystore.Ref, digest [32]byte) error {
	if b.recordErr == nil {
		b.recorded = append(b.recorded, fmt.Sprintf("%s %v %x", kind, key, digest))
	}
	return b.recordErr
}

func unrecorded(context.Context, string, keystore.Ref, [32]byte) error { return nil }

func newFixture(t *testing.T, names ...string) *fixture {
	t.Helper()
	b := &fixture{t: t, keys: keystoretest.NewMemory(), store: &memoryStore{values: map[string][]byte{}}}
	b.authority, b.key = generate(t, b.keys, "admin-authority", 1), generate(t, b.keys, "server", 1)
	b.keys.BeforeSign = func(keystore.Ref, []byte) error { b.signed++; return b.signErr }
	b.restart(names...)
	return b
}

func (b *fixture) restart(names ...string) {
	b.t.Helper()
	m, err := New(b.authority, b.key, b.store, b.record, names, slog.New(slog.DiscardHandler))
	if err != nil {
		b.t.Fatal(err)
	}
	b.Manager = m
}

// pool returns the trust store of a client with the own authority.
func (b *fixture) pool() *x509.CertPool {
	b.t.Helper()
	text, err := b.Authority(b.t.Context())
	if err != nil {
		b.t.Fatal(err)
	}
	return poolOf(b.t, text)
}

func poolOf(t *testing.T, text []byte) *x509.CertPool {
	t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		t.Fatalf("no certificate in %q", text)
	}
	return pool
}

// handshake runs a TLS handshake in memory and returns the certificates presented to the client.
func (b *fixture) handshake(trust *x509.CertPool, name string) ([]*x509.Certificate, error) {
	here, there := net.Pipe()
	server := tls.Server(there, b.Config())
	client := tls.Client(here, &tls.Config{RootCAs: trust, ServerName: name, NextProtos: []string{"h2"}})
	done := make(chan struct{})
	go func() {
		defer close(done)
		if server.Handshake() != nil {
			there.Close()
		}
	}()
	err := client.Handshake()
	here.Close()
	<-done
	if err == nil && client.ConnectionState().NegotiatedProtocol != "h2" {
		b.t.Error("HTTP/2 is not offered")
	}
	return client.ConnectionState().PeerCertificates, err
}

// presented returns the certificate that the server presents to a client with the own authority.
func (b *fixture) presented() *x509.Certificate {
	b.t.Helper()
	chain, err := b.handshake(b.pool(), "localhost")
	if err != nil {
		b.t.Fatal(err)
	}
	return chain[0]
}

// required skips the test without a device or tool, or fails the test if REQUIRE_DEVICES=1.
func required(t *testing.T, what string, err error) {
	t.Helper()
	if os.Getenv("REQUIRE_DEVICES") == "1" {
		t.Fatalf("%s is required and missing: %v", what, err)
	}
	t.Skipf("%s is not installed: %v", what, err)
}

func write(t *testing.T, path string, content []byte) string {
	t.Helper()
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const softHSM = "/usr/lib/softhsm/libsofthsm2.so"

func openSoftHSM(t *testing.T) keystore.Store {
	if _, err := os.Stat(softHSM); err != nil {
		required(t, "SoftHSM", err)
	}
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "tokens"), 0o700); err != nil {
		t.Fatal(err)
	}
	conf := fmt.Appendf(nil, "directories.tokendir = %s/tokens\nlog.level = ERROR\n", dir)
	t.Setenv("SOFTHSM2_CONF", write(t, filepath.Join(dir, "softhsm2.conf"), conf))
	c := hsm.Config{
		URI: "pkcs11:token=countersign%20test", Module: softHSM, Sessions: 4,
		PINFile: write(t, filepath.Join(dir, "pin"), []byte("test-user-pin\n")),
	}
	soPIN := write(t, filepath.Join(dir, "so-pin"), []byte("test-so-pin\n"))
	if err := hsm.InitToken(t.Context(), c, soPIN); err != nil {
		t.Fatal(err)
	}
	s, err := hsm.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestServe serves HTTPS on loopback with keys in a SoftHSM token. The clients are net/http and
// OpenSSL.
func TestServe(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		required(t, "openssl", err)
	}
	keys := openSoftHSM(t)
	defer keys.Close()
	m, err := New(generate(t, keys, "admin-authority", 1), generate(t, keys, "server", 1),
		&memoryStore{values: map[string][]byte{}}, unrecorded, []string{"countersign.lan"},
		slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := listener.Addr().String()
	server := &http.Server{
		TLSConfig: m.Config(), ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Proto) }),
	}
	go server.ServeTLS(listener, "", "")
	defer server.Close()
	authority, err := m.Authority(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	path := write(t, filepath.Join(t.TempDir(), "ca.pem"), authority)

	ask := func(c *tls.Config, name string) (string, error) {
		transport := &http.Transport{
			TLSClientConfig: c, ForceAttemptHTTP2: true,
			DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, network, at)
			},
		}
		defer transport.CloseIdleConnections()
		answer, err := (&http.Client{Transport: transport}).Get("https://" + name + "/")
		if err != nil {
			return "", err
		}
		defer answer.Body.Close()
		if !(answer.TLS.Version == tls.VersionTLS13) || answer.TLS.DidResume {
			t.Errorf("%s: %+v", name, answer.TLS)
		}
		return answer.Proto, nil
	}
	cache := tls.NewLRUClientSessionCache(4)
	for _, name := range []string{"localhost", "localhost", "127.0.0.1", "[::1]", "countersign.lan"} {
		proto, err := ask(&tls.Config{RootCAs: poolOf(t, authority), ClientSessionCache: cache}, name)
		if err != nil || proto != "HTTP/2.0" {
			t.Errorf("%s: %s, %v", name, proto, err)
		}
	}
	for what, c := range map[string]*tls.Config{
		"TLS 1.2":                  {RootCAs: poolOf(t, authority), MaxVersion: tls.VersionTLS12},
		"a client without the PEM": {RootCAs: x509.NewCertPool()},
		"another name":             {RootCAs: poolOf(t, authority), ServerName: "other.lan"},
	} {
		if _, err := ask(c, "localhost"); err == nil {
			t.Errorf("%s is served", what)
		}
	}

	for _, c := range []struct {
		args string
		ok   bool
	}{
		{"-tls1_3 -verify_hostname localhost -servername localhost -CAfile " + path, true},
		{"-tls1_3 -verify_ip 127.0.0.1 -CAfile " + path, true},
		{"-tls1_3 -verify_hostname other.lan -CAfile " + path, false},
		{"-tls1_3 -no-CAfile -no-CApath -no-CAstore", false},
		{"-tls1_2 -CAfile " + path, false},
	} {
		args := append([]string{"s_client", "-connect", at, "-verify_return_error"}, strings.Fields(c.args)...)
		cmd := exec.CommandContext(t.Context(), openssl, args...)
		cmd.Stdin = strings.NewReader("Q\n")
		out, err := cmd.CombinedOutput()
		if (err == nil) != c.ok || c.ok && !bytes.Contains(out, []byte("Verify return code: 0 (ok)")) {
			t.Errorf("openssl s_client %s: %v\n%s", c.args, err, out)
		}
	}

	request, err := m.CSR(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), openssl, "req", "-verify", "-noout", "-text")
	cmd.Stdin = bytes.NewReader(request)
	if out, err := cmd.CombinedOutput(); err != nil ||
		!bytes.Contains(out, []byte("DNS:countersign.lan")) || bytes.Contains(out, []byte("localhost")) ||
		!bytes.Contains(out, []byte("X509v3 Key Usage: critical\n                    Digital Signature\n")) ||
		!bytes.Contains(out, []byte("TLS Web Server Authentication")) {
		t.Errorf("openssl req: %v\n%s", err, out)
	}
}

// TestConstraints checks the name constraints of the authority: its key can't make a certificate
// for other servers, sub-authorities or clients.
func TestConstraints(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		required(t, "openssl", err)
	}
	b := newFixture(t, "countersign.lan", "192.0.2.7")
	pool := b.pool()
	path := write(t, filepath.Join(t.TempDir(), "ca.pem"), encode(b.Manager.authority))
	stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key := b.authorityKey.withContext(t.Context())
	server := func(names ...string) *x509.Certificate {
		c, err := newCertificate(b.Manager.authority, key, &stranger.PublicKey, names)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	own := func(names ...string) []*x509.Certificate { return []*x509.Certificate{server(names...)} }
	below := &x509.Certificate{
		Subject: pkix.Name{CommonName: "below"}, NotBefore: time.Now().Add(-day), NotAfter: time.Now().Add(day),
		BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign,
	}
	if below, err = create(below, b.Manager.authority, &stranger.PublicKey, key); err != nil {
		t.Fatal(err)
	}
	leaf := *server("localhost")
	deep, err := x509.CreateCertificate(rand.Reader, &leaf, below, &stranger.PublicKey, stranger)
	if err != nil {
		t.Fatal(err)
	}
	deeper, err := x509.ParseCertificate(deep)
	if err != nil {
		t.Fatal(err)
	}
	client := *server("localhost")
	client.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	asClient, err := create(&client, b.Manager.authority, &stranger.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what    string
		chain   []*x509.Certificate
		use     x509.ExtKeyUsage
		purpose string
		ok      bool
	}{
		{"all its names", own("countersign.lan", "192.0.2.7", "localhost", "127.0.0.1", "::1"),
			x509.ExtKeyUsageServerAuth, "sslserver", true},
		{"another host", own("bank.example"), x509.ExtKeyUsageServerAuth, "sslserver", false},
		{"another address", own("192.0.2.8"), x509.ExtKeyUsageServerAuth, "sslserver", false},
		{"another address of six", own("::2"), x509.ExtKeyUsageServerAuth, "sslserver", false},
		{"an authority below", []*x509.Certificate{deeper, below}, x509.ExtKeyUsageServerAuth, "sslserver", false},
		{"a client", []*x509.Certificate{asClient}, x509.ExtKeyUsageClientAuth, "sslclient", false},
	} {
		o := x509.VerifyOptions{Roots: pool, Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{c.use}}
		for _, x := range c.chain[1:] {
			o.Intermediates.AddCert(x)
		}
		if _, err := c.chain[0].Verify(o); (err == nil) != c.ok {
			t.Errorf("%s: Go says %v", c.what, err)
		}
		file := write(t, filepath.Join(t.TempDir(), "chain.pem"), encode(c.chain...))
		cmd := exec.Command(openssl, "verify", "-purpose", c.purpose, "-CAfile", path, "-untrusted", file, file)
		if out, err := cmd.CombinedOutput(); (err == nil) != c.ok {
			t.Errorf("%s: OpenSSL says %v, %s", c.what, err, out)
		}
	}
	end := b.Manager.authority.NotAfter
	if end.Before(time.Now().AddDate(19, 11, 0)) || end.After(time.Now().AddDate(20, 0, 1)) {
		t.Errorf("the authority expires at %v", end)
	}
}

func TestKeys(t *testing.T) {
	b := newFixture(t)
	ed, err := b.keys.Generate(t.Context(), keystore.Ref{Name: "ed", Version: 1}, keystore.Ed25519, keystore.Tag{9})
	if err != nil {
		t.Fatal(err)
	}
	for _, pair := range [][2]keystore.Key{{ed, b.key}, {b.authority, ed}} {
		if _, err := New(pair[0], pair[1], b.store, b.record, nil, slog.New(slog.DiscardHandler)); err == nil {
			t.Error("an Ed25519 key is taken for TLS")
		}
	}
	key := b.Manager.key.withContext(t.Context())
	if _, err := key.Sign(nil, make([]byte, 32), crypto.SHA256); err == nil {
		t.Error("a digest is signed as if it were a message")
	}
	if _, err := key.SignMessage(nil, nil, crypto.SHA384); err == nil {
		t.Error("the keystore's hash is passed off as another")
	}
	b.keys.Corrupt = func(signature []byte) []byte { signature[len(signature)-1] ^= 1; return signature }
	// SignMessage passes a judge, so that a keystore with a second path to the device can retry.
	if _, err := key.SignMessage(nil, nil, crypto.SHA256); !errors.Is(err, keystore.ErrWrong) {
		t.Errorf("a wrong signature: %v", err)
	}
}

// stuck is a key on a device that never answers.
type stuck struct{ keystore.Key }

func (stuck) Sign(ctx context.Context, _ []byte, _ keystore.Judge) ([]byte, error) {
	<-ctx.Done()
	return nil, fmt.Errorf("%w: %w", keystore.ErrUnavailable, ctx.Err())
}

func TestStuckKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newFixture(t)
		b.authority = stuck{b.authority}
		b.restart()
		begin := time.Now()
		_, err := b.GetCertificate(hello(t))
		if took := time.Since(begin); !errors.Is(err, keystore.ErrUnavailable) || took != signTimeout {
			t.Errorf("%v, after %v", err, took)
		}
	})
}

func TestNames(t *testing.T) {
	b := newFixture(t)
	for name, ok := range map[string]bool{
		"localhost": true, "a": true, "countersign.lan": true, "a-1.b": true,
		"10.0.0.1": true, "2001:db8::1": true, strings.Repeat("a", 63) + ".b": true,
		"": false, ".": false, "a.": false, ".a": false, "A.lan": false, "*.lan": false,
		"a b": false, "-a": false, "a-": false, "a_b": false, "ä": false,
		"10.0.0.01": false, "10.0.0": false, "10.0.0.1:443": false, "2001:DB8::1": false,
		"2001:db8:0::1": false, "fe80::1%eth0": false, "::ffff:10.0.0.1": false,
		"https://a": false, strings.Repeat("a", 64): false,
		strings.Repeat("a.", 126) + "a": true, strings.Repeat("a.", 127) + "a": false,
	} {
		_, err := New(b.authority, b.key, b.store, b.record, []string{name}, slog.New(slog.DiscardHandler))
		if (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// TestLife checks that certificates on disk are used again after a restart, and replaced on a
// change of names or keys and before expiry.
func TestLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newFixture(t, "b.lan", "a.lan")
		if s := b.Status(); s.Installed || !s.NotAfter.IsZero() || s.Warning != "" || b.signed != 0 {
			t.Errorf("before the first connection: %+v, %d signatures", s, b.signed)
		}
		first := b.presented()
		authority := b.Manager.authority
		if got := fmt.Sprint(namesOf(first)); got != "[127.0.0.1 ::1 a.lan b.lan localhost]" {
			t.Errorf("the certificate is for %s", got)
		}
		if s := b.Status(); s.Installed || !s.NotAfter.Equal(first.NotAfter) ||
			s.Issuer != authority.Subject.String() || s.Warning != "" || len(s.Names) != 5 {
			t.Errorf("%+v", s)
		}
		if life := time.Until(first.NotAfter); life > 90*day || life < 90*day-time.Minute {
			t.Errorf("the certificate is valid for %v", life)
		}
		is := func(what string, sameCertificate, sameAuthority bool) {
			t.Helper()
			now := b.presented()
			if now.Equal(first) != sameCertificate || b.Manager.authority.Equal(authority) != sameAuthority {
				t.Errorf("%s: the same certificate %v, the same authority %v",
					what, now.Equal(first), b.Manager.authority.Equal(authority))
			}
			first, authority = now, b.Manager.authority
		}
		is("again", true, true)
		b.restart("a.lan", "b.lan")
		is("after a restart with the names in another order", true, true)
		time.Sleep(60*day - time.Minute)
		is("31 days before its end", true, true)
		time.Sleep(2 * time.Minute)
		is("30 days before its end", false, true)
		b.restart("a.lan")
		is("with fewer names", false, true)
		b.restart("a.lan", "c.lan")
		is("with a new name", false, false)
		b.restart("a.lan", "c.lan", "192.0.2.1")
		is("with a new address", false, false)
		if err := b.Use(generate(t, b.keys, "server", 2)); err != nil {
			t.Fatal(err)
		}
		is("with another version of the key", false, true)
		b.key = generate(t, b.keys, "server", 3)
		b.restart("a.lan", "c.lan", "192.0.2.1")
		is("with another version after a restart", false, true)
		b.authority = generate(t, b.keys, "admin-authority", 2)
		b.restart("a.lan", "c.lan", "192.0.2.1")
		b.pool() // makes the authority; the restart is a crash before the certificate exists
		b.restart("a.lan", "c.lan", "192.0.2.1")
		is("with another key of the authority", false, false)
		time.Sleep(authorityLifetime - 89*day)
		is("when the authority ends before a certificate would", false, false)
		b.store.values[storedOwn] = b.store.values[storedAuthority]
		b.restart("a.lan", "c.lan", "192.0.2.1")
		is("with the wrong one in the store", false, true)
		b.store.values[storedOwn] = []byte("x")
		if _, err := New(b.authority, b.key, b.store, b.record, nil, slog.New(slog.DiscardHandler)); err == nil {
			t.Error("New accepts a store with an unreadable certificate")
		}
	})
}

// TestClockSetBack checks that a certificate issued with the clock 10 days ahead is not presented
// after the clock is set back.
func TestClockSetBack(t *testing.T) {
	b := newFixture(t)
	synctest.Test(t, func(t *testing.T) {
		b.t = t
		time.Sleep(10 * day)
		b.presented()
	})
	synctest.Test(t, func(t *testing.T) { // a new bubble starts at the first day again
		b.t = t
		b.restart()
		if c := b.presented(); c.NotBefore.After(time.Now()) {
			t.Errorf("the certificate is valid from %v", c.NotBefore)
		}
	})
}

func TestKeyAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newFixture(t)
		trust := b.pool()
		b.signed, b.signErr = 0, fmt.Errorf("%w: unplugged", keystore.ErrUnavailable)
		for range 5 {
			if _, err := b.handshake(trust, "localhost"); err == nil {
				t.Fatal("a handshake without the key")
			}
		}
		if b.signed != 1 {
			t.Errorf("the device was asked %d times in a moment", b.signed)
		}
		if s := b.Status(); !strings.Contains(s.Warning, "unplugged") {
			t.Errorf("%+v", s)
		}
		b.signErr = nil
		time.Sleep(time.Second)
		first := b.presented()
		if s := b.Status(); s.Warning != "" {
			t.Errorf("%+v", s)
		}

		b.signErr = keystore.ErrUnavailable // while the certificate is valid
		if _, err := b.handshake(trust, "localhost"); err == nil {
			t.Error("a handshake without the key")
		}
		b.signErr = nil
		if !b.presented().Equal(first) {
			t.Error("another certificate")
		}

		time.Sleep(70 * day) // renewal is due, but the authority's key is unavailable
		b.keys.BeforeSign = func(ref keystore.Ref, _ []byte) error {
			if ref.Name == "admin-authority" {
				b.signed++
				return keystore.ErrUnavailable
			}
			return nil
		}
		b.signed = 0
		for range 5 {
			if !b.presented().Equal(first) {
				t.Error("another certificate")
			}
			time.Sleep(2 * time.Second)
		}
		if b.signed != 1 || b.Status().Warning == "" {
			t.Errorf("the authority was asked %d times in a moment; %+v", b.signed, b.Status())
		}
		time.Sleep(time.Minute)
		b.presented()
		if b.signed != 2 {
			t.Errorf("the authority was asked %d times in a minute", b.signed)
		}
		time.Sleep(21 * day)
		if _, err := b.handshake(trust, "localhost"); err == nil {
			t.Error("an expired certificate is good")
		}
		if _, err := b.GetCertificate(hello(t)); !errors.Is(err, keystore.ErrUnavailable) {
			t.Errorf("an expired certificate is shown: %v", err)
		}
		b.keys.BeforeSign = nil
		time.Sleep(time.Second)
		if b.presented().Equal(first) {
			t.Error("no new certificate")
		}
	})
}

// hello returns a client's hello message, without a connection.
func hello(t *testing.T) *tls.ClientHelloInfo {
	t.Helper()
	var got *tls.ClientHelloInfo
	here, there := net.Pipe()
	go func() {
		tls.Client(here, &tls.Config{ServerName: "localhost"}).Handshake()
		here.Close()
	}()
	tls.Server(there, &tls.Config{GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		got = h
		return nil, errors.New("enough")
	}}).HandshakeContext(context.WithoutCancel(t.Context()))
	there.Close()
	return got
}

// TestUnsaved checks that a certificate is not used if the store failed, or if the signature is
// wrong.
func TestUnsaved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newFixture(t)
		full := errors.New("the disk is full")
		b.store.err = full
		if _, err := b.Authority(t.Context()); !errors.Is(err, full) || b.Manager.authority != nil {
			t.Errorf("%v, an authority that is not on disk", err)
		}
		b.store.err = nil
		b.pool()
		b.store.err = full
		if _, err := b.GetCertificate(hello(t)); !errors.Is(err, full) {
			t.Errorf("%v, a certificate that is not on disk", err)
		}
		b.store.err = nil
		time.Sleep(time.Second)
		b.keys.Corrupt = func(signature []byte) []byte { signature[len(signature)-1] ^= 1; return signature }
		if _, err := b.GetCertificate(hello(t)); err == nil || len(b.store.values[storedOwn]) > 0 {
			t.Errorf("%v, a certificate with a wrong signature", err)
		}
	})
}

// operatorCA is a certificate authority of the operator, with an intermediate.
type operatorCA struct {
	t          *testing.T
	root, next *x509.Certificate // root signed next, the intermediate
	rootKey    *ecdsa.PrivateKey
	nextKey    *ecdsa.PrivateKey
}

func newOperatorCA(t *testing.T) *operatorCA {
	o := &operatorCA{t: t}
	authority := x509.Certificate{
		Subject: pkix.Name{CommonName: "Root"}, NotBefore: time.Now().Add(-day), NotAfter: time.Now().Add(1000 * day),
		BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign,
	}
	for _, k := range []**ecdsa.PrivateKey{&o.rootKey, &o.nextKey} {
		var err error
		if *k, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			t.Fatal(err)
		}
	}
	o.root = o.sign(authority, &authority, &o.rootKey.PublicKey, o.rootKey)
	authority.Subject.CommonName = "Next"
	o.next = o.sign(authority, o.root, &o.nextKey.PublicKey, o.rootKey)
	return o
}

func (o *operatorCA) sign(
	template x509.Certificate, parent *x509.Certificate, public any, key *ecdsa.PrivateKey,
) *x509.Certificate {
	o.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, &template, parent, public, key)
	if err != nil {
		o.t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		o.t.Fatal(err)
	}
	return c
}

// server issues a certificate for a CSR. change may modify the template.
func (o *operatorCA) server(csr []byte, change func(*x509.Certificate)) *x509.Certificate {
	o.t.Helper()
	block, _ := pem.Decode(csr)
	r, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		o.t.Fatal(err)
	}
	if err := r.CheckSignature(); err != nil {
		o.t.Fatal(err)
	}
	c := x509.Certificate{
		Subject: r.Subject, DNSNames: r.DNSNames, IPAddresses: r.IPAddresses,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(365 * day),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if change != nil {
		change(&c)
	}
	return o.sign(c, o.next, r.PublicKey, o.nextKey)
}

func TestInstall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, o := newFixture(t, "a.lan", "192.0.2.1"), newOperatorCA(t)
		own := b.presented()
		csr, err := b.CSR(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		good := encode(o.server(csr, nil), o.next, o.root)
		made := func(change func(*x509.Certificate)) []byte {
			return encode(o.server(csr, change), o.next, o.root)
		}
		alone := func(change func(*x509.Certificate)) []byte { return encode(o.server(csr, change)) }
		past := func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }
		otherName := func(c *x509.Certificate) { c.DNSNames = []string{"b.lan"} }
		leaf := encode(o.server(csr, nil))
		private, err := x509.MarshalPKCS8PrivateKey(o.nextKey)
		if err != nil {
			t.Fatal(err)
		}
		key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})
		strange := newFixture(t, "a.lan", "192.0.2.1")
		theirs, err := strange.CSR(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		next := func(change func(*x509.Certificate)) *x509.Certificate {
			c := *o.next
			change(&c)
			return o.sign(c, o.root, &o.nextKey.PublicKey, o.rootKey)
		}
		expired := next(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
		narrow := next(func(c *x509.Certificate) { c.PermittedDNSDomains = []string{"b.lan"} })
		for what, chain := range map[string][]byte{
			"nothing":           nil,
			"no PEM":            []byte("hello"),
			"another key":       encode(o.server(theirs, nil), o.next, o.root),
			"the authority":     encode(o.next, o.root),
			"the wrong order":   encode(o.server(csr, nil), o.root, o.next),
			"the leaf last":     encode(o.root, o.next, o.server(csr, nil)),
			"a link missing":    encode(o.server(csr, nil), o.root),
			"another authority": encode(o.server(csr, nil), newOperatorCA(t).next),
			"expired":           made(past),
			"not valid yet": made(func(c *x509.Certificate) {
				c.NotBefore = time.Now().Add(time.Minute)
			}),
			"an expired one alone":         alone(past),
			"an expired authority":         encode(o.server(csr, nil), expired, o.root),
			"an authority for other names": encode(o.server(csr, nil), narrow, o.root),
			"a name missing":               made(otherName),
			"a name missing alone":         alone(otherName),
			"an address missing":           made(func(c *x509.Certificate) { c.IPAddresses = nil }),
			"a client's": made(func(c *x509.Certificate) {
				c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
			}),
			"no extended use": made(func(c *x509.Certificate) { c.ExtKeyUsage = nil }),
			"no signatures":   made(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }),
			"an authority of our key": made(func(c *x509.Certificate) {
				c.IsCA, c.KeyUsage = true, c.KeyUsage|x509.KeyUsageCertSign
			}),
			"a private key":       slices.Concat(good, key),
			"cut":                 good[:len(good)-10],
			"a link cut":          slices.Concat(leaf, []byte("-----BEGIN CERTIFICATE-----\nAAAA\n"), encode(o.next)),
			"in another envelope": bytes.ReplaceAll(good, []byte("CERTIFICATE---"), []byte("TRUSTED CERTIFICATE---")),
			"long":                slices.Concat(good, bytes.Repeat([]byte("\n"), maxChainPEM)),
		} {
			if err := b.Install(t.Context(), chain); !errors.Is(err, ErrUnfit) {
				t.Errorf("%s: %v", what, err)
			} else if strings.Contains(err.Error(), string(key[30:50])) {
				t.Errorf("%s: the error shows a key: %v", what, err)
			}
		}
		if !b.presented().Equal(own) || len(b.store.values[storedInstalled]) > 0 {
			t.Error("a refused chain has changed the certificate in use or the store")
		}

		for n, ok := range map[int]bool{maxChain: true, maxChain + 1: false} {
			if _, err := parse(bytes.Repeat(leaf, n)); (err == nil) != ok {
				t.Errorf("%d certificates: %v", n, err)
			}
		}

		theirPool := poolOf(t, encode(o.root))
		for _, chain := range [][]byte{
			good,
			encode(o.server(csr, nil), o.next),
			slices.Concat([]byte("Certificate:\n    Data:\n"), leaf),
			good,
		} {
			if err := b.Install(t.Context(), chain); err != nil {
				t.Fatal(err)
			}
			want, err := parse(chain)
			if err != nil {
				t.Fatal(err)
			}
			if err := b.Install(t.Context(), encode(o.root)); err == nil {
				t.Error("the root is installed")
			}
			c, err := b.GetCertificate(hello(t))
			if err != nil || len(c.Certificate) != len(want) || !bytes.Equal(c.Certificate[0], want[0].Raw) {
				t.Errorf("%d certificates, %v", len(c.Certificate), err)
			}
		}
		if _, err := b.handshake(theirPool, "a.lan"); err != nil {
			t.Error(err)
		}
		b.restart("a.lan", "192.0.2.1")
		if _, err := b.handshake(theirPool, "a.lan"); err != nil {
			t.Errorf("after a restart: %v", err)
		}
		if s := b.Status(); !s.Installed || s.Warning != "" || s.Issuer != "CN=Next" ||
			!s.NotAfter.Equal(time.Now().Add(365*day)) {
			t.Errorf("%+v", s)
		}

		b.store.err = errors.New("the disk is full")
		if err := b.Uninstall(t.Context()); err == nil || !b.Status().Installed {
			t.Errorf("%v, uninstalled without a change on disk", err)
		}
		b.store.err = nil
		warned := func(what, want string) {
			t.Helper()
			if s := b.Status(); (s.Warning == "") != (want == "") || !strings.Contains(s.Warning, want) {
				t.Errorf("%s: %+v", what, s)
			}
		}
		b.restart("a.lan", "b.lan")
		warned("another name", "is not for b.lan")
		if err := b.Use(generate(t, b.keys, "server", 2)); err != nil {
			t.Fatal(err)
		}
		warned("another key", "another key")
		if b.presented(); b.Status().Installed {
			t.Error("an installed certificate is used with another key")
		}
		b.restart("a.lan", "192.0.2.1")
		warned("the first key", "")
		time.Sleep(334 * day)
		warned("31 days before the end", "")
		time.Sleep(2 * day)
		warned("29 days before the end", "in 29 days")
		time.Sleep(30 * day)
		warned("after the end", "has expired")
		var invalid x509.CertificateInvalidError
		if _, err := b.handshake(theirPool, "a.lan"); !errors.As(err, &invalid) || invalid.Reason != x509.Expired {
			t.Errorf("after the end: %v", err)
		}
		short := made(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(20 * day) })
		if err := b.Install(t.Context(), short); err != nil {
			t.Fatal(err)
		}
		warned("of short life", "")
		time.Sleep(14 * day)
		warned("of short life, near its end", "in 6 days")
		if err := b.Uninstall(t.Context()); err != nil {
			t.Fatal(err)
		}
		warned("uninstalled", "")
		b.presented()
		b.restart("a.lan", "192.0.2.1")
		if s := b.Status(); s.Installed || s.NotAfter.Before(time.Now()) {
			t.Errorf("uninstalled, after a restart: %+v", s)
		}
	})
}

// TestOneSignatureAtATime checks that concurrent handshakes make one call of the device at a time.
// An unauthenticated client can begin any number of handshakes.
func TestOneSignatureAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := keystoretest.NewMemory()
		s, err := newSigner(generate(t, keys, "server", 1))
		if err != nil {
			t.Fatal(err)
		}
		var signing atomic.Int32
		next := make(chan struct{})
		keys.BeforeSign = func(keystore.Ref, []byte) error { signing.Add(1); <-next; return nil }
		done := make(chan error, 5)
		for range cap(done) {
			go func() {
				_, err := s.withContext(t.Context()).SignMessage(nil, []byte("hello"), crypto.SHA256)
				done <- err
			}()
		}
		for i := range cap(done) {
			if synctest.Wait(); signing.Load() != int32(i+1) {
				t.Errorf("%d signatures have begun, of which %d have ended", signing.Load(), i)
			}
			next <- struct{}{}
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
}

// TestEachSignatureIsRecorded: the record of a certificate, and of a request for one, comes before
// the signature and has the digest of the signed part. Without the record nothing is signed.
func TestEachSignatureIsRecorded(t *testing.T) {
	b := newFixture(t)
	b.recordErr = errors.New("the disk is full")
	if _, err := b.CSR(t.Context()); !errors.Is(err, b.recordErr) || b.signed != 0 {
		t.Errorf("%v after %d signatures", err, b.signed)
	}
	if _, err := b.Authority(t.Context()); !errors.Is(err, b.recordErr) || b.signed != 0 {
		t.Errorf("%v after %d signatures", err, b.signed)
	}
	b.recordErr = nil
	b.restart()
	csr, err := b.CSR(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(csr)
	request, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	own := b.presented()
	want := []string{
		fmt.Sprintf("certificate-request server/1 %x", sha256.Sum256(request.RawTBSCertificateRequest)),
		fmt.Sprintf("certificate admin-authority/1 %x", sha256.Sum256(b.Manager.authority.RawTBSCertificate)),
		fmt.Sprintf("certificate admin-authority/1 %x", sha256.Sum256(own.RawTBSCertificate)),
	}
	if b.presented(); !slices.Equal(b.recorded, want) { // another handshake has no record
		t.Errorf("%q, want %q", b.recorded, want)
	}
}
