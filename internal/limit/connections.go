package limit

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
)

// ErrConnections means too many open connections: in all, from one source, or unproven.
var ErrConnections = errors.New("too many connections")

// Connections limits the number of open connections. A connection is unproven until its first
// message has been decrypted, unless its source is good (see Handshakes). The limit on unproven
// connections keeps places free for peers: strangers can't fill all places. Connections is safe for
// concurrent use.
type Connections struct {
	maxOpen, maxPerSource, maxUnproven int

	mu       sync.Mutex
	open     int
	unproven int
	bySource map[netip.Addr]int
}

// NewConnections limits all open connections to all, those of one source to perSource, and the
// unproven ones to strangers. NewConnections panics if a limit is below 1 or strangers is above
// all.
func NewConnections(all, perSource, strangers int) *Connections {
	if all < 1 || perSource < 1 || strangers < 1 || strangers > all {
		panic(fmt.Sprintf("limit: %d connections, %d of a source, %d of strangers", all, perSource, strangers))
	}
	return &Connections{maxOpen: all, maxPerSource: perSource, maxUnproven: strangers, bySource: map[netip.Addr]int{}}
}

// Counts returns the number of open connections, and of the unproven ones among them.
func (c *Connections) Counts() (open, unproven int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.open, c.unproven
}

// Place is the place of one open connection. The connection's owner must call Close.
type Place struct {
	connections *Connections
	source      netip.Addr
	unproven    bool
	closed      bool
}

// Open takes a place, or refuses with ErrConnections. good says that the source is good, see
// Handshakes.IsGood.
func (c *Connections) Open(from netip.Addr, good bool) (*Place, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	source := sourceOf(from)
	if c.open == c.maxOpen || c.bySource[source] == c.maxPerSource || !good && c.unproven == c.maxUnproven {
		return nil, ErrConnections
	}
	c.open++
	c.bySource[source]++
	if !good {
		c.unproven++
	}
	return &Place{connections: c, source: source, unproven: !good}, nil
}

// Proven marks the connection as proven: a message of the peer has been decrypted. Proven is
// idempotent.
func (p *Place) Proven() {
	p.connections.mu.Lock()
	defer p.connections.mu.Unlock()
	p.markProven()
}

func (p *Place) markProven() {
	if p.unproven {
		p.unproven = false
		p.connections.unproven--
	}
}

// Close gives the place back. Close is idempotent.
func (p *Place) Close() {
	c := p.connections
	c.mu.Lock()
	defer c.mu.Unlock()
	if p.closed {
		return
	}
	p.closed = true
	p.markProven()
	c.open--
	if c.bySource[p.source]--; c.bySource[p.source] == 0 {
		delete(c.bySource, p.source)
	}
}
