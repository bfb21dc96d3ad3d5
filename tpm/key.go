package tpm

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"

	"countersign/internal/eddsa"
	"countersign/internal/keystore"
	"countersign/internal/pubkey"
	"countersign/internal/secret"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// record is the stored form of a key: a file of the state directory, named after the key.
type record struct {
	Format int           `json:"format"`
	Info   keystore.Info `json:"info"`
	Sealed sealed        `json:"sealed"`
}

const recordSuffix = ".key.json"

func fileOf(ref keystore.Ref) string {
	return strings.ReplaceAll(ref.String(), "/", ".") + recordSuffix
}

// sealContent returns the content of a seal: a digest of the record and the seed. The digest keeps
// an attacker from renaming a record, and from presenting an imported key as a generated one.
//
//	u8 1 || SHA-256 of algorithm, reference, tag, provenance (32) || seed (32)
func sealContent(info keystore.Info, seed []byte) []byte {
	p := info.Provenance
	digest := sha256.Sum256(fmt.Appendf(nil, "countersign tpm seal\x00%s\x00%s\x00%x\x00%t %t %t",
		info.Algorithm, info.Ref, info.Tag, p.Local, p.AlwaysSensitive, p.NeverExtractable))
	return append(append([]byte{1}, digest[:]...), seed...)
}

// openSeal returns the seed in the content of a seal, if the seal belongs to this record.
func (r record) openSeal(data []byte) (seed []byte, err error) {
	if len(data) != 1+sha256.Size+32 || !bytes.Equal(data[:1+sha256.Size], sealContent(r.Info, nil)) {
		return nil, fmt.Errorf("%v: %w: the record was changed after sealing, or belongs to another key",
			r.Info.Ref, keystore.ErrUnfit)
	}
	return data[1+sha256.Size:], nil
}

// read returns the record of a key. A record with an approver comes with the present approvals.
func (d stateDir) read(ref keystore.Ref) (r record, err error) {
	b, err := os.ReadFile(filepath.Join(string(d), fileOf(ref)))
	if errors.Is(err, os.ErrNotExist) {
		return r, fmt.Errorf("%v: %w", ref, keystore.ErrNotFound)
	} else if err != nil {
		return r, fmt.Errorf("tpm: %w: %w", keystore.ErrUnavailable, err)
	}
	if err := json.Unmarshal(b, &r); err != nil || r.Format != 1 || r.Info.Ref != ref {
		return r, fmt.Errorf("%v: %w: the file %s is damaged or another key's", ref, keystore.ErrUnfit, fileOf(ref))
	}
	if r.Sealed.Approver != nil {
		if len(r.Sealed.Approver) != 65 {
			return r, fmt.Errorf("%v: %w: the file %s is damaged", ref, keystore.ErrUnfit, fileOf(ref))
		}
		r.Sealed.approvals = d.approvals()
	}
	return r, nil
}

// key is a keystore.Key. The store caches the key's unsealed seed; the state directory has the
// record.
type key struct {
	store *Store
	info  keystore.Info
}

func (k *key) Info() keystore.Info                    { return k.info }
func (s *Store) Bind(info keystore.Info) keystore.Key { return &key{s, info} }

// is reports that the unsealed key is that of a description. Another name for the same tag has not
// been compared with the seal.
func (u *unsealed) is(info keystore.Info) bool {
	return u.info.Ref == info.Ref && u.info.Algorithm == info.Algorithm && bytes.Equal(u.info.PublicKey, info.PublicKey)
}

// record returns the key's record, and an error if the record describes another key.
func (k *key) record() (record, error) {
	r, err := k.store.dir.read(k.info.Ref)
	if err != nil {
		return r, err
	}
	same := r.Info.Tag == k.info.Tag && r.Info.Algorithm == k.info.Algorithm
	if !same || !bytes.Equal(r.Info.PublicKey, k.info.PublicKey) {
		return r, fmt.Errorf("%v: %w: the folder has another key under this name now", k.info.Ref, keystore.ErrUnfit)
	}
	return r, nil
}

func (k *key) Sign(ctx context.Context, message []byte, judge keystore.Judge) (signature []byte, err error) {
	switch k.info.Algorithm {
	case keystore.Ed25519:
		u, release, err := k.store.seed(ctx, k)
		if err != nil {
			return nil, err
		}
		signature = make([]byte, ed25519.SignatureSize)
		secret.DoNoHeap(func() { eddsa.Sign(signature, u.key, u.info.PublicKey, message) })
		release()
	case keystore.P256:
		if signature, err = k.signResident(ctx, message); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("tpm: %v: %w: it is not a signing key", k.info.Ref, keystore.ErrRefused)
	}
	if !judge.Accepts(signature) {
		return nil, fmt.Errorf("tpm: sign with %v: %w", k.info.Ref, keystore.ErrWrong)
	}
	return signature, nil
}

// signResident has the TPM sign with a resident key.
func (k *key) signResident(ctx context.Context, message []byte) (signature []byte, err error) {
	r, err := k.record()
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256(message)
	err = k.store.withPIN(ctx, r.Sealed.PIN, func(pin secret.Bytes) error {
		return k.store.bus.use(ctx, func(t transport.TPM) (err error) {
			do := secret.DoNoHeap
			if !pin.Empty() { // go-tpm copies the PIN to the heap
				do = secret.Do
			}
			do(func() { signature, err = sign(t, k.store.srk, r.Sealed, pin, digest[:]) })
			return explainPolicy(t, r.Sealed, err)
		})
	})
	return signature, err
}

func (k *key) Exchange(ctx context.Context, peer [32]byte) (shared [32]byte, err error) {
	if k.info.Algorithm != keystore.X25519 {
		return shared, fmt.Errorf("tpm: %v: %w: it is not an exchange key", k.info.Ref, keystore.ErrRefused)
	}
	if pubkey.LowOrder(peer) {
		return shared, keystore.ErrPeerKey
	}
	u, release, err := k.store.seed(ctx, k)
	if err != nil {
		return shared, err
	}
	defer release()
	secret.Do(func() {
		var own *ecdh.PrivateKey
		var theirs *ecdh.PublicKey
		if own, err = ecdh.X25519().NewPrivateKey(u.key[:32]); err != nil {
			return
		}
		if theirs, err = ecdh.X25519().NewPublicKey(peer[:]); err != nil {
			return
		}
		var secret []byte
		if secret, err = own.ECDH(theirs); err == nil {
			copy(shared[:], secret)
			clear(secret)
		}
	})
	if err != nil {
		return [32]byte{}, fmt.Errorf("tpm: exchange with %v: %w: %w", k.info.Ref, keystore.ErrRefused, err)
	}
	return shared, nil
}

// matchesPublicKey reports whether the seed has the public key of the record.
func (u *unsealed) matchesPublicKey() bool {
	if u.info.Algorithm == keystore.Ed25519 {
		var public [ed25519.PublicKeySize]byte
		eddsa.Public(public[:], u.key)
		return bytes.Equal(public[:], u.info.PublicKey)
	}
	own, err := ecdh.X25519().NewPrivateKey(u.key[:32])
	return err == nil && bytes.Equal(own.PublicKey().Bytes(), u.info.PublicKey)
}

func (s *Store) Key(ctx context.Context, ref keystore.Ref) (keystore.Key, error) {
	r, err := s.dir.read(ref)
	if err != nil {
		return nil, err
	}
	k := &key{s, r.Info}
	if r.Info.Algorithm == keystore.P256 {
		return k, nil
	}
	_, release, err := s.seed(ctx, k) // opening the seal authenticates the record
	if err != nil {
		return nil, err
	}
	release()
	return k, nil
}

// Compare opens the seals of sealed keys.
func (s *Store) Compare(ctx context.Context, infos []keystore.Info) ([]error, error) {
	return keystore.CompareEach(ctx, s.Key, infos)
}

func (s *Store) Keys(context.Context) (refs []keystore.Ref, err error) {
	files, err := os.ReadDir(string(s.dir))
	if err != nil {
		return nil, fmt.Errorf("tpm: %w: %w", keystore.ErrUnavailable, err)
	}
	for _, file := range files {
		name, ok := strings.CutSuffix(file.Name(), recordSuffix)
		if !ok {
			continue
		}
		ref, err := keystore.ParseRef(strings.ReplaceAll(name, ".", "/"))
		if err != nil {
			continue
		}
		if _, err := s.dir.read(ref); err == nil {
			refs = append(refs, ref)
		} else if errors.Is(err, keystore.ErrUnavailable) {
			return nil, err
		}
	}
	return refs, nil
}

// maxRecords is the number of bytes from which on Records leaves files to the next call.
const maxRecords = 256 << 10

// Records returns files of the keys, which only this TPM can use, the file that names the TPM, and
// the approvals of states.
func (s *Store) Records(_ context.Context, after string) (map[string][]byte, error) {
	files, err := os.ReadDir(string(s.dir))
	if err != nil {
		return nil, fmt.Errorf("tpm: %w: %w", keystore.ErrUnavailable, err)
	}
	all, size := map[string][]byte{}, 0
	for _, file := range files { // in the order of their names
		name := file.Name()
		if name <= after || size >= maxRecords {
			continue
		}
		if name != BindingFile && !strings.HasSuffix(name, recordSuffix) && !strings.HasSuffix(name, approvalSuffix) {
			continue
		}
		if all[name], err = os.ReadFile(filepath.Join(string(s.dir), name)); err != nil {
			return nil, fmt.Errorf("tpm: %w: %w", keystore.ErrUnavailable, err)
		}
		size += len(all[name])
	}
	return all, nil
}

func (s *Store) Generate(ctx context.Context, ref keystore.Ref, alg keystore.Algorithm, tag keystore.Tag) (
	keystore.Key, error) {
	info := keystore.Info{
		Ref: ref, Algorithm: alg, Tag: tag, Custody: keystore.TPMSealed,
		Provenance: keystore.Provenance{Local: true, AlwaysSensitive: true, NeverExtractable: true},
	}
	switch alg {
	case keystore.Ed25519, keystore.X25519:
		return s.create(ctx, "generate", info, newSeed)
	case keystore.P256:
		info.Custody = keystore.TPMResident
		return s.create(ctx, "generate", info, nil)
	}
	return nil, fmt.Errorf("tpm: unknown algorithm %q: use one of %v", alg, keystore.Algorithms)
}

func (s *Store) Import(ctx context.Context, ref keystore.Ref, path string, tag keystore.Tag) (keystore.Key, error) {
	seed, err := keystore.ReadSeed(path)
	if err != nil {
		return nil, fmt.Errorf("tpm: import %v: %w: %w", ref, keystore.ErrRefused, err)
	}
	defer seed.Wipe()
	return s.ImportSeed(ctx, ref, keystore.Ed25519, seed, tag)
}

// ImportSeed is Import with a private key in memory, of Ed25519 or X25519. The TPM makes its P-256
// keys itself.
func (s *Store) ImportSeed(
	ctx context.Context, ref keystore.Ref, alg keystore.Algorithm, seed secret.Bytes, tag keystore.Tag,
) (keystore.Key, error) {
	if alg == keystore.P256 {
		return nil, fmt.Errorf("tpm: import %v: %w: a P-256 key never leaves the TPM, so it can have no copy", ref,
			keystore.ErrRefused)
	}
	info := keystore.Info{Ref: ref, Algorithm: alg, Tag: tag, Custody: keystore.TPMSealed}
	return s.create(ctx, "import", info, func(transport.TPM, storageKey) ([32]byte, error) {
		return [32]byte(seed.Expose()), nil
	})
}

// seedSource returns the seed of a new sealed key. A nil seedSource stands for a resident key, made
// by the TPM itself.
type seedSource func(transport.TPM, storageKey) ([32]byte, error)

// create makes a key, proves the key by a use, and then writes the record. So the state directory
// has proven keys only.
func (s *Store) create(ctx context.Context, operation string, info keystore.Info, seed seedSource) (
	keystore.Key, error) {
	fail := func(err error) (keystore.Key, error) {
		return nil, fmt.Errorf("tpm: %s %v: %w", operation, info.Ref, err)
	}
	if err := keystore.CheckName(info.Ref.Name); err != nil {
		return fail(err)
	}
	s.dirMu.Lock()
	defer s.dirMu.Unlock()
	if _, err := os.Lstat(filepath.Join(string(s.dir), fileOf(info.Ref))); err == nil {
		return fail(keystore.ErrExists)
	} else if !errors.Is(err, os.ErrNotExist) {
		return fail(fmt.Errorf("%w: %w", keystore.ErrUnavailable, err))
	}
	r := record{Format: 1, Info: info}
	err := s.withPIN(ctx, s.config.PINFile != "", func(pin secret.Bytes) error {
		return s.bus.use(ctx, func(t transport.TPM) (err error) {
			secret.Do(func() { err = s.make(t, &r, pin, seed) })
			return err
		})
	})
	if err != nil {
		return fail(err)
	}
	if err := s.dir.write(fileOf(info.Ref), r); err != nil {
		return fail(fmt.Errorf("%w: %w", keystore.ErrUnavailable, err))
	}
	return &key{s, r.Info}, nil
}

// make has the TPM make the object of a record, and tests the object by a signature or by an
// unsealing.
func (s *Store) make(t transport.TPM, r *record, pin secret.Bytes, seed seedSource) (err error) {
	if seed == nil {
		if r.Sealed, err = create(t, s.srk, s.sealTemplate(), pin, nil); err != nil {
			return err
		}
		if r.Info.PublicKey, err = pointOf(r.Sealed.Public); err != nil {
			return err
		}
		challenge := []byte("countersign: proof of a new key\x00" + r.Info.Ref.String())
		digest := sha256.Sum256(challenge)
		signature, err := sign(t, s.srk, r.Sealed, pin, digest[:])
		if err != nil {
			return err
		}
		if !r.Info.Verify(challenge, signature) {
			return fmt.Errorf("%w: the key signs wrongly", keystore.ErrUnfit)
		}
		return nil
	}
	raw, err := seed(t, s.srk)
	if err != nil {
		return err
	}
	defer clear(raw[:])
	if r.Info.Algorithm == keystore.Ed25519 {
		var expanded [eddsa.ExpandedSize]byte
		eddsa.Expand(expanded[:], raw[:])
		r.Info.PublicKey = make([]byte, ed25519.PublicKeySize)
		eddsa.Public(r.Info.PublicKey, expanded[:])
		clear(expanded[:])
	} else {
		own, err := ecdh.X25519().NewPrivateKey(raw[:])
		if err != nil {
			return err
		}
		r.Info.PublicKey = bytes.Clone(own.PublicKey().Bytes())
	}
	data := sealContent(r.Info, raw[:])
	defer clear(data)
	if r.Sealed, err = create(t, s.srk, s.sealTemplate(), pin, data); err != nil {
		return err
	}
	back, err := unseal(t, s.srk, r.Sealed, pin)
	if err != nil {
		return err
	}
	defer clear(back)
	if !bytes.Equal(back, data) {
		return fmt.Errorf("%w: the TPM unseals other data than it has sealed", keystore.ErrUnfit)
	}
	return nil
}

// sealTemplate returns the configured policy of new objects: registers without values, and the
// approver.
func (s *Store) sealTemplate() sealed {
	d := sealed{
		Bank: s.config.PCRBank.stored(), Approver: s.approver,
		approvals: s.dir.approvals(), unmeasured: s.config.ZeroPCRs,
	}
	for _, index := range s.config.PCRs {
		d.PCRs = append(d.PCRs, pcr{Index: index})
	}
	return d
}

// pointOf returns the public key of a P-256 object as an uncompressed point of 65 bytes.
func pointOf(public []byte) ([]byte, error) {
	p, err := tpm2.Unmarshal[tpm2.TPMTPublic](public)
	if err != nil {
		return nil, err
	}
	point, err := p.Unique.ECC()
	if err != nil {
		return nil, err
	}
	out := make([]byte, 65)
	out[0] = 4
	new(big.Int).SetBytes(point.X.Buffer).FillBytes(out[1:33])
	new(big.Int).SetBytes(point.Y.Buffer).FillBytes(out[33:])
	return out, nil
}

func (s *Store) Destroy(_ context.Context, ref keystore.Ref, tag keystore.Tag) error {
	s.dirMu.Lock()
	defer s.dirMu.Unlock()
	r, err := s.dir.read(ref)
	if err == nil && r.Info.Tag == tag {
		if err = os.Remove(filepath.Join(string(s.dir), fileOf(ref))); err == nil || errors.Is(err, os.ErrNotExist) {
			err = s.dir.sync()
		}
	}
	if err != nil && !errors.Is(err, keystore.ErrNotFound) {
		return fmt.Errorf("tpm: destroy %v: %w", ref, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.forget(tag)
	}
	return nil
}
