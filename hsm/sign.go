package hsm

import (
	"context"
	"crypto/sha256"
	"encoding/asn1"
	"fmt"
	"math/big"
	"slices"

	"countersign/internal/keystore"

	"github.com/miekg/pkcs11"
)

// maxBatch is the limit of signatures made in one call from Go to C.
const maxBatch = 16

// signatureSize is the length of an Ed25519 signature (RFC 8032) and of r || s on P-256 (PKCS#11
// v2.40 section 2.3.1), in bytes.
const signatureSize = 64

// signing is a signature to be made.
type signing struct {
	mechanism uint
	input     []byte // the data for C_Sign: a message, or a digest for ECDSA
	handle    *handle
	signature [signatureSize]byte
}

func newSigning(alg keystore.Algorithm, message []byte) *signing {
	if alg == keystore.Ed25519 {
		return &signing{mechanism: ckmEdDSA, input: message}
	}
	digest := sha256.Sum256(message)
	return &signing{mechanism: pkcs11.CKM_ECDSA, input: digest[:]}
}

// encoded returns the signature in the encoding of keystore.Key.Sign.
func (g *signing) encoded() ([]byte, error) {
	if g.mechanism == ckmEdDSA {
		return g.signature[:], nil
	}
	r, s := new(big.Int).SetBytes(g.signature[:32]), new(big.Int).SetBytes(g.signature[32:])
	return asn1.Marshal(struct{ R, S *big.Int }{r, s})
}

func (k *key) Sign(ctx context.Context, message []byte, judge keystore.Judge) ([]byte, error) {
	if k.info.Algorithm == keystore.X25519 {
		return nil, fmt.Errorf("hsm: %v: %w: it is not a signing key", k.info.Ref, keystore.ErrRefused)
	}
	g := newSigning(k.info.Algorithm, message)
	err := k.use(ctx, "sign", func(s session, h *handle) error {
		g.handle = h
		return k.store.direct.sign(s.handle, []*signing{g})
	})
	if err != nil {
		return nil, err
	}
	signature, err := g.encoded()
	if err == nil && !judge.Accepts(signature) {
		return nil, fmt.Errorf("hsm: sign with %v: %w", k.info.Ref, keystore.ErrWrong)
	}
	return signature, err
}

// SignBatch makes all signatures in one session, 16 (maxBatch) in each call from Go to C. After any
// failure each signature is made by itself, so one signature's error is not reported for another.
func (st *Store) SignBatch(ctx context.Context, batch []*keystore.Signing) {
	logins := st.logins.Load()
	signings := make([]*signing, 0, len(batch))
	for _, b := range batch {
		k, ok := b.Key.(*key)
		if !ok || k.store != st || k.info.Algorithm == keystore.X25519 {
			break
		}
		g := newSigning(k.info.Algorithm, b.Message)
		if g.handle = k.handle(logins); g.handle == nil {
			break
		}
		signings = append(signings, g)
	}
	if len(batch) > 1 && len(signings) == len(batch) && st.signAll(ctx, logins, signings) == nil {
		for i, b := range batch {
			b.Signature, b.Err = signings[i].encoded()
		}
		return
	}
	for _, b := range batch {
		b.Signature, b.Err = b.Key.Sign(ctx, b.Message, nil)
	}
}

// signAll makes signatures with handles of the given login.
func (st *Store) signAll(ctx context.Context, logins uint64, all []*signing) error {
	return st.withSessionOnce(ctx, func(s session) error {
		if st.logins.Load() != logins {
			return errNewLogin
		}
		for part := range slices.Chunk(all, maxBatch) {
			if err := st.direct.sign(s.handle, part); err != nil {
				return err
			}
		}
		return nil
	})
}
