package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"

	"countersign/appliance"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/policy"
)

// check opens all parts that serve opens, and prints a line for each part. check changes nothing.
// While a daemon has the ledger open, the other parts are checked.
func check(ctx context.Context, path string, c Config, deep bool, stdout, stderr io.Writer) error {
	say := func(part, format string, args ...any) {
		fmt.Fprintf(stdout, "%-8s %s\n", part, fmt.Sprintf(format, args...))
	}
	say("config", "ok: %s", path)
	rules, err := policy.Load(c.Policy)
	if err != nil {
		return err
	}
	say("policy", "ok: %s, sha256 %x", c.Policy, rules.Hash)
	log := slog.New(slog.DiscardHandler)
	tokens := map[string]keystore.Store{}
	defer func() { closeTokens(tokens, log) }()
	var lacking []error
	for _, name := range slices.Sorted(maps.Keys(c.Tokens)) {
		t := c.Tokens[name]
		store, err := openToken(ctx, name, t, false, false, log, nil)
		if err != nil {
			return err
		}
		tokens[name] = store
		infos, err := store.Keys(ctx)
		if err != nil {
			return fmt.Errorf("token %s: %w", name, err)
		}
		say("token", "ok: %s, %s%s, %d keys of ours", name, t.URI, t.TPM, len(infos))
		found, err := store.Inspect(ctx, false)
		if err != nil {
			return fmt.Errorf("token %s: %w", name, err)
		}
		for _, f := range found {
			verdict := "ok"
			if !f.OK {
				verdict = "LACKING"
			}
			say("", "%-9s %-7s %s: %s", f.What, f.For, verdict, f.Text)
			needed := f.For == keystore.Ed25519 || f.For == keystore.X25519 && name == c.NoiseToken
			if !f.OK && needed {
				lacking = append(lacking, fmt.Errorf("token %s lacks what %s keys need: %s", name, f.For, f.Text))
			}
		}
	}
	if deep {
		err := ledger.Check(c.Ledger, c.ledger(), func(done, all uint64) {
			if done > 0 && done%65536 == 0 {
				fmt.Fprintf(stderr, "ledger: %d of %d events\n", done, all)
			}
		})
		if errors.Is(err, ledger.ErrInUse) {
			return fmt.Errorf("%s: %w: --deep needs it for itself", c.Ledger, err)
		} else if err != nil {
			return fmt.Errorf("%s: %w", c.Ledger, err)
		}
		say("ledger", "ok: every page, event and hash was read")
	}
	l, err := ledger.Open(c.Ledger, c.ledger())
	if errors.Is(err, ledger.ErrInUse) {
		say("ledger", "in use: a daemon is running; the ledger and its keys are not checked")
		return errors.Join(lacking...)
	} else if err != nil {
		return fmt.Errorf("%s: %w", c.Ledger, err)
	}
	defer l.Close()
	say("ledger", "ok: %s", c.Ledger)
	app, err := appliance.New(ctx, c.appliance(), l, tokens, rules, log)
	if err != nil {
		return err
	}
	for _, k := range app.Keys.All() {
		info := k.Info()
		say("key", "ok: %v %s %s %s, public key %s",
			info.Ref, info.Algorithm, k.State, info.Custody, hex.EncodeToString(info.PublicKey))
	}
	say("peers", "%d enrolled", len(app.Peers.All()))
	if err := app.Ready(); err != nil {
		return err
	}
	return errors.Join(lacking...)
}
