package main

import (
	"crypto/rand"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"countersign/audit"
	"countersign/internal/escrow"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/ledger/ledgertest"
	"countersign/internal/secret"

	"filippo.io/age"
)

// TestCompareHolders: a key that is sealed for others than the log says, or whose envelope no event
// names, fails a drill.
func TestCompareHolders(t *testing.T) {
	set := func(names ...string) (s escrow.Set) {
		s.Number, s.Needed = 1, 2
		for _, name := range names {
			id, err := age.GenerateX25519Identity()
			if err != nil {
				t.Fatal(err)
			}
			s.Holders = append(s.Holders, escrow.Holder{Name: name, Recipient: id.Recipient().String()})
		}
		return s
	}
	approved := set("ann", "bob", "cy")
	seal := func(to escrow.Set) *keyring.Key {
		seed := make([]byte, 32)
		rand.Read(seed)
		ref := keystore.Ref{Name: "payments", Version: 1}
		envelope, err := escrow.Seal(ref, keystore.Ed25519, secret.New(seed), to)
		if err != nil {
			t.Fatal(err)
		}
		return &keyring.Key{Name: ref.Name, Version: ref.Version, Envelope: envelope}
	}
	fewer := approved
	fewer.Holders = approved.Holders[:2]
	others := approved
	others.Holders = append(append([]escrow.Holder{}, approved.Holders[:2]...), set("cy").Holders...)
	later := approved
	later.Number = 2
	for name, c := range map[string]struct {
		to    escrow.Set
		named bool
		want  string
	}{
		"as approved":     {approved, true, ""},
		"no event":        {approved, false, "no event names the envelope"},
		"fewer holders":   {fewer, true, "other holders"},
		"another key":     {others, true, "other holders"},
		"an unknown set":  {later, true, "other holders"},
		"nobody at first": {set("eve", "mal"), true, "other holders"},
	} {
		path := filepath.Join(t.TempDir(), "ledger.db")
		if err := ledger.Create(path, ledger.Options{}); err != nil {
			t.Fatal(err)
		}
		l, err := ledgertest.Open(t, path, ledger.Options{})
		if err != nil {
			t.Fatal(err)
		}
		var holders []string
		for _, h := range approved.Holders {
			holders = append(holders, h.Name+" "+h.Recipient)
		}
		k := seal(c.to)
		events := []audit.Event{audit.NewHoldersChanged(audit.Daemon(), 1, 2, holders)}
		if c.named {
			facts := audit.KeyFacts{Envelope: escrow.Digest(k.Envelope)}
			events = append(events, audit.NewKeyCreated(audit.Daemon(), "payments/1", facts, false))
		}
		for _, e := range events {
			if _, err := l.Append(t.Context(), ledger.EventOf(e)); err != nil {
				t.Fatal(err)
			}
		}
		got := fmt.Sprint(compareHolders(l, []*keyring.Key{k}))
		if c.want == "" && got != "<nil>" || !strings.Contains(got, c.want) {
			t.Errorf("%s: %s, want %q", name, got, c.want)
		}
		l.Close()
	}
}
