package audit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// Source gives the files of a log's static form by their names: checkpoint and tile/… of the present epoch, and
// epochs/N/checkpoint and epochs/N/tile/… of each. The error wraps fs.ErrNotExist where there is none.
type Source interface {
	ReadFile(ctx context.Context, name string) ([]byte, error)
}

// Folder is a source on disk.
type Folder string

func (f Folder) ReadFile(_ context.Context, name string) ([]byte, error) {
	path := filepath.Join(string(f), filepath.FromSlash(name))
	if st, err := os.Stat(path); err != nil {
		return nil, err
	} else if !st.Mode().IsRegular() { // opening it could wait for ever
		return nil, fmt.Errorf("%s is not a file", path)
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return ReadAll(name, file)
}

// MaxFile is more than any file of a log has: a bundle of the largest entries.
const MaxFile = TileWidth * (2 + 1<<16)

// ReadAll reads a file of a log, and no more than one can have.
func ReadAll(name string, r io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, MaxFile+1))
	if err == nil && len(b) > MaxFile {
		err = fmt.Errorf("%s is larger than a file of a log can be", name)
	}
	return b, err
}

func epochFile(epoch uint32, name string) string { return fmt.Sprintf("epochs/%d/%s", epoch, name) }

// Mirror copies a log into a folder, or brings one that was made before up to date; what it has that was dropped meanwhile stays. Each epoch is a static tree of its own in
// epochs/N; checkpoint and tile of the folder itself are links to those of the present epoch. What is there and can't change is
// not copied again. It returns the checkpoint of the present epoch.
func Mirror(ctx context.Context, from Source, log Log, dir string, progress func(done, all uint64)) (Checkpoint, error) {
	text, err := from.ReadFile(ctx, "checkpoint")
	if err != nil {
		return Checkpoint{}, fmt.Errorf("audit: checkpoint: %w", err)
	}
	present, err := log.Open(text)
	if err != nil {
		return Checkpoint{}, err
	}
	last := present.Epoch
	for epoch := range last + 1 {
		if epoch < last {
			if text, err = from.ReadFile(ctx, epochFile(epoch, "checkpoint")); err != nil {
				return Checkpoint{}, fmt.Errorf("audit: the checkpoint of epoch %d: %w", epoch, err)
			}
		} else if text, err = from.ReadFile(ctx, "checkpoint"); err != nil {
			return Checkpoint{}, err
		}
		c, err := log.Open(text)
		if err != nil {
			return Checkpoint{}, err
		}
		if c.Epoch != epoch {
			return Checkpoint{}, fmt.Errorf("audit: epoch %d: its checkpoint is of epoch %d: the log has gone on meanwhile, so try again", epoch, c.Epoch)
		}
		present = c
		if whole, err := mirrored(log, dir, c); err != nil {
			return Checkpoint{}, err
		} else if whole {
			continue
		}
		if err := mirrorEpoch(ctx, from, dir, c, progress); err != nil {
			return Checkpoint{}, err
		}
		if err := writeFile(dir, epochFile(epoch, "checkpoint"), text); err != nil { // last: what it covers is there
			return Checkpoint{}, err
		}
	}
	for _, name := range []string{"checkpoint", "tile"} {
		if err := link(epochFile(present.Epoch, name), filepath.Join(dir, name)); err != nil {
			return Checkpoint{}, err
		}
	}
	return present, nil
}

// mirrored says whether a folder has all of an epoch, or refuses a folder that has another log's.
func mirrored(log Log, dir string, c Checkpoint) (whole bool, err error) {
	name := epochFile(c.Epoch, "checkpoint")
	text, err := Folder(dir).ReadFile(context.Background(), name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	before, err := log.Open(text)
	if err != nil || before.Epoch != c.Epoch || before.Size > c.Size || before.Size == c.Size && before.Root != c.Root {
		return false, fmt.Errorf("audit: %s has %s of another log than this one, or of a later state of it: export to another folder", dir, name)
	}
	return before.Size == c.Size, nil
}

func mirrorEpoch(ctx context.Context, from Source, dir string, c Checkpoint, progress func(done, all uint64)) error {
	return Tiles(c.Size, func(t Tile) error {
		name := epochFile(c.Epoch, t.Path())
		if t.Width == TileWidth {
			if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
				return nil
			}
		}
		b, err := from.ReadFile(ctx, name)
		if errors.Is(err, fs.ErrNotExist) && t.Level == -1 && t.N == 0 {
			return errSkip // dropped by retention: its checkpoint stays
		} else if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("audit: epoch %d was dropped when the folder had a part of it, so export to another folder: %w", c.Epoch, err)
		} else if err != nil {
			return fmt.Errorf("audit: %w", err)
		}
		if progress != nil && t.Level == -1 {
			progress(t.N*TileWidth+uint64(t.Width), c.Size)
		}
		return writeFile(dir, name, b)
	})
}

// writeFile makes a file whole or not at all.
func writeFile(dir, name string, b []byte) error {
	path := filepath.Join(dir, filepath.FromSlash(name))
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	temp := path + ".new"
	if err := os.WriteFile(temp, b, 0o644); err != nil {
		return err
	}
	return os.Rename(temp, path)
}

// link makes a symbolic link, or points one that is there elsewhere.
func link(to, at string) error {
	if st, err := os.Lstat(at); err == nil && st.Mode().Type() != os.ModeSymlink {
		return fmt.Errorf("audit: %s is there and is not a link: this is not the folder of an export", at)
	}
	temp := at + ".new"
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(to, temp); err != nil {
		return err
	}
	return os.Rename(temp, at)
}
