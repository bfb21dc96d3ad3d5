package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestTracesConfig refuses settings of traces that can't work, and shows neither the address nor a
// header, which may be secrets.
func TestTracesConfig(t *testing.T) {
	dir := t.TempDir()
	const good = "endpoint = \"https://secret.example:4318/v1/traces\"\n"
	for settings, wrong := range map[string]string{
		"": "", good: "", good + "one_in = 7\nrequests_per_second = 5": "", good + `headers_file = "good"`: "",
		"one_in = 7":                          "traces.endpoint is missing",
		`ca_file = "x"`:                       "traces.endpoint is missing",
		`endpoint = "http://secret.example/"`: "traces.endpoint: the URL must begin with https://",
		`endpoint = "https://a:secret@b/"`:    "traces.endpoint: the URL must have a host, no user",
		`endpoint = "secret"`:                 "traces.endpoint: ",
		good + "one_in = 0":                   "traces.one_in must be 1 to 1000000000, and is 0",
		good + "requests_per_second = 0":      "traces.requests_per_second must be 1 to 100000, and is 0",
		good + `headers_file = "none"`:        "traces.headers_file: ",
		good + `headers_file = "bad"`:         "bad: line 1 is no header NAME: VALUE",
		good + `ca_file = "bad"`:              "bad has no certificate in PEM",
		good + "sample = 1.0":                 "sample",
	} {
		for name, text := range map[string]string{"good": "Authorization: Bearer secret\n", "bad": "secret\n"} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		_, err := parseConfig(filepath.Join(dir, "c.toml"), []byte("listen = \"127.0.0.1:7700\"\n"+
			"admin_socket = \"s\"\nledger = \"l\"\npolicy = \"p\"\n"+
			"[traces]\n"+settings+"\n[tokens.main]\nuri = \"pkcs11:token=t\"\n"+
			"module = \"/m\"\npin_file = \"pin\"\n"))
		if (err == nil) != (wrong == "") || err != nil && (!strings.Contains(err.Error(), wrong) ||
			strings.Contains(err.Error(), "secret")) {
			t.Errorf("%s: %v, want %q", settings, err, wrong)
		}
	}
}
