package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"countersign/admin/api"
	"countersign/internal/cli"
	"countersign/internal/ownfile"

	"github.com/spf13/cobra"
)

// backups makes, lists and prunes backups. countersignd verifies and restores them.
func (t *tool) backups(act maker) *cobra.Command {
	show := func(w io.Writer, all []api.Backup) {
		mirrored := slices.ContainsFunc(all, func(b api.Backup) bool { return b.Mirrored != "" })
		head := "NAME\tMADE\tSIZE"
		if mirrored {
			head += "\tSFTP"
		}
		fmt.Fprintln(w, head)
		for _, b := range all {
			size := bytesText(b.Size)
			if b.Total > 0 {
				size += " of " + bytesText(b.Total) + " copied"
			}
			if mirrored {
				size += "\t" + cmp.Or(b.Mirrored, "-") // a backup that is being made is not sent yet
			}
			fmt.Fprintf(w, "%s\t%s\t%s\n", b.Name, date(b.Made), size)
		}
	}
	create := act("create", "Make a backup of all but the private keys", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			bar := t.bar("copied")
			bar.noun = "bytes"
			watching, done := context.WithCancel(ctx)
			var watch sync.WaitGroup
			watch.Go(func() { watchCopy(watching, c, bar) })
			b, err := c.CreateBackup(ctx)
			done()
			watch.Wait()
			bar.end()
			if err != nil {
				return err
			}
			return t.print(b, func(w io.Writer) {
				fmt.Fprintf(w, "backup\t%s\n", b.Name)
				fmt.Fprintf(w, "size\t%s, %s\n", bytesText(b.Size), cli.Count(b.Files, "file"))
				fmt.Fprintf(w, "log\t%s, to epoch %d; event %d proves the backup\n",
					cli.Count(b.Events, "event"), b.Epoch, b.Event)
				fmt.Fprintf(w, "time\t%v\n", time.Duration(b.TookMS)*time.Millisecond)
			})
		})
	create.Annotations = map[string]string{"long": "true"}
	details(create, "The file goes into the folder of [backup] in the configuration, encrypted to the recipients\n"+
		"there. The appliance signs meanwhile. Nobody can read a backup without a recipient's private\n"+
		"key, and the role backup can't either.")
	get := act("get NAME FILE", "Copy the file of a backup to here, encrypted as it is", cobra.ExactArgs(2),
		func(ctx context.Context, c *api.Client, args []string) (err error) {
			f, err := ownfile.Create(args[1])
			if err != nil {
				return err
			}
			defer func() {
				if err != nil {
					os.Remove(args[1])
				}
			}()
			if err := errors.Join(c.GetBackup(ctx, args[0], f), f.Sync(), f.Close()); err != nil {
				return err
			}
			out := map[string]string{"file": args[1]}
			return t.print(out, func(w io.Writer) { fmt.Fprintf(w, "file\t%s\n", args[1]) })
		})
	get.Annotations = map[string]string{"long": "true"}
	get.Example = "  countersign admin backup get countersign-6922be318fb61a67-20261130T021700Z.backup the.backup"
	var dry bool
	prune := act("prune", "Remove the backups that the configuration does not keep", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			removed, err := c.PruneBackups(ctx, api.PruneBackups{Dry: dry})
			if err != nil {
				return err
			}
			return t.print(removed, func(w io.Writer) { show(w, removed) })
		})
	details(prune, "A backup of the schedule does so by itself. daily, weekly and monthly of [backup] say how many\n"+
		"are kept; the newest two always are.")
	prune.Flags().BoolVar(&dry, "dry-run", false, "remove nothing, and list what would go")
	prune.Example = "  countersign admin backup prune --dry-run"
	drill := act("drill", "Show the last drill, which has restored a backup", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			d, err := c.LastDrill(ctx)
			if err != nil {
				return err
			}
			return t.print(d, func(w io.Writer) { showDrill(w, d) })
		})
	details(drill, "A drill restores the newest backup where nobody can reach the result, and says what that has\n"+
		"proven. Root has it run each night: countersignd drill.")
	return group("backup", "Make, list and prune backups",
		create,
		act("list", "List the backups in the folder", cobra.NoArgs,
			func(ctx context.Context, c *api.Client, _ []string) error {
				all, err := c.Backups(ctx)
				if err != nil {
					return err
				}
				return t.print(all, func(w io.Writer) { show(w, all) })
			}),
		get, prune, drill)
}

func showDrill(w io.Writer, d api.Drills) {
	if d.Last == nil {
		fmt.Fprintln(w, "drill\tnone yet: countersignd drill")
		return
	}
	result := either(d.Last.Failure == "", "good", "FAILED: "+d.Last.Failure)
	fmt.Fprintf(w, "drill\t%s, %s\n", date(d.At), result)
	fmt.Fprintf(w, "last proven\t%s\n", either(d.Proven == 0, "never", date(d.Proven)))
	if d.Last.Backup != "" {
		fmt.Fprintf(w, "backup\t%s\n", d.Last.Backup)
	}
	if d.Last.Reached != 0 {
		fmt.Fprintf(w, "reaches\t%s\n", date(d.Last.Reached))
	}
	for _, text := range d.Last.Proven {
		fmt.Fprintf(w, "proven\t%s\n", text)
	}
	for _, text := range d.Last.Unproven {
		fmt.Fprintf(w, "not proven\t%s\n", text)
	}
}

// watchCopy shows how much of a backup is copied, until ctx ends. The call that makes the backup
// shows an error.
func watchCopy(ctx context.Context, c *api.Client, b *bar) {
	for b.to != nil {
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
		}
		all, err := c.Backups(ctx)
		if err == nil && len(all) > 0 && all[0].Total > 0 {
			b.progress(uint64(all[0].Size), uint64(all[0].Total))
		}
	}
}
