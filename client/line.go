package client

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"

	"countersign/internal/eddsa"
	"countersign/internal/ijson"
	"countersign/transcript"
	"countersign/wire"
)

// ErrBrokenLine: a version of a key does not follow from the one that is pinned. Its signatures must not be believed: somebody who
// has the old key may have made it. The line is pinned anew by people, or not at all.
var ErrBrokenLine = errors.New("the key's line is broken")

// Line is a key's line of versions at one of them, which is trusted. Its JSON form is what countersign line pin prints.
type Line struct {
	Key       string
	Version   uint32
	PublicKey [32]byte
	// Next is SHA-256 of the next version's public key, which the appliance makes in advance; zero: not known. Where it is known, a
	// thief with the private key of this version can't lead the line to a key of his own.
	Next [32]byte
}

type lineDoc struct {
	Key       string        `json:"key"`
	Version   uint32        `json:"version"`
	PublicKey wire.Bytes32  `json:"public_key"`
	Next      *wire.Bytes32 `json:"next,omitempty"`
}

// Encode writes the JSON form.
func (l Line) Encode() ([]byte, error) {
	d := lineDoc{Key: l.Key, Version: l.Version, PublicKey: l.PublicKey}
	if l.Next != [32]byte{} {
		d.Next = (*wire.Bytes32)(&l.Next)
	}
	return wire.Encode(d)
}

// DecodeLine reads the JSON form strictly.
func DecodeLine(b []byte) (Line, error) {
	var d lineDoc
	if err := ijson.Decode(b, &d, "key", "version", "public_key"); err != nil {
		return Line{}, err
	}
	l := Line{Key: d.Key, Version: d.Version, PublicKey: d.PublicKey}
	if d.Next != nil {
		l.Next = *d.Next
	}
	return l, l.check()
}

func (l Line) check() error {
	switch {
	case l.Key == "" || l.Key == wire.NoiseKey:
		return errors.New("key: must be the name of a signing key")
	case l.Version == 0:
		return errors.New("version: versions are counted from 1")
	}
	if _, err := eddsa.ParsePublicKey(l.PublicKey[:]); err != nil {
		return fmt.Errorf("public_key: %w", err)
	}
	return nil
}

// Follow takes steps that begin at the line's version, one version after the other, and returns the line at the last one. Each step
// is of this key and to the next version, by the public key of the version before and with its signature, and to the key that this one
// has committed to, where that is known. The times of a step are those of its signing and end nothing. Errors wrap ErrBrokenLine.
func (l Line) Follow(steps ...wire.Succession) (Line, error) {
	for _, step := range steps {
		next, err := l.step(step)
		if err != nil {
			return Line{}, fmt.Errorf("%w: %q: from version %d to the next: %w", ErrBrokenLine, ijson.Clip(l.Key), l.Version, err)
		}
		l = next
	}
	return l, nil
}

func (l Line) step(s wire.Succession) (Line, error) {
	doc, err := parseStep(s)
	if err != nil {
		return Line{}, err
	}
	switch p := doc.Succession; {
	case p.Key != l.Key:
		return Line{}, fmt.Errorf("the step is of key %q", p.Key)
	case uint64(p.Version) != uint64(l.Version)+1:
		return Line{}, fmt.Errorf("the step is to version %d", p.Version)
	case p.Old != l.PublicKey:
		return Line{}, errors.New("the step is from another public key")
	case l.Next != [32]byte{} && sha256.Sum256(p.New[:]) != l.Next:
		return Line{}, errors.New("the new public key is not the one that this version has committed to: somebody may have its private key")
	}
	if err := eddsa.Verify(l.PublicKey[:], doc.Message, s.Signature); err != nil {
		return Line{}, err
	}
	return after(doc.Succession), nil
}

func parseStep(s wire.Succession) (*transcript.Document, error) {
	return transcript.Parse(transcript.Request{Type: "key-succession-v1", Payload: s.Payload, Nonce: s.Nonce, Timestamp: s.Timestamp, ExpiresAt: s.ExpiresAt})
}

// after is the line where a step leads.
func after(s *transcript.Succession) Line {
	l := Line{Key: s.Key, Version: s.Version, PublicKey: s.New}
	if s.Next != nil {
		l.Next = *s.Next
	}
	return l
}

// VerifyLine checks a whole line from its first key, version 1, and returns it at its newest version. Errors wrap ErrBrokenLine.
func VerifyLine(first Line, steps []wire.Succession) (Line, error) {
	if err := first.check(); err != nil {
		return Line{}, fmt.Errorf("%w: %w", ErrBrokenLine, err)
	}
	if first.Version != 1 {
		return Line{}, fmt.Errorf("%w: %q: it begins with version %d, not with the first", ErrBrokenLine, ijson.Clip(first.Key), first.Version)
	}
	return first.Follow(steps...)
}

// maxSteps bounds how many steps are taken of an appliance that has always more.
const maxSteps = 1 << 16

// Line gets the steps of a key's line from a version on: those to from+1 and all later ones. They are not checked here: Line.Follow
// does that.
func (c *Client) Line(ctx context.Context, key string, from uint32) (steps []wire.Succession, err error) {
	for {
		page, err := c.steps(ctx, key, from)
		if err != nil {
			return nil, err
		}
		if steps = append(steps, page.Steps...); len(steps) > maxSteps {
			return nil, fmt.Errorf("%w: a line of more than %d steps", ErrWrongAnswer, maxSteps)
		}
		if !page.More {
			return steps, nil
		}
		from += uint32(len(page.Steps))
	}
}

// steps gets one answer full of steps.
func (c *Client) steps(ctx context.Context, key string, from uint32) (wire.Steps, error) {
	var s wire.Steps
	err := c.call(ctx, true, func(id string) any { return wire.Line{ID: id, Op: wire.OpLine, Key: key, From: from} }, &s)
	if err == nil && (s.Key != key || s.More && len(s.Steps) == 0) {
		err = fmt.Errorf("%w: it has no steps of the line that was asked for", ErrWrongAnswer)
	}
	return s, err
}

// Acknowledge says that this peer has taken notice of a rotation. The client does so by itself, but see Config.Unacknowledged.
func (c *Client) Acknowledge(ctx context.Context, key string, version uint32) error {
	var a wire.Acknowledged
	err := c.call(ctx, true, func(id string) any { return wire.Ack{ID: id, Op: wire.OpAck, Key: key, Version: version} }, &a)
	if err == nil && (a.Key != key || a.Version != version) {
		err = fmt.Errorf("%w: it is about another rotation", ErrWrongAnswer)
	}
	return err
}
