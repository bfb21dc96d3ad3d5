package cause_test

import (
	"regexp"
	"strings"
	"testing"

	"countersign/internal/cause"
	"countersign/internal/spectest"
)

// TestSpecHasCauses holds the table of docs/SPEC.md against Kinds.
func TestSpecHasCauses(t *testing.T) {
	const header = "| code | meaning | what to do | stops admissions |\n| --- | --- | --- | --- |\n"
	rows := ""
	for _, k := range cause.Kinds {
		stops := ""
		if k.Stops {
			stops = "yes"
		}
		rows += "| `" + k.Code + "` | " + k.Means + " | " + k.Do + " | " + stops + " |\n"
	}
	spectest.Table(t, "../../docs/SPEC.md", header, rows)
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
		cause.Rotation.Of("b", "x"), cause.KeyMissing.Of("k", "x"), cause.Rotation.Of("a", "x"),
		cause.Locked.Of("", "by %s", "bob"),
	}
	cause.Sort(all)
	var got []string
	for _, c := range all {
		got = append(got, c.Code+c.Subject)
	}
	if strings.Join(got, " ") != "locked key-missingk rotation-failinga rotation-failingb" {
		t.Error(got)
	}
	if s := all[1].String(); s != "key-missing (k): x; restore the token, or rotate the key" {
		t.Error(s)
	}
}

// TestOneLine: text of strangers in the details does not look like another line of the state.
func TestOneLine(t *testing.T) {
	c := cause.Webhook.Of("shop", "valid for %s, not for shop", "a\nstate\toperational\r\x1b[2J\u202e\u2028")
	if want := "valid for a state operational \ufffd[2J\ufffd , not for shop"; c.Text != want {
		t.Errorf("%q", c.Text)
	}
}
