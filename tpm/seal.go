package tpm

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"

	"countersign/internal/keystore"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// srkHandle is where the storage root key is by convention (TCG TPM v2.0 Provisioning Guidance, section 7.5.1).
const srkHandle tpm2.TPMHandle = 0x81000001

// pinned is the storage root key that the folder belongs to.
type pinned struct {
	name   tpm2.TPM2BName
	public tpm2.TPMTPublic
}

// object is the key as a parent, authorised in a salted session that encrypts the first parameter both ways. The salt
// can be opened by the owner of this very key only, so a device in between learns nothing.
func (p pinned) object() tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: srkHandle, Name: p.name, Auth: tpm2.HMAC(tpm2.TPMAlgSHA256, 16, p.salted(), tpm2.AESEncryption(128, tpm2.EncryptInOut))}
}

func (p pinned) salted() tpm2.AuthOption { return tpm2.Salted(srkHandle, p.public) }

// readSRK reads the storage root key and holds it against the TCG template. The error is a TPM_RC_HANDLE where there is none.
func readSRK(t transport.TPM) (p pinned, err error) {
	r, err := tpm2.ReadPublic{ObjectHandle: srkHandle}.Execute(t)
	if err != nil {
		return p, deviceError("TPM2_ReadPublic", err)
	}
	public, err := r.OutPublic.Contents()
	if err != nil {
		return p, deviceError("TPM2_ReadPublic", err)
	}
	name, err := tpm2.ObjectName(public)
	if err != nil {
		return p, deviceError("TPM2_ReadPublic", err)
	}
	template := *public
	template.Unique = tpm2.ECCSRKTemplate.Unique
	if !bytes.Equal(tpm2.Marshal(template), tpm2.Marshal(tpm2.ECCSRKTemplate)) {
		return p, fmt.Errorf("tpm: %w: the key at %#x is not an ECC P-256 storage root key by the TCG template", keystore.ErrUnfit, uint32(srkHandle))
	}
	return pinned{*name, *public}, nil
}

// makeSRK returns the storage root key, and makes it where there is none.
func makeSRK(t transport.TPM) (pinned, error) {
	p, err := readSRK(t)
	if !errors.Is(err, tpm2.TPMRCHandle) {
		return p, err
	}
	made, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(tpm2.ECCSRKTemplate),
	}.Execute(t)
	if err != nil {
		return p, deviceError("TPM2_CreatePrimary", err)
	}
	defer flush(t, made.ObjectHandle)
	_, err = tpm2.EvictControl{
		Auth:             tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		ObjectHandle:     tpm2.NamedHandle{Handle: made.ObjectHandle, Name: made.Name},
		PersistentHandle: srkHandle,
	}.Execute(t)
	if err != nil {
		return p, deviceError("TPM2_EvictControl", err)
	}
	return readSRK(t)
}

// checkSRK returns the storage root key if it is the one of that name.
func checkSRK(t transport.TPM, name tpm2.TPM2BName) (pinned, error) {
	p, err := readSRK(t)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return p, fmt.Errorf("tpm: %w: the TPM has no storage root key any more: it was cleared, and what was sealed is lost", keystore.ErrUnfit)
	} else if err != nil {
		return p, err
	}
	if !bytes.Equal(p.name.Buffer, name.Buffer) {
		return p, fmt.Errorf("tpm: %w: this folder belongs to another TPM, or to this one before it was cleared: its storage root key was %x and is %x",
			keystore.ErrUnfit, name.Buffer, p.name.Buffer)
	}
	return p, nil
}

// sealed is an object of the TPM as it rests: its two parts, and what it was sealed to.
type sealed struct {
	Public  []byte `json:"public"`  // TPM2B_PUBLIC, content
	Private []byte `json:"private"` // TPM2B_PRIVATE, content: encrypted by the TPM
	PCRs    []pcr  `json:"pcrs"`
	PIN     bool   `json:"pin"`
	// Approver is the public key of whoever approves states of the registers; without one, only the state at sealing counts.
	Approver []byte `json:"approver,omitempty"`

	approvals []Approval // that there are now
}

// policy is the digest that the TPM will hold a use against: PolicyPCR over the registers, or PolicyAuthorize by the approver
// in its place, then PolicyAuthValue where there is a PIN (TPM 2.0 Part 3, sections 23.7, 23.16 and 23.17).
func (d sealed) policy() (digest tpm2.TPM2BDigest, err error) {
	calculator, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err != nil {
		return digest, err
	}
	if d.Approver == nil {
		err = (tpm2.PolicyPCR{Pcrs: selection(d.PCRs), PcrDigest: tpm2.TPM2BDigest{Buffer: digestOf(d.PCRs)}}).Update(calculator)
	} else {
		var name *tpm2.TPM2BName
		approver := approverOf(d.Approver)
		if name, err = tpm2.ObjectName(&approver); err == nil {
			err = (tpm2.PolicyAuthorize{KeySign: *name}).Update(calculator)
		}
	}
	if err != nil {
		return digest, err
	}
	if d.PIN {
		if err := (tpm2.PolicyAuthValue{}).Update(calculator); err != nil {
			return digest, err
		}
	}
	return tpm2.TPM2BDigest{Buffer: calculator.Hash().Digest}, nil
}

// signingKey is a P-256 key that signs with ECDSA over SHA-256 and stays in its TPM.
var signingKey = tpm2.TPMTPublic{
	Type:             tpm2.TPMAlgECC,
	NameAlg:          tpm2.TPMAlgSHA256,
	ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, SignEncrypt: true},
	Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
		Scheme: tpm2.TPMTECCScheme{
			Scheme:  tpm2.TPMAlgECDSA,
			Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
		},
		CurveID: tpm2.TPMECCNistP256,
	}),
}

// create has the TPM make an object under the storage root key: a seal of data, or where that is nil a P-256 key. like says
// which registers count, and who approves their states.
func create(t transport.TPM, srk pinned, like sealed, pin, data []byte) (d sealed, err error) {
	d = like
	d.PIN = pin != nil
	var indices []uint
	for _, p := range d.PCRs {
		indices = append(indices, p.Index)
	}
	if d.PCRs, err = readPCRs(t, indices); err != nil {
		return d, err
	}
	policy, err := d.policy()
	if err != nil {
		return d, fmt.Errorf("tpm: %w", err)
	}
	public := tpm2.TPMTPublic{
		Type:    tpm2.TPMAlgKeyedHash,
		NameAlg: tpm2.TPMAlgSHA256,
		// Without a PIN there is nothing to guess: others' failures, and an unclean shutdown, must not lock it out.
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, AdminWithPolicy: true, NoDA: pin == nil},
		AuthPolicy:       policy,
	}
	sensitive := &tpm2.TPMSSensitiveCreate{UserAuth: tpm2.TPM2BAuth{Buffer: pin}}
	if data != nil {
		sensitive.Data = tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: data})
	} else {
		attributes := public.ObjectAttributes
		public.Type, public.Parameters, public.ObjectAttributes = signingKey.Type, signingKey.Parameters, signingKey.ObjectAttributes
		public.ObjectAttributes.AdminWithPolicy, public.ObjectAttributes.NoDA = attributes.AdminWithPolicy, attributes.NoDA
	}
	made, err := tpm2.Create{
		ParentHandle: srk.object(), InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: sensitive}, InPublic: tpm2.New2B(public),
	}.Execute(t)
	if err != nil {
		return d, deviceError("TPM2_Create", err)
	}
	d.Public, d.Private = made.OutPublic.Bytes(), made.OutPrivate.Buffer
	return d, nil
}

// loaded runs use with an object that is loaded, and flushes it.
func loaded(t transport.TPM, srk pinned, d sealed, use func(handle tpm2.TPMHandle, name tpm2.TPM2BName) error) error {
	object, err := tpm2.Load{
		ParentHandle: srk.object(), InPrivate: tpm2.TPM2BPrivate{Buffer: d.Private}, InPublic: tpm2.BytesAs2B[tpm2.TPMTPublic](d.Public),
	}.Execute(t)
	if err != nil {
		return deviceError("TPM2_Load", err)
	}
	defer flush(t, object.ObjectHandle)
	return use(object.ObjectHandle, object.Name)
}

// with runs use with an object, authorised by its policy, in a session that encrypts the first parameter as the option
// says. Nothing stays in the TPM.
func with(t transport.TPM, srk pinned, d sealed, pin []byte, encryption tpm2.AuthOption, use func(tpm2.AuthHandle) error) error {
	return loaded(t, srk, d, func(handle tpm2.TPMHandle, name tpm2.TPM2BName) error {
		// By hand, since go-tpm leaves the session behind when a step of its own policy fails.
		session, end, err := tpm2.PolicySession(t, tpm2.TPMAlgSHA256, 16, srk.salted(), encryption, tpm2.Auth(pin))
		if err != nil {
			return deviceError("TPM2_StartAuthSession", err)
		}
		defer end()
		if err := d.satisfy(t, session.Handle()); err != nil {
			return err
		}
		return use(tpm2.AuthHandle{Handle: handle, Name: name, Auth: session})
	})
}

// satisfy takes the steps of policy in a session.
func (d sealed) satisfy(t transport.TPM, session tpm2.TPMHandle) error {
	if _, err := (tpm2.PolicyPCR{PolicySession: session, Pcrs: selection(d.PCRs)}).Execute(t); err != nil {
		return deviceError("TPM2_PolicyPCR", err)
	}
	if d.Approver != nil {
		if err := d.authorize(t, session); err != nil {
			return err
		}
	}
	if d.PIN {
		if _, err := (tpm2.PolicyAuthValue{PolicySession: session}).Execute(t); err != nil {
			return deviceError("TPM2_PolicyAuthValue", err)
		}
	}
	return nil
}

// unseal returns what was sealed. The caller clears it.
func unseal(t transport.TPM, srk pinned, d sealed, pin []byte) (data []byte, err error) {
	err = with(t, srk, d, pin, tpm2.AESEncryption(128, tpm2.EncryptOut), func(object tpm2.AuthHandle) error {
		r, err := tpm2.Unseal{ItemHandle: object}.Execute(t)
		if err != nil {
			return deviceError("TPM2_Unseal", err)
		}
		data = r.OutData.Buffer
		return nil
	})
	return data, err
}

// sign returns an ECDSA signature over a SHA-256 digest, in ASN.1 DER.
func sign(t transport.TPM, srk pinned, d sealed, pin, digest []byte) (signature []byte, err error) {
	err = with(t, srk, d, pin, tpm2.AESEncryption(128, tpm2.EncryptIn), func(object tpm2.AuthHandle) error {
		got, err := tpm2.Sign{
			KeyHandle: object, Digest: tpm2.TPM2BDigest{Buffer: digest}, InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
			Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull},
		}.Execute(t)
		if err != nil {
			return deviceError("TPM2_Sign", err)
		}
		signature, err = signatureOf(got.Signature)
		return err
	})
	return signature, err
}

// signatureOf writes an ECDSA signature in ASN.1 DER.
func signatureOf(s tpm2.TPMTSignature) ([]byte, error) {
	rs, err := s.Signature.ECDSA()
	if err != nil {
		return nil, deviceError("a signature", err)
	}
	return asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(rs.SignatureR.Buffer), new(big.Int).SetBytes(rs.SignatureS.Buffer)})
}

// newSeed mixes the TPM's random numbers, which cross the bus encrypted, with the system's: either alone would do.
func newSeed(t transport.TPM, srk pinned) (seed [32]byte, err error) {
	got, err := tpm2.GetRandom{BytesRequested: 32}.Execute(t, tpm2.HMAC(tpm2.TPMAlgSHA256, 16, srk.salted(), tpm2.AESEncryption(128, tpm2.EncryptOut)))
	if err != nil {
		return seed, deviceError("TPM2_GetRandom", err)
	}
	if len(got.RandomBytes.Buffer) < 32 {
		return seed, fmt.Errorf("tpm: %w: TPM2_GetRandom: %d bytes", keystore.ErrUnavailable, len(got.RandomBytes.Buffer))
	}
	mix := sha256.New()
	mix.Write(got.RandomBytes.Buffer)
	if _, err := io.CopyN(mix, rand.Reader, 32); err != nil {
		return seed, fmt.Errorf("tpm: %w", err)
	}
	return [32]byte(mix.Sum(nil)), nil
}

// Where the handles of transient objects and of loaded sessions begin (TPM 2.0 Part 2, section 7.2).
const (
	transientFirst     tpm2.TPMHandle = 0x80000000
	loadedSessionFirst tpm2.TPMHandle = 0x02000000
)

func flush(t transport.TPM, handle tpm2.TPMHandle) {
	tpm2.FlushContext{FlushHandle: handle}.Execute(t) // where that fails the line is broken, and flushAll comes next time
}

// flushAll removes what a process that was cut off has left in a TPM without a resource manager: at a socket, where nobody
// else can have something there while we are connected.
func flushAll(t transport.TPM, handles ...tpm2.TPMHandle) error {
	for _, first := range handles {
		got, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: uint32(first), PropertyCount: 64}.Execute(t)
		if err != nil {
			return deviceError("TPM2_GetCapability", err)
		}
		list, err := got.CapabilityData.Data.Handles()
		if err != nil {
			return deviceError("TPM2_GetCapability", err)
		}
		for _, h := range list.Handle {
			flush(t, h)
		}
	}
	return nil
}

// deviceError classes what the TPM answered, once, here.
func deviceError(command string, err error) error {
	class := keystore.ErrUnavailable
	switch {
	case errors.Is(err, errNoAnswer):
		return err
	case errors.Is(err, tpm2.TPMRCAuthFail), errors.Is(err, tpm2.TPMRCBadAuth):
		class = keystore.ErrAuth
	case errors.Is(err, tpm2.TPMRCIntegrity):
		return fmt.Errorf("tpm: %w: %s: it was sealed by another TPM, or changed since: %w", keystore.ErrUnfit, command, err)
	case errors.Is(err, tpm2.TPMRCLockout):
		return fmt.Errorf("tpm: %w: %s: the TPM is locked after wrong PINs; it opens by itself after a while (tpm2_getcap properties-variable: TPM2_PT_LOCKOUT_INTERVAL), or by its lockout authorisation: %w", class, command, err)
	}
	return fmt.Errorf("tpm: %w: %s: %w", class, command, err)
}

// readPIN reads a PIN file: one line, readable by its owner only.
func readPIN(path string) ([]byte, error) {
	b, err := keystore.ReadSecret(path, "PIN file")
	if err != nil {
		return nil, fmt.Errorf("tpm: %w", err)
	}
	pin := bytes.TrimRight(b, "\r\n")
	if len(pin) == 0 || len(pin) > 32 || bytes.ContainsAny(pin, "\r\n\x00") { // 32: an authValue has at most the size of the name's hash
		clear(b)
		return nil, fmt.Errorf("tpm: PIN file %s: it must have a PIN of at most 32 bytes on one line and nothing else", path)
	}
	return pin, nil
}
