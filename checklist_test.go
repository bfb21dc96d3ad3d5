package countersign_test

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestChecklistNamesTests holds docs/CHECKLIST.md against the code: each line has its three parts,
// every test that a line names is there, and docs/OPERATIONS.md or docs/INCIDENTS.md has the
// command of each line, which a script types there.
func TestChecklistNamesTests(t *testing.T) {
	read := func(name string) string {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	text, typed := read("docs/CHECKLIST.md"), read("docs/OPERATIONS.md")+read("docs/INCIDENTS.md")
	tests := testsByFolder(t)
	for _, fault := range checklistFaults(text, typed, tests) {
		t.Error(fault)
	}
	for what, change := range map[string][2]string{
		"a test that does not exist": {"TestVerifyOrder", "TestVerifyOrders"},
		"a test of another folder":   {"`keystore/worker`:", "`keystore`:"},
		"a line without tests":       {"- **Shown by**: `admin`: TestOnlyTLS13OnLoopback.", "- **Shown by**: nothing."},
		"a line without a part":      {"- **Seen by**: `countersign admin tls show`\n", ""},
		"a command that no page has": {"`countersign admin tls show`", "`countersign admin tls prove`"},
		"a test in another form":     {"`cause`: TestKinds", "TestKinds"},
	} {
		changed := strings.Replace(text, change[0], change[1], 1)
		if changed == text || len(checklistFaults(changed, typed, tests)) == 0 {
			t.Errorf("%s is not noticed", what)
		}
	}
}

// checklistFaults returns the faults of the checklist, each as one line.
func checklistFaults(text, typed string, tests map[string][]string) (faults []string) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	_, list, _ := strings.Cut(text, "\n## Lines\n")
	sections := strings.Split(list, "\n### ")[1:]
	if len(sections) == 0 {
		fault("there are no lines")
	}
	for _, section := range sections {
		title, body, _ := strings.Cut(section, "\n")
		var labels []string
		for _, m := range regexp.MustCompile(`(?m)^- \*\*([^*]+)\*\*:`).FindAllStringSubmatch(body, -1) {
			labels = append(labels, m[1])
		}
		if want := []string{"Done", "Seen by", "Shown by"}; !slices.Equal(labels, want) {
			fault("%s: the parts are %q, want %q", title, labels, want)
			continue
		}
		_, seen, _ := strings.Cut(body, "- **Seen by**: `")
		if command, _, _ := strings.Cut(seen, "`"); !strings.Contains(typed, "    "+command) {
			fault("%s: neither OPERATIONS nor INCIDENTS has the command %s", title, command)
		}
		_, shown, _ := strings.Cut(body, "- **Shown by**: ")
		named := 0
		for _, m := range threatTests.FindAllStringSubmatch(shown, -1) {
			for _, name := range testName.FindAllString(m[2], -1) {
				if named++; !slices.Contains(tests[m[1]], name) {
					fault("%s: %s: the folder %s has no such test", title, name, m[1])
				}
			}
		}
		if all := len(testName.FindAllString(shown, -1)); all == 0 || all != named {
			fault("%s: %d names of tests, of which %d have the form `folder`: TestA, TestB", title, all, named)
		}
	}
	return faults
}
