// Command countersignd is the Countersign daemon: the service for peers over Noise, and for
// operators on a Unix socket. Config describes the configuration.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"countersign/appliance"
	"countersign/internal/backup"
	"countersign/internal/cause"
	"countersign/internal/cli"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/logqueue"
	"countersign/internal/meter"
	"countersign/internal/mirror"
	"countersign/internal/resource"
	"countersign/internal/scrub"
	"countersign/policy"

	"github.com/spf13/cobra"
)

func main() {
	// A second signal has no effect: the stop takes a bounded time, and admitted requests must be
	// finished.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	syscall.Umask(0o077)           // a module decides the modes of its files by the umask
	signal.Ignore(syscall.SIGPIPE) // a reader of stdout or stderr that leaves must not end the daemon
	stderr := logqueue.New(os.Stderr)
	code := run(ctx, os.Args[1:], inOrder{os.Stdout, stderr}, stderr)
	stop()
	stderr.Close(lastLines)
	os.Exit(code)
}

// defaultConfig is the configuration that the units read.
const defaultConfig = "/etc/countersign/countersign.toml"

// lastLines is the time for the last lines of stderr, which a reader may not read.
const lastLines = 2 * time.Second

// inOrder is stdout. Its text comes after the lines of stderr that were written before, as a person
// who sees both expects.
type inOrder struct {
	io.Writer
	stderr *logqueue.Queue
}

func (w inOrder) Write(b []byte) (int, error) {
	w.stderr.Flush(lastLines)
	return w.Writer.Write(b)
}

// run executes a command line, and returns the exit status.
func run(ctx context.Context, args []string, stdout io.Writer, stderr *logqueue.Queue) int {
	var configPath string
	root := &cobra.Command{
		Use:   "countersignd",
		Short: "The Countersign daemon: signs and verifies for payment servers, with keys in an HSM",
		Long: "The Countersign daemon: signs and verifies for payment servers, with keys in an HSM.\n\n" +
			"Exit status: 0 done; 1 another start may help; 2 the configuration or the command line is wrong;\n" +
			"3 a PIN is wrong; 4 the ledger is missing or damaged, or of another version.",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.PersistentFlags().StringVar(&configPath, "config", defaultConfig,
		"the configuration file (TOML)")
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)

	configCmd := &cobra.Command{
		Use:     "config",
		Short:   "Print each field of the configuration, with its default and its meaning, as commented TOML",
		Args:    cobra.NoArgs,
		Example: "  countersignd config >countersign.toml",
		RunE: func(*cobra.Command, []string) error {
			_, err := io.WriteString(stdout, reference)
			return err
		},
	}
	var making initOptions
	initCmd := &cobra.Command{
		Use:   "init",
		Short: "Create the ledger and the listener's Noise key; print the public key",
		Example: "  countersignd init --new-token --so-pin-file so-pin\n" +
			"  countersignd init --token anchor\n" +
			"  countersignd init --needed 2 --holder alice=age1qqq --holder bob=bob.pub --holder carol=age1zzz",
		Long: "Creates the ledger and, in the token, the listener's Noise key and the audit log's key.\n" +
			"Prints the public Noise key, which peers need. An existing part is not changed: run an\n" +
			"interrupted init again. Before a ledger is made, the tokens make, use and destroy a\n" +
			"throw-away key of each kind.\n\n" +
			"With --holder, the appliance's own keys are recoverable for ever: after the loss of their token,\n" +
			"any --needed of the holders bring them back (countersignd return-keys), and the appliance goes\n" +
			"on as itself. Without, the loss of that token is the end of the appliance. This can't be changed\n" +
			"later.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), startTime)
			defer cancel()
			if err := making.readHolders(); err != nil { // as root
				return err
			}
			return withConfig(configPath, func(c Config) error {
				return withLauncher(configPath, making.soPINFile, c, func(c Config) error {
					if err := refuseAccess(configPath, c); err != nil {
						return err
					}
					return initialise(ctx, c, making, stdout, stderr)
				})
			})
		},
	}
	initCmd.Flags().BoolVar(&making.newToken, "new-token", false,
		"initialise each missing PKCS#11 token first, with the label of its URI")
	initCmd.Flags().StringVar(&making.soPINFile, "so-pin-file", "",
		"with --new-token, but for a TPM: the file with the security officer's PIN")
	initCmd.Flags().StringArrayVar(&making.holders, "holder", nil,
		"NAME=KEY or NAME=FILE, a recovery holder with a key of age or SSH; can be repeated")
	initCmd.Flags().IntVar(&making.needed, "needed", 0, "so many holders together bring a key back")
	initCmd.Flags().StringVar(&making.token, "token", "",
		"add this token of the configuration to an appliance, and touch no other token and no ledger")

	serveCmd := &cobra.Command{
		Use:     "serve",
		Short:   "Serve peers and operators until SIGTERM",
		Example: "  countersignd serve --config /etc/countersign/countersign.toml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			reload := make(chan os.Signal, 1)
			signal.Notify(reload, syscall.SIGHUP) // also during the start, which SIGHUP must not end
			defer signal.Stop(reload)
			listeners, err := inherited() // before a child process can inherit them
			if err != nil {
				return configError{err}
			}
			err = withConfig(configPath, func(c Config) error {
				return withLauncher(configPath, "", c, func(c Config) error {
					if err := refuseAccess(configPath, c); err != nil {
						return err
					}
					return serve(cmd.Context(), configPath, c, listeners, stderr, reload)
				})
			})
			if cmd.Context().Err() != nil && errors.Is(err, context.Canceled) {
				fmt.Fprintln(stderr, "countersignd: stopped before it served")
				return nil
			}
			return err
		},
	}
	var checking checkOptions
	var retryPIN []string
	var checklist bool
	checkCmd := &cobra.Command{
		Use:     "check",
		Short:   "Check whether serve would start: configuration, policy, tokens, ledger, keys",
		Example: "  countersignd check\n  countersignd check --deep --write",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withConfig(configPath, func(c Config) error {
				for _, name := range retryPIN {
					t := c.Tokens[name]
					if t == nil {
						return configError{fmt.Errorf("--retry-pin %s: the configuration has no such token; it has %s",
							name, strings.Join(slices.Sorted(maps.Keys(c.Tokens)), ", "))}
					}
					t.retry = true
				}
				if checklist {
					return printChecklist(c, stdout)
				}
				return withLauncher(configPath, "", c, func(c Config) error {
					return check(cmd.Context(), configPath, c, checking, os.Stdin, stdout, stderr)
				})
			})
		},
	}
	checkCmd.Flags().BoolVar(&checklist, "checklist", false,
		"print the production checklist for this configuration instead, and open neither a token nor the ledger")
	checkCmd.Flags().BoolVar(&checking.deep, "deep", false,
		"read the whole ledger: each page, and compare each event with its hash, each tree with its root")
	checkCmd.Flags().BoolVar(&checking.write, "write", false,
		"have each token make, use and destroy throw-away keys, without a question: only such keys prove a token")
	checkCmd.Flags().StringSliceVar(&retryPIN, "retry-pin", nil,
		"TOKEN: try the PIN of this token, although it was refused before or is on its last try")
	var from opening
	verifyCmd := &cobra.Command{
		Use:     "verify FILE",
		Short:   "Verify a backup, on any machine, without its appliance",
		Example: "  countersignd backup verify the.backup --identity recovery.key",
		Long: "Decrypts a backup into a temporary folder and checks the whole: each file by its hash, the\n" +
			"manifest by the proof of the audit log, each page, event and checkpoint of the ledger, and the\n" +
			"lists of writes that follow the backup, each by its number and signature. That the last lists\n" +
			"are missing can't be seen: compare what the backup reaches, and the appliance's name,\n" +
			"with what you know of it: anybody can make a backup of his own appliance.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			from.file = args[0]
			return verifyBackup(cmd.Context(), from, stdout)
		},
	}
	backupCmd := &cobra.Command{Use: "backup", Short: "Verify backups", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() }}
	backupCmd.AddCommand(verifyCmd)
	var restores restoring
	restoreCmd := &cobra.Command{
		Use:   "restore FILE",
		Short: "Restore an appliance from a backup, with the approvals of its own operators",
		Example: "  countersignd restore the.backup --appliance countersign/14fc9972b63bcc40 \\\n" +
			"    --identity recovery.key --proposer ann --text restore.txt\n" +
			"  ssh-keygen -Y sign -n countersign-proposal-v1 -f ann.key restore.txt\n" +
			"  countersignd restore the.backup --appliance countersign/14fc9972b63bcc40 \\\n" +
			"    --identity recovery.key --proposer ann --text restore.txt --approval restore.txt.sig",
		Long: "Verifies a backup, and puts the files back that are missing here: the configuration, the policy\n" +
			"and the records of a TPM's keys. Then says which keys are on their tokens, and what is lost, and\n" +
			"writes a text. With the approvals of this text, as many as the backup's own operators need, the\n" +
			"ledger gets its place. The appliance then refuses each document of before (restored).\n\n" +
			"Make sure first that the old machine is off, and stays off: two appliances with the same keys\n" +
			"know nothing of each other's nonces. The clock must be right.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			from.file = args[0]
			restores.opening = from
			return restore(cmd.Context(), restores, stdout, stderr)
		},
	}
	for _, c := range []*cobra.Command{verifyCmd, restoreCmd} {
		c.Flags().StringSliceVar(&from.identities, "identity", nil,
			"the file with a private key of a recipient: of age-keygen, or of SSH; can be repeated")
		c.MarkFlagRequired("identity")
		c.Flags().StringVar(&from.scratch, "scratch", "", "the folder for the temporary folder (default: TMPDIR)")
		c.Flags().StringVar(&from.lists, "lists", "",
			"the folder of the lists of writes that follow the backup; none leaves them out (default: that of FILE)")
		c.Flags().Uint64Var(&from.until, "until-list", lastList, "the last list of writes to use")
	}
	restoreCmd.Flags().StringVar(&restores.appliance, "appliance", "",
		"the name of the appliance that you know, such as countersign/14fc9972b63bcc40")
	restoreCmd.MarkFlagRequired("appliance")
	restoreCmd.Flags().StringToStringVar(&restores.moved, "map", nil,
		"OLD=NEW: the folder OLD of the backup is NEW here; can be repeated")
	restores.flags(restoreCmd, "the administrator of the backup who proposes the restore")
	var drills drilling
	drillCmd := &cobra.Command{
		Use:     "drill",
		Short:   "Restore the newest backup where nobody can reach the result, and tell the daemon what that proves",
		Example: "  countersignd drill --identity recovery.key",
		Long: "Restores the newest backup of the folder of [backup] into a scratch folder, with the lists of\n" +
			"writes that follow. Checks all that backup verify checks. Starts an appliance on scratch tokens\n" +
			"(SoftHSM), without a listener: it must have the policy, the peers and the public keys of the\n" +
			"manifest, refuse a document of before, admit a later one once, and sign with a new key. Then\n" +
			"overwrites and empties the scratch folder.\n\n" +
			"The running daemon compares its log with that of the backup, and has an event, a metric and an\n" +
			"alert of the result: BackupProven, or DrillFailed. Run it as root, each night, on the machine of\n" +
			"the appliance, with a private key that the daemon's user can't read.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withConfig(configPath, func(c Config) error {
				return drill(cmd.Context(), configPath, c, drills, stdout)
			})
		},
	}
	drillCmd.Flags().StringSliceVar(&drills.identities, "identity", nil,
		"the file with a private key of a recipient: of age-keygen, or of SSH; can be repeated")
	drillCmd.MarkFlagRequired("identity")
	drillCmd.Flags().StringVar(&drills.file, "backup", "", "the backup (default: the newest one in the folder)")
	drillCmd.Flags().StringVar(&drills.scratch, "scratch", "",
		"the folder for the scratch folder, with room for the backup three times (default: TMPDIR)")
	drillCmd.Flags().StringVar(&drills.module, "module", softHSMModule, "the PKCS#11 module of the scratch tokens")
	drillCmd.Flags().StringVar(&drills.appliance, "appliance", "",
		"the name of the appliance, such as countersign/14fc9972b63bcc40, where the folder has backups of several")
	drillCmd.Flags().BoolVar(&drills.filesOnly, "files-only", false, "start no appliance on scratch tokens")
	drillCmd.Flags().BoolVar(&drills.silent, "silent", false, "do not tell the daemon")
	drillCmd.Flags().BoolVar(&drills.withHolders, "holders", false,
		"have holders bring the recoverable keys back; needs --request and --answers")
	drills.flags(drillCmd)
	var returns returning
	returnCmd := &cobra.Command{
		Use:     "return-keys",
		Short:   "Bring recoverable keys back onto a token, with the shares of recovery holders",
		Example: "  countersignd return-keys --request return.request --answers answers",
		Long: "For recoverable keys whose token was lost, after the configuration names another token in its\n" +
			"place, under the same name. Says which keys are missing, writes a request for the holders, and\n" +
			"waits until enough of them have answered (countersign holder give). Then the keys are made on\n" +
			"their tokens again, each after an event of its own (KeyReturned). The daemon must be stopped when\n" +
			"the command begins and when it ends; it may run while the command waits.\n\n" +
			"Make sure first that the lost token is not in other hands: if it may be, the keys are compromised,\n" +
			"and must be replaced instead (countersign admin key compromise). Run it as root.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withConfig(configPath, func(c Config) error {
				return returnKeys(cmd.Context(), configPath, c, returns, stdout, stderr)
			})
		},
	}
	returns.flags(returnCmd)
	returnCmd.Flags().StringSliceVar(&returns.only, "key", nil,
		"a `version`, such as payments/1, to return; can be repeated (default: all that are missing)")
	resets := resetting{extent: extent{FreeSpace: true}}
	resetCmd := &cobra.Command{
		Use:   "factory-reset",
		Short: "Destroy the appliance: its keys on all tokens, its counter, its files",
		Example: "  countersignd factory-reset --proposer ann --text reset.txt\n" +
			"  ssh-keygen -Y sign -n countersign-proposal-v1 -f ann.key reset.txt\n" +
			"  countersignd factory-reset --proposer ann --text reset.txt --approval reset.txt.sig\n" +
			"  countersignd factory-reset --typed",
		Long: "Says what would be destroyed and what would stay, and writes a text. With the approvals of this\n" +
			"text, as many as the appliance's operators need, destroys the keys on all tokens, gives the\n" +
			"counter in the TPM back, overwrites and removes the files, and overwrites the free space of\n" +
			"their disks. The daemon must be stopped.\n\n" +
			"Where nobody can approve any more, root types the appliance's name at a terminal (--typed).\n\n" +
			"Each step is said on stderr and in a file outside (--record). A reset that was cut off goes on\n" +
			"by the same command, without approvals; no daemon starts until then. Nothing brings the keys\n" +
			"back, but for recoverable keys: recovery holders can, with any backup that is left anywhere.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return factoryReset(cmd.Context(), configPath, resets, stdout, stderr)
		},
	}
	resets.flags(resetCmd, "the administrator who proposes the reset")
	resetCmd.Flags().BoolVar(&resets.typed, "typed", false,
		"ask no approvers: root types the appliance's name at a terminal")
	resetCmd.Flags().StringVar(&resets.record, "record", defaultRecord,
		"the file, outside of what is destroyed, that gets a line of each step")
	resetCmd.Flags().StringSliceVar(&resets.LeftTokens, "without-token", nil,
		"TOKEN: leave this token and its keys as they are; can be repeated")
	resetCmd.Flags().BoolVar(&resets.Backups, "backups", false,
		"destroy the appliance's backups in the folder of [backup], too")
	resetCmd.Flags().BoolVar(&resets.KeepPINs, "keep-pins", false, "keep the PIN files: other programs use the tokens")
	resetCmd.Flags().BoolVar(&resets.StorageRoots, "storage-roots", false,
		"give the storage root keys of the TPMs back, too: other programs may use them")
	resetCmd.Flags().BoolVar(&resets.FreeSpace, "free-space", true,
		"overwrite the free space of the disks, where older versions of files are: takes long on a large disk")
	workerCmd := &cobra.Command{
		Use: workerCommand, Hidden: true, Args: cobra.ExactArgs(1), // the token's name, for lists of processes
		RunE: func(*cobra.Command, []string) error { return keyWorker() },
	}
	var soPINFile string
	launchCmd := &cobra.Command{
		Use: launcherCommand, Hidden: true, Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return launch(configPath, soPINFile) },
	}
	launchCmd.Flags().StringVar(&soPINFile, "so-pin-file", "", "as of init")
	var proveAs, proveAct string
	proveCmd := &cobra.Command{
		Use: proveCommand, Hidden: true, Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return withConfig(configPath, func(c Config) error {
				return proveSandbox(configPath, c, proveAs, proveAct, stdout)
			})
		},
	}
	proveCmd.Flags().StringVar(&proveAs, "as", "", "the sandbox of one act")
	proveCmd.Flags().StringVar(&proveAct, "act", "", "the act")
	var keyPath, bank string
	var registers map[string]string
	approveCmd := &cobra.Command{
		Use:     "approve-state",
		Short:   "Approve a state of a machine with a TPM, for keys that are sealed to policy_key",
		Example: "  countersignd approve-state --key policy.key --pcr 7=$(cat pcr7) >update.approval.json",
		Long: "Signs values of PCRs with the private key to policy_key (ECDSA on P-256, PEM), and prints\n" +
			"the approval. Write the approval to a file NAME.approval.json in the token's state folder:\n" +
			"the machine can then use its keys in that state. The command needs no TPM and no\n" +
			"configuration: run it where updates are signed. countersignd check prints the present values\n" +
			"of a machine.",
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return approveState(keyPath, bank, registers, stdout) },
	}
	approveCmd.Flags().StringVar(&keyPath, "key", "", "the file with the private key")
	approveCmd.Flags().StringToStringVar(&registers, "pcr", nil,
		"N=HEX, a register of the bank and its value; repeat for each register that the keys are sealed to")
	approveCmd.Flags().StringVar(&bank, "bank", "sha256", "the bank of the registers, as pcr_bank has it")
	root.AddCommand(setupCommand(&configPath, stdout, stderr), initCmd, serveCmd, checkCmd, configCmd, backupCmd,
		restoreCmd, drillCmd, returnCmd, resetCmd, approveCmd)
	root.AddCommand(workerCmd, launchCmd, proveCmd)
	cli.Add(root, map[string]int{"configuration": configFormat, "ledger": ledger.Format},
		func(err error) error { return err })
	understood := false // the command, its arguments and its flags
	root.PersistentPreRunE = func(c *cobra.Command, _ []string) error {
		err := c.ValidateRequiredFlags() // cobra does so later
		understood = err == nil
		return err
	}
	if err := root.ExecuteContext(ctx); err != nil {
		if !understood {
			err = configError{err}
		}
		text, hint := advise(err)
		fmt.Fprintf(stderr, "countersignd: error: %s\n", new(scrub.Scrubber).Text(text))
		if hint != "" {
			fmt.Fprintf(stderr, "countersignd: hint: %s\n", hint)
		}
		return exitStatus(err)
	}
	return 0
}

// errConfig is the class of a configuration that no restart mends.
var errConfig = errors.New("config")

// exitStatus gives the exit status of an error by its class. docs/INCIDENTS.md has the table, for
// service managers: another start can help only after status 1. An error of two classes has the
// status of the first row.
func exitStatus(err error) int {
	for _, class := range []struct {
		err    error
		status int
	}{
		{errConfig, 2},
		{keystore.ErrAuth, 3},
		{ledger.ErrMissing, 4}, {ledger.ErrFormat, 4}, {ledger.ErrCorrupt, 4},
	} {
		if errors.Is(err, class.err) {
			return class.status
		}
	}
	return 1
}

// configError is an error of class errConfig.
type configError struct{ error }

func (configError) Is(target error) bool { return target == errConfig }

// withConfig calls do with the configuration of a file.
func withConfig(path string, do func(Config) error) error {
	c, err := loadConfig(path)
	if err != nil {
		return configError{err}
	}
	return do(c)
}

// advise returns an error as one line, and advice if there is any.
func advise(err error) (text, hint string) {
	text = cause.Line(err.Error()) // a device or a file may have chosen a part of the text
	for _, a := range []struct {
		err    error
		advice string
	}{
		{ledger.ErrMissing, "run: countersignd init"},
		{ledger.ErrInUse, "stop the other countersignd first"},
		{ledger.ErrFormat, "install that version again"},
		{ledger.ErrCorrupt, "restore it from a backup; do not replace it with an empty one, " +
			"its nonces would be forgotten"},
		{ledger.ErrUnknownState, "look at the disk, then start again: the ledger recovers by being opened"},
		{keystore.ErrAuth, "correct the PIN file; this PIN will not be tried again, " +
			"unless by countersignd check --retry-pin TOKEN"},
		{syscall.EADDRINUSE, "another program or a socket unit listens there; stop it, or change listen in the " +
			"configuration"},
	} {
		if errors.Is(err, a.err) {
			return text, a.advice
		}
	}
	return text, ""
}

// parts are the open parts of an appliance.
type parts struct {
	ledger *ledger.Ledger
	tokens map[string]keystore.Store
	app    *appliance.Appliance
	meter  *meter.Meter
	ship   *backup.Shipper  // of the lists of writes; nil: none are shipped
	mirror *mirror.Mirror   // of the folder of backups; nil: there is no server
	doubts []policy.Warning // about the policy of the start
}

// startTime is the timeout for the tokens until the appliance is complete.
const startTime = time.Minute

// open opens the parts. The ledger comes first, because its errors cost the least time.
func open(ctx context.Context, c Config, log *slog.Logger) (p parts, err error) {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	defer func() {
		if err != nil {
			p.close(log)
		}
	}()
	rules, broken := policy.Load(c.Policy)
	p.meter = meter.New(cli.Version())
	config := c.appliance()
	if c.Backup.Folder != "" && c.Backup.Lists {
		if p.ship, err = backup.NewShipper(c.Backup.Folder, config.Backup.To, log); err != nil {
			return p, err
		}
		config.Backup.Ship = p.ship
	}
	if c.Backup.SFTP != "" {
		server, err := c.Backup.server()
		if err != nil {
			return p, configError{fmt.Errorf("config: backup.%w", err)}
		}
		p.mirror = mirror.New(c.Backup.Folder, server, log)
		config.Backup.Mirror = p.mirror
	}
	if p.ledger, err = openLedger(c, p.meter, p.ship, false); err != nil {
		return p, errors.Join(broken, fmt.Errorf("%s: %w", c.Ledger, err))
	}
	if broken != nil { // the policy approved by operators stays in force without the file
		if rules, err = appliance.ApprovedPolicy(p.ledger); rules == nil || err != nil {
			return p, errors.Join(broken, err)
		}
	}
	// The monitor keeps the failures of tokens until the appliance can write the events.
	config.LoadPolicy = policy.Reader(c.Policy)
	config.Meter = p.meter
	if config.Traces, err = c.Traces.tracer(p.meter, log); err != nil {
		return p, configError{fmt.Errorf("config: traces.%w", err)}
	}
	config.Monitor = resource.NewMonitor(log, config.Limits.RequestTimeout)
	changed := func(name string, up bool, cause error) { // of a token, or of a key such as payments/1
		config.Monitor.Report(context.Background(), appliance.TokenResource(name), up, cause)
	}
	if p.tokens, err = openTokens(ctx, c, log, changed); err != nil {
		return p, err
	}
	if p.app, err = appliance.New(ctx, config, p.ledger, p.tokens, rules, log); err != nil {
		return p, err
	}
	p.doubts = rules.Warnings(p.app.KnowsName)
	return p, nil
}

// openLedger opens the ledger with the retention time of nonces in force, which the ledger has. The
// configuration may have another time. The meter counts the commits; nil counts nothing. The
// shipper, if there is one, gets the lists of writes. With asIs, a ledger of an older format is an
// error.
func openLedger(c Config, m *meter.Meter, ship *backup.Shipper, asIs bool) (*ledger.Ledger, error) {
	options := c.ledger()
	if ship != nil {
		options.Replicate = func(list []byte) {
			if list != nil {
				ship.Take(ledger.NumberOf(list), list)
			}
		}
	}
	options.AsIs = asIs
	options.Committed = appliance.Committed(m)
	options.MarginOf = func(v ledger.View) (time.Duration, error) {
		kept, err := c.retention().InForce(v)
		return kept.Nonces, err
	}
	return ledger.Open(c.Ledger, options)
}

// close closes the parts. The tokens come first, because their failures are events in the ledger.
func (p parts) close(log *slog.Logger) {
	closeTokens(p.tokens, log)
	if p.ledger != nil {
		closed := make(chan error, 1)
		go func() { closed <- p.ledger.Close() }()
		select {
		case err := <-closed:
			if err != nil {
				log.Error("close the ledger", "err", err)
			}
		case <-time.After(stopWait): // all that was answered is on disk
			log.Error("the ledger is not closed, because a backup does not end: its folder hangs")
		}
	}
	if p.ship != nil {
		p.ship.Close()
	}
	if p.mirror != nil { // with the last lists of the shipper
		p.mirror.Close()
	}
}
