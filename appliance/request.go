package appliance

import (
	"context"
	"errors"
	"log/slog"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"countersign/audit"
	"countersign/internal/ijson"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/meter"
	"countersign/internal/peers"
	"countersign/internal/requestid"
	"countersign/wire"
)

// retryAfter is the retry time in answers with the codes busy and rate_limited, in seconds.
const retryAfter = 1

// busyTime is the delay of answers with these codes. Without the delay, a peer that retries at once
// would cost more processor time than a peer with served requests.
const busyTime = 100 * time.Millisecond

// handle returns the reply to one request. A nil reply ends the connection, after a fatal error.
func (a *Appliance) handle(s *session, r taken) *reply {
	defer a.Peers.End(s.Member, r.places)
	// The context is not the connection's: an admitted request is finished also when the peer
	// leaves or the daemon stops.
	ctx, cancel := context.WithTimeout(context.Background(), a.limits.RequestTimeout)
	defer cancel()
	switch body := r.body.(type) {
	case limited:
		_, refusal := refuse(body)
		a.refusals.count(audit.RateLimitTriggered, "request", s.caller.Name, refusal.Code)
		pause(ctx, busyTime)
		return single(r, answer{refusal: refusal, op: meter.NoOp, walk: r.walk})
	case *wire.Error:
		return single(r, answer{refusal: a.unreadable(s, r.request, body), op: meter.NoOp, walk: r.walk})
	case *wire.Batch:
		answers, ok := a.batch(ctx, s, r, body)
		if !ok {
			return nil
		}
		return &reply{id: r.id, request: r.request, batch: true, answers: answers}
	}
	served, ok := a.serve(ctx, s, nil, r.request, r.walk, r.body)
	if !ok {
		return nil
	}
	return single(r, served)
}

// unreadable refuses a message that is no request. The limit of refusals bounds its lines in the
// log.
func (a *Appliance) unreadable(s *session, id string, refusal *wire.Error) *wire.Error {
	if s.Member.Refusals.Tokens() < 1 {
		a.refusals.count(audit.SignatureRejected, "request", s.caller.Name, refusal.Code)
		return refusal
	}
	s.Member.Refusals.Reserve()
	a.log.Info("refused", "peer", s.caller.Name, requestid.Attr(id), "code", refusal.Code, "err", refusal.Message)
	return refusal
}

// serve executes one request with an id. ok is false after a fatal error.
func (a *Appliance) serve(
	ctx context.Context, s *session, member *ledger.Member, id string, walk *meter.Walk, request any,
) (served answer, ok bool) {
	began := time.Now()
	op := meter.NoOp
	defer func() { served.op, served.walk = op, walk }()
	walk.Enter(meter.Answer) // until a stage begins
	who := s.caller
	who.member, who.Request, who.walk = member, id, walk
	most := reservation(request)
	who.bill = new(bill)
	kept, refusals := a.Peers.Reserve(s.Member, most)
	defer func() { a.Peers.Return(s.Member, unused(most, who.bill.Bytes, kept, refusals)) }()
	if !kept {
		_, refusal := refuse(peers.ErrQuota)
		a.refusals.count(audit.RateLimitTriggered, "quota", who.Name, refusal.Code)
		pause(ctx, busyTime)
		return answer{refusal: refusal}, true
	}
	who.quiet = !refusals || s.Member.Refusals.Tokens() < 1
	var key string
	var result any
	var may func() error
	var err error
	switch r := request.(type) {
	case *wire.Ping:
		op, result = wire.OpPing, wire.Pong{Service: "countersign", Time: began.Unix()}
	case *wire.Keys:
		op, result = wire.OpKeys, a.Keys.Listed()
	case *wire.Sign:
		op, key = wire.OpSign, r.Key
		var signed *wire.Signed
		signed, err = a.Sign(ctx, who, r)
		result, may = signed, func() error { return a.Keys.MayHave(who.Peer, r.Key, signed.Version) }
	case *wire.Verify:
		op, key = wire.OpVerify, r.KeyName()
		result, err = a.Verify(ctx, who, r)
		may = func() error { return a.mayConfirm(who, r) }
	case *wire.Proof:
		op = wire.OpProof
		result, err = a.Proof(ctx, who, r.Event)
	case *wire.Epoch:
		op = wire.OpEpoch
		result, err = a.EpochStart(ctx, r.Epoch)
	case *wire.Consistency:
		op = wire.OpConsistency
		result, err = a.Consistency(ctx, r.Epoch, r.From, r.To)
	case *wire.Line:
		op, key = wire.OpLine, r.Key
		result, err = a.Keys.Steps(r)
	case *wire.Ack:
		op, key = r.Op, r.Key
		result, err = a.Acknowledge(ctx, who, r)
	case *wire.Error: // a malformed item of a batch
		return answer{refusal: r}, true
	}
	if err == nil {
		if a.log.Enabled(ctx, slog.LevelDebug) { // the arguments of a line cost as much as a counter
			a.log.Debug("served", "peer", who.Name, requestid.Attr(id), "op", op, "key", key, "took", time.Since(began))
		}
		return answer{result: result, may: may}, true
	}
	member.Leave(ctx) // the batch need not wait for the refusal's event
	c, refusal := refuse(err)
	if !who.quiet {
		s.Member.Refusals.Reserve() // concurrent refusals may take the limiter below zero
	}
	switch {
	case c == refused && who.quiet:
		a.refusals.count(refusalType(refusal.Code), op, who.Name, refusal.Code)
	case c == refused:
		a.log.Info("refused", "peer", who.Name, requestid.Attr(id), "op", op, "key", ijson.Clip(key),
			"code", refusal.Code, "err", err)
		if err := a.recordRefusal(ctx, who, op, key, refusal.Code, err); err != nil {
			c, refusal = refuse(err)
		}
	case c == unavailable && who.quiet: // beyond the limit of lines in the log
	default:
		a.log.Error("not served", "peer", who.Name, requestid.Attr(id), "op", op, "key", ijson.Clip(key),
			"code", refusal.Code, "err", err)
	}
	return answer{refusal: refusal}, c != fatal
}

// refusalType returns the type of the event of a refusal.
func refusalType(code string) audit.Type {
	if code == wire.CodeReplay {
		return audit.ReplayRefused
	}
	return audit.SignatureRejected
}

// batch executes the items of a batch concurrently. The admissions share one commit. The answers
// are in the order of the items. The result is false after a fatal error.
func (a *Appliance) batch(ctx context.Context, s *session, r taken, b *wire.Batch) ([]answer, bool) {
	answers := make([]answer, len(b.Items))
	group := a.ledger.Group(len(b.Items))
	var serving sync.WaitGroup
	var fatal atomic.Bool
	for i, item := range b.Items {
		serving.Go(func() {
			member := group.Member()
			defer member.Leave(ctx) // for an item without an admission
			id := requestid.Item(r.request, i)
			served, ok := a.serve(ctx, s, member, id, r.walk.Item(id), item)
			if !ok {
				fatal.Store(true)
			}
			answers[i] = served
		})
	}
	serving.Wait()
	return answers, !fatal.Load()
}

// recordRefusal writes the event of a refusal, unless the ledger has written the event together
// with the verdict. A malformed request has no event, because its content is not worth a record.
func (a *Appliance) recordRefusal(ctx context.Context, who Caller, op, key, code string, err error) error {
	malformed := code == wire.CodeMalformed || code == wire.CodeUnsupported || code == wire.CodeTooLarge
	if malformed || errors.As(err, new(recorded)) {
		return nil
	}
	if keystore.CheckName(key) != nil && key != "" {
		key = strconv.QuoteToASCII(ijson.Clip(key)) // arbitrary text of the peer
	}
	e := ledger.EventOf(audit.NewRejection(who.actor(), op, key, code))
	who.bill.refused(e)
	_, err = a.ledger.Append(ctx, e)
	return err
}
