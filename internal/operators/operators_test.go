package operators

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"countersign/approval"
	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/ledger/ledgertest"
	"countersign/internal/manage"
	"countersign/internal/scantest"
	"countersign/internal/secret"
	"countersign/internal/sshagent"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

var (
	root  = Channel{Kind: Unix, UID: 0}
	user  = Channel{Kind: Unix, UID: 1000}
	https = Channel{Kind: HTTPS, Source: "127.0.0.1"}
)

// signer is a person with a private key: in an SSH agent, or of a passkey.
type signer struct {
	name       string
	agent      agent.Agent
	credential approval.Credential
	passkey    *ecdsa.PrivateKey // instead of the agent
	count      uint32            // signature counter of the passkey
	origin     string
	more       string // further fields of the client data
}

func newSigner(t *testing.T, name string) *signer {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	scantest.Secret("the SSH key of "+name, key.Seed())
	s := &signer{name: name, agent: agent.NewKeyring()}
	public, err := ssh.NewPublicKey(key.Public())
	if err == nil {
		err = s.agent.Add(agent.AddedKey{PrivateKey: key})
	}
	if err == nil {
		s.credential, err = approval.NewSSH(string(ssh.MarshalAuthorizedKey(public)))
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// newPasskey returns a signer with a passkey, whose signature counter begins at a number.
func newPasskey(t *testing.T, name string, count uint32) *signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	point, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	cose := append([]byte{0xa5, 1, 2, 3, 0x26, 0x20, 1, 0x21, 0x58, 0x20}, point[1:33]...)
	cose = append(append(cose, 0x22, 0x58, 0x20), point[33:]...)
	public := base64.RawURLEncoding.EncodeToString(cose)
	c := approval.Credential{
		ID: approval.NewID(public), Kind: approval.Passkey, PublicKey: public,
		CredentialID: base64.RawURLEncoding.EncodeToString([]byte(name)), RPID: "localhost",
	}
	s := &signer{name: name, passkey: key, count: count, origin: "https://localhost:7780", credential: c}
	if err := s.credential.Check(); err != nil {
		t.Fatal(err)
	}
	return s
}

// sign signs a text for the purpose in its first line.
func (s *signer) sign(t *testing.T, text string) approval.Proof {
	t.Helper()
	if s.passkey != nil {
		return s.assert(t, text)
	}
	namespace, _, _ := strings.Cut(text, "\n")
	p, err := sshagent.Sign(s.agent, s.credential, namespace, text)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (s *signer) assert(t *testing.T, text string) approval.Proof {
	t.Helper()
	challenge, rp := sha256.Sum256([]byte(text)), sha256.Sum256([]byte("localhost"))
	b64 := base64.RawURLEncoding.EncodeToString
	client, err := json.Marshal(map[string]any{
		"type": "webauthn.get", "challenge": b64(challenge[:]), "origin": s.origin, "crossOrigin": false,
	})
	if err != nil {
		t.Fatal(err)
	}
	client = append(client[:len(client)-1], s.more+"}"...)
	data := binary.BigEndian.AppendUint32(append(rp[:], 5), s.count) // user present and verified
	said := sha256.Sum256(client)
	digest := sha256.Sum256(append(data[:len(data):len(data)], said[:]...))
	signature, err := ecdsa.SignASN1(rand.Reader, s.passkey, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	return approval.Proof{Credential: s.credential.ID, Assertion: &approval.Assertion{
		AuthenticatorData: b64(data), ClientDataJSON: b64(client), Signature: b64(signature),
	}}
}

// rig is a test rig: a Registry on a ledger on disk, with the operators o0, o1, and so on. All
// operators are approvers, and o0 is an administrator, too. The act "test" counts its executions.
type rig struct {
	*Registry
	ledger  *ledger.Ledger
	path    string
	name    string // of the appliance
	people  []*signer
	ran     atomic.Int32
	changed atomic.Int32
	effect  func(context.Context, audit.Actor) error // of the act "test"; may be nil
}

func newRig(t *testing.T, people int) *rig {
	t.Helper()
	return newRigNamed(t, "countersign.example/a", people)
}

func newRigNamed(t *testing.T, name string, people int) *rig {
	t.Helper()
	return newRigIn(t, t.TempDir(), name, people)
}

func newRigIn(t *testing.T, dir, name string, people int) *rig {
	t.Helper()
	r := &rig{path: filepath.Join(dir, "ledger.db"), name: name}
	if err := ledger.Create(r.path, ledger.Options{}); err != nil {
		t.Fatal(err)
	}
	r.open(t)
	t.Cleanup(func() {
		r.agrees(t)
		r.ledger.Close()
	})
	for i := range people {
		r.enrol(t, newSigner(t, fmt.Sprintf("o%d", i)), "approver")
	}
	return r
}

// enrol adds an operator without approval. The first one is an administrator.
func (r *rig) enrol(t *testing.T, s *signer, roles string) {
	t.Helper()
	var err error
	if r.people = append(r.people, s); len(r.people) == 1 {
		_, err = r.EnrolFirst(t.Context(), root, s.name, s.credential)
	} else {
		err = r.mutate(t, r.addOperator, s.name, roles, string(manage.Encode(s.credential)))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// mutate applies a mutation of the roster without approval.
func (r *rig) mutate(t *testing.T, m mutation, values ...string) error {
	t.Helper()
	return r.updateRoster(t.Context(), audit.Operator("test"), "test", func(all *roster) (string, string, error) {
		return m(all, values)
	})
}

// apply is mutate for a valid mutation.
func (r *rig) apply(t *testing.T, m mutation, values ...string) {
	t.Helper()
	if err := r.mutate(t, m, values...); err != nil {
		t.Fatal(err)
	}
}

func (r *rig) open(t *testing.T) {
	t.Helper()
	l, err := ledgertest.Open(t, r.path, ledger.Options{})
	if err := r.openOn(l, err); err != nil {
		t.Fatal(err)
	}
}

// agrees compares the memory with the records of the ledger, read anew by the functions that a
// start uses. A ledger that is closed or has failed is not compared.
func (r *rig) agrees(t *testing.T) {
	t.Helper()
	anew := &Registry{
		roster:    roster{people: map[string]person{}, needed: 1},
		proposals: map[uint64]*record{}, sessions: map[[32]byte]*Session{}, scrapers: map[string]Scraper{},
	}
	err := r.ledger.View(func(v ledger.View) error {
		return errors.Join(v.All(ledger.Operators, anew.takeOperator), v.All(ledger.Meta, anew.takeMeta),
			v.All(ledger.Proposals, anew.takeProposal))
	})
	if errors.Is(err, ledger.ErrClosed) {
		return
	} else if err != nil {
		t.Fatal(err)
	}
	select {
	case <-r.ledger.Failed():
		return
	default:
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if got, want := fmt.Sprint(r.roster, r.scrapers), fmt.Sprint(anew.roster, anew.scrapers); got != want {
		t.Errorf("the roster in memory is %s, the ledger has %s", got, want)
	}
	if got, want := string(manage.Encode(r.proposals)), string(manage.Encode(anew.proposals)); got != want {
		t.Errorf("the proposals in memory are %s, the ledger has %s", got, want)
	}
}

// openOn opens the registry on a ledger that was just opened.
func (r *rig) openOn(l *ledger.Ledger, err error) error {
	if err != nil {
		return err
	}
	check := func(p []approval.Parameter, _ []byte) ([]approval.Parameter, error) { return p, nil }
	run := func(ctx context.Context, who audit.Actor, _ []approval.Parameter, _ []byte) error {
		r.ran.Add(1)
		if r.effect != nil {
			return r.effect(ctx, who)
		}
		return nil
	}
	roles := []approval.Role{approval.Administrator, approval.Approver}
	registry, err := Open(l, Config{
		Appliance: r.name, RPID: "localhost", Origin: "https://localhost:7780",
		Acts: map[string]Act{"test": {Roles: roles, Check: check, Run: run}}, Changed: func() { r.changed.Add(1) },
		Log: scantest.Log(),
	})
	if err != nil {
		l.Close()
		return err
	}
	r.ledger, r.Registry = l, registry
	return nil
}

// reopen restarts as after a crash: the memory is lost.
func (r *rig) reopen(t *testing.T) {
	t.Helper()
	if err := r.ledger.Close(); err != nil {
		t.Fatal(err)
	}
	r.open(t)
}

func (r *rig) signIn(t *testing.T, s *signer, ch Channel) (Session, secret.Bytes) {
	t.Helper()
	c, err := r.Challenge(approval.ForSignIn, s.name, "", ch)
	if err != nil {
		t.Fatal(err)
	}
	session, token, err := r.SignIn(t.Context(), ch, c.ID, s.sign(t, c.Text))
	if err != nil {
		t.Fatal(err)
	}
	scantest.Secret(scantest.SessionToken, token.Expose())
	return session, token
}

func (r *rig) propose(t *testing.T, s Session, act string, p ...approval.Parameter) Proposal {
	t.Helper()
	made, err := r.Propose(t.Context(), s, act, p, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// approve signs in and approves.
func (r *rig) approve(t *testing.T, s *signer, p Proposal) (Proposal, error) {
	t.Helper()
	session, _ := r.signIn(t, s, root)
	return r.Approve(t.Context(), session, p.ID, s.sign(t, p.Text()))
}

// events counts the events of a type, and returns the last one.
func (r *rig) events(t *testing.T, of audit.Type) (n int, last audit.Event) {
	t.Helper()
	for _, e := range r.all(t) {
		if e.Type == of {
			n, last = n+1, e
		}
	}
	return n, last
}

// all returns all events.
func (r *rig) all(t *testing.T) (all []audit.Event) {
	t.Helper()
	if err := r.ledger.Events(0, func(_ uint64, b []byte) bool {
		e, err := audit.Decode(b)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, e)
		return true
	}); err != nil {
		t.Fatal(err)
	}
	return all
}

// trail lists the types of the events about a proposal.
func (r *rig) trail(t *testing.T, id uint64) string {
	t.Helper()
	var all []string
	if err := r.ledger.Events(0, func(_ uint64, b []byte) bool {
		if e, err := audit.Decode(b); err == nil && e.Resource == fmt.Sprintf("proposal/%d", id) {
			s := string(e.Type)
			if e.Outcome != "ok" {
				s += ":" + e.Outcome
			}
			all = append(all, s)
		}
		return true
	}); err != nil {
		t.Fatal(err)
	}
	return strings.Join(all, " ")
}

// replay verifies the approvals in the log as an auditor does. replay fails after a call of mutate
// or apply, which change operators without approval.
func (r *rig) replay(t *testing.T) *approval.Report {
	t.Helper()
	report, err := approval.Replay(func(yield func(uint64, audit.Event) bool) {
		if err := r.ledger.Events(0, func(i uint64, b []byte) bool {
			e, err := audit.Decode(b)
			if err != nil {
				t.Error(err)
			}
			return yield(i, e)
		}); err != nil {
			t.Error(err)
		}
	}, approval.ReplayOptions{Appliance: r.name})
	if err != nil {
		t.Fatalf("an auditor says: %v", err)
	}
	if string(manage.Encode(report.Operators)) != string(manage.Encode(r.Operators())) || report.Needed != r.Needed() {
		t.Errorf("by the log, %d approvals are needed, and the operators are %s",
			report.Needed, manage.Encode(report.Operators))
	}
	for _, c := range report.Proposals {
		if p, err := r.Proposal(c.ID); err == nil && string(p.State) != c.State {
			t.Errorf("by the log, proposal %d is %s, and not %s", c.ID, c.State, p.State)
		}
	}
	return report
}

func want(t *testing.T, err, is error) {
	t.Helper()
	if !errors.Is(err, is) {
		t.Errorf("the error is %v, and not %v", err, is)
	}
}

func all(n int, do func(i int)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { do(i) })
	}
	wg.Wait()
}

func TestEnrolFirst(t *testing.T) {
	r := newRig(t, 0)
	s := newSigner(t, "alice")
	if _, err := r.Challenge(approval.ForSignIn, "alice", "", root); !errors.Is(err, ErrUninitialised) {
		t.Errorf("a challenge before there is an operator: %v", err)
	}
	for _, ch := range []Channel{user, https, {}} {
		_, err := r.EnrolFirst(t.Context(), ch, "alice", s.credential)
		want(t, err, ErrNotAllowed)
	}
	for _, bad := range []string{"", "Alice", "-a", "a b", "a_b", strings.Repeat("a", 65)} {
		_, err := r.EnrolFirst(t.Context(), root, bad, s.credential)
		want(t, err, ErrInvalid)
	}
	if r.Initialised() {
		t.Error("an operator is there after refusals")
	}
	var enrolled atomic.Int32
	all(8, func(i int) {
		_, err := r.EnrolFirst(t.Context(), root, fmt.Sprintf("alice-%d", i), newSigner(t, "").credential)
		if err == nil {
			enrolled.Add(1)
		} else {
			want(t, err, ErrConflict)
		}
	})
	n, e := r.events(t, audit.OperatorEnrolled)
	if enrolled.Load() != 1 || n != 1 || len(r.Operators()) != 1 || e.Actor.Name != "uid:0" {
		t.Errorf("%d of 8 have enrolled the first operator, with %d events, the last one by %q",
			enrolled.Load(), n, e.Actor.Name)
	}
	before := string(manage.Encode(r.Operators()))
	r.reopen(t)
	if after := string(manage.Encode(r.Operators())); after != before || !r.Initialised() || r.Needed() != 1 {
		t.Errorf("after a restart the operators are %s, before %s", after, before)
	}
}
