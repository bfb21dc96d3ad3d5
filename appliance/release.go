package appliance

import (
	"time"

	"countersign/internal/meter"
	"countersign/internal/requestid"
	"countersign/wire"
)

// answer is the answer to a request or to an item of a batch, before its release: a result or a
// refusal.
type answer struct {
	result  any
	refusal *wire.Error
	op      string
	walk    *meter.Walk
	may     func() error // refuses the release of a signature or confirmation at this moment; nil: never
}

// reply is the reply to a message, with one answer or those of a batch.
type reply struct {
	id      string // of the peer
	request string // see package requestid
	batch   bool
	answers []answer
}

func single(r taken, served answer) *reply {
	return &reply{id: r.id, request: r.request, answers: []answer{served}}
}

// requestOf returns the id of the request that the answer i belongs to.
func (r *reply) requestOf(i int) string {
	if r.batch {
		return requestid.Item(r.request, i)
	}
	return r.request
}

// may refuses the release of the reply if one of its answers may not be released as it is.
func (r *reply) may() error {
	for i := range r.answers { // only may: release may be replacing the answers
		if may := r.answers[i].may; may != nil {
			if err := may(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *reply) encode() []byte {
	if !r.batch {
		return wire.EncodeAnswer(r.id, r.request, r.answers[0].result, r.answers[0].refusal)
	}
	all := wire.Answers{Answers: make([]wire.ItemAnswer, len(r.answers))}
	for i, each := range r.answers {
		all.Answers[i] = wire.NewItemAnswer(each.result, each.refusal)
	}
	return wire.EncodeAnswer(r.id, r.request, all, nil)
}

// release writes a reply to its connection. An answer whose right was taken away since the key was
// used is withheld: the peer gets the refusal instead. The act that takes a right away waits for
// the writes of answers that it does not allow any more, see gate.Release.
func (a *Appliance) release(s *session, r *reply, write func([]byte) error) error {
	defer a.gate.Release(r.may).End()
	for i, each := range r.answers {
		if each.may == nil {
			continue
		}
		if err := each.may(); err != nil {
			_, refusal := refuse(err)
			r.answers[i].result, r.answers[i].refusal = nil, refusal
			a.log.Warn("an answer is withheld", "peer", s.caller.Name, requestid.Attr(r.requestOf(i)),
				"code", refusal.Code, "err", err)
		}
	}
	err := write(r.encode())
	now := time.Now()
	for _, each := range r.answers {
		code := ""
		if each.refusal != nil {
			code = each.refusal.Code
		}
		each.walk.End(each.op, code)
		s.Member.Answered(each.op, each.refusal != nil, now)
	}
	return err
}
