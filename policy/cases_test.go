package policy_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"countersign/policy"
)

func TestParseCasesRefusesWithTheLine(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"nothing":           {"", "c.csv:1: there is no case"},
		"columns only":      {"expect,peer,key\n# no\n", "c.csv:1: there is no case"},
		"no expect":         {"# a\n\npeer,key\n", `c.csv:3: there is no column "expect"`},
		"other separator":   {"expect;peer;key\n", `c.csv:1: there is no column "expect"`},
		"a column twice":    {"expect,peer,key, peer\n", `c.csv:1: the column "peer" is there twice`},
		"unknown column":    {"expect,peer,key,amuont\nallow,a,b,5\n", `c.csv:2: there is no field "amuont"`},
		"unknown and empty": {"expect,peer,key,amuont\nallow,a,b,\n", `c.csv:2: there is no field "amuont"`},
		"a record":          {"expect,peer,key,used\nallow,a,b,1\n", `c.csv:2: there is no field "used"`},
		"a window's window": {
			"expect,peer,key,used.peer.year.amount\nallow,a,b,1\n",
			`c.csv:2: there is no field "used.peer.year.amount"`,
		},
		"too few": {
			"expect,peer,key\nallow,a,b\n\n# c\nallow,a\n", "c.csv:5: 2 fields, but there are 3 columns",
		},
		"too many":  {"expect,peer,key\r\nallow,a,b,c\r\n", "c.csv:2: 4 fields"},
		"expect":    {"expect,peer,key\nAllow,a,b\n", `c.csv:2: expect is allow or deny, not "Allow"`},
		"no peer":   {"expect,peer,key\nallow,,b\n", "c.csv:2: peer and key are needed"},
		"action":    {"expect,peer,key,action\nallow,a,b,sing\n", `c.csv:2: there is no action "sing"`},
		"time":      {"expect,peer,key,time\nallow,a,b,noon\n", `c.csv:2: time: "noon"`},
		"number":    {"expect,peer,key,amount\nallow,a,b,1.5\n", `c.csv:2: amount: "1.5" is not a whole number`},
		"negative":  {"expect,peer,key,size\nallow,a,b,-1\n", `c.csv:2: size: "-1"`},
		"too large": {"expect,peer,key,size\nallow,a,b,9223372036854775808\n", "c.csv:2: size"},
		"hour":      {"expect,peer,key,hour\nallow,a,b,24\n", "c.csv:2: hour: 24"},
		"weekday":   {"expect,peer,key,weekday\nallow,a,b,sunday\n", `c.csv:2: weekday: "sunday"`},
		"less than the document": {
			"expect,peer,key,amount,used.peer.day.amount\nallow,a,b,5,4\n",
			"c.csv:2: used.peer.day.amount: 4 is less than 5",
		},
		"less than a shorter one": {
			"expect,peer,key,used.key.hour.signatures,used.key.month.signatures\nallow,a,b,5,4\n",
			"c.csv:2: used.key.month.signatures: 4 is less than 5",
		},
		"no counterparty": {
			"expect,peer,key,used.counterparty.day.signatures\nallow,a,b,5\n",
			"c.csv:2: used.counterparty.day.signatures: without a counterparty",
		},
		"a quote":            {"expect,peer,key\nallow,a,b\nallow,\"a,b\n", "c.csv:3: extraneous or missing \""},
		"a quote in a field": {"expect,peer,key\nallow,a\"b,c\n", "c.csv:2: bare \""},
		"the first of two":   {"expect,peer,key\nallow,a,b\nx,a,b\ny,a,b\n", "c.csv:3: expect"},
	} {
		cases, err := policy.ParseCases("c.csv", []byte(c.text))
		if err == nil || cases != nil ||
			!strings.HasPrefix(err.Error(), "cases: "+c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v; want %s", name, err, c.want)
		}
	}
}

// TestParseCases reads a table with quotes, spaces, both line ends, a byte order mark and absent
// fields.
// TestCasesOfVerification: a case of a verification has a key or a signer, and counts the peer's
// verifications only.
func TestCasesOfVerification(t *testing.T) {
	const head = "expect,peer,key,signer,action,currency,amount,used.peer.day.signatures,used.key.day.signatures\n"
	signer := strings.Repeat("0a", 32)
	cases, err := policy.ParseCases("c.csv", []byte(head+"allow,shop,,"+signer+",verify,SAT,5,7,\n"))
	if err != nil {
		t.Fatal(err)
	}
	r := cases[0].Request
	var want policy.Usage
	for w := range policy.Windows {
		want[0][w].Signatures = max(1, 7*int64(min(1, w/2)))
	}
	if r.Signer != signer || r.Key != "" || r.Used != want {
		t.Errorf("%+v, want %v", r, want)
	}
	for row, says := range map[string]string{
		"allow,shop,,,verify,,,,":                     "peer and key are needed",
		"allow,shop,,x,verify,,,,":                    "is not a public key",
		"allow,shop,,0A" + signer[2:] + ",verify,,,,": "is not a public key",
		"allow,shop,k," + signer + ",verify,,,,":      "in place of a key",
		"allow,shop,," + signer + ",sign,,,,":         "in place of a key",
		"allow,shop,," + signer + ",verify,,,,1":      "used.key.day.signatures: for a verification",
	} {
		_, err := policy.ParseCases("c.csv", []byte(head+row+"\n"))
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want %q", row, err, says)
		}
	}
}

func TestParseCases(t *testing.T) {
	cases, err := policy.ParseCases("c.csv", []byte("\ufeff# a table\r\n"+
		" name , expect,peer,\"key\",action,time,currency,amount,amount_e8,"+
		"used.peer.day.amount,used.key.hour.amount_e8,counterparty\r\n\r\n"+
		"\"a \"\"name\"\", quoted\", allow , shop ,payments,,,SAT,5,,7,,\r\n"+
		"# between\r\n"+
		"two\u00a0words,deny,shop,payments,sign_raw,2026-11-22T23:30:00-01:00,,,,,,ab\r\n"+
		"e8,deny,shop,payments,,,EUR,,150000001,,300000000,\r\n"+
		"huge,deny,shop,payments,,,EUR,9223372036854775807,,,,"))
	if err != nil || len(cases) != 4 {
		t.Fatalf("%v, %v", cases, err)
	}
	a, b, e8 := cases[0], cases[1], cases[2]
	if a.Name != `a "name", quoted` || !a.Allow || a.Line != 4 || a.Request.Peer != "shop" ||
		a.Request.Action != "sign" || b.Line != 6 || b.Allow || b.Request.Action != "sign_raw" {
		t.Errorf("%+v\n%+v", a, b)
	}
	own := policy.Window{Signatures: 1, Amount: 5, AmountE8: 500000000}
	seven := policy.Window{Signatures: 1, Amount: 7, AmountE8: 700000000}
	owns := [...]policy.Window{own, own, own, own, own} // a payment without a counterparty has the window of all such
	if want := (policy.Usage{{own, own, seven, seven, seven}, owns, owns}); a.Request.Used != want {
		t.Errorf("%v, want %v", a.Request.Used, want)
	}
	one := policy.Window{Signatures: 1}
	ones := [...]policy.Window{one, one, one, one, one}
	if want := (policy.Usage{ones, ones, ones}); b.Request.Used != want {
		t.Errorf("%v, want %v", b.Request.Used, want)
	}
	minute := policy.Window{Signatures: 1, Amount: 2, AmountE8: 150000001}
	hour := policy.Window{Signatures: 1, Amount: 3, AmountE8: 300000000}
	if w := e8.Request.Used[1]; w[0] != minute || w[1] != hour {
		t.Errorf("%v", w)
	}
	if w := cases[3].Request.Used[0][0]; w.AmountE8 != 9223372036854775807 {
		t.Errorf("%v", w)
	}
	for want, c := range map[string]policy.Case{
		`{"amount":5,"amount_e8":500000000,"currency":"SAT","hour":12,"lifetime":3600,"size":256,` +
			`"transcript":"message-v1","weekday":"Monday"}`: a,
		`{"counterparty":"ab","hour":0,"lifetime":3600,"size":256,` +
			`"transcript":"message-v1","weekday":"Monday"}`: b,
	} {
		_, raw := parse(t, "").Decided(0, 0, c.Request, [16]byte{})
		rec, err := policy.ParseRecord(raw)
		if err != nil {
			t.Fatal(err)
		}
		var got, wanted any
		if json.Unmarshal(rec.Context, &got); json.Unmarshal([]byte(want), &wanted) != nil || !equalJSON(got, wanted) {
			t.Errorf("%s, want %s", rec.Context, want)
		}
	}
}

func equalJSON(a, b any) bool {
	x, _ := json.Marshal(a)
	y, _ := json.Marshal(b)
	return string(x) == string(y)
}

// FuzzCases sees that a table is refused with one line of valid UTF-8, or that each request of
// the table fits the schema.
func FuzzCases(f *testing.F) {
	files, err := filepath.Glob("../examples/policies/*.csv")
	if err != nil || len(files) == 0 {
		f.Fatal(files, err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte("\ufeffexpect,peer,key,time,used.peer.day.amount_e8,amount\r\n" +
		"allow,\"a\nb\",c,2026-11-24T15:04:05Z,1,\r\n#\n\ndeny,a,b,,,9\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		cases, err := policy.ParseCases("c.csv", b)
		if err != nil {
			text := err.Error()
			if !strings.HasPrefix(text, "cases: c.csv:") || strings.Contains(text, "\n") || !utf8.ValidString(text) {
				t.Fatalf("%q", text)
			}
			return
		}
		for _, c := range cases {
			if err := c.Request.Check(); err != nil || c.Line < 2 {
				t.Fatalf("%+v: %v", c, err)
			}
		}
	})
}
