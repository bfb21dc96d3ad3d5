package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"countersign/audit"
	"countersign/internal/cli"
	"countersign/internal/form"
	"countersign/internal/journal"

	"github.com/spf13/cobra"
)

// reconciled is the result of a comparison of journals with the audit log.
type reconciled struct {
	Good     bool             `json:"good"`
	Journals []journal.Report `json:"journals"`
	// Kinds counts the signatures of the journals by kind.
	Kinds map[string]int `json:"kinds"`
	// Matched counts the signatures that have their event, or that follow from the log.
	Matched int `json:"matched"`
	// Unlogged are signatures that should have an event, and have none.
	Unlogged []unlogged `json:"unlogged"`
	// Older counts documents and checkpoints of times that retention has dropped from the log.
	Older int `json:"older"`
	// Missing counts documents that the log has as signed since the journals begin, without a line.
	Missing int `json:"missing"`
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

// line is a line of a journal that must have its counterpart in the log.
type line struct {
	token string
	journal.Entry
	found bool
}

// ofDocument identifies a document and the version of the key that signed it.
type ofDocument struct {
	digest [32]byte
	key    string
}

type ofTree struct {
	epoch uint32
	size  uint64
}

// reconciler compares. The memory has one entry for each line.
type reconciler struct {
	log       audit.Log
	lines     []*line
	documents map[ofDocument][]*line
	trees     map[ofTree][]*line // checkpoints
	hooks     []*line
	resources map[string]bool // of the log's events
	certified int             // events of certificates
	certs     []*line
	admitted  map[uint64]ofDocument // admissions without an outcome
	from      time.Time             // the first line of the journal that begins last
	result    reconciled
}

// read reads the journals of a folder.
func (r *reconciler) read(folder string) error {
	tokens, err := journal.Tokens(folder)
	if err != nil {
		return err
	}
	if len(tokens) == 0 {
		return fmt.Errorf("%s has no journal: journal.folder of the appliance's configuration names the folder", folder)
	}
	r.documents, r.trees = map[ofDocument][]*line{}, map[ofTree][]*line{}
	r.result.Kinds = map[string]int{}
	for _, token := range tokens {
		report, err := journal.Read(folder, token, func(e journal.Entry) error {
			if e.Signature() {
				r.add(&line{token: token, Entry: e})
			}
			return nil
		})
		if err != nil {
			return err
		}
		if report.From.After(r.from) {
			r.from = report.From
		}
		r.result.Journals = append(r.result.Journals, report)
	}
	return nil
}

func (r *reconciler) add(l *line) {
	r.result.Kinds[l.Kind]++
	if l.Kind == form.Webhook && strings.HasPrefix(l.Detail, form.AlertID) {
		return // tests and repetitions have no event; their number is told
	}
	switch l.Kind {
	case form.Canary, form.Handshake, form.Request:
		return // without a meaning beyond the moment; their number is told
	case form.Checkpoint:
		epoch, size, _ := strings.Cut(l.Detail, "/")
		e, err1 := strconv.ParseUint(epoch, 10, 32)
		n, err2 := strconv.ParseUint(size, 10, 64)
		if err1 == nil && err2 == nil {
			at := ofTree{uint32(e), n}
			r.trees[at] = append(r.trees[at], l)
		}
	case form.Webhook:
		r.hooks = append(r.hooks, l)
	case form.Certificate:
		r.certs = append(r.certs, l)
	default:
		at := ofDocument{l.Digest, l.Key.String()}
		r.documents[at] = append(r.documents[at], l)
	}
	r.lines = append(r.lines, l)
}

// follow sees the events of a reading of the log.
func (r *reconciler) follow() func(uint64, audit.Event) error {
	r.resources, r.admitted, r.certified, r.result.Missing = map[string]bool{}, map[uint64]ofDocument{}, 0, 0
	return func(index uint64, e audit.Event) error {
		r.resources[e.Resource] = true
		if e.Type == audit.CertificateChanged && e.Metadata["sha256"] != "" {
			r.certified++
		}
		if e.Action != "sign" || e.Outcome != "ok" {
			return nil
		}
		if digest, err := hex.DecodeString(e.Metadata["digest"]); err == nil && len(digest) == 32 {
			at := ofDocument{[32]byte(digest), e.Resource}
			for _, l := range r.documents[at] {
				l.found = true
			}
			r.admitted[index] = at
			return nil
		}
		admission, err := strconv.ParseUint(e.Metadata["admission"], 10, 64)
		if err != nil {
			return nil
		}
		if at, ok := r.admitted[admission]; ok {
			delete(r.admitted, admission)
			if len(r.documents[at]) == 0 && e.TimeMS > r.from.UnixMilli() {
				r.result.Missing++
			}
		}
		return nil
	}
}

// grown compares the checkpoints of a tree.
func (r *reconciler) grown(epoch uint32, tree *audit.Tree) error {
	all := r.trees[ofTree{epoch, tree.Size}]
	if len(all) == 0 {
		return nil
	}
	root, err := tree.Root()
	if err != nil {
		return err
	}
	digest := audit.Checkpoint{Epoch: epoch, Size: tree.Size, Root: root}.Digest(r.log)
	for _, l := range all {
		l.found = l.Digest == digest
	}
	return nil
}

// hooked reports that a webhook's id names something of the log: a range of its events, or a key.
// Package appliance has the forms of the ids.
func (r *reconciler) hooked(l *line, events uint64) bool {
	f := strings.Split(l.Detail, "_")
	_, id, _ := strings.Cut(r.log.Name(), "/")
	switch {
	case len(f) < 4 || f[1] != id:
		return false
	case f[0] == "events" && len(f) == 5:
		last, err := strconv.ParseUint(f[4], 10, 64)
		return err == nil && last < events
	case f[0] == "rotation" || f[0] == "compromise":
		version, err := strconv.ParseUint(f[3], 10, 32)
		return err == nil && (r.resources[f[2]] || r.resources[f[2]+"/"+f[3]] ||
			r.resources[fmt.Sprintf("%s/%d", f[2], version-1)])
	}
	return false
}

// finish sums up after the log has been verified.
func (r *reconciler) finish(log audit.Report) {
	for _, l := range r.hooks {
		l.found = r.hooked(l, log.First+log.Events) || log.First > 0
	}
	for i, l := range r.certs {
		l.found = i < r.certified || log.First > 0
	}
	r.result.Unlogged = []unlogged{}
	for _, l := range r.lines {
		switch {
		case l.found:
			r.result.Matched++
		case log.First > 0 && l.Time.UnixMilli() < log.FromMS:
			r.result.Older++
		default:
			r.result.Unlogged = append(r.result.Unlogged, unlogged{
				l.token, l.Number, l.Time.UTC(), l.Key.String(), l.Kind, l.Detail, hex.EncodeToString(l.Digest[:]),
			})
		}
	}
	r.result.Good = len(r.result.Unlogged) == 0
	for _, j := range r.result.Journals {
		r.result.Good = r.result.Good && len(j.Faults) == 0
	}
}

// reconcile holds the journals of key workers against the audit log.
func (t *tool) reconcile() *cobra.Command {
	var of logFlags
	var folder string
	do := func(cmd *cobra.Command, args []string) error {
		if folder == "" {
			return usageError{errors.New("--journal is missing: name the folder of the journals, or a copy of it")}
		}
		var r reconciler
		if err := r.read(folder); err != nil {
			return err
		}
		log, err := t.checkWith(cmd.Context(), &of, args, func(log audit.Log, o *audit.VerifyOptions) {
			r.log, o.Follow, o.Grown = log, r.follow, r.grown
		})
		if err != nil {
			return err
		}
		r.finish(log)
		if err := t.print(r.result, func(w io.Writer) { r.result.print(w) }); err != nil {
			return err
		}
		if !r.result.Good {
			return fmt.Errorf("%w: %s without an event, and %s of the journal: if the log is older than the journal, "+
				"export it again; otherwise the daemon may be in other hands, see docs/INCIDENTS.md", errUnreconciled,
				cli.Count(len(r.result.Unlogged), "signature"), cli.Count(r.result.faults(), "fault"))
		}
		return nil
	}
	c := command("reconcile [DIR]", "Compare the journals of key workers with an audit log", cobra.MaximumNArgs(1), do)
	details(c, "Each signature that left a key worker has a line in a journal, which the daemon can't write.\n"+
		"Checked: the log as by audit verify; the hash chain of each journal; each signed document has its admission\n"+
		"in the log; each signed checkpoint is of this log's tree; each webhook and certificate has its\n"+
		"cause in the log. TLS handshakes and canaries are counted. Copy the journal first and export the\n"+
		"log afterwards, since an admission comes before its signature.")
	c.Example = "  countersign audit reconcile log --key \"$(cat log.vkey)\" --journal journal"
	c.Flags().StringVar(&folder, "journal", "", "the `folder` of the journals, or a copy of it")
	of.add(t, c.Flags())
	return c
}

// errUnreconciled is the class of a journal that the log does not explain.
var errUnreconciled = errors.New("the journal and the log do not agree")

func (r reconciled) faults() (n int) {
	for _, j := range r.Journals {
		n += len(j.Faults)
	}
	return n
}

// maxShown is the number of signatures without an event that are shown; --json has all.
const maxShown = 20

func (r reconciled) print(w io.Writer) {
	for _, j := range r.Journals {
		fmt.Fprintf(w, "journal\t%s: %s from %d on, from %s to %s\n",
			j.Token, cli.Count(j.Lines, "line"), j.First, date(j.From.Unix()), date(j.To.Unix()))
		fmt.Fprintf(w, "head\t%s\n", j.Head)
		for _, fault := range j.Faults {
			fmt.Fprintf(w, "fault\t%s\n", fault)
		}
	}
	for _, kind := range slices.Sorted(maps.Keys(r.Kinds)) {
		fmt.Fprintf(w, "signed\t%d %s\n", r.Kinds[kind], kind)
	}
	fmt.Fprintf(w, "matched\t%s\n", cli.Count(r.Matched, "signature"))
	if r.Older > 0 {
		fmt.Fprintf(w, "older\t%s than the log, which retention has shortened\n", cli.Count(r.Older, "signature"))
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
