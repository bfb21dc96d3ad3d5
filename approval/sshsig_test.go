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
	"io"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
)

const sampleText = ForSignIn + "\nappliance: countersign/0011223344556677\noperator: anna\nchannel: unix\n" +
	"expires at: 2026-11-24T08:02:00Z\nnonce: 000102030405060708090a0b0c0d0e0f\n"

// keygen runs ssh-keygen of OpenSSH.
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

// accepted has ssh-keygen verify a credential's signature over a text.
func accepted(t *testing.T, c Credential, namespace, text, sshsig string) {
	t.Helper()
	dir := t.TempDir()
	signers, sig := filepath.Join(dir, "signers"), filepath.Join(dir, "sig")
	write(t, signers, "anna "+c.PublicKey+"\n")
	write(t, sig, sshsig)
	out, err := keygen(t, text, "-Y", "verify", "-f", signers, "-I", "anna", "-n", namespace, "-s", sig)
	if err != nil {
		t.Errorf("ssh-keygen refuses it: %v\n%s%s", err, out, sshsig)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// person returns an operator's private key, and the credential for its public half.
func person(t testing.TB, private any) (ssh.Signer, Credential) {
	t.Helper()
	signer := must(ssh.NewSignerFromKey(private))
	return signer, must(NewSSH(string(ssh.MarshalAuthorizedKey(signer.PublicKey()))))
}

// ed25519Person returns a fixed key for each number.
func ed25519Person(t testing.TB, n byte) (ssh.Signer, Credential) {
	return person(t, ed25519.NewKeyFromSeed(bytes.Repeat([]byte{n}, 32)))
}

// signSSH signs a text with a key in memory.
func signSSH(s ssh.Signer, c Credential, namespace, text string) (Proof, error) {
	return SignSSH(c, namespace, text, func(message []byte) ([]byte, error) {
		signature, err := s.Sign(rand.Reader, message)
		if err != nil {
			return nil, err
		}
		return ssh.Marshal(signature), nil
	})
}

// TestSSHKeygenVerifies signs with ssh-keygen and verifies with Verify, and the other way round.
func TestSSHKeygenVerifies(t *testing.T) {
	for _, kind := range [][]string{
		{"ed25519"}, {"ecdsa", "-b", "256"}, {"ecdsa", "-b", "384"}, {"ecdsa", "-b", "521"},
	} {
		t.Run(strings.Join(kind, ""), func(t *testing.T) {
			dir := t.TempDir()
			key, text := filepath.Join(dir, "key"), filepath.Join(dir, "text")
			args := append([]string{"-q", "-N", "", "-C", "anna@example with spaces", "-f", key, "-t"}, kind...)
			if out, err := keygen(t, "", args...); err != nil {
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
				out, err := keygen(t, "", "-Y", "sign", "-n", ForSignIn, "-O", "hashalg="+hash, "-f", key, text)
				if err != nil {
					t.Fatal(err, out)
				}
				sig, err := os.ReadFile(text + ".sig")
				if err != nil {
					t.Fatal(err)
				}
				p := Proof{Credential: c.ID, SSHSIG: string(sig)}
				if _, err := c.Verify(ForSignIn, sampleText, p); err != nil {
					t.Errorf("%s: %v", hash, err)
				}
				if _, err := c.Verify(ForSignIn, sampleText+" ", p); !errors.Is(err, ErrNotProven) {
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
			signer, same := person(t, private)
			if same != c {
				t.Fatalf("the credential of the private key is %+v, and of the public file %+v", same, c)
			}
			p, err := signSSH(signer, c, ForSignIn, sampleText)
			if err != nil {
				t.Fatal(err)
			}
			accepted(t, c, ForSignIn, sampleText, p.SSHSIG)
		})
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// fido is a FIDO key in software, an ssh.Signer.
type fido struct {
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

func (f *fido) PublicKey() ssh.PublicKey { return f.public }

func (f *fido) Sign(_ io.Reader, data []byte) (*ssh.Signature, error) {
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

// TestFIDOKeys checks that a signature of a FIDO key is a proof only with a touch, and that
// ssh-keygen accepts the signature.
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
		p, err := signSSH(f, c, ForSignIn, sampleText)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := c.Verify(ForSignIn, sampleText, p); err != nil || n.SignCount != 7 {
			t.Errorf("%s: %v, %v", kind, n, err)
		}
		accepted(t, c, ForSignIn, sampleText, p.SSHSIG)
		for _, flags := range []byte{0, 4} {
			f.flags = flags
			_, err := signSSH(f, c, ForSignIn, sampleText)
			if !errors.Is(err, ErrNotProven) || !strings.Contains(err.Error(), "touched") {
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

// sshsigOf makes a valid proof, has a test change its fields, and does not sign again.
func sshsigOf(t testing.TB, s ssh.Signer, c Credential, change func(*sshsigBlob, *ssh.Signature)) Proof {
	t.Helper()
	if f, is := s.(*fido); is {
		f.flags = 1
	}
	p, err := signSSH(s, c, ForSignIn, sampleText)
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
	signer, c := ed25519Person(t, 1)
	_, other := ed25519Person(t, 2)
	changed := func(change func(*sshsigBlob, *ssh.Signature)) Proof { return sshsigOf(t, signer, c, change) }
	good := changed(func(*sshsigBlob, *ssh.Signature) {})
	if _, err := c.Verify(ForSignIn, sampleText, good); err != nil {
		t.Fatal(err)
	}
	// resigned signs the changed fields: the signature is valid, and only the rule under test
	// refuses.
	resigned := func(change func(*sshsigBlob, *sshsigSigned)) Proof {
		return changed(func(b *sshsigBlob, s *ssh.Signature) {
			sum := sha256.Sum256([]byte(sampleText))
			signed := sshsigSigned{sshsigMagic, ForSignIn, "", "sha256", sum[:]}
			change(b, &signed)
			*s = *must(signer.Sign(rand.Reader, ssh.Marshal(signed)))
		})
	}
	_, body, _ := strings.Cut(good.SSHSIG, sshsigBegin)
	raw, _ := base64.StdEncoding.DecodeString(strings.TrimSuffix(body, sshsigEnd))
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
		"version 2":            changed(func(b *sshsigBlob, _ *ssh.Signature) { b.Version = 2 }),
		"magic":                changed(func(b *sshsigBlob, _ *ssh.Signature) { b.Magic[5] = 'H' }),
		"reserved":             changed(func(b *sshsigBlob, _ *ssh.Signature) { b.Reserved = "x" }),
		"after the signature":  changed(func(_ *sshsigBlob, s *ssh.Signature) { s.Rest = []byte{0} }),
		"the other hash":       changed(func(b *sshsigBlob, _ *ssh.Signature) { b.Hash = "sha512" }),
		"sha1":                 resigned(func(b *sshsigBlob, s *sshsigSigned) { b.Hash, s.Hash = "sha1", "sha1" }),
		"namespace not signed": resigned(func(_ *sshsigBlob, s *sshsigSigned) { s.Namespace = "file" }),
		"a key in front":       changed(func(b *sshsigBlob, _ *ssh.Signature) { b.PublicKey += "\x00" }),
		"another namespace": resigned(func(b *sshsigBlob, s *sshsigSigned) {
			b.Namespace, s.Namespace = "file", "file"
		}),
		"no hash": resigned(func(b *sshsigBlob, s *sshsigSigned) {
			b.Hash, s.Hash, s.Digest = "", "", []byte(sampleText)
		}),
		"another key in it": changed(func(b *sshsigBlob, _ *ssh.Signature) {
			b.PublicKey = string(must(sshKey(other.PublicKey)).Marshal())
		}),
	} {
		if _, err := c.Verify(ForSignIn, sampleText, p); !errors.Is(err, ErrNotProven) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := c.Verify(ForPresence, sampleText, good); !errors.Is(err, ErrNotProven) {
		t.Errorf("a signature for a sign-in proves a presence: %v", err)
	}
	// The first line of a text and the namespace of the signature must be the same purpose.
	text := strings.Replace(sampleText, ForSignIn, ForPresence, 1)
	if _, err := signSSH(signer, c, ForSignIn, text); !errors.Is(err, ErrNotProven) {
		t.Errorf("a text of another purpose: %v", err)
	}
	for i := range raw {
		for _, bit := range []byte{1, 0x80} {
			b := bytes.Clone(raw)
			b[i] ^= bit
			_, err := c.Verify(ForSignIn, sampleText, Proof{Credential: c.ID, SSHSIG: armor(b)})
			if !errors.Is(err, ErrNotProven) {
				t.Errorf("byte %d changed: %v", i, err)
			}
		}
	}
}

func TestNewSSHRefuses(t *testing.T) {
	_, c := ed25519Person(t, 1)
	rsaKey := must(ssh.NewPublicKey(&must(rsa.GenerateKey(rand.Reader, 2048)).PublicKey))
	signer := must(ssh.NewSignerFromKey(ed25519.NewKeyFromSeed(make([]byte, 32))))
	certificate := &ssh.Certificate{
		Key: must(sshKey(c.PublicKey)), CertType: ssh.UserCert, ValidBefore: ssh.CertTimeInfinity,
	}
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

// FuzzSSHSIG checks that every accepted armored text decodes to one and the same signature.
func FuzzSSHSIG(f *testing.F) {
	signer, c := ed25519Person(f, 1)
	p, err := signSSH(signer, c, ForSignIn, sampleText)
	if err != nil {
		f.Fatal(err)
	}
	want, _, _ := parseSSHSIG(p.SSHSIG)
	f.Add(p.SSHSIG)
	f.Add(strings.ReplaceAll(p.SSHSIG, "\n", "\r\n"))
	f.Add(sshsigOf(f, signer, c, func(b *sshsigBlob, _ *ssh.Signature) { b.Reserved = "x" }).SSHSIG)
	f.Fuzz(func(t *testing.T, armored string) {
		_, err := c.Verify(ForSignIn, sampleText, Proof{Credential: c.ID, SSHSIG: armored})
		if err != nil && !errors.Is(err, ErrNotProven) {
			t.Fatal(err)
		}
		// Ed25519 is deterministic: a text has one signature.
		if blob, _, parsed := parseSSHSIG(armored); err == nil && (parsed != nil || blob != want) {
			t.Fatalf("%q proves too", armored)
		}
	})
}
