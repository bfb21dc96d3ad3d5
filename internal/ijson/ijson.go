// Package ijson reads I-JSON (RFC 7493) strictly: UTF-8, no duplicate names, no surrogates or
// noncharacters in text, no unknown fields, names matched by case, no data after the document. An
// error tells the sender of the document which field is wrong and why, in one sentence. Begin
// reading at Decode.
package ijson

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// MaxDepth bounds how deep arrays and objects nest. The outermost object has depth 1.
const MaxDepth = 16

// Object is an I-JSON object that Parse has checked. Members has the raw value of each field.
type Object struct {
	raw     []byte
	Members map[string]jsontext.Value
}

// Parse checks that b is one I-JSON object of at most MaxDepth levels. The Object refers to b.
func Parse(b []byte) (o Object, err error) {
	found, err := fields(b)
	if err != nil {
		return o, err
	}
	if err := grammar(b); err != nil {
		return o, err
	}
	return object(b, found), nil
}

// Inner returns the object in a value of an Object. The value has been checked as a part of the
// Object, so Inner only finds the fields.
func Inner(value jsontext.Value) (o Object, err error) {
	found, err := fields(value)
	if err != nil {
		return o, err
	}
	return object(value, found), nil
}

func object(b []byte, found []member) Object {
	o := Object{raw: b, Members: make(map[string]jsontext.Value, len(found))}
	for _, m := range found {
		o.Members[string(m.name)] = m.value
	}
	return o
}

// grammar checks the grammar of JSON and the encoding of text.
func grammar(b []byte) error {
	d := jsontext.NewDecoder(bytes.NewBuffer(b), scanned)
	if _, err := d.ReadValue(); err != nil {
		return explain(err)
	}
	if _, err := d.ReadToken(); err != io.EOF {
		return errors.New("more data follows the JSON object")
	}
	return nil
}

// scanned is the option for a document without duplicate names: see scan.
var scanned = jsontext.AllowDuplicateNames(true)

// Into reads the object into v strictly. The required fields must be present and not null.
func (o Object) Into(v any, required ...string) error {
	for _, name := range required {
		if m := o.Members[name]; len(m) == 0 || m.Kind() == 'n' {
			return fmt.Errorf("%s is missing", name)
		}
	}
	return decode(o.raw, v)
}

// decode decodes a scanned document into v strictly.
func decode(b []byte, v any) error {
	if err := json.Unmarshal(b, v, json.RejectUnknownMembers(true), scanned); err != nil {
		return explain(err)
	}
	return nil
}

// Decode does what Parse and Into do, with one scan and one decoding of b.
func Decode(b []byte, v any, required ...string) error {
	found, err := fields(b)
	if err != nil {
		return err
	}
	if err := decode(b, v); err != nil {
		return err
	}
	for _, name := range required {
		if !slices.ContainsFunc(found, func(m member) bool {
			return string(m.name) == name && m.value.Kind() != 'n'
		}) {
			return fmt.Errorf("%s is missing", name)
		}
	}
	return nil
}

// noncharacter reports the code points that RFC 7493, section 2.1, forbids: U+FDD0 to U+FDEF, and
// the last two of each plane.
func noncharacter(r rune) bool {
	return r >= 0xfdd0 && r <= 0xfdef || r&0xfffe == 0xfffe
}

// explain turns a decoder's error into a sentence with the place and the reason, without Go
// types. Text of the sender is clipped.
func explain(err error) error {
	var semantic *json.SemanticError
	if errors.As(err, &semantic) {
		place := field(semantic.JSONPointer)
		switch {
		case errors.Is(err, json.ErrUnknownName):
			return fmt.Errorf("unknown field %q", place)
		case semantic.Err != nil && semantic.GoType != nil && !isNumber(semantic.GoType):
			return fmt.Errorf("%s: %w", place, semantic.Err)
		case semantic.GoType != nil:
			return fmt.Errorf("%s: must be %s", place, expected(semantic.GoType))
		}
		return fmt.Errorf("%s: wrong type of value", place)
	}
	var syntactic *jsontext.SyntacticError
	if errors.As(err, &syntactic) {
		return fmt.Errorf("broken JSON at byte %d", syntactic.ByteOffset)
	}
	return errors.New("broken JSON: it ends early")
}

func isNumber(t reflect.Type) bool {
	switch t.Kind() {
	case reflect.Int64, reflect.Uint64, reflect.Uint32, reflect.Uint16, reflect.Uint8:
		return true
	}
	return false
}

func expected(t reflect.Type) string {
	switch t.Kind() {
	case reflect.String:
		return "text"
	case reflect.Bool:
		return "true or false"
	case reflect.Struct, reflect.Map:
		return "an object"
	case reflect.Slice:
		return "an array"
	case reflect.Pointer:
		return expected(t.Elem())
	}
	if isNumber(t) {
		return "an integer without fraction or exponent, in its range"
	}
	return "of another type"
}

// field writes a JSON pointer as specifications name a field: payload.terms.amount.
func field(p jsontext.Pointer) string {
	var names []string
	for name := range p.Tokens() {
		names = append(names, name)
	}
	return Clip(strings.Join(names, "."))
}

// Clip shortens a sender's text to at most 64 bytes and an ellipsis, for an error message or a log
// line.
func Clip(s string) string {
	const limit = 64
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit], "") + "…"
}
