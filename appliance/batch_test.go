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
	"countersign/wire"
)

func TestMain(m *testing.M) {
	disktest.Serve() // in the process of a test's disk
	os.Exit(m.Run())
}

// batched asks a batch and expects that many answers.
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

func signedOf(t *testing.T, a wire.ItemAnswer) (s wire.Signed) {
	t.Helper()
	if err := (wire.Answer{Result: a.Result, Error: a.Error}).Into(&s); err != nil {
		t.Fatal(err)
	}
	return s
}

// TestBatch: an answer for each item, in their order, whatever the others are.
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
		{request(13, "m"), "malformed"}, // with an id
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
	// Three admitted and signed, one verified, two replays, four that say what was refused. The
	// malformed write nothing.
	events := logOf(t, r.Appliance, 1)[before:]
	for of, want := range map[audit.Type]int{audit.SignatureAdmitted: 3, audit.SignatureCreated: 3, audit.SignatureVerified: 1, audit.ReplayRefused: 2, audit.SignatureRejected: 4} {
		if got := countOf(events, of); got != want {
			t.Errorf("%d of %s, want %d", got, of, want)
		}
	}
	if of, all := r.Peers.Serving(shop.Member); of != 0 || all != 0 {
		t.Errorf("%d and %d requests are said to be served still", all, of)
	}
}

// TestBatchSharesACommit: when the first key is used, all that the batch was admitted is on disk.
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

// TestSameTwiceInABatch: one admission, one signature, and one of the answers says that it is
// repeated.
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

// TestLongestAnswersFit: the answers to the largest batches fit into a message, or what was done
// for them would be lost.
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
		s.Payload = fmt.Appendf(nil, `{"payer":"%x","amount":"1","currency":"SAT","method":"m","endpoint":"e"}`, k.Info().PublicKey)
		asked = append(asked, s)
	}
	for _, a := range batched(t, r.Appliance, shop, asked...) {
		if s := signedOf(t, a); s.Receipt == nil || len(s.Key) != 64 {
			t.Fatalf("%+v", s)
		}
	}
	longest := 0
	// Errors repeat text of the peer's. What grows most when it is quoted, once and once more.
	for _, hostile := range []string{`\\`, `\"`, `\u0001`, `\n`, "\u2028", `\u007f`, "é", "<", `\u001b[`} {
		for name, item := range map[string]string{
			"key":     `{"op":"sign","key":"%s","type":"message-v1","payload":{"context":"c","message":""},"nonce":"` + strings.Repeat("A", 43) + `","timestamp":1,"expires_at":2}`,
			"type":    `{"op":"sign","key":"payments","type":"%s","payload":{},"nonce":"` + strings.Repeat("A", 43) + `","timestamp":1,"expires_at":2}`,
			"field":   `{"op":"sign","%s":1}`,
			"payload": `{"op":"sign","key":"payments","type":"message-v1","payload":{"%s":1},"nonce":"` + strings.Repeat("A", 43) + `","timestamp":1,"expires_at":2}`,
			"within":  `{"op":"sign","key":"payments","type":"message-v1","payload":{"context":"%s"},"nonce":"` + strings.Repeat("A", 43) + `","timestamp":1,"expires_at":2}`,
			"nonce":   `{"op":"sign","key":"payments","type":"message-v1","payload":{},"nonce":"%s","timestamp":1,"expires_at":2}`,
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

// permits puts rules in force.
func (r *rig) permits(t *testing.T, text string) {
	t.Helper()
	r.policies.file = parsed(t, text)
}

// TestBatchWithoutADisk: each item is unavailable, and none of its nonces is spent; when the disk
// is back, the same batch is served. With a ledger whose state is unknown the connection ends
// without an answer.
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
	if codeOf(a[0].Error) != "unavailable" || codeOf(a[1].Error) != "unavailable" || codeOf(a[2].Error) != "unsupported" {
		t.Errorf("on a disk that takes nothing: %+v", a)
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
	if b := r.handle(shop, []byte(batchOf(numbered(3, "m"), numbered(4, "m"), `{"op":"x"}`))); b != nil {
		t.Errorf("answered by a ledger whose state is unknown: %s", b)
	}
	disk.Fail(nil)
	if err := r.record(t.Context(), audit.Event{Type: audit.Stopped, Actor: audit.Daemon()}); !errors.Is(err, ledger.ErrUnknownState) {
		t.Errorf("%v", err)
	}
	if err := r.ledger.Close(); err != nil {
		t.Error(err)
	}
}
