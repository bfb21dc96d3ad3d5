package peers

import (
	"context"
	"errors"
	"time"

	"countersign/internal/ledger"
	"countersign/internal/limit"
	"countersign/internal/manage"
)

// ErrQuota refuses a request of a peer that has no bytes left for what the request would keep.
var ErrQuota = errors.New("the peer has used up its bytes on disk for now")

// Bytes are bytes that requests of a peer make the ledger keep, by the quota that they count in.
type Bytes struct {
	Kept    int64 `json:"kept"`    // records of requests that were served
	Refused int64 `json:"refused"` // records of refusals
}

// quotas are the quotas of a member.
type quotas struct {
	kept, refused limit.Quota
	unwritten     Bytes // charged since the last write of the record
}

// used is the ledger's record of the quotas of a peer.
type used struct {
	Bytes
	At int64 `json:"at"` // Unix seconds
}

func newQuotas(l Limits, written *used) quotas {
	q := quotas{kept: limit.Quota{PerDay: l.BytesPerDay}, refused: limit.Quota{PerDay: l.RefusalBytesPerDay}}
	if written != nil {
		at := time.Unix(written.At, 0)
		q.kept.Restore(written.Kept, at)
		q.refused.Restore(written.Refused, at)
	}
	return q
}

// Reserve takes the most bytes that a request can make the ledger keep, before the request begins.
// Each of the results says whether the bytes of that quota are reserved. The caller must give back
// with Return what the request did not use.
func (r *Registry) Reserve(m *Member, most Bytes) (kept, refused bool) {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	if kept = m.quotas.kept.Take(most.Kept, now); kept {
		m.quotas.unwritten.Kept += most.Kept
	}
	if refused = m.quotas.refused.Take(most.Refused, now); refused {
		m.quotas.unwritten.Refused += most.Refused
	}
	return kept, refused
}

// Return gives reserved bytes back.
func (r *Registry) Return(m *Member, unused Bytes) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m.quotas.kept.Give(unused.Kept)
	m.quotas.refused.Give(unused.Refused)
	m.quotas.unwritten.Kept -= unused.Kept
	m.quotas.unwritten.Refused -= unused.Refused
}

// usedAt returns the bytes that are used and not refilled at a time.
func (q *quotas) usedAt(now time.Time) Bytes { return Bytes{q.kept.Used(now), q.refused.Used(now)} }

// greedy reports whether a hundredth of a quota is charged and not written.
func (q *quotas) greedy() bool {
	return q.unwritten.Kept > q.kept.PerDay/100 || q.unwritten.Refused > q.refused.PerDay/100
}

// WriteGreedy writes the quotas of peers that have used more than a hundredth since the last write.
// With a call each two seconds, a daemon that is killed gives a peer back a hundredth of its quota
// and what the peer has used in two seconds.
func (r *Registry) WriteGreedy(ctx context.Context) error {
	return r.write(ctx, func(m *Member) bool { return m.quotas.greedy() })
}

// WriteSeen writes the changed times and addresses of last sessions to the ledger, and the quotas.
func (r *Registry) WriteSeen(ctx context.Context) error {
	return r.write(ctx, func(m *Member) bool {
		return m.seen.Unix() > m.written.Unix() || m.quotas.unwritten != Bytes{} // records have whole seconds
	})
}

// write writes the records of some members.
func (r *Registry) write(ctx context.Context, which func(*Member) bool) error {
	type state struct {
		at     time.Time
		from   string
		seen   map[[32]byte]time.Time // of each key
		used   used
		charge Bytes
	}
	now := time.Now()
	changed := map[*Member]state{}
	r.mu.Lock()
	for _, m := range r.names {
		if which(m) {
			q, seen := &m.quotas, map[[32]byte]time.Time{}
			for publicKey, k := range m.keys {
				seen[publicKey] = k.Seen
			}
			changed[m] = state{m.seen, m.from, seen, used{q.usedAt(now), now.Unix()}, q.unwritten}
		}
	}
	r.mu.Unlock()
	if len(changed) == 0 {
		return nil
	}
	err := r.ledger.Update(ctx, func(tx *ledger.Tx) error {
		for m, now := range changed {
			rec, err := enrolled(tx, m.Name)
			if err != nil || !r.current(m) {
				continue // the peer has been removed
			}
			if !now.at.IsZero() {
				rec.Seen, rec.From = now.at.Unix(), now.from
			}
			for i, k := range rec.Keys {
				if at := now.seen[k.PublicKey]; !at.IsZero() {
					rec.Keys[i].Seen = at.Unix()
				}
			}
			rec.Used = &now.used
			if err := tx.Put(ledger.Peers, m.Name, manage.Encode(rec)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for m, written := range changed {
		m.quotas.unwritten.Kept -= written.charge.Kept
		m.quotas.unwritten.Refused -= written.charge.Refused
	}
	return nil
}

// current reports whether a member is an enrolment in the ledger, and not one that was removed.
func (r *Registry) current(m *Member) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.names[m.Name] == m
}
