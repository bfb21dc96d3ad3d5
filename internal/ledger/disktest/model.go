package disktest

import (
	"cmp"
	"hash/maphash"
	"maps"
	"path"
	"slices"
)

// A power cut may cause the following losses. POSIX allows them; ext4, XFS and others show them.
//
//   - A file has the bytes and the size of its last fsync or fdatasync. Later writes survive by
//     sectors of 512 bytes. Each sector, independently, has its content after any one of the
//     later writes, or before all of them. So a write can be torn, and pages reach the disk in
//     any order.
//   - The size of a file is the size at the last fsync, or after any later operation with a new
//     size. The size survives independently of the bytes; missing bytes are zero. Truncation to
//     a shorter size is the exception: blocks become free, so the truncation is ordered with
//     writes to the bytes cut off.
//   - After a failed fsync, the kernel may mark dirty pages as clean. No later fsync makes a page
//     durable whose last write came before the failure. The next fsync does write the size.
//   - Names live in directories. The changes in one directory survive in order: the first n of
//     them. Fsync of the directory makes all earlier changes durable. Fsync of a file does not
//     make the file's name durable. A rename is atomic. A rename between directories is a change
//     in both.
//
// The model leaves out changes of a file's mode, times, and blocks allocated beyond the size. A
// file has the mode of its creation.

const (
	pageSize   = 4096
	sectorSize = 512
)

// page is the immutable content of one page of a file. A nil page has zeros only.
type page struct {
	data [pageSize]byte
	hash uint64
}

var seed = maphash.MakeSeed()

func newPage(data [pageSize]byte) *page {
	if data == [pageSize]byte{} {
		return nil
	}
	return &page{data, maphash.Bytes(seed, data[:])}
}

func (p *page) bytes() (b [pageSize]byte) {
	if p != nil {
		b = p.data
	}
	return b
}

// pages is a file's content. Bytes beyond the last page are zero.
type pages []*page

func (ps pages) at(i int) *page {
	if i < len(ps) {
		return ps[i]
	}
	return nil
}

func (ps *pages) set(i int, p *page) {
	for len(*ps) <= i {
		*ps = append(*ps, nil)
	}
	(*ps)[i] = p
}

// version is the content of a page after an operation.
type version struct {
	op        int
	page      *page
	sectors   uint8 // bit i is set if the operation wrote sector i
	truncated bool  // the operation shortened the file
}

// sizeChange is a file's size after an operation.
type sizeChange struct {
	op   int
	size int64
}

type file struct {
	mode        uint32
	current     pages // content that the program reads
	currentSize int64
	durable     pages // content at the last fsync
	durableSize int64
	versions    map[int][]version // since the last fsync, by page
	sizeChanges []sizeChange      // since the last fsync
	syncedAt    int               // operation of the last fsync
	failedAt    int               // operation of the last failed fsync
}

func (f *file) write(op int, off int64, data []byte) {
	f.grow(op, off+int64(len(data)))
	for len(data) > 0 {
		i, in := int(off/pageSize), int(off%pageSize)
		b := f.current.at(i).bytes()
		n := copy(b[in:], data)
		v := version{op: op, page: newPage(b)}
		for s := in / sectorSize; s <= (in+n-1)/sectorSize; s++ {
			v.sectors |= 1 << s
		}
		f.addVersion(i, v)
		off, data = off+int64(n), data[n:]
	}
}

func (f *file) addVersion(i int, v version) {
	f.current.set(i, v.page)
	f.versions[i] = append(f.versions[i], v)
}

func (f *file) grow(op int, size int64) {
	if size > f.currentSize {
		f.currentSize = size
		f.sizeChanges = append(f.sizeChanges, sizeChange{op, size})
	}
}

func (f *file) truncate(op int, size int64) {
	f.grow(op, size)
	if size == f.currentSize {
		return
	}
	f.currentSize = size
	f.sizeChanges = append(f.sizeChanges, sizeChange{op, size})
	for i := int(size / pageSize); i < len(f.current); i++ {
		b := f.current[i].bytes()
		clear(b[max(0, size-int64(i)*pageSize):])
		if p := newPage(b); p != f.current[i] {
			f.addVersion(i, version{op: op, page: p, truncated: true})
		}
	}
}

func (f *file) sync(op int) {
	for i, vs := range f.versions {
		if vs[len(vs)-1].op >= f.failedAt {
			f.durable.set(i, f.current.at(i))
			delete(f.versions, i)
		}
	}
	f.durableSize, f.sizeChanges, f.syncedAt = f.currentSize, nil, op
}

// nameChange is an operation on a name, with its number.
type nameChange struct {
	op int
	Op
}

// dirEntries is the content of a directory: name to node.
type dirEntries map[string]uint64

// model is a disk: its durable content and the volatile changes.
type model struct {
	files   map[uint64]*file
	dirs    map[uint64]dirEntries // durable entries of every directory, by node
	pending []nameChange          // volatile changes of names
}

func newModel() *model {
	return &model{map[uint64]*file{}, map[uint64]dirEntries{1: {}}, nil}
}

// do applies an operation with the number op.
func (m *model) do(op int, o Op) {
	f := m.files[o.Node]
	switch o.Kind {
	case Create:
		m.files[o.Node] = &file{mode: o.Mode, versions: map[int][]version{}}
	case Mkdir:
		m.dirs[o.Node] = dirEntries{}
	case Write:
		f.write(op, o.Offset, o.Data)
	case Truncate:
		f.truncate(op, o.Size)
	case Allocate:
		if !o.KeepSize {
			f.grow(op, o.Offset+o.Size)
		}
	case Sync, Datasync:
		f.sync(op)
	case FailedSync:
		f.failedAt = op
	case SyncDir:
		m.syncDir(o.Node)
	}
	if o.Dir != 0 {
		m.pending = append(m.pending, nameChange{op, o})
	}
}

// syncDir makes the changes in a directory durable. A rename to or from a further directory also
// makes the earlier changes in the further directory durable.
func (m *model) syncDir(dir uint64) {
	dirs := map[uint64]bool{dir: true}
	safe := make([]bool, len(m.pending))
	for i, r := range slices.Backward(m.pending) {
		if dirs[r.Dir] || dirs[r.ToDir] {
			safe[i] = true
			dirs[r.Dir], dirs[r.ToDir] = r.Dir != 0, r.ToDir != 0
		}
	}
	var left []nameChange
	for i, r := range m.pending {
		if safe[i] {
			rename(m.dirs, r)
		} else {
			left = append(left, r)
		}
	}
	m.pending = left
}

func rename(dirs map[uint64]dirEntries, r nameChange) {
	switch r.Kind {
	case Unlink, Rmdir:
		delete(dirs[r.Dir], path.Base(r.Path))
	case Rename:
		delete(dirs[r.Dir], path.Base(r.Path))
		dirs[r.ToDir][path.Base(r.To)] = r.Node
	default:
		dirs[r.Dir][path.Base(r.Path)] = r.Node
	}
}

// choice selects the volatile changes that survive a cut. The zero choice selects none.
type choice struct {
	sectors map[pageWrite]uint8 // bit i is set if sector i survives
	// whole has the operations whose change of a size or a name survives. A lost change of a name
	// takes later changes in the same directory with it.
	whole map[int]bool
}

// pageWrite is the part of a write in one page of a file.
type pageWrite struct{ op, page int }

// content is a file in a crash state.
type content struct {
	mode  uint32
	size  int64
	pages pages // covers size bytes exactly, the last page in part
}

// state is a crash state: a disk after a cut.
type state struct {
	dirs  []string // paths, a parent before its children
	files map[string]content
	hash  uint64
}

// survive builds the crash state of a choice.
func (m *model) survive(c choice) *state {
	dirs := map[uint64]dirEntries{}
	for node, held := range m.dirs {
		dirs[node] = maps.Clone(held)
	}
	stopped := map[uint64]bool{}
	for _, r := range m.pending {
		if c.whole[r.op] && !stopped[r.Dir] && !stopped[r.ToDir] {
			rename(dirs, r)
			continue
		}
		stopped[r.Dir], stopped[r.ToDir] = r.Dir != 0, r.ToDir != 0
	}
	s := &state{files: map[string]content{}}
	m.walk(s, dirs, 1, "", c)
	return s
}

func (m *model) walk(s *state, dirs map[uint64]dirEntries, dir uint64, prefix string, c choice) {
	for _, name := range slices.Sorted(maps.Keys(dirs[dir])) {
		node, p := dirs[dir][name], path.Join(prefix, name)
		if dirs[node] != nil {
			s.dirs = append(s.dirs, p)
			s.hash = mix(s.hash, maphash.String(seed, p))
			m.walk(s, dirs, node, p, c)
			continue
		}
		f := m.files[node].survive(c)
		s.files[p] = f
		s.hash = mix(mix(s.hash, maphash.String(seed, p)), uint64(f.size))
		for i, page := range f.pages {
			if page != nil {
				s.hash = mix(mix(s.hash, uint64(i)), page.hash)
			}
		}
	}
}

func mix(h, x uint64) uint64 {
	h = (h ^ x) * 0x9e3779b97f4a7c15
	return h ^ h>>29
}

func (f *file) survive(c choice) content {
	size, sizedBy := f.durableSize, f.syncedAt
	for _, z := range f.sizeChanges {
		if c.whole[z.op] {
			size, sizedBy = z.size, z.op
		}
	}
	ps := make(pages, (size+pageSize-1)/pageSize)
	copy(ps, f.durable)
	for i, vs := range f.versions {
		if i < len(ps) {
			ps[i] = survivor(f.durable.at(i), vs, sizedBy, func(op int) uint8 { return c.sectors[pageWrite{op, i}] })
		}
	}
	if last := len(ps) - 1; size%pageSize > 0 && ps[last] != nil {
		b := ps[last].data
		clear(b[size%pageSize:])
		if b != ps[last].data {
			ps[last] = newPage(b)
		}
	}
	return content{f.mode, size, ps}
}

// survivor builds a page from the surviving sectors of its versions, selected by keep. sizedBy is
// the operation that set the surviving size. A later truncation is lost, and so are later writes.
func survivor(durable *page, vs []version, sizedBy int, keep func(op int) uint8) *page {
	whole, torn, b := durable, false, [pageSize]byte{}
	for _, v := range vs {
		kept := keep(v.op) & v.sectors
		if v.truncated && v.op > sizedBy {
			break
		}
		if v.truncated || kept == 0xff {
			whole, torn = v.page, false
			continue
		}
		if kept == 0 {
			continue
		}
		if !torn {
			b, torn = whole.bytes(), true
		}
		after := cmp.Or(v.page, &zeros).data[:]
		for s := range 8 {
			if kept>>s&1 == 1 {
				copy(b[s*sectorSize:(s+1)*sectorSize], after[s*sectorSize:])
			}
		}
	}
	if torn {
		return newPage(b)
	}
	return whole
}
