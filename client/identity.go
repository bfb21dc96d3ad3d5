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

// WriteIdentity makes a fresh identity and writes a new identity file with mode 0600. The file has
// a comment line with the public key, then the private key as 64 hex digits. WriteIdentity never
// overwrites an existing file.
func WriteIdentity(path string) (*noise.Identity, error) {
	id, err := noise.NewIdentity()
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("%s exists, and an identity is never overwritten: choose another name", path)
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

// ReadIdentity reads an identity file, and refuses a file to which group or others have access.
// Comment lines begin with #.
func ReadIdentity(path string) (*noise.Identity, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s: mode %v gives others access to the private key: chmod 600 %s",
			path, st.Mode().Perm(), path)
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
			// hex's own error would quote a character of the private key.
			return nil, fmt.Errorf("%s: the private key has a character that is not a hex digit", path)
		}
	}
	if private == nil {
		return nil, fmt.Errorf("%s: an identity file has comment lines and one line of 64 hex digits", path)
	}
	return noise.IdentityFrom(private)
}
