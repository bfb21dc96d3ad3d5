// Package audit is the schema of the audit log: what an event says and how it is written. The ledger stores the bytes
// and gives them their index; this package gives them their meaning.
//
// An event holds no payload, no amount and no secret: digests, names and public keys only.
package audit

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"
)

// Type says what happened.
type Type string

// The events. A signature leaves three marks at most: SignatureAdmitted is on disk before the key is used;
// SignatureCreated or SignatureFailed says how it ended. An admission without an ending means that the appliance was
// cut off in between: assume that the signature exists.
const (
	Started           Type = "Started"
	Stopped           Type = "Stopped"
	KeyCreated        Type = "KeyCreated"
	KeyImported       Type = "KeyImported"
	KeyCreationFailed Type = "KeyCreationFailed"
	TokenUnavailable  Type = "TokenUnavailable"
	TokenAvailable    Type = "TokenAvailable"
	TokenRetried      Type = "TokenRetried"
	LedgerBound       Type = "LedgerBound" // to a counter that only rises
	RollbackDetected  Type = "RollbackDetected"
	RollbackAccepted  Type = "RollbackAccepted"
	PeerAdded         Type = "PeerAdded"
	PeerRemoved       Type = "PeerRemoved"
	SignatureAdmitted Type = "SignatureAdmitted"
	SignatureCreated  Type = "SignatureCreated"
	SignatureFailed   Type = "SignatureFailed"
	SignatureRejected Type = "SignatureRejected"
	SignatureVerified Type = "SignatureVerified"
	ReplayRefused     Type = "ReplayRefused"
)

// Event is one entry of the log.
type Event struct {
	TimeMS   int64             `json:"time_ms"` // Unix milliseconds
	Type     Type              `json:"type"`
	Actor    Actor             `json:"actor"`
	Action   string            `json:"action"`             // what the actor asked for: sign, verify, key create, …
	Resource string            `json:"resource,omitempty"` // what it was to be done with: a key or a peer
	Outcome  string            `json:"outcome"`            // ok, or the code of the refusal
	Metadata map[string]string `json:"metadata,omitempty"`
}

// Actor is who asked: a peer by name and Noise key, an operator, or the daemon itself.
type Actor struct {
	Kind      string `json:"kind"` // peer, operator or daemon
	Name      string `json:"name"`
	PublicKey string `json:"public_key,omitempty"` // hex
}

// Peer, Operator and Daemon name the actor of an event.
func Peer(name string, publicKey [32]byte) Actor {
	return Actor{Kind: "peer", Name: name, PublicKey: hex.EncodeToString(publicKey[:])}
}

func Operator(name string) Actor { return Actor{Kind: "operator", Name: name} }

func Daemon() Actor { return Actor{Kind: "daemon", Name: "countersignd"} }

// Encode writes the event with the given time; equal events give equal bytes.
func (e Event) Encode(now time.Time) []byte {
	e.TimeMS = now.UnixMilli()
	b, err := json.Marshal(e)
	if err != nil {
		panic("audit: an event that is not JSON: " + err.Error()) // strings and numbers always are
	}
	return b
}

// Decode reads what Encode wrote.
func Decode(b []byte) (Event, error) {
	var e Event
	if err := json.Unmarshal(b, &e); err != nil {
		return Event{}, fmt.Errorf("audit: event: %w", err)
	}
	return e, nil
}
