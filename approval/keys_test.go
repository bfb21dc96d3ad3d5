package approval

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"math/big"
	rand2 "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
)

// noEd25519Keys are 32 bytes each that are nobody's public key: no points, second encodings, all
// points of small order, and points of mixed order.
func noEd25519Keys(t testing.TB) map[string][]byte {
	t.Helper()
	var cases []struct {
		Reason    string
		PublicKey string `json:"public_key"`
	}
	if err := json.Unmarshal(must(os.ReadFile("../internal/eddsa/testdata/strict.json")), &cases); err != nil {
		t.Fatal(err)
	}
	keys := map[string][]byte{}
	for _, c := range cases {
		if strings.HasPrefix(c.Reason, "key ") && len(c.PublicKey) == 64 {
			keys[c.Reason+" "+c.PublicKey] = must(hex.DecodeString(c.PublicKey))
		}
	}
	if len(keys) < 30 {
		t.Fatalf("%d keys that are none", len(keys))
	}
	return keys
}

// TestNobodysKeyIsNoCredential offers public keys that have no private key in every form of a
// credential. With a point of small order, R the identity and S = 0 would prove every text.
func TestNobodysKeyIsNoCredential(t *testing.T) {
	constant := append([]byte{1}, make([]byte, 63)...)
	for what, point := range noEd25519Keys(t) {
		for _, blob := range [][]byte{
			ssh.Marshal(struct {
				Type string
				Key  []byte
			}{ssh.KeyAlgoED25519, point}),
			ssh.Marshal(struct {
				Type        string
				Key         []byte
				Application string
			}{ssh.KeyAlgoSKED25519, point, application}),
		} {
			key := must(ssh.ParsePublicKey(blob)) // package ssh has no opinion about the point
			if _, err := NewSSH(string(ssh.MarshalAuthorizedKey(key))); err == nil {
				t.Errorf("%s of %s is a credential", key.Type(), what)
			}
			text := key.Type() + " " + base64.StdEncoding.EncodeToString(blob)
			c := Credential{ID: NewID(text), Kind: SSH, PublicKey: text}
			if c.Check() == nil {
				t.Errorf("%s of %s passes the check", key.Type(), what)
			}
			signature := ssh.Signature{Format: key.Type(), Blob: constant}
			if key.Type() == ssh.KeyAlgoSKED25519 {
				signature.Rest = []byte{1, 0, 0, 0, 7}
			}
			proof := Proof{Credential: c.ID, SSHSIG: armorSSHSIG(sshsigBlob{
				sshsigMagic, 1, string(blob), ForSignIn, "", "sha256", string(ssh.Marshal(signature)),
			})}
			if _, err := c.Verify(ForSignIn, sampleText, proof); err == nil {
				t.Errorf("%s of %s: a constant proves a text", key.Type(), what)
			}
		}
		a := newAuthenticator(t, "EdDSA")
		a.cose[-2] = point
		if _, err := NewPasskey(challenge, testRP, testOrigin, a.create(challenge)); err == nil {
			t.Errorf("a passkey of %s is a credential", what)
		}
		public := b64(encodeCBOR(a.cose))
		c := Credential{ID: NewID(public), Kind: Passkey, PublicKey: public, CredentialID: b64(a.id), RPID: testRP}
		if c.Check() == nil {
			t.Errorf("a passkey of %s passes the check", what)
		}
		proof := a.get(t, c, sampleText)
		proof.Assertion.Signature = b64(constant)
		if _, err := c.Verify(ForSignIn, sampleText, proof); err == nil {
			t.Errorf("a passkey of %s: a constant proves a text", what)
		}
	}
}

// TestECDSAKeyOffTheCurveIsNoCredential moves a point off its curve, in every form of a credential.
func TestECDSAKeyOffTheCurveIsNoCredential(t *testing.T) {
	for name, curve := range map[string]elliptic.Curve{
		"nistp256": elliptic.P256(), "nistp384": elliptic.P384(), "nistp521": elliptic.P521(),
	} {
		good := must(must(ecdsa.GenerateKey(curve, rand.Reader)).PublicKey.Bytes())
		off := bytes.Clone(good)
		off[len(off)-1] ^= 1
		compressed := append([]byte{2 + good[len(good)-1]&1}, good[1:1+len(good)/2]...)
		for what, point := range map[string][]byte{
			"as it is": good, "off": off, "compressed": compressed, "infinity": {0},
			"zero": append([]byte{4}, make([]byte, len(good)-1)...),
		} {
			kinds := map[string][]byte{"ecdsa-sha2-" + name: ssh.Marshal(struct {
				Type, Curve string
				Point       []byte
			}{"ecdsa-sha2-" + name, name, point})}
			if name == "nistp256" {
				kinds[ssh.KeyAlgoSKECDSA256] = ssh.Marshal(struct {
					Type, Curve string
					Point       []byte
					Application string
				}{ssh.KeyAlgoSKECDSA256, name, point, application})
			}
			for kind, blob := range kinds {
				text := kind + " " + base64.StdEncoding.EncodeToString(blob)
				c := Credential{ID: NewID(text), Kind: SSH, PublicKey: text}
				if err := c.Check(); (err == nil) != (what == "as it is") {
					t.Errorf("%s, %s: %v", kind, what, err)
				}
			}
		}
	}
	a := newAuthenticator(t, "ES256")
	x, y := a.cose[-2].([]byte), a.cose[-3].([]byte)
	prime := elliptic.P256().Params().P
	zeroX := new(big.Int).ModSqrt(elliptic.P256().Params().B, prime).FillBytes(make([]byte, 32))
	for what, point := range map[string][2][]byte{
		"off":            {x, slices.Concat(y[:31], []byte{y[31] ^ 1})},
		"short":          {x[1:], y},
		"x = p, as zero": {prime.FillBytes(make([]byte, 32)), zeroX},
		"zero":           {make([]byte, 32), make([]byte, 32)},
	} {
		a.cose[-2], a.cose[-3] = point[0], point[1]
		if _, err := NewPasskey(challenge, testRP, testOrigin, a.create(challenge)); err == nil {
			t.Errorf("a passkey %s is a credential", what)
		}
	}
}

// TestArmorIsThatOfSSHKeygen has ssh-keygen verify every form of an armored signature that counts
// as a proof. The form in the log is the one that ssh-keygen writes.
func TestArmorIsThatOfSSHKeygen(t *testing.T) {
	signer, c := ed25519Person(t, 1)
	p := must(signSSH(signer, c, ForSignIn, sampleText))
	good := p.SSHSIG
	body := strings.TrimSuffix(strings.TrimPrefix(good, sshsigBegin), sshsigEnd+"\n")
	joined := strings.ReplaceAll(body, "\n", "")
	in := func(body string) string { return sshsigBegin + body + sshsigEnd + "\n" }
	for what, test := range map[string]struct {
		armored string
		good    bool
	}{
		"as it is":             {good, true},
		"no line feed at end":  {strings.TrimSuffix(good, "\n"), true}, // as $(cat FILE) in a shell
		"one line":             {in(joined), true},
		"lines of 64":          {in(strings.Join(chunks(joined, 64), "\n")), true},
		"CRLF":                 {strings.ReplaceAll(good, "\n", "\r\n"), false},
		"CR in the body":       {in(joined[:70] + "\r\n" + joined[70:]), false},
		"CR at the end":        {strings.TrimSuffix(good, "\n") + "\r\n", false},
		"leading blank":        {" " + good, false},
		"leading line":         {"\n" + good, false},
		"mark of byte order":   {"\ufeff" + good, false},
		"blank in the body":    {in(joined[:70] + " " + joined[70:]), false},
		"text after it":        {good + "x\n", false},
		"lines after it":       {good + "\n", false},
		"twice":                {good + good, false},
		"another marker":       {strings.ReplaceAll(good, "SSH SIGNATURE", "PGP SIGNATURE"), false},
		"no padding":           {in(strings.TrimRight(joined, "=")), !strings.HasSuffix(joined, "=")},
		"unused bits not zero": {in(strings.Replace(joined, "==", "", 1) + "x"), false},
	} {
		p := Proof{Credential: c.ID, SSHSIG: test.armored}
		_, err := c.Verify(ForSignIn, sampleText, p)
		if (err == nil) != test.good {
			t.Errorf("%s: %v", what, err)
		}
		if err == nil {
			accepted(t, c, ForSignIn, sampleText, test.armored)
			if logged := p.Canonical().SSHSIG; logged != good {
				t.Errorf("%s: the log has %q, want %q", what, logged, good)
			}
		}
	}
	// The same key and text by ssh-keygen itself.
	dir := t.TempDir()
	private, text := filepath.Join(dir, "key"), filepath.Join(dir, "text")
	if out, err := keygen(t, "", "-q", "-t", "ed25519", "-N", "", "-f", private); err != nil {
		t.Fatal(err, out)
	}
	write(t, text, sampleText)
	if out, err := keygen(t, "", "-Y", "sign", "-n", ForSignIn, "-f", private, text); err != nil {
		t.Fatal(err, out)
	}
	own := must(NewSSH(string(must(os.ReadFile(private + ".pub")))))
	written := Proof{Credential: own.ID, SSHSIG: string(must(os.ReadFile(text + ".sig")))}
	if _, err := own.Verify(ForSignIn, sampleText, written); err != nil || written.Canonical() != written {
		t.Errorf("ssh-keygen wrote %q, the log has %q: %v", written.SSHSIG, written.Canonical().SSHSIG, err)
	}
}

func chunks(s string, n int) (all []string) {
	for part := range slices.Chunk([]byte(s), n) {
		all = append(all, string(part))
	}
	return all
}

// TestArmorIsReadAsBySSHKeygen changes an armored signature at random, and compares the verdict
// with that of ssh-keygen. A signature that is accepted here is accepted by ssh-keygen too. A
// signature that only ssh-keygen accepts differs from an accepted one by white space in the body,
// by a NUL and bytes after it at the body's end, and by bytes after the armor.
func TestArmorIsReadAsBySSHKeygen(t *testing.T) {
	signer, c := ed25519Person(t, 1)
	good := must(signSSH(signer, c, ForSignIn, sampleText)).SSHSIG
	accepts := func(armored string) bool {
		_, err := c.Verify(ForSignIn, sampleText, Proof{Credential: c.ID, SSHSIG: armored})
		return err == nil
	}
	dir := t.TempDir()
	signers, file := filepath.Join(dir, "signers"), filepath.Join(dir, "sig")
	write(t, signers, "anna "+c.PublicKey+"\n")
	random, both, neither := rand2.New(rand2.NewPCG(1, 2)), 0, 0
	for range 200 {
		armored := mutate(random, good)
		write(t, file, armored)
		out, err := keygen(t, sampleText, "-Y", "verify", "-f", signers, "-I", "anna", "-n", ForSignIn, "-s", file)
		switch ours, theirs := accepts(armored), err == nil; {
		case ours && theirs:
			both++
			if logged := (Proof{SSHSIG: armored}).Canonical().SSHSIG; logged != good {
				t.Errorf("%q is logged as %q, want %q", armored, logged, good)
			}
		case ours:
			t.Errorf("ssh-keygen refuses %q: %s", armored, out)
		case theirs:
			body, _, _ := strings.Cut(strings.TrimPrefix(armored, sshsigBegin), sshsigEnd)
			body, _, _ = strings.Cut(body, "\x00")
			if !accepts(sshsigBegin + strings.Join(strings.Fields(body), "") + sshsigEnd) {
				t.Errorf("ssh-keygen accepts %q", armored)
			}
		default:
			neither++
		}
	}
	if both < 10 || neither < 10 {
		t.Errorf("%d accepted by both, %d by neither: the changes are too much alike", both, neither)
	}
}

// mutate changes an armored signature in one place, most often near the ends of lines.
func mutate(random *rand2.Rand, s string) string {
	at := random.IntN(len(s) + 1)
	if random.IntN(3) > 0 {
		ends := []int{0}
		for i := range len(s) {
			if s[i] == '\n' {
				ends = append(ends, i, i+1)
			}
		}
		at = ends[random.IntN(len(ends))]
	}
	some := []string{"\n", "\n", "\r", "\r\n", " ", "\t", "\v", "\x00", "=", "-", "A", "\ufeff"}
	switch piece := some[random.IntN(len(some))]; random.IntN(4) {
	case 0:
		return s[:at] + s[min(at+1, len(s)):]
	case 1:
		return s[:at] + piece + s[min(at+1, len(s)):]
	default:
		return s[:at] + piece + s[at:]
	}
}

// TestECDSASignatureHasOneForm writes the numbers of an ECDSA signature with zeros in front, which
// package ssh and ssh-keygen read alike.
func TestECDSASignatureHasOneForm(t *testing.T) {
	signer, c := person(t, must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)))
	changed := sshsigOf(t, signer, c, func(_ *sshsigBlob, s *ssh.Signature) {
		var numbers struct{ R, S *big.Int }
		if err := ssh.Unmarshal(s.Blob, &numbers); err != nil {
			t.Fatal(err)
		}
		padded := func(n *big.Int) []byte { return append([]byte{0, 0, 0}, n.Bytes()...) }
		s.Blob = ssh.Marshal(struct{ R, S []byte }{padded(numbers.R), padded(numbers.S)})
	})
	if _, err := c.Verify(ForSignIn, sampleText, changed); err == nil {
		t.Error("a second form of the signature is accepted")
	}
}
