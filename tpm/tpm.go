// Package tpm keeps keys with a TPM 2.0. Begin reading at Open and at Store.seed, through which every sealed key comes
// into use; seal.go has what is said to the TPM.
//
// No TPM makes Ed25519 signatures or X25519 secrets. Such keys are sealed: their seed rests encrypted by this TPM under a
// policy on the state that this machine has measured, and is unsealed into protected memory of a key worker while it is in
// use (custody tpm-sealed). P-256 keys live in the TPM (custody tpm-resident).
//
// The folder of the state and the bus to the TPM may be read and changed by an attacker: every blob is bound to its name
// inside the seal, and every secret crosses the bus encrypted, in a session salted to a storage root key whose name was
// written down by Provision. The kernel and the process' own memory are trusted.
package tpm

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"countersign/internal/eddsa"
	"countersign/internal/keystore"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// Config names a TPM and a folder. Its zero values are not defaults: the caller decides.
type Config struct {
	Device string // /dev/tpmrm0, or the path of a Unix socket of swtpm
	State  string // the folder of the blobs
	PCRs   []uint // the policy of new keys: these registers, of bank SHA-256, must be as they are now
	// PolicyKey, where it is set, is the file with the public key of whoever approves states: new keys are usable in each state
	// that it has approved (see Approval), and in no other.
	PolicyKey string
	PINFile   string        // where it is set, new keys need the PIN too, and the TPM counts wrong ones
	Deadline  time.Duration // for one command
	IdleLock  time.Duration // seeds are wiped when they were not used for so long; 0: never

	// LogIn, where it is set, is called around each use of the PIN and decides whether there may be one.
	LogIn func(ctx context.Context, logIn func() error) error `json:"-"`
}

// ErrNotProvisioned says that Provision has not been run on this folder.
var ErrNotProvisioned = errors.New("tpm: the folder belongs to no TPM yet")

// Store is a keystore.Store on one TPM and one folder.
type Store struct {
	config   Config
	folder   folder
	srk      pinned
	approver []byte // of new keys; nil: none
	bus      *bus

	making sync.Mutex // held while the folder changes

	mu     sync.RWMutex
	vault  *vault                     // under mu: what is unsealed
	seeds  map[keystore.Tag]*unsealed // under mu
	closed bool                       // under mu
	auth   error                      // under mu: a wrong PIN is never tried twice
	idle   *time.Timer
}

// unsealed is a sealed key in use.
type unsealed struct {
	info keystore.Info
	key  []byte // in the vault: an expanded Ed25519 key, or an X25519 scalar of 32 bytes
}

// Provision makes the TPM and the folder ready for each other, unless they are: there is a storage root key, and the
// folder knows its name. It believes the TPM that it finds: whoever can answer in its place now can read every secret
// later.
func Provision(ctx context.Context, c Config) error {
	if err := os.MkdirAll(c.State, 0o700); err != nil {
		return fmt.Errorf("tpm: %w", err)
	}
	f := folder(c.State)
	b := newBus(c)
	defer b.close()
	return b.use(ctx, func(t transport.TPM) error {
		if _, err := f.readPin(); !errors.Is(err, ErrNotProvisioned) {
			return err
		}
		srk, err := makeSRK(t)
		if err != nil {
			return err
		}
		return f.write(pinFile, pinRecord{Format: 1, SRKName: hex.EncodeToString(srk.name.Buffer)})
	})
}

// Open connects to the TPM and holds it against the folder.
func Open(ctx context.Context, c Config) (*Store, error) {
	s := &Store{config: c, folder: folder(c.State), bus: newBus(c), seeds: map[keystore.Tag]*unsealed{}}
	name, err := s.folder.readPin()
	if err != nil {
		return nil, err
	}
	if c.PINFile != "" {
		pin, err := readPIN(c.PINFile) // a file that is wrong is better seen now
		if err != nil {
			return nil, err
		}
		clear(pin)
	}
	if c.PolicyKey != "" {
		if s.approver, err = ReadPolicyKey(c.PolicyKey); err != nil {
			return nil, err
		}
	}
	if s.vault, err = newVault(); err != nil {
		return nil, fmt.Errorf("tpm: %w", err)
	}
	err = s.bus.use(ctx, func(t transport.TPM) (err error) {
		if err := s.bus.tidy(t); err != nil {
			return err
		}
		s.srk, err = checkSRK(t, name)
		return err
	})
	if err != nil {
		s.vault.close()
		s.bus.close()
		return nil, err
	}
	if c.IdleLock > 0 {
		s.idle = time.AfterFunc(c.IdleLock, s.Lock)
	}
	return s, nil
}

func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.closed = true
		clear(s.seeds)
		s.vault.close()
		s.bus.close()
	}
	return nil
}

// Lock wipes all seeds; each is unsealed again when it is wanted.
func (s *Store) Lock() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		clear(s.seeds)
		s.vault.wipe()
	}
}

func (s *Store) Status() keystore.Status {
	s.mu.RLock()
	defer s.mu.RUnlock()
	st := keystore.Status{Up: s.auth == nil}
	if s.auth != nil {
		st.Cause = s.auth.Error()
	}
	return st
}

func (s *Store) Retry() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.auth = nil
}

var errClosed = fmt.Errorf("%w: the store is closed", keystore.ErrUnavailable)

// withPIN runs what uses the PIN, which is nil where there is none.
func (s *Store) withPIN(ctx context.Context, wanted bool, use func(pin []byte) error) error {
	if !wanted {
		return use(nil)
	}
	if s.config.PINFile == "" {
		return fmt.Errorf("tpm: %w: the key was sealed with a PIN; name its file with pin_file", keystore.ErrAuth)
	}
	s.mu.RLock()
	refused := s.auth
	s.mu.RUnlock()
	if refused != nil {
		return refused
	}
	gate := s.config.LogIn
	if gate == nil {
		gate = func(_ context.Context, logIn func() error) error { return logIn() }
	}
	err := gate(ctx, func() error {
		pin, err := readPIN(s.config.PINFile)
		if err != nil {
			return err
		}
		defer clear(pin)
		return use(pin)
	})
	if errors.Is(err, keystore.ErrAuth) {
		s.mu.Lock()
		s.auth = err
		s.mu.Unlock()
	}
	return err
}

// seed returns a sealed key that is in use, and unseals it where it is not. Its memory may be read while release has not
// been called.
func (s *Store) seed(ctx context.Context, k *key) (u *unsealed, release func(), err error) {
	for try := 0; ; try++ {
		s.mu.RLock()
		if s.closed {
			s.mu.RUnlock()
			return nil, nil, errClosed
		}
		if u := s.seeds[k.info.Tag]; u != nil && bytes.Equal(u.info.PublicKey, k.info.PublicKey) {
			if s.idle != nil {
				s.idle.Reset(s.config.IdleLock)
			}
			return u, s.mu.RUnlock, nil
		}
		s.mu.RUnlock()
		if try == 3 {
			return nil, nil, fmt.Errorf("tpm: %w: the seed is wiped as soon as it is there; idle_lock is too short", keystore.ErrUnavailable)
		}
		r, err := k.record()
		if err != nil {
			return nil, nil, err
		}
		if err := s.unseal(ctx, r); err != nil {
			return nil, nil, fmt.Errorf("%v: %w", k.info.Ref, err)
		}
	}
}

// unseal brings a sealed key into the vault.
func (s *Store) unseal(ctx context.Context, r record) error {
	return s.withPIN(ctx, r.Sealed.PIN, func(pin []byte) error {
		return s.bus.use(ctx, func(t transport.TPM) (err error) {
			secretly(func() {
				var data []byte
				if data, err = unseal(t, s.srk, r.Sealed, pin); err != nil {
					return
				}
				defer clear(data)
				err = s.keep(r, data)
			})
			return explain(t, r.Sealed, err)
		})
	})
}

// keep puts the content of a seal into the vault, if it is the one of this record.
func (s *Store) keep(r record, data []byte) error {
	seed, err := r.open(data)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errClosed
	}
	if s.seeds[r.Info.Tag] != nil {
		return nil
	}
	memory, err := s.vault.slot()
	if err != nil {
		return err
	}
	if r.Info.Algorithm == keystore.Ed25519 {
		eddsa.Expand(memory, seed)
	} else {
		copy(memory, seed)
	}
	u := &unsealed{r.Info, memory}
	if !u.proves() {
		clear(memory)
		return fmt.Errorf("%v: %w: the sealed seed has another public key than its record", r.Info.Ref, keystore.ErrUnfit)
	}
	s.seeds[r.Info.Tag] = u
	return nil
}

// pinFile records which storage root key the folder belongs to.
const pinFile = "tpm.json"

type pinRecord struct {
	Format  int    `json:"format"`
	SRKName string `json:"srk_name"` // hex of the TPM2B_NAME, TPM 2.0 Part 1 section 16
}

// folder is where the records are. A file is written under another name, synced and renamed, so that it is whole or not
// there.
type folder string

func (f folder) write(name string, v any) (err error) {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("tpm: %w", err)
	}
	path := filepath.Join(string(f), name)
	file, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err == nil {
		if _, err = file.Write(append(b, '\n')); err == nil {
			err = file.Sync()
		}
		err = errors.Join(err, file.Close())
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err == nil {
		err = f.sync()
	}
	if err != nil {
		return fmt.Errorf("tpm: %w", err)
	}
	return nil
}

func (f folder) sync() error {
	dir, err := os.Open(string(f))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

func (f folder) readPin() (name tpm2.TPM2BName, err error) {
	b, err := os.ReadFile(filepath.Join(string(f), pinFile))
	if errors.Is(err, os.ErrNotExist) {
		return name, fmt.Errorf("%w: run countersignd init", ErrNotProvisioned)
	} else if err != nil {
		return name, fmt.Errorf("tpm: %w", err)
	}
	var r pinRecord
	if err := json.Unmarshal(b, &r); err != nil || r.Format != 1 {
		return name, fmt.Errorf("tpm: %s is damaged or of a newer version; restore it from a backup", pinFile)
	}
	if name.Buffer, err = hex.DecodeString(r.SRKName); err != nil || len(name.Buffer) == 0 {
		return name, fmt.Errorf("tpm: %s is damaged; restore it from a backup", pinFile)
	}
	return name, nil
}
