package main

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"

	"countersign/client"
	"countersign/internal/ijson"
	"countersign/policy"
	"countersign/transcript"

	"github.com/spf13/cobra"
)

func (t *tool) transcript() *cobra.Command {
	list := command("list", "List the transcript types and the fields of their payloads", cobra.NoArgs,
		func(*cobra.Command, []string) error {
			return t.print(transcript.Types(), func(w io.Writer) {
				for _, typ := range transcript.Types() {
					fmt.Fprintf(w, "%s: %s\n", typ.Name, typ.About)
					for _, f := range typ.Fields {
						fmt.Fprintf(w, "  %s\t%s\t%s\n", f.Name, either(f.Required, "required", "optional"), f.Form)
					}
					fmt.Fprintln(w)
				}
			})
		})
	do := func(cmd *cobra.Command, args []string) error {
		input, err := t.readInput(args[1:])
		if err != nil {
			return err
		}
		d, err := client.DecodeSigned(input)
		if err != nil {
			return fmt.Errorf("%w: %w", transcript.ErrMalformed, err)
		}
		if d.Type == "" {
			d.Type = args[0]
		}
		if d.Type != args[0] {
			return fmt.Errorf("%w: the document's type is %q, not %q",
				transcript.ErrMalformed, ijson.Clip(d.Type), ijson.Clip(args[0]))
		}
		doc, err := transcript.Parse(transcript.Request(d.Document))
		if err != nil {
			return err
		}
		// The appliance also refuses to sign these documents, under any policy.
		if len(doc.Payload) > client.MaxRequest {
			return fmt.Errorf("%w: the payload has %d bytes, and a request at most %d",
				transcript.ErrMalformed, len(doc.Payload), client.MaxRequest)
		}
		if doc.Payment != nil {
			if whole, _ := policy.Amounts(doc.Payment.Exact()); whole == math.MaxInt64 {
				return fmt.Errorf("%w: the amount is over 9223372036854775806, more than any rule can judge",
					policy.ErrDenied)
			}
		}
		out := map[string]string{
			"type": doc.Type, "canonical": hex.EncodeToString(doc.Canonical),
			"message": hex.EncodeToString(doc.Message),
		}
		return t.print(out, func(w io.Writer) {
			fmt.Fprintf(w, "type\t%s\n", doc.Type)
			numbers := json.NewDecoder(bytes.NewReader(doc.Payload))
			numbers.UseNumber() // keeps the digits as written
			var payload any
			if err := numbers.Decode(&payload); err == nil { // never fails: Parse has read the payload
				printFields(w, "payload", payload)
			}
			fmt.Fprintf(w, "nonce\t%x\n", doc.Nonce)
			for _, at := range []struct {
				name string
				time int64
			}{{"timestamp", doc.Timestamp}, {"expires_at", doc.ExpiresAt}} {
				fmt.Fprintf(w, "%s\t%d, %s\n", at.name, at.time, date(at.time))
			}
			fmt.Fprintf(w, "canonical\t%s\nmessage\t%s\n", out["canonical"], out["message"])
		})
	}
	encode := command("encode TYPE [FILE|-]", "Show the fields and canonical bytes of a document, and the signed bytes",
		cobra.RangeArgs(1, 2), do)
	details(encode, "TYPE is a transcript type (countersign transcript list). FILE is a sign request, or the output\n"+
		"of countersign sign --json, by default from stdin. The document must obey the rules of its type,\n"+
		"and may have expired.")
	encode.Example = "  countersign transcript encode paykit-subscription-v2 signed.json"
	return group("transcript", "List transcript types, and show the bytes that a document's signature covers",
		list, encode)
}

// printFields writes a line for each field. Text is quoted in Go's syntax: control characters,
// invisible characters and changes of direction are escaped, and text never looks like a number or
// two lines.
func printFields(w io.Writer, name string, value any) {
	switch v := value.(type) {
	case map[string]any:
		for _, inner := range slices.Sorted(maps.Keys(v)) {
			// An unusual name is quoted. So a name with a dot does not look like two names.
			const usual = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-"
			shown := inner
			if inner == "" || strings.Trim(inner, usual) != "" {
				shown = fmt.Sprintf("%q", inner)
			}
			printFields(w, name+"."+shown, v[inner])
		}
		if len(v) == 0 {
			fmt.Fprintf(w, "%s\t{}\n", name)
		}
	case string:
		fmt.Fprintf(w, "%s\t%q\n", name, v)
	default: // a number, null, or an array of numbers
		b, _ := json.Marshal(v)
		fmt.Fprintf(w, "%s\t%s\n", name, b)
	}
}
