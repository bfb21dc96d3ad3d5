package client_test

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"countersign/client"
	"countersign/client/clienttest"
	"countersign/noise"
	"countersign/wire"
)

func serve(t *testing.T) *clienttest.Server {
	t.Helper()
	s, err := clienttest.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// within is a context with a timeout of 20 s.
func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// told collects the calls of OnRotation.
type told chan client.Rotation

func (c told) next(t *testing.T) client.Rotation {
	t.Helper()
	select {
	case r := <-c:
		return r
	case <-time.After(20 * time.Second):
		t.Fatal("the application is told nothing")
		return client.Rotation{}
	}
}

// peer is a client of s with an OnRotation. A pinned version of 0 pins none.
func peer(t *testing.T, s *clienttest.Server, pinned uint32, change func(*client.Config)) (*client.Client, told) {
	t.Helper()
	heard := make(told, 100)
	config := client.Config{
		Address: s.Address, ServerKey: s.Statics[0].Public(), Identity: s.Peer,
		OnRotation: func(r client.Rotation) { heard <- r },
	}
	if pinned > 0 {
		config.Lines = []client.KeyLine{lineAt(s.Line, pinned)}
	}
	if change != nil {
		change(&config)
	}
	c := dial(t, config)
	if _, err := c.Ping(within(t)); err != nil { // from the answer on, the server sends events to c
		t.Fatal(err)
	}
	return c, heard
}

// acked waits for n acknowledgements.
func acked(t *testing.T, s *clienttest.Server, n int) []wire.Ack {
	t.Helper()
	seen := s.Await(within(t), func(seen clienttest.Seen) bool { return len(seen.Acks) >= n })
	if len(seen.Acks) != n {
		t.Fatalf("acknowledged: %+v, want %d", seen.Acks, n)
	}
	return seen.Acks
}

// settled waits until the client has delivered all events sent before: settled sends an event of
// another key and waits for its delivery.
func settled(t *testing.T, s *clienttest.Server, heard told) {
	t.Helper()
	mark := clienttest.NewKeyLine("mark", 2).Rotation(2)
	markSent.Lock()
	mark.Version = markSent.n + 2
	mark.Succession = nil
	markSent.n++
	markSent.Unlock()
	s.Send(wire.EncodeRotation(mark))
	for {
		if r := heard.next(t); r.Key == "mark" {
			return
		} else {
			t.Errorf("the application is told %+v", r)
		}
	}
}

var markSent struct {
	sync.Mutex
	n uint32
}

// TestSignByPinnedLine checks that Sign returns a signature whose version is in the pinned line.
func TestSignByPinnedLine(t *testing.T) {
	ctx := within(t)
	s := serve(t)
	c, _ := peer(t, s, 2, nil)
	sign := func() (*client.Signed, error) { return c.Sign(ctx, "payments", message("AAAA")) }
	at := func(active, shown uint32) {
		s.Do(func(s *clienttest.Server) { s.Active, s.Shown = active, shown })
	}
	at(2, 2)
	if got, err := sign(); err != nil || got.Version != 2 {
		t.Errorf("the pinned version: %v", err)
	}
	at(2, 3) // announced, not active
	if got, err := sign(); err != nil || got.Version != 2 || s.Seen().Asked["line"] != 0 {
		t.Errorf("the pinned version, while the next one is there: %v", err)
	}
	at(5, 5)
	if got, err := sign(); err != nil || got.Version != 5 {
		t.Errorf("three versions on: %v", err)
	}
	if n := s.Seen().Asked["line"]; n != 2 {
		t.Errorf("the line was asked for %d times, two pages", n)
	}
	if l, ok := c.Pinned("payments"); !ok || l != lineAt(s.Line, 5) {
		t.Errorf("%+v", l)
	}
	for version, good := range map[uint32]bool{1: false, 2: true, 4: true, 5: true} {
		at(version, 5)
		got, err := sign()
		broken := errors.Is(err, client.ErrBrokenLine) && got == nil
		if good && err != nil || !good && !broken {
			t.Errorf("version %d: %v", version, err)
		}
	}
	if n := s.Seen().Asked["line"]; n != 2 {
		t.Errorf("the line was asked for %d times: what is known needs no asking", n)
	}
	// A batch applies the same rules.
	at(1, 5)
	if out, err := c.Batch(ctx, nil); err == nil {
		t.Errorf("%v", out)
	}
}

// TestSignOffTheLine checks that Sign withholds a signature whose version does not follow from the
// pinned one.
func TestSignOffTheLine(t *testing.T) {
	thief := clienttest.NewKeyLine("thief", 3)
	refusal := &wire.Error{Code: wire.CodeUnsupported, Message: "unknown op"}
	signedBy := func(version uint32) func(*clienttest.Server, string, any) []byte {
		return func(_ *clienttest.Server, id string, request any) []byte {
			if r, is := request.(*wire.Sign); is {
				return wire.EncodeAnswer(id, "", thief.Signed(version, r), nil)
			}
			return nil
		}
	}
	line := func(result any, refusal *wire.Error) func(*clienttest.Server, string, any) []byte {
		return func(_ *clienttest.Server, id string, request any) []byte {
			if _, is := request.(*wire.Line); is {
				return wire.EncodeAnswer(id, "", result, refusal)
			}
			return nil
		}
	}
	for name, c := range map[string]struct {
		answer func(s *clienttest.Server, id string, request any) []byte // to op line and sign
		broken bool
	}{
		"a thief's key and step": {func(s *clienttest.Server, id string, request any) []byte {
			if r, is := request.(*wire.Line); is {
				next := thief.Next(2)
				step := clienttest.Step(s.Line.Private[0], r.Key, 2, thief.Public(2), &next)
				return wire.EncodeAnswer(id, "", wire.Steps{Key: r.Key, Steps: []wire.Succession{step}}, nil)
			}
			return signedBy(2)(s, id, request)
		}, true},
		"another key than the line's":        {signedBy(2), true},
		"another key for the pinned version": {signedBy(1), true},
		"no steps":                           {line(wire.Steps{Key: "payments"}, nil), true},
		"more, and no steps":                 {line(wire.Steps{Key: "payments", More: true}, nil), true},
		"another key's steps":                {line(wire.Steps{Key: "other"}, nil), true},
		"no such operation":                  {line(nil, refusal), true},
		"unavailable, just now":              {line(nil, &wire.Error{Code: wire.CodeUnavailable}), false},
	} {
		s := serve(t)
		s.Do(func(s *clienttest.Server) {
			s.Active, s.Shown = 2, 2
			s.Answer = func(id string, request any) []byte { return c.answer(s, id, request) }
		})
		cl, _ := peer(t, s, 1, nil)
		got, err := cl.Sign(within(t), "payments", message("AAAA"))
		if err == nil || got != nil || errors.Is(err, client.ErrBrokenLine) != c.broken {
			t.Errorf("%s: %v", name, err)
		}
		if l, _ := cl.Pinned("payments"); l != lineAt(s.Line, l.Version) {
			t.Errorf("%s: the client is at %+v", name, l)
		}
		s.Do(func(s *clienttest.Server) { s.Answer = nil }) // the client goes on after a valid answer
		if _, err := cl.Sign(within(t), "payments", message("AAAA")); err != nil {
			t.Errorf("after %s: %v", name, err)
		}
	}
}

// TestManyFollowOnce checks that concurrent callers who need the same steps get the steps once.
func TestManyFollowOnce(t *testing.T) {
	s := serve(t)
	s.Do(func(s *clienttest.Server) { s.Active, s.Shown, s.Page = 5, 5, 10 })
	c, _ := peer(t, s, 1, nil)
	var all sync.WaitGroup
	for i := range 32 {
		all.Go(func() {
			if _, err := c.Sign(within(t), "payments", message(fmt.Sprintf("AA%02d", i))); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n := s.Seen().Asked["line"]; n != 1 {
		t.Errorf("the line was asked for %d times", n)
	}
}

func TestRotationOfPinnedKey(t *testing.T) {
	s := serve(t)
	c, heard := peer(t, s, 1, nil)
	s.Do(func(s *clienttest.Server) { s.Shown = 2 })
	event := s.Line.Rotation(2)
	s.Send(wire.EncodeRotation(event))
	event.Event = wire.EventRotation
	want := client.Rotation{
		Key: "payments", Old: lineAt(s.Line, 1), New: lineAt(s.Line, 2),
		ActivatesAt: time.Unix(1704067200, 0), RetiresAt: time.Unix(1704153600, 0), Event: event,
	}
	if r := heard.next(t); !reflect.DeepEqual(r, want) {
		t.Errorf("told  %+v\nwanted %+v", r, want)
	}
	if a := acked(t, s, 1)[0]; a.Key != "payments" || a.Version != 2 {
		t.Errorf("%+v", a)
	}
	if n := s.Seen().Asked["line"]; n != 1 { // the event does not name compromised versions
		t.Errorf("the line was asked for %d times", n)
	}
	// The same event again, as after a lost acknowledgement, is acknowledged and not delivered. An
	// older event is ignored.
	s.Send(wire.EncodeRotation(event))
	acked(t, s, 2)
	// An event two versions on has its own step only: the client asks for the step between.
	s.Do(func(s *clienttest.Server) { s.Active, s.Shown = 4, 4 })
	s.Send(wire.EncodeRotation(s.Line.Rotation(4)))
	if r := heard.next(t); r.Err != nil || r.Old != lineAt(s.Line, 3) || r.New != lineAt(s.Line, 4) {
		t.Errorf("%+v", r)
	}
	acked(t, s, 3)
	s.Send(wire.EncodeRotation(event), wire.EncodeRotation(s.Line.Rotation(3)))
	settled(t, s, heard)
	if acks := acked(t, s, 4); acks[3].Key != "mark" {
		t.Errorf("an old event is acknowledged: %+v", acks)
	}
	if l, _ := c.Pinned("payments"); l != lineAt(s.Line, 4) {
		t.Errorf("%+v", l)
	}
}

// TestPinnedWhileActivationIsLate: the time of an announced rotation has passed, and the version
// before still signs, because the device is away. The line that the program stores then leads to
// this version too, after a restart of the program.
func TestPinnedWhileActivationIsLate(t *testing.T) {
	s := serve(t)
	c, heard := peer(t, s, 1, nil)
	s.Do(func(s *clienttest.Server) { s.Active, s.Shown = 1, 2 })
	s.Send(wire.EncodeRotation(s.Line.Rotation(2))) // active since long, by its time
	if r := heard.next(t); r.Err != nil || r.New != lineAt(s.Line, 2) {
		t.Errorf("%+v", r)
	}
	stored, ok := c.Pinned("payments")
	if !ok || stored.Version != 1 || stored.Newest() != lineAt(s.Line, 2) {
		t.Errorf("%+v", stored)
	}
	c, _ = peer(t, s, 0, func(config *client.Config) { config.Lines = []client.KeyLine{stored} })
	for _, active := range []uint32{1, 2} {
		s.Do(func(s *clienttest.Server) { s.Active = active })
		if got, err := c.Sign(within(t), "payments", message("AAAA")); err != nil || got.Version != active {
			t.Errorf("version %d signs: %v", active, err)
		}
	}
}

// TestRotationKnownBefore checks the events of known versions. An event of a version that Sign has
// reached is delivered. An event of the pinned version is acknowledged and not delivered. An event
// of an older version is ignored.
func TestRotationKnownBefore(t *testing.T) {
	s := serve(t)
	c, heard := peer(t, s, 2, nil)
	s.Do(func(s *clienttest.Server) { s.Active, s.Shown = 3, 3 })
	s.Send(wire.EncodeRotation(s.Line.Rotation(2)))
	acked(t, s, 1)
	if _, err := c.Sign(within(t), "payments", message("AAAA")); err != nil {
		t.Fatal(err)
	}
	s.Send(wire.EncodeRotation(s.Line.Rotation(3)))
	if r := heard.next(t); r.Old != lineAt(s.Line, 2) || r.New != lineAt(s.Line, 3) || r.Err != nil {
		t.Errorf("%+v", r)
	}
	acked(t, s, 2)
	_, heard = peer(t, s, 3, nil)
	s.Send(wire.EncodeRotation(s.Line.Rotation(2)))
	settled(t, s, heard)
}

// TestRotationRefused checks that an event off the line is delivered with an Err. The event is
// neither acknowledged nor trusted.
func TestRotationRefused(t *testing.T) {
	thief := clienttest.NewKeyLine("thief", 3)
	edited := func(version uint32, edit func(*wire.Rotation)) func(*clienttest.KeyLine) wire.Rotation {
		return func(l *clienttest.KeyLine) wire.Rotation { r := l.Rotation(version); edit(&r); return r }
	}
	for name, c := range map[string]struct {
		pinned uint32 // 0: not pinned
		event  func(l *clienttest.KeyLine) wire.Rotation
	}{
		"a thief's step": {1, func(l *clienttest.KeyLine) wire.Rotation {
			r, next := l.Rotation(2), thief.Next(2)
			step := clienttest.Step(l.Private[0], l.Key, 2, thief.Public(2), &next)
			r.PublicKey, r.Succession = thief.Public(2), &step
			return r
		}},
		"another key than the step's":        {1, edited(2, func(r *wire.Rotation) { r.PublicKey = thief.Public(2) })},
		"no step anywhere":                   {1, edited(2, func(r *wire.Rotation) { r.Succession = nil })},
		"another key for the pinned version": {2, edited(2, func(r *wire.Rotation) { r.PublicKey = thief.Public(2) })},
		"a later version that is not shown":  {1, edited(4, func(*wire.Rotation) {})},
		"not pinned, a spoilt signature":     {0, edited(2, func(r *wire.Rotation) { r.Succession.Signature[3] ^= 1 })},
		"not pinned, another key's step": {0, edited(2, func(r *wire.Rotation) {
			r.Succession = new(thief.Step(2))
		})},
		"not pinned, another version's step": {0, edited(3, func(r *wire.Rotation) { r.Version = 2 })},
		"not pinned, no step, no key": {0, edited(2, func(r *wire.Rotation) {
			r.Succession, r.PublicKey = nil, wire.Bytes32{}
		})},
	} {
		s := serve(t)
		cl, heard := peer(t, s, c.pinned, nil)
		s.Send(wire.EncodeRotation(c.event(s.Line)))
		r := heard.next(t)
		if r.Err == nil || r.New != (client.KeyLine{}) {
			t.Errorf("%s: %+v", name, r)
		}
		if c.pinned > 0 {
			newest := r.Old.Newest()
			onLine := r.Old.Version >= c.pinned && newest == lineAt(s.Line, newest.Version)
			if !onLine || !errors.Is(r.Err, client.ErrBrokenLine) {
				t.Errorf("%s: %+v", name, r)
			}
		}
		settled(t, s, heard)
		if acks := acked(t, s, 1); acks[0].Key != "mark" {
			t.Errorf("%s is acknowledged", name)
		}
		if l, ok := cl.Pinned("payments"); ok && l.Newest() != lineAt(s.Line, l.Newest().Version) {
			t.Errorf("%s: the client is at %+v", name, l)
		}
		// A valid event is delivered afterwards.
		s.Do(func(s *clienttest.Server) { s.Shown = 3 })
		s.Send(wire.EncodeRotation(s.Line.Rotation(3)))
		if r := heard.next(t); r.Err != nil || r.New != lineAt(s.Line, 3) {
			t.Errorf("after %s: %+v", name, r)
		}
	}
}

// TestRotationWhileRefused checks that an event whose line the appliance does not show for a time
// is told as such, and delivered again on the same connection when the line is there.
func TestRotationWhileRefused(t *testing.T) {
	s := serve(t)
	refused := 0
	s.Do(func(s *clienttest.Server) {
		s.Shown = 2
		s.Answer = func(id string, request any) []byte {
			if _, is := request.(*wire.Line); !is || refused == 7 { // one more than the tries of one delivery
				return nil
			}
			refused++
			later := &wire.Error{Code: wire.CodeRateLimited, Message: "later", RetryAfter: 1}
			return wire.EncodeAnswer(id, "", nil, later)
		}
	})
	_, heard := peer(t, s, 1, nil)
	s.Send(wire.EncodeRotation(s.Line.Rotation(2)))
	if r := heard.next(t); r.Err == nil || errors.Is(r.Err, client.ErrBrokenLine) || r.New != (client.KeyLine{}) {
		t.Fatalf("while the line is refused: %+v", r)
	}
	if r := heard.next(t); r.Err != nil || r.New != lineAt(s.Line, 2) {
		t.Fatalf("afterwards: %+v", r)
	}
	acked(t, s, 1)
	if seen := s.Seen(); seen.Accepted != 1 {
		t.Errorf("%d connections", seen.Accepted)
	}
}

// TestRotationNotPinned checks events of unpinned keys, with a step and without one.
func TestRotationNotPinned(t *testing.T) {
	s := serve(t)
	_, heard := peer(t, s, 0, nil)
	s.Send(wire.EncodeRotation(s.Line.Rotation(3)))
	old := lineAt(s.Line, 2)
	old.Next = [32]byte{} // the step does not have the commitment
	if r := heard.next(t); r.Err != nil || r.Old != old || r.New != lineAt(s.Line, 3) {
		t.Errorf("%+v", r)
	}
	other := clienttest.NewKeyLine("unheard-of", 3)
	event := other.Rotation(2)
	event.Succession = nil
	s.Send(wire.EncodeRotation(event))
	r := heard.next(t)
	if r.Err != nil || r.Key != "unheard-of" || r.Old != (client.KeyLine{}) || r.New.PublicKey != other.Public(2) {
		t.Errorf("%+v", r)
	}
	acked(t, s, 2)
}

// compromises collects the calls of OnCompromise.
type compromises chan client.Compromise

func (c compromises) listen(config *client.Config) {
	config.OnCompromise = func(_ context.Context, v client.Compromise) { c <- v }
}

// next expects the next call.
func (c compromises) next(t *testing.T, l *clienttest.KeyLine, version uint32) {
	t.Helper()
	select {
	case v := <-c:
		if v != (client.Compromise{Key: l.Key, Version: version, PublicKey: l.Public(version)}) {
			t.Errorf("the application is told %+v, want version %d", v, version)
		}
	case <-time.After(20 * time.Second):
		t.Fatalf("the application is not told of version %d", version)
	}
}

// TestCompromised checks that a compromised version is not trusted from its event on, that the
// application is told once and the appliance after that, and that later versions are good.
func TestCompromised(t *testing.T) {
	s := serve(t)
	heard := make(compromises, 10)
	c, told := peer(t, s, 1, heard.listen)
	if _, err := c.Sign(within(t), "payments", message("AAAA")); err != nil {
		t.Fatal(err)
	}
	s.Send(wire.EncodeCompromise(s.Line.Compromise(1)))
	heard.next(t, s.Line, 1)
	if a := acked(t, s, 1)[0]; a.Op != wire.OpCompromiseAck || a.Key != "payments" || a.Version != 1 {
		t.Errorf("%+v", a)
	}
	if _, err := c.Sign(within(t), "payments", message("AAAA")); !errors.Is(err, client.ErrCompromised) {
		t.Errorf("a signature of the compromised version: %v", err)
	}
	s.Do(func(s *clienttest.Server) { s.Active, s.Shown, s.Compromised = 2, 2, []uint32{1} })
	if _, err := c.Sign(within(t), "payments", message("AAAA")); err != nil {
		t.Errorf("a signature of the version after it: %v", err)
	}
	s.Send(wire.EncodeCompromise(s.Line.Compromise(1)), wire.EncodeRotation(s.Line.Rotation(2)))
	if r := told.next(t); r.Err != nil || r.New != lineAt(s.Line, 2) {
		t.Errorf("%+v", r)
	}
	if acks := acked(t, s, 3); acks[1].Op != wire.OpCompromiseAck { // the first acknowledgement was lost
		t.Errorf("%+v", acks)
	}
	// A version that was never pinned here: the application may have documents of it.
	other := clienttest.NewKeyLine("other", 2)
	s.Send(wire.EncodeCompromise(other.Compromise(1)))
	heard.next(t, other, 1)
	if len(heard) > 0 {
		t.Errorf("told again: %+v", <-heard)
	}
}

// TestCompromiseBeforeAnythingNewer has a client that was away while the pinned version was
// compromised: OnCompromise is called before the first signature of a later version is returned,
// whichever later version signs, and whether the client has the later version already. Without an
// OnCompromise, the signature is an error.
func TestCompromiseBeforeAnythingNewer(t *testing.T) {
	announced := func(config *client.Config, l *clienttest.KeyLine) {
		config.Lines[0].Announced = client.Successor{PublicKey: l.Public(2), Next: l.Next(2)}
	}
	for name, c := range map[string]struct {
		active uint32
		change func(*client.Config, *clienttest.KeyLine)
		event  bool // of the rotation comes first; another process of this peer knows of the compromise
	}{
		"the next version":                   {2, nil, false},
		"three versions later":               {4, nil, false},
		"a version that was announced":       {2, announced, false},
		"after a version that was announced": {4, announced, false},
		"after the event of its rotation":    {2, nil, true},
	} {
		s := serve(t)
		s.Do(func(s *clienttest.Server) {
			s.Active, s.Shown, s.Compromised = c.active, c.active, []uint32{1}
			if c.event {
				s.Greeting = [][]byte{wire.EncodeRotation(s.Line.Rotation(c.active))}
			}
		})
		order := make(chan string, 10)
		cl, _ := peer(t, s, 1, func(config *client.Config) {
			if c.change != nil {
				c.change(config, s.Line)
			}
			config.OnCompromise = func(_ context.Context, v client.Compromise) {
				order <- fmt.Sprint("compromised ", v.Version)
			}
		})
		for range 2 {
			got, err := cl.Sign(within(t), "payments", message("AAAA"))
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			order <- fmt.Sprint("signed ", got.Version)
		}
		close(order)
		var got []string
		for each := range order {
			got = append(got, each)
		}
		want := []string{"compromised 1", fmt.Sprint("signed ", c.active), fmt.Sprint("signed ", c.active)}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v, want %v", name, got, want)
		}

		cl, _ = peer(t, s, 1, func(config *client.Config) {
			if c.change != nil {
				c.change(config, s.Line)
			}
		})
		s.Send(wire.EncodeCompromise(s.Line.Compromise(1)))
		for range 2 {
			got, err := cl.Sign(within(t), "payments", message("AAAA"))
			if got != nil || !errors.Is(err, client.ErrCompromised) {
				t.Errorf("%s, nobody listens: %v", name, err)
			}
		}
		for _, a := range s.Seen().Acks {
			if a.Op == wire.OpCompromiseAck && a.Version != 1 {
				t.Errorf("%s: %+v", name, a)
			}
		}
	}
}

// TestCallsWaitForOnCompromise has OnCompromise wait. Meanwhile no other call returns a signature:
// the application does not know of the compromise yet.
func TestCallsWaitForOnCompromise(t *testing.T) {
	s := serve(t)
	s.Do(func(s *clienttest.Server) { s.Active, s.Shown, s.Compromised = 2, 2, []uint32{1} })
	begun, release := make(chan struct{}), make(chan struct{})
	c, _ := peer(t, s, 1, func(config *client.Config) {
		config.OnCompromise = func(context.Context, client.Compromise) {
			close(begun)
			<-release
		}
	})
	first := make(chan error, 1)
	go func() {
		_, err := c.Sign(within(t), "payments", message("AAAA"))
		first <- err
	}()
	<-begun
	ctx, cancel := context.WithTimeout(within(t), 200*time.Millisecond)
	defer cancel()
	if got, err := c.Sign(ctx, "payments", message("AAAA")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v, %v", got, err)
	}
	close(release)
	if err := <-first; err != nil {
		t.Error(err)
	}
	if _, err := c.Sign(within(t), "payments", message("AAAA")); err != nil {
		t.Error(err)
	}
}

// TestCompromisedVersionWithoutCommitment refuses a step of a compromised version whose commitment
// is unknown: a thief can sign such a step.
func TestCompromisedVersionWithoutCommitment(t *testing.T) {
	s := serve(t)
	s.Do(func(s *clienttest.Server) { s.Active, s.Shown, s.Compromised = 2, 2, []uint32{1} })
	heard := make(compromises, 10)
	c, _ := peer(t, s, 1, func(config *client.Config) {
		heard.listen(config)
		config.Lines[0].Next = [32]byte{}
	})
	if got, err := c.Sign(within(t), "payments", message("AAAA")); got != nil || !errors.Is(err, client.ErrBrokenLine) {
		t.Errorf("%v", err)
	}
	steps := wire.Steps{Active: 2, Steps: []wire.Succession{s.Line.Step(2)}, Compromised: []uint32{1}}
	uncommitted := lineAt(s.Line, 1)
	uncommitted.Next = [32]byte{}
	if _, err := uncommitted.Advance(steps); !errors.Is(err, client.ErrBrokenLine) {
		t.Errorf("%v", err)
	}
	if got, err := lineAt(s.Line, 1).Advance(steps); err != nil || got != lineAt(s.Line, 2) {
		t.Errorf("%+v, %v", got, err)
	}
}

// TestCompromiseUsesTheClient calls the client inside OnCompromise, which is itself called inside a
// call of the client.
func TestCompromiseUsesTheClient(t *testing.T) {
	s := serve(t)
	s.Do(func(s *clienttest.Server) { s.Active, s.Shown, s.Compromised = 2, 2, []uint32{1} })
	var c *client.Client
	inside := make(chan error, 10)
	c, _ = peer(t, s, 1, func(config *client.Config) {
		config.OnCompromise = func(ctx context.Context, _ client.Compromise) {
			_, err := c.Sign(ctx, "payments", message("BBBB"))
			inside <- err
		}
	})
	if _, err := c.Sign(within(t), "payments", message("AAAA")); err != nil {
		t.Error(err)
	}
	if err := <-inside; err != nil {
		t.Error(err)
	}
}

// TestWhoAcknowledges checks which rotations the client acknowledges. A rotation without a
// recipient is not acknowledged, nor is any with Config.Unacknowledged.
func TestWhoAcknowledges(t *testing.T) {
	for name, c := range map[string]struct {
		pinned uint32
		change func(*client.Config)
		want   bool
	}{
		"nobody listens":         {0, func(c *client.Config) { c.OnRotation = nil }, false},
		"pinned, nobody listens": {1, func(c *client.Config) { c.OnRotation = nil }, true},
		"told":                   {0, nil, true},
		"by hand":                {1, func(c *client.Config) { c.Unacknowledged = true }, false},
	} {
		s := serve(t)
		s.Do(func(s *clienttest.Server) { s.Shown = 2 })
		mark := make(told, 1)
		cl, _ := peer(t, s, c.pinned, func(config *client.Config) {
			if c.change != nil {
				c.change(config)
			}
			config.OnServerKey = func([32]byte, uint64) { mark <- client.Rotation{} }
		})
		young, err := newIdentity()
		if err != nil {
			t.Fatal(err)
		}
		last := wire.Rotation{Key: wire.NoiseKey, Version: 2, PublicKey: young.Public()}
		s.Send(wire.EncodeRotation(s.Line.Rotation(2)), wire.EncodeRotation(last))
		mark.next(t) // the earlier event has been delivered
		if err := cl.Acknowledge(within(t), wire.Rotation{Key: "last", Version: 7}); err != nil {
			t.Fatal(err)
		}
		seen := s.Await(within(t), func(seen clienttest.Seen) bool {
			return len(seen.Acks) > 0 && (!c.want || seen.Acks[0].Key == "payments")
		})
		if (seen.Acks[0].Key == "payments") != c.want {
			t.Errorf("%s: %+v", name, seen.Acks)
		}
	}
}

// TestEventsBetweenAnswers checks that rotation events come before, between and after answers, and
// that the client ignores events of unknown types.
func TestEventsBetweenAnswers(t *testing.T) {
	s := serve(t)
	s.Do(func(s *clienttest.Server) {
		s.Shown = 2
		s.Greeting = [][]byte{
			wire.EncodeRotation(s.Line.Rotation(2)), []byte(`{"event":"weather","of":{"tomorrow":"rain"}}`),
		}
	})
	c, heard := peer(t, s, 1, nil)
	if r := heard.next(t); r.New != lineAt(s.Line, 2) {
		t.Errorf("%+v", r)
	}
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for range 50 {
				if _, err := c.Ping(within(t)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for v := uint32(3); v <= 5; v++ {
		s.Do(func(s *clienttest.Server) { s.Shown = v })
		s.Send([]byte(`{"event":"later"}`), wire.EncodeRotation(s.Line.Rotation(v)))
		if r := heard.next(t); r.New != lineAt(s.Line, v) {
			t.Errorf("%+v", r)
		}
	}
	all.Wait()
	if seen := s.Seen(); seen.Accepted != 1 {
		t.Errorf("%d connections", seen.Accepted)
	}
	acked(t, s, 4)
	// A malformed event ends the connection, as a wrong answer does.
	s.Send([]byte(`{"event":"rotation","key":"payments"}`))
	s.Await(within(t), func(seen clienttest.Seen) bool { return seen.Connections == 0 })
	if _, err := c.Ping(within(t)); err != nil {
		t.Errorf("the next connection: %v", err)
	}
}

// TestLostAcknowledgement checks that an event whose acknowledgement was lost comes again at the
// next connection, and is delivered once.
func TestLostAcknowledgement(t *testing.T) {
	s := serve(t)
	c, heard := peer(t, s, 1, nil)
	event := wire.EncodeRotation(s.Line.Rotation(2))
	lost := 0
	s.Do(func(s *clienttest.Server) {
		s.Shown, s.Greeting = 2, [][]byte{event}
		s.Answer = func(id string, request any) []byte {
			if _, is := request.(*wire.Ack); is {
				var again int
				s.Do(func(*clienttest.Server) { lost++; again = lost })
				if again <= 2 { // the call and its one retry
					return []byte{}
				}
			}
			return nil
		}
	})
	s.Send(event)
	if r := heard.next(t); r.New != lineAt(s.Line, 2) {
		t.Errorf("%+v", r)
	}
	s.Await(within(t), func(clienttest.Seen) bool { return lost >= 2 })
	for len(s.Seen().Acks) == 0 { // each new connection sends the event again
		if err := within(t).Err(); err != nil {
			t.Fatal(err)
		}
		s.Drop()
		c.Ping(within(t))
	}
	settled(t, s, heard)
}

// TestSlowApplication checks that answers come while OnRotation blocks, and that the queue keeps
// the newest event of each key only.
func TestSlowApplication(t *testing.T) {
	s := serve(t)
	begun, goOn := make(chan bool), make(chan bool)
	var heard []client.Rotation
	c, _ := peer(t, s, 0, func(config *client.Config) {
		config.OnRotation = func(r client.Rotation) {
			heard = append(heard, r)
			if len(heard) == 1 {
				begun <- true
				<-goOn
			}
		}
	})
	s.Send(wire.EncodeRotation(s.Line.Rotation(2)))
	<-begun
	var before runtime.MemStats
	runtime.ReadMemStats(&before)
	flood := wire.Rotation{PublicKey: s.Line.Public(1), ActivatesAt: 1, RetiresAt: 2}
	for i := range 10_000 {
		flood.Key, flood.Version = "flood", uint32(i+2)
		s.Send(wire.EncodeRotation(flood))
	}
	for i := range 10_000 {
		flood.Key, flood.Version = fmt.Sprintf("flood-%d", i), 2
		s.Send(wire.EncodeRotation(flood))
	}
	flood.Key, flood.Version = "flood", 5 // an older one
	s.Send(wire.EncodeRotation(flood))
	if _, err := c.Ping(within(t)); err != nil { // answered after all of them
		t.Fatal(err)
	}
	close(goOn)
	s.Await(within(t), func(seen clienttest.Seen) bool { return len(seen.Acks) >= 513 })
	flood.Key = "last"
	s.Send(wire.EncodeRotation(flood))
	s.Await(within(t), func(seen clienttest.Seen) bool { return seen.Acks[len(seen.Acks)-1].Key == "last" })
	c.Close()
	if len(heard) != 514 || heard[1].Key != "flood" || heard[1].New.Version != 10_001 ||
		heard[2].Key != "flood-0" || heard[512].Key != "flood-510" {
		t.Errorf("told %d times, the second time %+v", len(heard), heard[min(1, len(heard)-1)])
	}
}

// TestCloseEndsAll checks that no callback begins after Close, and that no goroutine stays.
func TestCloseEndsAll(t *testing.T) {
	s := serve(t)
	before := runtime.NumGoroutine()
	begun, goOn := make(chan bool), make(chan bool)
	n := 0
	c, _ := peer(t, s, 0, func(config *client.Config) {
		config.OnRotation = func(client.Rotation) {
			n++
			begun <- true
			<-goOn
		}
	})
	stayed := make(chan error)
	go func() { stayed <- c.Stay(t.Context()) }()
	s.Send(wire.EncodeRotation(s.Line.Rotation(2)))
	<-begun
	s.Send(wire.EncodeRotation(clienttest.NewKeyLine("other", 2).Rotation(2)))
	if _, err := c.Ping(within(t)); err != nil {
		t.Fatal(err)
	}
	c.Close()
	close(goOn)
	if err := <-stayed; !errors.Is(err, client.ErrClosed) {
		t.Errorf("%v", err)
	}
	s.Await(within(t), func(seen clienttest.Seen) bool { return seen.Connections == 0 })
	for runtime.NumGoroutine() > before {
		if t.Context().Err() != nil {
			t.Fatal("goroutines stay")
		}
		runtime.Gosched()
	}
	if n != 1 || len(s.Seen().Acks) != 0 {
		t.Errorf("told %d times, acknowledged %+v", n, s.Seen().Acks)
	}
	if err := c.Stay(t.Context()); !errors.Is(err, client.ErrClosed) {
		t.Errorf("%v", err)
	}
}

// identities makes Noise keys for the server.
func identities(t *testing.T, n int) (all []*noise.Identity) {
	t.Helper()
	for range n {
		id, err := newIdentity()
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, id)
	}
	return all
}

// TestNoiseRotation checks the order in which a new connection tries the two Noise keys.
func TestNoiseRotation(t *testing.T) {
	hour := time.Hour
	for name, c := range map[string]struct {
		activates, retires time.Duration // from now
		compromised        bool
		answer             string // which keys answer then: o, y
		refused            int    // refused handshakes before the accepted one
		fails              bool
	}{
		"announced":                             {hour, 2 * hour, false, "o", 0, false},
		"announced, and already active there":   {hour, 2 * hour, false, "y", 1, false},
		"active":                                {-hour, hour, false, "oy", 0, false},
		"active, and not there yet":             {-hour, hour, false, "o", 1, false},
		"retired":                               {-2 * hour, -hour, false, "y", 0, false},
		"retired, and only the old one answers": {-2 * hour, -hour, false, "o", 1, true},
		"compromised, and the thief answers":    {-hour, hour, true, "o", 1, true},
		"neither answers":                       {-hour, hour, false, "", 2, true},
	} {
		s := serve(t)
		old, young := s.Statics[0], identities(t, 1)[0]
		kept := make(chan [32]byte, 1)
		cl, heard := peer(t, s, 0, func(config *client.Config) {
			config.OnServerKey = func(key [32]byte, _ uint64) { kept <- key }
		})
		now := time.Now()
		if c.compromised {
			s.Send(wire.EncodeCompromise(wire.Compromise{Key: wire.NoiseKey, Version: 1, PublicKey: old.Public()}))
		}
		s.Send(wire.EncodeRotation(wire.Rotation{
			Key: wire.NoiseKey, Version: 2, PublicKey: young.Public(),
			ActivatesAt: now.Add(c.activates).Unix(), RetiresAt: now.Add(c.retires).Unix(),
		}))
		r := heard.next(t)
		if r.Key != client.NoiseKey || r.New.PublicKey != young.Public() || r.New.Version != 2 || r.Err != nil ||
			<-kept != young.Public() {
			t.Errorf("%s: %+v", name, r)
		}
		acked(t, s, 1)
		s.Do(func(s *clienttest.Server) {
			s.Statics = nil
			if strings.Contains(c.answer, "o") {
				s.Statics = append(s.Statics, old)
			}
			if strings.Contains(c.answer, "y") {
				s.Statics = append(s.Statics, young)
			}
			if c.answer == "" {
				s.Statics = append(s.Statics, identities(t, 1)[0])
			}
		})
		s.Drop()
		_, err := cl.Ping(within(t))
		if c.fails != errors.Is(err, client.ErrHandshake) || !c.fails && err != nil {
			t.Errorf("%s: %v", name, err)
		}
		// A call whose connection broke tries twice.
		if n := s.Seen().Refused; n != c.refused && !(c.fails && n == 2*c.refused) {
			t.Errorf("%s: %d handshakes refused, want %d", name, n, c.refused)
		}
	}
}

// TestNoiseRotationTwice begins a second rotation before the end of the first one, and then replays
// the event of the first one.
func TestNoiseRotationTwice(t *testing.T) {
	s := serve(t)
	keys := identities(t, 2)
	c, heard := peer(t, s, 0, nil)
	now := time.Now()
	for i, key := range keys {
		s.Send(wire.EncodeRotation(wire.Rotation{
			Key: wire.NoiseKey, Version: uint32(i + 2), PublicKey: key.Public(),
			ActivatesAt: now.Add(-time.Hour).Unix(), RetiresAt: now.Add(time.Hour).Unix(),
		}))
		heard.next(t)
	}
	s.Do(func(s *clienttest.Server) { s.Statics = []noise.Static{s.Statics[0], keys[1]} })
	s.Drop()
	if _, err := c.Ping(within(t)); err != nil {
		t.Errorf("the newest key: %v", err)
	}
	replayed := wire.Rotation{Key: wire.NoiseKey, Version: 2, PublicKey: keys[0].Public(), ActivatesAt: 1, RetiresAt: 2}
	s.Send(wire.EncodeRotation(replayed))
	settled(t, s, heard)
	s.Do(func(s *clienttest.Server) { s.Statics = []noise.Static{keys[1]} })
	s.Drop()
	if _, err := c.Ping(within(t)); err != nil || s.Seen().Refused != 0 {
		t.Errorf("%v, %d refused", err, s.Seen().Refused)
	}
}

// TestFormerServerKey starts a client with the new key while only the old key answers.
func TestFormerServerKey(t *testing.T) {
	s := serve(t)
	young := identities(t, 1)[0]
	config := client.Config{
		Address: s.Address, Identity: s.Peer,
		ServerKey: young.Public(), FormerServerKey: s.Statics[0].Public(),
	}
	c := dial(t, config)
	if _, err := c.Ping(within(t)); err != nil {
		t.Fatal(err)
	}
	// The event of a configured key is acknowledged: the application knows the key already.
	s.Send(wire.EncodeRotation(wire.Rotation{
		Key: wire.NoiseKey, Version: 2, PublicKey: young.Public(),
		ActivatesAt: time.Now().Add(time.Hour).Unix(), RetiresAt: time.Now().Add(2 * time.Hour).Unix(),
	}))
	acked(t, s, 1)
	s.Drop()
	if _, err := c.Ping(within(t)); err != nil || s.Seen().Refused != 1 {
		t.Errorf("%v, %d refused: before it activates the old one comes first", err, s.Seen().Refused)
	}
	config.FormerServerKey = [32]byte{}
	_, err := client.Dial(within(t), config)
	if !errors.Is(err, client.ErrHandshake) || !strings.Contains(err.Error(), "rotated") ||
		!strings.Contains(err.Error(), "countersign admin noise-key") ||
		strings.Contains(err.Error(), "AuthorizedServerKey") {
		t.Errorf("%v", err)
	}
	config.ServerIdentity = [32]byte(ed25519.NewKeyFromSeed(make([]byte, 32)).Public().(ed25519.PublicKey))
	_, err = client.Dial(within(t), config)
	if !errors.Is(err, client.ErrHandshake) || !strings.Contains(err.Error(), "AuthorizedServerKey") {
		t.Errorf("%v", err)
	}
}

func TestAuthorizedServerKey(t *testing.T) {
	owner := ed25519.NewKeyFromSeed(make([]byte, 32))
	other := ed25519.NewKeyFromSeed([]byte(strings.Repeat("o", 32)))
	identity := [32]byte(owner.Public().(ed25519.PublicKey))
	static := identities(t, 1)[0].Public()
	good := clienttest.Authorization(owner, &static, 3)
	for least, want := range map[uint64]bool{0: true, 3: true, 4: false} {
		key, generation, err := client.AuthorizedServerKey(identity, good, least)
		accepted := err == nil && key == static && generation == 3
		refused := errors.Is(err, client.ErrUnauthorized) && key == [32]byte{}
		if want && !accepted || !want && !refused {
			t.Errorf("at least %d: %x, %d, %v", least, key, generation, err)
		}
	}
	spoilt := clienttest.Authorization(owner, &static, 3)
	spoilt.Signature[7] ^= 1
	sign := func(by ed25519.PrivateKey, generation uint64) wire.Authorization {
		return wire.Authorization{
			Payload: good.Payload, Signature: clienttest.Authorization(by, &static, generation).Signature,
		}
	}
	for name, a := range map[string]wire.Authorization{
		"another owner":          clienttest.Authorization(other, &static, 3),
		"no X25519 key":          clienttest.Authorization(owner, nil, 3),
		"a spoilt signature":     spoilt,
		"no signature":           {Payload: good.Payload},
		"nothing":                {},
		"another's signature":    sign(other, 3),
		"a signature of another": sign(owner, 4),
	} {
		key, _, err := client.AuthorizedServerKey(identity, a, 0)
		if !errors.Is(err, client.ErrUnauthorized) || key != [32]byte{} {
			t.Errorf("%s: %x, %v", name, key, err)
		}
	}
}

// TestNoiseRotationWithIdentity checks that a thief of the Noise key can't lead a client to another
// key: the identity's signature is missing.
func TestNoiseRotationWithIdentity(t *testing.T) {
	owner := ed25519.NewKeyFromSeed(make([]byte, 32))
	s := serve(t)
	old := s.Statics[0]
	keys := identities(t, 2)
	young := keys[0].Public()
	kept := make(chan [32]byte, 10)
	c, heard := peer(t, s, 0, func(config *client.Config) {
		config.ServerIdentity = [32]byte(owner.Public().(ed25519.PublicKey))
		config.ServerGeneration = 5
		config.OnServerKey = func(key [32]byte, _ uint64) { kept <- key }
	})
	event := wire.Rotation{Key: wire.NoiseKey, Version: 2, PublicKey: young, ActivatesAt: 1, RetiresAt: 2}
	with := func(a wire.Authorization) wire.Rotation { e := event; e.Authorization = &a; return e }
	other := keys[1].Public()
	stranger := ed25519.NewKeyFromSeed([]byte(strings.Repeat("o", 32)))
	for name, e := range map[string]wire.Rotation{
		"none":              event,
		"another key's":     with(clienttest.Authorization(owner, &other, 6)),
		"an old generation": with(clienttest.Authorization(owner, &young, 4)),
		"another owner":     with(clienttest.Authorization(stranger, &young, 6)),
	} {
		s.Send(wire.EncodeRotation(e))
		if r := heard.next(t); !errors.Is(r.Err, client.ErrUnauthorized) || r.New != (client.KeyLine{}) {
			t.Errorf("%s: %+v", name, r)
		}
	}
	s.Drop()
	if _, err := c.Ping(within(t)); err != nil || len(kept) != 0 || len(s.Seen().Acks) != 0 {
		t.Errorf("%v, kept %d, acknowledged %+v", err, len(kept), s.Seen().Acks)
	}
	s.Send(wire.EncodeRotation(with(clienttest.Authorization(owner, &young, 6))))
	if r := heard.next(t); r.Err != nil || <-kept != young {
		t.Errorf("%+v", r)
	}
	acked(t, s, 1)
	// The highest generation seen is the minimum from now on.
	back := wire.Rotation{Key: wire.NoiseKey, Version: 3, PublicKey: old.Public(), ActivatesAt: 1, RetiresAt: 2}
	a := clienttest.Authorization(owner, new(old.Public()), 5)
	back.Authorization = &a
	s.Send(wire.EncodeRotation(back))
	if r := heard.next(t); !errors.Is(r.Err, client.ErrUnauthorized) {
		t.Errorf("%+v", r)
	}
}

// TestOrderOfNews: an event of before a change has no effect afterwards, although its version is
// higher. Each acknowledgement names the change.
func TestOrderOfNews(t *testing.T) {
	for _, pinned := range []uint32{0, 1} {
		s := serve(t)
		s.Do(func(s *clienttest.Server) { s.Shown = 3 })
		_, heard := peer(t, s, pinned, nil)
		event := func(version, change, cancelled uint32) wire.Rotation {
			var e wire.Rotation
			if version > 1 {
				e = s.Line.Rotation(version)
			} else {
				e = wire.Rotation{Key: s.Line.Key, Version: 1, PublicKey: s.Line.Public(1)}
				e.ActivatesAt, e.RetiresAt = 1, 1
			}
			e.Change, e.Cancelled = change, cancelled
			return e
		}
		for i, c := range []struct {
			e    wire.Rotation
			told bool
		}{
			{event(2, 0, 0), true},
			{event(2, 1, 0), true},
			{event(2, 0, 0), false}, // an older one
			{event(1, 2, 2), true},
			{event(2, 1, 0), false},
			{event(2, 2, 0), true}, // announced again
			{event(1, 2, 2), false},
			{event(3, 2, 0), true},
		} {
			s.Send(wire.EncodeRotation(c.e))
			if !c.told {
				settled(t, s, heard)
				continue
			}
			r := heard.next(t)
			if r.Err != nil || r.New.Version != c.e.Version || r.Cancelled != c.e.Cancelled ||
				r.Event.Change != c.e.Change {
				t.Errorf("pinned %d, event %d: %+v", pinned, i, r)
			}
			s.Await(within(t), func(seen clienttest.Seen) bool {
				return slices.ContainsFunc(seen.Acks, func(a wire.Ack) bool {
					return a.Key == c.e.Key && a.Version == c.e.Version && a.Change == c.e.Change
				})
			})
		}
	}
}

// TestNoiseRotationCalledOff: after a rotation of the Noise key was called off, new connections try
// the old key first, and the announced key too, which goes on answering, at any time.
func TestNoiseRotationCalledOff(t *testing.T) {
	for _, answers := range []string{"old", "young"} {
		s := serve(t)
		old, young := s.Statics[0], identities(t, 1)[0]
		kept := make(chan [32]byte, 2)
		c, heard := peer(t, s, 0, func(config *client.Config) {
			config.OnServerKey = func(key [32]byte, _ uint64) { kept <- key }
			config.ServerKey, config.FormerServerKey = young.Public(), old.Public()
		})
		announced := wire.Rotation{
			Key: wire.NoiseKey, Version: 2, PublicKey: young.Public(), ActivatesAt: 1, RetiresAt: 2,
		}
		s.Send(wire.EncodeRotation(announced))
		acked(t, s, 1)
		off := wire.Rotation{
			Key: wire.NoiseKey, Version: 1, PublicKey: old.Public(), ActivatesAt: 1, RetiresAt: 1,
			Change: 1, Cancelled: 2,
		}
		s.Send(wire.EncodeRotation(off))
		if r := heard.next(t); r.Err != nil || r.Cancelled != 2 || <-kept != old.Public() {
			t.Errorf("%+v", r)
		}
		s.Do(func(s *clienttest.Server) {
			if s.Statics = []noise.Static{old}; answers == "young" {
				s.Statics = []noise.Static{young}
			}
		})
		s.Drop()
		before := s.Seen().Refused
		if _, err := c.Ping(within(t)); err != nil {
			t.Errorf("the %s key answers: %v", answers, err)
		}
		if n := s.Seen().Refused - before; n != map[string]int{"old": 0, "young": 1}[answers] {
			t.Errorf("the %s key answers: %d handshakes refused", answers, n)
		}
	}
}

func TestConfigRefuses(t *testing.T) {
	l := lineAt(clienttest.NewKeyLine("payments", 1), 1)
	id := identities(t, 1)[0]
	for name, change := range map[string]func(*client.Config){
		"pinned twice":      func(c *client.Config) { c.Lines = []client.KeyLine{l, l} },
		"the Noise key":     func(c *client.Config) { n := l; n.Key = "noise"; c.Lines = []client.KeyLine{n} },
		"version 0":         func(c *client.Config) { n := l; n.Version = 0; c.Lines = []client.KeyLine{n} },
		"no public key":     func(c *client.Config) { c.Lines = []client.KeyLine{{Key: "payments", Version: 1}} },
		"no identity's key": func(c *client.Config) { c.ServerIdentity[0] = 1 },
	} {
		c := client.Config{Address: "127.0.0.1:1", ServerKey: id.Public(), Identity: id}
		change(&c)
		if _, err := client.New(c); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
}
