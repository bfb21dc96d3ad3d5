package main

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

var write = flag.Bool("write", false, "write reference.toml")

const referenceHead = `# The configuration of countersignd: each field with its meaning and its default. A line with "#"
# and no space behind it is a setting: remove the "#" to use it. Relative paths are relative to the
# folder of this file. A duration is a text with a unit: "10s", "5m", "7d". An unknown field is an
# error. Required are listen or listen_pubky, admin_socket, ledger, policy, and a token.
`

// TestReference compares reference.toml with the type Config: its fields, comments and defaults.
// The settings of the file, taken into use as they are, are the defaults.
func TestReference(t *testing.T) {
	// The defaults of some fields depend on others.
	c, err := parseConfig("reference.toml", []byte("listen = \"127.0.0.1:7700\"\nadmin_socket = \"s\"\n"+
		"ledger = \"l\"\npolicy = \"p\"\n[tokens.x]\nuri = \"pkcs11:token=x\"\nmodule = \"m\"\npin_file = \"pin\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	empty := defaults()
	empty.Limits = c.Limits
	comments := commentsOf(t, "config.go", "backup.go", "../../hsm/quirks.go")
	var b strings.Builder
	b.WriteString(referenceHead)
	writeTable(t, &b, comments, "", reflect.ValueOf(empty))
	if *write {
		if err := os.WriteFile("reference.toml", []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if file, err := os.ReadFile("reference.toml"); err != nil || string(file) != b.String() {
		t.Errorf("reference.toml is not what the type Config says (%v): go generate ./cmd/countersignd", err)
	}

	used := defaults()
	settings := regexp.MustCompile(`(?m)^#([a-z\[])`).ReplaceAllString(b.String(), "$1")
	if err := decodeTOML("reference.toml", []byte(settings), &used); err != nil {
		t.Fatalf("%v\n%s", err, settings)
	}
	if got := used.Tokens["NAME"]; got == nil || !reflect.DeepEqual(*got, withEmptyLists(*defaultToken())) {
		t.Errorf("the token is %+v", got)
	}
	used.Tokens, used.Webhooks, used.Sinks = empty.Tokens, nil, nil
	if !reflect.DeepEqual(used, empty) {
		t.Errorf("the settings are\n%+v, the defaults\n%+v", used, empty)
	}
}

// withEmptyLists returns a token whose missing lists are empty ones, as TOML has them.
func withEmptyLists(token Token) Token {
	token.ZeroPCRs, token.Environment = []uint{}, map[string]string{}
	token.Files, token.Network = []string{}, []string{}
	return token
}

// commentsOf returns the comment of each field of the types in the files, by type and field.
func commentsOf(t *testing.T, paths ...string) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, path := range paths {
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			spec, is := n.(*ast.TypeSpec)
			if !is {
				return true
			}
			if fields, is := spec.Type.(*ast.StructType); is {
				text := ""
				for _, f := range fields.Fields.List {
					if f.Doc != nil { // a comment may be for several fields
						text = f.Doc.Text()
					}
					for _, name := range f.Names {
						all[spec.Name.Name+"."+name.Name], text = text, ""
					}
				}
			}
			return true
		})
	}
	return all
}

// writeTable writes the fields of a table, and then its tables, as TOML requires. path is the name
// of the table, with a period at its end.
func writeTable(t *testing.T, b *strings.Builder, comments map[string]string, path string, v reflect.Value) {
	var tables []int
	for i := range v.NumField() {
		f := v.Type().Field(i)
		name := f.Tag.Get("toml")
		if name == "" {
			continue // no setting
		}
		if _, _, is := tableOf(v.Field(i)); is {
			tables = append(tables, i)
			continue
		}
		writeComment(b, comments, v.Type(), f)
		fmt.Fprintf(b, "#%s = %s\n", name, valueOf(t, path+name, v.Field(i)))
	}
	for _, i := range tables {
		f := v.Type().Field(i)
		header, of, _ := tableOf(v.Field(i))
		writeComment(b, comments, v.Type(), f)
		name := path + f.Tag.Get("toml")
		fmt.Fprintf(b, "#%s\n", fmt.Sprintf(header, name))
		if f.Tag.Get("toml") == "tokens" {
			name += ".NAME"
		}
		writeTable(t, b, comments, name+".", of)
	}
}

// tableOf returns the form of a table's head and the table, for a field that is a table.
func tableOf(v reflect.Value) (header string, of reflect.Value, is bool) {
	switch v.Type() {
	case reflect.TypeFor[map[string]*Token]():
		return "[%s.NAME]", reflect.ValueOf(*defaultToken()), true
	case reflect.TypeFor[[]Webhook]():
		return "[[%s]]", reflect.ValueOf(Webhook{}), true
	case reflect.TypeFor[[]Sink]():
		return "[[%s]]", reflect.ValueOf(defaultSink()), true
	}
	return "[%s]", v, v.Kind() == reflect.Struct
}

// writeComment writes the comment of a field, with the names of TOML in place of Go's.
func writeComment(b *strings.Builder, comments map[string]string, table reflect.Type, f reflect.StructField) {
	text := comments[table.Name()+"."+f.Name]
	if rest, begins := strings.CutPrefix(text, f.Name); begins {
		text = f.Tag.Get("toml") + rest
	}
	for of := range table.Fields() {
		// TPM, URI and URL are words of the field, too.
		if name := of.Tag.Get("toml"); name != "" && strings.ToUpper(of.Name) != of.Name {
			text = regexp.MustCompile(`\b`+of.Name+`\b`).ReplaceAllString(text, name)
		}
	}
	b.WriteString("\n")
	for line := range strings.Lines(text) {
		b.WriteString(strings.TrimRight("# "+line, " \n") + "\n")
	}
}

// valueOf returns a value in the form of TOML.
func valueOf(t *testing.T, path string, v reflect.Value) string {
	if d, is := v.Interface().(Duration); is {
		return fmt.Sprintf("%q", d)
	}
	switch v.Kind() {
	case reflect.Pointer:
		return valueOf(t, path, v.Elem())
	case reflect.String:
		return fmt.Sprintf("%q", v.String())
	case reflect.Slice:
		all := []string{}
		for i := range v.Len() {
			all = append(all, valueOf(t, path, v.Index(i)))
		}
		return "[" + strings.Join(all, ", ") + "]"
	case reflect.Map:
		return "{}"
	case reflect.Bool, reflect.Int, reflect.Uint, reflect.Uint32:
		return fmt.Sprint(v.Interface())
	}
	t.Errorf("%s: a value of the type %s has no form", path, v.Type())
	return ""
}
