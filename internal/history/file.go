package history

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// A file of the history has a fixed size: a header of headerSize bytes, then for each ring its
// slots. All numbers are little-endian.
//
//	header  magic || u32 length of the text || text || zeros || u32 CRC-32C of all bytes before
//	text    a line for each ring: ring STEP SLOTS, then for each series: series NAME FOLD
//	slot    i64 begin of the step, Unix seconds || u32 measured seconds || f32 for each series
//	        || u32 CRC-32C of the layout's CRC, the number of the ring, and the bytes before
//
// The slot of a step is number begin / STEP modulo SLOTS of its ring. The value NaN is unknown.
const (
	magic      = "countersign history 1\n"
	headerSize = 8192
	slotHead   = 12
	slotTail   = 4
)

// Ring is a resolution of the history.
type Ring struct {
	Step  int64 // seconds
	Slots int64
}

// Rings are the resolutions, the finest first. Each step is a multiple of the step before, and each
// ring is longer than the step of the next one: a slot follows from the slots of the finer ring.
var Rings = []Ring{{10, 720}, {60, 2880}, {900, 8640}} // 2 hours, 2 days, 90 days

// column is a series in a file.
type column struct {
	name string
	fold Fold
}

// layout is what the header of a file says.
type layout struct {
	rings   []Ring
	columns []column
	crc     uint32 // of the header
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// newLayout returns a layout with its CRC.
func newLayout(rings []Ring, columns []column) layout {
	l := layout{rings: rings, columns: columns}
	l.crc = binary.LittleEndian.Uint32(l.header()[headerSize-4:])
	return l
}

// present returns the layout of this program.
func present() layout {
	var columns []column
	for _, s := range All {
		columns = append(columns, column{s.Name, s.Fold})
	}
	return newLayout(Rings, columns)
}

func (l layout) header() []byte {
	var text strings.Builder
	for _, r := range l.rings {
		fmt.Fprintf(&text, "ring %d %d\n", r.Step, r.Slots)
	}
	for _, c := range l.columns {
		fmt.Fprintf(&text, "series %s %s\n", c.name, c.fold)
	}
	b := append(make([]byte, 0, headerSize), magic...)
	b = binary.LittleEndian.AppendUint32(b, uint32(text.Len()))
	b = append(b, text.String()...)
	if len(b) > headerSize-4 {
		panic("history: the header is too small for its series")
	}
	b = b[:headerSize] // the rest is zero
	binary.LittleEndian.PutUint32(b[headerSize-4:], crc32.Checksum(b[:headerSize-4], castagnoli))
	return b
}

// Bounds of a layout that is read from a file.
const (
	maxColumns = 512
	maxSlots   = 1 << 20
)

// parseHeader reads the header of a file: of this version of the format, with any series.
func parseHeader(b []byte) (l layout, err error) {
	wrong := errors.New("it has no header of a history")
	if len(b) != headerSize || !bytes.HasPrefix(b, []byte(magic)) ||
		crc32.Checksum(b[:headerSize-4], castagnoli) != binary.LittleEndian.Uint32(b[headerSize-4:]) {
		return l, wrong
	}
	l.crc = binary.LittleEndian.Uint32(b[headerSize-4:])
	n := binary.LittleEndian.Uint32(b[len(magic):])
	rest := b[len(magic)+4 : headerSize-4]
	if uint64(n) > uint64(len(rest)) {
		return l, wrong
	}
	for line := range strings.Lines(string(rest[:n])) {
		words := strings.Fields(line)
		if len(words) != 3 {
			return l, wrong
		}
		switch words[0] {
		case "ring":
			step, err1 := strconv.ParseInt(words[1], 10, 64)
			slots, err2 := strconv.ParseInt(words[2], 10, 64)
			if err1 != nil || err2 != nil || step < 1 || step > maxSlots || slots < 1 || slots > maxSlots {
				return l, wrong
			}
			l.rings = append(l.rings, Ring{step, slots})
		case "series":
			l.columns = append(l.columns, column{words[1], Fold(words[2])})
		default:
			return l, wrong
		}
	}
	if len(l.columns) > maxColumns || len(l.rings) > 16 {
		return l, wrong
	}
	return l, nil
}

func (l layout) slotSize() int64 { return slotHead + 4*int64(len(l.columns)) + slotTail }

// offset returns the place of a slot.
func (l layout) offset(ring int, slot int64) int64 {
	at := int64(headerSize)
	for _, r := range l.rings[:ring] {
		at += r.Slots * l.slotSize()
	}
	return at + slot*l.slotSize()
}

func (l layout) size() int64 { return l.offset(len(l.rings), 0) }

// point has the values of one step.
type point struct {
	begin    int64 // Unix seconds
	measured uint32
	values   []float32 // in the order of the columns
}

// slotOf returns the slot of a step. A time before 1970 has none.
func (r Ring) slotOf(begin int64) int64 { return begin / r.Step % r.Slots }

func (l layout) sum(ring int, slot []byte) uint32 {
	seed := binary.LittleEndian.AppendUint32(nil, l.crc)
	seed = append(seed, byte(ring))
	return crc32.Update(crc32.Checksum(seed, castagnoli), castagnoli, slot[:len(slot)-slotTail])
}

func (l layout) encode(ring int, p point) []byte {
	b := make([]byte, 0, l.slotSize())
	b = binary.LittleEndian.AppendUint64(b, uint64(p.begin))
	b = binary.LittleEndian.AppendUint32(b, p.measured)
	for _, v := range p.values {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(v))
	}
	b = append(b, 0, 0, 0, 0)
	binary.LittleEndian.PutUint32(b[len(b)-slotTail:], l.sum(ring, b))
	return b
}

// decode reads a slot of a ring. ok is false for a slot that was never written, or is damaged, or
// belongs elsewhere.
func (l layout) decode(ring int, slot int64, b []byte) (p point, ok bool) {
	if int64(len(b)) != l.slotSize() || l.sum(ring, b) != binary.LittleEndian.Uint32(b[len(b)-slotTail:]) {
		return p, false
	}
	r := l.rings[ring]
	p.begin = int64(binary.LittleEndian.Uint64(b))
	p.measured = binary.LittleEndian.Uint32(b[8:])
	if p.begin < 0 || p.begin%r.Step != 0 || r.slotOf(p.begin) != slot {
		return p, false
	}
	p.values = make([]float32, len(l.columns))
	for i := range p.values {
		p.values[i] = math.Float32frombits(binary.LittleEndian.Uint32(b[slotHead+4*i:]))
	}
	return p, true
}

// points reads the steps of a ring with from <= begin < until, which is not more than the ring has.
// Steps that the file does not have are missing in the result, which is in the order of time.
func (l layout) points(f io.ReaderAt, ring int, from, until int64) (all []point, err error) {
	r := l.rings[ring]
	for begin := from; begin < until; {
		slot := r.slotOf(begin)
		n := min((until-begin)/r.Step, r.Slots-slot) // up to the end of the ring
		b := make([]byte, n*l.slotSize())
		got, err := f.ReadAt(b, l.offset(ring, slot))
		if err != nil && err != io.EOF { // a file that was cut has gaps
			return nil, err
		}
		b = b[:got]
		for i := int64(0); i < n && (i+1)*l.slotSize() <= int64(len(b)); i++ {
			p, ok := l.decode(ring, slot+i, b[i*l.slotSize():(i+1)*l.slotSize()])
			if ok && p.begin == begin+i*r.Step { // otherwise of another lap of the ring
				all = append(all, p)
			}
		}
		begin += n * r.Step
	}
	return all, nil
}

// fold returns the value of a longer step from the points of the shorter steps in it.
func (l layout) fold(begin int64, points []point) point {
	p := point{begin: begin, values: make([]float32, len(l.columns))}
	for _, each := range points {
		p.measured += each.measured
	}
	for i, c := range l.columns {
		sum, weight := 0.0, 0.0
		value := math.NaN()
		for _, each := range points {
			v := float64(each.values[i])
			switch {
			case math.IsNaN(v):
				continue
			case c.fold == Mean:
				sum, weight = sum+v*float64(each.measured), weight+float64(each.measured)
			case math.IsNaN(value) || c.fold == Last || c.fold == Max && v > value || c.fold == Min && v < value:
				value = v
			}
		}
		if c.fold == Mean && weight > 0 {
			value = sum / weight
		}
		p.values[i] = float32(value)
	}
	return p
}

// openFile opens the file of the history at a path, or begins one. A file of an older layout keeps
// the series that both layouts have. A damaged header costs nothing, since each slot tells whether
// the slot is of this layout. Any other file is renamed, and nothing of it is lost. A symbolic
// link, a device, a file of another user or of two names is left alone, with an error.
func openFile(path string, l layout, log *slog.Logger) (f *os.File, err error) {
	f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0o600)
	if errors.Is(err, syscall.ELOOP) {
		return nil, fmt.Errorf("%s is a symbolic link: remove it", path)
	} else if err != nil {
		return nil, err
	}
	opened := f
	defer func() {
		if err != nil {
			opened.Close()
		}
	}()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	sys, _ := st.Sys().(*syscall.Stat_t)
	switch {
	case !st.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a regular file: move it away", path)
	case sys == nil || int(sys.Uid) != os.Geteuid():
		return nil, fmt.Errorf("%s belongs to another user: move it away", path)
	case sys.Nlink != 1:
		return nil, fmt.Errorf("%s has a second name (a hard link): move it away", path)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, fmt.Errorf("%s is in use by another process: each appliance needs a history of its own", path)
	}
	header := l.header()
	found := make([]byte, headerSize)
	n, err := f.ReadAt(found, 0)
	if err != nil && err != io.EOF {
		return nil, err
	}
	found = found[:n]
	older, foreign := parseHeader(found)
	switch {
	case n == 0 || bytes.Equal(found, header): // new, or as it should be
	case !slices.ContainsFunc(found, func(b byte) bool { return b != 0 }) && st.Size() == l.size():
		// A full disk has taken the size and not the header.
	case foreign == nil:
		log.Info("the history has other series than this version: the common ones are kept", "path", path)
		return convert(path, f, older, l)
	case l.has(f):
		log.Warn("the header of the history is damaged, and is written again", "path", path)
	case bytes.HasPrefix(found, []byte(magic)):
		log.Warn("the history is damaged, and begins anew", "path", path)
	default:
		aside := path + ".aside-" + time.Now().UTC().Format("20060102T150405.000000000Z")
		if err := os.Rename(path, aside); err != nil {
			return nil, err
		}
		log.Warn("the file of the history is none, so a new one begins", "path", path, "renamed", aside)
		opened.Close()
		if opened, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL|syscall.O_CLOEXEC, 0o600); err != nil {
			return nil, err
		}
		f = opened
		syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	}
	return f, prepare(f, l)
}

// prepare gives a file its mode, its header and its size. The slots that have not been written take
// no space on most file systems.
func prepare(f *os.File, l layout) error {
	if err := f.Chmod(0o600); err != nil {
		return err
	}
	if err := f.Truncate(l.size()); err != nil {
		return err
	}
	_, err := f.WriteAt(l.header(), 0)
	return err
}

// has reports whether a file without a valid header has a slot of the layout.
func (l layout) has(f io.ReaderAt) bool {
	b := make([]byte, l.slotSize())
	for ring, r := range l.rings {
		for slot := range r.Slots {
			if _, err := f.ReadAt(b, l.offset(ring, slot)); err != nil {
				break
			}
			if _, ok := l.decode(ring, slot, b); ok {
				return true
			}
		}
	}
	return false
}

// convert makes a file of the present layout from an older one, and returns it.
func convert(path string, from *os.File, older, l layout) (f *os.File, err error) {
	defer from.Close()
	made := path + ".new"
	if err := os.Remove(made); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	f, err = os.OpenFile(made, os.O_RDWR|os.O_CREATE|os.O_EXCL|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(made)
		}
	}()
	syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err := prepare(f, l); err != nil {
		return nil, err
	}
	b := make([]byte, older.slotSize())
	for ring, r := range older.rings {
		to := slices.IndexFunc(l.rings, func(each Ring) bool { return each.Step == r.Step })
		for slot := int64(0); to >= 0 && slot < r.Slots; slot++ {
			if _, err := from.ReadAt(b, older.offset(ring, slot)); err != nil {
				break // the rest is missing
			}
			p, ok := older.decode(ring, slot, b)
			if !ok {
				continue
			}
			kept := point{begin: p.begin, measured: p.measured, values: make([]float32, len(l.columns))}
			for i, c := range l.columns {
				kept.values[i] = float32(math.NaN())
				if at := slices.Index(older.columns, c); at >= 0 {
					kept.values[i] = p.values[at]
				}
			}
			if _, err := f.WriteAt(l.encode(to, kept), l.offset(to, l.rings[to].slotOf(p.begin))); err != nil {
				return nil, err
			}
		}
	}
	return f, os.Rename(made, path)
}
