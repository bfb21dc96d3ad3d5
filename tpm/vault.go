package tpm

import (
	"fmt"
	"os"
	"slices"

	"countersign/internal/eddsa"

	"golang.org/x/sys/unix"
)

// vault is memory for at most maxKeys secrets, in slots of slotSize bytes. A key that leaves gives
// its slot back. With memfd_secret(2) the pages are in no other mapping, not even the kernel's own,
// and can't be read through /proc. On a kernel without memfd_secret the pages are locked in memory
// and excluded from core files.
type vault struct {
	memory []byte
	free   [][]byte
}

const slotSize = eddsa.ExpandedSize // an expanded Ed25519 key, or an X25519 scalar

// maxKeys is the number of keys in use at once. More keys take turns: see Store.addToVault.
var maxKeys = 4096

// newVault maps the memory.
func newVault() (*vault, error) {
	size := slotSize * maxKeys
	if fd, err := unix.MemfdSecret(unix.O_CLOEXEC); err == nil {
		defer unix.Close(fd)
		if err := unix.Ftruncate(fd, int64(size)); err == nil {
			if memory, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
				return vaultOf(memory), nil
			}
		}
	}
	memory, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("memory for secrets: %w", err)
	}
	for _, protect := range []func() error{
		func() error { return unix.Mlock(memory) },
		func() error { return unix.Madvise(memory, unix.MADV_DONTDUMP) },
		func() error { return unix.Madvise(memory, unix.MADV_WIPEONFORK) },
	} {
		if err := protect(); err != nil {
			unix.Munmap(memory)
			return nil, fmt.Errorf("memory for secrets can't be locked: %w; "+
				"raise the limit of locked memory (LimitMEMLOCK) to %d KiB", err, (size+os.Getpagesize())>>10)
		}
	}
	return vaultOf(memory), nil
}

// vaultOf returns a vault with all slots free.
func vaultOf(memory []byte) *vault {
	v := &vault{memory: memory}
	v.wipe()
	return v
}

// slot returns memory for one key, valid until put or wipe, or nil if no slot is free.
func (v *vault) slot() (memory []byte) {
	if n := len(v.free); n > 0 {
		memory, v.free = v.free[n-1], v.free[:n-1]
	}
	return memory
}

// put clears a slot and makes the slot free.
func (v *vault) put(memory []byte) {
	clear(memory)
	v.free = append(v.free, memory)
}

// wipe clears all slots and makes them free.
func (v *vault) wipe() {
	clear(v.memory)
	v.free = slices.Collect(slices.Chunk(v.memory, slotSize))
}

func (v *vault) close() {
	v.wipe()
	unix.Munmap(v.memory)
	v.memory, v.free = nil, nil
}
