// Package escrow seals a private key for recovery holders: any M of N holders together can open the
// seal, and fewer learn nothing. Begin reading at Seal, then at Begin in ceremony.go.
//
// A private key has 32 bytes here: the seed of Ed25519 (RFC 8032), the scalar of X25519 (RFC 7748)
// or the scalar of P-256, the highest byte first. Each envelope has an age key of its own
// (https://age-encryption.org/v1), to which the private key is encrypted. The private key of age is
// a number below the order of the group ristretto255 (RFC 9496), and is shared by Shamir's scheme
// over the numbers below that order. Each share is a line of text, encrypted with age to the
// holder's public key. So age and a few lines of any language with large integers can open an
// envelope, without this program; docs/SPEC.md has them.
package escrow

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"countersign/approval"
	"countersign/internal/ijson"
	"countersign/internal/keystore"
	"countersign/internal/recipient"
	"countersign/internal/secret"

	"filippo.io/age"
	"github.com/cloudflare/circl/group"
	"github.com/cloudflare/circl/secretsharing"
	"golang.org/x/crypto/ssh"
)

// Store is a keystore.Store that can make keys for holders. Both calls use a process that ends
// afterwards, and only that process has the seed.
type Store interface {
	keystore.Store
	// Seal makes a key from a new private key, as Import does, and seals that for the holders.
	Seal(
		ctx context.Context, ref keystore.Ref, alg keystore.Algorithm, tag keystore.Tag, to Set,
	) (keystore.Key, []byte, error)
	// Open makes the key of an envelope again, with the shares of enough holders.
	Open(ctx context.Context, tag keystore.Tag, envelope []byte, shares []string) (keystore.Key, error)
}

// Errors of this package wrap one of these sentinels.
var (
	ErrSet      = errors.New("this is no set of recovery holders")
	ErrEnvelope = errors.New("the envelope of the key is damaged")
	ErrShare    = errors.New("this is no share that was sealed")
	ErrShares   = errors.New("there are not enough shares")
)

// Bounds of a set. With one needed holder, one person would have the key.
const (
	MinNeeded  = 2
	MaxHolders = approval.MaxHolders
)

// Holder is a person with shares.
type Holder struct {
	Name      string `json:"name"`      // as a key's name: see keystore.CheckName
	Recipient string `json:"recipient"` // age1..., or an SSH public key without a comment
}

// String is the holder as acts and events have it: the name, a blank and the public key.
func (h Holder) String() string { return h.Name + " " + h.Recipient }

// Set is a set of holders, and how many of them open an envelope.
type Set struct {
	Number  uint32   `json:"number"` // of the set, from 1
	Needed  int      `json:"needed"`
	Holders []Holder `json:"holders"`
}

// NewHolder reads a holder's public key, in any form that age reads.
func NewHolder(name, text string) (Holder, error) {
	if err := keystore.CheckName(name); err != nil || len(name) > 32 {
		return Holder{}, fmt.Errorf("holder %.70q: %w: a name has 1 to 32 lower-case letters, digits and hyphens, and "+
			"does not begin with a hyphen", name, ErrSet)
	}
	if _, err := recipient.Parse(text); err != nil {
		return Holder{}, fmt.Errorf("holder %s: %w: %w", name, ErrSet, err)
	}
	h := Holder{name, strings.TrimSpace(text)}
	if strings.HasPrefix(h.Recipient, "ssh-") {
		key, _, _, rest, err := ssh.ParseAuthorizedKey([]byte(h.Recipient))
		if err != nil || len(bytes.TrimSpace(rest)) > 0 {
			return Holder{}, fmt.Errorf("holder %s: %w: write one SSH public key", name, ErrSet)
		}
		h.Recipient = strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
	}
	return h, nil
}

// ReadHolder reads a holder from a text of a command line: NAME=KEY, or NAME=FILE with the key.
func ReadHolder(text string) (Holder, error) {
	name, key, ok := strings.Cut(text, "=")
	if !ok {
		return Holder{}, fmt.Errorf("%.60q: %w: write NAME=KEY or NAME=FILE", text, ErrSet)
	}
	f, err := os.Open(key)
	if missing := errors.Is(err, fs.ErrNotExist); err != nil && !(missing &&
		(strings.HasPrefix(key, "age1") || strings.HasPrefix(key, "ssh-"))) {
		return Holder{}, fmt.Errorf("holder %.32q: %w", name, err)
	} else if err == nil {
		defer f.Close()
		b, err := io.ReadAll(io.LimitReader(f, maxEnvelope))
		if err != nil {
			return Holder{}, fmt.Errorf("holder %.32q: %w", name, err)
		}
		key = string(b)
	}
	return NewHolder(name, key)
}

// Fingerprint is the holder's key in a short form: age1..., or the type and fingerprint of an SSH
// key, as ssh-keygen -l prints it.
func (h Holder) Fingerprint() string {
	if key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(h.Recipient)); err == nil {
		return key.Type() + " " + ssh.FingerprintSHA256(key)
	}
	return h.Recipient
}

// Texts are the holders as acts and events have them.
func (s Set) Texts() (all []string) {
	for _, h := range s.Holders {
		all = append(all, h.String())
	}
	return all
}

// Equal reports that two sets have the same number and the same holders.
func (s Set) Equal(o Set) bool { return s.Number == o.Number && s.SameHolders(o) }

// SameHolders reports that two sets have the same holders, in the same order, and need as many.
func (s Set) SameHolders(o Set) bool {
	return s.Needed == o.Needed && slices.Equal(s.Holders, o.Holders)
}

// Check refuses a set with too few holders, or with a holder that is none or there twice.
func (s Set) Check() error {
	if len(s.Holders) > MaxHolders || s.Needed < MinNeeded || s.Needed > len(s.Holders) {
		return fmt.Errorf("%w: %d of %d holders: name %d to %d holders, of whom %d or more are needed",
			ErrSet, s.Needed, len(s.Holders), MinNeeded, MaxHolders, MinNeeded)
	}
	names, keys := map[string]bool{}, map[string]bool{}
	for _, h := range s.Holders {
		same, err := NewHolder(h.Name, h.Recipient)
		if err == nil && same != h {
			err = fmt.Errorf("holder %s: %w: its key is not in the short form", h.Name, ErrSet)
		}
		if err != nil {
			return err
		}
		if names[h.Name] || keys[h.Recipient] {
			return fmt.Errorf("holder %s: %w: the name or the key is there twice", h.Name, ErrSet)
		}
		names[h.Name], keys[h.Recipient] = true, true
	}
	return nil
}

// Envelope is the sealed seed of one key.
type Envelope struct {
	Format    int                `json:"format"` // 1
	Key       keystore.Ref       `json:"key"`
	Algorithm keystore.Algorithm `json:"algorithm"`
	PublicKey string             `json:"public_key"` // of the key, hexadecimal
	Set       uint32             `json:"set"`        // number of the set of holders
	Needed    int                `json:"needed"`
	Recipient string             `json:"recipient"` // the age key of the envelope
	Shares    []Sealed           `json:"shares"`    // the first is number 1
	Seed      []byte             `json:"seed"`      // age file for Recipient: 64 hex digits and a line feed
}

// Sealed is the share of a holder.
type Sealed struct {
	Holder
	SHA256 string `json:"sha256"` // of the share, hexadecimal
	Sealed []byte `json:"sealed"` // age file for the holder: the share
}

const (
	format      = 1
	shareDomain = "countersign-share-v1"
	identityHRP = "age-secret-key-"
)

// share returns the text of a share: a line with the key, its public key, the number of the share,
// and its value as 64 hex digits, the lowest byte first.
func (e Envelope) share(number int, value []byte) string {
	return fmt.Sprintf("%s %v %s %d %x\n", shareDomain, e.Key, e.PublicKey, number, value)
}

// Digest is SHA-256 of an envelope, hexadecimal.
func Digest(envelope []byte) string {
	sum := sha256.Sum256(envelope)
	return hex.EncodeToString(sum[:])
}

// NewSeed fills in a new private key. Call NewSeed within secret.Do.
func NewSeed(alg keystore.Algorithm, seed secret.Bytes) error {
	for range 8 { // a random number is no scalar of P-256 once in 2^32
		rand.Read(seed.Expose())
		if _, err := keystore.PublicOf(alg, seed); err == nil || alg != keystore.P256 {
			return err
		}
	}
	return errors.New("escrow: the generator gives no scalar")
}

// Seal seals a private key. Call Seal within secret.Do: the private key, that of the envelope and
// all shares are in memory meanwhile.
func Seal(ref keystore.Ref, alg keystore.Algorithm, seed secret.Bytes, to Set) (envelope []byte, err error) {
	if err := to.Check(); err != nil {
		return nil, err
	}
	public, err := keystore.PublicOf(alg, seed)
	if err != nil {
		return nil, err
	}
	e := Envelope{
		Format: format, Key: ref, Algorithm: alg, PublicKey: hex.EncodeToString(public), Set: to.Number,
		Needed: to.Needed,
	}
	number := group.Ristretto255.RandomNonZeroScalar(rand.Reader)
	identity, err := identityOf(number)
	if err != nil {
		return nil, err
	}
	e.Recipient = identity.Recipient().String()
	if e.Seed, err = encrypt(identity.Recipient(), fmt.Sprintf("%x\n", seed.Expose())); err != nil {
		return nil, err
	}
	var lines []string
	for i, part := range secretsharing.New(rand.Reader, uint(to.Needed-1), number).Share(uint(len(to.Holders))) {
		value, err := part.Value.MarshalBinary()
		if err != nil {
			return nil, fmt.Errorf("escrow: %w", err)
		}
		line := e.share(i+1, value)
		key, err := recipient.Parse(to.Holders[i].Recipient)
		if err != nil {
			return nil, fmt.Errorf("escrow: %w", err)
		}
		sealed, err := encrypt(key, line)
		if err != nil {
			return nil, err
		}
		e.Shares = append(e.Shares, Sealed{Holder: to.Holders[i], SHA256: Digest([]byte(line)), Sealed: sealed})
		lines = append(lines, line)
	}
	if envelope, err = json.Marshal(e); err != nil {
		return nil, fmt.Errorf("escrow: %w", err)
	}
	// The last shares open the envelope, so the polynomial has no higher degree than it should.
	again, err := Open(envelope, lines[len(lines)-to.Needed:])
	if err == nil && !again.Equal(seed) {
		err = fmt.Errorf("%w: its shares open another seed", ErrEnvelope)
	}
	again.Wipe()
	if err != nil {
		return nil, err
	}
	return envelope, nil
}

// identityOf returns the age key with a private number.
func identityOf(number group.Scalar) (*age.X25519Identity, error) {
	b, err := number.MarshalBinary()
	if err != nil {
		return nil, fmt.Errorf("escrow: %w", err)
	}
	defer clear(b)
	identity, err := age.ParseX25519Identity(strings.ToUpper(encodeBech32(identityHRP, b)))
	if err != nil { // the text of age may have a part of the key
		return nil, errors.New("escrow: age does not take the private key")
	}
	return identity, nil
}

func encrypt(to age.Recipient, text string) ([]byte, error) {
	var file bytes.Buffer
	w, err := age.Encrypt(&file, to)
	if err == nil {
		if _, err = io.WriteString(w, text); err == nil {
			err = w.Close()
		}
	}
	if err != nil {
		return nil, fmt.Errorf("escrow: %w", err)
	}
	return file.Bytes(), nil
}

// decrypt returns at most most bytes.
func decrypt(file []byte, most int64, with ...age.Identity) ([]byte, error) {
	r, err := age.Decrypt(bytes.NewReader(file), with...)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(r, most+1))
	if err == nil && int64(len(b)) > most {
		err = errors.New("it is too long")
	}
	return b, err
}

// maxEnvelope is the most bytes of an envelope, far above one for MaxHolders with large SSH keys.
const maxEnvelope = 64 << 10

// ParseEnvelope reads an envelope and checks its form. The private parts are not opened.
func ParseEnvelope(b []byte) (e Envelope, err error) {
	if len(b) > maxEnvelope {
		return e, fmt.Errorf("%w: it has %d bytes", ErrEnvelope, len(b))
	}
	if err := ijson.Decode(b, &e); err != nil {
		return e, fmt.Errorf("%w: %w", ErrEnvelope, err)
	}
	if e.Format > format {
		return e, fmt.Errorf("%w: a newer version of countersign has made it", ErrEnvelope)
	}
	return e, e.check()
}

// Holders returns the set of holders that the envelope is sealed for.
func (e Envelope) Holders() Set {
	set := Set{Number: e.Set, Needed: e.Needed}
	for _, s := range e.Shares {
		set.Holders = append(set.Holders, s.Holder)
	}
	return set
}

// Of reads the envelope in the record of a key, and refuses that of another key.
func Of(envelope []byte, ref keystore.Ref, public []byte) (Envelope, error) {
	e, err := ParseEnvelope(envelope)
	if err == nil && (e.Key != ref || e.PublicKey != hex.EncodeToString(public)) {
		err = fmt.Errorf("%w: it is that of another key", ErrEnvelope)
	}
	return e, err
}

func (e Envelope) check() error {
	public, err := hex.DecodeString(e.PublicKey)
	if err == nil {
		err = e.Holders().Check()
	}
	if err == nil {
		_, err = keystore.ParseRef(e.Key.String())
	}
	size, known := map[keystore.Algorithm]int{keystore.Ed25519: 32, keystore.X25519: 32, keystore.P256: 65}[e.Algorithm]
	if err == nil && (e.Format != format || !known || len(public) != size ||
		hex.EncodeToString(public) != e.PublicKey) {
		err = errors.New("it has no public key of its algorithm")
	}
	if err == nil {
		_, err = age.ParseX25519Recipient(e.Recipient)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrEnvelope, err)
	}
	return nil
}

// number returns the number of a share, from 1, or ErrShare for a line that is no share of the
// envelope.
func (e Envelope) number(line string) (number int, value group.Scalar, err error) {
	var text, digits string
	if fields := strings.Fields(line); len(fields) == 5 {
		text, digits = fields[3], fields[4]
	}
	number, err = strconv.Atoi(text)
	if err != nil || number < 1 || number > len(e.Shares) {
		return 0, nil, fmt.Errorf("%v: %w", e.Key, ErrShare)
	}
	b, err := hex.DecodeString(digits)
	if err == nil && (Digest([]byte(line)) != e.Shares[number-1].SHA256 || e.share(number, b) != line) {
		err = errors.New("it is another one")
	}
	value = group.Ristretto255.NewScalar()
	if err == nil {
		err = value.UnmarshalBinary(b)
	}
	clear(b)
	if err != nil { // without the text, which may have a secret
		return 0, nil, fmt.Errorf("the share of %s for %v: %w", e.Shares[number-1].Name, e.Key, ErrShare)
	}
	return number, value, nil
}

// Open returns the seed in an envelope. Call Open within secret.Do.
func Open(envelope []byte, lines []string) (seed secret.Bytes, err error) {
	e, err := ParseEnvelope(envelope)
	if err != nil {
		return seed, err
	}
	var shares []secretsharing.Share
	var seen []int
	for _, line := range lines {
		number, value, err := e.number(line)
		if err != nil {
			return seed, err
		}
		if slices.Contains(seen, number) {
			continue // the same share twice is one
		}
		seen = append(seen, number)
		id := group.Ristretto255.NewScalar().SetUint64(uint64(number))
		shares = append(shares, secretsharing.Share{ID: id, Value: value})
	}
	if len(shares) < e.Needed {
		return seed, fmt.Errorf("%v: %w: %d of %d", e.Key, ErrShares, len(shares), e.Needed)
	}
	sum, err := secretsharing.Recover(uint(e.Needed-1), shares)
	if err != nil {
		return seed, fmt.Errorf("%v: %w", e.Key, err)
	}
	identity, err := identityOf(sum)
	if err != nil {
		return seed, err
	}
	if identity.Recipient().String() != e.Recipient {
		return seed, fmt.Errorf("%v: %w: its shares are of another key", e.Key, ErrEnvelope)
	}
	text, err := decrypt(e.Seed, 65, identity)
	if err != nil {
		return seed, fmt.Errorf("%v: %w: its seed can't be decrypted", e.Key, ErrEnvelope)
	}
	defer clear(text)
	if seed, err = keystore.ParseSeed(text); err != nil {
		return seed, fmt.Errorf("%v: %w: %w", e.Key, ErrEnvelope, err)
	}
	if public, err := keystore.PublicOf(e.Algorithm, seed); err != nil || hex.EncodeToString(public) != e.PublicKey {
		seed.Wipe()
		return secret.Bytes{}, fmt.Errorf("%v: %w: its seed is that of another key", e.Key, ErrEnvelope)
	}
	return seed, nil
}
