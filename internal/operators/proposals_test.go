package operators

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"countersign/approval"
	"countersign/audit"
	"countersign/internal/manage"
)

func TestProposalIsCarriedOut(t *testing.T) {
	r := newRig(t, 2)
	var who audit.Actor
	r.effect = func(_ context.Context, by audit.Actor) error { who = by; return nil }
	r.apply(t, setNeeded, "2")
	s, _ := r.signIn(t, r.people[0], root)
	p := r.propose(t, s, "test", approval.Parameter{Name: "reason", Value: "because"})
	if p.ID != 1 || p.State != Pending || p.Required != 2 || p.Appliance != r.name || p.Proposer != "o0" ||
		p.Expires.Sub(p.Proposed) != DefaultLifetime {
		t.Errorf("the proposal is %+v", p)
	}
	sum := p.Digest()
	digest := hex.EncodeToString(sum[:])
	if _, e := r.events(t, audit.ProposalMade); e.Metadata["text"] != p.Text() || e.Metadata["digest"] != digest {
		t.Errorf("the event is %+v", e)
	}
	after, err := r.approve(t, r.people[1], p)
	if err != nil || after.State != Pending || len(after.Approvals) != 1 || !after.Approvals[0].Counts ||
		r.ran.Load() != 0 {
		t.Fatalf("after one approval it is %+v, %v", after, err)
	}
	_, e := r.events(t, audit.ApprovalGiven)
	if e.Actor.Name != "o1" || e.Metadata["credential"] != r.people[1].credential.ID ||
		!strings.Contains(e.Metadata["proof"], "SSH SIGNATURE") || e.Metadata["digest"] != digest {
		t.Errorf("the event is %+v", e)
	}
	_, err = r.approve(t, r.people[1], p) // once
	want(t, err, ErrConflict)
	after, err = r.approve(t, r.people[0], p)
	if err != nil || after.State != Done || after.Ended.IsZero() || r.ran.Load() != 1 {
		t.Fatalf("after two approvals it is %+v, %v, and has run %d times", after, err, r.ran.Load())
	}
	if who.Name != "o0" || who.Proposal != p.ID {
		t.Errorf("it is carried out as %+v", who)
	}
	_, err = r.approve(t, r.people[1], p)
	want(t, err, ErrConflict)
	s, _ = r.signIn(t, r.people[0], root)
	want(t, r.Withdraw(t.Context(), s, p.ID), ErrConflict)
	if got := r.trail(t, p.ID); got != "ProposalMade ApprovalGiven ApprovalGiven ProposalRun ProposalDone" {
		t.Errorf("the log has %s", got)
	}
	if r.ran.Load() != 1 {
		t.Error("it has run again")
	}
}

// TestApprovalsAtOnce has 50 approvers approve at once, with a quorum of 1, 25 and 50.
func TestApprovalsAtOnce(t *testing.T) {
	const approvers = 50
	for _, needed := range []int{1, 25, approvers} {
		t.Run(fmt.Sprint(needed), func(t *testing.T) {
			r := newRig(t, approvers)
			if needed > 1 {
				r.apply(t, setNeeded, fmt.Sprint(needed))
			}
			s, _ := r.signIn(t, r.people[0], root)
			p := r.propose(t, s, "test")
			sessions := make([]Session, approvers)
			for i, each := range r.people {
				sessions[i], _ = r.signIn(t, each, root)
			}
			var given, late, done atomic.Int32
			all(approvers, func(i int) {
				after, err := r.Approve(t.Context(), sessions[i], p.ID, r.people[i].sign(t, p.Text()))
				switch {
				case err == nil:
					given.Add(1)
					if after.State == Done {
						done.Add(1)
					}
				case errors.Is(err, ErrConflict):
					late.Add(1)
				default:
					t.Error(err)
				}
			})
			after, err := r.Proposal(p.ID)
			if err != nil || after.State != Done || r.ran.Load() != 1 {
				t.Errorf("it is %v, %v, and has run %d times", after.State, err, r.ran.Load())
			}
			if int(given.Load()) != needed || int(late.Load()) != approvers-needed ||
				len(after.Approvals) != needed || done.Load() < 1 {
				t.Errorf("%d have approved and %d were late; it has %d approvals",
					given.Load(), late.Load(), len(after.Approvals))
			}
			for _, of := range []audit.Type{audit.ProposalRun, audit.ProposalDone} {
				if n, _ := r.events(t, of); n != 1 {
					t.Errorf("%d events %s", n, of)
				}
			}
		})
	}
}

// TestCrash copies the ledger in each state of a proposal, as a crash would leave the file, and
// opens the copies.
func TestCrash(t *testing.T) {
	r := newRig(t, 2)
	r.apply(t, setNeeded, "2")
	copied := map[string]string{}
	save := func(name string) {
		t.Helper()
		b, err := os.ReadFile(r.path)
		if err == nil {
			copied[name] = filepath.Join(t.TempDir(), "ledger.db")
			err = os.WriteFile(copied[name], b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	s, _ := r.signIn(t, r.people[0], root)
	p := r.propose(t, s, "test")
	save("proposed")
	if _, err := r.approve(t, r.people[1], p); err != nil {
		t.Fatal(err)
	}
	save("approved once")
	r.effect = func(context.Context, audit.Actor) error { save("running"); return nil }
	if _, err := r.approve(t, r.people[0], p); err != nil {
		t.Fatal(err)
	}
	save("done")
	for _, c := range []struct {
		name      string
		state     State
		approvals int    // accepted after the crash, of two
		trail     string // events after these approvals
		ran       int32
	}{
		{"proposed", Pending, 2, "ProposalMade ApprovalGiven ApprovalGiven ProposalRun ProposalDone", 1},
		{"approved once", Pending, 1, "ProposalMade ApprovalGiven ApprovalGiven ProposalRun ProposalDone", 1},
		{"running", Interrupted, 0, "ProposalMade ApprovalGiven ApprovalGiven ProposalRun ProposalDone:interrupted", 0},
		{"done", Done, 0, "ProposalMade ApprovalGiven ApprovalGiven ProposalRun ProposalDone", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			crashed := &rig{path: copied[c.name], name: r.name, people: r.people}
			for range 2 { // the second start finds the state that the first start has written
				crashed.open(t)
				if got, err := crashed.Proposal(p.ID); err != nil || got.State != c.state || got.Text() != p.Text() {
					t.Errorf("it is %+v, %v", got, err)
				}
				if err := crashed.ledger.Close(); err != nil {
					t.Fatal(err)
				}
			}
			crashed.open(t)
			defer crashed.ledger.Close()
			taken := 0
			for _, each := range crashed.people {
				if _, err := crashed.approve(t, each, p); err == nil {
					taken++
				} else {
					want(t, err, ErrConflict)
				}
			}
			if got := crashed.trail(t, p.ID); taken != c.approvals || got != c.trail || crashed.ran.Load() != c.ran {
				t.Errorf("it took %d approvals and ran %d times; the log has %s", taken, crashed.ran.Load(), got)
			}
		})
	}
}

// TestHangingActIsInterrupted checks an act that outlives its caller and its ledger, and ends after
// another Registry was opened.
func TestHangingActIsInterrupted(t *testing.T) {
	r := newRig(t, 1)
	hang, begun := make(chan struct{}), make(chan struct{})
	r.effect = func(context.Context, audit.Actor) error { close(begun); <-hang; return nil }
	s, _ := r.signIn(t, r.people[0], root)
	p := r.propose(t, s, "test")
	ctx, leave := context.WithCancel(t.Context())
	go func() { <-begun; leave() }()
	after, err := r.Approve(ctx, s, p.ID, r.people[0].sign(t, p.Text()))
	if err != nil || after.State != Running {
		t.Fatalf("for a caller who leaves it is %v, %v", after.State, err)
	}
	before := r.Registry
	before.mu.Lock()
	end := before.executing[p.ID]
	before.mu.Unlock()
	r.reopen(t)
	close(hang)
	<-end // the old Registry could not write the end
	if got, _ := r.Proposal(p.ID); got.State != Interrupted || got.Cause == "" {
		t.Errorf("after a restart it is %+v", got)
	}
	_, err = r.approve(t, r.people[0], p)
	want(t, err, ErrConflict)
	r.reopen(t)
	trail := r.trail(t, p.ID)
	if r.ran.Load() != 1 || trail != "ProposalMade ApprovalGiven ProposalRun ProposalDone:interrupted" {
		t.Errorf("it has run %d times; the log has %s", r.ran.Load(), trail)
	}
	r.replay(t)
}

func TestCallerLeaves(t *testing.T) {
	r := newRig(t, 1)
	began, hang := make(chan struct{}), make(chan struct{})
	ctx, leave := context.WithCancel(t.Context())
	r.effect = func(ctx context.Context, _ audit.Actor) error { close(began); <-hang; return ctx.Err() }
	s, _ := r.signIn(t, r.people[0], root)
	p := r.propose(t, s, "test")
	left := make(chan error)
	go func() {
		_, err := r.Approve(ctx, s, p.ID, r.people[0].sign(t, p.Text()))
		left <- err
	}()
	<-began
	r.propose(t, s, "test") // waits until the caller has seen the commit, and waits for the act alone
	leave()
	if err := <-left; err != nil {
		t.Fatal(err)
	}
	// Other requests are served while the act runs.
	r.apply(t, r.addOperator, "bob", "approver", string(manage.Encode(newSigner(t, "").credential)))
	other := r.propose(t, s, "test")
	ctx, give := context.WithTimeout(t.Context(), time.Millisecond)
	defer give()
	if err := r.Close(ctx); err == nil {
		t.Error("it is closed while an act is under way")
	}
	_, err := r.Approve(t.Context(), s, other.ID, r.people[0].sign(t, other.Text()))
	want(t, err, ErrUnavailable)
	close(hang)
	if err := r.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if got, _ := r.Proposal(p.ID); got.State != Done {
		t.Errorf("it is %v when all has ended", got.State)
	}
	if r.reopen(t); r.trail(t, p.ID) != "ProposalMade ApprovalGiven ProposalRun ProposalDone" {
		t.Errorf("the log has %s", r.trail(t, p.ID))
	}
}

func TestActsFail(t *testing.T) {
	r := newRig(t, 1)
	for name, c := range map[string]struct {
		act   func(context.Context, audit.Actor) error
		state State
		trail string
	}{
		"an error": {func(context.Context, audit.Actor) error {
			return errors.New("no such key")
		}, Failed, "ProposalDone:failed"},
		"a panic": {func(context.Context, audit.Actor) error { panic("x") }, Interrupted, "ProposalDone:interrupted"},
	} {
		r.effect = c.act
		r.ran.Store(0)
		s, _ := r.signIn(t, r.people[0], root)
		p := r.propose(t, s, "test")
		after, err := r.approve(t, r.people[0], p)
		if err != nil || after.State != c.state || after.Cause == "" {
			t.Errorf("%s: it is %+v, %v", name, after, err)
		}
		if _, e := r.events(t, audit.ProposalDone); e.Metadata["cause"] != after.Cause {
			t.Errorf("%s: the event is %+v", name, e)
		}
		_, err = r.approve(t, r.people[0], p)
		want(t, err, ErrConflict)
		if got := r.trail(t, p.ID); r.ran.Load() != 1 || !strings.HasSuffix(got, c.trail) {
			t.Errorf("%s: it has run %d times; the log has %s", name, r.ran.Load(), got)
		}
	}
	r.replay(t)
}

func TestExpiredNeverRuns(t *testing.T) {
	for name, expire := range map[string]func(*testing.T, *rig){
		"nobody looked": func(*testing.T, *rig) {},
		"looked at":     func(t *testing.T, r *rig) { want(t, r.Expire(t.Context()), nil) },
		"a restart":     func(t *testing.T, r *rig) { r.reopen(t) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 2)
				r.apply(t, setNeeded, "2")
				s, _ := r.signIn(t, r.people[0], root)
				p, err := r.Propose(t.Context(), s, "test", nil, nil, MinLifetime)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := r.approve(t, r.people[0], p); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Until(p.Expires) - time.Second)
				want(t, r.Expire(t.Context()), nil)
				if got, _ := r.Proposal(p.ID); got.State != Pending {
					t.Errorf("a second before its end it is %s", got.State)
				}
				time.Sleep(time.Second)
				expire(t, r)
				if got, _ := r.Proposal(p.ID); got.State != Expired {
					t.Errorf("at its end it is %s", got.State)
				}
				_, err = r.approve(t, r.people[1], p)
				want(t, err, ErrConflict)
				want(t, r.Expire(t.Context()), nil)
				if got := r.trail(t, p.ID); r.ran.Load() != 0 || got != "ProposalMade ApprovalGiven ProposalExpired" {
					t.Errorf("it has run %d times; the log has %s", r.ran.Load(), got)
				}
			})
		})
	}
}

func TestWithdrawnNeverRuns(t *testing.T) {
	r := newRig(t, 3)
	mine, _ := r.signIn(t, r.people[1], root)
	other, _ := r.signIn(t, r.people[2], root)
	admin, _ := r.signIn(t, r.people[0], root)
	for _, by := range []Session{mine, admin} {
		p := r.propose(t, mine, "test")
		want(t, r.Withdraw(t.Context(), other, p.ID), ErrNotAllowed)
		want(t, r.Withdraw(t.Context(), by, 1000), ErrNotFound)
		if err := r.Withdraw(t.Context(), by, p.ID); err != nil {
			t.Fatal(err)
		}
		_, err := r.approve(t, r.people[0], p)
		want(t, err, ErrConflict)
		want(t, r.Withdraw(t.Context(), by, p.ID), ErrConflict)
		if got := r.trail(t, p.ID); r.ran.Load() != 0 || got != "ProposalMade ProposalWithdrawn" {
			t.Errorf("it has run %d times; the log has %s", r.ran.Load(), got)
		}
		if _, e := r.events(t, audit.ProposalWithdrawn); e.Actor.Name != by.Operator {
			t.Errorf("the event is %+v", e)
		}
	}
}

// TestApprovalsThatCountNoMore takes the role, a credential or the enrolment from the first
// approver before the second one approves.
func TestApprovalsThatCountNoMore(t *testing.T) {
	for name, c := range map[string]struct {
		take func(t *testing.T, r *rig)
		// back may make the first approval count again, and returns the approver whose approval
		// then starts the act. A nil function means that the act has run already.
		back func(t *testing.T, r *rig) *signer
	}{
		"the role": {func(t *testing.T, r *rig) { r.apply(t, setRoles, "o1", "auditor") },
			func(t *testing.T, r *rig) *signer { r.apply(t, setRoles, "o1", "approver"); return r.people[1] }},
		"the credential": {func(t *testing.T, r *rig) {
			r.apply(t, r.addCredential, "o1", string(manage.Encode(r.people[4].credential)))
			r.apply(t, removeCredential, "o1", r.people[1].credential.ID)
		}, func(t *testing.T, r *rig) *signer {
			p, _ := r.Proposal(1)
			other := &signer{name: "o1", agent: r.people[4].agent, credential: r.people[4].credential}
			_, err := r.approve(t, other, p)
			want(t, err, ErrConflict) // an operator approves once
			return r.people[3]
		}},
		"the enrolment": {func(t *testing.T, r *rig) { r.apply(t, removeOperator, "o1") },
			func(t *testing.T, r *rig) *signer { return r.people[3] }},
		"the credential, which is another's now": {func(t *testing.T, r *rig) {
			r.apply(t, removeOperator, "o1")
			r.apply(t, r.addCredential, "o2", string(manage.Encode(r.people[1].credential)))
		}, func(t *testing.T, r *rig) *signer { return r.people[3] }},
		"nothing, but more are needed": {func(t *testing.T, r *rig) { r.apply(t, setNeeded, "3") },
			func(t *testing.T, r *rig) *signer { return r.people[3] }},
		"nothing, and fewer are needed": {func(t *testing.T, r *rig) { r.apply(t, setNeeded, "1") }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 4)
			r.people = append(r.people, newSigner(t, "")) // a key of no operator
			r.apply(t, setNeeded, "2")
			s, _ := r.signIn(t, r.people[0], root)
			p := r.propose(t, s, "test")
			if _, err := r.approve(t, r.people[1], p); err != nil {
				t.Fatal(err)
			}
			c.take(t, r)
			after, err := r.approve(t, r.people[2], p)
			if err != nil {
				t.Fatal(err)
			}
			if c.back == nil {
				if after.State != Done {
					t.Errorf("it is %s", after.State)
				}
				return
			}
			if after.State != Pending || r.ran.Load() != 0 {
				t.Fatalf("it is %s, and has run %d times", after.State, r.ran.Load())
			}
			if after.Approvals[0].Counts != strings.HasPrefix(name, "nothing") {
				t.Errorf("its approvals are shown as %+v", after.Approvals)
			}
			if after, err = r.approve(t, c.back(t, r), p); err != nil || after.State != Done || r.ran.Load() != 1 {
				t.Errorf("at last it is %s, %v, and has run %d times", after.State, err, r.ran.Load())
			}
		})
	}
}

// TestFewerNeededThanItsText checks that the quorum in a proposal's text counts if the quorum in
// force is smaller.
func TestFewerNeededThanItsText(t *testing.T) {
	r := newRig(t, 2)
	r.apply(t, setNeeded, "2")
	s, _ := r.signIn(t, r.people[0], root)
	p := r.propose(t, s, "test")
	r.apply(t, setNeeded, "1")
	if after, err := r.approve(t, r.people[0], p); err != nil || after.State != Pending || r.ran.Load() != 0 {
		t.Errorf("it is %s, %v", after.State, err)
	}
}

func TestOnePersonCountsOnce(t *testing.T) {
	r := newRig(t, 2)
	r.apply(t, setNeeded, "2")
	second := newSigner(t, "o1")
	r.apply(t, r.addCredential, "o1", string(manage.Encode(second.credential)))
	s, _ := r.signIn(t, r.people[0], root)
	p := r.propose(t, s, "test")
	if _, err := r.approve(t, r.people[1], p); err != nil {
		t.Fatal(err)
	}
	_, err := r.approve(t, second, p)
	want(t, err, ErrConflict)
	if got, _ := r.Proposal(p.ID); got.State != Pending || len(got.Approvals) != 1 || r.ran.Load() != 0 {
		t.Errorf("it is %+v", got)
	}
}

func TestApprovalsOfSomethingElse(t *testing.T) {
	r := newRig(t, 2)
	s, _ := r.signIn(t, r.people[0], root)
	p, other := r.propose(t, s, "test"), r.propose(t, s, "test")
	// On another appliance, the same person is an operator and makes the same proposal.
	b := newRigNamed(t, "countersign.example/b", 0)
	b.enrol(t, r.people[0], "")
	bs, _ := b.signIn(t, r.people[0], root)
	there := b.propose(t, bs, "test")
	borrowed := r.people[1].sign(t, p.Text())
	renamed := borrowed
	renamed.Credential = r.people[0].credential.ID
	for name, proof := range map[string]approval.Proof{
		"another proposal":               r.people[0].sign(t, other.Text()),
		"another appliance":              r.people[0].sign(t, there.Text()),
		"another approver's":             borrowed,
		"another approver's, renamed":    renamed,
		"the digest, for another thing":  sshsig(t, r.people[0], approval.ForSignIn, p.Text()),
		"none":                           {},
		"an operator who has none of it": {Credential: strings.Repeat("0", 32), SSHSIG: borrowed.SSHSIG},
	} {
		before, _ := r.events(t, audit.SignInRefused)
		_, err := r.Approve(t.Context(), s, p.ID, proof)
		want(t, err, approval.ErrNotProven)
		if n, e := r.events(t, audit.SignInRefused); n != before+1 || e.Metadata["purpose"] != approval.ForProposal {
			t.Errorf("%s: the event is %+v", name, e)
		}
	}
	if got, _ := r.Proposal(p.ID); len(got.Approvals) != 0 || r.ran.Load() != 0 {
		t.Errorf("it is %+v", got)
	}
	_, err := r.Approve(t.Context(), s, 1000, r.people[0].sign(t, p.Text()))
	want(t, err, ErrNotFound)
}

func TestWhoMayApprove(t *testing.T) {
	r := newRig(t, 1)
	carol := newSigner(t, "carol")
	r.enrol(t, carol, "administrator,operator,auditor")
	s, _ := r.signIn(t, carol, root)
	p := r.propose(t, s, "test")
	_, err := r.approve(t, carol, p)
	want(t, err, ErrNotAllowed)
	if err := r.SignOut(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	_, err = r.Approve(t.Context(), s, p.ID, carol.sign(t, p.Text()))
	want(t, err, ErrSignedOut)
	want(t, r.Withdraw(t.Context(), s, p.ID), ErrSignedOut)
}

func TestProposeRefuses(t *testing.T) {
	r := newRig(t, 1)
	carol := newSigner(t, "carol")
	r.enrol(t, carol, "auditor")
	s, _ := r.signIn(t, r.people[0], root)
	auditor, _ := r.signIn(t, carol, root)
	digest := sha256.Sum256([]byte("text"))
	named := []approval.Parameter{{Name: "sha256", Value: hex.EncodeToString(digest[:])}}
	one := func(name, value string) []approval.Parameter { return []approval.Parameter{{Name: name, Value: value}} }
	long := strings.Repeat("x", 900)
	tooLong := slices.Concat(one("a", long), one("b", long), one("c", "x"))
	for name, c := range map[string]struct {
		s        Session
		act      string
		p        []approval.Parameter
		content  []byte
		lifetime time.Duration
		is       error
	}{
		"signed out":               {Session{ID: "x", Operator: "o0"}, "test", nil, nil, 0, ErrSignedOut},
		"another's session":        {Session{ID: s.ID, Operator: "carol"}, "test", nil, nil, 0, ErrSignedOut},
		"not his role":             {auditor, "test", nil, nil, 0, ErrNotAllowed},
		"an unknown act":           {s, "tests", nil, nil, 0, ErrInvalid},
		"too short a life":         {s, "test", nil, nil, MinLifetime - 1, ErrInvalid},
		"too long a life":          {s, "test", nil, nil, MaxLifetime + 1, ErrInvalid},
		"content that nobody sees": {s, "test", nil, []byte("text"), 0, ErrInvalid},
		"other content":            {s, "test", named, []byte("other"), 0, ErrInvalid},
		"too much content":         {s, "test", named, make([]byte, MaxContent+1), 0, ErrInvalid},
		"two lines":                {s, "test", one("reason", "a\nnonce: b"), nil, 0, ErrInvalid},
		"a name with a value":      {s, "test", one("reason: a", "b"), nil, 0, ErrInvalid},
		"an empty value":           {s, "test", one("reason", ""), nil, 0, ErrInvalid},
		"too long a text":          {s, "test", tooLong, nil, 0, ErrInvalid},
	} {
		if _, err := r.Propose(t.Context(), c.s, c.act, c.p, c.content, c.lifetime); err == nil {
			t.Errorf("%s: it is proposed", name)
		} else if !errors.Is(err, c.is) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n, _ := r.events(t, audit.ProposalMade); n != 0 || len(r.Proposals()) != 0 {
		t.Errorf("there are %d proposals", n)
	}
	p, err := r.Propose(t.Context(), s, "test", named, []byte("text"), MaxLifetime)
	if err != nil || string(p.Content) != "text" {
		t.Fatalf("%+v, %v", p, err)
	}
	for range maxPendingOf - 1 {
		r.propose(t, s, "test")
	}
	_, err = r.Propose(t.Context(), s, "test", nil, nil, 0)
	want(t, err, ErrConflict)
	if after, err := r.approve(t, r.people[0], p); err != nil || after.State != Done || after.Content != nil {
		t.Errorf("it is %+v, %v", after, err)
	}
	r.propose(t, s, "test")
}

// TestEndedProposalsMakeRoom checks that the oldest ended proposals are evicted, and that no number
// is used twice.
func TestEndedProposalsMakeRoom(t *testing.T) {
	r := newRig(t, 1)
	s, _ := r.signIn(t, r.people[0], root)
	first, open := r.propose(t, s, "test"), r.propose(t, s, "test")
	if err := r.Withdraw(t.Context(), s, first.ID); err != nil {
		t.Fatal(err)
	}
	for i := range maxEnded { // maxEnded other ended proposals, in memory only
		ended := *r.proposals[first.ID]
		text := *ended.proposal
		text.ID = uint64(3 + i)
		ended.proposal = &text
		r.proposals[text.ID] = &ended
	}
	last := r.propose(t, s, "test")
	_, err := r.Proposal(first.ID)
	if !errors.Is(err, ErrNotFound) || last.ID != maxEnded+3 || len(r.Proposals()) != maxEnded+2 {
		t.Errorf("%v; the last one is %d of %d", err, last.ID, len(r.Proposals()))
	}
	r.reopen(t)
	if got := r.Proposals(); len(got) != 2 || got[0].ID != last.ID || got[1].ID != open.ID {
		t.Errorf("the ledger has %+v", got)
	}
}

// TestApprovalInTheLogIsCanonical approves with the armor in one long line, as a tool other than
// ssh-keygen may write it. The log has the form of ssh-keygen.
func TestApprovalInTheLogIsCanonical(t *testing.T) {
	r := newRig(t, 1)
	s, _ := r.signIn(t, r.people[0], root)
	p := r.propose(t, s, "test")
	proof := r.people[0].sign(t, p.Text())
	want := proof.SSHSIG
	lines := strings.Split(strings.TrimSpace(want), "\n")
	proof.SSHSIG = lines[0] + "\n" + strings.Join(lines[1:len(lines)-1], "") + "\n" + lines[len(lines)-1]
	if _, err := r.Approve(t.Context(), s, p.ID, proof); err != nil {
		t.Fatal(err)
	}
	_, e := r.events(t, audit.ApprovalGiven)
	var logged approval.Proof
	if err := json.Unmarshal([]byte(e.Metadata["proof"]), &logged); err != nil || logged.SSHSIG != want {
		t.Errorf("the log has %q, want %q: %v", logged.SSHSIG, want, err)
	}
}

// TestProposalEndsWithItsProposer: an open proposal ends in the moment in which its proposer may no
// longer propose its act. Nothing is carried out in the name of that person or of a namesake.
func TestProposalEndsWithItsProposer(t *testing.T) {
	for name, c := range map[string]struct {
		lose func(t *testing.T, r *rig)
		ends bool
	}{
		"removed": {func(t *testing.T, r *rig) { r.apply(t, removeOperator, "o1") }, true},
		"removed, and another person has the name": {func(t *testing.T, r *rig) {
			r.apply(t, removeOperator, "o1")
			namesake := string(manage.Encode(newSigner(t, "").credential))
			r.apply(t, r.addOperator, "o1", "administrator", namesake)
		}, true},
		"without the role": {func(t *testing.T, r *rig) { r.apply(t, setRoles, "o1", "auditor") }, true},
		"without the role for a while": {func(t *testing.T, r *rig) {
			r.apply(t, setRoles, "o1", "auditor")
			r.apply(t, setRoles, "o1", "administrator")
		}, true},
		"with another role that may": {func(t *testing.T, r *rig) {
			r.apply(t, setRoles, "o1", "administrator")
		}, false},
		"another operator is removed": {func(t *testing.T, r *rig) { r.apply(t, removeOperator, "o2") }, false},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 5)
			r.apply(t, setNeeded, "2")
			s, _ := r.signIn(t, r.people[1], root)
			p := r.propose(t, s, "test")
			if _, err := r.approve(t, r.people[3], p); err != nil {
				t.Fatal(err)
			}
			c.lose(t, r)
			for _, restart := range []bool{false, true} {
				if restart {
					r.reopen(t)
				}
				got, err := r.Proposal(p.ID)
				if err != nil || (got.State == Expired) != c.ends || (got.Cause != "") != c.ends ||
					got.Ended.IsZero() == c.ends {
					t.Errorf("it is %+v, %v", got, err)
				}
			}
			after, err := r.approve(t, r.people[4], p)
			if c.ends {
				want(t, err, ErrConflict)
			} else if err != nil || after.State != Done {
				t.Errorf("it is %+v, %v", after, err)
			}
			if n, e := r.events(t, audit.ProposalExpired); (n == 1) != c.ends || c.ends && e.Metadata["cause"] == "" {
				t.Errorf("%d events, the last one is %+v", n, e)
			}
			if ran := r.ran.Load(); (ran == 0) != c.ends {
				t.Errorf("it has run %d times", ran)
			}
		})
	}
}

// TestProposerRemovesProposer: two administrators each propose to remove the other, and the log is
// sound for an auditor. The act that runs is the end of the other proposal.
func TestProposerRemovesProposer(t *testing.T) {
	r := newRig(t, 1)
	admin, bob := r.people[0], newSigner(t, "bob")
	s, _ := r.signIn(t, admin, root)
	p := r.propose(t, s, "operator add", approval.Parameter{Name: "name", Value: "bob"},
		approval.Parameter{Name: "roles", Value: "administrator,approver"},
		approval.Parameter{Name: "credential", Value: string(manage.Encode(bob.credential))})
	if after, err := r.approve(t, admin, p); err != nil || after.State != Done {
		t.Fatalf("%+v, %v", after, err)
	}
	s, _ = r.signIn(t, bob, root)
	theirs := r.propose(t, s, "operator remove", approval.Parameter{Name: "name", Value: "o0"})
	s, _ = r.signIn(t, admin, root)
	mine := r.propose(t, s, "operator remove", approval.Parameter{Name: "name", Value: "bob"})
	if after, err := r.approve(t, admin, mine); err != nil || after.State != Done {
		t.Fatalf("%+v, %v", after, err)
	}
	if got, _ := r.Proposal(theirs.ID); got.State != Expired || got.Cause == "" {
		t.Errorf("the proposal of the removed operator is %+v", got)
	}
	r.replay(t)
}

// TestQuorumOfAllWarns: a roster in which the loss of one approver leaves no quorum is warned of
// before the approval of the act that makes it so.
func TestQuorumOfAllWarns(t *testing.T) {
	type list = []approval.Parameter
	parameter := func(name, value string) approval.Parameter { return approval.Parameter{Name: name, Value: value} }
	lessOf2 := list{parameter("name", "o2"), parameter("roles", "auditor")}
	more := list{parameter("name", "o1"), parameter("roles", "auditor,approver")}
	for name, c := range map[string]struct {
		people int
		needed string
		act    string
		p      list
		warns  bool
	}{
		"2 of 2":              {2, "1", "approvals needed", list{parameter("needed", "2")}, true},
		"2 of 3":              {3, "1", "approvals needed", list{parameter("needed", "2")}, false},
		"removed, 2 of 2":     {3, "2", "operator remove", list{parameter("name", "o2")}, true},
		"removed, 2 of 3":     {4, "2", "operator remove", list{parameter("name", "o2")}, false},
		"role lost, 2 of 2":   {3, "2", "operator roles", lessOf2, true},
		"1 of 2":              {2, "2", "approvals needed", list{parameter("needed", "1")}, false},
		"another role, as is": {2, "2", "operator roles", more, false},
	} {
		r := newRig(t, c.people)
		if c.needed != "1" {
			r.apply(t, setNeeded, c.needed)
		}
		s, _ := r.signIn(t, r.people[0], root)
		if w := r.Warnings(r.propose(t, s, c.act, c.p...)); (len(w) == 1) != c.warns {
			t.Errorf("%s: the warnings are %q", name, w)
		}
	}
	r := newRig(t, 2)
	before := r.QuorumWarning()
	if r.apply(t, setNeeded, "2"); before != "" || r.QuorumWarning() == "" {
		t.Errorf("1 of 2: %q; 2 of 2: %q", before, r.QuorumWarning())
	}
	// An open proposal whose act has become impossible says so.
	s, _ := r.signIn(t, r.people[0], root)
	r.apply(t, r.addOperator, "bob", "approver", string(manage.Encode(newSigner(t, "").credential)))
	p := r.propose(t, s, "operator remove", parameter("name", "bob"))
	r.apply(t, removeOperator, "bob")
	if w := r.Warnings(p); len(w) != 1 || !strings.Contains(w[0], "would fail") {
		t.Errorf("the warnings are %q", w)
	}
}
