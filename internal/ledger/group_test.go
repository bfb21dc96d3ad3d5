package ledger_test

import (
	"context"
	"errors"
	"sync"
	"syscall"
	"testing"

	"countersign/internal/ledger"
	"countersign/internal/ledger/disktest"
)

// member admits as a new member of a group. The channel gets the result.
func member(ctx context.Context, l *ledger.Ledger, g *ledger.Group, a ledger.Admission) <-chan error {
	done := make(chan error, 1)
	a.Member = g.Member()
	go func() {
		defer a.Member.Leave(ctx)
		got, err := l.Admit(ctx, a, event)
		if err == nil && got.Verdict != ledger.Fresh {
			err = errors.New("not fresh")
		}
		done <- err
	}()
	return done
}

// TestGroupIsOneCommit checks that all admissions of a group are one transaction. Among the
// admissions are a replay and a repetition. A second admission of a member does not wait for the
// group.
func TestGroupIsOneCommit(t *testing.T) {
	l, _ := create(t)
	mustAdmit(t, l, admission("k", 200, 1, 1), ledger.Fresh)
	const n = 100
	g := l.Group(n)
	before := l.Commits()
	var verdicts [n]ledger.Verdict
	var all, first sync.WaitGroup
	first.Add(n)
	for i := range n {
		all.Go(func() {
			a := admission("k", byte(i), 1, 1)
			if i == 7 {
				a = admission("k", 200, 2, 1)
			} else if i == 8 {
				a = admission("k", 9, 1, 1)
			}
			a.Member = g.Member()
			defer a.Member.Leave(t.Context())
			got, err := l.Admit(t.Context(), a, event)
			if err != nil {
				t.Error(err)
			}
			verdicts[i] = got.Verdict
			first.Done()
		})
	}
	first.Wait()
	if got := l.Commits() - before; got != 1 {
		t.Errorf("%d commits", got)
	}
	all.Wait()
	seen := map[ledger.Verdict]int{}
	for _, v := range verdicts {
		seen[v]++
	}
	if seen[ledger.Fresh] != n-2 || seen[ledger.Repeated] != 1 || seen[ledger.Replay] != 1 {
		t.Errorf("%v", seen)
	}
	member := l.Group(2).Member()
	alone, done := context.WithCancel(t.Context())
	done()
	a := admission("k", 201, 1, 1)
	a.Member = member
	if _, err := l.Admit(alone, a, event); !errors.Is(err, context.Canceled) {
		t.Errorf("the first admission waits for the other member: %v", err)
	}
	a = admission("k", 202, 1, 1)
	a.Member = member
	mustAdmit(t, l, a, ledger.Fresh) // the second admission does not wait
}

// TestGroupMembersThatLeave checks that members without a request do not delay the group, whether
// they leave before or after the others admit.
func TestGroupMembersThatLeave(t *testing.T) {
	l, _ := create(t)
	for _, order := range []string{"first", "last", "only"} {
		g := l.Group(3)
		one, two := g.Member(), g.Member()
		if order != "last" {
			one.Leave(t.Context())
			one.Leave(t.Context()) // a second time does nothing
			two.Leave(t.Context())
		}
		if order == "only" {
			g.Member().Leave(t.Context())
			continue
		}
		done := member(t.Context(), l, g, admission(ledger.Scope(order), 1, 1, 1))
		if order == "last" {
			one.Leave(t.Context())
			two.Leave(t.Context())
		}
		if err := <-done; err != nil {
			t.Errorf("%s: %v", order, err)
		}
	}
}

// TestGroupMemberWhoseTimeIsOver checks a member whose context ends before the group is complete.
// The member's Admit returns at once, and the writer executes its request with those of the others.
func TestGroupMemberWhoseTimeIsOver(t *testing.T) {
	l, _ := create(t)
	g := l.Group(2)
	ctx, cancel := context.WithCancel(t.Context())
	impatient := member(ctx, l, g, admission("k", 1, 1, 1))
	cancel()
	if err := <-impatient; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if err := <-member(t.Context(), l, g, admission("k", 2, 1, 1)); err != nil {
		t.Error(err)
	}
	mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Repeated)
}

// TestGroupInAClosingLedger checks that Close ends the waiting of an incomplete group.
func TestGroupInAClosingLedger(t *testing.T) {
	l, _ := create(t)
	g := l.Group(2)
	waiting := member(t.Context(), l, g, admission("k", 1, 1, 1))
	l.Close()
	if err := <-waiting; !errors.Is(err, ledger.ErrClosed) {
		t.Errorf("%v", err)
	}
	if err := <-member(t.Context(), l, g, admission("k", 2, 1, 1)); !errors.Is(err, ledger.ErrClosed) {
		t.Errorf("%v", err)
	}
}

// TestGroupOnABrokenDisk checks that all members get the same error. After ErrDisk no nonce is
// spent.
func TestGroupOnABrokenDisk(t *testing.T) {
	disk := disktest.New(t)
	l, _ := createOn(t, disk)
	fails := func(want error) {
		t.Helper()
		g := l.Group(2)
		one := member(t.Context(), l, g, admission("k", 1, 1, 1))
		two := member(t.Context(), l, g, admission("k", 2, 1, 1))
		for _, done := range []<-chan error{one, two} {
			if err := <-done; !errors.Is(err, want) {
				t.Errorf("%v, want %v", err, want)
			}
		}
	}
	disk.Fail(failing(syscall.EROFS, noSync))
	fails(ledger.ErrDisk)
	disk.Fail(nil)
	for n := range byte(2) {
		if _, err := l.Spent(t.Context(), "k", [32]byte{n + 1}); !errors.Is(err, ledger.ErrNotFound) {
			t.Errorf("the nonce of a failed admission: %v", err)
		}
	}
	gathering := l.Group(2)
	other := gathering.Member()
	halfway := member(t.Context(), l, gathering, admission("k", 4, 1, 1))
	syncs := 0
	disk.Fail(failing(syscall.EIO, func(op disktest.Op) bool {
		if op.Kind == disktest.Datasync {
			syncs++
		}
		return op.Kind == disktest.Datasync && syncs == 2
	}))
	fails(ledger.ErrUnknownState)
	disk.Fail(nil)
	fails(ledger.ErrUnknownState)
	other.Leave(t.Context())
	if err := <-halfway; !errors.Is(err, ledger.ErrUnknownState) {
		t.Errorf("admitted by a ledger whose state is unknown: %v", err)
	}
	l.Close()
}
