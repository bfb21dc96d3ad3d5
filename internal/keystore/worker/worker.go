// Package worker puts a process boundary between the daemon and the code that reaches a device: a key worker is the
// daemon run again, with the device's module loaded and the PIN read there and nowhere else. Begin reading at Pool.do,
// through which every use of a key goes; Serve is the other side.
//
// What holds: a call has an answer, or an error, by its context's end, whatever the device does. A worker that is late,
// crashes, answers wrongly or says that its device does not answer is killed and replaced, and the call goes to another
// one; Ed25519 and X25519 are deterministic, and a second ECDSA signature is as good as the first. What makes keys is not
// repeated; a destruction is, since it touches only what its tag marks. When no worker can be had, calls fail at once until
// one is back.
package worker

import (
	"log/slog"
	"os/exec"
	"time"
)

// Config says how workers are run. Its zero values are not defaults: the caller decides.
type Config struct {
	Name     string                     // of the token, for the log
	Command  func(number int) *exec.Cmd // the command of a new worker, which calls Serve with descriptor 3
	Hello    []byte                     // the configuration that the worker opens its device with; no secrets
	Workers  int                        // how many; each but the first is a hot standby
	Spread   bool                       // all workers are used at the same time, not only the first that is well
	InFlight int                        // calls that one worker may have at once
	Memory   int                        // bytes of memory at which a worker is renewed, without a call lost: modules leak
	Deadline time.Duration              // for one use of a key by the device; what is slow has slowFactor of them
	Log      *slog.Logger
	// OnChange, where it is set, hears that no worker can be had any more, and that one has served again. It runs beside
	// everything else, one call after another.
	OnChange func(up bool, cause error)
}

const (
	// slowFactor is how many deadlines a start, a generation or a look at the token may take.
	slowFactor = 4
	// A worker that was well for sound, or has served soundCalls, is replaced at once when it ends; one that keeps dying
	// is replaced after a pause that doubles from firstPause to longestPause.
	sound        = time.Second
	soundCalls   = 100
	firstPause   = 50 * time.Millisecond
	longestPause = 3 * time.Second
	// lookEvery is how long a worker may be idle before it is asked whether its device is there.
	lookEvery = 15 * time.Second
	// tries bounds how many workers see one call.
	tries = 4
	// recovered is how long a worker must be there for the device to count as back, unless it serves before.
	recovered = 5 * time.Second
)
