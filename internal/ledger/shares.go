package ledger

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Each spent nonce that has not expired belongs to one share: a use and a peer. The invariant: the
// number of nonces of each share is exact, in each transaction and after each restart, and an
// admission that would exceed a bound is refused before anything is written. So no peer takes the
// room of another peer beyond its own bound, verification never takes the room of signatures, and
// no peer ever takes the room of the appliance's own signatures.
//
// A share is known by the peer's name and not by the peer's keys. So a peer with a new key has the
// nonces of its former keys in its share. The nonces of a removed peer stay spent and count in the
// totals, and a new enrolment of the same name has them in its share again.

// Use is the purpose for which a nonce was spent.
type Use byte

const (
	Signing   Use = iota + 1 // a signature for a peer
	Verifying                // the confirmation of a signature for a peer
	Own                      // a signature for the appliance itself: a step of a rotation, an authorization
)

func (u Use) String() string {
	switch u {
	case Signing:
		return "sign"
	case Verifying:
		return "verify"
	case Own:
		return "own"
	}
	return fmt.Sprintf("use %d", byte(u))
}

// PeerID is a short identity of a peer: the first 8 bytes of the SHA-256 of the name. Two peers
// with an equal PeerID, some 2^64 names apart, would have one share together.
type PeerID [8]byte

// PeerIDOf returns the identity of a name.
func PeerIDOf(name string) PeerID {
	sum := sha256.Sum256([]byte(name))
	return PeerID(sum[:8])
}

// share is the owner of a nonce. The peer is zero for the use Own, and for no other use.
type share struct {
	use  Use
	peer PeerID
}

// share returns the share of an admission. An admission without a peer is the appliance's own.
func (a *Admission) share() share {
	switch {
	case a.Peer == "":
		return share{use: Own}
	case strings.HasPrefix(string(a.Scope), signerScope):
		return share{Verifying, PeerIDOf(a.Peer)}
	}
	return share{Signing, PeerIDOf(a.Peer)}
}

func (s share) compare(o share) int {
	return cmp.Or(cmp.Compare(s.use, o.use), bytes.Compare(s.peer[:], o.peer[:]))
}

// Bounds divide Options.MaxNonces. A bound of 0 has its default: see DefaultBounds.
type Bounds struct {
	Peer      int // nonces of one peer for signatures, and again for verifications
	Verifying int // nonces of all peers for verifications
	Own       int // reserved for the appliance's own signatures, which may also use more
}

// DefaultBounds returns the default bounds: a quarter for each peer and use, a half for
// verification, and a hundredth in reserve, each at least 1.
func DefaultBounds(maxNonces int) Bounds {
	return Bounds{Peer: max(1, maxNonces/4), Verifying: max(1, maxNonces/2), Own: max(1, maxNonces/100)}
}

// held counts nonces by share and by use.
type held struct {
	shares map[share]int
	uses   [Own + 1]int
}

func (h *held) add(s share, n int) {
	if h.shares == nil {
		h.shares = map[share]int{}
	}
	h.uses[s.use] += n
	if n += h.shares[s]; n != 0 {
		h.shares[s] = n
	} else {
		delete(h.shares, s)
	}
}

// addAll adds the counts of o, times 1 or -1.
func (h *held) addAll(o held, times int) {
	for s, n := range o.shares {
		h.add(s, times*n)
	}
}

func (h *held) all() int   { return h.peers() + h.uses[Own] }
func (h *held) peers() int { return h.uses[Signing] + h.uses[Verifying] }

// checkRoom returns an error for a nonce that can't be kept: the nonce's hour has expired, or a
// bound of its share is reached. The nonces that the transaction has spent so far are counted too.
func (t *txn) checkRoom(s share, hour uint32) error {
	if t.l.nonces.expiredHour(hour, t.now) {
		return fmt.Errorf("%w: a nonce of that expiry is forgotten already", ErrClock)
	}
	alive, spent, o := &t.l.nonces.held, &t.held, &t.l.options
	peers, all := alive.peers()+spent.peers(), alive.all()+spent.all()
	switch {
	case s.use != Own && alive.shares[s]+spent.shares[s] >= o.Bounds.Peer:
		return fmt.Errorf("%w: %d", ErrShare, o.Bounds.Peer)
	case s.use == Verifying && alive.uses[Verifying]+spent.uses[Verifying] >= o.Bounds.Verifying:
		return fmt.Errorf("%w: %d", ErrVerifying, o.Bounds.Verifying)
	case s.use != Own && peers >= o.MaxNonces-o.Bounds.Own, all >= o.MaxNonces:
		return fmt.Errorf("%w: %d of at most %d", ErrTooMany, all, o.MaxNonces)
	}
	return nil
}

// Nonces are the numbers of live nonces, with their bounds.
type Nonces struct {
	Alive     int // all; at most Max
	Signing   int // of peers, for signatures
	Verifying int // of peers, for verifications; at most Bounds.Verifying
	Own       int // of the appliance itself
	Max       int // Options.MaxNonces
	Bounds    Bounds
	Shares    []Share // of peers; the largest first
}

// Share is the number of live nonces of a peer for one use; at most Bounds.Peer.
type Share struct {
	Use   Use
	Peer  PeerID
	Alive int
}

// Peers returns the number of live nonces of all peers, and the largest such number.
func (n *Nonces) Peers() (alive, most int) { return n.Signing + n.Verifying, n.Max - n.Bounds.Own }

// Nonces returns the numbers at the ledger's time, without waiting for the writer.
func (l *Ledger) Nonces() Nonces {
	now, _, _ := l.Clock()
	alive := l.nonces.heldAt(now)
	n := Nonces{
		Alive: alive.all(), Signing: alive.uses[Signing], Verifying: alive.uses[Verifying], Own: alive.uses[Own],
		Max: l.options.MaxNonces, Bounds: l.options.Bounds,
	}
	for _, s := range slices.SortedFunc(maps.Keys(alive.shares), func(a, b share) int {
		return cmp.Or(cmp.Compare(alive.shares[b], alive.shares[a]), a.compare(b))
	}) {
		if s.use != Own {
			n.Shares = append(n.Shares, Share{s.use, s.peer, alive.shares[s]})
		}
	}
	return n
}

// heldAt counts the nonces that have not expired at a time.
func (n *nonces) heldAt(now time.Time) held {
	n.mu.Lock()
	defer n.mu.Unlock()
	alive := held{maps.Clone(n.held.shares), n.held.uses}
	for _, h := range n.hours {
		if n.expiredHour(h.number, now) { // the writer expires the hour in its next transaction
			alive.addAll(h.held, -1)
		}
	}
	return alive
}
