package keystore

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
)

// seedPrefix begins the form in which Paykit's Locks server keeps a seed.
const seedPrefix = "keypair-seed:"

// ReadSeed reads the Ed25519 seed (RFC 8032, section 5.1.5: the 32-byte private key) from a file that only its owner can
// read. The caller clears the seed after use.
func ReadSeed(path string) (seed [32]byte, err error) {
	b, err := ReadSecret(path, "seed file")
	if err != nil {
		return seed, err
	}
	defer clear(b)
	if seed, err = ParseSeed(b); err != nil {
		return seed, fmt.Errorf("seed file %s: %w", path, err)
	}
	return seed, nil
}

// ParseSeed reads a seed: 32 bytes as they are, or one line of text with 64 hex digits or keypair-seed: and base64url.
// The error does not tell anything of the seed.
func ParseSeed(b []byte) (seed [32]byte, err error) {
	if len(b) == len(seed) {
		return [32]byte(b), nil
	}
	text := bytes.TrimRight(b, "\r\n")
	buf := make([]byte, 64)
	defer clear(buf)
	n := 0
	if coded, ok := bytes.CutPrefix(text, []byte(seedPrefix)); ok && len(coded) <= 44 {
		n, err = base64.RawURLEncoding.Strict().Decode(buf, bytes.TrimRight(coded, "="))
	} else if len(text) == hex.EncodedLen(len(seed)) {
		n, err = hex.Decode(buf, text)
	}
	if err != nil || n != len(seed) {
		return seed, errors.New("it must hold 32 bytes, or their 64 hex digits, or keypair-seed: and their base64url")
	}
	return [32]byte(buf[:n]), nil
}

// maxSecret is more than any secret in a file needs.
const maxSecret = 4096

// ReadSecret reads a file that only its owner can read. what names it in errors.
func ReadSecret(path, what string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a FIFO must not hang it
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	if !st.Mode().IsRegular() || st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s %s: its mode is %v; it must be a file that only its owner can read: chmod 600 %s", what, path, st.Mode(), path)
	}
	if st.Size() > maxSecret {
		return nil, fmt.Errorf("%s %s: %d bytes are too many", what, path, st.Size())
	}
	b := make([]byte, maxSecret)
	n, err := io.ReadFull(f, b)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return b[:n], nil
}
