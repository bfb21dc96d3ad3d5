package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"countersign/hsm"
	"countersign/internal/form"
	"countersign/internal/journal"
	"countersign/internal/keystore"
	"countersign/internal/keystore/worker"
	"countersign/internal/launcher"
	"countersign/internal/sandbox"
	"countersign/internal/scrub"
	"countersign/internal/secret"
	"countersign/tpm"

	"golang.org/x/sys/unix"
)

// workerCommand is the hidden command of a key worker process.
const workerCommand = "key-worker"

// openToken starts the key workers of a token. The daemon's process never loads the module or reads
// the PIN. A patient token need not answer yet, and may fail in any way if the Noise key is on
// another token.
func openToken(
	ctx context.Context, c Config, name string, patient, optional bool, log *slog.Logger,
	changed func(resource string, up bool, cause error),
) (keystore.Store, error) {
	t := c.Tokens[name]
	config := c.workers(name, launcher.Start{Token: name}, log)
	config.OnChange, config.Optional = changed, optional
	pool, err := worker.Open(ctx, config, patient)
	if err != nil {
		return nil, fmt.Errorf("token %s: %w%s", name, err, t.missingPaths())
	}
	return pool, nil
}

// newToken has a key worker initialise a PKCS#11 token or the folder of a TPM, and reports whether
// the token was missing. With replace, the records of another TPM are put aside first. A module has
// the token's environment, and its output goes to the log.
func newToken(ctx context.Context, c Config, name string, replace bool, log *slog.Logger) (made bool, err error) {
	t := c.Tokens[name]
	config := c.workers(name, launcher.Start{Token: name, Make: true, Replace: replace}, log)
	config.Workers, config.Deadline = 1, max(config.Deadline, newTokenTime)
	pool, err := worker.Open(ctx, config, false)
	switch {
	case errors.Is(err, keystore.ErrExists):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("token %s: %w%s", name, err, t.missingPaths())
	}
	return true, pool.Close()
}

// missingPaths names the variables of a token with a path that does not exist, as the end of an
// error: modules tell no more than that they fail.
func (t *Token) missingPaths() (text string) {
	for _, name := range slices.Sorted(maps.Keys(t.Environment)) {
		path := t.Environment[name]
		if _, err := os.Stat(path); filepath.IsAbs(path) && errors.Is(err, fs.ErrNotExist) {
			text += fmt.Sprintf("; %s names %s, which does not exist: correct environment", name, path)
		}
	}
	return text
}

// newTokenTime is the least deadline of a worker that initialises a token; the start of a worker
// has four times the deadline. An HSM takes seconds for C_InitToken.
const newTokenTime = 10 * time.Second

// workers returns the configuration of the key workers of a token, which the launcher starts.
func (c *Config) workers(name string, what launcher.Start, log *slog.Logger) worker.Config {
	t := c.Tokens[name]
	inFlight := max(16, 2*t.Sessions)
	if t.TPM != "" {
		inFlight = 256 // most calls are done without the TPM
	}
	return worker.Config{
		Name: name, Workers: t.Workers, Spread: t.Spread, InFlight: inFlight, Memory: t.MemoryMiB << 20,
		Deadline: t.Deadline.std(), Log: log,
		PINPerKey: t.TPM != "", PINFile: t.pinPath(), Memo: t.memo, Retry: t.retry,
		IdentifyPIN: func() string { return c.launcher.PIN(name) },
		Start: func(_ int, seedFile string, socket, stderr *os.File) (worker.Process, error) {
			what := what
			what.Seed = seedFile
			return c.launcher.Start(what, socket, stderr)
		},
	}
}

// keyWorker is the main function of a key worker, started by the launcher with a socket to the
// daemon and with the configuration of its device.
func keyWorker() error {
	if err := noCoreFiles(); err != nil {
		return err
	}
	memory := lockMemory()
	ignoreSignals()
	socket, err := socketOf(3)
	if err != nil {
		return err
	}
	config := os.NewFile(4, "configuration")
	text, err := io.ReadAll(config)
	if err != nil {
		return err
	}
	config.Close()
	var d device
	if err := json.Unmarshal(text, &d); err != nil {
		return err
	}
	unguard := func() {}
	defer func() { unguard() }()
	open := func(ctx context.Context, gate worker.LogIn) (keystore.Store, int, error) {
		paths := d.pinPaths() // before the device is changed
		end, err := worker.GuardOutput(func(line string) string { return withoutPINs(paths, line) })
		if err != nil {
			return nil, 0, err
		}
		unguard = end                            // Serve waits for open
		if err := d.Rights.Enter(); err != nil { // before the module's first instruction
			return nil, 0, err
		}
		store, lanes, err := d.open(ctx, gate)
		if err != nil {
			return nil, 0, err
		}
		var w *journal.Writer
		if d.Journal != nil {
			w = journal.New(*d.Journal)
		}
		return inspected{form.Guard(store, w).(guarded), memory}, lanes, nil
	}
	return worker.Serve(socket, open)
}

// limitless is the value of a limit that is none.
const limitless = ^uint64(0)

// liftMemoryLimit has the child processes lock their memory, where this process may.
func liftMemoryLimit() {
	unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: limitless, Max: limitless})
}

// lockMemory keeps the memory of this process, which may contain the PIN and seeds, out of the swap
// space, and says whether it is. A limit below "unlimited" is not enough: the allocation that
// exceeds the limit would end the process. Pages are locked when they are used (MCL_ONFAULT), since
// a Go process reserves more than it uses.
func lockMemory() keystore.Finding {
	f := keystore.Finding{What: "memory", OK: true}
	var limit unix.Rlimit
	err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit)
	switch {
	case err == nil && limit.Cur != limitless:
		err = fmt.Errorf("the limit is %d bytes; allow it (LimitMEMLOCK=infinity in the unit)", limit.Cur)
	case err == nil:
		err = unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT)
	}
	if f.Text = "locked, so that no secret gets into the swap space"; err != nil {
		f.Text = "NOT locked, so that a PIN can get into the swap space: " + err.Error()
	}
	return f
}

// guarded is what form.Guard returns.
type guarded interface {
	keystore.Store
	keystore.BatchSigner
	keystore.Counter
	keystore.Rooted
	keystore.Recorder
	keystore.SeedImporter
	TryJournal() error
	JournalSize() (uint64, error)
}

// inspected is the store of a key worker, whose findings have one about the process.
type inspected struct {
	guarded
	memory keystore.Finding
}

func (s inspected) Inspect(ctx context.Context, prove bool) ([]keystore.Finding, error) {
	found, err := s.guarded.Inspect(ctx, prove)
	if err != nil {
		return nil, err
	}
	return append(found, s.memory), nil
}

// device is the configuration of a key worker: either HSM or TPM.
type device struct {
	HSM *hsm.Config `json:"hsm,omitempty"`
	TPM *tpm.Config `json:"tpm,omitempty"`

	Make      bool   `json:"make"`                  // the token first: HSM with SOPINFile, or the folder of a TPM
	Replace   bool   `json:"replace,omitempty"`     // with Make: what belongs to another TPM is put aside
	SOPINFile string `json:"so_pin_file,omitempty"` // the file with the PIN of the security officer

	Journal *journal.Config `json:"journal,omitempty"` // of the token's key workers

	Rights sandbox.Rights `json:"rights"` // of the key worker
}

// pinPaths returns the absolute paths of the files with PINs.
func (d device) pinPaths() []string {
	paths := []string{d.SOPINFile}
	switch {
	case d.HSM != nil:
		paths = append(paths, d.HSM.PINPath())
	case d.TPM != nil:
		paths = append(paths, d.TPM.PINFile)
	}
	return absolute(paths...)
}

// withoutPINs returns a line of the module without the PINs that the files have now. The files are
// read for each line, because a copy of a PIN must not stay in memory.
func withoutPINs(paths []string, line string) string {
	var pins [][]byte
	for _, path := range paths {
		pin, err := keystore.ReadSecret(path, "PIN file")
		if err != nil { // the module may have read the PIN before
			return "a line that is not shown, because a PIN file can't be read now"
		}
		defer pin.Wipe()
		pins = append(pins, bytes.TrimRight(pin.Expose(), "\r\n"))
	}
	return scrub.NewKnown(pins...).Text(line)
}

// open opens the device, and returns the number of concurrent operations.
func (d device) open(ctx context.Context, gate worker.LogIn) (keystore.Store, int, error) {
	switch {
	case d.HSM != nil:
		d.HSM.LogIn = gate
		// Go reuses the processor of a thread that waits in C only after a while. So each session
		// has a processor, and two are left for other goroutines.
		runtime.GOMAXPROCS(d.HSM.Sessions + 2)
		if d.Make {
			if err := hsm.InitToken(ctx, *d.HSM, d.SOPINFile); err != nil {
				return nil, 0, err
			}
		}
		store, err := hsm.Open(ctx, *d.HSM)
		return store, d.HSM.Sessions, err
	case d.TPM != nil:
		d.TPM.LogIn = gate
		if d.Make {
			if d.Replace {
				if err := tpm.PutAside(ctx, *d.TPM); err != nil {
					return nil, 0, err
				}
			}
			before := tpm.Provisioned(*d.TPM)
			if err := tpm.Provision(ctx, *d.TPM); err != nil {
				return nil, 0, err
			}
			if before {
				return nil, 0, keystore.ErrExists
			}
		}
		store, err := tpm.Open(ctx, *d.TPM)
		return store, runtime.GOMAXPROCS(0), err
	}
	return nil, 0, errors.New("a key worker has no device in its configuration")
}

// openTokens opens all tokens at once, so that a token that hangs costs the others no time. All
// tokens may answer later. A failure of the token with the Noise key that no wait can heal, such as
// a wrong PIN, is an error.
func openTokens(
	ctx context.Context, c Config, log *slog.Logger, changed func(resource string, up bool, cause error),
) (map[string]keystore.Store, error) {
	var opening sync.WaitGroup
	var mu sync.Mutex // guards all and failed
	all, failed := map[string]keystore.Store{}, error(nil)
	for name := range c.Tokens {
		opening.Go(func() {
			store, err := openToken(ctx, c, name, true, name != c.NoiseToken, log, changed)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed = errors.Join(failed, err)
			} else {
				all[name] = store
			}
		})
	}
	opening.Wait()
	if failed != nil {
		closeTokens(all, log)
		return nil, failed
	}
	return all, nil
}

// closeTokens closes tokens, and logs errors.
func closeTokens(all map[string]keystore.Store, log *slog.Logger) {
	for name, store := range all {
		if err := store.Close(); err != nil {
			log.Error("close a token", "token", name, "err", err)
		}
	}
}

// softHSMModule is the module of Debian's package softhsm2.
const softHSMModule = "/usr/lib/softhsm/libsofthsm2.so"

// softHSMConfig is a softhsm2.conf with the tokens in a folder.
func softHSMConfig(tokens string) string {
	return "directories.tokendir = " + tokens + "\nlog.level = ERROR\n"
}

// randomPIN is a PIN that nobody needs to know.
func randomPIN() secret.Bytes {
	b := make([]byte, 16)
	defer clear(b)
	rand.Read(b)
	return secret.New(hex.AppendEncode(nil, b))
}
