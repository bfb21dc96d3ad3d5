package worker

import (
	"context"
	"crypto/ed25519"
	"fmt"

	"countersign/internal/escrow"
	"countersign/internal/keystore"
	"countersign/internal/secret"
)

// seal makes a seed, imports the seed, and seals it for the holders. The device has the key only
// after the envelope is known to open.
func (w *server) seal(ctx context.Context, c call) (answer sealed, err error) {
	err = w.withSeed(ctx, c, func(seed secret.Bytes) (err error) {
		if err := escrow.NewSeed(c.Algorithm, seed); err != nil {
			return err
		}
		answer.Envelope, err = escrow.Seal(c.Ref, c.Algorithm, seed, c.Holders)
		return err
	}, &answer.Info)
	return answer, err
}

// open opens an envelope, and imports the seed.
func (w *server) open(ctx context.Context, c call) (key keystore.Key, err error) {
	e, err := escrow.ParseEnvelope(c.Envelope)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", keystore.ErrRefused, err)
	}
	c.Ref, c.Algorithm = e.Key, e.Algorithm
	var info keystore.Info
	err = w.withSeed(ctx, c, func(seed secret.Bytes) error {
		opened, err := escrow.Open(c.Envelope, c.Shares)
		copy(seed.Expose(), opened.Expose())
		opened.Wipe()
		return err
	}, &info)
	if err != nil {
		return nil, err
	}
	return w.store.Bind(info), nil
}

// withSeed has get fill in a seed, imports it, and erases all copies. The process ends afterwards.
func (w *server) withSeed(
	ctx context.Context, c call, get func(seed secret.Bytes) error, info *keystore.Info,
) error {
	store, ok := w.store.(keystore.SeedImporter)
	if !ok {
		return fmt.Errorf("%v: %w: this device takes no seed", c.Ref, keystore.ErrRefused)
	}
	seed := secret.New(make([]byte, ed25519.SeedSize))
	defer seed.Wipe()
	var err error
	secret.Do(func() { err = get(seed) })
	if err != nil {
		return fmt.Errorf("%w: %w", keystore.ErrRefused, err)
	}
	key, err := store.ImportSeed(ctx, c.Ref, c.Algorithm, seed, c.Tag)
	if err != nil {
		return err
	}
	*info = key.Info()
	info.Custody = info.Custody.WithCopy()
	return nil
}
