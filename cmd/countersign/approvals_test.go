package main

import (
	"bytes"
	"crypto/ed25519"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"countersign/approval"
	"countersign/audit"
	"countersign/internal/sshagent"

	"golang.org/x/crypto/ssh/agent"
	"golang.org/x/mod/sumdb/tlog"
)

// logFolder writes the epochs of a log in the form of an export, and returns the folder and the
// verifier key. Each epoch is smaller than a tile.
func logFolder(t *testing.T, private ed25519.PrivateKey, epochs ...[]audit.Event) (dir, vkey string) {
	t.Helper()
	dir = t.TempDir()
	log, err := audit.NewLog(private.Public().(ed25519.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	write := func(name string, b []byte) {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var first int
	var last audit.Checkpoint
	for n, events := range epochs {
		begin := audit.Event{
			Type: audit.EpochBegun, Actor: audit.Daemon(), Action: "epoch", Resource: fmt.Sprintf("epoch/%d", n),
			Outcome: "ok", Metadata: map[string]string{"first": strconv.Itoa(first)},
		}
		if n > 0 {
			begin.Metadata["previous_size"] = strconv.FormatUint(last.Size, 10)
			begin.Metadata["previous_root"] = last.Root.String()
		}
		var stored []tlog.Hash
		var bundle []byte
		reader := tlog.HashReaderFunc(func(indexes []int64) (hashes []tlog.Hash, err error) {
			for _, i := range indexes {
				hashes = append(hashes, stored[i])
			}
			return hashes, nil
		})
		for i, e := range append([]audit.Event{begin}, events...) {
			if root := e.Metadata["root"]; root == "last" {
				e.Metadata["root"] = last.Root.String()
			}
			b := e.Encode(start.Add(time.Duration(first+i) * time.Second))
			hashes, err := tlog.StoredHashes(int64(i), b, reader)
			if err != nil {
				t.Fatal(err)
			}
			stored = append(stored, hashes...)
			bundle = append(binary.BigEndian.AppendUint16(bundle, uint16(len(b))), b...)
		}
		size := uint64(len(events) + 1)
		root, err := tlog.TreeHash(int64(size), reader)
		if err != nil {
			t.Fatal(err)
		}
		last = audit.Checkpoint{Epoch: uint32(n), Size: size, Root: audit.Hash(root)}
		checkpoint, err := log.Sign(last, func(message []byte) ([]byte, error) {
			return ed25519.Sign(private, message), nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := audit.Tiles(size, func(tile audit.Tile) error {
			b := bundle
			if tile.Level >= 0 {
				b, err = tlog.ReadTileData(tlog.Tile{H: 8, L: tile.Level, N: int64(tile.N), W: tile.Width}, reader)
			}
			write(fmt.Sprintf("epochs/%d/%s", n, tile.Path()), b)
			if n == len(epochs)-1 {
				write(tile.Path(), b)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		write(fmt.Sprintf("epochs/%d/checkpoint", n), checkpoint)
		write("checkpoint", checkpoint)
		first += int(size)
	}
	return dir, log.VerifierKey(0)
}

var start = time.Date(2026, 11, 24, 8, 0, 0, 0, time.UTC)

// approved returns the events of an administrator who adds a peer under approval, and the id of the
// administrator's credential.
func approved(t *testing.T, private ed25519.PrivateKey) (events []audit.Event, id string) {
	t.Helper()
	log, err := audit.NewLog(private.Public().(ed25519.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	keys := agent.NewKeyring()
	if err := keys.Add(agent.AddedKey{PrivateKey: ed25519.NewKeyFromSeed(bytes.Repeat([]byte{1}, 32))}); err != nil {
		t.Fatal(err)
	}
	have, err := sshagent.Credentials(keys, nil)
	if err != nil {
		t.Fatal(err)
	}
	c := have[0]
	p := approval.Proposal{
		ID: 1, Appliance: log.Name(), Act: "peer add",
		Parameters: []approval.Parameter{{Name: "name", Value: "shop"}, {Name: "public_key", Value: "ab"}},
		Proposer:   "anna", Proposed: start, Expires: start.Add(24 * time.Hour),
		Needed: 1, Nonce: strings.Repeat("0", 32),
	}
	proof, err := sshagent.Sign(keys, c, approval.ForProposal, p.Text())
	if err != nil {
		t.Fatal(err)
	}
	text := func(v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	digest := p.Digest()
	sum := hex.EncodeToString(digest[:])
	add := func(kind audit.Type, who audit.Actor, resource string, metadata ...string) {
		e := audit.Event{Type: kind, Actor: who, Action: "test", Resource: resource, Outcome: "ok"}
		e.Metadata = map[string]string{}
		for i := 0; i < len(metadata); i += 2 {
			e.Metadata[metadata[i]] = metadata[i+1]
		}
		events = append(events, e)
	}
	anna := audit.Operator("anna")
	first := approval.Operator{
		Name: "anna", Roles: []approval.Role{approval.Administrator, approval.OperatorRole, approval.Approver},
		Credentials: have, Added: 1,
	}
	add(audit.OperatorEnrolled, audit.Operator("uid:0"), "anna", "operator", text(first))
	add(audit.ProposalMade, anna, "proposal/1", "text", p.Text(), "digest", sum)
	add(audit.ApprovalGiven, anna, "proposal/1", "digest", sum, "credential", c.ID, "proof", text(proof))
	add(audit.ProposalRun, audit.Daemon(), "proposal/1", "digest", sum)
	anna.Proposal = 1
	add(audit.PeerAdded, anna, "shop", "public_key", "ab")
	add(audit.ProposalDone, audit.Daemon(), "proposal/1", "digest", sum)
	return events, c.ID
}

func TestAuditApprovals(t *testing.T) {
	private := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, 32))
	call := func(args ...string) (status int, stdout, stderr string) {
		return call(t, "", append([]string{"audit", "approvals"}, args...)...)
	}
	soundLog := func(dir, vkey string) {
		t.Helper()
		var errs bytes.Buffer
		args := []string{"audit", "verify", dir, "--key", vkey}
		if status := run(t.Context(), args, strings.NewReader(""), new(bytes.Buffer), &errs); status != 0 {
			t.Error("the log itself is wrong: ", &errs)
		}
	}
	events, id := approved(t, private)
	dir, vkey := logFolder(t, private, events)
	status, stdout, stderr := call(dir, "--key", vkey)
	if status != 0 {
		t.Fatal(stderr)
	}
	for _, want := range []string{
		"everything below hangs on this first administrator", id, "proposal 1", "peer add", "shop",
		"approved", "by anna", `PeerAdded "shop", event 5`, "done at",
	} {
		if !strings.Contains(stdout, want) {
			t.Errorf("%q is missing in\n%s", want, stdout)
		}
	}
	trusted := filepath.Join(t.TempDir(), "operators.json")
	trust := func(text string) {
		if err := os.WriteFile(trusted, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	trust(`["` + id + `"]`)
	status, stdout, stderr = call(dir, "--key", vkey, "--operators", trusted)
	if status != 0 || strings.Contains(stdout, "hangs") || !strings.Contains(stdout, "who you trust") {
		t.Errorf("%d %s%s", status, stdout, stderr)
	}
	status, stdout, _ = call(dir, "--key", vkey, "--operators", trusted, "--json")
	var r struct {
		Valid, Trusted bool
		First          struct{ Event uint64 }
		Proposals      []struct {
			State     string
			Approvals []struct{ Operator string }
			Did       []struct{ Event uint64 }
		}
	}
	if err := json.Unmarshal([]byte(stdout), &r); err != nil || status != 0 {
		t.Fatalf("%d %v\n%s", status, err, stdout)
	}
	if !r.Valid || !r.Trusted || r.First.Event != 1 || len(r.Proposals) != 1 || r.Proposals[0].State != "done" ||
		len(r.Proposals[0].Approvals) != 1 || r.Proposals[0].Did[0].Event != 5 {
		t.Error(stdout)
	}
	sshKeygen(t, stdout)
	wrong := func(name, code string, event string, args ...string) {
		t.Helper()
		status, stdout, stderr := call(append(args, "--json")...)
		if status != 1 || !strings.Contains(stdout, `"code": "`+code+`"`) || !strings.Contains(stdout, event) {
			t.Errorf("%s: %d %s%s", name, status, stdout, stderr)
		}
	}
	trust(`["` + strings.Repeat("0", 32) + `"]`)
	wrong("another administrator", "wrong_event", `"event": 1`, dir, "--key", vkey, "--operators", trusted)
	trust(`{}`)
	wrong("no list", "failed", "JSON list", dir, "--key", vkey, "--operators", trusted)

	// A log without the approval, which the appliance itself has signed.
	short := append(append([]audit.Event{}, events[:2]...), events[3:]...)
	lying, _ := logFolder(t, private, short)
	soundLog(lying, vkey)
	wrong("no approval", "wrong_event", `"event": 3`, lying, "--key", vkey)

	// A changed entry is detected, as by audit verify.
	changed, _ := logFolder(t, private, events)
	path := filepath.Join(changed, audit.Tile{Level: -1, N: 0, Width: len(events) + 1}.Path())
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, bytes.Replace(b, []byte("shop"), []byte("shoq"), 1), 0o644); err != nil {
		t.Fatal(err)
	}
	wrong("a changed entry", "wrong_event", `"event": 2`, changed, "--key", vkey)

	// Approvals can't be checked after the first epoch was dropped.
	dropped := audit.Event{
		Type: audit.RetentionApplied, Actor: audit.Daemon(), Action: "retention", Resource: "epoch/0", Outcome: "ok",
		Metadata: map[string]string{"root": "last"},
	}
	later, _ := logFolder(t, private, events, []audit.Event{dropped})
	if status, _, stderr := call(later, "--key", vkey); status != 0 {
		t.Error(stderr)
	}
	if err := os.RemoveAll(filepath.Join(later, "epochs/0/tile")); err != nil {
		t.Fatal(err)
	}
	soundLog(later, vkey)
	wrong("dropped", "failed", "can't be checked from their root", later, "--key", vkey)
}

// sshKeygen checks the first approval of a report with ssh-keygen alone, as docs/SPEC.md describes.
func sshKeygen(t *testing.T, report string) {
	t.Helper()
	var r struct{ Proposals []*approval.ProposalHistory }
	if err := json.Unmarshal([]byte(report), &r); err != nil {
		t.Fatal(err)
	}
	p := r.Proposals[0]
	a := p.Approvals[0]
	dir := t.TempDir()
	for name, text := range map[string]string{"allowed": a.Operator + " " + a.PublicKey + "\n", "sig": a.Proof.SSHSIG} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for text, good := range map[string]bool{p.Text: true, strings.Replace(p.Text, "shop", "shoq", 1): false} {
		cmd := exec.Command("ssh-keygen", "-Y", "verify", "-f", "allowed", "-I", a.Operator,
			"-n", approval.ForProposal, "-s", "sig")
		cmd.Dir, cmd.Stdin = dir, strings.NewReader(text)
		out, err := cmd.CombinedOutput()
		if errors.Is(err, exec.ErrNotFound) && os.Getenv("REQUIRE_DEVICES") != "1" {
			t.Log("ssh-keygen is missing (openssh-client): the approval was not checked with it")
			return
		}
		if (err == nil) != good {
			t.Errorf("ssh-keygen: %v\n%s", err, out)
		}
	}
}
