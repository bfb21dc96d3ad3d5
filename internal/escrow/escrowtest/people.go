// Package escrowtest has recovery holders for tests, with their private keys.
package escrowtest

import (
	"bytes"
	"io"
	"testing"

	"countersign/internal/escrow"
	"countersign/internal/scantest"

	"filippo.io/age"
)

// People are a set of holders, and the private keys of each.
type People struct {
	Set  escrow.Set
	Keys [][]age.Identity
}

// New makes the first set of an appliance, whose holders have keys of age.
func New(t testing.TB, needed int, names ...string) (p People) {
	t.Helper()
	p.Set = escrow.Set{Number: 1, Needed: needed}
	for _, name := range names {
		id, err := age.GenerateX25519Identity()
		if err != nil {
			t.Fatal(err)
		}
		scantest.Secret("the private key of the holder "+name, []byte(id.String()))
		h, err := escrow.NewHolder(name, id.Recipient().String())
		if err != nil {
			t.Fatal(err)
		}
		p.Set.Holders, p.Keys = append(p.Set.Holders, h), append(p.Keys, []age.Identity{id})
	}
	return p
}

// Shares opens the shares of some holders in an envelope, by number from 0.
func (p People) Shares(t testing.TB, envelope []byte, who ...int) (lines []string) {
	t.Helper()
	e, err := escrow.ParseEnvelope(envelope)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range who {
		lines = append(lines, Share(t, e.Shares[i], p.Keys[i]...))
	}
	return lines
}

// Share opens a share with private keys, of which one is its holder's.
func Share(t testing.TB, s escrow.Sealed, with ...age.Identity) string {
	t.Helper()
	r, err := age.Decrypt(bytes.NewReader(s.Sealed), with...)
	if err != nil {
		t.Fatal(err)
	}
	line, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(line)
}
