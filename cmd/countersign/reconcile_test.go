//go:build unix

package main

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/form"
	"countersign/internal/journal"
	"countersign/internal/keystore"
)

// began is the time of the first event of the logs of these tests.
var began = time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)

func digestOf(text string) [32]byte { return sha256.Sum256([]byte(text)) }

var ofPayments, ofLog = keystore.Ref{Name: "payments", Version: 1}, keystore.Ref{Name: keystore.LogName, Version: 1}

// compared compares lines with a log that begins with the event first at the time began.
func compared(t *testing.T, lines []journal.Entry, first uint64, events ...audit.Event) reconciled {
	t.Helper()
	log, err := audit.NewLog(ed25519.NewKeyFromSeed(make([]byte, 32)).Public().(ed25519.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	r := reconciler{
		log: log, of: map[claim][]*line{}, trees: map[ofTree][]*line{},
		result: reconciled{Kinds: map[string]int{}},
	}
	for i, e := range lines {
		e.Number = uint64(i)
		r.add(&line{token: "main", Entry: e})
	}
	if first > 0 {
		begin := audit.NewEpochBegun(audit.Daemon(), 1, first, nil)
		begin.TimeMS = began.UnixMilli()
		events = append([]audit.Event{begin}, events...)
	}
	for range 2 { // as for a log whose time goes back
		each := r.follow()
		for i, e := range events {
			if err := each(first+uint64(i), e); err != nil {
				t.Fatal(err)
			}
		}
	}
	// An event of before the epoch may be written in it.
	r.finish(audit.Report{First: first, Events: uint64(len(events)), FromMS: began.Add(-time.Hour).UnixMilli()})
	return r.result
}

// verdict is the result in short.
func verdict(r reconciled) string {
	old := 0
	for _, o := range r.Older {
		old += o.Signatures
	}
	return fmt.Sprintf("matched %d, repeated %d, ranges %d, older %d, unlogged %d, good %v",
		r.Matched, r.Repeated, r.Ranges, old, len(r.Unlogged), r.Good)
}

func at(after time.Duration, e journal.Entry) journal.Entry {
	e.Time = began.Add(after)
	return e
}

func document(text string) journal.Entry {
	return journal.Entry{Key: ofPayments, Kind: "message-v1", Digest: digestOf(text)}
}

func hook(id, body string) journal.Entry {
	return journal.Entry{Key: ofLog, Kind: form.Webhook, Detail: id, Digest: digestOf(body)}
}

func certificate(text string) journal.Entry {
	return journal.Entry{
		Key: keystore.Ref{Name: keystore.CAName, Version: 1}, Kind: form.Certificate, Digest: digestOf(text),
	}
}

func checkpoint(detail string) journal.Entry {
	return journal.Entry{Key: ofLog, Kind: form.Checkpoint, Detail: detail}
}

func admitted(text string) audit.Event {
	d := audit.Document{Transcript: "message-v1", Digest: digestOf(text)}
	return audit.NewAdmission(audit.Daemon(), ofPayments.String(), d)
}

// TestEachLineHasItsEvent: a line is matched by the event of just its content. The same content
// again is a repetition, and other content under the same key, id or number is not.
func TestEachLineHasItsEvent(t *testing.T) {
	named := audit.Message{ID: "alert_3b6a27bcceb6a42d_1", Body: digestOf("body")}
	events := []audit.Event{
		admitted("a"),
		audit.NewAlertFiring("replays", "", "warning", "", began, "text", named),
		audit.NewCertificateSigned("certificate", "admin-ca/1", digestOf("c")),
		audit.NewCertificateSigned("certificate-request", "admin-tls/1", digestOf("r")),
	}
	other := document("a")
	other.Key.Version = 2
	request := certificate("c")
	request.Kind = form.Request
	for _, test := range []struct {
		name  string
		lines []journal.Entry
		want  string
	}{
		{"all", []journal.Entry{document("a"), hook(named.ID, "body"), certificate("c")},
			"matched 3, repeated 0, ranges 0, older 0, unlogged 0, good true"},
		{"again", []journal.Entry{document("a"), document("a"), hook(named.ID, "body"), hook(named.ID, "body")},
			"matched 4, repeated 2, ranges 0, older 0, unlogged 0, good true"},
		{"another document, such as with another nonce", []journal.Entry{document("a"), document("b")},
			"matched 1, repeated 0, ranges 0, older 0, unlogged 1, good false"},
		{"another version", []journal.Entry{other},
			"matched 0, repeated 0, ranges 0, older 0, unlogged 1, good false"},
		{"another body", []journal.Entry{hook(named.ID, "body"), hook(named.ID, "forged")},
			"matched 1, repeated 0, ranges 0, older 0, unlogged 1, good false"},
		{"another id", []journal.Entry{hook("alert_3b6a27bcceb6a42d_2", "body")},
			"matched 0, repeated 0, ranges 0, older 0, unlogged 1, good false"},
		{"another certificate", []journal.Entry{certificate("c"), certificate("d")},
			"matched 1, repeated 0, ranges 0, older 0, unlogged 1, good false"},
		{"a request in the place of a certificate", []journal.Entry{request},
			"matched 0, repeated 0, ranges 0, older 0, unlogged 1, good false"},
		{"sinks", []journal.Entry{
			hook("events_3b6a27bcceb6a42d_a_b_0_3", "x"), hook("events_3b6a27bcceb6a42d_s_3_3", "x"),
		}, "matched 0, repeated 0, ranges 2, older 0, unlogged 0, good true"},
		{"sinks with what the log does not have", []journal.Entry{
			hook("events_3b6a27bcceb6a42d_s_0_4", "x"), hook("events_3b6a27bcceb6a42d_s_3_2", "x"),
			hook("events_0000000000000000_s_0_1", "x"), hook("events_3b6a27bcceb6a42d_s_0_-1", "x"),
		}, "matched 0, repeated 0, ranges 0, older 0, unlogged 4, good false"},
	} {
		if got := verdict(compared(t, test.lines, 0, events...)); got != test.want {
			t.Errorf("%s: %s, want %s", test.name, got, test.want)
		}
	}
}

// TestOlderThanTheLog: after retention, signatures that are older than the log are told as older,
// and by no rule as found. The others need their events as before.
func TestOlderThanTheLog(t *testing.T) {
	const first = 100
	minute := time.Minute
	late := audit.NewOutcome(audit.Daemon(), ofPayments.String(), "message-v1", first-1, "")
	for _, test := range []struct {
		name  string
		lines []journal.Entry
		want  string
	}{
		{"before the log", []journal.Entry{
			at(-minute, document("x")), at(-minute, certificate("x")), at(-minute, hook("x", "x")),
			at(minute, document("a")),
		}, "matched 1, repeated 0, ranges 0, older 3, unlogged 0, good true"},
		{"after its begin", []journal.Entry{
			at(minute, document("a")), at(minute, certificate("x")), at(minute, hook("x", "x")),
			at(minute, hook("rotation_0000000000000000_payments_2", "x")),
		}, "matched 1, repeated 0, ranges 0, older 0, unlogged 3, good false"},
		{"before by the time, and behind a line that the log has", []journal.Entry{
			at(minute, document("a")), at(-minute, document("x")),
		}, "matched 1, repeated 0, ranges 0, older 0, unlogged 1, good false"},
		{"admitted before, and signed after the log's begin", []journal.Entry{
			at(time.Millisecond, document("x")),
		},
			"matched 0, repeated 0, ranges 0, older 1, unlogged 0, good true"},
		{"two with one outcome", []journal.Entry{
			at(time.Millisecond, document("x")), at(time.Millisecond, document("y")),
		},
			"matched 0, repeated 0, ranges 0, older 1, unlogged 1, good false"},
		{"in the millisecond of the log's begin", []journal.Entry{
			at(999*time.Microsecond, certificate("x")), at(999*time.Microsecond, hook("x", "x")),
			at(time.Millisecond, document("a")), at(time.Millisecond, hook("x", "x")),
		}, "matched 1, repeated 0, ranges 0, older 2, unlogged 1, good false"},
		{"under way at the log's begin", []journal.Entry{
			at(59*time.Second, certificate("x")), at(59*time.Second, checkpoint("0/7")),
			at(59*time.Second, checkpoint("1/7")), at(minute, checkpoint("0/8")),
		}, "matched 0, repeated 0, ranges 0, older 2, unlogged 2, good false"},
		{"a message that was late", []journal.Entry{
			at(71*time.Hour, hook("rotation_3b6a27bcceb6a42d_payments_2", "x")),
			at(73*time.Hour, hook("rotation_3b6a27bcceb6a42d_payments_3", "x")),
		}, "matched 0, repeated 0, ranges 0, older 1, unlogged 1, good false"},
	} {
		got := verdict(compared(t, test.lines, first, late, admitted("a")))
		if got != test.want {
			t.Errorf("%s: %s, want %s", test.name, got, test.want)
		}
	}
}

// TestMark: with the mark of the last comparison, lines that were dropped since, an exchanged
// journal and one that is missing are faults, and no line since may be older than the log.
func TestMark(t *testing.T) {
	folder, file := t.TempDir(), filepath.Join(t.TempDir(), "mark")
	appendTo := func(folder string, files int, texts ...string) {
		t.Helper()
		w := journal.New(journal.Config{Folder: folder, Token: "main", Size: 1024, Files: files})
		defer w.Close()
		for _, text := range texts {
			if err := w.Append(document(text)); err != nil {
				t.Fatal(err)
			}
		}
	}
	read := func(folder string) *reconciler {
		t.Helper()
		r := new(reconciler)
		if err := r.readMark(file); err != nil {
			t.Fatal(err)
		}
		if err := r.read(folder); err != nil {
			t.Fatal(err)
		}
		return r
	}
	compare := func(folder string, log audit.Report) *reconciler {
		t.Helper()
		r := read(folder)
		begin := audit.NewEpochBegun(audit.Daemon(), 1, log.First, nil)
		begin.TimeMS = log.FromMS
		if err := r.follow()(log.First, begin); err != nil {
			t.Fatal(err)
		}
		r.finish(log)
		if err := r.writeMark(file); err != nil {
			t.Fatal(err)
		}
		return r
	}
	long := audit.Report{First: 9, FromMS: time.Now().Add(time.Hour).UnixMilli()} // all lines are older
	appendTo(folder, 100, "a", "b", "c")
	if r := compare(folder, long); !r.result.Good || r.result.Older[0].Signatures != 3 {
		t.Errorf("the first comparison: %+v", r.result)
	}
	if r := compare(folder, long); !r.result.Good {
		t.Errorf("nothing new: %+v", r.result)
	}
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	same := func(what string) {
		t.Helper()
		if now, err := os.ReadFile(file); err != nil || string(now) != string(before) {
			t.Errorf("%s: the mark was brought forward (%v)", what, err)
		}
	}
	appendTo(folder, 100, "d")
	r := compare(folder, long)
	if r.result.Good || len(r.result.Unlogged) != 1 || r.result.Unlogged[0].Digest != digestText("d") {
		t.Errorf("a line since the mark that is older than the log: %+v", r.result)
	}
	same("a line without an event")
	// Another journal with as many lines.
	exchanged := t.TempDir()
	appendTo(exchanged, 100, "e", "f", "g", "h")
	if r := compare(exchanged, long); r.result.Good || !strings.Contains(fmt.Sprint(r.result.Journals), "exchanged") {
		t.Errorf("an exchanged journal: %+v", r.result)
	}
	cut := t.TempDir()
	appendTo(cut, 100, "a")
	if r := compare(cut, long); r.result.Good || !strings.Contains(fmt.Sprint(r.result.Journals), "cut off") {
		t.Errorf("a journal that was cut off: %+v", r.result)
	}
	name := filesOf(t, cut)[0]
	if err := os.Rename(filepath.Join(cut, name), filepath.Join(cut, "b"+name[4:])); err != nil {
		t.Fatal(err)
	}
	if r := compare(cut, long); r.result.Good || !strings.Contains(fmt.Sprint(r.result.Journals), "missing") {
		t.Errorf("a journal that is missing: %+v", r.result)
	}
	same("another journal")
	// A flood of signatures drops the oldest files. At first, the last line of the mark goes.
	for n := range 40 {
		appendTo(folder, 3, fmt.Sprint("flood ", n))
	}
	r = compare(folder, long)
	if r.result.Good || !strings.Contains(fmt.Sprint(r.result.Journals), "were dropped, and no") {
		t.Errorf("a flood: %+v", r.result)
	}
	same("a flood")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if r := compare(folder, long); !r.result.Good || r.result.Journals[0].First == 0 {
		t.Errorf("a comparison without a mark: %+v", r.result)
	}
	// The file with the mark's last line was dropped, and nothing of after the mark.
	folder = t.TempDir()
	one := journal.Config{Folder: folder, Token: "main", Size: 1, Files: 1}
	add := func(text string) {
		t.Helper()
		w := journal.New(one)
		defer w.Close()
		if err := w.Append(document(text)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	none := audit.Report{}
	for _, text := range []string{"a", "b", "c"} {
		add(text)
		r := read(folder)
		if err := r.follow()(0, admitted(text)); err != nil {
			t.Fatal(err)
		}
		r.finish(none)
		if err := r.writeMark(file); err != nil {
			t.Fatal(err)
		}
		if !r.result.Good {
			t.Errorf("after %s: %+v", text, r.result)
		}
	}
	add("d")
	add("e")
	if r := compare(folder, none); r.faults != 1 {
		t.Errorf("a line was dropped: %+v", r.result.Journals)
	}
}

// TestKnownFaults: a fault that the last comparison has told is told again, and fails no more.
func TestKnownFaults(t *testing.T) {
	folder, file := t.TempDir(), filepath.Join(t.TempDir(), "mark")
	config := journal.Config{Folder: folder, Token: "main", Size: 1 << 20, Files: 2}
	add := func() {
		w := journal.New(config)
		defer w.Close()
		if err := w.Append(document("a")); err != nil {
			t.Fatal(err)
		}
	}
	add()
	f, err := os.OpenFile(filepath.Join(folder, filesOf(t, folder)[0]), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("half a line"); err != nil {
		t.Fatal(err)
	}
	f.Close()
	add()
	for i, want := range []bool{false, true} {
		r := new(reconciler)
		if err := r.readMark(file); err != nil {
			t.Fatal(err)
		}
		if err := r.read(folder); err != nil {
			t.Fatal(err)
		}
		each := r.follow()
		if err := each(0, admitted("a")); err != nil {
			t.Fatal(err)
		}
		r.finish(audit.Report{Events: 1})
		if err := r.writeMark(file); err != nil {
			t.Fatal(err)
		}
		if r.result.Good != want || len(r.result.Journals[0].Faults) != 1 {
			t.Errorf("comparison %d: good %v, %q", i, r.result.Good, r.result.Journals[0].Faults)
		}
	}
}

func digestText(text string) string {
	d := digestOf(text)
	return hex.EncodeToString(d[:])
}

func filesOf(t *testing.T, folder string) (names []string) {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(folder, "*.journal"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range all {
		names = append(names, filepath.Base(path))
	}
	slices.Sort(names)
	return names
}
