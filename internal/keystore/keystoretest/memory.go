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
	"maps"
	"slices"
	"sync"

	"countersign/internal/escrow"
	"countersign/internal/keystore"
	"countersign/internal/pubkey"
	"countersign/internal/scantest"
	"countersign/internal/secret"
)

// Memory is an in-memory Store for tests only. Memory obeys the contract, and its hooks inject
// failures.
type Memory struct {
	mu   sync.Mutex
	keys map[keystore.Ref]*memoryKey

	// BeforeSign, if not nil, runs before each signature. Sign returns the error of BeforeSign.
	BeforeSign func(ref keystore.Ref, message []byte) error
	// BeforeExchange, if not nil, runs before each shared secret, also before a refused one.
	BeforeExchange func(ref keystore.Ref)
	// BeforeGenerate, if not nil, runs before a key is made, for example to imitate a slow device.
	// Generate returns the error of BeforeGenerate.
	BeforeGenerate func(ref keystore.Ref) error
	// Corrupt, if not nil, may change a signature, as a faulty device would.
	Corrupt func(signature []byte) []byte
}

type memoryKey struct {
	store *Memory
	info  keystore.Info
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

func (m *Memory) Keys(context.Context) ([]keystore.Ref, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Keys(m.keys)), nil
}

func (m *Memory) Compare(ctx context.Context, infos []keystore.Info) ([]error, error) {
	return keystore.CompareEach(ctx, m.Key, infos)
}

func (m *Memory) Bind(info keystore.Info) keystore.Key { return bound{m, info} }

func (m *Memory) Inspect(context.Context, bool) ([]keystore.Finding, error) {
	return []keystore.Finding{{What: "memory", OK: true, Text: "keys in memory, for tests"}}, nil
}

func (m *Memory) Generate(
	_ context.Context, ref keystore.Ref, alg keystore.Algorithm, tag keystore.Tag,
) (keystore.Key, error) {
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
	k.tell()
	k.info = keystore.Info{Ref: ref, Algorithm: alg, PublicKey: public, Custody: "memory", Tag: tag,
		Provenance: keystore.Provenance{Local: true, AlwaysSensitive: true, NeverExtractable: true}}
	return m.add(k)
}

func (m *Memory) Import(_ context.Context, ref keystore.Ref, path string, tag keystore.Tag) (keystore.Key, error) {
	seed, err := keystore.ReadSeed(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", keystore.ErrRefused, err)
	}
	return m.importSeed(ref, keystore.Ed25519, seed, tag, "memory")
}

// Seal and Open make m an escrow.Store.
func (m *Memory) Seal(
	_ context.Context, ref keystore.Ref, alg keystore.Algorithm, tag keystore.Tag, to escrow.Set,
) (k keystore.Key, envelope []byte, err error) {
	if m.BeforeGenerate != nil {
		if err := m.BeforeGenerate(ref); err != nil {
			return nil, nil, err
		}
	}
	seed := secret.New(make([]byte, ed25519.SeedSize))
	if err := escrow.NewSeed(alg, seed); err != nil {
		return nil, nil, err
	}
	if envelope, err = escrow.Seal(ref, alg, seed, to); err == nil {
		k, err = m.importSeed(ref, alg, seed, tag, keystore.HSMRecoverable)
	}
	return k, envelope, err
}

func (m *Memory) Open(
	_ context.Context, tag keystore.Tag, envelope []byte, shares []string,
) (keystore.Key, error) {
	e, err := escrow.ParseEnvelope(envelope)
	if err != nil {
		return nil, err
	}
	seed, err := escrow.Open(envelope, shares)
	if err != nil {
		return nil, err
	}
	return m.importSeed(e.Key, e.Algorithm, seed, tag, keystore.HSMRecoverable)
}

// Sealing is a guarded Memory that makes recoverable keys, as a pool of key workers does.
type Sealing struct {
	keystore.Store
	Memory *Memory
}

// Seal makes a recoverable key.
func (s Sealing) Seal(
	ctx context.Context, ref keystore.Ref, alg keystore.Algorithm, tag keystore.Tag, to escrow.Set,
) (keystore.Key, []byte, error) {
	k, envelope, err := s.Memory.Seal(ctx, ref, alg, tag, to)
	if err != nil {
		return nil, nil, err
	}
	return s.Bind(k.Info()), envelope, nil
}

// Open makes the key of an envelope again.
func (s Sealing) Open(
	ctx context.Context, tag keystore.Tag, envelope []byte, shares []string,
) (keystore.Key, error) {
	return s.Memory.Open(ctx, tag, envelope, shares)
}

func (m *Memory) importSeed(
	ref keystore.Ref, alg keystore.Algorithm, seed secret.Bytes, tag keystore.Tag, custody keystore.Custody,
) (keystore.Key, error) {
	k, err := &memoryKey{}, error(nil)
	info := keystore.Info{Ref: ref, Algorithm: alg, Custody: custody, Tag: tag}
	switch alg {
	case keystore.Ed25519:
		k.sign = ed25519.NewKeyFromSeed(seed.Expose())
		info.PublicKey = []byte(k.sign.Public().(ed25519.PublicKey))
	case keystore.P256:
		if k.ecdsa, err = ecdsa.ParseRawPrivateKey(elliptic.P256(), seed.Expose()); err == nil {
			info.PublicKey, err = k.ecdsa.PublicKey.Bytes()
		}
	case keystore.X25519:
		if k.dh, err = ecdh.X25519().NewPrivateKey(seed.Expose()); err == nil {
			info.PublicKey = k.dh.PublicKey().Bytes()
		}
	}
	if err != nil {
		return nil, err
	}
	k.info = info
	k.tell()
	return m.add(k)
}

// tell has the outputs of the tests searched for the private key.
func (k *memoryKey) tell() {
	switch {
	case k.sign != nil:
		scantest.Secret("the seed of a key", k.sign.Seed())
	case k.dh != nil:
		scantest.Secret("the private key of an X25519 key", k.dh.Bytes())
	case k.ecdsa != nil:
		if d, err := k.ecdsa.Bytes(); err == nil {
			scantest.Secret("the private key of a P-256 key", d)
		}
	}
}

func (m *Memory) add(k *memoryKey) (keystore.Key, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.keys[k.info.Ref]; ok {
		return nil, fmt.Errorf("%v: %w", k.info.Ref, keystore.ErrExists)
	}
	k.store = m
	m.keys[k.info.Ref] = k
	return k, nil
}

// bound is a key known by its description only. Each use looks the key up.
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
	if k := m.keys[ref]; k != nil && k.info.Tag == tag {
		delete(m.keys, ref)
	}
	return nil
}

// Remove deletes a key without a tag, as a person with the token in hand could.
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
	if pubkey.LowOrder(peer) {
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

// usable gives an error for an ended ctx and for a key deleted from the store.
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
