// Package requestid makes the ids of requests. An id is in the answer to the request, in each event
// of the audit log that the request causes, and in each line of the daemon's log about the request.
// A peer's complaint with the id is therefore found by one search.
//
// The appliance makes the id when a message has been read, before one byte of its JSON is parsed:
// a message that is no request has an id too. A message that comes again, such as a repeated sign
// request, has an id of its own; its answer names the event of the first admission, and that event
// has the first id. The id is in no record of the ledger but the events, so nothing has to be
// removed after a crash: an admission without an outcome still has the id.
package requestid

import (
	"crypto/rand"
	"encoding/base32"
	"log/slog"
	"strconv"
)

// Size is the length of an id: 80 random bits. A counter would tell a peer how many requests the
// other peers make.
const Size = 16

var encoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// New returns a new id: 16 characters of a-z and 2-7.
func New() string {
	var b [Size * 5 / 8]byte
	rand.Read(b[:])
	return encoding.EncodeToString(b[:])
}

// Attr returns the id as an attribute of a line of the log. An empty id, of an act of the daemon
// itself, is no attribute.
func Attr(id string) slog.Attr {
	if id == "" {
		return slog.Attr{}
	}
	return slog.String("request", id)
}

// Item returns the id of an item of a batch: the id of the batch, a dot and the item's index, from
// 0 on.
func Item(batch string, index int) string { return batch + "." + strconv.Itoa(index) }
