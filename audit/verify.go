package audit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strconv"
)

// Wrong is the error of Verify for the first event that breaks a rule.
type Wrong struct {
	Event  uint64 // number of the event through all epochs
	Reason string
}

func (w *Wrong) Error() string { return fmt.Sprintf("event %d: %s", w.Event, w.Reason) }

// Report is the result of Verify for a valid log.
type Report struct {
	First      uint64     `json:"first"`   // number of the first event that is not dropped
	Events     uint64     `json:"events"`  // number of verified events
	FromMS     int64      `json:"from_ms"` // earliest time of a verified event, Unix milliseconds
	ToMS       int64      `json:"to_ms"`   // latest time of a verified event
	Epochs     int        `json:"epochs"`
	Dropped    int        `json:"dropped"`    // epochs that retention has dropped, according to the log itself
	Signatures uint64     `json:"signatures"` // each has its admission
	Unsettled  uint64     `json:"unsettled"`  // admissions without an outcome: assume that the signature exists
	Checkpoint Checkpoint `json:"-"`          // of the present epoch
	// SinceDropped is true if retention has dropped the epoch of VerifyOptions.Since. The log then
	// does not prove that it continues from that checkpoint.
	SinceDropped bool `json:"since_dropped,omitempty"`
}

// VerifyOptions are the optional inputs of Verify.
type VerifyOptions struct {
	// Since is an older signed checkpoint of any epoch, or nil. The log must continue from it.
	Since []byte
	// Progress is called after each bundle of at most 256 events, with the number of verified
	// events and the number of all events.
	Progress func(done, all uint64)
	// Follow is called when a reading of the log begins. Verify may read the log twice. The
	// returned function gets each event in order, after the checks of its schema and of the
	// ledger's rules. An error of the function ends the reading, and Verify returns that error. The
	// root of an epoch is checked after the epoch's last event only: results count when Verify has
	// returned no error.
	Follow func() func(index uint64, e Event) error
	// Heads is called when a reading of the log begins, with the final checkpoints of the ended
	// epochs, those of dropped ones included, and with the checkpoint of the present epoch.
	Heads func([]Checkpoint) error
	// Grown is called after each event with the epoch and its tree up to the event. The tree counts
	// when Verify has returned no error.
	Grown func(epoch uint32, tree *Tree) error
}

// Verify verifies a log. The log's key is the only trusted input. Verify checks
//
//   - the signature of every checkpoint,
//   - every entry against the tiles and the root of its epoch,
//   - the end of every epoch against the first event of the next one,
//   - the schema of every event,
//   - the rules of the ledger: no nonce is spent twice before its expiry, and each signature has an
//     admission.
//
// The error is a *Wrong if one event is at fault. Verify reads one file at a time. The memory holds
// the nonces that have not expired and the admissions without an outcome.
func (l Log) Verify(ctx context.Context, from Source, o VerifyOptions) (Report, error) {
	v := verifier{ctx: ctx, log: l, from: from, options: o, rules: newRuleChecker(nil)}
	err := v.run()
	if regressions := v.rules.regressions; regressions != nil && ctx.Err() == nil {
		// The log's time went back, perhaps to a time at which forgotten nonces had not expired. A
		// second reading knows how far the time goes back, and keeps each nonce as long as
		// necessary.
		v = verifier{ctx: ctx, log: l, from: from, options: o, rules: newRuleChecker(regressions)}
		err = v.run()
	}
	return v.report, err
}

// verifier is one reading of a log.
type verifier struct {
	ctx     context.Context
	log     Log
	from    Source
	options VerifyOptions
	report  Report
	rules   *ruleChecker
	since   *Checkpoint // of VerifyOptions.Since, or nil
	total   uint64      // number of events to verify
	next    uint64      // number of the next event
	follow  func(uint64, Event) error
	epochAt uint32 // the epoch that is read
	tree    Tree   // of epochAt, for VerifyOptions.Grown
}

func (v *verifier) run() error {
	if v.options.Follow != nil {
		v.follow = v.options.Follow()
	}
	heads, err := v.checkpoints()
	if err != nil {
		return err
	}
	if v.options.Heads != nil {
		if err := v.options.Heads(heads); err != nil {
			return err
		}
	}
	present := heads[len(heads)-1]
	first := uint32(0) // the first epoch that is not dropped
	for ; first < present.Epoch; first++ {
		if exists, err := v.hasEntries(heads[first]); err != nil {
			return err
		} else if exists {
			break
		}
		v.next += heads[first].Size
	}
	v.report.First, v.rules.first = v.next, v.next
	for _, c := range heads[first:] {
		v.total += c.Size
	}
	for i, c := range heads[first:] {
		var before *Checkpoint
		if c.Epoch > 0 {
			before = &heads[int(first)+i-1]
		}
		if err := v.epoch(c, before, c.Epoch == present.Epoch); err != nil {
			return v.concurrentChange(present, heads[first], err)
		}
	}
	v.report.Epochs, v.report.Dropped, v.report.Checkpoint = len(heads)-int(first), int(first), present
	if err := v.checkDrops(heads, first); err != nil {
		return err
	}
	v.report.SinceDropped = v.since != nil && v.since.Epoch < first && v.since.Size < heads[v.since.Epoch].Size
	v.report.Signatures, v.report.Unsettled = v.rules.signatures, v.rules.unsettled
	return nil
}

// checkpoints reads the final checkpoints of the ended epochs and the checkpoint of the present
// epoch, which comes last. The sizes are plausible, and the older checkpoint of the options, if
// any, does not contradict the end of its epoch.
func (v *verifier) checkpoints() ([]Checkpoint, error) {
	text, err := v.from.ReadFile(v.ctx, "checkpoint")
	if err != nil {
		return nil, fmt.Errorf("audit: checkpoint: %w", err)
	}
	present, err := v.log.Open(text)
	if err != nil {
		return nil, err
	}
	if v.options.Since != nil {
		since, err := v.log.Open(v.options.Since)
		if err != nil {
			return nil, fmt.Errorf("audit: the older checkpoint: %w", err)
		}
		if since.Epoch > present.Epoch || since.Epoch == present.Epoch && since.Size > present.Size {
			return nil, fmt.Errorf("audit: the older checkpoint is of epoch %d with %d events, "+
				"the log ends in epoch %d with %d: it was cut off or is older",
				since.Epoch, since.Size, present.Epoch, present.Size)
		}
		v.since = &since
	}
	var heads []Checkpoint // grows with the files read: a forged epoch number of 2^32-1 allocates nothing
	for epoch := range present.Epoch {
		head, err := v.final(epoch)
		if err != nil {
			return nil, err
		}
		heads = append(heads, head)
	}
	heads = append(heads, present)
	var events uint64
	for _, c := range heads {
		if c.Size == 0 {
			return nil, fmt.Errorf("audit: the checkpoint of epoch %d has no events, want at least 1", c.Epoch)
		}
		if events += c.Size; events >= 1<<62 { // no overflow: each size is less than 2^62
			return nil, errors.New("audit: the checkpoints have 2^62 events or more")
		}
	}
	if v.since != nil {
		end := heads[v.since.Epoch]
		if v.since.Size > end.Size || v.since.Size == end.Size && v.since.Root != end.Root {
			return nil, fmt.Errorf("audit: the older checkpoint contradicts the one of epoch %d: %w",
				end.Epoch, errChanged)
		}
	}
	return heads, nil
}

// final reads the final checkpoint of an ended epoch.
func (v *verifier) final(epoch uint32) (Checkpoint, error) {
	text, err := v.from.ReadFile(v.ctx, epochFile(epoch, "checkpoint"))
	if err != nil {
		return Checkpoint{}, fmt.Errorf("audit: the final checkpoint of epoch %d: %w", epoch, err)
	}
	c, err := v.log.Open(text)
	if err == nil && c.Epoch != epoch {
		err = fmt.Errorf("audit: the checkpoint of epoch %d says that it is of epoch %d", epoch, c.Epoch)
	}
	return c, err
}

// hasEntries reports whether an epoch's files exist: retention drops all files but the checkpoint.
func (v *verifier) hasEntries(c Checkpoint) (bool, error) {
	firstTile := Tile{0, 0, int(min(TileWidth, c.Size))}
	_, err := v.from.ReadFile(v.ctx, epochFile(c.Epoch, firstTile.Path()))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// concurrentChange returns the error of an epoch that a running appliance has changed during the
// reading: the present epoch has ended, or retention has dropped the first epoch. Otherwise
// concurrentChange returns err.
func (v *verifier) concurrentChange(present, first Checkpoint, err error) error {
	text, readErr := v.from.ReadFile(v.ctx, "checkpoint")
	if readErr != nil {
		return err
	}
	if now, openErr := v.log.Open(text); openErr == nil && now.Epoch > present.Epoch {
		return fmt.Errorf("audit: epoch %d has ended meanwhile, so try again: %v", present.Epoch, err)
	}
	if exists, readErr := v.hasEntries(first); readErr == nil && !exists && first.Epoch < present.Epoch {
		return fmt.Errorf("audit: epoch %d was dropped meanwhile, so try again: %v", first.Epoch, err)
	}
	return err
}

// checkDrops checks the events about dropped epochs: the missing epochs before first are dropped
// according to the log, and each such event has the root of the epoch's final checkpoint.
func (v *verifier) checkDrops(heads []Checkpoint, first uint32) error {
	// Epochs are dropped in order. The log therefore has the event for the last dropped epoch; the
	// events for the epochs before may have been dropped themselves.
	if first > 0 && v.rules.drops[first-1] == (drop{}) {
		return fmt.Errorf("audit: epoch %d is missing, and the log does not say that retention has dropped it", first-1)
	}
	byEvent := func(a, b uint32) int { return cmp.Compare(v.rules.drops[a].event, v.rules.drops[b].event) }
	for _, epoch := range slices.SortedFunc(maps.Keys(v.rules.drops), byEvent) {
		d, present := v.rules.drops[epoch], uint32(len(heads)-1)
		if epoch >= present {
			return &Wrong{d.event, fmt.Sprintf("it drops epoch %d, which has not ended", epoch)}
		}
		if root := heads[epoch].Root.String(); d.root != root {
			return &Wrong{d.event, fmt.Sprintf("it drops epoch %d with root %q, its final checkpoint has %s",
				epoch, d.root, root)}
		}
	}
	return nil
}

// epoch verifies one epoch: its tree and its events. before is the final checkpoint of the epoch
// before, or nil.
func (v *verifier) epoch(c Checkpoint, before *Checkpoint, present bool) error {
	read := func(tile Tile) ([]byte, error) {
		if present {
			return v.from.ReadFile(v.ctx, tile.Path())
		}
		return v.from.ReadFile(v.ctx, epochFile(c.Epoch, tile.Path()))
	}
	t := treeChecker{head: c, read: read}
	if v.since != nil && v.since.Epoch == c.Epoch {
		t.since = v.since
	}
	first := v.next
	v.epochAt, v.tree = c.Epoch, Tree{}
	// blame attributes an error to the event with index at. A failed read is no fault of an event.
	blame := func(at uint64, err error) error {
		if v.ctx.Err() != nil {
			return v.ctx.Err()
		}
		if _, is := errors.AsType[*mismatch](err); is || errors.Is(err, fs.ErrNotExist) {
			return &Wrong{first + at, err.Error()}
		}
		return fmt.Errorf("audit: epoch %d: %w", c.Epoch, err)
	}
	for n := uint64(0); n*TileWidth < c.Size; n++ {
		if err := v.ctx.Err(); err != nil {
			return err
		}
		tile := Tile{-1, n, int(min(TileWidth, c.Size-n*TileWidth))}
		bundle, err := read(tile)
		if err != nil {
			return blame(n*TileWidth, err)
		}
		entries, formErr := split(bundle, tile.Width)
		at, treeErr := t.addBundle(n, entries, formErr)
		if treeErr != nil {
			// The rules are checked for the entries before the first wrong one: an entry there that
			// breaks a rule is the first wrong event.
			valid := at % TileWidth
			if at/TileWidth != n || valid > uint64(len(entries)) {
				valid = 0
			}
			entries = entries[:valid]
		}
		if n == 0 && len(entries) > 0 {
			if err := v.checkFirst(c, before, entries[0]); err != nil {
				return err
			}
		}
		if err := v.events(n, entries); err != nil {
			return err
		}
		if treeErr != nil {
			return blame(at, treeErr)
		}
	}
	root, at, err := t.finish()
	if err != nil {
		return blame(at, err)
	}
	if root != c.Root {
		return fmt.Errorf("audit: epoch %d: its events have the root %v, its checkpoint has %v", c.Epoch, root, c.Root)
	}
	return nil
}

// checkFirst checks the first event of an epoch: the number of that event, and the size and root of
// the epoch before.
func (v *verifier) checkFirst(c Checkpoint, before *Checkpoint, entry []byte) error {
	e, err := decodeStrict(entry)
	if err != nil {
		return &Wrong{v.next, err.Error()}
	}
	want := map[string]string{"first": strconv.FormatUint(v.next, 10)}
	if before != nil {
		want["previous_size"], want["previous_root"] = strconv.FormatUint(before.Size, 10), before.Root.String()
	}
	switch {
	case e.Type != EpochBegun || e.Resource != "epoch/"+strconv.FormatUint(uint64(c.Epoch), 10):
		return &Wrong{v.next, fmt.Sprintf("epoch %d begins with %s of %q, want %s of \"epoch/%d\"",
			c.Epoch, e.Type, e.Resource, EpochBegun, c.Epoch)}
	case e.Metadata["first"] != want["first"]:
		return &Wrong{v.next, fmt.Sprintf("it says that epoch %d begins with event %q", c.Epoch, e.Metadata["first"])}
	case !maps.Equal(e.Metadata, want):
		return &Wrong{v.next, fmt.Sprintf("it contradicts the final checkpoint of the epoch before epoch %d", c.Epoch)}
	}
	return nil
}

// events checks the schema and the rules of the events of a bundle.
func (v *verifier) events(bundle uint64, entries [][]byte) error {
	for i, b := range entries {
		e, err := decodeStrict(b)
		if err == nil && e.Type == EpochBegun && bundle+uint64(i) > 0 {
			err = errors.New("an epoch begins within another")
		}
		if err != nil {
			return &Wrong{v.next, err.Error()}
		}
		if err := v.rules.check(v.next, e); err != nil {
			return &Wrong{v.next, err.Error()}
		}
		if v.follow != nil {
			if err := v.follow(v.next, e); err != nil {
				return err
			}
		}
		if v.options.Grown != nil {
			v.tree.Append(LeafHash(b), func(Hash) {})
			if err := v.options.Grown(v.epochAt, &v.tree); err != nil {
				return err
			}
		}
		if v.report.Events == 0 {
			v.report.FromMS = e.TimeMS
		}
		v.report.FromMS, v.report.ToMS = min(v.report.FromMS, e.TimeMS), max(v.report.ToMS, e.TimeMS)
		v.next++
		v.report.Events++
	}
	if v.options.Progress != nil {
		v.options.Progress(v.report.Events, v.total)
	}
	return nil
}
