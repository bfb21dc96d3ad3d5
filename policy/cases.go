package policy

import (
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/big"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
)

// Case is a request and what is expected of a policy: a row of a table (see ParseCases).
type Case struct {
	Line    int
	Name    string
	Request Request
	Allow   bool
}

// ParseCases reads a table of cases: comma-separated values (RFC 4180) whose first row names the columns; lines that begin
// with # and empty lines are skipped. The columns are expect (allow or deny), peer, key, and, all of them optional, name,
// action (sign), time (RFC 3339, for hour and weekday), and any field of the schema's context, as used.peer.day.amount. An
// empty field is absent. Defaults: transcript message-v1, lifetime 3600, size 256, a Monday at 12; amount and amount_e8 are made of
// each other; each window has this document only, and a longer one at least what a shorter one has. A window with less than that
// is refused: there can't be one.
func ParseCases(file string, text []byte) (cases []Case, err error) {
	r := csv.NewReader(bytes.NewReader(bytes.TrimPrefix(text, []byte("\ufeff")))) // a mark that spreadsheets write
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
		c, err := caseOf(fields)
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

// settable says that a column can be one of a table of cases.
func settable(column string) bool {
	attribute, ok := vocabulary().Actions[cedar.NewEntityUID("Action", Sign)].AppliesTo.Context[cedar.String(column)]
	_, record := attribute.Type.(resolved.RecordType)
	return ok && !record || slices.Contains([]string{"expect", "name", "peer", "key", "action", "time"}, column) || slices.Contains(windowPaths(), column)
}

// caseOf makes a case of its fields. It takes from the map what it has used.
func caseOf(fields map[string]string) (c Case, err error) {
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
	if peer == "" || key == "" {
		return c, errors.New("peer and key are needed")
	}
	schema, ok := vocabulary().Actions[cedar.NewEntityUID("Action", cedar.String(action))]
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
	if day := context["weekday"].(string); !slices.ContainsFunc(weekdays, func(d time.Weekday) bool { return d.String() == day }) {
		return c, fmt.Errorf("weekday: %q is not like Monday", day)
	}
	amount, has := context["amount"].(int64)
	if e8, hasE8 := context["amount_e8"].(int64); has && !hasE8 {
		context["amount_e8"] = e8Of(amount)
	} else if hasE8 && !has {
		context["amount"] = wholeOf(e8)
	}
	if c.Request, err = NewRequest(peer, action, key, context); err != nil {
		return c, err
	}
	if c.Request.Used, err = usedBy(context, used); err != nil {
		return c, err
	}
	return c, c.Request.Check()
}

var weekdays = []time.Weekday{time.Monday, time.Tuesday, time.Wednesday, time.Thursday, time.Friday, time.Saturday, time.Sunday}

// e8Of is a number of whole units in units of 10^-8, wholeOf the other way, rounded up.
func e8Of(n int64) int64 {
	_, e8 := Amounts(new(big.Int).Mul(big.NewInt(n), whole))
	return e8
}

func wholeOf(e8 int64) int64 {
	n, _ := Amounts(new(big.Int).Mul(big.NewInt(e8), tiny))
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

// usedBy has this document in every window, and what was set; a longer window has at least what a shorter one has.
func usedBy(context map[string]any, set map[string]int64) (u Usage, err error) {
	for i, counted := range Counted {
		var least Window
		if counted != "counterparty" || context["counterparty"] != nil {
			least.Signatures = 1
			least.Amount, _ = context["amount"].(int64)
			least.AmountE8, _ = context["amount_e8"].(int64)
		}
		for j, window := range Windows {
			path := func(what string) string { return windowPath(counted, window, what) }
			v, has := set[path("amount")]
			if e8, hasE8 := set[path("amount_e8")]; has && !hasE8 {
				set[path("amount_e8")] = max(least.AmountE8, e8Of(v))
			} else if hasE8 && !has {
				set[path("amount")] = max(least.Amount, wholeOf(e8))
			}
			for _, what := range []string{"signatures", "amount", "amount_e8"} {
				n := least.fields()[what]
				v, ok := set[path(what)]
				if ok && v < *n {
					return u, fmt.Errorf("%s: %d is less than %d, which this document and the shorter windows have already", path(what), v, *n)
				} else if ok && counted == "counterparty" && context["counterparty"] == nil && v > 0 {
					return u, fmt.Errorf("%s: without a counterparty it is always 0", path(what))
				} else if ok {
					*n = v
				}
			}
			u[i][j] = least
		}
	}
	return u, nil
}

// SetTime sets what a context has of the appliance's clock.
func SetTime(context map[string]any, at time.Time) {
	at = at.UTC()
	context["hour"], context["weekday"] = int64(at.Hour()), at.Weekday().String()
}
