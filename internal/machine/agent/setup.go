package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"time"

	"countersign/internal/durable"
	"countersign/tpm"
)

// configFile is the configuration of the appliance.
const configFile = "/etc/countersign/countersign.toml"

// ledgerFile is the ledger of the appliance.
const ledgerFile = "/var/lib/countersign/ledger.db"

// waiting reports that the machine has no appliance, and waits for a backup.
func waiting() bool {
	s, err := LoadSettings()
	if err != nil || !s.Setup.Restore || isSetUp() {
		return false
	}
	_, err = os.Stat(ledgerFile)
	return errors.Is(err, fs.ErrNotExist)
}

// setUpFile says that the appliance is made: with its ledger, its holders and its own keys. A
// ledger alone is not enough, since the power may go while an appliance is made.
const setUpFile = stateFolder + "/machine/set-up"

// isSetUp reports that the appliance is made, or has come from a backup.
func isSetUp() bool {
	_, err := os.Stat(setUpFile)
	return err == nil
}

// SetUp makes the appliance at the first boot, and goes on with one that was cut off.
func SetUp(ctx context.Context, log io.Writer) error {
	if err := makeBackupFolder(); err != nil {
		return err
	}
	if isSetUp() {
		return nil
	}
	s, err := LoadSettings()
	if err != nil {
		return err
	}
	if !s.Setup.Restore {
		if err := s.makeAppliance(ctx, log); err != nil {
			return err
		}
	} else if _, err := os.Stat(ledgerFile); err != nil { // restore puts a whole ledger in its place
		return errors.New("this machine waits for a backup: c in the menu runs countersignd restore with a drive")
	}
	return durable.Replace(setUpFile, nil, 0o600)
}

// makeAppliance runs countersignd setup.
func (s *Settings) makeAppliance(ctx context.Context, log io.Writer) error {
	if _, err := os.Stat(configFile); err == nil {
		return setUp(ctx, log, s.again()...)
	}
	var facts diskFacts
	if err := readJSON(runFolder+"/disk.json", &facts); err != nil {
		return err
	}
	args := s.arguments(facts.Try)
	if _, err := os.Stat(pinFile); s.token() == "pkcs11" && errors.Is(err, fs.ErrNotExist) {
		return errors.New("the PIN of the HSM's user is missing: choose h in the menu, and type the PIN")
	}
	if s.token() == "tpm" {
		v := tpm.Volumes{Config: tpm.Config{Device: tpmDevice, Deadline: 2 * time.Minute}}
		index, err := v.FreeLedgerIndex(ctx)
		if err != nil {
			return err
		}
		args = append(args, "--counter-index", strconv.FormatUint(uint64(index), 10))
	}
	return setUp(ctx, log, args...)
}

// backupFolder is for the configuration to name: nobody could make a folder on the machine.
const backupFolder = "/var/lib/countersign/backups"

func makeBackupFolder() error {
	daemon, err := user.Lookup("countersign")
	if err != nil {
		return err
	}
	uid, _ := strconv.Atoi(daemon.Uid)
	gid, _ := strconv.Atoi(daemon.Gid)
	if err := os.Mkdir(backupFolder, 0o700); errors.Is(err, fs.ErrExist) {
		return nil
	} else if err != nil {
		return err
	}
	return os.Lchown(backupFolder, uid, gid)
}

func setUp(ctx context.Context, log io.Writer, args ...string) error {
	cmd := exec.CommandContext(ctx, "/usr/bin/countersignd", args...)
	var complaints bytes.Buffer
	cmd.Stdout, cmd.Stderr = log, io.MultiWriter(log, &complaints)
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("countersignd setup: %w: %s", err, lastOf(complaints.String()))
	}
	return nil
}
