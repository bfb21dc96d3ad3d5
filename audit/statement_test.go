package audit_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"

	"countersign/audit"
)

// payment returns the outcome of a signed payment.
func payment(second int, admission uint64) []byte {
	e := created(second, admission)
	e.Type = audit.PaymentCompleted
	return encode(e)
}

// payments returns n admissions, each followed by the outcome of the payment.
func payments(n int, from uint64, second int) (all [][]byte) {
	for i := range n {
		a := admitted(second+i, int(from)+i)
		a.Type, a.Resource = audit.PaymentInitiated, "=cmd|' /C calc'!A0"
		all = append(all, encode(a), payment(second+i, from+uint64(2*i)))
	}
	return all
}

// entries returns all entries of the log that retention has not dropped, with the number of the
// first one, as a daemon has them.
func (m *memory) entries(t *testing.T) (first uint64, all [][]byte) {
	t.Helper()
	for epoch := range m.epochs {
		head, err := m.log.Open(m.files[fmt.Sprintf("epochs/%d/checkpoint", epoch)])
		if err != nil {
			t.Fatal(err)
		}
		for n := uint64(0); n*256 < head.Size; n++ {
			tile := audit.Tile{Level: -1, N: n, Width: int(min(256, head.Size-n*256))}
			b, ok := m.files[fmt.Sprintf("epochs/%d/%s", epoch, tile.Path())]
			if !ok {
				first += head.Size
				break
			}
			for len(b) > 0 {
				size := int(b[0])<<8 + int(b[1])
				all, b = append(all, b[2:2+size]), b[2+size:]
			}
		}
	}
	return first, all
}

// report writes the report of the seconds since <= second < until, with a receipt for each payment.
func (m *memory) report(t *testing.T, since, until int) fstest.MapFS {
	t.Helper()
	sinceMS, untilMS := at(since).UnixMilli(), at(until).UnixMilli()
	kept, all := m.entries(t)
	s, err := m.log.State(context.Background(), m, sinceMS, untilMS, func(total uint64) (first, end uint64, err error) {
		first, end, after := total, 0, total
		for i, b := range all {
			e, err := audit.Decode(b)
			if err != nil {
				return 0, 0, err
			}
			index := kept + uint64(i)
			if e.TimeMS >= untilMS {
				after = min(after, index)
			} else if e.TimeMS >= sinceMS {
				first, end = min(first, index), index+1
			}
		}
		if end == 0 {
			return after, after, nil
		}
		return first, end, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	report := fstest.MapFS{audit.StatementFile: {Data: s.Encode()}}
	for _, form := range audit.Forms() {
		events, receipts := form.EventHeading(), form.ReceiptHeading()
		for index := s.First; index < s.End; index++ {
			entry := all[index-kept]
			if events, err = form.AppendEvent(events, index, entry); err != nil {
				t.Fatal(err)
			}
			e, err := audit.Decode(entry)
			if err != nil {
				t.Fatal(err)
			}
			if e.Type.HasReceipt() {
				n, err := strconv.ParseUint(e.Metadata["admission"], 10, 64)
				if err != nil {
					t.Fatal(err)
				}
				receipts = form.AppendReceipt(receipts, audit.Receipt{
					ID: fmt.Sprintf("%032x", n), TimeMS: e.TimeMS, Commitment: "00", Method: "-1+2",
					Status: "completed", Event: n,
				})
			}
		}
		report[form.EventsFile()] = &fstest.MapFile{Data: events}
		report[form.ReceiptsFile()] = &fstest.MapFile{Data: receipts}
	}
	return report
}

// threeEpochs is a log of payments in three epochs: the first begins with the second 0, the next
// ones with 1000 and 2000.
func threeEpochs(t *testing.T) *memory {
	m := newMemory(t)
	for i := range 3 {
		m.epoch(t, payments(300, m.events+1, 1000*i)...)
	}
	return m
}

// TestStatement checks the reports of periods that begin and end anywhere, of an empty one, and of
// periods that retention has dropped in part.
func TestStatement(t *testing.T) {
	m := threeEpochs(t)
	check := func(since, until int, events, receipts uint64, dropped int) {
		t.Helper()
		report := m.report(t, since, until)
		for _, forms := range [][]audit.Form{audit.Forms(), {audit.CSV}, {audit.JSONLines}} {
			some := fstest.MapFS{audit.StatementFile: report[audit.StatementFile]}
			for _, f := range forms {
				some[f.EventsFile()], some[f.ReceiptsFile()] = report[f.EventsFile()], report[f.ReceiptsFile()]
			}
			r, err := m.log.VerifyReport(some)
			if err != nil || r.Events != events || r.Receipts != receipts || r.Dropped != dropped {
				t.Errorf("seconds %d to %d in %v: %d events, %d receipts, %d dropped, %v, want %d, %d, %d",
					since, until, forms, r.Events, r.Receipts, r.Dropped, err, events, receipts, dropped)
			}
		}
	}
	check(10, 20, 20, 10, 0)
	check(299, 300, 2, 1, 0)
	check(290, 1010, 41, 20, 0) // with EpochBegun in between
	check(5000, 6000, 0, 0, 0)
	check(500, 600, 0, 0, 0)
	m.drop(0)
	check(500, 1010, 20, 10, 1)
	check(1100, 1110, 20, 10, 1)
}

// TestStatementOfAWholeLog checks a report from the first event to the newest checkpoint.
func TestStatementOfAWholeLog(t *testing.T) {
	for _, n := range []int{0, 1, 2, 127, 128, 300} {
		m := newMemory(t)
		m.epoch(t, payments(n, 1, 0)...)
		r, err := m.log.VerifyReport(m.report(t, 0, 10_000))
		if err != nil || r.Events != m.events || r.Receipts != uint64(n) {
			t.Errorf("%d payments: %+v, %v", n, r, err)
		}
	}
}

// TestReportIsCut takes something from a report, or adds or changes something. Each change must be
// noticed.
func TestReportIsCut(t *testing.T) {
	m := threeEpochs(t)
	m.drop(0)
	statement := func(change func(*audit.Statement)) func(fstest.MapFS) {
		return func(report fstest.MapFS) {
			var s audit.Statement
			if err := json.Unmarshal(report[audit.StatementFile].Data, &s); err != nil {
				t.Fatal(err)
			}
			change(&s)
			report[audit.StatementFile] = &fstest.MapFile{Data: s.Encode()}
		}
	}
	rows := func(f func(audit.Form) string, change func([]string) []string) func(fstest.MapFS) {
		return func(report fstest.MapFS) {
			for _, form := range audit.Forms() {
				all := strings.SplitAfter(string(report[f(form)].Data), "\n")
				report[f(form)] = &fstest.MapFile{Data: []byte(strings.Join(change(all), ""))}
			}
		}
	}
	replace := func(name, from, to string) func(fstest.MapFS) {
		return func(report fstest.MapFS) {
			b := bytes.Replace(report[name].Data, []byte(from), []byte(to), 1)
			if bytes.Equal(b, report[name].Data) {
				t.Fatalf("%s has no %q", name, from)
			}
			report[name] = &fstest.MapFile{Data: b}
		}
	}
	without := func(n int) func([]string) []string {
		return func(all []string) []string { return append(append([]string(nil), all[:n]...), all[n+1:]...) }
	}
	twice := func(all []string) []string { return append(append([]string(nil), all[:4]...), all[3:]...) }
	withoutLast := func(all []string) []string { return all[:len(all)-2] }
	swapped := func(all []string) []string { all[3], all[4] = all[4], all[3]; return all }
	for name, change := range map[string]func(fstest.MapFS){
		"an event is missing":           rows(audit.Form.EventsFile, without(5)),
		"an event is there twice":       rows(audit.Form.EventsFile, twice),
		"events are in another order":   rows(audit.Form.EventsFile, swapped),
		"the last event is missing":     rows(audit.Form.EventsFile, withoutLast),
		"a name is changed in JSON":     replace("events.jsonl", `"name":"shop"`, `"name":"shot"`),
		"a name is changed in CSV":      replace("events.csv", ",shop,", ",shot,"),
		"a readable time is changed":    replace("events.csv", "T08:1", "T09:1"),
		"a receipt is missing":          rows(audit.Form.ReceiptsFile, without(2)),
		"a receipt is there twice":      rows(audit.Form.ReceiptsFile, twice),
		"a receipt is of another event": replace("receipts.jsonl", `"event":`, `"event":1`),
		"receipts are gone":             func(report fstest.MapFS) { delete(report, "receipts.csv") },
		"the first events are left out": func(report fstest.MapFS) {
			statement(func(s *audit.Statement) { s.First += 2 })(report)
			rows(audit.Form.EventsFile, without(1))(report)
		},
		"the border is gone":       statement(func(s *audit.Statement) { s.Before = "" }),
		"the end is gone":          statement(func(s *audit.Statement) { s.After = "" }),
		"the end is another event": statement(func(s *audit.Statement) { s.After = s.Before }),
		"the period is longer":     statement(func(s *audit.Statement) { s.UntilMS += 60_000 }),
		"the period begins before": statement(func(s *audit.Statement) { s.SinceMS -= 60_000 }),
		"an epoch is said dropped": statement(func(s *audit.Statement) { s.Epochs[1].Dropped = true }),
		"a checkpoint is missing":  statement(func(s *audit.Statement) { s.Epochs = s.Epochs[1:] }),
		"a checkpoint is forged": statement(func(s *audit.Statement) {
			s.Epochs[1].Checkpoint = strings.Replace(s.Epochs[1].Checkpoint, "601", "600", 1)
		}),
		"checkpoints are swapped": statement(func(s *audit.Statement) {
			s.Epochs[0].Checkpoint, s.Epochs[1].Checkpoint = s.Epochs[1].Checkpoint, s.Epochs[0].Checkpoint
		}),
		"the proof is longer": statement(func(s *audit.Statement) {
			s.Epochs[1].Proof = append(s.Epochs[1].Proof, audit.Hash{})
		}),
		"the proof is shorter": statement(func(s *audit.Statement) { s.Epochs[1].Proof = s.Epochs[1].Proof[1:] }),
		"another log":          statement(func(s *audit.Statement) { s.Log = "countersign/0000000000000000" }),
		"an unknown field":     replace(audit.StatementFile, `"since_ms"`, `"sinse_ms"`),
	} {
		report := m.report(t, 1100, 1200)
		if _, err := m.log.VerifyReport(report); err != nil {
			t.Fatal(err)
		}
		change(report)
		if _, err := m.log.VerifyReport(report); err == nil {
			t.Errorf("%s: not noticed", name)
		} else {
			t.Logf("%s: %v", name, err)
		}
	}
}

// TestReceiptsOfRetention checks that a payment without a receipt is accepted for the time of
// dropped receipts only.
func TestReceiptsOfRetention(t *testing.T) {
	m := threeEpochs(t)
	report := m.report(t, 1100, 1200)
	for _, form := range audit.Forms() {
		report[form.ReceiptsFile()] = &fstest.MapFile{Data: form.ReceiptHeading()}
	}
	if _, err := m.log.VerifyReport(report); err == nil {
		t.Error("missing receipts are not noticed")
	}
	var s audit.Statement
	if err := json.Unmarshal(report[audit.StatementFile].Data, &s); err != nil {
		t.Fatal(err)
	}
	s.ReceiptsBeforeMS = at(1200).UnixMilli()
	report[audit.StatementFile] = &fstest.MapFile{Data: s.Encode()}
	if r, err := m.log.VerifyReport(report); err != nil || r.ReceiptsDropped != 100 || r.Receipts != 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestNoFormulaInCSV checks that no field of CSV begins as a formula of a spreadsheet does.
func TestNoFormulaInCSV(t *testing.T) {
	m := newMemory(t)
	m.epoch(t, payments(1, 1, 0)...)
	report := m.report(t, 0, 10)
	for _, name := range []string{"events.csv", "receipts.csv"} {
		fields := strings.FieldsFunc(string(report[name].Data), func(r rune) bool { return r == ',' || r == '\n' })
		for _, field := range fields {
			if field = strings.TrimPrefix(field, `"`); strings.ContainsAny(field[:min(1, len(field))], "=+-@") {
				t.Errorf("%s: %q", name, field)
			}
		}
	}
}

// TestEachFieldIsInCSV sees that a row of CSV has each field of an event: a report in CSV could not
// be checked without one of them.
func TestEachFieldIsInCSV(t *testing.T) {
	e := audit.Event{
		TimeMS: 1764400000123, Type: audit.SignatureAdmitted, Action: "an-action", Resource: "a-resource",
		Outcome: "ok", Metadata: map[string]string{"a-name": "a-value"},
	}
	actor := reflect.ValueOf(&e.Actor).Elem()
	for i := range actor.NumField() {
		switch field := actor.Field(i); field.Kind() {
		case reflect.Uint64:
			field.SetUint(uint64(7000 + i))
		default:
			field.SetString(fmt.Sprint("text-", i))
		}
	}
	e.Actor.Kind = "operator"
	row, err := audit.CSV.AppendEvent(nil, 9001, encode(e))
	if err != nil {
		t.Fatal(err)
	}
	for i := range actor.NumField() {
		if text := fmt.Sprint(actor.Field(i).Interface()); !bytes.Contains(row, []byte(text)) {
			t.Errorf("the row lacks %s: %s", actor.Type().Field(i).Name, row)
		}
	}
}
