package agent

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"countersign/internal/durable"
	"countersign/internal/machine"
	"countersign/internal/manage"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"
)

// The configuration of the appliance belongs to root, and the daemon changes it by asking the
// agent. Invariants:
//
//   - The configuration of before stays beside the new one until a daemon with the new one has the
//     change in the audit log.
//   - The record of a change comes before the change. A power cut leaves the old configuration or
//     the new one, each whole, and the record names the wanted one.
const (
	nextConfig          = configFile + ".next"
	configBefore        = configFile + ".before"
	configurationRecord = stateFolder + "/machine/configuration.json"
	filesFolder         = "/etc/countersign/files"

	maxConfiguration = 64 << 10 // bytes
	maxFiles         = 64
)

// configurationTime is the time for a daemon to come up with a new configuration.
const configurationTime = 3 * time.Minute

// fixedFields belong to the machine: users, sockets, listeners that the firewall lets in, and the
// tokens with their modules, because a module gets the keys.
var fixedFields = []string{
	"user", "keys_user", "keys_socket", "admin_socket", "admin_group", "machine_socket", "listen", "listen_pubky",
	"admin_https", "admin_https_from", "admin_name", "metrics_listen", "ledger", "policy", "history", "import_folder",
	"journal", "tokens", "noise_token", "log_token", "rollback_token",
}

// sameMachine returns an error for a configuration that changes a fixed field.
func sameMachine(now, next []byte) error {
	var before, after map[string]any
	if err := toml.Unmarshal(now, &before); err != nil {
		return err
	}
	if err := toml.Unmarshal(next, &after); err != nil {
		return err
	}
	for _, field := range fixedFields {
		if !reflect.DeepEqual(before[field], after[field]) {
			return fmt.Errorf("%s belongs to the machine: leave it as it is in the configuration in force", field)
		}
	}
	return nil
}

func digest(b []byte) string { return fmt.Sprintf("%x", sha256.Sum256(b)) }

// configuration returns the text in force.
func (a *Agent) configuration() (machine.Named, error) {
	b, err := os.ReadFile(configFile)
	return machine.Named{Name: string(b)}, err
}

// checkConfiguration refuses a text that the appliance would not start with.
func (a *Agent) checkConfiguration(ctx context.Context, text string) (now []byte, err error) {
	if len(text) > maxConfiguration {
		return nil, fmt.Errorf("the configuration has %d bytes; at most %d are allowed", len(text), maxConfiguration)
	}
	if now, err = os.ReadFile(configFile); err != nil {
		return nil, err
	}
	if p, err := readConfigurationRecord(); err != nil {
		return nil, err
	} else if p != nil {
		return nil, fmt.Errorf("%w: the change before has not ended yet", manage.ErrConflict)
	}
	if bytes.Equal(now, []byte(text)) {
		return nil, fmt.Errorf("%w: this configuration is in force already", manage.ErrConflict)
	}
	if err := putConfig(nextConfig, []byte(text)); err != nil {
		return nil, err
	}
	defer os.Remove(nextConfig)
	// The daemon's own check comes first, because its complaints name the line.
	if err := countersignd(ctx, "check", "--checklist", "--config", nextConfig); err != nil {
		return nil, err
	}
	return now, sameMachine(now, []byte(text))
}

// countersignd runs countersignd, and returns the complaint.
func countersignd(ctx context.Context, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var complaints bytes.Buffer
	cmd := exec.CommandContext(ctx, "/usr/bin/countersignd", args...)
	cmd.Stderr, cmd.WaitDelay = &complaints, 10*time.Second // key workers have stderr, too
	if err := cmd.Run(); err != nil {
		text := strings.TrimPrefix(strings.TrimSpace(lastOf(complaints.String())), "countersignd: error: ")
		if text == "" {
			text = err.Error()
		}
		return errors.New(strings.ReplaceAll(text, nextConfig, filepath.Base(configFile)))
	}
	return nil
}

// configure puts a configuration in force, and starts the appliance anew.
func (a *Agent) configure(ctx context.Context, text string) (any, error) {
	now, err := a.checkConfiguration(ctx, text)
	if err != nil {
		return nil, err
	}
	p := machine.PendingConfiguration{Phase: machine.PhaseInstalled, From: digest(now), SHA256: digest([]byte(text))}
	if err := putConfig(configBefore, now); err != nil {
		return nil, err
	}
	if err := writeJSON(configurationRecord, p); err != nil {
		return nil, err
	}
	if err := putConfig(configFile, []byte(text)); err != nil { // the new one may have the name already
		if back := putConfig(configFile, now); back != nil {
			return nil, errors.Join(err, back) // the record stays, for the next start
		}
		return nil, errors.Join(err, os.Remove(configurationRecord))
	}
	a.Log.Info("the configuration was changed", "sha256", p.SHA256)
	go a.watchConfiguration(p.SHA256, configurationTime)
	return nil, a.restart(ctx)
}

// putConfig writes a file that root owns and the daemon's group reads.
func putConfig(path string, b []byte) error {
	var st unix.Stat_t
	if err := unix.Stat(configFile, &st); err != nil {
		return err
	}
	return replaceAs(path, b, 0o640, 0, int(st.Gid))
}

// replaceAs is durable.Replace for a file of another user: the owner comes before the name.
func replaceAs(path string, b []byte, mode fs.FileMode, uid, gid int) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	if err := errors.Join(err, f.Chown(uid, gid), f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	return errors.Join(os.Rename(f.Name(), path), durable.Sync(filepath.Dir(path)))
}

// restart starts the daemon anew, after the answer to its request.
func (a *Agent) restart(ctx context.Context) error {
	return run(ctx, nil, "systemctl", "--no-block", "restart", "countersignd.service")
}

// readConfigurationRecord returns the change that is under way; nil is none.
func readConfigurationRecord() (*machine.PendingConfiguration, error) {
	var p machine.PendingConfiguration
	err := readJSON(configurationRecord, &p)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return &p, err
}

// resumeConfiguration goes on with a change that a restart of the machine has cut.
func (a *Agent) resumeConfiguration() {
	p, err := readConfigurationRecord()
	if err != nil {
		a.Log.Error("the record of the configuration", "err", err)
	}
	if p == nil || p.Phase != machine.PhaseInstalled {
		return
	}
	if b, err := os.ReadFile(configFile); err == nil && digest(b) == p.From {
		p.Phase, p.Why = machine.PhaseFailed, "the power went before the configuration was written"
		if err := writeJSON(configurationRecord, p); err != nil {
			a.Log.Error("the record of the configuration", "err", err)
		}
		return
	}
	go a.watchConfiguration(p.SHA256, configurationTime)
}

// watchConfiguration puts the configuration of before back, when the appliance does not come up
// with the new one.
func (a *Agent) watchConfiguration(sha256 string, wait time.Duration) {
	time.Sleep(wait)
	a.acting.Lock()
	defer a.acting.Unlock()
	p, err := readConfigurationRecord()
	if err != nil || p == nil || p.Phase != machine.PhaseInstalled || p.SHA256 != sha256 {
		return
	}
	ctx := context.Background()
	// The check listens where the service manager does, and would have the daemon started.
	if err := stopAppliance(ctx); err != nil {
		a.Log.Error("stop the appliance", "err", err)
	}
	why := "the appliance did not come up with it within " + wait.String()
	if err := countersignd(ctx, "check"); err != nil {
		why += ": " + err.Error()
	}
	before, err := os.ReadFile(configBefore)
	if err == nil {
		err = putConfig(configFile, before)
	}
	if err == nil {
		p.Phase, p.Why = machine.PhaseFailed, why[:min(len(why), 1000)]
		err = writeJSON(configurationRecord, p)
	}
	a.Log.Error("the configuration of before is in force again", "why", why, "err", err)
	if err := startUnits(ctx); err != nil {
		a.Log.Error("start the daemon", "err", err)
	}
}

// settleConfiguration forgets a change that the audit log has the end of.
func (a *Agent) settleConfiguration(_ context.Context, sha256 string) (any, error) {
	p, err := readConfigurationRecord()
	if err != nil || p == nil || p.SHA256 != sha256 {
		return nil, err
	}
	err = errors.Join(os.Remove(configurationRecord), syncAll(filepath.Dir(configurationRecord)))
	if gone := os.Remove(configBefore); !errors.Is(gone, fs.ErrNotExist) {
		err = errors.Join(err, gone)
	}
	return nil, err
}

// fileForm is the form of the name that operators give to a file, and keptForm the form of the
// whole name. The random end tells the file from any other file of the name, before and after:
// operators approve a configuration with the one file, without seeing the content.
var (
	fileForm = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,39}$`)
	keptForm = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,39}\.[0-9a-f]{16}$`)
)

// files lists the files that operators have given.
func (a *Agent) files() (all []machine.File, err error) {
	entries, err := os.ReadDir(filesFolder)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	now, err := os.ReadFile(configFile)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || !keptForm.MatchString(e.Name()) {
			continue // a file that was not written to its end
		}
		all = append(all, machine.File{Name: e.Name(), Path: filepath.Join(filesFolder, e.Name()), Size: info.Size(),
			Used: used(now, e.Name())})
	}
	return all, nil
}

// used reports that a configuration names a file.
func used(configuration []byte, name string) bool {
	return regexp.MustCompile(`files/` + regexp.QuoteMeta(name) + `["']`).Match(configuration)
}

// putFile keeps a file for the daemon's eyes alone, and returns the whole name.
func (a *Agent) putFile(r *http.Request) (any, error) {
	if !a.acting.TryLock() {
		return nil, errBusy
	}
	defer a.acting.Unlock()
	name := r.URL.Query().Get("name")
	b, err := io.ReadAll(io.LimitReader(r.Body, machine.MaxFile+1))
	defer clear(b)
	switch {
	case err != nil:
		return nil, err
	case !fileForm.MatchString(name):
		return nil, errors.New("a file's name has 1 to 40 small letters, digits, hyphens and underscores, and begins " +
			"with a letter or a digit")
	case len(b) == 0 || len(b) > machine.MaxFile:
		return nil, fmt.Errorf("a file has 1 to %d bytes", machine.MaxFile)
	}
	there, err := a.files()
	if err != nil {
		return nil, err
	}
	if len(there) >= maxFiles {
		return nil, fmt.Errorf("%w: there are %d files, and no more are possible: remove those of no use",
			manage.ErrConflict, maxFiles)
	}
	if err := os.MkdirAll(filesFolder, 0o755); err != nil {
		return nil, err
	}
	if err := os.Chmod(filesFolder, 0o755); err != nil { // whatever the umask
		return nil, err
	}
	random := make([]byte, 8)
	rand.Read(random)
	name += "." + hex.EncodeToString(random)
	return machine.Named{Name: name}, replaceAs(filepath.Join(filesFolder, name), b, 0o600, a.daemon, a.daemon)
}

// removeFile removes a file that the configuration does not name.
func (a *Agent) removeFile(_ context.Context, name string) (any, error) {
	there, err := a.files()
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(there, func(f machine.File) bool { return f.Name == name })
	switch p, err := readConfigurationRecord(); {
	case err != nil:
		return nil, err
	case i < 0:
		return nil, fmt.Errorf("%w: there is no file %q", manage.ErrConflict, name)
	case there[i].Used:
		return nil, fmt.Errorf("%w: the configuration names the file %s", manage.ErrConflict, name)
	case p != nil:
		return nil, fmt.Errorf("%w: the configuration is being changed", manage.ErrConflict)
	}
	return nil, errors.Join(os.Remove(there[i].Path), durable.Sync(filesFolder))
}
