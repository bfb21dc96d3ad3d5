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
	"countersign/policy"

	"github.com/spf13/cobra"
)

// records is where recorded decisions and the policies that made them come from: a running appliance, or the file that
// policy export has written, on any machine.
type records struct {
	tool         *tool
	socket, file string
	client       *api.Client
	policies     map[string]api.Policy // by their hash; parsed in texts
	texts        map[string]*policy.Policy
}

// line is one line of an exported file: a policy, or a decision.
type line struct {
	Policy   *api.Policy   `json:"policy,omitempty"`
	Decision *api.Decision `json:"decision,omitempty"`
}

func (r *records) flags(t *tool, c *cobra.Command) {
	r.tool = t
	t.socketFlag(c.Flags(), &r.socket)
	c.Flags().StringVar(&r.file, "records", "", "read the decisions from this file of policy export, instead of from the appliance")
}

// each calls visit for each decision since a time, the oldest first, with the policy that made it.
func (r *records) each(ctx context.Context, since time.Time, visit func(event uint64, raw string, rec policy.Record, by *policy.Policy) error) error {
	see := func(d api.Decision) error {
		rec, err := policy.ParseRecord([]byte(d.Record))
		if err != nil {
			return fmt.Errorf("event %d: %w", d.Event, err)
		}
		if time.UnixMilli(rec.TimeMS).Before(since) {
			return nil
		}
		by, err := r.policy(ctx, rec.Policy)
		if err != nil {
			return fmt.Errorf("event %d: %w", d.Event, err)
		}
		return visit(d.Event, d.Record, rec, by)
	}
	return r.read(ctx, since, see)
}

func (r *records) read(ctx context.Context, since time.Time, see func(api.Decision) error) error {
	r.policies, r.texts = map[string]api.Policy{}, map[string]*policy.Policy{}
	if r.file != "" {
		f, err := os.Open(r.file)
		if err != nil {
			return err
		}
		defer f.Close()
		d := json.NewDecoder(bufio.NewReader(f))
		d.DisallowUnknownFields()
		for {
			var l line
			err := d.Decode(&l)
			if errors.Is(err, io.EOF) {
				return nil
			} else if err == nil && l.Policy == nil && l.Decision == nil {
				err = errors.New("neither a policy nor a decision")
			}
			if err != nil {
				return fmt.Errorf("%s: it is not what policy export writes: %w", r.file, err)
			}
			if l.Policy != nil {
				r.policies[l.Policy.SHA256] = *l.Policy
			}
			if l.Decision != nil {
				if err := see(*l.Decision); err != nil {
					return err
				}
			}
		}
	}
	var err error
	if r.client, err = r.tool.dialAdmin(r.socket); err != nil {
		return err
	}
	all, err := r.client.Policies(ctx)
	if err != nil {
		return err
	}
	for _, p := range all {
		r.policies[p.SHA256] = p
	}
	for from := uint64(0); ; {
		some, err := r.client.Decisions(ctx, from, since.UnixMilli())
		if err != nil || len(some) == 0 {
			return err
		}
		if err := r.logged(ctx, some); err != nil {
			return err
		}
		for _, d := range some {
			if err := see(d); err != nil {
				return err
			}
			from = d.Event + 1
		}
	}
}

// logged holds records against the digests that their events have, as far as those are kept.
func (r *records) logged(ctx context.Context, some []api.Decision) error {
	inputs, last := map[uint64]string{}, some[len(some)-1].Event
	for from := some[0].Event; from <= last; {
		events, err := r.client.Events(ctx, from, 1000)
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
	return fmt.Errorf("event %d of the audit log does not have the SHA-256 of its record: one of them was changed", event)
}

// policy returns the one with a hash, with its text.
func (r *records) policy(ctx context.Context, hash string) (*policy.Policy, error) {
	if p := r.texts[hash]; p != nil {
		return p, nil
	}
	v, ok := r.policies[hash]
	if !ok {
		return nil, fmt.Errorf("the policy with SHA-256 %s is not there", hash)
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
		return nil, fmt.Errorf("version %d of the policy has another text than its SHA-256 says", v.Version)
	}
	r.texts[hash] = p
	return p, nil
}

// errStop ends each.
var errStop = errors.New("stop")

func (t *tool) policy() *cobra.Command {
	return group("policy", "Try policies out before they are in force, and see why was decided what was decided",
		t.policyCheck(), t.policyTest(), t.policyExplain(), t.policyDiff(), t.policyExport(),
		command("schema", "Print what policies may talk about", cobra.NoArgs, func(*cobra.Command, []string) error {
			_, err := t.stdout.Write(policy.Schema)
			return err
		}))
}

func (t *tool) policyCheck() *cobra.Command {
	return command("check FILE", "Hold a policy file against the schema", cobra.ExactArgs(1), func(_ *cobra.Command, args []string) error {
		p, err := policy.Load(args[0])
		if err != nil {
			return err
		}
		rules := p.Rules()
		return t.print(map[string]any{"sha256": hex.EncodeToString(p.Hash[:]), "rules": len(rules)}, func(w io.Writer) {
			fmt.Fprintf(w, "sound\t%d rules\nsha256\t%x\n", len(rules), p.Hash)
			if len(rules) == 0 {
				fmt.Fprintln(w, "warning\twithout a rule, everything is denied")
			}
		})
	})
}

// errCases says that a case did not come out as its table expects.
var errCases = errors.New("the policy does not do what the cases expect")

func (t *tool) policyTest() *cobra.Command {
	c := command("test FILE CASES", "Hold a policy file against a table of cases", cobra.ExactArgs(2), func(_ *cobra.Command, args []string) error {
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
		results, wrong := []result{}, 0
		for _, c := range cases {
			d := p.Decide(c.Request)
			r := result{Line: c.Line, Name: c.Name, Expect: outcome(c.Allow), Got: outcome(d.Allowed), Rules: where(p, d.Rules)}
			switch {
			case d.Fault != "":
				r.Because = d.Fault
			case len(d.Rules) == 0:
				r.Because = "no rule permits it"
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
				fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\n", either(r.Expect == r.Got, "ok", "WRONG"), r.Line, r.Name, r.Expect, r.Got, by)
			}
			fmt.Fprintf(w, "\n%d cases, %d wrong\n", len(results), wrong)
		})
		if err == nil && wrong > 0 {
			err = fmt.Errorf("%w: %d of %d are wrong", errCases, wrong, len(results))
		}
		return err
	})
	c.Long = "CASES is a table of comma-separated values whose first row names the columns: expect (allow or deny), peer, key, and as\n" +
		"you need them name, action, time (RFC 3339), and any field of the schema (countersign policy schema), such as amount or\n" +
		"used.peer.day.amount. Empty fields are absent. Windows that are not set have the document itself only. Lines that begin\n" +
		"with # are skipped. Exit status 1: a case did not come out as expected."
	return c
}

func outcome(allowed bool) string { return either(allowed, "allow", "deny") }

// where names rules by their lines and ids.
func where(p *policy.Policy, ids []string) []string {
	named := []string{}
	for _, rule := range p.Rules() {
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
	c := command("explain EVENT", "Show which rules decided in an event, and by what", cobra.ExactArgs(1), func(cmd *cobra.Command, args []string) error {
		number, err := strconv.ParseUint(args[0], 10, 64)
		if err != nil {
			return usageError{fmt.Errorf("%q is not the number of an event", args[0])}
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
		defer cancel()
		var found bool
		show := func(event uint64, raw string, rec policy.Record, by *policy.Policy) error {
			if event != number {
				return nil
			}
			found = true
			if err := t.explain(ctx, &from, event, raw, rec, by); err != nil {
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
	})
	from.flags(t, c)
	return c
}

// one asks the appliance for a single decision.
func (r *records) one(ctx context.Context, event uint64, visit func(uint64, string, policy.Record, *policy.Policy) error) error {
	client, err := r.tool.dialAdmin(r.socket)
	if err != nil {
		return err
	}
	d, err := client.Decision(ctx, event)
	if refusal, is := errors.AsType[*api.Error](err); is && refusal.Code == "not_found" {
		return undecided(ctx, client, event)
	} else if err != nil {
		return err
	}
	rec, err := policy.ParseRecord([]byte(d.Record))
	if err != nil {
		return err
	}
	v, err := client.Policy(ctx, rec.Version)
	if err != nil {
		return err
	}
	r.client, r.policies, r.texts = client, map[string]api.Policy{v.SHA256: v}, map[string]*policy.Policy{}
	by, err := r.policy(ctx, rec.Policy)
	if err != nil {
		return err
	}
	return visit(event, d.Record, rec, by)
}

// undecided says why an event has no decision, and which one does.
func undecided(ctx context.Context, client *api.Client, event uint64) error {
	found, err := client.Events(ctx, event, 1)
	if err != nil {
		return err
	}
	if len(found) != 1 || found[0].Index != event {
		return fmt.Errorf("there is no event %d (any more): countersign admin audit list shows those that there are", event)
	}
	e := found[0]
	switch {
	case e.Metadata["admission"] != "":
		return fmt.Errorf("event %d says how a request ended; what was decided about it is: countersign policy explain %s", event, e.Metadata["admission"])
	case e.Metadata["inputs"] != "":
		return fmt.Errorf("the decision of event %d is not kept any more: see decision_days in [retention] of the configuration", event)
	}
	return fmt.Errorf("event %d (%s) has no decision: policy was not asked. The events of what it was asked have \"inputs\" in their metadata: countersign admin audit list", event, e.Type)
}

// explain shows a decision after it was made again, and held against its event where that can be had.
func (t *tool) explain(ctx context.Context, from *records, event uint64, raw string, rec policy.Record, by *policy.Policy) error {
	if err := by.Replay(rec); err != nil {
		return fmt.Errorf("event %d: %w", event, err)
	}
	digest := policy.Digest([]byte(raw))
	logged := "not looked at: read from a file; its event must have this as metadata.inputs"
	if from.client != nil {
		events, err := from.client.Events(ctx, event, 1)
		if err != nil {
			return err
		}
		if len(events) != 1 || events[0].Index != event || events[0].Metadata["inputs"] != digest {
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
		fmt.Fprintf(w, "peer\t%s\naction\t%s\nkey\t%s\ntime\t%s\n", rec.Peer, rec.Action, rec.Key, time.UnixMilli(rec.TimeMS).UTC().Format(time.RFC3339))
		for _, name := range slices.Sorted(maps.Keys(context)) {
			fmt.Fprintf(w, "  %s\t%s\n", name, context[name])
		}
		for i, counted := range policy.Counted {
			for j, window := range policy.Windows {
				u := rec.Used[i][j]
				if u == (policy.Window{}) {
					continue
				}
				fmt.Fprintf(w, "  used.%s.%s\t%d signatures, amount %d\n", counted, window, u.Signatures, u.Amount)
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
		fmt.Fprintf(w, "replayed\tthe same\nrecord\tsha256 %s, %s\n", digest, logged)
	})
}

func (t *tool) policyDiff() *cobra.Command {
	var from records
	var since string
	c := command("diff FILE", "List each recorded decision that a policy file would change", cobra.ExactArgs(1), func(cmd *cobra.Command, args []string) error {
		age, err := parseAge(since)
		if err != nil {
			return usageError{fmt.Errorf("--since: %w", err)}
		}
		next, err := policy.Load(args[0])
		if err != nil {
			return err
		}
		type change struct {
			Event uint64   `json:"event"`
			Time  string   `json:"time"`
			Peer  string   `json:"peer"`
			Key   string   `json:"key"`
			Was   string   `json:"was"`
			Is    string   `json:"is"`
			By    []string `json:"by"`
		}
		changes, replayed := []change{}, 0
		ctx, cancel := context.WithTimeout(cmd.Context(), longTime)
		defer cancel()
		err = from.each(ctx, time.Now().Add(-age), func(event uint64, _ string, rec policy.Record, by *policy.Policy) error {
			if err := by.Replay(rec); err != nil {
				return fmt.Errorf("event %d: %w", event, err)
			}
			replayed++
			q, err := rec.Request()
			if err != nil {
				return fmt.Errorf("event %d: %w", event, err)
			}
			if d := next.Decide(q); d.Allowed != rec.Allowed {
				changes = append(changes, change{event, time.UnixMilli(rec.TimeMS).UTC().Format(time.RFC3339), rec.Peer, rec.Key, outcome(rec.Allowed), outcome(d.Allowed), where(next, d.Rules)})
			}
			return nil
		})
		if err != nil {
			return err
		}
		return t.print(map[string]any{"decisions": replayed, "changes": changes}, func(w io.Writer) {
			if len(changes) > 0 {
				fmt.Fprintln(w, "EVENT\tTIME\tPEER\tKEY\tWAS\tWOULD BE\tBY")
			}
			for _, c := range changes {
				by := strings.Join(c.By, ", ")
				if by == "" {
					by = "no rule permits it"
				}
				fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\t%s\n", c.Event, c.Time, c.Peer, c.Key, c.Was, c.Is, by)
			}
			fmt.Fprintf(w, "%d decisions replayed, %d would change\n", replayed, len(changes))
		})
	})
	c.Long = "Makes the recorded decisions again, first with the policy that made them (they must come out the same), then with FILE.\n" +
		"What was used before each of them is taken as it was recorded: where FILE would have denied some of them, later ones\n" +
		"would have had more of their budget left."
	from.flags(t, c)
	c.Flags().StringVar(&since, "since", "30d", "how far back, such as 30d or 12h")
	return c
}

func (t *tool) policyExport() *cobra.Command {
	var from records
	var since string
	c := command("export", "Write recorded decisions and their policies, to be replayed on any machine", cobra.NoArgs, func(cmd *cobra.Command, _ []string) error {
		age, err := parseAge(since)
		if err != nil {
			return usageError{fmt.Errorf("--since: %w", err)}
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), longTime)
		defer cancel()
		w := bufio.NewWriter(t.stdout)
		enc, written := json.NewEncoder(w), map[string]bool{}
		err = from.each(ctx, time.Now().Add(-age), func(event uint64, raw string, rec policy.Record, by *policy.Policy) error {
			if !written[rec.Policy] {
				written[rec.Policy] = true
				p := from.policies[rec.Policy]
				if err := enc.Encode(line{Policy: &p}); err != nil {
					return err
				}
			}
			return enc.Encode(line{Decision: &api.Decision{Event: event, Record: raw}})
		})
		return errors.Join(err, w.Flush())
	})
	c.Long = "Writes JSON lines to stdout: policies with their texts, and decisions with all that they were made from. They hold amounts\n" +
		"and parties: handle them like the payments themselves."
	from.flags(t, c)
	c.Flags().StringVar(&since, "since", "30d", "how far back, such as 30d or 12h")
	return c
}

// parseAge reads a duration that may be in days or weeks.
func parseAge(s string) (time.Duration, error) {
	for unit, of := range map[string]time.Duration{"d": 24 * time.Hour, "w": 7 * 24 * time.Hour} {
		if number, ok := strings.CutSuffix(s, unit); ok {
			if n, err := strconv.ParseUint(number, 10, 16); err == nil {
				return time.Duration(n) * of, nil
			}
		}
	}
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return d, nil
	}
	return 0, fmt.Errorf("%q is not like 30d, 2w or 12h", s)
}

// policyVersions is what an operator does with the policy that is in force.
func (t *tool) policyVersions(act maker) *cobra.Command {
	return group("policy", "Put policies in force, and show those that were",
		act("list", "List the versions; the last one is in force", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
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
		}),
		act("show VERSION", "Print the text of a version", cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
			version, err := strconv.ParseUint(args[0], 10, 64)
			if err != nil {
				return usageError{fmt.Errorf("%q is not a version", args[0])}
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
		}),
		act("reload", "Have the policy file read again and put in force, under approval", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
			return t.propose(ctx, c, "policy activate", "")
		}),
	)
}
