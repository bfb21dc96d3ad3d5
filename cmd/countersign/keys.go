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

	"github.com/spf13/cobra"
)

// keyLife are the commands about how a key goes on: rotation, and who must be there.
func (t *tool) keyLife(act maker) []*cobra.Command {
	return []*cobra.Command{t.rotate(act), t.setLine(act), t.archive(act), t.destroy(act), t.compromise(act), t.confirm(act),
		act("authorize-noise", "Have the identity's key sign that the Noise key speaks for it", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
			k, err := c.AuthorizeNoiseKey(ctx)
			if err != nil {
				return err
			}
			return t.print(k, func(w io.Writer) { fmt.Fprintf(w, "authorised\t%s, version %d\n", k.PublicKey, k.Version) })
		}),
	}
}

func (t *tool) rotate(act maker) *cobra.Command {
	var now bool
	var in, at string
	c := act("rotate NAME", "Announce the next version of a key; it becomes active at its time", cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
		r := api.Rotate{Now: now}
		if at != "" {
			when, err := time.Parse(time.RFC3339, at)
			if err != nil {
				return usageError{errors.New("--at must be a time such as 2026-12-01T03:00:00Z")}
			}
			r.At = when.Unix()
		}
		if in != "" {
			d, err := parseAge(in)
			if err != nil {
				return usageError{err}
			}
			r.At = time.Now().Add(d).Unix()
		}
		k, err := c.RotateKey(ctx, args[0], r)
		if err != nil {
			return err
		}
		return t.print(k, func(w io.Writer) {
			fmt.Fprintf(w, "%s\t%s, version %d\npublic key\t%s\nactive\tfrom %s on\n", either(k.State == "active", "rotated", "announced"), k.Name, k.Version, k.PublicKey, date(k.Activates))
		})
	})
	c.Long = "The next version was made and proven before. Its successor is made now, the present version signs the step to it, and peers are told.\n" +
		"Without a flag it becomes active after the key's time of announcement (admin key set --announce). The version before is accepted\n" +
		"for its grace time. What fails changes nothing. The listener's own key is rotated too: admin key rotate noise."
	c.Flags().BoolVar(&now, "now", false, "at once")
	c.Flags().StringVar(&in, "in", "", "after so long, such as 10m or 2d")
	c.Flags().StringVar(&at, "at", "", "at this time, RFC 3339")
	c.MarkFlagsMutuallyExclusive("now", "in", "at")
	return c
}

func (t *tool) setLine(act maker) *cobra.Command {
	var c *cobra.Command
	var every, announce, grace, presence, window, acknowledge string
	var uses uint64
	c = act("set NAME", "Say how a key is rotated by itself, and whether operators must confirm it", cobra.ExactArgs(1), func(ctx context.Context, client *api.Client, args []string) error {
		var change api.Change
		for _, each := range []struct {
			flag, value string
			to          **int64
		}{{"every", every, &change.Every}, {"announce", announce, &change.Announce}, {"grace", grace, &change.Grace}, {"presence", presence, &change.Presence}} {
			if !c.Flags().Changed(each.flag) {
				continue
			}
			if each.flag == "presence" && each.value == "on" {
				each.value = "300s"
			}
			d, err := parseAge(each.value)
			if err != nil {
				return usageError{fmt.Errorf("--%s: %w", each.flag, err)}
			}
			s := int64(d / time.Second)
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
			return usageError{errors.New("say what to set")}
		}
		l, err := client.SetLine(ctx, args[0], change)
		var refusal *api.Error
		if errors.As(err, &refusal) && refusal.Code == "needs_approval" && change == (api.Change{Presence: change.Presence}) {
			return t.propose(ctx, client, "key presence", "", "key", args[0], "seconds", strconv.FormatInt(*change.Presence, 10))
		} else if err != nil {
			return err
		}
		return t.print(l, func(w io.Writer) { showLine(w, l) })
	})
	c.Flags().StringVar(&every, "every", "", "rotate a version of this age: 24h, 90d, 2w; 0: not by age")
	c.Flags().StringVar(&window, "window", "", `rotate within an hour of a tick only (cron, UTC): "0 3 * * 0"; alone: at each tick; "": any time`)
	c.Flags().Uint64Var(&uses, "uses", 0, "rotate a version that has signed so often; 0: however often")
	c.Flags().StringVar(&announce, "announce", "", "announce a version so long before it is active")
	c.Flags().StringVar(&grace, "grace", "", "accept the version before for so long; 0: as long as a document may live")
	c.Flags().StringVar(&acknowledge, "acknowledge", "", "archive the version before sooner, when these peers have acknowledged: names with commas, all, or none")
	c.Flags().StringVar(&presence, "presence", "", "let it sign only so long after an operator has confirmed it (admin key confirm); on: 300s; 0: always. Less of it is proposed, alone")
	return c
}

func (t *tool) archive(act maker) *cobra.Command {
	return act("archive NAME VERSION", "Take a version out of use that was followed, before its grace time is over", cobra.ExactArgs(2), func(ctx context.Context, c *api.Client, args []string) error {
		n, err := versionOf(args[1])
		if err != nil {
			return err
		}
		if err := c.ArchiveKey(ctx, args[0], n); err != nil {
			return err
		}
		return t.said("archived", args[0]+"/"+args[1])
	})
}

func versionOf(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || n == 0 {
		return 0, usageError{fmt.Errorf("%q is not the number of a version", s)}
	}
	return uint32(n), nil
}

func (t *tool) destroy(act maker) *cobra.Command {
	return act("destroy NAME VERSION", "Destroy the private key of a version that is archived or compromised, under approval", cobra.ExactArgs(2), func(ctx context.Context, c *api.Client, args []string) error {
		if _, err := versionOf(args[1]); err != nil {
			return err
		}
		return t.propose(ctx, c, "key destroy", "", "key", args[0], "version", args[1])
	})
}

func (t *tool) compromise(act maker) *cobra.Command {
	var reason string
	c := act("compromise NAME VERSION", "Say that somebody else may have the private key of a version, under approval", cobra.ExactArgs(2), func(ctx context.Context, c *api.Client, args []string) error {
		if _, err := versionOf(args[1]); err != nil {
			return err
		}
		return t.propose(ctx, c, "key compromise", "", "key", args[0], "version", args[1], "reason", reason)
	})
	c.Long = "From the moment that it is approved the version signs nothing, and nothing that it has signed is believed. Where it was active, its\n" +
		"successor follows at once, and peers are told that the old one is compromised."
	c.Flags().StringVar(&reason, "reason", "", "why; it goes into the audit log")
	return c
}

func (t *tool) confirm(act maker) *cobra.Command {
	return act("confirm NAME", "Confirm with your SSH key that you are here and that a key may sign for a while", cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
		me, err := c.Me(ctx)
		if err != nil {
			return err
		}
		ch, err := c.Challenge(ctx, api.NewChallenge{Purpose: "presence", Key: args[0]})
		if err != nil {
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
		return t.print(done, func(w io.Writer) { fmt.Fprintf(w, "confirmed\t%s may sign until %s\n", args[0], date(done.Until)) })
	})
}

// shownKey is a key with how it is rotated, as key show --json prints it.
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
		showLine(w, l)
	})
}

func showLine(w io.Writer, l api.Line) {
	span := func(s int64) string { return (time.Duration(s) * time.Second).String() }
	var plan []string
	if l.Every != 0 {
		plan = append(plan, "at the age of "+span(l.Every))
	}
	if l.Uses != 0 {
		plan = append(plan, fmt.Sprintf("after %d signatures", l.Uses))
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
		fmt.Fprintf(w, "presence\t%s after a confirmation; %s\n", span(l.Presence), either(l.Confirmed == 0, "none now", "now until "+date(l.Confirmed)))
	}
	if r := l.Rotation; r != nil {
		fmt.Fprintf(w, "version %d\tactive from %s on, the one before %s\n", r.Version, date(r.ActivatesAt), either(r.Compromised, "is compromised", "accepted until "+date(r.RetiresAt)))
		fmt.Fprintf(w, "not acknowledged\t%s\n", either(len(l.Unacknowledged) == 0, "by nobody: all peers have", "by "+strings.Join(l.Unacknowledged, ", ")))
	}
}
