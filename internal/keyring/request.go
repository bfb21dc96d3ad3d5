package keyring

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/requestid"
)

// A request of an operator for a rotation is on disk before the device is tried. The invariant:
//
//   - A key has at most one request. A later request, or the announcement, or the end of the
//     request takes its place, and each of them is an event.
//   - Each try does what the request says: the same time, in the name of the same operator. A try
//     after the requested time activates at once.
//   - From Until on, nothing is tried. The request is then given up with an event, and its cause
//     stays in the state until the next rotation of the key, or until an operator calls the request
//     off.
//   - While a request is open, an earlier announcement does not become active, and the schedule
//     announces nothing: the operator has asked for another time.

// DefaultWithin is the time after which a requested rotation makes no sense any more, if the
// operator names no other: counted from the requested time of activation.
const DefaultWithin = time.Hour

// maxWithin bounds the time for which a requested rotation is tried.
const maxWithin = 30 * 24 * time.Hour

// Request is the rotation that an operator has asked for, and that is not announced yet.
type Request struct {
	By        audit.Actor
	Asked     time.Time
	Activates time.Time // the requested time of activation
	Until     time.Time // nothing is tried from then on
	Ended     string    // why the request was given up; "": it is tried again
}

// requestRecord is the ledger's record of a request, in the table Meta. Times are Unix seconds.
type requestRecord struct {
	By        audit.Actor `json:"by"`
	Asked     int64       `json:"asked"`
	Activates int64       `json:"activates"`
	Until     int64       `json:"until"`
	Ended     string      `json:"ended,omitempty"`
}

// requestKeys is the prefix of the records of requests: rotation-request/payments.
const requestKeys = "rotation-request/"

func (q Request) encode() []byte {
	return manage.Encode(requestRecord{q.By, q.Asked.Unix(), q.Activates.Unix(), q.Until.Unix(), q.Ended})
}

// takeMeta updates memory from a record of the table Meta. mu is held.
func (r *Ring) takeMeta(name string, value []byte) error {
	if name == holdersKey {
		return r.takeHolders(value)
	}
	key, is := strings.CutPrefix(name, requestKeys)
	if !is {
		return r.takeUses(name, value)
	}
	if value == nil {
		delete(r.requests, key)
		return nil
	}
	var rec requestRecord
	if err := json.Unmarshal(value, &rec); err != nil {
		return fmt.Errorf("the rotation of %q in the ledger: %w", key, err)
	}
	r.requests[key] = Request{
		rec.By, time.Unix(rec.Asked, 0), time.Unix(rec.Activates, 0), time.Unix(rec.Until, 0), rec.Ended,
	}
	return nil
}

// Requested returns the request for a rotation of a key, if there is one.
func (r *Ring) Requested(name string) (q Request, ok bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	q, ok = r.requests[name]
	return q, ok
}

// request writes a request in the place of an earlier one.
func (r *Ring) request(ctx context.Context, name string, q Request) error {
	return r.Ledger.Update(ctx, func(tx *ledger.Tx) error {
		if err := tx.Put(ledger.Meta, requestKeys+name, q.encode()); err != nil {
			return err
		}
		return tx.Append(ledger.EventOf(audit.NewRotationRequested(q.By, name, q.Activates, q.Until)))
	})
}

// carryOut tries a request once. After a failure that a later try can't cure, or too late, the
// request is given up.
func (r *Ring) carryOut(ctx context.Context, name string, q Request) (*Key, error) {
	if !time.Now().Before(q.Until) {
		r.mu.RLock()
		last := r.retries[name].cause
		r.mu.RUnlock()
		why := errTooLate
		if last != nil {
			why = fmt.Errorf("%w; the last try: %w", errTooLate, last)
		}
		return nil, r.giveUp(ctx, name, q, why)
	}
	next, err := r.renew(ctx, q.By, name, q.Activates)
	if errors.Is(err, manage.ErrConflict) || errors.Is(err, manage.ErrNotFound) {
		return nil, r.giveUp(ctx, name, q, err)
	}
	return next, err
}

var (
	errTooLate = errors.New("the time for which the operator wanted it has passed")
	errGivenUp = errors.New("the requested rotation is given up")
)

// giveUp ends a request that was not carried out. The record stays, as the source of the cause.
func (r *Ring) giveUp(ctx context.Context, name string, q Request, why error) error {
	q.Ended = why.Error()
	r.Log.Error("a requested rotation is given up", "key", name, "operator", q.By.Name,
		requestid.Attr(q.By.Request), "err", why)
	if err := r.Ledger.Update(ctx, func(tx *ledger.Tx) error {
		if err := tx.Put(ledger.Meta, requestKeys+name, q.encode()); err != nil {
			return err
		}
		return tx.Append(ledger.EventOf(audit.NewRotationGivenUp(q.By, name, q.Activates, why)))
	}); err != nil {
		return errors.Join(why, err) // the request is still open
	}
	return fmt.Errorf("key %q: %w: %w", name, errGivenUp, why)
}

// Cancel calls off what is announced or requested of a key, without any use of the device. The next
// version stays the committed successor: a later rotation announces the same version. All peers are
// told, also those that have acknowledged the rotation. A schedule counts from now on.
func (r *Ring) Cancel(ctx context.Context, who audit.Actor, name string) error {
	return r.run(ctx, who, fmt.Sprintf("calling off the rotation of key %q", name), func(ctx context.Context) error {
		versions, err := r.Versions(name)
		if err != nil {
			return err
		}
		if k := withoutSuccessor(versions); k != nil {
			return fmt.Errorf("key %q: %w: version %d is compromised, so the rotation can't be called off",
				name, manage.ErrConflict, k.Version)
		}
		old, err := r.Active(name)
		if err != nil {
			return err
		}
		q, requested := r.Requested(name)
		next := r.Version(name, old.Version+1)
		announced := next != nil && next.State == Pending && next.Announced()
		switch {
		case announced:
			return r.callOff(ctx, who, old, next)
		case !requested:
			return fmt.Errorf("key %q: %w: no rotation is announced or asked for", name, manage.ErrConflict)
		}
		e := audit.NewRotationCancelled(who, old.Ref().String(), old.Version+1, q.Activates)
		return r.changeLine(ctx, who, name, nil, 0, e)
	})
}

// callOff takes an announcement back. With an identity, the active Noise key is authorized anew:
// peers refuse an authorization that is older than that of the announced key.
func (r *Ring) callOff(ctx context.Context, who audit.Actor, old, next *Key) error {
	stays := edit{old.Ref(), func(rec *record) {
		rec.Change, rec.CalledOff, rec.UsesBefore = next.Change+1, time.Now().Unix(), old.Uses()
	}}
	off := edit{next.Ref(), func(rec *record) { rec.Activates, rec.Succession, rec.By = 0, nil, nil }}
	e := audit.NewRotationCancelled(who, old.Ref().String(), next.Version, next.Activates)
	if err := r.changeLine(ctx, who, old.Name, []edit{stays, off}, old.Version, e); err != nil {
		return err
	}
	r.Log.Info("a rotation was called off", "key", old.Name, "version", next.Version, "operator", who.Name,
		requestid.Attr(who.Request))
	r.clearRetry(old.Name)
	defer r.notify()
	if now, err := r.Active(old.Name); err == nil && old.Name == NoiseName && r.unauthorized(now) {
		if err := r.authorizeActive(ctx, who); err != nil { // Keep tries again
			r.Log.Error("the Noise key is not authorized anew", requestid.Attr(who.Request), "err", err)
		}
	}
	return nil
}
