package ledger

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"

	bolt "go.etcd.io/bbolt"
)

// ReceiptID identifies a receipt. The text form is 32 hex digits.
type ReceiptID [16]byte

// MarshalText encodes the id in hex.
func (id ReceiptID) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(id[:])), nil }

// UnmarshalText decodes the text of MarshalText.
func (id *ReceiptID) UnmarshalText(text []byte) error {
	b, err := hex.DecodeString(string(text))
	if err != nil || len(b) != len(id) {
		return fmt.Errorf("%q is not the id of a receipt: want %d hex digits", text, 2*len(id))
	}
	copy(id[:], b)
	return nil
}

// Receipt is the minimal business record of a signed payment.
type Receipt struct {
	ID         ReceiptID `json:"id"`
	TimeMS     int64     `json:"time_ms"`    // Unix milliseconds
	Commitment []byte    `json:"commitment"` // to the amount, with a salt; the ledger does not have the salt
	Method     string    `json:"method"`
	Status     string    `json:"status"`
	Event      uint64    `json:"event"` // number of the admission
}

func receiptKey(ms int64, id ReceiptID) []byte { return append(u64(uint64(max(0, ms))), id[:]...) }

func (t *txn) putReceipt(r Receipt) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := t.bucket(bucketIDs).put(r.ID[:], u64(uint64(max(0, r.TimeMS)))); err != nil {
		return err
	}
	return t.bucket(bucketReceipts).put(receiptKey(r.TimeMS, r.ID), b)
}

func decodeReceipt(b []byte) (r Receipt, err error) {
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("%w: a receipt: %w", ErrCorrupt, err)
	}
	return r, nil
}

// Receipt returns a receipt by its id, or an error that wraps ErrNotFound.
func (l *Ledger) Receipt(id ReceiptID) (r Receipt, err error) {
	err = l.view(func(tx *bolt.Tx) (err error) {
		at := root(tx, bucketIDs).Get(id[:])
		if at == nil {
			return fmt.Errorf("receipt: %w", ErrNotFound)
		}
		b := root(tx, bucketReceipts).Get(append(append([]byte(nil), at...), id[:]...))
		if b == nil {
			return fmt.Errorf("%w: a receipt is in the index only", ErrCorrupt)
		}
		r, err = decodeReceipt(b)
		return err
	})
	return r, err
}

// Receipts returns at most limit receipts with times from <= time < to, in Unix milliseconds, in
// the order of time and id. A to of 0 is no bound. If after is not zero, the receipts of the
// millisecond from begin behind the id after: the next page begins with the time and id of the last
// receipt.
func (l *Ledger) Receipts(from, to int64, after ReceiptID, limit int) (found []Receipt, err error) {
	if to == 0 {
		to = math.MaxInt64
	}
	err = l.view(func(tx *bolt.Tx) error {
		start := receiptKey(from, after)
		c := root(tx, bucketReceipts).Cursor()
		for k, v := c.Seek(start); k != nil && len(found) < limit; k, v = c.Next() {
			if int64(binary.BigEndian.Uint64(k)) >= to {
				break
			}
			if after != (ReceiptID{}) && string(k) == string(start) {
				continue
			}
			r, err := decodeReceipt(v)
			if err != nil {
				return err
			}
			found = append(found, r)
		}
		return nil
	})
	return found, err
}
