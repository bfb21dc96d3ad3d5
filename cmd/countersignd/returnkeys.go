package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
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
	if err := r.openRequest(); err != nil { // as root, before this process becomes the daemon's user
		return err
	}
	defer r.discardRequest()
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	return withLauncher(path, "", c, func(c Config) error {
		missing, name, err := r.look(ctx, c, log, stdout)
		if err != nil || len(missing) == 0 {
			return err
		}
		var envelopes [][]byte
		for _, k := range missing {
			envelopes = append(envelopes, k.Envelope)
		}
		e, err := escrow.Begin(escrow.ForRecovery, name, hostName(), envelopes)
		if err != nil {
			return err
		}
		fmt.Fprintln(stdout, "daemon       it may run until the answers are there")
		few := r.hold(ctx, e, stdout)
		if few != nil && !errors.Is(few, errNoHolders) {
			return few
		}
		return errors.Join(r.put(ctx, c, missing, e, log, stdout), few) // those that have enough shares
	})
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
			there, err := isThere(ctx, store, s)
			if err != nil {
				return err
			}
			if there {
				fmt.Fprintf(stdout, "%-12s %v is on the token %s\n", "key", s.Ref, s.Token)
				continue
			}
			fmt.Fprintf(stdout, "%-12s %v is NOT on the token %s, and can return: %s\n", "key", s.Ref, s.Token,
				hex.EncodeToString(s.PublicKey))
			missing = append(missing, s)
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
	all = slices.DeleteFunc(all, func(k keyring.Recorded) bool { return !k.Returns() })
	for _, k := range all {
		if _, err := escrow.Of(k.Envelope, k.Ref, k.PublicKey); err != nil {
			return nil, "", fmt.Errorf("key %v in the ledger: %w", k.Ref, err)
		}
	}
	return all, log.Name(), nil
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

// isThere reports that a token has a key. Another key under its name is an error.
func isThere(ctx context.Context, store keystore.Store, k keyring.Recorded) (bool, error) {
	key, err := store.Key(ctx, k.Ref)
	switch {
	case errors.Is(err, keystore.ErrNotFound):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("key %v: %w", k.Ref, err)
	case !slices.Equal(key.Info().PublicKey, k.PublicKey):
		return false, fmt.Errorf("key %v: the token %s has another key under this name: take it away first", k.Ref,
			k.Token)
	}
	return true, nil
}

// put makes the keys that have enough shares on their tokens, each after its event. A key that
// can't be made costs no other one.
func (r returning) put(
	ctx context.Context, c Config, missing []keyring.Recorded, e *escrow.Ceremony, log *slog.Logger, stdout io.Writer,
) (err error) {
	missing = slices.DeleteFunc(missing, func(k keyring.Recorded) bool {
		_, _, ready := e.Shares(k.Envelope)
		return !ready
	})
	if len(missing) == 0 {
		return nil
	}
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
	return withTokens(ctx, c, log, func(tokens map[string]keystore.Store) (all error) {
		for _, k := range missing {
			same := func(o keyring.Recorded) bool { return o.Ref == k.Ref && slices.Equal(o.Envelope, k.Envelope) }
			if !slices.ContainsFunc(now, same) { // the daemon ran meanwhile
				fmt.Fprintf(stdout, "%-12s %v is of no use any more, and does not return\n", "key", k.Ref)
				continue
			}
			if err := returnKey(ctx, l, tokens[k.Token], k, e, who, stdout); err != nil {
				all = errors.Join(all, fmt.Errorf("key %v: %w", k.Ref, err))
			}
		}
		if all == nil {
			fmt.Fprintf(stdout, "%-12s start the daemon\n", "done")
		}
		return all
	})
}

// returnKey makes a key on its token again, unless the token has it: the wait was long.
func returnKey(
	ctx context.Context, l *ledger.Ledger, store keystore.Store, k keyring.Recorded, e *escrow.Ceremony,
	who audit.Actor, stdout io.Writer,
) error {
	able, ok := store.(escrow.Store)
	if !ok {
		return fmt.Errorf("%w: the token %s takes no seed", keystore.ErrRefused, k.Token)
	}
	if there, err := isThere(ctx, store, k); err != nil {
		return err
	} else if there {
		fmt.Fprintf(stdout, "%-12s %v is on the token %s already\n", "key", k.Ref, k.Token)
		return nil
	}
	shares, holders, _ := e.Shares(k.Envelope)
	returned := audit.NewKeyReturned(who, k.Ref.String(), k.Token, escrow.Digest(k.Envelope), holders)
	if _, err := l.Append(ctx, ledger.EventOf(returned)); err != nil {
		return err
	}
	key, err := able.Open(ctx, k.Tag, k.Envelope, shares)
	if err == nil && !slices.Equal(key.Info().PublicKey, k.PublicKey) {
		err = fmt.Errorf("%w: it has another public key", keystore.ErrWrong)
	}
	if err != nil {
		if !errors.Is(err, keystore.ErrExists) { // half a key, with the tag of the creation
			err = errors.Join(err, able.Destroy(context.WithoutCancel(ctx), k.Ref, k.Tag))
		}
		_, failed := l.Append(context.WithoutCancel(ctx), ledger.EventOf(returned.Failed()))
		return errors.Join(err, failed)
	}
	fmt.Fprintf(stdout, "%-12s %v is on the token %s again, by the shares of %s\n", "returned", k.Ref, k.Token,
		strings.Join(holders, ", "))
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
