package policy

import (
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/big"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
)

// Case is a row of a table of test cases (see ParseCases): a request and the expected decision.
type Case struct {
	Line    int
	Name    string
	Request Request
	Allow   bool
}

// ParseCases reads a table of cases: comma-separated values (RFC 4180) whose first row names the
// columns. Empty lines and lines that begin with # are skipped.
//
// The columns expect (allow or deny), peer and key are required. Optional columns are name, action,
// time (RFC 3339, sets hour and weekday), signer (64 hex digits, in place of a key for the action
// verify), groups and key_groups (names of the groups of the peer and of the key, with spaces
// between them), and each field of the schema's context, such as used.peer.day.amount. An empty
// field is absent.
//
// The defaults are action sign, transcript message-v1, lifetime 3600, size 256, and 12:00 UTC on
// a Monday. Each of amount and amount_e8 has its default from the other one. By default a window
// has this document only, or the numbers of the next shorter window if those are larger. A smaller
// number is impossible, and refused.
func ParseCases(file string, text []byte) (cases []Case, err error) {
	text = bytes.TrimPrefix(text, []byte("\ufeff")) // byte order mark: spreadsheets write one
	r := csv.NewReader(bytes.NewReader(text))
	r.Comment, r.TrimLeadingSpace, r.FieldsPerRecord = '#', true, -1
	fail := func(line int, format string, args ...any) ([]Case, error) {
		return nil, fmt.Errorf("cases: %s:%d: %s", file, line, fmt.Sprintf(format, args...))
	}
	var columns []string
	for {
		row, err := r.Read()
		if bad, is := errors.AsType[*csv.ParseError](err); is {
			return fail(bad.Line, "%v", bad.Err)
		} else if err != nil {
			break
		}
		line, _ := r.FieldPos(0)
		for i, field := range row {
			row[i] = strings.TrimSpace(field)
		}
		if columns == nil {
			columns = row
			for i, column := range columns {
				if slices.Contains(columns[:i], column) {
					return fail(line, "the column %q is there twice", column)
				}
			}
			for _, needed := range []string{"expect", "peer", "key"} {
				if !slices.Contains(columns, needed) {
					return fail(line, "there is no column %q; the first row must name the columns", needed)
				}
			}
			continue
		}
		if len(row) != len(columns) {
			return fail(line, "%d fields, but there are %d columns", len(row), len(columns))
		}
		fields := map[string]string{}
		for i, column := range columns {
			if row[i] != "" {
				fields[column] = row[i]
			} else if !settable(column) {
				return fail(line, "there is no field %q in the schema's context that a case can set", column)
			}
		}
		c, err := parseCase(fields)
		if err != nil {
			return fail(line, "%v", err)
		}
		c.Line = line
		cases = append(cases, c)
	}
	if len(cases) == 0 {
		return fail(1, "there is no case")
	}
	return cases, nil
}

// settable reports whether a table of cases may have the column.
func settable(column string) bool {
	context := resolvedSchema().Actions[cedar.NewEntityUID("Action", Sign)].AppliesTo.Context
	attribute, ok := context[cedar.String(column)]
	_, record := attribute.Type.(resolved.RecordType)
	return ok && !record ||
		slices.Contains(strings.Fields("expect name peer key signer action time groups key_groups"), column) ||
		slices.Contains(windowPaths(), column)
}

// parseCase makes a case of the fields of a row. The fields outside of the context (expect, peer
// and so on) are deleted from the map.
func parseCase(fields map[string]string) (c Case, err error) {
	take := func(name, fallback string) string {
		v, ok := fields[name]
		if delete(fields, name); !ok {
			return fallback
		}
		return v
	}
	switch v := take("expect", ""); v {
	case "allow", "deny":
		c.Allow = v == "allow"
	default:
		return c, fmt.Errorf("expect is allow or deny, not %q", v)
	}
	c.Name = take("name", "")
	peer, key, action := take("peer", ""), take("key", ""), take("action", Sign)
	signer := take("signer", "")
	peerGroups, err := caseGroups(take("groups", ""), OfPeers)
	if err != nil {
		return c, err
	}
	keyGroups, err := caseGroups(take("key_groups", ""), OfKeys)
	switch {
	case err != nil:
		return c, err
	case signer != "" && len(keyGroups) > 0:
		return c, errors.New("key_groups: a signer is in no group")
	case peer == "" || key == "" && signer == "":
		return c, errors.New("peer and key are needed")
	case signer != "" && (action != Verify || key != ""):
		return c, errors.New("a signer is for the action verify, and in place of a key")
	case signer != "" && !isPublicKey.MatchString(signer):
		return c, fmt.Errorf("signer: %q is not a public key: 64 hex digits in small letters", signer)
	}
	schema, ok := resolvedSchema().Actions[cedar.NewEntityUID("Action", cedar.String(action))]
	if !ok {
		return c, fmt.Errorf("there is no action %q", action)
	}
	at := time.Date(2024, 1, 1, 12, 0, 0, 0, time.UTC) // a Monday
	if v := take("time", ""); v != "" {
		if at, err = time.Parse(time.RFC3339, v); err != nil {
			return c, fmt.Errorf("time: %q is not like 2026-11-24T15:04:05Z", v)
		}
	}
	context := map[string]any{"transcript": "message-v1", "lifetime": int64(3600), "size": int64(256)}
	SetTime(context, at)
	used := map[string]int64{}
	for _, path := range slices.Sorted(maps.Keys(fields)) {
		if !settable(path) {
			return c, fmt.Errorf("there is no field %q in the schema's context that a case can set", path)
		}
		attribute, inContext := schema.AppliesTo.Context[cedar.String(path)]
		if _, isText := attribute.Type.(resolved.StringType); isText {
			context[path] = fields[path]
			continue
		}
		n, err := strconv.ParseInt(fields[path], 10, 64)
		if err != nil || n < 0 {
			return c, fmt.Errorf("%s: %q is not a whole number from 0 to %d", path, fields[path], int64(math.MaxInt64))
		}
		if inContext {
			context[path] = n
		} else {
			used[path] = n
		}
	}
	if hour := context["hour"].(int64); hour > 23 {
		return c, fmt.Errorf("hour: %d is not from 0 to 23", hour)
	}
	if day := context["weekday"].(string); !slices.Contains(weekdays[:], day) {
		return c, fmt.Errorf("weekday: %q is not like Monday", day)
	}
	amount, has := context["amount"].(int64)
	if e8, hasE8 := context["amount_e8"].(int64); has && !hasE8 {
		context["amount_e8"] = wholeToE8(amount)
	} else if hasE8 && !has {
		context["amount"] = e8ToWhole(e8)
	}
	if c.Request, err = NewRequest(peer, action, key, context); err != nil {
		return c, err
	}
	c.Request.Signer = signer
	c.Request.PeerGroups, c.Request.KeyGroups = peerGroups, keyGroups
	if c.Request.Used, err = caseUsage(action, context, used); err != nil {
		return c, err
	}
	return c, c.Request.Check()
}

// caseGroups returns the names of the groups in a field.
func caseGroups(field, of string) ([]string, error) {
	names := strings.Fields(field)
	for i, name := range names {
		if _, err := NewGroup(name, of, []string{"member"}); err != nil {
			return nil, err
		}
		if slices.Contains(names[:i], name) {
			return nil, fmt.Errorf("group %q is there twice", name)
		}
	}
	if len(names) > MaxGroupsOf {
		return nil, fmt.Errorf("%d groups: a peer and a key may be in %d each", len(names), MaxGroupsOf)
	}
	slices.Sort(names)
	return slices.Clip(names), nil
}

var isPublicKey = regexp.MustCompile("^[0-9a-f]{64}$")

var weekdays = [...]string{"Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"}

// wholeToE8 converts whole units to units of 10^-8.
func wholeToE8(n int64) int64 {
	_, e8 := Amounts(new(big.Int).Mul(big.NewInt(n), wholeUnit))
	return e8
}

// e8ToWhole converts units of 10^-8 to whole units, rounded up.
func e8ToWhole(e8 int64) int64 {
	n, _ := Amounts(new(big.Int).Mul(big.NewInt(e8), e8Unit))
	return n
}

func windowPath(counted, window, what string) string {
	return "used." + counted + "." + window + "." + what
}

func windowPaths() (all []string) {
	for _, counted := range Counted {
		for _, window := range Windows {
			for what := range new(Window).fields() {
				all = append(all, windowPath(counted, window, what))
			}
		}
	}
	return all
}

// caseUsage makes the windows of a case: the numbers that the row sets, and defaults for the
// others (see ParseCases).
func caseUsage(action string, context map[string]any, set map[string]int64) (u Usage, err error) {
	for i, counted := range Counted {
		var least Window
		if action == Verify {
			for path, v := range set {
				if v > 0 && !(strings.HasPrefix(path, "used.peer.") && strings.HasSuffix(path, ".signatures")) {
					return u, fmt.Errorf("%s: for a verification it is always 0", path)
				}
			}
			if counted == "peer" {
				least.Signatures = 1
			}
		} else if counted != "counterparty" || context["counterparty"] != nil || context["amount"] != nil {
			least.Signatures = 1
			least.Amount, _ = context["amount"].(int64)
			least.AmountE8, _ = context["amount_e8"].(int64)
		}
		for j, window := range Windows {
			path := func(what string) string { return windowPath(counted, window, what) }
			v, has := set[path("amount")]
			if e8, hasE8 := set[path("amount_e8")]; has && !hasE8 {
				set[path("amount_e8")] = max(least.AmountE8, wholeToE8(v))
			} else if hasE8 && !has {
				set[path("amount")] = max(least.Amount, e8ToWhole(e8))
			}
			for _, what := range []string{"signatures", "amount", "amount_e8"} {
				n := least.fields()[what]
				v, ok := set[path(what)]
				if ok && v < *n {
					return u, fmt.Errorf(
						"%s: %d is less than %d, which this document and the shorter windows have already",
						path(what), v, *n)
				} else if ok && least == (Window{}) && v > 0 && counted == "counterparty" {
					return u, fmt.Errorf("%s: without a counterparty it is always 0, but for payments", path(what))
				} else if ok {
					*n = v
				}
			}
			u[i][j] = least
		}
	}
	return u, nil
}

// SetTime sets the fields of a context that come from the appliance's clock: hour and weekday, in
// UTC.
func SetTime(context map[string]any, at time.Time) {
	at = at.UTC()
	context["hour"], context["weekday"] = int64(at.Hour()), at.Weekday().String()
}
