package disktest

import (
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"
)

// disks lists the crash states of a cut after the last operation as text, such as "a:A.(BC)
// sub/". A file has its name and its sectors: one letter for a sector filled with the letter, "."
// for zeros, "(BC)" for a sector that begins with B and ends with C. A directory has its name.
func disks(ops ...Op) []string {
	r := Record{Ops: ops, Marks: []int{len(ops)}}
	found := map[string]bool{}
	for c := range r.cuts(Options{States: 1000, Total: 1 << 30, Seed: 1}) {
		if c.at == len(ops) {
			found[describe(c.state)] = true
		}
	}
	return slices.Sorted(maps.Keys(found))
}

func describe(s *state) string {
	var words []string
	for name, c := range s.files {
		var b strings.Builder
		for at := int64(0); at < c.size; at += sectorSize {
			page := c.pages[at/pageSize].bytes()
			in := page[at%pageSize:]
			first, last := in[0], in[min(sectorSize, c.size-at)-1]
			switch {
			case first != last:
				b.WriteString("(" + string(first) + string(last) + ")")
			case first == 0:
				b.WriteByte('.')
			default:
				b.WriteByte(first)
			}
		}
		words = append(words, name+":"+b.String())
	}
	for _, p := range s.dirs {
		words = append(words, p+"/")
	}
	slices.Sort(words)
	return strings.Join(words, " ")
}

// The functions below make operations in directory 1. The first letter of a file's name is the
// file's node. Offsets and sizes are in sectors.
func made(name string) Op { return Op{Kind: Create, Path: name, Node: id(name), Dir: 1} }
func id(name string) uint64 {
	return uint64(path.Base(name)[0])
}
func wrote(name string, at int64, text string) Op {
	var data []byte
	for _, c := range []byte(text) {
		data = append(data, slices.Repeat([]byte{c}, sectorSize)...)
	}
	return Op{Kind: Write, Path: name, Node: id(name), Offset: at * sectorSize, Data: data}
}
func sized(name string, size int64) Op {
	return Op{Kind: Truncate, Path: name, Node: id(name), Size: size * sectorSize}
}
func moved(from, to string, file uint64) Op {
	return Op{Kind: Rename, Path: from, To: to, Node: file, Dir: 1, ToDir: 1}
}
func synced(name string) Op   { return Op{Kind: Sync, Path: name, Node: id(name)} }
func failed(name string) Op   { return Op{Kind: FailedSync, Path: name, Node: id(name)} }
func syncedDir(dir uint64) Op { return Op{Kind: SyncDir, Node: dir} }
func began(name, text string) []Op { // a durable file
	return []Op{made(name), wrote(name, 0, text), synced(name), syncedDir(1)}
}

// movedBetweenDirs moves a file between two directories. Each directory gets a new name before the
// move, and the second directory one more after the move.
func movedBetweenDirs() []Op {
	return append(began("a", "A"),
		Op{Kind: Mkdir, Path: "sub", Node: 2, Dir: 1}, syncedDir(1),
		made("c"),
		Op{Kind: Create, Path: "sub/b", Node: id("b"), Dir: 2},
		Op{Kind: Rename, Path: "a", To: "sub/a", Node: id("a"), Dir: 1, ToDir: 2},
		Op{Kind: Create, Path: "sub/d", Node: id("d"), Dir: 2})
}

func TestWhatSurvives(t *testing.T) {
	zeros := strings.Repeat(".", 7)
	for _, tt := range []struct {
		name string
		ops  []Op
		want []string
	}{
		{"durable", began("a", "A"), []string{"a:A"}},
		{"fsync of a file leaves its name volatile", []Op{made("a"), wrote("a", 0, "A"), synced("a")},
			[]string{"", "a:A"}},
		{"fsync of the directory leaves bytes volatile", []Op{made("a"), wrote("a", 0, "A"), syncedDir(1)},
			[]string{"a:", "a:.", "a:A"}},
		{"a write within the size", append(began("a", "A"), wrote("a", 0, "B")), []string{"a:A", "a:B"}},
		{"a write is torn", append(began("a", "AAA"), wrote("a", 0, "BBB")),
			[]string{"a:AAA", "a:AAB", "a:ABA", "a:ABB", "a:BAA", "a:BAB", "a:BBA", "a:BBB"}},
		{"bytes and size are independent", append(began("a", "A"), wrote("a", 1, "B")),
			[]string{"a:A", "a:A.", "a:AB"}},
		{"each later size", append(began("a", "A"), sized("a", 2), sized("a", 3)), []string{"a:A", "a:A.", "a:A.."}},
		{"an allocation with a new size", append(began("a", "A"), Op{Kind: Allocate, Node: id("a"), Size: 1024}),
			[]string{"a:A", "a:A."}},
		{"an allocation without a new size",
			append(began("a", "A"), Op{Kind: Allocate, Node: id("a"), Size: 1024, KeepSize: true}),
			[]string{"a:A"}},
		{"pages in any order", append(began("a", "A"+zeros+"A"), wrote("a", 0, "B"), wrote("a", 8, "B")),
			[]string{"a:A" + zeros + "A", "a:A" + zeros + "B", "a:B" + zeros + "A", "a:B" + zeros + "B"}},
		{"equal pages in any order",
			[]Op{made("a"), sized("a", 9), synced("a"), syncedDir(1), wrote("a", 0, "B"), wrote("a", 8, "B")},
			[]string{"a:." + zeros + ".", "a:." + zeros + "B", "a:B" + zeros + ".", "a:B" + zeros + "B"}},
		{"a sector has its content after one of the writes", append(began("a", "A"), wrote("a", 0, "B"),
			Op{Kind: Write, Node: id("a"), Offset: 256, Data: slices.Repeat([]byte("C"), 256)}, wrote("a", 0, "D")),
			[]string{"a:(BC)", "a:A", "a:B", "a:D"}},
		{"shortened", append(began("a", "AA"), sized("a", 1)), []string{"a:A", "a:AA"}},
		{"shortened and longer again", append(began("a", "AA"), sized("a", 1), sized("a", 2)),
			[]string{"a:A", "a:A.", "a:AA"}},
		{"shortened and written to", append(began("a", "AA"), sized("a", 0), wrote("a", 0, "B")),
			[]string{"a:", "a:.", "a:AA", "a:B"}},
		{"two files",
			append(append(began("a", "A"), began("b", "A")...), wrote("a", 0, "B"), wrote("b", 0, "B"), synced("b")),
			[]string{"a:A b:B", "a:B b:B"}},
		{"names in order", []Op{made("a"), made("b"), made("c")}, []string{"", "a:", "a: b:", "a: b: c:"}},
		{"a rename over another file",
			append(append(began("a", "A"), began("b", "B")...), moved("b", "a", id("b"))),
			[]string{"a:A b:B", "a:B"}},
		{"a durable rename",
			append(append(began("a", "A"), began("b", "B")...), moved("b", "a", id("b")), syncedDir(1)),
			[]string{"a:B"}},
		{"unlinked", append(began("a", "A"), Op{Kind: Unlink, Path: "a", Node: id("a"), Dir: 1}), []string{"", "a:A"}},
		{"a file under its old name gets the bytes",
			append(began("a", "A"), moved("a", "b", id("a")), wrote("a", 0, "B")),
			[]string{"a:A", "a:B", "b:A", "b:B"}},
		{"a directory", []Op{{Kind: Mkdir, Path: "sub", Node: 2, Dir: 1}}, []string{"", "sub/"}},
		{"a file in a lost directory", []Op{{Kind: Mkdir, Path: "sub", Node: 2, Dir: 1},
			{Kind: Create, Path: "sub/b", Node: id("b"), Dir: 2}, syncedDir(2)}, []string{"", "sub/ sub/b:"}},
		{"moved between directories", movedBetweenDirs(), []string{
			"a:A c: sub/", "a:A c: sub/ sub/b:", "a:A sub/", "a:A sub/ sub/b:",
			"c: sub/ sub/a:A sub/b:", "c: sub/ sub/a:A sub/b: sub/d:"}},
		{"moved from a durable directory", append(movedBetweenDirs(), syncedDir(1)),
			[]string{"c: sub/ sub/a:A sub/b:", "c: sub/ sub/a:A sub/b: sub/d:"}},
		{"moved to a durable directory", append(movedBetweenDirs(), syncedDir(2)),
			[]string{"c: sub/ sub/a:A sub/b: sub/d:"}},
		{"fsync failed", append(began("a", "A"), wrote("a", 0, "B"), failed("a")), []string{"a:A", "a:B"}},
		{"fsync failed, and the next leaves the page volatile",
			append(began("a", "A"), wrote("a", 0, "B"), wrote("a", 8, "B"), failed("a"),
				wrote("a", 8, "C"), synced("a")),
			[]string{"a:A" + zeros + "C", "a:B" + zeros + "C"}},
		{"fsync failed, and the next keeps the size",
			append(began("a", "A"), wrote("a", 0, "B"), sized("a", 0), sized("a", 1), failed("a"), synced("a")),
			[]string{"a:."}},
		{"fsync failed, and the page is written again",
			append(began("a", "A"), wrote("a", 0, "B"), failed("a"), wrote("a", 0, "B"), synced("a")),
			[]string{"a:B"}},
	} {
		if got := disks(tt.ops...); !slices.Equal(got, tt.want) {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

// TestChoices checks that the choices listed at Search come without any random choice.
func TestChoices(t *testing.T) {
	m := newModel()
	ops := append(began("a", "A"), wrote("a", 0, "BBBBBBBBBBBB"), wrote("a", 12, "CC"),
		made("b"), sized("b", 1), wrote("a", 24, "DDDD"))
	for i, op := range ops {
		m.do(i, op)
	}
	var found []string
	for c := range m.volatile().choices(rand.New(rand.NewPCG(1, 1)), len(ops)-1, 0) {
		found = append(found, describe(m.survive(c)))
	}
	b, c := strings.Repeat("B", 12), "CC.........."
	if want := []string{ // the first five, in this order
		"a:" + b + c + "DDDD b:.",
		"a:A",
		"a:A b:",
		"a:A" + strings.Repeat(".", 27) + " b:.",
		"a:B b:",
	}; !slices.Equal(found[:5], want) {
		t.Errorf("first %q, want %q", found[:5], want)
	}
	for what, want := range map[string]string{
		"all but the last":             "a:" + b + c + ".... b:.",
		"all but the second":           "a:" + b + "............DDDD b:.",
		"all but the first":            "a:A..........." + c + "DDDD b:.",
		"all but the name":             "a:" + b + c + "DDDD",
		"all but the size":             "a:" + b + c + "DDDD b:",
		"the first":                    "a:BBBBBBBBBBBB b:",
		"the second":                   "a:A...........CC b:",
		"the last":                     "a:A.......................DDDD b:",
		"all but a page of the first":  "a:A.......BBBB" + c + "DDDD b:.",
		"all, the last torn":           "a:" + b + c + "D... b:.",
		"nothing, and of the last one": "a:A.......................D... b:.",
	} {
		if !slices.Contains(found, want) {
			t.Errorf("%s: no %q", what, want)
		}
	}
}

// TestBounds checks the number of crash states against the options: each comes once, and early and
// late cuts have some.
func TestBounds(t *testing.T) {
	ops := began("a", "A")
	for i := range 100 {
		ops = append(ops, wrote("a", 0, string(rune('B'+i%20))+"BCDEFGHABCDEFGH"))
	}
	for _, o := range []Options{{States: 5, Total: 1 << 20}, {States: 100, Total: 300}, {States: 3, Total: 50}} {
		o.Seed = 1
		states, early, last, at, seen := 0, 0, 0, map[int]int{}, map[uint64]bool{}
		for c := range (Record{Ops: ops}).cuts(o) {
			states++
			at[c.at]++
			last = c.at
			if c.at < len(ops)/2 {
				early++
			}
			if seen[c.state.hash] {
				t.Errorf("%+v: state %d was there before", o, states)
			}
			seen[c.state.hash] = true
			if c.number != states {
				t.Errorf("%+v: state %d has the number %d", o, states, c.number)
			}
		}
		most := slices.Max(slices.Collect(maps.Values(at)))
		if states > o.Total || most > o.States || early == 0 || last < len(ops)-20 {
			t.Errorf("%+v: %d states, %d of the first half, at most %d of a cut, the last of cut %d",
				o, states, early, most, last)
		}
	}
}
