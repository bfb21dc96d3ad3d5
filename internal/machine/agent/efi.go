package agent

import (
	"encoding/binary"
	"os"
	"strings"
	"unicode/utf16"
)

// EFI variables, with 4 bytes of attributes before the value (Linux,
// Documentation/filesystems/efivarfs.rst).
const (
	efivars      = "/sys/firmware/efi/efivars/"
	globalVendor = "8be4df61-93ca-11d2-aa0d-00e098032b8c" // UEFI specification, section 3.3
	loaderVendor = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f" // Boot Loader Interface
)

// efiText returns an EFI variable with a text; "" is none.
func efiText(name string) string {
	b, err := os.ReadFile(efivars + name)
	if err != nil || len(b) < 4 {
		return ""
	}
	b = b[4:]
	var units []uint16
	for ; len(b) >= 2; b = b[2:] {
		units = append(units, binary.LittleEndian.Uint16(b))
	}
	return strings.TrimRight(string(utf16.Decode(units)), "\x00")
}
