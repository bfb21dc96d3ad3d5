package client

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"countersign/noise"
)

// WriteIdentity makes a fresh identity and writes it to a new file that only its owner can read: a comment line with the
// public key, then the private key as 64 hex digits. An existing file is never touched.
func WriteIdentity(path string) (*noise.Identity, error) {
	id, err := noise.NewIdentity()
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("%s exists: an identity is not overwritten; choose another name or move it away", path)
	} else if err != nil {
		return nil, err
	}
	public := id.Public()
	_, err = fmt.Fprintf(f, "# public key: %x\n%x\n", public, id.Private())
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		os.Remove(path)
		return nil, err
	}
	return id, nil
}

// ReadIdentity reads an identity file. Comment lines begin with #.
func ReadIdentity(path string) (*noise.Identity, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s: others may read this private key (mode %v): chmod 600 %s", path, st.Mode().Perm(), path)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var private []byte
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		if private != nil || len(line) != 64 {
			return nil, fmt.Errorf("%s: an identity file has comment lines and one line of 64 hex digits", path)
		}
		if private, err = hex.DecodeString(line); err != nil {
			return nil, fmt.Errorf("%s: the private key is not hex", path) // the error would quote it
		}
	}
	if private == nil {
		return nil, fmt.Errorf("%s: an identity file has comment lines and one line of 64 hex digits", path)
	}
	return noise.IdentityFrom(private)
}
