// Package tpm implements keystore.Store on a TPM 2.0. Begin reading at Open and at Store.seed,
// which unseals every sealed key; seal.go has the TPM commands.
//
// No TPM supports Ed25519 signatures or X25519 key exchange. Ed25519 and X25519 keys are sealed
// (custody tpm-sealed): the TPM encrypts the seed under a policy on the machine's measured state.
// For use, the TPM unseals the seed into protected memory of a key worker. P-256 keys never leave
// the TPM (custody tpm-resident).
//
// An attacker may read and change the state directory and the bus to the TPM. So every sealed blob
// contains the name of its key, and every secret crosses the bus encrypted, in a session salted to
// the storage root key. Provision has recorded the name of the storage root key. The kernel and the
// memory of the process are trusted.
package tpm

import (
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"countersign/internal/durable"
	"countersign/internal/eddsa"
	"countersign/internal/keystore"
	"countersign/internal/secret"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// Config names a TPM and a state directory. Zero values are not defaults: the caller sets every
// field on purpose.
type Config struct {
	Device string // /dev/tpmrm0, or the path of a Unix socket of swtpm
	State  string // the state directory, with the sealed blobs
	// StorageRoot is the handle of the storage root key; 0 stands for 0x81000001.
	StorageRoot uint32
	// CounterIndex is the NV index of the monotonic counter; 0 stands for 0x01800c51.
	CounterIndex uint32
	PCRBank      Bank   // the bank of PCRs; "" stands for sha256
	PCRs         []uint // registers of the bank: new keys are sealed to the present values
	ZeroPCRs     []uint // those of PCRs that may be without a measurement
	// PolicyKey is the path of the approver's public key, or empty. With PolicyKey, new keys are
	// usable in every state signed by the approver (see Approval) and in no other state.
	PolicyKey string
	PINFile   string        // path of the PIN, or empty; with PINFile, new keys also need the PIN
	Deadline  time.Duration // timeout of one command
	IdleLock  time.Duration // unsealed seeds are wiped after this time without use; 0: never

	// LogIn wraps each use of the PIN, and may refuse the use. Nil allows every use. The TPM counts
	// wrong PINs and locks after a few. The lock ends by itself, and an unclean stop counts too, so
	// that the last try is no reason to wait for an operator: lastTry has no effect.
	LogIn func(ctx context.Context, logIn func(lastTry bool) error) error `json:"-"`
}

func (c Config) storageRoot() tpm2.TPMHandle { return cmp.Or(tpm2.TPMHandle(c.StorageRoot), srkHandle) }

// ErrNotProvisioned reports a state directory without a preceding Provision.
var ErrNotProvisioned = fmt.Errorf("tpm: %w: the folder belongs to no TPM yet", keystore.ErrReplaced)

// Store is a keystore.Store on one TPM and one state directory.
type Store struct {
	config   Config
	dir      stateDir
	srk      storageKey
	approver []byte // public key of the approver of new keys, 65 bytes; nil without PolicyKey
	bus      *bus

	dirMu sync.Mutex // held during changes of the state directory

	mu         sync.RWMutex
	vault      *vault                     // guarded by mu; memory of the unsealed keys
	seeds      map[keystore.Tag]*unsealed // guarded by mu
	closed     bool                       // guarded by mu
	authFailed error                      // guarded by mu; set once the TPM has refused the PIN
	idle       *time.Timer
}

// unsealed is a sealed key in use.
type unsealed struct {
	info keystore.Info
	key  []byte // in the vault: an expanded Ed25519 key, or an X25519 scalar of 32 bytes
}

// Provisioned reports whether Provision has been done for the state directory.
func Provisioned(c Config) bool {
	_, err := stateDir(c.State).readBinding()
	return !errors.Is(err, ErrNotProvisioned)
}

// Provision creates a storage root key in the TPM, unless there is one, and records the key's name
// in the state directory. A provisioned directory is left unchanged. Provision trusts the TPM at
// its first use: an attacker answering in place of the TPM during Provision can read every secret
// later.
func Provision(ctx context.Context, c Config) error {
	if err := os.MkdirAll(c.State, 0o700); err != nil {
		return fmt.Errorf("tpm: %w", err)
	}
	dir := stateDir(c.State)
	b := newBus(c)
	defer b.close()
	if _, err := dir.readBinding(); !errors.Is(err, ErrNotProvisioned) {
		return err // without a look at the TPM, which may be away
	}
	return b.use(ctx, func(t transport.TPM) error {
		srk, err := makeSRK(t, c.storageRoot())
		if err != nil {
			return err
		}
		return dir.write(BindingFile, binding{Format: 1, SRKName: hex.EncodeToString(srk.name.Buffer)})
	})
}

// PutAside renames the files of the state directory to NAME.replaced-TIME, if they belong to
// another TPM: nothing is lost, should that one come back. The binding goes last, so that the next
// call goes on with one that was cut off.
func PutAside(ctx context.Context, c Config) error {
	dir := stateDir(c.State)
	name, err := dir.readBinding()
	if errors.Is(err, ErrNotProvisioned) {
		return nil
	} else if err != nil {
		return err
	}
	b := newBus(c)
	defer b.close()
	err = b.use(ctx, func(t transport.TPM) error {
		_, err := checkSRK(t, c.storageRoot(), name)
		return err
	})
	if !errors.Is(err, keystore.ErrReplaced) {
		return err
	}
	records, err := filepath.Glob(filepath.Join(c.State, "*"+recordSuffix))
	if err != nil {
		return err
	}
	suffix := ".replaced-" + time.Now().UTC().Format("20060102T150405Z")
	for _, path := range records {
		if err := os.Rename(path, path+suffix); err != nil {
			return fmt.Errorf("tpm: %w", err)
		}
	}
	if err := dir.sync(); err != nil {
		return err
	}
	path := filepath.Join(c.State, BindingFile)
	if err := os.Rename(path, path+suffix); err != nil {
		return fmt.Errorf("tpm: %w", err)
	}
	return dir.sync()
}

// Open connects to the TPM and compares the storage root key with the record in the state
// directory.
func Open(ctx context.Context, c Config) (*Store, error) {
	s := &Store{config: c, dir: stateDir(c.State), bus: newBus(c), seeds: map[keystore.Tag]*unsealed{}}
	name, err := s.dir.readBinding()
	if err != nil {
		return nil, err
	}
	if c.PINFile != "" {
		pin, err := readPIN(c.PINFile) // report a faulty PIN file now rather than at the first use
		if err != nil {
			return nil, err
		}
		pin.Wipe()
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
		if err := s.bus.flushStale(t); err != nil {
			return err
		}
		s.srk, err = checkSRK(t, c.storageRoot(), name)
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

// Close wipes all unsealed seeds and closes the connection to the TPM.
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

// Lock wipes all unsealed seeds. The next use of a key unseals the key's seed again.
func (s *Store) Lock() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		clear(s.seeds)
		s.vault.wipe()
	}
}

// Status reports whether the TPM accepts the PIN.
func (s *Store) Status() keystore.Status {
	s.mu.RLock()
	defer s.mu.RUnlock()
	st := keystore.Status{Up: s.authFailed == nil}
	if s.authFailed != nil {
		st.Cause = s.authFailed.Error()
	}
	return st
}

// Retry allows the next use of the PIN after a refused one.
func (s *Store) Retry() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.authFailed = nil
}

var errClosed = fmt.Errorf("%w: the store is closed", keystore.ErrUnavailable)

// withPIN runs use with the PIN, or with none for a key without a PIN.
func (s *Store) withPIN(ctx context.Context, needed bool, use func(pin secret.Bytes) error) error {
	if !needed {
		return use(secret.Bytes{})
	}
	if s.config.PINFile == "" {
		return fmt.Errorf("tpm: %w: the key was sealed with a PIN; name its file with pin_file", keystore.ErrAuth)
	}
	s.mu.RLock()
	refused := s.authFailed
	s.mu.RUnlock()
	if refused != nil {
		return refused
	}
	logIn := func(bool) error {
		pin, err := readPIN(s.config.PINFile)
		if errors.Is(err, fs.ErrPermission) {
			// The file was replaced, and the sandbox has the right to the former file only. A new
			// key worker has the right to the new one.
			return fmt.Errorf("%w: %w", keystore.ErrUnavailable, err)
		} else if err != nil {
			return err
		}
		defer pin.Wipe()
		return use(pin)
	}
	var err error
	if s.config.LogIn != nil {
		err = s.config.LogIn(ctx, logIn)
	} else {
		err = logIn(false)
	}
	if errors.Is(err, keystore.ErrAuth) && s.config.LogIn == nil { // LogIn remembers refusals itself
		s.mu.Lock()
		s.authFailed = err
		s.mu.Unlock()
	}
	return err
}

// seed returns an unsealed key, and unseals the key first if necessary. The caller may read the
// key's memory until the call of release.
func (s *Store) seed(ctx context.Context, k *key) (u *unsealed, release func(), err error) {
	for try := 0; ; try++ {
		s.mu.RLock()
		if s.closed {
			s.mu.RUnlock()
			return nil, nil, errClosed
		}
		if u := s.seeds[k.info.Tag]; u != nil && u.is(k.info) {
			if s.idle != nil {
				s.idle.Reset(s.config.IdleLock)
			}
			return u, s.mu.RUnlock, nil
		}
		s.mu.RUnlock()
		if try == 3 {
			return nil, nil, fmt.Errorf("tpm: %w: the seed was wiped %d times before its use; raise idle_lock above %v",
				keystore.ErrUnavailable, try, s.config.IdleLock)
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

// unseal has the TPM unseal a key into the vault.
func (s *Store) unseal(ctx context.Context, r record) error {
	return s.withPIN(ctx, r.Sealed.PIN, func(pin secret.Bytes) error {
		return s.bus.use(ctx, func(t transport.TPM) (err error) {
			secret.Do(func() {
				var data []byte
				if data, err = unseal(t, s.srk, r.Sealed, pin); err != nil {
					return
				}
				defer clear(data)
				err = s.addToVault(r, data)
			})
			return explainPolicy(t, r.Sealed, err)
		})
	})
}

// addToVault copies the content of a seal into the vault, if the content belongs to the record, and
// if the record is still there: Destroy removes the record first, and takes mu afterwards, so a key
// that was destroyed meanwhile does not stay in the vault.
func (s *Store) addToVault(r record, data []byte) error {
	seed, err := r.openSeal(data)
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
	if now, err := s.dir.read(r.Info.Ref); err != nil {
		return err
	} else if now.Info.Tag != r.Info.Tag {
		return fmt.Errorf("%v: %w: the folder has another key under this name now", r.Info.Ref, keystore.ErrUnfit)
	}
	memory := s.vault.slot()
	for tag := range s.seeds { // with all slots in use, any other key gives its slot up
		if memory != nil {
			break
		}
		s.forget(tag)
		memory = s.vault.slot()
	}
	if r.Info.Algorithm == keystore.Ed25519 {
		eddsa.Expand(memory, seed)
	} else {
		copy(memory, seed)
	}
	u := &unsealed{r.Info, memory}
	if !u.matchesPublicKey() {
		s.vault.put(memory)
		return fmt.Errorf("%v: %w: the sealed seed has another public key than its record",
			r.Info.Ref, keystore.ErrUnfit)
	}
	s.seeds[r.Info.Tag] = u
	return nil
}

// forget wipes an unsealed key. The caller holds mu.
func (s *Store) forget(tag keystore.Tag) {
	if u := s.seeds[tag]; u != nil {
		s.vault.put(u.key)
		delete(s.seeds, tag)
	}
}

// BindingFile is the name of the file that binds a state directory to a TPM.
const BindingFile = "tpm.json"

// binding is the content of BindingFile: the storage root key of the directory's TPM.
type binding struct {
	Format  int    `json:"format"`
	SRKName string `json:"srk_name"` // hex of the TPM2B_NAME, TPM 2.0 Part 1 section 16
}

// stateDir is the path of the state directory.
type stateDir string

// write stores v as JSON. The replacement of a file is atomic and durable.
func (d stateDir) write(name string, v any) (err error) {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("tpm: %w", err)
	}
	if err := durable.Replace(filepath.Join(string(d), name), append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("tpm: %w", err)
	}
	return nil
}

func (d stateDir) sync() error { return durable.Sync(string(d)) }

// readBinding returns the name of the storage root key in BindingFile.
func (d stateDir) readBinding() (name tpm2.TPM2BName, err error) {
	b, err := os.ReadFile(filepath.Join(string(d), BindingFile))
	if errors.Is(err, os.ErrNotExist) {
		return name, fmt.Errorf("%w: run countersignd init", ErrNotProvisioned)
	} else if err != nil {
		return name, fmt.Errorf("tpm: %w", err)
	}
	var r binding
	if err := json.Unmarshal(b, &r); err != nil || r.Format != 1 {
		return name, fmt.Errorf("tpm: %s is damaged or of a newer version; restore it from a backup", BindingFile)
	}
	if name.Buffer, err = hex.DecodeString(r.SRKName); err != nil || len(name.Buffer) == 0 {
		return name, fmt.Errorf("tpm: %s is damaged; restore it from a backup", BindingFile)
	}
	return name, nil
}
