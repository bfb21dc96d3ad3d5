package tpm

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"

	"countersign/internal/keystore"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// pcr is a platform configuration register, with its value in one bank.
type pcr struct {
	Index uint   `json:"index"`
	Value []byte `json:"value"` // as long as a hash of the bank
}

// Bank is the name of a PCR bank: of the hash algorithm by which the bank's registers are extended.
// The empty name stands for sha256.
type Bank string

func (b Bank) String() string { return cmp.Or(string(b), "sha256") }

// stored returns the bank for a record. Records had no bank before 2026-11-29, and all were of
// sha256.
func (b Bank) stored() Bank {
	if b == "sha256" {
		return ""
	}
	return b
}

// banks has the hash algorithms that a bank can have (TCG Algorithm Registry, section 6.10). Seals
// to a bank without a size are refused: SHA-1 is broken, and the others are not in go-tpm.
var banks = []struct {
	name string
	hash tpm2.TPMIAlgHash
	size int // bytes of a register
}{
	{"sha256", tpm2.TPMAlgSHA256, 32}, {"sha384", tpm2.TPMAlgSHA384, 48}, {"sha512", tpm2.TPMAlgSHA512, 64},
	{"sha1", tpm2.TPMAlgSHA1, 0}, {"sm3-256", 0x0012, 0},
	{"sha3-256", 0x0027, 0}, {"sha3-384", 0x0028, 0}, {"sha3-512", 0x0029, 0},
}

// Check returns an error for a bank to which no key can be sealed.
func (b Bank) Check() error {
	if _, size := b.hash(); size > 0 {
		return nil
	}
	return fmt.Errorf("%q is none of sha256, sha384, sha512", string(b))
}

// hash returns the bank's algorithm and the size of its registers in bytes. The bank of a damaged
// record has none.
func (b Bank) hash() (tpm2.TPMIAlgHash, int) {
	for _, known := range banks {
		if known.name == b.String() {
			return known.hash, known.size
		}
	}
	return tpm2.TPMAlgNull, 0
}

// bankName returns the name of a bank's algorithm, or its number.
func bankName(hash tpm2.TPMIAlgHash) string {
	for _, known := range banks {
		if known.hash == hash {
			return known.name
		}
	}
	return fmt.Sprintf("%#04x", uint16(hash))
}

// lastPCR is the last register of a PC (TCG PC Client Platform TPM Profile, section 4.6).
const lastPCR = 23

// CheckPCRs returns an error for the number of a register that no TPM has.
func CheckPCRs(indices []uint) error {
	for _, index := range indices {
		if index > lastPCR {
			return fmt.Errorf("there is no PCR %d: the last one is %d", index, lastPCR)
		}
	}
	return nil
}

// unmeasured returns the registers that nothing has been measured into, and that allowed does not
// name. Such a register has all bits clear or, from 17 to 22, all bits set.
func unmeasured(pcrs []pcr, allowed []uint) (found []uint) {
	for _, p := range pcrs {
		same := func(b byte) bool { return len(bytes.Trim(p.Value, string([]byte{b}))) == 0 }
		if (same(0) || same(0xff)) && !slices.Contains(allowed, p.Index) {
			found = append(found, p.Index)
		}
	}
	return found
}

// checkMeasured refuses registers without a measurement: a seal to them would hold in every state.
func checkMeasured(bank Bank, pcrs []pcr, allowed []uint) error {
	found := unmeasured(pcrs, allowed)
	if len(found) == 0 {
		return nil
	}
	list := strings.Trim(strings.ReplaceAll(fmt.Sprint(found), " ", ", "), "[]")
	return fmt.Errorf("tpm: %w: nothing has been measured into PCR %s of the bank %s (all its bits are alike), "+
		"so a key sealed to it could be used whatever this machine has booted; take other pcrs, activate "+
		"the bank in the firmware, or name it on purpose: zero_pcrs = [%s]",
		keystore.ErrRefused, list, bank, list)
}

// pcrContents describes the usual measurements in each register. Sources: TCG PC Client Platform
// Firmware Profile, section 3.3.4; from 8 on the documentation of systemd and shim.
var pcrContents = map[uint]string{
	0:  "the firmware's code",
	1:  "the firmware's settings",
	2:  "code of option ROMs and boot-time drivers",
	3:  "their settings",
	4:  "the boot loader",
	5:  "its settings and the partition table",
	6:  "the manufacturer's own",
	7:  "the Secure Boot state and its certificates",
	8:  "the boot loader's commands",
	9:  "the kernel and initrd as the boot loader read them",
	10: "files, by the kernel's IMA",
	11: "the unified kernel image and the phase of the boot",
	12: "the kernel's command line and other overrides",
	13: "system extensions",
	14: "shim's certificates and hashes",
	15: "the machine's identity and the root volume",
	16: "debugging",
	23: "an application",
}

func indicesOf(pcrs []pcr) (indices []uint) {
	for _, p := range pcrs {
		indices = append(indices, p.Index)
	}
	return indices
}

func selection(bank Bank, pcrs []pcr) tpm2.TPMLPCRSelection {
	return selectionOf(bank, indicesOf(pcrs))
}

func selectionOf(bank Bank, indices []uint) tpm2.TPMLPCRSelection {
	hash, _ := bank.hash()
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
		{Hash: hash, PCRSelect: tpm2.PCClientCompatible.PCRs(indices...)},
	}}
}

// digestOf returns the digest compared by PolicyPCR: SHA-256, whatever the bank, of the values in
// the order of pcrs, which is by index.
func digestOf(pcrs []pcr) []byte {
	h := sha256.New()
	for _, p := range pcrs {
		h.Write(p.Value)
	}
	return h.Sum(nil)
}

// readPCRs returns the registers with their values, sorted by index and without duplicates. The
// bank and the indices may be those of a damaged record.
func readPCRs(t transport.TPM, bank Bank, indices []uint) (all []pcr, err error) {
	if err := errors.Join(bank.Check(), CheckPCRs(indices)); err != nil {
		return nil, fmt.Errorf("tpm: %w: %w", keystore.ErrRefused, err)
	}
	_, size := bank.hash()
	sorted := slices.Compact(slices.Sorted(slices.Values(indices)))
	for part := range slices.Chunk(sorted, 8*sha256.Size/size) { // a response has room for 8 values of SHA-256
		got, err := tpm2.PCRRead{PCRSelectionIn: selectionOf(bank, part)}.Execute(t)
		if err != nil {
			return nil, deviceError("TPM2_PCR_Read", err)
		}
		if len(got.PCRValues.Digests) != len(part) {
			return nil, fmt.Errorf("tpm: %w: the TPM has no active PCR bank %s with all of the registers %d; "+
				"choose others or another pcr_bank, or activate the bank in the firmware",
				keystore.ErrRefused, bank, part)
		}
		for i, index := range part {
			all = append(all, pcr{index, got.PCRValues.Digests[i].Buffer})
		}
	}
	return all, nil
}

// explainPolicy adds to the error of a refused policy the registers that differ from the sealed
// state, and advice for the operator.
func explainPolicy(t transport.TPM, d sealed, err error) error {
	if !errors.Is(err, tpm2.TPMRCPolicyFail) && !errors.Is(err, tpm2.TPMRCPCRChanged) {
		return err
	}
	now, failed := readPCRs(t, d.Bank, indicesOf(d.PCRs))
	if failed != nil {
		return errors.Join(err, failed)
	}
	var differ []string
	for i, p := range d.PCRs {
		if string(now[i].Value) != string(p.Value) {
			contents := pcrContents[p.Index]
			if contents == "" {
				contents = "nothing by convention"
			}
			differ = append(differ, fmt.Sprintf("PCR %d, which measures %s, is %x… and was %x…",
				p.Index, contents, now[i].Value[:4], p.Value[:4]))
		}
	}
	if len(differ) == 0 { // the state has changed back meanwhile, or the record has another policy than the object
		return err
	}
	return fmt.Errorf("tpm: %w: %s; if that change was wanted, boot the former state or seal the keys anew, "+
		"else find out who made it (%v)", keystore.ErrSealed, strings.Join(differ, "; "), err)
}
