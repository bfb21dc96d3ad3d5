// Command build makes the images: see make image, and go run ./image/build --help.
package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	"countersign/image"
	"countersign/internal/update"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "build: %v\n", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	root := &cobra.Command{Use: "build", Short: "Make the bootable images", SilenceErrors: true, SilenceUsage: true}
	var debian, security string
	mirrors := func() image.Mirrors { return image.Mirrors{Debian: debian, Security: security} }
	root.PersistentFlags().StringVar(&debian, "mirror", image.DefaultMirrors.Debian, "Debian's archive")
	root.PersistentFlags().StringVar(&security, "security", image.DefaultMirrors.Security, "Debian's security archive")

	lock := &cobra.Command{
		Use: "lock", Short: "Write image/packages.lock with the newest version of each package", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var names []string
			for _, list := range []string{"packages", "packages.vm", "packages.rack"} {
				b, err := os.ReadFile(filepath.Join("image", list))
				if err != nil {
					return err
				}
				for line := range strings.Lines(string(b)) {
					if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
						names = append(names, line)
					}
				}
			}
			l, err := image.MakeLock(cmd.Context(), mirrors(), "/usr/share/keyrings/debian-archive-keyring.gpg", names)
			if err != nil {
				return err
			}
			return l.Write("image/packages.lock")
		},
	}
	root.AddCommand(lock, imageCommand(mirrors), manifestCommand(), updateCommand())
	return root
}

// imageCommand is build image.
func imageCommand(mirrors func() image.Mirrors) *cobra.Command {
	var o image.Options
	var out, settings string
	c := &cobra.Command{
		Use: "image", Short: "Make a signed unified kernel image and a disk that boots it", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			o.Source, o.Mirrors = ".", mirrors()
			if o.Work, err = os.MkdirTemp("", "countersign-image"); err != nil {
				return err
			}
			defer os.RemoveAll(o.Work)
			if err := os.MkdirAll(out, 0o755); err != nil {
				return err
			}
			b, err := image.Build(cmd.Context(), o)
			if err != nil {
				return err
			}
			name := filepath.Join(out, fmt.Sprintf("countersign-%s_%s", o.Variant, o.Version))
			if err := o.Disk(cmd.Context(), b, name+".raw", settings, nil); err != nil {
				return err
			}
			if err := copyFile(b.UKI, name+".efi"); err != nil {
				return err
			}
			return image.QCOW2(cmd.Context(), name+".raw", name+".qcow2")
		},
	}
	f := c.Flags()
	f.StringVar(&o.Variant, "variant", "vm", "vm or rack")
	f.StringVar(&o.Keys, "keys", "", "the folder of image/keys.sh")
	f.StringVar(&o.Programs, "programs", "", "a folder with countersignd and countersign-machine")
	f.StringVar(&o.Cache, "cache", filepath.Join(os.TempDir(), "countersign-debs"), "a folder for Debian packages")
	f.StringVar(&o.Version, "version", "", "the version")
	f.Uint64Var(&o.Rollback, "rollback", 0, "the rollback version (default: that of image/rollback)")
	f.StringVar(&o.Cmdline, "cmdline", "", "more for the kernel's command line")
	f.StringVar(&settings, "settings", "", "countersign.toml for the ESP")
	f.StringArrayVar(&o.Modules, "module", nil, "a vendor's PKCS#11 module; can be repeated")
	f.IntVar(&o.Level, "level", 19, "of compression, 1 to 19")
	f.Int64Var(&o.Epoch, "epoch", 0, "the time of all files, in Unix seconds")
	f.StringVar(&out, "out", "dist", "the folder of the results")
	return c
}

func copyFile(from, to string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o644)
}

// manifestCommand is build manifest.
func manifestCommand() *cobra.Command {
	return &cobra.Command{
		Use: "manifest UKI", Short: "Print the manifest of an image, for those who release to sign",
		Args: cobra.ExactArgs(1),
		Long: "Prints the manifest of an image: version, variant and rollback version are those in the image. Those\n" +
			"who release sign it: ssh-keygen -Y sign -n " + update.Namespace + " -f KEY MANIFEST",
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := os.ReadFile(args[0])
			if err != nil {
				return err
			}
			m, err := image.Manifest(b)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			_, err = fmt.Fprint(cmd.OutOrStdout(), m.Text())
			return err
		},
	}
}

// updateCommand is build update.
func updateCommand() *cobra.Command {
	var manifest, keys string
	var signatures []string
	c := &cobra.Command{
		Use: "update UKI FILE", Short: "Make the file of an update from an image and a signed manifest",
		Args: cobra.ExactArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			text, err := os.ReadFile(manifest)
			if err != nil {
				return err
			}
			m, err := update.ParseManifest(string(text))
			if err != nil {
				return err
			}
			var all []string
			for _, path := range signatures {
				b, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				all = append(all, string(b))
			}
			released, err := os.ReadFile(filepath.Join(keys, "release.keys"))
			if err != nil {
				return err
			}
			k, err := update.ParseKeys(string(released))
			if err == nil {
				err = k.Verify(m.Text(), all)
			}
			if err != nil {
				return err
			}
			content, err := os.ReadFile(args[0])
			if err != nil {
				return err
			}
			if is, err := image.Manifest(content); err != nil || is != m {
				return fmt.Errorf("%s: it is not the image of the manifest: %w", args[0], err)
			}
			out, err := os.Create(args[1])
			if err != nil {
				return err
			}
			if err := update.Write(out, m, all, bytes.NewReader(content)); err != nil {
				return err
			}
			return out.Close()
		},
	}
	c.Flags().StringVar(&manifest, "manifest", "", "the file of the manifest")
	c.Flags().StringVar(&keys, "keys", "", "the folder of image/keys.sh, of which release.keys is read")
	c.Flags().StringArrayVar(&signatures, "signature", nil, "a file with a signature of the manifest; can be repeated")
	return c
}
