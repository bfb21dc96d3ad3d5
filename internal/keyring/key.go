package keyring

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"sync/atomic"
	"time"

	"countersign/internal/eddsa"
	"countersign/internal/keystore"
	"countersign/internal/limit"
	"countersign/wire"
)

// Lane is a queue in front of a token: a caller waits for the device in its lane. Lanes take turns, so
// that a caller waits for at most one operation of each other lane, and for those under way. Each peer
// has a lane, all handshakes have one, and the appliance itself has one.
type Lane string

const (
	Own        Lane = ""
	Handshakes Lane = "handshakes" // lanes of peers have 32 bytes
)

// LaneOf is the lane of a peer, by its public key.
func LaneOf(peer [32]byte) Lane { return Lane(peer[:]) }

// Key is one version of a key as ledger and token agree on it. A Key does not change: another state is
// another Key.
type Key struct {
	Name    string
	Version uint32
	Token   string // the name of the token that has it
	State   State
	Created time.Time
	// Activates is when the version becomes active, or has; zero while it is pending and not announced.
	// Retires is when a verify-only version is archived at the latest.
	Activates, Retires time.Time
	Compromised        bool // found to be so at some time, whatever its state is now
	Succession         *wire.Succession
	Authorization      *wire.Authorization

	device keystore.Key
	public *eddsa.PublicKey // of an Ed25519 key
	turns  *limit.Fair      // of its token
	usage  *usage
}

// usage is what all Keys of one version share.
type usage struct {
	count   atomic.Uint64 // uses of the private key
	retired atomic.Bool   // the private key is not used any more
}

// Info describes the key: name, algorithm, public key, custody, provenance.
func (k *Key) Info() keystore.Info { return k.device.Info() }

// Ref is the name and version of the key: "payments/3".
func (k *Key) Ref() keystore.Ref { return keystore.Ref{Name: k.Name, Version: k.Version} }

// Uses is how many signatures the version has made.
func (k *Key) Uses() uint64 { return k.usage.count.Load() }

// Announced reports that peers may know of the version.
func (k *Key) Announced() bool { return k.State != Pending || !k.Activates.IsZero() }

// inUse refuses a version that is out of use by now, whatever it was when the request chose it.
func (k *Key) inUse() error {
	if k.usage.retired.Load() {
		return fmt.Errorf("%w: version %d of %q is out of use", ErrNotActive, k.Version, k.Name)
	}
	return nil
}

// digest is what the version before commits to.
func (k *Key) digest() [32]byte { return sha256.Sum256(k.Info().PublicKey) }

// Verify judges an Ed25519 signature by the strict rules that a stranger will judge by.
func (k *Key) Verify(message, signature []byte) error {
	if k.public == nil {
		return fmt.Errorf("%v is not an Ed25519 key", k.Ref())
	}
	return k.public.Verify(message, signature)
}

// Sign waits for its turn in a lane and signs. A version that has gone out of use meanwhile signs
// nothing.
func (k *Key) Sign(ctx context.Context, lane Lane, message []byte, judge keystore.Judge) ([]byte, error) {
	signature, err := k.sign(ctx, lane, message, judge, k.inUse)
	if err == nil {
		k.usage.count.Add(1)
	}
	return signature, err
}

// sign signs while may allows it: before the device is asked, and before its signature is given out.
func (k *Key) sign(ctx context.Context, lane Lane, message []byte, judge keystore.Judge, may func() error) ([]byte, error) {
	release, err := k.turns.Acquire(ctx, string(lane))
	if err != nil {
		return nil, err
	}
	defer release()
	if err := may(); err != nil {
		return nil, err
	}
	signature, err := k.device.Sign(ctx, message, judge)
	if refused := may(); refused != nil {
		return nil, refused
	}
	return signature, err
}

// Exchange waits for its turn in a lane and makes the shared secret.
func (k *Key) Exchange(ctx context.Context, lane Lane, peer [32]byte) (shared [32]byte, err error) {
	release, err := k.turns.Acquire(ctx, string(lane))
	if err != nil {
		return shared, err
	}
	defer release()
	if err := k.inUse(); err != nil {
		return shared, err
	}
	shared, err = k.device.Exchange(ctx, peer)
	if refused := k.inUse(); refused != nil {
		return [32]byte{}, refused
	}
	return shared, err
}

// In gives the key to a user that knows no lanes: all its uses are in one.
func (k *Key) In(lane Lane) keystore.Key { return inLane{k, lane} }

type inLane struct {
	*Key
	lane Lane
}

func (k inLane) Sign(ctx context.Context, message []byte, judge keystore.Judge) ([]byte, error) {
	return k.Key.Sign(ctx, k.lane, message, judge)
}

func (k inLane) Exchange(ctx context.Context, peer [32]byte) ([32]byte, error) {
	return k.Key.Exchange(ctx, k.lane, peer)
}

// canaryDomain keeps the signature of a proof from meaning anything: it is on no checkpoint, and on no
// transcript.
const canaryDomain = "countersign-canary-v1\x00"

// Prove has the device show that it has a private key. A key must not come into use without.
func (r *Ring) Prove(ctx context.Context, k *Key) (err error) {
	ctx, cancel := context.WithTimeout(ctx, r.RequestTimeout)
	defer cancel()
	if k.Info().Algorithm == keystore.X25519 {
		err = proveExchange(ctx, k)
	} else {
		message := append([]byte(canaryDomain), make([]byte, 32)...)
		rand.Read(message[len(canaryDomain):])
		verifies := func(signature []byte) bool { return k.Info().Verify(message, signature) }
		_, err = k.sign(ctx, Own, message, verifies, k.inUse)
	}
	if err != nil {
		return fmt.Errorf("prove key %v: %w", k.Ref(), err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.lost, k.Ref())
	return nil
}

func proveExchange(ctx context.Context, k *Key) error {
	other, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	public, err := ecdh.X25519().NewPublicKey(k.Info().PublicKey)
	if err != nil {
		return err
	}
	want, err := other.ECDH(public)
	if err != nil {
		return err
	}
	got, err := k.Exchange(ctx, Own, [32]byte(other.PublicKey().Bytes()))
	if err == nil && !bytes.Equal(got[:], want) {
		err = keystore.ErrWrong
	}
	return err
}

// gone stands for a key whose token the configuration does not have.
type gone struct{ info keystore.Info }

func (g gone) Info() keystore.Info { return g.info }

func (g gone) Sign(context.Context, []byte, keystore.Judge) ([]byte, error) {
	return nil, fmt.Errorf("%v: %w", g.info.Ref, keystore.ErrNotFound)
}

func (g gone) Exchange(context.Context, [32]byte) (shared [32]byte, err error) {
	return shared, fmt.Errorf("%v: %w", g.info.Ref, keystore.ErrNotFound)
}
