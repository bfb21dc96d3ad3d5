package appliance

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/wire"
)

// logRig makes a rig with a key of the audit log.
func logRig(t *testing.T) (*rig, audit.Log) {
	t.Helper()
	r := newRig(t)
	if _, err := r.Keys.CreateOwn(t.Context(), audit.Operator("test"), keyring.LogName, "memory"); err != nil {
		t.Fatal(err)
	}
	log, _, err := r.Log()
	if err != nil {
		t.Fatal(err)
	}
	return r, log
}

// files is an appliance as an audit.Source.
type files struct{ *Appliance }

func (f files) ReadFile(ctx context.Context, name string) ([]byte, error) {
	return f.LogFile(ctx, name)
}

// TestReceipt: a payment has a receipt with a commitment to its amount. The ledger has neither the
// salt nor the amount. The same request gets the same receipt.
func TestReceipt(t *testing.T) {
	r, _ := logRig(t)
	req := message(1, "")
	req.Type, req.Payload = "paykit-subscription-v2", subscription(r.public)
	signed := r.sign(t, r.shop, req)
	again := r.sign(t, r.shop, req)
	if signed.Receipt == nil || again.Receipt == nil || !bytes.Equal(signed.Receipt.ID, again.Receipt.ID) ||
		!bytes.Equal(signed.Receipt.Salt, again.Receipt.Salt) {
		t.Fatalf("%+v, again %+v", signed.Receipt, again.Receipt)
	}
	if err := r.ledger.Alive(t.Context()); err != nil {
		t.Fatal(err)
	}
	all, err := r.Receipts(0, 0, "", 10)
	if err != nil || len(all) != 1 {
		t.Fatalf("%+v, %v", all, err)
	}
	kept, err := r.Receipt(fmt.Sprintf("%x", signed.Receipt.ID))
	if err != nil || kept.Event != signed.Event || kept.Status != "completed" ||
		kept.Method != all[0].Method || kept.Method == "" {
		t.Errorf("%+v, %v", kept, err)
	}
	if want := commitmentOf(signed.Receipt.Salt, "1000 SAT"); !bytes.Equal(kept.Commitment, want) {
		t.Errorf("the commitment is %x, want %x", kept.Commitment, want)
	}
	b, err := os.ReadFile(r.path)
	if err != nil || bytes.Contains(b, signed.Receipt.Salt) || bytes.Contains(b, []byte("1000 SAT")) {
		t.Errorf("the salt or the amount is in the ledger: %v", err)
	}
	if s := r.sign(t, r.shop, message(2, "")); s.Receipt != nil {
		t.Error("a message has a receipt")
	}
	if _, err := r.Receipt("00"); !errors.Is(err, manage.ErrInvalid) {
		t.Errorf("a bad id: %v", err)
	}
	if _, err := r.Receipt(fmt.Sprintf("%032x", 1)); !errors.Is(err, manage.ErrNotFound) {
		t.Errorf("an unknown id: %v", err)
	}
}

// commitmentOf returns the commitment of docs/SPEC.md.
func commitmentOf(salt []byte, amount string) []byte {
	h := sha256.Sum256(slices.Concat([]byte("countersign-receipt-v1"), []byte{0}, salt, []byte(amount)))
	return h[:]
}

// TestProofs: a peer gets the proof of each of its own events at once, across epochs, and of no
// other event.
func TestProofs(t *testing.T) {
	r, log := logRig(t)
	first := r.sign(t, r.shop, message(1, ""))
	if _, err := r.EndEpoch(t.Context(), audit.Operator("test")); err != nil {
		t.Fatal(err)
	}
	second := r.sign(t, r.shop, message(2, ""))
	for epoch, signed := range []*wire.Signed{first, second} {
		p, err := r.Proof(t.Context(), r.shop, signed.Event)
		if err != nil {
			t.Fatal(err)
		}
		e, c, err := log.Check(proofOf(p))
		if err != nil || e.Type != audit.SignatureAdmitted || int(c.Epoch) != epoch || int(p.Epoch) != epoch {
			t.Errorf("epoch %d: %+v, %+v, %v", epoch, e, c, err)
		}
	}
	for _, event := range []uint64{0, 1, 1 << 40, 1 << 63} {
		_, err := r.Proof(t.Context(), r.shop, event)
		r.refuses(t, wire.CodeDenied, err)
	}
	_, err := r.Proof(t.Context(), r.cafe, first.Event)
	r.refuses(t, wire.CodeDenied, err)
	r.store.Remove(keystore.Ref{Name: keyring.LogName, Version: 1})
	if _, err := r.Proof(t.Context(), r.shop, first.Event); err != nil {
		t.Errorf("an event under a checkpoint needs no token: %v", err)
	}
}

// TestConsistencyOfAnEndedEpoch asks for a proof up to the final tree of an epoch before that tree
// has a checkpoint: a client that gets none would take the log for a forked one.
func TestConsistencyOfAnEndedEpoch(t *testing.T) {
	r, log := logRig(t)
	first := r.sign(t, r.shop, message(1, ""))
	p, err := r.Proof(t.Context(), r.shop, first.Event)
	if err != nil {
		t.Fatal(err)
	}
	before, err := log.Open([]byte(p.Checkpoint))
	if err != nil {
		t.Fatal(err)
	}
	r.sign(t, r.shop, message(2, ""))
	if _, err := r.ledger.EndEpoch(t.Context(), audit.Operator("test")); err != nil { // without a signature
		t.Fatal(err)
	}
	begun, err := r.EpochStart(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	final, _, err := log.CheckEpoch(proofOf(begun), 1)
	if err != nil {
		t.Fatal(err)
	}
	if e, err := r.ledger.Epoch(0); err != nil || e.Final() {
		t.Fatalf("the final tree is signed already: %+v, %v", e, err)
	}
	c, err := r.Consistency(t.Context(), 0, before.Size, final.Size)
	if err != nil {
		t.Fatal(err)
	}
	if err := final.Continues(before, read(c.Path)); err != nil {
		t.Error(err)
	}
	_, err = r.Consistency(t.Context(), 0, before.Size, final.Size+1)
	r.refuses(t, wire.CodeDenied, err)
}

func proofOf(p *wire.Proven) audit.Proof {
	return audit.Proof{
		Event: p.Event, Index: p.Index, Leaf: p.Leaf, Checkpoint: []byte(p.Checkpoint), Path: read(p.Path),
	}
}

func read(path []wire.Bytes32) (all []audit.Hash) {
	for _, h := range path {
		all = append(all, audit.Hash(h))
	}
	return all
}

// TestPeersCantUseTheLogKey: the key of the audit log is unknown to peers, and no operator can
// create a key of that name.
func TestPeersCantUseTheLogKey(t *testing.T) {
	r, _ := logRig(t)
	req := message(1, "")
	req.Key = keyring.LogName
	_, err := r.Sign(t.Context(), r.shop, req)
	r.refuses(t, wire.CodeUnknownKey, err)
	for _, k := range r.Keys.Listed().Keys {
		if k.Name == keyring.LogName {
			t.Error("the key is listed")
		}
	}
	_, err = r.Keys.Create(t.Context(), audit.Operator("test"), keyring.NewKey{Name: keyring.LogName})
	if !errors.Is(err, manage.ErrInvalid) {
		t.Errorf("a key of that name can be created: %v", err)
	}
}

// TestLogFiles: the files of the log can be verified by anyone, epoch by epoch. Other names do not
// exist.
func TestLogFiles(t *testing.T) {
	r, log := logRig(t)
	for n := range byte(150) {
		r.sign(t, r.shop, message(n, ""))
	}
	if _, err := r.EndEpoch(t.Context(), audit.Operator("test")); err != nil {
		t.Fatal(err)
	}
	for n := range byte(3) {
		r.sign(t, r.shop, message(200+n, ""))
	}
	if err := r.ledger.Alive(t.Context()); err != nil { // writes the last outcome
		t.Fatal(err)
	}
	report, err := log.Verify(t.Context(), files{r.Appliance}, audit.VerifyOptions{})
	if err != nil || report.Signatures != 153 || report.Epochs != 2 {
		t.Errorf("%+v, %v", report, err)
	}
	for _, name := range []string{
		"", "tile", "tile/0/001", "tile/0/000.p/200", "tile/5/000.p/1", "epochs/2/checkpoint", "epochs/00/checkpoint",
		"epochs/x/checkpoint", "epochs/0", "epochs/0/tile/entries/007", "../ledger.db",
	} {
		if _, err := r.LogFile(t.Context(), name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// TestRetention: an epoch is dropped after its retention time, and not during a hold. The rest of
// the log can be verified.
func TestRetention(t *testing.T) {
	r, log := logRig(t)
	r.sign(t, r.shop, message(1, ""))
	operator := audit.Operator("test")
	if _, err := r.EndEpoch(t.Context(), operator); err != nil {
		t.Fatal(err)
	}
	r.sign(t, r.shop, message(2, ""))
	verify := func(want audit.Report) {
		t.Helper()
		got, err := log.Verify(t.Context(), files{r.Appliance}, audit.VerifyOptions{})
		if err != nil || got.Epochs != want.Epochs || got.Dropped != want.Dropped {
			t.Errorf("%+v, %v; want %+v", got, err, want)
		}
	}
	retain := func() {
		t.Helper()
		if _, err := r.retain(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	retain()
	verify(audit.Report{Epochs: 2})
	r.retention.Audit = 0
	if err := r.Hold(t.Context(), operator, 0, "case", "case 1"); err != nil {
		t.Fatal(err)
	}
	retain()
	verify(audit.Report{Epochs: 2})
	if err := r.Release(t.Context(), operator, 0, "case", ""); !errors.Is(err, manage.ErrInvalid) {
		t.Errorf("released without a reason: %v", err)
	}
	if err := r.Release(t.Context(), operator, 0, "case", "over"); err != nil {
		t.Fatal(err)
	}
	retain()
	verify(audit.Report{Epochs: 1, Dropped: 1})
	epochs, _, err := r.Preview()
	if err != nil || len(epochs) != 2 || epochs[0].Dropped == 0 || epochs[1].Dropping != 0 {
		t.Errorf("%+v, %v", epochs, err)
	}
	if err := r.Hold(t.Context(), operator, 0, "late", "too late"); !errors.Is(err, manage.ErrInvalid) {
		t.Errorf("a dropped epoch is held: %v", err)
	}
	if err := r.Hold(t.Context(), operator, 9, "case", "none"); !errors.Is(err, manage.ErrNotFound) {
		t.Errorf("there is no epoch 9: %v", err)
	}
	_, err = r.Proof(t.Context(), r.shop, 4)
	r.refuses(t, wire.CodeDenied, err)
	var types []audit.Type
	if err := r.Events(0, func(_ uint64, e audit.Event) bool {
		types = append(types, e.Type)
		return true
	}); err != nil {
		t.Fatal(err)
	}
	const want = "[EpochBegun SignatureAdmitted SignatureCreated LegalHoldSet LegalHoldReleased RetentionApplied]"
	if fmt.Sprint(types) != want {
		t.Errorf("%v, want %s", types, want)
	}
}

// TestEpochPeriods: a period is over when the calendar in UTC has moved on.
func TestEpochPeriods(t *testing.T) {
	at := func(text string) time.Time {
		v, err := time.Parse(time.RFC3339, text)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	for _, c := range []struct {
		period     Period
		begun, now string
		over       bool
	}{
		{Month, "2026-11-01T00:00:00Z", "2026-11-30T23:59:59Z", false},
		{Month, "2026-11-30T23:59:59Z", "2026-12-01T00:00:00Z", true},
		{Month, "2026-11-10T00:00:00Z", "2027-11-10T00:00:00Z", true},
		{Month, "2026-12-01T01:00:00+02:00", "2026-11-30T23:30:00Z", false},
		{Month, "2026-12-01T00:00:00Z", "2026-11-30T00:00:00Z", false}, // the time is before the epoch
		{Day, "2026-11-01T00:00:00Z", "2026-11-01T23:59:59Z", false},
		{Day, "2026-11-01T23:00:00Z", "2026-11-02T00:00:00Z", true},
		{Hour, "2026-11-01T23:00:00Z", "2026-11-01T23:59:59Z", false},
		{Hour, "2026-11-01T23:00:00Z", "2026-11-02T23:00:00Z", true},
	} {
		if got := (Retention{Epoch: c.period}).over(at(c.begun), at(c.now)); got != c.over {
			t.Errorf("%+v: %v", c, got)
		}
	}
}

// TestKeepLog: keepLog signs a checkpoint and writes the count of refused strangers. The failure
// and the recovery of a resource have one event each.
func TestKeepLog(t *testing.T) {
	r, _ := logRig(t)
	for range 100 {
		r.refusals.count(audit.HandshakeRefused, "handshake", "", "denied")
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { r.keepLog(ctx); close(done) }()
	wait := func(what string, holds func() bool) {
		t.Helper()
		for end := time.Now().Add(20 * time.Second); !holds(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("after 20 s still not: %s", what)
			}
		}
	}
	wait("a checkpoint", func() bool { e, err := r.ledger.Epoch(0); return err == nil && e.Signed > 0 })
	count := func() (n, events int) {
		r.Events(0, func(_ uint64, e audit.Event) bool {
			if e.Type == audit.HandshakeRefused {
				more, _ := strconv.Atoi(e.Metadata["count"])
				n, events = n+more, events+1
			}
			return true
		})
		return n, events
	}
	wait("the count", func() bool { n, _ := count(); return n == 100 })
	for range 50 {
		r.refusals.count(audit.HandshakeRefused, "handshake", "", "denied")
	}
	cancel()
	<-done
	r.refusals.flush(t.Context(), r.Appliance)
	if n, events := count(); n != 150 || events != 2 {
		t.Errorf("%d refusals in %d events", n, events)
	}
	r.monitor.Start(t.Context(), r.record, nil)
	for _, err := range []error{nil, ledger.ErrClock, ledger.ErrClock, nil, nil} {
		r.monitor.Check(t.Context(), clockResource, err)
	}
	var said []audit.Type
	r.Events(0, func(_ uint64, e audit.Event) bool {
		if e.Resource == "clock" {
			said = append(said, e.Type)
		}
		return true
	})
	if fmt.Sprint(said) != "[ClockRefused ClockRecovered]" {
		t.Error(said)
	}
}

// TestPolicyChange: each change of the policy in force is one event. The same text again is no
// change.
func TestPolicyChange(t *testing.T) {
	r, _ := logRig(t)
	for i, text := range []string{allowShop, allowShop, "", allowShop} {
		p := parsed(t, text)
		version, changed, err := r.Activate(t.Context(), audit.Operator("test"), p)
		if want := []uint64{1, 1, 2, 3}[i]; err != nil || version != want || changed != (i != 1) {
			t.Fatalf("version %d, changed %v, %v; want version %d", version, changed, err, want)
		}
	}
	all, err := r.Policies()
	if err != nil || len(all) != 3 || all[0].Hash != all[2].Hash || all[0].Text != "" {
		t.Errorf("%+v, %v", all, err)
	}
	for version, want := range map[uint64]string{1: allowShop, 2: "", 3: allowShop} {
		if v, err := r.Policy(version); err != nil || v.Text != want || v.Version != version {
			t.Errorf("%+v, %v", v, err)
		}
	}
	if _, err := r.Policy(4); !errors.Is(err, manage.ErrNotFound) {
		t.Errorf("a version that is not there: %v", err)
	}
	var hashes []string
	if err := r.Events(0, func(_ uint64, e audit.Event) bool {
		if e.Type == audit.PolicyChanged {
			hashes = append(hashes, e.Metadata["previous"], e.Metadata["sha256"])
		}
		return true
	}); err != nil {
		t.Fatal(err)
	}
	if len(hashes) != 6 || hashes[0] != "" || hashes[1] == hashes[3] || hashes[1] != hashes[2] ||
		hashes[3] != hashes[4] || hashes[5] != hashes[1] {
		t.Errorf("%q", hashes)
	}
}
