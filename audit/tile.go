package audit

import (
	"errors"
	"strings"

	"golang.org/x/mod/sumdb/tlog"
)

// TileWidth is how many hashes or entries a full tile has.
const TileWidth = 256

// Tile names a file of a log's static form (C2SP tlog-tiles).
type Tile struct {
	Level int    // -1: a bundle of entries
	N     uint64 // its place in the level
	Width int    // 1 to TileWidth
}

func (t Tile) tlog() tlog.Tile { return tlog.Tile{H: 8, L: t.Level, N: int64(t.N), W: t.Width} }

// Path is the tile's name: tile/LEVEL/N, tile/entries/N, with .p/WIDTH where it is not full.
func (t Tile) Path() string {
	path := strings.TrimPrefix(t.tlog().Path(), "tile/8/")
	if rest, ok := strings.CutPrefix(path, "data/"); ok {
		path = "entries/" + rest
	}
	return "tile/" + path
}

// ParseTile reads a tile's name.
func ParseTile(path string) (Tile, bool) {
	rest, ok := strings.CutPrefix(path, "tile/")
	if entries, is := strings.CutPrefix(rest, "entries/"); is {
		rest = "data/" + entries
	}
	t, err := tlog.ParseTilePath("tile/8/" + rest)
	tile := Tile{t.L, uint64(t.N), t.W}
	return tile, ok && err == nil && tile.Level <= 63 && tile.Path() == path
}

// In says that a tree of so many leaves has the tile.
func (t Tile) In(size uint64) bool {
	if t.Level > 7 { // 256 to the 8th is more than any tree has
		return false
	}
	nodes := size >> (8 * max(0, t.Level))
	return t.N <= nodes>>8 && t.N*TileWidth+uint64(t.Width) <= nodes
}

// Hashes gives the content of a tile of hashes.
func (t Tile) Hashes(r Reader) ([]byte, error) { return tlog.ReadTileData(t.tlog(), r) }

// errSkip ends Tiles.
var errSkip = errors.New("skip")

// Tiles calls visit for each file that a tree of so many leaves has, bundles first.
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
