package keystoretest

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"sync"

	"countersign/internal/keystore"
)

// Memory is a Store in memory that obeys the contract and can be told to fail. Nothing but tests may use it.
type Memory struct {
	mu   sync.Mutex
	keys map[keystore.Ref]*memoryKey

	// BeforeSign, where it is set, runs before each signature; its error is the device's.
	BeforeSign func(ref keystore.Ref, message []byte) error
	// BeforeExchange, where it is set, runs before each shared secret is made, whatever comes of it.
	BeforeExchange func(ref keystore.Ref)
	// BeforeGenerate, where it is set, runs before a key is made: a device that takes its time. Its error is the device's.
	BeforeGenerate func(ref keystore.Ref) error
	// Corrupt, where it is set, may change a signature: a device that answers wrongly.
	Corrupt func(signature []byte) []byte
}

type memoryKey struct {
	store *Memory
	info  keystore.Info
	tag   keystore.Tag
	sign  ed25519.PrivateKey
	ecdsa *ecdsa.PrivateKey
	dh    *ecdh.PrivateKey
}

// NewMemory returns an empty store.
func NewMemory() *Memory { return &Memory{keys: map[keystore.Ref]*memoryKey{}} }

func (m *Memory) Close() error { return nil }

func (m *Memory) Status() keystore.Status { return keystore.Status{Up: true} }

func (m *Memory) Retry() {}

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

func (m *Memory) Bind(info keystore.Info) keystore.Key { return bound{m, info} }

func (m *Memory) Inspect(context.Context) ([]keystore.Finding, error) {
	return []keystore.Finding{{What: "memory", OK: true, Text: "keys in memory, for tests"}}, nil
}

func (m *Memory) Generate(_ context.Context, ref keystore.Ref, alg keystore.Algorithm, tag keystore.Tag) (keystore.Key, error) {
	if m.BeforeGenerate != nil {
		if err := m.BeforeGenerate(ref); err != nil {
			return nil, err
		}
	}
	k := &memoryKey{}
	var public []byte
	var err error
	switch alg {
	case keystore.Ed25519:
		public, k.sign, err = ed25519.GenerateKey(rand.Reader)
	case keystore.P256:
		if k.ecdsa, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err == nil {
			public, err = k.ecdsa.PublicKey.Bytes()
		}
	case keystore.X25519:
		if k.dh, err = ecdh.X25519().GenerateKey(rand.Reader); err == nil {
			public = k.dh.PublicKey().Bytes()
		}
	default:
		err = fmt.Errorf("unknown algorithm %q", alg)
	}
	if err != nil {
		return nil, err
	}
	return m.add(k, ref, alg, public, tag, keystore.Provenance{Local: true, AlwaysSensitive: true, NeverExtractable: true})
}

func (m *Memory) Import(_ context.Context, ref keystore.Ref, path string, tag keystore.Tag) (keystore.Key, error) {
	seed, err := keystore.ReadSeed(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", keystore.ErrRefused, err)
	}
	k := &memoryKey{sign: ed25519.NewKeyFromSeed(seed[:])}
	return m.add(k, ref, keystore.Ed25519, k.sign.Public().(ed25519.PublicKey), tag, keystore.Provenance{})
}

func (m *Memory) add(k *memoryKey, ref keystore.Ref, alg keystore.Algorithm, public []byte, tag keystore.Tag, p keystore.Provenance) (keystore.Key, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.keys[ref]; ok {
		return nil, fmt.Errorf("%v: %w", ref, keystore.ErrExists)
	}
	k.store, k.tag = m, tag
	k.info = keystore.Info{Ref: ref, Algorithm: alg, PublicKey: public, Custody: "memory", Provenance: p, Tag: tag}
	m.keys[ref] = k
	return k, nil
}

// bound is a key by its description.
type bound struct {
	store *Memory
	info  keystore.Info
}

func (b bound) Info() keystore.Info { return b.info }

func (b bound) key() (*memoryKey, error) {
	b.store.mu.Lock()
	defer b.store.mu.Unlock()
	k := b.store.keys[b.info.Ref]
	if k == nil {
		return nil, fmt.Errorf("%v: %w", b.info.Ref, keystore.ErrNotFound)
	} else if !bytes.Equal(k.info.PublicKey, b.info.PublicKey) {
		return nil, fmt.Errorf("%v: %w: it is another key", b.info.Ref, keystore.ErrUnfit)
	}
	return k, nil
}

func (b bound) Sign(ctx context.Context, message []byte, judge keystore.Judge) ([]byte, error) {
	k, err := b.key()
	if err != nil {
		return nil, err
	}
	return k.Sign(ctx, message, judge)
}

func (b bound) Exchange(ctx context.Context, peer [32]byte) ([32]byte, error) {
	k, err := b.key()
	if err != nil {
		return [32]byte{}, err
	}
	return k.Exchange(ctx, peer)
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

func (k *memoryKey) Sign(ctx context.Context, message []byte, judge keystore.Judge) ([]byte, error) {
	if k.sign == nil && k.ecdsa == nil {
		return nil, fmt.Errorf("%v: %w: it is not a signing key", k.info.Ref, keystore.ErrRefused)
	}
	if k.store.BeforeSign != nil {
		if err := k.store.BeforeSign(k.info.Ref, message); err != nil {
			return nil, err
		}
	}
	if err := k.usable(ctx); err != nil {
		return nil, err
	}
	var sig []byte
	if k.ecdsa != nil {
		digest := sha256.Sum256(message)
		var err error
		if sig, err = k.ecdsa.Sign(rand.Reader, digest[:], crypto.SHA256); err != nil {
			return nil, err
		}
	} else {
		sig = ed25519.Sign(k.sign, message)
	}
	if k.store.Corrupt != nil {
		sig = k.store.Corrupt(sig)
	}
	if !judge.Accepts(sig) {
		return nil, keystore.ErrWrong
	}
	return sig, nil
}

func (k *memoryKey) Exchange(ctx context.Context, peer [32]byte) (shared [32]byte, err error) {
	if k.dh == nil {
		return shared, fmt.Errorf("%v: %w: it is not an exchange key", k.info.Ref, keystore.ErrRefused)
	}
	if k.store.BeforeExchange != nil {
		k.store.BeforeExchange(k.info.Ref)
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
