package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"countersign/audit"
	"countersign/hsm"
	"countersign/internal/keyring"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/policy"
	"countersign/tpm"
)

// initialise creates the parts that serve needs: with newToken the tokens, then the ledger and the
// keys. initialise is idempotent: each step is atomic, and an existing part is not changed.
func initialise(ctx context.Context, c Config, newToken bool, soPINFile string, stdout, stderr io.Writer) error {
	if newToken != (soPINFile != "") {
		return errors.New("--new-token and --so-pin-file go together")
	}
	if _, err := policy.Load(c.Policy); err != nil {
		return err
	}
	if newToken {
		if err := makeTokens(ctx, c, soPINFile, stderr); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.Tokens)) {
		if t := c.Tokens[name]; t.TPM != "" {
			if err := tpm.Provision(ctx, t.tpm()); err != nil {
				return fmt.Errorf("token %s: %w", name, err)
			}
		}
	}
	// The token of the Noise key must answer before the ledger is created.
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: slog.LevelError}))
	token := *c.Tokens[c.NoiseToken]
	token.Workers = 1
	store, err := openToken(ctx, c.NoiseToken, &token, false, false, log, nil)
	if err != nil {
		return err
	}
	if err := store.Close(); err != nil {
		return err
	}
	if err := makeFolder(filepath.Dir(c.Ledger)); err != nil {
		return fmt.Errorf("ledger: %w", err)
	}
	switch err := ledger.Create(c.Ledger, c.ledger()); {
	case err == nil:
		fmt.Fprintf(stderr, "created the ledger %s\n", c.Ledger)
	case !errors.Is(err, ledger.ErrExists):
		return fmt.Errorf("%s: %w", c.Ledger, err)
	}
	p, err := open(ctx, c, log)
	if err != nil {
		return err
	}
	defer p.close(log)
	if err := p.app.Keys.Recover(ctx); err != nil {
		return err
	}
	operator := audit.Operator(fmt.Sprintf("uid:%d", os.Getuid()))
	if err := p.app.Anchor.Bind(ctx, operator); err != nil {
		return err
	}
	if _, err := p.app.Keys.LogKey(); errors.Is(err, manage.ErrNotFound) {
		if _, err := p.app.Keys.CreateOwn(ctx, operator, keyring.LogName, c.NoiseToken); err != nil {
			return err
		}
		fmt.Fprintf(stderr, "created the audit log's key in the token\n")
	} else if err != nil {
		return err
	}
	if err := makeHTTPSKeys(ctx, c, p.app, operator, stderr); err != nil {
		return err
	}
	key, err := p.app.Keys.Noise()
	if errors.Is(err, manage.ErrNotFound) {
		key, err = p.app.Keys.CreateOwn(ctx, operator, keyring.NoiseName, c.NoiseToken)
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

// makeFolder makes one directory, unless the directory exists, and syncs the parent against a power
// cut.
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

// makeTokens initialises the missing PKCS#11 tokens. This process loads the modules, unlike the
// daemon, whose key workers do.
func makeTokens(ctx context.Context, c Config, soPINFile string, stderr io.Writer) error {
	for _, name := range slices.Sorted(maps.Keys(c.Tokens)) {
		t := c.Tokens[name]
		if t.TPM != "" {
			continue // a TPM needs no initialisation here
		}
		for name, value := range t.Environment {
			if err := os.Setenv(name, value); err != nil {
				return fmt.Errorf("environment %s: %w", name, err)
			}
		}
		store, err := hsm.Open(ctx, t.hsm())
		if err == nil {
			err = store.Close()
		} else if errors.Is(err, hsm.ErrNoToken) || errors.Is(err, hsm.ErrNoUserPIN) {
			if err = hsm.InitToken(ctx, t.hsm(), soPINFile); err == nil {
				fmt.Fprintf(stderr, "created the token %s\n", t.URI)
			}
		}
		if err != nil {
			return fmt.Errorf("token %s: %w", name, err)
		}
	}
	return nil
}
