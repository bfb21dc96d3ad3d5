package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"countersign/hsm"
	"countersign/internal/keystore"
	"countersign/internal/keystore/worker"
	"countersign/tpm"
)

// workerCommand is the hidden subcommand under which countersignd runs itself as a key worker.
const workerCommand = "key-worker"

// openToken starts the key workers of a token. The daemon's process never loads the module or reads the PIN.
func openToken(ctx context.Context, name string, t *Token, patient bool, log *slog.Logger, changed func(up bool, cause error)) (keystore.Store, error) {
	device, inFlight := device{HSM: new(t.hsm())}, max(16, 2*t.Sessions)
	if t.TPM != "" {
		device.HSM, device.TPM, inFlight = nil, new(t.tpm()), 256 // most of what is asked of it is done without the TPM
	}
	hello, err := json.Marshal(device)
	if err != nil {
		return nil, err
	}
	pool, err := worker.Open(ctx, worker.Config{
		Name: name, Hello: hello, Workers: t.Workers, Spread: t.Spread, InFlight: inFlight, Memory: t.MemoryMiB << 20,
		Deadline: t.Deadline.std(), Log: log, OnChange: changed,
		Command: func(int) *exec.Cmd {
			// The running binary, even if a package has replaced the file meanwhile.
			cmd := exec.Command("/proc/self/exe", workerCommand, name)
			cmd.Args[0] = "countersignd"
			cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool { // the service manager's words are for the daemon
				return strings.HasPrefix(v, "NOTIFY_SOCKET=") || strings.HasPrefix(v, "WATCHDOG_") || strings.HasPrefix(v, "LISTEN_")
			})
			for name, value := range t.Environment {
				cmd.Env = append(cmd.Env, name+"="+value)
			}
			cmd.Env = append(cmd.Env, "GOTRACEBACK=none") // no registers and no stack of a crash in a log: they can hold secrets
			return cmd
		},
	}, patient)
	if err != nil {
		return nil, fmt.Errorf("token %s: %w", name, err)
	}
	return pool, nil
}

// keyWorker is the process that a Pool has started.
func keyWorker() error {
	if err := noCoreFiles(); err != nil {
		return err
	}
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP) // the daemon decides, by closing the socket
	socket := os.NewFile(3, "key worker")
	if st, err := socket.Stat(); err != nil || st.Mode().Type() != os.ModeSocket {
		return errors.New("key-worker is for countersignd itself")
	}
	return worker.Serve(socket, func(ctx context.Context, config []byte, gate worker.LogIn) (keystore.Store, int, error) {
		var d device
		if err := json.Unmarshal(config, &d); err != nil {
			return nil, 0, err
		}
		store, lanes, err := d.open(ctx, gate)
		if err != nil {
			return nil, 0, err
		}
		return store, lanes, nil
	})
}

// device is what a key worker is told: one of its fields is set.
type device struct {
	HSM *hsm.Config `json:"hsm,omitempty"`
	TPM *tpm.Config `json:"tpm,omitempty"`
}

func (d device) open(ctx context.Context, gate worker.LogIn) (keystore.Store, int, error) {
	switch {
	case d.HSM != nil:
		d.HSM.LogIn = gate
		// Go takes the place of a thread that waits in C away only after a while: there is one for each that may wait, and
		// some for those that don't.
		runtime.GOMAXPROCS(d.HSM.Sessions + 2)
		store, err := hsm.Open(ctx, *d.HSM)
		return store, d.HSM.Sessions, err
	case d.TPM != nil:
		d.TPM.LogIn = gate
		store, err := tpm.Open(ctx, *d.TPM)
		return store, runtime.GOMAXPROCS(0), err
	}
	return nil, 0, errors.New("a key worker was told of no device")
}

// openTokens opens all tokens. That with the Noise key must answer; another one may come later.
func openTokens(ctx context.Context, c Config, log *slog.Logger, changed func(token string, up bool, cause error)) (map[string]keystore.Store, error) {
	all := map[string]keystore.Store{}
	for name, t := range c.Tokens {
		store, err := openToken(ctx, name, t, name != c.NoiseToken, log, func(up bool, cause error) { changed(name, up, cause) })
		if err != nil {
			closeTokens(all, log)
			return nil, err
		}
		all[name] = store
	}
	return all, nil
}

func closeTokens(all map[string]keystore.Store, log *slog.Logger) {
	for name, store := range all {
		if err := store.Close(); err != nil {
			log.Error("close a token", "token", name, "err", err)
		}
	}
}
