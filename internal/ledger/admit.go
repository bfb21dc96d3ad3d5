package ledger

import (
	"bytes"
	"context"
	"fmt"
)

// Scope is where a nonce is single use: the signatures of one key, or the public key of one signer
// for verification.
type Scope string

// KeyScope is the scope of signatures made with a key of ours, whatever its version.
func KeyScope(name string) Scope { return Scope("k" + name) }

// SignerScope is the scope of signatures that are verified under a signer's public key. A stranger
// can't reach it without that signer's private key, so no stranger can burn a signer's nonce.
func SignerScope(publicKey []byte) Scope { return Scope("s" + string(publicKey)) }

// Admission is what gets written down before a key signs or a verification is confirmed.
type Admission struct {
	Scope      Scope
	Nonce      [32]byte
	Digest     [32]byte // of the whole request
	Peer       [32]byte // the public key of the peer that asks
	KeyVersion uint32   // that the admission is for: a repetition must not be signed with another
	ExpiresAt  int64    // Unix seconds: the nonce is kept until then and the margin after it
	Once       bool     // a repetition is a replay too
	Quiet      bool     // a replay or a denial is not written down
	Member     *Member  // of the batch that the request is an item of; nil: of none
	// Counts are the series that a fresh nonce is counted in. Monotonic is a number that must be higher
	// than the last one of its series.
	Counts    []Count
	Monotonic *Monotonic
	// Decide may refuse a fresh nonce by what the series have, each with what this admission would add;
	// nil admits. The record that it returns is kept beside the event, whatever the decision. Decide
	// must be pure: it may run again.
	Decide func(used []Used) (record []byte, refusal error)
}

// Monotonic is a number that must be higher than in all admissions before that named the same series.
type Monotonic struct {
	Series string
	Value  uint64
}

// Verdict is what the ledger found about a nonce.
type Verdict int

const (
	// Fresh: the nonce was not spent in its scope; now it is.
	Fresh Verdict = iota + 1
	// Repeated: the same peer had asked for the same thing before.
	Repeated
	// Replay: the nonce was spent on something else, by another peer, or on something that is given once.
	Replay
	// Denied: Decide refused, or Monotonic is not higher. The nonce is not spent, and nothing was counted.
	Denied
)

// Admitted is the answer of Admit. After Repeated, KeyVersion, Event and Signature are those of the
// first time.
type Admitted struct {
	Admission
	Verdict   Verdict
	Event     uint64 // number of the admission; after Replay and Denied, of the event that records the refusal, or 0
	Signature []byte // the outcome, where it is known
	First     uint64 // after Replay: number of the admission that spent the nonce
	Own       bool   // after Replay: the first admission was this peer's, for the same request
	Denial    error  // after Denied: the error of Decide, or ErrNotHigher
}

// Admit spends a nonce. When it returns, the verdict and its event are on disk. event gives the bytes
// to write down for a fresh nonce, for a replay and for a denial; it must be pure. A repetition writes
// nothing: its admission is on disk already.
//
// ErrDisk, ErrClock and ErrTooMany mean that nothing was written and the nonce is not spent. Any other
// error means that no verdict is known. The nonce may be spent all the same; asking again gives
// Repeated then, or Replay where the admission is for Once.
func (l *Ledger) Admit(ctx context.Context, a Admission, event func(Verdict) []byte) (Admitted, error) {
	if err := l.suspended.Load(); err != nil {
		return Admitted{}, *err
	}
	l.admitted.Add(1)
	print := fingerprintOf(a.Scope, a.Nonce)
	var fresh Event
	if a.Decide == nil {
		fresh = NewEvent(event(Fresh)) // here, since the writer has enough to do
	}
	s := spent{print: print, owner: ownerOf(a.Digest, a.Peer), version: a.KeyVersion}
	result := Admitted{Admission: a}
	var refused error
	r := &request{done: make(chan error, 1), apply: func(t *txn) (err error) {
		result, refused = Admitted{Admission: a}, nil
		if err := l.suspended.Load(); err != nil { // suspended while this request waited
			refused = *err
			return nil
		}
		var record []byte
		fresh := fresh
		prior, found, err := t.find(print)
		switch {
		case err != nil:
			return err
		case found && prior.owner == s.owner && !a.Once: // nothing is written, so nothing can be in the way
			result.Verdict, result.KeyVersion, result.Event = Repeated, prior.version, prior.event
			result.Signature = t.outcome(prior)
			return nil
		case t.closed != nil:
			refused = t.closed
			return nil
		case !found:
			s.hour = hourOf(a.ExpiresAt)
			if refused = t.mayKeep(s.hour); refused != nil {
				return nil
			}
			if result.Verdict = Fresh; a.Decide != nil {
				counted := t.count(a.Counts)
				record, result.Denial = a.Decide(counted.used)
				if result.Denial == nil {
					result.Denial = t.mayIncrease(a.Monotonic)
				}
				if result.Denial != nil {
					result.Verdict = Denied
				} else if err := t.keep(counted, a.Monotonic); err != nil {
					return err
				}
				fresh = NewEvent(event(result.Verdict))
			}
		default:
			result.First, result.Own, result.Verdict = prior.event, prior.owner == s.owner, Replay
		}
		if result.Verdict != Fresh && a.Quiet {
			return nil
		}
		if result.Verdict == Replay {
			fresh = NewEvent(event(Replay))
		}
		if result.Event, err = t.append(fresh); err != nil {
			return err
		}
		if record != nil {
			if err := t.putDecision(result.Event, record); err != nil {
				return err
			}
		}
		if result.Verdict != Fresh {
			return nil
		}
		s.event = result.Event
		return t.spend(s)
	}}
	var err error
	if a.Member.join(ctx, r) {
		err = l.await(ctx, r)
	} else {
		err = l.submit(ctx, r)
	}
	if err == nil {
		err = refused
	}
	if err != nil {
		return Admitted{}, err
	}
	return result, nil
}

// Settle records how an admission ended: the signature, or nil where there is none, the event that
// says so, and a receipt where there is one. Settle returns when the writer has taken the outcome,
// which reaches the disk together with later requests. If a crash comes first, the admission still
// stands, and a repetition of the request makes the same signature again.
func (l *Ledger) Settle(ctx context.Context, a Admitted, signature []byte, event Event, receipt *Receipt) error {
	signature = bytes.Clone(signature) // the writer reads it after the caller has gone on
	return l.submit(ctx, &request{apply: func(t *txn) error {
		s := spent{event: a.Event, hour: hourOf(a.ExpiresAt)}
		if t.outcome(s) != nil {
			return nil // settled before: of two repetitions at once, both have signed, or one has failed
		}
		if signature != nil {
			if err := t.settle(s, signature); err != nil {
				return err
			}
		}
		if receipt != nil {
			if err := t.putReceipt(*receipt); err != nil {
				return err
			}
		}
		_, err := t.append(event)
		return err
	}})
}

// Spent returns the admission that spent a nonce, or ErrNotFound.
func (l *Ledger) Spent(ctx context.Context, scope Scope, nonce [32]byte) (Admitted, error) {
	var a Admitted
	var found bool
	err := l.submit(ctx, &request{done: make(chan error, 1), apply: func(t *txn) (err error) {
		var s spent
		if s, found, err = t.find(fingerprintOf(scope, nonce)); found {
			a = Admitted{Verdict: Repeated, Event: s.event, Signature: t.outcome(s)}
			a.Scope, a.Nonce, a.KeyVersion = scope, nonce, s.version
		}
		return err
	}})
	switch {
	case err != nil:
		return Admitted{}, err // the writer may still be at work
	case !found:
		return Admitted{}, fmt.Errorf("nonce: %w", ErrNotFound)
	}
	return a, nil
}
