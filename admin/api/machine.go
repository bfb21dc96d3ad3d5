package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
)

// Machine is the machine around an appliance.
type Machine struct {
	Image    bool           `json:"image" doc:"false: the appliance is a program on a host, and the rest is empty"`
	Version  string         `json:"version" doc:"of the image that runs"`
	Variant  string         `json:"variant" doc:"vm or rack"`
	Rollback uint64         `json:"rollback_version"`
	Test     bool           `json:"test" doc:"the image was made with test keys, and protects nothing"`
	Try      bool           `json:"try" doc:"the disk is not protected"`
	Slots    []MachineSlot  `json:"slots" doc:"the images on the machine's disk"`
	Update   *MachineUpdate `json:"update,omitempty" doc:"the update that is under way"`
	Uploaded *Manifest      `json:"uploaded,omitempty" doc:"the update that can be proposed"`
	// Configuration is nil while no change is under way.
	Configuration *MachineConfiguration `json:"configuration,omitempty" doc:"the change that is under way"`
	Files         []MachineFile         `json:"files" doc:"files that a configuration can name"`

	Failures []string `json:"failures" doc:"steps of the boot that have failed"`
}

// MachineSlot is an image on the machine's disk.
type MachineSlot struct {
	Version string `json:"version"`
	Running bool   `json:"running"`
	Proven  bool   `json:"proven"`
	Left    int    `json:"tries_left" doc:"of an image that is not proven"`
}

// MachineUpdate is an update that is under way.
type MachineUpdate struct {
	From  string `json:"from" doc:"version"`
	To    string `json:"to" doc:"version"`
	Phase string `json:"phase" doc:"installed, proven or failed"`
	Why   string `json:"why,omitempty" doc:"of a failure"`
}

// MachineConfiguration is a change of the configuration that is under way.
type MachineConfiguration struct {
	SHA256 string `json:"sha256" doc:"of the new text"`
	Phase  string `json:"phase" doc:"installed, or failed: the one of before is in force"`
	Why    string `json:"why,omitempty" doc:"of a failure"`
}

// MachineFile is a file that an operator has given, such as a password.
type MachineFile struct {
	Name string `json:"name"`
	Path string `json:"path" doc:"for the configuration"`
	Size int64  `json:"size" doc:"in bytes"`
	Used bool   `json:"used" doc:"the configuration names the file"`
}

// Configuration is the configuration of an appliance that was booted from the image.
type Configuration struct {
	Text   string `json:"text"`
	SHA256 string `json:"sha256" doc:"of the text; empty: the appliance is a program on a host"`
}

// Manifest is the manifest of an update.
type Manifest struct {
	Version  string `json:"version"`
	Variant  string `json:"variant"`
	Rollback uint64 `json:"rollback_version"`
	Size     int64  `json:"size" doc:"of the image, in bytes"`
	SHA256   string `json:"sha256" doc:"of the manifest's text: what operators approve"`
	Text     string `json:"text" doc:"of the manifest"`
}

// Machine returns the state of the machine.
func (c *Client) Machine(ctx context.Context) (m Machine, err error) {
	return m, c.do(ctx, http.MethodGet, "/v1/machine", nil, &m)
}

// partSize is the length of a part of an upload, in bytes.
const partSize = 256 << 10

// UploadUpdate gives the file of an update to the machine, which verifies the signatures of those
// who release. report gets the number of bytes that were sent.
func (c *Client) UploadUpdate(ctx context.Context, file io.Reader, report func(sent int64)) (m Manifest, err error) {
	part := make([]byte, partSize)
	for offset := int64(0); ; {
		n, err := io.ReadFull(file, part)
		if n > 0 {
			path := fmt.Sprintf("/v1/machine/update?offset=%d", offset)
			if err := c.put(ctx, path, part[:n], nil); err != nil {
				return m, err
			}
			offset += int64(n)
			report(offset)
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			break
		} else if err != nil {
			return m, err
		}
	}
	return m, c.do(ctx, http.MethodPost, "/v1/machine/update", nil, &m)
}

// RestartMachine restarts the machine.
func (c *Client) RestartMachine(ctx context.Context) error {
	return c.do(ctx, http.MethodPost, "/v1/machine/restart", nil, nil)
}

// Configuration returns the configuration in force.
func (c *Client) Configuration(ctx context.Context) (d Configuration, err error) {
	return d, c.do(ctx, http.MethodGet, "/v1/machine/configuration", nil, &d)
}

// PutMachineFile keeps a new file for the configuration to name. The appliance adds a random end to
// the name.
func (c *Client) PutMachineFile(ctx context.Context, name string, content []byte) (f MachineFile, err error) {
	return f, c.put(ctx, "/v1/machine/files/"+url.PathEscape(name), content, &f)
}

// put sends bytes that are no document. out is nil for an empty answer.
func (c *Client) put(ctx context.Context, path string, content []byte, out any) error {
	resp, err := c.send(ctx, http.MethodPut, path, content, "Content-Type", "application/octet-stream")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	switch {
	case err != nil:
		return err
	case resp.StatusCode/100 != 2:
		return refusal(resp, b)
	case out == nil:
		return nil
	}
	return json.Unmarshal(b, out)
}

// RemoveMachineFile removes a file that the configuration does not name.
func (c *Client) RemoveMachineFile(ctx context.Context, name string) error {
	return c.do(ctx, http.MethodDelete, "/v1/machine/files/"+url.PathEscape(name), nil, nil)
}
