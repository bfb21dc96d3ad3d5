package keyring_test

import (
	"fmt"
	"maps"
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
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/spectest"
)

// allStates are all states of a version.
var allStates = []keyring.State{
	keyring.Absent, keyring.Making, keyring.Pending, keyring.Active, keyring.VerifyOnly, keyring.Archived,
	keyring.Compromised, keyring.Destroyed,
}

// row returns the transition between two states, the one with one of these events where there is
// more than one; nil: the table has none.
func row(from, to keyring.State, with ...audit.Type) (found *keyring.Transition) {
	for i, t := range keyring.Transitions {
		own := func(e audit.Type) bool { return slices.Contains(t.Events, e) }
		if t.From == from && t.To == to && (found == nil || slices.ContainsFunc(with, own)) {
			found = &keyring.Transitions[i]
		}
	}
	return found
}

// TestTransitions: the table names each step with an event once, and leads from absent to every
// state.
func TestTransitions(t *testing.T) {
	reached := map[keyring.State]bool{keyring.Absent: true}
	for range keyring.Transitions { // the longest way has no more steps
		for _, s := range keyring.Transitions {
			reached[s.To] = reached[s.To] || reached[s.From]
		}
	}
	for _, s := range allStates {
		if !reached[s] {
			t.Errorf("no way leads to %s", s.Title())
		}
	}
	seen := map[string]bool{}
	for _, s := range keyring.Transitions {
		for _, e := range append(slices.Clone(s.Events), "") {
			step := fmt.Sprint(stepName(s.From, s.To), e)
			if s.From == s.To || seen[step] && e != "" {
				t.Errorf("the table has %s to %s twice, or it is no step", s.From.Title(), s.To.Title())
			}
			seen[step] = true
		}
		if !slices.Contains(allStates, s.From) || !slices.Contains(allStates, s.To) {
			t.Errorf("%+v has a state that no test knows", s)
		}
		if len(s.Events) == 0 && s.To != keyring.Making {
			t.Errorf("%s to %s leaves no event", s.From.Title(), s.To.Title())
		}
	}
}

// step is a change of one version's state in the ledger, with the transaction's events.
type step struct {
	ref         keystore.Ref
	from, to    keyring.State
	first, next uint64 // the events of the transaction: from first to before next
}

// witness watches a rig's ledger, and notes the steps of each transaction. The ledger asks the
// clock at the beginning of each transaction, and shows the records to followers after the commit,
// before anything else is decided. So the events between the two moments are those of the
// transaction.
type witness struct {
	ledger  atomic.Pointer[ledger.Ledger]
	first   atomic.Uint64 // the number of events at the beginning of the transaction
	states  map[string]keyring.State
	changed []step // of the transaction
	steps   []step
}

func (w *witness) head() uint64 {
	l := w.ledger.Load()
	if l == nil {
		return 0
	}
	_, first, tree := l.Head()
	return first + tree.Size
}

// now is the ledger's clock.
func (w *witness) now() time.Time {
	w.first.Store(w.head())
	return time.Now()
}

// Lock and Unlock are called around the records of one transaction.
func (w *witness) Lock() { w.changed = nil }

func (w *witness) Unlock() {
	for _, s := range w.changed {
		s.first, s.next = w.first.Load(), w.head()
		w.steps = append(w.steps, s)
	}
}

func (w *witness) take(name string, value []byte) error {
	ref, err := keystore.ParseRef(name)
	if err != nil {
		return err
	}
	state := keyring.Absent
	if value != nil {
		if state, err = keyring.StateOf(name, value); err != nil {
			return err
		}
	}
	if before := w.states[name]; before != state {
		w.changed = append(w.changed, step{ref: ref, from: before, to: state})
	}
	w.states[name] = state
	return nil
}

// newWitness makes a rig whose ledger is watched.
func newWitness(t *testing.T, change ...func(*rig)) (*rig, *witness) {
	t.Helper()
	w := &witness{states: map[string]keyring.State{}}
	r := newRig(t, append(change, func(r *rig) { r.options = ledger.Options{Wall: w.now} })...)
	w.ledger.Store(r.ledger)
	if err := r.ledger.Follow(t.Context(), w, ledger.Followed{Table: ledger.Keys, Take: w.take}); err != nil {
		t.Fatal(err)
	}
	w.steps = nil
	return r, w
}

// TestStepsAreTaken walks the table on a real ring: each transition is taken by acts, with each of
// its events and by each of its actors, and the event is in the transaction that changes the
// record.
func TestStepsAreTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := newWitness(t, withSafe)
		seed := filepath.Join(t.TempDir(), "seed")
		if err := os.WriteFile(seed, []byte(strings.Repeat("07", 32)), 0o600); err != nil {
			t.Fatal(err)
		}
		create := func(n keyring.NewKey) {
			n.Token = "memory"
			if _, err := r.Keys.Create(t.Context(), operator, n); err != nil {
				t.Fatal(err)
			}
		}
		seen := map[string]bool{} // "making active KeyCreated" and "making active operator"
		for _, act := range []struct {
			name string
			do   func()
			want []string // version, step, events
		}{
			{"create", func() { create(keyring.NewKey{Name: "a"}) }, []string{
				"a/1 absent>making",
				"a/2 absent>making",
				"a/1 making>active KeyCreated a/1 by operator",
				"a/2 making>pending KeyCommitted a/1 by operator",
			}},
			{"import", func() { create(keyring.NewKey{Name: "b", Seed: seed}) }, []string{
				"b/1 absent>making",
				"b/2 absent>making",
				"b/1 making>active KeyImported b/1 by operator",
				"b/2 making>pending KeyCommitted b/1 by operator",
			}},
			{"create, and the device fails", func() {
				r.store.BeforeGenerate = func(ref keystore.Ref) error {
					if ref.Version == 2 {
						return keystore.ErrUnavailable
					}
					return nil
				}
				_, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: "c", Token: "memory"})
				refused(t, keystore.ErrUnavailable, err)
				r.store.BeforeGenerate = nil
			}, []string{
				"c/1 absent>making",
				"c/2 absent>making",
				"c/2 making>absent KeyCreationFailed c/2 by daemon",
				"c/1 making>absent KeyCreationFailed c/1 by daemon",
			}},
			{"create the Noise key", func() { r.createOwn(t, keyring.NoiseName) }, []string{
				"noise/1 absent>making",
				"noise/1 making>active KeyCreated noise/1 by operator",
			}},
			{"the daemon creates a key of its own", func() {
				if _, err := r.Keys.CreateOwn(t.Context(), audit.Daemon(), keyring.AdminName, "memory"); err != nil {
					t.Fatal(err)
				}
			}, []string{
				"admin-tls/1 absent>making",
				"admin-tls/1 making>active KeyCreated admin-tls/1 by daemon",
			}},
			{"announce", func() { r.rotate(t, "a", time.Now().Add(time.Minute)) }, []string{
				"a/3 absent>making",
				"a/3 making>pending RotationAnnounced a/1 by operator, KeyCommitted a/2 by operator",
			}},
			{"activate by schedule", func() { time.Sleep(time.Minute); r.keep(t, "a") }, []string{
				"a/2 pending>active KeyRotated a/2 by operator", // the operator has asked for it
				"a/1 active>verify-only KeyRotated a/2 by operator",
			}},
			{"rotate the Noise key", func() { r.rotate(t, keyring.NoiseName, time.Now()) }, []string{
				"noise/2 absent>making",
				"noise/2 making>pending RotationAnnounced noise/1 by operator",
				"noise/2 pending>active KeyRotated noise/2 by operator",
				"noise/1 active>verify-only KeyRotated noise/2 by operator",
			}},
			{"rotate by schedule", func() {
				r.set(t, "b", func(s *keyring.Settings) { s.Plan.Every, s.Grace = time.Hour, time.Minute })
				time.Sleep(time.Hour)
				r.keep(t, "b")
			}, []string{
				"b/3 absent>making",
				"b/3 making>pending RotationAnnounced b/1 by daemon, KeyCommitted b/2 by daemon",
				"b/2 pending>active KeyRotated b/2 by daemon",
				"b/1 active>verify-only KeyRotated b/2 by daemon",
			}},
			{"archive by schedule", func() { time.Sleep(time.Minute); r.keep(t, "b") }, []string{
				"b/1 verify-only>archived KeyStateChanged b/1 by daemon",
			}},
			{"archive", func() { r.archive(t, keyring.NoiseName, 1) }, []string{
				"noise/1 verify-only>archived KeyStateChanged noise/1 by operator",
			}},
			{"destroy", func() { r.destroy(t, keyring.NoiseName, 1) }, []string{
				"noise/1 archived>destroyed KeyStateChanged noise/1 by operator",
			}},
			{"compromise an archived version", func() { r.compromise(t, "b", 1) }, []string{
				"b/1 archived>compromised KeyStateChanged b/1 by operator",
			}},
			{"compromise a version that verifies", func() { r.compromise(t, "a", 1) }, []string{
				"a/1 verify-only>compromised KeyStateChanged a/1 by operator",
			}},
			{"compromise the active version", func() { r.compromise(t, "a", 2) }, []string{
				"a/2 active>compromised KeyStateChanged a/2 by operator",
				"a/4 absent>making",
				"a/4 making>pending RotationAnnounced a/2 by operator, KeyCommitted a/3 by operator",
				"a/3 pending>active KeyRotated a/3 by operator",
			}},
			{"destroy a compromised version", func() { r.destroy(t, "a", 2) }, []string{
				"a/2 compromised>destroyed KeyStateChanged a/2 by operator",
			}},
			{"make a recovery successor", func() { r.makeRecovery(t, "safe") }, []string{
				"payments/1000000 absent>making",
				"payments/1000001 absent>making",
				"payments/1000000 making>pending KeyCommitted payments/1 by operator, " +
					"KeyCommitted payments/1000000 by operator",
				"payments/1000001 making>pending KeyCommitted payments/1 by operator, " +
					"KeyCommitted payments/1000000 by operator",
			}},
			{"replace a recovery successor", func() { r.makeRecovery(t, "safe") }, []string{
				"payments/2000000 absent>making",
				"payments/2000001 absent>making",
				"payments/1000000 pending>archived KeyCommitted payments/1 by operator, " +
					"KeyCommitted payments/2000000 by operator",
				"payments/1000001 pending>archived KeyCommitted payments/1 by operator, " +
					"KeyCommitted payments/2000000 by operator",
				"payments/2000000 making>pending KeyCommitted payments/1 by operator, " +
					"KeyCommitted payments/2000000 by operator",
				"payments/2000001 making>pending KeyCommitted payments/1 by operator, " +
					"KeyCommitted payments/2000000 by operator",
			}},
			{"recover", func() { r.lose(1, 2); r.recover(t) }, []string{
				"payments/1 active>verify-only KeyRecovered payments/2000000 by operator",
				"payments/2 pending>archived KeyRecovered payments/2000000 by operator",
				"payments/2000000 pending>active KeyRecovered payments/2000000 by operator",
			}},
		} {
			w.steps = nil
			act.do()
			var got []string
			for _, s := range w.steps {
				got = append(got, r.judge(t, s, seen))
			}
			if !slices.Equal(got, act.want) {
				lines := func(steps []string) string { return strings.Join(steps, "\n") }
				t.Errorf("%s takes the steps\n%s\nwant\n%s", act.name, lines(got), lines(act.want))
			}
		}
		for _, each := range keyring.Transitions {
			var all []string
			for _, e := range each.Events {
				all = append(all, string(e))
			}
			if len(all) > 0 {
				all = append(all, strings.Split(each.By, " or ")...)
			}
			for _, what := range append(all, "") {
				if !seen[stepName(each.From, each.To)+" "+what] {
					t.Errorf("no act takes the step %s %s", stepName(each.From, each.To), what)
				}
			}
		}
	})
}

func stepName(from, to keyring.State) string { return from.Title() + ">" + to.Title() }

// judge holds a step against its row in the table, notes it in seen with the row's events and their
// actors, and describes it.
func (r *rig) judge(t *testing.T, s step, seen map[string]bool) string {
	t.Helper()
	name := stepName(s.from, s.to)
	text := fmt.Sprint(s.ref, " ", name)
	var with []audit.Type
	for i, e := range r.log(t, s.first) {
		if s.first+uint64(i) < s.next {
			with = append(with, e.Type)
		}
	}
	in := row(s.from, s.to, with...)
	if in == nil {
		t.Errorf("%s is not in the table", text)
		return text
	}
	seen[name+" "] = true
	var events []string
	approved := in.Act == ""
	for i, e := range r.log(t, s.first) {
		if s.first+uint64(i) == s.next {
			break
		}
		if !slices.Contains(in.Events, e.Type) {
			continue
		}
		events = append(events, fmt.Sprintf(" %s %s by %s", e.Type, e.Resource, e.Actor.Kind))
		seen[name+" "+string(e.Type)], seen[name+" "+e.Actor.Kind] = true, true
		if !strings.Contains(in.By, e.Actor.Kind) {
			t.Errorf("%s is caused by the %s", text, e.Actor.Kind)
		}
		needed := in.Act
		if e.Actor.Kind == "daemon" {
			needed = "" // approved settings and time are the cause
		}
		act := approval.NeedsApproval(e)
		if approved = approved || act == needed; act != "" && e.Actor.Proposal == 0 {
			t.Errorf("%s: the event is the act %q without a proposal", text, act)
		}
	}
	if !approved && len(events) > 0 {
		t.Errorf("%s: none of the events is the act %q", text, in.Act)
	}
	return text + strings.Join(events, ",")
}

// inEveryState makes a version in each state.
func (r *rig) inEveryState(t *testing.T) map[keyring.State]keystore.Ref {
	t.Helper()
	for _, name := range []string{"a", "b", "c"} {
		if _, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: name}); err != nil {
			t.Fatal(err)
		}
		r.rotate(t, name, time.Now())
	}
	r.archive(t, "b", 1)
	r.archive(t, "c", 1)
	r.destroy(t, "c", 1)
	r.compromise(t, "c", 2)
	unfinished := keystore.Ref{Name: "d", Version: 1}
	if err := r.ledger.Update(t.Context(), func(tx *ledger.Tx) error {
		return keyring.PutUnfinished(tx, unfinished, "memory")
	}); err != nil {
		t.Fatal(err)
	}
	all := map[keyring.State]keystore.Ref{keyring.Absent: {Name: "e", Version: 1}, keyring.Making: unfinished}
	for _, k := range r.Keys.All() {
		all[k.State] = k.Ref()
	}
	if len(all) != len(allStates) {
		t.Fatalf("versions in the states %v", all)
	}
	return all
}

// written describes the ledger's records of keys, and where the log ends.
func (r *rig) written(t *testing.T) map[string]string {
	t.Helper()
	_, first, tree := r.ledger.Head()
	all := map[string]string{"events": fmt.Sprint(first + tree.Size)}
	if err := r.ledger.All(ledger.Keys, func(name string, value []byte) error {
		all[name] = string(value)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return all
}

// TestOtherStepsAreRefused tries every step between two states that the table does not have, every
// step by a wrong actor, without its approval and without its event: nothing is written.
func TestOtherStepsAreRefused(t *testing.T) {
	r := newRig(t)
	versions := r.inEveryState(t)
	types := map[audit.Type]bool{"": true} // types of the table; "": no event
	needsApproval := map[string]bool{}     // "archived KeyRecovered"
	for _, each := range keyring.Transitions {
		for _, e := range each.Events {
			types[e] = true
			to := string(each.To) + " " + string(e)
			needsApproval[to] = needsApproval[to] || each.Act != ""
		}
	}
	if err := r.ledger.Alive(t.Context()); err != nil {
		t.Fatal(err)
	}
	before, memory := r.written(t), r.Keys.Memory()
	tried := 0
	refuse := func(who audit.Actor, from, to keyring.State, reason error, with audit.Type) {
		t.Helper()
		tried++
		var events []audit.Event
		if with != "" {
			events = []audit.Event{{Type: with, Actor: operator, Action: "test", Outcome: "ok"}}
		}
		err := r.Keys.Change(t.Context(), who, versions[from], to, events...)
		refused(t, reason, err)
		if !maps.Equal(r.written(t), before) || !maps.Equal(r.Keys.Memory(), memory) {
			t.Fatalf("%s by %s %d is written: %v", stepName(from, to), who.Kind, who.Proposal, err)
		}
	}
	peer := audit.Peer("shop", r.shop.PublicKey)
	for _, from := range allStates {
		for _, to := range append([]keyring.State{"nonsense"}, allStates...) {
			for _, who := range []audit.Actor{operator, approved, audit.Daemon(), peer} {
				for e := range types {
					in := row(from, to, e)
					switch {
					case from == to:
					case needsApproval[string(to)+" "+string(e)] && who.Proposal == 0 && who.Kind != "daemon":
						refuse(who, from, to, manage.ErrNotApproved, e)
					case in == nil:
						refuse(who, from, to, manage.ErrConflict, e)
					case len(in.Events) > 0 && !slices.Contains(in.Events, e):
						refuse(who, from, to, manage.ErrInvalid, e)
					case !strings.Contains(in.By, who.Kind):
						refuse(who, from, to, manage.ErrConflict, e)
					}
				}
			}
		}
	}
	if tried < 1000 {
		t.Errorf("only %d steps are tried", tried)
	}
}

// TestTransitionsThatNeedApproval: the transitions with an act are exactly those whose event
// package approval takes for this act.
func TestTransitionsThatNeedApproval(t *testing.T) {
	event := func(of audit.Type, from, to keyring.State) audit.Event {
		if of == audit.KeyStateChanged {
			return audit.NewKeyStateChanged(operator, "payments/1", string(from), string(to), "")
		}
		e := audit.Event{Type: of, Actor: operator, Resource: "payments/1"}
		if from == keyring.Pending && of == audit.KeyCommitted {
			e = audit.NewRecoveryCommitted(operator, "payments/1", 1, "", [32]byte{}, audit.KeyFacts{})
		}
		return e
	}
	acts := map[string]bool{"": true}
	for _, s := range keyring.Transitions {
		acts[s.Act] = true
		for _, of := range s.Events {
			if act := approval.NeedsApproval(event(of, s.From, s.To)); act != s.Act {
				t.Errorf("%s: the act of %s is %q, the table has %q", stepName(s.From, s.To), of, act, s.Act)
			}
		}
		if s.Act != "" && !slices.Contains(approval.Acts(), s.Act) {
			t.Errorf("%s: there is no act %q", stepName(s.From, s.To), s.Act)
		}
	}
	for _, from := range allStates {
		for _, to := range allStates {
			if act := approval.NeedsApproval(event(audit.KeyStateChanged, from, to)); !acts[act] {
				t.Errorf("%s is the act %q, which no transition has", stepName(from, to), act)
			}
		}
	}
}

// TestSpecHasTransitions holds the table of steps in docs/SPEC.md equal to Transitions. After a
// change of Transitions, the flag -write brings the table up to date: see spectest.
func TestSpecHasTransitions(t *testing.T) {
	const header = "| from | to | by | event | approval |\n| --- | --- | --- | --- | --- |\n"
	cell := func(names ...string) string {
		if len(names) == 0 || names[0] == "" {
			return " "
		}
		return " `" + strings.Join(names, "` or `") + "` "
	}
	rows := ""
	for _, s := range keyring.Transitions {
		var events []string
		for _, e := range s.Events {
			events = append(events, string(e))
		}
		cells := []string{cell(s.From.Title()), cell(s.To.Title()), " " + s.By + " ", cell(events...), cell(s.Act)}
		rows += "|" + strings.Join(cells, "|") + "|\n"
	}
	spectest.Table(t, "../../docs/SPEC.md", header, rows)
}
