//go:build unix

package keystore

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"countersign/internal/secret"
)

// Key workers and the daemon read secret files, and neither runs on Windows. The tool of peers
// builds there, and does without the functions of this file.

// ReadSeed reads the Ed25519 seed (RFC 8032, section 5.1.5: the 32-byte private key) from a file
// without permissions for group and others. The caller wipes the seed after use.
func ReadSeed(path string) (seed secret.Bytes, err error) {
	b, err := ReadSecret(path, "seed file")
	if err != nil {
		return seed, err
	}
	defer b.Wipe()
	if seed, err = ParseSeed(b.Expose()); err != nil {
		return seed, fmt.Errorf("seed file %s: %w", path, err)
	}
	return seed, nil
}

// maxSecret is the largest size of a secret file in bytes, far above a PIN's or a seed's.
const maxSecret = 4096

// CheckSecret returns the error about permissions that ReadSecret has for a file. A file that can't
// be opened has none.
func CheckSecret(what, path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // opening a FIFO must not block
	if err != nil {
		return nil
	}
	defer f.Close()
	st, err := f.Stat()
	if err == nil {
		err = onlyForUs(f, st)
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w", what, path, err)
	}
	return nil
}

// ReadSecret reads a file of at most 4096 bytes without permissions for group and others, or with
// an ACL for this process's user alone. Errors call the file by the argument what, for example
// "seed file".
func ReadSecret(path, what string) (none secret.Bytes, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // opening a FIFO must not block
	if err != nil {
		return none, fmt.Errorf("%s: %w", what, err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return none, fmt.Errorf("%s: %w", what, err)
	}
	if err := onlyForUs(f, st); err != nil {
		return none, fmt.Errorf("%s %s: %w", what, path, err)
	}
	if st.Size() > maxSecret {
		return none, fmt.Errorf("%s %s: it has %d bytes; at most %d are allowed", what, path, st.Size(), maxSecret)
	}
	b := make([]byte, maxSecret)
	n, err := io.ReadFull(f, b)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return none, fmt.Errorf("%s: %w", what, err)
	}
	return secret.New(b[:n]), nil
}
