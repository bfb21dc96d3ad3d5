package main

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"countersign/appliance"
	"countersign/audit"
	"countersign/internal/backup"
	"countersign/internal/escrow"
	"countersign/internal/escrow/escrowtest"
	"countersign/internal/form"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/keystore/keystoretest"
	"countersign/internal/ledger"
	"countersign/internal/ledger/ledgertest"
	"countersign/internal/scantest"
	"countersign/internal/secret"
	"countersign/policy"
)

// newLedger makes a ledger that the test closes.
func newLedger(t *testing.T) *ledger.Ledger {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ledger.db")
	if err := ledger.Create(path, ledger.Options{}); err != nil {
		t.Fatal(err)
	}
	l, err := ledgertest.Open(t, path, ledger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// TestCompareKeys: a restored appliance whose keys are not those of the manifest fails a drill, by
// a public key or by an envelope. A key that was destroyed after the backup is none of them.
func TestCompareKeys(t *testing.T) {
	rules, err := policy.Parse("policy.cedar", nil)
	if err != nil {
		t.Fatal(err)
	}
	store := keystoretest.NewMemory()
	tokens := map[string]keystore.Store{"memory": keystoretest.Sealing{Store: form.Guard(store, nil), Memory: store}}
	config := appliance.Config{Limits: appliance.DefaultLimits()}
	a, err := appliance.New(t.Context(), config, newLedger(t), tokens, rules, scantest.Log())
	if err != nil {
		t.Fatal(err)
	}
	who := audit.Actor{Kind: "operator", Name: "test", Proposal: 1}
	if err := a.Keys.SetHolders(t.Context(), who, escrowtest.New(t, 2, "ann", "bob").Set); err != nil {
		t.Fatal(err)
	}
	for _, recoverable := range []bool{false, true} {
		n := keyring.NewKey{Name: fmt.Sprintf("key-%v", recoverable), Recoverable: recoverable}
		if _, err := a.Keys.Create(t.Context(), who, n); err != nil {
			t.Fatal(err)
		}
	}
	all := a.Keys.All()
	manifest := func() (keys []backup.Key) {
		for _, k := range all {
			m := backup.Key{Ref: k.Ref(), PublicKey: hex.EncodeToString(k.Info().PublicKey)}
			if len(k.Envelope) > 0 {
				m.Envelope = escrow.Digest(k.Envelope)
			}
			keys = append(keys, m)
		}
		return keys
	}
	sealed := slices.IndexFunc(manifest(), func(m backup.Key) bool { return m.Envelope != "" })
	if err := compareKeys(manifest(), all); err != nil || sealed < 0 {
		t.Fatalf("the keys of the manifest: %v, %d", err, sealed)
	}
	for name, change := range map[string]func(m []backup.Key, restored []*keyring.Key){
		"another public key": func(m []backup.Key, _ []*keyring.Key) { m[0].PublicKey = m[1].PublicKey },
		"no such key":        func(m []backup.Key, _ []*keyring.Key) { m[0].Ref.Name = "other" },
		"another envelope":   func(m []backup.Key, _ []*keyring.Key) { m[sealed].Envelope = escrow.Digest(nil) },
		"no envelope":        func(_ []backup.Key, restored []*keyring.Key) { restored[sealed].Envelope = nil },
		"the envelope of another key": func(m []backup.Key, restored []*keyring.Key) {
			restored[sealed].Envelope = restored[sealed+1].Envelope
			m[sealed].Envelope = m[sealed+1].Envelope
		},
		"a damaged envelope": func(m []backup.Key, restored []*keyring.Key) {
			restored[sealed].Envelope = []byte("{}")
			m[sealed].Envelope = escrow.Digest([]byte("{}"))
		},
	} {
		m, restored := manifest(), []*keyring.Key{}
		for _, k := range all {
			one := *k
			restored = append(restored, &one)
		}
		change(m, restored)
		if err := compareKeys(m, restored); err == nil {
			t.Errorf("%s: the keys are alike", name)
		}
	}
	destroyed := *all[sealed]
	destroyed.State, destroyed.Envelope = keyring.Destroyed, nil
	if err := compareKeys(manifest()[sealed:sealed+1], []*keyring.Key{&destroyed}); err != nil {
		t.Errorf("destroyed after the backup: %v", err)
	}
}

// sealed makes an envelope of payments/1.
func sealed(t *testing.T, to escrow.Set) []byte {
	t.Helper()
	seed := make([]byte, 32)
	rand.Read(seed)
	envelope, err := escrow.Seal(keystore.Ref{Name: "payments", Version: 1}, keystore.Ed25519, secret.New(seed), to)
	if err != nil {
		t.Fatal(err)
	}
	return envelope
}

// TestCompareHolders: a key that is sealed for others than the log says, or whose envelope no event
// names, fails a drill.
func TestCompareHolders(t *testing.T) {
	approved := escrowtest.New(t, 2, "ann", "bob", "cy").Set
	fewer, others, later := approved, approved, approved
	fewer.Holders = approved.Holders[:2]
	others.Holders = slices.Concat(approved.Holders[:2], escrowtest.New(t, 1, "cy").Set.Holders)
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
		"nobody at first": {escrowtest.New(t, 2, "eve", "mal").Set, true, "other holders"},
	} {
		l := newLedger(t)
		k := &keyring.Key{Name: "payments", Version: 1, Envelope: sealed(t, c.to)}
		events := []audit.Event{audit.NewHoldersChanged(audit.Daemon(), 1, 2, approved.Texts())}
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
	}
}
