package audit

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"countersign/internal/eddsa"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// Log is the identity of an audit log: the Ed25519 public key that verifies its checkpoints. Each
// epoch is a tree of its own and therefore has an origin of its own:
//
//	countersign/ID/EPOCH       ID: the first 16 hex digits of the public key
//
// The verifier key of an epoch (C2SP signed-note) consists of the origin and the public key. The
// verifier keys of all epochs therefore follow from any one of them.
type Log struct{ public ed25519.PublicKey }

// NewLog returns the log whose checkpoints verify under an Ed25519 public key of 32 bytes. The key
// must be one by the strict rules of docs/SPEC.md section 5: under a key of small order, everybody
// can sign checkpoints.
func NewLog(public []byte) (Log, error) {
	if err := eddsa.CheckPublicKey(public); err != nil {
		return Log{}, fmt.Errorf("audit: the log's key: %w", err)
	}
	return Log{bytes.Clone(public)}, nil
}

// ParseVerifierKey returns the log of a verifier key, which may be that of any epoch.
func ParseVerifierKey(vkey string) (Log, error) {
	vkey = strings.TrimSpace(vkey)
	fields := strings.SplitN(vkey, "+", 3)
	if _, err := note.NewVerifier(vkey); err != nil || len(fields) != 3 {
		return Log{}, fmt.Errorf("audit: %q is not a verifier key: "+
			"want NAME+HASH+KEY, as countersign admin audit key prints it", vkey)
	}
	b, err := base64.StdEncoding.Strict().DecodeString(fields[2])
	if err != nil || len(b) != 1+ed25519.PublicKeySize {
		return Log{}, fmt.Errorf("audit: the verifier key %q has no Ed25519 key", vkey)
	}
	l, err := NewLog(b[1:])
	if err != nil {
		return Log{}, fmt.Errorf("the verifier key %q: %w", vkey, err)
	}
	epoch, err := l.epochOf(fields[0])
	if err != nil {
		return Log{}, fmt.Errorf("audit: the verifier key is not of an audit log of Countersign: %w", err)
	}
	if canonical := l.VerifierKey(epoch); canonical != vkey {
		return Log{}, fmt.Errorf("audit: the verifier key %q is not in its one form, which is %q", vkey, canonical)
	}
	return l, nil
}

// Name returns countersign/ID, the prefix of the origins of all epochs. The texts that operators
// approve name the appliance by it.
func (l Log) Name() string { return "countersign/" + l.ID() }

// ID returns the 16 digits of the name: the first 8 bytes of the key, hexadecimal.
func (l Log) ID() string { return hex.EncodeToString(l.public[:8]) }

// Origin returns the first line of an epoch's checkpoints: countersign/ID/EPOCH.
func (l Log) Origin(epoch uint32) string {
	return l.Name() + "/" + strconv.FormatUint(uint64(epoch), 10)
}

// epochOf returns the epoch of an origin of the log.
func (l Log) epochOf(origin string) (uint32, error) {
	rest, ok := strings.CutPrefix(origin, l.Name()+"/")
	n, err := strconv.ParseUint(rest, 10, 32)
	if !ok || err != nil || rest != strconv.FormatUint(n, 10) {
		return 0, fmt.Errorf("the origin %q is not %s/EPOCH", origin, l.Name())
	}
	return uint32(n), nil
}

// VerifierKey returns the verifier key of an epoch (C2SP signed-note): other tools verify the
// checkpoints of the epoch with the key.
func (l Log) VerifierKey(epoch uint32) string {
	vkey, err := note.NewEd25519VerifierKey(l.Origin(epoch), l.public)
	if err != nil {
		panic("audit: " + err.Error()) // the length was checked
	}
	return vkey
}

// Checkpoint is the head of an epoch's tree.
type Checkpoint struct {
	Epoch uint32
	Size  uint64 // events of the epoch
	Root  Hash   // root hash of the tree over the events
}

func (c Checkpoint) body(l Log) string {
	return fmt.Sprintf("%s\n%d\n%s\n", l.Origin(c.Epoch), c.Size, c.Root)
}

// ParseBody reads the text that Sign has signed. The text must be of this log, without extension
// lines.
func (l Log) ParseBody(text []byte) (Checkpoint, error) {
	lines := strings.Split(string(text), "\n")
	if len(lines) != 4 {
		return Checkpoint{}, fmt.Errorf("audit: the text of a checkpoint has %d lines, want 3", len(lines)-1)
	}
	epoch, err := l.epochOf(lines[0])
	if err != nil {
		return Checkpoint{}, fmt.Errorf("audit: the text of a checkpoint: %w", err)
	}
	c := Checkpoint{Epoch: epoch}
	if c.Size, err = strconv.ParseUint(lines[1], 10, 62); err == nil {
		err = c.Root.UnmarshalText([]byte(lines[2]))
	}
	if err != nil || c.body(l) != string(text) {
		return Checkpoint{}, fmt.Errorf("audit: the text of a checkpoint of epoch %d is not in its one form", epoch)
	}
	return c, nil
}

// Digest returns SHA-256 of the text that Sign signs: a key worker's journal has it.
func (c Checkpoint) Digest(l Log) [32]byte { return sha256.Sum256([]byte(c.body(l))) }

// Sign returns the signed note of a checkpoint (C2SP tlog-checkpoint). The function sign makes the
// Ed25519 signature over a message.
func (l Log) Sign(c Checkpoint, sign func(message []byte) ([]byte, error)) ([]byte, error) {
	v, err := note.NewVerifier(l.VerifierKey(c.Epoch))
	if err != nil {
		return nil, err
	}
	return note.Sign(&note.Note{Text: c.body(l)}, signer{v, sign})
}

// signer is the note.Signer whose private key is behind a function.
type signer struct {
	note.Verifier
	sign func([]byte) ([]byte, error)
}

func (s signer) Sign(message []byte) ([]byte, error) { return s.sign(message) }

// Open parses the signed note of a checkpoint and verifies the log's signature. Open ignores
// signatures of other keys, for example of witnesses.
func (l Log) Open(text []byte) (Checkpoint, error) {
	origin, _, _ := strings.Cut(string(text), "\n")
	epoch, err := l.epochOf(origin)
	if err != nil {
		return Checkpoint{}, fmt.Errorf("audit: checkpoint: %w", err)
	}
	v, err := note.NewVerifier(l.VerifierKey(epoch))
	if err != nil {
		return Checkpoint{}, err
	}
	n, err := note.Open(text, note.VerifierList(v))
	if err != nil {
		return Checkpoint{}, fmt.Errorf("audit: checkpoint of epoch %d: %w", epoch, err)
	}
	lines := strings.Split(n.Text, "\n")
	if len(lines) < 4 {
		return Checkpoint{}, fmt.Errorf("audit: checkpoint of epoch %d: it has %d lines", epoch, len(lines))
	}
	// An extension line has at least one byte (C2SP tlog-checkpoint). The text ends in a newline.
	if slices.Contains(lines[3:len(lines)-1], "") {
		return Checkpoint{}, fmt.Errorf("audit: checkpoint of epoch %d: it has an empty extension line", epoch)
	}
	c := Checkpoint{Epoch: epoch}
	c.Size, err = strconv.ParseUint(lines[1], 10, 62)
	if err != nil || lines[1] != strconv.FormatUint(c.Size, 10) {
		return Checkpoint{}, fmt.Errorf("audit: checkpoint of epoch %d: its size is %q", epoch, lines[1])
	}
	if err := c.Root.UnmarshalText([]byte(lines[2])); err != nil || lines[2] != c.Root.String() {
		return Checkpoint{}, fmt.Errorf("audit: checkpoint of epoch %d: its root is %q", epoch, lines[2])
	}
	return c, nil
}

// Proof proves that an event is in the log (inclusion proof).
type Proof struct {
	// Event is the number of the event through all epochs: a claim of the appliance, since the tree
	// proves Index only.
	Event      uint64 `json:"event"`
	Index      uint64 `json:"index"`      // of the leaf in the epoch's tree, from 0 on
	Leaf       []byte `json:"leaf"`       // JSON of the event, byte for byte as in the log
	Path       []Hash `json:"path"`       // audit path from the leaf to the root (RFC 6962 section 2.1.1)
	Checkpoint []byte `json:"checkpoint"` // signed note of a tree that includes the leaf
}

// Prove returns the audit path (RFC 6962 section 2.1.1) of a leaf in the tree of size leaves.
func Prove(size, index uint64, r Reader) ([]Hash, error) {
	path, err := tlog.ProveRecord(int64(size), int64(index), tlogReader{r})
	if err != nil {
		return nil, err
	}
	return convert[Hash](path), nil
}

// Check verifies a proof with the log's key and returns the event and the checkpoint.
func (l Log) Check(p Proof) (Event, Checkpoint, error) {
	c, err := l.Open(p.Checkpoint)
	if err != nil {
		return Event{}, Checkpoint{}, err
	}
	if p.Index >= c.Size {
		return Event{}, Checkpoint{}, fmt.Errorf("audit: proof: leaf %d is not in a tree of %d leaves", p.Index, c.Size)
	}
	path, root, leaf := convert[tlog.Hash](p.Path), tlog.Hash(c.Root), tlog.RecordHash(p.Leaf)
	if err := tlog.CheckRecord(path, int64(c.Size), root, int64(p.Index), leaf); err != nil {
		return Event{}, Checkpoint{}, fmt.Errorf("audit: proof: its path does not end at the checkpoint: %w", err)
	}
	e, err := decodeStrict(p.Leaf) // as in Verify: an event has one reading
	if err != nil {
		return Event{}, Checkpoint{}, fmt.Errorf("audit: proof: event %d: %w", p.Event, err)
	}
	return e, c, nil
}

// ProveConsistency returns the proof that the tree of to leaves continues the tree of from leaves
// (RFC 6962 section 2.1.2). The proof of a tree with itself is empty.
func ProveConsistency(from, to uint64, r Reader) ([]Hash, error) {
	if from == to {
		return nil, nil
	}
	path, err := tlog.ProveTree(int64(to), int64(from), tlogReader{r})
	if err != nil {
		return nil, err
	}
	return convert[Hash](path), nil
}

// Continues verifies that the tree of c continues the tree of a smaller checkpoint of the same
// epoch: the first leaves of c are the leaves of before. The path is that of ProveConsistency.
func (c Checkpoint) Continues(before Checkpoint, path []Hash) error {
	switch {
	case c.Epoch != before.Epoch || c.Size < before.Size || before.Size == 0:
		return fmt.Errorf("audit: the tree of %d leaves of epoch %d does not continue that of %d leaves of epoch %d",
			c.Size, c.Epoch, before.Size, before.Epoch)
	case c.Size == before.Size && c.Root != before.Root:
		return fmt.Errorf("audit: epoch %d has two trees of %d leaves, with the roots %v and %v",
			c.Epoch, c.Size, before.Root, c.Root)
	case c.Size == before.Size:
		return nil
	}
	err := tlog.CheckTree(convert[tlog.Hash](path), int64(c.Size), tlog.Hash(c.Root), int64(before.Size),
		tlog.Hash(before.Root))
	if err != nil {
		return fmt.Errorf("audit: the tree of %d leaves of epoch %d is not shown to continue that of %d leaves: %w",
			c.Size, c.Epoch, before.Size, err)
	}
	return nil
}

// CheckEpoch verifies the proof of the first event of an epoch. CheckEpoch returns the checkpoint
// of the proof, and the final tree of the epoch before, which the event names.
func (l Log) CheckEpoch(p Proof, epoch uint32) (final, c Checkpoint, err error) {
	e, c, err := l.Check(p)
	if err != nil {
		return final, c, err
	}
	if e.Type != EpochBegun || p.Index != 0 || c.Epoch != epoch || epoch == 0 || e.Resource != epochResource(epoch) {
		return final, c, fmt.Errorf("audit: proof: it is not of the first event of epoch %d", epoch)
	}
	final.Epoch = epoch - 1
	final.Size, err = strconv.ParseUint(e.Metadata["previous_size"], 10, 62)
	if err == nil {
		err = final.Root.UnmarshalText([]byte(e.Metadata["previous_root"]))
	}
	if err != nil {
		return final, c, fmt.Errorf("audit: proof: the first event of epoch %d does not name the end of epoch %d",
			epoch, final.Epoch)
	}
	return final, c, nil
}
