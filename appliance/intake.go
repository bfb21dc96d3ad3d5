package appliance

import (
	"context"
	"errors"
	"fmt"
	"time"

	"countersign/audit"
	"countersign/internal/eddsa"
	"countersign/internal/keyring"
	"countersign/internal/meter"
	"countersign/internal/peers"
	"countersign/internal/requestid"
	"countersign/noise"
	"countersign/transcript"
	"countersign/wire"
)

// Before one byte of a message's JSON is read, the message has
//
//   - a place in its connection (Limits.InFlight): see serveSession;
//   - the pace of its peer, in messages and bytes: see read. Until then the message is left in the
//     connection, so TCP slows the peer down, and no memory is used for the message;
//   - a place among the requests that are served: see take. Without a place the message is read
//     only for its id, and answered as busy or rate_limited;
//   - the turn of its peer at the processor: see turn. The turns leave a processor to everything
//     else, and peers that wait get equal shares by bytes.

// turnBytes is the size of a turn at the processor: some ten documents of usual length.
const turnBytes = 4096

// checkBytes is the cost of the check of a signature, in bytes of JSON that take as long to read.
const checkBytes = 2048

// taken is a message that has been read.
type taken struct {
	id      string // of the peer
	request string // of the appliance; see package requestid
	body    any    // a request of package wire, *wire.Error for a message that is none, or limited
	places  int    // counted by peers.Registry
	walk    *meter.Walk
}

// limited is the error of a request beyond a limit of its peer, or of all peers.
type limited struct{ error }

func (l limited) Unwrap() error { return l.error }

// read reads a message. The first byte must come within a time, the message within the read
// timeout, and both before stop ends. Between the header and the rest of the message, read waits
// for pace. A nil pace does not wait.
func (a *Appliance) read(
	stop context.Context, conn *noise.Conn, within time.Duration, pace func(length int) error,
) ([]byte, error) {
	within, begun := min(within, a.limits.ReadTimeout), within
	deadline := func(limit time.Duration) error {
		conn.SetReadDeadline(time.Now().Add(limit))
		return stop.Err() // after SetReadDeadline, which may have replaced the deadline of stop
	}
	if err := deadline(begun); err != nil {
		return nil, err
	}
	if err := conn.Await(); err != nil {
		return nil, err
	}
	if err := deadline(within); err != nil {
		return nil, err
	}
	if pace != nil {
		length, err := conn.Next()
		if err != nil {
			return nil, err
		}
		if err := pace(length); err != nil {
			return nil, err
		}
		if err := deadline(within); err != nil {
			return nil, err
		}
	}
	return conn.ReadMessage()
}

// pace waits for the pace of a peer. A wait is counted in an event.
func (a *Appliance) pace(ctx context.Context, s *session, length int) error {
	held, err := s.Member.Pace(ctx, length)
	if held {
		a.refusals.count(audit.RateLimitTriggered, "read", s.caller.Name, wire.CodeRateLimited)
	}
	return err
}

// take reads the JSON of a message. The error is that of ctx, or peers.ErrGone for a peer that was
// excluded with messages still in the buffer.
func (a *Appliance) take(ctx context.Context, s *session, message []byte) (r taken, err error) {
	r.request = requestid.New()
	r.walk = a.meter.Begin()
	refused := a.Peers.Begin(s.Session, 1)
	if refused == nil {
		r.places = 1
	}
	if errors.Is(refused, peers.ErrGone) {
		return r, refused
	}
	release, err := a.turn(ctx, s.caller, len(message))
	if err != nil {
		a.Peers.End(s.Member, r.places)
		return r, err
	}
	id, body, malformed := wire.Parse(message, a.limits.BatchItems)
	release()
	r.walk.Trace(a.traces.Begin(wire.ContextOf(body), r.request))
	batch, is := body.(*wire.Batch)
	if is && refused == nil { // the batch has one place, and needs one for each item
		if refused = a.Peers.More(s.Session, len(batch.Items)-1); refused == nil {
			r.places = len(batch.Items)
		}
		if errors.Is(refused, peers.ErrGone) {
			a.Peers.End(s.Member, r.places)
			return taken{}, refused
		}
	}
	switch r.id, r.body = id, body; {
	case refused != nil:
		a.Peers.End(s.Member, r.places)
		r.body, r.places = limited{refused}, 0
	case malformed != nil:
		r.body = malformed
	}
	return r, nil
}

// turn waits for a peer's turn at the processor, for a cost in bytes.
func (a *Appliance) turn(ctx context.Context, who Caller, cost int) (release func(), err error) {
	return a.processor.AcquireCost(ctx, string(keyring.LaneOf(who.Name)), cost)
}

// parse parses the document of a request in the peer's turn.
func (a *Appliance) parse(ctx context.Context, who Caller, d wire.Document) (*transcript.Document, error) {
	who.walk.Enter(meter.Decode)
	release, err := a.turn(ctx, who, len(d.Payload))
	if err != nil {
		return nil, err
	}
	defer release()
	return transcript.Parse(documentOf(d))
}

// check verifies the signature of a document in the peer's turn.
func (a *Appliance) check(ctx context.Context, who Caller, d *transcript.Document, r *wire.Verify) error {
	who.walk.Enter(meter.Verify)
	release, err := a.turn(ctx, who, checkBytes)
	if err != nil {
		return err
	}
	defer release()
	if err := eddsa.Verify(r.PublicKey[:], d.Message, r.Signature); err != nil {
		return fmt.Errorf("%w: %w", errInvalidSignature, err)
	}
	return nil
}
