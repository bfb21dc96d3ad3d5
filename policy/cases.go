package policy

import (
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
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
// empty field is absent. Defaults: transcript message-v1, lifetime 3600, size 256, a Monday at 12; amount_e8 is made of amount;
// each window has this document only, and a longer one at least what a shorter one has.
func ParseCases(file string, text []byte) (cases []Case, err error) {
	r := csv.NewReader(bytes.NewReader(text))
	r.Comment, r.TrimLeadingSpace, r.FieldsPerRecord = '#', true, -1
	fail := func(line int, format string, args ...any) ([]Case, error) {
		return nil, fmt.Errorf("cases: %s:%d: %s", file, line, fmt.Sprintf(format, args...))
	}
	columns, err := r.Read()
	if err != nil {
		return nil, fmt.Errorf("cases: %s: its first row must name the columns: %w", file, err)
	}
	for i, column := range columns {
		columns[i] = strings.TrimSpace(column)
		if slices.Contains(columns[:i], columns[i]) {
			return fail(1, "the column %q is there twice", columns[i])
		}
	}
	for _, needed := range []string{"expect", "peer", "key"} {
		if !slices.Contains(columns, needed) {
			return fail(1, "there is no column %q", needed)
		}
	}
	rows, err := r.ReadAll()
	if err != nil {
		return nil, fmt.Errorf("cases: %s: %w", file, err)
	}
	lines := lineNumbers(text)
	for n, row := range rows {
		line := lines[n+1]
		if len(row) != len(columns) {
			return fail(line, "%d fields, but there are %d columns", len(row), len(columns))
		}
		fields := map[string]string{}
		for i, column := range columns {
			if v := strings.TrimSpace(row[i]); v != "" {
				fields[column] = v
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

// lineNumbers are the lines on which rows begin.
func lineNumbers(text []byte) (lines []int) {
	r := csv.NewReader(bytes.NewReader(text))
	r.Comment, r.TrimLeadingSpace, r.FieldsPerRecord = '#', true, -1
	for {
		if _, err := r.Read(); err != nil {
			return lines
		}
		line, _ := r.FieldPos(0)
		lines = append(lines, line)
	}
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
	for path, text := range fields {
		attribute, ok := schema.AppliesTo.Context[cedar.String(path)]
		windowed := slices.Contains(windowPaths(), path)
		if _, record := attribute.Type.(resolved.RecordType); record || !ok && !windowed {
			return c, fmt.Errorf("there is no field %q in the schema's context that a case can set", path)
		}
		if _, isText := attribute.Type.(resolved.StringType); isText {
			context[path] = text
			continue
		}
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil || n < 0 {
			return c, fmt.Errorf("%s: %q is not a whole number that is not negative", path, text)
		}
		if windowed {
			used[path] = n
		} else {
			context[path] = n
		}
	}
	if day := context["weekday"]; !slices.Contains(weekdays, day) {
		return c, fmt.Errorf("weekday: %q is none of %v", day, weekdays)
	} else if hour := context["hour"].(int64); hour > 23 {
		return c, fmt.Errorf("hour: %d is not 0 to 23", hour)
	}
	if amount, ok := context["amount"].(int64); ok && context["amount_e8"] == nil {
		_, context["amount_e8"] = Amounts(new(big.Int).Mul(big.NewInt(amount), whole))
	}
	if c.Request, err = NewRequest(peer, action, key, context); err != nil {
		return c, err
	}
	c.Request.Used = usedBy(context, used)
	return c, c.Request.Check()
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
func usedBy(context map[string]any, set map[string]int64) (u Usage) {
	for i, counted := range Counted {
		var least Window
		if counted != "counterparty" || context["counterparty"] != nil {
			least.Signatures = 1
			least.Amount, _ = context["amount"].(int64)
			least.AmountE8, _ = context["amount_e8"].(int64)
		}
		for j, window := range Windows {
			for what, n := range least.fields() {
				if v, ok := set[windowPath(counted, window, what)]; ok {
					*n = v
				}
			}
			if v, ok := set[windowPath(counted, window, "amount")]; ok && set[windowPath(counted, window, "amount_e8")] == 0 {
				_, least.AmountE8 = Amounts(new(big.Int).Mul(big.NewInt(v), whole))
			}
			u[i][j] = least
		}
	}
	return u
}

var weekdays = []any{"Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"}

// SetTime sets what a context has of the appliance's clock.
func SetTime(context map[string]any, at time.Time) {
	at = at.UTC()
	context["hour"], context["weekday"] = int64(at.Hour()), at.Weekday().String()
}
