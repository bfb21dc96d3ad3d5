package appliance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"countersign/audit"
	"countersign/internal/anchor"
	"countersign/internal/gate"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/transcript"
	"countersign/wire"
)

// acts are the acts that take a right away, each with the act that gives the right back (nil: none)
// and with the code of requests in between.
var acts = map[string]struct {
	do, undo func(context.Context, *rig) error
	code     string
}{
	"lock": {
		func(ctx context.Context, r *rig) error { return r.Lock(ctx, operator, "incident") },
		func(ctx context.Context, r *rig) error { return r.Unlock(ctx, operator) },
		wire.CodeUnavailable,
	},
	"suspend": {
		func(ctx context.Context, r *rig) error { return r.Peers.Suspend(ctx, operator, "shop") },
		func(ctx context.Context, r *rig) error { return r.Peers.Resume(ctx, operator, "shop") },
		wire.CodeUnavailable,
	},
	"remove": {
		func(ctx context.Context, r *rig) error { return r.Peers.Remove(ctx, operator, "shop") },
		func(ctx context.Context, r *rig) error {
			_, err := r.Peers.Add(ctx, operator, "shop", r.shop.PublicKey[:])
			return err
		},
		wire.CodeUnavailable,
	},
	"remove the key": {
		func(ctx context.Context, r *rig) error {
			err := r.Peers.AddKey(ctx, operator, "shop", secondKey)
			if err != nil && !errors.Is(err, manage.ErrExists) {
				return err
			}
			return r.Peers.RemoveKey(ctx, operator, "shop", r.shop.PublicKey)
		},
		func(ctx context.Context, r *rig) error {
			return r.Peers.AddKey(ctx, operator, "shop", r.shop.PublicKey[:])
		},
		wire.CodeUnavailable,
	},
	"compromise": {
		func(ctx context.Context, r *rig) error {
			return r.Keys.Compromise(ctx, approved, "payments", 1, "stolen")
		}, nil, wire.CodeKeyNotActive,
	},
	"rollback": {
		func(_ context.Context, r *rig) error {
			r.gate.Block(gate.Rollback, anchor.ErrRolledBack)
			r.gate.Enforce()
			return nil
		},
		func(_ context.Context, r *rig) error { r.gate.Unblock(gate.Rollback); return nil },
		wire.CodeUnavailable,
	},
}

// secondKey is another key of the shop.
var secondKey = bytes.Repeat([]byte{17}, 32)

// forEachAct runs a test on a rig for each act. Two calls at once use the device.
func forEachAct(t *testing.T, test func(t *testing.T, r *rig, do, undo func(), code string)) {
	t.Helper()
	for name, act := range acts {
		t.Run(name, func(t *testing.T) {
			r := newRigWith(t, func(l *Limits) { l.Calls, l.RequestTimeout = map[string]int{"memory": 2}, time.Hour })
			if _, err := r.Keys.CreateOwn(t.Context(), operator, keyring.LogName, "memory"); err != nil {
				t.Fatal(err)
			}
			run := func(what func(context.Context, *rig) error) func() {
				if what == nil {
					return nil
				}
				return func() {
					t.Helper()
					if err := what(t.Context(), r); err != nil {
						t.Error(err)
					}
				}
			}
			test(t, r, run(act.do), run(act.undo), act.code)
		})
	}
}

// device holds signatures for peers until release. entered counts them.
func (r *rig) device(t *testing.T) (entered *atomic.Int64, release func()) {
	by := new(atomic.Pointer[hold])
	r.store.BeforeSign = func(ref keystore.Ref, m []byte) error {
		if strings.HasPrefix(string(m), "countersign-message") {
			by.Load().wait()
		}
		return nil
	}
	return held(t, by)
}

// TestTakenAwayAtTheDevice: an act takes effect while the device hangs with two requests and a
// third one waits for the device. The one that waits ends at once. The device's signatures, which
// come late, are withheld, also when the right has been given back meanwhile. The log says that all
// have failed. The same requests get their signatures later. The appliance's own signatures go on.
func TestTakenAwayAtTheDevice(t *testing.T) {
	forEachAct(t, func(t *testing.T, r *rig, do, undo func(), code string) {
		entered, release := r.device(t)
		done := make([]chan error, 3)
		for n := range done {
			done[n] = make(chan error, 1)
			go func() { _, err := r.Sign(t.Context(), r.shop, numbered(n, "m")); done[n] <- err }()
			eventually(t, "the request is admitted, and the first two are in the device", func() bool {
				_, err := r.ledger.Spent(t.Context(), ledger.KeyScope("payments"), numbered(n, "m").Nonce)
				return err == nil && entered.Load() == int64(min(n+1, 2))
			})
		}
		acted := make(chan struct{})
		go func() { defer close(acted); do() }()
		select {
		case err := <-done[2]:
			r.refuses(t, code, err)
		case <-time.After(patience):
			t.Fatal("the request still waits for the device")
		}
		if undo != nil { // the last part of a compromise is the successor, which waits for the device
			<-acted
			_, err := r.Sign(t.Context(), r.shop, numbered(9, "m"))
			r.refuses(t, code, err)
			undo()
		}
		release()
		<-acted
		for n := range 2 {
			r.refuses(t, code, <-done[n])
		}
		if got := entered.Load(); got != 2 {
			t.Errorf("the device was asked %d times, want 2", got)
		}
		log := logOf(t, r.Appliance, 1)
		if n := countOf(log, audit.SignatureFailed); n != 3 {
			t.Errorf("%d of 3 admissions have failed", n)
		}
		if undo == nil {
			for n := range done {
				_, err := r.Sign(t.Context(), r.shop, numbered(n, "m"))
				r.refuses(t, code, err)
			}
			return
		}
		if n := countOf(log, audit.SignatureCreated); n != 0 {
			t.Errorf("the log has %d signatures", n)
		}
		for n := range done {
			if s := r.sign(t, r.shop, numbered(n, "m")); !s.Repeated || s.Version != 1 {
				t.Errorf("the same request again: %+v", s)
			}
		}
		do()
		head, _, tree := r.ledger.Head()
		if e, err := r.checkpoint(t.Context(), head, tree.Size); err != nil || e.Signed < tree.Size {
			t.Errorf("the checkpoint after the act: %+v, %v", e, err)
		}
	})
}

// TestTakenAwayBeforeTheRelease: an act comes after the key's use and before the answer is written.
// Each signature and each confirmation is withheld: of a single request, of a repetition, of a
// batch. A request gets its signature when the right is back.
func TestTakenAwayBeforeTheRelease(t *testing.T) {
	forEachAct(t, func(t *testing.T, r *rig, do, undo func(), code string) {
		verifies := func(n int) *wire.Verify {
			req := numbered(n, "m")
			v := verifyOf(req, r.sign(t, r.shop, req))
			v.ID = fmt.Sprint(n)
			return v
		}
		r.sign(t, r.shop, numbered(1, "m"))
		shop := r.handler(t, "shop")
		asked := []string{
			request(0, "m"), request(1, "m"), encoded(verifies(2)),
			batchOf(numbered(3, "m"), numbered(1, "m"), verifies(4), `{"op":"x"}`), ping,
		}
		var replies []*reply
		for _, document := range asked {
			reply := r.answer(shop, []byte(document))
			if reply == nil {
				t.Fatalf("%.60s: no reply", document)
			}
			replies = append(replies, reply)
		}
		do()
		for i, reply := range replies {
			var got []string
			read := func(b []byte) error { got = codesOf(t, b); return nil }
			if err := r.release(shop, reply, read); err != nil {
				t.Fatal(err)
			}
			verified := code
			if code == wire.CodeKeyNotActive {
				verified = wire.CodeWrongSigner
			}
			want := [][]string{{code}, {code}, {verified}, {code, code, verified, wire.CodeUnsupported}, {""}}[i]
			if fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("%.60s: %v, want %v", asked[i], got, want)
			}
		}
		if undo == nil {
			return
		}
		undo()
		for _, n := range []int{0, 1, 3} {
			if s := r.sign(t, r.shop, numbered(n, "m")); !s.Repeated {
				t.Errorf("the same request again: %+v", s)
			}
		}
	})
}

// codesOf returns the code of an answer, or the codes of the items of a batch. The code of a result
// is "".
func codesOf(t *testing.T, b []byte) (codes []string) {
	t.Helper()
	a, err := wire.DecodeAnswer(b)
	if err != nil {
		t.Fatal(err)
	}
	var all wire.Answers
	if a.ID != "b" || a.Into(&all) != nil {
		return []string{codeOf(a.Error)}
	}
	for _, item := range all.Answers {
		codes = append(codes, codeOf(item.Error))
	}
	return codes
}

// TestActsWaitForReleases: an act returns when the answers that it does not allow any more are
// written, and waits for no other answer.
func TestActsWaitForReleases(t *testing.T) {
	for name, act := range acts {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				defer r.ledger.Close()
				shop := r.handler(t, "shop")
				let, unread := make(chan struct{}), make(chan struct{})
				defer close(unread)
				for _, document := range []string{request(1, "m"), ping} {
					reply := r.answer(shop, []byte(document))
					go r.release(shop, reply, func([]byte) error {
						if document == ping {
							<-unread // by a peer that does not read
						} else {
							<-let
						}
						return nil
					})
				}
				synctest.Wait()
				done := make(chan error, 1)
				go func() { done <- act.do(t.Context(), r) }()
				synctest.Wait()
				if len(done) > 0 {
					t.Error("the act returns while a signature is being written")
				}
				close(let)
				if err := <-done; err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestNothingIsReleasedAfterAnAct lets many callers sign, repeat and verify as fast as they can,
// and carries an act out in between. Each write of an answer takes a number at its end, and the act
// takes a number when it has returned: no signature that the act forbids has a later number.
func TestNothingIsReleasedAfterAnAct(t *testing.T) {
	const callers = 16
	for name, act := range acts {
		t.Run(name, func(t *testing.T) {
			r := newRigWith(t, func(l *Limits) { l.Calls = map[string]int{"memory": 4} })
			r.permits(t, `permit (principal, action == Action::"sign", resource);`)
			var sequence, served atomic.Uint64
			var mu sync.Mutex
			released := map[uint64]string{}
			stop := make(chan struct{})
			var working sync.WaitGroup
			for caller := range callers {
				shop := r.handler(t, "shop")
				working.Go(func() {
					for n := 0; ; n++ {
						select {
						case <-stop:
							return
						default:
						}
						one := 1000*n*callers + caller
						reply := r.answer(shop, []byte(request(one, "m")))
						if n%3 == 1 {
							reply = r.answer(shop, []byte(batchOf(numbered(one, "m"), numbered(one+500, "m"))))
						}
						if reply == nil {
							return // the peer is gone
						}
						r.release(shop, reply, func(b []byte) error {
							runtime.Gosched()
							number := sequence.Add(1)
							if bytes.Contains(b, []byte(`"signature"`)) && bytes.Contains(b, []byte(`"version":1`)) {
								mu.Lock()
								released[number] = string(b)
								mu.Unlock()
								served.Add(1)
							}
							return nil
						})
					}
				})
			}
			eventually(t, "many requests are served", func() bool { return served.Load() > 20*callers })
			if err := act.do(t.Context(), r); err != nil {
				t.Error(err)
			}
			returned := sequence.Add(1)
			for sequence.Load() < returned+2*callers { // some requests of after the act have an answer
				if name == "suspend" || name == "remove" || name == "remove the key" {
					break // the callers end
				}
				runtime.Gosched()
			}
			close(stop)
			working.Wait()
			for number, b := range released {
				if number > returned {
					t.Errorf("released as number %d, and the act had returned at %d: %.100s", number, returned, b)
				}
			}
		})
	}
}

// TestRandomActs compares the appliance with a model of a few lines, in random orders of requests,
// of ends of the device's calls, and of acts. A request that an act forbids while the request is
// with the device has failed for good, whatever comes later; a repetition is a new use.
func TestRandomActs(t *testing.T) {
	for seed := range uint64(20) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { randomActs(t, rand.New(rand.NewPCG(seed, 21))) })
		})
	}
}

// use is a request in the model of TestRandomActs.
type use struct {
	n, version int
	cut        bool          // an act has forbidden the use while it was with the device
	signed     bool          // an answer has had the signature
	let        chan struct{} // lets the device's call go; nil for a request that is not with the device
	answer     chan string
}

func randomActs(t *testing.T, random *rand.Rand) {
	r := newRigWith(t, func(l *Limits) { l.Calls, l.RequestTimeout = map[string]int{"memory": 1000}, time.Hour })
	defer r.ledger.Close()
	var mu sync.Mutex
	lets := map[string]chan struct{}{} // by the signed bytes of the document
	r.store.BeforeSign = func(_ keystore.Ref, m []byte) error {
		mu.Lock()
		let := lets[string(m)]
		mu.Unlock()
		if let != nil {
			<-let
		}
		return nil
	}
	locked, suspended, removed, keyless, version := false, false, false, false, 1
	compromised := map[int]bool{}
	var uses []*use
	allowed := func(u *use) bool { return !locked && !suspended && !removed && !keyless && !compromised[u.version] }
	ask := func(u *use) (code string) {
		entered, err := r.Peers.Enter(r.shop.PublicKey, io.NopCloser(nil), netip.Addr{})
		if err != nil {
			return "gone"
		}
		defer r.Peers.Leave(entered)
		s := &session{Session: entered, caller: r.shop}
		reply := r.answer(s, []byte(request(u.n, "m")))
		if reply == nil {
			return "gone"
		}
		r.release(s, reply, func(b []byte) error { code = codesOf(t, b)[0]; return nil })
		return code
	}
	// begin sends the request of a use, and holds the use in the device. done reports an answer
	// without the device.
	begin := func(u *use) (code string, done bool) {
		u.cut, u.let, u.answer = false, make(chan struct{}), make(chan string, 1)
		doc, err := transcript.Parse(documentOf(numbered(u.n, "m").Document))
		if err != nil {
			t.Fatal(err)
		}
		mu.Lock()
		lets[string(doc.Message)] = u.let
		mu.Unlock()
		go func() { u.answer <- ask(u) }()
		synctest.Wait()
		select {
		case code := <-u.answer:
			u.let = nil
			return code, true
		default:
			return "", false
		}
	}
	act := func(what string, do func() error) {
		t.Helper()
		if err := do(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		for _, u := range uses {
			u.cut = u.cut || u.let != nil && !allowed(u)
		}
	}
	for range 60 {
		switch random.IntN(10) {
		case 0, 1, 2: // a new request
			u := &use{n: len(uses), version: version}
			code, done := begin(u)
			if done == allowed(u) {
				t.Fatalf("request %d, allowed %v: done %v, %q", u.n, allowed(u), done, code)
			}
			if !done {
				uses = append(uses, u)
			}
		case 3, 4: // the device answers, or the request comes again
			if len(uses) == 0 {
				continue
			}
			u := uses[random.IntN(len(uses))]
			if u.let == nil {
				switch code, done := begin(u); {
				case !allowed(u) && (!done || code == ""), allowed(u) && u.signed && code != "":
					t.Fatalf("repetition of %d, allowed %v: %q, %v", u.n, allowed(u), code, done)
				case done:
					continue
				}
			}
			close(u.let)
			u.let = nil
			if code := <-u.answer; (code == "") == u.cut {
				t.Fatalf("request %d, cut off %v: %q", u.n, u.cut, code)
			}
			u.signed = u.signed || !u.cut
		case 5:
			if locked = !locked; locked {
				act("lock", func() error { return r.Lock(t.Context(), operator, "incident") })
			} else {
				act("unlock", func() error { return r.Unlock(t.Context(), operator) })
			}
		case 6:
			if removed {
				continue
			} else if suspended = !suspended; suspended {
				act("suspend", func() error { return r.Peers.Suspend(t.Context(), operator, "shop") })
			} else {
				act("resume", func() error { return r.Peers.Resume(t.Context(), operator, "shop") })
			}
		case 7:
			if removed = !removed; removed {
				act("remove", func() error { return r.Peers.Remove(t.Context(), operator, "shop") })
			} else {
				suspended, keyless = false, false
				act("add", func() error {
					_, err := r.Peers.Add(t.Context(), operator, "shop", r.shop.PublicKey[:])
					return err
				})
			}
		case 8:
			if removed {
				continue
			} else if keyless = !keyless; keyless {
				act("remove the key", func() error { return acts["remove the key"].do(t.Context(), r) })
			} else {
				act("add the key", func() error { return acts["remove the key"].undo(t.Context(), r) })
			}
		case 9:
			if locked || random.IntN(3) > 0 {
				continue // the successor would follow at the unlocking, by Keep
			}
			compromised[version] = true
			act("compromise", func() error {
				return r.Keys.Compromise(t.Context(), approved, "payments", uint32(version), "stolen")
			})
			version++
		}
	}
	for _, u := range uses {
		if u.let != nil {
			close(u.let)
			if code := <-u.answer; (code == "") == u.cut {
				t.Errorf("request %d, cut off %v: %q", u.n, u.cut, code)
			}
		}
	}
}
