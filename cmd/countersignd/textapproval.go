package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"countersign/approval"
	"countersign/internal/operators"

	"github.com/spf13/cobra"
)

// textApproval has the options of an act that operators approve without the daemon, by signatures
// of its text: a restore, and a factory reset.
type textApproval struct {
	proposer  string
	text      string   // the file of the text to approve
	approvals []string // files with signatures of the text

	// Opened by openText, while this process may.
	textFile   *os.File
	signatures []string
}

// textLife is the time for approvals.
const textLife = 24 * time.Hour

// flags adds the options. proposer says who proposes.
func (a *textApproval) flags(cmd *cobra.Command, proposer string) {
	f := cmd.Flags()
	f.StringVar(&a.proposer, "proposer", "", proposer)
	f.StringVar(&a.text, "text", "", "the file of the text that the approvers sign")
	f.StringSliceVar(&a.approvals, "approval", nil, "the file with a signature of the text; can be repeated")
}

// openText opens the file of the text, and reads the signatures.
func (a *textApproval) openText() (err error) {
	if a.text == "" {
		return nil
	}
	how := os.O_RDWR
	if len(a.approvals) == 0 {
		how |= os.O_CREATE
	}
	if a.textFile, err = os.OpenFile(a.text, how, 0o644); err != nil {
		return fmt.Errorf("--text: %w", err)
	}
	if info, err := a.textFile.Stat(); err != nil {
		return fmt.Errorf("--text: %w", err)
	} else if len(a.approvals) == 0 && info.Size() > 0 {
		return configError{fmt.Errorf("--text: %s has a text already: give its approvals with --approval, "+
			"or name another file", a.text)}
	}
	for _, file := range a.approvals {
		b, err := os.ReadFile(file)
		if err != nil {
			return fmt.Errorf("--approval: %w", err)
		}
		a.signatures = append(a.signatures, string(b))
	}
	return nil
}

// discardText removes the file of a text that was not written.
func (a *textApproval) discardText() {
	if info, err := os.Stat(a.text); err == nil && info.Size() == 0 && len(a.approvals) == 0 {
		os.Remove(a.text)
	}
}

// authorise returns the act as it was approved, with its approvals. Without approvals, authorise
// writes the text to approve, and p is nil. yet says on stdout that nothing was done.
func (a *textApproval) authorise(
	people operators.Offline, act string, parameters []approval.Parameter, yet string, stdout io.Writer,
) (p *approval.Proposal, all []operators.Signed, err error) {
	now, err := people.Propose(act, a.proposer, parameters, time.Now(), textLife)
	switch {
	case err != nil:
		return nil, nil, fmt.Errorf("--proposer: %w", err)
	case a.textFile == nil && len(a.approvals) == 0:
		return nil, nil, configError{errors.New("--text: name the file for the text that the approvers sign")}
	case a.textFile == nil:
		return nil, nil, configError{errors.New("--text: name the file of the text that was signed")}
	case len(a.approvals) == 0:
		return nil, nil, a.ask(people, now, yet, stdout)
	}
	text, err := io.ReadAll(a.textFile)
	if err != nil {
		return nil, nil, fmt.Errorf("--text: %w", err)
	}
	if p, err = people.Same(string(text), now); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", a.text, err)
	}
	all, err = people.Approve(p, a.signatures)
	return p, all, err
}

// ask writes the text to approve, and says how.
func (a *textApproval) ask(people operators.Offline, p *approval.Proposal, yet string, stdout io.Writer) error {
	if err := a.textFile.Truncate(0); err != nil {
		return err
	}
	if _, err := a.textFile.WriteAt([]byte(p.Text()), 0); err != nil {
		return err
	}
	if err := a.textFile.Close(); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "\n%s. The text is in %s:\n\n%s\n", yet, a.text, p.Text())
	fmt.Fprintf(stdout, "%s sign it, each with the SSH key of the appliance:\n", strings.Join(people.Approvers(), ", "))
	fmt.Fprintf(stdout, "  ssh-keygen -Y sign -n %s -f KEY %s\n", approval.ForProposal, a.text)
	fmt.Fprintf(stdout, "%d of them must. Then repeat the command with --approval FILE.sig for each.\n",
		people.Needed())
	return nil
}
