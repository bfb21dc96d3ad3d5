package audit

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/mod/sumdb/tlog"
)

// split divides a bundle into its n entries. An entry has the encoding u16 length || bytes (C2SP
// tlog-tiles). If the bundle is malformed, split returns the entries before the fault.
func split(bundle []byte, n int) (entries [][]byte, err error) {
	entries = make([][]byte, 0, n)
	for range n {
		size := int(entryLength(bundle))
		if len(bundle) < 2+size {
			return entries, errors.New("it ends within an entry")
		}
		entries, bundle = append(entries, bundle[2:2+size]), bundle[2+size:]
	}
	if len(bundle) > 0 {
		return entries, fmt.Errorf("%d bytes follow its %d entries", len(bundle), n)
	}
	return entries, nil
}

func entryLength(bundle []byte) uint16 {
	if len(bundle) < 2 {
		return 0
	}
	return binary.BigEndian.Uint16(bundle)
}

// treeChecker computes the tree of an epoch from the entries and compares each tile with the tree.
type treeChecker struct {
	head  Checkpoint
	read  func(Tile) ([]byte, error)
	since *Checkpoint // older checkpoint of this epoch, or nil
	tree  Tree        // of the entries so far

	// proven are the hashes of at most 256 full bundles, from a bundle whose number is a multiple
	// of 256 on. The checkpoint proves the hashes.
	proven  []Hash
	partial [8][]byte // by level: the hashes of the tile that is not full yet
	full    [8]uint64 // by level: the number of full tiles
}

var errChanged = errors.New("the log was changed since the older checkpoint")

// mismatch is an error in an event, an entry or a tile. All other errors are failed reads or
// concern the log as a whole.
type mismatch struct{ reason string }

func (m *mismatch) Error() string { return m.reason }

// addBundle adds the entries of bundle n. formErr is the error of split. The index at is the first
// leaf to which the returned error can apply.
func (t *treeChecker) addBundle(n uint64, entries [][]byte, formErr error) (at uint64, err error) {
	if n%TileWidth == 0 {
		// An error leaves proven empty. The comparison with the tiles finds every fault anyway;
		// proven only finds a fault in a bundle before its events are checked.
		t.proven, _ = t.provenHashes(8, n, min(TileWidth, t.head.Size>>8-n))
	}
	name := Tile{-1, n, int(min(TileWidth, t.head.Size-n*TileWidth))}.Path()
	if formErr != nil {
		return t.firstWrong(n, entries), &mismatch{fmt.Sprintf("%s: %v", name, formErr)}
	}
	changed := false
	for _, b := range entries {
		level := 0
		// Append stores the roots of the subtrees that the leaf completes, level by level.
		t.tree.Append(LeafHash(b), func(h Hash) {
			if row := level / 8; level%8 == 0 && row < len(t.partial) {
				t.partial[row] = append(t.partial[row], h[:]...)
			}
			level++
		})
		if t.since != nil && t.since.Size == t.tree.Size {
			root, err := t.tree.Root()
			changed = err != nil || root != t.since.Root
		}
	}
	if i := int(n % TileWidth); i < len(t.proven) && !bytes.HasSuffix(t.partial[1], t.proven[i][:]) {
		return t.firstWrong(n, entries), &mismatch{name + " is not the bundle that the checkpoint proves"}
	}
	for level := range t.partial {
		if len(t.partial[level]) == TileWidth*len(Hash{}) || level == 0 { // the last tile of level 0 may be partial
			if at, err := t.checkTile(level); err != nil {
				return at, err
			}
		}
	}
	if changed {
		return t.tree.Size, fmt.Errorf("its first %d events have another root: %w", t.since.Size, errChanged)
	}
	return 0, nil
}

// firstWrong returns the index of the first entry of bundle n that differs from the tile of leaf
// hashes. If the checkpoint does not prove that tile, firstWrong returns the index of the bundle's
// first entry.
func (t *treeChecker) firstWrong(n uint64, entries [][]byte) (at uint64) {
	width := min(TileWidth, t.head.Size-n*TileWidth)
	at = n * TileWidth
	leaves, err := t.provenHashes(0, at, width)
	if err != nil {
		return at
	}
	for i, b := range entries {
		if LeafHash(b) != leaves[i] {
			return at + uint64(i)
		}
	}
	return at + min(uint64(len(entries)), width-1)
}

// provenHashes reads n hashes of a level from the tiles and verifies them against the checkpoint.
func (t *treeChecker) provenHashes(level int, from, n uint64) ([]Hash, error) {
	return provenHashes(t.head, tileReader{t.read}, level, from, n)
}

func provenHashes(head Checkpoint, tiles tlog.TileReader, level int, from, n uint64) ([]Hash, error) {
	indexes := make([]int64, n)
	for i := range indexes {
		indexes[i] = tlog.StoredHashIndex(level, int64(from)+int64(i))
	}
	tree := tlog.Tree{N: int64(head.Size), Hash: tlog.Hash(head.Root)}
	hashes, err := tlog.TileHashReader(tree, tiles).ReadHashes(indexes)
	if err != nil {
		return nil, err
	}
	return convert[Hash](hashes), nil
}

// tileReader is the tlog.TileReader of an epoch, without a cache.
type tileReader struct{ read func(Tile) ([]byte, error) }

func (tileReader) Height() int { return 8 }

func (tileReader) SaveTiles([]tlog.Tile, [][]byte) {}

func (t tileReader) ReadTiles(tiles []tlog.Tile) (content [][]byte, err error) {
	for _, tile := range tiles {
		b, err := t.read(Tile{tile.L, uint64(tile.N), tile.W})
		if err != nil {
			return nil, err
		}
		content = append(content, b)
	}
	return content, nil
}

// checkTile compares the newest tile of a level with its file. The index at is the first leaf below
// the first different hash.
func (t *treeChecker) checkTile(level int) (at uint64, err error) {
	row := t.partial[level]
	tile := Tile{level, t.full[level], len(row) / len(Hash{})}
	at = tile.N * TileWidth << (8 * level)
	b, err := t.read(tile)
	if err != nil {
		return at, err
	}
	if !bytes.Equal(b, row) {
		same := 0
		for same < min(len(row), len(b)) && b[same] == row[same] {
			same++
		}
		at = (tile.N*TileWidth + uint64(same/len(Hash{}))) << (8 * level)
		return min(at, t.tree.Size-1), &mismatch{"its hash differs from the one in " + tile.Path()}
	}
	if len(row) == TileWidth*len(Hash{}) {
		t.partial[level], t.full[level] = row[:0], t.full[level]+1
	}
	return at, nil
}

// finish compares the partial tiles with their files, and returns the root of the tree.
func (t *treeChecker) finish() (root Hash, at uint64, err error) {
	for level := range t.partial {
		if len(t.partial[level]) > 0 {
			if at, err := t.checkTile(level); err != nil {
				return Hash{}, at, err
			}
		}
	}
	root, err = t.tree.Root()
	return root, 0, err
}
