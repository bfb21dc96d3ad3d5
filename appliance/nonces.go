package appliance

import (
	"fmt"

	"countersign/internal/cause"
	"countersign/internal/ledger"
)

// Nonces are the numbers of live nonces. Largest has the largest shares of peers, with the peers'
// names, and at most maxLargest of them.
type Nonces struct {
	ledger.Nonces
	Largest []NonceShare
}

// NonceShare is the number of live nonces of a peer for one use.
type NonceShare struct {
	Peer  string // the name, or "removed peer" with the peer's identity
	Use   ledger.Use
	Alive int
}

const maxLargest = 5

// Nonces returns the numbers without waiting for the ledger's writer.
func (a *Appliance) Nonces() Nonces {
	n := a.ledger.Nonces()
	return Nonces{Nonces: n, Largest: a.named(n.Shares[:min(maxLargest, len(n.Shares))])}
}

// named gives shares with the peers' names.
func (a *Appliance) named(shares []ledger.Share) (all []NonceShare) {
	names := map[ledger.PeerID]string{}
	for _, p := range a.Peers.All() {
		names[ledger.PeerIDOf(p.Name)] = p.Name
	}
	for _, s := range shares {
		name, enrolled := names[s.Peer]
		if !enrolled {
			name = fmt.Sprintf("removed peer %x", s.Peer)
		}
		all = append(all, NonceShare{name, s.Use, s.Alive})
	}
	return all
}

// nonceCauses returns the bounds of live nonces that are reached, or reached to 80 %. An expired
// hour ends a cause without any request.
func (a *Appliance) nonceCauses() (all []cause.Cause) {
	n := a.ledger.Nonces()
	tell := func(full *cause.Kind, subject, what string, alive, most int) {
		kind := full
		switch {
		case alive >= most:
		case 5*alive >= 4*most:
			kind = cause.NoncesFilling
		default:
			return
		}
		all = append(all, kind.Of(subject, "%d of %d nonces %s are alive", alive, most, what))
	}
	peers, most := n.Peers()
	if n.Alive >= n.Max {
		tell(cause.NoncesFull, "", "of all uses", n.Alive, n.Max)
	} else {
		tell(cause.NoncesFull, "", "of all peers", peers, most)
	}
	tell(cause.NoncesShare, "verification", "of all peers' verifications", n.Verifying, n.Bounds.Verifying)
	for _, s := range a.named(n.Shares) {
		tell(cause.NoncesShare, s.Peer, fmt.Sprintf("of this peer (%s)", s.Use), s.Alive, n.Bounds.Peer)
	}
	return all
}
