package audit

import (
	"bufio"
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"countersign/internal/ijson"

	strict "github.com/go-json-experiment/json"
)

// Form is the form of the rows of a report.
type Form string

// The forms of rows. A row of JSON lines has the bytes of the event in the log, with the number in
// front as the field index. A row of CSV (RFC 4180) has the event's fields, from which the bytes
// follow. So an event is proven in both forms.
const (
	CSV       Form = "csv"
	JSONLines Form = "jsonl"
)

// Forms lists all forms.
func Forms() []Form { return []Form{CSV, JSONLines} }

// Receipt is the minimal record of a signed payment in a report.
type Receipt struct {
	ID         string `json:"id"`
	TimeMS     int64  `json:"time_ms"` // Unix milliseconds
	Commitment string `json:"commitment"`
	Method     string `json:"method"`
	Status     string `json:"status"`
	Event      uint64 `json:"event"` // number of the admission
}

var (
	eventColumns = []string{
		"index", "time_ms", "time", "type", "actor_kind", "actor_name", "actor_public_key", "actor_identity",
		"actor_proposal", "actor_request", "action", "resource", "outcome", "metadata",
	}
	receiptColumns = []string{"id", "time_ms", "time", "commitment", "method", "status", "event"}
)

// EventHeading returns the rows before the first event: the names of the columns in CSV.
func (f Form) EventHeading() []byte { return f.heading(eventColumns) }

// ReceiptHeading returns the rows before the first receipt.
func (f Form) ReceiptHeading() []byte { return f.heading(receiptColumns) }

func (f Form) heading(columns []string) []byte {
	if f == CSV {
		return record(columns)
	}
	return nil
}

// AppendEvent appends the row of an event, given as the bytes of the log.
func (f Form) AppendEvent(b []byte, index uint64, entry []byte) ([]byte, error) {
	if f == JSONLines {
		b = append(strconv.AppendUint(append(b, indexField...), index, 10), ',')
		return append(append(b, bytes.TrimPrefix(entry, []byte("{"))...), '\n'), nil
	}
	e, err := Decode(entry)
	if err != nil {
		return nil, fmt.Errorf("event %d: %w", index, err)
	}
	metadata := ""
	if len(e.Metadata) > 0 {
		metadata = string(ijson.Encode(e.Metadata))
	}
	return append(b, record([]string{
		decimal(index), decimal(e.TimeMS), clock(e.TimeMS), string(e.Type), e.Actor.Kind, e.Actor.Name,
		e.Actor.PublicKey, e.Actor.Identity, decimal(e.Actor.Proposal), e.Actor.Request, e.Action,
		e.Resource, e.Outcome, metadata,
	})...), nil
}

// AppendReceipt appends the row of a receipt.
func (f Form) AppendReceipt(b []byte, r Receipt) []byte {
	if f == JSONLines {
		return append(append(b, ijson.Encode(r)...), '\n')
	}
	return append(b, record([]string{
		r.ID, decimal(r.TimeMS), clock(r.TimeMS), r.Commitment, r.Method, r.Status, decimal(r.Event),
	})...)
}

const indexField = `{"index":`

func clock(ms int64) string { return time.UnixMilli(ms).UTC().Format("2006-01-02T15:04:05.000Z") }

// record returns one record of CSV. A field that a spreadsheet would run as a formula, or that CSV
// would change, is an apostrophe and a JSON string.
func record(fields []string) []byte {
	var b bytes.Buffer
	w := csv.NewWriter(&b)
	safe := make([]string, len(fields))
	for i, field := range fields {
		if safe[i] = field; field != "" && strings.ContainsRune("=+-@'", rune(field[0])) ||
			strings.ContainsFunc(field, func(r rune) bool { return r < ' ' }) {
			safe[i] = "'" + string(ijson.Encode(field))
		}
	}
	w.Write(safe) // a bytes.Buffer takes all
	w.Flush()
	return b.Bytes()
}

// plain undoes the escape of record.
func plain(fields []string) error {
	for i, field := range fields {
		if text, escaped := strings.CutPrefix(field, "'"); escaped {
			if err := strict.Unmarshal([]byte(text), &fields[i]); err != nil {
				return fmt.Errorf("the field %s is no JSON string behind an apostrophe", ijson.Clip(field))
			}
		}
	}
	return nil
}

// events calls visit for each event of a file of rows, with the bytes of the log.
func (f Form) events(r io.Reader, visit func(index uint64, entry []byte) error) error {
	if f == JSONLines {
		return lines(r, func(line []byte) error {
			rest, is := bytes.CutPrefix(line, []byte(indexField))
			number, fields, has := bytes.Cut(rest, []byte(","))
			index, err := strconv.ParseUint(string(number), 10, 64)
			if !is || !has || err != nil || strconv.FormatUint(index, 10) != string(number) {
				return fmt.Errorf("the line does not begin with %sNUMBER", indexField)
			}
			return visit(index, append([]byte("{"), fields...))
		})
	}
	return records(r, eventColumns, func(field []string) error {
		var numbers [3]uint64
		for i, text := range []string{field[0], field[1], field[8]} {
			n, err := strconv.ParseUint(text, 10, 63)
			if err != nil {
				return fmt.Errorf("the field %s is not a number", ijson.Clip(text))
			}
			numbers[i] = n
		}
		e := Event{
			TimeMS: int64(numbers[1]), Type: Type(field[3]), Action: field[10], Resource: field[11], Outcome: field[12],
			Actor: Actor{
				Kind: field[4], Name: field[5], PublicKey: field[6], Identity: field[7], Proposal: numbers[2],
				Request: field[9],
			},
		}
		if clock(e.TimeMS) != field[2] {
			return fmt.Errorf("the time %s is not that of time_ms", ijson.Clip(field[2]))
		}
		if field[13] != "" {
			if err := strict.Unmarshal([]byte(field[13]), &e.Metadata); err != nil {
				return errors.New("the metadata are no JSON object of texts")
			}
		}
		return visit(numbers[0], ijson.Encode(e))
	})
}

// receipts calls visit for each receipt of a file of rows.
func (f Form) receipts(r io.Reader, visit func(Receipt) error) error {
	if f == JSONLines {
		return lines(r, func(line []byte) error {
			var receipt Receipt
			if err := strict.Unmarshal(line, &receipt, strict.RejectUnknownMembers(true)); err != nil {
				return errors.New("the line is not a receipt")
			}
			return visit(receipt)
		})
	}
	return records(r, receiptColumns, func(field []string) error {
		ms, err := strconv.ParseInt(field[1], 10, 64)
		event, notEvent := strconv.ParseUint(field[6], 10, 64)
		if err != nil || notEvent != nil || clock(ms) != field[2] {
			return errors.New("the record is not a receipt")
		}
		return visit(Receipt{field[0], ms, field[3], field[4], field[5], event})
	})
}

// maxRow is an upper bound of the length of a row, in bytes: an entry has at most 65535.
const maxRow = 1 << 18

func lines(r io.Reader, visit func([]byte) error) error {
	s := bufio.NewScanner(r)
	s.Buffer(nil, maxRow)
	n := 0
	for s.Scan() {
		n++
		if err := visit(s.Bytes()); err != nil {
			return fmt.Errorf("line %d: %w", n, err)
		}
	}
	return s.Err()
}

func records(r io.Reader, columns []string, visit func([]string) error) error {
	c := csv.NewReader(r)
	c.FieldsPerRecord, c.ReuseRecord = len(columns), true
	for n := 1; ; n++ {
		fields, err := c.Read()
		switch {
		case err == io.EOF && n > 1:
			return nil
		case err == io.EOF:
			return errors.New("the file is empty: want the names of the columns")
		case err != nil:
			return err
		case n == 1 && strings.Join(fields, ",") != strings.Join(columns, ","):
			return fmt.Errorf("the columns are %s, want %s",
				ijson.Clip(strings.Join(fields, ",")), strings.Join(columns, ","))
		case n == 1:
			continue
		}
		if err := plain(fields); err != nil {
			return fmt.Errorf("record %d: %w", n, err)
		}
		if err := visit(fields); err != nil {
			return fmt.Errorf("record %d: %w", n, err)
		}
	}
}
