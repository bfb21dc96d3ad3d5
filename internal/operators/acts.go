package operators

import (
	"bytes"
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
	"countersign/internal/ledger"
	"countersign/internal/manage"
)

// neededKey is the record of the table Meta that says how many approvals are needed; without it, 1.
const neededKey = "approvals-needed"

// roster is who there is, and how many approvals are needed.
type roster struct {
	people map[string]person
	needed int
}

func readRoster(v ledger.View) (r roster, err error) {
	r = roster{map[string]person{}, 1}
	if err := v.All(ledger.Operators, func(name string, value []byte) error {
		p, err := decodePerson(name, value)
		r.people[name] = p
		return err
	}); err != nil {
		return r, err
	}
	r.needed, err = decodeNeeded(v.Get(ledger.Meta, neededKey))
	return r, err
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

// sound refuses a roster that must never be: nobody could administrate the appliance, or approve an act, or it is not known who did.
func (r *roster) sound() error {
	if len(r.people) > maxOperators {
		return fmt.Errorf("%w: there may be %d operators", ErrConflict, maxOperators)
	}
	administrators, approvers := 0, 0
	owners := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(r.people)) {
		p := r.people[name]
		if len(p.Credentials) == 0 {
			return fmt.Errorf("operator %q: %w: it would have no credential: add another one before, or remove the operator", name, ErrConflict)
		}
		if len(manage.Encode(p.Operator)) >= maxRecord {
			return fmt.Errorf("operator %q: %w: it has too many credentials: remove one", name, ErrConflict)
		}
		for _, c := range p.Credentials {
			marks := []string{c.ID, "key " + c.PublicKey}
			if c.CredentialID != "" {
				marks = append(marks, "passkey "+c.CredentialID)
			}
			for _, mark := range marks {
				if owner, taken := owners[mark]; taken {
					return fmt.Errorf("credential %s: %w: it is one of %q", c.ID, ErrExists, owner)
				}
				owners[mark] = name
			}
		}
		if p.Has(approval.Administrator) {
			administrators++
		}
		if p.Has(approval.Approver) {
			approvers++
		}
	}
	if administrators == 0 {
		return fmt.Errorf("%w: there must be an administrator", ErrConflict)
	}
	if r.needed < 1 || r.needed > approvers {
		return fmt.Errorf("%w: of %d approvers, %d would be needed", ErrConflict, approvers, r.needed)
	}
	return nil
}

// amend is an act on a roster. It says whom it has changed, "" where it was the number of approvals, and how. It gets the values of the
// act's parameters, and has no effects but on the roster.
type amend func(r *roster, values []string) (name, change string, err error)

// ownAct is one of the acts of this package.
type ownAct struct {
	parameters []string
	amend      amend
}

func (d *Registry) ownActs() map[string]Act {
	acts := map[string]Act{}
	for action, own := range map[string]ownAct{
		approval.ActOperatorAdd:      {[]string{"name", "roles", "credential"}, d.addOperator},
		approval.ActOperatorRoles:    {[]string{"name", "roles"}, setRoles},
		approval.ActOperatorRemove:   {[]string{"name"}, removeOperator},
		approval.ActCredentialAdd:    {[]string{"name", "credential"}, d.addCredential},
		approval.ActCredentialRemove: {[]string{"name", "credential"}, removeCredential},
		approval.ActApprovalsNeeded:  {[]string{"needed"}, setNeeded},
	} {
		acts[action] = Act{
			Check: func(p []approval.Parameter, _ []byte) ([]approval.Parameter, error) { return d.checkOwn(own, p) }, // no sha256: nothing goes with it
			Run: func(ctx context.Context, who audit.Actor, p []approval.Parameter, _ []byte) error {
				values, err := own.values(p)
				if err != nil {
					return err
				}
				return d.amend(ctx, who, action, func(r *roster) (string, string, error) { return own.amend(r, values) })
			},
		}
	}
	return acts
}

// values reads the parameters, which must be there in their order, and no others.
func (a *ownAct) values(p []approval.Parameter) (values []string, err error) {
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

// checkOwn tries the act on what memory has. The roles and the credential get the one form that they have, which is the one to approve.
func (d *Registry) checkOwn(own ownAct, p []approval.Parameter) ([]approval.Parameter, error) {
	p = slices.Clone(p)
	for i := range p {
		switch {
		case p[i].Name == "roles":
			roles, err := parseRoles(p[i].Value)
			if err != nil {
				return nil, err
			}
			p[i].Value = joinRoles(roles)
		case p[i].Name == "credential" && strings.HasPrefix(strings.TrimSpace(p[i].Value), "{"):
			c, err := d.parseCredential(p[i].Value)
			if err != nil {
				return nil, err
			}
			p[i].Value = string(manage.Encode(c))
		}
	}
	values, err := own.values(p)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	r := roster{maps.Clone(d.roster.people), d.roster.needed}
	d.mu.Unlock()
	if _, _, err := own.amend(&r, values); err != nil {
		return nil, err
	}
	return p, r.sound()
}

// amend changes the roster that the ledger has, in one transaction with its event. The result is held
// against what must be true of a roster there.
func (d *Registry) amend(
	ctx context.Context, who audit.Actor, action string, change func(*roster) (name, what string, err error),
) error {
	return d.write(ctx, action, func(ctx context.Context) error {
		return d.ledger.Update(ctx, func(tx *ledger.Tx) error {
			r, err := readRoster(tx.View)
			if err != nil {
				return err
			}
			name, what, err := change(&r)
			if err != nil {
				return err
			}
			if err := r.sound(); err != nil {
				return err
			}
			e, err := r.write(tx, who, action, name, what)
			if err != nil {
				return err
			}
			return tx.Append(ledger.EventOf(e))
		})
	})
}

// write writes the record that an act has changed, and returns the event of the change.
func (r *roster) write(tx *ledger.Tx, who audit.Actor, action, name, what string) (audit.Event, error) {
	p, there := r.people[name]
	record := manage.Encode(p.Operator)
	switch {
	case name == "":
		return audit.NewApprovalsChanged(who, action, r.needed), tx.Put(ledger.Meta, neededKey, []byte(strconv.Itoa(r.needed)))
	case !there:
		return audit.NewOperatorChanged(who, action, name, what, nil), tx.Delete(ledger.Operators, name)
	case what == "":
		return audit.NewOperatorEnrolled(who, action, name, record), tx.Put(ledger.Operators, name, manage.Encode(p))
	}
	return audit.NewOperatorChanged(who, action, name, what, record), tx.Put(ledger.Operators, name, manage.Encode(p))
}

// EnrolFirst enrols the first operator, who may do all that the others need to be enrolled: only root on the Unix socket can, and only
// while the ledger has none.
func (d *Registry) EnrolFirst(ctx context.Context, ch Channel, name string, c approval.Credential) (approval.Operator, error) {
	if !ch.root() {
		return approval.Operator{}, fmt.Errorf("%w: root enrols the first operator, on the Unix socket", ErrNotAllowed)
	}
	c.Added = 0
	roles := []approval.Role{approval.Administrator, approval.OperatorRole, approval.Auditor, approval.Approver}
	var first approval.Operator
	err := d.amend(ctx, audit.Operator("uid:0"), "operator enrol", func(r *roster) (string, string, error) {
		if len(r.people) > 0 {
			return "", "", fmt.Errorf("%w: there are operators already: propose to add one", ErrConflict)
		}
		_, _, err := d.addOperator(r, []string{name, joinRoles(roles), string(manage.Encode(c))})
		first = r.people[name].Operator
		return name, "", err
	})
	if err != nil {
		return approval.Operator{}, err // the transaction may still be under way: first is not ours to read
	}
	return first, nil
}

func (d *Registry) addOperator(r *roster, values []string) (string, string, error) {
	name := values[0]
	if !nameable(name) {
		return "", "", fmt.Errorf("operator: %w: a name has 1 to %d lower-case letters, digits and hyphens, and does not begin with a hyphen", ErrInvalid, maxName)
	}
	if _, there := r.people[name]; there {
		return "", "", fmt.Errorf("operator %q: %w", name, ErrExists)
	}
	roles, err := parseRoles(values[1])
	if err != nil {
		return "", "", err
	}
	c, err := d.parseCredential(values[2])
	if err != nil {
		return "", "", err
	}
	c.Added = time.Now().Unix()
	r.people[name] = person{Operator: approval.Operator{Name: name, Roles: roles, Credentials: []approval.Credential{c}, Added: c.Added}}
	return name, approval.ChangeAdded, nil
}

func setRoles(r *roster, values []string) (string, string, error) {
	p, err := r.get(values[0])
	if err != nil {
		return "", "", err
	}
	if p.Roles, err = parseRoles(values[1]); err != nil {
		return "", "", err
	}
	r.people[p.Name] = p
	return p.Name, approval.ChangeRoles, nil
}

func removeOperator(r *roster, values []string) (string, string, error) {
	p, err := r.get(values[0])
	delete(r.people, p.Name)
	return p.Name, approval.ChangeRemoved, err
}

func (d *Registry) addCredential(r *roster, values []string) (string, string, error) {
	p, err := r.get(values[0])
	if err != nil {
		return "", "", err
	}
	c, err := d.parseCredential(values[1])
	if err != nil {
		return "", "", err
	}
	c.Added = time.Now().Unix()
	p.Credentials = append(slices.Clone(p.Credentials), c)
	r.people[p.Name] = p
	return p.Name, approval.ChangeCredentialAdded, nil
}

func removeCredential(r *roster, values []string) (string, string, error) {
	p, err := r.get(values[0])
	if err != nil {
		return "", "", err
	}
	i := slices.IndexFunc(p.Credentials, func(c approval.Credential) bool { return c.ID == values[1] })
	if i < 0 {
		return "", "", fmt.Errorf("credential of operator %q: %w", p.Name, ErrNotFound)
	}
	p.Credentials = slices.Delete(slices.Clone(p.Credentials), i, i+1)
	p.Counts = maps.Clone(p.Counts)
	delete(p.Counts, values[1])
	r.people[p.Name] = p
	return p.Name, approval.ChangeCredentialRemoved, nil
}

func setNeeded(r *roster, values []string) (string, string, error) {
	n, err := strconv.Atoi(values[0])
	if err != nil || strconv.Itoa(n) != values[0] {
		return "", "", fmt.Errorf("approvals needed: %w: it must be a number", ErrInvalid)
	}
	r.needed = n
	return "", "", nil
}

func (r *roster) get(name string) (person, error) {
	p, there := r.people[name]
	if !there {
		return p, fmt.Errorf("operator: %w", ErrNotFound)
	}
	return p, nil
}

// nameable is the rule of all names (see keystore.CheckName).
func nameable(name string) bool {
	return name != "" && len(name) <= maxName && name[0] != '-' && strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

// parseRoles reads known roles, each once, in any order, and returns them in the order of approval.Roles.
func parseRoles(s string) (roles []approval.Role, err error) {
	named := strings.Split(s, ",")
	for _, r := range approval.Roles() {
		if slices.Contains(named, string(r)) {
			roles = append(roles, r)
		}
	}
	if len(roles) != len(named) {
		return nil, fmt.Errorf("roles: %w: they are some of %s, each once, with commas in between", ErrInvalid, joinRoles(approval.Roles()))
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

// parseCredential reads one that is to be added: sound, for this appliance, and without the time at which that will be.
func (d *Registry) parseCredential(s string) (c approval.Credential, err error) {
	dec := json.NewDecoder(bytes.NewReader([]byte(s)))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c); err != nil || dec.More() || c.Added != 0 {
		return c, fmt.Errorf("credential: %w: it is not the JSON of one", ErrInvalid)
	}
	if err := c.Check(); err != nil {
		return c, fmt.Errorf("credential: %w: %w", ErrInvalid, err)
	}
	if c.Kind == approval.Passkey && c.RPID != d.RPID {
		return c, fmt.Errorf("credential: %w: it is a passkey for another place than %q", ErrInvalid, d.RPID)
	}
	return c, nil
}
