package appliance

import (
	"context"
	"errors"
	"strconv"
	"sync"
	"time"

	"countersign/audit"
	"countersign/internal/ijson"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/peers"
	"countersign/wire"
)

// retryAfter is what a peer is told that came too often, in seconds.
const retryAfter = 1

// busyTime is how long a peer waits for the answer that it asks too much. A peer that asks again at once
// would otherwise cost the processor more than the peers that are served.
const busyTime = 100 * time.Millisecond

// handle answers one request. Without an answer, nil, the connection ends: after a fatal error, and for
// a peer that is kept out.
func (a *Appliance) handle(s *session, message []byte) []byte {
	// Not the connection's context: an admitted request is finished, even if the peer has gone or the
	// daemon stops.
	ctx, cancel := context.WithTimeout(context.Background(), a.limits.RequestTimeout)
	defer cancel()
	id, request, malformed := wire.Parse(message, a.limits.BatchItems)
	weight := 1
	batch, isBatch := request.(*wire.Batch)
	if isBatch {
		weight = len(batch.Items)
	}
	err := a.Peers.Begin(s.Member, weight)
	if errors.Is(err, peers.ErrGone) {
		return nil // removed, with messages still in the buffer
	}
	if err != nil {
		_, refusal := refuse(err)
		a.refusals.count(audit.RateLimitTriggered, "request", s.caller.Name, refusal.Code)
		pause(ctx, busyTime)
		return wire.EncodeAnswer(id, nil, refusal)
	}
	defer a.Peers.End(s.Member, weight)
	if malformed != nil {
		return wire.EncodeAnswer(id, nil, a.unreadable(s, malformed.(*wire.Error)))
	}
	if isBatch {
		answers, ok := a.batch(ctx, s, batch)
		if !ok {
			return nil
		}
		return wire.EncodeAnswer(id, answers, nil)
	}
	result, refusal, ok := a.serve(ctx, s, nil, request)
	if !ok {
		return nil
	}
	return wire.EncodeAnswer(id, result, refusal)
}

// unreadable refuses a message that is no request. It costs the log no more than other refusals.
func (a *Appliance) unreadable(s *session, refusal *wire.Error) *wire.Error {
	if s.Member.Refusals.Tokens() < 1 {
		a.refusals.count(audit.SignatureRejected, "request", s.caller.Name, refusal.Code)
		return refusal
	}
	s.Member.Refusals.Reserve()
	a.log.Info("refused", "peer", s.caller.Name, "code", refusal.Code, "err", refusal.Message)
	return refusal
}

// serve carries out one request. It is not ok after a fatal error.
func (a *Appliance) serve(ctx context.Context, s *session, member *ledger.Member, request any) (result any, refusal *wire.Error, ok bool) {
	began := time.Now()
	who := s.caller
	who.member = member
	who.quiet = s.Member.Refusals.Tokens() < 1
	var op, key string
	var err error
	switch r := request.(type) {
	case *wire.Ping:
		op, result = wire.OpPing, wire.Pong{Service: "countersign", Time: began.Unix()}
	case *wire.Keys:
		op, result = wire.OpKeys, a.Keys.Listed()
	case *wire.Sign:
		op, key = wire.OpSign, r.Key
		result, err = a.Sign(ctx, who, r)
	case *wire.Verify:
		op, key = wire.OpVerify, r.KeyName()
		result, err = a.Verify(ctx, who, r)
	case *wire.Proof:
		op = wire.OpProof
		result, err = a.Proof(ctx, who, r.Event)
	case *wire.Line:
		op, key = wire.OpLine, r.Key
		result, err = a.Keys.Steps(r)
	case *wire.Ack:
		op, key = wire.OpAck, r.Key
		result, err = a.Acknowledge(ctx, who, r)
	case *wire.Error: // an item of a batch that has no sound form
		return nil, r, true
	}
	if err == nil {
		a.log.Debug("served", "peer", s.caller.Name, "op", op, "key", key, "took", time.Since(began))
		return result, nil, true
	}
	member.Leave(ctx) // the others need not wait until the refusal is written down
	c, refusal := refuse(err)
	if !who.quiet {
		s.Member.Refusals.Reserve() // a debt where there are several at once
	}
	switch {
	case c == refused && who.quiet:
		a.refusals.count(refusalType(refusal.Code), op, who.Name, refusal.Code)
	case c == refused:
		a.log.Info("refused", "peer", who.Name, "op", op, "key", ijson.Clip(key), "code", refusal.Code, "err", err)
		if err := a.recordRefusal(ctx, who, op, key, refusal.Code, err); err != nil {
			c, refusal = refuse(err)
		}
	case c == unavailable && who.quiet: // the log has enough of that
	default:
		a.log.Error("not served", "peer", who.Name, "op", op, "key", ijson.Clip(key), "code", refusal.Code, "err", err)
	}
	return nil, refusal, c != fatal
}

// refusalType is the type of the event that says that a request was refused.
func refusalType(code string) audit.Type {
	if code == wire.CodeReplay {
		return audit.ReplayRefused
	}
	return audit.SignatureRejected
}

// batch carries out the items at once. Their admissions share a commit, and each item has an answer of
// its own, in their order.
func (a *Appliance) batch(ctx context.Context, s *session, b *wire.Batch) (wire.Answers, bool) {
	answers := wire.Answers{Answers: make([]wire.ItemAnswer, len(b.Items))}
	group := a.ledger.Group(len(b.Items))
	var serving sync.WaitGroup
	var failed sync.Once
	fine := true
	for i, item := range b.Items {
		serving.Go(func() {
			member := group.Member()
			defer member.Leave(ctx) // if nothing was admitted
			result, refusal, ok := a.serve(ctx, s, member, item)
			if !ok {
				failed.Do(func() { fine = false })
				return
			}
			answers.Answers[i] = wire.NewItemAnswer(result, refusal)
		})
	}
	serving.Wait()
	return answers, fine
}

// recordRefusal writes the event of a refusal down, unless the ledger has done so with its verdict. A
// request without a sound form says nothing that is worth keeping.
func (a *Appliance) recordRefusal(ctx context.Context, who Caller, op, key, code string, err error) error {
	formless := code == wire.CodeMalformed || code == wire.CodeUnsupported || code == wire.CodeTooLarge
	if formless || errors.As(err, new(writtenDown)) {
		return nil
	}
	if keystore.CheckName(key) != nil && key != "" {
		key = strconv.QuoteToASCII(ijson.Clip(key)) // no key of ours, but any text of the peer
	}
	return a.record(ctx, audit.NewRejection(who.actor(), op, key, code))
}
