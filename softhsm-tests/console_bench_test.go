package softhsmtests

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"testing"

	"countersign/approval"
	"countersign/audit"
	"countersign/internal/ledger"

	"github.com/chromedp/chromedp"
)

// BenchmarkConsole opens each page of the console of an appliance with 1,000,000 events and 1,000
// peers, by a link of the console, and measures in the browser how long the page takes until it
// shows what it is about.
func BenchmarkConsole(b *testing.B) {
	const events, peers = 1_000_000, 1_000
	s, origin, p := consoleSystem(b)
	p.stop()
	s.edit("countersign.toml", `"debug"`, `"warn"`)
	l, err := ledger.Open(s.path("ledger.db"), ledger.Options{}) // without a replica: a million events
	if err != nil {
		b.Fatal(err)
	}
	for i := 0; i < events; {
		if err := l.Update(b.Context(), func(tx *ledger.Tx) error {
			for end := i + 2000; i < end; i++ {
				d := audit.Document{
					Transcript: "message-v1", Digest: sumOf(-i), Nonce: sumOf(i), ExpiresAt: 1_800_000_000,
				}
				e := audit.NewAdmission(audit.Peer(fmt.Sprintf("peer%d", i%200), [32]byte{byte(i)}), "payments/1", d)
				if err := tx.Append(ledger.EventOf(e)); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			b.Fatal(err)
		}
	}
	l.Close()
	p = s.serve()
	for i := range peers - 1 {
		key := sumOf(i)
		key[31] &= 0x7f
		s.proposeAndApprove("peer add", "", approval.Parameter{Name: "name", Value: fmt.Sprintf("shop-%03d", i)},
			approval.Parameter{Name: "public_key", Value: hex.EncodeToString(key[:])})
	}
	c := newConsole(b, origin, s.serverCertificate(origin))
	c.person(s, "ann", "administrator,operator,auditor,approver")
	c.goTo("/")
	c.signIn("ann")
	c.sees("All is well")
	b.ResetTimer()
	for _, each := range []struct{ name, path, shows string }{
		{"overview", "/", "Last checkpoint"}, {"alerts", "/alerts", "All kinds"}, {"figures", "/figures", "By peer"},
		{"keys", "/keys", "payments"}, {"key", "/keys/payments", "Rules of the line"},
		{"peers", "/peers", "Show more"}, {"peers, searched", "/peers?find=shop-77", "shop-779"},
		{"peer", "/peers/shop-500", "COUNTERSIGN_SERVER_KEY"}, {"policy", "/policy", "in force"},
		{"approvals", "/approvals", "Show more"}, {"operators", "/operators", "Sessions"},
		{"audit", "/audit", "Show more"}, {"audit of a peer", "/audit?actor=peer7", "Show more"},
		{"audit of a request", "/audit?nonce=" + hexOf(sumOf(333_333)), "payments/1"},
		{"event, proven", "/audit/700000", "Proven"}, {"retention", "/retention", "Legal holds"},
		{"receipts", "/receipts", "No receipt fits"},
	} {
		took := make([]float64, 9)
		for i := range took {
			c.visit("/nowhere")
			script := fmt.Sprintf(`hands.timed(%s, %s)`, quoted(each.path), quoted(each.shows))
			timed := chromedp.Evaluate[float64](script, chromedp.EvalAwaitPromise)
			if took[i], err = chromedp.Run(c.ctx, timed); err != nil {
				b.Fatalf("%s: %v", each.name, err)
			}
		}
		fmt.Fprintf(os.Stdout, "console events=%d peers=%d page=%q first %.0f ms, median %.0f ms\n",
			events, peers, each.name, took[0], median(took))
	}
	c.close()
	p.stop()
}

func sumOf(i int) [32]byte { return sha256.Sum256(fmt.Append(nil, i)) }

func hexOf(b [32]byte) string { return hex.EncodeToString(b[:]) }
