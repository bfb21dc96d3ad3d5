package tpm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"countersign/internal/keystore"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// Quote is what a TPM says of its registers, signed by a key that signs nothing else.
type Quote struct {
	Attested  []byte `json:"attested"`   // TPMS_ATTEST: the nonce, the registers and their digest (TPM 2.0 Part 2, section 10.12.12)
	Signature []byte `json:"signature"`  // ECDSA over SHA-256 of Attested, ASN.1 DER
	PublicKey []byte `json:"public_key"` // of the attestation key: 65 bytes, an uncompressed point on P-256
}

// attestationFile has the attestation key as it rests.
const attestationFile = "attestation.json"

// Quote has the TPM sign the registers of bank SHA-256 together with the caller's nonce of at most 32 bytes. The
// attestation key is made at the first quote; it is restricted: the TPM signs only its own statements with it.
func (s *Store) Quote(ctx context.Context, pcrs []uint, nonce []byte) (q Quote, err error) {
	if len(nonce) > 32 {
		return q, fmt.Errorf("tpm: quote: %w: a nonce has at most 32 bytes", keystore.ErrRefused)
	}
	s.making.Lock()
	defer s.making.Unlock()
	err = s.bus.use(ctx, func(t transport.TPM) error {
		key, err := s.attestationKey(t)
		if err != nil {
			return err
		}
		if q.PublicKey, err = pointOf(key.Public); err != nil {
			return fmt.Errorf("tpm: quote: %w: %w", keystore.ErrUnfit, err)
		}
		return loaded(t, s.srk, key, func(handle tpm2.TPMHandle, name tpm2.TPM2BName) error {
			got, err := tpm2.Quote{
				SignHandle:     tpm2.AuthHandle{Handle: handle, Name: name, Auth: tpm2.HMAC(tpm2.TPMAlgSHA256, 16, s.srk.salted())},
				QualifyingData: tpm2.TPM2BData{Buffer: nonce}, InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull}, PCRSelect: selectionOf(pcrs),
			}.Execute(t)
			if err != nil {
				return deviceError("TPM2_Quote", err)
			}
			q.Attested = got.Quoted.Bytes()
			q.Signature, err = signatureOf(got.Signature)
			return err
		})
	})
	return q, err
}

// attestationKey reads the attestation key, and makes it where there is none.
func (s *Store) attestationKey(t transport.TPM) (key sealed, err error) {
	b, err := os.ReadFile(filepath.Join(string(s.folder), attestationFile))
	if err == nil {
		if err := json.Unmarshal(b, &key); err != nil {
			return key, fmt.Errorf("tpm: %w: %s is damaged", keystore.ErrUnfit, attestationFile)
		}
		return key, nil
	} else if !errors.Is(err, os.ErrNotExist) {
		return key, fmt.Errorf("tpm: %w: %w", keystore.ErrUnavailable, err)
	}
	public := signingKey
	public.ObjectAttributes.Restricted, public.ObjectAttributes.UserWithAuth, public.ObjectAttributes.NoDA = true, true, true
	made, err := tpm2.Create{
		ParentHandle: s.srk.object(), InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{}}, InPublic: tpm2.New2B(public),
	}.Execute(t)
	if err != nil {
		return key, deviceError("TPM2_Create", err)
	}
	key = sealed{Public: made.OutPublic.Bytes(), Private: made.OutPrivate.Buffer}
	return key, s.folder.write(attestationFile, key)
}
