package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"countersign/audit"
	"countersign/internal/escrow"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
)

// Returning keys: after the loss of a token, recovery holders bring the recoverable keys back onto
// the token that has its place now. The shares come together in this process, which is not the
// daemon, and the seeds in key workers that end at once. The ledger says what returns and who gave
// shares before a token gets a key.

// returning has the options of countersignd return-keys.
type returning struct {
	ceremony
	only []string // keys, as NAME/VERSION; none: all that are missing
}

// ledgerWait is the time between two tries to open the ledger.
const ledgerWait = time.Second

// returnKeys is countersignd return-keys.
func returnKeys(ctx context.Context, path string, c Config, r returning, stdout, stderr io.Writer) error {
	if err := noCoreFiles(); err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	l, err := c.startLauncher(path, "")
	if err != nil {
		return err
	}
	defer l.Close()
	c.launcher = l
	missing, name, err := r.look(ctx, c, log, stdout)
	if err != nil || len(missing) == 0 {
		return err
	}
	if err := r.open(); err != nil { // as root, before this process becomes the daemon's user
		return err
	}
	lockMemory()
	var envelopes [][]byte
	for _, s := range missing {
		envelopes = append(envelopes, s.Envelope)
	}
	host, _ := os.Hostname()
	e, err := escrow.Begin(escrow.ForRecovery, name, host, envelopes)
	if err != nil {
		return err
	}
	fmt.Fprintln(stdout, "daemon       it may run until the answers are there")
	holders, err := r.hold(ctx, e, stdout)
	if err != nil {
		return err
	}
	if err := c.become(); err != nil {
		return err
	}
	return r.put(ctx, c, missing, e, holders, log, stdout)
}

// look finds the recoverable keys that are not on their tokens, and the name of the appliance.
func (r returning) look(
	ctx context.Context, c Config, log *slog.Logger, stdout io.Writer,
) (missing []keyring.Recorded, name string, err error) {
	sealed, name, err := readSealed(c)
	if err != nil {
		return nil, "", err
	}
	for _, want := range r.only {
		named := func(s keyring.Recorded) bool { return s.Ref.String() == want }
		if !slices.ContainsFunc(sealed, named) {
			return nil, "", configError{fmt.Errorf("--key %q: the ledger has no recoverable version of this name "+
				"that is of use", want)}
		}
	}
	err = withTokens(ctx, c, log, func(tokens map[string]keystore.Store) error {
		for _, s := range sealed {
			if len(r.only) > 0 && !slices.Contains(r.only, s.Ref.String()) {
				continue
			}
			store := tokens[s.Token]
			if store == nil {
				return fmt.Errorf("key %v: the configuration has no token %q: name the token that has its place so",
					s.Ref, s.Token)
			}
			key, err := store.Key(ctx, s.Ref)
			switch {
			case err == nil && slices.Equal(key.Info().PublicKey, s.PublicKey):
				fmt.Fprintf(stdout, "%-12s %v is on the token %s\n", "key", s.Ref, s.Token)
			case errors.Is(err, keystore.ErrNotFound):
				fmt.Fprintf(stdout, "%-12s %v is NOT on the token %s, and can return: %s\n", "key", s.Ref, s.Token,
					hex.EncodeToString(s.PublicKey))
				missing = append(missing, s)
			case err == nil:
				return fmt.Errorf("key %v: the token %s has another key under this name: take it away first",
					s.Ref, s.Token)
			default:
				return fmt.Errorf("key %v: %w", s.Ref, err)
			}
		}
		return nil
	})
	if err == nil && len(missing) == 0 {
		fmt.Fprintln(stdout, "nothing to return: no recoverable key is missing")
	}
	return missing, name, err
}

// readSealed reads the recoverable keys from the ledger, which no daemon may have open.
func readSealed(c Config) (all []keyring.Recorded, name string, err error) {
	l, err := openLedger(c, nil, nil, true)
	if err != nil {
		return nil, "", fmt.Errorf("%s: %w", c.Ledger, err)
	}
	all, name, err = sealedIn(l)
	return all, name, errors.Join(err, l.Close())
}

// sealedIn returns the recoverable keys of a ledger, and the name of its appliance.
func sealedIn(l *ledger.Ledger) (all []keyring.Recorded, name string, err error) {
	var key []byte
	err = l.View(func(v ledger.View) (err error) {
		all, key, err = keyring.ReadRecorded(v)
		return err
	})
	if err != nil {
		return nil, "", err
	}
	log, err := audit.NewLog(key)
	if err != nil {
		return nil, "", fmt.Errorf("the ledger has no audit log yet: %w", err)
	}
	return slices.DeleteFunc(all, func(k keyring.Recorded) bool { return !k.Returns() }), log.Name(), nil
}

// withTokens calls do with the tokens of the configuration.
func withTokens(ctx context.Context, c Config, log *slog.Logger, do func(map[string]keystore.Store) error) error {
	opening, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	tokens, err := openTokens(opening, c, log, func(string, bool, error) {})
	if err != nil {
		return err
	}
	defer closeTokens(tokens, log)
	return do(tokens)
}

// put makes the keys on their tokens, each after its event.
func (r returning) put(
	ctx context.Context, c Config, missing []keyring.Recorded, e *escrow.Ceremony, holders []string, log *slog.Logger,
	stdout io.Writer,
) (err error) {
	l, err := waitForLedger(ctx, c, stdout)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	now, _, err := sealedIn(l)
	if err != nil {
		return err
	}
	who := audit.Operator(fmt.Sprintf("uid:%d", c.startedBy))
	return withTokens(ctx, c, log, func(tokens map[string]keystore.Store) error {
		for _, s := range missing {
			same := func(o keyring.Recorded) bool { return o.Ref == s.Ref && slices.Equal(o.Envelope, s.Envelope) }
			if !slices.ContainsFunc(now, same) { // the daemon ran meanwhile
				fmt.Fprintf(stdout, "%-12s %v is of no use any more, and does not return\n", "key", s.Ref)
				continue
			}
			returned := audit.NewKeyReturned(who, s.Ref.String(), s.Token, escrow.Digest(s.Envelope), holders)
			if _, err := l.Append(ctx, ledger.EventOf(returned)); err != nil {
				return err
			}
			if err := returnKey(ctx, tokens[s.Token], s, e); err != nil {
				_, failed := l.Append(ctx, ledger.EventOf(returned.Failed()))
				return errors.Join(fmt.Errorf("key %v: %w", s.Ref, err), failed)
			}
			fmt.Fprintf(stdout, "%-12s %v is on the token %s again\n", "returned", s.Ref, s.Token)
		}
		fmt.Fprintf(stdout, "%-12s by the shares of %s; start the daemon\n", "done", strings.Join(holders, ", "))
		return nil
	})
}

// returnKey makes a key on its token again.
func returnKey(ctx context.Context, store keystore.Store, s keyring.Recorded, e *escrow.Ceremony) error {
	able, ok := store.(escrow.Store)
	if !ok {
		return fmt.Errorf("%w: the token %s takes no seed", keystore.ErrRefused, s.Token)
	}
	key, err := able.Open(ctx, s.Tag, s.Envelope, e.Shares(s.Envelope))
	if err != nil {
		return errors.Join(err, able.Destroy(context.WithoutCancel(ctx), s.Ref, s.Tag))
	}
	if !slices.Equal(key.Info().PublicKey, s.PublicKey) {
		return fmt.Errorf("%w: it has another public key", keystore.ErrWrong)
	}
	return nil
}

// waitForLedger opens the ledger, as soon as no daemon has it open.
func waitForLedger(ctx context.Context, c Config, stdout io.Writer) (*ledger.Ledger, error) {
	for told := false; ; told = true {
		l, err := openLedger(c, nil, nil, false)
		if !errors.Is(err, ledger.ErrInUse) {
			return l, err
		}
		if !told {
			fmt.Fprintf(stdout, "%-12s for the daemon to end: stop it now\n", "waiting")
		}
		select {
		case <-time.After(ledgerWait):
		case <-ctx.Done():
			return nil, err
		}
	}
}
