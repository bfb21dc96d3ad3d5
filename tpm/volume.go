package tpm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"countersign/internal/keystore"
	"countersign/internal/secret"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// VolumeKey is the key of an encrypted disk, sealed to a TPM. The TPM unseals the key when all of
// this holds:
//
//   - The registers of PCRs have the values of the time of sealing.
//   - The signer of images has signed the present values of SignedPCRs for the minimal version of
//     the seal (TPM2_PolicyAuthorize with a policyRef). An image is signed for its own version and
//     for earlier ones, so a seal to version 5 opens in the images 5, 6 and 7, and not in 4.
//   - The counter has the value of the seal (TPM2_PolicyNV). A counter never returns to a value, so
//     an older copy of a seal opens nothing once the counter was raised.
//
// The object has no authorisation value and is exempt from the dictionary attack lockout (noDA).
// The TPM therefore counts no failed try, also not after a power cut.
type VolumeKey struct {
	Format   int    `json:"format"`
	SRKName  []byte `json:"srk_name"` // TPM2B_NAME of the storage root key
	Public   []byte `json:"public"`   // TPM2B_PUBLIC, content
	Private  []byte `json:"private"`  // TPM2B_PRIVATE, content: encrypted by the TPM
	PCRs     []pcr  `json:"pcrs"`     // of the bank sha256, at the time of sealing
	Approver []byte `json:"approver"` // the signer of images: a point of 65 bytes
	Minimum  uint64 `json:"minimum"`  // version of images
	Counter  uint64 `json:"counter"`  // value that the counter must have
}

// VolumePCRs are the registers that a disk is sealed to: the Secure Boot state.
var VolumePCRs = []uint{7}

// SignedPCRs are the registers that the signer of images signs: the image, and what would override
// it. Register 12 has the command line that the boot loader passes on, and credentials; 13 has
// system extensions.
var SignedPCRs = []uint{11, 12, 13}

// Volumes is a TPM with the seals of one machine's disk.
type Volumes struct {
	Config
}

// volumeOwner marks the counter of disks.
var volumeOwner = keystore.Owner(sha256.Sum256([]byte("countersign volume")))

// volumeCounterIndex is the NV index of the counter of disks: the next one after the ledger's.
const volumeCounterIndex = defaultCounterIndex + 1

// Errors of disks. An operator is told which one.
var (
	ErrOldImage      = errors.New("the image is older than this machine allows")
	ErrForeignImage  = errors.New("the image is not signed for this machine")
	ErrStaleSeal     = errors.New("the seal of the disk is an old copy")
	ErrStateMeasured = errors.New("the machine has booted in another state")
)

// ImageState is the signature of an image's registers for one minimal version.
type ImageState struct {
	Minimum   uint64 `json:"minimum"`
	PCRs      []pcr  `json:"pcrs"`
	Signature []byte `json:"signature"` // ECDSA over SHA-256 of policy and policyRef, ASN.1 DER
}

// policyRef is the qualifier of a signature: the minimal version.
func policyRef(minimum uint64) []byte {
	h := sha256.Sum256(binary.BigEndian.AppendUint64([]byte("countersign-volume-v1\x00"), minimum))
	return h[:]
}

// SignImage signs the registers of an image, for each minimal version in which the image may open
// the disk. pcr11 and pcr12 are the values that the image's boot gives to these registers, before
// any phase of the boot is measured.
func SignImage(key crypto.Signer, pcr11, pcr12 []byte, minima ...uint64) (all []ImageState, err error) {
	registers := map[uint][]byte{11: pcr11, 12: pcr12, 13: make([]byte, sha256.Size)}
	for _, m := range minima {
		a, err := approve(key, "", registers, policyRef(m))
		if err != nil {
			return nil, err
		}
		all = append(all, ImageState{m, a.PCRs, a.Signature})
	}
	return all, nil
}

// volumeConfig returns the configuration of the bus and of the counter.
func (v Volumes) store(t transport.TPM, srk storageKey) *Store {
	c := v.Config
	c.CounterIndex = uint32(volumeCounterIndex)
	return &Store{config: c, srk: srk}
}

// policy returns the policy of a seal: PolicyAuthorize, PolicyPCR and PolicyNV, in this order,
// because PolicyAuthorize replaces what was before it.
func (v VolumeKey) policy(counter tpm2.NamedHandle) (digest tpm2.TPM2BDigest, err error) {
	calculator, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err != nil {
		return digest, err
	}
	approver := approverOf(v.Approver)
	name, err := tpm2.ObjectName(&approver)
	if err != nil {
		return digest, err
	}
	ref, values := tpm2.TPM2BDigest{Buffer: policyRef(v.Minimum)}, tpm2.TPM2BDigest{Buffer: digestOf(v.PCRs)}
	err = errors.Join(
		tpm2.PolicyAuthorize{KeySign: *name, PolicyRef: ref}.Update(calculator),
		tpm2.PolicyPCR{Pcrs: selection("", v.PCRs), PcrDigest: values}.Update(calculator),
		tpm2.PolicyNV{NVIndex: counter, OperandB: v.operand(), Operation: tpm2.TPMEOEq}.Update(calculator))
	return tpm2.TPM2BDigest{Buffer: calculator.Hash().Digest}, err
}

func (v VolumeKey) operand() tpm2.TPM2BOperand {
	return tpm2.TPM2BOperand{Buffer: binary.BigEndian.AppendUint64(nil, v.Counter)}
}

// Seal seals the key of a disk to the present values of VolumePCRs. With next, the seal opens after
// the next Raise only; otherwise it opens now. approver is a point of 65 bytes. Seal makes the
// counter and the storage root key where there is none.
func (v Volumes) Seal(ctx context.Context, key secret.Bytes, approver []byte, minimum uint64, next bool) (
	made VolumeKey, err error) {
	err = v.use(ctx, func(t transport.TPM, s *Store) error {
		pcrs, err := readPCRs(t, "", VolumePCRs)
		if err != nil {
			return err
		}
		if err := checkMeasured("", pcrs, v.ZeroPCRs); err != nil {
			return err
		}
		value, index, err := s.volumeCounter(t)
		if err != nil {
			return err
		}
		if next {
			value++
		}
		made = VolumeKey{
			Format: 1, SRKName: s.srk.name.Buffer, PCRs: pcrs, Approver: approver, Minimum: minimum, Counter: value,
		}
		policy, err := made.policy(index)
		if err != nil {
			return fmt.Errorf("tpm: %w", err)
		}
		got, err := tpm2.Create{
			ParentHandle: s.srk.object(),
			InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
				Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: key.Expose()}),
			}},
			InPublic: tpm2.New2B(tpm2.TPMTPublic{
				Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256, AuthPolicy: policy,
				ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, AdminWithPolicy: true, NoDA: true},
			}),
		}.Execute(t)
		if err != nil {
			return deviceError("TPM2_Create", err)
		}
		made.Public, made.Private = got.OutPublic.Bytes(), got.OutPrivate.Buffer
		return nil
	})
	return made, err
}

// use runs do with the storage root key of the machine.
func (v Volumes) use(ctx context.Context, do func(transport.TPM, *Store) error) error {
	b := newBus(v.Config)
	defer b.close()
	return b.use(ctx, func(t transport.TPM) error {
		srk, err := makeSRK(t, v.storageRoot())
		if err != nil {
			return err
		}
		return do(t, v.store(t, srk))
	})
}

// volumeCounter returns the value and the handle of the counter of disks, and makes the counter
// where there is none.
func (s *Store) volumeCounter(t transport.TPM) (value uint64, index tpm2.NamedHandle, err error) {
	if _, _, err := s.counter(t, volumeOwner); errors.Is(err, keystore.ErrNotFound) {
		if err := s.define(t, volumeOwner); err != nil {
			return 0, index, err
		}
	} else if err != nil {
		return 0, index, err
	}
	value, err = s.read(t, volumeOwner)
	if errors.Is(err, tpm2.TPMRCNVUninitialized) { // no value before the first increment
		value, err = s.increment(t, volumeOwner)
	}
	if err != nil {
		return 0, index, err
	}
	_, index, err = s.counter(t, volumeOwner)
	return value, index, err
}

// closed is what End measures.
var closed = sha256.Sum256([]byte("countersign: the disk is opened no more"))

// End measures into register 11 that the disk is opened no more: until the next boot, the TPM
// unseals its key for nobody. End fails unless the register has changed.
func (v Volumes) End(ctx context.Context) error {
	b := newBus(v.Config)
	defer b.close()
	return b.use(ctx, func(t transport.TPM) error {
		before, err := readPCRs(t, "", SignedPCRs[:1])
		if err != nil {
			return err
		}
		_, err = tpm2.PCRExtend{
			PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(SignedPCRs[0]), Auth: tpm2.PasswordAuth(nil)},
			Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{
				{HashAlg: tpm2.TPMAlgSHA256, Digest: closed[:]},
			}},
		}.Execute(t)
		if err != nil {
			return deviceError("TPM2_PCR_Extend", err)
		}
		now, err := readPCRs(t, "", SignedPCRs[:1])
		if err == nil && bytes.Equal(before[0].Value, now[0].Value) {
			err = fmt.Errorf("tpm: %w: TPM2_PCR_Extend has changed nothing", keystore.ErrUnfit)
		}
		return err
	})
}

// Raise increments the counter of disks, from which on the seals of before open no more. A counter
// that has another value than from is left alone.
func (v Volumes) Raise(ctx context.Context, from uint64) error {
	return v.use(ctx, func(t transport.TPM, s *Store) error {
		value, err := s.read(t, volumeOwner)
		if err != nil || value != from {
			return err
		}
		_, err = s.increment(t, volumeOwner)
		return err
	})
}

// ledgerIndices are the NV indices that ledgers of a machine's disks may have for their counters:
// the usual one first, and none of the disks' own.
func ledgerIndices() (all []tpm2.TPMHandle) {
	all = append(all, defaultCounterIndex)
	for index := volumeCounterIndex + 1; index <= defaultCounterIndex|0xf; index++ {
		all = append(all, index)
	}
	return all
}

// FreeLedgerIndex returns an NV index for the counter of a new ledger. A TPM still has the counter
// of an appliance whose disk was replaced.
func (v Volumes) FreeLedgerIndex(ctx context.Context) (index uint32, err error) {
	b := newBus(v.Config)
	defer b.close()
	err = b.use(ctx, func(t transport.TPM) error {
		for _, each := range ledgerIndices() {
			_, err := tpm2.NVReadPublic{NVIndex: each}.Execute(t)
			if errors.Is(err, tpm2.TPMRCHandle) {
				index = uint32(each)
				return nil
			} else if err != nil {
				return deviceError("TPM2_NV_ReadPublic", err)
			}
		}
		return fmt.Errorf("tpm: %w: the TPM has the counters of %d appliances: clear the TPM in the firmware",
			keystore.ErrRefused, len(ledgerIndices()))
	})
	return index, err
}

// forgetLedgers removes the counters of ledgers.
func (s *Store) forgetLedgers(t transport.TPM) error {
	for _, index := range ledgerIndices() {
		got, err := tpm2.NVReadPublic{NVIndex: index}.Execute(t)
		if errors.Is(err, tpm2.TPMRCHandle) {
			continue
		} else if err != nil {
			return deviceError("TPM2_NV_ReadPublic", err)
		}
		public, err := got.NVPublic.Contents()
		if err != nil {
			return deviceError("TPM2_NV_ReadPublic", err)
		}
		if !isCounter(*public) {
			continue // of another program
		}
		name, err := tpm2.NVName(public)
		if err != nil {
			return deviceError("TPM2_NV_ReadPublic", err)
		}
		if _, err := (tpm2.NVUndefineSpace{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: s.srk.session()},
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: *name},
		}).Execute(t); err != nil {
			return ownerError("TPM2_NV_UndefineSpace", err)
		}
	}
	return nil
}

// Forget increments the counter of disks, if there is one, and removes the counters of ledgers: no
// seal of before opens any more, and no ledger of before is the newest.
func (v Volumes) Forget(ctx context.Context) error {
	b := newBus(v.Config)
	defer b.close()
	return b.use(ctx, func(t transport.TPM) error {
		srk, err := readSRK(t, v.storageRoot())
		if errors.Is(err, tpm2.TPMRCHandle) || errors.Is(err, keystore.ErrUnfit) {
			return nil // nothing was ever sealed
		} else if err != nil {
			return err
		}
		s := v.store(t, srk)
		if _, err = s.increment(t, volumeOwner); err != nil && !errors.Is(err, keystore.ErrNotFound) {
			return err
		}
		return s.forgetLedgers(t)
	})
}

// Unseal returns the key of a disk. signed are the signatures that the image has brought along. The
// error says what is in the way: ErrOldImage, ErrForeignImage, ErrStaleSeal, ErrStateMeasured, or
// keystore.ErrReplaced for another TPM.
func (v Volumes) Unseal(ctx context.Context, seal VolumeKey, signed []ImageState) (key secret.Bytes, err error) {
	if seal.Format != 1 || len(seal.Approver) != 65 || len(seal.PCRs) == 0 {
		return key, fmt.Errorf("tpm: %w: the seal of the disk is damaged or of a newer version", keystore.ErrUnfit)
	}
	b := newBus(v.Config)
	defer b.close()
	err = b.use(ctx, func(t transport.TPM) error {
		srk, err := checkSRK(t, v.storageRoot(), tpm2.TPM2BName{Buffer: seal.SRKName})
		if errors.Is(err, keystore.ErrReplaced) {
			return fmt.Errorf("tpm: %w: the disk belongs to another TPM, or to this one before it was cleared: put "+
				"the disk back into its machine", keystore.ErrReplaced)
		} else if err != nil {
			return err
		}
		s := v.store(t, srk)
		state, err := seal.signature(t, signed)
		if err != nil {
			return err
		}
		if err := seal.sameState(t); err != nil {
			return err
		}
		if err := s.fresh(t, seal); err != nil {
			return err
		}
		// Other programs may extend a register of theirs meanwhile, which ends a policy session.
		for try := 1; ; try++ {
			err = s.unsealVolume(t, seal, state, &key)
			if !errors.Is(err, tpm2.TPMRCPCRChanged) || try == maxTries {
				return err
			}
		}
	})
	return key, err
}

// maxTries bounds the tries of Unseal.
const maxTries = 20

// unsealVolume has the TPM unseal the key of a disk.
func (s *Store) unsealVolume(t transport.TPM, seal VolumeKey, state ImageState, key *secret.Bytes) error {
	return withLoaded(t, s.srk, sealed{Public: seal.Public, Private: seal.Private},
		func(handle tpm2.TPMHandle, name tpm2.TPM2BName) error {
			session, end, err := tpm2.PolicySession(t, tpm2.TPMAlgSHA256, 16, s.srk.salted(), encryptResponse)
			if err != nil {
				return deviceError("TPM2_StartAuthSession", err)
			}
			defer end()
			if err := s.satisfyVolume(t, session.Handle(), seal, state); err != nil {
				return err
			}
			r, err := tpm2.Unseal{
				ItemHandle: tpm2.AuthHandle{Handle: handle, Name: name, Auth: session},
			}.Execute(t)
			if err != nil {
				return deviceError("TPM2_Unseal", err)
			}
			*key = secret.New(r.OutData.Buffer)
			return nil
		})
}

// signature returns the signature for the seal's minimal version, if the signed registers are the
// present ones.
func (v VolumeKey) signature(t transport.TPM, signed []ImageState) (state ImageState, err error) {
	newest := uint64(0)
	for _, s := range signed {
		newest = max(newest, s.Minimum)
	}
	i := slices.IndexFunc(signed, func(s ImageState) bool { return s.Minimum == v.Minimum })
	switch {
	case len(signed) == 0:
		return state, fmt.Errorf("tpm: %w: it has no signature of its measurements", ErrForeignImage)
	case i < 0 && newest < v.Minimum:
		return state, fmt.Errorf("tpm: %w: it has the rollback version %d, and the minimum is %d: boot a newer image",
			ErrOldImage, newest, v.Minimum)
	case i < 0:
		return state, fmt.Errorf("tpm: %w: it is not signed for disks of the minimal version %d: "+
			"update in smaller steps", ErrForeignImage, v.Minimum)
	}
	state = signed[i]
	now, err := readPCRs(t, "", SignedPCRs)
	if err != nil {
		return state, err
	}
	if !slices.Equal(indicesOf(state.PCRs), SignedPCRs) {
		return state, fmt.Errorf("tpm: %w: its signature is of other registers", ErrForeignImage)
	}
	if differ := differing(now, state.PCRs); differ != "" {
		return state, fmt.Errorf("tpm: %w: %s: something else was measured than the signed image: boot without "+
			"command lines, credentials and extensions of others", ErrStateMeasured, differ)
	}
	return state, nil
}

// sameState compares the registers with those of the time of sealing.
func (v VolumeKey) sameState(t transport.TPM) error {
	now, err := readPCRs(t, "", indicesOf(v.PCRs))
	if err != nil {
		return err
	}
	if differ := differing(now, v.PCRs); differ != "" {
		return fmt.Errorf("tpm: %w: %s: turn Secure Boot on again, with the keys of before", ErrStateMeasured, differ)
	}
	return nil
}

// differing names the registers that differ.
func differing(now, want []pcr) (text string) {
	for i, p := range want {
		if bytes.Equal(now[i].Value, p.Value) || len(now[i].Value) < 4 || len(p.Value) < 4 {
			continue
		}
		if text != "" {
			text += "; "
		}
		text += fmt.Sprintf("PCR %d, which measures %s, is %x… and must be %x…",
			p.Index, pcrContents[p.Index], now[i].Value[:4], p.Value[:4])
	}
	return text
}

// fresh compares the counter with the seal's.
func (s *Store) fresh(t transport.TPM, seal VolumeKey) error {
	value, err := s.read(t, volumeOwner)
	switch {
	case errors.Is(err, keystore.ErrNotFound):
		return fmt.Errorf("tpm: %w: the TPM was cleared", keystore.ErrReplaced)
	case err != nil:
		return err
	case value != seal.Counter:
		return fmt.Errorf("tpm: %w: its counter is %d, and the TPM's is %d", ErrStaleSeal, seal.Counter, value)
	}
	return nil
}

// satisfyVolume runs the policy commands of a seal.
func (s *Store) satisfyVolume(t transport.TPM, session tpm2.TPMHandle, seal VolumeKey, state ImageState) error {
	registers := tpm2.PolicyPCR{PolicySession: session, Pcrs: selection("", state.PCRs)}
	if _, err := registers.Execute(t); err != nil {
		return deviceError("TPM2_PolicyPCR", err)
	}
	a := Approval{PCRs: state.PCRs, Signature: state.Signature}
	if err := a.authorize(t, session, seal.Approver, policyRef(seal.Minimum)); err != nil {
		return fmt.Errorf("%w: %w", ErrForeignImage, err)
	}
	if _, err := (tpm2.PolicyPCR{PolicySession: session, Pcrs: selection("", seal.PCRs)}).Execute(t); err != nil {
		return deviceError("TPM2_PolicyPCR", err)
	}
	auth, index, err := s.counter(t, volumeOwner)
	if err != nil {
		return err
	}
	_, err = tpm2.PolicyNV{
		AuthHandle: auth, NVIndex: index, PolicySession: session, OperandB: seal.operand(), Operation: tpm2.TPMEOEq,
	}.Execute(t)
	if err != nil {
		return deviceError("TPM2_PolicyNV", err)
	}
	return nil
}
