package cause_test

import (
	"flag"
	"os"
	"regexp"
	"strings"
	"testing"

	"countersign/internal/cause"
)

var write = flag.Bool("write", false, "write the table of causes into docs/SPEC.md")

// TestSpecHasCauses holds the table of docs/SPEC.md against Kinds.
func TestSpecHasCauses(t *testing.T) {
	const spec = "../../docs/SPEC.md"
	const header = "| code | meaning | what to do | stops admissions |\n| --- | --- | --- | --- |\n"
	want := header
	for _, k := range cause.Kinds {
		stops := ""
		if k.Stops {
			stops = "yes"
		}
		want += "| `" + k.Code + "` | " + k.Means + " | " + k.Do + " | " + stops + " |\n"
	}
	b, err := os.ReadFile(spec)
	if err != nil {
		t.Fatal(err)
	}
	before, after, found := strings.Cut(string(b), header)
	if !found {
		t.Fatalf("docs/SPEC.md has no table with the columns\n%s", header)
	}
	got := header
	for line := range strings.Lines(after) {
		if !strings.HasPrefix(line, "|") {
			break
		}
		got += line
	}
	if *write {
		if err := os.WriteFile(spec, []byte(before+want+after[len(got)-len(header):]), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if got != want {
		t.Errorf("docs/SPEC.md has\n%s\nthe table is\n%s", got, want)
	}
}

// TestKinds checks that codes are unique and that each kind says what to do.
func TestKinds(t *testing.T) {
	seen := map[string]bool{}
	for _, k := range cause.Kinds {
		if seen[k.Code] || !regexp.MustCompile(`^[a-z]+(-[a-z]+)*$`).MatchString(k.Code) {
			t.Errorf("code %q", k.Code)
		}
		seen[k.Code] = true
		if k.Means == "" || k.Do == "" || strings.HasSuffix(k.Means, ".") || strings.HasSuffix(k.Do, ".") {
			t.Errorf("%s: %q, %q", k.Code, k.Means, k.Do)
		}
	}
}

func TestSort(t *testing.T) {
	all := []cause.Cause{
		cause.Webhook.Of("b", "x"), cause.KeyMissing.Of("k", "x"), cause.Webhook.Of("a", "x"),
		cause.Locked.Of("", "by %s", "bob"),
	}
	cause.Sort(all)
	var got []string
	for _, c := range all {
		got = append(got, c.Code+c.Subject)
	}
	if strings.Join(got, " ") != "locked key-missingk webhook-failinga webhook-failingb" {
		t.Error(got)
	}
	if s := all[1].String(); s != "key-missing (k): x; restore the token, or rotate the key" {
		t.Error(s)
	}
}
