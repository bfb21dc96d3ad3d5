// Package secret has the type of secrets in memory: PINs, seeds, tokens of sessions, passwords, and
// URLs of receivers. A secret can't be printed, logged, marshalled or compared by accident. Begin
// reading at Bytes. A test of the whole repository names the fields and parameters that hold a
// secret in a plain type, each with its reason.
package secret

import (
	"crypto/subtle"
	"fmt"
	"io"
	"log/slog"
)

// Text stands for a secret wherever one is printed.
const Text = "[secret]"

// Bytes is a secret. The content is behind a function: package fmt prints unexported fields of an
// outer struct without asking for methods, and then sees the address of a function only. A function
// also makes == between two secrets an error of the compiler. The zero Bytes is empty.
//
// A copy of a Bytes has the same content, and Wipe clears it for all copies. A Bytes must not be
// wiped while another goroutine uses it.
type Bytes struct{ content func() []byte }

// New makes a secret of b, which belongs to the secret from now on.
func New(b []byte) Bytes { return Bytes{func() []byte { return b }} }

// Of makes a secret of a text. The text itself stays in memory.
func Of(text string) Bytes { return New([]byte(text)) }

// Expose returns the content itself, for the one call that needs it.
func (s Bytes) Expose() []byte {
	if s.content == nil {
		return nil
	}
	return s.content()
}

// Empty reports that there is no content.
func (s Bytes) Empty() bool { return len(s.Expose()) == 0 }

// Wipe overwrites the content with zeros.
func (s Bytes) Wipe() { clear(s.Expose()) }

// Equal compares two secrets in a time that depends on their lengths only.
func (s Bytes) Equal(other Bytes) bool {
	return subtle.ConstantTimeCompare(s.Expose(), other.Expose()) == 1
}

// String gives Text, and so do all other methods that print or encode.
func (Bytes) String() string { return Text }

func (Bytes) GoString() string { return Text }

// Format writes Text for each verb.
func (Bytes) Format(f fmt.State, _ rune) { io.WriteString(f, Text) }

func (Bytes) MarshalText() ([]byte, error) { return []byte(Text), nil }

func (Bytes) MarshalJSON() ([]byte, error) { return []byte(`"` + Text + `"`), nil }

func (Bytes) MarshalBinary() ([]byte, error) { return []byte(Text), nil }

func (Bytes) LogValue() slog.Value { return slog.StringValue(Text) }
