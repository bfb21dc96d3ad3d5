package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"countersign/appliance"
	"countersign/audit"
	"countersign/hsm"
	"countersign/ledger"
	"countersign/policy"
)

// initialise creates what serve needs: the token if asked to, the ledger, the Noise key. Each step is whole or not done,
// and is left alone where it is done already.
func initialise(ctx context.Context, c Config, newToken bool, soPINFile string, stdout, stderr io.Writer) error {
	if newToken != (soPINFile != "") {
		return errors.New("--new-token and --so-pin-file go together")
	}
	if _, err := policy.Load(c.Policy); err != nil {
		return err
	}
	if newToken {
		if err := makeToken(ctx, c, soPINFile, stderr); err != nil {
			return err
		}
	}
	// Before anything is created here: is there a token to go with it?
	store, err := hsm.Open(ctx, c.hsm())
	if err != nil {
		return err
	}
	if err := store.Close(); err != nil {
		return err
	}
	if err := makeFolder(filepath.Dir(c.Ledger)); err != nil {
		return fmt.Errorf("ledger: %w", err)
	}
	switch err := ledger.Create(c.Ledger); {
	case err == nil:
		fmt.Fprintf(stderr, "created the ledger %s\n", c.Ledger)
	case !errors.Is(err, ledger.ErrExists):
		return fmt.Errorf("%s: %w", c.Ledger, err)
	}
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	p, err := open(ctx, c, log)
	if err != nil {
		return err
	}
	defer p.close(log)
	if err := p.app.Recover(ctx); err != nil {
		return err
	}
	key, err := p.app.NoiseKey()
	if errors.Is(err, appliance.ErrNotFound) {
		key, err = p.app.CreateNoiseKey(ctx, audit.Operator(fmt.Sprintf("uid:%d", os.Getuid())))
		if err == nil {
			fmt.Fprintf(stderr, "created the listener's Noise key in the token\n")
		}
	} else if err == nil {
		fmt.Fprintf(stderr, "initialised already; nothing was changed\n")
	}
	if err != nil {
		return err
	}
	fmt.Fprintln(stdout, hex.EncodeToString(key.Info().PublicKey))
	return nil
}

// makeFolder makes one folder, unless it is there, so that it will be there after a power cut.
func makeFolder(path string) error {
	if err := os.Mkdir(path, 0o700); errors.Is(err, os.ErrExist) {
		return nil
	} else if err != nil {
		return err
	}
	parent, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer parent.Close()
	return parent.Sync()
}

// makeToken makes the token unless it is there.
func makeToken(ctx context.Context, c Config, soPINFile string, stderr io.Writer) error {
	store, err := hsm.Open(ctx, c.hsm())
	if err == nil {
		return store.Close()
	}
	if !errors.Is(err, hsm.ErrNoToken) && !errors.Is(err, hsm.ErrNoUserPIN) {
		return err
	}
	if err := hsm.InitToken(ctx, c.hsm(), soPINFile); err != nil {
		return err
	}
	fmt.Fprintf(stderr, "created the token %s\n", c.Token.URI)
	return nil
}
