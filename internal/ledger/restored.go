package ledger

import (
	"context"
	"encoding/binary"
	"fmt"
	"time"

	"countersign/audit"
)

// RestoredError refuses a document that may have been admitted before the ledger was restored. For
// errors.Is the error is an ErrRestored.
type RestoredError struct {
	Timestamp int64 // of the document, Unix seconds
	After     int64 // a document with a later timestamp is admitted
}

func (e *RestoredError) Error() string {
	return fmt.Sprintf("%v: its timestamp is %d: sign a new document with a timestamp after %d",
		ErrRestored, e.Timestamp, e.After)
}

func (e *RestoredError) Is(target error) bool { return target == ErrRestored }

// RestoredAfter returns the timestamp after which a ledger that was restored until end may admit
// documents. The ledger does not know what was admitted between the backup and its restore.
//
// The invariant: each document that was admitted before end has a timestamp of at most the result.
// An appliance admits a document whose timestamp is at most skew after its clock, and that clock
// was at most skew ahead of the clock of end.
func RestoredAfter(end time.Time, skew time.Duration) int64 {
	return end.Add(2*skew).Unix() + 1 // the seconds of end round up
}

// checkRestored refuses a document that may be of before a restore. The appliance's own documents
// have random nonces, which nobody can send again.
func (t *txn) checkRestored(a Admission) error {
	if t.l.restored == 0 || a.Peer == "" || a.Timestamp > t.l.restored {
		return nil
	}
	return &RestoredError{a.Timestamp, t.l.restored}
}

func restoredAt(value []byte) (int64, error) {
	switch len(value) {
	case 0:
		return 0, nil
	case 8:
		return int64(binary.BigEndian.Uint64(value)), nil
	}
	return 0, fmt.Errorf("%w: the record of a restore has %d bytes", ErrCorrupt, len(value))
}

// Restore marks a ledger that comes from a backup: from now on a nonce is fresh only for a document
// with a timestamp after a time (Unix seconds; see RestoredAfter). The mark never goes back. The
// transaction ends the epoch of the backup, begins the next one, and has the changes of change.
func (l *Ledger) Restore(ctx context.Context, after int64, who audit.Actor, change func(*Tx) error) error {
	return l.submit(ctx, &request{alone: true, done: make(chan error, 1), apply: func(t *txn) error {
		mark := binary.BigEndian.AppendUint64(nil, uint64(max(after, l.restored)))
		if err := t.bucket(bucketMeta).put(keyRestored, mark); err != nil {
			return err
		}
		if _, err := t.endEpoch(who); err != nil {
			return err
		}
		return change(&Tx{View{t.tx}, t})
	}})
}
