package countersign_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// secretName matches the names of fields, parameters and results that hold a secret. A path or a
// digest of a secret has another name, such as SeedFile.
var secretName = regexp.MustCompile(`(?i)^((so)?pins?|(\w*)(seed|password)s?|secrets?|mackey|private(key)?|bearer)$`)

// plainType matches types that print, compare and marshal what they have.
var plainType = regexp.MustCompile(`^(\*|\.\.\.|\[\w*\])*(string|byte)$`)

// bearers are the packages in which a token is that of an operator's session. Elsewhere a token is
// a device of PKCS#11.
var bearers = []string{"admin", "admin/api", "internal/operators", "cmd/countersign"}

// plainSecrets are the secrets with a plain type, as PACKAGE DECLARATION NAME, each with a reason.
var plainSecrets = map[string]string{
	"admin/api Key Token":            deviceName,
	"admin/api NewKey Token":         deviceName,
	"admin/api Recovery Token":       deviceName,
	"admin/api Rollback Token":       deviceName,
	"cmd/countersign unlogged Token": deviceName,
	"cmd/countersign older Token":    deviceName,
	"cmd/countersign line token":     deviceName,

	"admin/api OpenLink Secret":                "a person's own, who opens a link",
	"admin/api UseLink Secret":                 "a person's own, who uses a link",
	"admin/api SignedIn Token":                 "the answer to a sign-in, which gives the token to the operator",
	"admin/api Client token":                   "a program's own: admin/api imports nothing that is internal",
	"admin/api SetToken token":                 "a program's own",
	"admin/api WithToken token":                "a program's own",
	"admin/api OnSignedOut token":              "a program's own",
	"admin/api sendAs token":                   "a program's own",
	"cmd/countersign signedIn Token":           "the file of a session in XDG_RUNTIME_DIR",
	"noise IdentityFrom private":               "the API for programs of peers, which imports nothing that is internal",
	"noise DH private":                         "the interface of flynn/noise; of the static key it is a handle",
	"internal/scrub NewKnown secrets":          "the scrubber of a key worker, which exposes the PIN for the call",
	"internal/keystore/worker Exchange secret": "the answer of a key worker, which is cleared",
	"cmd/countersignd rights secrets":          "paths of files",
	"internal/keyring NewKey Seed":             "the path of a file",
	"internal/launcher request PIN":            "the name of a token, for the digest of its PIN file",
	"internal/launcher Start Seed":             "the path of a file",
	"internal/eddsa Expand seed":               "the edge to the algorithm: the seed is in a worker's protected memory",
	"internal/keystore decodeSeed seed":        "an array on the stack, which ParseSeed makes a secret of",
	"tpm newSeed seed":                         "in a function that erases its memory (secret.Do)",
	"tpm sealContent seed":                     "in a function that erases its memory (secret.Do)",
	"tpm openSeal seed":                        "in a function that erases its memory (secret.Do)",
	"internal/escrow Envelope Seed":            "encrypted to the key of the envelope (age)",
	"tpm VolumeKey Private":                    "encrypted by the TPM (TPM2B_PRIVATE)",
	"tpm sealed Private":                       "encrypted by the TPM (TPM2B_PRIVATE)",
}

const deviceName = "the name of a PKCS#11 token or TPM"

// TestSecretsHaveTheirType: a field, parameter or result with the name of a secret has the type
// secret.Bytes, or a reason in plainSecrets. A reason without its field fails, too.
func TestSecretsHaveTheirType(t *testing.T) {
	unused := maps.Clone(plainSecrets)
	for folder, files := range tracked(t, "*.go") {
		if strings.HasSuffix(folder, "test") {
			continue // a package for tests
		}
		for _, name := range files {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			files := token.NewFileSet()
			file, err := parser.ParseFile(files, name, nil, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range file.Decls {
				eachField(d, func(of string, f *ast.Field, field *ast.Ident) {
					isType := types.ExprString(f.Type)
					bearer := slices.Contains(bearers, folder) && strings.EqualFold(field.Name, "token")
					if !secretName.MatchString(field.Name) && !bearer || !plainType.MatchString(isType) {
						return
					}
					key := path.Clean(folder) + " " + of + " " + field.Name
					if _, known := plainSecrets[key]; !known {
						t.Errorf("%s: %s is %s: make it a secret.Bytes, or give the reason for %q in plainSecrets",
							files.Position(field.Pos()), field.Name, isType, key)
					}
					delete(unused, key)
				})
			}
		}
	}
	for key := range unused {
		t.Errorf("%s is no plain secret any more: remove it from plainSecrets", key)
	}
}

// eachField visits the fields of types and the parameters and results of functions in a
// declaration, with the name of the type or function.
func eachField(d ast.Decl, visit func(of string, f *ast.Field, name *ast.Ident)) {
	of := ""
	ast.Inspect(d, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncDecl:
			of = n.Name.Name
		case *ast.TypeSpec:
			of = n.Name.Name
		case *ast.Field:
			for _, name := range n.Names {
				visit(of, n, name)
			}
		}
		return true
	})
}
