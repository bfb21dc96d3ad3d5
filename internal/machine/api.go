// Package machine is what the daemon and the consoles ask the machine's agent for, on a machine
// that was booted from the image. The agent itself is in package agent.
package machine

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"countersign/internal/manage"
	"countersign/internal/secret"
	"countersign/internal/update"
)

// Socket is the Unix socket of the machine's agent.
const Socket = "/run/countersign-machine/agent.sock"

// Image is what an image says of itself.
type Image struct {
	Version  string `json:"version"`
	Variant  string `json:"variant"`  // vm or rack
	Rollback uint64 `json:"rollback"` // the rollback version
	Test     bool   `json:"test"`     // made with test keys
}

// Slot is an image on the ESP.
type Slot struct {
	File    string `json:"file"`
	Version string `json:"version"`
	Left    int    `json:"left"` // tries; -1: proven
	Running bool   `json:"running"`
}

// Phases of an update.
const (
	PhaseInstalled = "installed" // on the ESP, and not proven
	PhaseProven    = "proven"
	PhaseFailed    = "failed" // the machine runs the image of before again
)

// Pending is an update that the audit log does not have the end of yet.
type Pending struct {
	Phase    string          `json:"phase"`
	From     string          `json:"from"` // version
	Manifest update.Manifest `json:"manifest"`
	Why      string          `json:"why,omitempty"` // of a failure
}

// PendingConfiguration is a change of the configuration that the audit log does not have the end of
// yet.
type PendingConfiguration struct {
	Phase  string `json:"phase"` // PhaseInstalled or PhaseFailed
	From   string `json:"from"`  // SHA-256, hex
	SHA256 string `json:"sha256"`
	Why    string `json:"why,omitempty"` // of a failure: the one of before is in force again
}

// File is a file that operators have given, such as a password, for the configuration to name.
type File struct {
	Name string `json:"name"`
	Path string `json:"path"`
	Size int64  `json:"size"`
	Used bool   `json:"used"` // the configuration names the file
}

// MaxFile is the maximum length of a file, in bytes.
const MaxFile = 64 << 10

// Status is the state of the machine.
type Status struct {
	Image    Image            `json:"image"`
	Slots    []Slot           `json:"slots"`
	Pending  *Pending         `json:"pending,omitempty"`
	Uploaded *update.Manifest `json:"uploaded,omitempty"`
	// Configuration is the change of the configuration that is under way.
	Configuration *PendingConfiguration `json:"configuration,omitempty"`
	Files         []File                `json:"files"`
	Try           bool                  `json:"try"`       // the disk is not protected
	Failures      map[string]string     `json:"failures"`  // of steps of the boot
	Addrs         []string              `json:"addresses"` // of the network
	Report        *Report               `json:"report,omitempty"`
	// Waiting says that the machine has no appliance, and waits for a backup.
	Waiting bool `json:"waiting,omitempty"`
	// Changed says that the ESP offers other settings than those in force.
	Changed bool `json:"changed,omitempty"`
}

// Report is what the daemon says of the appliance.
type Report struct {
	At        int64    `json:"at"` // Unix seconds
	Appliance string   `json:"appliance"`
	State     string   `json:"state"`
	Causes    []string `json:"causes"`
	Noise     string   `json:"noise"` // public key, hex
	CA        string   `json:"ca"`    // SHA-256 of the certificate, hex; "" is none
	Enrolled  bool     `json:"enrolled"`
}

// Client asks the agent. The zero value asks at Socket.
type Client struct{ Path string }

// Refusal is the document of a refusal.
type Refusal struct {
	Error    string `json:"error"`
	Conflict bool   `json:"conflict,omitempty"`
}

// do asks the agent, and decodes the answer into out.
func (c Client) do(ctx context.Context, method, path string, body io.Reader, out any) error {
	socket := cmp.Or(c.Path, Socket)
	h := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
	r, err := http.NewRequestWithContext(ctx, method, "http://machine"+path, body)
	if err != nil {
		return err
	}
	answer, err := h.Do(r)
	if err != nil {
		return fmt.Errorf("the machine's agent: %w", err)
	}
	defer answer.Body.Close()
	b, err := io.ReadAll(io.LimitReader(answer.Body, 1<<20))
	if err != nil {
		return fmt.Errorf("the machine's agent: %w", err)
	}
	if answer.StatusCode != http.StatusOK {
		return refused(answer, b)
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(b, out)
}

// refused returns the error of a refusal.
func refused(answer *http.Response, body []byte) error {
	var e Refusal
	if json.Unmarshal(body, &e) != nil || e.Error == "" {
		e.Error = answer.Status
	}
	if e.Conflict {
		return fmt.Errorf("%w: %s", manage.ErrConflict, e.Error)
	}
	return errors.New(e.Error)
}

func (c Client) post(ctx context.Context, path string, in, out any) error {
	b, err := json.Marshal(in)
	if err != nil {
		return err
	}
	return c.do(ctx, http.MethodPost, path, bytes.NewReader(b), out)
}

// Status returns the state of the machine.
func (c Client) Status(ctx context.Context) (s Status, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return s, c.do(ctx, http.MethodGet, "/status", nil, &s)
}

// MaxPart is the maximum length of a part of an upload, in bytes.
const MaxPart = 256 << 10

// Upload gives a part of an update's file to the agent. The first part has the offset 0, and each
// further one begins where the one before has ended.
func (c Client) Upload(ctx context.Context, offset int64, part []byte) error {
	return c.do(ctx, http.MethodPut, fmt.Sprintf("/update?offset=%d", offset), bytes.NewReader(part), nil)
}

// EndUpload has the agent verify the uploaded file and keep it, until another one comes.
func (c Client) EndUpload(ctx context.Context) (m update.Manifest, err error) {
	return m, c.post(ctx, "/update/end", struct{}{}, &m)
}

// Named is the body of an act about one thing.
type Named struct {
	Name string `json:"name"`
}

// Install writes the uploaded image with the digest of its manifest beside the one that runs.
func (c Client) Install(ctx context.Context, digest string) error {
	return c.post(ctx, "/install", Named{digest}, nil)
}

// Prove says that the appliance works in the new image: from here on, the machine starts it without
// a count of tries, and opens its disk in no image with an older rollback version.
func (c Client) Prove(ctx context.Context, version string) error {
	return c.post(ctx, "/prove", Named{version}, nil)
}

// Report says how the appliance is.
func (c Client) Report(ctx context.Context, r Report) error { return c.post(ctx, "/report", r, nil) }

// Settle says that the audit log has the end of the update.
func (c Client) Settle(ctx context.Context, version string) error {
	return c.post(ctx, "/settle", Named{version}, nil)
}

// Restart and PowerOff stop the machine in order.
func (c Client) Restart(ctx context.Context) error  { return c.post(ctx, "/reboot", struct{}{}, nil) }
func (c Client) PowerOff(ctx context.Context) error { return c.post(ctx, "/poweroff", struct{}{}, nil) }

// Reset destroys the key of the disk, and restarts the machine as a new one. name must be that of
// the machine.
func (c Client) Reset(ctx context.Context, name string) error {
	return c.post(ctx, "/reset", Named{name}, nil)
}

// Settings returns the settings in force as text, with those that the ESP offers.
func (c Client) Settings(ctx context.Context) (s SettingsDoc, err error) {
	return s, c.do(ctx, http.MethodGet, "/settings", nil, &s)
}

// SettingsDoc has the settings in force and those of the ESP, which count for nothing by
// themselves.
type SettingsDoc struct {
	Text    string `json:"text"`
	Offered string `json:"offered,omitempty"`
}

// Change puts settings in force.
func (c Client) Change(ctx context.Context, text string) error {
	return c.do(ctx, http.MethodPut, "/settings", strings.NewReader(text), nil)
}

// PIN gives the machine the PIN of the HSM's user, at the first boot. The caller wipes the PIN.
func (c Client) PIN(ctx context.Context, pin secret.Bytes) error {
	return c.do(ctx, http.MethodPut, "/pin", bytes.NewReader(pin.Expose()), nil)
}

// AwaitBackup is Reset, after which the machine makes no appliance, but waits for a backup.
func (c Client) AwaitBackup(ctx context.Context, name string) error {
	return c.post(ctx, "/await-backup", Named{name}, nil)
}

// Command runs a command of countersignd with the drive that is attached. lines are what a person
// types meanwhile. The end of ctx ends the command.
func (c Client) Command(ctx context.Context, line string, lines <-chan string, out io.Writer) error {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", cmp.Or(c.Path, Socket))
	if err != nil {
		return fmt.Errorf("the machine's agent: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	body, err := json.Marshal(Named{line})
	if err != nil {
		return err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://machine/command", bytes.NewReader(body))
	if err != nil {
		return err
	}
	if err := r.Write(conn); err != nil {
		return err
	}
	in := bufio.NewReader(conn)
	answer, err := http.ReadResponse(in, r)
	if err != nil {
		return fmt.Errorf("the machine's agent: %w", err)
	}
	if answer.StatusCode != http.StatusSwitchingProtocols {
		b, err := io.ReadAll(io.LimitReader(answer.Body, 1<<16))
		return errors.Join(err, refused(answer, b))
	}
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		for {
			select {
			case <-ended:
				return
			case line, open := <-lines:
				if !open {
					return
				}
				io.WriteString(conn, line+"\n")
			}
		}
	}()
	_, err = io.Copy(out, in)
	return err
}

// Link makes a link for the passkey of the first administrator.
func (c Client) Link(ctx context.Context, name string) (url string, err error) {
	var out Named
	err = c.post(ctx, "/link", Named{name}, &out)
	return out.Name, err
}

// Configuration returns the text of the appliance's configuration.
func (c Client) Configuration(ctx context.Context) (text string, err error) {
	var out Named
	err = c.do(ctx, http.MethodGet, "/configuration", nil, &out)
	return out.Name, err
}

// CheckConfiguration refuses a text that the appliance would not start with, or that changes what
// belongs to the machine.
func (c Client) CheckConfiguration(ctx context.Context, text string) error {
	return c.post(ctx, "/configuration/check", Named{text}, nil)
}

// Configure puts a configuration in force, and starts the daemon anew. When the daemon does not
// come up, the machine goes back to the configuration of before.
func (c Client) Configure(ctx context.Context, text string) error {
	return c.post(ctx, "/configuration", Named{text}, nil)
}

// SettleConfiguration says that the audit log has the end of a change to a configuration.
func (c Client) SettleConfiguration(ctx context.Context, sha256 string) error {
	return c.post(ctx, "/configuration/settle", Named{sha256}, nil)
}

// PutFile keeps a new file, and returns its whole name: name with a random end.
func (c Client) PutFile(ctx context.Context, name string, content []byte) (whole string, err error) {
	var out Named
	err = c.do(ctx, http.MethodPut, "/files?name="+url.QueryEscape(name), bytes.NewReader(content), &out)
	return out.Name, err
}

// RemoveFile removes a file that the configuration does not name. name is the whole name.
func (c Client) RemoveFile(ctx context.Context, name string) error {
	return c.post(ctx, "/files/remove", Named{name}, nil)
}
