package disktest

import (
	"cmp"
	"hash/maphash"
	"maps"
	"path"
	"slices"
)

// What may be lost in a cut, as POSIX has it and ext4, XFS and others make use of:
//
//   - What a file held at its last fsync or fdatasync is there: bytes and size. Of what was written to it since, each
//     sector of 512 bytes is there or not by itself: it is as it was after any of the writes to it, or before all. So a
//     write can be torn, and pages come in any order.
//   - The size of the file is what it was at that fsync or after any later operation that changed it, whether the bytes
//     are there or not; missing bytes are zero. Only a truncation that shortens a file is in order with what is written
//     to the bytes it cuts off, since it frees their blocks.
//   - After an fsync that failed, the kernel may take for written what it wasn't able to write: no later fsync makes
//     a page durable that was last written before. The size is written with the next.
//   - Names live in folders. The changes in one folder survive in order: a number of them from the first on. Fsync of
//     the folder makes those before it durable; fsync of a file doesn't make its name durable. A rename is done or not
//     done. One that moves a file between folders is a change in both.
//
// Modes of files, times and blocks allocated beyond the size are not modelled: a file has the mode it was created with.

const (
	pageSize   = 4096
	sectorSize = 512
)

// page is a page of a file at some time. It doesn't change. A nil page is zeros.
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

// pages is a file's content. What is beyond it is zeros.
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

// version is what a page became by an operation.
type version struct {
	op      int
	page    *page
	sectors uint8 // that it wrote, a bit each
	cut     bool  // it shortened the file
}

// sizing is what a file's size became by an operation.
type sizing struct {
	op   int
	size int64
}

type file struct {
	mode     uint32
	seen     pages // by the program
	seenSize int64
	safe     pages // at the last fsync
	safeSize int64
	versions map[int][]version // since then, by page
	sizings  []sizing          // since then
	synced   int               // when that was
	failed   int               // when one failed
}

func (f *file) write(op int, off int64, data []byte) {
	f.grow(op, off+int64(len(data)))
	for len(data) > 0 {
		i, in := int(off/pageSize), int(off%pageSize)
		b := f.seen.at(i).bytes()
		n := copy(b[in:], data)
		v := version{op: op, page: newPage(b)}
		for s := in / sectorSize; s <= (in+n-1)/sectorSize; s++ {
			v.sectors |= 1 << s
		}
		f.become(i, v)
		off, data = off+int64(n), data[n:]
	}
}

func (f *file) become(i int, v version) {
	f.seen.set(i, v.page)
	f.versions[i] = append(f.versions[i], v)
}

func (f *file) grow(op int, size int64) {
	if size > f.seenSize {
		f.seenSize = size
		f.sizings = append(f.sizings, sizing{op, size})
	}
}

func (f *file) truncate(op int, size int64) {
	f.grow(op, size)
	if size == f.seenSize {
		return
	}
	f.seenSize = size
	f.sizings = append(f.sizings, sizing{op, size})
	for i := int(size / pageSize); i < len(f.seen); i++ {
		b := f.seen[i].bytes()
		clear(b[max(0, size-int64(i)*pageSize):])
		if p := newPage(b); p != f.seen[i] {
			f.become(i, version{op: op, page: p, cut: true})
		}
	}
}

func (f *file) sync(op int) {
	for i, vs := range f.versions {
		if vs[len(vs)-1].op >= f.failed {
			f.safe.set(i, f.seen.at(i))
			delete(f.versions, i)
		}
	}
	f.safeSize, f.sizings, f.synced = f.seenSize, nil, op
}

// renaming is a change of names.
type renaming struct {
	op int
	Op
}

// names is what a folder holds: name to node.
type names map[string]uint64

// model is a disk: what is safe on it and what may be.
type model struct {
	files   map[uint64]*file
	folders map[uint64]names // what is safe; a node that is a folder is in here
	pending []renaming
}

func newModel() *model {
	return &model{map[uint64]*file{}, map[uint64]names{1: {}}, nil}
}

// do takes the operation with the number op.
func (m *model) do(op int, o Op) {
	f := m.files[o.Node]
	switch o.Kind {
	case Create:
		m.files[o.Node] = &file{mode: o.Mode, versions: map[int][]version{}}
	case Mkdir:
		m.folders[o.Node] = names{}
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
		f.failed = op
	case SyncDir:
		m.syncDir(o.Node)
	}
	if o.Dir != 0 {
		m.pending = append(m.pending, renaming{op, o})
	}
}

// syncDir makes the changes in a folder durable, and with one that is a change in a further folder too the changes
// before it there.
func (m *model) syncDir(dir uint64) {
	dirs := map[uint64]bool{dir: true}
	safe := make([]bool, len(m.pending))
	for i, r := range slices.Backward(m.pending) {
		if dirs[r.Dir] || dirs[r.ToDir] {
			safe[i] = true
			dirs[r.Dir], dirs[r.ToDir] = r.Dir != 0, r.ToDir != 0
		}
	}
	var left []renaming
	for i, r := range m.pending {
		if safe[i] {
			rename(m.folders, r)
		} else {
			left = append(left, r)
		}
	}
	m.pending = left
}

func rename(folders map[uint64]names, r renaming) {
	switch r.Kind {
	case Unlink, Rmdir:
		delete(folders[r.Dir], path.Base(r.Path))
	case Rename:
		delete(folders[r.Dir], path.Base(r.Path))
		folders[r.ToDir][path.Base(r.To)] = r.Node
	default:
		folders[r.Dir][path.Base(r.Path)] = r.Node
	}
}

// choice is what of the unsafe survives. The zero choice is nothing.
type choice struct {
	sectors map[piece]uint8
	whole   map[int]bool // operations of which the size or the name survives; a name that doesn't takes along those after it
}

// piece is the part of a write that is in one page of its file.
type piece struct{ op, page int }

// content is a file in a state of the disk.
type content struct {
	mode  uint32
	size  int64
	pages pages // as long as the size is
}

// state is a disk after a cut.
type state struct {
	folders []string // paths, the outer before the inner
	files   map[string]content
	hash    uint64
}

// survive builds the disk.
func (m *model) survive(c choice) *state {
	folders := map[uint64]names{}
	for node, held := range m.folders {
		folders[node] = maps.Clone(held)
	}
	stopped := map[uint64]bool{}
	for _, r := range m.pending {
		if c.whole[r.op] && !stopped[r.Dir] && !stopped[r.ToDir] {
			rename(folders, r)
			continue
		}
		stopped[r.Dir], stopped[r.ToDir] = r.Dir != 0, r.ToDir != 0
	}
	s := &state{files: map[string]content{}}
	m.walk(s, folders, 1, "", c)
	return s
}

func (m *model) walk(s *state, folders map[uint64]names, dir uint64, prefix string, c choice) {
	for _, name := range slices.Sorted(maps.Keys(folders[dir])) {
		node, p := folders[dir][name], path.Join(prefix, name)
		if folders[node] != nil {
			s.folders = append(s.folders, p)
			s.hash = mix(s.hash, maphash.String(seed, p))
			m.walk(s, folders, node, p, c)
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
	size, sizedBy := f.safeSize, f.synced
	for _, z := range f.sizings {
		if c.whole[z.op] {
			size, sizedBy = z.size, z.op
		}
	}
	ps := make(pages, (size+pageSize-1)/pageSize)
	copy(ps, f.safe)
	for i, vs := range f.versions {
		if i < len(ps) {
			ps[i] = survivor(f.safe.at(i), vs, sizedBy, func(op int) uint8 { return c.sectors[piece{op, i}] })
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

// survivor is a page of which the sectors that keep says survive. sizedBy is the last operation that the size knows.
func survivor(safe *page, vs []version, sizedBy int, keep func(op int) uint8) *page {
	whole, torn, b := safe, false, [pageSize]byte{}
	for _, v := range vs {
		kept := keep(v.op) & v.sectors
		if v.cut && v.op > sizedBy {
			break
		}
		if v.cut || kept == 0xff {
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
