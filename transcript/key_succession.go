package transcript

const keySuccessionDomain = "countersign-key-succession-v1"

var keySuccessionType = Type{
	"key-succession-v1",
	"the old version of a key endorses the new version; made by the appliance only, at a rotation",
	[]Field{
		{"key", true, "the name of the key: 1 to 64 of a-z 0-9 -, not beginning with -"},
		{"version", true, "of the new public key, 2 to 4294967295"},
		{"old_public_key", true, formKey + "; the signer"},
		{"new_public_key", true, formKey + "; differs from old_public_key"},
		{"time", true, formTime},
		{"next", false, "32 bytes, base64url: SHA-256 of the public key of the version after the new one"},
	},
	keySuccession,
	readJSON(keySuccessionDomain),
}

// Succession is a step from one version of a key to the next: New is the public key of Version.
type Succession struct {
	Key      string
	Version  uint32
	Old, New [32]byte
	Next     *[32]byte // SHA-256 of the public key of the version after New; nil if not committed to
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
	d.Signers = [][]byte{p.OldPublicKey[:]}
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
