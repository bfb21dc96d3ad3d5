package audit

import (
	"errors"
	"strings"

	"golang.org/x/mod/sumdb/tlog"
)

// TileWidth is the number of hashes in a full tile, and of entries in a full bundle.
const TileWidth = 256

// Tile names a file in the static form of a log (C2SP tlog-tiles): a tile of hashes or a bundle of
// entries.
type Tile struct {
	Level int    // from 0 on for hashes, -1 for a bundle of entries
	N     uint64 // index within the level, from 0 on
	Width int    // hashes or entries, 1 to TileWidth
}

func (t Tile) tlog() tlog.Tile { return tlog.Tile{H: 8, L: t.Level, N: int64(t.N), W: t.Width} }

// Path returns the name of the file: tile/LEVEL/N or tile/entries/N, with the suffix .p/WIDTH for a
// partial tile. Example: tile/entries/x001/234.p/7 is the bundle 1234 with 7 entries.
func (t Tile) Path() string {
	path := strings.TrimPrefix(t.tlog().Path(), "tile/8/")
	if rest, ok := strings.CutPrefix(path, "data/"); ok {
		path = "entries/" + rest
	}
	return "tile/" + path
}

// ParseTile parses the result of Tile.Path, with a level of at most 63. ok is false for any other
// text.
func ParseTile(path string) (tile Tile, ok bool) {
	rest, isTile := strings.CutPrefix(path, "tile/")
	if entries, is := strings.CutPrefix(rest, "entries/"); is {
		rest = "data/" + entries
	}
	t, err := tlog.ParseTilePath("tile/8/" + rest)
	tile = Tile{t.L, uint64(t.N), t.W}
	return tile, isTile && err == nil && tile.Level <= 63 && tile.Path() == path
}

// In reports whether a tree of size leaves has the tile.
func (t Tile) In(size uint64) bool {
	if t.Level > 7 { // a hash of level 8 would cover 256^8 = 2^64 leaves
		return false
	}
	nodes := size >> (8 * max(0, t.Level))
	return t.N <= nodes>>8 && t.N*TileWidth+uint64(t.Width) <= nodes
}

// Hashes returns the content of a tile of hashes: Width hashes of 32 bytes each.
func (t Tile) Hashes(r Reader) ([]byte, error) { return tlog.ReadTileData(t.tlog(), tlogReader{r}) }

// errSkip is the error with which a visit function ends Tiles without an error.
var errSkip = errors.New("skip")

// Tiles calls visit for each file of a tree of size leaves, bundles first.
func Tiles(size uint64, visit func(Tile) error) error {
	for level := -1; level <= 7; level++ {
		nodes := size >> (8 * max(0, level))
		for n := uint64(0); n*TileWidth < nodes; n++ {
			if err := visit(Tile{level, n, int(min(TileWidth, nodes-n*TileWidth))}); errors.Is(err, errSkip) {
				return nil
			} else if err != nil {
				return err
			}
		}
	}
	return nil
}
