package tpm

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"countersign/internal/keystore"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// defaultCounterIndex is the usual NV index of the monotonic counter, in the owner's range (TCG
// Registry of Reserved TPM 2.0 Handles).
const (
	defaultCounterIndex tpm2.TPMHandle = 0x01800c51
	firstOwnerIndex     tpm2.TPMHandle = 0x01800000
	lastOwnerIndex      tpm2.TPMHandle = 0x01bfffff
)

// CheckCounterIndex returns an error for an NV index that can't be the counter's. Zero stands for
// the usual index.
func CheckCounterIndex(index uint32) error {
	if index != 0 && (index < uint32(firstOwnerIndex) || index > uint32(lastOwnerIndex)) {
		return fmt.Errorf("%#x is not an NV index of the owner, %#x to %#x",
			index, uint32(firstOwnerIndex), uint32(lastOwnerIndex))
	}
	return nil
}

func (c Config) counterIndex() tpm2.TPMHandle {
	return cmp.Or(tpm2.TPMHandle(c.CounterIndex), defaultCounterIndex)
}

// counterPublic returns the public area of an owner's monotonic counter. Every program on the
// machine may read and increment the counter; no program can decrement it. A new counter begins
// above the value of every earlier counter of the TPM (TPM 2.0 Part 3, section 31.1).
//
// The policy is the mark of the owner: a digest that no policy has. Nothing can be done by the
// policy, since the attributes allow no use of it, and the policy of an index never changes.
func counterPublic(index tpm2.TPMHandle, owner keystore.Owner) tpm2.TPMSNVPublic {
	public := tpm2.TPMSNVPublic{
		NVIndex: tpm2.TPMIRHNVIndex(index),
		NameAlg: tpm2.TPMAlgSHA256,
		Attributes: tpm2.TPMANV{
			NT: tpm2.TPMNTCounter, AuthRead: true, AuthWrite: true, OwnerRead: true, OwnerWrite: true, NoDA: true,
		},
		DataSize: 8,
	}
	if owner != (keystore.Owner{}) {
		mark := sha256.Sum256(append([]byte("countersign counter\x00"), owner[:]...))
		public.AuthPolicy.Buffer = mark[:]
	}
	return public
}

// counter returns the handles of the owner's counter. auth uses a salted session, so an attacker on
// the bus can't forge the counter's value.
func (s *Store) counter(t transport.TPM, owner keystore.Owner) (
	auth tpm2.AuthHandle, index tpm2.NamedHandle, err error) {
	handle := s.config.counterIndex()
	got, err := tpm2.NVReadPublic{NVIndex: handle}.Execute(t)
	if errors.Is(err, tpm2.TPMRCHandle) {
		if err := ownerEnabled(t); err != nil {
			return auth, index, err
		}
		return auth, index, fmt.Errorf("tpm: the counter at %#x: %w", uint32(handle), keystore.ErrNotFound)
	} else if err != nil {
		return auth, index, deviceError("TPM2_NV_ReadPublic", err)
	}
	public, err := got.NVPublic.Contents()
	if err != nil {
		return auth, index, deviceError("TPM2_NV_ReadPublic", err)
	}
	want := counterPublic(handle, owner)
	want.Attributes.Written = public.Attributes.Written
	if string(tpm2.Marshal(*public)) != string(tpm2.Marshal(want)) {
		return auth, index, fmt.Errorf("tpm: %w: the NV index %#x is not this appliance's counter, but %s; "+
			"write counter_index with a free index (tpm2_getcap handles-nv-index lists those in use) into the "+
			"token's table or, if nobody needs that one any more, remove it: tpm2_nvundefine %#x",
			keystore.ErrUnfit, uint32(handle), describeNV(*public), uint32(handle))
	}
	name, err := tpm2.NVName(public)
	if err != nil {
		return auth, index, deviceError("TPM2_NV_ReadPublic", err)
	}
	h := tpm2.AuthHandle{Handle: handle, Name: *name, Auth: s.srk.session()}
	return h, tpm2.NamedHandle{Handle: handle, Name: *name}, nil
}

// isCounter reports that an NV index is the counter of an appliance, whichever it is.
func isCounter(public tpm2.TPMSNVPublic) bool {
	mine := counterPublic(tpm2.TPMHandle(public.NVIndex), keystore.Owner{})
	mine.Attributes.Written, mine.AuthPolicy = public.Attributes.Written, public.AuthPolicy
	return string(tpm2.Marshal(public)) == string(tpm2.Marshal(mine))
}

// describeNV says what an NV index is. A TPM does not record the name of the program that has
// defined an index.
func describeNV(public tpm2.TPMSNVPublic) string {
	if isCounter(public) {
		return "the counter of another countersign appliance on this TPM, or of an earlier one"
	}
	by := "a program with the owner's authorisation"
	if public.Attributes.PlatformCreate {
		by = "the platform's firmware"
	}
	kinds := map[tpm2.TPMNT]string{
		tpm2.TPMNTOrdinary: "data", tpm2.TPMNTCounter: "a counter", tpm2.TPMNTBits: "a field of bits",
		tpm2.TPMNTExtend: "a register", tpm2.TPMNTPinFail: "a PIN", tpm2.TPMNTPinPass: "a PIN",
	}
	kind := cmp.Or(kinds[public.Attributes.NT], "of a kind unknown here")
	return fmt.Sprintf("%s of %d bytes, defined by %s", kind, public.DataSize, by)
}

// DefineCounter defines the owner's counter, unless the counter exists.
func (s *Store) DefineCounter(ctx context.Context, owner keystore.Owner) error {
	return s.bus.use(ctx, func(t transport.TPM) error {
		if _, err := s.read(t, owner); err == nil {
			return nil
		} else if _, _, err := s.counter(t, owner); errors.Is(err, keystore.ErrNotFound) {
			if err := s.define(t, owner); err != nil {
				return err
			}
		} else if err != nil {
			return err
		}
		_, err := s.increment(t, owner) // a counter has no value before its first increment
		return err
	})
}

// define defines the counter's NV index.
func (s *Store) define(t transport.TPM, owner keystore.Owner) error {
	_, err := tpm2.NVDefineSpace{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: s.srk.session()},
		PublicInfo: tpm2.New2B(counterPublic(s.config.counterIndex(), owner)),
	}.Execute(t)
	if errors.Is(err, tpm2.TPMRCNVSpace) {
		return fmt.Errorf("tpm: %w: there is no room for a counter; "+
			"remove NV indices without use (tpm2_getcap handles-nv-index, tpm2_nvundefine)", keystore.ErrRefused)
	} else if err != nil {
		return ownerError("TPM2_NV_DefineSpace", err)
	}
	return nil
}

// ReadCounter returns the value of the monotonic counter, or ErrNotFound.
func (s *Store) ReadCounter(ctx context.Context, owner keystore.Owner) (value uint64, err error) {
	err = s.bus.use(ctx, func(t transport.TPM) (err error) {
		value, err = s.read(t, owner)
		return err
	})
	return value, err
}

// IncrementCounter increments the monotonic counter by one and returns the new value. After an
// error the counter may have been incremented.
func (s *Store) IncrementCounter(ctx context.Context, owner keystore.Owner) (value uint64, err error) {
	err = s.bus.use(ctx, func(t transport.TPM) (err error) {
		value, err = s.increment(t, owner)
		return err
	})
	return value, err
}

// UndefineCounter removes the counter's NV index, if the index is the owner's counter.
func (s *Store) UndefineCounter(ctx context.Context, owner keystore.Owner) error {
	return s.bus.use(ctx, func(t transport.TPM) error {
		_, index, err := s.counter(t, owner)
		if errors.Is(err, keystore.ErrNotFound) {
			return nil
		} else if err != nil {
			return err
		}
		_, err = tpm2.NVUndefineSpace{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: s.srk.session()}, NVIndex: index,
		}.Execute(t)
		if err != nil {
			return ownerError("TPM2_NV_UndefineSpace", err)
		}
		return nil
	})
}

// read returns the value of the monotonic counter.
func (s *Store) read(t transport.TPM, owner keystore.Owner) (uint64, error) {
	auth, index, err := s.counter(t, owner)
	if err != nil {
		return 0, err
	}
	got, err := tpm2.NVRead{AuthHandle: auth, NVIndex: index, Size: 8}.Execute(t)
	if err != nil {
		return 0, deviceError("TPM2_NV_Read", err)
	}
	if len(got.Data.Buffer) != 8 {
		return 0, fmt.Errorf("tpm: %w: TPM2_NV_Read: %d bytes", keystore.ErrUnavailable, len(got.Data.Buffer))
	}
	return binary.BigEndian.Uint64(got.Data.Buffer), nil
}

// increment increments the monotonic counter and returns the new value.
func (s *Store) increment(t transport.TPM, owner keystore.Owner) (uint64, error) {
	auth, index, err := s.counter(t, owner)
	if err != nil {
		return 0, err
	}
	if _, err := (tpm2.NVIncrement{AuthHandle: auth, NVIndex: index}).Execute(t); err != nil {
		return 0, deviceError("TPM2_NV_Increment", err)
	}
	return s.read(t, owner)
}
