package eddsa

import (
	"crypto/ed25519"
	"math/rand/v2"
	"testing"

	"filippo.io/edwards25519"
)

// scalars are edges of the recoding, and random ones.
func scalars(t *testing.T) (all []*edwards25519.Scalar) {
	t.Helper()
	for _, b := range []byte{0, 1, 127, 128, 129, 255} {
		for _, at := range []int{0, 1, 30} {
			raw := make([]byte, 32)
			raw[at] = b
			s, err := edwards25519.NewScalar().SetCanonicalBytes(raw)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, s)
		}
	}
	filled := make([]byte, 32)
	for i := range 31 {
		filled[i] = 0x80
	}
	carries, err := edwards25519.NewScalar().SetCanonicalBytes(filled)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 31 {
		filled[i] = 0xff
	}
	ones, err := edwards25519.NewScalar().SetCanonicalBytes(filled)
	if err != nil {
		t.Fatal(err)
	}
	all = append(all, carries, ones, minusOne)
	random := rand.NewChaCha8([32]byte{1})
	for range 200 {
		wide := make([]byte, 64)
		random.Read(wide)
		s, err := edwards25519.NewScalar().SetUniformBytes(wide)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, s)
	}
	return all
}

// TestTable compares multiplications by tables with those of edwards25519, for points of prime
// order.
func TestTable(t *testing.T) {
	all := scalars(t)
	for i := range 3 {
		p := new(edwards25519.Point).ScalarBaseMult(all[len(all)-1-i])
		table := newTable(p)
		for j, s := range all {
			k := all[(j*7+i)%len(all)]
			want := new(edwards25519.Point).VarTimeDoubleScalarBaseMult(k, p, s).Bytes()
			if got := table.combination(s, k); string(got[:]) != string(want) {
				t.Fatalf("[%x]B + [%x]P: %x, want %x", s.Bytes(), k.Bytes(), got, want)
			}
		}
	}
}

// TestSmallOrders finds the eight points of small order.
func TestSmallOrders(t *testing.T) {
	if len(smallOrders) != 8 {
		t.Errorf("%d points", len(smallOrders))
	}
	for encoded := range smallOrders {
		p, err := new(edwards25519.Point).SetBytes(encoded[:])
		if err != nil || string(p.Bytes()) != string(encoded[:]) || !smallOrder(p) {
			t.Errorf("%x: %v", encoded, err)
		}
	}
}

// withTables gives a key its table, and takes all tables away at the end of the test.
func withTables(t testing.TB, k *PublicKey) {
	tables.Lock()
	k.keep(newTable(&k.minus))
	tables.Unlock()
	t.Cleanup(func() {
		tables.Lock()
		defer tables.Unlock()
		for _, each := range tables.keys {
			each.table.Store(nil)
		}
		tables.keys = nil
	})
}

// TestTablesAreBounded gives tables to more keys than may have one.
func TestTablesAreBounded(t *testing.T) {
	var keys []*PublicKey
	for i := range maxTables + 3 {
		public := ed25519.NewKeyFromSeed(append(make([]byte, 31), byte(i))).Public().(ed25519.PublicKey)
		k, err := ParsePublicKey(public)
		if err != nil {
			t.Fatal(err)
		}
		k.uses.Store(uint64(1000 - i))
		withTables(t, k)
		keys = append(keys, k)
	}
	has := 0
	for _, k := range keys {
		if k.table.Load() != nil {
			has++
		}
	}
	if has != maxTables || len(tables.keys) != maxTables || keys[0].table.Load() == nil {
		t.Errorf("%d keys have tables, %d are counted", has, len(tables.keys))
	}
}

func BenchmarkVerify(b *testing.B) {
	key := ed25519.NewKeyFromSeed(make([]byte, 32))
	public := key.Public().(ed25519.PublicKey)
	message := make([]byte, 300)
	signature := ed25519.Sign(key, message)
	k, err := ParsePublicKey(public)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("crypto/ed25519", func(b *testing.B) {
		for b.Loop() {
			ed25519.Verify(public, message, signature)
		}
	})
	b.Run("parsed", func(b *testing.B) {
		for b.Loop() {
			k.uses.Store(0)
			k.Verify(message, signature)
		}
	})
	b.Run("table", func(b *testing.B) {
		withTables(b, k)
		for b.Loop() {
			k.Verify(message, signature)
		}
	})
	b.Run("make", func(b *testing.B) {
		for b.Loop() {
			newTable(&k.minus)
		}
	})
}
