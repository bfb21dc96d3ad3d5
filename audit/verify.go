package audit

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"strconv"

	"golang.org/x/mod/sumdb/tlog"
)

// Wrong is what Verify has found: the first event that is not as it must be.
type Wrong struct {
	Event  uint64
	Reason string
}

func (w *Wrong) Error() string { return fmt.Sprintf("event %d: %s", w.Event, w.Reason) }

// Report is what Verify has seen when all is well.
type Report struct {
	First      uint64     `json:"first"`  // number of the first event that is there
	Events     uint64     `json:"events"` // how many were checked
	Epochs     int        `json:"epochs"`
	Dropped    int        `json:"dropped"`    // epochs that retention has dropped, as the log itself says
	Signatures uint64     `json:"signatures"` // each with its admission
	Unsettled  uint64     `json:"unsettled"`  // admissions whose document lives and whose outcome is not in the log: assume that there is a signature
	Checkpoint Checkpoint `json:"-"`
}

// VerifyOptions say what to hold the log against beside its own key.
type VerifyOptions struct {
	Since    []byte // an older checkpoint, of any epoch, which the log must be a continuation of; nil: none
	Progress func(done, all uint64)
}

// Verify checks a log with nothing but its key: every checkpoint's signature; every entry against the tiles and the root;
// every epoch against what the next one says of it; the form of every event; and the ledger's rules: no nonce is spent twice
// while it lives, and each signature has its admission. The error is a *Wrong where one event can be named. It reads one file
// at a time and keeps in memory what is known of nonces that live.
func (l Log) Verify(ctx context.Context, from Source, o VerifyOptions) (Report, error) {
	v := verifier{ctx: ctx, log: l, from: from, options: o, rules: newRules()}
	return v.report, v.run()
}

type verifier struct {
	ctx     context.Context
	log     Log
	from    Source
	options VerifyOptions
	report  Report
	rules   *rules
	since   *Checkpoint
	total   uint64 // events that will be looked at
	next    uint64 // number of the next event; known from the first epoch's first event on
}

func (v *verifier) run() error {
	text, err := v.from.ReadFile(v.ctx, "checkpoint")
	if err != nil {
		return fmt.Errorf("audit: checkpoint: %w", err)
	}
	present, err := v.log.Open(text)
	if err != nil {
		return err
	}
	if v.options.Since != nil {
		since, err := v.log.Open(v.options.Since)
		if err != nil {
			return fmt.Errorf("audit: the older checkpoint: %w", err)
		}
		if since.Epoch > present.Epoch || since.Epoch == present.Epoch && since.Size > present.Size {
			return fmt.Errorf("audit: the older checkpoint is of epoch %d with %d events, the log ends in epoch %d with %d: it was cut off or is older",
				since.Epoch, since.Size, present.Epoch, present.Size)
		}
		v.since = &since
	}
	heads := make([]Checkpoint, present.Epoch+1)
	heads[present.Epoch] = present
	for epoch := range present.Epoch {
		if heads[epoch], err = v.final(epoch); err != nil {
			return err
		}
	}
	first := uint32(0) // the first epoch that is there
	for ; first < present.Epoch; first++ {
		if there, err := v.has(first); err != nil {
			return err
		} else if there {
			break
		}
	}
	for _, c := range heads[first:] {
		v.total += c.Size
	}
	for epoch := first; epoch <= present.Epoch; epoch++ {
		var before *Checkpoint
		if epoch > 0 {
			before = &heads[epoch-1]
		}
		if err := v.epoch(heads[epoch], before, epoch == present.Epoch); err != nil {
			return err
		}
	}
	v.report.Epochs, v.report.Dropped, v.report.Checkpoint = int(present.Epoch-first)+1, int(first), present
	for epoch := range first {
		if root, ok := v.rules.dropped[epoch]; !ok {
			return fmt.Errorf("audit: epoch %d is not there, and the log does not say that retention has dropped it", epoch)
		} else if root != heads[epoch].Root.String() {
			return fmt.Errorf("audit: epoch %d was dropped with another root than its final checkpoint has", epoch)
		}
	}
	if v.since != nil && v.since.Epoch < first && (v.since.Size > heads[v.since.Epoch].Size || v.since.Size == heads[v.since.Epoch].Size && v.since.Root != heads[v.since.Epoch].Root) {
		return fmt.Errorf("audit: epoch %d ended otherwise than the older checkpoint says", v.since.Epoch)
	}
	v.report.Signatures, v.report.Unsettled = v.rules.signatures, uint64(len(v.rules.open))
	return nil
}

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

// has says whether an epoch's entries are there.
func (v *verifier) has(epoch uint32) (bool, error) {
	_, err := v.from.ReadFile(v.ctx, epochFile(epoch, Tile{0, 0, TileWidth}.Path()))
	if errors.Is(err, fs.ErrNotExist) {
		c, err := v.final(epoch)
		if err != nil || c.Size >= TileWidth {
			return false, err
		}
		_, err = v.from.ReadFile(v.ctx, epochFile(epoch, Tile{0, 0, int(c.Size)}.Path()))
		return err == nil, ignoreMissing(err)
	}
	return err == nil, err
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// file reads a file of an epoch: that of the present one where it is in the folder itself too.
func (v *verifier) file(epoch uint32, present bool, t Tile) ([]byte, error) {
	name := epochFile(epoch, t.Path())
	if present {
		name = t.Path()
	}
	return v.from.ReadFile(v.ctx, name)
}

// epoch checks one tree.
func (v *verifier) epoch(c Checkpoint, before *Checkpoint, present bool) error {
	t := tree{read: func(tile Tile) ([]byte, error) { return v.file(c.Epoch, present, tile) }}
	if v.since != nil && v.since.Epoch == c.Epoch {
		t.since = v.since
	}
	var first uint64
	for n := uint64(0); n*TileWidth < c.Size; n++ {
		if err := v.ctx.Err(); err != nil {
			return err
		}
		tile := Tile{-1, n, int(min(TileWidth, c.Size-n*TileWidth))}
		bundle, err := v.file(c.Epoch, present, tile)
		if err != nil {
			return fmt.Errorf("audit: epoch %d: %w", c.Epoch, err)
		}
		if n == 0 {
			if err := v.begin(c, before, bundle); err != nil {
				return err
			}
			first = v.next
		}
		entries, err := split(bundle, tile.Width)
		if err != nil {
			return fmt.Errorf("audit: epoch %d: %s: %w", c.Epoch, tile.Path(), err)
		}
		if at, err := t.bundle(entries); errors.Is(err, errChanged) {
			return fmt.Errorf("audit: epoch %d: %w", c.Epoch, err)
		} else if err != nil {
			return &Wrong{first + at, err.Error()}
		}
		if err := v.events(entries); err != nil {
			return err
		}
	}
	root, at, err := t.end()
	if err != nil {
		return &Wrong{first + at, err.Error()}
	}
	if root != c.Root {
		return fmt.Errorf("audit: epoch %d: its events and tiles are not those of its checkpoint", c.Epoch)
	}
	return nil
}

// begin reads an epoch's first event: it says where it begins and how the epoch before has ended.
func (v *verifier) begin(c Checkpoint, before *Checkpoint, bundle []byte) error {
	entries, err := split(bundle[:min(len(bundle), 2+int(entryLength(bundle)))], 1)
	if err != nil {
		return fmt.Errorf("audit: epoch %d: its first entry: %w", c.Epoch, err)
	}
	e, err := decodeStrict(entries[0])
	if err != nil || e.Type != EpochBegun || e.Resource != "epoch/"+strconv.FormatUint(uint64(c.Epoch), 10) {
		return fmt.Errorf("audit: epoch %d does not begin with an event that says so", c.Epoch)
	}
	first, err := strconv.ParseUint(e.Metadata["first"], 10, 64)
	if err != nil || v.report.Events > 0 && first != v.next {
		return fmt.Errorf("audit: epoch %d begins with event %q, want %d", c.Epoch, e.Metadata["first"], v.next)
	}
	if v.report.Events == 0 {
		v.next, v.report.First, v.rules.first = first, first, first
	}
	if before != nil && (e.Metadata["previous_size"] != strconv.FormatUint(before.Size, 10) || e.Metadata["previous_root"] != before.Root.String()) {
		return &Wrong{first, fmt.Sprintf("it names another end of epoch %d than its final checkpoint", before.Epoch)}
	}
	return nil
}

func (v *verifier) events(entries [][]byte) error {
	for _, b := range entries {
		e, err := decodeStrict(b)
		if err != nil {
			return &Wrong{v.next, err.Error()}
		}
		if err := v.rules.follow(v.next, e); err != nil {
			return &Wrong{v.next, err.Error()}
		}
		v.next++
		v.report.Events++
	}
	if v.options.Progress != nil {
		v.options.Progress(v.report.Events, v.total)
	}
	return nil
}

func entryLength(bundle []byte) uint16 {
	if len(bundle) < 2 {
		return 0
	}
	return binary.BigEndian.Uint16(bundle)
}

// split takes a bundle apart: u16 length || entry, again and again (C2SP tlog-tiles).
func split(bundle []byte, n int) (entries [][]byte, err error) {
	entries = make([][]byte, 0, n)
	for range n {
		size := int(entryLength(bundle))
		if len(bundle) < 2+size {
			return nil, errors.New("it ends within an entry")
		}
		entries, bundle = append(entries, bundle[2:2+size]), bundle[2+size:]
	}
	if len(bundle) > 0 {
		return nil, fmt.Errorf("%d bytes follow its %d entries", len(bundle), n)
	}
	return entries, nil
}

// tree makes an epoch's tree of its entries and holds each tile against it.
type tree struct {
	read  func(Tile) ([]byte, error)
	since *Checkpoint // an older one of this epoch, or nil
	tree  Tree
	rows  [8][]byte // the hashes of each level's tile that is not full yet
	n     [8]uint64 // the full ones
}

var errChanged = errors.New("the log was changed since the older checkpoint")

// bundle adds entries. The error comes with the place in the epoch of the first entry that it can be about.
func (t *tree) bundle(entries [][]byte) (at uint64, err error) {
	for _, b := range entries {
		level := 0
		t.tree.Append(LeafHash(b), func(h Hash) { // the roots of the subtrees that this leaf completes, by their height
			if row := level / 8; level%8 == 0 && row < len(t.rows) {
				t.rows[row] = append(t.rows[row], h[:]...)
			}
			level++
		})
		if t.since != nil && t.since.Size == t.tree.Size {
			if root, err := t.tree.Root(); err != nil || root != t.since.Root {
				return 0, fmt.Errorf("its first %d events have another tree: %w", t.since.Size, errChanged)
			}
		}
	}
	for level := range t.rows {
		if len(t.rows[level]) == TileWidth*len(Hash{}) {
			if at, err := t.compare(level); err != nil {
				return at, err
			}
		}
	}
	return 0, nil
}

// compare holds a level's newest tile against its file.
func (t *tree) compare(level int) (at uint64, err error) {
	row := t.rows[level]
	tile := Tile{level, t.n[level], len(row) / len(Hash{})}
	at = tile.N * TileWidth << (8 * level)
	b, err := t.read(tile)
	if err != nil {
		return at, fmt.Errorf("audit: %w", err)
	}
	if !bytes.Equal(b, row) {
		same := 0
		for same < min(len(row), len(b)) && b[same] == row[same] {
			same++
		}
		at = (tile.N*TileWidth + uint64(same/len(Hash{}))) << (8 * level)
		return at, fmt.Errorf("it is not what %s says", tile.Path())
	}
	if len(row) == TileWidth*len(Hash{}) {
		t.rows[level], t.n[level] = row[:0], t.n[level]+1
	}
	return at, nil
}

// end compares the tiles that are not full, and returns the root.
func (t *tree) end() (root Hash, at uint64, err error) {
	for level := range t.rows {
		if len(t.rows[level]) > 0 {
			if at, err := t.compare(level); err != nil {
				return Hash{}, at, err
			}
		}
	}
	root, err = t.tree.Root()
	return root, 0, err
}

// rules are what the ledger promises, as far as the log shows it.
type rules struct {
	first      uint64 // events before it are not there
	hours      map[int64]*hourRules
	open       map[uint64]uint64 // admissions that may still get an outcome: a hash of who and what
	now        int64             // hours up to this one are forgotten
	dropped    map[uint32]string // epochs that retention has dropped, with their roots
	signatures uint64
}

type hourRules struct {
	nonces     map[[16]byte]uint64
	admissions []uint64
}

func newRules() *rules {
	return &rules{hours: map[int64]*hourRules{}, open: map[uint64]uint64{}, dropped: map[uint32]string{}}
}

// follow takes the next event.
func (r *rules) follow(index uint64, e Event) error {
	if now := e.TimeMS/3_600_000 - 1; now > r.now { // what has expired may be spent again
		r.now = now
		for hour, h := range r.hours {
			if hour < now {
				for _, admission := range h.admissions {
					delete(r.open, admission)
				}
				delete(r.hours, hour)
			}
		}
	}
	switch e.Type.Kind() {
	case Admission, Spent:
		return r.spend(index, e)
	case Outcome:
		return r.settle(e)
	}
	if e.Type == RetentionApplied {
		var epoch uint32
		if n, _ := fmt.Sscanf(e.Resource, "epoch/%d", &epoch); n == 1 {
			r.dropped[epoch] = e.Metadata["root"]
		}
	}
	return nil
}

// mix is a hash of texts that tells them apart.
func mix(texts ...string) [16]byte {
	var b []byte
	for _, t := range texts {
		b = append(binary.AppendUvarint(b, uint64(len(t))), t...)
	}
	h := tlog.RecordHash(b)
	return [16]byte(h[:16])
}

func owner(e Event) uint64 {
	h := mix(e.Actor.PublicKey, e.Resource)
	return binary.BigEndian.Uint64(h[:])
}

func (r *rules) spend(index uint64, e Event) error {
	scope := "signer " + e.Metadata["signer"]
	if e.Type.Kind() == Admission {
		name, _, _ := bytes.Cut([]byte(e.Resource), []byte("/")) // whatever the version
		scope = "key " + string(name)
	}
	expires, err := strconv.ParseInt(e.Metadata["expires_at"], 10, 64)
	if err != nil || len(e.Metadata["nonce"]) != 64 || len(e.Metadata["digest"]) != 64 {
		return fmt.Errorf("%s without nonce, digest and expires_at", e.Type)
	}
	print := mix(scope, e.Metadata["nonce"])
	for _, h := range r.hours {
		if before, twice := h.nonces[print]; twice {
			return fmt.Errorf("its nonce was spent by event %d", before)
		}
	}
	h := r.hours[expires/3600]
	if h == nil {
		h = &hourRules{nonces: map[[16]byte]uint64{}}
		r.hours[expires/3600] = h
	}
	h.nonces[print] = index
	if e.Type.Kind() == Admission {
		r.open[index] = owner(e)
		h.admissions = append(h.admissions, index)
	}
	return nil
}

func (r *rules) settle(e Event) error {
	admission, err := strconv.ParseUint(e.Metadata["admission"], 10, 64)
	if err != nil {
		return fmt.Errorf("%s names no admission", e.Type)
	}
	if admission < r.first {
		return nil // it was dropped with its epoch
	}
	who, ok := r.open[admission]
	switch {
	case !ok:
		return fmt.Errorf("%s: event %d is no admission that could have this outcome", e.Type, admission)
	case who != owner(e):
		return fmt.Errorf("%s: event %d is an admission of somebody or something else", e.Type, admission)
	}
	if e.Outcome == "ok" { // after a failure the same request may succeed
		r.signatures++
		delete(r.open, admission)
	}
	return nil
}
