package ledger_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"countersign/internal/ledger"
	"countersign/internal/ledger/ledgertest"

	bolt "go.etcd.io/bbolt"
)

// of returns an admission for a use and a peer; peer 0 is the appliance itself.
func (m *machine) of(use ledger.Use, peer byte, nonce int, lifetime time.Duration) ledger.Admission {
	a := ledger.Admission{
		Scope: ledger.KeyScope("k"), Nonce: [32]byte{byte(nonce), byte(nonce >> 8)}, Peer: peerName(peer),
		ExpiresAt: m.options.Wall().Add(lifetime).Unix(),
	}
	if use == ledger.Verifying {
		a.Scope, a.Once = ledger.SignerScope([]byte("signer")), true
	}
	return a
}

// TestSharesAreBounded fills each share up to its bound. The next nonce of the share is refused,
// writes nothing, and leaves all other shares as they are, also after a restart. An expired hour
// frees its nonces at once.
func TestSharesAreBounded(t *testing.T) {
	m := newMachine(t, ledger.Options{
		MaxNonces: 20, Bounds: ledger.Bounds{Peer: 5, Verifying: 8, Own: 3},
	})
	l := m.open(t)
	n := 0
	fill := func(use ledger.Use, peer byte, most int, full error) {
		t.Helper()
		for range most {
			n++
			mustAdmit(t, l, m.of(use, peer, n, time.Hour), ledger.Fresh)
		}
		for range 2 {
			before := l.Commits()
			refused(t, l, m.of(use, peer, n+1, time.Hour), full)
			if l.Commits() != before {
				t.Error("a refusal was written")
			}
			l.Close()
			l = m.open(t)
		}
	}
	fill(ledger.Verifying, 1, 5, ledger.ErrShare)
	fill(ledger.Verifying, 2, 3, ledger.ErrVerifying) // 8 of all peers
	fill(ledger.Signing, 1, 5, ledger.ErrShare)
	fill(ledger.Signing, 3, 4, ledger.ErrTooMany) // 17 of all peers: the rest is the appliance's own
	fill(ledger.Own, 0, 3, ledger.ErrTooMany)
	got := l.Nonces()
	got.Shares = nil
	want := ledger.Nonces{
		Alive: 20, Signing: 9, Verifying: 8, Own: 3, Max: 20, Bounds: ledger.Bounds{Peer: 5, Verifying: 8, Own: 3},
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	// Repetitions and replays need no room.
	mustAdmit(t, l, m.of(ledger.Signing, 1, 9, time.Hour), ledger.Repeated)
	mustAdmit(t, l, m.of(ledger.Signing, 3, 9, time.Hour), ledger.Replay)
	mustAdmit(t, l, m.of(ledger.Verifying, 1, 1, time.Hour), ledger.Replay)
	m.pass(27 * time.Hour)
	if got := l.Nonces(); got.Alive != 0 || len(got.Shares) != 0 { // before any request of the writer
		t.Errorf("%+v after the expiry", got)
	}
	fill(ledger.Verifying, 1, 5, ledger.ErrShare)
}

// TestShareIsExactInOneTransaction: of 20 admissions in one transaction, as many are admitted as
// the share has room for.
func TestShareIsExactInOneTransaction(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.db")
	o := ledger.Options{MaxNonces: 100, Bounds: ledger.Bounds{Peer: 7}}
	if err := ledger.Create(path, o); err != nil {
		t.Fatal(err)
	}
	l, err := ledgertest.Open(t, path, o)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	release := l.Occupy()
	var fresh, full atomic.Int64
	var wg sync.WaitGroup
	for n := range byte(20) {
		wg.Go(func() {
			switch _, err := l.Admit(t.Context(), admission(ledger.KeyScope("k"), n, 1, 1), event); {
			case err == nil:
				fresh.Add(1)
			case errors.Is(err, ledger.ErrShare):
				full.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	for l.Waiting() < 20 {
		time.Sleep(time.Millisecond)
	}
	before := l.Commits()
	release()
	wg.Wait()
	if fresh.Load() != 7 || full.Load() != 13 || l.Commits() > before+2 {
		t.Errorf("%d fresh, %d refused, %d commits; want 7, 13, at most 2",
			fresh.Load(), full.Load(), l.Commits()-before)
	}
}

// TestSharesFollowAModel compares the shares with a plain model over random admissions, expiries
// and restarts: each verdict, and each number.
func TestSharesFollowAModel(t *testing.T) {
	seed := rand.Uint64()
	defer func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	}()
	r := rand.New(rand.NewPCG(seed, 2))
	for range 4 {
		most := 1 + r.IntN(40)
		b := ledger.DefaultBounds(most)
		if r.IntN(2) == 0 {
			b = ledger.Bounds{Peer: 1 + r.IntN(most), Verifying: 1 + r.IntN(most), Own: 1 + r.IntN(most)}
		}
		followModel(t, r, most, b)
	}
}

// modelShare is a share of the model: the peers have the numbers 1 to 4.
type modelShare struct {
	use  ledger.Use
	peer byte
}

func followModel(t *testing.T, r *rand.Rand, most int, b ledger.Bounds) {
	t.Helper()
	const margin = 24 * time.Hour
	m := newMachine(t, ledger.Options{MaxNonces: most, Bounds: b})
	l := m.open(t)
	type alive struct {
		modelShare
		hour int64
	}
	var all, model []alive // admitted, and alive of them
	count := func(in func(modelShare) bool) (n int) {
		for _, a := range model {
			if in(a.modelShare) {
				n++
			}
		}
		return n
	}
	for n := range 400 {
		switch r.IntN(8) {
		case 0:
			l.Close()
			l = m.open(t)
		case 1:
			m.pass(time.Duration(r.Int64N(int64(5 * time.Hour))))
		}
		// A restart sets the ledger's time back to the last transaction: nonces are alive again.
		now := l.Time()
		model = model[:0]
		for _, a := range all {
			if now.Before(time.Unix((a.hour+1)*3600, 0).Add(margin)) {
				model = append(model, a)
			}
		}
		s := modelShare{ledger.Use(1 + r.IntN(3)), byte(1 + r.IntN(4))}
		if s.use == ledger.Own {
			s.peer = 0
		}
		a := m.of(s.use, s.peer, n, time.Duration(r.Int64N(int64(30*time.Hour))))
		var want error
		switch peers := count(func(o modelShare) bool { return o.use != ledger.Own }); {
		case s.use != ledger.Own && count(func(o modelShare) bool { return o == s }) >= b.Peer:
			want = ledger.ErrShare
		case s.use == ledger.Verifying && count(func(o modelShare) bool { return o.use == s.use }) >= b.Verifying:
			want = ledger.ErrVerifying
		case s.use != ledger.Own && peers >= most-b.Own, len(model) >= most:
			want = ledger.ErrTooMany
		}
		if _, err := l.Admit(t.Context(), a, event); !errors.Is(err, want) {
			t.Fatalf("step %d, %+v of %d, %+v: %v, want %v", n, s, most, b, err, want)
		} else if err == nil {
			admitted := alive{s, a.ExpiresAt / 3600}
			all, model = append(all, admitted), append(model, admitted)
		}
		got := l.Nonces()
		uses := map[ledger.Use]int{ledger.Signing: got.Signing, ledger.Verifying: got.Verifying, ledger.Own: got.Own}
		for use, n := range uses {
			if want := count(func(o modelShare) bool { return o.use == use }); n != want {
				t.Fatalf("%d nonces for %v, want %d", n, use, want)
			}
		}
		if got.Alive != len(model) {
			t.Fatalf("%d nonces, want %d", got.Alive, len(model))
		}
		for _, share := range got.Shares {
			if want := count(func(o modelShare) bool {
				return o.use == share.Use && ledger.PeerIDOf(peerName(o.peer)) == share.Peer
			}); share.Alive != want || want == 0 {
				t.Fatalf("share %+v, want %d", share, want)
			}
		}
	}
}

// TestDamagedNonceIsTold: a change of any byte of a nonce's record, the share among them, is damage
// at the next opening.
func TestDamagedNonceIsTold(t *testing.T) {
	m := newMachine(t, ledger.Options{})
	l := m.open(t)
	mustAdmit(t, l, m.of(ledger.Verifying, 1, 1, time.Hour), ledger.Fresh)
	l.Close()
	flip := func(at int) (size int) {
		t.Helper()
		db, err := bolt.Open(m.path, 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		if err := db.Update(func(tx *bolt.Tx) error {
			nonces := tx.Bucket([]byte("nonces"))
			name, _ := nonces.Cursor().First()
			b := nonces.Bucket(name)
			k, v := b.Cursor().First()
			v = bytes.Clone(v)
			v[at] ^= 1
			size = len(v)
			return b.Put(bytes.Clone(k), v)
		}); err != nil {
			t.Fatal(err)
		}
		return size
	}
	size := flip(0)
	flip(0)
	for at := range size {
		flip(at)
		if l, err := ledgertest.Open(t, m.path, m.options); !errors.Is(err, ledger.ErrCorrupt) {
			t.Errorf("byte %d: %v", at, err)
			if err == nil {
				l.Close()
			}
		}
		flip(at)
	}
}
