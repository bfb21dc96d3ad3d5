package main

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"countersign/admin/api"
	"countersign/approval"
	"countersign/audit"
	"countersign/internal/durable"
	"countersign/internal/ownfile"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// appliance is a context: where an operator's tool reaches an appliance, and which appliance it is.
// Each context is a file with mode 0600. An appliance that is reached by --socket or --url alone
// has a context too, whose name is made of the address.
//
// The invariant: the tool signs nothing for another appliance than the one in the field Appliance.
// The operator names that appliance, or the first sign-in pins the one that answers. Every text to
// be signed names its appliance, and passes checkChallenge or checkProposal first.
type appliance struct {
	name string // of the context: its file's name without .json

	Socket string `json:"socket,omitempty"` // absolute path of the Unix socket, for example one of ssh -L
	URL    string `json:"url,omitempty"`    // in place of Socket: https://localhost:7780
	CA     string `json:"ca,omitempty"`     // with URL: PEM of the only certificates to trust

	Operator  string `json:"operator,omitempty"`  // signs in, unless a flag says otherwise
	Appliance string `json:"appliance,omitempty"` // pinned: the name of the appliance, countersign/ID
	LogKey    string `json:"log_key,omitempty"`   // pinned: the verifier key of epoch 0 of its log
}

// address are the flags that say which appliance a command is for.
type address struct{ context, socket, url string }

const defaultSocket = "/run/countersign/admin.sock"

// addressFlags adds the flags of commands that talk to an appliance's admin API.
func (t *tool) addressFlags(flags *pflag.FlagSet) {
	flags.StringVar(&t.at.context, "context", "", "the `name` of a context (or COUNTERSIGN_CONTEXT; see admin context)")
	flags.StringVar(&t.at.socket, "socket", "", "the `path` of the admin socket, or of one that ssh -L forwards "+
		"(or COUNTERSIGN_SOCKET; default: the context in use, or "+defaultSocket+")")
	flags.StringVar(&t.at.url, "url", "", "in place of --socket, the `address` of the admin API over HTTPS, "+
		"for example https://localhost:7780 (or COUNTERSIGN_URL)")
	flags.StringVar(&t.ca, "ca", os.Getenv("COUNTERSIGN_CA"), "with --url, a `file` with the certificate of the only "+
		"CA to trust (or COUNTERSIGN_CA; needed the first time)")
	flags.StringVar(&t.identity, "identity", "", "sign with this key of the SSH agent only: a `file` with its public "+
		"half (default: any key of the operator)")
	t.operatorFlag(flags)
}

// findAppliance returns the context that the flags, the environment or the context in use name.
func (t *tool) findAppliance() (*appliance, error) {
	at := t.at
	if at == (address{}) {
		at = address{os.Getenv("COUNTERSIGN_CONTEXT"), os.Getenv("COUNTERSIGN_SOCKET"), os.Getenv("COUNTERSIGN_URL")}
	}
	set := slices.DeleteFunc([]string{at.context, at.socket, at.url}, func(s string) bool { return s == "" })
	if len(set) > 1 {
		return nil, usageError{errors.New("name one appliance: by --context, --socket or --url " +
			"(COUNTERSIGN_CONTEXT, COUNTERSIGN_SOCKET, COUNTERSIGN_URL)")}
	}
	if len(set) == 0 {
		var err error
		if at.context, err = contextInUse(); err != nil {
			return nil, err
		}
		if at.context == "" {
			at.socket = defaultSocket
		}
	}
	if at.context != "" {
		return readContext(at.context)
	}
	given, err := newAppliance(at.socket, at.url, t.ca)
	if err != nil {
		return nil, err
	}
	kept, err := readContext(given.name)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errNoFolder) {
		return given, nil
	}
	if err == nil && given.CA != "" && given.CA != kept.CA {
		return nil, fmt.Errorf("%s was reached with another CA before: if the new one is right, "+
			"countersign admin context remove %s", given.URL, given.name)
	}
	return kept, err
}

// newAppliance returns the context of an address, without a pin.
func newAppliance(socket, address, caFile string) (a *appliance, err error) {
	a = &appliance{URL: strings.TrimSuffix(address, "/")}
	kind, place := "https", a.URL
	if address == "" {
		if a.Socket, err = filepath.Abs(socket); err != nil {
			return nil, err
		}
		kind, place = "socket", a.Socket
	} else if u, err := url.Parse(address); err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil {
		return nil, usageError{fmt.Errorf("%q is not like https://localhost:7780", address)}
	}
	sum := sha256.Sum256([]byte(place))
	a.name = kind + "-" + hex.EncodeToString(sum[:8])
	if a.URL != "" && caFile != "" {
		a.CA, err = readCA(caFile)
	}
	return a, err
}

// readCA returns the certificates of a PEM file, and nothing else of the file, such as a private
// key.
func readCA(file string) (string, error) {
	rest, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	var kept []byte
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return "", fmt.Errorf("--ca %s: %w", file, err)
		}
		kept = append(kept, pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes})...)
	}
	if len(kept) == 0 {
		return "", fmt.Errorf("--ca %s: there is no certificate in PEM: countersign admin tls show prints one", file)
	}
	return string(kept), nil
}

// client returns a client without a session.
func (a *appliance) client() (*api.Client, error) {
	if a.URL != "" {
		if a.CA == "" {
			return nil, usageError{fmt.Errorf("which certificate is right for %s? name its CA by --ca "+
				"(countersign admin tls show prints the appliance's own)", a.URL)}
		}
		return api.NewHTTPSClient(a.URL, []byte(a.CA))
	}
	if _, err := os.Stat(a.Socket); err != nil {
		return nil, socketError{fmt.Errorf("no appliance runs at this socket: %w; %s", err, noSocketHint)}
	}
	return api.NewClient(a.Socket), nil
}

// place is the address, for people.
func (a *appliance) place() string { return a.Socket + a.URL }

// errNotSigned is the error for a text that the tool does not sign.
var errNotSigned = errors.New("nothing was signed")

// checkChallenge checks a challenge of the API: the challenge must be the one that the operator
// wants, of the context's appliance, and of now. Without a pin, checkChallenge pins the appliance.
func (t *tool) checkChallenge(text, purpose, operator, key string) error {
	want := approval.Challenge{
		Purpose: purpose, Appliance: t.to.Appliance, Operator: operator, Key: key, Channel: approval.ChannelUnix,
	}
	if t.to.URL != "" {
		want.Channel = approval.ChannelHTTPS
	}
	c, err := approval.ParseChallenge(text)
	if err != nil {
		return fmt.Errorf("%w: %w", errNotSigned, err)
	}
	if err := t.to.checkName(c.Appliance); err != nil {
		return err
	}
	if err := c.Matches(want, time.Now()); err != nil {
		return fmt.Errorf("%w: %w", errNotSigned, err)
	}
	return t.pinName(c.Appliance)
}

// checkProposal checks that a proposal is one of the context's appliance: a signature counts for
// ever. Without a pin, checkProposal pins the appliance.
func (t *tool) checkProposal(text string) error {
	p, err := approval.ParseText(text)
	if err != nil {
		return fmt.Errorf("%w: %w", errNotSigned, err)
	}
	if err := t.to.checkName(p.Appliance); err != nil {
		return err
	}
	return t.pinName(p.Appliance)
}

// checkName compares the name of the appliance in a text with the pinned one, if there is a pin.
func (a *appliance) checkName(name string) error {
	if a.Appliance == "" || a.Appliance == name {
		return nil
	}
	return fmt.Errorf("%w: the context %s (%s) is of the appliance %s, and the text is of %s. Somebody may relay it. "+
		"Another appliance gets a context of its own (countersign admin context add). If this one was set up anew: "+
		"countersign admin context remove %s", errNotSigned, a.name, a.place(), a.Appliance, name, a.name)
}

// pinName pins the name of the context's appliance, unless there is a pin.
func (t *tool) pinName(name string) error {
	if t.to.Appliance != "" {
		return nil
	}
	t.to.Appliance = name
	if err := t.to.write(); err != nil {
		return fmt.Errorf("%w: the name of the appliance can't be kept: %w", errNotSigned, err)
	}
	fmt.Fprintf(t.stderr, "countersign: from now on %s is the appliance %s (context %s)\n",
		t.to.place(), name, t.to.name)
	// An appliance in other hands can answer with the texts of the operator's other appliance.
	others, _ := readContexts() // those that can be read
	for _, other := range others {
		if other.Appliance == name && other.name != t.to.name {
			fmt.Fprintf(t.stderr, "countersign: warning: the context %s (%s) is of the same appliance: "+
				"if these are two appliances, one relays the other, so: countersign admin context remove %s\n",
				other.name, other.place(), t.to.name)
		}
	}
	return nil
}

// pinLog checks the verifier key of an appliance's log against the context, and notes it once the
// appliance is known.
func (t *tool) pinLog(vkey string) (audit.Log, error) {
	log, err := audit.ParseVerifierKey(vkey)
	if err != nil || t.to.Appliance == "" {
		return log, err
	}
	first := log.VerifierKey(0)
	if log.Name() != t.to.Appliance || t.to.LogKey != "" && t.to.LogKey != first {
		return audit.Log{}, fmt.Errorf("the context %s is of the appliance %s with another log than %s: "+
			"it was set up anew, or somebody answers in its place", t.to.name, t.to.Appliance, log.Name())
	}
	if t.to.LogKey == "" {
		t.to.LogKey = first
		err = t.to.write()
	}
	return log, err
}

// errNoFolder is the error for a user without a folder for contexts.
var errNoFolder = errors.New("there is no folder for contexts: set XDG_CONFIG_HOME or HOME, on Windows AppData")

// contextFolder is $XDG_CONFIG_HOME/countersign or ~/.config/countersign; on macOS
// ~/Library/Application Support/countersign, on Windows %AppData%\countersign.
func contextFolder() (string, error) {
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", fmt.Errorf("%w: %w", errNoFolder, err)
	}
	return filepath.Join(dir, "countersign"), nil
}

var contextName = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{0,63}$`)

func contextFile(name string) (string, error) {
	if !contextName.MatchString(name) {
		return "", fmt.Errorf("context %q: a name has 1 to 64 small letters, digits, dots and hyphens", name)
	}
	dir, err := contextFolder()
	return filepath.Join(dir, "contexts", name+".json"), err
}

func readContext(name string) (*appliance, error) {
	path, err := contextFile(name)
	if err != nil {
		return nil, err
	}
	b, err := readOwn(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("there is no context %s: countersign admin context list shows them: %w", name, err)
	}
	if err != nil {
		return nil, err
	}
	a := &appliance{name: name}
	if err := json.Unmarshal(b, a); err != nil || (a.Socket == "") == (a.URL == "") {
		return nil, fmt.Errorf("context %s: %s is not the file of a context: countersign admin context remove %s",
			name, path, name)
	}
	return a, nil
}

// readOwn reads a file that only root and the caller can change, and no other user. Otherwise
// another user could choose the appliance for which the caller signs.
func readOwn(path string) ([]byte, error) {
	for _, each := range []string{filepath.Dir(path), path} {
		if err := ownfile.CheckOwn(each); err != nil {
			return nil, err
		}
	}
	return os.ReadFile(path)
}

func (a *appliance) write() error {
	path, err := contextFile(a.name)
	if err != nil {
		return err
	}
	b, err := json.MarshalIndent(a, "", "  ")
	if err != nil {
		return err
	}
	return keep(path, append(b, '\n'))
}

// keep replaces a file of the operator's folder.
func keep(path string, content []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return durable.Replace(path, content, 0o600)
}

// contextInUse is the name of the context in use, or "". If the name can't be read, the command
// must not go to another appliance.
func contextInUse() (string, error) {
	dir, err := contextFolder()
	if err != nil {
		return "", nil // without a folder there are no contexts
	}
	b, err := readOwn(filepath.Join(dir, "current"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("which context is in use? name one by --context: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

func useContext(name string) error {
	dir, err := contextFolder()
	if err != nil {
		return err
	}
	return keep(filepath.Join(dir, "current"), []byte(name+"\n"))
}

// contexts are the commands about contexts. The commands talk to no appliance.
func (t *tool) contexts() *cobra.Command {
	var pinned string
	add := command("add NAME", "Add a context: where an appliance is reached, and which one it is", cobra.ExactArgs(1),
		func(_ *cobra.Command, args []string) error {
			if t.at.context != "" || (t.at.socket == "") == (t.at.url == "") {
				return usageError{errors.New("say where the appliance is: add --socket or --url")}
			}
			a, err := newAppliance(t.at.socket, t.at.url, t.ca)
			if err != nil {
				return err
			}
			if a.URL != "" && a.CA == "" {
				return usageError{errors.New("--ca is missing: a file with the certificate of the CA to trust")}
			}
			if pinned != "" {
				log, err := audit.ParseVerifierKey(pinned)
				if err != nil {
					return fmt.Errorf("--log-key: %w", err)
				}
				a.Appliance, a.LogKey = log.Name(), log.VerifierKey(0)
			}
			a.name, a.Operator = args[0], t.operator
			if _, err := readContext(a.name); !errors.Is(err, fs.ErrNotExist) {
				if err == nil {
					err = fmt.Errorf("there is a context %s already: remove it first", a.name)
				}
				return err
			}
			if err := a.write(); err != nil {
				return err
			}
			inUse, err := contextInUse()
			if err == nil && inUse == "" {
				err = useContext(a.name)
			}
			if err != nil {
				return err
			}
			return t.said("added", a.name)
		})
	details(add, "The first context is in use from then on. The tool signs texts of the context's appliance only.\n"+
		"With --log-key, that is the appliance with this log; without it, the appliance that answers the\n"+
		"first sign-in. Contexts are files in ~/.config/countersign/contexts (or XDG_CONFIG_HOME), on macOS in\n"+
		"~/Library/Application Support/countersign, on Windows in %AppData%\\countersign.")
	add.Example = "  countersign admin context add prod --socket ~/.countersign.sock --operator ann --log-key KEY\n" +
		"  countersign admin context add prod --url https://localhost:7780 --ca appliance-ca.pem --operator ann"
	add.Flags().StringVar(&pinned, "log-key", "",
		"the verifier `key` of the appliance's log, from countersign admin audit key "+
			"(default: pin at the first sign-in)")
	list := command("list", "List contexts, and the appliances to which they are pinned", cobra.NoArgs,
		func(*cobra.Command, []string) error { return t.listContexts() })
	use := command("use NAME", "Use a context for the next commands without --context, --socket and --url",
		cobra.ExactArgs(1), func(_ *cobra.Command, args []string) error {
			if _, err := readContext(args[0]); err != nil {
				return err
			}
			if err := useContext(args[0]); err != nil {
				return err
			}
			return t.said("using", args[0])
		})
	remove := command("remove NAME", "Remove a context, with its pin and its session", cobra.ExactArgs(1),
		func(_ *cobra.Command, args []string) error {
			path, err := contextFile(args[0])
			if err != nil {
				return err
			}
			if session, err := sessionFile(args[0]); err == nil {
				os.Remove(session)
			}
			if err := os.Remove(path); err != nil {
				return err
			}
			inUse, err := contextInUse()
			if err == nil && inUse == args[0] {
				err = useContext("")
			}
			if err != nil {
				return err
			}
			return t.said("removed", args[0])
		})
	return group("context", "Add, list, choose and remove the appliances that you manage", add, list, use, remove)
}

// storedContexts returns the names of the contexts.
func storedContexts() (names []string, err error) {
	dir, err := contextFolder()
	if err != nil {
		return nil, err
	}
	files, err := filepath.Glob(filepath.Join(dir, "contexts", "*.json"))
	for _, file := range files {
		names = append(names, strings.TrimSuffix(filepath.Base(file), ".json"))
	}
	return names, err
}

// readContexts returns all contexts that can be read, by name. The error has the other ones.
func readContexts() (all []*appliance, err error) {
	names, err := storedContexts()
	for _, name := range names {
		a, bad := readContext(name)
		if bad != nil {
			err = errors.Join(err, bad)
			continue
		}
		all = append(all, a)
	}
	return all, err
}

func (t *tool) listContexts() error {
	known, unread := readContexts()
	inUse, err := contextInUse()
	if err != nil {
		return err
	}
	type entry struct {
		Name  string `json:"name"`
		InUse bool   `json:"in_use"`
		*appliance
	}
	all := []entry{}
	for _, a := range known {
		all = append(all, entry{a.name, a.name == inUse, a})
	}
	err = t.print(all, func(w io.Writer) {
		fmt.Fprintln(w, "NAME\tIN USE\tAPPLIANCE\tOPERATOR\tADDRESS")
		for _, a := range all {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", a.Name, either(a.InUse, "yes", ""),
				either(a.Appliance != "", a.Appliance, "at the first sign-in"), a.Operator, a.place())
		}
	})
	return errors.Join(err, unread)
}
