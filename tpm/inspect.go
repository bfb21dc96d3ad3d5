package tpm

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"

	"countersign/internal/keystore"
	"countersign/internal/secret"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// Inspect reports the TPM's model and state and the policy of new keys. With prove, Inspect tests
// each algorithm with a temporary key.
func (s *Store) Inspect(ctx context.Context, prove bool) (found []keystore.Finding, err error) {
	report := func(what string, alg keystore.Algorithm, ok bool, format string, args ...any) {
		found = append(found, keystore.Finding{What: what, For: alg, OK: ok, Text: fmt.Sprintf(format, args...)})
	}
	err = s.bus.use(ctx, func(t transport.TPM) error {
		props, err := properties(t)
		if err != nil {
			return err
		}
		report("tpm", "", true,
			"manufacturer %s, model %s, firmware %d.%d.%d.%d, specification %s revision %d.%02d of %d",
			text(props[tpm2.TPMPTManufacturer]),
			text(props[tpm2.TPMPTVendorString1], props[tpm2.TPMPTVendorString1+1],
				props[tpm2.TPMPTVendorString1+2], props[tpm2.TPMPTVendorString1+3]),
			props[tpm2.TPMPTFirmwareVersion1]>>16, props[tpm2.TPMPTFirmwareVersion1]&0xffff,
			props[tpm2.TPMPTFirmwareVersion2]>>16, props[tpm2.TPMPTFirmwareVersion2]&0xffff,
			text(props[tpm2.TPMPTFamilyIndicator]), props[tpm2.TPMPTRevision]/100, props[tpm2.TPMPTRevision]%100,
			props[tpm2.TPMPTYear])
		locked := props[tpm2.TPMPTPermanent]&(1<<9) != 0 // TPMA_PERMANENT, inLockout
		report("lockout", "", !locked, "%d of %d failed authorisations; one is forgotten each %d s; locked: %v",
			props[tpm2.TPMPTLockoutCounter], props[tpm2.TPMPTMaxAuthFail], props[tpm2.TPMPTLockoutInterval], locked)
		report("counters", "", true, "%d NV counters are defined, %d more fit at the least",
			props[tpm2.TPMPTNVCounters], props[tpm2.TPMPTNVCountersAvail])
		banks, err := pcrBanks(t)
		if err != nil {
			return err
		}
		report("pcr", "", true, "banks: %s", strings.Join(banks, ", "))
		pcrs, err := readPCRs(t, s.config.PCRBank, s.config.PCRs)
		if err != nil {
			report("pcr", "", false, "%v", err)
			return nil
		}
		for _, p := range pcrs {
			report("seal to", "", true, "PCR %d (%s), bank %s: %s", p.Index, pcrContents[p.Index],
				s.config.PCRBank, hex.EncodeToString(p.Value))
		}
		if err := checkMeasured(s.config.PCRBank, pcrs, s.config.ZeroPCRs); err != nil && s.approver == nil {
			report("seal to", "", false, "%v", err)
		}
		sealed, err := s.sealedTo()
		if err != nil {
			return err
		}
		for _, at := range slices.SortedFunc(maps.Keys(sealed), compareRegisters) {
			text, same := at.compare(t, sealed[at])
			// Keys with an approver can be used in other states too.
			report("measured", "", same || s.approver != nil, "%s", text)
		}
		report("seal to", "", true, "PIN: %v; storage root key %x at %#x",
			s.config.PINFile != "", s.srk.name.Buffer, uint32(s.srk.handle))
		return nil
	})
	if err != nil || !prove {
		return found, err
	}
	for _, alg := range keystore.Algorithms {
		info := keystore.Info{Ref: keystore.Ref{Name: "throw-away", Version: 1}, Algorithm: alg}
		seed := newSeed
		custody := keystore.TPMSealed
		if alg == keystore.P256 {
			seed, custody = nil, keystore.TPMResident
		}
		err := s.withPIN(ctx, s.config.PINFile != "", func(pin secret.Bytes) error {
			return s.bus.use(ctx, func(t transport.TPM) (err error) {
				secret.Do(func() { err = s.make(t, &record{Format: 1, Info: info}, pin, seed) })
				return err
			})
		})
		if err != nil {
			report("proof", alg, false, "%v", err)
		} else {
			report("proof", alg, true, "a throw-away key was made and used (%s)", custody)
		}
	}
	return found, nil
}

// properties returns the TPM's properties (TPM 2.0 Part 2, section 6.13).
func properties(t transport.TPM) (map[tpm2.TPMPT]uint32, error) {
	all := map[tpm2.TPMPT]uint32{}
	for _, group := range []tpm2.TPMPT{tpm2.TPMPTFamilyIndicator, tpm2.TPMPTPermanent} {
		got, err := tpm2.GetCapability{
			Capability: tpm2.TPMCapTPMProperties, Property: uint32(group), PropertyCount: 64,
		}.Execute(t)
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

// pcrBanks returns the names of the active PCR banks.
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
			banks = append(banks, bankName(b.Hash))
		}
	}
	return banks, nil
}

// text decodes properties of four characters each.
func text(values ...uint32) string {
	var b []byte
	for _, v := range values {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	return strings.TrimSpace(strings.TrimRight(string(b), "\x00"))
}

// register is a PCR of a bank.
type register struct {
	bank  Bank
	index uint
}

func (r register) String() string {
	return fmt.Sprintf("PCR %d (%s), bank %s", r.index, pcrContents[r.index], r.bank)
}

func compareRegisters(x, y register) int {
	return cmp.Or(strings.Compare(x.bank.String(), y.bank.String()), cmp.Compare(x.index, y.index))
}

// sealedTo returns the registers that keys are sealed to, each with its values at the times of
// sealing, one for each key.
func (s *Store) sealedTo() (map[register][][]byte, error) {
	refs, err := s.Keys(context.Background())
	if err != nil {
		return nil, err
	}
	all := map[register][][]byte{}
	for _, ref := range refs {
		r, err := s.dir.read(ref)
		if err != nil {
			continue // the key's own fault is told elsewhere
		}
		for _, p := range r.Sealed.PCRs {
			at := register{r.Sealed.Bank, p.Index}
			all[at] = append(all[at], p.Value)
		}
	}
	return all, nil
}

// compare says whether a register has the value that keys were sealed to.
func (r register) compare(t transport.TPM, sealed [][]byte) (text string, same bool) {
	now, err := readPCRs(t, r.bank, []uint{r.index})
	if err != nil {
		return fmt.Sprintf("%v: %v", r, err), false
	}
	is := now[0].Value
	others := slices.DeleteFunc(slices.Clone(sealed), func(was []byte) bool { return bytes.Equal(was, is) })
	if len(others) == 0 {
		return fmt.Sprintf("%v: as sealed, for all %d keys: %x", r, len(sealed), is), true
	}
	return fmt.Sprintf("%v: another value than sealed for %d of %d keys: it is %x and was %x",
		r, len(others), len(sealed), is, others[0]), false
}
