package main

import (
	"bufio"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"countersign/admin/api"
	"countersign/internal/cli"
	"countersign/policy"

	"github.com/spf13/cobra"
)

// records is the source of recorded decisions and of the policies that made the decisions: a
// running appliance, or on any machine a file from policy export.
type records struct {
	tool     *tool
	file     string
	client   *api.Client
	policies map[string]api.Policy     // by SHA-256
	parsed   map[string]*policy.Policy // by SHA-256
	bar      *bar                      // of each

	groups  []policy.Group // of the appliance, or of the file at its export
	present bool           // groups are known
}

// exportEntry is one line of an exported file: the groups at the export, a policy, or a decision.
type exportEntry struct {
	Groups   *[]api.Group  `json:"groups,omitempty"`
	Policy   *api.Policy   `json:"policy,omitempty"`
	Decision *api.Decision `json:"decision,omitempty"`
}

func (r *records) flags(t *tool, c *cobra.Command) {
	r.tool = t
	t.addressFlags(c.Flags())
	c.Flags().StringVar(&r.file, "records", "",
		"read the decisions from this `file` of policy export (default: from the appliance)")
}

// visitor is called with a recorded decision, as raw text and decoded, and with the policy that
// made the decision.
type visitor func(event uint64, raw string, rec policy.Record, by *policy.Policy) error

// dial connects to the appliance, unless there is a connection.
func (r *records) dial() (err error) {
	if r.client == nil {
		r.client, err = r.tool.dialAdmin()
	}
	return err
}

// now returns the time from which an age counts back, by the clock of the decisions: the ledger's
// time of the appliance, or the time of the file's newest decision.
func (r *records) now(ctx context.Context) (at time.Time, err error) {
	if r.file == "" {
		if err := r.dial(); err != nil {
			return at, err
		}
		l, err := r.client.Ledger(ctx)
		return time.Unix(l.Time, 0), err
	}
	r.policies = map[string]api.Policy{}
	return at, r.readFile(func(d api.Decision) error {
		rec, err := policy.ParseRecord([]byte(d.Record))
		if t := time.UnixMilli(rec.TimeMS); err == nil && t.After(at) {
			at = t
		}
		return err
	})
}

// since calls visit for each decision of a last duration, the oldest first.
func (r *records) since(ctx context.Context, age time.Duration, visit visitor) error {
	now, err := r.now(ctx)
	if err != nil {
		return err
	}
	return r.each(ctx, now.Add(-age), visit)
}

// each calls visit for each decision since a time, the oldest first.
func (r *records) each(ctx context.Context, since time.Time, visit visitor) error {
	decode := func(d api.Decision) error {
		rec, err := policy.ParseRecord([]byte(d.Record))
		if err != nil {
			return fmt.Errorf("event %d: %w", d.Event, err)
		}
		if r.file != "" && time.UnixMilli(rec.TimeMS).Before(since) { // the appliance compares by itself
			return nil
		}
		by, err := r.policy(ctx, rec.Policy)
		if err != nil {
			return fmt.Errorf("event %d: %w", d.Event, err)
		}
		return visit(d.Event, d.Record, rec, by)
	}
	r.policies, r.parsed = map[string]api.Policy{}, map[string]*policy.Policy{}
	r.bar = r.tool.bar("decisions")
	defer r.bar.end()
	if r.file != "" {
		r.bar.noun = "bytes"
		return r.readFile(decode)
	}
	return r.readAppliance(ctx, since, decode)
}

func (r *records) readFile(visit func(api.Decision) error) error {
	f, err := os.Open(r.file)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	d := json.NewDecoder(bufio.NewReader(f))
	d.DisallowUnknownFields()
	for {
		var e exportEntry
		err := d.Decode(&e)
		if errors.Is(err, io.EOF) {
			return nil
		} else if err == nil && e.Policy == nil && e.Decision == nil && e.Groups == nil {
			err = errors.New("neither groups nor a policy nor a decision")
		}
		if err == nil && e.Groups != nil {
			err = r.readGroups(*e.Groups)
		}
		if err != nil {
			return fmt.Errorf("%s: it is not what policy export writes: %w", r.file, err)
		}
		if e.Policy != nil {
			r.policies[e.Policy.SHA256] = *e.Policy
		}
		if e.Decision != nil {
			if err := visit(*e.Decision); err != nil {
				return err
			}
		}
		r.bar.progress(uint64(d.InputOffset()), uint64(st.Size()))
	}
}

func (r *records) readGroups(all []api.Group) error {
	r.groups, r.present = nil, true
	for _, each := range all {
		g, err := policy.NewGroup(each.Name, each.Of, each.Members)
		if err != nil {
			return err
		}
		r.groups = append(r.groups, g)
	}
	return nil
}

func (r *records) readAppliance(ctx context.Context, since time.Time, visit func(api.Decision) error) error {
	if err := r.dial(); err != nil {
		return err
	}
	if !r.present {
		groups, err := presentGroups(ctx, r.client)
		if err != nil {
			return err
		}
		r.groups, r.present = groups, true
	}
	all, err := r.client.Policies(ctx)
	if err != nil {
		return err
	}
	for _, p := range all {
		r.policies[p.SHA256] = p
	}
	l, err := r.client.Ledger(ctx)
	if err != nil {
		return err
	}
	for first, after := uint64(0), ""; ; {
		some, next, err := r.client.Decisions(ctx, max(0, since.UnixMilli()), after)
		if err != nil || len(some) == 0 {
			return err
		}
		if err := r.checkLogged(ctx, some); err != nil {
			return err
		}
		if after == "" {
			first = some[0].Event
		}
		last := max(l.Events-1, some[len(some)-1].Event)
		for _, d := range some {
			if err := visit(d); err != nil {
				return err
			}
			r.bar.progress(d.Event-first, last-first)
		}
		if after = next; after == "" {
			r.bar.progress(last-first, last-first)
			return nil
		}
	}
}

// checkLogged compares the digests of records with the digests in their events, as far as the audit
// log still has the events.
func (r *records) checkLogged(ctx context.Context, some []api.Decision) error {
	inputs, last := map[uint64]string{}, some[len(some)-1].Event
	for from := some[0].Event; from <= last; {
		events, err := r.client.Events(ctx, from, maxPage)
		if err != nil {
			return err
		}
		for _, e := range events {
			inputs[e.Index], from = e.Metadata["inputs"], e.Index+1
		}
		if len(events) == 0 {
			break
		}
	}
	for _, d := range some {
		if digest, kept := inputs[d.Event]; kept && digest != policy.Digest([]byte(d.Record)) {
			return changed(d.Event)
		}
	}
	return nil
}

func changed(event uint64) error {
	return fmt.Errorf("event %d of the audit log does not have the SHA-256 of its record: one of them was changed; "+
		"check the log with countersign audit verify", event)
}

// policy returns the parsed policy with a SHA-256.
func (r *records) policy(ctx context.Context, hash string) (*policy.Policy, error) {
	if p := r.parsed[hash]; p != nil {
		return p, nil
	}
	v, ok := r.policies[hash]
	if !ok {
		return nil, fmt.Errorf("the policy with SHA-256 %s is missing in the records", hash)
	}
	if r.client != nil && v.Text == "" {
		var err error
		if v, err = r.client.Policy(ctx, v.Version); err != nil {
			return nil, err
		}
		r.policies[hash] = v
	}
	p, err := policy.Parse(fmt.Sprintf("version %d", v.Version), []byte(v.Text))
	if err != nil {
		return nil, err
	}
	if hex.EncodeToString(p.Hash[:]) != hash {
		return nil, fmt.Errorf("version %d of the policy was changed: its text does not have SHA-256 %s",
			v.Version, hash)
	}
	r.parsed[hash] = p
	return p, nil
}

// errStop ends each without a failure.
var errStop = errors.New("stop")

func (t *tool) policy() *cobra.Command {
	schema := command("schema", "Print the Cedar schema of policies: actions, and fields of a request", cobra.NoArgs,
		func(*cobra.Command, []string) error {
			_, err := t.stdout.Write(policy.Schema)
			return err
		})
	return group("policy", "Test policies before they are in force, and explain recorded decisions",
		t.policyCheck(), t.policyTest(), t.policyExplain(), t.policyDiff(), t.policyExport(), schema)
}

func (t *tool) policyCheck() *cobra.Command {
	var names bool
	do := func(cmd *cobra.Command, args []string) error {
		p, err := policy.Load(args[0])
		if err != nil {
			return err
		}
		var known func(entity, name string) bool
		if names {
			if known, err = t.knownNames(cmd.Context()); err != nil {
				return err
			}
		}
		rules, warnings, costs := p.Rules(), append([]policy.Warning{}, p.Warnings(known)...), p.Costs()
		out := map[string]any{"sha256": hex.EncodeToString(p.Hash[:]), "rules": len(rules), "verifies": p.Verifies,
			"warnings": warnings, "costs": costs}
		return t.print(out, func(w io.Writer) {
			fmt.Fprintf(w, "sound\t%s\nsha256\t%x\n", cli.Count(len(rules), "rule"), p.Hash)
			fmt.Fprintf(w, "verify\t%s\n", either(p.Verifies, "by these rules",
				`every peer, since no rule names Action::"verify"`))
			showCosts(w, costs, len(rules))
			for _, each := range warnings {
				fmt.Fprintf(w, "warning\t%v\n", each)
			}
			if len(rules) == 0 {
				fmt.Fprintln(w, "warning\twithout a rule, nothing is signed")
			}
		})
	}
	c := command("check FILE", "Check a policy file: syntax, types, rules that never apply", cobra.ExactArgs(1), do)
	details(c, "Exit status 1: the appliance would refuse the file. A warning is about a rule that may be right:\n"+
		"an amount without its currency, == with a *, and, with --names, a peer, a key or a group that the\n"+
		"appliance does not have. The costs are measured on this machine, for a payment: while a decision\n"+
		"is made, the appliance admits no other request. A rule that names a peer, a key or a group in its\n"+
		"head, before when, costs the decisions about others nothing.")
	c.Example = "  countersign policy check policy.cedar\n" +
		"  countersign policy check policy.cedar --names"
	c.Flags().BoolVar(&names, "names", false,
		"ask the appliance for peers, keys and groups, and warn of names that do not exist")
	t.addressFlags(c.Flags())
	return c
}

// maxHeadless is how many rules without a name in the head policy check lists.
const maxHeadless = 10

func showCosts(w io.Writer, c policy.Costs, rules int) {
	show := func(label string, each policy.Cost) {
		fmt.Fprintf(w, "%s\t%v a decision, by %d of %s%s\n",
			label, each.Time.Round(100*time.Nanosecond), each.Rules, cli.Count(rules, "rule"), costFor(each))
	}
	show("typical", c.Typical)
	show("worst", c.Worst)
	if n := len(c.Headless); n > 0 {
		list := strings.Join(c.Headless[:min(n, maxHeadless)], ", ")
		if n > maxHeadless {
			list += fmt.Sprintf(" and %d more", n-maxHeadless)
		}
		fmt.Fprintf(w, "in each\t%s without a peer, a key or a group in the head: %s\n", cli.Count(n, "rule"), list)
	}
}

// costFor says for which peer and key a cost is.
func costFor(c policy.Cost) string {
	var of []string
	if c.Peer != "" {
		of = append(of, "peer "+c.Peer)
	}
	if c.Key != "" {
		of = append(of, "key "+c.Key)
	}
	if c.Groups > 0 {
		of = append(of, cli.Count(c.Groups, "group"))
	}
	if len(of) == 0 {
		return ""
	}
	return " (" + strings.Join(of, ", ") + ")"
}

// knownNames asks the appliance for its peers, keys and groups. Names of other types count as
// known.
func (t *tool) knownNames(ctx context.Context) (func(entity, name string) bool, error) {
	client, err := t.dialAdmin()
	if err != nil {
		return nil, err
	}
	peers, err := client.Peers(ctx)
	if err != nil {
		return nil, err
	}
	keys, err := client.Keys(ctx)
	if err != nil {
		return nil, err
	}
	groups, err := client.Groups(ctx)
	if err != nil {
		return nil, err
	}
	return func(entity, name string) bool {
		switch entity {
		case "Group", "KeyGroup":
			of := either(entity == "Group", policy.OfPeers, policy.OfKeys)
			return slices.ContainsFunc(groups, func(g api.Group) bool { return g.Name == name && g.Of == of })
		case "Peer":
			return slices.ContainsFunc(peers, func(p api.Peer) bool { return p.Name == name })
		case "Key":
			return slices.ContainsFunc(keys, func(k api.Key) bool { return k.Name == name })
		}
		return true
	}, nil
}

// errCases: a case did not come out as its table expects.
var errCases = errors.New("the policy does not do what the cases expect")

func (t *tool) policyTest() *cobra.Command {
	do := func(_ *cobra.Command, args []string) error {
		p, err := policy.Load(args[0])
		if err != nil {
			return err
		}
		text, err := os.ReadFile(args[1])
		if err != nil {
			return err
		}
		cases, err := policy.ParseCases(args[1], text)
		if err != nil {
			return err
		}
		type result struct {
			Line    int      `json:"line"`
			Name    string   `json:"name,omitempty"`
			Expect  string   `json:"expect"`
			Got     string   `json:"got"`
			Rules   []string `json:"rules"`
			Because string   `json:"because,omitempty"`
		}
		results, wrong, rules := []result{}, 0, p.Rules()
		for _, c := range cases {
			d := p.Decide(c.Request)
			r := result{
				Line: c.Line, Name: c.Name, Expect: outcome(c.Allow), Got: outcome(d.Allowed),
				Rules: where(rules, d.Rules),
			}
			switch {
			case d.Fault != "":
				r.Because = d.Fault
			case len(d.Rules) == 0:
				r.Because = either(d.Allowed, `no rule names Action::"verify"`, "no rule permits it")
			}
			if results = append(results, r); r.Expect != r.Got {
				wrong++
			}
		}
		err = t.print(map[string]any{"cases": results, "wrong": wrong}, func(w io.Writer) {
			fmt.Fprintln(w, "\tLINE\tNAME\tEXPECTED\tGOT\tBY")
			for _, r := range results {
				by := strings.Join(r.Rules, ", ")
				if r.Because != "" {
					by = r.Because
				}
				verdict := either(r.Expect == r.Got, "ok", "WRONG")
				fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\n", verdict, r.Line, r.Name, r.Expect, r.Got, by)
			}
			fmt.Fprintf(w, "\n%s, %d wrong\n", cli.Count(len(results), "case"), wrong)
		})
		if err == nil && wrong > 0 {
			err = fmt.Errorf("%w: %d of %d are wrong", errCases, wrong, len(results))
		}
		return err
	}
	c := command("test FILE CASES", "Test a policy file with a table of cases", cobra.ExactArgs(2), do)
	details(c, "CASES has comma-separated values. The first row names the columns. Required: expect (allow or\n"+
		"deny), peer and key. Optional: name, action, time (RFC 3339), signer (in place of a key, for\n"+
		"the action verify), groups and key_groups (of the peer and of the key, with spaces in between),\n"+
		"and any field of the schema (countersign policy schema), for example amount\n"+
		"or used.peer.day.amount. An empty field is absent. A window without a value counts the document\n"+
		"of the case only. Lines that begin with # are skipped. Exit status 1: a case did not come out as\n"+
		"expected.")
	c.Example = "  countersign policy test policy.cedar cases.csv\n\n" +
		"  # cases.csv\n" +
		"  name,expect,peer,key,amount\n" +
		"  small,allow,shop,payments,10\n" +
		"  large,deny,shop,payments,100000"
	return c
}

func outcome(allowed bool) string { return either(allowed, "allow", "deny") }

// where names rules by their lines and ids, for example "line 2 no-login".
func where(rules []policy.Rule, ids []string) []string {
	named := []string{}
	for _, rule := range rules {
		if slices.Contains(ids, rule.ID) {
			name := rule.ID
			if line := fmt.Sprintf("line %d", rule.Line); !strings.HasPrefix(name, line) {
				name = line + " " + name
			}
			named = append(named, name)
		}
	}
	return named
}

func (t *tool) policyExplain() *cobra.Command {
	var from records
	var texts []string
	do := func(cmd *cobra.Command, args []string) error {
		number, err := eventNumber(args[0])
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
		defer cancel()
		var found bool
		show := func(event uint64, raw string, rec policy.Record, by *policy.Policy) error {
			if event != number {
				return nil
			}
			found = true
			if err := t.explain(ctx, &from, event, raw, rec, by, texts); err != nil {
				return err
			}
			return errStop
		}
		if from.file == "" {
			err = from.one(ctx, number, show)
		} else {
			err = from.each(ctx, time.Time{}, show)
		}
		if errors.Is(err, errStop) {
			return nil
		}
		if err == nil && !found {
			err = fmt.Errorf("%s has no decision of event %d", from.file, number)
		}
		return err
	}
	c := command("explain EVENT", "Explain the policy decision of an event: its rules and its inputs",
		cobra.ExactArgs(1), do)
	c.Example = "  countersign policy explain 4711\n" +
		"  countersign policy explain 4711 --records decisions.jsonl\n" +
		"  countersign policy explain 4711 --text endpoint=endpoint.txt"
	details(c, "Of a text with more than 256 bytes, the record of a decision has SHA-256 and length. Where a rule\n"+
		"reads such a text, --text gives the text of the document, in a file without anything else.")
	from.flags(t, c)
	c.Flags().StringArrayVar(&texts, "text", nil, "take a long text from a file, as `FIELD=FILE`")
	return c
}

// withTexts puts long texts into a record. Each argument is a field and a file.
func withTexts(rec policy.Record, texts []string) (policy.Record, error) {
	for _, text := range texts {
		field, file, ok := strings.Cut(text, "=")
		if !ok {
			return rec, usageError{fmt.Errorf("--text: %q is not like endpoint=endpoint.txt", text)}
		}
		b, err := os.ReadFile(file)
		if err != nil {
			return rec, err
		}
		if rec, err = rec.WithText(field, string(b)); err != nil {
			return rec, err
		}
	}
	return rec, nil
}

// one gets a single decision from the appliance.
func (r *records) one(ctx context.Context, event uint64, visit visitor) error {
	err := r.get(ctx, event, visit)
	if refusal, is := errors.AsType[*api.Error](err); is && refusal.Code == "not_found" {
		return undecided(ctx, r.client, event)
	}
	return err
}

// get is one with the error of the appliance for an event without a decision.
func (r *records) get(ctx context.Context, event uint64, visit visitor) error {
	if err := r.dial(); err != nil {
		return err
	}
	d, err := r.client.Decision(ctx, event)
	if err != nil {
		return err
	}
	rec, err := policy.ParseRecord([]byte(d.Record))
	if err != nil {
		return err
	}
	v, err := r.client.Policy(ctx, rec.Version)
	if err != nil {
		return err
	}
	r.policies, r.parsed = map[string]api.Policy{v.SHA256: v}, map[string]*policy.Policy{}
	by, err := r.policy(ctx, rec.Policy)
	if err != nil {
		return err
	}
	return visit(event, d.Record, rec, by)
}

// undecided returns the reason why an event has no decision, and names the event with the decision.
func undecided(ctx context.Context, client *api.Client, event uint64) error {
	e, err := findEvent(ctx, client, event)
	switch {
	case err != nil:
		return err
	case e == nil:
		return noEvent(event)
	case e.Metadata["admission"] != "":
		return fmt.Errorf("event %d is the outcome of a request; its decision is in an earlier event: "+
			"countersign policy explain %s", event, e.Metadata["admission"])
	case e.Metadata["inputs"] != "":
		return fmt.Errorf("the decision of event %d was dropped by retention: "+
			"see decision_days in [retention] of the configuration", event)
	}
	return fmt.Errorf("event %d (%s) has no decision: policy was not asked; "+
		"look for an event with \"inputs\" in its metadata: countersign admin audit list --json", event, e.Type)
}

// explain replays a decision and shows it. The digest of the record is compared with the event, if
// the records come from an appliance.
func (t *tool) explain(
	ctx context.Context, from *records, event uint64, raw string, rec policy.Record, by *policy.Policy, texts []string,
) error {
	full, err := withTexts(rec, texts)
	if err != nil {
		return err
	}
	if err := by.Replay(full); err != nil {
		return fmt.Errorf("event %d: %w", event, err)
	}
	digest := policy.Digest([]byte(raw))
	logged := "not compared with the audit log: its event must have this as metadata.inputs"
	if from.client != nil {
		e, err := findEvent(ctx, from.client, event)
		if err != nil {
			return err
		}
		if e == nil || e.Metadata["inputs"] != digest {
			return changed(event)
		}
		logged = "the same in the audit log"
	}
	var context map[string]json.RawMessage
	if err := json.Unmarshal(rec.Context, &context); err != nil {
		return err
	}
	type rule struct {
		Line int    `json:"line"`
		ID   string `json:"id"`
		Text string `json:"text"`
	}
	rules := []rule{}
	for _, r := range by.Rules() {
		if slices.Contains(rec.Rules, r.ID) {
			rules = append(rules, rule{r.Line, r.ID, r.Text})
		}
	}
	out := map[string]any{"event": event, "record": rec, "rules": rules, "inputs": digest, "replayed": true}
	return t.print(out, func(w io.Writer) {
		fmt.Fprintf(w, "event\t%d\ndecision\t%s\n", event, outcome(rec.Allowed))
		fmt.Fprintf(w, "policy\tversion %d, sha256 %s\n", rec.Version, rec.Policy)
		fmt.Fprintf(w, "peer\t%s\n", rec.Peer)
		if rec.PeerKey != "" {
			fmt.Fprintf(w, "by key\t%s\n", rec.PeerKey)
		}
		if len(rec.PeerGroups) > 0 {
			fmt.Fprintf(w, "in groups\t%s\n", strings.Join(rec.PeerGroups, ", "))
		}
		fmt.Fprintf(w, "action\t%s\nkey\t%s\n", rec.Action, resource(rec))
		if len(rec.KeyGroups) > 0 {
			fmt.Fprintf(w, "in groups\t%s\n", strings.Join(rec.KeyGroups, ", "))
		}
		fmt.Fprintf(w, "time\t%s\n", date(rec.TimeMS/1000))
		for _, name := range slices.Sorted(maps.Keys(context)) {
			fmt.Fprintf(w, "  %s\t%s\n", name, context[name])
		}
		for i, counted := range policy.Counted {
			for j, window := range policy.Windows {
				u := rec.Used[i][j]
				if u == (policy.Window{}) {
					continue
				}
				signatures := cli.Count(u.Signatures, "signature")
				fmt.Fprintf(w, "  used.%s.%s\t%s, amount %d\n", counted, window, signatures, u.Amount)
			}
		}
		switch {
		case rec.Fault != "":
			fmt.Fprintf(w, "because\t%s\n", rec.Fault)
		case len(rules) == 0:
			fmt.Fprintf(w, "because\tno rule permits it\n")
		}
		for _, r := range rules {
			fmt.Fprintf(w, "by line %d\t%s\n", r.Line, strings.ReplaceAll(strings.TrimSpace(r.Text), "\n", "\n\t"))
		}
		if rec.More > 0 {
			fmt.Fprintf(w, "by\t%d further rules\n", rec.More)
		}
		fmt.Fprintf(w, "replayed\tthe same\nrecord\tsha256 %s, %s\n", digest, logged)
	})
}

// resource names the key of a decision, or the signer of a verification without a key.
func resource(rec policy.Record) string {
	if rec.Signer != "" {
		return "signer " + rec.Signer
	}
	return rec.Key
}

// comparison is the result of a replay of recorded decisions with another policy.
type comparison struct {
	Decisions int      `json:"decisions"` // replayed
	Withheld  int      `json:"withheld"`  // not replayed: a rule reads a text of which the record has the SHA-256
	Changes   []change `json:"changes"`
}

// change is a decision that another policy would change.
type change struct {
	Event uint64   `json:"event"`
	Time  string   `json:"time"`
	Peer  string   `json:"peer"`
	Key   string   `json:"key"`
	Was   string   `json:"was"`
	Is    string   `json:"is"`
	By    []string `json:"by"`
}

// compare replays the decisions of a last duration with the policy next, and with the groups of now
// where they are known. An error comes with the result so far.
func (r *records) compare(ctx context.Context, age time.Duration, next *policy.Policy) (comparison, error) {
	found, rules := comparison{Changes: []change{}}, next.Rules()
	err := r.since(ctx, age, func(event uint64, _ string, rec policy.Record, by *policy.Policy) error {
		q, err := rec.Request()
		if err != nil {
			return fmt.Errorf("event %d: %w", event, err)
		}
		if err := errors.Join(by.Readable(q), next.Readable(q)); err != nil {
			found.Withheld++
			return nil
		}
		if err := by.Replay(rec); err != nil {
			return fmt.Errorf("event %d: %w", event, err)
		}
		found.Decisions++
		if r.present {
			q = q.InGroups(r.groups)
		}
		if d := next.Decide(q); d.Allowed != rec.Allowed {
			found.Changes = append(found.Changes, change{
				event, date(rec.TimeMS / 1000), rec.Peer, resource(rec),
				outcome(rec.Allowed), outcome(d.Allowed), where(rules, d.Rules),
			})
		}
		return nil
	})
	return found, err
}

// show prints a comparison, with the newest changes up to most.
func (c comparison) show(w io.Writer, most int) {
	if len(c.Changes) > 0 {
		fmt.Fprintln(w, "EVENT\tTIME\tPEER\tKEY\tWAS\tWOULD BE\tBY")
	}
	for _, each := range c.Changes[max(0, len(c.Changes)-most):] {
		by := strings.Join(each.By, ", ")
		if by == "" {
			by = "no rule permits it"
		}
		fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\t%s\n",
			each.Event, each.Time, each.Peer, each.Key, each.Was, each.Is, by)
	}
	fmt.Fprintf(w, "%s replayed, %d would change\n", cli.Count(c.Decisions, "decision"), len(c.Changes))
	if len(c.Changes) > most {
		fmt.Fprintf(w, "shown: the last %s; for all: countersign policy diff\n", cli.Count(most, "change"))
	}
	if c.Withheld > 0 {
		fmt.Fprintf(w, "%s not replayed: a rule reads a text of more than %d bytes, "+
			"which no record has\n", cli.Count(c.Withheld, "decision"), policy.MaxText)
	}
}

func (t *tool) policyDiff() *cobra.Command {
	var from records
	var since string
	do := func(cmd *cobra.Command, args []string) error {
		age, err := cli.ParseDuration(since)
		if err != nil {
			return usageError{fmt.Errorf("--since: %w", err)}
		}
		next, err := policy.Load(args[0])
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), longTimeout)
		defer cancel()
		found, err := from.compare(ctx, age, next)
		if err != nil {
			return err
		}
		return t.print(found, func(w io.Writer) { found.show(w, len(found.Changes)) })
	}
	c := command("diff FILE", "List the recorded decisions that a policy file would change", cobra.ExactArgs(1), do)
	details(c, "Each decision is replayed twice: with the policy and the groups that made the decision, which must\n"+
		"give the same result, and with FILE and the present groups (with --records: those at the export).\n"+
		"The usage before each decision is taken from the record. So where\n"+
		"FILE would have denied a decision, the later ones still count its usage, and would have had more\n"+
		"of their budget left.")
	c.Example = "  countersign policy diff policy.cedar --since 30d\n" +
		"  countersign policy diff policy.cedar --records decisions.jsonl"
	from.flags(t, c)
	sinceFlag(c, &since)
	return c
}

func sinceFlag(c *cobra.Command, since *string) {
	c.Flags().StringVar(since, "since", "30d", "take the decisions of this last `duration`, for example 30d, 2w or 12h")
}

func (t *tool) policyExport() *cobra.Command {
	var from records
	var since string
	do := func(cmd *cobra.Command, _ []string) error {
		age, err := cli.ParseDuration(since)
		if err != nil {
			return usageError{fmt.Errorf("--since: %w", err)}
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), longTimeout)
		defer cancel()
		w := bufio.NewWriter(t.stdout)
		enc, written, groups := json.NewEncoder(w), map[string]bool{}, false
		visit := func(event uint64, raw string, rec policy.Record, _ *policy.Policy) error {
			if from.present && !groups {
				groups = true
				if err := enc.Encode(exportEntry{Groups: exported(from.groups)}); err != nil {
					return err
				}
			}
			if !written[rec.Policy] {
				written[rec.Policy] = true
				p := from.policies[rec.Policy]
				if err := enc.Encode(exportEntry{Policy: &p}); err != nil {
					return err
				}
			}
			return enc.Encode(exportEntry{Decision: &api.Decision{Event: event, Record: raw}})
		}
		err = from.since(ctx, age, visit)
		return errors.Join(err, w.Flush())
	}
	c := command("export", "Write recorded decisions and their policies to stdout, for a replay on any machine",
		cobra.NoArgs, do)
	details(c, "The output is JSON lines: the present groups, policies with their texts, and decisions with all\n"+
		"inputs. The inputs have amounts and parties: handle the file like the payments themselves.")
	c.Example = "  countersign policy export --since 30d >decisions.jsonl"
	from.flags(t, c)
	sinceFlag(c, &since)
	return c
}

// exported returns groups for a line of an exported file.
func exported(groups []policy.Group) *[]api.Group {
	all := []api.Group{}
	for _, g := range groups {
		all = append(all, api.Group{
			Name: g.Name, Of: g.Of, Size: len(g.Members), SHA256: g.Digest(), Members: g.Members,
		})
	}
	return &all
}

// policyVersions are the commands about the policy in force and its former versions.
func (t *tool) policyVersions(act maker) *cobra.Command {
	list := act("list", "List the versions of the policy; the last one is in force", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			all, err := c.Policies(ctx)
			if err != nil {
				return err
			}
			return t.print(all, func(w io.Writer) {
				fmt.Fprintln(w, "VERSION\tACTIVATED\tSHA256")
				for _, p := range all {
					fmt.Fprintf(w, "%d\t%s\t%s\n", p.Version, date(p.Activated), p.SHA256)
				}
			})
		})
	show := act("show VERSION", "Print the text of a version of the policy", cobra.ExactArgs(1),
		func(ctx context.Context, c *api.Client, args []string) error {
			version, err := strconv.ParseUint(args[0], 10, 64)
			if err != nil {
				return usageError{fmt.Errorf("%q is not a version: countersign admin policy list shows them", args[0])}
			}
			p, err := c.Policy(ctx, version)
			if err != nil {
				return err
			}
			if t.json {
				return t.print(p, nil)
			}
			_, err = io.WriteString(t.stdout, p.Text)
			return err
		})
	show.Example = "  countersign admin policy show 2"
	reload := act("reload", "Propose the text of the appliance's policy file, under approval", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			return t.propose(ctx, c, "policy activate", "")
		})
	details(reload, "The text is shown, with what it changes, before it is approved.")
	propose := act("propose FILE", "Propose the text of a policy file of this machine, under approval",
		cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
			p, err := policy.Load(args[0])
			if err != nil {
				return err
			}
			if len(p.Text) == 0 { // without a text, the proposal would be about the appliance's file
				return fmt.Errorf("%s is empty: to deny every request, write a comment in it", args[0])
			}
			return t.propose(ctx, c, "policy activate", string(p.Text), digestParameter, hex.EncodeToString(p.Hash[:]))
		})
	details(propose, "The file is checked as by countersign policy check. The appliance's own policy file stays as\n"+
		"it is, and is not read again: countersign admin policy reload would propose that file.")
	propose.Example = "  countersign policy check policy.cedar\n  countersign admin policy propose policy.cedar"
	return group("policy", "Put policies in force, and show former versions", list, show, propose, reload)
}
