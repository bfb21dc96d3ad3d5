// Package worker puts a process boundary between the daemon and the driver code of a device: a
// PKCS#11 module, or the commands of a TPM. A key worker is the daemon's binary, run as a process
// of its own. Only key workers load the module and read the PIN.
//
// Begin reading at Pool.do in pool.go, the retry loop around every use of a key. Then follow
// lifecycle.go (starts, monitors and replaces workers), login.go (one login at a time), refusal.go
// (refused PINs, remembered across restarts), breaker.go (the circuit breaker), faults.go (the
// state for operators), key.go (the methods of keystore.Store), process.go (one worker as the pool
// sees it), pipe.go (frames on the socket) and serve.go (the worker's side of the boundary).
//
// A call has an answer or an error by its context's end, whatever the device does. The pool kills
// and replaces a worker after a missed deadline, a crash, a wrong answer, or an answer of class
// keystore.ErrUnavailable. Another worker then gets the call. Such retries are safe: Ed25519 and
// X25519 are deterministic, and a second ECDSA signature is as good as the first. Making a key is
// an at-most-once call and has no retry. A destruction is idempotent and has retries: the key's
// tag keeps all other objects safe. While no worker can be started, the circuit breaker is open,
// and calls fail at once.
package worker

import (
	"log/slog"
	"os"
	"time"
)

// Config says how a Pool runs its workers. There are no defaults: a zero field means zero.
type Config struct {
	Name string // the token's name, for the log
	// Start starts the process of a worker, which calls Serve with socket, and knows its device. A
	// worker for an import can read seedFile, which is "" for others. The files are the caller's.
	Start    func(number int, seedFile string, socket, stderr *os.File) (Process, error)
	Workers  int           // number of workers; each but the first is a hot standby, unless Spread
	Spread   bool          // balance calls over all workers, instead of using the first healthy one
	InFlight int           // largest number of calls in flight at one worker
	Memory   int           // bytes; a larger worker is renewed without losing a call: modules leak
	Deadline time.Duration // for one use of a key by the device; a slow operation has slowFactor of these
	Log      *slog.Logger
	// Optional has a patient Open succeed whatever the device's failure: a wrong PIN or another
	// device costs the keys of this token only.
	Optional bool
	// OnChange, if not nil, receives the start and the end of each outage, with Name: no worker can
	// be started, or the device refuses to unseal a key. OnChange also receives the loss of a key
	// from the device, and its return, with the key's reference ("payments/1"). A goroutine of the
	// pool makes the calls, one after another and in order, so a slow OnChange delays no signature.
	OnChange func(resource string, up bool, cause error)

	// PINPerKey is for a device that serves without the PIN, which only some keys need: a TPM. A
	// refused PIN then costs these keys, and ends no worker.
	PINPerKey bool

	PINFile string // path of the PIN, or "" for a device without one; the pool never reads the file
	// IdentifyPIN names the device and the state of PINFile, as the function IdentifyPIN does. The
	// pool itself may have no access to the file. Required with PINFile.
	IdentifyPIN func() string
	Memo        string // path of the file that remembers a refused PIN across restarts (refusal.go), or ""
	// Retry has Open forget a refused PIN, and permits one login on the last try, as Pool.Retry:
	// the word of an operator.
	Retry bool
}

// slowFactor is the number of deadlines for a slow operation: a start, a key generation, an
// inspection or a health check.
const slowFactor = 4
