package countersign_test

import (
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestThreatModel holds docs/THREAT-MODEL.md against the code: every test that the document names
// is there, each attacker has a row in the table at the top, and each section has its five lines.
func TestThreatModel(t *testing.T) {
	text := read(t, "docs/THREAT-MODEL.md")
	tests := testsByFolder(t)
	for _, fault := range threatFaults(text, tests) {
		t.Error(fault)
	}
	for what, change := range map[string][2]string{
		"a test that does not exist":  {"TestVerifyOrder", "TestVerifyOrders"},
		"a test of another folder":    {"`keystore/worker`:", "`keystore`:"},
		"a section without a row":     {"| [A power cut at any moment]", "| [A power cut]"},
		"a row without a section":     {"### A power cut at any moment", "### A power cut"},
		"a section without all lines": {"- **Stopped by**: The Noise protocol", "- The Noise protocol"},
	} {
		changed := strings.Replace(text, change[0], change[1], 1)
		if changed == text || len(threatFaults(changed, tests)) == 0 {
			t.Errorf("%s is not noticed", what)
		}
	}
}

// testsByFolder lists the names of tests and fuzz targets of each folder.
func testsByFolder(t *testing.T) map[string][]string {
	t.Helper()
	out, err := exec.Command("git", "grep", "-hoE", "--untracked", "--full-name", "-H",
		`^func (Test|Fuzz)[A-Za-z0-9_]+\(`, "--", "*_test.go").Output()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string][]string{}
	for line := range strings.Lines(string(out)) {
		file, name, _ := strings.Cut(strings.TrimSpace(line), ":func ")
		folder := file[:strings.LastIndex(file, "/")+1]
		folder = strings.TrimPrefix(strings.TrimSuffix(folder, "/"), "internal/")
		all[folder] = append(all[folder], strings.TrimSuffix(name, "("))
	}
	return all
}

var (
	threatRow   = regexp.MustCompile(`(?m)^\| \[([^\]]+)\]\(#([^)]+)\) \| `)
	threatTests = regexp.MustCompile("`([a-z/-]+)`:\\s+((?:Test|Fuzz)[A-Za-z0-9]+(?:,\\s+(?:Test|Fuzz)[A-Za-z0-9]+)*)")
	testName    = regexp.MustCompile(`\b(?:Test|Fuzz)[A-Z][A-Za-z0-9]+\b`)
	noAnchor    = regexp.MustCompile(`[^a-z0-9 _-]`)
)

// threatFaults returns the faults of the threat model, each as one line.
func threatFaults(text string, tests map[string][]string) (faults []string) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	named := 0
	for _, m := range threatTests.FindAllStringSubmatch(text, -1) {
		for _, name := range testName.FindAllString(m[2], -1) {
			if named++; !slices.Contains(tests[m[1]], name) {
				fault("%s: the folder %s has no such test", name, m[1])
			}
		}
	}
	if all := len(testName.FindAllString(text, -1)); all != named {
		fault("%d names of tests, of which %d have the form `folder`: TestA, TestB", all, named)
	}
	var rows, sections []string
	for _, m := range threatRow.FindAllStringSubmatch(text, -1) {
		anchor := strings.ReplaceAll(noAnchor.ReplaceAllString(strings.ToLower(m[1]), ""), " ", "-")
		if rows = append(rows, m[1]); anchor != m[2] {
			fault("the row %q links to #%s, not to #%s", m[1], m[2], anchor)
		}
	}
	for _, section := range strings.Split(text, "\n### ")[1:] {
		name, body, _ := strings.Cut(section, "\n")
		body, _, _ = strings.Cut(body, "\n## ")
		sections = append(sections, name)
		var labels []string
		for _, m := range regexp.MustCompile(`(?m)^- \*\*([^*]+)\*\*:`).FindAllStringSubmatch(body, -1) {
			labels = append(labels, m[1])
		}
		if want := []string{"Has", "Gets", "Does not get", "Stopped by", "Shown by"}; !slices.Equal(labels, want) {
			fault("%s: the lines are %q, want %q", name, labels, want)
		}
		if !testName.MatchString(body) {
			fault("%s: no test is named", name)
		}
	}
	if !slices.Equal(rows, sections) {
		for _, name := range sections {
			if !slices.Contains(rows, name) {
				fault("%s: the table at the top has no such row", name)
			}
		}
		for _, name := range rows {
			if !slices.Contains(sections, name) {
				fault("%s: the row has no section", name)
			}
		}
		if len(rows) == len(sections) {
			fault("the rows of the table at the top are in another order than the sections")
		}
	}
	return faults
}
