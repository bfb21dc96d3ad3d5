package limit

import (
	"fmt"
	"net/netip"
	"sync"
)

// ErrConnections means that too many connections are open, in all, from one address, or of those that have proven nothing yet.
var ErrConnections = fmt.Errorf("too many connections")

// Connections bounds what is open at once. Of all places, only some are for connections that have proven nothing and come from
// sources that are not good, so that such can't keep everybody else out. It is for concurrent use.
type Connections struct {
	all, perSource, strangers int

	mu       sync.Mutex
	open     int
	strange  int
	bySource map[netip.Addr]int
}

// NewConnections panics if the numbers make no sense.
func NewConnections(all, perSource, strangers int) *Connections {
	if all < 1 || perSource < 1 || strangers < 1 || strangers > all {
		panic(fmt.Sprintf("limit: %d connections, %d of a source, %d of strangers", all, perSource, strangers))
	}
	return &Connections{all: all, perSource: perSource, strangers: strangers, bySource: map[netip.Addr]int{}}
}

// Place is an open connection's. Close must be called on it.
type Place struct {
	of      *Connections
	source  netip.Addr
	strange bool
	closed  bool
}

// Open takes a place, or refuses with ErrConnections. good says that the source had a good session.
func (c *Connections) Open(from netip.Addr, good bool) (*Place, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	source := sourceOf(from)
	if c.open == c.all || c.bySource[source] == c.perSource || !good && c.strange == c.strangers {
		return nil, ErrConnections
	}
	c.open++
	c.bySource[source]++
	if !good {
		c.strange++
	}
	return &Place{of: c, source: source, strange: !good}, nil
}

// Proven says that the other end is no stranger.
func (p *Place) Proven() {
	p.of.mu.Lock()
	defer p.of.mu.Unlock()
	p.known()
}

func (p *Place) known() {
	if p.strange {
		p.strange = false
		p.of.strange--
	}
}

// Close gives the place back.
func (p *Place) Close() {
	c := p.of
	c.mu.Lock()
	defer c.mu.Unlock()
	if p.closed {
		return
	}
	p.closed = true
	p.known()
	c.open--
	if c.bySource[p.source]--; c.bySource[p.source] == 0 {
		delete(c.bySource, p.source)
	}
}
