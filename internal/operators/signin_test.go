package operators

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"countersign/approval"
	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/meter"
	"countersign/internal/secret"

	"golang.org/x/crypto/ssh"
)

func TestSignIn(t *testing.T) {
	r := newRig(t, 1)
	s, token := r.signIn(t, r.people[0], user)
	if s.Operator != "o0" || s.Credential != r.people[0].credential.ID || len(s.Roles) != 4 ||
		s.Expires.Sub(s.Begun) != time.Hour {
		t.Errorf("the session is %+v", s)
	}
	if _, e := r.events(t, audit.OperatorSignedIn); e.Actor.Name != "o0" || e.Resource != "session/"+s.ID ||
		strings.Contains(string(manage.Encode(e)), string(token.Expose())) {
		t.Errorf("the event is %+v", e)
	}
	if got, err := r.Session(token, user); err != nil || got.ID != s.ID {
		t.Errorf("the session of the token is %+v, %v", got, err)
	}
	for _, ch := range []Channel{root, {Kind: Unix, UID: 1001}, https} {
		_, err := r.Session(token, ch)
		want(t, err, ErrSignedOut)
	}
	_, err := r.Session(secret.Of(string(token.Expose())+"x"), user)
	want(t, err, ErrSignedOut)
	_, token0 := r.signIn(t, r.people[0], root)
	_, err = r.Session(token0, Channel{Kind: HTTPS}) // a channel with user 0, too
	want(t, err, ErrSignedOut)
	if r.reopen(t); len(r.Sessions()) != 0 {
		t.Error("a restart did not sign everybody out")
	}
	_, err = r.Session(token, user)
	want(t, err, ErrSignedOut)
}

// sshsig signs a text for any namespace. sshagent.Sign refuses a namespace that is not the text's
// first line.
func sshsig(t *testing.T, s *signer, namespace, text string) approval.Proof {
	t.Helper()
	keys, err := s.agent.List()
	if err != nil {
		t.Fatal(err)
	}
	public, err := ssh.ParsePublicKey(keys[0].Blob)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte(text))
	magic := [6]byte{'S', 'S', 'H', 'S', 'I', 'G'}
	signature, err := s.agent.Sign(public, ssh.Marshal(struct {
		Magic                     [6]byte
		Namespace, Reserved, Hash string
		Digest                    []byte
	}{magic, namespace, "", "sha256", sum[:]}))
	if err != nil {
		t.Fatal(err)
	}
	blob := ssh.Marshal(struct {
		Magic                                           [6]byte
		Version                                         uint32
		PublicKey, Namespace, Reserved, Hash, Signature string
	}{magic, 1, string(public.Marshal()), namespace, "", "sha256", string(ssh.Marshal(signature))})
	armored := "-----BEGIN SSH SIGNATURE-----\n" + base64.StdEncoding.EncodeToString(blob) +
		"\n-----END SSH SIGNATURE-----\n"
	return approval.Proof{Credential: s.credential.ID, SSHSIG: armored}
}

func TestSignInRefused(t *testing.T) {
	type attempt struct {
		r         *rig
		me, other *signer
		c         Challenge
		ch        Channel
		proof     approval.Proof
	}
	for name, corrupt := range map[string]func(t *testing.T, a *attempt){
		"another namespace": func(t *testing.T, a *attempt) {
			a.proof = sshsig(t, a.me, approval.ForPresence, a.c.Text)
		},
		"another text": func(t *testing.T, a *attempt) { a.proof = a.me.sign(t, a.c.Text+"x\n") },
		"another appliance": func(t *testing.T, a *attempt) {
			a.proof = a.me.sign(t, strings.Replace(a.c.Text, "example/a", "example/b", 1))
		},
		"another operator's key": func(t *testing.T, a *attempt) { a.proof = a.other.sign(t, a.c.Text) },
		"another operator's key under the right id": func(t *testing.T, a *attempt) {
			a.proof = a.other.sign(t, a.c.Text)
			a.proof.Credential = a.me.credential.ID
		},
		"a used challenge": func(t *testing.T, a *attempt) {
			if _, _, err := a.r.SignIn(t.Context(), a.ch, a.c.ID, a.proof); err != nil {
				t.Fatal(err)
			}
			for _, s := range a.r.Sessions() {
				if err := a.r.SignOut(t.Context(), s); err != nil {
					t.Fatal(err)
				}
			}
		},
		"a challenge that was used in vain": func(t *testing.T, a *attempt) {
			a.r.SignIn(t.Context(), a.ch, a.c.ID, a.other.sign(t, a.c.Text))
		},
		"an expired challenge": func(t *testing.T, a *attempt) { time.Sleep(approval.ChallengeLife) },
		"an unknown challenge": func(t *testing.T, a *attempt) { a.c.ID = strings.Repeat("0", 32) },
		"another user":         func(t *testing.T, a *attempt) { a.ch = Channel{Kind: Unix, UID: 1001} },
		"another channel":      func(t *testing.T, a *attempt) { a.ch = Channel{Kind: HTTPS, UID: user.UID} },
		"a challenge for another purpose": func(t *testing.T, a *attempt) {
			var err error
			if a.c, err = a.r.Challenge(approval.ForPresence, a.me.name, "payments", a.ch); err != nil {
				t.Fatal(err)
			}
			a.proof = a.me.sign(t, a.c.Text)
		},
		"an operator who is none": func(t *testing.T, a *attempt) {
			var err error
			if a.c, err = a.r.Challenge(approval.ForSignIn, "nobody", "", a.ch); err != nil {
				t.Fatal(err)
			}
			a.proof = a.me.sign(t, a.c.Text)
		},
		"a removed credential": func(t *testing.T, a *attempt) {
			a.r.apply(t, a.r.addCredential, a.me.name, string(manage.Encode(newSigner(t, "").credential)))
			a.r.apply(t, removeCredential, a.me.name, a.me.credential.ID)
		},
		"an operator who was removed": func(t *testing.T, a *attempt) { a.r.apply(t, removeOperator, a.me.name) },
		"no proof":                    func(t *testing.T, a *attempt) { a.proof = approval.Proof{} },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 2)
				a := &attempt{r: r, me: r.people[1], other: r.people[0], ch: user}
				var err error
				if a.c, err = r.Challenge(approval.ForSignIn, a.me.name, "", a.ch); err != nil {
					t.Fatal(err)
				}
				a.proof = a.me.sign(t, a.c.Text)
				corrupt(t, a)
				before, _ := r.events(t, audit.SignInRefused)
				_, token, err := r.SignIn(t.Context(), a.ch, a.c.ID, a.proof)
				want(t, err, approval.ErrNotProven)
				if err == nil || err.Error() != "sign-in: "+approval.ErrNotProven.Error() {
					t.Errorf("a stranger is told more than that: %v", err)
				}
				n, e := r.events(t, audit.SignInRefused)
				if !token.Empty() || len(r.Sessions()) != 0 || n != before+1 {
					t.Errorf("after it there are %d sessions, a token (%v) and %d events",
						len(r.Sessions()), !token.Empty(), n)
				}
				if e.Actor.Kind != "daemon" || e.Metadata["channel"] != a.ch.String() {
					t.Errorf("the event is %+v", e)
				}
			})
		})
	}
}

func TestStrangersLearnNoNames(t *testing.T) {
	synctest.Test(t, strangersLearnNoNames) // in a bubble two challenges have the same expiry
}

// nonce returns the nonce in a challenge's text.
func nonce(c Challenge) string {
	_, nonce, _ := strings.Cut(c.Text, "nonce: ")
	return strings.TrimSpace(nonce)
}

func strangersLearnNoNames(t *testing.T) {
	r := newRig(t, 0)
	r.enrol(t, newPasskey(t, "alice", 0), "")
	same := func(c Challenge, name string) string {
		text := strings.NewReplacer(nonce(c), "NONCE", name, "NAME").Replace(c.Text)
		return fmt.Sprint(text, len(c.ID), c.RPID, c.Allowed)
	}
	known, err1 := r.Challenge(approval.ForSignIn, "alice", "", https)
	unknown, err2 := r.Challenge(approval.ForSignIn, "mallo", "", https)
	if err1 != nil || err2 != nil || same(known, "alice") != same(unknown, "mallo") {
		t.Errorf("the challenges are different:\n%s, %v\n%s, %v",
			same(known, "alice"), err1, same(unknown, "mallo"), err2)
	}
	for name, has := range map[string]bool{"alice": true, "mallo": false} {
		for who, s := range map[string]*Session{"stranger": nil, "o0": {Operator: "o0"}, "alice": {Operator: "alice"}} {
			var o struct{ ExcludeCredentials []struct{ ID string } }
			options, err := r.PasskeyOptions(nil, name, s)
			if err != nil || json.Unmarshal(options, &o) != nil {
				t.Fatal(err)
			}
			if told := len(o.ExcludeCredentials) > 0; told != (has && who == name) {
				t.Errorf("for a passkey of %s, %s is told: %v", name, who, o.ExcludeCredentials)
			}
		}
	}
	if c, err := r.Challenge(approval.ForPresence, "alice", "payments", https); err != nil || len(c.Allowed) != 1 {
		t.Errorf("for a presence the passkeys are %v, %v", c.Allowed, err)
	}
}

// fail signs in without a signature.
func (r *rig) fail(t *testing.T, operator string, ch Channel) error {
	t.Helper()
	c, err := r.Challenge(approval.ForSignIn, operator, "", ch)
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = r.SignIn(t.Context(), ch, c.ID, approval.Proof{Credential: r.people[0].credential.ID})
	return err
}

func TestFailedSignInsAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2)
		for range failuresBurst {
			want(t, r.fail(t, "o1", user), approval.ErrNotProven)
		}
		var limited *Limited
		err := r.fail(t, "o1", user)
		if !errors.As(err, &limited) || !errors.Is(err, ErrLimited) || limited.RetryAfter != failuresEvery {
			t.Fatalf("after %d failures: %v", failuresBurst, err)
		}
		// Another channel and another operator have limits of their own.
		r.signIn(t, r.people[1], https)
		r.signIn(t, r.people[1], root)
		r.signIn(t, r.people[0], user)
		// The operator with the right key is let in: the failures may be another person's.
		c, err := r.Challenge(approval.ForSignIn, "o1", "", user)
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = r.SignIn(t.Context(), user, c.ID, r.people[0].sign(t, c.Text))
		want(t, err, ErrLimited)
		// A limited failure does not use the challenge up.
		if _, _, err = r.SignIn(t.Context(), user, c.ID, r.people[1].sign(t, c.Text)); err != nil {
			t.Errorf("with the right key: %v", err)
		}
		for range 3 * failuresBurst { // successes have no limit
			r.signIn(t, r.people[1], user)
		}
		time.Sleep(limited.RetryAfter)
		want(t, r.fail(t, "o1", user), approval.ErrNotProven) // one per 12 s
		want(t, r.fail(t, "o1", user), ErrLimited)
	})
}

func TestFailedSignInsAreLimitedOverAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2)
		for i := range allFailuresBurst {
			want(t, r.fail(t, fmt.Sprintf("x%d", i), https), approval.ErrNotProven)
		}
		var limited *Limited
		if err := r.fail(t, "y", https); !errors.As(err, &limited) || limited.RetryAfter != time.Second {
			t.Errorf("after %d failures of all: %v", allFailuresBurst, err)
		}
		r.signIn(t, r.people[0], https) // a valid proof has no limit
		for range 2 * failuresBurst {
			want(t, r.fail(t, "y", https), ErrLimited) // does not count for the limit of y
		}
		time.Sleep(time.Second)
		want(t, r.fail(t, "y", https), approval.ErrNotProven)
		want(t, r.fail(t, "y", https), ErrLimited)
		time.Sleep(time.Hour)
		r.fail(t, "y", https)
		if n := len(r.failures.each); n != 1 {
			t.Errorf("%d failures are remembered an hour later", n)
		}
	})
}

// TestRefusedProofsHaveAPace floods each door with wrong proofs. The log does not grow with the
// number of the proofs, has this number, and the strangers' flood hides no refusal of an operator
// who is signed in.
func TestRefusedProofsHaveAPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2)
		const minutes, each = 60, 40
		for range minutes {
			for range each {
				r.fail(t, "o0", https)
				r.fail(t, "nobody-"+randomHex(), https)
			}
			time.Sleep(time.Minute)
			want(t, r.RecordCount(t.Context()), nil)
		}
		most := int(eventsBurst + minutes*(time.Minute/eventsEvery+1)) // each minute one count
		if n, _ := r.events(t, audit.SignInRefused); n > most {
			t.Errorf("%d refused sign-ins are %d events, want %d at most", minutes*each*2, n, most)
		}
		s, _ := r.signIn(t, r.people[1], user)
		proposer, _ := r.signIn(t, r.people[0], user)
		p := r.propose(t, proposer, "test")
		doors := []func(){
			func() { r.VerifyPresence(t.Context(), s, "", "payments", approval.Proof{}) },
			func() { r.Approve(t.Context(), s, p.ID, approval.Proof{}) },
		}
		for _, try := range doors {
			before, _ := r.events(t, audit.SignInRefused)
			try()
			n, e := r.events(t, audit.SignInRefused)
			if n != before+1 || e.Resource != "o1" || e.Metadata["subject"] == "" {
				t.Errorf("after a flood of strangers, the event of a refusal is %+v", e)
			}
		}
		for range 3 * eventsBurst {
			for _, try := range doors {
				try()
			}
		}
		want(t, r.RecordCount(t.Context()), nil)
		want(t, r.RecordCount(t.Context()), nil) // nothing more
		written, counted := 0, 0
		for _, e := range r.all(t) {
			if e.Type != audit.SignInRefused {
				continue
			}
			if n, err := strconv.Atoi(e.Metadata["count"]); err == nil {
				counted += n
			} else {
				written++
			}
		}
		if want := minutes*each*2 + 2 + 2*3*eventsBurst; written+counted != want {
			t.Errorf("%d refusals are written down and %d counted, want %d together", written, counted, want)
		}
	})
}

// TestWrongPresence checks that each wrong proof of a presence is an event with the operator and
// the key, also where the signature itself is good.
func TestWrongPresence(t *testing.T) {
	for name, wrong := range map[string]func(t *testing.T, r *rig) (id string, p approval.Proof){
		"none": func(t *testing.T, r *rig) (string, approval.Proof) { return "", approval.Proof{} },
		"for another key": func(t *testing.T, r *rig) (string, approval.Proof) {
			return r.prove(t, approval.ForPresence, 1, "other", user)
		},
		"another operator's": func(t *testing.T, r *rig) (string, approval.Proof) {
			return r.prove(t, approval.ForPresence, 0, "payments", user)
		},
		"of a sign-in": func(t *testing.T, r *rig) (string, approval.Proof) {
			return r.prove(t, approval.ForSignIn, 1, "", user)
		},
		"on another channel": func(t *testing.T, r *rig) (string, approval.Proof) {
			return r.prove(t, approval.ForPresence, 1, "payments", https)
		},
		"signed by another key": func(t *testing.T, r *rig) (string, approval.Proof) {
			id, _ := r.prove(t, approval.ForPresence, 1, "payments", user)
			_, p := r.prove(t, approval.ForPresence, 0, "payments", user)
			return id, p
		},
		"too old": func(t *testing.T, r *rig) (string, approval.Proof) {
			id, p := r.prove(t, approval.ForPresence, 1, "payments", user)
			time.Sleep(approval.ChallengeLife)
			return id, p
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 2)
				s, _ := r.signIn(t, r.people[1], user)
				id, p := wrong(t, r)
				before, _ := r.events(t, audit.SignInRefused)
				want(t, r.VerifyPresence(t.Context(), s, id, "payments", p), approval.ErrNotProven)
				n, e := r.events(t, audit.SignInRefused)
				if n != before+1 || e.Resource != "o1" || e.Metadata["subject"] != "payments" ||
					e.Metadata["purpose"] != approval.ForPresence || e.Outcome != "not_proven" {
					t.Errorf("%d events more, the last is %+v", n-before, e)
				}
			})
		})
	}
}

// TestRefusedProofsAreCounted counts a refused proof of each purpose, under its purpose.
func TestRefusedProofsAreCounted(t *testing.T) {
	r := newRig(t, 2)
	s, _ := r.signIn(t, r.people[0], user)
	p := r.propose(t, s, "test", approval.Parameter{Name: "reason", Value: "because"})
	want(t, r.fail(t, "o1", user), approval.ErrNotProven)
	for range 2 {
		want(t, r.VerifyPresence(t.Context(), s, "", "payments", approval.Proof{}), approval.ErrNotProven)
	}
	for range 3 {
		_, err := r.Approve(t.Context(), s, p.ID, r.people[1].sign(t, p.Text()))
		want(t, err, approval.ErrNotProven)
	}
	m := meter.New("test")
	m.Source(r.Measure)
	_, body, err := m.Expose("")
	if err != nil {
		t.Fatal(err)
	}
	for purpose, n := range map[string]int{"sign-in": 1, "confirmation": 2, "approval": 3} {
		line := fmt.Sprintf("\ncountersign_proofs_refused_total{purpose=%q} %d\n", purpose, n)
		if !strings.Contains(string(body), line) {
			t.Errorf("no line %s", line)
		}
	}
}

// prove returns the id of a new challenge with the proof of an operator.
func (r *rig) prove(t *testing.T, purpose string, who int, key string, ch Channel) (string, approval.Proof) {
	t.Helper()
	c, err := r.Challenge(purpose, r.people[who].name, key, ch)
	if err != nil {
		t.Fatal(err)
	}
	return c.ID, r.people[who].sign(t, c.Text)
}

// TestNobodyDrivesOutChallenges checks that thousands of challenges evict no other challenge, and
// take no memory.
func TestNobodyDrivesOutChallenges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1)
		mine, err := r.Challenge(approval.ForSignIn, "o0", "", https)
		if err != nil {
			t.Fatal(err)
		}
		for range 5000 {
			if _, err := r.Challenge(approval.ForSignIn, "o0", "", https); err != nil {
				t.Fatal(err)
			}
		}
		for range 500 {
			r.fail(t, "o0", https)
		}
		if n := len(r.used); n > failuresBurst {
			t.Errorf("%d challenges are kept", n)
		}
		if _, _, err := r.SignIn(t.Context(), https, mine.ID, r.people[0].sign(t, mine.Text)); err != nil {
			t.Errorf("a stranger has driven out the challenge: %v", err)
		}
		time.Sleep(approval.ChallengeLife)
		r.signIn(t, r.people[0], https)
		if n := len(r.used); n != 1 {
			t.Errorf("%d used challenges are remembered when they have expired", n)
		}
	})
}

// TestChallengeIsSealed checks that a changed id of a challenge is refused.
func TestChallengeIsSealed(t *testing.T) {
	r := newRig(t, 1)
	c, err := r.Challenge(approval.ForSignIn, "o0", "", user)
	if err != nil {
		t.Fatal(err)
	}
	proof := r.people[0].sign(t, c.Text)
	id, err := base64.RawURLEncoding.DecodeString(c.ID)
	if err != nil {
		t.Fatal(err)
	}
	for i := range id {
		changed := slices.Clone(id)
		changed[i] ^= 1
		if _, ok := r.parseChallengeID(base64.RawURLEncoding.EncodeToString(changed), approval.ForSignIn, user); ok {
			t.Fatalf("byte %d may be another one", i)
		}
	}
	for _, id := range []string{"", "AAAA", c.ID[:len(c.ID)-1], c.ID + "A", c.ID + "=", strings.Repeat("A", 400)} {
		if _, ok := r.parseChallengeID(id, approval.ForSignIn, user); ok {
			t.Errorf("%q is a challenge", id)
		}
	}
	if _, _, err := r.SignIn(t.Context(), user, c.ID, proof); err != nil {
		t.Error(err)
	}
}

func TestSessionsEndWithTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1)
		_, idle := r.signIn(t, r.people[0], user)
		s, token := r.signIn(t, r.people[0], user)
		for range 4 {
			time.Sleep(sessionIdle - time.Second)
			if _, err := r.Session(token, user); err != nil {
				t.Fatal(err)
			}
		}
		_, err := r.Session(idle, user)
		want(t, err, ErrSignedOut)
		if all := r.Sessions(); len(all) != 1 || all[0].ID != s.ID {
			t.Errorf("the sessions are %+v", all)
		}
		time.Sleep(4 * time.Second) // 1 h after the sign-in
		_, err = r.Session(token, user)
		want(t, err, ErrSignedOut)
		_, err = r.Propose(t.Context(), s, "test", nil, nil, 0)
		want(t, err, ErrSignedOut)
		want(t, r.SignOut(t.Context(), s), ErrSignedOut)
	})
}

func TestRevoke(t *testing.T) {
	r := newRig(t, 3)
	admin, _ := r.signIn(t, r.people[0], root)
	mine, _ := r.signIn(t, r.people[1], user)
	also, token := r.signIn(t, r.people[1], https)
	other, _ := r.signIn(t, r.people[2], user)
	want(t, r.Revoke(t.Context(), mine, other.ID), ErrNotFound)
	want(t, r.Revoke(t.Context(), mine, "x"), ErrNotFound)
	if err := r.Revoke(t.Context(), mine, also.ID); err != nil {
		t.Fatal(err)
	}
	_, err := r.Session(token, https)
	want(t, err, ErrSignedOut)
	if _, e := r.events(t, audit.OperatorSignedOut); e.Actor.Name != "o1" || e.Resource != "session/"+also.ID {
		t.Errorf("the event is %+v", e)
	}
	if err := r.Revoke(t.Context(), admin, mine.ID); err != nil {
		t.Fatal(err)
	}
	want(t, r.Revoke(t.Context(), mine, mine.ID), ErrSignedOut)
	if err := r.SignOut(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	if all := r.Sessions(); len(all) != 1 || all[0].ID != admin.ID {
		t.Errorf("the sessions are %+v", all)
	}
}

func TestSessionsOfAnOperatorAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2)
		_, first := r.signIn(t, r.people[1], user)
		_, second := r.signIn(t, r.people[1], user)
		other, _ := r.signIn(t, r.people[0], user)
		time.Sleep(time.Second)
		if _, err := r.Session(first, user); err != nil { // now the second session has the longest idle time
			t.Fatal(err)
		}
		for range maxSessions - 1 {
			r.signIn(t, r.people[1], user)
		}
		_, err := r.Session(second, user)
		want(t, err, ErrSignedOut)
		_, err = r.Session(first, user)
		want(t, err, nil)
		if n := len(r.Sessions()); n != maxSessions+1 {
			t.Errorf("there are %d sessions", n)
		}
		if _, err := r.requireSession(other); err != nil {
			t.Errorf("another operator's session: %v", err)
		}
	})
}

func TestSessionsDieWithChanges(t *testing.T) {
	for name, change := range map[string]func(t *testing.T, r *rig){
		"roles": func(t *testing.T, r *rig) { r.apply(t, setRoles, "o1", "auditor") },
		"credential added": func(t *testing.T, r *rig) {
			r.apply(t, r.addCredential, "o1", string(manage.Encode(newSigner(t, "").credential)))
		},
		"credential removed": func(t *testing.T, r *rig) {
			r.apply(t, removeCredential, "o1", r.people[2].credential.ID)
		},
		"removed": func(t *testing.T, r *rig) { r.apply(t, removeOperator, "o1") },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 2)
			r.people = append(r.people, newSigner(t, "o1"))
			r.apply(t, r.addCredential, "o1", string(manage.Encode(r.people[2].credential)))
			_, dies := r.signIn(t, r.people[1], user)
			_, lives := r.signIn(t, r.people[0], user)
			before := r.changed.Load()
			change(t, r)
			_, err := r.Session(dies, user)
			want(t, err, ErrSignedOut)
			_, err = r.Session(lives, user)
			want(t, err, nil)
			if r.changed.Load() != before+1 {
				t.Error("confirmations of presence were not told")
			}
			_, e := r.events(t, audit.OperatorChanged)
			if e.Metadata["change"] != name || e.Resource != "o1" ||
				(e.Metadata["operator"] == "") != (name == "removed") {
				t.Errorf("the event is %+v", e)
			}
		})
	}
}

func TestVerifyPresence(t *testing.T) {
	r := newRig(t, 2)
	s, _ := r.signIn(t, r.people[0], user)
	challenge := func(purpose, operator, subject string) Challenge {
		t.Helper()
		c, err := r.Challenge(purpose, operator, subject, user)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	c := challenge(approval.ForPresence, "o0", "payments")
	if err := r.VerifyPresence(t.Context(), s, c.ID, "payments", r.people[0].sign(t, c.Text)); err != nil {
		t.Error(err)
	}
	again := r.VerifyPresence(t.Context(), s, c.ID, "payments", r.people[0].sign(t, c.Text))
	want(t, again, approval.ErrNotProven)
	c = challenge(approval.ForPresence, "o0", "payments")
	want(t, r.VerifyPresence(t.Context(), s, c.ID, "other", r.people[0].sign(t, c.Text)), approval.ErrNotProven)
	c = challenge(approval.ForPresence, "o1", "payments")
	want(t, r.VerifyPresence(t.Context(), s, c.ID, "payments", r.people[1].sign(t, c.Text)), approval.ErrNotProven)
	c = challenge(approval.ForSignIn, "o0", "")
	want(t, r.VerifyPresence(t.Context(), s, c.ID, "payments", r.people[0].sign(t, c.Text)), approval.ErrNotProven)
	c = challenge(approval.ForPresence, "o0", "payments")
	if err := r.SignOut(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	want(t, r.VerifyPresence(t.Context(), s, c.ID, "payments", r.people[0].sign(t, c.Text)), ErrSignedOut)
	for _, bad := range [][3]string{
		{approval.ForPresence, "o0", ""}, {approval.ForPresence, "o0", "a\nb"},
		{approval.ForSignIn, "o0", "payments"}, {approval.ForSignIn, "a\nb", ""}, {approval.ForProposal, "o0", ""},
	} {
		_, err := r.Challenge(bad[0], bad[1], bad[2], user)
		want(t, err, ErrInvalid)
	}
	_, err := r.Challenge(approval.ForPresence, "nobody", "payments", user)
	want(t, err, ErrNotFound)
}

// TestPasskeyByItsOwnID signs in with the passkey's own id: a browser with a discoverable passkey
// does not know the id of the credential.
func TestPasskeyByItsOwnID(t *testing.T) {
	r := newRig(t, 1)
	alice := newPasskey(t, "alice", 0)
	r.enrol(t, alice, "approver")
	own := func(p approval.Proof) approval.Proof { p.Credential = alice.credential.CredentialID; return p }
	c, err := r.Challenge(approval.ForSignIn, "alice", "", root)
	if err != nil {
		t.Fatal(err)
	}
	s, _, err := r.SignIn(t.Context(), root, c.ID, own(alice.sign(t, c.Text)))
	if err != nil || s.Credential != alice.credential.ID {
		t.Fatalf("%+v, %v", s, err)
	}
	if c, err = r.Challenge(approval.ForPresence, "alice", "payments", root); err != nil {
		t.Fatal(err)
	}
	if err := r.VerifyPresence(t.Context(), s, c.ID, "payments", own(alice.sign(t, c.Text))); err != nil {
		t.Error(err)
	}
	first, _ := r.signIn(t, r.people[0], root)
	p := r.propose(t, first, "test")
	p, err = r.Approve(t.Context(), s, p.ID, own(alice.sign(t, p.Text())))
	if err != nil || p.State != Done || p.Approvals[0].Credential != alice.credential.ID {
		t.Errorf("%+v, %v", p, err)
	}
	if _, e := r.events(t, audit.ApprovalGiven); !strings.Contains(e.Metadata["proof"], alice.credential.ID) {
		t.Errorf("the event is %+v", e)
	}
}

func TestPasskeyCounts(t *testing.T) {
	r := newRig(t, 0)
	alice := newPasskey(t, "alice", 0)
	r.enrol(t, alice, "")
	try := func(count uint32, ok bool) {
		t.Helper()
		alice.count = count
		c, err := r.Challenge(approval.ForSignIn, "alice", "", root)
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = r.SignIn(t.Context(), root, c.ID, alice.sign(t, c.Text))
		if (err == nil) != ok || !ok && !errors.Is(err, approval.ErrNotProven) {
			t.Errorf("a sign-in with the count %d: %v", count, err)
		}
	}
	try(0, true) // no counter yet
	try(0, true)
	try(7, true) // a counter from now on
	try(7, false)
	try(6, false)
	try(0, false)
	if _, e := r.events(t, audit.SignInRefused); !strings.Contains(e.Metadata["cause"], "copy") {
		t.Errorf("the event is %+v", e)
	}
	r.reopen(t)
	try(7, false)
	try(8, true)

	alice.count = 9
	s, token := r.signIn(t, alice, root)
	if _, err := r.Session(token, root); err != nil { // a new counter is no change of the operator
		t.Error(err)
	}
	for _, count := range []uint32{9, 10} { // proofs of presence and of approvals count, too
		alice.count = count
		c, err := r.Challenge(approval.ForPresence, "alice", "payments", root)
		if err != nil {
			t.Fatal(err)
		}
		err = r.VerifyPresence(t.Context(), s, c.ID, "payments", alice.sign(t, c.Text))
		if (err == nil) != (count == 10) {
			t.Errorf("a presence with the count %d: %v", count, err)
		}
	}
	p := r.propose(t, s, "test")
	for _, count := range []uint32{10, 11} {
		alice.count = count
		after, err := r.Approve(t.Context(), s, p.ID, alice.sign(t, p.Text()))
		if (err == nil) != (count == 11) || err == nil && after.State != Done {
			t.Errorf("an approval with the count %d: %v, %v", count, after.State, err)
		}
	}
	alice.origin = "https://localhost:9999"
	try(12, false)
	alice.more = `,"ORIGIN":"https://localhost:7780"` // another field: names are matched by case
	try(13, false)
}

func TestSignInIsWrittenFirst(t *testing.T) {
	r := newRig(t, 1)
	c, err := r.Challenge(approval.ForSignIn, "o0", "", root)
	if err != nil {
		t.Fatal(err)
	}
	proof := r.people[0].sign(t, c.Text)
	r.ledger.Close()
	if _, _, err := r.SignIn(context.Background(), root, c.ID, proof); err == nil || len(r.Sessions()) != 0 {
		t.Errorf("a sign-in that can't be written down: %v, %d sessions", err, len(r.Sessions()))
	}
	r.open(t)
}

// TestLedgerDecidesWhoProves changes the ledger between the verification of a proof, which uses the
// memory, and the transaction.
func TestLedgerDecidesWhoProves(t *testing.T) {
	for name, change := range map[string]func(tx *ledger.Tx, p person) error{
		"removed": func(tx *ledger.Tx, p person) error { return tx.Delete(ledger.Operators, p.Name) },
		"another credential": func(tx *ledger.Tx, p person) error {
			p.Credentials = []approval.Credential{newSigner(t, "").credential}
			return tx.Put(ledger.Operators, p.Name, manage.Encode(p))
		},
		"the credential with another key": func(tx *ledger.Tx, p person) error {
			p.Credentials[0].PublicKey = newSigner(t, "").credential.PublicKey
			return tx.Put(ledger.Operators, p.Name, manage.Encode(p))
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 2)
				me := r.people[1]
				s, _ := r.signIn(t, me, user)
				in, err1 := r.Challenge(approval.ForSignIn, me.name, "", user)
				there, err2 := r.Challenge(approval.ForPresence, me.name, "payments", user)
				if err1 != nil || err2 != nil {
					t.Fatal(err1, err2)
				}
				p := r.propose(t, s, "test")
				r.writing <- struct{}{} // all three requests wait for the lock, after the verification
				errs := make(chan error, 3)
				go func() { _, _, err := r.SignIn(t.Context(), user, in.ID, me.sign(t, in.Text)); errs <- err }()
				go func() { errs <- r.VerifyPresence(t.Context(), s, there.ID, "payments", me.sign(t, there.Text)) }()
				go func() { _, err := r.Approve(t.Context(), s, p.ID, me.sign(t, p.Text())); errs <- err }()
				synctest.Wait()
				if err := r.ledger.Update(t.Context(), func(tx *ledger.Tx) error {
					who, err := decodePerson(me.name, tx.Get(ledger.Operators, me.name))
					if err != nil {
						return err
					}
					return change(tx, who)
				}); err != nil {
					t.Fatal(err)
				}
				<-r.writing
				for range 3 {
					want(t, <-errs, approval.ErrNotProven)
				}
				// The memory follows the ledger: the change has ended the session.
				n, _ := r.events(t, audit.SignInRefused)
				if n != 3 || r.ran.Load() != 0 || len(r.Sessions()) != 0 {
					t.Errorf("there are %d events and %d sessions; it has run %d times",
						n, len(r.Sessions()), r.ran.Load())
				}
			})
		})
	}
}

func TestNobodyWaitsForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1)
		s, _ := r.signIn(t, r.people[0], user)
		p := r.propose(t, s, "test")
		r.writing <- struct{}{}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := r.Approve(ctx, s, p.ID, r.people[0].sign(t, p.Text()))
		want(t, err, ErrUnavailable)
		<-r.writing
		if got, _ := r.Proposal(p.ID); got.State != Pending || len(got.Approvals) != 0 {
			t.Errorf("what was given up is carried out: %+v", got)
		}
	})
}

// TestMemoryFollowsForWhoHasLeft checks that a request is carried out completely if its caller
// leaves while the request waits for the ledger.
func TestMemoryFollowsForWhoHasLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1)
		s, _ := r.signIn(t, r.people[0], user)
		p := r.propose(t, s, "test")
		held := make(chan struct{})
		go r.ledger.Update(t.Context(), func(*ledger.Tx) error { <-held; return nil })
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := r.Approve(ctx, s, p.ID, r.people[0].sign(t, p.Text()))
		want(t, err, ErrUnavailable)
		close(held)
		want(t, r.Close(t.Context()), nil)
		if got, _ := r.Proposal(p.ID); got.State != Done || r.ran.Load() != 1 {
			t.Errorf("it is %s, and has run %d times", got.State, r.ran.Load())
		}
	})
}

// TestStrangersStopNoPresence checks that failures by strangers do not limit a signed-in operator.
func TestStrangersStopNoPresence(t *testing.T) {
	r := newRig(t, 1)
	s, _ := r.signIn(t, r.people[0], https)
	for range 2 * allFailuresBurst {
		r.fail(t, "o0", https)
		r.fail(t, randomHex(), https)
	}
	c, err := r.Challenge(approval.ForPresence, "o0", "payments", https)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.VerifyPresence(t.Context(), s, c.ID, "payments", r.people[0].sign(t, c.Text)); err != nil {
		t.Error(err)
	}
}

// TestLiveIsNoUse asks about a session again and again, which does not keep the session alive.
func TestLiveIsNoUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1)
		s, token := r.signIn(t, r.people[0], user)
		idle := 0
		for ; r.Live(s); idle++ {
			time.Sleep(time.Second)
		}
		if idle != int(sessionIdle/time.Second) {
			t.Errorf("the session has lived %d s", idle)
		}
		if _, err := r.Session(token, user); !errors.Is(err, ErrSignedOut) {
			t.Errorf("afterwards: %v", err)
		}
	})
}
