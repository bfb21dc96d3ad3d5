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

	"countersign/audit"
	"countersign/internal/eddsa"
	"countersign/internal/form"
	"countersign/internal/keystore"
	"countersign/internal/limit"
	"countersign/internal/meter"
	"countersign/internal/peers"
	"countersign/internal/schedule"
	"countersign/wire"
)

// Lane is a queue in front of a token, see limit.Fair. Lanes take turns: a caller waits for the
// operations in progress, and for at most one operation of each other lane. Each peer has a lane,
// all handshakes share a lane, and the appliance itself has a lane.
type Lane string

const (
	Own        Lane = ""
	Handshakes Lane = "handshakes" // differs from each peer's lane, which has a space
)

// LaneOf is the lane of a peer, by the peer's name: several keys give a peer no more turns.
func LaneOf(peer string) Lane { return Lane("peer " + peer) }

// Key is one version of a key, as in the ledger and on the token. A Key is immutable: a version in
// another state is another Key.
type Key struct {
	Name    string
	Version uint32
	Token   string // name of the token with the private key
	State   State
	Created time.Time
	// Activates is the time at which the version became or will become active; zero for a pending
	// version that is not announced. Retires is the time at which a verify-only version is archived
	// at the latest.
	Activates, Retires time.Time
	// Change, By, CalledOff and UsesBefore are those of the record. CalledOff is zero where no
	// announcement of the next version was called off.
	Change     uint32
	By         *audit.Actor
	CalledOff  time.Time
	UsesBefore uint64
	Recovery   bool   // of the record
	Envelope   []byte // of the record

	Compromised   bool // set for ever by a compromise; the state may be destroyed by now
	Succession    *wire.Succession
	Authorization *wire.Authorization

	device keystore.Key
	public *eddsa.PublicKey // nil: no Ed25519 key
	turns  *limit.Fair      // of the token
	usage  *usage
}

// usage is shared by all Keys of one version.
type usage struct {
	count   atomic.Uint64 // uses of the private key
	retired atomic.Bool   // set when the version goes out of use
}

// Info describes the key: name, algorithm, public key, custody, provenance.
func (k *Key) Info() keystore.Info { return k.device.Info() }

// Ref is the name and version of the key: "payments/3".
func (k *Key) Ref() keystore.Ref { return keystore.Ref{Name: k.Name, Version: k.Version} }

// Uses is the number of signatures that the version has made.
func (k *Key) Uses() uint64 { return k.usage.count.Load() }

// Announced reports that peers may know of the version.
func (k *Key) Announced() bool { return k.State != Pending && !k.neverUsed() || !k.Activates.IsZero() }

// neverUsed reports that a version went out of use before it was active: by a recovery, or as a
// recovery successor that was replaced. Such a version is no part of the line, whatever becomes of
// its key later.
func (k *Key) neverUsed() bool { return k.State.outOfUse() && k.Activates.IsZero() }

// due returns the plan's answer for an active version. After a rotation was called off, the plan
// counts from then on: otherwise the same rotation would be announced again at once.
func (k *Key) due(p schedule.Plan, now time.Time) (due bool, from time.Time, why schedule.Reason) {
	since, uses := k.Activates, k.Uses()
	if !k.CalledOff.IsZero() {
		since, uses = k.CalledOff, uses-min(uses, k.UsesBefore)
	}
	return p.Due(since, uses, time.Time{}, now)
}

// inUse refuses a version that is out of use at this moment. The version may have gone out of use
// after the request had chosen the version.
func (k *Key) inUse() error {
	if k.usage.retired.Load() {
		return fmt.Errorf("%w: version %d of %q is out of use", ErrNotActive, k.Version, k.Name)
	}
	return nil
}

// digest is SHA-256 of the public key: the version before commits to the digest.
func (k *Key) digest() [32]byte { return sha256.Sum256(k.Info().PublicKey) }

// Verify verifies an Ed25519 signature by the strict rules of package eddsa, as strangers do.
func (k *Key) Verify(message, signature []byte) error {
	if k.public == nil {
		return fmt.Errorf("%v is not an Ed25519 key", k.Ref())
	}
	return k.public.Verify(message, signature)
}

// Sign waits for a turn in a lane and signs for the appliance itself. The result is ErrNotActive if
// the version goes out of use meanwhile.
func (k *Key) Sign(ctx context.Context, lane Lane, message []byte, judge keystore.Judge) ([]byte, error) {
	signature, err := k.sign(ctx, lane, nil, message, judge, k.inUse)
	if err == nil {
		k.usage.count.Add(1)
	}
	return signature, err
}

// Sign signs for a peer, in the peer's lane. The right to the signature is asked before the device
// signs, and again before the signature is returned: the version must be in use, the peer active
// and the gate open. An act that takes the right away ends the wait at once, see gate.Use. walk is
// the clock of the request, input the document for the key worker (package form).
func (r *Ring) Sign(
	ctx context.Context, who peers.Peer, walk *meter.Walk, k *Key, input []byte, judge keystore.Judge,
) ([]byte, error) {
	ctx, use := r.Gate.Use(ctx, func() error {
		if err := r.Peers.Serves(who); err != nil {
			return err
		}
		return k.inUse()
	})
	defer use.End()
	walk.Enter(meter.Turn)
	defer walk.Enter(meter.Answer)
	timed := func(signature []byte) bool {
		walk.Enter(meter.Verify)
		defer walk.Enter(meter.Device)
		return judge.Accepts(signature)
	}
	signature, err := k.sign(ctx, LaneOf(who.Name), walk, input, timed, use.Err)
	if err == nil {
		k.usage.count.Add(1)
	}
	return signature, err
}

// MayHave refuses to release a signature of a version to a peer at this moment. Signatures of an
// archived version were made in time, and are still given out.
func (r *Ring) MayHave(who peers.Peer, name string, version uint32) error {
	if err := r.Peers.Serves(who); err != nil {
		return err
	}
	_, err := r.Admitted(name, version)
	return err
}

// sign calls may before the wait for a turn, before the device signs, and before the signature is
// returned. The error of may comes before the error of a wait that ends with the right.
func (k *Key) sign(
	ctx context.Context, lane Lane, walk *meter.Walk, message []byte, judge keystore.Judge, may func() error,
) (signature []byte, err error) {
	defer func() {
		if refused := may(); refused != nil {
			signature, err = nil, refused
		}
	}()
	if err := may(); err != nil {
		return nil, err
	}
	release, err := k.turns.Acquire(ctx, string(lane))
	if err != nil {
		return nil, err
	}
	defer release()
	if err := may(); err != nil {
		return nil, err
	}
	walk.Enter(meter.Device)
	return k.device.Sign(ctx, message, judge)
}

// Exchange waits for a turn in a lane and computes the X25519 shared secret.
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

// In returns the key as a keystore.Key whose uses all wait in one lane.
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

// Prove has the device use the private key once, and checks the result. A key must not come into
// use without a proof.
func (r *Ring) Prove(ctx context.Context, k *Key) (err error) {
	ctx, cancel := context.WithTimeout(ctx, r.RequestTimeout)
	defer cancel()
	if k.Info().Algorithm == keystore.X25519 {
		err = proveExchange(ctx, k.In(Own))
	} else {
		err = k.signCanary(ctx, k.inUse)
	}
	if err != nil {
		return fmt.Errorf("prove key %v: %w", k.Ref(), err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.lost, k.Ref())
	return nil
}

// signCanary has the device sign a random message, and checks the signature.
func (k *Key) signCanary(ctx context.Context, may func() error) error {
	message := form.NewCanary()
	verifies := func(signature []byte) bool { return k.Info().Verify(message, signature) }
	_, err := k.sign(ctx, Own, nil, message, verifies, may)
	return err
}

// ProveUse has a device use a private key once, and checks the result. The key need not be in a
// ring.
func ProveUse(ctx context.Context, k keystore.Key) error {
	if k.Info().Algorithm == keystore.X25519 {
		return proveExchange(ctx, k)
	}
	message := form.NewCanary()
	_, err := k.Sign(ctx, message, func(signature []byte) bool { return k.Info().Verify(message, signature) })
	return err
}

func proveExchange(ctx context.Context, k keystore.Key) error {
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
	got, err := k.Exchange(ctx, [32]byte(other.PublicKey().Bytes()))
	if err == nil && !bytes.Equal(got[:], want) {
		err = keystore.ErrWrong
	}
	return err
}

// gone is the device of a key whose token is missing in the configuration: every use fails.
type gone struct{ info keystore.Info }

func (g gone) Info() keystore.Info { return g.info }

func (g gone) Sign(context.Context, []byte, keystore.Judge) ([]byte, error) {
	return nil, fmt.Errorf("%v: %w", g.info.Ref, keystore.ErrNotFound)
}

func (g gone) Exchange(context.Context, [32]byte) (shared [32]byte, err error) {
	return shared, fmt.Errorf("%v: %w", g.info.Ref, keystore.ErrNotFound)
}
