package client

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"countersign/internal/eddsa"
	"countersign/internal/ijson"
	"countersign/transcript"
	"countersign/wire"
)

// NoiseKey is the key of a Rotation that is about the listener's own key.
const NoiseKey = wire.NoiseKey

// ErrUnauthorized: a Noise key does not come with what Config.ServerIdentity has signed. It is not used.
var ErrUnauthorized = errors.New("the Noise key is not authorized by the appliance's identity")

// Rotation tells that a key gets a new version.
type Rotation struct {
	Key string // or NoiseKey
	// Old and New are the line before and after it. Of a line that is not pinned Old is zero where the event does not show it; of the
	// Noise key only New.Version and New.PublicKey are there.
	Old, New Line
	// ActivatesAt is when the new version begins to sign, RetiresAt until when the old one is accepted, at the most. Both are
	// the appliance's clock.
	ActivatesAt, RetiresAt time.Time
	// Compromised: the old version must not be believed any more.
	Compromised bool
	// Err says why the rotation must not be believed, or could not be checked; New is zero then, Old is where the pinned line is, and
	// nothing is acknowledged.
	Err error
	// Event is what the appliance has sent.
	Event wire.Rotation
}

// How much is kept of what the appliance tells, whatever it tells.
const (
	maxWaiting = 512  // events, one for each key; what is beyond that comes again at the next connection
	maxTold    = 4096 // keys whose last event is remembered
)

// hearing are the events of an appliance on their way to the application. They are put down by the readers of connections and
// taken by one goroutine, which is there while there are any.
type hearing struct {
	mu      sync.Mutex
	queue   []string                  // the keys of waiting, oldest first
	waiting map[string]*wire.Rotation // the newest event of each
	working bool

	told map[string]*wire.Rotation // by the one goroutine: the last event of each key that was dealt with
}

// heard takes an event. It never waits.
func (c *Client) heard(e *wire.Rotation) {
	h := &c.hearing
	h.mu.Lock()
	defer h.mu.Unlock()
	before := h.waiting[e.Key]
	switch {
	case c.base.Err() != nil, before != nil && before.Version > e.Version:
		return
	case before == nil && len(h.queue) >= maxWaiting:
		return
	case before == nil:
		h.queue = append(h.queue, e.Key)
	}
	if h.waiting == nil {
		h.waiting, h.told = map[string]*wire.Rotation{}, map[string]*wire.Rotation{}
	}
	h.waiting[e.Key] = e
	if !h.working {
		h.working = true
		go c.listen()
	}
}

// listen deals with events one after the other, until there are none or the client is closed.
func (c *Client) listen() {
	h := &c.hearing
	for {
		h.mu.Lock()
		if len(h.queue) == 0 || c.base.Err() != nil {
			h.working = false
			h.mu.Unlock()
			return
		}
		e := h.waiting[h.queue[0]]
		delete(h.waiting, e.Key)
		h.queue = h.queue[1:]
		h.mu.Unlock()
		c.rotated(e)
	}
}

// rotated deals with one event: check it, tell the application, acknowledge it.
func (c *Client) rotated(e *wire.Rotation) {
	if last := c.hearing.told[e.Key]; last != nil && e.Version < last.Version {
		return // an old event again
	} else if last != nil && !c.config.Unacknowledged && string(wire.EncodeRotation(*e)) == string(wire.EncodeRotation(*last)) {
		c.acknowledge(e, false) // the first acknowledgement was lost
		return
	}
	r := Rotation{Key: e.Key, ActivatesAt: time.Unix(e.ActivatesAt, 0), RetiresAt: time.Unix(e.RetiresAt, 0), Compromised: e.Compromised, Event: *e}
	known, err := false, error(nil) // known: the application has configured it itself
	if e.Key == wire.NoiseKey {
		known, err = c.replaceServerKey(&r)
	} else {
		known, err = c.replaceVersion(&r)
	}
	if c.base.Err() != nil || errors.Is(err, errStale) {
		return
	}
	if err != nil {
		r.New, r.Err = Line{}, err
	}
	if !known && c.config.OnRotation != nil {
		c.config.OnRotation(r)
	}
	if err != nil {
		return // it comes again at the next connection
	}
	if told := c.hearing.told; len(told) >= maxTold && told[e.Key] == nil {
		for key := range told { // any one: at worst the application is told of it twice
			delete(told, key)
			break
		}
	}
	c.hearing.told[e.Key] = e
	c.acknowledge(e, known)
}

// errStale marks an event from before what the application has pinned.
var errStale = errors.New("an old event")

// replaceVersion checks an event about a signing key and goes on along the line, if that is pinned.
func (c *Client) replaceVersion(r *Rotation) (known bool, err error) {
	e := &r.Event
	p := c.pins[e.Key]
	if p == nil {
		r.New = Line{Key: e.Key, Version: e.Version, PublicKey: e.PublicKey}
		return false, checkUnpinned(r)
	}
	if e.Version < p.first {
		return false, errStale
	}
	if e.Version == p.first {
		_, err := p.judge(e.Version, e.PublicKey)
		r.Old, _ = c.Pinned(e.Key)
		return err == nil, err
	}
	if e.Compromised { // even if the line should end here
		defer p.distrust(e.Version - 1)
	}
	for try := range 6 {
		err = c.believe(c.base, e.Key, e.Version, e.PublicKey, e.Succession)
		if err == nil || errors.Is(err, ErrBrokenLine) || pause(c.base, try) != nil {
			break
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		r.Old = p.newest
		return false, err
	}
	r.Old, r.New = p.trusted[e.Version-1], p.trusted[e.Version]
	return false, nil
}

// checkUnpinned checks what an event shows by itself.
func checkUnpinned(r *Rotation) error {
	e := &r.Event
	if e.Succession == nil {
		_, err := eddsa.ParsePublicKey(e.PublicKey[:])
		return err
	}
	doc, err := parseStep(*e.Succession)
	if err != nil {
		return fmt.Errorf("%w: %q: %w", ErrBrokenLine, ijson.Clip(e.Key), err)
	}
	step := doc.Succession
	if step.Key != e.Key || step.Version != e.Version || step.New != e.PublicKey {
		return fmt.Errorf("%w: %q: the step is to another version or key than the event says", ErrBrokenLine, ijson.Clip(e.Key))
	}
	if err := eddsa.Verify(step.Old[:], doc.Message, e.Succession.Signature); err != nil {
		return fmt.Errorf("%w: %q: the step to version %d: %w", ErrBrokenLine, ijson.Clip(e.Key), e.Version, err)
	}
	r.Old, r.New = Line{Key: e.Key, Version: e.Version - 1, PublicKey: step.Old}, after(step)
	return nil
}

// acknowledge tells the appliance that the application knows, if it does: because it has configured the version itself, or because it
// was told. Where that fails the event comes again.
func (c *Client) acknowledge(e *wire.Rotation, known bool) {
	told := c.config.OnRotation != nil || c.pins[e.Key] != nil
	if e.Key == wire.NoiseKey {
		told = c.config.OnServerKey != nil
	}
	if known || told && !c.config.Unacknowledged {
		ctx, cancel := context.WithTimeout(c.base, time.Minute)
		defer cancel()
		c.Acknowledge(ctx, e.Key, e.Version)
	}
}

// serverKeys are the listener's keys, as far as they are known: two while one replaces the other.
type serverKeys struct {
	mu         sync.Mutex
	used       [32]byte // by the last connection
	old, young [32]byte // young is zero where no other key is known
	from       time.Time
	until      time.Time // when the old one ends
	generation uint64    // of the last authorization
}

// order says which keys to try at a connection, the likelier one first.
func (k *serverKeys) order(now time.Time) [][32]byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case k.young == [32]byte{}:
		return [][32]byte{k.old}
	case !now.Before(k.until):
		return [][32]byte{k.young}
	case now.Before(k.from):
		return [][32]byte{k.old, k.young}
	}
	return [][32]byte{k.young, k.old}
}

func (k *serverKeys) worked(key [32]byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.used = key
}

// replaceServerKey checks an event about the Noise key and keeps the new key for the connections to come. A newer event takes the
// place of one before.
func (c *Client) replaceServerKey(r *Rotation) (known bool, err error) {
	k, e := &c.serverKeys, &r.Event
	if _, err := c.config.Identity.Exchange(c.base, e.PublicKey); err != nil {
		return false, fmt.Errorf("%w: %w", ErrWrongAnswer, err) // a point of low order
	}
	k.mu.Lock()
	if c.config.ServerIdentity != [32]byte{} {
		if err := k.authorized(c.config.ServerIdentity, e); err != nil {
			k.mu.Unlock()
			return false, err
		}
	}
	if e.PublicKey != k.young {
		k.old, k.young = k.used, e.PublicKey
		if k.used == e.PublicKey {
			k.young = [32]byte{}
		}
	}
	k.from, k.until = r.ActivatesAt, r.RetiresAt
	if e.Compromised {
		k.until = time.Time{} // who has the old key can pose as the appliance
	}
	k.mu.Unlock()
	r.New = Line{Key: e.Key, Version: e.Version, PublicKey: e.PublicKey}
	if known = e.PublicKey == c.config.ServerKey; !known && c.config.OnServerKey != nil {
		c.config.OnServerKey(e.PublicKey)
	}
	return known, nil
}

// authorized is called with the lock held.
func (k *serverKeys) authorized(identity [32]byte, e *wire.Rotation) error {
	if e.Authorization == nil {
		return fmt.Errorf("%w: there is no authorization", ErrUnauthorized)
	}
	key, generation, err := AuthorizedServerKey(identity, *e.Authorization, k.generation)
	if err == nil && key != e.PublicKey {
		err = fmt.Errorf("%w: the authorization is for another key", ErrUnauthorized)
	}
	if err == nil {
		k.generation = generation
	}
	return err
}

// AuthorizedServerKey checks a paykit-noise-key-authorization-v1 and returns the X25519 key that it lets speak for an identity, an
// Ed25519 key, and its generation. One of a lower generation than least is an old one and refused: keep the highest. Errors wrap
// ErrUnauthorized.
func AuthorizedServerKey(identity [32]byte, a wire.Authorization, least uint64) (key [32]byte, generation uint64, err error) {
	// The times are not in what is signed: any will do.
	doc, err := transcript.Parse(transcript.Request{Type: "paykit-noise-key-authorization-v1", Payload: a.Payload, ExpiresAt: 1})
	if err != nil {
		return key, 0, fmt.Errorf("%w: %w", ErrUnauthorized, err)
	}
	if err := doc.CheckSigner(identity[:]); err != nil {
		return key, 0, fmt.Errorf("%w: its owner is another identity", ErrUnauthorized)
	}
	if err := eddsa.Verify(identity[:], doc.Message, a.Signature); err != nil {
		return key, 0, fmt.Errorf("%w: %w", ErrUnauthorized, err)
	}
	switch {
	case doc.NoiseStatic == nil:
		return key, 0, fmt.Errorf("%w: it has no noise_static_public_key", ErrUnauthorized)
	case *doc.Generation < least:
		return key, 0, fmt.Errorf("%w: it is of generation %d, and one of generation %d is known", ErrUnauthorized, *doc.Generation, least)
	}
	return *doc.NoiseStatic, *doc.Generation, nil
}

// Stay connects where there is no connection, keeps it busy enough not to be closed, and returns why it has ended. With it, in a loop
// that waits a little between two tries, an application hears of rotations as they are announced; without it, at its next request.
func (c *Client) Stay(ctx context.Context) error {
	conn, err := c.connection(ctx)
	if err != nil {
		return err
	}
	beat := time.NewTicker(time.Minute)
	defer beat.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-conn.ended:
			return conn.err
		case <-beat.C:
		}
		patience, cancel := context.WithTimeout(ctx, 30*time.Second)
		_, _, err := conn.roundTrip(patience, func(id string) any { return wire.Ping{ID: id, Op: wire.OpPing} })
		cancel()
		if err != nil && ctx.Err() == nil {
			conn.fail(err)
		}
	}
}
