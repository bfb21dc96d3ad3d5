package audit

import (
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"math/bits"

	"golang.org/x/mod/sumdb/tlog"
)

// Hash is the hash of a node of the tree: SHA-256 with the prefixes of RFC 6962 section 2.1.
type Hash [sha256.Size]byte

// String encodes the hash in base64 with padding, as a checkpoint has it.
func (h Hash) String() string { return base64.StdEncoding.EncodeToString(h[:]) }

// MarshalText encodes the hash as String does. A JSON document therefore has the hash as a string.
func (h Hash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText decodes the text of MarshalText.
func (h *Hash) UnmarshalText(text []byte) error {
	parsed, err := tlog.ParseHash(string(text))
	if err != nil {
		return fmt.Errorf("audit: %q is not a hash: want 32 bytes in base64", text)
	}
	*h = Hash(parsed)
	return nil
}

// LeafHash returns the hash of the leaf that holds an event.
func LeafHash(event []byte) Hash { return Hash(tlog.RecordHash(event)) }

// Reader reads the stored hashes of a tree. The index of a hash is its position in the order in
// which Tree.Append stores hashes; the first index is 0. ReadHashes returns the hashes in the order
// of the indexes, or an error if a hash is missing.
type Reader interface {
	ReadHashes(indexes []int64) ([]Hash, error)
}

// tlogReader is a Reader for functions of package tlog.
type tlogReader struct{ Reader }

func (r tlogReader) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	hashes, err := r.Reader.ReadHashes(indexes)
	if err != nil {
		return nil, err
	}
	return convert[tlog.Hash](hashes), nil
}

// convert copies hashes between the types Hash and tlog.Hash. Go converts single hashes, but no
// slices of hashes.
func convert[To, From ~[sha256.Size]byte](hashes []From) []To {
	converted := make([]To, len(hashes))
	for i, h := range hashes {
		converted[i] = To(h)
	}
	return converted
}

// Tree is the Merkle tree of one epoch, reduced to the data that Append and Root need: the size and
// the roots of the complete subtrees. A copy of a Tree is independent of the original.
type Tree struct {
	Size     uint64   // leaves
	complete [64]Hash // by level; complete[i] is valid if bit i of Size is set
}

// LoadTree loads the tree of size leaves from the stored hashes.
func LoadTree(size uint64, r Reader) (Tree, error) {
	t := Tree{Size: size}
	for level := range 63 {
		if size>>level&1 == 0 {
			continue
		}
		h, err := r.ReadHashes([]int64{tlog.StoredHashIndex(level, int64(size>>level)-1)})
		if err != nil {
			return Tree{}, err
		}
		t.complete[level] = h[0]
	}
	return t, nil
}

// ReadHashes returns roots of complete subtrees by their index, and an error for any other index. A
// Tree is thereby the Reader for its own Root.
func (t *Tree) ReadHashes(indexes []int64) ([]Hash, error) {
	hashes := make([]Hash, len(indexes))
	for i, index := range indexes {
		level, n := tlog.SplitStoredHashIndex(index)
		if t.Size>>level&1 == 0 || uint64(n) != t.Size>>level-1 {
			return nil, fmt.Errorf("audit: hash %d of level %d is no subtree of a tree of %d leaves", n, level, t.Size)
		}
		hashes[i] = t.complete[level]
	}
	return hashes, nil
}

// Append appends a leaf and calls store for each new hash to be stored, in the order of the indexes
// of a Reader.
func (t *Tree) Append(leaf Hash, store func(Hash)) {
	h, level := leaf, 0
	store(h)
	for ; t.Size>>level&1 == 1; level++ {
		h = Hash(tlog.NodeHash(tlog.Hash(t.complete[level]), tlog.Hash(h)))
		store(h)
	}
	t.complete[level] = h
	t.Size++
}

// Root returns the root hash of the tree. The root of an empty tree is SHA-256 of the empty string
// (RFC 6962). The ledger never publishes an empty tree, because each epoch begins with an event.
func (t *Tree) Root() (Hash, error) {
	root, err := tlog.TreeHash(int64(t.Size), tlogReader{t})
	return Hash(root), err
}

// StoredHashes returns the number of stored hashes of a tree of size leaves. Example: 3 leaves have
// 4 stored hashes, one for each leaf and one for the subtree of the first two.
func StoredHashes(size uint64) uint64 { return 2*size - uint64(bits.OnesCount64(size)) }
