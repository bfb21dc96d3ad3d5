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
	"strings"

	"countersign/internal/keystore"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// Approval is a state of the machine that whoever signs its updates has approved: a key that is sealed to that signer can
// be used in it, without having been sealed anew (TPM2_PolicyAuthorize, TPM 2.0 Part 3, section 23.16).
type Approval struct {
	PCRs      []pcr  `json:"pcrs"`
	Signature []byte `json:"signature"` // ECDSA over SHA-256 of the policy's digest, ASN.1 DER
}

// approvalEnd is how the names of the files in the folder end that hold approvals.
const approvalEnd = ".approval.json"

// Approve signs a state, given as the SHA-256 bank's registers by index.
func Approve(key crypto.Signer, registers map[uint][]byte) (a Approval, err error) {
	for index := uint(0); index < 24; index++ {
		if value, ok := registers[index]; ok {
			if len(value) != sha256.Size {
				return a, fmt.Errorf("tpm: PCR %d has %d bytes, and not %d", index, len(value), sha256.Size)
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
	digest, err := a.digest()
	if err != nil {
		return a, err
	}
	a.Signature, err = key.Sign(rand.Reader, digest, crypto.SHA256)
	return a, err
}

// policy is the digest of the policy that is approved.
func (a Approval) policy() (tpm2.TPM2BDigest, error) { return sealed{PCRs: a.PCRs}.policy() }

// digest is what gets signed: the policy's digest and an empty qualifier, hashed.
func (a Approval) digest() ([]byte, error) {
	policy, err := a.policy()
	if err != nil {
		return nil, err
	}
	h := sha256.Sum256(policy.Buffer)
	return h[:], nil
}

// ReadPolicyKey reads the public key of whoever approves states: PEM, as openssl pkey -pubout writes it.
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

// approverOf is the approver's key as the TPM knows it.
func approverOf(point []byte) tpm2.TPMTPublic {
	public := signingKey
	public.ObjectAttributes = tpm2.TPMAObject{UserWithAuth: true, SignEncrypt: true}
	public.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]},
	})
	return public
}

// approvals reads the approvals in the folder. One that is damaged is no approval.
func (f folder) approvals() (all []Approval) {
	files, _ := filepath.Glob(filepath.Join(string(f), "*"+approvalEnd))
	for _, path := range files {
		var a Approval
		if b, err := os.ReadFile(path); err == nil && json.Unmarshal(b, &a) == nil {
			all = append(all, a)
		}
	}
	return all
}

// authorize puts the approver's word in the place of the registers' policy, in a session that has just shown them.
func (d sealed) authorize(t transport.TPM, session tpm2.TPMHandle) error {
	var indices []uint
	for _, p := range d.PCRs {
		indices = append(indices, p.Index)
	}
	now, err := readPCRs(t, indices)
	if err != nil {
		return err
	}
	approval := Approval{}
	for _, a := range d.approvals {
		if bytes.Equal(tpm2.Marshal(selection(a.PCRs)), tpm2.Marshal(selection(now))) && bytes.Equal(digestOf(a.PCRs), digestOf(now)) {
			approval = a
		}
	}
	if approval.PCRs == nil {
		var are []string
		for _, p := range now {
			are = append(are, fmt.Sprintf("PCR %d (%s) is %x", p.Index, measures[p.Index], p.Value))
		}
		return fmt.Errorf("tpm: %w: none of the %d approvals in the folder is for it: %s; have it approved (countersignd approve-state), or find out why it is another",
			keystore.ErrSealed, len(d.approvals), strings.Join(are, ", "))
	}
	policy, err := approval.policy()
	if err != nil {
		return err
	}
	digest, err := approval.digest()
	if err != nil {
		return err
	}
	var rs struct{ R, S *big.Int }
	if rest, err := asn1.Unmarshal(approval.Signature, &rs); err != nil || len(rest) > 0 || rs.R.Sign() <= 0 || rs.S.Sign() <= 0 || rs.R.BitLen() > 256 || rs.S.BitLen() > 256 {
		return fmt.Errorf("tpm: %w: the approval's signature is damaged", keystore.ErrSealed)
	}
	external, err := tpm2.LoadExternal{InPublic: tpm2.New2B(approverOf(d.Approver)), Hierarchy: tpm2.TPMRHOwner}.Execute(t)
	if err != nil {
		return deviceError("TPM2_LoadExternal", err)
	}
	defer flush(t, external.ObjectHandle)
	verified, err := tpm2.VerifySignature{
		KeyHandle: tpm2.NamedHandle{Handle: external.ObjectHandle, Name: external.Name}, Digest: tpm2.TPM2BDigest{Buffer: digest},
		Signature: tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
			Hash: tpm2.TPMAlgSHA256, SignatureR: tpm2.TPM2BECCParameter{Buffer: rs.R.FillBytes(make([]byte, 32))},
			SignatureS: tpm2.TPM2BECCParameter{Buffer: rs.S.FillBytes(make([]byte, 32))},
		})},
	}.Execute(t)
	if err != nil {
		return fmt.Errorf("tpm: %w: the approval of this state is not signed by policy_key: %v", keystore.ErrSealed, err)
	}
	_, err = tpm2.PolicyAuthorize{PolicySession: session, ApprovedPolicy: policy, KeySign: external.Name, CheckTicket: verified.Validation}.Execute(t)
	if err != nil {
		return deviceError("TPM2_PolicyAuthorize", err)
	}
	return nil
}
