package admin

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"countersign/admin/api"
	"countersign/audit"
	"countersign/internal/ledger"
)

// allocated bounds what one answer may allocate, with the client in the same process: a page, its
// text in the client, and the largest record of the test (5 MiB), which is encoded in vain where it
// belongs to the next page. The race detector's allocations count too.
const allocated = 128 << 20

// pageOf requests a page of a listing, and checks the bound of its bytes. A page larger than
// maxPage has one document.
func (r *rig) pageOf(token, path string) (docs []json.RawMessage, next string) {
	r.t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	resp, _, text := call(r.t, r.unixHTTP(), http.MethodGet, "http://countersign"+path, "",
		map[string]string{"Authorization": "Bearer " + token})
	runtime.ReadMemStats(&after)
	if err := json.Unmarshal([]byte(text), &docs); err != nil || resp.StatusCode != http.StatusOK {
		r.t.Fatalf("%s: %d %.200s, %v", path, resp.StatusCode, text, err)
	}
	if len(docs) > maxEntries || len(text) > maxPage+1 && len(docs) != 1 {
		r.t.Errorf("%s: a page of %d bytes with %d documents", path, len(text), len(docs))
	}
	if n := after.TotalAlloc - before.TotalAlloc; n > allocated {
		r.t.Errorf("%s: an answer of %d bytes has allocated %d", path, len(text), n)
	}
	return docs, resp.Header.Get("Countersign-Next")
}

// decide makes a decision with a record for each length, and returns the numbers of the events. The
// records are text that encoding/json would escape.
func (r *rig) decide(lengths []int) []uint64 {
	r.t.Helper()
	events := make([]uint64, len(lengths))
	var working sync.WaitGroup
	places := make(chan struct{}, 64)
	for i, n := range lengths {
		places <- struct{}{}
		working.Go(func() {
			defer func() { <-places }()
			a := ledger.Admission{
				Scope: ledger.KeyScope("payments"), Nonce: [32]byte{byte(i), byte(i >> 8), byte(i >> 16)},
				ExpiresAt: time.Now().Add(time.Hour).Unix(),
				Decide: func([]ledger.Used) ([]byte, error) {
					return bytes.Repeat([]byte("<"), n), errors.New("denied")
				},
			}
			event := audit.NewRejection(audit.Peer("shop", [32]byte{1}), "sign", "payments", "denied")
			encode := func(ledger.Verdict) []byte { return event.Encode(time.Now()) }
			done, err := r.ledger.Admit(r.t.Context(), a, encode)
			if err != nil {
				r.t.Error(err)
			}
			events[i] = done.Event
		})
	}
	working.Wait()
	return events
}

// TestListingsAreBounded reads 100,000 events and large decisions by pages. Each page has a bound
// of bytes and of memory, and no document is lost or comes twice, also where one document alone is
// larger than a page.
func TestListingsAreBounded(t *testing.T) {
	r := newRig(t)
	token := r.token(r.root(), "root")
	lengths := []int{3 << 20, 1, maxPage - 100, maxPage, 0, maxPage + 1, 5, 5 << 20}
	for range 250 {
		lengths = append(lengths, 1+rand.IntN(256<<10))
	}
	want := map[uint64]int{}
	for i, event := range r.decide(lengths) {
		want[event] = lengths[i]
	}
	seen, pages, from := 0, 0, uint64(0)
	for after := ""; ; pages++ {
		docs, next := r.pageOf(token, "/v1/decisions?after="+after)
		for _, doc := range docs {
			var d api.Decision
			if err := json.Unmarshal(doc, &d); err != nil {
				t.Fatal(err)
			}
			n, is := want[d.Event]
			if !is || d.Event < from || len(d.Record) != n || strings.Trim(d.Record, "<") != "" {
				t.Fatalf("from %d: event %d with %d bytes, want %d", from, d.Event, len(d.Record), n)
			}
			from, seen = d.Event+1, seen+1
		}
		if after = next; after == "" {
			break
		}
	}
	if seen != len(lengths) || pages < 20 {
		t.Errorf("%d decisions of %d, in %d pages", seen, len(lengths), pages)
	}

	const events = 100_000
	note := ledger.EventOf(audit.NewLocked(audit.Operator("root"), strings.Repeat("<&>", 60)))
	for n := 0; n < events; n += 2000 {
		if err := r.ledger.Update(t.Context(), func(tx *ledger.Tx) error {
			for range 2000 {
				if err := tx.Append(note); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	_, first, tree := r.ledger.Head()
	next := first
	for {
		docs, _ := r.pageOf(token, fmt.Sprintf("/v1/events?from=%d", next))
		if len(docs) == 0 {
			break
		}
		for _, doc := range docs {
			var e api.Event
			if err := json.Unmarshal(doc, &e); err != nil || e.Index != next {
				t.Fatalf("event %d in place of %d: %v", e.Index, next, err)
			}
			next++
		}
	}
	if next < first+tree.Size || tree.Size < events {
		t.Errorf("the pages end before event %d of %d", next, first+tree.Size)
	}
}

// TestListingsInMemory reads thousands of peers by pages, and the same through the client.
func TestListingsInMemory(t *testing.T) {
	const peers = 2500
	r := newRig(t)
	c := r.root()
	if err := r.ledger.Update(t.Context(), func(tx *ledger.Tx) error {
		for i := range peers {
			record := fmt.Appendf(nil, `{"keys":[{"public_key":"%064x","added":1}],"added":1}`, i+1)
			if err := tx.Put(ledger.Peers, fmt.Sprintf("peer-%04d", i), record); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	all := must(c.Peers(t.Context()))(t)
	for i, p := range all {
		if p.Name != fmt.Sprintf("peer-%04d", i) {
			t.Fatalf("%d: %s", i, p.Name)
		}
	}
	docs, next := r.pageOf(r.token(r.unix(), "root"), "/v1/peers")
	if len(all) != peers || len(docs) != maxEntries || next != "peer-0999" {
		t.Errorf("%d peers, the first page has %d and the next begins behind %q", len(all), len(docs), next)
	}
	for name, read := range map[string]func() error{
		"keys":      func() error { _, err := c.Keys(t.Context()); return err },
		"operators": func() error { _, err := c.Operators(t.Context()); return err },
		"policies":  func() error { _, err := c.Policies(t.Context()); return err },
		"proposals": func() error { _, err := c.Proposals(t.Context()); return err },
		"retention": func() error { _, err := c.Retention(t.Context()); return err },
		"sessions":  func() error { _, err := c.Sessions(t.Context()); return err },
	} {
		wants(t, name, "", read())
	}
}

// TestPageBoundary changes a listing between two pages, and sees that each entry that stays is read
// once, whatever the sizes of the entries are.
func TestPageBoundary(t *testing.T) {
	for round := range 10 {
		random := rand.New(rand.NewPCG(1, uint64(round)))
		all, sizes := []string{}, map[string]int{}
		for i := range random.IntN(40) {
			name := fmt.Sprintf("n%03d", 2*i)
			sizes[name] = random.IntN(maxPage + maxPage/4)
			all = append(all, name)
		}
		stay := slices.DeleteFunc(slices.Clone(all), func(string) bool { return random.IntN(4) == 0 })
		var got []string
		for in, now := new(pageInput), all; ; now = append(slices.Clone(stay), "m999", "n999") {
			out := paged(in, now, func(name string) string { return name }, func(name string) string {
				return name + strings.Repeat("x", sizes[name])
			})
			var b bytes.Buffer
			if err := out.Body.writeTo(&b); err != nil {
				t.Fatal(err)
			}
			var docs []string
			if err := json.NewDecoder(io.LimitReader(&b, 1<<24)).Decode(&docs); err != nil {
				t.Fatal(err)
			}
			for _, doc := range docs {
				got = append(got, doc[:4])
			}
			if in.After = out.Next; in.After == "" {
				break
			}
		}
		seen := map[string]int{}
		for _, name := range got {
			seen[name]++
		}
		for _, name := range stay {
			if seen[name] != 1 {
				t.Fatalf("round %d: %s was read %d times", round, name, seen[name])
			}
		}
	}
}

// TestListingsGoOn reads receipts of one millisecond and events by pages of three, in both orders,
// and gets each of them once. Each listing has a cursor of one form, and refuses any other text.
func TestListingsGoOn(t *testing.T) {
	r := newRig(t)
	c := r.root()
	const n = 8
	for i := range n {
		a := ledger.Admission{
			Scope: ledger.KeyScope("payments"), Nonce: [32]byte{byte(i)}, ExpiresAt: time.Now().Add(time.Hour).Unix(),
		}
		e := audit.NewRejection(audit.Peer("shop", [32]byte{1}), "sign", "payments/1", "denied")
		done, err := r.ledger.Admit(t.Context(), a, func(ledger.Verdict) []byte { return e.Encode(time.Now()) })
		if err != nil {
			t.Fatal(err)
		}
		receipt := ledger.Receipt{ID: ledger.ReceiptID{byte(i)}, TimeMS: 1000, Event: done.Event}
		if err := r.ledger.Settle(t.Context(), done, []byte{1}, ledger.EventOf(e), &receipt); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.ledger.Alive(t.Context()); err != nil { // after the settlements
		t.Fatal(err)
	}
	seen := map[string]int{}
	for after := ""; ; {
		some, next, err := c.Receipts(t.Context(), 1000, 0, after, 3)
		if err != nil || len(some) > 3 || len(seen) > n {
			t.Fatal(len(some), err)
		}
		for _, each := range some {
			seen[each.ID]++
		}
		if after = next; after == "" {
			break
		}
	}
	if len(seen) != n {
		t.Errorf("%d receipts of %d: %v", len(seen), n, seen)
	}
	all := must(c.Events(t.Context(), 0, 1000))(t)
	for _, newest := range []bool{false, true} {
		var got []uint64
		q := api.EventQuery{Newest: newest, Actor: "shop", Resource: "payments", Limit: 3}
		for {
			some, next, err := c.FindEvents(t.Context(), q)
			if err != nil || len(some) > 3 {
				t.Fatal(len(some), err)
			}
			for _, e := range some {
				got = append(got, e.Index)
			}
			if q.After = next; next == "" {
				break
			}
		}
		if newest {
			slices.Reverse(got)
		}
		var want []uint64
		for _, e := range all {
			if e.Actor.Name == "shop" {
				want = append(want, e.Index)
			}
		}
		if !slices.Equal(got, want) || len(got) != 2*n {
			t.Errorf("newest first %v: %v, want %v", newest, got, want)
		}
	}
	for _, after := range []string{"x", "-1", "01", "1-x", "18446744073709551615"} {
		_, _, events := c.FindEvents(t.Context(), api.EventQuery{After: after})
		_, _, decisions := c.Decisions(t.Context(), 0, after)
		_, _, receipts := c.Receipts(t.Context(), 0, 0, after, 3)
		for what, err := range map[string]error{"events": events, "decisions": decisions, "receipts": receipts} {
			wants(t, what+" after "+after, "invalid", err)
		}
	}
	_, _, err := c.FindEvents(t.Context(), api.EventQuery{Actor: "nobody"})
	wants(t, "an unknown actor", "not_found", err)
	_, _, err = c.FindEvents(t.Context(), api.EventQuery{Type: "KeyCreatd"})
	wants(t, "an unknown type", "invalid", err)
}
