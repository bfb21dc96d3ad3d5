package client_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"countersign/client"
	"countersign/client/clienttest"
	"countersign/transcript"
	"countersign/wire"
)

// TestRefusalsByErrorsIs: errors.Is finds the error of a refusal's code and no other, through any
// wrapping, and errors.As still gets the message.
func TestRefusalsByErrorsIs(t *testing.T) {
	all := []error{
		client.ErrMalformed, client.ErrUnsupported, client.ErrTooLarge, client.ErrUnknownKey, client.ErrKeyNotActive,
		client.ErrKeyRotated, client.ErrDenied, client.ErrNotConfirmed, client.ErrReplay, client.ErrExpired,
		client.ErrNotYetValid, client.ErrLifetimeTooLong, client.ErrInvalidSignature, client.ErrWrongSigner,
		client.ErrRateLimited, client.ErrBusy, client.ErrUnavailable,
	}
	s := serve(t)
	for i, want := range all {
		s.Do(func(s *clienttest.Server) { s.Answer = nil })
		c, _ := peer(t, s, 1, nil)
		s.Do(func(s *clienttest.Server) {
			s.Answer = func(id string, _ any) []byte {
				refusal := &wire.Error{Code: want.Error(), Message: "because", RetryAfter: i % 2}
				return wire.EncodeAnswer(id, "", nil, refusal)
			}
		})
		_, err := c.Sign(within(t), "payments", message("AAAA"))
		err = fmt.Errorf("order 42: %w", err)
		for _, other := range all {
			if errors.Is(err, other) != (other == want) {
				t.Errorf("%v: errors.Is says %v of %v", err, errors.Is(err, other), other)
			}
		}
		refusal, is := errors.AsType[*client.Error](err)
		if !is || refusal.Message != "because" || refusal.RetryAfter != i%2 {
			t.Errorf("%v: %+v", err, refusal)
		}
	}
}

// TestLaterRefusals: a signature that exists, and that the client withholds because a further
// request fails, is never taken for one that was refused or not asked for.
func TestLaterRefusals(t *testing.T) {
	for op, withhold := range map[string]error{wire.OpLine: client.ErrUnproven, wire.OpProof: client.ErrUnproven} {
		for name, answer := range map[string]func(id string) []byte{
			"unavailable": func(id string) []byte {
				return wire.EncodeAnswer(id, "", nil, &wire.Error{Code: wire.CodeUnavailable})
			},
			"rate limited": func(id string) []byte {
				return wire.EncodeAnswer(id, "", nil, &wire.Error{Code: wire.CodeRateLimited, RetryAfter: 1})
			},
			"denied": func(id string) []byte {
				return wire.EncodeAnswer(id, "", nil, &wire.Error{Code: wire.CodeDenied})
			},
			"no answer": func(string) []byte { return []byte{} },
		} {
			s := serve(t)
			s.Do(func(s *clienttest.Server) {
				s.Active, s.Shown = 2, 2
				s.Answer = func(id string, request any) []byte {
					_, line := request.(*wire.Line)
					_, proof := request.(*wire.Proof)
					if line && op == wire.OpLine || proof && op == wire.OpProof {
						return answer(id)
					}
					return nil
				}
			})
			c, _ := peer(t, s, 1, func(c *client.Config) {
				if op == wire.OpProof {
					c.Lines = nil
					c.LogKey = "countersign/ea4a6c63e29c520a/0+bfa770bb+AepKbGPinFIKvvVQexMuxfmVR3auvr57kkIe6mkURtIs"
				}
			})
			signed, err := c.Sign(within(t), "payments", message("AAAA"))
			want := withhold
			if op == wire.OpLine && name == "denied" { // for good
				want = client.ErrBrokenLine
			}
			if signed != nil || !errors.Is(err, want) {
				t.Errorf("%s: %s: %v", op, name, err)
			}
			for _, no := range []error{
				client.ErrUnavailable, client.ErrRateLimited, client.ErrDenied, client.ErrUnreachable,
				client.ErrHandshake, client.ErrConnectionLost,
			} {
				if errors.Is(err, no) {
					t.Errorf("%s: %s: %v is also %v", op, name, err, no)
				}
			}
			if errors.As(err, new(*client.Error)) {
				t.Errorf("%s: %s: %v has a refusal", op, name, err)
			}
		}
	}
}

// TestSignAs: the signer becomes a party to the document, also when the key is rotated after the
// client has asked for it. A public key that does not sign is not accepted.
func TestSignAs(t *testing.T) {
	payment := client.Document{Type: "payment-request-v1", Payload: []byte(`{"amount":"0.25","currency":"EUR",` +
		`"method":"sepa","endpoint":"https://shop.example/","payer":"to be replaced"}`)}
	party := func(signed *client.Signed, err error) string {
		if err != nil {
			return err.Error()
		}
		doc, err := transcript.Parse(transcript.Request(signed.Document))
		if err == nil {
			err = doc.CheckSigner(signed.PublicKey[:])
		}
		return fmt.Sprintf("%d %v", signed.Version, err)
	}

	s := serve(t)
	c, _ := peer(t, s, 1, nil)
	if got := party(c.SignAs(within(t), "payments", "payer", payment)); got != "1 <nil>" {
		t.Error(got)
	}
	s.Do(func(s *clienttest.Server) {
		s.Answer = func(_ string, request any) []byte {
			if _, is := request.(*wire.Sign); is {
				s.Do(func(s *clienttest.Server) { s.Active, s.Shown, s.Answer = 2, 2, nil })
			}
			return nil
		}
	})
	if got := party(c.SignAs(within(t), "payments", "payer", payment)); got != "2 <nil>" {
		t.Errorf("rotated meanwhile: %s", got)
	}

	s.Do(func(s *clienttest.Server) {
		s.Answer = func(id string, request any) []byte {
			if _, is := request.(*wire.Sign); is {
				return wire.EncodeAnswer(id, "", nil, &wire.Error{Code: wire.CodeKeyRotated})
			}
			return nil
		}
	})
	if _, err := c.SignAs(within(t), "payments", "payer", payment); !errors.Is(err, client.ErrKeyRotated) {
		t.Errorf("no end of rotations: %v", err)
	}
	s.Do(func(s *clienttest.Server) { s.Answer = nil })
	if _, err := c.SignAs(within(t), "payments", "payee", payment); !errors.Is(err, client.ErrMalformed) {
		t.Errorf("a payer that is no key: %v", err)
	}
	thief := clienttest.NewKeyLine("thief", 2)
	s.Do(func(s *clienttest.Server) {
		s.Answer = func(id string, request any) []byte {
			switch r := request.(type) {
			case *wire.Keys:
				return wire.EncodeAnswer(id, "", wire.KeyList{Keys: []wire.Key{
					{Name: "payments", Version: 2, State: wire.StateActive, PublicKey: thief.Public(1)},
				}}, nil)
			case *wire.Sign:
				return wire.EncodeAnswer(id, "", s.Line.Signed(2, r), nil)
			}
			return nil
		}
	})
	if _, err := c.SignAs(within(t), "payments", "payer", payment); !errors.Is(err, client.ErrWrongAnswer) {
		t.Errorf("another public key than the one that signs: %v", err)
	}
	s.Do(func(s *clienttest.Server) { s.Answer = nil })
	for name, c := range map[string]struct {
		key, payload string
		want         error
	}{
		"no such key": {"nothing", string(payment.Payload), client.ErrUnknownKey},
		"no object":   {"payments", `[]`, client.ErrMalformed},
		"a name twice": {"payments", strings.Replace(string(payment.Payload), "{", `{"payer":"",`, 1),
			client.ErrMalformed},
	} {
		cl, _ := peer(t, s, 1, nil)
		d := payment
		d.Payload = []byte(c.payload)
		if _, err := cl.SignAs(within(t), c.key, "payer", d); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	s.Do(func(s *clienttest.Server) { s.Active = 0 })
	if _, err := c.Key(within(t), "payments"); !errors.Is(err, client.ErrKeyNotActive) {
		t.Errorf("no active version: %v", err)
	}
}

// TestFillAs: a document that was stored with its signer keeps its signature after a rotation, and
// a document that nobody has signed yet gets the new signer.
func TestFillAs(t *testing.T) {
	a := start(t)
	c := dial(t, a.config())
	payment := client.Document{Type: "payment-request-v1", Payload: []byte(`{"amount":"0.25","currency":"EUR",` +
		`"method":"sepa","endpoint":"https://shop.example/"}`)}
	var stored, unsigned client.Document
	for _, d := range []*client.Document{&stored, &unsigned} {
		var err error
		if *d, err = c.FillAs(t.Context(), "payments", "payer", payment); err != nil {
			t.Fatal(err)
		}
	}
	first, err := c.Sign(t.Context(), "payments", stored)
	if err != nil || first.Version != 1 {
		t.Fatal(err)
	}
	a.rotate("payments", time.Now())
	again, err := c.Sign(t.Context(), "payments", stored)
	if err != nil || !again.Repeated || string(again.Signature) != string(first.Signature) {
		t.Errorf("after the rotation: %+v, %v", again, err)
	}
	outcomes, err := c.Batch(t.Context(), []client.Item{{Key: "payments", Document: unsigned}})
	if err != nil || !errors.Is(outcomes[0].Err, client.ErrWrongSigner) {
		t.Errorf("a document of the old version, not signed before: %v, %v", outcomes, err)
	}
	if unsigned, err = c.FillAs(t.Context(), "payments", "payer", unsigned); err != nil {
		t.Fatal(err)
	}
	if s, err := c.Sign(t.Context(), "payments", unsigned); err != nil || s.Version != 2 || s.Repeated {
		t.Errorf("filled again: %+v, %v", s, err)
	}
}
