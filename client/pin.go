package client

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

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
	active  uint32             // the newest version that is known to have come into use
	asked   uint32             // op line was asked since this version came into use, see checkVersion
	newest  KeyLine            // the newest version that the client has followed
	trusted map[uint32]KeyLine // versions first to newest, without the compromised ones
	// compromised has all versions that the appliance has named as compromised. stolen lists those
	// of them that the client had trusted.
	compromised map[uint32]bool
	stolen      []Compromise
}

func newPin(l KeyLine) *pin {
	newest := l.Newest()
	l.Announced = Successor{}
	return &pin{
		fetching: make(chan struct{}, 1),
		first:    l.Version, active: l.Version, asked: l.Version, newest: newest,
		trusted:     map[uint32]KeyLine{l.Version: l, newest.Version: newest},
		compromised: map[uint32]bool{},
	}
}

// Pinned returns a pinned line at the newest version that the client knows to be in use, with the
// announced version. The application stores the line for its next start.
func (c *Client) Pinned(key string) (l KeyLine, ok bool) {
	p := c.pins[key]
	if p == nil {
		return l, false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if before, trusted := p.trusted[p.newest.Version-1]; trusted && p.active < p.newest.Version {
		return before.with(p.newest), true
	}
	return p.newest, true
}

// use notes that a version is in use, or was.
func (p *pin) use(version uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.active = max(p.active, version)
}

// take takes an answer to op line that was asked for from the newest version on.
func (p *pin) take(page wire.Steps) error {
	p.distrust(page.Compromised...)
	if err := p.follow(page.Steps...); err != nil {
		return err
	}
	p.use(page.Active)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked = max(p.asked, min(page.Active, p.newest.Version))
	return nil
}

// follow checks steps from the newest version on, and takes all of them or none.
func (p *pin) follow(steps ...wire.Succession) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	lines, err := p.newest.followEach(steps, func(version uint32) bool { return p.compromised[version] })
	for _, l := range lines {
		if l.skips(p.newest) { // a recovery successor signs at once
			p.active = l.Version
		}
		if p.newest = l; !p.compromised[l.Version] {
			p.trusted[l.Version] = l
		}
	}
	return err
}

// lookup says whether the line has a version with this public key, and whether op line was asked
// since the version came into use. For a version newer than the newest one, lookup returns false
// without an error: follow the line, then look again.
func (p *pin) lookup(version uint32, key [32]byte) (found, asked bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.trusted[version]
	switch {
	case p.compromised[version]:
		return false, false, fmt.Errorf("%w: %q, version %d", ErrCompromised, ijson.Clip(p.newest.Key), version)
	case version > p.newest.Version:
		return false, false, nil
	case version < p.first:
		err = fmt.Errorf("version %d is older than the pinned one, version %d: "+
			"if version %d is announced and not active yet, pin the active version", version, p.first, p.first)
	case l.PublicKey != key:
		err = fmt.Errorf("version %d has another public key", version)
	default:
		return true, version <= p.asked, nil
	}
	return false, false, fmt.Errorf("%w: %q: %w", ErrBrokenLine, ijson.Clip(p.newest.Key), err)
}

// distrust notes that versions are compromised.
func (p *pin) distrust(versions ...uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, v := range versions {
		l, trusted := p.trusted[v]
		if len(p.compromised) >= maxSteps || p.compromised[v] || v < p.first {
			continue
		}
		p.compromised[v] = true
		if trusted {
			delete(p.trusted, v)
			p.stolen = append(p.stolen, Compromise{l.Key, v, l.PublicKey})
		}
	}
}

// at returns a trusted version of the line, or the zero line.
func (p *pin) at(version uint32) KeyLine {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.trusted[version]
}

// before returns the newest trusted version below a version, or the zero line.
func (p *pin) before(version uint32) (l KeyLine) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for v, other := range p.trusted {
		if v < version && v > l.Version {
			l = other
		}
	}
	return l
}

func (p *pin) version() uint32 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.newest.Version
}

// tell calls OnCompromise with each version that the client had trusted, or waits for a call that
// goes on. Without an OnCompromise, the first of these versions is an error: the application must
// learn of the compromise before anything newer is trusted.
func (c *Client) tell(ctx context.Context, p *pin) error {
	p.mu.Lock()
	stolen := p.stolen
	p.mu.Unlock()
	for _, v := range stolen {
		if c.config.OnCompromise == nil {
			return fmt.Errorf("%w: %q, version %d, which this client had trusted: pin a later version",
				ErrCompromised, ijson.Clip(v.Key), v.Version)
		}
		if err := c.toldOf(ctx, v); err != nil {
			return err
		}
	}
	return nil
}

// tellTimeout bounds the wait of a call for an OnCompromise that goes on: the call may come from
// that OnCompromise, in another context than the one it was given.
const tellTimeout = 10 * time.Second

// toldOf returns when OnCompromise has returned for a version. A call of OnCompromise itself does
// not wait.
func (c *Client) toldOf(ctx context.Context, v Compromise) error {
	told := c.tellOnce(v)
	if ctx.Value(telling{}) == c {
		return nil
	}
	timer := time.NewTimer(tellTimeout)
	defer timer.Stop()
	select {
	case <-told:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return fmt.Errorf("%w: %q, version %d: OnCompromise has not returned yet",
			ErrCompromised, ijson.Clip(v.Key), v.Version)
	}
}

// checkVersion checks a version of a key against the pinned line, and accepts any version of an
// unpinned key. A version that is new, or is used for the first time, is looked up at the
// appliance: the answer has the steps and names the compromised versions. The event of a rotation
// has its step only.
func (c *Client) checkVersion(ctx context.Context, key string, version uint32, public [32]byte) error {
	p := c.pins[key]
	if p == nil {
		return nil
	}
	found, asked, err := p.lookup(version, public)
	if err != nil {
		return err
	}
	if !found || !asked {
		if err := c.reach(ctx, p, key, version); err != nil {
			return err
		}
	}
	if err := c.tell(ctx, p); err != nil {
		return err
	}
	if found, _, err = p.lookup(version, public); err == nil && !found {
		err = fmt.Errorf("%w: %q: the appliance shows no step to version %d", ErrBrokenLine, ijson.Clip(key), version)
	}
	return err
}

// reach follows a line to a version, or as far as the appliance shows steps. An error that a retry
// may cure does not wrap ErrBrokenLine; all others do.
func (c *Client) reach(ctx context.Context, p *pin, key string, version uint32) error {
	select {
	case p.fetching <- struct{}{}:
		defer func() { <-p.fetching }()
	case <-ctx.Done():
		return ctx.Err()
	}
	for taken := 0; !p.reached(version); {
		page, err := c.steps(ctx, key, p.version())
		refusal, refused := errors.AsType[*Error](err)
		final := refused && refusal.RetryAfter == 0 && refusal.Code != wire.CodeUnavailable
		if final || errors.Is(err, ErrWrongAnswer) {
			return fmt.Errorf("%w: %q: the appliance does not show it: %w", ErrBrokenLine, ijson.Clip(key), later{err})
		} else if err != nil {
			return fmt.Errorf("can't follow the line of %q now: %w", ijson.Clip(key), later{err})
		}
		if err := p.take(page); err != nil {
			return err
		}
		if taken += len(page.Steps); !page.More || taken > maxSteps {
			return nil
		}
	}
	return nil
}

// reached reports that op line was asked since a version came into use.
func (p *pin) reached(version uint32) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return version <= p.asked
}
