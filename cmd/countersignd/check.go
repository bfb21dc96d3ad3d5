package main

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"

	"countersign/appliance"
	"countersign/internal/cli"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/policy"

	"golang.org/x/sys/unix"
)

// checkOptions are the flags of countersignd check.
type checkOptions struct {
	deep  bool
	write bool // prove tokens with throw-away keys, without a question
}

// report is the output of check: a line for each part, and the faults for the summary.
type report struct {
	stdout io.Writer
	faults []error
}

func (r *report) say(part, format string, args ...any) {
	fmt.Fprintf(r.stdout, "%-8s %s\n", part, fmt.Sprintf(format, args...))
}

// fault prints a fault. The other parts are checked all the same.
func (r *report) fault(part string, err error) {
	text, hint := advise(err)
	if hint != "" {
		text += "; " + hint
	}
	r.say(part, "FAULT: %s", text)
	r.faults = append(r.faults, err)
}

// check does all that serve does before the event Started, and prints a line for each part and a
// summary. check writes to no ledger, and to a token only with consent: by --write, or by an answer
// on a terminal. While a daemon has the ledger open, the other parts are checked.
func check(
	ctx context.Context, path string, c Config, o checkOptions, stdin *os.File, stdout, stderr io.Writer,
) error {
	r := &report{stdout: stdout}
	r.say("config", "ok: %s", path)
	for _, err := range c.accessOfAll(path) {
		r.fault("access", configError{err})
	}
	rules, err := policy.Load(c.Policy)
	if err != nil {
		r.fault("policy", err)
	} else {
		r.say("policy", "ok: %s, sha256 %x", c.Policy, rules.Hash)
	}
	log := slog.New(slog.DiscardHandler)
	prove := o.write || consents(ctx, stdin, stderr)
	if !o.deep {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, startTime) // of the tokens, and not of the operator
		defer cancel()
	}
	tokens := r.checkTokens(ctx, c, prove, log)
	defer func() { closeTokens(tokens, log) }()
	if o.deep {
		r.checkDeep(c, stderr)
	}
	r.checkLedger(ctx, path, c, tokens, rules, log)
	if len(r.faults) > 0 {
		r.say("summary", "%s: serve may not start, or not serve with all keys", cli.Count(len(r.faults), "fault"))
		return errors.Join(r.faults...)
	}
	if prove {
		r.say("summary", "ok")
	} else {
		r.say("summary", "ok; no token has proven a key: --write has each token make and destroy throw-away keys")
	}
	return nil
}

// consents asks on a terminal whether tokens may be written to. A signal is a no.
func consents(ctx context.Context, stdin *os.File, stderr io.Writer) bool {
	if _, err := unix.IoctlGetTermios(int(stdin.Fd()), unix.TCGETS); err != nil {
		return false
	}
	fmt.Fprint(stderr, "May each token make, use and destroy throw-away keys, as a proof? [y/N] ")
	read := make(chan string, 1)
	go func() {
		answer, _ := bufio.NewReader(stdin).ReadString('\n')
		read <- answer
	}()
	select {
	case answer := <-read:
		return strings.EqualFold(strings.TrimSpace(answer), "y")
	case <-ctx.Done():
		return false
	}
}

// checkTokens opens all tokens and prints their findings. The result has the tokens that answer.
func (r *report) checkTokens(
	ctx context.Context, c Config, prove bool, log *slog.Logger,
) map[string]keystore.Store {
	tokens := map[string]keystore.Store{}
	for _, name := range slices.Sorted(maps.Keys(c.Tokens)) {
		t := c.Tokens[name]
		store, err := openToken(ctx, c, name, false, false, log, nil)
		if err != nil {
			r.fault("token", err)
			continue
		}
		tokens[name] = store
		confined := "key workers are confined"
		if missing := t.rights().Missing(); len(missing) > 0 {
			confined = "NOT WHOLE on this kernel: " + strings.Join(missing, "; ")
		}
		refs, err := store.Keys(ctx)
		if err != nil {
			r.fault("token", fmt.Errorf("token %s: %w", name, err))
			continue
		}
		r.say("token", "ok: %s, %s%s, %s of ours", name, t.URI, t.TPM, cli.Count(len(refs), "key"))
		r.say("", "sandbox           %s", confined)
		found, err := store.Inspect(ctx, prove)
		if err != nil {
			r.fault("token", fmt.Errorf("token %s: %w", name, err))
			continue
		}
		for _, f := range found {
			verdict := "ok"
			if !f.OK {
				verdict = "LACKING"
			}
			r.say("", "%-9s %-7s %s: %s", f.What, f.For, verdict, f.Text)
		}
		r.faults = append(r.faults, lacking(c, name, found)...)
	}
	return tokens
}

// checkDeep reads the whole ledger.
func (r *report) checkDeep(c Config, stderr io.Writer) {
	err := ledger.Check(c.Ledger, c.ledger(), func(done, all uint64) {
		if done > 0 && done%65536 == 0 {
			fmt.Fprintf(stderr, "ledger: %d of %d events\n", done, all)
		}
	})
	switch {
	case errors.Is(err, ledger.ErrInUse):
		r.fault("ledger", fmt.Errorf("%s: %w: --deep needs it for itself", c.Ledger, err))
	case errors.Is(err, ledger.ErrOlder): // checkLedger says so
	case err != nil:
		r.fault("ledger", fmt.Errorf("%s: %w", c.Ledger, err))
	default:
		r.say("ledger", "ok: every page, event and hash was read")
	}
}

// checkLedger opens the ledger, compares the keys with the tokens, and opens the listeners.
func (r *report) checkLedger(
	ctx context.Context, path string, c Config, tokens map[string]keystore.Store, rules *policy.Policy,
	log *slog.Logger,
) {
	l, err := openLedger(c, nil, nil, true)
	switch {
	case errors.Is(err, ledger.ErrOlder):
		r.say("ledger", "ok, and not read: %v: serve keeps a copy, and then brings it to the present format", err)
		return
	case errors.Is(err, ledger.ErrInUse):
		r.say("ledger", "in use: a daemon is running; the ledger, its keys and the listeners are not checked")
		return
	case errors.Is(err, ledger.ErrMissing) && len(r.faults) > 0:
		r.fault("ledger", fmt.Errorf("%s: there is none yet; remove the other faults, then run countersignd init",
			c.Ledger))
		return
	case err != nil:
		r.fault("ledger", fmt.Errorf("%s: %w", c.Ledger, err))
		return
	}
	defer l.Close()
	r.say("ledger", "ok: %s", c.Ledger)
	if rules == nil {
		if rules, err = appliance.ApprovedPolicy(l); err != nil {
			r.fault("policy", err)
		}
	}
	if rules == nil || len(tokens) < len(c.Tokens) {
		r.say("keys", "not checked, since the policy or a token has a fault")
		return
	}
	app, err := appliance.New(ctx, c.appliance(), l, tokens, rules, log)
	if err != nil {
		r.fault("keys", err)
		return
	}
	causes, verdict := app.Keys.Causes(), "ok"
	if len(causes) > 0 {
		verdict = "in the ledger" // the faults below say which keys their tokens do not have
	}
	for _, k := range app.Keys.All() {
		info := k.Info()
		r.say("key", "%s: %v %s %s %s, public key %s",
			verdict, info.Ref, info.Algorithm, k.State, info.Custody, hex.EncodeToString(info.PublicKey))
	}
	for _, c := range causes {
		r.fault("key", errors.New(c.Text))
	}
	r.say("peers", "%d enrolled", len(app.Peers.All()))
	for _, w := range rules.Warnings(app.KnowsName) {
		r.say("warning", "%s: %v", c.Policy, w)
	}
	ready, err := prepare(ctx, c, parts{ledger: l, tokens: tokens, app: app}, nil, log)
	defer ready.close()
	if err != nil {
		r.fault("serve", err)
		return
	}
	for _, address := range ready.missing {
		r.say("listen", "waits for %s", address)
	}
	rights, confined := c.rights(path, ready.doors, nil), "the daemon is confined"
	if missing := rights.Missing(); len(missing) > 0 {
		confined = "the daemon is NOT WHOLLY confined on this kernel: " + strings.Join(missing, "; ")
	}
	r.say("sandbox", "%s", confined)
	users := "key workers have a user of their own, %d"
	if c.launcher.User() == os.Geteuid() {
		users = "key workers run as the daemon's user, %d: see user and keys_user"
	}
	r.say("users", users, c.launcher.User())
	for _, what := range c.exposed(rights) {
		r.say("", "%s, which could read or change it: move one of them", what)
	}
	r.say("listen", "ok: admin socket %s, and the addresses that this machine has", c.AdminSocket)
}
