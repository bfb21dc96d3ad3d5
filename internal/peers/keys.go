package peers

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/manage"
)

// A peer has one or more keys, so that a new key can come into use before an old one ends. The
// invariant:
//
//   - A public key belongs to one peer at the most, in the ledger and in memory.
//   - All that a peer has belongs to its name: nonces, windows, quotas, limits, groups, the rules
//     of policy, and the acknowledgements that end a grace time sooner. A key only proves the name.
//     So neither a new key nor the end of a key changes any of it.
//   - News are told to each key until that key has acknowledged them. Each key may be in a program
//     of its own, and a thief with one key must not keep the news from the others.
//   - A key opens no session, and nothing is signed or released for its sessions, from the moment
//     in which RemoveKey is called. The other sessions of the peer go on.
//   - A peer always has a key. The last one ends with the peer: see Remove.

// MaxKeys is the largest number of keys of a peer.
const MaxKeys = 8

// Key is a Noise static key of a peer.
type Key struct {
	PublicKey   [32]byte
	Added       time.Time
	Seen        time.Time // last session or request with this key; zero for never
	Connections int       // open connections
}

// memberKey is a key in memory.
type memberKey struct {
	Key
	removed bool // RemoveKey has begun, or the ledger has the removal
	// known and warned are what was acknowledged with the key: see keyRecord.
	known  map[string]uint32
	warned compromises
}

// keyRecord is the ledger's record of a key, in the record of its peer.
type keyRecord struct {
	PublicKey keyText `json:"public_key"`
	Added     int64   `json:"added"`          // Unix seconds
	Seen      int64   `json:"seen,omitempty"` // Unix seconds; at most about a minute old
	// Known has the last version of each key whose rotation was acknowledged with this key.
	Known map[string]uint32 `json:"known,omitempty"`
	// Warned has each compromise that was acknowledged with the key. An acknowledged rotation, also
	// of a later version, says nothing about a compromise.
	Warned compromises `json:"warned,omitempty"`
}

// keyText is a public key, in hex in the ledger.
type keyText [32]byte

func (k keyText) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(k[:])), nil }

func (k *keyText) UnmarshalJSON(b []byte) error {
	var text string
	if err := json.Unmarshal(b, &text); err != nil {
		return err
	}
	key, err := hex.DecodeString(text)
	if err != nil || len(key) != len(k) {
		return fmt.Errorf("%q is no public key", text)
	}
	copy(k[:], key)
	return nil
}

func (r *record) index(publicKey [32]byte) int {
	return slices.IndexFunc(r.Keys, func(k keyRecord) bool { return k.PublicKey == publicKey })
}

func (r *record) has(publicKey [32]byte) bool { return r.index(publicKey) >= 0 }

// takeKeys updates the keys of a member from the record. The caller holds mu.
func (r *Registry) takeKeys(m *Member, keys []keyRecord) {
	rec := record{Keys: keys}
	for publicKey, k := range m.keys {
		if !rec.has(publicKey) {
			k.removed = true // for its sessions
			delete(m.keys, publicKey)
			delete(r.members, publicKey)
		}
	}
	for _, k := range keys {
		own := m.keys[k.PublicKey]
		if own == nil {
			own = &memberKey{Key: Key{PublicKey: k.PublicKey, Added: time.Unix(k.Added, 0)}}
			m.keys[k.PublicKey], r.members[k.PublicKey] = own, m
		}
		own.known, own.warned = k.Known, k.Warned
		if written := time.Unix(k.Seen, 0); k.Seen != 0 && own.Seen.Before(written) {
			own.Seen = written
		}
	}
}

// free refuses a public key that a peer has already.
func free(tx *ledger.Tx, name string, publicKey [32]byte) error {
	return tx.All(ledger.Peers, func(other string, value []byte) error {
		rec, err := decode(other, value)
		if err == nil && rec.has(publicKey) {
			err = fmt.Errorf("peer %q: %w: the public key is enrolled as %q", name, manage.ErrExists, other)
		}
		return err
	})
}

// AddKey enrols a further key of a peer. No peer may have the key. Sessions with the other keys go
// on.
func (r *Registry) AddKey(ctx context.Context, who audit.Actor, name string, publicKey []byte) error {
	if err := Check(name, publicKey); err != nil {
		return err
	}
	k := keyRecord{PublicKey: keyText(publicKey), Added: time.Now().Unix()}
	return r.run(ctx, who, name, func(ctx context.Context) error {
		return r.ledger.Update(ctx, func(tx *ledger.Tx) error {
			rec, err := enrolled(tx, name)
			if err != nil {
				return err
			}
			if err := free(tx, name, k.PublicKey); err != nil {
				return err
			}
			if len(rec.Keys) >= MaxKeys {
				return fmt.Errorf("peer %q: %w: it has %d keys, the most that a peer may have: remove one",
					name, manage.ErrConflict, len(rec.Keys))
			}
			rec.Keys = append(rec.Keys, k)
			if err := tx.Put(ledger.Peers, name, manage.Encode(rec)); err != nil {
				return err
			}
			return tx.Append(ledger.EventOf(audit.NewPeerKeyAdded(who, name, k.PublicKey)))
		})
	})
}

// RemoveKey ends one key of a peer, but not the last one. The steps are those of Remove, for the
// sessions of the key: after an error the ledger may still have the key, and the caller must repeat
// RemoveKey.
func (r *Registry) RemoveKey(ctx context.Context, who audit.Actor, name string, publicKey [32]byte) error {
	last := fmt.Errorf("peer %q: %w: it has no other key: add the new key before, or remove the peer",
		name, manage.ErrConflict)
	return r.exclude(ctx, exclusion{who: who, name: name, key: &publicKey, mark: func(m *Member) error {
		k := m.keys[publicKey]
		if k == nil {
			return nil // the ledger says whose key it is
		}
		for other, each := range m.keys {
			if other != publicKey && !each.removed {
				k.removed = true
				return nil
			}
		}
		return last
	}, write: func(tx *ledger.Tx, rec record) error {
		i := rec.index(publicKey)
		if i < 0 {
			return fmt.Errorf("key %x of peer %q: %w", publicKey, name, manage.ErrNotFound)
		}
		if len(rec.Keys) == 1 {
			return last
		}
		rec.Keys = slices.Delete(rec.Keys, i, i+1)
		if err := tx.Put(ledger.Peers, name, manage.Encode(rec)); err != nil {
			return err
		}
		return tx.Append(ledger.EventOf(audit.NewPeerKeyRemoved(who, name, publicKey)))
	}})
}
