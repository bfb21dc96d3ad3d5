package backup_test

import (
	"archive/tar"
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/backup"
	"countersign/internal/recipient"

	"filippo.io/age"
	"golang.org/x/crypto/ssh"
)

// logOf is an audit log whose private key the test has.
type logOf struct {
	private ed25519.PrivateKey
	log     audit.Log
}

func newLog(t *testing.T) logOf {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	log, err := audit.NewLog(public)
	if err != nil {
		t.Fatal(err)
	}
	return logOf{private, log}
}

// hashes are the stored hashes of a tree.
type hashes []audit.Hash

func (h hashes) ReadHashes(indexes []int64) (all []audit.Hash, err error) {
	for _, i := range indexes {
		all = append(all, h[i])
	}
	return all, nil
}

// prove proves the event of a backup in a log of two events.
func (l logOf) prove(t *testing.T, e audit.Event) backup.Proof {
	t.Helper()
	leaves := [][]byte{started, e.Encode(time.Now())}
	var tree audit.Tree
	var stored hashes
	for _, leaf := range leaves {
		tree.Append(audit.LeafHash(leaf), func(h audit.Hash) { stored = append(stored, h) })
	}
	root, err := tree.Root()
	if err != nil {
		t.Fatal(err)
	}
	path, err := audit.Prove(2, 1, stored)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := l.log.Sign(audit.Checkpoint{Size: 2, Root: root}, func(m []byte) ([]byte, error) {
		return ed25519.Sign(l.private, m), nil
	})
	if err != nil {
		t.Fatal(err)
	}
	continued, err := audit.ProveConsistency(1, 2, stored)
	if err != nil {
		t.Fatal(err)
	}
	return backup.Proof{
		Proof:       audit.Proof{Event: 1, Index: 1, Leaf: leaves[1], Path: path, Checkpoint: signed},
		Consistency: continued,
	}
}

// started is the first event of each log.
var started = audit.NewStarted().Encode(time.Unix(1_800_000_000, 0))

func (l logOf) manifest() backup.Manifest {
	return backup.Manifest{
		Version: "test", LogKey: hex.EncodeToString(l.private.Public().(ed25519.PublicKey)),
		MadeMS: time.Now().UnixMilli(), Size: 1, Root: audit.LeafHash(started).String(),
		Left: []backup.Left{{Path: "/etc/pin", What: "PIN"}}, Keys: []backup.Key{},
	}
}

func parts() []backup.Part {
	return []backup.Part{
		backup.Bytes(backup.File{Kind: backup.Ledger, Path: "/var/ledger.db"}, bytes.Repeat([]byte("ledger"), 100)),
		backup.Bytes(backup.File{Kind: backup.Configuration, Path: "/etc/countersign.toml"}, []byte("# none\n")),
		backup.Bytes(backup.File{Kind: backup.Policy, Path: "/etc/policy.cedar"}, nil),
	}
}

func identity(t *testing.T) *age.X25519Identity {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// made returns a backup to recipients.
func made(t *testing.T, l logOf, to ...age.Recipient) []byte {
	t.Helper()
	var b bytes.Buffer
	if _, err := backup.Write(&b, to, l.manifest(), parts(), func(digest string) (backup.Proof, error) {
		return l.prove(t, audit.NewBackupMade(audit.Daemon(), "backup", digest, 1, len(to))), nil
	}); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func extract(t *testing.T, b []byte, ids ...age.Identity) (backup.Contents, error) {
	t.Helper()
	return backup.Extract(bytes.NewReader(b), ids, t.TempDir())
}

// TestRecipients: each recipient alone can read a backup: an age key, an SSH key, and an SSH key
// with a passphrase. Nobody else can.
func TestRecipients(t *testing.T) {
	l, id, folder := newLog(t), identity(t), t.TempDir()
	texts := []string{id.Recipient().String()}
	files := map[string]string{"age": filepath.Join(folder, "age"), "ssh": "", "passphrase": ""}
	if err := os.WriteFile(files["age"], []byte("# a comment\n"+id.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ssh", "passphrase"} {
		public, private, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		block, err := ssh.MarshalPrivateKey(private, "")
		if name == "passphrase" {
			block, err = ssh.MarshalPrivateKeyWithPassphrase(private, "", []byte("open"))
		}
		if err != nil {
			t.Fatal(err)
		}
		key, err := ssh.NewPublicKey(public)
		if err != nil {
			t.Fatal(err)
		}
		files[name] = filepath.Join(folder, name)
		if err := os.WriteFile(files[name], pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
		texts = append(texts, string(ssh.MarshalAuthorizedKey(key)))
	}
	to, err := recipient.ParseAll(texts)
	if err != nil {
		t.Fatal(err)
	}
	b := made(t, l, to...)
	for name, file := range files {
		ids, err := recipient.ReadIdentities(file, func() ([]byte, error) { return []byte("open"), nil })
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		c, err := extract(t, b, ids...)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if len(c.Files) != 3 || c.Left[0].Path != "/etc/pin" || c.Event != 1 || c.Checkpoint.Size != 2 {
			t.Errorf("%s: %+v", name, c)
		}
		for i, p := range parts() {
			var want bytes.Buffer
			p.Copy(&want)
			if got, err := os.ReadFile(c.Files[i]); err != nil || !bytes.Equal(got, want.Bytes()) ||
				c.Manifest.Files[i].Path != p.Path || c.Manifest.Files[i].Kind != p.Kind {
				t.Errorf("%s: file %d: %q, %v, %+v", name, i, got, err, c.Manifest.Files[i])
			}
		}
	}
	if _, err := extract(t, b, identity(t)); !errors.Is(err, backup.ErrRecipient) {
		t.Errorf("another identity: %v", err)
	}
	wrong, err := recipient.ReadIdentities(files["passphrase"], func() ([]byte, error) { return []byte("shut"), nil })
	if err != nil {
		t.Fatal(err)
	}
	_, err = extract(t, b, wrong...)
	if !errors.Is(err, recipient.ErrIdentity) || strings.Contains(err.Error(), "shut") {
		t.Errorf("a wrong passphrase: %v", err)
	}
}

// TestRecipientTexts: what is no recipient is refused, and a private key is not shown.
func TestRecipientTexts(t *testing.T) {
	id := identity(t)
	for _, text := range []string{"", "age1x", "ssh-ed25519 AAAA", "ssh-dss AAAA", id.String(), "-----BEGIN X-----"} {
		if _, err := recipient.Parse(text); err == nil {
			t.Errorf("%.30q is a recipient", text)
		} else if strings.Contains(strings.ToUpper(err.Error()), "SECRET") {
			t.Errorf("the error shows a secret: %v", err)
		}
	}
	if _, err := recipient.ParseAll(nil); err == nil {
		t.Error("no recipient is enough")
	}
	path := filepath.Join(t.TempDir(), "id")
	if err := os.WriteFile(path, []byte(id.String()+"x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := recipient.ReadIdentities(path, nil); err == nil || strings.Contains(err.Error(), "SECRET") {
		t.Errorf("a damaged identity: %v", err)
	}
}

// TestEveryByteCounts flips each byte of a backup, cuts it at each length, and appends to it. Each
// is an error, and none is taken for another recipient's file without a change of its header.
func TestEveryByteCounts(t *testing.T) {
	l, id := newLog(t), identity(t)
	b := made(t, l, id.Recipient())
	folder := t.TempDir()
	try := func(b []byte) error {
		t.Helper()
		at, err := os.MkdirTemp(folder, "")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(at)
		_, err = backup.Extract(bytes.NewReader(b), []age.Identity{id}, at)
		return err
	}
	if err := try(b); err != nil {
		t.Fatal(err)
	}
	header := bytes.Index(b, []byte("\n---"))
	for i := range b {
		flipped := bytes.Clone(b)
		flipped[i] ^= 1 << (i % 8)
		err := try(flipped)
		if !errors.Is(err, backup.ErrDamaged) && (i > header || !errors.Is(err, backup.ErrRecipient)) {
			t.Fatalf("byte %d of %d: %v", i, len(b), err)
		}
	}
	for n := range b {
		if err := try(b[:n]); err == nil {
			t.Fatalf("the first %d bytes of %d are a backup", n, len(b))
		}
	}
	for _, more := range [][]byte{{0}, b, bytes.Repeat([]byte{0}, 1<<17)} {
		if err := try(append(bytes.Clone(b), more...)); !errors.Is(err, backup.ErrDamaged) {
			t.Errorf("with %d bytes more: %v", len(more), err)
		}
	}
}

// entry is an entry of an archive.
type entry struct {
	name    string
	content []byte
	kind    byte
}

// archived encrypts any archive, as anybody can who knows a recipient.
func archived(t *testing.T, to age.Recipient, entries []entry, after string) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := age.Encrypt(&b, to)
	if err != nil {
		t.Fatal(err)
	}
	a := tar.NewWriter(w)
	for _, e := range entries {
		if e.kind == 0 {
			e.kind = tar.TypeReg
		}
		h := &tar.Header{Name: e.name, Mode: 0o600, Size: int64(len(e.content)), Typeflag: e.kind}
		if e.kind != tar.TypeReg {
			h.Size, h.Linkname = 0, "/etc/passwd"
		}
		if err := a.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if e.kind == tar.TypeReg {
			a.Write(e.content)
		}
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, after)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestForgeries: an archive that no appliance has written is refused, although it is encrypted to
// the right recipient, and writes nothing outside of its folder.
func TestForgeries(t *testing.T) {
	l, id := newLog(t), identity(t)
	sum := func(b []byte) string { s := sha256.Sum256(b); return hex.EncodeToString(s[:]) }
	ledger := []byte("a ledger")
	manifest := l.manifest()
	manifest.Format = 1
	manifest.Files = []backup.File{
		{Kind: backup.Ledger, Path: "/l", Size: int64(len(ledger)), SHA256: sum(ledger)},
		{Kind: backup.Policy, Path: "/p", Size: 0, SHA256: sum(nil)},
	}
	encode := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	proofOf := func(l logOf, manifest []byte) []byte {
		return encode(l.prove(t, audit.NewBackupMade(audit.Daemon(), "backup", sum(manifest), 1, 1)))
	}
	m := encode(manifest)
	good := []entry{{name: "0001", content: ledger}, {name: "0002"}, {name: "manifest.json", content: m},
		{name: "proof.json", content: proofOf(l, m)}}
	if _, err := extract(t, archived(t, id.Recipient(), good, ""), id); err != nil {
		t.Fatal(err)
	}
	changed := func(change func(m *backup.Manifest)) []entry {
		other := manifest
		other.Files = append([]backup.File{}, manifest.Files...)
		change(&other)
		b := encode(other)
		return []entry{good[0], good[1], {name: "manifest.json", content: b},
			{name: "proof.json", content: proofOf(l, b)}}
	}
	with := func(at int, e entry) []entry { all := append([]entry{}, good...); all[at] = e; return all }
	nobodys := bytes.ReplaceAll(m, []byte("/l"), []byte("/m"))
	unknown := append(bytes.TrimSuffix(bytes.Clone(m), []byte("}")), []byte(`,"more":1}`)...)
	for name, entries := range map[string][]entry{
		"nothing":                  {},
		"no proof":                 good[:3],
		"no manifest":              {good[0], good[1], good[3]},
		"a file twice":             {good[0], good[0], good[2], good[3]},
		"files in another order":   {good[1], good[0], good[2], good[3]},
		"the manifest first":       {good[2], good[0], good[1], good[3]},
		"a file after the proof":   append(append([]entry{}, good...), entry{name: "0003"}),
		"a second proof":           append(append([]entry{}, good...), good[3]),
		"a path":                   with(0, entry{name: "../0001", content: ledger}),
		"an absolute path":         with(0, entry{name: "/tmp/0001", content: ledger}),
		"a link":                   with(0, entry{name: "0001", kind: tar.TypeSymlink}),
		"a folder":                 with(0, entry{name: "0001", kind: tar.TypeDir}),
		"another content":          with(0, entry{name: "0001", content: []byte("a Ledger")}),
		"no JSON":                  with(2, entry{name: "manifest.json", content: []byte("{")}),
		"an unknown field":         with(2, entry{name: "manifest.json", content: unknown}),
		"a manifest of nobody":     with(2, entry{name: "manifest.json", content: nobodys}),
		"the proof of another log": with(3, entry{name: "proof.json", content: proofOf(newLog(t), m)}),
		"a proof of another event": with(3, entry{name: "proof.json", content: encode(l.prove(t, audit.NewStarted()))}),
		"another tree":             changed(func(m *backup.Manifest) { m.Root = audit.Hash{1}.String() }),
		"more events":              changed(func(m *backup.Manifest) { m.Size = 2 }),
		"another size":             changed(func(m *backup.Manifest) { m.Files[0].Size++ }),
		"another hash":             changed(func(m *backup.Manifest) { m.Files[0].SHA256 = sum(nil) }),
		"fewer files":              changed(func(m *backup.Manifest) { m.Files = m.Files[:1] }),
		"another kind":             changed(func(m *backup.Manifest) { m.Files[1].Kind = "anything" }),
		"two ledgers":              changed(func(m *backup.Manifest) { m.Files[1].Kind = backup.Ledger }),
		"a relative path":          changed(func(m *backup.Manifest) { m.Files[1].Path = "p" }),
		"a path upwards":           changed(func(m *backup.Manifest) { m.Files[1].Path = "/etc/../p" }),
		"no ledger":                changed(func(m *backup.Manifest) { m.Files[0].Kind = backup.Policy }),
		"format 0":                 changed(func(m *backup.Manifest) { m.Format = 0 }),
	} {
		if _, err := extract(t, archived(t, id.Recipient(), entries, ""), id); !errors.Is(err, backup.ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := extract(t, archived(t, id.Recipient(), good, "more"), id); !errors.Is(err, backup.ErrDamaged) {
		t.Errorf("something after the archive: %v", err)
	}
	newer := changed(func(m *backup.Manifest) { m.Format = 2 })
	newer[2].content = append(bytes.TrimSuffix(newer[2].content, []byte("}")), []byte(`,"more":1}`)...)
	if _, err := extract(t, archived(t, id.Recipient(), newer, ""), id); !errors.Is(err, backup.ErrNewer) {
		t.Errorf("a newer version: %v", err)
	}
}

// TestFailedParts: an error of a part, of the proof or of the file ends the backup with that error.
func TestFailedParts(t *testing.T) {
	l, id := newLog(t), identity(t)
	broken := errors.New("broken")
	no := func(string) (backup.Proof, error) { return backup.Proof{}, broken }
	to := []age.Recipient{id.Recipient()}
	if _, err := backup.Write(io.Discard, to, l.manifest(), parts(), no); !errors.Is(err, broken) {
		t.Errorf("the proof: %v", err)
	}
	all := parts()
	all[1].Copy = func(io.Writer) error { return broken }
	if _, err := backup.Write(io.Discard, to, l.manifest(), all, no); !errors.Is(err, broken) {
		t.Errorf("a part: %v", err)
	}
	short := parts()
	short[0].Size++
	if _, err := backup.Write(io.Discard, to, l.manifest(), short, no); err == nil {
		t.Error("a part with another size than it said")
	}
	if _, err := backup.Write(failing{broken}, to, l.manifest(), parts(), no); !errors.Is(err, broken) {
		t.Errorf("the file: %v", err)
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

// TestErrorsHaveNoContent: a file that was named by mistake is not shown.
func TestErrorsHaveNoContent(t *testing.T) {
	const pin = "4711081547110815"
	for _, text := range []string{pin, "age-encryption.org/v1\n-> " + pin + "\n", "age-encryption.org/v1\n" + pin} {
		_, err := extract(t, []byte(text), identity(t))
		if !errors.Is(err, backup.ErrDamaged) || strings.Contains(err.Error(), pin[:6]) {
			t.Errorf("%v", err)
		}
	}
}
