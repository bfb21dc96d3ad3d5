package operators

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"countersign/approval"
	"countersign/audit"
	"countersign/internal/ijson"
	"countersign/internal/ledger"
	"countersign/internal/manage"
)

// neededKey is the key of the quorum in the table Meta: the number of approvals that an act needs.
// A ledger without the record has a quorum of 1.
const neededKey = "approvals-needed"

// hardwareKey is the key of the record in the table Meta that says whether approvals must be by
// hardware keys: yes or no. A ledger without the record does not demand hardware keys.
const hardwareKey = "approvals-hardware"

// roster has all operators and the rules for approvals.
type roster struct {
	people   map[string]person
	needed   int  // approvals for an act: the quorum
	hardware bool // approvals must be by hardware keys
}

func readRoster(v ledger.View) (r roster, err error) {
	r = roster{people: map[string]person{}}
	if err := v.All(ledger.Operators, func(name string, value []byte) error {
		p, err := decodePerson(name, value)
		r.people[name] = p
		return err
	}); err != nil {
		return r, err
	}
	if r.needed, err = decodeNeeded(v.Get(ledger.Meta, neededKey)); err != nil {
		return r, err
	}
	r.hardware, err = decodeHardware(v.Get(ledger.Meta, hardwareKey))
	return r, err
}

func decodeHardware(value []byte) (bool, error) {
	if value == nil {
		return false, nil
	}
	required, err := approval.ParseYes(string(value))
	if err != nil {
		err = fmt.Errorf("whether approvals must be by hardware keys is %w in the ledger", err)
	}
	return required, err
}

func decodeNeeded(value []byte) (int, error) {
	if value == nil {
		return 1, nil
	}
	needed, err := strconv.Atoi(string(value))
	if err != nil || needed < 1 {
		return 0, fmt.Errorf("how many approvals are needed is %q in the ledger", value)
	}
	return needed, nil
}

func decodePerson(name string, value []byte) (p person, err error) {
	if err = json.Unmarshal(value, &p); err == nil && p.Name != name {
		err = fmt.Errorf("it is of %q", p.Name)
	}
	if err != nil {
		return p, fmt.Errorf("operator %q in the ledger: %w", name, err)
	}
	return p, nil
}

// validate checks the invariants of a roster: at most maxOperators operators, each with a
// credential and a record below maxRecord bytes; at least one administrator; as many approvers as
// the quorum, with hardware keys where these are required. Otherwise the appliance could have no
// administrator, or no act could be approved. newCredential keeps the other invariant: no
// credential is there twice.
func (r *roster) validate() error {
	if len(r.people) > maxOperators {
		return fmt.Errorf("%w: there may be %d operators", ErrConflict, maxOperators)
	}
	administrators := 0
	for _, name := range slices.Sorted(maps.Keys(r.people)) {
		p := r.people[name]
		if len(p.Credentials) == 0 {
			return fmt.Errorf("operator %q: %w: it would have no credential: "+
				"add another one before, or remove the operator", name, ErrConflict)
		}
		if len(manage.Encode(p.Operator)) >= maxRecord {
			return fmt.Errorf("operator %q: %w: it has too many credentials: remove one", name, ErrConflict)
		}
		if p.Has(approval.Administrator) {
			administrators++
		}
	}
	if administrators == 0 {
		return fmt.Errorf("%w: there must be an administrator", ErrConflict)
	}
	if n := r.approvers(); r.needed < 1 || r.needed > n {
		with := ""
		if r.hardware {
			with = " with hardware keys"
		}
		return fmt.Errorf("%w: of %d approvers%s, %d would be needed", ErrConflict, n, with, r.needed)
	}
	return nil
}

// approvers counts the operators whose approvals would count.
func (r *roster) approvers() (n int) {
	for _, p := range r.people {
		if p.CanApprove(r.hardware) {
			n++
		}
	}
	return n
}

// warning returns a warning if the quorum needs all approvers.
func (r *roster) warning() string {
	if n := r.approvers(); n > r.needed {
		return ""
	}
	return fmt.Sprintf("each of the %d approvers is needed: after the loss of one key, no act can be approved, "+
		"not even a new key: have another approver first", r.needed)
}

// mutation changes a roster and nothing else. The values are those of an act's parameters. A
// mutation returns the name of the changed operator ("" for a rule for approvals) and the kind of
// the change.
type mutation func(r *roster, values []string) (name, change string, err error)

// operatorAct is an act on operators.
type operatorAct struct {
	parameters []string
	mutate     mutation
}

func (r *Registry) operatorActs() map[string]Act {
	acts := map[string]Act{
		approval.ActScraperAdd:    r.scraperAct(),
		approval.ActBackupRestore: offlineAct(approval.ActBackupRestore, "restored", "restore FILE"),
		approval.ActFactoryReset:  offlineAct(approval.ActFactoryReset, "reset", "factory-reset"),
	}
	for action, own := range map[string]operatorAct{
		approval.ActOperatorAdd:      {[]string{"name", "roles", "credential"}, r.addOperator},
		approval.ActOperatorRoles:    {[]string{"name", "roles"}, setRoles},
		approval.ActOperatorRemove:   {[]string{"name"}, removeOperator},
		approval.ActCredentialAdd:    {[]string{"name", "credential"}, r.addCredential},
		approval.ActCredentialRemove: {[]string{"name", "credential"}, removeCredential},
		approval.ActApprovalsNeeded:  {[]string{"needed"}, setNeeded},
		approval.ActHardwareKeys:     {[]string{"required"}, setHardware},
	} {
		acts[action] = Act{
			Roles: approval.Proposers(action),
			// Content is refused: no parameter sha256 names it. See Propose.
			Check: func(p []approval.Parameter, _ []byte) ([]approval.Parameter, error) {
				p, _, err := r.dryRun(own, p)
				return p, err
			},
			Warn: func(p []approval.Parameter, _ []byte) []string {
				_, people, err := r.dryRun(own, p)
				if err != nil || people.warning() == "" || people.approvers()-people.needed == r.spare() {
					return nil
				}
				return []string{people.warning()}
			},
			Run: func(ctx context.Context, who audit.Actor, p []approval.Parameter, _ []byte) error {
				values, err := own.values(p)
				if err != nil {
					return err
				}
				return r.updateRoster(ctx, who, action, func(people *roster) (string, string, error) {
					return own.mutate(people, values)
				})
			},
		}
	}
	return acts
}

// values returns the values of the parameters. The parameters must be complete and in their order.
func (a *operatorAct) values(p []approval.Parameter) (values []string, err error) {
	for i, each := range p {
		if i >= len(a.parameters) || each.Name != a.parameters[i] {
			break
		}
		values = append(values, each.Value)
	}
	if len(values) != len(a.parameters) || len(p) != len(values) {
		return nil, fmt.Errorf("%w: its parameters are %s, in this order", ErrInvalid, strings.Join(a.parameters, ", "))
	}
	return values, nil
}

// spare is the number of approvers beyond the quorum.
func (r *Registry) spare() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.roster.approvers() - r.roster.needed
}

// dryRun applies the act to a copy of the roster in memory. dryRun returns the copy, and the
// parameters to be approved: roles and credentials get their canonical form.
func (r *Registry) dryRun(own operatorAct, p []approval.Parameter) (_ []approval.Parameter, after roster, err error) {
	p = slices.Clone(p)
	for i := range p {
		switch {
		case p[i].Name == "roles":
			roles, err := parseRoles(p[i].Value)
			if err != nil {
				return nil, after, err
			}
			p[i].Value = joinRoles(roles)
		case p[i].Name == "credential" && strings.HasPrefix(strings.TrimSpace(p[i].Value), "{"):
			c, err := r.parseCredential(p[i].Value)
			if err != nil {
				return nil, after, err
			}
			p[i].Value = string(manage.Encode(c))
		}
	}
	values, err := own.values(p)
	if err != nil {
		return nil, after, err
	}
	r.mu.Lock()
	after = r.roster
	after.people = maps.Clone(after.people)
	r.mu.Unlock()
	if _, _, err := own.mutate(&after, values); err != nil {
		return nil, after, err
	}
	return p, after, after.validate()
}

// updateRoster changes the roster in the ledger. The change, the validation of the result, the end
// of proposals that lose their proposer, and the events are one transaction.
func (r *Registry) updateRoster(
	ctx context.Context, who audit.Actor, action string, mutate func(*roster) (name, change string, err error),
) error {
	return r.write(ctx, who.Request, action, func(ctx context.Context) error {
		return r.ledger.Update(ctx, func(tx *ledger.Tx) error {
			people, err := readRoster(tx.View)
			if err != nil {
				return err
			}
			name, change, err := mutate(&people)
			if err != nil {
				return err
			}
			if err := people.validate(); err != nil {
				return err
			}
			e, err := people.store(tx, who, action, name, change)
			if err != nil {
				return err
			}
			if err := tx.Append(ledger.EventOf(e)); err != nil {
				return err
			}
			return r.endOrphans(tx, &people)
		})
	})
}

// store writes the changed record to the ledger, and returns the event of the change.
func (r *roster) store(tx *ledger.Tx, who audit.Actor, action, name, change string) (audit.Event, error) {
	p, exists := r.people[name]
	record := manage.Encode(p.Operator)
	switch {
	case name == "" && change == changeHardware:
		required := approval.Yes(r.hardware)
		err := tx.Put(ledger.Meta, hardwareKey, []byte(required))
		return audit.NewApproverKeysChanged(who, action, required), err
	case name == "":
		err := tx.Put(ledger.Meta, neededKey, []byte(strconv.Itoa(r.needed)))
		return audit.NewApprovalsChanged(who, action, r.needed), err
	case !exists:
		return audit.NewOperatorChanged(who, action, name, change, nil), tx.Delete(ledger.Operators, name)
	case change == "":
		err := tx.Put(ledger.Operators, name, manage.Encode(p))
		return audit.NewOperatorEnrolled(who, action, name, record), err
	}
	err := tx.Put(ledger.Operators, name, manage.Encode(p))
	return audit.NewOperatorChanged(who, action, name, change, record), err
}

// FirstRoles returns the roles of the first operator: all that the next enrolments need.
func FirstRoles() []approval.Role {
	return []approval.Role{approval.Administrator, approval.OperatorRole, approval.Auditor, approval.Approver}
}

// EnrolFirst enrols the first operator, with the roles of FirstRoles. Only root on
// the Unix socket can enrol the first operator, and only while the ledger has no operator.
func (r *Registry) EnrolFirst(
	ctx context.Context, ch Channel, name string, c approval.Credential,
) (approval.Operator, error) {
	if !ch.root() {
		return approval.Operator{}, fmt.Errorf("%w: root enrols the first operator, on the Unix socket", ErrNotAllowed)
	}
	c.Added = 0
	values := []string{name, joinRoles(FirstRoles()), string(manage.Encode(c))}
	var first approval.Operator
	who := audit.Operator("uid:0").In(ch.Request)
	err := r.updateRoster(ctx, who, "operator enrol", func(people *roster) (string, string, error) {
		if len(people.people) > 0 {
			return "", "", fmt.Errorf("%w: there are operators already: propose to add one", ErrConflict)
		}
		_, _, err := r.addOperator(people, values)
		first = people.people[name].Operator
		return name, "", err
	})
	if err != nil {
		return approval.Operator{}, err // the transaction may still run: reading first would be a data race
	}
	return first, nil
}

func (r *Registry) addOperator(people *roster, values []string) (string, string, error) {
	name := values[0]
	if !validName(name) {
		return "", "", fmt.Errorf("operator: %w: a name has 1 to %d lower-case letters, digits and hyphens, "+
			"and does not begin with a hyphen", ErrInvalid, maxName)
	}
	if _, exists := people.people[name]; exists {
		return "", "", fmt.Errorf("operator %q: %w", name, ErrExists)
	}
	roles, err := parseRoles(values[1])
	if err != nil {
		return "", "", err
	}
	c, err := r.newCredential(people, values[2])
	if err != nil {
		return "", "", err
	}
	people.people[name] = person{Operator: approval.Operator{
		Name: name, Roles: roles, Credentials: []approval.Credential{c}, Added: c.Added,
	}}
	return name, approval.ChangeAdded, nil
}

func setRoles(people *roster, values []string) (string, string, error) {
	p, err := people.operator(values[0])
	if err != nil {
		return "", "", err
	}
	if p.Roles, err = parseRoles(values[1]); err != nil {
		return "", "", err
	}
	people.people[p.Name] = p
	return p.Name, approval.ChangeRoles, nil
}

func removeOperator(people *roster, values []string) (string, string, error) {
	p, err := people.operator(values[0])
	delete(people.people, p.Name)
	return p.Name, approval.ChangeRemoved, err
}

func (r *Registry) addCredential(people *roster, values []string) (string, string, error) {
	p, err := people.operator(values[0])
	if err != nil {
		return "", "", err
	}
	c, err := r.newCredential(people, values[1])
	if err != nil {
		return "", "", err
	}
	p.Credentials = append(slices.Clone(p.Credentials), c)
	people.people[p.Name] = p
	return p.Name, approval.ChangeCredentialAdded, nil
}

// newCredential parses a credential that is added to a roster now. No operator may have the same
// key or the same passkey: the signer of an approval would be ambiguous.
func (r *Registry) newCredential(people *roster, text string) (approval.Credential, error) {
	c, err := r.parseCredential(text)
	if err != nil {
		return c, err
	}
	for _, name := range slices.Sorted(maps.Keys(people.people)) {
		if slices.ContainsFunc(people.people[name].Credentials, func(old approval.Credential) bool {
			return old.PublicKey == c.PublicKey || old.ID == c.ID ||
				c.CredentialID != "" && old.CredentialID == c.CredentialID
		}) {
			return c, fmt.Errorf("credential %s: %w: operator %q has it", c.ID, ErrExists, name)
		}
	}
	c.Added = time.Now().Unix()
	return c, nil
}

func removeCredential(people *roster, values []string) (string, string, error) {
	p, err := people.operator(values[0])
	if err != nil {
		return "", "", err
	}
	i := slices.IndexFunc(p.Credentials, func(c approval.Credential) bool { return c.ID == values[1] })
	if i < 0 {
		return "", "", fmt.Errorf("credential %q of operator %q: %w", ijson.Clip(values[1]), p.Name, ErrNotFound)
	}
	p.Credentials = slices.Delete(slices.Clone(p.Credentials), i, i+1)
	p.SignCounts = maps.Clone(p.SignCounts)
	delete(p.SignCounts, values[1])
	people.people[p.Name] = p
	return p.Name, approval.ChangeCredentialRemoved, nil
}

func setNeeded(people *roster, values []string) (string, string, error) {
	n, err := strconv.Atoi(values[0])
	if err != nil || strconv.Itoa(n) != values[0] {
		return "", "", fmt.Errorf("approvals needed: %w: it must be a number", ErrInvalid)
	}
	people.needed = n
	return "", "", nil
}

// changeHardware is the kind of the change of setHardware.
const changeHardware = "hardware"

func setHardware(people *roster, values []string) (_, change string, err error) {
	if people.hardware, err = approval.ParseYes(values[0]); err != nil {
		return "", "", fmt.Errorf("approvals hardware: %w", err)
	}
	return "", changeHardware, nil
}

func (r *roster) operator(name string) (person, error) {
	p, exists := r.people[name]
	if !exists {
		return p, fmt.Errorf("operator %q: %w", ijson.Clip(name), ErrNotFound)
	}
	return p, nil
}

// validName checks the rule for all names (see keystore.CheckName).
func validName(name string) bool {
	return name != "" && len(name) <= maxName && name[0] != '-' &&
		strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

// parseRoles parses a list of known roles, each at most once, in any order. The result is in the
// order of approval.Roles.
func parseRoles(s string) (roles []approval.Role, err error) {
	named := strings.Split(s, ",")
	for _, r := range approval.Roles() {
		if slices.Contains(named, string(r)) {
			roles = append(roles, r)
		}
	}
	if len(roles) != len(named) {
		return nil, fmt.Errorf("roles: %w: they are some of %s, each once, with commas in between",
			ErrInvalid, joinRoles(approval.Roles()))
	}
	return roles, nil
}

func joinRoles(roles []approval.Role) string {
	var names []string
	for _, r := range roles {
		names = append(names, string(r))
	}
	return strings.Join(names, ",")
}

// parseCredential parses the JSON of a new credential. The credential must be valid, must be for
// this appliance if it is a passkey, and must have no time Added: the act sets the time.
func (r *Registry) parseCredential(s string) (c approval.Credential, err error) {
	if c, err = approval.ParseCredential(s); err != nil {
		return c, err
	}
	if c.Added != 0 {
		return c, fmt.Errorf("credential: %w: it says when it was added, which the act does", ErrInvalid)
	}
	if c.Kind == approval.Passkey && c.RPID != r.RPID {
		return c, fmt.Errorf("credential: %w: it is a passkey for another place than %q", ErrInvalid, r.RPID)
	}
	return c, nil
}
