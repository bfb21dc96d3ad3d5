package appliance

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"countersign/audit"
	"countersign/internal/ijson"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/wire"
)

// errBusy and errRate refuse before anything is done.
var (
	errBusy = errors.New("too many requests are being served")
	errRate = errors.New("too many requests a second")
)

// retryAfter is what a peer is told that came too often, in seconds.
const retryAfter = 1

// busyTime is how long a peer waits to be told that it asks too much. Who asks again at once would otherwise cost the processor more
// than those who are served.
const busyTime = 100 * time.Millisecond

// handle answers one request. Without an answer, nil, the connection ends: after a fatal error, and for a peer that is kept out.
func (a *Appliance) handle(s *session, message []byte) []byte {
	// Not the connection's context: what has been admitted is finished, even if the peer has gone or the daemon stops.
	ctx, cancel := context.WithTimeout(inLane(context.Background(), string(s.peer.PublicKey[:])), a.limits.RequestTimeout)
	defer cancel()
	id, request, malformed := wire.Parse(message, a.limits.BatchItems)
	weight := 1
	batch, isBatch := request.(*wire.Batch)
	if isBatch {
		weight = len(batch.Items)
	}
	in, err := a.begin(s.member, weight)
	if !in {
		return nil // removed, with messages still in the buffer
	}
	if err != nil {
		_, refusal := refuse(err)
		a.refusals.count(audit.RateLimitTriggered, "request", s.peer.Name, refusal.Code)
		pause(ctx, busyTime)
		return wire.EncodeAnswer(id, nil, refusal)
	}
	defer a.end(s.member, weight)
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

// unreadable deals with what is no request. It costs the log no more than other refusals.
func (a *Appliance) unreadable(s *session, refusal *wire.Error) *wire.Error {
	if s.member.refusals.Tokens() < 1 {
		a.refusals.count(audit.SignatureRejected, "request", s.peer.Name, refusal.Code)
		return refusal
	}
	s.member.refusals.Reserve()
	a.log.Info("refused", "peer", s.peer.Name, "code", refusal.Code, "err", refusal.Message)
	return refusal
}

// serve carries out one request. It is not ok after a fatal error.
func (a *Appliance) serve(ctx context.Context, s *session, member *ledger.Member, request any) (result any, refusal *wire.Error, ok bool) {
	began := time.Now()
	who := s.peer
	who.member = member
	who.quiet = s.member.refusals.Tokens() < 1
	var op, key string
	var err error
	switch r := request.(type) {
	case *wire.Ping:
		op, result = wire.OpPing, wire.Pong{Service: "countersign", Time: began.Unix()}
	case *wire.Keys:
		op, result = wire.OpKeys, a.signingKeys()
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
		result, err = a.Steps(r)
	case *wire.Ack:
		op, key = wire.OpAck, r.Key
		result, err = a.Acknowledge(ctx, who, r)
	case *wire.Error: // an item of a batch that has no sound form
		return nil, r, true
	}
	if err == nil {
		a.log.Debug("served", "peer", s.peer.Name, "op", op, "key", key, "took", time.Since(began))
		return result, nil, true
	}
	member.Leave(ctx) // the others need not wait until the refusal is written down
	c, refusal := refuse(err)
	if !who.quiet {
		s.member.refusals.Reserve() // a debt where there are several at once
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

// batch carries out the items at once. Their admissions share a commit, each has an answer of its own, in their order.
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

// begin lets a peer's requests be served, unless there are too many; in is false for one that is kept out.
func (a *Appliance) begin(m *member, n int) (in bool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case !m.in():
		return false, nil
	case m.requests+n > a.limits.RequestsPerPeer:
		return true, fmt.Errorf("%w for this peer", errBusy)
	case a.requests+n > a.limits.Requests && m.requests > 0: // who has none gets in, or a few peers could keep all others out
		return true, errBusy
	case !m.pace.AllowN(time.Now(), n):
		return true, errRate
	}
	m.seen = time.Now()
	m.requests += n
	a.requests += n
	return true, nil
}

func (a *Appliance) end(m *member, n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	m.requests -= n
	a.requests -= n
}

// recordRefusal writes a refusal of its own down, unless the ledger has done so with its verdict. What has no sound form says nothing that
// is worth keeping.
func (a *Appliance) recordRefusal(ctx context.Context, who Peer, op, key, code string, err error) error {
	if errors.As(err, new(writtenDown)) || code == wire.CodeMalformed || code == wire.CodeUnsupported || code == wire.CodeTooLarge {
		return nil
	}
	if keystore.CheckName(key) != nil && key != "" {
		key = strconv.QuoteToASCII(ijson.Clip(key)) // no key of ours: whatever the peer has written
	}
	return a.record(ctx, audit.Event{Type: audit.SignatureRejected, Actor: who.actor(), Action: op, Resource: key, Outcome: code})
}

// signingKeys lists what peers may see: the keys that sign, without what is past: see Steps for that. All enrolled peers see all of them; policy
// decides about use.
func (a *Appliance) signingKeys() wire.KeyList {
	list := wire.KeyList{Keys: []wire.Key{}}
	for _, k := range a.Keys() {
		if info := k.Info(); signs(k.Name, info.Algorithm) && k.announced() && k.State != Archived && k.State != Destroyed {
			list.Keys = append(list.Keys, wire.Key{
				Name: k.Name, Version: k.Version, Algorithm: string(info.Algorithm), State: string(k.State),
				Custody: string(info.Custody), Provenance: info.Provenance.String(), PublicKey: [32]byte(info.PublicKey), Next: a.announcedNext(k),
			})
		}
	}
	return list
}
