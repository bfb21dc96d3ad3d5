package softhsmtests

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"countersign/admin/api"
	"countersign/approval"
	"countersign/client"

	"github.com/miekg/pkcs11"
)

// pinnedLine fetches the line of a key for a peer to pin: the first version and its commitment to
// the second one.
func (s *system) pinnedLine(key string) client.KeyLine {
	s.t.Helper()
	keys, err := s.dial().Keys(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	for _, k := range keys {
		if k.Name == key && k.Version == 1 && k.Next != nil {
			return client.LineOf(k)
		}
	}
	s.t.Fatalf("%q has no first version that commits to a second one", key)
	return client.KeyLine{}
}

// verifyLine verifies all successions after a pinned line and returns the line's last version.
func (s *system) verifyLine(first client.KeyLine) client.KeyLine {
	s.t.Helper()
	steps, err := s.dial().Line(s.t.Context(), first.Key, first.Version)
	if err != nil {
		s.t.Fatal(err)
	}
	last, err := client.VerifyKeyLine(first, steps.Steps)
	if err != nil {
		s.t.Fatal(err)
	}
	return last
}

// labels lists the labels of the objects on the token, as another program sees them: of those with
// some attributes.
func (s *system) labels(attributes ...*pkcs11.Attribute) (all []string) {
	s.t.Helper()
	s.useToken(func(m *pkcs11.Ctx, h pkcs11.SessionHandle) {
		if err := m.FindObjectsInit(h, attributes); err != nil {
			s.t.Fatal(err)
		}
		objects, _, err := m.FindObjects(h, 1000)
		if err != nil {
			s.t.Fatal(err)
		}
		m.FindObjectsFinal(h)
		for _, o := range objects {
			a, err := m.GetAttributeValue(h, o, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, nil)})
			if err != nil {
				all = append(all, err.Error()) // of an object that was half written
				continue
			}
			all = append(all, string(a[0].Value))
		}
	})
	slices.Sort(all)
	return all
}

// tokenKeys lists the appliance's private keys on the token, such as payments/1.
func (s *system) tokenKeys() (keys []string) {
	s.t.Helper()
	for _, label := range s.labels(pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY)) {
		if key, ours := strings.CutPrefix(label, "countersign/"); ours {
			keys = append(keys, key)
		}
	}
	return keys
}

// waitForRequests waits until no requested rotation of these keys is tried any more, for at most a
// minute: a request outlives a kill.
func (s *system) waitForRequests(keys ...string) {
	s.t.Helper()
	for began := time.Now(); len(keys) > 0; time.Sleep(10 * time.Millisecond) {
		l, err := s.admin().Line(s.t.Context(), keys[0])
		switch {
		case err != nil:
			s.t.Fatal(err)
		case l.Requested == nil || l.Requested.Ended != "":
			keys = keys[1:]
		case time.Since(began) > time.Minute:
			s.t.Fatalf("the rotation of %s is still open: %+v", keys[0], l.Requested)
		}
	}
}

// TestKilledDuringRotation kills the daemon at random moments of rotations. Afterwards the line
// verifies from its first version on, one version is active, every confirmed rotation is kept, and
// the token has exactly the keys of the ledger.
func TestKilledDuringRotation(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	first := s.pinnedLine("payments")
	rounds := 8
	if v := os.Getenv("KILLS"); v != "" {
		fmt.Sscan(v, &rounds)
	}
	random := rand.New(rand.NewPCG(3, 4))
	confirmed := map[string]uint32{"payments": 1, "noise": 1}
	// On a busy machine, all kills of a few rounds may come before the first rotation.
	for round := 0; round < rounds || confirmed["payments"] < 2 && round < 10*rounds; round++ {
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		begun := make(chan struct{})
		wg.Go(func() {
			for i := 0; ctx.Err() == nil && i < 20; i++ {
				name := "payments"
				if i%2 == 1 {
					name = "noise"
				}
				if i == 0 {
					close(begun)
				}
				k, err := s.admin().RotateKey(ctx, name, api.Rotate{Now: true})
				if err != nil {
					if name == "noise" && strings.Contains(err.Error(), "answer handshakes") {
						continue // the limit of listener keys that answer handshakes is reached
					}
					return
				}
				confirmed[name] = k.Version
			}
		})
		<-begun
		time.Sleep(time.Duration(random.IntN(150_000)) * time.Microsecond)
		p.kill()
		cancel()
		wg.Wait()
		p = s.serve()
		active := map[string]uint32{}
		keys, err := s.admin().Keys(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range keys {
			if k.State == "active" {
				if active[k.Name] != 0 {
					t.Fatalf("round %d: versions %d and %d of %s are active", round, active[k.Name], k.Version, k.Name)
				}
				active[k.Name] = k.Version
			}
		}
		for name, version := range confirmed {
			if active[name] < version {
				t.Fatalf("round %d: version %d of %s was confirmed, version %d is active",
					round, version, name, active[name])
			}
			confirmed[name] = active[name]
		}
		signed, err := s.dial().Sign(t.Context(), "payments", message(fmt.Sprintf("rnd%05d", round)))
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		// The line may already have the successor of the version that has signed: announced, or
		// active since, by a request from before the kill.
		last := s.verifyLine(first)
		if signed.Version != last.Version && signed.Version != last.Version-1 {
			t.Fatalf("round %d: version %d signs, the line leads to %d", round, signed.Version, last.Version)
		}
	}
	if active := confirmed["payments"]; active < 2 {
		t.Errorf("version %d of payments is active after %d rounds: nothing was rotated", active, rounds)
	}
	s.waitForRequests("payments", "noise")
	var known []string
	keys, err := s.admin().Keys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range keys {
		known = append(known, fmt.Sprintf("%s/%d", k.Name, k.Version))
	}
	slices.Sort(known)
	p.stop()
	if got := s.tokenKeys(); !slices.Equal(got, known) {
		t.Errorf("the token has %v, the ledger %v", got, known)
	}
	if out, code := s.daemon("check", "--deep"); code != 0 {
		t.Errorf("check: %d, %s", code, out)
	}
}

// TestPeersFollow rotates a signing key and the listener's key across restarts. A connected peer
// with a pinned line follows both. The command keys show lists the peers that have not
// acknowledged.
func TestPeersFollow(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	rotations := make(chan client.Rotation, 16)
	c := s.clientConfig()
	c.Lines = []client.KeyLine{s.pinnedLine("payments")}
	c.RetryFor = time.Minute
	c.OnRotation = func(r client.Rotation) { rotations <- r }
	c.OnServerKey = func([32]byte, uint64) {}
	peer, err := client.Dial(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	waitForRotation := func(key string, version uint32) client.Rotation {
		t.Helper()
		for {
			select {
			case r := <-rotations:
				if r.Key == key && r.Event.Version == version {
					if r.Err != nil {
						t.Fatal(r.Err)
					}
					return r
				}
			case <-time.After(time.Minute):
				t.Fatalf("no rotation to %s, version %d, within a minute", key, version)
			}
		}
	}
	old, err := peer.Sign(t.Context(), "payments", message("old0"))
	if err != nil {
		t.Fatal(err)
	}
	for version := uint32(2); version <= 4; version++ {
		out := s.must("admin", "key", "rotate", "payments", "--now")
		if !strings.Contains(out, fmt.Sprintf("rotated     payments, version %d\n", version)) {
			t.Errorf("%s", out)
		}
		waitForRotation("payments", version)
		signed, err := peer.Sign(t.Context(), "payments", message(fmt.Sprintf("new%d", version)))
		if err != nil || signed.Version != version {
			t.Fatalf("%+v, %v", signed, err)
		}
		if version == 2 {
			p.stop()
			p = s.serve()
			if _, err := peer.Ping(t.Context()); err != nil { // the client reconnects
				t.Fatal(err)
			}
		}
	}
	if _, err := peer.Verify(t.Context(), "payments", old); err != nil {
		t.Errorf("a signature of an old version, within the version's grace period: %v", err)
	}
	eventually(t, "the acknowledgement", func() bool {
		return strings.Contains(s.must("admin", "keys", "show", "payments"), "not acknowledged  by nobody")
	})
	s.proposeAndApprove("peer add", "",
		approval.Parameter{Name: "name", Value: "late"},
		approval.Parameter{Name: "public_key", Value: strings.Repeat("09", 32)})
	if out := s.must("admin", "keys", "show", "payments"); !strings.Contains(out, "not acknowledged  by late") {
		t.Errorf("keys show: %s", out)
	}
	// The listener's key is rotated. The peer changes to the new key by itself while the old key
	// still answers handshakes, even if the peer was not connected at the announcement.
	was := c.ServerKey
	s.must("admin", "key", "rotate", "noise", "--now")
	waitForRotation("noise", 2)
	p.stop()
	p = s.serve()
	if _, err := peer.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.must("admin", "key", "archive", "noise", "1")
	p.stop()
	p = s.serve()
	if _, err := peer.Ping(t.Context()); err != nil {
		t.Errorf("a peer that has changed to the new listener key: %v", err)
	}
	c.ServerKey, c.RetryFor = was, 0
	if _, err := client.Dial(t.Context(), c); err == nil || !strings.Contains(err.Error(), "rotated") {
		t.Errorf("a peer that has missed the rotation: %v", err)
	}
	p.stop()
}
