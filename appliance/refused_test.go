package appliance

import (
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign/noise"
)

// TestRefusedHandshakesSayWhy: a client learns nothing from a refused handshake, and an operator
// learns key, address and reason.
func TestRefusedHandshakesSayWhy(t *testing.T) {
	e := newEdge(t, func(l *Limits) { l.ConnectionsPerPeer = 1 })
	suspended, stranger := e.enrol("suspended"), newIdentity(t)
	if err := e.Peers.Suspend(t.Context(), operator, "suspended"); err != nil {
		t.Fatal(err)
	}
	_, ed, _ := ed25519.GenerateKey(nil)
	forged, err := noise.PubkyIdentity(ed, stranger.Public(), e.server, "", time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	connect := func(
		from string, id *noise.Identity, listener, profile noise.Profile, server [32]byte, payload []byte,
	) error {
		conn, err := e.dial(from, listener)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_, err = noise.Connect(t.Context(), conn, id, profile, server, payload)
		return err
	}
	plain, pubky := noise.CountersignV1, noise.PubkyV1
	e.session("127.0.2.9", e.cafe) // its only connection
	for i, c := range []struct {
		reason  Reason
		attempt func(from string) error
		key     *noise.Identity // nil: it is not known
		peer    string
		claims  bool
	}{
		{RefusedUnknown, func(from string) error {
			return connect(from, stranger, plain, plain, e.server, nil)
		}, stranger, "", false},
		{RefusedSuspended, func(from string) error {
			return connect(from, suspended, plain, plain, e.server, nil)
		}, suspended, "suspended", false},
		{RefusedServerKey, func(from string) error {
			return connect(from, e.shop, plain, plain, stranger.Public(), nil)
		}, nil, "", false},
		{RefusedProfile, func(from string) error {
			return connect(from, e.shop, pubky, plain, e.server, nil)
		}, e.shop, "shop", true},
		{RefusedProfile, func(from string) error {
			return connect(from, stranger, plain, pubky, e.server, forged)
		}, nil, "", false},
		{RefusedIdentity, func(from string) error {
			return connect(from, e.shop, pubky, pubky, e.server, forged)
		}, e.shop, "shop", false},
		{RefusedConnections, func(from string) error {
			conn, err := e.shake(from, e.cafe)
			if err != nil {
				return err
			}
			defer conn.Close()
			conn.WriteMessage([]byte("{}"))
			_, err = conn.ReadMessage()
			return err
		}, e.cafe, "cafe", false},
	} {
		from := fmt.Sprintf("127.0.2.%d", i+20)
		if err := c.attempt(from); err == nil {
			t.Errorf("%s: the handshake succeeded", c.reason)
		}
		var r Refused
		eventually(t, string(c.reason)+" is told", func() bool {
			all := e.RefusedHandshakes()
			i := slices.IndexFunc(all, func(r Refused) bool { return r.From.String() == from })
			if i >= 0 {
				r = all[i]
			}
			return i >= 0
		})
		key := ""
		if c.key != nil {
			public := c.key.Public()
			key = hex.EncodeToString(public[:])
		}
		if r.Reason != c.reason || r.Key != key || r.Peer != c.peer || r.Unproven != c.claims || r.Count != 1 ||
			r.Text == "" || r.Do() == "" {
			t.Errorf("%s from %s, as %q: %+v", c.reason, from, c.peer, r)
		}
		line := fmt.Sprintf(`msg="handshake refused" from=%s reason=%s key=%.16s peer=%s`, from, r.Reason,
			quotedIfEmpty(key), quotedIfEmpty(c.peer))
		if !strings.Contains(e.log.String(), line) {
			t.Errorf("the log has no line %s", line)
		}
	}
}

func quotedIfEmpty(s string) string {
	if s == "" {
		return `""`
	}
	return s
}

// TestPeersBehindAFailingAddress: an enrolled peer whose address has used up its handshakes is told
// apart, by the names of the peers that had sessions from there.
func TestPeersBehindAFailingAddress(t *testing.T) {
	e := newEdge(t, nil)
	e.session("127.0.2.9", e.shop).Close()
	for range e.limits.Handshakes.PerSource {
		if conn, err := e.shake("127.0.2.9", newIdentity(t)); err == nil {
			conn.Close()
			t.Fatal("a stranger got in")
		}
	}
	if conn, err := e.shake("127.0.2.9", e.shop); err == nil {
		conn.Close()
		t.Fatal("the address has attempts left")
	}
	all := e.RefusedHandshakes()
	if r := all[0]; r.Reason != RefusedRate || r.Key != "" || !slices.Equal(r.Seen, []string{"shop"}) {
		t.Errorf("%+v", all)
	}
}

// TestRefusedHandshakesAreBounded: whatever strangers send, the memory is bounded, one source has
// its share, and the entries of enrolled peers stay.
func TestRefusedHandshakesAreBounded(t *testing.T) {
	var kept turnedAway
	address := func(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)}) }
	kept.add(Refused{From: address(1), Key: "shop's", Peer: "shop", Reason: RefusedSuspended})
	for n := range 10 * keptRefused {
		kept.add(Refused{From: address(n), Reason: RefusedServerKey})
		kept.add(Refused{From: address(n), Key: fmt.Sprint(n), Reason: RefusedUnknown})
		kept.add(Refused{From: address(n), Key: "shop's", Peer: "shop", Unproven: true, Reason: RefusedProfile})
	}
	if n := len(kept.list()); n != 2*keptRefused+1 {
		t.Errorf("%d entries", n)
	}
	for n := range 10 * keptRefused {
		kept.add(Refused{From: address(0), Key: fmt.Sprint("key ", n), Reason: RefusedUnknown})
	}
	ofOne, suspended := 0, 0
	for _, r := range kept.list() {
		if strings.HasPrefix(r.Key, "key ") {
			ofOne++
		}
		if r.Reason == RefusedSuspended {
			suspended++
		}
	}
	if ofOne != keptRefusedOfSource || suspended != 1 {
		t.Errorf("%d entries of one source, %d of the suspended peer", ofOne, suspended)
	}
	count, line := kept.add(Refused{From: address(1), Key: "shop's", Peer: "shop", Reason: RefusedSuspended})
	if count != 2 || line {
		t.Errorf("the second one: count %d, a second line: %v", count, line)
	}
}

// TestEachReasonHasAdvice: an operator reads what to do about each reason.
func TestEachReasonHasAdvice(t *testing.T) {
	for _, err := range []error{noise.ErrServerKey, noise.ErrIdentity, &noise.ProfileError{}, errors.New("other")} {
		e := &Appliance{}
		if r := (Refused{Reason: e.reasonOf(err, nil)}); r.Do() == "" {
			t.Errorf("%v: %s has no advice", err, r.Reason)
		}
	}
}
