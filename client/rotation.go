package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"countersign/internal/eddsa"
	"countersign/internal/ijson"
	"countersign/internal/pubkey"
	"countersign/transcript"
	"countersign/wire"
)

// NoiseKey is Rotation.Key in a rotation of the listener's own key.
const NoiseKey = wire.NoiseKey

// Rotation is the event that a key gets a new version.
type Rotation struct {
	Key string // or NoiseKey
	// Old and New are the line before and after the rotation. For an unpinned line, Old is zero
	// unless the event has the step. For the Noise key, only New.Version and New.PublicKey are set.
	Old, New KeyLine
	// ActivatesAt is the time when the new version begins to sign. RetiresAt is the latest time
	// when the old version is accepted. Both are by the appliance's clock.
	ActivatesAt, RetiresAt time.Time
	// Cancelled is the version whose announcement the appliance has called off; 0: none. New is
	// then the version that stays active, or zero where that is older than the pinned one. The
	// version called off stays the successor: a later rotation leads to it. Both Noise keys go on
	// answering.
	Cancelled uint32
	// Err is the reason why the rotation must not be trusted, or could not be checked. With an Err,
	// New is zero, Old is the pinned line, and the rotation is not acknowledged.
	Err error
	// Event is the event as the appliance has sent it.
	Event wire.Rotation
}

// Compromise is the event that the private key of a version may be in other hands: no signature of
// the version must be trusted any more, whenever it was made.
type Compromise struct {
	Key       string // or NoiseKey
	Version   uint32
	PublicKey [32]byte
}

// The bounds of the event queue, for an appliance that floods the client.
const (
	maxWaiting   = 512  // queued events, one for each key; the appliance sends the others again
	maxDelivered = 4096 // keys whose last delivered event is remembered, and compromises
)

// eventQueue holds events on their way to the application. The readers of connections put events
// in, and one goroutine takes events out. The goroutine ends when the queue is empty.
type eventQueue struct {
	mu      sync.Mutex
	queue   []string                  // keys with a waiting event, oldest first
	waiting map[string]*wire.Rotation // the newest event of each key
	running bool                      // the goroutine runs
	// compromises are delivered before all rotations.
	compromises []wire.Compromise
	// told has the compromises of which the application was told. A channel is closed when
	// OnCompromise has returned.
	told map[Compromise]chan struct{}

	// delivered is the last delivered event of each key, for the goroutine only.
	delivered map[string]*wire.Rotation
}

// older reports that the appliance has sent a before b: the order is that of Change, then that of
// the versions.
func older(a, b *wire.Rotation) bool {
	return cmp.Or(cmp.Compare(a.Change, b.Change), cmp.Compare(a.Version, b.Version)) < 0
}

// enqueue puts an event into the queue. The call never blocks. A compromised version is distrusted
// at once: the reader of the connection has not read the next answer yet.
func (c *Client) enqueue(event any) {
	q := &c.events
	if e, is := event.(*wire.Compromise); is {
		if e.Key == wire.NoiseKey {
			c.serverKeys.distrust(e.PublicKey)
		} else if p := c.pins[e.Key]; p != nil {
			p.distrust(e.Version)
		}
		q.mu.Lock()
		defer q.mu.Unlock()
		if c.base.Err() == nil && len(q.compromises) < maxWaiting {
			q.compromises = append(q.compromises, *e)
			c.run()
		}
		return
	}
	e := event.(*wire.Rotation)
	q.mu.Lock()
	defer q.mu.Unlock()
	before := q.waiting[e.Key]
	switch {
	case c.base.Err() != nil, before != nil && older(e, before):
		return
	case before == nil && len(q.queue) >= maxWaiting:
		return
	case before == nil:
		q.queue = append(q.queue, e.Key)
	}
	if q.waiting == nil {
		q.waiting, q.delivered = map[string]*wire.Rotation{}, map[string]*wire.Rotation{}
	}
	q.waiting[e.Key] = e
	c.run()
}

// run starts the goroutine of the queue. The caller holds the queue's lock.
func (c *Client) run() {
	if !c.events.running {
		c.events.running = true
		go c.deliverAll()
	}
}

// deliverAll delivers queued events, one after the other, until the queue is empty or the client is
// closed.
func (c *Client) deliverAll() {
	q := &c.events
	for {
		q.mu.Lock()
		if len(q.queue)+len(q.compromises) == 0 || c.base.Err() != nil {
			q.running = false
			q.mu.Unlock()
			return
		}
		if len(q.compromises) > 0 {
			e := q.compromises[0]
			q.compromises = q.compromises[1:]
			q.mu.Unlock()
			c.deliverCompromise(e)
			continue
		}
		e := q.waiting[q.queue[0]]
		delete(q.waiting, e.Key)
		q.queue = q.queue[1:]
		q.mu.Unlock()
		c.deliver(e)
	}
}

// deliverCompromise tells the application of a compromise, and acknowledges. Without an
// OnCompromise, nobody has taken notice.
func (c *Client) deliverCompromise(e wire.Compromise) {
	if c.config.OnCompromise == nil {
		return
	}
	select {
	case <-c.tellOnce(Compromise{e.Key, e.Version, e.PublicKey}):
	case <-c.base.Done():
		return
	}
	if !c.config.Unacknowledged {
		ctx, cancel := context.WithTimeout(c.base, time.Minute)
		defer cancel()
		c.AcknowledgeCompromise(ctx, e.Key, e.Version) // after a failure the appliance sends the event again
	}
}

// telling is the context key of the client that calls OnCompromise.
type telling struct{}

// tellOnce calls OnCompromise, unless a call for the same version has begun. The result is closed
// when the call has returned.
func (c *Client) tellOnce(v Compromise) <-chan struct{} {
	q := &c.events
	q.mu.Lock()
	if done := q.told[v]; done != nil {
		q.mu.Unlock()
		return done
	}
	if q.told == nil {
		q.told = map[Compromise]chan struct{}{}
	}
	if len(q.told) >= maxDelivered {
		for other := range q.told { // any: at worst the application is told twice
			delete(q.told, other)
			break
		}
	}
	done := make(chan struct{})
	q.told[v] = done
	q.mu.Unlock()
	defer close(done)
	if c.base.Err() == nil {
		c.config.OnCompromise(context.WithValue(c.base, telling{}, c), v)
	}
	return done
}

// deliver checks one event, delivers the rotation to the application, and acknowledges.
func (c *Client) deliver(e *wire.Rotation) {
	if last := c.events.delivered[e.Key]; last != nil && older(e, last) {
		return // an old event again
	} else if last != nil && !c.config.Unacknowledged && sameEvent(e, last) {
		c.acknowledge(e, false) // the first acknowledgement was lost
		return
	}
	r := Rotation{
		Key: e.Key, Cancelled: e.Cancelled, Event: *e,
		ActivatesAt: time.Unix(e.ActivatesAt, 0), RetiresAt: time.Unix(e.RetiresAt, 0),
	}
	configured, err := false, error(nil)
	if e.Key == wire.NoiseKey {
		configured, err = c.replaceServerKey(&r)
	} else {
		configured, err = c.replaceVersion(&r)
	}
	if c.base.Err() != nil || errors.Is(err, errStale) {
		return
	}
	if err != nil {
		r.New, r.Err = KeyLine{}, err
	}
	if !configured && c.config.OnRotation != nil {
		c.config.OnRotation(r)
	}
	if err != nil {
		// The appliance sends the event again at the next connection, which may be far.
		if !final(err) && e.Key != wire.NoiseKey {
			time.AfterFunc(deliverAgain, func() { c.enqueue(e) })
		}
		return
	}
	if delivered := c.events.delivered; len(delivered) >= maxDelivered && delivered[e.Key] == nil {
		for key := range delivered { // any key: at worst its event is delivered twice
			delete(delivered, key)
			break
		}
	}
	c.events.delivered[e.Key] = e
	c.acknowledge(e, configured)
}

func sameEvent(a, b *wire.Rotation) bool {
	return string(wire.EncodeRotation(*a)) == string(wire.EncodeRotation(*b))
}

// deliverAgain is the time after which an event is delivered again whose line could not be
// followed, such as that of a peer at its limit of requests.
const deliverAgain = 5 * time.Second

// final reports that no retry cures the error of a line.
func final(err error) bool { return errors.Is(err, ErrBrokenLine) || errors.Is(err, ErrCompromised) }

// errStale marks an event of a version older than the pinned one.
var errStale = errors.New("an old event")

// replaceVersion checks an event of a signing key, and follows the line where the key is pinned.
// The result configured says that the application has pinned this very version.
func (c *Client) replaceVersion(r *Rotation) (configured bool, err error) {
	e := &r.Event
	p := c.pins[e.Key]
	if p == nil {
		r.New = KeyLine{Key: e.Key, Version: e.Version, PublicKey: e.PublicKey}
		return false, checkUnpinned(r)
	}
	if e.Cancelled != 0 && e.Cancelled == p.first { // the line was pinned while its version was announced
		return false, nil
	}
	if e.Version < p.first {
		return false, errStale
	}
	if e.Version == p.first {
		_, _, err := p.lookup(e.Version, e.PublicKey)
		if r.Old, _ = c.Pinned(e.Key); err == nil && e.Cancelled != 0 {
			r.New = p.at(e.Version)
		}
		return err == nil && e.Cancelled == 0, err // the application has pinned it, and has heard of another
	}
	for try := range 6 {
		err = c.checkVersion(c.base, e.Key, e.Version, e.PublicKey)
		if err == nil || final(err) || backoff(c.base, try) != nil {
			break
		}
	}
	if err != nil {
		r.Old, _ = c.Pinned(e.Key)
		return false, err
	}
	r.Old, r.New = p.before(e.Version), p.at(e.Version)
	return false, nil
}

// checkUnpinned checks an event of an unpinned key by the content of the event alone.
func checkUnpinned(r *Rotation) error {
	e := &r.Event
	if e.Succession == nil {
		_, err := eddsa.ParsePublicKey(e.PublicKey[:])
		return err
	}
	broken := func(err error) error { return fmt.Errorf("%w: %q: %w", ErrBrokenLine, ijson.Clip(e.Key), err) }
	doc, err := parseStep(*e.Succession)
	if err != nil {
		return broken(err)
	}
	step := doc.Succession
	if step.Key != e.Key || step.Version != e.Version || step.New != e.PublicKey {
		return broken(errors.New("the step is to another version or key than the event says"))
	}
	if err := eddsa.Verify(doc.Signers[0], doc.Message, e.Succession.Signature); err != nil {
		return broken(fmt.Errorf("the step to version %d: %w", e.Version, err))
	}
	r.New = after(step)
	if !step.Recovered { // which names no version before
		r.Old = KeyLine{Key: e.Key, Version: e.Version - 1, PublicKey: step.Old}
	}
	return nil
}

// acknowledge acknowledges a rotation that the application has configured, that the application was
// told of, or whose line is pinned. After a failure the appliance sends the event again.
func (c *Client) acknowledge(e *wire.Rotation, configured bool) {
	known := c.config.OnRotation != nil || c.pins[e.Key] != nil
	if e.Key == wire.NoiseKey {
		known = c.config.OnServerKey != nil
	}
	if configured || known && !c.config.Unacknowledged {
		ctx, cancel := context.WithTimeout(c.base, time.Minute)
		defer cancel()
		c.Acknowledge(ctx, *e)
	}
}

// serverKeys are the known keys of the listener: one, or two during a rotation.
type serverKeys struct {
	mu         sync.Mutex
	used       [32]byte  // by the last connection
	old, young [32]byte  // young is zero outside a rotation
	from       time.Time // the young key activates
	until      time.Time // the old key retires
	generation uint64    // of the last authorization

	compromised map[[32]byte]bool // a thief of such a key can pose as the appliance
}

// order returns the keys to try for a connection, the likelier one first, without the compromised
// ones.
func (k *serverKeys) order(now time.Time) [][32]byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.DeleteFunc(k.known(now), func(key [32]byte) bool { return k.compromised[key] })
}

// known returns the keys that the appliance may have at this time. The caller holds mu.
func (k *serverKeys) known(now time.Time) [][32]byte {
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

// distrust notes that a key is compromised.
func (k *serverKeys) distrust(key [32]byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.compromised == nil {
		k.compromised = map[[32]byte]bool{}
	}
	if len(k.compromised) < maxDelivered {
		k.compromised[key] = true
	}
}

func (k *serverKeys) worked(key [32]byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.used = key
}

// take takes the key of an event. When an announcement was called off, both keys go on answering,
// and the key of the event is to be preferred. The caller holds the lock.
func (k *serverKeys) take(r *Rotation) {
	e := &r.Event
	if e.Cancelled != 0 {
		if k.used != e.PublicKey {
			k.young = k.used
		} else if k.young == e.PublicKey {
			k.young = [32]byte{}
		}
		k.old, k.from, k.until = e.PublicKey, forever, forever
		return
	}
	if e.PublicKey != k.young {
		k.old, k.young = k.used, e.PublicKey
		if k.used == e.PublicKey {
			k.young = [32]byte{}
		}
	}
	k.from, k.until = r.ActivatesAt, r.RetiresAt
}

// forever is later than any time of an event.
var forever = time.Unix(1<<40, 0)

// replaceServerKey checks an event of the Noise key, and takes the new key for the next
// connections. A newer event replaces an older one. The result configured says that the new key is
// ServerKey.
func (c *Client) replaceServerKey(r *Rotation) (configured bool, err error) {
	k, e := &c.serverKeys, &r.Event
	if err := pubkey.CheckX25519(e.PublicKey[:]); err != nil {
		return false, fmt.Errorf("%w: %w", ErrWrongAnswer, err)
	}
	k.mu.Lock()
	if c.config.ServerIdentity != [32]byte{} {
		if err := k.authorize(c.config.ServerIdentity, e); err != nil {
			k.mu.Unlock()
			if e.Cancelled != 0 { // the client keeps both keys; the appliance sends it again, authorized anew
				err = errStale
			}
			return false, err
		}
	}
	k.take(r)
	generation := k.generation
	k.mu.Unlock()
	r.New = KeyLine{Key: e.Key, Version: e.Version, PublicKey: e.PublicKey}
	// An application that is told of an end has heard of another key before.
	configured = e.PublicKey == c.config.ServerKey && e.Cancelled == 0
	if !configured && c.config.OnServerKey != nil {
		c.config.OnServerKey(e.PublicKey, generation)
	}
	return configured, nil
}

// authorize checks the authorization of a new Noise key. The caller holds the lock.
func (k *serverKeys) authorize(identity [32]byte, e *wire.Rotation) error {
	if e.Authorization == nil {
		return fmt.Errorf("%w: the event has no authorization", ErrUnauthorized)
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

// AuthorizedServerKey checks a paykit-noise-key-authorization-v1 by an identity, which is an
// Ed25519 key. The result is the authorized X25519 key and the generation of the authorization. A
// generation below least is refused as outdated: store the highest one seen. Errors wrap
// ErrUnauthorized.
func AuthorizedServerKey(
	identity [32]byte, a wire.Authorization, least uint64,
) (key [32]byte, generation uint64, err error) {
	// The signed bytes have no times, so any ExpiresAt parses.
	doc, err := transcript.Parse(transcript.Request{
		Type: "paykit-noise-key-authorization-v1", Payload: a.Payload, ExpiresAt: 1,
	})
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
		return key, 0, fmt.Errorf("%w: it is of generation %d, outdated by generation %d",
			ErrUnauthorized, *doc.Generation, least)
	}
	return *doc.NoiseStatic, *doc.Generation, nil
}

// Stay connects the client if necessary, pings once a minute to keep the connection from being
// closed, and returns the reason when the connection has ended. An application that calls Stay in a
// goroutine, in a loop with a pause, gets rotations and compromises as soon as the appliance
// announces them:
//
//	for err := error(nil); !errors.Is(err, client.ErrClosed); time.Sleep(time.Second) {
//		err = c.Stay(ctx)
//	}
//
// Other applications get them at their next request.
func (c *Client) Stay(ctx context.Context) error {
	conn, err := c.connection(ctx)
	if err != nil {
		return err
	}
	heartbeat := time.NewTicker(time.Minute)
	defer heartbeat.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-conn.ended:
			return conn.err
		case <-heartbeat.C:
		}
		timeout, cancel := context.WithTimeout(ctx, 30*time.Second)
		ping := func(id string) any { return wire.Ping{ID: id, Op: wire.OpPing} }
		_, _, err := conn.roundTrip(timeout, wire.Trace{}, ping)
		cancel()
		if err != nil && ctx.Err() == nil {
			conn.fail(err)
		}
	}
}
