package tpm

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"
	"slices"

	"countersign/internal/keystore"
	"countersign/internal/secret"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// srkHandle is the conventional handle of the storage root key (TCG TPM v2.0 Provisioning Guidance,
// section 7.5.1). The owner's persistent objects have the handles from firstOwnerHandle to
// lastOwnerHandle.
const (
	srkHandle        tpm2.TPMHandle = 0x81000001
	firstOwnerHandle tpm2.TPMHandle = 0x81000000
	lastOwnerHandle  tpm2.TPMHandle = 0x817fffff
)

// CheckStorageRoot returns an error for a handle that can't be the storage root key's. Zero stands
// for the conventional handle.
func CheckStorageRoot(handle uint32) error {
	if handle != 0 && (handle < uint32(firstOwnerHandle) || handle > uint32(lastOwnerHandle)) {
		return fmt.Errorf("%#x is not a persistent handle of the owner, %#x to %#x",
			handle, uint32(firstOwnerHandle), uint32(lastOwnerHandle))
	}
	return nil
}

// storageKey is a TPM's storage root key (SRK).
type storageKey struct {
	handle tpm2.TPMHandle
	name   tpm2.TPM2BName
	public tpm2.TPMTPublic
}

// object returns the storage root key as a parent, authorised in a salted session that encrypts the
// first parameter of command and response. Only the owner of the private storage root key can
// decrypt the salt, so a device on the bus learns nothing.
func (k storageKey) object() tpm2.AuthHandle {
	session := k.session(tpm2.AESEncryption(128, tpm2.EncryptInOut))
	return tpm2.AuthHandle{Handle: k.handle, Name: k.name, Auth: session}
}

// session returns an HMAC session salted to the storage root key.
func (k storageKey) session(options ...tpm2.AuthOption) tpm2.Session {
	return tpm2.HMAC(tpm2.TPMAlgSHA256, 16, append([]tpm2.AuthOption{k.salted()}, options...)...)
}

// salted is the option of a session salted to the storage root key.
func (k storageKey) salted() tpm2.AuthOption { return tpm2.Salted(k.handle, k.public) }

// Parameter encryption of a session: of the first parameter of the command, or of the response.
var (
	encryptCommand  = tpm2.AESEncryption(128, tpm2.EncryptIn)
	encryptResponse = tpm2.AESEncryption(128, tpm2.EncryptOut)
)

// readSRK reads the storage root key and compares the key with the TCG template. Without a key the
// error is TPM_RC_HANDLE.
func readSRK(t transport.TPM, handle tpm2.TPMHandle) (p storageKey, err error) {
	r, err := tpm2.ReadPublic{ObjectHandle: handle}.Execute(t)
	if errors.Is(err, tpm2.TPMRCHandle) {
		if err := ownerEnabled(t); err != nil {
			return p, err
		}
	}
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
	if !isSRK(*public) {
		advice := "free a handle with tpm2_evictcontrol"
		if free, err := freeHandle(t); err != nil {
			return p, err
		} else if free != 0 {
			advice = fmt.Sprintf("write storage_root = %#x, a free handle, into the token's table, "+
				"and run countersignd init: it makes the right key there", uint32(free))
		}
		return p, fmt.Errorf("tpm: %w: the key at %#x is %s, and this token needs an ECC P-256 storage root key "+
			"by the TCG template; leave that key to its owner, and %s",
			keystore.ErrUnfit, uint32(handle), describe(*public), advice)
	}
	return storageKey{handle, *name, *public}, nil
}

// isSRK reports whether a public area is the TCG template's, apart from the point.
func isSRK(public tpm2.TPMTPublic) bool {
	if public.Type != tpm2.TPMAlgECC { // the parts of a TPMT_PUBLIC can only be encoded with their own type
		return false
	}
	public.Unique = tpm2.ECCSRKTemplate.Unique
	return bytes.Equal(tpm2.Marshal(public), tpm2.Marshal(tpm2.ECCSRKTemplate))
}

// describe says what kind of key a public area is of.
func describe(public tpm2.TPMTPublic) string {
	kind := fmt.Sprintf("of the type %#04x", uint16(public.Type))
	if rsa, err := public.Parameters.RSADetail(); err == nil && public.Type == tpm2.TPMAlgRSA {
		kind = fmt.Sprintf("an RSA-%d key", rsa.KeyBits)
	} else if _, err := public.Parameters.ECCDetail(); err == nil && public.Type == tpm2.TPMAlgECC {
		kind = "another ECC key"
	}
	if a := public.ObjectAttributes; a.Restricted && a.Decrypt {
		kind += ", a storage key of other software (Windows and tpm2-tss make such keys)"
	}
	return kind
}

// freeHandle returns a handle without an object for a storage root key, or zero.
func freeHandle(t transport.TPM) (tpm2.TPMHandle, error) {
	const count = 254
	got, err := tpm2.GetCapability{
		Capability: tpm2.TPMCapHandles, Property: uint32(srkHandle), PropertyCount: count,
	}.Execute(t)
	if err != nil {
		return 0, deviceError("TPM2_GetCapability", err)
	}
	used, err := got.CapabilityData.Data.Handles()
	if err != nil {
		return 0, deviceError("TPM2_GetCapability", err)
	}
	for handle := srkHandle; handle < srkHandle+count; handle++ {
		if !slices.Contains(used.Handle, handle) {
			return handle, nil
		}
	}
	return 0, nil
}

// ownerEnabled returns an error if the owner's hierarchy is disabled: the TPM then has none of the
// owner's objects and NV indices until the next start of the machine, or until the platform enables
// the hierarchy (TPM 2.0 Part 3, section 24.2).
func ownerEnabled(t transport.TPM) error {
	props, err := properties(t)
	if err != nil {
		return err
	}
	if props[tpm2.TPMPTStartupClear]&(1<<1) == 0 { // TPMA_STARTUP_CLEAR, shEnable
		return fmt.Errorf("tpm: %w: the owner's hierarchy of this TPM is disabled, so its storage root key and "+
			"its counter can't be used; enable it in the firmware's settings, and start the machine again "+
			"(tpm2_getcap properties-variable: shEnable)", keystore.ErrUnavailable)
	}
	return nil
}

// makeSRK returns the storage root key, and makes the key first if necessary.
func makeSRK(t transport.TPM, handle tpm2.TPMHandle) (storageKey, error) {
	p, err := readSRK(t, handle)
	if !errors.Is(err, tpm2.TPMRCHandle) {
		return p, err
	}
	made, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(tpm2.ECCSRKTemplate),
	}.Execute(t)
	if err != nil {
		return p, ownerError("TPM2_CreatePrimary", err)
	}
	defer flush(t, made.ObjectHandle)
	_, err = tpm2.EvictControl{
		Auth:             tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		ObjectHandle:     tpm2.NamedHandle{Handle: made.ObjectHandle, Name: made.Name},
		PersistentHandle: handle,
	}.Execute(t)
	if err != nil {
		return p, ownerError("TPM2_EvictControl", err)
	}
	return readSRK(t, handle)
}

// EvictStorageRoot removes the storage root key from its persistent handle. The key itself is made
// of the owner's seed and a template: anybody can have the TPM make the same key again.
func (s *Store) EvictStorageRoot(ctx context.Context) error {
	return s.bus.use(ctx, func(t transport.TPM) error {
		_, err := tpm2.EvictControl{
			Auth:             tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
			ObjectHandle:     tpm2.NamedHandle{Handle: s.srk.handle, Name: s.srk.name},
			PersistentHandle: s.srk.handle,
		}.Execute(t)
		if err != nil {
			return ownerError("TPM2_EvictControl", err)
		}
		return nil
	})
}

// checkSRK returns the storage root key if the key has the given name. Another TPM, and a TPM that
// was cleared, are keystore.ErrReplaced.
func checkSRK(t transport.TPM, handle tpm2.TPMHandle, name tpm2.TPM2BName) (storageKey, error) {
	p, err := readSRK(t, handle)
	var found string
	switch {
	case errors.Is(err, tpm2.TPMRCHandle):
		found = "there is none"
	case errors.Is(err, keystore.ErrUnfit):
		found = "there is another software's key"
	case err != nil:
		return p, err
	case bytes.Equal(p.name.Buffer, name.Buffer):
		return p, nil
	default:
		found = fmt.Sprintf("there is %x", p.name.Buffer)
	}
	return p, fmt.Errorf("tpm: %w: this folder belongs to another TPM, or to this one before it was cleared "+
		"(its storage root key is %x, and at %#x %s); put the right TPM back, or correct storage_root; if that "+
		"TPM is gone, its sealed keys are lost: countersignd init --token NAME --new-token puts them aside, and "+
		"begins anew with this TPM",
		keystore.ErrReplaced, name.Buffer, uint32(handle), found)
}

// sealed is the stored form of a TPM object: the object's two parts, and its policy.
type sealed struct {
	Public  []byte `json:"public"`  // TPM2B_PUBLIC, content
	Private []byte `json:"private"` // TPM2B_PRIVATE, content: encrypted by the TPM
	Bank    Bank   `json:"bank,omitempty"`
	PCRs    []pcr  `json:"pcrs"` // with the values at the time of sealing
	PIN     bool   `json:"pin"`
	// Approver is the public key of the approver of states. Without an approver only the state at
	// the time of sealing is valid.
	Approver []byte `json:"approver,omitempty"`

	approvals  []Approval // the present approvals
	unmeasured []uint     // registers that may be without a measurement, for create
}

// policy returns the policy digest of the object. Each use must match the policy. The policy is
// PolicyPCR over the registers, or PolicyAuthorize by the approver in its place, and then
// PolicyAuthValue for an object with a PIN (TPM 2.0 Part 3, sections 23.7, 23.16 and 23.17).
func (d sealed) policy() (digest tpm2.TPM2BDigest, err error) {
	calculator, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err != nil {
		return digest, err
	}
	if d.Approver == nil {
		values := tpm2.TPM2BDigest{Buffer: digestOf(d.PCRs)}
		registers := tpm2.PolicyPCR{Pcrs: selection(d.Bank, d.PCRs), PcrDigest: values}
		err = registers.Update(calculator)
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

// signingKey is the template of a P-256 key for ECDSA over SHA-256. Keys of the template can't
// leave the TPM.
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

// create has the TPM make an object under the storage root key: a seal of data, or a P-256 key if
// data is nil. template has the registers and the approver of the policy.
func create(t transport.TPM, srk storageKey, template sealed, pin secret.Bytes, data []byte) (d sealed, err error) {
	d = template
	d.PIN = !pin.Empty()
	if d.PCRs, err = readPCRs(t, d.Bank, indicesOf(d.PCRs)); err != nil {
		return d, err
	}
	if d.Approver == nil { // an approver has judged the values
		if err := checkMeasured(d.Bank, d.PCRs, d.unmeasured); err != nil {
			return d, err
		}
	}
	policy, err := d.policy()
	if err != nil {
		return d, fmt.Errorf("tpm: %w", err)
	}
	public := tpm2.TPMTPublic{
		Type:    tpm2.TPMAlgKeyedHash,
		NameAlg: tpm2.TPMAlgSHA256,
		// NoDA: an object without a PIN has no secret to guess, so the dictionary attack lockout
		// must not apply after wrong PINs for other objects or after an unclean shutdown.
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, AdminWithPolicy: true, NoDA: pin.Empty()},
		AuthPolicy:       policy,
	}
	sensitive := &tpm2.TPMSSensitiveCreate{UserAuth: tpm2.TPM2BAuth{Buffer: pin.Expose()}}
	if data != nil {
		sensitive.Data = tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: data})
	} else {
		public = signingKey
		public.AuthPolicy = policy
		public.ObjectAttributes.AdminWithPolicy, public.ObjectAttributes.NoDA = true, pin.Empty()
	}
	made, err := tpm2.Create{
		ParentHandle: srk.object(),
		InSensitive:  tpm2.TPM2BSensitiveCreate{Sensitive: sensitive},
		InPublic:     tpm2.New2B(public),
	}.Execute(t)
	if err != nil {
		return d, deviceError("TPM2_Create", err)
	}
	d.Public, d.Private = made.OutPublic.Bytes(), made.OutPrivate.Buffer
	return d, nil
}

// withLoaded loads an object, runs use and flushes the object.
func withLoaded(t transport.TPM, srk storageKey, d sealed,
	use func(handle tpm2.TPMHandle, name tpm2.TPM2BName) error) error {
	object, err := tpm2.Load{
		ParentHandle: srk.object(),
		InPrivate:    tpm2.TPM2BPrivate{Buffer: d.Private},
		InPublic:     tpm2.BytesAs2B[tpm2.TPMTPublic](d.Public),
	}.Execute(t)
	if err != nil {
		return deviceError("TPM2_Load", err)
	}
	defer flush(t, object.ObjectHandle)
	return use(object.ObjectHandle, object.Name)
}

// withAuthorization loads an object and runs use with the object's policy satisfied, in a session
// with parameter encryption. Object and session are flushed afterwards.
func withAuthorization(t transport.TPM, srk storageKey, d sealed, pin secret.Bytes, encryption tpm2.AuthOption,
	use func(tpm2.AuthHandle) error) error {
	return withLoaded(t, srk, d, func(handle tpm2.TPMHandle, name tpm2.TPM2BName) error {
		// The policy session is made here rather than by go-tpm's tpm2.Policy, which leaves the
		// session in the TPM after a failed step of the policy.
		session, end, err := tpm2.PolicySession(t, tpm2.TPMAlgSHA256, 16, srk.salted(), encryption,
			tpm2.Auth(pin.Expose()))
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

// satisfy runs the policy commands of the object in a policy session.
func (d sealed) satisfy(t transport.TPM, session tpm2.TPMHandle) error {
	if _, err := (tpm2.PolicyPCR{PolicySession: session, Pcrs: selection(d.Bank, d.PCRs)}).Execute(t); err != nil {
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

// unseal returns the sealed data. The caller must clear the data after use.
func unseal(t transport.TPM, srk storageKey, d sealed, pin secret.Bytes) (data []byte, err error) {
	err = withAuthorization(t, srk, d, pin, encryptResponse, func(object tpm2.AuthHandle) error {
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
func sign(t transport.TPM, srk storageKey, d sealed, pin secret.Bytes, digest []byte) (signature []byte, err error) {
	err = withAuthorization(t, srk, d, pin, encryptCommand, func(object tpm2.AuthHandle) error {
		got, err := tpm2.Sign{
			KeyHandle:  object,
			Digest:     tpm2.TPM2BDigest{Buffer: digest},
			InScheme:   tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
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

// signatureOf encodes an ECDSA signature in ASN.1 DER.
func signatureOf(s tpm2.TPMTSignature) ([]byte, error) {
	rs, err := s.Signature.ECDSA()
	if err != nil {
		return nil, deviceError("a signature", err)
	}
	r, sig := new(big.Int).SetBytes(rs.SignatureR.Buffer), new(big.Int).SetBytes(rs.SignatureS.Buffer)
	return asn1.Marshal(struct{ R, S *big.Int }{r, sig})
}

// newSeed makes a seed: SHA-256 of 32 random bytes from the TPM and 32 from the system. One good
// source is enough. The TPM's bytes cross the bus encrypted.
func newSeed(t transport.TPM, srk storageKey) (seed [32]byte, err error) {
	got, err := tpm2.GetRandom{BytesRequested: 32}.Execute(t, srk.session(encryptResponse))
	if err != nil {
		return seed, deviceError("TPM2_GetRandom", err)
	}
	if len(got.RandomBytes.Buffer) < 32 {
		return seed, fmt.Errorf("tpm: %w: TPM2_GetRandom: %d bytes, want 32",
			keystore.ErrUnavailable, len(got.RandomBytes.Buffer))
	}
	mix := sha256.New()
	mix.Write(got.RandomBytes.Buffer)
	if _, err := io.CopyN(mix, rand.Reader, 32); err != nil {
		return seed, fmt.Errorf("tpm: %w", err)
	}
	return [32]byte(mix.Sum(nil)), nil
}

// First handles of transient objects and of loaded sessions (TPM 2.0 Part 2, section 7.2).
const (
	transientFirst     tpm2.TPMHandle = 0x80000000
	loadedSessionFirst tpm2.TPMHandle = 0x02000000
)

// flush unloads an object or a session. flush ignores an error: a failed command breaks the
// connection, and flushAll then runs before the next use of the bus.
func flush(t transport.TPM, handle tpm2.TPMHandle) {
	tpm2.FlushContext{FlushHandle: handle}.Execute(t)
}

// flushAll flushes the objects and sessions left by an interrupted process in a TPM without a
// resource manager. Such a TPM is swtpm at a socket: swtpm serves one connection at a time, so no
// other program has objects in use.
func flushAll(t transport.TPM, handles ...tpm2.TPMHandle) error {
	for _, first := range handles {
		got, err := tpm2.GetCapability{
			Capability: tpm2.TPMCapHandles, Property: uint32(first), PropertyCount: 64,
		}.Execute(t)
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

// deviceError maps a response code of the TPM to the keystore's error classes. No other place does
// so.
func deviceError(command string, err error) error {
	class := keystore.ErrUnavailable
	switch {
	case errors.Is(err, errNoResponse):
		return err
	case errors.Is(err, tpm2.TPMRCAuthFail), errors.Is(err, tpm2.TPMRCBadAuth):
		class = keystore.ErrAuth
	case errors.Is(err, tpm2.TPMRCIntegrity):
		return fmt.Errorf("tpm: %w: %s: the object was sealed by another TPM, or changed since: %w",
			keystore.ErrUnfit, command, err)
	case errors.Is(err, tpm2.TPMRCLockout):
		return fmt.Errorf("tpm: %w: %s: wait "+
			"(tpm2_getcap properties-variable: TPM2_PT_LOCKOUT_INTERVAL is the time in seconds for one try), "+
			"or use the lockout authorisation (tpm2_dictionarylockout --clear-lockout): %w",
			keystore.ErrLockedOut, command, err)
	}
	return fmt.Errorf("tpm: %w: %s: %w", class, command, err)
}

// ownerError is deviceError for a command that needs the owner's authorisation. Countersign has no
// password of the owner, and needs none after countersignd init.
func ownerError(command string, err error) error {
	if errors.Is(err, tpm2.TPMRCAuthFail) || errors.Is(err, tpm2.TPMRCBadAuth) {
		return fmt.Errorf("tpm: %w: %s: the owner of this TPM has a password, which countersignd does not have; "+
			"take it off (tpm2_changeauth -c owner -p PASSWORD), run the command again, "+
			"and set it again (tpm2_changeauth -c owner PASSWORD): only counters and storage root keys that are "+
			"made or given back need the owner: %v", keystore.ErrRefused, command, err)
	}
	return deviceError(command, err)
}

// readPIN reads a PIN file: one line of at most 32 bytes, readable by the file's owner only.
func readPIN(path string) (none secret.Bytes, err error) {
	b, err := keystore.ReadSecret(path, "PIN file")
	if err != nil {
		return none, fmt.Errorf("tpm: %w", err)
	}
	pin := bytes.TrimRight(b.Expose(), "\r\n")
	// 32 bytes: an authValue may be as long as the hash of the object's name, SHA-256.
	if len(pin) == 0 || len(pin) > 32 || bytes.ContainsAny(pin, "\r\n\x00") {
		b.Wipe()
		return none, fmt.Errorf("tpm: PIN file %s: it must have a PIN of at most 32 bytes on one line and nothing else",
			path)
	}
	return secret.New(pin), nil
}
