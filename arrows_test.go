// Package countersign_test tests properties of the whole repository: imports, prose, and the
// examples of docs/SPEC.md.
package countersign_test

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// room is what a package may import: packages of the project, and outside modules that have a home.
// Names are separated by spaces.
type room struct{ ours, outside string }

// arrows is the house of packages, from the roof down: a package imports packages of the floors
// below only. Each outside module that matters has one home. The table is exact: an arrow that no
// import uses fails the test as a missing arrow does.
var arrows = map[string]room{
	// The binaries.
	"cmd/countersignd": {
		ours: `admin admin/api admin/certs appliance approval audit hsm internal/alert internal/anchor internal/backup
			internal/cause internal/cli internal/durable internal/escrow internal/form internal/gate internal/history
			internal/journal internal/keyring internal/keystore internal/keystore/worker internal/launcher
			internal/ledger
			internal/logline internal/logqueue internal/mail internal/manage internal/meter
			internal/machine internal/mirror internal/operators internal/recipient internal/resource
			internal/sandbox internal/schedule internal/scrub
			internal/secret internal/sink internal/trace internal/webhook noise policy tpm`,
		outside: `github.com/coreos/go-systemd/v22 github.com/pelletier/go-toml/v2
			github.com/spf13/cobra golang.org/x/sys golang.org/x/term`,
	},
	"cmd/countersign": {
		ours: `admin/api approval audit client internal/cli internal/durable internal/escrow internal/form
			internal/ijson internal/journal internal/keystore internal/ownfile internal/recipient
			internal/sshagent internal/update policy transcript`,
		outside: "github.com/rogpeppe/go-internal/diff github.com/spf13/cobra github.com/spf13/pflag " +
			"golang.org/x/crypto/ssh golang.org/x/sys/windows golang.org/x/term",
	},
	// The machine that was booted from the image, and what makes the image.
	"cmd/countersign-machine": {
		ours:    "admin/api approval internal/cli internal/machine/agent internal/manage",
		outside: "github.com/spf13/cobra",
	},
	"internal/machine": {ours: "internal/manage internal/secret internal/update"},
	"internal/machine/agent": {
		ours: "approval internal/cli internal/durable internal/machine internal/manage internal/secret " +
			"internal/update tpm",
		outside: "github.com/pelletier/go-toml/v2 github.com/tyler-smith/go-bip39 golang.org/x/mod " +
			"golang.org/x/sys",
	},
	"internal/update": {ours: "approval"},
	"image":           {ours: "internal/durable internal/machine internal/update tpm"},
	"image/build":     {ours: "image internal/update", outside: "github.com/spf13/cobra"},
	// The edge for operators.
	"admin": {
		ours: `admin/api admin/certs admin/console appliance approval audit internal/alert
			internal/anchor internal/cause internal/escrow internal/history internal/ijson internal/keyring
			internal/keystore internal/ledger internal/logline internal/machine internal/manage internal/meter
			internal/operators internal/peers internal/requestid internal/schedule
			internal/secret internal/sink internal/update internal/webhook policy wire`,
		outside: "github.com/danielgtaylor/huma/v2 github.com/labstack/echo/v4 golang.org/x/net/netutil",
	},
	"admin/certs":   {ours: "internal/keystore"},
	"admin/api":     {ours: "approval audit wire"},
	"admin/console": {},
	// The walk.
	"appliance": {
		ours: `audit internal/alert internal/anchor internal/backup internal/cause internal/durable
			internal/eddsa internal/escrow internal/form internal/gate internal/ijson internal/keyring
			internal/keystore internal/ledger internal/limit internal/mail internal/manage internal/meter
			internal/mirror internal/peers internal/requestid internal/resource internal/schedule internal/sink
			internal/trace
			internal/webhook noise policy transcript wire`,
		outside: "golang.org/x/time",
	},
	// Below the walk: each of these packages follows a part of the ledger.
	"internal/keyring": {
		ours: `approval audit internal/cause internal/eddsa internal/escrow internal/form internal/gate
			internal/ijson internal/keystore internal/ledger internal/limit internal/manage internal/meter
			internal/peers internal/pubkey internal/requestid internal/schedule transcript wire`,
	},
	"internal/peers": {
		ours: `audit internal/gate internal/ijson internal/keystore internal/ledger internal/limit
			internal/manage internal/pubkey internal/requestid wire`,
		outside: "golang.org/x/time",
	},
	"internal/backup": {
		ours:    "audit internal/durable internal/keystore internal/recipient",
		outside: "filippo.io/age golang.org/x/sys/unix",
	},
	"internal/escrow": {
		ours:    "approval internal/ijson internal/keystore internal/recipient internal/secret",
		outside: "filippo.io/age github.com/cloudflare/circl golang.org/x/crypto/ssh",
	},
	"internal/recipient": {outside: "filippo.io/age golang.org/x/crypto"},
	"internal/mirror": {
		ours:    "internal/backup internal/keystore",
		outside: "github.com/pkg/sftp golang.org/x/crypto/ssh",
	},
	"internal/anchor": {
		ours: `audit internal/cause internal/gate internal/keystore internal/ledger internal/manage
			internal/requestid internal/resource`,
	},
	"internal/operators": {
		ours: `approval audit internal/cause internal/ijson internal/ledger internal/manage internal/meter
			internal/requestid internal/secret`,
	},
	"internal/alert": {
		ours: "audit internal/cause internal/ledger internal/mail internal/manage internal/meter internal/scrub " +
			"internal/webhook",
	},
	"internal/cause":  {},
	"internal/gate":   {ours: "internal/ledger"},
	"internal/ledger": {ours: "audit", outside: "go.etcd.io/bbolt golang.org/x/mod"},
	"internal/manage": {ours: "internal/ijson internal/keystore"},
	"internal/meter": {
		ours:    "internal/cause internal/trace wire",
		outside: "github.com/prometheus/client_golang github.com/prometheus/client_model github.com/prometheus/common",
	},
	"internal/history":  {ours: "internal/meter wire"},
	"internal/resource": {ours: "audit"},
	"internal/trace": {
		ours: "internal/keystore internal/webhook wire", outside: "golang.org/x/net golang.org/x/time",
	},
	"internal/sshagent": {ours: "approval", outside: "golang.org/x/crypto/ssh"},
	// The devices.
	"hsm": {
		ours:    `internal/keystore internal/pubkey internal/secret`,
		outside: `github.com/miekg/pkcs11 github.com/stefanberger/go-pkcs11uri`,
	},
	"tpm": {
		ours:    `internal/durable internal/eddsa internal/keystore internal/pubkey internal/secret`,
		outside: `github.com/google/go-tpm golang.org/x/sys`,
	},
	"internal/keystore/worker": {
		ours:    "internal/durable internal/escrow internal/keystore internal/pubkey internal/secret",
		outside: "golang.org/x/sys",
	},
	"internal/form": {
		ours: "audit internal/journal internal/keystore internal/secret internal/webhook transcript",
	},
	"internal/journal": {ours: "internal/keystore"},
	"internal/launcher": {
		ours:    "internal/keystore/worker",
		outside: "github.com/go-json-experiment/json golang.org/x/sys",
	},
	// For programs of peers and auditors.
	"client": {
		ours: `audit internal/durable internal/eddsa internal/ijson internal/ownfile internal/pubkey noise
			transcript wire`,
	},
	"noise": {
		ours: "internal/eddsa internal/ijson internal/pubkey internal/secret",
		outside: `github.com/flynn/noise github.com/go-json-experiment/json golang.org/x/crypto/blake2s
			lukechampine.com/blake3`,
	},
	"transcript": {
		ours: "internal/eddsa internal/ijson internal/pubkey", outside: "github.com/go-json-experiment/json",
	},
	"wire": {ours: "internal/ijson", outside: "github.com/go-json-experiment/json"},
	"approval": {
		ours:    "audit internal/eddsa internal/pubkey",
		outside: "github.com/go-json-experiment/json github.com/go-webauthn/webauthn golang.org/x/crypto/ssh",
	},
	"audit": {
		ours:    "internal/durable internal/eddsa internal/ijson",
		outside: "github.com/go-json-experiment/json golang.org/x/mod",
	},
	"internal/requestid": {},
	"internal/scrub":     {},
	"internal/logline":   {},
	// The leaves: one trade each.
	"policy":            {ours: "internal/ijson", outside: "github.com/cedar-policy/cedar-go"},
	"internal/durable":  {outside: "golang.org/x/sys/windows"},
	"internal/ownfile":  {outside: "golang.org/x/sys/windows"},
	"internal/eddsa":    {outside: "filippo.io/edwards25519"},
	"internal/ijson":    {outside: "github.com/go-json-experiment/json"},
	"internal/keystore": {ours: "internal/secret", outside: "golang.org/x/sys"},
	"internal/secret":   {},
	"internal/limit":    {outside: "github.com/hashicorp/golang-lru/v2"},
	"internal/logqueue": {outside: "golang.org/x/time"},
	"internal/schedule": {outside: "github.com/adhocore/gronx"},
	"internal/pubkey":   {},
	"internal/sandbox": {
		outside: `github.com/elastic/go-seccomp-bpf github.com/landlock-lsm/go-landlock golang.org/x/sys
			kernel.org/pub/linux/libs/security/libcap/psx`,
	},
	"internal/cli":     {outside: "github.com/spf13/cobra github.com/spf13/pflag golang.org/x/term"},
	"internal/mail":    {ours: "internal/keystore internal/secret"},
	"internal/webhook": {ours: "internal/eddsa internal/secret", outside: "github.com/go-json-experiment/json"},
	"internal/sink": {
		ours:    "audit internal/durable internal/ledger internal/webhook",
		outside: "golang.org/x/sys",
	},
	// For tests.
	"client/clienttest": {ours: "noise transcript wire"},
	"internal/keystore/keystoretest": {
		ours: `internal/escrow internal/escrow/escrowtest internal/keystore internal/pubkey internal/scantest
			internal/secret`,
	},
	"internal/escrow/escrowtest": {ours: "internal/escrow internal/scantest", outside: "filippo.io/age"},
	"internal/ledger/ledgertest": {ours: "internal/ledger internal/scantest", outside: "go.etcd.io/bbolt"},
	"internal/mail/mailtest":     {ours: "internal/scantest"},
	"internal/mirror/mirrortest": {ours: "internal/scantest", outside: "golang.org/x/crypto/ssh"},
	"internal/ledger/disktest":   {outside: "github.com/hanwen/go-fuse/v2 golang.org/x/sys"},
	"internal/scantest":          {},
	"scripts/receiver":           {ours: "internal/webhook"},
	"softhsm-tests":              {},
	"monitoring":                 {},
	"packaging":                  {},
	"packaging/notices":          {outside: "golang.org/x/mod"},
	"tpm/tpmtest":                {outside: `github.com/google/go-tpm`},
	"internal/spectest":          {},
	"":                           {},
}

type pkg struct {
	ImportPath string
	Imports    []string
	CgoFiles   []string
}

func list(t *testing.T, env []string, args ...string) (all []pkg) {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Imports,CgoFiles"}, args...)...)
	cmd.Env = append(cmd.Environ(), env...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for d := json.NewDecoder(out); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	return all
}

func TestImportArrows(t *testing.T) {
	seen, module := map[string]bool{}, modulePath(t)
	packages := list(t, nil, "./...")
	// The tool, and what the tool links, has files of its own for Windows.
	for _, p := range list(t, []string{"GOOS=windows", "CGO_ENABLED=0"}, "-deps", "./cmd/countersign") {
		i := slices.IndexFunc(packages, func(q pkg) bool { return q.ImportPath == p.ImportPath })
		if i >= 0 {
			packages[i].Imports = append(packages[i].Imports, p.Imports...)
		} else if strings.HasPrefix(p.ImportPath, module+"/") {
			packages = append(packages, p)
		}
	}
	for _, p := range packages {
		name := strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
		allowed, known := arrows[name]
		if !known {
			t.Errorf("package %q is new: list its allowed imports in arrows", name)
			continue
		}
		seen[name] = true
		if len(p.CgoFiles) > 0 && name != "hsm" {
			t.Errorf("%s has cgo files: only package hsm, which key workers run, may use C", name)
		}
		ours, outside := strings.Fields(allowed.ours), strings.Fields(allowed.outside)
		used := map[string]bool{}
		for _, path := range p.Imports {
			if name, ok := strings.CutPrefix(path, module+"/"); ok {
				used[name] = slices.Contains(ours, name)
				if !used[name] {
					t.Errorf("%s imports %s", p.ImportPath, path)
				}
				continue
			}
			home := slices.IndexFunc(outside, func(module string) bool {
				return path == module || strings.HasPrefix(path, module+"/")
			})
			if first, _, _ := strings.Cut(path, "/"); home >= 0 {
				used[outside[home]] = true
			} else if strings.Contains(first, ".") {
				t.Errorf("%s imports %s", p.ImportPath, path)
			}
		}
		for _, each := range append(ours, outside...) {
			if !used[each] {
				t.Errorf("%s does not import %s: remove the arrow", name, each)
			}
		}
	}
	for name := range arrows {
		if !seen[name] {
			t.Errorf("package %q does not exist: remove it from arrows", name)
		}
	}
}

// TestCLINeedsNoC lists the dependencies of cmd/countersign: no C and no server library. Peers and
// operators can then run the tool on any machine.
func TestCLINeedsNoC(t *testing.T) {
	for _, p := range list(t, []string{"CGO_ENABLED=1"}, "-deps", "./cmd/countersign") {
		first, _, _ := strings.Cut(p.ImportPath, "/")
		if len(p.CgoFiles) > 0 && strings.Contains(first, ".") {
			t.Errorf("%s needs cgo", p.ImportPath)
		}
		for _, heavy := range []string{
			"github.com/miekg/pkcs11", "go.etcd.io/bbolt", "github.com/labstack/echo", "github.com/danielgtaylor/huma",
		} {
			if strings.HasPrefix(p.ImportPath, heavy) {
				t.Errorf("countersign links %s", p.ImportPath)
			}
		}
	}
}

// TestOneConstructor: only package audit puts events together, and a test opens a ledger with a
// replica beside it, unless the line says why not.
func TestOneConstructor(t *testing.T) {
	literal := regexp.MustCompile(`(^|[^\]])audit\.Event\{`)
	for folder, files := range tracked(t, "*.go") {
		for _, file := range files {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			test := strings.HasSuffix(file, "_test.go")
			for i, line := range strings.Split(string(b), "\n") {
				if !test && folder != "audit" && literal.MatchString(line) {
					t.Errorf("%s:%d: make the event with a constructor of package audit", file, i+1)
				}
				alone := strings.Contains(line, "// without a replica: ")
				if test && !alone && strings.Contains(line, "ledger."+"Open(") {
					t.Errorf("%s:%d: open the ledger with ledgertest.Open", file, i+1)
				}
			}
		}
	}
}
