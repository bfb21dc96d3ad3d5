package audit

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strconv"
	"strings"

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
	Unsettled  uint64     `json:"unsettled"`  // admissions whose outcome is not in the log: assume that there is a signature
	Checkpoint Checkpoint `json:"-"`
	// SinceDropped: the epoch of the older checkpoint was dropped, so nothing shows that the log went on from there.
	SinceDropped bool `json:"since_dropped,omitempty"`
}

// VerifyOptions say what to hold the log against beside its own key.
type VerifyOptions struct {
	Since    []byte // an older checkpoint, of any epoch, which the log must be a continuation of; nil: none
	Progress func(done, all uint64)
	// Follow is called as the log begins to be read, which may be twice. What it returns gets each event that has its form and
	// follows the rules; an error of it ends the reading, and is returned. Of the last epoch's events, the root is not checked yet.
	Follow func() func(index uint64, e Event) error
}

// Verify checks a log with nothing but its key: every checkpoint's signature; every entry against the tiles and the root;
// every epoch against what the next one says of it; the form of every event; and the ledger's rules: no nonce is spent twice
// while it lives, and each signature has its admission. The error is a *Wrong where one event can be named. It reads one file
// at a time and keeps in memory what is known of nonces that live, and of admissions without an outcome.
func (l Log) Verify(ctx context.Context, from Source, o VerifyOptions) (Report, error) {
	v := verifier{ctx: ctx, log: l, from: from, options: o, rules: newRules(nil)}
	err := v.run()
	if back := v.rules.back; back != nil && ctx.Err() == nil {
		// The log's time went back to when nonces lived that are forgotten by now. Once more, and they are kept until then.
		v = verifier{ctx: ctx, log: l, from: from, options: o, rules: newRules(back)}
		err = v.run()
	}
	return v.report, err
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
	next    uint64 // number of the next event
	follow  func(uint64, Event) error
}

func (v *verifier) run() error {
	if v.options.Follow != nil {
		v.follow = v.options.Follow()
	}
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
	var heads []Checkpoint // each is read before there is room for it
	for epoch := range present.Epoch {
		head, err := v.final(epoch)
		if err != nil {
			return err
		}
		heads = append(heads, head)
	}
	heads = append(heads, present)
	var events uint64
	for _, c := range heads {
		if c.Size == 0 {
			return fmt.Errorf("audit: the checkpoint of epoch %d says that it is empty, and none is", c.Epoch)
		}
		if events += c.Size; events >= 1<<62 { // each is less than that
			return errors.New("audit: the checkpoints say that there are more events than can be")
		}
	}
	if v.since != nil {
		if ended := heads[v.since.Epoch]; v.since.Size > ended.Size || v.since.Size == ended.Size && v.since.Root != ended.Root {
			return fmt.Errorf("audit: epoch %d ended otherwise than the older checkpoint says: %w", ended.Epoch, errChanged)
		}
	}
	first := uint32(0) // the first epoch that is there
	for ; first < present.Epoch; first++ {
		if there, err := v.has(heads[first]); err != nil {
			return err
		} else if there {
			break
		}
		v.next += heads[first].Size
	}
	v.total, v.report.First, v.rules.first = events-v.next, v.next, v.next
	for i, c := range heads[first:] {
		var before *Checkpoint
		if c.Epoch > 0 {
			before = &heads[int(first)+i-1]
		}
		if err := v.epoch(c, before, c.Epoch == present.Epoch); err != nil {
			return v.meanwhile(present, heads[first], err)
		}
	}
	v.report.Epochs, v.report.Dropped, v.report.Checkpoint = len(heads)-int(first), int(first), present
	// Epochs are dropped in their order. So the log says it of the last one; of those before it, its own word may be gone too.
	if first > 0 && v.rules.dropped[first-1] == (said{}) {
		return fmt.Errorf("audit: epoch %d is not there, and the log does not say that retention has dropped it", first-1)
	}
	for _, epoch := range slices.SortedFunc(maps.Keys(v.rules.dropped), func(a, b uint32) int { return cmp.Compare(v.rules.dropped[a].event, v.rules.dropped[b].event) }) {
		if s := v.rules.dropped[epoch]; epoch >= present.Epoch || s.root != heads[epoch].Root.String() {
			return &Wrong{s.event, fmt.Sprintf("it drops an epoch %d that has another end than the final checkpoint says, or none", epoch)}
		}
	}
	v.report.SinceDropped = v.since != nil && v.since.Epoch < first && v.since.Size < heads[v.since.Epoch].Size
	v.report.Signatures, v.report.Unsettled = v.rules.signatures, v.rules.unsettled
	return nil
}

// meanwhile says why a running appliance's log may seem wrong: its present epoch has ended while it was read, or retention has
// dropped the first one.
func (v *verifier) meanwhile(present, first Checkpoint, err error) error {
	text, readErr := v.from.ReadFile(v.ctx, "checkpoint")
	if readErr != nil {
		return err
	}
	if now, openErr := v.log.Open(text); openErr == nil && now.Epoch > present.Epoch {
		return fmt.Errorf("audit: epoch %d has ended meanwhile, so try again: %v", present.Epoch, err)
	}
	if there, readErr := v.has(first); readErr == nil && !there && first.Epoch < present.Epoch {
		return fmt.Errorf("audit: epoch %d was dropped meanwhile, so try again: %v", first.Epoch, err)
	}
	return err
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
func (v *verifier) has(c Checkpoint) (bool, error) {
	_, err := v.from.ReadFile(v.ctx, epochFile(c.Epoch, Tile{0, 0, int(min(TileWidth, c.Size))}.Path()))
	return err == nil, ignoreMissing(err)
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
	t := tree{head: c, read: func(tile Tile) ([]byte, error) { return v.file(c.Epoch, present, tile) }}
	if v.since != nil && v.since.Epoch == c.Epoch {
		t.since = v.since
	}
	first := v.next
	// wrong names an event by its place in the epoch. What could not be read is no event's fault.
	wrong := func(at uint64, err error) error {
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
		bundle, err := v.file(c.Epoch, present, tile)
		if err != nil {
			return wrong(n*TileWidth, err)
		}
		entries, form := split(bundle, tile.Width)
		at, err := t.bundle(n, entries, form)
		sound := entries // those before the first that is wrong are held against the rules first
		if err != nil && at/TileWidth == n && at%TileWidth <= uint64(len(entries)) {
			sound = entries[:at%TileWidth]
		} else if err != nil {
			sound = nil
		}
		if n == 0 && len(sound) > 0 {
			if err := v.begin(c, before, sound[0]); err != nil {
				return err
			}
		}
		if err := v.events(n, sound); err != nil {
			return err
		}
		if err != nil {
			return wrong(at, err)
		}
	}
	root, at, err := t.end()
	if err != nil {
		return wrong(at, err)
	}
	if root != c.Root {
		return fmt.Errorf("audit: epoch %d: its events and tiles are not those of its checkpoint", c.Epoch)
	}
	return nil
}

// begin reads an epoch's first event: it says where it begins and how the epoch before has ended.
func (v *verifier) begin(c Checkpoint, before *Checkpoint, entry []byte) error {
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
		return &Wrong{v.next, fmt.Sprintf("epoch %d does not begin with an event that says so", c.Epoch)}
	case e.Metadata["first"] != want["first"]:
		return &Wrong{v.next, fmt.Sprintf("it says that epoch %d begins with event %q", c.Epoch, e.Metadata["first"])}
	case !maps.Equal(e.Metadata, want):
		return &Wrong{v.next, fmt.Sprintf("it names another end of the epoch before %d than that one's final checkpoint", c.Epoch)}
	}
	return nil
}

func (v *verifier) events(bundle uint64, entries [][]byte) error {
	for i, b := range entries {
		e, err := decodeStrict(b)
		if err == nil && e.Type == EpochBegun && bundle+uint64(i) > 0 {
			err = errors.New("an epoch begins within another")
		}
		if err != nil {
			return &Wrong{v.next, err.Error()}
		}
		if err := v.rules.follow(v.next, e); err != nil {
			return &Wrong{v.next, err.Error()}
		}
		if v.follow != nil {
			if err := v.follow(v.next, e); err != nil {
				return err
			}
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

// split takes a bundle apart: u16 length || entry, again and again (C2SP tlog-tiles). With an error come the entries before it.
func split(bundle []byte, n int) (entries [][]byte, err error) {
	entries = make([][]byte, 0, n)
	for range n {
		size := int(entryLength(bundle))
		if len(bundle) < 2+size {
			return entries, errors.New("it ends within an entry")
		}
		entries, bundle = append(entries, bundle[2:2+size]), bundle[2+size:]
	}
	if len(bundle) > 0 {
		return entries, fmt.Errorf("%d bytes follow its %d entries", len(bundle), n)
	}
	return entries, nil
}

// tree makes an epoch's tree of its entries and holds each tile against it.
type tree struct {
	head  Checkpoint
	read  func(Tile) ([]byte, error)
	since *Checkpoint // an older one of this epoch, or nil
	tree  Tree
	sure  []Hash    // the roots of full bundles, from one whose number is a multiple of TileWidth on, that the checkpoint vouches for
	rows  [8][]byte // the hashes of each level's tile that is not full yet
	n     [8]uint64 // the full ones
}

var errChanged = errors.New("the log was changed since the older checkpoint")

// mismatch is an error that is about an event.
type mismatch struct{ reason string }

func (m *mismatch) Error() string { return m.reason }

// bundle adds the entries of a bundle; form is what is wrong with its form. The error comes with the place in the epoch of the
// first entry that it can be about.
func (t *tree) bundle(n uint64, entries [][]byte, form error) (at uint64, err error) {
	if n%TileWidth == 0 { // where there are none, the tiles themselves are compared all the same
		t.sure, _ = t.hashes(8, n, min(TileWidth, t.head.Size>>8-n))
	}
	name := Tile{-1, n, int(min(TileWidth, t.head.Size-n*TileWidth))}.Path()
	if form != nil {
		return t.firstWrong(n, entries), &mismatch{fmt.Sprintf("%s: %v", name, form)}
	}
	changed := false
	for _, b := range entries {
		level := 0
		t.tree.Append(LeafHash(b), func(h Hash) { // the roots of the subtrees that this leaf completes, by their height
			if row := level / 8; level%8 == 0 && row < len(t.rows) {
				t.rows[row] = append(t.rows[row], h[:]...)
			}
			level++
		})
		if t.since != nil && t.since.Size == t.tree.Size {
			root, err := t.tree.Root()
			changed = err != nil || root != t.since.Root
		}
	}
	if i := int(n % TileWidth); i < len(t.sure) && !bytes.HasSuffix(t.rows[1], t.sure[i][:]) {
		return t.firstWrong(n, entries), &mismatch{fmt.Sprintf("it is not what the checkpoint vouches for, by %s", name)}
	}
	for level := range t.rows {
		if len(t.rows[level]) == TileWidth*len(Hash{}) || level == 0 { // the last bundle may not be full
			if at, err := t.compare(level); err != nil {
				return at, err
			}
		}
	}
	if changed {
		return t.tree.Size, fmt.Errorf("its first %d events have another tree: %w", t.since.Size, errChanged)
	}
	return 0, nil
}

// firstWrong finds the first entry that is not what the checkpoint vouches for. Where the tile is wrong too, it is the bundle's
// first one.
func (t *tree) firstWrong(n uint64, entries [][]byte) (at uint64) {
	width := min(TileWidth, t.head.Size-n*TileWidth)
	at = n * TileWidth
	leaves, err := t.hashes(0, at, width)
	if err != nil {
		return at
	}
	for i, b := range entries {
		if LeafHash(b) != leaves[i] {
			return at + uint64(i)
		}
	}
	return at + min(uint64(len(entries)), width-1)
}

// hashes reads some hashes of a level and checks that the checkpoint vouches for them.
func (t *tree) hashes(level int, from, n uint64) ([]Hash, error) {
	indexes := make([]int64, n)
	for i := range indexes {
		indexes[i] = tlog.StoredHashIndex(level, int64(from)+int64(i))
	}
	return tlog.TileHashReader(tlog.Tree{N: int64(t.head.Size), Hash: t.head.Root}, tiles{t.read}).ReadHashes(indexes)
}

// tiles is the tlog.TileReader of a tree.
type tiles struct{ read func(Tile) ([]byte, error) }

func (tiles) Height() int { return 8 }

func (tiles) SaveTiles([]tlog.Tile, [][]byte) {}

func (t tiles) ReadTiles(names []tlog.Tile) (content [][]byte, err error) {
	for _, name := range names {
		b, err := t.read(Tile{name.L, uint64(name.N), name.W})
		if err != nil {
			return nil, err
		}
		content = append(content, b)
	}
	return content, nil
}

// compare holds a level's newest tile against its file.
func (t *tree) compare(level int) (at uint64, err error) {
	row := t.rows[level]
	tile := Tile{level, t.n[level], len(row) / len(Hash{})}
	at = tile.N * TileWidth << (8 * level)
	b, err := t.read(tile)
	if err != nil {
		return at, err
	}
	if !bytes.Equal(b, row) {
		same := 0
		for same < min(len(row), len(b)) && b[same] == row[same] {
			same++
		}
		at = (tile.N*TileWidth + uint64(same/len(Hash{}))) << (8 * level)
		return min(at, t.tree.Size-1), &mismatch{fmt.Sprintf("it is not what %s says", tile.Path())}
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
	first      uint64             // events before it are not there
	nonces     map[[16]byte]nonce // that live
	hours      map[int64][][16]byte
	open       map[uint64]admission
	now        int64 // the hour before the log's: nonces that expired before it are forgotten
	latest     int64 // the latest hour that the log has told
	dropped    map[uint32]said
	signatures uint64
	unsettled  uint64
	back       []step // where a nonce was spent before now
	known      []step // what back was when the log was read before
}

// admission is what may still get an outcome. One that failed may: the same request may succeed later.
type admission struct {
	who             [16]byte // a hash of who and what
	created, failed Type
	settled         bool
}

// nonce says who spent one, and the hour of its expiry.
type nonce struct {
	event uint64
	hour  int64
}

// said is an event that drops an epoch.
type said struct {
	event uint64
	root  string
}

// step is an event and the hour of its time.
type step struct {
	event uint64
	hour  int64
}

func newRules(known []step) *rules {
	return &rules{nonces: map[[16]byte]nonce{}, hours: map[int64][][16]byte{}, open: map[uint64]admission{}, dropped: map[uint32]said{}, known: known}
}

const (
	hourMS = 3_600_000
	// maxLifetime is more than a document may live.
	maxLifetime = 400 * 24 * 3600
)

// follow takes the next event.
func (r *rules) follow(index uint64, e Event) error {
	hour := e.TimeMS / hourMS
	r.latest = max(r.latest, hour)
	for len(r.known) > 0 && r.known[0].event < index {
		r.known = r.known[1:]
	}
	now := r.latest - 1
	if len(r.known) > 0 { // in increasing order: no later event goes back further
		now = min(now, r.known[0].hour)
	}
	if now > r.now { // what has expired may be spent again
		r.now = now
		for hour, prints := range r.hours {
			if hour < now {
				for _, print := range prints {
					if r.nonces[print].hour == hour {
						delete(r.nonces, print)
					}
				}
				delete(r.hours, hour)
			}
		}
	}
	switch e.Type.Kind() {
	case Admission, Spent:
		if hour < r.now {
			for len(r.back) > 0 && r.back[len(r.back)-1].hour >= hour {
				r.back = r.back[:len(r.back)-1]
			}
			r.back = append(r.back, step{index, hour})
		}
		return r.spend(index, e)
	case Outcome:
		return r.settle(e)
	}
	if text, ok := strings.CutPrefix(e.Resource, "epoch/"); ok && e.Type == RetentionApplied {
		epoch, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			return fmt.Errorf("%s of an epoch %q", e.Type, text)
		}
		if s, twice := r.dropped[uint32(epoch)]; twice {
			return fmt.Errorf("epoch %d was dropped by event %d", epoch, s.event)
		}
		r.dropped[uint32(epoch)] = said{index, e.Metadata["root"]}
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

func owner(e Event) [16]byte { return mix(e.Actor.PublicKey, e.Resource) }

// isHash says that a text is 32 bytes in hex, in the one way that they are written.
func isHash(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return len(s) == 64
}

func (r *rules) spend(index uint64, e Event) error {
	expires, err := strconv.ParseInt(e.Metadata["expires_at"], 10, 64)
	if err != nil || !isHash(e.Metadata["nonce"]) || !isHash(e.Metadata["digest"]) {
		return fmt.Errorf("%s without nonce, digest and expires_at", e.Type)
	}
	if now := e.TimeMS / 1000; expires < now-3600 || expires > now+maxLifetime { // what is closer may be a clock that was set
		return fmt.Errorf("%s of a document that expires at %d, at %d", e.Type, expires, now)
	}
	scope := "signer " + e.Metadata["signer"]
	admitted, created, failed := OfDocument(e.Metadata["transcript"])
	if e.Type.Kind() == Admission {
		name, version, _ := strings.Cut(e.Resource, "/") // the nonce is spent whatever the version
		if scope = "key " + name; name == "" || version == "" {
			return fmt.Errorf("%s without a key and its version", e.Type)
		}
		if e.Type != admitted || e.Outcome != "ok" {
			return fmt.Errorf("%s with outcome %q of a document of type %q", e.Type, e.Outcome, e.Metadata["transcript"])
		}
	} else if !isHash(e.Metadata["signer"]) {
		return fmt.Errorf("%s without a signer", e.Type)
	}
	print := mix(scope, e.Metadata["nonce"])
	if before, twice := r.nonces[print]; twice && before.hour >= e.TimeMS/hourMS {
		return fmt.Errorf("its nonce was spent by event %d", before.event)
	}
	hour := expires / 3600
	r.nonces[print] = nonce{index, hour}
	r.hours[hour] = append(r.hours[hour], print)
	if e.Type.Kind() == Admission {
		r.open[index] = admission{owner(e), created, failed, false}
		r.unsettled++
	}
	return nil
}

func (r *rules) settle(e Event) error {
	number, err := strconv.ParseUint(e.Metadata["admission"], 10, 64)
	if err != nil {
		return fmt.Errorf("%s names no admission", e.Type)
	}
	if number < r.first {
		return nil // it was dropped with its epoch
	}
	a, ok := r.open[number]
	switch {
	case !ok:
		return fmt.Errorf("%s: event %d is no admission that could have this outcome", e.Type, number)
	case a.who != owner(e):
		return fmt.Errorf("%s: event %d is an admission of somebody or something else", e.Type, number)
	case e.Type != a.created && e.Type != a.failed || (e.Type == a.created) != (e.Outcome == "ok"):
		return fmt.Errorf("%s with outcome %q: event %d is no admission that could end like this", e.Type, e.Outcome, number)
	}
	if !a.settled {
		r.unsettled--
	}
	if e.Type == a.created {
		r.signatures++
		delete(r.open, number)
	} else {
		a.settled = true
		r.open[number] = a
	}
	return nil
}
