package client

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"slices"

	"countersign/internal/eddsa"
	"countersign/internal/ijson"
	"countersign/transcript"
	"countersign/wire"
)

// KeyLine is one trusted version in a key's line of versions, the active one, and the announced
// version after it. `countersign line pin` prints the JSON form of a KeyLine.
type KeyLine struct {
	Key       string
	Version   uint32
	PublicKey [32]byte
	// Next is the commitment of the version: SHA-256 of the next version's public key, which the
	// appliance makes in advance. Zero means unknown. With a known commitment, a thief of this
	// version's private key can't lead the line to a key of his own.
	Next [32]byte
	// Recovery is the commitment of the line to its recovery successor, which is on another device
	// (transcript.RecoveryCommitment). Zero means none. The line goes on with it after the loss of
	// the device.
	Recovery [32]byte
	// NewRecovery is the commitment that the last step has named, where that is another one. When
	// the next step names the same, NewRecovery becomes Recovery: a thief of one private key can't
	// put a key of his own there.
	NewRecovery [32]byte
	// Announced is version Version+1, which is trusted too, and was announced and not active yet.
	// Signatures of both versions are good. Zero: none.
	Announced Successor
}

// Successor is the version after a version in a key's line, with a commitment of its own.
type Successor struct{ PublicKey, Next, Recovery, NewRecovery [32]byte }

// LineOf is the line of a key at a version, with the commitments that the appliance shows. Whoever
// pins the line trusts the appliance once: compare the public key with the one that its operator
// names.
func LineOf(k wire.Key) KeyLine {
	return KeyLine{
		Key: k.Name, Version: k.Version, PublicKey: k.PublicKey, Next: known(k.Next), Recovery: known(k.Recovery),
	}
}

// Newest returns the newest trusted version: the announced one, or else the line itself.
func (l KeyLine) Newest() KeyLine {
	if l.Announced == (Successor{}) {
		return l
	}
	return l.at(l.Version+1, l.Announced)
}

// with returns the line with its newest version: l's own version or the one after it.
func (l KeyLine) with(newest KeyLine) KeyLine {
	l.Announced = Successor{}
	if newest.Version != l.Version {
		l.Announced = newest.own()
	}
	return l
}

// own is what the line knows of its version, apart from the number.
func (l KeyLine) own() Successor { return Successor{l.PublicKey, l.Next, l.Recovery, l.NewRecovery} }

// at is a line of the same key at a version.
func (l KeyLine) at(version uint32, s Successor) KeyLine {
	return KeyLine{
		Key: l.Key, Version: version, PublicKey: s.PublicKey, Next: s.Next,
		Recovery: s.Recovery, NewRecovery: s.NewRecovery,
	}
}

// skips reports that l comes after another version than the one before: the line was recovered.
func (l KeyLine) skips(before KeyLine) bool { return l.Version > before.Version+1 }

type keyLineDoc struct {
	Key     string `json:"key"`
	Version uint32 `json:"version"`
	successorDoc
	Announced *successorDoc `json:"announced,omitempty"`
}

type successorDoc struct {
	PublicKey   wire.Bytes32  `json:"public_key"`
	Next        *wire.Bytes32 `json:"next,omitempty"`
	Recovery    *wire.Bytes32 `json:"recovery,omitempty"`
	NewRecovery *wire.Bytes32 `json:"new_recovery,omitempty"`
}

func (s Successor) doc() successorDoc {
	return successorDoc{s.PublicKey, commitment(&s.Next), commitment(&s.Recovery), commitment(&s.NewRecovery)}
}

func (d successorDoc) successor() Successor {
	return Successor{d.PublicKey, known(d.Next), known(d.Recovery), known(d.NewRecovery)}
}

// known is the commitment of a JSON form, or zero.
func known(b *wire.Bytes32) (commitment [32]byte) {
	if b != nil {
		commitment = *b
	}
	return commitment
}

// commitment is the JSON form of a commitment, which may be unknown.
func commitment(next *[32]byte) *wire.Bytes32 {
	if *next == [32]byte{} {
		return nil
	}
	return (*wire.Bytes32)(next)
}

// Encode writes the JSON form.
func (l KeyLine) Encode() ([]byte, error) {
	d := keyLineDoc{Key: l.Key, Version: l.Version, successorDoc: l.own().doc()}
	if l.Announced != (Successor{}) {
		announced := l.Announced.doc()
		d.Announced = &announced
	}
	return wire.Encode(d)
}

// DecodeKeyLine reads the JSON form strictly.
func DecodeKeyLine(b []byte) (KeyLine, error) {
	var d keyLineDoc
	if err := ijson.Decode(b, &d, "key", "version", "public_key"); err != nil {
		return KeyLine{}, err
	}
	l := KeyLine{Key: d.Key}.at(d.Version, d.successor())
	if a := d.Announced; a != nil {
		l.Announced = a.successor()
		if l.Announced == (Successor{}) {
			return KeyLine{}, errors.New("announced: it has no public_key")
		}
	}
	return l, l.check()
}

// ReadKeyLine reads a file with the JSON form.
func ReadKeyLine(path string) (KeyLine, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return KeyLine{}, err
	}
	l, err := DecodeKeyLine(b)
	if err != nil {
		return l, fmt.Errorf("%s: %w", path, err)
	}
	return l, nil
}

// WriteKeyLine replaces a file with the JSON form, or makes the file with mode 0600. A crash leaves
// the line of before or this one.
func WriteKeyLine(path string, l KeyLine) error {
	doc, err := l.Encode()
	if err != nil {
		return err
	}
	return replace(path, append(doc, '\n'))
}

func (l KeyLine) check() error {
	switch {
	case l.Key == "" || l.Key == wire.NoiseKey:
		return fmt.Errorf("key: %q is not the name of a signing key", ijson.Clip(l.Key))
	case l.Version == 0:
		return errors.New("version: 0 is no version, the first one is 1")
	}
	if _, err := eddsa.ParsePublicKey(l.PublicKey[:]); err != nil {
		return fmt.Errorf("public_key: %w", err)
	}
	if newest := l.Newest(); newest.Version != l.Version {
		if _, err := eddsa.ParsePublicKey(newest.PublicKey[:]); err != nil {
			return fmt.Errorf("announced: public_key: %w", err)
		}
		if l.Next != [32]byte{} && sha256.Sum256(newest.PublicKey[:]) != l.Next {
			return errors.New("announced: it is not the key that this version has committed to")
		}
	}
	return nil
}

// Advance follows the steps of an answer to op line, which were asked for from the version of l.
// The result is at the active version, with the announced version as Announced. A step of a
// compromised version that has no known commitment is refused: a thief can have signed the step.
// Errors wrap ErrBrokenLine.
func (l KeyLine) Advance(s wire.Steps) (KeyLine, error) {
	all, err := l.followEach(s.Steps, func(version uint32) bool { return slices.Contains(s.Compromised, version) })
	if err != nil {
		return KeyLine{}, err
	}
	before, at := l, l
	for _, next := range all {
		before, at = at, next
	}
	if len(all) == 0 {
		at = l.Newest()
	}
	if before.Version == s.Active && !at.skips(before) { // a recovered line is not announced
		return before.with(at), nil
	}
	return at, nil
}

// followEach is Follow with the line after each step, and refuses a step of a compromised version
// that has no known commitment: a thief can have signed the step.
func (l KeyLine) followEach(steps []wire.Succession, compromised func(version uint32) bool) (all []KeyLine, err error) {
	for _, step := range steps {
		next, err := l.Follow(step)
		if err != nil {
			return nil, err
		}
		if l.Next == [32]byte{} && compromised(l.Version) && !next.skips(l) { // a recovery is committed to
			return nil, fmt.Errorf("%w: %q: version %d is compromised, and has no known commitment: "+
				"a thief can have made its step", ErrBrokenLine, ijson.Clip(l.Key), l.Version)
		}
		l = next
		all = append(all, l)
	}
	return all, nil
}

// Follow checks consecutive steps from the version of l, and returns the line at the last step. A
// valid step is for the same key and for the next version number. The step is from the public key
// of the version before, with a signature of that key, and leads to the committed key, where the
// commitment is known. Or the step recovers the line: it leads to a later version, to the recovery
// successor to which the line has committed, which has signed the step. The times of a step are the
// times of its signing; an old step stays valid. Errors wrap ErrBrokenLine.
func (l KeyLine) Follow(steps ...wire.Succession) (KeyLine, error) {
	for _, step := range steps {
		next, err := l.step(step)
		if err != nil {
			return KeyLine{}, fmt.Errorf("%w: %q: from version %d to the next: %w",
				ErrBrokenLine, ijson.Clip(l.Key), l.Version, err)
		}
		l = next
	}
	return l, nil
}

func (l KeyLine) step(s wire.Succession) (KeyLine, error) {
	doc, err := parseStep(s)
	if err != nil {
		return KeyLine{}, err
	}
	switch p := doc.Succession; {
	case p.Key != l.Key:
		return KeyLine{}, fmt.Errorf("the step is of key %q", p.Key)
	case p.Recovered:
		return l.recovered(doc, s.Signature)
	case uint64(p.Version) != uint64(l.Version)+1:
		return KeyLine{}, fmt.Errorf("the step is to version %d", p.Version)
	case p.Old != l.PublicKey:
		return KeyLine{}, errors.New("the step is from another public key")
	case l.Next != [32]byte{} && sha256.Sum256(p.New[:]) != l.Next:
		return KeyLine{}, errors.New("the new public key is not the one that this version has committed to: " +
			"a thief may have this version's private key")
	}
	if err := eddsa.Verify(l.PublicKey[:], doc.Message, s.Signature); err != nil {
		return KeyLine{}, err
	}
	next := after(doc.Succession)
	switch named := next.NewRecovery; named {
	case l.Recovery, [32]byte{}:
		next.Recovery, next.NewRecovery = l.Recovery, [32]byte{}
	case l.NewRecovery: // two steps in a row have named it
		next.Recovery, next.NewRecovery = named, [32]byte{}
	default:
		next.Recovery = l.Recovery
	}
	return next, nil
}

// recovered follows a step to the recovery successor. Which version was the last before it does not
// matter, since the commitment names the key and its successor.
func (l KeyLine) recovered(doc *transcript.Document, signature []byte) (KeyLine, error) {
	p := doc.Succession
	switch {
	case p.Version <= l.Version:
		return KeyLine{}, fmt.Errorf("the step is to version %d", p.Version)
	case l.Recovery == [32]byte{}:
		return KeyLine{}, fmt.Errorf("the step is to a recovery successor, version %d, and this line knows of none: "+
			"ask the operators for the public key of the new version, and pin that", p.Version)
	case transcript.RecoveryCommitment(p.Version, p.New, *p.Next) != l.Recovery:
		return KeyLine{}, errors.New("the new public key is not the recovery successor that the line has committed to")
	}
	if err := eddsa.Verify(p.New[:], doc.Message, signature); err != nil {
		return KeyLine{}, err
	}
	return after(p), nil
}

func parseStep(s wire.Succession) (*transcript.Document, error) {
	return transcript.Parse(transcript.Request{
		Type: "key-succession-v1", Payload: s.Payload,
		Nonce: s.Nonce, Timestamp: s.Timestamp, ExpiresAt: s.ExpiresAt,
	})
}

// after is the line at the version to which a step leads.
func after(s *transcript.Succession) KeyLine {
	l := KeyLine{Key: s.Key, Version: s.Version, PublicKey: s.New}
	if s.Next != nil {
		l.Next = *s.Next
	}
	if s.Recovery != nil {
		l.NewRecovery = *s.Recovery
	}
	return l
}

// VerifyKeyLine checks a whole line from version 1 on, and returns the line at its newest version.
// Errors wrap ErrBrokenLine.
func VerifyKeyLine(first KeyLine, steps []wire.Succession) (KeyLine, error) {
	if err := first.check(); err != nil {
		return KeyLine{}, fmt.Errorf("%w: %w", ErrBrokenLine, err)
	}
	if first.Version != 1 {
		return KeyLine{}, fmt.Errorf("%w: %q: it begins with version %d, not with version 1",
			ErrBrokenLine, ijson.Clip(first.Key), first.Version)
	}
	return first.Follow(steps...)
}

// maxSteps bounds the steps that the client takes from an appliance that never ends its pages.
const maxSteps = 1 << 16

// Line gets the steps of a key's line after version from, to version from+1 and later ones, with
// the active version and all compromised ones. Line does not check the steps; KeyLine.Advance does.
func (c *Client) Line(ctx context.Context, key string, from uint32) (all wire.Steps, err error) {
	for {
		page, err := c.steps(ctx, key, from)
		if err != nil {
			return wire.Steps{}, err
		}
		page.Steps = append(all.Steps, page.Steps...)
		if all = page; len(all.Steps) > maxSteps {
			return wire.Steps{}, fmt.Errorf("%w: a line of more than %d steps", ErrWrongAnswer, maxSteps)
		}
		if !page.More {
			return all, nil
		}
		last, err := parseStep(all.Steps[len(all.Steps)-1])
		if err != nil || last.Succession.Version <= from {
			return wire.Steps{}, fmt.Errorf("%w: a page of the line leads to no later version", ErrWrongAnswer)
		}
		from = last.Succession.Version
	}
}

// steps gets one page of steps.
func (c *Client) steps(ctx context.Context, key string, from uint32) (wire.Steps, error) {
	var s wire.Steps
	err := c.call(ctx, true, func(id string) any {
		return wire.Line{ID: id, Op: wire.OpLine, Key: key, From: from}
	}, &s)
	if err == nil && (s.Key != key || s.More && len(s.Steps) == 0) {
		err = fmt.Errorf("%w: it has no steps of the line of %q", ErrWrongAnswer, ijson.Clip(key))
	}
	return s, err
}

// Acknowledge tells the appliance that this peer knows of a rotation: e is Rotation.Event. The
// client acknowledges by itself, except with Config.Unacknowledged. An event that the appliance has
// replaced meanwhile is refused as unknown_key: the newer event is on its way.
func (c *Client) Acknowledge(ctx context.Context, e wire.Rotation) error {
	return c.ack(ctx, wire.Ack{Op: wire.OpAck, Key: e.Key, Version: e.Version, Change: e.Change})
}

// AcknowledgeCompromise tells the appliance that this peer trusts a compromised version no more.
// The client acknowledges by itself when Config.OnCompromise has returned, except with
// Config.Unacknowledged.
func (c *Client) AcknowledgeCompromise(ctx context.Context, key string, version uint32) error {
	return c.ack(ctx, wire.Ack{Op: wire.OpCompromiseAck, Key: key, Version: version})
}

func (c *Client) ack(ctx context.Context, r wire.Ack) error {
	var a wire.Acknowledged
	err := c.call(ctx, true, func(id string) any {
		r.ID = id
		return r
	}, &a)
	if err == nil && (a.Key != r.Key || a.Version != r.Version) {
		err = fmt.Errorf("%w: it acknowledges another version", ErrWrongAnswer)
	}
	return err
}
