package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"countersign/admin/api"
	"countersign/approval"
	"countersign/internal/cli"
	"countersign/policy"

	"github.com/spf13/cobra"
)

// groups are the commands about groups of peers and of keys.
func (t *tool) groups(act maker) *cobra.Command {
	list := act("list", "List the groups", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
		all, err := c.Groups(ctx)
		if err != nil {
			return err
		}
		return t.print(all, func(w io.Writer) {
			fmt.Fprintln(w, "NAME\tOF\tMEMBERS\tCHANGED")
			for _, g := range all {
				fmt.Fprintf(w, "%s\t%s\t%d\t%s\n", g.Name, g.Of, g.Size, date(g.Changed))
			}
		})
	})
	show := act("show NAME", "Show the members of a group, one a line", cobra.ExactArgs(1),
		func(ctx context.Context, c *api.Client, args []string) error {
			g, err := c.Group(ctx, args[0])
			if err != nil {
				return err
			}
			return t.print(g, func(w io.Writer) {
				for _, member := range g.Members {
					fmt.Fprintln(w, member)
				}
			})
		})
	remove := act("remove NAME", "Remove a group, under approval", cobra.ExactArgs(1),
		func(ctx context.Context, c *api.Client, args []string) error {
			g, err := c.Group(ctx, args[0])
			if err != nil {
				return err
			}
			return t.propose(ctx, c, "group remove", "", "name", g.Name, replacesParameter, g.SHA256)
		})
	details(remove, "Rules about the group then hold for nobody: a permit permits nothing, and a forbid forbids\n"+
		"nothing.")
	remove.Example = "  countersign admin group remove shops"
	return group("group", "Show groups of peers and of keys, and change them", list, show, t.groupSet(act), remove)
}

// replacesParameter is the parameter with the SHA-256 of the members that an act replaces.
const replacesParameter = "replaces"

func (t *tool) groupSet(act maker) *cobra.Command {
	var keys bool
	var file, add, drop string
	set := act("set NAME [MEMBERS]", "Replace the members of a group, or make the group, under approval",
		cobra.RangeArgs(1, 2), func(ctx context.Context, c *api.Client, args []string) error {
			before, err := presentGroup(ctx, c, args[0])
			if err != nil {
				return err
			}
			of := either(keys, policy.OfKeys, policy.OfPeers)
			if before.Name != "" && !keys {
				of = before.Of
			}
			members, err := membersFrom(before.Members, args[1:], file, add, drop)
			if err != nil {
				return err
			}
			g, err := policy.NewGroup(args[0], of, members)
			if err != nil {
				return err
			}
			return t.propose(ctx, c, "group set", g.Text(), "name", g.Name, "of", g.Of,
				digestParameter, g.Digest(), replacesParameter, before.Digest())
		})
	details(set, "MEMBERS are the names of enrolled peers (with --keys: of keys), with commas in between. In place\n"+
		"of MEMBERS, --file names a file with a name a line, and --add and --drop change the present ones.\n"+
		"Rules of the policy name a group as principal in Group::\"NAME\", and a group of keys as resource in\n"+
		"KeyGroup::\"NAME\". If another change of the group is carried out first, this one fails.")
	set.Example = "  countersign admin group set shops books,wines\n" +
		"  countersign admin group set shops --file shops.txt\n" +
		"  countersign admin group set shops --add cheese --drop wines\n" +
		"  countersign admin group set money payments,invoices --keys"
	f := set.Flags()
	f.BoolVar(&keys, "keys", false, "make a group of keys (default: of peers)")
	f.StringVar(&file, "file", "", "read the members from a `file`, one a line")
	f.StringVar(&add, "add", "", "add `members` to the present ones, with commas in between")
	f.StringVar(&drop, "drop", "", "take `members` out of the present ones, with commas in between")
	return set
}

// membersFrom returns the members that the arguments and flags of group set name.
func membersFrom(present, given []string, file, add, drop string) ([]string, error) {
	changes := add != "" || drop != ""
	switch {
	case len(given) == 1 && file == "" && !changes:
		return memberNames(given[0]), nil
	case len(given) == 0 && file != "" && !changes:
		b, err := os.ReadFile(file)
		return strings.Fields(string(b)), err
	case len(given) > 0 || file != "" || !changes:
		return nil, usageError{errors.New("the members are needed once: give MEMBERS or --file, or --add and --drop")}
	}
	members := slices.Clone(present)
	for _, name := range memberNames(drop) {
		i := slices.Index(members, name)
		if i < 0 {
			return nil, usageError{fmt.Errorf("--drop: %q is not a member", name)}
		}
		members = slices.Delete(members, i, i+1)
	}
	for _, name := range memberNames(add) {
		if slices.Contains(members, name) {
			return nil, usageError{fmt.Errorf("--add: %q is a member already", name)}
		}
		members = append(members, name)
	}
	return members, nil
}

// memberNames returns the names of a list with commas in between.
func memberNames(list string) []string {
	return strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' })
}

// presentGroup returns a group of the appliance, or a zero group if there is none.
func presentGroup(ctx context.Context, c *api.Client, name string) (policy.Group, error) {
	g, err := c.Group(ctx, name)
	if refusal, is := errors.AsType[*api.Error](err); is && refusal.Code == "not_found" {
		return policy.Group{}, nil
	} else if err != nil {
		return policy.Group{}, err
	}
	return policy.NewGroup(name, g.Of, g.Members)
}

// presentGroups returns all groups of the appliance with their members.
func presentGroups(ctx context.Context, c *api.Client) (all []policy.Group, err error) {
	list, err := c.Groups(ctx)
	for _, each := range list {
		g, err := presentGroup(ctx, c, each.Name)
		if err != nil {
			return nil, err
		}
		if g.Name != "" { // otherwise it was removed in between
			all = append(all, g)
		}
	}
	return all, err
}

// showGroup prints the members of a proposed group beside the present ones, and the past decisions
// that the policy in force would have made otherwise. The signed text has the digests of both
// lists, so that the appliance can show no other names. Only the decisions are the appliance's.
func showGroup(ctx context.Context, t *tool, c *api.Client, r *review, to io.Writer) error {
	name, of := r.proposal.Parameter("name"), r.proposal.Parameter("of")
	var after policy.Group
	var err error
	if r.proposal.Act == approval.ActGroupSet {
		if after, err = policy.ParseGroup(name, of, r.doc.Content); err != nil {
			return err
		}
	}
	before, err := presentGroup(ctx, c, name)
	if err != nil {
		return err
	}
	if before.Digest() != r.proposal.Parameter(replacesParameter) {
		return fmt.Errorf("proposal %d: the members of group %s are others than those that it replaces: "+
			"the act would fail: withdraw it, and propose anew", r.proposal.ID, name)
	}
	fmt.Fprintf(to, "\nthe members of group %s, present (-) and proposed (+):\n", name)
	added, dropped := 0, 0
	for _, member := range slices.Compact(slices.Sorted(slices.Values(slices.Concat(before.Members, after.Members)))) {
		_, was := slices.BinarySearch(before.Members, member)
		_, will := slices.BinarySearch(after.Members, member)
		mark := " "
		switch {
		case !was:
			mark = "+"
			added++
		case !will:
			mark = "-"
			dropped++
		}
		fmt.Fprintf(to, "%s %s\n", mark, member)
	}
	fmt.Fprintf(to, "%s: %d added, %d dropped\n", cli.Count(len(after.Members), "member"), added, dropped)
	return showPast(ctx, t, c, &quoted{to: to}, func(groups []policy.Group) []policy.Group {
		groups = slices.DeleteFunc(groups, func(g policy.Group) bool { return g.Name == name })
		if len(after.Members) > 0 {
			groups = append(groups, after)
		}
		return groups
	})
}

// showPast prints the past decisions that the policy in force would make otherwise with other
// groups.
func showPast(
	ctx context.Context, t *tool, c *api.Client, to io.Writer, change func([]policy.Group) []policy.Group,
) error {
	inForce, err := policyInForce(ctx, c)
	if err != nil || inForce.Version == 0 {
		return err
	}
	rules, err := policy.Parse("the policy in force", []byte(inForce.Text))
	if err != nil {
		return err
	}
	groups, err := presentGroups(ctx, c)
	if err != nil {
		return err
	}
	return showDecisions(ctx, t, c, to, rules, change(groups), "the policy in force with these groups")
}
