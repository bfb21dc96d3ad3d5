package operators

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"countersign/approval"
	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/ledger/disktest"
	"countersign/internal/manage"
	"countersign/internal/scantest"
	"countersign/internal/sshagent"
)

func TestMain(m *testing.M) {
	disktest.Serve() // serves the file system if this process is the one of a test's disk
	os.Exit(scantest.Run(m))
}

// TestPowerCut cuts the power at each moment of a proposal's life, and opens the possible disks of
// that moment. A confirmed state must be on the disk. An act that may have been carried out must
// not run again, even if all approvers approve again.
func TestPowerCut(t *testing.T) {
	disk := disktest.New(t)
	r := newRigIn(t, disk.Dir(), "countersign.example/a", 2)
	r.apply(t, setNeeded, "2")
	enrolled := disk.Mark()
	s, _ := r.signIn(t, r.people[0], root)
	p := r.propose(t, s, "test")
	proposed := disk.Mark()
	if _, err := r.approve(t, r.people[0], p); err != nil {
		t.Fatal(err)
	}
	approved := disk.Mark()
	var begun int
	r.effect = func(context.Context, audit.Actor) error { begun = disk.Mark(); return nil }
	if after, err := r.approve(t, r.people[1], p); err != nil || after.State != Done {
		t.Fatal(after.State, err)
	}
	done := disk.Mark()
	if err := r.ledger.Close(); err != nil {
		t.Fatal(err)
	}
	disk.Unmount()

	var mu sync.Mutex
	seen := map[State]int{}
	disktest.Explore(t, disk.Record(), disktest.Options{States: 12, Total: 1200}, func(dir string, at int) error {
		left := &rig{path: filepath.Join(dir, "ledger.db"), name: r.name, people: r.people}
		l, err := ledger.Open(left.path, ledger.Options{}) // without a replica: one of hundreds of disks
		if err := left.openOn(l, err); at < enrolled && err != nil {
			return nil
		} else if err != nil {
			return err
		}
		defer left.ledger.Close()
		if at < enrolled {
			return nil
		}
		found, err := left.Proposal(p.ID)
		if err != nil {
			if at < proposed {
				return nil
			}
			return err
		}
		mu.Lock()
		seen[found.State]++
		mu.Unlock()
		if at >= approved && found.State == Pending && len(found.Approvals) != 1 || at >= done && found.State != Done {
			return fmt.Errorf("it is %s with %d approvals", found.State, len(found.Approvals))
		}
		for _, each := range left.people {
			if err := left.approveAgain(each, found); err != nil && !errors.Is(err, ErrConflict) {
				return err
			}
		}
		runs := 0 // of the act, before and after the power cut
		if at >= begun {
			runs++
		}
		runs += int(left.ran.Load())
		after, err := left.Proposal(p.ID)
		switch {
		case err != nil:
			return err
		case runs > 1:
			return errors.New("it has run twice")
		case found.State == Pending && (after.State != Done || left.ran.Load() != 1):
			return fmt.Errorf("it was open, and is %s when all have approved it", after.State)
		case found.State != Pending && (after.State != found.State || left.ran.Load() != 0):
			return fmt.Errorf("it was %s, and is %s", found.State, after.State)
		}
		return nil
	})
	if seen[Pending] == 0 || seen[Interrupted] == 0 || seen[Done] == 0 {
		t.Errorf("the disks had %v", seen)
	}
}

// approveAgain signs in and approves. approveAgain may run outside the goroutine of the test.
func (r *rig) approveAgain(s *signer, p Proposal) error {
	sign := func(namespace, text string) approval.Proof {
		proof, err := sshagent.Sign(s.agent, s.credential, namespace, text)
		if err != nil {
			panic(err)
		}
		return proof
	}
	c, err := r.Challenge(approval.ForSignIn, s.name, "", root)
	if err != nil {
		return err
	}
	session, _, err := r.SignIn(context.Background(), root, c.ID, sign(approval.ForSignIn, c.Text))
	if err != nil {
		return err
	}
	_, err = r.Approve(context.Background(), session, p.ID, sign(approval.ForProposal, p.Text()))
	return err
}

func TestBrokenDisk(t *testing.T) {
	disk := disktest.New(t)
	rigOn := func(t *testing.T) *rig {
		dir, err := os.MkdirTemp(disk.Dir(), "")
		if err != nil {
			t.Fatal(err)
		}
		r := newRigIn(t, dir, "countersign.example/a", 1)
		t.Cleanup(func() { disk.Fail(nil) })
		return r
	}
	// failSync has the nth sync of the ledger's file fail: the first sync comes before the write of
	// the meta page, the second sync after it.
	failSync := func(nth int32) {
		var syncs atomic.Int32
		disk.Fail(func(op disktest.Op) syscall.Errno {
			if op.Kind == disktest.Datasync && strings.HasSuffix(op.Path, "ledger.db") && syncs.Add(1) == nth {
				return syscall.EIO
			}
			return 0
		})
	}

	t.Run("what was not written is not run", func(t *testing.T) {
		r := rigOn(t)
		s, _ := r.signIn(t, r.people[0], root)
		p := r.propose(t, s, "test")
		failSync(1)
		_, err := r.Approve(t.Context(), s, p.ID, r.people[0].sign(t, p.Text()))
		want(t, err, ledger.ErrDisk)
		disk.Fail(nil)
		if got, _ := r.Proposal(p.ID); got.State != Pending || len(got.Approvals) != 0 || r.ran.Load() != 0 {
			t.Errorf("it is %+v, and has run %d times", got, r.ran.Load())
		}
		if after, err := r.approve(t, r.people[0], p); err != nil || after.State != Done || r.ran.Load() != 1 {
			t.Errorf("when the disk is well again it is %s, %v, and has run %d times", after.State, err, r.ran.Load())
		}
	})
	t.Run("what may be written is not run", func(t *testing.T) {
		r := rigOn(t)
		s, _ := r.signIn(t, r.people[0], root)
		p := r.propose(t, s, "test")
		failSync(2)
		_, err := r.Approve(t.Context(), s, p.ID, r.people[0].sign(t, p.Text()))
		want(t, err, ledger.ErrUnknownState)
		disk.Fail(nil)
		r.reopen(t) // the transaction was written after all
		if got, _ := r.Proposal(p.ID); got.State != Interrupted || r.ran.Load() != 0 {
			t.Errorf("it is %s, and has run %d times", got.State, r.ran.Load())
		}
		r.replay(t)
	})
	t.Run("the end is written when the disk takes it", func(t *testing.T) {
		r := rigOn(t)
		s, _ := r.signIn(t, r.people[0], root)
		p := r.propose(t, s, "test")
		failed := make(chan struct{})
		var once sync.Once
		r.effect = func(context.Context, audit.Actor) error {
			disk.Fail(func(op disktest.Op) syscall.Errno {
				if op.Kind != disktest.Datasync {
					return 0
				}
				once.Do(func() { close(failed) })
				return syscall.EIO
			})
			return nil
		}
		go func() {
			<-failed
			if got, _ := r.Proposal(p.ID); got.State != Running {
				t.Errorf("while its end is not on disk it is %s", got.State)
			}
			disk.Fail(nil)
		}()
		after, err := r.Approve(t.Context(), s, p.ID, r.people[0].sign(t, p.Text()))
		if err != nil || after.State != Done || r.ran.Load() != 1 {
			t.Errorf("it is %s, %v, and has run %d times", after.State, err, r.ran.Load())
		}
		r.replay(t)
	})
	t.Run("no session without its event", func(t *testing.T) {
		r := rigOn(t)
		c, err := r.Challenge(approval.ForSignIn, "o0", "", root)
		if err != nil {
			t.Fatal(err)
		}
		failSync(1)
		_, _, err = r.SignIn(t.Context(), root, c.ID, r.people[0].sign(t, c.Text))
		want(t, err, ledger.ErrDisk)
		if len(r.Sessions()) != 0 {
			t.Error("there is a session")
		}
	})
	t.Run("no operator without its event", func(t *testing.T) {
		r := rigOn(t)
		failSync(1)
		err := r.mutate(t, r.addOperator, "bob", "approver", string(manage.Encode(newSigner(t, "").credential)))
		want(t, err, ledger.ErrDisk)
		if n := len(r.Operators()); n != 1 || r.changed.Load() != 1 {
			t.Errorf("there are %d operators, and presence has heard of %d changes", n, r.changed.Load())
		}
	})
	t.Run("a session ends without its event too", func(t *testing.T) {
		r := rigOn(t)
		s, token := r.signIn(t, r.people[0], root)
		failSync(1)
		want(t, r.SignOut(t.Context(), s), ledger.ErrDisk)
		_, err := r.Session(token, root)
		want(t, err, ErrSignedOut)
	})
}
