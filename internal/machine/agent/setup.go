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
	"strconv"
	"time"

	"countersign/tpm"
)

// configFile is the configuration of the appliance.
const configFile = "/etc/countersign/countersign.toml"

// SetUp makes the appliance at the first boot, and goes on with one that was cut off.
func SetUp(ctx context.Context, log io.Writer) error {
	s, err := LoadSettings()
	if err != nil {
		return err
	}
	if _, err := os.Stat("/var/lib/countersign/ledger.db"); err == nil {
		return nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if _, err := os.Stat(configFile); err == nil {
		// The set-up goes on by the configuration that is there.
		return setUp(ctx, log, "setup", "--yes", "--no-start")
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

func setUp(ctx context.Context, log io.Writer, args ...string) error {
	cmd := exec.CommandContext(ctx, "/usr/bin/countersignd", args...)
	var complaints bytes.Buffer
	cmd.Stdout, cmd.Stderr = log, io.MultiWriter(log, &complaints)
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("countersignd setup: %w: %s", err, lastOf(complaints.String()))
	}
	return nil
}
