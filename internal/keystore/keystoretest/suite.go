// Package keystoretest has the conformance suite for the backends of package keystore, and an
// in-memory store for tests of the layers above. Begin reading at Run.
package keystoretest

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"countersign/internal/escrow"
	"countersign/internal/escrow/escrowtest"
	"countersign/internal/keystore"
)

// LowOrderPoints lists the encodings with a shared secret of zero, with the top bit clear and set.
func LowOrderPoints() (points [][32]byte) {
	low := [][32]byte{{}, {1},
		{0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a,
			0xda, 0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00},
		{0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef, 0x5b,
			0x04, 0x44, 0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f, 0x11, 0x57},
	}
	for _, first := range []byte{0xec, 0xed, 0xee} {
		p := [32]byte(slices.Repeat([]byte{0xff}, 32))
		p[0], p[31] = first, 0x7f
		low = append(low, p)
	}
	for _, p := range low {
		points = append(points, p)
		p[31] |= 0x80
		points = append(points, p)
	}
	return points
}

// tagOf gives each creation of the suite a tag of its own: the version, then the name.
func tagOf(name string, version uint32) (tag keystore.Tag) {
	tag[0] = byte(version)
	copy(tag[1:], name)
	return tag
}

// message returns a message that each signing key signs, also behind package form: a canary.
func message(text string) []byte {
	sum := sha256.Sum256([]byte(text))
	return append([]byte("countersign-canary-v1\x00"), sum[:]...)
}

var hello = message("hello")

// Run is the conformance suite. open returns an empty store, and Run closes the store.
func Run(t *testing.T, open func(*testing.T) keystore.Store) {
	store := func(t *testing.T) keystore.Store {
		s := open(t)
		t.Cleanup(func() {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
		return s
	}
	generate := func(t *testing.T, s keystore.Store, name string, version uint32, alg keystore.Algorithm) keystore.Key {
		t.Helper()
		k, err := s.Generate(t.Context(), keystore.Ref{Name: name, Version: version}, alg, tagOf(name, version))
		if err != nil {
			t.Fatal(err)
		}
		return k
	}

	t.Run("Sign", func(t *testing.T) {
		k := generate(t, store(t), "a", 1, keystore.Ed25519)
		for _, n := range []int{0, 1, 31, 32, 33, 64, 1000, 65000} {
			msg := make([]byte, n)
			rand.Read(msg)
			sig, err := k.Sign(t.Context(), msg, nil)
			if errors.Is(err, keystore.ErrForm) {
				continue // a key worker
			}
			if err != nil {
				t.Fatalf("%d bytes: %v", n, err)
			}
			if !ed25519.Verify(k.Info().PublicKey, msg, sig) {
				t.Errorf("%d bytes: the signature does not verify", n)
			}
			again, err := k.Sign(t.Context(), msg, nil)
			if err != nil || !slices.Equal(sig, again) {
				t.Errorf("%d bytes: not deterministic (%v)", n, err)
			}
		}
		if _, err := k.Exchange(t.Context(), [32]byte{9}); err == nil {
			t.Error("a signing key exchanges")
		}
	})

	t.Run("Judge", func(t *testing.T) {
		k := generate(t, store(t), "a", 1, keystore.Ed25519)
		judged := 0
		sig, err := k.Sign(t.Context(), hello, func(signature []byte) bool {
			judged++
			return !ed25519.Verify(k.Info().PublicKey, hello, signature) // rejects every valid signature
		})
		if !errors.Is(err, keystore.ErrUnavailable) || sig != nil || judged == 0 {
			t.Errorf("judged %d times, and returned %x, %v", judged, sig, err)
		}
		sig, err = k.Sign(t.Context(), hello, func(signature []byte) bool {
			return ed25519.Verify(k.Info().PublicKey, hello, signature)
		})
		// The store may need time for its recovery from the rejected signatures.
		end := time.Now().Add(20 * time.Second)
		for errors.Is(err, keystore.ErrUnavailable) && time.Now().Before(end) {
			sig, err = k.Sign(t.Context(), hello, nil)
		}
		if err != nil || len(sig) != ed25519.SignatureSize {
			t.Errorf("accepted, and returned %x, %v", sig, err)
		}
	})

	t.Run("SignBatch", func(t *testing.T) {
		s := store(t)
		batches, ok := s.(keystore.BatchSigner)
		if !ok {
			return // BatchSigner is optional
		}
		one, two := generate(t, s, "a", 1, keystore.Ed25519), generate(t, s, "a", 2, keystore.Ed25519)
		p256 := generate(t, s, "tls", 1, keystore.P256)
		absent := one.Info()
		absent.Ref, absent.Tag = keystore.Ref{Name: "absent", Version: 1}, keystore.Tag{99}
		for what, keys := range map[string][]keystore.Key{
			"none":              nil,
			"a single one":      {one},
			"different keys":    {one, two, p256, one, two},
			"one that is gone":  {one, s.Bind(absent), two},
			"one of no use":     {one, generate(t, s, "x", 1, keystore.X25519), two},
			"more than fits in": slices.Repeat([]keystore.Key{one, p256}, 40),
		} {
			for round := range 2 { // in the second round the store has the keys in its cache
				var batch []*keystore.Signing
				for i, k := range keys {
					message := fmt.Appendf(nil, "%s %d %d", what, round, i)
					batch = append(batch, &keystore.Signing{Key: k, Message: message})
				}
				batches.SignBatch(t.Context(), batch)
				for i, b := range batch {
					info := b.Key.Info()
					want := map[string]error{"absent": keystore.ErrNotFound, "x": keystore.ErrRefused}[info.Ref.Name]
					switch {
					case want != nil && !errors.Is(b.Err, want):
						t.Errorf("%s, number %d: %v", what, i, b.Err)
					case want == nil && (b.Err != nil || !info.Verify(b.Message, b.Signature)):
						t.Errorf("%s, number %d: %v, or it does not verify", what, i, b.Err)
					}
				}
			}
		}
	})

	t.Run("SignP256", func(t *testing.T) {
		k := generate(t, store(t), "tls", 1, keystore.P256)
		if n := len(k.Info().PublicKey); n != 65 {
			t.Fatalf("a public key of %d bytes", n)
		}
		for _, n := range []int{0, 1, 1000} {
			msg := make([]byte, n)
			rand.Read(msg)
			sig, err := k.Sign(t.Context(), msg, nil)
			if errors.Is(err, keystore.ErrForm) {
				continue // a key worker
			}
			if err != nil || !k.Info().Verify(msg, sig) {
				t.Errorf("%d bytes: %v, or it does not verify", n, err)
			}
			if k.Info().Verify(append(msg, 0), sig) {
				t.Errorf("%d bytes: it verifies for another message", n)
			}
		}
		if _, err := k.Exchange(t.Context(), [32]byte{9}); !errors.Is(err, keystore.ErrRefused) {
			t.Errorf("a signing key exchanges: %v", err)
		}
	})

	t.Run("Import", func(t *testing.T) {
		s := store(t)
		// The seed is a published test vector: RFC 8032, section 7.1, test 1.
		const seed = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
		const public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
		path := filepath.Join(t.TempDir(), "seed")
		raw, _ := hex.DecodeString(seed)
		coded := "keypair-seed:" + base64.RawURLEncoding.EncodeToString(raw)
		for i, content := range [][]byte{raw, []byte(seed + "\n"), []byte(coded + "\n")} {
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			ref := keystore.Ref{Name: "old", Version: uint32(i + 1)}
			k, err := s.Import(t.Context(), ref, path, keystore.Tag{byte(i + 1)})
			if err != nil {
				t.Fatal(err)
			}
			if hex.EncodeToString(k.Info().PublicKey) != public {
				t.Errorf("public key %x", k.Info().PublicKey)
			}
			want := ed25519.Sign(ed25519.NewKeyFromSeed(raw), hello)
			if sig, err := k.Sign(t.Context(), hello, nil); err != nil || !slices.Equal(sig, want) {
				t.Errorf("sign: %x, %v", sig, err)
			}
			found, err := s.Key(t.Context(), ref)
			if err != nil || found.Info().Provenance.Generated() || found.Info().Provenance.String() != "imported" {
				t.Errorf("an imported key is not marked as one: %+v, %v", found, err)
			}
		}
		old, bad := keystore.Ref{Name: "old", Version: 1}, keystore.Ref{Name: "bad", Version: 1}
		if _, err := s.Import(t.Context(), old, path, keystore.Tag{9}); !errors.Is(err, keystore.ErrExists) {
			t.Errorf("over an existing key: %v", err)
		}
		for name, content := range map[string]string{
			"short": seed[:62], "no hex": "zz" + seed[2:], "empty": "",
			"coded badly": "keypair-seed:!", "coded short": "keypair-seed:AAAA",
		} {
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := s.Import(t.Context(), bad, path, keystore.Tag{9})
			if err == nil || content != "" && strings.Contains(err.Error(), content) {
				t.Errorf("%s: %v", name, err)
			}
		}
		os.WriteFile(path, []byte(seed), 0o600)
		os.Chmod(path, 0o644)
		_, err := s.Import(t.Context(), bad, path, keystore.Tag{9})
		if err == nil || !strings.Contains(err.Error(), "chmod 600") {
			t.Errorf("a seed that all can read: %v", err)
		}
		if _, err := s.Key(t.Context(), bad); !errors.Is(err, keystore.ErrNotFound) {
			t.Errorf("a refused import has left something behind: %v", err)
		}
	})

	t.Run("Recoverable", func(t *testing.T) {
		s, can := store(t).(escrow.Store)
		if !can { // a device, which key workers use
			return
		}
		people := escrowtest.New(t, 2, "ann", "bob")
		to := people.Set
		use := func(k keystore.Key) {
			t.Helper()
			if k.Info().Algorithm == keystore.X25519 {
				exchanges(t, k)
			} else if sig, err := k.Sign(t.Context(), hello, nil); err != nil || !k.Info().Verify(hello, sig) {
				t.Errorf("sign with %v: %v", k.Info().Ref, err)
			}
		}
		for i, alg := range keystore.Algorithms {
			ref, tag := keystore.Ref{Name: "kept", Version: uint32(i + 1)}, keystore.Tag{7, byte(i)}
			k, envelope, err := s.Seal(t.Context(), ref, alg, tag, to)
			if errors.Is(err, keystore.ErrRefused) && alg == keystore.P256 {
				continue // a TPM makes such a key itself
			} else if err != nil {
				t.Fatal(err)
			}
			if i := k.Info(); !i.Custody.Recoverable() || i.Provenance.String() != "imported" || i.Ref != ref ||
				i.Tag != tag {
				t.Errorf("%+v", i)
			}
			use(k)
			if _, _, err := s.Seal(t.Context(), ref, alg, keystore.Tag{8}, to); !errors.Is(err, keystore.ErrExists) {
				t.Errorf("over an existing key: %v", err)
			}
			one := to
			one.Needed = 1
			other := keystore.Ref{Name: "other", Version: 1}
			if _, _, err := s.Seal(t.Context(), other, alg, keystore.Tag{8}, one); err == nil {
				t.Error("a key of which one holder has a copy")
			}
			if _, err := s.Key(t.Context(), other); !errors.Is(err, keystore.ErrNotFound) {
				t.Errorf("it was made: %v", err)
			}
			shares := people.Shares(t, envelope, 0, 1)
			if err := s.Destroy(t.Context(), ref, tag); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Open(t.Context(), tag, envelope, shares[:1]); err == nil {
				t.Error("one share opens the envelope")
			}
			if _, err := s.Key(t.Context(), ref); !errors.Is(err, keystore.ErrNotFound) {
				t.Errorf("one share makes the key: %v", err)
			}
			again, err := s.Open(t.Context(), tag, envelope, shares)
			if err != nil {
				t.Fatal(err)
			}
			use(again)
			use(s.Bind(k.Info()))
			if !bytes.Equal(again.Info().PublicKey, k.Info().PublicKey) || again.Info().Custody != k.Info().Custody {
				t.Errorf("%+v is back as %+v", k.Info(), again.Info())
			}
		}
	})

	t.Run("Bind", func(t *testing.T) {
		s := store(t)
		made := generate(t, s, "a", 1, keystore.Ed25519)
		k := s.Bind(made.Info())
		if sig, err := k.Sign(t.Context(), hello, nil); err != nil || !k.Info().Verify(hello, sig) {
			t.Errorf("bound by its description: %v", err)
		}
		// The name decides what a key may sign (package form), so the device must compare the name,
		// also after uses of the key under the right name.
		renamed := made.Info()
		renamed.Ref.Name = "raw-a"
		if _, err := s.Bind(renamed).Sign(t.Context(), hello, nil); err == nil {
			t.Error("a key has signed under another name")
		}
		exchanging := made.Info()
		exchanging.Algorithm = keystore.X25519
		if _, err := s.Bind(exchanging).Exchange(t.Context(), [32]byte{9}); err == nil {
			t.Error("a signing key has exchanged")
		}
		other := made.Info()
		other.PublicKey = slices.Repeat([]byte{7}, 32)
		if _, err := s.Bind(other).Sign(t.Context(), hello, nil); err == nil {
			t.Error("another key than the one that was asked for has signed")
		}
		absent := made.Info()
		absent.Ref.Version, absent.Tag = 2, keystore.Tag{2}
		if _, err := s.Bind(absent).Sign(t.Context(), hello, nil); !errors.Is(err, keystore.ErrNotFound) {
			t.Errorf("a key that is not there: %v, want %v", err, keystore.ErrNotFound)
		}
	})

	t.Run("Inspect", func(t *testing.T) {
		s := store(t)
		generate(t, s, "a", 1, keystore.Ed25519)
		for _, prove := range []bool{false, true} {
			found, err := s.Inspect(t.Context(), prove)
			if err != nil || len(found) == 0 {
				t.Fatalf("%v, %v", found, err)
			}
			for _, f := range found {
				if !f.OK || !prove && f.What == "proof" {
					t.Errorf("%+v", f)
				}
			}
		}
		if refs, err := s.Keys(t.Context()); err != nil || len(refs) != 1 {
			t.Errorf("it has left keys behind: %v, %v", refs, err)
		}
	})

	t.Run("Exchange", func(t *testing.T) {
		k := generate(t, store(t), "a", 1, keystore.X25519)
		for range 20 {
			exchanges(t, k)
		}
		for _, p := range LowOrderPoints() {
			if _, err := k.Exchange(t.Context(), p); !errors.Is(err, keystore.ErrPeerKey) {
				t.Errorf("low order %x: %v, want %v", p, err, keystore.ErrPeerKey)
			}
		}
		if _, err := k.Sign(t.Context(), hello, nil); err == nil {
			t.Error("an exchange key signs")
		}
	})

	t.Run("Find", func(t *testing.T) {
		s := store(t)
		made := generate(t, s, "a", 1, keystore.Ed25519)
		other := generate(t, s, "a", 2, keystore.Ed25519)
		if slices.Equal(made.Info().PublicKey, other.Info().PublicKey) {
			t.Error("two keys are one")
		}
		found, err := s.Key(t.Context(), keystore.Ref{Name: "a", Version: 1})
		if err != nil {
			t.Fatal(err)
		}
		info := found.Info()
		if !slices.Equal(info.PublicKey, made.Info().PublicKey) || info.Ref.String() != "a/1" ||
			info.Algorithm != keystore.Ed25519 || info.Custody == "" {
			t.Errorf("found %+v, made %+v", info, made.Info())
		}
		p := made.Info().Provenance
		if p.Generated() == p.Unreported || info.Provenance.Generated() != p.Generated() || info.Tag != tagOf("a", 1) {
			t.Errorf("provenance of a key made here: %+v, and found %+v", p, info)
		}
		for _, ref := range []keystore.Ref{{Name: "a", Version: 3}, {Name: "b", Version: 1}} {
			if _, err := s.Key(t.Context(), ref); !errors.Is(err, keystore.ErrNotFound) {
				t.Errorf("%v: %v, want %v", ref, err, keystore.ErrNotFound)
			}
		}
		generate(t, s, "noise", 1, keystore.X25519)
		refs, err := s.Keys(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, ref := range refs {
			names = append(names, ref.String())
		}
		slices.Sort(names)
		if !slices.Equal(names, []string{"a/1", "a/2", "noise/1"}) {
			t.Errorf("Keys: %q", names)
		}
	})

	t.Run("Compare", func(t *testing.T) {
		s := store(t)
		first := generate(t, s, "a", 1, keystore.Ed25519).Info()
		absent, tagged, other := first, first, first
		absent.Ref.Version = 2
		tagged.Tag = keystore.Tag{99}
		other.Algorithm = keystore.X25519
		all := []keystore.Info{first, absent, tagged, generate(t, s, "noise", 1, keystore.X25519).Info(), other,
			generate(t, s, "tls", 1, keystore.P256).Info()}
		want := []error{nil, keystore.ErrNotFound, keystore.ErrUnfit, nil, keystore.ErrUnfit, nil}
		for _, most := range []int{1, len(all)} { // a store may have a way for few keys, and one for many
			for i := 0; i < len(all); {
				faults, err := s.Compare(t.Context(), all[i:min(len(all), i+most)])
				if err != nil || len(faults) == 0 || len(faults) > most {
					t.Fatalf("%v, %v", faults, err)
				}
				for _, fault := range faults {
					if (fault == nil) != (want[i] == nil) || !errors.Is(fault, want[i]) {
						t.Errorf("number %d: %v, want %v", i, fault, want[i])
					}
					i++
				}
			}
		}
		if faults, err := s.Compare(t.Context(), nil); err != nil || len(faults) > 0 {
			t.Errorf("no keys: %v, %v", faults, err)
		}
	})

	t.Run("GenerateRefuses", func(t *testing.T) {
		s := store(t)
		first := generate(t, s, "a", 1, keystore.Ed25519)
		ref := keystore.Ref{Name: "a", Version: 1}
		_, err := s.Generate(t.Context(), ref, keystore.Ed25519, keystore.Tag{1})
		if !errors.Is(err, keystore.ErrExists) {
			t.Errorf("an existing name: %v", err)
		}
		if k, err := s.Key(t.Context(), ref); err != nil || !slices.Equal(k.Info().PublicKey, first.Info().PublicKey) {
			t.Errorf("the refused generation has changed the key: %v", err)
		}
		if _, err := s.Generate(t.Context(), keystore.Ref{Name: "b", Version: 1}, "rsa", keystore.Tag{1}); err == nil {
			t.Error("an unknown algorithm is accepted")
		}
	})

	t.Run("Destroy", func(t *testing.T) {
		s := store(t)
		ref := keystore.Ref{Name: "a", Version: 1}
		k := generate(t, s, "a", 1, keystore.Ed25519)
		generate(t, s, "a", 11, keystore.Ed25519)
		if err := s.Destroy(t.Context(), ref, keystore.Tag{2}); err != nil {
			t.Fatal(err)
		}
		if _, err := k.Sign(t.Context(), hello, nil); err != nil {
			t.Errorf("destroyed with the tag of another creation: %v", err)
		}
		for range 2 { // the second time no object is left
			if err := s.Destroy(t.Context(), ref, tagOf("a", 1)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := s.Key(t.Context(), ref); !errors.Is(err, keystore.ErrNotFound) {
			t.Errorf("after Destroy: %v", err)
		}
		if _, err := k.Sign(t.Context(), hello, nil); err == nil {
			t.Error("a destroyed key signs")
		}
		if _, err := s.Key(t.Context(), keystore.Ref{Name: "a", Version: 11}); err != nil {
			t.Errorf("another key went with it: %v", err)
		}
		generate(t, s, "a", 1, keystore.Ed25519)
	})

	t.Run("Context", func(t *testing.T) {
		k := generate(t, store(t), "a", 1, keystore.Ed25519)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := k.Sign(ctx, hello, nil); !errors.Is(err, keystore.ErrUnavailable) {
			t.Errorf("with an ended context: %v, want %v", err, keystore.ErrUnavailable)
		}
		if _, err := k.Sign(t.Context(), hello, nil); err != nil {
			t.Errorf("afterwards: %v", err)
		}
	})

	t.Run("Concurrent", func(t *testing.T) {
		s := store(t)
		sign, exchange := generate(t, s, "a", 1, keystore.Ed25519), generate(t, s, "b", 1, keystore.X25519)
		peer, err := ecdh.X25519().GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		var wg sync.WaitGroup
		for g := range 16 {
			wg.Go(func() {
				for i := range 25 {
					msg := message(fmt.Sprint(g, i))
					sig, err := sign.Sign(ctx, msg, nil)
					if err != nil || !ed25519.Verify(sign.Info().PublicKey, msg, sig) {
						t.Errorf("sign: %v", err)
						return
					}
					if _, err := exchange.Exchange(ctx, [32]byte(peer.PublicKey().Bytes())); err != nil {
						t.Errorf("exchange: %v", err)
						return
					}
				}
			})
		}
		wg.Wait()
	})
}

// exchanges compares a shared secret of a key with that of the other side.
func exchanges(t *testing.T, k keystore.Key) {
	t.Helper()
	public, err := ecdh.X25519().NewPublicKey(k.Info().PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	peer, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	want, err := peer.ECDH(public)
	if err != nil {
		t.Fatal(err)
	}
	got, err := k.Exchange(t.Context(), [32]byte(peer.PublicKey().Bytes()))
	if err != nil || !slices.Equal(got[:], want) {
		t.Fatalf("%x, %v; want %x", got, err, want)
	}
}
