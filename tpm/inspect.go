package tpm

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"

	"countersign/internal/keystore"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// Inspect says what the TPM is, how it is, and what it would seal to, and proves each algorithm with a throw-away key.
func (s *Store) Inspect(ctx context.Context) (found []keystore.Finding, err error) {
	say := func(what string, alg keystore.Algorithm, ok bool, format string, args ...any) {
		found = append(found, keystore.Finding{What: what, For: alg, OK: ok, Text: fmt.Sprintf(format, args...)})
	}
	err = s.bus.use(ctx, func(t transport.TPM) error {
		is, err := properties(t)
		if err != nil {
			return err
		}
		say("tpm", "", true, "manufacturer %s, model %s, firmware %d.%d.%d.%d, specification %s revision %d.%02d of %d",
			text(is[tpm2.TPMPTManufacturer]),
			text(is[tpm2.TPMPTVendorString1], is[tpm2.TPMPTVendorString1+1], is[tpm2.TPMPTVendorString1+2], is[tpm2.TPMPTVendorString1+3]),
			is[tpm2.TPMPTFirmwareVersion1]>>16, is[tpm2.TPMPTFirmwareVersion1]&0xffff, is[tpm2.TPMPTFirmwareVersion2]>>16, is[tpm2.TPMPTFirmwareVersion2]&0xffff,
			text(is[tpm2.TPMPTFamilyIndicator]), is[tpm2.TPMPTRevision]/100, is[tpm2.TPMPTRevision]%100, is[tpm2.TPMPTYear])
		locked := is[tpm2.TPMPTPermanent]&(1<<9) != 0 // TPMA_PERMANENT, inLockout
		say("lockout", "", !locked, "%d of %d failed authorisations; one is forgotten each %d s; locked: %v",
			is[tpm2.TPMPTLockoutCounter], is[tpm2.TPMPTMaxAuthFail], is[tpm2.TPMPTLockoutInterval], locked)
		say("counters", "", true, "%d NV counters are defined, %d more fit at the least", is[tpm2.TPMPTNVCounters], is[tpm2.TPMPTNVCountersAvail])
		banks, err := pcrBanks(t)
		if err != nil {
			return err
		}
		say("pcr", "", true, "banks: %s", strings.Join(banks, ", "))
		pcrs, err := readPCRs(t, s.config.PCRs)
		if err != nil {
			say("pcr", "", false, "%v", err)
			return nil
		}
		for _, p := range pcrs {
			say("seal to", "", true, "PCR %d (%s): %s", p.Index, measures[p.Index], hex.EncodeToString(p.Value))
		}
		say("seal to", "", true, "PIN: %v; storage root key %x", s.config.PINFile != "", s.srk.name.Buffer)
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, alg := range keystore.Algorithms {
		info := keystore.Info{Ref: keystore.Ref{Name: "throw-away", Version: 1}, Algorithm: alg}
		seed := newSeed
		custody := keystore.TPMSealed
		if alg == keystore.P256 {
			seed, custody = nil, keystore.TPMResident
		}
		err := s.withPIN(ctx, s.config.PINFile != "", func(pin []byte) error {
			return s.bus.use(ctx, func(t transport.TPM) (err error) {
				secretly(func() { err = s.make(t, &record{Format: 1, Info: info}, pin, seed) })
				return err
			})
		})
		if err != nil {
			say("proof", alg, false, "%v", err)
		} else {
			say("proof", alg, true, "a throw-away key was made and used (%s)", custody)
		}
	}
	return found, nil
}

// properties returns the TPM's properties (TPM 2.0 Part 2, section 6.13).
func properties(t transport.TPM) (map[tpm2.TPMPT]uint32, error) {
	all := map[tpm2.TPMPT]uint32{}
	for _, group := range []tpm2.TPMPT{tpm2.TPMPTFamilyIndicator, tpm2.TPMPTPermanent} {
		got, err := tpm2.GetCapability{Capability: tpm2.TPMCapTPMProperties, Property: uint32(group), PropertyCount: 64}.Execute(t)
		if err != nil {
			return nil, deviceError("TPM2_GetCapability", err)
		}
		list, err := got.CapabilityData.Data.TPMProperties()
		if err != nil {
			return nil, deviceError("TPM2_GetCapability", err)
		}
		for _, p := range list.TPMProperty {
			all[p.Property] = p.Value
		}
	}
	return all, nil
}

func pcrBanks(t transport.TPM) (banks []string, err error) {
	got, err := tpm2.GetCapability{Capability: tpm2.TPMCapPCRs, PropertyCount: 16}.Execute(t)
	if err != nil {
		return nil, deviceError("TPM2_GetCapability", err)
	}
	list, err := got.CapabilityData.Data.AssignedPCR()
	if err != nil {
		return nil, deviceError("TPM2_GetCapability", err)
	}
	for _, b := range list.PCRSelections {
		if strings.Trim(string(b.PCRSelect), "\x00") != "" {
			banks = append(banks, fmt.Sprint(b.Hash))
		}
	}
	return banks, nil
}

// text reads properties that hold four characters each.
func text(values ...uint32) string {
	var b []byte
	for _, v := range values {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	return strings.TrimSpace(strings.TrimRight(string(b), "\x00"))
}
