package api

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// The topics of the stream.
const (
	TopicState           = "state"           // a Health, at the begin and after each change
	TopicTick            = "tick"            // a Tick, each second
	TopicAlert           = "alert"           // an Event, as the following ones
	TopicRotation        = "rotation"        // of keys and their rotations
	TopicAcknowledgement = "acknowledgement" // of a rotation or a compromise, by a peer
	TopicProposal        = "proposal"
	TopicChange          = "change" // every other event that no request of a peer has caused
)

// Topics are the topics that a reader can ask for.
var Topics = []string{
	TopicState, TopicTick, TopicAlert, TopicRotation, TopicAcknowledgement, TopicProposal, TopicChange,
}

// The topics of each stream.
const (
	TopicGap = "gap" // a StreamGap
	TopicEnd = "end" // a StreamEnd, and then nothing
)

// Tick has the main figures of the history over the last second, by the names of the series. Null
// is an unknown value.
type Tick struct {
	TimeMS  int64               `json:"time_ms"`
	Figures map[string]*float32 `json:"figures"`
}

// StreamGap names events that the stream does not have: From <= number < Before.
type StreamGap struct {
	From   uint64 `json:"from"`
	Before uint64 `json:"before"`
	Why    string `json:"why"`
}

// The reasons of a StreamGap.
const (
	GapDropped = "dropped" // by retention
	GapAhead   = "ahead"   // the reader's last event has a number that the log has not reached
)

// StreamEnd says why the appliance has ended a stream.
type StreamEnd struct {
	Code string `json:"code"` // signed_out, unavailable or stopping
}

// EndStopping is the code of a StreamEnd: the daemon stops.
const EndStopping = "stopping"

// Streamed is an event of the stream.
type Streamed struct {
	ID    string          `json:"id,omitempty"` // of the last event of the log until now
	Topic string          `json:"topic"`
	Data  json.RawMessage `json:"data"`
}

// streamSilence is the time without a byte after which a connection counts as dead. The appliance
// writes at least each 15 seconds.
const streamSilence = 45 * time.Second

// maxStreamed is the largest size of a line of the stream, in bytes.
const maxStreamed = 1 << 20

// Stream calls visit for each event of some topics; none: all that the caller may have. after is
// the id of the last event that the caller has, or "" to begin now. Stream returns the id to go on
// from, at the end of the connection, of ctx, or with an error of visit. The error is nil for an
// end without a reason.
func (c *Client) Stream(
	ctx context.Context, topics []string, after string, visit func(Streamed) error,
) (last string, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	path := "/v1/stream"
	if len(topics) > 0 {
		path += "?topics=" + url.QueryEscape(strings.Join(topics, ","))
	}
	var header []string
	if after != "" {
		header = []string{"Last-Event-ID", after}
	}
	resp, err := c.send(ctx, http.MethodGet, path, nil, header...)
	if err != nil {
		return after, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b, err := io.ReadAll(io.LimitReader(resp.Body, maxStreamed))
		if err != nil {
			return after, err
		}
		return after, refusal(resp, b)
	}
	silent := time.AfterFunc(streamSilence, cancel)
	defer silent.Stop()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxStreamed)
	last = after
	e := Streamed{ID: after}
	for lines.Scan() {
		silent.Reset(streamSilence)
		name, value, _ := strings.Cut(lines.Text(), ":")
		value = strings.TrimPrefix(value, " ")
		switch {
		case lines.Text() == "": // the end of an event
			last = e.ID
			if len(e.Data) > 0 {
				if !json.Valid(e.Data) {
					return last, fmt.Errorf("the appliance has sent an event that is no JSON: %.80q", e.Data)
				}
				if err := visit(e); err != nil {
					return last, err
				}
			}
			e = Streamed{ID: last}
		case name == "id":
			e.ID = value
		case name == "event":
			e.Topic = value
		case name == "data":
			e.Data = append(e.Data, value...)
		}
	}
	return last, lines.Err()
}
