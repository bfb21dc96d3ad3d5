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

	"countersign/appliance"
	"countersign/audit"
	"countersign/internal/anchor"
	"countersign/internal/escrow"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/logline"
	"countersign/internal/manage"
	"countersign/internal/scrub"
	"countersign/policy"
)

// initOptions are the flags of countersignd init.
type initOptions struct {
	newToken  bool
	soPINFile string
	token     string // add this token, and touch neither the other tokens nor the ledger

	holders []string // recovery holders, as escrow.ReadHolder reads them; none: the own keys are resident
	needed  int      // of the holders
	set     escrow.Set
}

// readHolders reads the recovery holders of the flags.
func (o *initOptions) readHolders() error {
	if len(o.holders) == 0 {
		if o.needed != 0 {
			return configError{errors.New("--needed is for --holder: name the recovery holders")}
		}
		return nil
	}
	if o.token != "" {
		return configError{errors.New("--holder names the holders of a new appliance's own keys, and --token adds a " +
			"token: countersign admin holders set names others")}
	}
	o.set = escrow.Set{Number: 1, Needed: o.needed}
	for _, text := range o.holders {
		h, err := escrow.ReadHolder(text)
		if err != nil {
			return configError{fmt.Errorf("--holder: %w", err)}
		}
		o.set.Holders = append(o.set.Holders, h)
	}
	if err := o.set.Check(); err != nil {
		return configError{fmt.Errorf("--holder and --needed: %w", err)}
	}
	return nil
}

// nameHolders names the first recovery holders of a new appliance.
func (o initOptions) nameHolders(ctx context.Context, keys *keyring.Ring, who audit.Actor, stderr io.Writer) error {
	now := keys.Holders()
	switch {
	case len(o.holders) == 0:
		return nil
	case now.Equal(o.set):
		return nil // an init that was interrupted
	}
	if err := keys.FirstHolders(ctx, who, o.set); err != nil {
		return fmt.Errorf("--holder: %w: its own keys stay as they are, and countersign admin holders set names the "+
			"holders of later ones", err)
	}
	fmt.Fprintf(stderr, "named the recovery holders: %d of %d bring a key back\n", o.set.Needed, len(o.set.Holders))
	return nil
}

// makeOwn makes one of the appliance's own keys. With recovery holders, the key is recoverable,
// apart from the P-256 keys of a TPM, which never leave it.
func makeOwn(
	ctx context.Context, c Config, app *appliance.Appliance, who audit.Actor, name, token string,
) (*keyring.Key, error) {
	inTPM := (name == keyring.AdminName || name == keyring.CAName) && c.Tokens[token].TPM != ""
	if app.Keys.Holders().Number == 0 || inTPM {
		return app.Keys.CreateOwn(ctx, who, name, token)
	}
	return app.Keys.CreateOwnRecoverable(ctx, who, name, token)
}

// initialise creates the parts that serve needs: with newToken the tokens, then the ledger and the
// keys. initialise is idempotent: each step is atomic, and an existing part is not changed. The
// tokens prove that they can have the keys before the ledger is made.
func initialise(ctx context.Context, c Config, o initOptions, stdout, stderr io.Writer) error {
	if o.token != "" && c.Tokens[o.token] == nil {
		return configError{fmt.Errorf("--token %s: the configuration has no table [tokens.%s]; write the table first",
			o.token, o.token)}
	}
	switch inTPM := o.token != "" && c.Tokens[o.token].TPM != ""; {
	case inTPM && o.soPINFile != "":
		return configError{errors.New("--so-pin-file: a TPM has no security officer: leave the flag out")}
	case !inTPM && o.newToken != (o.soPINFile != ""):
		return configError{errors.New("--new-token and --so-pin-file go together")}
	}
	if _, err := policy.Load(c.Policy); err != nil {
		return err
	}
	// A module's output is logged as a warning, and is not shown: stderr has the steps.
	log := slog.New(new(scrub.Scrubber).Handler(logline.Text.Handler(stderr, slog.LevelError)))
	steps := &counted{to: stderr}
	stderr = steps
	names := slices.Sorted(maps.Keys(c.Tokens))
	if o.token != "" {
		names = []string{o.token}
	}
	for _, name := range names {
		if err := makeToken(ctx, c, name, o, log, stderr); err != nil {
			return err
		}
	}
	if o.token != "" {
		if err := proveToken(ctx, c, o.token, true, log); err != nil {
			return err
		}
		fmt.Fprintf(stderr, "the token %s is ready; a running daemon uses the token after a restart\n", o.token)
		return nil
	}
	_, err := os.Stat(c.Ledger)
	fresh := errors.Is(err, os.ErrNotExist)
	for _, name := range slices.Compact(slices.Sorted(slices.Values([]string{c.NoiseToken, c.LogToken}))) {
		if err := proveToken(ctx, c, name, fresh, log); err != nil {
			return err
		}
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
	operator := audit.Operator(fmt.Sprintf("uid:%d", c.startedBy))
	if err := bind(ctx, p.app.Anchor, operator, stderr); err != nil {
		return err
	}
	if err := o.nameHolders(ctx, p.app.Keys, operator, stderr); err != nil {
		return err
	}
	if _, err := p.app.Keys.LogKey(); errors.Is(err, manage.ErrNotFound) {
		if _, err := makeOwn(ctx, c, p.app, operator, keyring.LogName, c.LogToken); err != nil {
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
		key, err = makeOwn(ctx, c, p.app, operator, keyring.NoiseName, c.NoiseToken)
		if err == nil {
			fmt.Fprintf(stderr, "created the listener's Noise key in the token\n")
		}
	}
	if err != nil {
		return err
	}
	if steps.n == 0 {
		fmt.Fprintf(stderr, "initialised already; nothing was changed\n")
	}
	fmt.Fprintln(stdout, hex.EncodeToString(key.Info().PublicKey))
	return nil
}

// counted counts the lines of the steps that have changed something.
type counted struct {
	to io.Writer
	n  int
}

func (c *counted) Write(b []byte) (int, error) {
	c.n++
	return c.to.Write(b)
}

// bind binds a ledger without a counter to the configured one.
func bind(ctx context.Context, a *anchor.Anchor, who audit.Actor, stderr io.Writer) error {
	before, err := a.Bound()
	if err != nil {
		return err
	}
	if err := a.Bind(ctx, who); err != nil {
		return err
	}
	now, err := a.Bound()
	if err == nil && now != before {
		fmt.Fprintf(stderr, "bound the ledger to the counter of the token %s\n", now)
	}
	return err
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

// makeToken initialises a token: with newToken a PKCS#11 token that is missing, and a TPM always.
// Records of another TPM are put aside, if newToken is for this token alone.
func makeToken(
	ctx context.Context, c Config, name string, o initOptions, log *slog.Logger, stderr io.Writer,
) error {
	t := c.Tokens[name]
	if t.TPM == "" && !o.newToken {
		return nil
	}
	made, err := newToken(ctx, c, name, o.newToken && o.token == name, log)
	switch {
	case made && t.TPM != "":
		fmt.Fprintf(stderr, "prepared the TPM of the token %s, with its state in %s\n", name, t.State)
		if o.newToken && o.token == name {
			fmt.Fprintf(stderr, "records of another TPM have the names NAME.replaced-TIME there, and are of no use\n")
		}
	case made:
		fmt.Fprintf(stderr, "created the token %s\n", t.URI)
	}
	return err
}

// proveToken opens a token, which must answer. With prove, throw-away keys show that the token can
// have the keys that the configuration puts there.
func proveToken(ctx context.Context, c Config, name string, prove bool, log *slog.Logger) error {
	token := *c.Tokens[name]
	token.Workers = 1
	c.Tokens = map[string]*Token{name: &token}
	store, err := openToken(ctx, c, name, false, false, log, nil)
	if err != nil {
		return err
	}
	defer closeTokens(map[string]keystore.Store{name: store}, log)
	if !prove {
		return nil
	}
	found, err := store.Inspect(ctx, true)
	if err != nil {
		return fmt.Errorf("token %s: %w", name, err)
	}
	return errors.Join(lacking(c, name, found)...)
}

// lacking returns an error for each finding without which a token can't have its keys.
func lacking(c Config, name string, found []keystore.Finding) (all []error) {
	for _, f := range found {
		if !f.OK && slices.Contains(c.algorithms(name), f.For) {
			all = append(all, fmt.Errorf("token %s lacks what %s keys need: %s: %s; use another token "+
				"(noise_token, log_token)", name, f.For, f.What, f.Text))
		}
	}
	return all
}

// algorithms returns the algorithms that a token must have. A token for signing keys needs Ed25519.
// A token for the Noise key alone needs X25519 alone. A TPM with the counter need not have keys.
func (c *Config) algorithms(token string) (all []keystore.Algorithm) {
	if token == c.LogToken || token != c.NoiseToken && token != c.RollbackToken {
		all = append(all, keystore.Ed25519)
	}
	if token == c.NoiseToken {
		all = append(all, keystore.X25519)
	}
	if token == c.LogToken && c.AdminHTTPS != "" {
		all = append(all, keystore.P256)
	}
	return all
}
