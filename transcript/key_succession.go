package transcript

import (
	"crypto/sha256"
	"encoding/binary"
)

const keySuccessionDomain = "countersign-key-succession-v1"

var keySuccessionType = Type{
	"key-succession-v1",
	"a step from a version of a key to a later one; made by the appliance only, at a rotation or a recovery",
	[]Field{
		{"key", true, "the name of the key: 1 to 64 of a-z 0-9 -, not beginning with -"},
		{"version", true, "of the new public key, 2 to 4294967295"},
		{"old_public_key", true, formKey + "; the signer, unless the step recovers the line"},
		{"new_public_key", true, formKey + "; differs from old_public_key"},
		{"time", true, formTime},
		{"next", false, "32 bytes, base64url: SHA-256 of the public key of the version after the new one"},
		{"recovery", false, "32 bytes, base64url: the commitment to the recovery successor of the line"},
		{"recovered", false, "true: the new key is the recovery successor, and signs; needs next, no recovery"},
	},
	keySuccession,
	readJSON(keySuccessionDomain),
}

// Succession is a step from one version of a key to a later one: New is the public key of Version.
type Succession struct {
	Key      string
	Version  uint32
	Old, New [32]byte
	Next     *[32]byte // SHA-256 of the public key of the version after New; nil if not committed to
	Recovery *[32]byte // the RecoveryCommitment of the line's recovery successor; nil if there is none
	// Recovered is a step to the recovery successor, after the loss of the old key's device. New
	// has signed the step, which is good where the line has committed to New and Next.
	Recovered bool
}

// RecoveryCommitment is the commitment of a line to its recovery successor: SHA-256 of 68 bytes,
// the successor's version (big-endian), its public key, and next, the SHA-256 of the public key
// after it. So a thief of the recovery key alone can't name another next key, nor pass the key off
// under another number after the compromise of the version is known.
func RecoveryCommitment(version uint32, publicKey, next [32]byte) [32]byte {
	b := binary.BigEndian.AppendUint32(nil, version)
	return sha256.Sum256(append(append(b, publicKey[:]...), next[:]...))
}

// keySuccession builds a key-succession-v1: see bindJSON for the bytes.
func keySuccession(d *Document) error {
	var p struct {
		Key          string    `json:"key"`
		Version      uint32    `json:"version"`
		OldPublicKey publicKey `json:"old_public_key"`
		NewPublicKey publicKey `json:"new_public_key"`
		Time         int64     `json:"time"`
		Next         *string   `json:"next"`
		Recovery     *string   `json:"recovery"`
		Recovered    *bool     `json:"recovered"`
	}
	if err := d.decode(&p); err != nil {
		return err
	}
	if err := checkKeyName("payload.key", p.Key); err != nil {
		return err
	}
	if p.Version < 2 {
		return malformed("payload.version", "must be at least 2: the first version succeeds nothing")
	}
	if err := p.OldPublicKey.check("payload.old_public_key"); err != nil {
		return err
	}
	if err := p.NewPublicKey.check("payload.new_public_key"); err != nil {
		return err
	}
	if p.NewPublicKey == p.OldPublicKey {
		return malformed("payload.new_public_key", "must differ from payload.old_public_key")
	}
	if err := checkTime("payload.time", p.Time); err != nil {
		return err
	}
	step := &Succession{Key: p.Key, Version: p.Version, Old: p.OldPublicKey, New: p.NewPublicKey}
	if p.Next != nil {
		next, err := decodeBytes("payload.next", *p.Next, 32)
		if err != nil {
			return err
		}
		step.Next = (*[32]byte)(next)
	}
	if p.Recovery != nil {
		recovery, err := decodeBytes("payload.recovery", *p.Recovery, 32)
		if err != nil {
			return err
		}
		step.Recovery = (*[32]byte)(recovery)
	}
	d.Signers = [][]byte{p.OldPublicKey[:]}
	if p.Recovered != nil {
		switch {
		case !*p.Recovered:
			return malformed("payload.recovered", "must be true, or absent")
		case p.Next == nil:
			return malformed("payload.next", "must be there, since the line is recovered")
		case p.Recovery != nil: // by a thief of the new key, who signs the next step too
			return malformed("payload.recovery", "must be absent, since the line is recovered")
		}
		step.Recovered = true
		d.Signers = [][]byte{p.NewPublicKey[:]}
	}
	d.Reserved = true
	d.Succession = step
	return d.bindJSON(keySuccessionDomain)
}

// checkKeyName accepts the names that package keystore accepts for a key. A test at the root
// compares the two functions.
func checkKeyName(field, name string) error {
	ok := name != "" && len(name) <= 64 && name[0] != '-'
	for i := range len(name) {
		c := name[i]
		ok = ok && (c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-')
	}
	if !ok {
		return malformed(field, "must have 1 to 64 lower-case letters, digits and hyphens, and not begin with a hyphen")
	}
	return nil
}
