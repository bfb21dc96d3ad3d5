// Package countersign_test tests properties of the whole repository: imports, prose, and the
// examples of docs/SPEC.md.
package countersign_test

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// arrows lists the allowed imports of each package: packages of Countersign (ours) and of other
// modules (outside). The import graph has one direction (docs/DESIGN.md, Arrows). Each important
// outside module has a single user.
var arrows = map[string]struct{ ours, outside []string }{
	"internal/eddsa": {nil, []string{"filippo.io/edwards25519"}},
	"internal/ijson": {nil, []string{"github.com/go-json-experiment/json"}},
	"transcript": {
		ours:    []string{"internal/eddsa", "internal/ijson"},
		outside: []string{"github.com/go-json-experiment/json"},
	},
	"wire": {[]string{"internal/ijson"}, []string{"github.com/go-json-experiment/json"}},
	"noise": {
		ours: []string{"internal/eddsa", "internal/ijson"},
		outside: []string{
			"github.com/flynn/noise", "github.com/go-json-experiment/json", "golang.org/x/crypto/blake2s",
			"lukechampine.com/blake3",
		},
	},
	"policy":            {nil, []string{"github.com/cedar-policy/cedar-go"}},
	"internal/limit":    {nil, []string{"github.com/hashicorp/golang-lru/v2"}},
	"internal/ledger":   {[]string{"audit"}, []string{"go.etcd.io/bbolt", "golang.org/x/mod"}},
	"internal/manage":   {ours: []string{"internal/ijson", "internal/keystore"}},
	"internal/gate":     {ours: []string{"internal/ledger"}},
	"internal/resource": {ours: []string{"audit"}},
	"internal/peers": {
		ours:    []string{"audit", "internal/ijson", "internal/keystore", "internal/ledger", "internal/manage"},
		outside: []string{"golang.org/x/time"},
	},
	"internal/keyring": {ours: []string{
		"approval", "audit", "internal/eddsa", "internal/gate", "internal/ijson", "internal/keystore", "internal/ledger",
		"internal/limit", "internal/manage", "internal/peers", "internal/schedule", "transcript", "wire",
	}},
	"internal/ledger/ledgertest": {
		ours:    []string{"internal/ledger"},
		outside: []string{"go.etcd.io/bbolt"},
	},
	"internal/ledger/disktest": {
		outside: []string{"github.com/hanwen/go-fuse/v2", "golang.org/x/sys"},
	},
	"approval": {
		ours: []string{"audit"},
		outside: []string{
			"github.com/go-json-experiment/json", "github.com/go-webauthn/webauthn",
			"golang.org/x/crypto/ssh",
		},
	},
	"internal/operators": {
		ours:    []string{"approval", "audit", "internal/ledger"},
		outside: []string{"golang.org/x/time"},
	},
	"audit":                          {nil, []string{"github.com/go-json-experiment/json", "golang.org/x/mod"}},
	"internal/keystore":              {nil, nil},
	"internal/keystore/keystoretest": {[]string{"internal/keystore"}, nil},
	"hsm": {
		ours:    []string{"internal/keystore"},
		outside: []string{"github.com/miekg/pkcs11", "github.com/stefanberger/go-pkcs11uri"},
	},
	"tpm": {
		ours:    []string{"internal/eddsa", "internal/keystore"},
		outside: []string{"github.com/google/go-tpm", "golang.org/x/sys"},
	},
	"tpm/tpmtest":              {nil, nil},
	"internal/keystore/worker": {[]string{"internal/keystore"}, nil},
	"appliance": {
		ours: []string{
			"audit", "internal/eddsa", "internal/ijson", "internal/keystore", "internal/ledger",
			"internal/limit", "noise", "policy", "internal/schedule", "transcript", "internal/webhook",
			"wire",
		},
		outside: []string{"golang.org/x/time"},
	},
	"admin": {
		ours: []string{
			"admin/api", "admin/certs", "appliance", "approval", "audit", "internal/ijson",
			"internal/keystore", "internal/ledger", "internal/operators", "policy", "internal/schedule",
			"internal/webhook",
		},
		outside: []string{
			"github.com/danielgtaylor/huma/v2", "github.com/labstack/echo/v4", "golang.org/x/net/netutil",
		},
	},
	"admin/certs": {[]string{"internal/keystore"}, nil},
	"admin/api":   {[]string{"approval", "audit", "internal/keystore", "wire"}, nil},
	"client": {
		ours:    []string{"audit", "internal/eddsa", "internal/ijson", "noise", "transcript", "wire"},
		outside: []string{"github.com/go-json-experiment/json"},
	},
	"client/clienttest": {
		ours:    []string{"noise", "transcript", "wire"},
		outside: []string{"github.com/go-json-experiment/json"},
	},
	"cmd/countersign": {
		ours: []string{
			"admin/api", "approval", "audit", "client", "internal/ijson", "internal/keystore", "policy",
			"transcript",
		},
		outside: []string{"github.com/spf13/cobra", "github.com/spf13/pflag", "golang.org/x/crypto/ssh"},
	},
	"cmd/countersignd": {
		ours: []string{
			"admin", "admin/certs", "appliance", "audit", "hsm", "internal/keystore",
			"internal/keystore/worker", "internal/ledger", "noise", "internal/operators", "policy", "tpm",
			"internal/webhook",
		},
		outside: []string{
			"github.com/coreos/go-systemd/v22", "github.com/pelletier/go-toml/v2", "github.com/spf13/cobra",
			"golang.org/x/sys",
		},
	},
	"internal/schedule": {nil, []string{"github.com/adhocore/gronx"}},
	"internal/webhook":  {nil, nil},
	"softhsm-tests":     {nil, nil},
	"":                  {nil, nil},
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
	for _, p := range list(t, nil, "./...") {
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
		for _, path := range p.Imports {
			if ours, ok := strings.CutPrefix(path, module+"/"); ok {
				if !slices.Contains(allowed.ours, ours) {
					t.Errorf("%s imports %s", name, ours)
				}
			} else if first, _, _ := strings.Cut(path, "/"); strings.Contains(first, ".") &&
				!slices.ContainsFunc(allowed.outside, func(module string) bool {
					return path == module || strings.HasPrefix(path, module+"/")
				}) {
				t.Errorf("%s imports %s", name, path)
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
