package keystoretest

import (
	"context"
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"sync"

	"countersign/keystore"
)

// Memory is a Store in memory that obeys the contract and can be told to fail. Nothing but tests may use it.
type Memory struct {
	mu   sync.Mutex
	keys map[keystore.Ref]*memoryKey

	// BeforeSign, where it is set, runs before each signature; its error is the device's.
	BeforeSign func(ref keystore.Ref, message []byte) error
	// BeforeGenerate, where it is set, runs before a key is made: a device that takes its time.
	BeforeGenerate func(ref keystore.Ref)
	// Corrupt, where it is set, may change a signature: a device that answers wrongly.
	Corrupt func(signature []byte) []byte
}

type memoryKey struct {
	store *Memory
	info  keystore.Info
	tag   keystore.Tag
	sign  ed25519.PrivateKey
	dh    *ecdh.PrivateKey
}

// NewMemory returns an empty store.
func NewMemory() *Memory { return &Memory{keys: map[keystore.Ref]*memoryKey{}} }

func (m *Memory) Close() error { return nil }

func (m *Memory) Key(_ context.Context, ref keystore.Ref) (keystore.Key, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if k, ok := m.keys[ref]; ok {
		return k, nil
	}
	return nil, fmt.Errorf("%v: %w", ref, keystore.ErrNotFound)
}

func (m *Memory) Keys(context.Context) (infos []keystore.Info, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, k := range m.keys {
		infos = append(infos, k.info)
	}
	return infos, nil
}

func (m *Memory) Generate(_ context.Context, ref keystore.Ref, alg keystore.Algorithm, tag keystore.Tag) (keystore.Key, error) {
	if m.BeforeGenerate != nil {
		m.BeforeGenerate(ref)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.keys[ref]; ok {
		return nil, fmt.Errorf("%v: %w", ref, keystore.ErrExists)
	}
	k := &memoryKey{store: m, tag: tag, info: keystore.Info{Ref: ref, Algorithm: alg, Custody: "memory", Generated: true, NeverLeft: true}}
	var err error
	switch alg {
	case keystore.Ed25519:
		k.info.PublicKey, k.sign, err = ed25519.GenerateKey(rand.Reader)
	case keystore.X25519:
		if k.dh, err = ecdh.X25519().GenerateKey(rand.Reader); err == nil {
			k.info.PublicKey = k.dh.PublicKey().Bytes()
		}
	default:
		err = fmt.Errorf("unknown algorithm %q", alg)
	}
	if err != nil {
		return nil, err
	}
	m.keys[ref] = k
	return k, nil
}

func (m *Memory) Destroy(_ context.Context, ref keystore.Ref, tag keystore.Tag) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if k := m.keys[ref]; k != nil && k.tag == tag {
		delete(m.keys, ref)
	}
	return nil
}

// Remove takes a key away, as somebody with the token in hand could.
func (m *Memory) Remove(ref keystore.Ref) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.keys, ref)
}

func (k *memoryKey) Info() keystore.Info { return k.info }

func (k *memoryKey) Sign(ctx context.Context, message []byte) ([]byte, error) {
	if k.sign == nil {
		return nil, fmt.Errorf("%v is not a signing key", k.info.Ref)
	}
	if k.store.BeforeSign != nil {
		if err := k.store.BeforeSign(k.info.Ref, message); err != nil {
			return nil, err
		}
	}
	if err := k.usable(ctx); err != nil {
		return nil, err
	}
	sig := ed25519.Sign(k.sign, message)
	if k.store.Corrupt != nil {
		sig = k.store.Corrupt(sig)
	}
	return sig, nil
}

func (k *memoryKey) Exchange(ctx context.Context, peer [32]byte) (shared [32]byte, err error) {
	if k.dh == nil {
		return shared, fmt.Errorf("%v is not an exchange key", k.info.Ref)
	}
	if keystore.LowOrder(peer) {
		return shared, keystore.ErrPeerKey
	}
	if err := k.usable(ctx); err != nil {
		return shared, err
	}
	p, err := ecdh.X25519().NewPublicKey(peer[:])
	if err != nil {
		return shared, err
	}
	s, err := k.dh.ECDH(p)
	copy(shared[:], s)
	return shared, err
}

func (k *memoryKey) usable(ctx context.Context) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%w: %w", keystore.ErrUnavailable, ctx.Err())
	}
	k.store.mu.Lock()
	defer k.store.mu.Unlock()
	if k.store.keys[k.info.Ref] != k {
		return fmt.Errorf("%v: %w", k.info.Ref, keystore.ErrNotFound)
	}
	return nil
}
