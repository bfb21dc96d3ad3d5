package main

import (
	"bytes"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestChecklist compares the lines of the checklist with docs/CHECKLIST.md, which has their tests.
func TestChecklist(t *testing.T) {
	text, err := os.ReadFile("../../docs/CHECKLIST.md")
	if err != nil {
		t.Fatal(err)
	}
	var documented, printed []string
	for _, m := range regexp.MustCompile("(?s)\n### ([^\n]+)\n.*?- \\*\\*Seen by\\*\\*: `([^`]+)`").
		FindAllStringSubmatch(string(text), -1) {
		documented = append(documented, m[1]+": "+m[2])
	}
	for _, l := range lines() {
		printed = append(printed, l.title+": "+l.seen)
	}
	if !slices.Equal(documented, printed) {
		t.Errorf("docs/CHECKLIST.md has\n%s\nthe daemon\n%s",
			strings.Join(documented, "\n"), strings.Join(printed, "\n"))
	}
}

// TestChecklistIsHonest checks that the checklist says what the configuration does not have.
func TestChecklistIsHonest(t *testing.T) {
	verdicts := func(config string) map[string]verdict {
		t.Helper()
		c, err := parseConfig("/etc/c.toml", []byte(config))
		if err != nil {
			t.Fatal(err)
		}
		all := map[string]verdict{}
		for _, l := range lines() {
			all[l.title] = l.of(c)
		}
		var out bytes.Buffer
		if err := printChecklist(c, &out); err != nil || strings.Count(out.String(), "see: ") != len(all) {
			t.Errorf("%v:\n%s", err, out.String())
		}
		return all
	}
	small := verdicts(least)
	full := verdicts(strings.Replace(least, "[tokens", "admin_https = \"127.0.0.1:7780\"\n[tokens", 1) +
		"workers = 1\n[tokens.anchor]\ntpm = \"/dev/tpmrm0\"\nstate = \"tpm\"\n" +
		"[[sinks]]\nname = \"siem\"\nfile = \"events.jsonl\"\n" +
		"[backup]\nfolder = \"backups\"\nrecipients = [\"" + aRecipient + "\"]\n")
	watched := verdicts(strings.Replace(least, "[tokens", "metrics_listen = \"127.0.0.1:7790\"\n[tokens", 1))
	if got := watched["Monitoring and alerts set up"]; got.state != "partly" {
		t.Errorf("metrics without a receiver of alerts: %v", got)
	}
	for title, want := range map[string][2]string{
		"TLS 1.3 enforced":                 {"off", "on"},
		"Nonces checked for replay":        {"partly", "holds"},
		"Monitoring and alerts set up":     {"off", "unknown"},
		"Panic boundaries at foreign code": {"holds", "partly"},
		"Keys in platform secure storage":  {"unknown", "unknown"},
		"Backup and recovery documented":   {"off", "partly"},
	} {
		if got := [2]string{small[title].state, full[title].state}; got != want {
			t.Errorf("%s: %v, want %v", title, got, want)
		}
	}
}

// TestSinksConfig checks the errors of tables of sinks, each with its field.
func TestSinksConfig(t *testing.T) {
	const name = "\n[[sinks]]\nname = \"siem\"\n"
	for config, want := range map[string]string{
		name: "sinks.siem.syslog, file, url: a sink has one of them",
		name + "file = \"a\"\nurl = \"https://b.example\"":                 "a sink has one of them",
		name + "syslog = \"host\"":                                         `syslog: "host" is not host:port`,
		name + "url = \"http://b.example\"":                                "url: ",
		name + "file = \"ledger.db\"":                                      "is the file of the ledger",
		name + "file = \"a\"\ntypes = [\"KeyCreatd\"]":                     `types: "KeyCreatd" is not a type`,
		name + "file = \"a\"\ntypes = [\"Locked\"]\nexcept = [\"Locked\"]": "exclude each other",
		name + "file = \"a\"\nmax_age = \"1s\"":                            "max_age must be",
		name + "file = \"a\"\nfiles = -1":                                  "files must be",
		name + "file = \"a\"" + name + "file = \"b\"":                      `two have the name "siem"`,
		"\n[[sinks]]\nname = \"../x\"\nfile = \"a\"":                       "sinks: name",
	} {
		_, err := parseConfig("/etc/c.toml", []byte(least+config))
		if err == nil || !strings.Contains(err.Error(), want) ||
			strings.Contains(err.Error(), "b.example") {
			t.Errorf("%s: %v, want %q", config, err, want)
		}
	}
	c, err := parseConfig("/etc/c.toml", []byte(least+name+"file = \"out/events.jsonl\"\n"))
	if err != nil || c.sinks()[0].File.Path != "/etc/out/events.jsonl" || c.sinks()[0].File.Files != 10 {
		t.Errorf("%+v, %v", c.Sinks, err)
	}
}
