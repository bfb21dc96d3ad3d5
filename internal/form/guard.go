//go:build unix

package form

import (
	"context"
	"errors"
	"fmt"

	"countersign/internal/journal"
	"countersign/internal/keystore"
	"countersign/internal/secret"
)

// Guard returns a store whose keys sign what Recognise recognises, and nothing else. The input of
// Key.Sign and of SignBatch is that of Recognise: a document is passed as
// transcript.Document.Input. A signature is in the journal before the store returns the signature;
// nil is no journal. Keys of the store itself are not keys of the guarded store. Only key workers
// use Guard, and they do not run on Windows.
func Guard(s keystore.Store, w *journal.Writer) keystore.Store { return &guarded{s, w} }

type guarded struct {
	keystore.Store
	journal *journal.Writer
}

// record writes the uses of signatures to the journal.
func (g *guarded) record(uses ...journal.Entry) error {
	if g.journal == nil || len(uses) == 0 {
		return nil
	}
	return g.journal.Append(uses...)
}

// entry is the line of a signature.
func (u Use) entry(key keystore.Ref) journal.Entry {
	return journal.Entry{Key: key, Kind: u.Kind, Detail: u.Detail, Digest: u.Digest}
}

// TryJournal writes a line without a signature: the journal can be written again, or not yet.
func (g *guarded) TryJournal() error { return g.record(journal.Entry{Kind: journal.Try}) }

// JournalSize returns the bytes of the journal, or 0 without a journal.
func (g *guarded) JournalSize() (uint64, error) {
	if g.journal == nil {
		return 0, nil
	}
	return g.journal.Size()
}

// Close closes the store, and then the journal.
func (g *guarded) Close() error {
	err := g.Store.Close()
	if g.journal != nil {
		err = errors.Join(err, g.journal.Close())
	}
	return err
}

// key is a key of a guarded store.
type key struct {
	keystore.Key
	store *guarded
}

func (g *guarded) wrap(k keystore.Key, err error) (keystore.Key, error) {
	if err != nil {
		return nil, err
	}
	return &key{k, g}, nil
}

func (g *guarded) Bind(info keystore.Info) keystore.Key { return &key{g.Store.Bind(info), g} }

func (g *guarded) Key(ctx context.Context, ref keystore.Ref) (keystore.Key, error) {
	return g.wrap(g.Store.Key(ctx, ref))
}

func (g *guarded) Generate(
	ctx context.Context, ref keystore.Ref, alg keystore.Algorithm, tag keystore.Tag,
) (keystore.Key, error) {
	return g.wrap(g.Store.Generate(ctx, ref, alg, tag))
}

func (g *guarded) Import(
	ctx context.Context, ref keystore.Ref, path string, tag keystore.Tag,
) (keystore.Key, error) {
	return g.wrap(g.Store.Import(ctx, ref, path, tag))
}

// ImportSeed imports a seed in memory, if the store can.
func (g *guarded) ImportSeed(
	ctx context.Context, ref keystore.Ref, alg keystore.Algorithm, seed secret.Bytes, tag keystore.Tag,
) (keystore.Key, error) {
	store, ok := g.Store.(keystore.SeedImporter)
	if !ok {
		return nil, fmt.Errorf("%v: %w: this device takes no seed", ref, keystore.ErrRefused)
	}
	return g.wrap(store.ImportSeed(ctx, ref, alg, seed, tag))
}

func (k *key) Sign(ctx context.Context, input []byte, judge keystore.Judge) ([]byte, error) {
	use, err := Recognise(k.Info(), input)
	if err != nil {
		return nil, err
	}
	signature, err := k.Key.Sign(ctx, use.Message, judge)
	if err == nil {
		err = k.store.record(use.entry(k.Info().Ref))
	}
	if err != nil {
		return nil, err
	}
	return signature, nil
}

// SignBatch signs the elements whose inputs are recognised, with one call to the store if the store
// can batch.
func (g *guarded) SignBatch(ctx context.Context, batch []*keystore.Signing) {
	inner := make([]*keystore.Signing, 0, len(batch))
	outer := make([]*keystore.Signing, 0, len(batch))
	entries := make([]journal.Entry, 0, len(batch))
	for _, s := range batch {
		k, ok := s.Key.(*key)
		if !ok || k.store != g {
			s.Err = fmt.Errorf("%v: %w: it is of another store", s.Key.Info().Ref, keystore.ErrRefused)
			continue
		}
		use, err := Recognise(k.Info(), s.Message)
		if err != nil {
			s.Err = err
			continue
		}
		entries = append(entries, use.entry(k.Info().Ref))
		inner, outer = append(inner, &keystore.Signing{Key: k.Key, Message: use.Message}), append(outer, s)
	}
	if store, ok := g.Store.(keystore.BatchSigner); ok {
		store.SignBatch(ctx, inner)
	} else {
		for _, s := range inner {
			s.Signature, s.Err = s.Key.Sign(ctx, s.Message, nil)
		}
	}
	made := entries[:0]
	for i, s := range inner {
		if s.Err == nil {
			made = append(made, entries[i])
		}
	}
	unwritten := g.record(made...)
	for i, s := range inner {
		if outer[i].Signature, outer[i].Err = s.Signature, s.Err; s.Err == nil && unwritten != nil {
			outer[i].Signature, outer[i].Err = nil, unwritten
		}
	}
}

// Records is the method of keystore.Recorder: no file, if the store is none.
func (g *guarded) Records(ctx context.Context, after string) (map[string][]byte, error) {
	if r, ok := g.Store.(keystore.Recorder); ok {
		return r.Records(ctx, after)
	}
	return nil, nil
}

// DefineCounter is one of the methods of keystore.Counter: those of the store, if it has a counter.
func (g *guarded) DefineCounter(ctx context.Context, owner keystore.Owner) error {
	c, err := g.counter()
	if err != nil {
		return err
	}
	return c.DefineCounter(ctx, owner)
}

func (g *guarded) ReadCounter(ctx context.Context, owner keystore.Owner) (uint64, error) {
	c, err := g.counter()
	if err != nil {
		return 0, err
	}
	return c.ReadCounter(ctx, owner)
}

func (g *guarded) IncrementCounter(ctx context.Context, owner keystore.Owner) (uint64, error) {
	c, err := g.counter()
	if err != nil {
		return 0, err
	}
	return c.IncrementCounter(ctx, owner)
}

func (g *guarded) UndefineCounter(ctx context.Context, owner keystore.Owner) error {
	c, err := g.counter()
	if err != nil {
		return err
	}
	return c.UndefineCounter(ctx, owner)
}

// EvictStorageRoot is the method of keystore.Rooted: that of the store, if it has such a key.
func (g *guarded) EvictStorageRoot(ctx context.Context) error {
	if r, ok := g.Store.(keystore.Rooted); ok {
		return r.EvictStorageRoot(ctx)
	}
	return fmt.Errorf("%w: this device has no storage root key", keystore.ErrRefused)
}

func (g *guarded) counter() (keystore.Counter, error) {
	if c, ok := g.Store.(keystore.Counter); ok {
		return c, nil
	}
	return nil, fmt.Errorf("%w: this device has no counter", keystore.ErrRefused)
}
