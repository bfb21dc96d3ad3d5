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

// Source reads the files of a log in its static form. The names are checkpoint and tile/… for the
// present epoch, and epochs/N/checkpoint and epochs/N/tile/… for every epoch N. The error of a
// missing file wraps fs.ErrNotExist.
type Source interface {
	ReadFile(ctx context.Context, name string) ([]byte, error)
}

// Folder is a Source on disk: the path of the folder.
type Folder string

// ReadFile reads a regular file of at most MaxFile bytes.
func (f Folder) ReadFile(_ context.Context, name string) ([]byte, error) {
	path := filepath.Join(string(f), filepath.FromSlash(name))
	if st, err := os.Stat(path); err != nil {
		return nil, err
	} else if !st.Mode().IsRegular() { // opening a named pipe could block for ever
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return ReadAll(name, file)
}

// MaxFile is an upper bound for the size of a file of a log, in bytes: a bundle of 256 entries of
// 65535 bytes, each after its length of 2 bytes.
const MaxFile = TileWidth * (2 + 1<<16)

// ReadAll reads a file of a log. The error for more than MaxFile bytes has the file's name.
func ReadAll(name string, r io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, MaxFile+1))
	if err == nil && len(b) > MaxFile {
		err = fmt.Errorf("%s has more than the %d bytes that a file of a log can have", name, MaxFile)
	}
	return b, err
}

func epochFile(epoch uint32, name string) string { return fmt.Sprintf("epochs/%d/%s", epoch, name) }

// Mirror copies a log into the folder dir and returns the checkpoint of the present epoch. If dir
// has an older copy, Mirror updates the copy: full tiles are not copied again, because they can't
// change, and epochs that retention has dropped meanwhile stay in dir. Each epoch is a static tree
// of its own in epochs/N. The names checkpoint and tile in dir are links to those of the present
// epoch.
//
// Mirror calls progress, which may be nil, with the events copied and the events in total of the
// epoch.
func Mirror(
	ctx context.Context, from Source, log Log, dir string, progress func(done, all uint64),
) (Checkpoint, error) {
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
			return Checkpoint{}, fmt.Errorf("audit: epoch %d: its checkpoint is of epoch %d: "+
				"the log began a new epoch during the copy: try again", epoch, c.Epoch)
		}
		present = c
		if complete, err := mirrored(log, dir, c); err != nil {
			return Checkpoint{}, err
		} else if complete {
			continue
		}
		if err := mirrorEpoch(ctx, from, dir, c, progress); err != nil {
			return Checkpoint{}, err
		}
		// The checkpoint is written last: a checkpoint in the folder has all its tiles there.
		if err := writeFile(dir, epochFile(epoch, "checkpoint"), text); err != nil {
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

// mirrored reports whether the folder has a complete copy of an epoch. A folder with another log,
// or with a later state of the log, is an error.
func mirrored(log Log, dir string, c Checkpoint) (complete bool, err error) {
	name := epochFile(c.Epoch, "checkpoint")
	text, err := Folder(dir).ReadFile(context.Background(), name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	before, err := log.Open(text)
	sameSize := before.Size == c.Size
	if err != nil || before.Epoch != c.Epoch || before.Size > c.Size || sameSize && before.Root != c.Root {
		return false, fmt.Errorf("audit: %s has the file %s of another log, or of a later state of this log: "+
			"export to another folder", dir, name)
	}
	return sameSize, nil
}

// mirrorEpoch copies the tiles and bundles of an epoch.
func mirrorEpoch(
	ctx context.Context, from Source, dir string, c Checkpoint, progress func(done, all uint64),
) error {
	return Tiles(c.Size, func(t Tile) error {
		name := epochFile(c.Epoch, t.Path())
		if t.Width == TileWidth {
			if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
				return nil
			}
		}
		b, err := from.ReadFile(ctx, name)
		if errors.Is(err, fs.ErrNotExist) && t.Level == -1 && t.N == 0 {
			return errSkip // dropped by retention; only the checkpoint remains
		} else if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("audit: retention dropped epoch %d before its copy was complete: "+
				"export to another folder: %w", c.Epoch, err)
		} else if err != nil {
			return fmt.Errorf("audit: %w", err)
		}
		if progress != nil && t.Level == -1 {
			progress(t.N*TileWidth+uint64(t.Width), c.Size)
		}
		return writeFile(dir, name, b)
	})
}

// writeFile writes a file atomically: a temporary file is renamed over the name.
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

// link makes or replaces a symbolic link at a path, atomically.
func link(to, at string) error {
	if st, err := os.Lstat(at); err == nil && st.Mode().Type() != os.ModeSymlink {
		return fmt.Errorf("audit: %s exists and is not a link, so the folder is no export: use another", at)
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
