package disktest

import (
	"cmp"
	"fmt"
	"iter"
	"maps"
	"math/bits"
	"math/rand/v2"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
)

// Options of Explore. The zero value will do.
type Options struct {
	States  int    // at most, for one moment of the cut; 0 is 32
	Total   int    // at most, in all; 0 is 10,000. Where it is the smaller bound the moments share it evenly
	Seed    uint64 // of what is chosen; 0 is a new one
	Only    int    // judge this state only, by the number that a violation tells
	Workers int    // check is called by so many at once; 0 is GOMAXPROCS
}

// Result of an exploration.
type Result struct {
	Cuts       int // moments of the cut
	States     int // disks that were judged, all of them different or at different marks
	Violations []Violation
}

// Violation is a disk that was judged to be bad.
type Violation struct {
	Options Options // judge this disk again, for the same record
	At      int     // operations before the cut
	Lost    []string
	Err     error
}

func (v Violation) String() string {
	lost := v.Lost
	if more := len(lost) - 20; more > 0 {
		lost = append(slices.Clip(lost[:20]), fmt.Sprintf("and %d more", more))
	}
	return fmt.Sprintf("%v\n\ta cut after %d operations (%#v) lost:\n\t%s", v.Err, v.At, v.Options, strings.Join(lost, "\n\t"))
}

// enough violations end an exploration.
const enough = 3

// Explore is Search that fails the test for each violation.
func Explore(t testing.TB, r Record, o Options, check func(dir string, at int) error) Result {
	t.Helper()
	result := Search(t, r, o, check)
	for _, v := range result.Violations {
		t.Errorf("disktest: %v", v)
	}
	return result
}

// Search has power go after each number of operations, and check judge the disks that could be left. For each moment
// these are: the disk with all that was done; with only what is safe; with the last write torn; with any one operation
// lost; with any one only; with any one page of a larger write lost; with sizes only and with bytes only; and others at
// random, as many as the options allow. A disk that was judged before is left out, unless a mark was passed since.
//
// Check gets a folder that is its own until it returns, and may change it. It must close what it opens. at is the
// number of operations before the cut: what was released at marks up to at must be there. A panic or a bad address
// counts as its error, but not in a goroutine that it starts; it must not call t.FailNow. The folders are in memory where
// there is /dev/shm.
func Search(t testing.TB, r Record, o Options, check func(dir string, at int) error) Result {
	t.Helper()
	o.States = cmp.Or(o.States, 32)
	o.Total = cmp.Or(o.Total, 10_000)
	o.Seed = cmp.Or(o.Seed, uint64(rand.Uint32()))
	o.Workers = cmp.Or(o.Workers, runtime.GOMAXPROCS(0))
	t.Logf("disktest: %d operations, seed %d", len(r.Ops), o.Seed)
	root := scratch(t)

	result := Result{Cuts: len(r.Ops) + 1}
	var mu sync.Mutex // of result
	cuts := make(chan cut)
	var workers sync.WaitGroup
	for range o.Workers {
		workers.Go(func() {
			debug.SetPanicOnFault(true) // a mapped file may be shorter than it says
			folder := newFolder(root)
			for c := range cuts {
				err := folder.put(c.state)
				if err == nil {
					err = try(check, folder.dir, c.at)
				}
				mu.Lock()
				result.States++
				if err != nil {
					again := o
					again.Only = c.number
					result.Violations = append(result.Violations, Violation{again, c.at, c.loose.lost(r, c.choice), err})
					folder = newFolder(root) // check may have left it locked or mapped
				}
				mu.Unlock()
			}
		})
	}
	for c := range r.cuts(o) {
		if o.Only != 0 && o.Only != c.number {
			continue
		}
		cuts <- c
		mu.Lock()
		done := len(result.Violations) >= enough
		mu.Unlock()
		if done {
			break
		}
	}
	close(cuts)
	workers.Wait()
	slices.SortFunc(result.Violations, func(a, b Violation) int { return a.Options.Only - b.Options.Only })
	return result
}

func try(check func(string, int) error, dir string, at int) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return check(dir, at)
}

// cut is a disk to be judged.
type cut struct {
	number int // from 1
	at     int
	state  *state
	loose  loose
	choice choice
}

// cuts are the disks that power cuts could have left, each once. They depend on the record and the options only.
func (r Record) cuts(o Options) iter.Seq[cut] {
	return func(yield func(cut) bool) {
		type judged struct {
			hash  uint64
			marks int
		}
		seen := map[judged]bool{}
		number, m := 0, newModel()
		for at := range len(r.Ops) + 1 {
			if at > 0 {
				m.do(at-1, r.Ops[at-1])
			}
			rng := rand.New(rand.NewPCG(o.Seed, uint64(at)))
			marks := 0
			for _, mark := range r.Marks {
				if mark <= at {
					marks++
				}
			}
			share := float64(o.Total-number) / float64(len(r.Ops)+1-at)
			budget := min(o.States, int(share+rng.Float64())) // a share below one is a chance
			misses := 8 * o.States                            // where many choices make few disks
			l := m.loose()
			for c := range l.choices(rng, at-1, 2*budget) {
				if budget == 0 || misses == 0 {
					break
				}
				s := m.survive(c)
				if seen[judged{s.hash, marks}] {
					misses--
					continue
				}
				seen[judged{s.hash, marks}] = true
				number, budget = number+1, budget-1
				if !yield(cut{number, at, s, l, c}) {
					return
				}
			}
		}
	}
}

// loose is what may be lost.
type loose struct {
	ops     []int // that did it, in order
	pieces  []piece
	sectors map[piece]uint8 // that it wrote
	sizes   []int           // operations that sized a file
	names   []int           // operations that changed a name
}

func (m *model) loose() loose {
	l := loose{sectors: map[piece]uint8{}}
	for _, f := range m.files {
		for i, vs := range f.versions {
			for _, v := range vs {
				if !v.cut {
					l.sectors[piece{v.op, i}] = v.sectors
					l.ops = append(l.ops, v.op)
				}
			}
		}
		for _, z := range f.sizings {
			l.sizes = append(l.sizes, z.op)
		}
	}
	for _, r := range m.pending {
		l.names = append(l.names, r.op)
	}
	l.pieces = slices.SortedFunc(maps.Keys(l.sectors), func(a, b piece) int { return cmp.Or(a.op-b.op, a.page-b.page) })
	slices.Sort(l.sizes)
	l.ops = slices.Concat(l.ops, l.sizes, l.names)
	slices.Sort(l.ops)
	l.ops = slices.Compact(l.ops)
	return l
}

// keep is the choice that these make: sectors of each piece, and operations of which the size or the name survives.
func (l loose) keep(sectors func(piece) uint8, size, name func(op int) bool) choice {
	c := choice{make(map[piece]uint8, len(l.pieces)), make(map[int]bool, len(l.sizes)+len(l.names))}
	for _, p := range l.pieces {
		c.sectors[p] = sectors(p)
	}
	for _, op := range l.sizes {
		c.whole[op] = size(op)
	}
	for _, op := range l.names {
		c.whole[op] = name(op)
	}
	return c
}

// choices are those that Search promises, and after them some at random. newest is the last operation.
func (l loose) choices(rng *rand.Rand, newest, random int) iter.Seq[choice] {
	yes, no := func(int) bool { return true }, func(int) bool { return false }
	bytes, none := func(piece) uint8 { return 0xff }, func(piece) uint8 { return 0 }
	torn := func(mask, others uint8) func(piece) uint8 {
		return func(p piece) uint8 {
			if p.op == newest {
				return mask
			}
			return others
		}
	}
	// one is a choice about one operation, that it is lost or that it only survives, or about one piece of a write.
	one := func(i int) choice {
		if i >= 2*len(l.ops) {
			return l.keep(func(p piece) uint8 { return when(p != l.pieces[i-2*len(l.ops)]) }, yes, yes)
		}
		op := l.ops[i/2]
		switch other := func(o int) bool { return o != op }; {
		case i%2 == 0:
			return l.keep(func(p piece) uint8 { return when(p.op != op) }, other, other)
		case slices.Contains(l.names, op):
			return l.keep(none, no, func(o int) bool { return o <= op })
		}
		return l.keep(func(p piece) uint8 { return when(p.op == op) }, func(o int) bool { return o == op }, yes)
	}
	return func(yield func(choice) bool) {
		if !yield(l.keep(bytes, yes, yes)) || len(l.ops) == 0 || !yield(l.keep(none, no, no)) ||
			!yield(l.keep(none, no, yes)) || !yield(l.keep(none, yes, yes)) || !yield(l.keep(bytes, no, yes)) {
			return
		}
		if slices.ContainsFunc(l.pieces, func(p piece) bool { return p.op == newest }) {
			for _, mask := range []uint8{0x01, 0x0f, 0xf0, 0x7f, 0xaa, uint8(rng.Uint32())} {
				if !yield(l.keep(torn(mask, 0xff), yes, yes)) || !yield(l.keep(torn(mask, 0), yes, yes)) {
					return
				}
			}
		}
		for _, i := range rng.Perm(2*len(l.ops) + len(l.pieces)) {
			if !yield(one(i)) {
				return
			}
		}
		for range random {
			share := []float64{0.1, 0.5, 0.9}[rng.IntN(3)]
			some := func(int) bool { return rng.Float64() < share }
			last := newest - rng.IntN(newest-l.ops[0]+2) // of the names
			if !yield(l.keep(func(p piece) uint8 {
				if rng.IntN(8) == 0 {
					return uint8(rng.Uint32())
				}
				return when(some(p.op))
			}, some, func(op int) bool { return op <= last })) {
				return
			}
		}
	}
}

func when(b bool) uint8 {
	if b {
		return 0xff
	}
	return 0
}

// lost says what did not survive.
func (l loose) lost(r Record, c choice) (lines []string) {
	for _, op := range l.ops {
		var what []string
		if (slices.Contains(l.sizes, op) || slices.Contains(l.names, op)) && !c.whole[op] {
			what = append(what, map[bool]string{true: "the size", false: "the name"}[slices.Contains(l.sizes, op)])
		}
		for _, p := range l.pieces {
			if lost := l.sectors[p] &^ c.sectors[p]; p.op == op && lost != 0 {
				what = append(what, fmt.Sprintf("page %d, sectors %08b", p.page, bits.Reverse8(lost)))
			}
		}
		if len(what) > 0 {
			lines = append(lines, fmt.Sprintf("operation %d, %v: %s", op, r.Ops[op], strings.Join(what, "; ")))
		}
	}
	return lines
}
