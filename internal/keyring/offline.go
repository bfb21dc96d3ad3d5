package keyring

import (
	"encoding/hex"
	"slices"

	"countersign/internal/keystore"
	"countersign/internal/ledger"
)

// Recorded is a version of a key in a ledger that no daemon serves.
type Recorded struct {
	Ref       keystore.Ref
	Token     string
	Tag       keystore.Tag
	PublicKey []byte // nil for a version that was not made to its end
	Envelope  []byte // of a recoverable version
	outOfUse  bool
}

// Returns reports that recovery holders could bring the private key back, and that it is still of
// use: see Recoverable.
func (r Recorded) Returns() bool { return len(r.Envelope) > 0 && !r.outOfUse }

// ReadRecorded lists the versions of a ledger whose private keys may be on a token, in the order of
// their names. log is the public key of the audit log, or nil for a ledger that has none yet.
func ReadRecorded(v ledger.View) (all []Recorded, log []byte, err error) {
	err = v.All(ledger.Keys, func(name string, value []byte) error {
		ref, rec, err := decode(name, value)
		if err != nil || rec.State == Destroyed {
			return err
		}
		public, err := hex.DecodeString(rec.PublicKey)
		if err != nil || len(public) == 0 {
			public = nil
		}
		if ref.Name == LogName && rec.State == Active {
			log = slices.Clone(public)
		}
		all = append(all, Recorded{
			ref, rec.Token, rec.Tag, public, rec.Envelope, rec.Compromised || rec.State.outOfUse(),
		})
		return nil
	})
	return all, log, err
}
