package ledger

import (
	"context"
	"encoding/binary"
	"fmt"

	bolt "go.etcd.io/bbolt"
)

// Scope is where a nonce is single use: one key's signatures, or one signer's public key for verification.
type Scope string

// KeyScope is the scope of signatures made with a key of ours, whatever its version.
func KeyScope(name string) Scope { return Scope("k" + name) }

// SignerScope is the scope of signatures that are verified under somebody's public key. A stranger can't reach it
// without that signer's private key, so nobody can burn another one's nonce.
func SignerScope(publicKey []byte) Scope { return Scope("s" + string(publicKey)) }

// Admission is what gets written down before anything is signed or confirmed.
type Admission struct {
	Scope      Scope
	Nonce      [32]byte
	Digest     [32]byte // of the whole request
	Peer       [32]byte // who asked
	KeyVersion uint32   // that the admission is for: a repetition must not be signed with another
	ExpiresAt  int64    // Unix seconds: the nonce is kept at least until then
	Once       bool     // a repetition is a replay too
}

// Verdict is what the ledger found about a nonce.
type Verdict int

const (
	// Fresh: the nonce was not spent in its scope; now it is.
	Fresh Verdict = iota + 1
	// Repeated: the same peer had asked for the same thing before.
	Repeated
	// Replay: the nonce was spent on something else, by somebody else, or on something that may be had once only.
	Replay
)

// Admitted is the answer of Admit. After Repeated, KeyVersion, Event and Signature are those of the first time.
type Admitted struct {
	Admission
	Verdict   Verdict
	Event     uint64 // index of the admission; after Replay, of the event that records the refusal
	Signature []byte // the outcome, where it is known; 64 bytes
	First     uint64 // after Replay: index of the admission that spent the nonce
	Own       bool   // after Replay: it was this peer's, for the same request
}

// Admit spends a nonce. When it returns, the verdict and its event are on disk. event says what to write down for a
// fresh nonce and for a replay; it must be pure. A repetition writes nothing: what it asks for is written down already.
//
// An error means that no verdict is known. The nonce may be spent all the same; asking again gives Repeated then, or
// Replay where the admission is for Once.
func (l *Ledger) Admit(ctx context.Context, a Admission, event func(Verdict) []byte) (Admitted, error) {
	if err := l.suspended.Load(); err != nil {
		return Admitted{}, *err
	}
	l.admitted.Add(1)
	result := Admitted{Admission: a}
	err := l.submit(ctx, &request{done: make(chan error, 1), apply: func(tx *bolt.Tx) error {
		result = Admitted{Admission: a}
		key := nonceKey(a.Scope, a.Nonce)
		nonces := tx.Bucket(bucketNonces)
		if b := nonces.Get(key); b != nil {
			prior, err := decodeEntry(b)
			if err != nil {
				return err
			}
			result.First, result.Own = prior.event, prior.digest == a.Digest && prior.peer == a.Peer
			if result.Own && !a.Once {
				result.Verdict, result.KeyVersion, result.Event, result.Signature = Repeated, prior.keyVersion, prior.event, prior.signature
				return nil
			}
			result.Verdict = Replay
		} else {
			result.Verdict = Fresh
		}
		var err error
		if result.Event, err = appendEvent(tx, event(result.Verdict)); err != nil || result.Verdict == Replay {
			return err
		}
		return nonces.Put(key, entry{digest: a.Digest, peer: a.Peer, keyVersion: a.KeyVersion, event: result.Event, expiresAt: a.ExpiresAt}.encode())
	}})
	if err != nil {
		return Admitted{}, err
	}
	return result, nil
}

// Settle records how an admission ended: the signature, or nil where there is none, and the event that says so. It
// returns when the writer has taken it; it reaches the disk together with later requests. If a crash comes first, the
// admission still stands, and a repetition of the request makes the same signature again.
func (l *Ledger) Settle(ctx context.Context, a Admitted, signature, event []byte) error {
	return l.submit(ctx, &request{apply: func(tx *bolt.Tx) error {
		if signature != nil {
			nonces, key := tx.Bucket(bucketNonces), nonceKey(a.Scope, a.Nonce)
			b := nonces.Get(key)
			if b == nil {
				return fmt.Errorf("%w: settling a nonce that is not spent", ErrCorrupt)
			}
			e, err := decodeEntry(b)
			if err != nil || e.signature != nil {
				return err // settled before: two repetitions at once both sign, and sign alike
			}
			e.signature = signature
			if err := nonces.Put(key, e.encode()); err != nil {
				return err
			}
		}
		_, err := appendEvent(tx, event)
		return err
	}})
}

func nonceKey(s Scope, nonce [32]byte) []byte { return append([]byte(s), nonce[:]...) }

// entry is the value of a spent nonce:
//
//	u8 1 || digest (32) || peer (32) || u32 key version || u64 event || i64 expires_at || signature (0 or 64)
type entry struct {
	digest, peer [32]byte
	keyVersion   uint32
	event        uint64
	expiresAt    int64
	signature    []byte
}

const entrySize = 1 + 32 + 32 + 4 + 8 + 8

func (e entry) encode() []byte {
	b := make([]byte, 0, entrySize+64)
	b = append(b, 1)
	b = append(b, e.digest[:]...)
	b = append(b, e.peer[:]...)
	b = binary.BigEndian.AppendUint32(b, e.keyVersion)
	b = binary.BigEndian.AppendUint64(b, e.event)
	b = binary.BigEndian.AppendUint64(b, uint64(e.expiresAt))
	return append(b, e.signature...)
}

func decodeEntry(b []byte) (entry, error) {
	if len(b) != entrySize && len(b) != entrySize+64 || b[0] != 1 {
		return entry{}, fmt.Errorf("%w: a nonce's entry of %d bytes", ErrCorrupt, len(b))
	}
	e := entry{
		digest:     [32]byte(b[1:33]),
		peer:       [32]byte(b[33:65]),
		keyVersion: binary.BigEndian.Uint32(b[65:]),
		event:      binary.BigEndian.Uint64(b[69:]),
		expiresAt:  int64(binary.BigEndian.Uint64(b[77:])),
	}
	if len(b) > entrySize {
		e.signature = append([]byte(nil), b[entrySize:]...) // b dies with the transaction
	}
	return e, nil
}
