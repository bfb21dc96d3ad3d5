package client_test

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"time"

	"countersign/audit"
	"countersign/client"
	"countersign/client/clienttest"
	"countersign/transcript"
)

// A payment server has a document signed, and verifies a document of another party.
func Example() {
	appliance := startExample() // a real one has an address, a public key and an identity file
	defer appliance.close()

	ctx := context.Background()
	c, err := client.Dial(ctx, client.Config{
		Address:   appliance.address,
		ServerKey: appliance.key,  // client.ParseKey(…)
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
	fmt.Println("the second time it is a replay:", errors.Is(err, client.ErrReplay))
	// Output:
	// a signature of 64 bytes by payments, version 1
	// valid
	// the second time it is a replay: true
}

// A payment server begins with the files that it keeps, and keeps them up to date. docs/PEERS.md
// says who makes the files, and what happens when one is lost.
func ExampleConfig() {
	appliance := startExample()
	defer appliance.close()
	file := func(name string) string { return filepath.Join(appliance.kept(), name) }

	identity, err := client.ReadIdentity(file("shop.key"))
	if err != nil {
		log.Fatal(err)
	}
	serverKey, err := client.ReadKey(file("noise.pub"))
	if err != nil {
		log.Fatal(err)
	}
	line, err := client.ReadKeyLine(file("payments.line"))
	if err != nil {
		log.Fatal(err)
	}
	logKey, err := os.ReadFile(file("log.vkey"))
	if err != nil {
		log.Fatal(err)
	}
	var c *client.Client
	c, err = client.New(client.Config{
		Address: appliance.address, ServerKey: serverKey, Identity: identity,
		Lines:         []client.KeyLine{line},
		LogKey:        string(logKey),
		LogCheckpoint: file("log.checkpoint"), // the client makes and replaces the file
		RetryFor:      30 * time.Second,
		OnRotation: func(r client.Rotation) {
			if r.Err != nil {
				log.Print("people must look at this rotation: ", r.Err)
				return
			}
			if l, pinned := c.Pinned(r.Key); pinned {
				if err := client.WriteKeyLine(file(r.Key+".line"), l); err != nil {
					log.Print(err) // the next start follows the line from the old file
				}
			}
		},
		OnServerKey: func(key [32]byte, _ uint64) {
			if err := client.WriteKey(file("noise.pub"), key); err != nil {
				log.Fatal(err) // the next start could not connect
			}
		},
		OnCompromise: func(_ context.Context, v client.Compromise) {
			log.Printf("believe no document that version %d of %s has signed", v.Version, v.Key)
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	signed, err := c.Sign(context.Background(), "payments", client.Document{
		Type: "message-v1", Payload: []byte(`{"context":"invoice","message":"NDI"}`),
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("by version %d, which the line allows, and in the log\n", signed.Version)
	// Output:
	// by version 1, which the line allows, and in the log
}

// The signer of a Paykit subscription must be a party to it. SignAs puts the public key of the
// version that signs into the payload.
func ExampleClient_SignAs() {
	appliance := startExample()
	defer appliance.close()
	ctx := context.Background()
	c, err := client.New(appliance.config())
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	signed, err := c.SignAs(ctx, "payments", "subscriber", client.Document{
		Type: "paykit-subscription-v2",
		Payload: []byte(`{
			"subscription_id": "sub_0042",
			"provider": "a09aa5f47a6759802ff955f8dc2d2a14a5c99d23be97f864127ff9383455a4f0",
			"terms": {
				"amount": "1000", "currency": "SAT", "method": "lightning",
				"frequency": {"Monthly": {"day_of_month": 1}}, "description": "hosting"
			},
			"metadata": {}, "created_at": 1704067200, "starts_at": 1704067200, "ends_at": null
		}`),
	})
	if err != nil {
		log.Fatal(err)
	}
	doc, err := transcript.Parse(transcript.Request(signed.Document)) // the signed bytes
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("signed by a party:", doc.CheckSigner(signed.PublicKey[:]) == nil)
	// Output:
	// signed by a party: true
}

// A server verifies what a customer sends, and tells the reasons of a refusal apart.
func ExampleClient_Verify() {
	appliance := startExample()
	defer appliance.close()
	ctx := context.Background()
	c, err := client.New(appliance.config())
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	verify := func(received []byte) string {
		signed, err := client.DecodeSigned(received)
		if err != nil || signed.Signature == nil {
			return "no signed document"
		}
		_, err = c.Verify(ctx, "payments", signed)
		switch refusal := (*client.Error)(nil); {
		case err == nil:
			return "accepted"
		case errors.Is(err, client.ErrUnknownOutcome): // before the refusals
			return "ask for a new document: this one may be spent"
		case errors.Is(err, client.ErrReplay):
			return "it was used before"
		case errors.Is(err, client.ErrExpired):
			return "it has expired"
		case errors.As(err, &refusal):
			return "refused: " + refusal.Code // and refusal.Message, for people
		default:
			return "try again later" // with the client's RetryFor, after so long
		}
	}

	signed, err := c.Sign(ctx, "payments", client.Document{
		Type: "message-v1", Payload: []byte(`{"context":"order","message":"NDI"}`),
	})
	if err != nil {
		log.Fatal(err)
	}
	received, err := signed.Encode()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(verify(received))
	fmt.Println(verify(received))
	signed.Nonce[0]++
	forged, err := signed.Encode()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(verify(forged))
	// Output:
	// accepted
	// it was used before
	// refused: invalid_signature
}

// Many documents are signed with one round trip, and with one write to the appliance's disk.
func ExampleClient_Batch() {
	appliance := startExample()
	defer appliance.close()
	ctx := context.Background()
	c, err := client.New(appliance.config())
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	var items []client.Item
	for _, key := range []string{"payments", "payments", "payroll"} {
		items = append(items, client.Item{Key: key, Document: client.Document{
			Type: "message-v1", Payload: []byte(`{"context":"invoice","message":"NDI"}`),
		}.Fill(time.Hour)}) // filled, so that a lost batch can be sent again unchanged
	}
	outcomes, err := c.Batch(ctx, items)
	if err != nil {
		log.Fatal(err)
	}
	for i, o := range outcomes {
		switch {
		case o.Err == nil:
			fmt.Println(i, "signed")
		case errors.Is(o.Err, client.ErrUnknownKey):
			fmt.Println(i, "there is no such key")
		default:
			fmt.Println(i, o.Err)
		}
	}
	// Output:
	// 0 signed
	// 1 signed
	// 2 there is no such key
}

// A server trusts one version of a key, which the file payments.line has, and follows the key from
// there. `countersign line pin payments >payments.line` makes the file.
func ExampleConfig_rotation() {
	appliance := startExample()
	defer appliance.close()
	file := appliance.pin("payments")

	line, err := client.ReadKeyLine(file)
	if err != nil {
		log.Fatal(err)
	}
	var c *client.Client
	stored := make(chan bool)
	config := appliance.config()
	config.Lines = []client.KeyLine{line}
	config.OnRotation = func(r client.Rotation) {
		if r.Err != nil {
			log.Print("people must look at this: ", r.Err)
			return
		}
		if l, pinned := c.Pinned(r.Key); pinned {
			if err := client.WriteKeyLine(file, l); err != nil {
				log.Print(err) // the next start follows the line from the old file
			}
		}
		fmt.Printf("version %d of %s signs in %d minutes\n",
			r.New.Version, r.Key, time.Until(r.ActivatesAt).Round(time.Minute)/time.Minute)
		stored <- true
	} // the client tells the appliance now that this server knows the new version

	// New does not connect yet: no callback runs before c is set.
	if c, err = client.New(config); err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	go c.Stay(context.Background()) // in a loop, see Stay, to hear of rotations at once

	appliance.rotate("payments", time.Now().Add(time.Hour))
	<-stored
	signed, err := c.Sign(context.Background(), "payments", client.Document{
		Type: "message-v1", Payload: []byte(`{"context":"invoice","message":"NDI"}`),
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("until then, version %d signs\n", signed.Version)
	line, err = client.ReadKeyLine(file)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("the file has version %d, and version %d as announced\n", line.Version, line.Newest().Version)
	// Output:
	// version 2 of payments signs in 60 minutes
	// until then, version 1 signs
	// the file has version 1, and version 2 as announced
}

// A version of a key may be in other hands. The server hears so before the client returns any
// signature of the next version.
func ExampleConfig_compromise() {
	appliance := startExample()
	defer appliance.close()
	line, err := client.ReadKeyLine(appliance.pin("payments"))
	if err != nil {
		log.Fatal(err)
	}
	told := make(chan client.Compromise, 1)
	config := appliance.config()
	config.Lines = []client.KeyLine{line}
	config.OnCompromise = func(_ context.Context, v client.Compromise) {
		told <- v // and drop all documents that this version has signed
	} // the client tells the appliance now that this server knows
	c, err := client.New(config)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	appliance.compromise("payments", 1)
	signed, err := c.Sign(context.Background(), "payments", client.Document{
		Type: "message-v1", Payload: []byte(`{"context":"invoice","message":"NDI"}`),
	})
	if err != nil {
		log.Fatal(err)
	}
	v := <-told
	fmt.Printf("version %d of %s is compromised, version %d signs\n", v.Version, v.Key, signed.Version)
	// Output:
	// version 1 of payments is compromised, version 2 signs
}

// With LogKey, each signature comes with a proof that the audit log has it. With LogCheckpoint, a
// log that was set back is noticed also after a restart of the server.
func ExampleConfig_log() {
	appliance := startExample()
	defer appliance.close()
	config := appliance.config()
	config.LogKey = appliance.logKey() // as `countersign admin audit key` prints it
	config.LogCheckpoint = filepath.Join(appliance.dir, "log.checkpoint")

	for range 2 { // the server starts twice
		c, err := client.New(config)
		if err != nil {
			log.Fatal(err)
		}
		_, err = c.Sign(context.Background(), "payments", client.Document{
			Type: "message-v1", Payload: []byte(`{"context":"invoice","message":"NDI"}`),
		})
		switch {
		case errors.Is(err, client.ErrForkedLog):
			log.Fatal("stop, and call the operators: ", err)
		case errors.Is(err, client.ErrUnproven):
			log.Fatal("signed, and not proven: ", err)
		case err != nil:
			log.Fatal(err)
		}
		c.Close()
		_, err = os.Stat(config.LogCheckpoint)
		fmt.Println("signed, proven and remembered:", err == nil)
	}
	// Output:
	// signed, proven and remembered: true
	// signed, proven and remembered: true
}

// A Signer is a crypto.Signer: crypto/x509, crypto/tls and libraries for JWTs (EdDSA) take it as
// the private key. Policy must permit sign_raw for this peer and key.
func ExampleClient_Signer() {
	appliance := startExample()
	defer appliance.close()
	ctx := context.Background()
	c, err := client.New(appliance.config())
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	signer, err := c.Signer(ctx, "raw-certificates")
	if err != nil {
		log.Fatal(err)
	}
	request := &x509.CertificateRequest{Subject: pkix.Name{CommonName: "shop.example"}}
	der, err := x509.CreateCertificateRequest(rand.Reader, request, signer)
	if err != nil {
		log.Fatal(err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("a request of", csr.Subject, "with a good signature:", csr.CheckSignature() == nil)

	appliance.rotate("raw-certificates", time.Now())
	_, err = x509.CreateCertificateRequest(rand.Reader, request, signer)
	fmt.Println("make a new Signer:", errors.Is(err, client.ErrKeyRotated))
	// Output:
	// a request of CN=shop.example with a good signature: true
	// make a new Signer: true
}

// A peer keeps the receipt of a payment, and shows an auditor later that the appliance's record is
// of this amount. The proof of the event shows that the log had the payment before its signature
// existed.
func ExampleClient_Proof() {
	appliance := startExample()
	defer appliance.close()
	ctx := context.Background()
	c, err := client.New(appliance.config())
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	signed, err := c.SignAs(ctx, "payments", "payer", client.Document{
		Type: "payment-request-v1",
		Payload: []byte(`{
			"payee": "a09aa5f47a6759802ff955f8dc2d2a14a5c99d23be97f864127ff9383455a4f0",
			"amount": "1000", "currency": "SAT", "method": "lightning",
			"endpoint": "https://shop.example/pay/42"
		}`),
	})
	if err != nil {
		log.Fatal(err)
	}
	record := appliance.receipt(signed.Receipt.ID) // by `countersign admin receipt show`
	fmt.Println("of 1000 SAT:", record == signed.Receipt.Commitment("1000", "SAT"))

	proof, err := c.Proof(ctx, signed.Event)
	if err != nil {
		log.Fatal(err)
	}
	logOf, err := audit.ParseVerifierKey(appliance.logKey())
	if err != nil {
		log.Fatal(err)
	}
	event, _, err := logOf.Check(proof)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("in the log:", event.Type, "of", event.Actor.Name)
	// Output:
	// of 1000 SAT: true
	// in the log: PaymentInitiated of shop
}

// A peer that was away while the appliance's Noise key was replaced gets the new key from anywhere,
// with an authorization by the identity of the appliance: `countersign admin noise-key --json`
// prints both. A running client checks each new key so by itself where Config.ServerIdentity is
// set.
func ExampleAuthorizedServerKey() {
	identity := ed25519.NewKeyFromSeed(make([]byte, 32)) // in the appliance
	var next [32]byte                                    // the new key
	next[0] = 9
	authorization := clienttest.Authorization(identity, &next, 1704067200)

	known := [32]byte(identity.Public().(ed25519.PublicKey)) // pinned by the peer
	const newest = 1700000000                                // the highest generation that the peer has seen
	key, generation, err := client.AuthorizedServerKey(known, authorization, newest)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("ServerKey %x…, ServerGeneration %d\n", key[:4], generation)

	_, _, err = client.AuthorizedServerKey(known, authorization, generation+1)
	fmt.Println("an older one:", errors.Is(err, client.ErrUnauthorized))
	// Output:
	// ServerKey 09000000…, ServerGeneration 1704067200
	// an older one: true
}
