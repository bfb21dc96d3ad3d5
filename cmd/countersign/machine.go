package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"countersign/admin/api"
	"countersign/approval"
	"countersign/internal/cli"
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
	configuration := act("configuration", "Print the configuration of the appliance", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			now, err := c.Configuration(ctx)
			if err != nil {
				return err
			}
			if t.json {
				return t.print(now, nil)
			}
			if now.SHA256 == "" {
				return errHost
			}
			_, err = io.WriteString(t.stdout, now.Text)
			return err
		})
	configuration.Example = "  countersign admin machine configuration >countersign.toml"
	configure := act("configure FILE", "Put a configuration in force, under approval", cobra.ExactArgs(1),
		func(ctx context.Context, c *api.Client, args []string) error {
			text, err := readAtMost(args[0], maxMachineFile)
			if err != nil {
				return err
			}
			now, err := c.Configuration(ctx)
			if err != nil {
				return err
			}
			sum := sha256.Sum256(text)
			return t.propose(ctx, c, approval.ActMachineConfigure, string(text), "from", now.SHA256,
				digestParameter, hex.EncodeToString(sum[:]))
		})
	details(configure, "FILE is the whole configuration: what admin machine configuration prints, with your changes.\n"+
		"Fields that belong to the machine, such as its addresses and tokens, stay as they are. When the\n"+
		"proposal is approved, the daemon starts anew. A daemon that does not come up within 3 minutes\n"+
		"gets the configuration of before; the audit log says which (MachineConfigured,\n"+
		"MachineConfigurationFailed), and admin machine show meanwhile.")
	configure.Example = "  countersign admin machine configuration >countersign.toml\n" +
		"  countersign admin machine configure countersign.toml"
	return group("machine", "Show, configure, restart and reset a machine that was booted from the image",
		show, configuration, configure, t.machineFile(act), restart, reset)
}

// machineFile keeps files on the machine that its configuration can name.
func (t *tool) machineFile(act maker) *cobra.Command {
	put := act("put NAME FILE", "Keep a file on the machine, for the configuration to name", cobra.ExactArgs(2),
		func(ctx context.Context, c *api.Client, args []string) error {
			b, err := readAtMost(args[1], maxMachineFile)
			defer clear(b)
			if err != nil {
				return err
			}
			f, err := c.PutMachineFile(ctx, args[0], b)
			if err != nil {
				return err
			}
			return t.print(f, func(w io.Writer) { showFile(w, f) })
		})
	details(put, "A password, a private key of SFTP or a CA, which only the daemon can read from then on. A file is\n"+
		"never replaced, not even by one of the same name: the path for the configuration, which is\n"+
		"printed, has a random end.")
	put.Example = "  countersign admin machine file put mail password"
	remove := act("remove NAME", "Remove a file that the configuration does not name", cobra.ExactArgs(1),
		func(ctx context.Context, c *api.Client, args []string) error {
			return c.RemoveMachineFile(ctx, args[0])
		})
	remove.Example = "  countersign admin machine file remove mail.5fc23a8bc64cf905"
	return group("file", "Keep files on the machine, such as passwords", put, remove)
}

// errHost is the error of acts on the machine of an appliance that has none.
var errHost = errors.New("the appliance is a program on a host, where root changes its configuration and its package")

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
	if c := m.Configuration; c != nil {
		fmt.Fprintf(w, "configuration\t%s: %s%s\n", c.SHA256, c.Phase, either(c.Why != "", ": "+c.Why, ""))
	}
	for _, f := range m.Files {
		showFile(w, f)
	}
	for _, f := range m.Failures {
		fmt.Fprintf(w, "FAILED\t%s\n", f)
	}
}

func showFile(w io.Writer, f api.MachineFile) {
	fmt.Fprintf(w, "file\t%s, %s%s\n", f.Path, cli.Count(uint64(f.Size), "byte"), either(f.Used, "", ", not used"))
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
				return errHost
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

// maxMachineFile is the maximum length of a configuration, and of a file for it, in bytes.
const maxMachineFile = 64 << 10

// readAtMost reads a file of 1 to most bytes.
func readAtMost(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && (len(b) == 0 || int64(len(b)) > most) {
		err = fmt.Errorf("%s: a file here has 1 to %d bytes", path, most)
	}
	return b, err
}
