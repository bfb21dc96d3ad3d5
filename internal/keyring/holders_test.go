package keyring_test

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/escrow"
	"countersign/internal/escrow/escrowtest"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/keystore/keystoretest"
	"countersign/internal/ledger"
	"countersign/internal/manage"
)

// newSet makes holders, and keeps their private keys in the rig.
func (r *rig) newSet(t *testing.T, needed int, names ...string) escrow.Set {
	t.Helper()
	p := escrowtest.New(t, needed, names...)
	p.Set.Number = r.Keys.Holders().Number + 1
	r.identities = append(r.identities, slices.Concat(p.Keys...)...)
	return p.Set
}

func (r *rig) setHolders(t *testing.T, needed int, names ...string) {
	t.Helper()
	if err := r.Keys.SetHolders(t.Context(), approved, r.newSet(t, needed, names...)); err != nil {
		t.Fatal(err)
	}
}

func (r *rig) createRecoverable(t *testing.T, name string) {
	t.Helper()
	n := keyring.NewKey{Name: name, Token: "memory", Recoverable: true}
	if _, err := r.Keys.Create(t.Context(), operator, n); err != nil {
		t.Fatal(err)
	}
}

// opens opens an envelope with the private keys of all holders.
func (r *rig) opens(t *testing.T, envelope []byte) (e escrow.Envelope) {
	t.Helper()
	e, err := escrow.ParseEnvelope(envelope)
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, s := range e.Shares {
		lines = append(lines, escrowtest.Share(t, s, r.identities...))
	}
	if _, err := escrow.Open(envelope, lines[:e.Needed]); err != nil {
		t.Error(err)
	}
	return e
}

// checkEnvelopes checks the promises about the versions of a line: all are recoverable, or none is,
// and each envelope opens to the key of the version.
func (r *rig) checkEnvelopes(t *testing.T, versions []*keyring.Key) {
	t.Helper()
	for _, k := range versions {
		recoverable := versions[0].Info().Custody.Recoverable()
		if k.Info().Custody.Recoverable() != recoverable {
			t.Errorf("%v is %s, and version 1 %s", k.Ref(), k.Info().Custody, versions[0].Info().Custody)
		}
		if has := len(k.Envelope) > 0; has != (recoverable && k.State != keyring.Destroyed) {
			t.Errorf("%v, %s: an envelope: %v", k.Ref(), k.State, has)
		} else if !has {
			continue
		}
		if e := r.opens(t, k.Envelope); e.Key != k.Ref() {
			t.Errorf("%v has the envelope of %v", k.Ref(), e.Key)
		}
		named := func(e audit.Event) bool { return e.Metadata["envelope"] == escrow.Digest(k.Envelope) }
		if !slices.ContainsFunc(r.log(t, 0), named) {
			t.Errorf("no event names the envelope of %v", k.Ref())
		}
	}
}

// TestRecoverableLine: each version of a line is sealed for the holders of its time, and the ledger
// has its envelope until the version is destroyed.
func TestRecoverableLine(t *testing.T) {
	r := newRig(t)
	_, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: "vault", Recoverable: true})
	if !errors.Is(err, manage.ErrConflict) || !strings.Contains(err.Error(), "holders set") {
		t.Errorf("without holders: %v", err)
	}
	r.setHolders(t, 2, "ann", "bob")
	imported := keyring.NewKey{Name: "vault", Recoverable: true, Seed: "/seed"}
	if _, err := r.Keys.Create(t.Context(), operator, imported); !errors.Is(err, manage.ErrInvalid) {
		t.Errorf("an import: %v", err)
	}
	r.createRecoverable(t, "vault")
	r.checkKey(t, "vault")
	first := r.Keys.Version("vault", 1).Envelope
	r.setHolders(t, 3, "cy", "dan", "eve", "fay")
	r.rotate(t, "vault", time.Now())
	r.rotate(t, "vault", time.Now())
	r.checkKey(t, "vault")
	for version, want := range []uint32{1, 1, 2, 2} {
		k := r.Keys.Version("vault", uint32(version+1))
		if e := r.opens(t, k.Envelope); e.Set != want || e.Needed != int(want)+1 {
			t.Errorf("%v is sealed for set %d", k.Ref(), e.Set)
		}
	}
	refs := func() (all []string) {
		for _, k := range keyring.Recoverable(r.Keys.All()) {
			all = append(all, k.Ref().String())
		}
		return all
	}
	if got := refs(); !slices.Equal(got, []string{"vault/1", "vault/2", "vault/3", "vault/4"}) {
		t.Errorf("recoverable are %v", got)
	}
	r.reopen(t)
	r.checkKey(t, "vault")
	if s := r.Keys.Holders(); s.Number != 2 || s.Needed != 3 || len(s.Holders) != 4 {
		t.Errorf("%+v", s)
	}
	if !bytes.Equal(r.Keys.Version("vault", 1).Envelope, first) {
		t.Error("an envelope has changed")
	}
	r.archive(t, "vault", 1)
	r.destroy(t, "vault", 1)
	r.checkKey(t, "vault")
	if got := refs(); !slices.Equal(got, []string{"vault/2", "vault/3", "vault/4"}) {
		t.Errorf("after a destruction, recoverable are %v", got)
	}
	var sealed []string
	if err := r.ledger.View(func(v ledger.View) error {
		all, _, err := keyring.ReadRecorded(v)
		for _, k := range all {
			if k.Returns() {
				sealed = append(sealed, k.Ref.String())
			}
		}
		return err
	}); err != nil || !slices.Equal(sealed, refs()) {
		t.Errorf("a closed ledger has %v, %v", sealed, err)
	}
	r.checkKey(t, "payments") // none of its versions is recoverable
}

// TestRecoverySuccessorOfARecoverableLine: what a line becomes by a recovery is recoverable, too.
func TestRecoverySuccessorOfARecoverableLine(t *testing.T) {
	r := newRig(t, func(r *rig) {
		r.more = map[string]keystore.Store{}
		withSafe(r)
		r.more["safe"] = keystoretest.Sealing{Store: r.more["safe"], Memory: r.store}
	})
	r.setHolders(t, 2, "ann", "bob")
	r.createRecoverable(t, "vault")
	if err := r.Keys.MakeRecovery(t.Context(), approved, "vault", "safe"); err != nil {
		t.Fatal(err)
	}
	versions, err := r.Keys.Versions("vault")
	if err != nil || len(versions) != 4 {
		t.Fatalf("%v, %v", versions, err)
	}
	r.checkEnvelopes(t, versions)
}

// TestRecoverableOwnKeys: with holders from the beginning, the appliance's own keys are
// recoverable, and so are their later versions. Later nobody names holders without approval.
func TestRecoverableOwnKeys(t *testing.T) {
	r := newRig(t)
	err := r.Keys.FirstHolders(t.Context(), operator, r.newSet(t, 2, "ann", "bob"))
	if !errors.Is(err, manage.ErrConflict) {
		t.Errorf("with a key: %v", err)
	}
	r.setHolders(t, 2, "ann", "bob")
	for _, name := range []string{keyring.NoiseName, keyring.LogName, keyring.AdminName} {
		if _, err := r.Keys.CreateOwnRecoverable(t.Context(), operator, name, "memory"); err != nil {
			t.Fatal(err)
		}
	}
	r.rotate(t, keyring.NoiseName, time.Now())
	if _, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{
		Name: "tls", Token: "memory", Algorithm: keystore.P256, Recoverable: true,
	}); err != nil {
		t.Fatal(err)
	}
	r.rotate(t, "tls", time.Now())
	for name, want := range map[string]int{keyring.NoiseName: 2, keyring.LogName: 1, keyring.AdminName: 1, "tls": 2} {
		versions, err := r.Keys.Versions(name)
		if err != nil || len(versions) != want {
			t.Fatalf("%s: %v, %v", name, versions, err)
		}
		r.checkEnvelopes(t, versions)
		if !versions[0].Info().Custody.Recoverable() {
			t.Errorf("%s is %s", name, versions[0].Info().Custody)
		}
	}
}

// TestSetHolders: a set needs approval, is the next one, and another than the present one.
func TestSetHolders(t *testing.T) {
	r := newRig(t)
	set := r.newSet(t, 2, "ann", "bob")
	if err := r.Keys.SetHolders(t.Context(), operator, set); !errors.Is(err, manage.ErrNotApproved) {
		t.Errorf("without approval: %v", err)
	}
	one := set
	one.Needed = 1
	if err := r.Keys.SetHolders(t.Context(), approved, one); !errors.Is(err, manage.ErrInvalid) {
		t.Errorf("one holder is enough: %v", err)
	}
	if err := r.Keys.SetHolders(t.Context(), approved, set); err != nil {
		t.Fatal(err)
	}
	e := r.last(t, audit.HoldersChanged)
	if e.Metadata["number"] != "1" || e.Metadata["needed"] != "2" ||
		e.Metadata["holder_2"] != "bob "+set.Holders[1].Recipient {
		t.Errorf("%+v", e)
	}
	other, same := r.newSet(t, 2, "cy", "dan"), set
	other.Number, same.Number = 1, 2
	for name, s := range map[string]escrow.Set{"the same number": other, "the same holders": same} {
		if err := r.Keys.SetHolders(t.Context(), approved, s); !errors.Is(err, manage.ErrConflict) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := r.count(t, audit.HoldersChanged); n != 1 {
		t.Errorf("%d events", n)
	}
}

// TestSealFails: a token that can't seal leaves no key behind.
func TestSealFails(t *testing.T) {
	r := newRig(t, withTokens("plain"))
	r.setHolders(t, 2, "ann", "bob")
	_, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: "vault", Token: "plain", Recoverable: true})
	if !errors.Is(err, keystore.ErrRefused) {
		t.Errorf("a token that takes no seed: %v", err)
	}
	r.store.BeforeGenerate = func(ref keystore.Ref) error {
		if ref.Version == 2 {
			return keystore.ErrUnavailable
		}
		return nil
	}
	_, err = r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: "vault", Token: "memory", Recoverable: true})
	if !errors.Is(err, keystore.ErrUnavailable) {
		t.Errorf("no successor: %v", err)
	}
	r.store.BeforeGenerate = nil
	r.matches(t)
	r.wantStates(t, "vault", "")
	r.createRecoverable(t, "vault")
}
