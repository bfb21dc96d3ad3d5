package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
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
	Failures []string       `json:"failures" doc:"steps of the boot that have failed"`
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
			resp, err := c.send(ctx, http.MethodPut, path, part[:n], "Content-Type", "application/octet-stream")
			if err != nil {
				return m, err
			}
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil {
				return m, err
			}
			if resp.StatusCode/100 != 2 {
				return m, refusal(resp, b)
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
