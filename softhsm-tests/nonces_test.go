package softhsmtests

import (
	"crypto/ed25519"
	"errors"
	"strings"
	"testing"
	"time"

	"countersign/client"
	"countersign/transcript"
)

// foreign signs a message with a key that the appliance does not have.
func foreign(t *testing.T, nonce byte) *client.Signed {
	t.Helper()
	now := time.Now().Unix()
	d := message("AA")
	d.Nonce, d.Timestamp, d.ExpiresAt = [32]byte{nonce}, now, now+60
	key := ed25519.NewKeyFromSeed(make([]byte, 32))
	doc, err := transcript.Parse(transcript.Request{
		Type: d.Type, Payload: d.Payload, Nonce: d.Nonce, Timestamp: now, ExpiresAt: now + 60,
	})
	if err != nil {
		t.Fatal(err)
	}
	public := [32]byte(key.Public().(ed25519.PublicKey))
	return &client.Signed{Document: d, Signature: ed25519.Sign(key, doc.Message), PublicKey: public}
}

// TestFloodOfVerifications: the peer hostile, whom policy names nowhere, verifies until it is
// refused. The peer demo signs, a key is rotated and replaced after a compromise, and the state
// names the peer: before and after a restart.
func TestFloodOfVerifications(t *testing.T) {
	s := newSystem(t)
	s.edit("countersign.toml", "[tokens.main]", "[limits]\nnonces = 40\n\n[tokens.main]")
	p := s.serve()
	s.enrol()
	s.must("admin", "peer", "add", "hostile", strings.TrimSpace(s.must("keygen", s.path("hostile.key"))))
	flood := func(first byte) (n byte) {
		t.Helper()
		config := s.clientConfig()
		id, err := client.ReadIdentity(s.path("hostile.key"))
		if err != nil {
			t.Fatal(err)
		}
		config.Identity = id
		c, err := client.Dial(t.Context(), config)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		for ; n < 40; n++ {
			var refusal *client.Error
			if _, err := c.Verify(t.Context(), "", foreign(t, first+n)); errors.As(err, &refusal) {
				if refusal.Code != "busy" {
					t.Error(err)
				}
				return n
			} else if err != nil {
				t.Fatal(err)
			}
		}
		return n
	}
	serves := func(version uint32) {
		t.Helper()
		s.must("admin", "key", "rotate", "payments", "--now")
		got, err := s.dial().Sign(t.Context(), "payments", message("AAAA"))
		if err != nil || got.Version != version {
			t.Errorf("%+v, %v; want version %d", got, err, version)
		}
		if err := s.admin().Ready(t.Context()); err != nil {
			t.Error(err)
		}
		out := s.must("admin", "state")
		for _, want := range []string{"nonces-share-full hostile: 10 of 10", "hostile: 10 verify, at most 10"} {
			if !strings.Contains(out, want) {
				t.Errorf("%q is not in\n%s", want, out)
			}
		}
	}
	if n := flood(0); n != 10 {
		t.Errorf("%d were verified, want a quarter of 40", n)
	}
	serves(2)
	p.stop()
	s.serve()
	if n := flood(100); n != 0 {
		t.Errorf("%d more were verified after a restart", n)
	}
	serves(3)
	s.must("admin", "key", "compromise", "payments", "3", "--reason", "stolen")
	got, err := s.dial().Sign(t.Context(), "payments", message("AAAA"))
	if err != nil || got.Version != 4 {
		t.Errorf("%+v, %v; want version 4", got, err)
	}
}
