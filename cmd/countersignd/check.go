package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"countersign/appliance"
	"countersign/hsm"
	"countersign/ledger"
	"countersign/policy"
)

// check opens everything that serve would, changes nothing, and says what it found, a line a part. While a daemon runs, the ledger is its own; the rest is checked all the same.
func check(ctx context.Context, path string, c Config, stdout io.Writer) error {
	say := func(part, format string, args ...any) {
		fmt.Fprintf(stdout, "%-8s %s\n", part, fmt.Sprintf(format, args...))
	}
	say("config", "ok: %s", path)
	rules, err := policy.Load(c.Policy)
	if err != nil {
		return err
	}
	say("policy", "ok: %s, sha256 %x", c.Policy, rules.Hash)
	store, err := hsm.Open(ctx, c.hsm())
	if err != nil {
		return err
	}
	defer store.Close()
	infos, err := store.Keys(ctx)
	if err != nil {
		return err
	}
	say("token", "ok: %s, %d keys of ours", c.Token.URI, len(infos))
	l, err := ledger.Open(c.Ledger)
	if errors.Is(err, ledger.ErrInUse) {
		say("ledger", "in use: a daemon is running; the ledger and its keys are not checked")
		return nil
	} else if err != nil {
		return fmt.Errorf("%s: %w", c.Ledger, err)
	}
	defer l.Close()
	say("ledger", "ok: %s", c.Ledger)
	app, err := appliance.New(ctx, c.limits(), l, store, rules, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	for _, k := range app.Keys() {
		info := k.Info()
		say("key", "ok: %v %s %s %s, public key %s", info.Ref, info.Algorithm, k.State, info.Custody, hex.EncodeToString(info.PublicKey))
	}
	say("peers", "%d enrolled", len(app.Peers()))
	return app.Ready()
}
