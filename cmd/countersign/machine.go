package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"countersign/admin/api"
	"countersign/approval"
	"countersign/internal/update"

	"github.com/spf13/cobra"
)

// machine shows, updates, restarts and resets the machine of an appliance that was booted from the
// image.
func (t *tool) machine(act maker) *cobra.Command {
	show := act("show", "Show the image that runs, and the update that is under way", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			m, err := c.Machine(ctx)
			if err != nil {
				return err
			}
			return t.print(m, func(w io.Writer) { showMachine(w, m) })
		})
	restart := act("restart", "Restart the machine", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error { return c.RestartMachine(ctx) })
	reset := act("reset NAME", "Destroy the disk of the machine, under approval", cobra.ExactArgs(1),
		func(ctx context.Context, c *api.Client, args []string) error {
			return t.propose(ctx, c, approval.ActMachineReset, "", "name", args[0])
		})
	details(reset, "NAME is the name of the appliance, as its console and each proposal show it. The keys, the\n"+
		"ledger and the log are gone for ever. Only a backup brings them back, elsewhere or here.")
	reset.Example = "  countersign admin machine reset countersign-6922be318fb61a67"
	return group("machine", "Show, restart and reset a machine that was booted from the image", show, restart, reset)
}

func showMachine(w io.Writer, m api.Machine) {
	if !m.Image {
		fmt.Fprintln(w, "image\tnone: the appliance is a program on a host")
		return
	}
	fmt.Fprintf(w, "image\t%s, %s, rollback version %d\n", m.Version, m.Variant, m.Rollback)
	if m.Test {
		fmt.Fprintln(w, "TEST KEYS\tthe image was made with test keys, and protects nothing")
	}
	if m.Try {
		fmt.Fprintln(w, "TRY\tthe disk is not protected")
	}
	for _, s := range m.Slots {
		state := either(s.Proven, "proven", fmt.Sprintf("not proven, %d tries left", s.Left))
		fmt.Fprintf(w, "slot\t%s, %s%s\n", s.Version, state, either(s.Running, ", runs", ""))
	}
	if u := m.Update; u != nil {
		fmt.Fprintf(w, "update\t%s to %s: %s%s\n", u.From, u.To, u.Phase, either(u.Why != "", ": "+u.Why, ""))
	}
	if u := m.Uploaded; u != nil {
		fmt.Fprintf(w, "uploaded\t%s, rollback version %d, manifest %s\n", u.Version, u.Rollback, u.SHA256)
	}
	for _, f := range m.Failures {
		fmt.Fprintf(w, "FAILED\t%s\n", f)
	}
}

// update proposes updates of the image.
func (t *tool) update(act maker) *cobra.Command {
	propose := act("propose FILE", "Install another image, under approval, and restart the machine", cobra.ExactArgs(1),
		func(ctx context.Context, c *api.Client, args []string) error {
			f, err := os.Open(args[0])
			if err != nil {
				return err
			}
			defer f.Close()
			u, err := update.Peek(f)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			info, err := f.Stat()
			if err != nil {
				return err
			}
			if _, err := f.Seek(0, io.SeekStart); err != nil {
				return err
			}
			now, err := c.Machine(ctx)
			if err != nil {
				return err
			}
			if !now.Image {
				return errors.New("the appliance is a program on a host: update its package")
			}
			if now.Uploaded == nil || now.Uploaded.SHA256 != u.Manifest.Digest() {
				bar := t.bar("uploaded")
				bar.noun = "bytes"
				sent := func(bytes int64) { bar.progress(uint64(bytes), uint64(info.Size())) }
				uploaded, err := c.UploadUpdate(ctx, f, sent)
				bar.end()
				if err != nil {
					return err
				}
				if uploaded.Text != u.Text {
					return errors.New("the machine has another manifest than the file: nothing was proposed")
				}
			}
			return t.propose(ctx, c, approval.ActMachineUpdate, u.Text, "version", u.Manifest.Version,
				"from", now.Version, "rollback_version", strconv.FormatUint(u.Manifest.Rollback, 10))
		})
	propose.Annotations = map[string]string{"long": "true"}
	details(propose, "The machine verifies that those who release have signed the file, before it keeps it. When the\n"+
		"proposal is approved, the image goes beside the one that runs, and the machine restarts. The new\n"+
		"image proves itself, or the machine goes back by itself; the audit log says which\n"+
		"(MachineUpdated, MachineUpdateFailed).")
	propose.Example = "  countersign admin update propose countersign-vm_0.3.0.update"
	return group("update", "Update a machine that was booted from the image", propose)
}
