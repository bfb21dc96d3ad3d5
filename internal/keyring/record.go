package keyring

import (
	"encoding/hex"
	"encoding/json"
	"fmt"

	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/wire"
)

// record is the ledger's record of a version, under "name/version".
type record struct {
	Token     string             `json:"token"`
	Algorithm keystore.Algorithm `json:"algorithm"`
	// PublicKey (hex) and Custody are missing while the version is being made.
	PublicKey  string              `json:"public_key,omitempty"`
	Custody    keystore.Custody    `json:"custody,omitempty"`
	Provenance keystore.Provenance `json:"provenance"` // as it was when the key was made: imported stays imported
	State      State               `json:"state"`
	Created    int64               `json:"created"`             // Unix seconds, as the two below
	Activates  int64               `json:"activates,omitempty"` // when the version becomes active or has; 0: not announced
	Retires    int64               `json:"retires,omitempty"`   // when a verify-only version is archived at the latest
	Tag        keystore.Tag        `json:"tag"`                 // of the creation
	// Compromised stays, whatever becomes of the version after that: its private key may be somewhere
	// else for ever.
	Compromised bool `json:"compromised,omitempty"`
	// Succession is the step from the version before to this one. Authorization lets a Noise key speak
	// for the identity.
	Succession    *wire.Succession    `json:"succession,omitempty"`
	Authorization *wire.Authorization `json:"authorization,omitempty"`
}

func decode(name string, value []byte) (ref keystore.Ref, rec record, err error) {
	if err := json.Unmarshal(value, &rec); err != nil {
		return ref, rec, fmt.Errorf("key %q in the ledger: %w", name, err)
	}
	ref, err = keystore.ParseRef(name)
	return ref, rec, err
}

// info describes the key of a record that is not being made.
func (rec record) info(ref keystore.Ref) (keystore.Info, error) {
	public, err := hex.DecodeString(rec.PublicKey)
	if err != nil || len(public) == 0 {
		return keystore.Info{}, fmt.Errorf("key %v in the ledger has no public key", ref)
	}
	return keystore.Info{
		Ref: ref, Algorithm: rec.Algorithm, PublicKey: public, Custody: rec.Custody, Provenance: rec.Provenance, Tag: rec.Tag,
	}, nil
}

// made completes a record with what the device says of the key.
func (rec *record) made(info keystore.Info) {
	rec.PublicKey, rec.Custody, rec.Provenance = hex.EncodeToString(info.PublicKey), info.Custody, info.Provenance
}

// unfinished reads the records of versions that are being made.
func (r *Ring) unfinished() (map[keystore.Ref]record, error) {
	records := map[keystore.Ref]record{}
	err := r.Ledger.All(ledger.Keys, func(name string, value []byte) error {
		ref, rec, err := decode(name, value)
		if rec.State == making {
			records[ref] = rec
		}
		return err
	})
	return records, err
}
