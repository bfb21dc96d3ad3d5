package appliance

import (
	"encoding/json"
	"testing"

	"countersign/internal/ledger"
)

// TestStopCounts: a start after a stop reads few events to know how often keys were used.
func TestStopCounts(t *testing.T) {
	e := newEdge(t, nil)
	s := e.session("127.0.0.1", e.shop)
	if a, _ := asks(t, s, encoded(numbered(1, "m"))); a.Error != nil {
		t.Fatalf("%+v", a)
	}
	e.close()
	e.open()
	var written struct {
		Next uint64 `json:"next"` // the first event that is not counted
	}
	value, err := e.ledger.Get(ledger.Meta, "key-uses")
	if err != nil || json.Unmarshal(value, &written) != nil {
		t.Fatalf("the record of the uses is %q, %v", value, err)
	}
	_, first, tree := e.ledger.Head()
	uses := e.Keys.Version("payments", 1).Uses()
	if unread := first + tree.Size - written.Next; unread > 2 || uses != 1 {
		t.Errorf("%d events were read, %d uses", unread, uses)
	}
}
