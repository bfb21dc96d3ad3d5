package packaging_test

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"countersign/internal/cli"
)

// TestPrograms checks the programs of the packages: the linkage, the description of the build, and
// the tool for other systems.
func TestPrograms(t *testing.T) {
	need(t, "dpkg-deb", "qemu-aarch64-static")
	folder, root := must(all())(t), t.TempDir()
	output(t, nil, "sh", "-c", `cd "$0" && sha256sum --quiet -c SHA256SUMS`, folder)
	output(t, nil, "dpkg-deb", "-x", deb(folder, cli.Release), root)
	daemon, tool := filepath.Join(root, "usr/bin/countersignd"), filepath.Join(root, "usr/bin/countersign")

	f := must(elf.Open(daemon))(t)
	defer f.Close()
	if f.Type != elf.ET_DYN {
		t.Errorf("the daemon is no PIE: %v", f.Type)
	}
	flags, relro := must(f.DynValue(elf.DT_FLAGS))(t), false
	for _, p := range f.Progs {
		relro = relro || p.Type == elf.PT_GNU_RELRO
		if p.Type == elf.PT_GNU_STACK && p.Flags&elf.PF_X != 0 {
			t.Error("the daemon's stack can be executed")
		}
	}
	if !relro || len(flags) != 1 || elf.DynFlag(flags[0])&elf.DF_BIND_NOW == 0 {
		t.Errorf("the daemon has no full RELRO: %v, %v", relro, flags)
	}
	if libraries := must(f.ImportedLibraries())(t); !slices.Equal(libraries, []string{"libc.so.6"}) {
		t.Errorf("the daemon is linked to %v", libraries)
	}
	for _, s := range must(f.ImportedSymbols())(t) {
		if strings.HasPrefix(s.Name, "getaddrinfo") || strings.HasPrefix(s.Name, "getpw") ||
			strings.HasPrefix(s.Name, "getgr") || strings.HasPrefix(s.Name, "getnameinfo") {
			t.Errorf("the daemon asks NSS: %s", s.Name)
		}
		// The package depends on libc6 (>= 2.34).
		if slices.Contains([]string{"GLIBC_2.35", "GLIBC_2.36", "GLIBC_2.37", "GLIBC_2.38", "GLIBC_2.39"}, s.Version) {
			t.Errorf("the daemon needs a newer C library for %s: %s", s.Name, s.Version)
		}
	}

	sums := string(must(os.ReadFile("../go.sum"))(t))
	here := must(filepath.Abs(".."))(t)
	for _, program := range []string{daemon, tool} {
		var b cli.Build
		must(0, json.Unmarshal([]byte(output(t, nil, program, "version", "--json")), &b))(t)
		if b.Version != cli.Release || b.Settings["-trimpath"] != "true" || len(b.Modules) < 5 ||
			program == daemon && (b.Formats["ledger"] == 0 || b.Formats["configuration"] == 0) {
			t.Errorf("%s says %+v", program, b)
		}
		formats := fmt.Sprintf("The configuration has format %d, the ledger format %d", b.Formats["configuration"],
			b.Formats["ledger"])
		if news := string(must(os.ReadFile("../NEWS.md"))(t)); program == daemon && !strings.Contains(news, formats) {
			t.Errorf("NEWS.md does not say: %s", formats)
		}
		for _, m := range b.Modules {
			if !strings.Contains(sums, m.Path+" "+m.Version+" "+m.Sum+"\n") {
				t.Errorf("%s has %+v, which go.sum does not know", program, m)
			}
		}
		if content := must(os.ReadFile(program))(t); bytes.Contains(content, []byte(here)) ||
			bytes.Contains(content, []byte(os.Getenv("HOME")+"/")) {
			t.Errorf("%s names a folder of its build", program)
		}
	}

	// The tool for each system, by the first bytes of its format.
	for name, magic := range map[string]string{
		"linux_amd64": "\x7fELF", "linux_arm64": "\x7fELF", "darwin_amd64": "\xcf\xfa\xed\xfe",
		"darwin_arm64": "\xcf\xfa\xed\xfe", "windows_amd64.exe": "MZ", "windows_arm64.exe": "MZ",
	} {
		path := filepath.Join(folder, "countersign_"+cli.Release+"_"+name)
		if b := must(os.ReadFile(path))(t); !strings.HasPrefix(string(b), magic) {
			t.Errorf("%s begins with %q", name, b[:8])
		}
		if !strings.HasPrefix(name, "linux") {
			continue
		}
		f := must(elf.Open(path))(t)
		f.Close()
		if slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
			t.Errorf("%s is not static", name)
		}
	}
	// The tool of arm64 makes a key.
	cliRoot := t.TempDir()
	output(t, nil, "dpkg-deb", "-x", filepath.Join(folder, "countersign-cli_"+cli.Release+"_arm64.deb"), cliRoot)
	arm := filepath.Join(cliRoot, "usr/bin/countersign")
	out := output(t, nil, "qemu-aarch64-static", arm, "version")
	if !strings.Contains(out, "linux/arm64") || !strings.HasPrefix(out, "countersign "+cli.Release) {
		t.Errorf("the tool of arm64 says %s", out)
	}
	key := filepath.Join(t.TempDir(), "peer.key")
	public := output(t, nil, "qemu-aarch64-static", arm, "keygen", key)
	if b := must(os.ReadFile(key))(t); !bytes.Contains(b, []byte(strings.TrimSpace(public))) {
		t.Errorf("the key that arm64 has made has another public half than %s", public)
	}

	// Manual pages and completions.
	for _, path := range []string{
		"usr/share/man/man1/countersignd-setup.1.gz", "usr/share/man/man1/countersign-sign.1.gz",
		"usr/share/bash-completion/completions/countersign", "usr/share/zsh/vendor-completions/_countersignd",
		"usr/share/fish/vendor_completions.d/countersign.fish", "usr/share/countersign/reference.toml",
		"usr/share/countersign/monitoring/rules.yml", "usr/share/countersign/sbom.cdx.json",
		"usr/share/doc/countersign/copyright", "usr/share/countersign/policies/shops.cedar",
	} {
		if st, err := os.Stat(filepath.Join(root, path)); err != nil || st.Size() == 0 {
			t.Errorf("%s: %v", path, err)
		}
	}
}
