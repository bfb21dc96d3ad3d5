package approval

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

const sampleText = ForSignIn + "\nappliance: countersign/0011223344556677\noperator: anna\nchannel: unix\nexpires at: 2026-11-24T08:02:00Z\nnonce: 000102030405060708090a0b0c0d0e0f\n"

// keygen runs the real ssh-keygen.
func keygen(t *testing.T, stdin string, args ...string) (string, error) {
	t.Helper()
	if _, err := exec.LookPath("ssh-keygen"); err != nil {
		if os.Getenv("REQUIRE_DEVICES") == "1" {
			t.Fatal("ssh-keygen is missing: install openssh-client")
		}
		t.Skip("ssh-keygen is missing: install openssh-client")
	}
	cmd := exec.Command("ssh-keygen", args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// accepted has the real ssh-keygen verify a signature by a credential over a text.
func accepted(t *testing.T, c Credential, namespace, text, sshsig string) {
	t.Helper()
	dir := t.TempDir()
	signers, sig := filepath.Join(dir, "signers"), filepath.Join(dir, "sig")
	write(t, signers, "anna "+c.PublicKey+"\n")
	write(t, sig, sshsig)
	if out, err := keygen(t, text, "-Y", "verify", "-f", signers, "-I", "anna", "-n", namespace, "-s", sig); err != nil {
		t.Errorf("ssh-keygen refuses it: %v\n%s%s", err, out, sshsig)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// person is an operator's agent with one key, and the credential of it.
func person(t testing.TB, private any) (agent.Agent, Credential) {
	t.Helper()
	a := agent.NewKeyring()
	if err := a.Add(agent.AddedKey{PrivateKey: private}); err != nil {
		t.Fatal(err)
	}
	all, err := InAgent(a, nil)
	if err != nil || len(all) != 1 {
		t.Fatal(all, err)
	}
	return a, all[0]
}

// ed25519Person has the same key each time for the same number.
func ed25519Person(t testing.TB, n byte) (agent.Agent, Credential) {
	return person(t, ed25519.NewKeyFromSeed(bytes.Repeat([]byte{n}, 32)))
}

// TestSSHKeygenVerifies: what ssh-keygen signs is proven, and ssh-keygen takes what an agent has signed here.
func TestSSHKeygenVerifies(t *testing.T) {
	for _, kind := range [][]string{{"ed25519"}, {"ecdsa", "-b", "256"}, {"ecdsa", "-b", "384"}, {"ecdsa", "-b", "521"}} {
		t.Run(strings.Join(kind, ""), func(t *testing.T) {
			dir := t.TempDir()
			key, text := filepath.Join(dir, "key"), filepath.Join(dir, "text")
			if out, err := keygen(t, "", append([]string{"-q", "-N", "", "-C", "anna@example with spaces", "-f", key, "-t"}, kind...)...); err != nil {
				t.Fatal(err, out)
			}
			line, err := os.ReadFile(key + ".pub")
			if err != nil {
				t.Fatal(err)
			}
			c, err := NewSSH(string(line))
			if err != nil || c.Check() != nil || strings.Contains(c.PublicKey, "anna") {
				t.Fatal(c, err)
			}
			write(t, text, sampleText)
			for _, hash := range []string{"sha256", "sha512"} {
				os.Remove(text + ".sig")
				if out, err := keygen(t, "", "-Y", "sign", "-n", ForSignIn, "-O", "hashalg="+hash, "-f", key, text); err != nil {
					t.Fatal(err, out)
				}
				sig, err := os.ReadFile(text + ".sig")
				if err != nil {
					t.Fatal(err)
				}
				if _, err := c.Verify(ForSignIn, sampleText, Proof{Credential: c.ID, SSHSIG: string(sig)}); err != nil {
					t.Errorf("%s: %v", hash, err)
				}
				if _, err := c.Verify(ForSignIn, sampleText, Proof{Credential: c.ID, SSHSIG: strings.ReplaceAll(string(sig), "\n", "\r\n")}); err != nil {
					t.Errorf("%s with CRLF: %v", hash, err)
				}
				if _, err := c.Verify(ForSignIn, sampleText+" ", Proof{Credential: c.ID, SSHSIG: string(sig)}); !errors.Is(err, ErrNotProven) {
					t.Errorf("%s over another text: %v", hash, err)
				}
			}
			pem, err := os.ReadFile(key)
			if err != nil {
				t.Fatal(err)
			}
			private, err := ssh.ParseRawPrivateKey(pem)
			if err != nil {
				t.Fatal(err)
			}
			a, same := person(t, private)
			if same != c {
				t.Fatalf("the agent's is %+v, that of the file %+v", same, c)
			}
			p, err := SignSSH(a, c, ForSignIn, sampleText)
			if err != nil {
				t.Fatal(err)
			}
			accepted(t, c, ForSignIn, sampleText, p.SSHSIG)
		})
	}
}

// TestSSHAgent signs through the real ssh-agent.
func TestSSHAgent(t *testing.T) {
	path, err := exec.LookPath("ssh-agent")
	if err != nil {
		if os.Getenv("REQUIRE_DEVICES") == "1" {
			t.Fatal("ssh-agent is missing: install openssh-client")
		}
		t.Skip("ssh-agent is missing: install openssh-client")
	}
	dir, err := os.MkdirTemp("", "agent") // the path of a socket must be short
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "s")
	cmd := exec.Command(path, "-D", "-a", socket)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	var conn net.Conn
	for deadline := time.Now().Add(10 * time.Second); ; {
		if conn, err = net.Dial("unix", socket); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	defer conn.Close()
	a := agent.NewClient(conn)
	for _, private := range []any{ed25519.NewKeyFromSeed(make([]byte, 32)), must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)), must(rsa.GenerateKey(rand.Reader, 2048))} {
		if err := a.Add(agent.AddedKey{PrivateKey: private}); err != nil {
			t.Fatal(err)
		}
	}
	all, err := InAgent(a, nil)
	if err != nil || len(all) != 2 {
		t.Fatalf("%d of 3 keys can be used, want 2 without RSA's: %v", len(all), err)
	}
	for _, c := range all {
		if p, err := SignSSH(a, c, ForSignIn, sampleText); err != nil {
			t.Error(err)
		} else {
			accepted(t, c, ForSignIn, sampleText, p.SSHSIG)
		}
	}
	known := all[1]
	known.Added = 17
	if found, err := InAgent(a, []Credential{{ID: "another", Kind: SSH}, known}); err != nil || len(found) != 1 || found[0] != known {
		t.Errorf("%+v, %v", found, err)
	}
	_, stranger := ed25519Person(t, 9)
	if found, err := InAgent(a, []Credential{stranger}); err != nil || len(found) != 0 {
		t.Errorf("%+v, %v", found, err)
	}
	if _, err := SignSSH(a, stranger, ForSignIn, sampleText); err == nil {
		t.Error("an agent signs with a key that it has not")
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// fido is an agent with a FIDO key in software.
type fido struct {
	agent.Agent
	ed     ed25519.PrivateKey
	ec     *ecdsa.PrivateKey
	flags  byte
	count  uint32
	public ssh.PublicKey
}

const application = "ssh:"

func newFido(t testing.TB, kind string) *fido {
	t.Helper()
	f := &fido{flags: 1, count: 7}
	var blob []byte
	if kind == ssh.KeyAlgoSKED25519 {
		f.ed = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{3}, 32))
		blob = ssh.Marshal(struct {
			Type        string
			Key         []byte
			Application string
		}{kind, f.ed.Public().(ed25519.PublicKey), application})
	} else {
		f.ec = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
		point := must(f.ec.PublicKey.ECDH()).Bytes()
		blob = ssh.Marshal(struct {
			Type, Curve string
			Point       []byte
			Application string
		}{kind, "nistp256", point, application})
	}
	f.public = must(ssh.ParsePublicKey(blob))
	return f
}

func (f *fido) Sign(_ ssh.PublicKey, data []byte) (*ssh.Signature, error) {
	device := ssh.Marshal(struct {
		Flags byte
		Count uint32
	}{f.flags, f.count})
	app, digest := sha256.Sum256([]byte(application)), sha256.Sum256(data)
	signed := bytes.Join([][]byte{app[:], device, digest[:]}, nil)
	s := &ssh.Signature{Format: f.public.Type(), Rest: device}
	if f.ed != nil {
		s.Blob = ed25519.Sign(f.ed, signed)
	} else {
		sum := sha256.Sum256(signed)
		r, v, err := ecdsa.Sign(rand.Reader, f.ec, sum[:])
		if err != nil {
			return nil, err
		}
		s.Blob = ssh.Marshal(struct{ R, S *big.Int }{r, v})
	}
	return s, nil
}

// TestFIDOKeys: a FIDO key proves with a touch, and not without. ssh-keygen takes what it has signed.
func TestFIDOKeys(t *testing.T) {
	for _, kind := range []string{ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256} {
		f := newFido(t, kind)
		c, err := NewSSH(string(ssh.MarshalAuthorizedKey(f.public)))
		if err != nil {
			t.Fatal(err)
		}
		if c.Check() != nil {
			t.Error(c.Check())
		}
		p, err := SignSSH(f, c, ForSignIn, sampleText)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := c.Verify(ForSignIn, sampleText, p); err != nil || n != 7 {
			t.Errorf("%s: %d, %v", kind, n, err)
		}
		accepted(t, c, ForSignIn, sampleText, p.SSHSIG)
		for _, flags := range []byte{0, 4} {
			f.flags = flags
			if _, err := SignSSH(f, c, ForSignIn, sampleText); !errors.Is(err, ErrNotProven) || !strings.Contains(err.Error(), "touched") {
				t.Errorf("%s without a touch: %v", kind, err)
			}
		}
		for _, rest := range [][]byte{nil, {1}, {1, 0, 0, 0, 7, 0}} {
			broken := sshsigOf(t, f, c, func(_ *sshsigBlob, s *ssh.Signature) { s.Rest = rest })
			if _, err := c.Verify(ForSignIn, sampleText, broken); !errors.Is(err, ErrNotProven) {
				t.Errorf("%s with %x after its signature: %v", kind, rest, err)
			}
		}
	}
}

// sshsigOf makes a proof and lets a test change what is in it; the signature itself stays what it was.
func sshsigOf(t testing.TB, a agent.Agent, c Credential, change func(*sshsigBlob, *ssh.Signature)) Proof {
	t.Helper()
	if f, is := a.(*fido); is {
		f.flags = 1
	}
	p, err := SignSSH(a, c, ForSignIn, sampleText)
	if err != nil {
		t.Fatal(err)
	}
	blob, signature, err := parseSSHSIG(p.SSHSIG)
	if err != nil {
		t.Fatal(err)
	}
	change(&blob, &signature)
	blob.Signature = string(ssh.Marshal(signature))
	return Proof{Credential: c.ID, SSHSIG: armor(ssh.Marshal(blob))}
}

func armor(b []byte) string { return sshsigBegin + base64.StdEncoding.EncodeToString(b) + sshsigEnd }

func TestSSHSIGRefused(t *testing.T) {
	a, c := ed25519Person(t, 1)
	_, other := ed25519Person(t, 2)
	good := sshsigOf(t, a, c, func(*sshsigBlob, *ssh.Signature) {})
	if _, err := c.Verify(ForSignIn, sampleText, good); err != nil {
		t.Fatal(err)
	}
	// resigned signs again, so that only the rule itself refuses.
	resigned := func(change func(*sshsigBlob, *sshsigSigned)) Proof {
		return sshsigOf(t, a, c, func(b *sshsigBlob, s *ssh.Signature) {
			sum := sha256.Sum256([]byte(sampleText))
			signed := sshsigSigned{sshsigMagic, ForSignIn, "", "sha256", sum[:]}
			change(b, &signed)
			*s = *must(a.Sign(must(sshKey(c.PublicKey)), ssh.Marshal(signed)))
		})
	}
	raw, _ := base64.StdEncoding.DecodeString(strings.TrimSuffix(strings.TrimPrefix(good.SSHSIG, sshsigBegin), sshsigEnd))
	for name, p := range map[string]Proof{
		"no proof":             {Credential: c.ID},
		"another credential":   {Credential: other.ID, SSHSIG: good.SSHSIG},
		"both kinds":           {Credential: c.ID, SSHSIG: good.SSHSIG, Assertion: new(Assertion)},
		"an assertion":         {Credential: c.ID, Assertion: new(Assertion)},
		"text before it":       {Credential: c.ID, SSHSIG: "x\n" + good.SSHSIG},
		"text after it":        {Credential: c.ID, SSHSIG: good.SSHSIG + "\nx"},
		"twice":                {Credential: c.ID, SSHSIG: good.SSHSIG + "\n" + good.SSHSIG},
		"no armor":             {Credential: c.ID, SSHSIG: base64.StdEncoding.EncodeToString(raw)},
		"too long":             {Credential: c.ID, SSHSIG: good.SSHSIG + strings.Repeat("\n", MaxProof)},
		"trailing data":        {Credential: c.ID, SSHSIG: armor(append(bytes.Clone(raw), 0))},
		"cut off":              {Credential: c.ID, SSHSIG: armor(raw[:len(raw)-1])},
		"version 2":            sshsigOf(t, a, c, func(b *sshsigBlob, _ *ssh.Signature) { b.Version = 2 }),
		"magic":                sshsigOf(t, a, c, func(b *sshsigBlob, _ *ssh.Signature) { b.Magic[5] = 'H' }),
		"reserved":             sshsigOf(t, a, c, func(b *sshsigBlob, _ *ssh.Signature) { b.Reserved = "x" }),
		"after the signature":  sshsigOf(t, a, c, func(_ *sshsigBlob, s *ssh.Signature) { s.Rest = []byte{0} }),
		"the other hash":       sshsigOf(t, a, c, func(b *sshsigBlob, _ *ssh.Signature) { b.Hash = "sha512" }),
		"sha1":                 resigned(func(b *sshsigBlob, s *sshsigSigned) { b.Hash, s.Hash = "sha1", "sha1" }),
		"no hash":              resigned(func(b *sshsigBlob, s *sshsigSigned) { b.Hash, s.Hash, s.Digest = "", "", []byte(sampleText) }),
		"another namespace":    resigned(func(b *sshsigBlob, s *sshsigSigned) { b.Namespace, s.Namespace = "file", "file" }),
		"namespace not signed": resigned(func(_ *sshsigBlob, s *sshsigSigned) { s.Namespace = "file" }),
		"another key in it":    sshsigOf(t, a, c, func(b *sshsigBlob, _ *ssh.Signature) { b.PublicKey = string(must(sshKey(other.PublicKey)).Marshal()) }),
		"a key in front":       sshsigOf(t, a, c, func(b *sshsigBlob, _ *ssh.Signature) { b.PublicKey += "\x00" }),
	} {
		if _, err := c.Verify(ForSignIn, sampleText, p); !errors.Is(err, ErrNotProven) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := c.Verify(ForPresence, sampleText, good); !errors.Is(err, ErrNotProven) {
		t.Errorf("a signature for a sign-in proves a presence: %v", err)
	}
	// A text whose first line is another purpose is not signed for this one, even if the namespace of the signature is.
	text := strings.Replace(sampleText, ForSignIn, ForPresence, 1)
	if _, err := SignSSH(a, c, ForSignIn, text); !errors.Is(err, ErrNotProven) {
		t.Errorf("a text of another purpose: %v", err)
	}
	for i := range raw {
		for _, bit := range []byte{1, 0x80} {
			b := bytes.Clone(raw)
			b[i] ^= bit
			if _, err := c.Verify(ForSignIn, sampleText, Proof{Credential: c.ID, SSHSIG: armor(b)}); !errors.Is(err, ErrNotProven) {
				t.Errorf("byte %d changed: %v", i, err)
			}
		}
	}
}

func TestNewSSHRefuses(t *testing.T) {
	_, c := ed25519Person(t, 1)
	rsaKey := must(ssh.NewPublicKey(&must(rsa.GenerateKey(rand.Reader, 2048)).PublicKey))
	signer := must(ssh.NewSignerFromKey(ed25519.NewKeyFromSeed(make([]byte, 32))))
	certificate := &ssh.Certificate{Key: must(sshKey(c.PublicKey)), CertType: ssh.UserCert, ValidBefore: ssh.CertTimeInfinity}
	if err := certificate.SignCert(rand.Reader, signer); err != nil {
		t.Fatal(err)
	}
	longFido := ssh.Marshal(struct {
		Type        string
		Key         []byte
		Application string
	}{ssh.KeyAlgoSKED25519, make([]byte, 32), "ssh:" + strings.Repeat("a", 300)})
	for name, line := range map[string]string{
		"nothing":        "",
		"a comment":      "# anna",
		"options":        "no-touch-required " + c.PublicKey,
		"a command":      `command="/bin/sh" ` + c.PublicKey + " anna",
		"two lines":      c.PublicKey + "\n" + c.PublicKey,
		"a comment line": "# anna\n" + c.PublicKey,
		"RSA":            string(ssh.MarshalAuthorizedKey(rsaKey)),
		"a certificate":  string(ssh.MarshalAuthorizedKey(certificate)),
		"the other type": strings.Replace(c.PublicKey, "ssh-ed25519", "ecdsa-sha2-nistp256", 1),
		"a long FIDO":    ssh.KeyAlgoSKED25519 + " " + base64.StdEncoding.EncodeToString(longFido),
		"a private key":  "-----BEGIN OPENSSH PRIVATE KEY-----",
	} {
		if got, err := NewSSH(line); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	if same, err := NewSSH("  " + c.PublicKey + " a comment, with spaces \n"); err != nil || same != c {
		t.Errorf("%+v, %v", same, err)
	}
	for name, change := range map[string]func(*Credential){
		"id":            func(c *Credential) { c.ID = NewID("x") },
		"kind":          func(c *Credential) { c.Kind = "password" },
		"comment":       func(c *Credential) { c.PublicKey += " anna"; c.ID = NewID(c.PublicKey) },
		"relying party": func(c *Credential) { c.RPID = "localhost" },
		"a passkey":     func(c *Credential) { c.Kind = Passkey },
	} {
		changed := c
		change(&changed)
		if err := changed.Check(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzSSHSIG: nothing but the one signature proves, however it is written.
func FuzzSSHSIG(f *testing.F) {
	a, c := ed25519Person(f, 1)
	p, err := SignSSH(a, c, ForSignIn, sampleText)
	if err != nil {
		f.Fatal(err)
	}
	want, _, _ := parseSSHSIG(p.SSHSIG)
	f.Add(p.SSHSIG)
	f.Add(strings.ReplaceAll(p.SSHSIG, "\n", "\r\n"))
	f.Add(sshsigOf(f, a, c, func(b *sshsigBlob, _ *ssh.Signature) { b.Reserved = "x" }).SSHSIG)
	f.Fuzz(func(t *testing.T, armored string) {
		_, err := c.Verify(ForSignIn, sampleText, Proof{Credential: c.ID, SSHSIG: armored})
		if err != nil && !errors.Is(err, ErrNotProven) {
			t.Fatal(err)
		}
		if blob, _, parsed := parseSSHSIG(armored); err == nil && (parsed != nil || blob != want) { // Ed25519 signs a text in one way
			t.Fatalf("%q proves too", armored)
		}
	})
}
