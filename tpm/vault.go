package tpm

import (
	"fmt"
	"os"

	"countersign/internal/eddsa"

	"golang.org/x/sys/unix"
)

// vault is memory for at most maxKeys secrets, in slots of slotSize bytes. With memfd_secret(2) the
// pages are in no other mapping, not even the kernel's own, and can't be read through /proc. On a
// kernel without memfd_secret the pages are locked in memory and excluded from core files.
type vault struct {
	memory []byte
	used   int
}

const (
	slotSize = eddsa.ExpandedSize // an expanded Ed25519 key, or an X25519 scalar
	maxKeys  = 4096
)

// newVault maps the memory.
func newVault() (*vault, error) {
	size := slotSize * maxKeys
	if fd, err := unix.MemfdSecret(unix.O_CLOEXEC); err == nil {
		defer unix.Close(fd)
		if err := unix.Ftruncate(fd, int64(size)); err == nil {
			if memory, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
				return &vault{memory: memory}, nil
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
	return &vault{memory: memory}, nil
}

// slot returns memory for one key, valid until wipe.
func (v *vault) slot() ([]byte, error) {
	if v.used == maxKeys {
		return nil, fmt.Errorf("tpm: %d keys are in use, the limit of a store", maxKeys)
	}
	at := v.used * slotSize
	v.used++
	return v.memory[at : at+slotSize : at+slotSize], nil
}

// wipe clears all slots and makes them free.
func (v *vault) wipe() {
	clear(v.memory[:v.used*slotSize])
	v.used = 0
}

func (v *vault) close() {
	v.wipe()
	unix.Munmap(v.memory)
	v.memory = nil
}
