package admin

import (
	"bytes"
	"cmp"
	"encoding/json"
	"io"
	"reflect"
	"slices"
	"strings"

	"github.com/danielgtaylor/huma/v2"
)

// The limits of a page of a listing. A page ends before the document that would exceed maxPage; a
// larger document is a page by itself.
const (
	maxPage    = 1 << 20 // bytes
	maxEntries = 1000    // documents
)

// page is a page of a listing: the JSON array of its documents. Each document is encoded when it is
// added, and the bytes are sent as they are. The memory of an answer is therefore one page, however
// long the listing is. An error after the first document still gives a problem document, which an
// answer that has begun could not.
type page[D any] struct {
	b     bytes.Buffer
	n     int
	limit int // documents
}

// add adds a document, or returns false if the document belongs to the next page.
func (p *page[D]) add(doc D) bool {
	if p.n >= p.limit || p.n > 0 && p.b.Len() >= maxPage { // no other document fits in any case
		return false
	}
	before := p.b.Len()
	p.b.WriteByte("[,"[min(p.n, 1)])
	e := json.NewEncoder(&p.b)
	e.SetEscapeHTML(false)
	if err := e.Encode(doc); err != nil {
		panic("admin: a document that is no JSON: " + err.Error()) // text and numbers always have an encoding
	}
	p.b.Truncate(p.b.Len() - 1) // the line feed of Encode
	if p.n > 0 && p.b.Len() > maxPage {
		p.b.Truncate(before)
		return false
	}
	p.n++
	return true
}

func (p *page[D]) writeTo(w io.Writer) error {
	if p.n == 0 {
		p.b.WriteByte('[')
	}
	p.b.WriteByte(']')
	_, err := w.Write(p.b.Bytes())
	return err
}

// Schema documents the page as an array.
func (*page[D]) Schema(r huma.Registry) *huma.Schema {
	return huma.SchemaFromType(r, reflect.TypeFor[[]D]())
}

// marshal writes the body of an answer.
func marshal(w io.Writer, v any) error {
	if p, is := v.(interface{ writeTo(io.Writer) error }); is {
		return p.writeTo(w)
	}
	return huma.DefaultJSONFormat.Marshal(w, v)
}

// pageInput selects a page of a listing that is in memory.
type pageInput struct {
	After string `query:"after" maxLength:"200" doc:"the header Countersign-Next of the page before"`
	Limit int    `query:"limit" minimum:"1" maximum:"1000" default:"1000"`
}

// findInput selects a page of the entries of a listing by their names.
type findInput struct {
	After string `query:"after" maxLength:"200" doc:"the header Countersign-Next of the page before"`
	Limit int    `query:"limit" minimum:"1" maximum:"1000" default:"1000"`
	Find  string `query:"find" maxLength:"200" doc:"only entries with this text in their names"`
}

func (in *findInput) page() *pageInput { return &pageInput{in.After, in.Limit} }

// finds reports whether an entry is asked for.
func (in *findInput) finds(name string) bool { return strings.Contains(name, in.Find) }

// listed is a page of a listing with the cursor of the next page. All listings have cursors of one
// form: a text that names the last entry of the page, whatever the listing's order is, and that the
// caller returns as it is.
type listed[D any] struct {
	Next string `header:"Countersign-Next" doc:"the parameter after for the next page; absent on the last page"`
	Body *page[D]
	last string // cursor of the last document
}

func newListed[D any](limit int) *listed[D] { return &listed[D]{Body: &page[D]{limit: limit}} }

// add adds a document with its cursor, or returns false if the document belongs to the next page.
func (l *listed[D]) add(doc D, cursor string) bool {
	if !l.Body.add(doc) {
		l.Next = l.last
		return false
	}
	l.last = cursor
	return true
}

// paged returns a page of a listing. key gives each entry a text in the order of the listing. A
// page begins with the first entry behind the key After, so that entries that come or go between
// two pages make no other entry appear twice or not at all.
func paged[T, D any](in *pageInput, all []T, key func(T) string, doc func(T) D) *listed[D] {
	out := newListed[D](cmp.Or(in.Limit, maxEntries))
	slices.SortFunc(all, func(x, y T) int { return strings.Compare(key(x), key(y)) })
	for _, each := range all {
		if at := key(each); (in.After == "" || at > in.After) && !out.add(doc(each), at) {
			break
		}
	}
	return out
}
