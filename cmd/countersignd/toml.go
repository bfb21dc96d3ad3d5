package main

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// decodeTOML decodes a file into c, with the exact names of the fields only. The decoder of
// go-toml takes a field's name in any case: of Listen and listen in one file, the last would win.
// The decoder also takes the number 30 as a Duration of 30 ns. So checkTOML reads the keys first.
func decodeTOML(path string, b []byte, c *Config) error {
	if bytes.HasPrefix(b, []byte("\xef\xbb\xbf")) || bytes.HasPrefix(b, []byte("\xff\xfe")) ||
		bytes.HasPrefix(b, []byte("\xfe\xff")) {
		return fmt.Errorf("config: %s:1: the file begins with a byte order mark (%x): save it as UTF-8 without one",
			path, b[:2])
	}
	var syntax map[string]any // finds broken TOML and keys that are written twice
	if err := toml.Unmarshal(b, &syntax); err != nil {
		return fmt.Errorf("config: %s", explainTOML(path, err))
	}
	if line, err := checkTOML(b); err != nil {
		return fmt.Errorf("config: %s:%d: %w", path, line, err)
	}
	tokens, _ := syntax["tokens"].(map[string]any)
	for name := range tokens {
		c.Tokens[name] = defaultToken()
	}
	if err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(c); err != nil {
		return fmt.Errorf("config: %s", explainTOML(path, err))
	}
	return nil
}

// checkTOML checks each key of a file against the fields of Config. An error has its line.
func checkTOML(b []byte) (line int, err error) {
	var p unstable.Parser
	p.Reset(b)
	root := reflect.TypeFor[Config]()
	table, prefix := root, ""
	for p.NextExpression() {
		e := p.Expression()
		switch e.Kind {
		case unstable.Table, unstable.ArrayTable:
			table, prefix, line, err = checkKey(&p, e.Key(), root, "")
		case unstable.KeyValue:
			line, err = checkPair(&p, e, table, prefix)
		}
		if err != nil {
			return line, err
		}
	}
	return 0, p.Error()
}

// checkPair checks a key of a table with its value.
func checkPair(p *unstable.Parser, pair *unstable.Node, table reflect.Type, prefix string) (line int, err error) {
	field, path, line, err := checkKey(p, pair.Key(), table, prefix)
	if err != nil || field == nil {
		return line, err
	}
	return line, checkValue(p, pair.Value(), field, path)
}

// checkValue checks the keys and durations inside a value of the type field.
func checkValue(p *unstable.Parser, value *unstable.Node, field reflect.Type, path string) error {
	if field == reflect.TypeFor[Duration]() && value.Kind != unstable.String {
		return fmt.Errorf("%s must be a text with a unit, such as \"30s\", \"5m\" or \"24h\"", path)
	}
	for each := value.Children(); value.Kind == unstable.InlineTable && each.Next(); {
		if _, err := checkPair(p, each.Node(), field, path); err != nil {
			return err
		}
	}
	for each := value.Children(); value.Kind == unstable.Array && each.Next(); {
		if err := checkValue(p, each.Node(), element(field), path); err != nil {
			return err
		}
	}
	return nil
}

// checkKey follows a dotted key from a table, and returns the type at its end. The type is nil
// inside a value that has no fields: the decoder refuses such a key.
func checkKey(p *unstable.Parser, key unstable.Iterator, table reflect.Type, prefix string) (
	field reflect.Type, path string, line int, err error,
) {
	for field, path = table, prefix; key.Next(); {
		name := string(key.Node().Data)
		line = p.Shape(key.Node().Raw).Start.Line
		path = strings.TrimPrefix(path+"."+name, ".")
		if field = element(field); field == nil {
			continue
		}
		switch field.Kind() {
		case reflect.Struct:
			if field, err = fieldOf(field, name, path); err != nil {
				return nil, path, line, err
			}
		case reflect.Map:
			field = field.Elem()
		default:
			field = nil
		}
	}
	return element(field), path, line, nil
}

// element returns the type behind pointers and lists, or nil for nil.
func element(t reflect.Type) reflect.Type {
	for t != nil && (t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice) {
		t = t.Elem()
	}
	return t
}

// fieldOf returns the type of the field of a struct with exactly this name.
func fieldOf(table reflect.Type, name, path string) (reflect.Type, error) {
	for f := range table.Fields() {
		switch tag := f.Tag.Get("toml"); {
		case tag == name:
			return f.Type, nil
		case strings.EqualFold(tag, name):
			return nil, fmt.Errorf("unknown field %q: the name of the field is %s, in lower case", path, tag)
		}
	}
	return nil, fmt.Errorf("unknown field %q", path)
}

// explainTOML returns an error of the TOML decoder as one line with its place in the file.
func explainTOML(path string, err error) string {
	var unknown *toml.StrictMissingError
	var broken *toml.DecodeError
	switch {
	case errors.As(err, &unknown):
		row, _ := unknown.Errors[0].Position()
		return fmt.Sprintf("%s:%d: unknown field %q", path, row, strings.Join(unknown.Errors[0].Key(), "."))
	case errors.As(err, &broken):
		row, _ := broken.Position()
		return fmt.Sprintf("%s:%d: %s", path, row, strings.TrimPrefix(broken.Error(), "toml: "))
	}
	return fmt.Sprintf("%s: %v", path, err)
}
