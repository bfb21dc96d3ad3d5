package audit_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"countersign/audit"
)

// The tests in this file are attacks by an operator who has the files of the log, and in some tests
// the log's key. Verify must find each attack.

// wrongEvent returns the number of the event that an error of Verify names, or -1.
func wrongEvent(err error) int64 {
	var wrong *audit.Wrong
	if errors.As(err, &wrong) {
		return int64(wrong.Event)
	}
	return -1
}

// TestFirstWrong checks that Verify names the first wrong event, for changes in each kind of file
// and even if a later event breaks a rule.
func TestFirstWrong(t *testing.T) {
	m := newMemory(t)
	m.epoch(t, signatures(333, 1, 0)...) // 667 events in bundles of 256, 256, 155
	m.epoch(t)
	const (
		entries0    = "epochs/0/tile/entries/000"
		entries1    = "epochs/0/tile/entries/001"
		entries2    = "epochs/0/tile/entries/002.p/155"
		leaves1     = "epochs/0/tile/0/001"
		leaves2     = "epochs/0/tile/0/002.p/155"
		nodes       = "epochs/0/tile/1/000.p/2"
		nextEntries = "tile/entries/000.p/1" // of the next epoch
	)
	edit := func(m *memory, name string, oldNonce, newNonce int) {
		nonce := func(n int) []byte { return fmt.Appendf(nil, `"nonce":"%064x"`, n) }
		b, ok := m.files[name]
		if !ok || !bytes.Contains(b, nonce(oldNonce)) {
			t.Fatalf("%s has no nonce %d", name, oldNonce)
		}
		m.files[name] = bytes.Replace(b, nonce(oldNonce), nonce(newNonce), 1)
	}
	flipByte := func(m *memory, name string, at int) { m.files[name] = flip(m.files[name], at) }
	for name, c := range map[string]struct {
		want int64 // number of the wrong event
		do   func(m *memory)
	}{
		"a nonce made that of a later event": {1, func(m *memory) { edit(m, entries0, 1, 2) }},
		"in a bundle that is not full":       {513, func(m *memory) { edit(m, entries2, 257, 258) }},
		"a length":                           {0, func(m *memory) { flipByte(m, entries0, 1) }},
		"a later length":                     {512, func(m *memory) { flipByte(m, entries2, 0) }},
		"an entry and its tile": {256, func(m *memory) {
			edit(m, entries1, 140, 999)
			flipByte(m, leaves1, 23*32)
		}},
		"a tile":              {256 + 23, func(m *memory) { flipByte(m, leaves1, 23*32) }},
		"a tile of tiles":     {256, func(m *memory) { flipByte(m, nodes, 33) }},
		"a bundle is missing": {256, func(m *memory) { delete(m.files, entries1) }},
		"a tile is missing":   {512, func(m *memory) { delete(m.files, leaves2) }},
		"a bundle twice":      {256, func(m *memory) { m.files[entries1] = m.files[entries0] }},
		"two bundles swapped": {0, func(m *memory) {
			m.files[entries1], m.files[entries0] = m.files[entries0], m.files[entries1]
		}},
		"an entry is too many": {511, func(m *memory) {
			m.files[entries1] = append(bytes.Clone(m.files[entries1]), 0, 0)
		}},
		"a bundle is cut off": {511, func(m *memory) {
			m.files[entries1] = m.files[entries1][:len(m.files[entries1])-1]
		}},
		"a bundle is empty":                        {512, func(m *memory) { m.files[entries2] = nil }},
		"a tile of the wrong width":                {512, func(m *memory) { m.files[leaves2] = m.files[leaves1] }},
		"the first of the next epoch":              {667, func(m *memory) { flipByte(m, nextEntries, 20) }},
		"the first of the next epoch has no place": {667, func(m *memory) { m.files[nextEntries] = m.files[entries0] }},
	} {
		spoilt := *m
		spoilt.files = maps.Clone(m.files)
		c.do(&spoilt)
		if _, err := spoilt.verify(audit.VerifyOptions{}); wrongEvent(err) != c.want {
			t.Errorf("%s: %v, want event %d", name, err, c.want)
		}
	}
	// Every byte of the entries of a small log.
	m = newMemory(t)
	m.epoch(t, signatures(2, 1, 0)...)
	name := "tile/entries/000.p/5"
	whole := m.files[name]
	event, end := int64(-1), 0
	for i := range whole {
		if i == end {
			event, end = event+1, i+2+int(whole[i])<<8+int(whole[i+1])
		}
		m.files[name] = flip(whole, i)
		if _, err := m.verify(audit.VerifyOptions{}); wrongEvent(err) != event {
			t.Fatalf("byte %d of event %d: %v", i, event, err)
		}
	}
}

// flip returns a copy with the lowest bit of one byte flipped.
func flip(b []byte, at int) []byte {
	b = bytes.Clone(b)
	b[at] ^= 1
	return b
}

// TestHostileRules verifies events with the signature of the log's own key: events that no correct
// ledger writes, and similar events that a correct ledger does write.
func TestHostileRules(t *testing.T) {
	admission := encode(admitted(0, 1)) // event 1 in most cases
	signature := encode(created(1, 1))
	failed := func(second int, admission uint64) audit.Event {
		e := created(second, admission)
		e.Type, e.Outcome = audit.SignatureFailed, "unavailable"
		return e
	}
	failure := encode(failed(1, 1))
	later := func(e audit.Event, d time.Duration) []byte { e.TimeMS += d.Milliseconds(); return encode(e) }
	expiring := func(second, nonce, expires int) []byte {
		return changed(admitted(second, nonce), func(e *audit.Event) {
			e.Metadata["expires_at"] = strconv.Itoa(noon + expires)
		})
	}
	ofType := func(kind audit.Type) func(*audit.Event) { return func(e *audit.Event) { e.Type = kind } }
	madeAs := func(kind audit.Type) []byte { return changed(created(1, 1), ofType(kind)) }
	failedPayment := changed(failed(1, 1), ofType(audit.PaymentFailed))
	outcome := func(text string) func(*audit.Event) { return func(e *audit.Event) { e.Outcome = text } }
	document := func(transcript string) []byte {
		return changed(admitted(0, 1), func(e *audit.Event) { e.Metadata["transcript"] = transcript })
	}
	capitals := func(e *audit.Event) { e.Metadata["nonce"] = strings.ToUpper(e.Metadata["nonce"]) }
	daemons := func(e audit.Event) []byte {
		e.Actor, e.Outcome = audit.Daemon(), "ok"
		return encode(e)
	}
	subscription := document("paykit-subscription-v2")
	tick := daemons(audit.Event{TimeMS: at(9000 * 3600).UnixMilli(), Type: audit.Started, Action: "serve"})
	epoch := daemons(audit.Event{TimeMS: 1, Type: audit.EpochBegun, Action: "epoch", Resource: "epoch/1"})
	type list [][]byte
	for name, c := range map[string]struct {
		wrong     int64  // number of the wrong event; -1: the log is valid
		unsettled uint64 // admissions without an outcome in a valid log
		events    list
	}{
		// Changes of the clock. A tick is an event more than a year later.
		"the clock leaps between admission and outcome": {-1, 0, list{admission, later(created(0, 1), 9000*time.Hour)}},
		"the clock leaps and comes back":                {-1, 0, list{admission, tick, signature}},
		"time leaps to forget a nonce, and comes back":  {3, 0, list{admission, tick, encode(admitted(1, 1))}},
		"the same in two leaps": {7, 0, list{
			admission, tick, encode(admitted(5, 2)), encode(admitted(3600*5, 3)),
			tick, encode(admitted(6, 4)), encode(admitted(7, 3)),
		}},
		"time leaps, and a nonce recurs after expiry": {-1, 2, list{admission, tick, encode(admitted(3*3600, 1))}},
		"two nonces, of which the later is nearer": {4, 0, list{
			expiring(0, 1, 7200*10), expiring(0, 2, 60), tick, expiring(3600*5, 1, 3600*6),
		}},
		"back in two steps, the later one further": {4, 0, list{
			expiring(0, 1, 4*3600), tick, encode(admitted(5*3600, 2)), expiring(3*3600, 1, 9*3600),
		}},
		"again after its expiry, and once more": {4, 0, list{
			expiring(0, 1, 3600), expiring(2*3600, 1, 10*3600),
			encode(admitted(3*3600, 2)), expiring(4*3600, 1, 10*3600),
		}},
		"an expired document":            {1, 0, list{expiring(0, 1, -2*3600)}},
		"a document that lives for ever": {1, 0, list{expiring(0, 1, 1<<40)}},
		"a nonce in capitals":            {1, 0, list{changed(admitted(0, 0xabc), capitals)}},

		"a message that fails as a payment":     {2, 0, list{admission, failedPayment}},
		"a failure that is ok":                  {2, 0, list{admission, changed(failed(1, 1), outcome("ok"))}},
		"a signature that is not ok":            {2, 0, list{admission, changed(created(1, 1), outcome("denied"))}},
		"an admission that is not ok":           {1, 0, list{changed(admitted(0, 1), outcome("denied"))}},
		"a failure only":                        {-1, 0, list{admission, failure}},
		"two failures":                          {-1, 0, list{admission, failure, failure}},
		"a failure after the signature":         {3, 0, list{admission, signature, failure}},
		"a payment without its initiation":      {2, 0, list{admission, madeAs(audit.PaymentCompleted)}},
		"a payment admitted as a message":       {1, 0, list{document("payment-request-v1")}},
		"a subscription":                        {-1, 0, list{subscription, madeAs(audit.SubscriptionCreated)}},
		"a subscription that ends as a message": {2, 0, list{subscription, signature}},
		"an admission without a version": {1, 0, list{
			changed(admitted(0, 1), func(e *audit.Event) { e.Resource = "payments" }),
		}},
		"verified without a signer": {1, 0, list{changed(admitted(0, 1), ofType(audit.SignatureVerified))}},

		"an epoch within an epoch":            {1, 0, list{epoch}},
		"an epoch dropped that has not ended": {1, 0, list{retained(0, audit.Hash{})}},
		"an epoch dropped that never was":     {1, 0, list{retained(7, audit.Hash{})}},
	} {
		m := newMemory(t)
		m.epoch(t, c.events...)
		r, err := m.verify(audit.VerifyOptions{})
		if wrongEvent(err) != c.wrong || c.wrong < 0 && (err != nil || r.Unsettled != c.unsettled) {
			t.Errorf("%s: %v, %d unsettled, want event %d and %d", name, err, r.Unsettled, c.wrong, c.unsettled)
		}
	}
}

// retained returns the event about a dropped epoch.
func retained(epoch int, root audit.Hash) []byte {
	return encode(audit.Event{
		TimeMS: at(0).UnixMilli(), Type: audit.RetentionApplied, Actor: audit.Daemon(),
		Action: "retention", Resource: fmt.Sprintf("epoch/%d", epoch), Outcome: "ok",
		Metadata: map[string]string{"root": root.String()},
	})
}

// drop deletes the files of an epoch but its checkpoint, as retention does.
func (m *memory) drop(epoch int) {
	maps.DeleteFunc(m.files, func(name string, _ []byte) bool {
		return strings.HasPrefix(name, fmt.Sprintf("epochs/%d/tile/", epoch))
	})
}

// TestHostileEpochs replaces, removes and repeats whole epochs and their checkpoints.
func TestHostileEpochs(t *testing.T) {
	three := func() *memory {
		m := newMemory(t)
		for range 3 {
			m.epoch(t, signatures(200, m.events+1, 100*int(m.epochs))...)
		}
		return m
	}
	copyEpoch := func(m *memory, from, to int, with string) {
		for name, b := range maps.Clone(m.files) {
			if rest, ok := strings.CutPrefix(name, fmt.Sprintf("epochs/%d/%s", from, with)); ok {
				m.files[fmt.Sprintf("epochs/%d/%s%s", to, with, rest)] = b
			}
		}
	}
	foreign := newMemory(t)
	foreign.epoch(t, signatures(200, 50_000, 0)...)
	sign := func(m *memory, c audit.Checkpoint) []byte {
		text, err := m.log.Sign(c, m.sign)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	present := func(c audit.Checkpoint) func(*memory) {
		return func(m *memory) { m.files["checkpoint"] = sign(m, c) }
	}
	for name, do := range map[string]func(m *memory){
		"an epoch is missing":            func(m *memory) { m.drop(0) },
		"one in the middle":              func(m *memory) { m.drop(1) },
		"all but the last":               func(m *memory) { m.drop(0); m.drop(1) },
		"the first tile only":            func(m *memory) { delete(m.files, "epochs/0/tile/0/000") },
		"a final checkpoint is missing":  func(m *memory) { delete(m.files, "epochs/0/checkpoint") },
		"an epoch stands twice":          func(m *memory) { copyEpoch(m, 0, 1, "") },
		"one with the other's entries":   func(m *memory) { copyEpoch(m, 0, 1, "tile/") },
		"of another log of the same key": func(m *memory) { maps.Copy(m.files, onlyEpochs(foreign.files)) },
		"the end is an older one":        func(m *memory) { m.files["checkpoint"] = m.files["epochs/1/checkpoint"] },
		"a checkpoint of nothing":        present(audit.Checkpoint{Epoch: 2}),
		"a final one of nothing": func(m *memory) {
			m.files["epochs/0/checkpoint"] = sign(m, audit.Checkpoint{})
		},
		"the largest epoch": present(audit.Checkpoint{Epoch: 1<<32 - 1, Size: 1}),
		"the largest size":  present(audit.Checkpoint{Epoch: 2, Size: 1<<62 - 1}),
		"sizes whose sum is larger": func(m *memory) {
			for n := range uint32(3) {
				m.files[fmt.Sprintf("epochs/%d/checkpoint", n)] = sign(m, audit.Checkpoint{Epoch: n, Size: 1<<62 - 1})
			}
		},
		"a size one less than the bundle": func(m *memory) {
			m.files["checkpoint"] = sign(m, audit.Checkpoint{Epoch: 2, Size: 255, Root: m.last.Root})
		},
	} {
		m := three()
		do(m)
		if _, err := m.verify(audit.VerifyOptions{}); err == nil {
			t.Errorf("%s: it is believed", name)
		}
	}
	// An epoch without events that is otherwise valid.
	m := newMemory(t)
	m.epoch(t, signatures(200, 1, 0)...)
	m.put(t, nil)
	m.epoch(t)
	if _, err := m.verify(audit.VerifyOptions{}); err == nil {
		t.Error("an epoch without events: it is believed")
	}
	// An epoch that is dropped twice.
	m = newMemory(t)
	m.epoch(t)
	root := m.last.Root
	m.epoch(t, retained(0, root), retained(0, root))
	m.drop(0)
	if _, err := m.verify(audit.VerifyOptions{}); wrongEvent(err) != 3 {
		t.Errorf("an epoch that is dropped twice: %v", err)
	}
	// An event that breaks a rule, before an entry of the same bundle that was changed.
	m = newMemory(t)
	m.epoch(t, append([][]byte{encode(created(0, 17))}, signatures(50, 2, 0)...)...)
	m.files["tile/entries/000.p/102"] = flip(m.files["tile/entries/000.p/102"], 9000)
	if _, err := m.verify(audit.VerifyOptions{}); wrongEvent(err) != 1 {
		t.Errorf("event 1 is wrong and a later one was changed: %v", err)
	}
	// A log without its beginning: its first event claims that the log begins there.
	m = newMemory(t)
	m.events = 1 << 40
	m.epoch(t, encode(created(0, 17)))
	if _, err := m.verify(audit.VerifyOptions{}); wrongEvent(err) != 0 {
		t.Errorf("a log that begins with event 2^40: %v", err)
	}
	// Ended epochs that contradict an older checkpoint.
	m = three()
	for name, since := range map[string]audit.Checkpoint{
		"longer than the epoch":   {Epoch: 0, Size: 402, Root: audit.Hash{1}},
		"another end":             {Epoch: 0, Size: 401, Root: audit.Hash{1}},
		"another middle":          {Epoch: 1, Size: 300, Root: audit.Hash{1}},
		"of the last one":         {Epoch: 2, Size: 402, Root: audit.Hash{1}},
		"of an epoch after it":    {Epoch: 3, Size: 1, Root: audit.Hash{1}},
		"of the very last epoch ": {Epoch: 1<<32 - 1, Size: 1, Root: audit.Hash{1}},
	} {
		if _, err := m.verify(audit.VerifyOptions{Since: sign(m, since)}); err == nil {
			t.Errorf("an older checkpoint that is %s: the log is taken for its continuation", name)
		}
	}
}

func onlyEpochs(files map[string][]byte) map[string][]byte {
	files = maps.Clone(files)
	maps.DeleteFunc(files, func(name string, _ []byte) bool { return !strings.HasPrefix(name, "epochs/0/") })
	return files
}

// TestDroppedOneAfterTheOther drops five epochs in order. The event about a dropped epoch is in a
// later epoch, and is itself dropped with the later epoch.
func TestDroppedOneAfterTheOther(t *testing.T) {
	m := newMemory(t)
	var roots []audit.Hash
	for n := range 6 {
		var events [][]byte
		if n >= 2 {
			events = append(events, retained(n-2, roots[n-2]))
		}
		m.epoch(t, append(events, signatures(10, m.events+uint64(len(events))+1, 100*n)...)...)
		roots = append(roots, m.last.Root)
		if n >= 2 {
			m.drop(n - 2)
		}
		since := m.files["epochs/0/checkpoint"]
		r, err := m.verify(audit.VerifyOptions{Since: since})
		if err != nil || r.Dropped != max(0, n-1) || r.SinceDropped {
			t.Errorf("epoch %d: %+v, %v", n, r, err)
		}
	}
	older, err := m.log.Sign(audit.Checkpoint{Epoch: 0, Size: 3}, m.sign)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := m.verify(audit.VerifyOptions{Since: older}); err != nil || !r.SinceDropped {
		t.Errorf("%+v, %v: want SinceDropped for a checkpoint within a dropped epoch", r, err)
	}
	m.drop(4)
	if _, err := m.verify(audit.VerifyOptions{}); err == nil {
		t.Error("one more is missing, and that is believed")
	}
}

// TestWidths verifies trees whose last bundle, tile, or tile of tiles is just full or just not
// full.
func TestWidths(t *testing.T) {
	for _, n := range []int{1, 2, 255, 256, 257, 511, 512, 65_535, 65_536, 65_537, 65_792, 65_793} {
		m := newMemory(t)
		events := signatures((n-1)/2, 1, 0)
		if n%2 == 0 {
			events = append(events, encode(admitted(0, 999_999)))
		}
		m.epoch(t, events...)
		if r, err := m.verify(audit.VerifyOptions{Since: m.files["checkpoint"]}); err != nil || r.Events != uint64(n) {
			t.Errorf("%d events: %+v, %v", n, r, err)
		}
		for name := range m.files {
			// Large trees take long: only the partial files of two of them are changed.
			tooMany := n > 1000 && (n == 65_535 || n > 65_537 || !strings.Contains(name, ".p/"))
			if strings.HasPrefix(name, "epochs/") || tooMany {
				continue
			}
			whole := m.files[name]
			m.files[name] = flip(whole, len(whole)/2)
			if _, err := m.verify(audit.VerifyOptions{}); err == nil {
				t.Errorf("%d events: %s is believed after a change", n, name)
			}
			m.files[name] = whole
		}
	}
}

// TestFolderIsHostile checks that a name which is no regular file, and a file larger than MaxFile,
// are refused within 5 s.
func TestFolderIsHostile(t *testing.T) {
	m := newMemory(t)
	m.epoch(t, signatures(3, 1, 0)...)
	dir := t.TempDir()
	if _, err := audit.Mirror(t.Context(), m, m.log, dir, nil); err != nil {
		t.Fatal(err)
	}
	verify := func() error {
		_, err := m.log.Verify(t.Context(), audit.Folder(dir), audit.VerifyOptions{})
		return err
	}
	if err := verify(); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(dir, "tile/entries/000.p/7")
	for what, make := range map[string]func() error{
		"a device":      func() error { return os.Symlink("/dev/zero", name) },
		"a pipe":        func() error { return syscall.Mkfifo(name, 0o600) },
		"a folder":      func() error { return os.Mkdir(name, 0o700) },
		"a link to it":  func() error { return os.Symlink(name, name) },
		"a larger file": func() error { return errors.Join(os.WriteFile(name, nil, 0o600), os.Truncate(name, 1<<40)) },
	} {
		if err := errors.Join(os.Remove(name), make()); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if err := verify(); err == nil || time.Since(began) > 5*time.Second {
			t.Errorf("%s: %v after %v", what, err, time.Since(began))
		}
	}
}

// TestMeanwhile checks the errors of a log that changes during the reading: none names a wrong
// event. The present epoch ends, retention drops an epoch, or the source fails.
func TestMeanwhile(t *testing.T) {
	m := newMemory(t)
	m.epoch(t, signatures(300, 1, 0)...)
	reads := 0
	from := sourceFunc(func(ctx context.Context, name string) ([]byte, error) {
		if reads++; reads == 4 {
			m.epoch(t)
		}
		return m.ReadFile(ctx, name)
	})
	verify := func() error {
		_, err := m.log.Verify(t.Context(), from, audit.VerifyOptions{})
		return err
	}
	if err := verify(); err == nil || wrongEvent(err) >= 0 || !strings.Contains(err.Error(), "try again") {
		t.Errorf("%v", err)
	}
	if _, err := m.verify(audit.VerifyOptions{}); err != nil {
		t.Error(err)
	}
	reads = 0
	from = func(ctx context.Context, name string) ([]byte, error) {
		if reads++; reads == 8 {
			m.drop(0)
		}
		return m.ReadFile(ctx, name)
	}
	if err := verify(); err == nil || wrongEvent(err) >= 0 || !strings.Contains(err.Error(), "was dropped meanwhile") {
		t.Errorf("%v", err)
	}
	broken := errors.New("broken")
	from = func(ctx context.Context, name string) ([]byte, error) {
		if strings.HasPrefix(name, "tile/") {
			return nil, broken
		}
		return m.ReadFile(ctx, name)
	}
	if err := verify(); !errors.Is(err, broken) || wrongEvent(err) >= 0 {
		t.Errorf("an event is blamed for a failed read: %v", err)
	}
}

type sourceFunc func(context.Context, string) ([]byte, error)

func (f sourceFunc) ReadFile(ctx context.Context, name string) ([]byte, error) { return f(ctx, name) }

// TestMirrorAfterRetention updates a copy that has an epoch which retention has dropped since. The
// copy keeps the epoch.
func TestMirrorAfterRetention(t *testing.T) {
	m := newMemory(t)
	m.epoch(t, signatures(300, 1, 0)...)
	root := m.last.Root
	m.epoch(t)
	dir := t.TempDir()
	if _, err := audit.Mirror(t.Context(), m, m.log, dir, nil); err != nil {
		t.Fatal(err)
	}
	m.epoch(t, retained(0, root))
	m.drop(0)
	for _, dir := range []string{dir, t.TempDir()} {
		if _, err := audit.Mirror(t.Context(), m, m.log, dir, nil); err != nil {
			t.Fatal(err)
		}
		if _, err := m.log.Verify(t.Context(), audit.Folder(dir), audit.VerifyOptions{}); err != nil {
			t.Error(err)
		}
	}
	// A copy of one log is not updated from another log of the same key.
	other := newMemory(t)
	other.epoch(t, signatures(300, 2, 0)...)
	other.epoch(t, slices.Repeat([][]byte{encode(admitted(0, 1))}, 3)...)
	if _, err := audit.Mirror(t.Context(), other, other.log, dir, nil); err == nil {
		t.Error("two logs are mixed in one folder")
	}
}

// TestLongMetadata checks that a text of 140,000 bytes in the metadata is cut, so that the event
// fits into an entry of the log.
func TestLongMetadata(t *testing.T) {
	metadata := map[string]string{"cause": strings.Repeat("ü", 70_000), "other": "short"}
	e := audit.Event{
		Type: audit.DeviceUnavailable, Actor: audit.Daemon(),
		Action: "serve", Outcome: "unavailable", Metadata: metadata,
	}
	m := newMemory(t)
	m.epoch(t, e.Encode(at(0)))
	if _, err := m.verify(audit.VerifyOptions{}); err != nil {
		t.Error(err)
	}
	if len(metadata["cause"]) != 140_000 {
		t.Error("the caller's metadata was changed")
	}
}

// TestMirrorIsChecked damages each file of a copy in turn, as a crash, a full disk or a person may:
// the next export replaces the file. A source that sends something else is an error, and what it
// sent gets no name in the folder.
func TestMirrorIsChecked(t *testing.T) {
	m := newMemory(t)
	m.epoch(t, signatures(300, 1, 0)...)
	m.epoch(t, signatures(3, m.events+1, 100)...)
	dir := t.TempDir()
	mirror := func() error {
		_, err := audit.Mirror(t.Context(), m, m.log, dir, nil)
		return err
	}
	if err := mirror(); err != nil {
		t.Fatal(err)
	}
	if err := mirrored(dir); len(err) == 0 {
		t.Fatal("the copy has no files")
	}
	for name, whole := range mirrored(dir) {
		path := filepath.Join(dir, name)
		for what, damaged := range map[string][]byte{
			"empty": {}, "shorter": whole[:len(whole)/2], "longer": append(slices.Clone(whole), 0),
			"another": flip(whole, len(whole)/2), "missing": nil,
		} {
			if damaged == nil {
				os.Remove(path)
			} else if err := os.WriteFile(path, damaged, 0o644); err != nil {
				t.Fatal(err)
			}
			err := mirror()
			if strings.HasSuffix(name, "checkpoint") && what != "missing" {
				// A checkpoint is the trust in the copy: people look.
				if err == nil {
					t.Errorf("%s, %s: not noticed", name, what)
				}
				if err := os.WriteFile(path, whole, 0o644); err != nil {
					t.Fatal(err)
				}
				continue
			}
			now, _ := os.ReadFile(path)
			if err != nil || !bytes.Equal(now, whole) {
				t.Errorf("%s, %s: %v, and %d bytes for %d", name, what, err, len(now), len(whole))
			}
		}
	}
	for name, whole := range m.files {
		if !strings.HasPrefix(name, "epochs/") || name == "epochs/1/checkpoint" {
			continue // the other name of a file, by which the present epoch is not read
		}
		for what, sent := range map[string][]byte{"empty": {}, "another": flip(whole, len(whole)/2)} {
			dir := t.TempDir()
			m.files[name] = sent
			if _, err := audit.Mirror(t.Context(), m, m.log, dir, nil); err == nil {
				t.Errorf("the source's %s is %s: not noticed", name, what)
			}
			m.files[name] = whole
			if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
				t.Errorf("the source's %s is %s, and was kept", name, what)
			}
		}
	}
	if _, err := audit.Mirror(t.Context(), m, m.log, "", nil); err == nil {
		t.Error("a copy into a folder without a name")
	}
}

// TestMirrorIntoAnotherFolder: a folder with the names of a copy, which is no copy, stays as it is.
func TestMirrorIntoAnotherFolder(t *testing.T) {
	m := newMemory(t)
	m.epoch(t, signatures(3, 1, 0)...)
	for _, name := range []string{"checkpoint", "tile"} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, name), []byte("of somebody"), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := audit.Mirror(t.Context(), m, m.log, dir, nil); err == nil {
			t.Errorf("a copy into a folder with a %s", name)
		}
		if got := mirrored(dir); len(got) != 1 || string(got[name]) != "of somebody" {
			t.Errorf("%q", got)
		}
	}
}

// mirrored returns the files of a copy by their names, without links.
func mirrored(dir string) map[string][]byte {
	files := map[string][]byte{}
	filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			name, _ := filepath.Rel(dir, path)
			files[name], err = os.ReadFile(path)
		}
		return err
	})
	return files
}

// TestMirrorsAtOnce makes ten copies into one folder at the same time.
func TestMirrorsAtOnce(t *testing.T) {
	m := newMemory(t)
	m.epoch(t, signatures(300, 1, 0)...)
	dir := t.TempDir()
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			if _, err := audit.Mirror(t.Context(), m, m.log, dir, nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if _, err := m.log.Verify(t.Context(), audit.Folder(dir), audit.VerifyOptions{}); err != nil {
		t.Error(err)
	}
	for name := range mirrored(dir) {
		if strings.Contains(name, ".new") {
			t.Errorf("%s is left", name)
		}
	}
}
