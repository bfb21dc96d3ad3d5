package worker

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"countersign/internal/durable"
	"countersign/internal/keystore"
)

// A refused PIN is remembered in a file, because a service manager restarts a daemon that has
// ended: each restart would try the wrong PIN once more, and five lock a token. The file names the
// device and the PIN file by a digest of what identifies them. The PIN itself, or a digest of the
// PIN, is never written. The memory ends when the PIN file is another, or when an operator says so.
//
// The file is written after the refusal: a power cut in between costs one try. A file written
// before each login would let a crash in the login forbid the next start. Each token has a file of
// its own, and a write replaces the file whole, so that serve and check may run at the same time.
// The mode lets every user read the file: nothing in it is secret, and check may run as root.

// refusal is the file of one token.
type refusal struct {
	path, pinFile string
	identify      func() string // IdentifyPIN, where the PIN file can be looked at; may wait
	tried         string        // the digest before the last login
	refused       string        // the digest of the refused PIN file, or ""
	seen          string        // the digest at the last call of changed
}

// memo is the content of the file.
type memo struct {
	Digest string `json:"digest"` // hex
	At     string `json:"at"`     // RFC 3339
	Err    string `json:"error"`
}

func newRefusal(c Config) refusal {
	if c.PINFile == "" { // nothing can be tried again
		return refusal{identify: func() string { return "" }}
	}
	return refusal{path: c.Memo, pinFile: c.PINFile, identify: c.IdentifyPIN}
}

// IdentifyPIN gives the digest of a token and its PIN file: SHA-256 of the names of the token and
// of its device, which is a URI or the path of a TPM, and of the file's path, file system, inode,
// size and times. The content is not read. A file that can't be looked at has a digest too, since
// another state of the file has another one.
func IdentifyPIN(token, device, pinFile string) string {
	var st syscall.Stat_t
	err := syscall.Stat(pinFile, &st)
	sum := sha256.Sum256(fmt.Appendf(nil, "countersign: a refused PIN\x00%q %q %q %v %d %d %d %d %d",
		token, device, pinFile, err, st.Dev, st.Ino, st.Size, st.Mtim.Nano(), st.Ctim.Nano()))
	return hex.EncodeToString(sum[:])
}

// remembered is the refusal of a PIN file with this digest, or nil. A file of another refusal is
// out of date. An unreadable file is a refusal: to guess would cost a try.
func (r *refusal) remembered(digest string) error {
	if r.path == "" {
		return nil
	}
	b, err := os.ReadFile(r.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	var m memo
	if err == nil {
		err = json.Unmarshal(b, &m)
	}
	if err != nil {
		return fmt.Errorf("%w: %s may have a refusal of it, and can't be read (%w); remove the file if the PIN is "+
			"right", keystore.ErrAuth, r.path, err)
	}
	if m.Digest != digest {
		return nil
	}
	return fmt.Errorf("%w: the PIN in %s was refused at %s (%s)", keystore.ErrAuth, r.pinFile, m.At, m.Err)
}

// refuse notes the digest of a refused PIN file.
func (r *refusal) refuse(digest string) { r.refused, r.seen = digest, digest }

// keep writes the refusal of the PIN file that the last login has read.
func (r *refusal) keep(cause error) error {
	r.refuse(r.tried)
	if r.path == "" {
		return nil
	}
	b, err := json.Marshal(memo{r.tried, time.Now().UTC().Format(time.RFC3339), cause.Error()})
	if err != nil {
		return err
	}
	return durable.Replace(r.path, append(b, '\n'), 0o644)
}

// forget ends the memory of a refusal.
func (r *refusal) forget() error {
	r.refuse("")
	if r.path == "" {
		return nil
	}
	err := os.Remove(r.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	return durable.Sync(filepath.Dir(r.path))
}

// changed reports that the PIN file, whose digest is now, is another than the refused one, at two
// calls in a row.
func (r *refusal) changed(now string) bool {
	settled := now == r.seen
	r.seen = now
	return settled && now != r.refused
}
