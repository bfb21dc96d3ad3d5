package ledger

import (
	"bytes"
	"context"
	"fmt"
)

// Scope is the domain in which a nonce is single use: the signatures of one key, or the
// verifications under one public key.
type Scope string

// KeyScope returns the scope of the signatures by one of the appliance's keys, in all its versions.
func KeyScope(name string) Scope { return Scope("k" + name) }

// SignerScope returns the scope of verifications under a signer's public key. Only a valid
// signature spends a nonce in the scope. A stranger without the signer's private key therefore
// can't burn a nonce of the signer.
func SignerScope(publicKey []byte) Scope { return Scope(signerScope + string(publicKey)) }

const signerScope = "s" // the begin of the scopes of verifications

// Admission is the durable record that precedes a signature or the confirmation of a verification.
type Admission struct {
	Scope      Scope
	Nonce      [32]byte
	Digest     [32]byte // hash of the whole request
	Peer       string   // name of the requesting peer; "" for the appliance itself
	KeyVersion uint32   // version of the key; a repetition must be signed with the same version
	Timestamp  int64    // Unix seconds; see Restore
	ExpiresAt  int64    // Unix seconds; the nonce is kept until then and for Options.Margin after
	Once       bool     // a repetition counts as a replay
	Quiet      bool     // a replay or a denial writes no event
	Member     *Member  // place in a batch; nil for a single request
	// May refuses an admission or a repetition at the moment of the transaction, before anything is
	// read or written. Admit returns the error of May. A nil May refuses nothing.
	May func() error
	// Counts, if set, returns the series in which a fresh nonce is counted. Counts is called before
	// Decide, and must be pure as well. Monotonic, if set, is a number that must be higher than the
	// last number of its series.
	Counts    func() []Count
	Monotonic *Monotonic
	// Decide may deny a fresh nonce. The argument has the sums of the series in Counts, including
	// this admission; a nil refusal admits. The record is kept beside the event for either
	// decision. Decide must be pure, because it may run twice. A nil Decide admits.
	Decide func(used []Used) (record []byte, refusal error)
}

func (a *Admission) counts() []Count {
	if a.Counts == nil {
		return nil
	}
	return a.Counts()
}

// Monotonic is a number that must be higher than the numbers of all earlier admissions with the
// same series.
type Monotonic struct {
	Series string
	Value  uint64
}

// Verdict is the result of an admission.
type Verdict int

const (
	// Fresh means that the nonce was not spent in its scope before, and is spent now.
	Fresh Verdict = iota + 1
	// Repeated means that the same peer sent the same request before.
	Repeated
	// Replay means that the nonce was spent by another request or another peer, or that the same
	// request came again although the admission has Once.
	Replay
	// Denied means that Decide refused, or that Monotonic is not higher. The nonce is not spent,
	// and the series are not changed.
	Denied
)

// Admitted is the answer of Admit. After Repeated, KeyVersion, Event and Signature are those of the
// first admission.
type Admitted struct {
	Admission
	Verdict   Verdict
	Event     uint64 // number of the event: of the admission, or after Replay and Denied of the refusal; 0 for none
	Signature []byte // after Repeated: the signature, or nil if there is none yet
	First     uint64 // after Replay: number of the admission that spent the nonce
	Own       bool   // after Replay: the first admission has the same peer and the same request
	Denial    error  // after Denied: the error of Decide, or ErrNotHigher
	Kept      int    // bytes of the keys and values that were written
}

// Admit spends a nonce. When Admit returns, the verdict and its event are on disk. The function
// event returns the bytes of the event for the verdicts Fresh, Replay and Denied, and must be pure.
// Repeated writes no event, because the admission is on disk already.
//
// ErrDisk, ErrClock, ErrTooMany, ErrRestored and the errors of May and Suspend mean that nothing
// was written and the nonce is not spent. After any other error the verdict is unknown, and the
// nonce may be spent. A second Admit then returns Repeated, or Replay for an admission with Once.
func (l *Ledger) Admit(ctx context.Context, a Admission, event func(Verdict) []byte) (Admitted, error) {
	if err := l.suspended.Load(); err != nil {
		return Admitted{}, *err
	}
	l.admitted.Add(1)
	fp := fingerprintOf(a.Scope, a.Nonce)
	var fresh Event
	if a.Decide == nil {
		fresh = NewEvent(event(Fresh)) // hashed here, to spare the writer
	}
	s := spent{
		fingerprint: fp, requestHash: hashRequest(a.Digest, a.Peer), version: a.KeyVersion, share: a.share(),
	}
	result := Admitted{Admission: a}
	var refused error
	r := &request{done: make(chan error, 1), apply: func(t *txn) (err error) {
		result, refused = Admitted{Admission: a}, nil
		first := len(t.writes.list)
		defer func() { result.Kept = bytesOf(t.writes.list[first:]) }()
		if err := l.suspended.Load(); err != nil { // suspended while this request waited
			refused = *err
			return nil
		}
		if a.May != nil {
			if refused = a.May(); refused != nil {
				return nil
			}
		}
		var record []byte
		fresh := fresh
		prior, found, err := t.find(fp)
		switch {
		case err != nil:
			return err
		case found && prior.requestHash == s.requestHash && !a.Once: // writes nothing: works with a full disk, too
			result.Verdict, result.KeyVersion, result.Event = Repeated, prior.version, prior.event
			result.Signature = t.outcome(prior)
			return nil
		case t.closed != nil:
			refused = t.closed
			return nil
		case !found:
			if refused = t.checkRestored(a); refused != nil {
				return nil
			}
			s.hour = hourOf(a.ExpiresAt)
			if refused = t.checkRoom(s.share, s.hour); refused != nil {
				return nil
			}
			if result.Verdict = Fresh; a.Decide != nil {
				counted := t.count(a.counts())
				record, result.Denial = a.Decide(counted.used)
				if result.Denial == nil {
					result.Denial = t.checkMonotonic(a.Monotonic)
				}
				if result.Denial != nil {
					result.Verdict = Denied
				} else if err := t.writeCounts(counted, a.Monotonic); err != nil {
					return err
				}
				fresh = NewEvent(event(result.Verdict))
			}
		default:
			result.First, result.Own, result.Verdict = prior.event, prior.requestHash == s.requestHash, Replay
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

// Settle records the outcome of an admission: the signature or nil, the event, and the receipt or
// nil. Settle returns when the outcome is in the writer's queue. The outcome reaches the disk
// together with later requests. After a crash before that, the admission is still on disk, and a
// repetition of the request makes the same signature again.
func (l *Ledger) Settle(ctx context.Context, a Admitted, signature []byte, event Event, receipt *Receipt) error {
	signature = bytes.Clone(signature) // the writer reads the copy after Settle has returned
	return l.submit(ctx, &request{apply: func(t *txn) error {
		s := spent{event: a.Event, hour: hourOf(a.ExpiresAt)}
		if t.outcome(s) != nil {
			return nil // two repetitions at once: the other one has settled the admission with a signature
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

// Spent returns the admission that spent a nonce, or an error that wraps ErrNotFound.
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
		return Admitted{}, err // the writer may still use the variables
	case !found:
		return Admitted{}, fmt.Errorf("nonce: %w", ErrNotFound)
	}
	return a, nil
}
