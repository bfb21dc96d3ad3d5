package softhsmtests

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"countersign/client"
	"countersign/tpm/tpmtest"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
)

// TestConsoleOutage: the key workers are killed while the token refuses their PIN. The overview and
// the line on top of another page say what is wrong and what to do, and stop when it is over,
// without a reload. When the daemon itself is away, every tab says so until it is back.
func TestConsoleOutage(t *testing.T) {
	s, origin, p := consoleSystem(t)
	c := newConsole(t, origin, s.serverCertificate(origin))
	c.person(s, "ann", "administrator,operator,auditor,approver")
	c.goTo("/")
	c.signIn("ann")
	other := c.another()
	other.goTo("/keys")
	for _, each := range []*tab{c, other} {
		each.sees("All is well")
		mustRun[any](each.browser, `(self.notReloaded = true)`)
	}
	pin, err := os.ReadFile(s.path("pin"))
	if err != nil {
		t.Fatal(err)
	}
	s.write("pin", "another-pin")
	tokens, err := s.admin().Tokens(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range tokens[0].Workers {
		if err := syscall.Kill(w.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	c.sees("token-pin-refused")
	c.sees("What to do: ")
	c.until(`document.querySelector("[aria-label=Tokens] td:nth-child(2)").innerText.includes("down")`)
	other.sees("The keys of the token main can’t be used: ")
	c.shot("outage")
	c.checkPage("an outage")

	// The code leads to the paragraph of OPERATIONS.
	c.press("token-pin-refused")
	c.sees("tries are counted by many")
	c.sees("countersign admin token retry NAME")
	c.checkPage("an alert")
	c.press("Overview")

	s.write("pin", string(pin))
	for _, each := range []*tab{c, other} {
		each.until(`!hands.text().includes("The keys of the token main can’t be used: ")`)
		if !mustRun[bool](each.browser, `self.notReloaded === true`) {
			t.Error("the page was loaded again")
		}
	}
	c.until(`document.querySelector("[aria-label=Tokens] td:nth-child(2)").innerText.includes("serves")`)

	const notLive = "Not live: trying to connect again."
	p.stop()
	for _, each := range []*tab{c, other} {
		each.sees(notLive)
	}
	p = s.serve()
	for _, each := range []*tab{c, other} {
		each.until(`!hands.text().includes(` + quoted(notLive) + `)`)
		each.sees("All is well")
	}
	c.close()
	p.stop()
}

// TestConsoleMeasured: the overview compares the registers of a TPM with the state that keys are
// sealed to, and shows the one that has changed.
func TestConsoleMeasured(t *testing.T) {
	e := tpmtest.New(t)
	s := newTPMSystem(t, e, "")
	origin := s.configureHTTPS()
	p := s.serve()
	s.enrol()
	c := newConsole(t, origin, s.serverCertificate(origin))
	c.person(s, "ann", "administrator,operator,auditor,approver")
	c.goTo("/")
	c.signIn("ann")
	c.sees("PCR 7 (the Secure Boot state and its certificates), bank sha256: as sealed")
	c.sees("PCR 11 (the unified kernel image and the phase of the boot), bank sha256: as sealed")
	c.sees("sealed to this machine's TPM")
	e.Extend(t, 11)
	c.visit("/keys")
	c.visit("/")
	c.sees("PCR 11 (the unified kernel image and the phase of the boot), bank sha256: another value than sealed")
	c.sees("PCR 7 (the Secure Boot state and its certificates), bank sha256: as sealed")
	c.sees("This machine is in another state than its keys are sealed to")
	c.shot("measured")
	c.checkPage("measured")
	for _, pid := range p.workers() { // the next ones can't open the seals
		syscall.Kill(pid, syscall.SIGKILL)
	}
	eventually(t, "the seal does not open", func() bool {
		if c, err := client.Dial(t.Context(), s.clientConfig()); err == nil { // a handshake uses a seal
			c.Close()
		}
		return s.hasCause("token-sealed")
	})
	c.sees("token-sealed")
	c.visit("/keys")
	c.visit("/")
	c.sees("PCR 11 (the unified kernel image and the phase of the boot), bank sha256: another value than sealed")
	if out := s.must("admin", "token", "show", "main"); !strings.Contains(out, "NOT GOOD: PCR 11") {
		t.Errorf("token show: %s", out)
	}
	c.close()
	p.stop()
}

// TestConsoleLock: a lock reaches every open tab at once, whatever page it is at, and so does its
// end.
func TestConsoleLock(t *testing.T) {
	s, origin, p := consoleSystem(t)
	c := newConsole(t, origin, s.serverCertificate(origin))
	c.person(s, "ann", "administrator,operator,auditor,approver")
	c.goTo("/")
	c.signIn("ann")
	tabs := []*tab{c}
	for _, path := range []string{"/keys", "/audit", "/policy/edit"} {
		each := c.another()
		each.goTo(path)
		each.sees("All is well")
		tabs = append(tabs, each)
	}
	c.press("Lock…")
	c.sees("Nothing is signed or verified for any peer")
	c.fill("Reason", "a drill")
	c.press("Lock")
	for _, each := range tabs {
		each.sees("Locked: nothing is signed")
	}
	c.shot("locked")
	c.checkPage("locked")
	c.press("Unlock")
	for _, each := range tabs {
		each.until(`!hands.text().includes("Locked: nothing is signed")`)
	}
	c.close()
	p.stop()
}

// stops returns how many elements Tab reaches before it leaves the page, and those of them that
// show no sign of the focus or are out of sight.
func (c *tab) stops(most int) (n int, faults []string) {
	c.t.Helper()
	mustRun[any](c.browser, `(document.querySelector(".skip").focus(), true)`) // the first one
	seen, before := map[string]bool{}, ""
	for range most {
		at := mustRun[string](c.browser, `hands.focus()`)
		fault := mustRun[string](c.browser, `hands.focusFault()`)
		c.key("Tab")
		if at == before { // the next part of a field for a time
			continue
		}
		if at == "" || seen[at] {
			return len(seen), faults
		}
		seen[at], before = true, at
		if fault != "" {
			faults = append(faults, at+": "+fault)
		}
	}
	return len(seen), append(faults, fmt.Sprintf("Tab does not leave the page in %d steps", most))
}

// TestConsoleKeyboard uses the console by the keyboard alone, with reduced motion: signs in,
// searches, opens and closes a dialog, and walks over every page. Each stop of Tab is in sight and
// shows the focus; all that can be used is reached; nothing moves.
func TestConsoleKeyboard(t *testing.T) {
	s, origin, p := consoleSystem(t)
	s.seed()
	c := newConsole(t, origin, s.serverCertificate(origin))
	c.person(s, "ann", "administrator,operator,auditor,approver")
	if _, err := chromedp.Call(c.ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
		Features: []*emulation.MediaFeature{{Name: "prefers-reduced-motion", Value: "reduce"}},
	}); err != nil {
		t.Fatal(err)
	}
	c.goTo("/")
	c.until(`document.activeElement.tagName === "INPUT"`) // the name of the operator, at once
	c.write("ann")
	c.key("Enter")
	c.sees("Last checkpoint")

	c.key("/")
	c.until(`document.activeElement.closest("dialog")`)
	c.write("payments")
	c.until(`hands.text().includes("/keys/payments") || hands.find("a, button, [role=option]", "payments")`)
	c.key("Enter")
	c.until(`location.pathname === "/keys/payments" && hands.text().includes("Line of succession")`)
	if at := mustRun[string](c.browser, `document.activeElement.tagName`); at != "H1" {
		t.Errorf("after a change of the page, the focus is at %s", at)
	}
	c.until(`hands.pressable("Rotate")`)
	for range 12 {
		c.key("Tab")
		if mustRun[bool](c.browser, `hands.name(document.activeElement).startsWith("Rotate")`) {
			break
		}
	}
	c.key("Enter")
	c.until(`document.querySelector("dialog[open]").contains(document.activeElement)`)
	c.key("Escape")
	c.until(`!document.querySelector("dialog[open]")`)
	c.until(`hands.name(document.activeElement).startsWith("Rotate")`) // the focus is where it was

	for _, each := range tour {
		c.visit(each.path)
		c.sees(each.shows)
		c.until(`!document.querySelector(".waiting")`)
		for _, moving := range mustRun[[]string](c.browser, `hands.moving()`) {
			t.Errorf("%s: %s moves", each.name, moving)
		}
		want := mustRun[int](c.browser, `hands.focusable()`)
		n, faults := c.stops(2*want + 100)
		if n < want {
			t.Errorf("%s: Tab reaches %d of %d", each.name, n, want)
		}
		for _, fault := range faults {
			t.Errorf("%s: %s", each.name, fault)
		}
	}
	c.close()
	p.stop()
}

// TestConsoleKeyLife clicks what can be done with a key: rules with presence, the confirmation by
// passkey, a compromise, an archive and a destruction. Each act that destroys says what is lost and
// takes the name.
func TestConsoleKeyLife(t *testing.T) {
	s, origin, p := consoleSystem(t)
	c := newConsole(t, origin, s.serverCertificate(origin))
	c.person(s, "ann", "administrator,operator,auditor,approver")
	cl := s.dial()
	if _, err := cl.Sign(t.Context(), "payments", message("AAAA")); err != nil {
		t.Fatal(err)
	}
	c.goTo("/keys/payments")
	c.signIn("ann")
	c.press("Schedule")
	c.fill("Presence", "an hour")
	c.sees("Not a time: presence")
	c.fill("Presence", "1 h 30 min")
	c.press("Set")
	c.sees("nobody has confirmed")
	if _, err := cl.Sign(t.Context(), "payments", message("BBBB")); err == nil {
		t.Error("the key signs without a confirmation")
	}
	c.press("Confirm with passkey")
	c.sees("It may sign until")
	if _, err := cl.Sign(t.Context(), "payments", message("BBBB")); err != nil {
		t.Errorf("after the confirmation: %v", err)
	}

	// A compromise rotates the line at once. Without the name, nothing is proposed.
	c.press("Mark compromised")
	c.sees("Version 1 has made 2 signatures")
	if mustRun[bool](c.browser, `!!hands.pressable("Propose")`) {
		t.Error("the act can be proposed without the key's name")
	}
	c.fill("Reason", "a drill")
	c.fill("Type payments to go on", "payment")
	if mustRun[bool](c.browser, `!!hands.pressable("Propose")`) {
		t.Error("the act can be proposed with another name")
	}
	c.shot("compromise")
	c.checkPage("a compromise")
	act := func(button string) {
		t.Helper()
		c.fill("Type payments to go on", "payments")
		c.press(button)
		c.sees("What is signed")
		c.press("Sign with passkey")
		c.sees("was carried out")
		c.press("Close")
		c.until(`!document.querySelector("dialog[open]")`)
	}
	act("Propose")
	c.sees("Version 1 is compromised.")
	if signed, err := cl.Sign(t.Context(), "payments", message("CCCC")); err != nil || signed.Version != 2 {
		t.Errorf("after the compromise: %+v, %v", signed, err)
	}

	// The compromised version is destroyed in the device.
	c.press("Destroy")
	act("Propose")
	c.until(`document.body.innerText.includes("no longer exists in the device")`)
	out := s.must("admin", "key", "list")
	if !strings.Contains(out, "destroyed") {
		t.Errorf("key list: %s", out)
	}
	c.close()
	p.stop()
}

// TestConsoleActs clicks the acts of the other pages to their end: of peers, operators, retention,
// alerts, receipts and the audit log.
func TestConsoleActs(t *testing.T) {
	s, origin, p := consoleSystem(t)
	s.seed()
	c := newConsole(t, origin, s.serverCertificate(origin))
	c.person(s, "ann", "administrator,operator,auditor,approver")
	c.goTo("/")
	c.signIn("ann")
	c.person(s, "bob", "operator") // whose passkey would do for the sign-in, too
	c.goTo("/peers/kiosk-12")
	sign := func() {
		t.Helper()
		c.sees("What is signed")
		c.press("Sign with passkey")
		c.sees("was carried out")
		c.press("Close")
		c.until(`!document.querySelector("dialog[open]")`)
	}
	confirm := func(name, button string) {
		t.Helper()
		c.fill("Type "+name+" to go on", name)
		c.press(button)
		c.until(`!document.querySelector("dialog[open]")`)
	}

	// A peer: another key, without the first one, suspended, resumed, removed. The key comes from a
	// file that is dropped, and never from an identity file.
	c.press("Add a key")
	drop := func(file string) {
		t.Helper()
		mustRun[any](c.browser, `(f => {
			const d = new DataTransfer();
			d.items.add(new File([f], "key"));
			return hands.field("Public key").dispatchEvent(new DragEvent("drop", {bubbles: true, dataTransfer: d}));
		})(%v)`, file)
	}
	key := func(public string) { c.until(`hands.field("Public key").value === ` + quoted(public)) }
	another := strings.Repeat("ab", 31) + "0a"
	drop(another + "\n")
	key(another)
	drop("rubbish")
	c.sees("What you dropped has no public key")
	key("")
	public := strings.TrimSpace(s.must("keygen", s.path("kiosk.key")))
	identity, err := os.ReadFile(s.path("kiosk.key"))
	if err != nil {
		t.Fatal(err)
	}
	drop(string(identity))
	key(public)
	c.press("Propose")
	sign()
	c.until(`document.querySelectorAll("[aria-label='Keys of the peer'] tbody tr").length === 2`)
	c.press("Remove…")
	c.until(`document.querySelector("dialog[open]")`)
	c.key("Escape")
	mustRun[any](c.browser, `(document.querySelector(
		"[aria-label='Keys of the peer'] tbody tr button.danger").click(), true)`)
	confirm("kiosk-12", "Remove the key")
	c.until(`document.querySelectorAll("[aria-label='Keys of the peer'] tbody tr").length === 1`)
	c.press("Suspend")
	confirm("kiosk-12", "Suspend")
	c.sees("suspended")
	c.press("Resume")
	confirm("kiosk-12", "Resume")
	c.sees("not connected")
	c.press("Remove…")
	confirm("kiosk-12", "Remove the peer")
	c.until(`location.pathname === "/peers"`)
	c.until(`!hands.text().includes("kiosk-12")`)
	c.fill("Name contains", "oslo")
	c.until(`location.search === "?find=oslo" && document.querySelectorAll("[aria-label=Peers] tbody tr").length === 1`)

	// Operators.
	c.visit("/operators")
	c.until(`[...document.querySelectorAll("[aria-label=Operators] tbody tr")].length === 3`)
	row := func(button string) {
		t.Helper()
		const script = `(e => e && (e.click(), true))(
			[...document.querySelectorAll("[aria-label=Operators] tbody tr")]
				.find(r => r.innerText.includes("bob"))?.querySelector(%v))`
		if !mustRun[bool](c.browser, script, button) {
			t.Fatalf("no %s for bob", button)
		}
	}
	row("button:not(.danger):not(.copy)")
	c.sees("Roles of bob")
	c.fill("auditor", true)
	c.press("Propose")
	sign()
	c.sees("operator, auditor")
	row("button.danger")
	c.fill("Type bob to go on", "bob")
	c.press("Propose")
	sign()
	c.until(`[...document.querySelectorAll("[aria-label=Operators] tbody tr")].length === 2`)
	c.press("Hardware keys only")
	c.sees("From then on only passkeys count")
	c.press("Cancel")

	// Retention: a hold and its release.
	s.must("admin", "audit", "end-epoch")
	c.visit("/retention")
	c.press("Hold")
	c.fill("Name", "case-4711")
	c.fill("Reason", "a court has asked")
	c.press("Hold")
	c.sees("case-4711")
	c.press("Release")
	c.fill("Reason", "the case is closed")
	c.fill("Type case-4711 to go on", "case-4711")
	c.press("Propose")
	sign()
	c.until(`!hands.text().includes("a court has asked")`)

	// Alerts: replays fire in the seeded appliance.
	c.visit("/alerts")
	c.press("Take note")
	c.fill("Reason", "asked the shop")
	c.press("Take note")
	c.sees("asked the shop")
	c.press("Send a test message")
	c.sees("There is no receiver")
	c.press("Close")

	// The audit log: a search has an address, and all of it becomes a file.
	c.visit("/audit")
	c.fill("Actor", "shop-oslo")
	mustRun[any](c.browser, `(hands.field("Actor").form.requestSubmit(), true)`)
	c.until(`location.search === "?actor=shop-oslo"`)
	c.until(`[...document.querySelectorAll("[aria-label=Events] tbody tr")].
		every(r => r.innerText.includes("shop-oslo"))`)
	mustRun[any](c.browser, `(self.saved = [],
		URL.createObjectURL = b => (b.text().then(t => saved.push(t)), "data:,"), true)`)
	c.press("Save all events of this search")
	c.sees("saved as events-")
	c.until(`saved.length === 1`)
	lines := strings.Split(strings.TrimSpace(mustRun[string](c.browser, `saved[0]`)), "\n")
	want := 0
	for _, e := range s.events() {
		if e.Actor.Name == "shop-oslo" {
			want++
		}
	}
	if len(lines) != want || want == 0 {
		t.Errorf("%d events were saved, and the log has %d", len(lines), want)
	}

	// A receipt by the id that a row copies, and figures of 90 days as a table.
	c.visit("/receipts")
	c.until(`document.querySelector("[aria-label=Receipts] tbody tr")`)
	id := mustRun[string](c.browser, `(self.copied = "", navigator.clipboard.writeText = async t => { copied = t },
		document.querySelector("[aria-label=Receipts] tbody button.copy").click(), copied)`)
	if !regexp.MustCompile(`^[0-9a-f]{32}$`).MatchString(id) {
		t.Errorf("a copied id of a receipt: %q", id)
	}
	c.fill("Receipt id", id)
	mustRun[any](c.browser, `(hands.field("Receipt id").form.requestSubmit(), true)`)
	c.until(`document.querySelectorAll("[aria-label=Receipts] tbody tr").length === 1`)
	when := mustRun[string](c.browser, `document.querySelector("[aria-label=Receipts] tbody time").title`)
	if !strings.Contains(when, "UTC") {
		t.Errorf("the time of a receipt has the title %q", when)
	}
	c.visit("/figures?span=90d")
	c.press("As a table")
	c.until(`document.querySelector("details[open] table tbody tr")`)

	c.visit("/operators")
	c.press("Approvals needed")
	c.fill("Approvers that must sign", "2")
	c.press("Propose")
	sign()
	c.sees("only if nobody is missing")
	mustRun[any](c.browser, `([...document.querySelectorAll("[aria-label=Sessions] tbody tr")]
		.find(r => r.innerText.includes("this one")).querySelector("button").click(), true)`)
	c.sees("You have signed out, in all tabs")
	for _, each := range mustRun[[]string](c.browser, `[...self.violations, ...self.failures]`) {
		t.Error(each)
	}
	c.close()
	p.stop()
}
