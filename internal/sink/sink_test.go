package sink

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/ledger/disktest"
	"countersign/internal/ledger/ledgertest"
	"countersign/internal/scantest"
	"countersign/internal/secret"
	"countersign/internal/webhook"
)

func open(t *testing.T) *ledger.Ledger {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ledger")
	if err := ledger.Create(path, ledger.Options{}); err != nil {
		t.Fatal(err)
	}
	l, err := ledgertest.Open(t, path, ledger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// add appends n events of a type with an age.
func add(t *testing.T, l *ledger.Ledger, n int, e audit.Event, age time.Duration) {
	t.Helper()
	for range n {
		if _, err := l.Append(t.Context(), ledger.NewEvent(e.Encode(time.Now().Add(-age)))); err != nil {
			t.Fatal(err)
		}
	}
}

func config(t testing.TB) Config {
	return Config{
		Name: "siem", Kind: "file", MaxAge: 24 * time.Hour, State: filepath.Join(t.TempDir(), "positions", "siem"),
		Log: scantest.Log(),
	}
}

// deliver makes steps until nothing waits.
func deliver(t *testing.T, s *Sink) {
	t.Helper()
	if err := s.resume(); err != nil {
		t.Fatal(err)
	}
	for more := true; more; {
		var err error
		if more, err = s.step(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// indexes returns the numbers of the events of a file, and -1 for a gap.
func indexes(t *testing.T, path string) (all []int) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var l lastLine
		if err := json.Unmarshal([]byte(line), &l); err != nil || !strings.HasSuffix(line, "\n") {
			t.Fatalf("%q: %v", line, err)
		}
		if l.Index == nil {
			all = append(all, -1)
		} else {
			all = append(all, int(*l.Index))
		}
	}
	return all
}

func upTo(n int) (all []int) {
	for i := range n {
		all = append(all, i)
	}
	return all
}

// TestFileHasEachEventOnce ends the sink at each possible moment: with a position that is not
// written, and with a line that is written in part. The file has each event once.
func TestFileHasEachEventOnce(t *testing.T) {
	l, c := open(t), config(t)
	path := filepath.Join(t.TempDir(), "events.jsonl")
	add(t, l, 10, audit.NewStarted(), 0)
	s := New(c, l, &File{Path: path, Size: 1 << 20, Files: 3})
	deliver(t, s)
	s.to.Close() // a crash: no position
	add(t, l, 10, audit.NewStopped(), 0)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for cut := range 200 {
		if err := os.WriteFile(path, b[:len(b)-cut], 0o600); err != nil {
			t.Fatal(err)
		}
		s := New(c, l, &File{Path: path, Size: 1 << 20, Files: 3})
		deliver(t, s)
		s.to.Close()
		if got := indexes(t, path); !slices.Equal(got, upTo(21)) {
			t.Fatalf("%d bytes are cut off: the file has %v", cut, got)
		}
	}
}

// TestRotationLosesNothing writes more events than a file takes.
func TestRotationLosesNothing(t *testing.T) {
	l, c := open(t), config(t)
	path := filepath.Join(t.TempDir(), "events.jsonl")
	var all []int
	for range 10 {
		add(t, l, 10, audit.NewStarted(), 0)
		s := New(c, l, &File{Path: path, Size: 2000, Files: 100}) // a restart without a position
		deliver(t, s)
		s.to.Close()
	}
	f := &File{Path: path, Files: 100}
	for _, old := range append(f.renamed(), path) {
		all = append(all, indexes(t, old)...)
	}
	if !slices.Equal(all, upTo(101)) || len(f.renamed()) < 3 {
		t.Errorf("%d renamed files, events %v", len(f.renamed()), all)
	}
	if err := os.Remove(path); err != nil { // a crash after the renaming
		t.Fatal(err)
	}
	s := New(c, l, &File{Path: path, Size: 2000, Files: 2})
	for range 2 {
		add(t, l, 20, audit.NewStarted(), 0)
		deliver(t, s)
	}
	s.to.Close()
	if n := len(f.renamed()); n > 2 {
		t.Errorf("%d renamed files are kept, want 2", n)
	}
}

// TestForeignFileIsKept checks that a file with other content is neither cut nor continued.
func TestForeignFileIsKept(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events.jsonl")
	const foreign = "my diary\n"
	if err := os.WriteFile(path, []byte(foreign), 0o600); err != nil {
		t.Fatal(err)
	}
	f := &File{Path: path, Size: 1 << 20, Files: 3}
	if _, err := f.Resume(); err == nil {
		t.Error("the file is accepted")
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != foreign {
		t.Errorf("the file has %q, %v", b, err)
	}
}

// away is a receiver that is away until it is back, and remembers what it gets.
type away struct {
	back   bool
	events []uint64
	gaps   []Gap
}

var errAway = errors.New("the receiver is away")

func (a *away) Deliver(_ context.Context, b Batch) error {
	if !a.back {
		return errAway
	}
	for _, r := range b.Events {
		a.events = append(a.events, r.Index)
	}
	a.gaps = append(a.gaps, b.Gaps...)
	return nil
}

func (*away) Resume() (uint64, error) { return 0, nil }
func (*away) Close() error            { return nil }

// TestAwayForDays checks that a receiver that was away gets the events of MaxAge, and the numbers
// of the others, also after a restart meanwhile.
func TestAwayForDays(t *testing.T) {
	l, c := open(t), config(t)
	to := &away{back: true}
	s := New(c, l, to)
	deliver(t, s)
	s.keep()
	to.back = false
	add(t, l, 5, audit.NewStarted(), 72*time.Hour)
	add(t, l, 5, audit.NewStopped(), time.Hour)
	if _, err := s.step(t.Context()); !errors.Is(err, errAway) {
		t.Fatal(err)
	}
	s.keep()
	s = New(c, l, to) // a restart
	if _, err := s.step(t.Context()); !errors.Is(err, errAway) {
		t.Fatal(err)
	}
	to.back, to.events = true, nil
	deliver(t, s)
	st := s.Status()
	if !slices.Equal(to.events, []uint64{6, 7, 8, 9, 10}) || st.Dropped != 5 || st.Behind != 0 || len(to.gaps) != 1 ||
		to.gaps[0].From != 1 || to.gaps[0].Before != 6 || to.gaps[0].Why != TooOld {
		t.Errorf("events %v, gaps %+v, status %+v", to.events, to.gaps, st)
	}
	var found []uint64
	if err := l.Events(st.Gaps[0].From, func(index uint64, _ []byte) bool {
		found = append(found, index)
		return index+1 < st.Gaps[0].Before
	}); err != nil || !slices.Equal(found, []uint64{1, 2, 3, 4, 5}) {
		t.Errorf("the events of the gap: %v, %v", found, err)
	}
	deliver(t, s)
	if len(to.gaps) != 1 {
		t.Errorf("the gap is told again: %+v", to.gaps)
	}
}

// TestRetentionIsFaster has retention drop events that a receiver was not there for. The receiver
// gets their numbers, apart from those of the events that were too old and still are in the log.
func TestRetentionIsFaster(t *testing.T) {
	l, c := open(t), config(t)
	to := &away{back: true}
	s := New(c, l, to)
	deliver(t, s)
	to.back = false
	add(t, l, 5, audit.NewStarted(), 72*time.Hour)
	endEpoch(t, l)
	dropped := ledger.NewEvent(audit.NewStopped().Encode(time.Now().Add(-72 * time.Hour)))
	if err := l.Drop(t.Context(), 0, dropped); err != nil {
		t.Fatal(err)
	}
	add(t, l, 2, audit.NewStarted(), 48*time.Hour)
	add(t, l, 1, audit.NewStarted(), 0)
	for range 3 { // tries, with a restart
		if _, err := s.step(t.Context()); !errors.Is(err, errAway) {
			t.Fatal(err)
		}
		s.keep()
		s = New(c, l, to)
	}
	to.back, to.events, to.gaps = true, nil, nil
	deliver(t, s)
	_, first, _ := l.Head()
	var gone, told uint64
	for i, g := range to.gaps {
		if told += g.Before - g.From; g.Why == Dropped {
			gone += g.Before - g.From
		}
		if i > 0 && to.gaps[i-1].Before != g.From {
			t.Errorf("the gaps are not all: %+v", to.gaps)
		}
	}
	st := s.Status()
	if gone != first-1 || told != st.Dropped || st.Behind != 0 || told+st.Sent != st.Next {
		t.Errorf("%d events of %d dropped ones are told; gaps %+v, status %+v", gone, first-1, to.gaps, st)
	}
}

func endEpoch(t *testing.T, l *ledger.Ledger) {
	t.Helper()
	epoch, _, tree := l.Head()
	if _, err := l.EndEpoch(t.Context(), audit.Daemon()); err != nil {
		t.Fatal(err)
	}
	if err := l.SetCheckpoint(t.Context(), epoch, tree.Size, []byte("a checkpoint")); err != nil {
		t.Fatal(err)
	}
}

// TestFullDisk has the disk of a file sink fill up within a write, and within a sync. Lines that
// are written in part are removed, and after the disk has room again each event is in the file
// once.
func TestFullDisk(t *testing.T) {
	disk := disktest.New(t)
	l, c := open(t), config(t)
	path := filepath.Join(disk.Dir(), "events.jsonl")
	s := New(c, l, &File{Path: path, Size: 1 << 20, Files: 3})
	deliver(t, s)
	for _, kind := range []disktest.Kind{disktest.Write, disktest.Sync} {
		disk.Fail(func(op disktest.Op) syscall.Errno {
			if op.Kind == kind {
				return syscall.ENOSPC
			}
			return 0
		})
		add(t, l, 3, audit.NewStarted(), 0)
		for range 2 {
			if _, err := s.step(t.Context()); !errors.Is(err, syscall.ENOSPC) {
				t.Fatalf("a full disk: %v", err)
			}
		}
		disk.Fail(nil)
		deliver(t, s)
	}
	if got, st := indexes(t, path), s.Status(); !slices.Equal(got, upTo(7)) || st.Dropped != 0 || st.Behind != 0 {
		t.Errorf("the file has %v, %+v", got, st)
	}
}

func TestMain(m *testing.M) {
	disktest.Serve()
	os.Exit(scantest.Run(m))
}

// TestFilter checks that types that are left out move the position on.
func TestFilter(t *testing.T) {
	for _, only := range []bool{true, false} {
		l, c := open(t), config(t)
		if only {
			c.Types = []audit.Type{audit.Stopped}
		} else {
			c.Except = []audit.Type{audit.Started, audit.EpochBegun}
		}
		add(t, l, 3, audit.NewStarted(), 0)
		add(t, l, 2, audit.NewStopped(), 0)
		add(t, l, 3, audit.NewStarted(), 0)
		to := &away{back: true}
		s := New(c, l, to)
		deliver(t, s)
		st := s.Status()
		if !slices.Equal(to.events, []uint64{4, 5}) || st.Behind != 0 || st.Dropped != 0 || st.Sent != 2 {
			t.Errorf("events %v, status %+v", to.events, st)
		}
	}
}

// TestPositionIsNeverAhead damages and removes the position, and puts an older ledger in its place.
// No event is lost.
func TestPositionIsNeverAhead(t *testing.T) {
	l, c := open(t), config(t)
	add(t, l, 5, audit.NewStarted(), 0)
	for name, content := range map[string]string{
		"damaged": `{"next":`, "empty": "", "ahead": `{"next":1000}`, "negative": `{"next":-1}`,
	} {
		if err := os.MkdirAll(filepath.Dir(c.State), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(c.State, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		to := &away{back: true}
		deliver(t, New(c, l, to))
		if !slices.Equal(to.events, []uint64{0, 1, 2, 3, 4, 5}) {
			t.Errorf("%s: events %v", name, to.events)
		}
	}
}

// TestPositionIsNotWritten checks that a sink goes on without a disk for its position, and says so.
func TestPositionIsNotWritten(t *testing.T) {
	l, c := open(t), config(t)
	if err := os.WriteFile(filepath.Dir(c.State), nil, 0o600); err != nil { // a file in the folder's place
		t.Fatal(err)
	}
	to := &away{back: true}
	s := New(c, l, to)
	deliver(t, s)
	s.keep()
	if st := s.Status(); st.Unkept == nil || len(to.events) != 1 {
		t.Errorf("status %+v, events %v", st, to.events)
	}
	if err := os.Remove(filepath.Dir(c.State)); err != nil {
		t.Fatal(err)
	}
	s.keep()
	if st := s.Status(); st.Unkept != nil {
		t.Errorf("%v stays after the disk is back", st.Unkept)
	}
}

// TestLargeBacklog checks that a batch has a bounded size.
func TestLargeBacklog(t *testing.T) {
	l, c := open(t), config(t)
	e := audit.NewLegalHoldSet(audit.Daemon(), 0, "case", strings.Repeat("x", 2000))
	if err := l.Update(t.Context(), func(tx *ledger.Tx) error {
		for range 700 {
			if err := tx.Append(ledger.NewEvent(e.Encode(time.Now()))); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	to := &away{back: true}
	s := New(c, l, to)
	more, err := s.step(t.Context())
	if err != nil || !more || len(to.events) > 600 {
		t.Errorf("a batch of %d events, more %v, %v", len(to.events), more, err)
	}
	deliver(t, s)
	if len(to.events) != 701 {
		t.Errorf("%d events", len(to.events))
	}
}

// authority returns a certificate for 127.0.0.1 and the path of its PEM.
func authority(t testing.TB) (tls.Certificate, string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "ca.pem")
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, path
}

// readFrame reads one message of RFC 5425.
func readFrame(r *bufio.Reader) (string, error) {
	text, err := r.ReadString(' ')
	if err != nil {
		return "", err
	}
	n, err := strconv.Atoi(strings.TrimSpace(text))
	if err != nil {
		return "", err
	}
	b := make([]byte, n)
	_, err = io.ReadFull(r, b)
	return string(b), err
}

// TestSyslog checks the messages that a server gets, a server that ends a connection, and a server
// with a certificate of another authority.
func TestSyslog(t *testing.T) {
	certificate, ca := authority(t)
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{certificate}})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	messages, hang := make(chan string, 100), make(chan net.Conn, 10)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			hang <- conn
			go func() {
				r := bufio.NewReader(conn)
				for {
					m, err := readFrame(r)
					if err != nil {
						return
					}
					messages <- m
				}
			}()
		}
	}()
	l, c := open(t), config(t)
	add(t, l, 1, audit.NewLegalHoldSet(audit.Daemon(), 0, "case", `a "quoted" ] reason`).AsRejected("refused"), 0)
	s := New(c, l, &Syslog{Address: listener.Addr().String(), CAFile: ca, Host: "host 1", LogID: "0123456789abcdef"})
	defer s.to.Close()
	deliver(t, s)
	first, second := <-messages, <-messages
	want := `countersign 0123456789abcdef EpochBegun - {"index":0,"time_ms":`
	if !strings.Contains(first, want) ||
		!strings.HasPrefix(first, "<110>1 20") || !strings.Contains(first, " host1 countersign ") {
		t.Errorf("message %q", first)
	}
	if !strings.HasPrefix(second, "<108>1 ") {
		t.Errorf("message %q of a refusal", second)
	}
	_, line, _ := strings.Cut(first, " - ")
	if err := l.Events(0, func(_ uint64, entry []byte) bool {
		if line != `{"index":0,`+string(entry[1:]) {
			t.Errorf("the message %q is not the event %s", line, entry)
		}
		return false
	}); err != nil {
		t.Error(err)
	}

	(<-hang).Close() // the server ends; the next events reach a new connection
	<-s.to.(*Syslog).closed
	add(t, l, 1, audit.NewStarted(), 0)
	deliver(t, s)
	if m := <-messages; !strings.Contains(m, `{"index":2,`) {
		t.Errorf("after the end of a connection: %q", m)
	}

	_, other := authority(t)
	s = New(c, l, &Syslog{Address: listener.Addr().String(), CAFile: other})
	if _, err := s.step(t.Context()); err == nil || s.Status().Sent != 0 {
		t.Errorf("a server with a certificate of another authority: %v", err)
	}
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	s = New(c, l, &Syslog{Address: "localhost:" + port, CAFile: ca})
	if _, err := s.step(t.Context()); err == nil || s.Status().Sent != 0 {
		t.Errorf("a server with a certificate for another name: %v", err)
	}
}

// TestSyslogServerThatDoesNotRead checks that a batch is taken only if the server has acknowledged
// all of it, and that the sink is not blocked for longer than an attempt.
func TestSyslogServerThatDoesNotRead(t *testing.T) {
	certificate, ca := authority(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			conn.(*net.TCPConn).SetReadBuffer(4096)
			secured := tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{certificate}})
			secured.Handshake() // and reads nothing
			t.Cleanup(func() { conn.Close() })
		}
	}()
	l, c := open(t), config(t)
	s := New(c, l, &Syslog{Address: listener.Addr().String(), CAFile: ca})
	defer s.to.Close()
	large := audit.NewLegalHoldSet(audit.Daemon(), 0, "case", strings.Repeat("x", 2000))
	for range 8 {
		group := make([]ledger.Event, 0, 60)
		for range cap(group) {
			group = append(group, ledger.NewEvent(large.Encode(time.Now())))
		}
		if err := l.Update(t.Context(), func(tx *ledger.Tx) error {
			for _, e := range group {
				if err := tx.Append(e); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := s.step(ctx); err == nil || s.Status().Sent != 0 {
		t.Errorf("a batch that the server has not read counts as taken: %v, %+v", err, s.Status())
	}
}

// TestWebhookSink checks the signature, the body, and that a batch that was refused is sent again
// with the same id.
func TestWebhookSink(t *testing.T) {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	var bodies [][]byte
	status := http.StatusServiceUnavailable
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err == nil {
			err = webhook.Verify(public, r.Header, b, time.Now(), webhook.Tolerance)
		}
		if err != nil {
			t.Error(err)
		}
		ids, bodies = append(ids, r.Header.Get("Webhook-Id")), append(bodies, b)
		w.WriteHeader(status)
	}))
	defer server.Close()
	sender, err := webhook.New(webhook.Config{
		Targets: []webhook.Target{{Name: "siem", URL: secret.Of(server.URL)}}, Log: scantest.Log(),
		Sign: func(_ context.Context, m []byte) ([]byte, error) { return ed25519.Sign(private, m), nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	l, c := open(t), config(t)
	add(t, l, 2, audit.NewStarted(), 0)
	s := New(c, l, &Webhook{Name: "siem", LogID: "0123456789abcdef", Sender: sender})
	if _, err := s.step(t.Context()); err == nil || s.Status().Behind != 3 {
		t.Errorf("a refused message: %v, %+v", err, s.Status())
	}
	status = http.StatusOK
	deliver(t, s)
	if want := "events_0123456789abcdef_siem_0_2"; len(ids) != 2 || ids[0] != want || ids[1] != want {
		t.Errorf("the ids are %v", ids)
	}
	var body struct {
		Type string
		Data struct{ Events []struct{ Index uint64 } }
	}
	err = json.Unmarshal(bodies[1], &body)
	if err != nil || body.Type != "audit.events" || len(body.Data.Events) != 3 ||
		body.Data.Events[2].Index != 2 || bytes.Contains(bodies[1], []byte("gaps")) {
		t.Errorf("the body is %s, %v", bodies[1], err)
	}
}

// TestRunEnds checks that Run sends what is in the log, ends with its context, and keeps the
// position.
func TestRunEnds(t *testing.T) {
	l, c := open(t), config(t)
	path := filepath.Join(t.TempDir(), "events.jsonl")
	s := New(c, l, &File{Path: path, Size: 1 << 20, Files: 1})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); s.Run(ctx) }()
	for s.Status().Behind > 0 {
		select {
		case <-t.Context().Done():
			t.Fatal(fmt.Sprint(s.Status()))
		default:
		}
	}
	cancel()
	<-done
	if at := New(c, l, &File{Path: path}).Status().Next; at != 1 {
		t.Errorf("the position is %d, want 1", at)
	}
}
