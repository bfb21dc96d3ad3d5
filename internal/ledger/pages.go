package ledger

import (
	"encoding/binary"
	"fmt"
	"io"

	bolt "go.etcd.io/bbolt"
)

// maxPages is the largest number of pages that checkPages reads: 65536 pages of 4 KiB are 256 MiB.
const maxPages = 1 << 16

// checkPages reads bbolt's pages from the root, level by level. In an intact file each page is
// reached once and has its own number. In a damaged file with a cycle, bbolt would loop for ever,
// and no deadline could end the loop.
func checkPages(file io.ReaderAt, db *bolt.DB) error {
	size := db.Info().PageSize
	var root, end uint64
	if err := db.View(func(tx *bolt.Tx) error {
		root, end = uint64(tx.Cursor().Bucket().Root()), uint64(tx.Size())/uint64(size)
		return nil
	}); err != nil {
		return err
	}
	page := make([]byte, size)
	seen := map[uint64]bool{}
	for queue := []uint64{root}; len(queue) > 0 && len(seen) < maxPages; queue = queue[1:] {
		id := queue[0]
		if seen[id] || id < 2 || id >= end {
			return fmt.Errorf("%w: page %d is reached twice, or does not exist", ErrCorrupt, id)
		}
		seen[id] = true
		if _, err := file.ReadAt(page, int64(id)*int64(size)); err != nil {
			return fmt.Errorf("%w: page %d: %w", ErrCorrupt, id, err)
		}
		more, err := pageChildren(page, id)
		if err != nil {
			return err
		}
		queue = append(queue, more...)
	}
	return nil
}

// pageChildren returns the pages to which a page points: pages of the same tree, or roots of
// buckets. bbolt's layout, in the byte order of the machine, which is little-endian on all
// supported machines:
//
//	page:    u64 id, u16 flags (1 branch, 2 leaf), u16 count, u32 overflow,
//	         then count elements of 16 bytes
//	branch:  u32 position, u32 key size, u64 page
//	leaf:    u32 flags (1 bucket), u32 position, u32 key size, u32 value size;
//	         positions count from the element
//	bucket:  u64 root page (0: the bucket is inside the value), u64 sequence
func pageChildren(page []byte, id uint64) (children []uint64, err error) {
	le := binary.LittleEndian
	flags, count := le.Uint16(page[8:]), int(le.Uint16(page[10:]))
	if le.Uint64(page) != id || flags != 1 && flags != 2 || flags == 1 && count == 0 {
		return nil, fmt.Errorf("%w: page %d has another number, or is no page of a tree", ErrCorrupt, id)
	}
	for i := range count {
		at := 16 + 16*i
		if at+16 > len(page) {
			break // elements on overflow pages are skipped: pages with so many elements have no buckets
		}
		element := page[at:]
		if flags == 1 {
			children = append(children, le.Uint64(element[8:]))
			continue
		}
		value := at + int(le.Uint32(element[4:])) + int(le.Uint32(element[8:]))
		if le.Uint32(element)&1 != 0 && value+16 <= len(page) {
			if root := le.Uint64(page[value:]); root != 0 {
				children = append(children, root)
			}
		}
	}
	return children, nil
}
