package keyring_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign/appliance"
	"countersign/audit"
	"countersign/internal/cause"
	"countersign/internal/eddsa"
	"countersign/internal/form"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/keystore/keystoretest"
	"countersign/internal/ledger"
	"countersign/internal/ledger/disktest"
	"countersign/internal/ledger/ledgertest"
	"countersign/internal/resource"
	"countersign/internal/scantest"
	"countersign/policy"
	"countersign/transcript"
	"countersign/wire"

	"filippo.io/age"
)

func TestMain(m *testing.M) {
	disktest.Serve() // in the process of a test's disk
	os.Exit(scantest.Run(m))
}

const allowShop = `permit (principal == Peer::"shop", action == Action::"sign", resource == Key::"payments");`

var (
	operator = audit.Operator("test")
	approved = audit.Actor{Kind: "operator", Name: "test", Proposal: 1}
)

// rig is an appliance on a real ledger and a keystore in memory, with the key payments and two
// peers. The tests are about the appliance's Keys; the appliance around them signs and verifies for
// peers.
type rig struct {
	*appliance.Appliance
	limits  appliance.Limits
	options ledger.Options
	ledger  *ledger.Ledger
	store   *keystoretest.Memory
	more    map[string]keystore.Store // further tokens, by name
	monitor *resource.Monitor
	path    string
	shop    appliance.Caller
	cafe    appliance.Caller
	public  []byte         // of payments/1
	lost    []keystore.Ref // versions that the test has removed from their token

	identities []age.Identity // of all recovery holders
}

// newRig makes a rig; the functions of change see the rig before its ledger is made.
func newRig(t *testing.T, change ...func(*rig)) *rig {
	t.Helper()
	return newRigAt(t, filepath.Join(t.TempDir(), "ledger.db"), change...)
}

func newRigAt(t *testing.T, path string, change ...func(*rig)) *rig {
	t.Helper()
	r := &rig{limits: appliance.DefaultLimits(), store: keystoretest.NewMemory(), path: path}
	r.limits.Calls, r.limits.RequestTimeout = map[string]int{"memory": 4}, 5*time.Second
	for _, each := range change {
		each(r)
	}
	if err := ledger.Create(path, r.options); err != nil {
		t.Fatal(err)
	}
	r.open(t)
	t.Cleanup(func() {
		r.agrees(t)
		r.ledger.Close()
	})
	k, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: "payments", Token: "memory"})
	if err != nil {
		t.Fatal(err)
	}
	r.public = k.Info().PublicKey
	r.shop, r.cafe = r.enrol(t, "shop", 7), r.enrol(t, "cafe", 8)
	return r
}

// enrol enrols a peer with a public key of 32 equal bytes.
func (r *rig) enrol(t *testing.T, name string, key byte) appliance.Caller {
	t.Helper()
	p, err := r.Peers.Add(t.Context(), operator, name, bytes.Repeat([]byte{key}, 32))
	if err != nil {
		t.Fatal(err)
	}
	return appliance.Caller{Peer: p}
}

// open opens the ledger and puts an appliance together on it. Nothing is recovered yet.
func (r *rig) open(t *testing.T) {
	t.Helper()
	if err := r.tryOpen(t); err != nil {
		t.Fatal(err)
	}
}

func (r *rig) tryOpen(t *testing.T) error {
	t.Helper()
	l, err := ledgertest.Open(t, r.path, r.options)
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Parse("policy.cedar", []byte(allowShop))
	if err != nil {
		t.Fatal(err)
	}
	log, day := slog.New(slog.DiscardHandler), 24*time.Hour
	monitor := resource.NewMonitor(log, r.limits.RequestTimeout)
	stores := map[string]keystore.Store{"memory": keystoretest.Sealing{
		Store: form.Guard(r.store, nil), Memory: r.store,
	}}
	maps.Copy(stores, r.more)
	a, err := appliance.New(t.Context(), appliance.Config{
		Limits: r.limits, Monitor: monitor,
		Retention: appliance.Retention{
			Epoch: appliance.Month, Audit: 365 * day, Receipts: 365 * day, Decisions: 30 * day, Nonces: day,
		},
	}, l, stores, p, log)
	if err != nil {
		l.Close()
		return err
	}
	r.Appliance, r.ledger, r.monitor = a, l, monitor
	return nil
}

// reopen closes the ledger and opens the appliance anew, as after a crash.
func (r *rig) reopen(t *testing.T) {
	t.Helper()
	r.agrees(t)
	r.ledger.Close()
	r.open(t)
	if err := r.Keys.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// agrees compares the memory of the ring with a fold of the ledger: the memory of a second ring
// that is opened on the same ledger. The first ring does nothing any more after that. A ledger that
// the test has closed or broken is not compared.
func (r *rig) agrees(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	err := r.ledger.Alive(ctx)
	if errors.Is(err, ledger.ErrClosed) || errors.Is(err, ledger.ErrUnknownState) {
		return
	}
	if err := errors.Join(err, r.Keys.Stop(ctx)); err != nil {
		t.Error(err)
		return
	}
	fold, err := keyring.Open(ctx, r.Keys.Config)
	if err != nil {
		t.Errorf("a second ring on the ledger: %v", err)
		return
	}
	differ(t, r.Keys.Memory(), fold.Memory())
}

// differ reports the lines in which memory is not as a fold of the ledger.
func differ(t *testing.T, memory, fold map[string]string) {
	t.Helper()
	all := maps.Clone(memory)
	maps.Copy(all, fold)
	for _, subject := range slices.Sorted(maps.Keys(all)) {
		if memory[subject] != fold[subject] {
			t.Errorf("%s: memory has %q, the ledger %q", subject, memory[subject], fold[subject])
		}
	}
}

// started is the time of every document of a test run, in seconds since 1970.
var started = time.Now().Unix()

// message returns a valid sign request for a message. n is the first byte of the nonce. Two calls
// with equal arguments return equal documents, also when a second ends between the calls. A test
// with a fake clock, which begins in the year 2000, gets a document of the fake time.
func message(n byte, content string) *wire.Sign {
	now := min(started, time.Now().Unix())
	text := base64.RawURLEncoding.EncodeToString([]byte(content))
	return &wire.Sign{ID: "1", Op: "sign", Key: "payments", Document: wire.Document{
		Type: "message-v1", Payload: fmt.Appendf(nil, `{"context":"test","message":%q}`, text),
		Nonce: wire.Bytes32{n}, Timestamp: now, ExpiresAt: now + 3600,
	}}
}

func verifyOf(s *wire.Sign, signed *wire.Signed) *wire.Verify {
	return &wire.Verify{
		ID: "2", Op: "verify", PublicKey: signed.PublicKey, Signature: signed.Signature, Document: s.Document,
	}
}

func (r *rig) sign(t *testing.T, who appliance.Caller, req *wire.Sign) *wire.Signed {
	t.Helper()
	s, err := r.Sign(t.Context(), who, req)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// hasCause requires a cause with a subject and a text.
func (r *rig) hasCause(t *testing.T, kind *cause.Kind, subject, text string) {
	t.Helper()
	for _, c := range r.Keys.Causes() {
		if c.Kind == kind && c.Subject == subject && strings.Contains(c.Text, text) {
			return
		}
	}
	t.Errorf("no cause %s of %s with %q: %v", kind.Code, subject, text, r.Keys.Causes())
}

// refused expects an error for a reason.
func refused(t *testing.T, reason, err error) {
	t.Helper()
	if !errors.Is(err, reason) {
		t.Errorf("%v, want %v", err, reason)
	}
}

// log reads the audit log from an event on. All that was waiting for the disk is in the log by
// then.
func (r *rig) log(t *testing.T, from uint64) (all []audit.Event) {
	t.Helper()
	if err := r.ledger.Alive(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := r.Events(from, func(_ uint64, e audit.Event) bool { all = append(all, e); return true }); err != nil {
		t.Fatal(err)
	}
	return all
}

// count counts the events of a type.
func (r *rig) count(t *testing.T, of audit.Type) (n int) {
	t.Helper()
	for _, e := range r.log(t, 0) {
		if e.Type == of {
			n++
		}
	}
	return n
}

// createOwn makes keys of the appliance's own.
func (r *rig) createOwn(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := r.Keys.CreateOwn(t.Context(), operator, name, "memory"); err != nil {
			t.Fatal(err)
		}
	}
}

func (r *rig) rotate(t *testing.T, name string, at time.Time) *keyring.Key {
	t.Helper()
	k, err := r.Keys.Rotate(t.Context(), operator, name, at)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (r *rig) archive(t *testing.T, name string, version uint32) {
	t.Helper()
	if err := r.Keys.Archive(t.Context(), approved, name, version); err != nil {
		t.Fatal(err)
	}
}

func (r *rig) compromise(t *testing.T, name string, version uint32) {
	t.Helper()
	if err := r.Keys.Compromise(t.Context(), approved, name, version, "stolen"); err != nil {
		t.Fatal(err)
	}
}

func (r *rig) destroy(t *testing.T, name string, version uint32) {
	t.Helper()
	if err := r.Keys.Destroy(t.Context(), approved, name, version); err != nil {
		t.Fatal(err)
	}
}

func (r *rig) set(t *testing.T, name string, change func(*keyring.Settings)) {
	t.Helper()
	set := func(s *keyring.Settings) error { change(s); return nil }
	if _, err := r.Keys.Set(t.Context(), approved, name, set); err != nil {
		t.Fatal(err)
	}
}

func (r *rig) ack(t *testing.T, who appliance.Caller, key string, version uint32) error {
	ack := &wire.Ack{ID: "1", Op: wire.OpAck, Key: key, Version: version}
	if k := r.Keys.Version(key, version); k != nil {
		ack.Change = k.Change
	}
	_, err := r.Acknowledge(t.Context(), who, ack)
	return err
}

// keep does now what is due of a key.
func (r *rig) keep(t *testing.T, name string) { r.Keys.KeepKey(t.Context(), name) }

// condition expects a state of the appliance. A cause of a degraded one contains the text.
func (r *rig) condition(t *testing.T, want appliance.Condition, cause string) {
	t.Helper()
	if h := r.Health(); h.Condition != want || !strings.Contains(fmt.Sprint(h.Causes), cause) {
		t.Errorf("%+v, want %s because of %q", h, want, cause)
	}
}

// states lists the states of a key's versions, the first version first; "" for a key without any.
func (r *rig) states(t *testing.T, name string) string {
	t.Helper()
	var all []string
	versions, _ := r.Keys.Versions(name)
	for _, k := range versions {
		all = append(all, string(k.State))
	}
	return strings.Join(all, " ")
}

func (r *rig) wantStates(t *testing.T, name, want string) {
	t.Helper()
	if got := r.states(t, name); got != want {
		t.Errorf("the versions of %s are %q, want %q", name, got, want)
	}
}

// checkKey holds a key against the invariants at the top of rotate.go and of holders.go.
func (r *rig) checkKey(t *testing.T, name string) {
	t.Helper()
	versions, err := r.Keys.Versions(name)
	if err != nil {
		t.Fatal(err)
	}
	r.checkEnvelopes(t, versions)
	committed := map[string]string{} // the digest, by version, as the log has it
	for _, e := range r.log(t, 0) {
		if e.Type == audit.KeyCommitted && e.Metadata["next"] != "" && strings.HasPrefix(e.Resource, name+"/") {
			if old := committed[e.Resource]; old != "" && old != e.Metadata["next"] {
				t.Errorf("%s has committed twice", e.Resource)
			}
			committed[e.Resource] = e.Metadata["next"]
		}
	}
	active, announced := 0, 0
	for i, k := range versions {
		if k.State == keyring.Active {
			active++
		}
		if k.State == keyring.Pending && k.Announced() {
			announced++
		}
		if i == 0 {
			continue
		}
		before := versions[i-1]
		if k.Version%recovered == 0 {
			if k.Announced() {
				r.checkStep(t, k, k)
			}
			continue
		}
		if k.Version != before.Version+1 {
			t.Errorf("version %d is missing", k.Version-1)
		}
		if got := fmt.Sprintf("%x", k.Digest()); committed[before.Ref().String()] != got {
			t.Errorf("%v is %s, the version before has committed to %s", k.Ref(), got, committed[before.Ref().String()])
		}
		if k.Announced() {
			r.checkStep(t, before, k)
		}
	}
	if active > 1 || announced > 1 {
		t.Errorf("%d versions are active, %d are announced", active, announced)
	}
}

// checkStep judges a step as a stranger would.
func (r *rig) checkStep(t *testing.T, old, k *keyring.Key) {
	t.Helper()
	s := k.Succession
	if s == nil {
		t.Errorf("%v has no step", k.Ref())
		return
	}
	doc, err := transcript.Parse(transcript.Request{
		Type: "key-succession-v1", Payload: s.Payload, Nonce: s.Nonce, Timestamp: s.Timestamp, ExpiresAt: s.ExpiresAt,
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := eddsa.Verify(old.Info().PublicKey, doc.Message, s.Signature); err != nil {
		t.Errorf("%v: %v", k.Ref(), err)
	}
	var p struct {
		To   string `json:"new_public_key"`
		Next string `json:"next"`
	}
	if err := json.Unmarshal(s.Payload, &p); err != nil {
		t.Fatal(err)
	}
	if p.To != base64.RawURLEncoding.EncodeToString(k.Info().PublicKey) {
		t.Errorf("%v: the step is to another key", k.Ref())
	}
	if next, ok := r.Keys.Next(k); !ok || p.Next != base64.RawURLEncoding.EncodeToString(next[:]) {
		t.Errorf("%v: the step names another successor than there is", k.Ref())
	}
}
