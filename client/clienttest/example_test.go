package clienttest_test

import (
	"context"
	"errors"
	"fmt"
	"log"

	"countersign/client"
	"countersign/client/clienttest"
	"countersign/wire"
)

// A test of a payment server gives the server a fake appliance, which refuses when the test wants.
func Example() {
	appliance, err := clienttest.Start()
	if err != nil {
		log.Fatal(err)
	}
	defer appliance.Close()
	c, err := client.New(client.Config{ // in the server under test
		Address: appliance.Address, ServerKey: appliance.Statics[0].Public(), Identity: appliance.Peer,
	})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	ctx := context.Background()
	order := client.Document{Type: "message-v1", Payload: []byte(`{"context":"order","message":"NDI"}`)}
	signed, err := c.Sign(ctx, "payments", order)
	if err != nil {
		log.Fatal(err)
	}
	_, err = c.Verify(ctx, "payments", signed)
	fmt.Println("verified:", err == nil)
	_, err = c.Verify(ctx, "payments", signed)
	fmt.Println("a second time:", errors.Is(err, client.ErrReplay))

	appliance.Do(func(s *clienttest.Server) {
		s.Answer = func(id string, request any) []byte {
			if _, sign := request.(*wire.Sign); sign {
				return wire.EncodeAnswer(id, "", nil, &wire.Error{Code: wire.CodeDenied, Message: "over the budget"})
			}
			return nil // as always
		}
	})
	_, err = c.Sign(ctx, "payments", order)
	fmt.Println("denied:", errors.Is(err, client.ErrDenied))

	appliance.Do(func(s *clienttest.Server) { s.Answer, s.Active, s.Shown = nil, 2, 2 }) // a rotation
	signed, err = c.Sign(ctx, "payments", order)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("version", signed.Version)
	// Output:
	// verified: true
	// a second time: true
	// denied: true
	// version 2
}
