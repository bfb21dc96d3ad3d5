package tpm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"countersign/internal/keystore"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// counterIndex is the NV index of the monotonic counter, in the owner's range (TCG Registry of
// Reserved TPM 2.0 Handles).
const counterIndex tpm2.TPMHandle = 0x01800c51

// counterPublic is the public area of the monotonic counter. Every program on the machine may read
// and increment the counter; no program can decrement it. A new counter begins above the value of
// every earlier counter of the TPM (TPM 2.0 Part 3, section 31.1).
var counterPublic = tpm2.TPMSNVPublic{
	NVIndex: tpm2.TPMIRHNVIndex(counterIndex),
	NameAlg: tpm2.TPMAlgSHA256,
	Attributes: tpm2.TPMANV{
		NT: tpm2.TPMNTCounter, AuthRead: true, AuthWrite: true, OwnerRead: true, OwnerWrite: true, NoDA: true,
	},
	DataSize: 8,
}

// counter returns the handles of the monotonic counter. auth uses a salted session, so an attacker
// on the bus can't forge the counter's value.
func (s *Store) counter(t transport.TPM) (auth tpm2.AuthHandle, index tpm2.NamedHandle, err error) {
	got, err := tpm2.NVReadPublic{NVIndex: counterIndex}.Execute(t)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return auth, index, fmt.Errorf("tpm: the counter at %#x: %w", uint32(counterIndex), keystore.ErrNotFound)
	} else if err != nil {
		return auth, index, deviceError("TPM2_NV_ReadPublic", err)
	}
	public, err := got.NVPublic.Contents()
	if err != nil {
		return auth, index, deviceError("TPM2_NV_ReadPublic", err)
	}
	want := counterPublic
	want.Attributes.Written = public.Attributes.Written
	if string(tpm2.Marshal(*public)) != string(tpm2.Marshal(want)) {
		return auth, index, fmt.Errorf("tpm: %w: the NV index %#x is defined, but not as the counter; "+
			"look with: tpm2_nvreadpublic", keystore.ErrUnfit, uint32(counterIndex))
	}
	name, err := tpm2.NVName(public)
	if err != nil {
		return auth, index, deviceError("TPM2_NV_ReadPublic", err)
	}
	h := tpm2.AuthHandle{Handle: counterIndex, Name: *name, Auth: s.srk.session()}
	return h, tpm2.NamedHandle{Handle: counterIndex, Name: *name}, nil
}

// DefineCounter defines the monotonic counter, unless the counter exists.
func (s *Store) DefineCounter(ctx context.Context) error {
	return s.bus.use(ctx, func(t transport.TPM) error {
		if _, _, err := s.counter(t); !errors.Is(err, keystore.ErrNotFound) {
			return err
		}
		_, err := tpm2.NVDefineSpace{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: s.srk.session()},
			PublicInfo: tpm2.New2B(counterPublic),
		}.Execute(t)
		if errors.Is(err, tpm2.TPMRCNVSpace) {
			return fmt.Errorf("tpm: %w: there is no room for a counter; "+
				"remove NV indices without use (tpm2_getcap handles-nv-index, tpm2_nvundefine)", keystore.ErrRefused)
		} else if err != nil {
			return deviceError("TPM2_NV_DefineSpace", err)
		}
		_, err = s.increment(t) // a counter has no value before its first increment
		return err
	})
}

// ReadCounter returns the value of the monotonic counter, or ErrNotFound.
func (s *Store) ReadCounter(ctx context.Context) (value uint64, err error) {
	err = s.bus.use(ctx, func(t transport.TPM) (err error) {
		value, err = s.read(t)
		return err
	})
	return value, err
}

// IncrementCounter increments the monotonic counter by one and returns the new value. After an
// error the counter may have been incremented.
func (s *Store) IncrementCounter(ctx context.Context) (value uint64, err error) {
	err = s.bus.use(ctx, func(t transport.TPM) (err error) {
		value, err = s.increment(t)
		return err
	})
	return value, err
}

// read returns the value of the monotonic counter.
func (s *Store) read(t transport.TPM) (uint64, error) {
	auth, index, err := s.counter(t)
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
func (s *Store) increment(t transport.TPM) (uint64, error) {
	auth, index, err := s.counter(t)
	if err != nil {
		return 0, err
	}
	if _, err := (tpm2.NVIncrement{AuthHandle: auth, NVIndex: index}).Execute(t); err != nil {
		return 0, deviceError("TPM2_NV_Increment", err)
	}
	return s.read(t)
}
