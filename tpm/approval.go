package tpm

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"countersign/internal/keystore"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// Approval is a state of the machine, signed by the signer of the machine's updates. A key sealed
// to the signer is usable in every approved state, without being sealed again
// (TPM2_PolicyAuthorize, TPM 2.0 Part 3, section 23.16).
type Approval struct {
	Bank      Bank   `json:"bank,omitempty"`
	PCRs      []pcr  `json:"pcrs"`
	Signature []byte `json:"signature"` // ECDSA over SHA-256 of the policy's digest, ASN.1 DER
}

// approvalSuffix is the suffix of the names of approval files in the state directory.
const approvalSuffix = ".approval.json"

// Approve signs a state. registers has the values of registers 0 to 23 of a bank by index. key is
// an ECDSA key on P-256.
func Approve(key crypto.Signer, bank Bank, registers map[uint][]byte) (a Approval, err error) {
	return approve(key, bank, registers, nil)
}

// approve signs a state for uses with a policyRef only.
func approve(key crypto.Signer, bank Bank, registers map[uint][]byte, ref []byte) (a Approval, err error) {
	if err := bank.Check(); err != nil {
		return a, fmt.Errorf("tpm: PCR bank: %w", err)
	}
	a.Bank = bank.stored()
	_, size := bank.hash()
	for index := uint(0); index <= lastPCR; index++ {
		if value, ok := registers[index]; ok {
			if len(value) != size {
				return a, fmt.Errorf("tpm: PCR %d has %d bytes, want %d", index, len(value), size)
			}
			a.PCRs = append(a.PCRs, pcr{index, value})
		}
	}
	if len(a.PCRs) != len(registers) || len(a.PCRs) == 0 {
		return a, fmt.Errorf("tpm: a state has one or more of the registers 0 to 23")
	}
	if public, ok := key.Public().(*ecdsa.PublicKey); !ok || public.Curve != elliptic.P256() {
		return a, fmt.Errorf("tpm: the key that approves states must be an ECDSA key on P-256")
	}
	digest, err := a.digest(ref)
	if err != nil {
		return a, err
	}
	random := rand.Reader
	if _, is := key.(*ecdsa.PrivateKey); is {
		random = nil // deterministic (RFC 6979): the same image gets the same bytes
	}
	a.Signature, err = key.Sign(random, digest, crypto.SHA256)
	return a, err
}

// policy returns the digest of the approved policy.
func (a Approval) policy() (tpm2.TPM2BDigest, error) {
	return sealed{Bank: a.Bank, PCRs: a.PCRs}.policy()
}

// digest returns the signed digest: SHA-256 of the policy's digest and the policyRef.
func (a Approval) digest(ref []byte) ([]byte, error) {
	policy, err := a.policy()
	if err != nil {
		return nil, err
	}
	h := sha256.Sum256(slices.Concat(policy.Buffer, ref))
	return h[:], nil
}

// ReadPolicyKey reads the public key of the approver, in PEM as written by openssl pkey -pubout.
// The result is an uncompressed point of 65 bytes.
func ReadPolicyKey(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("tpm: policy_key: %w", err)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fmt.Errorf("tpm: policy_key: %s is not PEM", path)
	}
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	public, ok := key.(*ecdsa.PublicKey)
	if err != nil || !ok || public.Curve != elliptic.P256() {
		return nil, fmt.Errorf("tpm: policy_key: %s is not an ECDSA public key on P-256", path)
	}
	return public.Bytes()
}

// approverOf returns the TPM's public area of an approver's key, from an uncompressed point.
func approverOf(point []byte) tpm2.TPMTPublic {
	public := signingKey
	public.ObjectAttributes = tpm2.TPMAObject{UserWithAuth: true, SignEncrypt: true}
	public.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]},
	})
	return public
}

// approvals reads the approvals in the state directory. Damaged files are skipped.
func (d stateDir) approvals() (all []Approval) {
	files, _ := filepath.Glob(filepath.Join(string(d), "*"+approvalSuffix))
	for _, path := range files {
		var a Approval
		if b, err := os.ReadFile(path); err == nil && json.Unmarshal(b, &a) == nil {
			all = append(all, a)
		}
	}
	return all
}

// authorize replaces PolicyPCR by PolicyAuthorize with the approval of the present state, in a
// policy session right after its PolicyPCR.
func (d sealed) authorize(t transport.TPM, session tpm2.TPMHandle) error {
	now, err := readPCRs(t, d.Bank, indicesOf(d.PCRs))
	if err != nil {
		return err
	}
	approval := Approval{}
	for _, a := range d.approvals {
		sameRegisters := bytes.Equal(tpm2.Marshal(selection(a.Bank, a.PCRs)), tpm2.Marshal(selection(d.Bank, now)))
		if sameRegisters && bytes.Equal(digestOf(a.PCRs), digestOf(now)) {
			approval = a
		}
	}
	if approval.PCRs == nil {
		var values []string
		for _, p := range now {
			values = append(values, fmt.Sprintf("PCR %d (%s) is %x", p.Index, pcrContents[p.Index], p.Value))
		}
		return fmt.Errorf("tpm: %w: none of the %d approvals in the folder is for the present state: %s; "+
			"have the state approved (countersignd approve-state), or find out why it has changed",
			keystore.ErrSealed, len(d.approvals), strings.Join(values, ", "))
	}
	return approval.authorize(t, session, d.Approver, nil)
}

// authorize has the TPM check the approver's signature, and replaces the policy of the session by
// PolicyAuthorize.
func (a Approval) authorize(t transport.TPM, session tpm2.TPMHandle, approver, ref []byte) error {
	policy, err := a.policy()
	if err != nil {
		return err
	}
	digest, err := a.digest(ref)
	if err != nil {
		return err
	}
	var rs struct{ R, S *big.Int }
	inRange := func(n *big.Int) bool { return n.Sign() > 0 && n.BitLen() <= 256 }
	rest, err := asn1.Unmarshal(a.Signature, &rs)
	if err != nil || len(rest) > 0 || !inRange(rs.R) || !inRange(rs.S) {
		return fmt.Errorf("tpm: %w: the approval's signature is damaged", keystore.ErrSealed)
	}
	external, err := tpm2.LoadExternal{
		InPublic: tpm2.New2B(approverOf(approver)), Hierarchy: tpm2.TPMRHOwner,
	}.Execute(t)
	if err != nil {
		return deviceError("TPM2_LoadExternal", err)
	}
	defer flush(t, external.ObjectHandle)
	signature := tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
		Hash:       tpm2.TPMAlgSHA256,
		SignatureR: tpm2.TPM2BECCParameter{Buffer: rs.R.FillBytes(make([]byte, 32))},
		SignatureS: tpm2.TPM2BECCParameter{Buffer: rs.S.FillBytes(make([]byte, 32))},
	})
	verified, err := tpm2.VerifySignature{
		KeyHandle: tpm2.NamedHandle{Handle: external.ObjectHandle, Name: external.Name},
		Digest:    tpm2.TPM2BDigest{Buffer: digest},
		Signature: tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: signature},
	}.Execute(t)
	if err != nil {
		return fmt.Errorf("tpm: %w: the approval of this state is not signed by policy_key: %v",
			keystore.ErrSealed, err)
	}
	_, err = tpm2.PolicyAuthorize{
		PolicySession: session, ApprovedPolicy: policy, PolicyRef: tpm2.TPM2BDigest{Buffer: ref},
		KeySign: external.Name, CheckTicket: verified.Validation,
	}.Execute(t)
	if err != nil {
		return deviceError("TPM2_PolicyAuthorize", err)
	}
	return nil
}
