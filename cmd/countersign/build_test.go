package main

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestBuildsForEachPlatform builds the program for each platform of peers and operators, as make
// does. With an empty build cache each platform takes 50 s of a core, and 1 s later.
func TestBuildsForEachPlatform(t *testing.T) {
	// go test caches a result until a file changes that the test has read: these folders also have
	// files for other platforms.
	const ours = `{{with .Module}}{{if .Main}}{{$.Dir}}{{end}}{{end}}`
	folders, err := exec.CommandContext(t.Context(), "go", "list", "-deps", "-f", ours, ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, folder := range strings.Split(strings.TrimSpace(string(folders)), "\n") {
		if _, err := os.ReadDir(folder); err != nil {
			t.Fatal(err)
		}
	}
	for _, platform := range []string{
		"linux/amd64", "linux/arm64", "darwin/amd64", "darwin/arm64", "windows/amd64", "windows/arm64",
	} {
		system, processor, _ := strings.Cut(platform, "/")
		build := exec.CommandContext(t.Context(), "go", "build", "-o", os.DevNull, ".")
		build.Env = append(build.Environ(), "GOOS="+system, "GOARCH="+processor, "CGO_ENABLED=0",
			"GOEXPERIMENT=runtimesecret")
		if out, err := build.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", platform, err, out)
		}
	}
}
