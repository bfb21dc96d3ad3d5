package ijson

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"hash/maphash"
	"slices"
	"strconv"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
)

// MaxFields bounds the fields of an object. The largest object of the protocol is the metadata of a
// paykit-subscription-v2, with at most 64.
const MaxFields = 64

// member is a field of the outermost object.
type member struct {
	name  []byte // unescaped
	value jsontext.Value
}

// scan is the one pass over a document before its decoding. The scan finds what the decoder does
// not refuse (depth, noncharacters, too many fields) or refuses at a higher cost (duplicate names),
// and the fields of the outermost object. The scan does not check the grammar: on a document that
// is no JSON the result means nothing, and the decoder refuses the document. So a scan comes
// before the decoder, and never in its place.
//
// Time grows with the length of the document. Memory is bounded by MaxDepth objects of MaxFields
// names, 16 bytes each.
type scan struct {
	b       []byte
	members []member
	names   []name // of the open objects, the innermost object's last
	open    [MaxDepth]level
	depth   int
}

// level is an open array or object.
type level struct {
	object bool
	first  int    // index in scan.names of the object's first name
	index  int    // of the array's present element
	name   []byte // of the object's present field
}

// name is the name of a field: the hash of its unescaped text, and its place in the document,
// quotes included. Names have no pointers, so that sorting is quick.
type name struct {
	hash       uint64
	start, end uint32
}

// seed makes the hashes of names unpredictable to the sender of a document.
var seed = maphash.MakeSeed()

// buffers has slices for scan.names.
var buffers = sync.Pool{New: func() any { return new([]name) }}

// fields scans b and returns the fields of the outermost object.
func fields(b []byte) ([]member, error) {
	buffer := buffers.Get().(*[]name)
	s := scan{b: b, members: make([]member, 0, 8), names: (*buffer)[:0]}
	defer func() {
		*buffer = s.names
		buffers.Put(buffer)
	}()
	if start := space(b, 0); start == len(b) || b[start] != '{' {
		return nil, errors.New("not a JSON object")
	}
	if err := s.run(); err != nil {
		return nil, err
	}
	return s.members, nil
}

// Elements returns the elements of an array in an Object. The error is ErrTooMany for more than
// most elements.
func Elements(array jsontext.Value, most int) (all []jsontext.Value, err error) {
	s := scan{b: array}
	start := space(array, 0)
	if start == len(array) || array[start] != '[' {
		return nil, errors.New("must be an array")
	}
	start++
	depth := 0
	for i := start; i < len(array); i++ {
		switch array[i] {
		case '"':
			end, _, err := s.text(i)
			if err != nil {
				return nil, err
			}
			i = end - 1
		case '{', '[':
			depth++
		case '}', ']', ',':
			if array[i] != ',' {
				depth--
			}
			if depth > 0 || depth == 0 && array[i] != ',' {
				continue
			}
			if one := bytes.Trim(array[start:i], " \t\r\n"); len(one) > 0 {
				if len(all) == most {
					return nil, ErrTooMany
				}
				all = append(all, one)
			}
			start = i + 1
		}
	}
	return all, nil
}

// ErrTooMany refuses an array with too many elements.
var ErrTooMany = errors.New("too many elements")

// space returns the index of the first byte from i on that is no white space.
func space(b []byte, i int) int {
	for i < len(b) && (b[i] == ' ' || b[i] == '\t' || b[i] == '\n' || b[i] == '\r') {
		i++
	}
	return i
}

func (s *scan) run() error {
	began := -1 // of the value of an outermost field
	for i := 0; i < len(s.b); i++ {
		switch c := s.b[i]; c {
		case '"':
			end, escaped, err := s.text(i)
			if err != nil {
				return err
			}
			if colon := space(s.b, end); s.depth > 0 && s.open[s.depth-1].object &&
				colon < len(s.b) && s.b[colon] == ':' {
				if err := s.field(i, end, escaped); err != nil {
					return err
				}
				if end = colon + 1; s.depth == 1 {
					began = end
				}
			}
			i = end - 1
		case '{', '[':
			if s.depth == MaxDepth {
				return fmt.Errorf("arrays and objects nest deeper than %d", MaxDepth)
			}
			s.open[s.depth] = level{object: c == '{', first: len(s.names)}
			s.depth++
		case '}', ']', ',':
			if s.depth == 0 {
				return nil // no JSON
			}
			if s.depth == 1 && began >= 0 {
				s.members[len(s.members)-1].value = bytes.Trim(s.b[began:i], " \t\r\n")
				began = -1
			}
			if c == ',' {
				s.open[s.depth-1].index++
				continue
			}
			if err := s.duplicate(); err != nil {
				return err
			}
			s.depth--
		}
	}
	return nil
}

// text returns the end of the string that begins at start, and whether the string has escapes.
func (s *scan) text(start int) (end int, escaped bool, err error) {
	for i := start + 1; i < len(s.b); i++ {
		r := rune(0)
		switch c := s.b[i]; {
		case c == '"':
			return i + 1, escaped, nil
		case c == '\\':
			escaped = true
			if i++; i < len(s.b) && s.b[i] == 'u' {
				r = s.escape(i + 1)
			}
		case c >= 0xef: // no noncharacter has a lower first byte
			var size int
			r, size = utf8.DecodeRune(s.b[i:])
			i += size - 1
		}
		if noncharacter(r) {
			return 0, false, errors.New("text contains a Unicode noncharacter (RFC 7493)")
		}
	}
	return len(s.b), escaped, nil // no JSON
}

// escape returns the character of the escape \uXXXX whose digits begin at i, or of a pair of
// surrogates that begins there, and 0 for neither.
func (s *scan) escape(i int) rune {
	unit := func(i int) rune {
		if i+4 > len(s.b) {
			return 0
		}
		v, _ := strconv.ParseUint(string(s.b[i:i+4]), 16, 16)
		return rune(v)
	}
	r := unit(i)
	if r < 0xd800 || r > 0xdbff || i+6 > len(s.b) || s.b[i+4] != '\\' || s.b[i+5] != 'u' {
		return r
	}
	low := unit(i + 6)
	if low < 0xdc00 || low > 0xdfff {
		return 0
	}
	return 0x10000 + (r-0xd800)<<10 + (low - 0xdc00)
}

// field notes a name of the innermost open object.
func (s *scan) field(start, end int, escaped bool) error {
	text := s.b[start+1 : end-1]
	if escaped {
		text = s.unescaped(uint32(start), uint32(end))
	}
	if len(s.names)-s.open[s.depth-1].first == MaxFields {
		return fmt.Errorf("an object has more than %d fields", MaxFields)
	}
	if s.depth == 1 {
		s.members = append(s.members, member{name: text})
	}
	s.names = append(s.names, name{maphash.Bytes(seed, text), uint32(start), uint32(end)})
	s.open[s.depth-1].name = text
	return nil
}

func (s *scan) unescaped(start, end uint32) []byte {
	text, _ := jsontext.AppendUnquote(nil, s.b[start:end])
	return text
}

// duplicate closes the innermost open array or object, and refuses an object with two equal names.
func (s *scan) duplicate() error {
	first := s.open[s.depth-1].first
	names := s.names[first:]
	s.names = s.names[:first]
	slices.SortFunc(names, func(x, y name) int { return cmp.Compare(x.hash, y.hash) })
	for i, x := range names {
		for _, y := range names[i+1:] {
			if x.hash != y.hash {
				break
			}
			if text := s.unescaped(x.start, x.end); bytes.Equal(text, s.unescaped(y.start, y.end)) {
				return fmt.Errorf("duplicate field %q", s.place(text))
			}
		}
	}
	return nil
}

// place writes the path to a field of the innermost open object: see field in ijson.go.
func (s *scan) place(last []byte) string {
	var path []string
	for _, l := range s.open[:s.depth-1] {
		if l.object {
			path = append(path, string(l.name))
		} else {
			path = append(path, strconv.Itoa(l.index))
		}
	}
	return Clip(strings.Join(append(path, string(last)), "."))
}
