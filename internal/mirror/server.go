package mirror

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unicode"

	"countersign/internal/backup"
	"countersign/internal/keystore"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"
)

// Server is an SFTP server with the account there.
type Server struct {
	Address  string // host:port
	User     string
	Folder   string          // absolute, at the server; must exist
	KeyFile  string          // SSH private key without a passphrase; read at each connection
	HostKeys []ssh.PublicKey // the server must have one of them
}

// hostKeyTypes are the types of host keys, with the algorithms of their signatures.
var hostKeyTypes = map[string][]string{
	ssh.KeyAlgoED25519:  {ssh.KeyAlgoED25519},
	ssh.KeyAlgoECDSA256: {ssh.KeyAlgoECDSA256},
	ssh.KeyAlgoECDSA384: {ssh.KeyAlgoECDSA384},
	ssh.KeyAlgoECDSA521: {ssh.KeyAlgoECDSA521},
	ssh.KeyAlgoRSA:      {ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256},
}

// Parse returns the server of an address such as sftp://user@host:22/folder. hostKeys are lines of
// a type and a key in base64. An error begins with the name of the configuration's field.
func Parse(address, keyFile string, hostKeys []string) (s Server, err error) {
	u, err := url.Parse(address)
	if err != nil { // the text of the error may have a password
		return s, errors.New("sftp: it is not an address such as sftp://user@host:22/folder")
	}
	_, password := u.User.Password()
	port := cmp.Or(u.Port(), "22")
	n, notPort := strconv.ParseUint(port, 10, 16)
	printable := func(r rune) bool { return r > ' ' && r <= '~' }
	odd := func(r rune) bool { return !unicode.IsPrint(r) }
	switch {
	case password:
		return s, errors.New("sftp: a password is not used: give the user alone, and sftp_key_file")
	case u.Scheme != "sftp" || u.Hostname() == "" || notPort != nil || n == 0 || u.RawQuery != "" || u.Fragment != "":
		return s, fmt.Errorf("sftp: %q is not an address such as sftp://user@host:22/folder", address)
	case u.User.Username() == "" || strings.ContainsFunc(u.User.Username(), func(r rune) bool { return !printable(r) }):
		return s, fmt.Errorf("sftp: %q names no user, as sftp://user@host:22/folder does", address)
	case u.Path == "" || strings.ContainsFunc(u.Path, odd):
		return s, fmt.Errorf("sftp: %q names no folder, as sftp://user@host:22/folder does", address)
	case keyFile == "":
		return s, errors.New("sftp_key_file is missing: the SSH private key of the account at the server")
	case len(hostKeys) == 0:
		return s, errors.New("sftp_host_keys is missing: the public keys of the server, such as the content of " +
			"/etc/ssh/ssh_host_ed25519_key.pub there")
	}
	s = Server{
		Address: net.JoinHostPort(u.Hostname(), port), User: u.User.Username(), Folder: path.Clean(u.Path),
		KeyFile: keyFile,
	}
	for _, line := range hostKeys {
		key, _, options, rest, err := ssh.ParseAuthorizedKey([]byte(line))
		switch {
		case err != nil || len(options) > 0 || len(bytes.TrimSpace(rest)) > 0:
			return s, fmt.Errorf("sftp_host_keys: %q is not a type and a key, such as ssh-ed25519 AAAA…: leave out "+
				"the host's name of ssh-keyscan", line)
		case hostKeyTypes[key.Type()] == nil:
			return s, fmt.Errorf("sftp_host_keys: a key of type %s is not a host key: give one of the types "+
				"ssh-ed25519, ecdsa-sha2-nistp256 and ssh-rsa", key.Type())
		}
		s.HostKeys = append(s.HostKeys, key)
	}
	return s, nil
}

// String names the server without a secret.
func (s Server) String() string {
	return (&url.URL{Scheme: "sftp", User: url.User(s.User), Host: s.Address, Path: s.Folder}).String()
}

// signer reads the private key.
func (s Server) signer() (ssh.Signer, error) {
	b, err := keystore.ReadSecret(s.KeyFile, "SSH key")
	if err != nil {
		return nil, err
	}
	defer b.Wipe()
	signer, err := ssh.ParsePrivateKey(b.Expose())
	if errors.As(err, new(*ssh.PassphraseMissingError)) {
		return nil, fmt.Errorf("SSH key %s: it has a passphrase, which nobody could type: make one without "+
			"(ssh-keygen -t ed25519 -N \"\")", s.KeyFile)
	} else if err != nil { // the text of the error is not ours to judge
		return nil, fmt.Errorf("SSH key %s: it is no private key of SSH in PEM", s.KeyFile)
	}
	return signer, nil
}

// mostRead is the most bytes that a server may send as the answer to one operation: a folder of
// some 50,000 names.
const mostRead = 8 << 20

// meteredConn is a connection that fails after some bytes: a server could send names without an
// end.
type meteredConn struct {
	net.Conn
	left atomic.Int64
}

func (c *meteredConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if c.left.Add(-int64(n)) < 0 {
		c.Conn.Close()
		return n, fmt.Errorf("the server has sent more than %d MiB at once", mostRead>>20)
	}
	return n, err
}

// session is a connection to a server. Methods are for one goroutine.
type session struct {
	conn   *meteredConn
	client *ssh.Client
	sftp   *sftp.Client
	folder string
	times  times
	began  time.Time
	listed time.Time // the last look at the folder
	stop   func() bool
	lost   chan struct{} // closed when the connection has ended
	buffer []byte
	wrote  map[string]bool // parts that this connection has written
}

// dial connects. The end of ctx closes the connection.
func (s Server) dial(ctx context.Context, t times) (_ *session, err error) {
	signer, err := s.signer()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s: %w", s.Address, err)
		}
	}()
	raw, err := (&net.Dialer{Timeout: t.dial}).DialContext(ctx, "tcp", s.Address)
	if err != nil {
		return nil, err
	}
	conn := &meteredConn{Conn: raw}
	conn.left.Store(mostRead)
	c := &session{
		conn: conn, folder: s.Folder, times: t, began: time.Now(), lost: make(chan struct{}),
		stop: context.AfterFunc(ctx, func() { conn.Close() }), buffer: make([]byte, piece),
		wrote: map[string]bool{},
	}
	defer func() {
		if err != nil {
			c.stop()
			conn.Close()
		}
	}()
	conn.SetDeadline(time.Now().Add(t.dial))
	var wrong error
	config := &ssh.ClientConfig{
		User: s.User, Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyAlgorithms: s.algorithms(),
		HostKeyCallback: func(_ string, _ net.Addr, shown ssh.PublicKey) error {
			wrong = s.checkHostKey(shown)
			return wrong
		},
	}
	transport, channels, requests, err := ssh.NewClientConn(conn, s.Address, config)
	switch {
	case wrong != nil:
		return nil, wrong
	case errors.As(err, new(*ssh.AlgorithmNegotiationError)):
		return nil, fmt.Errorf("the server has no host key of a type in sftp_host_keys (%s), or no cipher in "+
			"common: %s", strings.Join(s.algorithms(), ", "), clip(err.Error()))
	case err != nil && strings.Contains(err.Error(), "unable to authenticate"):
		return nil, fmt.Errorf("the server refuses the key %s for the user %s: put its public half into the "+
			"authorized_keys of the account", ssh.FingerprintSHA256(signer.PublicKey()), s.User)
	case err != nil: // with a text of the server, such as that of a disconnect
		return nil, errors.New(clip(err.Error()))
	}
	c.client = ssh.NewClient(transport, channels, requests)
	go func() {
		c.client.Wait()
		close(c.lost)
	}()
	if c.sftp, err = sftp.NewClient(c.client); err != nil {
		return nil, fmt.Errorf("the server speaks no SFTP to %s: %s", s.User, clip(err.Error()))
	}
	conn.SetDeadline(time.Time{}) // from now on, each operation has its own
	return c, nil
}

func (s Server) algorithms() (all []string) {
	for _, key := range s.HostKeys {
		for _, algorithm := range hostKeyTypes[key.Type()] {
			if !slices.Contains(all, algorithm) {
				all = append(all, algorithm)
			}
		}
	}
	return all
}

func (s Server) checkHostKey(shown ssh.PublicKey) error {
	var expected []string
	for _, key := range s.HostKeys {
		if bytes.Equal(key.Marshal(), shown.Marshal()) {
			return nil
		}
		expected = append(expected, ssh.FingerprintSHA256(key))
	}
	return fmt.Errorf("the server shows the host key %s (%s), and sftp_host_keys has %s: nothing was sent; find "+
		"out who answers there, and correct sftp_host_keys only if the server has a new key",
		ssh.FingerprintSHA256(shown), shown.Type(), strings.Join(expected, ", "))
}

// close ends the connection. A nil session is closed.
func (s *session) close() {
	if s == nil {
		return
	}
	s.stop()
	s.conn.Close()
	s.sftp.Close()
	<-s.lost
}

// gone reports that the connection has ended.
func (s *session) gone() bool {
	if s == nil {
		return false
	}
	select {
	case <-s.lost:
		return true
	default:
		return false
	}
}

// do does an operation. After its time the connection is closed, and the operation fails.
func (s *session) do(what, name string, within time.Duration, operation func() error) error {
	s.conn.left.Store(mostRead)
	late := time.AfterFunc(within, func() { s.conn.Close() })
	err := operation()
	if !late.Stop() {
		<-s.lost
		return fmt.Errorf("%s %s: the server has not answered within %v", what, name, within)
	}
	if err == nil {
		return nil
	}
	if errors.As(err, new(*sftp.StatusError)) {
		err = fmt.Errorf("the server answers: %s", clip(err.Error()))
	} else if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
		text := clip(err.Error())
		select { // the reader of the connection may learn of its end a moment later
		case <-s.lost:
			text = "the connection has ended: " + text
		case <-time.After(100 * time.Millisecond):
		}
		err = errors.New(text)
	}
	return fmt.Errorf("%s %s: %w", what, name, err)
}

// clip bounds a text of the server, and leaves printable characters.
func clip(text string) string {
	const most = 200
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, text)
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + "…"
	}
	return text
}

func (s *session) path(name string) string { return path.Join(s.folder, name) }

// list returns the lengths of an appliance's files in the folder, and the names of what is beside
// them: parts, and others of the same name.
func (s *session) list(id string) (files map[string]int64, beside []string, err error) {
	var all []os.FileInfo
	err = s.do("list", s.folder, s.times.within, func() (err error) {
		all, err = s.sftp.ReadDir(s.folder)
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("%w: make the folder at the server", err)
	} else if err != nil {
		return nil, nil, err
	}
	files = map[string]int64{}
	for _, info := range all {
		name := info.Name()
		if _, _, ok := kind(name, id); ok && info.Mode().IsRegular() {
			files[name] = info.Size()
		}
		of, part := strings.CutSuffix(name, backup.PartSuffix)
		other := original(of) != of
		if _, _, ok := kind(original(of), id); ok && part != other && info.Mode().IsRegular() {
			beside = append(beside, name)
		}
	}
	return files, beside, nil
}

// size returns the length of a file, or -1 for none.
func (s *session) size(name string) (size int64, err error) {
	err = s.do("look at", name, s.times.within, func() error {
		info, err := s.sftp.Lstat(s.path(name))
		if err != nil {
			return err
		}
		if size = info.Size(); !info.Mode().IsRegular() {
			return errors.New("it is no file at the server: remove it there")
		}
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return -1, nil
	}
	return size, err
}

func (s *session) remove(name string) error {
	err := s.do("remove", name, s.times.within, func() error { return s.sftp.Remove(s.path(name)) })
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// sample is the size of a piece that is compared, and samples their number beside the first and
// the last.
const (
	sample  = 32 << 10
	samples = 8
)

// alike compares the first bytes of a local file with those at the server: all of some, and of
// many the first, the last and random ones. The head of each backup is unlike that of all others,
// and so is the end of each list. Only verification of the whole shows each flipped bit in the
// middle.
func (s *session) alike(local io.ReaderAt, name string, size int64) (alike bool, err error) {
	var remote *sftp.File
	if err := s.do("open", name, s.times.within, func() (err error) {
		remote, err = s.sftp.Open(s.path(name))
		return err
	}); err != nil {
		return false, err
	}
	defer s.done(name, remote)
	var offsets []int64
	if size <= (samples+2)*sample {
		for at := int64(0); at < size; at += sample {
			offsets = append(offsets, at)
		}
	} else {
		offsets = []int64{0, size - sample}
		for range samples {
			offsets = append(offsets, rand.Int64N(size-sample))
		}
	}
	here, there := make([]byte, sample), make([]byte, sample)
	for _, at := range offsets {
		n := min(sample, size-at)
		if _, err := local.ReadAt(here[:n], at); err != nil {
			return false, err
		}
		read := 0
		if err := s.do("read", name, s.times.within, func() (err error) {
			read, err = remote.ReadAt(there[:n], at)
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return err
		}); err != nil {
			return false, err
		}
		if int64(read) != n || !bytes.Equal(here[:n], there[:n]) {
			return false, nil
		}
	}
	return true, nil
}

// done closes a file at the server.
func (s *session) done(name string, f *sftp.File) error {
	return s.do("close", name, s.times.within, f.Close)
}

// upload sends a file under the name of a part, goes on with a part that is there, and gives the
// part the final name when the server's disk has it. between is called after each piece, with the
// number of bytes that the server has.
func (s *session) upload(local io.ReaderAt, f file, between func(at int64) error) error {
	part := f.name + backup.PartSuffix
	at, err := s.size(part)
	if err != nil {
		return err
	}
	flags := os.O_RDWR | os.O_CREATE
	if s.wrote[part] {
		at = min(at-window, f.size) // the last window may have holes
	} else { // the server may have lost its power: fill has synced the multiple of syncEvery below
		at = (min(at, f.size) - 1) / syncEvery * syncEvery
	}
	if at > 0 {
		alike, err := s.alike(local, part, at)
		if err != nil {
			return err
		}
		if !alike {
			at = 0
		}
	}
	if at <= 0 {
		at, flags = 0, flags|os.O_TRUNC
	}
	var remote *sftp.File
	if err := s.do("open", part, s.times.within, func() (err error) {
		remote, err = s.sftp.OpenFile(s.path(part), flags)
		return err
	}); err != nil {
		return err
	}
	s.wrote[part] = true
	err = s.fill(local, remote, f, part, at, between)
	if err = errors.Join(err, s.done(part, remote)); err != nil {
		return err
	}
	return s.rename(part, f.name)
}

// fill writes the file from an offset on. Pieces grow while the link brings them in good time. Each
// multiple of syncEvery is synced before more is sent.
func (s *session) fill(
	local io.ReaderAt, remote *sftp.File, f file, part string, at int64, between func(at int64) error,
) error {
	if err := s.do("truncate", part, s.times.within, func() error { return remote.Truncate(at) }); err != nil {
		return err
	}
	for size := int64(piece); at < f.size; {
		next := io.NewSectionReader(local, at, min(size, f.size-at, syncEvery-at%syncEvery))
		began := time.Now()
		if err := s.do("write", part, s.times.within, func() error {
			if _, err := remote.Seek(at, io.SeekStart); err != nil {
				return err
			}
			n, err := remote.ReadFromWithConcurrency(next, 32)
			if err == nil && n != next.Size() {
				err = io.ErrUnexpectedEOF
			}
			return err
		}); err != nil {
			return err
		}
		at += next.Size()
		switch took := time.Since(began); {
		case took < s.times.within/8:
			size = min(2*size, window)
		case took > s.times.within/2:
			size = max(size/2, piece)
		}
		if at%syncEvery == 0 && at < f.size {
			if err := s.sync(part, remote); err != nil {
				return err
			}
		}
		if err := between(at); err != nil {
			return err
		}
	}
	if err := s.sync(part, remote); err != nil {
		return err
	}
	if size, err := s.size(part); err != nil {
		return err
	} else if size != f.size {
		return fmt.Errorf("%s: the server says that it has %d bytes, and %d were sent", part, size, f.size)
	}
	return nil
}

// sync waits for the server's disk, where the server can.
func (s *session) sync(name string, f *sftp.File) error {
	if _, ok := s.sftp.HasExtension("fsync@openssh.com"); !ok {
		return nil
	}
	return s.do("sync", name, s.times.syncWithin, f.Sync)
}

// rename replaces no file, unlike posix-rename@openssh.com, and removes none: a server may refuse
// both.
func (s *session) rename(from, to string) error {
	return s.do("rename to", to, s.times.within, func() error { return s.sftp.Rename(s.path(from), s.path(to)) })
}

// putBeside gives a file the next free name beside it.
func (s *session) putBeside(name string) error {
	for n := 1; n <= mostOthers; n++ {
		to := other(name, n)
		if size, err := s.size(to); err != nil {
			return err
		} else if size < 0 {
			return s.rename(name, to)
		}
	}
	return fmt.Errorf("%s: the server has another file of this name, and %d beside it: look at them, and remove "+
		"them there", name, mostOthers)
}

// append writes what the server lacks of a file of lists, one piece after the other: the server's
// file never has a hole.
func (s *session) append(local io.ReaderAt, f file, at int64) error {
	var remote *sftp.File
	if err := s.do("open", f.name, s.times.within, func() (err error) {
		remote, err = s.sftp.OpenFile(s.path(f.name), os.O_WRONLY)
		return err
	}); err != nil {
		return err
	}
	err := func() error {
		for at < f.size {
			b := s.buffer[:min(int64(len(s.buffer)), f.size-at)]
			if _, err := local.ReadAt(b, at); err != nil {
				return err
			}
			if err := s.do("write", f.name, s.times.within, func() error {
				_, err := remote.WriteAt(b, at)
				return err
			}); err != nil {
				return err
			}
			at += int64(len(b))
		}
		return s.sync(f.name, remote)
	}()
	return errors.Join(err, s.done(f.name, remote))
}
