package image

import (
	"bytes"
	"crypto/sha256"
	"debug/pe"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf16"

	"countersign/internal/update"
	"countersign/tpm"
)

// Section is a part of a unified kernel image (UAPI.5). The name begins with a dot.
type Section struct {
	Name string
	Data []byte
}

// measured are the sections that systemd-stub 252 measures into PCR 11, in its order
// (src/boot/efi/stub.c; the order is that of enum UnifiedSection).
var measured = []string{".linux", ".osrel", ".cmdline", ".initrd", ".splash", ".dtb", ".pcrpkey"}

// PCR11 is the value of register 11 after systemd-stub has measured the sections and before any
// phase of the boot: for each section, the name with a zero byte, and the content.
func PCR11(sections []Section) []byte {
	register := make(register, sha256.Size)
	for _, name := range measured {
		i := slices.IndexFunc(sections, func(s Section) bool { return s.Name == name })
		if i < 0 {
			continue
		}
		register.extend(append([]byte(name), 0))
		register.extend(sections[i].Data)
	}
	return register
}

// PCR12 is the value of register 12 after systemd-boot 252 has measured the command line that it
// passes on: in UTF-16, with the zero at the end.
func PCR12(cmdline string) []byte {
	register, text := make(register, sha256.Size), []byte{}
	for _, unit := range append(utf16.Encode([]rune(cmdline)), 0) {
		text = binary.LittleEndian.AppendUint16(text, unit)
	}
	register.extend(text)
	return register
}

// register is a register of the bank sha256.
type register []byte

func (r register) extend(what []byte) {
	digest := sha256.Sum256(what)
	next := sha256.Sum256(append(slices.Clone(r), digest[:]...))
	copy(r, next[:])
}

// Manifest reads from a unified kernel image what its manifest says: version, variant, and the
// newest rollback version that its measurements are signed for.
func Manifest(uki []byte) (m update.Manifest, err error) {
	f, err := pe.NewFile(bytes.NewReader(uki))
	if err != nil {
		return m, fmt.Errorf("it is no unified kernel image: %w", err)
	}
	read := func(name string) ([]byte, error) {
		s := f.Section(name)
		if s == nil {
			return nil, fmt.Errorf("it is no unified kernel image of this project: there is no section %s", name)
		}
		b, err := s.Data()
		return b[:min(int(s.VirtualSize), len(b))], err
	}
	release, err := read(".osrel")
	if err != nil {
		return m, err
	}
	for line := range strings.Lines(string(release)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		switch name {
		case "IMAGE_VERSION":
			m.Version = value
		case "IMAGE_ID":
			m.Variant = strings.TrimPrefix(value, "countersign-")
		}
	}
	signed, err := read(".pcrsig")
	if err != nil {
		return m, err
	}
	var states []tpm.ImageState
	if err := json.Unmarshal(signed, &states); err != nil {
		return m, fmt.Errorf("the image: section .pcrsig: %w", err)
	}
	for _, s := range states {
		m.Rollback = max(m.Rollback, s.Minimum)
	}
	sum := sha256.Sum256(uki)
	m.Size, m.SHA256 = int64(len(uki)), hex.EncodeToString(sum[:])
	return m, m.Check()
}

// Offsets in a PE file (PE Format, "COFF File Header" and "Optional Header PE32+").
const (
	peOffsetAt      = 0x3c
	coffSize        = 20
	sizeOfInitData  = 8  // in the optional header
	sectionAlignAt  = 32 //
	fileAlignAt     = 36
	sizeOfImageAt   = 56
	sizeOfHeadersAt = 60
	checksumAt      = 64
	sectionSize     = 40
	initialisedRead = 0x40000040 // IMAGE_SCN_CNT_INITIALIZED_DATA | IMAGE_SCN_MEM_READ
)

// UKI adds sections to systemd's stub. The result has no signature, no checksum and no time.
func UKI(stub []byte, sections []Section) ([]byte, error) {
	f, err := pe.NewFile(bytes.NewReader(stub))
	if err != nil {
		return nil, fmt.Errorf("the stub: %w", err)
	}
	if _, is := f.OptionalHeader.(*pe.OptionalHeader64); !is {
		return nil, errors.New("the stub is not PE32+")
	}
	le := binary.LittleEndian
	out := bytes.Clone(stub)
	coff := int(le.Uint32(out[peOffsetAt:])) + 4
	optional := coff + coffSize
	table := optional + int(f.FileHeader.SizeOfOptionalHeader)
	at := table + len(f.Sections)*sectionSize
	align, fileAlign := max(4096, le.Uint32(out[optional+sectionAlignAt:])), le.Uint32(out[optional+fileAlignAt:])
	headers := le.Uint32(out[optional+sizeOfHeadersAt:])
	up := func(n, to uint32) uint32 { return (n + to - 1) / to * to }

	var free, first, end uint32
	for i, s := range f.Sections {
		free, end = max(free, s.VirtualAddress+s.VirtualSize), max(end, s.Offset+s.Size)
		if i == 0 || s.Offset < first {
			first = s.Offset
		}
	}
	out = out[:end] // behind the sections are symbols only, and firmware and sbsign hash such a gap differently
	if at+len(sections)*sectionSize > int(min(first, headers)) {
		// The table needs room: what is behind the headers moves, in the file only.
		grow := up(uint32(at+len(sections)*sectionSize), fileAlign) - headers
		out = slices.Concat(out[:headers], make([]byte, grow), out[headers:])
		for i := range f.Sections {
			p := table + i*sectionSize + 20 // PointerToRawData
			if offset := le.Uint32(out[p:]); offset != 0 {
				le.PutUint32(out[p:], offset+grow)
			}
		}
		headers += grow
		le.PutUint32(out[optional+sizeOfHeadersAt:], headers)
		for _, s := range f.Sections {
			if s.VirtualAddress < headers {
				return nil, errors.New("the stub has no room for more sections")
			}
		}
	}
	var added uint32
	for _, s := range sections {
		if len(s.Name) > 8 {
			return nil, fmt.Errorf("section %s: its name is too long", s.Name)
		}
		free = up(free, align)
		out = append(out, make([]byte, int(up(uint32(len(out)), fileAlign))-len(out))...)
		header := out[at : at+sectionSize]
		clear(header)
		copy(header, s.Name)
		raw := up(uint32(len(s.Data)), fileAlign)
		for i, v := range []uint32{uint32(len(s.Data)), free, raw, uint32(len(out))} {
			le.PutUint32(header[8+4*i:], v)
		}
		le.PutUint32(header[36:], initialisedRead)
		out = append(append(out, s.Data...), make([]byte, int(raw)-len(s.Data))...)
		free += uint32(len(s.Data))
		added += raw
		at += sectionSize
	}
	le.PutUint16(out[coff+2:], uint16(len(f.Sections)+len(sections)))
	clear(out[coff+4 : coff+16]) // time, place and number of symbols
	le.PutUint32(out[optional+sizeOfInitData:], le.Uint32(out[optional+sizeOfInitData:])+added)
	le.PutUint32(out[optional+sizeOfImageAt:], up(free, align))
	le.PutUint32(out[optional+checksumAt:], 0)
	return out, nil
}
