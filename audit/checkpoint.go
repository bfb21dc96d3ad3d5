package audit

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// A Log is known by the Ed25519 key that signs its checkpoints. Each epoch has an origin of its own, since it is a tree of
// its own:
//
//	countersign/ID/EPOCH       ID: the first 16 hex digits of the public key
//
// The verifier key of an epoch (C2SP signed-note) is made of origin and public key, so that the one of any epoch tells those of
// all.
type Log struct{ public ed25519.PublicKey }

// NewLog returns the log whose checkpoints a public key signs.
func NewLog(public []byte) (Log, error) {
	if len(public) != ed25519.PublicKeySize {
		return Log{}, fmt.Errorf("audit: the log's key has %d bytes, want %d", len(public), ed25519.PublicKeySize)
	}
	return Log{bytes.Clone(public)}, nil
}

// ParseVerifierKey reads the verifier key of any epoch.
func ParseVerifierKey(vkey string) (Log, error) {
	vkey = strings.TrimSpace(vkey)
	fields := strings.SplitN(vkey, "+", 3)
	if _, err := note.NewVerifier(vkey); err != nil || len(fields) != 3 {
		return Log{}, errors.New("audit: this is not a verifier key: it has the form NAME+HASH+KEY (countersign admin audit key)")
	}
	b, err := base64.StdEncoding.DecodeString(fields[2])
	if err != nil || len(b) != 1+ed25519.PublicKeySize {
		return Log{}, errors.New("audit: the verifier key is not of an Ed25519 key")
	}
	l := Log{b[1:]}
	if _, err := l.epochOf(fields[0]); err != nil {
		return Log{}, fmt.Errorf("audit: the verifier key is not of a log of this kind: %w", err)
	}
	return l, nil
}

// Name is countersign/ID: what all epochs' origins begin with, and what the appliance is called in what operators sign.
func (l Log) Name() string { return "countersign/" + hex.EncodeToString(l.public[:8]) }

// Origin is the first line of an epoch's checkpoints.
func (l Log) Origin(epoch uint32) string {
	return l.Name() + "/" + strconv.FormatUint(uint64(epoch), 10)
}

func (l Log) epochOf(origin string) (uint32, error) {
	rest, ok := strings.CutPrefix(origin, l.Name()+"/")
	n, err := strconv.ParseUint(rest, 10, 32)
	if !ok || err != nil || rest != strconv.FormatUint(n, 10) {
		return 0, fmt.Errorf("the origin %q is not %s/EPOCH", origin, l.Name())
	}
	return uint32(n), nil
}

// VerifierKey is what others need to check an epoch's checkpoints with.
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
	Size  uint64
	Root  Hash
}

func (c Checkpoint) body(l Log) string {
	return fmt.Sprintf("%s\n%d\n%s\n", l.Origin(c.Epoch), c.Size, c.Root)
}

// Sign writes a checkpoint with the signature that sign makes over it.
func (l Log) Sign(c Checkpoint, sign func(message []byte) ([]byte, error)) ([]byte, error) {
	v, err := note.NewVerifier(l.VerifierKey(c.Epoch))
	if err != nil {
		return nil, err
	}
	return note.Sign(&note.Note{Text: c.body(l)}, signer{v, sign})
}

type signer struct {
	note.Verifier
	sign func([]byte) ([]byte, error)
}

func (s signer) Sign(message []byte) ([]byte, error) { return s.sign(message) }

// Open reads a checkpoint and checks its signature. Signatures of others (witnesses) are not looked at.
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
	c := Checkpoint{Epoch: epoch}
	c.Size, err = strconv.ParseUint(lines[1], 10, 62)
	if err != nil || lines[1] != strconv.FormatUint(c.Size, 10) {
		return Checkpoint{}, fmt.Errorf("audit: checkpoint of epoch %d: its size is %q", epoch, lines[1])
	}
	if c.Root, err = tlog.ParseHash(lines[2]); err != nil || lines[2] != c.Root.String() {
		return Checkpoint{}, fmt.Errorf("audit: checkpoint of epoch %d: its root is %q", epoch, lines[2])
	}
	return c, nil
}

// Proof shows that an event is in the log.
type Proof struct {
	Event      uint64 // its number through all epochs, by the appliance's word: the tree knows Index only
	Index      uint64 // its place in the epoch's tree
	Leaf       []byte // the event as it is in the log
	Path       []Hash // from the leaf to the root (RFC 6962 section 2.1.1)
	Checkpoint []byte // signed, of a tree that has the event
}

// Prove makes the path for a leaf of a tree of that size.
func Prove(size, index uint64, r Reader) ([]Hash, error) {
	return tlog.ProveRecord(int64(size), int64(index), r)
}

// Check holds a proof against the log's key. It returns the event and the checkpoint.
func (l Log) Check(p Proof) (Event, Checkpoint, error) {
	c, err := l.Open(p.Checkpoint)
	if err != nil {
		return Event{}, Checkpoint{}, err
	}
	if p.Index >= c.Size {
		return Event{}, Checkpoint{}, fmt.Errorf("audit: proof: leaf %d is not in a tree of %d", p.Index, c.Size)
	}
	if err := tlog.CheckRecord(p.Path, int64(c.Size), c.Root, int64(p.Index), LeafHash(p.Leaf)); err != nil {
		return Event{}, Checkpoint{}, fmt.Errorf("audit: proof: it does not lead to the root of the checkpoint: %w", err)
	}
	e, err := decodeStrict(p.Leaf) // as Verify does: there is one way to read it
	if err != nil {
		return Event{}, Checkpoint{}, fmt.Errorf("audit: proof: event %d: %w", p.Event, err)
	}
	return e, c, nil
}
