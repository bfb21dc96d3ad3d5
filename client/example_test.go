package client_test

import (
	"context"
	"errors"
	"fmt"
	"log"

	"countersign/client"
)

// A payment server has a document signed, and verifies a document of another party.
func Example() {
	appliance, err := startAppliance() // a real one has an address, a public key and an identity file
	if err != nil {
		log.Fatal(err)
	}
	defer appliance.close()

	ctx := context.Background()
	c, err := client.Dial(ctx, client.Config{
		Address:   appliance.address,
		ServerKey: appliance.key,
		Identity:  appliance.shop, // client.ReadIdentity("peer.key")
	})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	signed, err := c.Sign(ctx, "payments", client.Document{
		Type:    "message-v1",
		Payload: []byte(`{"context":"invoice","message":"aW52b2ljZSA0Mg"}`),
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("a signature of %d bytes by %s, version %d\n", len(signed.Signature), signed.Key, signed.Version)

	if _, err := c.Verify(ctx, "payments", signed); err != nil {
		log.Fatal(err)
	}
	fmt.Println("valid")

	_, err = c.Verify(ctx, "payments", signed)
	var refusal *client.Error
	if errors.As(err, &refusal) {
		fmt.Println("the second time:", refusal.Code)
	}
	// Output:
	// a signature of 64 bytes by payments, version 1
	// valid
	// the second time: replay
}
