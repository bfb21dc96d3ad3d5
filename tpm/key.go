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

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// record is a key as it rests in the folder, in a file named as the key.
type record struct {
	Format int           `json:"format"`
	Info   keystore.Info `json:"info"`
	Sealed sealed        `json:"sealed"`
}

const recordEnd = ".key.json"

func fileOf(ref keystore.Ref) string { return strings.ReplaceAll(ref.String(), "/", ".") + recordEnd }

// content is what a seal holds: the seed behind all that its record says, so that a record can't be given another name, or
// an imported key be called a generated one.
//
//	u8 1 || SHA-256 of algorithm, reference, tag, provenance (32) || seed (32)
func content(info keystore.Info, seed []byte) []byte {
	p := info.Provenance
	bound := sha256.Sum256(fmt.Appendf(nil, "countersign tpm seal\x00%s\x00%s\x00%x\x00%t %t %t", info.Algorithm, info.Ref, info.Tag, p.Local, p.AlwaysSensitive, p.NeverExtractable))
	return append(append([]byte{1}, bound[:]...), seed...)
}

// open returns the seed of a seal that belongs to this record.
func (r record) open(data []byte) (seed []byte, err error) {
	if len(data) != 1+sha256.Size+32 || !bytes.Equal(data[:1+sha256.Size], content(r.Info, nil)) {
		return nil, fmt.Errorf("%v: %w: its record was changed, or is another key's", r.Info.Ref, keystore.ErrUnfit)
	}
	return data[1+sha256.Size:], nil
}

// read returns the record of a reference.
func (f folder) read(ref keystore.Ref) (r record, err error) {
	b, err := os.ReadFile(filepath.Join(string(f), fileOf(ref)))
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
		r.Sealed.approvals = f.approvals()
	}
	return r, nil
}

// key is a keystore.Key; the store has its seed, the folder its record.
type key struct {
	store *Store
	info  keystore.Info
}

func (k *key) Info() keystore.Info                    { return k.info }
func (s *Store) Bind(info keystore.Info) keystore.Key { return &key{s, info} }

// record returns the record that belongs to this key.
func (k *key) record() (record, error) {
	r, err := k.store.folder.read(k.info.Ref)
	if err == nil && (r.Info.Tag != k.info.Tag || r.Info.Algorithm != k.info.Algorithm || !bytes.Equal(r.Info.PublicKey, k.info.PublicKey)) {
		err = fmt.Errorf("%v: %w: the folder has another key under this name now", k.info.Ref, keystore.ErrUnfit)
	}
	return r, err
}

func (k *key) Sign(ctx context.Context, message []byte, judge keystore.Judge) (signature []byte, err error) {
	switch k.info.Algorithm {
	case keystore.Ed25519:
		u, release, err := k.store.seed(ctx, k)
		if err != nil {
			return nil, err
		}
		signature = make([]byte, ed25519.SignatureSize)
		quickly(func() { eddsa.Sign(signature, u.key, u.info.PublicKey, message) })
		release()
	case keystore.P256:
		if signature, err = k.signInside(ctx, message); err != nil {
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

// signInside has the TPM sign.
func (k *key) signInside(ctx context.Context, message []byte) (signature []byte, err error) {
	r, err := k.record()
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256(message)
	err = k.store.withPIN(ctx, r.Sealed.PIN, func(pin []byte) error {
		return k.store.bus.use(ctx, func(t transport.TPM) (err error) {
			do := quickly
			if pin != nil { // it comes into what go-tpm computes on the heap
				do = secretly
			}
			do(func() { signature, err = sign(t, k.store.srk, r.Sealed, pin, digest[:]) })
			return explain(t, r.Sealed, err)
		})
	})
	return signature, err
}

func (k *key) Exchange(ctx context.Context, peer [32]byte) (shared [32]byte, err error) {
	if k.info.Algorithm != keystore.X25519 {
		return shared, fmt.Errorf("tpm: %v: %w: it is not an exchange key", k.info.Ref, keystore.ErrRefused)
	}
	if keystore.LowOrder(peer) {
		return shared, keystore.ErrPeerKey
	}
	u, release, err := k.store.seed(ctx, k)
	if err != nil {
		return shared, err
	}
	defer release()
	secretly(func() {
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

// proves holds the seed against the public key.
func (u *unsealed) proves() bool {
	if u.info.Algorithm == keystore.Ed25519 {
		var public [ed25519.PublicKeySize]byte
		eddsa.Public(public[:], u.key)
		return bytes.Equal(public[:], u.info.PublicKey)
	}
	own, err := ecdh.X25519().NewPrivateKey(u.key[:32])
	return err == nil && bytes.Equal(own.PublicKey().Bytes(), u.info.PublicKey)
}

func (s *Store) Key(ctx context.Context, ref keystore.Ref) (keystore.Key, error) {
	r, err := s.folder.read(ref)
	if err != nil {
		return nil, err
	}
	k := &key{s, r.Info}
	if r.Info.Algorithm == keystore.P256 {
		return k, nil
	}
	_, release, err := s.seed(ctx, k) // the record is believed when its seal has been opened
	if err != nil {
		return nil, err
	}
	release()
	return k, nil
}

func (s *Store) Keys(context.Context) (infos []keystore.Info, err error) {
	files, err := os.ReadDir(string(s.folder))
	if err != nil {
		return nil, fmt.Errorf("tpm: %w: %w", keystore.ErrUnavailable, err)
	}
	for _, file := range files {
		name, ok := strings.CutSuffix(file.Name(), recordEnd)
		if !ok {
			continue
		}
		ref, err := keystore.ParseRef(strings.ReplaceAll(name, ".", "/"))
		if err != nil {
			continue
		}
		if r, err := s.folder.read(ref); err == nil {
			infos = append(infos, r.Info)
		} else if errors.Is(err, keystore.ErrUnavailable) {
			return nil, err
		}
	}
	return infos, nil
}

func (s *Store) Generate(ctx context.Context, ref keystore.Ref, alg keystore.Algorithm, tag keystore.Tag) (keystore.Key, error) {
	info := keystore.Info{Ref: ref, Algorithm: alg, Tag: tag, Custody: keystore.TPMSealed, Provenance: keystore.Provenance{Local: true, AlwaysSensitive: true, NeverExtractable: true}}
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
	defer clear(seed[:])
	return s.create(ctx, "import", keystore.Info{Ref: ref, Algorithm: keystore.Ed25519, Tag: tag, Custody: keystore.TPMSealed},
		func(transport.TPM, pinned) ([32]byte, error) { return seed, nil })
}

// create makes a key, proves it by using it, and then writes it down: what is in the folder is whole. seed is nil for a key
// that the TPM makes itself.
func (s *Store) create(ctx context.Context, doing string, info keystore.Info, seed func(transport.TPM, pinned) ([32]byte, error)) (keystore.Key, error) {
	fail := func(err error) (keystore.Key, error) {
		return nil, fmt.Errorf("tpm: %s %v: %w", doing, info.Ref, err)
	}
	if err := keystore.CheckName(info.Ref.Name); err != nil {
		return fail(err)
	}
	s.making.Lock()
	defer s.making.Unlock()
	if _, err := os.Lstat(filepath.Join(string(s.folder), fileOf(info.Ref))); err == nil {
		return fail(keystore.ErrExists)
	} else if !errors.Is(err, os.ErrNotExist) {
		return fail(fmt.Errorf("%w: %w", keystore.ErrUnavailable, err))
	}
	r := record{Format: 1, Info: info}
	err := s.withPIN(ctx, s.config.PINFile != "", func(pin []byte) error {
		return s.bus.use(ctx, func(t transport.TPM) (err error) {
			secretly(func() { err = s.make(t, &r, pin, seed) })
			return err
		})
	})
	if err != nil {
		return fail(err)
	}
	if err := s.folder.write(fileOf(info.Ref), r); err != nil {
		return fail(fmt.Errorf("%w: %w", keystore.ErrUnavailable, err))
	}
	return &key{s, r.Info}, nil
}

// make has the TPM make the object of a record, and uses it once as it will be used.
func (s *Store) make(t transport.TPM, r *record, pin []byte, seed func(transport.TPM, pinned) ([32]byte, error)) (err error) {
	if seed == nil {
		if r.Sealed, err = create(t, s.srk, s.like(), pin, nil); err != nil {
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
	data := content(r.Info, raw[:])
	defer clear(data)
	if r.Sealed, err = create(t, s.srk, s.like(), pin, data); err != nil {
		return err
	}
	back, err := unseal(t, s.srk, r.Sealed, pin)
	if err != nil {
		return err
	}
	defer clear(back)
	if !bytes.Equal(back, data) {
		return fmt.Errorf("%w: the TPM gives back something else than it was given", keystore.ErrUnfit)
	}
	return nil
}

// like says what new objects are sealed to.
func (s *Store) like() sealed {
	d := sealed{Approver: s.approver, approvals: s.folder.approvals()}
	for _, index := range s.config.PCRs {
		d.PCRs = append(d.PCRs, pcr{Index: index})
	}
	return d
}

// pointOf returns the public key of a P-256 object, as an uncompressed point.
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
	s.making.Lock()
	defer s.making.Unlock()
	r, err := s.folder.read(ref)
	if err == nil && r.Info.Tag == tag {
		if err = os.Remove(filepath.Join(string(s.folder), fileOf(ref))); err == nil || errors.Is(err, os.ErrNotExist) {
			err = s.folder.sync()
		}
	}
	if err != nil && !errors.Is(err, keystore.ErrNotFound) {
		return fmt.Errorf("tpm: destroy %v: %w", ref, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if u := s.seeds[tag]; u != nil {
		clear(u.key)
		delete(s.seeds, tag)
	}
	return nil
}
