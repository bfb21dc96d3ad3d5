package image_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestDocuments types the commands of maker and ada in docs/OPERATIONS.md, in their order: the
// maker in a copy of the project, and ada at the machine that was made by them.
func TestDocuments(t *testing.T) {
	long(t)
	need(t, "tar", "git", "make")
	m := must(theMaker())(t)
	clone := t.TempDir()
	output(t, "sh", "-c",
		`cd .. && git ls-files -z -co --exclude-standard | tar --null -T - -c | tar -x -C "$0"`, clone)
	for _, key := range []string{"release-1", "release-2"} {
		output(t, "cp", m.path(key), m.path(key+".pub"), clone)
	}
	text := string(must(os.ReadFile("../docs/OPERATIONS.md"))(t))
	blocks := regexp.MustCompile(`(?m)^    # (maker|ada)\n((?:    .+\n)+)(?:\n`+"```text\n((?s:.*?))```"+`\n)?`).
		FindAllStringSubmatch(text, -1)
	var v *vm
	var ada *operator
	for _, b := range blocks {
		commands := strings.ReplaceAll(b[2], "\n    ", "\n")
		if b[1] == "ada" && v == nil {
			disk := filepath.Join(clone, "dist/countersign-vm_0.2.0.raw")
			v = newVM(t, built{raw: disk}, m.settings(t))
			v.start()
			v.ready()
			ada = v.operator()
		}
		if strings.Contains(commands, "machine reset") {
			key := strings.Fields(ada.tool("admin", "audit", "key"))[0]
			appliance := key[:strings.LastIndex(key[:strings.Index(key, "+")], "/")]
			commands = regexp.MustCompile(`reset \S+`).ReplaceAllString(commands, "reset "+appliance)
		}
		if strings.Contains(commands, "machine show") {
			(&installed{vm: v}).proven(ada, "0.3.0")
		}
		cmd := exec.Command("bash", "-euo", "pipefail", "-c", commands)
		cmd.Dir = clone
		cmd.Env = append(os.Environ(), "LEVEL=3", "PATH="+m.path("bin")+":"+os.Getenv("PATH"))
		if ada != nil {
			cmd.Env = append(cmd.Env, ada.env...)
		}
		if b[1] == "maker" { // with the caches of this user
			cmd.Env = append(cmd.Env, "HOME="+os.Getenv("HOME"))
		}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", commands, err, out)
		}
		if strings.Contains(commands, "machine configure") {
			v.configured(ada)
		}
		joined := func(text string) string { return strings.Join(strings.Fields(text), " ") }
		for line := range strings.Lines(b[3]) {
			for part := range strings.SplitSeq(strings.TrimSpace(line), "…") {
				if !strings.Contains(joined(string(out)), joined(part)) {
					t.Errorf("%s does not print %q:\n%s", commands, part, out)
				}
			}
		}
	}
	if v == nil || len(blocks) < 5 {
		t.Fatalf("the document has %d blocks", len(blocks))
	}
}
