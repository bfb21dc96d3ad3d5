package agent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
	"unicode"

	"countersign/internal/cli"
	"countersign/internal/machine"
	"countersign/internal/secret"

	"github.com/tyler-smith/go-bip39"
	"golang.org/x/sys/unix"
)

// Console is one screen or serial line of the machine: the state of the machine and of the
// appliance, and a menu in lines, which any terminal can show. There is nothing to log in to: a
// reader knows the screen, and a person at the keys can choose from the menu.
type Console struct {
	In  io.Reader
	Out io.Writer
	machine.Client

	lines chan string
	shown string
}

// refresh is the time between two looks at the state.
const refresh = 5 * time.Second

// Words are 32 bytes, such as a key or a SHA-256, as the 24 words of BIP-39 in English: for people
// who compare. The last word has 8 bits of a checksum.
func Words(value string) (string, error) {
	b, err := hex.DecodeString(value)
	if err != nil || len(b) != 32 {
		return "", errors.New("these are not 32 bytes in hex")
	}
	return bip39.NewMnemonic(b)
}

// Run shows the console until ctx ends or nobody can type any more.
func (c *Console) Run(ctx context.Context) error {
	c.lines = make(chan string)
	go func() {
		defer close(c.lines)
		in := bufio.NewReaderSize(io.LimitReader(c.In, 1<<40), 4096)
		for {
			line, err := in.ReadSlice('\n')
			if err == bufio.ErrBufferFull {
				continue // longer than any answer
			} else if err != nil {
				return
			}
			select {
			case c.lines <- strings.TrimSpace(string(line)):
			case <-ctx.Done():
				return
			}
		}
	}()
	for {
		c.show(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(refresh):
		case line, open := <-c.lines:
			if !open {
				return nil
			}
			c.choose(ctx, line)
			c.shown = ""
		}
	}
}

// say prints lines. A serial line wants a carriage return, which the terminal's driver adds.
func (c *Console) say(format string, args ...any) { fmt.Fprintf(c.Out, format+"\n", args...) }

// plain takes control characters out of a text.
func plain(text string) string {
	text = strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' {
			return ' '
		}
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, text)
	return text[:min(len(text), 600)]
}

// wrapped prints a text in lines of at most 78 columns, behind a name.
func wrapped(b *strings.Builder, name, text string) {
	line := fmt.Sprintf("%-12s", name)
	for word := range strings.FieldsSeq(plain(text)) {
		if len(line)+1+len(word) > 78 {
			b.WriteString(line + "\n")
			line = strings.Repeat(" ", 12)
		}
		line += " " + word
	}
	b.WriteString(line + "\n")
}

// show shows the state, if it is another one than the last time.
func (c *Console) show(ctx context.Context) {
	var b strings.Builder
	s, err := c.Status(ctx)
	if ctx.Err() != nil {
		return
	} else if err != nil {
		wrapped(&b, "machine", "starts: "+err.Error())
	} else {
		c.describe(&b, s)
	}
	b.WriteString("\n  n network   t time   l link of the first administrator\n" +
		"  e settings of the ESP   h PIN of an HSM   c commands with a drive\n" +
		"  b restore a backup   r reboot   p power off   f factory reset\n" +
		"(a letter, then Enter)\n")
	if text := b.String(); text != c.shown {
		c.shown = text
		fmt.Fprintf(c.Out, "\n%s\n%s> ", strings.Repeat("=", 78), text)
	}
}

// describe writes the state for people.
func (c *Console) describe(b *strings.Builder, s machine.Status) {
	wrapped(b, "Countersign", fmt.Sprintf("%s, image %s, rollback version %d", s.Image.Version, s.Image.Variant,
		s.Image.Rollback))
	if s.Image.Test {
		wrapped(b, "TEST KEYS", "the keys of this image are test keys, which everybody may have: it protects nothing")
	}
	if s.Try {
		wrapped(b, "TRY", "the disk of this machine is not protected, and Secure Boot may be off: for tries only")
	}
	for _, step := range slices.Sorted(maps.Keys(s.Failures)) {
		wrapped(b, "FAILED", step+": "+s.Failures[step])
	}
	if p := s.Pending; p != nil {
		text := fmt.Sprintf("%s to %s: %s", p.From, p.Manifest.Version, p.Phase)
		if p.Why != "" {
			text += ": " + p.Why
		}
		wrapped(b, "update", text)
	}
	if len(s.Addrs) == 0 {
		wrapped(b, "network", "no address")
	} else {
		wrapped(b, "network", strings.Join(s.Addrs, " "))
	}
	if s.Changed {
		wrapped(b, "settings", "countersign.toml on the ESP has other settings than those in force, and counts for "+
			"nothing: e shows it")
	}
	r := s.Report
	if s.Waiting {
		wrapped(b, "WAITING", "this machine has no appliance, and waits for a backup: c runs countersignd restore; f "+
			"makes a new appliance after all")
		return
	}
	if r == nil {
		wrapped(b, "appliance", "not up yet")
		return
	}
	state := r.State
	if age := time.Since(time.Unix(r.At, 0)); age > time.Minute {
		state = fmt.Sprintf("has said nothing for %s; before: %s", cli.FormatDuration(age.Truncate(time.Minute)), state)
	}
	wrapped(b, "appliance", r.Appliance+": "+state)
	for i, each := range r.Causes {
		if i == 3 {
			wrapped(b, "", fmt.Sprintf("and %s more", cli.Count(uint64(len(r.Causes)-i), "cause")))
			break
		}
		wrapped(b, "", each)
	}
	if !r.Enrolled {
		wrapped(b, "operators", "none yet: l makes the link for the first administrator")
	}
	for _, k := range []struct{ name, value string }{{"Noise key", r.Noise}, {"HTTPS CA", r.CA}} {
		if k.value == "" {
			continue
		}
		wrapped(b, k.name, k.value)
		if words, err := Words(k.value); err == nil {
			wrapped(b, "", words)
		}
	}
}

// answerTime is the time for an answer, after which the question is withdrawn.
const answerTime = 2 * time.Minute

// ask asks a question; ok is an answer.
func (c *Console) ask(ctx context.Context, format string, args ...any) (answer string, ok bool) {
	fmt.Fprintf(c.Out, format+": ", args...)
	select {
	case <-ctx.Done():
	case <-time.After(answerTime):
		c.say("\nno answer came: nothing was changed")
	case answer, ok = <-c.lines:
	}
	return answer, ok
}

// choose carries out a line of the menu.
func (c *Console) choose(ctx context.Context, line string) {
	var err error
	switch line {
	case "":
		return
	case "n":
		err = c.network(ctx)
	case "t":
		err = c.time(ctx)
	case "e":
		err = c.offered(ctx)
	case "l":
		err = c.link(ctx)
	case "r", "p":
		what, do := "reboot", c.Restart
		if line == "p" {
			what, do = "power off", c.PowerOff
		}
		if answer, _ := c.ask(ctx, "Type yes to %s", what); answer == "yes" {
			err = do(ctx)
		}
	case "h":
		err = c.pin(ctx)
	case "c":
		err = c.commands(ctx)
	case "f":
		err = c.destroy(ctx, "Only a backup brings them back.", c.Reset)
	case "b":
		err = c.destroy(ctx, "The machine then waits for a backup, of this appliance or of another one.", c.AwaitBackup)
	default:
		c.say("this is none of the letters") // not repeated: perhaps a PIN that was typed too late
	}
	if err != nil && ctx.Err() == nil {
		c.say("not done: %s", plain(err.Error()))
	}
}

// network asks for addresses.
func (c *Console) network(ctx context.Context) error {
	s, err := c.settings(ctx)
	if err != nil {
		return err
	}
	c.say("Empty keeps what is in brackets, and - is none.")
	list := func(what string, now []string, otherwise string) (all []string, ok bool) {
		is := strings.Join(now, " ")
		if is == "" {
			is = otherwise
		}
		answer, ok := c.ask(ctx, "%s [%s]", what, is)
		switch answer {
		case "":
			return now, ok
		case "-", otherwise:
			return nil, ok
		}
		return strings.Fields(answer), ok
	}
	var ok bool
	if s.Address, ok = list("Addresses with their networks, such as 10.1.0.5/24, or dhcp", s.Address, "dhcp"); !ok {
		return nil
	}
	if len(s.Address) == 0 {
		s.Gateway = nil
	} else if s.Gateway, ok = list("Gateway", s.Gateway, "none"); !ok {
		return nil
	}
	if s.DNS, ok = list("Name servers", s.DNS, "none"); !ok {
		return nil
	}
	return c.put(ctx, s)
}

func (c *Console) time(ctx context.Context) error {
	s, err := c.settings(ctx)
	if err != nil {
		return err
	}
	answer, ok := c.ask(ctx, "Names of time servers with NTS [%s], - is none", strings.Join(s.Time, " "))
	switch {
	case !ok || answer == "":
		return nil
	case answer == "-":
		s.Time = nil
	default:
		s.Time = strings.Fields(answer)
	}
	return c.put(ctx, s)
}

func (c *Console) settings(ctx context.Context) (Settings, error) {
	doc, err := c.Settings(ctx)
	if err != nil {
		return Settings{}, err
	}
	return ParseSettings([]byte(doc.Text))
}

// put shows settings and puts them in force after a yes.
func (c *Console) put(ctx context.Context, s Settings) error {
	if err := s.Check(); err != nil {
		return err
	}
	shown := s
	shown.Setup = Setup{}
	c.say("")
	fmt.Fprintln(printable{c.Out}, strings.TrimSpace(shown.Text()))
	if answer, _ := c.ask(ctx, "Type yes to put these settings in force"); answer != "yes" {
		c.say("nothing was changed")
		return nil
	}
	return c.Change(ctx, s.Text())
}

// offered shows the settings of the ESP.
func (c *Console) offered(ctx context.Context) error {
	doc, err := c.Settings(ctx)
	if err != nil {
		return err
	}
	if doc.Offered == "" || doc.Offered == doc.Text {
		c.say("the ESP has no countersign.toml with other settings")
		return nil
	}
	s, err := ParseSettings([]byte(doc.Offered))
	if err != nil {
		return err
	}
	return c.put(ctx, s)
}

func (c *Console) link(ctx context.Context) error {
	name, ok := c.ask(ctx, "Name of the first administrator")
	if !ok || name == "" {
		return nil
	}
	url, err := c.Link(ctx, name)
	if err != nil {
		return err
	}
	c.say("\n%s\n\nThe link makes the passkey of %s, once, within 30 minutes. Compare the words of the HTTPS CA.",
		plain(url), plain(name))
	c.ask(ctx, "Enter goes on")
	return nil
}

// pin asks for the PIN of an HSM's user, and shows none of it.
func (c *Console) pin(ctx context.Context) error {
	defer withoutEcho(c.In)()
	typed, ok := c.ask(ctx, "PIN of the HSM's user, which is not shown")
	c.say("")
	if !ok || typed == "" {
		return nil
	}
	pin := secret.Of(typed)
	defer pin.Wipe()
	return c.PIN(ctx, pin)
}

// withoutEcho has a terminal show nothing of what is typed, until the result is called.
func withoutEcho(in io.Reader) (restore func()) {
	f, is := in.(*os.File)
	if !is {
		return func() {}
	}
	fd := int(f.Fd())
	before, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return func() {}
	}
	silent := *before
	silent.Lflag &^= unix.ECHO
	unix.IoctlSetTermios(fd, unix.TCSETS, &silent)
	return func() { unix.IoctlSetTermios(fd, unix.TCSETSF, before) }
}

// destroy asks for the name of the appliance before it is destroyed.
func (c *Console) destroy(ctx context.Context, then string, do func(ctx context.Context, name string) error) error {
	s, err := c.Status(ctx)
	if err != nil {
		return err
	}
	name := "countersign"
	if s.Report != nil && s.Report.Appliance != "" {
		name = s.Report.Appliance
	}
	c.say("This destroys all keys and the ledger that this machine has. %s", then)
	answer, ok := c.ask(ctx, "Type %s to destroy it", plain(name))
	if !ok || answer != name {
		c.say("nothing was changed")
		return nil
	}
	return do(ctx, answer)
}

// commands runs commands of countersignd with a drive.
func (c *Console) commands(ctx context.Context) error {
	c.say("Commands of countersignd: %s.\nTheir files are on a drive with a FAT file system of the name %s. Pull it "+
		"at will\nwhile nothing runs. Letters that are typed while a command runs are not shown.\nAn empty line ends.",
		strings.Join(slices.Sorted(maps.Keys(commands)), ", "), driveLabel)
	for ctx.Err() == nil {
		line, ok := c.ask(ctx, "countersignd")
		if !ok || line == "" {
			return nil
		}
		if err := c.command(ctx, line); err != nil {
			c.say("not done: %s", plain(err.Error()))
		}
	}
	return nil
}

// command runs a command. The terminal of the command repeats what may be seen of the lines.
func (c *Console) command(ctx context.Context, line string) error {
	defer withoutEcho(c.In)()
	return c.Command(ctx, line, c.lines, printable{c.Out})
}

// printable writes what a terminal only prints: a question mark in the place of control characters
// and of all that is not ASCII.
type printable struct{ to io.Writer }

func (p printable) Write(b []byte) (int, error) {
	_, err := p.to.Write(bytes.Map(func(r rune) rune {
		if r == '\n' || r == '\r' || r == '\t' || r >= ' ' && r <= '~' {
			return r
		}
		return '?'
	}, b))
	return len(b), err
}
