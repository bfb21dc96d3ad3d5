package audit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"math/bits"
	"strconv"
	"time"

	strict "github.com/go-json-experiment/json"
	"golang.org/x/mod/sumdb/tlog"
)

// Statement says that the events of a report are all events of a period, and has the proof. The
// log's key is the only trusted input for a check.
//
// The invariant: the events from First to End are consecutive, and their hashes together with the
// hashes of the statement make the root of each epoch's signed checkpoint. So no event between the
// first and the last one can be missing, changed or added. The event before the first one and the
// event after the last one are in the statement, proven in the same way, and have times outside the
// period. Where one of the two is absent, the period reaches to an end of the log: to the events
// that retention has dropped, to the first event of all, or to the newest checkpoint.
//
// Events have the time at which their request came, so neighbours can be out of order by the
// duration of a request. A statement does not prove that no event farther away has a time in the
// period. Verify of the whole log does.
type Statement struct {
	Log     string `json:"log"`      // Log.Name
	SinceMS int64  `json:"since_ms"` // since <= time < until, in Unix milliseconds
	UntilMS int64  `json:"until_ms"`
	First   uint64 `json:"first"` // number of the first event of the period
	End     uint64 `json:"end"`   // number after the last event of the period
	Before  string `json:"before,omitempty"`
	After   string `json:"after,omitempty"`
	// ReceiptsBeforeMS is the time before which retention has dropped receipts, or 0.
	ReceiptsBeforeMS int64        `json:"receipts_before_ms"`
	Epochs           []EpochProof `json:"epochs"` // all of them, from epoch 0 to the present one
}

// EpochProof is the part of an epoch in a statement.
type EpochProof struct {
	Checkpoint string `json:"checkpoint"`        // signed; the final one of an ended epoch
	Dropped    bool   `json:"dropped,omitempty"` // by retention; true for epochs at the beginning only
	Proof      []Hash `json:"proof,omitempty"`   // of subtrees without an event of the statement, in their order
}

// State makes the statement about a period. find returns the numbers of the first event of the
// period and of the event after the last one, among the first total events. Without an event in the
// period, both are the number of the first event after the period.
func (l Log) State(
	ctx context.Context, from Source, sinceMS, untilMS int64, find func(total uint64) (first, end uint64, err error),
) (Statement, error) {
	s := Statement{Log: l.Name(), SinceMS: sinceMS, UntilMS: untilMS}
	text, err := from.ReadFile(ctx, "checkpoint")
	if err != nil {
		return s, fmt.Errorf("audit: checkpoint: %w", err)
	}
	present, err := l.Open(text)
	if err != nil {
		return s, err
	}
	heads := make([]Checkpoint, 0, 1)
	v := verifier{ctx: ctx, log: l, from: from}
	for epoch := range present.Epoch {
		ended, err := from.ReadFile(ctx, epochFile(epoch, "checkpoint"))
		if err != nil {
			return s, fmt.Errorf("audit: the final checkpoint of epoch %d: %w", epoch, err)
		}
		head, err := l.Open(ended)
		if err != nil {
			return s, err
		}
		dropped := false
		if epoch == 0 || s.Epochs[epoch-1].Dropped {
			has, err := v.hasEntries(head)
			if err != nil {
				return s, err
			}
			dropped = !has
		}
		heads, s.Epochs = append(heads, head), append(s.Epochs, EpochProof{Checkpoint: string(ended), Dropped: dropped})
	}
	heads, s.Epochs = append(heads, present), append(s.Epochs, EpochProof{Checkpoint: string(text)})
	kept, total := uint64(0), uint64(0)
	for i, head := range heads {
		if total += head.Size; s.Epochs[i].Dropped {
			kept = total
		}
	}
	if s.First, s.End, err = find(total); err != nil {
		return s, err
	}
	if s.First < kept || s.End < s.First || s.End > total {
		return s, fmt.Errorf("audit: events %d to %d are not in the log, which has %d to %d",
			s.First, s.End, kept, total)
	}
	first := uint64(0)
	for _, head := range heads {
		for _, border := range []struct {
			at    uint64
			has   bool
			entry *string
		}{{s.First - 1, s.First > kept, &s.Before}, {s.End, s.End < total, &s.After}} {
			if border.has && border.at >= first && border.at < first+head.Size {
				entry, err := entryOf(ctx, from, head, border.at-first)
				if err != nil {
					return s, err
				}
				*border.entry = string(entry)
			}
		}
		first += head.Size
	}
	first = 0
	for i, head := range heads {
		if within, until := s.within(first, head.Size); within < until {
			if s.Epochs[i].Proof, err = proveRange(ctx, from, head, within, until); err != nil {
				return s, fmt.Errorf("audit: epoch %d: %w", head.Epoch, err)
			}
		}
		first += head.Size
	}
	return s, nil
}

// within returns the leaves of an epoch that the statement proves, with the events at the borders.
func (s Statement) within(first, size uint64) (from, to uint64) {
	begin, end := s.First, s.End
	if s.Before != "" {
		begin--
	}
	if s.After != "" {
		end++
	}
	from, to = max(begin, first), min(end, first+size)
	if from >= to {
		return 0, 0
	}
	return from - first, to - first
}

// entryOf reads one entry of an epoch.
func entryOf(ctx context.Context, from Source, head Checkpoint, leaf uint64) ([]byte, error) {
	n := leaf / TileWidth
	tile := Tile{-1, n, int(min(TileWidth, head.Size-n*TileWidth))}
	b, err := from.ReadFile(ctx, epochFile(head.Epoch, tile.Path()))
	if err != nil {
		return nil, err
	}
	entries, err := split(b, tile.Width)
	if err != nil {
		return nil, fmt.Errorf("audit: %s: %w", tile.Path(), err)
	}
	return entries[leaf%TileWidth], nil
}

// walkRange returns the root of the tree over the leaves from lo on and before hi. leaf returns the
// hashes of the leaves from from on and before to, one after the other. outside returns the hash of
// a complete subtree of 2^level leaves without any of these leaves: the n-th one of its level.
func walkRange(
	lo, hi, from, to uint64, leaf func() (Hash, error), outside func(level int, n uint64) (Hash, error),
) (Hash, error) {
	size := hi - lo
	switch {
	case size&(size-1) == 0 && (hi <= from || lo >= to):
		level := bits.TrailingZeros64(size)
		return outside(level, lo>>level)
	case size == 1:
		return leaf()
	}
	middle := lo + 1<<(bits.Len64(size-1)-1)
	left, err := walkRange(lo, middle, from, to, leaf, outside)
	if err != nil {
		return Hash{}, err
	}
	right, err := walkRange(middle, hi, from, to, leaf, outside)
	return Hash(tlog.NodeHash(tlog.Hash(left), tlog.Hash(right))), err
}

// proveRange returns the hashes of the complete subtrees outside a range of leaves. The checkpoint
// proves the hashes.
func proveRange(ctx context.Context, from Source, head Checkpoint, lo, hi uint64) ([]Hash, error) {
	indexes := outsideOf(nil, 0, head.Size, lo, hi)
	tree := tlog.Tree{N: int64(head.Size), Hash: tlog.Hash(head.Root)}
	read := func(t Tile) ([]byte, error) { return from.ReadFile(ctx, epochFile(head.Epoch, t.Path())) }
	hashes, err := tlog.TileHashReader(tree, tileReader{read}).ReadHashes(indexes)
	return convert[Hash](hashes), err
}

// outsideOf appends the stored indexes of the subtrees for which walkRange calls outside, in the
// same order, without a step for each leaf of the range.
func outsideOf(indexes []int64, lo, hi, from, to uint64) []int64 {
	size := hi - lo
	switch {
	case lo >= from && hi <= to:
		return indexes
	case size&(size-1) == 0 && (hi <= from || lo >= to):
		level := bits.TrailingZeros64(size)
		return append(indexes, tlog.StoredHashIndex(level, int64(lo>>level)))
	}
	middle := lo + 1<<(bits.Len64(size-1)-1)
	return outsideOf(outsideOf(indexes, lo, middle, from, to), middle, hi, from, to)
}

// ReceiptSlack is the largest distance between the time of a receipt and the time of the event
// about the signature. Both times are taken one after the other, before the two are written
// together.
const ReceiptSlack = 10 * time.Second

// StatementFile is the name of the file with the statement of a report.
const StatementFile = "statement.json"

// EventsFile is the name of the file with the events of a report in one form.
func (f Form) EventsFile() string { return "events." + string(f) }

// ReceiptsFile is the name of the file with the receipts of a report in one form.
func (f Form) ReceiptsFile() string { return "receipts." + string(f) }

// ReportChecked is the result of VerifyReport for a valid report.
type ReportChecked struct {
	Statement       `json:"-"`
	Events          uint64     `json:"events"`
	Dropped         int        `json:"dropped"`          // epochs that retention has dropped
	Payments        uint64     `json:"payments"`         // signed in the period, with subscriptions
	Receipts        uint64     `json:"receipts"`         // each of a signed payment of the period
	ReceiptsDropped uint64     `json:"receipts_dropped"` // payments whose receipts retention has dropped
	Forms           []Form     `json:"forms"`
	Checkpoint      Checkpoint `json:"-"` // the newest one
}

// VerifyReport verifies the report of a period. The log's key is the only trusted input.
// VerifyReport checks the statement with the events in each form that is there, and that the signed
// payments have their receipts. The log has no digest of a receipt: the commitment in a receipt
// proves itself by its salt, which the peer has. The error is a *Wrong if one event is at fault.
func (l Log) VerifyReport(report fs.FS) (r ReportChecked, err error) {
	b, err := fs.ReadFile(report, StatementFile)
	if err != nil {
		return r, err
	}
	var s Statement
	if err := strict.Unmarshal(b, &s, strict.RejectUnknownMembers(true)); err != nil {
		return r, fmt.Errorf("%s is not a statement: %w", StatementFile, err)
	}
	r.Statement = s
	heads, err := l.openAll(s)
	if err != nil {
		return r, err
	}
	r.Checkpoint = heads[len(heads)-1]
	for _, e := range s.Epochs {
		if e.Dropped {
			r.Dropped++
		}
	}
	for _, form := range Forms() {
		events, err := report.Open(form.EventsFile())
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return r, err
		}
		signed, err := s.checkEvents(heads, form, events)
		events.Close()
		if err != nil {
			return r, fmt.Errorf("%s: %w", form.EventsFile(), err)
		}
		receipts, err := report.Open(form.ReceiptsFile())
		if err != nil {
			return r, err
		}
		r.Payments = uint64(len(signed))
		r.Receipts, r.ReceiptsDropped, err = s.checkReceipts(form, receipts, signed)
		receipts.Close()
		if err != nil {
			return r, fmt.Errorf("%s: %w", form.ReceiptsFile(), err)
		}
		r.Forms = append(r.Forms, form)
	}
	if r.Events = s.End - s.First; len(r.Forms) == 0 {
		return r, fmt.Errorf("there is neither %s nor %s", CSV.EventsFile(), JSONLines.EventsFile())
	}
	return r, nil
}

// openAll opens the checkpoints of a statement and checks the numbers of the statement.
func (l Log) openAll(s Statement) (heads []Checkpoint, err error) {
	if s.UntilMS <= s.SinceMS || s.SinceMS < 0 {
		return nil, fmt.Errorf("the statement's period from %d to %d has no time", s.SinceMS, s.UntilMS)
	}
	if s.Log != l.Name() {
		return nil, fmt.Errorf("the statement is of the log %q, the verifier key of %q", s.Log, l.Name())
	}
	var total, kept uint64
	for i, e := range s.Epochs {
		head, err := l.Open([]byte(e.Checkpoint))
		if err != nil {
			return nil, err
		}
		switch total += head.Size; {
		case head.Epoch != uint32(i):
			return nil, fmt.Errorf("checkpoint %d of the statement is of epoch %d", i, head.Epoch)
		case head.Size == 0 || head.Size >= 1<<62 || total >= 1<<62:
			return nil, fmt.Errorf("the checkpoint of epoch %d has an impossible size, %d", i, head.Size)
		case e.Dropped && (kept != total-head.Size || i == len(s.Epochs)-1):
			return nil, fmt.Errorf("epoch %d can't be dropped: retention drops epochs in order, "+
				"never the present one", i)
		case e.Dropped:
			kept = total
		}
		heads = append(heads, head)
	}
	switch {
	case len(heads) == 0:
		return nil, errors.New("the statement has no checkpoint")
	case s.First < kept || s.End < s.First || s.End > total:
		return nil, fmt.Errorf("the statement has events %d to %d, the log %d to %d", s.First, s.End, kept, total)
	case (s.Before == "") != (s.First == kept):
		return nil, fmt.Errorf("the event before event %d must be in the statement exactly if the log has one", s.First)
	case (s.After == "") != (s.End == total):
		return nil, fmt.Errorf("event %d must be in the statement exactly if the log has it", s.End)
	}
	return heads, nil
}

// entries yields the entries that the statement proves: the events of a file, between those at the
// borders.
func (s Statement) entries(form Form, events io.Reader) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		if s.Before != "" && !yield([]byte(s.Before), nil) {
			return
		}
		next, stopped := s.First, errors.New("stopped")
		err := form.events(events, func(index uint64, entry []byte) error {
			if index != next {
				return &Wrong{next, fmt.Sprintf("the next event in the file is %d", index)}
			}
			if next++; next > s.End {
				return &Wrong{index, "the statement ends before it"}
			}
			if !yield(entry, nil) {
				return stopped
			}
			return nil
		})
		switch {
		case errors.Is(err, stopped):
			return
		case err == nil && next < s.End:
			err = &Wrong{next, "it is missing in the file"}
		}
		if err != nil {
			yield(nil, err)
			return
		}
		if s.After != "" {
			yield([]byte(s.After), nil)
		}
	}
}

// checkEvents checks the events of a file against the checkpoints, and returns the admissions of
// the signed payments with the times of their outcomes.
func (s Statement) checkEvents(heads []Checkpoint, form Form, events io.Reader) (map[uint64]int64, error) {
	next, stop := iter.Pull2(s.entries(form, events))
	defer stop()
	signed := map[uint64]int64{}
	var first uint64
	for i, head := range heads {
		from, to := s.within(first, head.Size)
		at, proof := first+from, s.Epochs[i].Proof
		leaf := func() (Hash, error) {
			entry, err, more := next()
			if err == nil && !more {
				err = &Wrong{at, "it is missing in the file"}
			}
			if err != nil {
				return Hash{}, err
			}
			if err := s.checkEvent(heads, i, first, at, entry, signed); err != nil {
				return Hash{}, &Wrong{at, err.Error()}
			}
			at++
			return LeafHash(entry), nil
		}
		outside := func(int, uint64) (Hash, error) {
			if len(proof) == 0 {
				return Hash{}, fmt.Errorf("the proof of epoch %d is too short", i)
			}
			h := proof[0]
			proof = proof[1:]
			return h, nil
		}
		if from < to {
			root, err := walkRange(0, head.Size, from, to, leaf, outside)
			if err != nil {
				return nil, err
			}
			if root != head.Root {
				return nil, fmt.Errorf("epoch %d: the events %d to %d are not those of its checkpoint: "+
					"one is changed, or the proof is", i, first+from, first+to-1)
			}
		}
		if len(proof) > 0 {
			return nil, fmt.Errorf("the proof of epoch %d is too long", i)
		}
		first += head.Size
	}
	if _, err, more := next(); more { // an event too many
		return nil, err
	}
	return signed, nil
}

// checkEvent checks one event: its schema, its place in the epochs and in the period.
func (s Statement) checkEvent(
	heads []Checkpoint, epoch int, first, at uint64, entry []byte, signed map[uint64]int64,
) error {
	e, err := decodeStrict(entry)
	if err != nil {
		return err
	}
	inPeriod := e.TimeMS >= s.SinceMS && e.TimeMS < s.UntilMS
	inside := at >= s.First && at < s.End
	switch {
	case (e.Type == EpochBegun) != (at == first):
		return errors.New("an epoch begins within another, or without its first event")
	case at == first && epoch > 0 && e.Metadata["previous_root"] != heads[epoch-1].Root.String():
		return fmt.Errorf("it contradicts the final checkpoint of epoch %d", epoch-1)
	case !inside && inPeriod:
		return errors.New("its time is in the period, but the report leaves it out")
	case (at == s.First || at == s.End-1) && inside && !inPeriod:
		return errors.New("the report begins or ends with it, but its time is not in the period")
	}
	if inside && e.Type.HasReceipt() {
		admission, err := strconv.ParseUint(e.Metadata["admission"], 10, 64)
		if err != nil {
			return errors.New("it names no admission")
		}
		signed[admission] = e.TimeMS
	}
	return nil
}

// checkReceipts checks that each signed payment has its receipt, and each receipt its payment.
func (s Statement) checkReceipts(
	form Form, rows io.Reader, signed map[uint64]int64,
) (receipts, dropped uint64, err error) {
	missing := make(map[uint64]int64, len(signed))
	for admission, ms := range signed {
		missing[admission] = ms
	}
	if err := form.receipts(rows, func(r Receipt) error {
		if _, ok := missing[r.Event]; !ok {
			return fmt.Errorf("receipt %q is of admission %d, of which no payment was signed in the period, "+
				"or which has another receipt", r.ID, r.Event)
		}
		delete(missing, r.Event)
		receipts++
		return nil
	}); err != nil {
		return 0, 0, err
	}
	for admission, ms := range missing {
		if ms >= s.ReceiptsBeforeMS+ReceiptSlack.Milliseconds() {
			return 0, 0, fmt.Errorf("the payment of admission %d was signed and has no receipt", admission)
		}
	}
	return receipts, uint64(len(missing)), nil
}

// Encode returns the JSON of the statement.
func (s Statement) Encode() []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(s); err != nil {
		panic("audit: " + err.Error()) // texts and numbers always have an encoding
	}
	return b.Bytes()
}
