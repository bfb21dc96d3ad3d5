package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"countersign/admin/api"
	"countersign/approval"
	"countersign/internal/cli"

	"github.com/spf13/cobra"
)

// keyLife are the commands about the life of a key: rotation, retirement, and presence of an
// operator.
func (t *tool) keyLife(act maker) []*cobra.Command {
	return []*cobra.Command{
		t.rotate(act), t.setRotation(act), t.archive(act), t.destroy(act), t.compromise(act), t.confirm(act),
		t.safeguard(act), t.recover(act), t.authorizeNoise(act),
	}
}

func (t *tool) authorizeNoise(act maker) *cobra.Command {
	return act("authorize-noise", "Authorize the listener's Noise key by a signature of the appliance's identity key",
		cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
			k, err := c.AuthorizeNoiseKey(ctx)
			if err != nil {
				return err
			}
			return t.print(k, func(w io.Writer) {
				fmt.Fprintf(w, "authorised\t%s, version %d\n", k.PublicKey, k.Version)
			})
		})
}

func (t *tool) rotate(act maker) *cobra.Command {
	var now, cancel bool
	var in, at, within string
	do := func(ctx context.Context, c *api.Client, args []string) error {
		if cancel {
			return t.cancelRotation(ctx, c, args[0])
		}
		r := api.Rotate{Now: now}
		if at != "" {
			when, err := time.Parse(time.RFC3339, at)
			if err != nil {
				return usageError{fmt.Errorf("--at %q is not a time: write 2026-12-01T03:00:00Z, for example", at)}
			}
			r.At = when.Unix()
		}
		for _, each := range []struct {
			flag, value string
			to          *int64
		}{{"in", in, &r.In}, {"within", within, &r.Within}} {
			if each.value == "" {
				continue
			}
			s, err := wholeSeconds(each.value)
			if err == nil && s == 0 {
				err = fmt.Errorf("%q is less than a second", each.value)
			}
			if err != nil {
				return usageError{fmt.Errorf("--%s: %w", each.flag, err)}
			}
			*each.to = s
		}
		if !now && at == "" && in == "" {
			if err := t.mayRotate(ctx, c, args[0]); err != nil {
				return err
			}
		}
		k, err := c.RotateKey(ctx, args[0], r)
		if err != nil {
			return err
		}
		return t.print(k, func(w io.Writer) {
			did := either(k.State == "active", "rotated", "announced")
			fmt.Fprintf(w, "%s\t%s, version %d\n", did, k.Name, k.Version)
			fmt.Fprintf(w, "public key\t%s\nactive\tfrom %s on\n", k.PublicKey, date(k.Activates))
		})
	}
	c := act("rotate NAME", "Announce the next version of a key, and activate it at its time", cobra.ExactArgs(1), do)
	details(c, "NAME is a signing key, or noise for the listener's own key.\n\n"+
		"The next version exists already. The appliance now makes the version after it, has the present\n"+
		"version sign the step, and tells peers. Without --now, --in and --at, the next version becomes\n"+
		"active after the key's time of announcement (admin key set --announce); at a terminal, the\n"+
		"command asks first. The version before stays accepted for its grace time.\n\n"+
		"Until the next version is active, another rotate replaces its time, and --cancel calls the\n"+
		"rotation off. Peers are told in both cases. The next version stays the successor.\n\n"+
		"A rotation that fails changes nothing. The appliance tries it again, in your name and with the\n"+
		"same time, until --within after that time.")
	c.Example = "  countersign admin key rotate payments --now\n" +
		"  countersign admin key rotate payments --in 10m\n" +
		"  countersign admin key rotate noise --at 2026-12-01T03:00:00Z --within 30m\n" +
		"  countersign admin key rotate payments --cancel"
	c.Flags().BoolVar(&now, "now", false, "activate the next version at once")
	c.Flags().StringVar(&in, "in", "", "activate the next version after this `duration`, for example 10m or 2d")
	c.Flags().StringVar(&at, "at", "", "activate the next version at this `time` (RFC 3339)")
	c.Flags().StringVar(&within, "within", "", "try a rotation that fails again for this `duration` after its time, "+
		"1s to 30d (default 1h)")
	c.Flags().BoolVar(&cancel, "cancel", false, "call off the rotation that is announced or asked for")
	c.MarkFlagsMutuallyExclusive("now", "in", "at", "cancel")
	c.MarkFlagsMutuallyExclusive("within", "cancel")
	return c
}

// mayRotate asks at a terminal whether a key is to be rotated. Without a flag, the command line
// does not say when.
func (t *tool) mayRotate(ctx context.Context, c *api.Client, name string) error {
	if !t.interactive() {
		return nil
	}
	l, err := c.Line(ctx, name)
	if err != nil {
		return err
	}
	when := either(l.Announce == 0, "at once", "in "+span(l.Announce))
	if !t.confirms(fmt.Sprintf("Rotate %s: the next version becomes active %s. Go on?", name, when)) {
		return errors.New("not rotated: you have not answered y; say when by --now, --in or --at")
	}
	return nil
}

func (t *tool) cancelRotation(ctx context.Context, c *api.Client, name string) error {
	l, err := c.CancelRotation(ctx, name)
	if err != nil {
		return err
	}
	return t.print(l, func(w io.Writer) {
		if r := l.Rotation; r != nil && r.Cancelled != 0 {
			fmt.Fprintf(w, "called off\t%s, version %d\nactive\tversion %d stays\n", name, r.Cancelled, r.Version)
			return
		}
		fmt.Fprintf(w, "called off\t%s\n", name)
	})
}

func (t *tool) setRotation(act maker) *cobra.Command {
	var c *cobra.Command
	var every, announce, grace, presence, window, acknowledge string
	var uses uint64
	do := func(ctx context.Context, client *api.Client, args []string) error {
		var change api.Change
		for _, each := range []struct {
			flag, value string
			to          **int64
		}{
			{"every", every, &change.Every}, {"announce", announce, &change.Announce},
			{"grace", grace, &change.Grace}, {"presence", presence, &change.Presence},
		} {
			if !c.Flags().Changed(each.flag) {
				continue
			}
			if each.flag == "presence" && each.value == "on" {
				each.value = "300s"
			}
			s, err := wholeSeconds(each.value)
			if err != nil {
				return usageError{fmt.Errorf("--%s: %w", each.flag, err)}
			}
			*each.to = &s
		}
		if c.Flags().Changed("window") {
			change.Window = &window
		}
		if c.Flags().Changed("uses") {
			change.Uses = &uses
		}
		if c.Flags().Changed("acknowledge") {
			names := []string{}
			if acknowledge != "none" && acknowledge != "" {
				names = strings.Split(acknowledge, ",")
			}
			change.Acknowledge = &names
		}
		if change == (api.Change{}) {
			return usageError{errors.New("no setting is given: add a flag, for example --every 90d")}
		}
		l, err := client.SetLine(ctx, args[0], change)
		refusal, refused := errors.AsType[*api.Error](err)
		proposable := api.Change{Grace: change.Grace, Acknowledge: change.Acknowledge, Presence: change.Presence}
		switch {
		case refused && refusal.Code == "needs_approval" && change == proposable:
			return t.propose(ctx, client, "key set", "", settingsOf(args[0], change)...)
		case refused && refusal.Code == "needs_approval":
			return fmt.Errorf("%s; set --grace, --acknowledge and --presence by a command of their own", refusal.Detail)
		case err != nil:
			return err
		}
		return t.print(l, func(w io.Writer) { showRotation(w, l) })
	}
	c = act("set NAME", "Change when a key is rotated, and whether operators must confirm its use",
		cobra.ExactArgs(1), do)
	details(c, "A setting whose flag is not given stays as it is. Under approval, --grace, --acknowledge and\n"+
		"--presence are proposed together, without other flags.")
	c.Example = "  countersign admin key set payments --every 90d --window \"0 3 * * 0\" --announce 24h\n" +
		"  countersign admin key set payments --uses 100000\n" +
		"  countersign admin key set payments --grace 8d --acknowledge all\n" +
		"  countersign admin key set payments --presence 300s"
	f := c.Flags()
	f.StringVar(&every, "every", "", "rotate a version at this `age`, 1h to 3650d, for example 90d; 0: not by age")
	f.StringVar(&window, "window", "", "rotate only within 1 h of a tick of this `cron` expression (five fields, "+
		"UTC), for example \"0 3 * * 0\"; without --every and --uses: at each tick, "+
		"at most once an hour; \"\": at any time")
	f.Uint64Var(&uses, "uses", 0, "rotate a version after this `number` of signatures; 0: not by signatures")
	f.StringVar(&announce, "announce", "", "announce a version this `duration` before it becomes active, "+
		"0 to 30d, for example 24h")
	f.StringVar(&grace, "grace", "", "accept the version before for this `duration`, for example 8d; "+
		"0: as long as a document may live. A shorter time needs approval")
	f.StringVar(&acknowledge, "acknowledge", "", "archive the version before sooner, when these `peers` have "+
		"acknowledged: names separated by commas, all, or none. Fewer need approval")
	f.StringVar(&presence, "presence", "", "let the key sign only for this `duration` after an operator has confirmed "+
		"(admin key confirm), up to 24h; on: 300s; 0: always. A weaker setting needs approval")
	return c
}

// settingsOf returns the parameters of the act key set.
func settingsOf(name string, change api.Change) []string {
	p := []string{"key", name}
	if change.Grace != nil {
		p = append(p, "grace", strconv.FormatInt(*change.Grace, 10))
	}
	if change.Presence != nil {
		p = append(p, "presence", strconv.FormatInt(*change.Presence, 10))
	}
	if change.Acknowledge != nil {
		names := strings.Join(*change.Acknowledge, ",")
		p = append(p, "acknowledge", either(names == "", "none", names))
	}
	return p
}

func (t *tool) archive(act maker) *cobra.Command {
	c := act("archive NAME VERSION", "Archive a replaced version before the end of its grace time, under approval",
		cobra.ExactArgs(2), func(ctx context.Context, c *api.Client, args []string) error {
			if _, err := parseVersion(args[1]); err != nil {
				return err
			}
			return t.propose(ctx, c, "key archive", "", "key", args[0], "version", args[1])
		})
	details(c, "Signatures of the version are refused from then on, for ever, also in documents that have not\n"+
		"expired.")
	c.Example = "  countersign admin key archive payments 1"
	return c
}

func parseVersion(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || n == 0 {
		return 0, usageError{fmt.Errorf("%q is not the number of a version: write 1 or higher", s)}
	}
	return uint32(n), nil
}

func (t *tool) destroy(act maker) *cobra.Command {
	c := act("destroy NAME VERSION", "Destroy the private key of an archived or compromised version, under approval",
		cobra.ExactArgs(2), func(ctx context.Context, c *api.Client, args []string) error {
			if _, err := parseVersion(args[1]); err != nil {
				return err
			}
			return t.propose(ctx, c, "key destroy", "", "key", args[0], "version", args[1])
		})
	c.Example = "  countersign admin key destroy payments 1"
	return c
}

func (t *tool) compromise(act maker) *cobra.Command {
	var reason string
	c := act("compromise NAME VERSION", "Declare the private key of a version compromised, under approval",
		cobra.ExactArgs(2), func(ctx context.Context, c *api.Client, args []string) error {
			if _, err := parseVersion(args[1]); err != nil {
				return err
			}
			return t.propose(ctx, c, "key compromise", "", "key", args[0], "version", args[1], "reason", reason)
		})
	details(c, "A version is compromised when a thief may have its private key. From the approval on, the\n"+
		"version signs nothing, and its signatures are refused. An active version is replaced by its\n"+
		"successor at once, and peers are told that the old version is compromised.")
	c.Example = "  countersign admin key compromise payments 1 --reason \"a signature that we have not made\""
	reasonFlag(c, &reason)
	return c
}

func (t *tool) safeguard(act maker) *cobra.Command {
	var token string
	c := act("safeguard NAME", "Make a recovery successor of a key on another token, under approval",
		cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
			return t.propose(ctx, c, "key safeguard", "", "key", args[0], "token", token)
		})
	details(c, "The line of the key commits to the recovery successor, and goes on with it after the loss of the\n"+
		"token that has the key: see admin key recover. Peers who pin the line from now on know of it; all\n"+
		"others after two rotations that are announced from now on. Afterwards the token can lie in a\n"+
		"safe: take its section out of the configuration. A second call replaces the recovery successor.")
	c.Example = "  countersign admin key safeguard payments --token safe"
	c.Flags().StringVar(&token, "token", "", "the other token")
	c.MarkFlagRequired("token")
	return c
}

func (t *tool) recover(act maker) *cobra.Command {
	var reason string
	c := act("recover NAME", "Let a key go on with its recovery successor after the loss of its token, under approval",
		cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
			return t.propose(ctx, c, "key recover", "", "key", args[0], "reason", reason)
		})
	details(c, "The recovery successor becomes the active version at once, and peers follow by themselves. A key\n"+
		"whose token still answers is not recovered: rotate it.")
	c.Example = "  countersign admin key recover payments --reason \"the HSM has burnt\""
	reasonFlag(c, &reason)
	return c
}

func (t *tool) confirm(act maker) *cobra.Command {
	do := func(ctx context.Context, c *api.Client, args []string) error {
		me, err := c.Me(ctx)
		if err != nil {
			return err
		}
		ch, err := c.Challenge(ctx, api.NewChallenge{Purpose: "presence", Key: args[0]})
		if err != nil {
			return err
		}
		if err := t.checkChallenge(ch.Text, approval.ForPresence, me.Operator.Name, args[0]); err != nil {
			return err
		}
		proof, err := t.signText(me, approval.ForPresence, ch.Text)
		if err != nil {
			return err
		}
		done, err := c.ConfirmKey(ctx, args[0], api.Proven{Challenge: ch.ID, Proof: proof})
		if err != nil {
			return err
		}
		return t.print(done, func(w io.Writer) {
			fmt.Fprintf(w, "confirmed\t%s may sign until %s\n", args[0], date(done.Until))
		})
	}
	c := act("confirm NAME", "Confirm with your SSH key that you are present and that a key may sign for a while",
		cobra.ExactArgs(1), do)
	c.Example = "  countersign admin key confirm payments"
	return c
}

// shownKey is the output of key show --json: the versions of a key, and its rotation settings.
type shownKey struct {
	Versions []api.Key `json:"versions"`
	Line     api.Line  `json:"line"`
}

func (t *tool) showVersions(ctx context.Context, c *api.Client, name string) error {
	versions, err := c.Key(ctx, name)
	if err != nil {
		return err
	}
	l, err := c.Line(ctx, name)
	if err != nil {
		return err
	}
	return t.print(shownKey{versions, l}, func(w io.Writer) {
		for _, k := range versions {
			showKey(w, k)
			fmt.Fprintln(w)
		}
		showRotation(w, l)
	})
}

// wholeSeconds reads a duration in seconds. A fraction is refused: 500ms is not 0, which turns a
// setting off.
func wholeSeconds(text string) (int64, error) {
	d, err := cli.ParseDuration(text)
	if err == nil && d%time.Second != 0 {
		err = fmt.Errorf("%q is not a number of whole seconds", text)
	}
	return int64(d / time.Second), err
}

// span is a number of seconds as a duration.
func span(seconds int64) string { return cli.FormatDuration(time.Duration(seconds) * time.Second) }

func showRotation(w io.Writer, l api.Line) {
	var plan []string
	if l.Every != 0 {
		plan = append(plan, "at the age of "+span(l.Every))
	}
	if l.Uses != 0 {
		plan = append(plan, "after "+cli.Count(l.Uses, "signature"))
	}
	if l.Window != "" {
		plan = append(plan, "in the window "+l.Window)
	}
	if len(plan) == 0 {
		plan = []string{"by hand only"}
	}
	fmt.Fprintf(w, "rotation\t%s", strings.Join(plan, ", "))
	if l.NextRotation != 0 {
		fmt.Fprintf(w, "; next at %s", date(l.NextRotation))
	}
	fmt.Fprintf(w, "\ngrace time\t%s\n", either(l.Grace == 0, "as long as a document may live", span(l.Grace)))
	if l.Announce != 0 {
		fmt.Fprintf(w, "announced\t%s before\n", span(l.Announce))
	}
	if len(l.Acknowledge) > 0 {
		fmt.Fprintf(w, "sooner\twhen %s have acknowledged\n", strings.Join(l.Acknowledge, ", "))
	}
	if l.Presence != 0 {
		confirmed := either(l.Confirmed == 0, "none now", "now until "+date(l.Confirmed))
		fmt.Fprintf(w, "presence\t%s after a confirmation; %s\n", span(l.Presence), confirmed)
	}
	if q := l.Requested; q != nil {
		state := either(q.Ended == "", "tried again until "+date(q.Until), "given up: "+q.Ended)
		fmt.Fprintf(w, "asked for\tby %s at %s, to be active at %s; %s\n",
			q.By, date(q.Asked), date(q.Activates), state)
	}
	if r := l.Rotation; r != nil {
		if r.Cancelled != 0 {
			fmt.Fprintf(w, "version %d\tcalled off; version %d stays\n", r.Cancelled, r.Version)
		} else {
			fmt.Fprintf(w, "version %d\tactive from %s on, the one before accepted until %s\n",
				r.Version, date(r.ActivatesAt), date(r.RetiresAt))
		}
		if len(l.Acknowledged) > 0 {
			fmt.Fprintf(w, "acknowledged\tby %s\n", strings.Join(l.Acknowledged, ", "))
		}
		fmt.Fprintf(w, "not acknowledged\tby %s\n", late(l.Unacknowledged))
	}
	if r := l.Recovery; r != nil {
		fmt.Fprintf(w, "recovery\tversion %d, made at %s on token %s%s\n", r.Version, date(r.Created), r.Token,
			either(r.Absent, ", which the configuration does not have", ""))
	}
	for _, c := range l.Compromises {
		fmt.Fprintf(w, "version %d\tCOMPROMISED; not acknowledged by %s\n", c.Version, late(c.Unacknowledged))
	}
}

// late names the peers without an acknowledgement.
func late(names []string) string {
	return either(len(names) == 0, "nobody: all peers have", strings.Join(names, ", "))
}
