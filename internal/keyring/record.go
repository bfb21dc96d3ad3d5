package keyring

import (
	"encoding/hex"
	"encoding/json"
	"fmt"

	"countersign/audit"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/wire"
)

// record is the ledger's record of a version, under "name/version".
type record struct {
	Token     string             `json:"token"`
	Algorithm keystore.Algorithm `json:"algorithm"`
	// PublicKey (hex) and Custody are missing in the state making.
	PublicKey string           `json:"public_key,omitempty"`
	Custody   keystore.Custody `json:"custody,omitempty"`
	// Provenance is that of the creation: an imported key stays imported.
	Provenance keystore.Provenance `json:"provenance"`
	State      State               `json:"state"`
	// Created, Activates and Retires are Unix seconds, see Key. Activates is 0 before the
	// announcement.
	Created   int64        `json:"created"`
	Activates int64        `json:"activates,omitempty"`
	Retires   int64        `json:"retires,omitempty"`
	Tag       keystore.Tag `json:"tag"` // of the creation
	// Compromised stays set in all later states: the private key may be in other hands for ever.
	Compromised bool `json:"compromised,omitempty"`
	// Change orders what peers were told of a line: with each announcement that replaces another,
	// and each one called off, the number rises by 1. A version begins with the number of the
	// version before.
	Change uint32 `json:"change,omitempty"`
	// By has asked for the announcement; nil: not announced, or the daemon by its schedule.
	By *audit.Actor `json:"by,omitempty"`
	// CalledOff is the time (Unix seconds) when the announcement of the next version was called
	// off, and UsesBefore the uses until then: the schedule counts from there.
	CalledOff  int64  `json:"called_off,omitempty"`
	UsesBefore uint64 `json:"uses_before,omitempty"`
	// Recovery marks a recovery successor, and the version after it, until the line is recovered.
	Recovery bool `json:"recovery,omitempty"`
	// Envelope has the sealed seed of a recoverable version, until the version is destroyed.
	Envelope []byte `json:"envelope,omitempty"`
	// Succession is the step from the version before to this version. Authorization lets a Noise
	// key speak for the identity.
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

// info describes the key of a record in any state but making.
func (rec record) info(ref keystore.Ref) (keystore.Info, error) {
	public, err := hex.DecodeString(rec.PublicKey)
	if err != nil || len(public) == 0 {
		return keystore.Info{}, fmt.Errorf("key %v in the ledger has no public key", ref)
	}
	return keystore.Info{
		Ref: ref, Algorithm: rec.Algorithm, PublicKey: public, Custody: rec.Custody,
		Provenance: rec.Provenance, Tag: rec.Tag,
	}, nil
}

// made completes a record with the device's description of the key.
func (rec *record) made(info keystore.Info) {
	rec.PublicKey, rec.Custody, rec.Provenance = hex.EncodeToString(info.PublicKey), info.Custody, info.Provenance
}

// write writes the record, or deletes the record of an absent version.
func (rec record) write(tx *ledger.Tx, name string) error {
	if rec.State == absent {
		return tx.Delete(ledger.Keys, name)
	}
	return tx.Put(ledger.Keys, name, manage.Encode(rec))
}

// unfinished reads the records in the state making.
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
