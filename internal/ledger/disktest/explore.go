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

// Options bound an exploration. The zero value has good defaults.
type Options struct {
	// States is the most crash states of one cut. 0 means 32.
	States int
	// Total is the most crash states of all cuts. 0 means 10,000. All cuts share a smaller Total
	// evenly.
	Total int
	// Seed is the seed of the random choices. 0 means a new seed.
	Seed uint64
	// Only is the number of a single crash state to check, from a Violation. 0 means all.
	Only int
	// Workers is the number of concurrent calls of check. 0 means GOMAXPROCS.
	Workers int
}

// Result sums up an exploration.
type Result struct {
	Cuts       int // points of time at which power was cut
	States     int // crash states checked; any two differ on disk or in the marks before the cut
	Violations []Violation
}

// Violation is a crash state with an error from check.
type Violation struct {
	Options Options // Search with Options and the same record checks the crash state again
	At      int     // operations before the cut
	Lost    []string
	Err     error
}

func (v Violation) String() string {
	lost := v.Lost
	if more := len(lost) - 20; more > 0 {
		lost = append(slices.Clip(lost[:20]), fmt.Sprintf("and %d more", more))
	}
	return fmt.Sprintf("%v\n\ta cut after %d operations (%#v) lost:\n\t%s",
		v.Err, v.At, v.Options, strings.Join(lost, "\n\t"))
}

// maxViolations is the number of violations that ends an exploration.
const maxViolations = 3

// Explore calls Search and fails the test for each violation.
func Explore(t testing.TB, r Record, o Options, check func(dir string, at int) error) Result {
	t.Helper()
	result := Search(t, r, o, check)
	for _, v := range result.Violations {
		t.Errorf("disktest: %v", v)
	}
	return result
}

// Search cuts power after each number of operations and calls check on possible crash states. The
// crash states of a cut are: the disk with all operations; with durable changes only; with names
// only, with names and sizes only, with names and bytes only; with a torn last write; with any
// one operation lost; with any one operation alone; with any one page of a larger write lost; and
// random ones up to the bounds in Options. Search skips a disk checked before, unless a mark lies
// between the two cuts.
//
// The directory dir belongs to check until check returns, and may be changed. check must close
// its files. at is the number of operations before the cut: results released at marks up to at
// must be there. A panic or a memory fault counts as an error of check, but not in a goroutine
// started by check. check must not call t.FailNow. The directories are in memory, if /dev/shm
// exists.
func Search(t testing.TB, r Record, o Options, check func(dir string, at int) error) Result {
	t.Helper()
	o.States = cmp.Or(o.States, 32)
	o.Total = cmp.Or(o.Total, 10_000)
	o.Seed = cmp.Or(o.Seed, uint64(rand.Uint32()))
	o.Workers = cmp.Or(o.Workers, runtime.GOMAXPROCS(0))
	t.Logf("disktest: %d operations, seed %d", len(r.Ops), o.Seed)
	root := scratch(t)

	result := Result{Cuts: len(r.Ops) + 1}
	var mu sync.Mutex // guards result
	cuts := make(chan cut)
	var workers sync.WaitGroup
	for range o.Workers {
		workers.Go(func() {
			debug.SetPanicOnFault(true) // check may read a mapped file beyond the end
			scratch := newScratchDir(root)
			for c := range cuts {
				err := scratch.put(c.state)
				if err == nil {
					err = try(check, scratch.dir, c.at)
				}
				mu.Lock()
				result.States++
				if err != nil {
					again := o
					again.Only = c.number
					lost := c.volatile.lost(r, c.choice)
					result.Violations = append(result.Violations, Violation{again, c.at, lost, err})
					scratch = newScratchDir(root) // check may have left files locked or mapped
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
		done := len(result.Violations) >= maxViolations
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

// cut is a power cut and one crash state.
type cut struct {
	number   int // of the crash state, from 1
	at       int // operations before the cut
	state    *state
	volatile volatile
	choice   choice
}

// cuts yields the crash states, each once. The sequence depends on the record and the options only.
func (r Record) cuts(o Options) iter.Seq[cut] {
	return func(yield func(cut) bool) {
		type key struct {
			hash  uint64
			marks int
		}
		seen := map[key]bool{}
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
			// The random number rounds the share up or down: 0.3 becomes 1 in 30 % of the cuts.
			budget := min(o.States, int(share+rng.Float64()))
			misses := 8 * o.States // bounds the choices that yield no new disk
			l := m.volatile()
			for c := range l.choices(rng, at-1, 2*budget) {
				if budget == 0 || misses == 0 {
					break
				}
				s := m.survive(c)
				if seen[key{s.hash, marks}] {
					misses--
					continue
				}
				seen[key{s.hash, marks}] = true
				number, budget = number+1, budget-1
				if !yield(cut{number, at, s, l, c}) {
					return
				}
			}
		}
	}
}

// volatile is the set of changes that a cut may lose. Operations are numbers of the record,
// ascending.
type volatile struct {
	ops        []int // all operations with a volatile change
	pageWrites []pageWrite
	sectors    map[pageWrite]uint8 // bit i is set if the write covers sector i of the page
	sizes      []int               // operations that changed a file's size
	names      []int               // operations that changed a name
}

func (m *model) volatile() volatile {
	l := volatile{sectors: map[pageWrite]uint8{}}
	for _, f := range m.files {
		for i, vs := range f.versions {
			for _, v := range vs {
				if !v.truncated {
					l.sectors[pageWrite{v.op, i}] = v.sectors
					l.ops = append(l.ops, v.op)
				}
			}
		}
		for _, z := range f.sizeChanges {
			l.sizes = append(l.sizes, z.op)
		}
	}
	for _, r := range m.pending {
		l.names = append(l.names, r.op)
	}
	l.pageWrites = slices.SortedFunc(maps.Keys(l.sectors), func(a, b pageWrite) int {
		return cmp.Or(a.op-b.op, a.page-b.page)
	})
	slices.Sort(l.sizes)
	l.ops = slices.Concat(l.ops, l.sizes, l.names)
	slices.Sort(l.ops)
	l.ops = slices.Compact(l.ops)
	return l
}

// keep returns a choice. sectors selects the surviving sectors of a page write; size and name
// select the operations whose change of a size or a name survives.
func (l volatile) keep(sectors func(pageWrite) uint8, size, name func(op int) bool) choice {
	c := choice{make(map[pageWrite]uint8, len(l.pageWrites)), make(map[int]bool, len(l.sizes)+len(l.names))}
	for _, p := range l.pageWrites {
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

// choices yields the choices listed at Search, then a number of random choices. newest is the last
// operation before the cut.
func (l volatile) choices(rng *rand.Rand, newest, random int) iter.Seq[choice] {
	yes, no := func(int) bool { return true }, func(int) bool { return false }
	bytes, none := func(pageWrite) uint8 { return 0xff }, func(pageWrite) uint8 { return 0 }
	torn := func(mask, others uint8) func(pageWrite) uint8 {
		return func(p pageWrite) uint8 {
			if p.op == newest {
				return mask
			}
			return others
		}
	}
	// one returns choice i: for an operation, to lose only the operation (even i) or to keep only
	// the operation (odd i); after all operations, to lose only one page of a write.
	one := func(i int) choice {
		if i >= 2*len(l.ops) {
			return l.keep(func(p pageWrite) uint8 { return allOrNone(p != l.pageWrites[i-2*len(l.ops)]) }, yes, yes)
		}
		op := l.ops[i/2]
		switch other := func(o int) bool { return o != op }; {
		case i%2 == 0:
			return l.keep(func(p pageWrite) uint8 { return allOrNone(p.op != op) }, other, other)
		case slices.Contains(l.names, op):
			return l.keep(none, no, func(o int) bool { return o <= op })
		}
		only := func(o int) bool { return o == op }
		return l.keep(func(p pageWrite) uint8 { return allOrNone(only(p.op)) }, only, yes)
	}
	return func(yield func(choice) bool) {
		if !yield(l.keep(bytes, yes, yes)) || len(l.ops) == 0 || !yield(l.keep(none, no, no)) ||
			!yield(l.keep(none, no, yes)) || !yield(l.keep(none, yes, yes)) || !yield(l.keep(bytes, no, yes)) {
			return
		}
		if slices.ContainsFunc(l.pageWrites, func(p pageWrite) bool { return p.op == newest }) {
			for _, mask := range []uint8{0x01, 0x0f, 0xf0, 0x7f, 0xaa, uint8(rng.Uint32())} {
				if !yield(l.keep(torn(mask, 0xff), yes, yes)) || !yield(l.keep(torn(mask, 0), yes, yes)) {
					return
				}
			}
		}
		for _, i := range rng.Perm(2*len(l.ops) + len(l.pageWrites)) {
			if !yield(one(i)) {
				return
			}
		}
		for range random {
			share := []float64{0.1, 0.5, 0.9}[rng.IntN(3)]
			some := func(int) bool { return rng.Float64() < share }
			last := newest - rng.IntN(newest-l.ops[0]+2) // the last operation whose name survives
			if !yield(l.keep(func(p pageWrite) uint8 {
				if rng.IntN(8) == 0 {
					return uint8(rng.Uint32())
				}
				return allOrNone(some(p.op))
			}, some, func(op int) bool { return op <= last })) {
				return
			}
		}
	}
}

// allOrNone returns the mask of all 8 sectors of a page, or of none.
func allOrNone(all bool) uint8 {
	if all {
		return 0xff
	}
	return 0
}

// lost describes the changes that did not survive.
func (l volatile) lost(r Record, c choice) (lines []string) {
	for _, op := range l.ops {
		var what []string
		switch {
		case c.whole[op]:
		case slices.Contains(l.sizes, op):
			what = append(what, "the size")
		case slices.Contains(l.names, op):
			what = append(what, "the name")
		}
		for _, p := range l.pageWrites {
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
