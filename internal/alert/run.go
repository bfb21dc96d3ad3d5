package alert

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"countersign/internal/cause"
	"countersign/internal/ledger"
	"countersign/internal/manage"
)

// runKey is the record of the present run of the daemon, from the event Started to the event
// Stopped. A start that finds the record follows a run that was not stopped: the daemon has ended
// by itself, was killed, or has lost power.
const runKey = "run"

// endWithin bounds the time of Ended: a daemon that is of no use must not stay for a silent
// receiver.
const endWithin = 10 * time.Second

// run is a run of the daemon, as the ledger has it.
type run struct {
	Since  int64  `json:"since"`  // Unix milliseconds
	Change string `json:"change"` // of the alert about the run's end, see Alert.Change
}

// ended is the kind of an alert about the end of a run that nobody has ordered. The alert resolves
// by itself, because the next run is there.
var ended = &Kind{
	Code: "daemon-ended", Means: "the daemon has ended, and no operator has stopped it",
	Do:    "see the daemon's log and the kernel's; does the disk or the device fail, does somebody end processes?",
	level: Critical, atOnce: true,
}

// Begin writes the record of this run, in the transaction of the event Started. After a run that
// was not stopped, Run begins with an alert about the end of that run. Begin must be called before
// Run.
func (e *Engine) Begin(tx *ledger.Tx) error {
	e.interrupted = reading{}
	if b := tx.Get(ledger.Meta, runKey); b != nil {
		var last run
		if err := json.Unmarshal(b, &last); err != nil {
			return fmt.Errorf("%s: %w", runKey, err)
		}
		since := time.UnixMilli(last.Since).UTC().Format(time.RFC3339)
		e.interrupted = reading{wants: Critical, change: last.Change, text: "the run since " + since +
			" was not stopped: the daemon has ended by itself, was killed, or has lost power"}
	}
	e.run = run{Since: time.Now().UnixMilli(), Change: newName()}
	return tx.Put(ledger.Meta, runKey, manage.Encode(e.run))
}

// End removes the record of this run, in the transaction of the event Stopped.
func (e *Engine) End(tx *ledger.Tx) error { return tx.Delete(ledger.Meta, runKey) }

// Ended tells each receiver in one attempt, and at most 10 s (endWithin), that the daemon ends by
// itself. Run must have ended. The ledger may take no writes any more, so the message leaves
// without an event. The next start writes the event, and sends the message again with the same id:
// see Begin.
func (e *Engine) Ended(why error) {
	ctx, cancel := context.WithTimeout(context.Background(), endWithin)
	defer cancel()
	now := time.Now()
	all := e.sendAll(ctx, e.newMessage(e.run.Change, Firing, now, &Alert{
		Code: ended.Code, Level: ended.level, Since: now.UnixMilli(),
		Text: line(fmt.Sprintf("the daemon ends by itself: %v", why)),
	}, false))
	for _, each := range all {
		if each.Err != nil {
			e.log.Error("a receiver is not told that the daemon ends; the next start sends the alert",
				"to", each.Receiver, "err", cause.Line(each.Err.Error()))
		}
	}
}
