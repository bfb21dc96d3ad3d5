package countersign_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// public lists the packages that other programs import, with the reason for each. The exported API
// of a public package names public packages and the standard library only. Otherwise a program
// would need a type of an internal package, or would break when a third-party module changes.
var public = map[string]string{
	"client":            "the SDK of peers",
	"client/clienttest": "an appliance for tests of programs that use the SDK",
	"wire":              "the documents of a connection",
	"transcript":        "the documents that get signed",
	"audit":             "verification of the audit log by anyone",
	"approval":          "verification of approvals by anyone",
	"admin/api":         "the client and the documents of the admin API",
	"noise":             "client.Config.Identity and clienttest.Server name a peer's Noise keys with its types",
}

// TestPublicAPI reads the declarations of the public packages in all files but tests.
func TestPublicAPI(t *testing.T) {
	module := modulePath(t)
	for name := range public {
		var files []*ast.File
		set := token.NewFileSet()
		paths, err := filepath.Glob(filepath.Join(name, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			if strings.HasSuffix(path, "_test.go") {
				continue
			}
			file, err := parser.ParseFile(set, path, nil, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			files = append(files, file)
		}
		if len(files) == 0 {
			t.Errorf("%s: the folder has no Go files: take it out of the table", name)
		}
		for _, n := range apiNames(files) {
			ours, isOurs := strings.CutPrefix(n.path, module+"/")
			first, _, _ := strings.Cut(n.path, "/")
			standard := !isOurs && n.path != "" && !strings.Contains(first, ".")
			if !standard && public[ours] == "" {
				t.Errorf("%s: %s names %s of package %q", set.Position(n.at), n.declaration, n.text, n.path)
			}
		}
	}
}

// apiName is a qualified identifier in the exported API of a package.
type apiName struct {
	at          token.Pos
	declaration string // "Config.Identity", "Dial"
	text        string // "noise.Identity"
	path        string // import path; "" where the file imports no package of that name
}

// apiReader collects the qualified identifiers of a package's exported API. An unexported type
// belongs to the API where an exported declaration names the type: other packages reach the
// exported fields and methods of such a type.
type apiReader struct {
	types   map[string]declared // of the package
	methods map[string][]declared
	read    map[string]bool // types that readType has been called for
	names   []apiName
}

// declared is a declaration with the imports of its file.
type declared struct {
	node    ast.Node // *ast.TypeSpec or *ast.FuncDecl
	imports map[string]string
}

func apiNames(files []*ast.File) []apiName {
	r := apiReader{types: map[string]declared{}, methods: map[string][]declared{}, read: map[string]bool{}}
	for _, file := range files {
		imports := importNames(file)
		for _, d := range file.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Recv != nil && d.Name.IsExported() {
					on := receiver(d)
					r.methods[on] = append(r.methods[on], declared{d, imports})
				}
			case *ast.GenDecl:
				for _, spec := range d.Specs {
					if s, is := spec.(*ast.TypeSpec); is {
						r.types[s.Name.Name] = declared{s, imports}
					}
				}
			}
		}
	}
	for _, file := range files {
		imports := importNames(file)
		for _, d := range file.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Recv == nil && d.Name.IsExported() {
					r.walk(d.Name.Name, d.Type, imports)
				}
			case *ast.GenDecl:
				for _, spec := range d.Specs {
					switch s := spec.(type) {
					case *ast.TypeSpec:
						if s.Name.IsExported() {
							r.readType(s.Name.Name)
						}
					case *ast.ValueSpec:
						r.readValues(s, imports)
					}
				}
			}
		}
	}
	return r.names
}

// importNames maps package names to import paths for a file. Without a name in the import, the
// package name is taken from the path: "json" for ".../json", "huma" for ".../huma/v2". Where the
// guess is wrong, an identifier stays without a path, and the test reports the identifier.
func importNames(file *ast.File) map[string]string {
	names := map[string]string{}
	for _, spec := range file.Imports {
		path, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			panic(err) // the parser has accepted it
		}
		elements := strings.Split(regexp.MustCompile(`/v\d+$`).ReplaceAllString(path, ""), "/")
		name := elements[len(elements)-1]
		if spec.Name != nil {
			name = spec.Name.Name
		}
		names[name] = path
	}
	return names
}

// receiver returns the name of a method's type: T for (t *T[P]).
func receiver(d *ast.FuncDecl) string {
	var name string
	ast.Inspect(d.Recv.List[0].Type, func(n ast.Node) bool {
		if id, is := n.(*ast.Ident); is && name == "" {
			name = id.Name
		}
		return true
	})
	return name
}

// readType collects the identifiers in a type of the package and in its exported methods. A second
// call for the same type does nothing.
func (r *apiReader) readType(name string) {
	d, ours := r.types[name]
	if !ours || r.read[name] {
		return
	}
	r.read[name] = true
	spec := d.node.(*ast.TypeSpec)
	if spec.TypeParams != nil {
		r.walk(name, spec.TypeParams, d.imports)
	}
	r.walk(name, spec.Type, d.imports)
	for _, m := range r.methods[name] {
		f := m.node.(*ast.FuncDecl)
		r.walk(name+"."+f.Name.Name, f.Type, m.imports)
	}
}

// readValues collects the identifiers in the types of exported variables and constants. A
// declaration without a type is judged by the head of its value.
func (r *apiReader) readValues(s *ast.ValueSpec, imports map[string]string) {
	for i, name := range s.Names {
		switch {
		case !name.IsExported():
		case s.Type != nil:
			r.walk(name.Name, s.Type, imports)
		case i < len(s.Values):
			r.walk(name.Name, head(s.Values[i]), imports)
		case len(s.Values) == 1: // a call with several results
			r.walk(name.Name, head(s.Values[0]), imports)
		}
	}
}

// head returns the part of an expression that determines its type: T for &T{...} and T(x), f for
// f(x).
func head(e ast.Expr) ast.Node {
	switch e := e.(type) {
	case *ast.ParenExpr:
		return head(e.X)
	case *ast.UnaryExpr:
		return head(e.X)
	case *ast.CompositeLit:
		return e.Type
	case *ast.FuncLit:
		return e.Type
	case *ast.CallExpr:
		return head(e.Fun)
	}
	return e
}

// walk collects the qualified identifiers of a type, except in unexported fields. The package's own
// types in it are read, too.
func (r *apiReader) walk(declaration string, node ast.Node, imports map[string]string) {
	ast.Inspect(node, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.StructType:
			for _, f := range n.Fields.List {
				r.walkField(declaration, f, imports)
			}
			return false
		case *ast.InterfaceType:
			for _, f := range n.Methods.List {
				r.walkField(declaration, f, imports)
			}
			return false
		case *ast.Field: // a parameter, result or type parameter: only the type counts, not the name
			r.walk(declaration, n.Type, imports)
			return false
		case *ast.SelectorExpr:
			if id, is := n.X.(*ast.Ident); is {
				text := id.Name + "." + n.Sel.Name
				r.names = append(r.names, apiName{n.Pos(), declaration, text, imports[id.Name]})
				return false
			}
		case *ast.Ident:
			r.readType(n.Name)
		}
		return true
	})
}

// walkField walks a field of a struct, or a method or an element of an interface.
func (r *apiReader) walkField(declaration string, f *ast.Field, imports map[string]string) {
	if len(f.Names) == 0 { // an embedded type: its fields and methods are promoted
		r.walk(declaration, f.Type, imports)
	}
	for _, name := range f.Names {
		if name.IsExported() {
			r.walk(declaration+"."+name.Name, f.Type, imports)
		}
	}
}

// TestPublicAPIFindsFaults reads a source text with a fault of each kind. A comment on each faulty
// line lists the declaration and the import path. Lines without a comment are outside the API.
func TestPublicAPIFindsFaults(t *testing.T) {
	const text = `package p

import (
	"bad/one"
	"bad/two/v2"
	named "bad/go-three"
	"bad/go-four"
)

func Parameter(x one.T)                     {} // Parameter bad/one
func Several(x, y map[string][]*one.T)      {} // Several bad/one
func Result() (chan<- two.T, error)         {} // Result bad/two/v2
func Callback(f func(named.T) bool)         {} // Callback bad/go-three
func Generic[P one.T](p P)                  {} // Generic bad/one
func Unresolved(x four.T)                   {} // Unresolved
func Body()                                 { one.F() }
func hidden(x one.T)                        {}

type Struct struct {
	Field, Other one.T // Struct.Field bad/one, Struct.Other bad/one
	hidden one.T
	Nested struct {
		Field two.T // Struct.Nested.Field bad/two/v2
		hidden two.T
	}
	named.Embedded // Struct bad/go-three
	inner
}

func (s *Struct) Method(x one.T) {} // Struct.Method bad/one
func (s *Struct) method(x one.T) {}

type inner struct {
	Promoted one.T // inner.Promoted bad/one
	hidden one.T
}

func (inner) Promote() two.T {} // inner.Promote bad/two/v2

type alone struct{ Field one.T }

func (alone) Method(x one.T) {}

type Interface interface {
	Method(x one.T) // Interface.Method bad/one
	hidden(x one.T)
	two.I // Interface bad/two/v2
}

type Defined one.T // Defined bad/one
type Alias = one.T // Alias bad/one
type Array [one.Size]byte // Array bad/one
type List[P one.I] struct{} // List bad/one

func (l *List[P]) Method() named.T {} // List.Method bad/go-three

var Typed one.T // Typed bad/one
var Called = one.New() // Called bad/one
var Literal = &named.T{Field: two.F()} // Literal bad/go-three
var Function = func(x one.T) {} // Function bad/one
var First, Second = one.Pair() // First bad/one, Second bad/one
var Chosen = two.Default // Chosen bad/two/v2
var hiddenValue one.T

const Constant one.T = 1 // Constant bad/one

var _ one.I = (*Struct)(nil)
`
	set := token.NewFileSet()
	file, err := parser.ParseFile(set, "p.go", text, parser.SkipObjectResolution|parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	var want, got []string
	for _, c := range file.Comments {
		for fault := range strings.SplitSeq(strings.TrimSpace(c.Text()), ", ") {
			want = append(want, fmt.Sprintf("line %d: %s", set.Position(c.Pos()).Line, fault))
		}
	}
	for _, n := range apiNames([]*ast.File{file}) {
		fault := strings.TrimSpace(n.declaration + " " + n.path)
		got = append(got, fmt.Sprintf("line %d: %s", set.Position(n.at).Line, fault))
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("found:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}
