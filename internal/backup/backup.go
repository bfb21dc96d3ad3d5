// Package backup has the form of a backup: one file with the state of an appliance outside its
// keystore. Begin reading at Write, then at Extract. Package appliance decides what is in a backup.
//
// A file is encrypted with age (https://age-encryption.org/v1) to one or more recipients. Inside is
// a tar archive with, in this order:
//
//	the files of the manifest   named 0001, 0002 and so on; the ledger is the first
//	manifest.json               Manifest: what the files are, with their sizes and SHA-256
//	proof.json                  the proof that the appliance's audit log names the manifest
//
// The proof is the signature: the event BackupMade has SHA-256 of the manifest, and a checkpoint
// signed by the log's key includes the event. Nothing may follow, and nothing else may be inside.
package backup

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"countersign/audit"
	"countersign/internal/keystore"
	"countersign/internal/recipient"

	"filippo.io/age"
)

// format is the version of the form. A higher one belongs to a newer program.
const format = 1

// The names inside the archive beside the numbered files.
const (
	manifestName = "manifest.json"
	proofName    = "proof.json"
)

// Bounds of what is read into memory, and of the number of files.
const (
	maxDocument = 16 << 20
	maxFiles    = 10_000
)

// Errors of Extract.
var (
	// ErrRecipient: none of the identities is of a recipient.
	ErrRecipient = errors.New("the backup is encrypted to other recipients than the identities given")
	// ErrDamaged: the file is not what an appliance has written.
	ErrDamaged = errors.New("the backup is damaged, or is none")
	// ErrNewer: a newer program has written the file.
	ErrNewer = errors.New("the backup is of a newer version of countersign")
)

// Recipient is a public key that a backup is encrypted to, Identity the private key.
type (
	Recipient = recipient.Recipient
	Identity  = recipient.Identity
)

// The kinds of files.
const (
	Ledger        = "ledger"
	Configuration = "configuration"
	Policy        = "policy"
	Authority     = "certificate authority"
	TokenFile     = "token file" // of the folder of a TPM
)

var kinds = []string{Ledger, Configuration, Policy, Authority, TokenFile}

// File is a file of a backup.
type File struct {
	Kind   string `json:"kind"`
	Path   string `json:"path"`            // where the file was, absolute
	Token  string `json:"token,omitempty"` // with TokenFile
	Mode   uint32 `json:"mode"`            // permissions
	Size   int64  `json:"size"`            // bytes
	SHA256 string `json:"sha256"`          // hexadecimal
}

// Left is a file that the configuration names and that no backup has, because it is a secret.
type Left struct {
	Path string `json:"path"`
	What string `json:"what"`
}

// Key is a version of a key that the ledger has.
type Key struct {
	Ref       keystore.Ref       `json:"key"`
	Algorithm keystore.Algorithm `json:"algorithm"`
	Custody   keystore.Custody   `json:"custody"`
	Token     string             `json:"token"`
	State     string             `json:"state"`
	PublicKey string             `json:"public_key"` // hexadecimal
	// Recovery marks a recovery successor, whose token may lie in a safe.
	Recovery bool `json:"recovery,omitempty"`
	// Envelope is SHA-256 of the envelope of a recoverable key, hexadecimal. The ledger has it.
	Envelope string `json:"envelope,omitempty"`
}

// Manifest says what a backup has. The ledger's file is of the same moment as Epoch, First and
// Size.
type Manifest struct {
	Format  int    `json:"format"`
	Version string `json:"version"` // of the program
	LogKey  string `json:"log_key"` // public key of the audit log, hexadecimal: the name of the appliance
	MadeMS  int64  `json:"made_ms"` // Unix milliseconds by the system's clock, before the ledger is read
	Epoch   uint32 `json:"epoch"`   // the present one
	First   uint64 `json:"first"`   // number of its first event
	Size    uint64 `json:"size"`    // events of the epoch
	Root    string `json:"root"`    // root of its tree, base64
	Lists   uint64 `json:"lists"`   // number of the last list of writes in the ledger

	// ListsKey is the public key of the lists of writes that follow, hexadecimal. Without a key,
	// none are shipped.
	ListsKey string `json:"lists_key,omitempty"`

	Files []File `json:"files"`
	Left  []Left `json:"left"`
	Keys  []Key  `json:"keys"`
}

// head returns the tree of the ledger.
func (m Manifest) head() (c audit.Checkpoint, err error) {
	c.Epoch, c.Size = m.Epoch, m.Size
	return c, c.Root.UnmarshalText([]byte(m.Root))
}

// Made returns the time of the backup.
func (m Manifest) Made() time.Time { return time.UnixMilli(m.MadeMS).UTC() }

// Log returns the audit log of the appliance.
func (m Manifest) Log() (audit.Log, error) {
	public, err := hex.DecodeString(m.LogKey)
	if err != nil {
		return audit.Log{}, err
	}
	return audit.NewLog(public)
}

// Proof is the proof of the event BackupMade, and that the log of the ledger in the backup
// continues to the checkpoint of the proof.
type Proof struct {
	audit.Proof
	Consistency []audit.Hash `json:"consistency"`
}

// Contents is a backup that was read to its end, and is proven.
type Contents struct {
	Manifest
	Digest     string           // SHA-256 of the manifest, hexadecimal
	Event      uint64           // number of the event BackupMade
	Checkpoint audit.Checkpoint // includes the event
	Files      []string         // paths of the extracted files, in the order of the manifest
}

// Part is a file to be written.
type Part struct {
	File                       // without its size and hash
	Size int64                 // bytes that Copy writes
	Copy func(io.Writer) error // writes the content
}

// Bytes returns a Part with a content in memory.
func Bytes(f File, content []byte) Part {
	write := func(w io.Writer) error { _, err := w.Write(content); return err }
	return Part{File: f, Size: int64(len(content)), Copy: write}
}

// Write writes a backup, and returns the manifest with its format and files. prove writes the event
// with the digest of the manifest (SHA-256, hexadecimal), and returns its proof.
func Write(
	w io.Writer, to []Recipient, m Manifest, parts []Part, prove func(digest string) (Proof, error),
) (Manifest, error) {
	if len(parts) > maxFiles {
		return m, fmt.Errorf("backup: %d files are more than %d", len(parts), maxFiles)
	}
	sealed, err := age.Encrypt(w, to...)
	if err != nil {
		return m, fmt.Errorf("backup: %w", err)
	}
	m.Format, m.Files = format, []File{}
	archive := tar.NewWriter(sealed)
	for i, p := range parts {
		sum := sha256.New()
		if err := archive.WriteHeader(header(numbered(i), p.Size)); err != nil {
			return m, fmt.Errorf("backup: %w", err)
		}
		if err := p.Copy(io.MultiWriter(archive, sum)); err != nil {
			return m, fmt.Errorf("backup: %s: %w", p.Path, err)
		}
		p.File.Size, p.File.SHA256 = p.Size, hex.EncodeToString(sum.Sum(nil))
		m.Files = append(m.Files, p.File)
	}
	encoded, err := json.Marshal(m)
	if err != nil {
		return m, fmt.Errorf("backup: %w", err)
	}
	if len(encoded) > maxDocument {
		return m, fmt.Errorf("backup: the manifest has %d bytes, at most %d", len(encoded), maxDocument)
	}
	proof, err := prove(digestOf(encoded))
	if err != nil {
		return m, fmt.Errorf("backup: the proof: %w", err)
	}
	proven, err := json.Marshal(proof)
	if err != nil {
		return m, fmt.Errorf("backup: %w", err)
	}
	for _, last := range []struct {
		name    string
		content []byte
	}{{manifestName, encoded}, {proofName, proven}} {
		if err := archive.WriteHeader(header(last.name, int64(len(last.content)))); err != nil {
			return m, fmt.Errorf("backup: %w", err)
		}
		if _, err := archive.Write(last.content); err != nil {
			return m, fmt.Errorf("backup: %w", err)
		}
	}
	if err := errors.Join(archive.Close(), sealed.Close()); err != nil {
		return m, fmt.Errorf("backup: %w", err)
	}
	return m, nil
}

func header(name string, size int64) *tar.Header {
	return &tar.Header{Name: name, Mode: 0o600, Size: size, Typeflag: tar.TypeReg, Format: tar.FormatPAX}
}

func numbered(i int) string { return fmt.Sprintf("%04d", i+1) }

func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// read is a numbered file that was read.
type read struct {
	size int64
	sum  hash.Hash
}

// Extract reads a backup to its end, writes its files into an empty folder, and checks all: the
// encryption, the sizes and hashes of the manifest, and the proof by the key of the log that the
// manifest names. Whether that is the log of the expected appliance, the caller decides. After an
// error, the folder may have a part of the files.
func Extract(r io.Reader, identities []Identity, folder string) (Contents, error) {
	c, err := extract(r, identities, folder)
	if err != nil {
		return Contents{}, fmt.Errorf("backup: %w", err)
	}
	return c, nil
}

func extract(r io.Reader, identities []Identity, folder string) (c Contents, err error) {
	opened, err := decrypt(r, identities)
	if err != nil {
		return c, err
	}
	archive := tar.NewReader(opened)
	var files []read
	var manifest, proof []byte
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return c, damaged(err)
		}
		switch {
		case h.Typeflag != tar.TypeReg || h.Size < 0:
			return c, damaged(fmt.Errorf("%.40q is no plain file", h.Name))
		case manifest == nil && h.Name == numbered(len(files)) && len(files) < maxFiles:
			at := filepath.Join(folder, h.Name)
			f, err := write(at, archive)
			if err != nil {
				return c, err
			}
			files, c.Files = append(files, f), append(c.Files, at)
		case manifest == nil && h.Name == manifestName:
			manifest, err = document(archive)
		case manifest != nil && proof == nil && h.Name == proofName:
			proof, err = document(archive)
		default:
			return c, damaged(fmt.Errorf("%.40q is not expected here", h.Name))
		}
		if err != nil {
			return c, err
		}
	}
	if rest, err := io.Copy(io.Discard, opened); err != nil { // the last chunk of age says that it is the last
		return c, damaged(err)
	} else if rest > 0 {
		return c, damaged(fmt.Errorf("%d bytes follow the archive", rest))
	}
	if proof == nil {
		return c, damaged(errors.New("there is no proof inside"))
	}
	return c, c.check(manifest, proof, files)
}

// decrypt opens a file of age.
func decrypt(r io.Reader, identities []Identity) (io.Reader, error) {
	opened, err := age.Decrypt(r, identities...)
	if no := new(age.NoIdentityMatchError); errors.As(err, &no) {
		return nil, ErrRecipient
	} else if errors.Is(err, recipient.ErrIdentity) {
		return nil, err
	} else if err != nil { // the text of age has a part of the file, which may be a PIN
		return nil, fmt.Errorf("%w: it is no file of age, or its header was changed", ErrDamaged)
	}
	return opened, nil
}

// damaged is an error of class ErrDamaged. An error of the disk keeps its own class.
func damaged(err error) error { return fmt.Errorf("%w: %w", ErrDamaged, err) }

// write copies a file of the archive to a path, and syncs it.
func write(path string, from io.Reader) (read, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return read{}, err
	}
	defer f.Close()
	r := read{sum: sha256.New()}
	source := &source{from: from}
	if r.size, err = io.Copy(io.MultiWriter(f, r.sum), source); source.err != nil {
		return r, damaged(source.err)
	} else if err != nil {
		return r, err
	}
	return r, f.Sync()
}

// source keeps an error of the source apart from one of the disk.
type source struct {
	from io.Reader
	err  error
}

func (s *source) Read(b []byte) (int, error) {
	n, err := s.from.Read(b)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

func document(from io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(from, maxDocument+1))
	if err != nil {
		return nil, damaged(err)
	}
	if len(b) > maxDocument {
		return nil, damaged(errors.New("a document inside is too long"))
	}
	return b, nil
}

// check fills in the contents from the manifest and the proof, and compares them with the files.
func (c *Contents) check(manifest, proof []byte, files []read) error {
	var version struct {
		Format int `json:"format"`
	}
	if err := json.Unmarshal(manifest, &version); err != nil {
		return damaged(err)
	}
	if version.Format > format {
		return fmt.Errorf("%w: its form is %d, and this program knows %d", ErrNewer, version.Format, format)
	}
	if err := decode(manifest, &c.Manifest); err != nil {
		return damaged(err)
	}
	if c.Format != format || len(c.Manifest.Files) != len(files) || len(files) == 0 ||
		c.Manifest.Files[0].Kind != Ledger {
		return damaged(errors.New("the manifest has other files than the archive"))
	}
	for i, f := range c.Manifest.Files {
		if !slices.Contains(kinds, f.Kind) || (f.Kind == Ledger) != (i == 0) || !filepath.IsAbs(f.Path) ||
			filepath.Clean(f.Path) != f.Path {
			return damaged(fmt.Errorf("%.60q is no file of an appliance", f.Path))
		}
		if f.Size != files[i].size || f.SHA256 != hex.EncodeToString(files[i].sum.Sum(nil)) {
			return damaged(fmt.Errorf("%s is not what the manifest says", f.Path))
		}
	}
	var p Proof
	if err := decode(proof, &p); err != nil {
		return damaged(err)
	}
	log, err := c.Log()
	if err != nil {
		return damaged(err)
	}
	e, head, err := log.Check(p.Proof)
	if err != nil {
		return damaged(fmt.Errorf("the log does not prove it: %w", err))
	}
	c.Digest, c.Event, c.Checkpoint = digestOf(manifest), p.Event, head
	root, err := c.head()
	if err == nil {
		err = head.Continues(root, p.Consistency)
	}
	if err != nil {
		return damaged(fmt.Errorf("the log of the backup is another: %w", err))
	}
	if e.Type != audit.BackupMade || e.Metadata["sha256"] != c.Digest {
		return damaged(errors.New("the log names another manifest"))
	}
	return nil
}

// decode decodes JSON without unknown fields, and with nothing behind it.
func decode(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows the document")
	}
	return nil
}
