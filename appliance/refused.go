package appliance

import (
	"encoding/hex"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"countersign/internal/limit"
	"countersign/internal/peers"
	"countersign/noise"
)

// Reason is the reason of a refused handshake, a stable code.
type Reason string

// The reasons of refused handshakes. A client can't tell them apart, an operator can.
const (
	RefusedUnknown     Reason = "unknown"
	RefusedSuspended   Reason = "suspended"
	RefusedRate        Reason = "rate_limited" // before message 1 was decrypted
	RefusedProfile     Reason = "wrong_profile"
	RefusedServerKey   Reason = "wrong_server_key"
	RefusedIdentity    Reason = "identity"    // the identity payload of pubky-noise-v1 is not right
	RefusedConnections Reason = "connections" // in all, of the address, or of the peer
	RefusedNoKey       Reason = "no_key"
	RefusedMessage     Reason = "message"
)

// refusalAdvice says for each reason what an operator does. KEY and PEER stand for those of the
// handshake.
var refusalAdvice = map[Reason]string{
	RefusedUnknown: "no peer has this key: if it is right, countersign admin peer add NAME KEY, or for a further key " +
		"of an enrolled peer: countersign admin peer key add NAME KEY",
	RefusedSuspended: "the peer is suspended: countersign admin peer resume PEER",
	RefusedRate: "too many handshakes failed within a minute, so the key was not read: look for the failures " +
		"before, and let the client wait",
	RefusedProfile: "the client uses the other profile: correct its profile (countersign-v1, pubky-noise-v1) or port",
	RefusedServerKey: "the client has another key for this listener, or speaks another protocol: compare its key " +
		"with countersign admin noise-key",
	RefusedIdentity:    "the identity payload is wrong: make it again, for this key and this listener's key",
	RefusedConnections: "too many connections are open: close some, or raise limits.connections and its like",
	RefusedNoKey:       "the listener has no key in use: see countersign admin state",
	RefusedMessage:     "message 1 is damaged: look at the network between",
}

// Refused are handshakes that were refused for the same reason, with the same key and from the same
// source.
type Refused struct {
	From     netip.Addr // of the last one
	Key      string     // hex of the client's static public key; "" if it is not known
	Peer     string     // the peer enrolled with the key at the last one; "" for none
	Unproven bool       // any client can claim the key
	Reason   Reason
	Text     string // the error of the last one
	Count    uint64
	First    time.Time
	Last     time.Time
	Seen     []string // peers whose last session came from the address; some, if there are many
}

// Do returns what an operator does about the reason.
func (r Refused) Do() string {
	return strings.NewReplacer("KEY", r.Key, "PEER", r.Peer).Replace(refusalAdvice[r.Reason])
}

// The bounds of the memory for refused handshakes.
const (
	keptRefused         = 128 // in each class
	keptRefusedOfSource = 16  // of one source in a class
	refusedLineEvery    = time.Minute
	maxSeen             = 5 // names in Refused.Seen
)

// refusedClass is a class of refused handshakes. Each class has a bound of its own, so that
// strangers can't push out what is known of enrolled peers.
type refusedClass int

const (
	ofPeers     refusedClass = iota // with the proven key of an enrolled peer
	ofKeys                          // with another proven key
	ofStrangers                     // without a proven key
	classes
)

// turnedAway keeps the refused handshakes since the start. The oldest ones give way: in a full
// class the oldest of the same source, if the source has its share, and otherwise the oldest of
// all.
type turnedAway struct {
	mu  sync.Mutex
	all [classes][]*refusedKind
}

// refusedKind is a kind of refused handshakes with the time of its last line in the log.
type refusedKind struct {
	Refused
	source netip.Addr
	logged time.Time
}

// add counts a refused handshake. line reports that the log is to have a line about the kind, which
// is at most one each refusedLineEvery.
func (t *turnedAway) add(r Refused) (count uint64, line bool) {
	now := time.Now()
	source, in := limit.SourceOf(r.From), ofStrangers
	if r.Key != "" && !r.Unproven {
		if in = ofKeys; r.Peer != "" {
			in = ofPeers
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	var kind *refusedKind
	ofSource, oldest, oldestOfSource := 0, -1, -1
	for i, each := range t.all[in] {
		if each.source == source {
			if each.Key == r.Key && each.Reason == r.Reason {
				kind = each
				break
			}
			ofSource++
			if oldestOfSource < 0 || each.Last.Before(t.all[in][oldestOfSource].Last) {
				oldestOfSource = i
			}
		}
		if oldest < 0 || each.Last.Before(t.all[in][oldest].Last) {
			oldest = i
		}
	}
	if kind == nil {
		kind = &refusedKind{source: source}
		kind.First = now
		switch {
		case ofSource >= keptRefusedOfSource:
			t.all[in][oldestOfSource] = kind
		case len(t.all[in]) >= keptRefused:
			t.all[in][oldest] = kind
		default:
			t.all[in] = append(t.all[in], kind)
		}
	}
	r.First, r.Last, r.Count = kind.First, now, kind.Count+1
	kind.Refused = r
	if line = kind.logged.IsZero() || now.Sub(kind.logged) >= refusedLineEvery; line {
		kind.logged = now
	}
	return r.Count, line
}

// list returns the refused handshakes, the newest first.
func (t *turnedAway) list() (all []Refused) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, kinds := range t.all {
		for _, each := range kinds {
			all = append(all, each.Refused)
		}
	}
	slices.SortFunc(all, func(x, y Refused) int { return y.Last.Compare(x.Last) })
	return all
}

// RefusedHandshakes returns the refused handshakes since the start, the newest first. Memory is
// bounded, so older ones may be missing.
func (a *Appliance) RefusedHandshakes() []Refused {
	all := a.turnedAway.list()
	for i := range all {
		all[i].Seen = a.seenFrom(all[i].From)
	}
	return all
}

// seenFrom returns the peers whose last session came from an address: an address with a refused
// handshake may be a peer's.
func (a *Appliance) seenFrom(from netip.Addr) []string {
	names := a.Peers.LastFrom(from)
	return names[:min(len(names), maxSeen)]
}

// refused keeps a refused handshake for operators, and writes a line for its kind. key is the key
// that message 1 has proven, or nil. begun is the begin of the handshake, or zero.
func (a *Appliance) refused(from netip.Addr, key *[32]byte, reason Reason, begun time.Time, err error) {
	result := string(reason)
	if reason == RefusedMessage {
		result = silenceOr(result, err)
	}
	a.ended(result, begun)
	r := Refused{From: from, Reason: reason, Text: err.Error()}
	if wrong, is := errors.AsType[*noise.ProfileError](err); is && wrong.Claimed != [32]byte{} {
		key, r.Unproven = &wrong.Claimed, true
	}
	if key != nil {
		r.Key = hex.EncodeToString(key[:])
		p, _, _ := a.Peers.Find(*key)
		r.Peer = p.Name
	}
	if count, line := a.turnedAway.add(r); line {
		a.log.Info("handshake refused", "from", from, "reason", string(reason),
			"key", r.Key[:min(len(r.Key), 16)], "peer", r.Peer,
			"peers_seen_from_there", a.seenFrom(from), "count", count, "err", err)
	}
}

// reasonOf returns the reason of a handshake that was refused after its begin. key is the key that
// message 1 has proven, or nil.
func (a *Appliance) reasonOf(err error, key *[32]byte) Reason {
	switch {
	case errors.Is(err, noise.ErrNotEnrolled), errors.Is(err, peers.ErrGone):
		if _, suspended, ok := a.Peers.Find(*key); ok && suspended {
			return RefusedSuspended
		}
		return RefusedUnknown
	case errors.Is(err, peers.ErrTooMany):
		return RefusedConnections
	case errors.Is(err, noise.ErrIdentity):
		return RefusedIdentity
	case errors.As(err, new(*noise.ProfileError)):
		return RefusedProfile
	case errors.Is(err, noise.ErrServerKey):
		return RefusedServerKey
	}
	return RefusedMessage
}
