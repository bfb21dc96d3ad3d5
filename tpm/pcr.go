package tpm

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"

	"countersign/internal/keystore"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// pcr is a platform configuration register of the SHA-256 bank, with its value.
type pcr struct {
	Index uint   `json:"index"`
	Value []byte `json:"value"` // 32 bytes
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

func selection(pcrs []pcr) tpm2.TPMLPCRSelection { return selectionOf(indicesOf(pcrs)) }

func selectionOf(indices []uint) tpm2.TPMLPCRSelection {
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
		{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(indices...)},
	}}
}

// digestOf returns the digest compared by PolicyPCR: SHA-256 of the values in the order of pcrs,
// which is by index.
func digestOf(pcrs []pcr) []byte {
	h := sha256.New()
	for _, p := range pcrs {
		h.Write(p.Value)
	}
	return h.Sum(nil)
}

// readPCRs returns the registers with their values, sorted by index and without duplicates.
func readPCRs(t transport.TPM, indices []uint) (all []pcr, err error) {
	sorted := slices.Compact(slices.Sorted(slices.Values(indices)))
	for part := range slices.Chunk(sorted, 8) { // a response has room for 8 values
		got, err := tpm2.PCRRead{PCRSelectionIn: selectionOf(part)}.Execute(t)
		if err != nil {
			return nil, deviceError("TPM2_PCR_Read", err)
		}
		if len(got.PCRValues.Digests) != len(part) {
			return nil, fmt.Errorf("tpm: %w: the TPM has no PCR bank of SHA-256 with all of the registers %d; "+
				"choose others, or activate the bank in the firmware", keystore.ErrRefused, part)
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
	now, failed := readPCRs(t, indicesOf(d.PCRs))
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
