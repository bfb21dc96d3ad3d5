package keyring_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign/appliance"
	"countersign/audit"
	"countersign/internal/cause"
	"countersign/internal/form"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/keystore/keystoretest"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/peers"
	"countersign/transcript"
	"countersign/wire"
)

// TestCompromise: from that moment the version signs nothing and is not believed, and its successor
// follows, at once or when the device can.
func TestCompromise(t *testing.T) {
	r := newRig(t)
	first := r.sign(t, r.shop, message(1, "m"))
	refused(t, manage.ErrNotApproved, r.Keys.Compromise(t.Context(), operator, "payments", 1, "stolen"))
	// A request has chosen version 1, and is in front of its admission when the compromise is
	// written.
	k, err := r.Keys.Signing("payments")
	if err != nil {
		t.Fatal(err)
	}
	r.store.BeforeGenerate = func(keystore.Ref) error { return keystore.ErrUnavailable }
	r.compromise(t, "payments", 1)
	r.store.BeforeGenerate = nil
	refused(t, keyring.ErrNotActive, r.Keys.MayUse(k))
	r.wantStates(t, "payments", "compromised pending")
	_, err = r.Sign(t.Context(), r.shop, message(2, "m"))
	refused(t, keyring.ErrNotActive, err)
	_, err = r.Sign(t.Context(), r.shop, message(1, "m"))
	refused(t, keyring.ErrNotActive, err)
	_, err = r.Verify(t.Context(), r.shop, verifyOf(message(1, "m"), first))
	refused(t, transcript.ErrWrongSigner, err)
	r.condition(t, appliance.Degraded, "payments")
	r.reopen(t)
	r.keep(t, "payments")
	r.wantStates(t, "payments", "compromised active pending")
	r.checkKey(t, "payments")
	if s := r.sign(t, r.shop, message(3, "m")); s.Version != 2 {
		t.Errorf("version %d signs", s.Version)
	}
	if told := r.Keys.Rotation("payments"); told == nil || told.RetiresAt != told.ActivatesAt || told.Version != 2 {
		t.Errorf("peers are told %+v", told)
	}
	r.isNews(t, "payments", 1)
}

// isNews expects exactly these compromised versions of a key as news, with their public keys, in
// the answer to op line, and in the list of keys.
func (r *rig) isNews(t *testing.T, name string, versions ...uint32) {
	t.Helper()
	var told, listed []uint32
	for _, n := range r.Keys.Compromises() {
		if n.Name != name {
			continue
		}
		_, event, err := wire.DecodeMessage([]byte(n.Event))
		k := r.Keys.Version(name, n.Version)
		want := wire.Compromise{
			Event: wire.EventCompromise, Key: name, Version: n.Version, PublicKey: wire.Bytes32(k.Info().PublicKey),
		}
		if c, is := event.(*wire.Compromise); err != nil || !is || *c != want {
			t.Errorf("peers are told %s, %v", n.Event, err)
		}
		told = append(told, n.Version)
	}
	if !slices.Equal(told, versions) {
		t.Errorf("peers are told of the versions %v of %s, want %v", told, name, versions)
	}
	if name == keyring.NoiseName {
		return
	}
	for _, k := range r.Keys.Listed().Keys {
		if k.Name == name && k.Compromised {
			listed = append(listed, k.Version)
		}
	}
	steps, err := r.Keys.Steps(&wire.Line{Key: name, From: 1})
	if err != nil || !slices.Equal(steps.Compromised, versions) || !slices.Equal(listed, versions) {
		t.Errorf("op line names %v, op keys lists %v, want %v, %v", steps, listed, versions, err)
	}
	active := uint32(0)
	if k, err := r.Keys.Active(name); err == nil {
		active = k.Version
	}
	if steps.Active != active {
		t.Errorf("op line names version %d as active, want %d", steps.Active, active)
	}
}

// TestCompromiseReachesEverybody: the compromise of a version is news for each peer until the peer
// has acknowledged it, wherever the version is in its line, with the device and without it, across
// later rotations with their acknowledgements, the destruction of the version, and restarts.
func TestCompromiseReachesEverybody(t *testing.T) {
	for _, c := range []struct {
		name, key string
		version   uint32
		before    func(t *testing.T, r *rig)
	}{
		{"the active version", "payments", 1, func(t *testing.T, r *rig) {}},
		{"the active version, without the device", "payments", 1, func(t *testing.T, r *rig) {
			r.store.BeforeGenerate = func(keystore.Ref) error { return keystore.ErrUnavailable }
		}},
		{"while its successor is announced", "payments", 1, func(t *testing.T, r *rig) {
			r.rotate(t, "payments", time.Now().Add(time.Hour))
		}},
		{"two versions later", "payments", 1, func(t *testing.T, r *rig) {
			r.rotate(t, "payments", time.Now())
			r.rotate(t, "payments", time.Now())
		}},
		{"in the middle, archived", "payments", 2, func(t *testing.T, r *rig) {
			r.rotate(t, "payments", time.Now())
			r.rotate(t, "payments", time.Now())
			r.archive(t, "payments", 2)
			r.rotate(t, "payments", time.Now())
		}},
		{"the listener's key", keyring.NoiseName, 1, func(t *testing.T, r *rig) {
			r.createOwn(t, keyring.NoiseName)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t)
			c.before(t, r)
			newest := func() uint32 {
				if told := r.Keys.Rotation(c.key); told != nil {
					return told.Version
				}
				return 1
			}
			for _, who := range []appliance.Caller{r.shop, r.cafe} { // both know of all rotations
				if v := newest(); v > 1 {
					if err := r.ack(t, who, c.key, v); err != nil {
						t.Fatal(err)
					}
				}
			}
			refused(t, keyring.ErrUnknown, r.ackCompromise(t, r.shop, c.key, c.version))
			r.compromise(t, c.key, c.version)
			waiting := func(names ...string) {
				t.Helper()
				r.isNews(t, c.key, c.version)
				if got := r.Peers.Unwarned(c.key, c.version); !slices.Equal(got, names) {
					t.Errorf("the compromise is not acknowledged by %v, want %v", got, names)
				}
			}
			waiting("cafe", "shop")
			r.store.BeforeGenerate = nil
			r.reopen(t)
			waiting("cafe", "shop")
			r.keep(t, c.key)
			if v := newest(); v > 1 { // to know a newer version is not to know of the compromise
				if err := r.ack(t, r.shop, c.key, v); err != nil {
					t.Fatal(err)
				}
			}
			waiting("cafe", "shop")
			for range 2 {
				if err := r.ackCompromise(t, r.shop, c.key, c.version); err != nil {
					t.Fatal(err)
				}
			}
			refused(t, keyring.ErrUnknown, r.ackCompromise(t, r.shop, c.key, newest()+1))
			waiting("cafe")
			r.rotate(t, c.key, time.Now())
			r.destroy(t, c.key, c.version)
			waiting("cafe")
			r.reopen(t)
			waiting("cafe")
			if err := r.ackCompromise(t, r.cafe, c.key, c.version); err != nil {
				t.Fatal(err)
			}
			waiting()
			if n := r.count(t, audit.CompromiseKnown); n != 2 {
				t.Errorf("%d acknowledgements are written down, want 2", n)
			}
			late := r.enrol(t, "late", 9) // a new enrolment may be that of an old peer
			waiting("late")
			if err := r.Peers.Remove(t.Context(), operator, "late"); err != nil {
				t.Fatal(err)
			}
			refused(t, peers.ErrGone, r.ackCompromise(t, late, c.key, c.version))
		})
	}
}

func (r *rig) ackCompromise(t *testing.T, who appliance.Caller, key string, version uint32) error {
	t.Helper()
	_, err := r.Acknowledge(t.Context(), who, &wire.Ack{Op: wire.OpCompromiseAck, Key: key, Version: version})
	return err
}

// TestCompromisedForEver: a version that is destroyed here may still be in other hands.
func TestCompromisedForEver(t *testing.T) {
	r := newRig(t)
	m := message(1, "m")
	first := r.sign(t, r.shop, m)
	r.compromise(t, "payments", 1)
	r.destroy(t, "payments", 1)
	for range 2 {
		_, err := r.Verify(t.Context(), r.shop, verifyOf(m, first))
		refused(t, transcript.ErrWrongSigner, err)
		r.isNews(t, "payments", 1)
		if told := r.Keys.Rotation("payments"); told.RetiresAt != told.ActivatesAt {
			t.Errorf("others are told %+v", told)
		}
		r.reopen(t)
	}
}

// TestNoiseKeyIsCompromisedAndTheDeviceFails: the appliance starts without a Noise key that
// answers, and makes one when the device can.
func TestNoiseKeyIsCompromisedAndTheDeviceFails(t *testing.T) {
	r := newRig(t)
	if err := r.Ready(); err == nil {
		t.Error("ready without a Noise key")
	}
	r.createOwn(t, keyring.NoiseName, keyring.LogName)
	r.store.BeforeGenerate = func(keystore.Ref) error { return keystore.ErrUnavailable }
	r.compromise(t, keyring.NoiseName, 1)
	if r.count(t, audit.KeyRotationFailed) == 0 {
		t.Error("the failure is no event")
	}
	r.store.BeforeGenerate = nil
	r.reopen(t)
	if err := r.Start(t.Context()); err != nil {
		t.Fatalf("it does not start: %v", err)
	}
	r.keep(t, keyring.NoiseName)
	r.wantStates(t, keyring.NoiseName, "compromised active")
}

// TestEmergencyByHand: an operator who does not want to wait for the next retry rotates.
func TestEmergencyByHand(t *testing.T) {
	r := newRig(t)
	fails := func(keystore.Ref) error { return keystore.ErrUnavailable }
	r.store.BeforeGenerate = fails
	r.compromise(t, "payments", 1)
	r.store.BeforeGenerate = nil
	r.keep(t, "payments")
	r.wantStates(t, "payments", "compromised pending") // not at once again
	r.createOwn(t, keyring.NoiseName)
	r.store.BeforeGenerate = fails
	r.compromise(t, keyring.NoiseName, 1)
	if k, err := r.Keys.Rotate(t.Context(), operator, keyring.NoiseName, time.Now()); err == nil || k != nil {
		t.Errorf("without the device: %v, %v", k, err)
	}
	r.store.BeforeGenerate = nil
	for _, name := range []string{"payments", keyring.NoiseName} {
		if k := r.rotate(t, name, time.Now().Add(time.Hour)); k.Version != 2 || k.State != keyring.Active {
			t.Errorf("%v is %s", k.Ref(), k.State)
		}
	}
	r.wantStates(t, "payments", "compromised active pending")
	r.condition(t, appliance.Operational, "")
	r.checkKey(t, "payments")
}

func TestCompromiseIsRefused(t *testing.T) {
	r := newRig(t)
	for _, name := range []string{keyring.LogName, keyring.AdminName, keyring.CAName} {
		if err := r.Keys.Compromise(t.Context(), approved, name, 1, "stolen"); !errors.Is(err, manage.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, reason := range []string{"", strings.Repeat("x", 501)} {
		if err := r.Keys.Compromise(t.Context(), approved, "payments", 1, reason); !errors.Is(err, manage.ErrInvalid) {
			t.Errorf("%d bytes of a reason: %v", len(reason), err)
		}
	}
	for version, want := range map[uint32]error{
		2: manage.ErrConflict, // the successor is settled
		3: manage.ErrNotFound,
	} {
		if err := r.Keys.Compromise(t.Context(), approved, "payments", version, "stolen"); !errors.Is(err, want) {
			t.Errorf("version %d: %v", version, err)
		}
	}
	r.compromise(t, "payments", 1)
	refused(t, manage.ErrConflict, r.Keys.Compromise(t.Context(), approved, "payments", 1, "stolen")) // twice
	r.wantStates(t, "payments", "compromised active pending")
}

// writeSeed writes a seed file.
func writeSeed(t *testing.T, digits string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "seed")
	if err := os.WriteFile(path, []byte(digits), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestPublicKeyExistsOnce imports one seed under a second name, while the first name is active,
// verify-only, archived and destroyed, and on another token. The key under the second name is gone
// from the token afterwards.
func TestPublicKeyExistsOnce(t *testing.T) {
	other := keystoretest.NewMemory()
	r := newRig(t, func(r *rig) { r.more = map[string]keystore.Store{"other": form.Guard(other, nil)} })
	seed := writeSeed(t, strings.Repeat("07", 32))
	if _, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{
		Name: "one", Token: "memory", Seed: seed,
	}); err != nil {
		t.Fatal(err)
	}
	again := func(state keyring.State) {
		t.Helper()
		if k := r.Keys.Version("one", 1); k.State != state {
			t.Fatalf("%v is %s, want %s", k.Ref(), k.State, state)
		}
		for token, store := range map[string]*keystoretest.Memory{"memory": r.store, "other": other} {
			_, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: "two", Token: token, Seed: seed})
			if !errors.Is(err, manage.ErrExists) || !strings.Contains(err.Error(), "one/1") {
				t.Errorf("while one/1 is %s, on %s: %v", state, token, err)
			}
			if r.Keys.Version("two", 1) != nil {
				t.Errorf("while one/1 is %s, on %s: two/1 is there", state, token)
			}
			_, err = store.Key(t.Context(), keystore.Ref{Name: "two", Version: 1})
			if !errors.Is(err, keystore.ErrNotFound) {
				t.Errorf("while one/1 is %s: two/1 stays on %s: %v", state, token, err)
			}
		}
	}
	again(keyring.Active)
	r.rotate(t, "one", time.Now())
	again(keyring.VerifyOnly)
	if err := r.Keys.Archive(t.Context(), approved, "one", 1); err != nil {
		t.Fatal(err)
	}
	again(keyring.Archived)
	if err := r.Keys.Destroy(t.Context(), approved, "one", 1); err != nil {
		t.Fatal(err)
	}
	again(keyring.Destroyed)
	r.reopen(t)
	again(keyring.Destroyed)
	if _, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{
		Name: "two", Token: "other", Seed: writeSeed(t, strings.Repeat("08", 32)),
	}); err != nil {
		t.Errorf("another seed: %v", err)
	}
}

// TestGeneratedKeyExistsOnce has a token whose generator repeats itself: the key and its successor
// are equal, and a key of another name is equal to both.
func TestGeneratedKeyExistsOnce(t *testing.T) {
	other := keystoretest.NewMemory()
	seed := writeSeed(t, strings.Repeat("07", 32))
	token := form.Guard(repeating{other, seed}, nil)
	r := newRig(t, func(r *rig) { r.more = map[string]keystore.Store{"other": token} })
	for _, name := range []string{"one", "two"} {
		_, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: name, Token: "other"})
		refused(t, keystore.ErrWrong, err)
		for version := range uint32(2) {
			ref := keystore.Ref{Name: name, Version: version + 1}
			if r.Keys.Version(name, ref.Version) != nil {
				t.Errorf("%v is there", ref)
			}
			if _, err := other.Key(t.Context(), ref); !errors.Is(err, keystore.ErrNotFound) {
				t.Errorf("%v stays on its token: %v", ref, err)
			}
		}
	}
	if _, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{
		Name: "one", Token: "memory", Seed: seed,
	}); err != nil {
		t.Fatal(err)
	}
	_, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: "two", Token: "other"})
	refused(t, manage.ErrExists, err)
}

// repeating generates one key again and again.
type repeating struct {
	*keystoretest.Memory
	seed string
}

func (m repeating) Generate(
	ctx context.Context, ref keystore.Ref, _ keystore.Algorithm, tag keystore.Tag,
) (keystore.Key, error) {
	return m.Import(ctx, ref, m.seed, tag)
}

// TestSeedOfZerosIsRefused imports the seed that everybody has.
func TestSeedOfZerosIsRefused(t *testing.T) {
	r := newRig(t)
	seed := writeSeed(t, strings.Repeat("00", 32))
	if _, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: "one", Seed: seed}); err == nil {
		t.Error("a seed of zeros is a key")
	}
	if r.Keys.Version("one", 1) != nil {
		t.Error("one/1 is there")
	}
}

// TestCompromiseIsOfThePublicKey has a ledger of before one public key had one name: the compromise
// of one name stops the other one, now and after a restart.
func TestCompromiseIsOfThePublicKey(t *testing.T) {
	r := newRig(t)
	seed := writeSeed(t, strings.Repeat("07", 32))
	if _, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: "one", Seed: seed}); err != nil {
		t.Fatal(err)
	}
	// two/1 becomes a second one/1.
	made, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: "two"})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.store.Destroy(t.Context(), made.Ref(), made.Info().Tag); err != nil {
		t.Fatal(err)
	}
	if _, err := r.store.Import(t.Context(), made.Ref(), seed, r.Keys.Version("one", 1).Info().Tag); err != nil {
		t.Fatal(err)
	}
	for _, write := range []func(tx *ledger.Tx) error{
		func(tx *ledger.Tx) error { return tx.Delete(ledger.Keys, "two/1") },
		func(tx *ledger.Tx) error { return tx.Put(ledger.Keys, "two/1", tx.Get(ledger.Keys, "one/1")) },
	} {
		if err := r.ledger.Update(t.Context(), write); err != nil {
			t.Fatal(err)
		}
	}
	k := r.Keys.Version("two", 1)
	name, public, message := "two", [32]byte(k.Info().PublicKey), form.NewCanary()
	if err := r.Keys.CheckSigner(&name, public); err != nil || r.Keys.MayUse(k) != nil {
		t.Fatal(err, r.Keys.MayUse(k))
	}
	if _, err := k.Sign(t.Context(), keyring.Own, message, nil); err != nil {
		t.Fatal(err)
	}
	twice := func(text string) {
		t.Helper()
		r.hasCause(t, cause.KeyTwice, "two/1", text)
	}
	twice("too")
	r.compromise(t, "one", 1)
	stopped := func() {
		t.Helper()
		k := r.Keys.Version("two", 1)
		refused(t, keyring.ErrNotActive, r.Keys.MayUse(k))
		_, err := k.Sign(t.Context(), keyring.Own, message, nil)
		refused(t, keyring.ErrNotActive, err)
		refused(t, transcript.ErrWrongSigner, r.Keys.CheckSigner(&name, public))
		refused(t, transcript.ErrWrongSigner, r.Keys.CheckSigner(nil, public))
		twice("compromised")
	}
	stopped()
	r.reopen(t)
	stopped()
	r.compromise(t, "two", 1) // and the cause is over
	r.wantStates(t, "two", "compromised active pending")
	for _, c := range r.Keys.Causes() {
		if c.Kind == cause.KeyTwice {
			t.Errorf("after the compromise of both: %v", c)
		}
	}
	if err := r.Keys.CheckSigner(nil, [32]byte{1}); err != nil {
		t.Errorf("a stranger's key: %v", err)
	}
}

// TestEndOfAnArchivedVersion: of a version that is archived before the end of its grace time, by an
// operator or after the acknowledgements, nobody is told that it is accepted any longer.
func TestEndOfAnArchivedVersion(t *testing.T) {
	for by, archive := range map[string]func(t *testing.T, r *rig){
		"operator": func(t *testing.T, r *rig) { r.archive(t, "payments", 1) },
		"daemon": func(t *testing.T, r *rig) {
			r.set(t, "payments", func(s *keyring.Settings) { s.Acknowledge = []string{"shop"} })
			if err := r.ack(t, r.shop, "payments", 2); err != nil {
				t.Fatal(err)
			}
			r.keep(t, "payments")
		},
	} {
		t.Run(by, func(t *testing.T) {
			r := newRig(t)
			r.rotate(t, "payments", time.Now())
			archive(t, r)
			r.wantStates(t, "payments", "archived active pending")
			r.reopen(t)
			now := r.ledger.Time()
			if k := r.Keys.Version("payments", 1); k.Retires.After(now) {
				t.Errorf("version 1 is accepted until %v, and it is %v", k.Retires, now)
			}
			told := r.Keys.Rotation("payments")
			if told.RetiresAt > max(now.Unix(), told.ActivatesAt) || told.RetiresAt < told.ActivatesAt {
				t.Errorf("at %d, peers are told %+v", now.Unix(), told)
			}
		})
	}
}
