package admin

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"countersign/admin/api"
	"countersign/appliance"
	"countersign/approval"
	"countersign/audit"
	"countersign/internal/escrow"
	"countersign/internal/keyring"
)

// setHolders replaces the recovery holders. The parameters holder_1 and so on have a name, a blank
// and a public key each; number is that of the new set.
func setHolders(a *appliance.Appliance, p parameters, _ []byte) (parameters, do, error) {
	names := []string{"needed", "?number", "?of"}
	for i := range approval.MaxHolders {
		names = append(names, "?holder_"+strconv.Itoa(i+1))
	}
	v, err := values(p, names...)
	if err != nil {
		return nil, nil, err
	}
	s := escrow.Set{Number: a.Keys.Holders().Number + 1}
	if v["number"] != "" {
		n, err := strconv.ParseUint(v["number"], 10, 32)
		if err != nil {
			return nil, nil, invalid.errorf("number: %q is not that of a set", v["number"])
		}
		s.Number = uint32(n)
	}
	if s.Needed, err = strconv.Atoi(v["needed"]); err != nil {
		return nil, nil, invalid.errorf("needed: %q is not a number of holders", v["needed"])
	}
	p = list("number", strconv.FormatUint(uint64(s.Number), 10), "needed", strconv.Itoa(s.Needed))
	for i := range approval.MaxHolders {
		name := "holder_" + strconv.Itoa(i+1)
		text, given := v[name]
		if !given {
			continue
		}
		if len(s.Holders) < i {
			return nil, nil, invalid.errorf("%s is there, and holder_%d is missing", name, len(s.Holders)+1)
		}
		who, key, _ := strings.Cut(text, " ")
		h, err := escrow.NewHolder(who, key)
		if err != nil {
			return nil, nil, invalid.errorf("%v", err)
		}
		s.Holders = append(s.Holders, h)
		p = append(p, approval.Parameter{Name: name, Value: h.String()})
	}
	of := strconv.Itoa(len(s.Holders))
	if v["of"] != "" && v["of"] != of {
		return nil, nil, invalid.errorf("of: %q holders are to be named, and %s are", v["of"], of)
	}
	p = slices.Insert(p, 2, approval.Parameter{Name: "of", Value: of})
	if err := a.Keys.CheckHolders(s); err != nil {
		return nil, nil, err
	}
	return p, func(ctx context.Context, who audit.Actor) error {
		return a.Keys.SetHolders(ctx, who, s)
	}, notRolledBack(a)
}

// warnSetHolders names the keys whose shares stay with the holders of before.
func warnSetHolders(a *appliance.Appliance, _ parameters, _ []byte) []string {
	if n := len(keyring.Recoverable(a.Keys.All())); n > 0 {
		return []string{fmt.Sprintf("%d versions of keys have been sealed for earlier holders, who can still bring "+
			"them back: rotate these keys twice, and their versions are sealed for the new holders", n)}
	}
	return nil
}

func (s *server) holders(context.Context, caller, *none) (api.Holders, error) {
	set := s.Appliance.Keys.Holders()
	doc := api.Holders{Number: set.Number, Needed: set.Needed, Holders: []api.Holder{}, Keys: []string{}}
	for _, h := range set.Holders {
		doc.Holders = append(doc.Holders, api.Holder{
			Name: h.Name, Recipient: h.Recipient, Fingerprint: h.Fingerprint(),
		})
	}
	for _, k := range keyring.Recoverable(s.Appliance.Keys.All()) {
		doc.Keys = append(doc.Keys, k.Ref().String())
	}
	last := s.Appliance.HoldersProven()
	doc.Proven = unix(last)
	return doc, nil
}
