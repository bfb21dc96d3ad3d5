package approval

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"

	"github.com/fxamacker/cbor/v2"
)

// authenticator is an authenticator in software with one key. Tests change its statements.
type authenticator struct {
	key        crypto.Signer
	id         []byte
	cose       map[int]any
	rpID       string
	flags      byte
	count      uint32
	extensions []byte
	client     map[string]any // fields of the client data, without challenge and type
	ceremony   string         // type of the client data; "": the real ceremony
	format     string
	statement  any
}

const (
	testRP     = "localhost"
	testOrigin = "https://localhost:7780"
)

func newAuthenticator(t testing.TB, kind string) *authenticator {
	t.Helper()
	a := &authenticator{
		id: bytes.Repeat([]byte{9}, 32), rpID: testRP, flags: 0x05, count: 41,
		client: map[string]any{"origin": testOrigin, "crossOrigin": false},
		format: "none", statement: map[string]any{},
	}
	if kind == "ES256" {
		k := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
		point := must(k.PublicKey.ECDH()).Bytes()
		a.key, a.cose = k, map[int]any{1: 2, 3: -7, -1: 1, -2: point[1:33], -3: point[33:]}
	} else {
		k := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{5}, 32))
		a.key, a.cose = k, map[int]any{1: 1, 3: -8, -1: 6, -2: []byte(k.Public().(ed25519.PublicKey))}
	}
	return a
}

func encodeCBOR(v any) []byte {
	return must(must(cbor.CTAP2EncOptions().EncMode()).Marshal(v))
}

func (a *authenticator) clientData(ceremony string, challenge []byte) []byte {
	said := maps.Clone(a.client)
	said["type"], said["challenge"] = ceremony, b64(challenge)
	if a.ceremony != "" {
		said["type"] = a.ceremony
	}
	return must(json.Marshal(said))
}

func (a *authenticator) data(flags byte, attested []byte) []byte {
	rp := sha256.Sum256([]byte(a.rpID))
	b := binary.BigEndian.AppendUint32(append(rp[:], flags), a.count)
	return append(append(b, attested...), a.extensions...)
}

func (a *authenticator) sign(t testing.TB, message []byte) []byte {
	t.Helper()
	hash := crypto.Hash(0)
	if _, is := a.key.(*ecdsa.PrivateKey); is {
		sum := sha256.Sum256(message)
		message, hash = sum[:], crypto.SHA256
	}
	return must(a.key.Sign(rand.Reader, message, hash))
}

// create returns the answer of navigator.credentials.create().
func (a *authenticator) create(challenge []byte) []byte {
	attested := append(make([]byte, 16), byte(len(a.id)>>8), byte(len(a.id)))
	attested = append(append(attested, a.id...), encodeCBOR(a.cose)...)
	object := encodeCBOR(map[string]any{
		"fmt": a.format, "attStmt": a.statement, "authData": a.data(a.flags|0x40, attested),
	})
	return must(json.Marshal(map[string]any{
		"id": b64(a.id), "rawId": b64(a.id), "type": "public-key", "clientExtensionResults": map[string]any{},
		"response": map[string]any{
			"clientDataJSON": b64(a.clientData("webauthn.create", challenge)), "attestationObject": b64(object),
			"transports": []string{"internal"},
		},
	}))
}

// get returns the answer of navigator.credentials.get() for a text.
func (a *authenticator) get(t testing.TB, c Credential, text string) Proof {
	t.Helper()
	challenge := sha256.Sum256([]byte(text))
	client, data := a.clientData("webauthn.get", challenge[:]), a.data(a.flags, nil)
	said := sha256.Sum256(client)
	signature := a.sign(t, append(bytes.Clone(data), said[:]...))
	return Proof{Credential: c.ID, Assertion: &Assertion{b64(data), b64(client), b64(signature)}}
}

var challenge = []byte("a challenge of 32 bytes, at least")

func b64(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

// enrol registers a passkey of the authenticator.
func (a *authenticator) enrol(t testing.TB) Credential {
	t.Helper()
	c, err := NewPasskey(challenge, testRP, testOrigin, a.create(challenge))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestPasskey(t *testing.T) {
	for _, kind := range []string{"ES256", "EdDSA"} {
		for range 200 { // some coordinates begin with zeros
			if kind == "EdDSA" {
				break
			}
			newAuthenticator(t, kind).enrol(t)
		}
		a := newAuthenticator(t, kind)
		c := a.enrol(t)
		if err := c.Check(); err != nil || c.ID != NewID(c.PublicKey) || c.RPID != testRP ||
			c.CredentialID != b64(a.id) {
			t.Fatalf("%+v, %v", c, err)
		}
		p := a.get(t, c, sampleText)
		v, err := c.Verify(ForSignIn, sampleText, p)
		if want := (Verified{SignCount: 41, Origin: testOrigin, Hardware: true}); err != nil || v != want {
			t.Fatalf("%s: %+v, want %+v, %v", kind, v, want, err)
		}
		for _, text := range []string{sampleText + "\n", strings.Replace(sampleText, "anna", "bert", 1)} {
			if _, err := c.Verify(ForSignIn, text, p); !errors.Is(err, ErrNotProven) {
				t.Errorf("%s: another text: %v", kind, err)
			}
		}
		if _, err := c.Verify(ForProposal, sampleText, p); !errors.Is(err, ErrNotProven) {
			t.Errorf("%s: another purpose: %v", kind, err)
		}
		for name, field := range map[string]func(*Assertion) *string{
			"authenticator data": func(a *Assertion) *string { return &a.AuthenticatorData },
			"client data":        func(a *Assertion) *string { return &a.ClientDataJSON },
			"signature":          func(a *Assertion) *string { return &a.Signature },
		} {
			raw := must(decode(*field(p.Assertion)))
			for i := range len(raw) + 1 {
				for _, bit := range []byte{1, 0x80} {
					changed := *p.Assertion
					b := bytes.Clone(raw)
					if i < len(raw) {
						b[i] ^= bit
					} else {
						b = append(b, bit)
					}
					*field(&changed) = b64(b)
					_, err := c.Verify(ForSignIn, sampleText, Proof{Credential: c.ID, Assertion: &changed})
					if !errors.Is(err, ErrNotProven) {
						t.Errorf("%s: byte %d of the %s changed: %v", kind, i, name, err)
					}
				}
			}
			changed := *p.Assertion
			*field(&changed) += "\n"
			_, err := c.Verify(ForSignIn, sampleText, Proof{Credential: c.ID, Assertion: &changed})
			if !errors.Is(err, ErrNotProven) {
				t.Errorf("%s: a line end after the %s: %v", kind, name, err)
			}
		}
		other := newAuthenticator(t, "ES256")
		if _, err := c.Verify(ForSignIn, sampleText, other.get(t, c, sampleText)); !errors.Is(err, ErrNotProven) {
			t.Errorf("%s: another authenticator: %v", kind, err)
		}
	}
}

// TestPasskeyRules breaks one rule at a time, under a valid signature.
func TestPasskeyRules(t *testing.T) {
	long := strings.Repeat("x", MaxProof)
	origin := func(value string) func(*authenticator) {
		return func(a *authenticator) { a.client["origin"] = value }
	}
	for name, test := range map[string]struct {
		change       func(*authenticator)
		make, assert bool // accepted after create, and after get
	}{
		"as it is":                {func(*authenticator) {}, true, true},
		"backed up":               {func(a *authenticator) { a.flags |= 0x18 }, true, true},
		"may be backed up":        {func(a *authenticator) { a.flags |= 0x08 }, true, true},
		"backed up, and can't be": {func(a *authenticator) { a.flags |= 0x10 }, false, false},
		"what browsers add": {func(a *authenticator) {
			a.client["other_keys_can_be_added_here"] = "do not compare"
		}, true, true},
		"extensions": {func(a *authenticator) {
			a.flags |= 0x80
			a.extensions = encodeCBOR(map[string]any{"credProtect": 2})
		}, true, true},
		"packed attestation": {func(a *authenticator) {
			a.format, a.statement = "packed", map[string]any{"alg": -7, "sig": []byte{1}}
		}, true, true},
		"unknown attestation": {func(a *authenticator) {
			a.format, a.statement = "acme", map[string]any{"x": 1}
		}, true, true},
		"another port":       {origin("https://localhost"), false, true},
		"the other ceremony": {func(a *authenticator) { a.ceremony = "webauthn.create" }, true, false},
		"the other one":      {func(a *authenticator) { a.ceremony = "webauthn.get" }, false, true},
		"no ceremony":        {func(a *authenticator) { a.ceremony = "x" }, false, false},
		"http":               {origin("http://localhost:7780"), false, false},
		"another host":       {origin("https://localhost.example:7780"), false, false},
		"a host below":       {origin("https://a.localhost:7780"), false, false},
		"a user":             {origin("https://localhost:7780@example"), false, false},
		"a path":             {origin(testOrigin + "/"), false, false},
		"port 0":             {origin("https://localhost:0"), false, false},
		"port +1":            {origin("https://localhost:+1"), false, false},
		"an empty port":      {origin("https://localhost:"), false, false},
		"no origin":          {func(a *authenticator) { delete(a.client, "origin") }, false, false},
		"a frame":            {func(a *authenticator) { a.client["crossOrigin"] = true }, false, false},
		"a frame of another": {func(a *authenticator) {
			a.client["topOrigin"] = "https://evil.example"
		}, false, false},
		"another relying party":  {func(a *authenticator) { a.rpID = "example.com" }, false, false},
		"no user":                {func(a *authenticator) { a.flags &^= 1 }, false, false},
		"user not verified":      {func(a *authenticator) { a.flags &^= 4 }, false, false},
		"data follow":            {func(a *authenticator) { a.extensions = []byte{0} }, false, false},
		"client data not text":   {func(a *authenticator) { a.client["origin"] = 1 }, false, false},
		"longer than an event":   {func(a *authenticator) { a.client["x"] = long }, true, false},
		"credential id too long": {func(a *authenticator) { a.id = make([]byte, 256) }, false, true},
		"longest credential id":  {func(a *authenticator) { a.id = make([]byte, 255) }, true, true},
		"no credential id":       {func(a *authenticator) { a.id = nil }, false, true},
		"ES384":                  {func(a *authenticator) { a.cose[3] = -35 }, false, true},
		"ES256 of another name":  {func(a *authenticator) { a.cose[3] = -9 }, false, true},
		"another curve":          {func(a *authenticator) { a.cose[-1] = 2 }, false, true},
		"RSA": {func(a *authenticator) {
			a.cose = map[int]any{1: 3, 3: -257, -1: make([]byte, 256), -2: []byte{1, 0, 1}}
		}, false, true},
		"not on the curve": {func(a *authenticator) { a.cose[-3] = make([]byte, 32) }, false, true},
	} {
		a := newAuthenticator(t, "ES256")
		c := a.enrol(t)
		test.change(a)
		made, err := NewPasskey(challenge, testRP, testOrigin, a.create(challenge))
		if (err == nil) != test.make || err != nil && !errors.Is(err, ErrNotProven) {
			t.Errorf("%s: create: %v", name, err)
		}
		if err == nil && (made.PublicKey != c.PublicKey || made.Check() != nil) {
			t.Errorf("%s: %+v", name, made)
		}
		_, err = c.Verify(ForSignIn, sampleText, a.get(t, c, sampleText))
		if (err == nil) != test.assert || err != nil && !errors.Is(err, ErrNotProven) {
			t.Errorf("%s: get: %v", name, err)
		}
	}
	a := newAuthenticator(t, "ES256")
	c := a.enrol(t)
	answer := a.create(challenge)
	swapped := bytes.Replace(answer, []byte(`"id":"`+b64(a.id)), []byte(`"id":"`+b64([]byte("another"))), 1)
	swapped = bytes.Replace(swapped, []byte(`"rawId":"`+b64(a.id)), []byte(`"rawId":"`+b64([]byte("another"))), 1)
	for name, err := range map[string]error{
		"another challenge":     second(NewPasskey([]byte("another"), testRP, testOrigin, answer)),
		"another relying party": second(NewPasskey(challenge, "example.com", "https://example.com", answer)),
		"another origin":        second(NewPasskey(challenge, testRP, "https://localhost:7781", answer)),
		"not JSON":              second(NewPasskey(challenge, testRP, testOrigin, answer[1:])),
		"nothing":               second(NewPasskey(challenge, testRP, testOrigin, nil)),
		"another credential id": second(NewPasskey(challenge, testRP, testOrigin, swapped)),
	} {
		if !errors.Is(err, ErrNotProven) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A further field in the COSE key changes nothing: the credential has the canonical form.
	a.cose[-100] = "more"
	if again, err := NewPasskey(challenge, testRP, testOrigin, a.create(challenge)); err != nil || again != c {
		t.Errorf("%+v, %v", again, err)
	}
	for name, change := range map[string]func(*Credential){
		"more in the key":  func(c *Credential) { c.PublicKey = b64(encodeCBOR(a.cose)); c.ID = NewID(c.PublicKey) },
		"a line end":       func(c *Credential) { c.PublicKey += "\n"; c.ID = NewID(c.PublicKey) },
		"no credential id": func(c *Credential) { c.CredentialID = "" },
		"no relying party": func(c *Credential) { c.RPID = "" },
		"an origin":        func(c *Credential) { c.RPID = "https://localhost" },
		"an SSH key":       func(c *Credential) { c.Kind = SSH },
	} {
		changed := c
		change(&changed)
		if err := changed.Check(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	ed := newAuthenticator(t, "EdDSA")
	ed.cose[3] = -19
	if _, err := NewPasskey(challenge, testRP, testOrigin, ed.create(challenge)); !errors.Is(err, ErrNotProven) {
		t.Errorf("EdDSA of another name: %v", err)
	}
	const rest = `"challenge":"%","origin":"https://localhost"}`
	for name, client := range map[string]string{
		"two types":     `{"type":"webauthn.create","type":"webauthn.get",` + rest,
		"another case":  `{"Type":"webauthn.get",` + rest,
		"two origins":   `{"type":"webauthn.get","origin":"https://localhost",` + rest,
		"not UTF-8":     `{"type":"webauthn.get","x":"` + "\xff" + `",` + rest,
		"data after it": `{"type":"webauthn.get",` + rest + `{}`,
	} {
		sum := sha256.Sum256([]byte(sampleText))
		said := []byte(strings.Replace(client, "%", b64(sum[:]), 1))
		digest, data := sha256.Sum256(said), a.data(5, nil)
		signature := a.sign(t, append(bytes.Clone(data), digest[:]...))
		p := Proof{Credential: c.ID, Assertion: &Assertion{b64(data), b64(said), b64(signature)}}
		if _, err := c.Verify(ForSignIn, sampleText, p); !errors.Is(err, ErrNotProven) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A name in another case is another field: the origin of the answer is the browser's.
	sum := sha256.Sum256([]byte(sampleText))
	said := fmt.Appendf(nil, `{"type":"webauthn.get","challenge":"%s","origin":"https://localhost","ORIGIN":"%s"}`,
		b64(sum[:]), testOrigin)
	digest, data := sha256.Sum256(said), a.data(5, nil)
	p := Proof{Credential: c.ID, Assertion: &Assertion{
		b64(data), b64(said), b64(a.sign(t, append(bytes.Clone(data), digest[:]...))),
	}}
	v, err := c.Verify(ForSignIn, sampleText, p)
	if want := (Verified{SignCount: 41, Origin: "https://localhost", Hardware: true}); err != nil || v != want {
		t.Errorf("two spellings of the origin: %+v, want %+v, %v", v, want, err)
	}
}

func second[T any](_ T, err error) error { return err }

func TestPasskeyOptions(t *testing.T) {
	c := newAuthenticator(t, "ES256").enrol(t)
	elsewhere := c
	elsewhere.RPID = "example.com"
	_, key := ed25519Person(t, 1)
	all := []Credential{key, c, elsewhere}
	var create struct {
		RP   struct{ ID, Name string }
		User struct {
			ID, Name, DisplayName string
		}
		Challenge        string
		PubKeyCredParams []struct {
			Type string
			Alg  int
		}
		ExcludeCredentials     []struct{ Type, ID string }
		AuthenticatorSelection struct{ UserVerification string }
		Attestation            string
	}
	text := PasskeyOptions(challenge, testRP, "countersign/a", "anna", all)
	if err := json.Unmarshal(text, &create); err != nil {
		t.Fatal(err)
	}
	const shown = "anna@countersign/a"
	if create.RP.ID != testRP || create.User.Name != shown || create.User.DisplayName != shown ||
		create.RP.Name != "countersign/a" ||
		len(must(decode(create.User.ID))) != 32 || create.Challenge != b64(challenge) ||
		len(create.PubKeyCredParams) != 2 ||
		create.PubKeyCredParams[0].Alg != -7 || create.PubKeyCredParams[1].Alg != -8 ||
		len(create.ExcludeCredentials) != 1 || create.ExcludeCredentials[0].ID != c.CredentialID ||
		create.AuthenticatorSelection.UserVerification != "required" || create.Attestation != "none" {
		t.Errorf("%s", text)
	}
	handle := create.User.ID
	text = PasskeyOptions(challenge, testRP, "countersign/a", "anna", all)
	if err := json.Unmarshal(text, &create); err != nil || create.User.ID == handle {
		t.Errorf("a second passkey replaces the first one on an authenticator: %s, %v", text, err)
	}
	var get struct {
		Challenge, RPID, UserVerification string
		AllowCredentials                  []struct{ Type, ID string }
	}
	text = PasskeyRequest(challenge, testRP, all)
	if err := json.Unmarshal(text, &get); err != nil {
		t.Fatal(err)
	}
	if get.Challenge != b64(challenge) || get.RPID != testRP || get.UserVerification != "required" ||
		len(get.AllowCredentials) != 1 || get.AllowCredentials[0].Type != "public-key" ||
		get.AllowCredentials[0].ID != c.CredentialID {
		t.Errorf("%s", text)
	}
}
