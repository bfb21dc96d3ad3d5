package backup

import (
	"bytes"
	"cmp"
	"compress/flate"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"filippo.io/age"
	"golang.org/x/sys/unix"
)

// Lists of writes take a backup on to the last seconds. A file of lists is
//
//	"countersign-lists-v1\n" || public key (32) || records
//
// and a record is
//
//	u32 length of the age file || u64 first || u64 last || u32 CRC-32 (IEEE) of these 20 bytes
//	signature (64) || age file
//
// first and last are the numbers of the lists in the age file, which has, for each list, u32 length
// || list, compressed by DEFLATE (RFC 1951). The signature is Ed25519 by the public key, over the
// head of the file || u64 first || u64 last || SHA-256 of the age file. Integers are big-endian.
//
// Each start of the daemon makes a key pair. The manifest of a backup, which the audit log proves,
// names the public key. So only the daemon that made a backup can write lists for the backup.
// Numbers chain the lists: none can be left out, repeated or moved. Nothing shows that the last
// ones are missing.
const (
	listsMagic = "countersign-lists-v1\n"
	listsHead  = int64(len(listsMagic) + ed25519.PublicKeySize)
	recordHead = 4 + 8 + 8 + 4
	maxRecord  = 64 << 20 // bytes of an age file, and of the lists in it
)

// list is an encoded list of writes with its number.
type list struct {
	number uint64
	bytes  []byte
	at     time.Time // when the list was taken
}

// listsKey signs records.
type listsKey struct {
	public ed25519.PublicKey
	sign   func([]byte) []byte
}

func newListsKey() (listsKey, error) {
	public, private, err := ed25519.GenerateKey(nil)
	return listsKey{public, func(b []byte) []byte { return ed25519.Sign(private, b) }}, err
}

// signed returns the bytes that a record's signature is over.
func signed(public ed25519.PublicKey, first, last uint64, sealed []byte) []byte {
	sum := sha256.Sum256(sealed)
	b := append([]byte(listsMagic), public...)
	b = binary.BigEndian.AppendUint64(b, first)
	b = binary.BigEndian.AppendUint64(b, last)
	return append(b, sum[:]...)
}

// record encodes consecutive lists as a record.
func (k listsKey) record(to []Recipient, lists []list) ([]byte, error) {
	var sealed bytes.Buffer
	encrypted, err := age.Encrypt(&sealed, to...)
	if err != nil {
		return nil, err
	}
	w, err := flate.NewWriter(encrypted, flate.BestSpeed)
	if err != nil {
		return nil, err
	}
	for _, l := range lists {
		if _, err := w.Write(binary.BigEndian.AppendUint32(nil, uint32(len(l.bytes)))); err != nil {
			return nil, err
		}
		if _, err := w.Write(l.bytes); err != nil {
			return nil, err
		}
	}
	if err := errors.Join(w.Close(), encrypted.Close()); err != nil {
		return nil, err
	}
	first, last := lists[0].number, lists[len(lists)-1].number
	b := binary.BigEndian.AppendUint32(nil, uint32(sealed.Len()))
	b = binary.BigEndian.AppendUint64(b, first)
	b = binary.BigEndian.AppendUint64(b, last)
	b = binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(b))
	b = append(b, k.sign(signed(k.public, first, last, sealed.Bytes()))...)
	return append(b, sealed.Bytes()...), nil
}

// ErrLists: the lists beside a backup have a gap, or are damaged.
var ErrLists = errors.New("the lists of writes are not whole")

// Shipped are the lists beside a backup.
type Shipped struct {
	Last  uint64   // number of the last list; that of the manifest without lists
	Files []string // names of the files with the lists
	Notes []string // for the operator
}

// ReadLists reads the lists that follow a backup, and calls apply with the lists of each record, in
// order, up to the list with the number until. A gap, and a file or record that is not what the
// daemon has written, are of class ErrLists: apply has had all lists to Last. Without an error,
// Last may be less than until: nothing shows that the newest lists were removed. Where the first
// lists after the backup are missing, they were removed for a newer backup, and Notes says so.
func ReadLists(
	m Manifest, folder string, identities []Identity, until uint64, apply func(lists [][]byte) error,
) (s Shipped, err error) {
	s.Last = m.Lists
	public, err := hex.DecodeString(m.ListsKey)
	if err != nil || len(public) != ed25519.PublicKeySize || until <= m.Lists {
		return s, nil // without a key, the daemon shipped no lists
	}
	files, others, broken, err := listsFiles(m, folder, public)
	if err != nil {
		return s, err
	}
	for _, each := range files {
		f, _, err := openListsFile(folder, each.name)
		if err == nil {
			err = f.read(m, identities, until, &s, apply)
			f.Close()
		}
		if errors.Is(err, ErrLists) {
			broken = cmp.Or(broken, notWhole(each.name, err))
		} else if err != nil {
			return s, fmt.Errorf("%s: %w", each.name, err)
		}
		if s.Last == m.Lists && each.first > s.Last+1 { // and so are all later files
			break
		}
	}
	if others > 0 {
		s.Notes = append(s.Notes, fmt.Sprintf("%d newer files of lists are of other starts of the daemon: "+
			"only a newer backup leads there", others))
	}
	if s.Last < until && broken != nil {
		return s, broken
	}
	return s, nil
}

func notWhole(name string, err error) error {
	return fmt.Errorf("%s: %w (a file whose lists are not needed can be moved away)", name, err)
}

// listsFile is a file of lists of one start of the daemon.
type listsFile struct {
	*os.File
	name  string
	size  int64
	key   ed25519.PublicKey
	first uint64 // number of the first list
}

// listsFiles returns the files with lists by a key, closed, in the order of their lists; the number
// of other files that are newer than the backup; and the error of the first file that is damaged.
// Of each file, the first record is verified, so that damage does not make a file one of another
// start. A file that ends within its first record has no lists.
func listsFiles(m Manifest, folder string, public ed25519.PublicKey) (
	files []listsFile, others int, broken, err error,
) {
	log, err := m.Log()
	if err != nil {
		return nil, 0, nil, err
	}
	entries, err := os.ReadDir(folder)
	if err != nil {
		return nil, 0, nil, err
	}
	for _, e := range entries {
		begun, ok := Lists.Begun(e.Name(), log.ID())
		if !ok || !e.Type().IsRegular() {
			continue
		}
		f, found, err := openListsFile(folder, e.Name())
		switch {
		case err != nil:
			broken = cmp.Or(broken, notWhole(e.Name(), err))
		case found && f.key.Equal(public):
			files = append(files, f)
		case found && !begun.Before(m.Made()):
			others++
		}
		if err == nil {
			f.Close()
		}
	}
	slices.SortFunc(files, func(x, y listsFile) int {
		return cmp.Or(cmp.Compare(x.first, y.first), cmp.Compare(x.name, y.name))
	})
	return files, others, broken, nil
}

// openListsFile opens a file of lists. found is false for a file without a record.
func openListsFile(folder, name string) (f listsFile, found bool, err error) {
	// A name that has become a pipe or a link must not hold a restore up.
	file, err := os.OpenFile(filepath.Join(folder, name), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return f, false, err
	}
	defer func() {
		if err != nil {
			file.Close()
		}
	}()
	f = listsFile{File: file, name: name}
	info, err := file.Stat()
	if err != nil {
		return f, false, err
	}
	f.size = info.Size()
	head := make([]byte, min(f.size, listsHead))
	if _, err := file.ReadAt(head, 0); err != nil {
		return f, false, err
	}
	if magic := head[:min(len(head), len(listsMagic))]; !strings.HasPrefix(listsMagic, string(magic)) {
		if blank, err := zeros(file, 0, f.size); blank || err != nil {
			return f, false, err
		}
		return f, false, fmt.Errorf("%w: this is no file of lists", ErrLists)
	}
	if int64(len(head)) < listsHead {
		return f, false, nil
	}
	f.key = head[len(listsMagic):]
	r, err := f.record(listsHead)
	f.first = r.first
	return f, !r.torn, err
}

// listsRecord is a record whose signature was verified.
type listsRecord struct {
	first, last uint64
	sealed      []byte // the age file
	size        int64  // of the whole record
	torn        bool   // the file ends within the record
}

// record reads the record at an offset.
func (f listsFile) record(at int64) (r listsRecord, err error) {
	rest := f.size - at
	if rest < recordHead {
		return listsRecord{torn: true}, nil
	}
	head := make([]byte, recordHead)
	if _, err := f.ReadAt(head, at); err != nil {
		return r, err
	}
	if crc32.ChecksumIEEE(head[:recordHead-4]) != binary.BigEndian.Uint32(head[recordHead-4:]) {
		blank, err := zeros(f, at, rest) // a power cut can leave zeros
		if err == nil && !blank {
			err = fmt.Errorf("%w: the head of a record is damaged", ErrLists)
		}
		return listsRecord{torn: true}, err
	}
	length := int64(binary.BigEndian.Uint32(head))
	r.first, r.last = binary.BigEndian.Uint64(head[4:]), binary.BigEndian.Uint64(head[12:])
	if length > maxRecord || r.first == 0 || r.last < r.first || r.last-r.first >= maxRecord {
		return r, fmt.Errorf("%w: a record of %d bytes has the lists %d to %d", ErrLists, length, r.first, r.last)
	}
	if r.size = recordHead + ed25519.SignatureSize + length; r.size > rest {
		return listsRecord{torn: true}, nil
	}
	body := make([]byte, r.size-recordHead)
	if _, err := f.ReadAt(body, at+recordHead); err != nil {
		return r, err
	}
	r.sealed = body[ed25519.SignatureSize:]
	if !ed25519.Verify(f.key, signed(f.key, r.first, r.last, r.sealed), body[:ed25519.SignatureSize]) {
		return r, fmt.Errorf("%w: the signature of a record is wrong", ErrLists)
	}
	return r, nil
}

// read reads the lists of the file that follow s.Last.
func (f listsFile) read(
	m Manifest, identities []Identity, until uint64, s *Shipped, apply func([][]byte) error,
) error {
	used := false
	for at := int64(listsHead); at < f.size && s.Last < until; {
		r, err := f.record(at)
		if err != nil {
			return fmt.Errorf("at byte %d: %w", at, err)
		}
		if r.torn {
			s.Notes = append(s.Notes,
				fmt.Sprintf("%s ends with %d bytes of a record that was not finished", f.name, f.size-at))
			return nil
		}
		at += r.size
		if r.last <= s.Last { // the backup has them
			continue
		}
		if r.first > s.Last+1 && s.Last == m.Lists {
			s.Notes = append(s.Notes, fmt.Sprintf("list %d, the first one after the backup, is not there, "+
				"as after a newer backup: only a newer one leads to %s", s.Last+1, f.name))
			return nil
		}
		if r.first > s.Last+1 {
			return fmt.Errorf("%w: list %d is missing", ErrLists, s.Last+1)
		}
		lists, err := r.open(identities)
		if err != nil {
			return fmt.Errorf("at byte %d: %w", at-r.size, err)
		}
		lists = lists[s.Last+1-r.first:]
		lists = lists[:min(uint64(len(lists)), until-s.Last)]
		if err := apply(lists); err != nil {
			return err
		}
		s.Last += uint64(len(lists))
		if !used {
			used, s.Files = true, append(s.Files, f.name)
		}
	}
	return nil
}

// zeros reports whether n bytes at an offset are all zero.
func zeros(f io.ReaderAt, at, n int64) (bool, error) {
	b := make([]byte, 64<<10)
	for n > 0 {
		part := b[:min(n, int64(len(b)))]
		if _, err := f.ReadAt(part, at); err != nil {
			return false, err
		}
		if slices.ContainsFunc(part, func(c byte) bool { return c != 0 }) {
			return false, nil
		}
		at, n = at+int64(len(part)), n-int64(len(part))
	}
	return true, nil
}

// open decrypts the lists of the record.
func (r listsRecord) open(identities []Identity) (lists [][]byte, err error) {
	opened, err := decrypt(bytes.NewReader(r.sealed), identities)
	if err != nil {
		return nil, err
	}
	plain, err := io.ReadAll(io.LimitReader(flate.NewReader(opened), maxRecord))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrLists, err)
	}
	for len(plain) >= 4 {
		n := uint64(binary.BigEndian.Uint32(plain))
		if n > uint64(len(plain)-4) {
			break
		}
		lists, plain = append(lists, plain[4:4+n]), plain[4+n:]
	}
	if n := r.last - r.first + 1; len(plain) > 0 || uint64(len(lists)) != n {
		return nil, fmt.Errorf("%w: a record has %d lists, and names %d", ErrLists, len(lists), n)
	}
	return lists, nil
}
