package keyring_test

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"countersign/appliance"
	"countersign/internal/form"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/keystore/keystoretest"
	"countersign/internal/ledger"
	"countersign/internal/manage"
)

// TestSuccessorIsMissing: without a version that does not sign now, the appliance starts, signs,
// names the version, and does not rotate to a missing one. A missing active version costs the key
// alone.
func TestSuccessorIsMissing(t *testing.T) {
	r := newRig(t)
	second, third := keystore.Ref{Name: "payments", Version: 2}, keystore.Ref{Name: "payments", Version: 3}
	r.store.Remove(second)
	r.reopen(t)
	r.condition(t, appliance.Degraded, "payments/2")
	if s := r.sign(t, r.shop, message(1, "m")); s.Version != 1 {
		t.Errorf("version %d signs", s.Version)
	}
	_, err := r.Keys.Rotate(t.Context(), operator, "payments", time.Now())
	refused(t, keystore.ErrNotFound, err)
	r.wantStates(t, "payments", "active pending")

	r = newRig(t)
	r.rotate(t, "payments", time.Now())
	r.store.Remove(keystore.Ref{Name: "payments", Version: 1})
	r.reopen(t)
	r.condition(t, appliance.Degraded, "payments/1")
	next := r.rotate(t, "payments", time.Now().Add(time.Hour))
	r.store.Remove(third)
	r.reopen(t)
	r.condition(t, appliance.Degraded, "payments/3")
	refused(t, keystore.ErrNotFound, r.Keys.Activate(t.Context(), operator, next))
	if s := r.sign(t, r.shop, message(1, "m")); s.Version != 2 {
		t.Errorf("version %d signs", s.Version)
	}
	r.store.Remove(second)
	if _, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: "other"}); err != nil {
		t.Fatal(err)
	}
	r.reopen(t)
	r.condition(t, appliance.Degraded, "key payments/2, which is active, is not on token memory")
	other, err := r.Keys.Signing("other")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.Sign(t.Context(), keyring.Own, form.NewCanary(), nil); err != nil {
		t.Errorf("another key of the token: %v", err)
	}
}

// late is a token that does not answer while err is set, and has no Noise key while lacks is set.
type late struct {
	*keystoretest.Memory
	err   atomic.Pointer[error]
	lacks atomic.Bool
}

func (l *late) Compare(ctx context.Context, infos []keystore.Info) ([]error, error) {
	if err := l.err.Load(); err != nil {
		return nil, *err
	}
	if l.lacks.Load() && infos[0].Ref.Name == keyring.NoiseName {
		return []error{keystore.ErrNotFound}, nil
	}
	return l.Memory.Compare(ctx, infos[:1])
}

// TestTokenComesLate: the ring opens without a token, with the keys of the token there. The keys
// are compared when the token comes, and a fault that is mended goes away.
func TestTokenComesLate(t *testing.T) {
	for _, class := range []error{keystore.ErrUnavailable, keystore.ErrAuth} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t)
			r.createOwn(t, keyring.NoiseName)
			token := &late{Memory: r.store}
			config := r.Keys.Config
			config.Tokens = map[string]keystore.Store{"memory": form.Guard(token, nil)}
			away := fmt.Errorf("unplugged: %w", class)
			token.err.Store(&away)
			ring, err := keyring.Open(t.Context(), config)
			if err != nil {
				t.Fatal(err)
			}
			if k := ring.Version("payments", 1); k == nil || k.State != keyring.Active {
				t.Errorf("%+v", k)
			}
			refused(t, class, ring.Listening())
			if all := ring.Causes(); len(all) > 0 {
				t.Errorf("%v", all)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			go ring.KeepCompared(ctx)
			look := func() { time.Sleep(2 * time.Second); synctest.Wait() } // of the fake clock
			look()
			refused(t, class, ring.Listening())
			token.lacks.Store(true)
			token.err.Store(nil)
			look()
			refused(t, keystore.ErrNotFound, ring.Listening())
			token.lacks.Store(false)
			ring.RetryNow()
			look()
			if err := ring.Listening(); err != nil || len(ring.Causes()) > 0 {
				t.Errorf("%v, %v", err, ring.Causes())
			}
		})
	}
}

// noiseOnly is a token that lists no keys but the Noise key.
type noiseOnly struct {
	*keystoretest.Memory
	compared []string
}

func (n *noiseOnly) Compare(ctx context.Context, infos []keystore.Info) ([]error, error) {
	for _, info := range infos {
		n.compared = append(n.compared, info.Ref.Name)
	}
	if infos[0].Ref.Name != keyring.NoiseName {
		return nil, fmt.Errorf("%w: the listing takes too long", keystore.ErrUnavailable)
	}
	return n.Memory.Compare(ctx, infos)
}

// TestNoiseFirst: the Noise key is compared by itself and before all other keys, so that peers can
// connect while the token can't list the others.
func TestNoiseFirst(t *testing.T) {
	r := newRig(t)
	r.createOwn(t, keyring.NoiseName)
	token := &noiseOnly{Memory: r.store}
	config := r.Keys.Config
	config.Tokens = map[string]keystore.Store{"memory": form.Guard(token, nil)}
	ring, err := keyring.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	if len(token.compared) < 2 || token.compared[0] != keyring.NoiseName {
		t.Errorf("compared: %q", token.compared)
	}
	if err := ring.Listening(); err != nil {
		t.Error(err)
	}
}

// TestTokenIsGone: a version that is out of use does not need its token in the configuration; every
// other version does.
func TestTokenIsGone(t *testing.T) {
	r := newRig(t)
	r.rotate(t, "payments", time.Now())
	move := func(version uint32) error {
		state := r.Keys.Version("payments", version).State
		if err := r.ledger.Update(t.Context(), func(tx *ledger.Tx) error {
			return keyring.Rewrite(tx, keystore.Ref{Name: "payments", Version: version}, "old", state)
		}); err != nil {
			t.Fatal(err)
		}
		r.ledger.Close()
		return r.tryOpen(t)
	}
	r.archive(t, "payments", 1)
	r.reopen(t)
	if err := move(1); err != nil {
		t.Errorf("an archived one: %v", err)
	}
	if _, err := r.Keys.Version("payments", 1).Sign(t.Context(), keyring.Own, nil, nil); err == nil {
		t.Error("it signs")
	}
	refused(t, manage.ErrNotFound, r.Keys.Destroy(t.Context(), approved, "payments", 1))
	r.reopen(t)
	refused(t, manage.ErrNotFound, move(3)) // a successor
}

// TestUnfinishedOnAnotherToken: the remains of a creation do not keep the appliance from starting.
func TestUnfinishedOnAnotherToken(t *testing.T) {
	r := newRig(t)
	if err := r.ledger.Update(t.Context(), func(tx *ledger.Tx) error {
		return keyring.PutUnfinished(tx, keystore.Ref{Name: "other", Version: 1}, "old")
	}); err != nil {
		t.Fatal(err)
	}
	r.reopen(t)
}

// TestRecordIsDeleted: memory follows the deletion of a record too. No act deletes the record of a
// version that was made, but Follow promises as much.
func TestRecordIsDeleted(t *testing.T) {
	r := newRig(t)
	k := r.rotate(t, "payments", time.Now())
	if err := r.ledger.Update(t.Context(), func(tx *ledger.Tx) error {
		return tx.Delete(ledger.Keys, k.Ref().String())
	}); err != nil {
		t.Fatal(err)
	}
	r.wantStates(t, "payments", "verify-only pending")
	_, err := r.Keys.Signing("payments")
	refused(t, keyring.ErrNotActive, err)
}

func TestTwoActive(t *testing.T) {
	r := newRig(t)
	r.rotate(t, "payments", time.Now())
	if err := r.ledger.Update(t.Context(), func(tx *ledger.Tx) error {
		return keyring.Rewrite(tx, keystore.Ref{Name: "payments", Version: 1}, "memory", keyring.Active)
	}); err != nil {
		t.Fatal(err)
	}
	r.ledger.Close()
	if err := r.tryOpen(t); err == nil {
		t.Error("two versions are active")
	}
}

// liar is a device that answers with zeros.
type liar struct{ keystore.Key }

func (liar) Exchange(context.Context, [32]byte) (shared [32]byte, err error) { return shared, nil }

// TestProve: a key that the device has shown to have is not missing, and zeros show nothing.
func TestProve(t *testing.T) {
	r := newRig(t)
	r.createOwn(t, keyring.NoiseName)
	noise, next := r.Keys.Version(keyring.NoiseName, 1), r.Keys.Version("payments", 2)
	for _, k := range []*keyring.Key{noise, next} {
		r.Keys.Lose(k.Ref(), "it is missing")
		r.condition(t, appliance.Degraded, "it is missing")
		if err := r.Keys.Prove(t.Context(), k); err != nil {
			t.Error(err)
		}
		r.condition(t, appliance.Operational, "")
	}
	lies := noise.On(func(k keystore.Key) keystore.Key { return liar{k} })
	if err := r.Keys.Prove(t.Context(), lies); !errors.Is(err, keystore.ErrWrong) {
		t.Errorf("%v", err)
	}
	r.store.Corrupt = func(b []byte) []byte { b[0]++; return b }
	if err := r.Keys.Prove(t.Context(), next); !errors.Is(err, keystore.ErrWrong) {
		t.Errorf("%v", err)
	}
	if uses := next.Uses(); uses != 0 {
		t.Errorf("proving counts as %d uses", uses)
	}
}
