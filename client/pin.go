package client

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"countersign/internal/ijson"
	"countersign/wire"
)

// pin is a pinned line and the versions to which the client has followed the line.
type pin struct {
	// fetching is held by the one caller who gets steps. The others wait, bounded by their
	// contexts, and mostly find that the line has come far enough.
	fetching chan struct{}

	mu      sync.Mutex
	first   uint32             // the pinned version; older ones are unknown
	newest  KeyLine            // the newest version that the client has followed
	trusted map[uint32]KeyLine // versions first to newest, without the compromised ones
}

func newPin(l KeyLine) *pin {
	return &pin{
		fetching: make(chan struct{}, 1),
		first:    l.Version, newest: l, trusted: map[uint32]KeyLine{l.Version: l},
	}
}

// Pinned returns a pinned line at the newest version that the client has followed.
func (c *Client) Pinned(key string) (l KeyLine, ok bool) {
	p := c.pins[key]
	if p == nil {
		return l, false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.newest, true
}

// follow checks steps from the newest version on, and takes all of them or none.
func (p *pin) follow(steps ...wire.Succession) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	lines := make([]KeyLine, len(steps))
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

// lookup says whether the line has a version with this public key. For a version newer than the
// newest one, lookup returns false without an error: follow the line, then look again.
func (p *pin) lookup(version uint32, key [32]byte) (found bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l, trusted := p.trusted[version]
	switch {
	case version > p.newest.Version:
		return false, nil
	case version < p.first:
		err = fmt.Errorf("version %d is older than the pinned one, version %d", version, p.first)
	case !trusted:
		err = fmt.Errorf("the private key of version %d is compromised", version)
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

// checkVersion checks a version of a key against the pinned line, and accepts any version of an
// unpinned key. For a newer version, checkVersion follows the line first: by the offered step where
// the version is the next one, else by steps from the appliance.
func (c *Client) checkVersion(
	ctx context.Context, key string, version uint32, public [32]byte, offered *wire.Succession,
) error {
	p := c.pins[key]
	if p == nil {
		return nil
	}
	found, err := p.lookup(version, public)
	if found || err != nil {
		return err
	}
	if err := c.reach(ctx, p, key, version, offered); err != nil {
		return err
	}
	if found, err = p.lookup(version, public); err == nil && !found {
		err = fmt.Errorf("%w: %q: the appliance shows no step to version %d", ErrBrokenLine, ijson.Clip(key), version)
	}
	return err
}

// reach follows a line to a version, or as far as the appliance shows steps. An error that a retry
// may cure does not wrap ErrBrokenLine; all others do.
func (c *Client) reach(ctx context.Context, p *pin, key string, version uint32, offered *wire.Succession) error {
	select {
	case p.fetching <- struct{}{}:
		defer func() { <-p.fetching }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if offered != nil && p.version()+1 == version {
		return p.follow(*offered)
	}
	for taken := 0; p.version() < version; {
		page, err := c.steps(ctx, key, p.version())
		refusal, refused := errors.AsType[*Error](err)
		final := refused && refusal.RetryAfter == 0 && refusal.Code != wire.CodeUnavailable
		if final || errors.Is(err, ErrWrongAnswer) {
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
