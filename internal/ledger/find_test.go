package ledger_test

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/ledger/ledgertest"
	"countersign/internal/requestid"
)

// indexAll writes the index of each full segment.
func indexAll(t testing.TB, l *ledger.Ledger) {
	t.Helper()
	for more := true; more; {
		var err error
		if more, err = l.Index(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// logged is an event of the log under test, with its number.
type logged struct {
	index uint64
	audit.Event
}

// TestFind compares searches with a filter over all events: for each field, in both orders, with
// and without an index, across ends of epochs, and after retention has dropped the first epoch.
func TestFind(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.db")
	if err := ledger.Create(path, ledger.Options{}); err != nil {
		t.Fatal(err)
	}
	l, err := ledgertest.Open(t, path, ledger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	random := rand.New(rand.NewPCG(1, 2))
	types := []audit.Type{audit.SignatureAdmitted, audit.SignatureCreated, audit.KeyCreated}
	begin := time.UnixMilli(1_800_000_000_000)
	fill := func(n int) {
		t.Helper()
		done := make(chan error)
		for i := range n {
			e := audit.Event{
				Type: types[random.IntN(len(types))], Actor: audit.Operator(fmt.Sprintf("ann%d", random.IntN(50))),
				Action: "sign", Outcome: "ok", Resource: fmt.Sprintf("key%d/%d", random.IntN(40), random.IntN(3)),
				Metadata: map[string]string{
					"nonce": fmt.Sprintf("%064x", random.IntN(5000)), "digest": fmt.Sprintf("%064x", random.IntN(5000)),
					"admission": fmt.Sprint(random.IntN(5000)),
				},
			}
			e.Actor.Request = fmt.Sprintf("request%d", random.IntN(2000))
			if i%2 == 0 {
				e.Actor.Request = requestid.Item(e.Actor.Request, random.IntN(3))
			}
			event := ledger.NewEvent(e.Encode(begin.Add(time.Duration(i) * time.Second)))
			go func() { _, err := l.Append(context.Background(), event); done <- err }()
		}
		for range n {
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		}
	}
	all := func() (found []logged) {
		if err := l.Events(0, func(index uint64, b []byte) bool {
			e, err := audit.Decode(b)
			if err != nil {
				t.Fatal(err)
			}
			found = append(found, logged{index, e})
			return true
		}); err != nil {
			t.Fatal(err)
		}
		return found
	}
	compare := func(when string) {
		t.Helper()
		events := all()
		one := events[len(events)/3]
		last := events[len(events)-1].index
		for what, c := range map[string]struct {
			q     ledger.Query
			holds func(audit.Event) bool
		}{
			"all":      {ledger.Query{}, func(audit.Event) bool { return true }},
			"type":     {ledger.Query{Type: types[2]}, func(e audit.Event) bool { return e.Type == types[2] }},
			"actor":    {ledger.Query{Actor: "ann7"}, func(e audit.Event) bool { return e.Actor.Name == "ann7" }},
			"resource": {ledger.Query{Resource: "key3/1"}, func(e audit.Event) bool { return e.Resource == "key3/1" }},
			"key": {ledger.Query{Resource: "key3"}, func(e audit.Event) bool {
				return strings.HasPrefix(e.Resource, "key3/")
			}},
			"nonce": {ledger.Query{Nonce: one.Metadata["nonce"]}, func(e audit.Event) bool {
				return e.Metadata["nonce"] == one.Metadata["nonce"]
			}},
			"digest": {ledger.Query{Digest: one.Metadata["digest"]}, func(e audit.Event) bool {
				return e.Metadata["digest"] == one.Metadata["digest"]
			}},
			"request": {ledger.Query{Request: "request7"}, func(e audit.Event) bool {
				batch, _, _ := strings.Cut(e.Actor.Request, ".")
				return batch == "request7"
			}},
			"item": {ledger.Query{Request: "request7.1"}, func(e audit.Event) bool {
				return e.Actor.Request == "request7.1"
			}},
			"admission": {ledger.Query{Admission: "42"}, func(e audit.Event) bool {
				return e.Metadata["admission"] == "42"
			}},
			"times": {ledger.Query{Since: one.TimeMS, Until: one.TimeMS + 60_000}, func(e audit.Event) bool {
				return e.TimeMS >= one.TimeMS && e.TimeMS < one.TimeMS+60_000
			}},
			"two": {ledger.Query{Type: types[1], Actor: "ann7"}, func(e audit.Event) bool {
				return e.Type == types[1] && e.Actor.Name == "ann7"
			}},
			"none": {ledger.Query{Actor: "ann7", Nonce: strings.Repeat("f", 64)}, func(audit.Event) bool {
				return false
			}},
		} {
			for _, s := range []ledger.Span{
				{}, {Down: true}, {From: last / 2, Before: last}, {From: 9, Before: last / 2, Down: true},
			} {
				var want, got []uint64
				for _, e := range events {
					if c.holds(e.Event) && e.index >= s.From && (s.Before == 0 || e.index < s.Before) {
						want = append(want, e.index)
					}
				}
				if s.Down {
					slices.Reverse(want)
				}
				err := l.Find(c.q, s, func(index uint64, _ []byte) bool { got = append(got, index); return true })
				if err != nil || !slices.Equal(got, want) {
					t.Errorf("%s, %s, %+v: %d events, want %d; %v", when, what, s, len(got), len(want), err)
				}
			}
		}
		var first []uint64
		l.Find(ledger.Query{}, ledger.Span{}, func(index uint64, _ []byte) bool {
			first = append(first, index)
			return len(first) < 3
		})
		if len(first) != 3 {
			t.Errorf("%s: a search that was ended gave %v", when, first)
		}
	}
	fill(6000)
	compare("without an index")
	endEpoch(t, l)
	fill(7000)
	indexAll(t, l)
	compare("with an index")
	dropped := ledger.EventOf(audit.NewEpochDropped(0, 0, audit.EpochEnd{}))
	if err := l.Drop(t.Context(), 0, dropped); err != nil {
		t.Fatal(err)
	}
	compare("dropped")
	for more := true; more; {
		var err error
		if more, err = l.Sweep(t.Context(), 0, 0); err != nil {
			t.Fatal(err)
		}
	}
	compare("removed")
	fill(5000)
	indexAll(t, l)
	compare("with new events")
}

// BenchmarkFind searches five million events: for the nonce of one event, and for the newest 100
// events of a rare actor.
func BenchmarkFind(b *testing.B) {
	const events = 5_000_000
	path := filepath.Join(b.TempDir(), "ledger.db")
	if err := ledger.Create(path, ledger.Options{}); err != nil {
		b.Fatal(err)
	}
	l, err := ledger.Open(path, ledger.Options{}) // without a replica: five million events
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	eventOf := func(i int) ledger.Event {
		peer := fmt.Sprintf("peer%d", i%200)
		if i%50_000 == 0 {
			peer = "rare"
		}
		d := audit.Document{Transcript: "message-v1", Digest: nonceOf(-i), Nonce: nonceOf(i), ExpiresAt: 1_800_000_000}
		e := audit.NewAdmission(audit.Peer(peer, [32]byte{byte(i)}), "payments/1", d)
		return ledger.EventOf(e)
	}
	for i := 0; i < events; {
		if err := l.Update(b.Context(), func(tx *ledger.Tx) error {
			for end := i + 2000; i < end; i++ {
				if err := tx.Append(eventOf(i)); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			b.Fatal(err)
		}
	}
	began := time.Now()
	indexAll(b, l)
	fmt.Fprintf(os.Stdout, "ledger-index events=%d %.1f us an event\n",
		events, float64(time.Since(began).Microseconds())/events)
	for _, each := range []struct {
		name string
		q    ledger.Query
		most int
	}{
		{"nonce", ledger.Query{Nonce: hex.EncodeToString(bytesOfNonce(events / 3))}, 100},
		{"no-such-nonce", ledger.Query{Nonce: strings.Repeat("f", 64)}, 100},
		{"rare-actor", ledger.Query{Actor: "rare"}, 100},
		{"actor-and-type", ledger.Query{Actor: "rare", Type: audit.SignatureAdmitted}, 100},
		{"type-that-is-not-there", ledger.Query{Type: audit.KeyCreated}, 100},
		{"common-actor", ledger.Query{Actor: "peer7"}, 1000},
		{"until", ledger.Query{Until: 1}, 100},
	} {
		var took []float64
		found := 0
		for range 9 {
			found = 0
			began := time.Now()
			if err := l.Find(each.q, ledger.Span{Down: true}, func(uint64, []byte) bool {
				found++
				return found < each.most
			}); err != nil {
				b.Fatal(err)
			}
			took = append(took, float64(time.Since(began).Microseconds())/1000)
		}
		fmt.Fprintf(os.Stdout, "ledger-find events=%d query=%s found=%d %.1f ms, longest %.1f ms\n",
			events, each.name, found, median(took), slices.Max(took))
	}
}

func nonceOf(i int) (nonce [32]byte) {
	binary.BigEndian.PutUint64(nonce[:], uint64(i))
	return sha256.Sum256(nonce[:])
}

func bytesOfNonce(i int) []byte { n := nonceOf(i); return n[:] }
