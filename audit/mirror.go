package audit

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"countersign/internal/durable"

	"golang.org/x/mod/sumdb/tlog"
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

// Mirror copies a log into the folder dir and returns the checkpoint of the present epoch. Each
// epoch is a static tree of its own in epochs/N. The names checkpoint and tile in dir are links to
// those of the present epoch: symbolic ones, on Windows hard links of the files.
//
// The invariant: a checkpoint in dir proves each file of its epoch in dir. A file gets its name
// only when the file is proven and synced to the disk, and a checkpoint gets its name after all
// files of its epoch.
//
// Mirror brings an older copy in dir up to date. Files that can't change are not copied again, but
// are read: a file that a crash or a person has damaged is replaced, or is an error if retention
// has dropped the epoch meanwhile. Copies at the same time into one folder do not disturb each
// other; on Windows a copy fails while another program has a file open that is to be replaced, and
// can be made again. After a crash, a file with a name that begins with .new may remain.
//
// Mirror calls progress, which may be nil, with the events copied and the events in total of the
// epoch.
func Mirror(
	ctx context.Context, from Source, log Log, dir string, progress func(done, all uint64),
) (Checkpoint, error) {
	if dir == "" {
		return Checkpoint{}, errors.New("audit: the folder for the copy has no name: name one")
	}
	if err := checkFolder(dir); err != nil {
		return Checkpoint{}, err
	}
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
		if err := checkEarlier(log, dir, c); err != nil {
			return Checkpoint{}, err
		}
		m := mirror{ctx: ctx, from: from, dir: dir, head: c, folders: map[string]bool{}}
		if err := m.copy(progress); err != nil {
			return Checkpoint{}, fmt.Errorf("audit: epoch %d: %w", epoch, err)
		}
		if err := m.finish(text); err != nil {
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

// checkFolder refuses a folder with the names of a copy that is no copy: each copy, also one at the
// same time, makes epochs before these names.
func checkFolder(dir string) error {
	for _, name := range []string{"checkpoint", "tile"} {
		if _, err := os.Lstat(filepath.Join(dir, name)); err != nil {
			continue
		}
		if _, err := os.Lstat(filepath.Join(dir, "epochs")); err != nil {
			return fmt.Errorf("audit: %s has a %s and no epochs, so the folder is no export: use another", dir, name)
		}
	}
	return nil
}

// checkEarlier refuses a folder with another log, or with a later state of the log.
func checkEarlier(log Log, dir string, c Checkpoint) error {
	name := epochFile(c.Epoch, "checkpoint")
	text, err := Folder(dir).ReadFile(context.Background(), name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	before, err := log.Open(text)
	if err != nil || before.Epoch != c.Epoch || before.Size > c.Size || before.Size == c.Size && before.Root != c.Root {
		return fmt.Errorf("audit: %s has the file %s of another log, or of a later state of this log: "+
			"export to another folder", dir, name)
	}
	return nil
}

// mirror is the copy of one epoch.
type mirror struct {
	ctx     context.Context
	from    Source
	dir     string
	head    Checkpoint
	anew    bool            // the folder's tiles are not to be read: one of them is damaged
	folders map[string]bool // with new files that are not synced yet
	failed  error           // of SaveTiles, which can't return one
}

// copy makes the folder have each tile and bundle of the epoch. For an epoch that retention has
// dropped without an earlier copy, copy does nothing.
func (m *mirror) copy(progress func(done, all uint64)) error {
	err := Tiles(m.head.Size, func(t Tile) error {
		if t.Level == 0 {
			return nil // copied together with the bundles, whose hashes the tile has
		}
		hashes, err := m.proven(t)
		if err != nil {
			return err
		}
		if t.Level > 0 {
			return nil
		}
		if progress != nil {
			progress(t.N*TileWidth+uint64(t.Width), m.head.Size)
		}
		return m.bundle(t, hashes)
	})
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if _, earlier := os.Stat(m.path("tile")); errors.Is(earlier, fs.ErrNotExist) {
		return nil // only the checkpoint remains
	}
	return fmt.Errorf("retention dropped it before its copy was complete and undamaged: "+
		"export to another folder: %w", err)
}

// proven returns the hashes of a tile or of the entries of a bundle. The tiles on the way to the
// checkpoint are in the folder afterwards.
func (m *mirror) proven(t Tile) ([]Hash, error) {
	read := func() ([]Hash, error) {
		return provenHashes(m.head, m, 8*max(0, t.Level), t.N*TileWidth, uint64(t.Width))
	}
	hashes, err := read()
	if err == nil || m.anew {
		return hashes, err
	}
	m.anew = true
	hashes, err = read()
	m.anew = false
	return hashes, err
}

// bundle makes the folder have a bundle, whose entries have the hashes.
func (m *mirror) bundle(t Tile, hashes []Hash) error {
	b, err := m.local(t)
	if err == nil && hasHashes(b, hashes) {
		return nil
	}
	if b, err = m.source(t); err != nil {
		return err
	}
	if !hasHashes(b, hashes) {
		return fmt.Errorf("%s is not the bundle that the checkpoint proves", t.Path())
	}
	return m.keep(t.Path(), b)
}

// hasHashes reports whether a bundle has exactly the entries with these hashes.
func hasHashes(bundle []byte, hashes []Hash) bool {
	entries, err := split(bundle, len(hashes))
	if err != nil {
		return false
	}
	for i, entry := range entries {
		if LeafHash(entry) != hashes[i] {
			return false
		}
	}
	return true
}

func (m *mirror) path(name string) string {
	return filepath.Join(m.dir, filepath.FromSlash(epochFile(m.head.Epoch, name)))
}

func (m *mirror) local(t Tile) ([]byte, error) {
	return Folder(m.dir).ReadFile(m.ctx, epochFile(m.head.Epoch, t.Path()))
}

func (m *mirror) source(t Tile) ([]byte, error) {
	return m.from.ReadFile(m.ctx, epochFile(m.head.Epoch, t.Path()))
}

// Height, ReadTiles and SaveTiles make mirror a tlog.TileReader.
func (m *mirror) Height() int { return 8 }

// ReadTiles reads tiles from the folder if they are there, else from the source.
func (m *mirror) ReadTiles(tiles []tlog.Tile) (content [][]byte, err error) {
	for _, each := range tiles {
		t := Tile{each.L, uint64(each.N), each.W}
		b, err := m.local(t)
		if m.anew || err != nil || len(b) != t.Width*len(Hash{}) {
			b, err = m.source(t)
		}
		if err != nil {
			return nil, err
		}
		content = append(content, b)
	}
	return content, nil
}

// SaveTiles keeps tiles. Package tlog calls SaveTiles only with tiles that it has proven.
func (m *mirror) SaveTiles(tiles []tlog.Tile, content [][]byte) {
	for i, each := range tiles {
		t := Tile{each.L, uint64(each.N), each.W}
		if b, err := m.local(t); err == nil && bytes.Equal(b, content[i]) {
			continue
		}
		if err := m.keep(t.Path(), content[i]); err != nil {
			m.failed = errors.Join(m.failed, err)
		}
	}
}

// keep writes a proven file of the epoch.
func (m *mirror) keep(name string, b []byte) error {
	path := m.path(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	for folder := filepath.Dir(path); folder != filepath.Clean(m.dir); folder = filepath.Dir(folder) {
		m.folders[folder] = true
	}
	return durable.Write(path, b, 0o644)
}

// finish writes the checkpoint of the epoch, after all other files are on the disk.
func (m *mirror) finish(text []byte) error {
	if m.failed != nil {
		return m.failed
	}
	for folder := range m.folders {
		if err := durable.Sync(folder); err != nil {
			return err
		}
	}
	if b, err := os.ReadFile(m.path("checkpoint")); err == nil && bytes.Equal(b, text) {
		return nil
	}
	if err := m.keep("checkpoint", text); err != nil {
		return err
	}
	return durable.Sync(filepath.Dir(m.path("checkpoint")))
}

// linkAt moves a link to a path, where the link may replace another. link makes the link.
func linkAt(at string, link func(temp string) error) error {
	temp := filepath.Join(filepath.Dir(at), ".new-"+rand.Text())
	if err := link(temp); err != nil {
		return err
	}
	if err := os.Rename(temp, at); err != nil {
		os.Remove(temp)
		return err
	}
	return nil
}
