package anchor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"countersign/audit"
	"countersign/internal/cause"
	"countersign/internal/gate"
	"countersign/internal/keystore"
	"countersign/internal/keystore/keystoretest"
	"countersign/internal/ledger"
	"countersign/internal/ledger/disktest"
	"countersign/internal/ledger/ledgertest"
	"countersign/internal/manage"
	"countersign/internal/resource"
	"countersign/internal/scantest"
	"countersign/tpm"
	"countersign/tpm/tpmtest"
)

func TestMain(m *testing.M) {
	disktest.Serve() // in the process of a test's disk
	os.Exit(scantest.Run(m))
}

var operator = audit.Operator("test")

// faulty is a TPM with faults of the counter. A nil function is no fault.
type faulty struct {
	*tpm.Store
	emulator  *tpmtest.Emulator
	bound     bool         // a ledger has been bound to the counter
	read      func() error // before the counter is read
	increment func() error // before the counter is incremented
	answer    func() error // after the counter was incremented
}

func call(fault func() error) error {
	if fault == nil {
		return nil
	}
	return fault()
}

func (f *faulty) ReadCounter(ctx context.Context, owner keystore.Owner) (uint64, error) {
	if err := call(f.read); err != nil {
		return 0, err
	}
	return f.Store.ReadCounter(ctx, owner)
}

func (f *faulty) IncrementCounter(ctx context.Context, owner keystore.Owner) (uint64, error) {
	if err := call(f.increment); err != nil {
		return 0, err
	}
	value, err := f.Store.IncrementCounter(ctx, owner)
	if err == nil {
		err = call(f.answer)
	}
	return value, err
}

// repair ends all faults.
func (f *faulty) repair() { f.read, f.increment, f.answer = nil, nil, nil }

// unavailable is the error of a device that does not answer.
func unavailable() error { return fmt.Errorf("test: %w", keystore.ErrUnavailable) }

// rig is a ledger that is bound to the counter of a TPM emulator.
type rig struct {
	*Anchor
	t      *testing.T
	path   string
	config Config
	tpm    *faulty
	log    bytes.Buffer
	nonces byte
}

// openTPM opens a TPM emulator.
func openTPM(t *testing.T, e *tpmtest.Emulator) *faulty {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c := tpm.Config{Device: e.Socket, State: filepath.Join(t.TempDir(), "keys"), Deadline: time.Minute}
	if err := tpm.Provision(ctx, c); err != nil {
		t.Fatal(err)
	}
	s, err := tpm.Open(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return &faulty{Store: s, emulator: e}
}

// newRig makes a rig with its ledger in a directory. The anchor has not been started.
func newRig(t *testing.T, dir string, store *faulty) *rig {
	t.Helper()
	r := &rig{
		t: t, path: filepath.Join(dir, "ledger.db"), tpm: store,
		config: Config{Token: "tpm", Interval: time.Hour, Admissions: 100},
	}
	if err := ledger.Create(r.path, ledger.Options{}); err != nil {
		t.Fatal(err)
	}
	r.open()
	t.Cleanup(func() { r.ledger.Close() })
	if store.bound { // to the ledger of an earlier rig
		store.emulator.UndefineCounter(t)
	}
	store.bound = true
	if err := r.Bind(t.Context(), operator); err != nil {
		t.Fatal(err)
	}
	return r
}

// open opens the ledger, as a new process does.
func (r *rig) open() {
	r.t.Helper()
	l, err := ledgertest.Open(r.t, r.path, ledger.Options{})
	if err != nil {
		r.t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(&r.log, nil))
	monitor := resource.NewMonitor(log, time.Minute)
	tokens := manage.Tokens{"tpm": r.tpm, "memory": keystoretest.NewMemory()}
	r.Anchor = New(r.config, l, tokens, gate.New(l), monitor, log)
}

// restart starts the anchor of a new process.
func (r *rig) restart() error {
	r.t.Helper()
	r.ledger.Close()
	r.open()
	return r.Start(r.t.Context())
}

// admit asks the ledger for an admission.
func (r *rig) admit() error {
	r.nonces++
	_, err := r.ledger.Admit(r.t.Context(), ledger.Admission{
		Scope: ledger.KeyScope("k"), Nonce: [32]byte{r.nonces}, ExpiresAt: time.Now().Unix() + 60,
	}, func(ledger.Verdict) []byte { return audit.NewStarted().Encode(time.Now()) })
	return err
}

// values returns the counter and the recorded value.
func (r *rig) values() (counter, recorded uint64) {
	r.t.Helper()
	counter, err := r.tpm.Store.ReadCounter(r.t.Context(), r.owner())
	if err != nil {
		r.t.Fatal(err)
	}
	bound, err := read[record](r.ledger, anchorKey)
	if err != nil {
		r.t.Fatal(err)
	}
	return counter, bound.Value
}

// owner returns the identifier of the ledger's counter.
func (r *rig) owner() keystore.Owner {
	r.t.Helper()
	owner, err := read[keystore.Owner](r.ledger, ownerKey)
	if err != nil || owner == nil {
		r.t.Fatalf("the ledger has no owner's identifier: %v", err)
	}
	return *owner
}

// reports checks the kinds of the causes.
func (r *rig) reports(when string, want ...*cause.Kind) {
	r.t.Helper()
	var got []*cause.Kind
	for _, c := range r.Causes() {
		got = append(got, c.Kind)
	}
	if !slices.Equal(got, want) {
		r.t.Errorf("%s: the causes are %v, want %v", when, r.Causes(), want)
	}
}

// holds checks the invariant, unless a rollback is recorded.
func (r *rig) holds(when string) {
	r.t.Helper()
	rolled, err := r.Rollback()
	if err != nil {
		r.t.Fatal(err)
	}
	if counter, recorded := r.values(); rolled == nil && (recorded < counter || recorded > counter+1) {
		r.t.Errorf("%s: the counter is %d, and the ledger records %d", when, counter, recorded)
	}
}

// setBack rewrites the recorded value, as an older copy of the ledger has it.
func (r *rig) setBack(bound record) {
	r.t.Helper()
	if err := r.ledger.Update(r.t.Context(), func(tx *ledger.Tx) error {
		return tx.Put(ledger.Meta, anchorKey, manage.Encode(bound))
	}); err != nil {
		r.t.Fatal(err)
	}
}

// rollBack makes a rollback, and starts the anchor during a use of a key.
func (r *rig) rollBack() {
	r.t.Helper()
	counter, _ := r.values()
	r.setBack(record{"tpm", counter - 1})
	ctx, use := r.gate.Use(r.t.Context(), r.gate.Err)
	defer use.End()
	if err := r.Start(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
	if !r.gate.Blocked(gate.Rollback) {
		r.t.Fatal("the rollback is not detected")
	}
	if ctx.Err() == nil || !errors.Is(use.Err(), ErrRolledBack) {
		r.t.Errorf("a use of a key that began before is not cut off: %v", use.Err())
	}
}

// TestInvariant has each act meet each fault of the counter and of the ledger's disk. The invariant
// holds after the fault, and the next start of a bound ledger finds no rollback.
func TestInvariant(t *testing.T) {
	store := openTPM(t, tpmtest.New(t))
	disk := disktest.New(t)
	const writes, syncs = true, false
	var refuses atomic.Pointer[func(write bool) syscall.Errno]
	disk.Fail(func(op disktest.Op) syscall.Errno {
		refuse := refuses.Load()
		switch {
		case refuse == nil:
			return 0
		case op.Kind == disktest.Datasync || op.Kind == disktest.Sync:
			return (*refuse)(syncs)
		}
		return (*refuse)(writes)
	})
	failSync := func(n int32) func() {
		return func() {
			var count atomic.Int32
			refuses.Store(new(func(write bool) syscall.Errno {
				if write == syncs && count.Add(1) == n {
					return syscall.EIO
				}
				return 0
			}))
		}
	}
	faults := map[string]func(){
		"no fault":                       func() {},
		"the counter can't be read":      func() { store.read = unavailable },
		"the counter is not incremented": func() { store.increment = unavailable },
		"the answer is lost":             func() { store.answer = unavailable },
		"the disk refuses writes": func() {
			refuses.Store(new(func(write bool) syscall.Errno {
				if write {
					return syscall.EROFS
				}
				return 0
			}))
		},
		"the first sync fails":  failSync(1), // the pages: nothing is written
		"the second sync fails": failSync(2), // the meta page: the state is unknown
		"the third sync fails":  failSync(3), // of the second transaction, if there is one
	}
	accept := func(r *rig) error { return r.Accept(t.Context(), operator, "test") }
	start := func(r *rig) error { return r.Start(t.Context()) }
	for name, c := range map[string]struct {
		before func(*rig) error
		act    func(*rig) error
	}{
		"start":   {func(*rig) error { return nil }, start},
		"advance": {start, func(r *rig) error { return r.advance(t.Context()) }}, // the step of Keep
		"stop":    {start, func(r *rig) error { return r.Stop(t.Context()) }},
		"accept":  {func(r *rig) error { r.rollBack(); return nil }, accept},
	} {
		for fault, begin := range faults {
			t.Run(name+"/"+fault, func(t *testing.T) {
				dir := filepath.Join(disk.Dir(), strings.ReplaceAll(t.Name(), "/", "-"))
				if err := os.Mkdir(dir, 0o700); err != nil {
					t.Fatal(err)
				}
				r := newRig(t, dir, store)
				if err := c.before(r); err != nil {
					t.Fatal(err)
				}
				r.holds("before the act")
				begin()
				err := c.act(r)
				store.repair()
				refuses.Store(nil)
				if (fault == "no fault") && err != nil {
					t.Fatal(err)
				}
				if open := r.admit() == nil; open && name == "accept" && err != nil {
					t.Errorf("the ledger admits, and the act fails: %v", err)
				}
				r.ledger.Close() // the state may be unknown; a restart is the recovery
				r.open()
				r.holds("after the act")
				if err := r.Start(t.Context()); err != nil {
					t.Fatal(err)
				}
				r.holds("after a start")
				if r.gate.Blocked(gate.Rollback) && name == "accept" && err != nil {
					if err := accept(r); err != nil {
						t.Fatal(err)
					}
					r.holds("after a second acceptance")
				}
				if err := r.admit(); err != nil {
					t.Errorf("in the end the ledger admits nothing: %v", err)
				}
			})
		}
	}
}

// TestLostIncrement: an increment without an answer takes effect after the next one has been
// recorded. The ledger then records the counter's value.
func TestLostIncrement(t *testing.T) {
	r := newRig(t, t.TempDir(), openTPM(t, tpmtest.New(t)))
	if err := r.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	before, _ := r.values()
	r.tpm.increment = func() error { _, err := r.tpm.Store.IncrementCounter(t.Context(), r.owner()); return err }
	if err := r.advance(t.Context()); err != nil {
		t.Fatal(err)
	}
	if counter, recorded := r.values(); counter != before+2 || recorded != counter {
		t.Errorf("the counter is %d, the ledger records %d, and before both were %d", counter, recorded, before)
	}
}

// TestRollbackIsDetected: each ledger that can't be the newest is detected at start. An operator's
// acceptance opens the gate, and the next start finds nothing.
func TestRollbackIsDetected(t *testing.T) {
	e := tpmtest.New(t)
	store := openTPM(t, e)
	for name, c := range map[string]struct {
		change func(r *rig, counter uint64)
		reason string
	}{
		"an older copy": {func(r *rig, counter uint64) { r.setBack(record{"tpm", counter - 1}) },
			"the ledger is an older copy: what was admitted since it was made is forgotten"},
		"the oldest copy": {func(r *rig, _ uint64) { r.setBack(record{"tpm", 0}) },
			"the ledger is an older copy: what was admitted since it was made is forgotten"},
		"a counter that was set back": {func(r *rig, counter uint64) { r.setBack(record{"tpm", counter + 2}) },
			"the counter is behind the ledger: its device was set back, or is another"},
		"a counter of another token": {func(r *rig, counter uint64) { r.setBack(record{"other", counter}) },
			`the ledger is bound to the counter of token "other"`},
		"a counter that is gone": {func(*rig, uint64) { e.UndefineCounter(t) },
			"the counter is gone: the TPM was cleared, or is another"},
		"a configuration without a counter": {func(r *rig, _ uint64) { r.Token = "" },
			`the ledger is bound to the counter of token "tpm", and the configuration has no rollback_token`},
		"a ledger that is bound to no counter": {func(r *rig, _ uint64) {
			if err := r.ledger.Update(t.Context(), func(tx *ledger.Tx) error {
				return tx.Delete(ledger.Meta, anchorKey)
			}); err != nil {
				t.Fatal(err)
			}
		}, "the ledger is bound to no counter, so it may be any; " +
			"one that was never bound is bound by countersignd init"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, t.TempDir(), store)
			counter, _ := r.values()
			if err := r.Accept(t.Context(), operator, "test"); !errors.Is(err, manage.ErrNotFound) {
				t.Errorf("accepted without a rollback: %v", err)
			}
			c.change(r, counter)
			r.config = r.Config
			for range 2 { // the rollback outlives a restart
				if err := r.restart(); err != nil {
					t.Fatal(err)
				}
				rolled, err := r.Rollback()
				if err != nil || rolled == nil || rolled.Reason != c.reason {
					t.Fatalf("%+v, %v; want %q", rolled, err, c.reason)
				}
				if err := r.admit(); !errors.Is(err, ErrRolledBack) {
					t.Errorf("an admission: %v, want %v", err, ErrRolledBack)
				}
				kind := cause.AnchorLost
				if strings.Contains(c.reason, "older copy") || strings.Contains(c.reason, "behind the ledger") {
					kind = cause.RolledBack
				}
				r.reports(c.reason, kind)
				if err := r.Stop(t.Context()); err != nil {
					t.Error(err)
				}
			}
			if err := r.Accept(t.Context(), operator, ""); !errors.Is(err, manage.ErrInvalid) {
				t.Errorf("accepted without a reason: %v", err)
			}
			if err := r.Accept(t.Context(), operator, "disk replaced"); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if rolled, err := r.Rollback(); err != nil || rolled != nil {
					t.Errorf("after the acceptance: %+v, %v", rolled, err)
				}
				if err := r.admit(); err != nil {
					t.Errorf("after the acceptance: %v", err)
				}
				if err := r.restart(); err != nil {
					t.Fatal(err)
				}
			}
			if bound, err := read[record](r.ledger, anchorKey); err != nil || (bound == nil) != (r.Token == "") {
				t.Errorf("the ledger records %+v, %v", bound, err)
			}
		})
	}
}

// TestNewestLedger: both recorded values of the invariant are accepted.
func TestNewestLedger(t *testing.T) {
	store := openTPM(t, tpmtest.New(t))
	for ahead := range uint64(2) {
		r := newRig(t, t.TempDir(), store)
		counter, _ := r.values()
		r.setBack(record{"tpm", counter + ahead})
		if err := r.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		if now, recorded := r.values(); now != counter+1 || recorded != now {
			t.Errorf("the counter is %d, then %d; the ledger records %d", counter, now, recorded)
		}
		if err := r.admit(); err != nil {
			t.Error(err)
		}
	}
}

// TestStartErrors: a device that does not answer blocks the gate; a token without a counter is an
// error of the configuration.
func TestStartErrors(t *testing.T) {
	r := newRig(t, t.TempDir(), openTPM(t, tpmtest.New(t)))
	for _, unusable := range []error{
		keystore.ErrUnavailable, keystore.ErrSealed, keystore.ErrAuth, keystore.ErrReplaced, keystore.ErrRefused,
	} {
		r.tpm.read = func() error { return unusable }
		if err := r.restart(); err != nil {
			t.Fatal(err)
		}
		if err := r.admit(); !errors.Is(err, keystore.ErrUnavailable) || !r.gate.Blocked(gate.Counter) {
			t.Errorf("%v: an admission: %v", unusable, err)
		}
		before, _ := r.values()
		if err := r.Stop(t.Context()); err != nil {
			t.Error(err)
		}
		if after, _ := r.values(); after != before {
			t.Error("the counter of a ledger that has not been compared is incremented")
		}
	}
	for token, want := range map[string]string{
		"memory": `token "memory" has no counter`, "nowhere": "the configuration has memory, tpm",
	} {
		r.config.Token = token
		if err := r.restart(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

// TestSecondLedger: a second ledger is not bound to the counter of the first one, and changes
// nothing there.
func TestSecondLedger(t *testing.T) {
	store := openTPM(t, tpmtest.New(t))
	first := newRig(t, t.TempDir(), store)
	if err := first.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	second := &rig{t: t, path: filepath.Join(t.TempDir(), "ledger.db"), tpm: store, config: first.config}
	if err := ledger.Create(second.path, ledger.Options{}); err != nil {
		t.Fatal(err)
	}
	second.open()
	defer second.ledger.Close()
	before, _ := first.values()
	for range 2 {
		err := second.Bind(t.Context(), operator)
		if !errors.Is(err, keystore.ErrUnfit) || !strings.Contains(err.Error(), "another countersign appliance") {
			t.Errorf("a second ledger is bound: %v", err)
		}
	}
	if after, _ := first.values(); after != before {
		t.Errorf("the first ledger's counter was changed from %d to %d", before, after)
	}
	first.holds("beside a second ledger")
}

// TestLostCounter: a counter that is gone for good is a rollback. The counter's index may be taken
// by then. One acceptance binds the ledger to a new counter, or to none.
func TestLostCounter(t *testing.T) {
	undefine := func(r *rig) { r.tpm.emulator.UndefineCounter(t) }
	for name, c := range map[string]struct{ lose, mend func(*rig) }{
		"undefined":          {undefine, func(*rig) {}},
		"its index is taken": {func(r *rig) { undefine(r); r.tpm.emulator.TakeCounter(t) }, undefine},
		"another TPM":        {func(r *rig) { r.tpm = openTPM(t, tpmtest.New(t)) }, func(*rig) {}},
		"the TPM is taken out": {
			func(r *rig) { r.tpm.read = func() error { return keystore.ErrReplaced } },
			func(r *rig) { r.config.Token = "" },
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, t.TempDir(), openTPM(t, tpmtest.New(t)))
			c.lose(r)
			if err := r.restart(); err != nil {
				t.Fatal(err)
			}
			if err := r.admit(); err == nil {
				t.Error("the ledger admits without its counter")
			}
			if r.gate.Blocked(gate.Counter) { // the right TPM may come back
				r.reports("while the TPM is out", cause.Counter)
				err := r.Accept(t.Context(), operator, "the TPM has died")
				if !errors.Is(err, manage.ErrNotFound) || !strings.Contains(err.Error(), keystore.ErrReplaced.Error()) {
					t.Errorf("accepted while the counter is unread: %v", err)
				}
			}
			c.mend(r)
			if err := r.restart(); err != nil {
				t.Fatal(err)
			}
			r.reports("after a restart", cause.AnchorLost)
			if err := r.admit(); !errors.Is(err, ErrRolledBack) {
				t.Errorf("an admission before the acceptance: %v, want %v", err, ErrRolledBack)
			}
			if err := r.Accept(t.Context(), operator, "the TPM has died"); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := r.admit(); err != nil {
					t.Errorf("after the acceptance: %v", err)
				}
				r.reports("after the acceptance")
				if err := r.restart(); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestUnmarkedCounter: a ledger that was bound before counters had marks keeps its counter.
func TestUnmarkedCounter(t *testing.T) {
	r := newRig(t, t.TempDir(), openTPM(t, tpmtest.New(t)))
	e := r.tpm
	if err := r.ledger.Update(t.Context(), func(tx *ledger.Tx) error {
		return tx.Delete(ledger.Meta, ownerKey)
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Store.ReadCounter(t.Context(), keystore.Owner{}); !errors.Is(err, keystore.ErrUnfit) {
		t.Fatalf("a marked counter is taken for one without a mark: %v", err)
	}
	r.tpm = openTPM(t, tpmtest.New(t))
	if err := r.tpm.DefineCounter(t.Context(), keystore.Owner{}); err != nil {
		t.Fatal(err)
	}
	value, err := r.tpm.Store.ReadCounter(t.Context(), keystore.Owner{})
	if err != nil {
		t.Fatal(err)
	}
	for _, recorded := range []uint64{value, 0} { // the newest ledger, and then an older copy
		r.setBack(record{"tpm", recorded})
		if err := r.restart(); err != nil {
			t.Fatal(err)
		}
		if rolled, err := r.Rollback(); err != nil || (rolled != nil) != (recorded == 0) {
			t.Errorf("recorded %d: %+v, %v", recorded, rolled, err)
		}
	}
	if err := r.Accept(t.Context(), operator, "test"); err != nil {
		t.Fatal(err)
	}
	if err := r.restart(); err != nil {
		t.Fatal(err)
	}
	if err := r.admit(); err != nil {
		t.Error(err)
	}
}

// TestKeep: Keep compares the ledger with the counter when the device answers again, and then
// increments the counter after each interval with admissions.
func TestKeep(t *testing.T) {
	e := tpmtest.New(t)
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, t.TempDir(), openTPM(t, e))
		var away atomic.Bool
		away.Store(true)
		r.tpm.read = func() error {
			if away.Load() {
				return unavailable()
			}
			return nil
		}
		if err := r.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		kept := make(chan struct{})
		go func() { r.Keep(ctx); close(kept) }()
		time.Sleep(time.Minute)
		if err := r.admit(); !errors.Is(err, keystore.ErrUnavailable) {
			t.Errorf("an admission before the comparison: %v", err)
		}
		r.reports("before the comparison", cause.Counter)
		away.Store(false)
		time.Sleep(2 * time.Second)
		if err := r.admit(); err != nil {
			t.Errorf("an admission after the comparison: %v", err)
		}
		first, _ := r.values()
		time.Sleep(r.Interval)
		if counter, _ := r.values(); counter != first+1 {
			t.Errorf("after an interval with an admission the counter is %d, want %d", counter, first+1)
		}
		time.Sleep(3 * r.Interval)
		if counter, _ := r.values(); counter != first+1 {
			t.Errorf("after intervals without admissions the counter is %d, want %d", counter, first+1)
		}
		r.admit()
		r.reports("after the comparison")
		away.Store(true)
		time.Sleep(time.Minute)
		if err := r.admit(); err != nil {
			t.Errorf("an admission without the counter, after the comparison: %v", err)
		}
		r.reports("without the counter", cause.CounterFailing)
		away.Store(false)
		time.Sleep(2 * time.Second)
		r.reports("with the counter again")
		if counter, recorded := r.values(); counter != first+2 || recorded != counter {
			t.Errorf("after a retry the counter is %d, and the ledger records %d; want %d", counter, recorded, first+2)
		}
		stop()
		<-kept
		if err := r.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		if counter, recorded := r.values(); counter != first+3 || recorded != counter {
			t.Errorf("after Stop the counter is %d, and the ledger records %d; want %d", counter, recorded, first+3)
		}
		for text, want := range map[string]int{"can't be used": 2, "can be used again": 2} {
			if got := strings.Count(r.log.String(), text); got != want {
				t.Errorf("the log says %d times %q, want %d", got, text, want)
			}
		}
	})
}

// TestAcceptBesideKeep: Keep compares the ledger with the counter once a second after a rollback,
// also while an acceptance increments the counter. The acceptance must not be taken for a rollback.
func TestAcceptBesideKeep(t *testing.T) {
	e := tpmtest.New(t)
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, t.TempDir(), openTPM(t, e))
		r.rollBack()
		ctx, stop := context.WithCancel(t.Context())
		kept, accepted := make(chan struct{}), make(chan struct{})
		go func() { r.Keep(ctx); close(kept) }()
		var reads atomic.Int32
		r.tpm.read = func() error {
			switch reads.Add(1) {
			case 2: // the acceptance is written; its comparison begins, and Keep's ticker fires
				time.Sleep(2 * time.Second)
			case 3: // Keep's comparison, after the acceptance
				<-accepted
			}
			return nil
		}
		if err := r.Accept(t.Context(), operator, "disk replaced"); err != nil {
			t.Error(err)
		}
		close(accepted)
		time.Sleep(2 * time.Second)
		if rolled, err := r.Rollback(); err != nil || rolled != nil {
			t.Errorf("detected after the acceptance: %+v, %v", rolled, err)
		}
		if err := r.admit(); err != nil {
			t.Errorf("after the acceptance: %v", err)
		}
		stop()
		<-kept
		r.holds("after the acceptance")
	})
}

// TestWithoutACounter: a ledger without a counter is neither compared nor changed.
func TestWithoutACounter(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.db")
	if err := ledger.Create(path, ledger.Options{}); err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, path: path}
	r.open()
	t.Cleanup(func() { r.ledger.Close() })
	r.Keep(t.Context()) // returns
	for name, act := range map[string]func() error{
		"bind":  func() error { return r.Bind(t.Context(), operator) },
		"start": func() error { return r.Start(t.Context()) },
		"stop":  func() error { return r.Stop(t.Context()) },
		"admit": r.admit,
	} {
		if err := act(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if bound, err := read[record](r.ledger, anchorKey); err != nil || bound != nil {
		t.Errorf("%+v, %v", bound, err)
	}
}

// TestCounterIsDue: an increment is due after the interval if there was an admission, and sooner
// after many admissions, but not within leastInterval.
func TestCounterIsDue(t *testing.T) {
	a := Config{Interval: time.Hour, Admissions: 100}
	for _, c := range []struct {
		admitted uint64
		since    time.Duration
		due      bool
	}{
		{0, 48 * time.Hour, false},
		{1, time.Hour - 1, false},
		{1, time.Hour, true},
		{99, leastInterval, false},
		{100, leastInterval, true},
		{1_000_000, leastInterval - 1, false},
	} {
		if got := a.due(c.admitted, c.since); got != c.due {
			t.Errorf("%d admissions, %v: %v", c.admitted, c.since, got)
		}
	}
}
