package hsm_test

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"countersign/hsm"
	"countersign/internal/keystore"
	"countersign/internal/keystore/keystoretest"

	"github.com/miekg/pkcs11"
)

var payments = keystore.Ref{Name: "payments", Version: 1}

// Short names for attributes and mechanisms.
var (
	attr          = pkcs11.NewAttribute
	ed25519OID    = []byte{6, 3, 0x2b, 0x65, 0x70} // DER
	edwardsKeygen = []*pkcs11.Mechanism{pkcs11.NewMechanism(0x1055, nil)}
)

// TestConformance runs the conformance suite of a keystore on SoftHSM.
func TestConformance(t *testing.T) {
	keystoretest.Run(t, func(t *testing.T) keystore.Store { return open(t, newToken(t)) })
}

// raw runs use with a session of its own on the token, as another program would. The store must be
// closed.
func raw(t *testing.T, c hsm.Config, use func(m *pkcs11.Ctx, s pkcs11.SessionHandle)) {
	t.Helper()
	m := pkcs11.New(c.Module)
	defer m.Destroy()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(m.Initialize())
	defer m.Finalize()
	slots, err := m.GetSlotList(true)
	must(err)
	s, err := m.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	must(err)
	must(m.Login(s, pkcs11.CKU_USER, "test-user-pin"))
	use(m, s)
}

// find returns the only object of a class.
func find(t *testing.T, m *pkcs11.Ctx, s pkcs11.SessionHandle, class uint) pkcs11.ObjectHandle {
	t.Helper()
	if err := m.FindObjectsInit(s, []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, class)}); err != nil {
		t.Fatal(err)
	}
	found, _, err := m.FindObjects(s, 10)
	if err != nil || len(found) != 1 {
		t.Fatalf("%d objects, %v", len(found), err)
	}
	m.FindObjectsFinal(s)
	return found[0]
}

// TestPrivateKeyCannotLeave tries to extract a key, or to extend its permitted uses, by every means
// of the token. The test acts as another program with the PIN.
func TestPrivateKeyCannotLeave(t *testing.T) {
	c := newToken(t)
	store := open(t, c)
	if _, err := store.Generate(t.Context(), payments, keystore.Ed25519, keystore.Tag{1}); err != nil {
		t.Fatal(err)
	}
	store.Close()
	raw(t, c, func(m *pkcs11.Ctx, s pkcs11.SessionHandle) {
		key := find(t, m, s, pkcs11.CKO_PRIVATE_KEY)
		if _, err := m.GetAttributeValue(s, key, []*pkcs11.Attribute{attr(pkcs11.CKA_VALUE, nil)}); err == nil {
			t.Error("the private key can be read")
		}
		for _, a := range []*pkcs11.Attribute{
			attr(pkcs11.CKA_EXTRACTABLE, true), attr(pkcs11.CKA_SENSITIVE, false),
			attr(pkcs11.CKA_DERIVE, true), attr(pkcs11.CKA_DECRYPT, true),
		} {
			if err := m.SetAttributeValue(s, key, []*pkcs11.Attribute{a}); err == nil {
				t.Errorf("attribute %#x of the private key can be changed", a.Type)
			}
		}
		if err := m.SignInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)}, key); err == nil {
			t.Error("the key can be used with another mechanism")
		}
		params := pkcs11.NewECDH1DeriveParams(pkcs11.CKD_NULL, nil, make([]byte, 32))
		derive := pkcs11.NewMechanism(pkcs11.CKM_ECDH1_DERIVE, params)
		if _, err := m.DeriveKey(s, []*pkcs11.Mechanism{derive}, key, nil); err == nil {
			t.Error("a signing key can derive")
		}
	})
}

// TestKeysSurviveReopening opens a token again and finds the same key.
func TestKeysSurviveReopening(t *testing.T) {
	c := newToken(t)
	store := open(t, c)
	made, err := store.Generate(t.Context(), payments, keystore.Ed25519, keystore.Tag{1})
	if err != nil {
		t.Fatal(err)
	}
	store.Close()
	if _, err := made.Sign(t.Context(), []byte("m"), nil); !errors.Is(err, keystore.ErrUnavailable) {
		t.Errorf("after Close: %v", err)
	}
	store = open(t, c)
	defer store.Close()
	found, err := store.Key(t.Context(), payments)
	if err != nil {
		t.Fatal(err)
	}
	sig, err := found.Sign(t.Context(), []byte("m"), nil)
	if err != nil || !ed25519.Verify(made.Info().PublicKey, []byte("m"), sig) {
		t.Errorf("the key is another after reopening: %v", err)
	}
}

// TestUnfitObjects makes objects with the appliance's labels and without the required protection.
// The store must not use these objects.
func TestUnfitObjects(t *testing.T) {
	edwards := []*pkcs11.Attribute{
		attr(pkcs11.CKA_KEY_TYPE, 0x40), attr(pkcs11.CKA_TOKEN, true),
		attr(pkcs11.CKA_LABEL, "countersign/payments/1"),
	}
	pair := func(m *pkcs11.Ctx, s pkcs11.SessionHandle, privateID byte, private ...*pkcs11.Attribute) error {
		pub := []*pkcs11.Attribute{attr(pkcs11.CKA_EC_PARAMS, ed25519OID), attr(pkcs11.CKA_ID, []byte{1})}
		pub = append(pub, edwards...)
		prv := append(append([]*pkcs11.Attribute{attr(pkcs11.CKA_ID, []byte{privateID})}, edwards...), private...)
		_, _, err := m.GenerateKeyPair(s, edwardsKeygen, pub, prv)
		return err
	}
	safe := []*pkcs11.Attribute{
		attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, false), attr(pkcs11.CKA_PRIVATE, true),
	}
	for _, tc := range []struct {
		name string
		make func(m *pkcs11.Ctx, s pkcs11.SessionHandle) error
		want error
	}{
		{"extractable", func(m *pkcs11.Ctx, s pkcs11.SessionHandle) error {
			return pair(m, s, 1, attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, true))
		}, keystore.ErrUnfit},
		{"not sensitive", func(m *pkcs11.Ctx, s pkcs11.SessionHandle) error {
			return pair(m, s, 1, attr(pkcs11.CKA_SENSITIVE, false), attr(pkcs11.CKA_EXTRACTABLE, false))
		}, keystore.ErrUnfit},
		{"halves of two pairs", func(m *pkcs11.Ctx, s pkcs11.SessionHandle) error {
			return pair(m, s, 2, safe...)
		}, keystore.ErrUnfit},
		{"half a pair", func(m *pkcs11.Ctx, s pkcs11.SessionHandle) error {
			if err := pair(m, s, 1, safe...); err != nil {
				return err
			}
			return m.DestroyObject(s, find(t, m, s, pkcs11.CKO_PUBLIC_KEY))
		}, keystore.ErrUnfit},
		{"two pairs under one label", func(m *pkcs11.Ctx, s pkcs11.SessionHandle) error {
			return errors.Join(pair(m, s, 1, safe...), pair(m, s, 1, safe...))
		}, keystore.ErrAmbiguous},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newToken(t)
			open(t, c).Close()
			raw(t, c, func(m *pkcs11.Ctx, s pkcs11.SessionHandle) {
				if err := tc.make(m, s); err != nil {
					t.Fatal(err)
				}
			})
			store := open(t, c)
			defer store.Close()
			if _, err := store.Key(t.Context(), payments); !errors.Is(err, tc.want) {
				t.Errorf("Key: %v, want %v", err, tc.want)
			}
			if infos, err := store.Keys(t.Context()); err != nil || len(infos) != 0 {
				t.Errorf("Keys: %v, %v", infos, err)
			}
			_, err := store.Generate(t.Context(), payments, keystore.Ed25519, keystore.Tag{1})
			if !errors.Is(err, keystore.ErrExists) {
				t.Errorf("Generate: %v", err)
			}
			// Destroy must not remove objects with another tag.
			if err := store.Destroy(t.Context(), payments, keystore.Tag{1}); err != nil {
				t.Fatal(err)
			}
			if _, err := store.Key(t.Context(), payments); !errors.Is(err, tc.want) {
				t.Errorf("after Destroy with another tag: %v, want %v", err, tc.want)
			}
		})
	}
}

// TestHalfAKeyIsClearedAway checks that Destroy removes the remains of a crash during Generate, by
// the tag.
func TestHalfAKeyIsClearedAway(t *testing.T) {
	c := newToken(t)
	store := open(t, c)
	if _, err := store.Generate(t.Context(), payments, keystore.Ed25519, keystore.Tag{7}); err != nil {
		t.Fatal(err)
	}
	store.Close()
	raw(t, c, func(m *pkcs11.Ctx, s pkcs11.SessionHandle) {
		if err := m.DestroyObject(s, find(t, m, s, pkcs11.CKO_PUBLIC_KEY)); err != nil {
			t.Fatal(err)
		}
	})
	store = open(t, c)
	defer store.Close()
	if err := store.Destroy(t.Context(), payments, keystore.Tag{7}); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Generate(t.Context(), payments, keystore.Ed25519, keystore.Tag{8}); err != nil {
		t.Errorf("Generate after Destroy: %v", err)
	}
}

// TestTokenPulledOut removes the token from a running store. The store returns ErrUnavailable in
// bounded time, and recovers with the return of the token.
func TestTokenPulledOut(t *testing.T) {
	c := newToken(t)
	store := open(t, c)
	defer store.Close()
	key, err := store.Generate(t.Context(), payments, keystore.Ed25519, keystore.Tag{1})
	if err != nil {
		t.Fatal(err)
	}
	tokens := filepath.Join(filepath.Dir(c.PINFile), "tokens")
	if err := os.Rename(tokens, tokens+".away"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for range 5 {
		if _, err := key.Sign(ctx, []byte("m"), nil); !errors.Is(err, keystore.ErrUnavailable) {
			t.Fatalf("without the token: %v, want %v", err, keystore.ErrUnavailable)
		}
	}
	if err := os.Rename(tokens+".away", tokens); err != nil {
		t.Fatal(err)
	}
	for {
		sig, err := key.Sign(ctx, []byte("m"), nil)
		if err == nil {
			if !ed25519.Verify(key.Info().PublicKey, []byte("m"), sig) {
				t.Error("a wrong signature after healing")
			}
			return
		}
		if ctx.Err() != nil || !errors.Is(err, keystore.ErrUnavailable) {
			t.Fatalf("the token is back and the store has not healed: %v", err)
		}
	}
}

// TestLoggedOutBehindOurBack ends the login of the whole process without the store's knowledge, as
// another user of the module in the same process would.
func TestLoggedOutBehindOurBack(t *testing.T) {
	store := open(t, newToken(t))
	defer store.Close()
	key, err := store.Generate(t.Context(), payments, keystore.Ed25519, keystore.Tag{1})
	if err != nil {
		t.Fatal(err)
	}
	store.LogOut()
	sig, err := key.Sign(t.Context(), []byte("m"), nil)
	if err != nil || !ed25519.Verify(key.Info().PublicKey, []byte("m"), sig) {
		t.Errorf("after a logout: %v", err)
	}
}

// TestWrongPINIsTriedOnce checks that the store never sends a refused PIN again.
func TestWrongPINIsTriedOnce(t *testing.T) {
	c := newToken(t)
	write(t, c.PINFile, "wrong-pin\n")
	_, err := hsm.Open(t.Context(), c)
	if !errors.Is(err, keystore.ErrAuth) {
		t.Fatalf("%v, want %v", err, keystore.ErrAuth)
	}
	if strings.Contains(err.Error(), "wrong-pin") {
		t.Error("the error tells the PIN")
	}
	// After a refused PIN the store makes no further login, even with a new content of the PIN
	// file.
	write(t, c.PINFile, "test-user-pin\n")
	store := open(t, c)
	defer store.Close()
	key, err := store.Generate(t.Context(), payments, keystore.Ed25519, keystore.Tag{1})
	if err != nil {
		t.Fatal(err)
	}
	write(t, c.PINFile, "wrong-pin\n")
	store.LogOut()
	if _, err := key.Sign(t.Context(), []byte("m"), nil); !errors.Is(err, keystore.ErrAuth) {
		t.Fatalf("%v, want %v", err, keystore.ErrAuth)
	}
	write(t, c.PINFile, "test-user-pin\n")
	if _, err := key.Sign(t.Context(), []byte("m"), nil); !errors.Is(err, keystore.ErrAuth) {
		t.Errorf("asked again: %v, want %v", err, keystore.ErrAuth)
	}
}

// TestOpenRefuses checks the errors of Open for a faulty configuration. An error must not quote a
// PIN.
func TestOpenRefuses(t *testing.T) {
	good := newToken(t)
	dir := filepath.Dir(good.PINFile)
	loose := filepath.Join(dir, "loose-pin")
	if err := os.WriteFile(loose, []byte("test-user-pin"), 0o644); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "empty-pin"), "\n")
	write(t, filepath.Join(dir, "two-lines"), "a\nb\n")
	for _, tc := range []struct {
		name   string
		change func(*hsm.Config)
		want   string
	}{
		{"no such token", func(c *hsm.Config) { c.URI = "pkcs11:token=other" }, "no token matches"},
		{"wrong serial", func(c *hsm.Config) { c.URI += ";serial=0000" }, "no token matches"},
		{"not a URI", func(c *hsm.Config) { c.URI = "countersign" }, "pkcs11"},
		{"unknown attribute", func(c *hsm.Config) { c.URI = "pkcs11:tokn=x" }, "tokn"},
		{"an object's attribute", func(c *hsm.Config) { c.URI += ";object=x" }, "object"},
		{"the PIN itself", func(c *hsm.Config) { c.URI += "?pin-value=p-i-n" }, "pin_file"},
		{"the PIN itself, shouted", func(c *hsm.Config) { c.URI += "?PIN-VALUE=p-i-n" }, "pin_file"},
		{"the PIN as its source", func(c *hsm.Config) { c.URI += "?pin-source=p-i-n" }, "pin-source"},
		{"unknown query", func(c *hsm.Config) { c.URI += "?x=y" }, `"x"`},
		{"slot-id", func(c *hsm.Config) { c.URI += ";slot-id=x" }, "slot-id"},
		{"module twice", func(c *hsm.Config) { c.URI += "?module-path=/x.so" }, "exactly one of module"},
		{"no module", func(c *hsm.Config) { c.Module = "" }, "exactly one of module"},
		{"module missing", func(c *hsm.Config) { c.Module = "/nowhere.so" }, "/nowhere.so"},
		{"module is no library", func(c *hsm.Config) { c.Module = loose }, "file too short"},
		{"module without PKCS#11", func(c *hsm.Config) { c.Module = library(t, "int x;") },
			"undefined symbol: C_GetFunctionList"},
		{"module without its own library", func(c *hsm.Config) { c.Module = orphan(t) }, "libabsent.so: cannot open"},
		{"module without a list", func(c *hsm.Config) {
			c.Module = library(t, "unsigned long C_GetFunctionList(void *list) { return 5; }")
		}, "gives no list"},
		{"no PIN file", func(c *hsm.Config) { c.PINFile = filepath.Join(dir, "none") }, "PIN file"},
		{"PIN file open to all", func(c *hsm.Config) { c.PINFile = loose }, "chmod 600"},
		{"PIN file empty", func(c *hsm.Config) { c.PINFile = filepath.Join(dir, "empty-pin") }, "one line"},
		{"PIN file with two lines", func(c *hsm.Config) { c.PINFile = filepath.Join(dir, "two-lines") }, "one line"},
	} {
		c := good
		tc.change(&c)
		s, err := hsm.Open(t.Context(), c)
		if err == nil {
			s.Close()
			t.Errorf("%s: opened", tc.name)
		} else if text := err.Error(); !strings.Contains(text, tc.want) || strings.Contains(text, "p-i-n") ||
			strings.Contains(text, "\n") {
			t.Errorf("%s: %v; want it to name %q", tc.name, err, tc.want)
		}
	}
	soPIN := filepath.Join(dir, "so-pin")
	if err := hsm.InitToken(t.Context(), good, soPIN); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("a second token of the same name: %v", err)
	}
	other := good
	other.URI = "pkcs11:token=other;serial=1"
	err := hsm.InitToken(t.Context(), other, soPIN)
	if err == nil || !strings.Contains(err.Error(), "no attribute but token") {
		t.Errorf("a new token with a serial: %v", err)
	}
	// The same configuration with module and PIN file in the URI.
	c := good
	c.URI += "?module-path=" + c.Module + "&pin-source=file:" + c.PINFile
	c.Module, c.PINFile = "", ""
	open(t, c).Close()
}

// library compiles a shared object.
func library(t *testing.T, source string, flags ...string) string {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "library.c"), source)
	out := filepath.Join(dir, "library.so")
	args := append([]string{"-shared", "-fPIC", "-o", out, filepath.Join(dir, "library.c")}, flags...)
	gcc := exec.Command("gcc", args...)
	if text, err := gcc.CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, text)
	}
	return out
}

// orphan compiles a shared object that needs libabsent.so, which is not there.
func orphan(t *testing.T) string {
	absent := library(t, "int y;", "-Wl,-soname,libabsent.so")
	return library(t, "extern int y; int *x = &y;", absent)
}

// TestPaddingHasNoMeaning: blanks at the end of an attribute of the URI are those of CK_TOKEN_INFO
// and CK_SLOT_INFO, for each attribute. InitToken makes no second token of a name.
func TestPaddingHasNoMeaning(t *testing.T) {
	c := newToken(t)
	var slot pkcs11.SlotInfo
	var token pkcs11.TokenInfo
	raw(t, c, func(m *pkcs11.Ctx, s pkcs11.SessionHandle) {
		info, err := m.GetSessionInfo(s)
		if err != nil {
			t.Fatal(err)
		}
		slot, _ = m.GetSlotInfo(info.SlotID)
		token, _ = m.GetTokenInfo(info.SlotID)
	})
	for name, value := range map[string]string{
		"token": token.Label, "manufacturer": token.ManufacturerID, "model": token.Model, "serial": token.SerialNumber,
		"slot-description": slot.SlotDescription, "slot-manufacturer": slot.ManufacturerID,
	} {
		for _, padding := range []string{"", "%20", "%20%20%00"} {
			c.URI = "pkcs11:token=countersign%20test"
			if name == "token" {
				c.URI = "pkcs11:serial=" + token.SerialNumber
			}
			c.URI += ";" + name + "=" + url.PathEscape(value) + padding
			store, err := hsm.Open(t.Context(), c)
			if err != nil {
				t.Errorf("%s: %v", c.URI, err)
				continue
			}
			store.Close()
		}
		c.URI = "pkcs11:" + name + "=%20" + url.PathEscape(value)
		if _, err := hsm.Open(t.Context(), c); !errors.Is(err, hsm.ErrNoToken) {
			t.Errorf("%s: %v, want %v", c.URI, err, hsm.ErrNoToken)
		}
	}
	c.URI = "pkcs11:token=blank%20"
	soPIN := filepath.Join(filepath.Dir(c.PINFile), "so-pin")
	if err := hsm.InitToken(t.Context(), c, soPIN); err != nil {
		t.Fatal(err)
	}
	if err := hsm.InitToken(t.Context(), c, soPIN); !errors.Is(err, keystore.ErrExists) {
		t.Errorf("a second time: %v, want %v", err, keystore.ErrExists)
	}
	open(t, c).Close()
}

// TestPublicObjectsDoNotCount has another program make objects under a key's label and CKA_ID, and
// under the label of the next key, without the PIN; and destroy the key's public object. The keys
// are used, compared, listed and made as before. Only objects that need the PIN count.
func TestPublicObjectsDoNotCount(t *testing.T) {
	c := newToken(t)
	store := open(t, c)
	var infos []keystore.Info
	for _, alg := range keystore.Algorithms {
		infos = append(infos, generate(t, store, string(alg), alg).Info())
	}
	store.Close()
	withoutPIN := func(use func(m *pkcs11.Ctx, s pkcs11.SessionHandle)) {
		raw(t, c, func(m *pkcs11.Ctx, s pkcs11.SessionHandle) {
			if err := m.Logout(s); err != nil {
				t.Fatal(err)
			}
			use(m, s)
		})
	}
	works := func(what string) {
		t.Helper()
		store := open(t, c)
		defer store.Close()
		faults, err := store.Compare(t.Context(), infos)
		if err != nil || len(faults) != len(infos) {
			t.Fatalf("%s: %v, %v", what, faults, err)
		}
		for i, info := range infos {
			if faults[i] != nil {
				t.Errorf("%s: Compare: %v", what, faults[i])
			}
			if key := store.Bind(info); info.Algorithm != keystore.X25519 {
				signs(t, key)
			} else if _, err := key.Exchange(t.Context(), [32]byte{9}); err != nil {
				t.Errorf("%s: Exchange: %v", what, err)
			}
		}
		if refs, err := store.Keys(t.Context()); err != nil || len(refs) != len(infos) {
			t.Errorf("%s: Keys: %v, %v", what, refs, err)
		}
	}
	withoutPIN(func(m *pkcs11.Ctx, s pkcs11.SessionHandle) {
		for _, class := range []uint{pkcs11.CKO_PUBLIC_KEY, pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_DATA} {
			for _, ref := range []string{"ed25519/1", "x25519/1", "p256/1", "ed25519/2"} {
				name, _, _ := strings.Cut(ref, "/")
				var tag keystore.Tag
				copy(tag[:], name)
				template := []*pkcs11.Attribute{
					attr(pkcs11.CKA_CLASS, class), attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_PRIVATE, false),
					attr(pkcs11.CKA_LABEL, "countersign/"+ref), attr(pkcs11.CKA_VALUE, make([]byte, 32)),
				}
				if class != pkcs11.CKO_DATA {
					template = append(template, attr(pkcs11.CKA_ID, tag[:]), attr(pkcs11.CKA_KEY_TYPE, 0x40),
						attr(pkcs11.CKA_EC_PARAMS, ed25519OID), attr(pkcs11.CKA_SENSITIVE, true))
				}
				if class == pkcs11.CKO_PUBLIC_KEY {
					point := append([]byte{4, 32}, infos[0].PublicKey...)
					template = append(template[:4], append(template[5:8], attr(pkcs11.CKA_EC_POINT, point))...)
				}
				if _, err := m.CreateObject(s, template); err != nil {
					t.Fatalf("class %d: %v", class, err)
				}
			}
		}
	})
	works("with objects of others")
	store = open(t, c)
	for i, info := range infos {
		if key, err := store.Key(t.Context(), info.Ref); err != nil || key.Info().Algorithm != infos[i].Algorithm ||
			!slices.Equal(key.Info().PublicKey, info.PublicKey) {
			t.Errorf("Key: %v", err)
		}
	}
	second := keystore.Ref{Name: "ed25519", Version: 2}
	if _, err := store.Key(t.Context(), second); !errors.Is(err, keystore.ErrNotFound) {
		t.Errorf("the next key: %v", err)
	}
	key, err := store.Generate(t.Context(), second, keystore.Ed25519, keystore.Tag{2})
	if err != nil {
		t.Fatal(err)
	}
	signs(t, key)
	infos = append(infos, key.Info())
	store.Close()
	withoutPIN(func(m *pkcs11.Ctx, s pkcs11.SessionHandle) {
		if err := m.FindObjectsInit(s, nil); err != nil {
			t.Fatal(err)
		}
		all, _, err := m.FindObjects(s, 100)
		if err != nil || len(all) < len(infos) {
			t.Fatalf("%d objects, %v", len(all), err)
		}
		m.FindObjectsFinal(s)
		for _, o := range all {
			if err := m.DestroyObject(s, o); err != nil {
				t.Fatal(err)
			}
		}
	})
	works("without public objects")
}

// TestOneListing compares 40 keys on a token with foreign objects. The calls of C_FindObjectsInit
// do not depend on the number of keys, and neither does the first use of each compared key need
// one.
func TestOneListing(t *testing.T) {
	s := newShim(t, 1)
	s.config.Sessions = 1
	store := open(t, s.config)
	defer store.Close()
	var infos []keystore.Info
	for i := range 40 {
		infos = append(infos, generate(t, store, fmt.Sprintf("key%d", i), keystore.Ed25519).Info())
	}
	store.Close()
	raw(t, s.config, func(m *pkcs11.Ctx, h pkcs11.SessionHandle) {
		for i := range 40 {
			public := []*pkcs11.Attribute{
				attr(pkcs11.CKA_EC_PARAMS, ed25519OID), attr(pkcs11.CKA_KEY_TYPE, 0x40), attr(pkcs11.CKA_TOKEN, true),
			}
			private := []*pkcs11.Attribute{
				attr(pkcs11.CKA_LABEL, strings.Repeat("foreign", i)), attr(pkcs11.CKA_KEY_TYPE, 0x40),
				attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_PRIVATE, true),
			}
			if _, _, err := m.GenerateKeyPair(h, edwardsKeygen, public, private); err != nil {
				t.Fatal(err)
			}
		}
	})
	store = open(t, s.config)
	defer store.Close()
	const findObjectsInit = 26
	before := s.count(findObjectsInit)
	faults, err := store.Compare(t.Context(), infos)
	if err != nil || len(faults) != len(infos) || slices.ContainsFunc(faults, func(f error) bool { return f != nil }) {
		t.Fatalf("%v, %v", faults, err)
	}
	for _, info := range infos {
		signs(t, store.Bind(info))
	}
	if n := s.count(findObjectsInit) - before; n != 1 {
		t.Errorf("%d searches", n)
	}
	refs, err := store.Keys(t.Context())
	if err != nil || len(refs) != len(infos) {
		t.Errorf("%d keys, %v", len(refs), err)
	}
}

// TestSlotsAreGivenBack checks that every operation returns its session to the pool, after success
// and after any failure.
func TestSlotsAreGivenBack(t *testing.T) {
	c := newToken(t)
	store := open(t, c)
	defer store.Close()
	key, err := store.Generate(t.Context(), payments, keystore.Ed25519, keystore.Tag{1})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 200 {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		switch {
		case i%3 == 0:
			cancel()
		case i%50 == 1:
			store.LogOut()
		case i%2 == 0:
			time.AfterFunc(100*time.Microsecond, cancel) // during the operation
		}
		key.Sign(ctx, []byte("m"), nil)
		cancel()
	}
	for deadline := time.Now().Add(10 * time.Second); store.IdleSessions() != c.Sessions; {
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d places are free", store.IdleSessions(), c.Sessions)
		}
		runtime.Gosched()
	}
	if _, err := key.Sign(t.Context(), []byte("m"), nil); err != nil {
		t.Error(err)
	}
}

// TestInterruptedInitToken checks that InitToken completes a token without a user PIN rather than
// refuse the token.
func TestInterruptedInitToken(t *testing.T) {
	c := newToken(t)
	c.URI = "pkcs11:token=half"
	first := hsm.Config{URI: "pkcs11:token=countersign%20test", Module: c.Module, PINFile: c.PINFile, Sessions: 1}
	open(t, first).Close()
	m := pkcs11.New(c.Module)
	if err := m.Initialize(); err != nil {
		t.Fatal(err)
	}
	slots, err := m.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.InitToken(slots[len(slots)-1], "test-so-pin", "half"); err != nil {
		t.Fatal(err)
	}
	m.Finalize()
	m.Destroy()
	if _, err := hsm.Open(t.Context(), c); !errors.Is(err, keystore.ErrUnavailable) {
		t.Errorf("without the user's PIN: %v, want %v", err, keystore.ErrUnavailable)
	}
	if err := hsm.InitToken(t.Context(), c, filepath.Join(filepath.Dir(c.PINFile), "so-pin")); err != nil {
		t.Fatal(err)
	}
	open(t, c).Close()
}

// TestHealsUnderLoad ends the login ten times while six goroutines sign without a pause. A caller
// gets a valid signature or ErrUnavailable and nothing else, and the store recovers each time
// without help.
func TestHealsUnderLoad(t *testing.T) {
	c := newToken(t)
	c.Sessions = 8
	store := open(t, c)
	defer store.Close()
	key, err := store.Generate(t.Context(), payments, keystore.Ed25519, keystore.Tag{1})
	if err != nil {
		t.Fatal(err)
	}
	sign := func() error {
		sig, err := key.Sign(t.Context(), []byte("m"), nil)
		if err == nil && !ed25519.Verify(key.Info().PublicKey, []byte("m"), sig) {
			t.Error("a wrong signature")
		}
		if err != nil && !errors.Is(err, keystore.ErrUnavailable) {
			t.Error(err)
		}
		return err
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 6 {
		wg.Go(func() {
			for ctx.Err() == nil {
				sign()
			}
		})
	}
	for range 10 {
		store.LogOut()
		deadline := time.Now().Add(20 * time.Second)
		for sign() != nil {
			if time.Now().After(deadline) {
				t.Fatal("the store does not recover")
			}
		}
	}
	cancel()
	wg.Wait()
}
