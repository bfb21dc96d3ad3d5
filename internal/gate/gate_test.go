package gate_test

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/gate"
	"countersign/internal/ledger"
	"countersign/internal/ledger/ledgertest"
)

// The reasons, each with an error of its own.
var errorOf = [...]error{
	gate.Rollback: errors.New("rolled back"),
	gate.Counter:  errors.New("not compared with the counter"),
	gate.Operator: errors.New("locked"),
}

// admitter asks a ledger for admissions, each under a fresh nonce.
type admitter struct {
	*ledger.Ledger
	next byte
}

func newAdmitter(t *testing.T) *admitter {
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
	return &admitter{Ledger: l}
}

func (a *admitter) admit(ctx context.Context) error {
	a.next++
	_, err := a.Admit(ctx, ledger.Admission{
		Scope: ledger.KeyScope("k"), Nonce: [32]byte{a.next}, ExpiresAt: time.Now().Unix() + 60,
	}, event)
	return err
}

func event(ledger.Verdict) []byte { return audit.NewStarted().Encode(time.Now()) }

// TestReasonsAreIndependent walks through all 8 sets of blocking reasons, in an order in which each
// step blocks or unblocks one reason. The gravest reason of the set is the error of an admission.
func TestReasonsAreIndependent(t *testing.T) {
	l := newAdmitter(t)
	g := gate.New(l.Ledger)
	var set [len(errorOf)]bool
	check := func() {
		t.Helper()
		var gravest error
		all := g.Err()
		for why := len(errorOf) - 1; why >= 0; why-- {
			if set[why] {
				gravest = errorOf[why]
			}
			if got := g.Blocked(gate.Reason(why)); got != set[why] {
				t.Errorf("%v: reason %d blocks: %v", set, why, got)
			}
			if err := g.Cause(gate.Reason(why)); (err == errorOf[why]) != set[why] {
				t.Errorf("%v: the cause of reason %d: %v", set, why, err)
			}
			if errors.Is(all, errorOf[why]) != set[why] {
				t.Errorf("%v: the joined errors are %q", set, all)
			}
		}
		if (all == nil) != (gravest == nil) {
			t.Errorf("%v: the joined errors are %v", set, all)
		}
		if err := l.admit(t.Context()); err != gravest {
			t.Errorf("%v: the ledger answers %v, want %v", set, err, gravest)
		}
	}
	check()
	for step := 1; step <= 1<<len(errorOf); step++ { // the bit that changes next in a Gray code
		why := 0
		for step&(1<<why) == 0 && why < len(errorOf)-1 {
			why++
		}
		if set[why] = !set[why]; set[why] {
			g.Block(gate.Reason(why), errorOf[why])
		} else {
			g.Unblock(gate.Reason(why))
		}
		check()
	}
	if set != [len(errorOf)]bool{} {
		t.Errorf("the walk ends with %v", set)
	}
}

// TestRepeatedReason: a second Block replaces the error, and one Unblock ends both. An Unblock
// without a Block changes nothing.
func TestRepeatedReason(t *testing.T) {
	l := newAdmitter(t)
	g := gate.New(l.Ledger)
	g.Unblock(gate.Operator)
	if err := l.admit(t.Context()); err != nil {
		t.Errorf("after an Unblock without a Block: %v", err)
	}
	second := errors.New("locked again")
	g.Block(gate.Operator, errorOf[gate.Operator])
	g.Block(gate.Operator, second)
	if err := l.admit(t.Context()); err != second {
		t.Errorf("%v, want %v", err, second)
	}
	g.Unblock(gate.Operator)
	if err := l.admit(t.Context()); err != nil {
		t.Errorf("after Unblock: %v", err)
	}
}

// TestBlockedWhileWaiting: admissions in the ledger's queue are refused, although the gate was open
// when they were asked for. Their nonces stay fresh.
func TestBlockedWhileWaiting(t *testing.T) {
	l := newAdmitter(t)
	g := gate.New(l.Ledger)
	inWriter, release := make(chan struct{}), make(chan struct{})
	occupied := make(chan error, 1)
	go func() {
		occupied <- l.Update(t.Context(), func(*ledger.Tx) error { close(inWriter); <-release; return nil })
	}()
	<-inWriter
	const n = 8
	answers := make(chan error, n)
	asked := l.Admitted()
	for i := range byte(n) {
		go func() {
			_, err := l.Admit(t.Context(), ledger.Admission{
				Scope: ledger.KeyScope("waiting"), Nonce: [32]byte{i}, ExpiresAt: time.Now().Unix() + 60,
			}, event)
			answers <- err
		}()
	}
	for l.Admitted() < asked+n {
		time.Sleep(time.Millisecond)
	}
	g.Block(gate.Operator, errorOf[gate.Operator])
	close(release)
	for range n {
		if err := <-answers; err != errorOf[gate.Operator] {
			t.Errorf("an admission in the queue: %v", err)
		}
	}
	if err := <-occupied; err != nil {
		t.Error(err)
	}
	for i := range byte(n) {
		_, err := l.Spent(t.Context(), ledger.KeyScope("waiting"), [32]byte{i})
		if !errors.Is(err, ledger.ErrNotFound) {
			t.Errorf("nonce %d: %v, want %v", i, err, ledger.ErrNotFound)
		}
	}
}

// TestConcurrentReasons: the ledger follows the gate in every order of concurrent calls.
func TestConcurrentReasons(t *testing.T) {
	l := newAdmitter(t)
	g := gate.New(l.Ledger)
	var wg sync.WaitGroup
	for why := range gate.Reason(len(errorOf)) {
		wg.Go(func() {
			for range 1000 {
				g.Block(why, errorOf[why])
				if !g.Blocked(why) || !errors.Is(g.Err(), errorOf[why]) {
					t.Errorf("reason %d does not block", why)
				}
				if err := g.Cause(why); err != errorOf[why] {
					t.Errorf("the cause of reason %d is %v", why, err)
				}
				g.Unblock(why)
			}
			g.Block(why, errorOf[why])
		})
	}
	wg.Wait()
	if err := l.admit(t.Context()); err != errorOf[gate.Rollback] {
		t.Errorf("%v, want %v", err, errorOf[gate.Rollback])
	}
	for why := range errorOf {
		g.Unblock(gate.Reason(why))
	}
	if err := l.admit(t.Context()); err != nil {
		t.Errorf("all reasons are gone: %v", err)
	}
}
