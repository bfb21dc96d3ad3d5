package main

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"countersign/audit"
	"countersign/internal/cli"
	"countersign/internal/durable"
	"countersign/internal/form"
	"countersign/internal/journal"

	"github.com/spf13/cobra"
)

// reconciled is the result of a comparison of journals with the audit log.
type reconciled struct {
	Good     bool             `json:"good"`
	Journals []journal.Report `json:"journals"`
	Log      reconciledLog    `json:"log"`
	// Kinds counts the signatures of the journals by kind.
	Kinds map[string]int `json:"kinds"`
	// Matched counts the signatures with an event, or with a tree of the log. Repeated counts those
	// of them that are of the same content as a line before.
	Matched  int `json:"matched"`
	Repeated int `json:"repeated"`
	// Ranges counts the messages of sinks, of which the numbers of the events are compared.
	Ranges int `json:"ranges"`
	// Counted counts the signatures of which nothing is compared: TLS handshakes and canaries.
	Counted int `json:"counted"`
	// Unlogged are signatures that should have an event, and have none.
	Unlogged []unlogged `json:"unlogged"`
	// Older are signatures whose events retention has dropped from the log.
	Older []older `json:"older"`
	// Missing counts documents that the log has as signed since the journals begin, without a line.
	Missing int `json:"missing"`
}

type reconciledLog struct {
	First  uint64    `json:"first"`
	Events uint64    `json:"events"`
	From   time.Time `json:"from"`
	To     time.Time `json:"to"`
}

// unlogged is a signature without an event.
type unlogged struct {
	Token  string    `json:"token"`
	Line   uint64    `json:"line"`
	Time   time.Time `json:"time"`
	Key    string    `json:"key"`
	Kind   string    `json:"kind"`
	Detail string    `json:"detail,omitempty"`
	Digest string    `json:"digest"`
}

// older counts the lines of a journal that are older than the log.
type older struct {
	Token      string    `json:"token"`
	Signatures int       `json:"signatures"`
	First      uint64    `json:"first"` // number of the first such line
	Last       uint64    `json:"last"`
	Until      time.Time `json:"until"` // time of the last such line
}

// line is a line of a journal that must have its counterpart in the log.
type line struct {
	token string
	journal.Entry
	found bool
}

// claim identifies what an event allows to be signed, in any number of times: the same document by
// the same version of a key, which has one signature; attempts to deliver the same message; the
// same certificate.
type claim struct {
	kind   string // "" for all documents
	name   string // document: the version of the key; webhook: its id
	digest [32]byte
}

type ofTree struct {
	epoch uint32
	size  uint64
}

// admission is an admission without an outcome.
type admission struct {
	claim
	at int64 // Unix milliseconds
}

// reconciler compares. The memory has one entry for each line.
type reconciler struct {
	log   audit.Log
	mark  mark
	lines []*line
	of    map[claim][]*line
	trees map[ofTree][]*line // checkpoints

	first    uint64 // the first event of the log
	firstAt  int64  // time of the first event, Unix milliseconds
	epoch    uint32 // of the first event
	begun    bool   // first is known
	admitted map[uint64]admission
	before   map[string]int // outcomes of dropped admissions, by the version of the key
	from     time.Time      // the first line of the journal that begins last
	faults   int            // beside those of the mark
	ends     map[string]journalEnd
	result   reconciled
}

// mark is the end of the last comparison, in a file of the auditor. Without a mark, a journal whose
// oldest files were dropped, and a log that was shortened, hide what they had. With a mark, each
// line since is compared, or is missing.
type mark struct {
	Journals map[string]journalEnd `json:"journals"`
}

// journalEnd is the end of a journal at a comparison.
type journalEnd struct {
	Lines  uint64   `json:"lines"` // number after the last line
	Chain  string   `json:"chain"` // of the last line
	Faults []string `json:"faults,omitempty"`
}

// zeroChain is the chain before the first line.
var zeroChain = strings.Repeat("0", 64)

// read reads the journals of a folder.
func (r *reconciler) read(folder string) error {
	tokens, err := journal.Tokens(folder)
	if err != nil {
		return err
	}
	if len(tokens) == 0 {
		return fmt.Errorf("%s has no journal: journal.folder of the appliance's configuration names the folder", folder)
	}
	r.of, r.trees, r.ends = map[claim][]*line{}, map[ofTree][]*line{}, map[string]journalEnd{}
	r.result.Kinds = map[string]int{}
	for _, token := range tokens {
		end := journalEnd{Chain: zeroChain}
		since, marked := r.mark.Journals[token]
		same := since.Lines == 0 // the line at the mark is the same as then
		report, err := journal.Read(folder, token, func(e journal.Entry) error {
			end.Lines, end.Chain = e.Number+1, fmt.Sprintf("%x", e.Chain())
			switch {
			case end.Lines == since.Lines:
				same = end.Chain == since.Chain
			case e.Kind == journal.Begin && e.Number == since.Lines && since.Lines > 0:
				same = fmt.Sprintf("%x", e.Digest) == since.Chain
			}
			if e.Signature() {
				r.add(&line{token: token, Entry: e})
			}
			return nil
		})
		if err != nil {
			return err
		}
		end.Faults = slices.Clone(report.Faults)
		for _, fault := range report.Faults {
			if !slices.Contains(since.Faults, fault) {
				r.faults++
			}
		}
		if r.mark.Journals != nil {
			fault := ""
			switch {
			// The line before the first one ended its file, and signed nothing.
			case report.First > since.Lines+1 || report.First > 0 && !marked:
				fault = fmt.Sprintf("lines %d to %d were dropped, and no comparison has seen them: compare more "+
					"often, or keep more files; a flood of signatures has this effect, too",
					since.Lines, report.First-1)
			case marked && !same && report.First <= since.Lines:
				fault = fmt.Sprintf("line %d is not the one of the last comparison: the journal was exchanged, "+
					"or cut off", since.Lines-1)
			}
			if fault != "" {
				report.Faults = append(report.Faults, fault)
				r.faults++
				end.Lines = 0 // no mark is made of it
			}
		}
		if report.From.After(r.from) {
			r.from = report.From
		}
		r.ends[token] = end
		r.result.Journals = append(r.result.Journals, report)
	}
	for token, since := range r.mark.Journals {
		if _, there := r.ends[token]; !there {
			r.faults++
			r.ends[token] = journalEnd{}
			r.result.Journals = append(r.result.Journals, journal.Report{Token: token, Faults: []string{
				fmt.Sprintf("the journal is missing; the last comparison had %d lines of it", since.Lines),
			}})
		}
	}
	return nil
}

func (r *reconciler) add(l *line) {
	r.result.Kinds[l.Kind]++
	switch l.Kind {
	case form.Canary, form.Handshake:
		r.result.Counted++ // without a meaning beyond the moment
		return
	case form.Checkpoint:
		epoch, size, _ := strings.Cut(l.Detail, "/")
		e, err1 := strconv.ParseUint(epoch, 10, 32)
		n, err2 := strconv.ParseUint(size, 10, 64)
		if err1 == nil && err2 == nil {
			at := ofTree{uint32(e), n}
			r.trees[at] = append(r.trees[at], l)
		}
	case form.Webhook:
		r.claim(l, claim{form.Webhook, l.Detail, l.Digest})
	case form.Certificate, form.Request:
		r.claim(l, claim{l.Kind, "", l.Digest})
	default:
		r.claim(l, claim{"", l.Key.String(), l.Digest})
	}
	r.lines = append(r.lines, l)
}

func (r *reconciler) claim(l *line, c claim) { r.of[c] = append(r.of[c], l) }

func (r *reconciler) find(c claim) {
	for _, l := range r.of[c] {
		l.found = true
	}
}

// follow sees the events of a reading of the log.
func (r *reconciler) follow() func(uint64, audit.Event) error {
	r.admitted, r.before, r.begun, r.result.Missing = map[uint64]admission{}, map[string]int{}, false, 0
	for _, l := range r.lines {
		l.found = false
	}
	return func(index uint64, e audit.Event) error {
		if !r.begun {
			r.first, r.firstAt, r.begun = index, e.TimeMS, true
			if n, err := strconv.ParseUint(strings.TrimPrefix(e.Resource, "epoch/"), 10, 32); err == nil {
				r.epoch = uint32(n)
			}
		}
		var digest [32]byte
		if text := e.Metadata["digest"]; len(text) == 64 {
			hex.Decode(digest[:], []byte(text))
		}
		switch {
		case e.Type.Kind() == audit.Admission:
			c := claim{"", e.Resource, digest}
			r.find(c)
			r.admitted[index] = admission{c, e.TimeMS}
		case e.Type.Kind() == audit.Outcome:
			r.settled(e)
		case e.Type == audit.CertificateSigned:
			r.find(claim{e.Action, "", digest})
		case e.Metadata["message"] != "":
			r.find(claim{form.Webhook, e.Metadata["message"], digest})
		}
		return nil
	}
}

// settled sees an outcome.
func (r *reconciler) settled(e audit.Event) {
	n, err := strconv.ParseUint(e.Metadata["admission"], 10, 64)
	if err != nil {
		return
	}
	if n < r.first {
		r.before[e.Resource]++
		return
	}
	if a, ok := r.admitted[n]; ok && e.Outcome == "ok" {
		delete(r.admitted, n)
		if len(r.of[a.claim]) == 0 && a.at > r.from.UnixMilli() {
			r.result.Missing++
		}
	}
}

// heads compares the checkpoints of the ends of epochs, of which dropped epochs have nothing else.
func (r *reconciler) heads(all []audit.Checkpoint) error {
	for _, c := range all {
		r.compare(c)
	}
	return nil
}

// grown compares the checkpoints of a tree.
func (r *reconciler) grown(epoch uint32, tree *audit.Tree) error {
	if len(r.trees[ofTree{epoch, tree.Size}]) == 0 {
		return nil
	}
	root, err := tree.Root()
	if err != nil {
		return err
	}
	r.compare(audit.Checkpoint{Epoch: epoch, Size: tree.Size, Root: root})
	return nil
}

func (r *reconciler) compare(c audit.Checkpoint) {
	digest := c.Digest(r.log)
	for _, l := range r.trees[ofTree{c.Epoch, c.Size}] {
		l.found = l.Digest == digest
	}
}

// ofSink reports that a webhook's id is of a message of a sink, and has the numbers of events that
// the log has or has had. Package sink has the form.
func (r *reconciler) ofSink(l *line, end uint64) bool {
	rest, ok := strings.CutPrefix(l.Detail, "events_"+r.logID()+"_")
	f := strings.Split(rest, "_")
	if !ok || len(f) < 3 {
		return false
	}
	first, err1 := strconv.ParseUint(f[len(f)-2], 10, 64)
	last, err2 := strconv.ParseUint(f[len(f)-1], 10, 64)
	return err1 == nil && err2 == nil && first <= last && last < end
}

func (r *reconciler) logID() string {
	return r.log.ID()
}

const (
	// webhookLife is the longest time from the event of a message to the last attempt to deliver
	// it.
	webhookLife = 3 * 24 * time.Hour
	// inFlight is the longest time from an event to its signature, on a machine that is overloaded.
	inFlight = time.Minute
)

// isOlder reports that retention may have dropped the event of a line: the line is older than the
// log's first event by its time, and stands before each line that the log has. Signatures may also
// have been under way when the log's first event was written: a document has an outcome in the log,
// without its admission; a checkpoint is of an epoch before; a certificate leaves within inFlight,
// and a message within webhookLife.
func (r *reconciler) isOlder(l *line, has map[string]uint64) bool {
	if r.first == 0 || r.mark.Journals != nil && l.Number >= r.mark.Journals[l.token].Lines {
		return false
	}
	// Both times are of the system's clock. Those of events are in milliseconds.
	late := l.Time.Truncate(time.Millisecond).Sub(time.UnixMilli(r.firstAt))
	if number, ok := has[l.token]; late <= 0 {
		return !ok || l.Number < number
	}
	switch l.Kind {
	case form.Webhook:
		of, rest, _ := strings.Cut(l.Detail, "_")
		return of != "events" && strings.HasPrefix(rest, r.logID()+"_") && late < webhookLife
	case form.Checkpoint:
		text, _, _ := strings.Cut(l.Detail, "/")
		epoch, err := strconv.ParseUint(text, 10, 32)
		return err == nil && uint32(epoch) < r.epoch && late < inFlight
	case form.Certificate, form.Request:
		return late < inFlight
	}
	if r.before[l.Key.String()] > 0 {
		r.before[l.Key.String()]--
		return true
	}
	return false
}

// finish sums up after the log has been verified.
func (r *reconciler) finish(log audit.Report) {
	r.result.Log = reconciledLog{
		log.First, log.Events, time.UnixMilli(log.FromMS).UTC(), time.UnixMilli(log.ToMS).UTC(),
	}
	has := map[string]uint64{} // the first line of each journal that the log has
	for _, l := range r.lines {
		if _, ok := has[l.token]; !ok && l.found && l.Time.UnixMilli() >= r.firstAt {
			has[l.token] = l.Number
		}
	}
	r.result.Unlogged, r.result.Older = []unlogged{}, []older{}
	for _, l := range r.lines {
		switch {
		case l.found:
			r.result.Matched++
		case l.Kind == form.Webhook && r.ofSink(l, log.First+log.Events):
			r.result.Ranges++
		case r.isOlder(l, has):
			r.result.older(l)
		default:
			r.result.Unlogged = append(r.result.Unlogged, unlogged{
				l.token, l.Number, l.Time.UTC(), l.Key.String(), l.Kind, l.Detail, hex.EncodeToString(l.Digest[:]),
			})
		}
	}
	for _, same := range r.of {
		if same[0].found {
			r.result.Repeated += len(same) - 1
		}
	}
	for _, same := range r.trees {
		found := 0
		for _, l := range same {
			if l.found {
				found++
			}
		}
		r.result.Repeated += max(0, found-1)
	}
	r.result.Good = len(r.result.Unlogged) == 0 && r.faults == 0
}

func (r *reconciled) older(l *line) {
	if n := len(r.Older); n == 0 || r.Older[n-1].Token != l.token {
		r.Older = append(r.Older, older{Token: l.token, First: l.Number})
	}
	o := &r.Older[len(r.Older)-1]
	o.Signatures, o.Last, o.Until = o.Signatures+1, l.Number, l.Time.UTC()
}

// readMark reads the mark of the last comparison. A file that does not exist is a mark at the
// beginning, and is not asked for the lines that were dropped before.
func (r *reconciler) readMark(path string) error {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = json.Unmarshal(b, &r.mark)
	}
	if err == nil && r.mark.Journals == nil {
		err = errors.New("it has no journals")
	}
	if err != nil {
		return fmt.Errorf("%s is no mark of a comparison: %w", path, err)
	}
	return nil
}

// writeMark writes the mark of this comparison. Signatures without an event, lost lines and an
// exchanged journal leave the mark where it is.
func (r *reconciler) writeMark(path string) error {
	if len(r.result.Unlogged) > 0 {
		return nil
	}
	for _, end := range r.ends {
		if end.Lines == 0 {
			return nil
		}
	}
	b, err := json.MarshalIndent(mark{r.ends}, "", "  ")
	if err == nil {
		err = durable.Write(path, append(b, '\n'), 0o600)
	}
	return err
}

// reconcile holds the journals of key workers against the audit log.
func (t *tool) reconcile() *cobra.Command {
	var of logFlags
	var folder, marked string
	do := func(cmd *cobra.Command, args []string) error {
		if folder == "" {
			return usageError{errors.New("--journal is missing: name the folder of the journals, or a copy of it")}
		}
		var r reconciler
		if marked != "" {
			if err := r.readMark(marked); err != nil {
				return err
			}
		}
		if err := r.read(folder); err != nil {
			return err
		}
		log, err := t.checkWith(cmd.Context(), &of, args, func(log audit.Log, o *audit.VerifyOptions) {
			r.log, o.Follow, o.Heads, o.Grown = log, r.follow, r.heads, r.grown
		})
		if err != nil {
			return err
		}
		r.finish(log)
		if marked != "" {
			if err := r.writeMark(marked); err != nil {
				return err
			}
		}
		if err := t.print(r.result, func(w io.Writer) { r.result.print(w) }); err != nil {
			return err
		}
		if !r.result.Good {
			return fmt.Errorf("%w: %s without an event, and %s of the journal: if the log is older than the journal, "+
				"export it again; otherwise the daemon may be in other hands, see \"A signing key is suspected\" in "+
				"docs/INCIDENTS.md", errUnreconciled,
				cli.Count(len(r.result.Unlogged), "signature"), cli.Count(r.faults, "fault"))
		}
		return nil
	}
	c := command("reconcile [DIR]", "Compare the journals of key workers with an audit log", cobra.MaximumNArgs(1), do)
	details(c, "Each signature that left a key worker has a line in a journal, which the daemon can't write.\n"+
		"Checked: the log as by audit verify; the hash chain of each journal; each signed document has its admission\n"+
		"in the log; each signed checkpoint is of this log's tree; each webhook, certificate and request for one has\n"+
		"its event, with the digest of its content. Of messages of sinks, the numbers of the events are checked.\n"+
		"TLS handshakes and canaries are counted. Signatures whose events retention has dropped are told as older.\n"+
		"Copy the journal first and export the log afterwards, since an event comes before its signature.\n\n"+
		"--mark remembers the end of this comparison: at the next one, no line since may be missing or older.")
	c.Example = "  countersign audit reconcile log --key \"$(cat log.vkey)\" --journal journal"
	c.Flags().StringVar(&folder, "journal", "", "the `folder` of the journals, or a copy of it")
	c.Flags().StringVar(&marked, "mark", "", "a `file` that remembers the end of the last comparison (default: none)")
	of.add(t, c.Flags())
	return c
}

// errUnreconciled is the class of a journal that the log does not explain.
var errUnreconciled = errors.New("the journal and the log do not agree")

// maxShown is the number of signatures without an event that are shown; --json has all.
const maxShown = 20

func (r reconciled) print(w io.Writer) {
	for _, j := range r.Journals {
		fmt.Fprintf(w, "journal\t%s: %s from %d on, from %s to %s\n",
			j.Token, cli.Count(j.Lines, "line"), j.First, date(j.From.Unix()), date(j.To.Unix()))
		fmt.Fprintf(w, "head\t%s\n", j.Head)
		if j.First > 0 {
			fmt.Fprintf(w, "dropped\tlines 0 to %d of the journal: what they had is not compared\n", j.First-1)
		}
		for _, fault := range j.Faults {
			fmt.Fprintf(w, "fault\t%s\n", fault)
		}
	}
	fmt.Fprintf(w, "log\t%s from %d on, from %s to %s\n",
		cli.Count(r.Log.Events, "event"), r.Log.First, date(r.Log.From.Unix()), date(r.Log.To.Unix()))
	for _, kind := range slices.Sorted(maps.Keys(r.Kinds)) {
		fmt.Fprintf(w, "signed\t%d %s\n", r.Kinds[kind], kind)
	}
	fmt.Fprintf(w, "matched\t%s, each with what the log has of it\n", cli.Count(r.Matched, "signature"))
	if r.Repeated > 0 {
		fmt.Fprintf(w, "repeated\t%d of them, of the same content as one before\n", r.Repeated)
	}
	if r.Ranges > 0 {
		fmt.Fprintf(w, "ranges\t%s of sinks: the numbers of their events are in the log, the content is not compared\n",
			cli.Count(r.Ranges, "message"))
	}
	if r.Counted > 0 {
		fmt.Fprintf(w, "counted\t%s, of which the log has nothing: TLS handshakes and canaries\n",
			cli.Count(r.Counted, "signature"))
	}
	for _, o := range r.Older {
		fmt.Fprintf(w, "older\t%s of %s, lines %d to %d, until %s: retention has dropped their events\n",
			cli.Count(o.Signatures, "signature"), o.Token, o.First, o.Last, date(o.Until.Unix()))
	}
	if r.Missing > 0 {
		fmt.Fprintf(w, "missing\t%s of the log without a line: a power cut, or a token whose journal is not here\n",
			cli.Count(r.Missing, "signature"))
	}
	for i, u := range r.Unlogged {
		if i == maxShown {
			fmt.Fprintf(w, "unlogged\tand %d more: see --json\n", len(r.Unlogged)-i)
			break
		}
		fmt.Fprintf(w, "unlogged\t%s line %d, %s: %s %s by %s, %s\n",
			u.Token, u.Line, date(u.Time.Unix()), u.Kind, u.Detail, u.Key, u.Digest)
	}
}
