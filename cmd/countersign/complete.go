package main

import (
	"context"
	"slices"
	"strings"
	"time"

	"countersign/admin/api"
	"countersign/approval"
	"countersign/transcript"

	"github.com/spf13/cobra"
)

// completionTime is the timeout of a completion: a shell waits for the answer.
const completionTime = 2 * time.Second

// names returns the names of one kind for a completion. Without a session or an appliance there are
// none, and the shell shows nothing.
type names func(ctx context.Context, t *tool) []string

var (
	keyNames      = listed((*api.Client).Keys, func(k api.Key) string { return k.Name })
	peerNames     = listed((*api.Client).Peers, func(p api.Peer) string { return p.Name })
	groupNames    = listed((*api.Client).Groups, func(g api.Group) string { return g.Name })
	operatorNames = listed((*api.Client).Operators, func(o approval.Operator) string { return o.Name })
	scraperNames  = listed((*api.Client).Scrapers, func(s api.Scraper) string { return s.Name })
	tokenNames    = listed((*api.Client).Tokens, func(s api.Token) string { return s.Name })
)

// listed returns the names in a listing of the appliance.
func listed[T any](list func(*api.Client, context.Context) ([]T, error), name func(T) string) names {
	return func(ctx context.Context, t *tool) (all []string) {
		at, err := t.findAppliance()
		if err != nil {
			return nil
		}
		c, err := at.client()
		if err != nil {
			return nil
		}
		c.SetToken(readSession(at.name).Token) // a completion must not sign in by itself
		found, _ := list(c, ctx)
		for _, each := range found {
			all = append(all, name(each))
		}
		return all
	}
}

func transcriptNames(context.Context, *tool) (all []string) {
	for _, t := range transcript.Types() {
		all = append(all, t.Name)
	}
	return all
}

func contextNames(context.Context, *tool) []string {
	all, _ := storedContexts()
	return all
}

// completedArguments has the kind of a command's first argument, by the beginning of the command's
// path. New names have no completion.
var completedArguments = []struct {
	path  string
	kind  names
	fresh []string // commands whose argument is a new name
}{
	{"countersign admin key ", keyNames, []string{"create", "import"}},
	{"countersign admin peer ", peerNames, []string{"add"}},
	{"countersign admin peer key ", peerNames, nil},
	{"countersign admin group ", groupNames, nil},
	{"countersign admin operator ", operatorNames, []string{"add", "first"}},
	{"countersign admin credential ", operatorNames, nil},
	{"countersign admin login", operatorNames, nil},
	{"countersign admin scraper ", scraperNames, []string{"add", "list"}},
	{"countersign admin token ", tokenNames, nil},
	{"countersign admin context ", contextNames, []string{"add", "list"}},
	{"countersign line pin", keyNames, nil},
	{"countersign transcript encode", transcriptNames, nil},
}

// completedFlags has the kind of a flag's value. A peer's tool may be on a machine without a
// socket: then a key has no completion.
var completedFlags = map[string]names{
	"key": keyNames, "operator": operatorNames, "token": tokenNames, "type": transcriptNames, "context": contextNames,
}

// addCompletion adds completions that ask the appliance for names.
func (t *tool) addCompletion(root *cobra.Command) {
	for _, c := range root.Commands() {
		t.addCompletion(c)
	}
	path := root.CommandPath()
	for _, each := range completedArguments {
		if strings.HasPrefix(path, each.path) && !root.HasSubCommands() && !slices.Contains(each.fresh, root.Name()) {
			root.ValidArgsFunction = t.complete(each.kind, 1)
		}
	}
	for name, kind := range completedFlags {
		// The log has types of events, and its verification a key of another kind.
		if root.Flags().Lookup(name) == nil || strings.Contains(path, " audit") {
			continue
		}
		root.RegisterFlagCompletionFunc(name, t.complete(kind, -1))
	}
}

// complete returns a completion by names of a kind: of the first arguments, or with -1 of a flag.
func (t *tool) complete(kind names, arguments int) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
		if arguments >= 0 && len(args) >= arguments {
			return nil, cobra.ShellCompDirectiveDefault
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), completionTime)
		defer cancel()
		all := slices.DeleteFunc(kind(ctx, t), func(name string) bool { return !strings.HasPrefix(name, begun) })
		slices.Sort(all)
		return slices.Compact(all), cobra.ShellCompDirectiveNoFileComp
	}
}
