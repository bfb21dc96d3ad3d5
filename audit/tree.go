package audit

import (
	"fmt"
	"math/bits"

	"golang.org/x/mod/sumdb/tlog"
)

// Hash is a node of the tree: SHA-256 with the prefixes of RFC 6962 section 2.1.
type Hash = tlog.Hash

// LeafHash is the hash of one event.
func LeafHash(event []byte) Hash { return tlog.RecordHash(event) }

// Reader gives the hashes that Tree.Append has made, by their position in the order in which it made them.
type Reader = tlog.HashReader

// Tree is the Merkle tree of one epoch, as far as growing it needs: its size and the roots of its complete subtrees. A
// copy of it is a tree of its own.
type Tree struct {
	Size     uint64
	complete [64]Hash // by level; complete[i] counts where bit i of Size is set
}

// LoadTree makes the tree of so many events from its stored hashes.
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

// ReadHashes gives the roots of the complete subtrees: all that appending and taking the root need.
func (t *Tree) ReadHashes(indexes []int64) ([]Hash, error) {
	hashes := make([]Hash, len(indexes))
	for i, index := range indexes {
		level, n := tlog.SplitStoredHashIndex(index)
		if t.Size>>level&1 == 0 || uint64(n) != t.Size>>level-1 {
			return nil, fmt.Errorf("audit: hash %d of level %d is not at the edge of a tree of %d", n, level, t.Size)
		}
		hashes[i] = t.complete[level]
	}
	return hashes, nil
}

// Append adds a leaf and calls store for each hash that has to be kept, in the order of their positions.
func (t *Tree) Append(leaf Hash, store func(Hash)) {
	h, level := leaf, 0
	store(h)
	for ; t.Size>>level&1 == 1; level++ {
		h = tlog.NodeHash(t.complete[level], h)
		store(h)
	}
	t.complete[level] = h
	t.Size++
}

// Root is the tree's hash. That of the empty tree is SHA-256 of nothing, and no tree of ours is empty when it is shown.
func (t *Tree) Root() (Hash, error) { return tlog.TreeHash(int64(t.Size), t) }

// StoredHashes is how many hashes a tree of so many events keeps.
func StoredHashes(size uint64) uint64 { return 2*size - uint64(bits.OnesCount64(size)) }
