// Package update reads and writes the files of updates of an image: a manifest, the signatures of
// the release keys, and a unified kernel image. The format is in docs/SPEC.md, "Updates of an
// image". Begin reading at Open.
package update

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"countersign/approval"
)

// Namespace is the namespace of the signatures of a manifest (ssh-keygen -Y sign -n).
const Namespace = "countersign-update-v1"

// Limits of a file.
const (
	maxManifest  = 1000 // bytes
	maxSignature = 4096 // bytes
	maxSigners   = 9
	MaxImage     = 512 << 20 // bytes
)

// ErrInvalid reports a file of another kind, or a damaged update.
var ErrInvalid = errors.New("not a valid update")

// Manifest describes an update. The release keys sign the text.
type Manifest struct {
	Version  string // of the image, such as 0.3.0
	Variant  string // vm or rack
	Rollback uint64 // rollback version: afterwards, the machine's disk opens in no older image
	Size     int64  // of the image, in bytes
	SHA256   string // of the image, in hex
}

var (
	// Versions have three numbers. systemd-boot sorts pre-releases in another order than semantic
	// versioning does.
	versionForm = regexp.MustCompile(`^(0|[1-9][0-9]{0,8})(\.(0|[1-9][0-9]{0,8})){2}$`)
	variantForm = regexp.MustCompile(`^[a-z]{1,16}$`)
	hashForm    = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

// Text is the canonical form: lines of a name and a value.
func (m Manifest) Text() string {
	return fmt.Sprintf("%s\nversion: %s\nvariant: %s\nrollback version: %d\nsize: %d\nsha256: %s\n",
		Namespace, m.Version, m.Variant, m.Rollback, m.Size, m.SHA256)
}

// Digest is the SHA-256 of the text, in hex. Operators approve the digest.
func (m Manifest) Digest() string {
	sum := sha256.Sum256([]byte(m.Text()))
	return hex.EncodeToString(sum[:])
}

// ParseManifest parses a text that Text has written, and refuses every other text.
func ParseManifest(text string) (m Manifest, err error) {
	values := map[string]string{}
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		values[name] = value
	}
	m.Version, m.Variant, m.SHA256 = values["version"], values["variant"], values["sha256"]
	m.Rollback, _ = strconv.ParseUint(values["rollback version"], 10, 32)
	m.Size, _ = strconv.ParseInt(values["size"], 10, 64)
	if len(text) > maxManifest || m.Text() != text {
		return m, fmt.Errorf("manifest: %w: the text is not in the canonical form", ErrInvalid)
	}
	return m, m.Check()
}

// Check returns an error for a manifest that can't be.
func (m Manifest) Check() error {
	switch {
	case !versionForm.MatchString(m.Version):
		return fmt.Errorf("manifest: %w: %q is no version, such as 0.3.0", ErrInvalid, clip(m.Version))
	case !variantForm.MatchString(m.Variant):
		return fmt.Errorf("manifest: %w: %q is no variant", ErrInvalid, clip(m.Variant))
	case m.Rollback == 0:
		return fmt.Errorf("manifest: %w: the rollback version is 0", ErrInvalid)
	case m.Size < 1 || m.Size > MaxImage:
		return fmt.Errorf("manifest: %w: an image of %d bytes; at most %d are possible", ErrInvalid, m.Size, MaxImage)
	case !hashForm.MatchString(m.SHA256):
		return fmt.Errorf("manifest: %w: there is no SHA-256", ErrInvalid)
	}
	return nil
}

func clip(s string) string { return s[:min(len(s), 40)] }

// Keys are the release keys, with the number of signatures that a manifest needs.
type Keys struct {
	Needed int
	Keys   []approval.Credential
}

// ParseKeys parses the text of release.keys: a line "needed N", and an SSH public key in each
// further line.
func ParseKeys(text string) (k Keys, err error) {
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch n, is := strings.CutPrefix(line, "needed "); {
		case is && k.Needed == 0:
			if k.Needed, err = strconv.Atoi(n); err != nil || k.Needed < 1 {
				return k, fmt.Errorf("release.keys: %q is no number of keys", clip(n))
			}
		case line == "" || line[0] == '#':
		default:
			c, err := approval.NewSSH(line)
			if err != nil {
				return k, fmt.Errorf("release.keys: %w", err)
			}
			if slices.ContainsFunc(k.Keys, func(o approval.Credential) bool { return o.PublicKey == c.PublicKey }) {
				return k, errors.New("release.keys: a key is there twice")
			}
			k.Keys = append(k.Keys, c)
		}
	}
	if k.Needed < 1 || k.Needed > len(k.Keys) {
		return k, fmt.Errorf("release.keys: of %d keys, %d would be needed", len(k.Keys), k.Needed)
	}
	return k, nil
}

// Verify returns an error unless enough of the keys have signed the text, each once. A signature of
// any other key is an error, too.
func (k Keys) Verify(text string, signatures []string) error {
	signed := map[string]bool{}
	for i, armored := range signatures {
		by := slices.IndexFunc(k.Keys, func(c approval.Credential) bool {
			_, err := c.Verify(Namespace, text, approval.Proof{Credential: c.ID, SSHSIG: armored})
			return err == nil
		})
		if by < 0 {
			return fmt.Errorf("signature %d: %w: it is by none of the %d keys of releases, or of another text "+
				"(ssh-keygen -Y sign -n %s)", i+1, approval.ErrNotProven, len(k.Keys), Namespace)
		}
		signed[k.Keys[by].PublicKey] = true
	}
	if len(signed) < k.Needed {
		return fmt.Errorf("update: %w: %d of the keys of releases have signed, and %d must", approval.ErrNotProven,
			len(signed), k.Needed)
	}
	return nil
}

// Names of the entries of a file, in their order.
const (
	manifestEntry  = "manifest"
	signatureEntry = "signature-" // and a number from 1 on
	imageEntry     = "image.efi"
)

// Write writes a file: a tar archive.
func Write(w io.Writer, m Manifest, signatures []string, image io.Reader) error {
	if err := m.Check(); err != nil {
		return err
	}
	t := tar.NewWriter(w)
	entry := func(name string, size int64, content io.Reader) error {
		err := t.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: size, Format: tar.FormatUSTAR})
		if err != nil {
			return err
		}
		_, err = io.Copy(t, content)
		return err
	}
	text := m.Text()
	if err := entry(manifestEntry, int64(len(text)), strings.NewReader(text)); err != nil {
		return err
	}
	for i, s := range signatures {
		if err := entry(signatureEntry+strconv.Itoa(i+1), int64(len(s)), strings.NewReader(s)); err != nil {
			return err
		}
	}
	if err := entry(imageEntry, m.Size, image); err != nil {
		return err
	}
	return t.Close()
}

// File is an update that is being read.
type File struct {
	Manifest   Manifest
	Text       string // of the manifest
	Signatures []string

	tar *tar.Reader
}

// Open reads a file up to its image, and verifies the signatures. Nothing of the file is believed
// before that but its lengths.
func Open(r io.Reader, keys Keys) (*File, error) {
	f, err := Peek(r)
	if err != nil {
		return nil, err
	}
	return f, keys.Verify(f.Text, f.Signatures)
}

// Peek is Open without a verification of the signatures.
func Peek(r io.Reader) (*File, error) {
	f := &File{tar: tar.NewReader(r)}
	text, err := f.entry(manifestEntry, maxManifest)
	if err != nil {
		return nil, err
	}
	f.Text = string(text)
	if f.Manifest, err = ParseManifest(f.Text); err != nil {
		return nil, err
	}
	for {
		h, err := f.tar.Next()
		switch {
		case err != nil:
			return nil, fmt.Errorf("update: %w: %w", ErrInvalid, err)
		case h.Typeflag != tar.TypeReg:
			return nil, fmt.Errorf("update: %w: an entry is no file", ErrInvalid)
		case h.Name == imageEntry && h.Size == f.Manifest.Size:
			return f, nil
		case h.Name != signatureEntry+strconv.Itoa(len(f.Signatures)+1) || h.Size > maxSignature ||
			len(f.Signatures) == maxSigners:
			return nil, fmt.Errorf("update: %w: the entry %q has no place in it", ErrInvalid, clip(h.Name))
		}
		s, err := io.ReadAll(f.tar)
		if err != nil {
			return nil, fmt.Errorf("update: %w: %w", ErrInvalid, err)
		}
		f.Signatures = append(f.Signatures, string(s))
	}
}

func (f *File) entry(name string, most int64) ([]byte, error) {
	h, err := f.tar.Next()
	if err != nil {
		return nil, fmt.Errorf("update: %w: %w", ErrInvalid, err)
	}
	if h.Name != name || h.Typeflag != tar.TypeReg || h.Size > most {
		return nil, fmt.Errorf("update: %w: it does not begin with a manifest", ErrInvalid)
	}
	b, err := io.ReadAll(f.tar)
	if err != nil {
		return nil, fmt.Errorf("update: %w: %w", ErrInvalid, err)
	}
	return b, nil
}

// CopyImage writes the image, and returns an error unless it is the manifest's, whole.
func (f *File) CopyImage(w io.Writer) error {
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(w, h), f.tar)
	if err != nil {
		return fmt.Errorf("update: the image: %w", err)
	}
	if n != f.Manifest.Size || hex.EncodeToString(h.Sum(nil)) != f.Manifest.SHA256 {
		return fmt.Errorf("update: %w: its image is not the one of its manifest", ErrInvalid)
	}
	return nil
}
