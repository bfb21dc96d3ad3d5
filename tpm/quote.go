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

// Quote is a TPM's statement about its registers, signed with an attestation key.
type Quote struct {
	// Attested is a TPMS_ATTEST with the nonce, the selection of registers and the digest of their
	// values (TPM 2.0 Part 2, section 10.12.12).
	Attested  []byte `json:"attested"`
	Signature []byte `json:"signature"`  // ECDSA over SHA-256 of Attested, ASN.1 DER
	PublicKey []byte `json:"public_key"` // of the attestation key: an uncompressed point on P-256, 65 bytes
}

// attestationFile is the name of the file with the stored attestation key.
const attestationFile = "attestation.json"

// Quote has the TPM sign one or more registers of the configured bank together with the caller's
// nonce of at most 32 bytes. The first quote makes the attestation key. The attestation key is
// restricted: the TPM signs only statements of its own with such a key.
func (s *Store) Quote(ctx context.Context, pcrs []uint, nonce []byte) (q Quote, err error) {
	if len(nonce) > 32 {
		return q, fmt.Errorf("tpm: quote: %w: the nonce has %d bytes, at most 32 are allowed",
			keystore.ErrRefused, len(nonce))
	}
	err = CheckPCRs(pcrs)
	if len(pcrs) == 0 {
		err = fmt.Errorf("name one or more of the registers 0 to %d", lastPCR)
	}
	if err != nil { // without a connection to the TPM
		return q, fmt.Errorf("tpm: quote: %w: %w", keystore.ErrRefused, err)
	}
	s.dirMu.Lock()
	defer s.dirMu.Unlock()
	err = s.bus.use(ctx, func(t transport.TPM) error {
		if _, err := readPCRs(t, s.config.PCRBank, pcrs); err != nil { // this TPM may lack some
			return err
		}
		key, err := s.attestationKey(t)
		if err != nil {
			return err
		}
		if q.PublicKey, err = pointOf(key.Public); err != nil {
			return fmt.Errorf("tpm: quote: %w: %w", keystore.ErrUnfit, err)
		}
		return withLoaded(t, s.srk, key, func(handle tpm2.TPMHandle, name tpm2.TPM2BName) error {
			got, err := tpm2.Quote{
				SignHandle: tpm2.AuthHandle{
					Handle: handle, Name: name, Auth: s.srk.session(),
				},
				QualifyingData: tpm2.TPM2BData{Buffer: nonce},
				InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
				PCRSelect:      selectionOf(s.config.PCRBank, pcrs),
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

// attestationKey reads the stored attestation key, and makes the key first if necessary.
func (s *Store) attestationKey(t transport.TPM) (key sealed, err error) {
	b, err := os.ReadFile(filepath.Join(string(s.dir), attestationFile))
	if err == nil {
		if err := json.Unmarshal(b, &key); err != nil {
			return key, fmt.Errorf("tpm: %w: %s is damaged", keystore.ErrUnfit, attestationFile)
		}
		return key, nil
	} else if !errors.Is(err, os.ErrNotExist) {
		return key, fmt.Errorf("tpm: %w: %w", keystore.ErrUnavailable, err)
	}
	public := signingKey
	attributes := &public.ObjectAttributes
	attributes.Restricted, attributes.UserWithAuth, attributes.NoDA = true, true, true
	made, err := tpm2.Create{
		ParentHandle: s.srk.object(),
		InSensitive:  tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{}},
		InPublic:     tpm2.New2B(public),
	}.Execute(t)
	if err != nil {
		return key, deviceError("TPM2_Create", err)
	}
	key = sealed{Public: made.OutPublic.Bytes(), Private: made.OutPrivate.Buffer}
	return key, s.dir.write(attestationFile, key)
}
