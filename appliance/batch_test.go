package appliance

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"countersign/audit"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/ledger/disktest"
	"countersign/internal/scantest"
	"countersign/wire"
)

func TestMain(m *testing.M) {
	disktest.Serve() // in the process of a test's disk
	os.Exit(scantest.Run(m))
}

// batched sends a batch, and expects one answer for each item.
func batched(t *testing.T, a *Appliance, s *session, items ...any) []wire.ItemAnswer {
	t.Helper()
	answer := handled(t, a, s, batchOf(items...))
	if answer.Error != nil {
		t.Fatalf("%v", answer.Error)
	}
	var all wire.Answers
	if err := answer.Into(&all); err != nil {
		t.Fatal(err)
	}
	if answer.ID != "b" || len(all.Answers) != len(items) {
		t.Fatalf("id %q, %d answers to %d items", answer.ID, len(all.Answers), len(items))
	}
	return all.Answers
}

// signedOf returns the signature of an answer, and fails the test on a refusal.
func signedOf(t *testing.T, a wire.ItemAnswer) (s wire.Signed) {
	t.Helper()
	if err := (wire.Answer{Result: a.Result, Error: a.Error}).Into(&s); err != nil {
		t.Fatal(err)
	}
	return s
}

// TestBatch: each item has its own answer, in order, whatever the other items are.
func TestBatch(t *testing.T) {
	r := newRig(t)
	shop := r.handler(t, "shop")
	first := numbered(1, "first")
	signed := r.sign(t, r.shop, first)
	changed := func(n int, change func(*wire.Sign)) *wire.Sign { s := numbered(n, "m"); change(s); return s }
	verify := verifyOf(first, signed)
	badly := *verifyOf(first, signed)
	badly.Signature = bytes.Repeat([]byte{1}, 64)
	burnt := numbered(2, "burnt")
	burntVerify := verifyOf(burnt, r.sign(t, r.shop, burnt))
	if _, err := r.Verify(t.Context(), r.shop, burntVerify); err != nil {
		t.Fatal(err)
	}
	items := []struct {
		item any
		code string
	}{
		{numbered(10, "a"), ""},
		{verify, ""},
		{changed(11, func(s *wire.Sign) { s.Key = "nothing" }), "unknown_key"},
		{"7", "malformed"},
		{"[]", "malformed"},
		{"{}", "malformed"},
		{`{"op":"sign"}`, "malformed"},
		{`{"op":"ping"}`, "unsupported"},
		{`{"op":"batch","items":[]}`, "unsupported"},
		{request(13, "m"), "malformed"}, // has an id
		{numbered(14, "b"), ""},
		{changed(15, func(s *wire.Sign) { s.Type = "message-v9" }), "unsupported"},
		{changed(16, func(s *wire.Sign) { s.Payload = []byte(`{"context":"forbidden","message":""}`) }), "denied"},
		{changed(17, func(s *wire.Sign) { s.Payload = []byte(`{}`) }), "malformed"},
		{first, ""}, // repeated
		{numbered(1, "other content"), "replay"},
		{burntVerify, "replay"},
		{&badly, "invalid_signature"},
		{changed(18, func(s *wire.Sign) { s.Timestamp -= 7200; s.ExpiresAt -= 7200 }), "expired"},
		{numbered(19, "c"), ""},
	}
	var asked []any
	for _, i := range items {
		asked = append(asked, i.item)
	}
	before := len(logOf(t, r.Appliance, 1))
	for i, a := range batched(t, r.Appliance, shop, asked...) {
		if got := codeOf(a.Error); got != items[i].code {
			t.Errorf("item %d: %q, want %q", i, got, items[i].code)
		}
		if s, ok := items[i].item.(*wire.Sign); ok && a.Error == nil {
			if got := signedOf(t, a); got.Nonce != s.Nonce || got.Repeated != (s == first) {
				t.Errorf("item %d: %+v", i, got)
			}
		}
	}
	// Malformed items have no event.
	events := logOf(t, r.Appliance, 1)[before:]
	for of, want := range map[audit.Type]int{
		audit.SignatureAdmitted: 3, audit.SignatureCreated: 3, audit.SignatureVerified: 1,
		audit.ReplayRefused: 2, audit.SignatureRejected: 4,
	} {
		if got := countOf(events, of); got != want {
			t.Errorf("%d of %s, want %d", got, of, want)
		}
	}
	if of, all := r.Peers.Serving(shop.Member); of != 0 || all != 0 {
		t.Errorf("%d requests count as being served, %d of them the shop's", all, of)
	}
}

// TestBatchSharesACommit: at the first use of the key, all admissions of the batch are on disk.
func TestBatchSharesACommit(t *testing.T) {
	r := newRig(t)
	var asked []any
	for n := range 100 {
		asked = append(asked, numbered(n, "m"))
	}
	var once sync.Once
	r.store.BeforeSign = func(keystore.Ref, []byte) error {
		once.Do(func() {
			if got := countOf(logOf(t, r.Appliance, 1), audit.SignatureAdmitted); got != 100 {
				t.Errorf("%d admissions are on disk", got)
			}
		})
		return nil
	}
	for i, a := range batched(t, r.Appliance, r.handler(t, "shop"), asked...) {
		if s := signedOf(t, a); s.Nonce != numbered(i, "m").Nonce {
			t.Errorf("answer %d is another's", i)
		}
	}
}

// TestSameTwiceInABatch: three equal items have one admission and one signature. Two of the answers
// are marked as repeated.
func TestSameTwiceInABatch(t *testing.T) {
	r := newRig(t)
	before := len(logOf(t, r.Appliance, 1))
	for n := range 20 {
		same := numbered(n, "m")
		a := batched(t, r.Appliance, r.handler(t, "shop"), same, same, same)
		one, repeated := signedOf(t, a[0]), 0
		for i := range a {
			s := signedOf(t, a[i])
			if s.Repeated {
				repeated++
			}
			if s.Event != one.Event || !bytes.Equal(s.Signature, one.Signature) {
				t.Errorf("%+v and %+v", s, one)
			}
		}
		if repeated != 2 {
			t.Errorf("%d of 3 are repeated", repeated)
		}
	}
	events := logOf(t, r.Appliance, 1)[before:]
	if a, c := countOf(events, audit.SignatureAdmitted), countOf(events, audit.SignatureCreated); a != 20 || c != 20 {
		t.Errorf("%d admissions, %d signatures", a, c)
	}
}

// TestBatchLimits: a batch beyond a limit, or without the form of a batch, is refused as a whole
// and has no event.
func TestBatchLimits(t *testing.T) {
	r := newRig(t)
	shop := r.handler(t, "shop")
	many := func(n int) (all []any) {
		for i := range n {
			all = append(all, numbered(i, "m"))
		}
		return all
	}
	before := len(logOf(t, r.Appliance, 1))
	for name, c := range map[string]struct{ document, code string }{
		"no items":        {batchOf(), "too_large"},
		"101 items":       {batchOf(many(101)...), "too_large"},
		"no list":         {`{"id":"b","op":"batch","items":{}}`, "malformed"},
		"null":            {`{"id":"b","op":"batch","items":null}`, "malformed"},
		"nothing":         {`{"id":"b","op":"batch"}`, "malformed"},
		"something more":  {`{"id":"b","op":"batch","items":["x"],"more":1}`, "malformed"},
		"too many bytes":  {batchOf(strings.Repeat(" ", wire.MaxDocument) + "1"), "malformed"},
		"the same twice":  {`{"id":"b","op":"batch","items":[{"op":"sign","op":"sign"}]}`, "malformed"},
		"items of no use": {`{"id":"b","op":"batch","items":["x"]}`, ""},
	} {
		if a := handled(t, r.Appliance, shop, c.document); codeOf(a.Error) != c.code {
			t.Errorf("%s: %v, want %q", name, a.Error, c.code)
		}
	}
	if after := len(logOf(t, r.Appliance, 1)); after != before {
		t.Errorf("%d events", after-before)
	}
	r = newRigWith(t, func(l *Limits) { l.RequestsPerPeer = 99 })
	if a := handled(t, r.Appliance, r.handler(t, "shop"), batchOf(many(100)...)); codeOf(a.Error) != "busy" {
		t.Errorf("more items than a peer's requests: %v", a.Error)
	}
	r = newRigWith(t, func(l *Limits) { l.RequestsPerPeer = 100 })
	batched(t, r.Appliance, r.handler(t, "shop"), many(100)...)
}

// TestLongestAnswersFit: the answers to the largest batches fit into a message. Otherwise
// signatures that were made would be lost.
func TestLongestAnswersFit(t *testing.T) {
	r := newRigWith(t, func(l *Limits) { l.RefusalsPerMinute = 1_000_000 })
	long := strings.Repeat("k", 64)
	k, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: long})
	if err != nil {
		t.Fatal(err)
	}
	r.permits(t, `permit (principal, action == Action::"sign", resource);`)
	shop := r.handler(t, "shop")
	var asked []any
	for n := range 100 {
		s := numbered(n, "")
		s.Key, s.Type = long, "payment-request-v1"
		s.Payload = fmt.Appendf(nil, `{"payer":"%x","amount":"1","currency":"SAT","method":"m","endpoint":"e"}`,
			k.Info().PublicKey)
		asked = append(asked, s)
	}
	for _, a := range batched(t, r.Appliance, shop, asked...) {
		if s := signedOf(t, a); s.Receipt == nil || len(s.Key) != 64 {
			t.Fatalf("%+v", s)
		}
	}
	longest := 0
	nonce := strings.Repeat("A", 43)
	document := func(key, kind, payload, nonce string) string {
		return `{"op":"sign","key":"` + key + `","type":"` + kind + `","payload":` + payload +
			`,"nonce":"` + nonce + `","timestamp":1,"expires_at":2}`
	}
	const messageV1 = "message-v1"
	// Errors repeat text of the peer. These texts grow most when quoted, once and twice.
	for _, hostile := range []string{`\\`, `\"`, `\u0001`, `\n`, "\u2028", `\u007f`, "é", "<", `\u001b[`} {
		for name, item := range map[string]string{
			"key":     document("%s", messageV1, `{"context":"c","message":""}`, nonce),
			"type":    document("payments", "%s", `{}`, nonce),
			"field":   `{"op":"sign","%s":1}`,
			"payload": document("payments", messageV1, `{"%s":1}`, nonce),
			"within":  document("payments", messageV1, `{"context":"%s"}`, nonce),
			"nonce":   document("payments", messageV1, `{}`, "%s"),
			"op":      `{"op":"%s"}`,
		} {
			room := wire.MaxDocument/100 - len(fmt.Sprintf(item, "")) - 2
			text := strings.Repeat(hostile, max(1, room/len(hostile)))
			item = fmt.Sprintf(item, text)
			all := slices.Repeat([]any{item}, 100)
			if document := batchOf(all...); len(document) > wire.MaxDocument {
				all = all[:99]
			}
			answers := batched(t, r.Appliance, shop, all...)
			for i, a := range answers {
				if a.Error == nil {
					t.Errorf("%s %q, item %d is answered", name, hostile, i)
				}
			}
			longest = max(longest, len(encoded(wire.Answers{Answers: answers})))
		}
	}
	t.Logf("the longest has %d bytes", longest)
}

// permits changes the policy file. The file is in force, because the rig has not been started.
func (r *rig) permits(t *testing.T, text string) {
	t.Helper()
	r.policies.file = parsed(t, text)
}

// TestBatchWithoutADisk: on a disk that refuses writes, each valid item is unavailable, and no
// nonce is spent. When the disk takes writes again, the same batch is served. If the ledger's state
// is unknown, the connection ends without an answer.
func TestBatchWithoutADisk(t *testing.T) {
	disk := disktest.New(t)
	r := newRigAt(t, filepath.Join(disk.Dir(), "ledger.db"))
	shop := r.handler(t, "shop")
	asked := []any{numbered(1, "m"), numbered(2, "m"), `{"op":"x"}`}
	disk.Fail(func(op disktest.Op) syscall.Errno {
		if op.Kind == disktest.Datasync || op.Kind == disktest.Sync {
			return 0
		}
		return syscall.EROFS
	})
	a := batched(t, r.Appliance, shop, asked...)
	for i, want := range []string{"unavailable", "unavailable", "unsupported"} {
		if got := codeOf(a[i].Error); got != want {
			t.Errorf("item %d on a disk that refuses writes: %q, want %q", i, got, want)
		}
	}
	disk.Fail(nil)
	if err := r.ledger.Alive(t.Context()); err != nil { // tries the disk again
		t.Fatal(err)
	}
	for _, a := range batched(t, r.Appliance, shop, asked[:2]...) {
		if s := signedOf(t, a); s.Repeated {
			t.Error("a refusal has spent the nonce")
		}
	}
	if err := r.ledger.Alive(t.Context()); err != nil { // the outcomes are on disk
		t.Fatal(err)
	}
	var syncs atomic.Int32
	disk.Fail(func(op disktest.Op) syscall.Errno {
		if op.Kind == disktest.Datasync && syncs.Add(1) == 2 {
			return syscall.EIO
		}
		return 0
	})
	if b := r.answer(shop, []byte(batchOf(numbered(3, "m"), numbered(4, "m"), `{"op":"x"}`))); b != nil {
		t.Errorf("answered by a ledger whose state is unknown: %s", b.encode())
	}
	disk.Fail(nil)
	err := r.record(t.Context(), audit.NewStopped())
	if !errors.Is(err, ledger.ErrUnknownState) {
		t.Errorf("%v", err)
	}
	if err := r.ledger.Close(); err != nil {
		t.Error(err)
	}
}
