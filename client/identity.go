package client

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"countersign/internal/ownfile"
	"countersign/noise"
)

// WriteIdentity makes a fresh identity and writes a new identity file with mode 0600, on Windows
// with an access list for the user, SYSTEM and Administrators. The file has a comment line with the
// public key, then the private key as 64 hex digits. WriteIdentity never overwrites an existing
// file.
func WriteIdentity(path string) (*noise.Identity, error) {
	id, err := noise.NewIdentity()
	if err != nil {
		return nil, err
	}
	f, err := ownfile.Create(path)
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

// ReadIdentity reads an identity file, and refuses a file to which group or others have access, on
// Windows anybody but the user, SYSTEM and Administrators. Comment lines begin with #.
func ReadIdentity(path string) (*noise.Identity, error) {
	if err := ownfile.CheckSecret(path); err != nil {
		return nil, err
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
