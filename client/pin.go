package client

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"countersign/internal/ijson"
	"countersign/wire"
)

// pin is a pinned line, as far as it has been followed.
type pin struct {
	turn chan struct{} // held by who asks for steps: the others wait, as long as their contexts, and need not ask

	mu      sync.Mutex
	first   uint32          // the version that was pinned: what was before it is not known
	newest  Line            // that has been followed to
	trusted map[uint32]Line // those from first to newest that were not said to be compromised
}

func newPin(l Line) *pin {
	return &pin{turn: make(chan struct{}, 1), first: l.Version, newest: l, trusted: map[uint32]Line{l.Version: l}}
}

// Pinned returns the newest version of a pinned line that the client has followed it to.
func (c *Client) Pinned(key string) (l Line, ok bool) {
	p := c.pins[key]
	if p == nil {
		return l, false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.newest, true
}

// follow goes on from the newest version: all steps, or none.
func (p *pin) follow(steps ...wire.Succession) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	lines := make([]Line, len(steps))
	at := p.newest
	for i, step := range steps {
		var err error
		if at, err = at.Follow(step); err != nil {
			return err
		}
		lines[i] = at
	}
	for _, l := range lines {
		p.trusted[l.Version] = l
	}
	p.newest = at
	return nil
}

// judge says whether a version with this public key is in the line. It is not if the line must be followed further to know.
func (p *pin) judge(version uint32, key [32]byte) (in bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l, trusted := p.trusted[version]
	switch {
	case version > p.newest.Version:
		return false, nil
	case version < p.first:
		err = fmt.Errorf("version %d is older than the pinned one, version %d", version, p.first)
	case !trusted:
		err = fmt.Errorf("the private key of version %d is in wrong hands", version)
	case l.PublicKey != key:
		err = fmt.Errorf("version %d has another public key", version)
	default:
		return true, nil
	}
	return false, fmt.Errorf("%w: %q: %w", ErrBrokenLine, ijson.Clip(p.newest.Key), err)
}

func (p *pin) distrust(version uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.trusted, version)
}

func (p *pin) version() uint32 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.newest.Version
}

// believe holds a version of a key against the pinned line, and follows that where the version is newer: by the step that is offered
// if it is the next one, else by those that the appliance shows. What is not pinned is believed.
func (c *Client) believe(ctx context.Context, key string, version uint32, public [32]byte, offered *wire.Succession) error {
	p := c.pins[key]
	if p == nil {
		return nil
	}
	in, err := p.judge(version, public)
	if in || err != nil {
		return err
	}
	if err := c.reach(ctx, p, key, version, offered); err != nil {
		return err
	}
	if in, err = p.judge(version, public); err == nil && !in {
		err = fmt.Errorf("%w: %q: the appliance shows no step to version %d", ErrBrokenLine, ijson.Clip(key), version)
	}
	return err
}

// reach follows a line to a version, or as far as the appliance shows steps. The error wraps ErrBrokenLine unless asking again may
// help.
func (c *Client) reach(ctx context.Context, p *pin, key string, version uint32, offered *wire.Succession) error {
	select {
	case p.turn <- struct{}{}:
		defer func() { <-p.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if offered != nil && p.version()+1 == version {
		return p.follow(*offered)
	}
	for taken := 0; p.version() < version; {
		page, err := c.steps(ctx, key, p.version())
		if refusal, is := errors.AsType[*Error](err); is && refusal.RetryAfter == 0 && refusal.Code != wire.CodeUnavailable || errors.Is(err, ErrWrongAnswer) {
			return fmt.Errorf("%w: %q: the appliance does not show it: %w", ErrBrokenLine, ijson.Clip(key), err)
		} else if err != nil {
			return fmt.Errorf("can't follow the line of %q now: %w", ijson.Clip(key), err)
		}
		if err := p.follow(page.Steps...); err != nil {
			return err
		}
		if taken += len(page.Steps); !page.More || taken > maxSteps {
			return nil
		}
	}
	return nil
}
