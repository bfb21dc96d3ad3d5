package main

import (
	"testing"

	"countersign/internal/form"
	"countersign/internal/journal"
)

// TestAlertsAreCounted sees that a webhook about an alert is counted, and that other webhooks need
// their counterpart in the audit log.
func TestAlertsAreCounted(t *testing.T) {
	r := reconciler{result: reconciled{Kinds: map[string]int{}}}
	for _, detail := range []string{"alert_abc", "rotation_abc_key_1"} {
		r.add(&line{Entry: journal.Entry{Kind: form.Webhook, Detail: detail}})
	}
	if len(r.lines) != 1 || r.lines[0].Detail != "rotation_abc_key_1" || r.result.Kinds[form.Webhook] != 2 {
		t.Errorf("%d lines are compared, of %v", len(r.lines), r.result.Kinds)
	}
}
